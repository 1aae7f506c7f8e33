"""Writes the tables of README and pages, and the pictures about speed, from the records in docs/speed, docs/demos and
docs/comparisons (`make pages`).
"""

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from cropr_hf.comparison import comparison_table, mean_and_deviation
from cropr_hf.speed.alternatives import ALTERNATIVES
from cropr_hf.speed.benchmark import RANDOM, UNPRUNED
from cropr_hf.speed.plots import plot_benchmark, plot_cost
from cropr_hf.speed.tables import format_sweep, giga, markdown_table


DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT / "examples"))
import any_speed  # noqa: E402
import demo  # noqa: E402
import five_tasks  # noqa: E402


REFERENCES = ("transformers ViT", "timm")
LINEAR = ("addmm", "mm", "mkl_linear", "mkldnn_linear")
# `cat` puts the pruned tokens back; that of the prefix is too short to be in the records.
PRUNING = ("sort", "nan_to_num", "index_select", "addmv_", "constant_pad_nd", "arange", "cat")


def ratio(timing: dict[str, float]) -> str:
    """A speed-up with its spread."""
    return f"{timing['speedup']:.2f} ± {timing['spread']:.2f}"


def faster_than(record: dict[str, Any], reference: str) -> str:
    """How much faster this code's unpruned model is than another library's; empty where it was not measured."""
    result = record["results"].get(reference)
    return "" if result is None else f"{1 / result['speedup']:.3f} ± {result['spread'] / result['speedup'] ** 2:.3f}"


def references_table(records: list[dict[str, Any]]) -> str:
    """The unpruned model against those of other libraries, where they were measured."""
    rows = []
    for record in records:
        against = [faster_than(record, name) for name in REFERENCES]
        if any(against):
            setting = (record["arguments"][name] for name in ("size", "dtype", "batch_size"))
            own = record["results"][UNPRUNED]
            rows.append([", ".join(map(str, setting)), f"{own['p50_ms']:.1f}", *against])
    return markdown_table(["size, type, batch", "unpruned, ms", "against Transformers' ViT", "against timm"], rows)


def targets_table(records: list[dict[str, Any]]) -> str:
    """Speed against each yardstick; above 1.00, Cropr's code is the faster one."""
    columns = ["", "batch", "unpruned, images/s", "Cropr, speed-up", "bound (linear layers alone)", "share of bound"]
    columns += ["share of random", "unpruned against Transformers' ViT", "against timm"]
    rows = []
    for record in records:
        arguments, results = record["arguments"], record["results"]
        config = json.loads(arguments["config"])
        setting = f"{arguments['size']} {arguments['image_size'] or 224} px, R = {arguments['pruning_rate']}"
        setting += ", without fusion" if config.get("last_layer_fusion") is False else ""
        setting += ", training step" if arguments["training"] else ""
        references = [faster_than(record, name) for name in REFERENCES]
        cells = [
            setting,
            str(arguments["batch_size"]),
            f"{results[UNPRUNED]['images_per_second']:.2f}",
            ratio(results["cropr"]),
            # In training the auxiliary heads cost time that the count does not have.
            "" if arguments["training"] else f"{record['multiply_add_bound']:.2f} ({record['linear_bound']:.2f})",
            "" if arguments["training"] else f"{record['share_of_bound']:.2f}",
            f"{record['share_of_random'][0]:.3f} ± {record['share_of_random'][1]:.3f}",
            *references,
        ]
        rows.append(cells)
    return markdown_table(columns, rows)


def profile_table(records: list[dict[str, Any]]) -> str:
    """How fast the parts compute, unpruned → Cropr, in 10⁹ multiply-adds per second, and what else takes time."""
    columns = ["size, pixels, type, batch", "share of bound", "linear layers, G/s", "attention, G/s"]
    columns += ["other operations", "pruning itself"]
    rows = []
    for record in records:
        arguments = record["arguments"]
        speeds, others, pruning = {"linear": [], "attention": []}, [], 0.0
        for name in (UNPRUNED, "cropr"):
            times = {operation: row["ms"] for operation, row in record["operations"][name].items()}
            total = sum(times.values())
            spent = {
                "linear": sum(times.get(operation, 0.0) for operation in (*LINEAR, "mkldnn_convolution")),
                "attention": sum(ms for operation, ms in times.items() if "attention" in operation),
            }
            for part, ms in spent.items():
                count = record["multiply_adds"][name][part] * arguments["batch_size"]
                speeds[part].append(f"{count / ms / 1e6:.0f}")
            pruning = sum(times.get(operation, 0.0) for operation in PRUNING) / total
            others.append(f"{1 - sum(spent.values()) / total - (pruning if name == 'cropr' else 0):.1%}")
        setting = (arguments["size"], arguments["image_size"], arguments["dtype"], arguments["batch_size"])
        cells = [", ".join(map(str, setting)), f"{record['share_of_bound']:.2f}"]
        cells += [" → ".join(speeds["linear"]), " → ".join(speeds["attention"]), " → ".join(others), f"{pruning:.1%}"]
        rows.append(cells)
    return markdown_table(columns, rows)


