"""Models as files, with int8 weights, and in half precision: they compute what the model computes, or prune alike."""

import copy
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import ViTConfig, ViTModel

import cropr_hf
from cropr_hf import CroprViTForImageClassification
from cropr_hf.publishing import export
from cropr_hf.publishing.export import export_model
from tests.common import TASKS, assert_close_relative, full, make_images
from tests.test_composites import build_rf_detr


# One module, a block on the tokens that are left, fusion; fewer blocks make smaller graphs.
SHORT = {"num_hidden_layers": 3, "pruning_rate": 4}
WINDOWS = {"num_hidden_layers": 3, "window_block_indices": [0, 1, 2], "pruning_schedule": [8, 8, 8]}

# Build a model of 32 x 32 pixels; RF-DETR of 64 x 64
MODELS: dict[str, Callable[[], Any]] = {
    "classification": lambda: TASKS["classification"].build(**SHORT),
    "classification-all_scorer_options": lambda: stripped("all_scorer_options"),
    "classification-no_cls": lambda: TASKS["classification"].build("no_cls", **SHORT),
    "segmentation-eva02": lambda: TASKS["segmentation"].build("eva02", **SHORT),
    "model-no_fusion": lambda: TASKS["model"].build("no_fusion", **SHORT),
    "backbone-rope_registers": lambda: TASKS["backbone"].build("rope_registers", out_indices=[0, 1, 2, 3], **SHORT),
    "detection-windows": lambda: TASKS["detection"].build("windows", **WINDOWS),
    "rf_detr": lambda: build_rf_detr(num_hidden_layers=3, out_features=["stage1", "stage2", "stage3"]),
}
needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")), reason="ONNX is not installed"
)
SUFFIXES = (".pt2", pytest.param(".onnx", marks=needs_onnx))
ONNX_IN_FULL = (".pt2", pytest.param(".onnx", marks=[needs_onnx, pytest.mark.full]))  # the command writes one as well


def stripped(name: str = "plain", **fields: Any) -> CroprViTForImageClassification:
    """A classifier that had auxiliary heads."""
    model = TASKS["classification"].build(name, use_auxiliary_heads=True, **{**SHORT, **fields})
    model.remove_auxiliary_heads()
    return model


def run_file(path: Path, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The outputs of an exported file, read anew."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(images)
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(None, {"pixel_values": images.numpy()}))))


