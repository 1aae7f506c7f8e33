"""What becomes of torch operators that ONNX has no counterpart of, or that a runtime has not."""

from collections.abc import Callable
from typing import Any

import torch


def operators(for_web: bool) -> dict[Any, Callable[..., Any]]:
    """The `custom_translation_table` of `torch.onnx.export`.

    With `for_web` indices are float32 numbers until something is gathered by them, and sorting is counting: ONNX
    Runtime has neither int64 nor `TopK` on WebGPU, and would fetch scores from the GPU in each module.
    """
    aten = torch.ops.aten
    table: dict[Any, Callable[..., Any]] = {aten._cdist_forward.default: _distances}
    if not for_web:
        return table | {aten.sort.stable: _stable_sort}
    return table | {
        aten.sort.stable: _sort_by_counting,
        aten.sort.default: _sort_by_counting,
        aten.gather.default: _gather,
        aten.index_select.default: _index_select,
        aten.scatter.value: _scatter_value,
    }


def _stable_sort(values: Any, *, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """In ONNX the top k of all, which takes the lower index first of equal values."""
    from onnxscript import opset20

    length = opset20.Shape(values, start=dim) if dim == -1 else opset20.Shape(values, start=dim, end=dim + 1)
    return opset20.TopK(values, length, axis=dim, largest=descending, sorted=True)


def _distances(left: Any, right: Any, p: float, compute_mode: int | None = None) -> Any:
    """Euclidean distances, (B, N, D) and (B, M, D) -> (B, N, M), by products, as torch has them for many vectors."""
    from onnxscript import opset20

    if p != 2:
        raise ValueError(f"`torch.cdist` with p = {p} has no translation to ONNX; use 2, or a `.pt2` file.")
    last: Any = [-1]  # the library's annotation allows tensors alone
    of_left = opset20.ReduceSumSquare(left, last, keepdims=1)
    of_right = opset20.Transpose(opset20.ReduceSumSquare(right, last, keepdims=1), perm=[0, 2, 1])
    products = opset20.MatMul(left, opset20.Transpose(right, perm=[0, 2, 1]))
    return opset20.Sqrt(opset20.Relu(of_left + of_right - (products + products)))


# On the web. Numbers of tokens are far below 2 ** 24, up to which float32 has all integers.

FLOAT, INT32 = 1, 6  # of `onnx.TensorProto`, which only those have who export


def _sort_by_counting(values: Any, dim: int = -1, descending: bool = False, *, stable: bool = True) -> Any:
    """Stable sorting of (B, N) along N, or along 1: the place of a value is the number of those before it."""
    from onnxscript import opset20

    if dim not in (1, -1):
        raise ValueError(f"Sorting along dimension {dim} has no translation for the web; leave `for_web` out.")
    values = opset20.Cast(values, to=FLOAT)
    own, other = opset20.Unsqueeze(values, [2]), opset20.Unsqueeze(values, [1])  # (B, N, 1) and (B, 1, N)
    length = opset20.Squeeze(opset20.Shape(values, start=1, end=2), [0])
    places = opset20.Cast(
        opset20.Range(opset20.Constant(value_int=0), length, opset20.Constant(value_int=1)), to=FLOAT
    )
    rows, columns = opset20.Unsqueeze(places, [0, 2]), opset20.Unsqueeze(places, [0, 1])  # (1, N, 1) and (1, 1, N)
    wins = opset20.Greater(other, own) if descending else opset20.Less(other, own)
    ties = opset20.And(opset20.Equal(other, own), opset20.Less(columns, rows))
    before = opset20.Cast(wins, to=FLOAT) + opset20.Cast(ties, to=FLOAT)
    ranks = opset20.ReduceSum(before, [2], keepdims=0)  # (B, N)
    # Row r has a one at the value of rank r.
    chosen = opset20.Cast(opset20.Equal(opset20.Unsqueeze(ranks, [1]), rows), to=FLOAT)  # (B, N, N)
    order = opset20.Squeeze(opset20.MatMul(chosen, opset20.Unsqueeze(places, [1])), [2])
    return opset20.GatherElements(values, opset20.Cast(order, to=INT32), axis=1), order


def _gather(data: Any, dim: int, index: Any, sparse_grad: bool = False) -> Any:
    from onnxscript import opset20

    return opset20.GatherElements(opset20.Cast(data, to=FLOAT), opset20.Cast(index, to=INT32), axis=dim)


def _index_select(data: Any, dim: int, index: Any) -> Any:
    from onnxscript import opset20

    return opset20.Gather(data, opset20.Cast(index, to=INT32), axis=dim)


def _scatter_value(data: Any, dim: int, index: Any, value: float) -> Any:
    from onnxscript import opset20

    index = opset20.Cast(index, to=INT32)
    values = opset20.Expand(opset20.Constant(value_float=float(value)), opset20.Shape(index))
    return opset20.ScatterElements(opset20.Cast(data, to=FLOAT), index, values, axis=dim)
