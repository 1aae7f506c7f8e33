"""The benchmark's counting and statistics; nothing here asserts how long something takes."""

import itertools
import json
import time
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from cropr_hf import (
    CroprViTBackbone,
    CroprViTConfig,
    CroprViTForImageClassification,
    CroprViTForSemanticSegmentation,
    CroprViTModel,
)
from cropr_hf.speed import alternatives as alternatives_module
from cropr_hf.speed.alternatives import ALTERNATIVES, smaller_image, smaller_model
from cropr_hf.speed.benchmark import (
    BenchmarkArguments,
    library_references,
    pruning_candidates,
    run,
    sweep,
    transformers_reference,
)
from cropr_hf.speed.cost import head_multiply_adds, multiply_adds
from cropr_hf.speed.instruments import operation_times, peak_memory
from cropr_hf.speed.plots import plot_benchmark, plot_cost
from cropr_hf.speed.tables import format_sweep, format_table
from cropr_hf.speed.timing import Timing, compare, time_call
from tests.common import full


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
            *full(({"pruning_rate": 8, "last_layer_fusion": False}, 1.91)),
            ({"pruning_rate": 40, "image_size": 512, "use_gated_mlp": True, "intermediate_size": 2730}, 1.77),
        ],
    )
    def test_bounds_of_the_paper_settings(self, fields, bound):
        pruned = CroprViTConfig.from_size("large", **fields)
        fields = {name: value for name, value in fields.items() if name != "pruning_rate"}
        unpruned = CroprViTConfig.from_size("large", token_reducer=None, **fields)
        assert multiply_adds(unpruned) / multiply_adds(pruned) == pytest.approx(bound, abs=0.005)

    @pytest.mark.parametrize(("attention", "before", "after"), [(False, 2789.9, 1273.0), (True, 4258.8, 1789.6)])
    def test_the_detector_of_the_paper(self, attention, before, after):
        """The published figures, 2790 and 1273 G, leave attention products out."""
        pruned = CroprViTConfig.from_size("eva02_large_detection")
        unpruned = CroprViTConfig.from_size("eva02_large_detection", token_reducer=None)
        for config, expected in ((unpruned, before), (pruned, after)):
            assert multiply_adds(config, attention=attention) / 1e9 == pytest.approx(expected, abs=0.05)

    @pytest.mark.parametrize("window_size", [1, 2, 3])
    @pytest.mark.parametrize("prefix", [0, 3])
    def test_windows_of_a_grid_with_padding(self, prefix, window_size):
        fields = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
        fields |= {"image_size": [20, 16], "patch_size": 4, "use_cls_token": False, "pooling": "patch_mean"}
        fields |= {"num_register_tokens": prefix, "window_size": window_size, "window_block_indices": [0]}
        config = CroprViTConfig(**fields, token_reducer=None, num_channels=1)
        side = window_size
        padded = -(-5 // side) * -(-4 // side) * side**2
        tokens = prefix + 20
        projections = 3 * (prefix + padded) * 8**2 + tokens * 8**2  # the output is projected without padding
        attention = 2 * padded * (prefix + side**2) * 8 + 2 * prefix * tokens * 8
        assert multiply_adds(config) == 20 * 16 * 8 + projections + tokens * 2 * 8 * 24 + attention

    def test_heads_are_counted_as_they_run(self):
        config = CroprViTConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48)
        pixels = torch.randn(2, 3, 224, 224)
        segmenter = CroprViTForSemanticSegmentation(config).eval()
        assert head_multiply_adds(segmenter, {"pixel_values": pixels}) == 2 * 196 * 32 * config.num_labels
        assert head_multiply_adds(CroprViTModel(config).eval(), {"pixel_values": pixels}) == 0


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


def test_percentiles_need_enough_calls():
    timing = Timing([float(second) for second in range(1, 101)])
    assert timing.percentile(99) == pytest.approx(99.01)
    assert timing.percentile(50) == pytest.approx(50.5) == timing.median
    assert Timing([1.0] * 99).percentile(99) is None
    assert Timing([1.0, 2.0]).percentile(50) == pytest.approx(1.5)


