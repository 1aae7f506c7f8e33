# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Cluttered digits: small images in which most patches do not matter.

Each image shows handwritten digits (the 8x8 scans that scikit-learn bundles, enlarged and slightly distorted) at
random places on an RGB canvas full of distractors: fragments of other digits, a colour gradient, and noise. The
images are drawn, not stored, so nothing is downloaded; one image takes well under a millisecond.

Image `i` is a function of the split, the seed, `i` and the drawing settings alone. It uses only NumPy's frozen
`RandomState` streams, integers and Pillow, so it depends neither on the machine nor on the number of images drawn.
"""

from dataclasses import dataclass
from functools import cache
from io import BytesIO
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetInfo, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from sklearn.datasets import load_digits


DIGIT_NAMES = [str(digit) for digit in range(10)]
"""Class names of `label` and `objects["category"]`, and of the ids 0..9 of `label_map`."""

BACKGROUND = 10
"""Id in `label_map` of pixels without a digit. A segmentation model thus has 11 classes: `DIGIT_NAMES` and this."""

# Shares of the 1797 scans, after one fixed shuffle: 70 % train, 15 % validation, 15 % test.
_SPLIT_BOUNDS = {"train": (0, 1257), "validation": (1257, 1527), "test": (1527, 1797)}
_SOURCE_SIZE = 10  # an 8x8 scan with a margin of one pixel
_INK_THRESHOLD = 80  # opacity (0..255) from which a pixel belongs to the digit's mask
_MAX_SLANT = 0.15  # largest off-diagonal entry of the random affine distortion


@dataclass(frozen=True)
class DrawnImage:
    """One drawn image. All images have `image_size` x `image_size` pixels.

    Attributes:
        image: The picture, mode "RGB".
        label: Class 0..9 of the object with the largest `area` (the first of equals).
        label_map: Class of each pixel, mode "L": 0..9 for digits, `BACKGROUND` elsewhere.
        instance_map: Object of each pixel, mode "L": `k` (from 1) for the `k`-th object, 0 for none.
        objects: Lists with one entry per object: `area` (pixels), `bbox` (`[x, y, width, height]` in pixels) and
            `category` (0..9).
    """

    image: Image.Image
    label: int
    label_map: Image.Image
    instance_map: Image.Image
    objects: dict[str, list[Any]]


@dataclass(frozen=True)
class DigitPainter:
    """Settings that describe a stream of cluttered digit images; `draw` paints any image of it.

    Args:
        split: "train", "validation" or "test". No scanned digit serves in two splits, neither as digit nor as clutter.
            (The scans are divided at random: the same people wrote the digits of all splits.)
        image_size: Side of the square image in pixels.
        num_digits: Digits per image: a number, or the least and the greatest number. Digits do not overlap.
        digit_size: Least and greatest side, in pixels, of the square cell a digit is drawn in. The ink of an upright
            digit covers about 80 % of the cell's height.
        num_fragments: Fragments of other digits in the background. Those that would touch a digit are left out.
        noise: Greatest amount (0..255) by which noise changes the brightness of a pixel.
        least_ink: Least value (0..255) of each colour channel of digits and fragments. The background has at most 90.
        seed: Seed in `[0, 2**32)`.

    Raises:
        ValueError: If a setting is out of its range, or if so many digits do not surely fit without overlap.
    """

    split: str
    image_size: int = 96
    num_digits: int | tuple[int, int] = 1
    digit_size: tuple[int, int] = (28, 32)
    num_fragments: int = 8
    noise: int = 12
    least_ink: int = 150
    seed: int = 0

    def __post_init__(self) -> None:
        if self.split not in _SPLIT_BOUNDS:
            raise ValueError(f"split is {self.split!r}, but has to be one of {list(_SPLIT_BOUNDS)}.")
        low, high = self.digit_size
        if not 8 <= low <= high <= self.image_size:
            raise ValueError(
                f"digit_size is {self.digit_size}, but has to be (least, greatest) with 8 <= least <= greatest <= "
                f"image_size = {self.image_size}. Change digit_size, or enlarge image_size."
            )
        _check_range("num_fragments", self.num_fragments, 0, 10_000)
        _check_range("noise", self.noise, 0, 255)
        _check_range("least_ink", self.least_ink, 0, 255)
        _check_range("seed", self.seed, 0, 2**32 - 1)
        least, most = self._digit_range()
        # A placed digit rules out at most (2 * high - 1)^2 of the at least (image_size - high + 1)^2 places of the
        # next one, so this many digits can always be placed one after the other.
        capacity = min(255, 1 + ((self.image_size - high + 1) ** 2 - 1) // (2 * high - 1) ** 2)
        if not 1 <= least <= most <= capacity:
            raise ValueError(
                f"num_digits is {self.num_digits}, but has to be in 1..{capacity} (for a pair: least <= greatest) for "
                f"digits of up to {high} pixels to fit in {self.image_size} x {self.image_size} pixels without "
                "overlap. Draw fewer digits, lower digit_size, or enlarge image_size."
            )

    def draw(self, index: int) -> DrawnImage:
        """Paints image `index` (from 0) of the stream.

        Raises:
            ValueError: If `index` is not in `[0, 2**32)`.
        """
        _check_range("index", index, 0, 2**32 - 1)
        rng = np.random.RandomState([self.seed, list(_SPLIT_BOUNDS).index(self.split), index])
        scans, classes = _source_digits(self.split)
        size = (self.image_size, self.image_size)
        image = _background(rng, self.image_size)
        label_map, instance_map = Image.new("L", size, BACKGROUND), Image.new("L", size, 0)
        objects: dict[str, list[Any]] = {"area": [], "bbox": [], "category": []}
        least, most = self._digit_range()
        for number in range(1, rng.randint(least, most + 1) + 1):
            source = rng.randint(len(scans))
            opacity = _distorted(rng, scans[source], rng.randint(self.digit_size[0], self.digit_size[1] + 1))
            ink = opacity.point(_INK_TABLE)
            left, top, right, bottom = ink.getbbox()
            ink, opacity = ink.crop((left, top, right, bottom)), opacity.crop((left, top, right, bottom))
            x, y = _free_place(rng, self.image_size, ink.size, objects["bbox"])
            image.paste(_ink_colours(rng, 1, self.least_ink)[0], (x, y), opacity)
            label_map.paste(int(classes[source]), (x, y), ink)
            instance_map.paste(number, (x, y), ink)
            objects["area"].append(ink.histogram()[255])
            objects["bbox"].append([x, y, *ink.size])
            objects["category"].append(int(classes[source]))
        self._paint_fragments(rng, image, objects["bbox"])
        label = objects["category"][int(np.argmax(objects["area"]))]
        return DrawnImage(_with_noise(rng, image, self.noise), label, label_map, instance_map, objects)

    def _digit_range(self) -> tuple[int, int]:
        """Least and greatest number of digits per image."""
        return (self.num_digits, self.num_digits) if isinstance(self.num_digits, int) else tuple(self.num_digits)

    def _paint_fragments(self, rng: np.random.RandomState, image: Image.Image, boxes: list[list[int]]) -> None:
        """Paints pieces of scans, each 3 or 4 scan pixels wide and high, where they do not meet `boxes`, in place."""
        scans, _ = _source_digits(self.split)
        count = self.num_fragments
        sources = rng.randint(len(scans), size=count).tolist()
        cells = rng.randint(self.digit_size[0], self.digit_size[1] + 1, size=count).tolist()
        extents = rng.randint(3, 5, size=(count, 2)).tolist()
        colours = _ink_colours(rng, count, self.least_ink)
        offsets = rng.uniform(size=(count, 4)).tolist()  # shares of the possible offsets in the scan and in the image
        for source, cell, (width, height), colour, offset in zip(
            sources, cells, extents, colours, offsets, strict=True
        ):
            w, h = width * cell // _SOURCE_SIZE, height * cell // _SOURCE_SIZE
            x, y = int(offset[2] * (self.image_size - w + 1)), int(offset[3] * (self.image_size - h + 1))
            if any(x < bx + bw and bx < x + w and y < by + bh and by < y + h for bx, by, bw, bh in boxes):
                continue
            left, top = 1 + int(offset[0] * (9 - width)), 1 + int(offset[1] * (9 - height))
            box = (left, top, left + width, top + height)
            piece = scans[source].resize((w, h), Image.Resampling.BILINEAR, box=box)
            image.paste(colour, (x, y), piece)


def cluttered_digits(
    split: str,
    num_images: int,
    *,
    image_size: int = 96,
    num_digits: int | tuple[int, int] = 1,
    digit_size: tuple[int, int] = (28, 32),
    num_fragments: int = 8,
    noise: int = 12,
    least_ink: int = 150,
    seed: int = 0,
) -> Dataset:
    """Draws `num_images` cluttered digit images as an in-memory data set; see `DigitPainter` for the settings.

    Returns:
        A data set with the columns `image_id` (0, 1, ...), `image` (RGB), `width` and `height` (pixels), `label`
        (0..9, the digit with the largest area), `label_map` (mode "L"; 0..9 for digits, 10 for background),
        `instance_map` (mode "L"; `k` for the `k`-th object, 0 for none), and `objects`: lists with, per object, `id`
        (unique in the data set), `area` (pixels), `bbox` (COCO: `[x, y, width, height]` in pixels) and `category`
        (0..9). Row `i` does not depend on `num_images`.

    Raises:
        ValueError: If `num_images` is below 1 or a setting is out of its range.
    """
    _check_range("num_images", num_images, 1, 2**32 - 1)
    painter = DigitPainter(split, image_size, num_digits, digit_size, num_fragments, noise, least_ink, seed)
    columns: dict[str, list[Any]] = {name: [] for name in _features()}
    for index in range(num_images):
        drawn = painter.draw(index)
        ids = [index * 1000 + number for number in range(1, len(drawn.objects["area"]) + 1)]
        row = {
            "image_id": index,
            "image": _encoded(drawn.image),
            "width": image_size,
            "height": image_size,
            "label": drawn.label,
            "label_map": _encoded(drawn.label_map),
            "instance_map": _encoded(drawn.instance_map),
            "objects": {"id": ids, **drawn.objects},
        }
        for name, value in row.items():
            columns[name].append(value)
    info = DatasetInfo(dataset_name="cluttered_digits", features=_features())
    return Dataset.from_dict(columns, info=info, split=split)


def _features() -> Features:
    """Column types of the data set."""
    return Features(
        {
            "image_id": Value("int64"),
            "image": ImageFeature(mode="RGB"),
            "width": Value("int64"),
            "height": Value("int64"),
            "label": ClassLabel(names=DIGIT_NAMES),
            "label_map": ImageFeature(mode="L"),
            "instance_map": ImageFeature(mode="L"),
            "objects": {
                "id": List(Value("int64")),
                "area": List(Value("int64")),
                "bbox": List(List(Value("float32"), length=4)),
                "category": List(ClassLabel(names=DIGIT_NAMES)),
            },
        }
    )


def _check_range(name: str, value: int, low: int, high: int) -> None:
    """Raises `ValueError` unless `low <= value <= high`."""
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, but has to be in {low}..{high}. Choose a value in that range.")


_INK_TABLE = [255 if opacity >= _INK_THRESHOLD else 0 for opacity in range(256)]


@cache
def _source_digits(split: str) -> tuple[list[Image.Image], np.ndarray]:
    """Scans of a split as images (mode "L", 10x10 pixels, 255 = full ink), and their classes 0..9."""
    digits = load_digits()
    chosen = np.random.RandomState(0).permutation(len(digits.target))[slice(*_SPLIT_BOUNDS[split])]
    ink = np.pad((digits.images[chosen] * 255 // 16).astype(np.uint8), ((0, 0), (1, 1), (1, 1)))
    return [Image.fromarray(scan) for scan in ink], digits.target[chosen]


def _background(rng: np.random.RandomState, size: int) -> Image.Image:
    """A dark RGB image of `size` x `size` pixels that blends four random corner colours."""
    corners = rng.randint(0, 91, size=(2, 2, 3)).astype(np.uint8)
    return Image.fromarray(corners).resize((size, size), Image.Resampling.BILINEAR)


def _ink_colours(rng: np.random.RandomState, count: int, least: int) -> list[tuple[int, int, int]]:
    """Random RGB colours, each channel in `least`..255."""
    return [tuple(colour) for colour in rng.randint(least, 256, size=(count, 3)).tolist()]


def _distorted(rng: np.random.RandomState, scan: Image.Image, size: int) -> Image.Image:
    """Opacity (mode "L") of a scan enlarged to `size` x `size` pixels, a little sheared, turned and stretched."""
    stretch_x, stretch_y = rng.uniform(0.95, 1.15, size=2)
    slant_x, slant_y = rng.uniform(-_MAX_SLANT, _MAX_SLANT, size=2)
    # Output pixel to scan position, with the centre as fixed point.
    unit, centre = _SOURCE_SIZE / size, _SOURCE_SIZE / 2
    matrix = (stretch_x, slant_x, centre * (1 - stretch_x - slant_x), slant_y, stretch_y)
    a, b, c, d, e = matrix[0] * unit, matrix[1] * unit, matrix[2], matrix[3] * unit, matrix[4] * unit
    f = centre * (1 - slant_y - stretch_y)
    return scan.transform((size, size), Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR)


def _free_place(
    rng: np.random.RandomState, image_size: int, size: tuple[int, int], boxes: list[list[int]]
) -> tuple[int, int]:
    """A random left upper corner at which a box of `size` (width, height) overlaps none of `boxes` (x, y, w, h)."""
    width, height = size
    free = np.ones((image_size - height + 1, image_size - width + 1), dtype=bool)
    for x, y, w, h in boxes:
        free[max(0, y - height + 1) : y + h, max(0, x - width + 1) : x + w] = False
    places = np.flatnonzero(free)
    top, left = divmod(int(places[rng.randint(len(places))]), free.shape[1])
    return left, top


def _with_noise(rng: np.random.RandomState, image: Image.Image, amount: int) -> Image.Image:
    """The image with uniform brightness noise of at most `amount` (0..255) per pixel."""
    noise = rng.randint(-amount, amount + 1, size=(*image.size, 1), dtype=np.int16)
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def _encoded(image: Image.Image) -> dict[str, Any]:
    """The image as quickly compressed PNG bytes, in the form that the image columns of `datasets` store."""
    buffer = BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}
