"""Folders for the Hub that also work without this package."""

import os
import shutil
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from . import modeling_cropr_vit
from .modeling_cropr_vit import CroprViTPreTrainedModel


AUTO_MAP = {
    "AutoConfig": "configuration_cropr_vit.CroprViTConfig",
    "AutoModel": "modeling_cropr_vit.CroprViTModel",
    "AutoBackbone": "modeling_cropr_vit.CroprViTBackbone",
    "AutoModelForImageClassification": "modeling_cropr_vit.CroprViTForImageClassification",
    "AutoModelForSemanticSegmentation": "modeling_cropr_vit.CroprViTForSemanticSegmentation",
}


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
        `ValueError`: when the reducer is not one of this package, so that the code would not contain it.
    """
    if model.config.token_reducer not in (None, "cropr", "random"):
        raise ValueError(
            f"The token reducer {model.config.token_reducer!r} is not part of the code that is saved; publish with "
            "`save_pretrained`, and name the package that registers it in the model card."
        )
    os.makedirs(save_directory, exist_ok=True)
    model_file = modeling_cropr_vit.__file__
    for file in (model_file, *get_relative_import_files(model_file)):
        shutil.copyfile(file, os.path.join(save_directory, Path(file).name))
    if image_processor is not None:
        image_processor.save_pretrained(save_directory)
    own_map = vars(model.config).get("auto_map")
    model.config.auto_map = AUTO_MAP
    try:
        model.save_pretrained(save_directory, **kwargs)
    finally:
        if own_map is None:
            del model.config.auto_map  # a stored null would not load
        else:
            model.config.auto_map = own_map
