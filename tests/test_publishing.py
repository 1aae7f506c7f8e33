"""Publishing to a Hub, and what others get from it.

Each user is a process of their own, with a home of their own; the Hub is the small one of `tests.hub_server`. The
functions `publish`, `train_until_killed` and so on run in these processes.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, snapshot_download, upload_folder
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load
from transformers import AutoModelForImageClassification, TrainerCallback, ViTImageProcessor

from cropr_hf import CroprViTImageProcessor
from cropr_hf.publishing.hub import save_for_hub
from cropr_hf.training import CroprTrainer, PruningCurriculum
from tests.common import IMAGE_SIZE, TASKS, assert_close_relative, make_images
from tests.test_training import ColouredSquares, tiny_model, training_arguments


def start(server: Any, client: Callable, *arguments: Any, home: Path | None = None) -> subprocess.Popen:
    """A process that knows this Hub and calls a function of this file with arguments turned into strings."""
    return start_code(
        server,
        f"import sys; from tests.test_publishing import {client.__name__}; {client.__name__}(*sys.argv[1:])",
        *arguments,
        home=home,
    )


def start_code(server: Any, code: str, *arguments: Any, home: Path | None = None) -> subprocess.Popen:
    environment = server.environment | ({"HF_HOME": str(home)} if home else {})
    command = [sys.executable, "-c", code, *map(str, arguments)]
    root = Path(__file__).parents[1]
    return subprocess.Popen(command, env=environment, cwd=root, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen, returncode: int = 0) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == returncode, errors[-3000:]


def weights(repository: Any, path: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return load(repository.read(path))


def config(repository: Any, path: str = "config.json") -> dict[str, Any]:
    return json.loads(repository.read(path))


def is_stripped(repository: Any) -> bool:
    """Whether weights, configuration and training configuration of a repository say that it holds a stripped model."""
    heads = config(repository)["use_auxiliary_heads"]
    names = [name for name in weights(repository) if "auxiliary_head" in name or "aggregator" in name]
    assert heads == bool(names)
    return not heads and config(repository, "training_config/config.json")["use_auxiliary_heads"]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(make_images()).logits


def trained_model(seed: int = 0, task: str = "classification") -> Any:
    return TASKS[task].build(seed=seed, use_auxiliary_heads=True)


def publish(folder: str) -> None:
    assert HfApi().whoami()["name"] == "user"
    model = trained_model()
    model.push_to_hub("user/pushed")
    model.save_pretrained(f"{folder}/saved", push_to_hub=True, repo_id="user/saved", private=True)
    for token in (False, "hf_token_of_another"):
        with pytest.raises(OSError, match="user/saved"):
            AutoModelForImageClassification.from_pretrained("user/saved", token=token)
    expected = logits(AutoModelForImageClassification.from_pretrained(f"{folder}/saved"))
    assert_close_relative(expected, logits(model))
    for name in ("user/pushed", "user/saved"):
        assert_close_relative(logits(AutoModelForImageClassification.from_pretrained(name)), expected)

    publish_with_code(folder)
    files = {name: HfApi().list_repo_files(f"user/{name}") for name in ("pushed", "saved", "classification")}
    Path(folder, "files.json").write_text(json.dumps(files))

    for token, status in (("hf_token_of_another", 403), ("hf_wrong_token", 401)):
        with pytest.raises(HfHubHTTPError, match=str(status)):
            model.save_pretrained(f"{folder}/refused", push_to_hub=True, repo_id="user/refused", token=token)
        assert not Path(folder, "refused/config.json").exists()


def publish_with_code(folder: str) -> None:
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    edges = {"shortest_edge": IMAGE_SIZE, "longest_edge": IMAGE_SIZE}
    processors = {"classification": ViTImageProcessor(size=size), "detection": CroprViTImageProcessor(size=edges)}
    expected = {}
    for task, processor in processors.items():
        save_for_hub(trained_model(task=task), f"{folder}/{task}", processor)
        HfApi().create_repo(f"user/{task}")
        upload_folder(repo_id=f"user/{task}", folder_path=f"{folder}/{task}")
        expected[task] = logits(TASKS[task].model_class.from_pretrained(f"{folder}/{task}"))
    torch.save((make_images(), expected), f"{folder}/expected.pt")


LOAD_WITHOUT_THE_PACKAGE = """
import sys
sys.modules["cropr_hf"] = None  # importing it fails as if it were not installed
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, AutoModelForObjectDetection
pixels, expected = torch.load(sys.argv[1] + "/expected.pt")
classes = {"classification": AutoModelForImageClassification, "detection": AutoModelForObjectDetection}
for task, auto_class in classes.items():
    model = auto_class.from_pretrained("user/" + task, trust_remote_code=True)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels).logits, expected[task], rtol=1e-4, atol=1e-4, msg=task)
    assert type(model).__module__.startswith("transformers_modules.")
    AutoImageProcessor.from_pretrained("user/" + task, trust_remote_code=True)
