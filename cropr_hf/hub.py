"""Folders for the Hub that also work without this package."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from .image_processing_cropr_vit import CroprViTImageProcessor
from .modeling_cropr_vit import CroprViTPreTrainedModel
from .modeling_cropr_vit_detection import CroprViTForInstanceSegmentation


AUTO_MAP = {
    "AutoConfig": "configuration_cropr_vit.CroprViTConfig",
    "AutoModel": "modeling_cropr_vit.CroprViTModel",
    "AutoBackbone": "modeling_cropr_vit.CroprViTBackbone",
    "AutoModelForImageClassification": "modeling_cropr_vit.CroprViTForImageClassification",
    "AutoModelForSemanticSegmentation": "modeling_cropr_vit.CroprViTForSemanticSegmentation",
    "AutoModelForObjectDetection": "modeling_cropr_vit_detection.CroprViTForObjectDetection",
    "AutoModelForInstanceSegmentation": "modeling_cropr_vit_detection.CroprViTForInstanceSegmentation",
}
IMAGE_PROCESSOR_MAP = {"AutoImageProcessor": "image_processing_cropr_vit.CroprViTImageProcessor"}


def save_for_hub(
    model: CroprViTPreTrainedModel, save_directory: str | os.PathLike, image_processor: Any = None, **kwargs: Any
) -> None:
    """Saves a stripped model together with the code that runs it.

    The folder loads through the Auto classes with `trust_remote_code=True` where `cropr_hf` is not installed, and
    without the flag where it is. Upload it with `huggingface_hub.upload_folder` or `hf upload`.

    Args:
        model: any `CroprViT*` model.
        save_directory: the folder, made if necessary.
        image_processor: saved beside the model; pipelines need one.
        kwargs: of `CroprViTPreTrainedModel.save_pretrained`.

    Raises:
        `ValueError`: for a model of another kind, or a reducer that is not one of this package, so that the code would
            not contain it.
    """
    if not isinstance(model, CroprViTPreTrainedModel):
        raise ValueError(
            f"The model is a {type(model).__name__}; the code that is saved is that of `CroprViT*` models. Publish "
            "others with `save_pretrained`."
        )
    if model.config.token_reducer not in (None, "cropr", "random"):
        raise ValueError(
            f"The token reducer {model.config.token_reducer!r} is not part of the code that is saved; publish with "
            "`save_pretrained`, and name the package that registers it in the model card."
        )
    os.makedirs(save_directory, exist_ok=True)
    modules = {entry.split(".")[0] for entry in (*AUTO_MAP.values(), *IMAGE_PROCESSOR_MAP.values())}
    files = {str(Path(__file__).with_name(f"{module}.py")) for module in modules}
    for file in files.union(*(get_relative_import_files(file) for file in files)):
        shutil.copyfile(file, os.path.join(save_directory, Path(file).name))
    if image_processor is not None:
        own_processor = isinstance(image_processor, CroprViTImageProcessor)
        with _auto_map(image_processor, IMAGE_PROCESSOR_MAP if own_processor else None):
            image_processor.save_pretrained(save_directory)
    # The segmentation pipeline looks for this entry first, and would take a semantic model otherwise.
    is_instance_model = isinstance(model, CroprViTForInstanceSegmentation)
    segmenter = "AutoModelForInstanceSegmentation" if is_instance_model else "AutoModelForSemanticSegmentation"
    with _auto_map(model.config, {**AUTO_MAP, "AutoModelForImageSegmentation": AUTO_MAP[segmenter]}):
        model.save_pretrained(save_directory, **kwargs)


@contextmanager
def _auto_map(holder: Any, auto_map: dict[str, str] | None) -> Iterator[None]:
    """Gives a configuration or image processor an `auto_map` for the time of saving; `None` leaves it alone."""
    own_map = vars(holder).get("auto_map")
    if auto_map is not None:
        holder.auto_map = auto_map
    try:
        yield
    finally:
        if own_map is not None:
            holder.auto_map = own_map
        elif auto_map is not None:
            del holder.auto_map  # a stored null would not load
