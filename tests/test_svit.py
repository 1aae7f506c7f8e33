"""SViT packed, masked, and image by image in a loop; its gates, their loss, and figures of the specification."""

import pytest
import torch
from torch import nn

from cropr_hf import CroprViTBackbone, CroprViTConfig, CroprViTForImageClassification, CroprViTModel
from cropr_hf.methods.svit import RATIO_LOSS, Gate
from cropr_hf.token_state import TokenState, bias_of, draw_decisions, pack_tokens
from tests.common import (
    NUM_LABELS,
    assert_close_relative,
    full,
    make_images,
    make_model,
    tiny_config,
)


def svit_config(eval_mode="threshold", keep_rate=None, **overrides):
    settings = {"eval_mode": eval_mode, **overrides.pop("reducer_config", {})}
    settings |= {} if keep_rate is None else {"keep_rate": keep_rate}
    return tiny_config(
        "plain", **{"token_reducer": "svit", "pruning_rate": None, "reducer_config": settings, **overrides}
    )


class FixedGate(nn.Module):
    """In place of a gate: lets through what a table (B, N) says."""

    def __init__(self, keeps):
        super().__init__()
        self.keeps = keeps

    def forward(self, patches):
        sure = patches.new_tensor([0.0, -50.0])
        return torch.where(self.keeps[: len(patches), :, None], sure, sure.flip(0))


def fix_gates(model, tables):
    for reducer, keeps in zip(model.base_model.token_reducers.values(), tables):
        reducer.gate = FixedGate(keeps)
    return model


def random_tables(batch_size, num_patches=16, modules=4):
    generator = torch.Generator().manual_seed(0)
    shares = torch.linspace(0.2, 0.9, batch_size)[:, None]  # images differ in how many they keep
    return [torch.rand(batch_size, num_patches, generator=generator) < shares for _ in range(modules)]


def one_by_one(model, pixels, tables):
    """Each image alone: blocks run on what takes part, the rest passes as it is."""
    state, _ = model.embed(pixels)
    prefix, positions, images = state.num_prefix_tokens, state.rotations.get("image"), []
    for image in range(len(pixels)):
        states = state.hidden_states[image : image + 1].clone()
        for block, layer in enumerate(model.layers, start=1):
            keeps = torch.ones(states.shape[1], dtype=torch.bool)
            if str(block - 1) in model.token_reducers:
                keeps[prefix:] = tables[block - 2][image]
            if not keeps.any():
                continue
            turned = None if positions is None else tuple(each[:, keeps] for each in positions)
            new = states.clone()
            new[:, keeps] = layer(states[:, keeps], turned)
            states = new
        images.append(states)
    return torch.cat(images)


@pytest.mark.parametrize("fields", [{}, *full({"rope_theta": 100.0, "num_register_tokens": 1})])
@torch.no_grad()
def test_packed_masked_and_single_images_agree(fields):
    """In float64, batch of unlike numbers, and the batch in another order."""
    tables, pixels = random_tables(4), make_images(4).double()
    model = make_model(CroprViTModel, svit_config(use_final_norm=False, **fields)).double().eval()
    fix_gates(model, tables)
    expected = one_by_one(model, pixels, tables)
    packed = model(pixels, output_pruning=True)
    assert_close_relative(packed.last_hidden_state, expected, 1e-12)
    counts = torch.stack([torch.full((4,), 16), *(keeps.sum(dim=1) for keeps in tables)], dim=1)
    assert packed.patches_per_block.tolist() == counts.tolist()
    for reducer in model.token_reducers.values():
        reducer.packs = False
    masked = model(pixels, output_pruning=True)
    assert_close_relative(masked.last_hidden_state, expected, 1e-12)
    assert torch.equal(masked.pruned_after_block, packed.pruned_after_block)
    assert torch.equal(masked.token_indices, packed.token_indices)
    order = torch.tensor([2, 0, 3, 1])
    fix_gates(model, [keeps[order] for keeps in tables])
    assert_close_relative(model(pixels[order]).last_hidden_state, expected[order], 1e-12)


@torch.no_grad()
def test_training_masks_as_inference_packs():
    tables, pixels = random_tables(3), make_images(3).double()
    model = fix_gates(make_model(CroprViTModel, svit_config(use_final_norm=False)).double(), tables)
    assert_close_relative(model.train()(pixels).last_hidden_state, model.eval()(pixels).last_hidden_state, 1e-12)


