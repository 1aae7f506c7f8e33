# Copyright 2026 The cropr_hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Detectors of EVA-02: a converted one computes what a plain reference computes from the same file.

The reference is written from the description of the architecture (arXiv 2303.11331, arXiv 2203.16527) and the names of
the weights, with windows and blocks in plain loops. It shares nothing with the model but `nms` of torchvision.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import nms

from cropr_hf import CroprViTConfig, CroprViTForInstanceSegmentation, CroprViTForObjectDetection, schedule_from_sides
from cropr_hf.conversion import convert_eva02_detector
from cropr_hf.conversion.eva02_detection import describe_eva02_detector
from cropr_hf.conversion.table import rename_weights
from tests.common import assert_close_relative


Weights = dict[str, torch.Tensor]

NET = "backbone.net."
STRIDES = (4, 8, 16, 32, 64)
ANCHOR_SIZES = (32, 64, 128, 256, 512)

# Another order of the same operations
assert_close = partial(assert_close_relative, tolerance=5e-5)


@dataclass(frozen=True)
class Size:
    """Sizes of a detector; `published` is that of `eva02_L_coco_det_sys_o365`."""

    hidden: int = 64
    heads: int = 4
    inner: int = 170
    depth: int = 6
    global_blocks: tuple[int, ...] = (2, 5)
    grid: int = 6
    window: int = 2
    channels: int = 16
    box_head: int = 24
    classes: int = 5
    masks: bool = True


SMALL = Size()
PUBLISHED = Size(1024, 16, 2730, 24, tuple(range(2, 24, 3)), 96, 16, 256, 1024, 80)


# ---- A file ---------------------------------------------------------------------------------------------------------


def layer(name: str, *shape: int, outputs: int | None = None) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": (outputs or shape[0],)}


def conv_norm(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, **layer(f"{name}.norm", shape[0])}


def shapes(size: Size) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all parameters."""
    hidden, inner, channels, box_head, classes = size.hidden, size.inner, size.channels, size.box_head, size.classes
    table: dict[str, tuple[int, ...]] = {f"{NET}pos_embed": (1, 14 * 14 + 1, hidden)}
    table |= layer(f"{NET}patch_embed.proj", hidden, 3, 16, 16)
    for index in range(size.depth):
        block = f"{NET}blocks.{index}."
        table |= {f"{block}attn.{part}_bias": (hidden,) for part in "qv"}
        table |= {f"{block}attn.{part}_proj.weight": (hidden, hidden) for part in "qkv"}
        table |= layer(f"{block}attn.proj", hidden, hidden)
        table |= layer(f"{block}norm1", hidden) | layer(f"{block}norm2", hidden)
        table |= layer(f"{block}mlp.w1", inner, hidden) | layer(f"{block}mlp.w2", inner, hidden)
        table |= layer(f"{block}mlp.ffn_ln", inner) | layer(f"{block}mlp.w3", hidden, inner)
    table |= layer("backbone.simfp_2.0", hidden, hidden // 2, 2, 2, outputs=hidden // 2)
    table |= layer("backbone.simfp_2.1", hidden // 2)
    table |= layer("backbone.simfp_2.3", hidden // 2, hidden // 4, 2, 2, outputs=hidden // 4)
    table |= layer("backbone.simfp_3.0", hidden, hidden // 2, 2, 2, outputs=hidden // 2)
    for level, first, inputs in ((2, 4, hidden // 4), (3, 1, hidden // 2), (4, 0, hidden), (5, 1, hidden)):
        table |= conv_norm(f"backbone.simfp_{level}.{first}", channels, inputs, 1, 1)
        table |= conv_norm(f"backbone.simfp_{level}.{first + 1}", channels, channels, 3, 3)
    for index in range(2):
        table |= layer(f"proposal_generator.rpn_head.conv.conv{index}", channels, channels, 3, 3)
    table |= layer("proposal_generator.rpn_head.objectness_logits", 3, channels, 1, 1)
    table |= layer("proposal_generator.rpn_head.anchor_deltas", 12, channels, 1, 1)
    for stage in range(3):
        for index in range(1, 5):
            table |= conv_norm(f"roi_heads.box_head.{stage}.conv{index}", channels, channels, 3, 3)
        table |= layer(f"roi_heads.box_head.{stage}.fc1", box_head, channels * 7 * 7)
        table |= layer(f"roi_heads.box_predictor.{stage}.cls_score", classes + 1, box_head)
        table |= layer(f"roi_heads.box_predictor.{stage}.bbox_pred", 4, box_head)
    if size.masks:
        for index in range(1, 5):
            table |= conv_norm(f"roi_heads.mask_head.mask_fcn{index}", channels, channels, 3, 3)
        table |= layer("roi_heads.mask_head.deconv", channels, channels, 2, 2)
        table |= layer("roi_heads.mask_head.predictor", classes, channels, 1, 1)
    return table


def rotary_tables(side: int, head_size: int) -> Weights:
    """Cosine and sine (side ** 2, head size): half of the channels turn with the row, half with the column."""
    half = head_size // 2
    frequencies = 10000.0 ** (-torch.arange(0, half, 2) / half)
    angles = (torch.arange(side) / side * 16)[:, None] * frequencies
    angles = angles.repeat_interleave(2, dim=1)  # neighbouring channels form a pair
    rows, columns = angles[:, None].expand(-1, side, -1), angles[None].expand(side, -1, -1)
    angles = torch.cat([rows, columns], dim=-1).reshape(side**2, head_size)
    return {"freqs_cos": angles.cos(), "freqs_sin": angles.sin()}


def buffers(size: Size) -> Weights:
    """The rotary tables of the whole model, and each block's copy."""
    head_size = size.hidden // size.heads
    whole, window = rotary_tables(size.grid, head_size), rotary_tables(size.window, head_size)
    owners = {f"{NET}rope_win": window, f"{NET}rope_glb": whole}
    for block in range(size.depth):
        owners[f"{NET}blocks.{block}.attn.rope"] = whole if block in size.global_blocks else window
    return {f"{owner}.{name}": tensor for owner, tables in owners.items() for name, tensor in tables.items()}


