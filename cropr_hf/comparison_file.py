"""What is compared: the file of `cropr-hf compare`, read and checked before anything is trained.

`docs/methods.md` explains its fields.
"""

# No `from __future__ import annotations` here: it would turn the types that fields are checked against into text.

import difflib
import json
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin

import yaml

from .arguments import DTYPES, parse_device
from .configuration_cropr_vit import CroprViTConfig
from .speed.alternatives import SMALLER_IMAGE, SMALLER_MODEL
from .speed.benchmark import UNPRUNED
from .speed.timing import check_rounds
from .token_reduction import TOKEN_REDUCERS, find_token_reducer


Fields = TypeVar("Fields")


# Types of values. `strict` of huggingface_hub takes true for a number, and says neither which item of a list is wrong
# nor what to write instead.


def fits(value: Any, kind: Any) -> bool:
    """Whether a value has a type, and so have all that it holds. Whole numbers are numbers, true and false are not."""
    inner = get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(fits(each, inner[0]) for each in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(
            fits(name, inner[0]) and fits(each, inner[1]) for name, each in value.items()
        )
    if get_origin(kind) is UnionType:
        return any(fits(value, each) for each in inner)
    if kind is Any:
        return True
    return isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))


# What to write where a value has another type.
TEXT = "text, in quotes where it looks like a number or like `yes` and `no`"
NAMES_AND_VALUES = "names and values, `name: value`, with quotes around names that look like numbers or `yes` and `no`"
WORDS: dict[Any, str] = {
    str: TEXT,
    str | None: TEXT,
    bool: "true or false",
    int: "a whole number",
    float: "a number, such as 0.01",
    list[int]: "a list of whole numbers, `[1, 2]`",
    list[str]: f"a list, `[first, second]`, of {TEXT}",
    dict[str, Any]: NAMES_AND_VALUES,
    dict[str, dict[str, Any]]: f"{NAMES_AND_VALUES}; each value is `{{name: value}}` in turn",
}

SHARE = "multiply_adds"  # of a budget: the share of the unpruned model's multiply-adds
# What a budget may be: a check, and what to write.
BUDGETS: dict[str, tuple[Callable[[Any], bool], str]] = {
    SHARE: (lambda share: fits(share, float) and 0 < share < 1, "a share in (0, 1), such as 0.5"),
    "pruning_rate": (lambda rate: fits(rate, int) and rate > 0, "a whole number, 1 or more"),
    "pruning_schedule": (
        lambda kept: fits(kept, list[int]) and kept == sorted(kept, reverse=True) and min(kept, default=0) > 0,
        "a list of the patches that each block leaves, 1 or more, which never become more",
    ),
}
# What the comparison tells the scripts itself.
REDUCER = "token_reducer"
TOLD_TO_TRAIN = ("output_dir", "seed", REDUCER, *BUDGETS)
TOLD_TO_EVALUATE = ("model_name_or_path", "picture", "exported", REDUCER, *BUDGETS)
# Names of rows that stand for no method.
REFERENCES = (UNPRUNED, SMALLER_IMAGE, SMALLER_MODEL)


@dataclass
class Speed:
    """How speed is measured, once all runs are there: in one process, in turns.

    Attributes:
        batch_sizes: images per call.
        dtypes: types of weights and inputs.
        compiled: whether each model is timed compiled as well.
        device: where.
        min_rounds, max_rounds, tolerance: see `cropr_hf.speed.timing.compare`.
    """

    batch_sizes: list[int] = field(default_factory=lambda: [1, 8])
    dtypes: list[str] = field(default_factory=lambda: ["float32"])
    compiled: bool = True
    device: str = "cpu"
    min_rounds: int = 7
    max_rounds: int = 40
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        check_rounds(self.min_rounds, self.max_rounds, self.tolerance)
        parse_device(self.device)
        _check_each("speed.dtypes", self.dtypes, DTYPES.__contains__, f"choose among {', '.join(DTYPES)}")
        _check_each("speed.batch_sizes", self.batch_sizes, lambda size: size > 0, "give whole numbers, 1 or more")


