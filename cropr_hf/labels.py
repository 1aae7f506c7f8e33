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
"""What labels must look like, what is wrong with those that do not, and which classes they show."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from .configuration_cropr_vit import CroprViTConfig


IGNORED_LABEL = -100  # of an image, as everywhere in torch


def check_is_tensor(labels: Any) -> None:
    """Raises `ValueError` for labels that are something else."""
    if not isinstance(labels, torch.Tensor):
        raise ValueError(f"`labels` is a {type(labels).__name__}; give a tensor.")


def check_image_labels(config: CroprViTConfig, labels: torch.Tensor, batch_size: int) -> None:
    """Raises `ValueError` for labels that `CroprViTForImageClassification` does not take."""
    check_is_tensor(labels)
    if torch.compiler.is_compiling():
        return  # a data-dependent check would break the graph
    num_labels = config.num_labels or 0
    multi_label = config.problem_type == "multi_label_classification"
    if config.problem_type == "regression":
        check_targets(labels, batch_size, num_labels)
        return
    if num_labels < 2 and not multi_label:
        raise ValueError(
            f"The loss over {num_labels} class is always 0; set `num_labels` to 2 or more, or `problem_type` "
            "to 'multi_label_classification' or 'regression'."
        )
    if labels.is_floating_point() or multi_label:
        check_class_shares(labels, batch_size, num_labels)
    elif labels.shape != (batch_size,):
        raise ValueError(f"`labels` have the shape {tuple(labels.shape)}; it must be ({batch_size},).")
    elif ((labels >= num_labels) | ((labels < 0) & (labels != IGNORED_LABEL))).any():
        raise ValueError(
            f"`labels` are between {labels.min().item()} and {labels.max().item()}; they must be in "
            f"[0, {num_labels - 1}], or {IGNORED_LABEL} to be ignored. Set `num_labels` to the number of classes."
        )


def check_targets(labels: torch.Tensor, batch_size: int, num_labels: int) -> None:
    """Raises `ValueError` unless targets of a regression are finite numbers (B, C), or (B,) of a single target."""
    shapes = [(batch_size, num_labels), *([(batch_size,)] if num_labels == 1 else [])]
    if not num_labels or labels.shape not in shapes:
        raise ValueError(
            f"`labels` have the shape {tuple(labels.shape)}; for a regression it must be (batch size, targets) = "
            f"({batch_size}, {num_labels}). Set `num_labels` to the number of targets."
        )
    if not labels.isfinite().all():
        raise ValueError("`labels` hold NaN or infinity; the targets of a regression must be finite numbers.")


def check_class_shares(labels: torch.Tensor, batch_size: int, num_labels: int) -> None:
    """Raises `ValueError` unless soft targets, or the presence of classes, are (B, C) in [0, 1], up to rounding."""
    if torch.compiler.is_compiling():
        return  # a data-dependent check would break the graph
    if not num_labels or labels.shape != (batch_size, num_labels):
        raise ValueError(
            f"`labels` have the shape {tuple(labels.shape)}; it must be (batch size, classes) = ({batch_size}, "
            f"{num_labels}) with soft targets, or the presence of several classes. Set `num_labels` to their number."
        )
    slack = max(1e-6, 4 * torch.finfo(labels.dtype).eps) if labels.is_floating_point() else 0  # mixtures are rounded
    if not ((labels >= -slack) & (labels <= 1 + slack)).all():  # nor NaN
        raise ValueError(
            f"`labels` are between {labels.min().item()} and {labels.max().item()}; soft targets, or the presence of "
            "several classes, must be in [0, 1]."
        )


def check_label_maps(config: CroprViTConfig, labels: torch.Tensor, batch_size: int) -> None:
    """Raises `ValueError` for labels that `CroprViTForSemanticSegmentation` does not take."""
    check_is_tensor(labels)
    if torch.compiler.is_compiling():
        return  # a data-dependent check would break the graph
    num_labels = config.num_labels or 0
    if num_labels < 2:
        raise ValueError("The loss over 1 class is always 0; set `num_labels` to 2 or more.")
    if labels.dim() != 3 or len(labels) != batch_size or labels.is_floating_point() or not labels.numel():
        raise ValueError(
            f"`labels` are {labels.dtype} of the shape {tuple(labels.shape)}; they must be whole numbers of the "
            f"shape ({batch_size}, height, width)."
        )
    ignored = config.semantic_loss_ignore_index
    if ((labels != ignored) & ((labels < 0) | (labels >= num_labels))).any():
        raise ValueError(
            f"`labels` are between {labels.min().item()} and {labels.max().item()}; they must be in "
            f"[0, {num_labels - 1}], or {ignored} to be ignored. Set `num_labels` to the number of classes, "
            "or reduce the labels (`do_reduce_labels` of the image processor) if 0 means none."
        )


def check_labels_per_image(labels: Any, batch_size: int) -> None:
    """Raises `ValueError` unless labels of a detector are a list with an entry for every image."""
    if not isinstance(labels, (list, tuple)) or len(labels) != batch_size:
        raise ValueError(
            f"`labels` is a {type(labels).__name__}{f' of {len(labels)}' if hasattr(labels, '__len__') else ''}; "
            f"it must be a list of {batch_size} dictionaries, one per image."
        )


def check_object_labels(
    config: CroprViTConfig, image: int, label: Any, image_size: tuple[int, int], has_masks: bool
) -> None:
    """Raises `ValueError` for labels of one image that the detectors do not take.

    Args:
        image: its number in the batch, for the message.
        image_size: height and width of the batch in pixels.
        has_masks: whether there must be masks.
    """
    wanted = ["class_labels", "boxes", *(["masks"] if has_masks else [])]
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
    if has_masks and tuple(label["masks"].shape) != (count, *image_size):
        raise ValueError(
            f"`labels[{image}]` has `masks` of the shape {tuple(label['masks'].shape)}; it must be (objects, "
            f"height, width) = {(count, *image_size)}."
        )
    if has_masks and label["masks"].is_floating_point() and label["masks"].isnan().any():
        raise ValueError(f"`labels[{image}]` has NaN in `masks`; they must be 0 or 1.")
    if not count:
        return
    num_labels = config.num_labels or 0
    if classes.min() < 0 or classes.max() >= num_labels:
        raise ValueError(
            f"`labels[{image}]` has classes between {classes.min().item()} and {classes.max().item()}; they must "
            f"be in [0, {num_labels - 1}]. Set `num_labels` to the number of classes."
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


def class_presence(labels: Sequence[torch.Tensor], num_labels: int) -> torch.Tensor:
    """Which classes each image shows, (B, C), 0 or 1, from the class indices (n,) in each image."""
    counts = torch.tensor([len(image) for image in labels], device=labels[0].device)
    rows = torch.arange(len(labels), device=counts.device).repeat_interleave(counts)
    presence = torch.zeros(len(labels), num_labels, device=counts.device)
    presence[rows, torch.cat(list(labels)).long()] = 1.0
    return presence


def map_presence(labels: torch.Tensor, num_labels: int, ignored: int) -> torch.Tensor:
    """Which classes each image shows, (B, C), 0 or 1, from its label map (B, height, width); `ignored` is none."""
    presence = torch.zeros(len(labels), num_labels + 1, device=labels.device)
    classes = labels.masked_fill(labels == ignored, num_labels).flatten(1)
    return presence.scatter(1, classes, 1.0)[:, :num_labels]


def presence_loss(
    logits: torch.Tensor, presence: torch.Tensor, is_counted: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean binary cross-entropy of logits (B, N, C), whose N queries all predict which classes (B, C) are present.

    With `is_counted` (B,) it is that of these images; 0 if there are none.
    """
    losses = F.binary_cross_entropy_with_logits(logits.float(), presence[:, None].expand_as(logits), reduction="none")
    if is_counted is None:
        return losses.mean()
    of_images = losses.flatten(1).mean(dim=1)
    return (of_images * is_counted).sum() / is_counted.sum().clamp(min=1)
