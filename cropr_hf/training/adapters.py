"""Training a part of a model: Cropr modules and head alone, or with low-rank adapters (LoRA) in the blocks."""

import math
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..files import source_name
from ..modeling_cropr_vit import CroprViTModel, CroprViTPreTrainedModel
from ..token_reduction import OwnWeights
from ..vit_layers import CroprViTAttention, CroprViTDropPath


if TYPE_CHECKING:
    from peft import PeftModel


BLOCK_LINEAR_LAYERS = r"layers\.\d+\.(attention\.[qkvo]_proj|mlp\.(fc1|fc2|gate_proj|up_proj|down_proj))"


def freeze_backbone(model: PreTrainedModel) -> None:
    """Trains Cropr modules and task head only: no gradient is computed for embeddings, blocks and final norm.

    A frozen backbone is deterministic: drop path and dropout are switched off in it, also in the configuration.

    Args:
        model: any `CroprViT*` model, or another model around a `CroprViTBackbone`, all the rest of which is trained.

    Raises:
        `ValueError`: when there is not one Cropr ViT in the model.
    """
    _, backbone = find_backbone(model)
    for name, parameter in backbone.named_parameters():
        if not name.startswith("token_reducers."):
            parameter.requires_grad_(False)
    for module in (*backbone.embeddings.modules(), *backbone.layers.modules()):
        if isinstance(module, CroprViTDropPath):
            module.rate = 0.0
        elif isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, CroprViTAttention):
            module.attention_dropout = 0.0
    for field in ("drop_path_rate", "hidden_dropout_prob", "attention_probs_dropout_prob"):
        setattr(backbone.config, field, 0.0)


def lora_model(
    model: CroprViTPreTrainedModel, rank: int = 8, alpha: float | None = None, **kwargs: Any
) -> "PeftModel":
    """Low-rank adapters on all linear layers of the blocks; Cropr modules and task head are trained in full.

    Embeddings and norms of the backbone are frozen.

    It trains with the `Trainer`, whose checkpoints then hold adapters, Cropr modules and head, without the frozen
    weights: to resume, wrap a model from the same source, which they name if it is on the Hub. `merge_lora` makes an
    ordinary model of the result. What it saves, `peft.PeftModel.from_pretrained` puts on the base as it is published,
    stripped, or on a complete one.

    Args:
        model: any `CroprViT*` model.
        rank: of the product that is added to each weight matrix, 1 or more.
        alpha: the product is scaled by `alpha / rank`; twice the rank if `None`.
        kwargs: further fields of `peft.LoraConfig`, such as `lora_dropout`.

    Raises:
        `ImportError`: when `peft` is not installed.
        `ValueError`: for another model, a rank below 1, or a scale that is not positive and finite.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError('LoRA needs peft: pip install "cropr_hf[lora]"') from error
    if not isinstance(model, CroprViTPreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} is not a `CroprViT*` model; use `peft.get_peft_model` with your own list."
        )
    if rank < 1:
        raise ValueError(f"`rank` is {rank}; it must be 1 or more, such as 8.")
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(f"`alpha` is {alpha}; it must be a positive number, such as 16.")
    prefix, backbone = find_backbone(model)
    # PEFT publishes both, and looks for the first on the Hub: of a local folder only its name goes into the card.
    source = str(model.config.name_or_path)
    model.config.name_or_path = source_name(source)
    model.name_or_path = source if model.config.name_or_path == source else ""
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,  # type: ignore[arg-type]
        target_modules=re.escape(prefix) + BLOCK_LINEAR_LAYERS,
        modules_to_save=_trained_in_full(model, backbone),
        **kwargs,
    )
    adapted = get_peft_model(model, config)
    for module in adapted.modules():
        if isinstance(module, OwnWeights) and any(parameter.requires_grad for parameter in module.parameters()):
            module.register_state_dict_post_hook(_add_stripped)
            module.register_load_state_dict_pre_hook(_drop_stripped)
    return adapted  # type: ignore[return-value]


@torch.no_grad()
def _add_stripped(module: OwnWeights, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """What a stripped base has in place of a module's weights is saved with them, for PEFT to load there.

    PEFT asks the module alone for its weights, and the model for those of modules that it saves; others, such as a
    merged model, stay as they are.
    """
    if not prefix or ".modules_to_save." in prefix:
        state_dict |= {prefix + name: tensor for name, tensor in module.stripped_weights().items()}


@torch.no_grad()
def _drop_stripped(module: OwnWeights, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in module.stripped_weights():
        state_dict.pop(prefix + name, None)


def merge_lora(model: "PeftModel") -> CroprViTPreTrainedModel:
    """The model that `lora_model` wrapped, with the adapters added to its weights: an ordinary Cropr model.

    Outputs stay the same up to rounding; `save_pretrained` strips it as always.
    """
    merged: Any = model.merge_and_unload()  # type: ignore[operator]
    return merged.requires_grad_(True).train(merged.training)  # a folded query freezes itself again


def find_backbone(model: nn.Module) -> tuple[str, CroprViTModel]:
    """The only Cropr ViT in a model, and what the names of its modules begin with."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, CroprViTModel)]
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} contains {len(found)} Cropr ViTs; give a `CroprViT*` model, or a model around "
            "one `CroprViTBackbone`."
        )
    name, backbone = found[0]
    return name + "." if name else "", backbone


def _trained_in_full(module: nn.Module, backbone: CroprViTModel, prefix: str = "") -> list[str]:
    """Names of the outermost modules with trainable parameters of their own, in token reducers and task heads.

    PEFT takes every module whose name ends with one of these. Larger modules would not do: `classifier` is the head of
    a model, and in each auxiliary head.
    """
    names = []
    for name, child in module.named_children():
        if module is backbone and name != "token_reducers":
            continue
        if any(parameter.requires_grad for parameter in child.parameters(recurse=False)):
            names.append(prefix + name)
        else:
            names += _trained_in_full(child, backbone, f"{prefix}{name}.")
    return names
