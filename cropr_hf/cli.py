"""The command `cropr-hf`: what this package does with folders, from a shell.

Exit codes: 0 when it worked, 1 when it did not (the reason is on stderr), 2 for arguments that are missing or unknown,
130 when it was interrupted, 141 when nobody reads its output any more.
"""

import io
import math
import os
import sys
import tempfile
import traceback
from argparse import ArgumentParser, BooleanOptionalAction, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, HfArgumentParser, PreTrainedConfig, SegformerImageProcessor
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, cached_file

from .arguments import DTYPES, parse_config, parse_device
from .comparison import Runner, comparison_table
from .comparison_file import Comparison
from .configuration_cropr_vit import CroprViTConfig
from .detection_heads import training_memory
from .files import check_file, replacing, write_json
from .image_processing_cropr_vit import CroprViTImageProcessor
from .images import image_files, open_image
from .modeling_cropr_rf_detr import CroprRfDetrForObjectDetection
from .modeling_cropr_vit import CroprViTPreTrainedModel
from .modeling_cropr_vit_detection import CroprViTDetector
from .publishing.export import export_model, input_size
from .publishing.hub import save_for_hub
from .publishing.model_card import (
    CARD_NAME,
    RECORD_NAME,
    add_to_record,
    class_name,
    model_facts,
    read_record,
    space_link,
    write_record,
)
from .publishing.triton import export_for_triton
from .publishing.web import export_for_web
from .saving import is_checkpoint_folder, named_damage
from .speed.benchmark import BenchmarkArguments, sweep
from .speed.instruments import cpu_threads
from .speed.onnx_files import compare_files
from .speed.plots import plot_benchmark
from .speed.schedule_search import SHAPES, FoundSchedule, find_schedule
from .speed.tables import format_files, format_sweep, format_table
from .tasks import DEFAULT_TASK, TASKS, find_task
from .token_reduction import find_token_reducer
from .training.diff_pruning import diff_metadata, load_diff, save_diff
from .version import __version__
from .visualization import check_picture, plot_pruning


def convert(args: Namespace) -> str:
    """Makes any pretrained ViT prunable."""
    _check_target(args.output_dir, args.source, args.overwrite)
    task = TASKS[args.task]
    overrides = parse_config(args.config)
    model = task.model_class.from_vit(args.source, **overrides)
    processor = _image_processor(args.source, model.config.input_size, task.is_detector)
    if args.task == "semantic_segmentation" and processor is not None:
        # That of a classifier makes no label maps, neither of annotations nor of logits.
        mean, std = processor.image_mean, processor.image_std
        processor = SegformerImageProcessor(size=processor.size, image_mean=mean, image_std=std)
    if processor is not None and model.config.num_channels == 3:
        processor.do_convert_rgb = True  # whatever image it is called with, as the pipelines do
    save_for_hub(model, args.output_dir, processor, args.with_code)
    note = "" if processor is not None else " The source has no image processor; save one beside it."
    method = find_token_reducer(model.config)
    if method is None:
        what = "it does not prune"
    elif method.learns:
        what = "its scorers are new, so train it"
    elif overrides.get("num_register_tokens"):
        what = f"{method.label} is training-free, but register tokens that the source has not are new, so train it"
    else:
        what = f"{method.label} is training-free: it can be used at once, and fine-tuned for accuracy"
    if task.is_detector:
        gigabytes = training_memory(model.config) / 1e9
        note += (
            f" In training its box heads keep {gigabytes:.2g} GB per image; a smaller `rois_per_image` than "
            f"{model.config.rois_per_image} makes that less in proportion."
        )
    return f"{args.output_dir} holds the model; {what}.{note}"


def strip(args: Namespace) -> str:
    """Makes a publishable folder from a complete checkpoint."""
    _check_target(args.output_dir, args.source, args.overwrite)
    model = _load(args.source, stripped=False)  # saving strips it, and notes how it was trained
    _take_over_record(model, args.source)
    save_for_hub(model, args.output_dir, _image_processor(args.source), args.with_code)
    return f"{args.output_dir} is ready to publish: hf upload OWNER/NAME {args.output_dir}"


