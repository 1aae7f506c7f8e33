import inspect
import json
import math
import re
from dataclasses import dataclass

import pytest
import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, RfDetrConfig, ViTConfig

from cropr_hf import (
    CroprRfDetrConfig,
    CroprViTConfig,
    CroprViTForImageClassification,
    CroprViTModel,
    ReducerConfig,
    TokenReducer,
)
from tests.common import CONFIGS, make_images, make_model, tiny_config


def sequence_lengths(config):
    return [config.num_prefix_tokens + kept for kept in config.kept_patches()]


# Token counts


def test_large_model_with_fusion_prunes_as_published():
    config = CroprViTConfig.from_size("large", pruning_rate=8)
    expected = [188 - 8 * module for module in range(22)]
    assert expected[-1] == 20
    assert config.num_patches + config.num_prefix_tokens == 197
    assert config.pruning_blocks == list(range(1, 23))
    assert sequence_lengths(config) == [*expected, 20, 20]


def test_large_model_without_fusion_has_one_module_more():
    config = CroprViTConfig.from_size("large", pruning_rate=8, last_layer_fusion=False)
    assert config.pruning_blocks == list(range(1, 24))
    assert sequence_lengths(config) == [*(188 - 8 * module for module in range(23)), 12]


def test_1024_patches_at_rate_40_as_published():
    config = CroprViTConfig.from_size("large", image_size=512, pruning_rate=40)
    assert config.num_patches + config.num_prefix_tokens == 1025
    assert sequence_lengths(config) == [*(984 - 40 * module for module in range(22)), 144, 144]


def test_pruning_80_percent_after_block_3():
    schedule = [1024] * 2 + [205] * 22
    config = CroprViTConfig.from_size(
        "large", image_size=512, pruning_rate=None, pruning_schedule=schedule, last_layer_fusion=False
    )
    assert config.pruning_blocks == [3]
    assert config.kept_patches() == schedule


@pytest.mark.parametrize(
    ("overrides", "first_kept"),
    [({}, 13), ({"use_cls_token": False}, 14), ({"align_first_module": False}, 14), ({"num_register_tokens": 3}, 13)],
)
def test_the_first_module_prunes_one_more_only_with_a_cls_token(overrides, first_kept):
    assert tiny_config(**overrides).kept_patches()[:2] == [first_kept, first_kept - 2]


@pytest.mark.parametrize("multiple", [1, 3, 8, 16, 50])
def test_sequence_lengths_are_rounded_up_to_multiples(multiple):
    fields = {"image_size": 224, "pruning_rate": 8, "num_register_tokens": 2}
    exact = CroprViTConfig.from_size("large", **fields).kept_patches()
    config = CroprViTConfig.from_size("large", **fields, token_multiple=multiple)
    for plain, rounded in zip(exact, config.kept_patches()):
        assert plain <= rounded < plain + multiple
        assert rounded == 196 or (rounded + 3) % multiple == 0
    assert config.kept_patches(pruning=exact) == exact  # a schedule says what it wants
    assert config.kept_patches(pruning=0) == [196] * 24


def test_a_model_of_rounded_lengths_prunes_as_configured(tmp_path):
    model = make_model(CroprViTForImageClassification, tiny_config(token_multiple=4)).eval()
    outputs = model(make_images(), output_pruning=True)
    # 13, 11, 9 patches would stay, with CLS 14, 12, 10; so after block 1 it is all but one.
    assert model.config.kept_patches() == [15, 11, 11, 11, 11]
    assert (outputs.pruned_after_block == 1).sum(dim=1).tolist() == [1, 1]
    assert (outputs.pruned_after_block == 2).sum(dim=1).tolist() == [4, 4]
    model.save_pretrained(tmp_path)
    assert CroprViTConfig.from_pretrained(tmp_path).token_multiple == 4


