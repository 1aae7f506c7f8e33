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
"""AS-ViT (Liu et al., IJCAI 2023, arXiv 2209.13802): of each image the patches stay whose score is above a threshold.

The score is the attention of the CLS token, in which heads that say more about a patch count more. Three thresholds
are learned: in training attention masks what is below, and a loss pulls the multiply-adds to a budget. So an image has
as many patches as it needs. Symbols: B images, T tokens (P of them prefix), N patches, D hidden size, H heads, d head
size, L blocks.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from ..configuration_cropr_vit import CroprViTConfig
from ..token_reduction import (
    AttentionFacts,
    OwnWeights,
    ReducerConfig,
    StagedReducer,
    check_blocks,
    register_token_reducer,
)
from ..token_schedule import kept_by_steps, pruning_blocks
from ..token_state import POLICY, TokenState, mask_tokens


CITATION = """@inproceedings{liu2023adaptive,
  title     = {Adaptive Sparse {ViT}: Towards Learnable Adaptive Token Pruning by Fully Exploiting Self-Attention},
  author    = {Liu, Xiangcheng and Wu, Tianyi and Guo, Guodong},
  booktitle = {International Joint Conference on Artificial Intelligence (IJCAI)},
  year      = {2023},
  url       = {https://arxiv.org/abs/2209.13802}
}"""

EVAL_MODES = ("adaptive", "batch_mean", "topk")
IMPORTANCE_EPS = 1e-8  # of the sum of norms, as in the authors' code
FIRST_THRESHOLD = 1e-3  # before training, times 1, 2, 3, as in the authors' code
THRESHOLD_PATCHES = 196  # of the images for which the authors' thresholds are
BUDGET_LOSS = "budget_loss"
SCORES = "scores"  # column of a state from the attention of a block to its end


@strict
@dataclass
class ASViTConfig(ReducerConfig):
    """Fields of AS-ViT in `config.reducer_config`.

    Attributes:
        budget: kappa, share of the multiply-adds of the unpruned encoder that an image has on the mean, in (0, 1]; 1
            prunes nothing. Instead of it a configuration can have `pruning_rate` or `pruning_schedule`, whose
            multiply-adds are the budget then.
        blocks: after which it acts, and whose attention it reads, 1 to L; by default those that begin the second,
            third and last quarter, as the authors' 4, 7 and 10 of 12.
        thresholds: before training, one for each of `blocks`; by default 0.001, 0.002, 0.003, as in the authors' code.
            They are for 196 patches: scores of N patches are compared times N / 196, since attention is shared by all.
        temperature: tau of the sigmoid through which decisions have a gradient; 1e-4 as in the authors' code.
        budget_loss_weight: of the loss that pulls the multiply-adds, in 1e9, to the budget; 2 as in the authors' code.
        eval_mode: how inference chooses. "adaptive": what is above the thresholds, in each image for itself, as the
            authors' code does with single images. "batch_mean": so many of the best as are above on the mean of the
            batch, in every image, as their code does with batches; an output then depends on the other images.
            "topk": as many as the schedule says, in every image (ours: fixed shapes at a known cost).
    """

    budget: float | int = 0.65
    blocks: list[int] | None = None
    thresholds: list[float | int] | None = None
    temperature: float | int = 1e-4
    budget_loss_weight: float | int = 2.0
    eval_mode: str = "adaptive"

    def __post_init__(self) -> None:
        if not 0 < self.budget <= 1:
            raise ValueError(f"`budget` is {self.budget}; it must be in (0, 1], such as {type(self).budget}.")
        check_blocks(self.blocks)
        if self.temperature <= 0:
            raise ValueError(f"`temperature` is {self.temperature}; it must be positive, such as 1e-4.")
        if self.budget_loss_weight < 0:
            raise ValueError(f"`budget_loss_weight` is {self.budget_loss_weight}; it must be 0 or more.")
        if self.eval_mode not in EVAL_MODES:
            raise ValueError(f"`eval_mode` is {self.eval_mode!r}; choose one of {', '.join(EVAL_MODES)}.")


# --------------------------------------------------------------------------------------------------------------------
# What it computes
# --------------------------------------------------------------------------------------------------------------------


def weighted_class_attention(attention: torch.Tensor, contexts: torch.Tensor) -> torch.Tensor:
    """What the CLS token attends to each token, as a mean over heads: a head counts by the norm of what it gathers
    for that token, as a share of all heads.

    Args:
        attention: of the CLS token, (B, H, T).
        contexts: (B, T, H, d), see `AttentionFacts`.

    Returns:
        (B, T), of the order of 1 / T, in float32 or wider.
    """
    norms = contexts.to(torch.promote_types(contexts.dtype, torch.float32)).norm(dim=-1)
    importance = norms / (norms.sum(dim=-1, keepdim=True) + IMPORTANCE_EPS)
    # (B, H, T) * (B, H, T) -> (B, T)
    return (attention * importance.transpose(1, 2)).sum(dim=1)


@dataclass(frozen=True)
class BlockCost:
    """Multiply-adds of a block, in 1e9: with an MLP of four times the width as the authors count, 12 D² n + 2 D n².

    Attributes:
        token: of a token for itself.
        pair: of two tokens, one of which attends to the other.
    """

    token: float
    pair: float

    @classmethod
    def of(cls, config: CroprViTConfig) -> "BlockCost":
        """That of the blocks of a model."""
        size, num_matrices = config.hidden_size, 3 if config.use_gated_mlp else 2
        return cls((4 * size**2 + num_matrices * size * config.intermediate_size) / 1e9, 2 * size / 1e9)

    def __call__(self, tokens: Any) -> Any:
        """Of so many tokens, prefix included: a number, or a tensor of numbers."""
        return (self.token + self.pair * tokens) * tokens


def best_of_each(scores: torch.Tensor, is_above: torch.Tensor) -> torch.Tensor:
    """The best patches of each image, as many as are above on the mean of the batch, rounded down.

    Args:
        scores: (B, N); what is not a number is the lowest. Of equal scores the first counts first.
        is_above: (B, N)

    Returns:
        (B, N), true for what is chosen.
    """
    number = is_above.sum() // scores.shape[0]
    # By their negatives, as in an ascending order what is not a number comes last.
    ranks = (-scores).argsort(dim=1, stable=True).argsort(dim=1)
    return ranks < number


class Threshold(OwnWeights):
    """A learned number that scores have to be above.

    Args:
        first: its value before training.
        temperature: of the sigmoid through which it learns.
    """

    def __init__(self, first: float, temperature: float):
        super().__init__()
        self.first, self.temperature = float(first), temperature
        self.value = nn.Parameter(torch.full((1,), self.first))

    def init_weights(self) -> None:
        """See `first`."""
        init.constant_(self.value, self.first)

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores -> whether each is above."""
        return scores > self.value

    def decide(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores -> exactly 1 above and 0 elsewhere, with the gradient of a sigmoid (straight-through)."""
        soft = ((scores - self.value) / self.temperature).sigmoid()
        return self(scores).to(soft.dtype) + (soft - soft.detach())  # the bracket is exactly 0


# --------------------------------------------------------------------------------------------------------------------
# The module after a block
# --------------------------------------------------------------------------------------------------------------------


@register_token_reducer
class ASViTReducer(StagedReducer):
    """AS-ViT after one block, by the attention in it.

    Inference packs the images of a batch, or masks in graphs, whose shapes are fixed. Training masks as DynamicViT
    does: a dropped token counts 1e-6 as a key (in the authors' code 1e-6 / T), and what is dropped stays so, which
    there follows from its attention being next to nothing.

    The budget is that of the schedule, which stands for the numbers where there is no data: by default r, r² and r³ of
    the patches are left after its blocks, where r follows from `budget`. The loss is a mean over images as they are,
    so that some keep more and others fewer. Where the schedule keeps all patches, as a curriculum does at first, all
    stay, and only the loss speaks.
    """

    name = "asvit"
    label = "AS-ViT"
    title = "Adaptive Sparse ViT"
    url = "https://arxiv.org/abs/2209.13802"
    citation = CITATION
    config_class = ASViTConfig
    budget_field = "budget"
    training_recipe = {
        "distill_logits": 0.5,  # of the losses in the authors' code
        # Of its command for DeiT-S, `finetune.sh`:
        "num_train_epochs": 30,
        "learning_rate": 2e-5,  # per 512 images, of which a step has as many
        "lr_scheduler_kwargs": {"min_lr": 2e-6},
        "weight_decay": 1e-6,
        "warmup_steps": 0,
        "layer_decay": 1.0,
        "drop_path_rate": 0.0,
    }
    learns = True
    reads_attention = True
    needs_cls = True

    def __init__(self, config: CroprViTConfig, block: int):
        super().__init__(config, block)
        settings, stage = self.settings(config), pruning_blocks(config, type(self)).index(block)
        self.config, self.stage, self.eval_mode = config, stage + 1, settings.eval_mode
        lengths, self.cost = self._lengths(config), BlockCost.of(config)
        self.num_blocks, self.is_last = lengths[stage], self.stage == len(lengths)
        first = FIRST_THRESHOLD * self.stage if settings.thresholds is None else settings.thresholds[stage]
        self.loss_weight, self.threshold = settings.budget_loss_weight, Threshold(first, settings.temperature)

    # The budget, and the schedule that meets it

    @classmethod
    def _lengths(cls, config: CroprViTConfig) -> list[int]:
        """How many blocks work on what each module leaves."""
        last = config.num_hidden_layers - bool(config.last_layer_fusion)
        return [after - block for block, after in pairwise([*pruning_blocks(config, cls), last])]

    @classmethod
    def _rate(cls, config: CroprViTConfig, num_patches: int) -> float:
        """r, for which the multiply-adds are those of `budget` when the s-th module leaves r ** s of the patches.

        Raises:
            `ValueError`: when even without patches there they are more.
        """
        budget, prefix, lengths = cls.setting(config, "budget"), config.num_prefix_tokens, cls._lengths(config)
        if budget == 1:
            return 1.0
        cost, num_blocks, pixels = BlockCost.of(config), config.num_hidden_layers, config.patch_size**2
        embedding = num_patches * config.hidden_size * config.num_channels * pixels / 1e9
        # Prefix tokens count, but not in the unpruned model, as in the authors' code.
        whole = embedding + num_blocks * cost(num_patches)
        dense = embedding + (num_blocks - sum(lengths)) * cost(prefix + num_patches)

        def excess(rate: float) -> tuple[float, float]:
            """Multiply-adds beyond the budget, and their derivative."""
            value, slope = dense - budget * whole, 0.0
            for stage, length in enumerate(lengths, start=1):
                per_rate = num_patches * rate ** (stage - 1)
                tokens = prefix + rate * per_rate
                value += length * cost(tokens)
                slope += length * (cost.token + 2 * cost.pair * tokens) * stage * per_rate
            return value, slope

        least, _ = excess(0.0)
        if least > 0:
            raise ValueError(
                f"`budget` of {cls.label} is {budget}, but {budget + least / whole:.3f} of the multiply-adds "
                f"are left even when all {num_patches} patches leave; use a larger budget, or earlier `blocks`."
            )
        rate = step = 1.0
        while step > 1e-9:  # Newton's method, from above, as the slope rises with the rate
            value, slope = excess(rate)
            step = value / slope
            rate -= step
        return rate

    @classmethod
    def kept_by_default(cls, config: CroprViTConfig, num_patches: int) -> list[int]:
        """By `budget`: r ** s of the patches are left after the s-th of its blocks, rounded, and at least one."""
        rate = cls._rate(config, num_patches)
        return kept_by_steps(
            config, cls, num_patches, lambda _, before: max(1, round(rate ** (before + 1) * num_patches))
        )

    def _granted(self, num_patches: int, num_keep: int) -> float:
        """Patches that the budget grants to the blocks after it: those of the schedule, and where that follows from
        `budget`, as they were before they were rounded.
        """
        if self.config.pruning_rate is not None or self.config.pruning_schedule is not None:
            return num_keep
        exact = self._rate(self.config, num_patches) ** self.stage * num_patches
        return exact if round(exact) == num_keep else num_keep

    @classmethod
    def check_pruning(cls, config: CroprViTConfig) -> None:
        """See `TokenReducer.check_pruning`."""
        super().check_pruning(config)
        thresholds, blocks = cls.settings(config).thresholds, pruning_blocks(config, cls)
        if thresholds is not None and len(thresholds) != len(blocks):
            raise ValueError(
                f"`thresholds` of {cls.label} has {len(thresholds)} numbers, but it acts after the blocks {blocks}; "
                "give one for each."
            )

    @classmethod
    def counts_vary(cls, config: CroprViTConfig) -> bool:
        """See `TokenReducer.counts_vary`: unless each image keeps its best, as many as the schedule says."""
        return cls.setting(config, "eval_mode") != "topk"

    # What it does to tokens

    def after_attention(self, state: TokenState, num_keep: int, facts: AttentionFacts) -> TokenState:
        """See `TokenReducer.after_attention`: scores, for after the block."""
        scores = weighted_class_attention(facts.class_attention(), facts.contexts)
        return state.updated(columns={**state.columns, SCORES: scores})

    def after_block(self, state: TokenState, num_keep: int) -> TokenState:
        """See `TokenReducer.after_block`."""
        columns = dict(state.columns)
        num_patches = state.num_places - state.num_prefix_tokens
        scores = columns.pop(SCORES) * (num_patches / THRESHOLD_PATCHES)
        state = state.updated(columns=columns)
        if self.training:
            return self.mask(state, scores, num_keep)
        if num_keep == num_patches:
            return state
        # Without data, as where multiply-adds are counted, it is what the schedule says.
        if self.eval_mode == "topk" or scores.is_meta:
            return self.keep_best(state, num_keep, scores)
        return state.drop(self.choose(state, scores), self.block, packs=not torch.compiler.is_compiling())

    @torch.no_grad()
    def choose(self, state: TokenState, scores: torch.Tensor) -> torch.Tensor:
        """Which tokens stay in inference by the thresholds, (B, T); prefix tokens do."""
        prefix, padding, sizes = state.num_prefix_tokens, state.padding_of_tokens(), state.sizes
        if padding is not None:
            scores = scores.masked_fill(padding, torch.finfo(scores.dtype).min)
        if sizes is not None:  # 0: what was dropped before, or fills up rows
            scores = scores.masked_fill(sizes == 0, -torch.inf)
        scores = scores[:, prefix:]
        stays = self.threshold(scores)
        if self.eval_mode == "batch_mean":
            stays = best_of_each(scores, stays)
        return F.pad(stays, (prefix, 0), value=True)

    def mask(self, state: TokenState, scores: torch.Tensor, num_keep: int) -> TokenState:
        """What training does: masks what is below the threshold, and adds to the loss of the budget.

        Until the last module it is no loss yet, but the multiply-adds so far less those of the budget.
        """
        prefix, before = state.num_prefix_tokens, state.columns.get(POLICY)
        num_patches = state.num_places - prefix
        policy = F.pad(self.threshold.decide(scores[:, prefix:]), (prefix, 0), value=1.0)  # (B, T)
        if before is not None:
            policy = before * policy
        if num_keep < num_patches:
            state = mask_tokens(state, policy, self.block)
            policy = state.columns[POLICY]
        granted = prefix + self._granted(num_patches, num_keep)
        beyond = self.cost(policy.sum(dim=1)).mean() - self.cost(granted)
        excess = self.num_blocks * beyond + state.losses.get(BUDGET_LOSS, 0.0)
        loss = self.loss_weight * excess.abs() if self.is_last else excess
        return state.updated(losses={**state.losses, BUDGET_LOSS: loss})


__all__ = ["ASViTConfig", "ASViTReducer"]