def test_peak_memory_is_what_is_allocated_at_once():
    def call():
        first = torch.ones(1000, 1000)  # 4 MB
        second = first + 1
        del first
        return second * 2

    assert peak_memory(call) == pytest.approx(8e6, rel=0.01)
    assert peak_memory(lambda: None) == 0


def test_operations_of_a_call():
    weight = torch.randn(200, 200)
    times = operation_times(lambda: (weight @ weight).sort())
    assert times["mm"]["calls"] == times["sort"]["calls"] == 1
    spent = [row["ms"] for row in times.values()]
    assert spent == sorted(spent, reverse=True) and spent[-1] > 0


def test_references_are_the_same_model():
    config = CroprViTConfig.from_size("tiny", token_reducer=None, num_labels=10)
    references = library_references(config, "tiny")
    assert set(references) == {"transformers ViT", "timm"}
    ours = CroprViTForImageClassification(config).num_parameters()
    for reference in references.values():
        parameters = sum(parameter.numel() for parameter in reference.parameters())
        assert parameters - ours == config.hidden_size  # a position for the CLS token
    rotary = CroprViTConfig.from_size("eva02_tiny", token_reducer=None, num_labels=10)
    assert set(library_references(rotary, "eva02_tiny")) == {"timm"}
    for field in ({"hidden_size": 96}, {"intermediate_size": 100}):
        other = CroprViTConfig.from_size("tiny", token_reducer=None, **field)
        assert set(library_references(other, "tiny")) == {"transformers ViT"}


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
    twin = transformers_reference(models["unpruned"].config)
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
    if "model_name_or_path" in fields:
        del defaults["size"]
    return BenchmarkArguments(**{**defaults, "min_rounds": 3, "max_rounds": 3, **fields})


def test_run_records_what_it_measured():
    record = run(arguments(references=True, profile=True))
    assert set(record["results"]) == {"unpruned", "cropr", "random", "transformers ViT"}  # timm has no such size
    assert record["patches_kept"] == [12, 9, 9, 9]
    assert record["rounds"] == 3
    assert record["results"]["unpruned"]["speedup"] == 1.0
    table = format_table(json.loads(json.dumps(record)))
    assert "| cropr |" in table and "multiply-add bound" in table


@pytest.mark.full
@pytest.mark.parametrize("image_size", [224, [160, 320]])
def test_the_smaller_image_costs_nearly_as_much_as_the_pruned_model(image_size):
    fields = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}
    config = CroprViTConfig(**fields, image_size=image_size, patch_size=32, pruning_rate=20)
    found, target = smaller_image(config), multiply_adds(config)
    rows, columns = config.grid_size
    grids = [(count, round(count * columns / rows)) for count in range(1, rows)]
    distances = {grid: abs(multiply_adds(found, grid) - target) for grid in grids}
    assert found.token_reducer is None and found.grid_size == min(distances, key=distances.get)


def test_the_smaller_model_is_the_next_of_its_family():
    fields = {"image_size": 64, "patch_size": 8, "num_labels": 3, "pruning_rate": 1}
    for size, smaller in (("huge", "large"), ("large", "base"), ("small", "tiny"), ("eva02_large", "eva02_base")):
        name, config = smaller_model(CroprViTConfig.from_size(size, **fields))
        assert name == smaller
        fields_of_it = {name: value for name, value in fields.items() if name != "pruning_rate"}
        expected = CroprViTConfig.from_size(smaller, token_reducer=None, **fields_of_it)
        assert config.to_dict() == expected.to_dict()
    for size, own in (("tiny", {}), ("eva02_tiny", {}), ("small", {"hidden_size": 192})):
        assert smaller_model(CroprViTConfig.from_size(size, **{**fields, **own})) is None
    assert smaller_model(CroprViTConfig.from_size("eva02_large_detection")) is None


