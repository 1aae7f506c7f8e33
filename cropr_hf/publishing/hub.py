"""Folders for the Hub that also work without this package."""

import inspect
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from .. import methods
from ..configuration_cropr_vit import CroprViTConfig
from ..files import write_file
from ..image_processing_cropr_vit import CroprViTImageProcessor
from ..modeling_cropr_vit import CroprViTPreTrainedModel
from ..tasks import TASKS
from ..token_reduction import find_token_reducer


ROOT = Path(__file__).parents[1]  # of the code that travels
METHODS = "reducers.py"  # names the files of methods, a line each


def _place(code: type) -> str:
    return f"{code.__module__.rpartition('.')[2]}.{code.__name__}"


AUTO_MAP = {
    "AutoConfig": _place(CroprViTConfig),
    **{task.auto_class: _place(task.model_class) for task in TASKS.values()},
}
IMAGE_PROCESSOR_MAP = {"AutoImageProcessor": _place(CroprViTImageProcessor)}


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
    method = find_token_reducer(model.config)
    if method is not None and not method.__module__.startswith(ROOT.name + "."):
        raise ValueError(
            f"The token reducer {method.name!r} is not part of the code that is saved; publish by `save_pretrained`, "
            "and name in the model card the package that registers it."
        )
    os.makedirs(save_directory, exist_ok=True)
    modules = {entry.split(".")[0] for entry in (*AUTO_MAP.values(), *IMAGE_PROCESSOR_MAP.values())}
    files = {str(ROOT / f"{module}.py") for module in modules}
    for file in files.union(*(get_relative_import_files(file) for file in files)):
        shutil.copyfile(file, os.path.join(save_directory, Path(file).name))
    if method is not None and method.__module__.startswith(methods.__name__ + "."):
        _add_method(method, Path(save_directory))
    if image_processor is not None:
        own_processor = isinstance(image_processor, CroprViTImageProcessor)
        with _auto_map(image_processor, IMAGE_PROCESSOR_MAP if own_processor else None):
            image_processor.save_pretrained(save_directory)
    # The segmentation pipeline looks for this entry first, and would take a semantic model otherwise.
    is_instance_model = isinstance(model, TASKS["instance_segmentation"].model_class)
    segmenter = TASKS["instance_segmentation" if is_instance_model else "semantic_segmentation"].auto_class
    with _auto_map(model.config, {**AUTO_MAP, "AutoModelForImageSegmentation": AUTO_MAP[segmenter]}):
        model.save_pretrained(save_directory, **kwargs)


def _add_method(method: type, folder: Path) -> None:
    """Adds the file of a method to code that is flat, and its line to those of the methods that are there anyway."""
    name = f"reducer_{method.__module__.rpartition('.')[2]}"
    code = Path(inspect.getfile(method)).read_text(encoding="utf-8")
    write_file(folder / f"{name}.py", code.replace("\nfrom ..", "\nfrom ."))
    listed = (folder / METHODS).read_text(encoding="utf-8")
    line = f"from .{name} import {method.__name__}  # noqa: F401\n"
    write_file(folder / METHODS, listed.replace("\n\n\n__all__", f"\n{line}\n\n__all__", 1))


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
