# Copyright 2026 The cropr_hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Token counts as arithmetic: how many patch tokens a method leaves after each block, and how they tile into windows.

No torch here: a configuration, a benchmark and a model card count alike. A *method* below is a `TokenReducer` class,
of which only the class methods that count are called: `blocks`, `blocks_of_schedule`, `kept_by_rate`,
`kept_by_default` and `reachable_counts`.

Symbols: L blocks, numbered from 1.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any


CURRICULUM_MULTIPLE = 8  # of the sequence lengths on the way to the final schedule

Pruning = int | Sequence[int] | None  # a rate, a schedule, or what is configured


def kept_patches(config: Any, method: Any, num_patches: int | None = None, pruning: Pruning = None) -> list[int]:
    """Patch tokens left after each of the L blocks, before pruned tokens are put back.

    Every part of the project that needs token counts (model, benchmark, cards) calls this function.

    Args:
        config: a `CroprViTConfig`.
        method: of the configuration, or `None` for a model that does not prune.
        num_patches: patch tokens of the input; those of `config.image_size` by default.
        pruning: a rate or a schedule instead of the configured one, as `set_pruning` takes it.

    Raises:
        `ValueError`: when the schedule leaves no patch, increases, does not have L entries, keeps more tokens than the
            input has, or falls after a block that has no module; and what the method raises.
    """
    num_patches = config.num_patches if num_patches is None else num_patches
    if pruning is None:
        pruning = config.pruning_rate if config.pruning_schedule is None else config.pruning_schedule
    if method is None:
        return [num_patches] * config.num_hidden_layers
    if pruning is None:
        kept = method.kept_by_default(config, num_patches)
    elif isinstance(pruning, int):
        if pruning < 0:
            raise ValueError(f"The pruning rate is {pruning}; it must be 0 or more patch tokens per module.")
        kept = method.kept_by_rate(config, num_patches, pruning)
    else:
        kept = _kept_by_schedule(num_patches, list(pruning), config.num_hidden_layers, pruning_blocks(config, method))
    reached = method.reachable_counts(config, num_patches, kept)
    for block, (wanted, possible) in enumerate(zip(kept, reached), start=1):
        if wanted != possible:
            raise ValueError(
                f"The pruning schedule keeps {wanted} patch tokens after block {block}, but {method.label} can only "
                f"leave {possible} there; keep more, or spread the pruning over more blocks."
            )
    return kept


def pruning_blocks(config: Any, method: Any) -> list[int]:
    """Blocks that have a module; which parameters exist depends on it, not on the rate."""
    if method is None:
        return []
    if config.pruning_schedule is None:
        return method.blocks(config)
    before = [config.num_patches, *config.pruning_schedule]
    falls = [block for block, kept in enumerate(config.pruning_schedule, start=1) if kept < before[block - 1]]
    return method.blocks_of_schedule(config, falls)


def entering_patches(kept: Sequence[int], num_patches: int, fusion: bool) -> list[int]:
    """Patch tokens that each block works on, from those left after each; fusion gives the last block all of them."""
    entering = [num_patches, *kept[:-1]]
    if fusion:
        entering[-1] = num_patches
    return entering


def check_pruning(config: Any, method: Any) -> None:
    """Raises `ValueError` for pruning that is impossible at `config.image_size`."""
    blocks = method.blocks(config)
    fusion = " with last layer fusion" if config.last_layer_fusion else ""
    if not blocks:
        raise ValueError(
            f"{config.num_hidden_layers} blocks leave no block to prune after{fusion}; use more blocks or "
            "`token_reducer=None`."
        )
    schedule = config.pruning_schedule
    if schedule is not None and len(schedule) == config.num_hidden_layers and schedule[0] > config.num_patches:
        raise ValueError(
            f"The pruning schedule keeps {schedule[0]} patch tokens after block 1, but `image_size` "
            f"{config.image_size} has only {config.num_patches}."
        )
    kept = kept_patches(config, method)
    if config.pruning_rate and kept[-1] == config.num_patches:
        raise ValueError(
            f"`token_multiple` {config.token_multiple} rounds what a pruning rate of {config.pruning_rate} leaves up "
            f"to all {config.num_patches} patch tokens; use a higher rate or a smaller multiple."
        )
    if schedule is not None:
        falls = pruning_blocks(config, method)
        if not falls or falls[-1] > blocks[-1]:
            reason = " (last layer fusion needs a block before the last)" if config.last_layer_fusion else ""
            raise ValueError(
                f"The pruning schedule {list(schedule)} prunes after the blocks {falls}; it must prune at least once, "
                f"and last after block {blocks[-1]} of {config.num_hidden_layers}{reason}."
            )


