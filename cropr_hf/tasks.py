"""Which class is for what: the one table that command line, benchmark, export, cards, Auto classes and Hub read."""

from dataclasses import dataclass, field
from typing import Any

from .modeling_cropr_rf_detr import CroprRfDetrForObjectDetection
from .modeling_cropr_vit import CroprViTBackbone, CroprViTForImageClassification, CroprViTModel
from .modeling_cropr_vit_detection import CroprViTForInstanceSegmentation, CroprViTForObjectDetection
from .modeling_cropr_vit_segmentation import CroprViTForSemanticSegmentation


@dataclass(frozen=True)
class Task:
    """What a model class is for.

    Attributes:
        model_class: any model of this package.
        auto_class: the Auto class of Transformers that loads it.
        pipeline: the pipeline of Transformers that runs it, and its tag on the Hub.
        summary: what it does, after "a vision transformer that".
        fields: of a configuration that has no checkpoint to take them from.
        outputs: what leaves the graph of an exported model; that of backbones and detectors has names of its own.
        has_loss: whether it can be trained by itself.
        is_detector: whether it finds objects, so that what it computes depends on the image.
    """

    model_class: type[Any]
    auto_class: str
    pipeline: str
    summary: str = "encodes images"
    fields: dict[str, Any] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    has_loss: bool = True
    is_detector: bool = False


FEATURES = "image-feature-extraction"
TASKS: dict[str, Task] = {
    "encoder": Task(
        CroprViTModel, "AutoModel", FEATURES, outputs=("last_hidden_state", "pooler_output"), has_loss=False
    ),
    "backbone": Task(CroprViTBackbone, "AutoBackbone", FEATURES, has_loss=False),
    "image_classification": Task(
        CroprViTForImageClassification,
        "AutoModelForImageClassification",
        "image-classification",
        "classifies images",
        {"num_labels": 1000},
        ("logits",),
    ),
    "semantic_segmentation": Task(
        CroprViTForSemanticSegmentation,
        "AutoModelForSemanticSegmentation",
        "image-segmentation",
        "labels every pixel of an image",
        {"num_labels": 150, **CroprViTForSemanticSegmentation.conversion_fields},
        ("logits",),
    ),
    "object_detection": Task(
        CroprViTForObjectDetection,
        "AutoModelForObjectDetection",
        "object-detection",
        "finds objects and their boxes",
        {"num_labels": 80, "last_layer_fusion": True},
        is_detector=True,
    ),
    "instance_segmentation": Task(
        CroprViTForInstanceSegmentation,
        "AutoModelForInstanceSegmentation",
        "image-segmentation",
        "finds objects, their boxes and their masks",
        {"num_labels": 80, "last_layer_fusion": True},
        is_detector=True,
    ),
}
DEFAULT_TASK = "image_classification"
# A model around a backbone, with a configuration of its own.
RF_DETR = Task(
    CroprRfDetrForObjectDetection,
    "AutoModelForObjectDetection",
    "object-detection",
    "finds objects and their boxes",
    outputs=("logits", "pred_boxes"),
)


def find_task(class_name: str) -> tuple[str, Task] | None:
    """Name and task of a `CroprViT*` class by its name; `None` for another class."""
    return next(((name, task) for name, task in TASKS.items() if task.model_class.__name__ == class_name), None)
