# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Fine-tune any pretrained ViT with token pruning on image classification.

The defaults are the ImageNet recipe of the paper (its learning rate is 1e-3 per 256 images: 4e-3 for 1024):

    accelerate launch examples/train_image_classification.py --model_name_or_path facebook/vit-mae-large \\
        --dataset_name ILSVRC/imagenet-1k --norm_before_pooling False --pruning_rate 8 --output_dir outputs/cropr-l \\
        --per_device_train_batch_size 128 --learning_rate 4e-3 --fp16 --dataloader_num_workers 8

This and the settings of other models are files in `examples/recipes`, which a script takes as its first word:

    accelerate launch examples/train_image_classification.py examples/recipes/mae_vit_l_imagenet.yaml

`--dataset_name cluttered_digits` draws its images on the spot and needs no network:

    python examples/train_image_classification.py --model_name_or_path examples/digits_vit \\
        --dataset_name cluttered_digits --pruning_rate 20 --output_dir outputs/digits
"""

import glob
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import torch
from datasets import ClassLabel, Dataset, load_dataset
from shared import (
    CLUTTERED_DIGITS,
    ModelArguments,
    RecipeArguments,
    StreamingArguments,
    check_limits,
    draw_digits,
    input_size,
    load_hub_data,
    load_model,
    normalization,
    parse_arguments,
    prepare_splits,
    read_picture,
    run,
    set_transforms,
    shortened,
)
from teacher import TeacherArguments, has_learned, unpruned_source
from torchvision.transforms import v2
from transformers import ViTImageProcessor, set_seed
from transformers import logging as transformers_logging
from transformers.hf_argparser import HfArg
from transformers.utils import is_timm_available

from cropr_hf import CroprViTConfig, CroprViTForImageClassification
from cropr_hf.training import CroprTrainer, layer_decay_optimizer


logger = transformers_logging.get_logger(__name__)

ACCURACY = str(Path(__file__).parent / "metrics" / "accuracy" / "accuracy.py")
BICUBIC = 3  # of Pillow, and of the transforms below


@dataclass
class ClassifierArguments(TeacherArguments, ModelArguments):
    """`ModelArguments`, and what only a classifier has."""

    published_recipe: bool = HfArg(
        default=False,
        help="Train as the authors of --token_reducer do on ImageNet; what the command line or a recipe says wins.",
    )

    label_smoothing: float = HfArg(default=0.1, help="Of the main and the auxiliary losses.")
    pooling: str | None = HfArg(
        default=None, help="'mean', 'patch_mean', 'cls', 'cls_patch_mean' or 'attention', if not that of the source."
    )
    norm_before_pooling: bool | None = HfArg(
        default=None, help="Final norm before or after pooling, if not as in the source."
    )

    def overrides(self) -> dict[str, Any]:
        """See `ModelArguments.overrides`."""
        own = {name: getattr(self, name) for name in ("pooling", "norm_before_pooling")}
        return super().overrides() | {name: value for name, value in own.items() if value is not None}

    def default_teacher(self, label_names: Sequence[str] | None) -> Any:
        """See `TeacherArguments.default_teacher`: of a published recipe the model to start from, if it can."""
        if not self.published_recipe or label_names is None:
            return super().default_teacher(label_names)
        if has_learned(self, label_names):
            return unpruned_source(CroprViTForImageClassification, self)
        logger.warning(
            f"The recipe of {self.token_reducer} learns from the model that it starts from, but "
            f"{self.model_name_or_path} is no unpruned classifier of these classes: it trains without a teacher. "
            "Fine-tune one first (--token_reducer none), and start from it, or name it by --teacher_name_or_path."
        )
        return None


@dataclass
class ImageArguments(StreamingArguments):
    """Which images to train on, and how each is augmented."""

    dataset_name: str | None = HfArg(default=None, help=f"Data set id on the Hub, or '{CLUTTERED_DIGITS}'.")
    dataset_config_name: str | None = HfArg(default=None, help="Configuration of that data set.")
    train_dir: str | None = HfArg(
        default=None, help="Folder with one folder of images per class, instead of a data set."
    )
    validation_dir: str | None = HfArg(default=None, help="The same for validation.")
    train_val_split: float = HfArg(
        default=0.15, help="Share of the training images to validate on, if there are no others."
    )
    max_train_samples: int | None = HfArg(default=None, help="Use fewer training images.")
    max_eval_samples: int | None = HfArg(default=None, help="Use fewer validation images.")
    image_column_name: str = HfArg(default="image", help="Column of the images.")
    label_column_name: str = HfArg(default="label", help="Column of the classes.")
    center_crop: float | None = HfArg(
        default=None,
        help="Share of the shorter side that evaluation shows, from its middle; else all of it, stretched.",
    )
    crop_min_scale: float = HfArg(default=0.08, help="Smallest share of the image in a random crop; 1 is no crop.")
    horizontal_flip: float = HfArg(default=0.5, help="Probability of a mirror image.")
    randaugment_magnitude: int = HfArg(
        default=9, help="RandAugment of timm with operations of about this magnitude (0 to 10); 0 is none."
    )
    random_erasing: float = HfArg(default=0.25, help="Probability of replacing a rectangle by noise.")

    def __post_init__(self) -> None:
        check_limits(self)
        if self.train_dir is not None:
            self.dataset_name = None  # that of a recipe
        if self.center_crop is not None and not 0 < self.center_crop <= 1:
            raise ValueError(f"--center_crop is {self.center_crop}; it must be in (0, 1], such as 0.875.")
        if not 0 <= self.randaugment_magnitude <= 10:
            raise ValueError(f"--randaugment_magnitude is {self.randaugment_magnitude}; it must be in [0, 10].")


@dataclass
class DataArguments(ImageArguments):
    """`ImageArguments`, and how images and classes are mixed."""

    mixup_alpha: float = HfArg(default=0.8, help="Mixup; 0 is none.")
    cutmix_alpha: float = HfArg(default=1.0, help="Cutmix; 0 is none. A batch gets one of the two.")


@dataclass
class ImageNetArguments(RecipeArguments):
    """`TrainingArguments` with the defaults of the paper on ImageNet."""

    output_dir: str = HfArg(
        default="outputs/image_classification", help="Where checkpoints and the stripped model go."
    )
    num_train_epochs: float = HfArg(default=50, help="Passes over the training images.")
    learning_rate: float = HfArg(default=1e-3, help="Peak learning rate of the head.")
    lr_scheduler_type: str = HfArg(default="cosine_with_min_lr", help="Learning-rate schedule.")
    lr_scheduler_kwargs: dict | str | None = field(default_factory=lambda: {"min_lr": 1e-6})
    warmup_steps: float = HfArg(default=0.1, help="Steps of linear warm-up, or their share if below 1.")
    per_device_train_batch_size: int = HfArg(default=64, help="Images per process and step.")
    per_device_eval_batch_size: int = HfArg(default=64, help="Images per process and evaluation step.")


def load_images(args: ImageArguments, token: str | None, seed: int) -> Any:
    """The splits `train` and `validation`, as data sets or streams.

    Raises:
        `ValueError`: when no data set is named, or it lacks a column.
    """
    if args.dataset_name == CLUTTERED_DIGITS:
        return draw_digits(args, seed)
    if args.dataset_name is not None:
        images = load_hub_data(args.dataset_name, args.dataset_config_name, token=token, streaming=args.streaming)
    elif args.train_dir is not None:
        folders = {"train": args.train_dir, "validation": args.validation_dir}
        patterns = {split: folder_pattern(folder) for split, folder in folders.items() if folder is not None}
        images = load_dataset("imagefolder", data_files=patterns)
    else:
        raise ValueError("Name the images: --dataset_name, or --train_dir.")
    return prepare_splits(images, args, args.train_val_split, seed)


def folder_pattern(folder: str) -> str:
    """All files in a folder, whatever its name, and in its subfolders.

    Raises:
        `ValueError`: when there is no such folder.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"There is no folder {folder}; name one with one folder of images per class.")
    return os.path.join(glob.escape(folder), "**")


