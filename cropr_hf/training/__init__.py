"""Thin helpers around the Trainer; the models also train with the plain one."""

from ..token_schedule import curriculum_schedule
from .adapters import freeze_backbone, lora_model, merge_lora
from .checkpoints import last_whole_checkpoint
from .composite import train_routers
from .curriculum import PruningCurriculum
from .diff_pruning import DiffPruning, load_diff, save_diff
from .distillation import Distillation
from .ema import WeightAverage
from .optimizer import FrozenStart, layer_decay_groups, layer_decay_optimizer
from .record import changed_settings
from .streaming import TrainingStream
from .trainer import CroprTrainer


__all__ = [
    "CroprTrainer",
    "DiffPruning",
    "Distillation",
    "FrozenStart",
    "PruningCurriculum",
    "TrainingStream",
    "WeightAverage",
    "changed_settings",
    "curriculum_schedule",
    "freeze_backbone",
    "last_whole_checkpoint",
    "layer_decay_groups",
    "layer_decay_optimizer",
    "load_diff",
    "lora_model",
    "merge_lora",
    "save_diff",
    "train_routers",
]
