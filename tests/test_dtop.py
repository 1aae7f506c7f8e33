"""DToP against a loop over images, blocks, heads and tokens; its losses, what it refuses, and the tools, which other
methods try on classifiers."""

import itertools
import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForSemanticSegmentation, SegformerImageProcessor

from cropr_hf import (
    TOKEN_REDUCERS,
    CroprViTBackbone,
    CroprViTConfig,
    CroprViTForImageClassification,
    CroprViTForInstanceSegmentation,
    CroprViTForObjectDetection,
    CroprViTForSemanticSegmentation,
    CroprViTModel,
    curriculum_schedule,
    evaluate_schedules,
)
from cropr_hf.methods.dtop import find_easy
from cropr_hf.publishing.export import export_model
from cropr_hf.publishing.hub import save_for_hub
from cropr_hf.speed.benchmark import BenchmarkArguments, pruning_candidates, run
from cropr_hf.speed.cost import multiply_adds
from cropr_hf.token_state import TokenState, put_tokens
from cropr_hf.training import CroprTrainer
from tests.common import (
    DETECTOR,
    NUM_BLOCKS,
    NUM_LABELS,
    TINY,
    assert_close_relative,
    enable_activation_checkpointing,
    full,
    label_maps,
    make_images,
    make_model,
    tiny_config,
)
from tests.test_examples import digits_command, history
from tests.test_training import training_arguments


BLOCKS = [2, 3]  # of 5
MIXED = {"threshold": 0.5, "k": 1}  # with random weights some patches leave, and images differ in how many
VARIANTS = {
    "cls": {},
    "no_cls": {"use_cls_token": False, "pooling": "patch_mean"},
    "rope_registers": {"rope_theta": 100.0, "num_register_tokens": 2},
    "norm_before_pooling": {"norm_before_pooling": True},
    "three_heads": {"reducer_config": {**MIXED, "blocks": [1, 2, 4]}},
}


def dtop_config(settings=None, **overrides):
    settings = overrides.pop("reducer_config", MIXED if settings is None else settings)
    return tiny_config(
        "plain", **{"token_reducer": "dtop", "pruning_rate": None, "reducer_config": settings, **overrides}
    )


def segmenter(settings=None, **overrides):
    return make_model(CroprViTForSemanticSegmentation, dtop_config(settings, **overrides))


def heads_of(model):
    return [reducer.head for reducer in model.base_model.token_reducers.values()]


def by_patch(logits):
    """(B, C, rows, columns) -> (B, rows * columns, C)"""
    return logits.flatten(2).mT


def set_threshold(model, threshold):
    for reducer in model.base_model.token_reducers.values():
        reducer.threshold = threshold
    return model