def cost_table(records: list[dict[str, Any]]) -> str:
    """Seconds against multiply-adds."""
    columns = ["pixels", "patches", "unpruned, s", "G multiply-adds", "G/s", "Cropr, s", "G multiply-adds", "G/s"]
    columns += ["speed-up", "bound"]
    rows = []
    for record in records:
        cells = [str(record["arguments"]["image_size"]), str(record["patches"])]
        for name in (UNPRUNED, "cropr"):
            seconds = 1 / record["results"][name]["images_per_second"]
            count = sum(record["multiply_adds"][name].values())
            cells += [f"{seconds:.3f}", f"{count / 1e9:.1f}", f"{count / seconds / 1e9:.0f}"]
        cells += [f"{record['results']['cropr']['speedup']:.2f}", f"{record['multiply_add_bound']:.2f}"]
        rows.append(cells)
    return markdown_table(columns, rows, num_names=0)


def blocks_table(records: list[dict[str, Any]], grid: list[dict[str, Any]]) -> str:
    """What a block costs however few its tokens are, what share of the bound that leaves, and what is reached."""
    reached = {
        tuple(record["arguments"][name] for name in ("size", "batch_size")): record["share_of_bound"]
        for record in grid
        if (record["arguments"]["image_size"], record["arguments"]["dtype"]) == (224, "float32")
    }
    columns = [
        "size, batch",
        "block with 2 tokens, ms",
        "with all 197, ms",
        "ratio",
        "bound at R",
        "share that is left",
        "Cropr's share",
    ]
    rows = []
    for record in records:
        times = record["block_ms"]["global"]
        few, every = times["1"], times["196"]
        bound = record["bound_of_grid"]
        cells = [f"{record['size']}, {record['batch_size']}", f"{few:.2f}", f"{every:.2f}", f"{few / every:.1%}"]
        # Time = fixed + per multiply-add; the fixed part does not shrink.
        own = reached[record["size"], record["batch_size"]]
        rows.append([*cells, f"{bound:.2f}", f"{1 / (1 + few / every * (bound - 1)):.2f}", f"{own:.2f}"])
    return markdown_table(columns, rows)


def limits_table(records: list[dict[str, Any]]) -> str:
    """Small work, with and without fusion."""
    columns = ["size, pixels, batch", "unpruned, ms", "speed-up", "bound", "speed-up without fusion", "bound"]
    rows: dict[str, list[str]] = {}
    for record in records:
        arguments, results = record["arguments"], record["results"]
        name = f"{arguments['size']}, {arguments['image_size']}, {arguments['batch_size']}"
        cells = rows.setdefault(name, [name, f"{results[UNPRUNED]['p50_ms']:.1f}"])  # with fusion first
        cells += [ratio(results["cropr"])]
        cells += [f"{record['multiply_add_bound']:.2f}"]
    return markdown_table(columns, list(rows.values()))


def aligned_table(records: list[dict[str, Any]]) -> str:
    """Schedules with token counts of any kind, and rounded up."""
    columns = ["type, tokens", "after block 1, 2, 3, ...", "multiply-adds, G", "speed-up", "G/s against any"]
    rows = []
    for record in records:
        first, *_ = points = record["points"]
        for multiple, point in zip(("any", "× 8", "× 16"), points):
            speeds = [each["images_per_second"] * each["multiply_adds"] for each in (point, first)]
            kept = ", ".join(str(count + 1) for count in point["kept_patches"][:3]) + ", ..."
            cells = [f"{record['dtype']}, {multiple}", kept, f"{point['multiply_adds'] / 1e9:.1f}"]
            rows.append([*cells, ratio(point), f"{speeds[0] / speeds[1]:.2f}"])
    return markdown_table(columns, rows)


