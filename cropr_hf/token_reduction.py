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
"""Token Cropr (Bergner, Lippert, Mahendran, CVPR 2025, arXiv 2412.00965): the whole method, from top to bottom.

1. Operations on token sequences: pure functions on tensors.
2. `TokenState`: what travels through the encoder and moves together.
3. `TokenReducer`: the interface of a pruning method, and the registry.
4. `CroprModule`: router (scorer and selector), aggregator, auxiliary head.
5. Stripping: from a trained module to the vector that inference needs.

Symbols: B images, T tokens (prefix and patches), K tokens kept, N queries, H heads, D hidden size, C classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import maybe_autocast

from .configuration_cropr_vit import CroprViTConfig


NORM_EPS = 1e-6  # of the norms inside a Cropr module, as in the reference code


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


def score_tokens(hidden_states: torch.Tensor, query: torch.Tensor, pre_norm: bool = False) -> torch.Tensor:
    """Scores of the router: a = X q, the attention logits summed over queries and heads.

    Computed in float32 under any dtype or autocast, so that low precision ranks tokens nearly as float32 does.

    Args:
        hidden_states: (B, T, D)
        query: (D,), the sum of the queries (see `fold_scorer`).
        pre_norm: normalise the tokens first; the affine part of the norm is in `query`.

    Returns:
        (B, T), float32, on no particular scale.
    """
    with maybe_autocast(device_type=hidden_states.device.type, enabled=False):
        hidden_states = hidden_states.float()
        if pre_norm:
            hidden_states = F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=NORM_EPS)
        return hidden_states @ query.to(hidden_states)


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
    scores = scores.nan_to_num(nan=torch.finfo(scores.dtype).min)  # infinite ones become finite
    if padding is not None:
        scores = scores.masked_fill(padding, -torch.inf)
    # Prefix tokens win, and as a stable sort leaves them in front, they need no treatment of their own.
    scores = F.pad(scores[:, num_prefix_tokens:], (num_prefix_tokens, 0), value=torch.inf)
    # A full sort is negligible next to a block, and unlike top-k it orders equal scores alike everywhere.
    order = scores.argsort(dim=1, descending=True, stable=True)
    num_keep += num_prefix_tokens
    return order[:, :num_keep].sort(dim=1).values, order[:, num_keep:]


def aggregate_tokens(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Cross-attention of the aggregator: Z = softmax(Q Kᵀ / √d) V, heads concatenated.

    A fused kernel computes the same logits again rather than keep N x T of them: the sum over queries that scores
    need is `score_tokens`.

    Args:
        queries: (1, H, N, D / H)
        keys, values: (B, H, T, D / H)

    Returns:
        (B, N, D)
    """
    aggregated = F.scaled_dot_product_attention(queries.expand(keys.shape[0], -1, -1, -1), keys, values)
    # (B, H, N, D / H) -> (B, N, H, D / H) -> (B, N, D)
    return aggregated.transpose(1, 2).flatten(2)


# --------------------------------------------------------------------------------------------------------------------
# 2. The state that travels through the encoder
# --------------------------------------------------------------------------------------------------------------------


Rotation = tuple[torch.Tensor, torch.Tensor]  # cosine and sine