def test_a_multiple_below_one_is_an_error():
    with pytest.raises(ValueError, match="`token_multiple` is 0; it must be 1"):
        tiny_config(token_multiple=0)
    with pytest.raises(ValueError, match="`token_multiple` is -1; it must be 1"):
        CroprViTConfig(token_reducer=None, token_multiple=-1)


def test_a_multiple_that_would_keep_every_token_is_an_error():
    with pytest.raises(ValueError, match="`token_multiple` 500 rounds what a pruning rate of 16 leaves up to all 196"):
        CroprViTConfig.from_size("base", pruning_rate=16, align_first_module=False, token_multiple=500)


def test_rate_zero_prunes_nothing():
    assert tiny_config(pruning_rate=0).kept_patches() == [16] * 5


def test_unpruned_model_keeps_all_patches():
    config = tiny_config("unpruned")
    assert config.pruning_blocks == []
    assert config.kept_patches() == [16] * 5
    assert config.kept_patches(100) == [100] * 5


def test_default_rate_applies_without_a_schedule_only():
    assert CroprViTConfig(num_hidden_layers=12).pruning_rate == 8
    assert tiny_config("schedule").pruning_rate is None
    assert CroprViTConfig(token_reducer=None).pruning_rate is None


def test_kept_patches_for_other_input_sizes():
    assert tiny_config().kept_patches(64) == [61, 59, 57, 57, 57]
    schedule = tiny_config("schedule")
    # The first entry has no module after it, so all patches of a larger input pass there.
    assert schedule.kept_patches(64) == [64, 10, 7, 7, 7]
    assert schedule.kept_patches(12) == [12, 10, 7, 7, 7]


def test_kept_patches_with_other_pruning():
    config = tiny_config()
    assert config.kept_patches(pruning=1) == [14, 13, 12, 12, 12]
    assert config.kept_patches(pruning=[16, 8, 4, 4, 4]) == [16, 8, 4, 4, 4]
    assert config.kept_patches(64, pruning=(60, 60, 30, 30, 30)) == [60, 60, 30, 30, 30]
    schedule = tiny_config("schedule")
    assert schedule.kept_patches(pruning=3) == [16, 12, 9, 9, 9]
    assert schedule.kept_patches(pruning=[16, 3, 3, 3, 3]) == [16, 3, 3, 3, 3]


