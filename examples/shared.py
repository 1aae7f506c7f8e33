# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What the training scripts share: arguments, loading a model to train, splits of a data set, the run itself."""

import difflib
import glob
import json
import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from functools import partial
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import yaml
from datasets import Dataset, DatasetDict, Image, IterableDataset, IterableDatasetDict, Value, load_dataset
from datasets.utils.file_utils import xopen
from PIL.Image import Image as Picture
from published_recipe import published_recipe, tell_recipe
from torchvision.transforms import v2
from transformers import AutoConfig, AutoImageProcessor, HfArgumentParser, TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.utils import logging

from cropr_hf import CroprViTConfig, has_auxiliary_heads
from cropr_hf.arguments import parse_config
from cropr_hf.configuration_cropr_vit import check_finite
from cropr_hf.files import source_name
from cropr_hf.images import decode_image, orientation, to_rgb
from cropr_hf.publishing.model_card import add_to_record, published_throughput
from cropr_hf.speed import benchmark
from cropr_hf.speed.benchmark import BenchmarkArguments
from cropr_hf.speed.counts import PatchCounts
from cropr_hf.training import (
    CroprTrainer,
    DiffPruning,
    FrozenStart,
    PruningCurriculum,
    TrainingStream,
    WeightAverage,
    changed_settings,
    freeze_backbone,
    last_whole_checkpoint,
    lora_model,
    merge_lora,
)
from cropr_hf.training.record import PRECISIONS


logger = logging.get_logger(__name__)

CLUTTERED_DIGITS = "cluttered_digits"
RECIPE_ENDINGS = (".yaml", ".yml", ".json")
EVA02 = "timm/eva02_large_patch14_224.mim_m38m"


def given_fields(args: Any, names: Sequence[str]) -> dict[str, Any]:
    """Those fields of an instance that are not `None`."""
    return {name: value for name in names if (value := getattr(args, name)) is not None}


@dataclass(kw_only=True)
class PruningArguments:
    """How a model prunes."""

    token_reducer: str | None = HfArg(
        default=None, help="'cropr' (default for an unpruned source to train), another such as 'tome', or 'none'."
    )
    pruning_rate: int | None = HfArg(default=None, help="Patch tokens removed per module (R).")
    pruning_schedule: list[int] | None = HfArg(
        default=None, help="Patch tokens kept after each block, instead of a rate."
    )
    last_layer_fusion: bool | None = HfArg(
        default=None,
        help="Put pruned tokens back before the last block; by default as the method is published, and always for "
        "label maps and detectors.",
    )
    reducer_config: str | None = HfArg(
        default=None, help="Fields of the method, as JSON, such as '{\"keep_rate\": 0.5}' of EViT."
    )

    def overrides(self) -> dict[str, Any]:
        """Fields of the configuration that are given."""
        fields = given_fields(self, [each.name for each in dataclass_fields(PruningArguments)])
        if self.token_reducer == "none":  # the unpruned baseline of a recipe: how that would prune does not matter
            fields = {name: value for name, value in fields.items() if not name.startswith(("pruning_", "reducer_"))}
            fields["token_reducer"] = None
        elif self.reducer_config is not None:
            fields["reducer_config"] = parse_config(self.reducer_config, "reducer_config", '{"keep_rate": 0.5}')
        return fields


@dataclass
class ModelArguments(PruningArguments):
    """Which model to start from, and how it prunes."""

    model_name_or_path: str = HfArg(
        default="facebook/vit-mae-large", help="A ViT of a supported family, or a Cropr checkpoint."
    )
    image_processor_name: str | None = HfArg(default=None, help="Image processor, if not that of the model.")
    image_size: int | None = HfArg(default=None, help="Input size in pixels, if not that of the source.")
    patch_size: int | None = HfArg(default=None, help="Patch size in pixels, if not that of the source.")
    drop_path_rate: float = HfArg(default=0.2, help="Stochastic depth of the last but one block.")
    label_smoothing: float = HfArg(default=0.0, help="Of the main and the auxiliary losses.")
    ignore_mismatched_sizes: bool = HfArg(
        default=False, help="Accept another number of classes in a Cropr checkpoint."
    )
    freeze_backbone: bool = HfArg(default=False, help="Train Cropr modules and head alone.")
    lora_rank: int | None = HfArg(
        default=None, help="Train low-rank adapters of this rank instead of the blocks themselves."
    )
    revision: str | None = HfArg(default=None, help="Branch, tag or commit on the Hub.")
    token: str | None = HfArg(default=None, help="Hub token for private models and data sets.")

    def overrides(self) -> dict[str, Any]:
        """See `PruningArguments.overrides`."""
        fields = super().overrides() | given_fields(self, ["image_size", "patch_size"])
        return fields | {"drop_path_rate": self.drop_path_rate, "label_smoothing": self.label_smoothing}

    def hub(self) -> dict[str, str]:
        """Those of `revision` and `token` that are given."""
        return given_fields(self, ["revision", "token"])


