"""Routers inside detectors and other models: the labels of the whole model train them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from ..labels import class_presence
from ..modeling_cropr_vit import CroprViTBackbone, CroprViTBackboneOutput


Presence = Callable[[dict[str, Any]], torch.Tensor | None]


def train_routers(model: PreTrainedModel, presence: Presence | None = None) -> CroprViTBackbone:
    """Makes the routers of the `CroprViTBackbone` inside a model train together with that model.

    In training, the classes in the labels of an image are what the auxiliary heads learn to predict, and
    `auxiliary_loss_weight` (of the backbone's configuration) times the sum of the auxiliary losses is added to the
    `loss` of the model. In evaluation nothing changes. A backbone without auxiliary heads gets them.

    Call it before the optimizer is made. Pass labels by keyword, as the `Trainer` does. It does not work with
    `torch.nn.DataParallel` (start one process per device instead).

    Args:
        model: detection (`labels` with `class_labels`), universal segmentation (`class_labels`) or semantic
            segmentation (`labels`, maps); or any other, with `presence`.
        presence: gets the keyword arguments of `model`, from which it may take away what `model` does not know, and
            returns which classes each image shows, (B, C) in [0, 1], or `None`. It is called in evaluation as well.
            Where `model` computes no loss (DPT for depth), `loss` is the auxiliary part alone.

    Returns:
        The backbone. Before publishing call its `remove_auxiliary_heads()`, then `model.save_pretrained(...)`.

    Raises:
        `ValueError`: when there is not one backbone in the model, the two have different numbers of classes, the
            backbone does not learn to prune, or this has been done before; in training, for labels of another kind or
            classes out of range.
    """
    backbones = [module for module in model.modules() if isinstance(module, CroprViTBackbone) and module is not model]
    if len(backbones) != 1:
        raise ValueError(
            f"{type(model).__name__} contains {len(backbones)} `CroprViTBackbone`; give a model built around one "
            "(other Cropr ViTs train their routers by themselves)."
        )
    hooks = [getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values()]
    if any(isinstance(hook, _RouterHooks) for hook in hooks):
        raise ValueError("The routers of this model are being trained already; call `train_routers` once.")
    backbone = backbones[0]
    if presence is None and backbone.config.num_labels != model.config.num_labels:
        raise ValueError(
            f"The backbone has {backbone.config.num_labels} classes, the model {model.config.num_labels}; set "
            "`num_labels` of `backbone_config` to that of the model, or give `presence`."
        )
    backbone.add_auxiliary_heads()
    _RouterHooks(model, backbone, presence)
    return backbone


class _RouterHooks:
    """Hooks around the forward pass of a model and that of its backbone, and what they hand over during one pass."""

    def __init__(self, model: PreTrainedModel, backbone: CroprViTBackbone, presence: Presence | None):
        self.backbone = backbone
        self.presence = presence
        self.labels: torch.Tensor | None = None
        self.losses: torch.Tensor | None = None
        model.register_forward_pre_hook(self.take_labels, with_kwargs=True)
        backbone.register_forward_pre_hook(self.pass_labels, with_kwargs=True)
        backbone.register_forward_hook(self.keep_losses)
        model.register_forward_hook(self.add_losses)

    def take_labels(self, model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self.losses = self.labels = None  # a pass that failed may have left them
        if self.presence is not None:
            self.labels = self.presence(kwargs)
        elif model.training:
            config = model.config
            ignored = getattr(config, "semantic_loss_ignore_index", getattr(config, "loss_ignore_index", 255))
            self.labels = presence_in_labels(kwargs, self.backbone.config.num_labels or 0, ignored)
        return args, kwargs

    def pass_labels(self, backbone: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {"labels": self.labels, **kwargs} if backbone.training else kwargs

    def keep_losses(self, backbone: Any, args: Any, output: CroprViTBackboneOutput) -> None:
        self.losses = output.auxiliary_losses

    def add_losses(self, model: Any, args: Any, output: ModelOutput) -> None:
        losses, self.losses, self.labels = self.losses, None, None
        if losses is None:
            return
        if not isinstance(output, ModelOutput):
            raise ValueError("The auxiliary losses cannot be added to a tuple; leave `return_dict` out.")
        auxiliary_loss = self.backbone.config.auxiliary_loss_weight * losses.sum()
        loss = output.get("loss")
        output["loss"] = auxiliary_loss if loss is None else loss + auxiliary_loss


def presence_in_labels(kwargs: dict[str, Any], num_labels: int, ignore_index: int) -> torch.Tensor | None:
    """Which classes each image shows, from the labels among the keyword arguments of a model.

    Args:
        kwargs: may hold `class_labels`, class indices (objects,) of each image; or `labels`, either a mapping with
            `class_labels` for each image, or maps of class indices (B, height, width).
        num_labels: classes C.
        ignore_index: no class, in maps.

    Returns:
        (B, C), 0 or 1; `None` without labels.

    Raises:
        `ValueError`: for labels of another kind, or classes out of range.
    """
    labels = kwargs.get("class_labels", kwargs.get("labels"))
    if labels is None:
        return None
    if isinstance(labels, torch.Tensor) and labels.dim() == 3 and not labels.is_floating_point():
        images = [label_map[label_map != ignore_index] for label_map in labels]
    elif isinstance(labels, Sequence) and all(isinstance(image, Mapping) for image in labels):
        images = [image["class_labels"] for image in labels]
    elif isinstance(labels, Sequence) and all(isinstance(image, torch.Tensor) for image in labels):
        images = list(labels)
    else:
        raise ValueError(
            f"Labels of the type {type(labels).__name__} do not say which classes an image shows; give `presence` to "
            "`train_routers`, a function that does."
        )
    classes = torch.cat(images).long()
    if classes.numel() and not 0 <= classes.min() <= classes.max() < num_labels:
        raise ValueError(
            f"The labels have classes from {classes.min().item()} to {classes.max().item()}; the backbone has "
            f"{num_labels}, so they must be in [0, {num_labels - 1}]. Set `num_labels` of `backbone_config` (and of "
            "the model) to the number of classes."
        )
    return class_presence(images, num_labels)
