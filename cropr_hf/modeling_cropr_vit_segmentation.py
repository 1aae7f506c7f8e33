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
"""Semantic segmentation: a linear classifier on every patch, which last layer fusion has put back."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils.generic import can_return_tuple

from .configuration_cropr_vit import CroprViTConfig
from .labels import check_label_maps
from .modeling_cropr_vit import CroprViTModel, CroprViTPreTrainedModel, CroprViTTaskOutput
from .vit_layers import pad_to_patches


class CroprViTForSemanticSegmentation(CroprViTPreTrainedModel):
    """Linear classifier on every patch, all of which last layer fusion has put back in their places.

    In training each Cropr module has one query per patch (`config.num_queries` is `None`), and predicts the class of
    every patch from the tokens that are left there. On a grid other than that of `config.image_size` its queries are
    interpolated like a position table; the ranking stays that of the sum of the configured queries, which is what a
    stripped model has.

    Raises:
        `ValueError`: when the configuration prunes without last layer fusion, has auxiliary heads with another number
            of queries, no class, the ignore label among its classes, or several labels per pixel.
    """

    conversion_fields = {"num_queries": None, "last_layer_fusion": True}

    def __init__(self, config: CroprViTConfig):
        super().__init__(config)
        self._check_config(config)
        self.num_labels: int = config.num_labels or 0
        self.cropr_vit = CroprViTModel(config)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.classifier:  # as in the reference code: every class begins with about the same probability
            init.normal_(self.classifier.weight, mean=0.0, std=2e-5)

    def add_auxiliary_heads(self) -> None:
        """See `CroprViTPreTrainedModel.add_auxiliary_heads`; raises `ValueError` unless there is a query per patch."""
        self._check_queries(self.config)
        super().add_auxiliary_heads()

    @staticmethod
    def _check_queries(config: CroprViTConfig) -> None:
        if config.num_queries is not None:
            raise ValueError(
                f"`num_queries` is {config.num_queries}, but semantic segmentation trains one query per patch; set "
                "`num_queries=None`."
            )

    @classmethod
    def _check_config(cls, config: CroprViTConfig) -> None:
        if config.use_auxiliary_heads:
            cls._check_queries(config)
        cls._check_fusion(config)
        if not config.num_labels:
            raise ValueError("`num_labels` is 0; semantic segmentation needs at least 1 class.")
        if 0 <= config.semantic_loss_ignore_index < config.num_labels:
            raise ValueError(
                f"`semantic_loss_ignore_index` {config.semantic_loss_ignore_index} is one of the {config.num_labels} "
                "classes, which the loss would leave out; choose a number that no class has, such as -100."
            )
        if config.problem_type not in (None, "single_label_classification"):
            raise ValueError("A pixel has one class; leave `problem_type` out for semantic segmentation.")

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_pruning: bool = False,
        **kwargs: Any,
    ) -> CroprViTTaskOutput:
        """
        Args:
            pixel_values: (B, channels, height, width), of any size: zeros are added at the bottom and on the right up
                to whole patches.
            labels: class of each pixel (B, label height, label width) in [0, C), or
                `config.semantic_loss_ignore_index`. The map covers the image; its resolution may be another.
            output_pruning: also return `pruned_after_block`, which includes added patches.

        Returns:
            `logits`: (B, C, rows, columns), one for each patch; when zeros were added, upsampled and cut to the image,
            (B, C, height, width), so that in both cases they cover the image exactly.

        Raises:
            `ValueError`: labels of the wrong shape or out of range, and as `CroprViTModel.forward`.
        """
        self.cropr_vit.embeddings.check_pixels(pixel_values)
        height, width = pixel_values.shape[-2:]
        patch_size = self.config.patch_size
        pixel_values = pad_to_patches(pixel_values, patch_size)
        outputs = self.cropr_vit(pixel_values, output_pruning=output_pruning, **kwargs)
        grid_size = (pixel_values.shape[2] // patch_size, pixel_values.shape[3] // patch_size)
        patches = self.cropr_vit.patches(outputs)
        # (B, rows * columns, C) -> (B, rows, columns, C) -> (B, C, rows, columns), in this order because the strides
        # then say channels last for a single image as well, which PyTorch upsamples several times faster.
        logits = patch_logits = self.classifier(patches).unflatten(1, grid_size).permute(0, 3, 1, 2)
        if pixel_values.shape[2:] != (height, width):
            logits = upsample(patch_logits, pixel_values.shape[-2:])[..., :height, :width]
        self._warn_untrained(labels, outputs.auxiliary_logits)
        losses: dict[str, Any] = {}
        if labels is not None:
            check_label_maps(self.config, labels, batch_size=len(logits))
            labels = labels.long()
            main_loss = self.segmentation_loss(upsample(logits, labels.shape[-2:]), labels)
            auxiliary_losses = []
            if outputs.auxiliary_logits is not None:
                patch_labels = self.patch_labels(labels, (height, width), grid_size)
                # (B, N, C) -> (B, C, N)
                auxiliary_losses = [
                    self.segmentation_loss(auxiliary.transpose(1, 2), patch_labels)
                    for auxiliary in outputs.auxiliary_logits
                ]
            losses = self._sum_losses(main_loss, auxiliary_losses, outputs)
        return CroprViTTaskOutput(
            **losses,
            logits=logits.to(patch_logits.dtype),
            pruned_after_block=outputs.pruned_after_block,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def segmentation_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of logits (B, C, ...) and labels (B, ...) where they are not ignored; 0 if all are."""
        ignored = self.config.semantic_loss_ignore_index
        smoothing = self.config.label_smoothing
        total = F.cross_entropy(
            logits.float(), labels, ignore_index=ignored, label_smoothing=smoothing, reduction="sum"
        )
        return total / (labels != ignored).sum().clamp(min=1)

    def patch_labels(
        self, labels: torch.Tensor, image_size: tuple[int, int], grid_size: tuple[int, int]
    ) -> torch.Tensor:
        """The label at the centre of each patch; centres outside of the image are ignored.

        (The reference code takes the upper left pixel of each patch.)

        Args:
            labels: (B, label height, label width), over the whole image.
            image_size: height and width of the image in pixels.
            grid_size: rows and columns of patches, which cover the image and what was added to it.

        Returns:
            (B, rows * columns)
        """
        lengths = labels.shape[-2:]
        # Centre of patch i in pixels: (2 i + 1) * patch size / 2; whole numbers, so that nothing is rounded.
        places = [
            (2 * torch.arange(count, device=labels.device) + 1) * self.config.patch_size * length // (2 * pixels)
            for length, pixels, count in zip(lengths, image_size, grid_size)
        ]
        rows, columns = (place.clamp(max=length - 1) for place, length in zip(places, lengths))
        outside = (places[0] >= lengths[0])[:, None] | (places[1] >= lengths[1])
        # (B, label height, label width) -> (B, rows, columns) -> (B, rows * columns)
        nearest = labels[:, rows[:, None], columns]
        return nearest.masked_fill(outside, self.config.semantic_loss_ignore_index).flatten(1)


def upsample(logits: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Bilinear interpolation of maps (B, C, rows, columns) to `size` (height, width), in float32."""
    return F.interpolate(logits.float(), size=tuple(size), mode="bilinear", align_corners=False)


__all__ = ["CroprViTForSemanticSegmentation"]
