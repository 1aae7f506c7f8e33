"""`CroprViTBackbone` inside models of Transformers: by config alone, trained with the labels of the whole model."""

import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoModel,
    AutoModelForObjectDetection,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DeformableDetrImageProcessor,
    DFineConfig,
    DFineForObjectDetection,
    DPTConfig,
    DPTForDepthEstimation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTConfig,
    ViTModel,
    pipeline,
)
from transformers.loss.loss_lw_detr import LwDetrForObjectDetectionLoss
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from cropr_hf import CroprViTBackbone, CroprViTForImageClassification, CroprViTModel
from cropr_hf.modeling_cropr_rf_detr import CroprRfDetrConfig, CroprRfDetrForObjectDetection, CroprRfDetrModel
from cropr_hf.training import train_routers
from cropr_hf.training.composite import presence_in_labels
from tests.common import assert_close_relative, enable_activation_checkpointing, make_images, make_model, tiny_config


NUM_LABELS = 5
IMAGE_SIZE = 64  # 64 patches of 8 pixels, of which 3 modules remove 25
STAGES = ["stage1", "stage2", "stage3", "stage5"]
DECODER = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_queries": 10,
}


def backbone_config(**overrides: Any):
    return tiny_config(**{"image_size": IMAGE_SIZE, "pruning_rate": 8, "num_labels": NUM_LABELS, **overrides})


def deformable_detr(backbone: Any):
    return DeformableDetrConfig(
        backbone_config=backbone, use_timm_backbone=False, num_labels=NUM_LABELS, num_feature_levels=1, **DECODER
    )


def d_fine(backbone: Any):
    return DFineConfig(
        backbone_config=backbone,
        num_labels=NUM_LABELS,
        encoder_in_channels=[32],
        feat_strides=[8],
        num_feature_levels=1,
        encoder_hidden_dim=32,
        encode_proj_layers=[0],
        decoder_in_channels=[32],
        decoder_n_points=[4],
        num_denoising=4,
        **DECODER,
    )


def rf_detr(backbone: Any):
    return CroprRfDetrConfig(
        backbone_config=backbone,
        num_labels=NUM_LABELS,
        d_model=32,
        decoder_layers=2,
        decoder_ffn_dim=32,
        decoder_self_attention_heads=4,
        decoder_cross_attention_heads=4,
        c2f_num_blocks=1,
        num_queries=10,
        group_detr=3,
    )


def mask2former(backbone: Any):
    return Mask2FormerConfig(
        backbone_config=backbone,
        num_labels=NUM_LABELS,
        feature_strides=[8] * 4,
        common_stride=8,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=4,
        dim_feedforward=32,
        num_queries=10,
        train_num_points=64,
    )


def upernet(backbone: Any):
    return UperNetConfig(
        backbone_config=backbone, num_labels=NUM_LABELS, hidden_size=32, use_auxiliary_head=False, pool_scales=[1, 2]
    )


def dpt(backbone: Any):
    return DPTConfig(
        backbone_config=backbone,
        is_hybrid=False,
        neck_hidden_sizes=[16] * 4,
        fusion_hidden_size=16,
        reassemble_factors=[4, 2, 1, 0.5],
    )


# Image 0 shows the classes 0 and 3, image 1 shows class 1.
PRESENCE = torch.tensor([[1.0, 0, 0, 1, 0], [0, 1, 0, 0, 0]])
OBJECTS = [
    {
        "class_labels": torch.tensor([0, 3]),
        "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3], [0.3, 0.3, 0.2, 0.2]]),
    },
    {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.3]])},
]


def boxes() -> dict[str, Any]:
    return {"labels": copy.deepcopy(OBJECTS)}


