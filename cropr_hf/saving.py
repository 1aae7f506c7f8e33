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
"""Loading and saving: stripped for publishing, complete for resuming."""

import copy
import fnmatch
import inspect
import itertools
import json
import os
import re
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

from .configuration_cropr_vit import CroprViTConfig
from .token_reduction import TokenReducer, find_token_reducer, has_auxiliary_heads


TRAINING_CONFIG_FOLDER = "training_config"
STAGING_PREFIX = "_saving_"
HUB_ARGUMENTS = ("commit_message", "commit_description", "private", "token", "create_pr", "revision")
CARD_NAME = "README.md"
CARD_MARK = "<!-- Written by cropr_hf from record.json. Remove this line to keep changes of your own. -->"


class StrippableModel(PreTrainedModel):
    """A model whose weights are stored in two forms: complete (queries, aggregators, auxiliary heads) or stripped (one
    vector per module).

    `config.use_auxiliary_heads` says which one a model or a folder holds; loading and saving convert.
    """

    config: CroprViTConfig
    # Modules that a configuration with another schedule, or without pruning, has no place for.
    _keys_to_ignore_on_load_unexpected = [r"(^|\.)token_reducers\.\d+\."]
    # What was done with these weights, for the model card. `CroprTrainer` fills it in.
    record: dict[str, Any] | None = None
    # Writes the model card. The package hands it in; code from the Hub has none, and leaves it out.
    write_card: Callable[..., None] | None = None

    def remove_auxiliary_heads(self) -> None:
        """Turns the model in memory into the stripped one, which gives the same outputs in evaluation."""
        for module in self.modules():
            if isinstance(module, TokenReducer):
                module.remove_auxiliary_heads()
        self.config.use_auxiliary_heads = False

    def add_auxiliary_heads(self) -> None:
        """Makes a stripped model trainable: new heads, and queries whose sum is the folded vector.

        Its ranking of tokens stays the same, up to rounding in half precision. A model that has heads keeps them.

        Raises:
            `ValueError`: when the token reducer has no auxiliary heads.
        """
        reducers = [module for module in self.modules() if isinstance(module, TokenReducer)]
        if not any(reducer.supports_auxiliary_heads for reducer in reducers):
            raise ValueError(
                f"The token reducer {self.config.token_reducer!r} has no auxiliary heads to add; "
                f"{CroprViTConfig.token_reducer!r} has."
            )
        if self.config.use_auxiliary_heads:
            return
        self.config.use_auxiliary_heads = True
        for reducer in reducers:
            reducer.add_auxiliary_heads(self.config, lambda module: module.apply(self._init_weights))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """Loads a folder or a Hub repository; see `PreTrainedModel.from_pretrained`.

        `use_auxiliary_heads=True` makes a stripped checkpoint trainable again, `False` strips a complete one.

        Raises:
            `ValueError`: when the checkpoint or `config` is of another model type, or the checkpoint is truncated or
                lacks weights of the backbone.
        """
        path = pretrained_model_name_or_path
        if path is None:
            return super().from_pretrained(path, *model_args, config=config, **kwargs)
        stored = _stored_config(path, kwargs)
        if isinstance(config, (str, os.PathLike)):
            config = CroprViTConfig.from_pretrained(config)
        if config is not None and getattr(config, "model_type", None) != CroprViTConfig.model_type:
            raise ValueError(f"`config` is a {type(config).__name__}; give a `CroprViTConfig`, or leave it out.")
        reducer_name = stored.get("token_reducer", CroprViTConfig.token_reducer)
        reducer_name = config.token_reducer if config else kwargs.get("token_reducer", reducer_name)
        # A complete checkpoint can be loaded with another reducer, which has no place for its heads.
        stored_heads = stored.get("use_auxiliary_heads", False) and has_auxiliary_heads(reducer_name)
        wanted_heads = kwargs.pop("use_auxiliary_heads", config.use_auxiliary_heads if config else stored_heads)
        if config is None:
            kwargs["use_auxiliary_heads"] = stored_heads
        elif config.use_auxiliary_heads != stored_heads:
            config = copy.deepcopy(config)
            config.use_auxiliary_heads = stored_heads
        return_info = kwargs.pop("output_loading_info", False)
        replaces_head = kwargs.pop("ignore_mismatched_sizes", False)
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # they are checked below, by name
        with named_damage(path):
            loaded: Any = super().from_pretrained(path, *model_args, config=config, **kwargs)
        model, info = loaded
        # New reducers are usual if they will be trained, a new head if the folder holds a model of another class.
        new_parts = ["token_reducers."] if wanted_heads and not stored_heads else []
        if stored.get("architectures") != [cls.__name__]:
            new_parts.append("head")
        model._check_loaded(path, info, new_parts, replaces_head)
        if wanted_heads and not stored_heads:
            model.add_auxiliary_heads()
        elif stored_heads and not wanted_heads:
            model.remove_auxiliary_heads()
        return (model, info) if return_info else model

    def _check_loaded(
        self, path: str | os.PathLike, info: dict[str, Any], new_parts: Sequence[str], replaces_head: bool
    ) -> None:
        """Raises `ValueError` for weights that should have been in the checkpoint.

        Args:
            path: of the checkpoint.
            info: the loading report of Transformers.
            new_parts: what may be new: `"token_reducers."`, and `"head"` for all outside the base model.
            replaces_head: whether weights outside the backbone may be new because theirs have other shapes.
        """
        prefix = "" if self.base_model is self else self.base_model_prefix + "."
        resized = [entry if isinstance(entry, str) else entry[0] for entry in info.get("mismatched_keys", ())]
        method = find_token_reducer(self.config)
        if lost := [name for name in resized if method is not None and name.endswith(method.fixed_weights)]:
            raise ValueError(
                f"The complete checkpoint {path} has another shape of {lost[0]} (another number of queries?) than the "
                "configuration, so that its scores would be lost; strip it first (load it with "
                "`use_auxiliary_heads=False`, save it), and load the result."
            )
        resized = sorted(name for name in resized if name.startswith(prefix) and "token_reducers." not in name)
        if resized:
            raise ValueError(
                f"The checkpoint {path} has other shapes for {', '.join(resized[:3])}; only a task head can be "
                "replaced. Leave the fields of the backbone as they are; the model interpolates positions by itself."
            )
        if info["mismatched_keys"] and not replaces_head:
            name, stored, own = min(info["mismatched_keys"])
            raise ShapesDiffer(
                f"The checkpoint {path} has {name} of the shape {tuple(stored)}, the configuration says {tuple(own)}; "
                "leave its fields as they are, or let `ignore_mismatched_sizes=True` put a new head in the place."
            )
        missing = [name for name in info["missing_keys"] if "head" not in new_parts or name.startswith(prefix)]
        missing = sorted(name for name in missing if not any(part in name for part in new_parts))
        if missing:
            raise ValueError(
                f"The checkpoint {path} lacks {len(missing)} weights of the model, such as {', '.join(missing[:3])}: "
                "it is incomplete, belongs to another configuration, or is not a Cropr ViT (`from_vit` starts from "
                "other ViTs). New token reducers need `use_auxiliary_heads=True`, and training."
            )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        *args: Any,
        strip_auxiliary_heads: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Saves for publishing: stripped weights, with `training_config/config.json` to train them again.

        A folder that the Trainer resumes from (`checkpoint-<step>`) gets the complete weights. The model in memory
        does not change. All files are written beside the old ones first, and `config.json` comes last: an interrupted
        save leaves the old folder, or one that does not load. See `PreTrainedModel.save_pretrained` for the rest.

        Except in a folder to resume from, `record.json` and the model card `README.md` lie beside the weights (where
        `cropr_hf` is installed); a card that somebody wrote or changed by hand stays.

        Args:
            strip_auxiliary_heads: `None` is as above; `True` and `False` decide.

        Raises:
            `ValueError`: for a distributed checkpoint, which can only be complete.
        """
        save_directory = os.fspath(save_directory)
        folder = os.path.basename(os.path.abspath(save_directory))
        is_published = not is_checkpoint_folder(save_directory)
        if strip_auxiliary_heads is None:
            strip_auxiliary_heads = is_published
        strip = strip_auxiliary_heads and self.config.use_auxiliary_heads
        if strip and kwargs.get("distributed_checkpoint"):
            raise ValueError("A distributed checkpoint cannot be stripped; pass `strip_auxiliary_heads=False`.")
        if os.path.isfile(save_directory):
            raise ValueError(f"{save_directory} is a file; give a folder to save to.")
        if strip:
            weights = self.state_dict() if state_dict is None else state_dict
            state_dict = strip_state_dict(weights, find_token_reducer(self.config))
        repo_id = kwargs.pop("repo_id", None)
        hub_kwargs = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if push_to_hub and name in kwargs}
        if not is_main_process:
            # Sharded weights are gathered with every process, and written by each in older releases of Transformers.
            with tempfile.TemporaryDirectory() as unused:
                target = save_directory if kwargs.get("distributed_checkpoint") else unused
                super().save_pretrained(target, False, state_dict, False, *args, **kwargs)
            return

        saved = self.state_dict() if state_dict is None else state_dict  # which loses its tensors on the way
        num_parameters = sum(tensor.numel() for tensor in saved.values())
        os.makedirs(save_directory, exist_ok=True)
        for name in fnmatch.filter(os.listdir(save_directory), f"{STAGING_PREFIX}*"):  # of a save that was killed
            shutil.rmtree(os.path.join(save_directory, name), ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=STAGING_PREFIX, dir=save_directory) as staging:
            self.config.use_auxiliary_heads = self.config.use_auxiliary_heads and not strip
            try:
                super().save_pretrained(staging, True, state_dict, False, *args, **kwargs)
                if is_published and self.write_card is not None:
                    self.write_card(staging, repo_id or folder, num_parameters, save_directory)
            finally:
                self.config.use_auxiliary_heads = self.config.use_auxiliary_heads or strip
            if strip:
                _save_training_config(staging, type(self.config))
            if push_to_hub:
                _upload(staging, repo_id or folder, weights_variant=kwargs.get("variant"), **hub_kwargs)
            _replace_files(staging, save_directory, weights_variant=kwargs.get("variant"))

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        commit_description: str | None = None,
        max_shard_size: int | str | None = "50GB",
        tags: list[str] | None = None,
    ) -> str:
        """Uploads what `save_pretrained` writes, stripped weights and model card, in one commit.

        A card on the Hub that somebody wrote or changed by hand stays. See `PreTrainedModel.push_to_hub` for the
        arguments.
        """
        if tags:
            self.add_model_tags(tags)
        with tempfile.TemporaryDirectory() as parent:
            folder = os.path.join(parent, "model")
            self.save_pretrained(folder, repo_id=repo_id, max_shard_size=max_shard_size)
            return _upload(
                folder,
                repo_id,
                private,
                token,
                revision,
                create_pr=create_pr,
                commit_message=commit_message,
                commit_description=commit_description,
            )


class ShapesDiffer(ValueError, RuntimeError):
    """Weights of other shapes than the model's: a `ValueError` as everywhere here, and what Transformers raises."""


