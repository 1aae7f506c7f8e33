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
"""A plain vision transformer that prunes tokens between its blocks, and its task heads."""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_cropr_vit import CroprViTConfig
from .saving import StrippableModel
from .token_reduction import (
    AuxiliaryClassifier,
    FoldedScorer,
    Rotation,
    Scorer,
    TokenState,
    build_token_reducers,
    has_auxiliary_heads,
    resample_grid,
)


logger = logging.get_logger(__name__)


@dataclass
class CroprViTModelOutput(ModelOutput):
    """Output of `CroprViTModel`.

    Attributes:
        last_hidden_state: (B, T, D), prefix tokens, then the patch tokens that are left, in raster order (all of them
            with last layer fusion); after the final norm if `config.norm_before_pooling`.
        pooler_output: (B, D), or (B, 2 D) with `cls_patch_mean`; pooled and normalised.
        pruned_after_block: (B, patches), with `output_pruning=True`: the block (1 to L) after which each patch was
            pruned, L if it never was.
        auxiliary_logits: one (B, N, C) per module, in training with auxiliary heads.
        stage_states: one (B, prefix + patches, D) for each of `output_stages`: a pruned patch, which is at its place
            there, has the state in which it was pruned.
        hidden_states: L + 1 tensors (B, tokens there, D): shorter where tokens were pruned.
        attentions: L tensors (B, heads, tokens there, tokens there), with eager attention; of windowed blocks
            (B * windows, heads, window size ** 2, window size ** 2).
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    pruned_after_block: torch.Tensor | None = None
    auxiliary_logits: tuple[torch.Tensor, ...] | None = None
    stage_states: tuple[torch.Tensor, ...] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class CroprViTTaskOutput(ModelOutput):
    """Output of the task classes; what belongs to training alone is `None` in evaluation.

    Attributes:
        loss: main loss + `config.auxiliary_loss_weight` * sum of the auxiliary losses, with labels.
        logits: (B, C) of images, (B, C, rows, columns) of label maps (see `CroprViTForSemanticSegmentation`).
        main_loss: loss of `logits`, detached, in training.
        auxiliary_losses: (modules,), detached, in training with auxiliary heads.
        pruned_after_block, hidden_states, attentions: see `CroprViTModelOutput`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    main_loss: torch.Tensor | None = None
    auxiliary_losses: torch.Tensor | None = None
    pruned_after_block: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class CroprViTEmbeddings(nn.Module):
    """Patches, absolute positions, CLS and register tokens."""

    def __init__(self, config: CroprViTConfig):
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.patch_embeddings = nn.Conv2d(
            config.num_channels, size, kernel_size=config.patch_size, stride=config.patch_size
        )
        # Prefix tokens have no position of their own: whatever a source family adds to them is a constant.
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size)) if config.use_cls_token else None
        self.register_tokens = None
        if config.num_register_tokens:
            self.register_tokens = nn.Parameter(torch.zeros(1, config.num_register_tokens, size))
        self.position_embeddings = None
        if config.use_absolute_position_embeddings:
            self.position_embeddings = nn.Parameter(torch.zeros(1, config.num_patches, size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def init_weights(self) -> None:
        """Truncated normal, as in the families that this model covers."""
        for parameter in (self.cls_token, self.register_tokens, self.position_embeddings):
            if parameter is not None:
                init.trunc_normal_(parameter, mean=0.0, std=self.config.initializer_range)

    def interpolate_positions(self, table: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        """The position table (1, rows * columns, D) for a grid, from the one for `config.image_size`."""
        if grid_size == self.config.grid_size:
            return table
        return resample_grid(table, self.config.grid_size, grid_size, self.config.interpolate_antialias)

    @staticmethod
    def check_pixels(pixel_values: torch.Tensor) -> None:
        """Raises `ValueError` for raw pixels, and for what is no batch of images."""
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"`pixel_values` are {pixel_values.dtype}; give normalised floating-point values, as image processors "
                "return them."
            )
        if pixel_values.dim() != 4 or pixel_values.shape[0] == 0:
            raise ValueError(
                f"`pixel_values` has the shape {tuple(pixel_values.shape)}; it must be (batch, channels, height, "
                "width), with one image or more."
            )

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """(B, channels, height, width) -> (B, prefix + rows * columns, D), and (rows, columns)."""
        self.check_pixels(pixel_values)
        channels, height, width = pixel_values.shape[1:]
        patch_size = self.config.patch_size
        if channels != self.config.num_channels:
            raise ValueError(
                f"`pixel_values` has {channels} channels, the model takes {self.config.num_channels}; convert the "
                "images (for instance to RGB), or build the model with another `num_channels`."
            )
        if height % patch_size or width % patch_size or not height or not width:
            raise ValueError(
                f"`pixel_values` is {height} x {width}, not a multiple of the patch size {patch_size}; resize or pad "
                "the images."
            )
        grid_size = (height // patch_size, width // patch_size)
        patches = self.patch_embeddings(pixel_values.to(self.patch_embeddings.weight.dtype))
        # (B, D, rows, columns) -> (B, D, rows * columns) -> (B, rows * columns, D)
        patches = patches.flatten(2).transpose(1, 2)
        if self.position_embeddings is not None:
            patches = patches + self.interpolate_positions(self.position_embeddings, grid_size)
        prefix = [token for token in (self.cls_token, self.register_tokens) if token is not None]
        # Not `len(patches)`, which would fix the number of images in a `torch.export` program.
        tokens = torch.cat([*(token.expand(patches.shape[0], -1, -1) for token in prefix), patches], dim=1)
        return self.dropout(tokens), grid_size


class CroprViTRotaryEmbedding(nn.Module):
    """2-D rotary positions: half of the rotated channel pairs turn with the row, half with the column.

    Prefix tokens are not rotated; their entries are the identity (cos 1, sin 0), so that cos and sin line up with the
    tokens and move with them.
    """

    def __init__(self, config: CroprViTConfig):
        super().__init__()
        self.config = config
        self.theta = float(config.rope_theta or 1.0)
        self.num_frequencies = config.hidden_size // config.num_attention_heads // 4

    def _coordinates(self, length: int, device: torch.device) -> torch.Tensor:
        places = torch.arange(length, dtype=torch.float32, device=device)
        if self.config.rope_coordinates == "index":
            return places / length * self.config.rope_reference_grid
        return ((places + 0.5) / length * 2.0 - 1.0) * 2.0 * math.pi

    def forward(self, grid_size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Rotation:
        """Cosine and sine for a grid, each (1, prefix + rows * columns, head size / 2)."""
        rows, columns = grid_size
        # (rows, F), (columns, F) -> (rows, columns, 2 F) -> (1, rows * columns, 2 F)
        # Computed, not stored: a buffer would be rounded when the model is cast to half precision.
        exponents = torch.arange(self.num_frequencies, dtype=torch.float32, device=device) / self.num_frequencies
        frequencies = 1.0 / self.theta**exponents
        by_row = self._coordinates(rows, device)[:, None] * frequencies
        by_column = self._coordinates(columns, device)[:, None] * frequencies
        angles = torch.cat(
            [by_row[:, None].expand(-1, columns, -1), by_column[None].expand(rows, -1, -1)], dim=-1
        ).flatten(0, 1)[None]
        angles = F.pad(angles, (0, 0, self.config.num_prefix_tokens, 0))  # cos 0 = 1, sin 0 = 0
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns channel pairs (i, i + d / 2) of queries or keys (B, heads, T, d) by angles (B or 1, T, d / 2)."""
    first, second = states.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    # Under autocast angles are float32 and states are not, and attention wants all of one type.
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(states.dtype)


def partition_windows(tokens: torch.Tensor, grid_size: tuple[int, int], window_size: int) -> torch.Tensor:
    """Tokens in raster order (B, rows * columns, ...) -> windows (B * windows, window size ** 2, ...).

    A grid that does not tile gets zeros at the bottom and on the right, which attention does not mask (as in ViTDet).
    """
    bottom, right = (-length % window_size for length in grid_size)
    tokens = tokens.unflatten(1, grid_size)
    if bottom or right:
        tokens = F.pad(tokens, (0, 0, 0, right, 0, bottom))
    # (B, rows, columns, D) -> (B, down, w, across, w, D) -> (B, down, across, w, w, D) -> (B * windows, w * w, D)
    tokens = tokens.unflatten(2, (-1, window_size)).unflatten(1, (-1, window_size))
    return tokens.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def merge_windows(windows: torch.Tensor, grid_size: tuple[int, int], window_size: int) -> torch.Tensor:
    """Undoes `partition_windows`: (B * windows, window size ** 2, D) -> (B, rows * columns, D)."""
    rows, columns = grid_size
    down, across = -(-rows // window_size), -(-columns // window_size)
    # (B * windows, w * w, D) -> (B, down, across, w, w, D) -> (B, down, w, across, w, D) -> (B, rows, columns, D)
    tokens = windows.unflatten(1, (window_size, window_size)).unflatten(0, (-1, down, across))
    tokens = tokens.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return tokens[:, :rows, :columns].flatten(1, 2)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention, which also returns its weights: (B, T, heads, d) and (B, heads, T, T)."""
    weights = query @ key.transpose(-2, -1) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    output = F.dropout(weights, p=dropout, training=module.training) @ value
    return output.transpose(1, 2).contiguous(), weights


class CroprViTAttention(nn.Module):
    """Self-attention through the attention interface of Transformers (sdpa, eager, flash, flex)."""

    def __init__(self, config: CroprViTConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.query_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.key_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.value_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.proj_bias)

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: Rotation | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, D) -> (B, T, D), and the weights if the implementation returns them."""
        # (B, T, D) -> (B, T, heads, d) -> (B, heads, T, d)
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if position_embeddings is not None:
            query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            None,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        # (B, T, heads, d) -> (B, T, D)
        return self.o_proj(output.flatten(2)), weights


class CroprViTMLP(nn.Module):
    """Two linear layers with an activation, and an optional norm, between."""

    def __init__(self, config: CroprViTConfig):
        super().__init__()
        self.activation = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.norm = _inner_norm(config)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)"""
        return self.fc2(self.norm(self.activation(self.fc1(hidden_states))))


class CroprViTGatedMLP(nn.Module):
    """Gated linear unit (SwiGLU with the activation `silu`), with an optional norm before the last layer."""

    def __init__(self, config: CroprViTConfig):
        super().__init__()
        self.activation = ACT2FN[config.hidden_act]
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.norm = _inner_norm(config)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)"""
        gated = self.activation(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return self.down_proj(self.norm(gated))


def _inner_norm(config: CroprViTConfig) -> nn.Module:
    return nn.LayerNorm(config.intermediate_size, eps=config.layer_norm_eps) if config.use_mlp_norm else nn.Identity()


class CroprViTLayerScale(nn.Module):
    """A learned factor per channel on the output of a residual branch."""

    def __init__(self, config: CroprViTConfig):
        super().__init__()
        self.value = float(config.layerscale_value or 0.0)
        self.lambda1 = nn.Parameter(torch.full((config.hidden_size,), self.value))

    def init_weights(self) -> None:
        """The configured value in every channel."""
        init.constant_(self.lambda1, self.value)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)"""
        return hidden_states * self.lambda1


class CroprViTDropPath(nn.Module):
    """Stochastic depth: in training, drops the residual branch of an image with probability `rate`."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)"""
        if not self.training or self.rate == 0.0:
            return hidden_states
        kept = torch.rand(len(hidden_states), 1, 1, device=hidden_states.device) >= self.rate
        return hidden_states * kept.to(hidden_states.dtype) / (1.0 - self.rate)


class CroprViTLayer(GradientCheckpointingLayer):
    """One pre-norm block. It treats tokens alike wherever they stand, so any subset of them can pass through."""

    def __init__(self, config: CroprViTConfig, drop_path_rate: float = 0.0):
        super().__init__()
        self.window_size = config.window_size
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = CroprViTAttention(config)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CroprViTGatedMLP(config) if config.use_gated_mlp else CroprViTMLP(config)
        has_scale = config.layerscale_value is not None
        self.layer_scale1 = CroprViTLayerScale(config) if has_scale else nn.Identity()
        self.layer_scale2 = CroprViTLayerScale(config) if has_scale else nn.Identity()
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = CroprViTDropPath(drop_path_rate)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Rotation | None = None,
        window_grid: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)

        Args:
            position_embeddings: rotary positions of the tokens, or of the tokens in windows.
            window_grid: rows and columns of the T tokens if attention is to stay within windows.
        """
        residual = hidden_states
        hidden_states = self.layernorm_before(hidden_states)
        if window_grid is not None:
            hidden_states = partition_windows(hidden_states, window_grid, self.window_size)
        hidden_states, _ = self.attention(hidden_states, position_embeddings, **kwargs)
        if window_grid is not None:
            hidden_states = merge_windows(hidden_states, window_grid, self.window_size)
        hidden_states = residual + self.drop_path(self.layer_scale1(self.dropout(hidden_states)))
        residual = hidden_states
        hidden_states = self.mlp(self.layernorm_after(hidden_states))
        return residual + self.drop_path(self.layer_scale2(self.dropout(hidden_states)))


# What Transformers cannot initialise by itself. Each holds parameters directly: a module that has none is passed over.
OWN_WEIGHTS = (
    CroprViTEmbeddings,
    CroprViTLayerScale,
    Scorer,
    FoldedScorer,
    AuxiliaryClassifier,
)


class CroprViTPreTrainedModel(StrippableModel):
    """What all `CroprViT*` models share: initialisation, the pruning schedule, the sum of losses, and saving."""

    config: CroprViTConfig
    base_model_prefix = "cropr_vit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    _no_split_modules = ["CroprViTEmbeddings", "CroprViTLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": CroprViTLayer, "attentions": CroprViTAttention}
    _input_embed_layer = "patch_embeddings"
    # Fields that `from_vit` sets unless it is told otherwise.
    conversion_fields: dict[str, Any] = {}
    # The loss is a mean over the batch, not over `num_items_in_batch`, which miscounts soft and ignored targets.
    accepts_loss_kwargs = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, OWN_WEIGHTS):
            module.init_weights()

    @classmethod
    def from_vit(cls, source: str | os.PathLike | nn.Module, **kwargs: Any):
        """A prunable model from any pretrained ViT of a supported family; see `cropr_hf.conversion.convert_vit`."""
        try:
            from cropr_hf.conversion import convert_vit
        except ImportError as error:
            raise ImportError("`from_vit` needs the package itself: pip install cropr_hf") from error
        return convert_vit(cls, source, **kwargs)

    def set_pruning(self, pruning: int | Sequence[int] | None) -> None:
        """Changes how much the loaded model prunes; its weights stay.

        This is a setting of the model in memory (a curriculum changes it during training) and is not saved:
        `config.pruning_rate` and `config.pruning_schedule` are.

        Args:
            pruning: patch tokens removed per module, or patch tokens kept after each block, or `None` for the
                configured schedule.

        Raises:
            `ValueError`: when the model does not prune, the rate is impossible at `config.image_size`, or the schedule
                is impossible at any size (at the size of an image, `forward` checks it).
        """
        if self.config.token_reducer is None:
            raise ValueError(
                "The model has no token reducer; load it with `token_reducer='cropr'` and train it, or use 'random'."
            )
        runtime: int | list[int] | None = None
        if pruning is not None:
            runtime = _whole_numbers(pruning)
            largest = 0 if isinstance(runtime, int) else max(runtime, default=0)
            self.config.kept_patches(max(largest, self.config.num_patches), runtime)
        self.base_model.pruning = runtime  # type: ignore[assignment]

    @staticmethod
    def _check_fusion(config: CroprViTConfig) -> None:
        """Raises `ValueError` for what dense tasks cannot do with: patches that do not come back."""
        if config.token_reducer is not None and not config.last_layer_fusion:
            raise ValueError(
                "`last_layer_fusion` is False, but dense prediction needs every patch back; set it to True, or "
                "`token_reducer` to None."
            )

    def _sum_losses(self, main_loss: torch.Tensor, auxiliary_losses: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The loss fields of `CroprViTTaskOutput`, from the main loss and one auxiliary loss per module."""
        losses = {"loss": main_loss}
        if self.training:
            losses["main_loss"] = main_loss.detach()
        if auxiliary_losses:
            stacked = torch.stack(auxiliary_losses)
            losses["loss"] = main_loss + self.config.auxiliary_loss_weight * stacked.sum()
            losses["auxiliary_losses"] = stacked.detach()
        return losses

    def _warn_untrained(self, labels: Any | None, auxiliary_logits: tuple[torch.Tensor, ...] | None) -> None:
        """Says once, in training, that nothing trains the scorers, if that is so."""
        if not self.training or torch.compiler.is_compiling():
            return
        if labels is None and auxiliary_logits is not None:
            logger.warning_once(
                "The model is in training mode without `labels`, so that nothing trains its scorers. If the Trainer "
                "computes the loss (`label_smoothing_factor`, `compute_loss_func`), leave that to the model: "
                "`config.label_smoothing`."
            )
        learned = has_auxiliary_heads(self.config.token_reducer) and not self.config.use_auxiliary_heads
        if labels is not None and learned:
            logger.warning_once(
                "The model prunes tokens but trains without auxiliary heads, so that its scorers stay as they are. "
                "Load it with `use_auxiliary_heads=True` to train them."
            )


def _whole_numbers(pruning: Any) -> int | list[int]:
    """A rate or schedule as plain integers; also takes those of NumPy."""
    try:
        if isinstance(pruning, (bool, str)):
            raise TypeError
        return [index(kept) for kept in pruning] if isinstance(pruning, Iterable) else index(pruning)
    except TypeError as error:
        raise ValueError(
            f"Pruning is {pruning!r}; give patch tokens removed per module, or a list of patch tokens kept after each "
            "block, as whole numbers."
        ) from error


class CroprViTModel(CroprViTPreTrainedModel):
    """The backbone: embeddings, blocks with token reducers between them, final norm and pooling."""

    def __init__(self, config: CroprViTConfig):
        super().__init__(config)
        self.embeddings = CroprViTEmbeddings(config)
        self.rotary_embedding = CroprViTRotaryEmbedding(config) if config.rope_theta is not None else None
        self.token_reducers = build_token_reducers(config)
        num_blocks = config.num_hidden_layers
        drop_path_rates = [config.drop_path_rate * index / max(num_blocks - 1, 1) for index in range(num_blocks)]
        if self.token_reducers:
            drop_path_rates[-1] = 0.0
        self.layers = nn.ModuleList([CroprViTLayer(config, rate) for rate in drop_path_rates])
        self.layernorm: nn.Module = nn.Identity()
        if config.use_final_norm:
            self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pruning: int | list[int] | None = None  # see `set_pruning`
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        output_pruning: bool = False,
        output_stages: Sequence[int] = (),
        **kwargs: Any,
    ) -> CroprViTModelOutput:
        """
        Args:
            pixel_values: (B, channels, height, width), height and width multiples of the patch size.
            pixel_mask: (B, height, width), 0 for padding; only `config.prune_padding_first` heeds it.
            output_pruning: also return `pruned_after_block`.
            output_stages: also return `stage_states` after these blocks (1 to L; 0 is before the first), in ascending
                order.
            kwargs: `output_hidden_states`, `output_attentions`, and what the attention implementation takes.

        Raises:
            `ValueError`: wrong channels or size, an image with too few patches for the schedule, or stages that the
                model has not.
        """
        if not {*output_stages} <= {*range(len(self.layers) + 1)}:
            raise ValueError(f"`output_stages` is {output_stages}; stages are 0 to {len(self.layers)}.")
        state, grid_size, window_table = self.embed(pixel_values, pixel_mask)
        state = replace(state, keeps_pruned_states=state.keeps_pruned_states or bool(output_stages))
        stage_states = [state.hidden_states] if 0 in output_stages else []
        kept_patches = self.config.kept_patches(state.num_patches, self.pruning)
        num_blocks, auxiliary_logits, pruned_after_block = len(self.layers), [], None
        for block, (layer, num_keep) in enumerate(zip(self.layers, kept_patches), start=1):
            if block == num_blocks:
                pruned_after_block = state.pruning_map(num_blocks) if output_pruning else None
                state = state.fuse() if self.config.last_layer_fusion else state
            window_grid = self.config.window_grid(block, state.num_patches, grid_size)
            positions = state.rotations.get("image")
            if window_grid is not None and window_table is not None:
                positions = self.window_positions(state, window_grid, window_table)
            state = replace(state, hidden_states=layer(state.hidden_states, positions, window_grid, **kwargs))
            if block in output_stages:
                stage_states.append(state.fuse().hidden_states)
            if str(block) in self.token_reducers:
                state, logits = self.token_reducers[str(block)](state, num_keep)
                auxiliary_logits += [] if logits is None else [logits]
        hidden_states, pooled = self.pool(state.hidden_states)
        return CroprViTModelOutput(
            last_hidden_state=hidden_states,
            pooler_output=pooled,
            pruned_after_block=pruned_after_block,
            auxiliary_logits=tuple(auxiliary_logits) or None,
            stage_states=tuple(stage_states) or None,
        )

    def embed(
        self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None = None
    ) -> tuple[TokenState, tuple[int, int], Rotation | None]:
        """The state before the first block, rows and columns of its patches, and the rotary positions of a window.

        See `forward`. The latter are (1, window size ** 2, d / 2).
        """
        hidden_states, grid_size = self.embeddings(pixel_values)
        size, prefix = self.config.window_size, self.config.num_prefix_tokens
        rotary_tables, window_table, padding = {}, None, None
        if self.rotary_embedding is not None:
            rotary_tables["image"] = self.rotary_embedding(grid_size, hidden_states.dtype, hidden_states.device)
            if size:
                window_table = self.rotary_embedding((size, size), hidden_states.dtype, hidden_states.device)
            if window_table is not None and self.config.window_rope_mode == "origin":
                rows, columns = (torch.arange(length, device=hidden_states.device) % size for length in grid_size)
                places = (rows[:, None] * size + columns).flatten()  # of each patch within its window
                rotary_tables["window"] = (window_table[0][:, places], window_table[1][:, places])
        if self.config.prune_padding_first and pixel_mask is not None:
            if pixel_mask.shape != (len(pixel_values), *pixel_values.shape[2:]):
                raise ValueError(
                    f"`pixel_mask` has the shape {tuple(pixel_mask.shape)}; it must be that of the images, "
                    f"{(len(pixel_values), *pixel_values.shape[2:])}."
                )
            inside = F.max_pool2d(pixel_mask[:, None].float(), self.config.patch_size)
            padding = F.pad(inside.flatten(1), (prefix, 0), value=1.0) == 0
        state = TokenState(
            hidden_states,
            token_indices=torch.arange(hidden_states.shape[1], device=hidden_states.device)[None],
            rotary_tables=rotary_tables,
            padding=padding,
            num_prefix_tokens=prefix,
            grid_size=grid_size,
            keeps_pruned_states=self.config.last_layer_fusion,
        )
        return state, grid_size, window_table

    def window_positions(self, state: TokenState, window_grid: tuple[int, int], window_table: Rotation) -> Rotation:
        """Rotary positions for a windowed block: (1 or B * windows, window size ** 2, d / 2); see `config`."""
        size, mode = self.config.window_size, self.config.window_rope_mode
        if mode == "slot" or not state.pruned:  # the same in every window
            return window_table
        cos, sin = state.rotations["image" if mode == "global" else "window"]
        images = state.hidden_states.shape[0]
        return (
            partition_windows(cos.expand(images, -1, -1), window_grid, size),
            partition_windows(sin.expand(images, -1, -1), window_grid, size),
        )

    def patches(self, outputs: CroprViTModelOutput) -> torch.Tensor:
        """The patch tokens of an output, after the final norm if there is one: (B, patches, D)."""
        patches = outputs.last_hidden_state[:, self.config.num_prefix_tokens :]  # type: ignore[index]
        return patches if self.config.norm_before_pooling else self.layernorm(patches)

    def pool(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, T, D) -> tokens (B, T, D), normalised if the config says so, and the pooled vector."""
        config = self.config
        if config.norm_before_pooling:
            hidden_states = self.layernorm(hidden_states)
        pooled = [hidden_states[:, 0]] if "cls" in config.pooling else []
        if "mean" in config.pooling:
            first = 0 if config.pooling == "mean" else config.num_prefix_tokens
            pooled.append(hidden_states[:, first:].mean(dim=1))
        pooler_output = torch.cat(pooled, dim=-1)
        return hidden_states, pooler_output if config.norm_before_pooling else self.layernorm(pooler_output)


@dataclass
class CroprViTBackboneOutput(BackboneOutput):
    """Output of `CroprViTBackbone`.

    Attributes:
        feature_maps: (B, D, rows, columns) for each of `out_features`; with `reshape_hidden_states=False`
            (B, 1 + rows * columns, D), CLS token first.
        auxiliary_losses: (modules,), in training with auxiliary heads and labels. No task loss contains them: add
            `config.auxiliary_loss_weight` times their sum.
        hidden_states, attentions: see `CroprViTModelOutput`.
    """

    auxiliary_losses: torch.Tensor | None = None


class CroprViTBackbone(BackboneMixin, CroprViTPreTrainedModel):
    """Feature maps for dense-prediction models. A pruned patch shows the state in which it was pruned.

    Inside another model `cropr_hf.training.train_routers` brings it labels, and its auxiliary losses to the loss.

    Raises:
        `ValueError`: when sequences with a CLS token are wanted from a model that has none.
    """

    def __init__(self, config: CroprViTConfig):
        super().__init__(config)
        if not config.reshape_hidden_states and not config.use_cls_token:
            raise ValueError("`reshape_hidden_states=False` returns a CLS token; set `use_cls_token=True`.")
        self.cropr_vit = CroprViTModel(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The patch projection."""
        return self.cropr_vit.get_input_embeddings()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> CroprViTBackboneOutput:
        """
        Args:
            pixel_values: (B, channels, height, width), height and width multiples of the patch size.
            labels: presence of each class in each image, (B, C) in [0, 1], for the auxiliary losses.

        Returns:
            `feature_maps`, after the final norm if `config.apply_layernorm`; see `CroprViTBackboneOutput`.

        Raises:
            `ValueError`: labels of the wrong shape or out of range, and as `CroprViTModel.forward`.
        """
        stages = [index for index, name in enumerate(self.stage_names) if name in self.out_features]
        outputs = self.cropr_vit(pixel_values, output_stages=stages, **kwargs)
        patch_size = self.config.patch_size
        grid_size = (pixel_values.shape[2] // patch_size, pixel_values.shape[3] // patch_size)
        feature_maps = []
        for states in outputs.stage_states or ():
            patches = states[:, self.config.num_prefix_tokens :]
            if not self.config.reshape_hidden_states:
                patches = torch.cat([states[:, :1], patches], dim=1)
            if self.config.apply_layernorm:
                patches = self.cropr_vit.layernorm(patches)
            if self.config.reshape_hidden_states:
                # (B, rows * columns, D) -> (B, D, rows * columns) -> (B, D, rows, columns)
                patches = patches.transpose(1, 2).unflatten(2, grid_size).contiguous()
            feature_maps.append(patches)
        # A model around this one that records as well makes Transformers record what each block returns twice.
        recorded = outputs.attentions or (outputs.hidden_states or ())[1:]
        copies = max(len(recorded) // self.config.num_hidden_layers, 1)
        return CroprViTBackboneOutput(
            feature_maps=tuple(feature_maps),  # type: ignore[arg-type]
            hidden_states=outputs.hidden_states and outputs.hidden_states[::copies],
            attentions=outputs.attentions and outputs.attentions[::copies],
            auxiliary_losses=self._auxiliary_losses(outputs.auxiliary_logits, labels, pixel_values.shape[0]),
        )

    def _auxiliary_losses(
        self, auxiliary_logits: tuple[torch.Tensor, ...] | None, labels: torch.Tensor | None, batch_size: int
    ) -> torch.Tensor | None:
        """Mean binary cross-entropy of each module, (modules,); `None` without labels or auxiliary heads."""
        if labels is not None:
            labels = labels.float()
            check_class_shares(labels, batch_size, self.config.num_labels or 0)
        if labels is not None and auxiliary_logits is not None:
            return torch.stack([presence_loss(logits, labels) for logits in auxiliary_logits])
        if self.training and has_auxiliary_heads(self.config.token_reducer) and not torch.compiler.is_compiling():
            logger.warning_once(
                "The backbone prunes tokens in training, but nothing trains its scorers. Call "
                "`cropr_hf.training.train_routers` on the model around it, and give that its labels."
            )
        return None


class CroprViTForImageClassification(CroprViTPreTrainedModel):
    """Linear classifier on the pooled tokens; in training each Cropr module classifies the image as well."""

    def __init__(self, config: CroprViTConfig):
        super().__init__(config)
        self.num_labels: int = config.num_labels or 0
        self.cropr_vit = CroprViTModel(config)
        pooled_size = config.hidden_size * (2 if config.pooling == "cls_patch_mean" else 1)
        self.classifier = nn.Linear(pooled_size, self.num_labels) if self.num_labels else nn.Identity()
        self.post_init()

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
            pixel_values: (B, channels, height, width), height and width multiples of the patch size.
            labels: class indices (B,) in [0, C), -100 is ignored; or soft targets (B, C) that sum to 1 (mixup); with
                `config.problem_type` "multi_label_classification", presence (B, C) in [0, 1].
            output_pruning: also return `pruned_after_block`.

        Raises:
            `ValueError`: labels of the wrong shape or out of range, and as `CroprViTModel.forward`.
        """
        outputs = self.cropr_vit(pixel_values, output_pruning=output_pruning, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        self._warn_untrained(labels, outputs.auxiliary_logits)
        losses: dict[str, torch.Tensor] = {}
        if labels is not None:
            self._check_labels(labels, batch_size=len(logits))
            auxiliary_logits = outputs.auxiliary_logits or ()
            losses = self._sum_losses(
                self.classification_loss(logits, labels),
                [self.classification_loss(auxiliary, labels) for auxiliary in auxiliary_logits],
            )
        return CroprViTTaskOutput(
            **losses,
            logits=logits,
            pruned_after_block=outputs.pruned_after_block,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def classification_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean loss of logits (B, C), or (B, N, C) from N queries that all predict the labels of the image."""
        if logits.dim() == 3:
            labels = labels.repeat_interleave(logits.shape[1], dim=0)
            logits = logits.flatten(0, 1)
        if self.config.problem_type == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits.float(), labels.float())
        labels = labels.float() if labels.is_floating_point() else labels.long()
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.config.label_smoothing)

    def _check_labels(self, labels: torch.Tensor, batch_size: int) -> None:
        if torch.compiler.is_compiling():
            return  # a data-dependent check would break the graph
        multi_label = self.config.problem_type == "multi_label_classification"
        if self.num_labels < 2 and not multi_label:
            raise ValueError(
                f"The loss over {self.num_labels} class is always 0; set `num_labels` to 2 or more, or `problem_type` "
                "to 'multi_label_classification'."
            )
        if labels.is_floating_point() or multi_label:
            check_class_shares(labels, batch_size, self.num_labels)
        elif labels.shape != (batch_size,):
            raise ValueError(f"`labels` have the shape {tuple(labels.shape)}; it must be ({batch_size},).")
        elif ((labels >= self.num_labels) | ((labels < 0) & (labels != -100))).any():
            raise ValueError(
                f"`labels` are between {labels.min().item()} and {labels.max().item()}; they must be in "
                f"[0, {self.num_labels - 1}], or -100 to be ignored. Set `num_labels` to the number of classes."
            )


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

    conversion_fields = {"num_queries": None}

    def __init__(self, config: CroprViTConfig):
        super().__init__(config)
        self._check_config(config)
        self.num_labels: int = config.num_labels or 0
        self.cropr_vit = CroprViTModel(config)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

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
        if getattr(config, "problem_type", None) == "multi_label_classification":
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
        # (B, rows * columns, C) -> (B, C, rows * columns) -> (B, C, rows, columns)
        logits = patch_logits = self.classifier(patches).transpose(1, 2).unflatten(2, grid_size)
        if pixel_values.shape[2:] != (height, width):
            logits = upsample(patch_logits, pixel_values.shape[-2:])[..., :height, :width]
        self._warn_untrained(labels, outputs.auxiliary_logits)
        losses: dict[str, torch.Tensor] = {}
        if labels is not None:
            self._check_labels(labels, batch_size=len(logits))
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
            losses = self._sum_losses(main_loss, auxiliary_losses)
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

    def _check_labels(self, labels: torch.Tensor, batch_size: int) -> None:
        if torch.compiler.is_compiling():
            return  # a data-dependent check would break the graph
        if self.num_labels < 2:
            raise ValueError("The loss over 1 class is always 0; set `num_labels` to 2 or more.")
        if labels.dim() != 3 or len(labels) != batch_size or labels.is_floating_point() or not labels.numel():
            raise ValueError(
                f"`labels` are {labels.dtype} of the shape {tuple(labels.shape)}; they must be whole numbers of the "
                f"shape ({batch_size}, height, width)."
            )
        ignored = self.config.semantic_loss_ignore_index
        if ((labels != ignored) & ((labels < 0) | (labels >= self.num_labels))).any():
            raise ValueError(
                f"`labels` are between {labels.min().item()} and {labels.max().item()}; they must be in "
                f"[0, {self.num_labels - 1}], or {ignored} to be ignored. Set `num_labels` to the number of classes, "
                "or reduce the labels (`do_reduce_labels` of the image processor) if 0 means none."
            )


