"""IdleViT against a loop over tokens, the authors' masked training, and figures of the specification."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from cropr_hf import CroprViTBackbone, CroprViTConfig, CroprViTForImageClassification, CroprViTModel
from cropr_hf.methods.idlevit import class_logits, cut_losses
from cropr_hf.speed.cost import multiply_adds
from tests.common import NUM_LABELS, assert_close_relative, make_images, make_model, tiny_config


def idlevit_config(**overrides):
    return tiny_config("plain", **{"token_reducer": "idlevit", "pruning_rate": None, "pooling": "cls", **overrides})


@pytest.mark.parametrize(
    ("keep_rate", "active"), [(0.9, [177, 159, 143]), (0.7, [138, 97, 68]), (0.5, [99, 50, 25]), (1.0, [197] * 3)]
)
def test_token_counts_are_the_published_ones(keep_rate, active):
    """CLS included, in the blocks 4 to 12 of DeiT-S."""
    config = CroprViTConfig.from_size("small", token_reducer="idlevit", reducer_config={"keep_rate": keep_rate})
    kept = [1 + count for count in config.kept_patches()]
    assert kept[:2] == [197] * 2 and kept[2:11] == [count for count in active for _ in range(3)]
    assert config.pruning_blocks == [*range(3, 12)]


@pytest.mark.parametrize(("keep_rate", "giga"), [(0.9, 3.965), (0.7, 3.007), (0.5, 2.333)])
def test_multiply_adds_are_the_published_ones_without_keys_of_idle_tokens(keep_rate, giga):
    """The authors compute keys of all tokens to choose; the product with one vector that replaces them here is not in
    torch's count (a query of the CLS token, folded, is: D² twice per block)."""
    config = CroprViTConfig.from_size("small", token_reducer="idlevit", reducer_config={"keep_rate": keep_rate})
    size, kept = config.hidden_size, config.kept_patches()[2:11]
    keys = sum((196 - count) * size**2 for count in kept)
    folded = len(kept) * (2 * size**2 + 197 * size)
    assert (multiply_adds(config) - folded + keys + 384 * 1000) / 1e9 == pytest.approx(giga, rel=1e-3)


@pytest.mark.parametrize("rope", [{}, {"rope_theta": 100.0}])
def test_logits_of_the_class_token_are_those_of_every_head(rope):
    model = make_model(CroprViTModel, idlevit_config(**rope)).double()
    state, _ = model.embed(make_images(2).double())
    layer, positions = model.layers[2], state.rotations.get("image")
    normalised = layer.layernorm_before(state.hidden_states)
    queries, keys = layer.attention.queries_and_keys(normalised, positions)
    expected = torch.stack([queries[:, head, :1] @ keys[:, head].mT for head in range(4)]).mean(dim=0)[:, 0] * 8**-0.5
    found = class_logits(normalised, layer.attention, positions)
    # Up to the product with the bias of keys, the same for every token.
    difference = found - expected.float()
    torch.testing.assert_close(difference, difference[:, :1].expand_as(difference), rtol=0, atol=1e-5)


def masked_forward(model, pixels):
    """As the authors train: every token is computed, idle ones are no keys and do not change."""
    config = model.config
    state, _ = model.embed(pixels)
    states, positions = state.hidden_states, state.rotations.get("image")
    kept, active = config.kept_patches(), []
    for block, layer in enumerate(model.layers, start=1):
        mask = torch.ones(states.shape[:2], dtype=torch.bool)
        normalised = layer.layernorm_before(states)
        queries, keys = layer.attention.queries_and_keys(normalised, positions)
        if str(block - 1) in model.token_reducers:
            logits = (queries[:, :, :1] @ keys.mT)[:, :, 0].mean(dim=1)[:, 1:]
            order = logits.argsort(dim=1, descending=True)[:, : kept[block - 2]]
            mask = F.pad(torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, True), (1, 0), value=True)
        active.append(mask)
        values = layer.attention.v_proj(normalised).unflatten(-1, (4, -1)).transpose(1, 2)
        weights = (queries @ keys.mT * 8**-0.5).masked_fill(~mask[:, None, None], -torch.inf).softmax(dim=-1)
        attended = layer.attention.o_proj((weights @ values).transpose(1, 2).flatten(2))
        states = states + attended * mask[..., None]
        states = states + layer.mlp(layer.layernorm_after(states)) * mask[..., None]
    return states, active


@pytest.mark.parametrize("rope", [{}, {"rope_theta": 100.0}])
def test_outputs_and_gradients_are_those_of_masked_attention(rope):
    config = idlevit_config(reducer_config={"cut_loss": "none", "keep_rate": 0.6}, use_final_norm=False, **rope)
    model = make_model(CroprViTModel, config).double().train()
    pixels, weights = make_images(2).double(), torch.randn(2, 17, 32, dtype=torch.float64)
    outputs = model(pixels, output_pruning=True)
    (outputs.last_hidden_state * weights).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    expected, active = masked_forward(model, pixels)
    (expected * weights).sum().backward()
    assert_close_relative(outputs.last_hidden_state, expected, 1e-9)
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for name, parameter in model.named_parameters():  # that of biases of keys is 0 but for rounding
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=1e-9 * largest, msg=name)
    # The map: the block after which a patch took part in none.
    for image in range(2):
        for patch in range(16):
            last = max(block for block, mask in enumerate(active, start=1) if mask[image, 1 + patch])
            assert outputs.pruned_after_block[image, patch] == last
    assert torch.equal(model.eval()(pixels).last_hidden_state, outputs.last_hidden_state)


