"""AS-ViT against figures of the specification and loops; images one by one, packed, masked, and in training."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from cropr_hf import CroprViTBackbone, CroprViTConfig, CroprViTForImageClassification, CroprViTModel
from cropr_hf.methods.asvit import (
    BUDGET_LOSS,
    SCORES,
    ASViTReducer,
    best_of_each,
    weighted_class_attention,
)
from cropr_hf.publishing.export import export_model
from cropr_hf.token_state import TokenState
from cropr_hf.training import curriculum_schedule, layer_decay_groups
from tests.common import (
    assert_close_relative,
    enable_activation_checkpointing,
    full,
    make_images,
    make_model,
    tiny_config,
)


BLOCKS = (2, 3, 4)  # of 5
VARIANTS = {
    "plain": {},
    "patch_mean": {"pooling": "patch_mean"},
    "cls_patch_mean": {"pooling": "cls_patch_mean", "norm_before_pooling": True},
    "attention": {"pooling": "attention", "pooling_num_heads": 2},
    "rope_registers": {"rope_theta": 100.0, "num_register_tokens": 2, "pooling": "cls"},
    "fusion": {"last_layer_fusion": True},
}


def asvit_config(eval_mode="adaptive", **overrides):
    settings = {"eval_mode": eval_mode, "budget": 0.9, **overrides.pop("reducer_config", {})}
    return tiny_config(
        "plain", **{"token_reducer": "asvit", "pruning_rate": None, "reducer_config": settings, **overrides}
    )


def reducers_of(model):
    return list(model.base_model.token_reducers.values())


def set_thresholds(model, values):
    for reducer, value in zip(reducers_of(model), values):
        torch.nn.init.constant_(reducer.threshold.value, value)
    return model


@torch.no_grad()
def settle(model, pixels, shares=(0.7, 0.6, 0.6)):
    """Sets each threshold where about these shares of the scores that are left lie above, in a gap between two."""
    for reducer, share in zip(reducers_of(model), shares):
        seen, own = [], reducer.choose

        def spy(state, scores, seen=seen, own=own):
            is_there = torch.ones_like(scores, dtype=torch.bool) if state.sizes is None else state.sizes != 0
            is_there[:, : state.num_prefix_tokens] = False
            seen.append(scores[is_there])
            return own(state, scores)

        reducer.choose = spy
        model.eval()(pixels)
        del reducer.choose
        ordered = torch.cat(seen).sort().values
        middle = round((1 - share) * (len(ordered) - 1))
        places = range(max(0, middle - 3), min(len(ordered) - 1, middle + 4))
        below = max(places, key=lambda place: ordered[place + 1] - ordered[place])
        reducer.threshold.value.fill_((ordered[below] + ordered[below + 1]) / 2)
    return model


def build(model_class=CroprViTModel, eval_mode="adaptive", pixels=None, seed=0, **overrides):
    """A model in float64 with thresholds that split the scores of `pixels`."""
    model = make_model(model_class, asvit_config(eval_mode="adaptive", **overrides), seed).double()
    settle(model, make_images(4).double() if pixels is None else pixels)
    for reducer in reducers_of(model):
        reducer.eval_mode = eval_mode
    return model


def fix_choices(model, tables):
    """In place of thresholds: modules let stay what tables (B, N) say."""
    prefix = model.config.num_prefix_tokens
    for reducer, table in zip(reducers_of(model), tables):

        def choose(state, scores, table=table):
            stays = F.pad(table, (prefix, 1), value=True)
            return stays.gather(1, state.token_indices.expand(len(table), -1))

        reducer.choose = choose
    return model


@torch.no_grad()
def one_by_one(model, pixels, tables):
    """What is left of each image, (T, D), by blocks on what is left before."""
    state, _ = model.embed(pixels)
    prefix, positions, images = state.num_prefix_tokens, state.rotations.get("image"), []
    for image in range(len(pixels)):
        states, places = state.hidden_states[image : image + 1], torch.arange(state.hidden_states.shape[1])
        for block, layer in enumerate(model.layers, start=1):
            states = layer(states, None if positions is None else tuple(each[:, places] for each in positions))
            if block in BLOCKS:
                table = F.pad(tables[BLOCKS.index(block)][image], (prefix, 0), value=True)
                states, places = states[:, table[places]], places[table[places]]
        images.append(states[0])
    return images


# The score


def brute_force_scores(attention, contexts):
    """Of one image, (H, T) and (T, H, d), in loops."""
    scores = []
    for token in range(attention.shape[1]):
        norms = [context.square().sum().sqrt().item() for context in contexts[token]]
        scores.append(sum(attention[head, token].item() * norm / sum(norms) for head, norm in enumerate(norms)))
    return torch.tensor(scores, dtype=attention.dtype)


def test_scores_are_those_of_a_loop_and_lie_between_the_heads():
    torch.manual_seed(0)
    attention = torch.randn(2, 4, 9, dtype=torch.float64).softmax(dim=-1)
    contexts = torch.randn(2, 9, 4, 8, dtype=torch.float64)
    scores = weighted_class_attention(attention, contexts)
    for image in range(2):
        expected = brute_force_scores(attention[image], contexts[image])
        torch.testing.assert_close(scores[image], expected, rtol=1e-7, atol=0)
    assert (scores <= attention.amax(dim=1)).all() and (scores >= attention.amin(dim=1) * (1 - 1e-6)).all()
    # Shares of heads sum up to 1: heads that attend alike give what they attend.
    alike = attention[:, :1].expand(-1, 4, -1)
    torch.testing.assert_close(weighted_class_attention(alike, contexts), alike[:, 0], rtol=1e-7, atol=0)
    nothing = weighted_class_attention(attention, torch.zeros_like(contexts))
    assert torch.equal(nothing, torch.zeros_like(nothing))


def record_scores(reducer, note):
    """Calls `note` with each scores that a module reads off the attention."""
    own = reducer.after_attention

    def after_attention(state, num_keep, facts):
        state = own(state, num_keep, facts)
        note(state.columns[SCORES])
        return state

    reducer.after_attention = after_attention


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_the_model_reads_the_attention_of_the_block_before(implementation):
    model = make_model(CroprViTModel, asvit_config(rope_theta=100.0)).double()
    model.set_attn_implementation(implementation)
    set_thresholds(model, [-1.0] * 3)
    read, contexts = {}, {}
    for reducer in reducers_of(model):
        record_scores(reducer, lambda scores, block=reducer.block: read.setdefault(block, scores))
    hooks = [
        layer.attention.o_proj.register_forward_pre_hook(
            lambda module, inputs, block=block: contexts.update({block: inputs[0]})
        )
        for block, layer in enumerate(model.layers, start=1)
    ]
    model(make_images().double())
    for hook in hooks:
        hook.remove()
    model.set_attn_implementation("eager")
    weights = model(make_images().double(), output_attentions=True).attentions
    assert [*read] == [*BLOCKS]
    for block in BLOCKS:
        heads = contexts[block].unflatten(2, (4, 8))
        for image in range(2):
            expected = brute_force_scores(weights[block - 1][image, :, 0], heads[image])
            torch.testing.assert_close(read[block][image], expected, rtol=1e-5, atol=1e-8)


def make_state(num_patches, scores=None, batch_size=2, width=4):
    """A state behind a block that gave these scores (B, N)."""
    states = torch.zeros(batch_size, 1 + num_patches, width, dtype=torch.float64)
    state = TokenState(states, token_indices=torch.arange(1 + num_patches)[None], num_prefix_tokens=1)
    return state if scores is None else with_scores(state, scores)


def with_scores(state, scores):
    return state.updated(columns={**state.columns, SCORES: F.pad(scores, (1, 0))})


def test_thresholds_mean_the_same_at_another_resolution():
    """A patch with one and a half times its share of the attention, as far as heads agree."""
    for num_patches in (16, 64, 196, 576):
        config = asvit_config(image_size=8 * int(num_patches**0.5))
        reducer = ASViTReducer(config, block=2).double().eval()
        torch.nn.init.constant_(reducer.threshold.value, 1.5 / 196)
        scores = torch.tensor([1.4, 1.6], dtype=torch.float64)[:, None].expand(-1, num_patches) / num_patches
        reduced = reducer.after_block(make_state(num_patches, scores), num_keep=1)
        counts = reduced.patches_per_block(5, False)[:, -1].tolist()
        assert counts == [0, num_patches]


# The plain model, nothing, and one patch


@pytest.mark.parametrize("eval_mode", ["adaptive", "batch_mean"])
@torch.no_grad()
def test_low_thresholds_are_the_plain_model(eval_mode):
    plain = make_model(CroprViTForImageClassification, asvit_config(token_reducer=None, reducer_config={})).eval()
    model = make_model(CroprViTForImageClassification, asvit_config(eval_mode)).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    set_thresholds(model, [-1.0] * 3)
    pixels = make_images().double()
    expected = plain.double()(pixels).logits
    assert_close_relative(model.double()(pixels).logits, expected, 1e-12)
    assert_close_relative(model.train()(pixels).logits, expected, 1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_high_thresholds_leave_the_prefix(variant, batch_size):
    model = make_model(CroprViTForImageClassification, asvit_config(**VARIANTS[variant]))
    set_thresholds(model, [1.0] * 3)
    images = make_images(batch_size)
    encoded = model.eval().cropr_vit(images, output_pruning=True, output_hidden_states=True)
    prefix, fuses = model.config.num_prefix_tokens, model.config.last_layer_fusion
    assert encoded.patches_per_block.tolist() == [[16, 16, 0, 0, 16 * fuses]] * batch_size
    assert encoded.hidden_states[3].shape[1] == prefix
    assert (encoded.pruned_after_block == 2).all()
    for training in (False, True):
        assert model.train(training)(images).logits.isfinite().all()


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_images_that_keep_nothing_one_patch_or_many(variant, masks, monkeypatch):
    """Packed and masked, against each image alone; then all of them lose everything."""
    pixels, model = make_images(4).double(), make_model(CroprViTModel, asvit_config(**VARIANTS[variant])).double()
    counts = torch.tensor([[0, 0, 0], [1, 1, 1], [7, 1, 0], [16, 11, 5]])
    ranks = torch.rand(4, 16, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    tables = [ranks < counts[:, stage, None] for stage in range(len(reducers_of(model)))]
    fix_choices(model, tables)
    if masks:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    outputs = model(pixels, output_pruning=True)
    assert outputs.pooler_output.isfinite().all()
    found = outputs.patches_per_block
    for stage in range(len(tables)):
        assert found[:, BLOCKS[stage]].tolist() == counts[:, stage].tolist()
    if model.config.last_layer_fusion:
        return
    for image, expected in enumerate(one_by_one(model, pixels, tables)):
        is_there = outputs.token_indices.expand(4, -1)[image] < model.config.num_prefix_tokens + 16
        if model.config.norm_before_pooling:
            expected = model.layernorm(expected)
        assert_close_relative(outputs.last_hidden_state[image][is_there], expected, 1e-12)
    assert fix_choices(model, [each & False for each in tables])(pixels).pooler_output.isfinite().all()


# Inference by thresholds


@pytest.mark.parametrize(("height", "width"), [(32, 32), *full((40, 48))])
@pytest.mark.parametrize("variant", ["plain", "rope_registers", "cls_patch_mean", "fusion", *full("attention")])
@torch.no_grad()
def test_packed_masked_and_single_images_agree(variant, height, width, monkeypatch):
    pixels = make_images(4, height, width).double()
    model = build(CroprViTForImageClassification, pixels=pixels, **VARIANTS[variant])
    counts = model.cropr_vit(pixels, output_pruning=True).patches_per_block
    assert counts[:, BLOCKS[0]].amin() < counts[:, BLOCKS[0]].amax()  # images differ
    packed, single = model(pixels).logits, torch.cat([model(image[None]).logits for image in pixels])
    assert_close_relative(packed, single, 1e-12)
    order = torch.tensor([2, 0, 3, 1])
    assert_close_relative(model(pixels[order]).logits, packed[order], 1e-12)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert_close_relative(model(pixels).logits, single, 1e-12)
    assert torch.equal(model.cropr_vit(pixels, output_pruning=True).patches_per_block, counts)


@torch.no_grad()
def test_what_stays_is_above_the_threshold():
    pixels = make_images(4).double()
    model, seen = build(pixels=pixels), []
    for reducer in reducers_of(model):
        own = reducer.choose
        reducer.choose = lambda state, scores, own=own: (
            seen.append((state.token_indices, state.sizes, scores, own(state, scores))) or seen[-1][-1]
        )
    outputs = model(pixels, output_pruning=True)
    for reducer, (places, sizes, scores, stays) in zip(reducers_of(model), seen):
        for image in range(4):
            there = [token for token in range(1, scores.shape[1]) if sizes is None or sizes[image, token]]
            above = {token for token in there if scores[image, token] > reducer.threshold.value}
            assert {token for token in there if stays[image, token]} == above
            left = {places.expand(4, -1)[image, token].item() - 1 for token in above}
            assert left == {*(outputs.pruned_after_block[image] > reducer.block).nonzero().flatten().tolist()}


@pytest.mark.parametrize("variant", ["plain", "rope_registers", "fusion", "cls_patch_mean"])
@pytest.mark.parametrize("batch_size", [1, 3])
@torch.no_grad()
def test_training_masks_as_inference_packs(batch_size, variant):
    pixels = make_images(batch_size).double()
    model = build(CroprViTForImageClassification, pixels=pixels, **VARIANTS[variant])
    packed, masked = (
        model.train(training).cropr_vit(pixels, output_pruning=True, output_stages=range(6))
        for training in (False, True)
    )
    found, expected = (model.train(training)(pixels).logits for training in (True, False))
    assert_close_relative(found, expected, 1e-4)
    assert torch.equal(masked.pruned_after_block, packed.pruned_after_block)
    assert torch.equal(masked.patches_per_block, packed.patches_per_block)
    left = [masked.pruned_after_block > reducer.block for reducer in reducers_of(model)]
    assert all((later <= earlier).all() for earlier, later in itertools.pairwise(left))
    for one, other in zip(masked.stage_states, packed.stage_states):
        assert_close_relative(one, other, 1e-4)


@pytest.mark.parametrize("seed", range(20))
def test_the_best_of_each_image_on_the_mean(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(5, 9, generator=generator)
    is_above = scores > 0.2 + 0.6 * torch.rand(1, generator=generator)
    chosen = best_of_each(scores, is_above)
    number = is_above.sum().item() // 5
    for image in range(5):
        ranked = sorted(range(9), key=lambda patch: -scores[image, patch])
        assert {*chosen[image].nonzero().flatten().tolist()} == {*ranked[:number]}


@torch.no_grad()
def test_the_mean_of_the_batch():
    """Every module leaves the whole part of the mean; single images are those of the other mode."""
    pixels = make_images(8).double()
    model, seen = build(eval_mode="batch_mean", pixels=pixels), []
    for reducer in reducers_of(model):
        threshold = reducer.threshold
        threshold.register_forward_hook(lambda module, inputs, is_above: seen.append(is_above.sum().item()))
    outputs = model(pixels, output_pruning=True)
    counts = outputs.patches_per_block
    assert [counts[:, block].tolist() for block in BLOCKS] == [[total // 8] * 8 for total in seen]
    assert seen[0] % 8 and outputs.last_hidden_state.shape[1] == 1 + seen[-1] // 8

    singles = torch.cat([model(image[None], output_pruning=True).patches_per_block for image in pixels])
    assert counts[0, BLOCKS[0]] == singles[:, BLOCKS[0]].sum() // 8
    adaptive = build(eval_mode="adaptive", pixels=pixels)(pixels, output_pruning=True)
    assert torch.equal(adaptive.patches_per_block, singles)

    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    assert_close_relative(model(pixels[order]).pooler_output, outputs.pooler_output[order], 1e-12)
    # The same image beside one that keeps many, and beside one that keeps few.
    first = singles[:, BLOCKS[0]]
    most, fewest = first.argmax().item(), first.argmin().item()
    assert first[most] - first[fewest] >= 2
    other = ({*range(8)} - {most, fewest}).pop()
    pairs = [model(pixels[[other, beside]], output_pruning=True) for beside in (most, fewest)]
    assert pairs[0].patches_per_block[0, BLOCKS[0]] > pairs[1].patches_per_block[0, BLOCKS[0]]


@torch.no_grad()
def test_top_k_keeps_as_many_as_the_schedule_says():
    pixels = make_images(3).double()
    model = make_model(CroprViTModel, asvit_config("topk")).double()
    kept, read = model.config.kept_patches(), []
    for reducer in reducers_of(model):
        record_scores(reducer, read.append)
    outputs = model(pixels, output_pruning=True)
    assert outputs.patches_per_block.tolist() == [[16, *kept[:-1]]] * 3
    for image in range(3):
        best = sorted(range(16), key=lambda patch: -read[0][image, 1 + patch])[: kept[1]]
        assert {*(outputs.pruned_after_block[image] > 2).nonzero().flatten().tolist()} == {*best}


@pytest.mark.parametrize("eval_mode", ["adaptive", "batch_mean", "topk"])
def test_where_the_schedule_keeps_all_nothing_leaves(eval_mode):
    """As at the beginning of a curriculum; thresholds learn to let through."""
    model = build(CroprViTForImageClassification, eval_mode)
    pixels, labels = make_images().double(), torch.tensor([0, 1])
    pruned = model(pixels).logits
    plain = make_model(CroprViTForImageClassification, asvit_config(token_reducer=None, reducer_config={})).double()
    plain.load_state_dict(model.state_dict(), strict=False)
    model.set_pruning(curriculum_schedule(model.config, 0.0))
    for training in (False, True):
        outputs = model.train(training)(pixels, labels=labels, output_pruning=True)
        assert torch.equal(outputs.logits, plain(pixels).logits) and (outputs.pruned_after_block == 5).all()
    assert outputs.method_losses[BUDGET_LOSS] > 0
    model.set_pruning(None)
    assert torch.equal(model.eval()(pixels).logits, pruned)
    whole = make_model(CroprViTForImageClassification, asvit_config(eval_mode, reducer_config={"budget": 1.0}))
    whole.double().load_state_dict(model.state_dict())
    assert torch.equal(whole(pixels).logits, plain(pixels).logits)


# The budget


def test_blocks_are_the_published_ones():
    for num_blocks, blocks in ((12, [4, 7, 10]), (16, [5, 9, 13]), (20, [6, 11, 16])):
        config = CroprViTConfig.from_size("small", token_reducer="asvit", num_hidden_layers=num_blocks)
        assert config.pruning_blocks == blocks
    reducers = [ASViTReducer(config, block) for block in blocks]
    assert [reducer.threshold.value.item() for reducer in reducers] == pytest.approx([0.001, 0.002, 0.003])


def giga_multiply_adds(config, entering):
    """The authors' count: patch embedding, and blocks on patches that enter them and the CLS token."""
    size = config.hidden_size
    embedding = config.num_patches * size * config.num_channels * config.patch_size**2
    return (embedding + sum(12 * size**2 * (1 + n) + 2 * size * (1 + n) ** 2 for n in entering)) / 1e9


