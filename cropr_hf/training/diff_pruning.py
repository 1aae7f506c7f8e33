"""Diff pruning: a task as a sparse difference from a base, learned by the Trainer and kept in a small file.

Re-implemented from Guo, Rush and Kim, "Parameter-Efficient Transfer Learning with Diff Pruning" (arXiv 2012.07463).
Each weight of the backbone is base + g z w: w is its difference, z its mask, g that of its tensor (section 3.2).
"""

import copy
import functools
import hashlib
import json
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.state import AcceleratorState
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..configuration_cropr_vit import CroprViTConfig
from ..files import replacing
from ..modeling_cropr_vit import CroprViTPreTrainedModel
from ..saving import strip_state_dict
from ..tasks import find_task
from ..token_reduction import find_token_reducer
from .adapters import find_backbone
from .ema import SHARDED


logger = logging.get_logger(__name__)

Weights = Mapping[str, torch.Tensor]

STRETCH = (-1.5, 1.5)  # l and r, the ends of the interval from which masks are clamped to [0, 1]
LEAST_NOISE = 1e-4  # how far noise stays from 0 and 1
FIRST_LOGIT = 5.0  # of every mask: nearly all are open at first
MASK_LEARNING_RATE = 0.1  # of the logits, constant
MASK_GRADIENT_NORM = 1.0  # the longest gradient of the logits
STATE_NAME = "diff_pruning.pt"  # in a folder to resume from

# What the names of tensors in a file begin with: positions and new values of weights of the backbone, other weights
INDICES, VALUES, DENSE = "indices/", "values/", "dense/"
METADATA = ("class", "config", "dtype", "base")
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per weight
AGAIN = "make it again by `cropr-hf diff` or `save_diff`"


# --------------------------------------------------------------------------------------------------------------------
# Masks
# --------------------------------------------------------------------------------------------------------------------


def hard_concrete(
    logits: torch.Tensor, noise: torch.Tensor | None = None, stretch: tuple[float, float] = STRETCH
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks in [0, 1], many of them exactly 0 or 1, and their derivatives by the logits (section 3.1).

    Args:
        logits: of any shape; the larger, the more open.
        noise: of the same shape, uniform in (0, 1); `None` for masks without chance.
        stretch: l < 0 and r > 1.
    """
    low, high = stretch
    opened = torch.sigmoid(logits if noise is None else logits + torch.logit(noise))
    stretched = opened * (high - low) + low
    slopes = (high - low) * opened * (1 - opened)
    return stretched.clamp(0, 1), slopes * ((stretched > 0) & (stretched < 1))


def open_probability(logits: torch.Tensor, stretch: tuple[float, float] = STRETCH) -> torch.Tensor:
    """How likely a mask with noise is not 0, of the shape of the logits."""
    low, high = stretch
    return torch.sigmoid(logits - math.log(-low / high))


class Masks(NamedTuple):
    """The masks of one tensor, and their derivatives by the logits.

    Attributes:
        each, each_slope: of each weight, of the shape of the tensor.
        whole, whole_slope: of the tensor, scalars.
    """

    each: torch.Tensor
    each_slope: torch.Tensor
    whole: torch.Tensor
    whole_slope: torch.Tensor

    def gradients(self, gradient: torch.Tensor, difference: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Gradients by the difference, by the logits of the weights and by that of the tensor, from the gradient by
        the weights base + whole * each * difference.
        """
        pull = gradient * difference
        by_logits = pull * self.whole * self.each_slope
        return gradient * self.each * self.whole, by_logits, (pull * self.each).sum() * self.whole_slope


def penalty_gradient(logits: torch.Tensor) -> torch.Tensor:
    """Derivatives of how likely masks are open, by their logits.

    The penalty is the sum over all masks, of weights and of tensors, as in the authors' code, which its size is for;
    section 3.2 multiplies the two of a weight.
    """
    probability = open_probability(logits)
    return probability * (1 - probability)


def largest(tensors: Sequence[torch.Tensor], count: int) -> list[torch.Tensor]:
    """Where the `count` entries of largest magnitude over all tensors are, as booleans; of equal ones the first."""
    magnitudes = torch.cat([tensor.abs().flatten() for tensor in tensors])
    least = magnitudes.topk(count).values[-1]
    chosen = magnitudes > least
    chosen[(magnitudes == least).nonzero().flatten()[: count - int(chosen.sum())]] = True
    parts = chosen.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors)]


