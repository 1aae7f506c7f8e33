"""How fast is it? Models side by side in one process, round after round, as ratios.

    cropr-hf benchmark --size large --pruning_rate 8 --batch_size 8

compares the stripped Cropr model with the same model unpruned, with a random pruner of the same schedule, and with
Transformers' own ViT, on random weights (speed does not depend on them; detectors are made to find something).
"""

import json
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTForImageClassification
from transformers.utils import logging

from .configuration_cropr_vit import CroprViTConfig
from .modeling_cropr_vit import (
    CroprViTForImageClassification,
    CroprViTForSemanticSegmentation,
    CroprViTModel,
    CroprViTPreTrainedModel,
)
from .modeling_cropr_vit_detection import CroprViTForInstanceSegmentation, CroprViTForObjectDetection
from .version import __version__


logger = logging.get_logger(__name__)

UNPRUNED = "unpruned"
# Model class, and what a configuration without a checkpoint has.
TASKS: dict[str, tuple[type[CroprViTPreTrainedModel], dict[str, Any]]] = {
    "encoder": (CroprViTModel, {}),
    "image_classification": (CroprViTForImageClassification, {"num_labels": 1000}),
    "semantic_segmentation": (CroprViTForSemanticSegmentation, {"num_labels": 150, "num_queries": None}),
    "object_detection": (CroprViTForObjectDetection, {"num_labels": 80}),
    "instance_segmentation": (CroprViTForInstanceSegmentation, {"num_labels": 80}),
}
DEFAULT_TASK = "image_classification"
DETECTION = ("object_detection", "instance_segmentation")


