# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Five tasks on one base: each fine-tuned in full, and as a small file of differences, on cluttered digits.

    python examples/five_tasks.py

The tasks ask five things about the same drawn images. Each is learned twice from the ViT in `digits_vit`, alike but
for `--diff_share`. What is measured is the folder that was published, and what base and file give, on test digits that
no model has seen: accuracies, bytes, and how long loading takes. It writes `five_tasks.json`, and prints a table.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import evaluate_image_classification as evaluation
import numpy as np
import torch
from cluttered_digits import BACKGROUND, DIGIT_NAMES, DigitPainter, DrawnImage
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from demo import DemoArguments, fine_tune
from transformers import AutoImageProcessor, HfArgumentParser
from transformers import logging as transformers_logging
from transformers.hf_argparser import HfArg

from cropr_hf import CroprViTForImageClassification, CroprViTModel
from cropr_hf.files import write_json
from cropr_hf.speed.instruments import library_versions, machine_name
from cropr_hf.speed.tables import markdown_table
from cropr_hf.speed.timing import compare
from cropr_hf.training import load_diff, save_diff


VALIDATION_IMAGES = 200
LOADED = ("config.json", "model.safetensors", "preprocessor_config.json")  # of a folder, when a model is loaded


@dataclass(frozen=True)
class Question:
    """Names of the answers, and the number of the right one for a drawn image."""

    answers: list[str]
    answer: Callable[[DrawnImage], int]


LOOPS = (0, 6, 8, 9)  # digits that are written with a closed loop


def strongest_channel(drawn: DrawnImage) -> int:
    """Which channel of the ink is the strongest: red, green, blue."""
    ink = np.asarray(drawn.image)[np.asarray(drawn.label_map) != BACKGROUND]  # (pixels, 3)
    return int(ink.mean(axis=0).argmax())


TASKS = {
    "digit": Question(DIGIT_NAMES, lambda drawn: drawn.label),
    "parity": Question(["even", "odd"], lambda drawn: drawn.label % 2),
    "above_four": Question(["up to four", "above four"], lambda drawn: int(drawn.label > 4)),
    "loop": Question(["none", "a loop"], lambda drawn: int(drawn.label in LOOPS)),
    "ink": Question(["red", "green", "blue"], strongest_channel),
}


@dataclass
class FiveTasksArguments:
    """Settings; the defaults take about ten minutes on one CPU core."""

    pretrained: str = HfArg(default=DemoArguments.pretrained, help="A plain ViT for cluttered digits: the base.")
    output_dir: str = HfArg(default="outputs/five_tasks", help="Where images, models, files and record go.")
    pruning_schedule: list[int] = field(default_factory=lambda: [144, 96, 56, 24, 24, 24])
    diff_share: float = HfArg(default=0.005, help="Share of the weights of the base that a file may change.")
    learning_rate: float = HfArg(default=2e-3, help="Peak learning rate of the head, the same for both ways.")
    layer_decay: float = HfArg(default=1.0, help="Factor of the learning rate per block downwards.")
    train_images: int = HfArg(default=5000, help="Training images.")
    epochs: int = HfArg(default=1, help="Passes over them.")
    test_images: int = HfArg(default=1000, help="Images to measure on.")
    seed: int = HfArg(default=0, help="Of the images and of the trainings.")


