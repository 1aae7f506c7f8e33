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
"""Token Compensator (Jie et al., ECCV 2024, arXiv 2408.06798): a model trained with ToMe at one rate runs at another.

Small low-rank steps on queries and values, one for each step of the rate, make up for the difference. They are
distilled once for a backbone, by `examples/train_compensator.py`, and serve every model that was fine-tuned from it.

Symbols: B images, T tokens, D hidden size, R ranks of all steps together, L blocks.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from ..configuration_cropr_vit import CroprViTConfig
from ..token_reduction import OwnWeights, register_token_reducer
from ..token_schedule import kept_patches
from ..token_state import TokenState
from .tome import ToMeConfig, ToMeReducer


CITATION = """@inproceedings{jie2024tocom,
  title     = {Token Compensator: Altering Inference Cost of Vision Transformer without Re-Tuning},
  author    = {Jie, Shibo and Tang, Yehui and Guo, Jianyuan and Deng, Zhi-Hong and Han, Kai and Wang, Yunhe},
  booktitle = {European Conference on Computer Vision (ECCV)},
  year      = {2024},
  url       = {https://arxiv.org/abs/2408.06798}
}"""

FILE_NAME = "compensator.safetensors"
FINGERPRINT = "fingerprint"
LEAST_COSINE = 0.5  # of two fingerprints: fine-tuning leaves far more, and another training next to nothing
PARTS = {"query": "q_proj", "value": "v_proj"}  # what is compensated, and the layer that projects it


@strict
@dataclass
class ToComConfig(ToMeConfig):
    """Fields of ToCom in `config.reducer_config`, beside those of ToMe.

    Attributes:
        trained_rate: the `pruning_rate` with which the weights of the model were trained, 0 to `max_rate`. By default
            they were trained with the pruning that is configured, and `set_pruning` is what makes a difference.
        scale: s, by which steps are multiplied; 0 is off. By default 0.1, as the authors train, or what a compensator
            was trained with; they search among 0.05 to 0.15 for each use, on data that are held out.
        max_rate: the highest rate that there are steps for, 1 or more.
        rank_per_step: of the step from one rate to the next, 1 or more.
        dropout: of the ranks, when the compensator is trained, in [0, 1).
    """

    trained_rate: int | None = None
    scale: float | int = 0.1
    max_rate: int = 16
    rank_per_step: int = 2
    dropout: float | int = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_rate", "rank_per_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be 1 or more.")
        if self.trained_rate is not None and not 0 <= self.trained_rate <= self.max_rate:
            raise ValueError(
                f"`trained_rate` is {self.trained_rate}; it must be in 0 to {self.max_rate}, the `max_rate`."
            )
        if self.scale < 0:
            raise ValueError(f"`scale` is {self.scale}; it must be 0 or more, such as 0.1.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` is {self.dropout}; it must be in [0, 1).")


def steps_between(trained_rate: int, rate: int, max_rate: int, rank_per_step: int) -> tuple[slice, int]:
    """Ranks of the steps between two rates in [0, `max_rate`], and the sign with which they count.

    They are added where the rate rises and taken away where it falls, so that the way there and back is none. The step
    from 0 to 1 has the last ranks, as in the authors' code.
    """
    first, last = rank_per_step * (max_rate - max(rate, trained_rate)), rank_per_step * min(rate, trained_rate)
    return slice(first, rank_per_step * max_rate - last), 1 if rate > trained_rate else -1


class Compensator(OwnWeights):
    """The steps of one block: low-rank products for queries and for values, without bias (section 3)."""

    def __init__(self, config: CroprViTConfig, settings: ToComConfig):
        super().__init__()
        ranks, size = settings.max_rate * settings.rank_per_step, config.hidden_size
        self.query_down = nn.Parameter(torch.empty(ranks, size))
        self.query_up = nn.Parameter(torch.zeros(size, ranks))
        self.value_down = nn.Parameter(torch.empty(ranks, size))
        self.value_up = nn.Parameter(torch.zeros(size, ranks))
        self.dropout = nn.Dropout(settings.dropout)

    def init_weights(self) -> None:
        """Down as PyTorch's linear layers, up 0, so that a new one changes nothing."""
        for down, up in ((self.query_down, self.query_up), (self.value_down, self.value_up)):
            init.kaiming_uniform_(down, a=math.sqrt(5))
            init.zeros_(up)

    def forward(self, hidden_states: torch.Tensor, ranks: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T, D), normalised -> what the steps with these ranks change in queries and in values, (B, T, D) each."""
        of_queries, of_values = (
            F.linear(self.dropout(F.linear(hidden_states, down[ranks])), up[:, ranks])
            for down, up in ((self.query_down, self.query_up), (self.value_down, self.value_up))
        )
        return of_queries, of_values


@register_token_reducer
class ToComReducer(ToMeReducer):
    """ToMe in one block, with what makes up for another rate than that of the training.

    Tokens are merged as ToMe does; keys, by which it compares them, are not changed. The compensator is what the
    complete model has and the stripped one does not: being linear, it is folded into the weights of queries and
    values, for the configured pruning, and costs nothing there.

    The paper has one rate in all blocks. Here a block goes by the mean rate up to it, rounded up, which is the same
    unless the rate saturates, and says what a schedule counts as.
    """

    name = "tocom"
    label = "ToCom"
    title = "Token Compensator"
    url = "https://arxiv.org/abs/2408.06798"
    citation = CITATION
    config_class = ToComConfig
    supports_auxiliary_heads = True

    def __init__(self, config: CroprViTConfig, block: int):
        super().__init__(config, block)
        self.config = config
        self.compensator: Compensator | None = None
        if config.use_auxiliary_heads:
            self.compensator = Compensator(config, self.settings(config))

    @classmethod
    def blocks_of_schedule(cls, config: CroprViTConfig, falls: list[int]) -> list[int]:
        """See `TokenReducer.blocks_of_schedule`: blocks that merge nothing are compensated as well."""
        return cls.blocks(config) if falls else falls

    @classmethod
    def kept_by_rate(cls, config: CroprViTConfig, num_patches: int, rate: int) -> list[int]:
        """See `TokenReducer.kept_by_rate`: as ToMe, up to `max_rate` where there is a compensator."""
        most = cls.setting(config, "max_rate")
        if config.use_auxiliary_heads and rate > most:
            raise ValueError(
                f"The pruning rate is {rate}, but the compensator has steps up to `max_rate` {most}; use a lower "
                "rate, or train one that goes further."
            )
        return super().kept_by_rate(config, num_patches, rate)

    @classmethod
    def reachable_counts(cls, config: CroprViTConfig, num_patches: int, kept: Sequence[int]) -> list[int]:
        """See `TokenReducer.reachable_counts`: as ToMe, up to `max_rate` on the mean where there is a compensator."""
        if config.use_auxiliary_heads:
            most = cls.setting(config, "max_rate")
            kept = [max(left, num_patches - most * block) for block, left in enumerate(kept, start=1)]
        return super().reachable_counts(config, num_patches, kept)

    @classmethod
    def step(cls, config: CroprViTConfig, block: int, num_patches: int, num_keep: int) -> tuple[slice, float] | None:
        """Ranks of the steps that a block needs, and the factor of what they change; `None` if it needs none.

        Args:
            block: 1 to L.
            num_patches: of the image.
            num_keep: patch tokens that the block leaves.
        """
        trained = kept_patches(config, cls, num_patches, cls.setting(config, "trained_rate"))[block - 1]
        trained_rate, rate = (-(-(num_patches - left) // block) for left in (trained, num_keep))
        if rate == trained_rate:
            return None
        sizes = (cls.setting(config, name) for name in ("max_rate", "rank_per_step"))
        ranks, sign = steps_between(trained_rate, rate, *sizes)
        return ranks, sign * cls.setting(config, "scale")

    def adapt_attention(
        self, state: TokenState, num_keep: int, hidden_states: torch.Tensor, projected: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        """See `TokenReducer.adapt_attention`."""
        if self.compensator is None:
            return projected
        step = self.step(self.config, self.block, state.num_places - state.num_prefix_tokens, num_keep)
        if step is None:
            return projected
        ranks, factor = step
        queries, keys, values = projected
        # (B, T, D) -> (B, T, H, d) -> (B, H, T, d)
        of_queries, of_values = (
            each.unflatten(2, (-1, queries.shape[-1])).transpose(1, 2)
            for each in self.compensator(hidden_states, ranks)
        )
        return queries + factor * of_queries, keys, values + factor * of_values

    # Complete and stripped

    def remove_auxiliary_heads(self) -> None:
        """See `TokenReducer.remove_auxiliary_heads`; `fold` says where it went."""
        self.compensator = None

    def add_auxiliary_heads(self, config: CroprViTConfig, initialize: Callable[[nn.Module], Any]) -> None:
        """See `TokenReducer.add_auxiliary_heads`: a new compensator changes nothing."""
        self.compensator = Compensator(config, self.settings(config)).train(self.training)
        initialize(self.compensator)

    @classmethod
    def strip(cls, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `TokenReducer.strip`."""
        return {}

    @classmethod
    def fold(
        cls, config: CroprViTConfig, block: int, weights: dict[str, torch.Tensor], layer: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """See `TokenReducer.fold`: W + factor · up down, of queries and values, for the configured pruning."""
        step = cls.step(config, block, config.num_patches, kept_patches(config, cls)[block - 1])
        if step is None:
            return {}
        (ranks, factor), folded = step, {}
        for part, projection in PARTS.items():
            name = f"attention.{projection}.weight"
            wide = torch.promote_types(layer[name].dtype, torch.float32)
            down, up = (weights[f"compensator.{part}_{half}"].to(wide) for half in ("down", "up"))
            # (D, ranks) x (ranks, D) -> (D, D)
            folded[name] = (layer[name].to(wide) + factor * (up[:, ranks] @ down[ranks])).to(layer[name].dtype)
        return folded

    @classmethod
    def stripped_fields(cls, config: CroprViTConfig) -> dict[str, Any]:
        """See `TokenReducer.stripped_fields`: folded, the weights are those of the configured pruning."""
        settings = {name: value for name, value in (config.reducer_config or {}).items() if name != "trained_rate"}
        return {**super().stripped_fields(config), "reducer_config": settings or None}


# --------------------------------------------------------------------------------------------------------------------
# A compensator as a file of its own
# --------------------------------------------------------------------------------------------------------------------


def fingerprint(model: Any) -> torch.Tensor:
    """What tells a `CroprViT*` model of one backbone from that of another: diagonals of its key projections, (L, D).

    Compensation does not change keys, and fine-tuning changes them little.
    """
    keys = [layer.attention.k_proj.weight for layer in model.base_model.layers]
    return torch.stack([weight.detach().diagonal().float().cpu() for weight in keys])


def save_compensator(model: Any, folder: str | os.PathLike) -> None:
    """Writes the compensator of a complete model to `compensator.safetensors` in a folder, without the backbone.

    Args:
        model: a `CroprViT*` model with `token_reducer="tocom"`.
        folder: made if necessary.

    Raises:
        `ValueError`: for a model that has none.
    """
    config = _config_of(model)
    if not config.use_auxiliary_heads:
        raise ValueError("The model is stripped, its compensator folded; load it with `use_auxiliary_heads=True`.")
    weights = {name: tensor.contiguous() for name, tensor in model.base_model.token_reducers.state_dict().items()}
    settings = ToComReducer.settings(config)
    facts = {name: str(getattr(settings, name)) for name in ("max_rate", "rank_per_step", "scale")}
    os.makedirs(folder, exist_ok=True)
    save_file({**weights, FINGERPRINT: fingerprint(model)}, os.path.join(folder, FILE_NAME), facts)


def load_compensator(model: Any, folder: str | os.PathLike) -> None:
    """Gives a model the compensator that was trained for its backbone.

    From then on the model makes up for the difference between the rate that it was trained with and the one that it
    runs at; see `ToComConfig.trained_rate`. What it publishes is folded.

    Args:
        model: a `CroprViT*` model with `token_reducer="tocom"`, usually loaded from one that was trained with ToMe.
        folder: what `save_compensator` wrote.

    Raises:
        `ValueError`: for a model of another method or backbone, or a folder without a compensator that fits.
    """
    config = _config_of(model)
    path = os.path.join(folder, FILE_NAME)
    if not os.path.isfile(path):
        raise ValueError(f"There is no {FILE_NAME} in {folder}; give the folder that `train_compensator.py` wrote.")
    with safe_open(path, "pt") as file:
        facts, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    _check_backbone(model, weights.pop(FINGERPRINT), folder)
    settings = ToComReducer.settings(config)
    for name in ("max_rate", "rank_per_step"):
        if int(facts[name]) != getattr(settings, name):
            raise ValueError(
                f"The compensator in {folder} has `{name}` {facts[name]}, the model {getattr(settings, name)}; load "
                "the model with that of the compensator in `reducer_config`."
            )
    reducers = model.base_model.token_reducers
    if lacking := sorted({*reducers} - {name.partition(".")[0] for name in weights}):
        raise ValueError(
            f"The compensator in {folder} is not for the blocks {', '.join(lacking)}, in which the model merges; use "
            "one that was trained without last layer fusion."
        )
    config.reducer_config = {"scale": float(facts["scale"]), **(config.reducer_config or {})}
    if not config.use_auxiliary_heads:
        model.add_auxiliary_heads()
    reducers.load_state_dict({name: tensor for name, tensor in weights.items() if name.partition(".")[0] in reducers})


def _config_of(model: Any) -> CroprViTConfig:
    if getattr(model.config, "token_reducer", None) != ToComReducer.name:
        raise ValueError(
            f"The token reducer of the model is {getattr(model.config, 'token_reducer', None)!r}; load it with "
            f"`token_reducer={ToComReducer.name!r}`."
        )
    return model.config


def _check_backbone(model: Any, stored: torch.Tensor, folder: str | os.PathLike) -> None:
    own = fingerprint(model)
    if own.shape != stored.shape:
        found = f"has {len(stored)} blocks of width {stored.shape[1]}, not {len(own)} of {own.shape[1]}"
    else:
        cosine = F.cosine_similarity(own, stored, dim=1).mean().item()
        if cosine >= LEAST_COSINE:
            return
        found = f"has other keys (a cosine of {cosine:.2f}, where {LEAST_COSINE} is the least)"
    raise ValueError(
        f"The compensator in {folder} is for another backbone, which {found}; use one that was trained for the model "
        "from which this one was fine-tuned."
    )


__all__ = ["ToComConfig", "ToComReducer", "load_compensator", "save_compensator"]
