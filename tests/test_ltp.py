"""LTP against its paper: scores and the hard rule in a loop over whole matrices of attention, the loss of the masks by
finite differences, packed and masked inference, and both stages of the training."""

import pytest
import torch

from cropr_hf import (
    CroprViTBackbone,
    CroprViTForImageClassification,
    CroprViTForSemanticSegmentation,
    CroprViTModel,
    TokenState,
)
from cropr_hf.methods import ltp
from cropr_hf.methods.ltp import LOG_MASK, MASK_LOSS, LTPReducer, received_attention
from cropr_hf.speed.cost import multiply_adds, unpruned_config
from cropr_hf.token_reduction import AttentionFacts
from cropr_hf.token_state import KEY_BIAS
from cropr_hf.training import layer_decay_groups
from tests.common import (
    assert_close_relative,
    enable_activation_checkpointing,
    full,
    make_images,
    make_model,
    tiny_config,
)
from tests.test_teacher_example import command, logged


VARIANTS = [
    (CroprViTForImageClassification, {"pooling": "mean"}),
    (CroprViTForSemanticSegmentation, {"rope_theta": 100.0, "num_register_tokens": 1, "last_layer_fusion": True}),
    *full(
        (CroprViTForImageClassification, {"pooling": "attention", "use_cls_token": False}),
        (CroprViTForImageClassification, {"pooling": "cls_patch_mean", "norm_before_pooling": True}),
        (CroprViTBackbone, {"out_indices": [1, 3, 5]}),
    ),
]


def ltp_config(**overrides):
    return tiny_config("plain", **{"token_reducer": "ltp", "pruning_rate": None, **overrides})


def build(model_class=CroprViTModel, thresholds=0.6, **fields):
    """In float64, with one threshold in all blocks, or one for each; `None` leaves them as they are."""
    model = make_model(model_class, ltp_config(**fields)).double()
    if thresholds is not None:
        set_thresholds(model, thresholds)
    return model


def set_thresholds(model, values):
    parameters = thresholds_of(model)
    with torch.no_grad():
        for parameter, value in zip(parameters, values if isinstance(values, list) else [values] * len(parameters)):
            parameter.fill_(value)


def thresholds_of(model):
    return [reducer.threshold.value for reducer in model.base_model.token_reducers.values()]


def result(model, pixels):
    """What matters of an output, of whatever task, (B, n)."""
    outputs = model(pixels)
    found = getattr(outputs, "feature_maps", None) or [outputs["logits" if "logits" in outputs else "pooler_output"]]
    return torch.cat([each.flatten(1) for each in found], dim=1)


def images(batch_size=4):
    return make_images(batch_size).double()


def watch(model, hook):
    """The states that come to a hook of each module in the next calls."""
    seen = []
    for reducer in model.base_model.token_reducers.values():
        own = getattr(reducer, hook)
        setattr(reducer, hook, lambda state, *args, own=own: seen.append((state, *args)) or own(state, *args))
    return seen


def make_state(batch_size=2, length=17, prefix=1):
    queries, keys = torch.randn(2, batch_size, 4, length, 8, dtype=torch.float64)
    states = torch.randn(batch_size, length, 32, dtype=torch.float64)
    state = TokenState(states, torch.arange(length)[None], num_prefix_tokens=prefix, grid_size=(4, 4))
    return state, AttentionFacts(queries, keys, keys, 8**-0.5, None, keys.transpose(1, 2))


# Scores


def test_scores_are_a_mean_over_heads_and_queries():
    """Acceptance (1): the scores of the paper sum up to 1, and to the share of queries where some do not count."""
    _, facts = make_state()
    weights = (facts.queries @ facts.keys.mT * facts.scaling).softmax(dim=-1)
    rows = torch.ones(2, 17, dtype=torch.float64)
    torch.testing.assert_close(received_attention(facts, rows) / 17, weights.mean(dim=(1, 2)))
    torch.testing.assert_close((received_attention(facts, rows) / 17).sum(dim=1), rows[:, 0])
    rows[1, 5:] = 0.0
    received = received_attention(facts, rows) / 17
    torch.testing.assert_close(received[1], weights[1, :, :5].sum(dim=1).mean(dim=0) / 17)
    torch.testing.assert_close(received.sum(dim=1), rows.mean(dim=1))


