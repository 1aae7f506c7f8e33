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
"""STP and MTA (Zhou et al., IPMI 2023, arXiv 2303.06522): sparse encoding, and what makes it dense again.

Soft top-K token pruning (STP) scores the patches by small predictors after three blocks, and the best K go on, in
training as well: there K are drawn, and what they are multiplied by is 1 with the gradient of the scores. Multi-layer
token assembly (MTA) puts what was pruned, as it was then, and what is left on the grid again by a small network.
Symbols: B images, T tokens now, P prefix tokens, N patch tokens, D hidden size, C hidden size of the assembly.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from ..configuration_cropr_vit import CroprViTConfig
from ..token_reduction import StagedConfig, StagedReducer, register_token_reducer
from ..token_schedule import pruning_blocks
from ..token_state import TokenState, add_gumbel_noise, gather_tokens, select_tokens


CITATION = """@inproceedings{zhou2023token,
  title     = {Token Sparsification for Faster Medical Image Segmentation},
  author    = {Zhou, Lei and Liu, Huidong and Bae, Joseph and He, Junjun and Samaras, Dimitris and Prasanna, Prateek},
  booktitle = {Information Processing in Medical Imaging (IPMI)},
  year      = {2023},
  url       = {https://arxiv.org/abs/2303.06522}
}"""

PREDICTOR_EPS, ASSEMBLY_EPS = 1e-5, 1e-6  # of the norms, as in the authors' code
GATES = "gates"  # a column of a state in training: 1, with the gradient of all scores that kept a token
SURVIVORS = "survivors"  # of all modules, among what is assembled


@strict
@dataclass
class STPConfig(StagedConfig):
    """Fields of STP and MTA in `config.reducer_config`.

    Attributes:
        keep_rate: share of the patch tokens there that go on at each of `blocks`, in (0, 1]; the authors' `tp_ratio`
            is what it lacks to 1. Instead of it a configuration can have `pruning_rate` or `pruning_schedule`.
        blocks: after which it acts, 1 to L; by default after each of the first three quarters, as the authors' 3, 6
            and 9 of 12.
        perturbation: whether training adds Gumbel noise to the scores, so that tokens are drawn by them.
        assembly_hidden_size: C, a multiple of 4; by default the hidden size of the model.
        assembly_num_hidden_layers: blocks of the assembly, 0 or more; the authors' command has 1.
        assembly_num_attention_heads: of these blocks; by default as many as the model has.
    """

    perturbation: bool = True
    assembly_hidden_size: int | None = None
    assembly_num_hidden_layers: int = 1
    assembly_num_attention_heads: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        size, heads = self.assembly_hidden_size, self.assembly_num_attention_heads
        if size is not None and (size < 4 or size % 4):
            raise ValueError(f"`assembly_hidden_size` is {size}; give a positive multiple of 4, such as 384.")
        if heads is not None and heads < 1:
            raise ValueError(f"`assembly_num_attention_heads` is {heads}; give 1 or more.")
        if self.assembly_num_hidden_layers < 0:
            raise ValueError(f"`assembly_num_hidden_layers` is {self.assembly_num_hidden_layers}; give 0 or more.")


# --------------------------------------------------------------------------------------------------------------------
# 1. What it computes
# --------------------------------------------------------------------------------------------------------------------


def straight_through_gates(ranks: torch.Tensor, kept: torch.Tensor, num_prefix_tokens: int = 0) -> torch.Tensor:
    """What soft top-K multiplies tokens by: exactly 1 going forward.

    Going backward it is y for kept and 1 - y for pruned patches, where y is the softmax of the ranks over patches, at
    the authors' temperature of 1; the prefix has no gradient.

    Args:
        ranks: (B, T)
        kept: (B, K), indices of kept tokens, prefix included.
        num_prefix_tokens: tokens at the start that are not ranked.

    Returns:
        (B, T)
    """
    soft = F.pad(ranks[:, num_prefix_tokens:].softmax(dim=-1), (num_prefix_tokens, 0))
    nothing = soft - soft.detach()  # exactly 0, with the gradient of y
    is_kept = torch.zeros_like(ranks, dtype=torch.bool).scatter(1, kept, True)
    return torch.where(is_kept, 1 + nothing, 1 - nothing)


def gated(states: torch.Tensor, gates: torch.Tensor | None) -> torch.Tensor:
    """States (B, T, D) times gates (B, T), if there are any."""
    return states if gates is None else states * gates[..., None].to(states.dtype)


def grid_positions(grid_size: tuple[int, int], size: int, device: torch.device) -> torch.Tensor:
    """Fixed positions of patches: a half of the channels is sine and cosine of the row, the other of the column.

    Args:
        grid_size: rows and columns.
        size: C, a multiple of 4.

    Returns:
        (1, rows * columns, C), float32.
    """
    rows, columns = grid_size
    exponents = torch.arange(size // 4, dtype=torch.float32, device=device) / (size // 4)
    by_row, by_column = (
        torch.arange(length, dtype=torch.float32, device=device)[:, None] / 10000.0**exponents for length in grid_size
    )
    # (rows, C / 4), (columns, C / 4) -> (rows, columns, C) -> (1, rows * columns, C)
    of_row = torch.cat([by_row.sin(), by_row.cos()], dim=-1)[:, None].expand(-1, columns, -1)
    of_column = torch.cat([by_column.sin(), by_column.cos()], dim=-1)[None].expand(rows, -1, -1)
    return torch.cat([of_row, of_column], dim=-1).flatten(0, 1)[None]


# --------------------------------------------------------------------------------------------------------------------
# 2. The parts
# --------------------------------------------------------------------------------------------------------------------


class ScorePredictor(nn.Module):
    """Reads off every patch token, and off the mean of those that are left, how much it matters."""

    def __init__(self, config: CroprViTConfig):
        super().__init__()
        size = config.hidden_size
        self.norm = nn.LayerNorm(size, eps=PREDICTOR_EPS)
        self.input_projection = nn.Linear(size, size)
        self.fc1 = nn.Linear(size, size // 2)
        self.fc2 = nn.Linear(size // 2, size // 4)
        self.fc3 = nn.Linear(size // 4, 1)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, N), logarithms of values in (0, 1), in float32 or wider."""
        features = F.gelu(self.input_projection(self.norm(patches)))
        size = features.shape[-1] // 2
        local, mean = features[..., :size], features[..., size:].mean(dim=1, keepdim=True)
        features = torch.cat([local, mean.expand(-1, patches.shape[1], -1)], dim=-1)
        logits = self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(features)))))[..., 0]
        return F.logsigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))