@pytest.mark.parametrize(
    ("name", "num_patches", "pruning", "message"),
    [
        ("plain", None, -1, r"-1.*0 or more"),
        ("plain", None, 5, r"5 at 3 modules leaves 0 of 16.*at most 4"),
        ("plain", 7, None, r"2 at 3 modules leaves 0 of 7"),
        ("no_cls", None, 6, r"6 at 3 modules leaves -2 of 16.*at most 5"),
        ("plain", None, [16, 8], r"2 entries.*one per block, 5"),
        ("plain", None, [8, 9, 8, 8, 8], r"\[8, 9, 8, 8, 8\] increases"),
        ("plain", None, [8, 4, 0, 0, 0], r"leaves no patch token"),
        ("plain", None, [17, 8, 8, 8, 8], r"keeps 17 patch tokens after block 1.*only 16"),
        ("plain", None, [16, 8, 8, 4, 4], r"falls after block 4.*\[1, 2, 3\]"),
        ("schedule", 9, None, r"keeps 10 patch tokens after block 2.*only 9"),
    ],
)
def test_impossible_pruning_is_refused_with_numbers(name, num_patches, pruning, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(name).kept_patches(num_patches, pruning)


def test_the_rate_that_an_error_suggests_works_and_the_next_does_not():
    for overrides in ({}, {"use_cls_token": False}, {"align_first_module": False}):
        config = tiny_config(**overrides)
        with pytest.raises(ValueError, match="use a rate of at most") as error:
            config.kept_patches(pruning=100)
        limit = int(str(error.value).split("at most ")[1].split()[0])
        assert config.kept_patches(pruning=limit)[-1] >= 1
        with pytest.raises(ValueError, match=f"A pruning rate of {limit + 1} "):
            config.kept_patches(pruning=limit + 1)
        assert "  " not in str(error.value)


# Validation


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        *(
            ({name: 0}, rf"`{name}` is 0; it must be at least 1")
            for name in (
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "intermediate_size",
                "patch_size",
                "num_channels",
                "num_queries",
                "patch_queries_per_step",
                "scorer_num_heads",
                "rope_reference_grid",
            )
        ),
        ({"num_register_tokens": -1}, r"`num_register_tokens` is -1"),
        ({"num_attention_heads": 3}, r"32 is not divisible by `num_attention_heads` 3"),
        ({"scorer_num_heads": 3}, r"32 is not divisible by `scorer_num_heads` 3"),
        ({"image_size": 30}, r"`image_size` 30 is not a multiple of `patch_size` 8"),
        ({"image_size": 0}, r"`image_size` 0 is not a multiple"),
        ({"image_size": [32, 20]}, r"\[32, 20\] is not a multiple"),
        ({"image_size": [32, 32, 32]}, r"`image_size` is \[32, 32, 32\]; give one number, or height and width"),
        ({"pooling": "max"}, r"`pooling` is 'max'; choose one of mean, patch_mean, cls"),
        ({"pooling": "cls", "use_cls_token": False}, r"'cls' needs `use_cls_token=True`"),
        ({"pooling": "cls_patch_mean"}, r"needs `norm_before_pooling=True`"),
        (
            {"pooling": "attention", "pooling_num_heads": 5},
            r"`hidden_size` \d+ is not divisible by `pooling_num_heads` 5",
        ),
        ({"pooling_intermediate_size": 0}, r"`pooling_intermediate_size` is 0; it must be at least 1"),
        ({"projection_dim": 0}, r"`projection_dim` is 0; it must be at least 1"),
        (
            {"rope_offset": 1, "rope_coordinates": "centered"},
            r"`rope_offset` is 1, which .*'centered' do not have; set",
        ),
        ({"rope_theta": 100.0, "num_attention_heads": 16}, r"head size divisible by 4, not 2"),
        ({"rope_theta": 0.0}, r"`rope_theta` is 0.0; it must be positive"),
        ({"rope_coordinates": "polar"}, r"`rope_coordinates` is 'polar'; choose 'index' or 'centered'"),
        ({"hidden_dropout_prob": -0.1}, r"`hidden_dropout_prob` is -0.1; it must be in \[0, 1\)"),
        ({"attention_probs_dropout_prob": 1.0}, r"`attention_probs_dropout_prob` is 1.0"),
        ({"drop_path_rate": 1}, r"`drop_path_rate` is 1;"),
        ({"label_smoothing": 1.5}, r"`label_smoothing` is 1.5"),
        ({"auxiliary_loss_weight": -1}, r"`auxiliary_loss_weight` is -1; it must be 0 or more"),
        (
            {"auxiliary_task": "objects"},
            r"`auxiliary_task` is 'objects'; choose 'presence', 'patches', 'both' or 'embedding'",
        ),
        (
            {"auxiliary_task": "patches", "num_queries": 2},
            r"`num_queries` is 2, but `auxiliary_task` is 'patches'; leave one of the two out",
        ),
        ({"auxiliary_task": "presence", "num_queries": None}, r"`num_queries` is None, but .* is 'presence'; leave"),
        ({"auxiliary_task": "both", "num_queries": None}, r"`num_queries` is None, but `auxiliary_task` is 'both'"),
        (
            {"patch_queries_per_step": 4},
            r"`patch_queries_per_step` is 4, but there is no query per patch; leave it out, or set `auxi",
        ),
        ({"token_reducer": None}, r"`pruning_rate` is 2 but `token_reducer` is None"),
        (
            {"token_reducer": None, "pruning_rate": None, "pruning_schedule": [16] * 5},
            r"`pruning_schedule` is \[16, 16, 16, 16, 16\] but",
        ),
        (
            {"token_reducer": None, "pruning_rate": None, "use_auxiliary_heads": True},
            r"`use_auxiliary_heads=True` needs a `token_reducer`",
        ),
        ({"pruning_schedule": [8] * 5}, r"`pruning_rate` or `pruning_schedule`, not both"),
        ({"num_hidden_layers": 2}, r"2 blocks leave no block to prune after with last layer fusion; use more"),
        ({"num_hidden_layers": 1, "last_layer_fusion": False}, r"1 blocks leave no block to prune after; use more"),
        ({"aggregator_mlp_ratio": 0.0}, r"`aggregator_mlp_ratio` is 0.0; it must give the MLP a channel or more"),
        ({"aggregator_mlp_ratio": 1e30}, r"`aggregator_mlp_ratio` is 1e\+30; .* at most 1000"),
        ({"pruning_rate": -2}, r"The pruning rate is -2"),
        ({"pruning_rate": 6}, r"leaves -3 of 16 patch tokens"),
    ],
)
def test_wrong_values_raise_value_error_with_value_and_remedy(overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**overrides)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("config_class", [CroprViTConfig, CroprRfDetrConfig])
def test_no_field_takes_what_is_not_a_finite_number(config_class, value, tmp_path):
    own = inspect.get_annotations(config_class) or inspect.get_annotations(RfDetrConfig)
    names = [name for name, kind in own.items() if "float" in str(kind)]
    assert len(names) >= 12 and "layer_norm_eps" in names
    for name in names:
        with pytest.raises(ValueError, match=rf"`{name}` is {value}; it must be a finite number"):
            config_class(**{name: value})
    config = config_class()
    config.layer_norm_eps = value
    with pytest.raises(StrictDataclassError, match=rf"`layer_norm_eps` is {value}"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("name", ["layer_norm_eps", "initializer_range"])
@pytest.mark.parametrize("value", [0.0, -1e-6])
def test_what_is_divided_by_is_positive(name, value):
    with pytest.raises(ValueError, match=rf"`{name}` is {value}; it must be positive, such as "):
        tiny_config(**{name: value})


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("evit", {"keep_rate": "a"}, "'evit': .*'keep_rate'.* expected float, got str"),
        ("itpn", {"blocks": 3}, "'itpn': .*'blocks'.* expected a list, got int"),
        ("tome", {"proportional_attention": 3}, "'tome': .*'proportional_attention' expected bool, got int"),
        ("cropr", {"keep_rate": 0.5}, "'keep_rate', which is not a field of the token reducer 'cropr'"),
    ],
)
def test_settings_of_methods_have_their_types(method, settings, message):
    with pytest.raises(ValueError, match=message):
        CroprViTConfig(token_reducer=method, reducer_config=settings)