@torch.no_grad()
def test_scores_are_those_of_eager_attention():
    model = build(thresholds=-1.0, rope_theta=100.0, num_register_tokens=2)
    model.set_attn_implementation("eager")
    seen = watch(model, "after_attention")
    attentions = model(images(), output_attentions=True).attentions
    assert len(seen) == 5
    for (state, _, facts), weights in zip(seen, attentions):
        received = received_attention(facts, torch.ones_like(state.hidden_states[..., 0]))
        # Eager attention computes its softmax in float32.
        torch.testing.assert_close(received / 19, weights.mean(dim=(1, 2)), rtol=1e-5, atol=1e-6)


# The hard rule


@torch.no_grad()
def naive(model, image):
    """One image (1, 3, H, W) with thresholds of the paper: the pooled tokens, and the patches of each block."""
    tokens, prefix, counts = model.embeddings(image)[0], model.config.num_prefix_tokens, []
    total = tokens.shape[1]
    for layer, parameter in zip(model.layers, thresholds_of(model)):
        counts.append(tokens.shape[1] - prefix)
        normed, attention = layer.layernorm_before(tokens)[0], layer.attention
        found, scores = [], torch.zeros(len(normed), dtype=torch.float64)
        query, key, value = (part(normed) for part in (attention.q_proj, attention.k_proj, attention.v_proj))
        for head in range(4):
            channels = slice(8 * head, 8 * head + 8)
            weights = (query[:, channels] @ key[:, channels].T / 8**0.5).softmax(dim=-1)
            found.append(weights @ value[:, channels])
            scores += weights.sum(dim=0) / (4 * total)
        tokens = tokens + attention.o_proj(torch.cat(found, dim=1))[None]
        least = parameter.item() / total
        best = prefix + scores[prefix:].argmax().item()
        stays = [token for token, score in enumerate(scores) if token < prefix or token == best or score >= least]
        tokens = tokens[:, stays]
        tokens = tokens + layer.mlp(layer.layernorm_after(tokens))
    return model.layernorm(tokens.mean(dim=1)), counts


@pytest.mark.parametrize("thresholds", [0.4, 0.8, [0.0, 0.2, 0.5, 0.9, 1.5], 100.0])
@pytest.mark.parametrize("use_cls_token", [True, *full(False)])
@torch.no_grad()
def test_the_hard_rule_against_a_loop(thresholds, use_cls_token):
    model = build(thresholds=thresholds, use_cls_token=use_cls_token)
    outputs = model(images(), output_pruning=True)
    for index, image in enumerate(images()):
        pooled, counts = naive(model, image[None])
        torch.testing.assert_close(outputs.pooler_output[index], pooled[0], rtol=0, atol=1e-10)
        assert outputs.patches_per_block[index].tolist() == counts


def set_packing(model, packs):
    for reducer in model.base_model.token_reducers.values():
        reducer.packs = packs


@pytest.mark.parametrize(("model_class", "fields"), VARIANTS)
@torch.no_grad()
def test_packed_masked_and_single_images_agree(model_class, fields):
    """Acceptance (2) and (6)."""
    model, pixels = build(model_class, **fields), images()
    counts = model.base_model(pixels, output_pruning=True).patches_per_block
    assert (counts.amax(dim=0) > counts.amin(dim=0)).any()  # images differ
    packed, single = result(model, pixels), torch.cat([result(model, image[None]) for image in pixels])
    assert_close_relative(packed, single, 1e-12)
    set_packing(model, False)
    masked = model.base_model(pixels, output_pruning=True)
    assert torch.equal(masked.patches_per_block, counts)
    assert masked.last_hidden_state.shape[1] == 16 + model.config.num_prefix_tokens
    assert_close_relative(result(model, pixels), single, 1e-12)


@torch.no_grad()
def test_the_length_that_is_left_would_be_the_wrong_divisor(monkeypatch):
    """Acceptance (2), the other way round: packed and masked inference would not agree."""
    model, found = build(thresholds=0.7), []
    monkeypatch.setattr(ltp, "received_attention", lambda facts, rows: received_attention(facts, rows) / rows.shape[1])
    set_thresholds(model, 0.7 / 17)
    for packs in (False, True):
        set_packing(model, packs)
        found.append(torch.cat([result(model, image[None]) for image in images()]))
    monkeypatch.undo()
    set_thresholds(model, 0.7)
    assert_close_relative(found[0], result(model, images()), 1e-6)
    assert (found[1] - found[0]).abs().max() > 1e-3 * found[0].abs().max()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fusion", [False, True])
