"""Folders that an earlier version saved: they load, and give what they gave (see `fixtures/make_saved_folders.py`)."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
)

import cropr_hf  # registers the models with the Auto classes


FOLDERS = Path(__file__).parent / "fixtures" / "saved_folders"
LOADERS = {
    "classification": AutoModelForImageClassification,
    "segmentation": AutoModelForSemanticSegmentation,
    "resumable/checkpoint-1": AutoModelForImageClassification,
    "detection": AutoModelForObjectDetection,
    "random": AutoModelForImageClassification,
    "unpruned": AutoModelForImageClassification,
    "with_code": AutoModelForImageClassification,
    "backbone": cropr_hf.CroprViTBackbone,  # `AutoBackbone.from_pretrained` takes Hub ids only
}
STRIPPED = ["classification", "segmentation", "detection", "with_code", "backbone"]


def load(name: str, **kwargs):
    return LOADERS[name].from_pretrained(FOLDERS / name, **kwargs)


def stored_images() -> torch.Tensor:
    return load_file(FOLDERS / "images.safetensors")["images"]


@torch.no_grad()
def outputs_of(model, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """As the script of the fixtures computed them: results, and the block after which each patch was pruned."""
    model, images = model.to(dtype), stored_images().to(dtype)
    torch.manual_seed(0)  # of what `token_reducer="random"` draws
    outputs = model(images)
    results = {name: outputs[name] for name in ("logits", "pred_boxes") if name in outputs}
    results.update({f"feature_maps.{index}": maps for index, maps in enumerate(outputs.get("feature_maps", ()))})
    torch.manual_seed(0)
    results["pruned_after_block"] = model.base_model(images, output_pruning=True).pruned_after_block
    return results


@pytest.mark.parametrize("name", LOADERS)
def test_a_folder_gives_what_it_gave(name):
    model = load(name)
    assert [type(model).__name__] == json.loads((FOLDERS / name / "config.json").read_text())["architectures"]
    assert type(model).__module__.startswith("cropr_hf.") and not model.training
    expected, outputs = load_file(FOLDERS / f"{name}.safetensors"), outputs_of(model)
    assert outputs.keys() == expected.keys()
    assert torch.equal(outputs["pruned_after_block"], expected["pruned_after_block"])
    for key, values in expected.items():
        # Detectors compute boxes in float32 whatever their weights are.
        tolerance = 1e-5 if values.dtype == torch.float32 else 1e-6
        torch.testing.assert_close(outputs[key], values, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", STRIPPED)
def test_a_stripped_folder_trains_by_its_training_config(name):
    stripped = load(name)
    model = load(name, config=AutoConfig.from_pretrained(FOLDERS / name / "training_config"))
    assert model.config.use_auxiliary_heads and not stripped.config.use_auxiliary_heads
    expected, outputs = outputs_of(stripped), outputs_of(model)
    assert torch.equal(outputs["pruned_after_block"], expected["pruned_after_block"])


def test_a_segmenter_from_before_there_was_an_auxiliary_task_has_a_query_per_patch():
    config = AutoConfig.from_pretrained(FOLDERS / "segmentation" / "training_config")
    assert config.query_counts == (16, 0)
    assert load("segmentation", config=config).cropr_vit.token_reducers["1"].router.scorer.queries.shape == (16, 16)


def test_a_checkpoint_is_complete_and_can_be_stripped():
    name = "resumable/checkpoint-1"
    model = load(name)
    assert model.config.use_auxiliary_heads
    model.train()(stored_images().float(), labels=torch.tensor([0, 2])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    expected, outputs = load_file(FOLDERS / f"{name}.safetensors"), outputs_of(load(name, use_auxiliary_heads=False))
    assert torch.equal(outputs["pruned_after_block"], expected["pruned_after_block"])
    torch.testing.assert_close(outputs["logits"], expected["logits"], rtol=1e-6, atol=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("name", LOADERS)
def test_saved_again_a_folder_gives_the_same(name, tmp_path):
    model = load(name)
    model.save_pretrained(tmp_path / Path(name).name)
    again = type(model).from_pretrained(tmp_path / Path(name).name)
    expected, outputs = outputs_of(model), outputs_of(again)
    assert expected.keys() == outputs.keys()
    assert all(torch.equal(outputs[key], values) for key, values in expected.items())


def test_an_image_processor_loads():
    processor = AutoImageProcessor.from_pretrained(FOLDERS / "detection")
    assert isinstance(processor, cropr_hf.CroprViTImageProcessor)
    assert processor(torch.zeros(3, 20, 24, dtype=torch.uint8))["pixel_values"][0].shape == (3, 32, 32)


def test_the_installed_classes_are_preferred_to_code_in_a_folder():
    model = AutoModelForImageClassification.from_pretrained(FOLDERS / "with_code", trust_remote_code=True)
    assert type(model) is cropr_hf.CroprViTForImageClassification


@pytest.mark.full
def test_old_code_from_a_folder_and_this_version_give_equal_bits(tmp_path):
    """Both in one process, so that this holds on any processor; the code reads every folder."""
    program = """
        import json, sys
        from pathlib import Path

        folders = Path(sys.argv[1])
        path = str(folders / "with_code")

        from transformers import AutoModelForImageClassification
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        # As users load it who have no package, whose classes would win
        by_auto_class = AutoModelForImageClassification.from_pretrained(path, trust_remote_code=True)
        assert not [name for name in sys.modules if name.partition(".")[0] == "cropr_hf"]
        assert type(by_auto_class).__module__.startswith("transformers_modules.")

        import torch
        import cropr_hf
        torch.set_num_threads(1)
        from tests.test_saved_folders import LOADERS, outputs_of, stored_images

        for name in LOADERS:
            (class_name,) = json.loads((folders / name / "config.json").read_text())["architectures"]
            module = "modeling_cropr_vit_detection" if "Detection" in class_name else "modeling_cropr_vit"
            old_class = get_class_from_dynamic_module(f"{module}.{class_name}", path)
            new_class = getattr(cropr_hf, class_name)
            assert old_class is not new_class and old_class.__module__.startswith("transformers_modules.")
            if name == "with_code":
                assert old_class is type(by_auto_class)
            for dtype in (torch.float32, torch.bfloat16):
                old, new = (outputs_of(cls.from_pretrained(folders / name), dtype) for cls in (old_class, new_class))
                assert old.keys() == new.keys()
                for key, values in old.items():
                    assert torch.equal(values, new[key]), f"{name}, {dtype}: {key} differs"
            print(name)
        """
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", textwrap.dedent(program), str(FOLDERS)]
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1], check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split() == list(LOADERS)