class AssemblyLayer(GradientCheckpointingLayer):
    """A pre-norm transformer block over all tokens."""

    def __init__(self, size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.layernorm_before = nn.LayerNorm(size, eps=ASSEMBLY_EPS)
        self.qkv_proj = nn.Linear(size, 3 * size)
        self.o_proj = nn.Linear(size, size)
        self.layernorm_after = nn.LayerNorm(size, eps=ASSEMBLY_EPS)
        self.fc1 = nn.Linear(size, 4 * size)
        self.fc2 = nn.Linear(4 * size, size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)"""
        # (B, T, 3 C) -> (B, T, 3, heads, d) -> (3, B, heads, T, d)
        projected = self.qkv_proj(self.layernorm_before(tokens)).unflatten(2, (3, self.num_heads, -1))
        query, key, value = projected.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value)
        # (B, heads, T, d) -> (B, T, heads, d) -> (B, T, C)
        tokens = tokens + self.o_proj(attended.transpose(1, 2).flatten(2))
        return tokens + self.fc2(F.gelu(self.fc1(self.layernorm_after(tokens))))


class TokenAssembly(nn.Module):
    """Multi-layer token assembly: tokens of all stages, each projected by a layer of its stage, at their places in the
    grid, and blocks over all of them.

    The bias of a projection is the learned embedding of its stage, for which the authors have a vector beside it.

    Args:
        config: of the model.
        settings: of the method.
        blocks: after which patches were pruned.
    """

    def __init__(self, config: CroprViTConfig, settings: STPConfig, blocks: Sequence[int]):
        super().__init__()
        self.size = settings.assembly_hidden_size or config.hidden_size
        num_heads = settings.assembly_num_attention_heads or config.num_attention_heads
        if self.size % 4 or self.size % num_heads:
            raise ValueError(
                f"The assembly has {self.size} channels and {num_heads} heads; the channels must be a multiple of 4 "
                "and of the heads: set `assembly_hidden_size` or `assembly_num_attention_heads` in `reducer_config`."
            )
        self.survivors_norm = nn.LayerNorm(config.hidden_size, eps=ASSEMBLY_EPS)
        self.projections = nn.ModuleDict(
            {stage: nn.Linear(config.hidden_size, self.size) for stage in (*map(str, blocks), SURVIVORS)}
        )
        self.layers = nn.ModuleList(
            [AssemblyLayer(self.size, num_heads) for _ in range(settings.assembly_num_hidden_layers)]
        )
        self.norm = nn.LayerNorm(self.size, eps=ASSEMBLY_EPS)
        self.output_projection = nn.Linear(self.size, config.hidden_size)

    def forward(self, state: TokenState) -> TokenState:
        """The state with every token at its place, (B, P + rows * columns, D); pruned ones come normalised."""
        states, prefix = state.hidden_states, state.num_prefix_tokens
        survivors = gated(self.survivors_norm(states), state.columns.get(GATES))
        pruned = [
            replace(tokens, hidden_states=self.projections[str(tokens.block)](tokens.hidden_states))
            for tokens in state.pruned
        ]
        whole = state.updated(hidden_states=self.projections[SURVIVORS](survivors), pruned=tuple(pruned)).restore()
        assert state.grid_size is not None
        positions = F.pad(grid_positions(state.grid_size, self.size, states.device), (0, 0, prefix, 0))
        tokens = whole.hidden_states + positions.to(states.dtype)
        for layer in self.layers:
            tokens = layer(tokens)
        assembled = self.output_projection(self.norm(tokens)).to(states.dtype)
        return whole.updated(hidden_states=assembled, restored=True)


# --------------------------------------------------------------------------------------------------------------------
# 3. The module after a block
# --------------------------------------------------------------------------------------------------------------------


@register_token_reducer
class STPReducer(StagedReducer):
    """STP after one block; the last of them has the assembly, with last layer fusion.

    Training prunes as many patches as inference does, and by the same scores if there is no noise. Kept tokens are
    multiplied by the gates of all blocks so far, those that are pruned here by those of the blocks before and their
    own; in what is assembled after the norms, which would take the gradient of a factor away.

    All that training has inference needs as well, so that there is nothing to strip.
    """

    name = "stp"
    label = "STP"
    title = "Soft Top-K Token Pruning with Multi-Layer Token Assembly"
    url = "https://arxiv.org/abs/2303.06522"
    citation = CITATION
    config_class = STPConfig
    learns = True
    supports_windows = True

    def __init__(self, config: CroprViTConfig, block: int):
        super().__init__(config, block)
        settings, blocks = self.settings(config), pruning_blocks(config, type(self))
        self.perturbation = settings.perturbation
        self.predictor = ScorePredictor(config)
        self.pruned_norm: nn.Module | None = None
        self.assembly: nn.Module | None = None
        if config.last_layer_fusion:
            self.pruned_norm = nn.LayerNorm(config.hidden_size, eps=ASSEMBLY_EPS)
            if block == blocks[-1]:
                self.assembly = TokenAssembly(config, settings, blocks)

    def scores(self, state: TokenState) -> torch.Tensor:
        """See `TokenReducer.scores`."""
        prefix = state.num_prefix_tokens
        return F.pad(self.predictor(state.hidden_states[:, prefix:]), (prefix, 0))

    def after_block(self, state: TokenState, num_keep: int) -> TokenState:
        """See `TokenReducer.after_block`."""
        if self.training:
            return self.prune_softly(state, num_keep)
        if num_keep == state.num_patches:
            return state
        return self.set_aside(self.keep_best(state, num_keep))

    def prune_softly(self, state: TokenState, num_keep: int) -> TokenState:
        """What training does: draws the patches that stay by their scores, and multiplies by gates.

        That may be all of them, as at the beginning of a curriculum: scores, and what assembles the patches that leave
        here, have a gradient even then.
        """
        prefix, ranks = state.num_prefix_tokens, self.scores(state)
        if self.perturbation:
            ranks = add_gumbel_noise(ranks)
        kept, pruned = select_tokens(ranks.detach(), num_keep, prefix, state.padding_of_tokens())
        gates = straight_through_gates(ranks, kept, prefix)
        if GATES in state.columns:
            gates = gates * state.columns[GATES]
        (gates_of_pruned,) = gather_tokens(pruned, gates)
        reduced = state.updated(columns={**state.columns, GATES: gates}).prune(kept, pruned, self.block)
        states = gated(reduced.hidden_states, reduced.columns[GATES])
        return self.set_aside(reduced.updated(hidden_states=states), gates_of_pruned)

    def set_aside(self, state: TokenState, gates: torch.Tensor | None = None) -> TokenState:
        """The state whose tokens that were just pruned are as the assembly takes them, or at least gated."""
        *before, tokens = state.pruned
        if tokens.hidden_states is None:
            return state
        states = tokens.hidden_states if self.pruned_norm is None else self.pruned_norm(tokens.hidden_states)
        return state.updated(pruned=(*before, replace(tokens, hidden_states=gated(states, gates))))

    def restore(self, state: TokenState) -> TokenState:
        """See `TokenReducer.restore`: by the assembly if there is one, of no pruned tokens as well."""
        return super().restore(state) if self.assembly is None or state.restored else self.assembly(state)


__all__ = ["STPConfig", "STPReducer"]