@dataclass
class Eva02Arguments(ModelArguments):
    """`ModelArguments` whose default model is EVA-02-L, prepared by the fields in `recipe`."""

    recipe: ClassVar[dict[str, Any]] = {}
    model_name_or_path: str = HfArg(default=EVA02, help="A ViT of a supported family, or a Cropr checkpoint.")

    def overrides(self) -> dict[str, Any]:
        """See `ModelArguments.overrides`."""
        fields = super().overrides()
        if self.model_name_or_path != EVA02:
            return fields
        pruning = {"pruning_rate", "pruning_schedule"}
        replaced = pruning if pruning & fields.keys() or self.token_reducer == "none" else set()
        recipe = {name: value for name, value in self.recipe.items() if name not in replaced}
        resized = {"image_size", "patch_size"} & fields.keys()
        if "pruning_schedule" in recipe and any(fields[name] != recipe[name] for name in resized):
            raise ValueError(
                f"The schedule of the recipe is for {recipe['image_size']} pixels in patches of "
                f"{recipe['patch_size']}; give --pruning_schedule or --pruning_rate for another size."
            )
        return recipe | fields


@dataclass
class StreamingArguments:
    """Whether images are read as they are needed."""

    streaming: bool = HfArg(default=False, help="Read images as they are needed, and store none; needs --max_steps.")
    shuffle_buffer: int = HfArg(
        default=1000, help="Images of the stream, not decoded, among which the next one is drawn."
    )


@dataclass
class RecipeArguments(TrainingArguments):
    """`TrainingArguments` with layer-wise decay and the curriculum."""

    do_train: bool = HfArg(default=True, help="Whether to train, or only to evaluate.")
    weight_decay: float = HfArg(default=0.05, help="Of matrices; vectors, prefix tokens and positions have none.")
    layer_decay: float = HfArg(default=0.75, help="Factor of the learning rate per block, from the head down.")
    backbone_learning_rate: float | None = HfArg(
        default=None, help="Peak learning rate of the last block, if not --learning_rate times --layer_decay."
    )
    frozen_start: float = HfArg(
        default=0.0, help="Share of the training, at its beginning, over which the backbone stays as it is; 0 is off."
    )
    max_grad_norm: float = HfArg(default=0.0, help="Largest norm of the gradient; 0 is no limit.")
    pruning_curriculum: float = HfArg(
        default=0.0, help="Share of the training over which pruning grows from nothing; 0 is off."
    )
    ema_decay: float | None = HfArg(
        default=None,
        help="Evaluate and publish an average of the weights that fades by this factor per step, such as 0.9999.",
    )
    diff_share: float | None = HfArg(
        default=None,
        help="Change only this share of the weights of the backbone, such as 0.005; Cropr modules and head learn as "
        "always. `cropr-hf diff` then stores the model as a small file beside its base.",
    )
    benchmark_rounds: int = HfArg(default=5, help="Rounds of timing for the model card, 3 or more; 0 is none.")
    pruning_range: list[float] | None = HfArg(
        default=None, help="Draw the pruning of each step between these two shares of the configured one, such as 0 1."
    )
    eval_strategy: str = HfArg(default="epoch", help="When to evaluate.")
    save_strategy: str = HfArg(default="epoch", help="When to write a checkpoint.")
    logging_steps: float = HfArg(default=50, help="Steps between logs.")
    remove_unused_columns: bool | None = HfArg(default=False, help="The transforms need the image column.")
    # Older releases of Transformers call it `gradient_checkpointing`; here this name works with all of them.
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={"help": "Compute blocks again in the backward pass, to save memory.", "nargs": "?", "const": True},
    )

    def __post_init__(self) -> None:
        if not hasattr(TrainingArguments, "activation_checkpointing"):
            if self.activation_checkpointing is None:
                self.activation_checkpointing = self.gradient_checkpointing
            self.gradient_checkpointing = self.activation_checkpointing
        super().__post_init__()
        if self.benchmark_rounds < 0 or self.benchmark_rounds in (1, 2):
            raise ValueError(f"--benchmark_rounds is {self.benchmark_rounds}; give 3 or more, or 0 for no timing.")