@pytest.mark.parametrize(
    ("size", "budget", "teacher"),
    [("small", 0.65, 4.573643), ("small", 0.5, 4.573643), ("tiny", 0.65, 1.246372)],
)
@pytest.mark.parametrize("image_size", [224, 384])
def test_the_schedule_meets_the_budget(size, budget, teacher, image_size):
    config = CroprViTConfig.from_size(
        size, token_reducer="asvit", image_size=image_size, reducer_config={"budget": budget}
    )
    kept = config.kept_patches()
    assert kept[2] == config.num_patches > kept[3] == kept[5] > kept[6] == kept[8] > kept[9] == kept[11]
    rate = kept[3] / config.num_patches
    assert kept[9] == pytest.approx(rate**3 * config.num_patches, abs=2)
    prefix_free = [-1 + config.num_patches] * 12  # that of the unpruned model has no CLS token
    whole = giga_multiply_adds(config, prefix_free)
    if image_size == 224:
        assert whole == pytest.approx(teacher, abs=1e-6)
    assert giga_multiply_adds(config, [config.num_patches, *kept[:-1]]) == pytest.approx(budget * whole, rel=3e-3)


def budget_loss(config, scores):
    """Of the modules in training that see these scores, (B, N) each, and the modules."""
    kept, state = config.kept_patches(), make_state(config.num_patches)
    reducers = [ASViTReducer(config, block).double().train() for block in config.pruning_blocks]
    for reducer, of_stage in zip(reducers, scores):
        state = reducer.after_block(with_scores(state, of_stage), kept[reducer.block - 1])
    return state.losses[BUDGET_LOSS], reducers


