"""EViT against what its paper and its published behaviour say: token counts and multiply-adds by their tables, the new
token by brute force."""

from dataclasses import replace

import pytest
import torch

from cropr_hf import CroprViTBackbone, CroprViTConfig, CroprViTForImageClassification, CroprViTModel, TokenState
from cropr_hf.methods.evit import EViTReducer
from cropr_hf.speed.cost import multiply_adds
from cropr_hf.token_reduction import AttentionFacts
from tests.common import assert_close_relative, make_images, make_model, tiny_config


def evit_config(**overrides):
    return tiny_config("plain", **{"token_reducer": "evit", "pruning_rate": None, "pooling": "cls", **overrides})


def make_state(config, batch_size=2, dtype=torch.float64):
    torch.manual_seed(0)
    length = config.num_prefix_tokens + config.num_patches
    states = torch.randn(batch_size, length, config.hidden_size, dtype=dtype)
    queries, keys = torch.randn(2, batch_size, config.num_attention_heads, length, 8, dtype=dtype)
    state = TokenState(
        states,
        token_indices=torch.arange(length)[None],
        num_prefix_tokens=config.num_prefix_tokens,
        grid_size=config.grid_size,
    )
    return state, AttentionFacts(queries, keys, keys, 8**-0.5, None, keys.transpose(1, 2))


@pytest.mark.parametrize(
    ("keep_rate", "fuse_tokens", "image_size", "lengths", "giga"),
    [
        (0.9, True, 224, [179, 163, 148], 4.022),
        (0.8, True, 224, [159, 129, 105], 3.477),
        (0.7, True, 224, [140, 100, 72], 3.029),
        (0.6, True, 224, [120, 74, 46], 2.635),
        (0.5, True, 224, [100, 52, 28], 2.309),
        (0.7, False, 224, [139, 98, 69], None),
        (0.5, False, 224, [99, 50, 26], None),
        (0.7, True, 384, [406, 286, 202], None),
    ],
)
def test_token_counts_and_multiply_adds_are_the_published_ones(keep_rate, fuse_tokens, image_size, lengths, giga):
    """CLS included, after the blocks 4, 7 and 10 of DeiT-S; its classifier has 384 x 1000 multiply-adds."""
    settings = {"keep_rate": keep_rate, "fuse_tokens": fuse_tokens}
    config = CroprViTConfig.from_size("small", token_reducer="evit", image_size=image_size, reducer_config=settings)
    kept = config.kept_patches()
    assert [1 + kept[block - 1] for block in (4, 7, 10)] == lengths
    assert kept[2] == config.num_patches and len({*kept}) == 4 and config.pruning_blocks == [4, 7, 10]
    if giga is not None:
        assert (multiply_adds(config) + 384 * 1000) / 1e9 == pytest.approx(giga, abs=1e-3)


@pytest.mark.parametrize("num_registers", [0, 2])
@pytest.mark.parametrize("fuse_tokens", [True, False])
def test_kept_and_new_tokens_are_those_of_brute_force(fuse_tokens, num_registers):
    config = evit_config(num_register_tokens=num_registers, reducer_config={"fuse_tokens": fuse_tokens})
    state, facts = make_state(config)
    prefix, best = config.num_prefix_tokens, 6
    reduced = EViTReducer(config, block=2).after_attention(state, best + fuse_tokens, facts)
    assert reduced.num_patches == best + fuse_tokens
    for image in range(2):
        logits = torch.stack([facts.queries[image, head, 0] @ facts.keys[image, head].T for head in range(4)])
        attention = (logits * facts.scaling).softmax(dim=-1).mean(dim=0)
        ranked = sorted(range(prefix, state.hidden_states.shape[1]), key=lambda place: -attention[place])
        kept = [*range(prefix), *sorted(ranked[:best])]
        assert reduced.token_indices[image, : prefix + best].tolist() == kept
        assert torch.equal(reduced.hidden_states[image, : prefix + best], state.hidden_states[image, kept])
        if fuse_tokens:
            new = sum(attention[place] * state.hidden_states[image, place] for place in ranked[best:])
            # Attention is computed in float32.
            torch.testing.assert_close(reduced.hidden_states[image, -1], new, rtol=1e-5, atol=1e-6)


