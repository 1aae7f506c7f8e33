"""DynamicViT against what its paper says: counts and multiply-adds, masked attention and its gradient by the formula,
training with a forced mask against inference with the same patches."""

import itertools

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cropr_hf import CroprViTBackbone, CroprViTConfig, CroprViTForImageClassification, CroprViTModel, TokenState
from cropr_hf.methods import dynamicvit
from cropr_hf.methods.dynamicvit import DynamicViTReducer, draw_decisions
from cropr_hf.speed.cost import multiply_adds
from cropr_hf.training import CroprTrainer, Distillation, curriculum_schedule, layer_decay_groups
from tests.common import (
    assert_close_relative,
    full,
    make_images,
    make_model,
    tiny_config,
)
from tests.test_training import ColouredSquares, training_arguments


EPS = 1e-6
KEPT = (11, 7, 5)  # of 16 patches after the blocks 1, 2 and 3


def dynamic_config(**overrides):
    return tiny_config("plain", **{"token_reducer": "dynamicvit", "pruning_rate": None, "pooling": "cls", **overrides})


def make_state(config, batch_size=2, dtype=torch.float64):
    torch.manual_seed(0)
    length = config.num_prefix_tokens + config.num_patches
    return TokenState(
        torch.randn(batch_size, length, config.hidden_size, dtype=dtype),
        token_indices=torch.arange(length)[None],
        num_prefix_tokens=config.num_prefix_tokens,
        grid_size=config.grid_size,
    )


