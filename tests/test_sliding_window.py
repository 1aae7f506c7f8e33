"""Sliding windows: where they lie, how they are averaged, and what is wrong input."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cropr_hf import CroprViTForSemanticSegmentation
from cropr_hf.modeling_cropr_vit_segmentation import upsample
from cropr_hf.sliding_window import sliding_window_logits
from tests.common import assert_close_relative, make_images, make_model, tiny_config


class Recorder(nn.Module):
    """Answers by a function of the images, and keeps what it was given."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.seen: list[torch.Tensor] = []

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        self.seen.append(pixel_values)
        return SimpleNamespace(logits=self.function(pixel_values))


def positions(height: int, width: int) -> torch.Tensor:
    """An image (1, 1, height, width) whose pixels are numbered."""
    return torch.arange(height * width, dtype=torch.float32).view(1, 1, height, width)


@pytest.mark.parametrize(
    ("window_size", "stride"),
    [(8, None), (8, 3), ((5, 9), (4, 9)), ((4, 6), 1), ((32, 6), 4), (64, 64)],
)
@pytest.mark.parametrize("batch_size", [1, 4, 1000])
def test_a_function_of_each_pixel_is_the_same_by_windows(window_size, stride, batch_size):
    images = make_images(2, height=17, width=23)
    model = Recorder(lambda x: torch.cat([x, x.square().sum(1, keepdim=True)], dim=1))
    logits = sliding_window_logits(model, images, window_size, stride, batch_size)
    assert logits.dtype == torch.float32
    assert_close_relative(logits, model.function(images))
    assert all(len(crops) == batch_size for crops in model.seen[:-1])
    assert 1 <= len(model.seen[-1]) <= batch_size


@pytest.mark.parametrize(
    ("size", "window_size", "stride", "tops", "lefts", "extent"),
    [
        ((16, 16), 8, None, [0, 8], [0, 8], (8, 8)),  # whole windows only
        ((16, 20), 8, None, [0, 8], [0, 8, 12], (8, 8)),  # the last column is moved back
        ((9, 16), 8, 4, [0, 1], [0, 4, 8], (8, 8)),
        ((10, 11), (4, 6), (3, 5), [0, 3, 6], [0, 5], (4, 6)),
        ((5, 20), 8, 8, [0], [0, 8, 12], (5, 8)),  # lower than a window
        ((5, 7), 8, 2, [0], [0], (5, 7)),
    ],
)
def test_windows_start_at_multiples_of_the_stride_and_end_at_the_border(
    size, window_size, stride, tops, lefts, extent
):
    model = Recorder(lambda x: x)
    sliding_window_logits(model, positions(*size), window_size, stride)
    assert {tuple(crops.shape) for crops in model.seen} == {(1, 1, *extent)}
    starts = [divmod(int(crops[0, 0, 0, 0]), size[1]) for crops in model.seen]
    assert starts == [(top, left) for top in tops for left in lefts]


def test_logits_are_the_mean_over_the_windows_of_a_pixel():
    """The nth window answers n everywhere, at a lower resolution than the window's and in another type."""
    model = Recorder(lambda x: torch.full((1, 2, 1, 2), float(len(model.seen)), dtype=torch.bfloat16))
    logits = sliding_window_logits(model, torch.zeros(2, 3, 4, 6), window_size=4, stride=1)
    # Windows 1, 2, 3 of the first image start at columns 0, 1, 2; windows 4, 5, 6 are those of the second.
    first = torch.tensor([1, 1.5, 2, 2, 2.5, 3])
    assert logits.dtype == torch.float32
    assert_close_relative(logits[0], first.expand(2, 4, 6))
    assert_close_relative(logits[1], (first + 3).expand(2, 4, 6))


def test_logits_of_a_window_are_upsampled_to_it():
    model = Recorder(lambda x: nn.functional.avg_pool2d(x, 4))
    image = make_images(1, height=8, width=16)
    logits = sliding_window_logits(model, image, window_size=8)
    expected = [upsample(nn.functional.avg_pool2d(half, 4), (8, 8)) for half in image.chunk(2, dim=-1)]
    assert_close_relative(logits, torch.cat(expected, dim=-1))


@pytest.mark.parametrize("name", ["plain", "unpruned"])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40), (27, 30)])
def test_one_window_is_a_plain_forward(name, height, width):
    model = make_model(CroprViTForSemanticSegmentation, tiny_config(name, num_queries=None))
    images = make_images(2, height, width)
    with torch.no_grad():
        expected = upsample(model(images).logits, (height, width))
    assert_close_relative(sliding_window_logits(model, images, window_size=48, batch_size=2), expected)


def test_the_batch_size_does_not_matter_to_a_pruned_model():
    model = make_model(CroprViTForSemanticSegmentation, tiny_config(num_queries=None))
    images = make_images(2, height=40, width=56)
    single, pooled = (sliding_window_logits(model, images, 32, 16, batch_size) for batch_size in (1, 5))
    assert single.shape == (2, model.num_labels, 40, 56)
    assert not single.requires_grad and not single.is_inference()
    assert_close_relative(pooled, single)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"window_size": 8, "stride": 9},
        {"window_size": (8, 4), "stride": 5},
        {"window_size": 0},
        {"window_size": (8, -1)},
        {"window_size": 8, "stride": 0},
        {"window_size": 8, "batch_size": 0},
    ],
)
def test_sizes_that_do_not_fit_are_an_error(kwargs):
    with pytest.raises(ValueError, match=r"`window_size` is .*at least 1, and the stride at most the window size"):
        sliding_window_logits(Recorder(lambda x: x), torch.zeros(1, 3, 16, 16), **kwargs)


@pytest.mark.parametrize("shape", [(3, 16, 16), (0, 3, 16, 16)])
def test_no_images_are_an_error(shape):
    with pytest.raises(ValueError, match=r"shape \(.*give at least one image"):
        sliding_window_logits(Recorder(lambda x: x), torch.zeros(shape), window_size=8)
