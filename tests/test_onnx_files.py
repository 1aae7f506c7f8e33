"""Exported files timed against one another, as ONNX Runtime runs them."""

import json
from pathlib import Path

import pytest
import torch

from cropr_hf.cli import main
from cropr_hf.speed import onnx_files
from cropr_hf.speed.instruments import cpu_threads
from cropr_hf.speed.onnx_files import FILE, REFERENCE, compare_files
from cropr_hf.speed.timing import Timing
from tests.test_export import needs_onnx


pytestmark = needs_onnx
FEW = {"min_rounds": 3, "max_rounds": 3}


def write_file(path: Path, batch: int | str = "batch", shape=(3, 8, 8), dtype: str = "FLOAT", inputs: int = 1) -> Path:
    """A file that returns its first input."""
    from onnx import TensorProto, helper, save

    kind = getattr(TensorProto, dtype)
    pixels = [helper.make_tensor_value_info(f"pixels{index}", kind, [batch, *shape]) for index in range(inputs)]
    same = helper.make_tensor_value_info("same", kind, [batch, *shape])
    graph = helper.make_graph([helper.make_node("Identity", ["pixels0"], ["same"])], "same", pixels, [same])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_both_files_get_the_same_pixels_in_turn(tmp_path, monkeypatch):
    calls = []

    class Session:
        """Each file by its own, with what it was called with."""

        def __init__(self, path):
            self.path = path

        def run(self, names, feed):
            calls.append((self.path.name, feed["pixels"]))

    monkeypatch.setattr(onnx_files, "_open", Session)
    monkeypatch.setattr(onnx_files, "_input", lambda *_: ("pixels", [3, 8, 8]))
    for name in ("pruned.onnx", "plain.onnx"):
        (tmp_path / name).write_bytes(b"12345")
    (tmp_path / "plain.onnx.data").write_bytes(b"67")
    record = compare_files(tmp_path / "pruned.onnx", tmp_path / "plain.onnx", batch_size=2, **FEW)
    names = [name for name, _ in calls]
    assert [names.count(name) for name in ("pruned.onnx", "plain.onnx")] == [4, 4]  # once to warm up
    assert all({*names[start : start + 2]} == {"pruned.onnx", "plain.onnx"} for start in range(0, 8, 2))
    assert all(pixels is calls[0][1] for _, pixels in calls) and calls[0][1].shape == (2, 3, 8, 8)
    assert (record["rounds"], record["batch_size"], record["input"]) == (3, 2, {"pixels": [3, 8, 8]})
    results = record["results"]
    assert [results[name]["name"] for name in (REFERENCE, FILE)] == ["plain.onnx", "pruned.onnx"]
    assert [results[name]["bytes"] for name in (REFERENCE, FILE)] == [7, 5] and results[REFERENCE]["speedup"] == 1
    assert {"machine", "versions"} <= {*record} and "onnxruntime" in record["versions"]


def test_a_timing_says_what_records_say():
    timing = Timing([0.5, 0.25, 1.0], speedup=2.0, spread=0.1)
    assert timing.record(4) == {
        "images_per_second": 8.0,
        "speedup": 2.0,
        "spread": 0.1,
        "p50_ms": 500.0,
        "p99_ms": None,  # of three calls
    }
    assert Timing([0.5] * 100).record(1)["p99_ms"] == 500


def test_the_command_writes_a_record_and_prints_a_table(tmp_path, capsys):
    file, reference = (write_file(tmp_path / name) for name in ("pruned.onnx", "plain.onnx"))
    before = torch.get_num_threads()
    command = ["benchmark", "--file", file, "--reference", reference, "--batch_size", 2, "--threads", 1]
    command += ["--min_rounds", 3, "--max_rounds", 3, "--output", tmp_path / "record.json"]
    assert main([*map(str, command)]) == 0
    printed = capsys.readouterr().out
    assert "| plain.onnx (reference) |" in printed and "| pruned.onnx (file) |" in printed
    assert "3 rounds of 2 images" in printed and "1 threads" in printed
    record = json.loads((tmp_path / "record.json").read_text())
    assert [*record["results"]] == [REFERENCE, FILE] and record["results"][FILE]["p50_ms"] > 0
    assert str(tmp_path) not in json.dumps(record)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("fields", "arguments", "reason"),
    [
        ({"shape": (3, 16, 8)}, {}, r"inputs differ: .*file.onnx takes .*\[3, 16, 8\].*reference.onnx takes .*8, 8"),
        ({"shape": (3, "height", 8)}, {}, "file.onnx takes .*images of any size; export it for one size"),
        ({"shape": (8, 8)}, {}, "file.onnx takes .*one float32 tensor of pixels with four dimensions"),
        ({"dtype": "FLOAT16"}, {}, r"takes pixels0: tensor\(float16\).*one float32 tensor"),
        ({"inputs": 2}, {}, "takes pixels0: .*pixels1: .*one float32 tensor"),
        ({"batch": 4}, {}, "takes 4 images per call, not 8; pass `batch_size` 4"),
        ({}, {"batch_size": 0}, "`batch_size` is 0"),
        ({}, {"min_rounds": 2}, "`min_rounds` 2"),
    ],
)
def test_files_that_cannot_be_compared_are_errors(fields, arguments, reason, tmp_path):
    file = write_file(tmp_path / "file.onnx", **fields)
    with pytest.raises(ValueError, match=reason):
        compare_files(file, write_file(tmp_path / "reference.onnx"), **arguments)


def test_a_fixed_batch_is_taken(tmp_path):
    file = write_file(tmp_path / "file.onnx", batch=4)
    assert compare_files(file, file, batch_size=4, **FEW)["results"][FILE]["images_per_second"] > 0


@pytest.mark.parametrize(("content", "reason"), [(None, "is not a file"), ("{}", "cannot be run as an ONNX file")])
def test_what_is_not_onnx_is_an_error(content, reason, tmp_path):
    if content is not None:
        (tmp_path / "model.onnx").write_text(content)
    for pair in (("model.onnx", "good.onnx"), ("good.onnx", "model.onnx")):
        write_file(tmp_path / "good.onnx")
        with pytest.raises(ValueError, match=f"model.onnx {reason}"):
            compare_files(*(tmp_path / name for name in pair))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--file", "a.onnx"], "--file is timed against --reference; give both"),
        (["--reference", "a.onnx"], "--file is timed against --reference; give both"),
        (["--compile", "--size", "small"], "leave out --size, --compile"),
        (["--sweep", "batch_size=1", "--plot", "a.png", "--update_record"], "out --update_record, --sweep, --plot"),
        (["--output", "nowhere/record.json"], "no folder nowhere"),
        (["--output", "a.onnx"], "a.onnx is to be written, but is an input as well"),
        (["--threads", "0"], "`threads` is 0; give 1 or more"),
        ([], "b.onnx is not a file"),
    ],
)
def test_failures_of_the_command(options, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = (
        [] if options and options[0] in ("--file", "--reference") else ["--file", "a.onnx", "--reference", "b.onnx"]
    )
    assert main(["benchmark", *files, *options]) == 1
    assert reason in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == []


def test_threads_are_as_before_afterwards():
    before = torch.get_num_threads()
    with cpu_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    with cpu_threads(None):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before
