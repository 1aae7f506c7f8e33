"""Which schedule meets a budget: `find_schedule` times blocks, predicts, searches, and measures what it found."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from ..configuration_cropr_vit import CroprViTConfig
from ..modeling_cropr_vit import CroprViTPreTrainedModel
from ..token_reduction import TokenReducer, find_token_reducer
from ..token_schedule import entering_patches
from ..token_state import TokenState
from ..vit_layers import pad_to_patches
from .benchmark import UNPRUNED
from .cost import head_multiply_adds, multiply_adds
from .timing import check_rounds, compare
from .tradeoff import circumstances, compare_schedules, images_to_time, left_as_found, run_pruned


logger = logging.get_logger(__name__)

SHAPES = ("constant", "one_shot", "free")
ONE_SHOT_BLOCK = 3  # of the aggressive schedule of the paper
CONSTANT_LEAVES = 0.1  # of the patches, where no shape was asked for; so does the classifier of the paper
TIMED_SHARES = (0, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)  # of the patches, in the blocks that are timed
TIMED_BLOCKS = 3  # in a row: a single one would find its weights in the cache, round after round
GRID_COUNTS = 48  # token counts among which a free schedule is sought, before it is refined
CLOSE_ENOUGH = 0.02  # measured against asked for
CORRECTIONS = 3
MLP_SHARE = 2 / 3  # of the weights of a block, and so about of its time


@dataclass
class FoundSchedule:
    """A schedule for a budget, with what it was predicted to give and what it gave.

    Attributes:
        schedule: patch tokens kept after each block, for `set_pruning`, or for `pruning_schedule` of a configuration.
        shape: `"constant"`, `"one_shot"` or `"free"`.
        predicted_speedup, predicted_ms: from the times of single blocks, scaled by what was measured before.
        measured_speedup, spread: over the unpruned model, in rounds in which both take turns: median, and half the
            interquartile range.
        measured_ms, unpruned_ms: median milliseconds per batch, in these rounds.
        multiply_adds: per image, with the head.
        bound: the speed-up that multiply-adds allow.
        details: circumstances (model, machine, versions, input), the request, the times of blocks, and all attempts.
    """

    schedule: list[int]
    shape: str
    predicted_speedup: float
    predicted_ms: float
    measured_speedup: float
    spread: float
    measured_ms: float
    unpruned_ms: float
    multiply_adds: int
    bound: float
    details: dict[str, Any] = field(repr=False)

    def record(self) -> dict[str, Any]:
        """All of it in one mapping that `json` can write."""
        fields = asdict(self)
        return {**fields.pop("details"), **fields}


def find_schedule(
    model: CroprViTPreTrainedModel,
    target_speedup: float | None = None,
    latency_ms: float | None = None,
    shape: str | None = None,
    pixel_values: torch.Tensor | None = None,
    calibration: Iterable[torch.Tensor | Mapping[str, Any]] | None = None,
    token_multiple: int | None = None,
    min_rounds: int = 5,
    max_rounds: int = 30,
    tolerance: float = 0.01,
) -> FoundSchedule:
    """A pruning schedule with which a model meets a budget of time on this machine; its pruning stays as it was.

    It times blocks of the model at several numbers of tokens, which predicts the time of any schedule; takes the
    schedule of the wanted shape whose predicted time is that of the budget; and times the model with it beside the
    unpruned one. Where that is off by more than 2 %, the prediction is scaled by what was measured, and the search
    repeated, at most three times. The best of the measured schedules is returned, with a warning if it is still off.

    Shapes: `"constant"` removes as many tokens at every module, as the paper does, but need not remove whole numbers;
    `"one_shot"` removes all at once (the aggressive schedule of the paper), after block 3, or as late before it as the
    budget allows, or with `calibration` after the block where it loses the least; `"free"` falls wherever the
    `calibration` loses the least.

    What a schedule loses is measured in mass: at each module, the scores of the patch tokens of an image, standardised
    (the scale of scores is arbitrary), go through a softmax, and a token that is pruned there loses its share. A
    schedule other than the one of the training changes the accuracy: look at it with `evaluate_schedules`.

    Args:
        model: any Cropr ViT that prunes, trained or, to learn about speed alone, not.
        target_speedup: how many times faster than the unpruned model, above 1.
        latency_ms: or milliseconds per batch.
        shape: one of the above. By default `"free"` with `calibration`; without, `"constant"` as long as that leaves a
            tenth of the patches, as the paper does in classification, and `"one_shot"` beyond.
        pixel_values: (B, channels, height, width), a batch to time; 8 images of noise of `image_size` by default. The
            schedule is for images of this size.
        calibration: batches of typical images of the same size, prepared for the model: (B, channels, height, width),
            or mappings with `pixel_values`. Some hundred images are enough.
        token_multiple: tokens, prefix included, are a multiple of it wherever some are pruned; 8 or 16 suit many GPUs.
            That of the configuration by default. With windowed attention the patches that are kept are also a square
            of windows.
        min_rounds, max_rounds, tolerance: of each timing, see `cropr_hf.speed.timing.compare`.

    Raises:
        `ValueError`: without exactly one budget, for one that needs no pruning or that no schedule of the shape can
            meet (it says what can be reached), or where the one that does is no faster than the unpruned model; for
            an unknown shape, for calibration that is missing, of another size or of no use to the shape; and for a
            model that is compiled, cannot prune or, with calibration, does not score.
    """
    _check_request(target_speedup, latency_ms, shape, calibration is not None)
    timing = (min_rounds, max_rounds, tolerance)
    check_rounds(*timing)
    if any(hasattr(part, "_orig_mod") or part._compiled_call_impl is not None for part in model.modules()):
        raise ValueError("The model is compiled, and each schedule would compile it anew; give the model as it was.")
    with left_as_found(model):
        model.set_pruning(0)  # an error for a model that cannot prune
        pixel_values, grid_size = images_to_time(model, pixel_values)
        multiple = model.config.token_multiple if token_multiple is None else token_multiple
        counts = _possible_counts(model.config, math.prod(grid_size), multiple)
        lost = None if calibration is None else _lost_mass(model, calibration, math.prod(grid_size))
        costs = _time_blocks(model, pixel_values, counts, timing)
        budget = costs.unpruned / target_speedup if target_speedup is not None else latency_ms / 1000  # type: ignore[operator]
        shape = shape or _default_shape(costs, budget, lost)
        _check_budget(costs, budget, shape, lost)
        attempts = _attempts(model, pixel_values, costs, budget, shape, lost, timing, absolute=latency_ms is not None)
        best = min(attempts, key=lambda attempt: attempt["off"])
        if best["measured_speedup"] <= 1:
            raise ValueError(
                f"Pruning does not pay here: with the best of {len(attempts)} measured schedules the model takes "
                f"{best['measured_ms']:.4g} ms, unpruned {best['unpruned_ms']:.4g} ms. Ask for more speed, or use "
                "larger batches."
            )
        head = head_multiply_adds(model, {"pixel_values": pixel_values}) // len(pixel_values)
        unpruned, pruned = (
            multiply_adds(model.config, grid_size, pruning=pruning) + head for pruning in (0, best["schedule"])
        )
        found_under = circumstances(model, pixel_values)
    if best["off"] > CLOSE_ENOUGH:
        logger.warning(
            f"The best of {len(attempts)} measured schedules is {best['off']:.1%} off the budget. The machine may be "
            "busy, or so few numbers of tokens possible (`token_multiple`, windows) that no schedule is nearer."
        )
    blocks = {kind: {str(count): 1000 * own for count, own in times.items()} for kind, times in costs.times.items()}
    request = {"target_speedup": target_speedup, "latency_ms": latency_ms, "token_multiple": multiple}
    details = {**found_under, **request, "block_ms": blocks, "attempts": attempts}
    found = {name: value for name, value in best.items() if name != "off"}
    return FoundSchedule(**found, shape=shape, multiply_adds=pruned, bound=unpruned / pruned, details=details)


def _check_request(
    target_speedup: float | None, latency_ms: float | None, shape: str | None, calibrated: bool
) -> None:
    """Raises `ValueError` for arguments of `find_schedule` that make no sense together."""
    if (target_speedup is None) == (latency_ms is None):
        raise ValueError(
            f"`target_speedup` is {target_speedup} and `latency_ms` is {latency_ms}; give exactly one of them."
        )
    if target_speedup is not None and not 1 < target_speedup < math.inf:
        raise ValueError(
            f"`target_speedup` is {target_speedup}; it must be above 1, where pruning is not needed, such as 2.0."
        )
    if latency_ms is not None and not 0 < latency_ms < math.inf:
        raise ValueError(f"`latency_ms` is {latency_ms}; it must be a positive number of milliseconds per batch.")
    if shape not in (None, *SHAPES):
        raise ValueError(f"The shape is {shape!r}; choose one of {', '.join(SHAPES)}.")
    if shape == "free" and not calibrated:
        raise ValueError("The shape 'free' is found by scores; give `calibration`, batches of typical images.")
    if shape == "constant" and calibrated:
        raise ValueError("The shape 'constant' has no use for `calibration`; choose 'one_shot' or 'free'.")


def _default_shape(costs: "_Costs", budget: float, lost: np.ndarray | None) -> str:
    if lost is not None:
        return "free"
    steepest = costs.constant((1 - CONSTANT_LEAVES) * costs.num_patches / len(costs.modules))
    return "constant" if costs.seconds(steepest) <= budget else "one_shot"


def _possible_counts(config: CroprViTConfig, num_patches: int, token_multiple: int) -> np.ndarray:
    """Numbers of patch tokens that a schedule may keep, ascending; the last one is all."""
    if token_multiple < 1:
        raise ValueError(f"`token_multiple` is {token_multiple}; it must be at least 1, such as 8.")
    counts: Iterable[int] = range(1, num_patches)
    if config.window_block_indices:
        # Other numbers would make the attention of these blocks global, at a price that grows in leaps.
        counts = [side**2 for side in range(config.window_size, math.isqrt(num_patches - 1) + 1, config.window_size)]
    counts = [count for count in counts if (count + config.num_prefix_tokens) % token_multiple == 0]
    if not counts:
        raise ValueError(
            f"An image has {num_patches} patches, and no smaller number makes a multiple of {token_multiple} tokens"
            f"{' and a square of windows' if config.window_block_indices else ''}; use a smaller `token_multiple` or "
            "larger images."
        )
    return np.array([*counts, num_patches])


def _nearest(counts: np.ndarray, values: Any) -> Any:
    """For each value the nearest of the numbers."""
    return counts[np.abs(counts - np.asarray(values)[..., None]).argmin(axis=-1)]


# --------------------------------------------------------------------------------------------------------------------
# What a schedule costs, and what it loses
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class _Costs:
    """Seconds of a batch under any schedule.

    Attributes:
        unpruned: seconds of the whole model without pruning.
        times: kind of block, "global" or "windowed" -> patch tokens, ascending -> seconds of one block.
        kinds: of each block.
        modules: blocks (1 to L) that pruning is possible after.
        fusion: whether the last block has all tokens.
        counts: numbers of patch tokens that a schedule may keep, ascending; the last one is all.
        aligned: whether the first module removes one token more.
        config: of the model.
        method: of the model.
    """

    unpruned: float
    times: dict[str, dict[int, float]]
    kinds: list[str]
    modules: list[int]
    fusion: bool
    counts: np.ndarray
    aligned: bool
    config: CroprViTConfig
    method: type[TokenReducer]

    @property
    def num_patches(self) -> int:
        return int(self.counts[-1])

    def block(self, kind: str, counts: Any) -> Any:
        """Seconds of a block with these patch tokens: linear between the numbers that were timed."""
        times = self.times[kind]
        return np.interp(counts, list(times), list(times.values()))

    def seconds(self, schedule: Sequence[int]) -> float:
        """Of the model: what is not in the blocks (patch embedding, heads) takes the same time as without pruning."""
        counts: Any = np.array(entering_patches(schedule, self.num_patches, self.fusion), dtype=float)
        if self.method.acts_inside:
            counts = (1 - MLP_SHARE) * counts + MLP_SHARE * np.minimum(counts, self._leaving(schedule))
        saved = (self.block(kind, self.num_patches) - self.block(kind, n) for kind, n in zip(self.kinds, counts))
        return self.unpruned - float(sum(saved))

    def _leaving(self, schedule: Sequence[int]) -> np.ndarray:
        leaving = np.array(schedule)
        if self.fusion:
            leaving[-1] = self.num_patches
        return leaving

    def schedule(self, kept: Sequence[int]) -> list[int]:
        """An entry per block from one per module."""
        after = dict(zip(self.modules, kept))
        schedule, remaining = [], self.num_patches
        for block in range(1, len(self.kinds) + 1):
            remaining = int(after.get(block, remaining))
            schedule.append(remaining)
        return self.method.reachable_counts(self.config, self.num_patches, schedule)

    def constant(self, rate: float) -> list[int]:
        """As much after every module, as `CroprViTConfig.kept_patches` has it for whole numbers."""
        first = self.num_patches - (self.aligned and rate > 0)
        return self.schedule(_nearest(self.counts, [first - rate * (i + 1) for i in range(len(self.modules))]))

    def one_shot(self, module: int, removed: float) -> list[int]:
        """All at once, after the module of this index."""
        kept = int(_nearest(self.counts, self.num_patches - removed))
        return self.schedule([self.num_patches] * module + [kept] * (len(self.modules) - module))


def _time_blocks(model: Any, pixel_values: torch.Tensor, counts: np.ndarray, timing: tuple[int, int, float]) -> _Costs:
    config: CroprViTConfig = model.config
    num_blocks = config.num_hidden_layers
    windowed = config.window_block_indices if config.window_size else ()
    kinds = ["windowed" if index in windowed else "global" for index in range(num_blocks)]
    candidates: dict[str, Callable[[], Any]] = {UNPRUNED: partial(run_pruned, model, pixel_values, 0)}
    timed: dict[str, tuple[str, int, int]] = {}
    whole, window_table = model.base_model.embed(pad_to_patches(pixel_values, config.patch_size))
    for count in sorted({int(_nearest(counts, share * counts[-1])) for share in TIMED_SHARES}):
        state = _pruned_to(whole, count)
        for kind in dict.fromkeys(kinds):
            blocks = [block for block, other in enumerate(kinds, start=1) if other == kind][:TIMED_BLOCKS]
            timed[f"{kind} {count}"] = (kind, count, len(blocks))
            candidates[f"{kind} {count}"] = partial(_run_blocks, model.base_model, blocks, state, window_table)
    timings = compare(candidates, UNPRUNED, *timing, device=model.device)
    unpruned = timings[UNPRUNED].median
    times: dict[str, dict[int, float]] = {kind: {} for kind in dict.fromkeys(kinds)}
    for name, (kind, count, num_layers) in timed.items():
        # Relative to the unpruned model of the same round; and noise must not make fewer tokens slower.
        least = max(times[kind].values(), default=0.0)
        times[kind][count] = max(least, unpruned / timings[name].speedup / num_layers)
    in_blocks = sum(times[kind][int(counts[-1])] for kind in kinds)
    if in_blocks > unpruned:  # nor the blocks slower than the model
        times = {kind: {n: own * unpruned / in_blocks for n, own in by.items()} for kind, by in times.items()}
    method = find_token_reducer(config)
    by_the_paper = method.kept_by_rate.__func__ is TokenReducer.kept_by_rate.__func__  # type: ignore[attr-defined]
    aligned = by_the_paper and config.align_first_module and config.use_cls_token
    fusion = bool(config.last_layer_fusion)
    return _Costs(unpruned, times, kinds, config.pruning_blocks, fusion, counts, aligned, config, method)


def _pruned_to(state: TokenState, count: int) -> TokenState:
    """A state of as many patch tokens: speed does not depend on which they are."""
    if count == state.num_patches:
        return state
    places = torch.arange(state.hidden_states.shape[1], device=state.hidden_states.device)
    places = places.expand(state.hidden_states.shape[0], -1)
    left = state.num_prefix_tokens + count
    return state.prune(places[:, :left], places[:, left:], block=1)


def _run_blocks(base_model: Any, blocks: Sequence[int], state: TokenState, window_table: Any) -> None:
    for block in blocks:
        state = base_model.run_block(block, state, window_table)


def _lost_mass(model: Any, calibration: Iterable[Any], num_patches: int) -> np.ndarray:
    """Mean share of the mass that is lost when only the best k patch tokens are left: (modules, num_patches + 1)."""
    base = model.base_model
    blocks = model.config.pruning_blocks
    reducers = [base.token_reducers[str(block)] for block in blocks]
    method = type(reducers[0])
    if method.scores is TokenReducer.scores or not method.deterministic:
        raise ValueError(
            f"The token reducer {model.config.token_reducer!r} does not score tokens; leave `calibration` out."
        )
    lost, images = np.zeros((len(blocks), num_patches + 1)), 0

    def add(index: int, reducer: TokenReducer, layer: Any, args: Any, hidden_states: torch.Tensor) -> None:
        indices = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
        state = TokenState(hidden_states, indices, num_prefix_tokens=model.config.num_prefix_tokens)
        if state.num_patches != num_patches:
            raise ValueError(
                f"An image of the calibration has {state.num_patches} patches, those that are timed have "
                f"{num_patches}; give both the size that the model will meet."
            )
        scores: Any = reducer.scores(state)
        scores = scores[:, state.num_prefix_tokens :]
        scores = (scores - scores.mean(dim=1, keepdim=True)) / scores.std(dim=1, keepdim=True).clamp(min=1e-12)
        kept = scores.softmax(dim=1).sort(dim=1, descending=True).values.cumsum(dim=1)
        outside = (1 - torch.nn.functional.pad(kept, (1, 0))).clamp(min=0)
        lost[index] += outside.double().sum(dim=0).cpu().numpy()

    hooks = [
        base.layers[block - 1].register_forward_hook(partial(add, index, reducer))
        for index, (block, reducer) in enumerate(zip(blocks, reducers))
    ]
    try:
        for batch in logging.tqdm(calibration, desc="Calibration"):
            pixels = batch.get("pixel_values") if isinstance(batch, Mapping) else batch
            if pixels is None:
                raise ValueError(f"A batch of the calibration has {', '.join(batch)}, but no `pixel_values`; add it.")
            run_pruned(model, pixels.to(model.device), 0)
            images += len(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    if not images:
        raise ValueError("`calibration` has no images; give batches of typical ones.")
    if not np.isfinite(lost).all():
        raise ValueError("The scores of the calibration are not finite; look at its images, and at the weights.")
    lost /= images
    lost[:, -1] = 0.0  # up to rounding it is
    return lost


# --------------------------------------------------------------------------------------------------------------------
# The schedule for a time
# --------------------------------------------------------------------------------------------------------------------


def _check_budget(costs: _Costs, budget: float, shape: str, lost: np.ndarray | None) -> None:
    if budget >= costs.unpruned:
        raise ValueError(
            f"`latency_ms` is {1000 * budget:.4g}, but the unpruned model takes {1000 * costs.unpruned:.4g} ms; "
            "pruning is not needed. Use the model as it is, or ask for less time."
        )
    least = costs.seconds(_search(costs, 0.0, shape, lost))
    if budget < least:
        least_of_all = min(least, costs.seconds(costs.one_shot(0, costs.num_patches)))
        raise ValueError(
            f"A speed-up of {costs.unpruned / budget:.4g} ({1000 * budget:.4g} ms per batch) is out of reach: by the "
            f"times of its blocks the model can become {costs.unpruned / least:.2f} times faster with the shape "
            f"{shape!r} ({1000 * least:.4g} ms), and {costs.unpruned / least_of_all:.2f} times with any. Ask for less"
            f"{', or choose another shape' if least_of_all < least else ''}."
        )


def _attempts(
    model: Any,
    pixel_values: torch.Tensor,
    costs: _Costs,
    budget: float,
    shape: str,
    lost: np.ndarray | None,
    timing: tuple[int, int, float],
    absolute: bool,
) -> list[dict[str, Any]]:
    """Schedules with their predicted and measured speed, until one meets the budget in seconds.

    Args:
        absolute: whether seconds count; otherwise it is their ratio to the unpruned model.
    """
    attempts: list[dict[str, Any]] = []
    scale = 1.0  # of measured to predicted seconds
    for _ in range(1 + CORRECTIONS):
        schedule = _search(costs, min(budget / scale, 0.999 * costs.unpruned), shape, lost)
        if any(schedule == attempt["schedule"] for attempt in attempts):
            break  # no other is nearer
        predicted = scale * costs.seconds(schedule)
        timings = compare_schedules(model, pixel_values, {shape: schedule}, timing)
        own, unpruned = timings[shape], timings[UNPRUNED].median
        measured = own.median if absolute else costs.unpruned / own.speedup
        attempts.append(
            {
                "schedule": schedule,
                "predicted_speedup": costs.unpruned / predicted,
                "predicted_ms": 1000 * predicted,
                "measured_speedup": own.speedup,
                "spread": own.spread,
                "measured_ms": 1000 * own.median,
                "unpruned_ms": 1000 * unpruned,
                "off": abs(measured / budget - 1),
            }
        )
        if attempts[-1]["off"] <= CLOSE_ENOUGH:
            break
        scale *= measured / predicted
    return attempts


def _search(costs: _Costs, budget: float, shape: str, lost: np.ndarray | None) -> list[int]:
    """The schedule of a shape whose predicted seconds are nearest to the budget; the fastest if none is so fast."""
    if shape == "constant":
        largest = (costs.num_patches - costs.aligned - costs.counts[0]) / len(costs.modules)
        return _nearer(costs, budget, *_bisect(costs, budget, costs.constant, 0.0, largest))
    if shape == "one_shot":
        return _one_shot(costs, budget, lost)
    assert lost is not None  # see `_check_request`
    return _free(costs, budget, lost)


def _bisect(
    costs: _Costs, budget: float, schedule_of: Callable[[float], list[int]], low: float, high: float
) -> tuple[list[int], list[int]]:
    """Two neighbours among schedules that become faster with a number, of which the budget lies between."""
    slower, faster = schedule_of(low), schedule_of(high)
    if costs.seconds(faster) > budget:
        return faster, faster
    for _ in range(40):
        middle = (low + high) / 2
        schedule = schedule_of(middle)
        if costs.seconds(schedule) > budget:
            low, slower = middle, schedule
        else:
            high, faster = middle, schedule
    return slower, faster


def _nearer(costs: _Costs, budget: float, slower: list[int], faster: list[int]) -> list[int]:
    if slower[-1] == costs.num_patches:  # prunes nothing
        return faster
    return min(faster, slower, key=lambda schedule: abs(costs.seconds(schedule) - budget))


def _one_shot(costs: _Costs, budget: float, lost: np.ndarray | None) -> list[int]:
    def at(module: int) -> list[int]:
        return _nearer(
            costs, budget, *_bisect(costs, budget, partial(costs.one_shot, module), 0.0, float(costs.num_patches))
        )

    modules = costs.modules
    if lost is None:
        latest = min(range(len(modules)), key=lambda module: abs(modules[module] - ONE_SHOT_BLOCK))
        for module in range(latest, 0, -1):
            if costs.seconds(costs.one_shot(module, costs.num_patches)) <= budget:
                return at(module)
        return at(0)
    schedules = [at(module) for module in range(len(modules))]
    gaps = [abs(costs.seconds(schedule) - budget) for schedule in schedules]
    within = max(CLOSE_ENOUGH * budget, min(gaps))
    meeting = [module for module, gap in enumerate(gaps) if gap <= within]
    return schedules[min(meeting, key=lambda module: lost[module, schedules[module][-1]])]


def _free(costs: _Costs, budget: float, lost: np.ndarray) -> list[int]:
    """The schedule that loses the least mass, each token at the module that prunes it.

    With a price on time, the best schedule among a few numbers of tokens follows from module to module (dynamic
    programming). The price is found by bisection, and the two schedules between which the budget lies are mixed.
    """
    grid = costs.counts[np.linspace(0, len(costs.counts) - 1, min(GRID_COUNTS, len(costs.counts))).round().astype(int)]
    ends = [*costs.modules[1:], len(costs.kinds) - costs.fusion]
    # (modules, numbers): seconds between a module and the next one, and mass that is lost when these are left there
    seconds = np.array(
        [
            sum((costs.block(kind, grid) for kind in costs.kinds[module:end]), np.zeros(len(grid)))
            for module, end in zip(costs.modules, ends)
        ]
    )
    mass = lost[:, grid]
    increases = np.tri(len(grid), k=-1, dtype=bool)  # (to, from) that would bring tokens back

    def best(exponent: float) -> list[int]:
        total = np.where(grid == costs.num_patches, 0.0, np.inf)
        choices = []
        for own_mass, own_seconds in zip(mass, seconds):
            paths = np.where(increases, np.inf, total - own_mass + own_mass[:, None])
            choices.append(paths.argmin(axis=1))
            total = paths.min(axis=1) + math.exp(exponent) * own_seconds / costs.unpruned
        index, kept = int(total.argmin()), []
        for choice in reversed(choices):
            kept.append(grid[index])
            index = choice[index]
        return costs.schedule(kept[::-1])

    slower, faster = (np.array(schedule) for schedule in _bisect(costs, budget, best, -20.0, 20.0))

    def mix(share: float) -> list[int]:
        return _nearest(costs.counts, (1 - share) * slower + share * faster).tolist()

    return _nearer(costs, budget, *_bisect(costs, budget, mix, 0.0, 1.0))
