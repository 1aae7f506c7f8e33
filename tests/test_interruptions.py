"""Trainings that are killed, or run out of disk, while they save, and go on from the last whole checkpoint."""

import importlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.modeling_utils
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging as transformers_logging

from cropr_hf import CroprViTForImageClassification
from cropr_hf.training import CroprTrainer, last_whole_checkpoint
from tests.common import free_port, full
from tests.test_training import ColouredSquares, losses, tiny_model, training_arguments


REPOSITORY = Path(__file__).resolve().parents[1]


def make_trainer(folder: Path, trainer_class: type = CroprTrainer, **kwargs: Any) -> Any:
    """16 steps with evaluations and checkpoints every 4."""
    fields = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 4, "save_steps": 4}
    args = training_arguments(folder, **{**fields, "load_best_model_at_end": True, **kwargs})
    return trainer_class(tiny_model(), args, train_dataset=ColouredSquares(), eval_dataset=ColouredSquares())


def assert_same_training(first: Trainer, second: Trainer) -> None:
    assert len(losses(first)) == 16
    assert losses(first) == losses(second)
    assert losses(first, "eval_loss") == losses(second, "eval_loss")
    assert first.state.best_global_step == second.state.best_global_step
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Any:
    trainer = make_trainer(tmp_path_factory.mktemp("uninterrupted"))
    trainer.train()
    return trainer


@pytest.fixture
def checkpoints(uninterrupted, tmp_path) -> Path:
    """A copy of the checkpoints of the uninterrupted training, of steps 4, 8, 12 and 16."""
    return Path(shutil.copytree(uninterrupted.args.output_dir, tmp_path / "run"))


# Which checkpoint is whole


def test_the_newest_whole_checkpoint_is_found(checkpoints, log_records):
    assert last_whole_checkpoint(checkpoints) == str(checkpoints / "checkpoint-16")
    for folder in ("checkpoint-20-backup", "my-checkpoint-20", "checkpoint-best"):
        (checkpoints / folder).mkdir()
    (checkpoints / "checkpoint-20").write_text("not a folder")
    assert last_whole_checkpoint(str(checkpoints)) == str(checkpoints / "checkpoint-16")
    shutil.copytree(checkpoints / "checkpoint-16", checkpoints / "checkpoint-100")
    assert last_whole_checkpoint(checkpoints) == str(checkpoints / "checkpoint-100")  # by number, not by letters
    assert not log_records


def test_nothing_to_resume_from(tmp_path):
    assert last_whole_checkpoint(tmp_path / "missing") is None
    (tmp_path / "checkpoint-4").mkdir()
    assert last_whole_checkpoint(tmp_path) is None
    with pytest.raises(ValueError, match="holds no whole checkpoint to resume from"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "training_args.bin", "trainer_state.json"]
)
def test_a_truncated_file_is_noticed(name, checkpoints, log_records):
    truncate(checkpoints / "checkpoint-16" / name)
    (checkpoints / "checkpoint-12" / "trainer_state.json").unlink()
    before = sorted(checkpoints.rglob("*"))
    assert last_whole_checkpoint(checkpoints) == str(checkpoints / "checkpoint-8")
    truncated, stateless = [record.getMessage() for record in log_records if record.levelno == logging.WARNING]
    assert "checkpoint-16, which is only a part" in truncated and f"{name} is truncated" in truncated
    assert "checkpoint-12, which is only a part of a checkpoint: it has no trainer_state.json" in stateless
    assert sorted(checkpoints.rglob("*")) == before


def test_a_checkpoint_needs_all_of_its_weights(checkpoints, log_records):
    (checkpoints / "checkpoint-16" / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}
    (checkpoints / "checkpoint-12" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert last_whole_checkpoint(checkpoints) == str(checkpoints / "checkpoint-8")
    reasons = [record.getMessage() for record in log_records if record.levelno == logging.WARNING]
    assert "it has no weights" in reasons[0] and "it has no model-00001-of-00002.safetensors" in reasons[1]


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"weight_map": [1]}', "[" * 100_000])
def test_files_of_another_kind_are_noticed(text, checkpoints, log_records):
    (checkpoints / "checkpoint-16" / "model.safetensors.index.json").write_text(text)
    (checkpoints / "checkpoint-12" / "trainer_state.json").write_text("[]")
    assert last_whole_checkpoint(checkpoints) == str(checkpoints / "checkpoint-8")
    reasons = [record.getMessage() for record in log_records if record.levelno == logging.WARNING]
    assert "model.safetensors.index.json does not say what it should" in reasons[0]
    assert "trainer_state.json is not an object of JSON" in reasons[1]


