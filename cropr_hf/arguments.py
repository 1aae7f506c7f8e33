"""What several command lines understand alike."""

import json
from typing import Any

import torch


DTYPES = ("float32", "bfloat16", "float16")


def parse_config(text: str, argument: str = "config", example: str = '{"pruning_rate": 8}') -> dict[str, Any]:
    """Fields of a configuration from the command line; raises `ValueError` if they are not a JSON object."""
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"--{argument} is {text!r}, which is not valid JSON ({error}); write it as '{example}'."
        ) from error
    if not isinstance(fields, dict):
        raise ValueError(f"--{argument} is {text!r}; give an object, such as '{example}'.")
    return fields


def usable_device(name: str) -> torch.device:
    """A device by its name; raises `ValueError` if torch cannot compute on it here."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # which `meta` has not
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"`device` is {name!r}, which torch cannot use here ({reason}); try cpu.") from error
    return device


def parse_device(name: str) -> torch.device:
    """A device by its name; raises `ValueError` if there is none, or none that `time_call` can time."""
    device = usable_device(name)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"`device` is {name!r}; times are taken on cpu and cuda devices.")
    return device
