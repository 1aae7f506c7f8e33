"""How fast is it? Models side by side in one process, round after round, as ratios.

    cropr-hf benchmark --size large --pruning_rate 8 --batch_size 8

compares the stripped model with the same model unpruned and with a random pruner of the same schedule, on random
weights (speed does not depend on them; detectors are made to find something). `docs/speed.md` explains the figures.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification
from transformers.hf_argparser import HfArg
from transformers.utils import logging

from ..arguments import DTYPES, parse_config, parse_device
from ..configuration_cropr_vit import CroprViTConfig
from ..modeling_cropr_vit import CroprViTPreTrainedModel
from ..reducer_random import RandomReducer
from ..tasks import DEFAULT_TASK, TASKS, find_task
from ..token_reduction import find_token_reducer
from .alternatives import COMPILED, INT8, SMALLER_IMAGE, SMALLER_MODEL, quantized, smaller_image, smaller_model
from .cost import head_multiply_adds, multiply_adds, unpruned_config
from .counts import PATCHES_LEFT, PatchCounts
from .instruments import (
    compiled,
    graphed,
    library_versions,
    machine_name,
    operation_times,
    peak_memory,
    saved_bytes,
)
from .timing import check_rounds, compare, speed_ratio


logger = logging.get_logger(__name__)

UNPRUNED, RANDOM = "unpruned", RandomReducer.name
TIMM_REFERENCES = {size: f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")}
TIMM_REFERENCES |= {f"eva02_{size}": f"eva02_{size}_patch14_224" for size in ("tiny", "small", "base", "large")}


def pruning_candidates(
    config: CroprViTConfig, task: str = DEFAULT_TASK, training: bool = False
) -> dict[str, CroprViTPreTrainedModel]:
    """The unpruned model of `config` for one of `TASKS`, that of its method by the name of it, and `random_twin`.

    Without `training` the model is stripped, and keeps what its schedule says, since by random weights nothing can
    follow the image; else it has its auxiliary heads, if its method has any.

    Raises:
        `ValueError`: for a configuration that does not prune, or that the method cannot run with.
    """
    method = find_token_reducer(config)
    if method is None:
        raise ValueError("The configuration does not prune (`token_reducer` is None); give one that does.")
    heads = {"use_auxiliary_heads": training and method.supports_auxiliary_heads}
    scheduled = {} if training else method.scheduled_fields(config)
    configs = {
        UNPRUNED: unpruned_config(config),
        method.name: CroprViTConfig(**config.to_dict() | heads | scheduled),
        RANDOM: random_twin(config),
    }
    return {name: TASKS[task].model_class(config) for name, config in configs.items()}


def random_twin(config: CroprViTConfig) -> CroprViTConfig:
    """The configuration of a random pruner whose blocks work on as many tokens as those of another method.

    Where that method reduces tokens within a block, or in the last one, the random pruner cannot follow, and has more.
    """
    exits = find_token_reducer(config).exits  # without fusion, which the random pruner has in label maps
    kept, last = config.kept_patches(), RandomReducer.blocks(config)[-1] - exits
    kept[last:] = [kept[last - 1]] * (len(kept) - last)
    prunes = kept[-1] < config.num_patches
    fields = {
        "token_reducer": RANDOM,
        "reducer_config": None,
        "reducer_package": None,
        "pruning_rate": None if prunes else 0,
        "pruning_schedule": kept if prunes else None,
        "last_layer_fusion": config.last_layer_fusion or exits,
        "use_auxiliary_heads": False,
    }
    return CroprViTConfig(**config.to_dict() | fields)


def library_references(config: CroprViTConfig, size: str | None = None) -> dict[str, torch.nn.Module]:
    """The unpruned model as other libraries have it: Transformers' ViT, and timm's ViT or EVA where it is installed.

    Args:
        config: of the model.
        size: its name, see `CroprViTConfig.from_size`; timm's models are built by it.
    """
    references: dict[str, torch.nn.Module] = {}
    if (vit := transformers_reference(config)) is not None:
        references["transformers ViT"] = vit
    if size not in TIMM_REFERENCES or find_spec("timm") is None:
        return references
    own = {name: getattr(config, name) for name in ("image_size", "patch_size", "num_labels")}
    plain = CroprViTConfig.from_size(size, token_reducer=None, **own)
    theirs, ours = unpruned_config(plain).to_dict(), unpruned_config(config).to_dict()
    if different := [name for name in theirs if theirs[name] != ours[name]]:
        logger.warning(f"timm's model is left out, as it may be another one: {', '.join(different)} are not as usual.")
        return references
    from timm import create_model

    shape: dict[str, Any] = {"img_size": config.input_size, "patch_size": config.patch_size}
    references["timm"] = create_model(TIMM_REFERENCES[size], **shape, num_classes=config.num_labels or 0)
    return references


def transformers_reference(config: CroprViTConfig) -> ViTForImageClassification | None:
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


@dataclass
class BenchmarkArguments:
    """What `run` compares, and how; the arguments of `cropr-hf benchmark`."""

    model_name_or_path: str | None = HfArg(
        default=None, help="Checkpoint whose configuration to time; otherwise --size and --config."
    )
    size: str = HfArg(
        default="large", help="Of CroprViTConfig.from_size: large, eva02_large, eva02_large_detection, ..."
    )
    task: str | None = HfArg(default=None, help=f"{', '.join(TASKS)}; that of the checkpoint, or {DEFAULT_TASK}.")
    token_reducer: str | None = HfArg(default=None, help="Method: cropr, tome, ...; that of the checkpoint, or cropr.")
    pruning_rate: int | None = HfArg(default=None, help="Patch tokens removed per module.")
    image_size: int | None = HfArg(default=None, help="Height and width in pixels.")
    config: str = HfArg(default="{}", help="Further fields of the configuration, as JSON.")
    batch_size: int = HfArg(default=8, help="Images per call.")
    training: bool = HfArg(default=False, help="Time training steps, with auxiliary heads, instead of inference.")
    activation_checkpointing: bool = HfArg(
        default=False, help="In training, compute blocks again in the backward pass."
    )
    device: str = HfArg(default="cpu", help="Where to run, such as cuda.")
    dtype: str = HfArg(default="float32", help="Type of weights and inputs, such as bfloat16.")
    attn_implementation: str | None = HfArg(
        default=None, help="Of Transformers: sdpa (default), eager, flash_attention_2, ..."
    )
    compile: bool = HfArg(default=False, help="Run torch.compile.")
    cuda_graph: bool = HfArg(
        default=False, help="On a CUDA device, capture each model in a graph and time its replay."
    )
    references: bool = HfArg(
        default=False, help="Also time the unpruned model as Transformers and timm have it (classification)."
    )
    alternatives: bool = HfArg(
        default=False,
        help="Also time what you would do instead: the unpruned model compiled, on a smaller image that costs as many "
        "multiply-adds as the pruned one does, of the next smaller size, and in int8 (torchao).",
    )
    profile: bool = HfArg(default=False, help="Record the time of each operation of one more call.")
    min_rounds: int = HfArg(default=7, help="Rounds at least; see `compare`.")
    max_rounds: int = HfArg(default=40, help="Rounds at most.")
    tolerance: float = HfArg(default=0.01, help="Standard error of the ratios at which it stops.")
    output: str | None = HfArg(default=None, help="JSON file for the record.")


def _config_from(args: BenchmarkArguments) -> CroprViTConfig:
    overrides = parse_config(args.config)
    for name in ("token_reducer", "pruning_rate", "image_size"):
        if getattr(args, name) is not None:
            overrides[name] = getattr(args, name)
    if args.model_name_or_path is not None:
        config, unknown = CroprViTConfig.from_pretrained(
            args.model_name_or_path, return_unused_kwargs=True, **overrides
        )
        if unknown:
            raise ValueError(
                f"--config has {', '.join(unknown)}, which are not fields of a configuration; check the spelling."
            )
        if config.token_reducer is None:
            raise ValueError(f"{args.model_name_or_path} does not prune; time one that does, or its --size.")
        return config
    return CroprViTConfig.from_size(args.size, **{**TASKS[args.task or DEFAULT_TASK].fields, **overrides})


def _task_of(args: BenchmarkArguments, config: CroprViTConfig) -> str:
    stored = (config.architectures or ["model without a class"])[0]
    found = find_task(stored)
    task = args.task or (DEFAULT_TASK if args.model_name_or_path is None else found and found[0])
    if task is None:
        raise ValueError(
            f"{args.model_name_or_path} is the configuration of a {stored}, which is none of the tasks; say by --task "
            f"as which to time it: {', '.join(TASKS)}."
        )
    if args.training and not TASKS[task].has_loss:
        raise ValueError(f"The task {task!r} has no loss; choose another task for training steps.")
    if args.references and task != DEFAULT_TASK:
        raise ValueError(
            f"`references` are classifiers, the task is {task!r}; leave out `references`, or choose another task."
        )
    if args.cuda_graph and TASKS[task].is_detector:
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
    if args.activation_checkpointing and not args.training:
        raise ValueError("`activation_checkpointing` is a matter of training steps; pass `training` as well.")
    if args.references and args.training:
        raise ValueError("`references` are compared in inference; leave out `references` or `training`.")
    if args.alternatives and args.training:
        raise ValueError("`alternatives` are compared in inference; leave out `alternatives` or `training`.")
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
    if args.compile or args.alternatives:
        torch.compiler.reset()  # what was compiled before must not make sizes dynamic, nor use up recompilations
    device, dtype = parse_device(args.device), getattr(torch, args.dtype)
    with device:  # weights are drawn where they are used, which on a GPU takes no time
        candidates = pruning_candidates(config, task, args.training)
        models: dict[str, torch.nn.Module] = dict(candidates)
        if args.references:
            models |= library_references(candidates[UNPRUNED].config, None if args.model_name_or_path else args.size)
        alternatives = _alternatives(args, task, config, candidates[UNPRUNED]) if args.alternatives else {}
        models |= {name: model for name, (_, model) in alternatives.items()}
    inputs = dict.fromkeys(models, _random_inputs(args, config, task, device, dtype))
    if SMALLER_IMAGE in models:
        inputs[SMALLER_IMAGE] = _random_inputs(args, smaller_image(config), task, device, dtype)
    calls = {
        name: _call(replace(args, compile=args.compile or name == COMPILED), task, model, inputs[name])
        for name, model in models.items()
    }
    activations = {}
    if args.training:
        activations = {name: saved_bytes(model, inputs[name]) for name, model in models.items()}
    with torch.inference_mode(not args.training):
        timed = {name: graphed(call, device) for name, call in calls.items()} if args.cuda_graph else calls
        timings = compare(timed, UNPRUNED, args.min_rounds, args.max_rounds, args.tolerance, device)
        memory = {name: peak_memory(call, device) for name, call in calls.items()}
        operations = {name: operation_times(call, device) for name, call in calls.items()} if args.profile else {}
    counted = [name for name in (*candidates, SMALLER_IMAGE, SMALLER_MODEL) if name in models]
    patches = {name: PatchCounts(models[name]) for name in counted}
    costs = {name: _costs(models[name], inputs[name], counts) for name, counts in patches.items()}
    costs |= {name: costs[UNPRUNED] for name in models if name not in costs}  # the same products by other code
    own = config.token_reducer
    assert own is not None  # `pruning_candidates` has seen to it
    bound = sum(costs[UNPRUNED].values()) / sum(costs[own].values())
    return {
        "arguments": asdict(args) | ({"size": None} if args.model_name_or_path else {}),
        "machine": machine_name(device),
        "versions": library_versions(),
        "token_reducer": own,
        "patches": config.num_patches,
        "patches_kept": candidates[own].config.kept_patches(),
        **{name: left for name, left in patches[own].means().items() if name == PATCHES_LEFT},
        "multiply_adds": costs,
        "multiply_add_bound": bound,
        "linear_bound": costs[UNPRUNED]["linear"] / costs[own]["linear"],
        # A training step has auxiliary heads and a backward pass, which the count leaves out.
        "share_of_bound": None if args.training else timings[own].speedup / bound,
        "share_of_random": None if own == RANDOM else speed_ratio(timings[own], timings[RANDOM]),
        "rounds": len(timings[UNPRUNED].seconds),
        "results": {
            name: {
                **timing.record(args.batch_size),
                "peak_memory": memory[name],
                "parameters": sum(parameter.numel() for parameter in models[name].parameters()),
                "saved_activations": activations.get(name),
            }
            for name, timing in timings.items()
        },
        **({"alternatives": {name: what for name, (what, _) in alternatives.items()}} if alternatives else {}),
        **({"operations": operations} if operations else {}),
    }


def _alternatives(
    args: BenchmarkArguments, task: str, config: CroprViTConfig, unpruned: torch.nn.Module
) -> dict[str, tuple[str, torch.nn.Module]]:
    """By name, what it is in words, and the model; those that there are."""
    image, smaller, model_class = smaller_image(config), smaller_model(config), TASKS[task].model_class
    found = {} if args.compile else {COMPILED: ("torch.compile", unpruned)}  # then every model is
    found[SMALLER_IMAGE] = ("{} × {} pixels".format(*image.input_size), model_class(image))
    if smaller is None:
        logger.warning("A smaller model is left out: there is none, by its size or because of windows.")
    else:
        found[SMALLER_MODEL] = (smaller[0], model_class(smaller[1]))
    int8 = quantized(unpruned.to(args.device, getattr(torch, args.dtype)))
    return found if int8 is None else found | {INT8: ("linear layers, by torchao", int8)}


def _call(args: BenchmarkArguments, task: str, model: torch.nn.Module, inputs: dict[str, Any]) -> Callable[[], Any]:
    """What is timed of a model, which is made ready for it."""
    model.to(args.device, getattr(torch, args.dtype)).train(args.training)
    if args.attn_implementation is not None and hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(args.attn_implementation)  # type: ignore[operator]
    for head in getattr(model, "box_heads", ()):
        # Random weights find nothing. So every proposal is an object of the first class, as in a crowded image.
        torch.nn.init.constant_(head.class_predictor.bias[:1], 5.0)
    if args.training and args.activation_checkpointing:
        # Older releases of Transformers have the second name only.
        enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    run_model = compiled(model, TASKS[task].is_detector) if args.compile else model
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
        `ValueError`: for a name that is not an argument, and as `run`.
    """
    names = {item.name for item in fields(BenchmarkArguments)}
    for name, values in settings.items():
        if name not in names:
            raise ValueError(f"{name!r} is not an argument of the benchmark; choose among {', '.join(sorted(names))}.")
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


def _costs(model: Any, inputs: dict[str, Any], counts: PatchCounts) -> dict[str, int]:
    """Multiply-adds per image: linear layers and attention of the encoder, and the head.

    Where numbers of patches follow the image, it is the mean of the inputs, whose `counts` are taken here.
    """
    with torch.no_grad(), counts:
        head = head_multiply_adds(model, inputs) // len(inputs["pixel_values"])
    linear, total = (
        round(counts.multiply_adds(attention)) if counts.batches else multiply_adds(model.config, attention=attention)
        for attention in (False, True)
    )
    return {"linear": linear, "attention": total - linear, "head": head}


def _random_inputs(
    args: BenchmarkArguments, config: CroprViTConfig, task: str, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Pixels, and labels in training."""
    height, width = config.input_size
    shape = (args.batch_size, config.num_channels, height, width)
    inputs: dict[str, Any] = {"pixel_values": torch.randn(shape, device=device, dtype=dtype)}
    if not args.training:
        return inputs
    if TASKS[task].is_detector:
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