@torch.no_grad()
def outputs_of(name: str, model: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a file should return, by the public outputs of the model."""
    if name.startswith("detection"):
        tokens = model.cropr_vit.patches(model.cropr_vit(images))
        rows = images.shape[2] // model.config.patch_size
        levels = model.pyramid(tokens.mT.unflatten(2, (rows, -1)))
        return {f"pyramid{level}": maps for level, maps in enumerate(levels)}
    outputs = model(images)
    if name.startswith("backbone"):
        return dict(zip(model.out_features, outputs.feature_maps))
    names = {"model": ("last_hidden_state", "pooler_output"), "rf_detr": ("logits", "pred_boxes")}
    return {key: outputs[key] for key in names.get(name.partition("-")[0], ("logits",))}


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Callable[[str, str], tuple[Any, Path]]:
    """The model of a name in `MODELS`, and its file with a suffix; each is made once."""
    folder = tmp_path_factory.mktemp("exported")

    @cache
    def make(name: str, suffix: str) -> tuple[Any, Path]:
        model, path = MODELS[name](), folder / (name + suffix)
        assert export_model(model, path) < 5e-5
        return model, path

    return make


# Files


@pytest.mark.parametrize("suffix", ONNX_IN_FULL)
@pytest.mark.parametrize("name", ["classification", *full(*(name for name in MODELS if name != "classification"))])
def test_a_file_computes_what_the_model_computes(name, suffix, exported):
    if (name, suffix) == ("rf_detr", ".onnx") and torch.__version__ < "2.9":
        pytest.skip("torch 2.8 has no ONNX operator for the attention of Transformers' RF-DETR decoder")
    model, path = exported(name, suffix)
    for batch_size in (1, 2, 5):
        side = 64 if name == "rf_detr" else 32
        images = make_images(batch_size, side, side, seed=7)
        expected = outputs_of(name, model, images)
        actual = run_file(path, images)
        assert list(actual) == list(expected)
        assert_close_relative(actual, expected, 5e-5)


@pytest.mark.full
@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=needs_onnx)])
def test_nothing_of_the_auxiliary_heads_is_in_a_file(suffix, exported, tmp_path):
    """The graph is that of a model that never had any."""
    _, never = exported("classification", suffix)
    once = tmp_path / f"once{suffix}"
    export_model(stripped(), once)

    def parts(path: Path) -> tuple[list[str], int]:
        if suffix == ".pt2":
            program = torch.export.load(path)
            return sorted(program.state_dict), len(program.graph.nodes)
        import onnx

        graph = onnx.load(path).graph
        return sorted(tensor.name for tensor in graph.initializer), len(graph.node)

    weights, num_nodes = parts(once)
    assert (weights, num_nodes) == parts(never)
    if suffix == ".pt2":  # in ONNX the vector has another form, and no name
        assert [name for name in weights if "token_reducers" in name] == [
            "model.cropr_vit.token_reducers.1.router.scorer.folded_query"
        ]
    assert not [name for name in weights if "auxiliary" in name or "aggregator" in name or "queries" in name]


@pytest.mark.full
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_of_equal_scores_a_file_keeps_the_earlier_token(suffix, tmp_path):
    model = TASKS["classification"].build(**SHORT, last_layer_fusion=False)
    with torch.no_grad():
        model.cropr_vit.token_reducers["1"].router.scorer.folded_query.zero_()
        model.cropr_vit.token_reducers["2"].router.scorer.folded_query.zero_()
    images = make_images(3)
    outputs = model(images, output_pruning=True)
    assert (outputs.pruned_after_block[:, :7] == 3).all()
    export_model(model, tmp_path / f"model{suffix}")
    assert_close_relative(run_file(tmp_path / f"model{suffix}", images)["logits"], outputs.logits, 5e-5)


@pytest.mark.full
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_says_which_patches_it_prunes(suffix, tmp_path):
    model = MODELS["classification"]()
    export_model(model, tmp_path / f"model{suffix}", output_pruning=True)
    for batch_size in (1, 3):
        images = make_images(batch_size)
        actual = run_file(tmp_path / f"model{suffix}", images)[export.PRUNING_MAP]
        assert torch.equal(actual, model(images, output_pruning=True).pruned_after_block.float())


@pytest.mark.full
@needs_onnx
def test_files_run_in_a_process_without_this_package(exported, tmp_path):
    model, program = exported("classification", ".pt2")
    _, graph = exported("classification", ".onnx")
    images = make_images(4)
    torch.save({"images": images, "logits": model(images).logits.detach()}, tmp_path / "expected.pt")
    script = f"""
import sys
sys.modules["cropr_hf"] = sys.modules["transformers"] = None  # neither can be imported
import onnxruntime, torch
expected = torch.load({str(tmp_path / "expected.pt")!r})
logits = torch.export.load({str(program)!r}).module()(expected["images"])["logits"]
torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-4)
session = onnxruntime.InferenceSession({str(graph)!r})
(logits,) = session.run(["logits"], {{"pixel_values": expected["images"].numpy()}})
torch.testing.assert_close(torch.from_numpy(logits), expected["logits"], rtol=0, atol=1e-4)
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.full
def test_pruning_image_size_and_batch_size_are_those_of_the_call(tmp_path):
    model = TASKS["segmentation"].build(**SHORT).train()
    model.set_pruning([5, 5, 5])
    export_model(model, tmp_path / "model.pt2", image_size=(48, 24), batch_size=1)
    assert model.training
    images = make_images(2, 48, 24)
    actual = run_file(tmp_path / "model.pt2", images[:1])["logits"]
    assert_close_relative(actual, model.eval()(images[:1]).logits.detach(), 5e-5)
    model.set_pruning(None)
    assert (actual - model(images[:1]).logits).abs().max() > 0.01
    with pytest.raises((RuntimeError, AssertionError)):
        run_file(tmp_path / "model.pt2", images)


@pytest.mark.full
@pytest.mark.parametrize(
    ("dtype", "suffix"),
    [
        (torch.bfloat16, ".pt2"),
        *full((torch.float16, ".pt2")),
        pytest.param(torch.float16, ".onnx", marks=(needs_onnx, pytest.mark.full)),
    ],
)
def test_half_precision_takes_and_returns_float32(dtype, suffix, tmp_path):
    # Small weights as those of a real model; the large ones of the other tests multiply rounding errors.
    model = TASKS["classification"].build(initializer_range=0.02, **SHORT).to(dtype)
    assert export_model(model, tmp_path / f"model{suffix}") < 0.02
    images = make_images(3)
    logits = run_file(tmp_path / f"model{suffix}", images)["logits"]
    assert logits.dtype == torch.float32
    assert_close(logits, model(images).logits.detach().float(), rtol=0.05, atol=0.05)


# Failures


def with_heads() -> Any:
    return TASKS["classification"].build(use_auxiliary_heads=True, **SHORT)