def draw_images(args: FiveTasksArguments, folder: Path) -> None:
    """Writes a data set of drawn images, with a column of classes for each task."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = {task: ClassLabel(names=question.answers) for task, question in TASKS.items()}
    counts = {"train": args.train_images, "validation": VALIDATION_IMAGES, "test": args.test_images}
    for split, count in counts.items():
        painter = DigitPainter(split, seed=args.seed)
        images = [painter.draw(index) for index in range(count)]
        columns = {task: [question.answer(drawn) for drawn in images] for task, question in TASKS.items()}
        columns |= {"image": [drawn.image for drawn in images]}
        dataset = Dataset.from_dict(columns, features=Features({**labels, "image": ImageFeature()}))
        dataset.to_parquet(folder / f"{split}.parquet")


def train(args: FiveTasksArguments, images: Path, task: str, way: str, *options: str) -> Path:
    """Fine-tunes with the settings of the demo, and returns the folder with what was published."""
    print(f"Fine-tuning: {task}, {way}", flush=True)
    demo = DemoArguments(
        pretrained=args.pretrained,
        output_dir=f"{args.output_dir}/{task}_{way}",
        pruning_schedule=args.pruning_schedule,
        train_images=args.train_images,
        epochs=args.epochs,
    )
    settings = {"dataset_name": images, "label_column_name": task, "seed": args.seed}
    settings |= {"learning_rate": args.learning_rate, "layer_decay": args.layer_decay}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return fine_tune(demo, "Cropr", *words, *options)


def accuracy(args: FiveTasksArguments, model: Any, processor: Any, images: Path, task: str) -> float:
    """Share of the test images that a model gets right."""
    names = {"dataset_name": str(images), "label_column_name": task}
    settings = evaluation.Arguments(split="test", max_eval_samples=args.test_images, **names)
    data = evaluation.load_images(settings)
    labels = evaluation.references(data, task, model.config.id2label)
    predictions = evaluation.predict(model, processor, list(data["image"]), settings)
    return (predictions == torch.tensor(labels)).double().mean().item()


def learn(args: FiveTasksArguments, images: Path, task: str, base: CroprViTModel) -> dict[str, Any]:
    """What a task comes to, learned in full and as a file of differences."""
    full = train(args, images, task, "full")
    changed = train(args, images, task, "diff", "--diff_share", str(args.diff_share))
    processor = AutoImageProcessor.from_pretrained(full, trust_remote_code=False)
    file = Path(args.output_dir) / f"{task}.safetensors"
    count = save_diff(CroprViTForImageClassification.from_pretrained(changed), base, file, processor)
    loads: dict[str, Callable[[], Any]] = {
        "full": partial(CroprViTForImageClassification.from_pretrained, full),
        "diff": partial(load_diff, base, file),
    }
    timings = compare(loads, "full", min_rounds=5, max_rounds=9)
    sizes = {"full": sum((full / name).stat().st_size for name in LOADED), "diff": file.stat().st_size}
    found: dict[str, Any] = {
        way: {
            "accuracy": accuracy(args, load(), processor, images, task),
            "bytes": sizes[way],
            "load_ms": 1000 * timings[way].median,
        }
        for way, load in loads.items()
    }
    return {"classes": len(TASKS[task].answers), "changed_weights": count, **found}


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown table; in the last row the files stand with the base that they need."""
    columns = ["task", "classes", "in full: accuracy", "kB", "loading, ms"]
    columns += ["as a file: accuracy", "changed weights", "kB", "loading, ms"]
    rows = []
    for task, found in record["tasks"].items():
        full, diff = (
            [f"{100 * own['accuracy']:.1f} %", f"{own['bytes'] / 1000:.0f}", f"{own['load_ms']:.0f}"]
            for own in (found["full"], found["diff"])
        )
        diff.insert(1, f"{found['changed_weights']:,}")
        rows.append([task.replace("_", " "), f"{found['classes']}", *full, *diff])
    in_full, files = (sum(found[way]["bytes"] for found in record["tasks"].values()) for way in ("full", "diff"))
    together = f"{(record['base_bytes'] + files) / 1000:.0f}"
    rows.append(["all, with the base", "", "", f"{in_full / 1000:.0f}", "", "", "", together, ""])
    return markdown_table(columns, rows)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs everything, prints the table and returns the record; `arguments` are those of the command line."""
    (args,) = HfArgumentParser(FiveTasksArguments).parse_args_into_dataclasses(arguments)
    transformers_logging.disable_progress_bar()
    start = time.perf_counter()
    images = Path(args.output_dir) / "images"
    draw_images(args, images)
    base = CroprViTModel.from_vit(args.pretrained, token_reducer=None)
    tasks = {task: learn(args, images, task, base) for task in TASKS}
    names = ("pruning_schedule", "diff_share", "learning_rate", "layer_decay", "train_images", "epochs", "test_images")
    record = {
        "arguments": {"pretrained": Path(args.pretrained).name, **{name: getattr(args, name) for name in names}},
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "machine": machine_name(torch.device("cpu")),
        "versions": library_versions(),
        "base_bytes": sum((Path(args.pretrained) / name).stat().st_size for name in LOADED),
        "tasks": tasks,
    }
    path = Path(args.output_dir) / "five_tasks.json"
    write_json(path, record)
    print(f"\n{table(record)}\n\n{record['machine']}; record: {path}")
    print(f"Total {record['minutes']} minutes.")
    return record


if __name__ == "__main__":
    main()
