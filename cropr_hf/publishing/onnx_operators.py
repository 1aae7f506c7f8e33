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
        return table | {aten.sort.stable: _stable_sort, aten.matmul.default: _product}
    return table | {
        aten.sort.stable: _sort_by_counting,
        aten.sort.default: _sort_by_counting,
        aten.gather.default: _gather,
        aten.index_select.default: _index_select,
        aten.scatter.value: _scatter_value,
    }


def _opset() -> Any:
    """The operators; only those have the library who export."""
    from onnxscript import opset20

    return opset20


def _stable_sort(values: Any, *, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """In ONNX the top k of all, which takes the lower index first of equal values."""
    op = _opset()
    length = op.Shape(values, start=dim) if dim == -1 else op.Shape(values, start=dim, end=dim + 1)
    return op.TopK(values, length, axis=dim, largest=descending, sorted=True)


def _product(left: Any, right: Any) -> Any:
    """With a vector (D,) as with a matrix (D, 1): OpenVINO 2026.4 stops at the negative of a product with a vector."""
    op = _opset()
    if len(right.shape) != 1:
        return op.MatMul(left, right)
    return op.Squeeze(op.MatMul(left, op.Unsqueeze(right, [1])), [-1])


def _distances(left: Any, right: Any, p: float, compute_mode: int | None = None) -> Any:
    """Euclidean distances, (B, N, D) and (B, M, D) -> (B, N, M), by products, as torch has them for many vectors."""
    op = _opset()
    if p != 2:
        raise ValueError(f"`torch.cdist` with p = {p} has no translation to ONNX; use 2, or a `.pt2` file.")
    of_left = op.ReduceSumSquare(left, [-1], keepdims=1)
    of_right = op.Transpose(op.ReduceSumSquare(right, [-1], keepdims=1), perm=[0, 2, 1])
    products = op.MatMul(left, op.Transpose(right, perm=[0, 2, 1]))
    return op.Sqrt(op.Relu(of_left + of_right - (products + products)))


# On the web. Numbers of tokens are far below 2 ** 24, up to which float32 has all integers.

FLOAT, INT32 = 1, 6  # of `onnx.TensorProto`


def _sort_by_counting(values: Any, dim: int = -1, descending: bool = False, *, stable: bool = True) -> Any:
    """Stable sorting of (B, N) along N, or along 1: the place of a value is the number of those before it."""
    op = _opset()
    if dim not in (1, -1):
        raise ValueError(f"Sorting along dimension {dim} has no translation for the web; leave `for_web` out.")
    values = op.Cast(values, to=FLOAT)
    own, other = op.Unsqueeze(values, [2]), op.Unsqueeze(values, [1])  # (B, N, 1) and (B, 1, N)
    length = op.Squeeze(op.Shape(values, start=1, end=2), [0])
    places = op.Cast(op.Range(op.Constant(value_int=0), length, op.Constant(value_int=1)), to=FLOAT)
    rows, columns = op.Unsqueeze(places, [0, 2]), op.Unsqueeze(places, [0, 1])  # (1, N, 1) and (1, 1, N)
    wins = op.Greater(other, own) if descending else op.Less(other, own)
    ties = op.And(op.Equal(other, own), op.Less(columns, rows))
    before = op.Cast(wins, to=FLOAT) + op.Cast(ties, to=FLOAT)
    ranks = op.ReduceSum(before, [2], keepdims=0)  # (B, N)
    # Row r has a one at the value of rank r.
    chosen = op.Cast(op.Equal(op.Unsqueeze(ranks, [1]), rows), to=FLOAT)  # (B, N, N)
    order = op.Squeeze(op.MatMul(chosen, op.Unsqueeze(places, [1])), [2])
    return op.GatherElements(values, op.Cast(order, to=INT32), axis=1), order


def _gather(data: Any, dim: int, index: Any, sparse_grad: bool = False) -> Any:
    op = _opset()
    return op.GatherElements(op.Cast(data, to=FLOAT), op.Cast(index, to=INT32), axis=dim)


def _index_select(data: Any, dim: int, index: Any) -> Any:
    op = _opset()
    return op.Gather(data, op.Cast(index, to=INT32), axis=dim)


def _scatter_value(data: Any, dim: int, index: Any, value: float) -> Any:
    op = _opset()
    index = op.Cast(index, to=INT32)
    values = op.Expand(op.Constant(value_float=float(value)), op.Shape(index))
    return op.ScatterElements(op.Cast(data, to=FLOAT), index, values, axis=dim)