def masks() -> dict[str, Any]:
    left = torch.zeros(IMAGE_SIZE, IMAGE_SIZE)
    left[:, : IMAGE_SIZE // 2] = 1.0
    return {
        "mask_labels": [torch.stack([left, 1 - left]), left[None]],
        "class_labels": [image["class_labels"] for image in OBJECTS],
    }


def maps() -> dict[str, Any]:
    labels = torch.full((2, IMAGE_SIZE, IMAGE_SIZE), 255)
    labels[0, :20], labels[0, 40:], labels[1, 8:] = 0, 3, 1
    return {"labels": labels}


def image_labels() -> dict[str, Any]:
    return {"image_labels": PRESENCE}


def pop_image_labels(kwargs: dict[str, Any]) -> torch.Tensor | None:
    return kwargs.pop("image_labels", None)


@dataclass(frozen=True)
class Composite:
    """A model class around the backbone, its labels, and its main output."""

    model_class: type
    config: Callable[[Any], Any]
    labels: Callable[[], dict[str, Any]]
    output: str
    backbone: dict[str, Any] = field(default_factory=dict)
    presence: Callable | None = None

    def build(self, **overrides: Any) -> Any:
        return make_model(self.model_class, self.config(backbone_config(**{**self.backbone, **overrides})))


MAPS = {"out_features": STAGES}
COMPOSITES = {
    "deformable_detr": Composite(DeformableDetrForObjectDetection, deformable_detr, boxes, "logits"),
    "d_fine": Composite(DFineForObjectDetection, d_fine, boxes, "logits"),
    "rf_detr": Composite(CroprRfDetrForObjectDetection, rf_detr, boxes, "logits", MAPS),
    "mask2former": Composite(Mask2FormerForUniversalSegmentation, mask2former, masks, "masks_queries_logits", MAPS),
    "upernet": Composite(UperNetForSemanticSegmentation, upernet, maps, "logits", MAPS),
    "dpt": Composite(
        DPTForDepthEstimation,
        dpt,
        image_labels,
        "predicted_depth",
        {**MAPS, "reshape_hidden_states": False},
        pop_image_labels,
    ),
}
IMAGES = make_images(2, IMAGE_SIZE, IMAGE_SIZE)

every_composite = pytest.mark.parametrize("composite", COMPOSITES.values(), ids=COMPOSITES)


def backbone_of(model: Any) -> CroprViTBackbone:
    return next(module for module in model.modules() if isinstance(module, CroprViTBackbone))


def output_of(composite: Composite, model: Any, **kwargs: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(pixel_values=IMAGES, **kwargs)[composite.output]


def training_loss(model: Any, labels: dict[str, Any], seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)  # dropout, denoising queries and sampled points
    return model.train()(pixel_values=IMAGES, **labels).loss


# The models as they are


@every_composite
def test_config_alone_puts_the_pruning_backbone_into_the_model(composite):
    model = composite.build()
    backbone = backbone_of(model)
    pruned = backbone.cropr_vit(IMAGES, output_pruning=True).pruned_after_block
    assert (pruned < backbone.config.num_hidden_layers).sum(dim=1).tolist() == [25, 25]
    output = output_of(composite, model)
    assert output.isfinite().all()
    backbone.set_pruning(0)
    assert not torch.equal(output_of(composite, model), output)


@every_composite
def test_hidden_states_and_attentions_do_not_change_the_output(composite):
    model = composite.build(attn_implementation="eager")
    expected = output_of(composite, model)
    for wanted in ({"output_hidden_states": True}, {"output_attentions": True, "output_hidden_states": True}):
        assert torch.equal(output_of(composite, model, **wanted), expected)
    assert torch.equal(output_of(composite, model), expected)


class RecordingConfig(PreTrainedConfig):
    model_type = "recording"
    num_hidden_layers: int = 1


class RecordingModel(PreTrainedModel):
    """A model that records hidden states of its own, and with that installs the hooks of its backbone again."""

    config: RecordingConfig
    _can_record_outputs = {"hidden_states": torch.nn.Linear}

    def __init__(self, config):
        super().__init__(config)
        self.backbone = CroprViTBackbone(backbone_config(out_features=STAGES, attn_implementation="eager"))
        self.head = torch.nn.Linear(32, 8)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(self, pixel_values, **kwargs):
        maps = torch.stack(self.backbone(pixel_values).feature_maps)
        return BaseModelOutput(last_hidden_state=self.head(maps.flatten(3).transpose(2, 3)))


def test_hooks_that_are_installed_twice_do_not_change_feature_maps():
    model = make_model(RecordingModel, RecordingConfig())
    expected = model(IMAGES).last_hidden_state
    for kwargs in ({"output_hidden_states": True}, {}):
        assert torch.equal(model(IMAGES, **kwargs).last_hidden_state, expected)
    states = model.backbone(IMAGES, output_hidden_states=True, output_attentions=True)
    assert (len(states.hidden_states), len(states.attentions)) == (6, 5)
    assert [attention.shape[-1] for attention in states.attentions] == [65, 56, 48, 40, 65]


@every_composite
@pytest.mark.parametrize("stripped", [True, pytest.param(False, marks=pytest.mark.full)], ids=["stripped", "complete"])
def test_saving_and_loading_keeps_every_weight(composite, stripped, tmp_path):
    model = composite.build(use_auxiliary_heads=True)
    expected = output_of(composite, model)
    if stripped:
        backbone_of(model).remove_auxiliary_heads()
        assert torch.equal(output_of(composite, model), expected)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["backbone_config"]["use_auxiliary_heads"] is not stripped
    loaded, info = composite.model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    weights = model.state_dict()
    assert any("folded_query" in name for name in weights) is stripped
    assert weights.keys() == loaded.state_dict().keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())
    # A kernel may round otherwise when weights lie elsewhere in memory.
    assert_close_relative(output_of(composite, loaded), expected)


# Training the routers


@every_composite
def test_gradients_reach_the_backbone_and_with_train_routers_the_queries(composite):
    model = composite.build()
    backbone = train_routers(model, composite.presence)
    assert backbone is backbone_of(model) and backbone.config.use_auxiliary_heads
    outputs = model.train()(pixel_values=IMAGES, **composite.labels())
    loss = outputs.loss + (outputs.predicted_depth.mean() if composite.output == "predicted_depth" else 0)
    loss.backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any() or name.endswith("k_proj.bias"), name  # which softmax cannot see


@every_composite
def test_loss_is_that_of_the_model_and_the_weighted_auxiliary_losses(composite):
    model = composite.build(auxiliary_loss_weight=0.5)
    without = None if composite.presence else training_loss(model, composite.labels())
    backbone = train_routers(model, composite.presence)
    with_routers = training_loss(model, composite.labels())
    auxiliary = backbone(IMAGES, labels=PRESENCE).auxiliary_losses
    assert auxiliary.shape == (3,)
    expected = 0.5 * auxiliary.sum() + (0 if without is None else without)
    assert_close_relative(with_routers, expected.reshape(with_routers.shape))


@every_composite
def test_train_routers_changes_nothing_in_evaluation(composite):
    model = composite.build()
    expected = output_of(composite, model)
    without = None if composite.presence else model(pixel_values=IMAGES, **composite.labels())
    train_routers(model, composite.presence)
    assert torch.equal(output_of(composite, model), expected)
    if without is not None:
        outputs = model(pixel_values=IMAGES, **composite.labels())
        assert outputs.keys() == without.keys()
        assert torch.equal(outputs[composite.output], expected)
    else:
        assert model(pixel_values=IMAGES, image_labels=PRESENCE).get("loss") is None


@every_composite
def test_a_stripped_model_can_be_trained_again_with_the_same_ranking(composite):
    model = composite.build(use_auxiliary_heads=True)
    backbone_of(model).remove_auxiliary_heads()
    ranking = backbone_of(model).cropr_vit(IMAGES, output_pruning=True).pruned_after_block
    backbone = train_routers(model, composite.presence)
    assert torch.equal(backbone.cropr_vit(IMAGES, output_pruning=True).pruned_after_block, ranking)
    training_loss(model, composite.labels()).sum().backward()
    assert all(module.router.scorer.queries.grad.any() for module in backbone.cropr_vit.token_reducers.values())


def test_routers_learn_what_the_labels_say():
    model = COMPOSITES["upernet"].build()
    backbone = train_routers(model)
    model.train()
    optimizer = torch.optim.AdamW(backbone.cropr_vit.token_reducers.parameters(), lr=1e-2)
    before = backbone(IMAGES, labels=PRESENCE).auxiliary_losses
    for _ in range(10):
        optimizer.zero_grad()
        model(pixel_values=IMAGES, **maps()).loss.backward()
        optimizer.step()
    assert (backbone(IMAGES, labels=PRESENCE).auxiliary_losses < 0.5 * before).all()


def test_a_copy_trains_its_own_routers():
    model = COMPOSITES["upernet"].build()
    train_routers(model)
    clone = copy.deepcopy(model)
    training_loss(clone, maps()).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.router.scorer.queries.grad is not None for module in modules_of(clone))


