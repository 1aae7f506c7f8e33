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
"""Descriptions of models of Transformers: ViT, DeiT, ViT-MAE, ViT-MSN, I-JEPA, DINOv2, DINOv3, and the vision towers
of CLIP and SigLIP.

Read in the source of Transformers 5.10.1, 5.17.0 and 5.23.0, newer entries in that of 5.24.0
(`models/<family>/modeling_<family>.py`). The patterns accept the names of all of them: 5.23 renamed the attention and
the SwiGLU layers of DINOv2.
"""

import os
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import transformers
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..saving import refuse_resized
from .table import Rule, SourceDescription


@dataclass(frozen=True)
class Family:
    """A `model_type` of Transformers.

    Attributes:
        prefix: before the names of the backbone, in a model with a task head.
        dropped: weights that have no place in ours.
        fields: what the source code of the family, and not its config, says.
        classifier_fields: those of `fields` that are others when it has a classifier.
    """

    prefix: str
    dropped: tuple[str, ...]
    fields: dict[str, Any] = field(default_factory=dict)
    classifier_fields: dict[str, Any] = field(default_factory=dict)


MASK_TOKEN = r"embeddings\.mask_token"  # of masked image modelling
POOLER = r"pooler\.dense\.(weight|bias)"  # a second projection after the CLS token, which classifiers do not use
DECODER = r"decoder\..+"  # of masked image modelling
TEXT = (r"text_model\..+", r"text_projection\.weight", r"logit_(scale|bias)")  # the other tower, and the loss
# The mean of two classifiers on two tokens is no linear layer on one pooled vector.
DISTILLATION = r"(cls|distillation)_classifier\.(weight|bias)"

FAMILIES = {
    "vit": Family("vit.", (MASK_TOKEN, POOLER, DECODER), {"pooling": "cls"}),
    # The distillation token is a register: never pruned, not pooled.
    "deit": Family("deit.", (MASK_TOKEN, POOLER, DECODER, DISTILLATION), {"pooling": "cls", "num_register_tokens": 1}),
    "vit_mae": Family("vit.", (DECODER,), {"pooling": "mean"}),
    "vit_msn": Family("vit.", (MASK_TOKEN,), {"pooling": "cls"}),
    "ijepa": Family("ijepa.", (MASK_TOKEN, POOLER), {"pooling": "mean", "use_cls_token": False}),
    "dinov2": Family("dinov2.", (MASK_TOKEN,), {"pooling": "cls"}, {"pooling": "cls_patch_mean"}),
    "dinov2_with_registers": Family(
        "dinov2_with_registers.",
        (MASK_TOKEN,),
        {"pooling": "cls", "interpolate_antialias": True},
        {"pooling": "cls_patch_mean"},
    ),
    "dinov3_vit": Family(
        "",
        (MASK_TOKEN,),
        {"pooling": "cls", "use_absolute_position_embeddings": False, "rope_coordinates": "centered"},
    ),
    # Its classifier sees patches before the final norm.
    "clip": Family(
        "vision_model.",
        TEXT,
        {"pooling": "cls", "norm_before_pooling": False, "patch_bias": False, "use_embedding_norm": True},
        {"pooling": "patch_mean", "use_final_norm": False},
    ),
    # Also SigLIP 2 at a fixed resolution. Its classifier sees the mean.
    "siglip": Family(
        "vision_model.", TEXT, {"pooling": "attention", "use_cls_token": False}, {"pooling": "patch_mean"}
    ),
}
FAMILIES["clip_vision_model"] = FAMILIES["clip"]
FAMILIES["siglip_vision_model"] = FAMILIES["siglip"]

# Families that people ask for, and why they are no points of the space of `CroprViTConfig`
REFUSED = {
    "siglip2": "it takes sequences of patches with a mask and a grid per image (NaFlex) instead of images; fixed-"
    "resolution checkpoints of SigLIP 2 are of type 'siglip' and convert",
    "aimv2": "it normalises by RMSNorm, also after the patch embedding and before positions are added, where a Cropr "
    "ViT has LayerNorm before the blocks alone",
}
REFUSED |= {f"{name}_vision_model": reason for name, reason in REFUSED.items()}

# Fields with the same name and meaning as ours, where a family has them.
SAME_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
    "num_channels",
    "query_bias",
    "key_bias",
    "value_bias",
    "proj_bias",
    "mlp_bias",
    "use_gated_mlp",
    "layerscale_value",
    "num_register_tokens",
    "rope_theta",
    "apply_layernorm",
    "out_features",
)

