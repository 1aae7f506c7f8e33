"""One checkpoint under several schedules: the record, what is restored, and what is refused; nothing is timed."""

import json
import math
import sys

import pytest
import torch

from cropr_hf import (
    CroprViTConfig,
    CroprViTForImageClassification,
    CroprViTForSemanticSegmentation,
    curriculum_schedule,
    evaluate_schedules,
)
from cropr_hf.speed import tradeoff
from cropr_hf.speed.benchmark import UNPRUNED
from cropr_hf.speed.cost import multiply_adds
from cropr_hf.speed.plots import plot_tradeoff
from cropr_hf.speed.timing import Timing
from tests.common import assert_close_relative


ROUNDS = {"min_rounds": 3, "max_rounds": 3}


def tiny_model(model_class: type = CroprViTForImageClassification, **kwargs):
    fields = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_size": 64,
        "patch_size": 8,
        "pruning_rate": 10,
        "num_labels": 4,
    }
    return model_class(CroprViTConfig(**{**fields, **kwargs}))


def last_kept(model) -> int:
    """A metric that tells which schedule the model has."""
    return model.config.kept_patches(pruning=model.base_model.pruning)[-1]


class TestEvaluateSchedules:
    def test_each_schedule_is_measured_in_its_turn(self):
        model = tiny_model()
        schedules = [None, 0, curriculum_schedule(model.config, 0.5), 5]
        record = evaluate_schedules(model, schedules, last_kept, **ROUNDS)
        points = record["points"]
        assert [point["schedule"] for point in points] == schedules
        assert [point["metrics"] for point in points] == [{"metric": kept} for kept in (43, 64, 55, 53)]
        for point, schedule in zip(points, schedules):
            assert point["kept_patches"] == model.config.kept_patches(pruning=schedule)
            assert point["images_per_second"] > 0 and point["speedup"] > 0 and point["spread"] >= 0
        assert points[1]["speedup"] == 1 and points[1]["spread"] == 0
        assert points[1]["images_per_second"] == record["unpruned_images_per_second"]
        assert (record["batch_size"], record["image_size"], record["rounds"]) == (8, [64, 64], 3)
        assert json.loads(json.dumps(record, allow_nan=False)) == record

    def test_multiply_adds_fall_with_pruning_and_count_the_head(self):
        model = tiny_model(CroprViTForSemanticSegmentation, num_queries=None)
        schedules = [curriculum_schedule(model.config, strength) for strength in (0, 0.4, 0.8, 1)]
        points = evaluate_schedules(model, schedules, last_kept, **ROUNDS)["points"]
        counts = [point["multiply_adds"] for point in points]
        assert sorted(counts, reverse=True) == counts and len(set(counts)) == 4
        assert counts[-1] == multiply_adds(model.config) + 64 * 32 * 4
        unpruned = tiny_model(token_reducer=None, pruning_rate=None).config
        assert counts[0] == multiply_adds(unpruned) + 64 * 32 * 4

    def test_images_of_another_size(self):
        model = tiny_model(CroprViTForSemanticSegmentation, num_queries=None)
        pixels = torch.zeros(2, 3, 64, 90)
        record = evaluate_schedules(model, [3], last_kept, pixels, **ROUNDS)
        assert (record["batch_size"], record["image_size"]) == (2, [64, 90])
        assert record["points"][0]["kept_patches"] == model.config.kept_patches(8 * 12, 3)

    def test_timing_is_against_the_unpruned_model_in_the_same_rounds(self, monkeypatch):
        tokens = []
        model = tiny_model()
        model.cropr_vit.layers[-1].register_forward_hook(lambda *hook: tokens.append(hook[2].shape[1]))

        def compare(candidates, reference, *args, **kwargs):
            tokens.clear()
            for call in candidates.values():
                call()
            assert reference == UNPRUNED == next(iter(candidates))
            return {name: Timing([1.0, 1.0], 2.0, 0.5) for name in candidates}

        monkeypatch.setattr(tradeoff, "compare", compare)
        (point,) = evaluate_schedules(model, [None], last_kept)["points"]
        assert tokens == [65, 65]  # with last layer fusion, of the model unpruned and pruned
        tokens.clear()
        model = tiny_model(last_layer_fusion=False)
        model.cropr_vit.layers[-1].register_forward_hook(lambda *hook: tokens.append(hook[2].shape[1]))
        (point,) = evaluate_schedules(model, [None], last_kept)["points"]
        assert tokens == [65, 1 + 33]
        assert (point["images_per_second"], point["speedup"], point["spread"]) == (8.0, 2.0, 0.5)

    @pytest.mark.parametrize("pruning", [None, 3, [60, 50, 50, 50]])
    def test_the_model_is_left_as_it_was(self, pruning):
        model = tiny_model().train()
        model.classifier.eval()  # frozen by its user
        model.set_pruning(pruning)
        modes = [module.training for module in model.modules()]
        random_state = torch.get_rng_state()
        seen = []

        def metric(model):
            seen.append((model.training, torch.is_grad_enabled()))
            return {"a": torch.tensor(1.5), "b": 2}

        points = evaluate_schedules(model, [0, 5], metric, **ROUNDS)["points"]
        assert [point["metrics"] for point in points] == [{"a": 1.5, "b": 2.0}] * 2
        assert seen == [(False, False)] * 2
        assert model.base_model.pruning == pruning
        assert [module.training for module in model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), random_state)
        model(torch.zeros(1, 3, 64, 64), labels=torch.tensor([0])).loss.backward()

        def failing(model):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            evaluate_schedules(model, [0, 5], failing)
        assert model.base_model.pruning == pruning
        assert [module.training for module in model.modules()] == modes

    @pytest.mark.parametrize(
        ("schedules", "message"),
        [
            ([], "no schedules"),
            ([0, 5, [64] * 4], r"0 and 2 both keep \[64, 64, 64, 64\]"),
            ([None, 10], "0 and 1 both keep"),
            ([0, 40], "at most 31"),
            ([[60, 50, 50]], "needs one per block, 4"),
            ([0.5], "whole numbers"),
        ],
    )
    def test_wrong_schedules_are_errors_before_anything_is_measured(self, schedules, message):
        model = tiny_model()
        with pytest.raises(ValueError, match=message):
            evaluate_schedules(model, schedules, lambda model: pytest.fail("measured"))
        assert model.base_model.pruning is None

    def test_schedules_that_the_images_are_too_small_for_are_errors(self):
        with pytest.raises(ValueError, match="at most"):
            evaluate_schedules(tiny_model(), [10], last_kept, torch.zeros(1, 3, 24, 32))

    def test_models_without_modules_are_errors(self):
        model = tiny_model(token_reducer=None, pruning_rate=None).train()
        with pytest.raises(ValueError, match="no token reducer"):
            evaluate_schedules(model, [0], last_kept)
        assert model.training

    @pytest.mark.parametrize("value", [None, "high", {"accuracy": [1, 2]}, math.nan, {"iou": math.inf}])
    def test_metrics_are_numbers(self, value):
        with pytest.raises(ValueError, match="must be a finite number"):
            evaluate_schedules(tiny_model(), [0], lambda model: value, **ROUNDS)


