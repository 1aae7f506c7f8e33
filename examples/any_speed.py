# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""One checkpoint at any speed, against one checkpoint per speed, on cluttered digits (`make demo-any-speed`).

A pretrained ViT is fine-tuned with a pruning drawn anew at each step, then as often as there are strengths with a
fixed pruning, then unpruned; all alike otherwise. Each result is measured under every schedule on test digits that no
model has seen. It writes `any_speed.json` and `any_speed.png`, and prints a table.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import evaluate
import evaluate_image_classification as evaluation
from demo import DemoArguments, fine_tune
from shared import read_picture
from train_image_classification import ACCURACY
from transformers import AutoImageProcessor, HfArgumentParser
from transformers import logging as transformers_logging
from transformers.hf_argparser import HfArg

from cropr_hf import CroprViTForImageClassification, curriculum_schedule, evaluate_schedules
from cropr_hf.files import write_json
from cropr_hf.speed.plots import plot_tradeoff
from cropr_hf.speed.tables import markdown_table


@dataclass
class AnySpeedArguments:
    """Settings; the defaults take about five minutes on two CPU cores."""

    pretrained: str = HfArg(default=DemoArguments.pretrained, help="A plain ViT for cluttered digits.")
    output_dir: str = HfArg(default="outputs/any_speed", help="Where checkpoints, record and picture go.")
    pruning_schedule: list[int] = field(default_factory=lambda: [144, 48, 16, 4, 4, 4])
    strengths: list[float] = field(default_factory=lambda: [0.5, 0.75, 0.9, 1.0])
    train_images: int = HfArg(default=5000, help="Training images of each checkpoint.")
    epochs: int = HfArg(default=1, help="Passes over them.")
    test_images: int = HfArg(default=2000, help="Images to measure on.")
    batch_size: int = HfArg(default=64, help="Images per call in the measurements.")
    seed: int = HfArg(default=42, help="Of the training images and of the training.")


def train(args: AnySpeedArguments, name: str, schedule: list[int], *options: str) -> CroprViTForImageClassification:
    """Fine-tunes with the settings of the demo and loads what it published."""
    print(f"Fine-tuning: {name}", flush=True)
    settings = {"pretrained": args.pretrained, "train_images": args.train_images, "epochs": args.epochs}
    demo = DemoArguments(output_dir=f"{args.output_dir}/{name}", pruning_schedule=schedule, **settings)
    folder = fine_tune(demo, "Cropr" if schedule else "unpruned", "--seed", str(args.seed), *options)
    return CroprViTForImageClassification.from_pretrained(folder)


def test_metric(args: AnySpeedArguments, folder: str) -> tuple[Callable[[Any], dict[str, float]], Any]:
    """The accuracy of a model on the test digits, as a function of it, and a batch of them to time."""
    settings = evaluation.Arguments(max_eval_samples=args.test_images, batch_size=args.batch_size)
    images = evaluation.load_images(settings)
    pictures, labels = list(images["image"]), list(images["label"])
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    accuracy = evaluate.load(ACCURACY)

    def metric(model: Any) -> dict[str, float]:
        predictions = evaluation.predict(model, processor, pictures, settings)
        return accuracy.compute(predictions=predictions, references=labels)

    batch = [read_picture(picture) for picture in pictures[: args.batch_size]]
    return metric, processor(batch, return_tensors="pt")["pixel_values"]


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown table; a fixed checkpoint under its own schedule is in bold."""
    points, fixed = record["any_speed"]["points"], record["fixed"]
    names = ["pruning", "patches left", "multiply-adds", "images/s", "speed-up", "any speed"]
    names += [f"trained at {strength}" for strength in fixed]
    rows = []
    for row, (strength, point) in enumerate(zip(record["strengths"], points)):
        cells = [
            f"{strength}",
            f"{point['kept_patches'][-1]}",
            f"{point['multiply_adds'] / 1e6:.0f} M",
            f"{point['images_per_second']:.0f}",
            f"{point['speedup']:.2f} ± {point['spread']:.2f}",
            f"{100 * point['metrics']['accuracy']:.1f} %",
        ]
        for own, scores in fixed.items():
            cell = f"{100 * scores[row]['accuracy']:.1f} %" if row < len(scores) else ""
            cells.append(f"**{cell}**" if float(own) == strength else cell)
        rows.append(cells)
    return markdown_table(names, rows, num_names=0)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs everything, prints the table and returns the record; `arguments` are those of the command line."""
    (args,) = HfArgumentParser(AnySpeedArguments).parse_args_into_dataclasses(arguments)
    if len({0.0, *args.strengths}) <= len(args.strengths) or not all(0 < strength <= 1 for strength in args.strengths):
        raise ValueError(f"--strengths is {args.strengths}; give different shares in (0, 1], such as 0.5 1.")
    transformers_logging.disable_progress_bar()
    start = time.perf_counter()
    output = Path(args.output_dir)

    any_speed = train(args, "any_speed", args.pruning_schedule, "--pruning_range", "0", "1")
    strengths = [0.0, *args.strengths]
    schedules = [curriculum_schedule(any_speed.config, strength) for strength in strengths]
    metric, pixel_values = test_metric(args, any_speed.name_or_path)
    fixed = {0.0: [metric(train(args, "unpruned", []))]}  # has no modules, and so no other schedules
    for strength, schedule in zip(args.strengths, schedules[1:]):
        model = train(args, f"fixed_{strength}", schedule)
        fixed[strength] = []
        for other in schedules:
            model.set_pruning(other)
            fixed[strength].append(metric(model))
    print("Measuring the checkpoint for any speed", flush=True)
    curve = evaluate_schedules(any_speed, schedules, metric, pixel_values)
    minutes = (time.perf_counter() - start) / 60
    record = {"arguments": asdict(args), "minutes": round(minutes, 1), "strengths": strengths}
    record |= {"any_speed": curve, "fixed": fixed}
    write_json(output / "any_speed.json", record)

    # Weights do not change the speed: the checkpoints for one speed have the timings of the one for all.
    own = [fixed[strength][row if strength else 0] for row, strength in enumerate(strengths)]
    singles = [{**point, "metrics": metrics} for point, metrics in zip(curve["points"], own)]
    curves = {"one checkpoint for any speed": curve["points"], "one checkpoint per speed": singles}
    plot_tradeoff(curves).savefig(output / "any_speed.png", dpi=110)
    print(f"\n{table(record)}\n\n{curve['machine']}; record and picture: {output}/any_speed.json, .png")
    print(f"Total {minutes:.1f} minutes.")
    return record


if __name__ == "__main__":
    main()
