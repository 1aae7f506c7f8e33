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
"""Conversion: with pruning off a converted model computes what its source computes, and nothing is left over."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    BeitConfig,
    BeitModel,
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    Dinov2Backbone,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    DINOv3ViTBackbone,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    IJepaConfig,
    IJepaForImageClassification,
    IJepaModel,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
    ViTMSNConfig,
    ViTMSNForImageClassification,
    ViTMSNModel,
)

from cropr_hf import (
    CroprViTBackbone,
    CroprViTConfig,
    CroprViTForImageClassification,
    CroprViTForSemanticSegmentation,
    CroprViTModel,
)
from cropr_hf.conversion import SUPPORTED_FAMILIES
from cropr_hf.conversion.hf import PLAIN_MLP_RULES, RULES
from cropr_hf.conversion.table import SourceDescription, half_rotary_layout, resample_patch_kernel, rows_first_layout
from cropr_hf.conversion.timm import describe_timm
from tests.common import assert_close_relative, full


# The native grid is 4 x 4; the last size has as many patches, on another grid.
SIZES = [(32, 32), (24, 48), (16, 64)]
NUM_LABELS = 5
SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": NUM_LABELS,
}
WITH_MLP = {**SIZE, "intermediate_size": 48}
TIMM_SIZE: dict[str, Any] = {
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 2,
    "img_size": 32,
    "patch_size": 8,
    "num_classes": NUM_LABELS,
    "dynamic_img_size": True,
}
DISTILLED = "timm.models.deit.VisionTransformerDistilled"

# Another order of the same operations; weights that are far apart, so that a mistake is as large as the numbers.
assert_close = partial(assert_close_relative, tolerance=5e-5)


def randomized(model: nn.Module) -> nn.Module:
    """In evaluation mode, with no parameter at a neutral value (0, 1, or equal channels)."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = 0.5 if "token" in name or "pos" in name or parameter.dim() == 1 else 0.15
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def images(size: tuple[int, int] = SIZES[0]) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))


@dataclass(frozen=True)
class Case:
    """How to build a source, and what it computes."""

    build: Callable[[], nn.Module]
    tokens: Callable[[Any, torch.Tensor], torch.Tensor]
    logits: Callable[[Any, torch.Tensor], torch.Tensor] | None = None
    pooled: Callable[[Any, torch.Tensor], torch.Tensor] | None = None


def interpolated(source, pixel_values):
    return source.base_model(pixel_values, interpolate_pos_encoding=True).last_hidden_state


def interpolated_logits(source, pixel_values):
    return source(pixel_values, interpolate_pos_encoding=True).logits


def unmasked(source, pixel_values):
    """In raster order: a `mask_ratio` of 0 still shuffles."""
    noise = torch.arange(pixel_values.shape[2] * pixel_values.shape[3] // 64).float().expand(len(pixel_values), -1)
    return source.vit(pixel_values, noise=noise, interpolate_pos_encoding=True).last_hidden_state


def dinov2_tokens(source, pixel_values):
    return source.base_model(pixel_values).last_hidden_state


def dinov3_tokens(source, pixel_values):
    return source(pixel_values).last_hidden_state


def dinov2_logits(source, pixel_values):
    return source(pixel_values).logits


def tower_tokens(source, pixel_values):
    return getattr(source, "vision_model", source)(pixel_values, interpolate_pos_encoding=True).last_hidden_state


def tower_pooled(source, pixel_values):
    return source(pixel_values, interpolate_pos_encoding=True).pooler_output


def image_features(source, pixel_values):
    return source.get_image_features(pixel_values, interpolate_pos_encoding=True).pooler_output


def image_embeds(source, pixel_values):
    return source(pixel_values, interpolate_pos_encoding=True).image_embeds


# Towers have no labels; `num_labels` is the outer configuration's.
TOWER: dict[str, Any] = {name: value for name, value in WITH_MLP.items() if name != "num_labels"}
TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 20,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
CLIP = CLIPConfig(vision_config=TOWER, text_config=TEXT, projection_dim=12, num_labels=NUM_LABELS)
SIGLIP = SiglipConfig(vision_config=TOWER, text_config=TEXT, num_labels=NUM_LABELS)


HF_CASES = {
    "vit": Case(lambda: ViTForImageClassification(ViTConfig(**WITH_MLP)), interpolated, interpolated_logits),
    "vit_unusual": Case(
        lambda: ViTForImageClassification(
            ViTConfig(**{**WITH_MLP, "patch_size": [8, 8], "qkv_bias": False, "hidden_act": "quick_gelu"})
        ),
        # Its interpolation divides by the patch size, which it takes as a number.
        lambda source, pixel_values: source.vit(pixel_values).last_hidden_state,
    ),
    "vit_pooler": Case(lambda: ViTModel(ViTConfig(**WITH_MLP)), interpolated),
    "vit_masked": Case(lambda: ViTForMaskedImageModeling(ViTConfig(**WITH_MLP, encoder_stride=8)), interpolated),
    "deit": Case(lambda: DeiTForImageClassification(DeiTConfig(**WITH_MLP)), interpolated, interpolated_logits),
    "deit_distilled": Case(lambda: DeiTForImageClassificationWithTeacher(DeiTConfig(**WITH_MLP)), interpolated),
    "vit_mae": Case(
        lambda: ViTMAEForPreTraining(
            ViTMAEConfig(
                **WITH_MLP,
                mask_ratio=0.0,
                decoder_hidden_size=16,
                decoder_num_hidden_layers=1,
                decoder_num_attention_heads=2,
                decoder_intermediate_size=16,
            )
        ),
        unmasked,
    ),
    "dinov2": Case(lambda: Dinov2ForImageClassification(Dinov2Config(**SIZE)), dinov2_tokens, dinov2_logits),
    "dinov2_gated": Case(
        lambda: Dinov2ForImageClassification(Dinov2Config(**SIZE, use_swiglu_ffn=True)), dinov2_tokens, dinov2_logits
    ),
    "dinov2_with_registers": Case(
        lambda: Dinov2WithRegistersForImageClassification(Dinov2WithRegistersConfig(**SIZE, num_register_tokens=3)),
        dinov2_tokens,
        dinov2_logits,
    ),
    "dinov3": Case(lambda: DINOv3ViTModel(DINOv3ViTConfig(**WITH_MLP, num_register_tokens=2)), dinov3_tokens),
    "clip": Case(lambda: CLIPVisionModel(CLIPVisionConfig(**TOWER)), tower_tokens, pooled=tower_pooled),
    "clip_projected": Case(
        lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**TOWER, projection_dim=12)),
        tower_tokens,
        pooled=image_embeds,
    ),
    "clip_both_towers": Case(lambda: CLIPModel(CLIP), tower_tokens, pooled=image_features),
    "clip_classifier": Case(
        lambda: CLIPForImageClassification(CLIP),
        tower_tokens,
        interpolated_logits,
    ),
    "siglip": Case(lambda: SiglipVisionModel(SiglipVisionConfig(**TOWER)), tower_tokens, pooled=tower_pooled),
    "siglip_without_head": Case(
        lambda: SiglipVisionModel(SiglipVisionConfig(**TOWER, vision_use_head=False)), tower_tokens
    ),
    "siglip_both_towers": Case(lambda: SiglipModel(SIGLIP), tower_tokens, pooled=image_features),
    "siglip_classifier": Case(lambda: SiglipForImageClassification(SIGLIP), tower_tokens, interpolated_logits),
    "vit_msn": Case(
        lambda: ViTMSNForImageClassification(ViTMSNConfig(**WITH_MLP)),
        lambda source, pixel_values: source.vit(pixel_values, interpolate_pos_encoding=True).last_hidden_state,
        interpolated_logits,
    ),
    "vit_msn_backbone": Case(lambda: ViTMSNModel(ViTMSNConfig(**WITH_MLP), use_mask_token=True), interpolated),
    "ijepa": Case(
        lambda: IJepaForImageClassification(IJepaConfig(**WITH_MLP)),
        lambda source, pixel_values: source.ijepa(pixel_values, interpolate_pos_encoding=True).last_hidden_state,
        interpolated_logits,
    ),
    "ijepa_backbone": Case(
        lambda: IJepaModel(IJepaConfig(**WITH_MLP), add_pooling_layer=True, use_mask_token=True), interpolated
    ),
    "dinov3_gated": Case(
        lambda: DINOv3ViTModel(DINOv3ViTConfig(**WITH_MLP, use_gated_mlp=True, hidden_act="silu", mlp_bias=False)),
        dinov3_tokens,
    ),
}