def modules_of(model: Any) -> list[Any]:
    return list(backbone_of(model).cropr_vit.token_reducers.values())


def test_a_failed_pass_leaves_nothing_behind():
    model = COMPOSITES["upernet"].build()
    train_routers(model)
    expected = training_loss(model, maps())
    with pytest.raises(ValueError, match="multiple of the patch size"):
        model(pixel_values=IMAGES[..., :-1], **maps())
    assert model(pixel_values=IMAGES).get("loss") is None
    assert_close_relative(training_loss(model, maps()), expected)


def test_distributed_training_reaches_the_routers(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        model = COMPOSITES["deformable_detr"].build()
        train_routers(model)
        expected = training_loss(model, boxes())
        # As the Trainer wraps it: with a search for unused parameters, outputs are taken apart and put together.
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        loss = training_loss(wrapped, boxes())
        loss.backward()
        assert_close_relative(loss, expected)
        assert all(module.router.scorer.queries.grad.any() for module in modules_of(model))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["rf_detr", pytest.param("upernet", marks=pytest.mark.full)])
def test_the_plain_trainer_trains_evaluates_and_resumes(name, tmp_path):
    composite = COMPOSITES[name]
    labels = composite.labels()["labels"]
    data = [{"pixel_values": image, "labels": label} for image, label in zip(IMAGES, labels)] * 2

    def collate(examples):
        labels = [example["labels"] for example in examples]
        labels = torch.stack(labels) if isinstance(labels[0], torch.Tensor) else labels
        return {"pixel_values": torch.stack([example["pixel_values"] for example in examples]), "labels": labels}

    def train(folder, **kwargs):
        model = composite.build()
        train_routers(model)
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=2,
            max_steps=4,
            save_steps=2,
            logging_steps=1,
            learning_rate=1e-3,
            remove_unused_columns=False,
            eval_do_concat_batches=False,
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, data_collator=collate, train_dataset=data, eval_dataset=data)
        trainer.train(**kwargs)
        return trainer

    trainer = train(tmp_path / "run")
    resumed = train(tmp_path / "resumed", resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    weights, resumed_weights = trainer.model.state_dict(), resumed.model.state_dict()
    assert any(".queries" in key for key in weights)
    assert all(torch.equal(weights[key], resumed_weights[key]) for key in weights)
    predictions = trainer.predict(data)
    assert predictions.metrics["test_loss"] > 0
    if name == "rf_detr":  # what the official script reads
        assert all(len(batch) == 3 and isinstance(batch[0], dict) for batch in predictions.predictions)


# What users may get wrong


def test_models_without_one_backbone_are_refused():
    config = backbone_config()
    for model in (CroprViTForImageClassification(config), CroprViTBackbone(config), ViTModel(ViTConfig(**TINY_VIT))):
        with pytest.raises(ValueError, match="contains 0 `CroprViTBackbone`"):
            train_routers(model)


def test_routers_are_not_trained_twice():
    model = COMPOSITES["upernet"].build()
    train_routers(model)
    with pytest.raises(ValueError, match="call `train_routers` once"):
        train_routers(model)


def test_other_numbers_of_classes_are_refused():
    model = COMPOSITES["upernet"].build(num_labels=3)
    with pytest.raises(ValueError, match=r"backbone has 3 classes, the model 5.*`num_labels` of `backbone_config`"):
        train_routers(model)
    train_routers(model, lambda kwargs: torch.zeros(2, 3))  # classes of another kind
    assert training_loss(model, maps()).isfinite()


def test_a_backbone_that_learns_nothing_is_refused():
    with pytest.raises(ValueError, match="'random' has no auxiliary heads"):
        train_routers(COMPOSITES["upernet"].build(token_reducer="random"))


def test_classes_out_of_range_are_refused():
    model = COMPOSITES["upernet"].build()
    train_routers(model)
    labels = maps()["labels"].masked_fill(maps()["labels"] == 3, 5)
    with pytest.raises(ValueError, match=r"classes from 0 to 5; the backbone has 5.*\[0, 4\]"):
        training_loss(model, {"labels": labels})


def test_a_tuple_is_refused_in_training():
    model = COMPOSITES["upernet"].build()
    train_routers(model)
    with pytest.raises(ValueError, match="`return_dict`"):
        model.train()(pixel_values=IMAGES, return_dict=False, **maps())


def test_training_without_routers_warns_once(log_records):
    for _ in range(2):
        training_loss(COMPOSITES["upernet"].build(), maps())
    warnings = [record.getMessage() for record in log_records if "scorers" in record.getMessage()]
    assert len(warnings) == 1 and "train_routers" in warnings[0]


@pytest.mark.parametrize("name", ["random", "unpruned"])
def test_a_backbone_without_routers_trains_silently(name, log_records):
    make_model(CroprViTBackbone, tiny_config(name)).train()(make_images())
    assert not log_records


# Presence


def test_presence_comes_from_every_kind_of_label():
    empty = {"class_labels": torch.tensor([], dtype=torch.long)}
    for kwargs in (boxes(), masks(), maps(), {"labels": tuple(OBJECTS)}):
        assert torch.equal(presence_in_labels(kwargs, NUM_LABELS, 255), PRESENCE)
    nothing = presence_in_labels({"labels": [empty, empty]}, NUM_LABELS, 255)
    assert torch.equal(nothing, torch.zeros(2, NUM_LABELS))
    ignored = presence_in_labels({"labels": torch.full((1, 4, 4), -100)}, NUM_LABELS, -100)
    assert torch.equal(ignored, torch.zeros(1, NUM_LABELS))
    assert presence_in_labels({"pixel_values": IMAGES}, NUM_LABELS, 255) is None


@pytest.mark.parametrize("labels", [torch.tensor([0, 1]), torch.zeros(2, 4, 4), "cat", [1, 2]])
def test_labels_of_another_kind_are_refused(labels):
    with pytest.raises(ValueError, match="give `presence`"):
        presence_in_labels({"labels": labels}, NUM_LABELS, 255)


# The backbone by itself


@pytest.mark.parametrize("num_queries", [1, 3])
def test_backbone_computes_binary_cross_entropy_per_module(num_queries):
    backbone = make_model(CroprViTBackbone, tiny_config(use_auxiliary_heads=True, num_queries=num_queries)).train()
    images, labels = make_images(), PRESENCE * 0.9
    losses = backbone(images, labels=labels).auxiliary_losses
    logits = backbone.cropr_vit(images).auxiliary_logits
    expected = [F.binary_cross_entropy_with_logits(one, labels[:, None].repeat(1, num_queries, 1)) for one in logits]
    assert_close_relative(losses, torch.stack(expected))
    assert losses.requires_grad
    assert backbone(images).auxiliary_losses is None
    assert backbone.eval()(images, labels=labels).auxiliary_losses is None


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(2, 4), r"\(2, 4\); it must be \(batch size, classes\) = \(2, 5\)"),
        (torch.zeros(2, dtype=torch.long), r"\(2,\); it must be"),
        (torch.full((2, 5), 2), r"between 2.0 and 2.0; .* in \[0, 1\]"),
        (torch.full((2, 5), -0.5), r"in \[0, 1\]"),
    ],
)
def test_backbone_refuses_labels_that_are_no_presence(labels, message):
    backbone = make_model(CroprViTBackbone, tiny_config(use_auxiliary_heads=True)).train()
    with pytest.raises(ValueError, match=message):
        backbone(make_images(), labels=labels)


