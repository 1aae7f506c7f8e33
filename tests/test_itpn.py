"""Token migration of Fast-iTPN against a loop over tokens; its authors published no code of it."""

import pytest
import torch
from torch.nn import functional as F

from cropr_hf import CroprViTBackbone, CroprViTConfig, CroprViTForImageClassification, CroprViTModel, TokenState
from cropr_hf.methods.itpn import MigrationReducer
from tests.common import make_images, make_model, tiny_config


def itpn_config(**overrides):
    return tiny_config("plain", **{"token_reducer": "itpn", "pruning_rate": None, **overrides})


def make_state(config, keeps_pruned_states=True):
    torch.manual_seed(0)
    length = config.num_prefix_tokens + config.num_patches
    states = torch.randn(2, length, config.hidden_size, dtype=torch.float64)
    return TokenState(
        states,
        token_indices=torch.arange(length)[None],
        num_prefix_tokens=config.num_prefix_tokens,
        keeps_pruned_states=keeps_pruned_states,
    )


@pytest.mark.parametrize("num_registers", [0, 1])
def test_the_most_similar_leave_and_come_back_as_they_were(num_registers):
    config = itpn_config(num_register_tokens=num_registers)
    state, prefix = make_state(config), config.num_prefix_tokens
    reduced = MigrationReducer(config, block=2).after_block(state, 11)
    evens = [place for place in range(0, prefix + 16, 2) if place >= prefix]
    odds = [place for place in range(1, prefix + 16, 2) if place >= prefix]
    for image in range(2):
        tokens = state.hidden_states[image]
        nearest = {i: max(F.cosine_similarity(tokens[i], tokens[j], dim=0).item() for j in odds) for i in evens}
        leaving = sorted(evens, key=lambda place: -nearest[place])[:5]
        assert reduced.pruned[0].token_indices[image].tolist() == leaving
        staying = [place for place in range(prefix + 16) if place not in leaving]
        assert reduced.token_indices[image].tolist() == staying
        assert torch.equal(reduced.hidden_states[image], tokens[staying])
    whole = reduced.restore()
    assert torch.equal(whole.hidden_states, state.hidden_states)
    assert torch.equal(whole.token_indices, state.token_indices.expand(2, -1))


def test_of_equal_tokens_one_stays():
    config = itpn_config(use_cls_token=False, pooling="mean")
    state = make_state(config)
    states = state.hidden_states.clone()
    states[:, 4:12] = states[:, 4:5]  # eight that are the same
    reduced = MigrationReducer(config, block=2).after_block(state.updated(hidden_states=states), 12)
    assert reduced.pruned[0].token_indices.sort(dim=1).values.tolist() == [[4, 6, 8, 10]] * 2


def test_padding_leaves_first_as_far_as_it_can():
    config = itpn_config(prune_padding_first=True, use_cls_token=False, pooling="mean")
    state = make_state(config).updated(padding=torch.arange(16).expand(2, -1) >= torch.tensor([[11], [16]]))
    reduced = MigrationReducer(config, block=2).after_block(state, 11)
    leaving = reduced.pruned[0].token_indices
    without = MigrationReducer(config, block=2).after_block(state.updated(padding=None), 11).pruned[0].token_indices
    assert {*leaving[0].tolist()[:2]} == {12, 14}  # 11, 13 and 15 are at odd places
    assert leaving[0].tolist()[2:] == [place for place in without[0].tolist() if place not in (12, 14)][:3]
    assert leaving[1].tolist() == without[1].tolist()


def test_feature_maps_show_what_left_as_it_was_then_and_train_it():
    model = make_model(CroprViTBackbone, itpn_config(out_features=["stage1", "stage5"], apply_layernorm=False))
    base = model.base_model
    pixels = make_images(2)
    state, _ = base.embed(pixels)
    state = state.updated(keeps_pruned_states=True)
    state = base.run_block(1, state, None)
    reduced = base.token_reducers["1"].after_block(state, base.config.kept_patches()[0])
    gone = reduced.pruned[0].token_indices
    last = model(pixels).feature_maps[-1].flatten(2).transpose(1, 2)
    for image in range(2):
        for place in gone[image].tolist():
            torch.testing.assert_close(last[image, place - 1], state.hidden_states[image, place])
    model.zero_grad()
    last[0, gone[0, 0] - 1].sum().backward()
    layers = base.layers
    assert layers[0].mlp.fc2.weight.grad.abs().max() > 0
    assert all(layer.mlp.fc2.weight.grad is None or not layer.mlp.fc2.weight.grad.any() for layer in layers[1:])


def test_a_rate_of_one_is_the_plain_model():
    pixels = make_images(2)
    plain = make_model(CroprViTForImageClassification, itpn_config(token_reducer=None)).eval()
    model = make_model(CroprViTForImageClassification, itpn_config(reducer_config={"keep_rate": 1.0})).eval()
    model.load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert torch.equal(model(pixels).logits, plain(pixels).logits)


def test_token_counts():
    config = CroprViTConfig.from_size("small", token_reducer="itpn")
    assert config.pruning_blocks == [3, 6, 9]
    kept = config.kept_patches()
    assert [kept[block - 1] for block in (2, 3, 6, 9, 12)] == [196, 138, 97, 68, 68]
    config = CroprViTConfig.from_size("small", token_reducer="itpn", reducer_config={"blocks": [2], "keep_rate": 0.5})
    assert config.kept_patches() == [196] + 11 * [98]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reducer_config": {"keep_rate": 0.3}}, "`keep_rate` is 0.3; it must be in"),
        ({"reducer_config": {"keep_rate": 0.8}, "pruning_rate": 2}, "has a `keep_rate`, and the configuration"),
        ({"reducer_config": {"blocks": [3, 2]}}, r"`blocks` is \[3, 2\]"),
        ({"reducer_config": {"blocks": [2, 5]}}, r"Token migration has \[5\]; with 5 blocks they must be in 1 to 4"),
        ({"pruning_schedule": [16, 7, 7, 7, 7]}, "Token migration can only leave 8 there"),
    ],
)
def test_what_it_cannot_do(fields, message):
    with pytest.raises(ValueError, match=message):
        CroprViTModel(itpn_config(**fields))
