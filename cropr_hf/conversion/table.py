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
"""The engine of a conversion: a table of names, three steps on tensors, and an audit that nothing is left over."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

from ..configuration_cropr_vit import CroprViTConfig
from ..token_state import resample_grid


Weights = dict[str, torch.Tensor]

# A pattern for the whole name in the source, and the name in `CroprViTModel` (or `classifier.*`) that it becomes.
# Several names: the tensor holds that many of ours, stacked along its first dimension.
Rule = tuple[str, str | tuple[str, ...]]

CLS_TOKEN = "embeddings.cls_token"
REGISTER_TOKENS = "embeddings.register_tokens"
POSITIONS = "embeddings.position_embeddings"
ROTATED = re.compile(r"layers\.\d+\.attention\.[qk]_proj\.(weight|bias)")
PATCH_KERNEL = "embeddings.patch_embeddings.weight"
NAMES_SHOWN = 8


@dataclass(frozen=True)
class SourceDescription:
    """What has to be known about one source model.

    Attributes:
        fields: the `CroprViTConfig` fields that describe it.
        rules: the first one whose pattern matches a name applies.
        dropped: patterns of names that the target has no place for.
        prefix: what stands before the names of the backbone when the source has a task head.
        interleaved_rotary: whether the rotation pairs the channels (2 i, 2 i + 1) instead of (i, i + d / 2).
        column_first_rotary: whether the first half of the pairs turns with the column instead of the row.
        labels: `num_labels` of its classifier, and `id2label` and the like where known; empty without a classifier.
    """

    fields: dict[str, Any]
    rules: tuple[Rule, ...]
    dropped: tuple[str, ...] = ()
    prefix: str = ""
    interleaved_rotary: bool = False
    column_first_rotary: bool = False
    labels: dict[str, Any] = field(default_factory=dict)

    def drops(self, name: str) -> bool:
        """Whether the source weight `name` is on the list of those that are left behind."""
        return any(re.fullmatch(pattern, name.removeprefix(self.prefix)) for pattern in self.dropped)

    def targets(self, name: str) -> tuple[str, ...]:
        """What the source weight `name` becomes; empty when no rule knows it."""
        for pattern, templates in self.rules:
            if match := re.fullmatch(pattern, name.removeprefix(self.prefix)):
                templates = (templates,) if isinstance(templates, str) else templates
                return tuple(match.expand(template) for template in templates)
        return ()


def convert_weights(
    source: Mapping[str, torch.Tensor], description: SourceDescription, config: CroprViTConfig
) -> Weights:
    """Weights of `CroprViTModel` (without a prefix), and of the classifier, from those of the source.

    Args:
        source: the whole state dict of the source.
        description: describes the source; `description.fields["image_size"]` is the image size of its position table.
        config: describes the target; patch kernels are resampled to its `patch_size`, and the position table to its
            grid of patches; prefix tokens, a final norm, and pooling layers that it does not have are left out.

    Raises:
        `ValueError`: when a source weight is neither used nor on the list of dropped ones.
    """
    weights = rename_weights(source, description)
    for name in (CLS_TOKEN, POSITIONS):  # (D,) and (tokens, D) in CLIP
        if name in weights:
            weights[name] = weights[name].view(1, -1, weights[name].shape[-1])
    steps = (
        (description.interleaved_rotary, half_rotary_layout),
        (description.column_first_rotary, rows_first_layout),
    )
    for is_needed, change_layout in steps:
        weights |= {
            name: change_layout(tensor, config.num_attention_heads)
            for name, tensor in weights.items()
            if is_needed and ROTATED.fullmatch(name) and len(tensor) == config.hidden_size  # the audit reports others
        }
    native = CroprViTConfig(**description.fields, token_reducer=None)
    fold_prefix_positions(weights, native.num_patches)
    table = weights.get(POSITIONS)
    if table is not None and table.shape[1] == native.num_patches and native.grid_size != config.grid_size:
        weights[POSITIONS] = resample_grid(table, native.grid_size, config.grid_size, config.interpolate_antialias)
    kept = {
        CLS_TOKEN: config.use_cls_token,
        REGISTER_TOKENS: config.num_register_tokens > 0,
        "layernorm": config.use_final_norm,
        "pooler": config.pooling == "attention",
        "visual_projection": config.projection_dim is not None,
    }
    weights = {
        name: tensor
        for name, tensor in weights.items()
        if kept.get(name, True) and kept.get(name.partition(".")[0], True)
    }
    kernel = weights.get(PATCH_KERNEL)
    if kernel is not None and kernel.shape[-1] == native.patch_size and native.patch_size != config.patch_size:
        weights[PATCH_KERNEL] = resample_patch_kernel(kernel, config.patch_size)
    return weights


def resample_patch_kernel(kernel: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Kernels of the patch embedding for patches of another size (FlexiViT, arXiv 2212.08013, section 3.4).

    An enlarged patch under the new kernel gives what the patch gave under the old one: with B the matrix that resizes
    patches (bicubic, smoothed when it shrinks), old and new kernel satisfy w_old = Bᵀ w_new, which the pseudoinverse
    of Bᵀ solves.

    Args:
        kernel: (D, channels, old size, old size)

    Returns:
        (D, channels, patch_size, patch_size), in the dtype of `kernel`, computed in float64.
    """
    old_size = kernel.shape[-1]
    pixels = torch.eye(old_size**2, dtype=torch.float64).view(-1, 1, old_size, old_size)
    resized = F.interpolate(pixels, size=(patch_size, patch_size), mode="bicubic", antialias=True)
    # Row i of `resized` is what pixel i of an old patch becomes: (old pixels, new pixels) = Bᵀ
    inverse = torch.linalg.pinv(resized.flatten(1))
    # (D, channels, old pixels) x (old pixels, new pixels) -> (D, channels, new size, new size)
    resampled = kernel.cpu().double().flatten(2) @ inverse.T
    return resampled.unflatten(2, (patch_size, patch_size)).to(kernel)


