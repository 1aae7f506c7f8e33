# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Measure a published classifier, loaded by the Auto classes, and show what it prunes.

    python examples/evaluate_image_classification.py --model_name_or_path outputs/digits \\
        --dataset_name cluttered_digits --split test --picture outputs/digits/pruning.png

It prints one line of JSON with the accuracy. Classes are compared by their names, so that a folder with some of the
model's classes will do. With label maps it also says how well the model finds objects: which share of their patches
it keeps to the end (those at least half covered), and of all patches, which is what chance would keep of objects:

    python examples/evaluate_image_classification.py --model_name_or_path outputs/dinov2_garments \\
        --dataset_name outputs/garments/classification --split validation \\
        --object_maps outputs/garments/segmentation/annotations/validation
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import torch
from datasets import ClassLabel, Dataset
from evaluation import KeptPatches, PublishedArguments, check_says_pruning, covered_patches
from PIL import Image
from shared import (
    CLUTTERED_DIGITS,
    check_limits,
    check_upright,
    class_numbers,
    keep_encoded,
    load_hub_data,
    read_file,
    read_picture,
    record_evaluation,
    shortened,
)
from train_image_classification import ACCURACY
from transformers import AutoImageProcessor, AutoModelForImageClassification, HfArgumentParser
from transformers.hf_argparser import HfArg
from transformers.utils import logging

import cropr_hf  # noqa: F401 (registers the models with the Auto classes)
from cropr_hf.files import finite
from cropr_hf.images import orientation, upright
from cropr_hf.speed.counts import PatchCounts
from cropr_hf.visualization import plot_pruning


logger = logging.get_logger(__name__)