@torch.no_grad()
def test_thresholds_that_nothing_is_under_give_the_plain_model(fusion, training):
    """Acceptance (3), and that soft masks of 1 change nothing."""
    plain = make_model(CroprViTModel, ltp_config(token_reducer=None, last_layer_fusion=fusion)).double()
    model = build(thresholds=None, last_layer_fusion=fusion)
    model.load_state_dict(plain.state_dict(), strict=False)
    set_thresholds(model, -200.0 if training else 0.0)
    outputs = model.train(training)(images(), output_pruning=True)
    assert_close_relative(outputs.last_hidden_state, plain(images()).last_hidden_state, 1e-12)
    assert (outputs.patches_per_block == 16).all()


@torch.no_grad()
def test_a_schedule_is_the_most_that_stays():
    model = build(thresholds=-1.0)
    model.set_pruning(2)
    assert model.config.kept_patches() == [16] * 5 and model.config.kept_patches(pruning=2) == [13, 11, 9, 7, 5]
    most = torch.tensor([[16, 13, 11, 9, 7]] * 4)
    assert torch.equal(model(images(), output_pruning=True).patches_per_block, most)
    set_thresholds(model, 1.0)
    both = model(images(), output_pruning=True).patches_per_block
    assert (both <= most).all() and (both < most).any()


@torch.no_grad()
def test_the_schedule_keeps_those_that_receive_most():
    state, facts = make_state()
    reducer = LTPReducer(ltp_config(reducer_config={"final_threshold": -1.0}), block=2).double().eval()
    reduced = reducer.after_attention(state, 6, facts)
    scores = (facts.queries @ facts.keys.mT * facts.scaling).softmax(dim=-1).sum(dim=(1, 2))
    for image in range(2):
        best = 1 + scores[image, 1:].topk(6).indices
        assert reduced.token_indices[image].tolist() == [0, *sorted(best.tolist())]


def test_every_block_has_a_threshold_whatever_the_schedule():
    config = ltp_config(pruning_schedule=[16, 10, 10, 7, 7])
    assert config.pruning_blocks == [1, 2, 3, 4, 5] and config.kept_patches() == [16, 10, 10, 7, 7]
    starts = [value.item() for value in thresholds_of(CroprViTModel(config))]
    assert starts == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert ltp_config(last_layer_fusion=True).pruning_blocks == [1, 2, 3, 4]


@pytest.mark.parametrize("stage", ["soft", "hard"])
@torch.no_grad()
def test_padding_leaves_first(stage):
    model = build(thresholds=0.0, prune_padding_first=True, reducer_config={"stage": stage})
    mask = torch.ones(2, 32, 32)
    mask[1, 16:] = 0
    counts = model(images(2), pixel_mask=mask, output_pruning=True).patches_per_block
    assert counts.tolist() == [[16] * 5, [16, 8, 8, 8, 8]]
    seen = watch(model.train(), "after_block")
    trained = model(images(2), pixel_mask=mask).pooler_output
    assert_close_relative(trained[0], model(images(2)).pooler_output[0], 1e-12)
    bias = seen[0][0].columns[KEY_BIAS]
    assert (bias[1, 9:] == -torch.inf).all() and bias[1, :9].isfinite().all() and bias[0].isfinite().all()


# The soft stage


