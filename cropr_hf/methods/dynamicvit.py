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
"""DynamicViT (Rao et al., NeurIPS 2021, arXiv 2106.02034): small predictors after three blocks say which patches stay.

Inference keeps as many of the best as the schedule says. In training every image keeps as many as it likes: decisions
are drawn, no token leaves, and attention masks those that would. A loss pulls the mean share of what stays to the
schedule. Symbols: B images, T tokens (P of them prefix), N patch tokens, D hidden size, S blocks at which it acts.
"""

from dataclasses import dataclass

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn import functional as F

from ..configuration_cropr_vit import CroprViTConfig
from ..token_reduction import StagedConfig, StagedReducer, register_token_reducer
from ..token_schedule import pruning_blocks, round_up
from ..token_state import POLICY, TokenState, draw_decisions, mask_tokens


CITATION = """@inproceedings{rao2021dynamicvit,
  title     = {{DynamicViT}: Efficient Vision Transformers with Dynamic Token Sparsification},
  author    = {Rao, Yongming and Zhao, Wenliang and Liu, Benlin and Lu, Jiwen and Zhou, Jie and Hsieh, Cho-Jui},
  booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
  year      = {2021},
  url       = {https://arxiv.org/abs/2106.02034}
}"""

RATIO_LOSS = "ratio_loss"


@strict
@dataclass
class DynamicViTConfig(StagedConfig):
    """Fields of DynamicViT in `config.reducer_config`.

    Attributes:
        keep_rate: rho, share of the patch tokens that are left after the first of `blocks`, in (0, 1]; after the s-th
            it is rho ** s. Instead of it a configuration can have `pruning_rate` or `pruning_schedule`.
        blocks: after which it acts, 1 to L; by default after each of the first three quarters, as the paper's 3, 6 and
            9 of 12 (from 0 those before which it acts).
        ratio_loss_weight: of the loss that pulls the shares of kept tokens to the schedule; the paper's is 2.
    """

    ratio_loss_weight: float | int = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio_loss_weight < 0:
            raise ValueError(f"`ratio_loss_weight` is {self.ratio_loss_weight}; it must be 0 or more.")


class KeepPredictor(nn.Module):
    """Reads off every patch token, and off the mean of those that are left, whether it should stay (section 3.2)."""

    def __init__(self, config: CroprViTConfig):
        super().__init__()
        size = config.hidden_size
        self.norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.input_projection = nn.Linear(size, size)
        self.fc1 = nn.Linear(size, size // 2)
        self.fc2 = nn.Linear(size // 2, size // 4)
        self.fc3 = nn.Linear(size // 4, 2)

    def forward(self, patches: torch.Tensor, policy: torch.Tensor | None = None) -> torch.Tensor:
        """Log-probabilities of keeping and of dropping each token, (B, N, 2), in float32 or wider.

        Args:
            patches: (B, N, D)
            policy: (B, N), 1 for patches that are left; all of them by default.
        """
        features = F.gelu(self.input_projection(self.norm(patches)))
        size = features.shape[-1] // 2
        local, others = features[..., :size], features[..., size:]
        if policy is None:
            mean = others.mean(dim=1, keepdim=True)
        else:  # of an image that keeps nothing the mean is 0
            weights = policy[..., None].to(others.dtype)
            mean = (others * weights).sum(dim=1, keepdim=True) / weights.sum(dim=1, keepdim=True).clamp(min=1)
        features = torch.cat([local, mean.expand(-1, patches.shape[1], -1)], dim=-1)
        logits = self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(features)))))
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)


@register_token_reducer
class DynamicViTReducer(StagedReducer):
    """DynamicViT after one block.

    In training a dropped token counts next to nothing (see `mask_tokens`), with the gradient of the paper's masked
    softmax, so that a decision learns from what it changes. (The paper lets every token attend to itself whatever its
    decision. Of values, that changes those of dropped tokens, which nothing reads; of gradients, a decision here also
    gets that of the token's attention to itself.) Where all patches come back, dropped ones are as they were when
    dropped, as in inference.

    Patches that stay keep their order, where the authors' code sorts them by score. Padding that goes first is dropped
    in training at once. Only training biases keys: inference runs on kernels that cannot, such as FlashAttention 2.
    """

    name = "dynamicvit"
    label = "DynamicViT"
    title = "DynamicViT"
    url = "https://arxiv.org/abs/2106.02034"
    citation = CITATION
    config_class = DynamicViTConfig
    training_recipe = {
        "distill_logits": 0.5,  # both weights of the paper
        "distill_tokens": 0.5,
        # Of the authors' code, for DeiT-S and 1024 images in a step:
        "num_train_epochs": 30,
        "frozen_start": 5 / 30,
        "warmup_steps": 5 / 30,
        "learning_rate": 1e-3,
        "backbone_learning_rate": 1e-5,
        "layer_decay": 1.0,
        "drop_path_rate": 0.0,
    }
    learns = True

    def __init__(self, config: CroprViTConfig, block: int):
        super().__init__(config, block)
        self.loss_weight = self.setting(config, "ratio_loss_weight") / len(pruning_blocks(config, type(self)))
        self.predictor = KeepPredictor(config)

    @classmethod
    def kept_by_default(cls, config: CroprViTConfig, num_patches: int) -> list[int]:
        """By `keep_rate`: of N patch tokens ⌊rho ** s · N⌋ are left after the s-th of its blocks, at least one."""
        rate = cls.setting(config, "keep_rate")
        blocks, kept, passed = pruning_blocks(config, cls), [], 0
        for block in range(1, config.num_hidden_layers + 1):
            passed += block in blocks
            # 0.7 ** 2 * 100 is 49, not 48.99999999999999.
            kept.append(max(1, int(round(rate**passed * num_patches, 6))))
        return round_up(config, kept, num_patches)

    def after_block(self, state: TokenState, num_keep: int) -> TokenState:
        """See `TokenReducer.after_block`."""
        return self.mask(state, num_keep) if self.training else self.keep_best(state, num_keep)

    def scores(self, state: TokenState) -> torch.Tensor:
        """See `TokenReducer.scores`: log-probabilities of keeping."""
        prefix = state.num_prefix_tokens
        return F.pad(self.predictor(state.hidden_states[:, prefix:])[..., 0], (prefix, 0))

    def mask(self, state: TokenState, num_keep: int) -> TokenState:
        """What training does: draws which patches stay, of those that are left, and adds the loss of their share.

        Where the schedule keeps all of them, as a curriculum does at first, only the loss speaks.
        """
        states, prefix = state.hidden_states, state.num_prefix_tokens
        before = state.columns.get(POLICY)
        if before is None:
            before = torch.ones_like(states[..., 0], dtype=torch.promote_types(states.dtype, torch.float32))
        decisions = draw_decisions(self.predictor(states[:, prefix:], before[:, prefix:]))
        policy = before * F.pad(decisions, (prefix, 0), value=1.0)  # (B, T)
        shares = policy[:, prefix:].mean(dim=1)
        loss = self.loss_weight * (shares - num_keep / state.num_patches).square().mean()
        state = state.with_losses({RATIO_LOSS: loss})
        if num_keep == state.num_patches:
            return state
        return mask_tokens(state, policy, self.block)


__all__ = ["DynamicViTConfig", "DynamicViTReducer"]
