"""Random configurations, inputs, labels and folders: the result is right, or a `ValueError` says what is wrong."""

import json
import math
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedConfig

from cropr_hf import CroprViTConfig, CroprViTForImageClassification
from tests.common import (
    DETECTOR,
    IMAGE_SIZE,
    NUM_LABELS,
    TASKS,
    assert_close_relative,
    make_images,
    make_model,
    tiny_config,
)


pytestmark = pytest.mark.full

# The same examples on every machine, and no deadline: some are slow at the first call.
bounded = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
odd_floats = st.sampled_from(
    [math.nan, math.inf, -math.inf, -1.0, 0.0, 1e-30, 0.5, 0.999999, 1.0, 1.0000001, 2.0, 1e30]
)
ints = st.sampled_from([-7, -1, 0, 1, 2, 3, 4, 5, 8, 16, 32, 33, 48])
wrong_types = st.sampled_from([None, "", "cropr", "mean", True, [], {}, [1, 2], (), 1.5])
whole_numbers = st.lists(st.integers(-2, 20), max_size=7)

NAMES = sorted({field.name for field in fields(CroprViTConfig)} - {field.name for field in fields(PreTrainedConfig)})
NAMES = [name for name in NAMES if not name.startswith("_")] + ["num_labels", "problem_type"]


REFUSED = (ValueError, StrictDataclassError)  # the second for values of the wrong type


def said(error: BaseException) -> bool:
    """Whether an error gives a reason in words."""
    return len(str(error).split()) >= 4


@st.composite
def overrides(draw: Any) -> dict[str, Any]:
    """One to three fields with values of any kind, mostly of the type that they have."""
    chosen = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True))
    kinds = {int: ints, float: odd_floats, bool: st.booleans(), str: st.text(max_size=5), tuple: whole_numbers}
    values = {}
    for name in chosen:
        likely = kinds.get(type(getattr(CroprViTConfig, name, None)), st.one_of(ints, odd_floats, whole_numbers))
        values[name] = draw(st.one_of(likely, likely, likely, wrong_types))
    return values


@bounded
@given(overrides(), st.sampled_from(["classification", "backbone", "segmentation"]))
def test_a_configuration_is_refused_or_gives_a_model_that_works(fields, task):
    try:
        config = tiny_config(**{**TASKS[task].fields, "use_auxiliary_heads": task != "backbone", **fields})
        model = TASKS[task].model_class(config)
        height, width = config.input_size
        pixels = torch.randn(2, config.num_channels, height, width, generator=torch.Generator().manual_seed(0))
        if max(height, width) > 64 or config.num_patches > 300:
            return
        outputs = model.eval()(pixels)
    except REFUSED as error:
        assert said(error), repr(error)
        return
    main = TASKS[task].main_output(outputs)
    assert len(main) == 2 and main.isfinite().all()
    # And it can be saved: what it says about itself is JSON, and reads back as the same.
    again = CroprViTConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
    assert again.to_dict() == config.to_dict()


@st.composite
def tensors(draw: Any) -> Any:
    """Images, nearly right in shape, dtype and values."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.sampled_from([None, [[1.0]], "image", 3]))
    sizes = st.sampled_from([0, 1, 7, 8, 16, 24, 32, 40])
    shape = [draw(st.sampled_from([0, 1, 2])), draw(st.sampled_from([1, 3, 3, 3, 4])), draw(sizes), draw(sizes)]
    shape = shape[: draw(st.sampled_from([2, 3, 4, 4, 4, 4, 4]))]
    dtype = draw(st.sampled_from([torch.float32] * 3 + [torch.uint8, torch.float64, torch.bool]))
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    value = draw(st.sampled_from([None, None, None, math.nan, math.inf, -math.inf, 1e30]))
    if value is not None and pixels.numel() and pixels.is_floating_point():
        pixels.view(-1)[draw(st.integers(0, pixels.numel() - 1))] = value
    return pixels


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: TASKS[name].build() for name in ("classification", "segmentation", "instances", "backbone")}


@pytest.mark.parametrize("task", ["classification", "segmentation", "instances", "backbone"])
@bounded
@given(pixels=tensors())
def test_an_input_is_refused_or_gives_an_output_that_tells(models, task, pixels):
    """Numbers that are none must show."""
    try:
        with torch.no_grad():
            outputs = models[task](pixels)
    except (ValueError, FloatingPointError) as error:  # the second where a detector finds nothing but NaN
        assert said(error), repr(error)
        return
    main = TASKS[task].main_output(outputs)
    assert len(main) == len(pixels)
    if pixels.isfinite().all() and pixels.abs().max() < 1e9:
        assert main.isfinite().all()
    if pixels.isnan().any():
        assert not main.isfinite().all()


SHAPES: dict[str, list[tuple[int, ...]]] = {
    "classification": [(2,)] * 3 + [(3,), (), (2, 1), (2, NUM_LABELS), (2, NUM_LABELS, 1)],
    "segmentation": [(2, 32, 32)] * 3 + [(2, 16, 31), (2, 0, 4), (1, 32, 32), (2, 1, 32, 32), (2,)],
    "masks": [(32, 32)] * 3 + [(16, 16)],
}


@st.composite
def labels(draw: Any, task: str) -> Any:
    """Labels of two images, nearly right."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    dtype = draw(st.sampled_from([torch.int64, torch.int64, torch.int32, torch.uint8, torch.float32, torch.bool]))
    low, high = draw(st.sampled_from([(0, NUM_LABELS), (0, NUM_LABELS), (-1, 2), (0, 300), (255, 256), (-100, -99)]))
    if task in ("classification", "segmentation"):
        shape = draw(
            st.sampled_from(
                {
                    "classification": [(2,), (2,), (2,), (3,), (), (2, 1), (2, NUM_LABELS), (2, NUM_LABELS, 1)],
                    "segmentation": [
                        (2, 32, 32),
                        (2, 32, 32),
                        (2, 16, 31),
                        (2, 0, 4),
                        (1, 32, 32),
                        (2, 1, 32, 32),
                        (2,),
                    ],
                }[task]
            )
        )
        if dtype.is_floating_point:
            values = torch.rand(shape, generator=generator) * draw(st.sampled_from([1.0, 1.0000001, 2.0, math.nan]))
            return values
        return torch.randint(low, high, shape, generator=generator).to(dtype)
    images = []
    for _ in range(draw(st.sampled_from([2, 2, 2, 2, 1, 3]))):
        count = draw(st.integers(0, 3))
        scale = draw(st.sampled_from([1.0, 1.0, 1.0, 0.0, 1e-7, 40.0, -1.0, math.nan, math.inf]))
        label: dict[str, Any] = {
            "class_labels": torch.randint(low, high, (count,), generator=generator).to(dtype),
            "boxes": torch.tensor([0.5, 0.5, 0.4, 0.3]).repeat(count, 1) * scale,
            "masks": torch.ones(
                (count, *draw(st.sampled_from([(32, 32), (32, 32), (32, 32), (16, 16)]))), dtype=dtype
            ),
        }
        if draw(st.integers(0, 9)) == 0:
            label.pop(draw(st.sampled_from(sorted(label))))
        if draw(st.integers(0, 9)) == 0:
            name = draw(st.sampled_from(["class_labels", "boxes", "masks"]))
            label[name] = draw(st.sampled_from([None, [1], torch.zeros(count, 5)]))
        images.append(label)
    return images


