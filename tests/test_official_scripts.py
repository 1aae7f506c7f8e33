"""The official example scripts of Transformers, unchanged, in processes of their own, on local data.

They are not part of its releases: clone the repository at the tag of the scripts, and name their folder.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor

import cropr_hf


EXAMPLES = os.environ.get("TRANSFORMERS_EXAMPLES")
SCRIPTS_FOLDER = Path(EXAMPLES or ".").resolve()
OWN_EXAMPLES = Path(cropr_hf.__file__).parents[1] / "examples"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        EXAMPLES is None,
        reason="set TRANSFORMERS_EXAMPLES to the folder examples/pytorch of a clone of huggingface/transformers "
        "(docs/official_scripts.md says how)",
    ),
]

# Task -> script, and its arguments beside the common ones.
SCRIPTS = {
    "image_classification": (
        "image-classification/run_image_classification",
        ["--train_dir", "digit_folders/train", "--validation_dir", "digit_folders/validation"],
    ),
    "semantic_segmentation": (
        "semantic-segmentation/run_semantic_segmentation",
        ["--dataset_name", "digits/label_maps"],
    ),
    "object_detection": (
        "object-detection/run_object_detection",
        ["--dataset_name", "digits/boxes", "--image_square_size", "128"],
    ),
}
MODEL_CLASSES = {
    "image_classification": cropr_hf.CroprViTForImageClassification,
    "semantic_segmentation": cropr_hf.CroprViTForSemanticSegmentation,
    "object_detection": cropr_hf.CroprViTForObjectDetection,
}
# Numbers that each script has to have computed.
METRICS = {
    "image_classification": {"eval_accuracy"},
    "semantic_segmentation": {"eval_mean_iou", "eval_iou_background"},
    "object_detection": {"test_map", "test_mar_100_9"},
}


def run(folder: Path, command: list[str]) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_CACHE": "hub"}
    environment |= {"HF_DATASETS_CACHE": "cache", "HF_MODULES_CACHE": "modules", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Data sets and untrained models, as the example writes them."""
    folder = tmp_path_factory.mktemp("official")
    counts = ["--train_images", "32", "--eval_images", "8"]
    run(folder, [str(OWN_EXAMPLES / "official_scripts.py"), "--output_dir", ".", *counts])
    return folder


def assert_learned(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    """Both have every auxiliary weight, and none is as it was: that is the doing of the auxiliary losses."""
    assert before.keys() == after.keys() and len(before) == 3 * 5
    assert not any(torch.equal(before[name], after[name]) for name in before)


def assert_close_to(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    """Two steps of Adam apart at most, where new heads would be many. (The data differ: augmentation is random.)"""
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=4e-3, rtol=0)


def auxiliary_weights(folder: Path) -> dict[str, torch.Tensor]:
    weights = load_file(folder / "model.safetensors")
    return {name: tensor for name, tensor in weights.items() if "auxiliary_head" in name or ".queries" in name}


def check_stripped(folder: Path) -> None:
    assert not auxiliary_weights(folder)
    assert json.loads((folder / "config.json").read_text())["use_auxiliary_heads"] is False
    assert AutoConfig.from_pretrained(folder / "training_config").use_auxiliary_heads


def check_loads(folder: Path, task: str) -> None:
    """With the code that lies beside it as with the package."""
    model_class = MODEL_CLASSES[task]
    model = model_class.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    loader = f"""
import torch, transformers
model = transformers.AutoModelFor{model_class.__name__.split("For")[1]}.from_pretrained(".", trust_remote_code=True)
processor = transformers.AutoImageProcessor.from_pretrained(".", trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
pixels = torch.linspace(-1, 1, 3 * 96 * 96).view(1, 3, 96, 96)
torch.save((model(pixels).logits.detach(), type(processor).__name__), "logits.pt")
"""
    run(folder, ["-c", loader])
    logits, processor_name = torch.load(folder / "logits.pt")
    pixels = torch.linspace(-1, 1, 3 * 96 * 96).view(1, 3, 96, 96)
    torch.testing.assert_close(model(pixels).logits, logits)
    assert type(processor).__name__ == processor_name


@pytest.mark.parametrize("task", SCRIPTS)
def test_scripts_with_the_trainer(task, folder):
    script, arguments = SCRIPTS[task]
    start, output = f"models/{task}", folder / "with_trainer" / task
    command = [f"{SCRIPTS_FOLDER}/{script}.py", *arguments, "--trust_remote_code", "True", "--do_train", "--do_eval"]
    command += ["--model_name_or_path", start, "--config_name", f"{start}/training_config"]
    command += ["--output_dir", str(output)]
    command += ["--remove_unused_columns", "False", "--eval_do_concat_batches", str(task != "object_detection")]
    command += ["--learning_rate", "1e-3", "--max_steps", "4", "--save_steps", "2", "--logging_steps", "1"]
    run(folder, command)

    check_stripped(output)
    check_loads(output, task)
    state = json.loads((output / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(losses) == 4 and torch.tensor(losses).isfinite().all()
    results = json.loads((output / "all_results.json").read_text())
    assert results.keys() >= METRICS[task]
    checkpoints = [output / f"checkpoint-{step}" for step in (2, 4)]
    assert_learned(*map(auxiliary_weights, checkpoints))

    # The last two steps again, from the checkpoint.
    resumed = folder / "resumed" / task
    command[command.index(str(output))] = str(resumed)
    run(folder, [*command, "--resume_from_checkpoint", str(checkpoints[0])])
    again = json.loads((resumed / "trainer_state.json").read_text())["log_history"]
    assert [entry["loss"] for entry in again if "loss" in entry][:2] == losses[:2]
    assert_close_to(auxiliary_weights(checkpoints[0]), auxiliary_weights(resumed / "checkpoint-4"))
    check_stripped(resumed)


@pytest.mark.parametrize("task", SCRIPTS)
def test_scripts_without_the_trainer(task, folder):
    """They have no `--config_name`; a complete checkpoint keeps its auxiliary heads."""
    script, arguments = SCRIPTS[task]
    if task == "image_classification":  # this one goes by its default data set if there is only a folder
        arguments = ["--dataset_name", "digit_folders"]
    start, output = f"models/{task}_complete", folder / "without_trainer" / task
    command = [f"{SCRIPTS_FOLDER}/{script}_no_trainer.py", *arguments, "--trust_remote_code", "--seed", "0"]
    command += ["--model_name_or_path", start, "--output_dir", str(output)]
    command += ["--max_train_steps", "4", "--checkpointing_steps", "2"]
    command += ["--dataloader_num_workers", "0"] if task == "object_detection" else []
    run(folder, command)

    check_stripped(output)
    results = json.loads((output / "all_results.json").read_text())
    assert results.keys() >= METRICS[task] - {"eval_iou_background"}
    states = [output / f"step_{step}" for step in (2, 4)]
    assert_learned(*map(auxiliary_weights, states))

    # The last two steps again.
    resumed = folder / "resumed_without_trainer" / task
    command[command.index(str(output))] = str(resumed)
    run(folder, [*command, "--resume_from_checkpoint", str(states[0])])
    assert_close_to(auxiliary_weights(states[0]), auxiliary_weights(resumed / "step_4"))
    check_stripped(resumed)
