"""What one would do instead of pruning, to time it beside it: a smaller image, a smaller model, int8 weights."""

import copy
import itertools
from bisect import bisect_left
from importlib.util import find_spec

import torch
from transformers.utils import logging

from ..configuration_cropr_vit import SIZES, CroprViTConfig
from .cost import multiply_adds, unpruned_config


logger = logging.get_logger(__name__)

COMPILED, SMALLER_IMAGE, SMALLER_MODEL, INT8 = "compiled", "smaller image", "smaller model", "int8"
ALTERNATIVES = (COMPILED, SMALLER_IMAGE, SMALLER_MODEL, INT8)
FAMILIES = (("tiny", "small", "base", "large", "huge"), ("eva02_tiny", "eva02_small", "eva02_base", "eva02_large"))
SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "use_mlp_norm")


def smaller_image(config: CroprViTConfig) -> CroprViTConfig:
    """The unpruned model on the image on which it costs as many multiply-adds as the pruned one on its own.

    Of smaller images with the sides' proportions, in whole patches, it is the one that comes nearest.
    """
    rows, columns = config.grid_size
    unpruned, target = unpruned_config(config), multiply_adds(config)
    grids = [(count, max(1, round(count * columns / rows))) for count in range(1, max(2, rows))]

    def cost(grid: tuple[int, int]) -> int:
        return multiply_adds(unpruned, grid)

    above = min(bisect_left(grids, target, key=cost), len(grids) - 1)
    grid = min(grids[max(0, above - 1) : above + 1], key=lambda grid: abs(cost(grid) - target))
    size = [count * config.patch_size for count in grid]
    return CroprViTConfig(**unpruned.to_dict() | {"image_size": size})


def smaller_model(config: CroprViTConfig) -> tuple[str, CroprViTConfig] | None:
    """Name and configuration of the next smaller unpruned model of the family, with all fields but those of its size.

    `None` for the smallest of a family, for a size without a name, and where blocks have windows, which are of the
    larger model.
    """
    if config.window_size:
        return None
    own = {name: getattr(config, name) for name in SHAPE}
    for family in FAMILIES:
        shapes = {
            size: {name: SIZES[size].get(name, getattr(CroprViTConfig, name)) for name in SHAPE} for size in family
        }
        for smaller, size in itertools.pairwise(family):
            if shapes[size] == own:
                return smaller, CroprViTConfig.from_dict(unpruned_config(config).to_dict(), **shapes[smaller])
    return None


def quantized(model: torch.nn.Module) -> torch.nn.Module | None:
    """A copy of a model whose linear layers compute in int8, quantised dynamically by torchao; `None` without it.

    Move the model to its device and dtype before.
    """
    if find_spec("torchao") is None:
        logger.warning("torchao is not installed, so that int8 is left out: pip install cropr_hf[int8].")
        return None
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    copied = copy.deepcopy(model)
    quantize_(copied, Int8DynamicActivationInt8WeightConfig())
    return copied
