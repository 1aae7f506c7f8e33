# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Fine-tune any pretrained ViT with token pruning on semantic segmentation.

The defaults are the ADE20k recipe of the paper: EVA-02-L, patches resampled from 14 to 16 pixels, at 512 pixels,
R = 40, pruning that grows over the first half of the training, 8 images per step (on one device; on 8 devices pass
`--per_device_train_batch_size 1`):

    accelerate launch examples/train_semantic_segmentation.py --fp16 --dataloader_num_workers 8 \\
        --output_dir outputs/ade20k

The same as a file, to be given as the first word: `examples/recipes/eva02_l_ade20k.yaml`.

(The reference code also draws a crop again when one class fills more than three quarters of it; this script does not.)

`--data_dir` takes a folder laid out as the ADE20k download, `images/training`, `annotations/training`, and the same
for `validation`, with the names of the classes in `id2label.json`. For that download itself:

    accelerate launch examples/train_semantic_segmentation.py --data_dir ADEChallengeData2016 --reduce_labels True \\
        --id2label huggingface/label-files/ade20k-id2label.json

`--dataset_name cluttered_digits` draws its images on the spot and needs no network:

    python examples/train_semantic_segmentation.py --model_name_or_path examples/digits_vit \\
        --dataset_name cluttered_digits --pruning_rate 30 --output_dir outputs/digit_maps

While it trains, it measures at the size of the input; `evaluate_semantic_segmentation.py` measures the published model
at the size of the label maps, also in sliding windows.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict
from huggingface_hub import hf_hub_download
from shared import (
    CLUTTERED_DIGITS,
    Eva02Arguments,
    RecipeArguments,
    ScaleJitter,
    StreamingArguments,
    check_limits,
    check_upright,
    draw_digits,
    input_size,
    keep_encoded,
    load_hub_data,
    load_model,
    normalization,
    parse_arguments,
    prepare_splits,
    read_file,
    run,
    set_transforms,
    shortened,
)
from teacher import TeacherArguments
from torchvision import tv_tensors
from torchvision.transforms import v2
from transformers import EvalPrediction, SegformerImageProcessor, set_seed
from transformers import logging as transformers_logging
from transformers.hf_argparser import HfArg

from cropr_hf import CroprViTForSemanticSegmentation
from cropr_hf.images import image_files, orientation, to_rgb, upright
from cropr_hf.training import CroprTrainer, layer_decay_optimizer


logger = transformers_logging.get_logger(__name__)

MEAN_IOU = str(Path(__file__).parent / "metrics" / "mean_iou" / "mean_iou.py")
COUNTED_MAPS = 100  # label maps that are looked at before the training, at most
ADE20K = "zhoubolei/scene_parse_150"
ADE20K_ARGUMENTS = {
    "dataset_config_name": "scene_parsing",
    "dataset_revision": "refs/convert/parquet",  # the main branch holds a script, which `datasets` no longer runs
    "id2label": "huggingface/label-files/ade20k-id2label.json",
    "reduce_labels": True,
}


@dataclass
class SegmenterArguments(TeacherArguments, Eva02Arguments):
    """`ModelArguments` whose default model is prepared as in the paper."""

    recipe = {"image_size": 512, "patch_size": 16, "pruning_rate": 40, "auxiliary_task": "patches"}
    auxiliary_task: str | None = HfArg(
        default=None,
        help="What Cropr modules learn to predict: 'presence' of classes, 'patches' (the paper) or 'both'.",
    )
    patch_queries_per_step: int | None = HfArg(
        default=None, help="Queries of patches that predict in a step, drawn anew for each, if not all."
    )

    def overrides(self) -> dict[str, Any]:
        """See `ModelArguments.overrides`."""
        given = {name: getattr(self, name) for name in ("auxiliary_task", "patch_queries_per_step")}
        return super().overrides() | {name: value for name, value in given.items() if value is not None}


