"""What a Trainer knows about a run, for the record beside the weights (see `cropr_hf.publishing.model_card`)."""

import dataclasses
import functools
import json
import os
import re
import subprocess
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from transformers import Trainer
from transformers.utils import logging

from ..files import source_name
from ..saving import CARD_NAME
from ..speed.instruments import library_versions, machine_name


logger = logging.get_logger(__name__)

# Where things lie, who looks on, and secrets: they do not change what is trained.
PRIVATE_SETTINGS = {
    "data_dir",
    "dataloader_pin_memory",
    "dataset_name",
    "debug",
    "disable_tqdm",
    "hub_model_id",
    "hub_token",
    "id2label",
    "logging_dir",
    "model_name_or_path",
    "output_dir",
    "push_to_hub",
    "report_to",
    "resume_from_checkpoint",
    "run_name",
    "teacher_name_or_path",
    "token",
    "train_dir",
    "validation_dir",
}
PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
# Old names of arguments, whose values `TrainingArguments` keeps equal to those of the new ones, where it has both.
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
# Switches that `TrainingArguments` turns from "not given" into False.
FILLED_IN = {"activation_checkpointing"}
# What `Trainer.evaluate` adds to the metrics.
TIMINGS = ("epoch", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def training_facts(trainer: Trainer) -> dict[str, Any]:
    """The section `training` of a record: data, settings, hardware, versions."""
    args, state = trainer.args, trainer.state
    finished = next((entry for entry in reversed(state.log_history) if "train_runtime" in entry), {})
    precision = trainer.accelerator.mixed_precision  # by the arguments, or by the configuration of accelerate
    settings = changed_settings(args)
    logged: dict[str, Any] = next((entry for entry in reversed(state.log_history) if "loss" in entry), {})
    if args.auto_find_batch_size:
        settings["per_device_train_batch_size"] = trainer._train_batch_size // max(1, args.n_gpu)
    facts = {
        **dataset_facts(trainer.train_dataset),
        "num_epochs": round(state.epoch, 2) if state.epoch else None,
        "num_steps": state.global_step,
        # Not that of the arguments, which may have been too large for `auto_find_batch_size`.
        "batch_size": trainer._train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "precision": PRECISIONS.get(precision, precision),
        "seed": args.seed,
        "loss": round(finished["train_loss"], 4) if finished else None,
        "distillation_losses": {name: logged[name] for name in logged if name.startswith("distillation_")} or None,
        "minutes": round(finished["train_runtime"] / 60, 1) if finished else None,
        "machine": machine_name(args.device),
        "num_processes": args.world_size,
        "versions": library_versions(),
        "commit": code_commit(),
        "settings": settings,
    }
    return {name: value for name, value in facts.items() if value is not None}


def dataset_facts(dataset: Any) -> dict[str, Any]:
    """Name, configuration, split and size of a data set, as far as it knows them."""
    dataset = getattr(dataset, "examples", dataset)  # of a `TrainingStream`
    info, split = getattr(dataset, "info", None), getattr(dataset, "split", None)
    facts = {
        "dataset": getattr(info, "dataset_name", None) or type(dataset).__name__,
        "config": getattr(info, "config_name", None),
        "split": None if split is None else str(split),
        "num_examples": len(dataset) if hasattr(dataset, "__len__") else None,
    }
    return {name: value for name, value in facts.items() if value is not None}


def evaluation_metrics(metrics: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """The numbers that `Trainer.evaluate` returns, without their prefix, and without how long it took."""
    named = {name.removeprefix(f"{prefix}_"): value for name, value in metrics.items()}
    return {name: value for name, value in named.items() if name not in TIMINGS and isinstance(value, (int, float))}


def changed_settings(*arguments: Any) -> dict[str, Any]:
    """Fields of dataclasses that differ from their defaults, except for paths, secrets and the like."""
    changed = {}
    for group in arguments:
        for field in dataclasses.fields(group):
            value = getattr(group, field.name, None)
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            value, default = (setting.value if isinstance(setting, Enum) else setting for setting in (value, default))
            is_old_name = hasattr(group, RENAMED.get(field.name, ""))
            if field.name in PRIVATE_SETTINGS or not field.init or is_old_name:
                continue
            is_filled_in = default is None and value is False and field.name in FILLED_IN
            if value != default and not is_filled_in and _is_plain(value):
                changed[field.name] = value
    return changed


def licence_of(base_model: str) -> str | None:
    """The licence in the model card of a folder or of a repository that can be reached; `None` if there is none."""
    folder = Path(base_model)
    if not base_model or ("/" not in base_model and not folder.is_dir()):
        return None  # the name of a folder that lies elsewhere is not that of a repository
    try:
        card = ModelCard.load(folder / CARD_NAME if folder.is_dir() else base_model)
    except (OSError, ValueError, yaml.YAMLError) as error:
        logger.info(f"The licence of {source_name(base_model)} is not known: {error}")
        return None
    return card.data.get("license")


@functools.cache  # each save asks again
def code_commit() -> str | None:
    """The commit of this package in a checkout, with `-dirty` for changes since; `None` where it is installed."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        tracked = subprocess.run([*git, "ls-files", Path(__file__).name], capture_output=True, text=True, check=True)
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip() if tracked.stdout else None  # else it is somebody else's repository


def _is_plain(value: Any) -> bool:
    """Whether a setting can be written down: no object, and no path of this machine in it."""
    try:
        text = json.dumps(value)
    except TypeError:
        return False
    return not any(os.path.isabs(part) for part in re.findall(r'"([^"]*)"', text))
