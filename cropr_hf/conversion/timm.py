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
"""Descriptions of models of timm: `vit_*` and `deit*` (class `VisionTransformer`), `eva02_*`, `vit_*_dinov3*`,
`vit_pe_core_*` and `vit_pe_spatial_*` (class `Eva`).

The live module is read instead of a config, since timm has none. Read in the source of timm 1.0.20 and 1.0.31
(`timm/models/vision_transformer.py`, `deit.py`, `eva.py`, `timm/layers/`). Nothing here imports timm but `load_timm`.
"""

import difflib
from typing import Any

from torch import nn

from .hf import image_fields
from .table import Rule, SourceDescription


DISTILLED = "timm.models.deit.VisionTransformerDistilled"
CLASSES = ("timm.models.vision_transformer.VisionTransformer", DISTILLED, "timm.models.eva.Eva")

BLOCK = r"blocks\.(\d+)\."
RULES: tuple[Rule, ...] = (
    (r"cls_token", "embeddings.cls_token"),
    (r"(?:reg|dist)_token", "embeddings.register_tokens"),
    (r"pos_embed", "embeddings.position_embeddings"),
    (r"patch_embed\.proj\.(weight|bias)", r"embeddings.patch_embeddings.\1"),
    (r"norm_pre\.(weight|bias)", r"embeddings.layernorm.\1"),
    (BLOCK + r"norm1\.(weight|bias)", r"layers.\1.layernorm_before.\2"),
    (BLOCK + r"norm2\.(weight|bias)", r"layers.\1.layernorm_after.\2"),
    (
        BLOCK + r"attn\.qkv\.(weight|bias)",
        (r"layers.\1.attention.q_proj.\2", r"layers.\1.attention.k_proj.\2", r"layers.\1.attention.v_proj.\2"),
    ),
    (BLOCK + r"attn\.([qkv])_proj\.(weight|bias)", r"layers.\1.attention.\2_proj.\3"),
    (BLOCK + r"attn\.([qv])_bias", r"layers.\1.attention.\2_proj.bias"),
    (BLOCK + r"attn\.proj\.(weight|bias)", r"layers.\1.attention.o_proj.\2"),
    (BLOCK + r"(?:gamma_([12])|ls([12])\.gamma)", r"layers.\1.layer_scale\2\3.lambda1"),
    (BLOCK + r"mlp\.norm\.(weight|bias)", r"layers.\1.mlp.norm.\2"),
    (r"(?:norm|fc_norm)\.(weight|bias)", r"layernorm.\1"),
    (r"attn_pool\.latent", "pooler.probe"),
    (r"attn_pool\.q\.(weight|bias)", r"pooler.q_proj.\1"),
    (r"attn_pool\.kv\.(weight|bias)", (r"pooler.k_proj.\1", r"pooler.v_proj.\1")),
    (r"attn_pool\.proj\.(weight|bias)", r"pooler.o_proj.\1"),
    (r"attn_pool\.norm\.(weight|bias)", r"pooler.layernorm.\1"),
    (r"attn_pool\.mlp\.fc([12])\.(weight|bias)", r"pooler.fc\1.\2"),
    (r"head\.(weight|bias)", r"classifier.\1"),
)
MLP_RULES: dict[str, tuple[Rule, ...]] = {
    "Mlp": ((BLOCK + r"mlp\.fc([12])\.(weight|bias)", r"layers.\1.mlp.fc\2.\3"),),
    "SwiGLU": (
        (BLOCK + r"mlp\.fc1_g\.(weight|bias)", r"layers.\1.mlp.gate_proj.\2"),
        (BLOCK + r"mlp\.fc1_x\.(weight|bias)", r"layers.\1.mlp.up_proj.\2"),
        (BLOCK + r"mlp\.fc2\.(weight|bias)", r"layers.\1.mlp.down_proj.\2"),
    ),
    # `gate_last=False`: the gate is the first half
    "GluMlp": (
        (BLOCK + r"mlp\.fc1\.(weight|bias)", (r"layers.\1.mlp.gate_proj.\2", r"layers.\1.mlp.up_proj.\2")),
        (BLOCK + r"mlp\.fc2\.(weight|bias)", r"layers.\1.mlp.down_proj.\2"),
    ),
}
DISTILLED_HEADS = r"head(_dist)?\.(weight|bias)"  # two classifiers on two tokens, averaged

ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu"}


