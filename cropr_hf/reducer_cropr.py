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
"""Token Cropr (Bergner, Lippert, Mahendran, CVPR 2025, arXiv 2412.00965): the method of the paper, top to bottom.

1. What it computes: pure functions on tensors.
2. The parts: scorer and router, aggregator, auxiliary head.
3. `CroprModule`, which follows a block: in inference, in training, and stripped.

Symbols: B images, T tokens (prefix and patches), N queries, H heads, D hidden size, C classes (or channels of the
embedding, for queries that predict it).
"""

# No `from __future__ import annotations` here: it would switch the type checks of `@strict` off.
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import maybe_autocast

from .configuration_cropr_vit import CroprViTConfig
from .token_reduction import OwnWeights, ReducerConfig, TokenReducer, register_token_reducer
from .token_state import TokenState, resample_grid


NORM_EPS = 1e-6  # of the norms inside a Cropr module, as in the reference code

CITATION = """@inproceedings{bergner2025tokencropr,
  title     = {Token Cropr: Faster ViTs for Quite a Few Tasks},
  author    = {Bergner, Benjamin and Lippert, Christoph and Mahendran, Aravindh},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2025},
  url       = {https://arxiv.org/abs/2412.00965}
}"""


# --------------------------------------------------------------------------------------------------------------------
# 1. What it computes
# --------------------------------------------------------------------------------------------------------------------


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


def choose_by_mass(logits: torch.Tensor, mass: float, most: int) -> torch.Tensor:
    """The fewest tokens of each image that together hold a share of the attention (ours; the paper keeps a number).

    Args:
        logits: (B, N), float32; −∞ for what is not to be chosen.
        mass: the share, in (0, 1].
        most: tokens that are chosen at most.

    Returns:
        (B, N), true for what is chosen, one or more of each image. Of equal logits the first counts first.
    """
    weights, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(logits.shape[-1], device=logits.device)
    # What a token holds with all that follow it: summed from the smallest, so that shares near 1 are exact as well.
    rest = weights.flip(-1).cumsum(dim=-1).flip(-1)
    is_needed = (rest > 1 - mass) | (ranks == 0)
    return torch.zeros_like(is_needed).scatter(-1, order, is_needed & (ranks < most))


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
# 2. The parts
# --------------------------------------------------------------------------------------------------------------------


def _init_query(tensor: torch.Tensor) -> None:
    """As in the reference code: normal, standard deviation D^(-1/2), cut at two of these."""
    std = tensor.shape[-1] ** -0.5
    init.trunc_normal_(tensor, std=std, a=-2 * std, b=2 * std)


class Scorer(OwnWeights):
    """Learnable queries and the optional parts of their attention to the tokens (training form).

    The paper's best scorer is the plainest: queries alone. Projections and norm are its ablation.
    """

    def __init__(self, config: CroprViTConfig):
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.scorer_num_heads
        self.antialias = config.interpolate_antialias
        self.query_counts = config.query_counts  # of patches, which come first, and of the image
        self.query_grid = config.grid_size if self.query_counts[0] else None
        self.queries_per_step = config.patch_queries_per_step
        self.queries = nn.Parameter(torch.empty(sum(self.query_counts), size))
        self.norm = nn.LayerNorm(size, eps=NORM_EPS) if config.scorer_pre_norm else nn.Identity()
        self.query_projection = nn.Linear(size, size, bias=False) if config.scorer_query_projection else nn.Identity()
        self.key_projection = nn.Linear(size, size, bias=False) if config.scorer_key_projection else nn.Identity()

    def init_weights(self) -> None:
        """See `_init_query`; projections and norm are those of the library."""
        _init_query(self.queries)

    def forward(self) -> torch.Tensor:
        """The one vector (D,) that scores as all queries together do."""
        with maybe_autocast(device_type=self.queries.device.type, enabled=False):
            return fold_scorer(
                self.queries,
                query_projection=getattr(self.query_projection, "weight", None),
                key_projection=getattr(self.key_projection, "weight", None),
                norm_weight=getattr(self.norm, "weight", None),
            )

    def stripped_weights(self) -> dict[str, torch.Tensor]:
        """See `OwnWeights.stripped_weights`: that of `FoldedScorer`."""
        return {"folded_query": self()}

    def draw_patches(self, grid_size: tuple[int, int] | None) -> torch.Tensor | None:
        """Patches (n,) of an image of `grid_size` whose queries predict in a training step; `None` is all."""
        if self.query_grid is None or self.queries_per_step is None:
            return None
        rows, columns = grid_size or self.query_grid
        if self.queries_per_step >= rows * columns:
            return None
        return torch.randperm(rows * columns, device=self.queries.device)[: self.queries_per_step]

    def queries_for(self, grid_size: tuple[int, int] | None, patches: torch.Tensor | None = None) -> torch.Tensor:
        """Queries (N, D) for an image of `grid_size` patches: one per patch are interpolated to another grid.

        Those of patches can be restricted to `patches` (n,).
        """
        if self.query_grid is None:
            return self.queries
        grid_size = grid_size or self.query_grid
        if grid_size == self.query_grid and patches is None:
            return self.queries
        of_patches, of_image = self.queries.split(self.query_counts)
        if grid_size != self.query_grid:
            of_patches = resample_grid(of_patches[None], self.query_grid, grid_size, self.antialias)[0]
        if patches is not None:
            of_patches = of_patches[patches]
        return torch.cat([of_patches, of_image])

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


