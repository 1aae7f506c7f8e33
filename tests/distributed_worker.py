"""What `test_distributed.py` launches in two processes, and runs in its own to compare with.

    accelerate launch ... tests/distributed_worker.py FOLDER SCENARIO [SCENARIO ...]

A scenario trains tiny models on the CPU and writes `<scenario>.pt` into the folder.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, gather_object
from transformers import Trainer, TrainerCallback

from cropr_hf import (
    CroprViTForImageClassification,
    CroprViTForInstanceSegmentation,
    CroprViTForSemanticSegmentation,
    CroprViTModel,
)
from cropr_hf.training import (
    CroprTrainer,
    DiffPruning,
    Distillation,
    PruningCurriculum,
    last_whole_checkpoint,
    layer_decay_optimizer,
)
from cropr_hf.training.diff_pruning import weights_digest
from tests.common import DETECTOR, make_images, object_labels
from tests.test_training import ColouredMaps, ColouredSquares, tiny_model, training_arguments


GLOBAL_BATCH = 8
ON_DEVICES = "CPU_AS_DEVICES" in os.environ
CURRICULUM = PruningCurriculum(0.5, levels=4, pruning_range=(0.5, 1))


class UnevenMaps(ColouredMaps):
    """From 0 to 28 of the 32 rows of a label map are ignored."""

    def __getitem__(self, index: int) -> dict:
        example = super().__getitem__(index)
        example["labels"][: 4 * (index % 8)] = 255
        return example


class Objects(torch.utils.data.Dataset):
    """Three objects in an image, and none in every second batch of two images."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict:
        images = make_images(2, seed=index)
        labels = object_labels(tiny_model().config, images, masks=True)["labels"]
        return {"pixel_values": images[0], "labels": labels[index // 2 % 2]}


def collate_objects(examples: list[dict]) -> dict[str, Any]:
    pixel_values = torch.stack([example["pixel_values"] for example in examples])
    return {"pixel_values": pixel_values, "labels": [example["labels"] for example in examples]}


TASKS = {
    "classification": (CroprViTForImageClassification, ColouredSquares, {}),
    "segmentation": (CroprViTForSemanticSegmentation, ColouredMaps, {"num_queries": None}),
    "uneven_segmentation": (CroprViTForSemanticSegmentation, UnevenMaps, {"num_queries": None}),
    "instance_segmentation": (CroprViTForInstanceSegmentation, Objects, DETECTOR),
    "taught_classification": (CroprViTForImageClassification, ColouredSquares, {}),
    "embedding": (CroprViTModel, ColouredSquares, {"auxiliary_task": "embedding"}),
}
UNPRUNED = {"token_reducer": None, "pruning_rate": None, "use_auxiliary_heads": False, "initializer_range": 0.1}
TAUGHT = {
    "taught_classification": Distillation(logits=1.0, embedding=1.0, tokens=0.1),
    "embedding": Distillation(embedding=1.0),
}


class WatchSchedule(TrainerCallback):
    """Patches that are left at the end, step by step."""

    def __init__(self):
        self.kept: list[int] = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.kept.append(model.config.kept_patches(pruning=model.cropr_vit.pruning)[-1])


def make_trainer(
    folder: Path, task: str = "classification", trainer_class: type = CroprTrainer, callbacks: Sequence = (), **kwargs
) -> Trainer:
    """A trainer whose batches are the same however many processes share them.

    There is nothing random but the order of the images, which depends on the seed alone.
    """
    model_class, dataset, fields = TASKS[task]
    processes = int(os.environ.get("WORLD_SIZE", 1))
    batch_size = GLOBAL_BATCH // processes // kwargs.get("gradient_accumulation_steps", 1)
    arguments: dict[str, Any] = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": batch_size,
        "adam_epsilon": 1e-6,  # far above rounding, which is all there is in some gradients (of biases of keys)
        "lr_scheduler_type": "polynomial",  # which reads the defaults of the optimizer
        "use_cpu": not ON_DEVICES,
        "dataloader_pin_memory": False,
    }
    args = training_arguments(folder, **{**arguments, **kwargs})
    model = tiny_model(model_class, **{"drop_path_rate": 0.0, **fields})
    taught = {}
    if task in TAUGHT:
        taught = {"teacher": tiny_model(model_class, **UNPRUNED), "distillation": TAUGHT[task]}
    return trainer_class(
        model,
        args,
        train_dataset=dataset(),
        data_collator=collate_objects if dataset is Objects else None,
        callbacks=list(callbacks),
        optimizer_cls_and_kwargs=layer_decay_optimizer(model, args, layer_decay=0.75),
        **taught,
    )


def losses(trainer: Trainer) -> dict[str, list[float]]:
    """The logged losses by name."""
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = [name for name in entries[0] if name.endswith(("loss", "_1", "_2")) or name.startswith("distillation_")]
    return {name: [entry[name] for entry in entries] for name in names}


def result(trainer: Trainer) -> dict[str, Any]:
    """Logged losses and complete weights. Every process has to call it."""
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return {"losses": losses(trainer), "weights": weights}


def ddp(folder: Path) -> dict[str, Any]:
    """Tasks and trainers; the curriculum and resuming within it; a detector one of whose processes sees no object."""
    results = {}
    for task in ("classification", "segmentation", "uneven_segmentation"):
        for trainer_class in (Trainer, CroprTrainer):
            trainer = make_trainer(folder / "unused", task, trainer_class)
            trainer.train()
            results[f"{task}, {trainer_class.__name__}"] = result(trainer)
    for task in TAUGHT:
        trainer = make_trainer(folder / "unused", task)
        trainer.train()
        results[task] = result(trainer)
    watch = WatchSchedule()
    trainer = make_trainer(folder / "whole", callbacks=[CURRICULUM, watch], save_strategy="steps", save_steps=4)
    trainer.train()
    results |= {"curriculum": result(trainer), "kept": watch.kept}
    trainer.save_model()
    trainer = make_trainer(folder / "unused", callbacks=[CURRICULUM])
    trainer.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-4"))
    results["resumed"] = result(trainer)
    results["instance_segmentation"] = detector(folder)
    return results


def detector(folder: Path) -> dict[str, Any]:
    """Two images per process, in their order, so that one process has no object in any of its steps."""
    trainer = make_trainer(folder / "unused", "instance_segmentation", per_device_train_batch_size=2)
    trainer._get_train_sampler = lambda dataset=None: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.train()
    return result(trainer)


def sharded(folder: Path) -> dict[str, Any]:
    """FSDP2 or DeepSpeed: a run with a checkpoint, what it evaluates and publishes, and one that resumes."""
    trainer = make_trainer(folder / "whole", save_strategy="steps", save_steps=5)
    trainer.train()
    results = {"whole": result(trainer)}
    results["kinds"] = sorted({type(parameter).__name__ for parameter in trainer.model_wrapped.parameters()})
    results["eval_loss"] = trainer.evaluate(ColouredSquares())["eval_loss"]
    trainer.save_model()
    trainer = make_trainer(folder / "unused")
    trainer.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-5"))
    results["resumed"] = result(trainer)
    results["last"] = last_whole_checkpoint(folder / "whole")
    return results


def more_tasks(folder: Path) -> dict[str, Any]:
    """The same for models of other tasks, without checkpoints."""
    trainer = make_trainer(folder / "unused", "segmentation", callbacks=[CURRICULUM])
    trainer.train()
    taught = make_trainer(folder / "unused", "embedding")
    taught.train()
    return {
        "segmentation": result(trainer),
        "embedding": result(taught),
        "instance_segmentation": detector(folder),
    }


def diff_pruning(folder: Path) -> dict[str, Any]:
    """What each process has in the end must be the same, so that all have drawn the same masks."""
    trainer = make_trainer(folder / "unused")
    trainer.add_callback(DiffPruning(trainer.model, 0.05))
    trainer.train()
    return {**result(trainer), "digests": gather_object([weights_digest(trainer.model.state_dict())])}


# Functions, and what they find in the environment
SCENARIOS: dict[str, tuple[Callable, dict[str, str]]] = {
    "ddp": (ddp, {}),
    "diff_pruning": (diff_pruning, {}),
    "deepspeed": (sharded, {}),
    "fsdp": (sharded, {}),
    "fsdp_tasks": (more_tasks, {}),
    "fsdp_sharded": (sharded, {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}),
    "fsdp_checkpointing": (sharded, {"FSDP_ACTIVATION_CHECKPOINTING": "true"}),
    "fsdp_modules": (more_tasks, {"FSDP_TRANSFORMER_CLS_TO_WRAP": "CroprViTLayer,CroprModule"}),
    "fsdp_bf16": (sharded, {"ACCELERATE_MIXED_PRECISION": "bf16"}),
}


def main(folder: str, *scenarios: str) -> None:
    if ON_DEVICES:  # Accelerate shards over devices only: two processes on the CPU shall count as such
        PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    environment = dict(os.environ)
    for name in scenarios:
        function, settings = SCENARIOS[name]
        os.environ.update({**environment, **settings})
        results = function(Path(folder, name))
        if PartialState().is_main_process:
            torch.save(results, Path(folder, f"{name}.pt"))
        PartialState().wait_for_everyone()
        AcceleratorState._reset_state()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
