# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Measure how far a published image encoder agrees with its unpruned source, and show what it prunes.

    python examples/evaluate_embedding.py --model_name_or_path outputs/dinov2 \\
        --teacher_name_or_path facebook/dinov2-base --dataset_name photographs --split validation

It prints one line of JSON: see `embedding_metrics.embedding_agreement`, and `evaluate_image_classification` for
`--object_maps`. No label is read.
"""

import json
from dataclasses import dataclass

import torch
from embedding_metrics import embedding_agreement
from evaluate_image_classification import Arguments as ImageArguments
from evaluate_image_classification import ObjectMaps, load_images, save_picture
from shared import read_picture, record_evaluation
from transformers import AutoImageProcessor, AutoModel, HfArgumentParser
from transformers.hf_argparser import HfArg
from transformers.utils import logging

import cropr_hf  # noqa: F401 (registers the models with the Auto classes)
from cropr_hf.files import finite
from cropr_hf.speed.counts import PatchCounts
from cropr_hf.training.distillation import load_teacher


@dataclass
class Arguments(ImageArguments):
    """What to evaluate on what, against whom."""

    model_name_or_path: str = HfArg(default="outputs/embedding", help="Folder or Hub id of an encoder.")
    teacher_name_or_path: str | None = HfArg(default=None, help="Its unpruned source: folder or Hub id.")
    teacher_image_size: int | None = HfArg(
        default=None, help="Side of the images that the source sees, if not that of the model's images."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_name_or_path is None:
            raise ValueError("--teacher_name_or_path is missing; name the model whose embeddings are the right ones.")
        if self.exported is not None:
            raise ValueError("--exported is for files that compute logits; leave it out.")
        if self.teacher_image_size is not None and self.teacher_image_size < 1:
            raise ValueError(
                f"--teacher_image_size is {self.teacher_image_size}; give pixels, a multiple of the patch size."
            )


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Evaluates and returns the metrics; `arguments` are those of the command line."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    model = args.load(AutoModel)
    values = list(load_images(args)[args.image_column_name])
    teacher = load_teacher(args.teacher_name_or_path, model).eval().to(args.device)
    processor = AutoImageProcessor.from_pretrained(args.model_name_or_path, trust_remote_code=False)
    side = args.teacher_image_size
    other_size = {} if side is None else {"size": {"height": side, "width": side}}
    object_maps = None if args.object_maps is None else ObjectMaps(args.object_maps, processor, model.config)
    own, right = [], []
    with PatchCounts(model) as counts, torch.inference_mode():
        for start in logging.tqdm(range(0, len(values), args.batch_size), desc="Evaluation"):
            batch = values[start : start + args.batch_size]
            pictures = [read_picture(value) for value in batch]
            pixel_values = processor(pictures, return_tensors="pt")["pixel_values"].to(args.device)
            outputs = model(pixel_values, output_pruning=True)
            own.append(outputs.pooler_output.cpu())
            if other_size:
                pixel_values = processor(pictures, return_tensors="pt", **other_size)["pixel_values"].to(args.device)
            right.append(teacher(pixel_values).pooler_output.cpu())
            if object_maps is not None:
                object_maps.add(batch, outputs.pruned_after_block)
    metrics = embedding_agreement(torch.cat(own), torch.cat(right))
    if object_maps is not None:
        metrics |= object_maps.kept.compute()
    if args.picture is not None:
        save_picture(model, processor, values, args)
    if args.update_record:
        record_evaluation(args.model_name_or_path, args, args.split, len(values), metrics, counts)
    return metrics | counts.means()


if __name__ == "__main__":
    print(json.dumps(finite(main())))