def describe_timm(source: nn.Module) -> SourceDescription:
    """The description for a model in memory. Rates of dropout and stochastic depth are not taken over.

    Raises:
        `ValueError`: when its class is not supported, or naming the parts of it that are not.
    """
    class_name = f"{type(source).__module__}.{type(source).__name__}"
    if class_name not in CLASSES:
        raise ValueError(
            f"The source is a {class_name}; conversion takes models of Transformers, and of timm those of the classes "
            f"{', '.join(CLASSES)}."
        )
    model: Any = source  # attributes of a module have no types
    unsupported = find_unsupported_parts(model)
    if unsupported:
        raise ValueError(
            f"The timm model has {', '.join(unsupported)}, which a Cropr ViT does not support; choose a plain "
            "`vit_*`, `deit*` or `eva02_*` model."
        )
    distilled = class_name == DISTILLED
    block, rope = model.blocks[0], getattr(model, "rope", None)
    fields = {
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.num_heads,
        "layer_norm_eps": block.norm1.eps,
        "num_channels": model.patch_embed.proj.in_channels,
        "patch_bias": model.patch_embed.proj.bias is not None,
        "use_embedding_norm": not _is_absent(model.norm_pre),
        "proj_bias": block.attn.proj.bias is not None,
        "use_cls_token": model.cls_token is not None,
        "num_register_tokens": 1 if distilled else _length(model.reg_token),
        "use_absolute_position_embeddings": model.pos_embed is not None,
        "interpolate_antialias": True,
        "layerscale_value": _layer_scale(block),
        "norm_before_pooling": not _is_absent(model.norm),
        "use_final_norm": not (_is_absent(model.norm) and _is_absent(model.fc_norm)),
        **_pooling_fields(model),
        **image_fields(model.patch_embed.img_size, model.patch_embed.patch_size),
        **_query_key_value_biases(block.attn),
        **_mlp_fields(block.mlp),
        **_rotary_fields(rope),
    }
    return SourceDescription(
        fields,
        MLP_RULES[type(block.mlp).__name__] + RULES,
        dropped=(DISTILLED_HEADS,) if distilled else (),
        interleaved_rotary=rope is not None and not getattr(block.attn, "rotate_half", False),
        column_first_rotary=rope is not None and rope.grid_indexing == "xy",
        labels={} if distilled else _labels(model),
    )


def find_unsupported_parts(model: Any) -> list[str]:
    """In words, what a model of one of `CLASSES` has and `CroprViTModel` does not support."""
    kinds = {type(block).__name__ for block in model.blocks} - {"Block", "EvaBlock"}
    if kinds:
        return [f"blocks of the class {', '.join(sorted(kinds))}"]
    attentions, mlps = [block.attn for block in model.blocks], [block.mlp for block in model.blocks]
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    linear_head = isinstance(model.head, nn.Linear)
    checks = {
        "another patch embedding than one convolution": type(model.patch_embed).__name__ != "PatchEmbed"
        or not _is_absent(model.patch_embed.norm),
        "norms of queries and keys (`qk_norm`)": any(not _is_absent(attn.q_norm) for attn in attentions),
        "a norm inside attention (`scale_attn_norm`, `scale_attn_inner`)": any(
            not _is_absent(getattr(attn, "norm", None)) for attn in attentions
        ),
        "gated attention": any(getattr(attn, "gate", None) is not None for attn in attentions),
        "attention of another class": any(
            type(attn).__name__ not in ("Attention", "EvaAttention", "AttentionRope") for attn in attentions
        ),
        "grouped-query attention": any(
            getattr(attn, "num_kv_heads", attn.num_heads) != attn.num_heads for attn in attentions
        ),
        "an MLP of another class or gate order": any(
            type(mlp).__name__ not in MLP_RULES or getattr(mlp, "gate_last", False) for mlp in mlps
        ),
        "another activation": any(_activation(mlp) is None for mlp in mlps),
        "norms that are not a LayerNorm, or differ in `eps`": len({norm.eps for norm in norms}) != 1
        or not all(isinstance(block.norm1, nn.LayerNorm) for block in model.blocks),
        "two final norms (`norm` and `fc_norm`)": not (_is_absent(model.norm) or _is_absent(model.fc_norm)),
        "attention pooling of another kind": model.global_pool == "map" and not _is_known_attention_pooling(model),
        f"the pooling {model.global_pool!r}": model.global_pool not in ("token", "avg", "map", "")
        or (model.global_pool == "" and linear_head),
        "rotary positions of another kind": not _is_known_rotary(getattr(model, "rope", None), attentions[0]),
    }
    return [part for part, found in checks.items() if found]


def _is_absent(module: nn.Module | None) -> bool:
    return module is None or isinstance(module, nn.Identity)


def _length(tokens: Any) -> int:
    return 0 if tokens is None else tokens.shape[1]


def _layer_scale(block: Any) -> float | None:
    """The initial value; the weights are converted in any case, so that a lost one does not matter."""
    if getattr(block, "gamma_1", None) is None and _is_absent(getattr(block, "ls1", None)):
        return None
    return getattr(block, "init_values", None) or getattr(getattr(block, "ls1", None), "init_values", None) or 1e-5


def _pooling_fields(model: Any) -> dict[str, Any]:
    if model.global_pool != "map":
        return {"pooling": _pooling(model)}
    return {
        "pooling": "attention",
        "pooling_num_heads": model.attn_pool.num_heads,
        "pooling_intermediate_size": model.attn_pool.mlp.fc1.out_features,
    }


