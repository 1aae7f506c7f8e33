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
"""The parts of the plain vision transformer: embeddings, rotary positions, windows, attention, MLP, block, pooling.

Symbols: B images, T tokens now, D hidden size, d head size.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_cropr_vit import CroprViTConfig
from .joint_weights import SharedInput
from .token_reduction import AttentionFacts, OwnWeights, check_attention
from .token_state import Rotation, TokenState, resample_grid


class CroprViTEmbeddings(OwnWeights):
    """Patches, absolute positions, CLS and register tokens."""

    def __init__(self, config: CroprViTConfig):
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.patch_embeddings = nn.Conv2d(
            config.num_channels,
            size,
            kernel_size=config.patch_size,
            stride=config.patch_size,
            bias=config.patch_bias,
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
        self.layernorm = nn.LayerNorm(size, eps=config.layer_norm_eps) if config.use_embedding_norm else None

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
        """Raises `ValueError` for raw pixels, and for what is not a batch of images."""
        if not isinstance(pixel_values, torch.Tensor):
            raise ValueError(
                f"`pixel_values` is a {type(pixel_values).__name__}; give a tensor, which image processors return "
                'with `return_tensors="pt"`.'
            )
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"`pixel_values` are {pixel_values.dtype}; give normalised floating-point values, as image processors "
                "return them."
            )
        if pixel_values.dim() != 4 or 0 in pixel_values.shape:
            raise ValueError(
                f"`pixel_values` has the shape {tuple(pixel_values.shape)}; it must be (batch, channels, height, "
                "width), with one image or more, and none of them empty."
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
        if height % patch_size or width % patch_size:
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
        tokens = self.dropout(tokens)
        return tokens if self.layernorm is None else self.layernorm(tokens), grid_size


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
            return (places + self.config.rope_offset) / length * self.config.rope_reference_grid
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


def pad_to_patches(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Zeros at the bottom and on the right of images (..., height, width), up to whole patches."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % patch_size, 0, -height % patch_size))


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


Adapt = Callable[[torch.Tensor, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]


class CroprViTAttention(SharedInput):
    """Self-attention through the attention interface of Transformers (sdpa, eager, flash, flex)."""

    def __init__(self, config: CroprViTConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.is_causal, self.num_key_value_groups = False, 1  # what attention functions ask for
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.query_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.key_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.value_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.proj_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Rotation | None = None,
        key_bias: torch.Tensor | None = None,
        window_grid: tuple[int, int] | None = None,
        output_facts: bool = False,
        adapt: Adapt | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """(B, T, D) -> (B, T, D), the weights if the implementation returns them, and with `output_facts` these.

        Args:
            position_embeddings: rotary positions of the tokens, or of the patch tokens in windows.
            key_bias: (B, T), added to the logits of each token as a key.
            window_grid: rows and columns of the patch tokens if their attention is to stay within windows. They attend
                to the prefix tokens as well, and these to all: they gather what is in the windows, and spread it.
            adapt: see `heads`.
        """
        prefix = None
        if window_grid is not None:
            num_prefix = self.config.num_prefix_tokens
            prefix = hidden_states[:, :num_prefix] if num_prefix else None
            hidden_states = partition_windows(hidden_states[:, num_prefix:], window_grid, self.config.window_size)
        query, key, value = self.heads(hidden_states, adapt)
        content_key = key
        if position_embeddings is not None:
            query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        mask = None if key_bias is None else self._mask(key_bias, query)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        kwargs |= {"dropout": self.attention_dropout if self.training else 0.0, "scaling": self.scaling}
        if prefix is not None and window_grid is not None:
            attend = partial(attention_interface, self, **kwargs)
            output, weights = self.attend_with_prefix(attend, prefix, (query, key, value), window_grid)
        else:
            output, weights = attention_interface(self, query, key, value, mask, **kwargs)
            output = output.flatten(2)  # (B, T, heads, d) -> (B, T, D)
            if window_grid is not None:
                output = merge_windows(output, window_grid, self.config.window_size)
        projected = self.o_proj(output)
        if not output_facts:
            return projected, weights
        contexts = output.unflatten(2, (-1, self.head_dim))  # (B, T, D) -> (B, T, heads, d)
        return projected, weights, AttentionFacts(query, key, content_key, self.scaling, key_bias, contexts)

    def attend_with_prefix(
        self,
        attend: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
        prefix: torch.Tensor,
        windows: tuple[torch.Tensor, ...],
        window_grid: tuple[int, int],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Prefix tokens (B, P, D) attend to all tokens, windows to themselves and the prefix; (B, P + patches, D).

        Args:
            windows: queries, keys and values of the patch tokens, (B * W, heads, window size ** 2, d) each.
        """
        prefix_query, prefix_key, prefix_value = self.heads(prefix)
        query, *keys_and_values = windows
        down, across = (-(-length // self.config.window_size) for length in window_grid)
        in_windows, of_all = [], []
        for of_prefix, of_windows in zip((prefix_key, prefix_value), keys_and_values):
            # (B, heads, P, d) -> (B * W, heads, P, d)
            repeated = of_prefix[:, None].expand(-1, down * across, -1, -1, -1).flatten(0, 1)
            in_windows.append(torch.cat([repeated, of_windows], dim=2))
            # (B * W, heads, w * w, d) -> (B * W, w * w, D) -> (B, patches, D), what fills the grid up left out
            merged = merge_windows(of_windows.transpose(1, 2).flatten(2), window_grid, self.config.window_size)
            merged = merged.unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            of_all.append(torch.cat([of_prefix, merged], dim=2))
        gathered, _ = attend(prefix_query, *of_all, None)
        output, weights = attend(query, *in_windows, None)
        output = merge_windows(output.flatten(2), window_grid, self.config.window_size)
        return torch.cat([gathered.flatten(2), output], dim=1), weights

    def heads(self, hidden_states: torch.Tensor, adapt: Adapt | None = None) -> tuple[torch.Tensor, ...]:
        """(B, T, D) -> queries, keys and values, (B, heads, T, d) each, which `adapt` may change."""
        heads = self.project(hidden_states, self.head_dim, self.q_proj, self.k_proj, self.v_proj)
        return heads if adapt is None else adapt(hidden_states, heads)

    def queries_and_keys(
        self, hidden_states: torch.Tensor, position_embeddings: Rotation | None = None
    ) -> tuple[torch.Tensor, ...]:
        """(B, T, D) -> (B, heads, T, d) each, rotated; for methods that choose before the attention."""
        both = (
            layer(hidden_states).view(*hidden_states.shape[:2], -1, self.head_dim).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj)
        )
        return tuple(each if position_embeddings is None else rotate(each, *position_embeddings) for each in both)

    def _mask(self, key_bias: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """A bias of keys as an attention mask, (B, 1, T, T), of which one row is stored."""
        check_attention(self.config._attn_implementation, biased_by=self.config.token_reducer)
        return key_bias[:, None, None].to(query.dtype).expand(-1, -1, query.shape[2], -1)


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
        hidden_states = self.activation(self.fc1(hidden_states))
        return self.fc2(hidden_states if self.norm is None else self.norm(hidden_states))


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
        hidden_states = self.activation(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return self.down_proj(hidden_states if self.norm is None else self.norm(hidden_states))


def _inner_norm(config: CroprViTConfig) -> nn.Module | None:
    return nn.LayerNorm(config.intermediate_size, eps=config.layer_norm_eps) if config.use_mlp_norm else None


class CroprViTLayerScale(OwnWeights):
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
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = CroprViTAttention(config)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CroprViTGatedMLP(config) if config.use_gated_mlp else CroprViTMLP(config)
        has_scale = config.layerscale_value is not None
        self.layer_scale1 = CroprViTLayerScale(config) if has_scale else None
        self.layer_scale2 = CroprViTLayerScale(config) if has_scale else None
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = CroprViTDropPath(drop_path_rate)

    def checkpoint_input(self, hidden_states: torch.Tensor, method: str | None = None) -> torch.Tensor:
        """The hidden states, as a leaf that requires a gradient where a checkpoint needs one that nothing before does.

        A reentrant checkpoint computes gradients inside of it only if an input requires one: without this, adapters,
        and blocks behind a frozen part, would learn nothing.

        Args:
            method: the token reducer that acts inside of the block.

        Raises:
            `ValueError`: when it does so inside of a reentrant checkpoint, which knows no gradient of the rest of a
                `TokenState`: of losses, of columns, and of tokens that were set aside.
        """
        is_checkpoint = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if not is_checkpoint:
            return hidden_states
        if method is not None and getattr(self._gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                f"`use_reentrant` is True, but the token reducer {method!r} acts within blocks, where reentrant "
                "checkpoints lose gradients; leave it out, as its default is False."
            )
        if hidden_states.requires_grad or torch.compiler.is_compiling():
            return hidden_states
        if not any(parameter.requires_grad for parameter in self.parameters()):
            return hidden_states
        return hidden_states.detach().requires_grad_()

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Rotation | None = None,
        window_grid: tuple[int, int] | None = None,
        key_bias: torch.Tensor | None = None,
        reduce: Callable[[torch.Tensor, AttentionFacts], TokenState] | None = None,
        adapt: Adapt | None = None,
        choose: Callable[[torch.Tensor, nn.Module], TokenState] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, TokenState]:
        """(B, T, D) -> (B, T, D); with `reduce` (B, K, D), and the state that it returned; with `choose` also the
        state after the block.

        Args:
            position_embeddings, window_grid, key_bias: see `CroprViTAttention`.
            reduce: of a method that acts inside, or reads the attention, called between attention and MLP.
            adapt: of such a method, called with the input of the attention, and with queries, keys and values.
            choose: of a method that lets tokens idle, called with the tokens and this block, before anything is done.
        """
        state = None
        if choose is not None:
            state = choose(hidden_states, self)
            hidden_states, position_embeddings = state.hidden_states, state.rotations.get("image")
            key_bias = state.key_bias
        residual = hidden_states
        hidden_states = self.layernorm_before(hidden_states)
        hidden_states, _, *facts = self.attention(
            hidden_states,
            position_embeddings,
            key_bias,
            window_grid,
            output_facts=reduce is not None,
            adapt=adapt,
            **kwargs,
        )
        residual = hidden_states = self.add(residual, hidden_states, self.layer_scale1)
        if reduce is not None:
            state = reduce(hidden_states, *facts)
            residual = hidden_states = state.hidden_states
        hidden_states = self.mlp(self.layernorm_after(hidden_states))
        hidden_states = self.add(residual, hidden_states, self.layer_scale2)
        if choose is not None:
            state = state.updated(hidden_states=hidden_states).unpark()  # type: ignore[union-attr]
            hidden_states = state.hidden_states
        return hidden_states if state is None else (hidden_states, state)

    def add(
        self, residual: torch.Tensor, branch: torch.Tensor, layer_scale: CroprViTLayerScale | None
    ) -> torch.Tensor:
        """The sum (B, T, D) of the residual stream and a branch, scaled and in training dropped out."""
        # What does nothing is not called: for one image such calls are a measurable share of the time.
        if self.training:
            branch = self.dropout(branch)
        if layer_scale is not None:
            branch = layer_scale(branch)
        return residual + (self.drop_path(branch) if self.training else branch)


class CroprViTAttentionPooling(OwnWeights):
    """Pooling by attention: a learned probe attends to the tokens, and what it finds passes through an MLP."""

    def __init__(self, config: CroprViTConfig):
        super().__init__()
        self.config = config
        size, inner_size = config.hidden_size, config.pooling_intermediate_size or config.intermediate_size
        self.num_heads = config.pooling_num_heads or config.num_attention_heads
        self.probe = nn.Parameter(torch.zeros(1, 1, size))
        self.q_proj = nn.Linear(size, size)
        self.k_proj = nn.Linear(size, size)
        self.v_proj = nn.Linear(size, size)
        self.o_proj = nn.Linear(size, size)
        self.layernorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.activation = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(size, inner_size)
        self.fc2 = nn.Linear(inner_size, size)

    def init_weights(self) -> None:
        """The probe: truncated normal."""
        init.trunc_normal_(self.probe, mean=0.0, std=self.config.initializer_range)

    def forward(self, hidden_states: torch.Tensor, sizes: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens (B, T, D) -> (B, D).

        Args:
            sizes: (B, T), see `TokenState`. Their logarithm is added to the logits: s equal tokens and one of size s
                give the same.
        """
        # (B, T, D) -> (B, T, heads, d) -> (B, heads, T, d)
        query, key, value = (
            projected.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for projected in (self.q_proj(self.probe), self.k_proj(hidden_states), self.v_proj(hidden_states))
        )
        mask = None if sizes is None else sizes.log()[:, None, None].to(query.dtype)
        pooled = F.scaled_dot_product_attention(query.expand(key.shape[0], -1, -1, -1), key, value, attn_mask=mask)
        # (B, heads, 1, d) -> (B, D)
        pooled = self.o_proj(pooled.flatten(1))
        return pooled + self.fc2(self.activation(self.fc1(self.layernorm(pooled))))
