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
"""From a pretrained ViT to a `CroprViT*`: load, describe, configure, fill, check."""

import dataclasses
import difflib
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..configuration_cropr_vit import CroprViTConfig
from ..modeling_cropr_vit import (
    CroprViTBackbone,
    CroprViTForImageClassification,
    CroprViTModel,
    CroprViTPreTrainedModel,
)
from ..saving import named_damage
from ..token_reduction import has_auxiliary_heads
from . import hf, timm
from .table import REGISTER_TOKENS, SourceDescription, Weights, audit_weights, convert_weights


logger = logging.get_logger(__name__)

SUPPORTED_FAMILIES = (*hf.FAMILIES, "timm vit", "timm deit", "timm eva02", "timm vit_dinov3", "timm vit_pe")

LOADING_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
    "use_safetensors",
    "variant",
)
# The weights of the source decide these fields.
FIXED_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "num_channels",
    "patch_bias",
    "use_embedding_norm",
    "query_bias",
    "key_bias",
    "value_bias",
    "proj_bias",
    "mlp_bias",
    "use_gated_mlp",
    "use_mlp_norm",
    "use_absolute_position_embeddings",
    "pooling_num_heads",
    "pooling_intermediate_size",
)
# These as well, but a target can do without what they stand for.
DROPPABLE_FIELDS = ("use_cls_token", "num_register_tokens", "use_final_norm", "projection_dim")
POOLED_VECTOR = ("pooling", "norm_before_pooling", "use_final_norm", "projection_dim")  # decide what it is
FINAL_NORM = ("layernorm.weight", "layernorm.bias")
# What `CroprViTConfig` takes besides its fields.
FURTHER_ARGUMENTS = ("num_labels", "out_features", "out_indices", "attn_implementation")


def convert_vit(cls: type[CroprViTPreTrainedModel], source: str | os.PathLike | nn.Module, **kwargs: Any) -> Any:
    """A Cropr ViT with the weights of a pretrained ViT; `cls.from_vit` calls it.

    With `token_reducer=None` and no new parts it computes what the source computes. Cropr and DynamicViT prune by a
    score that is still random, and have to be trained; other methods work at once. With Cropr, task classes, and a
    `CroprViTModel` with `auxiliary_task="embedding"`, get auxiliary heads unless `use_auxiliary_heads=False`.

    An image classifier that normalises the mean of the tokens, where its source normalises the tokens, has a new final
    norm: as MAE and the paper fine-tune, and timm when its pooling changes.

    The classifier comes along when the source has a linear one, `cls` is an image classifier, and `num_labels` and
    `pooling` stay; otherwise it is new. Its labels stay while their number does. What the source has for its
    pre-training (mask token, decoder, second pooler) and the averaged classifiers of a distilled DeiT stay behind.

    ViT-MAE: the encoder, without masking. The final norm comes before the mean over all tokens, so that
    `last_hidden_state` is that of the source; for the recipe of the paper pass `norm_before_pooling=False`.
    DINOv2: pooling is that of the source class, CLS alone or, with a classifier, CLS and the mean of the patches.
    CLIP and SigLIP: the vision tower; text tower and temperature stay behind. `pooler_output` is the image embedding
    of CLIP (`get_image_features`) where the source has a projection, which `projection_dim=None` leaves behind.
    Models of dense tasks, which do not pool, leave attention pooling and projection behind.

    Args:
        cls: the class to build.
        source: a Hub repository or folder of a Transformers model, a name of timm (`"timm/..."`, `"hf-hub:..."`,
            `"vit_base_patch16_224"`), or a model of either library in memory, which stays as it is.
        kwargs: fields of the config to override (`pruning_rate`, `num_labels`, `image_size`, `drop_path_rate`, ...),
            and for a source that is loaded `revision`, `token`, `cache_dir` and the like. With another `image_size`
            the position table is resampled, with another `patch_size` the patch embedding as well (an EVA-02 with
            patches of 14 pixels becomes one of 16: `patch_size=16, image_size=512`). `use_cls_token=False`,
            `num_register_tokens=0` and `use_final_norm=False` leave behind what the source has; detectors do so. A
            source without register tokens can get new ones, such as those that gather what windows find; they have to
            be trained.

    Returns:
        A model of the class `cls`, in evaluation mode, with the dtype and on the device of the source.

    Raises:
        `ValueError`: an unknown keyword, a family or variant that is not supported, an override that the weights
            contradict, weights that are missing, left over or of the wrong shape.
        `ImportError`: a timm source without timm.
    """
    loading = {name: kwargs.pop(name) for name in LOADING_ARGUMENTS if name in kwargs}
    config_class: Any = cls.config_class  # Transformers declares it with the type of all configs
    check_names(config_class, kwargs)
    model_in_memory = _load(source, loading)
    if isinstance(model_in_memory, PreTrainedModel):
        description = hf.describe_transformers(model_in_memory)
    else:
        description = timm.describe_timm(model_in_memory)
    check_fixed_fields(description, kwargs)
    config = build_config(cls, config_class, description, kwargs)
    config.name_or_path = (
        getattr(model_in_memory, "name_or_path", "") if isinstance(source, nn.Module) else str(source)
    )

    weights = convert_weights(model_in_memory.state_dict(), description, config)
    first = next(model_in_memory.parameters())
    config.dtype = config.dtype or first.dtype
    # Building under the dtype, instead of casting, keeps rotary frequencies in float32.
    model = cls._from_config(config)
    new = set(FINAL_NORM) if _moves_norm(cls, description, config) else set()
    if config.num_register_tokens and not description.fields.get("num_register_tokens"):
        new.add(REGISTER_TOKENS)
        logger.warning(
            f"The source has no register tokens: the {config.num_register_tokens} of the model are new, and drawn at "
            "random. Train it before you use it."
        )
    weights |= {name: tensor for name, tensor in model.base_model.state_dict().items() if name in new}
    _fill(model, weights, _keeps_classifier(cls, description, config))
    return model.to(first.device).eval()


