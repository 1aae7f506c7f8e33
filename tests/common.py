"""Tiny models and the table that the shared suite in `test_modeling.py` and `test_saving.py` runs over.

A new task class joins the suite by one line in `TASKS`, a new kind of backbone or schedule by one in `CONFIGS`.
"""

import random
import socket
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from cropr_hf import (
    TOKEN_REDUCERS,
    CroprViTBackbone,
    CroprViTConfig,
    CroprViTForImageClassification,
    CroprViTForInstanceSegmentation,
    CroprViTForObjectDetection,
    CroprViTForSemanticSegmentation,
    CroprViTModel,
    find_token_reducer,
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
    "windows": {
        "use_cls_token": False,
        "pooling": "patch_mean",
        "rope_theta": 100.0,
        "window_size": 2,
        "window_block_indices": [0, 1, 3, 4],  # on 16, 12, 6 and, after fusion, all patches; 6 do not tile
        "pruning_rate": None,
        "pruning_schedule": [12, 8, 6, 6, 6],
    },
    "windows_without_rotation": {
        "use_cls_token": False,
        "pooling": "mean",
        "window_size": 2,
        "window_block_indices": [1, 2, 3],
        "pruning_rate": 4,
    },
    "random": {"token_reducer": "random"},
    "tome": {"token_reducer": "tome", "num_register_tokens": 1},
    "tocom": {
        "token_reducer": "tocom",
        "num_register_tokens": 1,
        "use_auxiliary_heads": True,
        "reducer_config": {"trained_rate": 1, "scale": 1.0},
    },
    "ailurus": {"token_reducer": "ailurus", "pruning_rate": 7, "last_layer_fusion": False},
    "evit": {"token_reducer": "evit", "pruning_rate": None, "num_register_tokens": 1, "rope_theta": 100.0},
    "asvit": {
        "token_reducer": "asvit",
        "pruning_rate": None,
        "num_register_tokens": 1,
        "rope_theta": 100.0,
        "reducer_config": {"budget": 0.9, "eval_mode": "topk"},  # numbers by the schedule; others in `test_asvit.py`
    },
    "idlevit": {"token_reducer": "idlevit", "pruning_rate": None, "num_register_tokens": 1, "rope_theta": 100.0},
    "svit": {"token_reducer": "svit", "pruning_rate": None, "num_register_tokens": 1, "rope_theta": 100.0},
    "itpn": {"token_reducer": "itpn", "pruning_rate": None, "use_cls_token": False, "pooling": "mean"},
    "ltp": {  # without thresholds, so that the schedule alone decides; see `test_ltp.py`
        "token_reducer": "ltp",
        "num_register_tokens": 1,
        "rope_theta": 100.0,
        "reducer_config": {"final_threshold": -2.0},
    },
    "dynamicvit": {"token_reducer": "dynamicvit", "pruning_rate": None, "num_register_tokens": 1},
    "stp": {"token_reducer": "stp", "pruning_rate": None, "num_register_tokens": 1},
    "dtop": {"token_reducer": "dtop", "pruning_rate": None, "reducer_config": {"threshold": None}},
    "clip": {
        "use_embedding_norm": True,
        "patch_bias": False,
        "hidden_act": "quick_gelu",
        "pooling": "cls",
        "projection_dim": 12,
    },
    "attention_pooling": {
        "pooling": "attention",
        "pooling_num_heads": 2,
        "pooling_intermediate_size": 40,
        "rope_theta": 100.0,
        "rope_offset": 1.0,
        "use_final_norm": False,
        "last_layer_fusion": False,
    },
    "unpruned": {"token_reducer": None, "pruning_rate": None},
}

# Methods with a test file of their own, which the quick suite leaves it at. Those that exit are no classifiers: their
# file has the tools as well.
METHODS = ["ailurus", "asvit", "dynamicvit", "evit", "idlevit", "itpn", "ltp", "stp", "svit", "tocom"]

# A detector on a pyramid of 16 x 16 to 1 x 1 cells
DETECTOR: dict[str, Any] = {
    "last_layer_fusion": True,
    "pyramid_channels": 8,
    "anchor_sizes": [4, 8, 12, 16, 24],
    "box_head_size": 16,
    "num_proposals": 30,
    "rois_per_image": 32,
    "detections_per_image": 10,
    "mask_stride": 2,
}