def test_backbone_returns_sequences_with_the_cls_token():
    maps = make_model(CroprViTBackbone, backbone_config(out_features=STAGES, num_register_tokens=2))
    sequences = make_model(
        CroprViTBackbone, backbone_config(out_features=STAGES, num_register_tokens=2, reshape_hidden_states=False)
    )
    states = sequences(IMAGES, output_hidden_states=True)
    for place, (feature_map, sequence) in enumerate(zip(maps(IMAGES).feature_maps, states.feature_maps)):
        assert sequence.shape == (2, 65, 32)
        assert torch.equal(sequence[:, 1:].transpose(1, 2).unflatten(2, (8, 8)), feature_map)
        cls_token = states.hidden_states[[1, 2, 3, 5][place]][:, 0]
        assert_close_relative(sequence[:, 0], sequences.cropr_vit.layernorm(cls_token))
    with pytest.raises(ValueError, match="`use_cls_token=True`"):
        CroprViTBackbone(backbone_config(use_cls_token=False, reshape_hidden_states=False))


# RF-DETR


def build_rf_detr(**overrides: Any) -> CroprRfDetrForObjectDetection:
    return COMPOSITES["rf_detr"].build(**overrides)


@pytest.mark.full
def test_rf_detr_learns_a_batch():
    torch.manual_seed(0)
    model = CroprRfDetrForObjectDetection(rf_detr(backbone_config(**MAPS)))  # first weights as they are
    train_routers(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(25):  # at 15 some seeds have hardly begun
        loss = training_loss(model, boxes())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0], losses