def timm_source(name: str, **kwargs: Any) -> nn.Module:
    """`vit`, `deit` (distilled) or `eva`; imported here, so that the other tests run without timm."""
    pytest.importorskip("timm")
    from timm.layers import SwiGLUPacked
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    if kwargs.get("mlp_layer") == "packed":
        kwargs["mlp_layer"] = SwiGLUPacked
    classes = {"vit": VisionTransformer, "deit": VisionTransformerDistilled, "eva": Eva}
    model = classes[name](**{**TIMM_SIZE, **kwargs})
    if kwargs.get("rope_rotate_half") and not hasattr(model.rope, "rotate_half"):
        pytest.skip("this release of timm has no half layout")
    return model


def timm_tokens(source, pixel_values):
    return source.forward_features(pixel_values)


def timm_logits(source, pixel_values):
    return source(pixel_values)


PERCEPTION: dict[str, Any] = {
    "attn_type": "rope",
    "use_pre_transformer_norm": True,
    "use_rot_pos_emb": True,
    "ref_feat_shape": (3, 3),
    "rope_grid_indexing": "xy",
}
EVA02 = {"mlp_ratio": 4 * 2 / 3, "swiglu_mlp": True, "use_rot_pos_emb": True, "ref_feat_shape": (7, 7)}
TIMM_MODELS: dict[str, dict[str, Any]] = {
    "vit": {},
    "vit_registers_layer_scale": {"reg_tokens": 2, "init_values": 0.1},
    "vit_no_embed_class": {"reg_tokens": 2, "no_embed_class": True, "qkv_bias": False},
    "vit_no_cls": {"class_token": False, "reg_tokens": 1, "global_pool": "avg"},
    "vit_no_prefix": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "vit_mean_of_all": {"global_pool": "avg", "pool_include_prefix": True},
    "vit_no_positions": {"pos_embed": "none", "class_token": False, "global_pool": "avg"},
    "vit_norm_after_token": {"fc_norm": True, "act_layer": "gelu_tanh"},
    "vit_gated": {"mlp_layer": "packed", "act_layer": "silu", "init_values": 0.1},
    "vit_mlp_norm": {"scale_mlp_norm": True, "proj_bias": False},
    "vit_clip": {"pre_norm": True, "act_layer": "quick_gelu"},
    "vit_siglip": {"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh"},
    "vit_attention_on_all": {"global_pool": "map", "pool_include_prefix": True, "reg_tokens": 2},
    "vit_no_final_norm": {"final_norm": False},
    "deit_distilled": {},
    "eva_plain": {},
    "eva02_packed": EVA02,
    "eva02_separate": {**EVA02, "qkv_fused": False, "scale_mlp": True, "init_values": 0.1},
    "eva02_mean": {**EVA02, "global_pool": "avg", "num_reg_tokens": 2, "no_embed_class": True},
    "eva_rope_attention": {**EVA02, "attn_type": "rope", "use_abs_pos_emb": False, "swiglu_mlp": False},
    "eva_half_layout": {**EVA02, "rope_rotate_half": True},
    "eva_dinov3": {
        "use_rot_pos_emb": True,
        "rope_type": "dinov3",
        "rope_temperature": 100.0,
        "rope_rotate_half": True,
        "use_abs_pos_emb": False,
        "num_reg_tokens": 4,
        "init_values": 0.1,
        "swiglu_mlp": True,
        "swiglu_align_to": 8,
        "use_fc_norm": False,
    },
    "eva_pe_core": {**PERCEPTION, "global_pool": "map", "rope_grid_offset": 1.0, "attn_pool_num_heads": 4},
    "eva_pe_core_no_cls": {
        **PERCEPTION,
        "global_pool": "map",
        "class_token": False,
        "mlp_ratio": 3.0,
        "attn_pool_mlp_ratio": 2.0,
    },
    "eva_pe_spatial": {
        **PERCEPTION,
        "rope_grid_offset": 1.0,
        "use_post_transformer_norm": False,
        "use_fc_norm": False,
        "init_values": 0.1,
    },
    "eva_column_first_half_layout": {**PERCEPTION, "rope_rotate_half": True},
}
TIMM_CASES = {
    name: Case(
        partial(timm_source, name.partition("_")[0].removesuffix("02"), **kwargs),
        timm_tokens,
        None if name == "deit_distilled" else timm_logits,
    )
    for name, kwargs in TIMM_MODELS.items()
}
CASES = {**HF_CASES, **{f"timm_{name}": case for name, case in TIMM_CASES.items()}}


