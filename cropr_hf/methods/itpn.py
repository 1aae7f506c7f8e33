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
"""Token migration of Fast-iTPN (Tian et al., TPAMI 2024, arXiv 2211.12735v2), re-implemented: redundant tokens leave.

They skip the blocks that follow, and come back where no attention needs them: in feature maps, pyramids, dense heads.
The authors' code has none of it, and their text says no more than that a similarity decides: which blocks, how many,
and the similarity itself are ours. It has no parameters and needs no training. Their second idea, tokens that gather
what windows find, is no method but what prefix tokens do in windowed attention (`CroprViTAttention`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from huggingface_hub.dataclasses import strict

from ..configuration_cropr_vit import CroprViTConfig
from ..token_reduction import StagedConfig, StagedReducer, register_token_reducer
from ..token_schedule import halved_at_most, kept_by_steps
from ..token_state import TokenState, rank_by_similarity


CITATION = """@article{tian2024fastitpn,
  title   = {{Fast-iTPN}: Integrally Pre-Trained Transformer Pyramid Network With Token Migration},
  author  = {Tian, Yunjie and Xie, Lingxi and Qiu, Jihao and Jiao, Jianbin and Wang, Yaowei and Tian, Qi and
             Ye, Qixiang},
  journal = {IEEE Transactions on Pattern Analysis and Machine Intelligence},
  year    = {2024},
  url     = {https://arxiv.org/abs/2211.12735}
}"""


@strict
@dataclass
class MigrationConfig(StagedConfig):
    """Fields of token migration in `config.reducer_config`; all defaults are ours.

    Attributes:
        keep_rate: share of the patch tokens that stay after each of `blocks`, in [0.5, 1]. Instead of it a
            configuration can have `pruning_rate` or `pruning_schedule`.
        blocks: after which blocks tokens leave, 1 to L; by default the last of each quarter but the fourth.
    """

    def __post_init__(self) -> None:
        if not 0.5 <= self.keep_rate <= 1:
            raise ValueError(
                f"`keep_rate` is {self.keep_rate}; it must be in [0.5, 1], as of two tokens that are alike one stays."
            )
        super().__post_init__()


@register_token_reducer
class MigrationReducer(StagedReducer):
    """Token migration after one block: patches that look most like another one leave.

    Tokens at even places are compared with those at odd places, as ToMe does, so that of two that are alike one stays.
    With `prune_padding_first`, those of padding leave first, as far as they are at even places. What leaves keeps the
    state that it has then. Feature maps of any stage show it, and dense tasks have it back before their last block; a
    classifier pools what is left, or everything with last layer fusion.
    """

    name = "itpn"
    label = "Token migration"
    title = "Fast-iTPN token migration (re-implementation)"
    url = "https://arxiv.org/abs/2211.12735"
    citation = CITATION
    config_class = MigrationConfig
    supports_windows = True

    @classmethod
    def kept_by_default(cls, config: CroprViTConfig, num_patches: int) -> list[int]:
        """By `keep_rate`, rounded up."""
        rate = cls.setting(config, "keep_rate")
        kept = kept_by_steps(config, cls, num_patches, lambda left, _: math.ceil(round(rate * left, 6)))
        return cls.reachable_counts(config, num_patches, kept)

    @classmethod
    def reachable_counts(cls, config: CroprViTConfig, num_patches: int, kept: Sequence[int]) -> list[int]:
        """See `TokenReducer.reachable_counts`: at most half of the patch tokens leave after a block."""
        return halved_at_most(num_patches, kept)

    def after_block(self, state: TokenState, num_keep: int) -> TokenState:
        """See `TokenReducer.after_block`."""
        num_leave = state.num_patches - num_keep
        if not num_leave:
            return state
        with torch.no_grad():  # a choice has no gradient
            tokens = state.hidden_states.detach()
            metric = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
            similar, _ = rank_by_similarity(metric, state.num_prefix_tokens)
            padding = state.padding_of_tokens()
            if padding is not None:
                first = padding.gather(1, similar).to(torch.uint8).argsort(dim=1, descending=True, stable=True)
                similar = similar.gather(1, first)
            leaving = similar[:, :num_leave]
            length = tokens.shape[1]
            leaves = torch.zeros_like(tokens[..., 0], dtype=torch.long).scatter(1, leaving, 1)
            staying = leaves.argsort(dim=1, stable=True)[:, : length - num_leave]
        return state.prune(staying, leaving, self.block)


__all__ = ["MigrationConfig", "MigrationReducer"]
