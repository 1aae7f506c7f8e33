"""Records of what was done with a model, and the model card (README.md) that is rendered from them.

A record is the JSON file `record.json` beside the weights:

- `model`: what it computes (`model_facts`),
- `training`: data, settings, hardware, versions; written by `CroprTrainer`,
- `evaluations`: one entry per data set and split, with its metrics, and where they follow the image the `counts` of
  patches,
- `throughput`: a record of `cropr_hf.speed.benchmark`,
- `metadata`: `language`, `license` and `tags` for the Hub, and the Hub id of a `space` that shows the model.

The card says what the record says, and nothing else.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import TemplateError
from transformers.utils import logging

from ..configuration_cropr_vit import CroprViTConfig
from ..files import finite, source_name, write_file, write_json
from ..saving import CARD_MARK, CARD_NAME, PICTURE_NAME, RECORD_NAME, own_card
from ..speed.cost import multiply_adds, unpruned_config
from ..tasks import find_task
from ..token_reduction import TOKEN_REDUCERS, find_token_reducer, has_auxiliary_heads


logger = logging.get_logger(__name__)

REGISTERS = "import cropr_hf  # registers the models with the Auto classes"
TEMPLATE = resources.files(__package__) / "templates" / "model_card.md"
BAR_LENGTH = 40


def model_facts(
    config: CroprViTConfig,
    class_name: str,
    name: str | None = None,
    num_parameters: int | None = None,
    base_model: str | None = None,
) -> dict[str, Any]:
    """The section `model` of a record.

    Args:
        config: of the model, with its own schedule.
        class_name: such as `"CroprViTForImageClassification"`.
        name: a Hub id, or the name of a folder; the title of the card.
        num_parameters: of the stripped model.
        base_model: what it was fine-tuned from, a Hub id or a folder.
    """
    method = find_token_reducer(config)
    facts: dict[str, Any] = {
        "name": name or class_name,
        "class": class_name,
        "base_model": source_name(base_model) if base_model else None,
        "num_parameters": num_parameters,
        "image_size": list(config.input_size),
        "patch_size": config.patch_size,
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "token_reducer": config.token_reducer,
        "use_auxiliary_heads": config.use_auxiliary_heads,
        "last_layer_fusion": config.last_layer_fusion,
        "num_patches": config.num_patches,
        "patches_kept": config.kept_patches(),
        "multiply_adds": multiply_adds(config),
        "multiply_adds_unpruned": multiply_adds(unpruned_config(config)),
    }
    if method is not None and method.counts_vary(config):
        facts["counts_vary"] = True  # the schedule is not what images have
    return facts


def class_name(model: Any) -> str:
    """Such as `"CroprViTForImageClassification"`, also where sharding has made a class of its own of it."""
    return type(model).__name__.removeprefix("FSDP")


def write_card(
    model: Any, folder: str | os.PathLike, name: str, num_parameters: int, target: str | os.PathLike | None = None
) -> None:
    """Writes the record and the card of a model beside its weights; `save_pretrained` calls it.

    Args:
        model: any `CroprViT*` model; its attribute `record` holds what is known beside the model itself.
        folder: where to write.
        name: a Hub id, or the name of a folder.
        num_parameters: of what is saved.
        target: where the files go from there, if not to stay.
    """
    base = model.config.name_or_path
    if base and target is not None and os.path.abspath(base) == os.path.abspath(target):
        base = None  # it goes back to where it came from
    facts = model_facts(model.config, class_name(model), name, num_parameters, base)
    record = {"model": facts, **(model.record or {})}
    if model.model_tags:
        record["metadata"] = {"tags": model.model_tags, **record.get("metadata", {})}
    write_record(folder, record, target)


def read_record(folder: str | os.PathLike) -> dict[str, Any]:
    """The record in a folder.

    Raises:
        `ValueError`: when there is none, or it is not a JSON object with a section `model`.
    """
    file = Path(folder) / RECORD_NAME
    if not file.is_file():
        raise ValueError(
            f"{folder} has no {RECORD_NAME}; save the model there by `save_pretrained`, which writes one."
        )
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}); save the model again, or correct the file.") from error
    if not isinstance(record, dict) or not isinstance(record.get("model"), dict):
        raise ValueError(f"{file} has no section `model`; save the model again, or correct the file.")
    return record


def write_record(folder: str | os.PathLike, record: dict[str, Any], target: str | os.PathLike | None = None) -> None:
    """Writes a record and the card that says the same.

    A card in `target` (`folder` by default) that somebody wrote, or took over by removing our mark, is left alone.

    Raises:
        `ValueError`: for a record that lacks what the card says; then nothing is written.
    """
    folder, target = Path(folder), Path(folder if target is None else target)
    try:
        text = str(render_card(record, folder))
    except (LookupError, TypeError, AttributeError, ValueError, TemplateError) as error:
        raise ValueError(
            f"The record of {target} does not say what a card needs ({type(error).__name__}: {error}); save the model "
            f"again, or correct {RECORD_NAME}."
        ) from error
    write_json(folder / RECORD_NAME, record)
    if own_card(target) is not None:
        logger.info(f"{target / CARD_NAME} was not written by cropr_hf, or was changed since, and stays as it is.")
        return
    write_file(folder / CARD_NAME, text)


def add_to_record(
    folder: str | os.PathLike, evaluation: dict[str, Any] | None = None, throughput: dict[str, Any] | None = None
) -> None:
    """Adds measurements to the record of a published folder, and writes its card anew.

    Args:
        folder: with weights and `record.json`.
        evaluation: `dataset`, `split`, `num_examples`, `metrics`, such as `{"accuracy": 0.93}`, where they are not
            those of the folder, `settings`, and where images differ in their numbers of patches, `counts`, the summary
            of `cropr_hf.speed.counts.PatchCounts`; it replaces one of the same data set, split and settings.
        throughput: what `cropr_hf.speed.benchmark.run` returns.

    Raises:
        `ValueError`: when the folder has no record, or the evaluation no data set or metrics that are numbers.
    """
    record = read_record(folder)
    if evaluation is not None:
        if missing := {"dataset", "metrics"} - evaluation.keys():
            raise ValueError(
                f"The evaluation has no {', '.join(sorted(missing))}; it must say what was measured on what."
            )
        if wrong := [name for name, value in evaluation["metrics"].items() if not isinstance(value, (int, float))]:
            raise ValueError(f"The metric {wrong[0]!r} is {evaluation['metrics'][wrong[0]]!r}; give a number.")
        record["evaluations"] = merge_evaluation(record.get("evaluations", []), evaluation)
    if throughput is not None:
        record["throughput"] = published_throughput(throughput)
    write_record(folder, record)


def published_throughput(record: dict[str, Any]) -> dict[str, Any]:
    """A record of `cropr_hf.speed.benchmark` without the paths among its arguments."""
    paths = ("model_name_or_path", "output")
    return record | {"arguments": {name: value for name, value in record["arguments"].items() if name not in paths}}


def merge_evaluation(evaluations: list[dict[str, Any]], evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """`evaluations` with one more, which replaces an older one of the same data set, split and settings."""

    def key(entry: dict[str, Any]) -> list[Any]:
        return [entry.get(name) for name in ("dataset", "config", "split", "settings")]

    return [entry for entry in evaluations if key(entry) != key(evaluation)] + [evaluation]


def space_link(name: str) -> str:
    """A link to a Space by its Hub id.

    Raises:
        `ValueError`: for what is no Hub id.
    """
    if not _is_hub_id(name):
        raise ValueError(f"The Space is {name!r}; give its Hub id, OWNER/NAME.")
    return f"[{name}](https://huggingface.co/spaces/{name})"


def render_card(record: Mapping[str, Any], folder: str | os.PathLike | None = None) -> ModelCard:
    """The model card of a record.

    Args:
        record: see the beginning of this file. `published` (a sentence) and `recipe` (a command) are for cards of
            recipes that nobody has run.
        folder: of the model, whose picture and code the card mentions.
    """
    record = finite(record)
    model = record["model"]
    name = model["name"]
    folder = None if folder is None else Path(folder)
    base = model.get("base_model")
    on_hub = bool(base) and _is_hub_id(base)
    training = record.get("training", {})
    has_schedule = model["patches_kept"][-1] < model["num_patches"]
    metadata = record.get("metadata", {})
    method = TOKEN_REDUCERS.get(model["token_reducer"])
    has_code = folder is not None and (folder / "modeling_cropr_vit.py").exists()
    is_pruned = has_schedule or bool(model.get("counts_vary"))
    kind = "token-merging" if method is not None and method.merges else "token-pruning"
    data = ModelCardData(
        library_name="transformers",
        language=metadata.get("language"),
        license=metadata.get("license") or training.get("base_licence"),
        base_model=base if on_hub else None,
        datasets=[training["dataset"]] if _is_hub_id(training.get("dataset") or "") else None,
        pipeline_tag=_pipeline(model["class"]),
        tags=[
            "vision",
            *([model["token_reducer"], kind] if is_pruned else []),
            *(["custom_code"] if has_code else []),
            *metadata.get("tags", []),
        ],
        **({"model_name": name, "eval_results": results} if (results := _eval_results(record)) else {}),
    )
    usage = _usage(model["class"], name, has_code)
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        mark=CARD_MARK,
        text=_text,
        fenced=_fenced,
        name=name,
        summary=_summary(model, is_pruned, is_trained=bool(training)),
        space=space_link(metadata["space"]) if metadata.get("space") else None,
        base_model=f"[{base}](https://huggingface.co/{base})" if on_hub else base and _code(base),
        base_licence=training.get("base_licence"),
        model=model,
        giga=_giga,
        count_rows=_count_rows,
        token_bars=_token_bars(model) if has_schedule else None,
        picture=PICTURE_NAME if folder is not None and (folder / PICTURE_NAME).exists() else None,
        published=record.get("published"),
        recipe=record.get("recipe"),
        evaluations=record.get("evaluations"),
        throughput=record.get("throughput"),
        method=method if is_pruned else None,
        is_stripped=has_auxiliary_heads(model["token_reducer"]) and not model.get("use_auxiliary_heads"),
        usage=usage,
        has_code=has_code and "trust_remote_code" in usage,
        training=_training_table(training),
        settings=_yaml(training.get("settings")),
    )


def _summary(model: Mapping[str, Any], is_pruned: bool, is_trained: bool) -> str:
    found = find_task(model["class"])
    does = "encodes images" if found is None else found[1].summary
    if not is_pruned:
        return f"A vision transformer that {does}."
    name = model["token_reducer"]
    method = TOKEN_REDUCERS.get(name)
    share = 1 - model["patches_kept"][-1] / model["num_patches"]
    if method is None:
        drops = f"drops {share:.0%} of the image patches on the way by {_code(name)}"
        return f"A vision transformer that {does}, and {drops}."
    linked = method.title if method.url is None else f"[{method.title}]({method.url})"
    acts = "merges" if method.merges else "drops"
    free = "" if method.learns or is_trained else ", training-free"
    much = f"{share:.0%} of the image patches"
    if model.get("counts_vary"):
        much = "image patches, of each image as many as it can do without,"
    return f"A vision transformer that {does}, and {acts} {much} on the way by {linked}{free}."


def _pipeline(class_name: str) -> str | None:
    found = find_task(class_name)
    return None if found is None else found[1].pipeline


def _token_bars(model: Mapping[str, Any]) -> str:
    """A bar per run of blocks that work on the same number of patches."""
    total = model["num_patches"]
    patches = [total, *model["patches_kept"][:-1]]
    if model["last_layer_fusion"]:
        patches[-1] = total
    lines = []
    for numbers, kept in _runs(patches):
        blocks = f"block{'s' * ('-' in numbers)} {numbers}"
        bar = "█" * max(1, round(BAR_LENGTH * kept / total))
        lines.append(f"{blocks:<13}{bar:<{BAR_LENGTH}} {kept:>5}")
    return "\n".join(lines)


def _count_rows(counts: Mapping[str, Any]) -> list[list[str]]:
    """A row per run of blocks with equal counts: their numbers, and mean, 10th and 90th percentile over the images."""
    per_block = counts["patches_per_block"]
    runs = _runs(list(zip(*(per_block[name] for name in ("mean", "p10", "p90")))))
    return [[numbers, *(f"{number:.4g}" for number in run)] for numbers, run in runs]


def _runs(values: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Each run of blocks with equal values: their numbers, such as "4" or "5-7", and the value."""
    starts = [block for block, value in enumerate(values) if block == 0 or value != values[block - 1]]
    for start, end in zip(starts, [*starts[1:], len(values)]):
        yield f"{start + 1}" if end == start + 1 else f"{start + 1}-{end}", values[start]


