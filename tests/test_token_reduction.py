import copy
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cropr_hf import (
    TOKEN_REDUCERS,
    CroprViTConfig,
    CroprViTForImageClassification,
    CroprViTModel,
    TokenReducer,
    TokenState,
    register_token_reducer,
)
from cropr_hf.reducer_cropr import CroprModule, aggregate_tokens, fold_scorer, score_tokens
from cropr_hf.reducer_random import RandomReducer
from cropr_hf.saving import strip_state_dict
from cropr_hf.token_reduction import build_token_reducers
from cropr_hf.token_state import gather_tokens, select_tokens
from tests.common import NUM_LABELS, assert_close_relative, full, make_images, make_model, tiny_config


# 1. Operations on token sequences


@pytest.mark.parametrize("shape", [(3, 7, 5), (3, 7), (3, 7, 2, 4), (1, 7, 5)])
def test_gather_tokens_equals_torch_gather(shape):
    tokens = torch.randn(shape)
    indices = torch.randint(0, 7, (shape[0], 4))
    index = indices.reshape(*indices.shape, *(1 for _ in shape[2:])).expand(*indices.shape, *shape[2:])
    gathered, doubled = gather_tokens(indices, tokens, 2 * tokens)
    assert torch.equal(gathered, torch.gather(tokens, 1, index)) and torch.equal(doubled, 2 * gathered)


def test_gather_tokens_of_a_table_that_the_batch_shares():
    table = torch.randn(1, 7, 5)
    indices = torch.randint(0, 7, (3, 4))
    (gathered,) = gather_tokens(indices, table)
    assert torch.equal(gathered, table[0][indices])


def test_gather_tokens_passes_gradients():
    tokens = torch.randn(2, 5, 3, requires_grad=True)
    gather_tokens(torch.tensor([[0, 4], [2, 2]]), tokens)[0].sum().backward()
    expected = torch.tensor([[1.0, 0, 0, 0, 1], [0, 0, 2, 0, 0]])
    assert torch.equal(tokens.grad, expected[..., None].expand(2, 5, 3))


def test_select_tokens_keeps_the_best_in_raster_order_and_sorts_the_pruned_by_score():
    scores = torch.tensor([[9.0, 0.1, 0.5, 0.3, 0.9, 0.2]])
    kept, pruned = select_tokens(scores, num_keep=2, num_prefix_tokens=1)
    assert kept.tolist() == [[0, 2, 4]]
    assert pruned.tolist() == [[3, 5, 1]]


def test_select_tokens_keeps_the_prefix_whatever_its_score():
    scores = torch.tensor([[-math.inf, -100.0, 1.0, 3.0, 2.0]])
    kept, pruned = select_tokens(scores, num_keep=1, num_prefix_tokens=2)
    assert kept.tolist() == [[0, 1, 3]]
    assert pruned.tolist() == [[4, 2]]


def test_select_tokens_takes_no_number_for_the_lowest_and_keeps_the_prefix_before_infinity():
    scores = torch.tensor([[0.0, math.nan, 1.0, math.inf, -math.inf, 0.5], [math.nan] * 6])
    kept, pruned = select_tokens(scores, num_keep=2, num_prefix_tokens=1)
    assert kept.tolist() == [[0, 2, 3], [0, 1, 2]]
    assert pruned.tolist() == [[5, 4, 1], [3, 4, 5]]
    padding = torch.tensor([[False, False, False, False, False, True]])
    assert select_tokens(scores, 4, 1, padding)[1][:, -1].tolist() == [5, 5]


def test_select_tokens_ties_go_to_the_lower_index():
    kept, pruned = select_tokens(torch.zeros(2, 64), num_keep=5)
    assert kept.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert pruned.tolist() == [list(range(5, 64))] * 2
    kept, _ = select_tokens(torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0]]), num_keep=3)
    assert kept.tolist() == [[0, 1, 3]]


def test_select_tokens_can_keep_all():
    kept, pruned = select_tokens(torch.randn(2, 6), num_keep=5, num_prefix_tokens=1)
    assert kept.tolist() == [list(range(6))] * 2
    assert pruned.shape == (2, 0)


