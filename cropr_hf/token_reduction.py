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
"""What every token reduction method is made of. It names none of them.

1. Operations on token sequences: pure functions on tensors.
2. `TokenState`: what travels through the encoder and moves together.
3. `TokenReducer`: the interface of a method, its settings, and the registry.

Symbols: B images, T tokens (prefix and patches) now, T0 tokens of the unpruned sequence, K tokens kept, H heads,
D hidden size, C classes, L blocks.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn import functional as F

from .configuration_cropr_vit import DEFAULT_PRUNING_RATE, CroprViTConfig, check_finite
from .token_schedule import check_pruning, kept_by_constant_rate, pruning_blocks


# --------------------------------------------------------------------------------------------------------------------
# 1. Operations on token sequences
# --------------------------------------------------------------------------------------------------------------------


def gather_tokens(indices: torch.Tensor, *sequences: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same tokens of one or more batches of sequences.

    Copying whole rows is several times faster on a CPU than `torch.gather` with an index expanded over the channels.

    Args:
        indices: (B, K), in [0, T).
        sequences: all (B, T, ...), or all (1, T, ...), which the batch shares.

    Returns:
        (B, K, ...) of each.
    """
    rows = indices.flatten()
    if sequences[0].shape[0] != 1:
        first_rows = torch.arange(indices.shape[0], device=indices.device) * sequences[0].shape[1]
        rows = (indices + first_rows[:, None]).flatten()
    # (B, T, ...) -> (B * T, ...) -> (B * K, ...) -> (B, K, ...)
    return tuple(tokens.flatten(0, 1).index_select(0, rows).unflatten(0, indices.shape) for tokens in sequences)


def resample_grid(
    table: torch.Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], antialias: bool
) -> torch.Tensor:
    """Bicubic interpolation, in float32, of vectors that belong to patches (positions, queries) to another grid.

    Args:
        table: (1, old rows * old columns, D)
        antialias: whether to smooth before it shrinks.

    Returns:
        (1, new rows * new columns, D)
    """
    # (1, rows * columns, D) -> (1, D, rows, columns) and back
    grid = table.float().unflatten(1, old_grid).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new_grid, mode="bicubic", align_corners=False, antialias=antialias)
    return grid.flatten(2).transpose(1, 2).to(table.dtype)


