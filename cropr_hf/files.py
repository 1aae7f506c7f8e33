"""Files that are written whole or not at all, and names of sources that give no path away."""

import os
from pathlib import Path


def check_file(path: str | os.PathLike) -> Path:
    """The absolute path of a file to write; raises `ValueError` if it cannot be, before the work is done."""
    target = Path(path).absolute()
    if not target.parent.is_dir():
        raise ValueError(f"{path} is to be written, but there is no folder {Path(path).parent}; make it first.")
    if target.exists() and not target.is_file():
        raise ValueError(f"{path} is to be written, but is not a file; give another name.")
    if not os.access(target.parent, os.W_OK):
        raise ValueError(f"{path} is to be written, but the folder {target.parent} is read-only; choose another.")
    return target


def write_file(path: str | os.PathLike, text: str) -> None:
    """Never leaves half a file behind. A link is replaced, and what it leads to stays as it is."""
    path = Path(path)
    temporary = path.with_name(f"_{path.name}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def source_name(name: str | os.PathLike) -> str:
    """A Hub id as it is, and of a local folder its name only: where it lies is nobody's business."""
    path = str(name)
    is_local = os.path.exists(path) or path.startswith((".", "~")) or os.path.isabs(path)
    return Path(path).name if is_local else path
