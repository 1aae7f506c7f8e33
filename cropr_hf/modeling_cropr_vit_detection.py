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
"""Object detection and instance segmentation: a Cascade Mask R-CNN on the simple feature pyramid of ViTDet.

From top to bottom, as an image passes: pyramid, proposals, the cascade of box heads, the mask head, suppression of
duplicates, and the two task classes. Boxes are (x1, y1, x2, y2) in pixels of the input, everywhere but in labels and
outputs. The detector is that of EVA-02 (arXiv 2303.11331) and ViTDet (arXiv 2203.16527), on the parts of torchvision.

Symbols: B images, D hidden size, F channels of the pyramid, R regions of all images together, C classes, K detections.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import (
    Conv2dNormActivation,
    batched_nms,
    box_convert,
    box_iou,
    clip_boxes_to_image,
    remove_small_boxes,
    roi_align,
)
from torchvision.ops.poolers import LevelMapper
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput
from transformers.utils.generic import can_return_tuple, maybe_autocast

from .configuration_cropr_vit import CroprViTConfig
from .modeling_cropr_vit import (
    CroprViTModel,
    CroprViTPreTrainedModel,
    class_presence,
    pad_to_patches,
    presence_loss,
)


# Of EVA-02's and ViTDet's detectors. What users change is in the configuration.
ANCHOR_RATIOS = (0.5, 1.0, 2.0)  # height / width
ANCHORS_PER_IMAGE = 256  # that train the proposals
CASCADE = ((0.5, (10.0, 10.0, 5.0, 5.0)), (0.6, (20.0, 20.0, 10.0, 10.0)), (0.7, (30.0, 30.0, 15.0, 15.0)))
BOX_POOLING, MASK_POOLING = 7, 14  # cells per side of a region
SOFT_NMS_LEAST_SCORE = 1e-3

layer_norm = partial(LayerNorm2d, eps=1e-6)


@dataclass
class CroprViTDetectionOutput(ModelOutput):
    """Output of the detectors; what belongs to training alone is `None` in evaluation, and detections in training.

    K is `config.detections_per_image`. The form is that of DETR, so that its image processor reads it: the softmax of
    `logits` gives the score of a detection to its class and the rest to "no object"; slots without a detection are "no
    object".

    Attributes:
        loss: main loss + `config.auxiliary_loss_weight` * sum of the auxiliary losses, with labels.
        loss_dict: parts of the main loss, with labels: two of the proposals, two of each box head, one of masks.
        logits: (B, K, C + 1)
        pred_boxes: (B, K, 4), centre, width and height as shares of the image without padding.
        pred_masks: (B, K, height / `config.mask_stride`, width / `config.mask_stride`), logits of instance masks; they
            cover the image without padding.
        main_loss: loss without the auxiliary losses, detached, in training.
        auxiliary_losses: (modules,), detached, in training with auxiliary heads.
        pruned_after_block, hidden_states, attentions: see `CroprViTModelOutput`.
    """

    loss: torch.Tensor | None = None
    loss_dict: dict[str, torch.Tensor] | None = None
    logits: torch.Tensor | None = None
    pred_boxes: torch.Tensor | None = None
    pred_masks: torch.Tensor | None = None
    main_loss: torch.Tensor | None = None
    auxiliary_losses: torch.Tensor | None = None
    pruned_after_block: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


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


# --------------------------------------------------------------------------------------------------------------------
# Task classes
# --------------------------------------------------------------------------------------------------------------------


class CroprViTDetector(CroprViTPreTrainedModel):
    """What the two task classes share: everything; one has a mask head besides.

    Raises:
        `ValueError`: when the configuration prunes without last layer fusion, has no class, or smooths labels.
    """

    has_masks = False
    conversion_fields = {
        "use_cls_token": False,
        "num_register_tokens": 0,
        "use_final_norm": False,
        "pooling": "patch_mean",
        "norm_before_pooling": False,
    }
    _can_compile_fullgraph = False  # the number of detections depends on the image

    def __init__(self, config: CroprViTConfig):
        super().__init__(config)
        self._check_fusion(config)
        if not config.num_labels:
            raise ValueError("`num_labels` is 0; a detector needs at least 1 class.")
        if config.label_smoothing:
            raise ValueError(
                f"`label_smoothing` is {config.label_smoothing}, but the losses of detectors know none; set it to 0."
            )
        self.num_labels: int = config.num_labels
        self.cropr_vit = CroprViTModel(config)
        self.pyramid = CroprViTFeaturePyramid(config)
        self.proposal_network = CroprViTProposalNetwork(config)
        self.box_heads: Any = nn.ModuleList([CroprViTBoxHead(config, *stage) for stage in CASCADE])
        self.mask_head = CroprViTMaskHead(config) if self.has_masks else None
        self.strides = pyramid_strides(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std: Any = getattr(module, "initial_std", None)
        if std is not None:
            init.normal_(module.weight, std=std)  # type: ignore[arg-type]

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        labels: list[dict[str, torch.Tensor]] | None = None,
        output_pruning: bool = False,
        **kwargs: Any,
    ) -> CroprViTDetectionOutput:
        """
        Args:
            pixel_values: (B, channels, height, width), of any size: zeros are added at the bottom and on the right up
                to whole patches.
            pixel_mask: (B, height, width), 1 where the image is, 0 for padding at the bottom and on the right.
            labels: for each image a dictionary of `class_labels` (n,) in [0, C), `boxes` (n, 4) as centre, width and
                height in shares of `pixel_values`, padding included, and for instance segmentation `masks` (n, height,
                width): what `DetrImageProcessor` makes of COCO annotations. Images without objects are welcome.
            output_pruning: also return `pruned_after_block`, which includes padding.

        Raises:
            `ValueError`: labels of the wrong form or out of range, fewer than 2 x 2 patches, and as
                `CroprViTModel.forward`.
        """
        self.cropr_vit.embeddings.check_pixels(pixel_values)
        height, width = pixel_values.shape[-2:]
        patch_size = self.config.patch_size
        if min(height, width) <= patch_size:
            raise ValueError(
                f"`pixel_values` is {height} x {width}; the pyramid needs 2 x 2 patches of {patch_size} pixels or "
                "more. Use larger images, or pad them."
            )
        image_sizes = _image_sizes(pixel_values, pixel_mask)
        targets = None if labels is None else self._targets(labels, pixel_values, image_sizes)
        if pixel_mask is not None:
            pixel_mask = pad_to_patches(pixel_mask, patch_size)
        pixel_values = pad_to_patches(pixel_values, patch_size)
        outputs = self.cropr_vit(pixel_values, pixel_mask=pixel_mask, output_pruning=output_pruning, **kwargs)
        self._warn_untrained(labels, outputs.auxiliary_logits)
        grid_size = (pixel_values.shape[2] // patch_size, pixel_values.shape[3] // patch_size)
        # (B, rows * columns, D) -> (B, D, rows * columns) -> (B, D, rows, columns)
        pyramid = self.pyramid(self.cropr_vit.patches(outputs).transpose(1, 2).unflatten(2, grid_size))

        results: dict[str, Any] = {}
        # Coordinates need float32, whatever the backbone runs in (as in EVA-02's detector).
        with maybe_autocast(device_type=pixel_values.device.type, enabled=False):
            # LayerNorm leaves channels last; RoIAlign would copy the maps at every call.
            features = [level.float().contiguous() for level in pyramid]
            images = ImageList(pixel_values, image_sizes)
            if targets is not None:
                losses = self.detection_losses(features, images, targets)
                auxiliary_losses = []
                if outputs.auxiliary_logits is not None:
                    presence = class_presence([target["class_labels"] for target in targets], self.num_labels)
                    auxiliary_losses = [presence_loss(logits, presence) for logits in outputs.auxiliary_logits]
                results |= self._sum_losses(torch.stack(list(losses.values())).sum(), auxiliary_losses)
                results["loss_dict"] = {name: loss.detach() for name, loss in losses.items()}
            if not self.training:  # nobody reads detections there
                detections = self.detect(features, images)
                results["logits"], results["pred_boxes"] = self._detr_form(detections, image_sizes)
                if self.mask_head is not None:
                    stride = self.config.mask_stride
                    size = (-(-height // stride), -(-width // stride))
                    results["pred_masks"] = self._pasted_masks(detections, image_sizes, size)
        return CroprViTDetectionOutput(
            **results,
            pruned_after_block=outputs.pruned_after_block,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    # Training

    def detection_losses(
        self, features: list[torch.Tensor], images: ImageList, targets: list[dict[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """Losses of proposals, box heads and masks.

        Args:
            features: five maps (B, F, ., .)
            images: for the sizes without padding.
            targets: `class_labels` (n,), `boxes` (n, 4) in pixels, and `masks` (n, height, width) if there are masks.
        """
        proposals, proposal_losses = self._propose(features, images, targets)
        losses = {
            "loss_rpn_cls": proposal_losses["loss_objectness"],
            "loss_rpn_loc": proposal_losses["loss_rpn_box_reg"],
        }
        boxes = [torch.cat([proposal, target["boxes"]]) for proposal, target in zip(proposals, targets)]
        boxes = self._sample(boxes, targets)
        for stage, head in enumerate(self.box_heads):
            matches = [
                match_boxes(box, target, head.least_iou, self.num_labels) for box, target in zip(boxes, targets)
            ]
            labels = torch.cat([label for label, _ in matches])
            if stage == 0 and self.mask_head is not None:
                losses["loss_mask"] = self._mask_loss(features, boxes, matches, targets)
            logits, deltas = head(self._regions(features, boxes, BOX_POOLING, gradient=1 / len(self.box_heads)))
            goals = [
                target["boxes"][objects] if len(target["boxes"]) else torch.zeros_like(box)
                for box, target, (_, objects) in zip(boxes, targets, matches)
            ]
            class_loss, box_loss = head.loss(logits, deltas, torch.cat(boxes), labels, torch.cat(goals))
            losses[f"loss_cls_stage{stage}"], losses[f"loss_box_reg_stage{stage}"] = class_loss, box_loss
            if stage + 1 < len(self.box_heads):
                refined = head.refine(deltas, boxes, images.image_sizes)
                boxes = [box[remove_small_boxes(box, 1e-3)] for box in refined]
        return losses

    def _propose(
        self, features: list[torch.Tensor], images: ImageList, targets: list[dict[str, torch.Tensor]] | None = None
    ) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        return self.proposal_network(images, {str(level): maps for level, maps in enumerate(features)}, targets)

    def _sample(self, boxes: list[torch.Tensor], targets: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        """`config.rois_per_image` boxes per image, a quarter of them on objects at most."""
        least_iou = self.box_heads[0].least_iou
        classes = [match_boxes(box, target, least_iou, -1)[0] for box, target in zip(boxes, targets)]
        sampler = BalancedPositiveNegativeSampler(self.config.rois_per_image, 0.25)
        positive, negative = sampler([(label >= 0).long() for label in classes])
        return [box[(first | second).bool()] for box, first, second in zip(boxes, positive, negative)]

    def _regions(
        self, features: list[torch.Tensor], boxes: list[torch.Tensor], size: int, gradient: float = 1.0
    ) -> torch.Tensor:
        """Regions (R, F, size, size), whose gradient reaches the features multiplied by `gradient`."""
        regions = pool_regions(features[:4], boxes, self.strides, size)
        if gradient != 1.0 and regions.requires_grad:
            regions.register_hook(lambda grad: grad * gradient)
        return regions

    def _mask_loss(
        self,
        features: list[torch.Tensor],
        boxes: list[torch.Tensor],
        matches: list[tuple[torch.Tensor, torch.Tensor]],
        targets: list[dict[str, torch.Tensor]],
    ) -> torch.Tensor:
        assert self.mask_head is not None
        chosen = [labels < self.num_labels for labels, _ in matches]
        boxes = [box[here] for box, here in zip(boxes, chosen)]
        labels, objects = zip(*((label[here], index[here]) for (label, index), here in zip(matches, chosen)))
        logits = self.mask_head(self._regions(features, boxes, MASK_POOLING), torch.cat(labels))
        return self.mask_head.loss(logits, boxes, list(objects), [target["masks"] for target in targets])

    # Inference

    def detect(self, features: list[torch.Tensor], images: ImageList) -> list[dict[str, torch.Tensor]]:
        """Detections of each image, at most K, best first: `boxes` (n, 4) in pixels, `scores` and `labels` (n,), and
        `masks` (n, 28, 28), probabilities within the boxes, if there is a mask head."""
        boxes, _ = self._propose(features, images)
        probabilities: Any = 0.0
        for head in self.box_heads:
            logits, deltas = head(self._regions(features, boxes, BOX_POOLING))
            probabilities = probabilities + logits.softmax(dim=-1) / len(self.box_heads)
            boxes = head.refine(deltas, boxes, images.image_sizes)
        scores = probabilities[:, :-1].split([len(box) for box in boxes])
        detections = [self._suppress(box, score) for box, score in zip(boxes, scores)]
        if self.mask_head is not None:
            self._add_masks(features, detections)
        return detections

    def _suppress(self, boxes: torch.Tensor, scores: torch.Tensor) -> dict[str, torch.Tensor]:
        """From boxes (n, 4) with scores (n, C) to detections without duplicates."""
        config = self.config
        regions, classes = torch.where(scores > config.score_threshold)
        scores, boxes = scores[regions, classes], boxes[regions]
        if config.nms_method == "linear":
            kept, scores = soft_nms(boxes, scores, classes, config.nms_threshold, config.detections_per_image)
        else:
            kept = batched_nms(boxes, scores, classes, config.nms_threshold)[: config.detections_per_image]
            scores = scores[kept]
        return {"boxes": boxes[kept], "scores": scores, "labels": classes[kept]}

    def _add_masks(self, features: list[torch.Tensor], detections: list[dict[str, torch.Tensor]]) -> None:
        """Adds `masks`; with `config.maskness_threshold` scores take the quality of the masks into account."""
        assert self.mask_head is not None
        regions = self._regions(features, [found["boxes"] for found in detections], MASK_POOLING)
        logits = self.mask_head(regions, torch.cat([found["labels"] for found in detections]))
        masks = logits.sigmoid().split([len(found["labels"]) for found in detections])
        for found, mask in zip(detections, masks):
            found["masks"] = mask
            if self.config.maskness_threshold is not None:
                inside = (mask > self.config.maskness_threshold).float()
                pixels = inside.sum(dim=(1, 2)).clamp(min=1)
                found["scores"] = found["scores"] * (mask * inside).sum(dim=(1, 2)) / pixels

    def _detr_form(
        self, detections: list[dict[str, torch.Tensor]], image_sizes: list[tuple[int, int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, K, C + 1) whose softmax returns the scores, and boxes (B, K, 4); see the output class."""
        shape = (len(detections), self.config.detections_per_image)
        like = detections[0]["boxes"]
        # Finite in float16, and far below the logarithm of any score.
        logits = like.new_full((*shape, self.num_labels + 1), -1e4)
        logits[..., -1] = 0.0
        boxes = like.new_zeros((*shape, 4))
        for image, (found, (height, width)) in enumerate(zip(detections, image_sizes)):
            count = len(found["scores"])
            slots = torch.arange(count, device=like.device)
            scores = found["scores"].clamp(1e-6, 1 - 1e-6)
            logits[image, slots, found["labels"]] = scores.log()
            logits[image, slots, -1] = torch.log1p(-scores)
            scale = found["boxes"].new_tensor([width, height, width, height])
            boxes[image, :count] = box_convert(found["boxes"] / scale, "xyxy", "cxcywh")
        return logits, boxes

    def _pasted_masks(
        self, detections: list[dict[str, torch.Tensor]], image_sizes: list[tuple[int, int]], size: tuple[int, int]
    ) -> torch.Tensor:
        """Logits (B, K, *size) of masks on the image."""
        masks = detections[0]["masks"].new_zeros((len(detections), self.config.detections_per_image, *size))
        for image, (found, image_size) in enumerate(zip(detections, image_sizes)):
            if len(found["masks"]):
                masks[image, : len(found["masks"])] = paste_masks(found["masks"], found["boxes"], image_size, size)
        return torch.logit(masks, eps=1e-6)

    # Labels

    def _targets(
        self, labels: list[dict[str, torch.Tensor]], pixel_values: torch.Tensor, image_sizes: list[tuple[int, int]]
    ) -> list[dict[str, torch.Tensor]]:
        """Labels after their checks, with boxes as corners in pixels, on the device of the images."""
        if not isinstance(labels, (list, tuple)) or len(labels) != len(pixel_values):
            raise ValueError(
                f"`labels` is a {type(labels).__name__}{f' of {len(labels)}' if hasattr(labels, '__len__') else ''}; "
                f"it must be a list of {len(pixel_values)} dictionaries, one per image."
            )
        height, width = pixel_values.shape[-2:]
        targets = []
        for image, (label, image_size) in enumerate(zip(labels, image_sizes)):
            self._check_label(image, label, (height, width))
            boxes = label["boxes"].to(pixel_values.device).float().reshape(-1, 4)
            boxes = box_convert(boxes, "cxcywh", "xyxy") * boxes.new_tensor([width, height, width, height])
            clipped = clip_boxes_to_image(boxes, image_size)
            if ((boxes - clipped).abs() > 2 + max(image_size) / 100).any():  # more than rounding
                raise ValueError(
                    f"`labels[{image}]` has `boxes` that reach out of the image ({image_size[0]} x {image_size[1]} of "
                    f"{height} x {width} pixels with padding); give centre, width and height as shares of "
                    "`pixel_values`, padding included."
                )
            target = {"class_labels": label["class_labels"].to(pixel_values.device).long(), "boxes": clipped}
            if self.has_masks:
                target["masks"] = label["masks"].to(pixel_values.device)
            targets.append(target)
        return targets

    def _check_label(self, image: int, label: Any, image_size: tuple[int, int]) -> None:
        wanted = ["class_labels", "boxes", *(["masks"] if self.has_masks else [])]
        if not isinstance(label, Mapping):
            raise ValueError(
                f"`labels[{image}]` is a {type(label).__name__}; it must be a dictionary of {', '.join(wanted)}."
            )
        missing = [name for name in wanted if name not in label]
        if missing:
            raise ValueError(f"`labels[{image}]` lacks {', '.join(missing)}; it must have {', '.join(wanted)}.")
        for name in wanted:
            if not isinstance(label[name], torch.Tensor):
                raise ValueError(f"`{name}` in `labels[{image}]` is a {type(label[name]).__name__}; give a tensor.")
        classes, boxes = label["class_labels"], label["boxes"]
        count = classes.numel()
        whole = not classes.is_floating_point() and classes.dtype != torch.bool
        right_boxes = whole and tuple(boxes.shape) == (count, 4) if count else not boxes.numel()
        if classes.dim() != 1 or not right_boxes:
            raise ValueError(
                f"`labels[{image}]` has `class_labels` {classes.dtype} of the shape {tuple(classes.shape)} and "
                f"`boxes` of the shape {tuple(boxes.shape)}; they must be whole numbers (n,), and (n, 4)."
            )
        if self.has_masks and tuple(label["masks"].shape) != (count, *image_size):
            raise ValueError(
                f"`labels[{image}]` has `masks` of the shape {tuple(label['masks'].shape)}; it must be (objects, "
                f"height, width) = {(count, *image_size)}."
            )
        if not count:
            return
        if classes.min() < 0 or classes.max() >= self.num_labels:
            raise ValueError(
                f"`labels[{image}]` has classes between {classes.min().item()} and {classes.max().item()}; they must "
                f"be in [0, {self.num_labels - 1}]. Set `num_labels` to the number of classes."
            )
        if (
            not ((boxes[:, :2] >= 0) & (boxes[:, :2] <= 1)).all()
            # Rounding its corners to float32 would empty a narrower box.
            or not ((boxes[:, 2:] > 1e-6) & (boxes[:, 2:] <= 1)).all()
        ):
            raise ValueError(
                f"`labels[{image}]` has `boxes` between {boxes.min().item():g} and {boxes.max().item():g}; centres "
                "must be in [0, 1], widths and heights in (0, 1], as shares of `pixel_values`. Divide pixels by width "
                "and height, and drop empty boxes."
            )