def test_settings_of_methods_are_finite_numbers():
    @strict
    @dataclass
    class Settings(ReducerConfig):
        strength: float = 1.0

    class Method(TokenReducer):
        name, config_class = "some_method", Settings

    with pytest.raises(ValueError, match="`strength` is nan; it must be a finite number"):
        Method.settings(tiny_config(token_reducer="some_method", reducer_config={"strength": math.nan}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id2label": {0: "cat", 1: "dog"}, "num_labels": 5}, r"`num_labels` is 5, but there are names of 2 classes"),
        ({"id2label": {1: "cat", 2: "dog"}}, r"`id2label` is \{1: 'cat', .* it must name the classes 0 to C - 1"),
        ({"label2id": {"cat": 1, "dog": 2}}, r"`label2id` is .* it must name the classes 0 to C - 1"),
        (
            {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 1, "dog": 0}},
            r"`label2id` is \{'cat': 1, 'dog': 0\}, but `id2label` is \{0: 'cat', 1: 'dog'\}; give one of them",
        ),
        ({"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0}}, r"give one of them alone"),
        ({"num_labels": -3}, r"`num_labels` is -3; it must be a whole number, 0 or more"),
        ({"num_labels": "5"}, r"`num_labels` is '5'; it must be a whole number"),
    ],
)
@pytest.mark.parametrize("config_class", [CroprViTConfig, CroprRfDetrConfig])
def test_names_that_contradict_their_classes_raise_value_error(config_class, fields, message):
    with pytest.raises(ValueError, match=message):
        config_class(**fields)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id2label", ["cat", "dog"]),
        ("id2label", {"cat": 0, "dog": 1}),
        ("label2id", {0: "cat", 1: "dog"}),
        ("problem_type", "ranking"),
    ],
)
def test_values_of_another_kind_are_refused_by_name(field, value):
    """By Transformers itself in older releases, as values of the wrong type."""
    with pytest.raises((ValueError, StrictDataclassError), match=field):
        CroprViTConfig(**{field: value})


