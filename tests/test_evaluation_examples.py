"""The evaluation scripts: patches of objects that are kept, other methods than the folder's, exported files."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForInstanceSegmentation,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    DeiTConfig,
    SegformerConfig,
    SegformerImageProcessor,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
    YolosConfig,
)

import cropr_hf
from cropr_hf.cli import main as command_line
from cropr_hf.publishing.model_card import read_record
from cropr_hf.speed.cost import multiply_adds
from tests.test_detection_examples import TINY_HEADS


CLASSES = ["background", "ape", "bee"]
SCHEDULE = [30, 9, 9, 9]  # of 36 patches
needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")), reason="ONNX is not installed"
)


def label_map(index: int) -> np.ndarray:
    """96 x 96 pixels, of which some whole patches of 16, which become 8, are objects."""
    patches = np.random.default_rng(index).integers(0, 3, (6, 6), np.uint8)
    return np.kron(patches, np.ones((16, 16), np.uint8))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Five images, by class and with label maps."""
    folder = tmp_path_factory.mktemp("data")
    for index in range(5):
        pixels = np.random.default_rng(index).integers(0, 255, (96, 96, 3), np.uint8)
        for split in ("training", "validation"):
            places = [folder / "maps" / "images" / split, folder / "classes" / split.removesuffix("ing")]
            places[1] = places[1] / CLASSES[1 + index % 2]
            for place in places:
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(place / f"{index}.png")
            maps = folder / "maps" / "annotations" / split
            maps.mkdir(parents=True, exist_ok=True)
            Image.fromarray(label_map(index)).save(maps / f"{index}.png")
    (folder / "maps" / "id2label.json").write_text(json.dumps(dict(enumerate(CLASSES))))
    return folder


def publish(folder: Path, model_class, tiny_vit: str, **fields) -> Path:
    names = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: index for index, name in enumerate(CLASSES)}}
    model = model_class.from_vit(tiny_vit, **{"pruning_schedule": SCHEDULE, **names, **fields})
    processor = SegformerImageProcessor if "Segmentation" in model_class.__name__ else ViTImageProcessor
    model.save_pretrained(folder, beside=processor(size={"height": 48, "width": 48}).save_pretrained)
    return folder


UNPRUNED = {"token_reducer": None, "pruning_schedule": None}


@pytest.fixture(scope="module")
def classifier(tiny_vit, tmp_path_factory) -> Path:
    return publish(tmp_path_factory.mktemp("pruned"), cropr_hf.CroprViTForImageClassification, tiny_vit)


