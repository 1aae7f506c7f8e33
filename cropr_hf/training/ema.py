"""An exponential moving average of the weights, which is what is evaluated and published."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


EMA_NAME = "ema.pt"  # in a folder to resume from
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


class WeightAverage(TrainerCallback):
    """Averages the weights of a model over the training steps: average = decay * average + (1 - decay) * weights.

    Give it to a `CroprTrainer` (`callbacks=[WeightAverage(0.9999)]`), which evaluates the average, keeps it beside the
    weights in each `checkpoint-<step>`, and goes on with both when it resumes. After the training the model has the
    averaged weights, those of the best checkpoint with `load_best_model_at_end`; they are what is saved and published.

    The average begins with the weights after the first step, and remembers about 1 / (1 - decay) steps: choose a decay
    that makes this a small part of the training.

    Args:
        decay: in [0, 1); 0.9999 for a hundred thousand steps or more, 0.99 for a thousand.

    Raises:
        `ValueError`: for a decay out of range. When the training begins: with weights in half precision (too coarse to
            average), with FSDP or DeepSpeed (which shard weights or hold them elsewhere), or resuming from a
            checkpoint without an average.
    """

    def __init__(self, decay: float = 0.9999):
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` is {decay}; it must be in [0, 1), such as 0.9999.")
        self.decay = decay
        self.average: AveragedModel | None = None  # while training
        self.is_applied = False
        self.resumed_from: str | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Makes the average, or reads that of the checkpoint."""
        self._check(model)
        if state.global_step > 0 and self.resumed_from is None:
            raise ValueError("Only a `CroprTrainer` can resume with an average of weights; use it, or begin anew.")
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(self.decay))
        if self.resumed_from is not None:
            self.load(self.resumed_from)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Takes the new weights into the average."""
        if self.average is not None:
            self.average.update_parameters(model)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Gives the model the averaged weights for good."""
        if self.average is not None and self.average.n_averaged:
            self._exchange(model)
        self.average = self.resumed_from = None

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """While training, the model has the averaged weights inside of this context."""
        if self.average is None or not self.average.n_averaged or self.is_applied:
            yield
            return
        self._exchange(model)
        self.is_applied = True
        try:
            yield
        finally:
            self._exchange(model)
            self.is_applied = False

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the average into a folder to resume from, `ema.pt`."""
        if self.average is not None:
            torch.save(self.average.state_dict(), os.path.join(folder, EMA_NAME))

    def load(self, folder: str | os.PathLike) -> None:
        """Reads what `save` wrote; raises `ValueError` if there is nothing."""
        path = os.path.join(folder, EMA_NAME)
        if not os.path.exists(path):
            raise ValueError(
                f"The checkpoint {folder} holds no average of weights ({EMA_NAME}): it was written without one, or "
                "not by a `CroprTrainer`. Leave the average out, or begin anew."
            )
        if self.average is not None:
            self.average.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        """Swaps weights and average in place, so that optimizers and wrappers keep their parameters."""
        assert self.average is not None
        for weights, average in zip(model.parameters(), self.average.module.parameters()):
            kept = weights.clone()
            weights.copy_(average)
            average.copy_(kept)

    @staticmethod
    def _check(model: nn.Module) -> None:
        kind = AcceleratorState().distributed_type
        if kind in SHARDED:
            raise ValueError(f"Weights cannot be averaged under {kind.value}; train with DDP, or without an average.")
        coarse = {parameter.dtype for parameter in model.parameters()} & {torch.float16, torch.bfloat16}
        if coarse:
            raise ValueError(
                f"Weights in {', '.join(map(str, coarse))} are too coarse to average; load the model in float32, and "
                "train with `bf16=True` or `fp16=True`, which keep the weights as they are."
            )
