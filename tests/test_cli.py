"""The command `cropr-hf`: what it writes, and how it fails."""

import json
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
import torch
from common import TASKS, assert_close_relative, make_images
from PIL import Image
from test_composites import build_rf_detr
from test_training import tiny_model
from transformers import (
    AutoImageProcessor,
    SegformerImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from cropr_hf import CroprViTForImageClassification, CroprViTForObjectDetection, __version__, cli
from cropr_hf.cli import build_parser, main
from cropr_hf.publishing.model_card import read_record


COMMANDS = ("convert", "strip", "export", "benchmark", "visualize", "card", "schedule")
TINY = ("--size", "tiny", "--target_speedup", "1.5")
PROCESSOR = {"size": {"height": 32, "width": 32}}


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    """A plain ViT of Transformers, with its image processor."""
    folder = tmp_path_factory.mktemp("vit")
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
        num_labels=4,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(**PROCESSOR).save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """What the Trainer leaves behind: complete weights, and the image processor."""
    folder = tmp_path / "run" / "checkpoint-5"
    tiny_model().save_pretrained(folder)
    ViTImageProcessor(**PROCESSOR).save_pretrained(folder)
    return folder


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def test_convert_makes_a_folder_that_trains_and_prunes(vit, tmp_path):
    fields = {"pruning_rate": 4, "image_size": 48}
    assert run("convert", vit, tmp_path / "out", "--config", json.dumps(fields)) == 0
    model = CroprViTForImageClassification.from_pretrained(tmp_path / "out", use_auxiliary_heads=True)
    assert model.config.pruning_rate == 4 and model.config.num_patches == 36
    processor = ViTImageProcessor.from_pretrained(tmp_path / "out")
    assert dict(processor.size) == {"height": 48, "width": 48}
    assert read_record(tmp_path / "out")["model"]["base_model"] == vit.name


def test_convert_to_a_detector_with_code(vit, tmp_path, capsys):
    fields = {"pruning_rate": 4, "num_labels": 3, "pyramid_channels": 8, "box_head_size": 8}
    command = ["convert", vit, tmp_path / "out", "--task", "object_detection", "--with_code"]
    assert run(*command, "--config", json.dumps(fields)) == 0
    assert "its box heads keep 0.024 GB per image; a smaller `rois_per_image` than 512" in capsys.readouterr().out
    assert CroprViTForObjectDetection.from_pretrained(tmp_path / "out").config.num_labels == 3
    assert (tmp_path / "out" / "modeling_cropr_vit_detection.py").exists()
    stored = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert stored["image_processor_type"] == "CroprViTImageProcessor"
    assert (stored["pad_size"]["height"], stored["size"]["longest_edge"]) == (32, 32)


def test_convert_to_a_segmenter_that_the_pipeline_runs(vit, tmp_path):
    command = ["convert", vit, tmp_path / "out", "--task", "semantic_segmentation"]
    assert run(*command, "--config", json.dumps({"pruning_rate": 4, "image_size": [48, 32], "num_labels": 3})) == 0
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert isinstance(processor, SegformerImageProcessor) and dict(processor.size) == {"height": 48, "width": 32}
    source = ViTImageProcessor.from_pretrained(vit)
    assert [*processor.image_mean] == [*source.image_mean] and [*processor.image_std] == [*source.image_std]
    label_map = np.array([[0, 1], [2, 255]], np.uint8).repeat(20, 0).repeat(20, 1)
    inputs = processor(Image.new("RGB", (40, 40)), segmentation_maps=label_map, return_tensors="pt")
    assert inputs["labels"].shape == (1, 48, 32) and set(inputs["labels"].flatten().tolist()) == {0, 1, 2, 255}
    segments = pipeline("image-segmentation", str(tmp_path / "out"))(Image.new("RGB", (60, 40)))
    assert sum(np.asarray(segment["mask"]) > 0 for segment in segments).tolist() == [[1] * 60] * 40


def test_strip_keeps_the_outputs_and_the_record(checkpoint, tmp_path):
    (checkpoint / "record.json").write_text(json.dumps({"model": {}, "training": {"seed": 7}}))
    assert run("strip", checkpoint, tmp_path / "out") == 0
    whole = CroprViTForImageClassification.from_pretrained(checkpoint).eval()
    stripped = CroprViTForImageClassification.from_pretrained(tmp_path / "out")
    assert whole.config.use_auxiliary_heads and not stripped.config.use_auxiliary_heads
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert_close_relative(whole(images).logits, stripped(images).logits)
    assert read_record(tmp_path / "out")["training"] == {"seed": 7}
    assert (tmp_path / "out" / "preprocessor_config.json").exists()


@pytest.mark.parametrize("command", ["strip", "convert", "schedule"])
def test_a_checkpoint_stays_complete_by_whatever_path(command, checkpoint, tmp_path, capsys):
    (tmp_path / "latest").symlink_to(checkpoint)
    (tmp_path / "twin").symlink_to(tmp_path / "source")
    before = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    for source, target in (
        (checkpoint, checkpoint),
        (tmp_path / "source", tmp_path / "latest"),
        (tmp_path / "source", tmp_path / "run" / "checkpoint-7"),
        (tmp_path / "source", tmp_path / "twin"),
    ):
        options = ["--target_speedup", 1.1, "--save", target] if command == "schedule" else [target]
        assert run(command, source, *options) == 1
        assert f"{target} is the model itself, or where training resumes from" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in checkpoint.iterdir()} == before


