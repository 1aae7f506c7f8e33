# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Trains a small plain ViT on cluttered digits from scratch: the checkpoint that the examples fine-tune with pruning.

    torchrun --nproc_per_node 2 pretrain_digits_vit.py --output_dir digits_vit

Every training image is drawn afresh, so there are no epochs. Three things make this affordable on two CPU cores: the
model is small; the early training is a curriculum (`CURRICULUM`) without clutter and on few patches per image (those
of the digit and some random others); and besides the image, a second linear head classifies each patch (digit or
background). That head is not saved. The last stage and all evaluation run on all patches.

With `torchrun`, the processes share each batch; one process with one thread per core is faster than one with several.
"""

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from cluttered_digits import BACKGROUND, DIGIT_NAMES, DigitPainter
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import HfArgumentParser, ViTConfig, ViTForImageClassification, ViTImageProcessor, set_seed
from transformers.utils import logging


logger = logging.get_logger("transformers.pretrain_digits_vit")

IMAGE_SIZE, PATCH_SIZE = 96, 8
GRID_SIZE = IMAGE_SIZE // PATCH_SIZE
IMAGE_MEAN, IMAGE_STD = 0.25, 0.2  # of pixels in 0..1, about those of the drawn images


@dataclass(frozen=True)
class Stage:
    """A stage of the training: how many images, how many patches the model sees, how the images differ."""

    num_images: int
    num_patches: int
    settings: dict[str, Any] = field(default_factory=dict)


# First harder images (more noise, less contrast, smaller digits) than those the model is for, then these.
HARD: dict[str, Any] = {"digit_size": (26, 32), "noise": 24, "least_ink": 110}
CURRICULUM = (
    Stage(64_000, 20, {**HARD, "num_fragments": 0}),
    Stage(128_000, 32, {**HARD, "num_fragments": 12}),
    Stage(64_000, GRID_SIZE**2, {**HARD, "num_fragments": 12}),
)
REFINEMENT = (Stage(20_480, GRID_SIZE**2),)


@dataclass
class Arguments:
    """Command line arguments."""

    output_dir: str = field(metadata={"help": "Folder for the model and its image processor."})
    continue_from: str | None = field(
        default=None, metadata={"help": "Saved model to refine, without the curriculum."}
    )
    length: float = field(default=1.0, metadata={"help": "Factor on the number of training images of each stage."})
    batch_size: int = field(default=64, metadata={"help": "Images per optimisation step, of all processes."})
    learning_rate: float = field(
        default=1.5e-3, metadata={"help": "Peak learning rate; half of it in the refinement."}
    )
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay of AdamW."})
    warmup_steps: int = field(default=200, metadata={"help": "Warm-up steps, at most a tenth of all."})
    hidden_size: int = field(default=96, metadata={"help": "Width of the tokens."})
    num_layers: int = field(default=6, metadata={"help": "Transformer blocks."})
    num_heads: int = field(default=3, metadata={"help": "Attention heads."})
    eval_images: int = field(default=2000, metadata={"help": "Images of the final validation and test."})
    compile: bool = field(default=True, metadata={"help": "Compile the last stage; needs a C++ compiler."})
    seed: int = field(default=0, metadata={"help": "Seed of the weights and of the training images."})


class DrawnDigits(Dataset):
    """Images `start`, `start + 1`, ... of a stream, each as pixels, label, classes and an order of its patches."""

    def __init__(self, painter: DigitPainter, num_images: int, start: int = 0) -> None:
        self.painter, self.num_images, self.start = painter, num_images, start

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> tuple[np.ndarray, int, np.ndarray, np.ndarray]:
        """Returns four things of an image.

        These are its pixels `[3, height, width]` (0..255), its label, the class of each patch (0..9, or `BACKGROUND`),
        and the patch indices in random order, but those of the digit first.
        """
        drawn = self.painter.draw(self.start + index)
        classes = np.full((GRID_SIZE, GRID_SIZE), BACKGROUND)
        for (x, y, width, height), category in zip(drawn.objects["bbox"], drawn.objects["category"]):
            rows = slice(y // PATCH_SIZE, (y + height - 1) // PATCH_SIZE + 1)
            columns = slice(x // PATCH_SIZE, (x + width - 1) // PATCH_SIZE + 1)
            classes[rows, columns] = category
        classes = classes.ravel()
        rank = np.random.RandomState(self.start + index).uniform(size=len(classes)) + (classes == BACKGROUND)
        return np.asarray(drawn.image).transpose(2, 0, 1).copy(), drawn.label, classes, rank.argsort()


class PatchSubset:
    """Makes a ViT see only some patches of each image while `patches` is set."""

    def __init__(self, model: ViTForImageClassification) -> None:
        self.patches: Tensor | None = None
        self._handle = model.vit.embeddings.register_forward_hook(self._select)

    def remove(self) -> None:
        """Undoes the change to the model."""
        self._handle.remove()

    def _select(self, module: nn.Module, inputs: tuple, tokens: Tensor) -> Tensor:
        """Keeps the [CLS] token and `patches` (indices `[batch, kept]`) of `tokens` `[batch, 1 + patches, width]`."""
        if self.patches is None:
            return tokens
        kept = (1 + self.patches).unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
        return torch.cat([tokens[:, :1], tokens.gather(1, kept)], dim=1)


class Pretraining(nn.Module):
    """A ViT classifier with the second head that classifies patches."""

    def __init__(self, model: ViTForImageClassification) -> None:
        super().__init__()
        self.model = model
        self.subset = PatchSubset(model)
        self.patch_head = nn.Linear(model.config.hidden_size, BACKGROUND + 1)

    def forward(self, pixels: Tensor, labels: Tensor, classes: Tensor, patches: Tensor | None) -> tuple[Tensor, int]:
        """Returns the loss and the number of rightly classified images.

        Args:
            pixels: Normalised images, `[batch, 3, height, width]`.
            labels: Classes of the images, `[batch]`.
            classes: Classes of the patches, `[batch, all patches]`.
            patches: Indices of the patches to see, `[batch, seen]`; `None` for all in their order.
        """
        self.subset.patches = patches
        tokens = self.model.vit(pixel_values=pixels).last_hidden_state
        self.subset.patches = None
        if patches is not None:
            classes = classes.gather(1, patches)
        logits = self.model.classifier(tokens[:, 0])
        loss = cross_entropy(logits.float(), labels)
        loss = loss + cross_entropy(self.patch_head(tokens[:, 1:]).flatten(0, 1).float(), classes.flatten())
        return loss, int((logits.argmax(-1) == labels).sum())


def build_model(arguments: Arguments) -> ViTForImageClassification:
    """A plain, randomly initialised ViT classifier with ten classes."""
    config = ViTConfig(
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_size=arguments.hidden_size,
        num_hidden_layers=arguments.num_layers,
        num_attention_heads=arguments.num_heads,
        intermediate_size=4 * arguments.hidden_size,
        initializer_range=0.05,
        id2label=dict(enumerate(DIGIT_NAMES)),
        label2id={name: index for index, name in enumerate(DIGIT_NAMES)},
    )
    model = ViTForImageClassification(config)
    with torch.no_grad():
        model.vit.embeddings.position_embeddings[0, 1:] = position_waves(arguments.hidden_size)
    return model


def position_waves(width: int) -> Tensor:
    """Sines and cosines of the patch positions, `[patches, width]`: from these, neighbourhood is learnt soon."""
    frequencies = math.pi * torch.logspace(0, -1, width // 4, base=GRID_SIZE)
    angles = torch.arange(GRID_SIZE).unsqueeze(1) * frequencies
    waves = 0.3 * torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = waves.repeat_interleave(GRID_SIZE, dim=0), waves.repeat(GRID_SIZE, 1)
    return torch.cat([rows, columns], dim=1)


def normalised(pixels: Tensor) -> Tensor:
    """Normalises pixels (bytes 0..255) as the saved image processor does."""
    return (pixels.float() / 255 - IMAGE_MEAN) / IMAGE_STD


def training_batches(
    stages: tuple[Stage, ...], seed: int, arguments: Arguments, rank: int, world_size: int
) -> Iterator[tuple[Any, ...]]:
    """Yields this process' batches of all stages: the arguments of `Pretraining.forward`."""
    start = 0
    for stage in stages:
        painter = DigitPainter("train", IMAGE_SIZE, seed=seed, **stage.settings)
        data = DrawnDigits(painter, math.ceil(stage.num_images * arguments.length), start)
        start += len(data)
        sampler = DistributedSampler(data, world_size, rank, shuffle=False)
        for pixels, labels, classes, order in DataLoader(data, arguments.batch_size // world_size, sampler=sampler):
            patches = order[:, : stage.num_patches] if stage.num_patches < GRID_SIZE**2 else None
            yield normalised(pixels), labels, classes, patches


def train(
    model: ViTForImageClassification,
    stages: tuple[Stage, ...],
    learning_rate: float,
    seed: int,
    arguments: Arguments,
    rank: int,
    world_size: int,
) -> None:
    """Trains `model` in place: AdamW, linear warm-up, then cosine decay over the patches seen.

    Stages with all patches run compiled and under bfloat16 autocast; with few patches, plain float32 is as fast.
    """
    training = Pretraining(model).train()
    parallel = DistributedDataParallel(training) if world_size > 1 else training
    optimizer = torch.optim.AdamW(
        training.parameters(), learning_rate, weight_decay=arguments.weight_decay, fused=True
    )
    total = arguments.length * sum(stage.num_images * stage.num_patches for stage in stages)
    num_steps = arguments.length * sum(stage.num_images for stage in stages) / arguments.batch_size
    warmup = max(1.0, min(arguments.warmup_steps, num_steps / 10))
    start, patches_seen, seen, right, compiled = time.perf_counter(), 0, 0, 0, False
    batches = training_batches(stages, seed, arguments, rank, world_size)
    for step, (pixels, labels, classes, patches) in enumerate(batches, 1):
        if patches is None and arguments.compile and not compiled:
            for layer in model.vit.layers:
                layer.compile(dynamic=False)
            compiled = True
        progress = min(1.0, patches_seen / total)
        decay = min(step / warmup, 0.5 + 0.5 * math.cos(math.pi * progress))
        optimizer.param_groups[0]["lr"] = learning_rate * decay
        with torch.autocast("cpu", torch.bfloat16, enabled=patches is None):
            loss, num_right = parallel(pixels, labels, classes, patches)
        loss.backward()
        nn.utils.clip_grad_norm_(training.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        patches_seen += world_size * (classes if patches is None else patches).numel()
        seen, right = seen + len(labels), right + num_right
        if step % 50 == 0 and rank == 0:
            elapsed = time.perf_counter() - start
            logger.info(f"step {step} ({progress:.0%}), {elapsed:.0f} s: training accuracy {right / seen:.3f}")
            seen, right = 0, 0
    training.subset.remove()


@torch.inference_mode()
def accuracy(model: ViTForImageClassification, split: str, num_images: int) -> float:
    """Share (0..1) of right answers on the first images of a split, from all patches, in float32."""
    model.eval()
    data = DataLoader(DrawnDigits(DigitPainter(split, IMAGE_SIZE), num_images), batch_size=250)
    right = sum(
        int((model(pixel_values=normalised(pixels)).logits.argmax(-1) == labels).sum()) for pixels, labels, *_ in data
    )
    return right / num_images


def main() -> None:
    """Trains, saves, and reports the accuracy on validation and test images."""
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    logger.setLevel("INFO")
    set_seed(arguments.seed)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        torch.distributed.init_process_group("gloo")
    if arguments.continue_from is None:
        model = build_model(arguments)
        train(model, CURRICULUM, arguments.learning_rate, arguments.seed, arguments, rank, world_size)
    else:
        model = ViTForImageClassification.from_pretrained(arguments.continue_from)
    train(model, REFINEMENT, arguments.learning_rate / 2, arguments.seed + 1, arguments, rank, world_size)
    if world_size > 1:
        torch.distributed.destroy_process_group()
    if rank > 0:
        return
    model.save_pretrained(arguments.output_dir)
    processor = ViTImageProcessor(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=[IMAGE_MEAN] * 3, image_std=[IMAGE_STD] * 3
    )
    processor.save_pretrained(arguments.output_dir)
    saved = ViTForImageClassification.from_pretrained(arguments.output_dir)
    for split in ("validation", "test"):
        logger.info(f"{split} accuracy: {accuracy(saved, split, arguments.eval_images):.4f}")


if __name__ == "__main__":
    main()