@dataclass
class DataArguments:
    """Which images and label maps."""

    dataset_name: str = HfArg(default=ADE20K, help=f"Data set id on the Hub, or '{CLUTTERED_DIGITS}'.")
    dataset_config_name: str | None = HfArg(default=None, help="Configuration of that data set.")
    dataset_revision: str | None = HfArg(default=None, help="Branch, tag or commit of that data set.")
    data_dir: str | None = HfArg(default=None, help="Folder with `images` and `annotations`, instead of a data set.")
    id2label: str | None = HfArg(default=None, help="JSON file of class names, or 'owner/name/file' on the Hub.")
    reduce_labels: bool | None = HfArg(
        default=None, help="Whether label 0 means none and classes start at 1, as in ADE20k."
    )
    ignore_index: int = HfArg(default=255, help="Label of pixels that do not count.")
    max_train_samples: int | None = HfArg(default=None, help="Use fewer training images.")
    max_eval_samples: int | None = HfArg(default=None, help="Use fewer validation images.")
    image_column_name: str = HfArg(default="image", help="Column of the images.")
    label_column_name: str = HfArg(default="annotation", help="Column of the label maps.")

    def __post_init__(self) -> None:
        check_limits(self)
        if self.dataset_name == ADE20K and self.data_dir is None:
            for name, value in ADE20K_ARGUMENTS.items():
                if getattr(self, name) is None:
                    setattr(self, name, value)
        if self.draws_digits:
            self.label_column_name = "label_map"

    @property
    def draws_digits(self) -> bool:
        """Whether the images are cluttered digits."""
        return self.dataset_name == CLUTTERED_DIGITS and self.data_dir is None

    def classes(self, annotation: Any, name: str = "An annotation", num_labels: int | None = None) -> np.ndarray:
        """The class numbers (height, width) of an annotation; with `reduce_labels`, 1 becomes the first class.

        Args:
            name: what messages call it.
            num_labels: how many classes there are, if that is to be checked.

        Raises:
            `ValueError`: for an annotation of colours or fractions, and for numbers that are not those of classes.
        """
        labels = np.array(annotation)
        if labels.ndim != 2 or labels.dtype.kind == "f":
            raise ValueError(
                f"{name} has {labels.dtype} of the shape {labels.shape}; it must be class numbers (height, width): "
                "convert its colours first."
            )
        labels = labels.astype(np.int64)
        if self.reduce_labels:
            labels = np.where((labels == 0) | (labels == self.ignore_index), self.ignore_index, labels - 1)
        if num_labels is not None:
            wrong = labels[(labels != self.ignore_index) & ((labels < 0) | (labels >= num_labels))]
            if wrong.size:
                raise ValueError(
                    f"{name} has {wrong.size} pixels with labels such as {wrong[0]}; there are the classes 0 to "
                    f"{num_labels - 1}, and {self.ignore_index} for pixels that do not count (--ignore_index). "
                    "Correct the map or the file of class names, or see --reduce_labels."
                )
        return labels

    def pair(self, image: Any, annotation: Any, num_labels: int | None = None) -> tuple[Any, np.ndarray]:
        """A picture in RGB and its class numbers (height, width), both upright, from values of the two columns.

        Raises:
            `ValueError`: when one cannot be read, when they have different sizes, or as `classes` does; with the file.
        """
        stored, name = read_file(image)
        labels, labels_name = read_file(annotation)
        turned = orientation(labels) > 1
        labels = upright(labels)
        check_upright(stored, name, labels.size, f"the label map {labels_name}", turned)
        return to_rgb(stored, name), self.classes(labels, labels_name, num_labels)


@dataclass
class TrainingDataArguments(StreamingArguments, DataArguments):
    """`DataArguments` that may be streamed."""


@dataclass
class AugmentationArguments:
    """How training images are changed, and what is left to validate on."""

    train_val_split: float = HfArg(
        default=0.15, help="Share of the training images to validate on, if there are no others."
    )
    min_scale: float = HfArg(
        default=0.5, help="Smallest random size, relative to the largest that fits into the input."
    )
    max_scale: float = HfArg(default=2.0, help="Largest random size.")
    horizontal_flip: float = HfArg(default=0.5, help="Probability of a mirror image.")
    photometric_distortion: float = HfArg(
        default=0.5, help="Probability of each change of brightness, contrast and colour."
    )


