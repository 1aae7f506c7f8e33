# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What the training scripts share: arguments, loading a model to train, splits of a data set, the run itself."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from datasets import DatasetDict, Image
from transformers import AutoConfig, AutoImageProcessor, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from cropr_hf import CroprViTConfig, has_auxiliary_heads
from cropr_hf.training import PruningCurriculum


CLUTTERED_DIGITS = "cluttered_digits"
EVA02 = "timm/eva02_large_patch14_224.mim_m38m"


def argument(default: Any, text: str) -> Any:
    """A dataclass field with a line of help."""
    return field(default=default, metadata={"help": text})


@dataclass
class ModelArguments:
    """Which model to start from, and how it prunes."""

    model_name_or_path: str = argument("facebook/vit-mae-large", "A ViT of a supported family, or a Cropr checkpoint.")
    image_processor_name: str | None = argument(None, "Image processor, if not that of the model.")
    token_reducer: str | None = argument(None, "'cropr' (default for an unpruned source), 'random' or 'none'.")
    pruning_rate: int | None = argument(None, "Patch tokens removed per module (R).")
    pruning_schedule: list[int] | None = argument(None, "Patch tokens kept after each block, instead of a rate.")
    last_layer_fusion: bool | None = argument(None, "Put pruned tokens back before the last block (default).")
    image_size: int | None = argument(None, "Input size in pixels, if not that of the source.")
    patch_size: int | None = argument(None, "Patch size in pixels, if not that of the source.")
    drop_path_rate: float = argument(0.2, "Stochastic depth of the last but one block.")
    label_smoothing: float = argument(0.0, "Of the main and the auxiliary losses.")
    ignore_mismatched_sizes: bool = argument(False, "Accept another number of classes in a Cropr checkpoint.")
    revision: str | None = argument(None, "Branch, tag or commit on the Hub.")
    token: str | None = argument(None, "Hub token for private models and data sets.")

    def overrides(self) -> dict[str, Any]:
        """Fields of the configuration that are given."""
        given = ("token_reducer", "pruning_rate", "pruning_schedule", "last_layer_fusion", "image_size", "patch_size")
        fields = {name: getattr(self, name) for name in given if getattr(self, name) is not None}
        if self.token_reducer == "none":
            fields["token_reducer"] = None
        return fields | {"drop_path_rate": self.drop_path_rate, "label_smoothing": self.label_smoothing}

    def hub(self) -> dict[str, str]:
        """Those of `revision` and `token` that are given."""
        return {name: value for name in ("revision", "token") if (value := getattr(self, name)) is not None}


@dataclass
class Eva02Arguments(ModelArguments):
    """`ModelArguments` whose default model is EVA-02-L, prepared by the fields in `recipe`."""

    recipe: ClassVar[dict[str, Any]] = {}
    model_name_or_path: str = argument(EVA02, "A ViT of a supported family, or a Cropr checkpoint.")

    def overrides(self) -> dict[str, Any]:
        """See `ModelArguments.overrides`."""
        fields = super().overrides()
        if self.model_name_or_path != EVA02:
            return fields
        pruning = {"pruning_rate", "pruning_schedule"}
        replaced = pruning if pruning & fields.keys() or self.token_reducer == "none" else set()
        recipe = {name: value for name, value in self.recipe.items() if name not in replaced}
        resized = {"image_size", "patch_size"} & fields.keys()
        if "pruning_schedule" in recipe and any(fields[name] != recipe[name] for name in resized):
            raise ValueError(
                f"The schedule of the recipe is for {recipe['image_size']} pixels in patches of "
                f"{recipe['patch_size']}; give --pruning_schedule or --pruning_rate for another size."
            )
        return recipe | fields


@dataclass
class RecipeArguments(TrainingArguments):
    """`TrainingArguments` with layer-wise decay and the curriculum."""

    do_train: bool = argument(True, "Whether to train, or only to evaluate.")
    weight_decay: float = argument(0.05, "Of matrices; vectors, prefix tokens and positions have none.")
    layer_decay: float = argument(0.75, "Factor of the learning rate per block, from the head down.")
    pruning_curriculum: float = argument(0.0, "Share of the training over which pruning grows from nothing; 0 is off.")
    eval_strategy: str = argument("epoch", "When to evaluate.")
    save_strategy: str = argument("epoch", "When to write a checkpoint.")
    logging_steps: float = argument(50, "Steps between logs.")
    remove_unused_columns: bool | None = argument(False, "The transforms need the image column.")