def check_class_counts(images: Any, column: str, label_names: list[str]) -> None:
    """Warns of classes without a training image; of a stream nobody knows.

    Raises:
        `ValueError`: when fewer than two classes have one, so that there is nothing to learn, or when a label is not
            that of a class.
    """
    if not isinstance(images, Dataset):
        return
    labels = np.asarray(images.select_columns(column).with_format("numpy")[:][column], dtype=np.float64)
    wrong = labels[~((labels >= 0) & (labels < len(label_names)))]  # NaN where there is none
    if wrong.size:
        raise ValueError(
            f"{wrong.size} of {labels.size} training images have no class, but {column} {wrong[0]:g}; leave them out, "
            "or choose a split with labels."
        )
    counts = np.bincount(labels.astype(np.int64), minlength=len(label_names))
    absent = [name for name, count in zip(label_names, counts) if not count]
    if len(label_names) - len(absent) < 2:
        raise ValueError(
            f"All {labels.size} training images are of the class {label_names[counts.argmax()]!r}, of "
            f"{len(label_names)}; there is nothing to learn. Give images of two classes or more."
        )
    if absent:
        logger.warning(
            f"{len(absent)} of {len(label_names)} classes have none of the {labels.size} training images: "
            f"{shortened(absent)}."
        )


def get_label_names(images: Any, column: str) -> list[str]:
    """Names of the classes, in the order of their numbers.

    Raises:
        `ValueError`: when the column does not name its classes.
    """
    feature = (images["train"].features or {}).get(column)
    if not isinstance(feature, ClassLabel):
        raise ValueError(
            f"The column {column!r} holds {feature}, not class labels; give the data set a `datasets.ClassLabel` "
            "column (`images.class_encode_column`), or name another by --label_column_name."
        )
    return feature.names


