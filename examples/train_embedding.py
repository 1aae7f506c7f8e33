# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Prune an image encoder without labels: the unpruned source is the teacher of its pruned self.

For the vision towers of CLIP and SigLIP, DINO and others, whose embeddings serve retrieval, zero-shot classification
and frozen backbones. Any images will do that look like those to come:

    accelerate launch examples/train_embedding.py --model_name_or_path facebook/dinov2-base --pruning_rate 20 \\
        --train_dir photographs --output_dir outputs/dinov2 --bf16 --dataloader_num_workers 8

`--dataset_name cluttered_digits` draws its images on the spot and needs no network:

    python examples/train_embedding.py --model_name_or_path examples/digits_vit --dataset_name cluttered_digits \\
        --pruning_rate 20 --crop_min_scale 1 --horizontal_flip 0 --output_dir outputs/digits_embedding

On images that were held out it compares the embeddings with those of the teacher: see `embedding_metrics`. With
`--label_column_name` it compares as well which class both give by their nearest neighbours among training images; that
is all that labels are for. What pruning costs without training, by chance or by merging:

    python examples/train_embedding.py --do_train False --token_reducer tome --pruning_rate 20 ...
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from embedding_metrics import embedding_agreement, knn_agreement
from shared import (
    ModelArguments,
    RecipeArguments,
    load_model,
    parse_arguments,
    run,
    set_transforms,
)
from teacher import TeacherArguments, unpruned_source
from train_image_classification import ImageArguments, Transform, augmentation, image_processor, load_images
from transformers import EvalPrediction, set_seed
from transformers.hf_argparser import HfArg

from cropr_hf import CroprViTModel
from cropr_hf.training import CroprTrainer, Distillation, layer_decay_optimizer


@dataclass
class EncoderArguments(TeacherArguments, ModelArguments):
    """`ModelArguments`, and what is learned from whom."""

    drop_path_rate: float = HfArg(default=0.0, help="Stochastic depth of the last but one block.")
    teacher_name_or_path: str | None = HfArg(
        default=None, help="Whose embeddings to learn; by default those of --model_name_or_path, unpruned."
    )
    distill_embedding: float = HfArg(default=1.0, help="Weight of 1 - cosine of the embeddings.")

    def distillation(self) -> Distillation:
        """See `TeacherArguments.distillation`; weights of 0 are an error: there is nothing else to learn."""
        return super().distillation() or Distillation()

    def default_teacher(self, label_names: Sequence[str] | None) -> Any:
        """See `TeacherArguments.default_teacher`: the model to start from."""
        return unpruned_source(CroprViTModel, self)