def parse_arguments(classes: Sequence[Any], arguments: list[str] | None = None) -> tuple[Any, ...]:
    """Instances of the dataclasses `classes`, from a recipe, where the first word names one, and the command line.

    A recipe is a YAML or JSON file whose keys are arguments. Where the command line has an argument as well, it wins.

    Args:
        arguments: words of the command line; those of the running script by default.

    Raises:
        `ValueError`: when the recipe has something that is not an argument, or a value of another type, and for a
            number that is NaN or infinite.
    """
    parser = HfArgumentParser(
        classes,
        usage="%(prog)s [RECIPE] [--ARGUMENT VALUE ...]",
        description="RECIPE is a YAML or JSON file of arguments, such as those in examples/recipes. What the command "
        "line has as well wins.",
    )
    words = list(sys.argv[1:] if arguments is None else arguments)
    misplaced = [word for before, word in pairwise(words) if word.endswith(RECIPE_ENDINGS) and before[:2] != "--"]
    if misplaced:
        raise ValueError(f"{misplaced[0]} is not the first word; a recipe comes before all other arguments.")
    if words and words[0].endswith(RECIPE_ENDINGS):
        words = [*read_recipe(words[0], parser), *words[1:]]
    published = published_recipe(parser.parse_known_args(words)[0])
    words = [word for name in published for word in recipe_words(name, published[name], parser)] + words
    groups = parser.parse_args_into_dataclasses(words)
    for group in groups:
        check_finite(group)
        if isinstance(group, TrainingArguments):
            logging.set_verbosity(group.get_process_log_level())
    tell_recipe(published, groups)
    return groups


def read_recipe(path: str, parser: HfArgumentParser) -> list[str]:
    """The arguments in a recipe as words of a command line; see `parse_arguments` for what it raises."""
    with open(path, encoding="utf-8") as file:
        recipe = yaml.safe_load(file)
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} is not a recipe; write lines of the form `argument: value`.")
    known = [each.name for group in parser.dataclass_types for each in dataclass_fields(group) if each.init]
    words: list[str] = []
    for name, value in recipe.items():
        if name not in known:
            near = " or ".join(difflib.get_close_matches(str(name), known)) or "another one (see --help)"
            raise ValueError(f"{path} sets {name!r}, which is not an argument of this script; did you mean {near}?")
        try:
            words += recipe_words(name, value, parser)
        except ArgumentError as error:
            raise ValueError(f"{path} sets {name!r} to {value!r}: {error}.") from error
    return words


