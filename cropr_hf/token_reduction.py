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
"""Token reduction: the interface of a method, its settings, and the registry.

Symbols: B images, T tokens now, H heads, d head size, L blocks.
"""

# No `from __future__ import annotations` here: it would switch the type checks of `@strict` off.
import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from .configuration_cropr_vit import DEFAULT_PRUNING_RATE, CroprViTConfig, check_finite
from .token_schedule import check_pruning, kept_by_constant_rate, kept_by_steps, pruning_blocks
from .token_state import TokenState, select_tokens


@dataclass
class AttentionFacts:
    """What a method can read off the attention of a block, without its weights, which fused kernels do not return.

    Attributes:
        queries, keys: (B, H, T, d), rotated.
        content_keys: the keys before rotation: what a token is about, and not where it stands.
        scaling: of their products.
        key_bias: (B, T) or `None`.
        contexts: (B, T, H, d), what each head gathers for each token, before the output projection.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    content_keys: torch.Tensor
    scaling: float
    key_bias: torch.Tensor | None
    contexts: torch.Tensor

    def class_attention(self) -> torch.Tensor:
        """Attention weights of the first token to all tokens, (B, H, T), in O(T D)."""
        # (B, H, 1, d) x (B, H, d, T) -> (B, H, T)
        logits = (self.queries[:, :, :1] @ self.keys.transpose(-2, -1))[:, :, 0].float() * self.scaling
        return (logits if self.key_bias is None else logits + self.key_bias[:, None]).softmax(dim=-1)


# --------------------------------------------------------------------------------------------------------------------
# The interface of a method, and the registry
# --------------------------------------------------------------------------------------------------------------------


class OwnWeights(nn.Module):
    """A module with weights that no library knows. It must hold parameters itself, or it is passed over."""

    def init_weights(self) -> None:
        """Gives the parameters their first values, by `transformers.initialization`."""
        raise NotImplementedError

    def stripped_weights(self) -> dict[str, torch.Tensor]:
        """What the stripped model has in the same place under other names, computed from its own weights."""
        return {}


@strict
@dataclass
class ReducerConfig:
    """Fields of one method, which `config.reducer_config` holds as a dictionary. Random has none."""


@strict
@dataclass
class KeepRateConfig(ReducerConfig):
    """Fields of a method that keeps a share of the patch tokens.

    Attributes:
        keep_rate: the share, in (0, 1]. Instead of it a configuration can have `pruning_rate` or `pruning_schedule`.
    """

    keep_rate: float | int = 0.7

    def __post_init__(self) -> None:
        if not 0 < self.keep_rate <= 1:
            raise ValueError(f"`keep_rate` is {self.keep_rate}; it must be in (0, 1], such as {type(self).keep_rate}.")


@strict
@dataclass
class StagedConfig(KeepRateConfig):
    """Fields of a `StagedReducer`.

    Attributes:
        keep_rate: see `KeepRateConfig`.
        blocks: where it acts, 1 to L, in ascending order; `None` is at the quarters.
    """

    blocks: list[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_blocks(self.blocks)


@strict
@dataclass
class IdlingConfig(KeepRateConfig):
    """Fields of an `IdlingReducer`.

    Attributes:
        keep_rate: share of the patches that take part, in (0, 1]: it itself in the first third of the blocks where
            patches idle, its square and its cube in the others. Instead of it a configuration can have `pruning_rate`
            or `pruning_schedule`.
        first_block: the first block in which patches idle, 2 to L; by default the first of the second quarter.
    """

    first_block: int | None = None


def check_blocks(blocks: Sequence[int] | None) -> None:
    """Raises `ValueError` for a field `blocks` without blocks, or with blocks that do not ascend."""
    if blocks is not None and (not blocks or sorted({*blocks}) != list(blocks)):
        raise ValueError(f"`blocks` is {blocks}; give the numbers of one or more blocks, in ascending order.")


class TokenReducer(nn.Module):
    """A token reduction method, as one module per block at which it acts.

    The encoder calls the hooks and never asks which method runs; what a method is, its class attributes say. A method
    overrides what it needs. Most act in `after_block`; one that `acts_inside` does between attention and MLP.

    Args:
        config: of the model.
        block: the block (1 to L) at which the module acts.

    Attributes:
        name: as `config.token_reducer` has it.
        label: in tables and pictures.
        title, url, citation: in model cards: what the method is called, where it was published, and its BibTeX entry.
        config_class: its own fields.
        budget_field: which of them says how much it prunes where there is neither a rate nor a schedule, if one does.
        training_recipe: how its authors fine-tune a trained classifier on ImageNet, as arguments of
            `examples/train_image_classification.py`, whose defaults are what is not there.
        learns: whether its choices are by chance before it is trained; otherwise it can be used without training.
        supports_auxiliary_heads: whether it has parts that a stripped model does without; see `add_auxiliary_heads`.
        merges: whether tokens are merged rather than dropped.
        exits: whether patches leave with their class, for good: for label maps only, and without last layer fusion.
        idles: whether tokens sit out blocks and come back, so that it has a `before_next_block`.
        acts_inside: whether it has an `after_attention`.
        reads_attention: whether it acts after the block by what its `after_attention` puts into the state.
        fuses_by_default: what `config.last_layer_fusion` is unless it is given.
        deterministic: whether the same image always gives the same output.
        supports_windows: whether it can run with windowed attention.
        needs_cls: whether it needs a CLS token.
        fixed_weights: names of weights that make no sense in another shape.
    """

    name: str
    label: str
    title: str
    url: str | None = None
    citation: str | None = None
    config_class: type[ReducerConfig] = ReducerConfig
    budget_field: str | None = None
    training_recipe: ClassVar[dict[str, Any]] = {}
    learns = False
    supports_auxiliary_heads = False
    merges = False
    exits = False
    idles = False
    acts_inside = False
    reads_attention = False
    fuses_by_default = True
    deterministic = True
    supports_windows = False
    needs_cls = False
    fixed_weights: tuple[str, ...] = ()

    def __init__(self, config: CroprViTConfig, block: int):
        super().__init__()
        self.block = block

    # Where it acts, and how many tokens it leaves: see `token_schedule`.

    @classmethod
    def blocks(cls, config: CroprViTConfig) -> list[int]:
        """Blocks (1 to L) at which it can act: those after which another block works on fewer tokens, as the last one
        (with fusion the last two) do not; or within which the MLP does.
        """
        last = config.num_hidden_layers - bool(config.last_layer_fusion) - (not cls.acts_inside)
        return list(range(1, last + 1))

    @classmethod
    def blocks_of_schedule(cls, config: CroprViTConfig, falls: list[int]) -> list[int]:
        """Blocks that have a module with a `pruning_schedule`, which falls after these."""
        return falls

    @classmethod
    def kept_by_rate(cls, config: CroprViTConfig, num_patches: int, rate: int) -> list[int]:
        """Patch tokens left after each of the L blocks for `config.pruning_rate`; that of the paper by default."""
        return kept_by_constant_rate(config, pruning_blocks(config, cls), num_patches, rate)

    @classmethod
    def kept_by_default(cls, config: CroprViTConfig, num_patches: int) -> list[int]:
        """The same where the configuration has neither rate nor schedule: by fields of the method, if it has such."""
        return cls.kept_by_rate(config, num_patches, DEFAULT_PRUNING_RATE)

    @classmethod
    def reachable_counts(cls, config: CroprViTConfig, num_patches: int, kept: Sequence[int]) -> list[int]:
        """The counts that the method can reach nearest to `kept`, patch tokens left after each block."""
        return list(kept)

    @classmethod
    def counts_vary(cls, config: CroprViTConfig) -> bool:
        """Whether inference leaves some images more patches than others. Then the schedule says how many are meant, or
        the most; without data (on the meta device, where multiply-adds are counted) the method computes all that it
        does with data, and leaves what the schedule says.
        """
        return False

    # What it does to tokens. `num_keep` is what the schedule leaves at its block.

    def before_block(self, state: TokenState) -> TokenState:
        """Called before its block."""
        return state

    def adapt_attention(
        self, state: TokenState, num_keep: int, hidden_states: torch.Tensor, projected: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        """Called in the attention of its block, if it `acts_inside`: queries, keys and values as they shall be.

        Args:
            state: before the block.
            hidden_states: (B, T, D), normalised, what they were projected from.
            projected: queries, keys and values, (B, H, T, d) each, before rotation.
        """
        return projected

    def after_attention(self, state: TokenState, num_keep: int, facts: AttentionFacts) -> TokenState:
        """Called between attention and MLP of its block, if it `acts_inside` or `reads_attention`."""
        return state

    def after_block(self, state: TokenState, num_keep: int) -> TokenState:
        """Called after its block."""
        return state

    def before_next_block(self, state: TokenState, num_active: int, layer: Any) -> TokenState:
        """Called at the beginning of the block after its own, whose `CroprViTLayer` it sees, if it `idles`."""
        return state

    def restore(self, state: TokenState) -> TokenState:
        """All tokens at their places, for fusion and for feature maps."""
        return state.restore()

    def scores(self, state: TokenState) -> torch.Tensor | None:
        """How much each token matters, (B, T), on any scale, for the schedule search; `None` if it does not score."""
        return None

    def keep_best(self, state: TokenState, num_keep: int, scores: torch.Tensor | None = None) -> TokenState:
        """Prunes to the `num_keep` patch tokens with the highest `scores` (B, T), by default those of the method; of
        padding first.
        """
        if num_keep == state.num_patches:
            return state
        with torch.no_grad():  # ranking has no gradient
            ranked: Any = self.scores(state) if scores is None else scores
            kept, pruned = select_tokens(ranked, num_keep, state.num_prefix_tokens, state.padding_of_tokens())
        return state.prune(kept, pruned, self.block)

    # What a stripped model does without

    def remove_auxiliary_heads(self) -> None:
        """Drops what a stripped model does without; selection stays the same."""

    def add_auxiliary_heads(self, config: CroprViTConfig, initialize: Callable[[nn.Module], Any]) -> None:
        """Adds it anew; selection stays the same. `initialize` gives a new module its place and its first weights."""

    @classmethod
    def strip(cls, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What inference needs of the weights of one module, by their names in it."""
        return weights

    @classmethod
    def fold(
        cls, config: CroprViTConfig, block: int, weights: dict[str, torch.Tensor], layer: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """What stripping changes in the weights of a block, by their names in it.

        Args:
            block: 1 to L.
            weights: of the module there, by their names in it.
            layer: of the block.
        """
        return {}

    @classmethod
    def scheduled_fields(cls, config: CroprViTConfig) -> dict[str, Any]:
        """Fields of the configuration with which images keep what the schedule says, whatever they show.

        So the benchmark times inference, with random weights.
        """
        return {}

    @classmethod
    def stripped_fields(cls, config: CroprViTConfig) -> dict[str, Any]:
        """Fields of the configuration that the stripped model has other values of."""
        return {"use_auxiliary_heads": False}

    # What it asks of the model

    @classmethod
    def uses_key_bias(cls, config: CroprViTConfig) -> bool:
        """Whether it gives tokens a `key_bias`, which some attention kernels do not support; where images have unlike
        numbers of tokens, it hides what fills up the others.
        """
        return cls.counts_vary(config)

    @classmethod
    def settings(cls, config: CroprViTConfig) -> Any:
        """Its fields, from `config.reducer_config`.

        Raises:
            `ValueError`: for a field that it does not have, or a value that the field does not allow.
        """
        given = config.reducer_config or {}
        known = [item.name for item in fields(cls.config_class)]
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                raise ValueError(
                    f"`reducer_config` has {name!r}, which is not a field of the token reducer {cls.name!r}; "
                    + (f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known) or 'none'}.")
                )
        try:
            settings = cls.config_class(**given)
        except StrictDataclassError as error:  # a wrong type
            raise ValueError(f"`reducer_config` of the token reducer {cls.name!r}: {error.__cause__}") from error
        check_finite(settings)
        return settings

    @classmethod
    def setting(cls, config: CroprViTConfig, name: str) -> Any:
        """One of its fields, not checked; what counts tokens asks for it in every call, also of compiled models."""
        return (config.reducer_config or {}).get(name, getattr(cls.config_class, name))

    @classmethod
    def check(cls, config: CroprViTConfig) -> None:
        """Raises `ValueError` for a configuration with which it cannot run."""
        cls.settings(config)
        if config.use_auxiliary_heads and not cls.supports_auxiliary_heads:
            raise ValueError(
                f"The token reducer {cls.name!r} does not support auxiliary heads; set `use_auxiliary_heads=False`."
            )
        if cls.needs_cls and not config.use_cls_token:
            raise ValueError(
                f"The token reducer {cls.name!r} needs a CLS token, but `use_cls_token` is False; choose another "
                "reducer, or a model with a CLS token."
            )
        # Windows know no bias of keys, and keep tokens in the order of the grid.
        needs_global = cls.uses_key_bias(config) or cls.acts_inside or cls.idles
        if config.window_block_indices and (needs_global or not cls.supports_windows):
            raise ValueError(
                f"The token reducer {cls.name!r} does not support windowed attention, but `window_block_indices` is "
                f"{list(config.window_block_indices)}; choose another reducer, or a model without windows."
            )
        if config.prune_padding_first and cls.merges:
            raise ValueError(
                f"`prune_padding_first` is True, but the token reducer {cls.name!r} merges tokens and drops none; set "
                "it to False."
            )
        check_attention(config._attn_implementation, cls.name if cls.uses_key_bias(config) else None)
        cls.check_pruning(config)

    @classmethod
    def check_pruning(cls, config: CroprViTConfig) -> None:
        """Raises `ValueError` for pruning that is impossible at `config.image_size`; configurations call it too."""
        given = [name for name in ("pruning_rate", "pruning_schedule") if getattr(config, name)]
        if given and cls.budget_field in (config.reducer_config or {}):
            raise ValueError(
                f"`reducer_config` has a `{cls.budget_field}`, and the configuration a `{given[0]}` as well; give one "
                "of them."
            )
        check_pruning(config, cls)