@dataclass
class UnlabelledArguments(ImageArguments):
    """`ImageArguments` for images of which nobody knows what they show."""

    label_column_name: str | None = HfArg(
        default=None, help="Column of classes, for the comparison of nearest neighbours alone."
    )
    crop_min_scale: float = HfArg(default=0.35, help="Smallest share of the image in a random crop; 1 is no crop.")
    randaugment_magnitude: int = HfArg(
        default=0, help="RandAugment of timm with operations of about this magnitude (0 to 10); 0 is none."
    )
    random_erasing: float = HfArg(default=0.0, help="Probability of replacing a rectangle by noise.")
    gallery_images: int = HfArg(default=5000, help="Training images among which nearest neighbours are looked for.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gallery_images < 1:
            raise ValueError(f"--gallery_images is {self.gallery_images}; give 1 or more.")


@dataclass
class EmbeddingArguments(RecipeArguments):
    """`TrainingArguments` for a short training of a model that is trained already."""

    output_dir: str = HfArg(default="outputs/embedding", help="Where checkpoints and the stripped model go.")
    num_train_epochs: float = HfArg(default=10, help="Passes over the training images.")
    learning_rate: float = HfArg(default=5e-4, help="Peak learning rate of the Cropr modules.")
    lr_scheduler_type: str = HfArg(default="cosine_with_min_lr", help="Learning-rate schedule.")
    lr_scheduler_kwargs: dict | str | None = field(default_factory=lambda: {"min_lr": 1e-6})
    warmup_steps: float = HfArg(default=0.1, help="Steps of linear warm-up, or their share if below 1.")
    max_grad_norm: float = HfArg(default=1.0, help="Largest norm of the gradient; 0 is no limit.")
    pruning_curriculum: float = HfArg(
        default=0.5, help="Share of the training over which pruning grows from nothing; 0 is off."
    )
    per_device_train_batch_size: int = HfArg(default=64, help="Images per process and step.")
    per_device_eval_batch_size: int = HfArg(default=64, help="Images per process and evaluation step.")


class PixelTransform(Transform):
    """`Transform` without classes."""

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """A batch of columns, as `Dataset.set_transform` gives it."""
        return {"pixel_values": [self.pixels(image) for image in self.pictures(batch)]}


class Agreement:
    """The metrics of an evaluation, from the embeddings of held-out images, and of a gallery if there is one.

    Args:
        gallery: images as evaluation sees them, or `None`.
        labels: their classes (images,).
    """

    def __init__(self, gallery: Dataset | None = None, labels: torch.Tensor | None = None):
        self.gallery, self.labels = gallery, labels
        self.trainer: Any = None

    def __call__(self, predicted: EvalPrediction) -> dict[str, float]:
        """Metrics by name; see `embedding_metrics`."""
        student, teacher = (torch.from_numpy(embeddings) for embeddings in predicted.predictions)
        metrics = embedding_agreement(student, teacher)
        if self.gallery is not None and self.labels is not None:
            metrics["knn_agreement"] = knn_agreement(student, teacher, *self.embed_gallery(), self.labels)
        return metrics

    def embed_gallery(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of the gallery by the model and by the teacher, (images, channels) each."""
        found = []
        for batch in self.trainer.get_test_dataloader(self.gallery):
            _, embeddings, _ = self.trainer.prediction_step(self.trainer.model, batch, prediction_loss_only=False)
            found.append(self.trainer.accelerator.gather_for_metrics(embeddings))
        student, teacher = (torch.cat(embeddings).float().cpu() for embeddings in zip(*found))
        return student, teacher


def split_gallery(images: Any, args: UnlabelledArguments, transform: Any, seed: int) -> Agreement:
    """The metrics, with a gallery of training images where these have classes and are not streamed."""
    train = images["train"]
    if args.label_column_name is None or not isinstance(train, Dataset):
        return Agreement()
    gallery = train.shuffle(seed=seed).select(range(min(args.gallery_images, len(train))))
    labels = torch.tensor(gallery[args.label_column_name][:])
    if labels.is_floating_point() or labels.min() < 0:
        raise ValueError(f"The column {args.label_column_name!r} has numbers that are not of a class; leave it out.")
    gallery.set_transform(transform)
    return Agreement(gallery, labels)


def stack(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Examples -> `pixel_values` (B, channels, height, width)."""
    return {"pixel_values": torch.stack([example["pixel_values"] for example in examples])}


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Trains, evaluates and saves; returns the evaluation metrics. `arguments` are those of the command line."""
    classes = (EncoderArguments, UnlabelledArguments, EmbeddingArguments)
    model_args, data_args, training_args = parse_arguments(classes, arguments)
    set_seed(training_args.seed)

    teaching = model_args.teaching()
    images = load_images(data_args, model_args.token, training_args.seed)
    model = load_model(CroprViTModel, model_args, None, auxiliary_task="embedding")
    processor = image_processor(model.config, data_args, model_args)
    evaluation = PixelTransform(data_args, processor)
    metrics = split_gallery(images, data_args, evaluation, training_args.seed)
    train = PixelTransform(data_args, processor, augmentation(model.config, data_args, processor))
    set_transforms(images, train, evaluation, data_args, training_args)

    trainer = CroprTrainer(
        model=model,
        args=training_args,
        train_dataset=images["train"],
        eval_dataset=images["validation"],
        data_collator=stack,
        processing_class=processor,
        compute_metrics=metrics,
        optimizer_cls_and_kwargs=layer_decay_optimizer(
            model, training_args, training_args.layer_decay, training_args.backbone_learning_rate
        ),
        **teaching,
    )
    metrics.trainer = trainer
    return run(trainer, model_args, data_args)


if __name__ == "__main__":
    main()
