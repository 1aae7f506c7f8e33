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
"""LTP (Kim et al., KDD 2022, arXiv 2107.00910): in every block the patches go that receive too little attention.

Too little is what lies under a threshold, which each block learns by a soft mask (stage "soft"); then thresholds are
frozen, and the model learns to live with what they prune (stage "hard"). How many patches stay follows the image.

Symbols: B images, T tokens now (P of them prefix), N tokens of the unpruned sequence, H heads, d head size, D hidden
size, L blocks.
"""

from dataclasses import dataclass

import torch
from huggingface_hub.dataclasses import strict
from torch.nn import Parameter
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils.generic import maybe_autocast

from ..configuration_cropr_vit import CroprViTConfig
from ..token_reduction import AttentionFacts, OwnWeights, ReducerConfig, TokenReducer, register_token_reducer
from ..token_state import KEY_BIAS, SIZES, TokenState, select_tokens


CITATION = """@inproceedings{kim2022learned,
  title     = {Learned Token Pruning for Transformers},
  author    = {Kim, Sehoon and Shen, Sheng and Thorsley, David and Gholami, Amir and Kwon, Woosuk and Hassoun, Joseph
               and Keutzer, Kurt},
  booktitle = {ACM SIGKDD Conference on Knowledge Discovery and Data Mining (KDD)},
  year      = {2022},
  url       = {https://arxiv.org/abs/2107.00910}
}"""

STAGES = ("soft", "hard")
MASK_LOSS = "mask_loss"
# Columns of a state within a block of the soft stage: log m, and tokens before the block and after its attention.
LOG_MASK, ENTERING, ATTENDED = "log_mask", "entering", "attended"


@strict
@dataclass
class LTPConfig(ReducerConfig):
    """Fields of LTP in `config.reducer_config`.

    Scores and thresholds are in units of 1 / N: the attention that a token receives is 1 on the mean. The authors'
    numbers are for texts of 128 tokens, and become 128 times as large.

    Attributes:
        final_threshold: where the threshold of the last block begins, and that of block l at l / L of it; under 0 or
            less there is nothing. From then on thresholds are weights of the model: in one that is loaded with its
            own, this field changes nothing. 0.5 is ours; the authors' 0.01 is 1.28 here.
        temperature: T, of the soft mask, above 0; the default is the 1e-3 of the authors' code. Theirs are 0.013 to
            0.26 here.
        mask_loss_weight: lambda, of the sum over blocks of the mean soft mask of the patches; 0.1 as in the authors'
            README, their range is 0.01 to 0.2. (The paper divides by the number of blocks, their code does not.)
        stage: of the training. "soft": thresholds are learned with the weights. "hard": they are frozen, and patches
            under them masked. Inference is the same after both.
        packs: whether inference packs images with unlike numbers of tokens, for speed, rather than mask them. Compiled
            and exported models mask.
    """

    final_threshold: float | int = 0.5
    temperature: float | int = 0.128
    mask_loss_weight: float | int = 0.1
    stage: str = "soft"
    packs: bool = True

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"`temperature` is {self.temperature}; it must be above 0, such as 0.128.")
        if self.mask_loss_weight < 0:
            raise ValueError(f"`mask_loss_weight` is {self.mask_loss_weight}; it must be 0 or more.")
        if self.stage not in STAGES:
            raise ValueError(f"`stage` is {self.stage!r}; choose one of {', '.join(STAGES)}.")


# --------------------------------------------------------------------------------------------------------------------
# 1. What it computes
# --------------------------------------------------------------------------------------------------------------------