@contextmanager
def named_damage(path: str | os.PathLike) -> Iterator[None]:
    """Turns errors of readers that met a damaged or foreign file into a `ValueError` that names its folder."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        frames = traceback.walk_tb(error.__traceback__)
        # Whatever `torch.load` raises: junk makes it fail in any way, and its words advise to run what is there.
        is_pickle = any(frame.f_globals.get("__name__") == torch.load.__module__ for frame, _ in frames)
        if is_pickle or isinstance(error, (SafetensorError, json.JSONDecodeError)):
            reason = "what it holds is not tensors" if is_pickle else error
            text = f"The weights in {path} are damaged or truncated ({reason}); save them again."
            raise ValueError(text) from error
        if "ignore_mismatched_sizes" in str(error):
            raise ShapesDiffer(
                f"The weights in {path} have other shapes than its `config.json` says, which the log lists; restore "
                "its fields, or the weights that belong to it."
            ) from error
        is_argument = "keyword argument" in str(error)  # the caller's
        if is_argument or not isinstance(error, (AttributeError, LookupError, RecursionError, TypeError)):
            raise
        raise ValueError(
            f"{path} does not hold what a saved model holds ({type(error).__name__}: {error}): its `config.json` or "
            "its weights are damaged, or of something else; save the model again."
        ) from error


def is_checkpoint_folder(path: str | os.PathLike) -> bool:
    """Whether a folder, or what it is a link to, has the name of those that the Trainer resumes from."""
    names = (os.path.basename(place) for place in (os.path.abspath(path), os.path.realpath(path)))
    return any(re.fullmatch(r"checkpoint-\d+", name) for name in names)


def _stored_config(path: str | os.PathLike, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The configuration stored at `path`; raises `ValueError` if there is none, or one of another model type."""
    names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
    where = {name: kwargs[name] for name in names if name in kwargs}
    try:
        with named_damage(path):
            stored, _ = CroprViTConfig.get_config_dict(path, **where)
    except OSError as error:
        if isinstance(error.__context__, (json.JSONDecodeError, UnicodeDecodeError)):
            raise ValueError(
                f"The `config.json` of {path} is not valid JSON ({error.__context__}); save the model again."
            ) from error
        raise
    model_type = stored.get("model_type") if isinstance(stored, dict) else None
    if model_type is None:  # Transformers would go on with default values
        raise ValueError(
            f"{path} holds no `config.json` of a model: it is not a saved model, or saving it was interrupted; save "
            "it again."
        )
    if model_type != CroprViTConfig.model_type:
        raise ValueError(
            f"{path} holds a model of type {model_type!r}, not {CroprViTConfig.model_type!r}; `from_vit` starts from "
            "another family."
        )
    return stored


