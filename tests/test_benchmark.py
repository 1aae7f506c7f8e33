"""The benchmark's counting and statistics; nothing here asserts how long something takes."""

import itertools
import json
import time

import pytest

from cropr_hf import CroprViTConfig, CroprViTForSemanticSegmentation
from cropr_hf.benchmark import (
    BenchmarkArguments,
    compare,
    format_table,
    multiply_adds,
    pruning_candidates,
    run,
    transformers_twin,
)


class TestMultiplyAdds:
    def test_hand_count_of_one_block(self):
        config = CroprViTConfig(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            image_size=8,
            patch_size=4,
            token_reducer=None,
        )
        tokens, size = 1 + 4, 8
        linear = tokens * (4 * size * size + 2 * size * 24)
        attention = 2 * tokens * tokens * size
        assert multiply_adds(config) == 4 * (3 * 4 * 4) * size + linear + attention
        gated = CroprViTConfig(**{**config.to_dict(), "use_gated_mlp": True})
        assert multiply_adds(gated) - multiply_adds(config) == tokens * size * 24

    @pytest.mark.parametrize(
        ("fields", "bound"),
        [
            ({"pruning_rate": 8}, 1.78),
            ({"pruning_rate": 8, "last_layer_fusion": False}, 1.91),
            ({"pruning_rate": 40, "image_size": 512, "use_gated_mlp": True, "intermediate_size": 2730}, 1.77),
        ],
    )
    def test_bounds_of_the_paper_settings(self, fields, bound):
        pruned = CroprViTConfig.from_size("large", **fields)
        fields = {name: value for name, value in fields.items() if name != "pruning_rate"}
        unpruned = CroprViTConfig.from_size("large", token_reducer=None, **fields)
        assert multiply_adds(unpruned) / multiply_adds(pruned) == pytest.approx(bound, abs=0.005)


class TestCompare:
    @pytest.fixture
    def clock(self, monkeypatch):
        """A clock that only the candidates move."""
        now = [0.0]
        monkeypatch.setattr(time, "perf_counter", lambda: now[0])

        def candidate(*seconds: float):
            durations = itertools.cycle(seconds)

            def call():
                now[0] += next(durations)

            return call

        return candidate

    def test_ratios_are_taken_within_a_round(self, clock):
        # The machine slows down threefold every other round; the ratio stays 2. (The first call is the warm-up.)
        timings = compare({"slow": clock(2.0, 6.0), "fast": clock(1.0, 3.0)}, "slow", min_rounds=5, max_rounds=9)
        assert timings["fast"].speedup == pytest.approx(2.0)
        assert timings["fast"].spread == pytest.approx(0.0)
        assert len(timings["fast"].seconds) == 5

    def test_it_goes_on_while_the_ratio_is_unsettled(self, clock):
        timings = compare({"a": clock(1.0), "b": clock(1.0, 2.0, 4.0)}, "a", min_rounds=3, max_rounds=12)
        assert len(timings["b"].seconds) == 12
        assert timings["b"].spread > 0.1

    def test_wrong_arguments_are_errors(self, clock):
        with pytest.raises(ValueError, match="'c'"):
            compare({"a": clock(1.0)}, "c")
        with pytest.raises(ValueError, match="2"):
            compare({"a": clock(1.0)}, "a", min_rounds=2)


def test_candidates_share_schedule_and_shape():
    config = CroprViTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
        pruning_rate=3,
        use_auxiliary_heads=True,
    )
    models = pruning_candidates(config)
    kept = {name: model.config.kept_patches() for name, model in models.items()}
    assert kept == {"unpruned": [16] * 4, "cropr": [12, 9, 9, 9], "random": [12, 9, 9, 9]}
    assert not any(model.config.use_auxiliary_heads for model in models.values())
    extra = sum(p.numel() for p in models["cropr"].parameters()) - sum(
        p.numel() for p in models["unpruned"].parameters()
    )
    assert extra == 2 * 32  # one vector per module
    # Transformers' ViT has a position for the CLS token beside the token itself.
    twin = transformers_twin(models["unpruned"].config)
    assert twin.num_parameters() - models["unpruned"].num_parameters() == 32


TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "patch_size": 8,
}


def arguments(**fields):
    defaults = {"size": "tiny", "pruning_rate": 3, "image_size": 32, "config": json.dumps(TINY), "batch_size": 2}
    return BenchmarkArguments(**{**defaults, "min_rounds": 3, "max_rounds": 3, **fields})


def test_run_records_what_it_measured():
    record = run(arguments())
    assert set(record["results"]) == {"unpruned", "cropr", "random", "transformers ViT"}
    assert record["patches_kept"] == [12, 9, 9, 9]
    assert record["rounds"] == 3
    assert record["results"]["unpruned"]["speedup"] == 1.0
    table = format_table(json.loads(json.dumps(record)))
    assert "| cropr |" in table and "multiply-add bound" in table


def test_run_of_semantic_segmentation():
    record = run(arguments(task="semantic_segmentation", size="eva02_tiny"))
    assert set(record["results"]) == {"unpruned", "cropr", "random"}
    assert record["patches_kept"] == [12, 9, 9, 9]
    parameters = {name: row["parameters"] for name, row in record["results"].items()}
    assert parameters["random"] == parameters["unpruned"] == parameters["cropr"] - 2 * 32  # one vector per module


def test_run_of_training_steps_of_semantic_segmentation():
    record = run(arguments(task="semantic_segmentation", training=True))
    rows = record["results"]
    # 16 queries, an MLP of 4 D with a norm before it, a norm and a classifier of 150 classes
    module = 16 * 32 + (2 * 32 + 2 * 4 * 32**2 + 5 * 32) + (2 * 32 + 33 * 150)
    assert rows["cropr"]["parameters"] - rows["unpruned"]["parameters"] == 2 * module
    saved = {name: row["saved_activations"] for name, row in rows.items()}
    assert 0 < saved["random"] < min(saved["cropr"], saved["unpruned"])
    less = run(arguments(task="semantic_segmentation", training=True, gradient_checkpointing=True))["results"]
    assert all(less[name]["saved_activations"] < saved[name] for name in saved)
    table = format_table(json.loads(json.dumps(record))).splitlines()
    assert len({line.count("|") for line in table[:5]}) == 1  # as many columns in every row


def test_a_checkpoint_says_its_task(tmp_path):
    config = CroprViTConfig(**TINY, image_size=32, pruning_rate=3, num_labels=3, num_queries=None)
    CroprViTForSemanticSegmentation(config).save_pretrained(tmp_path)
    args = arguments(model_name_or_path=str(tmp_path), config="{}", pruning_rate=None, image_size=None)
    assert set(run(args)["results"]) == {"unpruned", "cropr", "random"}


def test_an_unknown_task_is_an_error():
    with pytest.raises(ValueError, match="'depth'; choose one of image_classification, semantic_segmentation"):
        run(arguments(task="depth"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"task": "segmentation"}, "choose one of image_classification, semantic_segmentation"),
        ({"dtype": "float23"}, "'float23'; give a type of torch"),
        ({"dtype": "nn"}, "'nn'; give a type of torch"),
        ({"gradient_checkpointing": True}, "pass `training` as well"),
    ],
)
def test_wrong_arguments_say_what_to_do(wrong, message):
    with pytest.raises(ValueError, match=message):
        run(BenchmarkArguments(**wrong))