def presence_loss(logits: torch.Tensor, presence: torch.Tensor) -> torch.Tensor:
    """Mean binary cross-entropy of logits (B, N, C), whose N queries all predict which classes (B, C) are present."""
    return F.binary_cross_entropy_with_logits(logits.float(), presence[:, None].expand_as(logits))


def check_class_shares(labels: torch.Tensor, batch_size: int, num_labels: int) -> None:
    """Raises `ValueError` unless soft targets, or the presence of classes, are (B, C) in [0, 1]."""
    if torch.compiler.is_compiling():
        return  # a data-dependent check would break the graph
    if not num_labels or labels.shape != (batch_size, num_labels):
        raise ValueError(
            f"`labels` have the shape {tuple(labels.shape)}; it must be (batch size, classes) = ({batch_size}, "
            f"{num_labels}) with soft targets, or the presence of several classes. Set `num_labels` to their number."
        )
    if labels.min() < 0 or labels.max() > 1:
        raise ValueError(
            f"`labels` are between {labels.min().item()} and {labels.max().item()}; soft targets, or the presence of "
            "several classes, must be in [0, 1]."
        )


def class_presence(labels: Sequence[torch.Tensor], num_labels: int) -> torch.Tensor:
    """Which classes each image shows, (B, C), 0 or 1, from the class indices (n,) in each image."""
    counts = torch.tensor([len(image) for image in labels], device=labels[0].device)
    rows = torch.arange(len(labels), device=counts.device).repeat_interleave(counts)
    presence = torch.zeros(len(labels), num_labels, device=counts.device)
    presence[rows, torch.cat(list(labels)).long()] = 1.0
    return presence


def pad_to_patches(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Zeros at the bottom and on the right of images (..., height, width), up to whole patches."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % patch_size, 0, -height % patch_size))


def upsample(logits: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Bilinear interpolation of maps (B, C, rows, columns) to `size` (height, width), in float32."""
    return F.interpolate(logits.float(), size=tuple(size), mode="bilinear", align_corners=False)


__all__ = [
    "CroprViTBackbone",
    "CroprViTForImageClassification",
    "CroprViTForSemanticSegmentation",
    "CroprViTModel",
    "CroprViTPreTrainedModel",
]
