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
"""DToP (Tang et al., ICCV 2023, arXiv 2308.01045): easy patches leave a segmenter early, each with its class.

After two blocks an auxiliary head predicts the class of every patch that is left. Patches of which it is sure leave
the network for good, and what it says of them stands; the k of which it is most sure in each class stay, as context
for the others. The classifier of the model predicts those that are left in the end. Symbols: B images, N patch tokens,
C classes, D hidden size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn import functional as F

from ..configuration_cropr_vit import CroprViTConfig
from ..token_reduction import StagedConfig, StagedReducer, register_token_reducer
from ..token_state import TokenState, put_tokens, select_tokens


CITATION = """@inproceedings{tang2023dynamic,
  title     = {Dynamic Token Pruning in Plain Vision Transformers for Semantic Segmentation},
  author    = {Tang, Quan and Zhang, Bowen and Liu, Jiajun and Liu, Fagui and Liu, Yifan},
  booktitle = {IEEE/CVF International Conference on Computer Vision (ICCV)},
  year      = {2023},
  url       = {https://arxiv.org/abs/2308.01045}
}"""


@strict
@dataclass
class DToPConfig(StagedConfig):
    """Fields of DToP in `config.reducer_config`.

    Attributes:
        threshold: patches leave whose class has a higher probability, in [0, 1]; with 1 none does. 0.9 is what the
            authors have for a ViT-B on ADE20K, 0.95 for a ViT-L. `None` is ours: the patches with the most probable
            classes leave, in each image as many as the schedule says.
        k: patches of each class that stay although they could leave, 1 or more: those with the highest probability.
            The authors' 5. Not with a schedule, which `threshold=None` follows.
        keep_rate: share of the patch tokens there that is left after each of `blocks`, in (0, 1]. With a threshold it
            is what is counted without an image, as for multiply-adds, and decides nothing. Instead of it a
            configuration can have `pruning_rate` or `pruning_schedule`.
        blocks: after which there is a head, 1 to L; by default after a half and two thirds, as the authors' 6 and 8
            of 12. For a ViT-L they have 8 and 16 of 24.
    """

    threshold: float | int | None = 0.9
    k: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"`threshold` is {self.threshold}; it must be in [0, 1], such as 0.9, or None.")
        if self.k < 1:
            raise ValueError(f"`k` is {self.k}; at least 1 patch of each class must stay, such as 5.")


def find_easy(
    probabilities: torch.Tensor, threshold: float, k: int, present: torch.Tensor | None = None
) -> torch.Tensor:
    """Which tokens leave: those whose class is more probable than a threshold, but for the best k of each class.

    Args:
        probabilities: (B, N, C); the class of a token is that with the highest.
        threshold: a token that just reaches it stays.
        k: tokens of each class that stay at least, if there are as many. Of equal ones the first stay.
        present: (B or 1, N), tokens that count; all by default. The others are false in what is returned.

    Returns:
        (B, N), bool
    """
    best, classes = probabilities.max(dim=-1)
    if present is not None:
        best = best.masked_fill(present.logical_not(), -torch.inf)
    order = best.argsort(dim=1, descending=True, stable=True)
    classes = classes.gather(1, order)[..., None]
    # How many tokens down to each, itself included, have its class: (B, N, C) -> (B, N)
    numbers = torch.arange(probabilities.shape[-1], device=classes.device)
    rank = (classes == numbers).int().cumsum(dim=1).gather(2, classes)[..., 0]
    is_spare = torch.zeros_like(best, dtype=torch.bool).scatter(1, order, rank > k)
    return is_spare & (best > threshold)


class ExitHead(nn.Module):
    """Predicts the class of every patch, as the end of the model does: a norm and a linear classifier."""

    def __init__(self, config: CroprViTConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels or 0)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, N, C)"""
        return self.classifier(self.norm(patches))


@register_token_reducer
class DToPReducer(StagedReducer):
    """DToP after one block: a head, which inference has as well, and the patches that leave by what it says.

    Which patches leave, and that training does as inference, is the authors'. Heads and losses are ours, those of the
    segmenter that they are in: the authors have heads of SegViT, learned queries of classes that attend to the tokens,
    at all three places. So what a patch leaves with is final here; they multiply it with scores of the classes that
    the last head gives. A CLS token and registers, which their models do not have, always stay.

    Training masks patches that left. Inference packs images with unlike numbers of patches, or masks them in graphs,
    whose shapes are fixed. Where the schedule keeps all patches, as a curriculum does at first, none leaves.
    """

    name = "dtop"
    label = "DToP"
    title = "Dynamic Token Pruning (DToP)"
    url = "https://arxiv.org/abs/2308.01045"
    citation = CITATION
    config_class = DToPConfig
    learns = True
    exits = True

    def __init__(self, config: CroprViTConfig, block: int):
        super().__init__(config, block)
        settings = self.settings(config)
        self.threshold, self.k = settings.threshold, settings.k
        self.head = ExitHead(config)

    @classmethod
    def default_blocks(cls, num_blocks: int) -> list[int]:
        """See `StagedReducer.default_blocks`."""
        return [num_blocks // 2, 2 * num_blocks // 3]

    @classmethod
    def counts_vary(cls, config: CroprViTConfig) -> bool:
        """See `TokenReducer.counts_vary`: by a threshold."""
        return cls.setting(config, "threshold") is not None

    @classmethod
    def scheduled_fields(cls, config: CroprViTConfig) -> dict[str, Any]:
        """See `TokenReducer.scheduled_fields`."""
        return {"reducer_config": {**(config.reducer_config or {}), "threshold": None}}

    @classmethod
    def check(cls, config: CroprViTConfig) -> None:
        """See `TokenReducer.check`."""
        super().check(config)
        if (config.num_labels or 0) < 2:
            raise ValueError(
                f"{cls.label} lets patches leave by the probability of their class, but `num_labels` is "
                f"{config.num_labels}; set it to 2 or more."
            )

    def after_block(self, state: TokenState, num_keep: int) -> TokenState:
        """See `TokenReducer.after_block`."""
        prefix = state.num_prefix_tokens
        logits = of_all = self.head(state.hidden_states[:, prefix:])
        if state.exit_logits:  # those that left before stay as they were predicted then
            *_, before = state.exit_logits.values()
            of_all = put_tokens(before, state.token_indices[:, prefix:] - prefix, logits)
        state = state.updated(exit_logits={**state.exit_logits, self.block: of_all})
        if num_keep == state.num_places - prefix:
            return state
        # A choice has no gradient.
        probabilities = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)
        # Without data, as where multiply-adds are counted, it is what the schedule says.
        if self.threshold is None or probabilities.is_meta:
            return self.leave_by_schedule(state, probabilities, num_keep)
        return self.leave_by_threshold(state, probabilities, self.threshold)

    def leave_by_schedule(self, state: TokenState, probabilities: torch.Tensor, num_keep: int) -> TokenState:
        """Keeps the `num_keep` patches whose class is least probable, and drops those of padding first."""
        if num_keep == state.num_patches:
            return state
        prefix = state.num_prefix_tokens
        scores = F.pad(-probabilities.amax(dim=-1), (prefix, 0))
        return state.prune(*select_tokens(scores, num_keep, prefix, state.padding_of_tokens()), self.block)

    def leave_by_threshold(self, state: TokenState, probabilities: torch.Tensor, threshold: float) -> TokenState:
        """Drops the easy patches of each image, and those of padding."""
        prefix, padding = state.num_prefix_tokens, state.padding_of_tokens()
        present = state.token_indices != state.num_places
        if padding is not None:
            present = present & padding.logical_not()
        stays = find_easy(probabilities, threshold, self.k, present[:, prefix:]).logical_not()
        stays = F.pad(stays, (prefix, 0), value=True) & present
        return state.drop(stays, self.block, packs=not (self.training or torch.compiler.is_compiling()))


__all__ = ["DToPConfig", "DToPReducer"]
