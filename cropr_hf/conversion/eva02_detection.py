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
"""From a detector of EVA-02 (a file of its Detectron2) to a `CroprViTFor*`: read, describe, configure, fill, check.

Names and meaning of the weights were read in the source of baaivision/EVA, commit 006ca79 (`EVA-02/det/detectron2/
modeling/backbone/vit.py`, `backbone/utils.py`, `ema.py`), and of Detectron2 0.6 for the heads.
"""

import math
import os
import pickle
import re
from collections.abc import Mapping
from typing import Any

import torch

from ..configuration_cropr_vit import EVA02, CroprViTConfig
from ..modeling_cropr_vit import CroprViTRotaryEmbedding
from ..modeling_cropr_vit_detection import (
    CroprViTDetector,
    CroprViTForInstanceSegmentation,
    CroprViTForObjectDetection,
)
from .convert import build_config, check_fixed_fields, check_names
from .table import REGISTER_TOKENS, Rule, SourceDescription, Weights, audit_weights, convert_weights


NET = "backbone.net."
POSITION_TABLE = f"{NET}pos_embed"
MASK_HEAD = "roi_heads.mask_head."
LVIS_CLASSES = 1203

BLOCK = r"backbone\.net\.blocks\.(\d+)\."
KIND = r"\.(?P<kind>weight|bias)"


def _same(source: str, target: str) -> tuple[Rule, ...]:
    """The rule for a layer with weight and bias."""
    return ((source + KIND, rf"{target}.\g<kind>"),)


def _conv(source: str, target: str) -> tuple[Rule, ...]:
    """Rules for a convolution without bias and its LayerNorm, which stands inside of it in Detectron2."""
    return ((rf"{source}\.weight", f"{target}.0.weight"), *_same(rf"{source}\.norm", f"{target}.1"))


# Backbone names as in `CroprViTModel`, the others as in the detectors.
RULES: tuple[Rule, ...] = (
    (r"backbone\.net\.pos_embed", "embeddings.position_embeddings"),
    *_same(r"backbone\.net\.patch_embed\.proj", "embeddings.patch_embeddings"),
    *_same(BLOCK + "norm1", r"layers.\1.layernorm_before"),
    *_same(BLOCK + "norm2", r"layers.\1.layernorm_after"),
    (BLOCK + r"attn\.([qkv])_proj\.weight", r"layers.\1.attention.\2_proj.weight"),
    (BLOCK + r"attn\.([qv])_bias", r"layers.\1.attention.\2_proj.bias"),
    *_same(BLOCK + r"attn\.proj", r"layers.\1.attention.o_proj"),
    *_same(BLOCK + r"mlp\.w1", r"layers.\1.mlp.gate_proj"),
    *_same(BLOCK + r"mlp\.w2", r"layers.\1.mlp.up_proj"),
    *_same(BLOCK + r"mlp\.ffn_ln", r"layers.\1.mlp.norm"),
    *_same(BLOCK + r"mlp\.w3", r"layers.\1.mlp.down_proj"),
    # Pyramid: what resizes the map, then two convolutions
    *_same(r"backbone\.simfp_2\.([013])", r"pyramid.levels.0.0.\1"),
    *_conv(r"backbone\.simfp_2\.4", "pyramid.levels.0.1"),
    *_conv(r"backbone\.simfp_2\.5", "pyramid.levels.0.2"),
    *_same(r"backbone\.simfp_3\.0", "pyramid.levels.1.0.0"),
    *_conv(r"backbone\.simfp_3\.([12])", r"pyramid.levels.1.\1"),
    *_conv(r"backbone\.simfp_4\.0", "pyramid.levels.2.1"),
    *_conv(r"backbone\.simfp_4\.1", "pyramid.levels.2.2"),
    *_conv(r"backbone\.simfp_5\.([12])", r"pyramid.levels.3.\1"),
    # Heads
    *_same(r"proposal_generator\.rpn_head\.conv\.conv([01])", r"proposal_network.head.conv.\1.0"),
    *_same(r"proposal_generator\.rpn_head\.objectness_logits", "proposal_network.head.cls_logits"),
    *_same(r"proposal_generator\.rpn_head\.anchor_deltas", "proposal_network.head.bbox_pred"),
    *(
        rule
        for index in range(4)
        for rule in (
            *_conv(rf"roi_heads\.box_head\.([012])\.conv{index + 1}", rf"box_heads.\1.layers.{index}"),
            *_conv(rf"roi_heads\.mask_head\.mask_fcn{index + 1}", f"mask_head.layers.{index}"),
        )
    ),
    *_same(r"roi_heads\.box_head\.([012])\.fc1", r"box_heads.\1.layers.5"),
    *_same(r"roi_heads\.box_predictor\.([012])\.cls_score", r"box_heads.\1.class_predictor"),
    *_same(r"roi_heads\.box_predictor\.([012])\.bbox_pred", r"box_heads.\1.box_predictor"),
    *_same(r"roi_heads\.mask_head\.deconv", "mask_head.predictor.conv5_mask"),
    *_same(r"roi_heads\.mask_head\.predictor", "mask_head.predictor.mask_fcn_logits"),
)
# Constants, which are computed: rotary tables, and in the averaged weights the buffers that `model` is saved without.
DROPPED = (
    r"backbone\.net\.(rope_win|rope_glb|blocks\.\d+\.attn\.rope)\.freqs_(cos|sin)",
    r"pixel_(mean|std)",
    r"proposal_generator\.anchor_generator\.cell_anchors\.\d",
)
# What depends on the number of classes in the target.
CLASS_LAYERS = r"(box_heads\.\d\.class_predictor|mask_head\.predictor\.mask_fcn_logits)\..+"


