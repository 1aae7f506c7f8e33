"""Thin helpers around the Trainer; the models also train with the plain one."""

from .composite import train_routers
from .curriculum import PruningCurriculum, curriculum_schedule
from .optimizer import layer_decay_groups, layer_decay_optimizer
from .trainer import CroprTrainer


__all__ = [
    "CroprTrainer",
    "PruningCurriculum",
    "curriculum_schedule",
    "layer_decay_groups",
    "layer_decay_optimizer",
    "train_routers",
]