@pytest.mark.parametrize("config_class", [CroprViTConfig, CroprRfDetrConfig])
def test_names_of_classes_are_completed(config_class, tmp_path):
    names, numbers = {0: "cat", 1: "dog"}, {"cat": 0, "dog": 1}
    for fields in (
        {"id2label": names},
        {"label2id": numbers},
        {"id2label": {"1": "dog", "0": "cat"}, "label2id": {"dog": "1", "cat": "0"}, "num_labels": 2},
        {"id2label": names, "label2id": {"LABEL_0": 0, "LABEL_1": 1}},  # what a change of `id2label` leaves behind
    ):
        config = config_class(**fields)
        assert (config.id2label, config.label2id, config.num_labels) == (names, numbers, 2)
    assert config_class(id2label={0: "crane", 1: "crane"}).label2id == {"crane": 1}  # ImageNet has such classes
    config.save_pretrained(tmp_path)
    assert config_class.from_pretrained(tmp_path, num_labels=2).id2label == names
    assert config_class.from_pretrained(tmp_path, num_labels=3).id2label[2] == "LABEL_2"
    assert config_class.from_pretrained(tmp_path, id2label={0: "a"}).label2id == {"a": 0}
    with pytest.raises(ValueError, match="names of 1 classes"):
        config_class.from_pretrained(tmp_path, id2label={0: "a"}, num_labels=4)
    with pytest.raises(ValueError, match="it must name the classes"):
        CroprViTConfig.from_size("tiny", id2label={1: "a"})
    assert CroprViTConfig.from_size("eva02_large_detection", id2label=names).num_labels == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"window_size": -1}, r"`window_size` is -1; it must be 1 patch or more, or 0 for no windows"),
        ({"window_size": 0}, r"`window_size` is 0, and `window_block_indices` is \[0, 1, 3, 4\]; give both or none"),
        ({"window_block_indices": []}, r"`window_size` is 2, and `window_block_indices` is \[\]; give both or none"),
        ({"window_block_indices": [0, 5]}, r"is \[0, 5\]; it must hold different blocks from 0 to 4"),
        ({"window_block_indices": [-1, 0]}, r"is \[-1, 0\]; it must hold different blocks"),
        ({"window_block_indices": (1, 1)}, r"is \[1, 1\]; it must hold different blocks"),
        ({"window_rope_mode": "place"}, r"`window_rope_mode` is 'place'; choose one of origin, slot, global"),
    ],
)
def test_wrong_windows_raise_value_error(overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny_config("windows", **overrides)


def test_a_wrong_mode_of_windows_is_found_without_windows():
    with pytest.raises(ValueError, match="`window_rope_mode` is 'place'"):
        tiny_config("plain", window_rope_mode="place")


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        *(
            (name, (0, -3), r"it must be at least 1")
            for name in (
                "pyramid_channels",
                "box_head_size",
                "num_proposals",
                "detections_per_image",
                "mask_stride",
            )
        ),
        ("rois_per_image", (0, 3), r"it must be at least 4"),
        *(
            (name, (-0.1, 1.0, 1.5), r"it must be in \[0, 1\)")
            for name in ("score_threshold", "nms_threshold", "maskness_threshold")
        ),
        ("anchor_sizes", ([32] * 4, [], [32, 64, 128, 256, 0]), r"give 5 sides in pixels, one per level"),
        ("nms_method", ("soft", ""), r"choose one of hard, linear"),
    ],
)
def test_wrong_fields_of_detectors_raise_value_error(name, values, message):
    for value in values:
        with pytest.raises(ValueError, match=rf"`{name}` is {re.escape(repr(value))}; {message}"):
            tiny_config(**{name: value})


