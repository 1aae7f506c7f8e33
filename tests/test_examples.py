"""The examples, run as a user runs them, on tiny data and a tiny random ViT."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, ViTImageProcessor

import cropr_hf


EXAMPLES = Path(cropr_hf.__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def example():
    """Imports a script of the examples folder by name."""
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def tiny_vit(tmp_path_factory) -> str:
    """A folder with a random plain ViT and its image processor."""
    torch.manual_seed(0)
    folder = str(tmp_path_factory.mktemp("vit"))
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48, image_size=48, patch_size=8
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 48, "width": 48}).save_pretrained(folder)
    return folder


def digits_command(tiny_vit: str, output_dir: Path, **kwargs) -> list[str]:
    fields = {
        "model_name_or_path": tiny_vit,
        "dataset_name": "cluttered_digits",
        "pruning_rate": 10,
        "max_train_samples": 32,
        "max_eval_samples": 16,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "output_dir": str(output_dir),
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return [part for key, value in {**fields, **kwargs}.items() for part in (f"--{key}", str(value))]


def history(output_dir: Path) -> list[dict]:
    return json.loads((output_dir / "trainer_state.json").read_text())["log_history"]


@pytest.fixture(scope="module")
def trained(example, tiny_vit, tmp_path_factory) -> Path:
    """The script's whole recipe, augmentation, mixup and all, on cluttered digits."""
    folder = tmp_path_factory.mktemp("trained")
    metrics = example("train_image_classification").main(digits_command(tiny_vit, folder))
    assert 0 <= metrics["eval_accuracy"] <= 1
    return folder


class TestTrainImageClassification:
    def test_the_result_is_stripped_and_loads_through_the_auto_class(self, trained):
        model = AutoModelForImageClassification.from_pretrained(trained)
        assert type(model).__name__ == "CroprViTForImageClassification"
        assert not any("auxiliary" in name for name in model.state_dict())
        assert model.config.id2label == {digit: str(digit) for digit in range(10)}
        assert (trained / "preprocessor_config.json").exists()

    def test_loss_parts_are_in_the_log_history(self, trained):
        logs = [entry for entry in history(trained) if "loss" in entry]
        assert len(logs) == 8
        for entry in logs:
            parts = entry["main_loss"] + entry["auxiliary_loss_1"] + entry["auxiliary_loss_2"]
            assert entry["loss"] == pytest.approx(parts, abs=2e-3)

    def test_resuming_repeats_the_uninterrupted_run(self, example, tiny_vit, trained, tmp_path):
        checkpoint = trained / "checkpoint-4"
        command = digits_command(tiny_vit, tmp_path, resume_from_checkpoint=str(checkpoint))
        example("train_image_classification").main(command)
        assert [e["loss"] for e in history(tmp_path) if "loss" in e] == [
            e["loss"] for e in history(trained) if "loss" in e
        ]

    def test_a_published_model_is_trained_further(self, example, trained, tmp_path):
        command = digits_command(str(trained), tmp_path, num_train_epochs=1)
        example("train_image_classification").main(command)
        assert "auxiliary_loss_1" in history(tmp_path)[0]

    @pytest.mark.parametrize("reducer", ["none", "random"])
    def test_baselines_train_alike(self, example, tiny_vit, tmp_path, reducer):
        kwargs = {} if reducer == "random" else {"pruning_rate": None}
        command = digits_command(tiny_vit, tmp_path, token_reducer=reducer, num_train_epochs=1, **kwargs)
        if reducer == "none":
            position = command.index("--pruning_rate")
            del command[position : position + 2]
        example("train_image_classification").main(command)
        assert AutoModelForImageClassification.from_pretrained(tmp_path).config.token_reducer == (
            None if reducer == "none" else "random"
        )

    def test_image_folders(self, example, tiny_vit, tmp_path):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / name
            folder.mkdir(parents=True)
            for index in range(6):
                pixels = np.random.default_rng(index).integers(0, 255, (40, 60, 3), np.uint8)
                Image.fromarray(pixels).convert("L" if index % 2 else "RGB").save(folder / f"{index}.png")
        command = digits_command(tiny_vit, tmp_path / "out", num_train_epochs=1, train_dir=str(tmp_path / "images"))
        del command[2:4]  # the data set name
        example("train_image_classification").main(command)
        assert AutoModelForImageClassification.from_pretrained(tmp_path / "out").config.id2label == {
            0: "cat",
            1: "dog",
        }

    def test_wrong_arguments_say_what_to_do(self, example, tiny_vit, tmp_path):
        script = example("train_image_classification")
        with pytest.raises(ValueError, match="--dataset_name"):
            script.main(["--model_name_or_path", tiny_vit, "--output_dir", str(tmp_path), "--use_cpu", "True"])
        with pytest.raises(ValueError, match="at most"):
            script.main(digits_command(tiny_vit, tmp_path, pruning_rate=100))

    def test_two_processes_by_accelerate(self, tiny_vit, tmp_path):
        """`accelerate launch` with two CPU processes (gloo)."""
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
        launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        launch += ["--main_process_port", "0"]
        script = str(EXAMPLES / "train_image_classification.py")
        command = digits_command(tiny_vit, tmp_path, num_train_epochs=1, per_device_train_batch_size=4)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run([*launch, script, *command], capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr[-3000:]
        logs = [entry for entry in history(tmp_path) if "loss" in entry]
        assert len(logs) == 4  # 32 images, 2 processes of 4
        assert all("auxiliary_loss_2" in entry for entry in logs)
        assert AutoModelForImageClassification.from_pretrained(tmp_path).config.use_auxiliary_heads is False


def test_evaluation_in_a_fresh_process_with_picture(example, tiny_vit, tmp_path):
    model = cropr_hf.CroprViTForImageClassification.from_vit(tiny_vit, pruning_rate=10, num_labels=10)
    model.save_pretrained(tmp_path)
    ViTImageProcessor.from_pretrained(tiny_vit).save_pretrained(tmp_path)
    command = [sys.executable, str(EXAMPLES / "evaluate_image_classification.py"), "--max_samples", "20"]
    command += ["--model_name_or_path", str(tmp_path), "--picture", str(tmp_path / "pruning.png")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert 0 <= json.loads(result.stdout.splitlines()[-1])["accuracy"] <= 1
    with Image.open(tmp_path / "pruning.png") as picture:
        assert picture.format == "PNG"


def test_the_demo_prints_its_table(tiny_vit, tmp_path):
    """The workflow of `make demo` with a random ViT and a handful of images."""
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--pretrained", tiny_vit, "--output_dir", str(tmp_path)]
    command += ["--pruning_schedule", "30", "20", "15", "15", "--train_images", "64", "--test_images", "32"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = re.findall(r"^\| (\S+) \| ([\d.]+) % \| (\d+) of 36 \|", result.stdout, flags=re.MULTILINE)
    assert [(name, left) for name, _, left in rows] == [("unpruned", "36"), ("Cropr", "15"), ("random", "15")]
    assert (tmp_path / "pruning.png").stat().st_size > 10_000