def turns_table(records: list[dict[str, Any]], columns: list[str]) -> str:
    """Milliseconds per batch, and speed-ups over the unpruned model as it is."""
    rows = []
    for record in records:
        times = record["results"].values()
        cells = [f"{own['p50_ms']:.0f} ms ({ratio(own)})" for own in times]
        rows.append([record["setting"], *cells])
    return markdown_table(columns, rows)


def packed_table(records: list[dict[str, Any]]) -> str:
    """Speed-ups of SViT on images with unlike numbers of patches, and what the mean and the longest image allow."""
    columns = ["size, pixels, batch", "patches left, fewest to most", "unpruned, ms", "packed", "masked", "one by one"]
    columns += ["bound", "of the longest"]
    rows = []
    for record in records:
        left, results = record["patches_left"], record["results"]
        cells = [record["setting"], f"{min(left)} to {max(left)} of {record['patches']}"]
        cells += [f"{results[UNPRUNED]['p50_ms']:.0f}"]
        cells += [ratio(results[name]) for name in ("packed", "masked", "one by one")]
        rows.append([*cells, f"{record['bound']:.2f}", f"{record['bound_of_longest']:.2f}"])
    return markdown_table(columns, rows, num_names=2)


def budgets_table(records: list[dict[str, Any]]) -> str:
    """Schedules for a speed-up: predicted, measured with the search, and measured again."""
    columns = ["size, pixels, batch", "asked for", "shape", "patches left", "predicted", "measured", "again", "bound"]
    rows = []
    for record in records:
        found = {"speedup": record["measured_speedup"], "spread": record["spread"]}
        cells = [record["setting"], f"{record['target_speedup']:.1f}", f"`{record['shape']}`"]
        cells += [f"{record['schedule'][-1]} of {record['num_patches']}", f"{record['predicted_speedup']:.2f}"]
        rows.append([*cells, ratio(found), ratio(record["again"]), f"{record['bound']:.2f}"])
    return markdown_table(columns, rows, num_names=3)


def shapes_table(records: list[dict[str, Any]]) -> str:
    """Accuracy, and patches that are left after each block that prunes, by the speed-up and the shape."""
    rows: dict[str, dict[str, str]] = {}  # by the speed-up and the shape
    for record in records:
        column = f"`{record['shape']}`" + ", calibrated" * (record["calibrated"] and record["shape"] != "free")
        before = [record["schedule"][0], *record["schedule"]]
        kept = [str(count) if count < last else "–" for last, count in zip(before, record["schedule"])][1:4]
        cell = f"{record['accuracy']:.1%} ({', '.join(kept)})".replace("%", " %")
        rows.setdefault(f"{record['target_speedup']:.1f}", {})[column] = cell
    columns = list(next(iter(rows.values())))
    cells = [[target, *(row[column] for column in columns)] for target, row in rows.items()]
    return markdown_table(["asked for", *columns], cells, num_names=0)


def alternatives_table(records: list[dict[str, Any]]) -> str:
    """Speed-ups over the unpruned model, with multiply-adds; and where pruning is not the fastest."""
    columns = ["size, type, batch", UNPRUNED, "Cropr", *ALTERNATIVES]
    rows = []
    for record in records:
        arguments, results = record["arguments"], record["results"]
        cells = [f"{arguments['size']}, {arguments['dtype']}, {arguments['batch_size']}"]
        cells += [f"{results[UNPRUNED]['p50_ms']:.0f} ms ({giga(record, UNPRUNED)} G)"]
        for name in ("cropr", *ALTERNATIVES):
            what = (
                [record["alternatives"][name]]
                if name in ("smaller image", "smaller model") and name in results
                else []
            )
            details = ", ".join([*what, f"{giga(record, name)} G"])
            cells.append(f"{ratio(results[name])} ({details})" if name in results else "–")
        rows.append(cells)
    lines = [f"- *{name}*: {comparison(records, name)}" for name in ALTERNATIVES]
    first = records[0]
    where = f"{first['machine']}, torch {first['versions']['torch'].split('+')[0]}"
    return "\n".join([markdown_table(columns, rows), "", f"{where}. Against Cropr:", "", *lines])