@pytest.mark.parametrize(("size", "whole"), [("small", (4.598498, 4.573643)), ("tiny", (None, 1.246372))])
def test_the_loss_is_the_distance_from_the_budget(size, whole):
    """Where all patches stay, of DeiT: 1.625631 for the small one, times the weight."""
    config = CroprViTConfig.from_size(size, token_reducer="asvit")
    plain = giga_multiply_adds(config, [196] * 12)
    if size == "small":
        assert plain == pytest.approx(whole[0], abs=1e-6)
        assert plain - 0.65 * whole[1] == pytest.approx(1.625631, abs=2e-6)
    loss, _ = budget_loss(config, torch.ones(3, 2, 196, dtype=torch.float64))
    assert loss.item() == pytest.approx(2 * (plain - 0.65 * whole[1]), abs=2e-6)


def test_the_loss_is_of_the_mean_over_images():
    """And a schedule that is given is the budget, as it is for a model that `set_pruning` changes."""
    config = CroprViTConfig.from_size(
        "small", token_reducer="asvit", pruning_schedule=[196] * 3 + [150] * 3 + [100] * 3 + [50] * 3
    )
    counts = torch.tensor([[196, 0], [120, 0], [30, 0]])
    scores = [(torch.arange(196) < count[:, None]).double() for count in counts]
    loss, _ = budget_loss(config, scores)
    entering = [[196] * 4 + [count] * 3 + [third] * 3 + [last] * 2 for count, third, last in counts.T.tolist()]
    mean = sum(giga_multiply_adds(config, each) for each in entering) / 2
    budget = giga_multiply_adds(config, [196] * 4 + [150] * 3 + [100] * 3 + [50] * 2)
    assert loss.item() == pytest.approx(2 * abs(mean - budget), rel=1e-9)