@pytest.fixture(scope="module")
def unpruned(tiny_vit, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpruned")
    return publish(folder, cropr_hf.CroprViTForImageClassification, tiny_vit, **UNPRUNED)


@pytest.fixture(scope="module")
def encoder(tiny_vit, tmp_path_factory) -> Path:
    return publish(tmp_path_factory.mktemp("encoder"), cropr_hf.CroprViTModel, tiny_vit)


@pytest.fixture(scope="module")
def segmenter(tiny_vit, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("segmenter")
    return publish(folder, cropr_hf.CroprViTForSemanticSegmentation, tiny_vit)


@pytest.fixture(scope="module")
def detector(tiny_vit, tmp_path_factory) -> Path:
    """Finds digits at random."""
    folder = tmp_path_factory.mktemp("detector")
    names = {"id2label": {digit: str(digit) for digit in range(10)}}
    model = cropr_hf.CroprViTForObjectDetection.from_vit(
        tiny_vit,
        pruning_rate=8,
        use_cls_token=False,
        pooling="patch_mean",
        last_layer_fusion=True,
        **names,
        **TINY_HEADS,
    )
    sides = {"height": 48, "width": 48}
    processor = cropr_hf.CroprViTImageProcessor(size={"shortest_edge": 48, "longest_edge": 48}, pad_size=sides)
    model.save_pretrained(folder, beside=processor.save_pretrained)
    return folder


@pytest.fixture(scope="module")
def detect(example):
    """Measures a folder on two images of drawn digits, with further arguments."""

    def run(folder, *arguments):
        words = ["--model_name_or_path", str(folder), "--dataset_name", "cluttered_digits", "--max_eval_samples", "2"]
        return example("evaluate_detection").main([*words, *map(str, arguments)])

    return run


@pytest.fixture(scope="module")
def classify(example, data):
    """Measures a folder on the images by class, with further arguments."""

    def run(folder, *arguments, maps=True):
        words = ["--model_name_or_path", str(folder), "--dataset_name", str(data / "classes")]
        words += ["--split", "validation", "--batch_size", "3"]
        words += ["--object_maps", str(data / "maps" / "annotations" / "validation")] if maps else []
        return example("evaluate_image_classification").main([*words, *map(str, arguments)])

    return run


@pytest.fixture(scope="module")
def segment(example, data):
    """Measures a folder on the label maps, with further arguments."""

    def run(folder, *arguments):
        words = ["--model_name_or_path", str(folder), "--data_dir", str(data / "maps")]
        return example("evaluate_semantic_segmentation").main([*words, *map(str, arguments)])

    return run


def kept_by_hand(model, processor, data: Path) -> dict[str, float]:
    """The metrics, patch by patch."""
    kept, chance = [], []
    for index in range(5):
        image = Image.open(data / "maps" / "images" / "validation" / f"{index}.png")
        with torch.no_grad():
            outputs = model(processor(image, return_tensors="pt")["pixel_values"], output_pruning=True)
        for patch, block in enumerate(outputs.pruned_after_block[0].tolist()):
            row, column = divmod(patch, 6)
            chance.append(block == model.config.num_hidden_layers)
            if label_map(index)[16 * row, 16 * column]:
                kept.append(chance[-1])
    return {"object_patches_kept": np.mean(kept), "patches_kept": np.mean(chance)}


class TestEmbedding:
    @pytest.fixture
    def measure(self, example, data, tiny_vit):
        """Compares a folder with its source, with further arguments."""

        def run(folder, *arguments):
            words = ["--model_name_or_path", str(folder), "--teacher_name_or_path", tiny_vit]
            words += ["--dataset_name", str(data / "classes"), "--split", "validation", "--batch_size", "2"]
            return example("evaluate_embedding").main([*words, *map(str, arguments)])

        return run

    def test_it_is_that_of_the_models(self, measure, encoder, example, data, tiny_vit, tmp_path):
        maps = data / "maps" / "annotations" / "validation"
        metrics = measure(encoder, "--object_maps", maps, "--picture", tmp_path / "pruning.png")
        assert (tmp_path / "pruning.png").stat().st_size > 10_000
        model = cropr_hf.CroprViTModel.from_pretrained(encoder)
        processor = ViTImageProcessor.from_pretrained(encoder)
        pixel_values = processor(
            [Image.open(data / "maps" / "images" / "validation" / f"{index}.png") for index in range(5)],
            return_tensors="pt",
        )["pixel_values"]
        source = cropr_hf.CroprViTModel.from_vit(tiny_vit, token_reducer=None)
        with torch.no_grad():
            embeddings = [each(pixel_values).pooler_output for each in (model, source)]
        expected = example("embedding_metrics").embedding_agreement(*embeddings)
        assert metrics == pytest.approx(expected | kept_by_hand(model, processor, data), abs=1e-5)
        assert metrics["cosine"] < 0.999

    def test_without_pruning_it_is_the_source_on_images_of_the_same_size(self, measure, encoder):
        metrics = measure(encoder, "--token_reducer", "none")
        assert [*metrics.values()] == pytest.approx([1.0, 1.0, 1.0], abs=1e-5)
        assert measure(encoder, "--token_reducer", "none", "--teacher_image_size", 96)["cosine"] < 0.9999

    def test_what_it_cannot_do_is_an_error(self, measure, encoder, example):
        with pytest.raises(ValueError, match="--teacher_name_or_path is missing"):
            example("evaluate_embedding").main(["--model_name_or_path", str(encoder)])
        with pytest.raises(ValueError, match="--exported is for files that compute logits"):
            measure(encoder, "--exported", "model.onnx")
        with pytest.raises(ValueError, match="--teacher_image_size is 0; give pixels"):
            measure(encoder, "--teacher_image_size", 0)
        with pytest.raises(ValueError, match="--picture_images is 0; give 1 or more"):
            measure(encoder, "--picture", "pruning.png", "--picture_images", 0)


class TestWrongArguments:
    """They are refused before anything is loaded: there is no such folder."""

    @pytest.mark.parametrize("task", ["image_classification", "semantic_segmentation", "detection", "embedding"])
    def test_of_all_scripts(self, example, tmp_path, task):
        script = example(f"evaluate_{task}")
        for words, message in (
            (["--batch_size", "-1"], "--batch_size is -1; give 1 or more"),
            (["--batch_size", "0"], "--batch_size is 0; give 1 or more"),
            (["--device", "gpu"], "`device` is 'gpu', which torch cannot use here .*; try cpu"),
            (["--device", "meta"], "`device` is 'meta', which torch cannot use here .*; try cpu"),
            (["--picture", str(tmp_path / "no" / "x.png")], r"x\.png is to be written, but there is no folder"),
            (["--picture", str(tmp_path / "x.xyz")], r"x\.xyz is to be a picture; name a file that ends with"),
            (["--picture_images", "0"], "--picture_images is 0; give 1 or more"),
            (["--max_eval_samples", "0"], "--max_eval_samples is 0; give 1 or more images, or leave it out"),
            (["--update_record", "True"], "nowhere has no record.json"),
        ):
            teacher = ["--teacher_name_or_path", "nobody"] if task == "embedding" else []
            with pytest.raises(ValueError, match=message):
                script.main(["--model_name_or_path", str(tmp_path / "nowhere"), *teacher, *words])
        assert not any(tmp_path.iterdir())

    @pytest.mark.parametrize("task", ["image_classification", "semantic_segmentation", "object_detection"])
    def test_training_refuses_to_take_no_image(self, example, task):
        script = example("detection" if task == "object_detection" else f"train_{task}")
        for name in ("max_train_samples", "max_eval_samples"):
            with pytest.raises(ValueError, match=f"--{name} is 0; give 1 or more images"):
                script.DataArguments(**{name: 0})

    def test_training_of_detectors_refuses_what_is_no_object(self, example):
        with pytest.raises(ValueError, match=r"--config is '{bad', which is not valid JSON"):
            example("detection").DetectorArguments(config="{bad").overrides()

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--config", "[1]"], r"--config is '\[1\]'; give an object, such as '\{\"score_threshold\": 0.0\}'"),
            (["--config", "{bad"], "--config is '{bad', which is not valid JSON"),
            (
                ["--config", '{"pruning_rte": 3}'],
                "`--config` does not know 'pruning_rte'; .* Near matches: pruning_rate",
            ),
            (["--picture_threshold", "7"], r"--picture_threshold is 7.0; give a score in \[0, 1\]"),
            (["--picture_threshold", "nan"], "--picture_threshold is nan; give a score"),
        ],
    )
    def test_of_detection(self, detect, words, message):
        with pytest.raises(ValueError, match=message):
            detect("nowhere", *words)