@dataclass
class Ade20kArguments(RecipeArguments):
    """`TrainingArguments` with the defaults of the paper on ADE20k."""

    output_dir: str = HfArg(
        default="outputs/semantic_segmentation", help="Where checkpoints and the stripped model go."
    )
    num_train_epochs: float = HfArg(default=64, help="Passes over the training images.")
    learning_rate: float = HfArg(default=2e-5, help="First learning rate of the head.")
    layer_decay: float = HfArg(default=1.0, help="Factor of the learning rate per block, from the head down.")
    lr_scheduler_type: str = HfArg(default="polynomial", help="Learning-rate schedule.")
    lr_scheduler_kwargs: dict | str | None = field(default_factory=lambda: {"power": 0.9, "lr_end": 0.0})
    pruning_curriculum: float = HfArg(
        default=0.5, help="Share of the training over which pruning grows from nothing; 0 is off."
    )
    per_device_train_batch_size: int = HfArg(default=8, help="Images per process and step.")
    per_device_eval_batch_size: int = HfArg(default=8, help="Images per process and evaluation step.")
    batch_eval_metrics: bool = HfArg(default=True, help="Label maps are too many to be collected.")


def load_images(args: DataArguments, train_val_split: float, token: str | None, seed: int) -> Any:
    """The splits `train` and `validation`, as data sets or streams."""
    if args.draws_digits:
        return draw_digits(args, seed)
    return prepare_splits(load_source(args, token), args, train_val_split, seed)


def load_source(args: DataArguments, token: str | None = None) -> DatasetDict:
    """All splits of the folder, or of the data set on the Hub."""
    if args.data_dir is not None:
        return load_folders(args.data_dir, args.image_column_name, args.label_column_name)
    images = load_hub_data(
        args.dataset_name,
        args.dataset_config_name,
        revision=args.dataset_revision,
        token=token,
        streaming=getattr(args, "streaming", False),
    )
    return keep_encoded(images, args.image_column_name, args.label_column_name)


def load_folders(data_dir: str, image_column: str, label_column: str) -> DatasetDict:
    """Pairs of files `images/<split>/<name>.*` and `annotations/<split>/<name>.png`.

    Raises:
        `ValueError`: when there is no training image, or one has no annotation.
    """
    splits = {}
    for split, folder in {"train": "training", "validation": "validation"}.items():
        files = image_files(Path(data_dir, "images", folder))
        maps = [Path(data_dir, "annotations", folder, f"{file.stem}.png") for file in files]
        missing = [str(file) for file in maps if not file.exists()]
        if missing:
            raise ValueError(
                f"{len(missing)} images have no label map, such as {missing[0]}; add it, or leave them out."
            )
        if files:
            columns = {image_column: [str(file) for file in files], label_column: [str(file) for file in maps]}
            splits[split] = keep_encoded(Dataset.from_dict(columns), image_column, label_column)
    if "train" not in splits:
        raise ValueError(
            f"There is no image in {Path(data_dir, 'images', 'training')}; give the folder above `images`."
        )
    return DatasetDict(splits)


def get_label_names(args: DataArguments, token: str | None) -> list[str]:
    """Names of the classes, in the order of their numbers."""
    if args.draws_digits:
        from cluttered_digits import DIGIT_NAMES

        return [*DIGIT_NAMES, "background"]
    path = args.id2label or f"{args.data_dir or args.dataset_name}/id2label.json"
    on_hub = path.count("/") > 1 and (args.id2label is not None or args.data_dir is None)
    if not os.path.exists(path) and on_hub:
        owner, name, file = path.split("/", 2)
        path = hf_hub_download(f"{owner}/{name}", file, repo_type="dataset", token=token)
    if not os.path.exists(path):
        raise ValueError(
            f"There is no file {path} with the names of the classes; write one, or name it by --id2label."
        )
    try:
        names = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); write the names of the classes by their numbers.") from error
    if not isinstance(names, dict) or names.keys() != {str(index) for index in range(len(names))}:
        raise ValueError(f'{path} must name the classes 0, 1, ... without a gap, such as {{"0": "wall", "1": "sky"}}.')
    return [names[str(index)] for index in range(len(names))]


