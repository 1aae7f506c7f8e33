"""Methods compared: each trained and measured alike, beside what one would do instead, from one file.

    cropr-hf compare examples/comparisons/digits_classification.yaml

`docs/methods.md` explains the file. Each run has a folder, so that an interrupted comparison goes on where it was.
"""

import itertools
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from .arguments import parse_device
from .comparison_file import SHARE, Comparison, folder_name
from .configuration_cropr_vit import CroprViTConfig
from .files import replacing, source_name, write_file, write_json
from .publishing.export import export_model
from .publishing.model_card import read_record
from .reducer_random import RandomReducer
from .saving import PICTURE_NAME
from .speed.alternatives import COMPILED, SMALLER_IMAGE, SMALLER_MODEL, smaller_image
from .speed.benchmark import UNPRUNED
from .speed.cost import head_multiply_adds, multiply_adds
from .speed.counts import MEANS, MULTIPLY_ADDS, PATCHES_LEFT
from .speed.instruments import compiled, library_versions, machine_name
from .speed.plots import plot_tradeoff
from .speed.tables import markdown_table
from .speed.timing import compare
from .tasks import find_task
from .token_reduction import TOKEN_REDUCERS


RECORD, TABLE, PICTURE = "comparison.json", "comparison.md", "comparison.png"
ONNX, ONNX_NAME = "ONNX", "model.onnx"
FIELDS = ("last_layer_fusion", "reducer_config")  # of the configuration: which tokens there are depends on them too
MODEL = ("method", "budget", "trained")  # of a run: what those with other seeds have in common
CLOSE, TOLERANCE = 0.01, 0.05  # of multiply-adds: near enough not to look further, and to be called the same budget
PERCENT = range(50, 151)  # of a schedule's pruning
# More than torch compiles of a function for one detector: stages differ, each for fixed or any numbers of boxes.
VARIANTS = 16


@dataclass(frozen=True)
class Run:
    """One model: trained with one seed, or taken off the shelf.

    Attributes:
        method: what the comparison calls a method, or a reference.
        budget: its name; `None` where there is none to meet.
        seed: of the training.
        trained: `False` for a method on the unpruned checkpoint of that seed.
        arguments: of `train`, or what `evaluate` changes in that checkpoint.
    """

    method: str
    budget: str | None
    seed: int
    trained: bool
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """Of its folder."""
        return folder_name(self.method, self.budget, None if self.trained else "off the shelf", f"seed {self.seed}")

    @property
    def prunes(self) -> bool:
        """Whether there is something to see in a picture."""
        return self.arguments.get("token_reducer") in TOKEN_REDUCERS


