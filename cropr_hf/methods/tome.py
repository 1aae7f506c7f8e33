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
"""Token Merging (Bolya et al., ICLR 2023, arXiv 2210.09461): the most similar tokens are merged in every block.

It has no parameters and needs no training. Symbols: B images, T tokens now (P of them prefix), D hidden size, r tokens
merged, A and B the two sets of the matching.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from huggingface_hub.dataclasses import strict

from ..configuration_cropr_vit import CroprViTConfig
from ..token_reduction import AttentionFacts, ReducerConfig, TokenReducer, register_token_reducer
from ..token_schedule import halved_at_most, pruning_blocks, round_up
from ..token_state import KEY_BIAS, SIZES, TokenState, gather_tokens, rank_by_similarity


CITATION = """@inproceedings{bolya2023tome,
  title     = {Token Merging: Your {ViT} but Faster},
  author    = {Bolya, Daniel and Fu, Cheng-Yang and Dai, Xiaoliang and Zhang, Peizhao and Feichtenhofer, Christoph and
               Hoffman, Judy},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2023},
  url       = {https://arxiv.org/abs/2210.09461}
}"""


@strict
@dataclass
class ToMeConfig(ReducerConfig):
    """Fields of ToMe in `config.reducer_config`.

    Attributes:
        proportional_attention: a token that stands for s tokens counts s times as a key (section 3). On as in the
            paper's results on supervised models; the authors turn it off for MAE models that are not trained with it.
        rate_inflection: in [-1, 1]; how `pruning_rate` changes with depth: 0 is constant, -1 falls from twice the rate
            to 0, 1 rises from 0 to twice the rate.
    """

    proportional_attention: bool = True
    rate_inflection: float | int = 0.0

    def __post_init__(self) -> None:
        if not -1 <= self.rate_inflection <= 1:
            raise ValueError(f"`rate_inflection` is {self.rate_inflection}; it must be in [-1, 1].")


def match_tokens(metric: torch.Tensor, num_merge: int, num_prefix_tokens: int = 0) -> tuple[torch.Tensor, ...]:
    """Bipartite soft matching (section 3): tokens at even places (A) look for the most similar one at odd places (B).

    Of equal similarities the token that comes first wins.

    Args:
        metric: (B, T, d), what similarity is measured on, by the cosine.
        num_merge: r, tokens of A that are merged, at most half of the tokens that are not prefix.
        num_prefix_tokens: tokens at the start that neither merge nor are merged into.

    Returns:
        `survivors` (B, T - r), places of the tokens that are left: first the prefix, then the others of A and all of
        B, in raster order each, by which the next block pairs anew; `merged` (B, r), places of the others, the most
        similar first; and `slots` (B, T), where among the survivors each token went.
    """
    length, device = metric.shape[1], metric.device
    places = torch.arange(length, device=device)
    is_prefix = places < num_prefix_tokens
    similar, partners = rank_by_similarity(metric, num_prefix_tokens)
    merged, target = similar[:, :num_merge], partners[:, :num_merge]

    # Survivors: what sorts first by (prefix, set, place). Merged tokens go to the end.
    rank = torch.where(is_prefix, places, length * (1 + places % 2) + places).expand(metric.shape[0], -1)
    rank = rank.scatter(1, merged, 3 * length)
    survivors = rank.argsort(dim=1, stable=True)[:, : length - num_merge]
    slots = torch.zeros_like(rank).scatter(1, survivors, places[: length - num_merge].expand_as(survivors))
    return survivors, merged, slots.scatter(1, merged, slots.gather(1, target))


def merge_tokens(
    tokens: torch.Tensor, sizes: torch.Tensor, survivors: torch.Tensor, merged: torch.Tensor, slots: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of tokens that go to the same slot, weighted by their sizes.

    Args:
        tokens: (B, T, D)
        sizes: (B, T), how many tokens each one stands for.
        survivors, merged, slots: see `match_tokens`.

    Returns:
        Tokens (B, T - r, D), those that nothing was merged into unchanged, and their sizes (B, T - r).
    """
    left, others = gather_tokens(survivors, tokens)[0], gather_tokens(merged, tokens)[0]
    into = slots.gather(1, merged)
    left_sizes, other_sizes = sizes.gather(1, survivors), sizes.gather(1, merged)
    new_sizes = left_sizes.scatter_add(1, into, other_sizes)
    left = left * (left_sizes / new_sizes)[..., None].to(tokens.dtype)
    others = others * (other_sizes / new_sizes.gather(1, into))[..., None].to(tokens.dtype)
    return left.scatter_add(1, into[..., None].expand_as(others), others), new_sizes


