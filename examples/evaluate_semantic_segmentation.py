# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Measure a published segmentation model, loaded by the Auto classes, at the resolution of the label maps.

As in the paper, each image is resized to fit into the input, whose rest is filled with the mean colour. With
`--stride`, windows of the input's size slide over the image instead, whose shorter side is resized to a window:

    python examples/evaluate_semantic_segmentation.py --model_name_or_path outputs/ade20k --stride 512

    python examples/evaluate_semantic_segmentation.py --model_name_or_path outputs/digit_maps \\
        --dataset_name cluttered_digits --split test --picture outputs/digit_maps/segmentation.png

It prints one line of JSON with the mean intersection over union. Classes are compared by their names, where the data
set has them: `--id2label`, or `id2label.json` in `--data_dir`. Where one is `background`, and windows do not slide, it
also says which share of the patches of objects (those at least half covered) the model keeps to the end, and of all
patches of the picture, which is what chance would keep of objects.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import evaluate
import numpy as np
import torch
from datasets import Dataset
from evaluation import KeptPatches, PublishedArguments, covered_patches, picture_patches
from shared import class_numbers, record_evaluation, shortened
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F
from train_semantic_segmentation import (
    MEAN_IOU,
    DataArguments,
    fill_up,
    fill_values,
    get_label_names,
    load_source,
    warn_of_absent_classes,
)
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, HfArgumentParser
from transformers.hf_argparser import HfArg
from transformers.utils import logging

import cropr_hf  # noqa: F401 (registers the models with the Auto classes)
from cropr_hf import CroprViTConfig
from cropr_hf.files import finite
from cropr_hf.modeling_cropr_vit_segmentation import upsample
from cropr_hf.sliding_window import sliding_window_logits
from cropr_hf.speed.counts import PatchCounts
from cropr_hf.visualization import plot_segmentation


@dataclass
class EvaluationArguments(PublishedArguments):
    """Which model to evaluate, and how."""

    model_name_or_path: str = HfArg(
        default="outputs/semantic_segmentation", help="Folder or Hub id of a segmentation model."
    )
    stride: int | None = HfArg(default=None, help="Step of sliding windows in pixels, if they are to slide.")
    batch_size: int = HfArg(default=8, help="Windows per forward pass.")


class Segmenter:
    """A model with what turns images into its input.

    Attributes:
        background: number of the class of that name, if there is one.
        ignore_index: label of pixels that do not count.
        kept: which patches of objects are kept; `None` where the model does not say, or there is no background.
    """

    def __init__(self, args: EvaluationArguments, ignore_index: int):
        self.args, self.ignore_index = args, ignore_index
        self.model = args.load(AutoModelForSemanticSegmentation)
        config = self.model.config
        self.background = {name: number for number, name in config.id2label.items()}.get("background")
        says = config.model_type == CroprViTConfig.model_type and args.exported is None and args.stride is None
        self.kept = KeptPatches(config.num_hidden_layers) if says and self.background is not None else None
        self.processor = AutoImageProcessor.from_pretrained(args.model_name_or_path, trust_remote_code=False)
        self.size = (self.processor.size["height"], self.processor.size["width"])
        self.fill = fill_values(self.processor, self.model.config.semantic_loss_ignore_index)

    def resize(self, image: torch.Tensor, covers: bool = False) -> torch.Tensor:
        """An image or label map (..., height, width) as large as fits into the input, or as small as covers it."""
        ratios = [target / length for target, length in zip(self.size, image.shape[-2:])]
        ratio = max(ratios) if covers else min(ratios)
        return F.resize(image, [max(1, round(ratio * length)) for length in image.shape[-2:]])

    def fit(self, image: torch.Tensor) -> torch.Tensor:
        """An image or label map as the input shows it: resized, and filled up."""
        return fill_up(self.size, self.fill, self.resize(image))

    def normalize(self, image: torch.Tensor) -> torch.Tensor:
        """Bytes (3, height, width) -> pixel values (1, 3, height, width)."""
        pixels = F.to_dtype(image, torch.float32, scale=True)
        return F.normalize(pixels, self.processor.image_mean, self.processor.image_std)[None].to(self.args.device)

    @torch.inference_mode()
    def label_map(self, image: Any, labels: np.ndarray) -> torch.Tensor:
        """The class of each pixel of a picture, (height, width); `kept` counts by the right classes in `labels`."""
        image = tv_tensors.Image(image)
        resized = self.resize(image, covers=self.args.stride is not None)
        pixel_values = self.normalize(fill_up(self.size, self.fill, resized))
        if self.kept is None:
            logits = sliding_window_logits(self.model, pixel_values, self.size, self.args.stride, self.args.batch_size)
        else:
            outputs = self.model(pixel_values, output_pruning=True)
            logits = upsample(outputs.logits, self.size)
            objects = np.isin(labels, [self.background, self.ignore_index], invert=True)
            shown = fill_up(self.size, {tv_tensors.Mask: 0}, self.resize(tv_tensors.Mask(np.uint8(objects)[None])))
            patch_size = self.model.config.patch_size
            picture = picture_patches([resized.shape[-2:]], self.size, patch_size)
            self.kept.add(outputs.pruned_after_block, covered_patches(shown, patch_size), picture)
        height, width = resized.shape[-2:]
        logits = torch.nn.functional.interpolate(logits[..., :height, :width], image.shape[-2:], mode="bilinear")
        return logits.argmax(dim=1)[0].cpu()

    @torch.inference_mode()
    def picture(self, images: Sequence[Any], references: Sequence[np.ndarray]) -> Any:
        """A figure of the model's input (the whole image in one window), label maps, predictions, pruned patches."""
        inputs = [self.fit(tv_tensors.Image(image)) for image in images]
        outputs = self.model(torch.cat([self.normalize(image) for image in inputs]), output_pruning=True)
        config = self.model.config
        return plot_segmentation(
            [image.permute(1, 2, 0).numpy() for image in inputs],
            torch.nn.functional.interpolate(outputs.logits, self.size, mode="bilinear").argmax(dim=1),
            outputs.pruned_after_block,
            config.num_hidden_layers,
            config.grid_size,
            columns=2,
            references=[self.fit(tv_tensors.Mask(labels[None]))[0] for labels in references],
            label_names=config.id2label,
            clear_labels=[
                config.semantic_loss_ignore_index,
                *([] if self.background is None else [self.background]),
            ],
        )


