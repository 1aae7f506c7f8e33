"""Mean intersection over union of label maps, as an `evaluate` metric that needs no download.

Each call of `add_batch` reduces its maps to the number of pixels of each pair (prediction, reference), so that neither
memory nor the cache file grows with the number of pixels.
"""

import datasets
import evaluate
import numpy as np


class MeanIou(evaluate.Metric):
    """`compute(predictions, references, num_labels, ignore_index=None)` -> dict of floats and arrays of floats

    Arguments and results are called as those of the Hub's metric of this name, for the official example scripts.

    Args:
        predictions: label maps (height, width) of whole numbers in [0, num_labels); sizes may differ between images.
        references: one for each prediction, of its size.
        num_labels: C, number of classes.
        ignore_index: pixels with this reference count for nothing.
        reduce_labels: `False`; the metric does not move labels.

    Returns, all in [0, 1]:
        `mean_iou`, `mean_accuracy`: means of the following over the classes where they are not NaN.
        `per_category_iou`: C values; NaN for classes in neither predictions nor references.
        `per_category_accuracy`: share of the pixels of each class that were found; NaN for classes without any.
        `overall_accuracy`: share of all pixels that are right; NaN if all are ignored.
    """

    def _info(self):
        columns = ("predictions", "references", "pixels")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=MeanIou.__doc__,
            features=datasets.Features({column: datasets.Value("int64") for column in columns}),
            format="numpy",
        )

    def add(self, *, prediction, reference):
        """Adds one label map and its reference."""
        self.add_batch(predictions=[prediction], references=[reference])

    def add_batch(self, *, predictions, references):
        """Adds label maps and their references.

        Raises:
            `ValueError`: when they differ in number or shape, are not maps of whole numbers, or are none at all.
        """
        if predictions is None or references is None or len(predictions) != len(references) or not len(predictions):
            counts = [0 if maps is None else len(maps) for maps in (predictions, references)]
            raise ValueError(
                f"There are {counts[0]} predictions and {counts[1]} references; give one of each per image."
            )
        pairs, pixels = zip(*map(count_pairs, predictions, references))
        pairs, index = np.unique(np.concatenate(pairs), return_inverse=True)
        # (pairs,) -> (pairs, 2) -> (2, pairs)
        predicted, true = pairs.view(np.int32).reshape(-1, 2).T
        pixels = np.bincount(index, weights=np.concatenate(pixels)).astype(np.int64)
        super().add_batch(predictions=predicted, references=true, pixels=pixels)

    def compute(self, *, predictions=None, references=None, num_labels, ignore_index=None, reduce_labels=False):
        """The metric of these label maps and those that were added before, which are then forgotten.

        Raises:
            `ValueError`: as `add_batch`, for labels outside of [0, num_labels) that are not ignored, and for
                `reduce_labels`.
        """
        if reduce_labels:
            raise ValueError("`reduce_labels` is set; move the labels before, and pass the result without it.")
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        return super().compute(num_labels=num_labels, ignore_index=ignore_index)

    def _compute(self, predictions, references, pixels, num_labels, ignore_index):
        if ignore_index is not None:
            counted = references != ignore_index
            predictions, references, pixels = predictions[counted], references[counted], pixels[counted]
        for name, labels in (("predictions", predictions), ("references", references)):
            wrong = np.unique(labels[(labels < 0) | (labels >= num_labels)])
            if wrong.size:
                raise ValueError(
                    f"`{name}` have labels such as {wrong[0]}, outside of [0, {num_labels - 1}]; set `num_labels` to "
                    f"the number of classes, and `ignore_index` (now {ignore_index}) to the label of all other pixels."
                )
        # (C * C,) -> (C, C): references, predictions
        cells = np.bincount(references * num_labels + predictions, weights=pixels, minlength=num_labels**2)
        confusion = cells.reshape(num_labels, num_labels)
        correct, true, predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
        iou, accuracy = ratio(correct, true + predicted - correct), ratio(correct, true)
        return {
            "mean_iou": mean(iou),
            "mean_accuracy": mean(accuracy),
            "overall_accuracy": ratio(correct.sum(), true.sum()).item(),
            "per_category_iou": iou,
            "per_category_accuracy": accuracy,
        }


def count_pairs(prediction, reference):
    """Pairs (prediction, reference) that occur, each as the 8 bytes of two int32, and the number of their pixels."""
    maps = [np.asarray(prediction), np.asarray(reference)]
    if maps[0].shape != maps[1].shape or any(labels.ndim != 2 or labels.dtype.kind not in "iu" for labels in maps):
        raise ValueError(
            f"The prediction is {maps[0].dtype} of the shape {maps[0].shape}, the reference {maps[1].dtype} of "
            f"the shape {maps[1].shape}; give whole numbers of the same (height, width): resize logits to the "
            "reference, and take their argmax."
        )
    # (height, width) -> (height * width, 2) -> (height * width,)
    pairs = np.stack([labels.ravel() for labels in maps], axis=-1).astype(np.int32).view(np.int64)[:, 0]
    return np.unique(pairs, return_counts=True)


def ratio(part, whole):
    """part / whole, and NaN where the whole is 0"""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)


def mean(values):
    """Of those that are not NaN, and NaN if there are none."""
    values = values[~np.isnan(values)]
    return values.mean().item() if values.size else float("nan")