def test_a_changed_detector_is_recorded_as_such(detect, detector):
    metrics = detect(detector, "--config", '{"pruning_rate": 4}', "--batch_size", 3, "--update_record", "True")
    (evaluation,) = read_record(detector)["evaluations"]
    assert evaluation["settings"] == {"pruning_rate": 4} and evaluation["num_examples"] == 2
    assert evaluation["metrics"] == pytest.approx(metrics)
    kept = AutoConfig.from_pretrained(detector, pruning_rate=4).kept_patches()[-1]
    assert metrics["patches_kept"] == pytest.approx(kept / 36)


class TestOtherTasks:
    """A folder of another task would be measured with random weights."""

    def test_they_are_refused(self, classify, detect, segment, classifier, detector):
        for measure, folder, found, wanted in (
            (classify, detector, "CroprViTForObjectDetection", "AutoModelForImageClassification"),
            (detect, classifier, "CroprViTForImageClassification", "AutoModelForObjectDetection or AutoModelForInst"),
            (segment, classifier, "CroprViTForImageClassification", "AutoModelForSemanticSegmentation"),
        ):
            with pytest.raises(ValueError, match=f"holds a {found}, not what {wanted}.* loads; name another folder"):
                measure(folder)

    @pytest.mark.full
    def test_those_of_other_models_as_well(self, classify, detect, segment, classifier, tiny_vit, tmp_path):
        with pytest.raises(ValueError, match="holds a CroprViTForImageClassification, not what AutoModelForSemantic"):
            segment(classifier, "--exported", "model.onnx")
        with pytest.raises(
            ValueError, match="holds a ViTForImageClassification, not what AutoModelForObjectDetection"
        ):
            detect(tiny_vit)
        ViTModel(ViTConfig.from_pretrained(tiny_vit)).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="holds a ViTModel, not what AutoModelForImageClassification loads"):
            classify(tmp_path)
        YolosConfig(architectures=["YolosForObjectDetection"]).save_pretrained(tmp_path)
        with pytest.raises(
            ValueError, match="a model of type 'yolos' does not say; name a detector around a Cropr ViT"
        ):
            detect(tmp_path)

    def test_plain_models_are_measured_but_show_nothing(self, classify, tiny_vit, tmp_path):
        assert 0 <= classify(tiny_vit, maps=False)["accuracy"] <= 1
        with pytest.raises(
            ValueError, match="--picture asks which patches are kept, and a model of type 'vit' does not"
        ):
            classify(tiny_vit, "--picture", tmp_path / "pruning.png", maps=False)

    @pytest.mark.parametrize(
        ("config", "auto_class", "architecture", "expected"),
        [
            (ViTConfig, AutoModelForImageClassification, "ViTForImageClassification", True),
            (ViTConfig, AutoModelForImageClassification, "ViTForMaskedImageModeling", False),
            (ViTConfig, AutoModelForImageClassification, None, True),
            (ViTConfig, AutoModelForSemanticSegmentation, None, False),
            (ViTConfig, AutoModel, "ViTModel", True),
            (ViTConfig, AutoModel, "ViTForImageClassification", True),
            (DeiTConfig, AutoModelForImageClassification, "DeiTForImageClassificationWithTeacher", True),
            (SegformerConfig, AutoModelForSemanticSegmentation, "SegformerForSemanticSegmentation", True),
            (SegformerConfig, AutoModelForSemanticSegmentation, "SegformerForImageClassification", False),
            (cropr_hf.CroprViTConfig, AutoModelForInstanceSegmentation, "CroprViTForInstanceSegmentation", True),
            (cropr_hf.CroprViTConfig, AutoModelForObjectDetection, "CroprViTForInstanceSegmentation", False),
        ],
    )
    def test_what_auto_classes_load(self, example, config, auto_class, architecture, expected):
        stored = config(architectures=architecture and [architecture])
        assert example("evaluation").holds(stored, auto_class) is expected


