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

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput, ModelOutput
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_cropr_vit import CroprViTConfig
from .labels import IGNORED_LABEL, check_class_shares, check_image_labels, presence_loss
from .reducers import CroprModule  # noqa: F401 (the file registers the methods that travel with a model)
from .saving import StrippableModel
from .token_reduction import (
    AttentionFacts,
    OwnWeights,
    TokenReducer,
    build_token_reducers,
    check_attention,
    check_exits,
    find_token_reducer,
    has_auxiliary_heads,
)
from .token_schedule import kept_patches
from .token_state import Rotation, TokenState
from .vit_layers import (
    CroprViTAttention,
    CroprViTAttentionPooling,
    CroprViTEmbeddings,
    CroprViTLayer,
    CroprViTRotaryEmbedding,
    partition_windows,
)


logger = logging.get_logger(__name__)


@dataclass
class CroprViTModelOutput(ModelOutput):
    """Output of `CroprViTModel`.

    Attributes:
        last_hidden_state: (B, T, D), prefix tokens, then the patch tokens that are left, in raster order (all of them
            with last layer fusion); after the final norm if `config.norm_before_pooling`.
        pooler_output: (B, D), (B, 2 D) with `cls_patch_mean`, or (B, `config.projection_dim`); pooled, normalised and
            projected. `None` in models of dense tasks.
        pruned_after_block: (B, patches), with `output_pruning=True`: the block (1 to L) after which each patch was
            pruned, or in which it was merged into another; L if neither was the case before the last block.
        token_indices: (B or 1, T), with `output_pruning=True` or `exit_logits`: place of each token of
            `last_hidden_state` in the unpruned sequence, prefix tokens first. Tokens that have none (new ones; those
            that a method masks in training) have the first index that no place has.
        patches_per_block: (B, L), with `output_pruning=True`: how many patches of each image each block worked on.
        patches_kept: (B, L), with `output_pruning=True`: how many were left after each block, as schedules count them.
        auxiliary_logits: one (B, N, C) per module, in training with auxiliary heads; of patches first. Embeddings
            (B, N, `config.embedding_size`) with the auxiliary task "embedding".
        auxiliary_patches: (n,), the patches that these are of in this step, if `config.patch_queries_per_step` draws.
        exit_logits: one (B, patches, C) per module of a method by which patches leave with their class (`TokenState`).
        method_losses: further losses of the method, by name, in training.
        stage_states: one (B, prefix + patches, D) for each of `output_stages`: a pruned patch, which is at its place
            there, has the state in which it was pruned.
        hidden_states: L + 1 tensors (B, tokens there, D): shorter where tokens were pruned.
        attentions: L tensors (B, heads, tokens there, tokens there), with eager attention; of windowed blocks
            (B * windows, heads, window size ** 2, prefix tokens + window size ** 2).
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    pruned_after_block: torch.Tensor | None = None
    token_indices: torch.Tensor | None = None
    patches_per_block: torch.Tensor | None = None
    patches_kept: torch.Tensor | None = None
    auxiliary_logits: tuple[torch.Tensor, ...] | None = None
    auxiliary_patches: torch.Tensor | None = None
    exit_logits: tuple[torch.Tensor, ...] | None = None
    method_losses: dict[str, torch.Tensor] | None = None
    stage_states: tuple[torch.Tensor, ...] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class CroprViTTaskOutput(ModelOutput):
    """Output of the task classes; what belongs to training alone is `None` in evaluation.

    Attributes:
        loss: main loss + `config.auxiliary_loss_weight` * sum of the auxiliary losses + sum of the method's own
            losses, with labels.
        logits: (B, C) of images, (B, C, rows, columns) of label maps (see `CroprViTForSemanticSegmentation`).
        main_loss: loss of `logits`, detached, in training.
        auxiliary_losses: (modules,), detached, in training with auxiliary heads.
        method_losses: further losses of the method, by name, detached, in training.
        pruned_after_block, hidden_states, attentions: see `CroprViTModelOutput`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    main_loss: torch.Tensor | None = None
    auxiliary_losses: torch.Tensor | None = None
    method_losses: dict[str, torch.Tensor] | None = None
    pruned_after_block: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


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
    takes_exits = False  # whether the method may let patches leave with their class

    def __init__(self, config: CroprViTConfig, *args: Any, **kwargs: Any):
        check_exits(config, type(self))
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, OwnWeights):
            module.init_weights()

    # Converts a pretrained ViT. The package hands it in; code from the Hub has none.
    convert: Callable[..., Any] | None = None

    @classmethod
    def from_vit(cls, source: str | os.PathLike | nn.Module, **kwargs: Any):
        """A prunable model from any pretrained ViT of a supported family; see `cropr_hf.conversion.convert_vit`.

        Raises:
            `ImportError`: in code loaded from the Hub.
        """
        if cls.convert is None:
            raise ImportError(
                f"This {cls.__name__} was loaded with the code of its repository, which does not convert models; pip "
                f"install cropr_hf, import it, and use cropr_hf.{cls.__name__}.from_vit."
            )
        return cls.convert(cls, source, **kwargs)

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """See `PreTrainedModel.set_attn_implementation`; raises `ValueError` for one that the method cannot use."""
        method = find_token_reducer(self.config)
        if method is not None and method.uses_key_bias(self.config) and isinstance(attn_implementation, str):
            check_attention(attn_implementation, biased_by=method.name)
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

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
                "The model has no token reducer; load it with one, such as "
                f"`token_reducer={CroprViTConfig.token_reducer!r}`, and train it if the method needs that."
            )
        runtime: int | list[int] | None = None
        if pruning is not None:
            runtime = _whole_numbers(pruning)
            largest = 0 if isinstance(runtime, int) else max(runtime, default=0)
            num_patches = max(largest, self.config.num_patches)
            kept_patches(self.config, find_token_reducer(self.config), num_patches, runtime)
        self.base_model.pruning = runtime  # type: ignore[assignment]

    @staticmethod
    def _check_fusion(config: CroprViTConfig) -> None:
        """Raises `ValueError` for what dense tasks cannot do with: patches that do not come back."""
        method = find_token_reducer(config)
        if method is not None and not (config.last_layer_fusion or method.exits):
            raise ValueError(
                "`last_layer_fusion` is False, but dense prediction needs every patch back; set it to True, or "
                "`token_reducer` to None."
            )

    def _sum_losses(
        self, main_loss: torch.Tensor, auxiliary_losses: list[torch.Tensor], outputs: CroprViTModelOutput
    ) -> dict[str, Any]:
        """The loss fields of `CroprViTTaskOutput`, from the main loss, one auxiliary loss per module, and those that
        the method computed itself.
        """
        losses: dict[str, Any] = {"loss": main_loss}
        if self.training:
            losses["main_loss"] = main_loss.detach()
        if auxiliary_losses:
            stacked = torch.stack(auxiliary_losses)
            losses["loss"] = main_loss + self.config.auxiliary_loss_weight * stacked.sum()
            losses["auxiliary_losses"] = stacked.detach()
        if outputs.method_losses is not None:
            losses["loss"] = losses["loss"] + torch.stack(list(outputs.method_losses.values())).sum()
            losses["method_losses"] = {name: loss.detach() for name, loss in outputs.method_losses.items()}
        return losses

    def _warn_untrained(self, labels: Any | None, auxiliary_logits: tuple[torch.Tensor, ...] | None) -> None:
        """Says once, in training, that nothing trains the scorers, if that is so."""
        self._check_auxiliary_task(labels, auxiliary_logits)
        if not self.training or torch.compiler.is_compiling():
            return
        if labels is None and auxiliary_logits is not None:
            logger.warning_once(
                "The model is in training mode without `labels`, so that nothing trains its scorers. If the Trainer "
                "computes the loss (`label_smoothing_factor`, `compute_loss_func`), leave that to the model: "
                "`config.label_smoothing`."
            )
        if labels is not None:
            self.warn_without_heads()

    def _check_auxiliary_task(self, labels: Any | None, auxiliary_logits: tuple[torch.Tensor, ...] | None) -> None:
        """Raises `ValueError` for labels where the auxiliary heads predict embeddings."""
        if labels is not None and auxiliary_logits is not None and self.config.auxiliary_task == "embedding":
            raise ValueError(
                "`auxiliary_task` is 'embedding', which only a `CroprViTModel` learns, from a teacher; load "
                f"{type(self).__name__} with `auxiliary_task=None` to train it by labels."
            )

    def warn_without_heads(self) -> None:
        """Says once that a training leaves the scorers as they are, if the model has no heads that train them."""
        if has_auxiliary_heads(self.config.token_reducer) and not self.config.use_auxiliary_heads:
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
    """The backbone: embeddings, blocks with token reducers between them, final norm and pooling.

    Args:
        add_pooling_layer: whether it pools; models of dense tasks do not.
    """

    takes_exits = True

    def __init__(self, config: CroprViTConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = CroprViTEmbeddings(config)
        self.rotary_embedding = CroprViTRotaryEmbedding(config) if config.rope_theta is not None else None
        self.token_reducers = build_token_reducers(config)
        num_blocks = config.num_hidden_layers
        self.window_blocks = {1 + index for index in config.window_block_indices}
        drop_path_rates = [config.drop_path_rate * index / max(num_blocks - 1, 1) for index in range(num_blocks)]
        if self.token_reducers:
            drop_path_rates[-1] = 0.0
        self.layers = nn.ModuleList([CroprViTLayer(config, rate) for rate in drop_path_rates])
        self.layernorm: nn.Module = nn.Identity()
        if config.use_final_norm:
            self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.add_pooling_layer = add_pooling_layer
        self.pooler = self.visual_projection = None
        if add_pooling_layer and config.pooling == "attention":
            self.pooler = CroprViTAttentionPooling(config)
        if add_pooling_layer and config.projection_dim is not None:
            self.visual_projection = nn.Linear(config.pooled_size, config.projection_dim, bias=False)
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
            output_pruning: also return `pruned_after_block`, `token_indices` and the counts of patches.
            output_stages: also return `stage_states` after these blocks (1 to L; 0 is before the first), in ascending
                order.
            kwargs: `output_hidden_states`, `output_attentions`, and what the attention implementation takes.

        Raises:
            `ValueError`: wrong channels or size, an image with too few patches for the schedule, or stages that the
                model does not have.
        """
        num_blocks = len(self.layers)
        if not {*output_stages} <= {*range(num_blocks + 1)}:
            raise ValueError(f"`output_stages` is {output_stages}; stages are 0 to {num_blocks}.")
        state, window_table = self.embed(pixel_values, pixel_mask)
        state = state.updated(keeps_pruned_states=state.keeps_pruned_states or bool(output_stages))
        stage_states = [state.hidden_states] if 0 in output_stages else []
        method = find_token_reducer(self.config)
        kept = kept_patches(self.config, method, state.num_patches, self.pruning)
        reducers: dict[int, Any] = {int(block): module for block, module in self.token_reducers.items()}
        reducer: Any = None
        for block, num_keep in enumerate(kept, start=1):
            previous, reducer = reducer, reducers.get(block)
            fuses = block == num_blocks and bool(self.config.last_layer_fusion)
            if fuses:
                state = self.restore(state)
            if reducer is not None:
                state = reducer.before_block(state)
            acting, count = reducer, num_keep
            if method is not None and method.idles:  # a module decides about the block after its own
                acting, count = (None if fuses else previous), kept[block - 2]
            state = self.run_block(block, state, window_table, acting, count, **kwargs)
            if block in output_stages:
                stage_states.append(self.restore(state).hidden_states)
            if reducer is not None:
                state = reducer.after_block(state, num_keep)
        hidden_states, pooled = self.pool(state.hidden_states, state.sizes)
        return CroprViTModelOutput(
            last_hidden_state=hidden_states,
            pooler_output=pooled,
            pruned_after_block=state.pruning_map(num_blocks) if output_pruning else None,
            token_indices=state.token_indices if output_pruning or state.exit_logits else None,
            patches_per_block=state.patches_per_block(num_blocks, fuses) if output_pruning else None,
            patches_kept=state.patches_kept(num_blocks) if output_pruning else None,
            auxiliary_logits=tuple(state.auxiliary_logits.values()) or None,
            auxiliary_patches=state.auxiliary_patches,
            exit_logits=tuple(state.exit_logits.values()) or None,
            method_losses=state.losses or None,
            stage_states=tuple(stage_states) or None,
        )

    def restore(self, state: TokenState) -> TokenState:
        """All tokens at their places, as the method brings them back."""
        reducers: list[Any] = list(self.token_reducers.values())
        return reducers[-1].restore(state) if reducers else state

    def run_block(
        self,
        block: int,
        state: TokenState,
        window_table: Rotation | None,
        reducer: TokenReducer | None = None,
        num_keep: int = 0,
        **kwargs: Any,
    ) -> TokenState:
        """The state after block 1 to L, and after what a method does inside of it.

        `reducer` is the module of this block, or of the one before if its method lets tokens idle; `num_keep` is the
        number of its schedule.
        """
        layer: Any = self.layers[block - 1]
        window_grid, positions = None, state.rotations.get("image")
        if block in self.window_blocks:
            window_grid = self.config.window_grid(block, state.num_patches, state.grid_size)  # type: ignore[arg-type]
            if window_grid is not None and window_table is not None:
                positions = self.window_positions(state, window_grid, window_table)
        # The first argument stays the hidden states: what records outputs, and checkpointing, look for them there. The
        # key bias is one by position, since reentrant checkpoints know no gradient of others.
        idles = reducer is not None and reducer.idles and num_keep < state.num_patches
        works_inside = reducer is not None and (idles or reducer.acts_inside or reducer.reads_attention)
        acting: Any = reducer if works_inside else None
        hidden_states = layer.checkpoint_input(state.hidden_states, None if acting is None else acting.name)
        if acting is None:
            hidden_states = layer(hidden_states, positions, window_grid, state.key_bias, **kwargs)
            return state.updated(hidden_states=hidden_states)

        def choose(hidden_states: torch.Tensor, layer: nn.Module) -> TokenState:
            return acting.before_next_block(state.updated(hidden_states=hidden_states), num_keep, layer)

        def reduce(hidden_states: torch.Tensor, facts: AttentionFacts) -> TokenState:
            return acting.after_attention(state.updated(hidden_states=hidden_states), num_keep, facts)

        def adapt(hidden_states: torch.Tensor, projected: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return acting.adapt_attention(state, num_keep, hidden_states, projected)

        if idles:
            hidden_states, state_inside = layer(hidden_states, positions, choose=choose, **kwargs)
        else:
            hidden_states, state_inside = layer(
                hidden_states, positions, window_grid, state.key_bias, reduce=reduce, adapt=adapt, **kwargs
            )
        return state_inside.updated(hidden_states=hidden_states)

    def embed(
        self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None = None
    ) -> tuple[TokenState, Rotation | None]:
        """The state before the first block, and the rotary positions of a window, (1, window size ** 2, d / 2).

        See `forward`.
        """
        hidden_states, grid_size = self.embeddings(pixel_values)
        size, prefix = self.config.window_size, self.config.num_prefix_tokens
        rotary_tables, window_table, padding = {}, None, None
        if self.rotary_embedding is not None:
            rotary_tables["image"] = self.rotary_embedding(grid_size, hidden_states.dtype, hidden_states.device)
            if size:
                cos, sin = self.rotary_embedding((size, size), hidden_states.dtype, hidden_states.device)
                window_table = (cos[:, prefix:], sin[:, prefix:])
            if window_table is not None and self.config.window_rope_mode == "origin":
                rows, columns = (torch.arange(length, device=hidden_states.device) % size for length in grid_size)
                places = (rows[:, None] * size + columns).flatten()  # of each patch within its window
                places = F.pad(places, (prefix, 0))  # those of prefix tokens are not used
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
            keeps_pruned_states=bool(self.config.last_layer_fusion),
        )
        return state, window_table

    def window_positions(self, state: TokenState, window_grid: tuple[int, int], window_table: Rotation) -> Rotation:
        """Rotary positions for a windowed block: (1 or B * windows, window size ** 2, d / 2); see `config`."""
        size, mode = self.config.window_size, self.config.window_rope_mode
        if mode == "slot" or state.is_whole:  # the same in every window
            return window_table
        cos, sin = (
            table[:, state.num_prefix_tokens :] for table in state.rotations["image" if mode == "global" else "window"]
        )
        images = state.hidden_states.shape[0]
        return (
            partition_windows(cos.expand(images, -1, -1), window_grid, size),
            partition_windows(sin.expand(images, -1, -1), window_grid, size),
        )

    def patches(self, outputs: CroprViTModelOutput) -> torch.Tensor:
        """The patch tokens of an output, after the final norm if there is one: (B, patches, D)."""
        patches = outputs.last_hidden_state[:, self.config.num_prefix_tokens :]  # type: ignore[index]
        return patches if self.config.norm_before_pooling else self.layernorm(patches)

    def pool(
        self, hidden_states: torch.Tensor, sizes: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens (B, T, D) -> tokens (B, T, D), normalised if the config says so, and the pooled vector.

        Means weigh tokens by `sizes` (B, T), so that they are those over all tokens of the image; so does attention.
        """
        config = self.config
        if config.norm_before_pooling:
            hidden_states = self.layernorm(hidden_states)
        if not self.add_pooling_layer:
            return hidden_states, None
        pooled = [hidden_states[:, 0]] if "cls" in config.pooling else []
        if "mean" in config.pooling:
            first = 0 if config.pooling == "mean" else config.num_prefix_tokens
            averaged = hidden_states[:, first:]
            if sizes is None:
                pooled.append(averaged.mean(dim=1))
            else:
                weights = F.normalize(sizes[:, first:], p=1.0, dim=1)  # the mean of no patches is 0
                # (B, 1, T) x (B, T, D) -> (B, D)
                pooled.append((weights[:, None].to(averaged.dtype) @ averaged)[:, 0])
        if self.pooler is not None:
            pooled.append(self.pooler(hidden_states, sizes))
        pooler_output = torch.cat(pooled, dim=-1)
        if not config.norm_before_pooling:
            pooler_output = self.layernorm(pooler_output)
        return hidden_states, pooler_output if self.visual_projection is None else self.visual_projection(
            pooler_output
        )


class CroprViTForImageClassification(CroprViTPreTrainedModel):
    """Linear classifier on the pooled tokens; in training each Cropr module classifies the image as well.

    With `config.problem_type` "regression" it predicts numbers, and so do the modules, by the mean squared error.
    """

    def __init__(self, config: CroprViTConfig):
        super().__init__(config)
        self.num_labels: int = config.num_labels or 0
        self.cropr_vit = CroprViTModel(config)
        self.classifier = nn.Linear(config.embedding_size, self.num_labels) if self.num_labels else nn.Identity()
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
                `config.problem_type` "multi_label_classification", presence (B, C) in [0, 1]; with "regression",
                targets (B, C), or (B,) of a single one.
            output_pruning: also return `pruned_after_block`.

        Raises:
            `ValueError`: labels of the wrong shape or out of range, and as `CroprViTModel.forward`.
        """
        outputs = self.cropr_vit(pixel_values, output_pruning=output_pruning, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        self._warn_untrained(labels, outputs.auxiliary_logits)
        losses: dict[str, Any] = {}
        if labels is not None:
            check_image_labels(self.config, labels, batch_size=len(logits))
            auxiliary_logits = outputs.auxiliary_logits or ()
            losses = self._sum_losses(
                self.classification_loss(logits, labels),
                [self.classification_loss(auxiliary, labels) for auxiliary in auxiliary_logits],
                outputs,
            )
        return CroprViTTaskOutput(
            **losses,
            logits=logits,
            pruned_after_block=outputs.pruned_after_block,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def classification_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean loss of logits (B, C), or (B, N, C) from N queries that all predict the labels of the image.

        It is 0 where all labels are ignored.
        """
        if logits.dim() == 3:
            labels = labels.repeat_interleave(logits.shape[1], dim=0)
            logits = logits.flatten(0, 1)
        if self.config.problem_type == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits.float(), labels.float())
        if self.config.problem_type == "regression":
            return F.mse_loss(logits.float(), labels.float().view_as(logits))
        if labels.is_floating_point():
            return F.cross_entropy(logits.float(), labels.float(), label_smoothing=self.config.label_smoothing)
        # A mean over no label would be 0 / 0; so there is one, whose loss does not count.
        all_ignored = (labels == IGNORED_LABEL).all()
        labels = labels.long().masked_fill(all_ignored, 0)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.config.label_smoothing)
        return loss.masked_fill(all_ignored, 0.0)


