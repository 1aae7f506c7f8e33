"""Model repositories of NVIDIA's Triton Inference Server: a folder with a configuration and an ONNX file."""

import json
import os
from pathlib import Path
from typing import Any

from transformers.utils import IMAGE_PROCESSOR_NAME

from ..folders import staged
from ..modeling_cropr_vit import CroprViTForImageClassification
from .export import export_model


CONFIG, LABELS, VERSION, MODEL = "config.pbtxt", "labels.txt", "1", "model.onnx"
STALE = (LABELS, IMAGE_PROCESSOR_NAME, f"{VERSION}/{MODEL}.data")  # of an older model, if this one has none
DRAFTS = ".export_"


def export_for_triton(
    model: Any,
    repository: str | os.PathLike,
    name: str,
    max_batch_size: int = 8,
    image_size: int | tuple[int, int] | None = None,
    image_processor: Any = None,
    tolerance: float | None = None,
) -> float:
    """Writes a stripped model into a model repository, for Triton's ONNX Runtime backend.

    The folder `name` gets `config.pbtxt` with names, types and shapes of inputs and outputs, which are those of
    `export_model`; `1/model.onnx`; of a classifier `labels.txt`, so that Triton's classification extension names the
    classes; and the image processor, which clients need. All of it appears at once when the file has passed its check,
    and until then an older model stays. Requests that wait while the server computes are its next batch.

    Args:
        model: of a class in `cropr_hf.tasks`, without auxiliary heads.
        repository: a folder that is there.
        name: of the model in the repository.
        max_batch_size: images that the server puts into a batch at most.
        image_size, tolerance: see `export_model`.
        image_processor: of Transformers.

    Returns:
        The difference between file and model, as `export_model` does.

    Raises:
        `ValueError`: a name that is not one of a folder, a repository that is not there, a batch size below 1, a
            folder of that name that holds something else, or other versions of the model; and as `export_model`.
        `ImportError`, `RuntimeError`: as `export_model`.
    """
    if Path(name).name != name or name in ("", ".."):
        raise ValueError(f"The name is {name!r}; give that of one folder, such as 'digits'.")
    if max_batch_size < 1:
        raise ValueError(f"`max_batch_size` is {max_batch_size}; give 1 or more.")
    folder = Path(repository, name)
    _check_folder(folder)
    # Triton ignores folders in that of a model whose names are not numbers.
    with staged(folder, CONFIG, STALE, DRAFTS) as draft:
        file = Path(draft, VERSION, MODEL)
        file.parent.mkdir()
        difference = export_model(model, file, image_size, tolerance=tolerance)
        labels = _labels(model)
        Path(draft, CONFIG).write_text(_config(file, name, max_batch_size, bool(labels)), encoding="utf-8")
        if labels:
            Path(draft, LABELS).write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
        if image_processor is not None:
            image_processor.save_pretrained(draft)
    return difference


def _check_folder(folder: Path) -> None:
    if not folder.parent.is_dir():
        raise ValueError(f"{folder} is to be written, but there is no folder {folder.parent}; make it first.")
    if not folder.exists():
        return
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    if CONFIG not in present and any(not name.startswith(DRAFTS) for name in present):
        raise ValueError(f"{folder} is there, but is not a model for Triton; give another name.")
    version = max((int(name) for name in present if name.isdigit()), default=1)
    if version > int(VERSION):
        raise ValueError(
            f"{folder} has a version {version} of the model, which Triton would serve instead of {VERSION}; give "
            "another name."
        )


def _labels(model: Any) -> list[str]:
    """Of a classifier the names of its classes, each in one line."""
    if not isinstance(model, CroprViTForImageClassification):
        return []
    config: Any = model.config
    return [" ".join(str(config.id2label[index]).split()) for index in range(config.num_labels)]


def _config(file: Path, name: str, max_batch_size: int, has_labels: bool) -> str:
    """A `ModelConfig` of Triton, as protobuf text."""
    from onnxruntime import InferenceSession

    session = InferenceSession(file, providers=["CPUExecutionProvider"])

    def tensor(described: Any, label_filename: str | None = None) -> str:
        dims = ", ".join(str(length) for length in described.shape[1:])  # the batch is not among them
        lines = [f"name: {json.dumps(described.name)}", "data_type: TYPE_FP32", f"dims: [ {dims} ]"]
        lines += [] if label_filename is None else [f'label_filename: "{label_filename}"']
        return "\n".join(["  {", *(f"    {line}" for line in lines), "  }"])

    inputs = [tensor(described) for described in session.get_inputs()]
    outputs = [tensor(described, LABELS if has_labels else None) for described in session.get_outputs()]
    return "\n".join(
        [
            f"name: {json.dumps(name, ensure_ascii=False)}",
            'backend: "onnxruntime"',
            f"max_batch_size: {max_batch_size}",
            "input [",
            ",\n".join(inputs),
            "]",
            "output [",
            ",\n".join(outputs),
            "]",
            "dynamic_batching { }\n",
        ]
    )