# --------------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------------


class DiffPruning(TrainerCallback):
    """Trains a model so that at most a share of the weights of its backbone differ from those that it has now.

    The share counts the weights of embeddings, blocks, final norm and pooling. Cropr modules and heads are trained in
    full, as always, and count for nothing.

    Give it to a `CroprTrainer` (`callbacks=[DiffPruning(model, 0.005)]`). It first searches: masks are drawn for each
    step, the same for all of its batches and in all processes, and their logits learn with the differences, while a
    penalty closes them. Then the share of the weights that changed most is kept (masks without chance), and only
    these are trained on; all others are, and stay, bit for bit those of the base. The learning rate of a weight is
    that of its difference, on one schedule for both stages, and weight decay pulls to the base. Evaluations and
    checkpoints have the weights of masks without chance; a `CroprTrainer` keeps the rest in its checkpoints, to resume
    exactly, from the same base.

    Of each weight it holds the base, the difference, and while it searches the logit and the two moments of that.

    It works with accumulation, mixed precision and DDP. It does not with weights in half precision, FSDP, DeepSpeed,
    frozen backbones, adapters, averages of weights or `load_best_model_at_end`.

    Args:
        model: any `CroprViT*` model, or another model around a `CroprViTBackbone`, before it is trained.
        share: of the weights of the backbone that may change, in (0, 1); 0.005 in the paper.
        penalty: times how likely each mask is open, summed up and added to the loss (not to what is logged); 1.25e-7
            in the authors' code.
        search: share of the steps after which the choice is fixed, in (0, 1]; one half in the paper.

    Raises:
        `ValueError`: for an argument out of range, a model without one backbone, or with a frozen one. When the
            training begins: for what it does not work with, or resuming from a checkpoint of another base or share.
    """

    def __init__(self, model: nn.Module, share: float = 0.005, penalty: float = 1.25e-7, search: float = 0.5):
        if not 0 < share < 1:
            raise ValueError(f"`share` is {share}; it must be in (0, 1), such as 0.005.")
        if not 0 <= penalty < math.inf:
            raise ValueError(f"`penalty` is {penalty}; it must be a finite number, 0 or more, such as 1.25e-7.")
        if not 0 < search <= 1:
            raise ValueError(f"`search` is {search}; it must be in (0, 1], such as 0.5 for half of the training.")
        prefix, backbone = find_backbone(model)
        parameters = {
            prefix + name: parameter
            for name, parameter in backbone.named_parameters()
            if not name.startswith("token_reducers.")
        }
        if frozen := [name for name, parameter in parameters.items() if not parameter.requires_grad]:
            raise ValueError(
                f"{frozen[0]} is frozen, but diff pruning chooses among all weights of the backbone; leave "
                "`freeze_backbone` and adapters out."
            )
        total = sum(parameter.numel() for parameter in parameters.values())
        self.count = math.floor(share * total)
        if self.count < 1:
            raise ValueError(f"`share` is {share}, which of {total} weights is none; give a larger one.")
        self.penalty, self.search = penalty, search
        self.base = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self.differences: dict[str, torch.Tensor] = {}  # this and what follows while training
        self.logits: dict[str, torch.Tensor] = {}
        self.whole_logits = torch.empty(0)  # of the tensors, (tensors,)
        self.mask_optimizer: torch.optim.Optimizer | None = None
        self.support: dict[str, torch.Tensor] | None = None  # which weights may change, once that is fixed
        self.search_steps = 0
        self.resumed_from: str | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Begins with no difference and open masks, or with those of the checkpoint."""
        self._check(args)
        if state.global_step > 0 and self.resumed_from is None:
            raise ValueError("Only a `CroprTrainer` can resume diff pruning; use it, or begin anew.")
        device = self._parameters(model)[0].device
        self.base = {name: tensor.to(device) for name, tensor in self.base.items()}
        self.differences = {name: torch.zeros_like(tensor) for name, tensor in self.base.items()}
        self.logits = {name: torch.full_like(tensor, FIRST_LOGIT) for name, tensor in self.base.items()}
        self.whole_logits = torch.full((len(self.base),), FIRST_LOGIT, device=device)
        masks = [*self.logits.values(), self.whole_logits]
        self.mask_optimizer = torch.optim.AdamW(masks, lr=MASK_LEARNING_RATE, weight_decay=0.0)
        self.support = None
        self.search_steps = max(1, round(self.search * state.max_steps))
        if self.resumed_from is not None:
            self.load(self.resumed_from)

    @torch.no_grad()
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Gives the model the weights of the coming step; when the search is over, fixes which ones change."""
        if self.support is None and state.global_step >= self.search_steps:
            self._fix_support()
        self._write(model, self._generator(args, state))

    @torch.no_grad()
    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Puts the differences and their gradients in the place of the weights, for the optimizer to change them."""
        scaler = getattr(optimizer, "scaler", None)
        if scaler is not None and not args.max_grad_norm:  # clipping has done it
            scaler.unscale_(optimizer.optimizer)
        parameters = self._parameters(model)
        if self.support is None:
            self._learn_masks(parameters, self._generator(args, state))
        else:
            for parameter, support in zip(parameters, self.support.values()):
                if parameter.grad is not None:
                    parameter.grad.mul_(support)
        for parameter, difference in zip(parameters, self.differences.values()):
            parameter.copy_(difference)

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Takes the differences back, and gives the model its weights again."""
        for parameter, difference in zip(self._parameters(model), self.differences.values()):
            difference.copy_(parameter)
        self._write(model)

    @torch.no_grad()
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Leaves the model with no more changed weights than it may have, also where the search has not ended."""
        if self.support is None:
            self._fix_support()
        self._write(model)
        self.differences, self.support, self.resumed_from = {}, None, None

    def save(self, folder: str | os.PathLike) -> None:
        """Writes what the model's weights do not tell into a folder to resume from, `diff_pruning.pt`."""
        state = {"run": self._run, "differences": self.differences, "support": self.support}
        if self.mask_optimizer is not None:
            masks = {"logits": self.logits, "whole_logits": self.whole_logits}
            state |= {"masks": masks, "mask_optimizer": self.mask_optimizer.state_dict()}
        torch.save(state, os.path.join(folder, STATE_NAME))

    @torch.no_grad()
    def load(self, folder: str | os.PathLike) -> None:
        """Reads what `save` wrote; raises `ValueError` if there is nothing, or that of another base or share."""
        path = os.path.join(folder, STATE_NAME)
        if not os.path.exists(path):
            raise ValueError(
                f"The checkpoint {folder} has no differences ({STATE_NAME}): it was written without diff pruning, or "
                "not by a `CroprTrainer`. Leave diff pruning out, or begin anew."
            )
        state = torch.load(path, map_location=self.whole_logits.device, weights_only=True)
        if state["run"] != self._run:
            raise ValueError(
                f"The checkpoint {folder} is of {state['run']}, this training of {self._run}; resume with the same "
                "model to start from and the same share, or begin anew."
            )
        self.differences, self.support = state["differences"], state["support"]
        if self.support is not None:
            self._forget_masks()
            return
        assert self.mask_optimizer is not None
        for name, logits in self.logits.items():
            logits.copy_(state["masks"]["logits"][name])
        self.whole_logits.copy_(state["masks"]["whole_logits"])
        self.mask_optimizer.load_state_dict(state["mask_optimizer"])

    @functools.cached_property
    def _run(self) -> dict[str, Any]:
        """What a training and its resumption have in common."""
        return {"base": weights_digest(self.base), "changed weights": self.count}

    def _check(self, args: TrainingArguments) -> None:
        kind = AcceleratorState().distributed_type
        if kind in SHARDED:
            raise ValueError(f"Diff pruning does not work under {kind.value}, which shards weights; train with DDP.")
        if coarse := {tensor.dtype for tensor in self.base.values()} & {torch.float16, torch.bfloat16}:
            raise ValueError(
                f"Weights in {', '.join(map(str, coarse))} are too coarse for small differences; load the model in "
                "float32, and train with `bf16=True` or `fp16=True`, which keep the weights as they are."
            )
        if args.load_best_model_at_end:
            raise ValueError(
                "`load_best_model_at_end` may go back to where the changed weights were not chosen yet; leave it out "
                "with diff pruning."
            )

    def _parameters(self, model: nn.Module) -> list[nn.Parameter]:
        parameters = dict(model.named_parameters())
        return [parameters[name] for name in self.base]

    def _generator(self, args: TrainingArguments, state: TrainerState) -> torch.Generator:
        """Of the noise of a step: the same in all processes, and in a resumed run."""
        seed = random.Random(f"diff pruning, seed {args.seed}, step {state.global_step}").getrandbits(63)
        return torch.Generator(self.whole_logits.device).manual_seed(seed)

    def _masks(self, generator: torch.Generator | None) -> Iterator[Masks]:
        """The masks of each tensor in turn, with noise or, without a generator, without chance."""

        def noise(logits: torch.Tensor) -> torch.Tensor | None:
            if generator is None:
                return None
            return torch.empty_like(logits).uniform_(LEAST_NOISE, 1 - LEAST_NOISE, generator=generator)

        wholes = zip(*hard_concrete(self.whole_logits, noise(self.whole_logits)))
        for logits, whole in zip(self.logits.values(), wholes):
            yield Masks(*hard_concrete(logits, noise(logits)), *whole)

    def _changes(self, generator: torch.Generator | None = None) -> Iterator[torch.Tensor]:
        """What the masks, or the support, let through of the differences of each tensor in turn."""
        gates: Any = (masks.whole * masks.each for masks in self._masks(generator))
        if self.support is not None:
            gates = self.support.values()
        return (gate * difference for gate, difference in zip(gates, self.differences.values()))

    def _write(self, model: nn.Module, generator: torch.Generator | None = None) -> None:
        """Gives the model the base with its changes."""
        for parameter, base, change in zip(self._parameters(model), self.base.values(), self._changes(generator)):
            parameter.copy_(torch.where(change == 0, base, base + change))  # -0.0 + 0.0 would be 0.0

    def _learn_masks(self, parameters: list[nn.Parameter], generator: torch.Generator) -> None:
        """One step of the logits; turns the gradients by the weights into those by the differences."""
        assert self.mask_optimizer is not None
        whole_gradient = self.penalty * penalty_gradient(self.whole_logits)
        tensors = zip(parameters, self.differences.values(), self.logits.values(), self._masks(generator))
        for index, (parameter, difference, logits, masks) in enumerate(tensors):
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            by_difference, by_logits, by_whole = masks.gradients(gradient, difference)
            logits.grad = by_logits + self.penalty * penalty_gradient(logits)
            whole_gradient[index] += by_whole
            gradient.copy_(by_difference)  # in place: under DDP it may be a part of a larger tensor
        self.whole_logits.grad = whole_gradient
        norm = nn.utils.clip_grad_norm_([*self.logits.values(), self.whole_logits], MASK_GRADIENT_NORM)
        if torch.isfinite(norm):  # in float16 gradients may overflow; the optimizer leaves such a step out as well
            self.mask_optimizer.step()
        self.mask_optimizer.zero_grad()

    def _fix_support(self) -> None:
        """Projects the changes to the largest (section 3.3), which training goes on with as they are.

        (The authors' code ranks a random sample, the head with it, and goes on with differences without their masks.)
        """
        changes = dict(zip(self.base, self._changes()))
        changed = sum(int(change.count_nonzero()) for change in changes.values())
        if changed < self.count:
            logger.warning(
                f"The masks left changes of {changed} weights, fewer than the {self.count} of `share`; choose a "
                f"smaller `penalty` than {self.penalty}, or a smaller share."
            )
        self.support = dict(zip(self.base, largest(list(changes.values()), self.count)))
        self.differences = changes
        self._forget_masks()

    def _forget_masks(self) -> None:
        self.logits, self.mask_optimizer = {}, None


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


