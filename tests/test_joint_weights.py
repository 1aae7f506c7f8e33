"""Linear layers of the same input as one product: equal results, whatever happens to the weights."""

import copy
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from cropr_hf import CroprViTForImageClassification
from cropr_hf.joint_weights import SharedInput
from tests.common import full, make_images, make_model, tiny_config


Model = CroprViTForImageClassification


def make_joint_model(name: str = "eva02") -> Model:
    """In float64 and evaluation mode, after a call, so that the weights are joint."""
    model = make_model(Model, tiny_config(name)).double().eval()
    infer(model)
    assert all(is_joint(model))
    return model


def shared_inputs(model: nn.Module) -> list[SharedInput]:
    return [module for module in model.modules() if isinstance(module, SharedInput)]


def is_joint(model: nn.Module) -> list[bool]:
    return [module._joint is not None for module in shared_inputs(model)]


@torch.inference_mode()
def infer(model: Model) -> torch.Tensor:
    return model(make_images().to(model.dtype)).logits.clone()


def one_by_one(model: Model) -> torch.Tensor:
    """The same with gradients, where layers run one by one."""
    return model(make_images().to(model.dtype)).logits.detach()


@pytest.mark.parametrize("name", ["plain", "eva02", "windows"])
def test_one_product_gives_what_the_layers_give(name):
    model = make_joint_model(name)
    assert_close(infer(model), one_by_one(model), rtol=1e-12, atol=1e-12)


def test_attention_starts_one_product_for_queries_keys_and_values(monkeypatch):
    calls, linear = [], nn.functional.linear

    def count(inputs, weight, bias=None):
        calls.append(len(weight))
        return linear(inputs, weight, bias)

    model = make_joint_model()
    monkeypatch.setattr(nn.functional, "linear", count)
    infer(model)
    size, inner = model.config.hidden_size, model.config.intermediate_size
    assert calls[:5] == [3 * size, size, inner, inner, size]


def replace_weight(model: Model) -> None:
    layer = model.cropr_vit.layers[1].attention.k_proj
    layer.weight = nn.Parameter(layer.weight.detach() * 3)


def replace_layer(model: Model) -> None:
    size = model.config.hidden_size
    model.cropr_vit.layers[1].attention.v_proj = nn.Linear(size, size).double()


def load(model: Model, assign: bool = False) -> None:
    model.load_state_dict(make_model(Model, tiny_config("eva02"), seed=1).double().state_dict(), assign=assign)


CHANGES: dict[str, Callable[[Model], object]] = {
    "in place": lambda model: nn.init.normal_(model.cropr_vit.layers[0].attention.q_proj.weight),
    "behind autograd's back": lambda model: model.cropr_vit.layers[0].attention.v_proj.weight.data.mul_(2),
    "bias": lambda model: nn.init.normal_(model.cropr_vit.layers[0].attention.v_proj.bias),
    "data": lambda model: setattr(model.cropr_vit.layers[0].attention.v_proj.weight, "data", torch.eye(32).double()),
    "parameter": replace_weight,
    "layer": replace_layer,
    "state dict": load,
    "assigned state dict": lambda model: load(model, assign=True),
    "type": lambda model: model.float(),
}
QUICK = {"parameter", "behind autograd's back"}


@pytest.mark.parametrize("change", [*sorted(QUICK), *full(*sorted(CHANGES.keys() - QUICK))])
def test_changed_weights_change_the_result(change):
    model = make_joint_model()
    before = infer(model)
    CHANGES[change](model)
    after = infer(model)
    tolerance = 1e-5 if change == "type" else 1e-12
    assert_close(after, one_by_one(model), rtol=tolerance, atol=tolerance)
    assert change == "type" or not torch.allclose(after, before)
    assert all(is_joint(model))


