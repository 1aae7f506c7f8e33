"""All that has to be measured on a GPU, in one command: `make gpu-check`, or `PYTHONPATH=. python
docs/speed/gpu_check.py FOLDER`, which needs this checkout, torch, torchvision and Transformers, and no network.

Parts run in order of importance, each in a process of its own, until the time is over. `FOLDER/PART.json` is written
after every job of a part, so that a run cut short keeps what it has; `summary.json` says what became of all of them. A
job that fails leaves its traceback and the others go on; the exit code is then 1. `make pages` shows the records of
`docs/speed/gpu` in docs/gpu.md. `--dry_run` goes through all of it with tiny models on the CPU.
"""

import argparse
import functools
import gc
import json
import logging
import multiprocessing
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


# So that asking for GPUs does not start CUDA, which processes that are forked later could not use.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import torch
from measure import shortened, turns
from transformers.utils import logging as transformers_logging

from cropr_hf import CroprViTConfig
from cropr_hf.files import write_json
from cropr_hf.reducer_cropr import aggregate_tokens
from cropr_hf.speed.benchmark import BenchmarkArguments, pruning_candidates, run
from cropr_hf.speed.instruments import library_versions, machine_name, operation_times, peak_memory


ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "docs" / "speed" / "gpu"
LIBRARIES = ("timm", "flash_attn", "torchao", "accelerate", "datasets", "triton")
# What runs an attention, by a part of the names of its operations.
BACKENDS = {
    "FlashAttention package": "flash_attn",
    "flash": "_flash_attention",
    "memory-efficient": "_efficient_attention",
    "cuDNN": "_cudnn_attention",
    "flex": "flex",
    "plain products": "_softmax",
}
ATTENTION_KERNEL = re.compile("flash|fmha|attention|attn|softmax|flex", flags=re.IGNORECASE)
GRACE = 20  # seconds that the last job of a part may be late
FAILED, DONE, SKIPPED, STOPPED, NOT_INSTALLED = "failed", "done", "skipped", "stopped", "not installed"
logger = logging.getLogger("gpu_check")


class NotInstalledError(Exception):
    """What a job needs is not there, which is no failure."""


@dataclass(frozen=True)
class Setup:
    """Where everything runs.

    Attributes:
        folder: for the records.
        device: `"cuda"`, or `"cpu"` in a dry run.
        deadline: by `time.monotonic`, which all processes share.
        dry_run: tiny models, nothing of CUDA, no compilation.
    """

    folder: Path
    device: str
    deadline: float
    dry_run: bool

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()


@dataclass(frozen=True)
class Job:
    """One record.

    Attributes:
        name: unique in its part.
        seconds: that it takes, about; it is left out where fewer are left.
        call: what returns the record.
    """

    name: str
    seconds: float
    call: Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Part:
    """Jobs of one file.

    Attributes:
        name: of the file.
        limit: seconds that it may take; jobs that need more are left out.
        jobs: makes the jobs, in order of importance.
    """

    name: str
    limit: float
    jobs: Callable[[Setup], Sequence[Job]]


# --------------------------------------------------------------------------------------------------------------------
# The parts
# --------------------------------------------------------------------------------------------------------------------


def tests(setup: Setup) -> list[Job]:
    """The tests that need a GPU, file by file; a dry run asks pytest for its version."""
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    return [
        Job(path.name, 30, functools.partial(run_tests, setup, path))
        for path in (files[:1] if setup.dry_run else files)
    ]