def _giga(count: int) -> str:
    return f"{count / 1e9:.1f} G" if count >= 1e9 else f"{count / 1e6:.0f} M"


def _usage(class_name: str, name: str, has_code: bool) -> str:
    found = find_task(class_name)
    auto_class, pipeline = ("AutoModel", None) if found is None else (found[1].auto_class, found[1].pipeline)
    if auto_class == "AutoBackbone" and not (has_code and _is_hub_id(name)):  # it takes no folder
        return f"from cropr_hf import {class_name}\n\nmodel = {class_name}.from_pretrained({_literal(name)})"
    # As it works for everybody who finds the folder
    lines, flag = ([], ", trust_remote_code=True") if has_code else ([REGISTERS], "")
    if found is not None and found[1].has_loss:  # the pipeline of the others has no use for pruned features
        subtask = ', subtask="instance"' if class_name == "CroprViTForInstanceSegmentation" else ""
        lines += ["from transformers import pipeline", "", f'model = pipeline("{pipeline}", {_literal(name)}{flag})']
        lines.append(f'print(model("image.jpg"{subtask}))')
    else:
        lines += [f"from transformers import {auto_class}", ""]
        lines.append(f"model = {auto_class}.from_pretrained({_literal(name)}{flag})")
    return "\n".join(lines)


