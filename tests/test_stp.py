"""STP and MTA against what their paper says: counts, draws, gates and their gradient, and the assembly as a loop over
tokens, whose blocks are those of torch."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cropr_hf import (
    CroprViTBackbone,
    CroprViTConfig,
    CroprViTForImageClassification,
    CroprViTForSemanticSegmentation,
    CroprViTModel,
    TokenState,
)
from cropr_hf.methods import stp
from cropr_hf.methods.stp import add_gumbel_noise, grid_positions, straight_through_gates
from cropr_hf.publishing.export import export_model
from cropr_hf.speed.cost import multiply_adds
from cropr_hf.token_state import gather_tokens, select_tokens
from cropr_hf.training import curriculum_schedule, layer_decay_groups
from tests.common import (
    assert_close_relative,
    enable_activation_checkpointing,
    full,
    label_maps,
    make_images,
    make_model,
    tiny_config,
)


KEPT = (11, 7, 4)  # of 16 patches after the blocks 1, 2 and 3
EXACT = {"perturbation": False}
SMALL = {"assembly_hidden_size": 24, "assembly_num_attention_heads": 3}
VARIANTS = {
    "cls": {"pooling": "cls"},
    "no_cls": {"use_cls_token": False, "pooling": "patch_mean"},
    "rope_registers": {"rope_theta": 100.0, "num_register_tokens": 2, "pooling": "patch_mean"},
    "windows": {"use_cls_token": False, "pooling": "mean", "window_size": 2, "window_block_indices": [0, 3, 4]},
    "fusion": {"last_layer_fusion": True},
    "fusion_registers": {"last_layer_fusion": True, "num_register_tokens": 2, "pooling": "cls"},
    "fusion_no_cls": {"last_layer_fusion": True, "use_cls_token": False, "pooling": "patch_mean"},
    "fusion_windows": {
        "last_layer_fusion": True,
        "rope_theta": 100.0,
        "window_size": 2,
        "window_block_indices": [0, 3, 4],
    },
}


def stp_config(**overrides):
    return tiny_config("plain", **{"token_reducer": "stp", "pruning_rate": None, **overrides})


def make_state(config, batch_size=2):
    torch.manual_seed(0)
    length = config.num_prefix_tokens + config.num_patches
    return TokenState(
        torch.randn(batch_size, length, config.hidden_size, dtype=torch.float64),
        token_indices=torch.arange(length)[None],
        num_prefix_tokens=config.num_prefix_tokens,
        grid_size=config.grid_size,
    )


def reduce(model, state, kept=KEPT):
    """The state after the modules, with no blocks between them."""
    for reducer, num_keep in zip(model.token_reducers.values(), kept):
        state = reducer.after_block(state, num_keep)
    return state


def trained(model_class, **overrides):
    """A model in training, its input, and the loss, in float64."""
    model = make_model(model_class, stp_config(**overrides)).double().train()
    images = make_images().double()
    is_dense = model_class is CroprViTForSemanticSegmentation
    labels = label_maps(model.config, images)["labels"] if is_dense else torch.tensor([0, 1])
    torch.manual_seed(1)
    return model, images, model(images, labels=labels)


# How many, and which


@pytest.mark.parametrize(
    ("keep_rate", "num_patches", "kept"),
    [
        (0.1, 1728, [172, 17, 1]),
        (0.25, 4096, [1024, 256, 64]),
        (0.5, 196, [98, 49, 24]),
        (0.7, 196, [137, 95, 66]),
        (0.7, 10, [7, 4, 2]),  # 0.7 * 10 is 6.999999999999999
        (0.1, 10, [1, 1, 1]),
        (1.0, 196, [196, 196, 196]),
    ],
)
def test_token_counts_are_those_of_the_authors(keep_rate, num_patches, kept):
    config = CroprViTConfig.from_size("small", token_reducer="stp", reducer_config={"keep_rate": keep_rate})
    assert config.pruning_blocks == [3, 6, 9] and not config.last_layer_fusion
    found = config.kept_patches(num_patches)
    assert found == [num_patches] * 2 + [kept[0]] * 3 + [kept[1]] * 3 + [kept[2]] * 4


@pytest.mark.parametrize("fusion", [False, True])
def test_multiply_adds_count_predictors_and_assembly(fusion):
    settings = {**SMALL, "keep_rate": 0.5, "assembly_num_hidden_layers": 2}
    fields = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "image_size": 112,
        "patch_size": 8,
    }
    config = CroprViTConfig(**fields, token_reducer="stp", reducer_config=settings, last_layer_fusion=fusion)
    plain = CroprViTConfig(
        **fields, token_reducer="random", pruning_schedule=config.kept_patches(), last_layer_fusion=fusion
    )
    own = (196 + 98 + 49) * (64**2 + 64 * 32 + 32 * 16 + 16)
    if fusion:
        own += 2 * 197 * 64 * 24 + 2 * (12 * 197 * 24**2 + 2 * 197**2 * 24)
    assert multiply_adds(config) - multiply_adds(plain) == own


def test_the_predictor_is_a_loop_over_tokens():
    predictor = make_model(CroprViTModel, stp_config()).token_reducers["2"].predictor.double()
    patches = torch.randn(2, 16, 32, dtype=torch.float64)
    found = predictor(patches)
    for image in range(2):
        features = [F.gelu(predictor.input_projection(predictor.norm(token))) for token in patches[image]]
        mean = sum(token[16:] for token in features) / 16
        for index, token in enumerate(features):
            hidden = F.gelu(predictor.fc1(torch.cat([token[:16], mean])))
            expected = predictor.fc3(F.gelu(predictor.fc2(hidden)))[0].sigmoid().log()
            torch.testing.assert_close(found[image, index], expected)


@pytest.mark.parametrize("mode", ["inference", "training", "training without noise"])
@torch.no_grad()
def test_what_is_pruned_and_what_is_left_are_all_tokens_once(mode):
    config = stp_config(num_register_tokens=1, reducer_config={"perturbation": mode == "training"})
    model = make_model(CroprViTModel, config).double().train(mode != "inference")
    state = make_state(config, batch_size=4)
    reduced = reduce(model, state)
    assert [tokens.token_indices.shape[1] for tokens in reduced.pruned] == [5, 4, 3]
    assert reduced.token_indices.shape == (4, 2 + KEPT[-1])
    assert (reduced.token_indices.diff(dim=1) > 0).all() and (reduced.token_indices[:, :2] == torch.arange(2)).all()
    everything = torch.cat([reduced.token_indices, *(tokens.token_indices for tokens in reduced.pruned)], dim=1)
    assert torch.equal(everything.sort(dim=1).values, torch.arange(18).expand(4, -1))
    for tokens, indices in (
        (reduced, reduced.token_indices),
        *((each, each.token_indices) for each in reduced.pruned),
    ):
        assert torch.equal(tokens.hidden_states, *gather_tokens(indices, state.hidden_states))  # times exactly 1
    assert state.columns == {} and state.pruned == ()  # hooks change no state


@torch.no_grad()
def test_inference_keeps_the_best_and_of_equal_ones_the_first():
    model = make_model(CroprViTModel, stp_config()).double()
    state, reducer = make_state(model.config), model.token_reducers["1"]
    best = reducer.predictor(state.hidden_states[:, 1:])
    reduced = reducer.after_block(state, 6)
    for image in range(2):
        ranked = sorted(range(16), key=lambda place: -best[image, place])[:6]
        assert reduced.token_indices[image].tolist() == [0, *(1 + place for place in sorted(ranked))]
    alike = state.updated(hidden_states=torch.ones_like(state.hidden_states))
    assert reducer.after_block(alike, 6).token_indices.tolist() == [[*range(7)]] * 2


@torch.no_grad()
def test_training_draws_other_patches_each_time():
    model = make_model(CroprViTModel, stp_config()).train()
    torch.manual_seed(0)
    maps = [model(make_images(), output_pruning=True).pruned_after_block for _ in range(2)]
    assert not torch.equal(*maps)
    for blocks in maps:
        assert [(blocks > block).sum(dim=1).tolist() for block in (1, 2, 3)] == [[count] * 2 for count in KEPT]


@torch.no_grad()
def test_padding_is_pruned_first_in_training_too():
    model = make_model(CroprViTModel, stp_config(prune_padding_first=True)).train()
    mask = torch.ones(2, 32, 32)
    mask[0, :, 16:] = 0
    blocks = model(make_images(), mask, output_pruning=True).pruned_after_block[0].view(4, 4)
    assert (blocks[:, 2:] <= 2).all() and (blocks[:, :2] > 1).all()  # 8 of padding, of which 5 leave, then 3 of 4


# Draws and gates


@torch.no_grad()
def test_tokens_are_drawn_by_their_scores():
    def shares(scores, num_keep):
        torch.manual_seed(0)
        kept, _ = select_tokens(add_gumbel_noise(scores.expand(5000, -1)), num_keep)
        return kept.flatten().bincount(minlength=scores.shape[-1]) / 5000

    deviation = math.sqrt(0.3 * 0.7 / 5000)
    assert (shares(torch.zeros(10), 3) - 0.3).abs().max() < 5 * deviation
    scores = torch.arange(5.0)
    assert (shares(scores, 2).diff() > 0).all()
    assert (shares(scores, 1) - scores.softmax(dim=0)).abs().max() < 5 * math.sqrt(0.25 / 5000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [1.0, 1e4])
def test_gates_are_one_and_have_the_gradient_of_the_softmax(dtype, spread):
    torch.manual_seed(0)
    ranks = (spread * torch.randn(3, 11, dtype=dtype)).requires_grad_()
    kept, pruned = select_tokens(ranks.detach(), 4, 2)
    gates = straight_through_gates(ranks, kept, 2)
    assert (gates == 1).all()  # exactly
    weights = torch.randn(3, 11, dtype=dtype)
    (found,) = torch.autograd.grad((gates * weights).sum(), ranks)
    soft = F.pad(ranks[:, 2:].softmax(dim=-1), (2, 0))
    expected = (soft * weights).gather(1, kept).sum() - (soft * weights).gather(1, pruned).sum()
    torch.testing.assert_close(found, *torch.autograd.grad(expected, ranks))
    assert not found[:, :2].any()


@pytest.mark.parametrize("fusion", [False, True])
def test_pruned_tokens_teach_all_predictors_so_far(fusion):
    """With an assembly behind the norm, which has no gradient of a factor before it."""
    model = make_model(CroprViTModel, stp_config(last_layer_fusion=fusion, reducer_config=EXACT)).double().train()
    first, second = model.token_reducers["1"], model.token_reducers["2"]
    state = make_state(model.config)
    reduced = reduce(model, state, KEPT[:2])
    for tokens in reduced.pruned:
        weights = torch.randn(tokens.hidden_states.shape, dtype=torch.float64)
        total = (tokens.hidden_states * weights).sum()
        reducers = [first] if tokens.block == 1 else [first, second]
        found = [torch.autograd.grad(total, [*each.predictor.parameters()], retain_graph=True) for each in reducers]
        (states,) = gather_tokens(tokens.token_indices, state.hidden_states)
        if fusion:
            states = reducers[-1].pruned_norm(states)
        values = (states * weights).sum(dim=-1).detach()  # of their gates
        before = first.scores(state)[:, 1:].softmax(dim=-1)  # of 16 patches
        if tokens.block == 1:
            gates = [1 - before.gather(1, tokens.token_indices - 1)]
        else:
            (left,) = gather_tokens(reduced_once(first, state).token_indices, state.hidden_states)
            now = F.pad(second.predictor(left[:, 1:]).softmax(dim=-1), (1, 0))
            places = (reduced_once(first, state).token_indices[:, :, None] == tokens.token_indices[:, None]).int()
            factor = 2 if not fusion else 1  # of the states before the second block, and of the running product
            gates = [factor * before.gather(1, tokens.token_indices - 1), 1 - now.gather(1, places.argmax(dim=1))]
        for gradients, reducer, gate in zip(found, reducers, gates):
            expected = torch.autograd.grad((gate * values).sum(), [*reducer.predictor.parameters()])
            assert_close_relative(gradients, expected, 1e-3)


def reduced_once(reducer, state):
    with torch.no_grad():
        return reducer.after_block(state, KEPT[0])


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_without_noise_training_computes_what_inference_does(variant):
    model = make_model(CroprViTModel, stp_config(reducer_config=EXACT, **VARIANTS[variant])).double()
    images, arguments = make_images().double(), {"output_pruning": True, "output_stages": range(6)}
    outputs, expected = model.train()(images, **arguments), model.eval()(images, **arguments)
    assert torch.equal(outputs.pruned_after_block, expected.pruned_after_block)
    assert set(outputs.pruned_after_block.unique().tolist()) == {1, 2, 3, 5}
    assert torch.equal(outputs.token_indices.expand(2, -1), expected.token_indices.expand(2, -1))
    for name in ("pooler_output", "last_hidden_state", "stage_states"):
        assert_close_relative(outputs[name], expected[name], 1e-9)


@pytest.mark.parametrize(
    ("task", "variant"),
    [
        *((CroprViTForImageClassification, name) for name in VARIANTS),
        *((CroprViTForSemanticSegmentation, name) for name in VARIANTS if name.startswith("fusion")),
    ],
)
def test_the_task_reaches_every_parameter(task, variant):
    model, _, outputs = trained(task, **VARIANTS[variant])
    assert outputs.method_losses is None
    outputs.loss.backward()
    for name, parameter in model.base_model.token_reducers.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


# The assembly


def position(place, columns, size):
    """By hand, (C,): sines and cosines of the row, then of the column."""
    angles = [[axis / 10000 ** (k / (size // 4)) for k in range(size // 4)] for axis in divmod(place, columns)]
    values = [function(angle) for axis in angles for function in (math.sin, math.cos) for angle in axis]
    return torch.tensor(values, dtype=torch.float64)


def test_positions_by_hand():
    found = grid_positions((3, 5), 24, torch.device("cpu"))
    expected = torch.stack([position(place, 5, 24) for place in range(15)])
    torch.testing.assert_close(found[0].double(), expected, rtol=0, atol=1e-6)


def torch_layer(layer, size, num_heads):
    """A block of torch with the weights of one of the assembly."""
    other = nn.TransformerEncoderLayer(
        size,
        num_heads,
        4 * size,
        dropout=0.0,
        activation="gelu",
        layer_norm_eps=1e-6,
        batch_first=True,
        norm_first=True,
        dtype=torch.float64,
    )
    names = {
        "qkv_proj.": "self_attn.in_proj_",
        "o_proj.": "self_attn.out_proj.",
        "layernorm_before.": "norm1.",
        "layernorm_after.": "norm2.",
        "fc1.": "linear1.",
        "fc2.": "linear2.",
    }
    weights = {}
    for name, tensor in layer.state_dict().items():
        module, _, kind = name.rpartition(".")
        weights[names[f"{module}."] + kind] = tensor
    other.load_state_dict(weights)
    return other


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("num_registers", [0, 1])
@torch.no_grad()
def test_the_assembly_is_a_loop_over_tokens(depth, num_registers):
    settings = {**SMALL, "assembly_num_hidden_layers": depth}
    fields = {"last_layer_fusion": True, "num_register_tokens": num_registers, "image_size": [24, 40]}
    model = make_model(CroprViTModel, stp_config(reducer_config=settings, **fields)).double()
    reducers, state, prefix = model.token_reducers, make_state(model.config), model.config.num_prefix_tokens
    assembly = reducers["3"].assembly
    assert reducers["1"].assembly is None and len(assembly.layers) == depth
    reduced = reduce(model, state, (10, 6, 2))
    whole = reducers["3"].restore(reduced)
    assert whole.restored and reducers["3"].restore(whole) is whole
    assert torch.equal(whole.token_indices, torch.arange(prefix + 15).expand(2, -1))
    for image in range(2):
        stages = dict.fromkeys(reduced.token_indices[image].tolist(), "survivors")
        for tokens in reduced.pruned:
            stages |= dict.fromkeys(tokens.token_indices[image].tolist(), str(tokens.block))
        rows = []
        for place, stage in sorted(stages.items()):
            norm = assembly.survivors_norm if stage == "survivors" else reducers[stage].pruned_norm
            row = assembly.projections[stage](norm(state.hidden_states[image, place]))
            rows.append(row + position(place - prefix, 5, 24) if place >= prefix else row)
        tokens = torch.stack(rows)[None]
        for layer in assembly.layers:
            tokens = torch_layer(layer, 24, 3)(tokens)
        expected = assembly.output_projection(assembly.norm(tokens))[0]
        assert_close_relative(whole.hidden_states[image], expected, 1e-6)


@torch.no_grad()
def test_an_assembly_of_identities_puts_every_row_at_its_place(monkeypatch):
    fields = {"last_layer_fusion": True, "num_register_tokens": 1}
    model = make_model(CroprViTModel, stp_config(reducer_config={"assembly_num_hidden_layers": 0}, **fields)).double()
    assembly = model.token_reducers["3"].assembly
    assembly.survivors_norm = assembly.norm = assembly.output_projection = nn.Identity()
    assembly.projections = nn.ModuleDict({stage: nn.Identity() for stage in assembly.projections})
    for reducer in model.token_reducers.values():
        reducer.pruned_norm = nn.Identity()
    monkeypatch.setattr(stp, "grid_positions", lambda grid_size, size, device: torch.zeros(1, 16, size))
    state = make_state(model.config)
    numbered = state.hidden_states.clone()
    numbered[..., 0] = torch.arange(18)
    state = state.updated(hidden_states=numbered)
    for mode in (True, False):
        reduced = reduce(model.train(mode), state)
        assert torch.equal(model.restore(reduced).hidden_states, numbered)


@torch.no_grad()
def test_feature_maps_are_assembled_with_fusion_alone():
    fields = {"out_features": ["stem", "stage2", "stage4"], "apply_layernorm": False}
    for fusion in (False, True):
        model = make_model(CroprViTBackbone, stp_config(last_layer_fusion=fusion, **fields))
        base = model.base_model
        state, _ = base.embed(make_images())
        state = base.run_block(1, state.updated(keeps_pruned_states=True), None)
        state = base.token_reducers["1"].after_block(state, KEPT[0])
        state = base.run_block(2, state, None)
        first, second, _ = (each.flatten(2).transpose(1, 2) for each in model(make_images()).feature_maps)
        assert torch.equal(first, base.embeddings(make_images())[0][:, 1:])
        assembled = base.token_reducers["3"].assembly(state) if fusion else state.restore()
        assert_close_relative(second, assembled.hidden_states[:, 1:])


@torch.no_grad()
def test_a_rate_of_one_is_the_plain_model_and_assembles_nobody():
    whole, images = {"keep_rate": 1.0}, make_images()
    plain = make_model(CroprViTForImageClassification, stp_config(token_reducer=None)).eval()
    model = make_model(CroprViTForImageClassification, stp_config(reducer_config=whole)).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(model(images).logits, plain(images).logits)
    assert_close_relative(model.train()(images).logits, plain(images).logits)
    config = stp_config(reducer_config=whole, last_layer_fusion=True)
    model, state = make_model(CroprViTModel, config).double(), make_state(config)
    reduced = reduce(model, state, (16, 16, 16))
    assert reduced is state
    assembled = model.restore(reduced)
    assert assembled.hidden_states.shape == (2, 17, 32) and assembled.is_whole
    assert not torch.equal(assembled.hidden_states, state.hidden_states)
    assert_close_relative(
        model.restore(reduce(model.train(), state, (16, 16, 16))).hidden_states, assembled.hidden_states
    )
    assert model.eval()(images.double()).last_hidden_state.shape == (2, 17, 32)


@pytest.mark.parametrize("fusion", [False, True])
def test_where_the_schedule_keeps_all_every_parameter_learns(fusion):
    """As at the beginning of a curriculum; processes that train together need a gradient for each."""
    model = make_model(CroprViTForImageClassification, stp_config(last_layer_fusion=fusion)).train()
    model.set_pruning(curriculum_schedule(model.config, 0.0))
    outputs = model(make_images(), labels=torch.tensor([0, 1]), output_pruning=True)
    assert outputs.pruned_after_block.eq(5).all()
    outputs.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(each.predictor.fc1.weight.grad.any() for each in model.cropr_vit.token_reducers.values())


@torch.no_grad()
def test_a_schedule_may_pass_over_a_module():
    model = make_model(CroprViTModel, stp_config(last_layer_fusion=True))
    model.set_pruning([9, 9, 4, 4, 4])
    for mode in (True, False):
        outputs = model.train(mode)(make_images(), output_pruning=True)
        assert set(outputs.pruned_after_block.unique().tolist()) == {1, 3, 5}
        assert outputs.last_hidden_state.shape == (2, 17, 32)


# Life of a model


def test_predictors_and_assembly_learn_at_the_rate_of_the_head():
    model = CroprViTForImageClassification(stp_config(last_layer_fusion=True))
    groups = layer_decay_groups(model, 1e-3, 0.05, 1.0, backbone_learning_rate=1e-5)
    rates = {parameter: group["lr"] for group in groups for parameter in group["params"]}
    assert {rates[parameter] for parameter in model.cropr_vit.token_reducers.parameters()} == {1e-3}
    assert {rates[parameter] for parameter in model.cropr_vit.layers.parameters()} == {1e-5}


def test_an_unpruned_checkpoint_gets_new_weights_and_a_trained_one_keeps_them(tmp_path):
    plain = make_model(CroprViTForImageClassification, stp_config(token_reducer=None))
    plain.save_pretrained(tmp_path / "plain")
    load = CroprViTForImageClassification.from_pretrained
    model = load(tmp_path / "plain", token_reducer="stp", last_layer_fusion=True)
    assert torch.equal(model.classifier.weight, plain.classifier.weight)
    reducer = model.cropr_vit.token_reducers["3"]
    for layer in (reducer.predictor.fc1, reducer.assembly.layers[0].fc1, reducer.assembly.projections["survivors"]):
        assert layer.weight.std().item() == pytest.approx(model.config.initializer_range, rel=0.2)
        assert not layer.bias.any()
    model.save_pretrained(tmp_path / "stp")
    again = load(tmp_path / "stp")
    assert all(torch.equal(*pair) for pair in zip(model.state_dict().values(), again.state_dict().values()))
    without = load(tmp_path / "stp", last_layer_fusion=False)
    assert without.cropr_vit.token_reducers["3"].assembly is None
    without.save_pretrained(tmp_path / "without")
    with pytest.raises(ValueError, match=r"lacks \d+ weights of the model, such as cropr_vit\.token_reducers\."):
        load(tmp_path / "without", last_layer_fusion=True)


@pytest.mark.parametrize("use_reentrant", full(True, False))
def test_activation_checkpointing_gives_equal_gradients(use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = make_model(CroprViTForImageClassification, stp_config(last_layer_fusion=True)).train()
        if checkpointing:
            enable_activation_checkpointing(model, use_reentrant=use_reentrant)
            assert model.cropr_vit.token_reducers["3"].assembly.layers[0].gradient_checkpointing
        torch.manual_seed(1)
        model(make_images(), labels=torch.tensor([0, 1])).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert_close_relative(gradients[1], gradients[0], 1e-4)


@pytest.mark.full
@pytest.mark.parametrize("fusion", [False, True])
def test_a_compiled_training_step_has_no_break(fusion):
    torch._dynamo.reset()
    model = make_model(CroprViTForImageClassification, stp_config(last_layer_fusion=fusion)).train()
    inputs = {"pixel_values": make_images(), "labels": torch.tensor([0, 1])}
    torch.compile(model, fullgraph=True, backend="eager")(**inputs).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.full
@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_an_exported_segmenter_has_the_assembly(suffix, tmp_path):
    model = make_model(CroprViTForSemanticSegmentation, stp_config(last_layer_fusion=True))
    assert export_model(model, tmp_path / f"model{suffix}") < 1e-4


def bright_patches(count):
    """Images (count, 3, 32, 32) with one patch that is red or blue, which of them, and where (in [0, 16))."""
    images, labels, places = (
        0.1 * torch.randn(count, 3, 32, 32),
        torch.randint(2, (count,)),
        torch.randint(16, (count,)),
    )
    patches = torch.zeros(count, 3, 16)
    patches[torch.arange(count), 2 * labels, places] = 2.0
    grown = patches.view(count, 3, 4, 4).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    return images + grown, labels, places


def train(model, seed, num_steps, make_batch):
    """Trains a model in place, on images and labels that `make_batch` draws."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=2e-3)
    for _ in range(num_steps):
        images, labels = make_batch()
        loss = model.train()(images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


@pytest.mark.full
@pytest.mark.parametrize("seed", range(3))
def test_training_learns_what_matters(seed):
    """The class is the colour of one bright patch, which no block tells to others before a quarter is kept: kept by
    chance, it makes an accuracy of 0.63. One of the two colours can be told by its absence, and need not be kept."""
    settings = {"keep_rate": 0.25, "blocks": [1]}
    torch.manual_seed(seed)
    model = CroprViTForImageClassification(
        stp_config(reducer_config=settings, num_labels=2, initializer_range=0.05, num_hidden_layers=3)
    )
    first = model.cropr_vit.layers[0]
    with torch.no_grad():
        for parameter in (*first.attention.o_proj.parameters(), *first.mlp.fc2.parameters()):
            parameter.zero_()  # so that the block does nothing
    first.requires_grad_(False)
    train(model, seed, 200, lambda: bright_patches(32)[:2])
    images, labels, _ = bright_patches(64)
    with torch.no_grad():
        found = model(images).logits.argmax(dim=1)
    assert (found == labels).float().mean() > 0.9


def coloured_maps(count):
    """The same images, and which patch has which colour, (count, 4, 4): 0 is none."""
    images, colours, places = bright_patches(count)
    maps = torch.zeros(count, 16, dtype=torch.long).scatter(1, places[:, None], 1 + colours[:, None])
    return images, maps.view(count, 4, 4)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(3))
