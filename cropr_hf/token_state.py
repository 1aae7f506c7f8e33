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
"""Token sequences: operations on them, and the state that travels through the encoder.

Symbols: B images, T tokens (prefix and patches) now, T0 tokens of the unpruned sequence, K tokens kept, D hidden size,
L blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn import functional as F


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


def put_tokens(table: torch.Tensor, indices: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """A table of all places with other rows at some of them.

    Args:
        table: (B, N, C)
        indices: (B or 1, K), in [0, N]; at N, which no place has, a token is left out.
        tokens: (B, K, C)

    Returns:
        (B, N, C)
    """
    places = indices[..., None].expand_as(tokens)
    return F.pad(table, (0, 0, 0, 1)).scatter(1, places, tokens)[:, :-1]


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


def add_gumbel_noise(scores: torch.Tensor) -> torch.Tensor:
    """Scores plus standard Gumbel noise, of the same shape: the best K of them are K draws without replacement by
    softmax(scores).
    """
    smallest = torch.finfo(scores.dtype).tiny
    return scores - torch.empty_like(scores).exponential_().clamp(min=smallest).log()


def draw_decisions(log_probabilities: torch.Tensor) -> torch.Tensor:
    """Straight-through Gumbel-softmax at temperature 1: what is drawn going forward, its softmax going backward.

    Args:
        log_probabilities: (B, N, 2), of keeping and of dropping a token.

    Returns:
        (B, N), exactly 1 for what stays and 0 for what goes.
    """
    soft = add_gumbel_noise(log_probabilities).softmax(dim=-1)[..., 0]
    hard = (soft > 0.5).to(soft.dtype)
    return hard + (soft - soft.detach())  # the bracket is exactly 0


def pack_tokens(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images with unlike numbers of tokens as one batch: each moves its tokens to the front, and fills up to the most.

    Args:
        chosen: (B, T), true for the tokens of each image.

    Returns:
        Indices into the T tokens (B, K), ascending up to the number of the image; and which are chosen ones, (B, K).
        K is the largest number, and at least 1.
    """
    counts = chosen.sum(dim=1)
    longest = max(1, int(counts.max()))
    order = chosen.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
    return order, torch.arange(longest, device=chosen.device) < counts[:, None]