@register_token_reducer
class ToMeReducer(TokenReducer):
    """ToMe in one block: between attention and MLP, the most similar pairs of tokens become one.

    Tokens are compared by their keys, averaged over heads, before any rotation: by what they show, not where they
    stand. A merged token keeps the place of the one that it was merged into, for rotary positions as well. What needs
    every patch gets copies ("unmerging"). The paper knows one CLS token and a distillation token; here no prefix token
    is ever merged.

    `pruning_rate` is r of the paper. No block merges more than half of its patch tokens, so that a high rate saturates
    (197 tokens and r = 16 end with 37, 21, 11). Means over tokens are weighted by their sizes, which the authors' code
    does for MAE alone.
    """

    name = "tome"
    label = "ToMe"
    title = "ToMe"
    url = "https://arxiv.org/abs/2210.09461"
    citation = CITATION
    config_class = ToMeConfig
    merges = True
    acts_inside = True
    fuses_by_default = False

    def __init__(self, config: CroprViTConfig, block: int):
        super().__init__(config, block)
        self.proportional_attention = self.setting(config, "proportional_attention")

    @classmethod
    def uses_key_bias(cls, config: CroprViTConfig) -> bool:
        """See `TokenReducer.uses_key_bias`."""
        return cls.setting(config, "proportional_attention")

    @classmethod
    def kept_by_rate(cls, config: CroprViTConfig, num_patches: int, rate: int) -> list[int]:
        """See `TokenReducer.kept_by_rate`; rounding is that of the authors' code."""
        blocks, inflection = pruning_blocks(config, cls), cls.setting(config, "rate_inflection")
        first = int(rate * (1 - inflection))
        rise, gaps = 2 * (rate - first), max(config.num_hidden_layers - 1, 1)
        kept, remaining = [], num_patches
        for block in range(1, config.num_hidden_layers + 1):
            if block in blocks:
                remaining -= min(int(first + rise * (block - 1) / gaps), remaining // 2)
            kept.append(remaining)
        return cls.reachable_counts(config, num_patches, round_up(config, kept, num_patches))

    @classmethod
    def reachable_counts(cls, config: CroprViTConfig, num_patches: int, kept: Sequence[int]) -> list[int]:
        """See `TokenReducer.reachable_counts`: a block merges at most half of its patch tokens."""
        return halved_at_most(num_patches, kept)

    def after_attention(self, state: TokenState, num_keep: int, facts: AttentionFacts) -> TokenState:
        """See `TokenReducer.after_attention`."""
        num_merge = state.num_patches - num_keep
        if not num_merge:
            return state
        with torch.no_grad():  # a matching has no gradient
            # (B, H, T, d) -> (B, T, d)
            keys = facts.content_keys
            metric = keys.to(torch.promote_types(keys.dtype, torch.float32)).mean(dim=1)
            survivors, merged, slots = match_tokens(metric, num_merge, state.num_prefix_tokens)
        sizes = torch.ones_like(slots, dtype=metric.dtype) if state.sizes is None else state.sizes
        tokens, sizes = merge_tokens(state.hidden_states, sizes, survivors, merged, slots)
        columns = {SIZES: sizes, **({KEY_BIAS: sizes.log()} if self.proportional_attention else {})}
        return state.merge(tokens, survivors, merged, slots, self.block, columns)


__all__ = ["ToMeConfig", "ToMeReducer"]