def build(name: str) -> Any:
    return randomized(CASES[name].build())


# ---- Equality -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_tokens_and_logits_equal_those_of_the_source(name):
    case, source = CASES[name], build(name)
    model = CroprViTModel.from_vit(source, token_reducer=None)
    classifier = CroprViTForImageClassification.from_vit(source, token_reducer=None) if case.logits else None
    assert not model.training and model.dtype == torch.float32
    for size in SIZES[:1] if name == "vit_unusual" else SIZES:
        pixel_values = images(size)
        expected = case.tokens(source, pixel_values)
        assert expected.std() > 0.05  # otherwise the comparison would show nothing
        outputs = model(pixel_values)
        assert_close(outputs.last_hidden_state, expected)
        if case.pooled is not None:
            assert_close(outputs.pooler_output, case.pooled(source, pixel_values))
        if classifier is not None:
            assert_close(classifier(pixel_values).logits, case.logits(source, pixel_values))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.logits is None])
def test_without_a_linear_classifier_the_classifier_is_new(name):
    model = CroprViTForImageClassification.from_vit(build(name), num_labels=7, pruning_rate=2)
    assert model.classifier.out_features == 7
    assert model.classifier.weight.std() < 0.03  # its own initialisation, not the spread of the source


@pytest.mark.parametrize("name", ["dinov2", "dinov2_with_registers", "dinov3", "vit", "deit"])
@torch.no_grad()
def test_a_backbone_without_classifier_pools_the_cls_token(name):
    source = getattr(build(name), {"dinov3": ""}.get(name, "base_model"), None) or build(name)
    model = CroprViTModel.from_vit(source, token_reducer=None)
    outputs = model(images())
    assert model.config.pooling == "cls"
    assert_close(outputs.pooler_output, outputs.last_hidden_state[:, 0])


@pytest.mark.parametrize("apply_layernorm", [True, False])
@torch.no_grad()
def test_feature_maps_equal_those_of_the_backbone(apply_layernorm):
    config = Dinov2Config(**SIZE, out_features=["stage1", "stage3"], apply_layernorm=apply_layernorm)
    source = randomized(Dinov2Backbone(config))
    model = CroprViTBackbone.from_vit(source, token_reducer=None)
    for size in SIZES:
        expected = source(images(size)).feature_maps
        feature_maps = model(images(size)).feature_maps
        assert len(feature_maps) == len(expected) == 2
        for ours, theirs in zip(feature_maps, expected):
            assert_close(ours, theirs)
    assert CroprViTBackbone.from_vit(source, out_indices=[0, 2], pruning_rate=2).out_features == ["stem", "stage2"]


@torch.no_grad()
def test_feature_maps_of_dinov3_equal_those_of_its_backbone():
    config = DINOv3ViTConfig(**WITH_MLP, num_register_tokens=2, out_indices=[1, 3])
    source = randomized(DINOv3ViTBackbone(config))
    feature_maps = CroprViTBackbone.from_vit(source, token_reducer=None)(images((24, 48))).feature_maps
    for ours, theirs in zip(feature_maps, source(images((24, 48))).feature_maps, strict=True):
        assert_close(ours, theirs)


@torch.no_grad()
def test_vit_mae_with_the_recipe_of_the_paper_normalises_the_mean():
    source = build("vit_mae")
    model = CroprViTModel.from_vit(source, token_reducer=None, norm_before_pooling=False)
    outputs = model(images(), output_hidden_states=True)
    assert_close(source.vit.layernorm(outputs.last_hidden_state), unmasked(source, images()))
    assert_close(outputs.pooler_output, source.vit.layernorm(outputs.last_hidden_state.mean(dim=1)))


@pytest.mark.parametrize(("name", "is_new"), [("vit_mae", True), ("timm_vit_mean_of_all", False)])
def test_a_classifier_that_normalises_the_mean_has_a_new_norm_unless_its_source_does_so_too(name, is_new):
    """MAE's norm was trained on tokens, before they are pooled; its fine-tuning starts a new one."""
    source = build(name)
    trained = source.fc_norm if name.startswith("timm") else source.vit.layernorm
    settings = {"num_labels": 7, "pruning_rate": 2, "pooling": "mean", "norm_before_pooling": False}
    backbone = CroprViTModel.from_vit(source, **settings)
    classifier = CroprViTForImageClassification.from_vit(source, **settings).cropr_vit
    as_in_the_source = CroprViTForImageClassification.from_vit(source, num_labels=7).cropr_vit
    for attribute, first in (("weight", 1.0), ("bias", 0.0)):
        expected = getattr(trained, attribute)
        for model in (backbone, as_in_the_source):
            assert torch.equal(getattr(model.layernorm, attribute), expected)
        expected = torch.full_like(expected, first) if is_new else expected
        assert torch.equal(getattr(classifier.layernorm, attribute), expected)


