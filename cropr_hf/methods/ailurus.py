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
"""AiluRus (Li et al., NeurIPS 2023, arXiv 2311.01197), re-implemented: an early block's tokens are clustered, once.

Few representatives go on, the more the richer a region is, and dense tasks get copies back. The authors have published
no code: what their paper leaves open is marked as ours. It has no parameters and needs no training.

Symbols: B images, N patch tokens on a grid, P prefix tokens, D hidden size, M representatives, K neighbours.
"""

import math
from dataclasses import dataclass

import torch
from huggingface_hub.dataclasses import strict

from ..configuration_cropr_vit import CroprViTConfig
from ..token_reduction import KeepRateConfig, TokenReducer, register_token_reducer
from ..token_schedule import pruning_blocks, round_up
from ..token_state import KEY_BIAS, SIZES, TokenState


CITATION = """@inproceedings{li2023ailurus,
  title     = {AiluRus: A Scalable {ViT} Framework for Dense Prediction},
  author    = {Li, Jin and Wang, Yaoming and Zhang, Xiaopeng and Shi, Bowen and Jiang, Dongsheng and Li, Chenglin and
               Dai, Wenrui and Xiong, Hongkai and Tian, Qi},
  booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
  year      = {2023},
  url       = {https://arxiv.org/abs/2311.01197}
}"""

CHUNK = 2**22  # numbers in the features of neighbours that are compared at a time: more do not fit into caches