LAYER = r"(?:layers|encoder\.layers?|model\.layer)\.(\d+)\."
RULES: tuple[Rule, ...] = (
    (r"embeddings\.(?:cls_token|class_embedding)", "embeddings.cls_token"),
    (r"embeddings\.(?:register_tokens|distillation_token)", "embeddings.register_tokens"),
    (r"embeddings\.(?:position_embeddings|position_embedding\.weight)", "embeddings.position_embeddings"),
    (r"embeddings\.patch_embeddings?\.(?:projection\.)?(weight|bias)", r"embeddings.patch_embeddings.\1"),
    (r"pre_layrnorm\.(weight|bias)", r"embeddings.layernorm.\1"),
    (LAYER + r"(?:layernorm_before|norm1|layer_norm1)\.(weight|bias)", r"layers.\1.layernorm_before.\2"),
    (LAYER + r"(?:layernorm_after|norm2|layer_norm2)\.(weight|bias)", r"layers.\1.layernorm_after.\2"),
    (LAYER + r"self_attn\.([qkv])_proj\.(weight|bias)", r"layers.\1.attention.\2_proj.\3"),
    (LAYER + r"self_attn\.out_proj\.(weight|bias)", r"layers.\1.attention.o_proj.\2"),
    (LAYER + r"attention\.(?:q_proj|attention\.query)\.(weight|bias)", r"layers.\1.attention.q_proj.\2"),
    (LAYER + r"attention\.(?:k_proj|attention\.key)\.(weight|bias)", r"layers.\1.attention.k_proj.\2"),
    (LAYER + r"attention\.(?:v_proj|attention\.value)\.(weight|bias)", r"layers.\1.attention.v_proj.\2"),
    (LAYER + r"attention\.(?:o_proj|output\.dense)\.(weight|bias)", r"layers.\1.attention.o_proj.\2"),
    (LAYER + r"layer_scale([12])\.lambda1", r"layers.\1.layer_scale\2.lambda1"),
    (LAYER + r"mlp\.fc([12])\.(weight|bias)", r"layers.\1.mlp.fc\2.\3"),
    (LAYER + r"mlp\.gate_proj\.(weight|bias)", r"layers.\1.mlp.gate_proj.\2"),
    (LAYER + r"mlp\.up_proj\.(weight|bias)", r"layers.\1.mlp.up_proj.\2"),
    (LAYER + r"mlp\.(?:down_proj|weights_out)\.(weight|bias)", r"layers.\1.mlp.down_proj.\2"),
    (LAYER + r"mlp\.weights_in\.(weight|bias)", (r"layers.\1.mlp.gate_proj.\2", r"layers.\1.mlp.up_proj.\2")),
    (r"(?:layernorm|norm|post_layernorm)\.(weight|bias)", r"layernorm.\1"),
    (r"visual_projection\.weight", "visual_projection.weight"),
    (r"head\.probe", "pooler.probe"),
    (
        r"head\.attention\.in_proj_(weight|bias)",
        (r"pooler.q_proj.\1", r"pooler.k_proj.\1", r"pooler.v_proj.\1"),
    ),
    (r"head\.attention\.out_proj\.(weight|bias)", r"pooler.o_proj.\1"),
    (r"head\.(?:mlp\.)?(layernorm|fc[12])\.(weight|bias)", r"pooler.\1.\2"),
    (r"classifier\.(weight|bias)", r"classifier.\1"),
)
# The plain MLP of DINOv3 has the names of a gated one.
PLAIN_MLP_RULES: tuple[Rule, ...] = (
    (LAYER + r"mlp\.up_proj\.(weight|bias)", r"layers.\1.mlp.fc1.\2"),
    (LAYER + r"mlp\.down_proj\.(weight|bias)", r"layers.\1.mlp.fc2.\2"),
)


def describe_transformers(source: PreTrainedModel) -> SourceDescription:
    """The description for a model in memory.

    Raises:
        `ValueError`: when its family or patch shape is not supported.
    """
    family = find_family(source.config)
    config = getattr(source.config, "vision_config", source.config)
    fields: dict[str, Any] = {"norm_before_pooling": True, **family.fields}
    fields |= {name: getattr(config, name) for name in SAME_FIELDS if hasattr(config, name)}
    if hasattr(config, "qkv_bias"):
        fields |= dict.fromkeys(("query_bias", "key_bias", "value_bias"), config.qkv_bias)
    if hasattr(config, "mlp_ratio"):
        fields |= _dinov2_mlp(config)
    if hasattr(config, "attention_dropout"):
        fields["attention_probs_dropout_prob"] = config.attention_dropout
    fields |= image_fields(_pair(config.image_size), _pair(config.patch_size))
    if not getattr(config, "vision_use_head", True):
        fields["pooling"] = "patch_mean"
    projection = getattr(source, "visual_projection", None)
    fields["projection_dim"] = None if projection is None else projection.out_features
    classifier = getattr(source, "classifier", None)
    labels: dict[str, Any] = {}
    if isinstance(classifier, nn.Linear):
        labels = {name: copy(getattr(source.config, name)) for name in ("id2label", "problem_type")}
        labels["num_labels"] = classifier.out_features
        fields |= family.classifier_fields
    return SourceDescription(
        fields,
        RULES if fields.get("use_gated_mlp") else PLAIN_MLP_RULES + RULES,
        dropped=family.dropped,
        prefix=family.prefix,
        labels=labels,
    )