def bias_of(present: torch.Tensor) -> torch.Tensor:
    """A key bias (B, T), float32, by which attention sees only tokens that are present; all where none is."""
    return torch.zeros_like(present, dtype=torch.float32).masked_fill(
        present.logical_not() & present.any(dim=1, keepdim=True), -torch.inf
    )


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
GATES = "gates"  # of tokens that idle while they are masked
POLICY, RESTING = "policy", "resting"  # of `mask_tokens`: what stays, and dropped tokens as they were
LEAK = 1e-6  # what a dropped token still counts there, as in the code of DynamicViT's authors


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
        num_places: T0, the tokens of the unpruned sequence; those of `hidden_states` by default.
        num_unplaced: tokens that a method made and that have no place in the image, in the sequence or pruned; their
            index is `num_places`, the first that no place has, as is that of what fills up rows.
        grid_size: rows and columns of the patches before pruning; what has one query per patch needs it.
        keeps_pruned_states: whether `pruned` has the hidden states, which fusion needs.
        auxiliary_logits: (B, N, C) by the block that the auxiliary head follows, in training.
        auxiliary_patches: (n,), the patches whose queries give the first of these logits; `None` is all.
        exit_logits: of a method by which patches leave with their class, (B, patches, C) by the block that a head
            follows: of all patches, those that left before as they were predicted then.
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
    num_places: int = 0
    num_unplaced: int = 0
    grid_size: tuple[int, int] | None = None
    keeps_pruned_states: bool = True
    auxiliary_logits: dict[int, torch.Tensor] = field(default_factory=dict)
    auxiliary_patches: torch.Tensor | None = None
    exit_logits: dict[int, torch.Tensor] = field(default_factory=dict)
    losses: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rotations = self.rotations or self.rotary_tables
        self.num_places = self.num_places or self.hidden_states.shape[1]

    def updated(self, **changes: Any) -> TokenState:
        """A copy with other values: `dataclasses.replace`, whose time shows when every block makes a copy or two."""
        if torch.compiler.is_compiling():  # torch 2.8 cannot trace what is below, and there is no time to save
            return replace(self, **changes)
        state = object.__new__(TokenState)
        state.__dict__.update(self.__dict__)
        state.__dict__.update(changes)
        return state

    def with_losses(self, losses: Mapping[str, torch.Tensor]) -> TokenState:
        """Losses of a method in training, each added to what has its name already."""
        summed = {name: self.losses[name] + loss if name in self.losses else loss for name, loss in losses.items()}
        return self.updated(losses={**self.losses, **summed})

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
    def is_whole(self) -> bool:
        """Whether every token of the unpruned sequence is there."""
        return self.restored or len(self.pruned) == 0

    def prune(self, kept: torch.Tensor, pruned: torch.Tensor, block: int) -> TokenState:
        """Keeps the tokens at `kept` (B, K), prefix included, and sets those at `pruned` aside.

        All images keep as many; see `drop` for numbers that differ.

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

    def drop(self, stays: torch.Tensor, block: int, packs: bool) -> TokenState:
        """Prunes in each image as many tokens as do not stay.

        Packed, the sequence is as long as the largest number in the batch. Otherwise all tokens stay in it. Attention,
        and means over tokens, see only those that stay; the others, and what fills up rows, have no place.

        Args:
            stays: (B, T), prefix tokens included; at least one token of each image.
            block: after which it happens.
            packs: whether to pack.
        """
        places = self.token_indices.expand(stays.shape[0], -1)
        is_there = places != self.num_places
        leaves, stays = is_there & stays.logical_not(), is_there & stays
        states, indices, gone = self.hidden_states, places, places
        set_aside: torch.Tensor | None = states
        if packs:
            (active, stays), (leaving, leaves) = pack_tokens(stays), pack_tokens(leaves)
            (set_aside,) = gather_tokens(leaving, states)
            (states,) = gather_tokens(active, states)
            indices, gone = places.gather(1, active), places.gather(1, leaving)
        gone = gone.masked_fill(leaves.logical_not(), self.num_places)
        pruned = PrunedTokens(block, gone, set_aside if self.keeps_pruned_states else None)
        return self.updated(
            hidden_states=states,
            token_indices=indices.masked_fill(stays.logical_not(), self.num_places),
            rotations=self._rotations_of(indices.clamp(max=self.num_places - 1)),
            columns={SIZES: stays.to(torch.float32), KEY_BIAS: bias_of(stays)},
            pruned=(*self.pruned, pruned),
        )

    def park(self, active: torch.Tensor, idle: torch.Tensor, block: int) -> TokenState:
        """Leaves the tokens at `active` (B, K), prefix included, for one block; `unpark` brings back those at `idle`.

        Raises:
            `ValueError`: beside columns, or after tokens left for good.
        """
        self._check_parking()
        (states,) = gather_tokens(active, self.hidden_states)
        (others,) = gather_tokens(idle, self.hidden_states)
        return self.updated(
            hidden_states=states,
            token_indices=active,
            rotations=self._rotations_of(active),
            idle=(*self.idle, PrunedTokens(block, idle, others)),
        )

    def park_by(self, gates: torch.Tensor, block: int, packs: bool) -> TokenState:
        """Leaves the tokens whose gate is 1 for one block, in each image as many as it has; `unpark` brings the others
        back.

        Packed, the sequence is as long as the largest number in the batch, for speed. Otherwise all tokens stay in it,
        attention masks those that idle, and gradients reach the gates.

        Args:
            gates: (B, T), 0 or 1, prefix tokens included.
            block: after which it happens.
            packs: whether to pack.

        Raises:
            `ValueError`: beside columns, or after tokens left for good.
        """
        self._check_parking()
        takes_part, places = gates > 0.5, self.token_indices.expand(gates.shape[0], -1)
        parked = PrunedTokens(block, places.masked_fill(takes_part, self.num_places), self.hidden_states)
        if not packs:
            columns = {KEY_BIAS: bias_of(takes_part), GATES: gates}
            return self.updated(columns=columns, idle=(*self.idle, parked))
        active, is_real = pack_tokens(takes_part)
        (states,) = gather_tokens(active, self.hidden_states)
        return self.updated(
            hidden_states=states,
            token_indices=active.masked_fill(is_real.logical_not(), self.num_places),
            rotations=self._rotations_of(active),
            columns={KEY_BIAS: bias_of(is_real)},
            idle=(*self.idle, parked),
        )

    def _check_parking(self) -> None:
        if self.columns or not self.is_whole:
            raise ValueError(
                "Tokens were pruned or merged, or have columns; a method that lets them idle does neither."
            )

    def unpark(self) -> TokenState:
        """Every token at its place, those that idled as they were."""
        *before, parked = self.idle
        assert parked.hidden_states is not None
        if self.columns:  # of `park_by`
            gates, states = self.columns.get(GATES), self.hidden_states
            if gates is None:  # packed
                states = put_tokens(parked.hidden_states, self.token_indices, states)
            else:
                gates = gates[..., None].to(states.dtype)
                states = gates * states + (1 - gates) * parked.hidden_states
            return self.updated(
                hidden_states=states,
                token_indices=torch.arange(states.shape[1], device=states.device)[None],
                rotations=self.rotary_tables,
                columns={},
                idle=(*before, PrunedTokens(parked.block, parked.token_indices)),
            )
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
        if POLICY in self.columns:
            return _unmask(self)
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
        # What has no place sorts last.
        restored, order = restored[:, : self.num_places], order[:, : self.num_places]
        (fused,) = gather_tokens(order, torch.cat(states, dim=1))
        return fused, restored

    def _rotations_of(self, indices: torch.Tensor) -> dict[str, Any]:
        return {name: gather_tokens(indices, *table) for name, table in self.rotary_tables.items()}

    def pruning_map(self, num_blocks: int) -> torch.Tensor:
        """Block after which each patch left, `num_blocks` if it never did: (B, patches in raster order)."""
        batch_size = self.hidden_states.shape[0]  # not `len`, which an export would take for a constant
        # One more than there are places, for tokens that have none.
        blocks = self.token_indices.new_full((batch_size, self.num_places + 1), num_blocks)
        for tokens in self.pruned:
            blocks = blocks.scatter(1, tokens.token_indices, tokens.block)
        idles_until = num_blocks  # a token that idles to the end left at the beginning of that time
        for tokens in reversed(self.idle):
            is_idle = torch.zeros_like(blocks).scatter(1, tokens.token_indices, 1).bool()
            blocks = torch.where(is_idle & (blocks == idles_until), tokens.block, blocks)
            idles_until = tokens.block
        return blocks[:, self.num_prefix_tokens : -1]

    def patches_kept(self, num_blocks: int) -> torch.Tensor:
        """Patches of each image left after each block, as schedules count them: (B, blocks).

        What was pruned counts no more, also where it came back. Of a method that lets patches idle it is how many took
        part in the next block, and after the last of these blocks as many as in it.
        """
        numbers = torch.arange(1, num_blocks + 1, device=self.token_indices.device)
        patches = self.num_places - self.num_prefix_tokens
        counts = self.token_indices.new_full((self.hidden_states.shape[0], num_blocks), patches)
        for tokens in self.pruned:
            counts = counts - self._number_of(tokens) * (numbers >= tokens.block)
        for tokens in self.idle:
            counts = counts - self._number_of(tokens) * (numbers == tokens.block)
        last = self.idle[-1].block if self.idle else num_blocks
        return torch.where(numbers > last, counts[:, last - 1 : last], counts)

    def patches_per_block(self, num_blocks: int, fuses: bool) -> torch.Tensor:
        """Patches of each image that each block worked on: (B, blocks); with fusion the last one has all of them."""
        patches = self.num_places - self.num_prefix_tokens
        counts = F.pad(self.patches_kept(num_blocks)[:, :-1], (1, 0), value=patches)
        return F.pad(counts[:, :-1], (0, 1), value=patches) if fuses else counts

    def _number_of(self, tokens: PrunedTokens) -> torch.Tensor:
        """How many of these tokens have a place, (B, 1)."""
        return (tokens.token_indices != self.num_places).sum(dim=1, keepdim=True)

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


# --------------------------------------------------------------------------------------------------------------------
# 3. Dropping in training, where what decides learns from the difference that it makes
# --------------------------------------------------------------------------------------------------------------------


def mask_tokens(state: TokenState, policy: torch.Tensor, block: int) -> TokenState:
    """Drops tokens and leaves them in the sequence: a dropped token is one of size `LEAK`.

    Attention and means over tokens weigh tokens by their sizes: next to nothing, with the gradient of a masked softmax
    (DynamicViT, section 3.3). `TokenState.restore` brings them back as they were when dropped; decisions learn from
    that as well.

    Args:
        policy: (B, T), exactly 1 for what stays, prefix tokens included, and 0 for what goes or went before. Padding
            that goes first goes whatever it says.
        block: after which it happens.
    """
    states, before, padding = state.hidden_states, state.columns.get(POLICY), state.padding_of_tokens()
    if padding is not None:
        policy = policy.masked_fill(padding, 0.0)
    sizes = policy + LEAK
    columns = {**state.columns, POLICY: policy, SIZES: sizes, KEY_BIAS: sizes.log()}
    if state.keeps_pruned_states:
        columns[RESTING] = (
            states if before is None else torch.where(before[..., None] == 0, state.columns[RESTING], states)
        )
    # A dropped token is still there, but its place is that of tokens which have none.
    is_dropped, nowhere = policy == 0, state.num_places
    return state.updated(
        columns=columns,
        token_indices=torch.where(is_dropped, nowhere, state.token_indices),
        pruned=(*state.pruned, PrunedTokens(block, torch.where(is_dropped, state.token_indices, nowhere))),
        restored=True,
    )


def _unmask(state: TokenState) -> TokenState:
    policy = state.columns[POLICY]
    stays = policy[..., None].to(state.hidden_states.dtype)
    indices = torch.arange(policy.shape[1], device=policy.device)[None]
    states = stays * state.hidden_states + (1 - stays) * state.columns[RESTING]
    return state.updated(hidden_states=states, token_indices=indices, columns={})
