# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Objects in COCO format: from the files of a download, from data sets, from drawn digits; and COCO's metrics.

A data set of objects has the columns `image_id`, `image`, `width`, `height` and `objects`: lists with one entry per
object, `bbox`, `category` (a `ClassLabel`), and, where they are known, `area`, `iscrowd` and `segmentation` (polygons,
or run-length encoding). Instead of a `segmentation`, a column `instance_map` may say which object each pixel shows.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval import mask as coco_mask
from torchvision.ops import box_convert


BOX_FORMATS = ("xywh", "xyxy")
METRICS = {"map": "AP_all", "map_50": "AP_50", "map_75": "AP_75"}
METRICS |= {f"map_{size}": f"AP_{size}" for size in ("small", "medium", "large")}


def load_coco(image_dir: str, annotation_file: str) -> Dataset:
    """The images of a folder, with their objects from a COCO file such as `instances_val2017.json`.

    Categories are numbered from 0, in the order of their ids.

    Raises:
        `ValueError`: when the file or an image is missing, or the file holds something else.
    """
    if not Path(annotation_file).is_file():
        raise ValueError(f"There is no file {annotation_file}; name the COCO annotations of {image_dir}.")
    coco = json.loads(Path(annotation_file).read_text(encoding="utf-8"))
    missing = {"images", "annotations", "categories"} - (coco.keys() if isinstance(coco, dict) else set())
    if missing:
        raise ValueError(
            f"{annotation_file} has no {', '.join(sorted(missing))}; give a COCO file of objects, such as "
            "instances_train2017.json."
        )
    files = [Path(image_dir, image["file_name"]) for image in coco["images"]]
    absent = [str(file) for file in files if not file.is_file()]
    if absent:
        raise ValueError(f"{len(absent)} of {len(files)} images do not exist, such as {absent[0]}; name their folder.")

    categories = sorted(coco["categories"], key=lambda category: category["id"])
    numbers = {category["id"]: number for number, category in enumerate(categories)}
    sizes = {image["id"]: (image["width"], image["height"]) for image in coco["images"]}
    fields = {
        "bbox": List(List(Value("float64"), length=4)),
        "category": List(ClassLabel(names=[category["name"] for category in categories])),
        "area": List(Value("float64")),
        "iscrowd": List(Value("int64")),
    }
    if all(annotation.get("segmentation") for annotation in coco["annotations"]):
        fields["segmentation"] = List({"size": List(Value("int64")), "counts": Value("string")})
    objects: dict[int, dict[str, list]] = {image_id: {name: [] for name in fields} for image_id in sizes}
    for annotation in coco["annotations"]:
        if annotation["image_id"] not in sizes or annotation["category_id"] not in numbers:
            raise ValueError(f"{annotation_file} lacks the image or the category of the annotation {annotation}.")
        width, height = annotation["bbox"][2:]
        values = {"area": width * height, "iscrowd": 0, **annotation, "category": numbers[annotation["category_id"]]}
        if "segmentation" in fields:
            values["segmentation"] = run_lengths(annotation["segmentation"], *sizes[annotation["image_id"]])
        for name, column in objects[annotation["image_id"]].items():
            column.append(values[name])
    features = {"image_id": Value("int64"), "image": Image(), "width": Value("int64"), "height": Value("int64")}
    columns = {
        "image_id": list(sizes),
        "image": [str(file) for file in files],
        "width": [width for width, _ in sizes.values()],
        "height": [height for _, height in sizes.values()],
        "objects": list(objects.values()),
    }
    return Dataset.from_dict(columns, features=Features({**features, "objects": fields}))


def check_objects(images: Dataset, masks: bool) -> None:
    """Whether it is a data set of objects.

    Raises:
        `ValueError`: when a column is missing, categories have no names, or objects have no masks but should.
    """
    missing = {"image_id", "width", "height"} - set(images.column_names)
    objects = images.features["objects"]
    if missing or not isinstance(objects, dict) or not {"bbox", "category"} <= objects.keys():
        raise ValueError(
            f"The data set has the columns {images.features}; it must have image_id, width, height, and objects with "
            "the lists bbox and category."
        )
    if not isinstance(objects["category"].feature, ClassLabel):
        raise ValueError(
            f"The categories are {objects['category'].feature}, not class labels; cast them to a "
            "`datasets.ClassLabel` with their names."
        )
    if masks and "segmentation" not in objects and "instance_map" not in images.column_names:
        raise ValueError(
            f"The objects have {', '.join(objects)}, but no masks for all of them; give every object a segmentation "
            "(polygons or run-length encoding), or train an object detector."
        )


def label_names(images: Dataset) -> list[str]:
    """Names of the categories, in the order of their numbers."""
    return images.features["objects"]["category"].feature.names


def run_lengths(segmentation: Any, width: int, height: int) -> dict[str, Any]:
    """Polygons or run-length encoding -> compressed run-length encoding."""
    encoded = coco_mask.segmToRle(segmentation, width, height)
    return {"size": [height, width], "counts": encoded["counts"].decode()}


