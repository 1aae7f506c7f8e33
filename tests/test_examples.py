"""The examples, run as a user runs them, on tiny data and a tiny random ViT."""

import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    SegformerImageProcessor,
    ViTForImageClassification,
    ViTImageProcessor,
)

import cropr_hf
from cropr_hf.publishing.model_card import read_record
from cropr_hf.training import PruningCurriculum
from tests.common import free_port, full


EXAMPLES = Path(cropr_hf.__file__).parents[1] / "examples"


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


def losses(output_dir: Path) -> list[float]:
    return [entry["loss"] for entry in history(output_dir) if "loss" in entry]


def check_loss_parts(output_dir: Path) -> None:
    logs = [entry for entry in history(output_dir) if "loss" in entry]
    assert len(logs) == 8
    for entry in logs:
        parts = entry["main_loss"] + entry["auxiliary_loss_1"] + entry["auxiliary_loss_2"]
        assert entry["loss"] == pytest.approx(parts, abs=2e-3)


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
        check_loss_parts(trained)

    def test_resuming_repeats_the_uninterrupted_run(self, example, tiny_vit, trained, tmp_path):
        checkpoint = trained / "checkpoint-4"
        command = digits_command(tiny_vit, tmp_path, resume_from_checkpoint=str(checkpoint))
        example("train_image_classification").main(command)
        assert losses(tmp_path) == losses(trained)

    @pytest.mark.full
    def test_a_published_model_is_trained_further(self, example, trained, tmp_path):
        command = digits_command(str(trained), tmp_path, num_train_epochs=1)
        example("train_image_classification").main(command)
        assert "auxiliary_loss_1" in history(tmp_path)[0]

    @pytest.mark.parametrize("reducer", ["random", *full("none", "dynamicvit")])
    def test_other_methods_and_none_train_alike(self, example, tiny_vit, tmp_path, reducer):
        kwargs = {} if reducer != "none" else {"pruning_rate": None}
        command = digits_command(tiny_vit, tmp_path, token_reducer=reducer, num_train_epochs=1, **kwargs)
        if reducer == "none":
            position = command.index("--pruning_rate")
            del command[position : position + 2]
        example("train_image_classification").main(command)
        assert AutoModelForImageClassification.from_pretrained(tmp_path).config.token_reducer == (
            None if reducer == "none" else reducer
        )
        assert ("throughput" in read_record(tmp_path)) == (reducer != "none")  # there is nothing to compare
        assert ("ratio_loss" in history(tmp_path)[0]) == (reducer == "dynamicvit")

    @pytest.mark.full
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

    def test_evaluation_takes_the_middle_of_the_image(self, example, tiny_vit, tmp_path):
        script = example("train_image_classification")
        config = cropr_hf.CroprViTConfig.from_size("tiny", image_size=32, token_reducer=None)
        model_args = script.ClassifierArguments(model_name_or_path=tiny_vit)
        processor = script.image_processor(config, script.DataArguments(center_crop=0.5), model_args)
        pixels = np.zeros((64, 128, 3), dtype=np.uint8)
        pixels[16:48, 48:80] = 255  # the middle half of the shorter side
        image = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
        assert image.shape == (3, 32, 32)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
        torch.testing.assert_close(image * std + mean, torch.ones(3, 32, 32))

    def test_augmentation_is_that_of_the_paper(self, example, tiny_vit):
        auto_augment = pytest.importorskip("timm.data.auto_augment")
        script = example("train_image_classification")
        config = cropr_hf.CroprViTConfig.from_size("tiny", image_size=64, token_reducer=None)
        args = script.DataArguments(crop_min_scale=1, random_erasing=1.0)
        augmentation = script.augmentation(config, args, ViTImageProcessor.from_pretrained(tiny_vit))
        (rand_augment,) = [step for step in augmentation.transforms if type(step) is auto_augment.RandAugment]
        assert rand_augment.num_layers == 2 and len(rand_augment.ops) == 15
        for op in rand_augment.ops:
            assert (op.prob, op.magnitude, op.magnitude_std, op.magnitude_max) == (0.5, 9, 0.5, None)  # of 10
            assert op.kwargs == {"fillcolor": (128, 128, 128), "resample": Image.Resampling.BICUBIC}
        grey = augmentation(Image.new("RGB", (64, 64), (128, 128, 128)))
        noise = grey[:, grey.std(dim=0) > 0]  # what was erased
        assert noise.numel() > 3 * 64 * 64 // 60 and noise.std().item() == pytest.approx(1, abs=0.3)

    def test_augmentation_without_timm_says_what_to_do(self, example, monkeypatch):
        script = example("train_image_classification")
        monkeypatch.setattr(script, "is_timm_available", lambda: False)
        with pytest.raises(ImportError, match=r'pip install "cropr_hf\[timm\]"; or do without by --randaugment'):
            script.rand_augment(9, [0.5, 0.5, 0.5])
        with pytest.raises(ValueError, match=r"randaugment_magnitude is 27; it must be in \[0, 10\]"):
            script.DataArguments(randaugment_magnitude=27)

    def test_wrong_arguments_say_what_to_do(self, example, tiny_vit, tmp_path):
        script = example("train_image_classification")
        with pytest.raises(ValueError, match="--dataset_name"):
            script.main(["--model_name_or_path", tiny_vit, "--output_dir", str(tmp_path), "--use_cpu", "True"])
        with pytest.raises(ValueError, match="at most"):
            script.main(digits_command(tiny_vit, tmp_path, pruning_rate=100))
        with pytest.raises(ValueError, match="benchmark_rounds is 2"):
            script.main(digits_command(tiny_vit, tmp_path, benchmark_rounds=2))
        with pytest.raises(ValueError, match=r"center_crop is 1\.5"):
            script.main(digits_command(tiny_vit, tmp_path, center_crop=1.5))
        with pytest.raises(ValueError, match=r"digits\.yaml is not the first word"):
            script.main([*digits_command(tiny_vit, tmp_path), "digits.yaml"])

    @pytest.mark.full
    @pytest.mark.parametrize("task", ["image_classification", "semantic_segmentation"])
    def test_two_processes_by_accelerate(self, task, tiny_vit, tmp_path):
        """`accelerate launch` with two CPU processes (gloo)."""
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
        launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        launch += ["--main_process_port", str(free_port())]
        script = str(EXAMPLES / f"train_{task}.py")
        command = digits_command(tiny_vit, tmp_path, num_train_epochs=1, per_device_train_batch_size=4)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run([*launch, script, *command], capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr[-3000:]
        logs = [entry for entry in history(tmp_path) if "loss" in entry]
        assert len(logs) == 4  # 32 images, 2 processes of 4
        assert all("auxiliary_loss_2" in entry for entry in logs)
        assert cropr_hf.CroprViTConfig.from_pretrained(tmp_path).use_auxiliary_heads is False


@pytest.mark.full
@pytest.mark.parametrize(
    ("task", "fields"),
    [
        ("image_classification", {}),
        ("image_classification", {"streaming": True, "max_steps": 1}),
        ("semantic_segmentation", {"pruning_rate": 8}),
        ("instance_segmentation", {"pruning_rate": 8, "config": json.dumps({"window_size": 0})}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_worker_processes_that_are_not_forked_get_everything_by_pickle(
    example, tiny_vit, tmp_path, monkeypatch, task, fields
):
    """As on macOS and Windows, and with Python 3.14 everywhere."""

    class Stopped(Exception):
        pass

    def stop(trainer, *args):
        for name in ("train", "eval"):
            loader = getattr(trainer, f"get_{name}_dataloader")()
            data, collate = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
            rows = next(iter(data)) if isinstance(data, torch.utils.data.IterableDataset) else data[0]
            assert "pixel_values" in (rows if collate is None or isinstance(rows, dict) else collate([rows]))
        raise Stopped

    script = example(f"train_{task}")
    monkeypatch.setattr(example("detection" if task == "instance_segmentation" else script.__name__), "run", stop)
    with pytest.raises(Stopped):
        script.main(digits_command(tiny_vit, tmp_path, **fields))


@pytest.mark.parametrize("fresh_process", [False, pytest.param(True, marks=pytest.mark.full)])
def test_evaluation_in_a_fresh_process_with_picture(fresh_process, example, tiny_vit, tmp_path):
    """The quick suite does without the process."""
    model = cropr_hf.CroprViTForImageClassification.from_vit(tiny_vit, pruning_rate=10, num_labels=10)
    model.save_pretrained(tmp_path)
    ViTImageProcessor.from_pretrained(tiny_vit).save_pretrained(tmp_path)
    command = [sys.executable, str(EXAMPLES / "evaluate_image_classification.py"), "--max_eval_samples", "20"]
    command += ["--model_name_or_path", str(tmp_path), "--picture", str(tmp_path / "pruning.png")]
    if fresh_process:
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]
        metrics = json.loads(result.stdout.splitlines()[-1])
    else:
        metrics = example("evaluate_image_classification").main(command[2:])
    assert 0 <= metrics["accuracy"] <= 1
    with Image.open(tmp_path / "pruning.png") as picture:
        assert picture.format == "PNG"


def write_photo(path: Path, orientation: int = 1, size: tuple[int, int] = (60, 40)) -> None:
    """A PNG of noise, `size` (width, height) as it is stored, that says how it is turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8)).save(path, exif=exif)


class TestImageData:
    """Image files as the scripts find and read them."""

    def test_a_broken_training_image_is_named(self, example, tiny_vit, tmp_path):
        for label in ("cat", "dog"):
            for index in range(4):
                write_photo(tmp_path / "train" / label / f"{index}.png")
        broken = tmp_path / "train" / "dog" / "2.png"
        broken.write_bytes(broken.read_bytes()[:900])
        folders = {"train_dir": tmp_path / "train", "validation_dir": tmp_path / "train"}
        command = digits_command(tiny_vit, tmp_path / "out", **folders)
        with pytest.raises(ValueError, match=r"dog.2\.png cannot be read as an image \(.*truncated.*\); repair it"):
            example("train_image_classification").main(command)

    @pytest.mark.parametrize("streaming", [False, True])
    def test_folders_may_have_brackets_and_stray_files(self, example, tmp_path, streaming):
        folder = tmp_path / "photos [1]"
        for label in ("cat", "dog"):
            for number in (1, 6, 8):
                write_photo(folder / label / f"{number}.png", number)
            for name in (".DS_Store", "Thumbs.db", "._1.png"):
                (folder / label / name).write_bytes(b"\0")
        script, shared = example("train_image_classification"), example("shared")
        settings = {"train_dir": str(folder), "validation_dir": str(folder), "streaming": streaming}
        images = script.load_images(script.DataArguments(**settings), None, 0)
        assert script.get_label_names(images, "label") == ["cat", "dog"]
        sizes = [shared.read_picture(row["image"]).size for row in images["train"]]
        assert sorted(sizes) == [(40, 60)] * 4 + [(60, 40)] * 2
        with pytest.raises(ValueError, match=r"photos \[1\] has one of .* rename it"):
            shared.load_hub_data(str(folder))
        with pytest.raises(ValueError, match=r"There is no folder .*nowhere"):
            script.load_images(script.DataArguments(train_dir=str(tmp_path / "nowhere")), None, 0)

    def test_files_in_archives_and_bytes_are_read_by_name(self, example, tmp_path):
        shared = example("shared")
        write_photo(tmp_path / "a.png", 6)
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.write(tmp_path / "a.png", "in/a.png")
        content = (tmp_path / "a.png").read_bytes()
        values = [{"bytes": content, "path": "a.png"}, {"bytes": None, "path": str(tmp_path / "a.png")}]
        values.append({"bytes": None, "path": f"zip://in/a.png::{tmp_path / 'a.zip'}"})
        for value in values:
            assert shared.read_picture(value).size == (40, 60) and shared.read_file(value)[1] == value["path"]
        with pytest.raises(ValueError, match=r"a\.png cannot be read"):
            shared.read_picture({"bytes": content[:200], "path": "a.png"})
        with pytest.raises(ValueError, match="An image without a name cannot be read"):
            shared.read_picture({"bytes": b"", "path": None})

    def test_classes_without_images_are_told_and_one_class_alone_is_refused(self, example, caplog):
        script, names = example("train_image_classification"), ["ape", "bee", "cow"]
        features = Features({"label": ClassLabel(names=names)})

        def check(labels):
            script.check_class_counts(Dataset.from_dict({"label": labels}, features=features), "label", names)

        check([0, 1, 2])
        assert not caplog.messages
        check([0, 2, 2])
        assert caplog.messages == ["1 of 3 classes have none of the 3 training images: 'bee'."]
        with pytest.raises(ValueError, match="All 3 training images are of the class 'bee', of 3"):
            check([1, 1, 1])
        with pytest.raises(ValueError, match="2 of 3 training images have no class, but label -1"):
            check([-1, 1, -1])

    def test_an_empty_split_is_refused(self, example):
        script, empty = example("train_image_classification"), {"image": [], "label": []}
        features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"])})
        images = DatasetDict(train=Dataset.from_dict(empty, features=features))
        with pytest.raises(ValueError, match="split 'train' of the data set has no image"):
            example("shared").prepare_splits(images, script.DataArguments("x"), 0.5, 0)

    @pytest.mark.full
    def test_published_image_processors_take_images_of_any_mode(self, example, trained, trained_segmenter):
        grey = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60), np.uint8))
        for folder in (trained, trained_segmenter):
            processor = AutoImageProcessor.from_pretrained(folder)
            found, expected = (processor(image, return_tensors="pt") for image in (grey, grey.convert("RGB")))
            assert torch.equal(found["pixel_values"], expected["pixel_values"])


class TestClassesAreComparedByName:
    KNOWN: ClassVar = {0: "ape", 1: "bee", 2: "cow"}

    def references(self, example, column, feature, known=None):
        images = Dataset.from_dict({"label": column}, features=Features({"label": feature}))
        return example("evaluate_image_classification").references(images, "label", known or self.KNOWN)

    def test_of_images(self, example):
        assert self.references(example, [0, 1, 0], ClassLabel(names=["bee", "cow"])) == [1, 2, 1]
        assert self.references(example, [1, 1], ClassLabel(names=["yak", "cow"])) == [2, 2]  # no yak is shown
        assert self.references(example, ["cow", "ape"], Value("string")) == [2, 0]
        assert self.references(example, [2, 0], Value("int64")) == [2, 0]
        unnamed = {0: "LABEL_0", 1: "LABEL_1"}
        assert self.references(example, [1, 0], ClassLabel(names=["yak", "cow"]), unnamed) == [1, 0]

    @pytest.mark.parametrize(
        ("column", "feature", "lost"),
        [
            ([0, 1], ClassLabel(names=["yak", "cow"]), "'yak'"),
            ([-1, 1], ClassLabel(names=["ape", "cow"]), "'no class'"),
            (["yak"], Value("string"), "'yak'"),
            ([3], Value("int64"), "3"),
        ],
    )
    def test_images_of_other_classes_are_refused(self, example, column, feature, lost):
        with pytest.raises(ValueError, match=f"There are images of {lost}, which the model does not know; .* 'ape'"):
            self.references(example, column, feature)

    def test_models_without_names_and_with_fewer_classes_are_refused(self, example):
        with pytest.raises(ValueError, match="does not know"):
            self.references(example, [0], ClassLabel(names=["ape", "bee", "cow"]), {0: "LABEL_0", 1: "LABEL_1"})

    def test_accuracy_on_a_folder_with_some_of_the_classes(self, example, tiny_vit, tmp_path):
        names = {"id2label": self.KNOWN, "label2id": {name: number for number, name in self.KNOWN.items()}}
        model = cropr_hf.CroprViTForImageClassification.from_vit(tiny_vit, pruning_rate=10, **names)
        model.classifier.weight.data.zero_()
        model.classifier.bias.data.copy_(torch.tensor([0.0, 5.0, 0.0]))  # always "bee"
        model.save_pretrained(tmp_path / "model")
        ViTImageProcessor.from_pretrained(tiny_vit).save_pretrained(tmp_path / "model")
        for index in range(5):
            write_photo(tmp_path / "data" / "test" / ("bee" if index else "cow") / f"{index}.png")
        command = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "data")]
        metrics = example("evaluate_image_classification").main(command)
        assert metrics["accuracy"] == pytest.approx(0.8)

    def test_a_head_for_other_classes_is_told(self, example, tiny_vit, tmp_path, caplog):
        shared, names = example("shared"), {0: "ape", 1: "bee"}
        kwargs = {"id2label": names, "label2id": {"ape": 0, "bee": 1}, "pruning_rate": 10}
        cropr_hf.CroprViTForImageClassification.from_vit(tiny_vit, **kwargs).save_pretrained(tmp_path)
        for labels, count in ((["ape", "bee"], 0), (["bee", "ape"], 1), (["ape", "yak"], 2)):
            args = shared.ModelArguments(str(tmp_path))
            shared.load_model(cropr_hf.CroprViTForImageClassification, args, labels)
            assert len([message for message in caplog.messages if "the head starts from that" in message]) == count

    def test_of_label_maps(self, example, tmp_path):
        script = example("evaluate_semantic_segmentation")
        (tmp_path / "id2label.json").write_text(json.dumps({"0": "cow", "1": "ape", "2": "yak"}))
        args = script.DataArguments(data_dir=str(tmp_path))

        def classes(*labels):
            labels = np.array([labels], np.uint8)
            row = {"image": Image.new("RGB", labels.shape[::-1]), "annotation": Image.fromarray(labels)}
            return script.References(args, self.KNOWN).pair(row)[1].tolist()

        assert classes(1, 0, 255, 0) == [[0, 2, 255, 2]]
        with pytest.raises(ValueError, match=r"show 'yak', which the model does not know; .*--id2label"):
            classes(0, 2)
        (tmp_path / "id2label.json").unlink()  # then numbers are all that there is
        assert classes(1, 0, 255, 2) == [[1, 0, 255, 2]]


@pytest.fixture(scope="module")
def tiny_digits_vit(tiny_vit, tmp_path_factory) -> str:
    """`tiny_vit` with a head for digits: the demo measures what it starts from, too."""
    folder = str(tmp_path_factory.mktemp("digits_vit"))
    names = {number: str(number) for number in range(10)}
    ViTForImageClassification.from_pretrained(tiny_vit, id2label=names, ignore_mismatched_sizes=True).save_pretrained(
        folder
    )
    ViTImageProcessor.from_pretrained(tiny_vit).save_pretrained(folder)
    return folder


def check_demo(demo, output: str, folder: Path, patches: int, schedule: list[int]) -> None:
    rows = re.findall(r"^\| (\S+) \|(?: [\d.]+ % \|)+ (\d+) of (\d+) \|", output, flags=re.MULTILINE)
    expected = {"unpruned": patches, "Cropr": schedule[-1], "random": schedule[-1]}
    assert rows == [(name, str(left), str(patches)) for name, left in expected.items()]
    record = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    assert {row["model"]: row["patches_left"] for row in record["rows"]} == expected
    assert record["arguments"]["pruning_schedule"] == schedule and record["minutes"] >= 0
    assert demo.table(record) in output
    assert (folder / "cropr" / "pruning.png").stat().st_size > 10_000
    card = (folder / "cropr" / "README.md").read_text(encoding="utf-8")
    assert "pruning.png" in card and "| cluttered_digits | test |" in card and "interleaved rounds" in card


def test_the_demo_without_processes_of_its_own(example, tiny_digits_vit, tmp_path, capsys, monkeypatch):
    """What `make demo` does, but for the fresh interpreters in which it evaluates."""

    def run(command, **_):
        return SimpleNamespace(stdout=json.dumps(example(Path(command[1]).stem).main(command[2:])))

    demo = example("demo")
    monkeypatch.setattr(demo, "subprocess", SimpleNamespace(run=run, PIPE=None))
    command = ["demo.py", "--pretrained", tiny_digits_vit, "--output_dir", str(tmp_path)]
    command += ["--train_images", "32", "--test_images", "16", "--pruning_schedule", "30", "15", "15", "15"]
    monkeypatch.setattr(sys, "argv", command)
    demo.main()
    check_demo(demo, capsys.readouterr().out, tmp_path, 36, [30, 15, 15, 15])


@pytest.mark.full
@pytest.mark.parametrize(
    ("task", "patches", "schedule"),
    [
        ("image_classification", 36, [30, 15, 15, 15]),
        pytest.param("semantic_segmentation", 36, [30, 15, 15, 15], marks=pytest.mark.slow),
        pytest.param("instance_segmentation", 256, [100, 25, 25, 25], marks=pytest.mark.slow),
    ],
)
def test_the_demo_prints_its_table(example, task, patches, schedule, tiny_digits_vit, tmp_path):
    """The workflow of `make demo` and its sisters with a random ViT and a handful of images."""
    command = [
        sys.executable,
        str(EXAMPLES / "demo.py"),
        "--pretrained",
        tiny_digits_vit,
        "--output_dir",
        str(tmp_path),
    ]
    command += ["--task", task, "--train_images", "64", "--test_images", "32"]
    command += ["--pruning_schedule", *map(str, schedule)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    check_demo(example("demo"), result.stdout, tmp_path, patches, schedule)


def test_one_checkpoint_for_any_speed(example, tiny_vit, tmp_path, capsys, monkeypatch):
    """The workflow of `make demo-any-speed` with a random ViT and a handful of images."""
    ranges = []

    class Watched(PruningCurriculum):
        def __init__(self, share, levels, pruning_range):
            super().__init__(share, levels, pruning_range)
            ranges.append(pruning_range)

    monkeypatch.setattr(example("shared"), "PruningCurriculum", Watched)
    command = ["--pretrained", tiny_vit, "--output_dir", str(tmp_path), "--train_images", "32", "--test_images", "16"]
    record = example("any_speed").main([*command, "--pruning_schedule", "36", "12", "12", "12", "--strengths", "0.5"])
    assert ranges == [[0.0, 1.0], None]  # the unpruned model needs no curriculum
    assert json.loads((tmp_path / "any_speed.json").read_text()) == json.loads(json.dumps(record))
    assert [point["kept_patches"][-1] for point in record["any_speed"]["points"]] == [36, 31]
    assert {strength: len(scores) for strength, scores in record["fixed"].items()} == {0.0: 1, 0.5: 2}
    rows = re.findall(r"^\| (\S+) \| (\d+) \| .* \*\*[\d.]+ %\*\* \|", capsys.readouterr().out, flags=re.MULTILINE)
    assert rows == [("0.0", "36"), ("0.5", "31")]
    assert (tmp_path / "any_speed.png").stat().st_size > 5_000


def segmentation_command(tiny_vit: str, output_dir: Path, **kwargs) -> list[str]:
    return digits_command(
        tiny_vit,
        output_dir,
        **{"learning_rate": 1e-3, "pruning_rate": 8, "min_scale": 0.8, "max_scale": 1.2, **kwargs},
    )


@pytest.fixture(scope="module")
def trained_segmenter(example, tiny_vit, tmp_path_factory) -> Path:
    """The script's whole recipe, augmentation and curriculum, on cluttered digits."""
    folder = tmp_path_factory.mktemp("segmenter")
    metrics = example("train_semantic_segmentation").main(segmentation_command(tiny_vit, folder))
    assert 0 <= metrics["eval_mean_iou"] <= 1
    return folder


def write_label_maps(folder: Path, splits: dict[str, int]) -> None:
    """Images and annotations in the layout of ADE20k: 0 for none, classes 1 and 2."""
    for split, count in splits.items():
        for kind in ("images", "annotations"):
            (folder / kind / split).mkdir(parents=True)
        for index in range(count):
            random = np.random.default_rng(index)
            size = (40 + 8 * index, 60)
            Image.fromarray(random.integers(0, 255, (*size, 3), np.uint8)).save(
                folder / "images" / split / f"{index}.jpg"
            )
            Image.fromarray(random.integers(0, 3, size, np.uint8)).save(
                folder / "annotations" / split / f"{index}.png"
            )


class TestTrainSemanticSegmentation:
    def test_the_result_is_stripped_and_loads_through_the_auto_class(self, trained_segmenter):
        model = AutoModelForSemanticSegmentation.from_pretrained(trained_segmenter)
        assert type(model).__name__ == "CroprViTForSemanticSegmentation"
        assert not any("auxiliary" in name for name in model.state_dict())
        assert model.config.id2label == {**{digit: str(digit) for digit in range(10)}, 10: "background"}
        processor = AutoImageProcessor.from_pretrained(trained_segmenter)
        assert type(processor).__name__.startswith("Segformer") and processor.size == {"height": 48, "width": 48}

    @pytest.mark.full
    def test_pruning_grows_over_the_first_half(self, example, tiny_vit, tmp_path, monkeypatch):
        schedules = []

        class Watched(PruningCurriculum):
            def on_step_begin(self, args, state, control, model=None, **kwargs):
                super().on_step_begin(args, state, control, model=model, **kwargs)
                schedules.append(model.cropr_vit.pruning)

        monkeypatch.setattr(example("shared"), "PruningCurriculum", Watched)
        example("train_semantic_segmentation").main(segmentation_command(tiny_vit, tmp_path))
        assert schedules[0] == [36] * 4 and None not in schedules[:4] and schedules[4:] == [None] * 4

    def test_loss_parts_are_in_the_log_history(self, trained_segmenter):
        check_loss_parts(trained_segmenter)

    @pytest.mark.full
    def test_resuming_repeats_the_uninterrupted_run(self, example, tiny_vit, trained_segmenter, tmp_path):
        checkpoint = trained_segmenter / "checkpoint-4"
        command = segmentation_command(tiny_vit, tmp_path, resume_from_checkpoint=str(checkpoint))
        example("train_semantic_segmentation").main(command)
        assert losses(tmp_path) == losses(trained_segmenter)

    def test_folders_in_the_layout_of_ade20k(self, example, tiny_vit, tmp_path):
        write_label_maps(tmp_path / "data", {"training": 8, "validation": 3})
        (tmp_path / "data" / "id2label.json").write_text(json.dumps({"0": "wall", "1": "sky"}))
        data = {"data_dir": str(tmp_path / "data"), "reduce_labels": True}
        command = segmentation_command(tiny_vit, tmp_path / "out", num_train_epochs=1, **data)
        example("train_semantic_segmentation").main(command)
        model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "out")
        assert model.config.id2label == {0: "wall", 1: "sky"}
        assert AutoImageProcessor.from_pretrained(tmp_path / "out").do_reduce_labels
        evaluation = ["--model_name_or_path", str(tmp_path / "out"), "--data_dir", data["data_dir"]]
        evaluation += ["--reduce_labels", "True", "--stride", "24"]
        scores = example("evaluate_semantic_segmentation").main(evaluation)
        assert 0 <= scores["mean_iou"] <= 1

    def test_transforms_keep_images_and_labels_together(self, example, tiny_vit):
        """Labels that are the red channel are still the red channel after resizing, cropping, flipping and padding."""
        script = example("train_semantic_segmentation")
        args = script.DataArguments(dataset_name="other")
        augmentation = script.AugmentationArguments(photometric_distortion=0.0)
        processor = SegformerImageProcessor(
            size={"height": 48, "width": 48}, image_mean=[0.0, 0.0, 0.0], image_std=[1.0, 1.0, 1.0]
        )
        classes = np.kron(np.arange(12).reshape(3, 4), np.ones((20, 20), int)).astype(np.uint8)  # 60 x 80
        image = Image.fromarray(np.repeat(20 * classes[..., None], 3, axis=2))
        batch = {"image": [image], "annotation": [Image.fromarray(classes)]}
        for changes in (augmentation, None):
            torch.manual_seed(1)
            transformed = script.Transform(args, processor, changes)(batch)
            pixels, labels = transformed["pixel_values"][0], transformed["labels"][0]
            assert pixels.shape == (3, 48, 48) and labels.shape == (48, 48)
            inside = labels != 255
            assert inside.float().mean() > 0.2
            # Bilinear pixels against nearest labels differ along borders alone.
            agree = (pixels[0][inside] * 255 / 20).round() == labels[inside]
            assert agree.float().mean() > 0.8
            assert pixels[:, ~inside].abs().sum() == 0
        assert (labels[36:] == 255).all() and (labels[:36] != 255).all()  # 36 x 48 fits, the rest is filled

    def test_distorted_images_keep_their_labels_and_the_fill_its_colour(self, example):
        script = example("train_semantic_segmentation")
        processor = SegformerImageProcessor(
            size={"height": 48, "width": 48}, image_mean=[0.5, 0.25, 0.75], image_std=[0.5, 0.5, 0.5]
        )
        augmentation = script.AugmentationArguments(photometric_distortion=1.0, max_scale=0.5)
        transform = script.Transform(script.DataArguments(dataset_name="other"), processor, augmentation)
        image = Image.fromarray(np.full((30, 30, 3), 128, np.uint8))
        batch = transform({"image": [image], "annotation": [Image.fromarray(np.ones((30, 30), np.uint8))]})
        pixels, labels = batch["pixel_values"][0], batch["labels"][0]
        assert (labels == 1).sum() == 24 * 24 and (labels == 255).sum() == 48 * 48 - 24 * 24
        assert pixels[:, labels == 255].abs().max() < 0.01  # the mean, normalised
        assert pixels[:, labels == 1].std(dim=1).max() < 0.01 and pixels[:, labels == 1].abs().mean() > 0.1

    @pytest.mark.parametrize("horizontal_flip", [0.0, 1.0])
    @pytest.mark.parametrize("scale", [0.5, 1.5])
    def test_small_training_images_are_filled_up_below_and_on_the_right(self, example, scale, horizontal_flip):
        """As in evaluation, also where they are mirrored, or too small in one direction alone."""
        script = example("train_semantic_segmentation")
        processor = SegformerImageProcessor(size={"height": 48, "width": 48})
        augmentation = script.AugmentationArguments(
            min_scale=scale, max_scale=scale, horizontal_flip=horizontal_flip, photometric_distortion=0.0
        )
        transform = script.Transform(script.DataArguments(dataset_name="other"), processor, augmentation)
        image, classes = Image.new("RGB", (60, 20)), np.ones((20, 60), np.uint8)
        for _ in range(4):
            labels = transform({"image": [image], "annotation": [Image.fromarray(classes)]})["labels"][0]
            height, width = round(16 * scale), min(round(48 * scale), 48)
            assert (labels[:height, :width] == 1).all() and (labels == 1).sum() == height * width

    def test_reduced_labels(self, example):
        data = example("train_semantic_segmentation").DataArguments
        annotation = np.array([[0, 1, 150, 255]], np.uint8)
        assert data("other", reduce_labels=True).classes(annotation).tolist() == [[255, 0, 149, 255]]
        assert data("other").classes(annotation).tolist() == [[0, 1, 150, 255]]
        with pytest.raises(ValueError, match="class numbers"):
            data("other").classes(np.zeros((4, 4, 3), np.uint8))

    @pytest.mark.full
    def test_a_published_classifier_becomes_a_segmenter(self, example, trained, tmp_path):
        command = segmentation_command(str(trained), tmp_path, num_train_epochs=1, ignore_mismatched_sizes=True)
        example("train_semantic_segmentation").main(command)
        assert "auxiliary_loss_1" in history(tmp_path)[0]

    def test_defaults_are_the_recipe_of_the_paper(self, example):
        script = example("train_semantic_segmentation")
        assert script.SegmenterArguments().overrides() == {
            "image_size": 512,
            "patch_size": 16,
            "pruning_rate": 40,
            "auxiliary_task": "patches",
            "drop_path_rate": 0.2,
            "label_smoothing": 0.0,
        }
        assert "pruning_rate" not in script.SegmenterArguments(token_reducer="none").overrides()
        assert script.SegmenterArguments("examples/digits_vit").overrides().keys() == {
            "drop_path_rate",
            "label_smoothing",
        }
        data = script.DataArguments()
        assert data.reduce_labels and data.dataset_config_name == "scene_parsing"
        assert script.DataArguments("other").reduce_labels is None

    @staticmethod
    def masks(example, folder: Path, *maps: list[int], names: str = "abc"):
        """The training images of a folder whose label maps have these numbers in a row."""
        for index, numbers in enumerate(maps):
            write_photo(folder / "images" / "training" / f"{index}.png", size=(len(numbers), 1))
            file = folder / "annotations" / "training" / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.array([numbers], np.uint8)).save(file)
        script = example("train_semantic_segmentation")
        images = script.load_folders(str(folder), "image", "annotation")["train"]
        return lambda args, images=images: script.check_label_maps(images, args, [*names])

    def test_masks_of_0_and_255_are_refused(self, example, tmp_path):
        args = example("train_semantic_segmentation").DataArguments("x")
        check = self.masks(example, tmp_path, [0, 0, 255], [0, 255, 255], names="ab")
        with pytest.raises(ValueError, match=r"In 2 .* 3 pixels are 'a', 3 are 255, .*none are 'b': .*masks of 0 and"):
            check(args)
        check = self.masks(example, tmp_path, [0, 0, 1], [0, 1, 1], names="ab")
        check(args)
        with pytest.raises(ValueError, match="In 2 training label maps 3 pixels are 'a', 3 are 255"):
            check(example("train_semantic_segmentation").DataArguments("x", reduce_labels=True))

    def test_classes_that_no_pixel_has_are_told(self, example, tmp_path, caplog):
        script = example("train_semantic_segmentation")
        check = self.masks(example, tmp_path, [0, 2, 255], [2, 2, 255])
        check(script.DataArguments("x"))
        (message,) = caplog.messages
        assert message == "1 of 3 classes have no pixel in the 2 training label maps: 'b'."
        caplog.clear()
        script.warn_of_absent_classes({"per_category_accuracy": np.array([0.5, np.nan, 0.0])}, ["roof", "door", "sky"])
        assert re.search("1 of 3 .* in the label maps of the evaluation.*: 'door'", caplog.messages[0])

    def test_a_part_of_many_maps_is_counted(self, example, tmp_path, caplog, monkeypatch):
        script = example("train_semantic_segmentation")
        args = script.DataArguments("x")
        monkeypatch.setattr(script, "COUNTED_MAPS", 2)
        check = self.masks(example, tmp_path / "1", [0, 1], [0, 2], [2, 1])  # the first and the last
        check(args)
        assert not caplog.messages
        images = script.load_folders(str(tmp_path / "1"), "image", "annotation")["train"]
        check(args, images.to_iterable_dataset())  # which goes on
        check = self.masks(example, tmp_path / "2", [0, 0], [0, 1], [0, 0])
        check(args)
        assert "In 2 training label maps 4 pixels are 'a'" in caplog.messages[0]

    def test_labels_of_no_class_are_named(self, example, tmp_path):
        check = self.masks(example, tmp_path, [0, 1, 2], [0, 7, 7])
        args = example("train_semantic_segmentation").DataArguments("x")
        with pytest.raises(ValueError, match=r"training.1\.png has 2 pixels with labels such as 7; .*0 to 2, and 255"):
            check(args)
        with pytest.raises(ValueError, match=r"mask\.tif has float32 .*class numbers"):
            args.classes(np.zeros((4, 4), np.float32), "mask.tif")

    def test_stray_files_and_brackets(self, example, tmp_path):
        folder = tmp_path / "data [1]"
        self.masks(example, folder, [0, 1])
        for name in (".DS_Store", "Thumbs.db", "._0.png"):
            (folder / "images" / "training" / name).write_bytes(b"\0")
        images = example("train_semantic_segmentation").load_folders(str(folder), "image", "annotation")
        assert len(images["train"]) == 1

    def test_label_maps_of_photos_that_exif_turns(self, example, tmp_path, caplog):
        args = example("train_semantic_segmentation").DataArguments("x")

        def pair(orientation, size, map_size, map_orientation=1):
            write_photo(tmp_path / "photo.png", orientation, size)
            exif = Image.Exif()
            exif[0x0112] = map_orientation
            Image.new("L", map_size).save(tmp_path / "map.png", exif=exif)
            files = [{"bytes": None, "path": str(tmp_path / name)} for name in ("photo.png", "map.png")]
            image, labels = args.pair(*files)
            assert image.size == labels.shape[::-1]
            return image.size

        assert pair(6, (60, 40), (40, 60)) == (40, 60)  # only upright it fits
        assert pair(6, (60, 40), (60, 40), 6) == (40, 60) and pair(3, (60, 40), (60, 40), 3) == (60, 40)
        assert not caplog.messages
        for orientation, size in ((3, (60, 40)), (6, (50, 50))):
            pair(orientation, size, size)
            assert re.search(rf"photo\.png is turned .* {orientation}; .*map\.png", caplog.messages[-1])
        assert len(caplog.messages) == 2
        with pytest.raises(ValueError, match=r"photo\.png has 60 x 40 pixels \(.* 6, .*map\.png those of 40 x 60"):
            pair(6, (60, 40), (60, 40))
        with pytest.raises(ValueError, match=r"photo\.png has 40 x 60 pixels, but .*map\.png those of 20 x 30"):
            pair(1, (60, 40), (30, 20))

    @pytest.mark.parametrize("size", [(90, 1), (1, 90), (400, 2)])
    def test_strips_pass(self, example, size):
        script = example("train_semantic_segmentation")
        processor = SegformerImageProcessor(size={"height": 48, "width": 48})
        columns = {"image": [Image.new("RGB", size)], "annotation": [Image.new("L", size)]}
        for augmentation in (script.AugmentationArguments(), None):
            batch = script.Transform(script.DataArguments("x"), processor, augmentation)(columns)
            assert batch["pixel_values"][0].shape == (3, 48, 48) and batch["labels"][0].shape == (48, 48)

    def test_wrong_names_of_classes_are_errors(self, example, tmp_path):
        script = example("train_semantic_segmentation")
        for text, reason in (("{", "is not JSON"), ("[]", "without a gap"), ('{"1": "a"}', "without a gap")):
            (tmp_path / "names.json").write_text(text)
            with pytest.raises(ValueError, match=rf"names\.json .*{reason}"):
                script.get_label_names(script.DataArguments("x", id2label=str(tmp_path / "names.json")), None)

    def test_wrong_data_says_what_to_do(self, example, tiny_vit, tmp_path):
        script = example("train_semantic_segmentation")
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match="There is no image in"):
            script.main(segmentation_command(tiny_vit, tmp_path, data_dir=str(tmp_path / "empty")))
        write_label_maps(tmp_path / "data", {"training": 2})
        with pytest.raises(ValueError, match="names of the classes"):
            script.main(segmentation_command(tiny_vit, tmp_path, data_dir=str(tmp_path / "data")))
        (tmp_path / "data" / "annotations" / "training" / "1.png").unlink()
        with pytest.raises(ValueError, match="no label map"):
            script.main(segmentation_command(tiny_vit, tmp_path, data_dir=str(tmp_path / "data")))


@pytest.mark.full
def test_segmentation_is_evaluated_in_a_fresh_process_with_picture(trained_segmenter, tmp_path):
    command = [sys.executable, str(EXAMPLES / "evaluate_semantic_segmentation.py"), "--max_eval_samples", "12"]
    command += ["--dataset_name", "cluttered_digits", "--split", "test", "--picture", str(tmp_path / "maps.png")]
    result = subprocess.run([*command, "--model_name_or_path", str(trained_segmenter)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert 0 <= json.loads(result.stdout.splitlines()[-1])["mean_iou"] <= 1
    with Image.open(tmp_path / "maps.png") as picture:
        assert picture.format == "PNG"