class TestKeptPatches:
    def test_patches_are_counted_by_hand(self, example):
        script = example("evaluation")
        patches = script.KeptPatches(num_blocks=4)
        assert patches.compute() == {"object_patches_kept": -1.0, "patches_kept": -1.0}
        objects = torch.tensor([[[True, True, False], [True, False, False]]])
        patches.add(torch.tensor([[4, 3, 4, 1, 1, 4]]), objects)
        patches.add(torch.tensor([[4, 4, 4, 4, 4, 4]]), ~objects)
        assert patches.compute() == {"object_patches_kept": 4 / 6, "patches_kept": 9 / 12}

    def test_what_fills_up_the_input_is_not_counted(self, example):
        script = example("evaluation")
        patches = script.KeptPatches(num_blocks=4)
        picture = script.picture_patches([(8, 7), (3, 12)], (8, 12), 4)
        assert picture.tolist() == [[[True, True, False]] * 2, [[True] * 3, [False] * 3]]
        objects = torch.zeros(2, 2, 3, dtype=torch.bool)
        objects[1, 1, 0] = True  # of an object patches count in any case
        patches.add(torch.tensor([[4, 1, 4, 4, 1, 4], [1, 1, 4, 4, 4, 4]]), objects, picture)
        assert patches.compute() == {"object_patches_kept": 1.0, "patches_kept": 4 / 8}

    def test_half_a_patch_is_enough(self, example):
        objects = torch.zeros(1, 4, 8)
        objects[0, :2, :4] = 1  # half of the first patch
        objects[0, :, 4:] = 0.49
        assert example("evaluation").covered_patches(objects, 4).tolist() == [[[True, False]]]

    def test_of_a_classifier_and_its_split(self, classify, classifier, data):
        metrics = classify(classifier, "--max_eval_samples", "100", "--update_record", "True")
        loaded = cropr_hf.CroprViTForImageClassification.from_pretrained(classifier)
        expected = kept_by_hand(loaded, ViTImageProcessor.from_pretrained(classifier), data)
        assert {name: metrics[name] for name in expected} == pytest.approx(expected)
        assert expected["patches_kept"] == 9 / 36
        (evaluation,) = read_record(classifier)["evaluations"]
        assert evaluation["num_examples"] == 5 and evaluation["metrics"] == pytest.approx(metrics)
        assert classify(classifier, maps=False).keys() == {"accuracy"}

    def test_an_unpruned_model_keeps_everything(self, classify, unpruned):
        metrics = classify(unpruned)
        assert metrics["object_patches_kept"] == metrics["patches_kept"] == 1.0

    def test_maps_are_cut_as_images_are(self, example, data):
        """The middle half of the image, twice as large as the input would have it."""
        processor = ViTImageProcessor(
            size={"shortest_edge": 96}, do_center_crop=True, crop_size={"height": 48, "width": 48}
        )
        config = cropr_hf.CroprViTConfig.from_size("tiny", image_size=48, patch_size=16, token_reducer=None)
        maps = example("evaluate_image_classification").ObjectMaps(
            str(data / "maps" / "annotations" / "validation"), processor, config
        )
        file = {"bytes": None, "path": str(data / "maps" / "images" / "validation" / "1.png")}
        maps.add([file], torch.full((1, 9), config.num_hidden_layers))
        inside = label_map(1)[24:72, 24:72] != 0
        shares = inside.reshape(3, 16, 3, 16).mean(axis=(1, 3))
        assert maps.kept.counts.tolist() == [(shares >= 0.5).sum(), (shares >= 0.5).sum(), 9, 9]

    def test_wrong_maps_are_named(self, example, classify, classifier, tmp_path, data):
        with pytest.raises(ValueError, match=r"--object_maps is .*nowhere, which is not a folder; name one"):
            classify(classifier, "--object_maps", tmp_path / "nowhere", maps=False)
        with pytest.raises(ValueError, match=rf"[0-4]\.png has no label map {tmp_path}.[0-4]\.png; add it"):
            classify(classifier, "--object_maps", tmp_path, maps=False)
        for index in range(5):
            Image.new("L", (96, 95)).save(tmp_path / f"{index}.png")
        with pytest.raises(ValueError, match=r"\.png has 96 x 96 pixels, but the label map .*\.png those of 95 x 96"):
            classify(classifier, "--object_maps", tmp_path, maps=False)
        for index in range(5):
            Image.new("RGB", (96, 96)).save(tmp_path / f"{index}.png")
        with pytest.raises(ValueError, match=r"\.png has the mode RGB; a label map has one number per pixel"):
            classify(classifier, "--object_maps", tmp_path, maps=False)
        with pytest.raises(ValueError, match="a model of type 'vit' does not say"):
            example("evaluate_image_classification").ObjectMaps("", None, SimpleNamespace(model_type="vit"))

    def test_of_a_segmenter(self, segment, segmenter, data):
        metrics = segment(segmenter)
        loaded = cropr_hf.CroprViTForSemanticSegmentation.from_pretrained(segmenter)
        # Bilinear as the script resizes, not as the image processor does
        script = sys.modules["evaluate_semantic_segmentation"]
        args = script.EvaluationArguments(str(segmenter))
        own = script.Segmenter(args, 255)

        def processor(image, return_tensors):
            return {"pixel_values": own.normalize(own.fit(script.tv_tensors.Image(image)))}

        expected = kept_by_hand(loaded, processor, data)
        assert {name: metrics[name] for name in expected} == pytest.approx(expected)
        windows = segment(segmenter, "--stride", "24")
        assert "mean_iou" in windows and "patches_kept" not in windows

    def test_ignored_and_filled_pixels_are_no_objects(self, example, segmenter):
        script = example("evaluate_semantic_segmentation")
        own = script.Segmenter(script.EvaluationArguments(str(segmenter)), 255)
        labels = np.full((48, 96), 255)  # half of the input, in which it is 24 pixels high
        labels[:, :48] = 1
        own.label_map(Image.new("RGB", (96, 48)), labels)
        assert own.kept.counts.tolist()[0] == 9 and own.kept.counts.tolist()[2] == 18  # of 36 in the input

    def test_without_a_class_for_the_background_nothing_is_said(self, example, segmenter, monkeypatch):
        script = example("evaluate_semantic_segmentation")
        model = cropr_hf.CroprViTForSemanticSegmentation.from_pretrained(segmenter, id2label={0: "a", 1: "b", 2: "c"})
        monkeypatch.setattr(script.EvaluationArguments, "load", lambda *_: model)
        assert script.Segmenter(script.EvaluationArguments(str(segmenter)), 255).kept is None