@torch.no_grad()
def test_the_soft_stage_against_whole_matrices():
    """Attention to a token, its row in the scores, its updates and its share of means count the product of masks."""
    model = build(thresholds=[0.5, 0.2, 0.0, -0.2, -0.3], reducer_config={"temperature": 0.3}).train()
    outputs = model(images())
    for index, image in enumerate(images()):
        tokens, product = model.embeddings(image[None])[0][0], torch.ones(17, dtype=torch.float64)
        for layer, parameter in zip(model.layers, thresholds_of(model)):
            normed, attention = layer.layernorm_before(tokens), layer.attention
            # (T, D) -> (T, heads, d) -> (heads, T, d)
            query, key, value = (
                part(normed).unflatten(1, (4, 8)).transpose(0, 1)
                for part in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            weights = (query @ key.mT / 8**0.5).exp() * product
            weights = weights / weights.sum(dim=-1, keepdim=True)
            mask = (((product[:, None] * weights).sum(dim=1).mean(dim=0) - parameter) / 0.3).sigmoid()
            mask[0] = 1.0
            attended = attention.o_proj((weights @ value).transpose(0, 1).flatten(1))
            update = layer.mlp(layer.layernorm_after(tokens + attended))
            tokens = tokens + product[:, None] * attended + (product * mask)[:, None] * update
            product = product * mask
        assert 0.01 < product[1:].median() < 0.9
        pooled = model.layernorm((product[:, None] * tokens).sum(dim=0) / product.sum())
        torch.testing.assert_close(outputs.pooler_output[index], pooled, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("model_class", "fields"), VARIANTS)
@torch.no_grad()
def test_a_temperature_near_zero_is_the_hard_stage(model_class, fields):
    """Acceptance (5) for whole models, which train masked as they run."""
    pixels, found = images(), []
    for settings in ({"stage": "soft", "temperature": 1e-8}, {"stage": "hard"}):
        model = build(model_class, reducer_config=settings, **fields)
        expected = result(model.eval(), pixels)
        found.append(result(model.train(), pixels))
        assert_close_relative(found[-1], expected, 1e-6)  # hard masks, and with them weights of means, are float32
    assert_close_relative(*found, 1e-6)


@pytest.mark.parametrize("temperature", [0.1, 0.01, 0.001])
def test_soft_masks_are_hard_ones_far_from_the_threshold(temperature):
    """Acceptance (5): but for ten temperatures on both sides."""
    state, facts = make_state()
    settings = {"temperature": temperature, "final_threshold": 2.0}
    reducer = LTPReducer(ltp_config(reducer_config=settings), block=2).double()
    mask = reducer.after_attention(state, 16, facts).columns[LOG_MASK].exp()
    assert (mask[:, 0] == 1).all()
    scores = (facts.queries @ facts.keys.mT * facts.scaling).softmax(dim=-1).sum(dim=2).mean(dim=1)
    margins = scores[:, 1:] - reducer.threshold.value.item()
    torch.testing.assert_close(mask[:, 1:], (margins / temperature).sigmoid())
    is_far = margins.abs() >= 10 * temperature
    assert is_far.any() or temperature == 0.1
    assert ((mask[:, 1:] - (margins >= 0).double()).abs()[is_far] < 1e-4).all()


def test_the_loss_of_the_masks_and_its_gradient():
    """Acceptance (4): by finite differences in all blocks, and in the last by the formula of the specification."""
    model = build(reducer_config={"mask_loss_weight": 0.3}).train()
    parameters, seen = thresholds_of(model), watch(model, "after_block")

    def loss():
        return model(images()).method_losses[MASK_LOSS]

    value = loss()
    masks = [state.columns[LOG_MASK][:, 1:].exp() for state, _ in seen]
    torch.testing.assert_close(value, 0.3 * sum(mask.mean() for mask in masks))
    gradients = torch.autograd.grad(value, parameters)
    last = masks[-1]
    torch.testing.assert_close(gradients[-1][0], -0.3 * (last * (1 - last)).mean() / 0.128)
    step = 1e-5
    for parameter, gradient in zip(parameters, gradients):
        with torch.no_grad():
            sides = []
            for sign in (1, -1):
                parameter.add_(sign * step)
                sides.append(loss())
                parameter.sub_(sign * step)
        torch.testing.assert_close(gradient[0], (sides[0] - sides[1]) / (2 * step), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("model_class", "fields"), [(CroprViTForImageClassification, {}), *full(VARIANTS[1])])
def test_thresholds_learn_from_the_task_as_well(model_class, fields):
    model = build(model_class, reducer_config={"mask_loss_weight": 0.0}, **fields).train()
    gradients = torch.autograd.grad(result(model, images()).square().sum(), thresholds_of(model))
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("pooling", ["attention", *full("mean", "patch_mean")])
@pytest.mark.parametrize("thresholds", [100.0, *full(0.6, -100.0)])
def test_gradients_are_finite_where_nothing_is_left(thresholds, pooling):
    """In float32, where masks become 0, and beside those of the schedule, which are 0 from the start."""
    fields = {"pooling": pooling, "use_cls_token": False, "pruning_rate": 2}
    model = build(CroprViTForImageClassification, thresholds=thresholds, **fields).float().train()
    model(make_images(), labels=torch.tensor([0, 1])).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("stage", "fields"),
    [
        ("soft", {}),
        *full(("hard", {}), ("soft", {"last_layer_fusion": True}), ("soft", {"use_cls_token": False})),
        *full(("soft", {"pooling": "attention"})),
    ],
)
def test_checkpointing_gives_equal_gradients(stage, fields):
    gradients = []
    for checkpoints in (False, True):
        model = build(CroprViTForImageClassification, reducer_config={"stage": stage}, **fields).train()
        if checkpoints:
            enable_activation_checkpointing(model)
        model(images(2), labels=torch.tensor([0, 1])).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert any("threshold" in name for name in gradients[0]) == (stage == "soft")
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.full
@pytest.mark.parametrize("stage", ["soft", "hard"])
def test_a_compiled_training_step_has_no_break(stage):
    torch.compiler.reset()
    model = build(CroprViTForImageClassification, reducer_config={"stage": stage}).train()
    inputs = {"pixel_values": images(2), "labels": torch.tensor([0, 1])}
    loss = torch.compile(model, fullgraph=True, backend="eager")(**inputs).loss
    torch.testing.assert_close(loss, model(**inputs).loss)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.full
