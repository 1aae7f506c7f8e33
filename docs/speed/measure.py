"""The measurements of the pages speed.md, speed_details.md, schedules.md and methods.md.

`python docs/speed/measure.py [NAME ...]` writes the records of groups, all but `shapes` by default. Each runs in a
process of its own, as the memory that one leaves behind changes the times of the next, and takes minutes on a machine
that does nothing else.
"""

import copy
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoImageProcessor

from cropr_hf import CroprViTConfig, CroprViTForImageClassification, evaluate_schedules, find_schedule
from cropr_hf.modeling_cropr_vit import CroprViTPreTrainedModel
from cropr_hf.speed.benchmark import UNPRUNED, BenchmarkArguments, pruning_candidates, run
from cropr_hf.speed.cost import mean_multiply_adds, multiply_adds
from cropr_hf.speed.instruments import library_versions, machine_name
from cropr_hf.speed.timing import compare


FOLDER = Path(__file__).parent
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"}  # for glibc
# Patches removed per module, such that 10 to 18 % of the patches are left at the end.
RATES = {
    ("small", 224): 16,
    ("small", 512): 90,
    ("small", 1024): 365,
    ("base", 224): 16,
    ("base", 512): 90,
    ("base", 1024): 365,
    ("large", 224): 8,
    ("large", 512): 40,
}
# What a 2-core CPU computes within a quarter of a minute: (size, image size) -> batch sizes.
BATCHES = {
    ("small", 224): {"float32": [1, 8, 64], "bfloat16": [1, 8, 64]},
    ("small", 512): {"float32": [1, 8], "bfloat16": [1, 8]},
    ("small", 1024): {"float32": [1], "bfloat16": [1]},
    ("base", 224): {"float32": [1, 8], "bfloat16": [1, 8, 64]},
    ("base", 512): {"float32": [1], "bfloat16": [1, 8]},
    ("base", 1024): {"float32": [], "bfloat16": [1]},
    ("large", 224): {"float32": [1, 8], "bfloat16": [1, 8]},
    ("large", 512): {"float32": [1], "bfloat16": [1]},
}
GROUPS: dict[str, list[BenchmarkArguments]] = {
    "targets": [
        BenchmarkArguments(size="large", pruning_rate=8, references=True, min_rounds=8, max_rounds=9),
        BenchmarkArguments(
            size="large",
            pruning_rate=8,
            config='{"last_layer_fusion": false}',
            min_rounds=15,
            max_rounds=20,
        ),
        BenchmarkArguments(
            size="eva02_large",
            image_size=512,
            pruning_rate=40,
            config='{"patch_size": 16}',
            batch_size=1,
            references=True,
            min_rounds=7,
            max_rounds=8,
        ),
        BenchmarkArguments(size="large", pruning_rate=8, batch_size=8, training=True, min_rounds=5, max_rounds=8),
    ],
    "grid": [
        BenchmarkArguments(
            size=size,
            image_size=pixels,
            pruning_rate=RATES[size, pixels],
            batch_size=batch_size,
            dtype=dtype,
            references=size != "base" and pixels == 224 and batch_size <= 8,
            profile=True,
            min_rounds=rounds,
            max_rounds=rounds,
        )
        for (size, pixels), by_dtype in BATCHES.items()
        for dtype, batch_sizes in by_dtype.items()
        for batch_size in batch_sizes
        for rounds in [(100 if size != "large" else 20) if (batch_size, pixels) == (1, 224) else 5]  # 100: with a p99
    ],
    "limits": [
        BenchmarkArguments(
            size=size,
            image_size=pixels,
            pruning_rate=rate,
            batch_size=batch_size,
            config=config,
            min_rounds=50,
            max_rounds=200,
        )
        for size, pixels, rate in (("tiny", 96, 3), ("tiny", 224, 16), ("small", 96, 3), ("small", 224, 16))
        for config in ("{}", '{"last_layer_fusion": false}')
        for batch_size in (1, 8)
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
    "alternatives": [
        BenchmarkArguments(
            size=size,
            pruning_rate=RATES[size, 224],
            batch_size=batch_size,
            dtype=dtype,
            alternatives=True,
            min_rounds=5 if size == "large" else 15,
            max_rounds=6 if size == "large" else 30,
        )
        for size in ("small", "large")
        for dtype in ("float32", "bfloat16")
        for batch_size in (1, 8)
    ],
    "methods": [  # ToMe's rates, and what is usual for the others
        BenchmarkArguments(
            size=size, token_reducer=method, pruning_rate=rate, batch_size=8, min_rounds=rounds, max_rounds=rounds
        )
        for size, rate, rounds, methods in (
            ("small", 13, 15, ("cropr", "tome")),
            ("small", None, 15, ("evit", "dynamicvit", "idlevit", "ailurus", "itpn")),
            ("large", 8, 5, ("tome",)),
        )
        for method in methods
    ],
}


def benchmarks(group: list[BenchmarkArguments]) -> Iterator[dict[str, Any]]:
    """Records of the benchmark, with the operations that matter."""
    return map(shortened, map(run, group))


def shortened(record: dict[str, Any]) -> dict[str, Any]:
    """A record with the operations that matter."""
    for candidate, operations in record.pop("operations", {}).items():
        total = sum(row["ms"] for row in operations.values())
        longest = {name: row for name, row in operations.items() if row["ms"] > 0.002 * total}
        if candidate in (UNPRUNED, "cropr"):
            record.setdefault("operations", {})[candidate] = longest
    return record


def blocks() -> Iterator[dict[str, Any]]:
    """Milliseconds of a block by its tokens, from two tokens to all."""
    for size, batch_size in (("small", 1), ("small", 8), ("base", 1), ("base", 8), ("large", 1)):
        config = CroprViTConfig.from_size(size, pruning_rate=RATES[size, 224], num_labels=1000)
        model, pixels = CroprViTForImageClassification(config), torch.randn(batch_size, 3, 224, 224)
        found = find_schedule(model, target_speedup=1.5, pixel_values=pixels, max_rounds=10)
        bound = multiply_adds(config, pruning=0) / multiply_adds(config)
        yield {"size": size, "bound_of_grid": bound, **found.record()}


def budgets() -> Iterator[dict[str, Any]]:
    """Schedules for twice the speed, found three times, and each measured again by the benchmark."""
    for size, pixels, batch_size in (("base", 224, 4), ("small", 512, 1)) * 3:
        config = CroprViTConfig.from_size(size, image_size=pixels, pruning_rate=0, num_labels=1000)
        found = find_schedule(
            CroprViTForImageClassification(config), 2.0, pixel_values=torch.randn(batch_size, 3, pixels, pixels)
        )
        again = BenchmarkArguments(
            size=size,
            image_size=pixels,
            batch_size=batch_size,
            config=json.dumps({"pruning_schedule": found.schedule}),
            max_rounds=15,
        )
        result = run(again)["results"]["cropr"]
        setting = {"setting": f"{size}, {pixels}, {batch_size}", "num_patches": config.num_patches}
        yield {**setting, **found.record(), "again": {name: result[name] for name in ("speedup", "spread")}}


def aligned() -> Iterator[dict[str, Any]]:
    """A schedule whose token counts are odd, and the same rounded up to multiples of 8 and 16."""
    for dtype in (torch.float32, torch.bfloat16):
        config = CroprViTConfig.from_size("base", pruning_rate=15, num_labels=1000, align_first_module=False)
        model = CroprViTForImageClassification(config).to(dtype).eval()
        rounded = [config.kept_patches()]
        for multiple in (8, 16):
            config.token_multiple = multiple
            rounded.append(config.kept_patches())
        yield evaluate_schedules(model, rounded, lambda model: 0.0, min_rounds=10, max_rounds=15, tolerance=0.005)


def unpruned_and_cropr(config: CroprViTConfig) -> dict[str, CroprViTPreTrainedModel]:
    """Two of the benchmark's candidates, in evaluation mode."""
    models = pruning_candidates(config)
    return {name: models[name].eval() for name in (UNPRUNED, "cropr")}


@torch.inference_mode()
def compiled() -> Iterator[dict[str, Any]]:
    """Seconds as they are and by torch.compile, unpruned and Cropr."""
    for size in ("small", "base"):
        for batch_size in (1, 8):
            config = CroprViTConfig.from_size(size, pruning_rate=16, num_labels=1000)
            pixels, calls = torch.randn(batch_size, 3, 224, 224), {}
            torch.compiler.reset()  # each setting on its own: no dynamic sizes
            for name, model in unpruned_and_cropr(config).items():
                calls[name] = partial(model, pixels)
                calls[f"{name} compiled"] = partial(torch.compile(model, fullgraph=True), pixels)
            yield {"setting": f"{size}, {batch_size}", **turns(calls)}


@torch.inference_mode()
def attention() -> Iterator[dict[str, Any]]:
    """Seconds with the fused attention and with plain products, in half precision."""
    for size, pixels, batch_size in (("small", 224, 1), ("small", 224, 8), ("base", 224, 8), ("small", 512, 1)):
        config = CroprViTConfig.from_size(size, image_size=pixels, pruning_rate=RATES[size, pixels], num_labels=1000)
        images, calls = torch.randn(batch_size, 3, pixels, pixels, dtype=torch.bfloat16), {}
        for name, model in unpruned_and_cropr(config).items():
            plain = copy.deepcopy(model.bfloat16())
            plain.set_attn_implementation("eager")
            calls |= {name: partial(model, images), f"{name} eager": partial(plain, images)}
        yield {"setting": f"{size}, {pixels}, {batch_size}", **turns(calls)}


def shapes() -> Iterator[dict[str, Any]]:
    """Test accuracy under the shapes of schedules at equal speed, of the checkpoint of `make demo-any-speed`."""
    sys.path.insert(0, str(FOLDER.parents[1] / "examples"))
    from any_speed import AnySpeedArguments, test_metric
    from evaluate_image_classification import Arguments, load_images

    folder = "outputs/any_speed/any_speed/cropr"
    model = CroprViTForImageClassification.from_pretrained(folder).eval()
    metric, pixels = test_metric(AnySpeedArguments(), folder)
    typical = load_images(Arguments(split="train", max_eval_samples=256, seed=7))["image"]
    processor = AutoImageProcessor.from_pretrained(folder)
    images = processor([image.convert("RGB") for image in typical], return_tensors="pt")["pixel_values"].split(64)
    for target in (1.3, 1.5, 1.7, 1.8):
        for shape, calibration in (("constant", None), ("one_shot", None), ("one_shot", images), ("free", images)):
            found = find_schedule(model, target, shape=shape, pixel_values=pixels, calibration=calibration)
            model.set_pruning(found.schedule)
            yield {"calibrated": calibration is not None, **metric(model), **found.record()}
            model.set_pruning(None)


class DrawnGate(torch.nn.Module):
    """In place of a gate of SViT: computes as much, and lets through what was drawn.

    Args:
        gate: the gate.
        takes_part: (images, N), which patches of which image it lets through.

    Attributes:
        first: the first image of the coming batch.
    """

    def __init__(self, gate: torch.nn.Module, takes_part: torch.Tensor):
        super().__init__()
        self.gate, self.takes_part, self.first = gate, takes_part, 0

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> log-probabilities, as sure as they can be, (B, N, 2)."""
        log_probabilities = self.gate(patches)
        chosen = self.takes_part[self.first : self.first + len(patches), :, None]
        sure = log_probabilities.new_tensor([0.0, -50.0])
        return torch.where(chosen, sure, sure.flip(0))


def drawn_patches(config: CroprViTConfig, images: int, spread: float) -> Iterator[torch.Tensor]:
    """Which patches of which image take part in the block after each module, (images, N), at random.

    Their number is that of the schedule plus a share of all patches, which is drawn once for each image, as one that
    shows much has more of them everywhere: from a normal distribution of mean 0 and standard deviation `spread`.
    """
    generator, num_patches = torch.Generator().manual_seed(0), config.num_patches
    more = spread * num_patches * torch.randn(images, 1, generator=generator)
    kept = config.kept_patches()
    for block in config.pruning_blocks:
        counts = (kept[block - 1] + more).round().clamp(1, num_patches)
        yield torch.rand(images, num_patches, generator=generator).argsort(dim=1) < counts


def one_by_one(model: CroprViTPreTrainedModel, images: torch.Tensor) -> None:
    """Calls a model of drawn gates for each image of a batch alone."""
    gates = [module for module in model.modules() if isinstance(module, DrawnGate)]
    for index in range(len(images)):
        for gate in gates:
            gate.first = index
        model(images[index : index + 1])
    for gate in gates:
        gate.first = 0


# Sizes, pixels and images in a batch
PACKED = (("small", 224, 8), ("small", 224, 32))


@torch.inference_mode()
def packed(settings: Sequence[tuple[str, int, int]] = PACKED) -> Iterator[dict[str, Any]]:
    """Seconds of SViT on images with unlike numbers of patches: in a batch, packed and masked, and one by one."""
    for (size, pixels, batch_size), spread in itertools.product(settings, (0.0, 0.1, 0.2)):
        method = {"token_reducer": "svit", "reducer_config": {"eval_mode": "threshold"}}
        config = CroprViTConfig.from_size(size, image_size=pixels, num_labels=1000, **method)
        images, models = torch.randn(batch_size, 3, pixels, pixels), pruning_candidates(config)
        unpruned, packing = (models[name].eval() for name in (UNPRUNED, "svit"))
        reducers = packing.base_model.token_reducers.values()
        for reducer, takes_part in zip(reducers, drawn_patches(config, batch_size, spread)):
            reducer.gate = DrawnGate(reducer.gate, takes_part)
        masking = copy.deepcopy(packing)
        for reducer in masking.base_model.token_reducers.values():
            reducer.packs = False
        kept, plain = packing.base_model(images, output_pruning=True).patches_kept, multiply_adds(unpruned.config)
        calls = {
            UNPRUNED: partial(unpruned, images),
            "packed": partial(packing, images),
            "masked": partial(masking, images),
            "one by one": partial(one_by_one, packing, images),
        }
        yield {
            "setting": f"{size}, {pixels}, {batch_size}",
            "spread": spread,
            "patches": config.num_patches,
            "patches_left": kept[:, -1].tolist(),
            "bound": plain / mean_multiply_adds(config, kept),
            "bound_of_longest": plain / mean_multiply_adds(config, kept.amax(dim=0, keepdim=True)),
            **turns(calls, rounds=(8, 20)),
        }


def turns(
    calls: dict[str, Callable[[], Any]], device: str = "cpu", rounds: tuple[int, int] = (15, 60)
) -> dict[str, Any]:
    """Times calls in turns, for so many rounds at least and at most; those of the unpruned model are the reference."""
    timings = compare(calls, UNPRUNED, *rounds, device=device)
    return {
        "machine": machine_name(torch.device(device)),
        "versions": library_versions(),
        "rounds": len(timings[UNPRUNED].seconds),
        "results": {
            name: {"p50_ms": 1000 * own.median, "speedup": own.speedup, "spread": own.spread}
            for name, own in timings.items()
        },
    }


# `shapes` needs the checkpoint of `make demo-any-speed`.
OTHERS = {
    "blocks": blocks,
    "budgets": budgets,
    "aligned": aligned,
    "compiled": compiled,
    "attention": attention,
    "packed": packed,
    "shapes": shapes,
}


def measure(name: str) -> None:
    """Measures a group. Until all of it is there, what is takes the name `NAME.json.part`."""
    group, records, part = name.removesuffix("_kept"), [], FOLDER / f"{name}.json.part"
    for record in benchmarks(GROUPS[group]) if group in GROUPS else OTHERS[group]():
        records.append(record)
        part.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    part.replace(FOLDER / f"{name}.json")


def main() -> None:
    """Measures groups; `NAME_kept` is the group NAME in a process that keeps memory."""
    all_names = [*GROUPS, *OTHERS, "attention_kept"]
    names = sys.argv[1:] or [name for name in all_names if name != "shapes"]
    if unknown := {*names} - {*all_names}:
        raise ValueError(f"There is no group {', '.join(unknown)}; choose among {', '.join(all_names)}.")
    for name in names:
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(name,))
        with patch.dict(os.environ, KEEP_MEMORY if name.endswith("_kept") else {}):
            process.start()
        process.join()
        if process.exitcode:
            sys.exit(process.exitcode)


if __name__ == "__main__":
    main()