def annotations(row: dict[str, Any], box_format: str = "xywh") -> list[dict[str, Any]]:
    """The objects of a row as COCO annotations; categories are numbers, masks compressed run-length encodings."""
    objects = row["objects"]
    boxes = box_convert(torch.tensor(objects["bbox"], dtype=torch.float64).view(-1, 4), box_format, "xywh")
    fields = {
        "image_id": [row["image_id"]] * len(boxes),
        "category_id": objects["category"],
        "bbox": boxes.tolist(),
        "area": objects.get("area", boxes[:, 2:].prod(dim=1).tolist()),
        "iscrowd": [int(crowd) for crowd in objects.get("iscrowd", [0] * len(boxes))],
    }
    if "instance_map" in row:
        numbers = np.arange(1, len(boxes) + 1)
        fields["segmentation"] = encode_masks(np.asarray(row["instance_map"]) == numbers[:, None, None])
    elif "segmentation" in objects:
        size = (row["width"], row["height"])
        fields["segmentation"] = [run_lengths(segmentation, *size) for segmentation in objects["segmentation"]]
    return [dict(zip(fields, values)) for values in zip(*fields.values())]


def encode_masks(masks: np.ndarray) -> list[dict[str, Any]]:
    """Masks (objects, height, width) -> compressed run-length encodings."""
    encoded = coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0), dtype=np.uint8))
    return [{"size": list(mask["size"]), "counts": mask["counts"].decode()} for mask in encoded]


def decode_masks(encoded: list[dict[str, Any]], height: int, width: int) -> torch.Tensor:
    """Run-length encodings -> masks (objects, height, width) of zeros and ones."""
    if not encoded:
        return torch.zeros(0, height, width, dtype=torch.uint8)
    return torch.from_numpy(np.ascontiguousarray(coco_mask.decode(encoded).transpose(2, 0, 1)))


class CocoMetrics:
    """COCO's average precision of boxes and, if wanted, of masks, from predictions that come image by image.

    Crowds count as COCO counts them: what is found in one is neither right nor wrong. A metric is -1 where there are
    no objects of its kind.

    Args:
        images: the data set of objects to evaluate on.
        masks: whether to evaluate masks as well.
        box_format: of the data set, one of `BOX_FORMATS`.

    Raises:
        `ValueError`: when images have no different numbers as ids, masks are missing, or boxes are of another format.
    """

    def __init__(self, images: Dataset, masks: bool, box_format: str = "xywh"):
        self.kinds = {"box": "bbox", "mask": "segm"} if masks else {"box": "bbox"}
        check_objects(images, masks)
        columns = {"image_id", "width", "height", "objects", "instance_map"} & set(images.column_names)
        rows = list(images.select_columns(sorted(columns)))
        ids = [row["image_id"] for row in rows]
        if len(set(ids)) < len(ids) or not all(isinstance(image_id, int) for image_id in ids):
            raise ValueError(f"The image_id of images must be different integers, not {ids[:3]} ...; number them.")
        objects = [annotation for row in rows for annotation in annotations(row, box_format)]
        check_boxes(objects, {row["image_id"]: (row["width"], row["height"]) for row in rows})
        for number, annotation in enumerate(objects, start=1):  # 0 stands for no object
            annotation["id"] = number
        self.truth = COCO(
            {
                "images": [{"id": row["image_id"], "width": row["width"], "height": row["height"]} for row in rows],
                "annotations": objects,
                "categories": [{"id": number, "name": name} for number, name in enumerate(label_names(images))],
            }
        )
        self.found: dict[int, list[dict[str, Any]]] = {}

    def add(self, image_id: int, predictions: dict[str, torch.Tensor]) -> None:
        """What was found in an image.

        Args:
            image_id: of the data set.
            predictions: `boxes` (n, 4), corners in pixels of the image, `scores` (n,), `labels` (n,), and for masks
                `masks` (n, height, width), true inside.
        """
        columns = {
            "category_id": predictions["labels"].tolist(),
            "score": predictions["scores"].tolist(),
            "bbox": box_convert(predictions["boxes"].double(), "xyxy", "xywh").tolist(),
        }
        if "mask" in self.kinds:
            columns["segmentation"] = encode_masks(predictions["masks"].cpu().numpy())
        self.found[image_id] = [{"image_id": image_id, **dict(zip(columns, row))} for row in zip(*columns.values())]

    def compute(self) -> dict[str, float]:
        """The metrics of all processes' images; forgets the predictions."""
        found = dict(gather_object(list(self.found.items())))  # images that fill up the last batch come twice
        self.found = {}
        metrics = {}
        for kind, iou_type in self.kinds.items():
            unused = "bbox" if iou_type == "segm" else "segmentation"  # the size of a detection is that of its mask
            results = [
                {name: value for name, value in prediction.items() if name != unused}
                for predictions in found.values()
                for prediction in predictions
            ]
            evaluation = COCOeval_faster(self.truth, self.truth.loadRes(results), iou_type)
            evaluation.run()
            stats = evaluation.stats_as_dict
            metrics |= {f"{kind}_{name}": float(stats[key]) for name, key in METRICS.items()}
        return metrics


def check_boxes(objects: Sequence[dict[str, Any]], sizes: dict[int, tuple[int, int]]) -> None:
    """Corners read as width and height mostly reach beyond the image.

    Raises:
        `ValueError`: when more than a tenth of the boxes does so.
    """
    outside = 0
    for annotation in objects:
        left, top, width, height = annotation["bbox"]
        right, bottom = sizes[annotation["image_id"]]
        outside += left + width > right + 1 or top + height > bottom + 1
    if outside > 0.1 * len(objects):
        raise ValueError(
            f"{outside} of {len(objects)} boxes end outside their images; if they are corners, pass --box_format "
            "xyxy, and if not, xywh."
        )