class TestNumbersThatFollowTheImage:
    """They are counted, recorded and printed."""

    SETTINGS = {"mass_threshold": 0.5}

    def by_hand(self, folder: Path, data: Path) -> list[list[int]]:
        """Patches left after each block, by image."""
        model = cropr_hf.CroprViTForImageClassification.from_pretrained(folder).eval()
        processor = ViTImageProcessor.from_pretrained(folder)
        images = [Image.open(data / "maps" / "images" / "validation" / f"{index}.png") for index in range(5)]
        with torch.no_grad():
            outputs = model.base_model(processor(images, return_tensors="pt")["pixel_values"], output_pruning=True)
        return outputs.patches_kept.tolist()

    def test_of_a_classifier(self, classify, data, tiny_vit, tmp_path):
        model_class = cropr_hf.CroprViTForImageClassification
        folder = publish(tmp_path, model_class, tiny_vit, reducer_config=self.SETTINGS)
        metrics = classify(folder, "--update_record", "True", maps=False)
        kept = self.by_hand(folder, data)
        assert metrics["mean_patches_left"] == pytest.approx(np.mean([row[-1] for row in kept]), abs=0.01)
        config = AutoConfig.from_pretrained(folder)
        costs = [multiply_adds(config, pruning=row) for row in kept]
        assert metrics["mean_multiply_adds"] == pytest.approx(np.mean(costs), abs=1)
        record = read_record(folder)
        (evaluation,) = record["evaluations"]
        assert evaluation["metrics"].keys() == {"accuracy"}
        per_block = evaluation["counts"].pop("patches_per_block")
        assert evaluation["counts"] == {name: metrics[name] for name in evaluation["counts"]}
        assert per_block["mean"][0] == 36 and len(per_block["p10"]) == len(per_block["p90"]) == 4
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert "| blocks | mean | 10th percentile | 90th percentile |" in card

    @pytest.mark.full
    def test_of_other_tasks(self, example, segment, detect, data, tiny_vit, detector, tmp_path):
        fields = {"reducer_config": self.SETTINGS}
        folder = publish(tmp_path / "maps", cropr_hf.CroprViTForSemanticSegmentation, tiny_vit, **fields)
        metrics = segment(folder, "--update_record", "True")
        (evaluation,) = read_record(folder)["evaluations"]
        assert evaluation["counts"]["patches_per_block"]["mean"][-1] == 36  # fusion
        assert metrics["mean_patches_left"] == evaluation["counts"]["mean_patches_left"] < 36
        assert "mean_patches_left" not in segment(folder, "--stride", 24)  # windows are no images

        folder = publish(tmp_path / "encoder", cropr_hf.CroprViTModel, tiny_vit, **fields)
        words = ["--model_name_or_path", str(folder), "--teacher_name_or_path", tiny_vit]
        words += ["--dataset_name", str(data / "classes"), "--split", "validation", "--batch_size", "2"]
        metrics = example("evaluate_embedding").main([*words, "--update_record", "True"])
        (evaluation,) = read_record(folder)["evaluations"]
        assert metrics["mean_multiply_adds"] == evaluation["counts"]["mean_multiply_adds"] > 0

        settings = {"reducer_config": self.SETTINGS}
        metrics = detect(detector, "--config", json.dumps(settings))
        assert 0 < metrics["mean_patches_left"] < 36


