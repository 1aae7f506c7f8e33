"""Folders that hold one model or the other, whatever happens while they change."""

import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessor

from cropr_hf import CroprViTForImageClassification, cli
from cropr_hf.folders import STAGING_PREFIX, staged
from cropr_hf.publishing import export
from cropr_hf.publishing.hub import save_for_hub
from cropr_hf.training import CroprTrainer, last_whole_checkpoint
from tests.common import make_images, make_model, tiny_config
from tests.test_training import ColouredSquares, tiny_model, training_arguments


OLD, NEW = 0, 1
KILLED = 9
can_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked in the midst of a test")


# The files alone


def fill(folder: str | Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def files_in(folder: Path) -> dict[str, bytes]:
    """What a reader finds, by name, without what is there meanwhile."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith(STAGING_PREFIX)}


def content(folder: Path) -> dict[str, str]:
    return {name: file.decode() for name, file in files_in(folder).items()}


OLD_FILES = {"config.json": "old", "weights": "old", "training/a": "old", "training/b": "old"}
NEW_FILES = {"config.json": "new", "weights-1": "new", "training/a": "new", "more/c": "new"}
OTHERS = {"notes": "mine", "training/notes": "mine"}


def exchange(folder: Path) -> None:
    with staged(folder, "config.json", ["weights*", "training/[ab]"]) as staging:
        fill(staging, NEW_FILES)


@pytest.fixture
def folder(tmp_path) -> Path:
    fill(tmp_path / "folder", OLD_FILES | OTHERS)
    return tmp_path / "folder"


def refuse(*_: Any) -> None:
    raise OSError("operation not supported")


@pytest.fixture(params=["links", "no_links"])
def with_and_without_links(request, monkeypatch) -> None:
    if request.param == "no_links":
        monkeypatch.setattr(os, "symlink", refuse)


def test_the_new_files_take_the_place_of_the_old(folder, with_and_without_links):
    exchange(folder)
    assert content(folder) == NEW_FILES | OTHERS
    assert not [path for path in folder.rglob("*") if path.is_symlink() or path.name.startswith(STAGING_PREFIX)]


def test_without_the_key_nothing_is_stale(folder):
    with staged(folder, "config.json", ["*"]) as staging:
        fill(staging, {"adapter": "new"})
    assert content(folder) == OLD_FILES | OTHERS | {"adapter": "new"}


@pytest.mark.parametrize("function", ["os.link", "os.replace", "os.makedirs"])
def test_an_error_leaves_the_old_files(function, folder, with_and_without_links, monkeypatch):
    """At every call of a function that moves files."""
    name = function.partition(".")[2]
    original, limit, finished = getattr(os, name), 0, False
    while not finished:
        calls = []

        def fail_once(*args, calls=calls, limit=limit, **kwargs):
            calls.append(args)
            if len(calls) == limit + 1:
                raise OSError(28, "no space left on device")
            return original(*args, **kwargs)

        monkeypatch.setattr(os, name, fail_once)
        try:
            exchange(folder)
        except OSError:
            limit += 1
            found = content(folder)
            assert found in (OLD_FILES | OTHERS, NEW_FILES | OTHERS)
            if found == NEW_FILES | OTHERS:  # an error after the step
                finished = True
        else:
            finished = True
    monkeypatch.setattr(os, name, original)
    exchange(folder)
    assert content(folder) == NEW_FILES | OTHERS


def test_what_killed_processes_left_goes(folder):
    for name in (f"{STAGING_PREFIX}dead/new/config.json", ".export_a.onnx_dead/new/a.onnx", f"{STAGING_PREFIX}notes"):
        fill(folder, {name: "left"})
    exchange(folder)
    assert not (folder / f"{STAGING_PREFIX}dead").exists() and (folder / f"{STAGING_PREFIX}notes").exists()
    with staged(folder, "a.onnx", prefix=".export_a.onnx_") as staging:
        fill(staging, {"a.onnx": "new"})
    assert sorted(path.name for path in folder.glob(".*")) == []
    assert (folder / "a.onnx").read_text() == "new"


def test_what_a_link_leads_to_stays(folder, tmp_path):
    fill(tmp_path / "other", OLD_FILES)
    for name in ("config.json", "weights"):
        (folder / name).unlink()
        (folder / name).symlink_to(tmp_path / "other" / name)
    shutil.rmtree(folder / "training")
    (folder / "training").symlink_to(tmp_path / "other" / "training")
    exchange(folder)
    assert content(folder) == NEW_FILES | {"notes": "mine"}
    assert content(tmp_path / "other") == OLD_FILES


def test_a_file_system_without_hard_links(folder, monkeypatch):
    monkeypatch.setattr(os, "link", refuse)
    exchange(folder)
    assert content(folder) == NEW_FILES | OTHERS


# Killed at every operation on files


def killed_at(moment: int, action: Callable[[], Any], folder: Path) -> bool:
    """Whether a process that does something is killed before it changes a file for the time `moment`; else it ends."""
    process = os.fork()
    if process == 0:
        changes = 0
        writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
        names = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}

        def watch(event: str, args: tuple) -> None:
            nonlocal changes
            inside = str(args[0]).startswith(str(folder)) if event == "open" else event in names
            if inside and (event != "open" or args[2] & writing):
                if changes == moment:
                    os._exit(KILLED)
                changes += 1

        code = 1
        try:
            torch.set_num_threads(1)  # the threads of the parent did not come along
            sys.addaudithook(watch)
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(process, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, KILLED)
    return code == KILLED


def killed_everywhere(action: Callable[[Path], Any], old: Path, folder: Path) -> Iterator[bool]:
    """Copies `old` to `folder` and kills what changes it there, one operation later each time; whether it was."""
    is_killed, moment = True, 0
    while is_killed:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(old, folder)
        is_killed = killed_at(moment, lambda: action(folder), folder)
        yield is_killed
        moment += 1
    assert moment > 10


@can_fork
@pytest.mark.full
@pytest.mark.parametrize("has_links", [True, False])
def test_killed_while_files_move(has_links, folder, tmp_path, monkeypatch):
    def act(folder: Path) -> None:
        if not has_links:
            os.symlink = refuse
        exchange(folder)

    seen = []
    for _ in killed_everywhere(act, folder, tmp_path / "copy"):
        seen.append(content(tmp_path / "copy"))
        exchange(tmp_path / "copy")
        assert content(tmp_path / "copy") == NEW_FILES | OTHERS
    if has_links:
        changes = [files == NEW_FILES | OTHERS for files in seen]
        assert changes == sorted(changes) and changes[-1]
        assert all(files == OLD_FILES | OTHERS for files, is_new in zip(seen, changes) if not is_new)
    else:  # a mixture has no config.json
        whole = (OLD_FILES | OTHERS, NEW_FILES | OTHERS)
        assert all(files in whole for files in seen if "config.json" in files)


def classifier(version: int) -> CroprViTForImageClassification:
    """A model to train, of which the two versions differ in weights and configuration."""
    config = tiny_config(use_auxiliary_heads=True, pruning_rate=2 + version)
    return make_model(CroprViTForImageClassification, config, seed=version)


def processor(version: int) -> ViTImageProcessor:
    return ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1 + version / 2] * 3)


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model.eval()(make_images()).logits


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    return classifier(OLD), classifier(NEW)


@pytest.fixture(scope="module")
def expected(models) -> list[torch.Tensor]:
    return [logits_of(model) for model in models]


def version_in(folder: Path, expected: list[torch.Tensor]) -> int:
    """Which model a folder gives."""
    logits = logits_of(AutoModelForImageClassification.from_pretrained(folder))
    (version,) = [version for version in (OLD, NEW) if torch.allclose(logits, expected[version], atol=1e-4)]
    return version


SAVES: dict[str, Callable[[Any, Path, Path], Any]] = {
    "save_pretrained": lambda model, source, folder: model.save_pretrained(folder),
    "shards": lambda model, source, folder: model.save_pretrained(folder, max_shard_size="40KB"),
    "save_for_hub": lambda model, source, folder: save_for_hub(model, folder, processor(NEW)),
    "strip": lambda model, source, folder: cli.main(["strip", str(source), str(folder), "--overwrite"]),
}


@can_fork
@pytest.mark.full
@pytest.mark.parametrize("name", SAVES)
def test_a_killed_save_leaves_the_old_model_or_the_new_one(name, models, expected, tmp_path):
    old, source, folder = tmp_path / "old", tmp_path / "run" / "checkpoint-1", tmp_path / "folder"
    save_for_hub(models[OLD], old, processor(OLD), with_code=name == "save_for_hub")
    save_for_hub(models[NEW], source, processor(NEW), with_code=False)  # complete: it is to be resumed from
    models[NEW].save_pretrained(tmp_path / "other")  # what a card says is counted once, and not in every process
    versions: dict[frozenset, int] = {}
    seen = []
    for is_killed in killed_everywhere(lambda folder: SAVES[name](models[NEW], source, folder), old, folder):
        found = frozenset(files_in(folder).items())
        if found not in versions:
            versions[found] = version = version_in(folder, expected)
            card = json.loads((folder / "record.json").read_text())["model"]
            assert card["patches_kept"] == models[version].config.kept_patches()
            training = json.loads((folder / "training_config" / "config.json").read_text())
            assert training["pruning_rate"] == 2 + version
            if name in ("save_for_hub", "strip"):
                mean = AutoImageProcessor.from_pretrained(folder).image_mean
                assert [*mean] == [*processor(version).image_mean]
        seen.append(versions[found])
        if is_killed and len(seen) % 10 == 0:  # somebody saves there again
            SAVES["save_for_hub"](models[NEW], source, folder)
            assert version_in(folder, expected) == NEW
            assert not [path for path in folder.rglob("*") if path.is_symlink()]
            assert not [*folder.glob(f"{STAGING_PREFIX}*")]
    assert seen == sorted(seen) and seen[0] == OLD and seen[-1] == NEW


@can_fork
@pytest.mark.full
def test_a_killed_conversion_leaves_the_old_model_or_the_new_one(models, expected, tiny_vit, tmp_path):
    save_for_hub(models[OLD], tmp_path / "old", processor(OLD), with_code=False)
    folder = tmp_path / "folder"
    command = ["convert", tiny_vit, str(folder), "--overwrite", "--config", '{"pruning_rate": 1}']
    versions: dict[frozenset, int] = {}
    seen = []
    for _ in killed_everywhere(lambda folder: cli.main(command), tmp_path / "old", folder):
        found = frozenset(files_in(folder).items())
        if found not in versions:
            model = AutoModelForImageClassification.from_pretrained(folder)
            versions[found] = version = NEW if model.config.pruning_rate == 1 else OLD
            means = [0.5] * 3 if version == NEW else processor(OLD).image_mean
            assert [*AutoImageProcessor.from_pretrained(folder).image_mean] == [*means]
            if version == OLD:
                assert torch.allclose(logits_of(model), expected[OLD], atol=1e-4)
        seen.append(versions[found])
    assert seen == sorted(seen) and seen[0] == OLD and seen[-1] == NEW


@can_fork
@pytest.mark.full
def test_a_killed_export_leaves_the_old_file_or_the_new_one(models, tmp_path, monkeypatch):
    """Graphs and their weights, which are written by hand here: an export takes seconds."""
    old, written = tmp_path / "old", {"model.onnx": "new", "model.onnx.data": "new"}
    fill(old, {"model.onnx": "old", "model.onnx.data": "old"})
    model = classifier(NEW)
    model.remove_auxiliary_heads()

    def write(graph: Any, pixels: torch.Tensor, path: Path, *options: bool) -> Callable:
        fill(path.parent, written)
        return graph

    monkeypatch.setattr(export, "_write", write)
    seen = []
    for _ in killed_everywhere(
        lambda folder: export.export_model(model, folder / "model.onnx"), old, tmp_path / "new"
    ):
        files = content(tmp_path / "new")
        seen.append({name: files[name] for name in written})
    assert seen[0] == dict.fromkeys(written, "old") and seen[-1] == written
    assert all(files in (seen[0], seen[-1]) for files in seen)


@can_fork
@pytest.mark.full
def test_a_killed_checkpoint_leaves_one_to_resume_from(tmp_path):
    """Also where a whole checkpoint of another training with the same step is in the place."""

    def trainer(version: int, folder: Path) -> CroprTrainer:
        torch.manual_seed(version)
        args = training_arguments(folder, max_steps=2, save_strategy="steps", save_steps=1, eval_strategy="no")
        return CroprTrainer(tiny_model(), args, train_dataset=ColouredSquares())

    trainer(OLD, tmp_path / "old").train()
    folder = tmp_path / "folder"
    second = trainer(NEW, folder)
    second.train()
    for _ in killed_everywhere(lambda folder: second._save_checkpoint(second.model, None), tmp_path / "old", folder):
        whole = last_whole_checkpoint(folder)
        assert whole in (str(folder / "checkpoint-1"), str(folder / "checkpoint-2"))
        for name in ("checkpoint-1", "checkpoint-2"):
            CroprViTForImageClassification.from_pretrained(folder / name)
        resumed = trainer(OLD, folder)
        resumed.args.max_steps = 3
        resumed.args.save_strategy = "no"
    resumed.train(resume_from_checkpoint=True)


# Others, at the same time and later


@can_fork
@pytest.mark.full
def test_a_reader_beside_a_writer_never_gets_a_mixture(models, expected, tmp_path):
    models[OLD].save_pretrained(tmp_path)
    writer = os.fork()
    if writer == 0:
        try:
            torch.set_num_threads(1)
            for turn in range(16):
                models[turn % 2].save_pretrained(tmp_path)
        finally:
            os._exit(0)
    whole = 0
    while os.waitpid(writer, os.WNOHANG) == (0, 0):
        try:
            version_in(tmp_path, expected)
            whole += 1
        except ValueError as error:
            assert "were not saved together" in str(error)
    assert whole > 0 and version_in(tmp_path, expected) == NEW


@pytest.mark.parametrize("max_shard_size", ["50GB", "40KB"])
def test_weights_of_another_save_are_refused(max_shard_size, models, tmp_path):
    for version, name in enumerate(("old", "new")):
        models[version].save_pretrained(tmp_path / name, max_shard_size=max_shard_size)
    shutil.copy(tmp_path / "new" / "config.json", tmp_path / "old")
    for load in (CroprViTForImageClassification, AutoModelForImageClassification):
        with pytest.raises(ValueError, match=r"configuration and the weights in .*old were not saved together"):
            load.from_pretrained(tmp_path / "old")


def test_one_shard_of_another_save_is_refused(models, tmp_path):
    for version, name in enumerate(("old", "new")):
        models[version].save_pretrained(tmp_path / name, max_shard_size="40KB")
    shard = sorted(file.name for file in (tmp_path / "new").glob("*.safetensors"))[0]
    shutil.copy(tmp_path / "new" / shard, tmp_path / "old")
    with pytest.raises(ValueError, match=r"were not saved together"):
        CroprViTForImageClassification.from_pretrained(tmp_path / "old")


def test_the_same_weights_give_the_same_files(models, tmp_path):
    for name in ("first", "second"):
        models[OLD].save_pretrained(tmp_path / name / "model")
    for file in ("config.json", "model.safetensors"):
        first, second = ((tmp_path / name / "model" / file).read_bytes() for name in ("first", "second"))
        assert first == second


def test_what_belonged_to_another_model_goes(models, expected, tmp_path):
    save_for_hub(models[OLD], tmp_path, processor(OLD))
    fill(tmp_path, {"pruning.png": "old", "eval_results.json": "old", "notes.txt": "mine"})
    save_for_hub(models[NEW], tmp_path, with_code=False)
    published = {"README.md", "config.json", "model.safetensors", "record.json", "training_config"}
    assert {file.name for file in tmp_path.iterdir()} == published | {"notes.txt"}
    assert version_in(tmp_path, expected) == NEW


@pytest.mark.parametrize("card", ["# Mine", "# Mine\n![pruned](pruning.png)"])
def test_somebodys_own_card_keeps_the_picture_that_it_shows(card, models, tmp_path):
    fill(tmp_path, {"README.md": card, "pruning.png": "mine", "record.json": "old"})
    models[NEW].save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == card
    assert (tmp_path / "pruning.png").exists() == ("pruning.png" in card)


def test_an_image_processor_that_was_saved_first_stays(models, tmp_path):
    processor(NEW).save_pretrained(tmp_path)
    save_for_hub(models[NEW], tmp_path)
    assert AutoImageProcessor.from_pretrained(tmp_path).image_mean == processor(NEW).image_mean


@pytest.mark.parametrize("command", ["strip", "convert"])
def test_a_folder_with_another_model_is_overwritten_only_when_asked(command, models, tiny_vit, tmp_path, capsys):
    save_for_hub(models[OLD], tmp_path / "old", processor(OLD), with_code=False)
    models[NEW].save_pretrained(tmp_path / "checkpoint-1")
    source = tiny_vit if command == "convert" else str(tmp_path / "checkpoint-1")
    before = {file.name: file.read_bytes() for file in (tmp_path / "old").glob("*.*")}
    assert cli.main([command, source, str(tmp_path / "old")]) == 1
    assert "old holds a model already; give another folder, or --overwrite" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in (tmp_path / "old").glob("*.*")} == before
    assert cli.main([command, source, str(tmp_path / "old"), "--overwrite"]) == 0
    assert (tmp_path / "old" / "config.json").read_bytes() != before["config.json"]


@pytest.mark.parametrize("command", ["strip", "convert"])
def test_a_damaged_image_processor_stops_before_anything_is_written(command, models, tiny_vit, tmp_path, capsys):
    source = tmp_path / "checkpoint-1"
    if command == "convert":
        shutil.copytree(tiny_vit, source)
    else:
        save_for_hub(models[NEW], source, processor(NEW), with_code=False)
    file = source / "preprocessor_config.json"
    file.write_text(file.read_text()[:30])
    assert cli.main([command, str(source), str(tmp_path / "out")]) == 1
    assert "checkpoint-1 cannot be used" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_image_processor_that_fails_leaves_the_old_model(models, expected, tmp_path):
    class Broken:
        def save_pretrained(self, folder: str) -> None:
            Path(folder, "preprocessor_config.json").write_text("{")
            raise OSError(28, "no space left on device")

    save_for_hub(models[OLD], tmp_path, processor(OLD), with_code=False)
    before = sorted(file.name for file in tmp_path.iterdir())
    with pytest.raises(OSError, match="no space"):
        save_for_hub(models[NEW], tmp_path, Broken())
    with pytest.raises(ValueError, match=r"`image_processor` is a str"):
        save_for_hub(models[NEW], tmp_path, "processor")
    assert sorted(file.name for file in tmp_path.iterdir()) == before
    assert version_in(tmp_path, expected) == OLD