def recipe_words(name: str, value: Any, parser: HfArgumentParser) -> list[str]:
    """One argument of a recipe as words of a command line; `ArgumentError` where its type is wrong."""
    if isinstance(value, list):
        words = [f"--{name}", *(str(item) for item in value)]
    else:
        words = [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"]
    parser.exit_on_error = False  # raise what would end the process
    try:
        parsed, rest = parser.parse_known_args(words)
    finally:
        parser.exit_on_error = True
    if rest:
        raise ArgumentError(None, f"it takes one value, and nothing is left for {' '.join(rest)}")
    if isinstance(getattr(parsed, name), str) and not isinstance(value, str | dict | list):
        raise ArgumentError(None, "it takes text: put it in quotes, or leave it out")
    return words


def load_model(model_class: Any, args: ModelArguments, label_names: list[str] | None, **fields: Any) -> Any:
    """A prunable model from a Cropr checkpoint or from another pretrained ViT, with one output per label, if any.

    Raises:
        `ValueError`: when the backbone is to be frozen and to get adapters.
    """
    if args.freeze_backbone and args.lora_rank is not None:
        raise ValueError(f"--freeze_backbone leaves nothing for adapters of --lora_rank {args.lora_rank}; choose one.")
    model = load_whole_model(model_class, args, label_names, **fields)
    if args.freeze_backbone:
        freeze_backbone(model)
    return model if args.lora_rank is None else lora_model(model, args.lora_rank)


def load_whole_model(model_class: Any, args: ModelArguments, label_names: list[str] | None, **fields: Any) -> Any:
    """See `load_model`; all of this model is trained."""
    overrides = args.overrides() | fields
    if label_names is not None:
        overrides["id2label"] = dict(enumerate(label_names))
        overrides["label2id"] = {name: index for index, name in enumerate(label_names)}
    stored = cropr_config(args.model_name_or_path, **args.hub())
    if stored is None:
        return model_class.from_vit(args.model_name_or_path, **overrides, **args.hub())
    known = [*stored.id2label.values()]
    if (
        label_names is not None
        and len(known) == len(label_names)
        and class_numbers(label_names, stored.id2label) != [*range(len(known))]
    ):
        logger.warning(
            f"{args.model_name_or_path} has the classes {shortened(known)}, the data set {shortened(label_names)}: "
            "the head starts from that of the model by number, and without training it answers for other classes."
        )
    reducer = overrides.get("token_reducer", stored.token_reducer)
    overrides["use_auxiliary_heads"] = has_auxiliary_heads(reducer)
    return model_class.from_pretrained(
        args.model_name_or_path, ignore_mismatched_sizes=args.ignore_mismatched_sizes, **overrides, **args.hub()
    )


def cropr_config(name_or_path: str, **hub: Any) -> CroprViTConfig | None:
    """The configuration of a Cropr ViT; `None` if the folder or repository holds something else."""
    try:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False, **hub)
    except (OSError, ValueError):  # a timm model has no Transformers configuration
        return None
    return config if config.model_type == CroprViTConfig.model_type else None


def normalization(args: ModelArguments) -> dict[str, Any]:
    """Mean and standard deviation that the source was trained with, as image processors take them."""
    name = args.image_processor_name or args.model_name_or_path
    try:
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False, **args.hub())
        return {"image_mean": processor.image_mean, "image_std": processor.image_std}
    except (OSError, ValueError, AttributeError) as error:  # timm models have none
        pretrained = timm_pretrained_config(name)
        if pretrained is None:
            raise ValueError(
                f"{name} has no image processor with a mean and a standard deviation; name another model's by "
                "--image_processor_name."
            ) from error
        return {"image_mean": list(pretrained.mean), "image_std": list(pretrained.std)}


def timm_pretrained_config(name: str) -> Any:
    """What timm knows about a pretrained model; `None` if it is not one."""
    try:
        import timm
    except ImportError:
        return None
    return timm.get_pretrained_cfg(name.split("/")[-1], allow_unregistered=True)


def input_size(config: CroprViTConfig) -> dict[str, int]:
    """Height and width of the model's input, as image processors take them."""
    return dict(zip(("height", "width"), config.input_size))


def draw_digits(args: Any, seed: int, **settings: Any) -> Any:
    """Cluttered digits for training and validation, as many as the data arguments of a script say, or as streams.

    `settings` are those of `cluttered_digits.DigitPainter`.
    """
    from cluttered_digits import cluttered_digits

    splits = {"train": args.max_train_samples or 20_000, "validation": args.max_eval_samples or 2_000}
    images = DatasetDict(
        {split: cluttered_digits(split, count, seed=seed, **settings) for split, count in splits.items()}
    )
    return as_streams(images, seed) if getattr(args, "streaming", False) else images


def as_streams(images: DatasetDict, seed: int) -> IterableDatasetDict:
    """A data set that is on this machine, as if it were streamed from files of which processes can take some each."""
    shuffled = images.shuffle(seed=seed)  # folders are sorted by class, and so would the files be
    return IterableDatasetDict(
        {split: data.to_iterable_dataset(num_shards=min(64, len(data))) for split, data in shuffled.items()}
    )