def load_split(args: EvaluationArguments, data_args: DataArguments) -> Dataset:
    """The images to evaluate on.

    Raises:
        `ValueError`: when the data set has no such split.
    """
    if data_args.draws_digits:
        from cluttered_digits import cluttered_digits

        return cluttered_digits(args.split, data_args.max_eval_samples or 2000, seed=args.seed)
    images = load_source(data_args)
    if args.split not in images:
        raise ValueError(f"The data set has no split {args.split!r}, only {', '.join(images)}.")
    split = images[args.split]
    return split.select(range(min(data_args.max_eval_samples or len(split), len(split))))


class References:
    """Label maps of a data set, in the numbers of a model: classes are compared by their names.

    Where the data set does not name its classes, its numbers are those of the model.
    """

    def __init__(self, data_args: DataArguments, known: dict[int, str]):
        self.args, self.names = data_args, [*known.values()]
        numbers: list[int | None] = [*known]
        if data_args.draws_digits or data_args.id2label or os.path.exists(f"{data_args.data_dir}/id2label.json"):
            self.names = get_label_names(data_args, None)
            numbers = class_numbers(self.names, known)
        self.numbers = np.array([-1 if number is None else number for number in numbers])

    def pair(self, row: dict[str, Any]) -> tuple[Any, np.ndarray]:
        """The picture of a row, and its class numbers (height, width).

        Raises:
            `ValueError`: as `DataArguments.pair`, and for pixels of a class that the model does not know.
        """
        columns = (self.args.image_column_name, self.args.label_column_name)
        image, labels = self.args.pair(*(row[column] for column in columns), len(self.names))
        counted = labels != self.args.ignore_index
        lost = [self.names[label] for label in np.unique(labels[counted]) if self.numbers[label] < 0]
        if lost:
            raise ValueError(
                f"The label maps show {shortened(lost)}, which the model does not know; name the classes as it does "
                f"(--id2label), or give these pixels the label {self.args.ignore_index}."
            )
        labels[counted] = self.numbers[labels[counted]]
        return image, labels


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Evaluates and returns the metrics; `arguments` are those of the command line."""
    args, data_args = HfArgumentParser((EvaluationArguments, DataArguments)).parse_args_into_dataclasses(arguments)
    segmenter = Segmenter(args, data_args.ignore_index)
    split = load_split(args, data_args)
    known = segmenter.model.config.id2label
    mean_iou, references = evaluate.load(MEAN_IOU), References(data_args, known)

    whole_images = segmenter.model if args.stride is None else None  # in windows that slide there are others
    with PatchCounts(whole_images) as counts:
        for row in logging.tqdm(split, desc="Evaluation"):
            image, labels = references.pair(row)
            mean_iou.add_batch(predictions=[segmenter.label_map(image, labels)], references=[labels])
    if args.picture is not None:
        pairs = [references.pair(row) for row in split.take(min(args.picture_images, len(split)))]
        segmenter.picture(*zip(*pairs)).savefig(args.picture, dpi=110)
    scores = mean_iou.compute(num_labels=len(known), ignore_index=data_args.ignore_index)
    warn_of_absent_classes(scores, [*known.values()])
    metrics = {name: score for name, score in scores.items() if not name.startswith("per_category")}
    if segmenter.kept is not None:
        metrics |= segmenter.kept.compute()
    if args.update_record:
        settings = {} if args.stride is None else {"stride": args.stride}
        record_evaluation(args.model_name_or_path, data_args, args.split, len(split), metrics, counts, settings)
    return metrics | counts.means()


if __name__ == "__main__":
    print(json.dumps(finite(main())))