@pytest.mark.parametrize("name", ["clip_both_towers", "siglip_both_towers", "timm_eva_pe_core"])
@torch.no_grad()
def test_dense_tasks_leave_pooling_layers_behind(name):
    """A model that does not pool has no weights for it, which nothing would train."""
    source = build(name)
    model = CroprViTForSemanticSegmentation.from_vit(source, token_reducer=None, num_labels=3)
    assert model.config.projection_dim is None and model.config.pooling in ("cls", "patch_mean")
    assert not any("pooler" in key or "projection" in key for key in model.state_dict())
    outputs = model.cropr_vit(images())
    assert outputs.pooler_output is None
    assert_close(outputs.last_hidden_state, CASES[name].tokens(source, images()))


@torch.no_grad()
def test_a_projection_is_before_the_classifier_unless_it_is_left_behind():
    source = build("clip_projected")
    classifier = CroprViTForImageClassification.from_vit(source, pruning_rate=2, num_labels=7)
    assert classifier.classifier.in_features == 12
    model = CroprViTModel.from_vit(source, token_reducer=None, projection_dim=None)
    expected = source.vision_model(images()).pooler_output
    assert_close(model(images()).pooler_output, expected)
    with pytest.raises(ValueError, match="`projection_dim` is 9, but the weights of the source have 12"):
        CroprViTModel.from_vit(source, projection_dim=9)


def test_attention_pooling_without_weights_is_refused():
    model = CroprViTForImageClassification.from_vit(build("siglip"), pooling="mean", pruning_rate=2)
    assert not any("pooler" in name for name in model.state_dict())
    with pytest.raises(ValueError, match=r"`pooling` is 'attention', but the source has no weights for it; .*'cls'"):
        CroprViTModel.from_vit(build("vit"), pooling="attention")


# ---- Steps ----------------------------------------------------------------------------------------------------------


def test_interleaved_pairs_move_to_the_two_halves_of_each_head():
    # Two heads of size 6: 0..5 and 6..11.
    expected = [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert half_rotary_layout(torch.arange(12), num_heads=2).tolist() == expected
    assert half_rotary_layout(torch.arange(12)[:, None] * torch.ones(3), num_heads=2)[:, 2].tolist() == expected


def test_pairs_that_turn_with_the_row_come_first():
    # Two heads of size 8 in half layout: columns are the pairs (0, 4) and (1, 5), rows (2, 6) and (3, 7).
    expected = [2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13]
    assert rows_first_layout(torch.arange(16), num_heads=2).tolist() == expected


@torch.no_grad()
def test_rotary_layout_of_queries_and_keys_is_converted_and_that_of_values_is_not():
    source = build("timm_eva02_packed")
    attention = CroprViTModel.from_vit(source, token_reducer=None).layers[1].attention
    query, key, value = source.blocks[1].attn.qkv.weight.chunk(3)
    order = half_rotary_layout(torch.arange(32), num_heads=2)
    assert torch.equal(attention.q_proj.weight, query[order]) and torch.equal(attention.k_proj.weight, key[order])
    assert torch.equal(attention.v_proj.weight, value)
    assert torch.equal(attention.q_proj.bias, source.blocks[1].attn.q_bias[order])
    assert attention.k_proj.bias is None


@pytest.mark.parametrize("name", ["vit", "dinov2_with_registers", "timm_vit_registers_layer_scale"])
@torch.no_grad()
def test_another_image_size_resamples_the_positions_as_running_at_it_does(name):
    source = build(name)
    native = CroprViTModel.from_vit(source, token_reducer=None)
    resized = CroprViTModel.from_vit(source, token_reducer=None, image_size=[24, 48])
    assert resized.embeddings.position_embeddings.shape == (1, 3 * 6, 32)
    pixel_values = images((24, 48))
    assert_close(resized(pixel_values).last_hidden_state, native(pixel_values).last_hidden_state)


@pytest.mark.parametrize(("old", "new"), [(14, 16), (16, 14), (8, 16), (16, 4)])
def test_patch_kernels_are_resampled_as_in_timm(old, new):
    layers = pytest.importorskip("timm.layers")
    kernel = torch.randn(5, 3, old, old)
    # Both invert a matrix in float32, by whatever library this torch has for that.
    expected = layers.resample_patch_embed(kernel, [new, new])
    assert_close(resample_patch_kernel(kernel, new), expected, tolerance=1e-4)
    assert resample_patch_kernel(kernel.bfloat16(), new).dtype == torch.bfloat16


@pytest.mark.parametrize(("old", "new"), [(14, 16), (8, 16)])
def test_an_enlarged_patch_gives_what_the_patch_gave(old, new):
    kernel, patch = torch.randn(5, 3, old, old), torch.randn(2, 3, old, old)
    enlarged = F.interpolate(patch, (new, new), mode="bicubic", antialias=True)
    assert_close(F.conv2d(enlarged, resample_patch_kernel(kernel, new)), F.conv2d(patch, kernel), tolerance=1e-4)


@pytest.mark.parametrize(
    ("patch_size", "image_size"),
    # The native grid, larger and smaller ones
    [(16, (48, 80)), *full((16, 64), (16, 96), (7, 56), (12, 36))],
)
@torch.no_grad()
def test_another_patch_size_equals_the_model_of_timm_at_that_size(patch_size, image_size):
    native = {**EVA02, "img_size": 56, "patch_size": 14, "scale_mlp": True}
    source = randomized(timm_source("eva", **native))
    from timm.models.eva import checkpoint_filter_fn

    resized = timm_source("eva", **{**native, "patch_size": patch_size, "img_size": image_size}).eval()
    resized.load_state_dict(checkpoint_filter_fn(source.state_dict(), resized))
    # Weaker than other images: large kernels sum more rounding errors
    pixel_values = 0.2 * images((image_size, image_size) if isinstance(image_size, int) else image_size)
    model = CroprViTForImageClassification.from_vit(
        source, token_reducer=None, patch_size=patch_size, image_size=image_size
    )
    assert_close(model(pixel_values).logits, resized(pixel_values), tolerance=1e-4)
    segmenter = CroprViTForSemanticSegmentation.from_vit(
        source, token_reducer=None, patch_size=patch_size, image_size=image_size, num_labels=3
    )
    tokens = segmenter.cropr_vit(pixel_values).last_hidden_state
    assert_close(tokens, resized.forward_features(pixel_values), tolerance=1e-4)


@pytest.mark.parametrize(("patch_size", "image_size"), [(16, 64), *full((4, 16), (6, 24))])
@torch.no_grad()
def test_another_patch_size_from_transformers(patch_size, image_size):
    layers = pytest.importorskip("timm.layers")
    source = build("vit")
    weights = source.state_dict()
    (name,) = (name for name, tensor in weights.items() if tensor.dim() == 4)
    weights[name] = layers.resample_patch_embed(weights[name], [patch_size, patch_size])
    resized = ViTForImageClassification(
        ViTConfig(**{**WITH_MLP, "patch_size": patch_size, "image_size": image_size})
    ).eval()
    resized.load_state_dict(weights)
    model = CroprViTForImageClassification.from_vit(
        source, token_reducer=None, patch_size=patch_size, image_size=image_size
    )
    pixel_values = images((image_size, image_size))
    assert_close(model(pixel_values).logits, resized(pixel_values).logits, tolerance=1e-4)


def test_a_patch_size_that_does_not_divide_the_image_is_refused():
    with pytest.raises(ValueError, match="`image_size` 32 is not a multiple of `patch_size` 5"):
        CroprViTModel.from_vit(build("vit"), patch_size=5)


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_eva02_sizes_are_those_of_timm(size):
    timm = pytest.importorskip("timm", "1.0.31")  # 1.0.20 needs memory for its weights
    with torch.device("meta"):
        source = timm.create_model(f"eva02_{size}_patch14_224")
    fields = describe_timm(source).fields
    config = CroprViTConfig.from_size(f"eva02_{size}")
    assert {name: getattr(config, name) for name in fields} == fields


def test_positions_of_prefix_tokens_are_added_to_them():
    source = build("deit")
    model = CroprViTModel.from_vit(source, token_reducer=None)
    positions, theirs, ours = source.deit.embeddings.position_embeddings, source.deit.embeddings, model.embeddings
    assert torch.equal(ours.cls_token, theirs.cls_token + positions[:, :1])
    assert torch.equal(ours.register_tokens, theirs.distillation_token + positions[:, 1:2])
    assert torch.equal(ours.position_embeddings, positions[:, 2:])


def test_an_image_of_broken_patches_is_cut_to_whole_ones():
    source = ViTModel(ViTConfig(**{**WITH_MLP, "image_size": 38}))
    assert CroprViTModel.from_vit(source, token_reducer=None).config.image_size == 32


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("encoder.layer.7.attention.attention.query.bias", "encoder.layer.7.attention.q_proj.bias"),
        ("encoder.layer.7.attention.attention.key.weight", "encoder.layer.7.attention.k_proj.weight"),
        ("encoder.layer.7.attention.attention.value.weight", "encoder.layer.7.attention.v_proj.weight"),
        ("encoder.layer.7.attention.output.dense.weight", "encoder.layer.7.attention.o_proj.weight"),
        ("encoder.layer.7.mlp.weights_out.bias", "encoder.layer.7.mlp.down_proj.bias"),
    ],
)
def test_names_of_older_and_newer_releases_mean_the_same(old, new):
    """Left: Dinov2 in Transformers 5.10.1 and 5.17.0; right: in 5.23.0."""
    recipe = SourceDescription({}, RULES)
    assert recipe.targets(old) == recipe.targets(new) != ()