def received_attention(facts: AttentionFacts, rows: torch.Tensor) -> torch.Tensor:
    """Attention that each token receives: a mean over heads and a sum over queries, in units of 1 / N (section 3).

    The paper divides by N, the length before pruning, whatever is left of it: that is the unit, and packed and masked
    sequences have equal scores. A second pass over queries and keys beside the fused kernel, a head at a time:
    T² (D + H) multiply-adds, and B T² numbers in memory, for each head if there is a gradient.

    Args:
        facts: of the attention.
        rows: (B, T), how much each query counts, in [0, 1]; in the type of the sums.

    Returns:
        (B, T), of each image as much together as its `rows`.
    """
    received = torch.zeros_like(rows)
    with maybe_autocast(device_type=rows.device.type, enabled=False):
        for queries, keys in zip(facts.queries.unbind(1), facts.keys.unbind(1)):
            # (B, T, d) x (B, d, T) -> (B, T, T)
            logits = (queries @ keys.transpose(1, 2)).to(rows.dtype) * facts.scaling
            if facts.key_bias is not None:
                logits = logits + facts.key_bias[:, None].to(rows.dtype)
            # (B, 1, T) x (B, T, T) -> (B, 1, T) -> (B, T)
            received = received + (rows[:, None] @ logits.softmax(dim=-1))[:, 0]
    return received / facts.queries.shape[1]


def settle(state: TokenState) -> TokenState:
    """The state after a block of the soft stage, with updates that count as much as the masks say.

    x + M' · attention + M · MLP, where M' is the product of the masks before the block, and M that with its own.
    """
    if ATTENDED not in state.columns:
        return state
    bias, states = state.columns[KEY_BIAS], state.hidden_states
    after = bias.exp()
    before = torch.ones_like(after) if state.sizes is None else state.sizes
    # A logarithm of sizes, as of attention pooling, shall be finite, and its gradient.
    columns = {KEY_BIAS: bias, SIZES: after.clamp(min=torch.finfo(after.dtype).tiny)}
    before, after = (mask[..., None].to(states.dtype) for mask in (before, after))
    # Written so that it is exact for masks of 0 and 1.
    states = after * states + (before - after) * state.columns[ATTENDED] + (1 - before) * state.columns[ENTERING]
    return state.updated(hidden_states=states, columns=columns)


# --------------------------------------------------------------------------------------------------------------------
# 2. The module within a block
# --------------------------------------------------------------------------------------------------------------------


class Threshold(OwnWeights):
    """The threshold of a block. One-dimensional: so it has no weight decay, and can be sharded.

    Args:
        start: its first value.
        learns: whether it is trained.
    """

    def __init__(self, start: float, learns: bool):
        super().__init__()
        self.start, self.learns = start, learns
        self.value = Parameter(torch.full((1,), start), requires_grad=learns)

    def init_weights(self) -> None:
        """Its place on the ramp."""
        init.constant_(self.value, self.start)

    def forward(self) -> torch.Tensor:
        """(1,)"""
        return self.value

    def train(self, mode: bool = True) -> "Threshold":
        """Stays frozen if it does not learn: loading replaces parameters, and no loss reaches this one."""
        super().train(mode)
        return self if self.learns else self.requires_grad_(False)


