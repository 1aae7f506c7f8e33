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
"""The image processor of the detectors."""

from types import SimpleNamespace
from typing import Any

import torch
from transformers import DetrImageProcessor


class CroprViTImageProcessor(DetrImageProcessor):
    """`DetrImageProcessor`, whose label images of instances leave the background free.

    That of DETR gives every pixel to the object with the highest probability there, even if that is next to 0: objects
    get the background. Here a pixel belongs to an object if its mask there reaches `mask_threshold`.
    """

    def post_process_instance_segmentation(
        self, outputs: Any, threshold: float = 0.5, mask_threshold: float = 0.5, *args: Any, **kwargs: Any
    ) -> Any:
        """See `DetrImageProcessor.post_process_instance_segmentation`."""
        outputs = _with_background(outputs, threshold, mask_threshold)
        return super().post_process_instance_segmentation(outputs, threshold, mask_threshold, *args, **kwargs)

    def post_process_panoptic_segmentation(
        self, outputs: Any, threshold: float = 0.5, mask_threshold: float = 0.5, *args: Any, **kwargs: Any
    ) -> Any:
        """See `DetrImageProcessor.post_process_panoptic_segmentation`."""
        outputs = _with_background(outputs, threshold, mask_threshold)
        return super().post_process_panoptic_segmentation(outputs, threshold, mask_threshold, *args, **kwargs)


def _with_background(outputs: Any, threshold: float, mask_threshold: float) -> Any:
    """The outputs with one more object, which is certain, and whose mask wins where no other reaches the threshold.

    It stays below the threshold itself, so that it is no segment in the end.

    Raises:
        `ValueError`: for a threshold outside of [0, 1].
    """
    for name, value in (("threshold", threshold), ("mask_threshold", mask_threshold)):
        if not 0 <= value <= 1:  # NaN would find nothing
            raise ValueError(f"`{name}` is {value}; it must be in [0, 1], such as 0.5.")
    logits, masks = outputs.logits, outputs.pred_masks
    certain = torch.full_like(logits[:, :1], -1e4)
    certain[..., 0] = 0.0
    # Probabilities are multiplied by scores, which are `threshold` at least.
    faint = torch.full_like(masks[:, :1], threshold * mask_threshold).clamp(min=1e-4).logit()
    masks = masks.masked_fill(masks.sigmoid() < mask_threshold, -1e4)
    return SimpleNamespace(logits=torch.cat([logits, certain], dim=1), pred_masks=torch.cat([masks, faint], dim=1))


__all__ = ["CroprViTImageProcessor"]
