"""The command `cropr-hf`: what it writes, and how it fails."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
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
from tests.common import TASKS, assert_close_relative, make_images
from tests.test_composites import build_rf_detr
from tests.test_training import tiny_model


COMMANDS = ("convert", "strip", "diff", "export", "benchmark", "visualize", "card", "schedule")
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
    assert dict(processor.size) == {"height": 48, "width": 48} and processor.do_convert_rgb
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
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").glob("*.*")}
    file = tmp_path / "out" / "model.pt2"
    assert run("export", tmp_path / "out", file, "--image_size", 48) == 1
    assert "out has another preprocessor_config.json" in capsys.readouterr().err and not file.exists()
    assert run("export", tmp_path / "out", file, "--image_size", 32) == 0  # its own size
    file.unlink()
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").glob("*.*")} == before


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
    assert "holds CroprRfDetrForObjectDetection, not a `CroprViT*` model" in capsys.readouterr().err


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


def test_images_are_opened_as_everywhere(checkpoint, tmp_path, monkeypatch, capsys):
    """Turned, of 16 bits, in a folder with brackets and stray files; and broken ones are named."""
    folder = tmp_path / "photos [1]"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
    Image.fromarray(grey).save(folder / "a.png", exif=exif)
    Image.fromarray(np.rot90(257 * grey.astype(np.uint16), 3).copy()).save(folder / "b.png")
    for name in (".DS_Store", "Thumbs.db", "._a.png"):
        (folder / name).write_bytes(b"\0")

    def find_schedule(model, speedup, latency, shape, pixel_values, calibration, multiple):
        (turned, deep), *others = calibration
        raise ValueError(f"they are equal: {torch.equal(turned, deep) and not others}")

    monkeypatch.setattr(cli, "find_schedule", find_schedule)
    options = ["schedule", checkpoint, "--target_speedup", 1.5, "--batch_size", 2, "--calibration"]
    assert run(*options, folder) == 1 and "they are equal: True" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    monkeypatch.undo()
    assert run(*options, tmp_path / "empty") == 1 and "empty, in which there is no image" in capsys.readouterr().err
    pytest.importorskip("matplotlib")
    (folder / "c.png").write_bytes((folder / "a.png").read_bytes()[:60])
    assert run("visualize", checkpoint, folder / "c.png", "--output", tmp_path / "pruning.png") == 1
    assert "c.png cannot be read as an image" in capsys.readouterr().err


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


def test_card_links_a_space(checkpoint, tmp_path, capsys):
    run("strip", checkpoint, tmp_path / "out")
    link = "Try it: [me/try](https://huggingface.co/spaces/me/try)"
    card = tmp_path / "out" / "README.md"
    assert "Try it" not in card.read_text(encoding="utf-8")
    assert run("card", tmp_path / "out", "--space", "me/try") == 0
    assert link in card.read_text(encoding="utf-8").splitlines()
    assert run("card", tmp_path / "out", "--license", "mit") == 0  # it stays
    before = card.read_text(encoding="utf-8")
    assert link in before
    assert run("card", tmp_path / "out", "--space", "https://me.hf.space") == 1
    assert "The Space is 'https://me.hf.space'; give its Hub id" in capsys.readouterr().err
    assert card.read_text(encoding="utf-8") == before


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["strip", "nowhere/at-all", "out"], "nowhere/at-all is neither a folder"),
        (["card", "missing"], "missing is neither a folder"),
        (["benchmark", "--update_record"], "--model_name_or_path"),
        (["benchmark", "--task", "poetry"], "poetry"),
        (["convert", "nowhere/at-all", "out"], "nowhere/at-all"),
        (["convert", "x", "out", "--config", "{"], "which is not valid JSON (Expecting property name"),
        (["convert", "x", "out", "--config", "{"], "; write it as '{\"pruning_rate\": 8}'"),
        (["convert", "x-ray", "out"], "looks like 'owner/name'; correct the name"),
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


@pytest.fixture
def wrong_folders(vit, checkpoint, tmp_path, monkeypatch):
    """In the working directory: folders that hold no model, or not the one that a command takes."""
    monkeypatch.chdir(tmp_path)
    for name, config in {"empty": None, "unknown": "{}", "broken": "{", "weightless": None}.items():
        (tmp_path / name).mkdir()
        if config is not None:
            (tmp_path / name / "config.json").write_text(config)
    Path("file.txt").write_text("text")
    shutil.copy(vit / "config.json", "weightless")
    shutil.copytree(vit, "vit")
    shutil.copytree(checkpoint, "headless")
    Path("headless/model.safetensors").unlink()
    Image.new("RGB", (8, 8)).save("photo.png")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("convert empty out", "that this release of Transformers knows .*; name the folder or repository of one of"),
        ("convert unknown out", "that this release of Transformers knows .*; name the folder or repository of one of"),
        ("convert broken out", r"`config\.json` of broken is not valid JSON .*; save the model again"),
        ("convert weightless out", "found in directory weightless.* Save the model in weightless again, or give"),
        ('convert vit out --config {"dtype":"float33"}', "make no configuration .*float33.*; give each a value"),
        ('convert vit out --config {"id2label":3}', "make no configuration .*; give each a value"),
        ('convert vit file.txt/out --config {"pruning_rate":2}', "'file.txt/out': .*; give another path"),
        ("strip empty out", "empty holds no model whose class is known, not .*; name what `save_pretrained` of one"),
        ("strip file.txt out", "file.txt is a file; name the folder of a model, or a Hub id"),
        ("strip vit out", "vit holds ViT.*, not a .*; name what .*`cropr-hf convert` makes one"),
        ("strip broken out", r"`config\.json` of broken is not valid JSON .*; save the model again"),
        ("strip headless out", "found in directory headless.* Save the model in headless again, or give"),
        ("visualize vit photo.png --output out.png", "vit holds ViT.*, not a .*; name what"),
        ("visualize file.txt photo.png --output out.png", "file.txt is a file; name the folder of a model"),
    ],
)
def test_wrong_folders_and_values_are_named_with_a_remedy(arguments, reason, wrong_folders, capsys):
    assert main(arguments.split()) == 1
    assert re.search(reason, capsys.readouterr().err)
    assert not Path("out.png").exists() and not Path("out").exists()


def test_images_that_make_no_batch_are_refused_and_unnormalised_ones_drawn_as_they_are(checkpoint, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    shutil.copytree(checkpoint, tmp_path / "model")
    ViTImageProcessor(do_resize=False, do_normalize=False).save_pretrained(tmp_path / "model")
    photos = [tmp_path / "small.png", tmp_path / "large.png"]
    for photo, size in zip(photos, (32, 64)):
        Image.new("RGB", (size, size)).save(photo)
    assert run("visualize", tmp_path / "model", *photos, "--output", tmp_path / "out.png") == 1
    assert "makes no batch of 2 images (" in capsys.readouterr().err
    assert run("visualize", tmp_path / "model", photos[0], "--output", tmp_path / "out.png") == 0
    with Image.open(tmp_path / "out.png") as picture:
        assert (0, 0, 0) in {colour for _, colour in picture.convert("RGB").getcolors(2**24)}  # it was black


def test_no_output_replaces_an_input_or_a_file_of_a_model(checkpoint, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    photo = tmp_path / "photo.png"
    Image.new("RGB", (50, 20), "red").save(photo)
    run("strip", checkpoint, tmp_path / "out")
    config, weights = tmp_path / "out" / "config.json", tmp_path / "out" / "model.safetensors"
    (tmp_path / "link.json").symlink_to(config)
    (tmp_path / "link.png").symlink_to(photo)
    (tmp_path / "link.onnx").symlink_to(weights)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    model = ["--model_name_or_path", tmp_path / "out"]
    for command in (
        ["visualize", tmp_path / "out", photo, "--output", photo],
        ["visualize", tmp_path / "out", photo, "--output", tmp_path / "out" / ".." / "photo.png"],
        ["visualize", tmp_path / "out", photo, "--output", tmp_path / "link.png"],
        ["benchmark", *model, "--output", config],
        ["benchmark", *model, "--output", tmp_path / "link.json"],
        ["benchmark", "--output", tmp_path / "new.svg", "--plot", tmp_path / "new.svg"],
        ["schedule", *TINY, "--output", tmp_path / "out" / "record.json"],
        ["export", tmp_path / "out", tmp_path / "link.onnx"],
    ):
        assert run(*command) == 1
        assert re.search("is an input as well|is a file of a model", capsys.readouterr().err)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_picture_that_cannot_be_written_leaves_the_old_one(checkpoint, tmp_path, monkeypatch, capsys):
    figure = pytest.importorskip("matplotlib.figure").Figure
    picture, photo = tmp_path / "pruning.png", tmp_path / "photo.png"
    for file in (picture, photo):
        Image.new("RGB", (32, 32), "red").save(file)
    before = {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}

    def savefig(self, path, **kwargs):
        Path(path).write_bytes(b"half a pict")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", savefig)
    assert run("visualize", checkpoint, photo, "--output", picture) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before


def test_a_card_that_cannot_be_made_changes_nothing(checkpoint, tmp_path, monkeypatch, capsys):
    run("strip", checkpoint, tmp_path / "out")
    record, card = tmp_path / "out" / "record.json", tmp_path / "out" / "README.md"
    for text in ('{"model": {}}', '{"model": []}', "[]", "{", "\udcff"):
        record.write_bytes(text.encode("utf-8", "surrogateescape"))
        before = card.read_bytes(), record.read_bytes()
        assert run("card", tmp_path / "out", "--license", "mit") == 1
        assert "record.json" in capsys.readouterr().err and (card.read_bytes(), record.read_bytes()) == before


@pytest.mark.parametrize("config", ["", "[]", "null", '{"architectures": 5}', '{"model_type": []}'])
def test_a_folder_with_a_foreign_configuration_is_named(config, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(config)
    for command in (
        ["convert", source, tmp_path / "out"],
        ["strip", source, tmp_path / "out"],
        ["visualize", source, "photo.png", "--output", tmp_path / "pruning.png"],
        ["export", source, tmp_path / "model.pt2"],
        ["card", source],
    ):
        assert run(*command) == 1
        assert str(source) in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == [source] and len([*source.iterdir()]) == 1


@pytest.fixture
def fail_with(monkeypatch):
    """Runs a command that raises an error."""

    def run_failing(error: BaseException) -> int:
        def command(args):
            raise error

        parser = SimpleNamespace(parse_args=lambda arguments: Namespace(function=command))
        monkeypatch.setattr(cli, "build_parser", lambda: parser)
        return main([])

    return run_failing


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("There are no images."), "There are no images."),
        (OSError(28, "No space left on device"), "No space left on device"),
        (FileNotFoundError(2, "No such file", "a/b"), "'a/b': No such file; give another path"),
        (KeyError("weights"), "KeyError: 'weights' (test_cli.py, line "),
        (IndexError(0), "IndexError: 0 (test_cli.py, line "),
        (AssertionError(), "AssertionError: no reason (test_cli.py, line "),
        (AttributeError("'list' object has no attribute 'get'"), "'list' object has no attribute 'get'"),
        (ImportError("Pictures need matplotlib."), "Pictures need matplotlib."),
        (MemoryError(), "There is too little memory; take fewer"),
        (torch.OutOfMemoryError("CUDA out of memory."), "a smaller model. CUDA out of memory."),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "There is too little memory; take fewer"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_every_error_is_one_reason_and_no_traceback(error, reason, fail_with, capsys):
    assert fail_with(error) == 1
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("cropr-hf: ") and reason in output.err
    assert "Traceback" not in output.err


def test_interrupts_and_readers_that_left_have_their_own_codes(fail_with, monkeypatch, capsys):
    assert fail_with(KeyboardInterrupt()) == 130 and capsys.readouterr().err == "cropr-hf: interrupted\n"
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert fail_with(BrokenPipeError()) == 141
        print("This goes nowhere.", file=stdout, flush=True)


def test_signs_that_a_terminal_does_not_know_are_no_failure(monkeypatch):
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding="ascii"))
    parser = SimpleNamespace(parse_args=lambda arguments: Namespace(function=lambda args: "1.5 ± 0.1"))
    monkeypatch.setattr(cli, "build_parser", lambda: parser)
    assert main([]) == 0 and output.getvalue().strip() == b"1.5 ? 0.1"


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