def load_model(model_class: Any, args: ModelArguments, label_names: list[str], **fields: Any) -> Any:
    """A prunable model from a Cropr checkpoint or from another pretrained ViT, with one output per label."""
    overrides = args.overrides() | fields
    overrides["id2label"] = dict(enumerate(label_names))
    overrides["label2id"] = {name: index for index, name in enumerate(label_names)}
    stored = cropr_config(args.model_name_or_path, **args.hub())
    if stored is None:
        return model_class.from_vit(args.model_name_or_path, **overrides, **args.hub())
    reducer = overrides.get("token_reducer", stored.token_reducer)
    overrides["use_auxiliary_heads"] = has_auxiliary_heads(reducer)
    return model_class.from_pretrained(
        args.model_name_or_path, ignore_mismatched_sizes=args.ignore_mismatched_sizes, **overrides, **args.hub()
    )


def cropr_config(name_or_path: str, **hub: Any) -> CroprViTConfig | None:
    """The configuration of a Cropr ViT; `None` if the folder or repository holds something else."""
    try:
        config = AutoConfig.from_pretrained(name_or_path, **hub)
    except (OSError, ValueError):  # a timm model has no Transformers configuration
        return None
    return config if config.model_type == CroprViTConfig.model_type else None


def normalization(args: ModelArguments) -> dict[str, Any]:
    """Mean and standard deviation that the source was trained with, as image processors take them."""
    name = args.image_processor_name or args.model_name_or_path
    try:
        processor = AutoImageProcessor.from_pretrained(name, **args.hub())
        return {"image_mean": processor.image_mean, "image_std": processor.image_std}
    except (OSError, ValueError, AttributeError) as error:  # timm models have none
        pretrained = timm_pretrained_config(name)
        if pretrained is None:
            raise ValueError(
                f"{name} has no image processor with a mean and a standard deviation; name another model's by "
                "--image_processor_name."
            ) from error
        return {"image_mean": list(pretrained.mean), "image_std": list(pretrained.std)}


def timm_pretrained_config(name: str) -> Any:
    """What timm knows about a pretrained model; `None` if it is not one."""
    try:
        import timm
    except ImportError:
        return None
    return timm.get_pretrained_cfg(name.split("/")[-1], allow_unregistered=True)


def input_size(config: CroprViTConfig) -> dict[str, int]:
    """Height and width of the model's input, as image processors take them."""
    height, width = (length * config.patch_size for length in config.grid_size)
    return {"height": height, "width": width}


def draw_digits(args: Any, seed: int, **settings: Any) -> DatasetDict:
    """Cluttered digits for training and validation, as many as the data arguments of a script say.

    `settings` are those of `cluttered_digits.DigitPainter`.
    """
    from cluttered_digits import cluttered_digits

    splits = {"train": args.max_train_samples or 20_000, "validation": args.max_eval_samples or 2_000}
    return DatasetDict(
        {split: cluttered_digits(split, count, seed=seed, **settings) for split, count in splits.items()}
    )


def prepare_splits(images: DatasetDict, args: Any, share: float, seed: int) -> DatasetDict:
    """The splits `train` and `validation` of a data set, with images in RGB.

    Args:
        args: the data arguments of a script: names of the columns, and how many images to use at most.
        share: of the training images to validate on, if there is no validation split.

    Raises:
        `ValueError`: when the data set has no split `train`, or lacks a column.
    """
    if "train" not in images:
        raise ValueError(f"The data set has no split 'train', only {', '.join(images)}; choose another.")
    missing = {args.image_column_name, args.label_column_name} - set(images["train"].column_names)
    if missing:
        raise ValueError(
            f"The data set has no column {', '.join(sorted(missing))}, only "
            f"{', '.join(images['train'].column_names)}; name them by --image_column_name and --label_column_name."
        )
    if "validation" not in images:
        split = images["train"].train_test_split(share, seed=seed)
        images = DatasetDict(train=split["train"], validation=split["test"])
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples}
    for split, limit in limits.items():
        if limit is not None:
            images[split] = images[split].shuffle(seed=seed).select(range(min(limit, len(images[split]))))
    images = DatasetDict({split: images[split] for split in limits})
    return images.cast_column(args.image_column_name, Image(mode="RGB"))


def run(trainer: Trainer, finetuned_from: str, task: str) -> dict[str, float]:
    """Trains (or goes on), saves the stripped model, evaluates and publishes, as the arguments say."""
    args: Any = trainer.args
    if args.pruning_curriculum > 0 and trainer.model.config.token_reducer is not None:
        # A compiled model compiles each schedule anew, and gives up after 8.
        levels = 6 if args.torch_compile else 32
        trainer.add_callback(PruningCurriculum(args.pruning_curriculum, levels))
    if args.do_train:
        checkpoint = args.resume_from_checkpoint
        if checkpoint is not None and checkpoint.lower() in ("true", "last"):
            checkpoint = get_last_checkpoint(args.output_dir)
        result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()  # stripped: ready to publish
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    if args.push_to_hub:
        trainer.push_to_hub(finetuned_from=finetuned_from, tasks=task)
    return metrics