def test_the_new_token_stays_or_leaves_like_any_other_and_has_no_place():
    config = evit_config(rope_theta=100.0)
    state, facts = make_state(config)
    tables = (torch.rand(1, 17, 4), torch.rand(1, 17, 4))
    state = replace(state, rotary_tables={"image": tables}, rotations={"image": tables})
    once = EViTReducer(config, block=1).after_attention(state, 8, facts)
    cos, sin = once.rotations["image"]
    assert torch.equal(cos[:, -1], torch.ones(2, 4)) and torch.equal(sin[:, -1], torch.zeros(2, 4))
    assert torch.equal(cos[:, :-1], tables[0][0, once.token_indices[:, :-1]])

    # One image attends to the new token most, the other least.
    keys = 0.01 * facts.keys[:, :, :9]
    keys[0, :, -1], keys[1, :, -1] = facts.queries[0, :, 0], -facts.queries[1, :, 0]
    twice = EViTReducer(config, block=2).after_attention(once, 5, replace(facts, keys=keys))
    assert [(indices == 17).sum().item() for indices in twice.token_indices] == [2, 1]
    assert twice.num_places == 17
    assert torch.equal(twice.rotations["image"][0][0, -2:], torch.ones(2, 4))
    blocks = twice.pruning_map(5)
    assert blocks.shape == (2, 16)
    assert [(row == 1).sum().item() for row in blocks] == [9, 9]
    assert [(row == 5).sum().item() for row in blocks] == [3, 4]  # beside one new token, or two
    whole = twice.restore()
    assert torch.equal(whole.token_indices, torch.arange(17).expand(2, -1)) and whole.num_unplaced == 0
    for image in range(2):
        for place in once.token_indices[image, :-1].tolist():
            assert torch.equal(whole.hidden_states[image, place], state.hidden_states[image, place])
    assert whole.rotations["image"][0].shape == (1, 17, 4)


def test_a_rate_of_one_is_the_plain_model():
    pixels = make_images(2)
    plain = make_model(CroprViTForImageClassification, evit_config(token_reducer=None)).eval()
    model = make_model(CroprViTForImageClassification, evit_config(reducer_config={"keep_rate": 1.0})).eval()
    model.load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert torch.equal(model(pixels).logits, plain(pixels).logits)


def test_the_order_of_patches_does_not_matter():
    model = make_model(CroprViTModel, evit_config()).double().eval()
    embed, order = model.embed, torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(16)])

    def shuffled(*args):
        state, table = embed(*args)
        return state.updated(hidden_states=state.hidden_states[:, order]), table

    with torch.no_grad():
        expected = model(make_images(2).double()).pooler_output
        model.embed = shuffled
        assert_close_relative(model(make_images(2).double()).pooler_output, expected, 1e-5)


def test_gradients_reach_what_left_and_the_attention():
    config = evit_config()
    state, facts = make_state(config)
    states, queries = state.hidden_states.requires_grad_(), facts.queries.requires_grad_()
    reduced = EViTReducer(config, block=2).after_attention(state, 5, facts)
    reduced.hidden_states[:, -1].sum().backward()
    gone = reduced.pruned[0].token_indices[0]
    assert states.grad[0, gone].abs().min() > 0 and queries.grad[:, :, 0].abs().min() > 0


def test_dense_features_are_those_of_every_patch():
    model = make_model(CroprViTBackbone, evit_config(out_features=["stage2", "stage5"])).eval()
    with torch.no_grad():
        features = model(make_images(2)).feature_maps
    assert [each.shape for each in features] == [(2, 32, 4, 4)] * 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_cls_token": False, "pooling": "mean"}, "'evit' needs a CLS token, but `use_cls_token` is False"),
        ({"reducer_config": {"keep_rate": 0.0}}, "`keep_rate` is 0.0"),
        ({"reducer_config": {"keep_rate": 0.5}, "pruning_rate": 2}, "has a `keep_rate`, and the configuration"),
        ({"reducer_config": {"blocks": [3, 2]}}, r"`blocks` is \[3, 2\]"),
        ({"reducer_config": {"blocks": [2, 6]}}, r"of EViT has \[6\]; with 5 blocks they must be in 1 to 5"),
        ({"reducer_config": {"blocks": [2, 5]}, "last_layer_fusion": True}, r"\[5\]; with 5 blocks and last layer"),
        ({"reducer_config": {"keeprate": 0.5}}, "did you mean 'keep_rate'"),
        ({"pruning_schedule": [16, 1, 1, 1, 1]}, "EViT can only leave 2 there"),
    ],
)
def test_what_it_cannot_do(fields, message):
    with pytest.raises(ValueError, match=message):
        CroprViTModel(evit_config(**fields))