def multiply_adds(
    config: CroprViTConfig,
    grid_size: tuple[int, int] | None = None,
    attention: bool = True,
    pruning: int | Sequence[int] | None = None,
) -> int:
    """Multiply-adds of one image through patch embedding and blocks: linear layers and attention products.

    Args:
        config: any configuration; its schedule and its windows decide the tokens of each block.
        grid_size: rows and columns of patches of the input; those of `config.image_size` by default.
        attention: whether attention products count; the paper's figures of detectors leave them out.
        pruning: a rate or a schedule instead of the configured one, as `set_pruning` takes it.
    """
    grid_size = config.grid_size if grid_size is None else grid_size
    num_patches = grid_size[0] * grid_size[1]
    patches_per_block = [num_patches, *config.kept_patches(num_patches, pruning)[:-1]]
    if config.last_layer_fusion:
        patches_per_block[-1] = num_patches
    size = config.hidden_size
    mlp_weights = (3 if config.use_gated_mlp else 2) * size * config.intermediate_size
    total = num_patches * size * config.num_channels * config.patch_size**2
    for block, patches in enumerate(patches_per_block, start=1):
        tokens = attended = neighbours = patches + config.num_prefix_tokens
        if window_grid := config.window_grid(block, patches, grid_size):
            side = config.window_size
            attended = math.prod(-(-length // side) * side for length in window_grid)  # with padding
            neighbours = side**2
        total += tokens * mlp_weights + attended * 4 * size**2
        if attention:
            total += 2 * attended * neighbours * size
    return total


def head_multiply_adds(model: torch.nn.Module, inputs: dict[str, Any]) -> int:
    """Multiply-adds of a batch in what follows the encoder, as torch counts them while it runs."""
    counter = FlopCounterMode(display=False)
    with counter:
        model(**inputs)
    name = type(model).__name__
    counts = {module: sum(operations.values()) for module, operations in counter.get_flop_counts().items()}
    encoder = name if isinstance(model, CroprViTModel) else f"{name}.{CroprViTPreTrainedModel.base_model_prefix}"
    return (counts.get(name, 0) - counts.get(encoder, 0)) // 2


@dataclass
class Timing:
    """Seconds per call of one candidate over all rounds, and its speed relative to the reference.

    Attributes:
        seconds: one entry per round.
        speedup: median over rounds of reference time / own time.
        spread: half the interquartile range of these ratios.
    """

    seconds: list[float] = field(default_factory=list)
    speedup: float = 1.0
    spread: float = 0.0

    @property
    def median(self) -> float:
        """Median seconds per call."""
        return statistics.median(self.seconds)


def compare(
    candidates: dict[str, Callable[[], Any]],
    reference: str,
    min_rounds: int = 5,
    max_rounds: int = 30,
    tolerance: float = 0.01,
    synchronize: Callable[[], Any] = lambda: None,
) -> dict[str, Timing]:
    """Times candidates in turn, each once per round, until their ratios to the reference are settled.

    Machines drift; what is compared within one round drifts alike, so each ratio is taken within its round.

    Args:
        candidates: name -> a call to time.
        reference: name of the candidate that the others are compared with.
        min_rounds, max_rounds: it stops between them, when the standard error of every median ratio (1.25 times the
            standard deviation, estimated from the interquartile range, by the root of rounds) is below `tolerance`,
            as a share of the ratio.
        synchronize: called before the clock is read (`torch.cuda.synchronize` on a GPU).

    Raises:
        `ValueError`: when the reference is not a candidate, or there are fewer than 3 rounds.
    """
    if reference not in candidates:
        raise ValueError(f"The reference {reference!r} is not among the candidates {', '.join(candidates)}.")
    if not 3 <= min_rounds <= max_rounds:
        raise ValueError(f"`min_rounds` {min_rounds} and `max_rounds` {max_rounds} must be 3 or more, in this order.")
    timings = {name: Timing() for name in candidates}
    names = list(candidates)
    for call in candidates.values():  # warm-up: allocations, kernel choices, compilation
        call()
    for round_index in logging.tqdm(range(max_rounds), desc="Benchmark rounds"):
        # Each candidate comes first in its turn, so that none always runs after the same one.
        shift = round_index % len(names)
        for name in names[shift:] + names[:shift]:
            synchronize()
            start = time.perf_counter()
            candidates[name]()
            synchronize()
            timings[name].seconds.append(time.perf_counter() - start)
        if round_index + 1 >= min_rounds and _summarize(timings, reference) < tolerance:
            break
    return timings


def speed_ratio(timing: Timing, other: Timing) -> tuple[float, float]:
    """How many times faster `timing` is than `other`: median over rounds, and half the interquartile range."""
    ratios = [seconds / own for seconds, own in zip(other.seconds, timing.seconds)]
    lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return median, (upper - lower) / 2


def _summarize(timings: dict[str, Timing], reference: str) -> float:
    """Sets speed-ups and spreads; returns the largest relative standard error."""
    errors = []
    for timing in timings.values():
        timing.speedup, timing.spread = speed_ratio(timing, timings[reference])
        deviation = 2 * timing.spread / 1.349  # of a normal distribution
        errors.append(1.253 * deviation / len(timing.seconds) ** 0.5 / timing.speedup)
    return max(errors)


def pruning_candidates(
    config: CroprViTConfig, task: str = "image_classification", training: bool = False
) -> dict[str, CroprViTPreTrainedModel]:
    """The model of `config` for one of `TASKS`, its unpruned twin, and a random pruner of its schedule.

    Without `training` the first is stripped, else it has its auxiliary heads.
    """
    fields = config.to_dict() | {"use_auxiliary_heads": False}
    configs = {
        UNPRUNED: unpruned_config(config),
        "cropr": CroprViTConfig(**fields | {"token_reducer": "cropr", "use_auxiliary_heads": training}),
        "random": CroprViTConfig(**fields | {"token_reducer": "random"}),
    }
    return {name: TASKS[task][0](config) for name, config in configs.items()}


def unpruned_config(config: CroprViTConfig) -> CroprViTConfig:
    """The same model without pruning."""
    unpruned = {"token_reducer": None, "pruning_rate": None, "pruning_schedule": None, "use_auxiliary_heads": False}
    return CroprViTConfig(**config.to_dict() | unpruned)


def transformers_twin(config: CroprViTConfig) -> ViTForImageClassification | None:
    """Transformers' own ViT of the same size, if the configuration is that of a ViT."""
    is_vit = config.use_cls_token and config.use_absolute_position_embeddings and config.rope_theta is None
    if (
        not is_vit
        or config.use_gated_mlp
        or config.use_mlp_norm
        or config.num_register_tokens
        or config.layerscale_value is not None
    ):
        return None
    names = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size"]
    names += ["patch_size", "num_channels", "hidden_act", "num_labels"]
    return ViTForImageClassification(ViTConfig(**{name: getattr(config, name) for name in names}))


def saved_bytes(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """Bytes of activations that a forward pass keeps for the backward pass; parameters do not count."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would form a cycle with its graph, and stay in memory

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs).loss
    total = sum(size for pointer, size in saved.items() if pointer not in own)
    del loss  # until here the graph holds what was saved, so that no pointer occurs twice
    return total


def _argument(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class BenchmarkArguments:
    """What `run` compares, and how; the arguments of `cropr-hf benchmark`."""

    model_name_or_path: str | None = _argument(
        None, "Cropr checkpoint whose configuration to time; otherwise --size and --config."
    )
    size: str = _argument("large", "Of CroprViTConfig.from_size: large, eva02_large, eva02_large_detection, ...")
    task: str | None = _argument(None, f"{', '.join(TASKS)}; that of the checkpoint, or {DEFAULT_TASK}.")
    pruning_rate: int | None = _argument(None, "Patch tokens removed per module.")
    image_size: int | None = _argument(None, "Height and width in pixels.")
    config: str = _argument("{}", "Further fields of the configuration, as JSON.")
    batch_size: int = _argument(8, "Images per call.")
    training: bool = _argument(False, "Time training steps, with auxiliary heads, instead of inference.")
    gradient_checkpointing: bool = _argument(False, "In training, compute blocks again in the backward pass.")
    device: str = _argument("cpu", "Where to run, such as cuda.")
    dtype: str = _argument("float32", "Type of weights and inputs, such as bfloat16.")
    compile: bool = _argument(False, "Run torch.compile.")
    min_rounds: int = _argument(7, "Rounds at least; see `compare`.")
    max_rounds: int = _argument(40, "Rounds at most.")
    tolerance: float = _argument(0.01, "Standard error of the ratios at which it stops.")
    output: str | None = _argument(None, "JSON file for the record.")


def parse_config(text: str) -> dict[str, Any]:
    """Fields of a configuration from the command line; raises `ValueError` if they are no JSON object."""
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--config is {text!r}, which is no JSON ({error}).") from error
    if not isinstance(fields, dict):
        raise ValueError(f"--config is {text!r}; give an object, such as '{{\"pruning_rate\": 8}}'.")
    return fields


def _config_from(args: BenchmarkArguments) -> CroprViTConfig:
    overrides = parse_config(args.config)
    for name in ("pruning_rate", "image_size"):
        if getattr(args, name) is not None:
            overrides[name] = getattr(args, name)
    if args.model_name_or_path is not None:
        return CroprViTConfig.from_pretrained(args.model_name_or_path, **overrides)
    return CroprViTConfig.from_size(args.size, **{**TASKS[args.task or DEFAULT_TASK][1], **overrides})


def _check(args: BenchmarkArguments) -> None:
    if args.task is not None and args.task not in TASKS:
        raise ValueError(f"The task is {args.task!r}; choose one of {', '.join(TASKS)}.")
    if args.batch_size < 1:
        raise ValueError(f"`batch_size` is {args.batch_size}; it must be 1 or more.")
    if not isinstance(getattr(torch, args.dtype, None), torch.dtype):
        raise ValueError(f"`dtype` is {args.dtype!r}; give a type of torch, such as float32 or bfloat16.")
    if args.gradient_checkpointing and not args.training:
        raise ValueError("`gradient_checkpointing` is a matter of training steps; pass `training` as well.")


def _task_of(args: BenchmarkArguments, config: CroprViTConfig) -> str:
    stored = getattr(config, "architectures", None) or []
    own = [task for task, (model_class, _) in TASKS.items() if model_class.__name__ in stored]
    task = args.task or (own[0] if own else DEFAULT_TASK)
    if args.training and task == "encoder":
        raise ValueError("The task 'encoder' has no loss; choose another task for training steps.")
    return task


def run(args: BenchmarkArguments) -> dict[str, Any]:
    """Runs the comparison and returns the record: settings, versions, speed-ups, multiply-add bound.

    Raises:
        `ValueError`: for an unknown task or dtype, or `gradient_checkpointing` without `training`.
    """
    _check(args)
    config = _config_from(args)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    task = _task_of(args, config)
    models: dict[str, torch.nn.Module] = dict(pruning_candidates(config, task, args.training))
    if task == "image_classification" and (twin := transformers_twin(config)) is not None:
        models["transformers ViT"] = twin
    inputs = _random_inputs(args, config, task, device, dtype)
    activations = {}
    for name, model in models.items():
        model.to(device, dtype).train(args.training)
        for head in getattr(model, "box_heads", ()):
            # Random weights find nothing. So every proposal is an object of the first class, as in a crowded image.
            torch.nn.init.constant_(head.class_predictor.bias[:1], 5.0)
        if args.training and args.gradient_checkpointing:
            # Older releases of Transformers have the second name only.
            enable: Any = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable()
        if args.training:
            activations[name] = saved_bytes(model, inputs)

    def call(model: torch.nn.Module) -> Callable[[], Any]:
        # The number of detections depends on the image, so that detectors break into several graphs.
        run_model = torch.compile(model, fullgraph=task not in DETECTION) if args.compile else model
        return lambda: _training_step(run_model, inputs) if args.training else run_model(**inputs)

    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    with torch.inference_mode(not args.training):
        timings = compare(
            {name: call(model) for name, model in models.items()},
            UNPRUNED,
            args.min_rounds,
            args.max_rounds,
            args.tolerance,
            synchronize,
        )
    config = models["cropr"].config  # type: ignore[assignment]
    costs = {name: _costs(models[name], inputs) for name in (UNPRUNED, "cropr", "random")}
    bound = sum(costs[UNPRUNED].values()) / sum(costs["cropr"].values())
    return {
        "arguments": asdict(args),
        "machine": machine_name(device),
        "versions": library_versions(),
        "patches_kept": config.kept_patches(),
        "multiply_adds": costs,
        "multiply_add_bound": bound,
        "share_of_bound": timings["cropr"].speedup / bound,
        "share_of_random": speed_ratio(timings["cropr"], timings["random"]),
        "rounds": len(timings[UNPRUNED].seconds),
        "results": {
            name: {
                "images_per_second": args.batch_size / timing.median,
                "speedup": timing.speedup,
                "spread": timing.spread,
                "parameters": sum(parameter.numel() for parameter in models[name].parameters()),
                "saved_activations": activations.get(name),
            }
            for name, timing in timings.items()
        },
    }


def library_versions() -> dict[str, str]:
    """What ran, for records."""
    versions = {"cropr_hf": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {**versions, "python": platform.python_version()}


def machine_name(device: torch.device) -> str:
    """The GPU, or the CPU and the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):  # Linux, where the platform module knows the instruction set only
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            models = re.findall(r"^model name\s*: (.+)$", file.read(), flags=re.MULTILINE)
        name = models[0] if models else name
    return f"{name}, {torch.get_num_threads()} threads"


def _costs(model: Any, inputs: dict[str, Any]) -> dict[str, int]:
    """Multiply-adds per image: linear layers and attention of the encoder, and the head."""
    linear = multiply_adds(model.config, attention=False)
    with torch.no_grad():
        head = head_multiply_adds(model, inputs) // len(inputs["pixel_values"])
    return {"linear": linear, "attention": multiply_adds(model.config) - linear, "head": head}


def _random_inputs(
    args: BenchmarkArguments, config: CroprViTConfig, task: str, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Pixels, and labels in training."""
    height, width = config.input_size
    shape = (args.batch_size, config.num_channels, height, width)
    inputs: dict[str, Any] = {"pixel_values": torch.randn(shape, device=device, dtype=dtype)}
    if not args.training:
        return inputs
    if task in DETECTION:
        inputs["labels"] = [_random_objects(config, (height, width), device) for _ in range(args.batch_size)]
    else:
        size = (args.batch_size, height, width) if task == "semantic_segmentation" else (args.batch_size,)
        inputs["labels"] = torch.randint(config.num_labels or 1, size, device=device)
    return inputs


def _random_objects(
    config: CroprViTConfig, image_size: tuple[int, int], device: torch.device, count: int = 8
) -> dict[str, torch.Tensor]:
    return {
        "class_labels": torch.randint(config.num_labels or 1, (count,), device=device),
        "boxes": 0.25 + 0.25 * torch.rand(count, 4, device=device),  # inside of the image
        "masks": torch.rand(count, *image_size, device=device) > 0.5,
    }


def _training_step(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    model(**inputs).loss.backward()
    model.zero_grad()  # now, so that only one of the models has gradients at a time


def format_table(record: dict[str, Any]) -> str:
    """The results of `run` as a Markdown table."""
    training = record["arguments"]["training"]
    lines = [
        "| model | images/s | speed-up | ± half IQR |" + (" parameters | saved for backward |" if training else "")
    ]
    lines.append("| --- |" + " ---: |" * (5 if training else 3))
    for name, row in record["results"].items():
        line = f"| {name} | {row['images_per_second']:.2f} | {row['speedup']:.2f} | {row['spread']:.3f} |"
        if training:
            line += f" {row['parameters'] / 1e6:.0f} M | {row['saved_activations'] / 2**30:.2f} GiB |"
        lines.append(line)
    share, spread = record["share_of_random"]
    lines += [
        "",
        f"multiply-add bound {record['multiply_add_bound']:.2f}; Cropr reaches {record['share_of_bound']:.2f} of it, "
        f"and {share:.3f} ± {spread:.3f} of the random pruner's throughput",
        f"{record['rounds']} rounds; {record['machine']}; torch {record['versions']['torch']}, transformers "
        f"{record['versions']['transformers']}",
    ]
    return "\n".join(lines)
