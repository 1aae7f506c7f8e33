"""A published model with what comes before and after it, as the server and the Space of the examples use it."""

import os
from typing import Any

import torch
import transformers
from PIL import Image
from torch.nn import functional as F
from transformers import AutoConfig, AutoImageProcessor, BatchFeature


TASKS = ("ImageClassification", "SemanticSegmentation", "ObjectDetection", "InstanceSegmentation")


class PublishedModel:
    """A model in evaluation, and its image processor, from a folder or the Hub; code beside them is not run.

    Attributes:
        task: one of `TASKS`.
        model, processor: as the Auto classes load them.
        labels: names of the classes, by their numbers.

    Args:
        name_or_path: folder or Hub id.
        dtype: of the weights.

    Raises:
        `ValueError`: for a model of another task, or one whose code would have to be run.
    """

    def __init__(self, name_or_path: str | os.PathLike, dtype: torch.dtype = torch.float32):
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
        architecture = (config.architectures or ["no model class"])[0]
        self.task = architecture.rpartition("For")[2]
        if self.task not in TASKS:
            raise ValueError(f"{name_or_path} holds {architecture}; this serves {', '.join(TASKS)}.")
        self.processor = AutoImageProcessor.from_pretrained(name_or_path, trust_remote_code=False)
        auto_class = getattr(transformers, f"AutoModelFor{self.task}")
        self.model: Any = auto_class.from_pretrained(name_or_path, dtype=dtype, trust_remote_code=False).eval()
        self.labels: list[str] = [self.model.config.id2label[label] for label in range(self.model.config.num_labels)]

    @property
    def prunable(self) -> Any | None:
        """The model or its backbone, whichever has `set_pruning`; `None` for a model without pruning."""
        return next((part for part in self.model.modules() if hasattr(part, "set_pruning")), None)

    def prepare(self, image: Image.Image, max_megapixels: float) -> BatchFeature:
        """The model's input for an image; its tensors start with a dimension of 1.

        Raises:
            `ValueError`: as `misfit`, for an image that cannot be resized, or would have more pixels than that.
        """
        size = (image.height, image.width)
        height, width = resized_size(self.processor, size)
        if height * width > max_megapixels * 1e6:  # of a strip, which is cropped only afterwards
            raise misfit(size, f"resized to {width} x {height} it has more than {max_megapixels:g} megapixels")
        try:
            return self.processor(images=image, return_tensors="pt")
        except (ValueError, RuntimeError) as error:  # a strip that would be resized to nothing, for example
            raise misfit(size, error) from None

    def likeliest(self, logits: torch.Tensor, top_k: int) -> list[tuple[str, float]]:
        """The names and probabilities of the `top_k` likeliest classes, from the logits (C,) of a classifier."""
        several = self.model.config.problem_type == "multi_label_classification" or len(self.labels) == 1
        probabilities = logits.sigmoid() if several else logits.softmax(dim=-1)
        scores, best = (column.tolist() for column in probabilities.topk(min(top_k, len(self.labels))))
        return [(self.labels[label], score) for label, score in zip(best, scores)]


def misfit(size: tuple[int, int], reason: Exception | str) -> ValueError:
    """What to raise for an image of (height, width) `size` that is good, but not for this model."""
    return ValueError(f"The image of {size[1]} x {size[0]} pixels does not fit the model: {reason}")


def resized_size(processor: Any, size: tuple[int, int]) -> tuple[int, int]:
    """What an image of (height, width) `size` is enlarged to, if that depends on its shape; else its own size.

    With `shortest_edge` alone, as before a crop, the long side of a strip grows without bounds; all other kinds of
    sizes bound both sides.
    """
    edges = processor.size
    if not processor.do_resize or not edges.get("shortest_edge") or edges.get("longest_edge"):
        return size
    scale = edges["shortest_edge"] / min(size)
    return round(scale * size[0]), round(scale * size[1])


def detections(
    outputs: Any, processor: Any, sizes: list[tuple[int, int]], threshold: float = 0.0
) -> list[dict[str, torch.Tensor]]:
    """The objects in each image of a batch, in pixels of images of `sizes` (height, width).

    Returns:
        For each image `scores` (n,), all above the threshold, `labels` (n,), `boxes` (n, 4), and of a model with masks
        `masks` (n, height, width) of bool.
    """
    found = processor.post_process_object_detection(outputs, threshold=threshold, target_sizes=sizes)
    if outputs.get("pred_masks") is None:
        return found
    scores = outputs.logits.softmax(dim=-1)[..., :-1].amax(dim=-1)
    for image, masks, kept, size in zip(found, outputs.pred_masks, scores > threshold, sizes):
        probabilities = F.interpolate(masks[kept, None].float().sigmoid(), size, mode="bilinear")[:, 0]
        image["masks"] = probabilities > 0.5
    return found
