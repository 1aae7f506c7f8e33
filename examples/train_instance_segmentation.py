# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Fine-tune any pretrained ViT with token pruning on instance segmentation: Cascade Mask R-CNN.

Everything is as in `train_object_detection.py`, whose first lines say what the defaults are and which data it reads;
here every object needs a mask, and the average precision of masks is measured as well:

    accelerate launch examples/train_instance_segmentation.py --fp16 --activation_checkpointing \\
        --dataloader_num_workers 8 --gradient_accumulation_steps 4 --output_dir outputs/coco_masks

    python examples/train_instance_segmentation.py --model_name_or_path examples/digits_vit \\
        --dataset_name cluttered_digits --image_size 128 --pruning_schedule 256 144 64 25 25 25 \\
        --pruning_curriculum 0.5 --config '{"anchor_sizes": [8, 16, 32, 64, 128], "pyramid_channels": 16,
        "box_head_size": 64, "num_proposals": 50, "rois_per_image": 32, "detections_per_image": 20,
        "mask_stride": 1}' \\
        --learning_rate 5e-3 --layer_decay 0.4 --drop_path_rate 0 --max_steps 375 --warmup_steps 50 --eval_steps 125 \\
        --max_grad_norm 1 --per_device_train_batch_size 16 --gradient_accumulation_steps 1 \\
        --output_dir outputs/digit_masks
"""

from dataclasses import dataclass

from detection import CocoArguments, train
from transformers.hf_argparser import HfArg

from cropr_hf import CroprViTForInstanceSegmentation


@dataclass
class InstanceSegmentationArguments(CocoArguments):
    """`CocoArguments` with a folder of their own."""

    output_dir: str = HfArg(
        default="outputs/instance_segmentation", help="Where checkpoints and the stripped model go."
    )


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Trains, evaluates and saves; returns the evaluation metrics. `arguments` are those of the command line."""
    return train(CroprViTForInstanceSegmentation, InstanceSegmentationArguments, "image-segmentation", arguments)


if __name__ == "__main__":
    main()