@torch.no_grad()
def test_graphs_mask():
    torch.compiler.reset()
    model = build(CroprViTForImageClassification)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close_relative(compiled(images()).logits, model(images()).logits, 1e-12)


# Two stages


def test_thresholds_have_the_rate_of_the_head_and_no_weight_decay():
    model = CroprViTForImageClassification(ltp_config())
    groups = layer_decay_groups(model, 1e-3, 0.05, 1.0, backbone_learning_rate=1e-5)
    settings = {parameter: (group["lr"], group["weight_decay"]) for group in groups for parameter in group["params"]}
    assert {settings[parameter] for parameter in thresholds_of(model)} == {(1e-3, 0.0)}


def test_the_hard_stage_trains_everything_but_thresholds():
    model = CroprViTForImageClassification(ltp_config(reducer_config={"stage": "hard"})).requires_grad_(True).train()
    outputs = model(make_images(), labels=torch.tensor([0, 1]))
    assert outputs.method_losses is None
    outputs.loss.backward()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.endswith("threshold.value")}
    assert len(frozen) == 5
    assert {name for name, parameter in model.named_parameters() if parameter.grad is None} == frozen
    trained = {parameter for group in layer_decay_groups(model, 1e-3, 0.05, 1.0) for parameter in group["params"]}
    assert not trained & {*thresholds_of(model)}