def test_the_fused_gate_of_older_releases_is_split_gate_first():
    recipe = SourceDescription({}, RULES)
    names = ("layers.0.mlp.gate_proj.weight", "layers.0.mlp.up_proj.weight")
    assert recipe.targets("encoder.layer.0.mlp.weights_in.weight") == names
    assert tuple(recipe.targets(f"encoder.{name.replace('layers', 'layer')}")[0] for name in names) == names
    plain = SourceDescription({}, PLAIN_MLP_RULES + RULES)
    assert plain.targets("model.layer.0.mlp.up_proj.weight") == ("layers.0.mlp.fc1.weight",)


# ---- Sources --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("vit", "deit_distilled", "vit_mae", "dinov2_gated", "dinov3", "clip_projected", "siglip_classifier"),
        *("clip_both_towers", "siglip_both_towers", "vit_msn", "ijepa"),
    ],
)
@torch.no_grad()
def test_a_saved_folder_converts_as_the_model_in_memory_does(name, tmp_path):
    source = build(name)
    source.save_pretrained(tmp_path)
    torch.manual_seed(0)
    expected = CroprViTForImageClassification.from_vit(source, token_reducer=None)
    torch.manual_seed(0)
    model = CroprViTForImageClassification.from_vit(str(tmp_path), token_reducer=None, local_files_only=True)
    assert model.config.name_or_path == str(tmp_path)
    for (key, ours), theirs in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        if key.startswith("cropr_vit.") or CASES[name].logits:
            assert torch.equal(ours, theirs), key


def test_a_folder_without_architecture_loads_the_backbone(tmp_path):
    source = build("vit_pooler")
    source.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = CroprViTModel.from_vit(tmp_path, token_reducer=None)
    assert_close(model(images()).last_hidden_state, interpolated(source, images()))


