"""Folders that work where the package is not installed."""

import ast
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    SegformerImageProcessor,
    ViTImageProcessor,
    pipeline,
)

from cropr_hf import (
    CroprRfDetrConfig,
    CroprRfDetrForObjectDetection,
    CroprViTConfig,
    CroprViTForImageClassification,
    CroprViTForInstanceSegmentation,
    CroprViTForObjectDetection,
    CroprViTForSemanticSegmentation,
    CroprViTImageProcessor,
)
from cropr_hf.publishing.hub import AUTO_MAP, save_for_hub
from tests.common import DETECTOR, assert_close_relative
from tests.test_import_rules import TRAVELS


# Runs in an interpreter that cannot import the package.
WITHOUT_THE_PACKAGE = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "cropr_hf":
            raise ModuleNotFoundError("No module named 'cropr_hf'", name="cropr_hf")
sys.meta_path.insert(0, Block())
"""
LOADER = """
import torch, transformers
folder, auto_class = sys.argv[1], getattr(transformers, sys.argv[2])
pixels = torch.load(folder + "/pixels.pt")
base = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
model = auto_class.from_pretrained(folder, trust_remote_code=True)
results = {"base": base(pixels).last_hidden_state, "logits": model(pixels).logits}
config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
print(type(processor).__name__)
if "Segmentation" in auto_class.__name__:
    pipeline = transformers.pipeline("image-segmentation", model=folder, trust_remote_code=True)
    print(type(pipeline.model).__name__)