def check_label_maps(images: Any, args: DataArguments, label_names: list[str]) -> None:
    """Counts the pixels of each class in training label maps, and warns of classes that have none.

    It looks at `COUNTED_MAPS`, spread over a data set, or those with which a stream begins; of a class that is absent
    there it warns only if these are all.

    Raises:
        `ValueError`: when only one class has pixels that count, so that there is nothing to learn. Where other maps
            may have more, and all pixels of these count, it is a warning.
    """
    total = len(images) if isinstance(images, Dataset) else None
    if isinstance(images, Dataset):
        images = images.select(np.linspace(0, len(images) - 1, min(len(images), COUNTED_MAPS)).astype(int))
    counts, ignored, number = np.zeros(len(label_names), dtype=np.int64), 0, 0
    for row in islice(images.select_columns(args.label_column_name), COUNTED_MAPS):
        labels = args.classes(*read_file(row[args.label_column_name]), len(label_names))
        counted = labels[labels != args.ignore_index]
        counts += np.bincount(counted, minlength=len(counts))
        ignored, number = ignored + labels.size - counted.size, number + 1
    present = [name for name, count in zip(label_names, counts) if count]
    absent = [name for name in label_names if name not in present]
    if len(present) < 2:
        message = (
            f"In {number} training label maps {counts.sum()} pixels are {shortened(present) or 'of a class'}, "
            f"{ignored} are {args.ignore_index}, which does not count (--ignore_index), and none are "
            f"{shortened(absent)}: there is nothing to learn. If {args.ignore_index} is a class here, as in masks of "
            "0 and 255, give it its number in the maps; see --reduce_labels if 0 means none."
        )
        if number == total or ignored:
            raise ValueError(message)
        logger.warning(message)
    elif absent and number == total:
        logger.warning(
            f"{len(absent)} of {len(label_names)} classes have no pixel in the {number} training label maps: "
            f"{shortened(absent)}."
        )


def warn_of_absent_classes(scores: dict[str, Any], label_names: Sequence[str]) -> None:
    """Says which classes no pixel has in the label maps that a mean of `scores` is about."""
    absent = [name for name, score in zip(label_names, scores["per_category_accuracy"]) if np.isnan(score)]
    if absent:
        logger.warning_once(
            f"{len(absent)} of {len(label_names)} classes have no pixel in the label maps of the evaluation, and do "
            f"not count in means of accuracy: {shortened(absent)}."
        )


class Transform:
    """Images and label maps -> normalised pixels (channels, height, width) and classes (height, width).

    Training images are resized at random, their longer side being `min_scale` to `max_scale` times the input, and
    cropped at random; evaluation images are resized to fit. What is smaller than the input is filled up below and on
    the right, with the mean colour and ignored labels.
    """

    def __init__(
        self,
        args: DataArguments,
        processor: Any,
        augmentation: AugmentationArguments | None = None,
        num_labels: int | None = None,
    ):
        self.args, self.num_labels = args, num_labels
        self.size = (processor.size["height"], processor.size["width"])
        self.fill = fill_values(processor, args.ignore_index)
        steps: list[Any] = [ScaleJitter(self.size, (1.0, 1.0)), self.pad]
        if augmentation is not None:
            steps = [
                ScaleJitter(self.size, (augmentation.min_scale, augmentation.max_scale)),
                *photometric_distortion(augmentation.photometric_distortion),
                v2.RandomHorizontalFlip(augmentation.horizontal_flip),
                self.pad,  # after the flip: below and on the right, as in evaluation
                v2.RandomCrop(self.size),
            ]
        steps.append(v2.ToDtype({tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64}, scale=True))
        steps.append(v2.Normalize(processor.image_mean, processor.image_std))
        self.transform = v2.Compose(steps)

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """A batch of columns, as `Dataset.set_transform` gives it."""
        columns = (batch[self.args.image_column_name], batch[self.args.label_column_name])
        pairs = [self.args.pair(*values, self.num_labels) for values in zip(*columns)]
        pairs = [self.transform(tv_tensors.Image(image), tv_tensors.Mask(labels)) for image, labels in pairs]
        return {"pixel_values": [pixels for pixels, _ in pairs], "labels": [labels for _, labels in pairs]}

    def pad(self, image: tv_tensors.Image, labels: tv_tensors.Mask) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        """Fills both up to the input size."""
        return fill_up(self.size, self.fill, image, labels)


