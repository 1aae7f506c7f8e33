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

    def project(self, inputs: torch.Tensor, head_dim: int, *layers: nn.Module) -> tuple[torch.Tensor, ...]:
        """Outputs of linear layers with as many channels, by heads, for `inputs` (B, T, in features).

        They run one by one in training, in graphs, and where a layer is more than its product (quantised, adapted,
        hooked, offloaded) or its memory is somebody else's (shared by processes, gathered by FSDP or DeepSpeed).

        Returns:
            (B, heads, T, d) of each layer, where d is `head_dim`.
        """
        joint, batch_shape = self._joint_of(layers), inputs.shape[:2]
        if joint is None:
            return tuple(layer(inputs).view(*batch_shape, -1, head_dim).transpose(1, 2) for layer in layers)
        # (B, T, layers * D) -> (B, T, layers, heads, d) -> (layers, B, heads, T, d)
        outputs = F.linear(inputs, joint.matrix, joint.bias).view(*batch_shape, len(layers), -1, head_dim)
        return outputs.permute(2, 0, 3, 1, 4).unbind(0)

    def _joint_of(self, layers: tuple[nn.Module, ...]) -> JointWeights | None:
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or _has_any_global_hook()
        ):
            return None
        joint = self._joint
        if joint is None or not joint.is_valid(layers):
            joint = self._joint = JointWeights.of(layers)
        return joint

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        self._joint = None  # weights that move leave no copy behind
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_joint": None}


@dataclass
class JointWeights:
    """The weights of linear layers as one matrix, and their biases as one vector."""

    layers: tuple[nn.Module, ...]
    matrix: torch.Tensor  # (out features of all, in features)
    bias: torch.Tensor | None  # (out features of all,), zeros where a layer has none
    # Each weight and bias: the parameters of its layer, its name, it itself, and where it begins in memory.
    parts: list[tuple[dict[str, Any], str, nn.Parameter | None, int]]

    @classmethod
    def of(cls, layers: tuple[nn.Module, ...]) -> JointWeights | None:
        """Moves the weights of layers into one matrix; `None` where that cannot be, or may not."""
        if not all(_is_plain(layer) for layer in layers):
            return None
        weights: list[Any] = [layer.weight for layer in layers]
        biases: list[Any] = [layer.bias for layer in layers]
        if not _are_movable([*weights, *(bias for bias in biases if bias is not None)]):
            return None
        if len({weight.shape for weight in weights}) > 1:
            return None
        parts: list[tuple[dict[str, Any], str, nn.Parameter | None, int]] = []
        joined = []
        with torch.inference_mode(False), torch.no_grad():
            for name, tensors in {"weight": weights, "bias": biases}.items():
                zeros = weights[0].data.new_zeros(len(weights[0]))  # in place of a bias
                whole = torch.cat([zeros if tensor is None else tensor.data for tensor in tensors])
                for layer, tensor, part in zip(layers, tensors, whole.chunk(len(layers))):
                    if tensor is not None:
                        tensor.data = torch.from_dlpack(part)  # the same memory, as a storage of its own
                    # Of the part: another thread, which does the same, may have moved the tensor on.
                    parts.append((layer._parameters, name, tensor, part.data_ptr()))
                joined.append(whole if any(tensor is not None for tensor in tensors) else None)
        matrix, bias = joined
        assert matrix is not None
        return cls(layers, matrix, bias, parts)

    def is_valid(self, layers: tuple[nn.Module, ...]) -> bool:
        """Whether the layers are plain and their weights the parts of the matrix: not moved or replaced since."""
        if layers != self.layers:
            return False
        for parameters, name, parameter, place in self.parts:
            own = parameters.get(name)
            if own is not parameter or (own is not None and own.data_ptr() != place):
                return False
        return all(map(_is_plain, layers))


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer computes nothing but its product."""
    return type(layer) is nn.Linear and not (
        "forward" in layer.__dict__ or layer._forward_hooks or layer._forward_pre_hooks
    )


def _are_movable(weights: list[Any]) -> bool:
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