def random_weights(size: Size, seed: int = 0) -> Weights:
    """Nothing at a neutral value (0, 1, or equal channels)."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes(size).items():
        noise = torch.randn(shape, generator=generator)
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
        weights[name] = noise * (0.3 if len(shape) == 1 or "pos_embed" in name else fan_in**-0.5)
        if len(shape) == 1 and name.endswith(".weight"):
            weights[name] += 1.0  # of a norm
    return weights


def make_checkpoint(size: Size = SMALL) -> dict[str, Any]:
    return {"model": random_weights(size) | buffers(size), "iteration": 39999}


def make_averaged(size: Size = SMALL) -> dict[str, Any]:
    """With averaged weights: shared tables once, and the buffers that `model` is saved without."""
    averaged = random_weights(size, seed=1)
    averaged |= {name: tensor for name, tensor in buffers(size).items() if ".blocks." not in name}
    averaged |= {"pixel_mean": torch.zeros(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)}
    averaged |= {f"proposal_generator.anchor_generator.cell_anchors.{level}": torch.ones(3, 4) for level in range(5)}
    return {**make_checkpoint(size), "ema_state": averaged}


# ---- The reference --------------------------------------------------------------------------------------------------


def apply(function: Any, weights: Weights, name: str, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return function(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), **kwargs)


def norm(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    """Over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)


def channel_norm(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return norm(weights, name, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def convolved(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    padding = weights[f"{name}.weight"].shape[-1] // 2
    return channel_norm(weights, f"{name}.norm", apply(F.conv2d, weights, name, x, padding=padding))


def turned(x: torch.Tensor, weights: Weights, name: str) -> torch.Tensor:
    """Turns the channel pairs (2 i, 2 i + 1)."""
    across = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    return x * weights[f"{name}.freqs_cos"] + across * weights[f"{name}.freqs_sin"]


def attention(weights: Weights, block: str, x: torch.Tensor, size: Size, rope: str) -> torch.Tensor:
    """(B, rows, columns, D) -> the same"""
    tokens = x.flatten(1, 2)
    query = F.linear(tokens, weights[f"{block}attn.q_proj.weight"], weights[f"{block}attn.q_bias"])
    key = F.linear(tokens, weights[f"{block}attn.k_proj.weight"])
    value = F.linear(tokens, weights[f"{block}attn.v_proj.weight"], weights[f"{block}attn.v_bias"])
    query, key, value = (part.unflatten(-1, (size.heads, -1)).transpose(1, 2) for part in (query, key, value))
    query, key = turned(query, weights, rope), turned(key, weights, rope)
    probabilities = (query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])).softmax(dim=-1)
    return apply(F.linear, weights, f"{block}attn.proj", (probabilities @ value).transpose(1, 2).flatten(2)).view_as(x)


def in_windows(weights: Weights, block: str, x: torch.Tensor, size: Size) -> torch.Tensor:
    """Attention window by window; zeros fill up those at the border."""
    rows, columns = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -columns % size.window, 0, -rows % size.window))
    output = torch.empty_like(x)
    for top in range(0, x.shape[1], size.window):
        for left in range(0, x.shape[2], size.window):
            window = (slice(None), slice(top, top + size.window), slice(left, left + size.window))
            output[window] = attention(weights, block, x[window], size, f"{NET}rope_win")
    return output[:, :rows, :columns]


