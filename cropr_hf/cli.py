"""The command `cropr-hf`: what this package does with folders, from a shell.

Exit codes: 0 when it worked, 1 when it did not (the reason is on stderr), 2 for arguments that are missing or unknown.
"""

import json
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, HfArgumentParser

from . import benchmark
from .benchmark import BenchmarkArguments
from .configuration_cropr_vit import CroprViTConfig
from .hub import save_for_hub
from .image_processing_cropr_vit import CroprViTImageProcessor
from .model_card import CARD_NAME, RECORD_NAME, add_to_record, read_record, write_card, write_record
from .modeling_cropr_vit import CroprViTBackbone, CroprViTPreTrainedModel
from .saving import is_checkpoint_folder
from .version import __version__
from .visualization import plot_pruning


def convert(args: Namespace) -> str:
    """Makes any pretrained ViT prunable."""
    model_class = benchmark.TASKS[args.task][0]
    model = model_class.from_vit(args.source, **benchmark.parse_config(args.config))
    processor = _image_processor(args.source)
    if processor is not None:
        height, width = model.config.input_size
        size = {"height": height, "width": width}
        if args.task in benchmark.DETECTION:
            edge = {"shortest_edge": min(height, width), "longest_edge": max(height, width)}
            mean, std = processor.image_mean, processor.image_std
            processor = CroprViTImageProcessor(size=edge, pad_size=size, image_mean=mean, image_std=std)
        else:
            processor.size, processor.do_center_crop = size, False
    _save(model, processor, args)
    note = "" if processor is not None else " The source has no image processor; save one beside it."
    return f"{args.output_dir} holds the model; its scorers are new, so train it.{note}"


def strip(args: Namespace) -> str:
    """Makes a publishable folder from a complete checkpoint."""
    if Path(args.output_dir).absolute() == Path(args.source).absolute() or is_checkpoint_folder(args.output_dir):
        raise ValueError(f"{args.output_dir} is where to resume from, and must stay complete; give another folder.")
    model = _load(args.source)
    model.config.name_or_path = ""  # nothing is trained here
    if (Path(args.source) / RECORD_NAME).exists():
        record = read_record(args.source)
        model.config.name_or_path = record["model"].get("base_model") or ""
        model.record = {name: part for name, part in record.items() if name != "model"}
    _save(model, _image_processor(args.source), args)
    return f"{args.output_dir} is ready to publish: hf upload OWNER/NAME {args.output_dir}"


def run_benchmark(args: Namespace) -> str:
    """Times a model against its unpruned twin and a random pruner."""
    arguments = BenchmarkArguments(**{field.name: getattr(args, field.name) for field in fields(BenchmarkArguments)})
    if args.update_record:
        others = ("size", "task", "pruning_rate", "image_size", "config", "training")
        changed = [name for name in others if getattr(args, name) != getattr(BenchmarkArguments, name)]
        if args.model_name_or_path is None or changed:
            raise ValueError(
                "--update_record is for the model as it lies in the folder that --model_name_or_path names"
                + (f"; leave out --{', --'.join(changed)}." if changed else ".")
            )
        read_record(args.model_name_or_path)  # before the measurement, not after it
    _check_folder(arguments.output)
    record = benchmark.run(arguments)
    if arguments.output is not None:
        Path(arguments.output).write_text(json.dumps(record, indent=2), encoding="utf-8")
    if args.update_record:
        add_to_record(args.model_name_or_path, throughput=record)
    return benchmark.format_table(record)