def test_select_tokens_images_of_a_batch_do_not_influence_each_other():
    scores = torch.randn(4, 20)
    together, _ = select_tokens(scores, 7, 1)
    alone = torch.cat([select_tokens(row[None], 7, 1)[0] for row in scores])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_score_tokens_is_float32_under_autocast_and_bf16(pre_norm):
    tokens, query = torch.randn(2, 50, 32).bfloat16(), torch.randn(32).bfloat16()
    expected = score_tokens(tokens.float(), query.float(), pre_norm)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = score_tokens(tokens.float(), query.float(), pre_norm)
    for scores in (score_tokens(tokens, query, pre_norm), under_autocast):
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
        assert torch.equal(scores.argsort(dim=1), expected.argsort(dim=1))


def test_score_tokens_is_the_dot_product():
    tokens, query = torch.randn(2, 6, 8), torch.randn(8)
    expected = tokens.numpy().astype(np.float64) @ query.numpy().astype(np.float64)
    np.testing.assert_allclose(score_tokens(tokens, query).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 2])
def test_aggregate_tokens_equals_explicit_softmax(heads):
    queries, keys, values = torch.randn(1, heads, 3, 4), torch.randn(2, heads, 6, 4), torch.randn(2, heads, 6, 4)
    expected = []
    for image in range(2):
        by_head = []
        for head in range(heads):
            weights = torch.softmax(queries[0, head] @ keys[image, head].T / math.sqrt(4), dim=-1)
            by_head.append(weights @ values[image, head])
        expected.append(torch.cat(by_head, dim=-1))
    torch.testing.assert_close(aggregate_tokens(queries, keys, values), torch.stack(expected), rtol=0, atol=1e-5)


# 2. TokenState


def labelled_state(batch_size, num_patches, num_prefix, rotary):
    """A state in which every hidden state and position entry names its image and its place."""
    length = num_prefix + num_patches
    places = torch.arange(length, dtype=torch.float64)
    images = torch.arange(batch_size, dtype=torch.float64)[:, None] * 1000
    hidden_states = torch.stack([images + places, -(images + places)], dim=-1)
    tables = {}
    if rotary:
        table = places[None, :, None].expand(1, length, 3)
        tables = {"image": (table, -table), "window": (table + 0.5, table - 0.5)}
    indices = torch.arange(length)[None]
    padding = torch.stack([torch.arange(length) % (image + 2) == 0 for image in range(batch_size)])
    return TokenState(hidden_states, indices, tables, tables, padding, num_prefix)


def check_tokens_agree(state):
    """Hidden state, index and position entry of every token tell of the same place."""
    batch_size = state.hidden_states.shape[0]
    images = torch.arange(batch_size, dtype=torch.float64)[:, None] * 1000
    places = state.token_indices.expand(batch_size, -1).double()
    assert torch.equal(state.hidden_states[..., 0], images + places)
    assert torch.equal(state.hidden_states[..., 1], -(images + places))
    for image, padding in enumerate(state.padding_of_tokens()):
        assert torch.equal(padding, places[image] % (image + 2) == 0)
    assert state.rotations.keys() == state.rotary_tables.keys()
    if state.rotations:
        (cos, sin), (window_cos, window_sin) = state.rotations["image"], state.rotations["window"]
        assert torch.equal(cos, places[:, :, None].expand(batch_size, -1, 3)[: cos.shape[0]])
        assert torch.equal(sin, -cos)
        assert torch.equal(window_cos, cos + 0.5)
        assert torch.equal(window_sin, cos - 0.5)