@pytest.mark.parametrize("eval_mode", ["threshold", "sample"])
@torch.no_grad()
def test_open_gates_are_the_plain_model(eval_mode):
    pixels = make_images(2)
    plain = make_model(CroprViTForImageClassification, svit_config(token_reducer=None, reducer_config={})).eval()
    model = make_model(CroprViTForImageClassification, svit_config(eval_mode)).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    for reducer in model.base_model.token_reducers.values():
        nn.init.zeros_(reducer.gate.fc2.weight)
        reducer.gate.fc2.bias.copy_(torch.tensor([50.0, -50.0]))
    expected = plain(pixels).logits
    for training in (False, True):
        outputs = model.train(training)(pixels)
        torch.testing.assert_close(outputs.logits, expected, rtol=0, atol=1e-5)
    encoder = model.eval().base_model(pixels, output_pruning=True)
    assert (encoder.patches_per_block == 16).all() and (encoder.pruned_after_block == 5).all()


@torch.no_grad()
def test_what_idles_stays_bit_for_bit_and_may_come_back():
    config = svit_config(out_features=[f"stage{n}" for n in range(1, 6)], apply_layernorm=False)
    model, tables = make_model(CroprViTBackbone, config).eval(), random_tables(2)
    tables[1] = torch.zeros(2, 16, dtype=torch.bool)  # block 3: the CLS token alone
    fix_gates(model, tables)
    pixels = make_images(2)
    maps = [each.flatten(2).mT for each in model(pixels).feature_maps]
    for keeps, earlier, later in zip(tables, maps, maps[1:]):
        same = (later == earlier).all(dim=-1)
        assert torch.equal(same, ~keeps)
    encoder = model.cropr_vit
    states = encoder(pixels, output_hidden_states=True).hidden_states
    alone = encoder.layers[2](states[2][:, :1])
    torch.testing.assert_close(states[3][:, :1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("packs", [True, False])
@torch.no_grad()
def test_an_image_of_which_nothing_takes_part_stays_as_it_is(packs):
    """Without prefix tokens, where attention would have nothing to attend to."""
    fields = {"use_cls_token": False, "pooling": "mean", "use_final_norm": False}
    model = make_model(CroprViTModel, svit_config(reducer_config={"packs": packs}, **fields)).eval()
    tables = random_tables(3)
    for keeps in tables:
        keeps[1] = False
    fix_gates(model, tables)
    pixels = make_images(3)
    found, expected = model(pixels).last_hidden_state, one_by_one(model, pixels, tables)
    assert_close_relative(found, expected, 1e-5)
    state, _ = model.embed(pixels)
    assert torch.equal(found[1], model.layers[0](state.hidden_states)[1])
    assert_close_relative(
        fix_gates(model, [keeps & False for keeps in tables])(pixels).last_hidden_state[1], found[1], 0
    )


def test_the_best_of_each_image_as_many_as_the_schedule_says():
    config = svit_config("topk")
    assert config.kept_patches() == [11, 11, 7, 5, 5] and config.pruning_blocks == [1, 2, 3, 4]
    model = make_model(CroprViTModel, config).eval()
    with torch.no_grad():
        outputs = model(make_images(3), output_pruning=True)
    assert outputs.patches_per_block.tolist() == [[16, 11, 11, 7, 5]] * 3
    large = CroprViTConfig.from_size("small", token_reducer="svit")  # 3 dense blocks, then thirds
    assert large.kept_patches() == [196] * 2 + [137] * 3 + [96] * 3 + [67] * 4


def test_gates_learn_by_what_they_let_through_and_by_their_share():
    torch.manual_seed(0)
    model = make_model(CroprViTForImageClassification, svit_config()).train()
    outputs = model(make_images(4), labels=torch.arange(4) % NUM_LABELS)
    assert [*outputs.method_losses] == [RATIO_LOSS]
    torch.testing.assert_close(outputs.loss.detach(), outputs.main_loss + outputs.method_losses[RATIO_LOSS])
    reducers = model.base_model.token_reducers.values()
    gates = [parameter for reducer in reducers for parameter in reducer.gate.fc2.parameters()]
    for gradient in torch.autograd.grad(outputs.loss, gates):
        assert gradient.abs().max() > 0
    for reducer in reducers:
        reducer.loss_weight = 0.0
    loss = model(make_images(4), labels=torch.arange(4) % NUM_LABELS).loss
    assert all(gradient.abs().max() > 0 for gradient in torch.autograd.grad(loss, gates))
    assert model.eval()(make_images(2), labels=torch.tensor([0, 1])).method_losses is None


def test_the_ratio_loss_is_that_of_the_specification():
    """A mean share of 0.6 in every block where 0.7 are asked for: 0.01, times 4."""
    config = svit_config(pruning_schedule=[70] * 5, image_size=80, reducer_config={"ratio_loss_weight": 4.0})
    keeps = torch.arange(100).expand(2, -1) < torch.tensor([[50], [70]])
    model = fix_gates(make_model(CroprViTForImageClassification, config), [keeps] * 4).train()
    losses = model(make_images(2, 80, 80), labels=torch.tensor([0, 1])).method_losses
    assert losses[RATIO_LOSS].item() == pytest.approx(0.04, rel=1e-5)


def test_decisions_are_exactly_zero_or_one_and_as_frequent_as_their_probability():
    torch.manual_seed(0)
    log_probabilities = torch.randn(1, 12, 2).log_softmax(dim=-1)
    drawn = draw_decisions(log_probabilities.expand(2000, -1, -1))
    assert {*drawn.unique().tolist()} == {0.0, 1.0}
    assert (drawn.mean(dim=0) - log_probabilities[0, :, 0].exp()).abs().max() < 0.06


def test_an_undecided_gate_idles():
    model = make_model(CroprViTModel, svit_config()).eval()
    for reducer in model.token_reducers.values():
        nn.init.zeros_(reducer.gate.fc2.weight)
        nn.init.zeros_(reducer.gate.fc2.bias)
    with torch.no_grad():
        assert model(make_images(2), output_pruning=True).patches_per_block[:, 1:].max() == 0


@pytest.mark.full
@torch.no_grad()
def test_graphs_mask():
    torch.compiler.reset()
    model, pixels = fix_gates(make_model(CroprViTModel, svit_config()).eval(), random_tables(2)), make_images(2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(pixels).last_hidden_state, model(pixels).last_hidden_state, rtol=0, atol=1e-5)


def test_padding_takes_no_part():
    config = svit_config(prune_padding_first=True)
    model = fix_gates(make_model(CroprViTModel, config), [torch.ones(2, 16, dtype=torch.bool)] * 4)
    mask = torch.ones(2, 32, 32)
    mask[1, 16:] = 0
    with torch.no_grad():
        for training in (False, True):
            outputs = model.train(training)(make_images(2), pixel_mask=mask, output_pruning=True)
            assert outputs.patches_per_block[:, 1:].tolist() == [[16] * 4, [8] * 4]


@pytest.mark.parametrize("seed", range(20))
def test_packing(seed):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(3, 9, generator=generator) < torch.rand(3, 1, generator=generator)
    chosen[0, 4] = True
    indices, is_real = pack_tokens(chosen)
    assert indices.shape == is_real.shape == (3, chosen.sum(dim=1).max())
    for image in range(3):
        assert indices[image][is_real[image]].tolist() == chosen[image].nonzero().flatten().tolist()
    bias = bias_of(chosen)
    assert torch.equal(bias == 0, chosen | ~chosen.any(dim=1, keepdim=True))


def test_tokens_with_columns_cannot_be_parked():
    state = TokenState(torch.randn(2, 5, 8), torch.arange(5)[None], num_prefix_tokens=1)
    state = state.updated(columns={"sizes": torch.ones(2, 5)})
    with pytest.raises(ValueError, match="Tokens were pruned or merged, or have columns"):
        state.park_by(torch.ones(2, 5), 1, packs=True)


@pytest.mark.parametrize("eval_mode", ["topk", "sample"])
def test_kernels_without_a_bias_of_keys(eval_mode):
    model = make_model(CroprViTModel, svit_config(eval_mode))
    assert type(model.token_reducers["1"]).uses_key_bias(model.config) == (eval_mode == "sample")
    if eval_mode == "sample":
        with pytest.raises(ValueError, match="adds a bias to attention logits"):
            model.set_attn_implementation("flash_attention_2")


def test_a_gate_is_read_in_float32():
    gate = Gate(svit_config()).bfloat16()
    probabilities = gate(torch.randn(2, 5, 32).bfloat16()).exp()
    assert probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(2, 5))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reducer_config": {"eval_mode": "best"}}, "`eval_mode` is 'best'; choose one of topk, threshold, sample"),
        ({"reducer_config": {"ratio_loss_weight": -1.0}}, "`ratio_loss_weight` is -1.0"),
        ({"reducer_config": {"first_block": 1}}, "`first_block` of SViT is 1; with 5 blocks it must be in 2 to 5"),
        ({"keep_rate": 0.0}, "`keep_rate` is 0.0"),
    ],
)
def test_what_it_cannot_do(fields, message):
    with pytest.raises(ValueError, match=message):
        CroprViTModel(svit_config(**fields))