@pytest.mark.parametrize(("share", "sign"), [(0.95, -1), (0.2, 1)])
def test_thresholds_rise_over_budget_and_fall_below(share, sign):
    """A step of descent goes against the gradient."""
    config = CroprViTConfig.from_size("small", token_reducer="asvit")
    generator = torch.Generator().manual_seed(0)
    is_above = torch.rand(2, 196, generator=generator) < share
    near = 2e-5 + 5e-5 * torch.rand(3, 2, 196, dtype=torch.float64, generator=generator)
    starts = torch.tensor([0.001, 0.002, 0.003], dtype=torch.float64)[:, None, None]
    loss, reducers = budget_loss(config, starts + torch.where(is_above, near, -near))
    loss.backward()
    for reducer in reducers:
        assert sign * reducer.threshold.value.grad.item() > 0


def test_far_from_the_threshold_nothing_is_learned():
    config = CroprViTConfig.from_size("small", token_reducer="asvit")
    loss, reducers = budget_loss(config, torch.ones(3, 2, 196, dtype=torch.float64))
    loss.backward()
    assert all(reducer.threshold.value.grad == 0 for reducer in reducers)


# Training


def test_losses_reach_thresholds_and_the_attention():
    """The budget does, through scores, and so does the task, through what decisions change."""
    model = build(CroprViTForImageClassification, reducer_config={"temperature": 1e-2}).train()
    pixels, labels = make_images(4).double(), torch.arange(4)
    outputs = model(pixels, labels=labels)
    assert [*outputs.method_losses] == [BUDGET_LOSS]
    torch.testing.assert_close(outputs.loss.detach(), outputs.main_loss + outputs.method_losses[BUDGET_LOSS])
    attention = model.cropr_vit.layers[1].attention
    watched = [attention.q_proj.weight, attention.v_proj.weight, *(r.threshold.value for r in reducers_of(model))]
    of_budget = model.cropr_vit(pixels).method_losses[BUDGET_LOSS]
    for gradient in torch.autograd.grad(of_budget, watched):
        assert gradient.isfinite().all() and gradient.any()
    for reducer in reducers_of(model):
        reducer.loss_weight = 0.0
    loss = model(pixels, labels=labels).loss
    for gradient in torch.autograd.grad(loss, watched):
        assert gradient.isfinite().all() and gradient.any()
    assert model.eval()(pixels, labels=labels).method_losses is None


