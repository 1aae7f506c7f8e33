"""The measurements of docs/speed.md: `python docs/speed/measure.py NAME ...` measures groups and writes their records.

Each takes minutes, on a machine that does nothing else.
"""

import json
import sys
from pathlib import Path

from cropr_hf.benchmark import BenchmarkArguments, run


FOLDER = Path(__file__).parent
# Patches removed per module, such that about a tenth of the patches is left at the end.
RATES = {
    ("small", 224): 16,
    ("small", 512): 90,
    ("small", 1024): 365,
    ("base", 224): 16,
    ("base", 512): 90,
    ("base", 1024): 365,
    ("large", 224): 8,
    ("large", 512): 40,
    ("large", 1024): 165,
}
# What a 2-core CPU computes within a quarter of a minute: (size, image size) -> batch sizes.
BATCHES = {
    ("small", 224): {"float32": [1, 8, 64], "bfloat16": [1, 8, 64]},
    ("small", 512): {"float32": [1, 8], "bfloat16": [1, 8]},
    ("small", 1024): {"float32": [1], "bfloat16": [1, 8]},
    ("base", 224): {"float32": [1, 8], "bfloat16": [1, 8, 64]},
    ("base", 512): {"float32": [1], "bfloat16": [1, 8]},
    ("base", 1024): {"float32": [], "bfloat16": [1]},
    ("large", 224): {"float32": [1, 8], "bfloat16": [1, 8]},
    ("large", 512): {"float32": [1], "bfloat16": [1]},
    ("large", 1024): {"float32": [], "bfloat16": [1]},
}
GROUPS: dict[str, list[BenchmarkArguments]] = {
    "targets": [
        BenchmarkArguments(size="large", pruning_rate=8, twins=True, min_rounds=8, max_rounds=9),
        BenchmarkArguments(
            size="large",
            pruning_rate=8,
            config='{"last_layer_fusion": false}',
            min_rounds=8,
            max_rounds=9,
        ),
        BenchmarkArguments(
            size="eva02_large",
            image_size=512,
            pruning_rate=40,
            config='{"patch_size": 16}',
            batch_size=1,
            twins=True,
            min_rounds=7,
            max_rounds=8,
        ),
        BenchmarkArguments(size="large", pruning_rate=8, batch_size=4, training=True, min_rounds=5, max_rounds=8),
    ],
    "grid": [
        BenchmarkArguments(
            size=size,
            image_size=pixels,
            pruning_rate=RATES[size, pixels],
            batch_size=batch_size,
            dtype=dtype,
            profile=True,
            min_rounds=5,
            max_rounds=30 if batch_size == 1 and pixels == 224 else 5,
        )
        for (size, pixels), by_dtype in BATCHES.items()
        for dtype, batch_sizes in by_dtype.items()
        for batch_size in batch_sizes
    ],
    "tokens": [
        BenchmarkArguments(
            size="small",
            image_size=pixels,
            pruning_rate=(pixels // 16) ** 2 // 11,
            batch_size=1,
            min_rounds=4,
            max_rounds=5,
        )
        for pixels in (224, 320, 448, 640, 896, 1536)
    ],
}


def measure(name: str) -> None:
    """Runs a group; its records are there after each of them."""
    records = []
    for arguments in GROUPS[name]:
        record = run(arguments)
        if "operations" in record:  # those that matter
            record["operations"] = {
                candidate: {
                    operation: row
                    for operation, row in record["operations"][candidate].items()
                    if row["ms"] > 0.002 * sum(other["ms"] for other in record["operations"][candidate].values())
                }
                for candidate in ("unpruned", "cropr")
            }
        records.append(record)
        (FOLDER / f"{name}.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for group in sys.argv[1:]:
        measure(group)