def kept_by_constant_rate(config: Any, blocks: Sequence[int], num_patches: int, rate: int) -> list[int]:
    """The schedule of the paper: `rate` patch tokens fewer after each of `blocks`; see `align_first_module`."""
    aligned = config.align_first_module and config.use_cls_token
    kept, remaining = [], num_patches
    for block in range(1, config.num_hidden_layers + 1):
        if block in blocks:
            remaining -= rate + (aligned and rate > 0 and block == blocks[0])
        kept.append(remaining)
    if remaining < 1:
        limit = max(num_patches - 1 - aligned, 0) // len(blocks)
        raise ValueError(
            f"A pruning rate of {rate} at {len(blocks)} modules leaves {remaining} of {num_patches} patch tokens; at "
            f"least 1 must stay: use a rate of at most {limit} or a larger image."
        )
    return round_up(config, kept, num_patches)


def kept_by_steps(config: Any, method: Any, num_patches: int, leave: Callable[[int, int], int]) -> list[int]:
    """The schedule of a method that says at each of its blocks how many patch tokens it leaves there; see `round_up`.

    Args:
        leave: of the patch tokens that are left, and of the number of its blocks before.
    """
    blocks, kept, left = pruning_blocks(config, method), [], num_patches
    for block in range(1, config.num_hidden_layers + 1):
        if block in blocks:
            left = leave(left, blocks.index(block))
        kept.append(left)
    return round_up(config, kept, num_patches)


