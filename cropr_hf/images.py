"""How image files become pictures: one way for training, evaluation, the command line and the server."""

from contextlib import suppress
from io import BytesIO
from os import PathLike, fspath
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError


# Of strangers' files; none of them is of a format whose decoder starts another program, such as EPS.
UPLOAD_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_SCANS = 100  # of a progressive JPEG, which has about ten; each costs the time of a whole image


class NotAnImage(ValueError):
    """A stranger's file is not an image that is read."""


class ImageTooLarge(ValueError):
    """A stranger's image has too many pixels."""


def open_upload(body: bytes | bytearray, max_megapixels: float) -> Image.Image:
    """The image in a file that a stranger sent, of which nothing is trusted; see `open_image`.

    Raises:
        `NotAnImage`: of another format than `UPLOAD_FORMATS`, or with floating-point pixels.
        `ImageTooLarge`: with more pixels than that, by its header, so that they are not decoded.
        `ValueError`: an empty or broken file.
    """
    if not body:
        raise ValueError("The file is empty; send an image.")
    try:
        image = Image.open(BytesIO(body), formats=UPLOAD_FORMATS)  # reads the header
        if image.width * image.height > max_megapixels * 1e6:
            raise Image.DecompressionBombError
        if image.mode == "F":  # of an unknown range
            raise UnidentifiedImageError
        if image.format in ("JPEG", "MPO") and body.count(b"\xff\xda") > MAX_SCANS:
            raise ValueError(f"it has more than {MAX_SCANS} scans")
        image.load()
        return to_rgb(image)
    except UnidentifiedImageError:
        formats = ", ".join(UPLOAD_FORMATS)
        raise NotAnImage(f"The file is not an image with integer pixels; send one as {formats}.") from None
    except Image.DecompressionBombError:
        raise ImageTooLarge(f"The image has more than {max_megapixels:g} megapixels; send a smaller one.") from None
    except Exception as error:  # decoders meet broken files with errors of any kind
        raise ValueError(f"The image is broken: {error}") from None


def open_image(source: "str | PathLike | BinaryIO | Image.Image", name: str | None = None) -> Image.Image:
    """The first frame of an image file, upright and in RGB; see `to_rgb` for the rules.

    Args:
        source: a path, an open file of bytes, or an image that is decoded already.
        name: what messages call it; its path by default.

    Raises:
        `ValueError`: when it is missing, broken or no image, or as `to_rgb` does; with the name.
    """
    return to_rgb(decode_image(source, name), name or image_name(source))


def decode_image(source: "str | PathLike | BinaryIO | Image.Image", name: str | None = None) -> Image.Image:
    """The first frame of an image file as it is stored, read to its end; see `open_image`."""
    try:
        if isinstance(source, str | PathLike):
            image: Image.Image = Image.open(BytesIO(Path(source).read_bytes()))  # leaves no open file behind
        else:
            image = source if isinstance(source, Image.Image) else Image.open(source)
        if getattr(image, "is_animated", False):
            image.seek(0)
        image.load()
    except Exception as error:  # decoders meet broken files with errors of any kind
        raise ValueError(
            f"{name or image_name(source)} cannot be read as an image ({error}); repair it or leave it out."
        ) from error
    return image


def to_rgb(image: Image.Image, name: str = "An image") -> Image.Image:
    """A copy of an image that is upright and in RGB.

    It is turned as its EXIF orientation says. Whole numbers of 16 bits become those of 8: 65535 is white. Of an image
    with transparency the colours stay, and how transparent they are is forgotten. This is what the pipelines of
    Transformers do, but for 16 bits, of which they clip all but the darkest.

    Raises:
        `ValueError`: when pixels are floating-point numbers or larger than 16 bits, whose range nobody knows, or when
            Pillow cannot convert the mode.
    """
    image = upright(image)
    if image.mode == "F":
        raise ValueError(f"{name} has floating-point pixels, of an unknown range; save it with 8 or 16 bits.")
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(
                f"{name} has pixels between {pixels.min()} and {pixels.max()}; they must be in [0, 65535], the range "
                "of 16 bits: save it with 8 or 16 bits."
            )
        image = Image.fromarray((pixels // 257).astype(np.uint8))
    image.info.pop("transparency", None)  # of a palette, for example; converting would warn that it is lost
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"{name} has the mode {image.mode}, which is not converted; save it in RGB.") from error


def upright(image: Image.Image) -> Image.Image:
    """A copy of an image, turned as its EXIF orientation says; where that is broken, as it lies."""
    with suppress(Exception):
        return ImageOps.exif_transpose(image)
    return image.copy()


def orientation(image: Image.Image) -> int:
    """How EXIF says that an image is turned or mirrored: 1 is not at all, from 5 on width and height change places."""
    with suppress(Exception):
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
        return found if found in range(1, 9) else 1
    return 1


def image_files(folder: str | PathLike, pattern: str = "*") -> list[Path]:
    """The files in a folder that are images by the ending of their names, sorted; what is hidden is none."""
    # Of formats that can be read: Pillow writes PDF, for example, but does not open it.
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = (path for path in Path(folder).glob(pattern) if path.suffix.lower() in suffixes and path.is_file())
    return sorted(path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def image_name(source: Any) -> str:
    """What messages call an image: its path, as far as that is known."""
    return fspath(source) if isinstance(source, str | PathLike) else "An image"