def image_labels(config: CroprViTConfig, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"labels": torch.arange(len(pixel_values)) % config.num_labels}


def label_maps(config: CroprViTConfig, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Random classes for every pixel, a tenth of them ignored."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(config.num_labels, pixel_values[:, 0].shape, generator=generator)
    ignored = torch.rand(labels.shape, generator=generator) < 0.1
    return {"labels": labels.masked_fill(ignored, config.semantic_loss_ignore_index)}


def object_labels(config: CroprViTConfig, pixel_values: torch.Tensor, masks: bool = False) -> dict[str, Any]:
    """Three objects at random places in each image but the last, which has none."""
    generator = torch.Generator().manual_seed(0)
    height, width = pixel_values.shape[-2:]
    labels = []
    for image in range(len(pixel_values)):
        count = 3 if image < len(pixel_values) - 1 else 0
        sides = 0.2 + 0.4 * torch.rand(count, 2, generator=generator)
        centres = sides / 2 + torch.rand(count, 2, generator=generator) * (1 - sides)
        label = {
            "class_labels": torch.randint(config.num_labels, (count,), generator=generator),
            "boxes": torch.cat([centres, sides], dim=1),
        }
        if masks:
            label["masks"] = box_masks(label["boxes"], height, width)
        labels.append(label)
    return {"labels": labels}


def box_masks(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Masks (n, height, width) that fill boxes (n, 4), given as centre, width and height in shares of the image."""
    inside = []
    for axis, length in ((1, height), (0, width)):
        places = (torch.arange(length) + 0.5) / length
        inside.append((places - boxes[:, axis, None]).abs() <= boxes[:, axis + 2, None] / 2)
    return (inside[0][:, :, None] & inside[1][:, None]).to(torch.uint8)


def instance_labels(config: CroprViTConfig, pixel_values: torch.Tensor) -> dict[str, Any]:
    return object_labels(config, pixel_values, masks=True)


@dataclass(frozen=True)
class Task:
    """A model class, what it takes for training, and which of its outputs matters.

    Attributes:
        output: the name of that output.
        shape: what it is in evaluation for a model and images of a height and width, without the batch.
        labels: makes them for images.
        fields: those of the configuration that the class insists on.
        whole_patches: whether images of broken patches are an error.
        float32: whether outputs are float32 whatever the weights are.
    """

    model_class: type
    output: str
    shape: Callable[[CroprViTConfig, int, int], tuple[int, ...]]
    labels: Callable[[CroprViTConfig, torch.Tensor], dict[str, Any]] | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    whole_patches: bool = True
    float32: bool = False

    def takes(self, name: str) -> bool:
        """Whether the class runs with a configuration of the table: not without fusion if it insists on that, and by a
        method that exits if it makes label maps, whose labels train that.
        """
        reducer = CONFIGS[name].get("token_reducer", "cropr")
        if reducer is not None and TOKEN_REDUCERS[reducer].exits:
            return self.model_class.takes_exits and self.labels is not None
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


def token_shape(config: CroprViTConfig, height: int, width: int) -> tuple[int, ...]:
    num_patches = height * width // PATCH_SIZE**2
    method = find_token_reducer(config)
    is_whole = config.last_layer_fusion or (method is not None and method.idles)
    left = num_patches if is_whole else config.kept_patches(num_patches)[-1]
    return config.num_prefix_tokens + left, config.hidden_size


def map_shape(channels: int) -> Callable[[CroprViTConfig, int, int], tuple[int, ...]]:
    return lambda config, height, width: (channels, height // PATCH_SIZE, width // PATCH_SIZE)


def detection_shape(config: CroprViTConfig, *_: int) -> tuple[int, ...]:
    return config.detections_per_image, NUM_LABELS + 1


TASKS: dict[str, Task] = {
    "model": Task(CroprViTModel, "last_hidden_state", token_shape),
    "backbone": Task(CroprViTBackbone, "feature_maps", map_shape(TINY["hidden_size"])),
    "classification": Task(CroprViTForImageClassification, "logits", lambda *_: (NUM_LABELS,), image_labels),
    "segmentation": Task(
        CroprViTForSemanticSegmentation,
        "logits",
        map_shape(NUM_LABELS),
        label_maps,
        {"num_queries": None, "last_layer_fusion": True},
        whole_patches=False,
    ),
    "detection": Task(
        CroprViTForObjectDetection,
        "logits",
        detection_shape,
        object_labels,
        DETECTOR,
        whole_patches=False,
        float32=True,
    ),
    "instances": Task(
        CroprViTForInstanceSegmentation,
        "logits",
        detection_shape,
        instance_labels,
        DETECTOR,
        whole_patches=False,
        float32=True,
    ),
}


def tiny_config(name: str = "plain", **overrides: Any) -> CroprViTConfig:
    return CroprViTConfig(**{**TINY, **CONFIGS[name], **overrides})


def with_heads(name: str) -> bool:
    """Whether a configuration of the table can have auxiliary heads."""
    return CONFIGS[name].get("token_reducer", "cropr") == "cropr"


def free_port() -> int:
    """A port for processes that meet on this machine; with older releases of Accelerate they never do at port 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def full(*values: Any) -> list[Any]:
    """Parameters of a test that are part of the full product only; a tuple is one value for each of several names."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.full) for value in values
    ]


def combinations(config_names: Collection[str]) -> list[Any]:
    """Every task class with every configuration that it can have, as parameters `task` and `name` of a test.

    All tasks in the plain configuration and classification in all configurations come first, but for those of methods
    that have tests of their own; the rest is for the full product.
    """
    return [
        pytest.param(
            task,
            name,
            id=f"{task}-{name}",
            marks=() if name == "plain" or (task == "classification" and name not in METHODS) else pytest.mark.full,
        )
        for task in TASKS
        for name in config_names
        if TASKS[task].takes(name)
    ]


def assert_close_relative(actual: Any, expected: Any, tolerance: float = 2e-5, msg: Any = None) -> None:
    """No entry of a tensor differs by more than a share of the largest one; also for sequences and dictionaries.

    A layer rounds sums of dozens of terms to 6e-8 of their size, in an order that depends on the processor, and a few
    layers add up. In an entry near zero, to which large terms cancelled, that is much of what is left, so that a share
    of each entry for itself says little. What tests look for is far from both: their weights are large.
    """
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        actual, expected = list(actual.values()), list(expected.values())
    if isinstance(expected, (list, tuple)):
        for pair in zip(actual, expected, strict=True):
            assert_close_relative(*pair, tolerance, msg)
        return
    sizes = expected.detach().abs()
    sizes = sizes[sizes < 1e4]  # which stands for no detection at all
    atol = tolerance * sizes.max().item() if len(sizes) else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol, msg=msg)


def enable_activation_checkpointing(model: PreTrainedModel, **kwargs: Any) -> None:
    """By the name that the installed release of Transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(kwargs) if kwargs else enable()


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
    """The model on one image (1, 3, H, W), in plain loops: lists of (place, token), one token pruned at a time, one
    window after the other.

    Returns:
        Tokens (T, D) that leave the last block, the block after which each patch was pruned, and the tokens that each
        module sees.
    """
    config, prefix = model.config, model.config.num_prefix_tokens
    tokens, grid_size = model.embeddings(image)
    alive = list(enumerate(tokens[0]))
    aside, seen = [], []
    kept = config.kept_patches(len(alive) - prefix)
    blocks_of = dict.fromkeys(range(len(alive) - prefix), config.num_hidden_layers)
    for block, layer in enumerate(model.layers, start=1):
        if block == config.num_hidden_layers and config.last_layer_fusion:
            alive = sorted(alive + aside, key=lambda item: item[0])
        shape = config.window_grid(block, len(alive) - prefix, grid_size)
        output = naive_block(model, layer, alive, grid_size, shape)
        alive = [(place, token) for (place, _), token in zip(alive, output)]
        if block not in config.pruning_blocks:
            continue
        seen.append(torch.stack([token for _, token in alive]))
        query = model.token_reducers[str(block)].router.scorer()
        while len(alive) - prefix > kept[block - 1]:
            scores = []
            for _, token in alive[prefix:]:
                token = F.layer_norm(token, token.shape, eps=1e-6) if config.scorer_pre_norm else token
                scores.append(torch.dot(token, query).item())
            worst = prefix + min(range(len(scores)), key=lambda index: scores[index])
            blocks_of[alive[worst][0] - prefix] = block
            aside.append(alive.pop(worst))
    return torch.stack([token for _, token in alive]), [blocks_of[place] for place in sorted(blocks_of)], seen


def naive_block(
    model: CroprViTModel,
    layer: nn.Module,
    alive: list[tuple[int, torch.Tensor]],
    grid_size: tuple[int, int],
    shape: tuple[int, int] | None,
) -> torch.Tensor:
    """One block on tokens with their places; with `shape`, the rows and columns that they form, window by window.

    In a window that reaches over the edge of the grid, zeros fill up the normalised tokens, and attend like them. Each
    window also sees the prefix tokens, which see all tokens, as the windows have turned them.
    """
    tokens, prefix = torch.stack([token for _, token in alive]), model.config.num_prefix_tokens
    normed, attended = layer.layernorm_before(tokens), torch.empty_like(tokens)
    everything = [(index, None) for index in range(len(alive))]  # at their places in the image
    groups = [(everything, everything)]  # whose output is found, among whom
    if shape is not None:
        size, (rows, columns) = model.config.window_size, shape
        first = everything[:prefix]
        windows = [
            [
                (
                    prefix + row * columns + column if row < rows and column < columns else None,
                    (row - top, column - left),
                )
                for row in range(top, top + size)
                for column in range(left, left + size)
            ]
            for top in range(0, rows, size)
            for left in range(0, columns, size)
        ]
        groups = [(window, first + window) for window in windows]
        inside_the_grid = [place for window in windows for place in window if place[0] is not None]
        groups += [(first, first + inside_the_grid)] if prefix else []
    for found, group in groups:
        inside = torch.stack([torch.zeros_like(tokens[0]) if index is None else normed[index] for index, _ in group])
        positions = None
        if model.rotary_embedding is not None:
            pairs = [
                naive_rotation(model, None if index is None else alive[index][0], slot, grid_size, len(alive))
                for index, slot in group
            ]
            positions = tuple(torch.stack(parts)[None] for parts in zip(*pairs))
        output, _ = layer.attention(inside[None], positions)
        for (index, slot), row in zip(group, output[0]):
            if index is not None and (index, slot) in found:
                attended[index] = row
    scales = [1.0 if scale is None else scale.lambda1 for scale in (layer.layer_scale1, layer.layer_scale2)]
    tokens = tokens + scales[0] * attended
    return tokens + scales[1] * layer.mlp(layer.layernorm_after(tokens))


def naive_rotation(
    model: CroprViTModel, place: int | None, slot: tuple[int, int] | None, grid_size: tuple[int, int], num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine (d / 2,) of one token.

    Args:
        place: in the whole sequence; `None` for what fills up a window.
        slot: row and column in its window; `None` where attention is global.
        grid_size: of the image.
        num_tokens: in the sequence now.
    """
    config, size, prefix = model.config, model.config.window_size, model.config.num_prefix_tokens
    columns = grid_size[1]
    pruned = num_tokens < prefix + grid_size[0] * columns
    if slot is None or (pruned and config.window_rope_mode == "global"):
        table, index = grid_size, place
    else:
        if pruned and config.window_rope_mode == "origin":
            slot = ((place - prefix) // columns % size, (place - prefix) % columns % size)
        table, index = (size, size), prefix + slot[0] * size + slot[1]
    cos, sin = model.rotary_embedding(table, model.dtype, torch.device("cpu"))
    return cos[0, index], sin[0, index]


def fill_with_ramps(model: PreTrainedModel, power: int = 1) -> None:
    """Weights that no initialisation code can change: sine waves whose phase is the position in the sorted names.

    With a `power` of 2 they get ever faster, so that no two channels resemble each other: convolutions of plain waves
    give norms next to nothing to divide by.
    """
    with torch.no_grad():
        for phase, (name, parameter) in enumerate(sorted(model.named_parameters())):
            wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) ** power * 0.7 + 1.3 * phase)
            scale = 1.0 if name.endswith(("queries", "cls_token", "position_embeddings")) else 0.3
            offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_((offset + scale * wave).view(parameter.shape))


def ramp_images() -> torch.Tensor:
    """Two images that no generator of random numbers can change."""
    ramp = torch.arange(2 * 3 * 32 * 32, dtype=torch.float64)
    return (torch.cos(ramp * 0.01) + 0.5 * torch.sin(ramp * 0.37)).view(2, 3, 32, 32).float()