def test_activation_checkpointing_gives_equal_gradients():
    """Also of what scores depend on."""
    gradients = []
    for checkpointing in (False, True):
        model = build(CroprViTForImageClassification, reducer_config={"temperature": 1e-2}).train()
        if checkpointing:
            enable_activation_checkpointing(model)
        model(make_images(4).double(), labels=torch.arange(4)).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    largest = max(gradient.abs().max().item() for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():  # that of biases of keys is 0 but for rounding
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-13 * largest, msg=name)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(3))
def test_thresholds_learn_to_meet_the_budget(seed):
    pixels = make_images(16, seed=seed)
    model = make_model(CroprViTModel, asvit_config(reducer_config={"budget": 0.75}), seed)
    settle(model, pixels, shares=(0.95, 0.95, 0.95)).train()
    optimizer = torch.optim.Adam([reducer.threshold.value for reducer in reducers_of(model)])
    losses = []
    for step in range(100):
        optimizer.param_groups[0]["lr"] = 1e-4 * (1 - step / 100)
        loss = model(pixels).method_losses[BUDGET_LOSS]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.05 * losses[0]


def test_thresholds_have_no_weight_decay_and_the_rate_of_the_head():
    model = CroprViTForImageClassification(asvit_config())
    groups = layer_decay_groups(model, 2e-5, 1e-6, 1.0)
    settings = {parameter: (group["lr"], group["weight_decay"]) for group in groups for parameter in group["params"]}
    assert {settings[reducer.threshold.value] for reducer in reducers_of(model)} == {(2e-5, 0.0)}
    assert settings[model.cropr_vit.layers[0].mlp.fc1.weight] == (2e-5, 1e-6)