def test_a_folder_goes_to_the_second_stage_with_its_thresholds(tmp_path):
    load = CroprViTForImageClassification.from_pretrained
    plain = make_model(CroprViTForImageClassification, ltp_config(token_reducer=None))
    plain.save_pretrained(tmp_path / "plain")
    settings = {"final_threshold": 1.0, "stage": "soft"}
    soft = load(tmp_path / "plain", token_reducer="ltp", reducer_config=settings, last_layer_fusion=None)
    assert not soft.config.last_layer_fusion and all(value.requires_grad for value in thresholds_of(soft))
    assert [value.item() for value in thresholds_of(soft)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    learned = [0.3, 0.5, 0.7, 0.2, -0.1]
    set_thresholds(soft, learned)
    soft.save_pretrained(tmp_path / "soft")
    hard = load(tmp_path / "soft", reducer_config={"stage": "hard"})
    assert hard.config.reducer_config == {"stage": "hard"}
    hard.train()
    assert not any(value.requires_grad for value in thresholds_of(hard))
    hard.save_pretrained(tmp_path / "hard")
    for name in ("soft", "hard"):
        model = load(tmp_path / name).eval()
        assert [value.item() for value in thresholds_of(model)] == pytest.approx(learned)
        with torch.no_grad():
            assert torch.equal(model(make_images()).logits, soft.eval()(make_images()).logits)


@pytest.mark.full
def test_two_stages_by_the_script(example, tiny_vit, tmp_path):
    train, fields = example("train_image_classification").main, {"token_reducer": "ltp", "pruning_rate": None}
    fields |= {"learning_rate": 0.01, "warmup_steps": 0}
    for source, stage in ((tiny_vit, "soft"), (str(tmp_path / "soft"), "hard")):
        settings = f'{{"stage": "{stage}"}}'
        train(command(source, tmp_path / stage, reducer_config=settings, **fields))
        assert ("mask_loss" in logged(tmp_path / stage)[0]) == (stage == "soft")
    soft, hard = (CroprViTForImageClassification.from_pretrained(tmp_path / stage) for stage in ("soft", "hard"))
    starts = [0.5 * block / 4 for block in range(1, 5)]
    for start, first, second in zip(starts, thresholds_of(soft), thresholds_of(hard)):
        assert first.item() == second.item() and abs(first.item() - start) > 1e-3
    assert hard.config.reducer_config == {"stage": "hard"}
    assert not torch.equal(soft.classifier.weight, hard.classifier.weight)


def bright_patches(count):
    """The class is the colour of one bright patch."""
    pixels, labels, places = 0.1 * torch.randn(count, 3, 32, 32), torch.arange(count) % 2, torch.randint(16, (count,))
    patches = torch.zeros(count, 3, 16)
    patches[torch.arange(count), 2 * labels, places] = 2.0
    grown = patches.view(count, 3, 4, 4).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    return pixels + grown, labels, places


@pytest.mark.full
@pytest.mark.parametrize("seed", range(3))
def test_training_learns_to_prune_what_does_not_matter(seed):
    torch.manual_seed(seed)
    settings = {"mask_loss_weight": 0.5}
    config = ltp_config(num_labels=2, initializer_range=0.1, num_hidden_layers=3, reducer_config=settings)
    model = CroprViTForImageClassification(config).train()
    with torch.no_grad():
        pixels, labels, places = bright_patches(64)
        assert (model.eval()(pixels, output_pruning=True).pruned_after_block == 3).sum(dim=1).min() > 8
    others = [parameter for name, parameter in model.named_parameters() if "threshold" not in name]
    optimizer = torch.optim.AdamW([{"params": thresholds_of(model), "lr": 1e-2}, {"params": others, "lr": 2e-3}])
    for _ in range(150):
        pixels, labels, _ = bright_patches(32)
        loss = model.train()(pixels, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        pixels, labels, places = bright_patches(64)
        outputs = model.eval()(pixels, output_pruning=True)
    stays = outputs.pruned_after_block == 3
    assert stays.sum(dim=1).float().mean() < 4
    assert stays.gather(1, places[:, None]).float().mean() > 0.9
    assert (outputs.logits.argmax(dim=1) == labels).float().mean() > 0.9


# What it costs, and what is said of it


def test_costs_are_those_of_the_second_pass_and_of_the_schedule():
    config = ltp_config()
    plain, second = multiply_adds(unpruned_config(config)), 17**2 * (32 + 4)
    assert multiply_adds(config) == plain + 5 * second
    assert multiply_adds(config, pruning=[16, 16, 16, 16, 10]) == plain + 5 * second - 6 * 2 * 32 * 48


def test_cards_say_that_images_decide(tmp_path):
    cards = []
    for rate in (None, 2):
        make_model(CroprViTForImageClassification, ltp_config(pruning_rate=rate)).save_pretrained(tmp_path)
        cards.append((tmp_path / "README.md").read_text(encoding="utf-8"))
    for card in cards:
        assert "drops image patches, of each image as many as it can do without, on the way by [Learned Token" in card
        assert " by the schedule" in card and "kim2022learned" in card
    assert "Patches that each block works on" not in cards[0]
    assert "Patches that each block works on by the schedule (images have numbers of their own" in cards[1]


def test_a_kernel_without_a_bias_of_keys_is_refused():
    with pytest.raises(ValueError, match="'ltp' adds a bias to attention logits"):
        CroprViTModel(ltp_config()).set_attn_implementation("flash_attention_2")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reducer_config": {"temperature": 0.0}}, "`temperature` is 0.0; it must be above 0"),
        ({"reducer_config": {"mask_loss_weight": -1}}, "`mask_loss_weight` is -1"),
        ({"reducer_config": {"stage": "third"}}, "`stage` is 'third'; choose one of soft, hard"),
        ({"reducer_config": {"final_treshold": 1.0}}, "did you mean 'final_threshold'"),
        ({"reducer_config": {"final_threshold": "low"}}, "`reducer_config` of the token reducer 'ltp'"),
        ({"use_auxiliary_heads": True}, "does not support auxiliary heads"),
        ({"window_size": 2, "window_block_indices": [0], "use_cls_token": False, "pooling": "mean"}, "windowed"),
    ],
)
def test_what_it_cannot_do(fields, message):
    with pytest.raises(ValueError, match=message):
        CroprViTModel(ltp_config(**fields))
