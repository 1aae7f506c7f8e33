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
import glob
import hashlib
import inspect
import json
import os
import re
import shutil
import tempfile
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import CONFIG_NAME

from .configuration_cropr_vit import WEIGHTS_ID, CroprViTConfig
from .folders import staged
from .token_reduction import TOKEN_REDUCERS, TokenReducer, find_token_reducer


TRAINING_CONFIG_FOLDER = "training_config"
HUB_ARGUMENTS = ("commit_message", "commit_description", "private", "token", "create_pr", "revision")
CARD_NAME = "README.md"
RECORD_NAME = "record.json"
PICTURE_NAME = "pruning.png"
REPLACED_HEAD = "leave its fields as they are, or let `ignore_mismatched_sizes=True` put a new head in the place"
ID_DIGITS = 16  # of the digest by which weights are known
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
    # What the package hands in, and code from the Hub does without: what writes the model card; what writes the code,
    # and returns the `auto_map` by which it is found; and patterns of its files.
    write_card: Callable[..., None] | None = None
    write_code: Callable[..., dict[str, str]] | None = None
    code_patterns: Callable[[], list[str]] = list

    @torch.no_grad()
    def remove_auxiliary_heads(self) -> None:
        """Turns the model in memory into the stripped one, which gives the same outputs in evaluation (with the
        configured pruning).
        """
        method = find_token_reducer(self.config)
        if method is None or not self.config.use_auxiliary_heads:
            return
        weights = self.state_dict()
        for name, tensor in strip_state_dict(weights, self.config).items():
            if name in weights and tensor is not weights[name]:  # folded into the weights of a block
                weights[name].copy_(tensor)
        for module in self.modules():
            if isinstance(module, TokenReducer):
                module.remove_auxiliary_heads()
        for name, value in method.stripped_fields(self.config).items():
            setattr(self.config, name, value)

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
        base: Any = self.base_model
        for reducer in reducers:
            # A module without weights of its own is where its block is.
            like = next(chain(reducer.parameters(), base.layers[reducer.block - 1].parameters()))
            reducer.add_auxiliary_heads(self.config, partial(self._initialize, like=like))

    def _initialize(self, module: torch.nn.Module, like: torch.Tensor) -> None:
        module.to(like).apply(self._init_weights)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """Loads a folder or a Hub repository; see `PreTrainedModel.from_pretrained`.

        `use_auxiliary_heads=True` makes a stripped checkpoint trainable again, `False` strips a complete one.

        Raises:
            `ValueError`: when the checkpoint or `config` is of another model type, or the checkpoint is truncated,
                lacks weights of the backbone, or has others than the configuration says.
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
        method = TOKEN_REDUCERS.get(reducer_name)  # type: ignore[arg-type]
        can_have_heads = method is not None and method.supports_auxiliary_heads
        stored_heads = stored.get("use_auxiliary_heads", False) and can_have_heads
        wanted_heads = kwargs.pop("use_auxiliary_heads", config.use_auxiliary_heads if config else stored_heads)
        if config is None:
            kwargs["use_auxiliary_heads"] = stored_heads
        elif config.use_auxiliary_heads != stored_heads:
            config = copy.deepcopy(config)
            config.use_auxiliary_heads = stored_heads
        return_info = kwargs.pop("output_loading_info", False)
        replaces_head = kwargs.pop("ignore_mismatched_sizes", False)
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # they are checked below, by name
        # A repository gives all files of one commit, and variants share a configuration.
        folder = os.path.join(path, kwargs["subfolder"]) if kwargs.get("subfolder") else path
        is_checked = os.path.isdir(folder) and not kwargs.get("variant")
        weights_ids = {stored.get(WEIGHTS_ID)}
        if config is not None and config.name_or_path == str(path):
            weights_ids.add(getattr(config, WEIGHTS_ID, None))
        with named_damage(path):
            files = _check_weights_id(folder, weights_ids) if is_checked else []
            loaded: Any = super().from_pretrained(path, *model_args, config=config, **kwargs)
            if is_checked and _check_weights_id(folder, weights_ids) != files:  # replaced meanwhile
                raise _mixture(folder)
        model, info = loaded
        vars(model.config).pop(WEIGHTS_ID, None)  # from now on they may change
        # New reducers are usual if they will be trained, a new head if the folder holds a model of another class.
        is_new = (wanted_heads and not stored_heads) or model._starts_new_method(stored)
        new_parts = ["token_reducers."] if is_new else []
        if stored.get("architectures") != [cls.__name__]:
            new_parts.append("head")
        model._check_loaded(path, info, new_parts, replaces_head)
        if wanted_heads and not stored_heads:
            model.add_auxiliary_heads()
        elif stored_heads and not wanted_heads:
            model.remove_auxiliary_heads()
        return (model, info) if return_info else model

    def _starts_new_method(self, stored: dict[str, Any]) -> bool:
        """Whether it wants, on weights of another method or of none, one that learns without auxiliary heads."""
        method = find_token_reducer(self.config)
        if method is None or not method.learns or method.supports_auxiliary_heads:
            return False
        return stored.get("token_reducer", CroprViTConfig.token_reducer) != method.name

    def _check_loaded(
        self, path: str | os.PathLike, info: dict[str, Any], new_parts: Sequence[str], replaces_head: bool
    ) -> None:
        """Raises `ValueError` for weights that should have been in the checkpoint, or not.

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
        if not replaces_head:
            refuse_resized(path, info["mismatched_keys"], REPLACED_HEAD)
        missing = [name for name in info["missing_keys"] if "head" not in new_parts or name.startswith(prefix)]
        missing = sorted(name for name in missing if not any(part in name for part in new_parts))
        if missing:
            raise ValueError(
                f"The checkpoint {path} lacks {len(missing)} weights of the model, such as {', '.join(missing[:3])}: "
                "it is incomplete, belongs to another configuration, or is not a Cropr ViT (`from_vit` starts from "
                "other ViTs). New token reducers need `use_auxiliary_heads=True`, and training."
            )
        parts = {name for name, _ in self.base_model.named_children()}  # of the backbone; heads may be of another task
        names = {name: name.removeprefix(f"{self.base_model_prefix}.") for name in info["unexpected_keys"]}
        refuse_unexpected(path, [name for name, own in names.items() if own.partition(".")[0] in parts])

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        *args: Any,
        strip_auxiliary_heads: bool | None = None,
        with_code: bool | None = None,
        beside: Callable[[str], Any] | None = None,
        replaced: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        """Saves for publishing: stripped weights, with `training_config/config.json` to train them again, and the code
        that runs them.

        A folder that the Trainer resumes from (`checkpoint-<step>`) gets the complete weights. The model in memory
        does not change. A folder that held another model holds that one until all files are written, and then this
        one, in one step (see `folders.staged`), whatever interrupts the save; its card, record and picture go with it.
        See `PreTrainedModel.save_pretrained` for the rest.

        Except in a folder to resume from, `record.json` and the model card `README.md` lie beside the weights (where
        `cropr_hf` is installed); a card that somebody wrote or changed by hand stays,
        and so does `pruning.png` if it shows that.

        Args:
            strip_auxiliary_heads: `None` is as above; `True` and `False` decide.
            with_code: whether the code is saved as well, so that the folder loads through the Auto classes with
                `trust_remote_code=True` where `cropr_hf` is not installed. By default it is, except in a folder to
                resume from, and for a token reducer or a model that this package does not have.
            beside: writes into the folder that it is given what belongs to the model besides, such as
                `image_processor.save_pretrained`. It is saved, and uploaded, together with the model.
            replaced: patterns of further files, relative to the folder, which belong to a model that is there already,
                and go with it.

        Raises:
            `ValueError`: for a distributed checkpoint, which can only be complete; with `with_code=True`, for what
                this package does not have.
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
            state_dict = strip_state_dict(weights, self.config)
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
        # Without a model beside them, they were saved there for this one.
        is_replaced = os.path.exists(os.path.join(save_directory, CONFIG_NAME))
        beside_another = (*replaced, *self.code_patterns()) if is_replaced else ()
        stale = [*_stale_files(kwargs.get("variant")), *beside_another]
        if is_published:
            card = own_card(save_directory)
            stale += [*_stale_facts(card), *([CARD_NAME] if card is None else [])]
        with staged(save_directory, CONFIG_NAME, stale) as staging:
            if beside is not None:
                beside(staging)
            fields = find_token_reducer(self.config).stripped_fields(self.config) if strip else {}
            brings_code = is_published if with_code is None else with_code
            auto_map = getattr(self.config, "auto_map", None)
            if self.write_code is not None:
                auto_map = self.write_code(staging, with_code) if brings_code else None
            with _changed(self.config, fields, auto_map):
                super().save_pretrained(staging, True, state_dict, False, *args, **kwargs)
                if is_published and self.write_card is not None:
                    self.write_card(staging, repo_id or folder, num_parameters, save_directory)
            if strip:
                _save_training_config(staging, type(self.config))
            if not kwargs.get("variant"):  # variants share a configuration
                _identify_weights(staging)
            if push_to_hub:
                _upload(staging, repo_id or folder, weights_variant=kwargs.get("variant"), **hub_kwargs)

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

        A card on the Hub that somebody wrote or changed by hand stays, with the picture that it shows. See
        `PreTrainedModel.push_to_hub` for the arguments.
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


@contextmanager
def _changed(config: PreTrainedConfig, fields: Mapping[str, Any], auto_map: dict[str, str] | None) -> Iterator[None]:
    """A configuration with other values, and this `auto_map` or none, for a while."""
    own = dict(vars(config))
    try:
        for name, value in fields.items():
            setattr(config, name, value)
        vars(config).pop("auto_map", None)  # a stored null would not load
        if auto_map:
            config.auto_map = auto_map
        yield
    finally:
        vars(config).clear()
        vars(config).update(own)


def refuse_unexpected(path: str | os.PathLike, names: Iterable[str]) -> None:
    """Raises `ValueError` for weights of the backbone in a checkpoint that its configuration has no place for."""
    if names := sorted(names):
        raise ValueError(
            f"The checkpoint {path} has {len(names)} weights of the backbone that the configuration has no place for, "
            f"such as {', '.join(names[:3])}: the configuration is of another model, or was changed. Restore its "
            "fields, or load the model that belongs to it."
        )


class ShapesDiffer(ValueError, RuntimeError):
    """Weights of other shapes than the model's: a `ValueError` as everywhere here, and what Transformers raises."""


