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
"""The names of classes in a configuration: `id2label` and `label2id` say the same, and for as many classes."""

import textwrap
from typing import Any

from transformers import PreTrainedConfig


def settle_labels(config: PreTrainedConfig, num_labels: int | None) -> None:
    """Completes the names of classes: either of `id2label` and `label2id` follows from the other.

    Default names, which another number or a new `id2label` leaves behind, are none that somebody gave.

    Args:
        num_labels: as it was given, besides the names.

    Raises:
        `ValueError`: unless the names are those of the classes 0 to C - 1, where the two maps contradict each other,
            and for another number of classes.
    """
    names, numbers = _whole_keys("id2label", config.id2label), config.label2id
    if numbers is not None:
        if not isinstance(numbers, dict) or not all(str(number).isdecimal() for number in numbers.values()):
            raise ValueError(f"`label2id` is {_shortened(numbers)}; it must map the name of each class to its number.")
        numbers = {name: int(number) for name, number in numbers.items()}
        if names is None:
            names = _whole_keys("label2id", {number: name for name, number in numbers.items()})
    if num_labels is not None and (not isinstance(num_labels, int) or num_labels < 0):
        raise ValueError(f"`num_labels` is {num_labels!r}; it must be a whole number, 0 or more.")
    if num_labels is not None and names is not None and len(names) != num_labels:
        if _are_defaults(names):
            config.id2label = config.label2id = None
            return
        raise ValueError(
            f"`num_labels` is {num_labels}, but there are names of {len(names)} classes, {_shortened(names)}; give as "
            "many, or leave `num_labels` out."
        )
    if names is None:
        return
    numbers = numbers or {}
    given = not _are_defaults({number: name for name, number in numbers.items()})
    agree = numbers.keys() == {*names.values()}  # two classes may share a name
    if given and not (agree and all(names.get(number) == name for name, number in numbers.items())):
        raise ValueError(
            f"`label2id` is {_shortened(numbers)}, but `id2label` is {_shortened(names)}; give one of them alone."
        )
    config.id2label, config.label2id = names, {name: number for number, name in names.items()}


def _whole_keys(field: str, names: Any) -> dict[int, str] | None:
    if names is None:
        return None
    keys = [str(key) for key in names] if isinstance(names, dict) else []
    if not isinstance(names, dict) or {*keys} != {str(number) for number in range(len(names))}:
        raise ValueError(
            f"`{field}` is {_shortened(names)}; it must name the classes 0 to C - 1, each once, such as "
            f"{{0: 'cat', 1: 'dog'}} in `id2label`."
        )
    return {int(key): name for key, name in names.items()}


def _are_defaults(names: dict[int, str]) -> bool:
    return all(name == f"LABEL_{number}" for number, name in names.items())


def _shortened(value: Any) -> str:
    return textwrap.shorten(repr(value), 100, placeholder=" ...")


def with_new_labels(stored: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration with the names of classes in `overrides`, which loses them.

    Names that were stored go where there are new ones, or another number of classes.
    """
    new: dict[str, Any] = {name: overrides.pop(name) for name in ("id2label", "label2id") if name in overrides}
    number = overrides.get("num_labels")
    if new or (number is not None and number != len(stored.get("id2label") or ())):
        stored = {name: value for name, value in stored.items() if name not in ("num_labels", "id2label", "label2id")}
    return {**stored, **new}
