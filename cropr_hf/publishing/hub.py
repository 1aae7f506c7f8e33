"""Folders for the Hub that also work without this package."""

import inspect
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

from .. import methods
from ..configuration_cropr_vit import CroprViTConfig
from ..files import write_file
from ..image_processing_cropr_vit import CroprViTImageProcessor
from ..modeling_cropr_vit import CroprViTPreTrainedModel
from ..tasks import TASKS
from ..token_reduction import find_token_reducer


ROOT = Path(__file__).parents[1]  # of the code that travels
METHODS = "reducers.py"  # names the files of methods, a line each
METHOD_PREFIX = "reducer_"
# Patterns of what belongs to a model in a folder besides what `save_pretrained` writes
BESIDE_A_MODEL = (IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, "*_results.json", f"{METHOD_PREFIX}*.py")


def _place(code: type) -> str:
    return f"{code.__module__.rpartition('.')[2]}.{code.__name__}"


AUTO_MAP = {
    "AutoConfig": _place(CroprViTConfig),
    **{task.auto_class: _place(task.model_class) for task in TASKS.values()},
}
IMAGE_PROCESSOR_MAP = {"AutoImageProcessor": _place(CroprViTImageProcessor)}


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
    if image_processor is not None and not hasattr(image_processor, "save_pretrained"):
        raise ValueError(f"`image_processor` is a {type(image_processor).__name__}; give one of Transformers.")
    method = find_token_reducer(model.config) if with_code else None
    if method is not None and not method.__module__.startswith(ROOT.name + "."):
        raise ValueError(
            f"The token reducer {method.name!r} is not part of the code that is saved; publish by `save_pretrained`, "
            "and name in the model card the package that registers it."
        )

    def write(folder: str) -> None:
        if image_processor is not None:
            own_processor = isinstance(image_processor, CroprViTImageProcessor) and with_code
            with _auto_map(image_processor, IMAGE_PROCESSOR_MAP if own_processor else None):
                image_processor.save_pretrained(folder)
        if with_code:
            for file in _code_files():
                shutil.copyfile(file, os.path.join(folder, file.name))
        if method is not None and method.__module__.startswith(methods.__name__ + "."):
            _add_method(method, Path(folder))

    # Without a model beside them, they were saved there for this one.
    is_replaced = os.path.exists(os.path.join(save_directory, CONFIG_NAME))
    stale = [*BESIDE_A_MODEL, *(file.name for file in _code_files())] if is_replaced else []
    # The segmentation pipeline looks for this entry first, and would take a semantic model otherwise.
    is_instance_model = isinstance(model, TASKS["instance_segmentation"].model_class)
    segmenter = TASKS["instance_segmentation" if is_instance_model else "semantic_segmentation"].auto_class
    auto_map = {**AUTO_MAP, "AutoModelForImageSegmentation": AUTO_MAP[segmenter]}
    with _auto_map(model.config, auto_map if with_code else None):
        model.save_pretrained(save_directory, beside=write, replaced=stale, **kwargs)


def _code_files() -> list[Path]:
    """The files of code that every model needs."""
    modules = {entry.split(".")[0] for entry in (*AUTO_MAP.values(), *IMAGE_PROCESSOR_MAP.values())}
    files = {str(ROOT / f"{module}.py") for module in modules}
    return sorted(Path(file) for file in files.union(*(get_relative_import_files(file) for file in files)))


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
