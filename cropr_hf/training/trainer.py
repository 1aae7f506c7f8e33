"""A Trainer that shows what the modules learn."""

from typing import Any

import torch
from transformers import Trainer


class CroprTrainer(Trainer):
    """The `Trainer`, with the parts of the training loss in its logs and its log history.

    Beside `loss` stand `main_loss` and one `auxiliary_loss_<block>` per Cropr module, each the mean over the steps
    (and processes) since the last log.

    Raises:
        `ValueError`: when the Trainer, and not the model, would compute the loss.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.args.label_smoothing_factor > 0 or self.compute_loss_func is not None:
            raise ValueError(
                "`label_smoothing_factor` and `compute_loss_func` take the labels away from the model, and with them "
                "the auxiliary losses; use `label_smoothing` of the model's configuration, or the plain `Trainer`."
            )
        self._loss_parts: dict[str, torch.Tensor] = {}
        self._num_losses = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """See `Trainer.compute_loss`."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training and isinstance(outputs, dict):
            self._record(outputs)
        return (loss, outputs) if return_outputs else loss

    def _record(self, outputs: dict[str, Any]) -> None:
        parts = {}
        if outputs.get("main_loss") is not None:
            parts["main_loss"] = outputs["main_loss"]
        if outputs.get("auxiliary_losses") is not None:
            blocks = self.accelerator.unwrap_model(self.model).config.pruning_blocks
            parts |= {f"auxiliary_loss_{block}": loss for block, loss in zip(blocks, outputs["auxiliary_losses"])}
        for name, part in parts.items():
            part = part.detach().mean()
            self._loss_parts[name] = self._loss_parts[name] + part if name in self._loss_parts else part
        self._num_losses += 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """See `Trainer.log`."""
        if "loss" in logs and self._loss_parts:
            # One transfer from the device for all parts, and one exchange between processes.
            means = torch.stack(list(self._loss_parts.values())) / self._num_losses
            means = self.accelerator.reduce(means, reduction="mean").tolist()
            logs |= {name: round(mean, 4) for name, mean in zip(self._loss_parts, means)}
            self._loss_parts, self._num_losses = {}, 0
        super().log(logs, start_time)
