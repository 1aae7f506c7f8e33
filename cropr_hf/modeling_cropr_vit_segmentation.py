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
from .labels import check_label_maps, map_presence, presence_loss
from .modeling_cropr_vit import (
    CroprViTModel,
    CroprViTModelOutput,
    CroprViTPreTrainedModel,
    CroprViTTaskOutput,
)
from .token_state import put_tokens
from .vit_layers import pad_to_patches


class CroprViTForSemanticSegmentation(CroprViTPreTrainedModel):
    """Linear classifier on every patch, all of which last layer fusion has put back in their places.

    In training each Cropr module predicts, from the tokens that are left there, what `config.auxiliary_task` says:
    which classes the image shows, or, by one query per patch, the class of every patch. On a grid other than that of
    `config.image_size` queries of patches are interpolated like a position table; the ranking stays that of the sum of
    the configured queries, which is what a stripped model has.

    By some methods (DToP) patches leave on the way with a prediction of their class, which stands: the classifier is
    for those that are left.

    Raises:
        `ValueError`: when the configuration prunes without last layer fusion, has no class, the ignore label among its
            classes, or several labels per pixel.
    """

    conversion_fields = {"last_layer_fusion": True}
    takes_exits = True

    def __init__(self, config: CroprViTConfig):
        super().__init__(config)
        self._check_config(config)
        self.num_labels: int = config.num_labels or 0
        self.cropr_vit = CroprViTModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.classifier:  # as in the reference code: every class begins with about the same probability
            init.normal_(self.classifier.weight, mean=0.0, std=2e-5)

    @classmethod
    def _check_config(cls, config: CroprViTConfig) -> None:
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
        patch_logits = self.classifier(self.cropr_vit.patches(outputs))  # of those that are left
        exit_logits = outputs.exit_logits or ()
        if exit_logits:
            prefix = self.config.num_prefix_tokens
            places = outputs.token_indices[:, prefix:] - prefix  # type: ignore[index]
            patch_logits = put_tokens(exit_logits[-1], places, patch_logits)
        logits = self.map_of_patches(patch_logits, grid_size, (height, width))
        self._warn_untrained(labels, outputs.auxiliary_logits)
        losses: dict[str, Any] = {}
        if labels is not None:
            check_label_maps(self.config, labels, batch_size=len(logits))
            labels = labels.long()
            main_loss = self.segmentation_loss(upsample(logits, labels.shape[-2:]), labels)
            auxiliary_losses = []
            if outputs.auxiliary_logits is not None:
                patch_labels = self.patch_labels(labels, (height, width), grid_size)
                auxiliary_losses = self.auxiliary_losses(outputs, labels, patch_labels)
            if self.training and exit_logits:
                maps = (self.map_of_patches(each, grid_size, (height, width)) for each in exit_logits)
                outputs.method_losses = (outputs.method_losses or {}) | {
                    f"exit_loss_{block}": self.segmentation_loss(upsample(each, labels.shape[-2:]), labels)
                    for block, each in zip(self.cropr_vit.token_reducers, maps)
                }
            losses = self._sum_losses(main_loss, auxiliary_losses, outputs)
        return CroprViTTaskOutput(
            **losses,
            logits=logits.to(patch_logits.dtype),
            pruned_after_block=outputs.pruned_after_block,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def map_of_patches(
        self, patch_logits: torch.Tensor, grid_size: tuple[int, int], image_size: tuple[int, int]
    ) -> torch.Tensor:
        """Logits of patches (B, rows * columns, C) as a map that covers the image: (B, C, rows, columns), or where the
        patches cover more, in its pixels, (B, C, height, width).
        """
        # (B, rows * columns, C) -> (B, rows, columns, C) -> (B, C, rows, columns), in this order because the strides
        # then say channels last for a single image as well, which PyTorch upsamples several times faster.
        logits = patch_logits.unflatten(1, grid_size).permute(0, 3, 1, 2)
        height, width = image_size
        covered = tuple(count * self.config.patch_size for count in grid_size)
        return logits if covered == image_size else upsample(logits, covered)[..., :height, :width]

    def segmentation_loss(
        self, logits: torch.Tensor, labels: torch.Tensor, places: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Mean cross-entropy of logits (B, C, ...) and labels (B, ...) where they are not ignored; 0 if all are.

        Where logits (B, C, n) are those of `places` (n,) among the labels (B, N) only, which were drawn with equal
        chances, it is an estimate of that of all: its sum is scaled by N / n, and divided by all labels that count.
        """
        ignored = self.config.semantic_loss_ignore_index
        smoothing = self.config.label_smoothing
        count = (labels != ignored).sum().clamp(min=1)
        if places is not None:
            count = count * (len(places) / labels.shape[1])
            labels = labels[:, places]
        total = F.cross_entropy(
            logits.float(), labels, ignore_index=ignored, label_smoothing=smoothing, reduction="sum"
        )
        return total / count

    def auxiliary_losses(
        self, outputs: CroprViTModelOutput, labels: torch.Tensor, patch_labels: torch.Tensor
    ) -> list[torch.Tensor]:
        """The loss of each module: that of its queries of patches, plus that of its queries of the image.

        An image without any label does not count: nobody knows what it shows.

        Args:
            outputs: of the encoder, with auxiliary logits.
            labels: (B, label height, label width).
            patch_labels: (B, rows * columns).
        """
        has_patches, of_image = self.config.query_counts
        if of_image:
            ignored = self.config.semantic_loss_ignore_index
            presence = map_presence(labels, self.num_labels, ignored)
            is_labelled = (labels != ignored).flatten(1).any(dim=1)
        losses = []
        for logits in outputs.auxiliary_logits or ():
            of_patches = logits.shape[1] - of_image
            loss = torch.zeros((), device=logits.device)
            if has_patches:  # (B, N, C) -> (B, C, N)
                by_patch = logits[:, :of_patches].transpose(1, 2)
                loss = loss + self.segmentation_loss(by_patch, patch_labels, outputs.auxiliary_patches)
            if of_image:
                loss = loss + presence_loss(logits[:, of_patches:], presence, is_labelled)
            losses.append(loss)
        return losses

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
