"""Cropr with numbers of tokens that follow the image: packed, masked in graphs, and image by image."""

import pytest
import torch

from cropr_hf import CroprViTBackbone, CroprViTForImageClassification, CroprViTForSemanticSegmentation, CroprViTModel
from cropr_hf.reducer_cropr import choose_by_mass
from tests.common import assert_close_relative, full, make_images, make_model, tiny_config


def build(model_class=CroprViTModel, mass=0.7, **overrides):
    """With scorers that have a mind of their own: untrained ones find all tokens nearly equal."""
    settings = {} if mass is None else {"reducer_config": {"mass_threshold": mass}}
    fields = {"use_auxiliary_heads": False, "pruning_rate": 2, **settings, **overrides}
    model = make_model(model_class, tiny_config(**fields)).double().eval()
    with torch.no_grad():
        for reducer in model.base_model.token_reducers.values():
            reducer.router.scorer.folded_query *= 8
    return model


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_against_a_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(3, 11, generator=generator)
    logits[1, 4:] = -torch.inf
    mass, most = (0.1 + 0.85 * torch.rand(1, generator=generator)).item(), 2 + seed % 9
    chosen = choose_by_mass(logits, mass, most)
    for image in range(3):
        weights, expected, held = logits[image].softmax(dim=0), set(), 0.0
        for token in logits[image].argsort(descending=True).tolist():
            if held >= mass or len(expected) == most:
                break
            expected.add(token)
            held += weights[token].item()
        assert {*chosen[image].nonzero().flatten().tolist()} == expected


def test_one_token_stays_whatever_the_logits():
    for logits in (torch.full((2, 5), torch.nan), torch.full((2, 5), -torch.inf)):
        assert choose_by_mass(logits, 0.5, 3).sum(dim=1).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("model_class", "fields"),
    [
        (CroprViTForImageClassification, {"pooling": "mean", "last_layer_fusion": False}),
        (CroprViTForSemanticSegmentation, {"rope_theta": 100.0, "num_register_tokens": 1}),
        *full(
            (CroprViTForImageClassification, {"pooling": "attention", "use_cls_token": False}),
            (CroprViTForImageClassification, {"pooling": "cls_patch_mean", "norm_before_pooling": True}),
            (CroprViTBackbone, {"out_indices": [1, 3, 5]}),
        ),
    ],
)
@torch.no_grad()
def test_packed_masked_and_single_images_agree(model_class, fields, monkeypatch):
    model, pixels = build(model_class, **fields), make_images(4).double()

    def run(images):
        outputs = model(images)
        return torch.cat([each.flatten(1) for each in getattr(outputs, "feature_maps", None) or [outputs.logits]], 1)

    counts = model.base_model(pixels, output_pruning=True).patches_per_block
    assert (counts.amax(dim=0) > counts.amin(dim=0)).any()  # images differ
    packed, single = run(pixels), torch.cat([run(image[None]) for image in pixels])
    assert_close_relative(packed, single, 1e-12)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert_close_relative(run(pixels), single, 1e-12)
    masked = model.base_model(pixels, output_pruning=True)
    assert torch.equal(masked.patches_per_block, counts)


@torch.no_grad()
def test_the_schedule_is_the_most_that_stays():
    pixels = make_images(4).double()
    outputs = {mass: build(mass=mass)(pixels, output_pruning=True) for mass in (None, 0.3, 0.7, 1.0)}
    most = outputs[None].patches_per_block
    assert torch.equal(outputs[1.0].patches_per_block, most)
    assert torch.equal(outputs[1.0].pruned_after_block, outputs[None].pruned_after_block)
    assert_close_relative(outputs[1.0].last_hidden_state, outputs[None].last_hidden_state, 1e-12)
    assert (outputs[0.3].patches_per_block <= outputs[0.7].patches_per_block).all()
    assert (outputs[0.7].patches_per_block <= most).all() and (outputs[0.7].patches_per_block < most).any()


@torch.no_grad()
def test_training_keeps_what_the_schedule_says():
    models = [build(mass=mass, use_final_norm=False).train() for mass in (None, 0.5)]
    pixels = make_images(2).double()
    assert torch.equal(*(model(pixels).last_hidden_state for model in models))


def test_mass_is_that_of_the_attention_of_the_query():
    """With one query the scores are the logits of its attention, which the aggregator applies."""
    model = make_model(CroprViTModel, tiny_config(use_auxiliary_heads=True, reducer_config={"mass_threshold": 0.5}))
    reducer = model.token_reducers["1"]
    tokens = torch.randn(2, 9, model.config.hidden_size)
    scorer = reducer.router.scorer
    attention = (scorer.queries @ tokens.mT * model.config.hidden_size**-0.5).softmax(dim=-1)[:, 0]
    torch.testing.assert_close((reducer.router(tokens) * reducer.scaling).softmax(dim=-1), attention)


@pytest.mark.full
@torch.no_grad()
def test_graphs_have_fixed_shapes():
    torch.compiler.reset()
    model, pixels = build(CroprViTForImageClassification), make_images(3).double()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close_relative(compiled(pixels).logits, model(pixels).logits, 1e-12)


def test_it_is_saved_and_can_be_changed(tmp_path):
    build(CroprViTForImageClassification).save_pretrained(tmp_path)
    loaded = CroprViTForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.reducer_config == {"mass_threshold": 0.7}
    assert loaded.cropr_vit.token_reducers["1"].mass_threshold == 0.7
    other = CroprViTForImageClassification.from_pretrained(tmp_path, reducer_config=None)
    assert other.cropr_vit.token_reducers["1"].mass_threshold is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mass": 0.0}, r"`mass_threshold` is 0.0; it must be in \(0, 1\]"),
        ({"mass": 1.5}, "`mass_threshold` is 1.5"),
        ({"mass": "most"}, "`reducer_config` of the token reducer 'cropr'"),
        ({"reducer_config": {"mas_threshold": 0.5}}, "did you mean 'mass_threshold'"),
        (
            {"window_size": 2, "window_block_indices": [0], "use_cls_token": False, "pooling": "mean"},
            "does not support windowed attention",
        ),
    ],
)
def test_what_it_cannot_do(fields, message):
    with pytest.raises(ValueError, match=message):
        build(**fields)
