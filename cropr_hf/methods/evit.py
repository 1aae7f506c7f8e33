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
"""EViT (Liang et al., ICLR 2022, arXiv 2202.07800): the patches that the CLS token attends to most stay.

The others leave in three blocks, and one new token stands for them. It has no parameters and works without training,
better with. Symbols: B images, T tokens now (P of them prefix), D hidden size, H heads, K patches kept.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from huggingface_hub.dataclasses import strict

from ..configuration_cropr_vit import CroprViTConfig
from ..token_reduction import AttentionFacts, StagedConfig, StagedReducer, register_token_reducer
from ..token_schedule import kept_by_steps
from ..token_state import TokenState, gather_tokens, select_tokens


CITATION = """@inproceedings{liang2022evit,
  title     = {Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations},
  author    = {Liang, Youwei and Ge, Chongjian and Tong, Zhan and Song, Yibing and Wang, Jue and Xie, Pengtao},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2022},
  url       = {https://arxiv.org/abs/2202.07800}
}"""


@strict
@dataclass
class EViTConfig(StagedConfig):
    """Fields of EViT in `config.reducer_config`.

    Attributes:
        keep_rate: share of the patch tokens that stay in each of `blocks`, rounded up, in (0, 1]. Instead of it a
            configuration can have `pruning_rate` or `pruning_schedule`, which count the new token as one that is left.
        blocks: where it acts, 1 to L; by default in those that begin the second, third and last quarter, as the
            paper's 4, 7 and 10 of 12.
        fuse_tokens: whether a new token stands for those that leave.
    """

    fuse_tokens: bool = True


@register_token_reducer
class EViTReducer(StagedReducer):
    """EViT in one block: between attention and MLP, the patches with the least attention of the CLS token leave.

    The attention is that of this block, after the softmax, as a mean over heads, computed beside the fused kernel. The
    new token is the sum of those that leave, weighted by it, which is less than their mean: weights of all tokens
    sum up to 1. From then on it is a patch token like any other, and can leave in turn. It stands nowhere, so that
    rotary positions leave it as it is, and what needs every patch does without it. The patches that stay keep their
    order, where the authors' code sorts them by attention.
    """

    name = "evit"
    label = "EViT"
    title = "EViT"
    url = "https://arxiv.org/abs/2202.07800"
    citation = CITATION
    config_class = EViTConfig
    training_recipe = {  # of the authors' code, for fine-tuning: the keep rate from the start, and no teacher
        "num_train_epochs": 30,
        "learning_rate": 8e-5,  # 2e-5 per 512 images; they have 2048 in a step
        "lr_scheduler_kwargs": {"min_lr": 2e-6},
        "warmup_steps": 0,
        "weight_decay": 1e-6,
        "layer_decay": 1.0,
        "drop_path_rate": 0.0,  # they fine-tune in evaluation mode
    }
    acts_inside = True
    needs_cls = True

    def __init__(self, config: CroprViTConfig, block: int):
        super().__init__(config, block)
        self.fuse_tokens = self.setting(config, "fuse_tokens")

    @classmethod
    def kept_by_default(cls, config: CroprViTConfig, num_patches: int) -> list[int]:
        """By `keep_rate`: of n patch tokens ⌈keep_rate · n⌉ stay, and the new one beside them."""
        rate, fuses = cls.setting(config, "keep_rate"), cls.setting(config, "fuse_tokens")

        def leave(left: int, _: int) -> int:
            best = math.ceil(round(rate * left, 6))  # 0.7 * 10 is 7, not 7.000000000000001
            return min(left, best + fuses)  # one that would leave alone stays

        return kept_by_steps(config, cls, num_patches, leave)

    @classmethod
    def reachable_counts(cls, config: CroprViTConfig, num_patches: int, kept: Sequence[int]) -> list[int]:
        """See `TokenReducer.reachable_counts`: beside the new token one patch stays."""
        least = 1 + cls.setting(config, "fuse_tokens")
        return [max(count, min(least, before)) for before, count in pairwise([num_patches, *kept])]

    def after_attention(self, state: TokenState, num_keep: int, facts: AttentionFacts) -> TokenState:
        """See `TokenReducer.after_attention`."""
        if num_keep == state.num_patches:
            return state
        attention = facts.class_attention().mean(dim=1)  # (B, T)
        kept, others = select_tokens(
            attention.detach(), num_keep - self.fuse_tokens, state.num_prefix_tokens, state.padding_of_tokens()
        )
        reduced = state.prune(kept, others, self.block)
        if not self.fuse_tokens:
            return reduced
        (left,) = gather_tokens(others, state.hidden_states)
        # (B, 1, T - K) x (B, T - K, D) -> (B, 1, D)
        return reduced.append(attention.gather(1, others)[:, None].to(left.dtype) @ left)


__all__ = ["EViTConfig", "EViTReducer"]
