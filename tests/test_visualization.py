"""Pictures: which pixels are covered, in which colour, and what is wrong input."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from cropr_hf.visualization import LABEL_OPACITY, plot_detections, plot_pruning, plot_segmentation


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


def class_layer(figure, panel: int) -> np.ndarray:
    """Colours and opacities (rows, columns, 4) over a panel, which is over the whole image."""
    image, layer = figure.axes[panel].images
    assert layer.get_extent() == image.get_extent()
    return np.asarray(layer.get_array())


def legend(figure) -> dict[str, tuple[float, ...]]:
    """Names and colours."""
    return {patch.get_label(): patch.get_facecolor() for patch in figure.legends[0].get_patches()}


def panel_titles(figure) -> list[str]:
    return [axis.get_title() for axis in figure.axes if axis.images]


def test_classes_have_the_colours_of_the_legend_and_cleared_ones_none():
    predictions = [torch.tensor([[0, 1, 1], [2, 0, 255]]), np.full((1, 1), 2, np.uint8)]
    references = [Image.fromarray(np.array([[0, 3], [1, 1]], np.uint8)), np.full((4, 4), 255)]
    figure = plot_segmentation(
        [np.zeros((8, 12, 3), np.uint8)] * 2,
        predictions,
        torch.tensor([[1, 6], [6, 2]]),
        NUM_BLOCKS,
        grid_size=(1, 2),
        titles=["a", "b"],
        references=references,
        label_names={1: "cat", 2: "dog"},
        clear_labels=[0, 255],
    )
    assert panel_titles(figure)[:8] == ["a", "references", "predictions", "pruning maps", "b", "", "", ""]
    colours = legend(figure)
    assert list(colours) == ["cat", "dog", "3"]
    assert len(set(colours.values())) == 3
    drawn = {1: colours["cat"], 2: colours["dog"], 3: colours["3"]}
    for panel, labels in ((1, references[0]), (2, predictions[0]), (5, references[1]), (6, predictions[1])):
        labels, layer = np.asarray(labels), class_layer(figure, panel)
        assert layer.shape == (*labels.shape, 4)
        for label, colour in drawn.items():
            assert (layer[labels == label] == colour).all()
        assert ((layer[..., 3] == 0) == np.isin(labels, [0, 255])).all()
    first, second = overlays(figure)[2::3]
    assert first.mask.tolist() == [[False, True]] and second.mask.tolist() == [[True, False]]


def test_the_drawn_picture_mixes_image_and_class_colour():
    figure = plot_segmentation([Image.new("RGB", (40, 40), "white")], [[[0, 7]]], None, NUM_BLOCKS, clear_labels=[0])
    assert len(figure.axes) == 2  # neither a pruning map nor its colour bar
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    picture = np.asarray(Image.open(buffer).convert("RGB"))
    frame = figure.axes[1].get_window_extent()
    row = picture.shape[0] - int(frame.y0 + frame.height / 2)
    left, right = (picture[row, int(frame.x0 + frame.width * share)] for share in (0.25, 0.75))
    colour = np.array(legend(figure)["7"][:3])
    assert left.tolist() == [255, 255, 255]
    np.testing.assert_allclose(right, 255 * (1 - LABEL_OPACITY + LABEL_OPACITY * colour), atol=2)


def test_any_number_of_classes_has_different_colours():
    image = np.zeros((4, 4, 3), np.uint8)
    colours = class_layer(plot_segmentation([image], [np.arange(-100, 150)[None]], None, NUM_BLOCKS), panel=1)[0]
    assert len({tuple(colour) for colour in colours}) == 250
    colours = colours[100:]
    distances = np.linalg.norm(colours[:, None, :3] - colours[None, :, :3], axis=-1) + 9 * np.eye(150)
    assert distances[:20, :20].min() > 0.25 and distances.min() > 0.1
    alone = plot_segmentation([image], [np.full((2, 2), 149)], None, NUM_BLOCKS)
    assert (class_layer(alone, panel=1) == colours[149]).all()


def test_without_a_drawn_class_there_is_no_legend():
    figure = plot_segmentation([np.zeros((4, 4, 3), np.uint8)], [[[0, 0]]], None, NUM_BLOCKS, clear_labels=[0])
    assert figure.legends == []


def test_columns_of_images_fill_the_picture_row_by_row():
    images = [np.full((4, 4, 3), shade, np.uint8) for shade in (0, 100, 200)]
    figure = plot_segmentation(images, [[[0]], [[1]], [[2]]], None, NUM_BLOCKS, columns=2)
    assert panel_titles(figure) == ["", "predictions", "", "predictions", "", ""]
    panels = [axis for axis in figure.axes if axis.images]
    assert [int(axis.images[0].get_array()[0, 0, 0]) for axis in panels] == [0, 0, 100, 100, 200, 200]
    colours = list(legend(figure).values())
    assert [tuple(class_layer(figure, panel)[0, 0]) for panel in (1, 3, 5)] == colours


def test_detections_are_drawn_where_they_are():
    """An object of class 3 that was there, found with another box, a mask and a doubtful companion of class 1."""
    image = np.zeros((20, 30, 3), np.uint8)
    mask = torch.zeros(2, 20, 30, dtype=torch.bool)
    mask[0, 5:10, 8:12] = True
    found = {
        "boxes": torch.tensor([[8.0, 5.0, 12.0, 10.0], [0.0, 0.0, 4.0, 4.0]]),
        "labels": torch.tensor([3, 1]),
        "scores": torch.tensor([0.9, 0.4]),
        "masks": mask,
    }
    truth = {"boxes": torch.tensor([[7.0, 5.0, 12.0, 11.0]]), "labels": torch.tensor([3])}
    blocks = torch.tensor([[1, NUM_BLOCKS]])
    figure = plot_detections([image], [found], blocks, NUM_BLOCKS, (1, 2), references=[truth], label_names={3: "cat"})
    assert panel_titles(figure)[:4] == ["", "objects", "detections", "pruning maps"]
    true, seen = figure.axes[1:3]
    assert [patch.get_bbox().bounds for patch in true.patches] == [(6.5, 4.5, 5, 6)]
    assert [patch.get_bbox().bounds for patch in seen.patches] == [(7.5, 4.5, 4, 5)]
    assert [text.get_text() for text in (*true.texts, *seen.texts)] == ["cat", "cat 0.90"]
    layer = seen.images[1]
    assert tuple(layer.get_extent()) == (-0.5, 29.5, 19.5, -0.5)
    assert np.array_equal(layer.get_array()[..., 3] > 0, mask[0])
    assert len(true.images) == 1  # no masks
    assert overlays(figure)[-1].mask.tolist() == [[False, True]]
    everything = plot_detections([image], [found], threshold=0.0)
    assert [text.get_text() for text in everything.axes[1].texts] == ["3 0.90", "1 0.40"]


def test_masks_may_leave_padding_out():
    """Those of the upper half: the panel still shows the whole image."""
    found = {"boxes": torch.tensor([[2.0, 2.0, 6.0, 6.0]]), "labels": torch.tensor([3]), "scores": torch.tensor([0.9])}
    image = np.zeros((20, 30, 3), np.uint8)
    figure = plot_detections([image], [{**found, "masks": torch.ones(1, 10, 30)}])
    assert figure.axes[1].axis() == figure.axes[0].axis() == (-0.5, 29.5, 19.5, -0.5)


def test_detections_that_do_not_fit_are_an_error():
    image, nothing = np.zeros((8, 8, 3), np.uint8), {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0)}
    with pytest.raises(ValueError, match="1 images, 2 detections; give one of each"):
        plot_detections([image], [nothing] * 2)
    with pytest.raises(ValueError, match="needs `num_blocks`"):
        plot_detections([image], [nothing], torch.ones(1, 4))
    with pytest.raises(ValueError, match="`threshold` is nan; it must be a score"):
        plot_detections([image], [nothing], threshold=float("nan"))


def test_label_maps_that_do_not_fit_are_an_error():
    image = np.zeros((8, 8, 3), np.uint8)
    labels = np.zeros((2, 2), int)
    with pytest.raises(ValueError, match="1 images, 2 predictions; give one of each"):
        plot_segmentation([image], [labels] * 2, None, NUM_BLOCKS)
    with pytest.raises(ValueError, match="1 images, 2 references, 1 predictions, 3 pruning maps"):
        plot_segmentation([image], [labels], torch.ones(3, 4), NUM_BLOCKS, references=[labels] * 2)
    with pytest.raises(ValueError, match=r"float32 of the shape \(5, 2, 2\).*argmax"):
        plot_segmentation([image], torch.zeros(1, 5, 2, 2), None, NUM_BLOCKS)
    with pytest.raises(ValueError, match="float64"):
        plot_segmentation([image], [labels], None, NUM_BLOCKS, references=[labels * 0.5])
