"""Records of the benchmark as Markdown tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..token_reduction import TOKEN_REDUCERS
from .alternatives import ALTERNATIVES
from .benchmark import RANDOM, UNPRUNED
from .counts import PATCHES_LEFT


TIMING_COLUMNS = ("images/s", "speed-up", "± half IQR", "p50 ms", "p99 ms")


def label(record: dict[str, Any]) -> str:
    """How tables and pictures call the method of a record."""
    name = record["token_reducer"]
    return TOKEN_REDUCERS[name].label if name in TOKEN_REDUCERS else name


def giga(record: dict[str, Any], name: str) -> str:
    """10⁹ multiply-adds per image of a model in a record; empty where they were not counted."""
    counts = record["multiply_adds"].get(name)
    return "" if counts is None else f"{sum(counts.values()) / 1e9:.1f}"


def format_table(record: dict[str, Any]) -> str:
    """The results of `run` as a Markdown table, and what bounds them."""
    training = record["arguments"]["training"]
    columns = ["model", "G multiply-adds", *TIMING_COLUMNS, "peak memory"]
    columns += ["parameters", "saved for backward"] if training else []
    rows = []
    for name, row in record["results"].items():
        what = record.get("alternatives", {}).get(name)
        cells = [name if what is None else f"{name} ({what})", giga(record, name)]
        cells += [*_timing_cells(row), f"{row['peak_memory'] / 2**20:.0f} MiB"]
        if training:
            cells += [f"{row['parameters'] / 1e6:.0f} M", f"{row['saved_activations'] / 2**30:.2f} GiB"]
        rows.append(cells)
    bound = f"multiply-add bound of inference {record['multiply_add_bound']:.2f} (linear layers alone "
    bound += f"{record['linear_bound']:.2f})"
    if not training:
        bound += f", of which {label(record)} reaches {record['share_of_bound']:.2f}"
    lines = [markdown_table(columns, rows), "", bound]
    if record["share_of_random"] is not None:
        share, spread = record["share_of_random"]
        lines.append(f"{share:.3f} ± {spread:.3f} of the random pruner's throughput")
    if PATCHES_LEFT in record:
        lines.append(
            f"the images are noise, of which {label(record)} left {record[PATCHES_LEFT]:.4g} patches in the mean; its "
            f"multiply-adds are by these, and the random pruner left {record['patches_kept'][-1]}, by the schedule"
        )
    lines.append(
        f"{record['rounds']} rounds; {record['machine']}; torch {record['versions']['torch']}, transformers "
        f"{record['versions']['transformers']}"
    )
    if "operations" in record:
        lines += ["", _format_operations(record)]
    return "\n".join(lines)


def format_files(record: dict[str, Any]) -> str:
    """The results of `compare_files` as a Markdown table."""
    rows = [
        [f"{row['name']} ({name})", *_timing_cells(row), f"{row['bytes'] / 1e6:.2f} MB"]
        for name, row in record["results"].items()
    ]
    circumstances = (
        f"{record['rounds']} rounds of {record['batch_size']} images; {record['machine']}; ONNX Runtime "
        f"{record['versions']['onnxruntime']}"
    )
    return "\n".join([markdown_table(["file", *TIMING_COLUMNS, "size"], rows), "", circumstances])


def _timing_cells(row: Mapping[str, Any]) -> list[str]:
    """What `Timing.record` says, under `TIMING_COLUMNS`."""
    return [
        f"{row['images_per_second']:.2f}",
        f"{row['speedup']:.2f}",
        f"{row['spread']:.3f}",
        f"{row['p50_ms']:.1f}",
        "" if row["p99_ms"] is None else f"{row['p99_ms']:.1f}",
    ]


def format_sweep(records: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """The results of `sweep` as a Markdown table, a row per run; `names` are the arguments that differ."""
    labels = list(dict.fromkeys(map(label, records)))
    method = labels[0] if len(labels) == 1 else "pruned"
    columns = [
        "unpruned images/s",
        f"{method} images/s",
        "speed-up",
        "± half IQR",
        "random",
        "bound",
        "share of bound",
    ]
    columns += ["share of random", "p50 ms", "p99 ms", "peak memory"]
    others = [name for name in ALTERNATIVES if any(name in record["results"] for record in records)]
    columns += others
    rows = []
    for record in records:
        results = record["results"]
        unpruned, own, chance = (results[name] for name in (UNPRUNED, record["token_reducer"], RANDOM))
        both = (unpruned, own)
        share = record["share_of_random"]
        p99 = " → ".join("–" if row["p99_ms"] is None else f"{row['p99_ms']:.1f}" for row in both)
        rows.append(
            [
                *(str(record["arguments"][name]) for name in names),
                *(f"{row['images_per_second']:.2f}" for row in both),
                f"{own['speedup']:.2f}",
                f"{own['spread']:.3f}",
                f"{chance['speedup']:.2f}",
                f"{record['multiply_add_bound']:.2f}",
                "–" if record["share_of_bound"] is None else f"{record['share_of_bound']:.2f}",
                "–" if share is None else f"{share[0]:.3f} ± {share[1]:.3f}",
                " → ".join(f"{row['p50_ms']:.1f}" for row in both),
                p99,
                " → ".join(f"{row['peak_memory'] / 2**20:.0f}" for row in both) + " MiB",
                *(
                    f"{results[name]['speedup']:.2f} ({giga(record, name)} G)" if name in results else "–"
                    for name in others
                ),
            ]
        )
    return markdown_table([*names, *columns], rows, len(names))


def _format_operations(record: dict[str, Any], count: int = 12) -> str:
    """The longest operations of the unpruned model and of the method, and the rest in one row."""
    unpruned, own = (record["operations"][name] for name in (UNPRUNED, record["token_reducer"]))
    nothing = {"ms": 0.0, "calls": 0.0}

    def longest_time(name: str) -> float:
        return max(times.get(name, nothing)["ms"] for times in (unpruned, own))

    longest = sorted(unpruned | own, key=longest_time, reverse=True)
    rows = []
    for name in longest[:count]:
        cells = [name]
        for times in (unpruned, own):
            row = times.get(name, nothing)
            cells += [f"{row['ms']:.2f}", f"{row['calls']:.0f}"]
        rows.append(cells)
    rest = [
        (sum(times[name]["ms"] for name in names), sum(times[name]["calls"] for name in names))
        for times in (unpruned, own)
        for names in [times.keys() - set(longest[:count])]
    ]
    rows.append(["others", *(cell for ms, calls in rest for cell in (f"{ms:.2f}", f"{calls:.0f}"))])
    return markdown_table(["operation", "unpruned ms", "calls", f"{label(record)} ms", "calls"], rows)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], num_names: int = 1) -> str:
    """A table whose first `num_names` columns are names, and the others numbers."""
    alignment = ["---"] * num_names + ["---:"] * (len(columns) - num_names)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, alignment, *rows))