@pytest.mark.parametrize("architecture", ["MyModel", None])
@pytest.mark.parametrize("name", ["vit", "deit", "deit_distilled", "vit_mae", "dinov2_gated", "dinov3"])
def test_a_folder_of_an_unknown_class_converts_as_that_of_the_family(name, architecture, tmp_path):
    source = build(name)
    source.save_pretrained(tmp_path)
    expected = CroprViTForImageClassification.from_vit(tmp_path, token_reducer=None)
    rename_class(tmp_path, architecture)
    model = CroprViTForImageClassification.from_vit(tmp_path, token_reducer=None)
    assert model.config.id2label == expected.config.id2label
    has_classifier = hasattr(source, "classifier")
    for (key, ours), theirs in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs) or not (has_classifier or key.startswith("cropr_vit.")), key


@pytest.mark.parametrize("architecture", ["MyModel", "ViTModel", "ViTForImageClassification"])
def test_a_folder_with_further_weights_is_refused(architecture, tmp_path):
    build("vit").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "decode_head.weight": torch.zeros(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    rename_class(tmp_path, architecture)
    with pytest.raises(ValueError, match=f"of the class {architecture}, has . weights that .*decode_head.weight"):
        CroprViTForImageClassification.from_vit(tmp_path)


def rename_class(folder, architecture):
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = architecture and [architecture]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (None, "does not hold what a saved model holds"),
        ({"dtype": "float33"}, "does not hold what a saved model holds"),
        ({"intermediate_size": 56}, r"has .* of the shape .*, the configuration says .*56.*; restore its fields"),
    ],
    ids=str,
)
def test_a_folder_with_a_foreign_configuration_is_refused(fields, message, tmp_path):
    build("vit").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields and {**config, **fields}))
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))} {message}"):
        CroprViTModel.from_vit(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_with_junk_for_weights_is_refused(name, tmp_path):
    build("vit").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(b"junk")
    with pytest.raises(ValueError, match=f"The weights in {re.escape(str(tmp_path))} are damaged or truncated"):
        CroprViTModel.from_vit(tmp_path)


def test_an_incomplete_folder_is_refused(tmp_path):
    build("vit").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["vit.layernorm.bias" if "vit.layernorm.bias" in weights else "layernorm.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights.*layernorm\.bias"):
        CroprViTModel.from_vit(str(tmp_path))


@pytest.mark.parametrize(
    ("source", "loading", "expected"),
    [
        ("vit_tiny_patch16_224", {}, "vit_tiny_patch16_224"),
        ("timm/vit_x.y", {"revision": "abc"}, "hf-hub:timm/vit_x.y@abc"),
        ("hf-hub:me/eva", {"cache_dir": "here"}, "hf-hub:me/eva"),
    ],
)
def test_timm_names_are_loaded_by_timm(source, loading, expected, monkeypatch):
    timm = pytest.importorskip("timm")
    calls = []

    def create_model(name, **kwargs):
        calls.append((name, kwargs))
        return build("timm_vit")

    monkeypatch.setattr(timm, "create_model", create_model)
    model = CroprViTModel.from_vit(source, token_reducer=None, **loading)
    assert calls == [(expected, {"pretrained": True, "cache_dir": loading.get("cache_dir")})]
    assert model.config.name_or_path == source


def test_a_timm_name_without_timm_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"pip install cropr_hf\[timm\]"):
        CroprViTModel.from_vit("timm/vit_base_patch16_224.augreg_in1k")


def test_wrong_timm_names_and_arguments_are_refused():
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=r"near matches: .*vit_base_patch16_224"):
        CroprViTModel.from_vit("vit_base_patch16_22")
    with pytest.raises(ValueError, match=r"with token; it takes `cache_dir`.*HF_TOKEN"):
        CroprViTModel.from_vit("timm/vit_base_patch16_224", token="secret")


def test_label_names_of_timm_come_along():
    source = build("timm_vit")
    source.pretrained_cfg = {"label_names": list("abcde")}
    model = CroprViTForImageClassification.from_vit(source, token_reducer=None)
    assert model.config.id2label == dict(enumerate("abcde")) and model.config.label2id["c"] == 2


def test_a_classifier_that_was_replaced_brings_its_number_of_labels():
    source = build("vit")
    source.classifier = torch.nn.Linear(32, 7)
    model = CroprViTForImageClassification.from_vit(source, token_reducer=None)
    assert torch.equal(model.classifier.weight, source.classifier.weight) and model.config.id2label[6] == "LABEL_6"
    source.config.id2label = {0: "cat", 1: "dog"}
    with pytest.raises(ValueError, match="`num_labels` is 7, but there are names of 2 classes"):
        CroprViTForImageClassification.from_vit(source, token_reducer=None)


def test_a_regression_comes_along():
    source = ViTForImageClassification(ViTConfig(**{**WITH_MLP, "num_labels": 1}, problem_type="regression"))
    model = CroprViTForImageClassification.from_vit(source, token_reducer=None)
    targets = torch.randn(len(images()), 1)
    assert_close(model(images(), labels=targets).loss, source(images(), labels=targets).loss)


def test_the_source_stays_as_it_is():
    source = build("vit")
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    model = CroprViTForImageClassification.from_vit(source, pruning_rate=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    model.config.id2label[0] = "changed"
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items())
    assert source.config.id2label[0] == "LABEL_0"


# ---- Targets --------------------------------------------------------------------------------------------------------


def test_a_pruned_model_has_new_token_reducers_only_and_trains():
    source = build("vit")
    unpruned = CroprViTForImageClassification.from_vit(source, token_reducer=None).state_dict()
    model = CroprViTForImageClassification.from_vit(source, pruning_rate=3)
    weights = model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in unpruned.items())
    new = {name for name in weights if name not in unpruned}
    assert new and all(name.startswith("cropr_vit.token_reducers.1.") for name in new)
    assert model.config.use_auxiliary_heads
    model.train()(images(), labels=torch.tensor([0, 4])).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_auxiliary_heads_are_the_default_of_prunable_task_classes_only():
    source = build("vit")
    build_classifier = partial(CroprViTForImageClassification.from_vit, source, pruning_rate=2)
    assert build_classifier().config.use_auxiliary_heads
    assert not build_classifier(use_auxiliary_heads=False).config.use_auxiliary_heads
    assert not build_classifier(token_reducer="random").config.use_auxiliary_heads
    assert not CroprViTModel.from_vit(source, pruning_rate=2).config.use_auxiliary_heads
    assert not CroprViTBackbone.from_vit(source, pruning_rate=2).config.use_auxiliary_heads
    assert CroprViTModel.from_vit(source, pruning_rate=2, use_auxiliary_heads=True).config.use_auxiliary_heads