@dataclass
class TokenState:
    """Token sequences and what belongs to their tokens.

    Only hidden states and indices move when tokens are pruned. Whatever a token has by its place in the image is
    looked up by its index, in tables that stay as they are.

    Attributes:
        hidden_states: (B, T, D), prefix tokens first, patches in raster order.
        token_indices: (B or 1, T), place of each token in the unpruned sequence.
        rotary_tables: rotary positions of the unpruned sequence, each (1, T there, head size / 2), by the name of what
            they are positions in: "image", and "window" for places inside the windows of windowed attention.
        rotations: the same of the tokens in `hidden_states`, (B or 1, T, head size / 2); the tables by default.
        padding: (B, T of the unpruned sequence), true for tokens that are pruned before all others, or `None`.
        num_prefix_tokens: CLS and register tokens in `hidden_states`.
        pruned: the patch tokens that were pruned, in the order in which they were.
        grid_size: rows and columns of the patches before pruning; what has one query per patch needs it.
        keeps_pruned_states: whether `pruned` has the hidden states, which fusion needs.
    """

    hidden_states: torch.Tensor
    token_indices: torch.Tensor
    rotary_tables: dict[str, Rotation] = field(default_factory=dict)
    rotations: dict[str, Rotation] = field(default_factory=dict)
    padding: torch.Tensor | None = None
    num_prefix_tokens: int = 0
    pruned: tuple[PrunedTokens, ...] = ()
    grid_size: tuple[int, int] | None = None
    keeps_pruned_states: bool = True

    def __post_init__(self) -> None:
        self.rotations = self.rotations or self.rotary_tables

    @property
    def num_patches(self) -> int:
        """Patch tokens in the sequence now."""
        return self.hidden_states.shape[1] - self.num_prefix_tokens

    def prune(self, kept: torch.Tensor, pruned: torch.Tensor, block: int) -> TokenState:
        """Keeps the tokens at `kept` (B, K), prefix included, and sets those at `pruned` aside."""
        places = self.token_indices.expand(kept.shape[0], -1)
        indices, states = gather_tokens(kept, places, self.hidden_states)
        set_aside = gather_tokens(pruned, *([places, self.hidden_states] if self.keeps_pruned_states else [places]))
        rotations: dict[str, Any] = {
            name: gather_tokens(indices, *table) for name, table in self.rotary_tables.items()
        }
        return replace(
            self,
            hidden_states=states,
            token_indices=indices,
            rotations=rotations,
            pruned=(*self.pruned, PrunedTokens(block, *set_aside)),
        )

    def fuse(self) -> TokenState:
        """Last Layer Fusion: every pruned token, as it was when pruned, back at its place.

        Raises:
            `ValueError`: when the hidden states of pruned tokens were not kept.
        """
        if not self.pruned:
            return self
        states, indices = [self.hidden_states], [self.token_indices]
        for tokens in self.pruned:
            if tokens.hidden_states is None:
                raise ValueError("The states of pruned tokens were dropped; set `keeps_pruned_states` to fuse them.")
            states.append(tokens.hidden_states)
            indices.append(tokens.token_indices)
        restored, order = torch.cat(indices, dim=1).sort(dim=1)
        (fused,) = gather_tokens(order, torch.cat(states, dim=1))
        return replace(
            self,
            hidden_states=fused,
            token_indices=restored,
            rotations=self.rotary_tables,
            pruned=(),
        )

    def pruning_map(self, num_blocks: int) -> torch.Tensor:
        """Block after which each patch was pruned, `num_blocks` if it never was: (B, patches in raster order)."""
        batch_size, length = self.hidden_states.shape[:2]
        length += sum(tokens.token_indices.shape[1] for tokens in self.pruned)
        blocks = self.token_indices.new_full((batch_size, length), num_blocks)
        for tokens in self.pruned:
            blocks = blocks.scatter(1, tokens.token_indices, tokens.block)
        return blocks[:, self.num_prefix_tokens :]

    def padding_of_tokens(self) -> torch.Tensor | None:
        """`padding` of the tokens in the sequence: (B, T)."""
        if self.padding is None or not self.pruned:
            return self.padding
        return self.padding.gather(1, self.token_indices)


@dataclass
class PrunedTokens:
    """Patch tokens that one module pruned.

    Attributes:
        block: the block (1 to L) that the module follows.
        token_indices: (B, P), their places in the unpruned sequence, from the highest score to the lowest.
        hidden_states: (B, P, D), as they were when pruned, or `None`.
    """

    block: int
    token_indices: torch.Tensor
    hidden_states: torch.Tensor | None = None


# --------------------------------------------------------------------------------------------------------------------
# 3. The interface of a pruning method
# --------------------------------------------------------------------------------------------------------------------