def test_rf_detr_has_the_first_weights_of_the_library():
    """Transformers passes over modules without parameters of their own in models that are not its own."""
    torch.manual_seed(0)
    model = CroprRfDetrForObjectDetection(rf_detr(backbone_config()))
    torch.testing.assert_close(model.class_embed.bias, torch.full((NUM_LABELS,), 0.01).logit())
    assert not model.bbox_embed.layers[-1].weight.any()
    for layer in model.model.decoder.layers:
        assert layer.cross_attn.sampling_offsets.bias.abs().max() == 4 and not layer.cross_attn.value_proj.bias.any()


def test_rf_detr_with_other_classes_keeps_all_but_the_classifiers(tmp_path):
    model = build_rf_detr()
    model.save_pretrained(tmp_path)
    loaded, info = CroprRfDetrForObjectDetection.from_pretrained(
        tmp_path, num_labels=7, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert all("class_embed" in entry[0] for entry in info["mismatched_keys"]) and not info["missing_keys"]
    torch.testing.assert_close(loaded.class_embed.bias, torch.full((7,), 0.01).logit())
    assert train_routers(loaded).config.num_labels == 7


def test_rf_detr_with_weights_that_have_no_place_is_refused(tmp_path):
    model = build_rf_detr()
    model.save_pretrained(tmp_path)
    unpruned = copy.deepcopy(model.config)
    unpruned.backbone_config.token_reducer = unpruned.backbone_config.pruning_rate = None
    CroprRfDetrForObjectDetection.from_pretrained(tmp_path, config=unpruned)
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["backbone_config"]["query_bias"] = False
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"no place for, such as .*q_proj\.bias"):
        CroprRfDetrForObjectDetection.from_pretrained(tmp_path)