@pytest.fixture(scope="module")
def trainable() -> dict[str, Any]:
    models = {}
    for name in ("classification", "segmentation", "instances"):
        models[name] = TASKS[name].build(use_auxiliary_heads=True).train()
    return models


@pytest.mark.parametrize("task", ["classification", "segmentation", "instances"])
@bounded
@given(data=st.data())
def test_labels_are_refused_or_give_a_loss_and_gradients_that_are_numbers(trainable, task, data):
    given_labels = data.draw(labels(task))
    model = trainable[task]
    model.zero_grad()
    try:
        outputs = model(make_images(2, IMAGE_SIZE, IMAGE_SIZE), labels=given_labels)
    except ValueError as error:
        assert said(error), repr(error)
        return
    assert outputs.loss.isfinite()
    outputs.loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """A folder, and what its model says."""
    folder = tmp_path_factory.mktemp("published")
    model = make_model(CroprViTForImageClassification, tiny_config(use_auxiliary_heads=True))
    model.save_pretrained(folder)
    with torch.no_grad():
        return folder, model(make_images()).logits


json_values = st.one_of(
    st.none(), st.booleans(), ints, odd_floats, st.text(max_size=4), whole_numbers, st.just({"a": 1})
)


@bounded
@given(data=st.data())
def test_a_damaged_folder_is_refused_or_loads(published, data, tmp_path):
    source, expected = published
    folder = tmp_path / "folder"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    stored = json.loads((folder / "config.json").read_text())
    kind = data.draw(st.sampled_from(["field", "field", "field", "missing", "truncated", "bytes", "not an object"]))
    name = data.draw(st.sampled_from(sorted(stored)))
    file = folder / data.draw(st.sampled_from(["config.json", "model.safetensors"]))
    if kind == "field":
        stored[name] = data.draw(json_values)
        (folder / "config.json").write_text(json.dumps(stored))
    elif kind == "missing":
        del stored[name]
        (folder / "config.json").write_text(json.dumps(stored))
    elif kind == "truncated":
        file.write_bytes(file.read_bytes()[: data.draw(st.integers(0, file.stat().st_size - 1))])
    elif kind == "bytes":
        content = bytearray(file.read_bytes())
        place = data.draw(st.integers(0, min(len(content), 4000) - 1))
        content[place] = data.draw(st.integers(0, 255))
        file.write_bytes(bytes(content))
    else:
        (folder / "config.json").write_text(json.dumps(data.draw(json_values)))
    try:
        model = CroprViTForImageClassification.from_pretrained(folder)
        with torch.no_grad():
            logits = model(make_images()).logits
    except (*REFUSED, OSError) as error:  # an OSError is what Transformers raises for a folder without a model
        assert said(error), repr(error)
        return
    assert logits.shape[0] == len(expected) and logits.isfinite().all()
    if kind == "truncated":  # at white space at the end
        assert_close_relative(logits, expected)


@bounded
@given(st.one_of(ints, whole_numbers, wrong_types, st.lists(odd_floats, max_size=6)))
def test_a_pruning_is_refused_or_kept(models, pruning):
    model = models["classification"]
    try:
        model.set_pruning(pruning)
        with torch.no_grad():
            outputs = model(make_images(), output_pruning=True)
    except ValueError as error:
        assert said(error), repr(error)
        return
    finally:
        model.set_pruning(None)
    left = (outputs.pruned_after_block == model.config.num_hidden_layers).sum(dim=1)
    assert (left == left[0]).all() and outputs.logits.isfinite().all()
    if isinstance(pruning, list):
        assert left[0] == pruning[-1]


@bounded
@given(overrides())
def test_a_detector_is_refused_or_detects(fields):
    try:
        model = TASKS["detection"].model_class(tiny_config(**{**DETECTOR, **fields})).eval()
        config = model.config
        if max(config.input_size) > 64 or config.num_patches > 300:
            return
        outputs = model(torch.randn(1, config.num_channels, *config.input_size))
    except REFUSED as error:
        assert said(error), repr(error)
        return
    assert outputs.logits.isfinite().all() and outputs.pred_boxes.isfinite().all()
