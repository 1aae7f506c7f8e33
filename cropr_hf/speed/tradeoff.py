"""One checkpoint at many speeds: schedules between no pruning and the configured one, and what each of them gives."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers.utils import logging

from ..configuration_cropr_vit import CroprViTConfig
from ..files import source_name
from ..modeling_cropr_vit import CroprViTPreTrainedModel
from ..token_schedule import Pruning
from .benchmark import UNPRUNED
from .cost import head_multiply_adds, multiply_adds
from .instruments import library_versions, machine_name
from .timing import Timing, check_rounds, compare


DEFAULT_BATCH_SIZE = 8


def evaluate_schedules(
    model: CroprViTPreTrainedModel,
    schedules: Sequence[Pruning],
    metric: Callable[[Any], float | Mapping[str, float]],
    pixel_values: torch.Tensor | None = None,
    min_rounds: int = 5,
    max_rounds: int = 30,
    tolerance: float = 0.02,
) -> dict[str, Any]:
    """Accuracy and throughput of one model under several pruning schedules; its pruning stays as it was.

    Args:
        model: any Cropr ViT that prunes, as published (auxiliary heads cost some time, also in evaluation).
        schedules: each is what `set_pruning` takes: a rate (0 prunes nothing), patch tokens kept after each block
            (such as `curriculum_schedule(model.config, 0.5)`), or `None` for the configured schedule.
        metric: gets the model, in evaluation mode and pruning by one of the schedules, and returns a number, which
            goes by the name "metric", or a mapping of names to numbers.
        pixel_values: (B, channels, height, width), a batch to time; 8 images of noise of `image_size` by default.
        min_rounds, max_rounds, tolerance: of the timing, see `cropr_hf.speed.timing.compare`.

    Returns:
        A record that `json` can write: machine, versions, settings, and `points`, one per schedule in their order.
        Each has its `schedule`, `kept_patches` after each block, `multiply_adds` per image with the head, `metrics`,
        `images_per_second`, and the `speedup` over the unpruned model with its `spread` (half the interquartile
        range).

    Raises:
        `ValueError`: without schedules, for two that keep the same patches, for one that is impossible for the model
            or the size of `pixel_values`, and for a metric that is not a finite number.
    """
    check_rounds(min_rounds, max_rounds, tolerance)
    with left_as_found(model):
        return _evaluate(model, schedules, metric, pixel_values, (min_rounds, max_rounds, tolerance))


@contextmanager
def left_as_found(model: CroprViTPreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards the model prunes and trains as before."""
    previous = model.base_model.pruning
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():  # tensors of inference mode that a model caches would spoil its training later on
            yield
    finally:
        model.base_model.pruning = previous  # type: ignore[assignment]
        for module in in_training:
            module.training = True


def _evaluate(
    model: Any,
    schedules: Sequence[Pruning],
    metric: Callable[[Any], float | Mapping[str, float]],
    pixel_values: torch.Tensor | None,
    timing: tuple[int, int, float],
) -> dict[str, Any]:
    config: CroprViTConfig = model.config
    pixel_values, grid_size = images_to_time(model, pixel_values)
    batch_size, num_patches = len(pixel_values), math.prod(grid_size)
    points = _points(model, schedules, num_patches)
    for point in logging.tqdm(points, desc="Schedules"):
        model.set_pruning(point["schedule"])
        head = head_multiply_adds(model, {"pixel_values": pixel_values}) // batch_size
        point["multiply_adds"] = multiply_adds(config, grid_size, pruning=point["schedule"]) + head
        point["metrics"] = _numbers(metric(model))
    names = [UNPRUNED if point["kept_patches"][-1] == num_patches else str(point["schedule"]) for point in points]
    schedules_by_name = {name: point["schedule"] for name, point in zip(names, points)}
    timings = compare_schedules(model, pixel_values, schedules_by_name, timing)
    for name, point in zip(names, points):
        own = timings[name]
        point |= {"images_per_second": batch_size / own.median, "speedup": own.speedup, "spread": own.spread}
    return {
        **circumstances(model, pixel_values),
        "rounds": len(timings[UNPRUNED].seconds),
        "unpruned_images_per_second": batch_size / timings[UNPRUNED].median,
        "points": points,
    }


def images_to_time(model: Any, pixel_values: torch.Tensor | None) -> tuple[torch.Tensor, tuple[int, int]]:
    """A batch where the model is, of noise if none is given, and rows and columns of its patches."""
    config: CroprViTConfig = model.config
    if pixel_values is None:
        height, width = config.input_size
        generator = torch.Generator().manual_seed(0)  # leaves the global one alone
        pixel_values = torch.randn(DEFAULT_BATCH_SIZE, config.num_channels, height, width, generator=generator)
    if pixel_values.dim() != 4 or not len(pixel_values):
        raise ValueError(
            f"`pixel_values` has the shape {tuple(pixel_values.shape)}; it must be (batch, channels, height, width), "
            "with one image or more."
        )
    height, width = pixel_values.shape[2:]
    grid_size = (-(-height // config.patch_size), -(-width // config.patch_size))
    return pixel_values.to(model.device, model.dtype), grid_size


def compare_schedules(
    model: Any, pixel_values: torch.Tensor, schedules: Mapping[str, Pruning], timing: tuple[int, int, float]
) -> dict[str, Timing]:
    """Times a model under schedules, and unpruned, in turns; `timing` is as `speed.timing.compare` takes it."""
    both: dict[str, Pruning] = {UNPRUNED: 0, **schedules}
    calls = {name: partial(run_pruned, model, pixel_values, pruning) for name, pruning in both.items()}
    return compare(calls, UNPRUNED, *timing, device=model.device)


def run_pruned(model: Any, pixel_values: torch.Tensor, pruning: Pruning) -> None:
    """One call under a schedule."""
    model.set_pruning(pruning)
    model(pixel_values)


def circumstances(model: Any, pixel_values: torch.Tensor) -> dict[str, Any]:
    """What a record of times says about the model, its input and the machine."""
    name = model.config.name_or_path
    return {
        "model": type(model).__name__,
        "name_or_path": source_name(name) if name else None,
        "machine": machine_name(model.device),
        "versions": library_versions(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch_size": len(pixel_values),
        "image_size": list(pixel_values.shape[2:]),
    }


def _points(model: Any, schedules: Sequence[Pruning], num_patches: int) -> list[dict[str, Any]]:
    """The beginnings of the points, once all schedules are known to be possible and different."""
    if not len(schedules):
        raise ValueError("There are no schedules; give at least one, such as [0, None] for no and configured pruning.")
    points: list[dict[str, Any]] = []
    for schedule in schedules:
        model.set_pruning(schedule)
        pruning = model.base_model.pruning  # in plain numbers
        kept = model.config.kept_patches(num_patches, pruning)
        for index, point in enumerate(points):
            if point["kept_patches"] == kept:
                raise ValueError(f"The schedules {index} and {len(points)} both keep {kept} patches; leave one out.")
        points.append({"schedule": pruning, "kept_patches": kept})
    return points


def _numbers(value: Any) -> dict[str, float]:
    values = value if isinstance(value, Mapping) else {"metric": value}
    try:
        numbers = {str(name): float(number) for name, number in values.items()}
        if not all(map(math.isfinite, numbers.values())):
            raise ValueError
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The metric returned {value!r}; it must be a finite number, or a mapping of names to such numbers."
        ) from error
    return numbers
