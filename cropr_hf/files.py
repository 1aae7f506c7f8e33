"""Files that are written whole or not at all, and names of sources that give no path away."""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


# What a folder with a model, an image processor or a card cannot do without.
MODEL_FILE = re.compile(r".*config\.json|record\.json|README\.md|.*\.(safetensors|bin|index\.json)", re.IGNORECASE)


def check_file(path: str | os.PathLike, inputs: Iterable[str | os.PathLike] = ()) -> Path:
    """The absolute path of a file to write; raises `ValueError` if it must not be, before the work is done.

    Neither one of the `inputs` nor a file of a model is written over, whatever the path to it.
    """
    target = Path(path).absolute()
    real = target.resolve()
    if real in (Path(source).resolve() for source in inputs):
        raise ValueError(f"{path} is to be written, but is an input as well; give another name.")
    if real.is_file() and MODEL_FILE.fullmatch(real.name):
        raise ValueError(f"{path} is to be written, but {real.name} is a file of a model; give another name.")
    if not target.parent.is_dir():
        raise ValueError(f"{path} is to be written, but there is no folder {Path(path).parent}; make it first.")
    if target.exists() and not target.is_file():
        raise ValueError(f"{path} is to be written, but is not a file; give another name.")
    if not os.access(target.parent, os.W_OK):
        raise ValueError(f"{path} is to be written, but the folder {target.parent} is read-only; choose another.")
    return target


def write_file(path: str | os.PathLike, text: str) -> None:
    """Never leaves half a file behind. A link is replaced, and what it leads to stays as it is."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A file to write, which takes the place of `path` at the end; if that is not reached, `path` stays as it is."""
    path = Path(path)
    draft = path.with_name(f"_{path.name}")
    try:
        yield draft
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike, record: Any) -> None:
    """Writes a record, whole or not at all; JSON has no word for what is not a finite number, which becomes null."""
    write_file(path, json.dumps(finite(record), indent=2, default=str, allow_nan=False) + "\n")


def finite(record: Any) -> Any:
    """A copy of a record in which `None` stands for NaN and infinity."""
    if isinstance(record, float):
        return record if math.isfinite(record) else None
    if isinstance(record, Mapping):
        return {name: finite(value) for name, value in record.items()}
    return [finite(value) for value in record] if isinstance(record, (list, tuple)) else record


def source_name(name: str | os.PathLike) -> str:
    """A Hub id as it is, and of a local folder its name only: where it lies is nobody's business."""
    path = str(name)
    is_local = os.path.exists(path) or path.startswith((".", "~")) or os.path.isabs(path)
    return Path(path).name if is_local else path
