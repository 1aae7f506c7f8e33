# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Garments on photographs: folders of real pictures in which most patches do not matter, with label maps.

Each picture is a crop of a photograph, with cut-outs of other things as clutter, and garments of Fashion-MNIST,
enlarged and tinted. Sources are what Debian packages (MIT, GPL-2+, and GPL-2), or other folders of the kind:

    apt-get install dataset-fashion-mnist tuxpaint-stamps-default mate-backgrounds plasma-workspace-wallpapers
    python examples/garments.py --output_dir outputs/garments

It writes two folders with the same pictures: `classification`, with a folder per class, and `segmentation`, with label
maps in which 0 is background. No garment, photograph or cut-out serves in two splits. Picture `i` of a split is a
function of the sources, the seed and `i` alone, but for what a release of Pillow changes in resampling.
"""

import gzip
import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg
from transformers.utils import logging

from cropr_hf.images import image_files


GARMENTS = "T-shirt,trousers,pullover,dress,coat,sandal,shirt,sneaker,bag,boot".split(",")
"""Names of the classes of Fashion-MNIST. In label maps they are 1 to 10, and 0 is background."""

SHARE = "/usr/share"
STAMPS = "animals food plants household vehicles hobbies".split()
# Photographs among the pictures of plasma-workspace-wallpapers, as far as they are larger than a thumbnail.
WALLPAPERS = "Autumn BytheWater ColorfulCups DarkestHour EveningGlow FallenLeaf Grey Kite".split()
WALLPAPERS += "OneStandsOut PastelHills Path summer_1am".split()
DRAWN = ("cartoon", "_mirror", "_flip")  # in names of cut-outs that are no photographs, or are there twice
SPLITS = {"training": 0, "validation": 1}
TRAINING_SHARE = 0.7  # of photographs and cut-outs
LEAST_INK = 12  # brightness (0..255) from which a pixel belongs to a garment


@dataclass
class Arguments:
    """Where the sources are, and what to paint."""

    garments: str = HfArg(default=f"{SHARE}/datasets/fashion-mnist", help="Folder of the files of Fashion-MNIST.")
    backgrounds: list[str] = field(
        default_factory=lambda: [
            f"{SHARE}/backgrounds/mate/nature",
            *(f"{SHARE}/wallpapers/{name}/contents/images" for name in WALLPAPERS),
        ],
        metadata={"help": "Folders of photographs."},
    )
    cut_outs: list[str] = field(
        default_factory=lambda: [f"{SHARE}/tuxpaint/stamps/{name}" for name in STAMPS],
        metadata={"help": "Folders of pictures with an alpha channel, for clutter."},
    )
    output_dir: str = HfArg(default="outputs/garments", help="Where the folders go.")
    train_images: int = HfArg(default=2000, help="Pictures to train on.")
    validation_images: int = HfArg(default=1000, help="Pictures to test on.")
    image_size: int = HfArg(default=168, help="Side of the square pictures in pixels.")
    most_garments: int = HfArg(default=1, help="Garments per picture: 1, or 2 to this number, which are smaller.")
    seed: int = HfArg(default=0, help="Of what is painted.")

    def __post_init__(self) -> None:
        for name, least in {"train_images": 1, "validation_images": 1, "image_size": 32, "most_garments": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be {least} or more.")


def read_idx(path: Path) -> np.ndarray:
    """An array as MNIST stores it: 0, 0, 8, the number of dimensions, each of them in four bytes, and the data."""
    content = gzip.decompress(path.read_bytes())
    ends = 4 + 4 * content[3]
    return np.frombuffer(content, np.uint8, offset=ends).reshape(np.frombuffer(content[4:ends], ">u4").astype(int))


def source_files(folders: list[str], what: str, pattern: str = "**/*") -> list[Path]:
    """Pictures in the folders. Of one that is there in several sizes (640x480.jpg, ...) only the largest counts.

    Raises:
        `ValueError`: when there are fewer than two, one for each split.
    """
    files = [
        file for folder in folders for file in image_files(folder, pattern) if not any(w in file.name for w in DRAWN)
    ]
    sizes = [file for file in files if re.fullmatch(r"\d+x\d+", file.stem)]
    folders_of_sizes = {file.parent for file in sizes}
    largest = [
        max((file for file in sizes if file.parent == folder), key=lambda file: file.stat().st_size)
        for folder in folders_of_sizes
    ]
    files = sorted([*{*files}.difference(sizes), *largest])
    if len(files) < 2:
        raise ValueError(f"There are {len(files)} {what} in {', '.join(folders)}; name folders with two or more.")
    return files


class Painter:
    """Paints the pictures of one split."""

    def __init__(self, args: Arguments, split: str):
        self.args, self.split = args, split
        prefix = {"training": "train", "validation": "t10k"}[split]
        self.garments = read_idx(Path(args.garments, f"{prefix}-images-idx3-ubyte.gz"))
        self.classes = read_idx(Path(args.garments, f"{prefix}-labels-idx1-ubyte.gz"))
        photographs = self.share_of(source_files(args.backgrounds, "photographs"))
        cut_outs = self.share_of(source_files(args.cut_outs, "cut-outs", "**/*.png"))
        self.photographs = [self.opened(file, "RGB", 6 * args.image_size) for file in photographs]
        self.cut_outs = [self.opened(file, "RGBA", args.image_size) for file in cut_outs]

    def share_of(self, files: list[Path]) -> list[Path]:
        """Those of this split."""
        order = np.random.RandomState(0).permutation(len(files))
        end = min(max(1, round(TRAINING_SHARE * len(files))), len(files) - 1)
        return [files[index] for index in (order[:end] if self.split == "training" else order[end:])]

    @staticmethod
    def opened(file: Path, mode: str, most: int) -> Image.Image:
        """A picture of at most `most` pixels per side."""
        with Image.open(file) as image:
            image = image.convert(mode)
        image.thumbnail((most, most))
        return image

    def paint(self, index: int) -> tuple[Image.Image, Image.Image, int]:
        """Picture, label map, and the class (0..9) of the garment with the largest area."""
        rng, side = np.random.RandomState([self.args.seed, SPLITS[self.split], index]), self.args.image_size
        image = self.background(rng)
        labels = np.zeros((side, side), np.uint8)
        for x, y, size in self.places(rng):
            number = rng.randint(len(self.garments))
            grey = self.garments[number]
            shape = Image.fromarray(np.uint8(255 * (grey > LEAST_INK))).resize((size, size), Image.Resampling.BILINEAR)
            enlarged = np.asarray(Image.fromarray(grey).resize((size, size), Image.Resampling.BICUBIC), float)
            tinted = enlarged[..., None] * rng.uniform(0.5, 1.0, 3) + rng.uniform(0, 40)
            image.paste(Image.fromarray(np.uint8(tinted.clip(0, 255))), (x, y), shape)
            labels[y : y + size, x : x + size][np.asarray(shape) > 127] = 1 + self.classes[number]
        areas = np.bincount(labels.flatten(), minlength=1 + len(GARMENTS))[1:]
        return image, Image.fromarray(labels), int(areas.argmax())

    def background(self, rng: np.random.RandomState) -> Image.Image:
        """A crop of a photograph with 3 to 5 cut-outs on it."""
        side, photograph = self.args.image_size, self.photographs[rng.randint(len(self.photographs))]
        width, height = photograph.size
        crop = int(min(width, height) * rng.uniform(0.4, 1.0))
        x, y = rng.randint(width - crop + 1), rng.randint(height - crop + 1)
        image = photograph.resize((side, side), Image.Resampling.BILINEAR, box=(x, y, x + crop, y + crop))
        for _ in range(rng.randint(3, 6)):
            cut_out = self.cut_outs[rng.randint(len(self.cut_outs))]
            scale = rng.uniform(0.2, 0.45) * side / max(cut_out.size)
            cut_out = cut_out.resize([max(1, int(length * scale)) for length in cut_out.size])
            place = [rng.randint(side - length) for length in cut_out.size]
            image.paste(cut_out, tuple(place), cut_out)
        return image

    def places(self, rng: np.random.RandomState) -> list[tuple[int, int, int]]:
        """Left, top and side of squares that do not overlap: one of 38 to 60 % of the side, or several of 26 to 40."""
        side, one = self.args.image_size, self.args.most_garments == 1
        low, high = (0.38, 0.6) if one else (0.26, 0.4)
        places: list[tuple[int, int, int]] = []
        for _ in range(1 if one else rng.randint(2, self.args.most_garments + 1)):
            size = int(rng.uniform(low, high) * side)
            for _ in range(50):  # tries
                x, y = rng.randint(side - size, size=2).tolist()
                if all(x + size <= u or u + s <= x or y + size <= v or v + s <= y for u, v, s in places):
                    places.append((x, y, size))
                    break
        return places


def main(arguments: list[str] | None = None) -> None:
    """Paints and writes the folders; `arguments` are those of the command line.

    Raises:
        `ValueError`: when a source has too few pictures, or the output folder holds something.
    """
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    output = Path(args.output_dir)
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty; choose another folder, or pictures of two runs are mixed.")
    for split, count in {"training": args.train_images, "validation": args.validation_images}.items():
        painter = Painter(args, split)
        images, maps = (output / "segmentation" / kind / split for kind in ("images", "annotations"))
        classes = [output / "classification" / split.removesuffix("ing") / name for name in GARMENTS]
        for folder in (images, maps, *classes):
            folder.mkdir(parents=True, exist_ok=True)
        for index in logging.tqdm(range(count), desc=f"Pictures for {split}"):
            image, label_map, label = painter.paint(index)
            label_map.save(maps / f"{index:05}.png")
            image.save(images / f"{index:05}.jpg", quality=95)
            shutil.copyfile(images / f"{index:05}.jpg", classes[label] / f"{index:05}.jpg")
    names = {str(number): name for number, name in enumerate(["background", *GARMENTS])}
    (output / "segmentation" / "id2label.json").write_text(json.dumps(names), encoding="utf-8")


if __name__ == "__main__":
    main()