def mask_instead_of_packing(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


@torch.no_grad()
def one_by_one(model, image):
    """One image (1, 3, height, width), in loops over tokens.

    Returns:
        Logits (patches, C), and the block after which each patch left.
    """
    base, config = model.cropr_vit, model.config
    state, _ = base.embed(image)
    states, prefix = state.hidden_states[0], config.num_prefix_tokens
    places, positions = [*range(len(states))], state.rotations.get("image")
    logits, blocks = {}, dict.fromkeys(places[prefix:], config.num_hidden_layers)
    for block, layer in enumerate(base.layers, start=1):
        states = layer(states[None], positions and tuple(each[:, places] for each in positions))[0]
        if str(block) not in base.token_reducers:
            continue
        reducer, sure = base.token_reducers[str(block)], {}
        for place, token in zip(places[prefix:], states[prefix:]):
            logits[place] = reducer.head.classifier(reducer.head.norm(token))
            probability, label = logits[place].softmax(dim=0).max(dim=0)
            if probability > reducer.threshold:
                sure.setdefault(label.item(), []).append((-probability.item(), place))
        for of_label in sure.values():
            for _, place in sorted(of_label)[reducer.k :]:
                blocks[place] = block
        stay = [index for index, place in enumerate(places) if blocks.get(place, NUM_BLOCKS) == NUM_BLOCKS]
        states, places = states[stay], [places[index] for index in stay]
    for place, token in zip(places[prefix:], states[prefix:]):
        logits[place] = model.classifier(base.layernorm(token))
    return torch.stack([logits[place] for place in sorted(logits)]), [blocks[place] for place in sorted(blocks)]


# Which patches leave


@pytest.mark.parametrize("seed", range(20))
def test_the_rule_against_a_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    probabilities = (2 * torch.randn(3, 23, 4, generator=generator)).softmax(dim=-1)
    probabilities[0, 12:] = probabilities[0, :11]  # equal ones: the first stay
    present = torch.rand(3, 23, generator=generator) < 0.8 if seed % 2 else None
    threshold, k = [0.4, 0.7, -1.0, 0.9][seed % 4], 1 + seed % 5
    found = find_easy(probabilities, threshold, k, present)
    for image in range(3):
        expected = set()
        for label in range(4):
            tokens = [
                token
                for token in range(23)
                if (present is None or present[image, token])
                and probabilities[image, token].argmax() == label
                and probabilities[image, token, label] > threshold
            ]
            expected |= {*sorted(tokens, key=lambda token: -probabilities[image, token, label])[k:]}
        assert {*found[image].nonzero().flatten().tolist()} == expected


def test_what_just_reaches_the_threshold_stays():
    probabilities = torch.tensor([[[0.5, 0.5], [0.75, 0.25], [0.75, 0.25], [1.0, 0.0]]])
    assert find_easy(probabilities, 0.75, 1).tolist() == [[False] * 4]
    assert find_easy(probabilities, 0.5, 1).tolist() == [[False, True, True, False]]
    assert find_easy(probabilities, 1, 1).tolist() == [[False] * 4]


@pytest.mark.parametrize("k", [1, 5])
@torch.no_grad()
def test_below_every_probability_only_the_best_of_each_class_stay(k):
    model = set_threshold(segmenter({"k": k}), -1.0)
    base, images = model.cropr_vit, make_images(3, 64, 48)
    outputs = base(images, output_pruning=True, output_hidden_states=True)
    best, classes = heads_of(model)[0](outputs.hidden_states[2][:, 1:]).softmax(dim=-1).max(dim=-1)
    for image in range(3):
        stays = {patch for patch, block in enumerate(outputs.pruned_after_block[image].tolist()) if block > 2}
        expected = set()
        for label in range(NUM_LABELS):
            of_label = [patch for patch in range(48) if classes[image, patch] == label]
            expected |= {*sorted(of_label, key=lambda patch: -best[image, patch])[:k]}
        assert stays == expected
        assert outputs.patches_per_block[image, 2] == len(stays)


@pytest.mark.parametrize("threshold", [1, 1.5])
@torch.no_grad()
def test_with_a_threshold_of_one_it_is_the_dense_model(threshold):
    model, images = segmenter(), make_images(3, 40, 48)
    plain = make_model(CroprViTForSemanticSegmentation, dtop_config(token_reducer=None, reducer_config=None))
    plain.load_state_dict(model.state_dict(), strict=False)
    expected = plain(images).logits
    assert (model(images).logits - expected).abs().max() > 0.1
    set_threshold(model, threshold)
    for training in (False, True):
        assert_close_relative(model.train(training)(images).logits, expected, 1e-6)
    model.eval().set_pruning(0)  # a schedule that keeps all does the same, whatever the threshold
    set_threshold(model, 0.0)
    assert_close_relative(model(images).logits, expected, 1e-6)


@pytest.mark.parametrize("variant", ["cls", "rope_registers", *full("no_cls", "norm_before_pooling", "three_heads")])
@pytest.mark.parametrize(("height", "width"), [(40, 56), *full((32, 32), (37, 27))])
def test_packed_masked_trained_and_single_images_are_a_loop_over_tokens(variant, height, width, monkeypatch):
    """In float64; what leaves has the prediction of its head, what stays that of the classifier."""
    model, images = segmenter(**VARIANTS[variant]).double(), make_images(4, height, width).double()
    grid = (-(-height // 8), -(-width // 8))
    padded = F.pad(images, (0, 8 * grid[1] - width, 0, 8 * grid[0] - height))
    expected, blocks = zip(*(one_by_one(model, image[None]) for image in padded))
    expected = model.map_of_patches(torch.stack(expected), grid, (height, width)).double()
    numbers = torch.tensor([[sum(left >= block for left in each) for block in range(1, 6)] for each in blocks])
    assert (numbers[:, -1].amax() > numbers[:, -1].amin()) and {*blocks[0]} > {5}
    tolerance = 1e-12 if (height, width) == (8 * grid[0], 8 * grid[1]) else 1e-5  # maps are upsampled in float32

    def check(images=images, expected=expected, blocks=blocks):
        outputs = model(images, output_pruning=True)
        assert outputs.logits.shape[2:] == (grid if tolerance == 1e-12 else (height, width))
        assert_close_relative(outputs.logits, expected, tolerance)
        assert outputs.pruned_after_block.tolist() == [*blocks]

    with torch.no_grad():
        assert torch.equal(model.cropr_vit(padded, output_pruning=True).patches_per_block, numbers)
        check()
        for index in range(4):
            check(images[index : index + 1], expected[index : index + 1], blocks[index : index + 1])
        order = torch.tensor([2, 0, 3, 1])
        check(images[order], expected[order], [blocks[index] for index in order])
        with monkeypatch.context() as patch:
            mask_instead_of_packing(patch)
            check()
    model.train()
    check()


@pytest.mark.parametrize("packs", [True, False])
@torch.no_grad()
def test_what_has_no_place_any_more_changes_nothing(packs, monkeypatch):
    """Rows of patches that left, and those that fill up a batch, may hold anything."""
    model, images = segmenter().double(), make_images(3).double()
    if not packs:
        mask_instead_of_packing(monkeypatch)
    expected, dropped = model(images).logits, []
    own = TokenState.drop

    def drop(self, *args, **kwargs):
        state = own(self, *args, **kwargs)
        absent = (state.token_indices == state.num_places)[..., None]
        dropped.append(absent.sum().item())
        noise = 100 * torch.randn_like(state.hidden_states)
        return state.updated(hidden_states=torch.where(absent, noise, state.hidden_states))

    monkeypatch.setattr(TokenState, "drop", drop)
    assert_close_relative(model(images).logits, expected, 1e-12)
    assert len(dropped) == 2 and all(dropped)


@torch.no_grad()
def test_the_last_classifier_decides_about_those_that_are_left_alone():
    model, images = segmenter(), make_images(2)
    before = model(images, output_pruning=True)
    nn.init.normal_(model.classifier.weight)
    after = by_patch(model(images).logits)
    same = (after == by_patch(before.logits)).all(dim=-1)
    assert torch.equal(same, before.pruned_after_block < NUM_BLOCKS) and same.any() and not same.all()


@torch.no_grad()
def test_what_left_never_comes_back():
    model, images, seen = segmenter(VARIANTS["three_heads"]["reducer_config"]), make_images(2), []
    for reducer in model.cropr_vit.token_reducers.values():
        own = reducer.leave_by_threshold
        reducer.leave_by_threshold = lambda *args, own=own: seen.append(own(*args)) or seen[-1]
    model(images)
    assert len(seen) == 3
    for image in range(2):
        places = [{*state.token_indices[image].tolist()} - {state.num_places} for state in seen]
        assert places[0] >= places[1] >= places[2] > {0} and places[0] > places[2]


@torch.no_grad()
def test_calls_leave_nothing_behind():
    model, images = segmenter(), make_images(3, 40, 48)
    expected = model(images).logits
    model(make_images(1, seed=1))
    assert torch.equal(model(images).logits, expected)


@pytest.mark.parametrize("settings", [MIXED, {"threshold": None}])
@torch.no_grad()
def test_padding_leaves_at_once(settings):
    model = segmenter(settings, prune_padding_first=True)
    mask = torch.ones(2, 32, 32)
    mask[1, 16:] = 0
    outputs = model(make_images(2), pixel_mask=mask, output_pruning=True)
    left = outputs.pruned_after_block == 2
    kept = model.config.kept_patches()[1] if settings["threshold"] is None else 8
    assert left[1, 8:].sum() == min(8, 16 - kept)


@pytest.mark.parametrize("seed", range(5))
def test_tokens_are_put_at_their_places(seed):
    generator = torch.Generator().manual_seed(seed)
    table, tokens = torch.randn(2, 7, 3, generator=generator), torch.randn(2, 5, 3, generator=generator)
    indices = torch.stack([torch.randperm(7, generator=generator)[:5] for _ in range(2)])
    indices[1, 2:] = 7
    expected = table.clone()
    for image, position in itertools.product(range(2), range(5)):
        if indices[image, position] < 7:
            expected[image, indices[image, position]] = tokens[image, position]
    assert torch.equal(put_tokens(table, indices, tokens), expected)
    assert torch.equal(put_tokens(table, indices[:1], tokens)[0], expected[0])


# The schedule


@pytest.mark.parametrize(
    ("size", "settings", "blocks"),
    [("base", {}, [6, 8]), ("large", {}, [12, 16]), ("large", {"blocks": [8, 16]}, [8, 16])],
)
def test_where_the_heads_are(size, settings, blocks):
    config = CroprViTConfig.from_size(size, token_reducer="dtop", reducer_config=settings, num_labels=150)
    assert config.pruning_blocks == blocks
    first, second = blocks
    kept = [196] * (first - 1) + [137] * (second - first) + [95] * (config.num_hidden_layers - second + 1)
    assert config.kept_patches() == kept


@pytest.mark.parametrize("training", [False, True])
def test_without_a_threshold_the_least_sure_stay_as_many_as_the_schedule_says(training):
    model, images = segmenter({"threshold": None, "keep_rate": 0.6}).train(training), make_images(3)
    assert model.config.kept_patches() == [16, 9, 5, 5, 5]
    base = model.cropr_vit(images, output_pruning=True, output_hidden_states=True)
    assert base.patches_per_block.tolist() == [[16, 16, 9, 5, 5]] * 3
    sure = heads_of(model)[0](base.hidden_states[2][:, 1:]).softmax(dim=-1).amax(dim=-1)
    for image in range(3):
        expected = sorted(sure[image].argsort()[:9].tolist())
        assert (base.pruned_after_block[image] > 2).nonzero().flatten().tolist() == expected
    if training:
        outputs = model(images, **label_maps(model.config, images))
        outputs.loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("settings", [MIXED, {"threshold": None}])
def test_schedules_are_set_and_compared(settings):
    model = segmenter(settings)
    for progress in (0.0, 0.5, 1.0):
        model.set_pruning(curriculum_schedule(model.config, progress))
        assert model(make_images()).logits.shape == (2, NUM_LABELS, 4, 4)
    record = evaluate_schedules(
        model, [0, None], lambda model: 1.0, make_images(1), min_rounds=3, max_rounds=3, tolerance=1.0
    )
    assert [point["kept_patches"] for point in record["points"]] == [[16] * 5, model.config.kept_patches()]
    assert record["points"][0]["multiply_adds"] > record["points"][1]["multiply_adds"]


@pytest.mark.parametrize("settings", [{}, {"threshold": None}])
def test_multiply_adds_count_the_heads(settings):
    config = dtop_config(settings)
    kept = config.kept_patches()
    assert kept == [16, 11, 7, 7, 7]
    random = tiny_config(token_reducer="random", pruning_rate=None, pruning_schedule=kept, last_layer_fusion=False)
    heads = (16 + 11) * config.hidden_size * NUM_LABELS
    assert multiply_adds(config) - multiply_adds(random) == heads


# Losses


@pytest.mark.parametrize(("size", "smoothing"), [((32, 32), 0.0), ((37, 27), 0.1)])
def test_each_head_has_the_loss_of_the_segmenter(size, smoothing):
    model, images = segmenter(label_smoothing=smoothing).train(), make_images(2, *size)
    labels = label_maps(model.config, images)["labels"]
    outputs = model(images, labels=labels)
    grid = (-(-size[0] // 8), -(-size[1] // 8))
    padded = F.pad(images, (0, -size[1] % 8, 0, -size[0] % 8))
    exits = model.cropr_vit(padded).exit_logits
    assert [*outputs.method_losses] == ["exit_loss_2", "exit_loss_3"] and len(exits) == 2
    assert outputs.auxiliary_losses is None
    for logits, loss in zip(exits, outputs.method_losses.values()):
        of_pixels = F.interpolate(logits.mT.unflatten(2, grid), padded.shape[2:], mode="bilinear")
        of_pixels = of_pixels[..., : size[0], : size[1]]
        expected = F.cross_entropy(of_pixels, labels, ignore_index=255, label_smoothing=smoothing)
        assert_close_relative(loss, expected.detach())
    assert_close_relative(outputs.loss.detach(), outputs.main_loss + sum(outputs.method_losses.values()))
    outputs.loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    evaluated = model.eval()(images, labels=labels)
    assert {*evaluated.keys()} == {"loss", "logits"}


def test_what_left_keeps_its_prediction_in_later_losses_with_its_gradient():
    model, images, first = segmenter().train(), make_images(2), []
    heads_of(model)[0].register_forward_hook(lambda module, args, output: first.append(output))
    outputs = model.cropr_vit(images, output_pruning=True)
    labels = torch.randint(NUM_LABELS, (2, 32, 32))

    def gradient(logits):
        maps = F.interpolate(model.map_of_patches(logits, (4, 4), (32, 32)), (32, 32), mode="bilinear")
        return torch.autograd.grad(model.segmentation_loss(maps, labels), first[0], retain_graph=True)[0]

    left = outputs.pruned_after_block == 2
    assert left.any() and not left.all()
    assert torch.equal((gradient(outputs.exit_logits[1]) != 0).any(dim=-1), left)
    assert (gradient(outputs.exit_logits[0]) != 0).any(dim=-1).all()
    assert torch.equal(outputs.exit_logits[1][left], first[0][left])
    # And so it is in the logits of the model.
    logits = by_patch(model(images).logits)
    assert torch.equal(logits[left], first[-1][left])
    (of_logits,) = torch.autograd.grad(logits.square().sum(), first[-1])
    assert torch.equal((of_logits != 0).any(dim=-1), left)


class Oracle(nn.Module):
    """In place of a head or of the classifier: sure of one class for each image."""

    def forward(self, patches):
        classes = torch.arange(len(patches)) % NUM_LABELS
        return 50.0 * F.one_hot(classes, NUM_LABELS)[:, None].to(patches.dtype).expand(-1, patches.shape[1], -1)


def test_perfect_predictions_have_no_loss():
    model = segmenter().train()
    model.classifier = Oracle()
    for reducer in model.cropr_vit.token_reducers.values():
        reducer.head = Oracle()
    labels = torch.arange(2)[:, None, None].expand(-1, 32, 32)
    outputs = model(make_images(2), labels=labels, output_pruning=True)
    assert outputs.loss < 1e-6 and len(outputs.method_losses) == 2
    assert ((outputs.pruned_after_block == 2).sum(dim=1) == 15).all()  # and one stays for the context


@pytest.mark.parametrize("use_reentrant", [False, *full(True)])
@pytest.mark.parametrize("settings", [MIXED, *full({"threshold": None})])
def test_checkpointing_gives_equal_gradients(use_reentrant, settings):
    gradients = []
    for checkpoints in (False, True):
        model, images = segmenter(settings).train(), make_images(2)
        if checkpoints:
            enable_activation_checkpointing(model, use_reentrant=use_reentrant)
        model(images, **label_maps(model.config, images)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


class PaintedPatches(torch.utils.data.Dataset):
    """Every patch has the colour of its class, some with so much noise that others have to tell."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        halves = torch.randint(3, (2,), generator=generator)
        labels = halves.repeat_interleave(16)[:, None].expand(32, 32)
        pixels = 0.3 * torch.randn(3, 32, 32, generator=generator)
        colours = 2.0 * F.one_hot(labels, 3).movedim(-1, 0)
        hard = torch.rand(4, 4, generator=generator) < 0.25
        hard = hard.repeat_interleave(8, dim=0).repeat_interleave(8, dim=1)
        return {"pixel_values": pixels + colours.where(~hard, 0.0), "labels": labels}


@pytest.mark.full
@pytest.mark.parametrize("seed", range(3))
def test_easy_patches_learn_to_leave(seed, tmp_path):
    torch.manual_seed(seed)
    fields = {"num_labels": 3, "initializer_range": 0.02, "semantic_loss_ignore_index": 255}
    model = CroprViTForSemanticSegmentation(dtop_config({"threshold": 0.9, "k": 1}, **fields))
    arguments = training_arguments(tmp_path, num_train_epochs=25, learning_rate=2e-3, seed=seed)
    trainer = CroprTrainer(model, arguments, train_dataset=PaintedPatches())
    trainer.train()
    logged = trainer.state.log_history[-2]
    assert {"main_loss", "exit_loss_2", "exit_loss_3"} <= logged.keys()
    batch = trainer.data_collator([PaintedPatches()[index] for index in range(64)])
    with torch.no_grad():
        outputs = model.eval()(batch["pixel_values"].to(model.device), output_pruning=True)
    classes = outputs.logits.argmax(dim=1).cpu()
    assert (classes == batch["labels"][:, 4::8, 4::8]).float().mean() > 0.9
    left = outputs.pruned_after_block.cpu() < NUM_BLOCKS
    assert 0.3 < left.float().mean() < 1


# Tools


def test_folders_keep_heads_and_settings(tmp_path):
    model, images = segmenter(), make_images()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path, trust_remote_code=False).eval()
    assert loaded.config.reducer_config == MIXED and loaded.config.last_layer_fusion is False
    assert torch.equal(loaded(images).logits, model(images).logits)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert TOKEN_REDUCERS["dtop"].title in card and "tang2023dynamic" in card and "training-free" not in card
    other = AutoModelForSemanticSegmentation.from_pretrained(
        tmp_path, num_labels=3, ignore_mismatched_sizes=True, trust_remote_code=False
    )
    assert other(images).logits.shape == (2, 3, 4, 4)
    schedule = {"token_reducer": "random", "pruning_rate": 2, "last_layer_fusion": True}
    random = CroprViTForSemanticSegmentation.from_pretrained(tmp_path, **schedule)
    assert not [name for name in random.state_dict() if "token_reducers" in name]


def test_it_starts_from_any_vit_and_from_unpruned_segmenters(tiny_vit, tmp_path):
    model = CroprViTForSemanticSegmentation.from_vit(tiny_vit, token_reducer="dtop", num_labels=3)
    assert model.config.last_layer_fusion is False and model.config.pruning_blocks == [2]
    assert not model.config.use_auxiliary_heads
    unpruned = CroprViTForSemanticSegmentation.from_vit(tiny_vit, token_reducer=None, num_labels=3)
    unpruned.save_pretrained(tmp_path)
    begun = CroprViTForSemanticSegmentation.from_pretrained(tmp_path, token_reducer="dtop")
    assert torch.equal(begun.classifier.weight, unpruned.classifier.weight)
    weight = heads_of(begun)[0].classifier.weight
    assert weight.isfinite().all() and weight.std() > 0


@torch.no_grad()
def test_stock_post_processing_reads_the_map():
    model, images = segmenter(), make_images(2, 30, 27)
    outputs = model(images)
    maps = SegformerImageProcessor().post_process_semantic_segmentation(outputs, target_sizes=[(30, 27)] * 2)
    assert torch.equal(torch.stack(maps), outputs.logits.argmax(dim=1))


@pytest.mark.full
@pytest.mark.parametrize("settings", [MIXED, {"threshold": None}])
@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_exported_files_agree(settings, suffix, tmp_path):
    if suffix == ".onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    assert export_model(segmenter(settings), tmp_path / f"model{suffix}") < 1e-4


@pytest.mark.full
@pytest.mark.parametrize("settings", [MIXED, {"threshold": None}])
def test_graphs_have_no_break(settings):
    torch.compiler.reset()
    model, images = segmenter(settings), make_images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_close_relative(compiled(images).logits, model(images).logits)
    model.train()
    labels = label_maps(model.config, images)
    assert_close_relative(compiled(images, **labels).loss, model(images, **labels).loss)


@pytest.mark.parametrize("settings", [None, *full({"threshold": 0.7})])
def test_the_benchmark_times_what_the_schedule_says(settings):
    fields = {**TINY, "pruning_rate": None, "reducer_config": settings}
    arguments = BenchmarkArguments(
        task="semantic_segmentation",
        size="tiny",
        token_reducer="dtop",
        config=json.dumps(fields),
        batch_size=1,
        min_rounds=3,
        max_rounds=3,
    )
    record = run(arguments)
    assert {*record["results"]} == {"unpruned", "dtop", "random"}
    assert record["patches_kept"] == [16, 11, 7, 7, 7]
    config = dtop_config(settings)
    candidates = pruning_candidates(config, "semantic_segmentation")
    assert config.reducer_config == (settings or MIXED)
    with torch.no_grad():
        numbers = candidates["dtop"].cropr_vit.eval()(make_images(2), output_pruning=True).patches_per_block
    assert numbers.tolist() == [[16, 16, 11, 7, 7]] * 2
    assert candidates["random"].config.last_layer_fusion
    assert candidates["random"].config.kept_patches() == [16, 11, 7, 7, 7]


@pytest.mark.full
def test_the_training_script_takes_it(example, tiny_vit, tmp_path):
    command = digits_command(
        tiny_vit,
        tmp_path,
        token_reducer="dtop",
        reducer_config=json.dumps({"threshold": 0.2}),
        pruning_rate=8,
        learning_rate=1e-3,
        min_scale=0.8,
        max_scale=1.2,
    )
    metrics = example("train_semantic_segmentation").main(command)
    assert 0 <= metrics["eval_mean_iou"] <= 1
    assert {"main_loss", "exit_loss_2"} <= history(tmp_path)[0].keys()
    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path, trust_remote_code=False)
    assert model.config.token_reducer == "dtop" and model.config.reducer_config == {"threshold": 0.2}


FRESH = """
import sys, torch
sys.modules["cropr_hf"] = None  # as if it were not installed
from transformers import AutoModelForSemanticSegmentation
model = AutoModelForSemanticSegmentation.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
"""


@pytest.mark.full
def test_its_file_travels(tmp_path):
    model = segmenter()
    save_for_hub(model, tmp_path / "folder")
    torch.save(make_images(), tmp_path / "images.pt")
    names = (tmp_path / name for name in ("folder", "images.pt", "logits.pt"))
    command = [sys.executable, "-c", FRESH, *map(str, names)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(make_images()).logits, rtol=0, atol=1e-4)


# What it cannot do


@pytest.mark.parametrize(
    ("model_class", "fields"),
    [
        (CroprViTForImageClassification, {}),
        (CroprViTBackbone, {}),
        (CroprViTForObjectDetection, DETECTOR),
        (CroprViTForInstanceSegmentation, DETECTOR),
    ],
)
def test_other_tasks_are_refused(model_class, fields):
    message = f"'dtop' predicts a label map on the way, and {model_class.__name__} has none; choose another reducer"
    with pytest.raises(ValueError, match=message):
        model_class(dtop_config(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"settings": {"threshold": -1.0}}, r"`threshold` is -1.0; it must be in \[0, 1\], such as 0.9, or None"),
        ({"settings": {"threshold": float("nan")}}, "`threshold` is nan"),
        ({"settings": {"k": 0}}, "`k` is 0; at least 1 patch of each class must stay"),
        ({"settings": {"tresh": 0.5}}, "did you mean 'threshold'"),
        ({"settings": {"blocks": [5]}}, r"`blocks` of DToP has \[5\]"),
        (
            {"settings": {"keep_rate": 0.5}, "pruning_rate": 2},
            "has a `keep_rate`, and the configuration a `pruning_rate`",
        ),
        ({"num_labels": 1}, "DToP lets patches leave by the probability of their class, but `num_labels` is 1"),
        ({"use_auxiliary_heads": True}, "'dtop' does not support auxiliary heads"),
        ({"window_size": 2, "window_block_indices": [0]}, "does not support windowed attention"),
    ],
)
def test_what_it_cannot_do(fields, message):
    with pytest.raises(ValueError, match=message):
        CroprViTModel(dtop_config(**fields))


def test_kernels_without_a_bias_of_keys_follow_a_schedule():
    assert TOKEN_REDUCERS["dtop"].uses_key_bias(dtop_config({}))
    assert not TOKEN_REDUCERS["dtop"].uses_key_bias(dtop_config({"threshold": None}))
    with pytest.raises(ValueError, match="'dtop' adds a bias to attention logits"):
        segmenter().set_attn_implementation("flash_attention_2")


def test_patches_leave_for_good():
    assert dtop_config(last_layer_fusion=True).last_layer_fusion is False
    assert dtop_config().kept_patches() == [16, 11, 7, 7, 7]