class Runner:
    """Trains, evaluates and measures what a `Comparison` says.

    Args:
        comparison: what.
        output_dir: where runs, record, table and picture go.
    """

    def __init__(self, comparison: Comparison, output_dir: str | os.PathLike):
        self.comparison, self.output_dir = comparison, Path(output_dir)

    def __call__(self) -> dict[str, Any]:
        """Does what is not done yet, writes the results, and returns the record.

        Raises:
            `ValueError`: when a folder of this output has other settings or other data, or a script is not there.
            `RuntimeError`: when a script fails; its output is in the folder of the run.
        """
        for script in (self.comparison.train, self.comparison.evaluate):  # the second would be missed after a training
            check_script(script)
        runs: list[Run] = []
        records: list[dict[str, Any]] = []
        for seed in self.comparison.seeds:
            unpruned = self.unpruned(seed)
            records.append(self.finished(unpruned))
            others = list(self.others(seed))
            for run in logging.tqdm(others, desc=f"Runs with seed {seed}"):
                records.append(self.finished(run))
                check_alike(records)
            runs = runs or [unpruned, *others]
        record = {"comparison": shown(asdict(self.comparison)), "runs": shown(records)}
        models: dict[str, Run] = {}
        for run in runs:  # of a method that is also there off the shelf, which is as fast, the trained one
            models.setdefault(name_of(run.method, run.budget), run)
        record |= self.measured(models, records)
        write_json(self.output_dir / RECORD, record)
        write_file(self.output_dir / TABLE, comparison_table(record) + "\n")
        if find_spec("matplotlib") is not None:
            with replacing(self.output_dir / PICTURE) as draft:
                plot_tradeoff(tradeoff_curves(record)).savefig(draft, dpi=110, format="png")
        return record

    # Which runs there are

    def unpruned(self, seed: int) -> Run:
        """The run that the others are compared with."""
        return Run(UNPRUNED, None, seed, True, {"token_reducer": "none"})

    def others(self, seed: int) -> Iterator[Run]:
        """All other runs of a seed; budgets are shares of what the unpruned model costs."""
        comparison, none = self.comparison, {"token_reducer": "none"}
        unpruned = CroprViTConfig.from_pretrained(self.folder(self.unpruned(seed)) / "model")
        for budget, given in comparison.budgets.items():
            for method, own in comparison.methods.items():
                reducer, arguments = comparison.reducer(method), comparison.pruned | own
                given_too = comparison.arguments | arguments
                fields_too = {name: given_too[name] for name in FIELDS if name in given_too}
                pruning = {"token_reducer": reducer, **fields_too, **pruning_of(unpruned, reducer, given, fields_too)}
                yield Run(method, budget, seed, True, arguments | pruning)
                if comparison.off_the_shelf and not TOKEN_REDUCERS[reducer].learns:
                    yield Run(method, budget, seed, False, pruning)
                if method == next(iter(comparison.methods)):
                    size = smaller_image(_pruned_config(unpruned, pruning)).input_size[0]
                    yield Run(SMALLER_IMAGE, budget, seed, True, none | {"image_size": size})
        if comparison.smaller_model is not None:
            yield Run(SMALLER_MODEL, None, seed, True, none | {"model_name_or_path": comparison.smaller_model})

    # One run

    def finished(self, run: Run) -> dict[str, Any]:
        """The record of a run, which is trained and evaluated if that is not done."""
        comparison, folder = self.comparison, self.folder(run)
        arguments = comparison.arguments | run.arguments if run.trained else run.arguments
        command = {"train": comparison.train, "arguments": arguments, "evaluate": comparison.evaluate}
        command |= {"evaluation": comparison.evaluation, "data": data_of(arguments, comparison.evaluation)}
        done = folder / "run.json"
        if done.exists():
            record = json.loads(done.read_text(encoding="utf-8"))
            check_same(record["command"], json.loads(json.dumps(command)), folder)
            if "picture" in self.form(run) and not (folder / PICTURE_NAME).exists():  # asked for since
                self.evaluated(run, self.form(run), "evaluate.log")
        else:
            record = self.trained(run) | {"command": command}
            write_json(done, record)
        if comparison.exported and run.seed == comparison.seeds[0] and "file" not in record:
            record["file"] = self.exported(run)
            write_json(done, record)
        return record

    def trained(self, run: Run) -> dict[str, Any]:
        """Trains a run, unless it is one off the shelf, and evaluates it."""
        comparison, folder = self.comparison, self.folder(run)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.model(run)
        record: dict[str, Any] = {"method": run.method, "budget": run.budget, "seed": run.seed, "trained": run.trained}
        if run.trained:
            settings = comparison.arguments | run.arguments | {"seed": run.seed, "output_dir": str(model)}
            call(comparison.train, settings, folder / "train.log")
            record |= training_of(model)
        found = self.evaluated(run, self.form(run), "evaluate.log")
        record["metrics"] = metrics = {name: value for name, value in found.items() if name not in MEANS}
        record |= {"counts": means} if (means := {name: found[name] for name in MEANS if name in found}) else {}
        missing = [name for name in comparison.metrics if name not in metrics]
        if missing or not metrics:
            raise ValueError(
                f"{comparison.evaluate} printed {', '.join(metrics) or 'no number'} for {run.name}, and not "
                f"{', '.join(missing) or 'a JSON object in its last line'}; correct `metrics` or `evaluation`."
            )
        return record

    def form(self, run: Run) -> dict[str, Any]:
        """Arguments of the evaluation script: what is changed off the shelf, and where the picture goes."""
        changes = {} if run.trained else dict(run.arguments)
        if self.comparison.pictures and run.seed == self.comparison.seeds[0] and run.prunes:
            changes["picture"] = str(self.folder(run) / PICTURE_NAME)
        return changes

    def evaluated(self, run: Run, changes: Mapping[str, Any], log: str) -> dict[str, float]:
        """What the evaluation script finds, with arguments that are changed."""
        settings = self.comparison.evaluation | dict(changes) | {"model_name_or_path": str(self.model(run))}
        return numbers_in(call(self.comparison.evaluate, settings, self.folder(run) / log))

    def exported(self, run: Run) -> dict[str, Any]:
        """Writes the model of a run as ONNX; the metrics of that file, or why there is none."""
        file = self.folder(run) / ONNX_NAME
        try:
            export_model(self.load(run), file)
        except (ValueError, RuntimeError) as error:  # what draws by chance, and what ONNX has no operator for
            return {"error": shown(str(error).partition("\n")[0])}
        return {"metrics": self.evaluated(run, {"exported": str(file)}, "evaluate_file.log")}

    def folder(self, run: Run) -> Path:
        """Where a run is."""
        return self.output_dir / "runs" / run.name

    def model(self, run: Run) -> Path:
        """Where its model is: off the shelf it is the unpruned one of that seed."""
        return self.folder(run if run.trained else self.unpruned(run.seed)) / "model"

    # Speed

    def measured(self, runs: Mapping[str, Run], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The sections `machine`, `versions`, `models` and `speed` of the record, given those of all runs.

        The times of a type and a batch size are of one process, where models take turns, so that all are loaded
        first. Those that are there are kept if machine, versions, models and which of them have an ONNX file are the
        same; else all are taken anew.
        """
        speed, device = self.comparison.speed, parse_device(self.comparison.speed.device)
        facts = {"machine": machine_name(device), "versions": library_versions(), "settings": asdict(speed)}
        models = {name: self.load(run) for name, run in runs.items()}
        facts["models"] = {name: facts_of(models[name], counts_of(run, records)) for name, run in runs.items()}
        files = {name: self.folder(run) / ONNX_NAME for name, run in runs.items() if self.comparison.exported}
        files = {name: path for name, path in files.items() if path.exists()}
        facts["exported"] = [*files]
        file = self.output_dir / "speed.json"
        stored = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if {name: stored.get(name) for name in facts} != json.loads(json.dumps(facts)):
            stored = {**facts, "speed": []}
        settings = list(itertools.product(speed.dtypes, speed.batch_sizes))
        for dtype, batch_size in settings[len(stored["speed"]) :]:
            stored["speed"].append(self.timed(models, files, dtype, batch_size))
            write_json(file, stored)
        return {name: stored[name] for name in ("machine", "versions", "models", "speed")}

    def timed(
        self, models: Mapping[str, Any], files: Mapping[str, Path], dtype: str, batch_size: int
    ) -> dict[str, Any]:
        """Images per second of all models, and how much faster than the unpruned one each is, in one process.

        Their weights are rounded to the type and stay so, which changes no time.
        """
        speed = self.comparison.speed
        calls: dict[str, Callable[[], Any]] = {}
        torch.compiler.reset()
        for name, model in models.items():
            model.to(speed.device, getattr(torch, dtype))
            shape = (batch_size, model.config.num_channels, *model.config.input_size)
            pixel_values = torch.randn(shape, device=speed.device, dtype=model.dtype)
            calls[name] = partial(model, pixel_values)
            if speed.compiled:
                is_detector = find_task(type(model).__name__)[1].is_detector  # type: ignore[index]
                calls[f"{name}, {COMPILED}"] = partial(compiled(model, is_detector), pixel_values)
            if dtype == "float32" and name in files:
                calls[f"{name}, {ONNX}"] = onnx_call(files[name], pixel_values)
        # All models run the same code, of which torch compiles 8 variants if nobody asks for more; what is beyond them
        # in a detector would run eagerly
        limit = max(torch._dynamo.config.recompile_limit, VARIANTS * len(models))
        with torch.inference_mode(), torch._dynamo.config.patch(recompile_limit=limit):
            timings = compare(
                calls, UNPRUNED, speed.min_rounds, speed.max_rounds, speed.tolerance, torch.device(speed.device)
            )
        results = {
            name: {"images_per_second": batch_size / each.median, "speedup": each.speedup, "spread": each.spread}
            for name, each in timings.items()
        }
        return {"dtype": dtype, "batch_size": batch_size, "results": results}

    def load(self, run: Run) -> Any:
        """The model of a run, stripped."""
        folder = self.model(run)
        changes = {} if run.trained else {"pruning_rate": None, "pruning_schedule": None, **run.arguments}
        task = find_task((CroprViTConfig.from_pretrained(folder).architectures or [""])[0])
        if task is None:
            raise ValueError(f"{folder} holds no `CroprViT*` model; `train` must write one.")
        return task[1].model_class.from_pretrained(folder, use_auxiliary_heads=False, **changes).eval()


def facts_of(model: Any, counts: Mapping[str, float]) -> dict[str, Any]:
    """What is to be known about a model besides its times.

    Where images have unlike numbers of patches it is what `counts` say of the mean image, and by how much its cost
    misses that of the schedule, which meets the budget.
    """
    config = model.config
    with torch.no_grad():
        head = head_multiply_adds(model, {"pixel_values": torch.zeros(1, 3, *config.input_size)})
    facts: dict[str, Any] = {
        "patches": config.num_patches,
        "patches_left": config.kept_patches()[-1] if config.token_reducer else config.num_patches,
        "multiply_adds": multiply_adds(config) + head,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    if counts:
        meant, found = facts["multiply_adds"], counts[MULTIPLY_ADDS] + head
        facts |= {"patches_left": counts[PATCHES_LEFT], "multiply_adds": found, "share_of_budget": found / meant}
    return facts


def counts_of(run: Run, records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over the seeds of what the evaluations of a model say about the mean image, if they do."""
    own = [record for record in records if all(record[name] == getattr(run, name) for name in MODEL)]
    if any("counts" not in record for record in own):
        return {}
    return {name: statistics.mean(record["counts"][name] for record in own) for name in MEANS}


def name_of(method: str, budget: str | None) -> str:
    """What a row is called."""
    return method if budget is None else f"{method}, {budget}"


def _pruned_config(unpruned: CroprViTConfig, pruning: Mapping[str, Any]) -> CroprViTConfig:
    return CroprViTConfig(**unpruned.to_dict() | {"pruning_rate": None, "pruning_schedule": None} | dict(pruning))


def pruning_of(
    unpruned: CroprViTConfig, method: str, budget: Mapping[str, Any], fields: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments by which a method meets a budget in multiply-adds.

    A share is one of the unpruned model's, a rate or a schedule stands for what a random pruner costs with it. If the
    method costs as much with the same numbers, it gets them; else a schedule that prunes more or less by the same
    factor everywhere, or the rate that comes nearest, whichever does.

    Args:
        unpruned: configuration of the unpruned model.
        method: by name.
        budget: one of `BUDGETS`.
        fields: others of the configuration, for which it is.

    Raises:
        `ValueError`: when nothing that the method can do comes within `TOLERANCE` of it.
    """

    def cost(pruning: Mapping[str, Any]) -> float:
        try:
            return multiply_adds(_pruned_config(unpruned, {"token_reducer": method, **fields, **pruning}))
        except ValueError:  # more than there is to remove, or not in this shape
            return math.inf

    def nearest(ways: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The one or two of ways that prune more and more, until it is impossible, between which the target lies."""
        possible = ways[: bisect_left(ways, True, key=lambda way: math.isinf(cost(way)))]
        above = bisect_left(possible, -target, key=lambda way: -cost(way))
        return possible[max(0, above - 1) : above + 1]

    def closest(ways: list[dict[str, Any]]) -> dict[str, Any] | None:
        return min(ways, key=lambda way: abs(cost(way) - target), default=None)

    ways = [] if SHARE in budget else [dict(budget)]
    if SHARE in budget:
        target = budget[SHARE] * multiply_adds(unpruned)
    else:
        fusion = {name: value for name, value in fields.items() if name == "last_layer_fusion"}
        target = multiply_adds(_pruned_config(unpruned, {"token_reducer": RandomReducer.name, **fusion, **budget}))
    if "pruning_schedule" in budget and abs(cost(budget) - target) > CLOSE * target:
        scaled = [_scaled(unpruned, budget["pruning_schedule"], percent / 100) for percent in PERCENT]
        ways += nearest([{"pruning_schedule": schedule} for schedule in scaled])
    best = closest(ways)
    if best is None or abs(cost(best) - target) > CLOSE * target:
        best = closest([*ways, *nearest([{"pruning_rate": rate} for rate in range(1, unpruned.num_patches)])])
    if best is None or abs(cost(best) - target) > TOLERANCE * target:
        left = "nothing" if best is None else f"{cost(best) / multiply_adds(unpruned):.0%}"
        raise ValueError(
            f"The budget leaves {target / multiply_adds(unpruned):.0%} of the multiply-adds, {method} can leave "
            f"{left} by {best}; give another budget, or a `pruning_schedule` that it can follow."
        )
    return best


def _scaled(unpruned: CroprViTConfig, schedule: Sequence[int], factor: float) -> list[int]:
    """A schedule that prunes `factor` times as many patches everywhere, and leaves one."""
    return [max(1, round(unpruned.num_patches - factor * (unpruned.num_patches - kept))) for kept in schedule]


# Scripts and what they leave


def check_script(script: str) -> None:
    """Raises `ValueError` for one that cannot be called from here."""
    name = shlex.split(script)[0]
    if not (Path(name).is_file() if name.endswith(".py") else shutil.which(name)):
        raise ValueError(
            f"There is no {name!r}; `train` and `evaluate` name scripts as they are called from {Path.cwd()}."
        )


def call(script: str, settings: Mapping[str, Any], log: Path) -> str:
    """Runs a script in a process of its own, and returns what it prints."""
    words = shlex.split(script)
    command = ([sys.executable] if words[0].endswith(".py") else []) + words
    for name, value in settings.items():
        if isinstance(value, list):
            command += [f"--{name}", *map(str, value)]
        elif value is not None:
            command.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    with open(log, "w", encoding="utf-8") as errors:
        process = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        errors.write(process.stdout)
    if process.returncode != 0:
        last = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()][-1:] or ["no output"]
        raise RuntimeError(
            f"{script} failed with exit code {process.returncode}; all that it said is in {log}: {last[0]}"
        )
    return process.stdout


def onnx_call(file: Path, pixel_values: torch.Tensor) -> Callable[[], Any]:
    """A call of ONNX Runtime, on the device of the pixels."""
    import onnxruntime

    on_gpu = pixel_values.device.type == "cuda"
    provider = "CUDAExecutionProvider" if on_gpu else "CPUExecutionProvider"
    session = onnxruntime.InferenceSession(file, providers=[provider])
    return partial(session.run, None, {"pixel_values": pixel_values.cpu().numpy()})


def numbers_in(printed: str) -> dict[str, float]:
    """The numbers in the JSON object of the last line; none where there is no such line."""
    try:
        found = json.loads((printed.strip().splitlines() or [""])[-1])
    except ValueError:
        return {}
    return {name: value for name, value in found.items() if isinstance(value, (int, float))}


def training_of(folder: Path) -> dict[str, Any]:
    """What the record of a training and the last line of its log say."""
    known = read_record(folder).get("training", {})
    names = ("dataset", "num_examples", "num_steps", "minutes", "machine", "versions", "commit")
    facts = {name: known[name] for name in names if name in known}
    state = folder / TRAINER_STATE_NAME
    history = json.loads(state.read_text(encoding="utf-8"))["log_history"] if state.exists() else []
    last: dict[str, Any] = next((entry for entry in reversed(history) if "loss" in entry), {})
    losses = {name: float(value) for name, value in last.items() if name.endswith("loss") or "_loss_" in name}
    return {"training": facts, "losses": losses}


def data_of(*settings: Mapping[str, Any]) -> dict[str, Any]:
    """Files and bytes in the folders that settings name: other pictures under the same name are other data."""
    values = {name: value for group in settings for name, value in group.items()}
    return {
        name: _folder_size(value) for name, value in values.items() if isinstance(value, str) and Path(value).is_dir()
    }


@cache  # each run asks
def _folder_size(folder: str) -> dict[str, int]:
    sizes = [file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()]
    return {"files": len(sizes), "bytes": sum(sizes)}


def check_same(stored: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Raises `ValueError` when a run in a folder is not the one that is wanted."""
    changed = [name for name in wanted if stored.get(name) != wanted[name]]
    for name in changed:
        before, now = stored.get(name), wanted[name]
        if isinstance(before, dict):
            parts = [part for part in {**before, **now} if before.get(part) != now.get(part)]
            before, now = ({part: each.get(part) for part in parts} for each in (before, now))
        raise ValueError(
            f"{folder} has a run with another `{name}`: {before}, now {now}. Choose another output folder, or remove "
            "that one to train anew."
        )


def check_alike(records: Sequence[Mapping[str, Any]]) -> None:
    """Raises `ValueError` when trainings saw unlike data, so that their metrics cannot be compared."""
    seen: dict[str, Any] = {}
    for record in records:
        training = record.get("training", {})
        for name in ("dataset", "num_examples"):
            first = seen.setdefault(name, training.get(name)) if name in training else None
            if name in training and training[name] != first:
                raise ValueError(
                    f"The run of {record['method']} with seed {record['seed']} was trained on {training[name]} "
                    f"({name}), others on {first}; compare trainings on the same data."
                )


def shown(value: Any) -> Any:
    """A copy in which local folders and files go by their names, without commands that were run."""
    if isinstance(value, Mapping):
        return {name: shown(each) for name, each in value.items() if name != "command"}
    if isinstance(value, (list, tuple)):
        return [shown(each) for each in value]
    return source_name(value) if isinstance(value, str) and (os.path.isabs(value) or Path(value).is_dir()) else value


# Tables and pictures


def comparison_table(record: Mapping[str, Any]) -> str:
    """The record as a Markdown table: a row per model; metrics of trained and untrained methods in columns apart."""
    runs, metrics = record["runs"], record["comparison"]["metrics"] or list(record["runs"][0]["metrics"])
    kinds = {True: "", False: ", off the shelf"} if any(not run["trained"] for run in runs) else {True: ""}
    columns = ["model", "patches left", "G multiply-adds"]
    columns += [f"{metric.replace('_', ' ')}{title}, %" for title in kinds.values() for metric in metrics]
    files = [f"{metrics[0].replace('_', ' ')} of the {ONNX} file, %"] if record["comparison"]["exported"] else []
    columns += files
    for setting in record["speed"]:
        columns.append(f"speed-up, {setting['dtype']}, batch {setting['batch_size']}")
        columns += [kind for kind in (COMPILED, ONNX) if f"{UNPRUNED}, {kind}" in setting["results"]]
    rows = []
    for name, facts in record["models"].items():
        own = [run for run in runs if name_of(run["method"], run["budget"]) == name]
        cells = [
            title_of(name),
            f"{round(facts['patches_left'], 1)} of {facts['patches']}",
            f"{facts['multiply_adds'] / 1e9:.2f}",
        ]
        for trained in kinds:
            for metric in metrics:
                cells.append(mean_and_deviation([run["metrics"][metric] for run in own if run["trained"] == trained]))
        if files:
            found = next((run["file"].get("metrics") for run in own if run["trained"] and "file" in run), None)
            cells.append("–" if found is None else f"{100 * found[metrics[0]]:.1f}")
        for setting in record["speed"]:
            results = setting["results"]
            for kind in ("", f", {COMPILED}", f", {ONNX}"):
                if UNPRUNED + kind in results:
                    result = results.get(name + kind)
                    cells.append("–" if result is None else f"{result['speedup']:.2f} ± {result['spread']:.2f}")
        rows.append(cells)
    return f"{markdown_table(columns, rows)}\n\n{circumstances(record)}"


def title_of(name: str) -> str:
    """What people call a method, with its budget."""
    method, comma, budget = name.partition(", ")
    return (TOKEN_REDUCERS[method].label if method in TOKEN_REDUCERS else method) + comma + budget


def mean_and_deviation(values: Sequence[float]) -> str:
    """Of shares, in percent; the standard deviation is that of the seeds."""
    if not values:
        return "–"
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def circumstances(record: Mapping[str, Any]) -> str:
    """On what it was trained, how often, and where times were taken."""
    trainings = [run["training"] for run in record["runs"] if run["trained"]]
    seeds, images = len(record["comparison"]["seeds"]), trainings[0].get("num_examples")
    where = ", ".join(dict.fromkeys(each.get("machine", "an unknown machine") for each in trainings))
    versions = ", ".join(f"{name} {record['versions'][name].split('+')[0]}" for name in ("torch", "transformers"))
    return (
        f"*{'One seed' if seeds == 1 else f'Mean and standard deviation of {seeds} seeds'}; {images} training images, "
        f"{trainings[0].get('num_steps')} steps, on {where}. Speed-ups are over the unpruned model as it is, in turns "
        f"in one process: {record['machine']}, {versions}.{about_mean_images(record['models'])}*"
    )


def about_mean_images(models: Mapping[str, Mapping[str, Any]]) -> str:
    """What is to be known about the rows of methods whose images have unlike numbers of patches, if there are such."""
    shares = {title_of(name): facts["share_of_budget"] for name, facts in models.items() if "share_of_budget" in facts}
    if not shares:
        return ""
    text = (
        f" Of {', '.join(shares)} patches and multiply-adds are those of the mean image of the evaluation; times are "
        "those of noise, whose numbers of patches are others."
    )
    missed = [f"{title} by {share - 1:+.0%}" for title, share in shares.items() if abs(share - 1) > TOLERANCE]
    return text + (f" The budget is missed, in multiply-adds: {', '.join(missed)}." if missed else "")


def tradeoff_curves(record: Mapping[str, Any], setting: int = -1) -> dict[str, list[dict[str, Any]]]:
    """Points for `cropr_hf.plot_tradeoff`: a curve per method, trained and off the shelf, and one per reference.

    Args:
        record: of a comparison.
        setting: index of the setting of speed; the last by default.
    """
    runs, results = record["runs"], record["speed"][setting]["results"]
    metrics = record["comparison"]["metrics"] or list(runs[0]["metrics"])
    curves: dict[str, list[dict[str, Any]]] = {}
    for name in record["models"]:
        for trained in (True, False):
            own = [run for run in runs if name_of(run["method"], run["budget"]) == name and run["trained"] == trained]
            if own:
                title = title_of(own[0]["method"]) + ("" if trained else ", off the shelf")
                means = {metric: statistics.mean(run["metrics"][metric] for run in own) for metric in metrics[:1]}
                curves.setdefault(title, []).append({**results[name], "metrics": means})
    return curves