@register_token_reducer
class LTPReducer(TokenReducer):
    """LTP in one block: between attention and MLP, the patches leave that receive less attention than the threshold.

    Prefix tokens stay, and of the patches the one with the best score. A rate or schedule of the configuration, or of
    `set_pruning`, is the most that stays; without one that is all patches, which is what costs are counted with.

    In the soft stage no token leaves; m = sigmoid((score - threshold) / T) stands where the hard rule has 1 or 0. With
    M, the product of a token's masks so far: as a key it gets log M, its row in the scores counts M, and its updates
    are multiplied by M, that of the MLP by the M of its own block. As T goes to 0 that is the hard stage. (The authors
    multiply the output of a block by m and leave attention as it is. A block that begins with a norm undoes any
    factor, so that this would do nothing here, and is left out.)

    The authors' code counts blocks from 0, so that the first has a threshold of 0, never prunes and never learns, and
    the last begins below the final threshold that their README promises; here they count from 1. It scores behind the
    dropout of attention; here scores have none. Its thresholds are 1e-5 at least; here one that falls below 0 keeps
    all, and can rise again. The CLS token can leave there; here it stays.
    """

    name = "ltp"
    label = "LTP"
    title = "Learned Token Pruning"
    url = "https://arxiv.org/abs/2107.00910"
    citation = CITATION
    config_class = LTPConfig
    learns = True
    acts_inside = True
    fuses_by_default = False

    def __init__(self, config: CroprViTConfig, block: int):
        super().__init__(config, block)
        settings = self.settings(config)
        self.stage, self.packs, self.temperature = settings.stage, settings.packs, settings.temperature
        self.loss_weight = settings.mask_loss_weight
        start = settings.final_threshold * block / config.num_hidden_layers
        self.threshold = Threshold(start, learns=settings.stage == "soft")

    @classmethod
    def blocks_of_schedule(cls, config: CroprViTConfig, falls: list[int]) -> list[int]:
        """See `TokenReducer.blocks_of_schedule`: every block has a threshold; a schedule is the most that stays."""
        return cls.blocks(config) if falls else falls

    @classmethod
    def kept_by_default(cls, config: CroprViTConfig, num_patches: int) -> list[int]:
        """See `TokenReducer.kept_by_default`: all may stay."""
        return [num_patches] * config.num_hidden_layers

    @classmethod
    def counts_vary(cls, config: CroprViTConfig) -> bool:
        """See `TokenReducer.counts_vary`."""
        return True

    @property
    def is_soft(self) -> bool:
        """Whether it masks softly; evaluation in the soft stage has the hard rule."""
        return self.training and self.stage == "soft"

    def before_block(self, state: TokenState) -> TokenState:
        """See `TokenReducer.before_block`."""
        return state.updated(columns={**state.columns, ENTERING: state.hidden_states}) if self.is_soft else state

    def after_attention(self, state: TokenState, num_keep: int, facts: AttentionFacts) -> TokenState:
        """See `TokenReducer.after_attention`."""
        prefix = state.num_prefix_tokens
        if self.is_soft:
            log_mask = F.pad(F.logsigmoid(self.margins(state, num_keep, facts) / self.temperature), (prefix, 0))
            bias = log_mask if facts.key_bias is None else facts.key_bias + log_mask
            columns = {KEY_BIAS: bias, LOG_MASK: log_mask, ATTENDED: state.hidden_states}
            return state.updated(columns={**state.columns, **columns})
        with torch.no_grad():
            margins = self.margins(state, num_keep, facts)
        if not margins.is_meta:
            packs = self.packs and not self.training and not torch.compiler.is_compiling()
            return state.drop(F.pad(margins, (prefix, 0)) >= 0, self.block, packs)
        # Without data, as where multiply-adds are counted, it is the schedule: the most that stays.
        if num_keep == state.num_patches:
            return state
        return state.prune(*select_tokens(F.pad(margins, (prefix, 0)), num_keep, prefix), self.block)

    def margins(self, state: TokenState, num_keep: int, facts: AttentionFacts) -> torch.Tensor:
        """By how much each patch is above the threshold, (B, T - P), in float32 or wider.

        It is -inf for those that are gone, for padding, and beyond the best `num_keep` of an image; and 0 or more for
        the best one.
        """
        prefix, padding = state.num_prefix_tokens, state.padding_of_tokens()
        wide = torch.promote_types(facts.queries.dtype, torch.float32)
        if facts.key_bias is None:
            rows = torch.ones_like(state.hidden_states[..., 0], dtype=wide)
        else:  # 0 or -inf, of which nothing is left, or log M
            rows = facts.key_bias.to(wide).exp()
        if padding is not None:
            rows = rows.masked_fill(padding, 0.0)
        margins = received_attention(facts, rows)[:, prefix:] - self.threshold().to(wide)
        margins = margins.masked_fill(rows[:, prefix:] == 0, -torch.inf)
        if num_keep < state.num_patches:
            beyond = margins.argsort(dim=1, descending=True, stable=True)[:, num_keep:]
            margins = margins.scatter(1, beyond, -torch.inf)
        return torch.where(margins == margins.amax(dim=1, keepdim=True), margins.clamp(min=0.0), margins)

    def after_block(self, state: TokenState, num_keep: int) -> TokenState:
        """See `TokenReducer.after_block`: the loss of the soft stage."""
        if not self.is_soft:
            return state
        mask = state.columns[LOG_MASK][:, state.num_prefix_tokens :].exp()
        return settle(state.with_losses({MASK_LOSS: self.loss_weight * mask.mean()}))

    def restore(self, state: TokenState) -> TokenState:
        """See `TokenReducer.restore`; in the soft stage no token left, and none is masked any more."""
        return settle(state).updated(columns={}) if self.is_soft else super().restore(state)


__all__ = ["LTPConfig", "LTPReducer"]