def _training_table(training: Mapping[str, Any]) -> dict[str, Any]:
    """What the training section says, except for the settings, in words."""
    labels = {
        "dataset": "data set",
        "split": "split",
        "num_examples": "images",
        "num_epochs": "epochs",
        "num_steps": "steps",
        "batch_size": "images per step",
        "precision": "precision",
        "seed": "seed",
        "loss": "mean loss, auxiliary losses included",
        "teacher": "teacher",
        "machine": "hardware",
        "num_processes": "processes",
        "minutes": "minutes",
        "script": "script",
        "commit": "commit of cropr_hf",
    }
    table = {words: training[key] for key, words in labels.items() if training.get(key) is not None}
    if weights := training.get("distillation"):
        table["learned from the teacher"] = ", ".join(f"{name} {weight}" for name, weight in weights.items())
    if losses := training.get("distillation_losses"):
        table["last losses against it"] = ", ".join(f"{name} {loss}" for name, loss in losses.items())
    if versions := training.get("versions"):
        table["versions"] = ", ".join(f"{library} {version}" for library, version in versions.items())
    return table


def _yaml(settings: Mapping[str, Any] | None) -> str | None:
    return yaml.safe_dump(settings, sort_keys=False, default_flow_style=None) if settings else None


def _eval_results(record: Mapping[str, Any]) -> list[EvalResult]:
    task = _pipeline(record["model"]["class"]) or "other"
    return [
        EvalResult(
            task_type=task,
            dataset_type=evaluation["dataset"],
            dataset_name=evaluation["dataset"],
            dataset_config=evaluation.get("config"),
            dataset_split=evaluation.get("split"),
            dataset_revision=evaluation.get("revision"),
            metric_type=metric,
            metric_name=metric,
            metric_value=value,
        )
        for evaluation in record.get("evaluations", [])
        for metric, value in evaluation["metrics"].items()
        if value is not None  # not a number: the metadata of the Hub has no word for it
    ]


def _text(value: Any) -> str:
    """Anything as text of one line, in a paragraph, heading or cell of a table, of which nothing is markup."""
    line = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"[\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", line)


def _code(value: Any) -> str:
    """Anything as code within a line: the fence is longer than any run of back-ticks in it."""
    line = " ".join(str(value).split())
    fence = "`" * (1 + _longest_run(line))
    padding = " " if "`" in line else ""
    return f"{fence}{padding}{line}{padding}{fence}"


def _fenced(text: str, language: str = "") -> str:
    """A block of code: the fence is longer than any run of back-ticks in it."""
    fence = "`" * max(3, 1 + _longest_run(text))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _literal(name: str) -> str:
    """A name as a string of Python."""
    return json.dumps(name, ensure_ascii=False)


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