def diff(args: Namespace) -> str:
    """Writes a model as what it changes of its base, a small file; with --apply makes it again from the two."""
    if args.apply:
        _check_target(args.target, args.base, args.overwrite)
        processor_text = diff_metadata(args.model).get("image_processor")
        model = load_diff(_load(args.base), args.model)
        model.config.name_or_path = args.base
        with tempfile.TemporaryDirectory() as folder:
            if processor_text is not None:
                Path(folder, IMAGE_PROCESSOR_NAME).write_text(processor_text, encoding="utf-8")
            processor = _image_processor(folder)
        save_for_hub(model, args.target, processor)
        return f"{args.target} holds the model."
    target = check_file(args.target)
    model = _load(args.model)
    changed = save_diff(model, _load(args.base), target, _image_processor(args.model))
    megabytes = target.stat().st_size / 1e6
    return f"{target} holds the model in {megabytes:.2f} MB; {changed} weights of the backbone differ from the base."


def run_benchmark(args: Namespace) -> str:
    """Times a model against its unpruned twin and a random pruner, or an ONNX file against another."""
    with cpu_threads(args.threads):
        return _benchmark_model(args) if args.file is args.reference is None else _benchmark_files(args)


def _benchmark_files(args: Namespace) -> str:
    if args.file is None or args.reference is None:
        raise ValueError("--file is timed against --reference; give both, each a file that `cropr-hf export` wrote.")
    timing = ("batch_size", "min_rounds", "max_rounds", "tolerance")
    models = [field for field in fields(BenchmarkArguments) if field.name not in (*timing, "output")]
    changed = [field.name for field in models if getattr(args, field.name) != field.default]
    changed += [name for name in ("update_record", "sweep", "plot") if getattr(args, name)]
    if changed:
        raise ValueError(f"--file is timed as it is; leave out --{', --'.join(changed)}.")
    if args.output is not None:
        check_file(args.output, [args.file, args.reference])
    record = compare_files(args.file, args.reference, **{name: getattr(args, name) for name in timing})
    if args.output is not None:
        write_json(args.output, record)
    return format_files(record)


def _benchmark_model(args: Namespace) -> str:
    arguments = BenchmarkArguments(**{field.name: getattr(args, field.name) for field in fields(BenchmarkArguments)})
    if args.update_record:
        others = ("size", "task", "pruning_rate", "image_size", "config", "training")
        changed = [name for name in others if getattr(args, name) != getattr(BenchmarkArguments, name)]
        changed += ["sweep"] if args.sweep else []
        if args.model_name_or_path is None or changed:
            raise ValueError(
                "--update_record is for the model as it lies in the folder that --model_name_or_path names"
                + (f"; leave out --{', --'.join(changed)}." if changed else ".")
            )
        read_record(args.model_name_or_path)  # before the measurement, not after it
    if args.output is not None:
        check_file(args.output)
    if args.plot is not None:
        check_file(args.plot, [] if args.output is None else [args.output])
        check_picture(args.plot)
    settings = _sweep_settings(args.sweep or ())

    def save(records: list[dict[str, Any]]) -> None:
        if arguments.output is not None:
            content = records if settings else records[0]
            write_json(arguments.output, content)

    records = sweep(arguments, settings, save)
    if args.update_record:
        add_to_record(args.model_name_or_path, throughput=records[0])
    if args.plot is not None:
        with replacing(args.plot) as draft:
            plot_benchmark(records, [*settings]).savefig(draft, dpi=110, bbox_inches="tight")
    return format_sweep(records, [*settings]) if settings else format_table(records[0])


