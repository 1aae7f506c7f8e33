# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Measure a published object detector or instance segmenter, loaded by the Auto classes, by COCO's average precision.

    python examples/evaluate_detection.py --model_name_or_path outputs/coco_boxes --device cuda

    python examples/evaluate_detection.py --model_name_or_path outputs/digit_masks \\
        --dataset_name cluttered_digits --split test --picture outputs/digit_masks/detections.png

The protocol of EVA-02's published figures, with soft suppression and scores that take the quality of masks into
account (the figures for boxes leave `maskness_threshold` out):

    python examples/evaluate_detection.py --model_name_or_path outputs/coco_masks --device cuda --config \\
        '{"nms_method": "linear", "nms_threshold": 0.6, "score_threshold": 0.0, "maskness_threshold": 0.5}'

It prints one line of JSON: COCO's metrics, and the share of the patches that are kept to the end, of those that boxes
of objects touch and of all that show the picture.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from coco import CocoMetrics, annotations, label_names
from datasets import Dataset
from detection import DIGITS, FILES, DataArguments, load_source, picture_of, prepare_split
from evaluation import CommonArguments, KeptPatches, check_says_pruning, picture_patches
from shared import record_evaluation
from torchvision.ops import box_convert
from transformers import (
    AutoImageProcessor,
    AutoModelForInstanceSegmentation,
    AutoModelForObjectDetection,
    HfArgumentParser,
)
from transformers.hf_argparser import HfArg
from transformers.utils import logging

import cropr_hf  # noqa: F401 (registers the models with the Auto classes)
from cropr_hf import CroprViTConfig
from cropr_hf.arguments import parse_config
from cropr_hf.conversion.convert import FURTHER_ARGUMENTS, check_names
from cropr_hf.files import finite
from cropr_hf.publishing.published import detections
from cropr_hf.speed.counts import PatchCounts
from cropr_hf.visualization import plot_detections


@dataclass
class EvaluationArguments(CommonArguments):
    """Which model to evaluate, and how."""

    model_name_or_path: str = HfArg(default="outputs/object_detection", help="Folder or Hub id of a detector.")
    config: str = HfArg(default="{}", help="Fields of the configuration to change, as JSON.")
    batch_size: int = HfArg(default=2, help="Images per forward pass.")
    picture_threshold: float = HfArg(default=0.5, help="Least score of a detection in that picture.")
    changes: dict[str, Any] = field(init=False)  # what `config` says

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.picture_threshold <= 1:
            raise ValueError(f"--picture_threshold is {self.picture_threshold}; give a score in [0, 1], such as 0.5.")
        self.changes = parse_config(self.config, example='{"score_threshold": 0.0}')
        check_names(CroprViTConfig, self.changes, "--config", FURTHER_ARGUMENTS)


class Detector:
    """A model with what turns pictures into detections."""

    def __init__(self, args: EvaluationArguments):
        self.args = args
        name = args.model_name_or_path
        config, auto_class = args.stored(AutoModelForObjectDetection, AutoModelForInstanceSegmentation)
        check_says_pruning(config, "This script", "name a detector around a Cropr ViT")
        self.masks = auto_class is AutoModelForInstanceSegmentation
        self.model = auto_class.from_pretrained(name, trust_remote_code=False, **args.changes).to(args.device)
        self.processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)

    @torch.inference_mode()
    def forward(self, images: Sequence[Any]) -> tuple[Any, list[tuple[int, int]]]:
        """Outputs for RGB pictures, and height and width of each in the input, without padding."""
        inputs = self.processor(images, return_tensors="pt").to(self.args.device)
        sizes = [(int(mask.any(dim=1).sum()), int(mask.any(dim=0).sum())) for mask in inputs.pixel_mask]
        return self.model(**inputs, output_pruning=True), sizes

    def detect(self, images: Sequence[Any]) -> list[dict[str, torch.Tensor]]:
        """What was found in RGB pictures, in their pixels."""
        outputs, _ = self.forward(images)
        return detections(outputs, self.processor, [(image.height, image.width) for image in images])

    def picture(self, rows: list[dict[str, Any]], box_format: str) -> Any:
        """A figure of the model's inputs, of the objects in them, of detections, and of pruned patches."""
        images, config = [picture_of(row)[0] for row in rows], self.model.config
        pixels = self.processor(images, do_rescale=False, do_normalize=False, return_tensors="pt").pixel_values
        outputs, sizes = self.forward(images)
        return plot_detections(
            list(pixels.permute(0, 2, 3, 1).byte().numpy()),
            detections(outputs, self.processor, sizes),
            outputs.pruned_after_block,
            config.num_hidden_layers,
            config.grid_size,
            columns=2,
            references=[objects_of(row, box_format, size) for row, size in zip(rows, sizes)],
            label_names=config.id2label,
            threshold=self.args.picture_threshold,
        )