def strip_state_dict(state_dict: dict[str, torch.Tensor], method: type[TokenReducer]) -> dict[str, torch.Tensor]:
    """Weights of the stripped model from those of a model with auxiliary heads; others pass unchanged.

    It reads nothing but `state_dict`, so it also serves gathered weights (FSDP, DeepSpeed).
    """
    stripped: dict[str, torch.Tensor] = {}
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state_dict.items():
        if match := re.fullmatch(r"((?:.*\.)?token_reducers\.\d+\.)(.+)", name):
            modules.setdefault(match[1], {})[match[2]] = tensor
        else:
            stripped[name] = tensor
    for prefix, weights in modules.items():
        stripped |= {prefix + name: tensor for name, tensor in method.strip(weights).items()}
    return stripped


def _save_training_config(folder: str, config_class: type[PreTrainedConfig]) -> None:
    """Beside a stripped `config.json`, the same with heads on, and for remote code the files that read it."""
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        stored = json.load(file)
    training_folder = os.path.join(folder, TRAINING_CONFIG_FOLDER)
    os.makedirs(training_folder)
    with open(os.path.join(training_folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump({**stored, "use_auxiliary_heads": True}, file, indent=2, sort_keys=True)
    if "auto_map" in stored:
        code = inspect.getfile(config_class)
        for path in (code, *get_relative_import_files(code)):
            shutil.copy(path, training_folder)


def _upload(
    folder: str,
    repo_id: str,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    weights_variant: str | None = None,
    **kwargs: Any,
) -> str:
    """Replaces the model in a repository by that in a folder, in one commit."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    kept = [CARD_NAME] if _has_own_card(api, repo_id, revision) else None
    if os.path.exists(os.path.join(folder, "config.json")):  # not adapters alone
        kwargs["delete_patterns"] = [*_weight_patterns(weights_variant), f"{TRAINING_CONFIG_FOLDER}/*"]
    return api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, ignore_patterns=kept, **kwargs)


def _has_own_card(api: HfApi, repo_id: str, revision: str | None) -> bool:
    """Whether the card of a repository was written or taken over by somebody."""
    if not api.file_exists(repo_id, CARD_NAME, revision=revision):
        return False
    card = api.hf_hub_download(repo_id, CARD_NAME, revision=revision)
    with open(card, encoding="utf-8", errors="replace") as file:
        return CARD_MARK not in file.read()


def _weight_patterns(variant: str | None) -> list[str]:
    """Names of files with weights: whole, in shards, and the index of shards. Loading takes the first it finds."""
    dotted = f".{variant}" if variant else ""
    shard = f"model{dotted}-?????-of-?????.safetensors"
    return [f"model{dotted}.safetensors", shard, f"model.safetensors.index{dotted}.json"]


def _replace_files(source: str, target: str, weights_variant: str | None) -> None:
    """Moves a saved model over an older one so that no mixture of the two can be loaded: without config, then with."""
    config_name = "config.json"
    if not os.path.exists(os.path.join(source, config_name)):  # adapters alone: the model beside them stays
        shutil.copytree(source, target, dirs_exist_ok=True)
        return
    if os.path.exists(os.path.join(target, config_name)):
        os.remove(os.path.join(target, config_name))
    shutil.rmtree(os.path.join(target, TRAINING_CONFIG_FOLDER), ignore_errors=True)
    stale = [fnmatch.filter(os.listdir(target), pattern) for pattern in _weight_patterns(weights_variant)]
    for name in itertools.chain.from_iterable(stale):
        os.remove(os.path.join(target, name))
    for folder, _, names in os.walk(source):
        destination = os.path.join(target, os.path.relpath(folder, source))
        os.makedirs(destination, exist_ok=True)
        for name in names:
            if folder != source or name != config_name:
                os.replace(os.path.join(folder, name), os.path.join(destination, name))
    os.replace(os.path.join(source, config_name), os.path.join(target, config_name))