class FoldedScorer(OwnWeights):
    """The scorer of a stripped model: one vector, which nothing trains."""

    def __init__(self, folded_query: torch.Tensor):
        super().__init__()
        self.folded_query = nn.Parameter(folded_query, requires_grad=False)

    def init_weights(self) -> None:
        """Spread of a single query."""
        _init_query(self.folded_query)

    def forward(self) -> torch.Tensor:
        """The folded vector (D,)."""
        return self.folded_query

    def train(self, mode: bool = True) -> "FoldedScorer":
        """Stays frozen: loading replaces parameters, and no loss reaches this one."""
        super().train(mode)
        return self.requires_grad_(False)


class Router(nn.Module):
    """Scores tokens; the best stay."""

    def __init__(self, config: CroprViTConfig):
        super().__init__()
        self.pre_norm = config.scorer_pre_norm
        self.scorer: Scorer | FoldedScorer
        if config.use_auxiliary_heads:
            self.scorer = Scorer(config)
        else:
            self.scorer = FoldedScorer(torch.empty(config.hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T), float32"""
        return score_tokens(hidden_states, self.scorer(), self.pre_norm)


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


class AuxiliaryClassifier(OwnWeights, nn.Linear):
    """Linear layer with first weights of its own."""

    def init_weights(self) -> None:
        """As in the reference code: normal, standard deviation 0.02, in effect not cut (at 100 of these); bias 0."""
        init.trunc_normal_(self.weight, std=0.02)
        init.zeros_(self.bias)


class AuxiliaryHead(nn.Module):
    """LayerNorm and classifier, whose loss trains the scorer (training only); queries of two kinds have one each."""

    def __init__(self, config: CroprViTConfig):
        super().__init__()
        of_patches, self.num_image_queries = config.query_counts
        self.norm = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)
        self.classifier = AuxiliaryClassifier(config.hidden_size, config.auxiliary_size)
        self.image_classifier: nn.Module | None = None
        if of_patches and self.num_image_queries:
            self.image_classifier = AuxiliaryClassifier(config.hidden_size, config.auxiliary_size)

    def forward(self, aggregated: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, N, C)"""
        aggregated = self.norm(aggregated)
        if self.image_classifier is None:
            return self.classifier(aggregated)
        of_patches, of_image = aggregated[:, : -self.num_image_queries], aggregated[:, -self.num_image_queries :]
        return torch.cat([self.classifier(of_patches), self.image_classifier(of_image)], dim=1)


# --------------------------------------------------------------------------------------------------------------------
# 3. The module after a block
# --------------------------------------------------------------------------------------------------------------------


@strict
@dataclass
class CroprConfig(ReducerConfig):
    """Fields of Cropr in `config.reducer_config`; those of its scorer and aggregator are the configuration's own.

    Attributes:
        mass_threshold: in inference, keep in each image only as many patch tokens as hold this share of the queries'
            attention, in (0, 1], and never more than the schedule says; `None` keeps what the schedule says (the
            paper). Training is the same.
    """

    mass_threshold: float | int | None = None

    def __post_init__(self) -> None:
        if self.mass_threshold is not None and not 0 < self.mass_threshold <= 1:
            raise ValueError(f"`mass_threshold` is {self.mass_threshold}; it must be in (0, 1], such as 0.9, or None.")


@register_token_reducer
class CroprModule(TokenReducer):
    """Token Cropr after one block: router always, aggregator and auxiliary head for training.

    The module sees tokens through a stop-gradient: auxiliary losses train it and not the backbone, and the main loss,
    which reaches the backbone through the kept tokens, cannot reach it.
    """

    name = "cropr"
    label = "Cropr"
    title = "Token Cropr"
    url = "https://arxiv.org/abs/2412.00965"
    citation = CITATION
    config_class = CroprConfig
    learns = True
    supports_auxiliary_heads = True
    supports_windows = True
    fixed_weights = ("router.scorer.queries",)
    training_parts = ("router.scorer.", "aggregator.", "auxiliary_head.")

    def __init__(self, config: CroprViTConfig, block: int):
        super().__init__(config, block)
        self.mass_threshold = self.setting(config, "mass_threshold")
        head_size = config.hidden_size // config.scorer_num_heads
        self.scaling = head_size**-0.5 / sum(config.query_counts)  # of scores, to mean logits of the queries
        self.router = Router(config)
        self.aggregator = Aggregator(config) if config.use_auxiliary_heads else None
        self.auxiliary_head = AuxiliaryHead(config) if config.use_auxiliary_heads else None

    def after_block(self, state: TokenState, num_keep: int) -> TokenState:
        """Auxiliary logits in training; then the tokens with the best scores stay."""
        if self.training and self.aggregator is not None and self.auxiliary_head is not None:
            scorer: Any = self.router.scorer  # not folded while there are heads
            patches = state.auxiliary_patches if state.auxiliary_logits else scorer.draw_patches(state.grid_size)
            queries = scorer.queries_for(state.grid_size, patches)
            aggregated = self.aggregator(queries, state.hidden_states.detach(), scorer)
            logits = {**state.auxiliary_logits, self.block: self.auxiliary_head(aggregated)}
            state = state.updated(auxiliary_logits=logits, auxiliary_patches=patches)
        # Without data, as where multiply-adds are counted, it is the schedule: the most that stays.
        if self.mass_threshold is None or self.training or state.hidden_states.is_meta:
            return self.keep_best(state, num_keep)
        return self.keep_mass(state, num_keep)

    @classmethod
    def counts_vary(cls, config: CroprViTConfig) -> bool:
        """See `TokenReducer.counts_vary`: with `mass_threshold`, and the schedule is the most."""
        return cls.setting(config, "mass_threshold") is not None

    def keep_mass(self, state: TokenState, num_keep: int) -> TokenState:
        """Prunes to the patch tokens that hold `mass_threshold` of the attention, `num_keep` at most.

        Images are packed, or masked in graphs, whose shapes are fixed.
        """
        prefix, padding, sizes = state.num_prefix_tokens, state.padding_of_tokens(), state.sizes
        with torch.no_grad():
            logits = self.scores(state) * self.scaling
            if sizes is not None:  # 0: what was dropped before, or fills up rows
                logits = logits.masked_fill(sizes == 0, -torch.inf)
            if padding is not None:
                logits = logits.masked_fill(padding, -torch.inf)
            stays = choose_by_mass(logits[:, prefix:], self.mass_threshold, num_keep)
        return state.drop(F.pad(stays, (prefix, 0), value=True), self.block, packs=not torch.compiler.is_compiling())

    def scores(self, state: TokenState) -> torch.Tensor:
        """See `TokenReducer.scores`."""
        return self.router(state.hidden_states)

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

    @classmethod
    def strip(cls, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The folded vector in place of the queries and of all that only training needs."""
        stripped = {name: tensor for name, tensor in weights.items() if not name.startswith(cls.training_parts)}
        if "router.scorer.queries" in weights:
            stripped["router.scorer.folded_query"] = fold_scorer(
                weights["router.scorer.queries"],
                query_projection=weights.get("router.scorer.query_projection.weight"),
                key_projection=weights.get("router.scorer.key_projection.weight"),
                norm_weight=weights.get("router.scorer.norm.weight"),
            )
        elif "router.scorer.folded_query" in weights:
            stripped["router.scorer.folded_query"] = weights["router.scorer.folded_query"]
        return stripped


__all__ = ["CroprModule"]
