"""What a call needs beside time: memory, operations; and what it ran on."""

import itertools
import os
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import transformers
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ..version import __version__


def saved_bytes(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """Bytes of activations that a forward pass keeps for the backward pass; parameters do not count."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would form a cycle with its graph, and stay in memory

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs).loss
    total = sum(size for pointer, size in saved.items() if pointer not in own)
    del loss  # until here the graph holds what was saved, so that no pointer occurs twice
    return total


def _profiler(*activities: ProfilerActivity, **kwargs: Any) -> Any:
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # otherwise every profile writes lines of its own to stderr
    return profile(activities=activities, **kwargs)


def peak_memory(call: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Bytes that a call allocates at its peak, beyond what was allocated before (weights, inputs)."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with _profiler(ProfilerActivity.CPU, profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate((size for _, size in changes), initial=0))


def operation_times(
    call: Callable[[], Any], device: torch.device | str = "cpu", kernels: bool = False
) -> dict[str, dict[str, float]]:
    """What one call spends its time on, by torch's profiler: milliseconds and calls by operation, longest first.

    With `kernels` what the operations launch on a CUDA device instead, by the names of the kernels; a CPU has none.
    """
    activities = [ProfilerActivity.CPU]
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        activities.append(ProfilerActivity.CUDA)
    # The profiler waits for the current device only.
    with torch.cuda.device(device) if on_gpu else nullcontext(), _profiler(*activities) as profiler:
        call()
    times: dict[str, dict[str, float]] = {}
    for event in profiler.key_averages():
        if (event.device_type != DeviceType.CPU) != kernels:
            continue  # the time of a kernel is also that of the operation that launched it
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total  # microseconds
        if spent > 0:
            times[event.key.removeprefix("aten::")] = {"ms": spent / 1000, "calls": event.count}
    return dict(sorted(times.items(), key=lambda item: -item[1]["ms"]))


def graphed(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """A call as a CUDA graph: its kernels without the time that the host needs to launch them."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # capture needs a warm-up on another stream
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            call()
    return graph.replay


def library_versions() -> dict[str, str]:
    """What ran, for records."""
    versions = {"cropr_hf": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {**versions, "python": platform.python_version()}


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Within it torch uses `count` CPU threads, as many as before for `None`.

    Raises:
        `ValueError`: for a count below 1.
    """
    before = torch.get_num_threads()
    if count is not None and count < 1:
        raise ValueError(f"`threads` is {count}; give 1 or more, or None for the {before} that torch uses.")
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compiled(model: torch.nn.Module, is_detector: bool) -> Callable[..., Any]:
    """A model for `torch.compile` to compile when it is called.

    What a detector computes depends on the image, so that it breaks into several graphs, some for any number of boxes.
    Others are one graph for one size: torch would compile them for any size once it saw a smaller image.
    """
    return torch.compile(model, fullgraph=not is_detector, dynamic=None if is_detector else False)


def machine_name(device: torch.device) -> str:
    """The GPU, or the CPU and the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):  # Linux, where the platform module knows the instruction set only
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            models = re.findall(r"^model name\s*: (.+)$", file.read(), flags=re.MULTILINE)
        name = models[0] if models else name
    return f"{name}, {torch.get_num_threads()} threads"