def backbone(weights: Weights, pixel_values: torch.Tensor, size: Size) -> torch.Tensor:
    """(B, 3, height, width) -> (B, rows, columns, D), without a final norm."""
    x = apply(F.conv2d, weights, f"{NET}patch_embed.proj", pixel_values, stride=16)
    table = weights[f"{NET}pos_embed"][:, 1:].transpose(1, 2).unflatten(2, (14, 14))
    x = x + F.interpolate(table, size=x.shape[-2:], mode="bicubic", align_corners=False)
    x = x.permute(0, 2, 3, 1)
    for index in range(size.depth):
        block = f"{NET}blocks.{index}."
        normed = norm(weights, f"{block}norm1", x)
        if index in size.global_blocks:
            x = x + attention(weights, block, normed, size, f"{NET}rope_glb")
        else:
            x = x + in_windows(weights, block, normed, size)
        normed = norm(weights, f"{block}norm2", x)
        gated = F.silu(apply(F.linear, weights, f"{block}mlp.w1", normed))
        gated = gated * apply(F.linear, weights, f"{block}mlp.w2", normed)
        x = x + apply(F.linear, weights, f"{block}mlp.w3", norm(weights, f"{block}mlp.ffn_ln", gated))
    return x


def pyramid(weights: Weights, x: torch.Tensor) -> list[torch.Tensor]:
    """(B, rows, columns, D) -> P2 to P6"""
    x = x.permute(0, 3, 1, 2)
    second = apply(F.conv_transpose2d, weights, "backbone.simfp_2.0", x, stride=2)
    second = F.gelu(channel_norm(weights, "backbone.simfp_2.1", second))
    second = apply(F.conv_transpose2d, weights, "backbone.simfp_2.3", second, stride=2)
    third = apply(F.conv_transpose2d, weights, "backbone.simfp_3.0", x, stride=2)
    levels = [
        convolved(
            weights, f"backbone.simfp_{level}.{first + 1}", convolved(weights, f"backbone.simfp_{level}.{first}", x)
        )
        for level, first, x in ((2, 4, second), (3, 1, third), (4, 0, x), (5, 1, F.max_pool2d(x, 2)))
    ]
    return [*levels, levels[-1][:, :, ::2, ::2]]


def proposal_head(weights: Weights, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, F, rows, columns) -> objectness (B, 3, rows, columns) and deltas (B, 12, rows, columns)"""
    head = "proposal_generator.rpn_head."
    for index in range(2):
        x = apply(F.conv2d, weights, f"{head}conv.conv{index}", x, padding=1).relu()
    return apply(F.conv2d, weights, f"{head}objectness_logits", x), apply(F.conv2d, weights, f"{head}anchor_deltas", x)


def box_head(weights: Weights, stage: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, F, 7, 7) -> logits (R, C + 1) and deltas (R, 4)"""
    for index in range(1, 5):
        x = convolved(weights, f"roi_heads.box_head.{stage}.conv{index}", x).relu()
    x = apply(F.linear, weights, f"roi_heads.box_head.{stage}.fc1", x.flatten(1)).relu()
    predictor = f"roi_heads.box_predictor.{stage}."
    return apply(F.linear, weights, f"{predictor}cls_score", x), apply(F.linear, weights, f"{predictor}bbox_pred", x)