class TestOtherMethods:
    @pytest.mark.parametrize(("method", "schedule"), [("tome", [30, 20, 12, 10]), ("random", [30, 12, 12, 12])])
    def test_an_unpruned_folder_is_pruned_off_the_shelf(self, classify, unpruned, method, schedule):
        """ToMe acts in the last block as well, since by default it brings nothing back; random pruning does."""
        metrics = classify(unpruned, "--token_reducer", method, "--pruning_schedule", *schedule)
        assert metrics["patches_kept"] == pytest.approx(12 / 36)  # into the last block

    def test_a_segmenter_brings_all_patches_back(self, segment, segmenter):
        metrics = segment(segmenter, "--token_reducer", "tome", "--pruning_schedule", 30, 20, 12, 12)
        assert metrics["patches_kept"] == pytest.approx(12 / 36)

    def test_another_rate_and_no_pruning(self, classify, classifier):
        kept = AutoConfig.from_pretrained(classifier, pruning_rate=4).kept_patches()[-1]
        assert classify(classifier, "--pruning_rate", 4)["patches_kept"] == pytest.approx(kept / 36)
        assert classify(classifier, "--token_reducer", "none")["patches_kept"] == 1.0

    def test_what_cannot_be_is_refused(self, classify, segment, classifier, unpruned, segmenter, tiny_vit, tmp_path):
        with pytest.raises(
            ValueError, match=r"'cropr' needs training, and .*unpruned.* \(.*None\); .* ailurus, .*, tome"
        ):
            classify(unpruned, "--token_reducer", "cropr", "--pruning_rate", 4)
        with pytest.raises(
            ValueError, match=r"'dynamicvit' needs training, and .*choose one of ailurus, evit, .*random"
        ):
            classify(unpruned, "--token_reducer", "dynamicvit", "--pruning_rate", 4)
        with pytest.raises(ValueError, match=r"--update_record notes .* not with --token_reducer, --pruning_rate;"):
            classify(unpruned, "--token_reducer", "tome", "--pruning_rate", 4, "--update_record", "True")
        with pytest.raises(ValueError, match=r"--update_record notes .* not with --exported;"):
            segment(segmenter, "--exported", "model.onnx", "--update_record", "True")
        with pytest.raises(ValueError, match=r"holds no Cropr ViT, so that pruning_rate cannot be changed"):
            classify(tiny_vit, "--pruning_rate", 4)
        with pytest.raises(ValueError, match=r"leave out --pruning_rate, --picture, or --exported"):
            segment(segmenter, "--exported", "model.onnx", "--pruning_rate", 4, "--picture", "a.png")
        for name in ("model.onnx", "config.json"):
            with pytest.raises(ValueError, match=rf"--exported is .*{name}; name a file that is there and ends with"):
                segment(segmenter, "--exported", (tmp_path if name == "model.onnx" else segmenter) / name)