def comparison(records: list[dict[str, Any]], name: str) -> str:
    """In how many settings an alternative is faster than Cropr, beyond the spreads of both, and in which."""
    faster, even, slower = [], 0, 0
    for record in records:
        if name in record["results"]:
            other, own = (record["results"][each] for each in (name, "cropr"))
            difference, spread = other["speedup"] - own["speedup"], other["spread"] + own["spread"]
            even += abs(difference) <= spread
            slower += difference < -spread
            arguments = record["arguments"]
            setting = f"{arguments['size']} {arguments['dtype']} {arguments['batch_size']}"
            faster += [f"{setting} ({other['speedup'] / own['speedup']:.2f})"] if difference > spread else []
    if not (faster or even or slower):
        return "not measured."
    where = ": " + "; ".join(faster) if faster else ""
    return f"slower in {slower} settings, as fast in {even}, faster in {len(faster)}{where}."


def gpu_summary(summary: dict[str, Any], kernels: list[dict[str, Any]]) -> str:
    """What ran on which GPU, and what did not."""
    rows = []
    for name, part in summary.items():
        counts: dict[str, int] = {}
        for status in part["jobs"].values():
            counts[status] = counts.get(status, 0) + 1
        jobs = ", ".join(f"{count} {status}" for status, count in counts.items())
        rows.append([name, part["status"], jobs, f"{part['seconds']:.0f}"])
    table = markdown_table(["part", "", "jobs", "seconds"], rows, num_names=3)
    found = next((job["record"] for job in kernels if job["name"] == "machine" and job["status"] == "done"), None)
    if found is None:
        return table
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return f"{found['machine']}; {versions}.\n\n{table}"


def unfinished(job: dict[str, Any]) -> str:
    """Why a job has no record."""
    last = job.get("reason") or job.get("traceback", "").strip().splitlines()[-1][:200]
    return f"{job['status']}: {last}".replace("|", "/")


def gpu_attention(*parts: list[dict[str, Any]]) -> str:
    """Who computes attention."""
    jobs = [job for part in parts for job in part]
    columns = ["", "inference", "ms of the call", "training", "ms of the call", "difference from sdpa, relative norm"]
    rows = []
    for job in jobs:
        record = job.get("record", {})
        if job["status"] != "done":
            rows.append([job["name"], unfinished(job), *["–"] * 4])
        elif "forward" in record:
            cells = [job["name"]]
            for part in (record["forward"], record["both"]):
                cells += [" and ".join(part["taken"]) or "unknown", f"{part['ms']:.2f}"]
            difference = record.get("difference_from_sdpa")
            rows.append([*cells, "–" if difference is None else f"{difference:.1e}"])
        elif "differences" in record:
            rows.append([job["name"], *["–"] * 4, ", ".join(f"{n} {d:.1e}" for n, d in record["differences"].items())])
    return markdown_table(columns, rows)


def gpu_benchmark(jobs: list[dict[str, Any]]) -> str:
    """Jobs that ran the benchmark; columns of what none of them has are left out."""
    records = [job["record"] for job in jobs if "arguments" in job.get("record", {})]
    others = {"transformers ViT": "unpruned against Transformers' ViT", "timm": "unpruned against timm"}
    others |= {name: name for name in ALTERNATIVES}
    others = {name: title for name, title in others.items() if any(name in each["results"] for each in records)}
    columns = ["", "unpruned, images/s", "Cropr, speed-up", "random", "bound", "share of bound", "share of random"]
    columns += ["peak memory, GiB", *others.values()]
    rows = []
    for job in jobs:
        record = job.get("record")
        if record is None:
            rows.append([job["name"], unfinished(job), *["–"] * (len(columns) - 2)])
            continue
        results = record["results"]
        if "arguments" not in record:  # turns of something else
            times = ", ".join(f"{name} {row['p50_ms']:.2f} ms" for name, row in results.items())
            rows.append([job["name"], times, *["–"] * (len(columns) - 2)])
            continue
        batch_size, asked = record["arguments"]["batch_size"], record["asked_batch_size"]
        name = job["name"] + (f" (out of memory; {batch_size} images)" if batch_size != asked else "")
        own, unpruned, share = results["cropr"], results[UNPRUNED], record["share_of_random"]
        training = record["share_of_bound"] is None
        cells = [name, f"{unpruned['images_per_second']:.1f}", ratio(own), f"{results[RANDOM]['speedup']:.2f}"]
        cells += ["–" if training else f"{record['multiply_add_bound']:.2f}"]
        cells += ["–" if training else f"{record['share_of_bound']:.2f}", f"{share[0]:.3f} ± {share[1]:.3f}"]
        cells += [" → ".join(f"{row['peak_memory'] / 2**30:.2f}" for row in (unpruned, own))]
        for other in others:
            row = results.get(other)
            if row is None:
                cells.append("–")
            elif other in ALTERNATIVES:
                cells.append(f"{ratio(row)} ({record['alternatives'][other]}, {giga(record, other)} G)")
            else:
                cells.append(f"{1 / row['speedup']:.3f}")
        rows.append(cells)
    return markdown_table(columns, rows)