@pytest.mark.parametrize(
    ("build", "file", "arguments", "reason"),
    [
        (MODELS["classification"], "model.pt", {}, r"ends with '.pt'; name a file that ends with .pt2 or .onnx"),
        (MODELS["classification"], "nowhere/model.pt2", {}, "no folder .*nowhere; make it first"),
        (MODELS["classification"], "model.pt2", {"image_size": 30}, "30; give a multiple of the patch size 8"),
        (MODELS["classification"], "model.pt2", {"image_size": (32, 0)}, r"\(32, 0\); give a multiple"),
        (MODELS["classification"], "model.pt2", {"image_size": 8}, "patch tokens"),  # fewer than the schedule needs
        (MODELS["classification"], "model.pt2", {"image_size": (32,)}, r"\(32,\); give a multiple of .*, or two"),
        (MODELS["classification"], "model.pt2", {"image_size": "32"}, "'32'; give a multiple"),
        (MODELS["classification"], "model.pt2", {"tolerance": float("nan")}, "`tolerance` is nan; give 0 or more"),
        (MODELS["classification"], "model.pt2", {"tolerance": float("inf")}, "`tolerance` is inf; give 0 or more"),
        (MODELS["classification"], "model.pt2", {"tolerance": -1e-3}, "`tolerance` is -0.001"),
        (MODELS["classification"], "../", {}, "is not a file; give another name"),
        (with_heads, "model.pt2", {}, r"`remove_auxiliary_heads\(\)`"),
        (lambda: TASKS["classification"].build("random"), "model.pt2", {}, "'random' draws random numbers"),
        (MODELS["classification"], "model.pt2", {"batch_size": 0}, "`batch_size` is 0; give 1 or more, or None"),
        (lambda: ViTModel(ViTConfig(num_hidden_layers=1)), "model.pt2", {}, "no export of ViTModel; only of Cropr"),
    ],
)
def test_what_cannot_be_exported_is_an_error(build, file, arguments, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        export_model(build(), tmp_path / file, **arguments)
    assert list(tmp_path.iterdir()) == []


@needs_onnx
def test_bfloat16_is_not_for_onnx(tmp_path):
    with pytest.raises(ValueError, match=r"bfloat16.* use float16 or float32"):
        export_model(MODELS["classification"]().bfloat16(), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.full
@needs_onnx
def test_weights_of_an_older_file_go(tmp_path):
    for name in ("model.onnx.data", "other.onnx.data"):
        (tmp_path / name).write_bytes(b"of a large model")
    export_model(MODELS["classification"](), tmp_path / "model.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "other.onnx.data"]


def test_a_folder_that_is_read_only_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # permissions do not stop everybody
    with pytest.raises(ValueError, match="is read-only; choose another"):
        export.check_file(tmp_path / "model.pt2")


def test_missing_libraries_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install 'cropr_hf\[export\]'"):
        export_model(MODELS["classification"](), tmp_path / "model.onnx")


@pytest.mark.parametrize("difference", [0.01, float("nan"), float("inf")])
def test_a_file_that_fails_its_check_is_not_kept(difference, tmp_path, monkeypatch):
    (tmp_path / "model.pt2").write_text("an older file")
    differences = iter([0.0, difference])  # of a batch of 1, and of 3
    monkeypatch.setattr(export, "_difference", lambda *_: next(differences))
    monkeypatch.setattr(export, "_write", lambda graph, pixels, path, *_: path.touch() or (lambda images: {}))
    model = MODELS["classification"]().train()
    with pytest.raises(RuntimeError, match=rf"by {difference}.*more than 0\.001, so that it was not kept"):
        export_model(model, tmp_path / "model.pt2")
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"] and model.training
    assert (tmp_path / "model.pt2").read_text() == "an older file"


def test_the_difference_is_that_of_the_worst_output():
    wanted = {"a": torch.tensor([1.0, -3.0]), "b": torch.tensor([1.0, 1.0])}
    assert export._difference(wanted, wanted) == 0
    assert export._difference({**wanted, "b": torch.tensor([1.0, 1.5])}, wanted) == 0.25
    assert export._difference({**wanted, "b": torch.ones(1)}, wanted) == float("inf")
    missing = export._difference({"a": torch.tensor([1.0, float("nan")]), "b": wanted["b"]}, wanted)
    assert missing != missing


# One graph


@pytest.mark.full
@torch.no_grad()
def test_rf_detr_compiles_to_one_graph():
    torch._dynamo.reset()
    model, images = MODELS["rf_detr"](), make_images(2, 64, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close_relative(compiled(images).pred_boxes, model(images).pred_boxes)


# Eight bits


@pytest.mark.parametrize(
    "name", ["classification", *full(*(name for name in MODELS if name != "classification" and "scorer" not in name))]
)
@torch.no_grad()
def test_int8_weights_change_little_and_leave_the_scorers(name):
    quantization = pytest.importorskip("torchao.quantization")
    model = MODELS[name]()
    quantized = copy.deepcopy(model)
    config = quantization.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    quantization.quantize_(quantized, config)
    assert type(linear_weights(quantized)[0]) is not torch.nn.Parameter  # but a tensor of theirs
    for (key, query), (_, exact) in zip(folded_queries(quantized), folded_queries(model)):
        assert torch.equal(query, exact), key
    side = 64 if name == "rf_detr" else 32
    images = make_images(8, side, side)
    exact, near = outputs_of(name, model, images), outputs_of(name, quantized, images)
    for key in exact:
        error = (near[key] - exact[key]).abs().mean() / exact[key].abs().mean()
        assert error < 0.1, (key, error.item())
    encoders = [getattr(part, "cropr_vit", None) for part in (quantized, model)]
    if all(encoders):
        overlap = overlaps(*(encoder(images, output_pruning=True).pruned_after_block for encoder in encoders))
        assert min(overlap.values()) > 0.8, overlap


def linear_weights(model: Any) -> list[torch.Tensor]:
    return [layer.weight for layer in model.modules() if type(layer) is torch.nn.Linear]


def folded_queries(model: Any) -> list[tuple[str, torch.Tensor]]:
    found = [(name, tensor) for name, tensor in model.named_parameters() if name.endswith("folded_query")]
    assert found
    return found


# Half precision


def overlaps(first: torch.Tensor, second: torch.Tensor) -> dict[int, float]:
    """Mean Jaccard index of the patches that two models keep, after each block that prunes.

    Args:
        first, second: `pruned_after_block` (B, patches)
    """
    blocks = sorted({*first.unique().tolist()})[:-1]
    result = {}
    for block in blocks:
        kept, others = first > block, second > block
        result[block] = ((kept & others).sum(1) / (kept | others).sum(1)).mean().item()
    return result


@pytest.fixture(scope="module")
def trained_digits() -> tuple[CroprViTForImageClassification, torch.Tensor]:
    """The pretrained ViT of the demo, made prunable and fine-tuned for some seconds, and test images."""
    pytest.importorskip("sklearn")
    root = Path(cropr_hf.__file__).parents[1] / "examples"
    sys.path.insert(0, str(root))
    try:
        cluttered_digits = importlib.import_module("cluttered_digits")
    finally:
        sys.path.remove(str(root))

    def draw(split: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        painter = cluttered_digits.DigitPainter(split)
        drawn = [painter.draw(index) for index in range(count)]
        data = bytearray(b"".join(image.image.tobytes() for image in drawn))
        pixels = torch.frombuffer(data, dtype=torch.uint8).view(count, 96, 96, 3).permute(0, 3, 1, 2)
        images = (pixels / 255 - 0.25) / 0.2  # as the image processor does it
        return images.contiguous(), torch.tensor([image.label for image in drawn])

    torch.manual_seed(0)
    schedule = [144, 96, 56, 24, 24, 24]
    model = CroprViTForImageClassification.from_vit(
        root / "digits_vit", pruning_schedule=schedule, last_layer_fusion=False
    )
    model.add_auxiliary_heads()
    model.train()
    images, labels = draw("train", 1280)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for pixels, classes in zip(images.split(16), labels.split(16)):
        model(pixels, labels=classes).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.remove_auxiliary_heads()
    test_images, test_labels = draw("test", 200)
    model.eval()
    with torch.no_grad():
        accuracy = (model(test_images).logits.argmax(dim=1) == test_labels).float().mean()
    assert accuracy > 0.7, accuracy  # the routers know where the digits are
    return model, test_images


@pytest.mark.full
@pytest.mark.parametrize("autocast", [False, True])
@torch.no_grad()
def test_bfloat16_keeps_the_tokens_that_float32_keeps(autocast, trained_digits):
    model, images = trained_digits
    exact = model(images, output_pruning=True).pruned_after_block
    half = model if autocast else copy.deepcopy(model).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        rounded = half(images, output_pruning=True).pruned_after_block
    overlap = overlaps(exact, rounded)
    assert list(overlap) == [2, 3, 4]
    assert min(overlap.values()) >= 0.98, overlap


@pytest.mark.full
@torch.no_grad()
def test_int8_keeps_the_tokens_that_float32_keeps(trained_digits):
    quantization = pytest.importorskip("torchao.quantization")
    model, images = trained_digits
    quantized = copy.deepcopy(model)
    config = quantization.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    quantization.quantize_(quantized, config)
    exact, near = model(images, output_pruning=True), quantized(images, output_pruning=True)
    assert (near.logits - exact.logits).norm() / exact.logits.norm() < 0.05
    overlap = overlaps(exact.pruned_after_block, near.pruned_after_block)
    assert min(overlap.values()) >= 0.97, overlap