def load_hub_data(name: str, *args: Any, **kwargs: Any) -> Any:
    """A data set on the Hub or in a folder; see `datasets.load_dataset`.

    Raises:
        `ValueError`: for a folder whose name has brackets, which `datasets` takes for a pattern and does not find.
    """
    if Path(name).is_dir() and glob.has_magic(name):
        raise ValueError(f"The folder {name} has one of *?[ in its name, which is a pattern of names; rename it.")
    return load_dataset(name, *args, **kwargs)


def keep_encoded(images: Any, *columns: str) -> Any:
    """A data set, a stream, or their splits, of which image columns give files, not pictures.

    `read_picture` decodes them, alike in all scripts, and names a file that is broken.
    """
    features = (next(iter(images.values())) if isinstance(images, dict) else images).features or {}
    for column in columns:
        if isinstance(features.get(column), Image | Value):
            images = images.cast_column(column, Image(decode=False))
    return images


def read_file(value: Any) -> tuple[Picture, str]:
    """An image as it is stored, and its name, from an image column of a data set, decoded or not.

    Raises:
        `ValueError`: when it is missing or broken, with its name.
    """
    if not isinstance(value, dict):
        return decode_image(value), "An image"
    name = value["path"] or "An image without a name"
    if value["bytes"] is not None:
        return decode_image(BytesIO(value["bytes"]), name), name
    if "://" not in name:
        return decode_image(name), name
    with xopen(name, "rb") as file:  # streamed, perhaps from an archive
        return decode_image(BytesIO(file.read()), name), name


def read_picture(value: Any) -> Picture:
    """An image, upright and in RGB; see `read_file` and `cropr_hf.images.to_rgb`."""
    return to_rgb(*read_file(value))


def check_upright(image: Picture, name: str, size: tuple[int, int], labels: str, labels_turned: bool = False) -> None:
    """Whether labels were made for an image as it stands upright.

    Args:
        image: as it is stored.
        size: width and height that the labels are for.
        labels: what to call them.
        labels_turned: whether they say themselves how they are turned.

    Raises:
        `ValueError`: when the size of the image is another one.
    """
    turned = orientation(image)
    width, height = image.size[::-1] if turned >= 5 else image.size
    if size != (width, height):
        reason = f" (as its EXIF orientation, {turned}, turns it)" if turned > 1 else ""
        raise ValueError(
            f"{name} has {height} x {width} pixels{reason}, but {labels} those of {size[1]} x {size[0]}; turn or "
            "correct one of them."
        )
    if turned > 1 and not labels_turned and (turned < 5 or width == height):
        logger.warning_once(
            f"{name} is turned by its EXIF orientation, {turned}; from its size nobody can tell whether {labels} the "
            "pixels as they are stored, or upright, as they are taken here. Store the image upright to be sure."
        )


def shortened(names: Sequence[str], most: int = 10) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + more


def class_numbers(names: Sequence[str], known: dict[int, str]) -> list[int | None]:
    """For each class of a data set, by its name, the number that a model has for it; `None` if it has none.

    A model whose classes have no names (LABEL_0, ...) has the numbers of the data set, if they are as many.

    Args:
        names: of the classes of the data set, in the order of their numbers.
        known: the model's `id2label`.
    """
    if all(name == f"LABEL_{number}" for number, name in known.items()) and len(known) == len(names):
        logger.warning_once(f"The {len(known)} classes of the model have no names; their numbers are compared.")
        return list(range(len(names)))
    numbers = {name: number for number, name in known.items()}
    return [numbers.get(name) for name in names]


def check_limits(args: Any) -> None:
    """Raises `ValueError` where `max_train_samples` or `max_eval_samples` of a script's arguments leaves no image."""
    for name in ("max_train_samples", "max_eval_samples"):
        limit = getattr(args, name, None)
        if limit is not None and limit < 1:
            raise ValueError(f"--{name} is {limit}; give 1 or more images, or leave it out.")


