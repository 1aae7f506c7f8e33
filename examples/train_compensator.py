# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Train a token compensator: what lets a model that was trained with ToMe at one rate run at another.

It is distilled once for a classifier, on the images that this was trained on, without labels, and then serves every
model that is fine-tuned from it: see `cropr_hf.methods.load_compensator`. The defaults are those of the authors for
1024 images in a step:

    accelerate launch --num_processes 8 examples/train_compensator.py --bf16 --dataloader_num_workers 8 \\
        --model_name_or_path facebook/deit-base-patch16-224 --dataset_name ILSVRC/imagenet-1k \\
        --per_device_train_batch_size 128 --output_dir outputs/deit_base_compensator

In each step student and teacher are the same frozen model. The teacher merges at one rate that is drawn, the student
at another, and the compensator learns to make up for the difference. What is written is the compensator alone, and how
far it brings the two together on images that were held out.
"""

import copy
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from shared import cropr_config, given_fields, parse_arguments, set_transforms
from train_embedding import PixelTransform, stack
from train_image_classification import ImageArguments, augmentation, image_processor, load_images
from transformers import AutoConfig, TrainerCallback, TrainingArguments, set_seed
from transformers.hf_argparser import HfArg

from cropr_hf import CroprViTForImageClassification
from cropr_hf.arguments import parse_config
from cropr_hf.methods import ToComConfig, save_compensator
from cropr_hf.training import CroprTrainer, Distillation
from cropr_hf.training.distillation import logits_loss


@dataclass
class BackboneArguments:
    """For which model, and how large the compensator is."""

    model_name_or_path: str = HfArg(
        default="facebook/deit-base-patch16-224", help="A trained classifier, whose weights stay as they are."
    )
    image_processor_name: str | None = HfArg(default=None, help="Image processor, if not that of the model.")
    reducer_config: str | None = HfArg(
        default=None, help="Fields of ToCom and ToMe, as JSON, such as '{\"max_rate\": 8}'."
    )
    drop_path_rate: float = HfArg(default=0.1, help="Stochastic depth of the student's last but one block.")
    revision: str | None = HfArg(default=None, help="Branch, tag or commit on the Hub.")
    token: str | None = HfArg(default=None, help="Hub token for private models and data sets.")

    def hub(self) -> dict[str, str]:
        """Those of `revision` and `token` that are given."""
        return given_fields(self, ["revision", "token"])


@dataclass
class UnlabelledArguments(ImageArguments):
    """`ImageArguments` for images of which nobody has to know what they show."""

    label_column_name: str | None = HfArg(default=None, help="Column of the classes, which are not used.")


@dataclass
class CompensatorArguments(TrainingArguments):
    """`TrainingArguments` with the defaults of the authors' code for 1024 images in a step."""

    output_dir: str = HfArg(default="outputs/compensator", help="Where checkpoints and the compensator go.")
    num_train_epochs: float = HfArg(default=10, help="Passes over the training images.")
    learning_rate: float = HfArg(default=2e-3, help="Peak learning rate.")
    weight_decay: float = HfArg(default=0.05, help="Of all weights.")
    lr_scheduler_type: str = HfArg(default="cosine_with_min_lr", help="Learning-rate schedule.")
    lr_scheduler_kwargs: dict | str | None = field(default_factory=lambda: {"min_lr": 1e-5})
    per_device_train_batch_size: int = HfArg(default=64, help="Images per process and step.")
    per_device_eval_batch_size: int = HfArg(default=64, help="Images per process and evaluation step.")
    max_grad_norm: float = HfArg(default=0.0, help="Largest norm of the gradient; 0 is no limit.")
    save_strategy: str = HfArg(default="epoch", help="When to write a checkpoint.")
    logging_steps: float = HfArg(default=50, help="Steps between logs.")
    remove_unused_columns: bool | None = HfArg(default=False, help="The transforms need the image column.")


def load_backbone(args: BackboneArguments) -> CroprViTForImageClassification:
    """The classifier, frozen, with a new compensator, which is trained.

    Raises:
        `ValueError`: for a model that is not a trained classifier.
    """
    check_classifier(args)
    settings = parse_config(args.reducer_config, "reducer_config", '{"max_rate": 8}') if args.reducer_config else None
    fields = {"token_reducer": "tocom", "reducer_config": settings, "pruning_rate": 0, "last_layer_fusion": False}
    fields |= {"use_auxiliary_heads": True, "drop_path_rate": args.drop_path_rate, **args.hub()}
    is_converted = cropr_config(args.model_name_or_path, **args.hub()) is not None
    load = CroprViTForImageClassification.from_pretrained if is_converted else CroprViTForImageClassification.from_vit
    model = load(args.model_name_or_path, **fields)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("token_reducers." in name)
    return model


