"""Thin helpers around the Trainer; the models also train with the plain one."""

from .optimizer import layer_decay_groups, layer_decay_optimizer
from .trainer import CroprTrainer


__all__ = ["CroprTrainer", "layer_decay_groups", "layer_decay_optimizer"]
