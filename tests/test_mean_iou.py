"""The metric of label maps, against numbers computed by hand."""

from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch

import cropr_hf


PATH = str(Path(cropr_hf.__file__).parents[1] / "examples" / "metrics" / "mean_iou" / "mean_iou.py")

# Class 0: 2 right, 1 missed as class 1.  Class 1: 1 right, 1 missed as class 2.  Class 2: 1 right.  Class 3: nowhere.
PREDICTION = np.array([[0, 0, 1], [1, 2, 2]])
REFERENCE = np.array([[0, 0, 0], [1, 1, 2]])
EXPECTED = {
    "mean_iou": (2 / 3 + 1 / 3 + 1 / 2) / 3,
    "mean_accuracy": (2 / 3 + 1 / 2 + 1) / 3,
    "overall_accuracy": 4 / 6,
    "per_category_iou": [2 / 3, 1 / 3, 1 / 2, np.nan],
    "per_category_accuracy": [2 / 3, 1 / 2, 1, np.nan],
}


@pytest.fixture
def metric(tmp_path) -> evaluate.Metric:
    return evaluate.load(PATH, cache_dir=str(tmp_path))


def assert_equal(result: dict, expected: dict) -> None:
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(result[name], value, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("convert", [np.asarray, np.ndarray.tolist, torch.tensor, np.uint8], ids=lambda f: f.__name__)
def test_numbers_by_hand_from_any_kind_of_map(metric, convert):
    result = metric.compute(predictions=[convert(PREDICTION)], references=[convert(REFERENCE)], num_labels=4)
    assert_equal(result, EXPECTED)
    assert {type(value) for value in result.values()} == {float, np.ndarray}


@pytest.mark.parametrize("ignore_index", [255, -100, 1])
def test_ignored_pixels_count_for_nothing(metric, ignore_index):
    """Even if what is predicted there is no class, and if the ignored label is a class."""
    reference = np.where(REFERENCE == 1, ignore_index, REFERENCE)
    prediction = np.where(REFERENCE == 1, 7, PREDICTION)
    result = metric.compute(
        predictions=prediction[None], references=reference[None], num_labels=3, ignore_index=ignore_index
    )
    expected = {
        "mean_iou": (2 / 3 + 0 + 1) / 3,
        "mean_accuracy": (2 / 3 + 1) / 2,
        "overall_accuracy": 3 / 4,
        "per_category_iou": [2 / 3, 0, 1],
        "per_category_accuracy": [2 / 3, np.nan, 1],
    }
    assert_equal(result, expected)


def test_maps_without_a_counted_pixel_have_no_metric(metric):
    result = metric.compute(predictions=PREDICTION[None], references=[[[9] * 3] * 2], num_labels=2, ignore_index=9)
    nan = float("nan")
    absent = {name: [nan, nan] if name.startswith("per_category") else nan for name in EXPECTED}
    assert_equal(result, absent)


def test_batches_of_maps_of_different_sizes_add_up(metric):
    """The two halves of the maps, cut in different places, and nothing is left from one call to the next."""
    predictions = [PREDICTION[:, :1], PREDICTION[:, 1:], PREDICTION[:1], PREDICTION[1:]]
    references = [REFERENCE[:, :1], REFERENCE[:, 1:], REFERENCE[:1], REFERENCE[1:]]
    for _ in range(2):
        metric.add_batch(predictions=predictions[:2], references=references[:2])
        metric.add(prediction=predictions[2], reference=references[2])
        metric.add_batch(predictions=predictions[3:], references=references[3:])
        assert_equal(metric.compute(num_labels=4), EXPECTED)
    assert_equal(metric.compute(predictions=predictions, references=references, num_labels=4), EXPECTED)
    metric.add_batch(predictions=predictions[:3], references=references[:3])
    assert_equal(metric.compute(predictions=predictions[3:], references=references[3:], num_labels=4), EXPECTED)


def test_many_classes_against_scikit_learn(metric):
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    predictions, references = generator.integers(0, 150, (2, 4, 60, 50), dtype=np.uint8)
    result = metric.compute(predictions=predictions, references=references, num_labels=150)
    expected = sklearn_metrics.jaccard_score(references.ravel(), predictions.ravel(), average=None)
    np.testing.assert_allclose(result["per_category_iou"], expected, rtol=1e-12)
    assert result["overall_accuracy"] == (predictions == references).mean()


def test_what_does_not_fit_is_an_error(metric):
    def compute(prediction, reference, **kwargs):
        metric.compute(predictions=prediction, references=reference, **{"num_labels": 3, **kwargs})

    with pytest.raises(ValueError, match=r"`predictions` have labels such as 2, outside of \[0, 1\]"):
        compute(PREDICTION[None], np.zeros((1, 2, 3), int), num_labels=2)
    with pytest.raises(ValueError, match=r"`references` have labels such as 255, .*`ignore_index` \(now None\)"):
        compute(PREDICTION[None], np.full((1, 2, 3), 255))
    with pytest.raises(ValueError, match="`references` have labels such as -1"):
        compute(PREDICTION[None], np.full((1, 2, 3), -1), ignore_index=255)
    with pytest.raises(ValueError, match=r"int64 of the shape \(2, 3\), the reference int64 of the shape \(3, 2\)"):
        compute(PREDICTION[None], REFERENCE.T[None])
    with pytest.raises(ValueError, match="whole numbers"):
        compute(PREDICTION[None].astype(float), REFERENCE[None])
    with pytest.raises(ValueError, match="1 predictions and 2 references"):
        compute(PREDICTION[None], [REFERENCE] * 2)
    with pytest.raises(ValueError, match="0 predictions and 0 references"):
        compute([], [])
    with pytest.raises(ValueError, match="`reduce_labels` is set"):
        compute(PREDICTION[None], REFERENCE[None], reduce_labels=True)
    # What was refused is forgotten.
    assert_equal(metric.compute(predictions=[PREDICTION], references=[REFERENCE], num_labels=4), EXPECTED)
