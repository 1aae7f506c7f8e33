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
"""Linear layers of the same input as one product, in inference: queries, keys and values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook


class SharedInput(nn.Module):
    """Base of modules whose linear layers have the same input, so that in inference one product computes them.

    It needs the weights side by side in memory, where the first call puts them. They stay parameters, each with a
    storage of its own (what saves weights takes those of a common storage for one), but are parts of the one matrix:
    nothing is held twice, and what changes them changes it.
    """

    _joint: JointWeights | None = None

    def project(self, inputs: torch.Tensor, *layers: nn.Module) -> tuple[torch.Tensor, ...]:
        """Outputs (..., out features) of each linear layer for `inputs` (..., in features).

        They run one by one in training, in graphs, and where a layer is more than its product (quantised, adapted,
        hooked, offloaded) or its memory is somebody else's (shared by processes, gathered by FSDP or DeepSpeed).
        """
        in_graph = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if torch.is_grad_enabled() or in_graph or _has_any_global_hook():
            return tuple(layer(inputs) for layer in layers)
        joint = self._joint
        if joint is None or not joint.is_valid(layers):
            joint = self._joint = JointWeights.of(layers)
        return tuple(layer(inputs) for layer in layers) if joint is None else joint.product(inputs, layers)

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        self._joint = None  # weights that move leave no copy behind
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_joint": None}


@dataclass
class JointWeights:
    """The weights of linear layers as one matrix."""

    weights: tuple[nn.Parameter, ...]
    matrix: torch.Tensor  # (out features of all, in features)
    sizes: list[int]
    places: list[int]  # where each weight begins in memory

    @classmethod
    def of(cls, layers: tuple[nn.Module, ...]) -> JointWeights | None:
        """Moves the weights of layers into one matrix; `None` where that cannot be, or may not."""
        if not all(_is_plain(layer) for layer in layers):
            return None
        weights: tuple[Any, ...] = tuple(layer.weight for layer in layers)
        if not _are_movable(weights):
            return None
        sizes = [len(weight) for weight in weights]
        with torch.inference_mode(False), torch.no_grad():
            matrix = torch.cat([weight.data for weight in weights])
            parts = matrix.split(sizes)
            for weight, part in zip(weights, parts):
                weight.data = torch.from_dlpack(part)  # the same memory, as a storage of its own
        # Of the parts: another thread, which does the same, may have moved the weights on.
        return cls(weights, matrix, sizes, [part.data_ptr() for part in parts])

    def is_valid(self, layers: tuple[nn.Module, ...]) -> bool:
        """Whether the layers are plain and their weights the parts of the matrix: not moved or replaced since."""
        for layer, weight, place in zip(layers, self.weights, self.places):
            if layer._parameters.get("weight") is not weight or weight.data_ptr() != place or not _is_plain(layer):
                return False
        return True

    def product(self, inputs: torch.Tensor, layers: tuple[nn.Module, ...]) -> tuple[torch.Tensor, ...]:
        """The outputs of the layers."""
        biases: list[Any] = [layer._parameters["bias"] for layer in layers]
        bias = None
        if any(own is not None for own in biases):
            zeros = self.matrix.new_zeros
            bias = torch.cat([zeros(size) if own is None else own for own, size in zip(biases, self.sizes)])
        return F.linear(inputs, self.matrix, bias).split_with_sizes(self.sizes, dim=-1)


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer computes nothing but its product."""
    return type(layer) is nn.Linear and not (
        "forward" in layer.__dict__ or layer._forward_hooks or layer._forward_pre_hooks
    )


def _are_movable(weights: tuple[Any, ...]) -> bool:
    """Whether weights are plain parameters, alike, in memory of which nobody else has a pointer."""
    first = weights[0]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False
    for weight in weights:
        if type(weight) is not nn.Parameter or weight.is_inference() or not weight.is_contiguous():
            return False  # quantised, distributed, fake, ...
        if weight.dtype != first.dtype or weight.device != first.device:
            return False
    if first.device.type == "cuda":
        return not torch.cuda.is_current_stream_capturing()
    return first.device.type == "cpu" and not any(weight.is_shared() for weight in weights)