def _is_known_attention_pooling(model: Any) -> bool:
    """Whether one probe attends to all tokens, and an MLP like those of the blocks follows."""
    pool = model.attn_pool
    if type(pool).__name__ != "AttentionPoolLatent" or pool.latent_len != 1 or pool.pos_embed is not None:
        return False
    # `Eva` pools all tokens, `VisionTransformer` the patches alone unless it is told otherwise.
    sees_all = type(model).__name__ == "Eva" or model.pool_include_prefix or model.num_prefix_tokens == 0
    is_complete = isinstance(pool.q, nn.Linear) and pool.mlp is not None and isinstance(pool.norm, nn.LayerNorm)
    return (
        sees_all
        and is_complete
        and _is_absent(pool.q_norm)
        and _is_absent(pool.k_norm)
        and _activation(pool.mlp) == _activation(model.blocks[0].mlp)
    )


def _pooling(model: Any) -> str:
    if model.global_pool == "avg":
        return "mean" if getattr(model, "pool_include_prefix", False) else "patch_mean"
    return "cls" if model.cls_token is not None else "patch_mean"


def _query_key_value_biases(attention: Any) -> dict[str, bool]:
    if getattr(attention, "qkv", None) is None:
        biases = (attention.q_proj.bias, attention.k_proj.bias, attention.v_proj.bias)
    elif getattr(attention, "q_bias", None) is not None:
        biases = (attention.q_bias, None, attention.v_bias)  # keys have a constant 0
    else:
        biases = (attention.qkv.bias,) * 3
    return {name: bias is not None for name, bias in zip(("query_bias", "key_bias", "value_bias"), biases)}


def _mlp_fields(mlp: Any) -> dict[str, Any]:
    return {
        "intermediate_size": mlp.fc2.in_features,
        "hidden_act": _activation(mlp),
        "mlp_bias": mlp.fc2.bias is not None,
        "use_gated_mlp": type(mlp).__name__ != "Mlp",
        "use_mlp_norm": not _is_absent(mlp.norm),
    }


def _activation(mlp: Any) -> str | None:
    activation = getattr(mlp, "act", None)
    if getattr(activation, "approximate", "none") == "tanh":
        return "gelu_pytorch_tanh"
    return ACTIVATIONS.get(type(activation).__name__)


def _is_known_rotary(rope: Any, attention: Any) -> bool:
    kind = type(rope).__name__
    if rope is None:
        return True
    if kind not in ("RotaryEmbeddingCat", "RotaryEmbeddingDinoV3"):
        return False
    if rope.grid_offset != 0 and kind != "RotaryEmbeddingCat":
        return False
    # timm 1.0.20 can rotate halves by angles that are laid out for pairs.
    if getattr(rope, "rotate_half", False) != getattr(attention, "rotate_half", False):
        return False
    if kind == "RotaryEmbeddingCat":
        reference = rope.ref_feat_shape
        return not rope.in_pixels and reference is not None and reference[0] == reference[1]
    return rope.normalize_coords == "separate" and (rope.min_period is None or rope.max_period is None)


def _rotary_fields(rope: Any) -> dict[str, Any]:
    if rope is None:
        return {}
    if type(rope).__name__ == "RotaryEmbeddingDinoV3":
        return {"rope_theta": float(rope.temperature), "rope_coordinates": "centered"}
    return {
        "rope_theta": float(rope.temperature),
        "rope_coordinates": "index",
        "rope_offset": float(rope.grid_offset),
        "rope_reference_grid": int(rope.ref_feat_shape[0]),
    }


def _labels(model: Any) -> dict[str, Any]:
    if not isinstance(model.head, nn.Linear):
        return {}
    number = model.head.out_features
    names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names") or ()
    if len(names) != number:
        return {"num_labels": number}
    return {
        "num_labels": number,
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }


def load_timm(name: str, **loading: Any) -> nn.Module:
    """Loads a pretrained timm model by name: `"timm/..."`, `"hf-hub:..."`, `"local-dir:..."`, or as timm calls it.

    Args:
        loading: `cache_dir`, and for models on the Hub `revision`.

    Raises:
        `ImportError`: when timm is not installed.
        `ValueError`: for other loading arguments, or when timm does not know the name.
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"Loading {name!r} from timm needs timm: pip install cropr_hf[timm]") from error
    if name.startswith("timm/"):
        name = f"hf-hub:{name}"
    if name.startswith("hf-hub:") and loading.get("revision"):
        name = f"{name}@{loading.pop('revision')}"
    other = sorted(key for key, value in loading.items() if key != "cache_dir" and value is not None)
    if other:
        raise ValueError(
            f"timm cannot load {name!r} with {', '.join(other)}; it takes `cache_dir`, and `revision` for names on "
            "the Hub. It reads an access token from the environment (HF_TOKEN)."
        )
    if ":" not in name and not timm.is_model(name):
        near = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=3))
        raise ValueError(
            f"{name!r} is not a folder, not a model of timm{near and f' (near matches: {near})'}, and not the name of "
            "a repository on the Hub, which looks like 'owner/name'; correct the name."
        )
    return timm.create_model(name, pretrained=True, cache_dir=loading.get("cache_dir"))
