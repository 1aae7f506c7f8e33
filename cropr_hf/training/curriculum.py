"""Pruning that starts gently, for routers that start cold (as the paper trains segmentation)."""

import random
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..token_schedule import curriculum_schedule


class PruningCurriculum(TrainerCallback):
    """Grows pruning linearly from nothing to the configured schedule, then leaves it there.

    With `pruning_range` it draws how much to prune at each step, which trains one checkpoint for any speed in between.

    The schedule is a function of the step and of the seed of the training, so that a resumed run goes on where it
    stopped, and all processes prune alike. Evaluation and checkpoints have the configured schedule at any time.
    Training images must have the size `config.image_size`.

    A new schedule costs nothing in itself in eager mode. A model under `torch.compile` is compiled again for each one,
    up to the limit of `torch._dynamo.config.recompile_limit` (8); take fewer `levels` there, or set
    `torch._dynamo.config.allow_unspec_int_on_nn_module = True`: after a few compilations token counts are variables of
    the graph, which then serves for all further schedules.

    Args:
        share: share of the training steps over which pruning grows, in [0, 1]; half of them in the paper.
        levels: different schedules before the final one, at most, the first of which prunes nothing. The reference
            code changes the schedule once per epoch, 32 times on ADE20k.
        pruning_range: least and most of what is drawn, evenly, as shares of what pruning has grown to: (0, 1) is
            anything from no to the configured pruning once it has grown. Draws are in steps of 1 / `levels`.

    Raises:
        `ValueError`: for a share, a number of levels or a range out of range.
    """

    def __init__(self, share: float = 0.5, levels: int = 32, pruning_range: Sequence[float] | None = None):
        if not 0 <= share <= 1:
            raise ValueError(f"`share` is {share}; it must be in [0, 1], such as 0.5 for half of the training.")
        if levels < 1:
            raise ValueError(f"`levels` is {levels}; it must be 1 or more, such as 32.")
        if pruning_range is not None and (
            len(pruning_range) != 2 or not 0 <= pruning_range[0] < pruning_range[1] <= 1
        ):
            raise ValueError(
                f"`pruning_range` is {pruning_range}; it must be two different shares of the configured pruning in "
                "[0, 1], the smaller one first, such as (0, 1)."
            )
        self.share = share
        self.levels = levels
        self.pruning_range = pruning_range

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Sets the schedule of the coming step."""
        level = self._level(state.global_step, state.max_steps, args.seed)
        model.set_pruning(curriculum_schedule(model.config, level / self.levels) if level < self.levels else None)

    def _level(self, step: int, max_steps: int, seed: int) -> int:
        growing_steps = self.share * max_steps
        level = int(self.levels * step / growing_steps) if step < growing_steps else self.levels
        if self.pruning_range is None:
            return level
        least, most = (round(level * share) for share in self.pruning_range)
        # The global generators differ between processes, and would give a resumed run other numbers.
        return random.Random(f"seed {seed}, step {step}").randint(least, most)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Back to the configured schedule, for evaluation and after the training."""
        model.set_pruning(None)