def fill_values(processor: Any, ignore_index: int) -> dict[Any, Any]:
    """What images and label maps are filled up with: the mean colour, and ignored labels."""
    colour = [round(255 * mean) for mean in processor.image_mean]
    return {tv_tensors.Image: colour, tv_tensors.Mask: ignore_index}


def fill_up(size: tuple[int, int], fill: dict[Any, Any], *images: torch.Tensor) -> Any:
    """Images and label maps of one size, filled up to `size` below and on the right; larger ones stay."""
    height, width = (max(target - length, 0) for target, length in zip(size, images[0].shape[-2:]))
    return v2.Pad([0, 0, width, height], fill=fill)(*images)


def photometric_distortion(probability: float) -> list[v2.Transform]:
    """Each of brightness, contrast, saturation and hue is changed with a probability, as much as in the reference."""
    changes = {"brightness": 0.125, "contrast": 0.5, "saturation": 0.5, "hue": 0.1}
    return [v2.RandomApply([v2.ColorJitter(**{name: most})], probability) for name, most in changes.items()]


def collate(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Examples -> `pixel_values` (B, channels, height, width) and `labels` (B, height, width)."""
    return {name: torch.stack([example[name] for example in examples]) for name in ("pixel_values", "labels")}


def predicted_classes(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Logits (B, C, rows, columns) -> the best class of each pixel of `labels` (B, height, width)."""
    maps = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
    return maps.argmax(dim=1).to(torch.int32)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Trains, evaluates and saves; returns the evaluation metrics. `arguments` are those of the command line."""
    classes = (SegmenterArguments, TrainingDataArguments, AugmentationArguments, Ade20kArguments)
    model_args, data_args, augmentation, training_args = parse_arguments(classes, arguments)
    set_seed(training_args.seed)

    teaching = model_args.teaching()
    images = load_images(data_args, augmentation.train_val_split, model_args.token, training_args.seed)
    label_names = get_label_names(data_args, model_args.token)
    check_label_maps(images["train"], data_args, label_names)
    model = load_model(
        CroprViTForSemanticSegmentation,
        model_args,
        label_names,
        semantic_loss_ignore_index=data_args.ignore_index,
    )
    processor = SegformerImageProcessor(
        size=input_size(model.config),
        do_reduce_labels=bool(data_args.reduce_labels),
        do_convert_rgb=True,
        **normalization(model_args),
    )
    transforms = [Transform(data_args, processor, changes, len(label_names)) for changes in (augmentation, None)]
    set_transforms(images, *transforms, data_args, training_args)

    mean_iou = evaluate.load(MEAN_IOU)

    def compute_metrics(batch: EvalPrediction, compute_result: bool) -> dict[str, float]:
        mean_iou.add_batch(predictions=batch.predictions.cpu(), references=batch.label_ids.cpu())
        if not compute_result:
            return {}
        scores = mean_iou.compute(num_labels=len(label_names), ignore_index=data_args.ignore_index)
        warn_of_absent_classes(scores, label_names)
        return {name: score for name, score in scores.items() if not name.startswith("per_category")}

    trainer = CroprTrainer(
        model=model,
        args=training_args,
        train_dataset=images["train"],
        eval_dataset=images["validation"],
        data_collator=collate,
        processing_class=processor,
        preprocess_logits_for_metrics=predicted_classes,
        compute_metrics=compute_metrics,
        optimizer_cls_and_kwargs=layer_decay_optimizer(
            model, training_args, training_args.layer_decay, training_args.backbone_learning_rate
        ),
        **teaching,
    )
    return run(trainer, model_args, data_args, augmentation)


if __name__ == "__main__":
    main()