def test_thresholds_are_saved_and_an_unpruned_checkpoint_gets_new_ones(tmp_path):
    model = set_thresholds(make_model(CroprViTForImageClassification, asvit_config()), [0.004, 0.005, 0.006])
    model.save_pretrained(tmp_path / "trained")
    load = CroprViTForImageClassification.from_pretrained
    for reducer, value in zip(reducers_of(load(tmp_path / "trained")), (0.004, 0.005, 0.006)):
        assert reducer.threshold.value.item() == pytest.approx(value)
    plain = make_model(CroprViTForImageClassification, asvit_config(token_reducer=None, reducer_config={}))
    plain.save_pretrained(tmp_path / "plain")
    settings = {"thresholds": [0.01, 0.02, 0.03], "budget": 0.9}
    for given, values in ((settings, (0.01, 0.02, 0.03)), ({"budget": 0.9}, (0.001, 0.002, 0.003))):
        started = load(tmp_path / "plain", token_reducer="asvit", last_layer_fusion=None, reducer_config=given)
        for reducer, value in zip(reducers_of(started), values):
            assert reducer.threshold.value.item() == pytest.approx(value)


@torch.no_grad()
def test_padding_goes_first():
    mask = torch.ones(2, 32, 32)
    mask[1, 16:] = 0
    for eval_mode in ("adaptive", "batch_mean"):
        model = make_model(CroprViTModel, asvit_config(eval_mode, prune_padding_first=True))
        set_thresholds(model, [-1.0] * 3)
        counts = model(make_images(), pixel_mask=mask, output_pruning=True).patches_per_block
        means = [[12, 10, 9]] * 2  # of 16 and 8, of 12 and 8, of 10 and 8
        assert counts[:, 2:].tolist() == ([[16] * 3, [8] * 3] if eval_mode == "adaptive" else means)
    blocks = model.train()(make_images(), pixel_mask=mask, output_pruning=True).pruned_after_block
    assert (blocks[1].view(4, 4)[2:] == 2).all() and (blocks[1].view(4, 4)[:2] == 5).all()