def test_run_of_alternatives(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: compiled.append(model) or model)
    monkeypatch.setattr(alternatives_module, "FAMILIES", (("milli", "centi"),))
    monkeypatch.setattr(alternatives_module, "SIZES", {"centi": TINY, "milli": {**TINY, "hidden_size": 16}})
    record = run(arguments(alternatives=True))
    alternatives = [name for name in ALTERNATIVES if name != "int8" or find_spec("torchao")]
    assert list(record["results"]) == ["unpruned", "cropr", "random", *alternatives]
    assert len(compiled) == 1 and not compiled[0].config.token_reducer
    costs = {name: sum(counts.values()) for name, counts in record["multiply_adds"].items()}
    assert costs["compiled"] == costs["unpruned"] > costs["cropr"] > costs["smaller model"]
    assert record["alternatives"]["smaller image"] == "24 × 24 pixels"
    assert record["alternatives"]["smaller model"] == "milli"
    parameters = {name: row["parameters"] for name, row in record["results"].items()}
    assert parameters["smaller model"] < parameters["unpruned"] == parameters["compiled"]
    table = format_table(json.loads(json.dumps(record)))
    assert "| smaller image (24 × 24 pixels) | " in table and "| smaller model (milli) | " in table
    lines = format_sweep([record], ["batch_size"]).splitlines()
    assert " | smaller model |" in lines[0] and len({line.count("|") for line in lines}) == 1
    (axis,) = plot_benchmark([record]).axes
    heights = [bar.get_height() for bar in axis.patches]
    assert heights == [record["results"][name]["speedup"] for name in ("cropr", "random", *alternatives)]


def test_run_of_semantic_segmentation():
    record = run(arguments(task="semantic_segmentation", size="eva02_tiny"))
    assert set(record["results"]) == {"unpruned", "cropr", "random"}
    assert record["patches_kept"] == [12, 9, 9, 9]
    parameters = {name: row["parameters"] for name, row in record["results"].items()}
    assert parameters["random"] == parameters["unpruned"] == parameters["cropr"] - 2 * 32  # one vector per module


@pytest.mark.full
def test_run_of_training_steps_of_semantic_segmentation():
    record = run(arguments(task="semantic_segmentation", training=True))
    rows = record["results"]
    # A query, an MLP of 4 D with a norm before it, a norm and a classifier of 150 classes
    module = 32 + (2 * 32 + 2 * 4 * 32**2 + 5 * 32) + (2 * 32 + 33 * 150)
    assert rows["cropr"]["parameters"] - rows["unpruned"]["parameters"] == 2 * module
    saved = {name: row["saved_activations"] for name, row in rows.items()}
    assert 0 < saved["random"] < min(saved["cropr"], saved["unpruned"])
    less = run(arguments(task="semantic_segmentation", training=True, activation_checkpointing=True))["results"]
    assert all(less[name]["saved_activations"] < saved[name] for name in saved)
    table = format_table(json.loads(json.dumps(record))).splitlines()
    assert len({line.count("|") for line in table[:5]}) == 1  # as many columns in every row


@pytest.mark.parametrize("training", [False, *full(True)])
def test_run_of_instance_segmentation(training):
    heads = {"pyramid_channels": 8, "anchor_sizes": [4, 8, 12, 16, 24], "box_head_size": 16, "num_proposals": 20}
    config = json.dumps({**TINY, **heads, "rois_per_image": 8, "detections_per_image": 5, "num_labels": 3})
    record = run(arguments(task="instance_segmentation", training=training, config=config))
    costs = record["multiply_adds"]
    assert costs["unpruned"]["linear"] > costs["cropr"]["linear"] == costs["random"]["linear"]
    # Models that find nothing would spare the mask head: 5 detections of 4 convolutions on 14 x 14 cells.
    assert costs["cropr"]["head"] > (1 if training else 5 * 4 * 14 * 14 * 9 * 8 * 8)
    bound = sum(costs["unpruned"].values()) / sum(costs["cropr"].values())
    assert record["multiply_add_bound"] == pytest.approx(bound)