def refuse_resized(
    path: str | os.PathLike, mismatched: Collection[Any], remedy: str = "restore its fields, or the weights"
) -> None:
    """Raises `ShapesDiffer` for weights of other shapes, as the loading report of Transformers lists them."""
    if mismatched:
        name, stored, own = min(mismatched)
        raise ShapesDiffer(
            f"The checkpoint {path} has {name} of the shape {tuple(stored)}, the configuration says {tuple(own)}; "
            f"{remedy}."
        )


@contextmanager
def named_damage(path: str | os.PathLike) -> Iterator[None]:
    """Turns errors of readers that met a damaged or foreign file into a `ValueError` that names its folder.

    What an error is follows from its type, and from the code that raised it: words differ from release to release.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error.__context__, (json.JSONDecodeError, UnicodeDecodeError)):
            raise ValueError(
                f"The `config.json` of {path} is not valid JSON ({error.__context__}); save the model again."
            ) from error
        if os.path.isdir(path):
            raise OSError(f"{error} Save the model in {path} again, or give the folder that holds it.") from error
        raise
    except Exception as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        modules = [frame.f_globals.get("__name__") for frame in frames]
        # Whatever `torch.load` raises: junk makes it fail in any way, and its words advise to run what is there.
        is_pickle = torch.load.__module__ in modules
        if is_pickle or isinstance(error, (SafetensorError, json.JSONDecodeError)):
            reason = "what it holds is not tensors" if is_pickle else error
            text = f"The weights in {path} are damaged or truncated ({reason}); save them again."
            raise ValueError(text) from error
        # Transformers calls the class with the caller's arguments, and those it does not take never get there.
        is_call = modules[-1] == PreTrainedModel.__module__ and frames[-1].f_code.co_name == "from_pretrained"
        is_argument = isinstance(error, TypeError) and is_call
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
    with named_damage(path):
        stored, _ = CroprViTConfig.get_config_dict(path, **where)
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


def strip_state_dict(state_dict: dict[str, torch.Tensor], config: CroprViTConfig) -> dict[str, torch.Tensor]:
    """Weights of the stripped model from those of a model with auxiliary heads; others pass unchanged.

    It reads nothing but `state_dict` and the configuration of the latter, so it also serves gathered weights (FSDP,
    DeepSpeed).
    """
    method = find_token_reducer(config)
    stripped: dict[str, torch.Tensor] = {}
    modules: dict[tuple[str, int], dict[str, torch.Tensor]] = {}
    for name, tensor in state_dict.items():
        if match := re.fullmatch(r"((?:.*\.)?)token_reducers\.(\d+)\.(.+)", name):
            modules.setdefault((match[1], int(match[2])), {})[match[3]] = tensor
        else:
            stripped[name] = tensor
    for (prefix, block), weights in modules.items():
        place = f"{prefix}layers.{block - 1}."
        layer = {name.removeprefix(place): tensor for name, tensor in stripped.items() if name.startswith(place)}
        folded = method.fold(config, block, weights, layer)
        stripped |= {place + name: tensor for name, tensor in folded.items()}
        place = f"{prefix}token_reducers.{block}."
        stripped |= {place + name: tensor for name, tensor in method.strip(weights).items()}
    return stripped


def _save_training_config(folder: str, config_class: type[PreTrainedConfig]) -> None:
    """Beside a stripped `config.json`, the same with heads on, and for remote code the files that read it."""
    with open(os.path.join(folder, CONFIG_NAME), encoding="utf-8") as file:
        stored = json.load(file)
    training_folder = os.path.join(folder, TRAINING_CONFIG_FOLDER)
    os.makedirs(training_folder)
    with open(os.path.join(training_folder, CONFIG_NAME), "w", encoding="utf-8") as file:
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
    card = _own_card_on_hub(api, repo_id, revision)
    kept = None if card is None else [CARD_NAME]
    if os.path.exists(os.path.join(folder, CONFIG_NAME)):  # not adapters alone
        kwargs["delete_patterns"] = [*_stale_files(weights_variant), *_stale_facts(card)]
    return api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, ignore_patterns=kept, **kwargs)


def _own_card_on_hub(api: HfApi, repo_id: str, revision: str | None) -> str | None:
    """See `own_card`."""
    if not api.file_exists(repo_id, CARD_NAME, revision=revision):
        return None
    return own_card(os.path.dirname(api.hf_hub_download(repo_id, CARD_NAME, revision=revision)))


def own_card(folder: str | os.PathLike) -> str | None:
    """The text of the card in a folder that somebody wrote or took over; `None` if there is none."""
    path = os.path.join(folder, CARD_NAME)
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read()
    return None if CARD_MARK in text else text


def _stale_facts(card: str | None) -> list[str]:
    """What must not stay of what was said about an older model; a picture stays that somebody's own card shows."""
    return [RECORD_NAME] if card is not None and PICTURE_NAME in card else [RECORD_NAME, PICTURE_NAME]