def weights_digest(weights: Weights) -> str:
    """SHA-256 of names, shapes, types and bits of weights."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = _in_one_piece(weights[name])
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_diff(
    model: CroprViTPreTrainedModel,
    base: CroprViTPreTrainedModel,
    path: str | os.PathLike,
    image_processor: Any = None,
) -> int:
    """Writes what makes a model of a base into a file, whole or not at all.

    It holds the positions (int32) and the new values of the weights of the backbone that differ, and all of the rest:
    the stripped modules of the token reducer, the head, the configuration. The base may be a model of any task with
    the same backbone, of which the file has a digest.

    Args:
        model: any `CroprViT*` model, complete or stripped.
        base: the model that it was trained from, or another around the same backbone.
        path: of the file, usually `.safetensors`.
        image_processor: kept in the file as well, for `cropr-hf diff --apply`.

    Returns:
        How many weights of the backbone differ.

    Raises:
        `ValueError`: for other models, a base without a weight of the backbone or with one of another shape or type,
            or so many differences that the model itself is smaller.
        `OSError`: when the file cannot be written.
    """
    config = copy.deepcopy(_checked(model, "model").config)
    if config.use_auxiliary_heads:
        for name, value in find_token_reducer(config).stripped_fields(config).items():
            setattr(config, name, value)
    backbone, dense = _split(model)
    before = _backbone_of(base, backbone)
    tensors = {DENSE + name: _in_one_piece(tensor).clone() for name, tensor in dense.items()}
    changed = saved_bytes = 0
    for name, tensor in backbone.items():
        weights, bits = _in_one_piece(tensor), BITS[tensor.element_size()]
        indices = (weights.view(bits) != _in_one_piece(before[name]).view(bits)).flatten().nonzero()[:, 0]
        if len(indices):
            tensors[INDICES + name] = indices.to(torch.int32)
            tensors[VALUES + name] = weights.flatten()[indices]
        changed += len(indices)
        saved_bytes += weights.nbytes - len(indices) * (4 + weights.element_size())
    if saved_bytes <= 0:
        total = sum(tensor.numel() for tensor in backbone.values())
        raise ValueError(
            f"{changed} of {total} weights of the backbone differ, so that the model itself is smaller than what is "
            "to be written; save that, or train with `DiffPruning` (`--diff_share`) from this base."
        )
    metadata = {
        "format": "pt",
        "class": type(model).__name__,
        "config": config.to_json_string(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "base": weights_digest(before),
    }
    if image_processor is not None:
        metadata["image_processor"] = image_processor.to_json_string()
    with replacing(path) as draft:
        draft.write_bytes(save(tensors, metadata))  # `save_file` makes files that nobody else can read
    return changed


def load_diff(base: CroprViTPreTrainedModel, path: str | os.PathLike) -> Any:
    """The model whose difference `save_diff` wrote: its class, all weights bit for bit, in evaluation mode.

    The base stays as it is, and shares no memory with the model.

    Raises:
        `ValueError`: for a file of another kind or a damaged one, and for a base that is not the one it was made with.
    """
    _checked(base, "base")
    metadata = diff_metadata(path)
    try:
        tensors = load_file(path)
        config = CroprViTConfig.from_dict(json.loads(metadata["config"]))
        dtype = getattr(torch, metadata["dtype"])
        found = find_task(metadata["class"])
        if found is None:
            raise ValueError(f"it has no class {metadata['class']}")
        model_class = found[1].model_class
        with torch.device("meta"):
            skeleton = model_class(config).to(dtype)
    except (SafetensorError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or of another version of this package ({error}); {AGAIN}.") from error
    backbone, dense = _split(skeleton)
    before = _backbone_of(base, backbone)
    digest = weights_digest(before)
    if digest != metadata["base"]:
        raise ValueError(
            f"{path} was made with another base: the digest of its weights is {metadata['base'][:12]}, here it is "
            f"{digest[:12]}; give the model that the training began with, as it was then."
        )
    _check_tensors(path, tensors, backbone, dense)
    weights = {name: tensors[DENSE + name] for name in dense}
    for name, tensor in before.items():
        restored = _in_one_piece(tensor).clone()
        if INDICES + name in tensors:
            restored.view(-1)[tensors[INDICES + name].long()] = tensors[VALUES + name]
        weights[_prefix(skeleton) + name] = restored
    return model_class.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)


def diff_metadata(path: str | os.PathLike) -> dict[str, str]:
    """What `save_diff` wrote into a file beside the weights: `class`, `config` (JSON), `dtype`, `base` (the digest),
    and `image_processor` (JSON) if there was one.

    Raises:
        `ValueError`: for a file that it did not write.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or not a file of `save_diff` ({error}); {AGAIN}.") from error
    if missing := [name for name in METADATA if name not in metadata]:
        raise ValueError(f"{path} does not say its {', '.join(missing)}: it is not a file of `save_diff`; {AGAIN}.")
    return metadata


