"""Folders for the Hub that also work without this package."""

import inspect
import os
import re
import shutil
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, logging

from .. import methods
from ..configuration_cropr_vit import CroprViTConfig
from ..files import write_file
from ..image_processing_cropr_vit import CroprViTImageProcessor
from ..modeling_cropr_vit import CroprViTPreTrainedModel
from ..tasks import TASKS
from ..token_reduction import find_token_reducer


logger = logging.get_logger(__name__)

ROOT = Path(__file__).parents[1]  # of the code that travels
METHODS = "reducers.py"  # names the files of methods, a line each
METHOD_PREFIX = "reducer_"
# Patterns of what belongs to a model in a folder besides what `save_pretrained` writes
IMAGE_PROCESSOR_CODE = Path(inspect.getfile(CroprViTImageProcessor)).name
BESIDE_A_MODEL = (IMAGE_PROCESSOR_NAME, IMAGE_PROCESSOR_CODE, PROCESSOR_NAME, "*_results.json")


def _place(code: type) -> str:
    return f"{code.__module__.rpartition('.')[2]}.{code.__name__}"


AUTO_MAP = {
    "AutoConfig": _place(CroprViTConfig),
    **{task.auto_class: _place(task.model_class) for task in TASKS.values()},
}


def save_for_hub(
    model: CroprViTPreTrainedModel,
    save_directory: str | os.PathLike,
    image_processor: Any = None,
    with_code: bool = True,
    **kwargs: Any,
) -> None:
    """Saves a stripped model together with its image processor and the code that runs it.

    The folder loads through the Auto classes with `trust_remote_code=True` where `cropr_hf` is not installed, and
    without the flag where it is. Upload it with `huggingface_hub.upload_folder` or `hf upload`.

    A folder that holds another model holds all of that one or all of this one at any moment, whatever interrupts the
    save: its image processor, code, results and picture go with it. A card that somebody wrote or changed by hand
    stays, with the picture that it shows.

    Args:
        model: any `CroprViT*` model.
        save_directory: the folder, made if necessary.
        image_processor: saved beside the model; pipelines need one.
        with_code: whether the code is saved as well.
        kwargs: of `CroprViTPreTrainedModel.save_pretrained`, which leaves out what is given here.

    Raises:
        `ValueError`: for a model of another kind, or a reducer that is not one of this package, so that the code would
            not contain it.
    """
    check_travels(model, with_code)
    if image_processor is not None and not hasattr(image_processor, "save_pretrained"):
        raise ValueError(f"`image_processor` is a {type(image_processor).__name__}; give one of Transformers.")

    def write(folder: str) -> None:
        if image_processor is not None:
            without = nullcontext() if with_code else patch.object(CroprViTImageProcessor, "_auto_class", None)
            with without:
                image_processor.save_pretrained(folder)

    model.save_pretrained(save_directory, with_code=with_code, beside=write, replaced=BESIDE_A_MODEL, **kwargs)


def check_travels(model: Any, with_code: bool = True) -> None:
    """Raises `ValueError` for a model whose code, or whose method if it is to go along, is not of this package."""
    if not isinstance(model, CroprViTPreTrainedModel):
        raise ValueError(
            f"The model is a {type(model).__name__}; the code that is saved is that of `CroprViT*` models. Publish "
            "others with `save_pretrained`."
        )
    method = find_token_reducer(model.config) if with_code else None
    if method is not None and not method.__module__.startswith(ROOT.name + "."):
        raise ValueError(
            f"The token reducer {method.name!r} is not part of the code that is saved; publish without it by "
            "`with_code=False`, and name in the model card the package that registers it."
        )


def write_code(model: Any, folder: str | os.PathLike, required: bool | None = None) -> dict[str, str]:
    """Writes the code that runs a model, and its method, into a folder.

    Args:
        model: any `CroprViT*` model.
        folder: where the files go, beside `config.json`.
        required: whether it is an error if the code would not contain what the model is made of; otherwise a warning
            says so, and nothing is written.

    Returns:
        The `auto_map` of the configuration, by which the Auto classes find the code; empty without.

    Raises:
        `ValueError`: see `check_travels`.
    """
    try:
        check_travels(model)
    except ValueError as error:
        if required:
            raise
        logger.warning("%s", error)
        return {}
    for file in code_files():
        shutil.copyfile(file, os.path.join(folder, file.name))
    method = find_token_reducer(model.config)
    if method is not None and method.__module__.startswith(methods.__name__ + "."):
        _add_method(method, Path(folder))
    # The segmentation pipeline looks for this entry first, and would take a semantic model otherwise.
    is_instance_model = isinstance(model, TASKS["instance_segmentation"].model_class)
    segmenter = TASKS["instance_segmentation" if is_instance_model else "semantic_segmentation"].auto_class
    return {**AUTO_MAP, "AutoModelForImageSegmentation": AUTO_MAP[segmenter]}


@cache
def code_files() -> list[Path]:
    """The files of code that every model needs."""
    modules = {entry.split(".")[0] for entry in (*AUTO_MAP.values(), _place(CroprViTImageProcessor))}
    files = {str(ROOT / f"{module}.py") for module in modules}
    return sorted(Path(file) for file in files.union(*(get_relative_import_files(file) for file in files)))


def code_patterns() -> list[str]:
    """Patterns of all files of a model's code in a folder."""
    return [*(file.name for file in code_files() if file.name != IMAGE_PROCESSOR_CODE), f"{METHOD_PREFIX}*.py"]


def _flat_name(method: type) -> str:
    return f"{METHOD_PREFIX}{method.__module__.rpartition('.')[2]}"


def _add_method(method: type, folder: Path) -> None:
    """Adds the file of a method, and of those that it extends, to code that is flat, and its line to those of the
    methods that are there anyway.
    """
    for part in method.__mro__:
        if part.__module__.startswith(methods.__name__ + "."):
            code = Path(inspect.getfile(part)).read_text(encoding="utf-8")
            code = re.sub(r"\nfrom \.(?=\w)", f"\nfrom .{METHOD_PREFIX}", code)  # another method
            write_file(folder / f"{_flat_name(part)}.py", code.replace("\nfrom ..", "\nfrom ."))
    listed = (folder / METHODS).read_text(encoding="utf-8")
    line = f"from .{_flat_name(method)} import {method.__name__}  # noqa: F401\n"
    write_file(folder / METHODS, listed.replace("\n\n\n__all__", f"\n{line}\n\n__all__", 1))