def test_rf_detr_with_damaged_weights_is_refused(tmp_path):
    build_rf_detr().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"are damaged or truncated"):
        CroprRfDetrForObjectDetection.from_pretrained(tmp_path)


def test_rf_detr_with_weights_of_other_shapes_is_refused(tmp_path):
    build_rf_detr().save_pretrained(tmp_path)
    message = r"class_embed.bias of the shape .*, the configuration says \(7,\); .*`ignore_mismatched_sizes=True`"
    with pytest.raises(ValueError, match=message):
        CroprRfDetrForObjectDetection.from_pretrained(tmp_path, num_labels=7)


@pytest.mark.parametrize("part", ["pixel_values", "class_embed", "bbox_embed.layers.0"])
@torch.no_grad()
def test_what_rf_detr_computes_that_is_not_a_number_is_an_error_and_not_no_objects(part):
    model, images = build_rf_detr(), IMAGES.clone()
    if part == "pixel_values":
        images[:] = torch.nan
    else:
        model.get_submodule(part).weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"not a number.* in its weights or in `pixel"):
        model(images)
    model.train()(images)


def test_rf_detr_evaluates_with_one_group():
    model = build_rf_detr()
    with torch.no_grad():
        outputs = model(pixel_values=IMAGES, labels=boxes()["labels"])
    config = copy.deepcopy(model.config)
    config.group_detr, config.auxiliary_loss = 1, False
    final = LwDetrForObjectDetectionLoss(
        outputs.logits,
        boxes()["labels"],
        "cpu",
        outputs.pred_boxes,
        config,
        enc_outputs_class=outputs.enc_outputs_class,
        enc_outputs_coord=outputs.enc_outputs_coord_logits,
    )[1]
    assert model.config.group_detr == 3
    for name in ("loss_ce", "loss_bbox", "loss_giou"):
        assert_close_relative(outputs.loss_dict[name], final[name])