def image_processor(config: CroprViTConfig, args: ImageArguments, model_args: ModelArguments) -> ViTImageProcessor:
    """From an image to the input of the published model, and of the evaluation here."""
    size = input_size(config)
    resize: dict[str, Any] = {"size": size}
    if args.center_crop is not None:
        shorter = round(min(size.values()) / args.center_crop)
        resize = {"size": {"shortest_edge": shorter}, "do_center_crop": True, "crop_size": size}
    return ViTImageProcessor(resample=BICUBIC, do_convert_rgb=True, **resize, **normalization(model_args))


def augmentation(config: CroprViTConfig, args: ImageArguments, processor: Any) -> v2.Compose:
    """From an image to normalised pixels, at random, for training."""
    size = list(input_size(config).values())
    bicubic = v2.InterpolationMode.BICUBIC
    train: list[Any] = [v2.Resize(size, interpolation=bicubic)]
    if args.crop_min_scale < 1:
        train = [v2.RandomResizedCrop(size, scale=(args.crop_min_scale, 1.0), interpolation=bicubic)]
    if args.horizontal_flip > 0:
        train.append(v2.RandomHorizontalFlip(args.horizontal_flip))
    if args.randaugment_magnitude > 0:
        train.append(rand_augment(args.randaugment_magnitude, processor.image_mean))
    train += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    train.append(v2.Normalize(processor.image_mean, processor.image_std))
    if args.random_erasing > 0:
        train.append(v2.RandomErasing(args.random_erasing, value="random"))
    return v2.Compose(train)