def _checked(model: Any, name: str) -> CroprViTPreTrainedModel:
    if not isinstance(model, CroprViTPreTrainedModel):
        raise ValueError(f"`{name}` is a {type(model).__name__}; give a `CroprViT*` model, without adapters.")
    return model


def _in_one_piece(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous()


def _prefix(model: CroprViTPreTrainedModel) -> str:
    """What the names of weights of the backbone begin with."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def _split(model: CroprViTPreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights of the backbone, by their names in it, and all other weights of the stripped model, by theirs."""
    weights, prefix = model.state_dict(), _prefix(model)
    if model.config.use_auxiliary_heads:
        weights = strip_state_dict(weights, model.config)
    sparse = {name for name in weights if name.startswith(prefix) and "token_reducers." not in name}
    backbone = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name in sparse}
    return backbone, {name: tensor for name, tensor in weights.items() if name not in sparse}


def _backbone_of(base: CroprViTPreTrainedModel, wanted: Weights) -> dict[str, torch.Tensor]:
    """Those weights of a base that a backbone has; raises `ValueError` where there are none, or others in kind."""
    weights, _ = _split(_checked(base, "base"))
    if missing := sorted(wanted.keys() - weights.keys()):
        raise ValueError(
            f"The base lacks {len(missing)} weights of the backbone, such as {missing[0]}; give the model that the "
            "training began with."
        )
    for name, tensor in wanted.items():
        if weights[name].shape != tensor.shape:
            raise ValueError(
                f"{name} has the shape {tuple(weights[name].shape)} in the base, and {tuple(tensor.shape)} in the "
                "other model; give the model that the training began with, of the same image and patch size."
            )
        if weights[name].dtype != tensor.dtype:
            raise ValueError(
                f"{name} is {weights[name].dtype} in the base, and {tensor.dtype} in the other model; load the base "
                f"with `dtype={tensor.dtype}`."
            )
    return {name: weights[name] for name in wanted}


