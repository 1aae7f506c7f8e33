"""The common tests of Transformers for every class, at several points of the configuration space."""

import contextlib
import functools
import tempfile
import unittest
from unittest import mock

import pytest
import torch
from torch import nn
from transformers.models.auto import modeling_auto
from transformers_tests.test_backbone_common import BackboneTesterMixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin, floats_tensor

from cropr_hf import (
    CroprViTBackbone,
    CroprViTConfig,
    CroprViTForImageClassification,
    CroprViTForInstanceSegmentation,
    CroprViTForObjectDetection,
    CroprViTForSemanticSegmentation,
    CroprViTModel,
)
from cropr_hf.modeling_cropr_vit import CroprViTPreTrainedModel


pytestmark = pytest.mark.common

# The suite looks a class up by its name to know which labels it takes.
modeling_auto.MODEL_MAPPING_NAMES["cropr_vit"] = "CroprViTModel"
modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES["cropr_vit"] = "CroprViTForImageClassification"
modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES["cropr_vit"] = "CroprViTBackbone"

# The suite allows 2 blocks, and fusion needs a third.
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "image_size": 16,
    "patch_size": 4,
    "pruning_rate": 4,
    "last_layer_fusion": False,
}
HEADS = {**SMALL, "use_auxiliary_heads": True}
ROTARY = {
    **HEADS,
    "use_absolute_position_embeddings": False,
    "rope_theta": 100.0,
    "rope_coordinates": "centered",
    "num_register_tokens": 2,
    "layerscale_value": 0.1,
    "key_bias": False,
    "use_gated_mlp": True,
    "use_mlp_norm": True,
    "hidden_act": "silu",
    "pooling": "cls_patch_mean",
    "norm_before_pooling": True,
    "num_queries": 3,
    "scorer_num_heads": 2,
    "scorer_query_projection": True,
    "scorer_key_projection": True,
    "scorer_pre_norm": True,
    "aggregator_value_projection": True,
}
DETECTOR = {
    "pyramid_channels": 8,
    "anchor_sizes": [2, 4, 6, 8, 12],
    "box_head_size": 16,
    "num_proposals": 30,
    "rois_per_image": 16,
    "detections_per_image": 5,
}
VARIANTS = {
    "stripped": SMALL,
    "heads": HEADS,
    "fusion": {**HEADS, "num_hidden_layers": 3, "last_layer_fusion": True},
    "rotary": ROTARY,
    "windows": {
        **HEADS,
        "use_cls_token": False,
        "pooling": "patch_mean",
        "rope_theta": 100.0,
        "window_size": 2,
        "window_block_indices": [1],  # the suite looks at the attention of the first block
    },
    "unpruned": {**SMALL, "token_reducer": None, "pruning_rate": None},
}


class ModelTester:
    batch_size = 3
    is_training = True

    def __init__(self, settings):
        self.settings = settings
        config = self.get_config()
        self.hidden_size = config.hidden_size
        self.num_hidden_layers = config.num_hidden_layers
        self.num_attention_heads = config.num_attention_heads
        self.num_channels = config.num_channels
        self.image_size = config.image_size
        self.patch_size = config.patch_size
        self.seq_length = config.num_prefix_tokens + config.num_patches

    def get_config(self):
        return CroprViTConfig(**self.settings)

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.num_channels, self.image_size, self.image_size]
        return self.get_config(), {"pixel_values": floats_tensor(shape)}


class CommonTests(ModelTesterMixin):
    test_resize_embeddings = False
    settings = {}

    @property
    def has_heads(self):
        return self.settings.get("use_auxiliary_heads", False)

    def setUp(self):
        self.model_tester = ModelTester(self.settings)
        self.config_class = CroprViTConfig

    def save_everything(self):
        """The suite compares every parameter after saving; `test_save_load_stripped` looks at the default."""
        save_pretrained = functools.partialmethod(CroprViTPreTrainedModel.save_pretrained, strip_auxiliary_heads=False)
        return mock.patch.object(CroprViTPreTrainedModel, "save_pretrained", save_pretrained)

    def run(self, result=None):
        with self.save_everything() if self.has_heads else contextlib.nullcontext():
            return super().run(result)

    def test_save_load_stripped(self):
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config()).eval()
            _, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                model.save_pretrained(folder, strip_auxiliary_heads=True)
                loaded = model_class.from_pretrained(folder)
                torch.testing.assert_close(model(**inputs)[0], loaded(**inputs)[0])
            self.assertFalse(loaded.config.use_auxiliary_heads)

    def check_retained(self, model_class, inputs):
        """As in `test_retain_grad_hidden_states_attentions` of the suite, for a first output of any form."""
        model = model_class._from_config(self.model_tester.get_config(), attn_implementation="eager")
        outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
        for tensor in (outputs.hidden_states[0], outputs.attentions[0]):
            tensor.retain_grad()
        first = outputs[0] if isinstance(outputs[0], torch.Tensor) else outputs[0][0]
        first.flatten()[0].backward()
        self.assertIsNotNone(outputs.hidden_states[0].grad)
        self.assertIsNotNone(outputs.attentions[0].grad)

    def test_num_layers_is_small(self):
        if self.settings["num_hidden_layers"] == 3:
            self.skipTest("last layer fusion after pruning needs 3 blocks")
        super().test_num_layers_is_small()

    def test_model_get_set_embeddings(self):
        """As in every vision model of the library: pixels have no `nn.Embedding`, which the suite asks for."""
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            self.assertIsInstance(model.get_input_embeddings(), nn.Conv2d)
            replacement = nn.Conv2d(3, 32, kernel_size=4, stride=4)
            model.set_input_embeddings(replacement)
            self.assertIs(model.get_input_embeddings(), replacement)
            self.assertIsNone(model.get_output_embeddings())

    def test_model_weights_reload_no_missing_tied_weights(self):
        """The suite loads a checkpoint without any weight, which is an error here; without this check it passes."""
        with mock.patch.object(CroprViTPreTrainedModel, "_check_loaded"):
            super().test_model_weights_reload_no_missing_tied_weights()


