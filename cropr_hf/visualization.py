"""Pictures of what was pruned where, and of label maps and objects beside it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch


if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABEL_OPACITY = 0.6


def plot_pruning(
    images: Sequence[Any],
    pruned_after_block: torch.Tensor,
    num_blocks: int,
    grid_size: tuple[int, int] | None = None,
    titles: Sequence[str] | None = None,
    columns: int = 4,
) -> "Figure":
    """A grid of pairs: the image, and the image with each pruned patch in the colour of the block that pruned it.

    Patches that entered the last block as tokens of their own stay clear.

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
    maps = _pruning_maps(pruned_after_block, grid_size)
    figure, panels = _panels(images, {"pruning maps": maps}, titles, columns)
    _draw_pruning(figure, panels[:, 1], maps, num_blocks)
    return figure


def plot_segmentation(
    images: Sequence[Any],
    label_maps: Sequence[Any],
    pruned_after_block: torch.Tensor | None = None,
    num_blocks: int | None = None,
    grid_size: tuple[int, int] | None = None,
    titles: Sequence[str] | None = None,
    columns: int = 1,
    references: Sequence[Any] | None = None,
    label_names: Mapping[int, str] | None = None,
    clear_labels: Sequence[int] = (),
) -> "Figure":
    """A grid of panels: the image, its true and its predicted classes, and the patches that were pruned.

    A class has the same colour in all figures, and no other class has it.

    Args:
        images: B images, each a `PIL.Image.Image` or an array (height, width, 3) of bytes.
        label_maps: B predictions, each a tensor or array (height, width) of whole numbers; stretched over the image.
        pruned_after_block: as in `plot_pruning`; `None` leaves its panel out.
        num_blocks: as in `plot_pruning`; needed with `pruned_after_block`.
        grid_size: as in `plot_pruning`.
        titles: one for each image.
        columns: images in a row of the picture.
        references: B true label maps, as `label_maps` or as a `PIL.Image.Image` of numbers; `None` leaves their panel
            out.
        label_names: for the legend, such as `model.config.id2label`; a class without a name goes by its number.
        clear_labels: classes that are not drawn, such as the background and the ignored label.

    Returns:
        A matplotlib figure; `figure.savefig("segmentation.png")` writes it.

    Raises:
        `ImportError`: without matplotlib (`pip install cropr_hf[viz]`).
        `ValueError`: when the numbers of images, maps, titles or patches do not fit, or a label map is not one of
            whole numbers (height, width).
    """
    maps = {}
    if references is not None:
        maps["references"] = [_label_map(labels) for labels in references]
    maps["predictions"] = [_label_map(labels) for labels in label_maps]
    kinds = list(maps)
    if pruned_after_block is not None:
        maps["pruning maps"] = _pruning_maps(pruned_after_block, grid_size)
    figure, panels = _titled_panels(images, maps, titles, columns, num_blocks)
    for name, axes in zip(kinds, panels.T[1:]):
        for axis, labels in zip(axes, maps[name]):
            opacity = np.where(np.isin(labels, clear_labels), 0.0, LABEL_OPACITY)
            _overlay(axis, np.dstack([_class_colours(labels), opacity]))
    occurring = {label for name in kinds for labels in maps[name] for label in np.unique(labels).tolist()}
    _draw_legend(figure, sorted(occurring.difference(clear_labels)), label_names or {})
    if num_blocks is not None and pruned_after_block is not None:
        _draw_pruning(figure, panels[:, -1], maps["pruning maps"], num_blocks)
    return figure


