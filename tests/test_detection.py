"""What detection and instance segmentation add to the shared suite: anchors, boxes, masks, losses, post-processing."""

import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_convert, box_iou
from transformers import (
    AutoModelForImageSegmentation,
    AutoModelForInstanceSegmentation,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    DetrImageProcessor,
    pipeline,
)

from cropr_hf import (
    CroprViTConfig,
    CroprViTForInstanceSegmentation,
    CroprViTForObjectDetection,
    CroprViTImageProcessor,
    CroprViTModel,
)
from cropr_hf.detection_heads import (
    ANCHORS_PER_IMAGE,
    CASCADE,
    CroprViTMaskHead,
    match_boxes,
    paste_masks,
    pool_regions,
    soft_nms,
    training_memory,
)
from cropr_hf.modeling_cropr_vit_detection import _image_sizes
from cropr_hf.training import layer_decay_groups
from tests.common import (
    DETECTOR,
    IMAGE_SIZE,
    NUM_BLOCKS,
    NUM_LABELS,
    PATCH_SIZE,
    TASKS,
    assert_close_relative,
    box_masks,
    fill_with_ramps,
    full,
    make_images,
    ramp_images,
    tiny_config,
)
from tests.test_conversion import CASES, SIZES


DETECTORS = ("detection", "instances")
LOSSES = [
    "loss_rpn_cls",
    "loss_rpn_loc",
    *(f"loss_{part}_stage{stage}" for stage in range(3) for part in ("cls", "box_reg")),
]
assert_close = torch.testing.assert_close


def detector(task="instances", name="plain", seed=0, **overrides):
    return TASKS[task].build(name, seed, **overrides)


def trainable(task="instances", name="plain", **overrides):
    return detector(task, name, use_auxiliary_heads=True, **overrides).train()


def make_inputs(model, height=IMAGE_SIZE, width=IMAGE_SIZE, batch_size=2):
    task = "instances" if model.has_masks else "detection"
    return TASKS[task].inputs(model.config, batch_size, height, width)


def targets_of(model, inputs):
    """Labels with boxes in pixels."""
    images = inputs["pixel_values"]
    return model._targets(inputs["labels"], images, _image_sizes(images, inputs.get("pixel_mask")))


def loss_of(model, inputs, seed=0):
    """The losses draw samples."""
    torch.manual_seed(seed)
    return model(**inputs)