def _check_tensors(path: str | os.PathLike, tensors: Weights, backbone: Weights, dense: Weights) -> None:
    """Raises `ValueError` for tensors of a file that do not fit the model of its configuration."""
    expected = {DENSE + name: (tensor.shape, tensor.dtype) for name, tensor in dense.items()}
    for name, tensor in backbone.items():
        if {INDICES + name, VALUES + name} & tensors.keys():
            entries = torch.Size([tensors[INDICES + name].numel() if INDICES + name in tensors else 0])
            expected |= {INDICES + name: (entries, torch.int32), VALUES + name: (entries, tensor.dtype)}
    for names, flaw in ((expected.keys() - tensors.keys(), "lacks"), (tensors.keys() - expected.keys(), "also has")):
        if names:
            raise ValueError(f"{path} {flaw} tensors such as {min(names)}; {AGAIN}.")
    for name, tensor in tensors.items():
        if (tensor.shape, tensor.dtype) != expected[name]:
            raise ValueError(
                f"{path} has {name} of the shape {tuple(tensor.shape)} and type {tensor.dtype}, where its model needs "
                f"{tuple(expected[name][0])} and {expected[name][1]}; {AGAIN}."
            )
        size = backbone[name.removeprefix(INDICES)].numel() if name.startswith(INDICES) else 0
        if size and not ((tensor >= 0) & (tensor < size)).all():
            raise ValueError(f"{path} has {name} outside of the {size} weights that there are; {AGAIN}.")