def prepare_splits(images: Any, args: Any, share: float, seed: int) -> Any:
    """The splits `train` and `validation` of a data set or of a stream, whose images are not decoded.

    Args:
        args: the data arguments of a script: names of the columns, and how many images to use at most.
        share: of the training images to validate on, if there is no validation split; a stream, whose length nobody
            knows, gives its first `max_eval_samples` images.

    Raises:
        `ValueError`: when the data set has no split `train`, no image in one, or lacks a column.
    """
    if "train" not in images:
        raise ValueError(f"The data set has no split 'train', only {', '.join(images)}; choose another.")
    missing = {args.image_column_name, args.label_column_name} - {None, *(images["train"].column_names or ())}
    if missing:
        raise ValueError(
            f"The data set has no column {', '.join(sorted(missing))}, only "
            f"{', '.join(images['train'].column_names)}; name them by --image_column_name and --label_column_name."
        )
    images = keep_encoded(images, args.image_column_name)
    if isinstance(images, IterableDatasetDict):
        return split_streams(images, args)
    empty = [split for split in ("train", "validation") if split in images and not len(images[split])]
    if empty:
        raise ValueError(f"The split {empty[0]!r} of the data set has no image; give one or more.")
    if "validation" not in images:
        split = images["train"].train_test_split(share, seed=seed)
        images = DatasetDict(train=split["train"], validation=split["test"])
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples}
    for split, limit in limits.items():
        if limit is not None:
            images[split] = images[split].shuffle(seed=seed).select(range(min(limit, len(images[split]))))
    images = DatasetDict({split: images[split] for split in limits})
    return as_streams(images, seed) if getattr(args, "streaming", False) else images


def split_streams(images: IterableDatasetDict, args: Any) -> dict[str, Any]:
    """The streams `train` and `validation`; see `prepare_splits`.

    Raises:
        `ValueError`: when it is not known how many images to validate on.
    """
    train, validation = images["train"], images.get("validation")
    if validation is None:
        if args.max_eval_samples is None:
            raise ValueError(
                "The stream has no split 'validation'; say by --max_eval_samples how many of the training images to "
                "validate on instead."
            )
        train, validation = hold_out(train, args.max_eval_samples)
    elif args.max_eval_samples is not None:
        validation = validation.take(args.max_eval_samples)
    if args.max_train_samples is not None:
        train = train.take(args.max_train_samples)
    return {"train": train, "validation": validation}


def hold_out(images: IterableDataset, count: int) -> tuple[IterableDataset, Dataset]:
    """A stream without its first `count` images, and these images, which stay in memory as they are encoded.

    The rest is one file to `datasets`: processes and workers that shared the files would each leave out others.
    """
    encoded = images.decode(False)
    rest = IterableDataset.from_generator(partial(iter, encoded.skip(count)), features=images.features)
    return rest, Dataset.from_list(list(encoded.take(count)), features=images.features)