def select_tokens(
    scores: torch.Tensor, num_keep: int, num_prefix_tokens: int = 0, padding: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Selector: the top patch tokens, and all prefix tokens, in the order in which they stand in the sequence.

    Args:
        scores: (B, T), those of prefix tokens are ignored; what is not a number is the lowest.
        num_keep: patch tokens to keep, in [1, T - num_prefix_tokens]. Equal scores: the earlier token is kept.
        num_prefix_tokens: tokens at the start that always stay.
        padding: (B, T), true for tokens that are pruned before all others.

    Returns:
        Indices into the T tokens: kept (B, num_prefix_tokens + num_keep), ascending, and pruned (B, the others),
        from the highest score to the lowest.
    """
    # Sorted by their negatives, as in an ascending order what is not a number comes last.
    ranks = -scores
    if padding is not None:
        ranks = ranks.nan_to_num(nan=torch.finfo(ranks.dtype).max).masked_fill(padding, torch.inf)
    # Prefix tokens win, and as a stable sort leaves them in front, they need no treatment of their own.
    ranks = F.pad(ranks[:, num_prefix_tokens:], (num_prefix_tokens, 0), value=-torch.inf)
    # A full sort is negligible next to a block, and unlike top-k it orders equal scores alike everywhere.
    order = ranks.argsort(dim=1, stable=True)
    num_keep += num_prefix_tokens
    return order[:, :num_keep].sort(dim=1).values, order[:, num_keep:]


def rank_by_similarity(metric: torch.Tensor, num_prefix_tokens: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens at even places, and the most similar one at an odd place for each, by the cosine (ToMe, section 3).

    Of equal similarities the token that comes first wins.

    Args:
        metric: (B, T, d), what similarity is measured on.
        num_prefix_tokens: tokens at the start that take no part.

    Returns:
        Places of the even tokens (B, ⌈T / 2⌉), the most similar first, those of the prefix last; and for each the
        place of the one that it is most similar to.
    """
    metric = F.normalize(metric, dim=-1)
    is_prefix = torch.arange(metric.shape[1], device=metric.device) < num_prefix_tokens
    # (B, even, d) x (B, d, odd) -> (B, even, odd)
    similarity = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    similarity = similarity.masked_fill(is_prefix[::2, None] | is_prefix[1::2], -torch.inf)
    best, partner = similarity.max(dim=-1)
    order = best.argsort(dim=1, descending=True, stable=True)
    return 2 * order, 2 * partner.gather(1, order) + 1


# --------------------------------------------------------------------------------------------------------------------
# 2. The state that travels through the encoder
# --------------------------------------------------------------------------------------------------------------------


Rotation = tuple[torch.Tensor, torch.Tensor]  # cosine and sine
SIZES, KEY_BIAS = "sizes", "key_bias"  # columns that the model reads


@dataclass
class TokenState:
    """Token sequences and what belongs to their tokens. Methods return a new state and never change one.

    Whatever a token has by its place in the image is looked up by its index, in tables that stay as they are. What
    else it has stands in a column. Both move with the tokens.

    Attributes:
        hidden_states: (B, T, D), prefix tokens first; patches in raster order, unless a method reorders them.
        token_indices: (B or 1, T), place of each token in the unpruned sequence.
        rotary_tables: rotary positions of the unpruned sequence, each (1, T0, head size / 2), by the name of what they
            are positions in: "image", and "window" for places inside the windows of windowed attention.
        rotations: the same of the tokens in `hidden_states`, (B or 1, T, head size / 2); the tables by default.
        padding: (B, T0), true for tokens that are pruned before all others, or `None`.
        num_prefix_tokens: CLS and register tokens in `hidden_states`.
        columns: further facts about each token, (B, T, ...) by name; see `sizes` and `key_bias`.
        slots: (B, T0), where in `hidden_states` each token of the unpruned sequence went by merging, or `None`.
        pruned: the patch tokens that left the sequence, in the order in which they did.
        restored: whether they are back, or never went, as where training masks tokens that inference drops.
        idle: of a method that lets tokens idle, which ones did in the block after each of its modules.
        num_unplaced: tokens that a method made and that have no place in the image, in the sequence or pruned; their
            index is the first that no place has.
        grid_size: rows and columns of the patches before pruning; what has one query per patch needs it.
        keeps_pruned_states: whether `pruned` has the hidden states, which fusion needs.
        auxiliary_logits: (B, N, C) by the block that the auxiliary head follows, in training.
        auxiliary_patches: (n,), the patches whose queries give the first of these logits; `None` is all.
        losses: of methods, by name, in training; the task class adds them to its loss.
    """

    hidden_states: torch.Tensor
    token_indices: torch.Tensor
    rotary_tables: dict[str, Rotation] = field(default_factory=dict)
    rotations: dict[str, Rotation] = field(default_factory=dict)
    padding: torch.Tensor | None = None
    num_prefix_tokens: int = 0
    columns: dict[str, torch.Tensor] = field(default_factory=dict)
    slots: torch.Tensor | None = None
    pruned: tuple[PrunedTokens, ...] = ()
    restored: bool = False
    idle: tuple[PrunedTokens, ...] = ()
    num_unplaced: int = 0
    grid_size: tuple[int, int] | None = None
    keeps_pruned_states: bool = True
    auxiliary_logits: dict[int, torch.Tensor] = field(default_factory=dict)
    auxiliary_patches: torch.Tensor | None = None
    losses: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rotations = self.rotations or self.rotary_tables

    def updated(self, **changes: Any) -> TokenState:
        """A copy with other values: `dataclasses.replace`, whose time shows when every block makes a copy or two."""
        state = object.__new__(TokenState)
        state.__dict__.update(self.__dict__)
        state.__dict__.update(changes)
        return state

    @property
    def num_patches(self) -> int:
        """Patch tokens in the sequence now."""
        return self.hidden_states.shape[1] - self.num_prefix_tokens

    @property
    def sizes(self) -> torch.Tensor | None:
        """How many tokens each one stands for, (B, T); `None` is one each. Means over tokens weigh by it."""
        return self.columns.get(SIZES)

    @property
    def key_bias(self) -> torch.Tensor | None:
        """What attention adds to the logits of each token as a key, (B, T), or `None`."""
        return self.columns.get(KEY_BIAS)

    @property
    def num_places(self) -> int:
        """Tokens of the unpruned sequence."""
        if self.slots is not None:
            return self.slots.shape[1]
        pruned = 0 if self.restored else sum(tokens.token_indices.shape[1] for tokens in self.pruned)
        return self.hidden_states.shape[1] + pruned - self.num_unplaced

    @property
    def is_whole(self) -> bool:
        """Whether every token of the unpruned sequence is there."""
        return self.restored or len(self.pruned) == 0

    def prune(self, kept: torch.Tensor, pruned: torch.Tensor, block: int) -> TokenState:
        """Keeps the tokens at `kept` (B, K), prefix included, and sets those at `pruned` aside.

        Raises:
            `ValueError`: after a merge.
        """
        if self.slots is not None:
            raise ValueError("Tokens were merged before; a method prunes or merges, not both.")
        places = self.token_indices.expand(kept.shape[0], -1)
        indices = places.gather(1, kept)
        states, *columns = gather_tokens(kept, self.hidden_states, *self.columns.values())
        set_aside = gather_tokens(pruned, self.hidden_states) if self.keeps_pruned_states else (None,)
        return self.updated(
            hidden_states=states,
            token_indices=indices,
            rotations=self._rotations_of(indices),
            columns=dict(zip(self.columns, columns)),
            pruned=(*self.pruned, PrunedTokens(block, places.gather(1, pruned), *set_aside)),
        )

    def park(self, active: torch.Tensor, idle: torch.Tensor, block: int) -> TokenState:
        """Leaves the tokens at `active` (B, K), prefix included, for one block; `unpark` brings back those at `idle`.

        Raises:
            `ValueError`: beside columns, or after tokens left for good.
        """
        if self.columns or not self.is_whole:
            raise ValueError(
                "Tokens were pruned or merged, or have columns; a method that lets them idle does neither."
            )
        (states,) = gather_tokens(active, self.hidden_states)
        (others,) = gather_tokens(idle, self.hidden_states)
        return self.updated(
            hidden_states=states,
            token_indices=active,
            rotations=self._rotations_of(active),
            idle=(*self.idle, PrunedTokens(block, idle, others)),
        )

    def unpark(self) -> TokenState:
        """Every token at its place, those that idled as they were."""
        *before, parked = self.idle
        assert parked.hidden_states is not None
        places, order = torch.cat([self.token_indices, parked.token_indices], dim=1).sort(dim=1)
        (states,) = gather_tokens(order, torch.cat([self.hidden_states, parked.hidden_states], dim=1))
        return self.updated(
            hidden_states=states,
            token_indices=places,
            rotations=self.rotary_tables,
            idle=(*before, PrunedTokens(parked.block, parked.token_indices)),
        )

    def append(self, tokens: torch.Tensor) -> TokenState:
        """Adds tokens (B, E, D) that stand at no place of the image: they are not rotated, and go when all tokens come
        back.

        Raises:
            `ValueError`: beside columns, of which they have no values.
        """
        if self.columns:
            raise ValueError(f"New tokens have no {', '.join(self.columns)}; a method does one or the other.")
        batch_size, count = tokens.shape[:2]
        index, tables = self.num_places, self.rotary_tables
        if not self.num_unplaced:
            tables = {
                name: (F.pad(cos, (0, 0, 0, 1), value=1.0), F.pad(sin, (0, 0, 0, 1)))
                for name, (cos, sin) in tables.items()
            }
        indices = self.token_indices.expand(batch_size, -1)
        state = self.updated(
            hidden_states=torch.cat([self.hidden_states, tokens], dim=1),
            token_indices=torch.cat([indices, indices.new_full((batch_size, count), index)], dim=1),
            rotary_tables=tables,
            num_unplaced=self.num_unplaced + count,
        )
        return state.updated(rotations=state._rotations_of(state.token_indices))

    def merge(
        self,
        hidden_states: torch.Tensor,
        survivors: torch.Tensor,
        merged: torch.Tensor,
        slots: torch.Tensor,
        block: int,
        columns: dict[str, torch.Tensor],
    ) -> TokenState:
        """Tokens after some were merged into others, in any order.

        Args:
            hidden_states: (B, K, D), the new sequence, prefix tokens first.
            survivors: (B, K), the token of the present sequence whose place each of them keeps.
            merged: (B, T - K), tokens of the present sequence that are no longer tokens of their own.
            slots: (B, T), where in the new sequence each token of the present one went.
            block: in or after which it happens.
            columns: of the new sequence, (B, K, ...).

        Raises:
            `ValueError`: after tokens were pruned.
        """
        if self.pruned and self.slots is None:
            raise ValueError("Tokens were pruned before; a method prunes or merges, not both.")
        places = self.token_indices.expand(slots.shape[0], -1)
        indices = places.gather(1, survivors)
        return self.updated(
            hidden_states=hidden_states,
            token_indices=indices,
            rotations=self._rotations_of(indices),
            columns=columns,
            slots=slots if self.slots is None else slots.gather(1, self.slots),
            pruned=(*self.pruned, PrunedTokens(block, places.gather(1, merged))),
        )

    def restore(self) -> TokenState:
        """Every token back at its place: a pruned one as it was when pruned (Last Layer Fusion in the paper), a merged
        one as a copy of what it was merged into.

        Raises:
            `ValueError`: when the hidden states of pruned tokens were not kept.
        """
        if self.is_whole:
            return self
        if self.slots is not None:
            (states,) = gather_tokens(self.slots, self.hidden_states)
            indices = torch.arange(self.slots.shape[1], device=self.slots.device)[None]
        else:
            states, indices = self._fused()
        tables = self.rotary_tables
        if self.num_unplaced:
            tables = {name: (cos[:, :-1], sin[:, :-1]) for name, (cos, sin) in tables.items()}
        return self.updated(
            hidden_states=states,
            token_indices=indices,
            rotary_tables=tables,
            rotations=tables,
            num_unplaced=0,
            columns={},
            slots=None,
            pruned=tuple(PrunedTokens(tokens.block, tokens.token_indices) for tokens in self.pruned),
            restored=True,
        )

    def _fused(self) -> tuple[torch.Tensor, torch.Tensor]:
        states, indices = [self.hidden_states], [self.token_indices]
        for tokens in self.pruned:
            if tokens.hidden_states is None:
                raise ValueError(
                    "The states of pruned tokens were dropped; set `keeps_pruned_states` to restore them."
                )
            states.append(tokens.hidden_states)
            indices.append(tokens.token_indices)
        restored, order = torch.cat(indices, dim=1).sort(dim=1)
        if self.num_unplaced:  # they sort last
            restored, order = restored[:, : self.num_places], order[:, : self.num_places]
        (fused,) = gather_tokens(order, torch.cat(states, dim=1))
        return fused, restored

    def _rotations_of(self, indices: torch.Tensor) -> dict[str, Any]:
        return {name: gather_tokens(indices, *table) for name, table in self.rotary_tables.items()}

    def pruning_map(self, num_blocks: int) -> torch.Tensor:
        """Block after which each patch left, `num_blocks` if it never did: (B, patches in raster order)."""
        # One more than there are places, for tokens that have none.
        blocks = self.token_indices.new_full((len(self.hidden_states), self.num_places + 1), num_blocks)
        for tokens in self.pruned:
            blocks = blocks.scatter(1, tokens.token_indices, tokens.block)
        idles_until = num_blocks  # a token that idles to the end left at the beginning of that time
        for tokens in reversed(self.idle):
            is_idle = torch.zeros_like(blocks).scatter(1, tokens.token_indices, 1).bool()
            blocks = torch.where(is_idle & (blocks == idles_until), tokens.block, blocks)
            idles_until = tokens.block
        return blocks[:, self.num_prefix_tokens : -1]

    def padding_of_tokens(self) -> torch.Tensor | None:
        """`padding` of the tokens in the sequence: (B, T)."""
        if self.padding is None or self.is_whole:
            return self.padding
        return F.pad(self.padding, (0, 1)).gather(1, self.token_indices)


@dataclass
class PrunedTokens:
    """Patch tokens that left the sequence at one block.

    Attributes:
        block: 1 to L.
        token_indices: (B, P), their places in the unpruned sequence; of a method that ranks, from the highest score
            to the lowest. The first index that no place has fills up rows of images that lost fewer.
        hidden_states: (B, P, D), as they were when pruned, or `None`.
    """

    block: int
    token_indices: torch.Tensor
    hidden_states: torch.Tensor | None = None


@dataclass
class AttentionFacts:
    """What a method can read off the attention of a block, without its weights, which fused kernels do not return.

    Attributes:
        queries, keys: (B, H, T, d), rotated.
        content_keys: the keys before rotation: what a token is about, and not where it stands.
        scaling: of their products.
        key_bias: (B, T) or `None`.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    content_keys: torch.Tensor
    scaling: float
    key_bias: torch.Tensor | None

    def class_attention(self) -> torch.Tensor:
        """Attention weights of the first token to all tokens, (B, H, T), in O(T D)."""
        # (B, H, 1, d) x (B, H, d, T) -> (B, H, T)
        logits = (self.queries[:, :, :1] @ self.keys.transpose(-2, -1))[:, :, 0].float() * self.scaling
        return (logits if self.key_bias is None else logits + self.key_bias[:, None]).softmax(dim=-1)


# --------------------------------------------------------------------------------------------------------------------
# 3. The interface of a method, and the registry
# --------------------------------------------------------------------------------------------------------------------


class OwnWeights(nn.Module):
    """A module that initialises what Transformers cannot. It must hold parameters itself, or it is passed over."""

    def init_weights(self) -> None:
        """Gives the parameters their first values, by `transformers.initialization`."""
        raise NotImplementedError


@strict
@dataclass
class ReducerConfig:
    """Fields of one method, which `config.reducer_config` holds as a dictionary. Most methods have none."""


class TokenReducer(nn.Module):
    """A token reduction method, as one module per block at which it acts.

    The encoder calls the hooks and never asks which method runs; what a method is, its class attributes say. A method
    overrides what it needs. Most act in `after_block`; one that `acts_inside` does between attention and MLP.

    Args:
        config: of the model.
        block: the block (1 to L) at which the module acts.

    Attributes:
        name: as `config.token_reducer` has it.
        label: in tables and pictures.
        title, url, citation: in model cards: what the method is called, where it was published, and its BibTeX entry.
        config_class: its own fields.
        learns: whether its choices are by chance before it is trained; otherwise it can be used without training.
        supports_auxiliary_heads: whether it has parts that only training needs; see `add_auxiliary_heads`.
        merges: whether tokens are merged rather than dropped.
        idles: whether tokens sit out blocks and come back, so that it has a `before_next_block`.
        acts_inside: whether it has an `after_attention`.
        fuses_by_default: what `config.last_layer_fusion` is unless it is given.
        deterministic: whether the same image always gives the same output.
        supports_windows: whether it can run with windowed attention.
        needs_cls: whether it needs a CLS token.
        fixed_weights: names of weights that make no sense in another shape.
    """

    name: str
    label: str
    title: str
    url: str | None = None
    citation: str | None = None
    config_class: type[ReducerConfig] = ReducerConfig
    learns = False
    supports_auxiliary_heads = False
    merges = False
    idles = False
    acts_inside = False
    fuses_by_default = True
    deterministic = True
    supports_windows = False
    needs_cls = False
    fixed_weights: tuple[str, ...] = ()

    def __init__(self, config: CroprViTConfig, block: int):
        super().__init__()
        self.block = block

    # Where it acts, and how many tokens it leaves: see `token_schedule`.

    @classmethod
    def blocks(cls, config: CroprViTConfig) -> list[int]:
        """Blocks (1 to L) at which it can act: those after which another block works on fewer tokens, as the last one
        (with fusion the last two) do not; or within which the MLP does.
        """
        last = config.num_hidden_layers - bool(config.last_layer_fusion) - (not cls.acts_inside)
        return list(range(1, last + 1))

    @classmethod
    def blocks_of_schedule(cls, config: CroprViTConfig, falls: list[int]) -> list[int]:
        """Blocks that have a module with a `pruning_schedule`, which falls after these."""
        return falls

    @classmethod
    def kept_by_rate(cls, config: CroprViTConfig, num_patches: int, rate: int) -> list[int]:
        """Patch tokens left after each of the L blocks for `config.pruning_rate`; that of the paper by default."""
        return kept_by_constant_rate(config, pruning_blocks(config, cls), num_patches, rate)

    @classmethod
    def kept_by_default(cls, config: CroprViTConfig, num_patches: int) -> list[int]:
        """The same where the configuration has neither rate nor schedule: by fields of the method, if it has such."""
        return cls.kept_by_rate(config, num_patches, DEFAULT_PRUNING_RATE)

    @classmethod
    def reachable_counts(cls, config: CroprViTConfig, num_patches: int, kept: Sequence[int]) -> list[int]:
        """The counts that the method can reach nearest to `kept`, patch tokens left after each block."""
        return list(kept)

    # What it does to tokens. `num_keep` is what the schedule leaves at its block.

    def before_block(self, state: TokenState) -> TokenState:
        """Called before its block."""
        return state

    def after_attention(self, state: TokenState, num_keep: int, facts: AttentionFacts) -> TokenState:
        """Called between attention and MLP of its block, if it `acts_inside`."""
        return state

    def after_block(self, state: TokenState, num_keep: int) -> TokenState:
        """Called after its block."""
        return state

    def before_next_block(self, state: TokenState, num_active: int, layer: Any) -> TokenState:
        """Called at the beginning of the block after its own, whose `CroprViTLayer` it sees, if it `idles`."""
        return state

    def restore(self, state: TokenState) -> TokenState:
        """All tokens at their places, for fusion and for feature maps."""
        return state.restore()

    def scores(self, state: TokenState) -> torch.Tensor | None:
        """How much each token matters, (B, T), on any scale, for the schedule search; `None` if it does not score."""
        return None

    def keep_best(self, state: TokenState, num_keep: int) -> TokenState:
        """Prunes to the `num_keep` patch tokens with the highest scores, and those of padding first."""
        if num_keep == state.num_patches:
            return state
        with torch.no_grad():  # ranking has no gradient
            scores: Any = self.scores(state)
            kept, pruned = select_tokens(scores, num_keep, state.num_prefix_tokens, state.padding_of_tokens())
        return state.prune(kept, pruned, self.block)

    # What training needs beside it

    def remove_auxiliary_heads(self) -> None:
        """Drops what only training needs; selection stays the same."""

    def add_auxiliary_heads(self, config: CroprViTConfig, initialize: Callable[[nn.Module], Any]) -> None:
        """Adds what training needs; selection stays the same. `initialize` gives a new module its first weights."""

    @classmethod
    def strip(cls, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What inference needs of the weights of one module, by their names in it."""
        return weights

    # What it asks of the model

    @classmethod
    def uses_key_bias(cls, config: CroprViTConfig) -> bool:
        """Whether it gives tokens a `key_bias`, which some attention kernels do not support."""
        return False

    @classmethod
    def settings(cls, config: CroprViTConfig) -> Any:
        """Its fields, from `config.reducer_config`.

        Raises:
            `ValueError`: for a field that it does not have, or a value that the field does not allow.
        """
        given = config.reducer_config or {}
        known = [item.name for item in fields(cls.config_class)]
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                raise ValueError(
                    f"`reducer_config` has {name!r}, which is not a field of the token reducer {cls.name!r}; "
                    + (f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known) or 'none'}.")
                )
        settings = cls.config_class(**given)
        check_finite(settings)
        return settings

    @classmethod
    def setting(cls, config: CroprViTConfig, name: str) -> Any:
        """One of its fields, not checked; what counts tokens asks for it in every call, also of compiled models."""
        return (config.reducer_config or {}).get(name, getattr(cls.config_class, name))

    @classmethod
    def check(cls, config: CroprViTConfig) -> None:
        """Raises `ValueError` for a configuration with which it cannot run."""
        cls.settings(config)
        if config.use_auxiliary_heads and not cls.supports_auxiliary_heads:
            raise ValueError(
                f"The token reducer {cls.name!r} does not support auxiliary heads; set `use_auxiliary_heads=False`."
            )
        if cls.needs_cls and not config.use_cls_token:
            raise ValueError(
                f"The token reducer {cls.name!r} needs a CLS token, but `use_cls_token` is False; choose another "
                "reducer, or a model with a CLS token."
            )
        if config.window_block_indices and not cls.supports_windows:
            raise ValueError(
                f"The token reducer {cls.name!r} does not support windowed attention, but `window_block_indices` is "
                f"{list(config.window_block_indices)}; choose another reducer, or a model without windows."
            )
        if config.prune_padding_first and cls.merges:
            raise ValueError(
                f"`prune_padding_first` is True, but the token reducer {cls.name!r} merges tokens and drops none; set "
                "it to False."
            )
        check_attention(config._attn_implementation, cls.name if cls.uses_key_bias(config) else None)
        cls.check_pruning(config)

    @classmethod
    def check_pruning(cls, config: CroprViTConfig) -> None:
        """Raises `ValueError` for pruning that is impossible at `config.image_size`; configurations call it too."""
        check_pruning(config, cls)