def test_idle_tokens_stay_as_they_are_and_come_back():
    model = make_model(CroprViTBackbone, idlevit_config(out_features=[f"stage{n}" for n in range(1, 6)]))
    model.config.apply_layernorm = False
    with torch.no_grad():
        maps = [each.flatten(2).mT for each in model.eval()(make_images(8)).feature_maps]
    is_idle = [(later == earlier).all(dim=-1) for earlier, later in pairwise(maps)]
    kept = model.config.kept_patches()
    assert [(16 - idle.sum(dim=1)).tolist() for idle in is_idle] == [[kept[block]] * 8 for block in range(4)]
    assert any((earlier & ~later).any() for earlier, later in pairwise(is_idle))


@pytest.mark.parametrize(
    ("active", "inter", "intra"),
    [(137, 0.207674, 0.062833), (96, 0.247418, 0.126874), (67, 0.223752, 0.148010)],
)
def test_cut_losses_of_constant_attention(active, inter, intra):
    is_active = torch.arange(197)[None] <= active  # CLS and so many patches
    losses = cut_losses(torch.zeros(1, 197, 197), is_active)
    assert losses["inter"].item() == pytest.approx(inter, abs=1e-5)
    assert losses["intra"].item() == pytest.approx(intra, abs=1e-5)


def test_cut_losses_against_a_loop():
    torch.manual_seed(0)
    logits, is_active = torch.randn(2, 9, 9), torch.rand(2, 9) > 0.5
    is_active[:, :2] = True
    losses = cut_losses(logits, is_active, num_prefix_tokens=2)
    weights, inter, intra = logits.softmax(dim=-1), [], []
    for image in range(2):
        for i in range(9):
            across = [j for j in range(2, 9) if is_active[image, i] != is_active[image, j]]
            inter.append(sum(weights[image, i, j].item() for j in across) ** 2)
            own = sum(weights[image, i, j].item() for j in range(9) if is_active[image, j])
            intra.append((own - 1) ** 2 if is_active[image, i] else 0.0)
    assert losses["inter"].item() == pytest.approx(sum(inter) / 18, rel=1e-5)
    assert losses["intra"].item() == pytest.approx(sum(intra) / 18, rel=1e-5)


@pytest.mark.parametrize("counted", ["exact", "as_released"])
@pytest.mark.parametrize("parts", ["both", "inter", "none"])
def test_losses_in_training(parts, counted):
    settings = {"cut_loss": parts, "cut_loss_blocks": counted, "cut_loss_weight": 6.0}
    model = make_model(CroprViTForImageClassification, idlevit_config(reducer_config=settings)).train()
    outputs = model(make_images(2), labels=torch.tensor([0, NUM_LABELS - 1]))
    assert model.config.pruning_blocks == [1, 2, 3, 4]
    names = {"exact": [1, 2, 3, 4], "as_released": [1, 3]}[counted] if parts != "none" else []
    assert [*(outputs.method_losses or {})] == [f"cut_loss_{block}" for block in names]
    if names:
        total = outputs.main_loss + sum(outputs.method_losses.values())
        torch.testing.assert_close(outputs.loss.detach(), total)
        outputs.loss.backward()
        assert model.base_model.layers[1].attention.k_proj.weight.grad.abs().max() > 0
    evaluated = model.eval()(make_images(2), labels=torch.tensor([0, 1]))
    assert evaluated.method_losses is None


def test_a_rate_of_one_is_the_plain_model():
    pixels = make_images(2)
    plain = make_model(CroprViTForImageClassification, idlevit_config(token_reducer=None)).eval()
    model = make_model(CroprViTForImageClassification, idlevit_config(reducer_config={"keep_rate": 1.0})).eval()
    model.load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert torch.equal(model(pixels).logits, plain(pixels).logits)


def test_a_schedule_says_how_many_take_part_in_the_next_block():
    config = idlevit_config(pruning_schedule=[16, 9, 9, 5, 5])
    assert config.pruning_blocks == [2, 3, 4]
    model = make_model(CroprViTModel, config).eval()
    with torch.no_grad():
        outputs = model(make_images(1), output_hidden_states=True, output_pruning=True)
    assert outputs.patches_per_block.tolist() == [[16, 16, 9, 9, 5]]
    assert [each.shape[1] - 1 for each in outputs.hidden_states] == [16] * 6  # those that idle are there as well


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_cls_token": False, "pooling": "mean"}, "'idlevit' needs a CLS token"),
        ({"reducer_config": {"keep_rate": 0.0}}, "`keep_rate` is 0.0"),
        ({"reducer_config": {"keep_rate": 0.8}, "pruning_rate": 2}, "has a `keep_rate`, and the configuration"),
        ({"reducer_config": {"first_block": 1}}, "`first_block` of IdleViT is 1; with 5 blocks it must be in 2 to 5"),
        ({"reducer_config": {"first_block": 5}, "last_layer_fusion": True}, "last layer fusion it must be in 2 to 4"),
        ({"reducer_config": {"cut_loss": "all"}}, "`cut_loss` is 'all'; choose one of both, intra, inter, none"),
        ({"reducer_config": {"cut_loss_weight": -1.0}}, "`cut_loss_weight` is -1.0"),
    ],
)
def test_what_it_cannot_do(fields, message):
    with pytest.raises(ValueError, match=message):
        CroprViTModel(idlevit_config(**fields))
