"""Exported files, timed side by side as they are shipped: what ONNX Runtime takes for one, as a ratio to another."""

import os
from pathlib import Path
from typing import Any

import torch

from .instruments import library_versions, machine_name
from .timing import check_rounds, compare


FILE, REFERENCE = "file", "reference"
PIXELS = "tensor(float)"


def compare_files(
    file: str | os.PathLike,
    reference: str | os.PathLike,
    batch_size: int = 8,
    min_rounds: int = 7,
    max_rounds: int = 40,
    tolerance: float = 0.01,
) -> dict[str, Any]:
    """Times an ONNX file against another, such as a pruned model against the unpruned one, on the same random pixels.

    Both run on the CPU, with as many threads as torch uses.

    Args:
        file, reference: with one input, float32 pixels (B, channels, height, width) of the same size; B is free, or
            `batch_size`.
        batch_size: images per call.
        min_rounds, max_rounds, tolerance: of the timing, see `cropr_hf.speed.timing.compare`.

    Returns:
        A record that `json` can write: machine, versions, `batch_size`, the `input` without the batch, the number of
        `rounds`, and `results` of `REFERENCE` and `FILE`. Each has `name` and `bytes` of its file, and what
        `Timing.record` says.

    Raises:
        `ValueError`: for a file that is not there or is not ONNX, for inputs that differ or are not such pixels, for
            another batch size than a file takes, and for rounds that make no sense.
        `ImportError`: without ONNX Runtime.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("ONNX files need ONNX Runtime: pip install 'cropr_hf[export]'") from error
    check_rounds(min_rounds, max_rounds, tolerance)
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}; it must be 1 or more.")
    paths = {REFERENCE: Path(reference), FILE: Path(file)}
    sessions = {name: _open(path) for name, path in paths.items()}
    inputs = {name: _input(session, paths[name], batch_size) for name, session in sessions.items()}
    if inputs[FILE] != inputs[REFERENCE]:
        raise ValueError(
            f"The inputs differ: {file} takes {inputs[FILE]}, {reference} takes {inputs[REFERENCE]}; export both for "
            "images of one size."
        )
    input_name, shape = inputs[FILE]
    pixels = torch.randn(batch_size, *shape, generator=torch.Generator().manual_seed(0)).numpy()
    calls = {name: lambda run=session.run: run(None, {input_name: pixels}) for name, session in sessions.items()}
    timings = compare(calls, REFERENCE, min_rounds, max_rounds, tolerance)
    return {
        "machine": machine_name(torch.device("cpu")),
        "versions": library_versions() | {"onnxruntime": onnxruntime.__version__},
        "batch_size": batch_size,
        "input": {input_name: shape},
        "rounds": len(timings[FILE].seconds),
        "results": {
            name: {"name": paths[name].name, "bytes": _size(paths[name]), **timing.record(batch_size)}
            for name, timing in timings.items()
        },
    }


def _open(path: Path) -> Any:
    import onnxruntime

    if not path.is_file():
        raise ValueError(f"{path} is not a file; name one that `cropr-hf export` wrote.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no class in common
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} cannot be run as an ONNX file ({reason}); export it again.") from error


def _input(session: Any, path: Path, batch_size: int) -> tuple[str, list[int]]:
    """Name and shape (channels, height, width) of the pixels."""
    inputs = session.get_inputs()
    described = ", ".join(f"{each.name}: {each.type} {each.shape}" for each in inputs)
    if len(inputs) != 1 or inputs[0].type != PIXELS or len(inputs[0].shape) != 4:
        raise ValueError(f"{path} takes {described}; it must be one float32 tensor of pixels with four dimensions.")
    batch, *shape = inputs[0].shape
    if not all(isinstance(length, int) for length in shape):
        raise ValueError(f"{path} takes {described}, images of any size; export it for one size.")
    if isinstance(batch, int) and batch != batch_size:
        raise ValueError(f"{path} takes {batch} images per call, not {batch_size}; pass `batch_size` {batch}.")
    return inputs[0].name, shape


def _size(path: Path) -> int:
    """Bytes of a file, with the weights that may lie beside it."""
    weights = path.with_name(f"{path.name}.data")
    return sum(part.stat().st_size for part in (path, weights) if part.is_file())