def test_feature_maps_are_of_every_patch():
    for training in (False, True):
        model = build(CroprViTBackbone, out_features=["stage2", "stage5"]).train(training)
        outputs = model(make_images().double())
        assert [each.shape for each in outputs.feature_maps] == [(2, 32, 4, 4)] * 2


# Graphs, kernels, types


@pytest.mark.full
@pytest.mark.parametrize("eval_mode", ["adaptive", "batch_mean"])
@torch.no_grad()
def test_graphs_mask(eval_mode, tmp_path):
    torch.compiler.reset()
    pixels = make_images(3)
    model = build(CroprViTForImageClassification, eval_mode, pixels.double()).float()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close_relative(compiled(pixels).logits, model(pixels).logits)
    for name in ("model.pt2", "model.onnx"):
        assert export_model(model, tmp_path / name) < 1e-4


@pytest.mark.full
def test_a_compiled_training_step_has_no_break():
    torch.compiler.reset()
    model = build(CroprViTForImageClassification).train()
    inputs = {"pixel_values": make_images().double(), "labels": torch.tensor([0, 1])}
    torch.compile(model, fullgraph=True, backend="eager")(**inputs).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_half_precision_reads_in_float32():
    model, read = build(CroprViTForImageClassification).bfloat16(), []
    reducer = reducers_of(model)[0]
    record_scores(reducer, read.append)
    logits = model(make_images(4).bfloat16()).logits
    assert read[0].dtype == torch.float32 and logits.dtype == torch.bfloat16 and logits.isfinite().all()


