"""Pictures: which pixels are covered, in which colour, and what is wrong input."""

import numpy as np
import pytest
import torch
from PIL import Image

from cropr_hf.visualization import plot_pruning


NUM_BLOCKS = 6


def overlays(figure) -> list[np.ma.MaskedArray]:
    """The pruning maps that the figure draws, one per image."""
    images = [axis.images for axis in figure.axes if len(axis.images) == 2]
    return [layers[1].get_array() for layers in images]


def test_pruned_patches_are_covered_and_kept_ones_clear(tmp_path):
    maps = torch.tensor([[1, 2, 6, 4], [6, 6, 6, 3]])
    images = [Image.new("RGB", (32, 32), "white")] * 2
    figure = plot_pruning(images, maps, NUM_BLOCKS, titles=["a", "b"])
    first, second = overlays(figure)
    assert first.mask.tolist() == [[False, False], [True, False]]
    assert first.compressed().tolist() == [1, 2, 4]
    assert second.mask.tolist() == [[True, True], [True, False]]
    figure.savefig(tmp_path / "pruning.png")
    with Image.open(tmp_path / "pruning.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 100


def test_blocks_have_different_colours():
    maps = torch.arange(1, 5)[None]
    figure = plot_pruning([np.zeros((8, 8, 3), np.uint8)], maps, NUM_BLOCKS)
    layer = next(axis.images[1] for axis in figure.axes if len(axis.images) == 2)
    colours = layer.cmap(layer.norm(layer.get_array())).reshape(-1, 4)
    assert len({tuple(colour) for colour in colours}) == 4


def test_non_square_grids_and_many_images():
    figure = plot_pruning([np.zeros((16, 24, 3), np.uint8)] * 5, torch.ones(5, 6), NUM_BLOCKS, (2, 3), columns=2)
    assert [layer.shape for layer in overlays(figure)] == [(2, 3)] * 5


def test_what_does_not_fit_is_an_error():
    image = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="grid_size"):
        plot_pruning([image], torch.ones(1, 6), NUM_BLOCKS)
    with pytest.raises(ValueError, match="1 images, 2 pruning maps"):
        plot_pruning([image], torch.ones(2, 4), NUM_BLOCKS)
    with pytest.raises(ValueError, match="3 titles"):
        plot_pruning([image], torch.ones(1, 4), NUM_BLOCKS, titles=["a"] * 3)
