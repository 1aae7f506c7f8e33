# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What the scripts for object detection and instance segmentation share: everything but the model class."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from coco import (
    BOX_FORMATS,
    CocoMetrics,
    annotations,
    check_counts,
    check_objects,
    decode_masks,
    label_names,
    load_coco,
)
from datasets import Dataset, DatasetDict
from shared import (
    CLUTTERED_DIGITS,
    Eva02Arguments,
    ModelArguments,
    RecipeArguments,
    ScaleJitter,
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
)
from torchvision import tv_tensors
from torchvision.ops import box_convert, masks_to_boxes
from torchvision.transforms import v2
from transformers import logging as transformers_logging
from transformers import set_seed
from transformers.hf_argparser import HfArg

from cropr_hf import CroprViTConfig, CroprViTImageProcessor
from cropr_hf.arguments import parse_config
from cropr_hf.detection_heads import training_memory
from cropr_hf.images import to_rgb
from cropr_hf.publishing.published import detections
from cropr_hf.training import CroprTrainer, layer_decay_optimizer


logger = transformers_logging.get_logger(__name__)

EVA02_DETECTOR = CroprViTConfig.from_size("eva02_large_detection")
EVA02_FIELDS = ("image_size", "patch_size", "interpolate_antialias", "window_size", "window_block_indices")
EVA02_FIELDS += ("pruning_schedule",)
FILES = ("train", "validation")  # splits that are read from files in COCO format
DIGITS = {"num_digits": (1, 3), "digit_size": (20, 28), "image_size": 128}
# Heads in proportion to a backbone for digits; those of the paper would cost a hundred times as much as it.
DIGIT_DETECTOR = {
    "anchor_sizes": [8, 16, 32, 64, 128],
    "pyramid_channels": 16,
    "box_head_size": 64,
    "num_proposals": 50,
    "rois_per_image": 32,
    "detections_per_image": 20,
    "mask_stride": 1,
}


@dataclass
class DetectorArguments(Eva02Arguments):
    """`ModelArguments` whose default model is prepared as in the paper."""

    recipe = {name: getattr(EVA02_DETECTOR, name) for name in EVA02_FIELDS}
    drop_path_rate: float = HfArg(default=0.4, help="Stochastic depth of the last but one block.")
    label_smoothing: float = field(default=0.0, init=False)  # no argument: detectors have none
    config: str = HfArg(default="{}", help="Further fields of the configuration, as JSON.")

    def overrides(self) -> dict[str, Any]:
        """See `ModelArguments.overrides`."""
        return super().overrides() | parse_config(self.config)


@dataclass
class DataArguments:
    """Which images and objects, and how the training images are changed."""

    dataset_name: str | None = HfArg(
        default=None, help=f"Data set id on the Hub, or '{CLUTTERED_DIGITS}', instead of files."
    )
    dataset_config_name: str | None = HfArg(default=None, help="Configuration of that data set.")
    dataset_revision: str | None = HfArg(default=None, help="Branch, tag or commit of that data set.")
    box_format: str = HfArg(
        default="xywh", help=f"How that data set gives boxes: {' or '.join(BOX_FORMATS)} (corners)."
    )
    train_images_dir: str = HfArg(default="coco/train2017", help="Folder of the training images.")
    train_annotations: str = HfArg(
        default="coco/annotations/instances_train2017.json", help="Their objects, in COCO format."
    )
    validation_images_dir: str = HfArg(default="coco/val2017", help="Folder of the validation images.")
    validation_annotations: str = HfArg(default="coco/annotations/instances_val2017.json", help="Their objects.")
    train_val_split: float = HfArg(
        default=0.15, help="Share of the training images to validate on, if there are no others."
    )
    max_train_samples: int | None = HfArg(default=None, help="Use fewer training images.")
    max_eval_samples: int | None = HfArg(default=None, help="Use fewer validation images.")
    image_column_name: str = HfArg(default="image", help="Column of the images.")
    label_column_name: str = HfArg(default="objects", help="Column of the objects.")
    horizontal_flip: float | None = HfArg(default=None, help="Probability of a mirror image; 0.5, and 0 for digits.")
    scale_range: list[float] | None = HfArg(
        default=None,
        help="Least and greatest random size, relative to what fits the input; 0.1 2.0, and 0.8 1.25 for digits.",
    )

    def __post_init__(self) -> None:
        check_limits(self)
        if self.box_format not in BOX_FORMATS:
            raise ValueError(f"--box_format is {self.box_format!r}; choose {' or '.join(BOX_FORMATS)}.")
        if self.horizontal_flip is None:
            self.horizontal_flip = 0.0 if self.draws_digits else 0.5
        if self.scale_range is None:
            self.scale_range = [0.8, 1.25] if self.draws_digits else [0.1, 2.0]
        if len(self.scale_range) != 2 or not 0 < self.scale_range[0] <= self.scale_range[1]:
            raise ValueError(f"--scale_range is {self.scale_range}; give the least and the greatest, such as 0.1 2.0.")

    @property
    def draws_digits(self) -> bool:
        """Whether the images are cluttered digits."""
        return self.dataset_name == CLUTTERED_DIGITS