def check_names(
    config_class: type[CroprViTConfig],
    overrides: dict[str, Any],
    function: str = "from_vit",
    arguments: Sequence[str] = LOADING_ARGUMENTS,
) -> None:
    """Raises `ValueError` for an override that is not a field; it also lists further `arguments` of `function`."""
    fields = [field.name for field in dataclasses.fields(config_class) if not field.name.startswith("_")]
    known = [*fields, *config_class.attribute_map, *FURTHER_ARGUMENTS]
    for name in overrides:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *arguments], n=3, cutoff=0.5)
            raise ValueError(
                f"`{function}` does not know {name!r}; it takes fields of {config_class.__name__} and "
                f"{', '.join(arguments)}." + (f" Near matches: {', '.join(near)}." if near else "")
            )


def _load(source: Any, loading: dict[str, Any]) -> nn.Module:
    if isinstance(source, nn.Module):
        if loading:
            raise ValueError(f"{', '.join(loading)} say how to load a source, but it is in memory; leave them out.")
        return source
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"The source is a {type(source).__name__}; give a name, a folder, or a model.")
    name = os.fspath(source)
    is_of_timm = name.startswith(("timm/", "hf-hub:", "local-dir:")) or "/" not in name
    if is_of_timm and not os.path.isdir(name):
        return timm.load_timm(name, **loading)
    with named_damage(name):
        return hf.load_transformers(name, **loading)


def check_fixed_fields(description: SourceDescription, overrides: dict[str, Any]) -> None:
    """Raises `ValueError` for an override of a field that the weights decide."""
    defaults = CroprViTConfig(**description.fields, token_reducer=None)
    for name in (*FIXED_FIELDS, *DROPPABLE_FIELDS):
        native = getattr(defaults, name)
        wanted = overrides.get(name, native)
        is_left_out = name in DROPPABLE_FIELDS and not wanted
        is_new = name == "num_register_tokens" and not native
        if wanted != native and not is_left_out and not is_new:
            raise ValueError(f"`{name}` is {wanted}, but the weights of the source have {native}; leave it out.")
    if overrides.get("pooling") == "attention" != defaults.pooling:
        raise ValueError(
            f"`pooling` is 'attention', but the source has no weights for it; leave it out for {defaults.pooling!r}."
        )


def build_config(
    cls: type[CroprViTPreTrainedModel],
    config_class: type[CroprViTConfig],
    description: SourceDescription,
    overrides: dict[str, Any],
) -> CroprViTConfig:
    """The configuration of a source, with what the target class and the user say."""
    fields = {**description.fields}
    if not issubclass(cls, (CroprViTModel, CroprViTForImageClassification)):  # which do not pool
        fields["projection_dim"] = None
        fields["pooling"] = "patch_mean" if fields["pooling"] == "attention" else fields["pooling"]
    if "out_indices" in overrides and "out_features" not in overrides:
        fields.pop("out_features", None)
    try:
        fields |= {**cls.conversion_fields, **_labels(cls, description, overrides), **overrides}
        config = config_class(**fields)
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{overrides} make no configuration ({error}); give each a value of its kind.") from error
    has_loss = not issubclass(cls, (CroprViTModel, CroprViTBackbone))
    learns_embedding = issubclass(cls, CroprViTModel) and config.auxiliary_task == "embedding"
    if "use_auxiliary_heads" not in overrides and (has_loss or learns_embedding):
        config.use_auxiliary_heads = has_auxiliary_heads(config.token_reducer)
    return config


def _labels(cls: type, description: SourceDescription, overrides: dict[str, Any]) -> dict[str, Any]:
    """Fields for the labels of the source, where they stay: the names, unless they are overridden, and the number."""
    if not description.labels or not issubclass(cls, CroprViTForImageClassification):
        return {}
    named = overrides.get("id2label")
    number = overrides.get("num_labels", len(named) if named else description.labels["num_labels"])
    if named or number != description.labels["num_labels"]:
        return {}
    return description.labels


def _keeps_classifier(cls: type, description: SourceDescription, config: CroprViTConfig) -> bool:
    """Whether the classifier of the source fits: as many labels, and the same pooled vector."""
    native = CroprViTConfig(**description.fields, token_reducer=None)
    return (
        issubclass(cls, CroprViTForImageClassification)
        and config.num_labels == description.labels.get("num_labels")
        and all(getattr(config, name) == getattr(native, name) for name in POOLED_VECTOR)
    )


def _moves_norm(cls: type, description: SourceDescription, config: CroprViTConfig) -> bool:
    """Whether the final norm of a classifier sees means of tokens, but that of the source single tokens."""
    return (
        issubclass(cls, CroprViTForImageClassification)
        and config.use_final_norm
        and "mean" in config.pooling
        and description.fields["norm_before_pooling"]
        and not config.norm_before_pooling
    )


@torch.no_grad()
def _fill(model: CroprViTPreTrainedModel, weights: Weights, keeps_classifier: bool) -> None:
    """Copies the converted weights after the audit."""
    base_prefix = "" if isinstance(model, CroprViTModel) else f"{model.base_model_prefix}."
    heads = {name: tensor for name, tensor in weights.items() if name.startswith("classifier.")}
    named = {f"{base_prefix}{name}": tensor for name, tensor in weights.items() if name not in heads}
    if keeps_classifier:
        named |= heads
    audit_weights(named, model.state_dict(), base_prefix)
    model.load_state_dict(named, strict=False)
