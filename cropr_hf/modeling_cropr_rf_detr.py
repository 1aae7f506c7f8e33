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
"""RF-DETR with a pruning backbone: a detector whose head is so cheap that pruning shows in the time of the whole."""

# No `from __future__ import annotations` here: it would switch the type checks of `@strict` off.
import copy
from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import RfDetrConfig, RfDetrForObjectDetection, RfDetrModel, RfDetrPreTrainedModel
from transformers.loss.loss_lw_detr import LwDetrForObjectDetectionLoss
from transformers.models.rf_detr.modeling_rf_detr import (
    RfDetrConvEncoder,
    RfDetrDecoder,
    RfDetrDecoderLayer,
    RfDetrMLPPredictionHead,
    RfDetrScaleProjector,
)

from .class_names import settle_labels, with_new_labels
from .configuration_cropr_vit import CroprViTConfig, check_finite
from .detection_heads import check_not_nan
from .labels import check_labels_per_image, check_object_labels
from .modeling_cropr_vit import CroprViTBackbone
from .saving import REPLACED_HEAD, named_damage, refuse_resized, refuse_unexpected
from .vit_layers import CroprViTEmbeddings


@strict
class CroprRfDetrConfig(RfDetrConfig):
    """Configuration of `CroprRfDetrForObjectDetection`: that of RF-DETR with a `CroprViTConfig` as `backbone_config`.

    The default backbone is ViT-S/16 at 512 pixels that prunes 64 of its 1024 patches per module, and returns maps
    after every quarter of its blocks. The number of classes of the backbone follows that of the detector.

    Raises:
        `ValueError`: for a backbone of another type, a number that is NaN or infinite, and names of classes that
            contradict their number.

    Example:

    ```python
    >>> from cropr_hf import CroprRfDetrConfig, CroprRfDetrForObjectDetection, CroprViTConfig

    >>> backbone_config = CroprViTConfig.from_size("base", image_size=640, pruning_rate=100)
    >>> model = CroprRfDetrForObjectDetection(CroprRfDetrConfig(backbone_config=backbone_config, num_labels=80))
    ```"""

    model_type = "cropr_rf_detr"
    # Metrics read `loss_dict`, `logits` and `pred_boxes`; the rest would be gathered for nothing.
    keys_to_ignore_at_inference = [
        "auxiliary_outputs",
        "init_reference_points",
        "last_hidden_state",
        "intermediate_hidden_states",
        "intermediate_reference_points",
        "enc_outputs_class",
        "enc_outputs_coord_logits",
        "backbone_features",
    ]

    def __post_init__(self, **kwargs: Any):
        settle_labels(self, kwargs.get("num_labels"))
        if self.backbone_config is None:
            stages = ["stage3", "stage6", "stage9", "stage12"]
            self.backbone_config = CroprViTConfig.from_size(
                "small", image_size=512, pruning_rate=64, out_features=stages
            )
        super().__post_init__(**kwargs)
        if not isinstance(self.backbone_config, CroprViTConfig):
            raise ValueError(
                f"`backbone_config` is a {type(self.backbone_config).__name__}; give a `CroprViTConfig`, or use the "
                "RF-DETR of Transformers."
            )
        self.validate_numbers()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """As `PreTrainedConfig.from_dict`; another number of classes leaves the stored names behind."""
        return super().from_dict(with_new_labels(config_dict, kwargs), **kwargs)

    def validate_numbers(self):
        """Checks that every number is one."""
        check_finite(self)