def test_checkpoints_of_the_plain_trainer_count(tmp_path):
    trainer = make_trainer(tmp_path, Trainer, max_steps=4, save_only_model=True, load_best_model_at_end=False)
    trainer.train()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_the_examples_resume_from_it(checkpoints, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples"))
    shared = importlib.import_module("shared")
    truncate(checkpoints / "checkpoint-16" / "optimizer.pt")

    class Resumed(Exception):
        pass

    class Stub(CroprTrainer):
        def train(self, resume_from_checkpoint=None):
            raise Resumed(resume_from_checkpoint)

    args = shared.RecipeArguments(
        str(checkpoints), resume_from_checkpoint="last", eval_strategy="no", report_to="none", use_cpu=True
    )
    with pytest.raises(Resumed, match=r"checkpoint-12$"):
        shared.run(Stub(tiny_model(), args), shared.ModelArguments())


# SIGKILL. The processes that are killed are forked from a server that has imported everything, and they train from the
# start; this process resumes.


@pytest.fixture(scope="module")
def start() -> Callable[..., Any]:
    """Starts a function in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cropr_hf.training", "transformers.trainer", "torch", "tests.test_interruptions"])

    def start(function: Callable, *args: Any) -> Any:
        process = context.Process(target=function, args=args)
        process.start()
        return process

    return start


def train_and_die(folder: Path, file_name: str, settings: dict[str, Any], resume_from: str | None = None) -> None:
    """Trains until a file of checkpoint 8 is half written, with as many threads as this process (OMP_NUM_THREADS)."""
    transformers_logging.disable_progress_bar()

    def die_in(owner: Any, function: str, position: int) -> None:
        write = getattr(owner, function)

        def write_half(*args: Any, **kwargs: Any) -> None:
            write(*args, **kwargs)
            file = Path(args[position])
            if file.name == file_name and "checkpoint-8" in file.parts:
                truncate(file)
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(owner, function, write_half)

    die_in(torch, "save", 1)
    die_in(transformers.modeling_utils, "safe_save_file", 1)
    die_in(TrainerState, "save_to_json", 1)
    remove_folder = shutil.rmtree

    def remove_half(path: str, *args: Any, **kwargs: Any) -> None:
        if Path(path).name == file_name:
            (Path(path) / "optimizer.pt").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        remove_folder(path, *args, **kwargs)

    shutil.rmtree = remove_half
    make_trainer(folder, **settings).train(resume_from_checkpoint=resume_from)


def wait_for_death(process: Any) -> None:
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    "file_name",
    full("optimizer.pt", "model.safetensors", "training_args.bin", "rng_state.pth", "trainer_state.json"),
)
def test_a_training_killed_while_saving_resumes_exactly(file_name, start, uninterrupted, tmp_path, log_records):
    settings = {"save_total_limit": 1}
    wait_for_death(start(train_and_die, tmp_path, file_name, settings))
    assert get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")  # what the plain Trainer would take
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert "checkpoint-8, which is only a part" in log_records[-1].getMessage()

    resumed = make_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same_training(uninterrupted, resumed)
    # The last and the best one; of the partial folder, nothing is left among them.
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-16")
    left = {f"checkpoint-{step}" for step in (16, uninterrupted.state.best_global_step)}
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == left
    assert not list(tmp_path.rglob("_saving_*"))


@pytest.mark.full
def test_a_training_killed_while_an_old_checkpoint_is_deleted_goes_on_from_the_new_one(start, uninterrupted, tmp_path):
    settings = {"save_total_limit": 1, "load_best_model_at_end": False}
    wait_for_death(start(train_and_die, tmp_path, "checkpoint-4", settings))
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")
    resumed = make_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(uninterrupted)


@pytest.mark.full
def test_a_whole_checkpoint_that_is_half_overwritten_is_not_whole(start, checkpoints):
    """A mixture of two trainings, all of whose files are complete, must not pass."""
    for step in (12, 16):
        shutil.rmtree(checkpoints / f"checkpoint-{step}")
    settings = {"learning_rate": 1e-2}
    wait_for_death(start(train_and_die, checkpoints, "optimizer.pt", settings, str(checkpoints / "checkpoint-4")))
    shutil.copy(checkpoints / "checkpoint-4" / "optimizer.pt", checkpoints / "checkpoint-8")  # not to be found by this
    assert (checkpoints / "checkpoint-8" / "rng_state.pth").exists()
    assert last_whole_checkpoint(checkpoints) == str(checkpoints / "checkpoint-4")


def train_as_process(rank: int, port: int, folder: Path) -> None:
    """One of two; the second dies while the first has nothing left to write but the state of the Trainer."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    settings = {"ddp_backend": "gloo", "per_device_train_batch_size": 4, "load_best_model_at_end": False}
    train_and_die(folder, "rng_state_1.pth", settings)


@pytest.mark.full
def test_a_checkpoint_is_whole_when_every_process_has_written(start, tmp_path):
    port = free_port()
    first, second = [start(train_as_process, rank, port, tmp_path) for rank in range(2)]
    wait_for_death(second)
    first.join(120)
    assert first.exitcode == 1  # it missed the other one
    assert sorted(file.name for file in (tmp_path / "checkpoint-8").glob("rng_state*")) == [
        "rng_state_0.pth",
        "rng_state_1.pth",
    ]
    assert not (tmp_path / "checkpoint-8" / "trainer_state.json").exists()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


# A full disk


@pytest.mark.parametrize("too_long", ["optimizer.pt", *full("model.safetensors")])
def test_a_failed_save_says_how_to_go_on_and_the_training_resumes(too_long, uninterrupted, tmp_path):
    """A limit that the operating system sets to files stands in for the end of the disk."""
    resource = pytest.importorskip("resource", reason="limits of file sizes are those of Unix")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (Path(uninterrupted.args.output_dir) / "checkpoint-4" / too_long).stat().st_size

    class Limit(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                resource.setrlimit(resource.RLIMIT_FSIZE, (3 * size // 4, limits[1]))

    tiny_model().save_pretrained(tmp_path)  # an earlier result
    published = (tmp_path / "model.safetensors").read_bytes()
    stopped = make_trainer(tmp_path)
    stopped.add_callback(Limit())
    try:
        with pytest.raises(OSError, match=r"Saving \S+/checkpoint-8 failed .* go on from \S+/checkpoint-4 by `resume"):
            stopped.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert (tmp_path / "checkpoint-8" / "model.safetensors").exists() == (too_long == "optimizer.pt")
    assert (tmp_path / "model.safetensors").read_bytes() == published
    assert CroprViTForImageClassification.from_pretrained(tmp_path).config.use_auxiliary_heads is False
    resumed = make_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert_same_training(uninterrupted, resumed)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-16")


def train_on_a_small_disk(folder: str, copy: str) -> None:
    """Publishes a model to `folder`, trains there until the disk is full, and copies all that is left."""
    transformers_logging.disable_progress_bar()
    tiny_model().save_pretrained(folder, with_code=False)
    try:
        make_trainer(Path(folder)).train()
    except OSError as error:
        result = {"error": str(error), "free": shutil.disk_usage(folder).free}
        shutil.copytree(folder, copy)
        Path(copy, "result.json").write_text(json.dumps(result))


@pytest.mark.full
def test_a_full_disk_leaves_what_a_larger_one_can_go_on_with(uninterrupted, tmp_path):
    checkpoint = Path(uninterrupted.args.output_dir) / "checkpoint-4"
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    small, large = tmp_path / "small", tmp_path / "large"
    small.mkdir()
    # Room for two checkpoints and the published model, not for a third
    mount = f"mount -t tmpfs -o size={int(2.7 * size)} none {small}"
    for namespace in (["unshare", "-Urm"], ["unshare", "-m"]):
        command = [*namespace, *mount.split()]
        if shutil.which("unshare") and subprocess.run(command, capture_output=True).returncode == 0:
            break
    else:
        pytest.skip("this system lets nobody but its administrator mount a small disk")
    train = "import sys; from tests.test_interruptions import *; train_on_a_small_disk(*sys.argv[1:])"
    subprocess.run(
        [*namespace, "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable, "-c", train, str(small), str(large)],
        cwd=REPOSITORY,
        check=True,
        timeout=300,
    )
    result = json.loads((large / "result.json").read_text())
    assert "checkpoint-12 failed" in result["error"] and "go on from" in result["error"]
    assert result["free"] < size

    assert CroprViTForImageClassification.from_pretrained(large).config.use_auxiliary_heads is False
    assert last_whole_checkpoint(large) == str(large / "checkpoint-8")
    resumed = make_trainer(large)
    resumed.train(resume_from_checkpoint=True)
    assert_same_training(uninterrupted, resumed)