class TokenReducer(nn.Module):
    """A pruning method, as one module after one block.

    The encoder calls `forward` after the block and never asks which method runs. A method that needs parameters for
    training alone sets `has_auxiliary_heads` and implements the two methods that add and remove them.

    Args:
        config: settings of the method.
        block: the block (1 to L) that the module follows.
    """

    name: str
    has_auxiliary_heads = False

    def __init__(self, config: CroprViTConfig, block: int):
        super().__init__()
        self.block = block

    def forward(self, state: TokenState, num_keep: int) -> tuple[TokenState, torch.Tensor | None]:
        """Reduces `state` to `num_keep` patch tokens; also auxiliary logits (B, N, C), in training with heads only."""
        if num_keep < state.num_patches:
            state = state.prune(*self.select(state, num_keep), self.block)
        return state, None

    def select(self, state: TokenState, num_keep: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices of the kept (with prefix) and the pruned tokens, as `select_tokens` returns them."""
        raise NotImplementedError

    def remove_auxiliary_heads(self) -> None:
        """Drops what only training needs; selection stays the same."""

    def add_auxiliary_heads(self, config: CroprViTConfig, initialize: Callable[[nn.Module], Any]) -> None:
        """Adds what training needs; selection stays the same. `initialize` gives a new module its first weights."""


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


def has_auxiliary_heads(token_reducer: str | None) -> bool:
    """Whether models with this `config.token_reducer` can have auxiliary heads; `False` for an unknown name."""
    return token_reducer in TOKEN_REDUCERS and TOKEN_REDUCERS[token_reducer].has_auxiliary_heads


def build_token_reducers(config: CroprViTConfig) -> nn.ModuleDict:
    """The modules of a model, by the number of the block that each follows; empty when it does not prune.

    Raises:
        `ValueError`: for a reducer that is not registered, or one without heads when the config asks for them.
    """
    if config.token_reducer is None:
        return nn.ModuleDict()
    reducer = TOKEN_REDUCERS.get(config.token_reducer)
    if reducer is None:
        raise ValueError(
            f"Unknown token reducer {config.token_reducer!r}; choose one of {', '.join(sorted(TOKEN_REDUCERS))}, or "
            "None for the unpruned model."
        )
    if config.use_auxiliary_heads and not reducer.has_auxiliary_heads:
        raise ValueError(
            f"The token reducer {config.token_reducer!r} has no auxiliary heads; set `use_auxiliary_heads=False`."
        )
    return nn.ModuleDict({str(block): reducer(config, block) for block in config.pruning_blocks})


@register_token_reducer
class RandomReducer(TokenReducer):
    """The baseline of the paper: keeps patch tokens drawn at random, in training and inference."""

    name = "random"

    def select(self, state: TokenState, num_keep: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `TokenReducer.select`."""
        scores = torch.rand(state.hidden_states.shape[:2], device=state.hidden_states.device)
        return select_tokens(scores, num_keep, state.num_prefix_tokens, state.padding_of_tokens())


# --------------------------------------------------------------------------------------------------------------------
# 4. The Cropr module
# --------------------------------------------------------------------------------------------------------------------


def _init_truncated_normal(tensor: torch.Tensor, std: float) -> None:
    init.trunc_normal_(tensor, mean=0.0, std=std, a=-2 * std, b=2 * std)


class Scorer(nn.Module):
    """Learnable queries and the optional parts of their attention to the tokens (training form).

    The paper's best scorer is the plainest: queries alone. Projections and norm are its ablation.
    """

    def __init__(self, config: CroprViTConfig):
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.scorer_num_heads
        self.antialias = config.interpolate_antialias
        self.query_grid = config.grid_size if config.num_queries is None else None  # with one query per patch
        self.queries = nn.Parameter(torch.empty(config.num_queries or config.num_patches, size))
        self.norm = nn.LayerNorm(size, eps=NORM_EPS) if config.scorer_pre_norm else nn.Identity()
        self.query_projection = nn.Linear(size, size, bias=False) if config.scorer_query_projection else nn.Identity()
        self.key_projection = nn.Linear(size, size, bias=False) if config.scorer_key_projection else nn.Identity()

    def init_weights(self) -> None:
        """Queries as in the paper: truncated normal, standard deviation D^(-1/2)."""
        _init_truncated_normal(self.queries, std=self.queries.shape[-1] ** -0.5)

    def forward(self) -> torch.Tensor:
        """The one vector (D,) that scores as all queries together do."""
        with maybe_autocast(device_type=self.queries.device.type, enabled=False):
            return fold_scorer(
                self.queries,
                query_projection=getattr(self.query_projection, "weight", None),
                key_projection=getattr(self.key_projection, "weight", None),
                norm_weight=getattr(self.norm, "weight", None),
            )

    def queries_for(self, grid_size: tuple[int, int] | None) -> torch.Tensor:
        """Queries (N, D) for an image of `grid_size` patches: one per patch are interpolated to another grid."""
        if self.query_grid is None or grid_size is None or grid_size == self.query_grid:
            return self.queries
        return resample_grid(self.queries[None], self.query_grid, grid_size, self.antialias)[0]

    @torch.no_grad()
    def unfold(self, folded_query: torch.Tensor) -> None:
        """Sets the weights so that they fold to `folded_query` (D,); the queries keep their random differences."""
        for projection in (self.query_projection, self.key_projection):
            if isinstance(projection, nn.Linear):
                nn.init.eye_(projection.weight)
        queries = self.queries.float()
        self.queries.copy_(queries + (folded_query.float() - queries.sum(dim=0)) / len(queries))
        # Half precision rounds each query; the first makes up for it.
        self.queries[0] += folded_query - self.queries.float().sum(dim=0)

    def split_heads(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, H, T, D / H)"""
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)


class FoldedScorer(nn.Module):
    """The scorer of a stripped model: one vector, which nothing trains."""

    def __init__(self, folded_query: torch.Tensor):
        super().__init__()
        self.folded_query = nn.Parameter(folded_query, requires_grad=False)

    def init_weights(self) -> None:
        """Spread of a single query."""
        _init_truncated_normal(self.folded_query, std=self.folded_query.shape[-1] ** -0.5)

    def forward(self) -> torch.Tensor:
        """The folded vector (D,)."""
        return self.folded_query

    def train(self, mode: bool = True) -> FoldedScorer:
        """Stays frozen: loading replaces parameters, and no loss reaches this one."""
        super().train(mode)
        return self.requires_grad_(False)


class Router(nn.Module):
    """Scorer and selector: decides which tokens stay."""

    def __init__(self, config: CroprViTConfig):
        super().__init__()
        self.pre_norm = config.scorer_pre_norm
        self.scorer: Scorer | FoldedScorer
        if config.use_auxiliary_heads:
            self.scorer = Scorer(config)
        else:
            self.scorer = FoldedScorer(torch.empty(config.hidden_size))

    def forward(self, state: TokenState, num_keep: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices of the kept and the pruned tokens; see `select_tokens`."""
        scores = score_tokens(state.hidden_states, self.scorer(), self.pre_norm)
        return select_tokens(scores, num_keep, state.num_prefix_tokens, state.padding_of_tokens())


class Aggregator(GradientCheckpointingLayer):
    """Gathers what the scorer attends to (training only): Z = softmax(Q Kᵀ / √d) V, then Z + MLP(LN(Z))."""

    def __init__(self, config: CroprViTConfig):
        super().__init__()
        size = config.hidden_size
        self.value_projection = (
            nn.Linear(size, size, bias=False) if config.aggregator_value_projection else nn.Identity()
        )
        # Several heads are mixed by a projection, as in the reference code; a single one needs none.
        self.output_projection = nn.Linear(size, size) if config.scorer_num_heads > 1 else nn.Identity()
        self.mlp: nn.Module | None = None
        if config.aggregator_mlp_ratio is not None:
            inner = int(size * config.aggregator_mlp_ratio)
            self.mlp = nn.Sequential(
                nn.LayerNorm(size, eps=NORM_EPS), nn.Linear(size, inner), ACT2FN["gelu"], nn.Linear(inner, size)
            )

    def forward(self, queries: torch.Tensor, hidden_states: torch.Tensor, scorer: Scorer) -> torch.Tensor:
        """Queries (N, D) and tokens (B, T, D) -> (B, N, D)"""
        hidden_states = scorer.norm(hidden_states)
        aggregated = aggregate_tokens(
            scorer.split_heads(scorer.query_projection(queries)[None]),
            scorer.split_heads(scorer.key_projection(hidden_states)),
            scorer.split_heads(self.value_projection(hidden_states)),
        )
        aggregated = self.output_projection(aggregated)
        return aggregated if self.mlp is None else aggregated + self.mlp(aggregated)


class AuxiliaryClassifier(nn.Linear):
    """Linear layer with first weights of its own; Transformers initialises only modules that hold parameters."""

    def init_weights(self) -> None:
        """As in the reference code: truncated normal 0.02, bias 0."""
        _init_truncated_normal(self.weight, std=0.02)
        init.zeros_(self.bias)


class AuxiliaryHead(nn.Module):
    """LayerNorm and classifier, whose loss trains the scorer (training only)."""

    def __init__(self, config: CroprViTConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)
        self.classifier = AuxiliaryClassifier(config.hidden_size, config.num_labels or 0)

    def forward(self, aggregated: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, N, C)"""
        return self.classifier(self.norm(aggregated))


@register_token_reducer
class CroprModule(TokenReducer):
    """Token Cropr after one block: router always, aggregator and auxiliary head for training.

    The module sees tokens through a stop-gradient: auxiliary losses train it and not the backbone, and the main loss,
    which reaches the backbone through the kept tokens, cannot reach it.
    """

    name = "cropr"
    has_auxiliary_heads = True

    def __init__(self, config: CroprViTConfig, block: int):
        super().__init__(config, block)
        self.router = Router(config)
        self.aggregator = Aggregator(config) if config.use_auxiliary_heads else None
        self.auxiliary_head = AuxiliaryHead(config) if config.use_auxiliary_heads else None

    def select(self, state: TokenState, num_keep: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `TokenReducer.select`."""
        with torch.no_grad():  # ranking has no gradient
            return self.router(state, num_keep)

    def forward(self, state: TokenState, num_keep: int) -> tuple[TokenState, torch.Tensor | None]:
        """See `TokenReducer.forward`."""
        auxiliary_logits = None
        if self.training and self.aggregator is not None and self.auxiliary_head is not None:
            scorer: Any = self.router.scorer  # not folded while there are heads
            aggregated = self.aggregator(scorer.queries_for(state.grid_size), state.hidden_states.detach(), scorer)
            auxiliary_logits = self.auxiliary_head(aggregated)
        state, _ = super().forward(state, num_keep)
        return state, auxiliary_logits

    def remove_auxiliary_heads(self) -> None:
        """See `TokenReducer.remove_auxiliary_heads`."""
        self.router.scorer = FoldedScorer(self.router.scorer().detach().clone()).train(self.training)
        self.aggregator = self.auxiliary_head = None

    def add_auxiliary_heads(self, config: CroprViTConfig, initialize: Callable[[nn.Module], Any]) -> None:
        """See `TokenReducer.add_auxiliary_heads`."""
        folded_query = self.router.scorer().detach()
        scorer, aggregator, head = Scorer(config), Aggregator(config), AuxiliaryHead(config)
        for module in (scorer, aggregator, head):
            module.to(folded_query).train(self.training)
            initialize(module)
        scorer.unfold(folded_query)
        self.router.scorer, self.aggregator, self.auxiliary_head = scorer, aggregator, head


# --------------------------------------------------------------------------------------------------------------------
# 5. Stripping
# --------------------------------------------------------------------------------------------------------------------


TRAINING_PARTS = ("router.scorer.", "aggregator.", "auxiliary_head.")


def fold_scorer(
    queries: torch.Tensor,
    query_projection: torch.Tensor | None = None,
    key_projection: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """One vector that ranks tokens as all queries do: Σₙ (W_q qₙ)ᵀ W_k (γ ⊙ x̂ + β) = fold · x̂ + constant.

    Scores are linear in the queries, and a sum over heads of products is the product over all channels, so neither
    the number of queries nor that of heads matters; the constant does not change a ranking.

    Args:
        queries: (N, D)
        query_projection, key_projection: weights (D, D) of linear layers, if there are any.
        norm_weight: (D,) scale of the norm before the attention, if there is one.

    Returns:
        (D,), in the dtype of `queries`, summed in float32.
    """
    folded = queries.float().sum(dim=0)
    if query_projection is not None:
        folded = query_projection.float() @ folded
    if key_projection is not None:
        folded = folded @ key_projection.float()
    if norm_weight is not None:
        folded = folded * norm_weight.float()
    return folded.to(queries.dtype)


def strip_state_dict(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of the stripped model from those of a model with auxiliary heads; other tensors pass unchanged.

    It reads nothing but `state_dict`, so it also serves gathered weights (FSDP, DeepSpeed).
    """
    stripped = {}
    for name, tensor in state_dict.items():
        match = re.fullmatch(r"(?P<module>(.*\.)?token_reducers\.\d+\.)(?P<part>.+)", name)
        part = match["part"] if match else ""
        if match and part == "router.scorer.queries":
            scorer = match["module"] + "router.scorer."
            stripped[scorer + "folded_query"] = fold_scorer(
                tensor,
                query_projection=state_dict.get(scorer + "query_projection.weight"),
                key_projection=state_dict.get(scorer + "key_projection.weight"),
                norm_weight=state_dict.get(scorer + "norm.weight"),
            )
        elif part == "router.scorer.folded_query" or not part.startswith(TRAINING_PARTS):
            stripped[name] = tensor
    return stripped