def rename_weights(source: Mapping[str, torch.Tensor], description: SourceDescription) -> Weights:
    """Applies the table; see `convert_weights`."""
    weights: Weights = {}
    unused = []
    for name, tensor in source.items():
        # DINOv3 without registers stores a tensor of no registers.
        if description.drops(name) or tensor.numel() == 0:
            continue
        targets = description.targets(name)
        if not targets or any(target in weights for target in targets):
            unused.append(name)
            continue
        weights |= dict(zip(targets, tensor.detach().chunk(len(targets))))
    if unused:
        raise ValueError(
            f"The source has weights that the conversion does not know: {_listed(unused)}. It is a variant of the "
            "family that is not supported, or has extra parts; remove them, or convert the plain model."
        )
    return weights


def half_rotary_layout(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorders the outputs of a query or key projection from interleaved to half rotary layout.

    Attention is a sum over channels, so it stays the same when queries and keys are reordered alike.

    Args:
        rows: weight (H * d, D) or bias (H * d,); in each head, the rotation pairs the rows (2 i, 2 i + 1).

    Returns:
        The same rows, paired (i, i + d / 2).
    """
    # (H * d, ...) -> (H, d / 2, 2, ...) -> (H, 2, d / 2, ...) -> (H * d, ...)
    return rows.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def rows_first_layout(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """In half rotary layout, exchanges the pairs that turn with the column, the first half, and with the row.

    Args:
        rows: weight (H * d, D) or bias (H * d,) of a query or key projection.
    """
    # (H * d, ...) -> (H, first or second of a pair, column or row, d / 4, ...) -> (H * d, ...)
    return rows.unflatten(0, (num_heads, 2, 2, -1)).flip(2).flatten(0, 3)


def fold_prefix_positions(weights: Weights, num_patches: int) -> None:
    """Adds the positions of prefix tokens, which are constants, to those tokens; the patches keep the table.

    In a table (1, P + patches, D) the first P entries belong to the first P prefix tokens, CLS first. DINOv2 with
    registers has P = 1: its registers have no position.

    Args:
        weights: renamed weights, changed in place.
        num_patches: patches of the grid that the table belongs to.
    """
    table = weights.get(POSITIONS)
    if table is None:
        return
    prefix = {name: weights[name] for name in (CLS_TOKEN, REGISTER_TOKENS) if name in weights}
    num_positions = table.shape[1] - num_patches
    if not 0 < num_positions <= sum(token.shape[1] for token in prefix.values()):
        return  # nothing to do, or a wrong length, which the audit reports
    positions, weights[POSITIONS] = table[:, :num_positions], table[:, num_positions:]
    for name, tokens in prefix.items():
        here, positions = positions[:, : tokens.shape[1]], positions[:, tokens.shape[1] :]
        without = tokens[:, here.shape[1] :]
        weights[name] = torch.cat([tokens[:, : here.shape[1]] + here, without], dim=1)


def audit_weights(weights: Weights, target: Mapping[str, torch.Tensor], base_prefix: str) -> None:
    """Checks that `weights` fill the target exactly; token reducers and task heads may be new.

    Args:
        weights: names as in the target.
        target: state dict of the new model.
        base_prefix: what stands before the names of the backbone in the target.

    Raises:
        `ValueError`: naming every kind of mismatch and the first weights of each.
    """
    new = (f"{base_prefix}token_reducers.",)
    missing = [name for name in target if name not in weights and name.startswith(base_prefix)]
    missing = [name for name in missing if not name.startswith(new)]
    surplus = [name for name in weights if name not in target]
    shapes = [
        f"{name} is {tuple(tensor.shape)}, needed {tuple(target[name].shape)}"
        for name, tensor in weights.items()
        if name in target and tensor.shape != target[name].shape
    ]
    problems = [
        f"{reason}: {_listed(names)}"
        for reason, names in (
            ("weights that the source does not fill", missing),
            ("weights of the source without a place", surplus),
            ("wrong shapes", shapes),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"The source does not fit the model that its configuration describes; {'; '.join(problems)}. It is "
            "damaged, or a variant of the family that is not supported."
        )


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