@pytest.fixture(scope="module")
def swept():
    seen = []
    settings = {"batch_size": [1, 2], "dtype": ["float32", "bfloat16"], "attn_implementation": ["eager"]}
    records = sweep(arguments(profile=True), settings, lambda records: seen.append(len(records)))
    assert seen == [1, 2, 3, 4]
    return records


@pytest.mark.full
def test_a_sweep_runs_every_combination(swept):
    found = [tuple(record["arguments"][name] for name in ("batch_size", "dtype")) for record in swept]
    assert found == [(1, "float32"), (1, "bfloat16"), (2, "float32"), (2, "bfloat16")]
    lines = format_sweep(json.loads(json.dumps(swept)), ["batch_size", "dtype"]).splitlines()
    assert len(lines) == 6 and len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| 1 | float32 | ")
    table = format_table(swept[0])
    assert "| operation | unpruned ms | calls | Cropr ms | calls |" in table
    for record in swept:
        assert all(row["peak_memory"] > 0 and row["p99_ms"] is None for row in record["results"].values())


def test_attention_kernels_are_chosen(swept):
    assert "_softmax" in swept[0]["operations"]["cropr"]
    fused = run(arguments(profile=True))["operations"]["cropr"]
    assert "_softmax" not in fused and any("attention" in name for name in fused)


def test_pictures_of_records(swept, tmp_path):
    figure = plot_benchmark(swept, ["batch_size", "dtype"])
    (axis,) = figure.axes
    heights = [bar.get_height() for bar in axis.patches]
    assert heights[: len(swept)] == [record["results"]["cropr"]["speedup"] for record in swept]
    assert next(label.get_text() for label in axis.get_xticklabels()) == "1\nfloat32"
    figure.savefig(tmp_path / "bars.png")
    records = sweep(arguments(), {"image_size": [48, 32]})
    figure = plot_cost(records)
    (axis,) = figure.axes
    assert axis.lines[0].get_xdata().tolist() == [16, 36]
    measured = [1 / record["results"]["unpruned"]["images_per_second"] for record in reversed(records)]
    assert axis.lines[0].get_ydata().tolist() == measured
    predicted = axis.lines[1].get_ydata()
    costs = [sum(record["multiply_adds"]["unpruned"].values()) for record in reversed(records)]
    assert predicted[1] / predicted[0] == pytest.approx(costs[1] / costs[0])
    figure.savefig(tmp_path / "curve.png")


def test_pictures_of_nothing_are_errors(swept):
    with pytest.raises(ValueError, match="no records"):
        plot_benchmark([])
    with pytest.raises(ValueError, match="1 records; a curve needs two"):
        plot_cost(swept[:1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"speed": [1]},
            "'speed' is not an argument of the benchmark; choose among activation_checkpointing, alternatives",
        ),
        ({"batch_size": []}, "'batch_size' has no values"),
        ({"batch_size": [1, 0]}, "`batch_size` is 0"),
        ({"min_rounds": [3, 2]}, "`min_rounds` 2 and `max_rounds` 3 must be 3 or more"),
        ({"pruning_rate": [3, 1000]}, "1000"),
        ({"cuda_graph": [True]}, "`cuda_graph` is for inference on a CUDA device, not for 'cpu'"),
        ({"references": [True], "training": [True]}, "leave out `references` or `training`"),
        ({"alternatives": [True], "training": [True]}, "leave out `alternatives` or `training`"),
    ],
)
def test_wrong_sweeps_are_errors_before_anything_is_measured(settings, message):
    with pytest.raises(ValueError, match=message):
        sweep(arguments(), settings, lambda records: pytest.fail("measured"))


@pytest.mark.gpu
@pytest.mark.parametrize("fields", [{}, {"cuda_graph": True}, {"compile": True}, {"dtype": "bfloat16"}])
def test_run_on_a_gpu(fields):
    record = run(arguments(device="cuda", profile=True, **fields))
    assert record["results"]["cropr"]["peak_memory"] > 0
    assert record["operations"]["cropr"]