def check_attention(implementation: str | None, biased_by: str | None) -> None:
    """Raises `ValueError` for an attention kernel without a key bias where a method needs one."""
    if biased_by is not None and "flash" in (implementation or ""):
        raise ValueError(
            f"The token reducer {biased_by!r} adds a bias to attention logits, which {implementation!r} does not "
            "support; use `attn_implementation='sdpa'`."
        )


TOKEN_REDUCERS: dict[str, type[TokenReducer]] = {}

ReducerType = TypeVar("ReducerType", bound=type[TokenReducer])


def register_token_reducer(reducer: ReducerType) -> ReducerType:
    """Class decorator: makes a reducer available under its `name` as `config.token_reducer`.

    Raises:
        `ValueError`: when another class has that name.
    """
    if TOKEN_REDUCERS.setdefault(reducer.name, reducer) is not reducer:
        raise ValueError(f"A token reducer named {reducer.name!r} is registered already; choose another name.")
    return reducer


def find_token_reducer(config: CroprViTConfig) -> Any:
    """The class of the method of a configuration; `None` if it does not prune.

    Raises:
        `ValueError`: for one that is not registered.
    """
    name = config.token_reducer
    if name is None or name in TOKEN_REDUCERS:
        return TOKEN_REDUCERS.get(name)  # type: ignore[arg-type]
    if config.reducer_package is not None:
        raise ValueError(
            f"The token reducer {name!r} is not installed; it is part of the package {config.reducer_package!r}: "
            "install it, and import it before the model is loaded."
        )
    near = difflib.get_close_matches(name, TOKEN_REDUCERS, n=3, cutoff=0.5)
    raise ValueError(
        f"Unknown token reducer {name!r}; "
        + (f"did you mean {' or '.join(map(repr, near))}? " if near else "")
        + f"Choose one of {', '.join(sorted(TOKEN_REDUCERS))}, or None for the unpruned model."
    )


def has_auxiliary_heads(token_reducer: str | None) -> bool:
    """Whether models with this `config.token_reducer` can have auxiliary heads; `False` for an unknown name."""
    return token_reducer in TOKEN_REDUCERS and TOKEN_REDUCERS[token_reducer].supports_auxiliary_heads


def build_token_reducers(config: CroprViTConfig) -> nn.ModuleDict:
    """The modules of a model, by the number of the block at which each acts; empty when it does not prune.

    The configuration notes which package a method comes from that does not lie beside this file.

    Raises:
        `ValueError`: for a method that is not registered, or that cannot run with the configuration.
    """
    reducer = find_token_reducer(config)
    if reducer is None:
        return nn.ModuleDict()
    if config.last_layer_fusion is None:
        config.last_layer_fusion = reducer.fuses_by_default
    reducer.check(config)
    if reducer.__module__.rpartition(".")[0] != __package__:
        config.reducer_package = reducer.__module__.partition(".")[0]
    return nn.ModuleDict({str(block): reducer(config, block) for block in pruning_blocks(config, reducer)})
