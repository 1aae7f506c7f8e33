"""Image files of every kind become the same pictures, or errors that name the file."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from cropr_hf.images import decode_image, image_files, open_image, orientation, to_rgb


GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
COLOURS = np.random.default_rng(0).integers(0, 256, (3, 4, 3), np.uint8)
MODES = ["1", "L", "P", "PA", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"]
MODES += ["I", "F", "I;16", "I;16L", "I;16B", "I;16N"]


def encode(image: Image.Image, file_format: str = "PNG", **kwargs) -> BytesIO:
    file = BytesIO()
    image.save(file, file_format, **kwargs)
    file.seek(0)
    return file


def turned(number: int, image: Image.Image, file_format: str = "PNG") -> BytesIO:
    """A file that says that it has this orientation."""
    exif = Image.Exif()
    exif[0x0112] = number
    return encode(image, file_format, exif=exif)


class TestModes:
    @pytest.mark.parametrize("mode", MODES)
    def test_every_mode_becomes_rgb_or_a_named_error(self, mode):
        image = Image.new(mode, (4, 3))
        try:
            picture = to_rgb(image, "scan.tif")
        except ValueError as error:
            assert str(error).startswith("scan.tif has") and mode in ("F", "La", "RGBa", "LAB")
        else:
            assert picture.mode == "RGB" and picture.size == (4, 3) and picture is not image

    @pytest.mark.parametrize("mode", ["1", "L", "P", "PA", "LA", "RGBA", "CMYK", "YCbCr"])
    def test_colours_are_those_of_the_pipelines(self, mode):
        image = Image.fromarray(COLOURS).convert("P" if mode == "PA" else mode).convert(mode)
        assert np.array_equal(to_rgb(image), load_image(image))

    def test_transparent_images_keep_their_colours(self):
        """Also those of a palette, of which Pillow warns that transparency is lost; the image itself stays."""
        pixels = np.dstack([COLOURS, np.tile(np.array([0, 85, 170, 255], np.uint8), (3, 1))])
        file = encode(Image.fromarray(pixels))
        assert np.array_equal(open_image(file), COLOURS)
        palette = Image.fromarray(COLOURS).convert("P")
        file = encode(palette, transparency=bytes([0, 128, 255]))
        stored = decode_image(file)
        assert "transparency" in stored.info
        assert np.array_equal(to_rgb(stored), palette.convert("RGB")) and "transparency" in stored.info

    @pytest.mark.parametrize(("file_format", "dtype"), [("PNG", np.uint16), ("TIFF", np.uint16), ("TIFF", np.int32)])
    def test_sixteen_bits_are_scaled(self, file_format, dtype):
        file = encode(Image.fromarray(257 * GREY.astype(dtype)), file_format)
        assert np.array_equal(open_image(file), np.repeat(GREY[..., None], 3, axis=-1))
        white = Image.fromarray(np.full((2, 2), 65535, dtype))
        assert to_rgb(white).getpixel((0, 0)) == (255, 255, 255)

    @pytest.mark.parametrize("value", [-1, 65536])
    def test_more_than_sixteen_bits_are_an_error(self, value):
        with pytest.raises(ValueError, match=rf"deep\.tif has pixels between .*{value}.*\[0, 65535\]"):
            to_rgb(Image.fromarray(np.array([[0, value]], np.int32)), "deep.tif")

    def test_floats_are_an_error(self):
        file = encode(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF")
        with pytest.raises(ValueError, match=r"float\.tif has floating-point pixels.*save it with 8 or 16 bits"):
            open_image(file, "float.tif")


class TestOrientation:
    @pytest.mark.parametrize("number", range(1, 9))
    def test_pictures_stand_upright(self, number):
        image = Image.fromarray(COLOURS)
        file = turned(number, image)
        stored = decode_image(file)
        assert orientation(stored) == number and np.array_equal(stored, COLOURS)
        picture = to_rgb(stored)
        assert picture.size == ((3, 4) if number >= 5 else (4, 3)) and orientation(picture) == 1
        assert np.array_equal(picture, load_image(stored))
        assert (number == 1) == np.array_equal(picture, COLOURS)

    def test_broken_or_senseless_metadata_does_not_matter(self):
        broken = encode(Image.fromarray(COLOURS), exif=b"Exif\0\0no header of a TIFF file")
        for file in (broken, turned(77, Image.fromarray(COLOURS))):
            stored = decode_image(file)
            assert orientation(stored) == 1 and np.array_equal(to_rgb(stored), COLOURS)


class TestFiles:
    def test_paths_files_and_images_give_the_same(self, tmp_path):
        image = Image.fromarray(COLOURS)
        image.save(tmp_path / "a.png")
        for source in (tmp_path / "a.png", str(tmp_path / "a.png"), encode(image), image):
            assert np.array_equal(open_image(source), COLOURS)

    @pytest.mark.parametrize("file_format", ["GIF", "TIFF", "WEBP"])
    def test_the_first_frame_of_several(self, file_format):
        frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
        options = {"lossless": True} if file_format == "WEBP" else {}
        file = encode(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
        later = Image.open(BytesIO(file.getvalue()))
        later.seek(2)
        for source in (file, later):
            assert open_image(source).getpixel((4, 4)) == (255, 0, 0)

    @pytest.mark.parametrize("kind", ["truncated", "garbled", "text", "empty", "missing"])
    def test_what_cannot_be_read_is_named(self, kind, tmp_path):
        path = tmp_path / "photo.jpg"
        noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
        content = encode(Image.fromarray(noise), "JPEG").getvalue()
        contents = {"truncated": content[:900], "text": b"no image", "empty": b""}
        contents["garbled"] = encode(Image.fromarray(noise)).getvalue()[:60] + bytes(3000)
        if kind != "missing":
            path.write_bytes(contents[kind])
        with pytest.raises(ValueError, match=r"photo\.jpg cannot be read as an image \(.+\); repair it or leave it"):
            open_image(path)
        if kind != "missing":
            with pytest.raises(ValueError, match=r"inside\.zip/photo\.jpg cannot be read"):
                open_image(BytesIO(contents[kind]), "inside.zip/photo.jpg")

    def test_image_files_are_found_by_their_endings(self, tmp_path):
        folder = tmp_path / "photos [1]"
        (folder / "more.png").mkdir(parents=True)
        for name in (
            "b.PNG",
            "a.jpg",
            ".DS_Store",
            "Thumbs.db",
            "._a.jpg",
            "notes.txt",
            "print.pdf",
            "more.png/c.webp",
        ):
            (folder / name).write_bytes(b"\0")
        assert [path.name for path in image_files(folder)] == ["a.jpg", "b.PNG"]
        assert [path.name for path in image_files(folder, "**/*")] == ["a.jpg", "b.PNG", "c.webp"]
