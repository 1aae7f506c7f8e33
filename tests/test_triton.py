"""Folders for Triton's model repository: its schema reads the configuration, and the file computes what it says."""

import json
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoImageProcessor, ViTImageProcessor

from cropr_hf.cli import main
from cropr_hf.publishing import triton
from cropr_hf.publishing.triton import export_for_triton
from tests.common import IMAGE_SIZE, NUM_LABELS, TASKS, assert_close_relative, full, make_images
from tests.test_export import MODELS, SHORT, needs_onnx, outputs_of, run_file


pytestmark = needs_onnx
needs_triton = pytest.mark.skipif(find_spec("tritonclient") is None, reason="tritonclient[grpc] is not installed")
SIDES = {"rf_detr": 64}


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def parsed(folder: Path) -> Any:
    """The configuration as Triton reads it."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    text = (folder / triton.CONFIG).read_text(encoding="utf-8")
    return text_format.Parse(text, model_config_pb2.ModelConfig())


@needs_triton
@pytest.mark.parametrize(
    "name",
    full(
        "classification",
        "segmentation-eva02",
        "model-no_fusion",
        "backbone-rope_registers",
        "detection-windows",
        "rf_detr",
    ),
)
def test_the_configuration_fits_the_schema_and_the_file(name, tmp_path):
    from tritonclient.grpc import model_config_pb2

    model, side = MODELS[name](), SIDES.get(name, IMAGE_SIZE)
    export_for_triton(model, tmp_path, "tiny", max_batch_size=5)
    config = parsed(tmp_path / "tiny")
    assert (config.name, config.backend, config.max_batch_size) == ("tiny", "onnxruntime", 5)
    assert config.HasField("dynamic_batching")
    (pixels,) = config.input
    assert (pixels.name, [*pixels.dims]) == ("pixel_values", [3, side, side])
    images = make_images(5, side, side)
    outputs = run_file(tmp_path / "tiny" / "1" / "model.onnx", images)
    assert [output.name for output in config.output] == list(outputs)
    assert [tuple(output.dims) for output in config.output] == [tuple(tensor.shape[1:]) for tensor in outputs.values()]
    assert {tensor.data_type for tensor in (pixels, *config.output)} == {model_config_pb2.TYPE_FP32}
    assert_close_relative(outputs, outputs_of(name, model, images), 5e-5)
    assert config.output[0].label_filename == ("labels.txt" if name == "classification" else "")


@needs_triton
def test_any_name_is_written_as_the_schema_reads_it(tmp_path):
    name = 'say "ähm"\\'
    (tmp_path / name).mkdir()
    (tmp_path / name / triton.CONFIG).write_text(triton._config(onnx_file(tmp_path), name, 2, False), encoding="utf-8")
    assert parsed(tmp_path / name).name == name


def onnx_file(folder: Path) -> Path:
    """A file that returns its input, in no time."""
    from onnx import TensorProto, helper, save

    pixels, same = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3, 8, 8]) for name in ("pixel_values", "same")
    )
    graph = helper.make_graph([helper.make_node("Identity", ["pixel_values"], ["same"])], "same", [pixels], [same])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), folder / "model.onnx")
    return folder / "model.onnx"


@pytest.fixture
def quick(monkeypatch):
    """Exports that write a file of another model, in no time."""

    def export_model(model: Any, path: Path, *args: Any, **kwargs: Any) -> float:
        onnx_file(path.parent)
        return 0.25

    monkeypatch.setattr(triton, "export_model", export_model)


def test_what_lies_in_the_folder(quick, tmp_path):
    model = MODELS["classification"]()
    model.config.id2label = {index: f"a {index}\nb" for index in range(NUM_LABELS)}
    assert export_for_triton(model, tmp_path, "tiny", image_processor=ViTImageProcessor(size=IMAGE_SIZE)) == 0.25
    folder = tmp_path / "tiny"
    assert files_in(tmp_path) == [
        "tiny/1/model.onnx",
        "tiny/config.pbtxt",
        "tiny/labels.txt",
        "tiny/preprocessor_config.json",
    ]
    assert (folder / "labels.txt").read_text().splitlines() == [f"a {index} b" for index in range(NUM_LABELS)]
    assert AutoImageProcessor.from_pretrained(folder).size["height"] == IMAGE_SIZE
    # Of the older model nothing stays behind; what is not ours does.
    (folder / "notes.txt").write_text("mine")
    (folder / ".export_0").mkdir()  # a process was killed
    export_for_triton(TASKS["model"].build(**SHORT), tmp_path, "tiny", max_batch_size=3)
    assert files_in(folder) == ["1/model.onnx", "config.pbtxt", "notes.txt"]
    assert not (folder / ".export_0").exists()
    assert "max_batch_size: 3" in (folder / "config.pbtxt").read_text()


def test_a_failure_leaves_what_there_was(quick, tmp_path, monkeypatch):
    model = MODELS["classification"]()
    export_for_triton(model, tmp_path, "old")
    before = {file: (tmp_path / file).read_bytes() for file in files_in(tmp_path)}

    def fail(*args: Any) -> str:
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(triton, "_config", fail)
    for name in ("old", "new"):
        with pytest.raises(RuntimeError, match="disk is full"):
            export_for_triton(TASKS["model"].build(**SHORT), tmp_path, name)
    assert {file: (tmp_path / file).read_bytes() for file in files_in(tmp_path)} == before
    assert os.listdir(tmp_path) == ["old"] and sorted(os.listdir(tmp_path / "old")) == [
        "1",
        "config.pbtxt",
        "labels.txt",
    ]


@pytest.mark.parametrize(
    ("repository", "name", "arguments", "reason"),
    [
        (".", "", {}, "name is ''; give that of one folder"),
        (".", "a/b", {}, "name is 'a/b'"),
        (".", "..", {}, r"name is '\.\.'"),
        ("nowhere", "tiny", {}, "no folder .*nowhere; make it first"),
        (".", "tiny", {"max_batch_size": 0}, "`max_batch_size` is 0; give 1 or more"),
        (".", "other", {}, "other is there, but is not a model for Triton"),
        (".", "file", {}, "file is there, but is not a model for Triton"),
        (".", "versions", {}, "has a version 10 of the model, which Triton would serve"),
        (".", "tiny", {"image_size": 30}, "30; give a multiple of the patch size 8"),
    ],
)
def test_what_cannot_be_written_is_an_error(repository, name, arguments, reason, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").touch()
    for version in ("1", "9", "10"):
        (tmp_path / "versions" / version).mkdir(parents=True)
    (tmp_path / "versions" / "config.pbtxt").touch()
    before = files_in(tmp_path)
    with pytest.raises(ValueError, match=reason):
        export_for_triton(MODELS["classification"](), tmp_path / repository, name, **arguments)
    assert files_in(tmp_path) == before and sorted(os.listdir(tmp_path)) == ["file", "other", "versions"]


def test_the_command_writes_a_folder(quick, tmp_path, capsys, monkeypatch):
    model = TASKS["classification"].build(**SHORT)
    model.save_pretrained(tmp_path / "model")
    ViTImageProcessor(size=IMAGE_SIZE).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    os.mkdir("models")
    command = ["export", "model", "models/digits", "--for", "triton", "--batch_size", "4", "--image_size", "48"]
    assert main(command) == 0
    assert re.search("models/digits holds the model; their outputs differ by 0.25", capsys.readouterr().out)
    config = Path("models/digits/config.pbtxt").read_text()
    assert 'name: "digits"' in config and "max_batch_size: 4" in config
    assert json.loads(Path("models/digits/preprocessor_config.json").read_text())["size"]["height"] == 48
    assert main([*command[:2], "nowhere/digits", *command[3:]]) == 1
    assert "there is no folder" in capsys.readouterr().err