@pytest.mark.parametrize(
    ("schedule", "fusion", "message"),
    [
        ([8, 9, 8, 8, 8], True, r"increases; pruned tokens cannot come back"),
        ([16, 8, 8, 8], True, r"4 entries; it needs one per block, 5"),
        ([], True, r"0 entries"),
        ([8, 4, 0, 0, 0], True, r"leaves no patch token"),
        ([8, 4, 4, 2, 2], True, r"after the blocks \[1, 2, 4\].*last after block 3 of 5 \(last layer fusion"),
        ([8, 4, 4, 4, 2], False, r"after the blocks \[1, 2, 5\].*last after block 4 of 5\."),
        ([16, 16, 16, 16, 16], True, r"prune at least once"),
        ([20, 20, 8, 8, 8], True, r"keeps 20 patch tokens.*only 16"),
    ],
)
def test_impossible_schedules_raise_at_construction(schedule, fusion, message):
    with pytest.raises(ValueError, match=message):
        tiny_config("schedule", pruning_schedule=schedule, last_layer_fusion=fusion)


def test_a_schedule_may_fall_in_the_last_but_one_block_without_fusion():
    assert tiny_config("schedule", pruning_schedule=[8, 4, 4, 2, 2], last_layer_fusion=False).pruning_blocks == [
        1,
        2,
        4,
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pruning_rate", 2.5),
        ("hidden_size", "32"),
        ("use_cls_token", 1),
        ("num_queries", 2.5),
        ("semantic_loss_ignore_index", None),
    ],
)
def test_wrong_types_are_refused(name, value):
    with pytest.raises(StrictDataclassError, match=name):
        tiny_config(**{name: value})


def test_unknown_size_names_the_known_ones():
    with pytest.raises(
        ValueError, match=r"'giant'; choose one of tiny, small, .*, eva02_large, eva02_large_detection, or"
    ):
        CroprViTConfig.from_size("giant")


# Presets, names, round trips


@pytest.mark.parametrize(
    ("size", "millions"),
    [
        ("tiny", 5.5),
        ("small", 21.7),
        ("base", 85.8),
        ("large", 303.3),
        ("huge", 630.8),
        ("eva02_tiny", 5.5),
        ("eva02_small", 21.6),
        ("eva02_base", 85.8),
        ("eva02_large", 303.3),
    ],
)
def test_presets_have_the_published_number_of_parameters(size, millions):
    with torch.device("meta"):
        model = CroprViTModel(CroprViTConfig.from_size(size))
    count = sum(parameter.numel() for parameter in model.parameters())
    backbone = sum(p.numel() for name, p in model.named_parameters() if "token_reducers" not in name)
    assert backbone / 1e6 == pytest.approx(millions, rel=0.005)
    assert count - backbone == model.config.hidden_size * len(model.config.pruning_blocks)


def test_from_size_lets_fields_override():
    config = CroprViTConfig.from_size("huge", patch_size=16, pruning_rate=4, num_labels=3)
    assert (config.patch_size, config.num_labels, config.hidden_size) == (16, 3, 1280)


def test_the_segmentation_model_of_the_paper():
    config = CroprViTConfig.from_size("eva02_large", patch_size=16, image_size=512, pruning_rate=40, num_queries=None)
    assert config.num_patches == 1024 and config.rope_reference_grid == 16
    assert sequence_lengths(config) == [*(984 - 40 * module for module in range(22)), 144, 144]