def round_up(config: Any, kept: Sequence[int], num_patches: int) -> list[int]:
    """The counts, raised so that sequence lengths, prefix included, are multiples of `config.token_multiple`."""
    multiple, prefix = config.token_multiple, config.num_prefix_tokens
    return [min(-(-(entry + prefix) // multiple) * multiple - prefix, num_patches) for entry in kept]


def halved_at_most(num_patches: int, kept: Sequence[int]) -> list[int]:
    """The counts nearest to `kept` where no step removes more than half: of two tokens that are compared one stays."""
    reached, left = [], num_patches
    for wanted in kept:
        left = max(wanted, left - left // 2)
        reached.append(left)
    return reached


def _kept_by_schedule(num_patches: int, schedule: list[int], num_blocks: int, blocks: Sequence[int]) -> list[int]:
    if len(schedule) != num_blocks:
        raise ValueError(f"The pruning schedule has {len(schedule)} entries; it needs one per block, {num_blocks}.")
    if any(later > earlier for earlier, later in pairwise(schedule)):
        raise ValueError(f"The pruning schedule {schedule} increases; pruned tokens cannot come back.")
    if schedule[-1] < 1:
        raise ValueError(f"The pruning schedule {schedule} leaves no patch token; keep at least 1.")
    kept, remaining = [], num_patches
    for block, entry in enumerate(schedule, start=1):
        if block in blocks:
            if entry > remaining:
                raise ValueError(
                    f"The pruning schedule keeps {entry} patch tokens after block {block}, but the input has only "
                    f"{remaining} there; use a larger image, or `set_pruning` with a schedule for this size."
                )
            remaining = entry
        elif block > 1 and entry < schedule[block - 2]:
            raise ValueError(
                f"The pruning schedule {schedule} falls after block {block}, where there is no module; modules follow "
                f"the blocks {list(blocks)}."
            )
        kept.append(remaining)
    return kept


def schedule_from_sides(
    num_hidden_layers: int,
    num_patches: int,
    blocks: Sequence[int] = (5, 8, 11, 14, 20),
    sides: Sequence[int] = (80, 64, 48, 32, 16),
) -> list[int]:
    """A `pruning_schedule` that leaves squares of patches; they tile into windows whose size divides the sides.

    The defaults are the schedule of the paper for EVA-02-L at 1536 pixels: 96 x 96 patches, of which 97 % are pruned.

    Args:
        num_hidden_layers: blocks L of the model.
        num_patches: before pruning.
        blocks: ascending numbers (1 to L) of the blocks to prune after.
        sides: side of the square of patches that is left after each of them.

    Raises:
        `ValueError`: when there are not as many sides as blocks, or blocks do not ascend within 1 to L.
    """
    if len(blocks) != len(sides):
        raise ValueError(f"There are {len(blocks)} blocks but {len(sides)} sides; give one side per block.")
    if list(blocks) != sorted(set(blocks)) or not all(1 <= block <= num_hidden_layers for block in blocks):
        raise ValueError(f"The blocks are {list(blocks)}; they must ascend within 1 to {num_hidden_layers}.")
    kept = dict(zip(blocks, sides))
    schedule = []
    for block in range(1, num_hidden_layers + 1):
        num_patches = kept[block] ** 2 if block in kept else num_patches
        schedule.append(num_patches)
    return schedule


def curriculum_schedule(config: Any, progress: float) -> list[int]:
    """Patch tokens kept after each block when pruning is a share of what is configured, for `set_pruning`.

    Below the configured pruning, the tokens after a block, prefix included, are all of them or a multiple of 8,
    rounded up: kernels like such lengths, and there are few different ones. Where the final schedule leaves whole
    windows of windowed attention, they are squares of windows.

    Args:
        config: a `CroprViTConfig`; its schedule at `image_size` is the final one.
        progress: in [0, 1], where 0 keeps every token and 1 is the final schedule.

    Raises:
        `ValueError`: for a progress out of range.
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"`progress` is {progress}; it must be in [0, 1], such as 0.5 for half of the pruning.")
    final, all_patches, prefix = config.kept_patches(), config.num_patches, config.num_prefix_tokens
    if progress == 1:
        return final
    window = config.window_size**2
    tiles = window > 0 and all(kept % window == 0 for kept in final if kept < all_patches)
    schedule = []
    for kept in final:
        patches = kept + (1.0 - progress) * (all_patches - kept)
        if tiles:
            rounded = (math.ceil(math.sqrt(patches) / config.window_size) * config.window_size) ** 2
        else:
            rounded = math.ceil((prefix + patches) / CURRICULUM_MULTIPLE) * CURRICULUM_MULTIPLE - prefix
        schedule.append(min(rounded, all_patches))
    return schedule


def window_grid(window_size: int, num_patches: int, grid_size: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of the tokens that windowed attention cuts into windows; `None` where it is global.

    Pruned tokens are laid out on the grid of whole windows whose shape is nearest to that of the image. Where even
    that is more than four times as long or as high, windows would be strips, and attention is global.

    Args:
        window_size: side of a window in patches.
        num_patches: patch tokens in the sequence there.
        grid_size: rows and columns of the patches before pruning.
    """
    rows, columns = grid_size
    if num_patches == rows * columns:
        return grid_size
    windows = num_patches // window_size**2
    if windows * window_size**2 != num_patches:
        return None
    nearest, down = float("inf"), 1
    for count in range(1, windows + 1):
        height, width = count * columns, windows // count * rows  # in units that make them equal for the image
        stretch = max(height, width) / min(height, width)
        if windows % count == 0 and stretch < nearest:
            nearest, down = stretch, count
    return (down * window_size, windows // down * window_size) if nearest <= 4 else None
