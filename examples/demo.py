# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The whole workflow on cluttered digits, in minutes on a laptop CPU (`make demo`, `make demo-segmentation`,
`make demo-detection`).

A pretrained ViT is fine-tuned three times alike: as it is, with Cropr modules, and with tokens pruned at random. Each
result is published to a folder (stripped), loaded again by the Auto classes in a process of its own, and measured on
test digits that no model has seen. Then the three run side by side for speed.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import train_image_classification
import train_instance_segmentation
import train_semantic_segmentation
from detection import DIGIT_DETECTOR
from shared import CLUTTERED_DIGITS
from transformers import HfArgumentParser
from transformers import logging as transformers_logging

from cropr_hf import CroprViTConfig
from cropr_hf.files import write_json
from cropr_hf.publishing.model_card import PICTURE_NAME, add_to_record
from cropr_hf.speed.benchmark import BenchmarkArguments, run
from cropr_hf.speed.tables import markdown_table


HERE = Path(__file__).parent
MODELS = {"unpruned": "none", "Cropr": "cropr", "random": "random"}


@dataclass(frozen=True)
class Task:
    """Scripts of a task, the metric that they print, and what its fine-tuning needs beside the common settings."""

    train: Callable[[list[str]], Any]
    evaluate: str
    metrics: dict[str, str]  # on the test digits, with their titles in the table
    pruning_schedule: tuple[int, ...]
    settings: dict[str, Any]


TASKS = {
    "image_classification": Task(
        train_image_classification.main,
        "evaluate_image_classification.py",
        {"accuracy": "test accuracy"},
        (144, 96, 56, 24, 24, 24),
        # Digits are not mirrored, and a short fine-tuning of a small model needs no strong regularisation.
        {
            "horizontal_flip": 0,
            "crop_min_scale": 1,
            "randaugment_magnitude": 0,
            "random_erasing": 0,
            "mixup_alpha": 0,
            "cutmix_alpha": 0,
            "label_smoothing": 0,
            "last_layer_fusion": False,
            # At 1e-2 one seed of three lost the digits before its routers had learned to keep them.
            "learning_rate": 3e-3,
        },
    ),
    "semantic_segmentation": Task(
        train_semantic_segmentation.main,
        "evaluate_semantic_segmentation.py",
        {"mean_iou": "mean IoU"},
        (144, 96, 56, 24, 24, 24),
        {"horizontal_flip": 0, "min_scale": 1, "max_scale": 1, "photometric_distortion": 0},
    ),
    "instance_segmentation": Task(
        train_instance_segmentation.main,
        "evaluate_detection.py",
        {"box_map": "box mAP", "mask_map": "mask mAP", "object_patches_kept": "patches of objects kept"},
        (256, 144, 64, 25, 25, 25),
        {
            "image_size": 128,
            "config": json.dumps(DIGIT_DETECTOR),
            "per_device_train_batch_size": 16,
            "gradient_accumulation_steps": 1,
            "learning_rate": 5e-3,
            "layer_decay": 0.4,
            "warmup_steps": 50,
            "max_steps": -1,
        },
    ),
}


@dataclass
class DemoArguments:
    """Settings of the demo; the defaults take 3 to 8 minutes on two CPU cores."""

    task: str = "image_classification"
    pretrained: str = str(HERE / "digits_vit")
    output_dir: str = "outputs/demo"
    pruning_schedule: list[int] | None = None  # that of the task by default
    train_images: int = 5000
    epochs: int = 1
    test_images: int = 2000


def fine_tune(args: DemoArguments, name: str, *options: str) -> Path:
    """Fine-tunes one of `MODELS` and returns the folder with the stripped result; `options` are further ones."""
    folder = Path(args.output_dir) / name.lower()
    command: dict[str, Any] = {
        "model_name_or_path": args.pretrained,
        "dataset_name": CLUTTERED_DIGITS,
        "token_reducer": MODELS[name],
        "max_train_samples": args.train_images,
        "max_eval_samples": 200,
        "output_dir": folder,
        "num_train_epochs": args.epochs,
        "per_device_train_batch_size": 32,
        # Cropr modules are new and learn fast; the pretrained blocks below keep what they know.
        "learning_rate": 1e-2,
        "layer_decay": 0.3,
        "max_grad_norm": 1,
        "drop_path_rate": 0,
        "logging_steps": 20,
        "save_strategy": "no",
        "eval_strategy": "no",
        "benchmark_rounds": 0,  # all three are timed side by side at the end
        "use_cpu": True,
        "disable_tqdm": True,
        **TASKS[args.task].settings,
    }
    arguments = [part for key, value in command.items() for part in (f"--{key}", str(value))]
    if name != "unpruned":
        # In so few steps a router learns only from good features: pruning grows during the first half.
        arguments += ["--pruning_curriculum", "0.5"]
        schedule = args.pruning_schedule or TASKS[args.task].pruning_schedule
        arguments += ["--pruning_schedule", *(str(kept) for kept in schedule)]
    TASKS[args.task].train([*arguments, *options])
    return folder