def draws(counts, batch_size=2, num_patches=16, seed=0):
    """Decisions of each block, after which `counts` patches of every image are left; what is gone may be drawn."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.rand(batch_size, num_patches, generator=generator).argsort(dim=1).argsort(dim=1)
    kept = [ranks < count for count in counts]
    again = torch.rand(batch_size, num_patches, generator=generator) < 0.5
    return [kept[0], *(now | (~before & again) for before, now in itertools.pairwise(kept))], len(counts) - sum(kept)


def force(monkeypatch, decisions):
    """Makes every forward pass in training draw these; their gradients are those of the draws."""
    queue = list(decisions)

    def forced(log_probabilities):
        queue.append(queue.pop(0))
        soft = log_probabilities.softmax(dim=-1)[..., 0]
        return queue[-1].to(soft) + (soft - soft.detach())

    monkeypatch.setattr(dynamicvit, "draw_decisions", forced)


def test_token_counts_are_the_published_ones():
    config = CroprViTConfig.from_size("small", token_reducer="dynamicvit")
    assert config.kept_patches() == [196] * 2 + [137] * 3 + [96] * 3 + [67] * 4
    assert config.pruning_blocks == [3, 6, 9]
    for num_blocks, blocks in ((16, [4, 8, 12]), (20, [5, 10, 15]), (24, [6, 12, 18])):
        deeper = CroprViTConfig.from_size("small", token_reducer="dynamicvit", num_hidden_layers=num_blocks)
        assert deeper.pruning_blocks == blocks
    # 0.7 ** 2 * 100 is 48.99999999999999, and no image is left without a patch.
    assert config.kept_patches(100)[5] == 49 and config.kept_patches(2)[-1] == 1
    other = CroprViTConfig.from_size(
        "small", token_reducer="dynamicvit", reducer_config={"blocks": [4], "keep_rate": 0.5}
    )
    assert other.kept_patches() == [196] * 3 + [98] * 9


@pytest.mark.parametrize(
    ("size", "keep_rate", "giga"),
    [("small", 0.7, 2.9), *full(("base", 0.7, 11.4), ("tiny", 0.7, None), ("small", 0.5, None))],
)
def test_multiply_adds(size, keep_rate, giga):
    """Those of three predictors on 196, 137 and 96 tokens included, and of a classifier of 1000 classes."""
    settings = {"keep_rate": keep_rate}
    config = CroprViTConfig.from_size(size, token_reducer="dynamicvit", reducer_config=settings)
    plain = CroprViTConfig.from_size(size, token_reducer="random", pruning_schedule=config.kept_patches())
    plain.last_layer_fusion = False
    width = config.hidden_size
    entering = (196, *(int(196 * keep_rate**power) for power in (1, 2)))
    own = sum(entering) * (width**2 + width**2 // 2 + width**2 // 8 + width // 2)
    assert multiply_adds(config) - multiply_adds(plain) == own
    if giga is not None:
        assert (multiply_adds(config) + 1000 * width) / 1e9 == pytest.approx(giga, abs=0.1)


def test_the_predictor_is_a_loop_over_tokens():
    predictor = make_model(CroprViTModel, dynamic_config()).token_reducers["2"].predictor.double()
    patches = torch.randn(2, 16, 32, dtype=torch.float64)
    gelu = torch.nn.functional.gelu
    for policy in (None, torch.arange(32).view(2, 16).remainder(3).eq(0).double()):
        found = predictor(patches, policy)
        for image in range(2):
            features = [gelu(predictor.input_projection(predictor.norm(token))) for token in patches[image]]
            left = [token[16:] for index, token in enumerate(features) if policy is None or policy[image, index]]
            mean = sum(left) / len(left)
            for index, token in enumerate(features):
                hidden = gelu(predictor.fc1(torch.cat([token[:16], mean])))
                expected = predictor.fc3(gelu(predictor.fc2(hidden))).log_softmax(dim=0)
                torch.testing.assert_close(found[image, index], expected)


def test_decisions_are_drawn_with_their_probabilities_and_have_the_gradient_of_the_softmax():
    torch.manual_seed(0)
    log_probabilities = torch.tensor([0.2, 0.8]).log().expand(4, 5000, 2).clone().requires_grad_()
    torch.manual_seed(1)
    decisions = draw_decisions(log_probabilities)
    assert set(decisions.unique().tolist()) == {0.0, 1.0}  # exactly
    assert decisions.mean().item() == pytest.approx(0.2, abs=5 * (0.2 * 0.8 / 20000) ** 0.5)
    weights = torch.randn(4, 5000)
    (decisions * weights).sum().backward()
    torch.manual_seed(1)
    other = log_probabilities.detach().requires_grad_()
    expected = torch.nn.functional.gumbel_softmax(other, tau=1.0, hard=True)[..., 0]
    (expected * weights).sum().backward()
    torch.testing.assert_close(decisions, expected)
    torch.testing.assert_close(log_probabilities.grad, other.grad)


def softmax_of_the_paper(logits, policy):
    """Equation 10 with the terms of the authors' code; (B, H, T, T) and (B, T)."""
    length = policy.shape[1]
    graph = policy[:, None, None] * (1 - torch.eye(length)) + torch.eye(length)
    powers = (logits - logits.amax(dim=-1, keepdim=True)).exp() * graph
    return (powers + EPS / length) / (powers.sum(dim=-1, keepdim=True) + EPS)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_and_its_gradient_are_those_of_the_paper(implementation):
    """In the rows of tokens that are left. There the paper's self-loop takes one term from the gradient: what the own
    decision of a token does to its attention to itself; the other rows have the rest of it."""
    config = dynamic_config()
    model = make_model(CroprViTModel, config).double()
    model.set_attn_implementation(implementation)
    attention = model.layers[1].attention
    torch.manual_seed(0)
    states, weights = torch.randn(2, 17, 32, dtype=torch.float64), torch.randn(2, 17, 32, dtype=torch.float64)
    policy = (torch.rand(2, 17) < 0.6).double()
    policy[:, 0] = 1
    mine, theirs = policy.clone().requires_grad_(), policy.clone().requires_grad_()
    output = attention(states, key_bias=(mine + EPS).log())[0]
    query, key, value = (
        layer(states).unflatten(-1, (4, 8)).transpose(1, 2)
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    shares = softmax_of_the_paper(query @ key.transpose(-2, -1) * attention.scaling, theirs)
    expected = attention.o_proj((shares @ value).transpose(1, 2).flatten(2))
    is_left = policy[..., None]
    assert_close_relative(output * is_left, expected * is_left, 1e-4)

    parts, rows = (output * weights * is_left).sum(dim=-1), (expected * weights * is_left).sum(dim=-1)  # (B, T)
    (gradient,) = torch.autograd.grad(rows.sum(), theirs)
    assert gradient[policy == 0].abs().min() > 1e-3 * gradient.abs().max()  # also of dropped tokens
    for token in range(1, 17):
        others = parts.sum() - parts[:, token].sum()
        (found,) = torch.autograd.grad(others, mine, retain_graph=True)
        assert_close_relative(found[:, token], gradient[:, token], 1e-3)
    (found,) = torch.autograd.grad(parts.sum(), mine)
    assert_close_relative(found[policy == 0], gradient[policy == 0], 1e-3)


VARIANTS = {
    "cls": {},
    "no_cls": {"use_cls_token": False, "pooling": "patch_mean"},
    "mean": {"pooling": "mean", "norm_before_pooling": True},
    "attention": {"pooling": "attention", "pooling_num_heads": 2},
    "rope_registers": {"rope_theta": 100.0, "num_register_tokens": 2, "pooling": "patch_mean"},
    "fusion": {"last_layer_fusion": True},
    "fusion_mean": {"last_layer_fusion": True, "pooling": "patch_mean"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_training_with_a_forced_mask_is_inference_with_the_same_patches(variant, monkeypatch):
    model = make_model(CroprViTModel, dynamic_config(**VARIANTS[variant])).double()
    images, prefix = make_images(2).double(), model.config.num_prefix_tokens
    assert [model.config.kept_patches()[block - 1] for block in (1, 2, 3)] == [*KEPT]
    decisions, gone = draws(KEPT)
    force(monkeypatch, decisions)

    def scores(reducer, state):  # what is dropped first has the lowest
        priority = torch.nn.functional.pad(-gone.double(), (prefix, 0))
        return priority.gather(1, state.token_indices.expand(2, -1))

    monkeypatch.setattr(DynamicViTReducer, "scores", scores)
    arguments = {"output_pruning": True, "output_stages": range(6)}
    trained, expected = model.train()(images, **arguments), model.eval()(images, **arguments)
    assert_close_relative(trained.pooler_output, expected.pooler_output, 1e-4)
    assert torch.equal(trained.pruned_after_block, expected.pruned_after_block)
    assert set(trained.pruned_after_block.unique().tolist()) == {1, 2, 3, 5}
    for stage, (one, other) in enumerate(zip(trained.stage_states, expected.stage_states)):
        assert_close_relative(one, other, 1e-4, lambda text, stage=stage: f"{stage}: {text}")
    for image in range(2):
        is_left = trained.token_indices.expand(2, -1)[image] < prefix + 16
        assert torch.equal(
            trained.token_indices.expand(2, -1)[image][is_left], expected.token_indices.expand(2, -1)[image]
        )
        assert_close_relative(trained.last_hidden_state[image][is_left], expected.last_hidden_state[image], 1e-4)


def test_a_policy_of_ones_is_the_plain_model(monkeypatch):
    plain = make_model(CroprViTForImageClassification, dynamic_config(token_reducer=None))
    model = make_model(CroprViTForImageClassification, dynamic_config())
    model.load_state_dict(plain.state_dict(), strict=False)
    force(monkeypatch, [torch.ones(2, 16)])
    expected = plain(make_images()).logits
    assert_close_relative(model.train()(make_images()).logits, expected, 1e-5)
    whole = {"keep_rate": 1.0}
    model = make_model(CroprViTForImageClassification, dynamic_config(reducer_config=whole)).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(model(make_images()).logits, expected)


def test_where_the_schedule_keeps_all_training_does_too_and_predictors_learn_to():
    """As at the beginning of a curriculum."""
    model = make_model(CroprViTForImageClassification, dynamic_config()).train()
    model.set_pruning(curriculum_schedule(model.config, 0.0))
    outputs = model(make_images(), labels=torch.tensor([0, 1]), output_pruning=True)
    assert outputs.pruned_after_block.eq(5).all()
    assert_close_relative(outputs.logits, model.eval()(make_images()).logits)
    outputs.loss.backward()
    assert 0 < outputs.method_losses["ratio_loss"] < 2
    assert all(parameter.grad.any() for parameter in model.cropr_vit.token_reducers["1"].parameters())


@torch.no_grad()
def test_decisions_are_nested_and_the_map_shows_them():
    model = make_model(CroprViTModel, dynamic_config(num_register_tokens=1)).train()
    policies, own = [], DynamicViTReducer.after_block

    def spy(reducer, state, num_keep):
        state = own(reducer, state, num_keep)
        policies.append(state.columns["policy"])
        return state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DynamicViTReducer, "after_block", spy)
        outputs = model(make_images(4), output_pruning=True)
    assert len(policies) == 3 and all((policy[:, :2] == 1).all() for policy in policies)
    assert all((later <= earlier).all() for earlier, later in itertools.pairwise(policies))
    assert all(set(policy.unique().tolist()) == {0.0, 1.0} for policy in policies)
    blocks = outputs.pruned_after_block
    for block, policy in enumerate(policies, start=1):
        assert torch.equal(blocks > block, policy[:, 2:] == 1)
    assert outputs.last_hidden_state.shape == (4, 18, 32)
    assert torch.equal(outputs.token_indices == 18, policies[-1] == 0)


def test_the_ratio_loss_is_that_of_the_paper(monkeypatch):
    config = dynamic_config(reducer_config={"ratio_loss_weight": 3.0})
    model = make_model(CroprViTForImageClassification, config).train()
    inputs = {"pixel_values": make_images(), "labels": torch.tensor([0, 1])}
    decisions, _ = draws(KEPT)
    force(monkeypatch, decisions)
    assert model(**inputs).method_losses["ratio_loss"] == 0
    decisions, _ = draws((9, 7, 1))
    force(monkeypatch, decisions)
    outputs = model(**inputs)
    expected = 3 / 3 * sum(((left - kept) / 16) ** 2 for left, kept in zip((9, 7, 1), KEPT))
    assert outputs.method_losses["ratio_loss"].item() == pytest.approx(expected)
    torch.testing.assert_close(outputs.loss, outputs.main_loss + expected)
    assert model.eval()(**inputs).method_losses is None


def test_the_ratio_loss_reaches_predictors_and_tokens():
    config = dynamic_config()
    reducer = make_model(CroprViTModel, config).token_reducers["2"].double().train()
    state = make_state(config)
    state.hidden_states.requires_grad_()
    masked = reducer.after_block(state, 1)
    assert state.losses == {} and state.columns == {}  # hooks change no state
    masked.losses["ratio_loss"].backward()
    assert all(parameter.grad.any() for parameter in reducer.parameters())
    assert state.hidden_states.grad[:, 1:].abs().amin(dim=(1, 2)).min() > 0
    assert not state.hidden_states.grad[:, 0].any()


@pytest.mark.parametrize("variant", ["cls", "attention", "fusion_mean"])
def test_the_task_reaches_every_predictor(variant):
    """Also without the ratio loss: through attention, means, and what comes back."""
    settings = {"ratio_loss_weight": 0.0}
    model = make_model(CroprViTForImageClassification, dynamic_config(reducer_config=settings, **VARIANTS[variant]))
    torch.manual_seed(0)
    model.train()(make_images(), labels=torch.tensor([0, 1])).loss.backward()
    for reducer in model.cropr_vit.token_reducers.values():
        assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in reducer.parameters())


@torch.no_grad()
def test_a_dropped_token_changes_no_other(monkeypatch):
    model = make_model(CroprViTModel, dynamic_config()).double().train()
    (first, *_), _ = draws((8,))
    force(monkeypatch, [first])
    state = model.token_reducers["1"].after_block(make_state(model.config), 8)
    is_dropped = state.columns["policy"] == 0
    noise = 10 * torch.randn(state.hidden_states.shape, dtype=torch.float64)
    other = state.updated(hidden_states=state.hidden_states + noise * is_dropped[..., None])
    for block in (2, 3):
        state, other = (model.run_block(block, each, None) for each in (state, other))
    difference = (other.hidden_states - state.hidden_states).abs().amax(dim=-1)
    assert difference[is_dropped].min() > 0.1
    assert difference[~is_dropped].max() < 1e-4 * state.hidden_states.abs().max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_image_that_keeps_nothing_is_no_error(variant, monkeypatch):
    model = make_model(CroprViTForImageClassification, dynamic_config(**VARIANTS[variant])).train()
    force(monkeypatch, [torch.stack([torch.zeros(16), torch.ones(16)])])
    outputs = model(make_images(), labels=torch.tensor([0, 1]), output_pruning=True)
    outputs.loss.backward()
    assert (outputs.pruned_after_block[0] == 1).all()
    assert outputs.loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@torch.no_grad()
def test_inference_keeps_the_best_in_raster_order():
    model = make_model(CroprViTModel, dynamic_config(num_register_tokens=1)).double()
    state, reducer = make_state(model.config), model.token_reducers["1"]
    reduced = reducer.after_block(state, 6)
    best = reducer.predictor(state.hidden_states[:, 2:])[..., 0]
    for image in range(2):
        ranked = sorted(range(16), key=lambda place: -best[image, place])[:6]
        assert reduced.token_indices[image].tolist() == [0, 1, *(2 + place for place in sorted(ranked))]
    assert reduced.columns == {} and reduced.losses == {}


@torch.no_grad()
def test_padding_is_dropped_first_in_training_too():
    model = make_model(CroprViTModel, dynamic_config(prune_padding_first=True)).train()
    mask = torch.ones(2, 32, 32)
    mask[0, :, 16:] = 0
    blocks = model(make_images(), mask, output_pruning=True).pruned_after_block
    assert (blocks[0].view(4, 4)[:, 2:] == 1).all()


def test_tokens_are_distilled_where_they_stay(tmp_path):
    fields = {"norm_before_pooling": True, "num_labels": 4}
    model = make_model(CroprViTForImageClassification, dynamic_config(**fields)).train()
    teacher = make_model(CroprViTForImageClassification, dynamic_config(token_reducer=None, **fields), seed=1)
    arguments = training_arguments(tmp_path)
    trainer = CroprTrainer(
        model, arguments, ColouredSquares(), teacher=teacher, distillation=Distillation(logits=0.5, tokens=0.5)
    )
    inputs = {"pixel_values": make_images(), "labels": torch.tensor([0, 1])}
    torch.manual_seed(3)
    loss = trainer.compute_loss(model, inputs)
    torch.manual_seed(3)
    outputs = model(**inputs, output_pruning=True)
    torch.manual_seed(3)
    own = model.cropr_vit(inputs["pixel_values"]).last_hidden_state[:, 1:]
    with torch.no_grad():
        other = teacher.cropr_vit(inputs["pixel_values"]).last_hidden_state[:, 1:]
        logits = teacher(inputs["pixel_values"]).logits.log_softmax(dim=-1)
    stays = outputs.pruned_after_block == 5
    assert 0 < stays.sum() < 32
    tokens = (own[stays] - other[stays]).square().mean()
    divergence = (logits.exp() * (logits - outputs.logits.log_softmax(dim=-1))).sum(dim=-1).mean()
    torch.testing.assert_close(loss, outputs.loss + 0.5 * tokens + 0.5 * divergence)


def test_predictors_learn_at_the_rate_of_the_head():
    model = CroprViTForImageClassification(dynamic_config())
    groups = layer_decay_groups(model, 1e-3, 0.05, 1.0, backbone_learning_rate=1e-5)
    rates = {parameter: group["lr"] for group in groups for parameter in group["params"]}
    assert {rates[parameter] for parameter in model.cropr_vit.token_reducers.parameters()} == {1e-3}
    assert {rates[parameter] for parameter in model.cropr_vit.layers.parameters()} == {1e-5}


def test_an_unpruned_checkpoint_gets_new_predictors(tmp_path):
    plain = make_model(CroprViTForImageClassification, dynamic_config(token_reducer=None))
    plain.save_pretrained(tmp_path / "plain")
    load = CroprViTForImageClassification.from_pretrained
    model = load(tmp_path / "plain", token_reducer="dynamicvit", last_layer_fusion=None)
    assert torch.equal(model.classifier.weight, plain.classifier.weight) and not model.config.last_layer_fusion
    predictor = model.cropr_vit.token_reducers["1"].predictor
    assert predictor.fc1.weight.std().item() == pytest.approx(model.config.initializer_range, rel=0.2)
    assert not predictor.fc1.bias.any() and (predictor.norm.weight == 1).all()
    # A trained one is loaded as it is, and with other blocks it lacks weights.
    model.save_pretrained(tmp_path / "dynamic")
    again = load(tmp_path / "dynamic")
    assert all(torch.equal(*pair) for pair in zip(model.state_dict().values(), again.state_dict().values()))
    with pytest.raises(ValueError, match=r"lacks 10 weights of the model, such as cropr_vit\.token_reducers\.4"):
        load(tmp_path / "dynamic", reducer_config={"blocks": [1, 4]})


def test_feature_maps_in_training_are_of_every_patch():
    model = make_model(CroprViTBackbone, dynamic_config(out_features=["stage2", "stage5"])).train()
    outputs = model(make_images())
    assert [each.shape for each in outputs.feature_maps] == [(2, 32, 4, 4)] * 2
    assert list(outputs.method_losses) == ["ratio_loss"]


@pytest.mark.full
def test_a_compiled_training_step_has_no_break():
    torch._dynamo.reset()
    model = make_model(CroprViTForImageClassification, dynamic_config()).train()
    inputs = {"pixel_values": make_images(), "labels": torch.tensor([0, 1])}
    torch.compile(model, fullgraph=True, backend="eager")(**inputs).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.full
def test_training_learns_what_matters_and_how_much_to_keep():
    """The class is the colour of one bright patch; predictors find it, and keep about as many as they should."""
    settings = {"keep_rate": 0.25, "blocks": [2]}
    config = dynamic_config(reducer_config=settings, num_labels=2, initializer_range=0.05, num_hidden_layers=4)
    torch.manual_seed(0)
    model = CroprViTForImageClassification(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(200):
        images, labels, places = bright_patches(32)
        outputs = model(images, labels=labels)
        optimizer.zero_grad()
        outputs.loss.backward()
        optimizer.step()
    with torch.no_grad():
        images, labels, places = bright_patches(64)
        trained = model(images, output_pruning=True).pruned_after_block
        outputs = model.eval()(images, output_pruning=True)
    assert (trained == 4).float().mean().item() == pytest.approx(0.25, abs=0.1)
    assert (outputs.pruned_after_block.gather(1, places[:, None]) == 4).float().mean() > 0.9
    assert (outputs.logits.argmax(dim=1) == labels).float().mean() > 0.9


def bright_patches(count):
    images, labels, places = (
        0.1 * torch.randn(count, 3, 32, 32),
        torch.randint(2, (count,)),
        torch.randint(16, (count,)),
    )
    patches = torch.zeros(count, 3, 16)
    patches[torch.arange(count), 2 * labels, places] = 2.0
    grown = patches.view(count, 3, 4, 4).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    return images + grown, labels, places


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reducer_config": {"keep_rate": 0.0}}, "`keep_rate` is 0.0"),
        ({"reducer_config": {"keep_rate": 1.5}}, "`keep_rate` is 1.5"),
        ({"reducer_config": {"keep_rate": 0.5}, "pruning_rate": 2}, "has a `keep_rate`, and the configuration"),
        ({"reducer_config": {"ratio_loss_weight": -1.0}}, "`ratio_loss_weight` is -1.0"),
        ({"reducer_config": {"blocks": [3, 2]}}, r"`blocks` is \[3, 2\]"),
        ({"reducer_config": {"blocks": [2, 5]}}, r"of DynamicViT has \[5\]; with 5 blocks they must be in 1 to 4"),
        (
            {"reducer_config": {"blocks": [4]}, "last_layer_fusion": True},
            "and last layer fusion they must be in 1 to 3",
        ),
        ({"reducer_config": {"keeprate": 0.5}}, "did you mean 'keep_rate'"),
        ({"num_hidden_layers": 1}, "leave no block to prune after"),
        ({"use_auxiliary_heads": True}, "does not support auxiliary heads"),
        ({"window_size": 2, "window_block_indices": [0], "use_cls_token": False, "pooling": "mean"}, "windowed"),
    ],
)
def test_what_it_cannot_do(fields, message):
    with pytest.raises(ValueError, match=message):
        CroprViTModel(dynamic_config(**fields))


def test_a_kernel_without_a_bias_for_keys_is_refused_in_training_alone(monkeypatch):
    model, images = make_model(CroprViTModel, dynamic_config()).eval(), make_images()
    expected = model(images).last_hidden_state
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_stand_in", ALL_ATTENTION_FUNCTIONS["sdpa"])
    model.config._attn_implementation = "flash_stand_in"
    assert torch.equal(model(images).last_hidden_state, expected)
    with pytest.raises(ValueError, match="'dynamicvit' adds a bias to attention logits, which 'flash_stand_in' does"):
        model.train()(images)
