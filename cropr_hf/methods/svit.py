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
"""SViT (Liu et al., WACV 2024, arXiv 2306.07050): before each block a gate says which tokens take part in it.

What it leaves out passes the block as it is, and the next gate may choose it again. Each image has as many tokens as
its gates let through; a loss pulls their mean share to the schedule. Symbols: B images, T tokens (P of them prefix), N
patch tokens, D hidden size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn import functional as F

from ..configuration_cropr_vit import CroprViTConfig
from ..token_reduction import IdlingConfig, IdlingReducer, register_token_reducer
from ..token_schedule import pruning_blocks
from ..token_state import TokenState, draw_decisions, select_tokens


CITATION = """@inproceedings{liu2024revisiting,
  title     = {Revisiting Token Pruning for Object Detection and Instance Segmentation},
  author    = {Liu, Yifei and Gehrig, Mathias and Messikommer, Nico and Cannici, Marco and Scaramuzza, Davide},
  booktitle = {IEEE/CVF Winter Conference on Applications of Computer Vision (WACV)},
  year      = {2024},
  url       = {https://arxiv.org/abs/2306.07050}
}"""

EVAL_MODES = ("topk", "threshold", "sample")
GATE_EPS = 1e-5  # of the norm in a gate, as in the authors' code
RATIO_LOSS = "ratio_loss"


@strict
@dataclass
class SViTConfig(IdlingConfig):
    """Fields of SViT in `config.reducer_config`.

    Attributes:
        keep_rate, first_block: see `IdlingConfig`; the defaults are the shares 0.7, 0.49 and 0.343 of the authors, and
            their three dense blocks of 12. In training, and unless `eval_mode` is "topk", they are means.
        ratio_loss_weight: of the loss that pulls the shares of tokens to the schedule; 4 as in the authors' code.
        eval_mode: how inference chooses. "topk": the best of each image, as many as the schedule says; all images have
            as many (ours: deterministic, and at the cost that was asked for). "sample": drawn by the gates'
            probabilities, as in training; so the authors measured. "threshold": what a gate keeps with more than one
            half, which can be far from the schedule.
        packs: whether inference packs images with unlike numbers of tokens, for speed, rather than mask them. Compiled
            and exported models mask.
    """

    ratio_loss_weight: float | int = 4.0
    eval_mode: str = "topk"
    packs: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio_loss_weight < 0:
            raise ValueError(f"`ratio_loss_weight` is {self.ratio_loss_weight}; it must be 0 or more.")
        if self.eval_mode not in EVAL_MODES:
            raise ValueError(f"`eval_mode` is {self.eval_mode!r}; choose one of {', '.join(EVAL_MODES)}.")


class Gate(nn.Module):
    """Reads off every patch token whether it should take part in the coming block (section 3.2)."""

    def __init__(self, config: CroprViTConfig):
        super().__init__()
        size = config.hidden_size
        self.norm = nn.LayerNorm(size, eps=GATE_EPS)
        self.fc1 = nn.Linear(size, size // 4)
        self.fc2 = nn.Linear(size // 4, 2)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> log-probabilities of taking part and of idling, (B, N, 2), in float32 or wider."""
        logits = self.fc2(F.gelu(self.fc1(self.norm(patches))))
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)


@register_token_reducer
class SViTReducer(IdlingReducer):
    """SViT after one block: its gate chooses which patches take part in the next one.

    Prefix tokens always do (the authors gate the CLS token before the last block as well). In training decisions are
    drawn, every token passes the block and attention masks those that idle: x <- m B(x) + (1 - m) x. An image of which
    a gate lets nothing through keeps its tokens as they are.
    """

    name = "svit"
    label = "SViT"
    title = "SViT"
    url = "https://arxiv.org/abs/2306.07050"
    citation = CITATION
    config_class = SViTConfig
    training_recipe = {  # of an author's answer to a question, for DeiT-S
        "num_train_epochs": 30,
        "learning_rate": 2e-5,  # 1e-5 per 512 images; they have 1024 in a step
        "lr_scheduler_kwargs": {"min_lr": 2e-6},
        "weight_decay": 1e-6,
        "warmup_steps": 0,
        "layer_decay": 1.0,
        "drop_path_rate": 0.0,
    }
    learns = True

    def __init__(self, config: CroprViTConfig, block: int):
        super().__init__(config, block)
        settings = self.settings(config)
        self.eval_mode, self.packs = settings.eval_mode, settings.packs
        self.deterministic = settings.eval_mode != "sample"
        self.loss_weight = settings.ratio_loss_weight / len(pruning_blocks(config, type(self)))
        self.gate = Gate(config)

    @classmethod
    def counts_vary(cls, config: CroprViTConfig) -> bool:
        """See `TokenReducer.counts_vary`: unless each image keeps its best, as many as the schedule says."""
        return cls.setting(config, "eval_mode") != "topk"

    def before_next_block(self, state: TokenState, num_active: int, layer: Any) -> TokenState:
        """See `TokenReducer.before_next_block`."""
        prefix, padding = state.num_prefix_tokens, state.padding_of_tokens()
        log_probabilities = self.gate(state.hidden_states[:, prefix:])
        # Without data, as where multiply-adds are counted, it is what the schedule says.
        if not self.training and (self.eval_mode == "topk" or log_probabilities.is_meta):
            scores = F.pad(log_probabilities[..., 0], (prefix, 0))
            return state.park(*select_tokens(scores, num_active, prefix, padding), self.block)
        if self.training or self.eval_mode == "sample":
            gates = draw_decisions(log_probabilities)
        else:
            gates = (log_probabilities[..., 0] > log_probabilities[..., 1]).to(log_probabilities.dtype)
        if self.training:
            loss = self.loss_weight * (gates.mean() - num_active / state.num_patches).square()
            state = state.with_losses({RATIO_LOSS: loss})
        gates = F.pad(gates, (prefix, 0), value=1.0)
        if padding is not None:
            gates = gates.masked_fill(padding, 0.0)
        packs = self.packs and not self.training and not torch.compiler.is_compiling()
        return state.park_by(gates, self.block, packs)


__all__ = ["SViTConfig", "SViTReducer"]