def score_in_fresh_process(args: DemoArguments, model: str | Path, picture: Path | None = None) -> dict[str, float]:
    """The metrics of a folder on the test digits, in [0, 1], loaded by the Auto classes in a new interpreter."""
    command = [sys.executable, str(HERE / TASKS[args.task].evaluate), "--model_name_or_path", str(model)]
    command += ["--dataset_name", CLUTTERED_DIGITS, "--split", "test", "--max_eval_samples", str(args.test_images)]
    if str(model) != args.pretrained:
        command += ["--update_record", "True"]
    if picture is not None:
        command += ["--picture", str(picture)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    metrics = json.loads(result.stdout.splitlines()[-1])
    return {name: metrics[name] for name in TASKS[args.task].metrics}


def table_row(name: str, folder: Path, metrics: dict[str, float], benchmark: dict[str, Any]) -> dict[str, Any]:
    """What the table says about one of `MODELS`, from its metrics and the record of the benchmark."""
    config, speed = CroprViTConfig.from_pretrained(folder), benchmark["results"][name.lower()]
    return {
        "model": name,
        "metrics": metrics,
        "patches_left": config.kept_patches()[-1],
        "patches": config.num_patches,
        "parameters": speed["parameters"],
        "multiply_adds": sum(benchmark["multiply_adds"][name.lower()].values()),
        **{key: speed[key] for key in ("images_per_second", "speedup", "spread")},
    }


def table(record: dict[str, Any]) -> str:
    """The record of a demo as a Markdown table."""
    titles = TASKS[record["arguments"]["task"]].metrics
    columns = ["model", *titles.values(), "patches left", "parameters", "multiply-adds", "images/s", "speed-up"]
    rows = [
        [
            row["model"],
            *(f"{100 * row['metrics'][name]:.1f} %" for name in titles),
            f"{row['patches_left']} of {row['patches']}",
            f"{row['parameters']:,}",
            f"{row['multiply_adds'] / 1e6:.0f} M",
            f"{row['images_per_second']:.0f}",
            f"{row['speedup']:.2f}",
        ]
        for row in record["rows"]
    ]
    return markdown_table(columns, rows)


def report(args: DemoArguments, rows: list[dict[str, Any]], benchmark: dict[str, Any], minutes: float) -> None:
    """Writes what the demo found to `table.json` in its output folder, and prints it as a table."""
    arguments = {name: getattr(args, name) for name in ("task", "train_images", "epochs", "test_images")}
    arguments["pruning_schedule"] = list(args.pruning_schedule or TASKS[args.task].pruning_schedule)
    record = {
        "arguments": {**arguments, "pretrained": Path(args.pretrained).name},
        "minutes": round(minutes, 1),
        **{name: benchmark[name] for name in ("machine", "versions", "multiply_add_bound")},
        "rows": rows,
    }
    path = Path(args.output_dir) / "table.json"
    write_json(path, record)
    print(f"\n{table(record)}\n\n{record['machine']}; multiply-add bound {record['multiply_add_bound']:.2f}")
    print(f"Record: {path}")


def main() -> None:
    """Runs everything, writes the record and prints the table."""
    (args,) = HfArgumentParser(DemoArguments).parse_args_into_dataclasses()
    transformers_logging.disable_progress_bar()
    start = time.perf_counter()
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    if args.task == "image_classification":
        accuracy = score_in_fresh_process(args, args.pretrained)["accuracy"]
        print(f"\nThe pretrained ViT reaches {100 * accuracy:.1f} % on the test digits.\n", flush=True)
    folders, scores = {}, {}
    picture = Path(args.output_dir) / "cropr" / PICTURE_NAME  # where the model card shows it
    for name in MODELS:
        print(f"Fine-tuning: {name}", flush=True)
        folders[name] = fine_tune(args, name)
        scores[name] = score_in_fresh_process(args, folders[name], picture if name == "Cropr" else None)
    print("\nBenchmark", flush=True)
    benchmark = run(
        BenchmarkArguments(model_name_or_path=str(folders["Cropr"]), batch_size=64, max_rounds=12, tolerance=0.02)
    )
    add_to_record(folders["Cropr"], throughput=benchmark)
    rows = [table_row(name, folder, scores[name], benchmark) for name, folder in folders.items()]
    minutes = (time.perf_counter() - start) / 60
    report(args, rows, benchmark, minutes)
    print(f"Model card: {folders['Cropr']}/README.md; picture: {picture}")
    print(f"Total {minutes:.1f} minutes.")


if __name__ == "__main__":
    main()