def plot_detections(
    images: Sequence[Any],
    detections: Sequence[Mapping[str, Any]],
    pruned_after_block: torch.Tensor | None = None,
    num_blocks: int | None = None,
    grid_size: tuple[int, int] | None = None,
    titles: Sequence[str] | None = None,
    columns: int = 1,
    references: Sequence[Mapping[str, Any]] | None = None,
    label_names: Mapping[int, str] | None = None,
    threshold: float = 0.5,
) -> "Figure":
    """A grid of panels: the image, its true and its detected objects, and the patches that were pruned.

    Args:
        images: B images, each a `PIL.Image.Image` or an array (height, width, 3) of bytes.
        detections: for each image `boxes` (n, 4), corners in pixels of the image, `labels` (n,), `scores` (n,) and
            perhaps `masks` (n, height, width): what `post_process_object_detection` returns.
        pruned_after_block, num_blocks, grid_size, titles: as in `plot_segmentation`.
        columns: images in a row of the picture.
        references: the true objects, as `detections`; without `scores` all are drawn. `None` leaves their panel out.
        label_names: such as `model.config.id2label`; a class without a name goes by its number.
        threshold: least score of a detection that is drawn.

    Returns:
        A matplotlib figure; `figure.savefig("detections.png")` writes it.

    Raises:
        `ImportError`: without matplotlib (`pip install cropr_hf[viz]`).
        `ValueError`: when the numbers of images, detections, titles or patches do not fit, or for a threshold that is
            no score.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"`threshold` is {threshold}; it must be a score in [0, 1], such as 0.5.")
    kinds: dict[str, Sequence[Any]] = {} if references is None else {"objects": references}
    kinds["detections"] = detections
    maps = dict(kinds)
    if pruned_after_block is not None:
        maps["pruning maps"] = _pruning_maps(pruned_after_block, grid_size)
    figure, panels = _titled_panels(images, maps, titles, columns, num_blocks)
    for objects, axes in zip(kinds.values(), panels.T[1:]):
        for axis, found in zip(axes, objects):
            _draw_objects(axis, found, label_names or {}, threshold)
    if num_blocks is not None and pruned_after_block is not None:
        _draw_pruning(figure, panels[:, -1], maps["pruning maps"], num_blocks)
    return figure


def _draw_objects(axis: Any, objects: Mapping[str, Any], names: Mapping[int, str], threshold: float) -> None:
    """Boxes with names and scores, and masks where there are any, each class in its colour."""
    from matplotlib.patches import Rectangle

    arrays = {name: np.asarray(torch.as_tensor(values).cpu()) for name, values in objects.items()}
    scores = arrays.get("scores")
    limits = axis.axis()  # those of the picture; a mask leaves its padding out, and would become the limit
    for index, (box, label) in enumerate(zip(arrays["boxes"], arrays["labels"].tolist())):
        if scores is not None and scores[index] < threshold:
            continue
        colour = _class_colours(np.array(label))
        if "masks" in arrays:
            opacity = LABEL_OPACITY * (arrays["masks"][index] > 0)
            height, width = opacity.shape
            layer = np.dstack([np.broadcast_to(colour, (height, width, 3)), opacity])
            axis.imshow(layer, extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="nearest")
        left, top, right, bottom = box
        # The centre of the first pixel is at 0 in the panel, its edge in the box.
        corner = (left - 0.5, top - 0.5)
        axis.add_patch(Rectangle(corner, right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.2))
        text = names.get(label, str(label)) + ("" if scores is None else f" {scores[index]:.2f}")
        axis.text(left, top, text, fontsize=5, color="white", va="bottom", bbox={"color": colour, "pad": 0.6})
    axis.axis(limits)


def _titled_panels(
    images: Sequence[Any],
    maps: Mapping[str, Sequence[Any]],
    titles: Sequence[str] | None,
    columns: int,
    num_blocks: int | None,
) -> tuple["Figure", np.ndarray]:
    """`_panels` with the names of the maps over the first row."""
    if "pruning maps" in maps and num_blocks is None:
        raise ValueError("`pruned_after_block` needs `num_blocks`, such as `model.config.num_hidden_layers`.")
    figure, panels = _panels(images, maps, titles, columns)
    for name, axes in zip(maps, panels.T[1:]):
        for axis in axes[:columns]:
            axis.set_title(name, fontsize=8)
    return figure, panels


def _panels(
    images: Sequence[Any], maps: Mapping[str, Sequence[Any]], titles: Sequence[str] | None, columns: int
) -> tuple["Figure", np.ndarray]:
    """A figure with one panel for each image itself and one for each of its maps, all of which show the image.

    Returns:
        The figure, and its axes (images, 1 + kinds of maps).
    """
    figure_type = figure_class()
    counts = {"images": len(images), **{name: len(values) for name, values in maps.items()}}
    if titles is not None:
        counts["titles"] = len(titles)
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise ValueError(f"There are {listed}; give one of each per image.")
    num_panels = 1 + len(maps)
    rows, columns = -(-len(images) // columns), min(columns, len(images))
    figure = figure_type(figsize=(1.8 * num_panels * columns + 1.0, 2.0 * rows), layout="constrained")
    axes = figure.subplots(rows, num_panels * columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    # (rows, columns * panels) -> (rows * columns, panels) -> (images, panels)
    panels = axes.reshape(-1, num_panels)[: len(images)]
    for index, (image, image_panels) in enumerate(zip(images, panels)):
        for axis in image_panels:
            axis.imshow(np.asarray(image))
        if titles is not None:
            image_panels[0].set_title(titles[index], fontsize=8)
    return figure, panels


def check_picture(path: str) -> None:
    """Raises before the work is done: `ImportError` without matplotlib, `ValueError` for a file it cannot write."""
    figure_class()
    from matplotlib.backend_bases import FigureCanvasBase

    suffixes = FigureCanvasBase.get_supported_filetypes()
    if Path(path).suffix.lower().removeprefix(".") not in suffixes:
        raise ValueError(f"{path} is to be a picture; name a file that ends with .{', .'.join(sorted(suffixes))}.")


def figure_class() -> "type[Figure]":
    """The figure of matplotlib; raises `ImportError` without it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install cropr_hf[viz]") from error
    return Figure