@torch.inference_mode()
def visualize(args: Namespace) -> str:
    """Draws which patches a model prunes, and after which block."""
    _check_folder(args.output)
    model = _load(args.model).eval()
    processor = _image_processor(args.model)
    if processor is None:
        raise ValueError(f"{args.model} has no image processor, so its input is not known; save one beside it.")
    images = [Image.open(path).convert("RGB") for path in args.images]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    outputs = model(pixels, output_pruning=True)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (processor.image_mean, processor.image_std))
    shown = ((pixels * std + mean).clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).numpy()
    grid_size = (pixels.shape[-2] // model.config.patch_size, pixels.shape[-1] // model.config.patch_size)
    names = [Path(path).name for path in args.images]
    figure = plot_pruning(list(shown), outputs.pruned_after_block, model.config.num_hidden_layers, grid_size, names)
    figure.savefig(args.output, dpi=110)
    return f"{args.output} shows {len(images)} images and their pruned patches."


def card(args: Namespace) -> str:
    """Writes the model card of a folder from its record."""
    folder = Path(args.folder)
    if not (folder / RECORD_NAME).exists():
        model = _load(str(folder))
        write_card(
            model, folder, folder.absolute().name, sum(tensor.numel() for tensor in model.state_dict().values())
        )
    record = read_record(folder)
    if args.name is not None:
        record["model"]["name"] = args.name
    given = {name: getattr(args, name) for name in ("license", "language", "tags")}
    metadata = record.get("metadata", {}) | {name: value for name, value in given.items() if value is not None}
    write_record(folder, record | ({"metadata": metadata} if metadata else {}))
    return f"{folder / CARD_NAME} says what {folder / RECORD_NAME} knows."


def _load(name_or_path: str) -> CroprViTPreTrainedModel:
    """A model of the class that it was saved with, stripped."""
    try:
        architectures = CroprViTConfig.from_pretrained(name_or_path).architectures or [""]
    except OSError as error:
        raise ValueError(f"{name_or_path} is no folder of a model, nor a repository in reach ({error}).") from error
    classes = {cls.__name__: cls for cls, _ in benchmark.TASKS.values()} | {"CroprViTBackbone": CroprViTBackbone}
    if architectures[0] not in classes:
        raise ValueError(
            f"{name_or_path} holds a {architectures[0] or 'model without a class'}, no `CroprViT*` model."
        )
    return classes[architectures[0]].from_pretrained(name_or_path, use_auxiliary_heads=False)


def _check_folder(file: str | None) -> None:
    """Raises `ValueError` for a file that cannot be written, before the work is done."""
    if file is not None and not Path(file).absolute().parent.is_dir():
        raise ValueError(f"--output is {file}, but there is no folder {Path(file).parent}; make it first.")


def _image_processor(name_or_path: str) -> Any:
    """The image processor in a folder or repository; `None` if there is none."""
    try:
        return AutoImageProcessor.from_pretrained(name_or_path)
    except (OSError, ValueError):
        return None


def _save(model: CroprViTPreTrainedModel, processor: Any, args: Namespace) -> None:
    if args.with_code:
        save_for_hub(model, args.output_dir, processor)
        return
    model.save_pretrained(args.output_dir)
    if processor is not None:
        processor.save_pretrained(args.output_dir)


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
        command.add_argument("--with_code", action="store_true", help="add the code, for trust_remote_code=True")

    command = add(convert, "convert", """facebook/vit-mae-large outputs/vit --config '{"pruning_rate": 8}'""")
    command.add_argument("source", help="Hub id, folder or timm name of a ViT")
    add_output(command)
    command.add_argument(
        "--task", default=benchmark.DEFAULT_TASK, choices=[*benchmark.TASKS], help="class of the model"
    )
    command.add_argument("--config", default="{}", help="fields of the configuration, as JSON")

    command = add(strip, "strip", "outputs/run/checkpoint-5000 outputs/published")
    command.add_argument("source", help="complete checkpoint, folder or Hub id")
    add_output(command)

    example = "--model_name_or_path outputs/published --batch_size 64 --update_record"
    command = add(run_benchmark, "benchmark", example, dataclass_types=BenchmarkArguments)
    command.add_argument("--update_record", action="store_true", help="add the result to the folder's record and card")

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
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = build_parser().parse_args(arguments)
    try:
        print(args.function(args))
    except (ValueError, TypeError, KeyError, RuntimeError, OSError, ImportError) as error:
        print(f"cropr-hf: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