def check_classifier(args: BackboneArguments) -> None:
    """Raises `ValueError` for a model of Transformers that is no classifier; of timm nobody knows."""
    try:
        config = AutoConfig.from_pretrained(args.model_name_or_path, trust_remote_code=False, **args.hub())
    except (OSError, ValueError):  # a timm model has no Transformers configuration
        return
    architecture = (config.architectures or ["a model of no known class"])[0]
    if "ForImageClassification" not in architecture:
        raise ValueError(
            f"{args.model_name_or_path} holds {architecture}; a compensator learns from the classes that a trained "
            "classifier gives to images: name one."
        )


def set_rates(student: Any, teacher: Any, trained_rate: int | None, rate: int | None) -> None:
    """At which rate the teacher, and with it the weights of both, counts as trained, and at which the student runs.

    `None` is what is configured.
    """
    settings = student.config.reducer_config or {}
    student.config.reducer_config = {**settings, "trained_rate": trained_rate}
    student.set_pruning(rate)
    teacher.set_pruning(trained_rate)


class RatePairs(TrainerCallback):
    """Draws two different rates for each step, all pairs alike; a function of step and seed, the same everywhere.

    Args:
        teacher: the stripped copy of the student.
        max_rate: the highest rate.
    """

    def __init__(self, teacher: Any, max_rate: int):
        self.teacher, self.max_rate = teacher, max_rate

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Sets the rates of the coming step."""
        draw = random.Random(f"seed {args.seed}, step {state.global_step}")
        set_rates(model, self.teacher, *draw.sample(range(self.max_rate + 1), 2))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Back to what is configured, for checkpoints and after the training."""
        set_rates(model, self.teacher, None, None)


class CompensatorTrainer(CroprTrainer):
    """Learns from the teacher alone."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """See `Trainer.compute_loss`: the divergence from the teacher's class probabilities."""
        outputs, autocast = model(**inputs), self.accelerator.autocast()
        loss, *_ = self._distiller.losses(self._bare_model(), outputs, inputs["pixel_values"], autocast)
        return (loss, outputs) if return_outputs else loss


def rate_pairs(max_rate: int) -> list[tuple[int, int]]:
    """Rates of the training and of the run that an evaluation compares."""
    half = max_rate // 2
    return sorted({(0, half), (0, max_rate), (half, max_rate), (max_rate, 0)} - {(0, 0)})


@torch.no_grad()
def divergences(
    student: Any, teacher: Any, batches: Iterable[dict[str, torch.Tensor]], pairs: Sequence[tuple[int, int]]
) -> dict[str, torch.Tensor]:
    """What is left of the mismatch: sums over images of the divergence of a model at one rate from itself at another.

    Args:
        student, teacher: as in the training, in evaluation mode.
        batches: with `pixel_values` (B, channels, height, width).
        pairs: rates of the training and of the run.

    Returns:
        By pair `divergence_<trained rate>_<rate>`, and without the compensator `uncompensated_<trained rate>_<rate>`;
        and `images`, their number.
    """
    sums: dict[str, torch.Tensor] = {}
    for batch in batches:
        pixels = batch["pixel_values"]
        found = {"images": torch.ones((), device=pixels.device)}
        for trained_rate, rate in pairs:
            set_rates(student, teacher, trained_rate, rate)
            wanted = teacher(pixels).logits
            teacher.set_pruning(rate)
            found[f"divergence_{trained_rate}_{rate}"] = logits_loss(student(pixels).logits, wanted)
            found[f"uncompensated_{trained_rate}_{rate}"] = logits_loss(teacher(pixels).logits, wanted)
        sums = {name: sums.get(name, 0) + len(pixels) * value for name, value in found.items()}
    set_rates(student, teacher, None, None)
    return sums


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Trains, evaluates and saves; returns the evaluation metrics. `arguments` are those of the command line."""
    classes = (BackboneArguments, UnlabelledArguments, CompensatorArguments)
    model_args, data_args, training_args = parse_arguments(classes, arguments)
    set_seed(training_args.seed)

    images = load_images(data_args, model_args.token, training_args.seed)
    model = load_backbone(model_args)
    teacher = copy.deepcopy(model)
    teacher.remove_auxiliary_heads()
    max_rate = (model.config.reducer_config or {}).get("max_rate", ToComConfig.max_rate)
    processor = image_processor(model.config, data_args, model_args)
    train = PixelTransform(data_args, processor, augmentation(model.config, data_args, processor))
    set_transforms(images, train, PixelTransform(data_args, processor), data_args, training_args)

    trainer = CompensatorTrainer(
        model=model,
        args=training_args,
        train_dataset=images["train"],
        eval_dataset=images["validation"],
        data_collator=stack,
        callbacks=[RatePairs(teacher, max_rate)],
        teacher=teacher,
        distillation=Distillation(logits=1.0),
    )
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    if trainer.is_world_process_zero():
        save_compensator(model, training_args.output_dir)
    sums = divergences(model.eval(), teacher, trainer.get_eval_dataloader(), rate_pairs(max_rate))
    sums = {name: trainer.accelerator.reduce(total, "sum").item() for name, total in sums.items()}
    count = sums.pop("images")
    metrics = {f"eval_{name}": total / count for name, total in sums.items()}
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    return metrics


if __name__ == "__main__":
    main()