@dataclass
class Comparison:
    """What is compared.

    Attributes:
        train: a training script that writes a stripped model with its record, such as those in `examples`; or a whole
            command (`accelerate launch ...`).
        evaluate: an evaluation script whose last line is a JSON object of numbers.
        methods: of the registry, by name, with arguments of `train` that only they have; or variants of one, by a
            name of your own with that of the method as `token_reducer` among them.
        budgets: by name, one of `multiply_adds` (share of the unpruned model's, in (0, 1)), `pruning_rate` and
            `pruning_schedule`; each method gets what costs as much (see `cropr_hf.comparison.pruning_of`).
        seeds: of the trainings.
        arguments: of `train`, for all runs.
        pruned: of `train`, for all runs that prune.
        evaluation: arguments of `evaluate`.
        metrics: which of its numbers to show, the first in the picture; all by default.
        smaller_model: a model for the row of that name; left out by default.
        off_the_shelf: whether methods that need no training are also measured on the unpruned checkpoint as it is.
        exported: whether models of the first seed are also written as ONNX, and that file is evaluated and timed.
        pictures: whether `evaluate` also draws what models of the first seed prune (`--picture`).
        speed: see `Speed`.
    """

    train: str
    evaluate: str
    methods: dict[str, dict[str, Any]]
    budgets: dict[str, dict[str, Any]]
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    arguments: dict[str, Any] = field(default_factory=dict)
    pruned: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    metrics: list[str] = field(default_factory=list)
    smaller_model: str | None = None
    off_the_shelf: bool = True
    exported: bool = False
    pictures: bool = False
    speed: Speed = field(default_factory=Speed)

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> "Comparison":
        """Reads YAML.

        Raises:
            `ValueError`: for what is not a field, a value of another type, a method that is not registered, or a value
                that makes no sense.
        """
        content = _read_yaml(path)
        methods = content.get("methods")
        if isinstance(methods, list) and fits(methods, list[str]):
            content["methods"] = {name: {} for name in methods}
        elif isinstance(methods, dict):
            content["methods"] = {name: {} if own is None else own for name, own in methods.items()}
        if content.get("speed") is not None:
            content["speed"] = _made(Speed, content["speed"], f"`speed` of {path}")
        return _made(cls, content, str(path))

    def __post_init__(self) -> None:
        for name in ("train", "evaluate"):
            _check_command(name, getattr(self, name))
        for name, own in self.methods.items():
            if not fits(self.reducer(name), str):
                raise ValueError(
                    f"`methods.{name}` has token_reducer {self.reducer(name)!r}; give a name of a method."
                )
            find_token_reducer(CroprViTConfig(token_reducer=self.reducer(name), reducer_config=None))
            if REDUCER in own and name in (*TOKEN_REDUCERS, *REFERENCES):
                raise ValueError(
                    f"`methods.{name}` has 'token_reducer'; give the variant a name that nothing else has."
                )
        for name, budget in self.budgets.items():
            if len(budget) != 1 or not {*budget} <= {*BUDGETS}:
                raise ValueError(f"The budget {name!r} is {budget!r}; give one of {', '.join(BUDGETS)}.")
            for kind, value in budget.items():
                is_right, words = BUDGETS[kind]
                if not is_right(value):
                    raise ValueError(f"The budget {name!r} has {kind} {value!r}; it is {words}.")
        for kind, names in {"budgets": self.budgets, "methods": self.methods}.items():
            if len({folder_name(name) for name in names}) < len(names):
                raise ValueError(f"The {kind} {', '.join(names)} differ in signs alone; give them other names.")
        for where, group in {"arguments": self.arguments, "pruned": self.pruned}.items():
            _check_arguments(where, group, TOLD_TO_TRAIN)
        for name, own in self.methods.items():
            _check_arguments(f"methods.{name}", own, {*TOLD_TO_TRAIN} - {REDUCER})
        _check_arguments("evaluation", self.evaluation, TOLD_TO_EVALUATE)
        _check_each("seeds", self.seeds, lambda seed: seed >= 0, "give whole numbers, 0 or more")

    def reducer(self, method: str) -> str:
        """Name in the registry of what the comparison calls a method."""
        return self.methods[method].get(REDUCER, method)


def folder_name(*parts: str | None) -> str:
    """Parts of a name in letters that every file system takes."""
    return re.sub(r"\W+", "_", " ".join(part for part in parts if part is not None))


def _read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """The fields in a file; raises `ValueError` for one that has none, or values that no record can hold."""
    if not Path(path).is_file():
        raise ValueError(f"There is no file {path}; write one, such as those in examples/comparisons.")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        json.dumps(content, allow_nan=False)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    except (TypeError, ValueError) as error:  # YAML has dates, sets and infinity as well
        raise ValueError(
            f"{path} has a value that is neither text, a finite number, a list nor names and values ({error}); "
            "write it in quotes."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no comparison; write lines of the form `field: value`, such as `train:`.")
    return content


def _made(kind: type[Fields], given: Any, where: str) -> Fields:
    """A dataclass with fields that are given; what is null is left out.

    Raises:
        `ValueError`: for what is not a field, one that is missing, or a value of another type.
    """
    if not isinstance(given, dict):
        raise ValueError(f"{where} is {given!r}; write {NAMES_AND_VALUES}.")
    known = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]
    for name in given:
        if name not in known:
            near = " or ".join(difflib.get_close_matches(str(name), known)) or f"one of {', '.join(known)}"
            raise ValueError(f"{where} has {name!r}, which is not a field of it; did you mean {near}?")
    needed = [name for name, item in known.items() if item.default is MISSING and item.default_factory is MISSING]
    if missing := [name for name in needed if not given.get(name)]:
        raise ValueError(f"{where} has no {', '.join(missing)}; a comparison needs them.")
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if not fits(value, known[name].type):
            raise ValueError(f"`{name}` of {where} is {value!r}; write {WORDS[known[name].type]}.")
    return kind(**given)


def _check_each(name: str, values: list[Any], is_right: Callable[[Any], bool], advice: str) -> None:
    """Raises `ValueError` for a list that is empty, holds a value twice, or one that is not right."""
    for value in values:
        if not is_right(value):
            raise ValueError(f"`{name}` has {value!r}; {advice}.")
    if not values or len({*values}) < len(values):
        raise ValueError(f"`{name}` is {values}; give one or more, each once.")


def _check_arguments(where: str, given: Mapping[str, Any], told: Iterable[str]) -> None:
    """Raises `ValueError` for arguments that the comparison itself sets; command lines take `-` for `_`."""
    for name in given:
        if name.replace("-", "_") in told:
            raise ValueError(f"`{where}` has {name!r}, which the comparison itself sets; leave it out.")


def _check_command(name: str, script: str) -> None:
    """Raises `ValueError` for a script that no shell could start."""
    try:
        words = shlex.split(script)
    except ValueError as error:
        raise ValueError(f"`{name}` is {script!r}, which is not a command ({error}); correct the quotes.") from error
    if not words:
        raise ValueError(f"`{name}` is {script!r}; give a script or a command, such as `python script.py`.")