@dataclass
class CroprViTBackboneOutput(BackboneOutput):
    """Output of `CroprViTBackbone`.

    Attributes:
        feature_maps: (B, D, rows, columns) for each of `out_features`; with `reshape_hidden_states=False`
            (B, 1 + rows * columns, D), CLS token first.
        auxiliary_losses: (modules,), in training with auxiliary heads and labels. No task loss contains them: add
            `config.auxiliary_loss_weight` times their sum.
        method_losses: further losses of the method, by name, in training; likewise.
        hidden_states, attentions: see `CroprViTModelOutput`.
    """

    auxiliary_losses: torch.Tensor | None = None
    method_losses: dict[str, torch.Tensor] | None = None


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
        self.cropr_vit = CroprViTModel(config, add_pooling_layer=False)
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
            method_losses=outputs.method_losses,
        )

    def _auxiliary_losses(
        self, auxiliary_logits: tuple[torch.Tensor, ...] | None, labels: torch.Tensor | None, batch_size: int
    ) -> torch.Tensor | None:
        """Mean binary cross-entropy of each module, (modules,); `None` without labels or auxiliary heads."""
        if labels is not None:
            labels = labels.float()
            check_class_shares(labels, batch_size, self.config.num_labels or 0)
            self._check_auxiliary_task(labels, auxiliary_logits)
        if labels is not None and auxiliary_logits is not None:
            return torch.stack([presence_loss(logits, labels) for logits in auxiliary_logits])
        if self.training and has_auxiliary_heads(self.config.token_reducer) and not torch.compiler.is_compiling():
            logger.warning_once(
                "The backbone prunes tokens in training, but nothing trains its scorers. Call "
                "`cropr_hf.training.train_routers` on the model around it, and give that its labels."
            )
        return None


__all__ = ["CroprViTBackbone", "CroprViTForImageClassification", "CroprViTModel", "CroprViTPreTrainedModel"]