def mask_head(weights: Weights, x: torch.Tensor) -> torch.Tensor:
    """(R, F, 14, 14) -> (R, C, 28, 28)"""
    for index in range(1, 5):
        x = convolved(weights, f"roi_heads.mask_head.mask_fcn{index}", x).relu()
    x = apply(F.conv_transpose2d, weights, "roi_heads.mask_head.deconv", x, stride=2).relu()
    return apply(F.conv2d, weights, "roi_heads.mask_head.predictor", x)


def moved(boxes: torch.Tensor, deltas: torch.Tensor, side: int) -> torch.Tensor:
    """Boxes (n, 4) as corners, after shifts relative to their size and logarithmic growth, within a square image."""
    centres, sizes = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    centres = centres + deltas[:, :2] * sizes
    sizes = sizes * deltas[:, 2:].clamp(max=math.log(1000 / 16)).exp()
    return torch.cat([centres - sizes / 2, centres + sizes / 2], dim=1).clamp(0, side)


def level_proposals(objectness: torch.Tensor, deltas: torch.Tensor, level: int, side: int) -> list[torch.Tensor]:
    """From the maps (3, rows, columns) and (12, rows, columns) of one image to boxes (n, 4) and their scores (n,)."""
    _, rows, columns = objectness.shape
    anchors, scores, shifts = [], [], []
    for row in range(rows):
        for column in range(columns):
            for index, ratio in enumerate((0.5, 1.0, 2.0)):
                width = ANCHOR_SIZES[level] / math.sqrt(ratio)
                half = torch.tensor([width, width * ratio]) / 2
                centre = torch.tensor([column, row]) * STRIDES[level]
                anchors.append(torch.cat([centre - half, centre + half]))
                scores.append(objectness[index, row, column])
                shifts.append(deltas[4 * index : 4 * index + 4, row, column])
    best, order = torch.stack(scores).sort(descending=True)
    order, best = order[:1000], best[:1000]
    boxes = moved(torch.stack(anchors)[order], torch.stack(shifts)[order], side)
    filled = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    boxes, best = boxes[filled], best[filled]
    kept = nms(boxes, best, 0.7)
    return [boxes[kept], best[kept]]


# ---- Equality -------------------------------------------------------------------------------------------------------


def images(size: Size = SMALL) -> torch.Tensor:
    return torch.randn(2, 3, 16 * size.grid, 16 * size.grid, generator=torch.Generator().manual_seed(2))


