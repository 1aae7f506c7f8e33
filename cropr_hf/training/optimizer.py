"""Learning rates by depth: layer-wise decay, as the paper trains, and a backbone that waits at first."""

import math
import re
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..modeling_cropr_vit import CroprViTPreTrainedModel


# Where a parameter of the base model stands; block 0 is the embeddings, L + 1 what comes after the blocks.
EMBEDDINGS = re.compile(r"embeddings\..+")
BLOCK = re.compile(r"layers\.(\d+)\..+")
AFTER_BLOCKS = re.compile(r"(layernorm|token_reducers|pooler|visual_projection)\..+")
NEVER_DECAYED = ("cls_token", "register_tokens", "position_embeddings", "probe")


def layer_of(name: str, model: CroprViTPreTrainedModel) -> int:
    """Depth of a parameter: 0 for embeddings, 1 to L for blocks, L + 1 for what comes after them and for heads.

    Raises:
        `ValueError`: for a parameter of the base model that stands in none of them.
    """
    last = model.config.num_hidden_layers + 1
    prefix = "" if model.base_model is model else model.base_model_prefix + "."
    if not name.startswith(prefix):
        return last  # a task head
    name = name.removeprefix(prefix)
    if EMBEDDINGS.fullmatch(name):
        return 0
    if block := BLOCK.fullmatch(name):
        return int(block[1]) + 1
    if AFTER_BLOCKS.fullmatch(name):
        return last
    raise ValueError(f"No layer is known for the parameter {name!r}; name its place in `cropr_hf.training.optimizer`.")


def layer_decay_groups(
    model: CroprViTPreTrainedModel,
    learning_rate: float,
    weight_decay: float,
    layer_decay: float,
    backbone_learning_rate: float | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups whose learning rate falls by `layer_decay` per block from the head down to the embeddings.

    Cropr modules count as the head. One-dimensional parameters (biases, norms, layer scale), prefix tokens, positions
    and the probe of attention pooling have no weight decay; queries do, as in the reference code of the paper.

    Args:
        model: any `CroprViT*` model, also one that PEFT wrapped.
        learning_rate: of the head, at the peak of the schedule.
        weight_decay: of all other parameters.
        layer_decay: factor per block in (0, 1]; 1 is no decay.
        backbone_learning_rate: of the last block, from which it falls towards the embeddings; `learning_rate *
            layer_decay` by default. In a short training new modules need far more than pretrained blocks.

    Returns:
        Groups, the head's first (the Trainer logs the rate of the first), which `is_head` marks. Frozen parameters are
        in none.

    Raises:
        `ValueError`: for a number out of range, or a parameter without a known place.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"`layer_decay` is {layer_decay}; it must be in (0, 1], where 1 is no decay.")
    if backbone_learning_rate is None:
        backbone_learning_rate = learning_rate * layer_decay
    numbers = {"learning_rate": learning_rate, "weight_decay": weight_decay}
    numbers["backbone_learning_rate"] = backbone_learning_rate
    for argument, value in numbers.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"`{argument}` is {value}; it must be a finite number, 0 or more.")
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    unwrap: Any = getattr(model, "get_base_model", lambda: model)  # of PEFT
    model = unwrap()
    last = model.config.num_hidden_layers + 1
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_of(name, model)
        decayed = parameter.ndim > 1 and not name.endswith(NEVER_DECAYED)
        group = {
            "params": [],
            "lr": learning_rate if layer == last else backbone_learning_rate * layer_decay ** (last - 1 - layer),
            "weight_decay": weight_decay if decayed else 0.0,
            "is_head": layer == last,
        }
        groups.setdefault((layer, decayed), group)["params"].append(parameter)
    return [groups[key] for key in sorted(groups, reverse=True)]


def layer_decay_optimizer(
    model: CroprViTPreTrainedModel,
    args: TrainingArguments,
    layer_decay: float,
    backbone_learning_rate: float | None = None,
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """AdamW with layer-wise decay for `Trainer(optimizer_cls_and_kwargs=...)`, from the usual training arguments; see
    `layer_decay_groups`.
    """
    groups = layer_decay_groups(model, args.learning_rate, args.weight_decay, layer_decay, backbone_learning_rate)
    kwargs = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    return torch.optim.AdamW, {"params": groups, **kwargs}


class FrozenStart(TrainerCallback):
    """Leaves the backbone as it is at first, by a learning rate of 0; what counts as the head learns from the start.

    So DynamicViT trains, whose predictors are new. Gradients are computed all the same, so that distributed training
    sees no difference. For optimizers of `layer_decay_optimizer`, and schedules that compute each rate from the peak.

    Args:
        share: of the training steps, in [0, 1].

    Raises:
        `ValueError`: for a share out of range; when the training begins, for another optimizer.
    """

    def __init__(self, share: float):
        if not 0 <= share <= 1:
            raise ValueError(f"`share` is {share}; it must be in [0, 1], such as 0.1 for a tenth of the training.")
        self.share = share

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Takes the rate of the backbone away for the coming step; after it the schedule sets all of them anew."""
        if state.global_step >= self.share * state.max_steps:
            return
        for group in optimizer.param_groups:
            if "is_head" not in group:
                raise ValueError(
                    "`FrozenStart` does not know which parameters are of the backbone; use `layer_decay_optimizer`."
                )
            if not group["is_head"]:
                group["lr"] = 0.0