def find_family(config: PreTrainedConfig) -> Family:
    """The family of a config.

    Raises:
        `ValueError`: when it is not supported.
    """
    if config.model_type in REFUSED:
        raise ValueError(
            f"The source is a model of type {config.model_type!r}, which a Cropr ViT does not support: "
            f"{REFUSED[config.model_type]}."
        )
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"The source is a model of type {config.model_type!r}; conversion supports {', '.join(FAMILIES)} of "
            "Transformers, and `vit_*`, `deit*` and `eva02_*` of timm (named 'timm/...', 'hf-hub:...', or in memory)."
            + (" `from_pretrained` loads this one." if config.model_type == "cropr_vit" else "")
        )
    return FAMILIES[config.model_type]


def _dinov2_mlp(config: PreTrainedConfig) -> dict[str, Any]:
    size = int(config.hidden_size * config.mlp_ratio)
    if not config.use_swiglu_ffn:
        return {"intermediate_size": size}
    # `Dinov2SwiGLUFFN`: two thirds, rounded up to a multiple of 8, and always SiLU
    size = (int(size * 2 / 3) + 7) // 8 * 8
    return {"intermediate_size": size, "use_gated_mlp": True, "hidden_act": "silu"}


def image_fields(image_size: tuple[int, int], patch_size: tuple[int, int]) -> dict[str, Any]:
    """`image_size` (height, width) and `patch_size`, the image cut to whole patches as the source cuts it.

    Raises:
        `ValueError`: when patches are not square.
    """
    size = patch_size[0]
    if patch_size[1] != size:
        raise ValueError(f"The source has patches of {size} x {patch_size[1]} pixels; only square ones are supported.")
    height, width = (length // size * size for length in image_size)
    return {"image_size": height if height == width else (height, width), "patch_size": size}


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def load_transformers(source: str | os.PathLike, **loading: Any) -> PreTrainedModel:
    """Loads a Hub repository or a folder as the class that saved it, so that its classifier comes along.

    What an unknown class saved is loaded as the first class of the family that has a place for all of its weights.

    Args:
        loading: keyword arguments of `PreTrainedModel.from_pretrained` that say where and how to load.

    Raises:
        `ValueError`: when the family is not supported, the checkpoint lacks weights that the conversion needs, has
            some of other shapes than its configuration says, or others than the class.
        `OSError`: when there is no such folder or repository, or it is out of reach.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **loading)
    except ValueError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{source} holds no `config.json` of a model that this release of Transformers knows ({reason}); name the "
            f"folder or repository of one of the types {', '.join(FAMILIES)}."
        ) from error
    except OSError as error:
        if os.path.isdir(source):
            raise
        raise OSError(
            f"{source} is neither a folder of a model nor a repository that can be reached: {error}"
        ) from error
    family = find_family(config)
    architecture = (config.architectures or [""])[0]
    classes: Any = getattr(transformers, architecture, None)
    if classes is None:
        classifiers: Any = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.get(type(config), ())
        classes = (*(classifiers if isinstance(classifiers, tuple) else (classifiers,)), AutoModel)
    description = SourceDescription({}, (), dropped=family.dropped, prefix=family.prefix)
    for model_class in classes if isinstance(classes, tuple) else (classes,):
        model, info = model_class.from_pretrained(
            source,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused here, by name
            trust_remote_code=False,
            **loading,
        )
        refuse_resized(source, info["mismatched_keys"])
        missing, unexpected = (
            sorted(name for name in info[kind] if not description.drops(name))
            for kind in ("missing_keys", "unexpected_keys")
        )
        if not missing and not unexpected:
            return model
    if missing:
        raise ValueError(
            f"The checkpoint {source} lacks {len(missing)} weights of {type(model).__name__}, such as "
            f"{', '.join(missing[:3])}; it is incomplete, or its config belongs to another model."
        )
    raise ValueError(
        f"The checkpoint {source}, of the class {architecture or 'unknown'}, has {len(unexpected)} weights that "
        f"{type(model).__name__} has no place for, such as {', '.join(unexpected[:3])}; they would be lost. Load the "
        "part to convert yourself, and pass it to `from_vit`."
    )
