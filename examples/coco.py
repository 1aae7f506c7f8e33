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
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate.utils import gather_object
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval import mask as coco_mask
from shared import shortened
from torchvision.ops import box_convert
from transformers.utils import logging


logger = logging.get_logger(__name__)

BOX_FORMATS = ("xywh", "xyxy")


def is_whole(value: Any, least: int | None = None) -> bool:
    """Whether it is a whole number, and `least` or more."""
    return isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least)


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_text(value: Any) -> bool:
    """Whether it is text that says something."""
    return isinstance(value, str) and bool(value)


def is_box(value: Any) -> bool:
    """Whether it is a box of COCO's; one without width or height is, and shows nothing."""
    numbers = isinstance(value, list) and len(value) == 4 and all(map(is_number, value))
    return numbers and min(value[2:]) >= 0


# What entries of a COCO file must have: whether a value is right, and what it is then.
ENTRIES: dict[str, dict[str, tuple[Callable[[Any], bool], str]]] = {
    "images": {
        "id": (is_whole, "a whole number"),
        "file_name": (is_text, "the name of a file in the folder of images"),
        "width": (partial(is_whole, least=1), "a number of pixels"),
        "height": (partial(is_whole, least=1), "a number of pixels"),
    },
    "categories": {"id": (is_whole, "a whole number"), "name": (is_text, "text")},
    "annotations": {
        "image_id": (is_whole, "the id of an image"),
        "category_id": (is_whole, "the id of a category"),
        "bbox": (is_box, "[left, top, width, height] in pixels"),
        "area": (is_number, "a number of pixels"),
        "iscrowd": (lambda value: value in (0, 1), "0 or 1"),
    },
}
OPTIONAL = {"area": 0, "iscrowd": 0}
METRICS = {"map": "AP_all", "map_50": "AP_50", "map_75": "AP_75"}
METRICS |= {f"map_{size}": f"AP_{size}" for size in ("small", "medium", "large")}


def load_coco(image_dir: str, annotation_file: str, masks: bool = False) -> Dataset:
    """The images of a folder, with their objects from a COCO file such as `instances_val2017.json`.

    Categories are numbered from 0, in the order of their ids.

    Args:
        masks: whether objects have masks; what a file says about them is not read otherwise.

    Raises:
        `ValueError`: when the file or an image is missing, or the file holds something else; with the entry.
    """
    coco = read_coco(annotation_file, image_dir)
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
    if masks:
        fields["segmentation"] = List({"size": List(Value("int64")), "counts": Value("string")})
    objects: dict[int, dict[str, list]] = {image_id: {name: [] for name in fields} for image_id in sizes}
    empty: list[str] = []
    for index, annotation in enumerate(coco["annotations"]):
        place = f"{annotation_file}, annotations[{index}]"
        if annotation["image_id"] not in sizes or annotation["category_id"] not in numbers:
            raise ValueError(f"{place} lacks the image or the category that it names: {excerpt(annotation)}.")
        width, height = annotation["bbox"][2:]
        values = {"area": width * height, "iscrowd": 0, **annotation, "category": numbers[annotation["category_id"]]}
        if masks:
            try:
                mask = run_lengths(annotation.get("segmentation"), *sizes[annotation["image_id"]])
            except ValueError as error:
                raise ValueError(f"{place}: {error} It is {excerpt(annotation)}.") from error
            values["segmentation"] = mask
            empty += [] if coco_mask.area(mask) else [place]
        for name, column in objects[annotation["image_id"]].items():
            column.append(values[name])
    if empty:
        logger.warning(f"{len(empty)} objects have empty masks, and count for nothing, such as {empty[0]}.")
    features = {"image_id": Value("int64"), "image": Image(), "width": Value("int64"), "height": Value("int64")}
    columns = {
        "image_id": list(sizes),
        "image": [str(file) for file in files],
        "width": [width for width, _ in sizes.values()],
        "height": [height for _, height in sizes.values()],
        "objects": list(objects.values()),
    }
    return Dataset.from_dict(columns, features=Features({**features, "objects": fields}))


def read_coco(annotation_file: str, image_dir: str) -> dict[str, list[dict[str, Any]]]:
    """A COCO file whose entries have what `load_coco` needs; see there for what it raises."""
    if not Path(annotation_file).is_file():
        raise ValueError(f"There is no file {annotation_file}; name the COCO annotations of {image_dir}.")
    try:
        coco = json.loads(Path(annotation_file).read_text(encoding="utf-8"))
    except ValueError as error:  # also when it is not text
        raise ValueError(f"{annotation_file} is not JSON ({error}); give a COCO file of objects.") from error
    missing = ENTRIES.keys() - (coco.keys() if isinstance(coco, dict) else set())
    if missing:
        raise ValueError(
            f"{annotation_file} has no {', '.join(sorted(missing))}; give a COCO file of objects, such as "
            "instances_train2017.json."
        )
    for part, fields in ENTRIES.items():
        if not isinstance(coco[part], list):
            raise ValueError(f"{annotation_file}: {part} is {excerpt(coco[part])}; it must be a list.")
        for index, entry in enumerate(coco[part]):
            place = f"{annotation_file}, {part}[{index}]"
            if not isinstance(entry, dict):
                raise ValueError(f"{place} is {excerpt(entry)}; it must have {', '.join(fields)}.")
            for name, (is_right, kind) in fields.items():
                if not is_right(entry[name] if name in entry else OPTIONAL.get(name)):
                    what = f"{name} {excerpt(entry[name])}" if name in entry else f"no {name}"
                    raise ValueError(f"{place} has {what}; it must be {kind}. The entry is {excerpt(entry)}.")
    for part, name in (("images", "id"), ("categories", "id"), ("categories", "name")):
        value, count = Counter(entry[name] for entry in coco[part]).most_common(1)[0] if coco[part] else (None, 1)
        if count > 1:
            raise ValueError(f"{annotation_file} has {count} {part} of the {name} {value!r}; give each its own.")
    return coco