def features_of(model, images):
    """The five maps of the pyramid, as leaves of the graph."""
    with torch.no_grad():
        grid_size = (images.shape[2] // PATCH_SIZE, images.shape[3] // PATCH_SIZE)
        patches = model.cropr_vit.patches(model.cropr_vit(images))
        maps = model.pyramid(patches.transpose(1, 2).unflatten(2, grid_size))
    return [level.requires_grad_() for level in maps]


def image_list(images):
    return ImageList(images, [tuple(images.shape[-2:])] * len(images))


def some_boxes(count, size=64, seed=0):
    """Corners (n, 4) within a square."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, 2, generator=generator).sort(dim=1).values * size
    corners[:, 1] += 1
    return corners.flatten(1).clamp(max=size)


def make_certain(model):
    """Every region is class 2 with a high score and a full mask, so that thresholds of pipelines let it pass."""
    with torch.no_grad():
        for head in model.box_heads:
            head.class_predictor.bias[2] += 6
        if model.has_masks:
            model.mask_head.predictor.mask_fcn_logits.bias += 6


# Pyramid and anchors


@torch.no_grad()
def test_levels_and_anchors_at_1536_pixels():
    config = CroprViTConfig(
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=1,
        intermediate_size=8,
        image_size=1536,
        use_cls_token=False,
        pooling="patch_mean",
        pruning_schedule=[256, 256, 256],
        num_labels=3,
        pyramid_channels=4,
        box_head_size=8,
        score_threshold=0.3,
    )
    torch.manual_seed(0)
    model = CroprViTForInstanceSegmentation(config).eval()
    levels, anchors = [], []
    model.pyramid.register_forward_hook(lambda *arguments: levels.extend(arguments[-1]))
    model.proposal_network.anchor_generator.register_forward_hook(lambda *arguments: anchors.extend(arguments[-1]))
    outputs = model(make_images(1, 1536, 1536))
    assert [level.shape for level in levels] == [(1, 4, side, side) for side in (384, 192, 96, 48, 24)]
    assert [boxes.shape for boxes in anchors] == [(589_248, 4)]
    assert anchors[0][1].tolist() == [-16, -16, 16, 16]
    assert outputs.logits.shape == (1, 100, 4) and outputs.pred_masks.shape == (1, 100, 384, 384)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 56), (16, 64)])
def test_anchors_by_hand(height, width):
    model = detector("detection", anchor_sizes=[5, 8, 13, 21, 34])
    maps = [level.detach() for level in features_of(model, make_images(2, height, width))]
    anchors = model.proposal_network.anchor_generator(image_list(make_images(2, height, width)), maps)
    expected, rows, columns = [], height // 2, width // 2
    for size, stride in zip((5, 8, 13, 21, 34), (2, 4, 8, 16, 32)):
        for y in range(rows):
            for x in range(columns):
                for ratio in (0.5, 1.0, 2.0):
                    half_width, half_height = size / math.sqrt(ratio) / 2, size * math.sqrt(ratio) / 2
                    x1, y1 = x * stride - half_width, y * stride - half_height
                    expected.append([x1, y1, x1 + 2 * half_width, y1 + 2 * half_height])
        # Halves, rounded down in pooling over 2 x 2 cells and up where every other cell is taken
        rows, columns = (rows // 2, columns // 2) if size != 21 else (-(-rows // 2), -(-columns // 2))
    assert len(anchors) == 2 and anchors[0].dtype == torch.float32
    for boxes in anchors:
        assert_close(boxes, torch.tensor(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("place", [(0, 0, 3, 5), (0, 1, 15, 15), (1, 2, 0, 7), (2, 1, 2, 3), (4, 0, 0, 0)])
def test_objectness_and_deltas_belong_to_their_anchors(place, monkeypatch):
    """The best proposal is the anchor whose logit is the highest, moved by the deltas at its place."""
    model = detector("detection")
    maps = [level.detach() for level in features_of(model, make_images(1))]
    level, anchor, row, column = place
    objectness = [torch.zeros(1, 3, *features.shape[-2:]) for features in maps]
    deltas = [torch.zeros(1, 12, *features.shape[-2:]) for features in maps]
    objectness[level][0, anchor, row, column] = 5.0
    moved = torch.tensor([0.1, -0.2, 0.3, -0.4])
    deltas[level][0, 4 * anchor : 4 * anchor + 4, row, column] = moved
    monkeypatch.setattr(model.proposal_network.head, "forward", lambda _: (objectness, deltas))
    proposals, losses = model._propose(maps, image_list(make_images(1)))
    assert losses == {} and len(proposals[0]) <= model.config.num_proposals
    size, stride, ratio = (4, 8, 12, 16, 24)[level], 2 ** (level + 1), (0.5, 1.0, 2.0)[anchor]
    box_width, box_height = size / math.sqrt(ratio), size * math.sqrt(ratio)
    x, y = column * stride + 0.1 * box_width, row * stride - 0.2 * box_height
    half_width, half_height = box_width * math.exp(0.3) / 2, box_height * math.exp(-0.4) / 2
    expected = torch.tensor([x - half_width, y - half_height, x + half_width, y + half_height])
    assert_close(proposals[0][0], expected.clamp(0, 32), rtol=0, atol=1e-4)


@pytest.mark.parametrize("targets", [False, True])
def test_proposals_are_the_best_of_each_level_without_duplicates(targets, monkeypatch):
    """Twice as many are looked at in training; overlap counts within a level only, from an IoU of 0.7."""
    network = detector("detection", num_proposals=5).proposal_network
    boxes = torch.cat([boxes_by_iou(1.0, 0.72, 0.68, 0.4), boxes_by_iou(0.4) + 200, boxes_by_iou(1.0, 1.0)])
    objectness, seen = torch.tensor([[6.0, 5, 4, 3, 2, 1, 0]]), []
    network.train(targets)
    found, _ = network.filter_proposals(boxes[None], objectness, [(400, 400)], [5, 2])
    assert torch.equal(found[0], boxes[[0, 2, 3, 4, 5]])
    choose = network._get_top_n_idx
    monkeypatch.setattr(network, "_get_top_n_idx", lambda *arguments: seen.append(choose(*arguments)) or seen[-1])
    network.filter_proposals(torch.rand(1, 28, 4), torch.rand(1, 28), [(400, 400)], [20, 8])
    assert seen[0].shape == (1, 10 + 8 if targets else 5 + 5)
    assert ((seen[0] < 20).sum().item(), len(seen[0].unique())) == ((10, 18) if targets else (5, 10))


def test_first_weights_spread_as_in_the_original():
    torch.manual_seed(0)
    config = tiny_config(**{**DETECTOR, "pyramid_channels": 64, "box_head_size": 256, "num_labels": 80})
    model = CroprViTForInstanceSegmentation(config)

    def relative(spread, layers, fan):
        for layer in layers:
            assert layer.weight.std().item() == pytest.approx(spread(fan(layer)), rel=0.1)
            assert layer.bias is None or not layer.bias.any()

    head = model.proposal_network.head
    relative(lambda _: 0.01, [*(part[0] for part in head.conv), head.cls_logits, head.bbox_pred], lambda _: None)
    relative(lambda _: 0.001, [model.mask_head.predictor.mask_fcn_logits], lambda _: None)
    for head in model.box_heads:
        relative(lambda _: 0.01, [head.class_predictor], lambda _: None)
        relative(lambda _: 0.001, [head.box_predictor], lambda _: None)
        relative(lambda fan: math.sqrt(2 / fan), [head.layers[0][0]], lambda layer: layer.weight[0].numel())
    relative(lambda fan: math.sqrt(2 / fan), [model.pyramid.levels[2][2][0]], lambda layer: layer.weight[0].numel())


# Boxes


def coders(model):
    return [model.proposal_network.box_coder, *(head.box_coder for head in model.box_heads)]


def test_coding_of_boxes_by_hand_and_back():
    boxes, goals = some_boxes(50, seed=1), some_boxes(50, seed=2)
    (x, y, width, height), (to_x, to_y, to_width, to_height) = (
        box_convert(each, "xyxy", "cxcywh").unbind(dim=1) for each in (boxes, goals)
    )
    raw = torch.stack(
        [(to_x - x) / width, (to_y - y) / height, (to_width / width).log(), (to_height / height).log()], dim=1
    )
    model = detector("detection")
    weights = [(1, 1, 1, 1), (10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15)]
    assert [stage[1] for stage in CASCADE] == weights[1:]
    for coder, weight in zip(coders(model), weights, strict=True):
        deltas = coder.encode_single(goals, boxes)
        assert_close(deltas, raw * torch.tensor(weight), rtol=1e-4, atol=1e-4)
        assert_close(coder.decode_single(deltas, boxes), goals, rtol=1e-4, atol=1e-3)
        huge = coder.decode_single(
            torch.full((1, 4), 1e4) * torch.tensor([0.0, 0, 1, 1]), torch.tensor([[0.0, 0, 16, 8]])
        )
        assert_close(huge, torch.tensor([[8 - 500.0, 4 - 250, 8 + 500, 4 + 250]]))


def test_refined_boxes_stay_in_the_image_and_get_no_gradient():
    head = detector("detection").box_heads[0]
    boxes, deltas = [some_boxes(4), some_boxes(0), some_boxes(3, seed=1)], 5 * torch.randn(7, 4)
    refined = head.refine(deltas.requires_grad_(), boxes, [(40, 64), (64, 64), (20, 30)])
    moved = head.box_coder.decode_single(deltas.detach(), torch.cat(boxes)).split([4, 0, 3])
    for box, free, (height, width) in zip(refined, moved, [(40, 64), (64, 64), (20, 30)]):
        assert not box.requires_grad
        expected = torch.stack([free[:, axis].clamp(0, (width, height)[axis % 2]) for axis in range(4)], dim=1)
        assert_close(box, expected, rtol=0, atol=1e-4)  # exponentials may round by their place in a vector


def naive_regions(features, box, image, strides, size):
    """RoIAlign of one box: every cell is a mean of points, about one per cell of the map."""
    area = (box[2] - box[0]) * (box[3] - box[1])
    level = int(min(max(math.floor(4 + math.log2(math.sqrt(area) / (14 * strides[2])) + 1e-6), 2), 5)) - 2
    feature_map, (x1, y1, x2, y2) = features[level][image], (box / strides[level]).tolist()
    axes = []
    for start, end, length in ((y1, y2, feature_map.shape[1]), (x1, x2, feature_map.shape[2])):
        points = math.ceil((end - start) / size)
        steps = (torch.arange(size * points) + 0.5) / points * (end - start) / size
        # From places where the centre of the first cell is 0.5 to indices, then to [-1, 1]
        axes.append(((start + steps - 0.5).clamp(0, length - 1) / (length - 1) * 2 - 1).view(size, points))
    cells = torch.empty(len(feature_map), size, size)
    for row in range(size):
        for column in range(size):
            grid = torch.stack(torch.meshgrid(axes[1][column], axes[0][row], indexing="xy"), dim=-1)
            points = F.grid_sample(feature_map[None], grid[None], align_corners=True)
            cells[:, row, column] = points[0].mean(dim=(1, 2))
    return cells, level


@pytest.mark.parametrize("size", [7, 14])
def test_regions_equal_a_naive_loop_over_boxes(size):
    strides = [1.0, 2.0, 4.0, 8.0]  # patches of 4 pixels
    features = [torch.randn(2, 3, int(128 // stride), int(96 // stride)) for stride in strides]
    boxes = [some_boxes(12, 96), some_boxes(0), some_boxes(9, 96, seed=1)][::2]
    pooled = pool_regions(features, boxes, strides, size)
    assert pooled.shape == (21, 3, size, size)
    places, levels = [(0, box) for box in boxes[0]] + [(1, box) for box in boxes[1]], set()
    for region, (image, box) in zip(pooled, places, strict=True):
        expected, level = naive_regions(features, box, image, strides, size)
        levels.add(level)
        assert_close(region, expected, rtol=1e-4, atol=1e-4)
    assert {1, 2} <= levels
    assert pool_regions(features, [some_boxes(0)] * 2, strides, size).shape == (0, 3, size, size)


@pytest.mark.parametrize("patch_size", [8, 16])
def test_the_size_of_a_box_chooses_its_level(patch_size):
    """14 x 14 patches, 224 pixels with patches of 16, are the smallest square of the level of the patches."""
    strides = [patch_size * factor for factor in (0.25, 0.5, 1, 2)]
    features = [torch.full((1, 1, 64, 64), float(level)) for level in range(4)]
    sides = [(1, 0), (6.99, 0), (7, 1), (13.99, 1), (14, 2), (27.99, 2), (28, 3), (60, 3)]
    squares = torch.tensor([[0, 0, side * patch_size, side * patch_size] for side, _ in sides])
    oblong = squares * torch.tensor([0, 0, 0.5, 2.0])
    for boxes in (squares, oblong):
        pooled = pool_regions(features, [boxes], strides, 1).flatten().tolist()
        assert pooled == pytest.approx([level for _, level in sides], abs=1e-4)


# Labels of regions, samples, losses


def boxes_by_iou(*ious):
    """Boxes that share a corner with (0, 0, 100, 100)."""
    return torch.tensor([[0.0, 0, 100, 100 * iou] for iou in ious])


def test_each_stage_of_the_cascade_asks_for_more_overlap():
    target = {"boxes": torch.tensor([[0.0, 0, 100, 100], [200, 200, 210, 210]]), "class_labels": torch.tensor([3, 1])}
    boxes = torch.cat([boxes_by_iou(0.49, 0.51, 0.59, 0.61, 0.69, 0.71, 1.0), target["boxes"][1:]])
    heads = detector("detection").box_heads
    for head, first in zip(heads, (1, 3, 5), strict=True):
        classes, objects = match_boxes(boxes, target, head.least_iou, 5)
        assert classes.tolist() == [5] * first + [3] * (7 - first) + [1]
        assert objects[first:].tolist() == [0] * (7 - first) + [1]
    nothing = {"boxes": torch.zeros(0, 4), "class_labels": torch.zeros(0, dtype=torch.long)}
    assert match_boxes(boxes, nothing, 0.5, 5)[0].tolist() == [5] * 8
    assert match_boxes(boxes[:0], target, 0.5, 5)[0].shape == (0,)


def test_a_region_stands_for_the_object_that_it_overlaps_most():
    target = {"boxes": torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8]]), "class_labels": torch.tensor([0, 1])}
    boxes = torch.tensor([[0.0, 0, 10, 9.5], [0, 0, 10, 8.5]])
    assert [found.tolist() for found in match_boxes(boxes, target, 0.5, 5)] == [[0, 1], [0, 1]]


def test_what_the_box_heads_keep_for_the_backward_pass():
    model, regions = detector(rois_per_image=128, pyramid_channels=64, box_head_size=8), torch.randn(128, 64, 7, 7)
    kept: dict[int, int] = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = [head(regions + stage) for stage, head in enumerate(model.box_heads)]
    assert sum(kept.values()) == pytest.approx(training_memory(model.config), rel=0.05) and outputs
    assert round(16 * training_memory(CroprViTConfig()) / 1e9) == 12


def test_a_quarter_of_the_sampled_regions_shows_objects_at_most():
    model = detector("detection")  # 32 regions
    target = {"boxes": torch.tensor([[0.0, 0, 100, 100]]), "class_labels": torch.tensor([0])}
    background = torch.tensor([[200.0, 200, 210, 210]])
    for positive, negative, expected in ((20, 50, (8, 24)), (3, 50, (3, 29)), (20, 10, (8, 10)), (0, 50, (0, 32))):
        boxes = torch.cat([boxes_by_iou(*[0.9] * positive).view(-1, 4), background.expand(negative, -1)])
        (sampled,) = model._sample([boxes], [target])
        labels = match_boxes(sampled, target, 0.5, NUM_LABELS)[0]
        assert ((labels == 0).sum().item(), (labels == NUM_LABELS).sum().item()) == expected
    nothing = {"boxes": torch.zeros(0, 4), "class_labels": torch.zeros(0, dtype=torch.long)}
    assert len(model._sample([background.expand(40, -1)], [nothing])[0]) == 32


def test_objects_themselves_are_among_the_regions(monkeypatch):
    """Without any proposal, the heads train on the boxes of the labels alone."""
    model = trainable()
    inputs = make_inputs(model)
    zeros = torch.zeros(())
    none = ([torch.zeros(0, 4)] * 2, {"loss_objectness": zeros, "loss_rpn_box_reg": zeros})
    monkeypatch.setattr(model, "_propose", lambda *_: none)
    seen, regions = [], model._regions

    def spy(features, boxes, size, **kwargs):
        seen.append([box.clone() for box in boxes])
        return regions(features, boxes, size, **kwargs)

    monkeypatch.setattr(model, "_regions", spy)
    loss_dict = model(**inputs).loss_dict
    assert all(loss.isfinite() for loss in loss_dict.values())
    objects = targets_of(model, inputs)[0]["boxes"]
    for boxes in seen[:2]:  # of masks and of the first stage
        assert torch.equal(boxes[0], objects) and len(boxes[1]) == 0


def test_every_stage_labels_all_regions_anew(monkeypatch):
    """The object is a square of 20 pixels, and with deltas of 0 the boxes of all stages are those of the first."""
    model, seen = trainable("detection"), []
    proposals = boxes_by_iou(0.45, 0.55, 0.65, 0.75) / 5
    zero = torch.zeros(())
    losses = {"loss_objectness": zero, "loss_rpn_box_reg": zero}
    monkeypatch.setattr(model, "_propose", lambda *_: ([proposals], losses))
    for head in model.box_heads:
        for parameter in head.box_predictor.parameters():
            torch.nn.init.zeros_(parameter)
        monkeypatch.setattr(
            head, "loss", lambda *arguments, loss=head.loss: seen.append(arguments) or loss(*arguments)
        )
    label = {"class_labels": torch.tensor([3]), "boxes": torch.tensor([[10.0, 10, 20, 20]]) / 32}
    model(make_images(1), labels=[label])
    for (_, _, boxes, labels, goals), least in zip(seen, (0.5, 0.6, 0.7), strict=True):
        assert_close(boxes, torch.cat([proposals, torch.tensor([[0.0, 0, 20, 20]])]))
        assert labels.tolist() == [3 if iou > least else NUM_LABELS for iou in (0.45, 0.55, 0.65, 0.75, 1)]
        assert_close(goals[labels == 3], torch.tensor([[0.0, 0, 20, 20]]).expand((labels == 3).sum(), -1))


def test_anchors_are_told_apart_by_overlap_and_each_object_has_one():
    network = detector("detection").proposal_network
    objects = torch.tensor([[0.0, 0, 100, 100], [300, 300, 310, 310]])
    faint = torch.tensor([[300.0, 300, 310, 302], [300, 300, 310, 301]])
    anchors = torch.cat([boxes_by_iou(0.9, 0.71, 0.69, 0.31, 0.29), faint])
    (labels,), (goals,) = network.assign_targets_to_anchors([anchors], [{"boxes": objects}])
    assert labels.tolist() == [1, 1, -1, -1, 0, 1, 0]
    assert torch.equal(goals[[0, 5]], objects)


def test_losses_of_proposals_by_hand():
    """3 positive, 5 negative, 2 ignored anchors of 2 images: none is left out, but 256 each is the divisor."""
    network = detector("detection").proposal_network
    labels = [torch.tensor([1.0, 0, -1, 0, 1]), torch.tensor([0.0, 1, 0, -1, 0])]
    logits, deltas = torch.linspace(-2, 2, 10).view(10, 1), torch.linspace(-1, 3, 40).view(10, 4)
    goals = [torch.full((5, 4), 0.25), torch.full((5, 4), -0.5)]
    class_loss, box_loss = network.compute_loss(logits, deltas, labels, goals)
    flat = torch.cat(labels).tolist()
    expected = sum(
        math.log(1 + math.exp(-x if label else x)) for x, label in zip(logits[:, 0].tolist(), flat) if label >= 0
    )
    assert ANCHORS_PER_IMAGE == 256
    assert class_loss.item() == pytest.approx(expected / 512, rel=1e-5)
    distances = (deltas - torch.cat(goals)).abs().sum(dim=1).tolist()
    assert box_loss.item() == pytest.approx((distances[0] + distances[4] + distances[6]) / 512, rel=1e-5)


def test_losses_of_a_box_head_by_hand():
    """Both are means over all regions; background has no box."""
    head = detector("detection").box_heads[1]
    logits, deltas, labels = torch.randn(4, NUM_LABELS + 1), torch.randn(4, 4), torch.tensor([5, 2, 5, 0])
    boxes, goals = some_boxes(4), some_boxes(4, seed=1)
    class_loss, box_loss = head.loss(logits, deltas, boxes, labels, goals)
    assert_close_relative(class_loss, -logits.log_softmax(dim=1)[range(4), labels].mean())
    wanted = head.box_coder.encode_single(goals, boxes)
    assert_close_relative(box_loss, (deltas - wanted).abs().sum(dim=1)[[1, 3]].sum() / 4)
    nothing = head.loss(logits[:0], deltas[:0], boxes[:0], labels[:0], goals[:0])
    assert [loss.item() for loss in nothing] == [0, 0]


def test_targets_of_masks_cover_the_box():
    """With logits of 20, a pixel that should be 0 costs 20 and one that should be 1 nothing."""
    masks = torch.zeros(2, 40, 50, dtype=torch.uint8)
    masks[0, 8:24, 10:38] = 1
    masks[1, 5:13, 0:28] = 1
    boxes = torch.tensor([[10.0, 8, 38, 24], [10, 8, 66, 24], [10, 0, 38, 16], [0, 5, 28, 13]])
    logits = torch.full((4, 28, 28), 20.0)
    shares = []
    for index, box in enumerate(boxes):
        of = torch.tensor([index // 3])
        shares.append(1 - CroprViTMaskHead.loss(logits[:1], [box[None]], [of], [masks]).item() / 20)
    assert shares == pytest.approx([1, 0.5, 0.5, 1], abs=1e-5)
    together = CroprViTMaskHead.loss(logits, [boxes], [torch.tensor([0, 0, 0, 1])], [masks]).item()
    assert together == pytest.approx(20 * (1 - sum(shares) / 4), abs=1e-4)
    split = [boxes[:3], boxes[:0], boxes[3:]]
    objects = [torch.tensor([0, 0, 0]), torch.zeros(0, dtype=torch.long), torch.tensor([0])]
    of_images = CroprViTMaskHead.loss(logits, split, objects, [masks[:1], masks[:0], masks[1:]])
    assert of_images.item() == pytest.approx(together, abs=1e-4)
    assert CroprViTMaskHead.loss(logits[:0], [boxes[:0]], [objects[1]], [masks]).item() == 0


def test_masks_train_the_class_of_their_region_on_first_stage_regions(monkeypatch):
    model, seen = trainable(), []
    inputs, mask_head = make_inputs(model), model.mask_head
    monkeypatch.setattr(
        mask_head, "forward", lambda regions, labels: seen.append(labels) or torch.zeros(len(labels), 28, 28)
    )
    assert model(**inputs).loss_dict["loss_mask"].item() == pytest.approx(math.log(2), rel=1e-5)
    assert {*seen[0].tolist()} <= {*inputs["labels"][0]["class_labels"].tolist()}
    logits = torch.arange(2 * NUM_LABELS).view(2, NUM_LABELS, 1, 1).expand(-1, -1, 28, 28).float()
    monkeypatch.undo()
    monkeypatch.setattr(mask_head.predictor, "forward", lambda _: logits)
    chosen = mask_head(torch.zeros(2, 8, 14, 14), torch.tensor([3, 1]))
    assert chosen[:, 0, 0].tolist() == [3, NUM_LABELS + 1]


@pytest.mark.parametrize("task", DETECTORS)
def test_regions_that_leave_the_image_do_not_stop_training(task, monkeypatch):
    """Boxes that a stage moves out of the image are dropped, all of them if need be."""
    model = trainable(task)
    inputs = make_inputs(model)
    inputs["labels"][1] = inputs["labels"][0]
    for head in model.box_heads:
        monkeypatch.setattr(head.box_predictor, "bias", torch.nn.Parameter(torch.tensor([1e4, 1e4, 0, 0])))
    outputs = loss_of(model, inputs)
    assert [outputs.loss_dict[name].item() for name in LOSSES[4:]] == [0] * 4
    outputs.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


# Gradients


def stage_losses(losses, *stages):
    return sum(losses[f"loss_{part}_stage{stage}"] for stage in stages for part in ("cls", "box_reg"))


def detection_losses(model, features, inputs):
    targets = targets_of(model, inputs)
    torch.manual_seed(0)
    return model.detection_losses(features, image_list(inputs["pixel_values"]), targets)


@pytest.mark.parametrize("stage", [1, 2])
def test_later_stages_do_not_train_the_boxes_that_they_get(stage):
    model = trainable()
    inputs = make_inputs(model)
    losses = detection_losses(model, features_of(model, inputs["pixel_values"]), inputs)
    stage_losses(losses, stage).backward()
    trained = {name.rpartition(".layers")[0] or name for name, p in model.named_parameters() if p.grad is not None}
    assert all(name.startswith(f"box_heads.{stage}") for name in trained) and trained


def test_box_heads_pass_a_third_of_their_gradient_to_the_features(monkeypatch):
    model = trainable()
    inputs, regions, gradients = make_inputs(model), model._regions, []
    features = features_of(model, inputs["pixel_values"])
    for scaled in (True, False):
        if not scaled:
            monkeypatch.setattr(model, "_regions", lambda *arguments, gradient=1.0: regions(*arguments))
        losses = detection_losses(model, features, inputs)
        parameters = [*model.box_heads.parameters()]
        names = ("loss_mask", "loss_rpn_cls", "loss_rpn_loc")
        gradients.append(
            [
                torch.autograd.grad(stage_losses(losses, 0, 1, 2), features[:4], retain_graph=True),
                torch.autograd.grad(stage_losses(losses, 0, 1, 2), parameters, retain_graph=True),
                torch.autograd.grad(sum(losses[name] for name in names), features),
            ]
        )
    for factor, with_scale, without in zip((1 / 3, 1, 1), *gradients, strict=True):
        assert any(gradient.abs().sum() > 0 for gradient in without)
        for first, second in zip(with_scale, without, strict=True):
            assert_close_relative(first, second * factor, 1e-4)


@pytest.mark.parametrize("task", DETECTORS)
def test_auxiliary_losses_train_the_queries_and_nothing_in_the_backbone(task):
    gradients = {}
    for weight in (0.0, 1.0):
        model = trainable(task, auxiliary_loss_weight=weight)
        loss_of(model, make_inputs(model)).loss.backward()
        gradients[weight] = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, gradient in gradients[1.0].items():
        if "token_reducers" in name:
            assert gradients[0.0][name].abs().sum() == 0 < gradient.abs().sum()
        else:
            assert torch.equal(gradient, gradients[0.0][name])


@pytest.mark.parametrize("weight", [1.0, 0.25])
@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("task", DETECTORS)
def test_auxiliary_losses_by_hand(task, num_queries, weight):
    """Which classes occur in each image: cross-entropy of each class for itself, of each query for itself."""
    model = trainable(task, num_queries=num_queries, auxiliary_loss_weight=weight)
    inputs = make_inputs(model, batch_size=3)
    inputs["labels"][0]["class_labels"] = torch.tensor([4, 1, 4])
    outputs = loss_of(model, inputs)
    presence = torch.zeros(3, NUM_LABELS)
    for image, label in enumerate(inputs["labels"]):
        for number in label["class_labels"].tolist():
            presence[image, number] = 1
    assert presence[0].tolist() == [0, 1, 0, 0, 1] and presence[2].tolist() == [0] * 5
    expected = []
    for logits in model.cropr_vit(inputs["pixel_values"]).auxiliary_logits:
        assert logits.shape == (3, num_queries, NUM_LABELS)
        of_query = [
            -(presence * logits[:, query].sigmoid().log() + (1 - presence) * (-logits[:, query]).sigmoid().log())
            for query in range(num_queries)
        ]
        expected.append(torch.stack(of_query).mean())
    assert_close_relative(outputs.auxiliary_losses, torch.stack(expected).detach())
    assert_close_relative(outputs.main_loss, sum(outputs.loss_dict.values()))
    assert_close_relative(outputs.loss.detach(), outputs.main_loss + weight * sum(expected).detach())
    assert outputs.loss.requires_grad and not any(loss.requires_grad for loss in outputs.loss_dict.values())


# Outputs


@pytest.mark.parametrize("task", DETECTORS)
def test_what_is_returned_and_in_which_order(task):
    model = trainable(task)
    inputs = make_inputs(model)
    losses = [*LOSSES[:2], *(["loss_mask"] if model.has_masks else []), *LOSSES[2:]]
    training = loss_of(model, inputs)
    assert list(training) == ["loss", "loss_dict", "main_loss", "auxiliary_losses"]
    assert list(training.loss_dict) == losses
    assert list(model(inputs["pixel_values"])) == []
    with torch.no_grad():
        evaluation = loss_of(model.eval(), inputs, seed=0)
        inference = model(inputs["pixel_values"])
    detections = ["logits", "pred_boxes", *(["pred_masks"] if model.has_masks else [])]
    assert list(evaluation) == ["loss", "loss_dict", *detections]
    assert list(inference) == detections
    assert_close_relative(evaluation.loss, training.main_loss)
    assert all(torch.equal(evaluation[name], inference[name]) for name in detections)
    assert list(model(inputs["pixel_values"], output_pruning=True))[-1] == "pruned_after_block"


@pytest.mark.parametrize("task", DETECTORS)
@torch.no_grad()
def test_softmax_of_logits_is_the_score(task, monkeypatch):
    model, found = detector(task), []
    scores = model(make_images(3, 40, 48)).logits.softmax(-1)[..., :-1].amax(-1).flatten().sort().values
    model.config.score_threshold = scores[14:16].mean().item()  # between two, and never one that rounding decides
    detect = model.detect
    monkeypatch.setattr(model, "detect", lambda *arguments: found.extend(detect(*arguments)) or found)
    outputs = model(make_images(3, 40, 48))
    slots = model.config.detections_per_image
    for image, detections in enumerate(found):
        count = len(detections["scores"])
        assert (detections["scores"].diff() <= 0).all() and (detections["scores"] > 0.1).all()
        probabilities = outputs.logits[image].softmax(dim=-1)
        assert_close(probabilities[range(count), detections["labels"]], detections["scores"], rtol=1e-5, atol=1e-6)
        assert_close(probabilities[:count, -1], 1 - detections["scores"], rtol=1e-5, atol=1e-6)
        assert torch.equal(probabilities[count:, -1], torch.ones(slots - count))
        assert outputs.logits[image].half().isfinite().all()
        boxes = box_convert(outputs.pred_boxes[image], "cxcywh", "xyxy") * torch.tensor([48, 40, 48, 40])
        assert_close(boxes[:count], detections["boxes"], rtol=0, atol=1e-4)
        assert not outputs.pred_boxes[image, count:].any()
    assert len({len(detections["scores"]) for detections in found}) > 1


def test_extreme_scores_survive():
    model = detector("detection")
    scores = torch.tensor([1.0, 1 - 1e-4, 0.5, 1e-3, 0.0])
    detections = {"boxes": some_boxes(5), "scores": scores, "labels": torch.tensor([0, 4, 1, 2, 3])}
    logits, _ = model._detr_form([detections], [(64, 64)])
    assert logits.shape == (1, 10, NUM_LABELS + 1) and logits.isfinite().all()
    assert_close(logits.softmax(-1)[0, range(5), detections["labels"]], scores, rtol=0, atol=1e-5)


@pytest.mark.parametrize("task", DETECTORS)
@pytest.mark.parametrize("name", ["plain", "windows"])
@torch.no_grad()
def test_stripping_changes_no_detection(task, name, tmp_path):
    model, images = detector(task, name, use_auxiliary_heads=True), make_images(2, 30, 44)
    expected = model(images)
    model.save_pretrained(tmp_path)
    model.remove_auxiliary_heads()
    for stripped in (model, type(model).from_pretrained(tmp_path)):
        assert not stripped.config.use_auxiliary_heads
        outputs = stripped(images)
        assert list(outputs) == list(expected)
        for key in expected:
            assert_close_relative(outputs[key], expected[key])


@pytest.mark.parametrize(("height", "width"), [(30, 27), (40, 33), (25, 48)])
@torch.no_grad()
def test_an_image_of_broken_patches_equals_a_padded_one_with_a_mask(height, width):
    """Also beside another in a batch; boxes and masks cover the image without padding."""
    model, images = detector(mask_stride=4), make_images(1, height, width)
    below, beside = -height % PATCH_SIZE, -width % PATCH_SIZE
    mask = F.pad(torch.ones(1, height, width), (0, beside, 0, below)).long()
    alone, padded = model(images), model(F.pad(images, (0, beside, 0, below)), mask)
    assert torch.equal(alone.logits, padded.logits) and torch.equal(alone.pred_boxes, padded.pred_boxes)
    assert alone.pred_masks.shape == (1, 10, math.ceil(height / 4), math.ceil(width / 4))
    corners = box_convert(padded.pred_boxes, "cxcywh", "xyxy")
    assert corners.min() >= -1e-6 and corners.max() <= 1 + 1e-6
    assert (alone.logits[..., -1] < 0).any()


@torch.no_grad()
def test_padding_can_be_pruned_first():
    """12 x 20 pixels of the second image are 2 x 3 patches, the last row and column of them partly padding."""
    model = detector("detection", prune_padding_first=True)
    mask = torch.ones(2, 30, 27)
    mask[1, 12:] = mask[1, :, 20:] = 0
    blocks = model(make_images(2, 30, 27), mask, output_pruning=True).pruned_after_block.view(2, 4, 4)
    inside = torch.zeros(4, 4, dtype=torch.bool)
    inside[:2, :3] = True
    assert blocks[1][~inside].max() <= blocks[1][inside].min()


def test_labels_of_an_image_of_broken_patches_are_in_shares_of_the_image():
    """With the padding in `pixel_values`, they are in shares of that."""
    model = trainable()
    inputs = make_inputs(model, 30, 27)
    alone = loss_of(model, inputs)
    labels = [
        {
            "class_labels": label["class_labels"],
            "boxes": label["boxes"] * torch.tensor([27, 30, 27, 30]) / 32,
            "masks": F.pad(label["masks"], (0, 5, 0, 2)),
        }
        for label in inputs["labels"]
    ]
    images, mask = F.pad(inputs["pixel_values"], (0, 5, 0, 2)), F.pad(torch.ones(2, 30, 27), (0, 5, 0, 2))
    padded = loss_of(model, {"pixel_values": images, "pixel_mask": mask, "labels": labels})
    for name, loss in alone.loss_dict.items():
        assert_close(padded.loss_dict[name], loss, rtol=1e-4, atol=1e-5)


# From scores to detections


@pytest.mark.parametrize(
    ("second", "classes", "expected"),
    [
        ([0.0, 0, 100, 80], [0, 0], [0.9, 0.16]),
        ([0.0, 0, 100, 50], [0, 0], [0.9, 0.8]),
        ([0.0, 0, 100, 80], [0, 1], [0.9, 0.8]),
        ([0.0, 0, 100, 100], [1, 1], [0.9]),  # nothing is left of a copy
        ([0.0, 0, 100, 60], [2, 2], [0.9, 0.32]),  # the threshold counts
    ],
)
def test_soft_suppression_of_two_boxes(second, classes, expected):
    boxes = torch.tensor([[0.0, 0, 100, 100], second])
    kept, scores = soft_nms(boxes, torch.tensor([0.9, 0.8]), torch.tensor(classes), 0.6, 100)
    assert kept.tolist() == list(range(len(expected)))
    assert scores.tolist() == pytest.approx(expected, rel=1e-5)


def naive_suppression(boxes, scores, classes, threshold, linear):
    left, scores, kept = list(range(len(boxes))), scores.tolist(), []
    overlaps = box_iou(boxes, boxes).tolist()
    while left:
        best = max(left, key=lambda index: scores[index])
        left.remove(best)
        kept.append((best, scores[best]))
        for other in list(left):
            if classes[other] == classes[best] and overlaps[best][other] >= threshold:
                if linear:
                    scores[other] *= 1 - overlaps[best][other]
                else:
                    left.remove(other)
    return [(index, score) for index, score in kept if score >= 1e-3]


@pytest.mark.parametrize("seed", [0, 1, *full(*range(2, 8))])
@pytest.mark.parametrize("linear", [False, True])
def test_suppression_equals_a_naive_loop(linear, seed):
    """Few classes on few places, so that most boxes overlap many others."""
    generator = torch.Generator().manual_seed(seed)
    boxes = some_boxes(60, 30, seed).round()  # whole numbers stay exact when classes are moved apart
    boxes[:, 2:] += 5
    scores = torch.rand(60, 3, generator=generator) * (torch.rand(60, 3, generator=generator) < 0.5)
    fields = {"num_labels": 3, "nms_threshold": 0.45, "detections_per_image": 25, "score_threshold": 0.1}
    model = detector("detection", nms_method="linear" if linear else "hard", **fields)
    found = model._suppress(boxes, scores)
    regions, classes = torch.where(scores > 0.1)
    expected = naive_suppression(boxes[regions], scores[regions, classes], classes, 0.45, linear)[:25]
    assert len(expected) == 25 < len(regions)
    chosen = [index for index, _ in expected]
    assert torch.equal(found["boxes"], boxes[regions][chosen])
    assert torch.equal(found["labels"], classes[chosen])
    assert_close(found["scores"], torch.tensor([score for _, score in expected]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("nms_method", ["hard", "linear"])
def test_nothing_above_the_threshold_is_no_detection(nms_method):
    model = detector("detection", nms_method=nms_method, score_threshold=0.5)
    for boxes in (some_boxes(0), some_boxes(7)):
        found = model._suppress(boxes, torch.full((len(boxes), NUM_LABELS), 0.2))
        assert [tuple(tensor.shape) for tensor in found.values()] == [(0, 4), (0,), (0,)]
        assert found["labels"].dtype == torch.long


@pytest.mark.parametrize("image_size", [(40, 60), (33, 21)])
@pytest.mark.parametrize("stride", [1, 3])
def test_pasted_masks_equal_a_naive_loop_over_pixels(stride, image_size):
    masks, boxes = torch.rand(3, 28, 28), torch.tensor([[2.5, 3, 17, 30.2], [0, 0, 21, 33], [8, 7, 8.4, 7.3]])
    size = tuple(math.ceil(length / stride) for length in image_size)
    pasted = paste_masks(masks, boxes, image_size, size)
    assert pasted.shape == (3, *size)
    for mask, (x1, y1, x2, y2), found in zip(masks, boxes.tolist(), pasted):
        for row in range(size[0]):
            for column in range(size[1]):
                v = ((row + 0.5) / size[0] * image_size[0] - y1) / (y2 - y1) * 28 - 0.5
                u = ((column + 0.5) / size[1] * image_size[1] - x1) / (x2 - x1) * 28 - 0.5
                expected = 0.0
                for y in (math.floor(v), math.floor(v) + 1):
                    for x in (math.floor(u), math.floor(u) + 1):
                        if 0 <= y < 28 and 0 <= x < 28:
                            expected += (1 - abs(v - y)) * (1 - abs(u - x)) * mask[y, x].item()
                assert found[row, column].item() == pytest.approx(expected, abs=1e-3)


def test_a_full_mask_fills_its_box_and_an_empty_box_shows_nothing():
    boxes = torch.tensor([[10.0, 20, 66, 48], [0, 0, 80, 60], [30, 30, 30, 30]])
    pasted = paste_masks(torch.ones(3, 28, 28), boxes, (60, 80), (60, 80)) >= 0.5
    expected = torch.zeros(2, 60, 80, dtype=torch.bool)
    expected[0, 20:48, 10:66] = True
    expected[1] = True
    expected[1, [0, 0, 59, 59], [0, 79, 0, 79]] = False  # what is outside rounds the corners of large boxes
    assert torch.equal(pasted[:2], expected) and not pasted[2].any()


@torch.no_grad()
def test_scores_with_maskness_are_those_of_boxes_times_the_mean_of_the_mask(monkeypatch):
    model = detector(maskness_threshold=0.5)
    probabilities = torch.full((3, 28, 28), 0.25)
    probabilities[0, :14] = 0.75
    probabilities[1, 3, 3:5] = torch.tensor([0.6, 1.0])
    monkeypatch.setattr(model.mask_head, "forward", lambda *_: probabilities.logit(eps=1e-6))
    found = [
        {"boxes": some_boxes(2, 32), "scores": torch.tensor([0.8, 0.6]), "labels": torch.tensor([0, 1])},
        {"boxes": some_boxes(1, 32), "scores": torch.tensor([0.9]), "labels": torch.tensor([0])},
    ]
    features = [torch.zeros(2, 8, side, side) for side in (16, 8, 4, 2, 1)]
    model._add_masks(features, found)
    assert torch.cat([each["scores"] for each in found]).tolist() == pytest.approx([0.6, 0.48, 0.0], rel=1e-5)
    assert [each["masks"].shape[0] for each in found] == [2, 1]


@torch.no_grad()
def test_scores_are_means_over_the_cascade_and_boxes_those_of_its_end(monkeypatch):
    model = detector("detection", score_threshold=0.0, nms_threshold=0.99, detections_per_image=100)
    proposals = [some_boxes(3, 32), some_boxes(2, 32, seed=1)]
    monkeypatch.setattr(model, "_propose", lambda *_: (proposals, {}))
    logits = torch.randn(3, 5, NUM_LABELS + 1)
    deltas = 0.1 * torch.randn(3, 5, 4)
    for head, *outputs in zip(model.box_heads, logits, deltas):
        monkeypatch.setattr(head, "forward", lambda _, outputs=outputs: outputs)
    images = make_images()
    found = model.detect([level.detach() for level in features_of(model, images)], image_list(images))
    boxes = torch.cat(proposals)
    for head, moved in zip(model.box_heads, deltas):
        boxes = head.box_coder.decode_single(moved, boxes).clamp(0, 32)
    expected = logits.softmax(dim=-1).mean(dim=0)[:, :-1]
    for detections, regions in zip(found, ([0, 1, 2], [3, 4])):
        assert len(detections["scores"]) == len(regions) * NUM_LABELS
        for box, score, label in zip(*detections.values()):
            at = ((boxes - box).abs().amax(dim=1) < 1e-4).nonzero().flatten().tolist()
            assert at and {*at} <= {*regions}
            assert score.item() == pytest.approx(expected[at[0], label].item(), abs=1e-5)


# Image processors, Auto classes, pipelines


def coco_annotations(*boxes):
    annotations = [
        {"bbox": box, "category_id": number, "area": box[2] * box[3], "iscrowd": 0} for number, box in enumerate(boxes)
    ]
    return {"image_id": 0, "annotations": annotations}


def prepared(sizes, annotations=None):
    """Images of (width, height) as stock code prepares them: the shorter side has 40 pixels, the rest is padded."""
    images = [Image.effect_noise(size, 90).convert("RGB") for size in sizes]
    processor = DetrImageProcessor(size={"shortest_edge": 40, "longest_edge": 90})
    return processor, processor(images, annotations=annotations, return_tensors="pt")


def test_labels_and_detections_are_in_pixels_of_the_original_images(monkeypatch):
    """Objects go in as COCO has them, and come out as they went in if the model finds them."""
    sizes = [(80, 40), (60, 100)]
    coco = [[[8.0, 4.0, 20.0, 16.0], [60.0, 10.0, 20.0, 30.0]], [[0.0, 50.0, 60.0, 50.0]]]
    processor, inputs = prepared(sizes, [coco_annotations(*boxes) for boxes in coco])
    assert inputs["pixel_values"].shape[2] > 40 < inputs["pixel_values"].shape[3]
    model = detector()
    for label in inputs["labels"]:
        label["masks"] = box_masks(label["boxes"], *inputs["pixel_values"].shape[-2:])
    targets = targets_of(model, inputs)
    found = [
        {
            "boxes": target["boxes"],
            "scores": torch.tensor([0.9, 0.7])[: len(target["boxes"])],
            "labels": target["class_labels"],
            "masks": torch.ones(len(target["boxes"]), 28, 28),
        }
        for target in targets
    ]
    monkeypatch.setattr(model, "detect", lambda *_: found)
    with torch.no_grad():
        outputs = model(inputs["pixel_values"], inputs["pixel_mask"])
    original = [(height, width) for width, height in sizes]
    for result, boxes in zip(processor.post_process_object_detection(outputs, 0.5, original), coco):
        assert_close(result["boxes"], box_convert(torch.tensor(boxes), "xywh", "xyxy"), rtol=0, atol=1e-3)
        assert result["labels"].tolist() == list(range(len(boxes)))
        assert result["scores"].tolist() == pytest.approx([0.9, 0.7][: len(boxes)], abs=1e-5)
    masks = F.interpolate(outputs.pred_masks.sigmoid()[:1, :2], original[0], mode="bilinear")[0] > 0.5
    expected = box_masks(
        box_convert(torch.tensor(coco[0]), "xywh", "cxcywh") / torch.tensor([80, 40, 80, 40]), *original[0]
    ).bool()
    agreement = (masks & expected).sum(dim=(1, 2)) / (masks | expected).sum(dim=(1, 2))
    assert (agreement > 0.85).all()


@torch.no_grad()
def test_stock_post_processing_reads_the_outputs(monkeypatch):
    sizes = [(90, 60), (50, 100)]
    processor, inputs = prepared(sizes)
    model, found = detector(score_threshold=0.5), []
    make_certain(model)
    detect = model.detect
    monkeypatch.setattr(model, "detect", lambda *arguments: found.extend(detect(*arguments)) or found)
    outputs = model(**inputs)
    original = torch.tensor([[height, width] for width, height in sizes])
    results = processor.post_process_object_detection(outputs, 0.5, original)
    inside = inputs["pixel_mask"].amax(dim=2).sum(dim=1), inputs["pixel_mask"].amax(dim=1).sum(dim=1)
    for image, (result, detections) in enumerate(zip(results, found)):
        scale = original[image].flip(0) / torch.stack([inside[1][image], inside[0][image]])
        assert_close(result["boxes"], detections["boxes"] * scale.repeat(2), rtol=1e-4, atol=1e-3)
        assert torch.equal(result["labels"], detections["labels"]) and len(result["labels"]) > 0
        assert (result["boxes"] <= original[image].flip(0).repeat(2) + 1e-3).all()
    segments = processor.post_process_instance_segmentation(outputs, 0.5, target_sizes=original.tolist())
    for image, result in enumerate(segments):
        assert result["segmentation"].shape == tuple(original[image])
        assert len(result["segments_info"]) > 0
        assert {segment["label_id"] for segment in result["segments_info"]} <= {*found[image]["labels"].tolist()}


@pytest.mark.parametrize(
    ("auto_class", "task"),
    [
        (AutoModelForObjectDetection, "detection"),
        (AutoModelForInstanceSegmentation, "instances"),
        (AutoModelForImageSegmentation, "instances"),
        (AutoModelForImageSegmentation, "segmentation"),
        (AutoModelForSemanticSegmentation, "segmentation"),
    ],
)
def test_auto_classes_choose_by_architecture(auto_class, task, tmp_path):
    TASKS[task].build("plain").save_pretrained(tmp_path)
    assert type(auto_class.from_pretrained(tmp_path)) is TASKS[task].model_class


@pytest.fixture
def published(tmp_path):
    def publish(task, processor_class=DetrImageProcessor):
        model = detector(task, use_auxiliary_heads=True, score_threshold=0.5)
        make_certain(model)
        model.config.id2label = {index: f"class {index}" for index in range(NUM_LABELS)}
        model.save_pretrained(tmp_path)
        processor_class(size={"shortest_edge": 36, "longest_edge": 60}).save_pretrained(tmp_path)
        return str(tmp_path), model

    return publish


@pytest.mark.parametrize("size", [(50, 38), (40, 70)])
@torch.no_grad()
def test_object_detection_pipeline(size, published, log_records):
    folder, model = published("detection")
    image = Image.effect_noise(size, 90).convert("RGB")
    detect = pipeline("object-detection", model=folder, device="cpu")
    results = detect(image, threshold=0.5)
    assert [record.getMessage() for record in log_records if record.levelname != "INFO"] == []
    processor = DetrImageProcessor.from_pretrained(folder)
    inputs = processor(image, return_tensors="pt")
    outputs = detect.model(**inputs)
    assert_close_relative(outputs.logits, model(**inputs).logits)
    (expected,) = processor.post_process_object_detection(outputs, 0.5, [size[::-1]])
    assert len(results) == len(expected["scores"]) > 0
    for result, box, score, label in zip(results, *(expected[key] for key in ("boxes", "scores", "labels"))):
        assert result["label"] == f"class {label}" and result["score"] == pytest.approx(score.item(), abs=1e-5)
        assert list(result["box"].values()) == pytest.approx(box.tolist(), abs=1.01)


@torch.no_grad()
def test_instance_segmentation_pipeline(published, log_records):
    folder, model = published("instances")
    image = Image.effect_noise((50, 38), 90).convert("RGB")
    segment = pipeline("image-segmentation", model=folder, device="cpu")
    assert type(segment.model) is CroprViTForInstanceSegmentation
    results = segment(image, subtask="instance", threshold=0.5)
    assert [record.getMessage() for record in log_records if record.levelname != "INFO"] == []
    processor = DetrImageProcessor.from_pretrained(folder)
    inputs = processor(image, return_tensors="pt")
    outputs = segment.model(**inputs)
    assert_close_relative(outputs.logits, model(**inputs).logits)
    (expected,) = processor.post_process_instance_segmentation(
        outputs, 0.5, overlap_mask_area_threshold=0.5, target_sizes=[(38, 50)]
    )
    assert len(results) == len(expected["segments_info"]) > 0
    for result, info in zip(results, expected["segments_info"]):
        assert result["label"] == f"class {info['label_id']}" and result["mask"].size == (50, 38)
        assert result["score"] == pytest.approx(info["score"], abs=1e-5)
        mask = torch.tensor(list(result["mask"].tobytes())).view(38, 50) == 255
        assert torch.equal(mask, expected["segmentation"] == info["id"])


@pytest.mark.parametrize("score", [0.55, 0.8, 0.99])
@pytest.mark.parametrize("subtask", ["instance", "panoptic"])
def test_label_images_are_the_masks(subtask, score):
    """Disks that are faint, but not 0, around; the processor of DETR gives them the background as well."""
    rows, columns = torch.meshgrid(torch.arange(40.0), torch.arange(60.0), indexing="ij")
    centres = [(12, 14), (25, 40)]
    disks = torch.stack([(rows - row) ** 2 + (columns - column) ** 2 < 80 for row, column in centres])
    masks = torch.where(disks, 4.0, -4.0)[None]
    scores = torch.tensor([score, 0.97])
    logits = torch.full((1, 2, NUM_LABELS + 1), -1e4)
    logits[0, [0, 1], [3, 0]] = scores.log()
    logits[..., -1] = (1 - scores).log()
    outputs = SimpleNamespace(logits=logits, pred_masks=masks)
    processor = CroprViTImageProcessor()
    process = getattr(processor, f"post_process_{subtask}_segmentation")
    (result,) = process(
        outputs, target_sizes=[(40, 60)], **({} if subtask == "instance" else {"label_ids_to_fuse": {}})
    )
    assert [segment["label_id"] for segment in result["segments_info"]] == [3, 0]
    for segment, disk in zip(result["segments_info"], disks):
        assert torch.equal(result["segmentation"] == segment["id"], disk)


@pytest.mark.parametrize("name", ["threshold", "mask_threshold"])
def test_thresholds_of_label_images_are_shares(name):
    outputs = SimpleNamespace(logits=torch.zeros(1, 2, NUM_LABELS + 1), pred_masks=torch.zeros(1, 2, 4, 4))
    for value in (math.nan, -0.1, 1.5):
        with pytest.raises(ValueError, match=rf"`{name}` is {value}; it must be in \[0, 1\]"):
            CroprViTImageProcessor().post_process_instance_segmentation(outputs, **{name: value})


def test_class_labels_of_an_image_without_objects_may_have_any_dtype():
    label = {"class_labels": torch.tensor([]), "boxes": torch.zeros(0, 4), "masks": torch.zeros(0, 32, 32)}
    assert trainable()(make_images(1), labels=[label]).loss.isfinite()


@torch.no_grad()
def test_boxes_that_leave_the_image_by_rounding_are_clipped():
    model = trainable()
    boxes = torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.9, 0.5, 0.23, 0.4]])
    (target,) = model._targets(wrong_label(boxes=boxes), make_images(1), [(32, 31)])
    assert_close(target["boxes"], torch.tensor([[0, 0, 31, 32.0], [25.12, 9.6, 31, 22.4]]))


# Hard cases


def labels_with(boxes, height, width, masks):
    boxes = torch.tensor(boxes).view(-1, 4)
    label = {"class_labels": torch.arange(len(boxes)) % NUM_LABELS, "boxes": boxes}
    return {**label, "masks": box_masks(boxes, height, width)} if masks else label


ONE, SMALL = [0.5, 0.5, 0.25, 0.5], [0.3, 0.3, 0.02, 0.01]
MANY = [[0.05 + 0.9 * (index % 20) / 20, 0.05 + 0.9 * (index // 20) / 15, 0.1, 0.08] for index in range(300)]


@pytest.mark.parametrize("task", DETECTORS)
@pytest.mark.parametrize("name", ["plain", *full("windows")])
@pytest.mark.parametrize("size", [(9, 41), *full(((32, 32),), ((16, 16),), ((40, 24),))])
@pytest.mark.parametrize("objects", [[[], []], [MANY, ONE], *full([ONE, []], [ONE, SMALL])])
def test_finite_losses_and_gradients_in_hard_cases(task, name, size, objects):
    """No object, one, one smaller than a patch, hundreds; images with 4 patches, and with windows over their edge."""
    pruning = (
        {"pruning_rate": None, "pruning_schedule": [16, 4, 2, 2, 2]} if size != (16, 16) else {"token_reducer": None}
    )
    if size == (16, 16):
        pruning = {**pruning, "pruning_rate": None, "pruning_schedule": None}
    heads = size != (16, 16)
    model = detector(task, name, use_auxiliary_heads=heads, **pruning).train()
    labels = [labels_with(boxes, *size, model.has_masks) for boxes in objects]
    outputs = loss_of(model, {"pixel_values": make_images(2, *size), "labels": labels})
    outputs.loss.backward()
    assert all(loss.isfinite() for loss in outputs.loss_dict.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        evaluation = loss_of(model.eval(), {"pixel_values": make_images(2, *size), "labels": labels})
    assert all(value.isfinite().all() for key, value in evaluation.items() if key != "loss_dict")


@pytest.mark.parametrize("precision", ["bfloat16", "autocast"])
@pytest.mark.parametrize("objects", [[[], []], [MANY, ONE]])
def test_hard_cases_in_low_precision(precision, objects):
    model = trainable()
    labels = [labels_with(boxes, 32, 32, True) for boxes in objects]
    inputs = {"pixel_values": make_images(), "labels": labels}
    if precision == "bfloat16":
        model = model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        outputs = loss_of(model, inputs)
        detections = model.eval()(inputs["pixel_values"])
    outputs.loss.backward()
    assert outputs.loss.dtype == torch.float32 and all(p.grad.isfinite().all() for p in model.parameters())
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in detections.values())


@pytest.mark.parametrize("nms_method", ["hard", "linear"])
@torch.no_grad()
def test_images_without_detections(nms_method):
    """All of a batch, and one beside another with some."""
    model = detector(score_threshold=0.99, nms_method=nms_method)
    nothing = model(make_images())
    assert torch.equal(nothing.logits.softmax(-1)[..., -1], torch.ones(2, 10))
    assert not nothing.pred_boxes.any() and (nothing.pred_masks.sigmoid() < 1e-5).all()
    assert all(len(result["scores"]) == 0 for result in DetrImageProcessor().post_process_object_detection(nothing, 0))
    results = DetrImageProcessor().post_process_instance_segmentation(nothing, 0.5, target_sizes=[(20, 30)] * 2)
    assert [result["segments_info"] for result in results] == [[], []]
    scores = detector()(make_images(3)).logits.softmax(-1)[..., :-1].amax(dim=(1, 2)).sort().values
    some = detector(score_threshold=(scores[0] + scores[1]).item() / 2, nms_method=nms_method)(make_images(3))
    assert (some.logits[..., -1] == 0).all(dim=1).sum() == 1 and some.logits.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize(
    "part",
    [
        "pixel_values",
        "cropr_vit.layers.0.mlp.fc1",
        "proposal_network.head.cls_logits",
        "proposal_network.head.bbox_pred",
        "box_heads.1.class_predictor",
        "box_heads.2.box_predictor",
        "mask_head.predictor.mask_fcn_logits",
    ],
)
@torch.no_grad()
def test_what_is_not_a_number_is_an_error_and_not_no_objects(part):
    model, images = detector(score_threshold=0.0), make_images()
    if part == "pixel_values":
        images[1, 0, 5, 5] = torch.nan
    else:
        model.get_submodule(part).weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"not a number.* in its weights or in `pixel"):
        model(images)
    model.train()(images)  # half precision meets it on the way, and skips the step


def test_an_image_without_proposals(monkeypatch):
    model = detector()
    monkeypatch.setattr(model, "_propose", lambda *_: ([torch.zeros(0, 4), some_boxes(3, 32)], {}))
    outputs = model(make_images())
    assert torch.equal(outputs.logits[0].softmax(-1)[:, -1], torch.ones(10))
    assert (outputs.logits[1, :, -1] < 0).any() and outputs.pred_masks.isfinite().all()


def test_a_single_class_is_enough():
    model = trainable(num_labels=1)
    inputs = make_inputs(model)
    outputs = loss_of(model, inputs)
    assert outputs.loss.isfinite() and outputs.auxiliary_losses.shape == (3,)
    assert model.eval()(inputs["pixel_values"]).logits.shape == (2, 10, 2)


# Training


def test_layer_decay():
    model = trainable()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    factors = {}
    for group in layer_decay_groups(model, learning_rate=1.0, weight_decay=0.1, layer_decay=0.8):
        factors |= {names[id(parameter)]: group["lr"] for parameter in group["params"]}
    assert factors.keys() == {*names.values()}
    for name, factor in factors.items():
        depth = 0
        if name.startswith("cropr_vit.embeddings"):
            depth = NUM_BLOCKS + 1
        elif name.startswith("cropr_vit.layers."):
            depth = NUM_BLOCKS - int(name.split(".")[2])
        assert factor == pytest.approx(0.8**depth), name
    assert factors["cropr_vit.embeddings.patch_embeddings.weight"] == pytest.approx(0.8**6)
    assert factors["cropr_vit.layers.4.mlp.fc1.weight"] == pytest.approx(0.8)
    parts = ("pyramid.", "proposal_network.", "box_heads.", "mask_head.", "cropr_vit.token_reducers.")
    assert all(any(name.startswith(part) and factors[name] == 1 for name in factors) for part in parts)


def bright_rectangles():
    """Two dark images with two bright rectangles each; the class is the channel."""
    corners = [[[4, 8, 30, 28], [36, 34, 60, 62]], [[30, 2, 62, 20], [6, 30, 26, 60]]]
    images, labels = torch.full((2, 3, 64, 64), -1.0), []
    for image, boxes in enumerate(corners):
        for channel, (x1, y1, x2, y2) in enumerate(boxes):
            images[image, channel, y1:y2, x1:x2] = 1.0
        shares = box_convert(torch.tensor(boxes).float(), "xyxy", "cxcywh") / 64
        labels.append({"class_labels": torch.tensor([0, 1]), "boxes": shares, "masks": box_masks(shares, 64, 64)})
    return images, labels, torch.tensor(corners).float()


@pytest.mark.full
def test_a_detector_learns_two_images():
    torch.manual_seed(0)
    fields = {**DETECTOR, "pyramid_channels": 16, "box_head_size": 32, "anchor_sizes": [4, 8, 16, 24, 48]}
    pruning = {"pruning_rate": 8, "use_auxiliary_heads": True}
    config = tiny_config(**fields, **pruning, image_size=64, num_labels=2, initializer_range=0.02)
    model = CroprViTForInstanceSegmentation(config).train()
    images, labels, corners = bright_rectangles()
    steps = 240  # half of them, or no decay, is too few for one seed in four
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        model(images, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
    with torch.no_grad():
        outputs = model.eval()(images)
    boxes = box_convert(outputs.pred_boxes, "cxcywh", "xyxy") * 64
    for image in range(2):
        for number in range(2):
            slot = outputs.logits[image, :, number].argmax()
            assert box_iou(boxes[image, slot][None], corners[image, number][None]).item() > 0.5
            mask = F.interpolate(outputs.pred_masks[image, slot][None, None], (64, 64), mode="bilinear")[0, 0] > 0
            wanted = labels[image]["masks"][number].bool()
            assert (mask & wanted).sum() / (mask | wanted).sum() > 0.5


# Checkpoints


def test_a_new_number_of_classes(tmp_path):
    source = trainable()
    source.save_pretrained(tmp_path)
    model = CroprViTForInstanceSegmentation.from_pretrained(
        tmp_path, num_labels=3, ignore_mismatched_sizes=True, use_auxiliary_heads=True
    )
    changed = {name.rpartition(".")[0] for name, tensor in model.state_dict().items() if 3 in tensor.shape[:1]}
    assert {f"box_heads.{stage}.class_predictor" for stage in range(3)}.isdisjoint(changed)  # 3 and the background
    assert "mask_head.predictor.mask_fcn_logits" in changed
    assert [head.class_predictor.out_features for head in model.box_heads] == [4] * 3
    assert torch.equal(model.box_heads[0].box_predictor.weight, source.box_heads[0].box_predictor.weight)
    outputs = loss_of(model.train(), make_inputs(model))
    assert outputs.loss.isfinite() and outputs.auxiliary_losses.shape == (3,)


@torch.no_grad()
def test_checkpoints_of_one_task_start_another(tmp_path):
    """Boxes for masks, and a detector as a base model; weights of the base model may not be missing."""
    source, images = detector("detection", use_final_norm=False), make_images()
    source.save_pretrained(tmp_path)
    model, info = CroprViTForInstanceSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] and all(key.startswith("mask_head.") for key in info["missing_keys"])
    expected = source(images)
    for key in ("logits", "pred_boxes"):
        assert_close_relative(model(images)[key], expected[key])
    base = CroprViTModel.from_pretrained(tmp_path)
    assert_close_relative(base(images).last_hidden_state, source.cropr_vit(images).last_hidden_state)


# Bad input


@pytest.mark.parametrize("task", DETECTORS)
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"last_layer_fusion": False}, r"`last_layer_fusion` is False.*set it to True, or `token_reducer` to None"),
        ({"num_labels": 0}, r"`num_labels` is 0; a detector needs at least 1 class"),
    ],
)
def test_configurations_that_cannot_be_are_refused(task, overrides, message):
    with pytest.raises(ValueError, match=message):
        detector(task, **overrides)


def wrong_label(**fields):
    label = {
        "class_labels": torch.tensor([0, 1]),
        "boxes": torch.full((2, 4), 0.5),
        "masks": torch.ones(2, 32, 32, dtype=torch.uint8),
        **fields,
    }
    return [{name: value for name, value in label.items() if value is not None}]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            {"class_labels": torch.tensor([0])},
            r"`labels` is a dict of 1; it must be a list of 1 dictionaries, one per",
        ),
        (torch.zeros(1, 5), r"`labels` is a Tensor of 1; it must be a list of 1"),
        (3, r"`labels` is a int; it must be a list of 1"),
        (wrong_label() * 2, r"`labels` is a list of 2; it must be a list of 1 dictionaries"),
        ([], r"`labels` is a list of 0"),
        (wrong_label(boxes=None), r"`labels\[0\]` lacks boxes; it must have class_labels, boxes, masks"),
        ([{}], r"`labels\[0\]` lacks class_labels, boxes, masks"),
        ([None], r"`labels\[0\]` is a NoneType; it must be a dictionary"),
        (wrong_label(masks=None), r"`labels\[0\]` lacks masks"),
        (
            wrong_label(class_labels=torch.tensor([0.0, 1])),
            r"torch.float32 of the shape \(2,\).*must be whole numbers",
        ),
        (
            wrong_label(class_labels=torch.tensor([[0], [1]])),
            r"of the shape \(2, 1\).*whole numbers \(n,\), and \(n, 4\)",
        ),
        (wrong_label(boxes=torch.full((3, 4), 0.5)), r"`boxes` of the shape \(3, 4\)"),
        (wrong_label(boxes=torch.full((2, 5), 0.5)), r"`boxes` of the shape \(2, 5\)"),
        (
            wrong_label(class_labels=torch.zeros(0, dtype=torch.long), masks=torch.zeros(0, 32, 32)),
            r"`boxes` of the shape \(2, 4\)",
        ),
        (wrong_label(masks=torch.full((2, 32, 32), math.nan)), r"NaN in `masks`; they must be 0 or 1"),
        (wrong_label(masks=torch.ones(1, 32, 32)), r"`masks` of the shape \(1, 32, 32\); it must be .* \(2, 32, 32\)"),
        (wrong_label(masks=torch.ones(2, 16, 16)), r"`masks` of the shape \(2, 16, 16\); .*height, width\)"),
        (wrong_label(class_labels=torch.tensor([0, 5])), r"classes between 0 and 5; .*\[0, 4\]. Set `num_labels`"),
        (wrong_label(class_labels=torch.tensor([-1, 1])), r"classes between -1 and 1"),
        (
            wrong_label(boxes=torch.full((2, 4), 20.0)),
            r"`boxes` between 20 and 20; .*Divide pixels by width and height",
        ),
        (wrong_label(boxes=torch.tensor([[0.5, 0.5, 0, 0.2]] * 2)), r"`boxes` between 0 and 0.5; .*drop empty boxes"),
        (
            wrong_label(boxes=torch.tensor([[0.5, 0.5, 1e-9, 0.2]] * 2)),
            r"`boxes` between 1e-09 and 0.5; .*drop empty boxes",
        ),
        (wrong_label(boxes=torch.tensor([[-0.1, 0.5, 0.2, 0.2]] * 2)), r"`boxes` between -0.1 and 0.5"),
        (wrong_label(boxes=torch.tensor([[math.nan, 0.5, 0.2, 0.2]] * 2)), r"`boxes` between nan"),
        (
            wrong_label(boxes=torch.tensor([[0.1, 0.1, 0.9, 0.9]] * 2)),
            r"`boxes` that reach out of the image \(32 x 32",
        ),
        (wrong_label(boxes=[[0.5] * 4] * 2), r"`boxes` in `labels\[0\]` is a list; give a tensor"),
        (wrong_label(class_labels=[0, 1]), r"`class_labels` in `labels\[0\]` is a list; give a tensor"),
        (wrong_label(masks=None, boxes=None, class_labels=None), r"lacks class_labels, boxes, masks"),
        (wrong_label(class_labels=torch.tensor([True, False])), r"torch.bool of the shape \(2,\).*whole numbers"),
        (wrong_label(class_labels=torch.tensor(1)), r"of the shape \(\).*whole numbers \(n,\)"),
    ],
)
def test_wrong_labels_raise_value_error(labels, message, training):
    model = trainable().train(training)
    with pytest.raises(ValueError, match=message):
        model(make_images(1), labels=labels)


def test_masks_are_asked_for_by_instance_segmentation_alone():
    outputs = loss_of(trainable("detection"), {"pixel_values": make_images(1), "labels": wrong_label(masks=None)})
    assert outputs.loss.isfinite()


@pytest.mark.parametrize(
    ("pixel_mask", "message"),
    [
        (torch.ones(2, 16, 16), r"`pixel_mask` has the shape \(2, 16, 16\); it must be \(2, 32, 32\)"),
        (torch.ones(32, 32), r"`pixel_mask` has the shape \(32, 32\)"),
        (torch.stack([torch.ones(32, 32), torch.zeros(32, 32)]), r"`pixel_mask` is not 1 in one rectangle at the top"),
        (torch.ones(2, 32, 32).tril(), r"`pixel_mask` is not 1 in one rectangle at the top left of each image"),
        (torch.ones(2, 32, 32).index_fill(1, torch.arange(8), 0.0), r"not 1 in one rectangle at the top left"),
        (torch.ones(2, 32, 32).index_fill(2, torch.tensor([9]), 0.0), r"not 1 in one rectangle at the top left"),
    ],
)
def test_wrong_masks_of_padding_raise_value_error(pixel_mask, message):
    with pytest.raises(ValueError, match=message):
        detector()(make_images(), pixel_mask)


@pytest.mark.parametrize(("height", "width"), [(8, 64), (64, 5), (8, 8)])
def test_images_without_two_rows_and_columns_of_patches_raise_value_error(height, width):
    with pytest.raises(
        ValueError, match=rf"is {height} x {width}; the pyramid needs 2 x 2 patches of 8 pixels or more"
    ):
        detector("detection", "unpruned")(make_images(1, height, width))


# From other models


LEFT_BEHIND = ("embeddings.cls_token", "embeddings.register_tokens", "layernorm.weight", "layernorm.bias")


@pytest.mark.parametrize("name", ["vit", *full("dinov2_with_registers", "dinov3", "timm_eva02_packed")])
@pytest.mark.parametrize("task", DETECTORS)
def test_a_detector_from_a_vision_transformer(task, name):
    """CLS, registers and final norm stay behind, everything else of the source comes along."""
    torch.manual_seed(0)
    source = CASES[name].build()
    whole = CroprViTModel.from_vit(source, token_reducer=None).state_dict()
    model_class = TASKS[task].model_class
    model = model_class.from_vit(
        source, pruning_rate=2, num_labels=4, **{**DETECTOR, "anchor_sizes": [4, 8, 12, 16, 24]}
    )
    config = model.config
    assert (config.num_prefix_tokens, config.use_final_norm, config.pooling) == (0, False, "patch_mean")
    assert config.use_auxiliary_heads and config.num_labels == 4
    weights = {key: tensor for key, tensor in model.cropr_vit.state_dict().items() if "token_reducers" not in key}
    assert weights.keys() == whole.keys() - {*LEFT_BEHIND} and "layernorm.weight" in whole
    assert all(torch.equal(tensor, whole[key]) for key, tensor in weights.items())
    model.train()(**TASKS[task].inputs(config)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("size", SIZES[:2])
@pytest.mark.parametrize("name", ["vit", "dinov2_with_registers", "timm_eva02_packed"])
@torch.no_grad()
def test_prefix_tokens_and_the_norm_can_be_kept_without_windows(name, size):
    """Then the tokens are those of the source."""
    torch.manual_seed(0)
    source, pixel_values = CASES[name].build().eval(), make_images(2, *size)
    config = CroprViTModel.from_vit(source, token_reducer=None).config
    kept = ("use_cls_token", "num_register_tokens", "use_final_norm", "norm_before_pooling")
    model = CroprViTForObjectDetection.from_vit(
        source, token_reducer=None, num_labels=4, **{name: getattr(config, name) for name in kept}, **DETECTOR
    )
    assert model.config.use_cls_token and model.config.use_final_norm
    outputs = model.cropr_vit(pixel_values)
    assert_close_relative(outputs.last_hidden_state, CASES[name].tokens(source, pixel_values), 5e-5)
    assert model(pixel_values).logits.shape == (2, 10, 5)


@torch.no_grad()
def test_a_source_without_prefix_tokens_gives_its_tokens_before_the_final_norm():
    torch.manual_seed(0)
    source = CroprViTModel(
        tiny_config("no_cls", token_reducer=None, pruning_rate=None, norm_before_pooling=True)
    ).eval()
    model = detector(
        "detection", "unpruned", use_cls_token=False, use_final_norm=False, pooling="patch_mean"
    ).cropr_vit
    missing = model.load_state_dict(source.state_dict(), strict=False)
    assert missing.missing_keys == [] and {*missing.unexpected_keys} == {*LEFT_BEHIND[2:]}
    patches = model.patches(model(make_images()))
    assert_close_relative(source.layernorm(patches), source(make_images()).last_hidden_state)


@torch.no_grad()
def test_a_kept_cls_token_gathers_what_windows_find():
    fields = {"use_cls_token": True, "token_reducer": None, "num_labels": 4, **DETECTOR}
    source, images = CASES["vit"].build(), make_images()
    windows = {"window_size": 4, "window_block_indices": [0, 1]}  # of one, on the whole grid of 4 x 4
    torch.manual_seed(0)
    expected = CroprViTForObjectDetection.from_vit(source, **fields)(images)
    torch.manual_seed(0)
    found = CroprViTForObjectDetection.from_vit(source, **fields, **windows)(images)
    assert_close_relative(found.logits, expected.logits)


# Pinned numbers


@torch.no_grad()
def parts_of(model, images):
    """What the parts compute at fixed places; which boxes are chosen would hang on the last digits."""
    maps = features_of(model, images)
    boxes = [torch.tensor([box], dtype=images.dtype) for box in ([3, 5, 25, 30], [10, 2, 20, 9])]
    objectness, deltas = model.proposal_network.head(maps)
    logits, moves = model.box_heads[1](model._regions(maps, boxes, 7))
    masks = model.mask_head(model._regions(maps, boxes, 14), torch.tensor([2, 4]))
    return {
        "cells": torch.stack([level[0, 1, 0, 0] for level in maps]),
        "objectness": objectness[0][0, :, 3, 4],
        "anchor_deltas": deltas[0][1, :4, 7, 2],
        "logits": logits,
        "box_deltas": moves,
        "masks": masks[:, 10, 10],
    }


# Recorded on 23 November 2026, and compared in float64: the last of six decimals of float32 is not the same
# everywhere. A change of these numbers changes what checkpoints mean.
GOLDEN = {
    "plain": {
        "cells": [-0.482671, -0.185249, 0.030261, -0.129967, -0.129967],
        "objectness": [0.137637, -0.130519, -0.458206],
        "anchor_deltas": [-0.15092, 0.505256, 0.559074, 0.289852],
        "logits": [
            [0.687642, 0.055074, -0.685841, -0.149324, -0.556707, 0.157071],
            [0.699957, 0.070781, -0.716836, -0.131154, -0.5627, 0.197483],
        ],
        "box_deltas": [[-0.077684, 0.333143, 0.989279, 0.142865], [-0.06819, 0.311019, 1.035514, 0.126341]],
        "masks": [-0.162264, 0.269937],
    },
    "windows": {
        "cells": [0.044441, 0.378971, -0.046295, -0.353915, -0.353915],
        "objectness": [0.196435, 0.482451, -0.060151],
        "anchor_deltas": [-0.177316, -0.325632, 0.302247, -0.196798],
        "logits": [
            [0.548563, 0.194129, -0.661301, -0.165295, -0.618223, 0.204081],
            [0.561353, 0.20585, -0.640074, -0.163319, -0.603131, 0.234447],
        ],
        "box_deltas": [[0.023199, 0.215536, 0.980097, 0.106121], [0.012421, 0.20945, 0.959899, 0.105104]],
        "masks": [-0.321712, 0.127622],
    },
}


@pytest.mark.parametrize("name", GOLDEN)
def test_pinned_numbers(name):
    model = detector("instances", name)
    fill_with_ramps(model.double(), power=2)
    for key, value in parts_of(model, ramp_images().double()).items():
        assert_close(
            value.float(), torch.tensor(GOLDEN[name][key]), rtol=0, atol=1e-5, msg=lambda text, key=key: key + text
        )