def touched_patches(
    rows: list[dict[str, Any]], box_format: str, sizes: list[tuple[int, int]], config: Any
) -> torch.Tensor:
    """Which patches (B, rows, columns) the boxes of objects touch; `sizes` as `Detector.forward` returns them."""
    touched = torch.zeros(len(rows), *config.grid_size, dtype=torch.bool)
    for row, size, patches in zip(rows, sizes, touched):
        for left, top, right, bottom in objects_of(row, box_format, size)["boxes"] / config.patch_size:
            patches[int(top) : int(bottom.ceil()), int(left) : int(right.ceil())] = True
    return touched


def objects_of(row: dict[str, Any], box_format: str, size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """The true objects of an image, as `plot_detections` takes them, when the image is resized to `size`."""
    objects = annotations(row, box_format, masks=False)
    scale = torch.tensor([size[1] / row["width"], size[0] / row["height"]] * 2)
    boxes = box_convert(torch.tensor([entry["bbox"] for entry in objects]).view(-1, 4), "xywh", "xyxy")
    return {"boxes": boxes * scale, "labels": torch.tensor([entry["category_id"] for entry in objects])}


def load_split(args: EvaluationArguments, data_args: DataArguments, masks: bool) -> Dataset:
    """The images to evaluate on.

    Raises:
        `ValueError`: when the data set has no such split, or no image in it.
    """
    if data_args.draws_digits:
        from cluttered_digits import cluttered_digits

        return cluttered_digits(args.split, data_args.max_eval_samples or 2000, seed=args.seed, **DIGITS)
    images = load_source(data_args, masks, splits=[args.split])
    if args.split not in images:
        raise ValueError(f"There is no split {args.split!r}, only {', '.join(images or FILES)}; choose another.")
    if not len(images[args.split]):
        raise ValueError(f"The split {args.split!r} has no image; give one or more.")
    split = prepare_split(images[args.split], data_args, masks)
    return split.select(range(min(data_args.max_eval_samples or len(split), len(split))))


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Evaluates and returns the metrics; `arguments` are those of the command line."""
    args, data_args = HfArgumentParser((EvaluationArguments, DataArguments)).parse_args_into_dataclasses(arguments)
    detector = Detector(args)
    images = load_split(args, data_args, detector.masks)
    metrics = CocoMetrics(images, detector.masks, data_args.box_format)
    config = detector.model.config
    names = list(config.id2label.values())
    if names != label_names(images):
        raise ValueError(f"The model knows the categories {names}, the data set has {label_names(images)}.")
    patches = KeptPatches(config.num_hidden_layers)
    counts = PatchCounts(detector.model)
    for start in logging.tqdm(range(0, len(images), args.batch_size), desc="Evaluation"):
        rows = list(images.select(range(start, min(start + args.batch_size, len(images)))))
        with counts:
            outputs, sizes = detector.forward([picture_of(row)[0] for row in rows])
        shape = [length * config.patch_size for length in config.grid_size]
        touched = touched_patches(rows, data_args.box_format, sizes, config)
        patches.add(outputs.pruned_after_block, touched, picture_patches(sizes, shape, config.patch_size))
        found = detections(outputs, detector.processor, [(row["height"], row["width"]) for row in rows])
        for row, objects in zip(rows, found):
            metrics.add(row["image_id"], objects)
    if args.picture is not None:
        shown = list(images.select(range(min(args.picture_images, len(images)))))
        detector.picture(shown, data_args.box_format).savefig(args.picture, dpi=110)
    results = metrics.compute() | patches.compute()
    if args.update_record:
        record_evaluation(args.model_name_or_path, data_args, args.split, len(images), results, counts, args.changes)
    return results | counts.means()


if __name__ == "__main__":
    print(json.dumps(finite(main())))
