"""Exported files, ONNX and `torch.export`, in OpenVINO: they compute what the model computes, and prune alike."""

from pathlib import Path
from typing import Any

import pytest
import torch

from cropr_hf.publishing.export import PRUNING_MAP, export_model
from tests.common import TASKS, assert_close_relative, make_images
from tests.test_export import MODELS, SHORT, needs_onnx, outputs_of


openvino = pytest.importorskip("openvino", reason="openvino is not installed")
pytestmark = pytest.mark.full
SUFFIXES = (".pt2", pytest.param(".onnx", marks=needs_onnx))
NAMES = (
    "classification",
    "classification-all_scorer_options",
    "segmentation-eva02",
    "model-no_fusion",
    "backbone-rope_registers",
    "detection-windows",
    "rf_detr",
)


def outputs_in_openvino(path: Path, images: torch.Tensor) -> list[torch.Tensor]:
    """In the order of the file's; names stay in ONNX files only."""
    core = openvino.Core()
    is_onnx = path.suffix == ".onnx"
    model = core.read_model(path) if is_onnx else openvino.convert_model(torch.export.load(path))
    # Where a CPU has units for bfloat16, that is the default.
    compiled: Any = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    outputs = compiled(images.numpy())
    return [torch.from_numpy(outputs[output].copy()) for output in compiled.outputs]


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        *((name, ".pt2") for name in ("classification", "segmentation-eva02", "model-no_fusion")),
        *(pytest.param(name, ".onnx", marks=needs_onnx) for name in NAMES),
        pytest.param("rf_detr", ".pt2", marks=pytest.mark.slow),
    ],
)
def test_openvino_computes_what_the_model_computes(name, suffix, tmp_path):
    model, side = MODELS[name](), 64 if name == "rf_detr" else 32
    export_model(model, tmp_path / f"model{suffix}")
    for batch_size in (1, 3):
        images = make_images(batch_size, side, side, seed=7)
        expected = outputs_of(name, model, images)
        assert_close_relative(outputs_in_openvino(tmp_path / f"model{suffix}", images), [*expected.values()], 5e-5)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("tied", [False, True])
def test_openvino_keeps_the_same_tokens(tied, suffix, tmp_path):
    model = TASKS["classification"].build(**SHORT, image_size=112)  # 196 patches
    model.set_pruning([100, 100, 100])
    if tied:
        for reducer in model.cropr_vit.token_reducers.values():
            torch.nn.init.zeros_(reducer.router.scorer.folded_query)
    export_model(model, tmp_path / f"model{suffix}", output_pruning=True)
    images = make_images(2, 112, 112)
    expected = model(images, output_pruning=True)
    logits, pruned = outputs_in_openvino(tmp_path / f"model{suffix}", images)
    assert (pruned == 3).sum(dim=1).tolist() == [100, 100]
    if tied and suffix == ".onnx":  # there it keeps any of equal tokens; in a program the earlier one, as elsewhere
        return
    assert torch.equal(pruned, expected[PRUNING_MAP].to(pruned.dtype))
    assert_close_relative(logits, expected.logits.detach(), 5e-5)