def _overlay(axis: Any, layer: np.ndarray, **kwargs: Any) -> None:
    """Stretches a layer of any resolution over the image of a panel."""
    axis.imshow(layer, extent=axis.images[0].get_extent(), interpolation="nearest", **kwargs)


def _draw_pruning(figure: "Figure", axes: np.ndarray, maps: Sequence[np.ndarray], num_blocks: int) -> None:
    """Covers the pruned patches of each panel, and explains their colours by a bar."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm

    colours = colormaps["viridis"].resampled(num_blocks - 1)
    norm = BoundaryNorm(np.arange(0.5, num_blocks), num_blocks - 1)
    for axis, blocks in zip(axes, maps):
        # One pixel per patch; kept patches are transparent.
        _overlay(axis, np.ma.masked_greater_equal(blocks, num_blocks), cmap=colours, norm=norm, alpha=0.85)
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=figure.axes, ticks=range(1, num_blocks), fraction=0.02)
    bar.set_label("pruned after block")


def _draw_legend(figure: "Figure", labels: Sequence[int], names: Mapping[int, str]) -> None:
    """Names the classes below the panels."""
    from matplotlib.patches import Patch

    if not labels:
        return
    columns = int(figure.get_figwidth() / 1.5)
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(labels) // columns))
    handles = [
        Patch(facecolor=(*colour, LABEL_OPACITY), label=names.get(label, str(label)))
        for label, colour in zip(labels, _class_colours(np.array(labels)))
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def _class_colours(labels: np.ndarray) -> np.ndarray:
    """(...) -> (..., 3), red, green and blue in [0, 1): a sequence that fills the cube evenly, however long it is.

    Source: M. Roberts, "The unreasonable effectiveness of quasirandom sequences" (2018), in three dimensions.
    """
    plastic = 1.2207440846057596  # the root of x**4 = x + 1
    return (0.5 + labels[..., None] / plastic ** np.arange(1, 4)) % 1


def _label_map(labels: Any) -> np.ndarray:
    """(height, width)"""
    array = np.asarray(labels.cpu() if isinstance(labels, torch.Tensor) else labels)
    if array.ndim != 2 or array.dtype.kind not in "iu":
        raise ValueError(
            f"A label map is {array.dtype} of the shape {array.shape}; it must be whole numbers (height, width), such "
            "as the argmax of an image's logits over the classes."
        )
    return array


def _pruning_maps(pruned_after_block: torch.Tensor, grid_size: tuple[int, int] | None) -> list[np.ndarray]:
    """(B, patches) -> B times (rows, columns)"""
    num_patches = pruned_after_block.shape[1]
    side = int(num_patches**0.5)
    rows, columns = grid_size or (side, side)
    if rows * columns != num_patches:
        raise ValueError(
            f"{num_patches} patches do not form a grid of {rows} x {columns}; give `grid_size` (rows, columns)."
        )
    return list(pruned_after_block.cpu().numpy().reshape(-1, rows, columns))
