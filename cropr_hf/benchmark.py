"""How fast is it? Models side by side in one process, round after round, as ratios.

    cropr-hf benchmark --size large --pruning_rate 8 --batch_size 8

compares the stripped Cropr model with the same model unpruned and with a random pruner of the same schedule, on random
weights (speed does not depend on them; detectors are made to find something). `docs/speed.md` explains the figures.
"""

import itertools
import json
import os
import platform
import random
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification
from transformers.utils import logging

from .configuration_cropr_vit import CroprViTConfig
from .cost import head_multiply_adds, multiply_adds, unpruned_config
from .modeling_cropr_vit import (
    CroprViTBackbone,
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
DTYPES = ("float32", "bfloat16", "float16")
DETECTION = ("object_detection", "instance_segmentation")
TIMM_TWINS = {size: f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")}
TIMM_TWINS |= {f"eva02_{size}": f"eva02_{size}_patch14_224" for size in ("tiny", "small", "base", "large")}


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

    def percentile(self, percent: int) -> float | None:
        """Seconds that `percent` of the calls (1 to 99) do not exceed; `None` for fewer than 100 / (100 - percent)."""
        if len(self.seconds) * (100 - percent) < 100:
            return None
        return statistics.quantiles(self.seconds, n=100, method="inclusive")[percent - 1]


def time_call(call: Callable[[], Any], device: torch.device | str = "cpu") -> float:
    """Seconds of one call: by the clock, on a CUDA device by its events."""
    device = torch.device(device)
    if device.type == "cuda":
        with torch.cuda.device(device):  # events are of the current one
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            call()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1000
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def compare(
    candidates: Mapping[str, Callable[[], Any]],
    reference: str,
    min_rounds: int = 5,
    max_rounds: int = 30,
    tolerance: float = 0.01,
    device: torch.device | str = "cpu",
) -> dict[str, Timing]:
    """Times candidates in turn, each once per round, until their ratios to the reference are settled.

    Machines drift; what is compared within one round drifts alike, so each ratio is taken within its round.

    Args:
        candidates: name -> a call to time.
        reference: name of the candidate that the others are compared with.
        min_rounds, max_rounds: it stops between them, when the standard error of every median ratio (1.25 times the
            standard deviation, estimated from the interquartile range, by the root of rounds) is below `tolerance`,
            as a share of the ratio.
        device: where the calls run; see `time_call`.

    Raises:
        `ValueError`: when the reference is not a candidate, there are fewer than 3 rounds, or for a tolerance below 0.
    """
    if reference not in candidates:
        raise ValueError(f"The reference {reference!r} is not among the candidates {', '.join(candidates)}.")
    check_rounds(min_rounds, max_rounds, tolerance)
    timings = {name: Timing() for name in candidates}
    names = list(candidates)
    for call in candidates.values():  # warm-up: allocations, kernel choices, compilation
        call()
    for round_index in logging.tqdm(range(max_rounds), desc="Benchmark rounds"):
        # Another order in each round: what ran before leaves caches and freed memory behind, which some can use.
        for name in random.Random(round_index).sample(names, len(names)):
            timings[name].seconds.append(time_call(candidates[name], device))
        if round_index + 1 >= min_rounds and _summarize(timings, reference) < tolerance:
            break
    return timings


def check_rounds(min_rounds: int, max_rounds: int, tolerance: float) -> None:
    """Raises `ValueError` for what `compare` cannot heed, so that its callers can do so before they work."""
    if not 3 <= min_rounds <= max_rounds:
        raise ValueError(f"`min_rounds` {min_rounds} and `max_rounds` {max_rounds} must be 3 or more, in this order.")
    if not tolerance >= 0:
        raise ValueError(f"`tolerance` is {tolerance}; it must be 0 or more, such as 0.01 for a hundredth.")


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


def library_twins(config: CroprViTConfig, size: str | None = None) -> dict[str, torch.nn.Module]:
    """The unpruned model as other libraries have it: Transformers' ViT, and timm's ViT or EVA where it is installed.

    Args:
        config: of the model.
        size: its name, see `CroprViTConfig.from_size`; timm's models are built by it.
    """
    twins: dict[str, torch.nn.Module] = {}
    if (vit := transformers_twin(config)) is not None:
        twins["transformers ViT"] = vit
    if size not in TIMM_TWINS or find_spec("timm") is None:
        return twins
    own = {name: getattr(config, name) for name in ("image_size", "patch_size", "num_labels")}
    plain = CroprViTConfig.from_size(size, token_reducer=None, **own)
    theirs, ours = unpruned_config(plain).to_dict(), unpruned_config(config).to_dict()
    if different := [name for name in theirs if theirs[name] != ours[name]]:
        logger.warning(f"timm's model is left out, as it may be another one: {', '.join(different)} are not as usual.")
        return twins
    from timm import create_model

    shape: dict[str, Any] = {"img_size": config.input_size, "patch_size": config.patch_size}
    twins["timm"] = create_model(TIMM_TWINS[size], **shape, num_classes=config.num_labels or 0)
    return twins


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


def argument(default: Any, text: str) -> Any:
    """A dataclass field with a line of help, for `HfArgumentParser`."""
    return field(default=default, metadata={"help": text})


@dataclass
class BenchmarkArguments:
    """What `run` compares, and how; the arguments of `cropr-hf benchmark`."""

    model_name_or_path: str | None = argument(
        None, "Cropr checkpoint whose configuration to time; otherwise --size and --config."
    )
    size: str = argument("large", "Of CroprViTConfig.from_size: large, eva02_large, eva02_large_detection, ...")
    task: str | None = argument(None, f"{', '.join(TASKS)}; that of the checkpoint, or {DEFAULT_TASK}.")
    pruning_rate: int | None = argument(None, "Patch tokens removed per module.")
    image_size: int | None = argument(None, "Height and width in pixels.")
    config: str = argument("{}", "Further fields of the configuration, as JSON.")
    batch_size: int = argument(8, "Images per call.")
    training: bool = argument(False, "Time training steps, with auxiliary heads, instead of inference.")
    gradient_checkpointing: bool = argument(False, "In training, compute blocks again in the backward pass.")
    device: str = argument("cpu", "Where to run, such as cuda.")
    dtype: str = argument("float32", "Type of weights and inputs, such as bfloat16.")
    attn_implementation: str | None = argument(None, "Of Transformers: sdpa (default), eager, flash_attention_2, ...")
    compile: bool = argument(False, "Run torch.compile.")
    cuda_graph: bool = argument(False, "On a CUDA device, capture each model in a graph and time its replay.")
    twins: bool = argument(False, "Also time the unpruned model as Transformers and timm have it (classification).")
    profile: bool = argument(False, "Record the time of each operation of one more call.")
    min_rounds: int = argument(7, "Rounds at least; see `compare`.")
    max_rounds: int = argument(40, "Rounds at most.")
    tolerance: float = argument(0.01, "Standard error of the ratios at which it stops.")
    output: str | None = argument(None, "JSON file for the record.")


def parse_config(text: str) -> dict[str, Any]:
    """Fields of a configuration from the command line; raises `ValueError` if they are no JSON object."""
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--config is {text!r}, which is no JSON ({error}).") from error
    if not isinstance(fields, dict):
        raise ValueError(f"--config is {text!r}; give an object, such as '{{\"pruning_rate\": 8}}'.")
    return fields


def _profiler(*activities: ProfilerActivity, **kwargs: Any) -> Any:
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # otherwise every profile writes lines of its own to stderr
    return profile(activities=activities, **kwargs)


def peak_memory(call: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Bytes that a call allocates at its peak, beyond what was allocated before (weights, inputs)."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with _profiler(ProfilerActivity.CPU, profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate((size for _, size in changes), initial=0))


def operation_times(call: Callable[[], Any], device: torch.device | str = "cpu") -> dict[str, dict[str, float]]:
    """What one call spends its time on, by torch's profiler: milliseconds and calls by operation, longest first."""
    activities = [ProfilerActivity.CPU]
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        activities.append(ProfilerActivity.CUDA)
    # The profiler waits for the current device only.
    with torch.cuda.device(device) if on_gpu else nullcontext(), _profiler(*activities) as profiler:
        call()
    times: dict[str, dict[str, float]] = {}
    for event in profiler.key_averages():
        if event.device_type != DeviceType.CPU:
            continue  # a kernel, whose time the operation that launched it has as well
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total  # microseconds
        if spent > 0:
            times[event.key.removeprefix("aten::")] = {"ms": spent / 1000, "calls": event.count}
    return dict(sorted(times.items(), key=lambda item: -item[1]["ms"]))


def _graphed(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """A call as a CUDA graph: its kernels without the time that the host needs to launch them."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # capture needs a warm-up on another stream
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            call()
    return graph.replay


def _config_from(args: BenchmarkArguments) -> CroprViTConfig:
    overrides = parse_config(args.config)
    for name in ("pruning_rate", "image_size"):
        if getattr(args, name) is not None:
            overrides[name] = getattr(args, name)
    if args.model_name_or_path is not None:
        config, unknown = CroprViTConfig.from_pretrained(
            args.model_name_or_path, return_unused_kwargs=True, **overrides
        )
        if unknown:
            raise ValueError(f"--config has {', '.join(unknown)}, which a configuration has not; look for a slip.")
        if config.token_reducer is None:
            raise ValueError(f"{args.model_name_or_path} does not prune; time one that does, or its --size.")
        return config
    return CroprViTConfig.from_size(args.size, **{**TASKS[args.task or DEFAULT_TASK][1], **overrides})


def parse_device(name: str) -> torch.device:
    """A device by its name; raises `ValueError` if there is none, or none that `time_call` can time."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"`device` is {name!r}, which torch cannot use here ({reason}); try cpu.") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"`device` is {name!r}; times are taken on cpu and cuda devices.")
    return device


def _task_of(args: BenchmarkArguments, config: CroprViTConfig) -> str:
    stored = (config.architectures or ["model without a class"])[0]
    by_class = {model_class.__name__: name for name, (model_class, _) in TASKS.items()}
    by_class[CroprViTBackbone.__name__] = "encoder"
    task = args.task or (DEFAULT_TASK if args.model_name_or_path is None else by_class.get(stored))
    if task is None:
        raise ValueError(
            f"{args.model_name_or_path} is the configuration of a {stored}, which is none of the tasks; say by --task "
            f"as which to time it: {', '.join(TASKS)}."
        )
    if args.training and task == "encoder":
        raise ValueError("The task 'encoder' has no loss; choose another task for training steps.")
    if args.twins and task != "image_classification":
        raise ValueError(f"`twins` are classifiers, the task is {task!r}; leave out `twins`, or choose another task.")
    if args.cuda_graph and task in DETECTION:
        raise ValueError(
            f"What a detector computes depends on the image; leave out `cuda_graph` for the task {task!r}."
        )
    return task


def _prepare(args: BenchmarkArguments) -> tuple[CroprViTConfig, str]:
    """Configuration and task; raises `ValueError` for arguments that make no sense."""
    if args.task is not None and args.task not in TASKS:
        raise ValueError(f"The task is {args.task!r}; choose one of {', '.join(TASKS)}.")
    if args.batch_size < 1:
        raise ValueError(f"`batch_size` is {args.batch_size}; it must be 1 or more.")
    if args.dtype not in DTYPES:
        raise ValueError(f"`dtype` is {args.dtype!r}; choose one of {', '.join(DTYPES)}.")
    if args.model_name_or_path is not None and args.size != BenchmarkArguments.size:
        raise ValueError(f"`size` is {args.size!r}, but a checkpoint has a size; leave `size` or the checkpoint out.")
    if args.gradient_checkpointing and not args.training:
        raise ValueError("`gradient_checkpointing` is a matter of training steps; pass `training` as well.")
    if args.twins and args.training:
        raise ValueError("`twins` are compared in inference; leave out `twins` or `training`.")
    on_gpu = parse_device(args.device).type == "cuda"
    if args.cuda_graph and (args.training or not on_gpu):
        raise ValueError(f"`cuda_graph` is for inference on a CUDA device, not for {args.device!r} or training steps.")
    check_rounds(args.min_rounds, args.max_rounds, args.tolerance)
    config = _config_from(args)
    return config, _task_of(args, config)


def run(args: BenchmarkArguments) -> dict[str, Any]:
    """Runs the comparison and returns the record: settings, versions, speed-ups, multiply-add bound.

    Raises:
        `ValueError`: for an unknown task, dtype or device, and for options that make no sense together.
    """
    config, task = _prepare(args)
    if args.compile:
        torch.compiler.reset()  # what was compiled before must not make sizes dynamic, nor use up recompilations
    device, dtype = parse_device(args.device), getattr(torch, args.dtype)
    candidates = pruning_candidates(config, task, args.training)
    models: dict[str, torch.nn.Module] = dict(candidates)
    if args.twins:
        models |= library_twins(candidates[UNPRUNED].config, None if args.model_name_or_path else args.size)
    inputs = _random_inputs(args, config, task, device, dtype)
    calls = {name: _call(args, task, model, inputs) for name, model in models.items()}
    activations = {}
    if args.training:
        activations = {name: saved_bytes(model, inputs) for name, model in models.items()}
    with torch.inference_mode(not args.training):
        timed = {name: _graphed(call, device) for name, call in calls.items()} if args.cuda_graph else calls
        timings = compare(timed, UNPRUNED, args.min_rounds, args.max_rounds, args.tolerance, device)
        memory = {name: peak_memory(call, device) for name, call in calls.items()}
        operations = {name: operation_times(call, device) for name, call in calls.items()} if args.profile else {}
    costs = {name: _costs(model, inputs) for name, model in candidates.items()}
    bound = sum(costs[UNPRUNED].values()) / sum(costs["cropr"].values())
    return {
        "arguments": asdict(args) | ({"size": None} if args.model_name_or_path else {}),
        "machine": machine_name(device),
        "versions": library_versions(),
        "patches": config.num_patches,
        "patches_kept": candidates["cropr"].config.kept_patches(),
        "multiply_adds": costs,
        "multiply_add_bound": bound,
        "linear_bound": costs[UNPRUNED]["linear"] / costs["cropr"]["linear"],
        # A training step has auxiliary heads and a backward pass, which the count has not.
        "share_of_bound": None if args.training else timings["cropr"].speedup / bound,
        "share_of_random": speed_ratio(timings["cropr"], timings["random"]),
        "rounds": len(timings[UNPRUNED].seconds),
        "results": {
            name: {
                "images_per_second": args.batch_size / timing.median,
                "speedup": timing.speedup,
                "spread": timing.spread,
                "p50_ms": 1000 * timing.median,
                "p99_ms": None if (p99 := timing.percentile(99)) is None else 1000 * p99,
                "peak_memory": memory[name],
                "parameters": sum(parameter.numel() for parameter in models[name].parameters()),
                "saved_activations": activations.get(name),
            }
            for name, timing in timings.items()
        },
        **({"operations": operations} if operations else {}),
    }


def _call(args: BenchmarkArguments, task: str, model: torch.nn.Module, inputs: dict[str, Any]) -> Callable[[], Any]:
    """What is timed of a model, which is made ready for it."""
    model.to(args.device, getattr(torch, args.dtype)).train(args.training)
    if args.attn_implementation is not None and hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(args.attn_implementation)  # type: ignore[operator]
    for head in getattr(model, "box_heads", ()):
        # Random weights find nothing. So every proposal is an object of the first class, as in a crowded image.
        torch.nn.init.constant_(head.class_predictor.bias[:1], 5.0)
    if args.training and args.gradient_checkpointing:
        # Older releases of Transformers have the second name only.
        enable: Any = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable()
    # The number of detections depends on the image, so that detectors break into several graphs.
    run_model = torch.compile(model, fullgraph=task not in DETECTION) if args.compile else model
    if args.training:
        return lambda: _training_step(run_model, inputs)
    if not isinstance(model, PreTrainedModel):  # of timm
        return lambda: run_model(inputs["pixel_values"])
    return lambda: run_model(**inputs)


def sweep(
    args: BenchmarkArguments,
    settings: Mapping[str, Sequence[Any]],
    on_record: Callable[[list[dict[str, Any]]], Any] = lambda records: None,
) -> list[dict[str, Any]]:
    """`run` for every combination of the values of some arguments.

    Args:
        args: what all runs have in common.
        settings: names of arguments, and the values that each takes in turn.
        on_record: called with all records so far after each run, for instance to save them.

    Raises:
        `ValueError`: for a name that is no argument, and as `run`.
    """
    names = {item.name for item in fields(BenchmarkArguments)}
    for name, values in settings.items():
        if name not in names:
            raise ValueError(f"{name!r} is no argument of the benchmark; choose among {', '.join(sorted(names))}.")
        if not values:
            raise ValueError(f"{name!r} has no values; give one or more.")
    combinations = [dict(zip(settings, values)) for values in itertools.product(*settings.values())]
    for combination in combinations:
        _prepare(replace(args, **combination))  # all before the first is measured
    records: list[dict[str, Any]] = []
    for index, combination in enumerate(combinations, start=1):
        logger.info(f"Benchmark {index} of {len(combinations)}: {combination}")
        records.append(run(replace(args, **combination)))
        on_record(records)
    return records


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
    """The results of `run` as a Markdown table, and what bounds them."""
    training = record["arguments"]["training"]
    columns = ["model", "images/s", "speed-up", "± half IQR", "p50 ms", "p99 ms", "peak memory"]
    columns += ["parameters", "saved for backward"] if training else []
    rows = []
    for name, row in record["results"].items():
        cells = [name, f"{row['images_per_second']:.2f}", f"{row['speedup']:.2f}", f"{row['spread']:.3f}"]
        cells += [f"{row['p50_ms']:.1f}", "" if row["p99_ms"] is None else f"{row['p99_ms']:.1f}"]
        cells += [f"{row['peak_memory'] / 2**20:.0f} MiB"]
        if training:
            cells += [f"{row['parameters'] / 1e6:.0f} M", f"{row['saved_activations'] / 2**30:.2f} GiB"]
        rows.append(cells)
    share, spread = record["share_of_random"]
    lines = [
        markdown_table(columns, rows),
        "",
        f"multiply-add bound of inference {record['multiply_add_bound']:.2f} (linear layers alone "
        f"{record['linear_bound']:.2f})"
        + ("" if training else f", of which Cropr reaches {record['share_of_bound']:.2f}"),
        f"{share:.3f} ± {spread:.3f} of the random pruner's throughput",
        f"{record['rounds']} rounds; {record['machine']}; torch {record['versions']['torch']}, transformers "
        f"{record['versions']['transformers']}",
    ]
    if "operations" in record:
        lines += ["", _format_operations(record["operations"])]
    return "\n".join(lines)


def format_sweep(records: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """The results of `sweep` as a Markdown table, a row per run; `names` are the arguments that differ."""
    columns = ["unpruned images/s", "Cropr images/s", "speed-up", "± half IQR", "random", "bound", "share of bound"]
    columns += ["share of random", "p50 ms", "p99 ms", "peak memory"]
    rows = []
    for record in records:
        unpruned, cropr, chance = (record["results"][name] for name in (UNPRUNED, "cropr", "random"))
        both = (unpruned, cropr)
        p99 = " → ".join("–" if row["p99_ms"] is None else f"{row['p99_ms']:.1f}" for row in both)
        rows.append(
            [
                *(str(record["arguments"][name]) for name in names),
                *(f"{row['images_per_second']:.2f}" for row in both),
                f"{cropr['speedup']:.2f}",
                f"{cropr['spread']:.3f}",
                f"{chance['speedup']:.2f}",
                f"{record['multiply_add_bound']:.2f}",
                "–" if record["share_of_bound"] is None else f"{record['share_of_bound']:.2f}",
                f"{record['share_of_random'][0]:.3f} ± {record['share_of_random'][1]:.3f}",
                " → ".join(f"{row['p50_ms']:.1f}" for row in both),
                p99,
                " → ".join(f"{row['peak_memory'] / 2**20:.0f}" for row in both) + " MiB",
            ]
        )
    return markdown_table([*names, *columns], rows, len(names))


def _format_operations(operations: dict[str, dict[str, dict[str, float]]], count: int = 12) -> str:
    """The longest operations of the unpruned model and of Cropr, and the rest in one row."""
    unpruned, cropr = operations[UNPRUNED], operations["cropr"]
    nothing = {"ms": 0.0, "calls": 0.0}

    def longest_time(name: str) -> float:
        return max(times.get(name, nothing)["ms"] for times in (unpruned, cropr))

    longest = sorted(unpruned | cropr, key=longest_time, reverse=True)
    rows = []
    for name in longest[:count]:
        cells = [name]
        for times in (unpruned, cropr):
            row = times.get(name, nothing)
            cells += [f"{row['ms']:.2f}", f"{row['calls']:.0f}"]
        rows.append(cells)
    rest = [
        (sum(times[name]["ms"] for name in names), sum(times[name]["calls"] for name in names))
        for times in (unpruned, cropr)
        for names in [times.keys() - set(longest[:count])]
    ]
    rows.append(["others", *(cell for ms, calls in rest for cell in (f"{ms:.2f}", f"{calls:.0f}"))])
    return markdown_table(["operation", "unpruned ms", "calls", "Cropr ms", "calls"], rows)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], num_names: int = 1) -> str:
    """A table whose first `num_names` columns are names, and the others numbers."""
    alignment = ["---"] * num_names + ["---:"] * (len(columns) - num_names)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, alignment, *rows))