def regions(side: int, size: Size = SMALL) -> torch.Tensor:
    return torch.randn(7, size.channels, side, side, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def assert_equal_to_the_reference(model: Any, weights: Weights, size: Size) -> None:
    tokens = backbone(weights, images(size), size)
    assert tokens.std() > 0.5  # otherwise the comparison would show nothing
    assert_close(model.cropr_vit(images(size)).last_hidden_state, tokens.flatten(1, 2))
    levels = pyramid(weights, tokens)
    assert [level.shape[-1] for level in levels] == [size.grid * 16 // stride for stride in STRIDES[:3]] + [3, 2]
    assert_close(model.pyramid(tokens.permute(0, 3, 1, 2)), levels)
    assert_close(
        model.proposal_network.head(levels), tuple(map(list, zip(*(proposal_head(weights, x) for x in levels))))
    )
    for stage, head in enumerate(model.box_heads):
        assert_close(head(regions(7, size)), box_head(weights, stage, regions(7, size)))
    if size.masks:
        masks = mask_head(weights, regions(14, size))
        for label in range(size.classes):
            labels = torch.full((7,), label)
            assert_close(model.mask_head(regions(14, size), labels), masks[:, label])


VARIANTS = {
    "small": SMALL,
    "windows that do not tile": Size(window=4),
    "other global blocks": Size(global_blocks=(0, 1, 5)),
    "boxes only": Size(masks=False, classes=7),
}


@pytest.mark.parametrize("size", VARIANTS.values(), ids=VARIANTS)
def test_every_part_equals_the_reference(size):
    checkpoint = make_checkpoint(size)
    model = convert_eva02_detector(checkpoint)
    expected = CroprViTForInstanceSegmentation if size.masks else CroprViTForObjectDetection
    assert type(model) is expected and not model.training and model.dtype == torch.float32
    assert model.config.token_reducer is None and not model.config.use_auxiliary_heads
    assert_equal_to_the_reference(model, checkpoint["model"], size)


@torch.no_grad()
def test_proposals_equal_the_reference():
    """Order of the anchors, of their deltas, and of the channels of both.

    Rounding decides between proposals that are as good, and whether an overlap is 0.7: of hundreds, about a few.
    """
    checkpoint = make_checkpoint()
    model, weights, side = convert_eva02_detector(checkpoint), checkpoint["model"], 96
    levels = pyramid(weights, backbone(weights, images()[:1], SMALL))
    found = [
        level_proposals(*(maps[0] for maps in proposal_head(weights, x)), level, side)
        for level, x in enumerate(levels)
    ]
    boxes, scores = (torch.cat(parts) for parts in zip(*found))
    expected = boxes[scores.argsort(descending=True)][:1000]
    features = {str(level): x for level, x in enumerate(levels)}
    (proposals,), _ = model.proposal_network(ImageList(images()[:1], [(side, side)]), features)
    assert len(expected) > 100 and abs(len(proposals) - len(expected)) <= 0.02 * len(expected)
    nearest = torch.cdist(expected, proposals, p=math.inf).min(dim=1)
    assert (nearest.values < 0.01).float().mean() > 0.98
    assert (nearest.indices.diff() > 0).float().mean() > 0.95  # the best one first


@torch.no_grad()
def test_boxes_are_refined_as_in_the_reference():
    checkpoint = make_checkpoint()
    model = convert_eva02_detector(checkpoint)
    boxes = torch.tensor([[10.0, 20.0, 40.0, 80.0], [0.0, 0.0, 96.0, 50.0]])
    for stage, scale in enumerate(((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))):
        deltas = 5 * box_head(checkpoint["model"], stage, regions(7))[1][:2]
        refined = model.box_heads[stage].refine(deltas, [boxes], [(96, 96)])[0]
        assert_close(refined, moved(boxes, deltas / torch.tensor(scale), 96))


def test_averaged_weights_are_taken_where_there_are_any(tmp_path):
    checkpoint = make_averaged()
    torch.save(checkpoint, tmp_path / "averaged.pth")
    for source in (checkpoint, tmp_path / "averaged.pth", str(tmp_path / "averaged.pth")):
        assert_equal_to_the_reference(convert_eva02_detector(source), checkpoint["ema_state"], SMALL)
    plain = convert_eva02_detector(tmp_path / "averaged.pth", use_ema=False)
    assert_equal_to_the_reference(plain, checkpoint["model"], SMALL)
    with pytest.raises(ValueError, match="has no averaged weights"):
        convert_eva02_detector(make_checkpoint(), use_ema=True)


@torch.no_grad()
def test_a_saved_model_detects_as_the_converted_one(tmp_path):
    model = convert_eva02_detector(make_checkpoint(), score_threshold=0.0)
    model.save_pretrained(tmp_path)
    expected, found = (
        detector(images()) for detector in (model, CroprViTForInstanceSegmentation.from_pretrained(tmp_path))
    )
    assert expected.logits.softmax(dim=-1)[..., :-1].max() > 0.1
    for name in ("logits", "pred_boxes", "pred_masks"):
        assert_close(found[name], expected[name])


@torch.no_grad()
def test_another_image_size_resamples_the_table_of_the_pre_training():
    checkpoint, size = make_checkpoint(), Size(grid=8)
    weights = checkpoint["model"] | buffers(size)
    model = convert_eva02_detector(checkpoint, image_size=128)
    assert_close(model.cropr_vit(images(size)).last_hidden_state, backbone(weights, images(size), size).flatten(1, 2))


# ---- Configuration --------------------------------------------------------------------------------------------------


def test_the_published_size_is_that_of_the_configuration():
    """Every name and shape of the 1536-pixel detector, without the memory that it needs."""
    weights = {name: torch.zeros(1).expand(shape) for name, shape in shapes(PUBLISHED).items()} | buffers(PUBLISHED)
    recipe, trained_with = describe_eva02_detector(weights)
    config = CroprViTConfig(**{**recipe.fields, **trained_with}, token_reducer=None)
    assert recipe.fields["image_size"] == 224
    expected = CroprViTConfig.from_size("eva02_large_detection", token_reducer=None).to_dict()
    found = config.to_dict()
    expected["window_block_indices"] = list(expected["window_block_indices"])
    assert {name: value for name, value in found.items() if value != expected[name]} == {}

    with torch.device("meta"):
        target = CroprViTForInstanceSegmentation(config).state_dict()
    renamed = {name.removeprefix("cropr_vit."): tensor.shape for name, tensor in target.items()}
    renamed["embeddings.position_embeddings"] = (1, 197, 1024)
    assert {name: tensor.shape for name, tensor in rename_weights(weights, recipe).items()} == renamed


def test_pruning_adds_token_reducers_with_auxiliary_heads():
    checkpoint = make_checkpoint()
    schedule = schedule_from_sides(6, 36, blocks=(2, 4), sides=(4, 2))
    model = convert_eva02_detector(checkpoint, pruning_schedule=schedule)
    assert model.config.token_reducer == "cropr" and model.config.use_auxiliary_heads
    assert model.config.kept_patches() == [36, 16, 16, 4, 4, 4]
    unpruned = convert_eva02_detector(checkpoint).state_dict()
    for name, tensor in model.state_dict().items():
        assert (name not in unpruned) == name.startswith("cropr_vit.token_reducers.")
        assert name not in unpruned or torch.equal(tensor, unpruned[name])
    label = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}
    label["masks"] = torch.ones(1, 96, 96)
    outputs = model.train()(images(), labels=[label, label])
    assert outputs.loss.isfinite() and len(outputs.auxiliary_losses) == 2

    folded = convert_eva02_detector(checkpoint, token_reducer="random", pruning_rate=3)
    assert not folded.config.use_auxiliary_heads


def test_other_classes_and_another_task_get_new_layers():
    """From Objects365, which has no masks, to a data set that has: as EVA-02 was trained on COCO."""
    size = Size(masks=False, classes=7)
    checkpoint = make_checkpoint(size)
    model = convert_eva02_detector(checkpoint, cls=CroprViTForInstanceSegmentation, num_labels=3)
    source = convert_eva02_detector(checkpoint).state_dict()
    new = model.state_dict()
    new = {name for name in new if name not in source or not torch.equal(new[name], source[name])}
    layers = {name.rpartition(".")[0] for name in new}
    assert {name for name in layers if not name.startswith("mask_head.")} == {
        f"box_heads.{stage}.class_predictor" for stage in range(3)
    }
    assert {name for name in model.state_dict() if name.startswith("mask_head.")} <= new
    assert model.box_heads[0].class_predictor.out_features == 4
    assert model.box_heads[0].class_predictor.weight.std() < 0.02  # its own initialisation

    boxes_only = convert_eva02_detector(make_checkpoint(), cls=CroprViTForObjectDetection)
    assert boxes_only.mask_head is None
    named = convert_eva02_detector(make_checkpoint(), id2label={0: "cat", 1: "dog"})
    assert named.config.num_labels == 2 and named.mask_head.predictor.mask_fcn_logits.out_channels == 2


def test_register_tokens_are_new():
    model = convert_eva02_detector(make_checkpoint(), num_register_tokens=2)
    assert model.cropr_vit.embeddings.register_tokens.shape[1] == 2
    assert model(images()).pred_boxes.isfinite().all()


# ---- Errors ---------------------------------------------------------------------------------------------------------


def changed(**weights: torch.Tensor | None) -> dict[str, Any]:
    """A checkpoint with other weights, `None` for none; a double underscore stands for a dot."""
    model = make_checkpoint()["model"] | {name.replace("__", "."): tensor for name, tensor in weights.items()}
    return {"model": {name: tensor for name, tensor in model.items() if tensor is not None}}


WRONG_WEIGHTS = {
    "missing": ({"backbone__net__blocks__3__attn__k_proj__weight": None}, "layers.3.attention.k_proj.weight"),
    "missing bias": ({"roi_heads__box_head__1__fc1__bias": None}, "box_heads.1.layers.5.bias"),
    "missing head": ({"proposal_generator__rpn_head__anchor_deltas__weight": None}, "head.bbox_pred.weight"),
    "missing mask": ({"roi_heads__mask_head__deconv__bias": None}, "mask_head.predictor.conv5_mask.bias"),
    "missing size": ({"backbone__net__pos_embed": None}, "no weight backbone.net.pos_embed of 3 dimensions"),
    "missing table": (
        {"backbone__net__blocks__1__attn__rope__freqs_cos": None},
        "no weight backbone.net.blocks.1.attn.rope.freqs_cos",
    ),
    "extra": ({"backbone__net__norm__weight": torch.ones(64)}, "does not know: backbone.net.norm.weight"),
    "residual block": (
        {"backbone__net__blocks__0__residual__conv1__weight": torch.ones(1)},
        "does not know: backbone.net.blocks.0.residual.conv1.weight",
    ),
    "shape": ({"roi_heads__mask_head__predictor__bias": torch.ones(4)}, r"mask_fcn_logits.bias is \(4,\), needed"),
    "shape of a block": (
        {"backbone__net__blocks__5__mlp__w2__weight": torch.ones(168, 64)},
        r"layers.5.mlp.up_proj.weight is \(168, 64\), needed \(170, 64\)",
    ),
    "dimensions": ({"backbone__net__pos_embed": torch.ones(197, 64)}, "of 3 dimensions"),
    "no square": (
        {"backbone__net__pos_embed": torch.ones(1, 196, 64)},
        "195 patches, which do not form a square",
    ),
    "other window": (
        {"backbone__net__blocks__0__attn__rope__freqs_cos": torch.ones(9, 16)},
        "the image has 6 and a window 2 per side",
    ),
    "other rotation": ({"backbone__net__rope_glb__freqs_cos": torch.ones(36, 16)}, "not the rotation of EVA-02"),
    "other heads": ({"backbone__net__rope_glb__freqs_cos": torch.ones(36, 24)}, "not the rotation of EVA-02"),
    "LVIS": ({"roi_heads__box_predictor__0__cls_score__weight": torch.ones(1204, 24)}, "detector of LVIS"),
}


@pytest.mark.parametrize("weights, message", WRONG_WEIGHTS.values(), ids=WRONG_WEIGHTS)
def test_weights_that_do_not_fit_are_named(weights, message):
    with pytest.raises(ValueError, match=message):
        convert_eva02_detector(changed(**weights))


def test_averaged_weights_are_audited_as_well():
    checkpoint = make_averaged()
    del checkpoint["ema_state"]["backbone.simfp_5.2.norm.weight"]
    with pytest.raises(ValueError, match=r"does not fill: pyramid\.levels\.3\.2\.1\.weight"):
        convert_eva02_detector(checkpoint)
    convert_eva02_detector(checkpoint, use_ema=False)


@pytest.mark.parametrize(
    "checkpoint",
    [{}, {"state_dict": {}}, {"model": {"step": 3}}, {"model": []}, {**make_checkpoint(), "ema_state": 3}, [1]],
    ids=["empty", "other keys", "no tensors", "list", "no averaged weights", "no dictionary"],
)
def test_other_checkpoints_are_refused(checkpoint, tmp_path):
    torch.save(checkpoint, tmp_path / "other.pth")
    for source in (checkpoint, tmp_path / "other.pth"):
        with pytest.raises(ValueError, match=r"The checkpoint .*; give a `\.pth` file of EVA-02's detectors"):
            convert_eva02_detector(source)


@pytest.mark.parametrize("content", [b"", b"no file of weights", b"PK\x03\x04 broken", bytes(1000)])
def test_other_files_are_refused(content, tmp_path):
    (tmp_path / "other.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"other\.pth' is not a file of weights; give a"):
        convert_eva02_detector(tmp_path / "other.pth")
    with pytest.raises(FileNotFoundError):
        convert_eva02_detector(tmp_path / "missing.pth")


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"hidden_size": 32}, "`hidden_size` is 32, but the weights of the source have 64"),
        ({"use_cls_token": True}, "`use_cls_token` is True, but the weights of the source have False"),
        ({"pyramid_channels": 8}, "wrong shapes: pyramid"),
        ({"num_label": 3}, "num_labels"),
        ({"image_size": 100}, "not a multiple of `patch_size`"),
        ({"token_reducer": None, "pruning_rate": 3}, "name a reducer"),
    ],
)
def test_wrong_overrides_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        convert_eva02_detector(make_checkpoint(), **kwargs)