def _sweep_settings(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Values of arguments from `name=value,value`."""
    settings: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals or not values:
            raise ValueError(f"--sweep has {text!r}; write an argument and its values, such as batch_size=1,8,64.")
        if name in settings:
            raise ValueError(f"--sweep has {name!r} twice; write all of its values together, as in batch_size=1,8,64.")
        if name == "output":
            raise ValueError("--sweep has 'output', but all records go to one file; name it by --output.")
        settings[name] = values.split(",")
        if hasattr(BenchmarkArguments, name):  # as if each stood on the command line
            parser = HfArgumentParser(BenchmarkArguments)  # type: ignore[arg-type]
            settings[name] = [getattr(parser.parse_args([f"--{name}", value]), name) for value in settings[name]]
    return settings


def compare(args: Namespace) -> str:
    """Trains and measures methods alike, beside what one would do instead; goes on where it was stopped."""
    output_dir = args.output_dir or str(Path("outputs", Path(args.file).stem))
    record = Runner(Comparison.from_file(args.file), output_dir)()
    return f"{comparison_table(record)}\n\n{output_dir} holds the record, this table, and a picture."


def export(args: Namespace) -> str:
    """Writes a model to a file that runs without this package, or to a folder for a runtime."""
    if args.runtime is None:
        check_file(args.target)
    if _architecture(args.model) == CroprRfDetrForObjectDetection.__name__:
        model: Any = CroprRfDetrForObjectDetection.from_pretrained(args.model)
        encoder = model.model.backbone.backbone
        encoder.remove_auxiliary_heads()
    else:
        model = encoder = _load(args.model)
    size = input_size(encoder.config, args.image_size)
    if args.pruning_rate is not None:  # at that size, which may allow another rate than the size of the model
        num_patches = math.prod(size) // encoder.config.patch_size**2
        encoder.set_pruning(encoder.config.kept_patches(num_patches, args.pruning_rate))
    new_size = None if args.image_size is None else size
    processor = _image_processor(args.model, new_size, isinstance(model, CroprViTDetector))
    model.to(getattr(torch, args.dtype))
    differs = RUNTIMES[args.runtime](model, processor, args)
    return f"{args.target} holds the model; their outputs differ by {differs} (mean, relative)."


def _export_to_file(model: Any, processor: Any, args: Namespace) -> str:
    folder = Path(args.target).absolute().parent
    has_processor = (folder / IMAGE_PROCESSOR_NAME).exists()
    if processor is not None and has_processor:
        present = _image_processor(str(folder))
        if present is None or present.to_dict() != processor.to_dict():
            raise ValueError(
                f"{folder} has another {IMAGE_PROCESSOR_NAME}, which a model there needs; choose another folder."
            )
    beside = None if processor is None or has_processor else processor.save_pretrained
    difference = export_model(model, args.target, args.image_size, args.batch_size, args.tolerance, beside)
    return f"{difference:.2g}"


def _export_for_web(model: Any, processor: Any, args: Namespace) -> str:
    if args.dtype != "float32" or args.batch_size not in (None, 1):
        raise ValueError(
            "A folder for transformers.js has all its dtypes, for one image; leave out --dtype, --batch_size."
        )
    name = None if os.path.exists(args.model) else args.model
    found = export_for_web(model, args.target, processor, args.image_size, args.tolerance, name)
    return ", ".join(f"{difference:.2g} in {dtype}" for dtype, difference in found.items())


def _export_for_triton(model: Any, processor: Any, args: Namespace) -> str:
    """The folder of the model lies in a model repository; a batch has at most `--batch_size` images."""
    folder = Path(args.target).absolute()
    limit = {} if args.batch_size is None else {"max_batch_size": args.batch_size}
    options = {"image_size": args.image_size, "image_processor": processor, "tolerance": args.tolerance, **limit}
    return f"{export_for_triton(model, folder.parent, folder.name, **options):.2g}"


# Each takes a model, its image processor or `None`, and the arguments; says how much what it wrote differs from it.
RUNTIMES = {None: _export_to_file, "transformers.js": _export_for_web, "triton": _export_for_triton}


@torch.inference_mode()
def visualize(args: Namespace) -> str:
    """Draws which patches a model prunes, and after which block."""
    check_file(args.output, args.images)
    check_picture(args.output)
    model = _load(args.model).eval()
    processor = _image_processor(args.model, required=True)
    pixels = _pixels(args.images, processor)
    outputs = model.base_model(pixels, output_pruning=True)
    scales = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0], [1.0])
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in scales)
    shown = ((pixels * std + mean).clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).numpy()
    grid_size = (pixels.shape[-2] // model.config.patch_size, pixels.shape[-1] // model.config.patch_size)
    names = [Path(path).name for path in args.images]
    figure = plot_pruning(list(shown), outputs.pruned_after_block, model.config.num_hidden_layers, grid_size, names)
    with replacing(args.output) as draft:
        figure.savefig(draft, dpi=110)
    return f"{args.output} shows {len(shown)} images and their pruned patches."


def card(args: Namespace) -> str:
    """Writes the model card of a folder from its record."""
    folder = Path(args.folder)
    if args.space is not None:
        space_link(args.space)  # an error for what is no Hub id
    if (folder / RECORD_NAME).exists():
        record = read_record(folder)
    else:
        model = _load(str(folder))
        num_parameters = sum(tensor.numel() for tensor in model.state_dict().values())
        record = {"model": model_facts(model.config, class_name(model), folder.absolute().name, num_parameters)}
    if args.name is not None:
        record["model"]["name"] = args.name
    given = {name: getattr(args, name) for name in ("license", "language", "tags", "space")}
    metadata = record.get("metadata", {}) | {name: value for name, value in given.items() if value is not None}
    write_record(folder, record | ({"metadata": metadata} if metadata else {}))
    return f"{folder / CARD_NAME} says what {folder / RECORD_NAME} knows."


def schedule(args: Namespace) -> str:
    """Finds a pruning schedule with which a model meets a budget of time on this machine."""
    if (args.model is None) == (args.size is None):
        raise ValueError("Give a model (a folder or Hub id), or --size of a model with random weights, and not both.")
    if args.model is None and (args.save or args.calibration):
        raise ValueError("A model of --size has random weights; --save and --calibration need a folder or Hub id.")
    if args.save is not None:
        _check_target(args.save, args.model, args.overwrite)
    if args.batch_size < 1:
        raise ValueError(f"--batch_size is {args.batch_size}; give 1 or more.")
    if args.calibration is not None and not Path(args.calibration).is_dir():
        raise ValueError(f"--calibration is {args.calibration}, which is not a folder; name one with images.")
    if args.output is not None:
        check_file(args.output)
    parse_device(args.device)
    overrides = parse_config(args.config)
    if args.model is None:
        task = TASKS[args.task]
        if args.image_size is not None:
            overrides["image_size"] = args.image_size
        # A rate of 0: pruning is possible after every block, whatever the size of the image.
        fields = {**task.fields, "pruning_rate": 0, **overrides}
        model = task.model_class(CroprViTConfig.from_size(args.size, **fields))
    else:
        model = _load(args.model, **overrides)
    config = model.config
    size = input_size(config, args.image_size)
    if args.save is not None and size != config.input_size:
        raise ValueError(
            f"--image_size is {args.image_size}, but a model is saved with the schedule of its own size, "
            f"{config.image_size}; leave --image_size or --save out."
        )
    processor = None
    if args.model is not None:
        new_size = size if args.image_size is not None or "image_size" in overrides else None
        required = args.calibration is not None
        processor = _image_processor(args.model, new_size, isinstance(model, CroprViTDetector), required)
    model.to(args.device, getattr(torch, args.dtype))
    found = find_schedule(
        model,
        args.target_speedup,
        args.latency_ms,
        args.shape,
        torch.randn(args.batch_size, config.num_channels, *size),
        _image_batches(args.calibration, processor, args.batch_size) if args.calibration else None,
        args.token_multiple,
    )
    if args.output is not None:
        write_json(args.output, found.record())
    if args.save is not None:
        stored = _load(args.model, **{**overrides, "pruning_rate": None, "pruning_schedule": found.schedule})
        _take_over_record(stored, args.model, without=("evaluations", "throughput"))  # of another schedule
        save_for_hub(stored, args.save, processor)
    return _describe(found, model, args)


def _describe(found: FoundSchedule, model: CroprViTPreTrainedModel, args: Namespace) -> str:
    load = f"{type(model).__name__}.from_pretrained({args.model or 'path'!r}, pruning_schedule=schedule)"
    lines = [
        f"schedule = {found.schedule}",
        f"shape {found.shape}; predicted {found.predicted_speedup:.2f} times as fast as unpruned, "
        f"measured {found.measured_speedup:.2f} ± {found.spread:.2f}: "
        f"{found.measured_ms:.4g} instead of {found.unpruned_ms:.4g} ms per batch of {args.batch_size}",
        f"multiply-adds fall by {found.bound:.2f}, to {found.multiply_adds / 1e6:.4g} million per image",
        f"To use it: model.set_pruning(schedule), or {load}",
    ]
    if args.save is not None:
        lines.append(f"{args.save} holds the model with this schedule.")
    method = find_token_reducer(model.config)
    free = "" if method.learns else f" {method.label} is training-free, so it can be used at once."
    return "\n".join([*lines, f"It changes the accuracy: measure that, or fine-tune with the schedule.{free}"])


def _image_batches(folder: str, processor: Any, batch_size: int) -> Iterator[torch.Tensor]:
    """The images in a folder and its subfolders, as the model takes them."""
    paths = image_files(folder, "**/*")
    if not paths:
        raise ValueError(f"--calibration is {folder}, in which there is no image; name a folder with images.")
    for start in range(0, len(paths), batch_size):
        yield _pixels(paths[start : start + batch_size], processor)


def _pixels(paths: Sequence[str | Path], processor: Any) -> torch.Tensor:
    """Images as the model takes them: (B, channels, height, width)."""
    images = [open_image(path) for path in paths]
    try:
        return processor(images, return_tensors="pt")["pixel_values"]
    except (ValueError, TypeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"The image processor of the model makes no batch of {len(images)} images ({reason}); give images of one "
            "size, or correct the image processor."
        ) from error


def _take_over_record(model: CroprViTPreTrainedModel, source: str, without: Sequence[str] = ()) -> None:
    """What the record of the source says holds for the model, which is not trained here, as well."""
    model.config.name_or_path = ""
    if (Path(source) / RECORD_NAME).exists():
        record = read_record(source)
        model.config.name_or_path = record["model"].get("base_model") or ""
        model.record = {name: part for name, part in record.items() if name not in ("model", *without)}


def _load(name_or_path: str, stripped: bool = True, **fields: Any) -> CroprViTPreTrainedModel:
    """A model of the class that it was saved with; `fields` replace those of its configuration."""
    architecture = _architecture(name_or_path)
    found = find_task(architecture)
    if found is None:
        raise ValueError(
            f"{name_or_path} holds {architecture or 'no model whose class is known'}, not a `CroprViT*` model; name "
            "what `save_pretrained` of one wrote. `cropr-hf convert` makes one of another ViT."
        )
    if stripped:
        fields["use_auxiliary_heads"] = False
    return found[1].model_class.from_pretrained(name_or_path, **fields)


def _architecture(name_or_path: str) -> str:
    """The class that a model was saved with; empty if that is not known."""
    if Path(name_or_path).is_file():
        raise ValueError(f"{name_or_path} is a file; name the folder of a model, or a Hub id.")
    try:
        with named_damage(name_or_path):
            fields, _ = PreTrainedConfig.get_config_dict(name_or_path)
            return (fields.get("architectures") or [""])[0]
    except OSError as error:
        raise ValueError(
            f"{name_or_path} is neither a folder of a model nor a repository that can be reached ({error})."
        ) from error


def _check_target(folder: str, source: str, overwrite: bool) -> None:
    """Raises `ValueError` for a folder whose model must stay as it is, also by another path; `overwrite` gives up a
    model of another origin."""
    target = Path(folder).resolve()
    if target == Path(source).resolve() or is_checkpoint_folder(folder):
        raise ValueError(
            f"{folder} is the model itself, or where training resumes from, and would lose modules; give another "
            "folder."
        )
    if target.is_file():
        raise ValueError(f"{folder} is a file; give a folder to save to.")
    if (target / CONFIG_NAME).exists() and not overwrite:
        raise ValueError(f"{folder} holds a model already; give another folder, or --overwrite to replace that model.")


def _image_processor(
    name_or_path: str, size: tuple[int, int] | None = None, detection: bool = False, required: bool = False
) -> Any:
    """The image processor in a folder or repository, made to give images of a size.

    If there is none, it is `None`, or a `ValueError` where one is required; one that is damaged is always an error.
    """
    if not _has_image_processor(name_or_path):
        if not required:
            return None
        raise ValueError(f"{name_or_path} has no image processor, so its input is not known; save one beside it.")
    try:
        processor = AutoImageProcessor.from_pretrained(name_or_path, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"The image processor in {name_or_path} cannot be used ({error}); save it again, or remove it."
        ) from error
    if size is None:
        return processor
    height, width = size
    sides = {"height": height, "width": width}
    if detection:
        edges = {"shortest_edge": min(size), "longest_edge": max(size)}
        mean, std = processor.image_mean, processor.image_std
        return CroprViTImageProcessor(size=edges, pad_size=sides, image_mean=mean, image_std=std)
    processor.size = sides
    if getattr(processor, "do_center_crop", None):
        processor.do_center_crop = False
    return processor


def _has_image_processor(name_or_path: str) -> bool:
    """Whether there is the file of one in a folder or repository; a name of timm is neither."""
    try:
        names = (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME)
        found = [cached_file(name_or_path, name, _raise_exceptions_for_missing_entries=False) for name in names]
    except OSError:
        return False
    return any(found)


def build_parser() -> ArgumentParser:
    """The parser of the command line."""
    parser = ArgumentParser("cropr-hf", description="Token Cropr for Hugging Face Transformers.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=HfArgumentParser)

    def add(function: Any, name: str, example: str, **kwargs: Any) -> ArgumentParser:
        command = commands.add_parser(
            name,
            help=function.__doc__,
            description=function.__doc__,
            epilog=f"example:\n  cropr-hf {name} {example}",
            formatter_class=RawDescriptionHelpFormatter,
            **kwargs,
        )
        command.set_defaults(function=function)
        return command

    def add_output(command: ArgumentParser) -> None:
        command.add_argument("output_dir", help="folder for the stripped model")
        code = "whether the code goes along, for trust_remote_code=True (default: it does)"
        command.add_argument("--with_code", action=BooleanOptionalAction, default=True, help=code)
        add_overwrite(command)

    def add_overwrite(command: ArgumentParser) -> None:
        command.add_argument("--overwrite", action="store_true", help="replace a model that is in the folder already")

    def add_input(command: ArgumentParser) -> None:
        command.add_argument("--image_size", type=int, help="height and width in pixels (default: that of the model)")
        command.add_argument("--dtype", default="float32", choices=DTYPES, help="default: %(default)s")

    command = add(convert, "convert", """facebook/vit-mae-large outputs/vit --config '{"pruning_rate": 8}'""")
    command.add_argument("source", help="Hub id, folder or timm name of a ViT")
    add_output(command)
    command.add_argument("--task", default=DEFAULT_TASK, choices=[*TASKS], help="class of the model")
    command.add_argument("--config", default="{}", help="fields of the configuration, as JSON")

    command = add(strip, "strip", "outputs/run/checkpoint-5000 outputs/published")
    command.add_argument("source", help="complete checkpoint, folder or Hub id")
    add_output(command)

    command = add(diff, "diff", "outputs/base outputs/published outputs/published.safetensors")
    command.add_argument("base", help="folder or Hub id of the model that the training began with")
    command.add_argument("model", help="folder or Hub id of the trained model; with --apply a file of this command")
    command.add_argument("target", help="file to write, such as task.safetensors; with --apply a folder")
    command.add_argument("--apply", action="store_true", help="make the model from its base and the file")
    add_overwrite(command)

    example = "--model_name_or_path outputs/published --batch_size 64 --update_record"
    command = add(run_benchmark, "benchmark", example, dataclass_types=BenchmarkArguments)
    command.add_argument("--update_record", action="store_true", help="add the result to the folder's record and card")
    command.add_argument(
        "--sweep",
        nargs="+",
        help="arguments that take several values in turn, such as batch_size=1,8 dtype=float32,bfloat16",
    )
    command.add_argument("--plot", help="picture of speed-ups and bounds to write")
    command.add_argument("--threads", type=int, help="of the CPU (default: as many as torch uses)")
    command.add_argument("--file", help="instead of a model, an exported .onnx file as ONNX Runtime runs it")
    command.add_argument("--reference", help="the .onnx file that --file is timed against, such as the unpruned model")

    command = add(compare, "compare", "examples/comparisons/digits_classification.yaml")
    command.add_argument("file", help="YAML file that says what is compared; see docs/methods.md")
    command.add_argument("--output_dir", help="folder for runs and results (default: outputs/ and the file's name)")

    command = add(
        schedule, "schedule", "outputs/published --target_speedup 2.0 --calibration photos --save outputs/fast"
    )
    command.add_argument("model", nargs="?", help="folder or Hub id")
    command.add_argument("--size", help="instead, random weights of CroprViTConfig.from_size: small, base, large, ...")
    command.add_argument("--task", default=DEFAULT_TASK, choices=[*TASKS], help="class of the model of --size")
    command.add_argument("--config", default="{}", help="fields of the configuration, as JSON")
    command.add_argument("--target_speedup", type=float, help="times as fast as the unpruned model")
    command.add_argument("--latency_ms", type=float, help="or milliseconds per batch")
    command.add_argument(
        "--shape", choices=SHAPES, help="of the schedule; see docs/schedules.md (default: it depends)"
    )
    command.add_argument("--batch_size", type=int, default=8, help="images per batch (default: %(default)s)")
    add_input(command)
    command.add_argument("--calibration", metavar="FOLDER", help="typical images: prune where they lose the least")
    command.add_argument("--token_multiple", type=int, help="of which the numbers of tokens are multiples, such as 8")
    command.add_argument("--device", default="cpu", help="where to run, such as cuda (default: %(default)s)")
    command.add_argument("--output", help="JSON file for the record")
    command.add_argument("--save", metavar="FOLDER", help="folder for the stripped model with the schedule")
    add_overwrite(command)

    command = add(export, "export", "outputs/published outputs/onnx/model.onnx")
    command.add_argument("model", help="folder or Hub id")
    command.add_argument(
        "target", help="file to write, .pt2, .onnx or .pte, with the image processor beside it; with --for a folder"
    )
    command.add_argument(
        "--for", dest="runtime", choices=[*filter(None, RUNTIMES)], help="what loads the folder; see docs/deploy.md"
    )
    add_input(command)
    command.add_argument(
        "--batch_size", type=int, help="images per call (default: any number; for .pte 1), for Triton at most"
    )
    command.add_argument("--pruning_rate", type=int, help="patches pruned per module (default: that of the model)")
    command.add_argument(
        "--tolerance", type=float, help="difference that is let pass (default: 0.001; float16 0.05, int8 0.1)"
    )

    command = add(visualize, "visualize", "outputs/published photo.jpg --output pruning.png")
    command.add_argument("model", help="folder or Hub id")
    command.add_argument("images", nargs="+", help="image files")
    command.add_argument("--output", default="pruning.png", help="picture to write (default: %(default)s)")

    command = add(card, "card", "outputs/published --license apache-2.0 --name OWNER/NAME")
    command.add_argument("folder", help="folder of a model")
    command.add_argument("--name", help="title, such as the Hub id")
    command.add_argument("--license", help="licence of the weights, such as apache-2.0")
    command.add_argument("--language", help="for the metadata of the Hub")
    command.add_argument("--tags", nargs="+", help="for the metadata of the Hub")
    command.add_argument("--space", metavar="OWNER/NAME", help="Hub id of a Space that shows the model")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # not every terminal knows every sign
    args = build_parser().parse_args(arguments)
    try:
        print(args.function(args), flush=True)
    except KeyboardInterrupt:
        print("cropr-hf: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes the rest there at its end
        return 141
    except Exception as error:
        print(f"cropr-hf: {_reason(error)}", file=sys.stderr)
        return 1
    return 0


def _reason(error: Exception) -> str:
    """What is wrong, in words: some errors say no more than a key or a number, or nothing."""
    message = str(error).strip()
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in message:
        return f"There is too little memory; take fewer or smaller images, or a smaller model. {message}".strip()
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename!r}: {error.strerror}; give another path, or make this one usable."
    if isinstance(error, KeyError) or " " not in message:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {message or 'no reason'} ({Path(place.filename).name}, line {place.lineno})"
    return message


if __name__ == "__main__":
    sys.exit(main())
