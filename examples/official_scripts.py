# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Write cluttered digits and small Cropr models in the forms that the official example scripts of Transformers read.

    python examples/official_scripts.py --output_dir outputs/official

The scripts then run in that folder, unchanged and without a network; `docs/official_scripts.md` has the commands.

    digit_folders/{train,validation}/<digit>/<number>.png      run_image_classification.py
    digits/label_maps/{data/*.parquet,id2label.json}           run_semantic_segmentation.py
    hub/datasets--digits--label_maps/                          the Hub cache in which it finds the names of the labels
    digits/boxes/data/*.parquet                                run_object_detection.py
    accuracy/accuracy.py, mean_iou/mean_iou.py                 metrics, which they would get from the Hub
    models/<task>                                              a Cropr model as published: stripped, with its code
    models/<task>_complete                                     the same with auxiliary heads
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluttered_digits import BACKGROUND, DIGIT_NAMES, cluttered_digits
from datasets import Dataset
from datasets import Image as ImageFeature
from detection import DIGIT_DETECTOR, DIGITS
from PIL import Image
from transformers import AutoImageProcessor, HfArgumentParser, SegformerImageProcessor, ViTImageProcessor
from transformers.hf_argparser import HfArg

from cropr_hf import (
    CroprViTForImageClassification,
    CroprViTForObjectDetection,
    CroprViTForSemanticSegmentation,
    CroprViTImageProcessor,
)
from cropr_hf.publishing.hub import save_for_hub


HERE = Path(__file__).parent
LABEL_MAPS = "digits/label_maps"
BOXES = "digits/boxes"
# The script for segmentation does not evaluate on pixels of class 0, so that this should be the background.
LABEL_NAMES = ["background", *DIGIT_NAMES]
DETECTOR = {"image_size": DIGITS["image_size"], "pruning_schedule": [256, 144, 64, 25, 25, 25], **DIGIT_DETECTOR}


@dataclass
class Arguments:
    """How much to write, and where."""

    output_dir: str = HfArg(default="outputs/official", help="Folder to write to; the scripts run in it.")
    model_name_or_path: str = HfArg(default=str(HERE / "digits_vit"), help="The pretrained ViT to start from.")
    train_images: int = HfArg(default=2000, help="Training images per task.")
    eval_images: int = HfArg(default=500, help="Images per task to validate on, and to test on.")
    seed: int = HfArg(default=0, help="Of the drawn images.")

    def splits(self, **settings: Any) -> dict[str, Dataset]:
        """The images of each split; `settings` are those of `cluttered_digits.DigitPainter`."""
        counts = {"train": self.train_images, "validation": self.eval_images, "test": self.eval_images}
        return {name: cluttered_digits(name, count, seed=self.seed, **settings) for name, count in counts.items()}


def write_image_folders(args: Arguments, folder: Path) -> None:
    """A folder of images per class."""
    for split, images in args.splits().items():
        for row in images:
            file = folder / "digit_folders" / split / DIGIT_NAMES[row["label"]] / f"{row['image_id']:06}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            row["image"].save(file, compress_level=1)


def write_label_maps(args: Arguments, folder: Path) -> None:
    """The columns `image` and `label`, and the names of the labels, which the script asks the Hub for."""
    # Digits from 1 on, and no background in between.
    new_ids = [digit + 1 for digit in range(BACKGROUND)] + [0] * (256 - BACKGROUND)

    def shifted(label_map: Image.Image) -> dict[str, Any]:
        return {"label": label_map.point(new_ids)}

    for split, images in args.splits().items():
        images = images.select_columns(["image", "label_map"]).map(shifted, input_columns="label_map")
        images = images.remove_columns("label_map").cast_column("label", ImageFeature(mode="L"))
        write_parquet(images, folder / LABEL_MAPS, split)
    names = json.dumps(dict(enumerate(LABEL_NAMES)))
    (folder / LABEL_MAPS / "id2label.json").write_text(names)
    # What `hf_hub_download` leaves behind for the branch `main`.
    commit = "0" * 40
    cache = folder / "hub" / f"datasets--{LABEL_MAPS.replace('/', '--')}"
    for file, text in (("refs/main", commit), (f"snapshots/{commit}/id2label.json", names)):
        (cache / file).parent.mkdir(parents=True, exist_ok=True)
        (cache / file).write_text(text)


def write_boxes(args: Arguments, folder: Path) -> None:
    """The columns `image_id`, `image`, `width`, `height`, and `objects` with boxes as in COCO."""
    for split, images in args.splits(**DIGITS).items():
        write_parquet(images.remove_columns(["label", "label_map", "instance_map"]), folder / BOXES, split)


def write_parquet(images: Dataset, folder: Path, split: str) -> None:
    """One file, under the name by which `load_dataset` knows the split."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    images.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")


def write_models(args: Arguments, folder: Path) -> None:
    """Models that were not trained to prune yet, each with its image processor: stripped, and complete."""
    source = AutoImageProcessor.from_pretrained(args.model_name_or_path, trust_remote_code=False)
    normalization = {"image_mean": source.image_mean, "image_std": source.image_std}
    size = {"height": 96, "width": 96}
    square = {"height": DETECTOR["image_size"], "width": DETECTOR["image_size"]}
    edge = {"shortest_edge": DETECTOR["image_size"], "longest_edge": DETECTOR["image_size"]}
    schedule = [144, 96, 56, 24, 24, 24]
    classes = {
        "image_classification": (
            CroprViTForImageClassification,
            {"id2label": dict(enumerate(DIGIT_NAMES)), "pruning_schedule": schedule, "last_layer_fusion": False},
            ViTImageProcessor(size=size, **normalization),
        ),
        "semantic_segmentation": (
            CroprViTForSemanticSegmentation,
            {"id2label": dict(enumerate(LABEL_NAMES)), "pruning_schedule": schedule, "auxiliary_task": "patches"},
            SegformerImageProcessor(size=size, **normalization),
        ),
        "object_detection": (
            CroprViTForObjectDetection,
            {"id2label": dict(enumerate(DIGIT_NAMES)), **DETECTOR},
            CroprViTImageProcessor(size=edge, pad_size=square, **normalization),
        ),
    }
    for task, (model_class, fields, processor) in classes.items():
        names = {name: index for index, name in fields["id2label"].items()}
        model = model_class.from_vit(args.model_name_or_path, label2id=names, **fields)
        save_for_hub(model, folder / "models" / task, processor)
        save_for_hub(model, folder / "models" / f"{task}_complete", processor, strip_auxiliary_heads=False)


def main(arguments: list[str] | None = None) -> None:
    """Writes all of it; `arguments` are those of the command line."""
    args = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)[0]
    folder = Path(args.output_dir)
    for metric in ("accuracy", "mean_iou"):
        shutil.copytree(HERE / "metrics" / metric, folder / metric, dirs_exist_ok=True)
    write_image_folders(args, folder)
    write_label_maps(args, folder)
    write_boxes(args, folder)
    write_models(args, folder)


if __name__ == "__main__":
    main()
