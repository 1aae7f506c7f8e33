# Copyright 2026 The cropr_hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Folders whose files change from those of one model to those of another in one step."""

import fnmatch
import glob
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


STAGING_PREFIX = "_saving_"


@contextmanager
def staged(
    folder: str | os.PathLike, key: str, stale: Sequence[str] = (), prefix: str = STAGING_PREFIX
) -> Iterator[str]:
    """A folder to write files in, all of which take their place in `folder` at once when the context ends well.

    Whoever reads `folder` finds all of the old files or all of the new ones, also while they change, and after this
    process was killed at any moment: the old files become links through `now`, and `now` leads to them until it is
    made to lead to the new ones, which is one step. An error leaves the old files. What is left of a killed process
    goes when somebody writes there next. A link in `folder` is replaced, and what it leads to stays as it is.

    Where the system has no symbolic links (Windows, without a right to them) files move one by one, that named `key`
    first away and last back: a killed process leaves a folder that does not load, not a mixture, and whoever writes
    there next finds the old files restored.

    Args:
        folder: where the files go; made if it is not there, and removed again after an error.
        key: the file through which readers find the others. Without it among the new files nothing is stale.
        stale: patterns of files, relative to `folder`, that belong to the old ones and go if there are no new ones.
        prefix: of the names of what is there meanwhile.
    """
    folder = os.fspath(folder)
    is_new = not os.path.isdir(folder)
    os.makedirs(folder, exist_ok=True)
    for name in fnmatch.filter(os.listdir(folder), f"{glob.escape(prefix)}*"):
        _settle(folder, name)
    place = f"{prefix}{uuid.uuid4().hex[:8]}"
    new = os.path.join(folder, place, "new")
    os.makedirs(new)
    try:
        yield new
        names = _files_in(new)
        for pattern in stale if key in names else ():
            names |= {name for name in glob.glob(pattern, root_dir=folder) if not os.path.isdir(f"{folder}/{name}")}
        try:
            os.symlink("old", os.path.join(folder, place, "now"))
        except (OSError, NotImplementedError):
            _move_in_turn(folder, place, names, key)
        else:
            _link(folder, place, names)
            os.symlink("new", os.path.join(folder, place, "next"))
            os.replace(os.path.join(folder, place, "next"), os.path.join(folder, place, "now"))  # the step
    finally:
        _settle(folder, place)
        if is_new and not os.listdir(folder):
            os.rmdir(folder)


def _files_in(folder: str) -> set[str]:
    """Paths of all files below a folder, relative to it."""
    found = (os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return {os.path.relpath(path, folder) for path in found}


def _link(folder: str, place: str, names: set[str]) -> None:
    """Makes links through `now` of files, which lie in `old` from then on."""
    for name in sorted(names):
        path, kept = os.path.join(folder, name), os.path.join(folder, place, "old", name)
        parent = os.path.dirname(path)
        if os.path.islink(parent) and parent != folder:
            os.unlink(parent)
        os.makedirs(parent, exist_ok=True)
        os.makedirs(os.path.dirname(kept), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.path.realpath(path), kept)
        elif os.path.exists(path):
            try:
                os.link(path, kept)
            except OSError:  # a file system without hard links
                shutil.copy2(path, kept)
        link = os.path.join(folder, place, "link")
        os.symlink(os.path.relpath(os.path.join(folder, place, "now", name), parent), link)
        os.replace(link, path)


def _move_in_turn(folder: str, place: str, names: set[str], key: str) -> None:
    """What `_link` and the step do, without links: while there is a folder `old`, the old files count."""
    old, new = (os.path.join(folder, place, name) for name in ("old", "new"))
    written = _files_in(new)
    try:
        _move(folder, old, sorted(names, key=lambda name: name != key))
        _move(new, folder, sorted(names, key=lambda name: name == key))
    except BaseException:
        _move(folder, new, sorted(written - _files_in(new)))
        raise
    os.rename(old, os.path.join(folder, place, "gone"))


def _move(source: str, target: str, names: Iterable[str]) -> None:
    for name in names:
        if os.path.lexists(os.path.join(source, name)):
            os.makedirs(os.path.dirname(os.path.join(target, name)), exist_ok=True)
            os.replace(os.path.join(source, name), os.path.join(target, name))


def _settle(folder: str, place: str) -> None:
    """Puts files in the place of links through `now`, and removes what was there meanwhile."""
    meanwhile = os.path.join(folder, place)
    now, old = os.path.join(meanwhile, "now"), os.path.join(meanwhile, "old")
    if os.path.islink(now):
        for name in sorted(_files_in(old) | _files_in(os.path.join(meanwhile, "new"))):
            path = os.path.join(folder, name)
            parent = os.path.dirname(path)
            if not os.path.islink(path) or os.readlink(path) != os.path.relpath(os.path.join(now, name), parent):
                continue
            source = os.path.join(meanwhile, os.readlink(now), name)
            if os.path.lexists(source):
                os.replace(source, path)
            else:
                os.unlink(path)
                if parent != folder and not os.listdir(parent):
                    os.rmdir(parent)
    elif os.path.isdir(old):
        _move(old, folder, sorted(_files_in(old)))
    shutil.rmtree(meanwhile, ignore_errors=True)
