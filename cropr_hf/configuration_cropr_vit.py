# Copyright 2026 The cropr_hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Configuration of a plain vision transformer with token pruning."""

# No `from __future__ import annotations` here: it would switch the type checks of `@strict` off.
import difflib
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin

from .class_names import settle_labels, with_new_labels
from .token_schedule import kept_patches, pruning_blocks, schedule_from_sides, window_grid


POOLING_MODES = ("mean", "patch_mean", "cls", "cls_patch_mean", "attention")
ROPE_COORDINATES = ("index", "centered")
WINDOW_ROPE_MODES = ("origin", "slot", "global")
NMS_METHODS = ("hard", "linear")
AUXILIARY_TASKS = (None, "patches", "presence", "both", "embedding")
PROBLEM_TYPES = (None, "single_label_classification", "multi_label_classification", "regression")
DEFAULT_PRUNING_RATE = 8
WEIGHTS_ID = "weights_id"  # in a saved configuration: of the weights beside it

# Sizes of the original ViT and DeiT papers, and of EVA-02 as timm has it.
EVA02: dict[str, Any] = {
    "patch_size": 14,
    "hidden_act": "silu",
    "use_gated_mlp": True,
    "rope_theta": 10000.0,
    "key_bias": False,
    "pooling": "patch_mean",
    "interpolate_antialias": True,
}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768},
    "small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "huge": {
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "intermediate_size": 5120,
        "patch_size": 14,
    },
}
SIZES |= {
    "eva02_tiny": {**SIZES["tiny"], **EVA02, "intermediate_size": 512},
    "eva02_small": {**SIZES["small"], **EVA02, "intermediate_size": 1024},
    "eva02_base": {**SIZES["base"], **EVA02, "intermediate_size": 2048, "use_mlp_norm": True},
    "eva02_large": {**SIZES["large"], **EVA02, "intermediate_size": 2730, "use_mlp_norm": True},
}


# The detector of the paper: windows of 16 patches, every third block global.
SIZES["eva02_large_detection"] = {
    **SIZES["eva02_large"],
    "image_size": 1536,
    "patch_size": 16,
    "use_cls_token": False,
    "use_final_norm": False,
    "interpolate_antialias": False,
    "window_size": 16,
    "window_block_indices": tuple(index for index in range(24) if index % 3 != 2),
    "pruning_schedule": schedule_from_sides(24, 96 * 96),
    "num_labels": 80,
}


def check_finite(settings: Any) -> None:
    """Raises `ValueError` for a number among the fields of a dataclass, or in their lists, that is NaN or infinite.

    Comparisons with NaN are false, so that no check of a range is sure to notice it.
    """
    for field in fields(settings):
        value = getattr(settings, field.name)
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"`{field.name}` is {value}; it must be a finite number.")


def check_unknown(config: Any, kwargs: dict[str, Any]) -> None:
    """Transformers keeps unknown keywords as attributes; raises `ValueError` for one that looks like a field."""
    own = [field.name for field in fields(config)]
    for name in kwargs.keys() - config.attribute_map.keys():
        if near := difflib.get_close_matches(name, own, n=1, cutoff=0.9):
            raise ValueError(f"`{name}` is not a field of {type(config).__name__}; did you mean `{near[0]}`?")