def _stale_files(variant: str | None) -> list[str]:
    """Patterns of what must not stay of an older model: its training configuration, and its files with weights, whole,
    in shards, and the index of shards, of which loading takes the first it finds.
    """
    dotted = f".{variant}" if variant else ""
    shard = f"model{dotted}-?????-of-?????.safetensors"
    index = f"model.safetensors.index{dotted}.json"
    return [f"{TRAINING_CONFIG_FOLDER}/*", f"model{dotted}.safetensors", shard, index]


def _identify_weights(folder: str) -> None:
    """Writes into `config.json` and into each file of weights which weights they are, a digest of all of them.

    The files are read once: each is copied with a blank in its header, which is filled in when the digest is known.
    """
    files = sorted(glob.glob(os.path.join(glob.escape(folder), "*.safetensors")))
    config = os.path.join(folder, CONFIG_NAME)
    if not files or not os.path.exists(config):  # adapters alone, for instance
        return
    digest, headers = hashlib.sha256(), {}
    for path in files:  # 8 bytes with the length of the header, the header in JSON, the weights
        with open(path, "rb") as source, open(f"{path}.new", "wb") as target:
            length = source.read(8)
            text = source.read(int.from_bytes(length, "little"))
            headers[path] = json.loads(text)
            target.write(_header(headers[path], "0" * ID_DIGITS))
            digest.update(length + text)
            while chunk := source.read(2**24):
                digest.update(chunk)
                target.write(chunk)
        os.replace(f"{path}.new", path)
    weights_id = digest.hexdigest()[:ID_DIGITS]
    for path, header in headers.items():
        with open(path, "r+b") as target:
            target.write(_header(header, weights_id))
    with open(config, encoding="utf-8") as file:
        stored = json.load(file)
    with open(config, "w", encoding="utf-8") as file:
        json.dump({**stored, WEIGHTS_ID: weights_id}, file, indent=2, sort_keys=True)


