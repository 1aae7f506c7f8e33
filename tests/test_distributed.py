"""Training on many devices, by two processes on the CPU, and what makes training fit: accumulation, precision, ..."""

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import cropr_hf
from cropr_hf import CroprViTForImageClassification
from cropr_hf.saving import strip_state_dict
from cropr_hf.training import CroprTrainer
from tests.common import assert_close_relative, free_port
from tests.distributed_worker import CURRICULUM, TAUGHT, WatchSchedule, losses, make_trainer, result
from tests.test_training import ColouredSquares, tiny_model


ROOT = Path(cropr_hf.__file__).parents[1]
CONFIGS = ROOT / "examples" / "recipes" / "accelerate"
WORKER = Path(__file__).parent / "distributed_worker.py"
LOSS_TOLERANCE = 1e-4
WEIGHT_TOLERANCE = 2e-4  # after 8 steps of up to 1e-3
LOG_TOLERANCE = 1.5e-4  # logged parts have four decimals

# Sharding is for devices: these let Accelerate (see the worker) and DeepSpeed do it on the CPU.
SHARDED = {"CPU_AS_DEVICES": "1", "DS_ACCELERATOR": "cpu"}


def launch(folder: Path, config: str, *scenarios: str, **environment: str) -> dict[str, Any]:
    """Two processes by `accelerate launch`; what they found, by scenario."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config)]
    command += ["--num_machines", "1", "--num_processes", "2", "--main_process_port", str(free_port())]
    # "cpu" instead of "cpu:0", to which the oldest supported torch does not load optimizers
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_TORCH_DEVICE": "cpu"}
    environment["PYTHONPATH"] = str(ROOT)  # the worker is a script, and imports from the tests
    process = subprocess.run(
        [*command, str(WORKER), str(folder), *scenarios], capture_output=True, text=True, env=os.environ | environment
    )
    assert process.returncode == 0, process.stderr[-5000:]
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in scenarios}


def train(folder: Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The same in this process."""
    trainer = make_trainer(folder, *args, **kwargs)
    trainer.train()
    return result(trainer)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["losses"].keys() == expected["losses"].keys()
    for name, values in expected["losses"].items():
        assert len(values) == 8
        tolerance = LOSS_TOLERANCE if name == "loss" else LOG_TOLERANCE
        assert found["losses"][name] == pytest.approx(values, rel=0, abs=tolerance), name
    assert found["weights"].keys() == expected["weights"].keys()
    for name, tensor in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], tensor, rtol=0, atol=WEIGHT_TOLERANCE, msg=name)


