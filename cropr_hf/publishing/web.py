"""Folders for transformers.js: a model in a browser or in Node, on WebAssembly or WebGPU."""

import copy
import json
import math
import os
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME

from ..configuration_cropr_vit import CroprViTConfig
from ..files import write_file, write_json
from ..folders import staged
from ..modeling_cropr_vit import CroprViTPreTrainedModel
from ..saving import CARD_NAME
from ..tasks import RF_DETR, TASKS
from .export import EXPORTED, WITH_PRUNING_MAP, check_difference, export_model, input_size, onnx_runner, random_pixels


# The types of models that take and return the same as ours, which transformers.js does not know.
TYPES: dict[type, tuple[str, str]] = {
    TASKS["encoder"].model_class: ("vit", "ViTModel"),
    TASKS["image_classification"].model_class: ("vit", "ViTForImageClassification"),
    TASKS["semantic_segmentation"].model_class: ("segformer", "SegformerForSemanticSegmentation"),
    RF_DETR.model_class: ("rf_detr", "RFDetrForObjectDetection"),
}
FACTS = "cropr_hf"  # in the configuration: what pages want to know of a model
TEMPLATE = resources.files(__package__) / "templates" / "web_card.md"
FOLDER = "onnx"  # where transformers.js looks for files, each by the name of its `dtype`
FILES = {"fp32": "model.onnx", "fp16": "model_fp16.onnx", "q8": "model_quantized.onnx"}
INT8_TOLERANCE = 0.1


def export_for_web(
    model: Any,
    folder: str | os.PathLike,
    image_processor: Any,
    image_size: int | tuple[int, int] | None = None,
    tolerance: float | None = None,
    name: str | None = None,
) -> dict[str, float]:
    """Writes a folder that transformers.js loads by its pipelines and Auto classes, and checks its files.

    There are weights in float32, float16 and int8 (linear layers; each matrix with one scale per column, activations
    quantised as they come; the vectors that score tokens stay float32), for one image per call. Beside the outputs of
    the model there is its pruning map, `pruned_after_block`, where its class has one. The configuration names a type
    of model that transformers.js knows and that takes and returns the same, so Python does not load this folder:
    publish it beside that of the model, which its card links. All of it appears at once, when every file has passed
    its check.

    Args:
        model: an encoder, a classifier, a semantic segmenter or an RF-DETR, stripped, in float32.
        folder: made if necessary; of an older export there the files go.
        image_processor: of the model, with sizes for `image_size`.
        image_size: as in `export_model`.
        tolerance: largest difference of any file; by default `export_model`'s, and `INT8_TOLERANCE` of the int8 one.
        name: of the model on the Hub, which the card links.

    Returns:
        For each of `FILES` by its `dtype` there, how much it differs from the model (see `export_model`).

    Raises:
        `ValueError`: for a model of another class, or of another dtype, a folder with a model in it, and what
            `export_model` does not take.
        `ImportError`: when a library for ONNX is missing.
        `RuntimeError`: when a file does not compute what the model does.
    """
    task = next((task for task in EXPORTED if task.model_class in TYPES and isinstance(model, task.model_class)), None)
    if task is None:
        names = ", ".join(kind.__name__ for kind in TYPES)
        raise ValueError(f"transformers.js has no type that is like {type(model).__name__}; give one of {names}.")
    if (dtype := next(model.parameters()).dtype) != torch.float32:
        raise ValueError(f"The model is in {dtype}; load it in float32, from which the others are made.")
    if image_processor is None:
        raise ValueError("The model has no image processor, without which no picture fits it; save one beside it.")
    target = Path(folder)
    if (target / CONFIG_NAME).exists() and FACTS not in json.loads((target / CONFIG_NAME).read_text(encoding="utf-8")):
        raise ValueError(f"{folder} has the {CONFIG_NAME} of another model; choose another folder.")
    encoder: Any = next(part for part in model.modules() if isinstance(part, CroprViTPreTrainedModel)).base_model
    config: CroprViTConfig = encoder.config
    size = input_size(config, image_size)
    maps = isinstance(model, WITH_PRUNING_MAP)
    options: dict[str, Any] = {"image_size": size, "tolerance": tolerance, "for_web": True, "output_pruning": maps}
    with staged(target, CONFIG_NAME, stale=[f"{FOLDER}/*"]) as draft:
        files = {dtype: Path(draft, FOLDER, file) for dtype, file in FILES.items()}
        files["fp32"].parent.mkdir()
        differences = {
            "fp32": export_model(model, files["fp32"], **options),
            "fp16": export_model(copy.deepcopy(model).half(), files["fp16"], **options),
            "q8": _quantize(files["fp32"], files["q8"], random_pixels(1, config, size), tolerance),
        }
        model_type, architecture = TYPES[task.model_class]
        facts = {name: getattr(config, name) for name in ("token_reducer", "patch_size", "num_hidden_layers")}
        kept = config.kept_patches(math.prod(size) // config.patch_size**2, encoder.pruning)
        facts |= {"image_size": size, "patches_kept": kept, "differences": differences}
        labels = {"id2label": model.config.id2label} if "logits" in task.outputs else {}
        content = {"model_type": model_type, "architectures": [architecture], **labels, FACTS: facts}
        write_json(Path(draft, CONFIG_NAME), content)
        write_json(Path(draft, IMAGE_PROCESSOR_NAME), image_processor.to_dict())
        metadata = ModelCardData(library_name="transformers.js", pipeline_tag=task.pipeline, base_model=name)
        card = ModelCard.from_template(
            metadata, template_path=str(TEMPLATE), name=name, task=task, facts=facts, maps=maps
        )
        write_file(Path(draft, CARD_NAME), str(card))
    return differences


def _quantize(source: Path, target: Path, pixels: torch.Tensor, tolerance: float | None) -> float:
    """Writes a file with int8 weights, and compares it with the one that it is made of."""
    import onnx
    from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic

    prepared = target.with_name("prepared.onnx")
    quant_pre_process(source, prepared, skip_optimization=True, skip_symbolic_shape=True)
    graph = onnx.load(prepared, load_external_data=False).graph
    # Not the vectors that score tokens, nor the numbers of places, of which rounding would make others.
    matrices = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2 and min(tensor.dims) > 1}
    quantize_dynamic(
        prepared,
        target,
        nodes_to_quantize=[node.name for node in graph.node if len(node.input) > 1 and node.input[1] in matrices],
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        weight_type=QuantType.QUInt8,  # with which no processor saturates
    )
    prepared.unlink()
    expected = onnx_runner(source)(pixels)
    tolerance = INT8_TOLERANCE if tolerance is None else tolerance
    return check_difference(target.name, [onnx_runner(target)(pixels)], [expected], tolerance)