def run_tests(setup: Setup, path: Path) -> dict[str, Any]:
    """Outcomes of the tests of a file."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-rA",
        "-q",
        "-p",
        "no:cacheprovider",
        "--tb=short",
        str(path),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "4"}
    command += ["--version"] if setup.dry_run else []
    process = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=min(100, max(1, setup.left))
    )
    output = process.stdout + process.stderr
    if missing := re.search(r"ModuleNotFoundError: No module named '(\w+)'|No module named (pytest)", output):
        raise NotInstalledError(f"{missing[1] or missing[2]}, which the tests of {path.name} import")
    if process.returncode:
        raise RuntimeError(f"pytest ended with {process.returncode}:\n{output[-6000:]}")
    passed = re.findall(r"^PASSED (\S+)", output, flags=re.MULTILINE)
    return {"passed": passed, "last_line": output.strip().splitlines()[-1]}


def kernels(setup: Setup) -> list[Job]:
    """Which kernels run attention, and whether they compute the same."""
    jobs = [Job("machine", 1, functools.partial(machine, setup))]
    jobs += [
        Job(f"aggregator, {heads} heads of {1024 // heads}, {queries} queries", 2, functools.partial(*call))
        for heads in (1, 16)
        for queries, tokens in ((1, 197), (1024, 1025))
        for call in [(aggregator_kernels, setup, heads, queries, tokens)]
    ]
    sizes = ("large",) if setup.dry_run else ("large", "eva02_large")
    jobs += [Job(f"{size}, against the CPU", 5, functools.partial(against_cpu, setup, size)) for size in sizes]
    jobs += [
        Job(
            f"{size}, {name}",
            5,
            functools.partial(backbone_kernels, setup, size, name),
        )
        for name in ("sdpa", "eager", "flash_attention_2")
        for size in sizes
    ]
    return jobs


def flex(setup: Setup) -> list[Job]:
    """Flex attention, which is compiled for every number of tokens; a dry run compiles nothing."""
    return [
        Job(f"{size}, flex_attention", 30, functools.partial(backbone_kernels, setup, size, "flex_attention"))
        for size in (() if setup.dry_run else ("large", "eva02_large"))
    ]


def machine(setup: Setup) -> dict[str, Any]:
    """The device and what is installed."""
    record: dict[str, Any] = {"machine": machine_name(torch.device(setup.device)), "versions": library_versions()}
    record["versions"] |= {name: library(name) or NOT_INSTALLED for name in LIBRARIES}
    if setup.device == "cuda":
        record["memory"] = torch.cuda.get_device_properties(0).total_memory
        record["versions"] |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return record


def attention_of(call: Callable[[], Any], setup: Setup) -> dict[str, Any]:
    """What of a call is attention: who runs it, operations, kernels, and the memory that the call takes."""
    call()  # compiled, and settled on its kernels
    operations = operation_times(call, setup.device)
    taken = [backend for backend, part in BACKENDS.items() if any(part in name for name in operations)]
    backends = tuple(BACKENDS.values())
    return {
        "taken": taken,
        "operations": {name: row for name, row in operations.items() if any(part in name for part in backends)},
        "kernels": [
            name for name in operation_times(call, setup.device, kernels=True) if ATTENTION_KERNEL.search(name)
        ],
        "ms": sum(row["ms"] for row in operations.values()),
        "peak_memory": peak_memory(call, setup.device),
    }


def aggregator_kernels(setup: Setup, heads: int, queries: int, tokens: int) -> dict[str, Any]:
    """The aggregator's attention of 1024 channels, which is of training: queries learn, tokens are detached."""
    batch, size = 64, 1024
    if setup.dry_run:
        batch, size, queries, tokens = 2, 32, min(queries, 4), 5
    options: Any = {"device": setup.device, "dtype": torch.bfloat16}
    query = torch.randn(1, heads, queries, size // heads, **options, requires_grad=True)
    keys = torch.randn(batch, tokens, heads, size // heads, **options).transpose(1, 2)

    def forward() -> torch.Tensor:
        return aggregate_tokens(query, keys, keys)

    forward_only = torch.no_grad()(forward)
    return {
        "forward": attention_of(forward_only, setup),
        "both": attention_of(lambda: forward().sum().backward(), setup),
    }


def few_blocks(setup: Setup, size: str) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Four blocks of a model that prunes, pixels, and labels."""
    image_size, rate = (32, 1) if setup.dry_run else (224, 8) if size == "large" else (512, 40)
    config = CroprViTConfig.from_size(
        smaller(setup, size),
        num_hidden_layers=3 if setup.dry_run else 4,
        image_size=image_size,
        patch_size=16,
        pruning_rate=rate,
        num_labels=1000,
    )
    torch.manual_seed(0)
    model = pruning_candidates(config)["cropr"]
    batch_size = 2 if setup.dry_run else 8
    return model, torch.randn(batch_size, 3, image_size, image_size), torch.arange(batch_size)


def against_cpu(setup: Setup, size: str) -> dict[str, Any]:
    """Relative difference of logits from those of the CPU in float32."""
    model, pixels, _ = few_blocks(setup, size)
    differences = {}
    with torch.inference_mode():
        expected = model.eval()(pixels).logits
        for dtype in (torch.float32, torch.bfloat16):
            logits = model.to(setup.device, dtype)(pixels.to(setup.device, dtype)).logits.float().cpu()
            differences[str(dtype).removeprefix("torch.")] = float((logits - expected).norm() / expected.norm())
    if not differences["float32"] < 1e-3:
        raise RuntimeError(f"Logits on {setup.device} differ from those on the CPU: {differences}, relative norms.")
    return {"differences": differences}


def backbone_kernels(setup: Setup, size: str, name: str) -> dict[str, Any]:
    """Attention of the backbone, head size 64, in bfloat16; and the difference of its logits from those of sdpa."""
    if name == "flash_attention_2" and library("flash_attn") is None:
        raise NotInstalledError("flash_attn")
    model, pixels, labels = few_blocks(setup, size)
    model.to(setup.device, torch.bfloat16).eval()
    pixels, labels = pixels.to(setup.device, torch.bfloat16), labels.to(setup.device)

    @torch.no_grad()
    def forward() -> torch.Tensor:
        return model(pixels).logits.float()

    expected = forward()
    model.set_attn_implementation(name)
    difference = float((forward() - expected).norm() / expected.norm())
    both = attention_of(lambda: model(pixels, labels=labels).loss.backward(), setup)
    return {"difference_from_sdpa": difference, "forward": attention_of(forward, setup), "both": both}


def library(name: str) -> str | None:
    """Its version, if it is installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def smaller(setup: Setup, size: str) -> str:
    """The smallest size of the family in a dry run."""
    return size.replace("large", "tiny") if setup.dry_run else size


def setting(setup: Setup, size: str, batch_size: int, **fields: Any) -> BenchmarkArguments:
    """ViT-L 224 R 8 or EVA-02-L 512 R 40, in bfloat16."""
    image_size, rate = (224, 8) if size == "large" else (512, 40)
    rounds = {"min_rounds": 30, "max_rounds": 60} if batch_size == 1 else {"min_rounds": 6, "max_rounds": 12}
    if setup.dry_run:
        image_size, rate, batch_size = 32, 1, {1: 1, 64: 2, 256: 3}.get(batch_size, 2)
        fields["config"] = {**fields.get("config", {}), "num_hidden_layers": 3}
        rounds = {"min_rounds": 3, "max_rounds": 3}
        fields |= {"cuda_graph": False, "compile": False, "alternatives": False}
    return BenchmarkArguments(
        size=smaller(setup, size),
        image_size=image_size,
        pruning_rate=rate,
        batch_size=batch_size,
        config=json.dumps({"patch_size": 16, **fields.pop("config", {})}),
        device=setup.device,
        dtype="bfloat16",
        **rounds | fields,
    )


def benchmark(arguments: BenchmarkArguments) -> dict[str, Any]:
    """The benchmark, with half the batch as long as memory is short."""
    asked = arguments.batch_size
    while True:
        try:
            return {"asked_batch_size": asked, **shortened(run(arguments))}
        except torch.OutOfMemoryError:
            if arguments.batch_size == 1:
                raise
        gc.collect()  # out of the `except`, where the error still holds what it was raised in
        torch.cuda.empty_cache()
        logger.info("Out of memory with %d images; half of them is next.", arguments.batch_size)
        arguments = replace(arguments, batch_size=arguments.batch_size // 2)


def speed(setup: Setup) -> list[Job]:
    """ViT-L and EVA-02-L against unpruned, random, Transformers' and timm's: eager, and as CUDA graphs."""
    return [
        Job(
            f"{size}, {batch_size}, {'CUDA graph' if graph else 'eager'}",
            30 if (size, batch_size) == ("eva02_large", 256) else 15,
            functools.partial(
                benchmark,
                setting(
                    setup, size, batch_size, references=True, cuda_graph=graph, profile=not graph and batch_size < 256
                ),
            ),
        )
        for graph in (False, True)
        for size in (("large",) if graph and setup.dry_run else ("large", "eva02_large"))
        for batch_size in ((1,) if setup.dry_run else (1, 64, 256))
    ]


def training(setup: Setup) -> list[Job]:
    """Forward and backward, with memory, and the optimizer's step apart."""
    segmenter = "semantic_segmentation"
    cases: list[tuple[str, str, int, dict[str, Any]]] = [
        ("large, 64", "large", 64, {}),
        ("large, 64, checkpointing", "large", 64, {"activation_checkpointing": True}),
        ("eva02_large, 8, presence", "eva02_large", 8, {"task": segmenter}),
        ("eva02_large, 8, patches", "eva02_large", 8, {"task": segmenter, "config": {"auxiliary_task": "patches"}}),
    ]
    jobs = [
        Job(name, 15, functools.partial(benchmark, setting(setup, size, batch_size, training=True, **fields)))
        for name, size, batch_size, fields in cases
    ]
    return [*jobs, Job("large, optimizer", 15, functools.partial(optimizer_step, setup))]


def optimizer_step(setup: Setup) -> dict[str, Any]:
    """The step of fused AdamW: auxiliary heads and aggregators have parameters as well."""
    depth = {"num_hidden_layers": 3} if setup.dry_run else {}
    config = CroprViTConfig.from_size(smaller(setup, "large"), pruning_rate=8, num_labels=1000, **depth)
    with torch.device(setup.device):
        models, calls = pruning_candidates(config, training=True), {}
    for name, model in models.items():
        model.to(setup.device, torch.bfloat16)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        calls[name] = torch.optim.AdamW(parameters, lr=1e-5, fused=True).step
    counts = {name: model.num_parameters(only_trainable=True) for name, model in models.items()}
    return {"parameters": counts, **turns(calls, setup.device, (3, 3) if setup.dry_run else (10, 20))}


def detector(setup: Setup) -> list[Job]:
    """The detector of the paper on 1536 pixels."""
    fields: dict[str, Any] = {"size": "eva02_large_detection", "min_rounds": 6, "max_rounds": 12}
    if setup.dry_run:
        tiny = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}
        tiny |= {"patch_size": 8, "pyramid_channels": 8, "anchor_sizes": [4, 8, 12, 16, 24], "box_head_size": 16}
        tiny |= {"num_proposals": 20, "rois_per_image": 8, "detections_per_image": 5, "num_labels": 3}
        fields = {"size": "tiny", "image_size": 32, "pruning_rate": 3, "config": json.dumps(tiny)}
        fields |= {"min_rounds": 3, "max_rounds": 3}
    fields |= {"task": "object_detection", "device": setup.device, "dtype": "bfloat16"}
    arguments = functools.partial(BenchmarkArguments, **fields)
    training_step = {"training": True, "activation_checkpointing": True}
    cases: dict[str, dict[str, Any]] = {"1": {}, "1, training": training_step, "8": {"batch_size": 8}}
    if setup.dry_run:
        del cases["8"]
    return [
        Job(name, 30, functools.partial(benchmark, arguments(**{"batch_size": 1, **case})))
        for name, case in cases.items()
    ]


def compiled(setup: Setup) -> list[Job]:
    """By torch.compile; and what one would do instead of pruning."""
    cases: dict[str, tuple[float, str, int, dict[str, Any]]] = {
        "large, 64, compiled": (80, "large", 64, {"compile": True}),
        "large, 64, alternatives": (50, "large", 64, {"alternatives": True}),
        "eva02_large, 64, compiled": (100, "eva02_large", 64, {"compile": True}),
        "large, 1, alternatives": (50, "large", 1, {"alternatives": True}),
        "large, 1, compiled": (80, "large", 1, {"compile": True}),
    }
    return [
        Job(name, seconds, functools.partial(benchmark, setting(setup, size, batch_size, **fields)))
        for name, (seconds, size, batch_size, fields) in list(cases.items())[: 1 if setup.dry_run else None]
    ]


PARTS = (
    Part("kernels", 60, kernels),
    Part("tests", 150, tests),
    Part("speed", 200, speed),
    Part("training", 70, training),
    Part("detector", 70, detector),
    Part("flex", 60, flex),
    Part("compiled", 400, compiled),
)


# --------------------------------------------------------------------------------------------------------------------
# Running them
# --------------------------------------------------------------------------------------------------------------------


def run_part(part: Part, setup: Setup) -> None:
    """Runs the jobs of a part in this process, as far as the time goes, and writes their results after each."""
    start_logging()
    results: list[dict[str, Any]] = []
    for job in part.jobs(setup):
        begin = time.monotonic()
        if setup.left < job.seconds and not setup.dry_run:
            result = {
                "status": SKIPPED,
                "reason": f"takes about {job.seconds:.0f} s; {max(0, setup.left):.0f} were left",
            }
        else:
            result = attempt(job)
        result = {"name": job.name, "seconds": round(time.monotonic() - begin, 1), **result}
        results.append(result)
        write_json(setup.folder / f"{part.name}.json", results)
        logger.info("%s: %s: %s, %.1f s", part.name, job.name, result["status"], result["seconds"])
        gc.collect()
        if setup.device == "cuda":
            torch.cuda.empty_cache()


def attempt(job: Job) -> dict[str, Any]:
    """What became of a job."""
    try:
        return {"status": DONE, "record": job.call()}
    except NotInstalledError as error:
        return {"status": NOT_INSTALLED, "reason": str(error)}
    except Exception:
        logger.exception(job.name)
        return {"status": FAILED, "traceback": traceback.format_exc()}


def supervise(part: Part, setup: Setup, start_method: str) -> dict[str, Any]:
    """Runs a part in a process of its own within its limit and what time is left; says what became of it."""
    begin, limit = time.monotonic(), setup.left if setup.dry_run else min(part.limit, setup.left)
    if limit <= 0:
        return {"status": SKIPPED, "seconds": 0.0, "jobs": {}}
    own = replace(setup, deadline=begin + limit)
    process: Any = multiprocessing.get_context(start_method).Process(target=run_part, args=(part, own))
    process.start()
    process.join(limit + GRACE)
    status = DONE
    if process.is_alive():
        process.kill()
        process.join()
        status = STOPPED
        logger.info("%s: stopped, as a job takes %.0f s longer than its part may", part.name, GRACE)
    elif process.exitcode:
        status = FAILED
        logger.info("%s: the process ended with %s", part.name, process.exitcode)
    path = setup.folder / f"{part.name}.json"
    jobs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    if any(job["status"] == FAILED for job in jobs):
        status = FAILED
    seconds = round(time.monotonic() - begin, 1)
    return {"status": status, "seconds": seconds, "jobs": {job["name"]: job["status"] for job in jobs}}


def find_start_method(device: str) -> str:
    """Forked processes start at once, but cannot use CUDA if something that was imported has started it."""
    process: Any = multiprocessing.get_context("fork").Process(
        target=torch.zeros, args=(1,), kwargs={"device": device}
    )
    process.start()
    process.join(60)
    return "spawn" if process.exitcode else "fork"


def start_logging() -> None:
    """Progress on stderr."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    transformers_logging.disable_progress_bar()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=RECORDS, help="for the records (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=8.0, help="that all of it may take (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", default=[part.name for part in PARTS], help="default: %(default)s")
    parser.add_argument("--dry_run", action="store_true", help="tiny models on the CPU, to see that everything runs")
    args = parser.parse_args(arguments)
    names = [part.name for part in PARTS]
    if unknown := [name for name in args.parts if name not in names]:
        raise ValueError(f"--parts has {', '.join(unknown)}; choose among {', '.join(names)}.")
    if not 0 < args.minutes < 1440:
        raise ValueError(f"--minutes is {args.minutes}; it must be more than 0 and less than 1440, such as 8.")
    if not args.dry_run and not torch.cuda.is_available():
        raise ValueError("torch finds no CUDA device; pass --dry_run to go through everything on the CPU.")
    start_logging()
    args.folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    setup = Setup(args.folder, "cpu" if args.dry_run else "cuda", begin + 60 * args.minutes, args.dry_run)
    start_method, summary = find_start_method(setup.device), {}
    chosen = [part for part in PARTS if part.name in args.parts]
    for part in chosen:
        write_json(setup.folder / f"{part.name}.json", [])  # nothing of another run
    for part in chosen:
        summary[part.name] = supervise(part, setup, start_method)
        write_json(setup.folder / "summary.json", summary)
        logger.info("%s took %.0f s; %.0f s are left", part.name, summary[part.name]["seconds"], setup.left)
    failed = [name for name, result in summary.items() if result["status"] == FAILED]
    logger.info("%.0f s in all; failed: %s", time.monotonic() - begin, ", ".join(failed) or "nothing")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