@pytest.mark.gpu
def test_cuda_events_time_what_the_device_does():
    weight = torch.randn(4096, 4096, device="cuda")
    one = time_call(lambda: weight @ weight, "cuda")
    assert time_call(lambda: [weight @ weight for _ in range(10)], "cuda") > 3 * one


def save_segmenter(folder):
    config = CroprViTConfig(**TINY, image_size=32, pruning_rate=3, num_labels=3, num_queries=None)
    CroprViTForSemanticSegmentation(config).save_pretrained(folder)


def test_the_encoder_of_a_checkpoint(tmp_path):
    save_segmenter(tmp_path)
    args = arguments(model_name_or_path=str(tmp_path), task="encoder", config="{}")
    assert run(args)["multiply_adds"]["cropr"]["head"] == 0


def test_a_checkpoint_says_its_task(tmp_path):
    save_segmenter(tmp_path)
    args = arguments(model_name_or_path=str(tmp_path), config="{}", pruning_rate=None, image_size=None)
    record = run(args)
    assert set(record["results"]) == {"unpruned", "cropr", "random"}
    assert record["multiply_adds"]["cropr"]["head"] == 16 * 32 * 3 and record["arguments"]["size"] is None


def test_a_backbone_is_an_encoder_and_another_class_needs_a_task(tmp_path):
    config = CroprViTConfig(**TINY, image_size=32, pruning_rate=3)
    args = arguments(model_name_or_path=str(tmp_path), config="{}", pruning_rate=None, image_size=None)
    CroprViTBackbone(config).save_pretrained(tmp_path)
    assert run(args)["multiply_adds"]["cropr"]["head"] == 0
    config.save_pretrained(tmp_path)
    config.architectures = ["CroprViTForDepth"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="CroprViTForDepth, which is none of the tasks; say by --task"):
        run(args)


def test_what_a_checkpoint_cannot_take_is_an_error(tmp_path):
    CroprViTForImageClassification(CroprViTConfig(**TINY, image_size=32, token_reducer=None)).save_pretrained(tmp_path)
    args = arguments(model_name_or_path=str(tmp_path), config="{}", pruning_rate=None, image_size=None)
    with pytest.raises(ValueError, match="does not prune; time one that does"):
        run(args)
    with pytest.raises(ValueError, match="`size` is 'base', but a checkpoint has a size"):
        run(replace(args, size="base"))
    with pytest.raises(ValueError, match="--config has prunning_rate"):
        run(replace(args, config='{"prunning_rate": 3}'))
    reducer = '{"token_reducer": "cropr", "pruning_rate": 3}'
    assert run(replace(args, config=reducer))["patches_kept"] == [12, 9, 9, 9]


def test_an_unknown_task_is_an_error():
    with pytest.raises(ValueError, match="'depth'; choose one of encoder, backbone, image_classification, semantic"):
        run(arguments(task="depth"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"task": "segmentation"}, "choose one of encoder, backbone, image_classification, semantic_segmentation"),
        ({"task": "encoder", "size": "tiny", "training": True}, "'encoder' has no loss; choose another task"),
        ({"dtype": "float8_e4m3fn"}, "'float8_e4m3fn'; choose one of float32, bfloat16, float16"),
        ({"tolerance": float("nan")}, "`tolerance` is nan; it must be 0 or more"),
        ({"tolerance": float("inf")}, "`tolerance` is inf; it must be 0 or more"),
        ({"activation_checkpointing": True}, "pass `training` as well"),
        ({"device": "gpu"}, "`device` is 'gpu', which torch cannot use here"),
        ({"device": "cuda:99"}, "`device` is 'cuda:99', which torch cannot use here"),
        (
            {"task": "semantic_segmentation", "size": "tiny", "references": True},
            "`references` are classifiers, the task is",
        ),
    ],
)
def test_wrong_arguments_say_what_to_do(wrong, message):
    with pytest.raises(ValueError, match=message):
        run(BenchmarkArguments(**wrong))