def _image_sizes(pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None) -> list[tuple[int, int]]:
    """Height and width of each image without padding."""
    batch_size, _, height, width = pixel_values.shape
    if pixel_mask is None:
        return [(height, width)] * batch_size
    if pixel_mask.shape != (batch_size, height, width):
        raise ValueError(
            f"`pixel_mask` has the shape {tuple(pixel_mask.shape)}; it must be {(batch_size, height, width)}."
        )
    inside = pixel_mask != 0
    heights, widths = inside.any(dim=2).sum(dim=1), inside.any(dim=1).sum(dim=1)
    rows = torch.arange(height, device=inside.device) < heights[:, None]
    columns = torch.arange(width, device=inside.device) < widths[:, None]
    if not inside.flatten(1).any(dim=1).all() or not torch.equal(inside, rows[:, :, None] & columns[:, None]):
        raise ValueError(
            "`pixel_mask` is not 1 in one rectangle at the top left of each image; mark the pixels of the image by 1, "
            "and pad at the bottom and on the right."
        )
    return list(zip(heights.tolist(), widths.tolist()))


class CroprViTForObjectDetection(CroprViTDetector):
    """Boxes and classes; in training each Cropr module predicts which classes occur in the image."""


class CroprViTForInstanceSegmentation(CroprViTDetector):
    """Boxes, classes and masks; in training each Cropr module predicts which classes occur in the image."""

    has_masks = True


__all__ = ["CroprViTForInstanceSegmentation", "CroprViTForObjectDetection"]
