"""Which checkpoint an interrupted training can resume from."""

import json
import os
import re
import zipfile

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging


logger = logging.get_logger(__name__)

# What files and folders of weights begin with: of models, adapters, FSDP's shards and DeepSpeed's.
WEIGHTS = ("model", "adapter_model", "pytorch_model", "global_step")


def last_whole_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The path of the newest `checkpoint-<step>` in `output_dir` that was saved to the end; `None` if there is none.

    The Trainer writes into that folder in place, so that a kill or a full disk leaves a part of a checkpoint, which
    `transformers.trainer_utils.get_last_checkpoint` returns. Here the checkpoint says by itself whether it is whole,
    so that those of the plain `Trainer` and of earlier versions count as well, which a marker of our own would
    exclude: `trainer_state.json` comes last and is JSON only when complete, and the files of weights and states beside
    it have the lengths that they announce (torch 2.8 does not notice when a small file finds no room).

    Sharded states of FSDP and DeepSpeed need no look of their own: their processes wait for one another before
    `trainer_state.json`. For random states of several processes they do not, nor does the plain `Trainer` notice that
    it writes over a whole checkpoint of the same step; `CroprTrainer` takes care of both.

    Folders that are skipped stay as they are, and a warning names them and what is wrong with them.
    """
    steps = {}
    if os.path.isdir(output_dir):
        for entry in os.scandir(os.fspath(output_dir)):
            match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", entry.name)
            if match and entry.is_dir():
                steps[int(match[1])] = entry.path
    for step in sorted(steps, reverse=True):
        flaw = _flaw(steps[step])
        if flaw is None:
            return steps[step]
        logger.warning(f"Skipping {steps[step]}, which is only a part of a checkpoint: {flaw}.")
    return None


def _flaw(folder: str) -> str | None:
    """What is wrong with a checkpoint, if anything."""
    name = TRAINER_STATE_NAME
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            if not isinstance(json.load(file), dict):
                return f"{name} is not an object of JSON"
        for name in sorted(os.listdir(folder)):
            path = os.path.join(folder, name)
            if name.endswith(".safetensors"):
                with safe_open(path, framework="pt"):  # compares the length with the header
                    pass
            elif name.endswith(".safetensors.index.json"):
                with open(path, encoding="utf-8") as file:
                    shards = set(json.load(file)["weight_map"].values())
                if missing := shards.difference(os.listdir(folder)):
                    return f"it has no {min(missing)}"
            elif name.endswith((".pt", ".pth", ".bin")) and not zipfile.is_zipfile(path):  # its table is at the end
                return f"{name} is truncated"
    except FileNotFoundError:
        return f"it has no {name}"
    except (OSError, ValueError, SafetensorError) as error:
        return f"{name} is truncated ({error})"
    except (AttributeError, LookupError, RecursionError, TypeError) as error:  # JSON of another kind
        return f"{name} does not say what it should ({type(error).__name__}: {error})"
    if not any(entry.startswith(WEIGHTS) for entry in os.listdir(folder)):
        return "it has no weights"
    return None