class ScaleJitter(v2.ScaleJitter):
    """That of torchvision, but that a side of a strip never shrinks to nothing."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """See `v2.Transform.make_params`."""
        return {"size": tuple(max(1, length) for length in super().make_params(flat_inputs)["size"])}


def set_transforms(images: Any, train: Callable, evaluation: Callable, args: Any, training_args: Any) -> None:
    """Has the two splits transformed as they are read, by functions from columns to columns.

    Raises:
        `ValueError`: when images are streamed and nothing says for how long to train.
    """
    if isinstance(images["validation"], Dataset):
        images["validation"].set_transform(evaluation)
    else:
        columns = images["validation"].column_names
        images["validation"] = images["validation"].map(evaluation, batched=True, batch_size=1, remove_columns=columns)
    if not args.streaming:
        images["train"].set_transform(train)
        return
    if training_args.max_steps <= 0:
        raise ValueError(
            "--streaming does not know how many images there are; say by --max_steps how long to train: images * "
            "epochs / images per step."
        )
    images["train"] = TrainingStream(images["train"], train, training_args.seed, args.shuffle_buffer)


def run(trainer: CroprTrainer, *arguments: Any) -> dict[str, float]:
    """Trains (or goes on), saves the stripped model with its card, evaluates and publishes, as the arguments say.

    `arguments` are those of the script beside `trainer.args`, for the record of the run.
    """
    args: Any = trainer.args
    trainer.facts = {"script": Path(sys.argv[0]).name, "settings": changed_settings(*arguments, args)}
    for group in arguments:
        trainer.facts |= data_facts(group)
    add_callbacks(trainer, args)
    if args.do_train:
        checkpoint = args.resume_from_checkpoint
        if checkpoint is not None and checkpoint.lower() in ("true", "last"):
            checkpoint = last_whole_checkpoint(args.output_dir)
            if checkpoint is None:  # so that a scheduler can repeat one command
                logger.warning(f"{args.output_dir} holds no whole checkpoint; the training starts from the beginning.")
        result = trainer.train(resume_from_checkpoint=checkpoint)
        if hasattr(trainer.model, "merge_and_unload"):  # adapters: publish an ordinary model
            trainer.model = trainer.model_wrapped = merge_lora(trainer.model)
        trainer.save_model()  # stripped: ready to publish
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    if args.do_train:
        if args.benchmark_rounds > 0 and trainer.is_world_process_zero():
            measure_speed(trainer)
        trainer.accelerator.wait_for_everyone()
        trainer.create_model_card()
    if args.push_to_hub:
        trainer.push_to_hub()
    return metrics


def add_callbacks(trainer: CroprTrainer, args: Any) -> None:
    """Frozen start, curriculum, average of the weights and diff pruning, as the arguments say."""
    if args.frozen_start != 0:
        trainer.add_callback(FrozenStart(args.frozen_start))
    has_curriculum = args.pruning_curriculum > 0 or args.pruning_range is not None
    if has_curriculum and trainer.model.config.token_reducer is not None:
        # A compiled model compiles each schedule anew, and gives up after 8.
        levels = 6 if args.torch_compile else 32
        trainer.add_callback(PruningCurriculum(args.pruning_curriculum, levels, args.pruning_range))
    if args.ema_decay is not None:
        trainer.add_callback(WeightAverage(args.ema_decay))
    if args.diff_share is not None:
        trainer.add_callback(DiffPruning(trainer.model, args.diff_share))


def data_facts(args: Any, split: str = "train") -> dict[str, str]:
    """Which data set the data arguments of a script name, for the record; nothing for other arguments."""
    if getattr(args, "data_dir", None) is not None:
        return {"dataset": source_name(args.data_dir)}
    if getattr(args, "dataset_name", None) is not None:
        facts = {"dataset": source_name(args.dataset_name), "config": args.dataset_config_name}
        facts["revision"] = getattr(args, "dataset_revision", None)
        return {name: value for name, value in facts.items() if value is not None}
    if getattr(args, "train_dir", None) is not None:
        folder = Path(args.train_dir).absolute()
        return {"dataset": folder.parent.name if folder.name.startswith("train") else folder.name}
    file = getattr(args, f"{split}_annotations", None)
    return {} if file is None else {"dataset": Path(file).stem}


def measure_speed(trainer: CroprTrainer) -> None:
    """Times a published model that prunes, the unpruned one and a random pruner, on the hardware of the training."""
    args: Any = trainer.args
    dtype = PRECISIONS.get(trainer.accelerator.mixed_precision, "float32")
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if model.config.token_reducer is None:
        return
    model.record = model.record or {}
    arguments = BenchmarkArguments(
        model_name_or_path=args.output_dir,
        device=args.device.type,
        dtype=dtype,
        batch_size=args.per_device_eval_batch_size,
        min_rounds=args.benchmark_rounds,
        max_rounds=args.benchmark_rounds,
    )
    try:
        model.record["throughput"] = published_throughput(benchmark.run(arguments))
    except RuntimeError as error:  # out of memory, beside the optimizer
        logger.warning(f"The speed was not measured: {error}")


def record_evaluation(
    folder: str,
    args: Any,
    split: str,
    num_examples: int,
    metrics: dict[str, float],
    counts: PatchCounts,
    settings: dict[str, Any] | None = None,
) -> None:
    """Adds what an evaluation found to the record and the card of a published folder.

    `args` name the data set, `counts` are those of the patches of its images, `settings` what is not as the folder
    has it.
    """
    evaluation = {**data_facts(args, split), "split": split, "num_examples": num_examples, "metrics": metrics}
    further = {"counts": counts.summary(), "settings": settings}
    add_to_record(folder, evaluation=evaluation | {name: facts for name, facts in further.items() if facts})
