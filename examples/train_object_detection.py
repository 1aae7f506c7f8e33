# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Fine-tune any pretrained ViT with token pruning on object detection: Cascade R-CNN on a simple feature pyramid.

The defaults are the COCO recipe of EVA-02-L, on which the detector of the paper stands: 1536 pixels, large-scale
jitter, 60,000 steps of 128 images, and the schedule of the paper, which leaves 3 % of the patches. They read the COCO
download in the folder `coco` (`train2017`, `val2017`, `annotations`). 128 images are 64 forward passes of 2 on one
device; on 16 devices:

    accelerate launch examples/train_object_detection.py --fp16 --activation_checkpointing \\
        --dataloader_num_workers 8 --gradient_accumulation_steps 4 --output_dir outputs/coco_boxes

The same as a file, to be given as the first word: `examples/recipes/eva02_l_coco_boxes.yaml`.

(The recipe differs from the reference code in this: windows have 16 patches, as in its Objects365 model; vectors and
positions have no weight decay; warm-up begins at 0; a crop is random in both axes apart, masks are resized as pixels,
and images without objects are trained on as well.)

`--train_images_dir`, `--train_annotations` and the same for `validation` name other files in COCO format;
`--dataset_name` a data set of objects (see `coco.py`) on the Hub:

    python examples/train_object_detection.py --dataset_name rishitdagli/cppe-5 --output_dir outputs/cppe5

`--dataset_name cluttered_digits` draws its images on the spot and needs no network:

    python examples/train_object_detection.py --model_name_or_path examples/digits_vit \\
        --dataset_name cluttered_digits --image_size 128 --pruning_schedule 256 144 64 25 25 25 \\
        --pruning_curriculum 0.5 --config '{"anchor_sizes": [8, 16, 32, 64, 128], "pyramid_channels": 16,
        "box_head_size": 64, "num_proposals": 50, "rois_per_image": 32, "detections_per_image": 20}' \\
        --learning_rate 5e-3 --layer_decay 0.4 --drop_path_rate 0 --max_steps 375 --warmup_steps 50 --eval_steps 125 \\
        --max_grad_norm 1 --per_device_train_batch_size 16 --gradient_accumulation_steps 1 \\
        --output_dir outputs/digit_boxes

`evaluate_detection.py` measures the published model. The metrics come from faster-coco-eval (`pip install
"cropr_hf[detection]"`).
"""

from dataclasses import dataclass

from detection import CocoArguments, train
from transformers.hf_argparser import HfArg

from cropr_hf import CroprViTForObjectDetection


@dataclass
class ObjectDetectionArguments(CocoArguments):
    """`CocoArguments` with a folder of their own."""

    output_dir: str = HfArg(default="outputs/object_detection", help="Where checkpoints and the stripped model go.")


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Trains, evaluates and saves; returns the evaluation metrics. `arguments` are those of the command line."""
    return train(CroprViTForObjectDetection, ObjectDetectionArguments, "object-detection", arguments)


if __name__ == "__main__":
    main()
