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
"""Object detection and instance segmentation by a Cascade Mask R-CNN; its parts are in `detection_heads`.

Boxes are (x1, y1, x2, y2) in pixels of the input, everywhere but in labels and outputs.

Symbols: B images, F channels of the pyramid, R regions of all images together, C classes, K detections.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import (
    batched_nms,
    box_convert,
    clip_boxes_to_image,
    remove_small_boxes,
)
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput
from transformers.utils.generic import can_return_tuple, maybe_autocast

from .configuration_cropr_vit import CroprViTConfig
from .detection_heads import (
    BOX_POOLING,
    CASCADE,
    MASK_POOLING,
    CroprViTBoxHead,
    CroprViTFeaturePyramid,
    CroprViTMaskHead,
    CroprViTProposalNetwork,
    check_not_nan,
    match_boxes,
    paste_masks,
    pool_regions,
    pyramid_strides,
    soft_nms,
)
from .labels import check_labels_per_image, check_object_labels, class_presence, presence_loss
from .modeling_cropr_vit import CroprViTModel, CroprViTPreTrainedModel
from .vit_layers import pad_to_patches


@dataclass
class CroprViTDetectionOutput(ModelOutput):
    """Output of the detectors; what belongs to training alone is `None` in evaluation, and detections in training.

    K is `config.detections_per_image`. The form is that of DETR, so that its image processor reads it: the softmax of
    `logits` gives the score of a detection to its class and the rest to "no object"; slots without a detection are "no
    object".

    Attributes:
        loss: main loss + `config.auxiliary_loss_weight` * sum of the auxiliary losses + further losses of the method,
            with labels.
        loss_dict: parts of the main loss, with labels: two of the proposals, two of each box head, one of masks.
        logits: (B, K, C + 1)
        pred_boxes: (B, K, 4), centre, width and height as shares of the image without padding.
        pred_masks: (B, K, height / `config.mask_stride`, width / `config.mask_stride`), logits of instance masks; they
            cover the image without padding.
        main_loss: loss without the auxiliary losses, detached, in training.
        auxiliary_losses: (modules,), detached, in training with auxiliary heads.
        method_losses: further losses of the method, by name, detached, in training.
        pruned_after_block, hidden_states, attentions: see `CroprViTModelOutput`.
    """

    loss: torch.Tensor | None = None
    loss_dict: dict[str, torch.Tensor] | None = None
    logits: torch.Tensor | None = None
    pred_boxes: torch.Tensor | None = None
    pred_masks: torch.Tensor | None = None
    main_loss: torch.Tensor | None = None
    auxiliary_losses: torch.Tensor | None = None
    method_losses: dict[str, torch.Tensor] | None = None
    pruned_after_block: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


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
        "last_layer_fusion": True,
    }
    _can_compile_fullgraph = False  # the number of detections depends on the image

    def __init__(self, config: CroprViTConfig):
        super().__init__(config)
        self._check_fusion(config)
        if not config.num_labels:
            raise ValueError("`num_labels` is 0; a detector needs at least 1 class.")
        if config.label_smoothing:
            raise ValueError(
                f"`label_smoothing` is {config.label_smoothing}, but detectors do not support it; set it to 0."
            )
        self.num_labels: int = config.num_labels
        self.cropr_vit = CroprViTModel(config, add_pooling_layer=False)
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
            `FloatingPointError`: in evaluation, scores or boxes that are not a number, which stands in the weights or
                in `pixel_values`.
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
                results |= self._sum_losses(torch.stack(list(losses.values())).sum(), auxiliary_losses, outputs)
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
            check_not_nan(logits, deltas)
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
        check_not_nan(logits)
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
        check_labels_per_image(labels, len(pixel_values))
        height, width = pixel_values.shape[-2:]
        targets = []
        for image, (label, image_size) in enumerate(zip(labels, image_sizes)):
            check_object_labels(self.config, image, label, (height, width), self.has_masks)
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
