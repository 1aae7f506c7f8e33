"""Pictures of what pruning costs and gains."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..visualization import figure_class
from .alternatives import ALTERNATIVES
from .benchmark import RANDOM, UNPRUNED
from .tables import label


if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPEEDS = {"speedup": "speed-up over the unpruned model", "images_per_second": "images/s"}


def plot_tradeoff(
    curves: Mapping[str, Sequence[Mapping[str, Any]]], metric: str | None = None, speed: str = "speedup"
) -> "Figure":
    """What a metric costs in speed, or the reverse: one line per curve through its points, from slow to fast.

    Args:
        curves: name -> points as `cropr_hf.evaluate_schedules` returns them in `points`, or chosen from several of its
            records.
        metric: name of the metric; may be left out where there is only one.
        speed: "speedup", drawn with its spread, or "images_per_second".

    Returns:
        A matplotlib figure; `figure.savefig("tradeoff.png")` writes it.

    Raises:
        `ImportError`: without matplotlib (`pip install cropr_hf[viz]`).
        `ValueError`: without points, for another `speed`, and for a metric that is not given or not in every point.
    """
    figure_type = figure_class()
    if not curves or not all(curves.values()):
        raise ValueError(f"The curves {list(curves)} need a name and at least one point each; leave empty ones out.")
    if speed not in SPEEDS:
        raise ValueError(f"`speed` is {speed!r}; choose one of {', '.join(SPEEDS)}.")
    metrics = [list(point["metrics"]) for points in curves.values() for point in points]
    if metric is None and len(metrics[0]) == 1:
        metric = metrics[0][0]
    if not all(metric in names for names in metrics):
        raise ValueError(f"`metric` is {metric!r}; choose one that every point has, such as {', '.join(metrics[0])}.")
    figure = figure_type(figsize=(5.5, 3.8), layout="constrained")
    axis = figure.subplots()
    for name, points in curves.items():
        points = sorted(points, key=lambda point: point[speed])
        spreads = [point["spread"] for point in points] if speed == "speedup" else None
        axis.errorbar(
            [point[speed] for point in points],
            [point["metrics"][metric] for point in points],
            xerr=spreads,
            marker="o",
            markersize=4,
            capsize=2,
            label=name,
        )
    axis.set_xlabel(SPEEDS[speed])
    axis.set_ylabel(str(metric))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def plot_benchmark(records: Sequence[dict[str, Any]], names: Sequence[str] = ()) -> "Figure":
    """Speed-ups of a method, of a random pruner and of alternatives, with the multiply-add bound of each setting.

    Args:
        records: what `cropr_hf.speed.benchmark.run` or `sweep` returns, one group of bars each.
        names: arguments whose values name the groups.

    Returns:
        A matplotlib figure.

    Raises:
        `ValueError`: without records.
        `ImportError`: without matplotlib (`pip install cropr_hf[viz]`).
    """
    figure_type = figure_class()
    if not records:
        raise ValueError("There are no records to draw; give at least one.")
    figure = figure_type(figsize=(max(4.0, 1.1 * len(records) + 2), 3.6), layout="constrained")
    axis = figure.subplots()
    places = np.arange(len(records))
    groups = {
        ", ".join(dict.fromkeys(map(label, records))): ("tab:blue", [record["token_reducer"] for record in records]),
        "random pruner": ("tab:grey", [RANDOM] * len(records)),
    }
    for name, colour in zip(ALTERNATIVES, ("tab:green", "tab:orange", "tab:red", "tab:purple")):
        if any(name in record["results"] for record in records):
            groups[name] = (colour, [name] * len(records))
    width = 0.8 / len(groups)
    missing = {"speedup": math.nan, "spread": math.nan}
    for index, (name, (colour, candidates)) in enumerate(groups.items()):
        rows = [record["results"].get(candidate, missing) for record, candidate in zip(records, candidates)]
        heights, errors = ([row[key] for row in rows] for key in ("speedup", "spread"))
        axis.bar(places + (index + 0.5) * width - 0.4, heights, width, yerr=errors, label=name, color=colour)
    # Training steps have no bound here.
    bounds = [math.nan if record["arguments"]["training"] else record["multiply_add_bound"] for record in records]
    axis.hlines(bounds, places - 0.42, places + 0.42, colors="black", label="multiply-add bound")
    texts = ["\n".join(str(record["arguments"][name]) for name in names) for record in records]
    axis.set_xticks(places, texts)
    if names:
        axis.set_xlabel(", ".join(names))
    axis.set_ylabel("speed-up over the unpruned model")
    axis.set_ylim(bottom=0)
    axis.legend(loc="lower right")
    return figure


def plot_cost(records: Sequence[dict[str, Any]]) -> "Figure":
    """Measured time against tokens, with the time that the multiply-adds predict beside it, on two logarithmic axes.

    The prediction has one free number: multiply-adds per second, the median over the points of the unpruned model.

    Args:
        records: of `cropr_hf.speed.benchmark.run` at several image sizes, of one model and machine.

    Returns:
        A matplotlib figure.

    Raises:
        `ValueError`: for fewer than two records.
        `ImportError`: without matplotlib (`pip install cropr_hf[viz]`).
    """
    figure_type = figure_class()
    if len(records) < 2:
        raise ValueError(f"There are {len(records)} records; a curve needs two image sizes or more.")
    figure = figure_type(figsize=(5.6, 4.0), layout="constrained")
    axis = figure.subplots()
    records = sorted(records, key=lambda record: record["multiply_adds"][UNPRUNED]["linear"])
    tokens = [record["patches"] for record in records]

    def seconds(record: dict[str, Any], name: str) -> float:
        return 1 / record["results"][name]["images_per_second"]

    def cost(record: dict[str, Any], name: str) -> int:
        return sum(record["multiply_adds"][name].values())

    speed = np.median([cost(record, UNPRUNED) / seconds(record, UNPRUNED) for record in records])
    own = records[0]["token_reducer"]
    for name, title, colour in ((UNPRUNED, UNPRUNED, "tab:grey"), (own, label(records[0]), "tab:blue")):
        axis.plot(tokens, [seconds(record, name) for record in records], "o", color=colour, label=f"{title}, measured")
        predicted = [cost(record, name) / speed for record in records]
        axis.plot(tokens, predicted, "-", color=colour, label=f"{title}, multiply-adds at {speed / 1e9:.0f} G/s")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(tokens, [str(count) for count in tokens])
    axis.minorticks_off()
    axis.set_xlabel("patch tokens of the image")
    axis.set_ylabel("seconds per image")
    axis.legend()
    return figure
