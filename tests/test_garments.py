"""Garments on photographs, from tiny sources made here."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


SHADES = {"train": 150, "t10k": 250}  # brightest pixel of the garments, by which a split is known


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """Ten garments per split, one of each class, that fill all but a frame; and three photographs and cut-outs, each
    of a colour of its own."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("garments", "backgrounds", "cut_outs")}
    for split, shade in SHADES.items():
        garments = np.zeros((10, 28, 28), np.uint8)
        garments[:, 4:24, 4:24] = shade
        write_idx(folders["garments"] / f"{split}-images-idx3-ubyte.gz", garments)
        write_idx(folders["garments"] / f"{split}-labels-idx1-ubyte.gz", np.arange(10, dtype=np.uint8))
    for index in range(3):
        colour = tuple(np.roll([200, 20, 20], index).tolist())
        Image.new("RGB", (90, 70), colour).save(folders["backgrounds"] / f"{index}.png")
        Image.new("RGBA", (30, 20), (*colour[::-1], 255)).save(folders["cut_outs"] / f"{index}.png")
    Image.new("RGBA", (30, 20)).save(folders["cut_outs"] / "cat_cartoon.png")
    return folders


def command(sources: dict[str, Path], output: Path, **kwargs) -> list[str]:
    settings = {**sources, "output_dir": output, "train_images": 12, "validation_images": 12, "image_size": 64}
    return [word for name, value in {**settings, **kwargs}.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def painted(example, sources, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("painted")
    example("garments").main(command(sources, folder))
    return folder


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_both_folders_hold_the_same_pictures_with_labels_that_agree(example, painted):
    names = example("garments").GARMENTS
    stored = json.loads((painted / "segmentation" / "id2label.json").read_text())
    assert stored == {str(number): name for number, name in enumerate(["background", *names])}
    for split, folder in {"training": "train", "validation": "validation"}.items():
        pictures = sorted((painted / "classification" / folder).glob("*/*.jpg"))
        assert sorted(path.stem for path in pictures) == [f"{index:05}" for index in range(12)]
        assert {path.name for path in (painted / "classification" / folder).iterdir()} == {*names}
        for picture in pictures:
            twin = painted / "segmentation" / "images" / split / picture.name
            assert picture.read_bytes() == twin.read_bytes()
            labels = np.array(Image.open(painted / "segmentation" / "annotations" / split / f"{picture.stem}.png"))
            assert labels.shape == (64, 64) and Image.open(picture).size == (64, 64)
            (label,) = {*np.unique(labels)} - {0}
            assert stored[str(label)] == picture.parent.name
            # A square of 38 to 60 % of the side, of which the garment fills 20 of 28 rows
            side = np.sqrt((labels > 0).sum()) * 28 / 20
            assert 0.35 * 64 < side < 0.63 * 64


def test_a_picture_is_a_function_of_sources_and_seed(example, sources, painted, tmp_path):
    script = example("garments")
    script.main(command(sources, tmp_path / "more", train_images=13))
    fewer, more = files_in(painted), files_in(tmp_path / "more")
    assert fewer.items() <= more.items() and len(more) == len(fewer) + 3
    script.main(command(sources, tmp_path / "other", seed=1))
    other = files_in(tmp_path / "other")
    name = "segmentation/images/training/00000.jpg"
    assert other[name] != fewer[name] and fewer[name] != fewer[name.replace("training", "validation")]


def test_no_source_serves_in_two_splits(example, sources, tmp_path):
    script = example("garments")
    args = script.Arguments(
        garments=str(sources["garments"]),
        backgrounds=[str(sources["backgrounds"])],
        cut_outs=[str(sources["cut_outs"])],
        image_size=64,
    )
    painters = {split: script.Painter(args, split) for split in ("training", "validation")}
    for kind, count in {"photographs": 3, "cut_outs": 3}.items():  # the cartoon is left out
        colours = [{image.getpixel((0, 0)) for image in getattr(painter, kind)} for painter in painters.values()]
        assert len(colours[0]) == 2 and len(colours[1]) == 1 and len(colours[0] | colours[1]) == count
    assert [painter.garments.max() for painter in painters.values()] == [*SHADES.values()]


def test_several_garments_do_not_overlap(example, sources):
    script = example("garments")
    folders = {name: [str(folder)] for name, folder in sources.items()} | {"garments": str(sources["garments"])}
    painter = script.Painter(script.Arguments(**folders, image_size=64, most_garments=4), "training")
    counts = set()
    for index in range(40):
        places = painter.places(np.random.RandomState(index))
        cover = np.zeros((64, 64), int)
        for x, y, size in places:
            assert 0.24 * 64 < size < 0.42 * 64
            cover[y : y + size, x : x + size] += 1
        assert cover.max() == 1 and cover.sum() == sum(size**2 for _, _, size in places)
        counts.add(len(places))
    assert max(counts) > 2 and min(counts) >= 1
    image, labels, largest = painter.paint(0)
    areas = np.bincount(np.array(labels).flatten(), minlength=11)[1:]
    assert areas.argmax() == largest and (areas > 0).sum() >= 1 and image.size == (64, 64)


def test_of_one_picture_in_several_sizes_the_largest_counts(example, tmp_path):
    for size in ((8, 6), (16, 12)):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.new("RGB", size).save(tmp_path / "a" / f"{size[0]}x{size[1]}.png")
    (tmp_path / "b").mkdir()
    Image.new("RGB", (8, 6)).save(tmp_path / "b" / "lake.png")
    files = example("garments").source_files([str(tmp_path)], "photographs")
    assert [file.name for file in files] == ["16x12.png", "lake.png"]


def test_wrong_sources_and_folders_say_what_to_do(example, sources, painted, tmp_path):
    script = example("garments")
    (tmp_path / "few").mkdir()
    Image.new("RGB", (60, 60)).save(tmp_path / "few" / "one.png")
    for name, what in {"backgrounds": "photographs", "cut_outs": "cut-outs"}.items():
        with pytest.raises(ValueError, match=rf"There are 1 {what} in .*few; name folders with two or more"):
            script.main(command({**sources, name: tmp_path / "few"}, tmp_path / "out"))
    with pytest.raises(ValueError, match=r"painted.* is not empty; choose another folder"):
        script.main(command(sources, painted))
    with pytest.raises(ValueError, match=r"--image_size is 16; it must be 32 or more"):
        script.main(command(sources, tmp_path / "out", image_size=16))