def test_weights_are_parameters_of_their_own_for_whoever_saves_them(tmp_path):
    """Those in a common storage would count as tied, and all but one be left out."""
    model = make_joint_model()
    expected, weights = infer(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    accelerator.save_state(str(tmp_path / "state"))
    accelerator.save_model(prepared, str(tmp_path / "model"))
    model.save_pretrained(tmp_path / "folder")
    torch.save(model.state_dict(), tmp_path / "weights.bin")
    assert load_file(tmp_path / "model" / "model.safetensors").keys() == weights.keys()
    size = sum(tensor.nbytes for tensor in weights.values())
    assert (tmp_path / "weights.bin").stat().st_size < 1.5 * size + 50_000
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    accelerator.load_state(str(tmp_path / "state"))
    assert_close(model.state_dict(), weights, rtol=0, atol=0)
    for loaded in (
        Model.from_pretrained(tmp_path / "folder", dtype=torch.float64),
        load_bin(tmp_path / "weights.bin"),
    ):
        assert_close(infer(loaded.eval()), expected, rtol=1e-12, atol=1e-12)


def load_bin(file: Path) -> Model:
    model = make_model(Model, tiny_config("eva02"), seed=1).double()
    model.load_state_dict(torch.load(file, weights_only=True))
    return model


def test_copies_share_nothing():
    model = make_joint_model()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert not any(is_joint(twin))
        nn.init.zeros_(twin.cropr_vit.layers[0].attention.q_proj.weight)
        assert_close(infer(twin), one_by_one(twin), rtol=1e-12, atol=1e-12)
    assert_close(infer(model), one_by_one(model), rtol=1e-12, atol=1e-12)


def test_moving_a_model_leaves_no_memory_behind():
    model = make_joint_model().half()
    assert not any(is_joint(model))


def test_training_after_evaluation_is_training_without():
    """Gradients and steps of a model whose weights were joint equal those of one that was never evaluated."""
    models = [make_joint_model(), make_model(Model, tiny_config("eva02")).double()]
    for model in models:
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2, fused=True)
        for _ in range(3):
            model(make_images().double(), labels=torch.tensor([0, 1])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_close(models[0].state_dict(), models[1].state_dict(), rtol=1e-9, atol=1e-12)
    assert_close(infer(models[0].eval()), one_by_one(models[1].eval()), rtol=1e-9, atol=1e-12)


def test_evaluation_between_forward_and_backward_changes_no_gradient():
    model, untouched = make_model(Model, tiny_config("eva02")), make_model(Model, tiny_config("eva02"))
    for twin in (model, untouched):
        loss = twin(make_images(), labels=torch.tensor([0, 1])).loss
        if twin is model:
            infer(model)
        loss.backward()
    assert all(is_joint(model))
    for own, other in zip(model.parameters(), untouched.parameters()):
        assert_close(own.grad, other.grad, rtol=0, atol=0)


def double_output(model: Model) -> None:
    model.cropr_vit.layers[0].attention.k_proj.register_forward_hook(lambda module, inputs, output: 2 * output)


def double_input(model: Model) -> None:
    model.cropr_vit.layers[0].attention.v_proj.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))


def wrap_forward(model: Model) -> None:
    layer = model.cropr_vit.layers[0].attention.q_proj
    own = layer.forward
    layer.forward = lambda inputs: 3 * own(inputs)


class Doubled(nn.Linear):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(inputs)


def change_class(model: Model) -> None:
    model.cropr_vit.layers[0].attention.v_proj.__class__ = Doubled


def parametrize(model: Model) -> None:
    nn.utils.parametrizations.weight_norm(model.cropr_vit.layers[0].attention.v_proj)


@pytest.mark.parametrize("change", [double_output, double_input, wrap_forward, change_class, parametrize])
def test_layers_that_are_more_than_a_product_run_themselves(change):
    model = make_joint_model()
    before = infer(model)
    change(model)
    after = infer(model)
    assert_close(after, one_by_one(model), rtol=1e-12, atol=1e-12)
    assert change is parametrize or not torch.allclose(after, before)
    assert is_joint(model).count(False) == 1


def test_hooks_on_all_modules_see_every_layer():
    model, seen = make_joint_model(), []
    infer(model)
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.append(module))
    try:
        infer(model)
    finally:
        handle.remove()
    assert {layer.attention.q_proj for layer in model.cropr_vit.layers} <= {*seen}
    infer(model)
    assert all(is_joint(model))


def test_memory_that_processes_share_stays_where_it_is():
    model = make_model(Model, tiny_config("plain")).eval().share_memory()
    places = [parameter.data_ptr() for parameter in model.parameters()]
    infer(model)
    assert not any(is_joint(model))
    assert [parameter.data_ptr() for parameter in model.parameters()] == places


def test_functional_calls_use_the_weights_that_they_are_given():
    model = make_joint_model("plain")
    given = {name: 2 * tensor for name, tensor in model.state_dict().items() if "attention" in name}
    with torch.no_grad():
        doubled = torch.func.functional_call(model, given, (make_images().double(),)).logits
    before = infer(model)
    model.load_state_dict(given, strict=False)
    assert_close(doubled, infer(model), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(doubled, before)


def test_threads_that_call_a_new_model_at_once_get_the_same():
    """A server answers its first requests in parallel."""
    expected = infer(make_joint_model())
    for _ in range(5):
        model = make_model(Model, tiny_config("eva02")).double().eval()
        with ThreadPoolExecutor(8) as pool:
            for answer in pool.map(infer, [model] * 16):
                assert_close(answer, expected, rtol=1e-12, atol=1e-12)
        load(model)
        assert_close(infer(model), one_by_one(model), rtol=1e-12, atol=1e-12)