def test_export_writes_what_the_model_computes_and_its_image_processor(checkpoint, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    file = tmp_path / "out" / "model.pt2"
    # The rate is one of 36 patches; the model has 16 at its own size.
    assert run("export", checkpoint, file, "--image_size", 48, "--pruning_rate", 8, "--batch_size", 1) == 0
    assert re.search(r"model\.pt2 holds the model; .* differ by \S+ \(mean, relative\)", capsys.readouterr().out)
    model = CroprViTForImageClassification.from_pretrained(checkpoint, use_auxiliary_heads=False)
    model.set_pruning(model.config.kept_patches(36, 8))
    processor = ViTImageProcessor.from_pretrained(tmp_path / "out")
    pixels = processor(Image.new("RGB", (60, 50), "red"), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 48, 48)
    with torch.no_grad():
        logits = torch.export.load(file).module()(pixels)["logits"]
        assert_close_relative(logits, model(pixels).logits, 5e-5)


@pytest.mark.full
def test_export_leaves_the_image_processor_of_another_model_alone(checkpoint, tmp_path, capsys):
    run("strip", checkpoint, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    file = tmp_path / "out" / "model.pt2"
    assert run("export", tmp_path / "out", file, "--image_size", 48) == 1
    assert "out has another preprocessor_config.json" in capsys.readouterr().err and not file.exists()
    assert run("export", tmp_path / "out", file, "--image_size", 32) == 0  # its own size
    file.unlink()
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


@pytest.mark.full
def test_export_of_a_detector_in_half_precision(vit, tmp_path):
    fields = {"pruning_rate": 4, "num_labels": 3, "pyramid_channels": 8, "box_head_size": 8}
    command = ["convert", vit, tmp_path / "detector", "--task", "object_detection", "--config", json.dumps(fields)]
    assert run(*command) == 0
    (tmp_path / "out").mkdir()
    file = tmp_path / "out" / "model.pt2"
    assert run("export", tmp_path / "detector", file, "--dtype", "bfloat16", "--image_size", 48) == 0
    stored = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert (stored["pad_size"]["height"], stored["size"]["longest_edge"]) == (48, 48)
    outputs = torch.export.load(file).module()(torch.zeros(3, 3, 48, 48))
    assert outputs["pyramid0"].shape == (3, 8, 24, 24) and outputs["pyramid0"].dtype == torch.float32


@pytest.mark.full
def test_export_of_rf_detr_at_another_rate(tmp_path, capsys):
    model = build_rf_detr(num_hidden_layers=3, out_features=["stage1", "stage2", "stage3"])
    model.save_pretrained(tmp_path / "detector")
    assert run("export", tmp_path / "detector", tmp_path / "model.pt2", "--pruning_rate", 20) == 0
    images = make_images(2, 64, 64)
    with torch.no_grad():
        boxes = torch.export.load(tmp_path / "model.pt2").module()(images)["pred_boxes"]
        model.set_pruning(20)
        assert_close_relative(boxes, model(images).pred_boxes, 5e-5)
        model.set_pruning(None)
        assert (boxes - model(images).pred_boxes).abs().max() > 1e-4
    assert run("strip", tmp_path / "detector", tmp_path / "out") == 1
    assert "holds a CroprRfDetrForObjectDetection, not a `CroprViT*` model" in capsys.readouterr().err


def test_benchmark_adds_to_the_record(checkpoint, tmp_path, capsys):
    run("strip", checkpoint, tmp_path / "out")
    command = ["benchmark", "--model_name_or_path", tmp_path / "out", "--batch_size", 1, "--min_rounds", 3]
    command += ["--max_rounds", 3, "--output", tmp_path / "record.json", "--update_record"]
    assert run(*command) == 0
    assert "| unpruned |" in capsys.readouterr().out
    record = json.loads((tmp_path / "record.json").read_text())
    throughput = read_record(tmp_path / "out")["throughput"]
    assert throughput["results"] == record["results"] and str(tmp_path) not in json.dumps(throughput)
    assert set(record["results"]) >= {"unpruned", "cropr", "random"}
    assert record["machine"] in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_benchmark_sweeps_over_arguments(checkpoint, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run("strip", checkpoint, tmp_path / "out")
    capsys.readouterr()
    command = ["benchmark", "--model_name_or_path", tmp_path / "out", "--min_rounds", 3, "--max_rounds", 3]
    command += ["--sweep", "batch_size=1,2", "dtype=bfloat16", "compile=false"]
    assert run(*command, "--output", tmp_path / "records.json", "--plot", tmp_path / "speed.png") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| batch_size | dtype | compile | unpruned images/s |") and len(lines) == 4
    records = json.loads((tmp_path / "records.json").read_text())
    assert [record["arguments"]["batch_size"] for record in records] == [1, 2]
    assert {record["arguments"]["dtype"] for record in records} == {"bfloat16"}
    assert Image.open(tmp_path / "speed.png").width > 100


@pytest.mark.parametrize("task", ["classification", "backbone"])
def test_visualize_draws_images_of_any_size(task, checkpoint, tmp_path):
    pytest.importorskip("matplotlib")
    TASKS[task].build().save_pretrained(checkpoint)
    for name, size in {"wide": (50, 20), "high": (16, 40)}.items():
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    images = [tmp_path / "wide.png", tmp_path / "high.png"]
    assert run("visualize", checkpoint, *images, "--output", tmp_path / "pruning.png") == 0
    assert Image.open(tmp_path / "pruning.png").width > 100


def test_calibration_has_the_size_that_is_timed(checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (50, 20), "red").save(tmp_path / "photos" / "wide.png")

    def find_schedule(model, speedup, latency, shape, pixel_values, calibration, multiple):
        raise ValueError(f"times {tuple(pixel_values.shape)}, scores {[tuple(batch.shape) for batch in calibration]}")

    monkeypatch.setattr(cli, "find_schedule", find_schedule)
    options = ["--image_size", 64, "--batch_size", 2, "--calibration", tmp_path / "photos"]
    assert run("schedule", checkpoint, "--target_speedup", 1.5, *options) == 1
    assert "times (2, 3, 64, 64), scores [(1, 3, 64, 64)]" in capsys.readouterr().err


def test_card_adds_metadata_and_makes_records_for_old_folders(checkpoint, tmp_path):
    run("strip", checkpoint, tmp_path / "out")
    for name in ("README.md", "record.json"):
        (tmp_path / "out" / name).unlink()
    assert run("card", tmp_path / "out", "--name", "me/squares", "--license", "mit", "--tags", "a", "b") == 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "# me/squares" in card and "license: mit" in card and "- b\n" in card
    assert run("card", tmp_path / "out", "--language", "en") == 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "license: mit" in card and "language: en" in card


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["strip", "nowhere/at-all", "out"], "nowhere/at-all is neither a folder"),
        (["card", "missing"], "missing is neither a folder"),
        (["benchmark", "--update_record"], "--model_name_or_path"),
        (["benchmark", "--task", "poetry"], "poetry"),
        (["convert", "nowhere/at-all", "out"], "nowhere/at-all"),
        (["convert", "x", "out", "--config", "{"], "--config"),
        (["benchmark", "--config", "[1]"], "--config"),
        (["export", "nowhere/at-all", "model.onnx"], "nowhere/at-all"),
        (["benchmark", "--sweep", "batch_size"], "such as batch_size=1,8,64"),
        (["benchmark", "--sweep", "poems=1"], "'poems' is not an argument"),
        (["benchmark", "--model_name_or_path", "x", "--sweep", "batch_size=1", "--update_record"], "--sweep"),
        (["benchmark", "--plot", "nowhere/speed.png"], "nowhere"),
        (["benchmark", "--batch_size", "0"], "batch_size"),
        (["benchmark", "--output", "nowhere/record.json"], "nowhere"),
        (["benchmark", "--model_name_or_path", "x", "--pruning_rate", "3", "--update_record"], "--pruning_rate"),
        (["benchmark", "--sweep", "batch_size=1", "batch_size=2"], "'batch_size' twice"),
        (["benchmark", "--sweep", "output=a,b"], "name it by --output"),
        (["benchmark", "--config", '{"pruning_rate": "x"}'], "'pruning_rate' with value 'x'"),
        (["schedule", *TINY, "--config", '{"pruning_rate": NaN}'], "'pruning_rate' with value nan"),
        (["schedule", *TINY, "--image_size", "0"], "`image_size` 0"),
        (["benchmark", "--output", "."], ". is to be written, but is not a file"),
        (["benchmark", "--plot", "."], ". is to be written, but is not a file"),
        (["schedule", *TINY, "--output", "."], ". is to be written, but is not a file"),
        (["visualize", "x", "y.png", "--output", "."], ". is to be written, but is not a file"),
        (["export", "x", "."], ". is to be written, but is not a file"),
    ],
)
def test_failures_say_why_and_exit_with_1(arguments, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    assert reason in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments_exit_with_2(capsys):
    for arguments in ([], ["strip"], ["strip", "a", "b", "--nonsense"], ["convert", "a", "b", "--task", "poetry"]):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 2
    assert "poetry" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    example = re.search(r"example:\n  cropr-hf (.+)$", text, flags=re.MULTILINE)[1]
    assert build_parser().parse_args([part.strip("'") for part in re.findall(r"'[^']*'|\S+", example)]).function
    undocumented = re.findall(r"^  --?[\w-]+(?: [A-Z_]+)?$\n(?=  -|\n|$)", text, flags=re.MULTILINE)
    assert undocumented == []


def test_it_is_installed_as_a_command():
    (entry,) = [entry for entry in entry_points(group="console_scripts") if entry.name == "cropr-hf"]
    assert entry.load() is main


@pytest.mark.full
def test_it_runs_as_a_module():
    result = subprocess.run(
        [sys.executable, "-m", "cropr_hf.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == __version__
