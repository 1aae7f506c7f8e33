"""Folders for transformers.js: a model in a browser, or in Node, on WebAssembly or WebGPU."""

import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData

from ..configuration_cropr_vit import CroprViTConfig
from ..files import write_file, write_json
from ..folders import staged
from ..tasks import RF_DETR, TASKS, Task
from .export import check_difference, export_model, input_size, onnx_runner


# For transformers.js, which does not know our types of models, they are those that take and return the same.
TYPES = {
    TASKS["encoder"].model_class: ("vit", "ViTModel"),
    TASKS["image_classification"].model_class: ("vit", "ViTForImageClassification"),
    TASKS["semantic_segmentation"].model_class: ("segformer", "SegformerForSemanticSegmentation"),
    RF_DETR.model_class: ("rf_detr", "RFDetrForObjectDetection"),
}
# Files by the name of their `dtype` there
FILES = {"fp32": "model.onnx", "fp16": "model_fp16.onnx", "q8": "model_quantized.onnx"}
INT8_TOLERANCE = 0.2