class ModelTests(CommonTests):
    all_model_classes = (CroprViTModel,)

    def test_config(self):
        tester = ConfigTester(self, config_class=CroprViTConfig, has_text_modality=False, **self.settings)
        tester.run_common_tests()


class ImageClassificationTests(CommonTests):
    all_model_classes = (CroprViTForImageClassification,)

    def test_problem_types(self):
        """Passes for the first two types of the suite; the third, regression, is refused."""
        with (
            mock.patch.object(self, "subTest", lambda **_: contextlib.nullcontext()),
            self.assertRaisesRegex(ValueError, "The loss over 1 class"),
        ):
            super().test_problem_types()

    def test_can_load_ignoring_mismatched_shapes(self):
        """The suite knows one layer whose size depends on the labels; auxiliary heads have it as well."""
        if not self.has_heads:
            return super().test_can_load_ignoring_mismatched_shapes()
        model = CroprViTForImageClassification(self.model_tester.get_config())
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            with self.assertRaises(RuntimeError):
                CroprViTForImageClassification.from_pretrained(folder, num_labels=42)
            loaded = CroprViTForImageClassification.from_pretrained(
                folder, num_labels=42, ignore_mismatched_sizes=True
            )
        old, new = model.state_dict(), loaded.state_dict()
        self.assertEqual(old.keys(), new.keys())
        for name in old:
            if "classifier." in name:
                self.assertEqual(len(new[name]), 42)
            else:
                torch.testing.assert_close(old[name], new[name])


class SemanticSegmentationTests(CommonTests):
    all_model_classes = (CroprViTForSemanticSegmentation,)


class DetectionTests(CommonTests):
    all_model_classes = (CroprViTForObjectDetection, CroprViTForInstanceSegmentation)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class)
        if return_labels:
            label = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.6, 0.4]])}
            label["masks"] = torch.ones(1, *inputs["pixel_values"].shape[-2:])
            inputs["labels"] = [label] * len(inputs["pixel_values"])
        return inputs

    def test_model_outputs_equivalence(self):
        """The losses draw samples: here always the same."""
        with mock.patch("torch.randperm", lambda count, device=None: torch.arange(count, device=device)):
            super().test_model_outputs_equivalence()

    def test_retain_grad_hidden_states_attentions(self):
        """The suite expects a tensor as the first output, but in training without labels there is none."""
        _, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            self.check_retained(model_class, self._prepare_for_class(inputs, model_class, return_labels=True))


class BackboneTests(CommonTests, BackboneTesterMixin):
    all_model_classes = (CroprViTBackbone,)

    def test_retain_grad_hidden_states_attentions(self):
        """The suite expects a tensor as the first output; here it is a tuple of feature maps."""
        _, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        self.check_retained(CroprViTBackbone, inputs)


DENSE = (SemanticSegmentationTests, DetectionTests)

for case in (ModelTests, ImageClassificationTests, SemanticSegmentationTests, DetectionTests, BackboneTests):
    for variant, settings in VARIANTS.items():
        if case in DENSE and variant == "fusion":
            continue  # every variant that prunes
        if case in DENSE and variant != "unpruned":
            settings = {**settings, "num_hidden_layers": 3, "last_layer_fusion": True}
        if case is SemanticSegmentationTests and variant != "unpruned":
            settings = {**settings, "num_queries": None}
        if case is DetectionTests:
            settings = {**settings, **DETECTOR}
        name = f"{case.__name__}_{variant}"
        globals()[name] = type(name, (case, unittest.TestCase), {"settings": settings, "__module__": __name__})
