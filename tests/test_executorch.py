"""Exported files in ExecuTorch: they compute what the model computes, and prune alike."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from cropr_hf.publishing.executorch_file import _argsort, _sort
from cropr_hf.publishing.export import PRUNING_MAP, export_model
from tests.common import TASKS, assert_close_relative, make_images
from tests.test_export import MODELS, SHORT, outputs_of


needs_executorch = pytest.mark.skipif(find_spec("executorch") is None, reason="ExecuTorch is not installed")


def outputs_in_executorch(path: Path, images: torch.Tensor) -> list[torch.Tensor]:
    from executorch.runtime import Runtime

    return [*Runtime.get().load_program(path).load_method("forward").execute([images])]


@needs_executorch
@pytest.mark.slow
@pytest.mark.parametrize("name", ["classification", "segmentation-eva02", "model-no_fusion", "rf_detr"])
def test_executorch_computes_what_the_model_computes(name, tmp_path):
    model, side = MODELS[name](), 64 if name == "rf_detr" else 32
    export_model(model, tmp_path / "model.pte")
    images = make_images(1, side, side, seed=7)
    expected = outputs_of(name, model, images)
    assert_close_relative(outputs_in_executorch(tmp_path / "model.pte", images), [*expected.values()], 5e-5)


@needs_executorch
@pytest.mark.slow
def test_executorch_keeps_the_earlier_of_equal_tokens_in_a_batch(tmp_path):
    model = TASKS["classification"].build(**SHORT)
    torch.nn.init.zeros_(model.cropr_vit.token_reducers["1"].router.scorer.folded_query)
    export_model(model, tmp_path / "model.pte", batch_size=2, output_pruning=True)
    images = make_images(2)
    logits, pruned = outputs_in_executorch(tmp_path / "model.pte", images)
    expected = model(images, output_pruning=True)
    assert torch.equal(pruned, expected[PRUNING_MAP].float())
    assert_close_relative(logits, expected.logits.detach(), 5e-5)


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("dim", [-1, 0, 1])
@pytest.mark.parametrize("kind", ["ties", "infinite", "bytes"])
def test_sorting_by_counting_is_stable_sorting(kind, dim, descending):
    values = torch.randint(4, (5, 6, 7), generator=torch.Generator().manual_seed(0))
    values = values.byte() if kind == "bytes" else values.float()
    if kind == "infinite":
        values[values == 0], values[values == 3] = -torch.inf, torch.inf
    expected = values.sort(dim=dim, descending=descending, stable=True)
    actual = _sort(values, dim, descending)
    assert torch.equal(actual[0], expected.values) and torch.equal(actual[1], expected.indices)
    assert torch.equal(_argsort(values, dim, descending), expected.indices)


def test_the_library_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "executorch", None)
    with pytest.raises(ImportError, match="pip install executorch"):
        export_model(MODELS["classification"](), tmp_path / "model.pte")
    assert list(tmp_path.iterdir()) == []