def _header(header: dict[str, Any], weights_id: str) -> bytes:
    """The beginning of a file of weights, as long for one identity as for another."""
    metadata = {**header.get("__metadata__", {}), WEIGHTS_ID: weights_id}
    text = json.dumps({**header, "__metadata__": metadata}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _check_weights_id(folder: str, weights_ids: set[str | None]) -> list[tuple[int, int]]:
    """Raises `ValueError` if the weights in a folder are others than those that a configuration says it belongs to.

    Returns:
        What tells these files of weights from any that replace them, even by the same weights.
    """
    path = os.path.join(folder, "model.safetensors")
    files = [path]
    if not os.path.exists(path):
        try:
            with open(f"{path}.index.json", encoding="utf-8") as file:
                files = [os.path.join(folder, name) for name in sorted({*json.load(file)["weight_map"].values()})]
        except FileNotFoundError:
            return []  # loading says what is missing
    files = [path for path in files if os.path.exists(path)]
    for path in files:
        with safe_open(path, "pt") as weights:
            weights_ids = weights_ids | {(weights.metadata() or {}).get(WEIGHTS_ID)}
    if len(weights_ids - {None}) > 1:
        raise _mixture(folder)
    return [(status.st_ino, status.st_mtime_ns) for status in map(os.stat, files)]


def _mixture(folder: str) -> ValueError:
    return ValueError(
        f"The configuration and the weights in {folder} were not saved together: files of two models were mixed, or "
        "somebody is saving there at this moment. Load the model and its configuration again, or save it again."
    )