def test_a_segmenter_learns_through_the_assembly(seed):
    torch.manual_seed(seed)
    config = stp_config(reducer_config={"keep_rate": 0.5}, num_labels=3, last_layer_fusion=True, num_hidden_layers=4)
    model = CroprViTForSemanticSegmentation(config)
    train(model, seed, 300, lambda: coloured_maps(16))
    images, maps = coloured_maps(64)
    with torch.no_grad():
        found = model(images).logits.argmax(dim=1)
    assert (found == maps)[maps > 0].float().mean() > 0.9  # a half would know where, and not which


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reducer_config": {"keep_rate": 0.0}}, "`keep_rate` is 0.0"),
        ({"reducer_config": {"keep_rate": 0.5}, "pruning_rate": 2}, "has a `keep_rate`, and the configuration"),
        ({"reducer_config": {"blocks": [3, 2]}}, r"`blocks` is \[3, 2\]"),
        ({"reducer_config": {"blocks": [2, 5]}}, r"of STP has \[5\]; with 5 blocks they must be in 1 to 4"),
        ({"reducer_config": {"assembly_hidden_size": 30}}, "`assembly_hidden_size` is 30; give a positive multiple"),
        ({"reducer_config": {"assembly_num_hidden_layers": -1}}, "`assembly_num_hidden_layers` is -1; give 0 or more"),
        ({"reducer_config": {"assembly_num_attention_heads": 0}}, "`assembly_num_attention_heads` is 0; give 1 or"),
        (
            {"reducer_config": {"assembly_num_attention_heads": 5}, "last_layer_fusion": True},
            "has 32 channels and 5 heads; the channels must be a multiple of 4 and of the heads",
        ),
        ({"reducer_config": {"tp_ratio": 0.5}}, "'tp_ratio', which is not a field of the token reducer 'stp'"),
        ({"use_auxiliary_heads": True}, "does not support auxiliary heads"),
    ],
)
def test_what_it_cannot_do(fields, message):
    with pytest.raises(ValueError, match=message):
        CroprViTModel(stp_config(**fields))


def test_gates_of_all_stages_multiply():
    model = make_model(CroprViTModel, stp_config()).double().train()
    gates, state = [], make_state(model.config)
    for reducer, num_keep in zip(model.token_reducers.values(), KEPT):
        state = reducer.after_block(state, num_keep)
        gates.append(state.columns["gates"])
    assert all(gate.shape == (2, 1 + count) and (gate == 1).all() for gate, count in zip(gates, KEPT))
    for count, gate in enumerate(gates, start=1):
        weights = torch.randn(gate.shape, dtype=torch.float64)
        for index, reducer in enumerate(itertools.islice(model.token_reducers.values(), count)):
            (found,) = torch.autograd.grad((gate * weights).sum(), reducer.predictor.fc3.weight, retain_graph=True)
            assert found.abs().max() > 1e-6, (count, index)