def assert_publishes(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """`folder` is stripped, and computes what a model with the complete `weights` does."""
    stored = load_file(folder / "model.safetensors")
    complete = tiny_model(drop_path_rate=0.0).eval()
    expected = strip_state_dict(weights, complete.config)
    assert stored.keys() == expected.keys() != weights.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(stored[name], tensor, rtol=0, atol=1e-6, msg=name)
    complete.load_state_dict(weights)
    published = CroprViTForImageClassification.from_pretrained(folder)
    assert published.config.use_auxiliary_heads is False
    assert published.config.architectures == ["CroprViTForImageClassification"]
    pixels = torch.stack([ColouredSquares()[index]["pixel_values"] for index in range(4)])
    with torch.no_grad():
        assert_close_relative(published(pixels).logits, complete(pixels).logits)


@pytest.fixture(scope="module")
def classification(tmp_path_factory) -> dict[str, Any]:
    """One process, for comparison."""
    return train(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def ddp(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ddp")
    return folder / "ddp", launch(folder, "ddp_8_gpus.yaml", "ddp")["ddp"]


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("fsdp")
    return folder, launch(folder, "fsdp2_2x8_gpus.yaml", "fsdp", "fsdp_sharded", "fsdp_tasks", **SHARDED)


class TestConfigurations:
    @pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
    def test_accelerate_reads_them_and_knows_every_key(self, file):
        config = load_config_from_file(str(file))
        known = {action.dest for action in launch_command_parser()._actions}
        assert {*config.fsdp_config, *config.deepspeed_config} <= known
        machines, processes = re.search(r"(?:(\d+)x)?(\d+)_gpus", file.stem + "_1_gpus").groups()
        assert config.num_machines == int(machines or 1)
        assert config.num_processes == int(machines or 1) * int(processes)

    def test_the_layers_to_shard_are_those_of_the_model(self):
        config = load_config_from_file(str(CONFIGS / "fsdp2_2x8_gpus.yaml")).fsdp_config
        assert config["fsdp_version"] == 2 and config["fsdp_state_dict_type"] == "FULL_STATE_DICT"
        names = {type(module).__name__ for module in tiny_model().modules()}
        assert set(config["fsdp_transformer_layer_cls_to_wrap"].split(",")) <= names

    def test_the_page_names_files_that_exist(self):
        page = (ROOT / "docs" / "many_gpus.md").read_text(encoding="utf-8")
        assert all(f"`{file.name}`" in page for file in CONFIGS.glob("*.yaml"))
        files = set(re.findall(r"examples/[\w/]+\.(?:py|yaml)", page))
        files |= {f"examples/recipes/accelerate/{name}" for name in re.findall(r"\$ACCELERATE/([\w.]+)", page)}
        assert len(files) > 6 and all((ROOT / file).is_file() for file in files)


@pytest.mark.full
class TestTwoProcesses:
    @pytest.mark.parametrize("trainer_class", [Trainer, CroprTrainer])
    @pytest.mark.parametrize("task", ["classification", "segmentation"])
    def test_they_train_as_one_does_with_the_same_batches(self, task, trainer_class, ddp, tmp_path):
        """For the parts of the loss this also means that they are means over the processes."""
        expected = train(tmp_path, task, trainer_class)
        assert ("auxiliary_loss_2" in expected["losses"]) is (trainer_class is CroprTrainer)
        assert_same(ddp[1][f"{task}, {trainer_class.__name__}"], expected)

    @pytest.mark.parametrize("task", TAUGHT)
    def test_they_learn_from_a_teacher_as_one_does(self, task, ddp, tmp_path):
        expected = train(tmp_path, task)
        assert "distillation_embedding" in expected["losses"]
        assert_same(ddp[1][task], expected)

    def test_the_logged_parts_belong_to_the_logged_loss(self, ddp):
        """With losses that differ between the processes."""
        found = ddp[1]["uneven_segmentation, CroprTrainer"]["losses"]
        names = ("loss", "main_loss", "auxiliary_loss_1", "auxiliary_loss_2")
        for total, *parts in zip(*(found[name] for name in names)):
            assert total == pytest.approx(sum(parts), rel=0, abs=3 * LOG_TOLERANCE)

    def test_the_curriculum_is_the_same_in_each_and_goes_on(self, ddp, tmp_path):
        watch = WatchSchedule()
        expected = train(tmp_path, callbacks=[CURRICULUM, watch])
        assert ddp[1]["kept"] == watch.kept
        assert watch.kept[0] == 16 and len(set(watch.kept)) > 2
        assert_same(ddp[1]["curriculum"], expected)
        assert_same(ddp[1]["resumed"], expected)

    def test_checkpoints_are_complete_and_what_is_published_is_stripped(self, ddp):
        folder, results = ddp
        weights = results["curriculum"]["weights"]
        checkpoint = load_file(folder / "whole" / "checkpoint-8" / "model.safetensors")
        assert checkpoint.keys() == weights.keys()
        assert all(torch.equal(checkpoint[name], tensor) for name, tensor in weights.items())
        assert_publishes(folder / "whole", weights)

    def test_a_detector_trains_where_one_of_them_sees_no_object(self, ddp):
        found = ddp[1]["instance_segmentation"]
        assert len(found["losses"]["loss"]) == 4
        assert all(torch.isfinite(tensor).all() for tensor in found["weights"].values())


class TestAccumulation:
    @pytest.mark.parametrize("task", ["classification", pytest.param("segmentation", marks=pytest.mark.full)])
    def test_it_trains_as_the_large_batch_does(self, task, tmp_path):
        """Where as many pixels of each image are labelled."""
        assert_same(train(tmp_path, task, gradient_accumulation_steps=2), train(tmp_path, task))

    @pytest.mark.full
    def test_each_forward_pass_counts_the_same_however_many_pixels_are_labelled(self, ddp, tmp_path):
        """As in two processes; a large batch counts pixels."""
        task = "uneven_segmentation"
        accumulated = train(tmp_path, task, gradient_accumulation_steps=2)
        assert_same(ddp[1][f"{task}, CroprTrainer"], accumulated)
        large = train(tmp_path, task)
        difference = torch.tensor(large["losses"]["loss"]) - torch.tensor(accumulated["losses"]["loss"])
        assert 1e-3 < difference.abs().max() < 0.1


@pytest.mark.full
class TestFsdp:
    @pytest.mark.parametrize("kind", ["fsdp", "fsdp_sharded"])
    def test_shards_train_and_resume_as_one_process_does(self, kind, fsdp, classification):
        results = fsdp[1][kind]
        assert results["kinds"] == ["DTensor"]
        assert_same(results["whole"], classification)
        assert Path(results["last"]).name == "checkpoint-8"
        if kind == "fsdp_sharded" and torch.__version__ < "2.9":
            pytest.skip("with torch 2.8 and transformers 5.10 another optimizer state comes back from shards")
        assert_same(results["resumed"], classification)

    def test_checkpoints_are_complete(self, fsdp):
        folder, results = fsdp
        weights = results["fsdp"]["whole"]["weights"]
        checkpoint = folder / "fsdp" / "whole" / "checkpoint-8"
        assert {"optimizer.bin", "pytorch_model_fsdp.bin"} < set(os.listdir(checkpoint))
        stored = load_file(checkpoint / "model.safetensors")
        assert stored.keys() == weights.keys()
        assert all(torch.equal(stored[name], tensor) for name, tensor in weights.items())
        checkpoint = folder / "fsdp_sharded" / "whole" / "checkpoint-8"
        assert {"optimizer_0", "pytorch_model_fsdp_0"} < set(os.listdir(checkpoint))

    @pytest.mark.parametrize("kind", ["fsdp", "fsdp_sharded"])
    def test_what_is_published_is_stripped_and_loads(self, kind, fsdp):
        folder, results = fsdp
        assert_publishes(folder / kind / "whole", results[kind]["whole"]["weights"])
        assert "FSDP" not in (folder / kind / "whole" / "README.md").read_text(encoding="utf-8")

    def test_evaluation(self, fsdp, classification):
        model = tiny_model(drop_path_rate=0.0).eval()
        model.load_state_dict(classification["weights"])
        examples = [ColouredSquares()[index] for index in range(64)]
        pixels = torch.stack([example["pixel_values"] for example in examples])
        labels = torch.tensor([example["labels"] for example in examples])
        with torch.no_grad():
            expected = model(pixels, labels=labels).loss.item()
        assert fsdp[1]["fsdp"]["eval_loss"] == pytest.approx(expected, abs=1e-4)

    def test_other_tasks(self, fsdp, ddp, tmp_path):
        results = fsdp[1]["fsdp_tasks"]
        assert_same(results["segmentation"], train(tmp_path, "segmentation", callbacks=[CURRICULUM]))
        assert_same(results["embedding"], train(tmp_path, "embedding"))
        found, expected = (each["instance_segmentation"]["losses"]["loss"] for each in (results, ddp[1]))
        assert found == pytest.approx(expected, abs=1e-3)

    @pytest.mark.slow
    def test_activation_checkpointing_more_shards_and_bfloat16(self, classification, tmp_path):
        results = launch(tmp_path, "fsdp2_2x8_gpus.yaml", "fsdp_checkpointing", "fsdp_modules", "fsdp_bf16", **SHARDED)
        assert_same(results["fsdp_checkpointing"]["whole"], classification)
        assert_same(results["fsdp_checkpointing"]["resumed"], classification)
        expected = train(tmp_path, "segmentation", callbacks=[CURRICULUM])
        assert_same(results["fsdp_modules"]["segmentation"], expected)
        whole, resumed = (results["fsdp_bf16"][name] for name in ("whole", "resumed"))
        assert resumed["losses"] == whole["losses"]
        assert whole["losses"]["loss"] == pytest.approx(classification["losses"]["loss"], abs=0.03)
        assert {tensor.dtype for tensor in whole["weights"].values()} == {torch.float32}
        for kind in ("fsdp_checkpointing", "fsdp_bf16"):
            assert_publishes(tmp_path / kind / "whole", results[kind]["whole"]["weights"])


@pytest.mark.full
def test_deepspeed_trains_publishes_and_resumes_as_one_process_does(classification, tmp_path):
    pytest.importorskip("deepspeed")
    results = launch(tmp_path, "deepspeed_zero2_8_gpus.yaml", "deepspeed", **SHARDED)["deepspeed"]
    assert_same(results["whole"], classification)
    assert_same(results["resumed"], classification)
    assert "latest" in os.listdir(tmp_path / "deepspeed" / "whole" / "checkpoint-8")
    assert_publishes(tmp_path / "deepspeed" / "whole", results["whole"]["weights"])


class TestPrecisionMemoryAndSpeed:
    def test_activation_checkpointing_changes_no_loss(self, classification, tmp_path):
        names = {field.name for field in fields(TrainingArguments)}
        name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
        trainer = make_trainer(tmp_path, **{name: True})
        trainer.train()
        assert trainer.model.cropr_vit.layers[0].gradient_checkpointing
        assert losses(trainer) == classification["losses"]
        for name, tensor in trainer.model.state_dict().items():
            assert torch.equal(tensor, classification["weights"][name]), name

    @pytest.mark.full
    def test_bfloat16_stays_near_float32_and_keeps_float32_weights(self, classification, tmp_path):
        found = train(tmp_path, bf16=True)
        assert found["losses"]["loss"] != classification["losses"]["loss"]
        assert found["losses"]["loss"] == pytest.approx(classification["losses"]["loss"], abs=0.03)
        assert {tensor.dtype for tensor in found["weights"].values()} == {torch.float32}

    @pytest.mark.full
    @pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
    def test_compiled_training_with_a_curriculum_equals_eager(self, backend, tmp_path):
        torch._dynamo.reset()
        expected = train(tmp_path, callbacks=[CURRICULUM])
        found = train(tmp_path, callbacks=[CURRICULUM], torch_compile=True, torch_compile_backend=backend)
        torch._dynamo.reset()
        assert found["losses"]["loss"] == pytest.approx(expected["losses"]["loss"], rel=0, abs=1e-4)

    @pytest.mark.full
    @pytest.mark.parametrize("task", TAUGHT)
    def test_a_compiled_model_learns_from_its_teacher(self, task, tmp_path):
        torch._dynamo.reset()
        expected = train(tmp_path, task)
        found = train(tmp_path, task, torch_compile=True, torch_compile_backend="eager")
        torch._dynamo.reset()
        for name, values in expected["losses"].items():
            assert found["losses"][name] == pytest.approx(values, rel=0, abs=LOG_TOLERANCE), name

    @pytest.mark.gpu
    def test_float16_stays_near_float32(self, tmp_path):
        expected, found = train(tmp_path, use_cpu=False), train(tmp_path, use_cpu=False, fp16=True)
        assert found["losses"]["loss"] == pytest.approx(expected["losses"]["loss"], abs=0.03)
        assert {tensor.dtype for tensor in found["weights"].values()} == {torch.float32}