def excerpt(value: Any) -> str:
    """A value as messages show it."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."


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


def check_counts(images: Dataset, box_format: str = "xywh") -> None:
    """Warns of categories of which a training set has no object to learn from; only boxes and crowds are looked at.

    Raises:
        `ValueError`: when there is no object at all.
    """
    objects = images.select_columns("objects").with_format("arrow")[:]["objects"]
    names = label_names(images)

    def values(name: str) -> np.ndarray:
        column = pc.list_flatten(pc.struct_field(objects, name))
        return (pc.list_flatten(column) if name == "bbox" else column).to_numpy()

    categories, boxes = values("category"), torch.tensor(values("bbox").reshape(-1, 4))
    has_area = (box_convert(boxes, box_format, "xywh")[:, 2:] > 0).all(dim=1).numpy()
    crowds = values("iscrowd").astype(bool) if "iscrowd" in images.features["objects"] else np.zeros_like(has_area)
    counts = np.bincount(categories[has_area & ~crowds], minlength=len(names))
    what = f"{len(categories)} objects on the {len(images)} training images, {crowds.sum()} of them crowds (iscrowd), "
    what += f"{(~has_area).sum()} without width or height"
    if not counts.any():
        raise ValueError(f"There is no object to learn from: {what}. Give objects that are neither.")
    absent = [name for name, count in zip(names, counts) if not count]
    if absent:
        logger.warning(
            f"{len(absent)} of {len(names)} categories have no object to learn from: {shortened(absent)}. There are "
            f"{what}."
        )


def label_names(images: Dataset) -> list[str]:
    """Names of the categories, in the order of their numbers."""
    return images.features["objects"]["category"].feature.names


def run_lengths(segmentation: Any, width: int, height: int) -> dict[str, Any]:
    """Polygons or run-length encoding -> compressed run-length encoding.

    Raises:
        `ValueError`: when it is neither, or made for an image of another size.
    """
    if isinstance(segmentation, dict):
        if list(segmentation.get("size") or ()) != [height, width]:
            raise ValueError(
                f"The mask has run lengths for {segmentation.get('size')}, but its image is [{height}, {width}] "
                "(height, width)."
            )
        counts = segmentation.get("counts")
        if isinstance(counts, list) and not (all(map(is_whole, counts)) and sum(counts) == height * width):
            raise ValueError(f"The mask is not one of COCO's: its run lengths do not add up to {height} x {width}.")
    elif not isinstance(segmentation, list) or not segmentation or not all(map(is_polygon, segmentation)):
        raise ValueError(
            "The mask must be polygons [[x, y, x, y, x, y, ...], ...] of three corners or more, or run lengths "
            "{'size': [height, width], 'counts': ...}."
        )
    try:
        encoded = coco_mask.segmToRle(segmentation, width, height)
        return {"size": [height, width], "counts": encoded["counts"].decode()}
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f"The mask is not one of COCO's ({error}).") from error


def is_polygon(value: Any) -> bool:
    """Whether it is a list of three corners or more."""
    return isinstance(value, list) and len(value) >= 6 and len(value) % 2 == 0 and all(map(is_number, value))


def annotations(row: dict[str, Any], box_format: str = "xywh", masks: bool = True) -> list[dict[str, Any]]:
    """The objects of a row as COCO annotations; categories are numbers, masks compressed run-length encodings.

    Without `masks` there are none, and what the row says about them is not read.
    """
    objects = row["objects"]
    boxes = box_convert(torch.tensor(objects["bbox"], dtype=torch.float64).view(-1, 4), box_format, "xywh")
    fields = {
        "image_id": [row["image_id"]] * len(boxes),
        "category_id": objects["category"],
        "bbox": boxes.tolist(),
        "area": objects.get("area", boxes[:, 2:].prod(dim=1).tolist()),
        "iscrowd": [int(crowd) for crowd in objects.get("iscrowd", [0] * len(boxes))],
    }
    if masks and "instance_map" in row:
        numbers = np.arange(1, len(boxes) + 1)
        fields["segmentation"] = encode_masks(np.asarray(row["instance_map"]) == numbers[:, None, None])
    elif masks and "segmentation" in objects:
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
        columns = {"image_id", "width", "height", "objects", *(["instance_map"] if masks else [])}
        columns &= set(images.column_names)
        rows = list(images.select_columns(sorted(columns)))
        ids = [row["image_id"] for row in rows]
        if len(set(ids)) < len(ids) or not all(isinstance(image_id, int) for image_id in ids):
            raise ValueError(f"The image_id of images must be different integers, not {ids[:3]} ...; number them.")
        objects = [annotation for row in rows for annotation in annotations(row, box_format, masks)]
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
