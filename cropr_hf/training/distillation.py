"""Learning from a teacher: the losses that pull a pruned model to it, and what it takes to compute them in a step."""

import dataclasses
import math
import os
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, PreTrainedModel

from ..configuration_cropr_vit import CroprViTConfig, check_finite
from ..conversion.hf import FAMILIES
from ..files import source_name
from ..modeling_cropr_vit import CroprViTForImageClassification, CroprViTModel, CroprViTPreTrainedModel
from ..modeling_cropr_vit_segmentation import CroprViTForSemanticSegmentation, upsample
from ..tasks import TASKS, find_task


STUDENTS = (CroprViTModel, CroprViTForImageClassification, CroprViTForSemanticSegmentation)


@dataclasses.dataclass
class Distillation:
    """What a model learns from its teacher: weights of the losses, which are added to its own.

    Args:
        logits: of the KL divergence from the teacher's class probabilities, times `temperature` squared; of a label
            map the mean over its pixels.
        embedding: of 1 - cosine of the two pooled embeddings.
        tokens: of the mean squared error between the patch tokens that are left in `last_hidden_state` (all, where
            they were restored; of a method that masks tokens in training, those that it keeps) and those of the
            teacher at the same places.
        temperature: by which the logits of both are divided.

    Raises:
        `ValueError`: for a number that is negative or not finite, a temperature of 0, or weights that are all 0.
    """

    logits: float = 0.0
    embedding: float = 0.0
    tokens: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_finite(self)
        for name in ("logits", "embedding", "tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}; the weight of a loss must be 0 or more.")
        if self.temperature <= 0:
            raise ValueError(f"`temperature` is {self.temperature}; it must be positive, such as 1.")
        if self.logits == self.embedding == self.tokens == 0:
            raise ValueError("The weights of `logits`, `embedding` and `tokens` are 0; give one that is positive.")


def logits_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Mean KL divergence of softened class probabilities, times `temperature` ** 2, which keeps gradients alike.

    Args:
        student: logits (B, C), or of label maps (B, C, rows, columns).
        teacher: the same; maps of another resolution are interpolated to that of the student.

    Raises:
        `ValueError`: for different shapes.
    """
    if teacher.dim() == student.dim() == 4:
        teacher = upsample(teacher, student.shape[-2:])
    _check_shapes("logits", student, teacher)
    of_student, of_teacher = ((logits.float() / temperature).log_softmax(dim=1) for logits in (student, teacher))
    divergence = F.kl_div(of_student, of_teacher, reduction="none", log_target=True).sum(dim=1)
    return divergence.mean() * temperature**2


def embedding_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean of 1 - cosine, in [0, 2].

    Args:
        student: (B, E), or (B, N, E) from N queries that all predict the embedding of the image.
        teacher: (B, E)

    Raises:
        `ValueError`: for different shapes.
    """
    if student.dim() == 3:
        teacher = teacher[:, None].expand(-1, student.shape[1], -1)
    _check_shapes("embedding", student, teacher)
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1).mean()