class CroprRfDetrEncoder(RfDetrConvEncoder):
    """The backbone, and the projector that makes one map of its maps."""

    def __init__(self, config: CroprRfDetrConfig):
        nn.Module.__init__(self)  # the constructor of the parent class builds a backbone of its own
        self.num_queries = config.num_queries
        self.backbone: Any = CroprViTBackbone(config.backbone_config)  # type: ignore[assignment, arg-type]
        self.projector = RfDetrScaleProjector(config)

    def forward(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels (B, channels, height, width) and mask (B, height, width) -> one map (B, d_model, rows, columns), and
        its mask (B, rows, columns).
        """
        features, mask = super().forward(pixel_values, pixel_mask)
        rows, columns = features.shape[-2:]
        if rows * columns < self.num_queries:
            raise ValueError(
                f"`num_queries` is {self.num_queries}, but the image has only {rows} x {columns} patches for as many "
                "proposals; use a larger image or fewer queries."
            )
        return features, mask


class CroprRfDetrPreTrainedModel(RfDetrPreTrainedModel):
    """What both classes share: their configuration, and that all weights get their first values."""

    config: CroprRfDetrConfig
    supports_gradient_checkpointing = True

    @classmethod
    def is_custom_code(cls) -> bool:
        """`False`: in custom code Transformers initialises no module that holds no parameters itself.

        That is a precaution for code that does not know `transformers.initialization`; it would pass over the sampling
        offsets of the decoder and the biases that focal losses need.
        """
        return False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs):
        """See `PreTrainedModel.from_pretrained`.

        Raises:
            `ValueError`: when the checkpoint is damaged, or has other weights of the backbone, or weights of other
                shapes, than the configuration says.
        """
        path = pretrained_model_name_or_path
        replaces_head = kwargs.pop("ignore_mismatched_sizes", False)
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # they are checked below, by name
        with named_damage(path):
            loaded: Any = super().from_pretrained(path, *args, **kwargs)
        model, info = loaded
        if not replaces_head:
            refuse_resized(path, info["mismatched_keys"], REPLACED_HEAD)
        unexpected = [name for name in info["unexpected_keys"] if ".cropr_vit." in name]
        refuse_unexpected(path, [name for name in unexpected if ".token_reducers." not in name])
        return loaded if output_loading_info else model

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, *args: Any, **kwargs: Any
    ) -> None:
        """As the parent; but reentrant checkpointing leaves the few layers of the decoder out.

        It does not see the tensors that they take by keyword, and would go through the backbone twice.
        """
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, *args, **kwargs)
        if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            for module in self.modules():
                if isinstance(module, RfDetrDecoderLayer):
                    module.gradient_checkpointing = False

    def set_pruning(self, pruning: int | Sequence[int] | None) -> None:
        """Changes how much the backbone prunes; see `CroprViTBackbone.set_pruning`."""
        (backbone,) = [part for part in self.modules() if isinstance(part, CroprViTBackbone)]
        backbone.set_pruning(pruning)


class CroprRfDetrModel(CroprRfDetrPreTrainedModel, RfDetrModel):
    """RF-DETR without heads for the last decoder layer."""

    def __init__(self, config: CroprRfDetrConfig):
        RfDetrPreTrainedModel.__init__(self, config)  # as above
        num_labels = config.num_labels or 0
        config.backbone_config.num_labels = num_labels  # type: ignore[union-attr]
        self.backbone = CroprRfDetrEncoder(config)
        self.decoder = RfDetrDecoder(config)
        self.group_detr, self.num_queries, self.d_model = config.group_detr, config.num_queries, config.d_model
        groups, size = range(config.group_detr), config.d_model
        self.reference_point_embed = nn.Embedding(config.num_queries * config.group_detr, 4)
        self.query_feat = nn.Embedding(config.num_queries * config.group_detr, size)
        self.enc_output = nn.ModuleList([nn.Linear(size, size) for _ in groups])
        self.enc_output_norm = nn.ModuleList([nn.LayerNorm(size) for _ in groups])
        self.enc_out_bbox_embed = nn.ModuleList([RfDetrMLPPredictionHead(size, size, 4, num_layers=3) for _ in groups])
        self.enc_out_class_embed = nn.ModuleList([nn.Linear(size, num_labels) for _ in groups])
        self.post_init()


def evaluation_loss(
    logits: torch.Tensor, labels: Any, device: Any, pred_boxes: torch.Tensor, config: Any, *args: Any, **kwargs: Any
):
    """The loss of the library, for the one group of queries that is there in evaluation.

    The library splits whatever queries there are into `config.group_detr` groups and matches each to all objects.
    """
    config = copy.copy(config)
    config.group_detr = 1
    return LwDetrForObjectDetectionLoss(logits, labels, device, pred_boxes, config, *args, **kwargs)


class CroprRfDetrForObjectDetection(CroprRfDetrPreTrainedModel, RfDetrForObjectDetection):
    """RF-DETR for object detection with a `CroprViTBackbone`.

    Labels, outputs and post-processing are those of `RfDetrForObjectDetection`. Call `cropr_hf.training.train_routers`
    before training.
    """

    # The loss is normalised by the number of boxes, not by `num_items_in_batch`.
    accepts_loss_kwargs = False

    def __init__(self, config: CroprRfDetrConfig):
        RfDetrPreTrainedModel.__init__(self, config)  # as above
        self.model = CroprRfDetrModel(config)
        self.class_embed = nn.Linear(config.d_model, config.num_labels or 0)
        self.bbox_embed = RfDetrMLPPredictionHead(config.d_model, config.d_model, 4, num_layers=3)
        self.post_init()

    def forward(  # type: ignore[override]
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        labels: list[dict[str, torch.Tensor]] | None = None,
        **kwargs: Any,
    ):
        """See `RfDetrForObjectDetection.forward`.

        Raises:
            `ValueError`: for pixels and labels that the other detectors do not take either.
            `FloatingPointError`: in evaluation, for scores or boxes that are not a number.
        """
        CroprViTEmbeddings.check_pixels(pixel_values)
        if labels is not None:
            check_labels_per_image(labels, len(pixel_values))
            height, width = pixel_values.shape[-2:]
            for image, label in enumerate(labels):
                check_object_labels(self.config, image, label, (height, width), has_masks=False)  # type: ignore[arg-type]
            labels = [{**label, "class_labels": label["class_labels"].long()} for label in labels]
        outputs = super().forward(pixel_values, pixel_mask, labels, **kwargs)
        if not self.training and not torch.compiler.is_compiling():
            check_not_nan(outputs.logits, outputs.pred_boxes)
        return outputs

    @property  # type: ignore[misc]
    def loss_function(self):
        """The loss for the queries of the current mode."""
        return LwDetrForObjectDetectionLoss if self.training else evaluation_loss


__all__ = ["CroprRfDetrConfig", "CroprRfDetrForObjectDetection", "CroprRfDetrModel"]
