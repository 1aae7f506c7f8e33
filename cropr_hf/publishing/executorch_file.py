"""Programs for ExecuTorch (`.pte`), which runs on phones: by XNNPACK, and by portable kernels what it has not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def check_executorch() -> None:
    """Raises `ImportError` where it is not installed."""
    try:
        import executorch.runtime  # noqa: F401
    except ImportError as error:
        raise ImportError("A .pte file needs ExecuTorch: pip install executorch") from error


def write_executorch(
    program: torch.export.ExportedProgram, path: Path
) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    """Writes a program whose shapes are all fixed; returns what runs the file."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    aten = torch.ops.aten
    # Nothing else is decomposed here: the partitioner looks for layers as torch has them.
    sorting: dict[Any, Callable[..., Any]] = {
        aten.sort.stable: _sort,
        aten.sort.default: _sort,
        aten.argsort.stable: _argsort,
        aten.argsort.default: _argsort,
    }
    program = program.run_decompositions(sorting)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    path.write_bytes(lowered.to_executorch().buffer)
    method = Runtime.get().load_program(path).load_method("forward")
    return lambda pixel_values: [*method.execute([pixel_values])]


def _sort(
    values: torch.Tensor, dim: int = -1, descending: bool = False, *, stable: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stable sorting, which ExecuTorch does not have, by counting: the place of a value is how many come before it."""
    values = values.movedim(dim, -1)
    own, other = values.unsqueeze(-1), values.unsqueeze(-2)  # (..., N, 1) and (..., 1, N)
    places = torch.arange(values.shape[-1], device=values.device)
    wins = other > own if descending else other < own
    ranks = (wins | (other == own) & (places < places.unsqueeze(-1))).sum(dim=-1)  # (..., N)
    order = torch.zeros_like(ranks).scatter(-1, ranks, places.expand_as(ranks))
    return values.gather(-1, order).movedim(-1, dim), order.movedim(-1, dim)


def _argsort(values: torch.Tensor, dim: int = -1, descending: bool = False, *, stable: bool = True) -> torch.Tensor:
    return _sort(values, dim, descending)[1]