def tokens_loss(student: torch.Tensor, teacher: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Mean squared error of tokens; those that stand nowhere, as new and masked ones, count for nothing.

    Args:
        student: (B, K, D)
        teacher: all tokens (B, T, D).
        places: (B or 1, K), of the student's tokens among those of the teacher; T or more for those that have none.

    Raises:
        `ValueError`: for different shapes.
    """
    is_known = (places < teacher.shape[1]).expand(len(teacher), -1)
    # (B or 1, K) -> (B, K, D)
    indices = places.clamp(max=teacher.shape[1] - 1)[..., None].expand(len(teacher), -1, teacher.shape[-1])
    teacher = teacher.gather(1, indices)
    _check_shapes("tokens", student, teacher)
    errors = (student.float() - teacher.float()).square().mean(dim=-1)
    return (errors * is_known).sum() / is_known.sum().clamp(min=1)


def _check_shapes(name: str, student: torch.Tensor, teacher: torch.Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"The {name} of the model have the shape {tuple(student.shape)}, those of the teacher "
            f"{tuple(teacher.shape)}; choose a teacher with as many classes and channels."
        )


class Distiller:
    """A frozen teacher, and the losses of a student that learns from it; `CroprTrainer` calls it.

    The teacher is in evaluation mode, and stays outside of the student, so that nothing trains or saves it.

    Args:
        teacher: a Transformers model, a folder or a Hub id; see `load_teacher`.
        student: a `CroprViTModel`, an image classifier or a model of semantic segmentation, without wrappers.
        distillation: `None` is `Distillation(embedding=1)` for a `CroprViTModel`, or else `Distillation(logits=1)`.
        device: where the training runs.

    Attributes:
        label_free: whether the student has no loss of its own, so that it learns from the teacher alone.

    Raises:
        `ValueError`: for a student without anything to learn this way, or a teacher that does not fit.
    """

    def __init__(
        self,
        teacher: nn.Module | str | os.PathLike,
        student: PreTrainedModel,
        distillation: Distillation | None,
        device: torch.device,
    ):
        if not isinstance(student, STUDENTS):
            raise ValueError(
                f"{type(student).__name__} cannot learn from a teacher: there are losses for a "
                f"{', '.join(known.__name__ for known in STUDENTS)}. Distil one of these, and start from it."
            )
        self.label_free = isinstance(student, CroprViTModel)
        self.distillation = distillation or Distillation(**{"embedding" if self.label_free else "logits": 1.0})
        model = load_teacher(teacher, student)
        check_fit(student, model, self.distillation)
        if self.label_free:
            student.warn_without_heads()
        self.teacher = model.requires_grad_(False).eval().to(device)
        named = teacher if isinstance(teacher, (str, os.PathLike)) else model.config.name_or_path
        self.teacher_name = source_name(named) if named else type(model).__name__
        self._teacher_encoder = EncoderOutput(in_training=False)
        self._student_encoder = EncoderOutput(in_training=True)
        self._teacher_encoder.watch(self.teacher)

    def student_inputs(self, student: CroprViTPreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the student gets of a batch: no labels, if it has no use for them, and the word to say where its tokens
        are.
        """
        if self.label_free:
            inputs = {name: value for name, value in inputs.items() if name != "labels"}
        elif self.distillation.embedding or self.distillation.tokens:
            self._student_encoder.watch(student)
        return {**inputs, "output_pruning": True} if self.distillation.tokens else inputs

    def losses(
        self, student: CroprViTPreTrainedModel, outputs: Any, pixel_values: torch.Tensor, autocast: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor | None]:
        """The sum of the weighted losses, each of them by its name in the logs, and the teacher's embedding.

        For a student without a loss of its own the sum has its auxiliary losses, and those of its method.

        Args:
            student: without wrappers.
            outputs: of the student for the images, in training; for a `CroprViTModel` at any time.
            pixel_values: the images.
            autocast: the context of the student's forward pass.
        """
        encoded = outputs if self.label_free else self._student_encoder.take()
        with torch.no_grad(), autocast:
            shown = self.teacher(pixel_values=pixel_values.to(self.teacher.dtype))
        encoded_by_teacher = self._teacher_encoder.take() or shown
        embedding = _first(shown, "image_embeds", "pooler_output")
        embedding = _first(encoded_by_teacher, "pooler_output") if embedding is None else embedding
        parts, weights = {}, self.distillation
        if weights.logits:
            parts["logits"] = logits_loss(outputs["logits"], self._given(shown, "logits"), weights.temperature)
        if weights.embedding:
            parts["embedding"] = embedding_loss(encoded["pooler_output"], self._required(embedding))
        if weights.tokens:
            parts["tokens"] = self._tokens_loss(student, encoded, encoded_by_teacher, pixel_values)
        loss = torch.stack([getattr(weights, name) * part for name, part in parts.items()]).sum()
        named = {f"distillation_{name}": part for name, part in parts.items()}
        if self.label_free and encoded.get("auxiliary_logits") is not None:
            auxiliary = [embedding_loss(logits, self._required(embedding)) for logits in encoded["auxiliary_logits"]]
            loss = loss + student.config.auxiliary_loss_weight * torch.stack(auxiliary).sum()
            named |= {f"auxiliary_loss_{block}": part for block, part in zip(student.config.pruning_blocks, auxiliary)}
        if self.label_free and encoded.get("method_losses"):
            loss = loss + torch.stack(list(encoded["method_losses"].values())).sum()
        return loss, named, embedding

    def facts(self) -> dict[str, Any]:
        """What a record says about it: which teacher, and the settings."""
        settings = {name: value for name, value in dataclasses.asdict(self.distillation).items() if value}
        return {"teacher": self.teacher_name, "distillation": settings}

    def _tokens_loss(
        self, student: CroprViTPreTrainedModel, encoded: Any, encoded_by_teacher: Any, pixel_values: torch.Tensor
    ) -> torch.Tensor:
        tokens = self._given(encoded_by_teacher, "last_hidden_state")
        prefix, size = student.config.num_prefix_tokens, student.config.patch_size
        num_patches = math.prod(-(-length // size) for length in pixel_values.shape[-2:])
        if tokens.dim() != 3 or tokens.shape[1] < num_patches:
            raise ValueError(
                f"The teacher returns tokens of the shape {tuple(tokens.shape)} for images of {num_patches} patches; "
                "choose one that returns all of them, one after the other, such as an unpruned ViT."
            )
        places = encoded["token_indices"][:, prefix:] - prefix
        return tokens_loss(encoded["last_hidden_state"][:, prefix:], tokens[:, -num_patches:], places)

    def _given(self, outputs: Any, name: str) -> torch.Tensor:
        if (value := _first(outputs, name)) is None:
            raise ValueError(
                f"The teacher, {type(self.teacher).__name__}, returns no `{name}`; choose another, such as "
                "`from_vit(source, token_reducer=None)`, or set the weight of that loss to 0."
            )
        return value

    def _required(self, embedding: torch.Tensor | None) -> torch.Tensor:
        return self._given({}, "pooler_output") if embedding is None else embedding


def _first(outputs: Any, *names: str) -> torch.Tensor | None:
    return next((outputs[name] for name in names if outputs.get(name) is not None), None)


class EncoderOutput:
    """What the encoder in a model returned last: a model with a head does not pass it on.

    Args:
        in_training: whether outputs of training, or of evaluation, are kept.
    """

    def __init__(self, in_training: bool):
        self.in_training = in_training
        self.model: PreTrainedModel | None = None
        self.output: Any = {}

    def watch(self, model: PreTrainedModel) -> None:
        """Takes note of what the encoder in `model` returns from now on, unless it is the model."""
        if model is not self.model:  # the Trainer makes a new one where it has a `model_init`
            self.model = model
            if model.base_model is not model:
                model.base_model.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, output: Any) -> None:
        """The hook."""
        if module.training == self.in_training:
            self.output = output

    def take(self) -> Any:
        """The output, which is kept no longer."""
        output, self.output = self.output, {}
        return output


def load_teacher(teacher: nn.Module | str | os.PathLike, student: CroprViTPreTrainedModel) -> PreTrainedModel:
    """A model to learn from.

    For a `CroprViTModel` a ViT that `from_vit` can convert becomes an unpruned `CroprViTModel`, which pools as the
    student does (ViT and ViT-MAE of Transformers have a second pooler, or mask patches). Otherwise a model in memory
    is taken as it is, a Cropr folder loaded by the class that saved it, and anything else by the Auto class of the
    student's task.

    Raises:
        `ValueError`: for a folder that lacks weights, such as a classifier, or a model that is not of Transformers.
        `OSError`: when there is no such folder or repository, or it is out of reach.
    """
    is_encoder = isinstance(student, CroprViTModel)
    if isinstance(teacher, PreTrainedModel):
        converted = is_encoder and teacher.config.model_type in FAMILIES
        return CroprViTModel.from_vit(teacher, token_reducer=None) if converted else teacher
    if isinstance(teacher, nn.Module) and not is_encoder:
        raise ValueError(f"The teacher is a {type(teacher).__name__}; give a model of Transformers, or where it lies.")
    config: Any = None
    unreadable = None
    if not isinstance(teacher, nn.Module):
        try:
            config = AutoConfig.from_pretrained(teacher, trust_remote_code=False)
        except (OSError, ValueError) as error:  # a timm model has no Transformers configuration
            unreadable = error
    found = find_task((config.architectures or [""])[0]) if config is not None else None
    if found is not None and config.model_type == CroprViTConfig.model_type:
        return found[1].model_class.from_pretrained(teacher)
    if is_encoder:
        return CroprViTModel.from_vit(teacher, token_reducer=None)
    if unreadable is not None:
        raise OSError(
            f"The teacher {teacher} is neither a folder of a model nor a repository that can be reached: {unreadable}"
        ) from unreadable
    auto_class = next(task.auto_class for task in TASKS.values() if isinstance(student, task.model_class))
    model, info = getattr(transformers, auto_class).from_pretrained(
        teacher, trust_remote_code=False, output_loading_info=True
    )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"The teacher {teacher} lacks {len(missing)} weights of {type(model).__name__}, such as "
            f"{', '.join(missing[:3])}, so that it knows nothing; train it first, or choose another."
        )
    return model


def check_fit(student: CroprViTPreTrainedModel, teacher: PreTrainedModel, distillation: Distillation) -> None:
    """Raises `ValueError` where the two, or what is to be learned, do not fit together."""
    config, other = student.config, teacher.config
    if {id(parameter) for parameter in teacher.parameters()} & {id(parameter) for parameter in student.parameters()}:
        raise ValueError("The teacher shares weights with the model that learns from it; load it a second time.")
    if isinstance(student, CroprViTModel) and config.use_auxiliary_heads and config.auxiliary_task != "embedding":
        raise ValueError(
            f"`auxiliary_task` is {config.auxiliary_task!r}, but a `CroprViTModel` has no labels from which its "
            "auxiliary heads could learn that; load it with `auxiliary_task='embedding'`."
        )
    if distillation.logits:
        _check_classes(student, teacher)
    if distillation.embedding and not student.base_model.add_pooling_layer:
        raise ValueError(f"{type(student).__name__} has no pooled embedding; set the weight `embedding` to 0.")
    if distillation.tokens:
        for name in ("hidden_size", "patch_size", "norm_before_pooling"):
            if getattr(other, name, getattr(config, name)) != getattr(config, name):
                raise ValueError(
                    f"`{name}` of the teacher is {getattr(other, name)}, that of the model {getattr(config, name)}; "
                    "their tokens can be compared where it is the same. Set the weight `tokens` to 0."
                )
    if other.model_type == config.model_type and isinstance(student, CroprViTModel):
        if other.embedding_size != config.embedding_size:
            raise ValueError(
                f"The embedding of the teacher has {other.embedding_size} channels, that of the model "
                f"{config.embedding_size}; choose a teacher of the same width, such as the source of the model."
            )


def _check_classes(student: CroprViTPreTrainedModel, teacher: PreTrainedModel) -> None:
    config, other = student.config, teacher.config
    if isinstance(student, CroprViTModel):
        raise ValueError("A `CroprViTModel` has no logits; set the weight `logits` to 0, or `embedding` instead.")
    if config.problem_type not in (None, "single_label_classification"):
        raise ValueError(
            f"`problem_type` is {config.problem_type!r}, whose outputs are not the probabilities of one class each; "
            "set the weight `logits` to 0."
        )
    if other.num_labels != config.num_labels:
        raise ValueError(
            f"The teacher has {other.num_labels} classes, the model {config.num_labels}; choose a teacher that was "
            "trained on the same classes, or set the weight `logits` to 0."
        )
    names, own = (list((each.id2label or {}).values()) for each in (other, config))
    if names != own and sorted(names) == sorted(own):
        raise ValueError(
            f"The teacher has the classes of the model in another order ({names[:3]}, not {own[:3]}, come first); "
            "give the model, and the data, its order."
        )
