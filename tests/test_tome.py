"""ToMe against what its paper and its published behaviour say: matching and merging by naive loops, token counts by
the figures of the paper, proportional attention by duplicated tokens."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from cropr_hf import (
    CroprViTBackbone,
    CroprViTConfig,
    CroprViTForImageClassification,
    CroprViTForSemanticSegmentation,
    CroprViTModel,
    TokenState,
)
from cropr_hf.methods.tome import ToMeReducer, match_tokens, merge_tokens
from cropr_hf.token_reduction import AttentionFacts
from tests.common import full, make_images, make_model, tiny_config


def tome_config(**overrides):
    return tiny_config("tome", **overrides)


def naive_matching(metric, num_merge, num_prefix):
    """Lists of places of one image: what is left, in the new order, and into which place each token went."""
    length = len(metric)
    metric = [row / row.norm() for row in metric]
    evens = [place for place in range(0, length, 2) if place >= num_prefix]
    odds = [place for place in range(1, length, 2) if place >= num_prefix]
    pairs = []
    for even in evens:
        similarities = [torch.dot(metric[even], metric[odd]).item() for odd in odds]
        best = max(range(len(odds)), key=lambda index: similarities[index])
        pairs.append((similarities[best], even, odds[best]))
    pairs.sort(key=lambda pair: -pair[0])
    into = {place: place for place in range(length)}
    into |= {even: odd for _, even, odd in pairs[:num_merge]}
    prefix = list(range(num_prefix))
    left = prefix + [even for even in evens if into[even] == even] + odds
    return left, into, [even for _, even, _ in pairs[:num_merge]]


@pytest.mark.parametrize("num_prefix", [0, 1, *full(2, 5)])
@pytest.mark.parametrize("length", [12, 41, *full(197)])
def test_matching_and_merging_are_those_of_naive_loops(length, num_prefix):
    torch.manual_seed(length + num_prefix)
    metric = torch.randn(2, length, 16, dtype=torch.float64)
    tokens = torch.randn(2, length, 8, dtype=torch.float64)
    sizes = torch.randint(1, 5, (2, length)).double()
    for num_merge in {1, (length - num_prefix) // 4, (length - num_prefix) // 2}:
        survivors, merged, slots = match_tokens(metric, num_merge, num_prefix)
        means, new_sizes = merge_tokens(tokens, sizes, survivors, merged, slots)
        assert means.shape == (2, length - num_merge, 8)
        for image in range(2):
            left, into, gone = naive_matching(metric[image], num_merge, num_prefix)
            assert survivors[image].tolist() == left
            assert merged[image].tolist() == gone
            assert slots[image].tolist() == [left.index(into[place]) for place in range(length)]
            for slot, place in enumerate(left):
                group = [other for other in range(length) if into[other] == place]
                assert new_sizes[image, slot] == sizes[image, group].sum()
                mean = (tokens[image, group] * sizes[image, group, None]).sum(dim=0) / sizes[image, group].sum()
                torch.testing.assert_close(means[image, slot], mean, rtol=0, atol=1e-12)
                if len(group) == 1:
                    assert torch.equal(means[image, slot], tokens[image, place])
            assert left[:num_prefix] == list(range(num_prefix))


def test_of_equal_similarities_the_first_token_wins():
    metric = torch.ones(1, 9, 4)
    survivors, merged, slots = match_tokens(metric, 2, num_prefix_tokens=1)
    assert merged.tolist() == [[2, 4]]
    assert survivors.tolist() == [[0, 6, 8, 1, 3, 5, 7]]
    assert slots.tolist() == [[0, 3, 3, 4, 3, 5, 1, 6, 2]]


# What enters each block, and what leaves the last; of ViT-B, ViT-B at 384 pixels, and ViT-L.
PUBLISHED_COUNTS = [
    (12, 224, 8, 0, [197, 189, 181, 173, 165, 157, 149, 141, 133, 125, 117, 109, 101]),
    (12, 224, 13, 0, [197 - 13 * block for block in range(13)]),
    (12, 224, 16, 0, [197, 181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21, 11]),
    (12, 224, 8, -1, [197, 181, 167, 154, 143, 133, 125, 118, 113, 109, 107, 106, 106]),
    (12, 384, 45, 0, [*(577 - 45 * block for block in range(12)), 42]),
    (24, 224, 8, 0, [*(197 - 8 * block for block in range(24)), 7]),
]


@pytest.mark.parametrize(("num_blocks", "image_size", "rate", "inflection", "counts"), PUBLISHED_COUNTS)
def test_token_counts_are_the_published_ones(num_blocks, image_size, rate, inflection, counts):
    config = CroprViTConfig(
        hidden_size=8,
        intermediate_size=8,
        num_attention_heads=2,
        num_hidden_layers=num_blocks,
        image_size=image_size,
        token_reducer="tome",
        pruning_rate=rate,
        reducer_config={"rate_inflection": inflection},
    )
    assert [kept + 1 for kept in config.kept_patches()] == counts[1:]
    model = make_model(CroprViTModel, config)
    outputs = model(make_images(1, image_size, image_size), output_hidden_states=True)
    assert [states.shape[1] for states in outputs.hidden_states] == counts


@pytest.mark.parametrize("proportional_attention", [False, True])
def test_without_merging_it_is_the_plain_model(proportional_attention):
    plain = make_model(CroprViTForImageClassification, tiny_config("unpruned", num_register_tokens=1)).double()
    settings = {"proportional_attention": proportional_attention}
    config = tome_config(pruning_rate=0, reducer_config=settings)
    model = CroprViTForImageClassification(config).double().eval()
    model.load_state_dict(plain.state_dict())
    images = make_images().double()
    torch.testing.assert_close(model(images).logits, plain(images).logits, rtol=0, atol=1e-12)


def test_sizes_sum_up_and_merging_moves_no_mass():
    """Of the states between attention and MLP of every block."""
    model = make_model(CroprViTModel, tome_config(pruning_rate=3)).double()
    seen = []
    for reducer in model.token_reducers.values():
        own = reducer.after_attention

        def watch(state, num_keep, facts, own=own):
            after = own(state, num_keep, facts)
            seen.append((state, after))
            return after

        reducer.after_attention = watch
    model(make_images().double())
    assert len(seen) == 5
    for before, after in seen:
        old = torch.ones_like(before.hidden_states[..., 0]) if before.sizes is None else before.sizes
        assert torch.equal(after.sizes.sum(dim=1), torch.full((2,), 16.0 + 2, dtype=torch.float64))
        assert torch.equal(after.sizes[:, :2], torch.ones(2, 2, dtype=torch.float64))
        mass, new_mass = (
            (sizes[..., None] * state.hidden_states).sum(dim=1)
            for sizes, state in ((old, before), (after.sizes, after))
        )
        torch.testing.assert_close(new_mass, mass, rtol=1e-12, atol=1e-12)
        assert torch.equal(after.key_bias, after.sizes.log())


def test_proportional_attention_is_attention_to_duplicates():
    model = make_model(CroprViTModel, tiny_config("unpruned")).double()
    attention = model.layers[0].attention
    tokens = torch.randn(2, 7, 32, dtype=torch.float64)
    sizes = torch.tensor([1, 3, 1, 2, 1, 5, 1])
    duplicated = tokens.repeat_interleave(sizes, dim=1)
    expected = attention(duplicated)[0][:, sizes.cumsum(0) - 1]
    bias = sizes.double().log().expand(2, -1)
    torch.testing.assert_close(attention(tokens, key_bias=bias)[0], expected, rtol=0, atol=1e-12)
    model.set_attn_implementation("eager")  # its softmax is float32
    torch.testing.assert_close(attention(tokens, key_bias=bias)[0], expected, rtol=0, atol=1e-5)


def test_unmerging_gives_every_token_back():
    """By slots that several merges in a row made up: each token gets what it was merged into, at its old place."""
    torch.manual_seed(0)
    states = torch.randn(2, 18, 6, dtype=torch.float64)
    state = TokenState(states, torch.arange(18)[None], num_prefix_tokens=2, grid_size=(4, 4))
    config = tome_config()
    groups = [[{place} for place in range(18)] for _ in range(2)]  # what each slot stands for, by image
    for block, num_keep in ((1, 12), (2, 7), (3, 4)):
        reducer = ToMeReducer(config, block)
        keys = state.hidden_states[:, None, :, :3] + 0.1  # (B, 1, T, 3)
        facts = AttentionFacts(keys, keys, keys, 1.0, None, keys.transpose(1, 2))
        _, merged, slots = match_tokens(keys[:, 0], state.num_patches - num_keep, 2)
        state = reducer.after_attention(state, num_keep, facts)
        for image in range(2):
            new = [set() for _ in range(num_keep + 2)]
            for old, slot in zip(groups[image], slots[image].tolist()):
                new[slot] |= old
            groups[image] = new
        assert state.num_patches == num_keep and len(merged[0]) == state.pruned[-1].token_indices.shape[1]
    restored = state.restore()
    assert restored.is_whole and restored.sizes is None and restored.key_bias is None
    assert torch.equal(restored.token_indices, torch.arange(18)[None])
    for image in range(2):
        assert sorted(place for group in groups[image] for place in group) == list(range(18))  # each exactly once
        for slot, group in enumerate(groups[image]):
            assert state.sizes[image, slot] == len(group)
            assert state.token_indices[image, slot].item() in group
            mean = states[image, sorted(group)].mean(dim=0)
            torch.testing.assert_close(state.hidden_states[image, slot], mean, rtol=0, atol=1e-12)
            for place in group:
                assert torch.equal(restored.hidden_states[image, place], state.hidden_states[image, slot])
    # A patch that was merged into another is gone from there on; one per group is never gone.
    gone = state.pruning_map(5)
    assert torch.equal(gone, restored.pruning_map(5))
    assert (gone == 5).sum(dim=1).tolist() == [4, 4]
    assert [(gone == block).sum().item() for block in (1, 2, 3)] == [8, 10, 6]


def test_merged_and_pruned_tokens_do_not_mix():
    state = TokenState(torch.randn(1, 5, 4), torch.arange(5)[None], num_prefix_tokens=1)
    pruned = state.prune(torch.tensor([[0, 2, 3]]), torch.tensor([[4, 1]]), block=1)
    survivors, merged, slots = match_tokens(torch.randn(1, 3, 4), 1, 1)
    with pytest.raises(ValueError, match="prunes or merges, not both"):
        pruned.merge(torch.randn(1, 2, 4), survivors, merged, slots, 2, {})
    survivors, merged, slots = match_tokens(torch.randn(1, 5, 4), 1, 1)
    with pytest.raises(ValueError, match="prunes or merges, not both"):
        state.merge(torch.randn(1, 4, 4), survivors, merged, slots, 1, {}).prune(survivors[:, :2], merged, block=2)


@torch.no_grad()
def test_attention_pooling_counts_a_merged_token_as_often_as_its_size_says():
    fields = {"pooling": "attention", "norm_before_pooling": True, "last_layer_fusion": False, "pruning_rate": 4}
    model = make_model(CroprViTModel, tome_config(**fields)).double()
    states = []
    own = model.pool
    model.pool = lambda hidden_states, sizes: states.append((hidden_states, sizes)) or own(hidden_states, sizes)
    outputs = model(make_images().double())
    hidden_states, sizes = states[0]
    assert sizes.max() > 1
    for image in range(len(sizes)):
        duplicates = hidden_states[image].repeat_interleave(sizes[image].long(), dim=0)
        expected = model.pooler(model.layernorm(duplicates)[None])
        torch.testing.assert_close(outputs.pooler_output[image], expected[0], rtol=0, atol=1e-12)


def test_means_weigh_merged_tokens_by_their_sizes():
    model = make_model(CroprViTModel, tome_config(pruning_rate=4)).double()
    states, sizes = [], []
    for reducer in model.token_reducers.values():
        own = reducer.after_block
        reducer.after_block = lambda state, num_keep, own=own: states.append(state) or own(state, num_keep)
    outputs = model(make_images().double())
    sizes = states[-1].sizes
    copies = states[-1].restore().hidden_states  # one per token of the image
    expected = model.layernorm(copies.mean(dim=1))
    torch.testing.assert_close(outputs.pooler_output, expected, rtol=0, atol=1e-12)
    assert sizes.max() > 1


def test_rotary_positions_follow_the_token_that_others_were_merged_into():
    config = tome_config(rope_theta=100.0, rope_coordinates="centered", pruning_rate=3)
    model = make_model(CroprViTModel, config).double()
    inputs = []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[1]))
    model(make_images().double())
    table = model.rotary_embedding((4, 4), torch.float64, torch.device("cpu"))
    for cos, _ in inputs[1:]:
        places = [(row[:, None] - table[0][0]).abs().sum(-1).argmin(-1) for row in cos]  # (T,) of each image
        for image_places, rows in zip(places, cos):
            assert torch.equal(table[0][0][image_places], rows)
    assert inputs[-1][0].shape[1] < inputs[0][0].shape[1]


def test_the_pruning_map_shows_what_enters_the_last_block():
    """Also where it merges in the last block, whose attention still tells these tokens apart."""
    model = make_model(CroprViTModel, tome_config())
    kept = model.config.kept_patches()
    assert kept[-1] < kept[-2]
    blocks = model(make_images(), output_pruning=True).pruned_after_block
    assert (blocks == model.config.num_hidden_layers).sum(dim=1).tolist() == [kept[-2]] * 2


def test_dense_tasks_get_copies_back_before_the_last_block():
    config = tome_config(last_layer_fusion=True, num_queries=None)
    assert config.kept_patches() == [14, 12, 10, 8, 8]
    model = make_model(CroprViTForSemanticSegmentation, config)
    outputs = model(make_images(), labels=torch.randint(5, (2, 32, 32)), output_hidden_states=True)
    assert outputs.logits.shape == (2, 5, 4, 4)
    assert [states.shape[1] - 2 for states in outputs.hidden_states] == [16, 14, 12, 10, 8, 16]
    outputs.loss.backward()
    with pytest.raises(ValueError, match="`last_layer_fusion` is False, but dense prediction needs every patch"):
        CroprViTForSemanticSegmentation(tome_config(num_queries=None))


def test_a_backbone_restores_its_maps_at_every_stage():
    model = make_model(CroprViTBackbone, tome_config(out_features=["stem", "stage2", "stage5"], pruning_rate=3))
    maps = model(make_images()).feature_maps
    assert [tuple(feature_map.shape) for feature_map in maps] == [(2, 32, 4, 4)] * 3
    patches = maps[-1].flatten(2).transpose(1, 2)
    assert all(len(torch.unique(image, dim=0)) == 2 for image in patches)  # 16, 13, 10, 7, 4, and by half 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"reducer_config": {"proportional_atention": True}}, "did you mean 'proportional_attention'"),
        ({"reducer_config": {"rate": 3}}, r"has 'rate', which is not a field of the token reducer 'tome'"),
        ({"reducer_config": {"rate_inflection": 2}}, r"`rate_inflection` is 2; it must be in \[-1, 1\]"),
        ({"prune_padding_first": True}, "'tome' merges tokens and drops none"),
        (
            {"use_cls_token": False, "num_register_tokens": 0, "window_size": 2, "window_block_indices": [1],
             "pooling": "patch_mean"},
            "'tome' does not support windowed attention",
        ),
        ({"use_auxiliary_heads": True}, "'tome' does not support auxiliary heads"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_when_the_model_is_built(overrides, message):
    with pytest.raises(ValueError, match=message):
        CroprViTForImageClassification._from_config(tome_config(**overrides))


def test_a_schedule_that_merges_more_than_half_is_refused():
    with pytest.raises(ValueError, match="keeps 7 patch tokens after block 2, but ToMe can only leave 8 there"):
        tome_config(pruning_rate=None, pruning_schedule=[16, 7, 7, 7, 7])
    model = make_model(CroprViTForImageClassification, tome_config())
    with pytest.raises(ValueError, match="keeps 3 patch tokens after block 1"):
        model.set_pruning([3, 3, 3, 3, 3])
    model.set_pruning([16, 16, 8, 8, 4])
    assert model(make_images()).logits.shape == (2, 5)


def test_kernels_without_a_bias_are_refused():
    config = tome_config()
    config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'tome' adds a bias to attention logits, which 'flash_attention_2' does not"):
        ToMeReducer.check(config)
    model = make_model(CroprViTForImageClassification, tome_config())
    with pytest.raises(ValueError, match="use `attn_implementation='sdpa'`"):
        model.set_attn_implementation("flash_attention_2")
    unbiased = tome_config(reducer_config={"proportional_attention": False})
    assert not ToMeReducer.uses_key_bias(unbiased)


def test_half_precision_merges_nearly_alike():
    model = make_model(CroprViTForImageClassification, tome_config())
    full = model(make_images()).logits
    half = model.bfloat16()(make_images().bfloat16()).logits
    assert half.dtype == torch.bfloat16 and half.isfinite().all()
    assert F.cosine_similarity(half.float(), full).min() > 0.9


def test_columns_move_with_the_tokens_of_a_method_that_prunes():
    state = TokenState(torch.randn(2, 5, 4), torch.arange(5)[None], num_prefix_tokens=1)
    state = replace(state, columns={"age": torch.arange(10).view(2, 5)})
    kept, gone = torch.tensor([[0, 2, 3], [0, 1, 4]]), torch.tensor([[4, 1], [3, 2]])
    pruned = state.prune(kept, gone, block=1)
    assert pruned.columns["age"].tolist() == [[0, 2, 3], [5, 6, 9]]
