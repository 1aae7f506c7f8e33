"""Tiny models and the table that the shared suite in `test_modeling.py` and `test_saving.py` runs over.

A new task class joins the suite by one line in `TASKS`, a new kind of backbone or schedule by one in `CONFIGS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cropr_hf import CroprViTBackbone, CroprViTConfig, CroprViTForImageClassification, CroprViTModel


NUM_LABELS = 5
IMAGE_SIZE = 32
PATCH_SIZE = 8
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
NUM_BLOCKS = 5

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
    "num_labels": NUM_LABELS,
    "pruning_rate": 2,
    # Far from the small weights of a real model, so that a wrong token or position is visible in the output.
    "initializer_range": 0.2,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rope_registers": {
        "rope_theta": 100.0,
        "rope_coordinates": "centered",
        "num_register_tokens": 2,
        "use_absolute_position_embeddings": False,
        "norm_before_pooling": True,
        "pooling": "cls_patch_mean",
    },
    "no_cls": {"use_cls_token": False, "pooling": "patch_mean"},
    "eva02": {
        "use_gated_mlp": True,
        "use_mlp_norm": True,
        "hidden_act": "silu",
        "layerscale_value": 0.5,
        "rope_theta": 10000.0,
        "key_bias": False,
    },
    "schedule": {"pruning_rate": None, "pruning_schedule": [16, 10, 7, 7, 7]},
    "no_fusion": {"last_layer_fusion": False, "num_register_tokens": 1},
    "all_scorer_options": {
        "num_queries": 3,
        "scorer_num_heads": 2,
        "scorer_query_projection": True,
        "scorer_key_projection": True,
        "scorer_pre_norm": True,
        "aggregator_value_projection": True,
    },
    "random": {"token_reducer": "random"},
    "unpruned": {"token_reducer": None, "pruning_rate": None},
}


def image_labels(config: CroprViTConfig, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"labels": torch.arange(len(pixel_values)) % config.num_labels}


@dataclass(frozen=True)
class Task:
    """A model class, what it takes for training, and which of its outputs matters."""

    model_class: type
    output: str
    labels: Callable[[CroprViTConfig, torch.Tensor], dict[str, Any]] | None = None
    needs_fusion: bool = False

    def main_output(self, outputs: Any) -> torch.Tensor:
        value = outputs[self.output]
        return value if isinstance(value, torch.Tensor) else value[-1]

    def inputs(self, config: CroprViTConfig, batch_size: int = 2, height: int = IMAGE_SIZE, width: int = IMAGE_SIZE):
        pixel_values = make_images(batch_size, height, width)
        labels = self.labels(config, pixel_values) if self.labels else {}
        return {"pixel_values": pixel_values, **labels}

    def loss(self, outputs: Any) -> torch.Tensor:
        if self.labels:
            return outputs.loss
        # A plain mean would be constant after a LayerNorm.
        return (self.main_output(outputs) * torch.linspace(-1, 1, self.main_output(outputs).shape[-1])).square().mean()


TASKS: dict[str, Task] = {
    "model": Task(CroprViTModel, "last_hidden_state"),
    "backbone": Task(CroprViTBackbone, "feature_maps"),
    "classification": Task(CroprViTForImageClassification, "logits", labels=image_labels),
}


def tiny_config(name: str = "plain", **overrides: Any) -> CroprViTConfig:
    return CroprViTConfig(**{**TINY, **CONFIGS[name], **overrides})


def with_heads(name: str) -> bool:
    """Whether a configuration of the table can have auxiliary heads."""
    return CONFIGS[name].get("token_reducer", "cropr") == "cropr"


def make_model(model_class: type, config: CroprViTConfig, seed: int = 0) -> torch.nn.Module:
    """A model in evaluation mode whose biases, norms and prefix tokens are not at their neutral first values."""
    torch.manual_seed(seed)
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def make_images(batch_size: int = 2, height: int = IMAGE_SIZE, width: int = IMAGE_SIZE, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, 3, height, width, generator=generator)


def make_identity_blocks(model: torch.nn.Module) -> None:
    """Every block returns its input exactly, so that a token shows where it came from."""
    with torch.no_grad():
        for layer in model.base_model.layers:
            output = layer.mlp.down_proj if hasattr(layer.mlp, "down_proj") else layer.mlp.fc2
            for linear in (layer.attention.o_proj, output):
                for parameter in linear.parameters():
                    parameter.zero_()
