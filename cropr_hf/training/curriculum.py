"""Pruning that starts gently, for routers that start cold (as the paper trains segmentation)."""

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..configuration_cropr_vit import CroprViTConfig


TOKEN_MULTIPLE = 8


def curriculum_schedule(config: CroprViTConfig, progress: float) -> list[int]:
    """Patch tokens kept after each block when pruning has grown to a share of what is configured.

    While it grows, the tokens after a block, prefix included, are all of them or a multiple of 8, rounded up: kernels
    like such lengths, and there are few different ones. Where the final schedule leaves whole windows of windowed
    attention, they are squares of windows.

    Args:
        config: its schedule at `image_size` is the final one.
        progress: in [0, 1], where 0 keeps every token and 1 is the final schedule.
    """
    final, all_patches, prefix = config.kept_patches(), config.num_patches, config.num_prefix_tokens
    if progress >= 1:
        return final
    window = config.window_size**2
    tiles = window > 0 and all(kept % window == 0 for kept in final if kept < all_patches)
    schedule = []
    for kept in final:
        tokens = prefix + kept + (1.0 - progress) * (all_patches - kept)
        if tiles:
            rounded = (math.ceil(math.sqrt(tokens) / config.window_size) * config.window_size) ** 2
        else:
            rounded = math.ceil(tokens / TOKEN_MULTIPLE) * TOKEN_MULTIPLE
        schedule.append(min(rounded - prefix, all_patches))
    return schedule


class PruningCurriculum(TrainerCallback):
    """Grows pruning linearly from nothing to the configured schedule, then leaves it there.

    The schedule is a function of the step alone, so that a resumed run goes on where it stopped. Evaluation and
    checkpoints have the configured schedule at any time. Training images must have the size `config.image_size`.

    A new schedule costs nothing in itself in eager mode. A model under `torch.compile` is compiled again for each one,
    up to the limit of `torch._dynamo.config.recompile_limit` (8); take fewer `levels` there, or set
    `torch._dynamo.config.allow_unspec_int_on_nn_module = True`: after a few compilations token counts are variables of
    the graph, which then serves for all further schedules.

    Args:
        share: share of the training steps over which pruning grows, in (0, 1]; half of them in the paper.
        levels: different schedules before the final one, at most, the first of which prunes nothing. The reference
            code changes the schedule once per epoch, 32 times on ADE20k.

    Raises:
        `ValueError`: for a share or a number of levels out of range.
    """

    def __init__(self, share: float = 0.5, levels: int = 32):
        if not 0 < share <= 1:
            raise ValueError(f"`share` is {share}; it must be in (0, 1], such as 0.5 for half of the training.")
        if levels < 1:
            raise ValueError(f"`levels` is {levels}; it must be 1 or more, such as 32.")
        self.share = share
        self.levels = levels

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Sets the schedule of the coming step."""
        level = int(self.levels * state.global_step / (self.share * state.max_steps))
        model.set_pruning(curriculum_schedule(model.config, level / self.levels) if level < self.levels else None)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Back to the configured schedule, for evaluation and after the training."""
        model.set_pruning(None)