def check_backbone(config: Any) -> None:
    """Raises `ValueError` for a plain ViT that cannot be."""
    positive = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size")
    for name in (
        *positive,
        "num_channels",
        "rope_reference_grid",
        "pooling_num_heads",
        "pooling_intermediate_size",
        "projection_dim",
        "num_queries",
        "patch_queries_per_step",
        "scorer_num_heads",
    ):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise ValueError(f"`{name}` is {getattr(config, name)}; it must be at least 1.")
    if config.num_register_tokens < 0:
        raise ValueError(f"`num_register_tokens` is {config.num_register_tokens}; it must be 0 or more.")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"`hidden_size` {config.hidden_size} is not divisible by `num_attention_heads` "
            f"{config.num_attention_heads}."
        )
    if config.hidden_size % (config.pooling_num_heads or 1):
        raise ValueError(
            f"`hidden_size` {config.hidden_size} is not divisible by `pooling_num_heads` {config.pooling_num_heads}; "
            "leave it out for as many as in the blocks."
        )
    size = config.image_size
    if not isinstance(size, int) and len(size) != 2:
        raise ValueError(f"`image_size` is {size}; give one number, or height and width.")
    for length in [size] if isinstance(size, int) else size:
        if length < config.patch_size or length % config.patch_size:
            raise ValueError(
                f"`image_size` {size} is not a multiple of `patch_size` {config.patch_size}; give multiples of it, "
                f"{config.patch_size} or more."
            )
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"`hidden_act` is {config.hidden_act!r}; choose one of {', '.join(sorted(ACT2FN))}.")
    if config.pooling not in POOLING_MODES:
        raise ValueError(f"`pooling` is {config.pooling!r}; choose one of {', '.join(POOLING_MODES)}.")
    if "cls" in config.pooling and not config.use_cls_token:
        raise ValueError(f"`pooling` {config.pooling!r} needs `use_cls_token=True`, or choose `mean`.")
    if config.pooling == "cls_patch_mean" and not config.norm_before_pooling:
        raise ValueError("`pooling` 'cls_patch_mean' needs `norm_before_pooling=True`.")
    if config.rope_theta is not None and (config.hidden_size // config.num_attention_heads) % 4:
        raise ValueError(
            f"Rotary positions need a head size divisible by 4, not "
            f"{config.hidden_size // config.num_attention_heads}; change `num_attention_heads`."
        )
    for name, usual in (("initializer_range", 0.02), ("layer_norm_eps", 1e-6), ("rope_theta", 100.0)):
        if getattr(config, name) is not None and getattr(config, name) <= 0:
            raise ValueError(f"`{name}` is {getattr(config, name)}; it must be positive, such as {usual}.")
    if config.rope_coordinates not in ROPE_COORDINATES:
        raise ValueError(f"`rope_coordinates` is {config.rope_coordinates!r}; choose 'index' or 'centered'.")
    if config.rope_offset and config.rope_coordinates != "index":
        raise ValueError(
            f"`rope_offset` is {config.rope_offset}, which `rope_coordinates` {config.rope_coordinates!r} do not "
            "have; set it to 0."
        )


def check_windows(config: Any) -> None:
    """Raises `ValueError` for windows that cannot be."""
    indices = list(config.window_block_indices)
    if config.window_size < 0:
        raise ValueError(f"`window_size` is {config.window_size}; it must be 1 patch or more, or 0 for no windows.")
    if config.window_rope_mode not in WINDOW_ROPE_MODES:
        raise ValueError(
            f"`window_rope_mode` is {config.window_rope_mode!r}; choose one of {', '.join(WINDOW_ROPE_MODES)}."
        )
    if bool(indices) != bool(config.window_size):
        raise ValueError(
            f"`window_size` is {config.window_size}, and `window_block_indices` is {indices}; give both or none."
        )
    if any(not 0 <= block < config.num_hidden_layers for block in indices) or len(set(indices)) < len(indices):
        raise ValueError(
            f"`window_block_indices` is {indices}; it must hold different blocks from 0 to "
            f"{config.num_hidden_layers - 1}."
        )


def check_queries(config: Any) -> None:
    """Raises `ValueError` where fields contradict each other about what the queries predict."""
    task, number, drawn = config.auxiliary_task, config.num_queries, config.patch_queries_per_step
    if task not in AUXILIARY_TASKS:
        raise ValueError(
            f"`auxiliary_task` is {task!r}; choose 'presence', 'patches', 'both' or 'embedding', or leave it out."
        )
    if _contradict(task, number):
        raise ValueError(
            f"`num_queries` is {number}, but `auxiliary_task` is {task!r}; leave one of the two out. None is one "
            "query per patch, which 'patches' has alone; the other tasks have a number."
        )
    if drawn is not None and not config.query_counts[0]:
        raise ValueError(
            f"`patch_queries_per_step` is {drawn}, but there is no query per patch; leave it out, or set "
            "`auxiliary_task='patches'`."
        )


def _contradict(auxiliary_task: str | None, num_queries: int | None) -> bool:
    """Whether a task has another kind of queries than their number says: `None` is one per patch and no other."""
    return auxiliary_task is not None and (auxiliary_task == "patches") != (num_queries is None)


@strict
class CroprViTConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of the `CroprViT*` models: one plain ViT that covers ViT, DeiT, ViT-MAE, DINOv2, DINOv3, EVA-02,
    CLIP, SigLIP and others as points of one configuration space, and the token reduction that runs inside it.

    Fields that every vision model of Transformers has (`hidden_size`, `num_hidden_layers`, `image_size`, ...) mean
    here what they mean there. The others:

    Backbone:
        patch_bias, query_bias, key_bias, value_bias, proj_bias, mlp_bias (`bool`): biases of the projections.
        use_embedding_norm (`bool`): LayerNorm on all tokens before the first block (CLIP).
        use_gated_mlp (`bool`): `down(act(gate(x)) * up(x))` instead of `fc2(act(fc1(x)))`.
        use_mlp_norm (`bool`): LayerNorm on the inner activations of the MLP (EVA-02).
        layerscale_value (`float`, *optional*): initial layer scale; `None` is no layer scale.
        use_cls_token (`bool`), num_register_tokens (`int`): prefix tokens, which are never pruned.
        use_absolute_position_embeddings (`bool`): learned table for the grid of `image_size`, interpolated to others.
        interpolate_antialias (`bool`): how the source family interpolates that table.
        rope_theta (`float`, *optional*): base period of 2-D rotary positions on patch tokens; `None` is no rotation.
        rope_coordinates (`str`): `"index"`: patch index, scaled so that any grid spans `rope_reference_grid` units
            (EVA-02); `"centered"`: patch centre in [-1, 1], times 2 pi (DINOv3).
        rope_offset (`float`): added to the patch index of `"index"`, which turns patches against prefix tokens (1 in
            Perception Encoder).
        pooling (`str`): `"mean"` over all tokens, `"patch_mean"`, `"cls"`, `"cls_patch_mean"` (both, concatenated), or
            `"attention"`: a learned probe attends to the tokens that are left, then comes an MLP (SigLIP). A token
            that merging made of several counts as that many. Dense tasks, which do not pool, have no probe.
        pooling_num_heads, pooling_intermediate_size (`int`, *optional*): of `"attention"`; `None` is as in the blocks.
        projection_dim (`int`, *optional*): channels to which a linear layer without bias projects the pooled vector
            (CLIP); `None` is no projection.
        norm_before_pooling (`bool`): final LayerNorm on every token before pooling, or on the pooled vector after it.
        drop_path_rate (`float`): stochastic depth of the last block, growing linearly from 0 at the first; when the
            model prunes, the last block has none (as in the reference code of the paper).
        use_final_norm (`bool`): whether there is a final norm at all; detectors have none.
        apply_layernorm (`bool`): whether `CroprViTBackbone` applies the final norm to its feature maps.
        reshape_hidden_states (`bool`): `False` makes `CroprViTBackbone` return sequences, CLS token first, instead of
            maps, as DPT and Depth Anything want them.
        window_size (`int`): side, in patches, of the windows of windowed attention; 0 is no windows.
        window_block_indices (`list[int]`): blocks, from 0, whose attention is windowed; the others are global. Pruned
            tokens form a smaller grid, in raster order, which is cut into windows again; where their number does not
            tile into windows, attention is global. Prefix tokens attend to all, and windows to them.
        window_rope_mode (`str`): rotary positions of tokens in windowed blocks after pruning. `"origin"`: place in the
            window where the token stood in the image; `"slot"`: place in the window where it stands now; `"global"`:
            place in the image.

    Token reduction:
        token_reducer (`str`, *optional*): name of the method, such as the default, `"random"` (the baseline of the
            paper) or `"tome"`; `None` is the unpruned model. `cropr_hf.TOKEN_REDUCERS` has all.
        reducer_config (`dict`, *optional*): fields of the method's own, such as `proportional_attention` of ToMe.
            They are checked when the configuration is made (in code from the Hub, when a model is built).
        reducer_package (`str`, *optional*): the package that a method outside of this code comes from; models note it.
        pruning_rate (`int`, *optional*): patch tokens removed by each module, R in the paper. One module follows
            every block but the last (but the last two with fusion), unless the method has other places and counts.
            Without a schedule as well, 8 for methods that have no share of their own (Cropr, random, ToMe).
        pruning_schedule (`list[int]`, *optional*): patch tokens kept after each block, one entry per block; a module
            stands where the number falls, so the last entry (the last two with fusion) repeats the one before. Entries
            before the first module stand for all tokens, whatever the image size.
        last_layer_fusion (`bool`, *optional*): put the pruned tokens back before the last block (Last Layer Fusion in
            the paper). By default as the method is published: on for Cropr and random, off for all others;
            `from_vit` turns it on for label maps and detectors. With DToP, whose patches leave for good, it is off.
        align_first_module (`bool`): with a CLS token, the first module of `pruning_rate` removes one token more, so
            that the sequence length, CLS included, stays a multiple of 4 or 8 (197 -> 188 -> 180 ...).
        token_multiple (`int`): the sequence lengths that `pruning_rate` leaves, prefix included, are rounded up to
            multiples of this number, such as 8 or 16, which some kernels like (188 -> 192 ...).
        prune_padding_first (`bool`): patches of padding (`pixel_mask` of a detector) go before all others.
        num_queries (`int`, *optional*): queries per module, N in the paper. `None` is one per patch of `image_size`.
        scorer_num_heads (`int`), scorer_query_projection, scorer_key_projection, scorer_pre_norm (`bool`),
        aggregator_value_projection (`bool`), aggregator_mlp_ratio (`float`, *optional*; `None` is no MLP): the
            cross-attention variants of the paper's ablation; the defaults are its best and simplest values.

    Training:
        use_auxiliary_heads (`bool`): whether aggregators, auxiliary heads and unfolded scorers exist. They are what
            trains the scorers; published checkpoints have none. Of ToCom: whether there is a compensator, or it is
            folded.
        auxiliary_loss_weight (`float`): weight of the sum of the auxiliary losses.
        auxiliary_task (`str`, *optional*): what queries predict in semantic segmentation. `"presence"`: `num_queries`
            predict which classes the image shows. `"patches"`, as in the paper: one per patch predicts its class.
            `"both"`: there are queries of both kinds. `None` is `"patches"` if `num_queries` is `None`, or
            `"presence"`. (In other classes every query predicts what the whole image shows.)
            `"embedding"` is for a `CroprViTModel` that learns without labels: `num_queries` predict the pooled
            embedding of the teacher of a `CroprTrainer`.
        patch_queries_per_step (`int`, *optional*): queries of patches that predict in a training step, drawn anew for
            each; the loss is an unbiased estimate of that of all, whose sum stays the score. `None` is all.
        label_smoothing (`float`, in [0, 1)): of the main and the auxiliary cross-entropies. (The argument of
            `TrainingArguments` would take the labels away from the model, and with them the auxiliary losses.)
        semantic_loss_ignore_index (`int`): label of pixels that semantic segmentation leaves out of its losses.

    Detection (simple feature pyramid and Cascade Mask R-CNN; the defaults are those of ViTDet and EVA-02):
        pyramid_channels (`int`): channels of the feature pyramid and of the convolutions in the heads.
        anchor_sizes (`list[int]`): side in pixels of the anchors at strides 4, 8, 16, 32 and 64.
        box_head_size (`int`): width of the linear layer of each box head.
        num_proposals (`int`): proposals per image that the box heads refine.
        rois_per_image (`int`): proposals per image that train the box heads, a quarter of them on objects at most;
            what they keep for the backward pass, most of the memory of training, is in proportion to it.
        score_threshold (`float`): detections with a lower score are dropped before suppression; 0.0 in the system
            protocol of EVA-02, which the paper's figures of detectors follow.
        nms_method (`str`): `"hard"` suppression, or `"linear"` soft suppression (scores times 1 - IoU), which the
            system protocol uses with `nms_threshold=0.6`.
        nms_threshold (`float`): overlap (IoU) of two boxes of a class from which the lower one is suppressed.
        detections_per_image (`int`): detections in the output.
        maskness_threshold (`float`, *optional*): multiplies scores of instances by the mean probability of the mask
            pixels above it; 0.5 in the system protocol for masks.
        mask_stride (`int`): pixels of the input per pixel of the instance masks in the output.

    Raises:
        `ValueError` when a value is out of range, NaN or infinite, or two fields contradict; the
        `StrictDataclassError` of huggingface_hub when a value has the wrong type.

    Example:

    ```python
    >>> from cropr_hf import CroprViTConfig, CroprViTForImageClassification

    >>> config = CroprViTConfig.from_size("large", pruning_rate=8)
    >>> config.kept_patches()[:3], config.kept_patches()[-1]
    ([187, 179, 171], 19)
    >>> model = CroprViTForImageClassification(config)
    ```"""

    model_type = "cropr_vit"
    attribute_map = {
        "attention_dropout": "attention_probs_dropout_prob",
        "hidden_dropout": "hidden_dropout_prob",
    }

    # Backbone
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int = 16
    num_channels: int = 3
    patch_bias: bool = True
    use_embedding_norm: bool = False
    query_bias: bool = True
    key_bias: bool = True
    value_bias: bool = True
    proj_bias: bool = True
    mlp_bias: bool = True
    use_gated_mlp: bool = False
    use_mlp_norm: bool = False
    layerscale_value: float | int | None = None
    use_cls_token: bool = True
    num_register_tokens: int = 0
    use_absolute_position_embeddings: bool = True
    interpolate_antialias: bool = False
    rope_theta: float | int | None = None
    rope_coordinates: str = "index"
    rope_reference_grid: int = 16
    rope_offset: float | int = 0.0
    pooling: str = "mean"
    pooling_num_heads: int | None = None
    pooling_intermediate_size: int | None = None
    projection_dim: int | None = None
    norm_before_pooling: bool = False
    use_final_norm: bool = True
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True
    window_size: int = 0
    window_block_indices: list[int] | tuple[int, ...] = ()
    window_rope_mode: str = "origin"
    # Token reduction
    token_reducer: str | None = "cropr"
    reducer_config: dict | None = None
    reducer_package: str | None = None
    pruning_rate: int | None = None
    pruning_schedule: list[int] | tuple[int, ...] | None = None
    last_layer_fusion: bool | None = None
    align_first_module: bool = True
    token_multiple: int = 1
    prune_padding_first: bool = False
    num_queries: int | None = 1
    scorer_num_heads: int = 1
    scorer_query_projection: bool = False
    scorer_key_projection: bool = False
    scorer_pre_norm: bool = False
    aggregator_value_projection: bool = False
    aggregator_mlp_ratio: float | int | None = 4.0
    # Training
    use_auxiliary_heads: bool = False
    auxiliary_loss_weight: float | int = 1.0
    auxiliary_task: str | None = None
    patch_queries_per_step: int | None = None
    label_smoothing: float | int = 0.0
    semantic_loss_ignore_index: int = 255
    # Detection
    pyramid_channels: int = 256
    anchor_sizes: list[int] | tuple[int, ...] = (32, 64, 128, 256, 512)
    box_head_size: int = 1024
    num_proposals: int = 1000
    rois_per_image: int = 512
    score_threshold: float | int = 0.05
    nms_method: str = "hard"
    nms_threshold: float = 0.5
    detections_per_image: int = 100
    maskness_threshold: float | None = None
    mask_stride: int = 4
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    # Finds the method of a configuration; the package hands it in. In code from the Hub, which reads configurations
    # apart from the methods, models check what depends on the method when they are built.
    find_reducer = None

    def __post_init__(self, **kwargs: Any):
        settle_labels(self, kwargs.get("num_labels"))
        # Other methods may have fields that say how much they prune, and no rate.
        is_cropr = self.token_reducer == type(self).token_reducer
        if is_cropr and self.pruning_rate is None and self.pruning_schedule is None:
            self.pruning_rate = DEFAULT_PRUNING_RATE
        if self.auxiliary_task == "patches" and self.num_queries == type(self).num_queries:  # which nobody chose
            self.num_queries = None
        method = None
        if self.token_reducer is not None and self.find_reducer is not None:
            with suppress(ValueError):  # of a method that is not installed; building a model says what is missing
                method = self.find_reducer(self)
        if self.last_layer_fusion is None and (method is not None or self.token_reducer is None):
            self.last_layer_fusion = method is None or method.fuses_by_default
        if method is not None and method.exits:
            self.last_layer_fusion = False
        self.stage_names = ["stem"] + [f"stage{i}" for i in range(1, self.num_hidden_layers + 1)]
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        check_unknown(self, kwargs)
        super().__post_init__(**kwargs)
        # `@strict` runs these as well, but wraps what they raise; here a wrong value is a plain `ValueError`.
        self.validate_numbers()
        self.validate_backbone()
        self.validate_windows()
        self.validate_training()
        self.validate_detection()
        self.validate_queries()
        self.validate_token_reduction()
        if method is not None:
            method.settings(self)
            method.check_pruning(self)

    @classmethod
    def from_size(cls, size: str, **kwargs: Any) -> "CroprViTConfig":
        """A ViT (`"tiny"`, `"small"`, `"base"`, `"large"`, `"huge"`), an EVA-02 (`"eva02_tiny"`, `"eva02_small"`,
        `"eva02_base"`, `"eva02_large"`), or the detector of the paper (`"eva02_large_detection"`); `kwargs` override
        fields, and what they say about pruning replaces a schedule.

        Raises:
            `ValueError`: for another size, or a schedule that is for another `image_size`.
        """
        if size not in SIZES:
            raise ValueError(f"Unknown size {size!r}; choose one of {', '.join(SIZES)}, or give the fields.")
        replaced = _replaced_fields(SIZES[size], kwargs) | ({"num_labels"} if "id2label" in kwargs else set())
        stored = {name: value for name, value in SIZES[size].items() if name not in replaced}
        config = cls(**{**stored, **kwargs})
        if "pruning_schedule" in stored and config.num_patches != stored["pruning_schedule"][0]:
            raise ValueError(
                f"The schedule of {size!r} is for {stored['pruning_schedule'][0]} patches, but `image_size` "
                f"{config.image_size} has {config.num_patches}; give `pruning_schedule`, for instance from "
                "`schedule_from_sides`, or `pruning_rate`."
            )
        return config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """As `PreTrainedConfig.from_dict`, but fields in `kwargs` are checked together with the stored ones.

        What `kwargs` say about pruning replaces the stored rate and schedule, what they say about queries a stored
        field that contradicts it, and another depth the stored stages.
        """
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"This is the configuration of a model of type {model_type!r}, not {cls.model_type!r}; `from_vit` of "
                "the models starts from another family."
            )
        config_dict = with_new_labels(config_dict, kwargs)
        names = {field.name for field in fields(cls)} - {field.name for field in fields(PreTrainedConfig)}
        names |= {"problem_type", *cls.attribute_map}
        overrides = {cls.attribute_map.get(name, name): kwargs.pop(name) for name in names & kwargs.keys()}
        replaced = _replaced_fields(config_dict, overrides)
        if "num_hidden_layers" in overrides:
            replaced |= {"stage_names", "out_features", "out_indices"}
        stored = {name: value for name, value in config_dict.items() if name not in replaced}
        return super().from_dict({**stored, **overrides}, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """See `PreTrainedConfig.to_dict`; which weights it was saved with is not a part of a configuration."""
        return {name: value for name, value in super().to_dict().items() if name != WEIGHTS_ID}

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches at `image_size`."""
        size = self.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return height // self.patch_size, width // self.patch_size

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width in pixels: `image_size`, as a pair."""
        rows, columns = self.grid_size
        return rows * self.patch_size, columns * self.patch_size

    @property
    def num_patches(self) -> int:
        """Patch tokens at `image_size`."""
        rows, columns = self.grid_size
        return rows * columns

    @property
    def num_prefix_tokens(self) -> int:
        """CLS and register tokens, which stand before the patches and are never pruned."""
        return int(self.use_cls_token) + self.num_register_tokens

    @property
    def pooled_size(self) -> int:
        """Channels of the pooled vector, before a projection."""
        return self.hidden_size * (2 if self.pooling == "cls_patch_mean" else 1)

    @property
    def embedding_size(self) -> int:
        """Channels of the pooled embedding, after a projection if there is one."""
        return self.projection_dim or self.pooled_size

    @property
    def auxiliary_size(self) -> int:
        """Numbers that a query predicts in training."""
        return self.embedding_size if self.auxiliary_task == "embedding" else self.num_labels or 0

    @property
    def query_counts(self) -> tuple[int, int]:
        """Queries of a module, in this order: of patches (one for each of `image_size`, or none), of the image."""
        task = self.auxiliary_task or ("patches" if self.num_queries is None else "presence")
        of_patches = self.num_patches if task in ("patches", "both") else 0
        return (of_patches, 0 if task == "patches" else self.num_queries or 0)

    @property
    def pruning_blocks(self) -> list[int]:
        """Blocks (1 to L) that have a module; which parameters exist depends on it, not on the rate."""
        return pruning_blocks(self, self._method())

    def kept_patches(self, num_patches: int | None = None, pruning: int | Sequence[int] | None = None) -> list[int]:
        """Patch tokens kept after each of the L blocks; see `token_schedule.kept_patches`.

        Raises:
            `ValueError`: for an impossible schedule or an unknown method.
            `ImportError`: in code loaded from the Hub, for a model that prunes.
        """
        return kept_patches(self, self._method(), num_patches, pruning)

    def _method(self) -> Any:
        if self.token_reducer is None:
            return None
        if self.find_reducer is None:
            raise ImportError(
                "Token counts depend on the method; for them the package is needed: pip install cropr_hf"
            )
        return self.find_reducer(self)

    def window_grid(self, block: int, num_patches: int, grid_size: tuple[int, int]) -> tuple[int, int] | None:
        """Rows and columns of the tokens that block 1 to L cuts into windows; see `token_schedule.window_grid`."""
        if not self.window_size or block - 1 not in self.window_block_indices:
            return None
        return window_grid(self.window_size, num_patches, grid_size)

    validate_numbers = check_finite
    validate_backbone = check_backbone
    validate_windows = check_windows
    validate_queries = check_queries

    def validate_detection(self):
        """Checks of the detector."""
        positive = ("pyramid_channels", "box_head_size", "num_proposals", "rois_per_image", "detections_per_image")
        for name in (*positive, "mask_stride"):
            least = 4 if name == "rois_per_image" else 1  # a quarter of them are objects
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be at least {least}.")
        for name in ("score_threshold", "nms_threshold", "maskness_threshold"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be in [0, 1).")
        if len(self.anchor_sizes) != 5 or any(size < 1 for size in self.anchor_sizes):
            raise ValueError(
                f"`anchor_sizes` is {list(self.anchor_sizes)}; give 5 sides in pixels, one per level of the pyramid."
            )
        if self.nms_method not in NMS_METHODS:
            raise ValueError(f"`nms_method` is {self.nms_method!r}; choose one of {', '.join(NMS_METHODS)}.")

    def validate_training(self):
        """Checks of rates and of the loss."""
        rates = ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "label_smoothing")
        for name in rates:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be in [0, 1).")
        if self.auxiliary_loss_weight < 0:
            raise ValueError(f"`auxiliary_loss_weight` is {self.auxiliary_loss_weight}; it must be 0 or more.")
        problem_type = getattr(self, "problem_type", None)
        if problem_type not in PROBLEM_TYPES:
            raise ValueError(
                f"`problem_type` is {problem_type!r}; choose 'single_label_classification' (also for soft targets), "
                "'multi_label_classification' or 'regression'."
            )
        if problem_type in ("multi_label_classification", "regression") and self.label_smoothing > 0:
            raise ValueError(f"`label_smoothing` is of single-label classification; set it to 0 for {problem_type!r}.")

    def validate_token_reduction(self):
        """Checks of the pruning fields and of the schedule at `image_size`."""
        if self.token_multiple < 1:
            raise ValueError(
                f"`token_multiple` is {self.token_multiple}; it must be 1 (any length) or more, such as 8."
            )
        if self.token_reducer is None:
            for name in ("pruning_rate", "pruning_schedule"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}` is {getattr(self, name)} but `token_reducer` is None; name a reducer, such as "
                        f"{type(self).token_reducer!r}, or leave `{name}` out."
                    )
            if self.use_auxiliary_heads:
                raise ValueError(
                    "`use_auxiliary_heads=True` needs a `token_reducer` that has them, such as "
                    f"{type(self).token_reducer!r}."
                )
            return
        if self.pruning_rate is not None and self.pruning_schedule is not None:
            raise ValueError("Give `pruning_rate` or `pruning_schedule`, not both.")
        if self.hidden_size % self.scorer_num_heads:
            raise ValueError(
                f"`hidden_size` {self.hidden_size} is not divisible by `scorer_num_heads` {self.scorer_num_heads}."
            )
        ratio = self.aggregator_mlp_ratio
        if ratio is not None and not (1 <= self.hidden_size * ratio and ratio <= 1000):
            raise ValueError(
                f"`aggregator_mlp_ratio` is {ratio}; it must give the MLP a channel or more, and be at most 1000, "
                "such as 4.0; `None` is no MLP."
            )


def _replaced_fields(stored: dict[str, Any], overrides: dict[str, Any]) -> set[str]:
    """Stored fields that no longer hold when overrides say how to prune, or what the queries predict."""
    pruning, reducer = {"pruning_rate", "pruning_schedule"}, stored.get("token_reducer", CroprViTConfig.token_reducer)
    wanted = overrides.get("token_reducer", reducer)
    replaced = pruning if pruning & overrides.keys() or wanted is None else set()
    queries = ("auxiliary_task", "num_queries")
    if _contradict(*({**stored, **overrides}.get(name, getattr(CroprViTConfig, name)) for name in queries)):
        replaced = replaced | ({*queries} - overrides.keys())
    return replaced if wanted == reducer else replaced | {"reducer_config", "reducer_package"}


__all__ = ["CroprViTConfig"]
