"""What a model costs in multiply-adds, counted while it runs, without its weights or on them."""

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..configuration_cropr_vit import CroprViTConfig
from ..modeling_cropr_vit import CroprViTModel
from ..token_reduction import find_token_reducer
from ..token_schedule import pruning_blocks


def multiply_adds(
    config: CroprViTConfig,
    grid_size: tuple[int, int] | None = None,
    attention: bool = True,
    pruning: int | Sequence[int] | None = None,
) -> int:
    """Multiply-adds of one image through the encoder, with what its method multiplies, as torch counts them.

    The model is built and run on the meta device, which computes nothing. Products of a matrix and a single vector,
    such as the scores of a stripped Cropr module (D per token), are not in torch's count.

    Args:
        config: any configuration; its schedule and its windows decide the tokens of each block.
        grid_size: rows and columns of patches of the input; those of `config.image_size` by default.
        attention: whether products of activations with each other count (attention, similarities of tokens); the
            paper's figures of detectors leave them out.
        pruning: a rate or a schedule instead of the configured one, as `set_pruning` takes it.
    """
    stripped = CroprViTConfig(**config.to_dict() | {"use_auxiliary_heads": False, "dtype": None})
    plain = pruning if pruning is None or isinstance(pruning, int) else tuple(pruning)
    total, between = _count(stripped.to_json_string(use_diff=False), grid_size or config.grid_size, plain)
    return total if attention else total - between


def mean_multiply_adds(
    config: CroprViTConfig,
    kept: torch.Tensor,
    grid_size: tuple[int, int] | None = None,
    attention: bool = True,
) -> float:
    """Multiply-adds of the mean image through the encoder, where each image has numbers of patches of its own.

    What follows a module costs a + b n + c n² for n patches that it leaves: linear layers, and products of tokens with
    each other. Three numbers of n tell that polynomial, whose mean over the images is that of their costs; the cost of
    the mean number would be less.

    Args:
        config, grid_size, attention: see `multiply_adds`; of a method that `counts_vary`.
        kept: (images, L), patch tokens left after each block, such as `patches_kept` of a model's output.

    Raises:
        `ValueError`: for a grid of fewer than four patches, on which there are no three numbers below that of all.
    """
    rows, columns = grid_size or config.grid_size
    if rows * columns < 4:
        raise ValueError(f"The grid has {rows} x {columns} patches; give images of four or more.")
    # With all of them left, some methods do nothing, and cost nothing.
    most, some, one = rows * columns - 1, rows * columns // 2, 1
    blocks = pruning_blocks(config, find_token_reducer(config))

    def cost(block: int, left: int) -> int:
        """Where the modules leave `most` patches, and those from a block on `left`."""
        numbers = range(1, config.num_hidden_layers + 1)
        schedule = [rows * columns if each < blocks[0] else most if each < block else left for each in numbers]
        return multiply_adds(config, grid_size, attention, schedule)

    unlimited = config.num_hidden_layers + 1
    total = float(cost(unlimited, most))
    for block, following in zip(blocks, [*blocks[1:], unlimited]):
        counts = kept[:, block - 1].double()
        for left, other in ((some, one), (one, some)):
            share = (counts - most) * (counts - other) / ((left - most) * (left - other))  # Lagrange's polynomial
            total += share.mean().item() * (cost(block, left) - cost(following, left))
    return total


@cache  # searches and cards ask again and again
def _count(config: str, grid_size: tuple[int, int], pruning: int | tuple[int, ...] | None) -> tuple[int, int]:
    """Multiply-adds of a configuration in JSON: all, and those of activations with each other."""
    parsed = CroprViTConfig(**json.loads(config))
    height, width = (length * parsed.patch_size for length in grid_size)
    with torch.device("meta"):
        # Eager attention is written in products that the counter knows, whatever kernels a device has.
        model = CroprViTModel._from_config(parsed, attn_implementation="eager").eval()
        pixels = torch.empty(1, parsed.num_channels, height, width)
    model.pruning = pruning if pruning is None or isinstance(pruning, int) else list(pruning)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(pixels)
    operations = counter.get_flop_counts()["Global"]
    between = sum(operations.get(name, 0) for name in (torch.ops.aten.bmm, torch.ops.aten.baddbmm))
    return sum(operations.values()) // 2, between // 2


def head_multiply_adds(model: Any, inputs: dict[str, Any]) -> int:
    """Multiply-adds of a batch in what follows the encoder, as torch counts them while it runs."""
    with FlopCounterMode(display=False) as counter:
        model(**inputs)
    name = type(model).__name__
    counts = {module: sum(operations.values()) for module, operations in counter.get_flop_counts().items()}
    encoder = name if model.base_model is model else f"{name}.{model.base_model_prefix}"
    return (counts.get(name, 0) - counts.get(encoder, 0)) // 2


def unpruned_config(config: CroprViTConfig) -> CroprViTConfig:
    """The same model without pruning."""
    unpruned = {
        "token_reducer": None,
        "reducer_config": None,
        "reducer_package": None,
        "pruning_rate": None,
        "pruning_schedule": None,
        "use_auxiliary_heads": False,
    }
    return CroprViTConfig(**config.to_dict() | unpruned)