def test_a_checkpoint_is_published_at_one_of_its_speeds(tmp_path):
    model = tiny_model().eval()
    model.save_pretrained(tmp_path)
    schedule = curriculum_schedule(model.config, 0.5)
    published = CroprViTForImageClassification.from_pretrained(tmp_path, pruning_schedule=schedule)
    model.set_pruning(schedule)
    pixels = torch.randn(2, 3, 64, 64)
    assert published.config.kept_patches() == schedule
    assert_close_relative(published(pixels).logits, model(pixels).logits)


def point(accuracy: float, speedup: float, **metrics: float) -> dict:
    return {
        "metrics": {"accuracy": accuracy, **metrics},
        "speedup": speedup,
        "spread": 0.1,
        "images_per_second": 100 * speedup,
    }


class TestPlotTradeoff:
    curves = {"any speed": [point(0.7, 2.0), point(0.9, 1.0), point(0.8, 1.5)], "fixed": [point(0.75, 2.0)]}

    @pytest.mark.parametrize(("speed", "factor"), [("speedup", 1), ("images_per_second", 100)])
    def test_points_are_drawn_from_slow_to_fast(self, speed, factor, tmp_path):
        figure = plot_tradeoff(self.curves, speed=speed)
        (axis,) = figure.axes
        containers = axis.containers
        drawn = {container.get_label(): container.lines[0].get_xydata().tolist() for container in containers}
        expected = {"any speed": [(1.0, 0.9), (1.5, 0.8), (2.0, 0.7)], "fixed": [(2.0, 0.75)]}
        assert drawn == {name: [[factor * x, y] for x, y in points] for name, points in expected.items()}
        assert [container.has_xerr for container in containers] == [speed == "speedup"] * 2
        assert [text.get_text() for text in axis.get_legend().get_texts()] == list(self.curves)
        assert axis.get_ylabel() == "accuracy"
        figure.savefig(tmp_path / "tradeoff.png")
        assert (tmp_path / "tradeoff.png").stat().st_size > 5000

    def test_a_metric_is_chosen_among_several(self):
        figure = plot_tradeoff({"model": [point(0.9, 1.0, loss=0.3)]}, metric="loss")
        assert figure.axes[0].containers[0].lines[0].get_ydata().tolist() == [0.3]

    def test_wrong_curves_are_errors(self):
        for curves in ({}, {"empty": []}):
            with pytest.raises(ValueError, match="at least one point"):
                plot_tradeoff(curves)
        with pytest.raises(ValueError, match="`metric` is 'recall'"):
            plot_tradeoff(self.curves, metric="recall")
        with pytest.raises(ValueError, match="accuracy, loss"):
            plot_tradeoff({"model": [point(0.9, 1.0, loss=0.3)]})
        with pytest.raises(ValueError, match="`speed` is 'fast'"):
            plot_tradeoff(self.curves, speed="fast")

    def test_without_matplotlib_it_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ImportError, match=r"cropr_hf\[viz\]"):
            plot_tradeoff(self.curves)
