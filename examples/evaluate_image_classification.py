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
model's classes will do.
"""

import json
from dataclasses import dataclass
from typing import Any

import evaluate
import torch
from datasets import ClassLabel, Dataset
from shared import (
    CLUTTERED_DIGITS,
    class_numbers,
    keep_encoded,
    load_hub_data,
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
from cropr_hf.visualization import plot_pruning


@dataclass
class Arguments:
    """What to evaluate on what."""

    model_name_or_path: str = HfArg(default="outputs/image_classification", help="Folder or Hub id of a classifier.")
    dataset_name: str = HfArg(default=CLUTTERED_DIGITS, help=f"Data set id on the Hub, or '{CLUTTERED_DIGITS}'.")
    dataset_config_name: str | None = HfArg(default=None, help="Configuration of that data set.")
    split: str = HfArg(default="test", help="Split of the data set.")
    max_eval_samples: int = HfArg(default=2000, help="Images to use at most.")
    image_column_name: str = HfArg(default="image", help="Column of the images.")
    label_column_name: str = HfArg(default="label", help="Column of the classes.")
    batch_size: int = HfArg(default=64, help="Images per step.")
    device: str = HfArg(default="cpu", help="Where to run.")
    seed: int = HfArg(default=0, help="Of the drawn images.")
    picture: str | None = HfArg(default=None, help="A PNG file for a picture of what was pruned.")
    picture_images: int = HfArg(default=8, help="Images in that picture.")
    update_record: bool = HfArg(
        default=False, help="Whether to add the result to the record and the card of that folder."
    )


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


@torch.inference_mode()
def predict(model: Any, processor: Any, images: list, args: Arguments) -> torch.Tensor:
    """Predicted classes (images,)."""
    predictions = []
    for start in logging.tqdm(range(0, len(images), args.batch_size), desc="Evaluation"):
        batch = [read_picture(image) for image in images[start : start + args.batch_size]]
        pixel_values = processor(batch, return_tensors="pt")["pixel_values"].to(args.device)
        predictions.append(model(pixel_values).logits.argmax(dim=-1).cpu())
    return torch.cat(predictions)


@torch.inference_mode()
def save_picture(model: Any, processor: Any, images: list, labels: list[int], args: Arguments) -> None:
    """Draws the first images and their pruned patches."""
    images = [read_picture(image) for image in images[: args.picture_images]]
    pixel_values = processor(images, return_tensors="pt")["pixel_values"].to(args.device)
    outputs = model(pixel_values, output_pruning=True)
    names = model.config.id2label
    titles = [
        f"{names[label]}, predicted {names[guess]}" for label, guess in zip(labels, outputs.logits.argmax(-1).tolist())
    ]
    figure = plot_pruning(
        images, outputs.pruned_after_block, model.config.num_hidden_layers, model.config.grid_size, titles
    )
    figure.savefig(args.picture, dpi=110)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Evaluates and returns the metrics; `arguments` are those of the command line."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    images = load_images(args)
    model = AutoModelForImageClassification.from_pretrained(args.model_name_or_path, trust_remote_code=False)
    model.to(args.device)
    labels = references(images, args.label_column_name, model.config.id2label)
    pictures = list(images[args.image_column_name])
    processor = AutoImageProcessor.from_pretrained(args.model_name_or_path, trust_remote_code=False)
    predictions = predict(model, processor, pictures, args)
    if args.picture is not None:
        save_picture(model, processor, pictures, labels, args)
    metrics = evaluate.load(ACCURACY).compute(predictions=predictions, references=labels)
    if args.update_record:
        record_evaluation(args.model_name_or_path, args, args.split, len(labels), metrics)
    return metrics


if __name__ == "__main__":
    print(json.dumps(finite(main())))