def test_rf_detr_post_processing_is_stock():
    processor = DeformableDetrImageProcessor()
    with torch.no_grad():
        outputs = build_rf_detr()(pixel_values=IMAGES)
    sizes = [(100, 200), (50, 60)]
    results = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes, top_k=10)
    assert [result["boxes"].shape for result in results] == [(10, 4)] * 2
    assert all(result["labels"].max() < NUM_LABELS for result in results)


def test_rf_detr_gives_the_backbone_its_classes_and_has_a_default():
    model = build_rf_detr(num_labels=2)
    assert model.config.backbone_config.num_labels == backbone_of(model).config.num_labels == NUM_LABELS
    backbone = CroprRfDetrConfig().backbone_config
    assert backbone.out_features == ["stage3", "stage6", "stage9", "stage12"]
    assert backbone.kept_patches()[-3] == 1024 - 10 * 64 - 1


@pytest.mark.parametrize("arguments", [{}, {"use_reentrant": True}, {"use_reentrant": False}])
def test_rf_detr_has_the_same_gradients_with_activation_checkpointing(arguments):
    model = build_rf_detr()
    train_routers(model)
    gradients = []
    for _ in range(2):
        training_loss(model, boxes()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        model.zero_grad()
        enable_activation_checkpointing(model, **arguments)
    for first, second in zip(*gradients):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_rf_detr_serves_the_auto_classes_and_the_pipeline(tmp_path):
    build_rf_detr().save_pretrained(tmp_path)
    DeformableDetrImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is CroprRfDetrModel
    assert type(AutoModelForObjectDetection.from_pretrained(tmp_path)) is CroprRfDetrForObjectDetection
    detect = pipeline("object-detection", model=str(tmp_path))
    found = detect(Image.new("RGB", (120, 80)), threshold=0.0)
    assert found and {"score", "label", "box"} == found[0].keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_labels": torch.tensor([99])}, r"classes between 99 and 99; they must be in \[0, 4\]"),
        ({"class_labels": torch.tensor([-1])}, r"classes between -1 and -1"),
        ({"class_labels": torch.tensor([0.0])}, r"torch.float32 of the shape \(1,\)"),
        ({"class_labels": [0]}, r"`class_labels` in `labels\[1\]` is a list; give a tensor"),
        ({"boxes": torch.full((2, 4), 0.5)}, r"`boxes` of the shape \(2, 4\)"),
        ({"boxes": torch.full((1, 4), 20.0)}, r"Divide pixels by width and height"),
        ({"boxes": torch.full((1, 4), torch.nan)}, r"`boxes` between nan"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_rf_detr_refuses_labels_that_are_none(change, message, training):
    model = build_rf_detr().train(training)
    label = {"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
    with pytest.raises(ValueError, match=message):
        model(IMAGES[:2], labels=[label, {**label, **change}])


def test_rf_detr_refuses_lists_of_another_length_and_images_that_are_none():
    model = build_rf_detr()
    label = {"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
    for labels in ([label], [], label, torch.zeros(2)):
        with pytest.raises(ValueError, match="it must be a list of 2 dictionaries, one per image"):
            model(IMAGES[:2], labels=labels)
    wrong = {"is a NoneType": None, "is a ndarray": IMAGES.numpy(), "it must be .batch": IMAGES[0]}
    for message, images in wrong.items():
        with pytest.raises(ValueError, match=message):
            model(images)


def test_rf_detr_takes_classes_of_any_whole_type_and_of_no_object():
    model = build_rf_detr().train()
    label = {"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
    nothing = {"class_labels": torch.zeros(0), "boxes": torch.zeros(0, 4)}
    losses = []
    for whole in (torch.int64, torch.int32, torch.uint8):
        torch.manual_seed(0)
        labels = [{**label, "class_labels": label["class_labels"].to(whole)}, nothing]
        losses.append(model(IMAGES[:2], labels=labels).loss.item())
    assert losses[0] == losses[1] == losses[2]


def test_rf_detr_refuses_other_backbones_and_small_images():
    with pytest.raises(ValueError, match="`backbone_config` is a ViTConfig; give a `CroprViTConfig`"):
        CroprRfDetrConfig(backbone_config=ViTConfig(**TINY_VIT))
    model = build_rf_detr(pruning_rate=1)
    with pytest.raises(ValueError, match="`num_queries` is 10, but the image has only 3 x 3 patches"):
        model(pixel_values=IMAGES[..., :24, :24])


# The documentation

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "backbone.md"
TINY_VIT = {"hidden_size": 32, "num_hidden_layers": 12, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.mark.full
def test_the_code_of_the_documentation_runs(tmp_path, monkeypatch):
    torch.manual_seed(0)
    ViTModel(ViTConfig(**TINY_VIT)).save_pretrained(tmp_path / "vit")
    monkeypatch.chdir(tmp_path)
    code = DOCUMENT.read_text(encoding="utf-8").replace("google/vit-base-patch16-224-in21k", str(tmp_path / "vit"))
    labels = torch.zeros(2, 224, 224, dtype=torch.long)
    names = {
        "pixel_values": make_images(2, 224, 224),
        "objects": copy.deepcopy(OBJECTS),
        "label_maps": labels,
        "masks": [torch.ones(2, 224, 224), torch.ones(1, 224, 224)],
        "classes": [image["class_labels"] for image in OBJECTS],
        "depth": torch.rand(2, 224, 224),
        "image_labels": F.pad(PRESENCE, (0, 15)),
    }
    blocks = re.findall(r"```python\n(.*?)```", code, flags=re.DOTALL)
    assert len(blocks) >= 8
    for block in blocks:
        exec(block, names)
    assert isinstance(names["backbone"], CroprViTBackbone) and isinstance(names["backbone"].cropr_vit, CroprViTModel)
