"""The examples for object detection and instance segmentation, run as a user runs them, on tiny data and models."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from torchvision.ops import box_convert
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForInstanceSegmentation,
    AutoModelForObjectDetection,
    DetrImageProcessor,
    pipeline,
)

import cropr_hf
from tests.common import free_port
from tests.test_examples import EXAMPLES, digits_command, history, losses


TINY_HEADS = {
    "pyramid_channels": 16,
    "box_head_size": 16,
    "num_proposals": 20,
    "rois_per_image": 16,
    "anchor_sizes": [6, 12, 24, 48, 96],
    "detections_per_image": 10,
    "score_threshold": 0.0,
}


def command(model: str, output_dir: Path, *more: str, **kwargs) -> list[str]:
    fields = {
        "pruning_rate": 8,
        "learning_rate": 1e-3,
        "max_steps": 2,
        "warmup_steps": 0,
        "eval_steps": 100,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_train_samples": 16,
        "max_eval_samples": 4,
        "config": json.dumps(TINY_HEADS),
        **kwargs,
    }
    return [*digits_command(model, output_dir, **fields), *more]


def files_command(model: str, output_dir: Path, folder: Path, **kwargs) -> list[str]:
    """With a folder in the layout of `write_coco` instead of digits."""
    files = {f"{split}_images_dir": folder / split for split in ("train", "validation")}
    files |= {f"{split}_annotations": folder / f"{split}.json" for split in ("train", "validation")}
    arguments = command(model, output_dir, **files, **kwargs)
    position = arguments.index("--dataset_name")
    del arguments[position : position + 2]
    return arguments


def write_coco(folder: Path, num_images: int = 3) -> dict:
    """Files in COCO format: one of each category (90 "cat", 7 "dog"), a crowd, and a last image without objects."""
    crowd = {"size": [50, 80], "counts": [0, 50 * 40, 50 * 40]}  # the left half, uncompressed
    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True)
        images, objects = [], []
        for index in range(num_images):
            pixels = np.zeros((50, 80, 3), np.uint8)
            if index < num_images - 1:
                pixels[10:30, 20:40, 0], pixels[5:15, 60:75, 1] = 255, 255
                square = [20, 10, 40, 10, 40, 30, 20, 30]
                objects += [
                    {"category_id": 90, "bbox": [20, 10, 20, 20], "area": 400, "segmentation": [square]},
                    {"category_id": 7, "bbox": [60, 5, 15, 10], "segmentation": [[60, 5, 75, 5, 75, 15, 60, 15]]},
                    {"category_id": 7, "bbox": [0, 0, 40, 50], "area": 2000, "iscrowd": 1, "segmentation": crowd},
                ]
                for entry in objects[-3:]:
                    entry["image_id"] = 1000 + index
            Image.fromarray(pixels).save(folder / split / f"{index}.png")
            images.append({"id": 1000 + index, "file_name": f"{index}.png", "width": 80, "height": 50})
        categories = [{"id": 90, "name": "cat"}, {"id": 7, "name": "dog"}]
        coco = {"images": images, "annotations": objects, "categories": categories}
        (folder / f"{split}.json").write_text(json.dumps(coco))
    return coco


def hub_images(num_images: int = 4, box_format: str = "xywh") -> Dataset:
    """A data set as on the Hub: boxes without masks, crowds or areas."""
    box = [20, 10, 20, 20] if box_format == "xywh" else [20, 10, 40, 30]
    pixels = np.zeros((50, 80, 3), np.uint8)
    pixels[10:30, 20:40] = 255
    features = Features(
        {
            "image_id": Value("int64"),
            "image": ImageFeature(),
            "width": Value("int64"),
            "height": Value("int64"),
            "objects": {"bbox": List(List(Value("float32"), length=4)), "category": List(ClassLabel(names=["cat"]))},
        }
    )
    columns = {
        "image_id": list(range(num_images)),
        "image": [Image.fromarray(pixels)] * num_images,
        "width": [80] * num_images,
        "height": [50] * num_images,
        "objects": [{"bbox": [box], "category": [0]}] * num_images,
    }
    return Dataset.from_dict(columns, features=features)


@pytest.fixture(scope="module")
def trained(example, tiny_vit, tmp_path_factory) -> Path:
    """Ten steps of instance segmentation on cluttered digits."""
    folder = tmp_path_factory.mktemp("instances")
    arguments = command(tiny_vit, folder, max_steps=10, warmup_steps=2, save_steps=4)
    metrics = example("train_instance_segmentation").main(arguments)
    assert all(0 <= metrics[f"eval_{kind}_map_50"] <= 1 for kind in ("box", "mask"))
    return folder


class TestTraining:
    def test_the_result_is_stripped_and_loads_through_the_auto_class(self, trained):
        model = AutoModelForInstanceSegmentation.from_pretrained(trained)
        assert type(model) is cropr_hf.CroprViTForInstanceSegmentation
        assert not any("auxiliary" in name for name in model.state_dict())
        assert model.config.id2label == {digit: str(digit) for digit in range(10)}
        processor = AutoImageProcessor.from_pretrained(trained)
        assert type(processor) is cropr_hf.CroprViTImageProcessor
        assert dict(processor.pad_size) == {"height": 48, "width": 48} and processor.size["longest_edge"] == 48

    def test_the_published_image_processor_takes_images_of_any_mode(self, trained):
        processor = AutoImageProcessor.from_pretrained(trained)
        grey = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60), np.uint8))
        found, expected = (processor(image, return_tensors="pt") for image in (grey, grey.convert("RGB")))
        assert torch.equal(found["pixel_values"], expected["pixel_values"])

    def test_loss_parts_and_drops_of_the_learning_rate_are_in_the_log_history(self, trained):
        logs = [entry for entry in history(trained) if "loss" in entry]
        for entry in logs:
            parts = entry["main_loss"] + entry["auxiliary_loss_1"] + entry["auxiliary_loss_2"]
            assert entry["loss"] == pytest.approx(parts, abs=2e-3)
        rates = [entry["learning_rate"] for entry in logs]
        assert rates == pytest.approx([0, 5e-4, *[1e-3] * 6, 1e-4, 1e-5])

    @pytest.mark.full
    def test_resuming_repeats_the_uninterrupted_run(self, example, tiny_vit, trained, tmp_path):
        settings = {"max_steps": 10, "warmup_steps": 2, "save_steps": 4}
        checkpoint = str(trained / "checkpoint-4")
        arguments = command(tiny_vit, tmp_path, resume_from_checkpoint=checkpoint, **settings)
        example("train_instance_segmentation").main(arguments)
        assert losses(tmp_path) == losses(trained)

    @pytest.mark.full
    def test_files_in_coco_format(self, example, tiny_vit, tmp_path):
        write_coco(tmp_path / "data")
        arguments = files_command(tiny_vit, tmp_path / "out", tmp_path / "data")
        metrics = example("train_instance_segmentation").main(arguments)
        assert metrics.keys() >= {"eval_loss", "eval_box_map", "eval_mask_map_75", "eval_mask_map_small"}
        config = cropr_hf.CroprViTConfig.from_pretrained(tmp_path / "out")
        assert config.id2label == {0: "dog", 1: "cat"}

    @pytest.mark.full
    def test_a_data_set_without_masks_trains_a_detector(self, example, tiny_vit, tmp_path):
        (tmp_path / "images" / "data").mkdir(parents=True)
        hub_images(8, "xyxy").to_parquet(tmp_path / "images" / "data" / "train-0.parquet")
        arguments = command(tiny_vit, tmp_path / "out", dataset_name=tmp_path / "images", box_format="xyxy")
        metrics = example("train_object_detection").main(arguments)
        assert "eval_box_map" in metrics and "eval_mask_map" not in metrics
        assert type(AutoModelForObjectDetection.from_pretrained(tmp_path / "out")).__name__.endswith("ObjectDetection")

    @pytest.mark.full
    def test_two_processes_by_accelerate(self, tiny_vit, tmp_path):
        """Five images to evaluate on two processes: one image comes twice."""
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
        launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        launch += ["--main_process_port", str(free_port()), str(EXAMPLES / "train_instance_segmentation.py")]
        arguments = command(tiny_vit, tmp_path, per_device_train_batch_size=2, max_eval_samples=5)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run([*launch, *arguments], capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr[-3000:]
        assert len([entry for entry in history(tmp_path) if "auxiliary_loss_2" in entry]) == 2

    def test_defaults_are_the_recipe_of_eva02(self, example):
        script = example("detection")
        fields = script.DetectorArguments().overrides()
        config = cropr_hf.CroprViTConfig.from_size("eva02_large", use_cls_token=False, pooling="patch_mean", **fields)
        assert config.kept_patches() == cropr_hf.CroprViTConfig.from_size("eva02_large_detection").kept_patches()
        assert config.drop_path_rate == 0.4 and config.window_size == 16 and config.image_size == 1536
        assert "pruning_schedule" not in script.DetectorArguments(pruning_rate=8).overrides()
        assert "window_size" not in script.DetectorArguments("examples/digits_vit").overrides()
        assert script.DetectorArguments(config='{"nms_method": "linear"}').overrides()["nms_method"] == "linear"
        data, digits = script.DataArguments(), script.DataArguments("cluttered_digits")
        assert data.scale_range == [0.1, 2.0] and data.horizontal_flip == 0.5
        assert digits.scale_range == [0.8, 1.25] and digits.horizontal_flip == 0
        recipe = example("train_object_detection").ObjectDetectionArguments(use_cpu=True)
        assert recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps == 128
        assert recipe.max_steps == 60_000 and recipe.warmup_steps == 1000 and recipe.lr_drops == [0.8, 0.9]


class TestEvaluation:
    def test_a_published_folder_is_measured_with_picture(self, example, trained, tmp_path):
        arguments = ["--model_name_or_path", str(trained), "--dataset_name", "cluttered_digits", "--seed", "42"]
        arguments += ["--max_eval_samples", "4", "--picture", str(tmp_path / "found.png"), "--picture_threshold", "0"]
        scores = example("evaluate_detection").main(arguments)
        expected = json.loads((trained / "eval_results.json").read_text())
        kept, chance = scores.pop("object_patches_kept"), scores.pop("patches_kept")
        config = AutoConfig.from_pretrained(trained)
        assert 0 < kept < 1 and chance == pytest.approx(config.kept_patches()[-1] / config.num_patches)
        assert len(scores) == 12 and scores == pytest.approx({name: expected[f"eval_{name}"] for name in scores})
        with Image.open(tmp_path / "found.png") as picture:
            assert picture.format == "PNG"

    def test_patches_of_objects_are_counted_by_hand(self, example):
        """4 x 6 patches of 8 pixels, of which the input shows 4 x 3; a box over two of them, and one over four."""
        script = example("evaluate_detection")
        config = SimpleNamespace(grid_size=(4, 6), patch_size=8)
        patches = script.KeptPatches(num_blocks=5)
        assert patches.compute() == {"object_patches_kept": -1.0, "patches_kept": -1.0}
        objects = {"bbox": [[2.0, 2.0, 26.0, 10.0], [16.0, 32.0, 25.0, 32.0]], "category": [0, 1]}
        row = {"image_id": 0, "width": 48, "height": 64, "objects": objects}  # twice the size of the input
        block = torch.tensor([[5, 2, 3, 1, 1, 1], [1, 5, 5, 5, 5, 5], [1, 1, 5, 1, 1, 1], [5, 5, 1, 1, 1, 1]])
        picture = script.picture_patches([(32, 24)], (32, 48), 8)
        patches.add(block.view(1, 24), script.touched_patches([row], "xywh", [(32, 24)], config), picture)
        # Columns 0 and 1 of row 0, of which one is kept; columns 1 and 2 of rows 2 and 3, of which two are
        assert patches.compute() == {"object_patches_kept": 3 / 6, "patches_kept": 6 / 12}

    @pytest.mark.full
    def test_it_finds_what_the_pipeline_finds(self, example, tiny_vit, tmp_path):
        example("train_object_detection").main(command(tiny_vit, tmp_path))
        script = example("evaluate_detection")
        detector = script.Detector(script.EvaluationArguments(str(tmp_path)))
        image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 80, 3), np.uint8))
        found = detector.detect([image])[0]
        expected = pipeline("object-detection", model=str(tmp_path))(image, threshold=0.0)
        assert len(expected) == len(found["scores"]) > 0
        assert found["scores"].tolist() == pytest.approx([entry["score"] for entry in expected], abs=1e-4)
        corners = torch.tensor([list(entry["box"].values()) for entry in expected])  # the pipeline's are whole numbers
        assert (found["boxes"].int() - corners).abs().max() <= 1

    def test_another_split_of_files_and_other_categories_are_errors(self, example, trained, tmp_path):
        write_coco(tmp_path)
        arguments = ["--model_name_or_path", str(trained), "--validation_images_dir", str(tmp_path / "validation")]
        arguments += ["--validation_annotations", str(tmp_path / "validation.json")]
        with pytest.raises(ValueError, match="knows the categories"):
            example("evaluate_detection").main(arguments)
        with pytest.raises(ValueError, match="no split 'test', only train, validation"):
            example("evaluate_detection").main([*arguments, "--split", "test"])
        (tmp_path / "validation.json").write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
        with pytest.raises(ValueError, match="'validation' has no image"):
            example("evaluate_detection").main(arguments)


class TestCocoFiles:
    def test_objects_of_a_row(self, example, tmp_path):
        coco = example("coco")
        write_coco(tmp_path)
        images = coco.load_coco(str(tmp_path / "train"), str(tmp_path / "train.json"), masks=True)
        assert coco.label_names(images) == ["dog", "cat"] and images["image_id"][:] == [1000, 1001, 1002]
        cat, dog, crowd = coco.annotations(images[0])
        assert (cat["category_id"], cat["bbox"], cat["area"], cat["iscrowd"]) == (1, [20, 10, 20, 20], 400, 0)
        assert (dog["category_id"], dog["area"], crowd["category_id"], crowd["iscrowd"]) == (0, 150, 0, 1)
        masks = coco.decode_masks([entry["segmentation"] for entry in (cat, dog, crowd)], 50, 80)
        assert masks.sum(dim=(1, 2)).tolist() == [400, 150, 2000] and masks[2, :, :40].all()
        assert masks[0, 10:30, 20:40].all() and masks[1, 5:15, 60:75].all()
        assert coco.annotations(images[2]) == [] and coco.decode_masks([], 50, 80).shape == (0, 50, 80)

    def test_masks_of_digits(self, example):
        coco = example("coco")
        digits = example("cluttered_digits").cluttered_digits("train", 3, **example("detection").DIGITS)
        for row in digits:
            objects = coco.annotations(row)
            masks = coco.decode_masks([entry["segmentation"] for entry in objects], 96, 96)
            assert masks.sum(dim=(1, 2)).tolist() == row["objects"]["area"]
            assert torch.equal(masks.sum(dim=0) > 0, torch.tensor(np.array(row["instance_map"])) > 0)

    def test_wrong_files_say_what_to_do(self, example, tmp_path):
        load = example("coco").load_coco
        with pytest.raises(ValueError, match="There is no file"):
            load(str(tmp_path), str(tmp_path / "none.json"))
        content = write_coco(tmp_path)
        file = tmp_path / "train.json"
        file.write_text("[]")
        with pytest.raises(ValueError, match="has no annotations, categories, images"):
            load(str(tmp_path / "train"), str(file))
        file.write_text(json.dumps({**content, "categories": content["categories"][:1]}))
        with pytest.raises(ValueError, match="lacks the image or the category"):
            load(str(tmp_path / "train"), str(file))
        with pytest.raises(ValueError, match="3 of 3 images do not exist"):
            load(str(tmp_path), str(tmp_path / "validation.json"))

    @pytest.mark.parametrize(
        ("part", "changes", "reason"),
        [
            ("images", {"id": None}, "has no id; it must be a whole number"),
            ("images", {"id": "7"}, "has id '7'; it must be a whole number"),
            ("images", {"file_name": 3}, "has file_name 3; it must be the name of a file"),
            ("images", {"width": None}, "has no width"),
            ("images", {"height": 0}, "has height 0; it must be a number of pixels"),
            ("categories", {"id": 1.5}, r"has id 1\.5"),
            ("categories", {"name": None}, "has no name; it must be text"),
            ("annotations", {"bbox": None}, r"has no bbox; it must be \[left, top, width, height\]"),
            ("annotations", {"bbox": [1, 2, 3]}, r"has bbox \[1, 2, 3\]"),
            ("annotations", {"bbox": [1, 2, -3, 4]}, r"has bbox \[1, 2, -3, 4\]"),
            ("annotations", {"bbox": [1, 2, float("nan"), 4]}, r"has bbox \[1, 2, nan, 4\]"),
            ("annotations", {"image_id": None}, "has no image_id"),
            ("annotations", {"category_id": "cat"}, "has category_id 'cat'"),
            ("annotations", {"image_id": 5}, "lacks the image or the category"),
            ("annotations", {"area": "large"}, "has area 'large'"),
            ("annotations", {"iscrowd": 2}, "has iscrowd 2; it must be 0 or 1"),
        ],
    )
    def test_wrong_entries_are_named(self, example, tmp_path, part, changes, reason):
        content = write_coco(tmp_path)
        content[part][1] |= changes
        for name in [name for name, value in changes.items() if value is None]:
            del content[part][1][name]
        (tmp_path / "train.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=rf"train\.json, {part}\[1\] {reason}") as error:
            example("coco").load_coco(str(tmp_path / "train"), str(tmp_path / "train.json"))
        assert "{" in str(error.value)  # the entry itself

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"images": {}}, "images is {}; it must be a list"),
            ({"annotations": ["dog"]}, r"annotations\[0\] is 'dog'; it must have image_id"),
            ({"categories": [{"id": 1, "name": "cat"}] * 2}, "has 2 categories of the id 1"),
            (
                {"categories": [{"id": number, "name": "cat"} for number in (7, 90)]},
                "has 2 categories of the name 'cat'",
            ),
        ],
    )
    def test_wrong_parts_are_named(self, example, tmp_path, changes, reason):
        file = tmp_path / "train.json"
        file.write_text(json.dumps(write_coco(tmp_path) | changes))
        with pytest.raises(ValueError, match=rf"train\.json.* {reason}"):
            example("coco").load_coco(str(tmp_path / "train"), str(file))
        for content in (b"{", b"\xff\xfe\x00"):
            file.write_bytes(content)
            with pytest.raises(ValueError, match=r"train\.json is not JSON"):
                example("coco").load_coco(str(tmp_path / "train"), str(file))

    @pytest.mark.parametrize(
        ("segmentation", "reason"),
        [
            (None, "must be polygons"),
            ([], "must be polygons"),
            ([[]], "must be polygons"),
            ([[20, 10, 40, 30]], "of three corners or more"),
            ([[20, 10, 40, 30, 20, "x"]], "must be polygons"),
            ("mask", "must be polygons"),
            ({"size": [60, 80], "counts": [0, 4800]}, r"run lengths for \[60, 80\], but its image is \[50, 80\]"),
            ({"size": [50, 80], "counts": [0, 100]}, "is not one of COCO's"),
            ({"size": [50, 80]}, "is not one of COCO's"),
            ({"counts": [0, 4000]}, "run lengths for None"),
        ],
    )
    def test_masks_that_are_none(self, example, tmp_path, segmentation, reason):
        """They are errors where masks are wanted; a detector of boxes learns from `bbox`."""
        coco, script = example("coco"), example("detection")
        content = write_coco(tmp_path)
        content["annotations"][0]["segmentation"] = segmentation
        (tmp_path / "train.json").write_text(json.dumps(content))
        files = (str(tmp_path / "train"), str(tmp_path / "train.json"))
        with pytest.raises(ValueError, match=rf"train\.json, annotations\[0\]: The mask .*{reason}"):
            coco.load_coco(*files, masks=True)
        row = script.prepare_split(coco.load_coco(*files), script.DataArguments("x"), masks=False)[0]
        labels = TestTransform.transform(script, False, False).example(row)["labels"]
        assert labels["class_labels"].tolist() == [1, 0]
        assert (labels["boxes"][0] * 80).tolist() == pytest.approx([30, 20, 20, 20])

    def test_boxes_are_those_of_bbox_without_masks(self, example):
        """Also where a data set has masks, of whatever kind."""
        script, row = example("detection"), rectangles(0, True)
        expected = TestTransform.transform(script, False, False).example(rectangles(0, False))["labels"]["boxes"]
        row["instance_map"] = Image.new("L", row["image"].size)  # empty masks
        for changes in ({}, {"segmentation": [[[]]] * 3}):
            row["objects"] |= changes
            labels = TestTransform.transform(script, False, False).example(row)["labels"]
            assert torch.equal(labels["boxes"], expected)

    def test_empty_masks_are_told(self, example, tmp_path, caplog):
        content = write_coco(tmp_path)
        content["annotations"][3]["segmentation"] = [[5, 5, 5, 5, 5, 5]]
        (tmp_path / "train.json").write_text(json.dumps(content))
        example("coco").load_coco(str(tmp_path / "train"), str(tmp_path / "train.json"), masks=True)
        assert [message for message in caplog.messages if "1 objects have empty masks" in message]
        assert "annotations[3]" in caplog.text

    def test_objects_to_learn_from_are_counted(self, example, caplog):
        coco = example("coco")
        features = Features(
            {
                "image_id": Value("int64"),
                "objects": {
                    "bbox": List(List(Value("float32"), length=4)),
                    "category": List(ClassLabel(names=["cat", "dog"])),
                    "iscrowd": List(Value("int64")),
                },
            }
        )

        def check(crowds, boxes, box_format="xywh"):
            objects = [
                {"bbox": boxes, "category": [0, 1], "iscrowd": crowds},
                {"bbox": [], "category": [], "iscrowd": []},
            ]
            columns = {"image_id": [1, 2], "objects": objects}
            coco.check_counts(Dataset.from_dict(columns, features=features).select([1, 0]), box_format)

        good, empty = [5, 5, 9, 9], [5, 5, 0, 9]
        check([0, 0], [good, good])
        assert not caplog.messages
        check([0, 1], [good, good])
        assert "1 of 2 categories have no object to learn from: 'dog'. There are 2 objects on the 2 " in caplog.text
        with pytest.raises(ValueError, match=r"no object to learn from: 2 objects .* 1 of them crowds .*, 1 without"):
            check([1, 0], [good, empty])
        with pytest.raises(ValueError, match=r"0 of them crowds .*, 2 without width or height"):
            check([0, 0], [[5, 5, 5, 9], [5, 5, 9, 5]], "xyxy")

    def test_crowds_alone_are_refused_before_the_training(self, example, tiny_vit, tmp_path):
        content = write_coco(tmp_path / "data")
        for entry in content["annotations"]:
            entry["iscrowd"] = 1
        (tmp_path / "data" / "train.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="6 objects on the 3 training images, 6 of them crowds"):
            example("train_object_detection").main(files_command(tiny_vit, tmp_path / "out", tmp_path / "data"))
        assert not (tmp_path / "out").exists()

    def test_wrong_data_says_what_to_do(self, example, tiny_vit, tmp_path):
        coco, script = example("coco"), example("detection")
        images = hub_images()
        with pytest.raises(ValueError, match="no masks for all of them"):
            coco.check_objects(images, masks=True)
        with pytest.raises(ValueError, match="must have image_id"):
            coco.check_objects(images.remove_columns("width"), masks=False)
        features = images.features.copy()
        features["objects"] = {**features["objects"], "category": List(Value("int64"))}
        with pytest.raises(ValueError, match="not class labels"):
            coco.check_objects(images.cast(features), masks=False)
        with pytest.raises(ValueError, match="must be different integers"):
            coco.CocoMetrics(images.remove_columns("image_id").add_column("image_id", [1] * 4), masks=False)
        with pytest.raises(ValueError, match="4 of 4 boxes end outside"):
            coco.CocoMetrics(hub_images(box_format="xyxy").map(lambda row: {"width": 50, "height": 35}), masks=False)
        with pytest.raises(ValueError, match="--box_format"):
            script.DataArguments(box_format="cxcywh")
        with pytest.raises(ValueError, match="--scale_range"):
            script.DataArguments(scale_range=[2.0, 0.1])
        with pytest.raises(ValueError, match="--lr_drops"):
            script.CocoArguments(lr_drops=[48_000], output_dir=str(tmp_path))
        with pytest.raises(ValueError, match="label_smoothing"):
            example("train_object_detection").main(command(tiny_vit, tmp_path, label_smoothing=0.1))
        write_coco(tmp_path / "data")
        validation = tmp_path / "data" / "validation.json"
        validation.write_text(validation.read_text().replace('cat"', 'cow"'))
        with pytest.raises(ValueError, match="same categories"):
            example("train_object_detection").main(files_command(tiny_vit, tmp_path, tmp_path / "data"))


def rectangles(seed: int, with_masks: bool) -> dict:
    """A row whose objects are filled rectangles, each alone in a channel of the image."""
    rng = np.random.default_rng(seed)
    height, width = (int(length) for length in rng.integers(40, 90, 2))
    pixels, objects = np.zeros((height, width, 3), np.uint8), {"bbox": [], "category": [], "iscrowd": []}
    instances = np.zeros((height, width), np.uint8)
    for channel in range(3):
        w, h = (int(length) for length in rng.integers(8, 16, 2))
        x, y = (
            int(rng.integers(0, width - w)),
            int(rng.integers(channel * height // 3, (channel + 1) * height // 3 - 4)),
        )
        h = min(h, (channel + 1) * height // 3 - y)
        pixels[y : y + h, x : x + w, channel], instances[y : y + h, x : x + w] = 255, channel + 1
        for name, value in {"bbox": [x, y, w, h], "category": channel, "iscrowd": 0}.items():
            objects[name].append(value)
    row = {"image_id": seed, "image": Image.fromarray(pixels), "width": width, "height": height, "objects": objects}
    return {**row, "instance_map": Image.fromarray(instances)} if with_masks else row


class TestTransform:
    @staticmethod
    def transform(script, masks: bool, training: bool, **kwargs):
        processor = DetrImageProcessor(
            size={"shortest_edge": 64, "longest_edge": 64},
            pad_size={"height": 64, "width": 64},
            image_mean=[0.25, 0.25, 0.25],
            image_std=[0.25, 0.25, 0.25],
        )
        return script.Transform(script.DataArguments("other", **kwargs), processor, masks, training)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("with_masks", [True, False])
    def test_boxes_masks_and_images_stay_together(self, example, training, with_masks):
        """What is bright in the channel of an object is what its box and its mask show, whatever happened to it."""
        transform = self.transform(example("detection"), with_masks, training, scale_range=[0.5, 3.0])
        seen, lost = 0, 0
        for seed in range(30):
            result = transform.example(rectangles(seed, with_masks))
            pixels, labels = result["pixel_values"] * 0.25 + 0.25, result["labels"]
            assert result["pixel_values"].shape == (3, 64, 64) and result["pixel_mask"].shape == (64, 64)
            assert (result["pixel_values"][:, ~result["pixel_mask"]] == 0).all()
            boxes = box_convert(labels["boxes"], "cxcywh", "xyxy") * 64
            assert len(labels["class_labels"]) == len(boxes)
            lost += 3 - len(boxes)
            bright = (pixels > 0.5) & result["pixel_mask"]
            for index, channel in enumerate(labels["class_labels"].tolist()):
                rows, columns = bright[channel].any(dim=1).nonzero(), bright[channel].any(dim=0).nonzero()
                if not len(rows):  # a sliver of less than half a pixel
                    continue
                found = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                assert (found - boxes[index]).abs().max() <= 1
                if with_masks:
                    differ = labels["masks"][index].bool() != bright[channel]
                    assert differ.sum() <= 0.5 * 2 * sum(found[2:] - found[:2]) + 2  # half of the border
                seen += 1
        assert seen >= 40 and (lost > 10) == training

    def test_mirrors_and_crops_happen_in_training_alone(self, example):
        script, row = example("detection"), rectangles(0, True)
        flipped = self.transform(script, True, True, horizontal_flip=1.0, scale_range=[1.0, 1.0]).example(row)
        plain = self.transform(script, True, False).example(row)
        inside = int(plain["pixel_mask"][0].sum())
        flipped_width = int(flipped["pixel_mask"][0].sum())
        assert abs(inside - flipped_width) <= 1
        centres = plain["labels"]["boxes"][:, 0] * 64
        assert torch.allclose(flipped["labels"]["boxes"][:, 0] * 64, inside - centres, atol=1.5)

    def test_evaluation_shows_the_model_what_the_image_processor_shows(self, example):
        transform, row = self.transform(example("detection"), True, False), rectangles(1, True)
        result, expected = transform.example(row), transform.processor(row["image"], return_tensors="pt")
        torch.testing.assert_close(result["pixel_values"], expected.pixel_values[0], rtol=0, atol=1e-4)
        assert torch.equal(result["pixel_mask"].long(), expected.pixel_mask[0])

    def test_crowds_and_images_without_objects(self, example):
        row = rectangles(2, True)
        row["objects"]["iscrowd"] = [0, 1, 0]
        for training in (True, False):
            transform = self.transform(example("detection"), True, training, scale_range=[1.0, 1.0])
            assert transform.example(row)["labels"]["class_labels"].tolist() == [0, 2]
            empty = {**row, "objects": {"bbox": [], "category": []}}
            labels = transform.example(empty)["labels"]
            assert labels["boxes"].shape == (0, 4) and labels["masks"].shape == (0, 64, 64)

    def test_a_wrong_size_is_an_error(self, example):
        row = rectangles(3, False)
        size = rf"{row['height']} x {row['width']} pixels, but its objects are those of"
        with pytest.raises(ValueError, match=rf"The image 3 \(An image\) has {size} .* correct one of them"):
            self.transform(example("detection"), False, False).example({**row, "width": row["width"] + 1})

    def test_files_that_are_broken_or_turned_are_named(self, example, tmp_path, caplog):
        transform = self.transform(example("detection"), False, False)

        def prepare(width, height, orientation):
            exif = Image.Exif()
            exif[0x0112] = orientation
            Image.new("RGB", (60, 40)).save(tmp_path / "photo.png", exif=exif)
            file = {"bytes": None, "path": str(tmp_path / "photo.png")}
            objects = {"bbox": [[5, 5, 20, 30]], "category": [0]}
            row = {"image_id": 9, "image": file, "width": width, "height": height, "objects": objects}
            return transform.example(row)

        assert prepare(40, 60, 6)["labels"]["orig_size"].tolist() == [60, 40] and not caplog.messages
        prepare(60, 40, 3)
        assert "photo.png) is turned by its EXIF orientation, 3" in caplog.text
        with pytest.raises(ValueError, match=r"The image 9 \(.*photo\.png\) has 60 x 40 .* 6, .*those of 40 x 60"):
            prepare(60, 40, 6)
        (tmp_path / "photo.png").write_bytes((tmp_path / "photo.png").read_bytes()[:70])
        file = {"bytes": None, "path": str(tmp_path / "photo.png")}
        with pytest.raises(ValueError, match=r"photo\.png cannot be read as an image"):
            transform.example({**rectangles(0, False), "image": file})

    @pytest.mark.parametrize("size", [(1000, 2), (10, 600)])
    def test_strips_train_and_are_named_where_the_input_is_too_small(self, example, size):
        objects = {"bbox": [[0, 0, *size]], "category": [0]}
        row = {"image_id": 7, "image": Image.new("RGB", size), "width": size[0], "height": size[1], "objects": objects}
        for _ in range(5):
            result = self.transform(example("detection"), False, True).example(row)
            assert result["pixel_values"].shape == (3, 64, 64)
        evaluation = self.transform(example("detection"), False, False)
        if min(size) == 10:
            assert evaluation.example(row)["pixel_mask"].sum() == 64
        else:
            with pytest.raises(
                ValueError, match=r"The image 7 \(An image\) of 2 x 1000 pixels does not fit: .*leave it out"
            ):
                evaluation.example(row)


class TestCocoMetrics:
    @staticmethod
    def truth(script, images: list[list[tuple]], masks: bool = False):
        """From `(box as corners, category, iscrowd)` for each object of each image of 100 x 100 pixels."""
        objects = {"bbox": List(List(Value("float64"))), "category": List(ClassLabel(names=["a", "b"]))}
        objects["iscrowd"] = List(Value("int64"))
        columns = {
            "image_id": list(range(len(images))),
            "width": [100] * len(images),
            "height": [100] * len(images),
            "objects": [
                {name: [entry[place] for entry in image] for place, name in enumerate(objects)} for image in images
            ],
        }
        if masks:
            objects["segmentation"] = List(List(List(Value("float64"))))
            for entry in columns["objects"]:
                entry["segmentation"] = [[[x, y, u, y, u, v, x, v]] for x, y, u, v in entry["bbox"]]
        sizes = {name: Value("int64") for name in ("image_id", "width", "height")}
        rows = Dataset.from_dict(columns, features=Features({**sizes, "objects": objects}))
        return script.CocoMetrics(rows, masks, box_format="xyxy")

    @staticmethod
    def found(*predictions: tuple) -> dict[str, torch.Tensor]:
        """From `(box as corners, category, score)`."""
        boxes = torch.tensor([box for box, _, _ in predictions], dtype=torch.float32).view(-1, 4)
        masks = torch.zeros(len(boxes), 100, 100, dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()):
            mask[top:bottom, left:right] = True
        labels = torch.tensor([label for _, label, _ in predictions], dtype=torch.int64)
        return {"boxes": boxes, "labels": labels, "scores": torch.tensor([s for *_, s in predictions]), "masks": masks}

    def test_perfect_predictions(self, example):
        first, second = [10, 10, 40, 30], [50, 20, 90, 95]
        metrics = self.truth(example("coco"), [[(first, 0, 0), (second, 1, 0)], []], masks=True)
        metrics.add(0, self.found((first, 0, 0.9), (second, 1, 0.8)))
        metrics.add(1, self.found())
        scores = metrics.compute()
        assert len(scores) == 12
        for kind in ("box", "mask"):
            assert all(scores[f"{kind}_{name}"] == 1 for name in ("map", "map_50", "map_75", "map_small"))
            assert scores[f"{kind}_map_medium"] == 1 and scores[f"{kind}_map_large"] == -1

    def test_a_simple_case_by_hand(self, example):
        """Two objects; a wrong prediction has the highest score, then one object is found with an IoU of 0.62."""
        metrics = self.truth(example("coco"), [[([0, 0, 50, 100], 0, 0), ([60, 0, 90, 50], 0, 0)]])
        metrics.add(0, self.found(([60, 60, 90, 90], 0, 0.9), ([0, 0, 50, 62], 0, 0.8)))
        scores = metrics.compute()
        # Precision is 1/2 up to a recall of 1/2: 51 of 101 points. IoU 0.62 counts at 3 of 10 thresholds.
        assert scores["box_map_50"] == pytest.approx(0.5 * 51 / 101)
        assert scores["box_map"] == pytest.approx(0.3 * 0.5 * 51 / 101) and scores["box_map_75"] == 0

    def test_masks_count_apart_from_boxes(self, example):
        metrics = self.truth(example("coco"), [[([0, 0, 50, 50], 0, 0)]], masks=True)
        found = self.found(([0, 0, 50, 50], 0, 0.9))
        found["masks"][0, 25:] = False
        metrics.add(0, found)
        scores = metrics.compute()
        assert scores["box_map"] == 1 and scores["mask_map_50"] == 1 and scores["mask_map"] == pytest.approx(0.1)

    def test_what_is_found_in_a_crowd_is_not_wrong(self, example):
        box, crowd = [0, 0, 30, 30], [40, 40, 100, 100]
        for iscrowd, expected in ((1, 1.0), (0, 0.5 * 51 / 101)):
            metrics = self.truth(example("coco"), [[(box, 0, 0), (crowd, 0, iscrowd)]])
            metrics.add(0, self.found(([45, 45, 60, 60], 0, 0.95), (box, 0, 0.9)))
            assert metrics.compute()["box_map"] == pytest.approx(expected)

    def test_nothing_found_is_zero_and_predictions_are_forgotten(self, example):
        box = [0, 0, 30, 30]
        metrics = self.truth(example("coco"), [[(box, 0, 0)], [(box, 0, 0)]], masks=True)
        metrics.add(0, self.found((box, 0, 0.9)))
        assert metrics.compute()["mask_map"] == pytest.approx(51 / 101)  # the other image counts, too
        assert metrics.compute()["box_map"] == 0

    def test_images_that_come_twice_count_once(self, example, monkeypatch):
        """Processes fill up their last batch with images of other processes."""
        box = [0, 0, 30, 30]
        metrics = self.truth(example("coco"), [[(box, 0, 0)]])
        metrics.add(0, self.found((box, 0, 0.9)))
        monkeypatch.setattr(example("coco"), "gather_object", lambda found: found + found)
        assert metrics.compute()["box_map"] == 1
