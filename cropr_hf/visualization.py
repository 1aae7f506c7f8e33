"""Pictures of what was pruned where."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_pruning(
    images: Sequence[Any],
    pruned_after_block: torch.Tensor,
    num_blocks: int,
    grid_size: tuple[int, int] | None = None,
    titles: Sequence[str] | None = None,
    columns: int = 4,
) -> "Figure":
    """A grid of pairs: the image, and the image with each pruned patch in the colour of the block that pruned it.

    Patches that were kept to the end stay clear.

    Args:
        images: B images, each a `PIL.Image.Image` or an array (height, width, 3) of bytes.
        pruned_after_block: (B, patches), as the models return it with `output_pruning=True`.
        num_blocks: L, the value of patches that were kept.
        grid_size: rows and columns of patches; a square by default.
        titles: one for each image.
        columns: pairs in a row of the picture.

    Returns:
        A matplotlib figure; `figure.savefig("pruning.png")` writes it.

    Raises:
        `ImportError`: without matplotlib (`pip install cropr_hf[viz]`).
        `ValueError`: when the numbers of images, maps, titles or patches do not fit.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import BoundaryNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install cropr_hf[viz]") from error
    maps = _pruning_maps(pruned_after_block, grid_size)
    if len(images) != len(maps) or (titles is not None and len(titles) != len(images)):
        raise ValueError(
            f"There are {len(images)} images, {len(maps)} pruning maps"
            f"{'' if titles is None else f' and {len(titles)} titles'}; give one of each per image."
        )
    rows, columns = -(-len(images) // columns), min(columns, len(images))
    figure = Figure(figsize=(3.6 * columns + 1.0, 2.0 * rows), layout="constrained")
    axes = figure.subplots(rows, 2 * columns, squeeze=False)
    colours = colormaps["viridis"].resampled(num_blocks - 1)
    norm = BoundaryNorm(np.arange(0.5, num_blocks), num_blocks - 1)
    for axis in axes.flat:
        axis.set_axis_off()
    for index, (image, blocks) in enumerate(zip(images, maps)):
        left, right = axes[index // columns, 2 * (index % columns) :][:2]
        pixels = np.asarray(image)
        # One pixel per patch, stretched over the image; kept patches are transparent.
        overlay = np.ma.masked_greater_equal(blocks, num_blocks)
        left.imshow(pixels)
        right.imshow(pixels)
        extent = (-0.5, pixels.shape[1] - 0.5, pixels.shape[0] - 0.5, -0.5)
        right.imshow(overlay, cmap=colours, norm=norm, alpha=0.85, extent=extent, interpolation="nearest")
        if titles is not None:
            left.set_title(titles[index], fontsize=8)
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, ticks=range(1, num_blocks), fraction=0.02)
    bar.set_label("pruned after block")
    return figure


def _pruning_maps(pruned_after_block: torch.Tensor, grid_size: tuple[int, int] | None) -> np.ndarray:
    """(B, patches) -> (B, rows, columns)"""
    num_patches = pruned_after_block.shape[1]
    side = int(num_patches**0.5)
    rows, columns = grid_size or (side, side)
    if rows * columns != num_patches:
        raise ValueError(
            f"{num_patches} patches do not form a grid of {rows} x {columns}; give `grid_size` (rows, columns)."
        )
    return pruned_after_block.cpu().numpy().reshape(-1, rows, columns)
