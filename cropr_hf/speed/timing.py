"""Calls timed side by side in one process, round after round, as ratios."""

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.utils import logging


@dataclass
class Timing:
    """Seconds per call of one candidate over all rounds, and its speed relative to the reference.

    Attributes:
        seconds: one entry per round.
        speedup: median over rounds of reference time / own time.
        spread: half the interquartile range of these ratios.
    """

    seconds: list[float] = field(default_factory=list)
    speedup: float = 1.0
    spread: float = 0.0

    @property
    def median(self) -> float:
        """Median seconds per call."""
        return statistics.median(self.seconds)

    def percentile(self, percent: int) -> float | None:
        """Seconds that `percent` of the calls (1 to 99) do not exceed; `None` for fewer than 100 / (100 - percent)."""
        if len(self.seconds) * (100 - percent) < 100:
            return None
        return statistics.quantiles(self.seconds, n=100, method="inclusive")[percent - 1]

    def record(self, batch_size: int) -> dict[str, float | None]:
        """What records say of calls with that many images each; times are in milliseconds."""
        p99 = self.percentile(99)
        return {
            "images_per_second": batch_size / self.median,
            "speedup": self.speedup,
            "spread": self.spread,
            "p50_ms": 1000 * self.median,
            "p99_ms": None if p99 is None else 1000 * p99,
        }


def time_call(call: Callable[[], Any], device: torch.device | str = "cpu") -> float:
    """Seconds of one call: by the clock, on a CUDA device by its events."""
    device = torch.device(device)
    if device.type == "cuda":
        with torch.cuda.device(device):  # events are of the current one
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            call()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1000
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def compare(
    candidates: Mapping[str, Callable[[], Any]],
    reference: str,
    min_rounds: int = 5,
    max_rounds: int = 30,
    tolerance: float = 0.01,
    device: torch.device | str = "cpu",
) -> dict[str, Timing]:
    """Times candidates in turn, each once per round, until their ratios to the reference are settled.

    Machines drift; what is compared within one round drifts alike, so each ratio is taken within its round.

    Args:
        candidates: name -> a call to time.
        reference: name of the candidate that the others are compared with.
        min_rounds, max_rounds: it stops between them, when the standard error of every median ratio (1.25 times the
            standard deviation, estimated from the interquartile range, by the root of rounds) is below `tolerance`,
            as a share of the ratio.
        device: where the calls run; see `time_call`.

    Raises:
        `ValueError`: when the reference is not a candidate, there are fewer than 3 rounds, or for a tolerance below 0
            or infinite.
    """
    if reference not in candidates:
        raise ValueError(f"The reference {reference!r} is not among the candidates {', '.join(candidates)}.")
    check_rounds(min_rounds, max_rounds, tolerance)
    timings = {name: Timing() for name in candidates}
    names = list(candidates)
    for call in candidates.values():  # warm-up: allocations, kernel choices, compilation
        call()
    for round_index in logging.tqdm(range(max_rounds), desc="Benchmark rounds"):
        # Another order in each round: what ran before leaves caches and freed memory behind, which some can use.
        for name in random.Random(round_index).sample(names, len(names)):
            timings[name].seconds.append(time_call(candidates[name], device))
        if round_index + 1 >= min_rounds and _summarize(timings, reference) < tolerance:
            break
    return timings


def check_rounds(min_rounds: int, max_rounds: int, tolerance: float) -> None:
    """Raises `ValueError` for what `compare` cannot heed, so that its callers can do so before they work."""
    if not 3 <= min_rounds <= max_rounds:
        raise ValueError(f"`min_rounds` {min_rounds} and `max_rounds` {max_rounds} must be 3 or more, in this order.")
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"`tolerance` is {tolerance}; it must be 0 or more, such as 0.01 for a hundredth.")


def speed_ratio(timing: Timing, other: Timing) -> tuple[float, float]:
    """How many times faster `timing` is than `other`: median over rounds, and half the interquartile range."""
    ratios = [seconds / own for seconds, own in zip(other.seconds, timing.seconds)]
    lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return median, (upper - lower) / 2


def _summarize(timings: dict[str, Timing], reference: str) -> float:
    """Sets speed-ups and spreads; returns the largest relative standard error."""
    errors = []
    for timing in timings.values():
        timing.speedup, timing.spread = speed_ratio(timing, timings[reference])
        deviation = 2 * timing.spread / 1.349  # of a normal distribution
        errors.append(1.253 * deviation / len(timing.seconds) ** 0.5 / timing.speedup)
    return max(errors)
