"""What a model costs in multiply-adds, by its configuration alone or counted while it runs."""

import math
from collections.abc import Sequence
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from .configuration_cropr_vit import CroprViTConfig


def multiply_adds(
    config: CroprViTConfig,
    grid_size: tuple[int, int] | None = None,
    attention: bool = True,
    pruning: int | Sequence[int] | None = None,
) -> int:
    """Multiply-adds of one image through patch embedding and blocks: linear layers and attention products.

    Args:
        config: any configuration; its schedule and its windows decide the tokens of each block.
        grid_size: rows and columns of patches of the input; those of `config.image_size` by default.
        attention: whether attention products count; the paper's figures of detectors leave them out.
        pruning: a rate or a schedule instead of the configured one, as `set_pruning` takes it.
    """
    grid_size = config.grid_size if grid_size is None else grid_size
    num_patches = grid_size[0] * grid_size[1]
    patches_per_block = [num_patches, *config.kept_patches(num_patches, pruning)[:-1]]
    if config.last_layer_fusion:
        patches_per_block[-1] = num_patches
    size = config.hidden_size
    mlp_weights = (3 if config.use_gated_mlp else 2) * size * config.intermediate_size
    total = num_patches * size * config.num_channels * config.patch_size**2
    for block, patches in enumerate(patches_per_block, start=1):
        tokens = attended = neighbours = patches + config.num_prefix_tokens
        if window_grid := config.window_grid(block, patches, grid_size):
            side = config.window_size
            attended = math.prod(-(-length // side) * side for length in window_grid)  # with padding
            neighbours = side**2
        total += tokens * mlp_weights + attended * 4 * size**2
        if attention:
            total += 2 * attended * neighbours * size
    return total


def head_multiply_adds(model: Any, inputs: dict[str, Any]) -> int:
    """Multiply-adds of a batch in what follows the encoder, as torch counts them while it runs."""
    counter = FlopCounterMode(display=False)
    with counter:
        model(**inputs)
    name = type(model).__name__
    counts = {module: sum(operations.values()) for module, operations in counter.get_flop_counts().items()}
    encoder = name if model.base_model is model else f"{name}.{model.base_model_prefix}"
    return (counts.get(name, 0) - counts.get(encoder, 0)) // 2


def unpruned_config(config: CroprViTConfig) -> CroprViTConfig:
    """The same model without pruning."""
    unpruned = {"token_reducer": None, "pruning_rate": None, "pruning_schedule": None, "use_auxiliary_heads": False}
    return CroprViTConfig(**config.to_dict() | unpruned)