"""


@pytest.mark.full
def test_published_models_are_stripped_and_load_by_their_names(hub_server, tmp_path):
    finish(start(hub_server, publish, tmp_path))
    repositories = hub_server.repositories
    assert set(repositories) == {"user/pushed", "user/saved", "user/classification", "user/detection"}
    assert all(is_stripped(repository) for repository in repositories.values())
    for name, files in json.loads((tmp_path / "files.json").read_text()).items():
        assert set(files) == set(repositories[f"user/{name}"].files())
    assert [name for name, repository in repositories.items() if repository.private] == ["user/saved"]

    finish(start_code(hub_server, LOAD_WITHOUT_THE_PACKAGE, tmp_path, home=tmp_path / "reader"))


SAVE_STEPS, KILLED_AT, NUM_STEPS = 4, 10, 16
PUSHING = {
    "save_strategy": "steps",
    "push_to_hub": True,
    "hub_model_id": "user/trained",
    "hub_strategy": "checkpoint",
}


class PushingTrainer(CroprTrainer):
    """Waits for each push of a checkpoint: the Trainer would go on, and leave out a push that comes too early."""

    def _push_from_checkpoint(self, checkpoint_folder):
        super()._push_from_checkpoint(checkpoint_folder)
        self.push_in_progress.wait_until_done()


class Killed(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)


def make_trainer(model: Any, folder: str, *callbacks: TrainerCallback, **arguments: Any) -> PushingTrainer:
    args = training_arguments(folder, save_steps=SAVE_STEPS, **arguments)
    return PushingTrainer(model, args, train_dataset=ColouredSquares(), callbacks=[PruningCurriculum(), *callbacks])


def train_until_killed(folder: str) -> None:
    make_trainer(tiny_model(), folder, Killed(), **PUSHING).train()


def train_on_elsewhere(folder: str) -> None:
    whole = make_trainer(tiny_model(), f"{folder}/whole")
    whole.train()

    checkpoint = snapshot_download("user/trained", allow_patterns="last-checkpoint/*") + "/last-checkpoint"
    other_model = tiny_model()
    with torch.no_grad():
        for parameter in other_model.parameters():
            parameter.add_(1.0)
    trainer = make_trainer(other_model, f"{folder}/resumed", **PUSHING)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert len(whole.state.log_history) == NUM_STEPS + 1  # the last entry is about time
    assert trainer.state.log_history[:-1] == whole.state.log_history[:-1]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], value), name

    trainer.push_to_hub()
    published = AutoModelForImageClassification.from_pretrained("user/trained")
    assert_close_relative(logits(published), logits(whole.model))


@pytest.mark.full
def test_training_goes_on_elsewhere_from_the_last_checkpoint_on_the_hub(hub_server, tmp_path):
    complete = set(tiny_model().state_dict())
    finish(start(hub_server, train_until_killed, tmp_path / "first"), -signal.SIGKILL)
    repository = hub_server.repositories["user/trained"]
    assert config(repository, "last-checkpoint/trainer_state.json")["global_step"] == 2 * SAVE_STEPS
    # The Trainer copies a checkpoint for the model beside it, too, as long as it trains.
    for folder in ("last-checkpoint/", ""):
        assert set(weights(repository, folder + "model.safetensors")) == complete
        assert config(repository, folder + "config.json")["use_auxiliary_heads"]

    finish(start(hub_server, train_on_elsewhere, tmp_path, home=tmp_path / "elsewhere"))
    assert is_stripped(repository)
    assert config(repository, "last-checkpoint/trainer_state.json")["global_step"] == NUM_STEPS
    assert set(weights(repository, "last-checkpoint/model.safetensors")) == complete


def push(seed: int, folder: str, **kwargs: Any) -> None:
    trained_model(seed).save_pretrained(folder, push_to_hub=True, repo_id="user/model", **kwargs)


def assert_published(seed: int, *sources: str) -> None:
    for source in sources:
        model = AutoModelForImageClassification.from_pretrained(source)
        assert_close_relative(logits(model), logits(trained_model(seed)))


def push_twice(folder: str) -> None:
    push(1, folder)
    push(2, folder, max_shard_size="20KB")  # other files, which the old ones must not outlive


def push_again(folder: str) -> None:
    assert_published(1, folder, "user/model")
    push(2, folder, max_shard_size="20KB")
    assert_published(2, folder, "user/model")


@pytest.mark.full
def test_an_interrupted_push_leaves_the_old_model_and_can_be_repeated(hub_server, tmp_path):
    stalled, killed, calls = threading.Event(), threading.Event(), []

    def stall(name: str) -> None:
        """In the second file of the second push and all further ones."""
        calls.append(name)
        if len(calls) > 2:
            stalled.set()
            killed.wait()
            raise ConnectionResetError  # what came in of these files is lost

    hub_server.half_way = stall
    process = start(hub_server, push_twice, tmp_path / "model")
    assert stalled.wait(timeout=300)
    process.kill()
    finish(process, -signal.SIGKILL)
    repository = hub_server.repositories["user/model"]
    revisions = list(repository.revisions)
    assert len(revisions) == 2  # the empty one, and that of the first push
    killed.set()

    calls.clear()
    hub_server.half_way = calls.append
    finish(start(hub_server, push_again, tmp_path / "model"))
    assert list(repository.revisions)[:-1] == revisions and len(calls) > 1
    assert not {"model.safetensors", "model.safetensors.index.json"} <= set(repository.files())