def test_kernels_without_a_bias_of_keys():
    for eval_mode in ("adaptive", "batch_mean"):
        with pytest.raises(ValueError, match="adds a bias to attention logits"):
            make_model(CroprViTModel, asvit_config(eval_mode)).set_attn_implementation("flash_attention_2")
    assert not ASViTReducer.uses_key_bias(asvit_config("topk"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_cls_token": False, "pooling": "mean"}, "'asvit' needs a CLS token, but `use_cls_token` is False"),
        ({"reducer_config": {"budget": 0.0}}, r"`budget` is 0.0; it must be in \(0, 1\], such as 0.65"),
        ({"reducer_config": {"budget": 1.5}}, "`budget` is 1.5"),
        ({"reducer_config": {"budget": 0.3}}, r"`budget` of AS-ViT is 0.3, but 0.\d+ of the multiply-adds are left"),
        ({"pruning_rate": 2}, "has a `budget`, and the configuration a `pruning_rate` as well"),
        ({"reducer_config": {"temperature": 0.0}}, "`temperature` is 0.0"),
        ({"reducer_config": {"budget_loss_weight": -1.0}}, "`budget_loss_weight` is -1.0"),
        ({"reducer_config": {"eval_mode": "best"}}, "`eval_mode` is 'best'; choose one of adaptive, batch_mean, topk"),
        ({"reducer_config": {"thresholds": [0.1]}}, r"has 1 numbers, but it acts after the blocks \[2, 3, 4\]"),
        ({"reducer_config": {"thresholds": [0.1, 0.2, float("nan")]}}, "must be a finite number"),
        ({"reducer_config": {"thresholds": 0.1}}, "`reducer_config` of the token reducer 'asvit'"),
        ({"reducer_config": {"blocks": [3, 2]}}, r"`blocks` is \[3, 2\]"),
        ({"reducer_config": {"blocks": [2, 5]}}, r"of AS-ViT has \[5\]; with 5 blocks they must be in 1 to 4"),
        ({"reducer_config": {"threshold": [0.1]}}, "did you mean 'thresholds'"),
    ],
)
def test_what_it_cannot_do(fields, message):
    with pytest.raises(ValueError, match=message):
        CroprViTModel(asvit_config(**fields))