@strict
@dataclass
class AiluRusConfig(KeepRateConfig):
    """Fields of AiluRus in `config.reducer_config`.

    Attributes:
        keep_rate: share of the patch tokens that become representatives, in (0, 1]; 0.5 is ours. Instead of it a
            configuration can have a `pruning_rate`, tokens that go at once, or a `pruning_schedule`.
        block: after which block it acts, 1 to L; the paper's statistics are of the second.
        num_neighbors: K, the nearest patches on the grid among which a token looks for others, itself included.
        spatial_weight: alpha in [0, 1], what the distance on the grid weighs against that of features.
        density_neighbors: k, over how many of the nearest tokens the density is a mean; 1 is the nearest other one.
        proportional_attention: a representative of n tokens counts n times as a key.
    """

    keep_rate: float | int = 0.5
    block: int = 2
    num_neighbors: int = 50
    spatial_weight: float | int = 0.9
    density_neighbors: int = 1
    proportional_attention: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.spatial_weight <= 1:
            raise ValueError(f"`spatial_weight` is {self.spatial_weight}; it must be in [0, 1], such as 0.9.")
        for name, least in {"block": 1, "num_neighbors": 2, "density_neighbors": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be {least} or more.")
        if self.density_neighbors >= self.num_neighbors:
            raise ValueError(
                f"`density_neighbors` is {self.density_neighbors}, but a token has {self.num_neighbors - 1} other "
                "neighbours; make it smaller, or `num_neighbors` larger."
            )


def grid_neighbors(grid_size: tuple[int, int], count: int, device: torch.device | None = None) -> torch.Tensor:
    """The `count` patches nearest to each on the grid, from itself on; of equally near ones the first comes first.

    Returns:
        (N, K), K is `count` or all patches.
    """
    rows, columns = grid_size
    count = min(count, rows * columns)
    # Seen from a corner they fill a quarter of a disc, or a strip where the grid is narrow.
    reach = max(math.ceil(math.sqrt(4 * count / math.pi)), math.ceil(count / min(grid_size))) + 1
    height, width = min(rows, 2 * reach + 1), min(columns, 2 * reach + 1)
    places = torch.arange(rows * columns, device=device)
    row, column = places // columns, places % columns
    top, left = (row - reach).clamp(0, rows - height), (column - reach).clamp(0, columns - width)
    window = torch.arange(height * width, device=device)
    # (N, height * width)
    near_row, near_column = top[:, None] + window // width, left[:, None] + window % width
    distance = (near_row - row[:, None]).square() + (near_column - column[:, None]).square()
    nearest = distance.argsort(dim=1, stable=True)[:, :count]
    return (near_row * columns + near_column).gather(1, nearest)


def neighbor_distances(features: torch.Tensor, neighbors: torch.Tensor, spatial_weight: float) -> torch.Tensor:
    """Distance of each patch to its neighbours: of features, and their rank on the grid, weighted.

    Features are compared by ‖zᵢ - zⱼ‖ / √D (the root is ours), ranks count as 0 to 1.

    Args:
        features: (B, N, D), float32.
        neighbors: (N, K), see `grid_neighbors`.
        spatial_weight: of the ranks; features have the rest.

    Returns:
        (B, N, K)
    """
    count, size = neighbors.shape[1], features.shape[-1]
    # A graph is for any number of images, so that its chunks are for one.
    images = 1 if torch.compiler.is_compiling() else len(features)
    chunks = neighbors.split(max(1, CHUNK // (images * count * size)))
    parts = []
    for tokens, near in zip(features.split([len(chunk) for chunk in chunks], dim=1), chunks):
        # (B, n * K, D) -> (B, n, K, D)
        others = features.index_select(1, near.flatten()).unflatten(1, (-1, count))
        parts.append(torch.linalg.vector_norm(others - tokens[:, :, None], dim=-1))
    ranks = torch.arange(count, device=features.device) / count
    return (1 - spatial_weight) / size**0.5 * torch.cat(parts, dim=1) + spatial_weight * ranks


def cluster_tokens(
    features: torch.Tensor, grid_size: tuple[int, int], num_clusters: int, settings: AiluRusConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Density-peak clustering among neighbours: representatives are dense, and far from what is denser.

    Equal densities: the earlier patch counts as denser. Where a token has no representative among its neighbours, it
    goes to the nearest by the same distance among all (ours).

    Args:
        features: (B, N, D)
        grid_size: rows and columns of the N patches.
        num_clusters: M, in [1, N].
        settings: of AiluRus.

    Returns:
        Places of the representatives (B, M), ascending, and for each patch which of them it belongs to, (B, N).
    """
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    neighbors = grid_neighbors(grid_size, settings.num_neighbors, features.device)
    distances = neighbor_distances(features, neighbors, settings.spatial_weight)
    # The nearest neighbour of all is the token itself; for a mean over one it would be the density of nothing.
    of_itself = settings.density_neighbors == 1
    nearest = distances.sort(dim=-1).values[..., of_itself : of_itself + settings.density_neighbors]
    density = (-nearest.square().mean(dim=-1)).exp()  # (B, N)

    places = torch.arange(len(neighbors), device=features.device)
    others = density[:, neighbors]  # (B, N, K)
    is_denser = (others > density[..., None]) | ((others == density[..., None]) & (neighbors < places[:, None]))
    isolation = distances.masked_fill(~is_denser, torch.inf).amin(dim=-1)
    # A peak has no denser neighbour (what it gets instead is ours).
    isolation = torch.where(isolation.isinf(), 2 * distances.amax(dim=(1, 2))[:, None], isolation)
    order = (density * isolation).argsort(dim=1, descending=True, stable=True)
    peaks = order[:, :num_clusters].sort(dim=1).values

    number = torch.full_like(order, -1).scatter(
        1, peaks, torch.arange(num_clusters, device=order.device).expand_as(peaks)
    )
    near = number[:, neighbors]  # (B, N, K)
    nearest_peak = distances.masked_fill(near < 0, torch.inf).min(dim=-1)
    cluster = near.gather(2, nearest_peak.indices[..., None])[..., 0]
    # (B, N, M): all representatives, by features and by distance on the grid in the unit of the ranks
    away = torch.cdist(features, features.gather(1, peaks[..., None].expand(-1, -1, features.shape[-1])))
    rows, columns = places // grid_size[1], places % grid_size[1]
    apart = (rows[:, None] - rows[peaks][:, None]).square() + (columns[:, None] - columns[peaks][:, None]).square()
    ranks = math.pi * apart / settings.num_neighbors  # about as many patches are nearer
    weight = settings.spatial_weight
    far = ((1 - weight) * away / features.shape[-1] ** 0.5 + weight * ranks).argmin(dim=-1)
    cluster = torch.where(nearest_peak.values.isinf(), far, cluster)
    return peaks, cluster.scatter(1, peaks, torch.arange(num_clusters, device=order.device).expand_as(peaks))


@register_token_reducer
class AiluRusReducer(TokenReducer):
    """AiluRus after one block: patches become means of clusters, and those go on.

    Prefix tokens take no part. A cluster stands at the place of its representative, for rotary positions as well. What
    needs every patch gets copies: feature maps of any stage, and dense tasks before their last block (the authors copy
    after it).
    """

    name = "ailurus"
    label = "AiluRus"
    title = "AiluRus (re-implementation)"
    url = "https://arxiv.org/abs/2311.01197"
    citation = CITATION
    budget_field = "keep_rate"
    config_class = AiluRusConfig
    merges = True
    fuses_by_default = False

    def __init__(self, config: CroprViTConfig, block: int):
        super().__init__(config, block)
        self.cluster_settings = self.settings(config)

    @classmethod
    def uses_key_bias(cls, config: CroprViTConfig) -> bool:
        """See `TokenReducer.uses_key_bias`."""
        return cls.setting(config, "proportional_attention")

    @classmethod
    def blocks(cls, config: CroprViTConfig) -> list[int]:
        """See `TokenReducer.blocks`: one of them."""
        return [block for block in super().blocks(config) if block == cls.setting(config, "block")]

    @classmethod
    def kept_by_rate(cls, config: CroprViTConfig, num_patches: int, rate: int) -> list[int]:
        """See `TokenReducer.kept_by_rate`: all of them go at once."""
        if rate >= num_patches:
            raise ValueError(
                f"A pruning rate of {rate} leaves none of {num_patches} patch tokens, since AiluRus removes them at "
                f"once; use a rate of at most {num_patches - 1}."
            )
        (block,) = pruning_blocks(config, cls) or [config.num_hidden_layers + 1]
        kept = [num_patches - rate * (number >= block) for number in range(1, config.num_hidden_layers + 1)]
        return round_up(config, kept, num_patches)

    @classmethod
    def kept_by_default(cls, config: CroprViTConfig, num_patches: int) -> list[int]:
        """By `keep_rate`, rounded up."""
        left = math.ceil(round(cls.setting(config, "keep_rate") * num_patches, 6))
        return cls.kept_by_rate(config, num_patches, num_patches - left)

    @classmethod
    def check_pruning(cls, config: CroprViTConfig) -> None:
        """See `TokenReducer.check_pruning`."""
        block, possible = cls.settings(config).block, super().blocks(config)
        if config.pruning_schedule is None and possible and block not in possible:
            raise ValueError(
                f"`block` of AiluRus is {block}; with {config.num_hidden_layers} blocks"
                f"{' and last layer fusion' * bool(config.last_layer_fusion)} it must be in 1 to {possible[-1]}."
            )
        if len(pruning_blocks(config, cls)) > 1:
            raise ValueError(
                f"The pruning schedule {list(config.pruning_schedule or ())} falls more than once, but AiluRus "
                "clusters once; let it fall after one block."
            )
        super().check_pruning(config)

    def after_block(self, state: TokenState, num_keep: int) -> TokenState:
        """See `TokenReducer.after_block`."""
        if num_keep == state.num_patches:
            return state
        prefix, grid_size = state.num_prefix_tokens, state.grid_size
        assert grid_size is not None  # of all models that embed images
        patches = state.hidden_states[:, prefix:]
        with torch.no_grad():  # a clustering has no gradient
            peaks, cluster = cluster_tokens(patches.detach(), grid_size, num_keep, self.cluster_settings)
            is_peak = torch.zeros_like(cluster).scatter(1, peaks, 1)
            merged = is_peak.argsort(dim=1, stable=True)[:, : patches.shape[1] - num_keep]
            places = torch.arange(prefix, device=peaks.device).expand(peaks.shape[0], -1)
        # Sums in float32: half precision would round them to a few digits.
        wide = patches.to(torch.promote_types(patches.dtype, torch.float32))
        sizes = wide.new_zeros(peaks.shape).scatter_add(1, cluster, torch.ones_like(cluster, dtype=wide.dtype))
        sums = wide.new_zeros(*peaks.shape, wide.shape[-1])
        sums = sums.scatter_add(1, cluster[..., None].expand_as(wide), wide)
        tokens = torch.cat([state.hidden_states[:, :prefix], (sums / sizes[..., None]).to(patches.dtype)], dim=1)
        sizes = torch.cat([sizes.new_ones(places.shape), sizes], dim=1)
        columns = {SIZES: sizes, **({KEY_BIAS: sizes.log()} if self.cluster_settings.proportional_attention else {})}
        return state.merge(
            tokens,
            survivors=torch.cat([places, prefix + peaks], dim=1),
            merged=prefix + merged,
            slots=torch.cat([places, prefix + cluster], dim=1),
            block=self.block,
            columns=columns,
        )


__all__ = ["AiluRusConfig", "AiluRusReducer"]