@dataclass
class Arguments(PublishedArguments):
    """What to evaluate on what."""

    model_name_or_path: str = HfArg(default="outputs/image_classification", help="Folder or Hub id of a classifier.")
    dataset_name: str = HfArg(default=CLUTTERED_DIGITS, help=f"Data set id on the Hub, or '{CLUTTERED_DIGITS}'.")
    dataset_config_name: str | None = HfArg(default=None, help="Configuration of that data set.")
    split: str = HfArg(default="test", help="Split of the data set.")
    max_eval_samples: int = HfArg(default=2000, help="Images to use at most.")
    object_maps: str | None = HfArg(
        default=None, help="Folder of label maps, NAME.png for the image NAME.jpg, in which 0 is background."
    )
    image_column_name: str = HfArg(default="image", help="Column of the images.")
    label_column_name: str = HfArg(default="label", help="Column of the classes.")
    batch_size: int = HfArg(default=64, help="Images per forward pass.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_limits(self)
        if self.object_maps is not None and not Path(self.object_maps).is_dir():
            raise ValueError(f"--object_maps is {self.object_maps}, which is not a folder; name one of label maps.")
        if self.object_maps is not None and self.exported is not None:
            logger.warning("--object_maps is left out: an exported file does not say which patches it keeps.")
            self.object_maps = None


def load_images(args: Arguments) -> Dataset:
    """The images to evaluate on."""
    if args.dataset_name == CLUTTERED_DIGITS:
        from cluttered_digits import cluttered_digits

        return cluttered_digits(args.split, args.max_eval_samples, seed=args.seed)
    images = load_hub_data(args.dataset_name, args.dataset_config_name, split=args.split)
    images = keep_encoded(images, args.image_column_name)
    if len(images) > args.max_eval_samples:  # files are sorted by class
        images = images.shuffle(seed=args.seed).select(range(args.max_eval_samples))
    return images


def references(images: Dataset, column: str, known: dict[int, str]) -> list[int]:
    """The right classes of the images, by name, in the numbers of a model whose `id2label` is `known`.

    Raises:
        `ValueError`: when images are of a class that the model does not know.
    """
    labels, feature = list(images[column]), images.features[column]
    if isinstance(feature, ClassLabel):
        numbers = dict(enumerate(class_numbers(feature.names, known)))
    else:  # names themselves, or numbers without names
        numbers = {name if feature.dtype == "string" else number: number for number, name in known.items()}
    lost = sorted({label for label in labels if numbers.get(label) is None})
    if lost:
        if isinstance(feature, ClassLabel):
            lost = [feature.names[label] if label >= 0 else "no class" for label in lost]
        raise ValueError(
            f"There are images of {shortened(lost)}, which the model does not know; its classes are "
            f"{shortened([*known.values()])}. Name the classes of the data set as it does, or leave these images out."
        )
    return [numbers[label] for label in labels]


class ObjectMaps:
    """Label maps of image files, and which patches of objects a model keeps.

    Args:
        folder: of the maps, with the stems of the images' names.
        processor: of the images, which takes the maps the same way.
        config: of the model.

    Raises:
        `ValueError`: for another model than a Cropr ViT.
    """

    def __init__(self, folder: str, processor: Any, config: Any):
        check_says_pruning(config, "--object_maps")
        self.folder, self.processor, self.patch_size = Path(folder), processor, config.patch_size
        self.kept = KeptPatches(config.num_hidden_layers)

    def read(self, value: Any) -> Image.Image:
        """What is an object, white on black, in an image of an image column.

        Raises:
            `ValueError`: when the image has no map, or one of another size.
        """
        image, name = read_file(value)
        path = self.folder / f"{Path(name).stem}.png"
        if not path.is_file():
            raise ValueError(f"{name} has no label map {path}; add it, or leave the image out.")
        labels, _ = read_file({"bytes": None, "path": str(path)})
        turned = orientation(labels) > 1
        labels = upright(labels)
        check_upright(image, name, labels.size, f"the label map {path}", turned)
        numbers = np.array(labels)
        if numbers.ndim != 2:
            raise ValueError(f"{path} has the mode {labels.mode}; a label map has one number per pixel: convert it.")
        return Image.fromarray(np.uint8(255 * (numbers != 0))).convert("RGB")

    def add(self, values: list, pruned_after_block: torch.Tensor) -> None:
        """Counts in a batch of images of an image column."""
        maps = [self.read(value) for value in values]
        pixels = self.processor(maps, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
        self.kept.add(pruned_after_block, covered_patches(pixels[:, 0] / 255, self.patch_size))


@torch.inference_mode()
def predict(
    model: Any, processor: Any, images: list, args: Arguments, object_maps: ObjectMaps | None = None
) -> torch.Tensor:
    """Predicted classes (images,); `object_maps` count which patches are kept."""
    predictions = []
    for start in logging.tqdm(range(0, len(images), args.batch_size), desc="Evaluation"):
        values = images[start : start + args.batch_size]
        pictures = [read_picture(value) for value in values]
        pixel_values = processor(pictures, return_tensors="pt")["pixel_values"].to(args.device)
        if object_maps is None:
            outputs = model(pixel_values)
        else:
            outputs = model(pixel_values, output_pruning=True)
            object_maps.add(values, outputs.pruned_after_block)
        predictions.append(outputs.logits.argmax(dim=-1).cpu())
    return torch.cat(predictions)


@torch.inference_mode()
def save_picture(model: Any, processor: Any, images: list, args: Arguments, labels: list[int] | None = None) -> None:
    """Draws the first images and their pruned patches, with right and predicted classes if there are `labels`."""
    images = [read_picture(image) for image in images[: args.picture_images]]
    pixel_values = processor(images, return_tensors="pt")["pixel_values"].to(args.device)
    outputs = model(pixel_values, output_pruning=True)
    titles = None
    if labels is not None:
        names, guesses = model.config.id2label, outputs.logits.argmax(-1).tolist()
        titles = [f"{names[label]}, predicted {names[guess]}" for label, guess in zip(labels, guesses)]
    figure = plot_pruning(
        images, outputs.pruned_after_block, model.config.num_hidden_layers, model.config.grid_size, titles
    )
    figure.savefig(args.picture, dpi=110)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Evaluates and returns the metrics; `arguments` are those of the command line."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    model = args.load(AutoModelForImageClassification)
    images = load_images(args)
    labels = references(images, args.label_column_name, model.config.id2label)
    pictures = list(images[args.image_column_name])
    processor = AutoImageProcessor.from_pretrained(args.model_name_or_path, trust_remote_code=False)
    object_maps = None if args.object_maps is None else ObjectMaps(args.object_maps, processor, model.config)
    with PatchCounts(model) as counts:
        predictions = predict(model, processor, pictures, args, object_maps)
    if args.picture is not None:
        save_picture(model, processor, pictures, args, labels)
    metrics = evaluate.load(ACCURACY).compute(predictions=predictions, references=labels)
    if object_maps is not None:
        metrics |= object_maps.kept.compute()
    if args.update_record:
        record_evaluation(args.model_name_or_path, args, args.split, len(labels), metrics, counts)
    return metrics | counts.means()


if __name__ == "__main__":
    print(json.dumps(finite(main())))
