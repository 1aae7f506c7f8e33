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
"""IdleViT (Xu et al., AJCAI 2023, arXiv 2310.05654): in late blocks most patches idle, and none is lost.

The patches that the CLS token looks for most take part in a block, with all prefix tokens; the others pass it as they
are and may take part in the next one. It has no parameters. Symbols: B images, T tokens, N patches, D hidden size,
H heads.
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
from ..token_state import TokenState, select_tokens


CITATION = """@inproceedings{xu2023idlevit,
  title     = {No Token Left Behind: Efficient Vision Transformer via Dynamic Token Idling},
  author    = {Xu, Xuwei and Li, Changlin and Chen, Yudong and Chang, Xiaojun and Liu, Jiajun and Wang, Sen},
  booktitle = {Australasian Joint Conference on Artificial Intelligence (AJCAI)},
  year      = {2023},
  url       = {https://arxiv.org/abs/2310.05654}
}"""

CUT_LOSSES = ("both", "intra", "inter", "none")
COUNTED = ("exact", "as_released")


@strict
@dataclass
class IdleViTConfig(IdlingConfig):
    """Fields of IdleViT in `config.reducer_config`.

    Attributes:
        keep_rate, first_block: see `IdlingConfig`; the default is that of the authors' evaluation (their training
            script begins one block later).
        cut_loss: which parts of the token cut loss are added in training: "both", "intra", "inter" or "none".
        cut_loss_weight: of their mean over the blocks; 20 as the authors' command line has it.
        cut_loss_blocks: "exact" counts all blocks. "as_released" counts every second one and still divides by all, as
            the released code does.
    """

    cut_loss: str = "both"
    cut_loss_weight: float | int = 20.0
    cut_loss_blocks: str = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cut_loss_weight < 0:
            raise ValueError(f"`cut_loss_weight` is {self.cut_loss_weight}; it must be 0 or more.")
        for name, choices in {"cut_loss": CUT_LOSSES, "cut_loss_blocks": COUNTED}.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; choose one of {', '.join(choices)}.")


def class_logits(hidden_states: torch.Tensor, attention: Any, positions: Any = None) -> torch.Tensor:
    """Attention logits of the first token, as means over heads, up to a constant: (B, T), float32.

    The mean over heads of their products is the product of all channels over H. Where keys are not rotated, that needs
    none of them: q · (W k) is (Wᵀ q) · k.

    Args:
        hidden_states: (B, T, D), normalised.
        attention: `CroprViTAttention`.
        positions: rotary positions of the tokens, or `None`.
    """
    layer, heads = attention.k_proj, hidden_states.shape[-1] // attention.head_dim
    if positions is not None or type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter:
        queries, keys = attention.queries_and_keys(hidden_states, positions)
        # (B, H, 1, d) x (B, H, d, T) -> (B, H, T)
        logits = (queries[:, :, :1].float() @ keys.float().transpose(-2, -1))[:, :, 0]
        return logits.mean(dim=1) * attention.scaling
    query = attention.q_proj(hidden_states[:, :1]).float() @ layer.weight.float()
    # (B, T, D) x (B, D, 1) -> (B, T)
    return (hidden_states.float() @ query.transpose(1, 2))[..., 0] * attention.scaling / heads


def cut_losses(logits: torch.Tensor, is_active: torch.Tensor, num_prefix_tokens: int = 1) -> dict[str, torch.Tensor]:
    """Token cut loss: attention from active to idle tokens and back ("inter"), and of active ones not to their own
    ("intra"), each squared, as means over tokens.

    Args:
        logits: (B, T, T), means over heads.
        is_active: (B, T), of prefix tokens as well.
        num_prefix_tokens: which no cut counts as keys of the other side.
    """
    weights, active = logits.softmax(dim=-1), is_active.to(logits.dtype)
    to_active = (weights * active[:, None]).sum(dim=-1)  # (B, T)
    of_patches = F.pad(torch.ones_like(active[:, num_prefix_tokens:]), (num_prefix_tokens, 0))
    across = (active[:, :, None] != active[:, None]) * of_patches[:, None]
    inter = (weights * across).sum(dim=-1)
    return {"inter": inter.square().mean(), "intra": (active * to_active - active).square().mean()}


@register_token_reducer
class IdleViTReducer(IdlingReducer):
    """IdleViT after one block: chooses which patches take part in the next one.

    Patches are ranked by the attention logits of the CLS token in that block, as means over heads, before the softmax.
    The block runs on those alone, in training as well: the authors' masked attention over all tokens gives the same
    outputs and gradients. Every patch stays at its place, so that feature maps and dense tasks have all of them, with
    states that may be some blocks old. In training the token cut loss pulls attention within the two groups.
    """

    name = "idlevit"
    label = "IdleViT"
    title = "IdleViT"
    url = "https://arxiv.org/abs/2310.05654"
    citation = CITATION
    config_class = IdleViTConfig
    training_recipe = {  # of the command in the authors' README, for DeiT-S
        "distill_logits": 10.0,
        "distill_embedding": 2000 / 384,  # 100 * 10 times the mean squared error of 384 normalised channels
        "num_train_epochs": 30,
        "learning_rate": 4e-5,  # 1e-5 per 512 images; they have 2048 in a step
        "warmup_steps": 0,
        "layer_decay": 1.0,
        "drop_path_rate": 0.0,
    }
    needs_cls = True

    def __init__(self, config: CroprViTConfig, block: int):
        super().__init__(config, block)
        settings, blocks = self.settings(config), pruning_blocks(config, type(self))
        counted = settings.cut_loss_blocks == "exact" or blocks.index(block) % 2 == 0
        self.loss_names = {"both": ("inter", "intra"), "none": ()}.get(settings.cut_loss, (settings.cut_loss,))
        self.loss_weight = settings.cut_loss_weight / len(blocks) * counted

    def before_next_block(self, state: TokenState, num_active: int, layer: Any) -> TokenState:
        """See `TokenReducer.before_next_block`."""
        prefix, positions = state.num_prefix_tokens, state.rotations.get("image")
        normalised = layer.layernorm_before(state.hidden_states)
        with torch.no_grad():  # a choice has no gradient
            logits = class_logits(normalised, layer.attention, positions)
            active, idle = select_tokens(logits, num_active, prefix, state.padding_of_tokens())
        if self.training and self.loss_weight and self.loss_names:
            state = state.with_losses(self._losses(normalised, active, positions, layer, prefix))
        return state.park(active, idle, self.block)

    def _losses(
        self, normalised: torch.Tensor, active: torch.Tensor, positions: Any, layer: Any, num_prefix_tokens: int
    ) -> dict[str, torch.Tensor]:
        queries, keys = layer.attention.queries_and_keys(normalised, positions)
        logits = (queries @ keys.transpose(-2, -1)).float().mean(dim=1) * layer.attention.scaling
        is_active = torch.zeros_like(logits[:, 0], dtype=torch.bool).scatter(1, active, True)
        losses = cut_losses(logits, is_active, num_prefix_tokens)
        total = torch.stack([losses[name] for name in self.loss_names]).sum()
        return {f"cut_loss_{self.block}": self.loss_weight * total}


__all__ = ["IdleViTConfig", "IdleViTReducer"]