@pytest.mark.parametrize("seed", [*range(10), *full(*range(10, 40))])
def test_pruning_and_fusing_returns_every_token_to_its_place(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    batch_size, num_prefix = rng.choice([1, 2, 3]), rng.choice([0, 1, 5])
    num_patches, num_blocks = rng.randint(3, 40), 8
    original = state = labelled_state(batch_size, num_patches, num_prefix, rotary=rng.random() < 0.7)
    expected_map = torch.full((batch_size, num_patches), num_blocks)
    for block in sorted(rng.sample(range(1, num_blocks), rng.randint(0, 5))):
        num_keep = rng.randint(1, state.num_patches)
        scores = torch.randint(0, 5, (batch_size, state.hidden_states.shape[1])).float()  # with many ties
        kept, pruned = select_tokens(scores, num_keep, num_prefix)
        for image in range(batch_size):
            gone = state.token_indices.expand(batch_size, -1)[image, pruned[image]] - num_prefix
            expected_map[image, gone] = block
        state = state.prune(kept, pruned, block)

        assert state.num_patches == num_keep
        assert state.num_prefix_tokens == num_prefix
        indices = state.token_indices.expand(batch_size, -1)
        assert torch.equal(indices[:, :num_prefix], torch.arange(num_prefix).expand(batch_size, -1))
        assert (indices.diff(dim=1) > 0).all()  # raster order
        check_tokens_agree(state)
        set_aside = state.pruned[-1]
        assert set_aside.block == block
        images = torch.arange(batch_size)[:, None] * 1000
        assert torch.equal(set_aside.hidden_states[..., 0], (images + set_aside.token_indices).double())

    assert torch.equal(state.pruning_map(num_blocks), expected_map)
    fused = state.restore()
    check_tokens_agree(fused)
    assert fused.is_whole and all(tokens.hidden_states is None for tokens in fused.pruned)
    assert torch.equal(fused.pruning_map(num_blocks), expected_map)
    assert fused.num_prefix_tokens == num_prefix
    assert torch.equal(fused.hidden_states, original.hidden_states)
    assert torch.equal(fused.token_indices, original.token_indices.expand_as(fused.token_indices))


def test_fusing_puts_a_pruned_token_back_as_it_was_when_pruned():
    state = labelled_state(1, 4, 1, rotary=False)
    pruned = state.prune(torch.tensor([[0, 2, 3]]), torch.tensor([[4, 1]]), block=1)
    pruned.hidden_states = pruned.hidden_states + 100
    fused = pruned.restore()
    assert fused.hidden_states[0, :, 0].tolist() == [100, 1, 102, 103, 4]


def test_states_of_pruned_tokens_are_kept_for_fusion_alone():
    state = replace(labelled_state(1, 4, 1, rotary=False), keeps_pruned_states=False)
    pruned = state.prune(torch.tensor([[0, 2, 3]]), torch.tensor([[4, 1]]), block=1)
    assert pruned.pruned[0].hidden_states is None
    assert pruned.pruning_map(2).tolist() == [[1, 2, 2, 1]]
    with pytest.raises(ValueError, match="set `keeps_pruned_states`"):
        pruned.restore()


def test_fusing_without_pruned_tokens_changes_nothing():
    state = labelled_state(2, 4, 1, rotary=True)
    assert state.restore() is state
    assert state.pruning_map(6).tolist() == [[6] * 4] * 2


def test_pruned_tokens_keep_their_gradient_path():
    hidden_states = torch.randn(2, 5, 3, requires_grad=True)
    state = TokenState(hidden_states, torch.arange(5)[None], num_prefix_tokens=1)
    fused = state.prune(*select_tokens(torch.randn(2, 5), 2, 1), block=1).restore()
    (fused.hidden_states * torch.arange(5.0)[:, None]).sum().backward()
    assert torch.equal(hidden_states.grad, torch.arange(5.0)[:, None].expand(2, 5, 3))


# 3. The interface and the registry


class KeepFirstReducer(TokenReducer):
    """Keeps the first patches of the sequence."""

    name = "keep_first"
    label = title = "keep first"

    def after_block(self, state, num_keep):
        return self.keep_best(state, num_keep)

    def scores(self, state):
        return torch.arange(state.hidden_states.shape[1], 0, -1.0).expand(len(state.hidden_states), -1)


@pytest.fixture
def keep_first():
    register_token_reducer(KeepFirstReducer)
    yield
    del TOKEN_REDUCERS["keep_first"]


def test_a_custom_reducer_works_end_to_end(keep_first, tmp_path):
    config = tiny_config(token_reducer="keep_first")
    model = make_model(CroprViTForImageClassification, config)
    outputs = model(make_images(), labels=torch.tensor([0, 1]), output_pruning=True)
    # 13, 11, 9 patches of 16 stay after blocks 1, 2, 3 of 5.
    assert outputs.pruned_after_block.tolist() == [[5] * 9 + [3] * 2 + [2] * 2 + [1] * 3] * 2
    outputs.loss.backward()
    model.save_pretrained(tmp_path)
    reloaded = CroprViTForImageClassification.from_pretrained(tmp_path)
    assert_close_relative(reloaded(make_images()).logits, outputs.logits)


def test_a_custom_reducer_cannot_bias_keys_in_windows(keep_first, monkeypatch):
    monkeypatch.setattr(KeepFirstReducer, "supports_windows", True)
    assert CroprViTModel(tiny_config("windows", token_reducer="keep_first"))
    monkeypatch.setattr(KeepFirstReducer, "uses_key_bias", classmethod(lambda cls, config: True))
    with pytest.raises(ValueError, match="'keep_first' does not support windowed attention"):
        CroprViTModel(tiny_config("windows", token_reducer="keep_first"))


def test_registering_a_second_class_under_a_name_is_refused(keep_first):
    class Impostor(TokenReducer):
        name = "keep_first"

    with pytest.raises(ValueError, match="'keep_first' is registered already; choose another name"):
        register_token_reducer(Impostor)
    assert register_token_reducer(KeepFirstReducer) is KeepFirstReducer
    assert TOKEN_REDUCERS["keep_first"] is KeepFirstReducer


def test_an_unknown_reducer_names_the_known_ones():
    with pytest.raises(
        ValueError,
        match=r"'rndom'; did you mean 'random'\? Choose one of ailurus, .*cropr, .*, random, .*, or None",
    ):
        build_token_reducers(tiny_config(token_reducer="rndom"))


def test_heads_for_a_reducer_without_them_are_refused():
    with pytest.raises(
        ValueError, match=r"'random' does not support auxiliary heads; set `use_auxiliary_heads=False`"
    ):
        build_token_reducers(tiny_config("random", use_auxiliary_heads=True))


def test_modules_stand_where_the_config_says():
    assert list(build_token_reducers(tiny_config())) == ["1", "2", "3"]
    assert list(build_token_reducers(tiny_config("schedule"))) == ["2", "3"]
    assert list(build_token_reducers(tiny_config("no_fusion"))) == ["1", "2", "3", "4"]
    assert len(build_token_reducers(tiny_config("unpruned"))) == 0


def test_random_reducer_keeps_the_count_and_the_prefix_and_differs_between_calls():
    reducer = RandomReducer(tiny_config("random"), block=1)
    state = labelled_state(3, 40, 2, rotary=True)
    draws = [reducer.after_block(state, 10) for _ in range(2)]
    for draw in draws:
        assert draw.num_patches == 10
        assert draw.token_indices[:, :2].tolist() == [[0, 1]] * 3
        check_tokens_agree(draw)
    assert not torch.equal(draws[0].token_indices, draws[1].token_indices)
    assert not torch.equal(draws[0].token_indices[0], draws[0].token_indices[1])  # nor do images share a draw
    assert reducer.after_block(state, 40) is state


def test_random_reducer_is_uniform():
    reducer = RandomReducer(tiny_config("random"), block=1)
    kept = reducer.after_block(labelled_state(4000, 8, 1, rotary=False), 2).token_indices[:, 1:]
    frequencies = torch.bincount(kept.flatten(), minlength=9)[1:] / 4000
    # 5 standard deviations of a share of 4000 draws with probability 1/4
    assert (frequencies - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / 4000)


# 4. The Cropr module


def module_config(**overrides):
    return tiny_config(use_auxiliary_heads=True, **overrides)


def make_module(config, seed=0, block=2):
    """A module with weights that no initialisation made."""
    module = CroprModule(config, block)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def test_golden_numbers_of_a_module_worked_out_by_hand():
    """Width 2, one CLS token and four patches, two queries; every step in numpy, from the formulas of the paper."""
    config = CroprViTConfig(
        hidden_size=2,
        num_hidden_layers=4,
        num_attention_heads=1,
        intermediate_size=4,
        image_size=16,
        patch_size=8,
        pruning_rate=1,
        num_labels=3,
        num_queries=2,
        aggregator_mlp_ratio=1.0,
        use_auxiliary_heads=True,
    )
    queries = np.array([[1.0, 0.5], [-0.5, 1.0]])
    tokens = np.array([[5.0, 5.0], [1.0, 2.0], [2.0, 0.0], [0.0, 1.0], [-1.0, 3.0]])
    fc1, fc1_bias = np.array([[0.5, -1.0], [1.0, 0.25]]), np.array([0.1, -0.2])
    fc2, fc2_bias = np.array([[1.0, -0.5], [0.3, 0.7]]), np.array([0.05, 0.0])
    classifier, bias = np.array([[1.0, 0.0], [0.5, 0.5], [-1.0, 2.0]]), np.array([0.0, 0.1, -0.1])

    # Scores: sum of the queries is (0.5, 1.5), so 0.5 x + 1.5 y: 10 (CLS), 3.5, 1, 1.5, 4. Two patches stay: 1 and 4.
    scores = (tokens @ queries.T).sum(axis=1)
    assert scores.tolist() == [10.0, 3.5, 1.0, 1.5, 4.0]
    weights = np.exp(queries @ tokens.T / math.sqrt(2))
    aggregated = weights / weights.sum(axis=1, keepdims=True) @ tokens

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

    def gelu(x):
        return np.vectorize(lambda value: 0.5 * value * (1 + math.erf(value / math.sqrt(2))))(x)

    aggregated = aggregated + gelu(norm(aggregated) @ fc1.T + fc1_bias) @ fc2.T + fc2_bias
    auxiliary_logits = norm(aggregated) @ classifier.T + bias

    module = CroprModule(config, block=1).double().train()
    with torch.no_grad():
        module.router.scorer.queries.copy_(torch.tensor(queries))
        for parameter, value in (
            (module.aggregator.mlp[1].weight, fc1),
            (module.aggregator.mlp[1].bias, fc1_bias),
            (module.aggregator.mlp[3].weight, fc2),
            (module.aggregator.mlp[3].bias, fc2_bias),
            (module.auxiliary_head.classifier.weight, classifier),
            (module.auxiliary_head.classifier.bias, bias),
        ):
            parameter.copy_(torch.tensor(value))
    hidden_states = torch.tensor(tokens)[None]
    state = TokenState(hidden_states, torch.arange(5)[None], num_prefix_tokens=1)

    assert score_tokens(hidden_states, module.router.scorer())[0].tolist() == scores.tolist()
    scorer = module.router.scorer
    np.testing.assert_allclose(
        module.aggregator(scorer.queries, hidden_states, scorer)[0].detach(), aggregated, atol=1e-12
    )
    reduced = module.after_block(state, num_keep=2)
    np.testing.assert_allclose(reduced.auxiliary_logits[1][0].detach(), auxiliary_logits, atol=1e-12)
    assert reduced.token_indices.tolist() == [[0, 1, 4]]
    assert reduced.hidden_states.tolist() == [[[5.0, 5.0], [1.0, 2.0], [-1.0, 3.0]]]
    assert [(pruned.block, pruned.token_indices.tolist()) for pruned in reduced.pruned] == [(1, [[3, 2]])]


def reference_scores(scorer, tokens, num_heads, pre_norm):
    """Raw attention logits as the paper defines them, head by head and query by query, summed (float64)."""
    weight = {name: parameter.detach().double() for name, parameter in scorer.named_parameters()}
    tokens, queries = tokens.double(), weight["queries"]
    if pre_norm:
        tokens = F.layer_norm(tokens, tokens.shape[-1:], weight["norm.weight"], weight["norm.bias"], eps=1e-6)
    if "query_projection.weight" in weight:
        queries = queries @ weight["query_projection.weight"].T
    if "key_projection.weight" in weight:
        tokens = tokens @ weight["key_projection.weight"].T
    size = tokens.shape[-1] // num_heads
    scores = torch.zeros(tokens.shape[:2], dtype=torch.float64)
    for head in range(num_heads):
        channels = slice(head * size, (head + 1) * size)
        for query in queries:
            scores += tokens[..., channels] @ query[channels]
    return scores


SCORER_OPTIONS = [
    {
        "scorer_num_heads": heads,
        "scorer_query_projection": query_projection,
        "scorer_key_projection": key_projection,
        "scorer_pre_norm": pre_norm,
        "num_queries": num_queries,
    }
    for heads in (1, 2, 4)
    for query_projection in (False, True)
    for key_projection in (False, True)
    for pre_norm in (False, True)
    for num_queries in (1, 3, 16)
]


def option_id(options):
    return "-".join(str(int(value)) for value in options.values())


@pytest.mark.parametrize("options", SCORER_OPTIONS, ids=option_id)
def test_folded_scorer_selects_as_the_sum_over_heads_and_queries(options):
    module = make_module(module_config(**options), seed=3)
    tokens = torch.randn(4, 41, 32) * 2 + 0.5
    expected = reference_scores(module.router.scorer, tokens, options["scorer_num_heads"], options["scorer_pre_norm"])
    unfolded = score_tokens(tokens, module.router.scorer(), options["scorer_pre_norm"])
    module.remove_auxiliary_heads()
    folded = score_tokens(tokens, module.router.scorer(), options["scorer_pre_norm"])
    assert torch.equal(folded, unfolded)
    # Scores may differ by a constant per module, which changes no ranking.
    difference = folded.double() - expected
    centred = difference - difference.mean()
    assert centred.abs().max() < 1e-5 * expected.abs().max()
    if not options["scorer_pre_norm"]:
        assert difference.abs().max() < 1e-5 * expected.abs().max()
    for num_keep in (1, 13, 39):
        assert torch.equal(select_tokens(folded, num_keep, 1)[0], select_tokens(expected, num_keep, 1)[0])


@pytest.mark.parametrize("options", SCORER_OPTIONS[::5], ids=option_id)
def test_unfolding_keeps_the_scores(options):
    config = module_config(**options)
    module = make_module(config, seed=4)
    module.remove_auxiliary_heads()
    tokens = torch.randn(3, 41, 32)
    folded = score_tokens(tokens, module.router.scorer(), options["scorer_pre_norm"])
    module.add_auxiliary_heads(config, lambda part: part.apply(initialize))
    assert module.router.scorer.queries.shape == (options["num_queries"], 32)
    if options["num_queries"] > 1:  # queries stay different from one another, or training could not tell them apart
        assert module.router.scorer.queries.std(dim=0).min() > 0
    unfolded = score_tokens(tokens, module.router.scorer(), options["scorer_pre_norm"])
    assert (unfolded - folded).abs().max() < 1e-5 * folded.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_queries", [1, 256])
def test_unfolding_keeps_the_scores_in_half_precision(num_queries, dtype):
    config = module_config(num_queries=num_queries)
    module = make_module(config, seed=4).to(dtype)
    module.remove_auxiliary_heads()
    tokens = torch.randn(3, 41, 32, dtype=dtype)
    folded = score_tokens(tokens, module.router.scorer())
    module.add_auxiliary_heads(config, lambda part: part.apply(initialize))
    difference = (score_tokens(tokens, module.router.scorer()) - folded).abs().max()
    assert difference < 1e-3 * folded.abs().max()


def initialize(module):
    if hasattr(module, "init_weights"):
        module.init_weights()


def test_fold_of_plain_queries_is_their_sum():
    queries = torch.randn(7, 32)
    torch.testing.assert_close(fold_scorer(queries), queries.sum(dim=0), rtol=0, atol=1e-5)
    assert fold_scorer(queries.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("options", SCORER_OPTIONS[::7], ids=option_id)
def test_stripping_a_state_dict_equals_removing_heads_in_memory(options):
    config = module_config(**options)
    module = make_module(config, seed=5)
    holder = nn.ModuleDict({"backbone": nn.ModuleDict({"token_reducers": nn.ModuleDict({"2": module})})})
    complete = {**holder.state_dict(), "classifier.weight": torch.ones(2)}
    before = {name: tensor.clone() for name, tensor in complete.items()}
    stripped = strip_state_dict(complete, config)
    assert complete.keys() == before.keys() and all(torch.equal(complete[name], before[name]) for name in before)
    assert sorted(stripped) == ["backbone.token_reducers.2.router.scorer.folded_query", "classifier.weight"]
    module.remove_auxiliary_heads()
    assert torch.equal(next(iter(holder.state_dict().values())), stripped[next(iter(holder.state_dict()))])
    again = strip_state_dict(stripped, config)
    assert again.keys() == stripped.keys()


def test_auxiliary_losses_reach_the_module_and_not_the_backbone():
    module = make_module(module_config(num_queries=3, scorer_num_heads=2, scorer_pre_norm=True)).train()
    hidden_states = torch.randn(2, 17, 32, requires_grad=True)
    state = TokenState(hidden_states, torch.arange(17)[None], num_prefix_tokens=1)
    reduced = module.after_block(state, num_keep=9)
    logits = reduced.auxiliary_logits[module.block]
    assert logits.shape == (2, 3, NUM_LABELS)
    F.cross_entropy(logits.flatten(0, 1), torch.zeros(6, dtype=torch.long)).backward()
    assert hidden_states.grad is None
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert reduced.hidden_states.requires_grad


def test_the_main_loss_reaches_the_kept_tokens_and_not_the_module():
    module = make_module(module_config()).train()
    hidden_states = torch.randn(2, 17, 32, requires_grad=True)
    state = TokenState(hidden_states, torch.arange(17)[None], num_prefix_tokens=1)
    reduced = module.after_block(state, num_keep=9)
    reduced.hidden_states.square().sum().backward()
    assert all(parameter.grad is None for parameter in module.parameters())
    touched = hidden_states.grad.abs().sum(dim=-1) > 0
    expected = torch.zeros(2, 17, dtype=torch.bool).scatter(1, reduced.token_indices, True)
    assert torch.equal(touched, expected)


def test_evaluation_computes_nothing_auxiliary():
    module = make_module(module_config()).eval()
    module.aggregator.forward = module.auxiliary_head.forward = lambda *_: pytest.fail("ran in evaluation")
    state = TokenState(torch.randn(2, 17, 32), torch.arange(17)[None], num_prefix_tokens=1)
    assert not module.after_block(state, 9).auxiliary_logits


def test_the_module_trains_even_where_it_prunes_nothing():
    module = make_module(module_config()).train()
    state = TokenState(torch.randn(2, 17, 32), torch.arange(17)[None], num_prefix_tokens=1)
    reduced = module.after_block(state, num_keep=16)
    assert reduced.hidden_states is state.hidden_states and not reduced.pruned
    assert reduced.auxiliary_logits[module.block].shape == (2, 1, NUM_LABELS)


def test_training_and_evaluation_select_the_same_tokens():
    module = make_module(module_config(num_queries=16, scorer_num_heads=4, scorer_key_projection=True))
    state = TokenState(torch.randn(2, 17, 32), torch.arange(17)[None], num_prefix_tokens=1)
    kept = [
        instance.after_block(state, 7).token_indices for instance in (module.train(), copy.deepcopy(module).eval())
    ]
    module.remove_auxiliary_heads()
    kept.append(module.after_block(state, 7).token_indices)
    assert torch.equal(kept[0], kept[1]) and torch.equal(kept[0], kept[2])


def test_the_folded_vector_stays_frozen():
    module = CroprModule(tiny_config(), block=1)
    vector = module.router.scorer.folded_query
    assert not vector.requires_grad
    module.requires_grad_(True).train()
    assert not vector.requires_grad


def test_first_weights_follow_the_reference():
    torch.manual_seed(0)
    config = CroprViTConfig(
        hidden_size=256, num_attention_heads=4, num_hidden_layers=4, num_labels=50, num_queries=64,
        intermediate_size=64, use_auxiliary_heads=True, image_size=64,
        pruning_rate=2,
    )  # fmt: skip
    module = CroprViTForImageClassification(config).cropr_vit.token_reducers["1"]
    queries, head = module.router.scorer.queries, module.auxiliary_head.classifier
    # Queries by `trunc_normal_tf_` of timm: a normal distribution cut at two deviations has 0.88 of the spread.
    # Classifiers by its `trunc_normal_`, whose bounds are -2 and 2 whatever the deviation.
    assert queries.std().item() == pytest.approx(0.88 * 256**-0.5, rel=0.03)
    assert queries.abs().max() <= 2 * 256**-0.5
    assert head.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert 0.06 < head.weight.abs().max() <= 2
    assert head.bias.abs().max() == 0


def test_aggregator_without_mlp_has_none():
    module = CroprModule(module_config(aggregator_mlp_ratio=None), block=1)
    assert {name.split(".")[0] for name, _ in module.named_parameters()} == {"router", "auxiliary_head"}
    widths = CroprModule(module_config(aggregator_mlp_ratio=2), block=1).aggregator.mlp[1].weight.shape
    assert tuple(widths) == (64, 32)
