"""Semantic segmentation of images that are larger than what the model was trained on."""

import torch
from torch import nn

from .modeling_cropr_vit_segmentation import upsample


@torch.no_grad()
def sliding_window_logits(
    model: nn.Module,
    pixel_values: torch.Tensor,
    window_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    batch_size: int = 1,
) -> torch.Tensor:
    """Logits of every pixel, the mean over all windows that cover it; without gradients.

    Windows start at multiples of the stride. Those of the last row and column are moved back, so that they end at the
    border. An image that is smaller than the window in a direction is one window there, of its own extent.

    Args:
        model: a semantic segmentation model in evaluation mode, whose output for images (N, channels, height, width)
            has `logits` (N, C, rows, columns) that cover them, at any resolution.
        pixel_values: images (B, channels, H, W) on the device of the model.
        window_size: height and width of a window in pixels; one number for both.
        stride: step from window to window in pixels, downwards and to the right; one number for both; the window size
            by default.
        batch_size: windows in a forward pass, whichever image they are from.

    Returns:
        (B, C, H, W) in float32

    Raises:
        `ValueError`: sizes that are not positive, a stride above the window size, or `pixel_values` that are
            empty or have other than four dimensions.
    """
    window, step = _pair(window_size), _pair(window_size if stride is None else stride)
    if min(*window, *step, batch_size) < 1 or step[0] > window[0] or step[1] > window[1]:
        raise ValueError(
            f"`window_size` is {window_size}, `stride` {stride} and `batch_size` {batch_size}; make all at least 1, "
            "and the stride at most the window size, or pixels would be left out."
        )
    if pixel_values.dim() != 4 or not pixel_values.numel():
        raise ValueError(
            f"`pixel_values` have the shape {tuple(pixel_values.shape)}; give at least one image, as (images, "
            "channels, height, width)."
        )
    height, width = (min(sizes) for sizes in zip(window, pixel_values.shape[-2:]))
    tops, lefts = (
        [*range(0, length - extent, start), length - extent]
        for length, extent, start in zip(pixel_values.shape[-2:], (height, width), step)
    )
    windows = [
        (image, slice(top, top + height), slice(left, left + width))
        for image in range(len(pixel_values))
        for top in tops
        for left in lefts
    ]
    covered = torch.zeros(pixel_values.shape[-2:], device=pixel_values.device)
    for first in range(0, len(windows), batch_size):
        batch = windows[first : first + batch_size]
        crops = torch.stack([pixel_values[image, :, rows, columns] for image, rows, columns in batch])
        logits = upsample(model(pixel_values=crops).logits, (height, width))
        if first == 0:
            total = logits.new_zeros(len(pixel_values), logits.shape[1], *pixel_values.shape[-2:])
        for (image, rows, columns), window_logits in zip(batch, logits):
            total[image, :, rows, columns] += window_logits
            if image == 0:  # the windows of all images are the same
                covered[rows, columns] += 1
    return total.div_(covered)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size
