"""The check of everything on a GPU, gone through with tiny models on the CPU."""

import importlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "docs" / "speed" / "gpu_check.py"
PARTS = {"kernels", "tests", "speed", "training", "detector", "flex", "compiled"}


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    sys.path.insert(0, str(SCRIPT.parent))
    yield importlib.import_module(SCRIPT.stem)
    sys.path.remove(str(SCRIPT.parent))


@pytest.fixture
def setup(script, tmp_path):
    return script.Setup(tmp_path, "cpu", time.monotonic() + 100, dry_run=False)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """What a dry run leaves in its folder."""
    folder = tmp_path_factory.mktemp("gpu")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(folder), "--dry_run", "--minutes", "60"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-5000:]
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in folder.iterdir()}


@pytest.mark.full
def test_a_dry_run_goes_through_every_part(records):
    assert set(records) == {*PARTS, "summary"} and set(records["summary"]) == PARTS
    assert {part["status"] for part in records["summary"].values()} == {"done"}
    statuses = {(job["name"], job["status"]) for name in PARTS for job in records[name]}
    missing = {name for name, status in statuses if status != "done"}
    assert all("flash_attention_2" in name for name in missing)
    by_name = {job["name"]: job.get("record") for name in PARTS for job in records[name]}
    assert by_name["machine"]["versions"]["torch"] == torch.__version__
    forward = by_name["large, sdpa"]["forward"]
    assert forward["taken"] == ["flash"] and forward["peak_memory"] > 0 and forward["operations"]
    assert by_name["large, eager"]["both"]["taken"] == ["plain products"]
    assert by_name["aggregator, 1 heads of 1024, 1 queries"]["both"]["taken"]
    for job in [*records["speed"], *records["detector"], *records["compiled"], *records["training"][:4]]:
        assert {"unpruned", "cropr", "random"} <= set(job["record"]["results"]), job["name"]
    assert "transformers ViT" in by_name["large, 1, eager"]["results"]
    optimizer = by_name["large, optimizer"]
    assert optimizer["parameters"]["cropr"] > optimizer["parameters"]["unpruned"]


@pytest.mark.full
def test_its_records_become_tables(records, render):
    tables = render.PAGES["docs/gpu.md"].values()
    for table, names in tables:
        text = table(*(records[name.rpartition("/")[2]] for name in names))
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert len(rows) > 2 and len({row.count("|") for row in rows}) == 1, text
    names = {name.rpartition("/")[2] for _, records_of_it in tables for name in records_of_it}
    assert names == {*PARTS, "summary"} - {"tests"}  # whose outcome is in the summary


def fail():
    raise RuntimeError("no such kernel")


@pytest.mark.full
def test_what_fails_is_recorded_and_the_others_go_on(script, setup):
    def not_there():
        raise script.NotInstalledError("flash_attn")

    jobs = [script.Job("bad", 1, fail), script.Job("long", 1000, fail), script.Job("absent", 1, not_there)]
    jobs.append(script.Job("good", 1, lambda: {"answer": 42}))
    script.run_part(script.Part("some", 10, lambda setup: jobs), setup)
    bad, long, absent, good = json.loads((setup.folder / "some.json").read_text(encoding="utf-8"))
    assert bad["status"] == "failed" and "RuntimeError: no such kernel" in bad["traceback"]
    assert long["status"] == "skipped" and "takes about 1000 s" in long["reason"]
    assert absent["status"] == "not installed" and absent["reason"] == "flash_attn"
    assert good["status"] == "done" and good["record"] == {"answer": 42}


@pytest.mark.full
def test_parts_that_fail_die_or_hang_do_not_stop_the_next(script, tmp_path, monkeypatch):
    parts = {
        "fails": [script.Job("job", 1, fail)],
        "dies": [script.Job("job", 1, lambda: {}), script.Job("last", 1, lambda: os._exit(3))],
        "hangs": [script.Job("job", 0, lambda: time.sleep(1000))],
        "works": [script.Job("job", 1, lambda: {})],
    }
    monkeypatch.setattr(script, "GRACE", 0.2)
    for name, jobs in parts.items():
        part = script.Part(name, 0.1 if name == "hangs" else 50, lambda setup, jobs=jobs: jobs)
        setup = script.Setup(tmp_path, "cpu", time.monotonic() + 100, dry_run=False)
        parts[name] = script.supervise(part, setup, "fork")
    assert {name: found["status"] for name, found in parts.items()} == {
        "fails": "failed",
        "dies": "failed",
        "hangs": "stopped",
        "works": "done",
    }
    assert parts["dies"]["jobs"] == {"job": "done"}  # what was there stays
    monkeypatch.setattr(script, "PARTS", (script.Part("fails", 50, lambda setup: [script.Job("job", 1, fail)]),))
    assert script.main([str(tmp_path), "--dry_run"]) == 1
    assert json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))["fails"]["status"] == "failed"


@pytest.mark.parametrize(
    ("code", "output", "expected"),
    [
        (0, "PASSED tests/a.py::test_one\nPASSED tests/a.py::test_two\n2 passed in 1.00s\n", ["one", "two"]),
        (1, "FAILED tests/a.py::test_one\n1 failed in 1.00s\n", RuntimeError),
        (2, "ModuleNotFoundError: No module named 'datasets'\n", "NotInstalledError"),
    ],
)
def test_outcomes_of_tests(script, setup, code, output, expected, monkeypatch):
    process = subprocess.CompletedProcess([], code, stdout=output, stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: process)
    if isinstance(expected, list):
        record = script.run_tests(setup, Path("tests/a.py"))
        assert record["passed"] == [f"tests/a.py::test_{name}" for name in expected]
        assert record["last_line"] == "2 passed in 1.00s"
    else:
        with pytest.raises(getattr(script, str(expected), RuntimeError), match=r"datasets|1 failed"):
            script.run_tests(setup, Path("tests/a.py"))


@pytest.mark.full
def test_batches_are_halved_until_they_fit(script, monkeypatch):
    def run(arguments):
        if arguments.batch_size > 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"batch_size": arguments.batch_size}

    monkeypatch.setattr(script, "run", run)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    arguments = script.BenchmarkArguments(batch_size=256)
    assert script.benchmark(arguments) == {"asked_batch_size": 256, "batch_size": 64}
    monkeypatch.setattr(script, "run", lambda arguments: run(replace(arguments, batch_size=65)))
    with pytest.raises(torch.OutOfMemoryError):
        script.benchmark(arguments)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parts", "speeds"], "--parts has speeds; choose among kernels, tests"),
        (["--minutes", "0"], "--minutes is 0.0; it must be more than 0"),
        ([], "no CUDA device; pass --dry_run"),
    ],
)
def test_wrong_arguments_say_what_to_do(script, words, message, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        script.main([str(tmp_path), *words])
