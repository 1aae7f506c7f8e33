"""Writes the tables and pictures of docs/speed.md from the records beside this file (`make speed-page`)."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

from cropr_hf.benchmark import UNPRUNED, format_sweep, markdown_table
from cropr_hf.visualization import plot_benchmark, plot_cost


FOLDER = Path(__file__).parent
PAGE = FOLDER.parent / "speed.md"
LINEAR = ("addmm", "mm", "mkl_linear", "mkldnn_linear")
PRUNING = ("sort", "nan_to_num", "index_select", "addmv_", "addmv", "gather", "constant_pad_nd", "mul", "arange")


def ratio(timing: dict[str, float]) -> str:
    """A speed-up with its spread."""
    return f"{timing['speedup']:.2f} ± {timing['spread']:.2f}"


def targets_table(records: list[dict[str, Any]]) -> str:
    """Speed against each yardstick; above 1.00, Cropr's code is the faster one."""
    columns = ["", "batch", "unpruned, images/s", "Cropr, speed-up", "bound (linear layers alone)", "share of bound"]
    columns += ["share of random", "unpruned against Transformers' ViT", "against timm"]
    rows = []
    for record in records:
        arguments, results = record["arguments"], record["results"]
        config = json.loads(arguments["config"])
        name = f"{arguments['size']} {arguments['image_size'] or 224} px, R = {arguments['pruning_rate']}"
        name += ", without fusion" if config.get("last_layer_fusion") is False else ""
        name += ", training step" if arguments["training"] else ""
        twins = [
            f"{1 / results[twin]['speedup']:.3f} ± {results[twin]['spread'] / results[twin]['speedup'] ** 2:.3f}"
            if twin in results
            else ""
            for twin in ("transformers ViT", "timm")
        ]
        cells = [
            name,
            str(arguments["batch_size"]),
            f"{results[UNPRUNED]['images_per_second']:.2f}",
            ratio(results["cropr"]),
            # In training the auxiliary heads cost time that the count does not have.
            "" if arguments["training"] else f"{record['multiply_add_bound']:.2f} ({record['linear_bound']:.2f})",
            "" if arguments["training"] else f"{record['share_of_bound']:.2f}",
            f"{record['share_of_random'][0]:.3f} ± {record['share_of_random'][1]:.3f}",
            *twins,
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


def blocks_table(records: list[dict[str, Any]]) -> str:
    """What a block costs however few its tokens are, and what share of the bound that leaves."""
    columns = [
        "size, batch",
        "block with 2 tokens, ms",
        "with all 197, ms",
        "ratio",
        "bound at R",
        "share that is left",
    ]
    rows = []
    for record in records:
        times = record["block_ms"]["global"]
        few, every = times["1"], times["196"]
        bound = record["bound_of_grid"]
        cells = [f"{record['size']}, {record['batch_size']}", f"{few:.2f}", f"{every:.2f}", f"{few / every:.1%}"]
        # Time = fixed + per multiply-add; the fixed part does not shrink.
        rows.append([*cells, f"{bound:.2f}", f"{1 / (1 + few / every * (bound - 1)):.2f}"])
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


def page(text: str) -> str:
    """The page with every table made anew, between the comments that name it."""
    records = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in FOLDER.glob("*.json")}
    attention = partial(turns_table, columns=["size, pixels, batch", "unpruned", "eager", "Cropr", "eager"])
    tables = {
        "targets": targets_table,
        "grid": partial(format_sweep, names=["size", "image_size", "dtype", "batch_size"]),
        "profile": profile_table,
        "limits": limits_table,
        "blocks": blocks_table,
        "aligned": aligned_table,
        "compiled": partial(turns_table, columns=["size, batch", "unpruned", "compiled", "Cropr", "compiled"]),
        "attention": attention,
        "attention_kept": attention,
        "tokens": cost_table,
    }
    for name, table in tables.items():
        group = "grid" if name == "profile" else name
        if group not in records:
            continue  # not measured yet
        start, end = f"<!-- table: {name} -->", "<!-- end -->"
        pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), flags=re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{PAGE.name} has no place for the table {name!r}; write {start} and {end}.")
        replacement = "\n".join([start, "", table(records[group]), "", end])
        text = pattern.sub(lambda match, replacement=replacement: replacement, text, count=1)
    return text


def main() -> None:
    """Writes page and pictures."""
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    pictures = {
        "tokens": plot_cost,
        "grid": lambda grid: plot_benchmark(
            [record for record in grid if record["arguments"]["dtype"] == "float32"],
            ["size", "image_size", "batch_size"],
        ),
    }
    for name, draw in pictures.items():
        if (FOLDER / f"{name}.json").exists():
            records = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
            draw(records).savefig(FOLDER / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main()