def circumstances(record: dict[str, Any], run: dict[str, Any]) -> str:
    """How a demo ran, in a line: from its record, and from the part of it that names machine and versions."""
    arguments, versions = record["arguments"], run["versions"]
    images = f"{arguments['train_images']:,} training images, {arguments['epochs']} epoch"
    images += "s" if arguments["epochs"] > 1 else ""
    software = ", ".join(f"{name} {versions[name].split('+')[0]}" for name in ("torch", "transformers"))
    images += f", {arguments['test_images']:,} test images"
    return f"*{images}; {run['machine']}, {software}; {record['minutes']} minutes in all.*"


def demo_table(record: dict[str, Any]) -> str:
    """What `examples/demo.py` found, and how it ran."""
    return f"{demo.table(record)}\n\n{circumstances(record, record)}"


def any_speed_table(record: dict[str, Any]) -> str:
    """What `examples/any_speed.py` found, and how it ran."""
    return f"{any_speed.table(record)}\n\n{circumstances(record, record['any_speed'])}"


def five_tasks_table(record: dict[str, Any]) -> str:
    """What `examples/five_tasks.py` found, and how it ran."""
    return f"{five_tasks.table(record)}\n\n{circumstances(record, record)}"


def photographs_row(record: dict[str, Any]) -> list[str]:
    """Speed with the largest batch, and quality, of a comparison on photographs."""
    (name,) = (name for name in record["models"] if name.startswith("cropr, "))
    unpruned, cropr = (record["models"][each] for each in ("unpruned", name))
    metric = record["comparison"]["metrics"][0]
    cells = [f"DINOv2-small, garments on photographs, {metric.replace('_', ' ').replace('iou', 'IoU')}"]
    cells += [f"{cropr['patches_left']} of {cropr['patches']}"]
    cells += [f"{unpruned['multiply_adds'] / cropr['multiply_adds']:.2f}", ratio(record["speed"][-1]["results"][name])]
    for method in ("unpruned", "cropr", "random"):
        runs = [run for run in record["runs"] if run["method"] == method and run["trained"]]
        cells.append(f"{mean_and_deviation([run['metrics'][metric] for run in runs])} %")
    return cells


def results_table(
    targets: list[dict[str, Any]], classified: dict[str, Any], segmented: dict[str, Any], *demos: dict[str, Any]
) -> str:
    """What the README shows: the speed of ViT-L, and speed and quality of DINOv2 on photographs and of demos."""
    columns = ["", "patches left", "multiply-adds fall by", "speed-up", "quality, unpruned", "Cropr", "random"]
    rows = []
    for record in targets:
        arguments, fusion = (
            record["arguments"],
            json.loads(record["arguments"]["config"]).get("last_layer_fusion", True),
        )
        if arguments["size"] != "large" or arguments["training"]:
            continue
        name = f"ViT-L/16, 224 pixels, R = {arguments['pruning_rate']}, batch {arguments['batch_size']}"
        name += "" if fusion else ", without last layer fusion"
        left = f"{record['patches_kept'][-1]} of {record['patches']}"
        rows.append([name, left, f"{record['multiply_add_bound']:.2f}", ratio(record["results"]["cropr"])] + 3 * ["–"])
    rows += [photographs_row(classified), photographs_row(segmented)]
    for record in demos:
        task = record["arguments"]["task"]
        (metric, title), *_ = demo.TASKS[task].metrics.items()
        cropr = next(row for row in record["rows"] if row["model"] == "Cropr")
        cells = [f"demo of {task.replace('_', ' ')}, {title}", f"{cropr['patches_left']} of {cropr['patches']}"]
        cells += [f"{record['multiply_add_bound']:.2f}", f"{cropr['speedup']:.2f}"]
        rows.append(cells + [f"{100 * row['metrics'][metric]:.1f} %" for row in record["rows"]])
    return markdown_table(columns, rows)