@pytest.mark.parametrize("name", ["vit", "dinov3", "timm_eva02_separate"])
@torch.no_grad()
def test_a_segmentation_model_has_the_tokens_of_its_source(name):
    source = build(name)
    convert = partial(CroprViTForSemanticSegmentation.from_vit, source, pruning_rate=2, num_labels=3)
    model = convert()
    assert model.config.use_auxiliary_heads and model.config.query_counts == (0, 1)
    assert model.cropr_vit.token_reducers["1"].router.scorer.queries.shape == (1, 32)
    model = convert(image_size=[48, 40], auxiliary_task="patches")
    assert model.config.use_auxiliary_heads and model.config.query_counts == (30, 0)
    assert model.cropr_vit.token_reducers["1"].router.scorer.queries.shape == (6 * 5, 32)
    assert model.classifier.weight.shape == (3, 32) and model.classifier.weight.std() < 0.03  # its own first weights
    model.set_pruning(0)
    expected = CASES[name].tokens(source, images((48, 40)))
    assert_close(model.cropr_vit(images((48, 40))).last_hidden_state, expected)
    assert not convert(token_reducer="random").config.use_auxiliary_heads


def test_labels_come_along_while_their_number_stays():
    names = dict(enumerate(["ant", "bee", "cat", "dog", "eel"]))
    config = ViTConfig(**{key: value for key, value in WITH_MLP.items() if key != "num_labels"}, id2label=names)
    source = randomized(ViTForImageClassification(config))
    convert = partial(CroprViTForImageClassification.from_vit, source, token_reducer=None)
    kept, renamed, pooled, new = (
        convert(),
        convert(id2label=dict(enumerate("abcde"))),
        convert(pooling="mean"),
        convert(num_labels=3),
    )
    assert kept.config.id2label == pooled.config.id2label == names
    assert renamed.config.id2label[1] == "b" and new.config.id2label[1] == "LABEL_1"
    for model, same_weights in ((kept, True), (renamed, True), (pooled, False), (new, False)):
        assert torch.equal(model.classifier.weight, source.classifier.weight) == same_weights
    assert new.classifier.out_features == 3


def test_overrides_reach_the_config():
    model = CroprViTForImageClassification.from_vit(
        build("dinov2"), pruning_rate=4, drop_path_rate=0.1, num_queries=2, attn_implementation="eager"
    )
    config = model.config
    assert (config.pruning_rate, config.drop_path_rate, config.num_queries) == (4, 0.1, 2)
    assert config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["vit", "dinov3", "timm_eva02_packed"])
def test_the_model_keeps_the_dtype_of_its_source(name):
    model = CroprViTModel.from_vit(build(name).to(torch.bfloat16), pruning_rate=2)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype == torch.bfloat16
    assert model(images().to(torch.bfloat16)).last_hidden_state.isfinite().all()


def test_rotary_angles_are_exact_in_a_model_cast_to_half_precision():
    model = CroprViTModel.from_vit(build("dinov3"), pruning_rate=2)
    exact = model.rotary_embedding((4, 6), torch.float32, torch.device("cpu"))
    cast = model.to(torch.bfloat16).rotary_embedding((4, 6), torch.float32, torch.device("cpu"))
    assert torch.equal(exact[0], cast[0]) and torch.equal(exact[1], cast[1])


@torch.no_grad()
def test_a_converted_model_survives_saving(tmp_path):
    model = CroprViTForImageClassification.from_vit(build("dinov2_with_registers"), pruning_rate=3)
    model.save_pretrained(tmp_path)
    loaded = CroprViTForImageClassification.from_pretrained(tmp_path)
    assert_close(loaded(images()).logits, model(images()).logits)


# ---- Refusals -------------------------------------------------------------------------------------------------------


def test_a_weight_that_no_rule_knows_is_refused():
    source = build("vit")
    source.vit.layers[0].adapter = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"does not know: vit\.layers\.0\.adapter\.weight, .*adapter\.bias"):
        CroprViTModel.from_vit(source)


@pytest.mark.parametrize("model_class", [CroprViTModel, CroprViTForImageClassification])
def test_a_missing_weight_is_refused(model_class):
    source = build("vit")
    source.vit.layers[1].mlp.fc1.bias = None
    with pytest.raises(ValueError, match=r"does not fill: .*layers\.1\.mlp\.fc1\.bias"):
        model_class.from_vit(source)


def test_a_weight_of_the_wrong_shape_is_refused():
    source = build("vit")
    source.vit.layers[2].mlp.fc1 = nn.Linear(32, 40)
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.fc1\.weight is \(40, 32\), needed \(48, 32\)"):
        CroprViTModel.from_vit(source)


@pytest.mark.parametrize("length", [4, 20])
def test_a_position_table_of_the_wrong_length_is_refused(length):
    source = build("vit")
    source.vit.embeddings.position_embeddings = nn.Parameter(torch.zeros(1, length, 32))
    with pytest.raises(ValueError, match=rf"position_embeddings is \(1, {length}, 32\), needed \(1, 16, 32\)"):
        CroprViTModel.from_vit(source)