def convert_eva02_detector(
    source: str | os.PathLike | Mapping[str, Any],
    use_ema: bool | None = None,
    cls: type[CroprViTDetector] | None = None,
    **kwargs: Any,
) -> CroprViTDetector:
    """A Cropr detector with the weights of a detector of EVA-02 (baaivision/EVA, `EVA-02/det`).

    It computes what the source computes. What says how to prune (`pruning_schedule`, `pruning_rate`, `token_reducer`)
    adds token reducers; those of Cropr score at random until they are trained, and have auxiliary heads unless
    `use_auxiliary_heads=False`.

    All sizes are read off the shapes. The side of the image, the windows and the blocks with windowed attention are
    read off the tables of rotary positions, of which each block has its own copy, and of which the model computes its
    own. The position table of the pre-training (14 x 14) is interpolated once, to the patches of `image_size`.

    Suppression has the defaults of Detectron2. The figures of EVA-02's system-level table need
    `score_threshold=0.0, nms_method="linear", nms_threshold=0.6`, and for masks `maskness_threshold=0.5` as well.

    Args:
        source: a `.pth` file with `model` and, where the training averaged its weights, `ema_state`; or what
            `torch.load` makes of it.
        use_ema: whether to take the averaged weights; `None` takes them where there are any, as EVA-02 evaluates.
        cls: `CroprViTForInstanceSegmentation` or `CroprViTForObjectDetection`; by default what the source is. The mask
            head stays behind, or is new, if they differ.
        kwargs: fields of the config to override (`image_size`, `window_size`, `pruning_schedule`,
            `score_threshold`, ...). With another `num_labels` the layers that tell classes apart are new.

    Returns:
        A detector in evaluation mode, with the dtype of the source. Its classes have no names; they are in the order
        of the category ids of the data set.

    Raises:
        `FileNotFoundError`: no such file.
        `ValueError`: a file that holds something else, no averaged weights for `use_ema=True`, a detector of LVIS,
            an unknown keyword, an override that the weights contradict, weights that are missing, left over or of the
            wrong shape, rotary positions other than those of EVA-02.

    Example:

    ```python
    >>> from huggingface_hub import hf_hub_download

    >>> from cropr_hf import schedule_from_sides
    >>> from cropr_hf.conversion import convert_eva02_detector

    >>> path = hf_hub_download("Yuxin-CV/EVA-02", "eva02/det/eva02_L_coco_det_sys_o365.pth")
    >>> unpruned = convert_eva02_detector(path)
    >>> to_train = convert_eva02_detector(path, pruning_schedule=schedule_from_sides(24, 96 * 96))
    ```"""
    check_names(CroprViTConfig, kwargs, "convert_eva02_detector", ("use_ema", "cls"))
    checkpoint = read_checkpoint(source)
    averaged = bool(checkpoint.get("ema_state")) if use_ema is None else use_ema
    if averaged and not checkpoint.get("ema_state"):
        raise ValueError("`use_ema` is True, but the checkpoint has no averaged weights (`ema_state`); leave it out.")
    description, trained_with = describe_eva02_detector(checkpoint["model"])
    check_fixed_fields(description, kwargs)
    has_masks = any(name.startswith(MASK_HEAD) for name in checkpoint["model"])
    if cls is None:
        cls = CroprViTForInstanceSegmentation if has_masks else CroprViTForObjectDetection
    fields = {**trained_with, **kwargs}
    if not kwargs.keys() & {"token_reducer", "pruning_rate", "pruning_schedule"}:
        fields["token_reducer"] = None
    if "id2label" in kwargs and "num_labels" not in kwargs:
        del fields["num_labels"]  # the names say how many
    config = build_config(cls, CroprViTConfig, description, fields)
    config.name_or_path = "" if isinstance(source, Mapping) else os.fspath(source)

    weights = dict(checkpoint["ema_state" if averaged else "model"])
    if POSITION_TABLE in weights:
        weights[POSITION_TABLE] = weights[POSITION_TABLE][:, 1:]  # there is no CLS token
    weights = {
        f"cropr_vit.{name}" if name.startswith(("embeddings.", "layers.")) else name: tensor
        for name, tensor in convert_weights(weights, description, config).items()
    }
    config.dtype = config.dtype or next(iter(weights.values())).dtype
    # Building under the dtype, instead of casting, keeps rotary frequencies in float32.
    model = cls._from_config(config)
    new = [r"cropr_vit\.token_reducers\..+", re.escape(f"cropr_vit.{REGISTER_TOKENS}")]  # the source has none
    new += [r"mask_head\..+"] if has_masks != cls.has_masks else []
    new += [CLASS_LAYERS] if config.num_labels != trained_with["num_labels"] else []
    weights, target = _without(weights, new), _without(model.state_dict(), new)
    audit_weights(weights, target, base_prefix="")
    model.load_state_dict(weights, strict=False)
    return model.eval()


