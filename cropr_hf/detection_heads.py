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
"""The parts of a Cascade Mask R-CNN on the simple feature pyramid of ViTDet, as an image passes through them: pyramid,
proposals, box heads, mask head, suppression of duplicates.

Boxes are (x1, y1, x2, y2) in pixels of the input. The detector is that of EVA-02 (arXiv 2303.11331) and ViTDet (arXiv
2203.16527), on the parts of torchvision.

Symbols: B images, D hidden size, F channels of the pyramid, R regions of all images together, C classes.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import (
    Conv2dNormActivation,
    box_iou,
    clip_boxes_to_image,
    roi_align,
)
from torchvision.ops.poolers import LevelMapper

from .configuration_cropr_vit import CroprViTConfig


# Of EVA-02's and ViTDet's detectors. What users change is in the configuration.
ANCHOR_RATIOS = (0.5, 1.0, 2.0)  # height / width
ANCHORS_PER_IMAGE = 256  # that train the proposals
CASCADE = ((0.5, (10.0, 10.0, 5.0, 5.0)), (0.6, (20.0, 20.0, 10.0, 10.0)), (0.7, (30.0, 30.0, 15.0, 15.0)))
BOX_POOLING, MASK_POOLING = 7, 14  # cells per side of a region
SOFT_NMS_LEAST_SCORE = 1e-3

layer_norm = partial(LayerNorm2d, eps=1e-6)


# --------------------------------------------------------------------------------------------------------------------
# Pyramid
# --------------------------------------------------------------------------------------------------------------------


def set_initial_std(head: nn.Module, std: float | None = None) -> None:
    """Notes at each layer of a head how widely its first weights spread; by default as for ReLU (He et al.)."""
    for layer in head.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            gain = 1.0 if isinstance(layer, nn.Linear) else 2.0
            layer.initial_std = (gain / layer.weight[0].numel()) ** 0.5 if std is None else std  # type: ignore[assignment]


class CroprViTFeaturePyramid(nn.Module):
    """Simple feature pyramid (ViTDet section 3): five levels from the one map of a plain ViT.

    With patches of 16 pixels the strides are 4, 8, 16, 32 and 64.
    """

    def __init__(self, config: CroprViTConfig):
        super().__init__()
        size, channels = config.hidden_size, config.pyramid_channels

        def double(channels: int) -> nn.Module:
            return nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2)

        def level(in_channels: int, *resize: nn.Module) -> nn.Module:
            conv = partial(Conv2dNormActivation, norm_layer=layer_norm, activation_layer=None)
            return nn.Sequential(
                nn.Sequential(*resize), conv(in_channels, channels, kernel_size=1), conv(channels, channels)
            )

        self.levels = nn.ModuleList(
            [
                level(size // 4, double(size), layer_norm(size // 2), nn.GELU(), double(size // 2)),
                level(size // 2, double(size)),
                level(size),
                level(size, nn.MaxPool2d(kernel_size=2)),
            ]
        )
        set_initial_std(self)

    def forward(self, feature_map: torch.Tensor) -> list[torch.Tensor]:
        """(B, D, rows, columns) -> five maps (B, F, ., .), 4, 2, 1, 1/2 and 1/4 times as large."""
        levels = [level(feature_map) for level in self.levels]
        return [*levels, F.max_pool2d(levels[-1], kernel_size=1, stride=2)]


# --------------------------------------------------------------------------------------------------------------------
# Proposals
# --------------------------------------------------------------------------------------------------------------------


class CroprViTAnchors(AnchorGenerator):
    """Anchors of one size per level, centred at multiples of the stride; not rounded to pixels, as in Detectron2."""

    def __init__(self, config: CroprViTConfig):
        super().__init__(tuple((size,) for size in config.anchor_sizes), (ANCHOR_RATIOS,) * len(config.anchor_sizes))
        self.strides = pyramid_strides(config)

    def forward(self, image_list: ImageList, feature_maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """The same anchors (A, 4) for every image, levels one after the other."""
        roots = torch.tensor(ANCHOR_RATIOS, device=feature_maps[0].device).sqrt()
        corners = torch.stack([1 / roots, roots], dim=1) / 2
        # Computed here: tensors that are no buffers do not survive building a model on the meta device.
        self.cell_anchors = [size * torch.cat([-corners, corners], dim=1) for (size,) in self.sizes]
        grids = [list(feature_map.shape[-2:]) for feature_map in feature_maps]
        anchors = torch.cat(self.grid_anchors(grids, [(stride, stride) for stride in self.strides]))
        return [anchors] * len(image_list.image_sizes)


class CroprViTProposalHead(RPNHead):
    """Two convolutions, objectness and box deltas, shared by the levels; float32 out of weights of any dtype."""

    def forward(self, x: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Maps (B, F, h, w) -> objectness (B, 3, h, w) and deltas (B, 12, h, w)."""
        objectness, deltas = super().forward([features.to(self.cls_logits.weight.dtype) for features in x])
        return [logits.float() for logits in objectness], [delta.float() for delta in deltas]


