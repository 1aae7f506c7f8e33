"""A Trainer that shows what the modules learn."""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..configuration_cropr_vit import CroprViTConfig
from ..modeling_cropr_vit import CroprViTModel
from ..publishing.model_card import class_name, merge_evaluation, model_facts, read_record, write_record
from ..saving import StrippableModel, is_checkpoint_folder
from ..speed.counts import PatchCounts
from .checkpoints import last_whole_checkpoint
from .diff_pruning import DiffPruning
from .distillation import Distillation, Distiller
from .ema import WeightAverage
from .record import dataset_facts, evaluation_metrics, licence_of, training_facts
from .streaming import TrainingStream


def _learns_embedding(config: CroprViTConfig) -> bool:
    return config.use_auxiliary_heads and config.auxiliary_task == "embedding"


class CroprTrainer(Trainer):
    """The `Trainer`, with the parts of the training loss in its logs, and a record of the run in the model card.

    Beside `loss` stand `main_loss`, one `auxiliary_loss_<block>` per Cropr module, and losses of other methods by
    their names, each the mean over the steps (and processes) since the last log.

    What is saved for publishing says how it was trained and what `evaluate` found after the training; `facts` holds
    what only a script knows (`dataset`, `settings`, ...), and replaces what the Trainer knows.

    A training that was killed, or found the disk full, goes on from the last whole checkpoint in `output_dir` by
    `train(resume_from_checkpoint=True)`; see `last_whole_checkpoint`.

    `WeightAverage` among the callbacks makes it evaluate and publish an average of the weights; `DiffPruning` keeps
    most weights of the backbone as they are. `train_dataset` can be a `TrainingStream`.

    With a teacher, which is frozen and never saved, the losses of `distillation` are added in training, and logged as
    `distillation_logits`, `distillation_embedding` and `distillation_tokens`. A `CroprViTModel` learns from it alone,
    without labels: made with `auxiliary_task="embedding"`, its auxiliary heads predict the teacher's embedding. Its
    evaluations have the same loss, and as predictions its embeddings (images, channels) and those of the teacher.

    Args:
        args, kwargs: of the `Trainer`.
        teacher: usually the unpruned source of the model: a model of Transformers, a folder or a Hub id.
        distillation: what is learned from it; by default the embedding, for a `CroprViTModel`, or the logits.

    Raises:
        `ValueError`: when the Trainer, and not the model, would compute the loss; for a teacher that does not fit the
            model, or a model that needs one.
        `OSError`: when there is no such teacher.
    """

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module | str | os.PathLike | None = None,
        distillation: Distillation | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        if self.args.label_smoothing_factor > 0 or self.compute_loss_func is not None:
            raise ValueError(
                "`label_smoothing_factor` and `compute_loss_func` take the labels away from the model, and with them "
                "the auxiliary losses; use `label_smoothing` of the model's configuration, or the plain `Trainer`."
            )
        self._distiller: Distiller | None = None
        student = self._bare_model()
        if teacher is not None:
            self._distiller = Distiller(teacher, student, distillation, self.args.device)
            self.can_return_loss = self.can_return_loss or self._distiller.label_free  # in evaluation without labels
        elif distillation is not None:
            raise ValueError("`distillation` says what to learn from a teacher, but there is none; give `teacher`.")
        elif isinstance(student, CroprViTModel) and _learns_embedding(student.config):
            raise ValueError(
                "A `CroprViTModel` has no loss of its own; its auxiliary heads learn from a teacher. Give `teacher`, "
                "usually the unpruned source of the model."
            )
        self.facts: dict[str, Any] = {}
        self._evaluations: list[dict[str, Any]] = []
        self._loss_parts: dict[str, torch.Tensor] = {}
        self._num_losses = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """See `Trainer.compute_loss`."""
        distiller = self._distiller
        parts: dict[str, torch.Tensor] = {}
        if distiller is None or not (model.training or distiller.label_free):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        else:
            student = self._bare_model()
            student_inputs = distiller.student_inputs(student, inputs)
            if distiller.label_free:
                loss, outputs = 0.0, model(**student_inputs)
            else:
                loss, outputs = super().compute_loss(model, student_inputs, True, num_items_in_batch)
            pixel_values, autocast = inputs["pixel_values"], self.accelerator.autocast()
            distilled, parts, embedding = distiller.losses(student, outputs, pixel_values, autocast)
            loss = loss + distilled
            if not model.training:  # nothing else of the outputs is worth gathering
                outputs = {"loss": loss, "embedding": outputs["pooler_output"]}
                outputs |= {} if embedding is None else {"teacher_embedding": embedding}
        if model.training and isinstance(outputs, dict):
            self._record(outputs, parts)
        return (loss, outputs) if return_outputs else loss

    def _bare_model(self) -> Any:
        """The model without what distributed training, compilation and PEFT put around it."""
        model: Any = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _record(self, outputs: dict[str, Any], parts: dict[str, torch.Tensor]) -> None:
        parts = {**parts}
        if outputs.get("main_loss") is not None:
            parts["main_loss"] = outputs["main_loss"]
        if outputs.get("auxiliary_losses") is not None:
            blocks = self.accelerator.unwrap_model(self.model).config.pruning_blocks
            parts |= {f"auxiliary_loss_{block}": loss for block, loss in zip(blocks, outputs["auxiliary_losses"])}
        parts |= outputs.get("method_losses") or {}
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

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """See `Trainer.create_scheduler`."""
        sharded: Any = getattr(optimizer or self.optimizer, "optimizer", None)
        if self.is_deepspeed_enabled and not hasattr(sharded, "defaults"):
            sharded.defaults = sharded.optimizer.defaults  # left out by DeepSpeed, but read by some schedules
        return super().create_scheduler(num_training_steps, optimizer)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """See `Trainer.train`; `True` stands for the last whole checkpoint in `output_dir`."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"{self.args.output_dir} holds no whole checkpoint to resume from; name one, or train from the "
                    "start."
                )
        if len(self._resumable) > 1:
            raise ValueError("An average changes all weights; leave `WeightAverage` or `DiffPruning` out.")
        self._evaluations = []  # they are those of other weights
        if isinstance(self.train_dataset, TrainingStream):
            self.train_dataset.start = self._batches_before(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _batches_before(self, checkpoint: Any) -> int:
        """Batches that this process had used when a checkpoint was written."""
        if not checkpoint or self.args.ignore_data_skip:
            return 0
        state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
        return state.global_step * self.args.gradient_accumulation_steps

    def get_train_dataloader(self):
        """See `Trainer.get_train_dataloader`; of a `TrainingStream` each process and worker reads its own share."""
        stream, args = self.train_dataset, self.args
        if not isinstance(stream, TrainingStream):
            return super().get_train_dataloader()
        stream.set_batches(self._train_batch_size, self.data_collator, args.process_index, args.world_size)
        return DataLoader(
            stream,
            batch_size=None,  # it makes batches itself
            num_workers=min(args.dataloader_num_workers, stream.read(0).num_shards),
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    @property
    def _resumable(self) -> list[WeightAverage | DiffPruning]:
        """Callbacks with tensors of their own beside the weights in a checkpoint."""
        callbacks = self.callback_handler.callbacks
        return [callback for callback in callbacks if isinstance(callback, (WeightAverage, DiffPruning))]

    @property
    def _weight_average(self) -> WeightAverage | None:
        return next((callback for callback in self._resumable if isinstance(callback, WeightAverage)), None)

    def _averaged_weights(self) -> Any:
        """A context in which the model has the averaged weights, if they are averaged."""
        average: Any = self._weight_average
        return contextlib.nullcontext() if average is None else average.applied(self.model)

    def evaluation_loop(self, *args, **kwargs):
        """See `Trainer.evaluation_loop`."""
        with self._averaged_weights():
            return super().evaluation_loop(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for callback in self._resumable:
            callback.resumed_from = resume_from_checkpoint

    def _load_best_model(self):
        super()._load_best_model()
        folder = self.state.best_model_checkpoint
        if self._weight_average is not None and folder is not None:
            self._weight_average.load(folder)

    def _save_checkpoint(self, model, trial):
        run_folder = self._get_output_dir(trial=trial)
        folder = os.path.join(run_folder, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        try:
            if self.args.should_save:
                # What an earlier run left here: nothing may make the new checkpoint look whole before it is.
                Path(folder, TRAINER_STATE_NAME).unlink(missing_ok=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is one or the other, by who writes
            free = shutil.disk_usage(str(self.args.output_dir)).free / 1e9
            last = last_whole_checkpoint(run_folder)
            way_on = f"go on from {last} by `resume_from_checkpoint=True`" if last else "start again"
            raise OSError(
                f"Saving {folder} failed ({error}); {free:.2f} GB are free there. Once there is room, {way_on}."
            ) from error

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        # Each process has written its own; the main one goes on to the file by which a checkpoint counts as whole.
        self.accelerator.wait_for_everyone()

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """See `Trainer.evaluate`."""
        # During training, and with another pruning, it is not yet the model that is published.
        base = getattr(self.accelerator.unwrap_model(self.model), "base_model", None)
        is_published = not self.is_in_train and getattr(base, "pruning", None) is None
        with PatchCounts(self._bare_model() if is_published else None) as counts:
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if is_published and not isinstance(dataset, (dict, str)):
            evaluation = dataset_facts(dataset)
            if eval_dataset is None:
                named = ("dataset", "config", "revision")
                evaluation |= {name: self.facts[name] for name in named if name in self.facts}
            evaluation |= {"step": self.state.global_step, "metrics": evaluation_metrics(metrics, metric_key_prefix)}
            counts.batches = gather_object(counts.batches)  # what fills up the last batch of processes counts again
            evaluation |= {"counts": found} if (found := counts.summary()) else {}
            self._evaluations = merge_evaluation(self._evaluations, evaluation)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """See `Trainer.save_model`."""
        if not self.is_in_train:  # folders to resume from have no card
            self._update_record()
        folder = output_dir or str(self.args.output_dir)
        if not is_checkpoint_folder(folder):
            with self._averaged_weights():
                super().save_model(output_dir, _internal_call)
            plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
            if plugin is not None and "FULL" not in str(plugin.state_dict_type):  # the Trainer writes no model then
                weights = self.accelerator.get_state_dict(self.model)
                if self.args.should_save:
                    self._save(folder, state_dict=weights)
            return
        super().save_model(output_dir, _internal_call)
        for callback in self._resumable if self.args.should_save else ():
            callback.save(folder)

    def create_model_card(  # type: ignore[override]
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes the record and the model card into `output_dir`; see `Trainer.create_model_card`.

        What its other arguments say (task, data set, source) is in the record; `facts` corrects it.
        """
        model: Any = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, StrippableModel):  # an adapter around it, for instance
            super().create_model_card(language, license, tags, model_name, **kwargs)
            return
        record = self._update_record()
        if not self.is_world_process_zero():
            return
        folder, name = Path(str(self.args.output_dir)), self.hub_model_id or model_name
        try:
            facts = read_record(folder)["model"]
        except ValueError:  # nothing is saved there yet
            facts = model_facts(model.config, class_name(model), folder.name, None, model.config.name_or_path)
        metadata = {"language": language, "license": license, "tags": [tags] if isinstance(tags, str) else tags}
        record["metadata"] = record.get("metadata", {}) | {key: value for key, value in metadata.items() if value}
        write_record(folder, {"model": {**facts, "name": name or facts["name"]}, **record})

    def _update_record(self) -> dict[str, Any]:
        """Tells the model what is known about its training and evaluation, for `save_pretrained`, and returns it."""
        model: Any = self.accelerator.unwrap_model(self.model)
        step = self.state.global_step
        known = getattr(model, "record", None) or {}
        record: dict[str, Any] = {name: known[name] for name in ("throughput", "metadata") if name in known}
        record["evaluations"] = [entry for entry in self._evaluations if entry["step"] == step]
        if step > 0:
            if "base_licence" not in self.facts and self.is_world_process_zero():
                self.facts["base_licence"] = licence_of(model.config.name_or_path)
            taught = {} if self._distiller is None else self._distiller.facts()
            record["training"] = training_facts(self) | taught | self.facts
        model.record = record
        return record