def test_an_unsupported_family_is_refused_before_its_weights_are_loaded(tmp_path):
    config = BeitConfig(**WITH_MLP)
    with pytest.raises(ValueError, match=r"type 'beit'; conversion supports vit, deit, vit_mae, vit_msn, .*timm"):
        CroprViTModel.from_vit(BeitModel(config))
    config.save_pretrained(tmp_path)  # a folder without weights
    with pytest.raises(ValueError, match="type 'beit'"):
        CroprViTModel.from_vit(str(tmp_path))
    with pytest.raises(ValueError, match=r"type 'cropr_vit'.*`from_pretrained` loads this one"):
        CroprViTModel.from_vit(CroprViTModel.from_vit(build("vit"), pruning_rate=2))
    assert {"vit", "dinov3_vit", "timm eva02"} <= set(SUPPORTED_FAMILIES)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("siglip2", "NaFlex.*checkpoints of SigLIP 2 are of type 'siglip' and convert"),
        ("siglip2_vision_model", "NaFlex"),
        ("aimv2", "RMSNorm"),
        ("aimv2_vision_model", "RMSNorm"),
    ],
)
def test_a_family_that_is_no_point_of_the_space_is_refused_with_the_reason(model_type, reason, tmp_path):
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)  # a folder without weights
    with pytest.raises(ValueError, match=f"type '{model_type}', which a Cropr ViT does not support: .*{reason}"):
        CroprViTModel.from_vit(tmp_path)


@pytest.mark.parametrize("source", [nn.Linear(2, 2), None, 3])
def test_what_is_no_vision_transformer_is_refused(source):
    with pytest.raises(ValueError, match="The source is a "):
        CroprViTModel.from_vit(source)


@pytest.mark.parametrize(
    ("name", "kwargs", "match"),
    [
        ("vit", {"qk_norm": True}, "qk_norm"),
        ("vit", {"scale_attn_norm": True}, "norm inside attention"),
        ("vit", {"global_pool": "map"}, "attention pooling"),  # of patches alone
        ("eva", {"global_pool": "map", "swiglu_mlp": True}, "attention pooling"),  # with another activation
        ("vit", {"global_pool": "avgmax"}, "pooling 'avgmax'"),
        ("eva", {"use_fc_norm": True, "use_post_transformer_norm": True}, "two final norms"),
        ("vit", {"act_layer": "elu"}, "another activation"),
        ("vit", {"norm_layer": "rmsnorm"}, "not a LayerNorm"),
        ("vit", {"embed_norm_layer": "layernorm"}, "another patch embedding"),
        ("eva", {"scale_attn_inner": True}, "norm inside attention"),
        ("eva", {"use_rot_pos_emb": True, "rope_type": "mixed"}, "rotary positions"),
        ("eva", {"use_rot_pos_emb": True}, "rotary positions"),  # no reference grid
        ("eva", {**EVA02, "ref_feat_shape": (4, 8)}, "rotary positions"),
    ],
)
def test_variants_of_timm_that_are_not_supported_are_named(name, kwargs, match):
    with pytest.raises(ValueError, match=match):
        CroprViTModel.from_vit(timm_source(name, **kwargs))


def test_other_blocks_and_classes_of_timm_are_named():
    pytest.importorskip("timm")
    from timm.models.beit import Beit
    from timm.models.eva import EvaBlockPostNorm
    from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock

    for block in (ParallelScalingBlock, ParallelThingsBlock, ResPostBlock):
        with pytest.raises(ValueError, match=f"blocks of the class {block.__name__}"):
            CroprViTModel.from_vit(timm_source("vit", block_fn=block))
    eva = timm_source("eva")
    eva.blocks[1].__class__ = EvaBlockPostNorm
    with pytest.raises(ValueError, match="blocks of the class EvaBlockPostNorm"):
        CroprViTModel.from_vit(eva)
    with pytest.raises(ValueError, match=r"is a timm\.models\.beit\.Beit; conversion takes"):
        CroprViTModel.from_vit(Beit(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2))


def test_an_unknown_keyword_is_refused_with_near_matches():
    with pytest.raises(ValueError, match=r"does not know 'prunning_rate'.*Near matches: pruning_rate"):
        CroprViTModel.from_vit(build("vit"), prunning_rate=4)
    with pytest.raises(ValueError, match="does not know 'qqq'"):
        CroprViTModel.from_vit(build("vit"), qqq=4)


def test_loading_arguments_for_a_model_in_memory_are_refused():
    with pytest.raises(ValueError, match="revision say how to load a source, but it is in memory"):
        CroprViTModel.from_vit(build("vit"), revision="main")


def test_overrides_that_the_weights_contradict_are_refused():
    source = build("vit")
    with pytest.raises(ValueError, match=r"`hidden_size` is 64, but the weights of the source have 32; leave it out"):
        CroprViTModel.from_vit(source, hidden_size=64)
    assert CroprViTModel.from_vit(source, patch_size=8, hidden_size=32, pruning_rate=2)
    with pytest.raises(ValueError, match="`num_register_tokens` is 4, but the weights of the source have 3"):
        CroprViTModel.from_vit(build("dinov2_with_registers"), num_register_tokens=4)


@torch.no_grad()
def test_register_tokens_of_a_source_without_are_new(log_records):
    source = build("vit")
    model = CroprViTModel.from_vit(source, num_register_tokens=4, token_reducer=None)
    assert "the 4 of the model are new, and drawn at random" in log_records[-1].getMessage()
    tokens = model.embeddings.register_tokens
    assert tokens.shape == (1, 4, 32) and 0 < tokens.std() < 0.05
    old = CroprViTModel.from_vit(source, token_reducer=None).state_dict()
    for name, tensor in model.state_dict().items():
        assert name == "embeddings.register_tokens" or torch.equal(tensor, old[name])


def test_patches_that_are_not_square_are_refused():
    source = ViTModel(ViTConfig(**{**WITH_MLP, "patch_size": [8, 16]}))
    with pytest.raises(ValueError, match="patches of 8 x 16 pixels"):
        CroprViTModel.from_vit(source)


def test_a_dinov2_classifier_sees_cls_and_patches_and_its_backbone_cls_alone():
    source = build("dinov2")
    assert CroprViTForImageClassification.from_vit(source, pruning_rate=2).config.pooling == "cls_patch_mean"
    assert CroprViTModel.from_vit(Dinov2Model(Dinov2Config(**SIZE)), pruning_rate=2).config.pooling == "cls"