def rand_augment(magnitude: int, image_mean: Sequence[float]) -> Callable[[Any], Any]:
    """RandAugment as MAE, EVA-02 and the paper train with it, from Pillow images to Pillow images.

    Two operations of timm's increasing set, each left out with probability 0.5, at a magnitude drawn around
    `magnitude` tenths of the strongest; what comes in at the edges has the mean colour.

    Raises:
        `ImportError`: without timm. That of torchvision leaves nothing out, and its 9 is 9 of 30.
    """
    if not is_timm_available():
        raise ImportError(
            'RandAugment needs timm: pip install "cropr_hf[timm]"; or do without by --randaugment_magnitude 0.'
        )
    from timm.data.auto_augment import rand_augment_transform

    settings = {"img_mean": tuple(round(255 * mean) for mean in image_mean), "interpolation": BICUBIC}
    return rand_augment_transform(f"rand-m{magnitude}-mstd0.5-inc1", settings)


class Transform:
    """Images and classes -> normalised pixels (channels, height, width) and classes, with `augment` or else as the
    published model takes them. Training images say that they are, for the collator.

    (An object, because worker processes that are not forked get it by pickle, which knows no function in a function.)
    """

    def __init__(self, args: ImageArguments, processor: Any, augment: Callable[[Any], torch.Tensor] | None = None):
        self.args, self.processor, self.augment = args, processor, augment

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """A batch of columns, as `Dataset.set_transform` gives it."""
        labels = batch[self.args.label_column_name]
        pixels = [self.pixels(image) for image in self.pictures(batch)]
        return {"pixel_values": pixels, "labels": labels, "training": [self.augment is not None] * len(labels)}

    def pictures(self, batch: dict[str, list]) -> list[Any]:
        """The images of a batch, decoded."""
        return [read_picture(image) for image in batch[self.args.image_column_name]]

    def pixels(self, image: Any) -> torch.Tensor:
        """(channels, height, width) of one image."""
        if self.augment is not None:
            return self.augment(image)
        return self.processor(image, return_tensors="pt")["pixel_values"][0]


class Collator:
    """Stacks examples; batches of training images get mixup or cutmix, and with it soft labels (B, C)."""

    def __init__(self, args: DataArguments, num_labels: int):
        mixes = [(v2.MixUp, args.mixup_alpha), (v2.CutMix, args.cutmix_alpha)]
        active = [mix(alpha=alpha, num_classes=num_labels) for mix, alpha in mixes if alpha > 0]
        self.mix = v2.RandomChoice(active) if active else None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Examples -> `pixel_values` (B, channels, height, width) and `labels` (B,) or (B, C)."""
        pixel_values = torch.stack([example["pixel_values"] for example in examples])
        labels = torch.tensor([example["labels"] for example in examples])
        if self.mix is not None and examples[0]["training"]:
            pixel_values, labels = self.mix(pixel_values, labels)
        return {"pixel_values": pixel_values, "labels": labels}


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Trains, evaluates and saves; returns the evaluation metrics. `arguments` are those of the command line."""
    classes = (ClassifierArguments, DataArguments, ImageNetArguments)
    model_args, data_args, training_args = parse_arguments(classes, arguments)
    set_seed(training_args.seed)

    images = load_images(data_args, model_args.token, training_args.seed)
    label_names = get_label_names(images, data_args.label_column_name)
    check_class_counts(images["train"], data_args.label_column_name, label_names)
    teaching = model_args.teaching(label_names)
    model = load_model(CroprViTForImageClassification, model_args, label_names)
    processor = image_processor(model.config, data_args, model_args)
    train = Transform(data_args, processor, augmentation(model.config, data_args, processor))
    set_transforms(images, train, Transform(data_args, processor), data_args, training_args)

    accuracy = evaluate.load(ACCURACY)
    trainer = CroprTrainer(
        model=model,
        args=training_args,
        train_dataset=images["train"],
        eval_dataset=images["validation"],
        data_collator=Collator(data_args, len(label_names)),
        processing_class=processor,
        compute_metrics=lambda p: accuracy.compute(
            predictions=np.argmax(p.predictions, axis=1), references=p.label_ids
        ),
        optimizer_cls_and_kwargs=layer_decay_optimizer(
            model, training_args, training_args.layer_decay, training_args.backbone_learning_rate
        ),
        **teaching,
    )
    return run(trainer, model_args, data_args)


if __name__ == "__main__":
    main()