class StagedReducer(TokenReducer):
    """A method that acts at a few blocks, which its field `blocks` names.

    By default that is after each of the first three quarters; of methods that act within a block, or read its
    attention, in or after those that begin the others.
    """

    config_class: type[ReducerConfig] = StagedConfig
    budget_field = "keep_rate"
    fuses_by_default = False

    @classmethod
    def blocks(cls, config: CroprViTConfig) -> list[int]:
        """See `TokenReducer.blocks`."""
        chosen = cls.setting(config, "blocks")
        if chosen is None:
            chosen = cls.default_blocks(config.num_hidden_layers)
        return [block for block in super().blocks(config) if block in chosen]

    @classmethod
    def default_blocks(cls, num_blocks: int) -> list[int]:
        """Where it acts in a model of so many blocks, unless its field `blocks` says so."""
        one_later = cls.acts_inside or cls.reads_attention
        return [quarter * num_blocks // 4 + one_later for quarter in (1, 2, 3)]

    @classmethod
    def kept_by_default(cls, config: CroprViTConfig, num_patches: int) -> list[int]:
        """By `keep_rate` of the patch tokens there, rounded down, and at least one."""
        rate = cls.setting(config, "keep_rate")
        # 0.7 * 10 is 7, not 6.999999999999999.
        return kept_by_steps(config, cls, num_patches, lambda left, _: max(1, int(round(rate * left, 6))))

    @classmethod
    def check_pruning(cls, config: CroprViTConfig) -> None:
        """See `TokenReducer.check_pruning`."""
        possible = super().blocks(config)
        if wrong := [block for block in cls.settings(config).blocks or [] if block not in possible]:
            raise ValueError(
                f"`blocks` of {cls.label} has {wrong}; with {config.num_hidden_layers} blocks"
                f"{' and last layer fusion' * bool(config.last_layer_fusion)} they must be in 1 to "
                f"{possible[-1] if possible else 0}. Leave these out."
            )
        super().check_pruning(config)


class IdlingReducer(TokenReducer):
    """A method by which patches sit out blocks and come back: a module chooses which take part in the block after
    its own.
    """

    config_class = IdlingConfig
    budget_field = "keep_rate"
    idles = True
    fuses_by_default = False

    @classmethod
    def _first_block(cls, config: CroprViTConfig) -> int:
        return cls.setting(config, "first_block") or config.num_hidden_layers // 4 + 1

    @classmethod
    def blocks(cls, config: CroprViTConfig) -> list[int]:
        """See `TokenReducer.blocks`: those before the blocks in which patches idle."""
        first = cls._first_block(config)
        return [block for block in super().blocks(config) if block >= first - 1]

    @classmethod
    def blocks_of_schedule(cls, config: CroprViTConfig, falls: list[int]) -> list[int]:
        """See `TokenReducer.blocks_of_schedule`: patches idle in every block from the first fall on."""
        last = super().blocks(config)[-1:]
        return sorted({*falls, *range(falls[0], last[0] + 1)}) if falls and last else falls

    @classmethod
    def kept_by_default(cls, config: CroprViTConfig, num_patches: int) -> list[int]:
        """By `keep_rate`, rounded down."""
        rate, number = cls.setting(config, "keep_rate"), len(pruning_blocks(config, cls))

        def leave(_: int, before: int) -> int:
            return max(1, math.floor(round(rate ** (1 + 3 * before // number) * num_patches, 6)))

        return kept_by_steps(config, cls, num_patches, leave)

    @classmethod
    def check_pruning(cls, config: CroprViTConfig) -> None:
        """See `TokenReducer.check_pruning`."""
        cls.settings(config)
        first, last = cls._first_block(config), config.num_hidden_layers - bool(config.last_layer_fusion)
        if config.pruning_schedule is None and not 2 <= first <= last:
            raise ValueError(
                f"`first_block` of {cls.label} is {first}; with {config.num_hidden_layers} blocks"
                f"{' and last layer fusion' * bool(config.last_layer_fusion)} it must be in 2 to {last}."
            )
        super().check_pruning(config)


def check_attention(implementation: str | None, biased_by: str | None) -> None:
    """Raises `ValueError` for an attention kernel without a key bias where a method needs one."""
    if biased_by is not None and "flash" in (implementation or ""):
        raise ValueError(
            f"The token reducer {biased_by!r} adds a bias to attention logits, which {implementation!r} does not "
            "support; use `attn_implementation='sdpa'`."
        )


def check_exits(config: CroprViTConfig, model_class: Any) -> None:
    """Raises `ValueError` for a method by which patches leave with their class, in a model without label maps."""
    method = find_token_reducer(config)
    if method is not None and method.exits and not model_class.takes_exits:
        raise ValueError(
            f"The token reducer {method.name!r} predicts a label map on the way, and {model_class.__name__} has none; "
            "choose another reducer, or a model for semantic segmentation."
        )


TOKEN_REDUCERS: dict[str, type[TokenReducer]] = {}

ReducerType = TypeVar("ReducerType", bound=type[TokenReducer])


def register_token_reducer(reducer: ReducerType) -> ReducerType:
    """Class decorator: makes a reducer available under its `name` as `config.token_reducer`.

    Raises:
        `ValueError`: when another class has that name.
    """
    if TOKEN_REDUCERS.setdefault(reducer.name, reducer) is not reducer:
        raise ValueError(f"A token reducer named {reducer.name!r} is registered already; choose another name.")
    return reducer


def find_token_reducer(config: CroprViTConfig) -> Any:
    """The class of the method of a configuration; `None` if it does not prune.

    Raises:
        `ValueError`: for one that is not registered.
    """
    name = config.token_reducer
    if name is None or name in TOKEN_REDUCERS:
        return TOKEN_REDUCERS.get(name)  # type: ignore[arg-type]
    if config.reducer_package is not None:
        raise ValueError(
            f"The token reducer {name!r} is not installed; it is part of the package {config.reducer_package!r}: "
            "install it, and import it before the model is loaded."
        )
    near = difflib.get_close_matches(name, TOKEN_REDUCERS, n=3, cutoff=0.5)
    raise ValueError(
        f"Unknown token reducer {name!r}; "
        + (f"did you mean {' or '.join(map(repr, near))}? " if near else "")
        + f"Choose one of {', '.join(sorted(TOKEN_REDUCERS))}, or None for the unpruned model."
    )


def has_auxiliary_heads(token_reducer: str | None) -> bool:
    """Whether models with this `config.token_reducer` learn by auxiliary heads; `False` for an unknown name."""
    method = TOKEN_REDUCERS.get(token_reducer)  # type: ignore[arg-type]
    return method is not None and method.learns and method.supports_auxiliary_heads


def build_token_reducers(config: CroprViTConfig) -> nn.ModuleDict:
    """The modules of a model, by the number of the block at which each acts; empty when it does not prune.

    The configuration notes which package a method comes from that does not lie beside this file.

    Raises:
        `ValueError`: for a method that is not registered, or that cannot run with the configuration.
    """
    reducer = find_token_reducer(config)
    if reducer is None:
        return nn.ModuleDict()
    if config.last_layer_fusion is None or reducer.exits:
        config.last_layer_fusion = reducer.fuses_by_default
    reducer.check(config)
    if reducer.__module__.rpartition(".")[0] != __package__:
        config.reducer_package = reducer.__module__.partition(".")[0]
    return nn.ModuleDict({str(block): reducer(config, block) for block in pruning_blocks(config, reducer)})