@dataclass
class CocoArguments(RecipeArguments):
    """`TrainingArguments` with the defaults of EVA-02-L on COCO."""

    max_steps: int = HfArg(default=60_000, help="Steps; -1 for --num_train_epochs.")
    learning_rate: float = HfArg(default=5e-5, help="Peak learning rate of the heads.")
    layer_decay: float = HfArg(default=0.8, help="Factor of the learning rate per block, from the heads down.")
    weight_decay: float = HfArg(default=0.1, help="Of matrices; vectors and positions have none.")
    lr_scheduler_type: str = HfArg(default="constant_with_warmup", help="Learning-rate schedule.")
    warmup_steps: float = HfArg(default=1000, help="Steps of linear warm-up, or their share if below 1.")
    lr_drops: list[float] = field(
        default_factory=lambda: [0.8, 0.9],
        metadata={"help": "Shares of the training after which the scheduled rate is ten times lower; 1 is never."},
    )
    per_device_train_batch_size: int = HfArg(default=2, help="Images per process and forward pass.")
    gradient_accumulation_steps: int = HfArg(default=64, help="Forward passes per step: 128 images on one device.")
    per_device_eval_batch_size: int = HfArg(default=2, help="Images per process and evaluation step.")
    eval_strategy: str = HfArg(default="steps", help="When to evaluate.")
    eval_steps: float = HfArg(default=5000, help="Steps between evaluations.")
    save_strategy: str = HfArg(default="steps", help="When to write a checkpoint.")
    save_steps: float = HfArg(default=5000, help="Steps between checkpoints.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 < share <= 1 for share in self.lr_drops):
            raise ValueError(f"--lr_drops is {self.lr_drops}; give shares of the training in (0, 1], such as 0.8 0.9.")


def load_images(args: DataArguments, masks: bool, token: str | None, seed: int) -> DatasetDict:
    """The splits `train` and `validation`, as data sets of objects.

    Raises:
        `ValueError`: when they are not data sets of objects, or have different categories.
    """
    if args.draws_digits:
        return draw_digits(args, seed, **DIGITS)
    images = prepare_splits(load_source(args, masks, token), args, args.train_val_split, seed)
    images = DatasetDict({split: prepare_split(images[split], args, masks) for split in images})
    names = {split: label_names(images[split]) for split in images}
    if names["train"] != names["validation"]:
        raise ValueError(f"Training and validation must have the same categories, not {names}.")
    return images


def load_source(
    args: DataArguments, masks: bool, token: str | None = None, splits: Sequence[str] = FILES
) -> DatasetDict:
    """All splits of the data set on the Hub, or `splits` from files, with `masks` or without."""
    if args.dataset_name is not None:
        return load_hub_data(args.dataset_name, args.dataset_config_name, revision=args.dataset_revision, token=token)
    return DatasetDict(
        {
            split: load_coco(getattr(args, f"{split}_images_dir"), getattr(args, f"{split}_annotations"), masks)
            for split in FILES
            if split in splits
        }
    )


def prepare_split(images: Dataset, args: DataArguments, masks: bool) -> Dataset:
    """A split as `coco.py` takes it, whose images are not decoded; see `check_objects` for what it raises."""
    images = images.rename_columns({args.image_column_name: "image", args.label_column_name: "objects"})
    check_objects(images, masks)
    return keep_encoded(images, "image")


def picture_of(row: dict[str, Any]) -> tuple[Any, str]:
    """The picture of a row, upright and in RGB, and what messages call it.

    Raises:
        `ValueError`: when it cannot be read, or is not as large as the row says.
    """
    stored, name = read_file(row["image"])
    name = f"The image {row['image_id']} ({name})"
    check_upright(stored, name, (row["width"], row["height"]), "its objects are")
    return to_rgb(stored, name), name


class Transform:
    """Rows of a data set of objects -> what the model takes, image by image.

    Training images are mirrored, resized at random (large-scale jitter), and cropped to the input at random; boxes
    then are those of what is left of the masks, if `masks` are wanted. Evaluation images are resized as the image
    processor does it. What is smaller than the input is filled up with zeros below and on the right.

    Raises:
        `ValueError`: when an image cannot be read, when its objects are made for another size, or when it is too thin
            for the input; with its number and file.
    """

    def __init__(self, args: DataArguments, processor: Any, masks: bool, training: bool):
        self.args = args
        self.processor = processor
        self.masks = masks
        self.size = processor.pad_size["height"]
        self.augment = v2.Compose(
            [
                v2.RandomHorizontalFlip(args.horizontal_flip),
                LargeScaleJitter((self.size, self.size), tuple(args.scale_range)),
                self.crop,
            ]
        )
        self.training = training

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """A batch of columns, as `Dataset.set_transform` gives it."""
        examples = [self.example(dict(zip(batch, values))) for values in zip(*batch.values())]
        return {name: [example[name] for example in examples] for name in examples[0]}

    def example(self, row: dict[str, Any]) -> dict[str, Any]:
        """`pixel_values` (channels, height, width), `pixel_mask` (height, width) and `labels` of an image."""
        image, name = picture_of(row)
        try:
            return self.prepared(image, row)
        except (ValueError, RuntimeError) as error:
            size = f"{image.height} x {image.width} pixels"
            raise ValueError(f"{name} of {size} does not fit: {error} Correct it, or leave it out.") from error

    def prepared(self, image: Any, row: dict[str, Any]) -> dict[str, Any]:
        """See `example`, of a picture in RGB."""
        sample = self.augment(self.sample(image, row)) if self.training else self.sample(image, row)
        pixels = self.processor(
            sample.pop("image"), do_resize=not self.training, do_pad=False, return_tensors="pt"
        ).pixel_values[0]
        sample["boxes"] = v2.functional.resize(sample["boxes"], pixels.shape[-2:])
        if self.masks:
            sample["masks"] = resize_masks(sample["masks"], pixels.shape[-2:])
            sample["boxes"] = boxes_around(sample["masks"])
        sample = v2.SanitizeBoundingBoxes()(v2.ClampBoundingBoxes()(sample))
        labels = {
            "class_labels": sample["labels"],
            "boxes": box_convert(sample["boxes"].as_subclass(torch.Tensor), "xyxy", "cxcywh") / self.size,
            "image_id": torch.tensor(row["image_id"]),
            "orig_size": torch.tensor([row["height"], row["width"]]),
        }
        if self.masks:
            labels["masks"] = self.fill_up(sample["masks"].as_subclass(torch.Tensor))
        return {
            "pixel_values": self.fill_up(pixels),
            "pixel_mask": self.fill_up(torch.ones(pixels.shape[-2:], dtype=torch.bool)),
            "labels": labels,
        }

    def sample(self, image: Any, row: dict[str, Any]) -> dict[str, Any]:
        """The picture and its objects, without crowds, for the transforms of torchvision."""
        image = tv_tensors.Image(image)
        size = tuple(image.shape[-2:])
        objects = [entry for entry in annotations(row, self.args.box_format, self.masks) if not entry["iscrowd"]]
        boxes = torch.tensor([entry["bbox"] for entry in objects]).view(-1, 4)
        sample = {
            "image": image,
            "boxes": tv_tensors.BoundingBoxes(box_convert(boxes, "xywh", "xyxy"), format="XYXY", canvas_size=size),
            "labels": torch.tensor([entry["category_id"] for entry in objects], dtype=torch.int64),
        }
        if self.masks:
            sample["masks"] = tv_tensors.Mask(decode_masks([entry["segmentation"] for entry in objects], *size))
        return sample

    def crop(self, sample: dict[str, Any]) -> dict[str, Any]:
        """A random part of the image, as much of it as the input shows."""
        return v2.RandomCrop([min(length, self.size) for length in sample["image"].shape[-2:]])(sample)

    def fill_up(self, image: torch.Tensor) -> torch.Tensor:
        """An image or masks (..., height, width), with zeros up to the size of the input."""
        height, width = image.shape[-2:]
        return F.pad(image, (0, self.size - width, 0, self.size - height))


class LargeScaleJitter(ScaleJitter):
    """`ScaleJitter` whose masks stay where the image is."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """See `v2.Transform.transform`."""
        if isinstance(inpt, tv_tensors.Mask):
            return resize_masks(inpt, params["size"])
        return super().transform(inpt, params)


def resize_masks(masks: tv_tensors.Mask, size: Sequence[int]) -> tv_tensors.Mask:
    """Masks of another size by the pixels in the middle; torchvision's own masks move by up to half a pixel."""
    resized = v2.functional.resize_image(masks, list(size), interpolation=v2.InterpolationMode.NEAREST_EXACT)
    return tv_tensors.wrap(resized, like=masks)


def boxes_around(masks: torch.Tensor) -> tv_tensors.BoundingBoxes:
    """Boxes (n, 4) of masks (n, height, width); empty ones where a mask is empty."""
    boxes = torch.zeros(len(masks), 4)
    left = masks.flatten(1).any(dim=1).bool()
    if left.any():
        boxes[left] = masks_to_boxes(masks[left]) + torch.tensor([0.0, 0.0, 1.0, 1.0])  # to the outer edges of pixels
    return tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=masks.shape[-2:])


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Examples -> `pixel_values` (B, channels, height, width), `pixel_mask` (B, height, width) and a list `labels`."""
    batch = {name: torch.stack([example[name] for example in examples]) for name in ("pixel_values", "pixel_mask")}
    return {**batch, "labels": [example["labels"] for example in examples]}


class DetectionTrainer(CroprTrainer):
    """The `CroprTrainer`, with COCO's metrics and the drops of the learning rate of `CocoArguments`.

    Predictions go into the metrics batch by batch: the masks of a data set would not fit into memory, and objects are
    too ragged to be gathered from several processes.
    """

    def __init__(self, *args: Any, coco_metrics: CocoMetrics, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.coco_metrics = coco_metrics

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """See `Trainer.create_scheduler`."""
        if self.lr_scheduler is None:
            scheduler: Any = super().create_scheduler(num_training_steps, optimizer)
            drops = [share * num_training_steps for share in self.args.lr_drops]

            def dropped(schedule: Any):
                return lambda step: schedule(step) * 0.1 ** sum(step >= drop for drop in drops)

            scheduler.lr_lambdas = [dropped(schedule) for schedule in scheduler.lr_lambdas]
        return self.lr_scheduler

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """See `Trainer.prediction_step`."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        sizes = [tuple(labels["orig_size"].tolist()) for labels in inputs["labels"]]
        for labels, found in zip(inputs["labels"], detections(outputs, self.processing_class, sizes)):
            self.coco_metrics.add(labels["image_id"].item(), found)
        return loss.detach(), None, None

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """See `Trainer.evaluation_loop`."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.coco_metrics.compute().items()}
        return output._replace(metrics={**output.metrics, **metrics})


def image_processor(config: CroprViTConfig, args: ModelArguments) -> CroprViTImageProcessor:
    """Resizes to fit the input of the model, and fills up.

    Raises:
        `ValueError`: when the input is not square.
    """
    size = input_size(config)
    if size["height"] != size["width"]:
        raise ValueError(f"`image_size` is {config.image_size}; detectors take squares here: give one number.")
    edge = {"shortest_edge": size["height"], "longest_edge": size["height"]}
    return CroprViTImageProcessor(size=edge, pad_size=size, do_convert_rgb=True, **normalization(args))


def train(model_class: Any, recipe: type[CocoArguments], task: str, arguments: list[str] | None) -> dict[str, float]:
    """Trains, evaluates and saves; returns the evaluation metrics. `arguments` are those of the command line."""
    model_args, data_args, training_args = parse_arguments((DetectorArguments, DataArguments, recipe), arguments)
    set_seed(training_args.seed)

    masks = task == "image-segmentation"
    images = load_images(data_args, masks, model_args.token, training_args.seed)
    check_counts(images["train"], data_args.box_format)
    coco_metrics = CocoMetrics(images["validation"], masks, data_args.box_format)
    model = load_model(model_class, model_args, label_names(images["train"]))
    count = training_args.train_batch_size
    logger.warning(
        f"Of {count} images at a time the box heads keep {count * training_memory(model.config) / 1e9:.2g} GB in "
        "training, in proportion to `rois_per_image` and `pyramid_channels` (--config)."
    )
    processor = image_processor(model.config, model_args)
    images["train"].set_transform(Transform(data_args, processor, masks, training=True))
    images["validation"].set_transform(Transform(data_args, processor, masks, training=False))

    trainer = DetectionTrainer(
        model=model,
        args=training_args,
        train_dataset=images["train"],
        eval_dataset=images["validation"],
        data_collator=collate,
        processing_class=processor,
        coco_metrics=coco_metrics,
        optimizer_cls_and_kwargs=layer_decay_optimizer(
            model, training_args, training_args.layer_decay, training_args.backbone_learning_rate
        ),
    )
    return run(trainer, model_args, data_args)