def _without(weights: Weights, patterns: list[str]) -> Weights:
    return {name: tensor for name, tensor in weights.items() if not re.fullmatch("|".join(patterns), name)}


def read_checkpoint(source: str | os.PathLike | Mapping[str, Any]) -> Mapping[str, Any]:
    """What a checkpoint of EVA-02's Detectron2 holds: `model`, perhaps `ema_state`, and more that does not matter.

    Raises:
        `FileNotFoundError`: no such file.
        `ValueError`: when it is something else.
    """
    remedy = "give a `.pth` file of EVA-02's detectors, such as 'eva02_L_coco_det_sys_o365.pth'."
    checkpoint: Any = source
    if isinstance(source, (str, os.PathLike)):
        try:
            checkpoint = torch.load(source, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
            raise ValueError(f"{os.fspath(source)!r} is not a file of weights; {remedy}") from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"The checkpoint is a {type(checkpoint).__name__}; {remedy}")
    states = {name: checkpoint.get(name) for name in ("model", "ema_state") if name == "model" or name in checkpoint}
    for name, state in states.items():
        if not isinstance(state, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
            found = ", ".join(map(str, list(checkpoint)[:3])) or "nothing"
            raise ValueError(f"The checkpoint has no weights under {name!r}, but {found}, ...; {remedy}")
    return checkpoint


def describe_eva02_detector(weights: Mapping[str, torch.Tensor]) -> tuple[SourceDescription, dict[str, Any]]:
    """Reads the configuration off the weights, which are those under `model`: only these have a table per block.

    Returns:
        The description, whose `image_size` belongs to the position table of the pre-training; and `image_size` and
        `num_labels` of the detector.

    Raises:
        `ValueError`: when weights that tell sizes are missing or of the wrong shape, when rotary positions are not
            those of EVA-02, or for a detector of LVIS.
    """
    hidden_size, num_channels, patch_size, _ = _shape(weights, f"{NET}patch_embed.proj.weight", 4)
    _, num_positions, _ = _shape(weights, POSITION_TABLE, 3)
    num_labels = _shape(weights, "roi_heads.box_predictor.0.cls_score.weight", 2)[0] - 1
    if num_labels == LVIS_CLASSES:
        raise ValueError(
            f"The checkpoint is a detector of LVIS ({LVIS_CLASSES} classes), which scores each class by a sigmoid; "
            "convert one of COCO or Objects365, whose scores are a softmax."
        )
    depth = len({match[1] for name in weights if (match := re.match(BLOCK, name))})
    grid, window = (_rotary_side(weights, f"{NET}{name}") for name in ("rope_glb", "rope_win"))
    sides = [_rotary_side(weights, f"{NET}blocks.{block}.attn.rope") for block in range(depth)]
    if set(sides) - {grid, window}:
        raise ValueError(
            f"Blocks have rotary positions for squares of {sorted(set(sides))} patches, but the image has {grid} and "
            f"a window {window} per side; the checkpoint is damaged."
        )
    fields: dict[str, Any] = {
        **EVA02,
        "hidden_size": hidden_size,
        "num_hidden_layers": depth,
        "num_attention_heads": hidden_size // _shape(weights, f"{NET}rope_glb.freqs_cos", 2)[1],
        "intermediate_size": _shape(weights, f"{NET}blocks.0.mlp.w1.weight", 2)[0],
        "num_channels": num_channels,
        "patch_size": patch_size,
        "image_size": _side(num_positions - 1, POSITION_TABLE) * patch_size,
        "interpolate_antialias": False,
        "use_mlp_norm": True,
        "use_cls_token": False,
        "use_final_norm": False,
        "window_size": window,
        "window_block_indices": [block for block, side in enumerate(sides) if side == window],
        "pyramid_channels": _shape(weights, "backbone.simfp_4.0.weight", 4)[0],
        "box_head_size": _shape(weights, "roi_heads.box_head.0.fc1.weight", 2)[0],
    }
    _check_rotation(weights, CroprViTConfig(**fields, token_reducer=None), {"rope_glb": grid, "rope_win": window})
    description = SourceDescription(fields, RULES, dropped=DROPPED, interleaved_rotary=True)
    return description, {"image_size": grid * patch_size, "num_labels": num_labels}


def _shape(weights: Mapping[str, torch.Tensor], name: str, dimensions: int) -> torch.Size:
    if name not in weights or weights[name].dim() != dimensions:
        raise ValueError(
            f"The checkpoint has no weight {name} of {dimensions} dimensions; it is damaged, or no detector of EVA-02."
        )
    return weights[name].shape


def _side(number: int, name: str) -> int:
    """Side of a square of patches."""
    side = math.isqrt(max(number, 0))
    if side == 0 or side**2 != number:
        raise ValueError(f"{name} is for {number} patches, which do not form a square; that of EVA-02's detectors is.")
    return side


def _rotary_side(weights: Mapping[str, torch.Tensor], name: str) -> int:
    return _side(_shape(weights, f"{name}.freqs_cos", 2)[0], name)


def _check_rotation(weights: Mapping[str, torch.Tensor], config: CroprViTConfig, sides: dict[str, int]) -> None:
    """The tables stay behind, so the model must compute the same ones."""
    rotary = CroprViTRotaryEmbedding(config)
    for name, side in sides.items():
        # Neighbouring channels form a pair and turn by the same angle: (patches, d) -> (patches, d / 2)
        cos = weights[f"{NET}{name}.freqs_cos"][:, ::2].float()
        computed = rotary((side, side), torch.float32, cos.device)[0][0]
        if cos.shape != computed.shape or not torch.allclose(cos, computed, atol=1e-2):
            raise ValueError(
                f"{NET}{name}.freqs_cos is not the rotation of EVA-02 (theta {config.rope_theta:g}, "
                f"{config.rope_reference_grid} units per side, {config.num_attention_heads} heads); the checkpoint is "
                "damaged, or a variant that is not supported."
            )