class CroprViTProposalNetwork(RegionProposalNetwork):
    """Region proposal network of torchvision with the losses and settings of EVA-02's detector."""

    def __init__(self, config: CroprViTConfig):
        super().__init__(
            CroprViTAnchors(config),
            CroprViTProposalHead(config.pyramid_channels, len(ANCHOR_RATIOS), conv_depth=2),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=ANCHORS_PER_IMAGE,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2 * config.num_proposals, "testing": config.num_proposals},
            post_nms_top_n={"training": config.num_proposals, "testing": config.num_proposals},
            nms_thresh=0.7,
        )
        set_initial_std(self.head, 0.01)

    def forward(self, images: ImageList, features: dict[str, torch.Tensor], targets: Any = None):
        """Proposals (n, 4) of each image and, with `targets`, losses."""
        # The parent has losses in training mode only; here targets decide, so that evaluation has a loss as well.
        self.train(targets is not None)
        return super().forward(images, features, targets)

    def filter_proposals(
        self, proposals: torch.Tensor, objectness: torch.Tensor, *args: Any
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """See the parent; raises `FloatingPointError` in evaluation for what it would drop as no proposals."""
        if not self.training:
            check_not_nan(proposals, objectness)
        return super().filter_proposals(proposals, objectness, *args)

    def compute_loss(
        self,
        objectness: torch.Tensor,
        pred_bbox_deltas: torch.Tensor,
        labels: list[torch.Tensor],
        regression_targets: list[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy of sampled anchors and L1 of the positive ones, over the number that is to be sampled."""
        positive, negative = (torch.cat(masks).bool() for masks in self.fg_bg_sampler(labels))
        sampled = positive | negative
        total = ANCHORS_PER_IMAGE * len(labels)
        objectness_loss = F.binary_cross_entropy_with_logits(
            objectness.flatten()[sampled], torch.cat(labels)[sampled], reduction="sum"
        )
        box_loss = F.l1_loss(pred_bbox_deltas[positive], torch.cat(regression_targets)[positive], reduction="sum")
        return objectness_loss / total, box_loss / total


# --------------------------------------------------------------------------------------------------------------------
# Heads on regions
# --------------------------------------------------------------------------------------------------------------------


def pyramid_strides(config: CroprViTConfig) -> list[float]:
    """Pixels from cell to cell at each of the five levels."""
    return [config.patch_size * factor for factor in (0.25, 0.5, 1.0, 2.0, 4.0)]


def pool_regions(
    features: Sequence[torch.Tensor], boxes: list[torch.Tensor], strides: Sequence[float], size: int
) -> torch.Tensor:
    """RoIAlign, each region on the level that suits its size (FPN section 4.2).

    Args:
        features: maps (B, F, h, w) of the first four levels.
        boxes: (n, 4) of each image.
        strides: of the levels.
        size: cells per side of a region.

    Returns:
        (R, F, size, size)
    """
    # A box of 14 x 14 patches goes to the level of the patches: 224 pixels with patches of 16.
    levels = LevelMapper(0, 3, canonical_scale=14 * strides[2], canonical_level=2)(boxes)
    images = torch.cat([torch.full_like(box[:, :1], image) for image, box in enumerate(boxes)])
    regions = torch.cat([images, torch.cat(boxes)], dim=1)
    pooled = features[0].new_zeros(len(regions), features[0].shape[1], size, size)
    for level, (feature_map, stride) in enumerate(zip(features, strides)):
        here = torch.where(levels == level)[0]
        pooled[here] = roi_align(feature_map, regions[here], size, 1 / stride, aligned=True)
    return pooled


def match_boxes(
    boxes: torch.Tensor, target: dict[str, torch.Tensor], least_iou: float, background: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Class of each box (n, 4), `background` below `least_iou`, and the index of the object that it overlaps most."""
    if not len(target["boxes"]) or not len(boxes):
        return boxes.new_full((len(boxes),), background, dtype=torch.long), boxes.new_zeros(len(boxes)).long()
    matcher = Matcher(least_iou, least_iou, allow_low_quality_matches=False)
    matches = matcher(box_iou(target["boxes"], boxes))
    objects = matches.clamp(min=0)
    return torch.where(matches >= 0, target["class_labels"][objects], background), objects


class CroprViTBoxHead(nn.Module):
    """One stage of the cascade: classes, and one refined box per region whatever its class."""

    def __init__(self, config: CroprViTConfig, least_iou: float, weights: tuple[float, float, float, float]):
        super().__init__()
        channels, size = config.pyramid_channels, config.box_head_size
        self.least_iou = least_iou  # of a region and an object that it stands for, in training
        self.box_coder = BoxCoder(weights)
        self.layers = FastRCNNConvFCHead((channels, BOX_POOLING, BOX_POOLING), [channels] * 4, [size], layer_norm)
        self.class_predictor = nn.Linear(size, (config.num_labels or 0) + 1)
        self.box_predictor = nn.Linear(size, 4)
        set_initial_std(self.layers)
        set_initial_std(self.class_predictor, 0.01)
        set_initial_std(self.box_predictor, 0.001)

    def forward(self, regions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(R, F, 7, 7) -> logits (R, C + 1), background last, and deltas (R, 4), in float32."""
        hidden_states = self.layers(regions.to(self.box_predictor.weight.dtype))
        return self.class_predictor(hidden_states).float(), self.box_predictor(hidden_states).float()

    def refine(
        self, deltas: torch.Tensor, boxes: list[torch.Tensor], image_sizes: list[tuple[int, int]]
    ) -> list[torch.Tensor]:
        """Boxes (n, 4) of each image, moved by deltas (R, 4), which get no gradient, and clipped to the image."""
        moved = self.box_coder.decode_single(deltas.detach(), torch.cat(boxes)).split([len(box) for box in boxes])
        return [clip_boxes_to_image(box, size) for box, size in zip(moved, image_sizes)]

    def loss(
        self,
        logits: torch.Tensor,
        deltas: torch.Tensor,
        boxes: torch.Tensor,
        labels: torch.Tensor,
        goals: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy, and L1 of the deltas from objects' boxes (R, 4) to `goals`, both means over all regions."""
        count = max(len(labels), 1)
        positive = labels < logits.shape[1] - 1
        wanted = self.box_coder.encode_single(goals[positive], boxes[positive])
        class_loss = F.cross_entropy(logits, labels, reduction="sum")
        return class_loss / count, F.l1_loss(deltas[positive], wanted, reduction="sum") / count


def training_memory(config: CroprViTConfig) -> int:
    """Bytes per image that the box heads keep in float32 for the backward pass, which is most of what training takes.

    Of each region every stage keeps the pooled map, for each of its four convolutions what the norm and the next layer
    get, and the flattened map.
    """
    maps = 1 + 4 * 2 + 1
    return 4 * len(CASCADE) * config.rois_per_image * maps * config.pyramid_channels * BOX_POOLING**2


class CroprViTMaskHead(nn.Module):
    """Four convolutions, upsampling, and one mask per class."""

    def __init__(self, config: CroprViTConfig):
        super().__init__()
        channels = config.pyramid_channels
        self.layers = MaskRCNNHeads(channels, [channels] * 4, dilation=1, norm_layer=layer_norm)
        self.predictor = MaskRCNNPredictor(channels, channels, config.num_labels)
        set_initial_std(self)
        set_initial_std(self.predictor.mask_fcn_logits, 0.001)

    def forward(self, regions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(R, F, 14, 14) and classes (R,) -> logits (R, 28, 28) of the mask of each region's class, in float32."""
        logits = self.predictor(self.layers(regions.to(self.predictor.conv5_mask.weight.dtype)))
        return logits[torch.arange(len(labels), device=labels.device), labels].float()

    @staticmethod
    def loss(
        logits: torch.Tensor, boxes: list[torch.Tensor], objects: list[torch.Tensor], masks: list[torch.Tensor]
    ) -> torch.Tensor:
        """Mean binary cross-entropy.

        Args:
            logits: (R, 28, 28)
            boxes: (n, 4) of each image.
            objects: (n,) index of the object that each box stands for.
            masks: (objects, height, width) of each image.
        """
        size = logits.shape[-1]
        goals = []
        for box, index, mask in zip(boxes, objects, masks):
            regions = torch.cat([index[:, None].to(box), box], dim=1)
            goals.append(roi_align(mask[:, None].float(), regions, size, aligned=True)[:, 0] >= 0.5)
        total = F.binary_cross_entropy_with_logits(logits, torch.cat(goals).float(), reduction="sum")
        return total / max(logits.numel(), 1)


# --------------------------------------------------------------------------------------------------------------------
# From scores to detections
# --------------------------------------------------------------------------------------------------------------------


def check_not_nan(*tensors: torch.Tensor) -> None:
    """Raises `FloatingPointError` for NaN, which every comparison with a threshold would take for "no object"."""
    if any(tensor.isnan().any() for tensor in tensors):
        raise FloatingPointError(
            "The detector computes scores or boxes that are not a number, so that no object could be found; there is "
            "NaN or infinity in its weights or in `pixel_values`, or half precision is too little for it."
        )


def soft_nms(
    boxes: torch.Tensor, scores: torch.Tensor, classes: torch.Tensor, iou_threshold: float, max_detections: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Linear soft suppression per class (Bodla et al., arXiv 1704.04503).

    The best box is taken again and again, and the scores of the others of its class are multiplied by 1 - IoU where
    IoU reaches the threshold. Scores only fall, so nothing after `max_detections` needs to be computed.

    Args:
        boxes: (n, 4)
        scores, classes: (n,)

    Returns:
        Indices of at most `max_detections` boxes, the best first, and their new scores, none below 0.001.
    """
    # Classes are moved apart, so that boxes of different classes do not overlap.
    boxes = boxes + (classes * (boxes.max() + 1))[:, None] if len(boxes) else boxes
    taken, final = [], []
    for _ in range(min(max_detections, len(boxes))):
        score, best = scores.max(dim=0)
        taken.append(best)
        final.append(score)
        overlap = box_iou(boxes[best][None], boxes)[0]
        scores = torch.where(overlap >= iou_threshold, scores * (1 - overlap), scores)
        scores = scores.index_fill(0, best, -1.0)
    if not taken:
        return classes[:0], scores
    indices, new_scores = torch.stack(taken), torch.stack(final)
    kept = new_scores >= SOFT_NMS_LEAST_SCORE
    return indices[kept], new_scores[kept]


def paste_masks(
    probabilities: torch.Tensor, boxes: torch.Tensor, image_size: tuple[int, int], size: tuple[int, int]
) -> torch.Tensor:
    """Masks within boxes -> masks of the image.

    Args:
        probabilities: (n, 28, 28)
        boxes: (n, 4) in pixels of the image.
        image_size: height and width of the image in pixels.
        size: height and width of the result, which covers the image.

    Returns:
        (n, *size), 0 outside of the boxes.
    """
    axes = []
    for axis in (0, 1):  # x, y
        length, pixels = size[1 - axis], image_size[1 - axis]
        centres = (torch.arange(length, device=boxes.device) + 0.5) * pixels / length
        start, end = boxes[:, axis, None], boxes[:, axis + 2, None]
        axes.append((centres - start) / (end - start).clamp(min=1e-6) * 2 - 1)  # -1 to 1 within the box
    # (n, width) and (n, height) -> (n, height, width, 2)
    grid = torch.stack([axes[0][:, None].expand(-1, size[0], -1), axes[1][:, :, None].expand(-1, -1, size[1])], dim=-1)
    return F.grid_sample(probabilities[:, None], grid, align_corners=False)[:, 0]
