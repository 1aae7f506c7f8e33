"""Tiny models and the table that the shared suite in `test_modeling.py` and `test_saving.py` runs over.

A new task class joins the suite by one line in `TASKS`, a new kind of backbone or schedule by one in `CONFIGS`.
"""

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from cropr_hf import (
    CroprViTBackbone,
    CroprViTConfig,
    CroprViTForImageClassification,
    CroprViTForSemanticSegmentation,
    CroprViTModel,
)


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


def label_maps(config: CroprViTConfig, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Random classes for every pixel, a tenth of them ignored."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(config.num_labels, pixel_values[:, 0].shape, generator=generator)
    ignored = torch.rand(labels.shape, generator=generator) < 0.1
    return {"labels": labels.masked_fill(ignored, config.semantic_loss_ignore_index)}


@dataclass(frozen=True)
class Task:
    """A model class, what it takes for training, which of its outputs matters, and fields that it insists on."""

    model_class: type
    output: str
    labels: Callable[[CroprViTConfig, torch.Tensor], dict[str, Any]] | None = None
    fields: dict[str, Any] = field(default_factory=dict)

    def takes(self, name: str) -> bool:
        """Whether the class runs with a configuration of the table: not without fusion if it insists on that."""
        return CONFIGS[name].get("last_layer_fusion", True) or "last_layer_fusion" not in self.fields

    def build(self, name: str = "plain", seed: int = 0, **overrides: Any) -> Any:
        """See `make_model`."""
        return make_model(self.model_class, tiny_config(name, **{**self.fields, **overrides}), seed)

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
    "segmentation": Task(
        CroprViTForSemanticSegmentation, "logits", label_maps, {"num_queries": None, "last_layer_fusion": True}
    ),
}


def tiny_config(name: str = "plain", **overrides: Any) -> CroprViTConfig:
    return CroprViTConfig(**{**TINY, **CONFIGS[name], **overrides})


def with_heads(name: str) -> bool:
    """Whether a configuration of the table can have auxiliary heads."""
    return CONFIGS[name].get("token_reducer", "cropr") == "cropr"


def combinations(config_names: Collection[str]) -> list[Any]:
    """Every task class with every configuration that it can have, as parameters `task` and `name` of a test."""
    return [
        pytest.param(task, name, id=f"{task}-{name}")
        for task in TASKS
        for name in config_names
        if TASKS[task].takes(name)
    ]


def make_model(model_class: type, config: CroprViTConfig, seed: int = 0) -> nn.Module:
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


def make_identity_blocks(model: nn.Module) -> None:
    """Every block returns its input exactly, so that a token shows where it came from."""
    with torch.no_grad():
        for layer in model.base_model.layers:
            output = layer.mlp.down_proj if hasattr(layer.mlp, "down_proj") else layer.mlp.fc2
            for linear in (layer.attention.o_proj, output):
                for parameter in linear.parameters():
                    parameter.zero_()


def random_schedule(rng: random.Random, num_patches: int, fusion: bool) -> list[int]:
    """A schedule of `NUM_BLOCKS` entries that prunes at least one patch."""
    last = NUM_BLOCKS - (2 if fusion else 1)
    while True:
        entries = sorted((rng.randint(1, num_patches) for _ in range(last)), reverse=True)
        if entries[-1] < num_patches:
            return entries + [entries[-1]] * (NUM_BLOCKS - last)


@torch.no_grad()
def naive_forward(model: CroprViTModel, image: torch.Tensor) -> tuple[torch.Tensor, list[int], list[torch.Tensor]]:
    """The model on one image (1, 3, H, W), in plain loops: lists of (place, token), one token pruned at a time.

    Returns:
        Tokens (T, D) that leave the last block, the block after which each patch was pruned, and the tokens that each
        module sees.
    """
    config, prefix = model.config, model.config.num_prefix_tokens
    tokens, grid_size = model.embeddings(image)
    rotation = model.rotary_embedding(grid_size, tokens.dtype, tokens.device) if model.rotary_embedding else None
    alive = list(enumerate(tokens[0]))
    aside, seen = [], []
    kept = config.kept_patches(len(alive) - prefix)
    blocks_of = dict.fromkeys(range(len(alive) - prefix), config.num_hidden_layers)
    for block, layer in enumerate(model.layers, start=1):
        if block == config.num_hidden_layers and config.last_layer_fusion:
            alive = sorted(alive + aside, key=lambda item: item[0])
        positions = None
        if rotation:
            places = [place for place, _ in alive]
            positions = tuple(part[:, places] for part in rotation)
        output = layer(torch.stack([token for _, token in alive])[None], positions)[0]
        alive = [(place, token) for (place, _), token in zip(alive, output)]
        if block not in config.pruning_blocks:
            continue
        seen.append(torch.stack([token for _, token in alive]))
        query = model.token_reducers[str(block)].router.scorer.query()
        while len(alive) - prefix > kept[block - 1]:
            scores = []
            for _, token in alive[prefix:]:
                token = F.layer_norm(token, token.shape, eps=1e-6) if config.scorer_pre_norm else token
                scores.append(torch.dot(token, query).item())
            worst = prefix + min(range(len(scores)), key=lambda index: scores[index])
            blocks_of[alive[worst][0] - prefix] = block
            aside.append(alive.pop(worst))
    return torch.stack([token for _, token in alive]), [blocks_of[place] for place in sorted(blocks_of)], seen


def fill_with_ramps(model: PreTrainedModel) -> None:
    """Weights that no initialisation code can change: sine waves whose phase is the position in the sorted names."""
    with torch.no_grad():
        for phase, (name, parameter) in enumerate(sorted(model.named_parameters())):
            wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * 0.7 + 1.3 * phase)
            scale = 1.0 if name.endswith(("queries", "cls_token", "position_embeddings")) else 0.3
            offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_((offset + scale * wave).view(parameter.shape))


def ramp_images() -> torch.Tensor:
    """Two images that no generator of random numbers can change."""
    ramp = torch.arange(2 * 3 * 32 * 32, dtype=torch.float64)
    return (torch.cos(ramp * 0.01) + 0.5 * torch.sin(ramp * 0.37)).view(2, 3, 32, 32).float()