ATTENTION = partial(turns_table, columns=["size, pixels, batch", "unpruned", "eager", "Cropr", "eager"])
# By the file and the name of a table: what makes it, and from which records.
PAGES: dict[str, dict[str, tuple[Callable[..., str], list[str]]]] = {
    "README.md": {
        "results": (
            results_table,
            [
                "speed/targets",
                "comparisons/garments_classification",
                "comparisons/garments_segmentation",
                "demos/image_classification",
                "demos/semantic_segmentation",
            ],
        )
    },
    "docs/demos.md": {
        "image_classification": (demo_table, ["demos/image_classification"]),
        "semantic_segmentation": (demo_table, ["demos/semantic_segmentation"]),
        "instance_segmentation": (demo_table, ["demos/instance_segmentation"]),
        "any_speed": (any_speed_table, ["demos/any_speed"]),
    },
    "docs/fine_tune.md": {"five_tasks": (five_tasks_table, ["demos/five_tasks"])},
    "docs/speed.md": {
        "targets": (targets_table, ["speed/targets"]),
        "limits": (limits_table, ["speed/limits"]),
        "compiled": (
            partial(turns_table, columns=["size, batch", "unpruned", "compiled", "Cropr", "compiled"]),
            ["speed/compiled"],
        ),
        "alternatives": (alternatives_table, ["speed/alternatives"]),
    },
    "docs/speed_details.md": {
        "grid": (partial(format_sweep, names=["size", "image_size", "dtype", "batch_size"]), ["speed/grid"]),
        "profile": (profile_table, ["speed/grid"]),
        "blocks": (blocks_table, ["speed/blocks", "speed/grid"]),
        "references": (references_table, ["speed/grid"]),
        "aligned": (aligned_table, ["speed/aligned"]),
        "attention": (ATTENTION, ["speed/attention"]),
        "attention_kept": (ATTENTION, ["speed/attention_kept"]),
        "tokens": (cost_table, ["speed/tokens"]),
        "packed": (packed_table, ["speed/packed"]),
    },
    "docs/gpu.md": {
        "summary": (gpu_summary, ["speed/gpu/summary", "speed/gpu/kernels"]),
        "attention": (gpu_attention, ["speed/gpu/kernels", "speed/gpu/flex"]),
        "speed": (gpu_benchmark, ["speed/gpu/speed"]),
        "compiled": (gpu_benchmark, ["speed/gpu/compiled"]),
        "training": (gpu_benchmark, ["speed/gpu/training"]),
        "detector": (gpu_benchmark, ["speed/gpu/detector"]),
    },
    "docs/methods.md": {
        "methods": (
            partial(format_sweep, names=["size", "pruning_rate", "batch_size", "token_reducer"]),
            ["speed/methods"],
        ),
        "digits_classification": (comparison_table, ["comparisons/digits_classification"]),
        "garments_classification": (comparison_table, ["comparisons/garments_classification"]),
        "garments_segmentation": (comparison_table, ["comparisons/garments_segmentation"]),
    },
    "docs/schedules.md": {"budgets": (budgets_table, ["speed/budgets"]), "shapes": (shapes_table, ["speed/shapes"])},
}


def read(name: str) -> Any:
    """The record, or the list of records, in a file below this folder."""
    return json.loads((DOCS / f"{name}.json").read_text(encoding="utf-8"))


def content(table: Callable[..., str], records: list[str]) -> str:
    """A table, or that its records are not there."""
    if all((DOCS / f"{name}.json").exists() for name in records):
        return table(*map(read, records))
    return "*Not measured yet.*"


def page(name: str) -> str:
    """A page with every table made anew, between the comments that name it."""
    text = (ROOT / name).read_text(encoding="utf-8")
    for table_name, (table, records) in PAGES[name].items():
        start, end = f"<!-- table: {table_name} -->", "<!-- end -->"
        pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), flags=re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{name} has no place for the table {table_name!r}; write {start} and {end}.")
        replacement = "\n".join([start, "", content(table, records), "", end])
        text = pattern.sub(lambda match, replacement=replacement: replacement, text, count=1)
    return text


def main() -> None:
    """Writes pages and pictures."""
    for name in PAGES:
        (ROOT / name).write_text(page(name), encoding="utf-8")
    plot_cost(read("speed/tokens")).savefig(DOCS / "speed" / "tokens.png", dpi=110)
    grid = [record for record in read("speed/grid") if record["arguments"]["dtype"] == "float32"]
    plot_benchmark(grid, ["size", "image_size", "batch_size"]).savefig(DOCS / "speed" / "grid.png", dpi=110)


if __name__ == "__main__":
    main()