trainable = auto_class.from_pretrained(folder, trust_remote_code=True, use_auxiliary_heads=True)
results["trainable"] = trainable(pixels).logits
trainable.train()(pixels, labels=torch.load(folder + "/labels.pt")).loss.backward()
assert all(parameter.grad is not None for parameter in trainable.parameters())
trainable.save_pretrained(folder + "/again")
torch.save(results, folder + "/results.pt")
"""


OBJECTS = [
    {
        "class_labels": torch.tensor([0, 2]),
        "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.3, 0.7, 0.2, 0.3]]),
        "masks": torch.ones(2, 32, 32, dtype=torch.uint8),
    }
] * 2


def build(model_class: type, **fields):
    torch.manual_seed(0)
    config = CroprViTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
        pruning_rate=3,
        num_labels=3,
        use_auxiliary_heads=True,
        rope_theta=100.0,
        **fields,
    )
    return model_class(config).eval()


@pytest.fixture
def model() -> CroprViTForImageClassification:
    return build(CroprViTForImageClassification)


@pytest.mark.full
@pytest.mark.parametrize(
    ("auto_class", "model_class", "fields", "processor", "labels"),
    [
        (
            "AutoModelForImageClassification",
            CroprViTForImageClassification,
            {},
            ViTImageProcessor(size={"height": 32, "width": 32}),
            torch.tensor([0, 2]),
        ),
        (
            "AutoModelForSemanticSegmentation",
            CroprViTForSemanticSegmentation,
            {"num_queries": None},
            SegformerImageProcessor(size={"height": 32, "width": 32}),
            torch.arange(2 * 32 * 32).view(2, 32, 32) % 3,
        ),
        (
            "AutoModelForObjectDetection",
            CroprViTForObjectDetection,
            DETECTOR,
            CroprViTImageProcessor(size={"shortest_edge": 32, "longest_edge": 32}),
            OBJECTS,
        ),
        (
            "AutoModelForInstanceSegmentation",
            CroprViTForInstanceSegmentation,
            DETECTOR,
            CroprViTImageProcessor(size={"shortest_edge": 32, "longest_edge": 32}),
            OBJECTS,
        ),
    ],
    ids=["classification", "segmentation", "detection", "instances"],
)
def test_it_runs_without_the_package(auto_class, model_class, fields, processor, labels, tmp_path):
    model = build(model_class, **fields)
    save_for_hub(model, tmp_path, processor)
    assert getattr(model.config, "auto_map", None) is None and model.config.use_auxiliary_heads
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    segmenter = auto_map.pop("AutoModelForImageSegmentation")
    assert auto_map == AUTO_MAP
    assert AUTO_MAP[auto_class].endswith(f".{model_class.__name__}")
    assert {file.stem for file in tmp_path.glob("*.py")} == {*TRAVELS}
    pixels = torch.randn(2, 3, 32, 32)
    torch.save(pixels, tmp_path / "pixels.pt")
    torch.save(labels, tmp_path / "labels.pt")
    loaded = run_without_the_package(LOADER, tmp_path, tmp_path, auto_class).splitlines()
    assert loaded[0] == type(processor).__name__
    if "Segmentation" in auto_class:
        assert loaded[1] == model_class.__name__ == segmenter.split(".")[1]
    results = torch.load(tmp_path / "results.pt")
    with torch.no_grad():
        assert_close_relative(results["logits"], model(pixels).logits)
        assert_close_relative(results["trainable"], model(pixels).logits)
        assert_close_relative(results["base"], model.cropr_vit(pixels).last_hidden_state)
    again = model_class.from_pretrained(tmp_path / "again")
    assert not again.config.use_auxiliary_heads


def run_without_the_package(code, folder, *arguments):
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE + code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.full
def test_what_the_card_says_works_for_a_visitor(tmp_path):
    model = build(CroprViTForImageClassification)
    model.config.id2label = {0: "cat", 1: "dog", 2: "owl"}
    save_for_hub(model, tmp_path / "pets", ViTImageProcessor(size={"height": 32, "width": 32}))
    Image.new("RGB", (40, 30), "red").save(tmp_path / "image.jpg")
    (usage,) = re.findall(r"```python\n(.*?)```", (tmp_path / "pets" / "README.md").read_text(), flags=re.DOTALL)
    assert "cropr_hf" not in usage
    found = ast.literal_eval(run_without_the_package(usage, tmp_path))
    assert {entry["label"] for entry in found} == {"cat", "dog", "owl"}


def test_with_the_package_a_pipeline_asks_nobody_whether_to_run_code(tmp_path, monkeypatch):
    detector = build(CroprViTForObjectDetection, **DETECTOR)
    save_for_hub(detector, tmp_path, CroprViTImageProcessor(size={"shortest_edge": 32, "longest_edge": 32}))
    questions: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question: questions.append(question) or "n")
    detect = pipeline("object-detection", str(tmp_path))
    assert type(detect.model) is CroprViTForObjectDetection and not questions


def test_every_published_folder_has_the_code(model, tmp_path):
    """But no checkpoint to resume from, and none where it is not wanted."""

    def has_code(folder):
        has_map = "auto_map" in json.loads((folder / "config.json").read_text())
        assert has_map == (folder / "modeling_cropr_vit.py").exists() == (folder / "reducers.py").exists()
        AutoModelForImageClassification.from_pretrained(folder)
        return has_map

    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "checkpoint-3")
    model.save_pretrained(tmp_path / "without", with_code=False)
    expected = {"plain": True, "checkpoint-3": False, "without": False}
    assert {name: has_code(tmp_path / name) for name in expected} == expected
    assert getattr(model.config, "auto_map", None) is None
    # A model that knows where its code was takes it along, or does not point to what is not there.
    loaded = CroprViTForImageClassification.from_pretrained(tmp_path / "plain")
    loaded.save_pretrained(tmp_path / "again")
    loaded.save_pretrained(tmp_path / "plain", with_code=False)
    assert has_code(tmp_path / "again") and not has_code(tmp_path / "plain")


def test_an_image_processor_of_ours_brings_its_code(tmp_path):
    processor = CroprViTImageProcessor(size={"shortest_edge": 32, "longest_edge": 32})
    processor.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert stored["auto_map"] == {"AutoImageProcessor": "image_processing_cropr_vit.CroprViTImageProcessor"}
    assert (tmp_path / "image_processing_cropr_vit.py").exists()
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is CroprViTImageProcessor


def test_other_models_are_refused(tmp_path):
    backbone = CroprViTConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48)
    sizes = {"d_model": 32, "decoder_ffn_dim": 32, "num_queries": 10, "decoder_layers": 1, "group_detr": 1}
    model = CroprRfDetrForObjectDetection(CroprRfDetrConfig(backbone_config=backbone, **sizes))
    with pytest.raises(ValueError, match="CroprRfDetrForObjectDetection; the code that is saved is that of `CroprViT"):
        save_for_hub(model, tmp_path)


def test_foreign_reducers_are_refused(model, tmp_path):
    model.config.token_reducer = "keep_first"
    with pytest.raises(ValueError, match="keep_first"):
        save_for_hub(model, tmp_path)
    assert not (tmp_path / "config.json").exists()