def test_attribute_map_gives_the_other_usual_names():
    config = tiny_config(hidden_dropout=0.25)
    assert config.hidden_dropout_prob == 0.25
    config.attention_dropout = 0.125
    assert config.attention_probs_dropout_prob == 0.125
    assert "hidden_dropout" not in config.to_dict()


def stored_fields(config):
    return {**json.loads(config.to_json_string(use_diff=False)), "_name_or_path": None}


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"image_size": (32, 64), "out_features": ["stage2", "stage5"]},
        {"pruning_rate": None, "pruning_schedule": (16, 10, 7, 7, 7), "use_auxiliary_heads": True},
        {"token_reducer": None, "pruning_rate": None, "problem_type": "multi_label_classification"},
        {"scorer_num_heads": 2, "aggregator_mlp_ratio": None, "rope_theta": 100, "out_indices": [1, 3]},
        {"num_queries": None, "semantic_loss_ignore_index": -100},
        {"auxiliary_task": "patches", "patch_queries_per_step": 4},
        {"auxiliary_task": "both", "num_queries": 2},
        {**CONFIGS["windows"], "window_rope_mode": "slot"},
        {"anchor_sizes": (4, 8, 16, 32, 64), "nms_method": "linear", "score_threshold": 0, "maskness_threshold": 0.5},
    ],
)
def test_json_round_trip_changes_nothing(overrides, tmp_path):
    config = tiny_config(**overrides)
    config.save_pretrained(tmp_path)
    for loaded in (CroprViTConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is CroprViTConfig
        assert stored_fields(loaded) == stored_fields(config)
        assert loaded.kept_patches() == config.kept_patches()
        assert loaded.grid_size == config.grid_size
        assert loaded.out_features == config.out_features


def test_the_saved_file_holds_the_schedule_and_the_heads(tmp_path):
    tiny_config("schedule", use_auxiliary_heads=True).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["pruning_schedule"] == [16, 10, 7, 7, 7]
    assert stored["use_auxiliary_heads"] is True
    assert stored["model_type"] == "cropr_vit"


def test_from_pretrained_checks_overrides_with_the_stored_fields(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    config = CroprViTConfig.from_pretrained(tmp_path, pruning_rate=3, num_labels=7, num_hidden_layers=4)
    assert (config.pruning_rate, config.num_labels) == (3, 7)
    assert (config.stage_names[-1], config.out_features) == ("stage4", ["stage4"])
    with pytest.raises(ValueError, match="leaves -75 of 16"):
        CroprViTConfig.from_pretrained(tmp_path, pruning_rate=30)
    with pytest.raises((ValueError, StrictDataclassError), match="ranking"):
        CroprViTConfig.from_pretrained(tmp_path, problem_type="ranking")


def test_the_number_of_queries_can_be_overridden_by_none(tmp_path):
    tiny_config(num_queries=3).save_pretrained(tmp_path)
    assert CroprViTConfig.from_pretrained(tmp_path).num_queries == 3
    assert CroprViTConfig.from_pretrained(tmp_path, num_queries=None).num_queries is None
    assert AutoConfig.from_pretrained(tmp_path, num_queries=None).num_queries is None


@pytest.mark.parametrize(
    ("fields", "counts"),
    [
        ({}, (0, 1)),
        ({"num_queries": 3}, (0, 3)),
        ({"num_queries": None}, (16, 0)),
        ({"auxiliary_task": "presence"}, (0, 1)),
        ({"auxiliary_task": "patches"}, (16, 0)),
        ({"auxiliary_task": "patches", "num_queries": None}, (16, 0)),
        ({"auxiliary_task": "both"}, (16, 1)),
        ({"auxiliary_task": "both", "num_queries": 3}, (16, 3)),
        ({"auxiliary_task": "embedding", "num_queries": 2}, (0, 2)),
    ],
)
def test_queries_of_patches_and_of_the_image(fields, counts, tmp_path):
    config = tiny_config(**fields)
    assert config.query_counts == counts
    config.save_pretrained(tmp_path)
    assert CroprViTConfig.from_pretrained(tmp_path).query_counts == counts
    # An override replaces what contradicts it, and keeps the rest.
    for override, expected in {
        ("num_queries", None): (16, 0),
        ("num_queries", 2): (16 if fields.get("auxiliary_task") == "both" else 0, 2),
        ("auxiliary_task", "patches"): (16, 0),
        ("auxiliary_task", "presence"): (0, counts[1] or 1),
        ("auxiliary_task", "both"): (16, counts[1] or 1),
        ("auxiliary_task", "embedding"): (0, counts[1] or 1),
    }.items():
        assert CroprViTConfig.from_pretrained(tmp_path, **dict([override])).query_counts == expected


def test_queries_of_patches_are_known_to_earlier_releases_by_their_number(tmp_path):
    tiny_config(auxiliary_task="patches").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_queries"] is None


def test_from_pretrained_overrides_replace_the_stored_pruning(tmp_path):
    tiny_config().save_pretrained(tmp_path / "rate")
    tiny_config("schedule").save_pretrained(tmp_path / "schedule")
    schedule = [16, 8, 4, 4, 4]
    assert CroprViTConfig.from_pretrained(tmp_path / "rate", pruning_schedule=schedule).kept_patches() == schedule
    assert CroprViTConfig.from_pretrained(tmp_path / "schedule", pruning_rate=1).kept_patches()[0] == 14
    for folder in ("rate", "schedule"):
        unpruned = CroprViTConfig.from_pretrained(tmp_path / folder, token_reducer=None)
        assert (unpruned.pruning_rate, unpruned.pruning_schedule) == (None, None)
        assert CroprViTConfig.from_pretrained(tmp_path / folder, token_reducer="random").kept_patches()[-1] < 16


def test_unused_keywords_come_back(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    config, unused = CroprViTConfig.from_pretrained(
        tmp_path, pruning_rate=1, dtype="bfloat16", not_a_field=3, return_unused_kwargs=True
    )
    assert (config.pruning_rate, str(config.dtype).removeprefix("torch.")) == (1, "bfloat16")
    assert unused == {"not_a_field": 3}


def test_grid_and_prefix_counts():
    config = tiny_config(image_size=[32, 64], num_register_tokens=3)
    assert config.grid_size == (4, 8)
    assert config.num_patches == 32
    assert config.num_prefix_tokens == 4
    assert tiny_config(use_cls_token=False).num_prefix_tokens == 0


def test_stage_names_cover_the_embeddings_and_every_block():
    assert tiny_config().stage_names == ["stem", "stage1", "stage2", "stage3", "stage4", "stage5"]


@pytest.mark.parametrize("name", ["plain", "schedule", "unpruned"])
def test_construction_logs_nothing(name, log_records):
    tiny_config(name)
    assert log_records == []


def test_misspelt_fields_and_foreign_configurations_are_errors(tmp_path):
    with pytest.raises(ValueError, match="did you mean `pruning_rate`"):
        CroprViTConfig(prunning_rate=4)
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'vit'"):
        CroprViTConfig.from_pretrained(tmp_path)


def test_aliases_are_checked_when_loading(tmp_path):
    CroprViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="hidden_dropout_prob"):
        CroprViTConfig.from_pretrained(tmp_path, hidden_dropout=5.0)
    assert CroprViTConfig.from_pretrained(tmp_path, hidden_dropout=0.5).hidden_dropout_prob == 0.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelo"}, "gelo"),
        ({"problem_type": "multi_label_classification", "label_smoothing": 0.1}, "label_smoothing"),
    ],
)
def test_activation_and_smoothing(fields, message):
    with pytest.raises(ValueError, match=message):
        CroprViTConfig(**fields)