class Brightness(nn.Module):
    """Logits that are the means of the channels."""

    def forward(self, pixel_values):
        return {"logits": pixel_values.mean(dim=(2, 3))}


class TestExportedFiles:
    CONFIG = SimpleNamespace(num_labels=3)

    def check(self, model, fixed: int):
        images = torch.rand(5, 3, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(model(images).logits, images.mean(dim=(2, 3)))
        assert model.shape[1:] == [3, 8, 8] and (model.shape[0] == fixed or not isinstance(model.shape[0], int))
        with pytest.raises(ValueError, match=r"takes images of .* \(3, 8, 8\), but .* makes \(3, 8, 9\)"):
            model(torch.rand(2, 3, 8, 9))
        model.config = SimpleNamespace(num_labels=4)
        with pytest.raises(ValueError, match=r"computes \{'logits': \(\d, 3\)\}, not logits of the 4 classes"):
            model(images)

    @pytest.mark.parametrize("fixed", [None, 2])
    def test_programs_of_any_and_of_fixed_batches(self, example, tmp_path, fixed):
        shapes = ({0: torch.export.Dim("batch", min=1)},) if fixed is None else None
        program = torch.export.export(Brightness(), (torch.rand(2, 3, 8, 8),), dynamic_shapes=shapes, strict=False)
        torch.export.save(program, tmp_path / "model.pt2")
        self.check(example("evaluation").ExportedModel(str(tmp_path / "model.pt2"), self.CONFIG, "cpu"), 2)

    @needs_onnx
    @pytest.mark.parametrize("fixed", [None, 2])
    def test_onnx_of_any_and_of_fixed_batches(self, example, tmp_path, fixed):
        import onnx
        from onnx import TensorProto, helper

        node = helper.make_node("ReduceMean", ["pixel_values", "axes"], ["logits"], keepdims=0)
        graph = helper.make_graph(
            [node],
            "brightness",
            [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, [fixed or "batch", 3, 8, 8])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [fixed or "batch", 3])],
            [helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3])],
        )
        opset = [helper.make_opsetid("", 20)]
        onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "model.onnx")
        script = example("evaluation")
        self.check(script.ExportedModel(str(tmp_path / "model.onnx"), self.CONFIG, "cpu"), 2)
        with pytest.raises(ValueError, match=r"--device is cuda, but .* runs on the CPU"):
            script.ExportedModel(str(tmp_path / "model.onnx"), self.CONFIG, "cuda")

    @pytest.mark.full
    def test_a_classifier_as_a_program_of_two_images_predicts_what_the_folder_does(
        self, example, classify, classifier, tmp_path, monkeypatch
    ):
        self.compare(example("evaluate_image_classification"), classify, classifier, tmp_path / "m.pt2", monkeypatch)

    @needs_onnx
    @pytest.mark.full
    @pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
    def test_a_segmenter_as_a_file(self, example, segment, segmenter, tmp_path, suffix):
        file = tmp_path / f"model{suffix}"
        assert command_line(["export", str(segmenter), str(file)]) == 0
        expected = segment(segmenter)
        metrics = segment(segmenter, "--exported", file)
        assert metrics == pytest.approx({name: expected[name] for name in metrics}, nan_ok=True)
        assert "patches_kept" not in metrics and "mean_iou" in metrics
        assert "mean_iou" in segment(segmenter, "--exported", file, "--stride", 24)

    @needs_onnx
    @pytest.mark.full
    def test_a_classifier_as_onnx(self, example, classify, classifier, tmp_path, monkeypatch):
        self.compare(example("evaluate_image_classification"), classify, classifier, tmp_path / "m.onnx", monkeypatch)

    @staticmethod
    def compare(script, classify, classifier, file, monkeypatch):
        assert command_line(["export", str(classifier), str(file), "--batch_size", "2"]) == 0
        predictions, predict = [], script.predict
        monkeypatch.setattr(script, "predict", lambda *args: predictions.append(predict(*args)) or predictions[-1])
        assert classify(classifier, "--exported", file) == classify(classifier, maps=False)
        assert torch.equal(*predictions)
