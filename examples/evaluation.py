# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What the evaluation scripts share: arguments, which form of a model to measure, and how well it finds objects."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from shared import PruningArguments, cropr_config, given_fields
from transformers import AutoConfig, AutoModel, AutoModelForSemanticSegmentation
from transformers.hf_argparser import HfArg

from cropr_hf import CroprViTConfig
from cropr_hf.arguments import usable_device
from cropr_hf.files import check_file
from cropr_hf.modeling_cropr_vit import CroprViTTaskOutput
from cropr_hf.publishing.model_card import read_record
from cropr_hf.token_reduction import TOKEN_REDUCERS
from cropr_hf.visualization import check_picture


@dataclass(kw_only=True)
class CommonArguments:
    """What all evaluation scripts ask: which model to measure where, and what becomes of the result.

    Raises:
        `ValueError`: for what would fail at the end of the measurement, or make it one of nothing.
        `ImportError`: for a picture without matplotlib.
    """

    model_name_or_path: str = HfArg(default="outputs", help="Folder or Hub id of a model.")
    split: str = HfArg(default="validation", help="Split of the data set.")
    batch_size: int = HfArg(default=8, help="Images per forward pass.")
    device: str = HfArg(default="cpu", help="Where to run.")
    seed: int = HfArg(default=0, help="Of the drawn images.")
    picture: str | None = HfArg(default=None, help="A PNG file for a picture of predictions and of what was pruned.")
    picture_images: int = HfArg(default=8, help="Images in that picture.")
    update_record: bool = HfArg(
        default=False, help="Whether to add the result to the record and the card of that folder."
    )

    def __post_init__(self) -> None:
        usable_device(self.device)
        if self.batch_size < 1:
            raise ValueError(f"--batch_size is {self.batch_size}; give 1 or more.")
        if self.picture_images < 1:
            raise ValueError(f"--picture_images is {self.picture_images}; give 1 or more, or leave --picture out.")
        if self.picture is not None:
            check_file(self.picture)
            check_picture(self.picture)
        if self.update_record:
            read_record(self.model_name_or_path)

    def stored(self, *auto_classes: Any) -> tuple[Any, Any]:
        """The configuration of the model, and the one of the Auto classes that loads what its folder holds.

        Raises:
            `ValueError`: when that is a model of another task, to which these classes would give random weights, and
                when a picture is wanted of a model that does not say what it prunes.
        """
        config = AutoConfig.from_pretrained(self.model_name_or_path, trust_remote_code=False)
        fitting = [each for each in auto_classes if holds(config, each)]
        if not fitting:
            found = ", ".join(config.architectures or [f"model of type {config.model_type!r}"])
            wanted = " or ".join(each.__name__ for each in auto_classes)
            raise ValueError(
                f"{self.model_name_or_path} holds a {found}, not what {wanted} loads; name another folder, or take "
                "the evaluation script of its task."
            )
        if self.picture is not None:
            check_says_pruning(config, "--picture")
        return config, fitting[0]


def holds(config: Any, auto_class: Any) -> bool:
    """Whether the model of a configuration was saved as one that an Auto class loads; if nothing says so, it was.

    Every model has an encoder, which is what `AutoModel` loads.
    """
    known = auto_class._model_mapping.get(type(config), ())
    names = {each.__name__ for each in (known if isinstance(known, (list, tuple)) else [known])}
    says_nothing = auto_class is AutoModel or not config.architectures
    return bool(names) and (says_nothing or not names.isdisjoint(config.architectures))


def check_says_pruning(config: Any, what: str, remedy: str = "leave it out") -> None:
    """Raises `ValueError` for another model than a Cropr ViT, which does not say which patches it keeps."""
    if config.model_type != CroprViTConfig.model_type:
        raise ValueError(
            f"{what} asks which patches are kept, and a model of type {config.model_type!r} does not say; {remedy}."
        )


@dataclass(kw_only=True)
class PublishedArguments(CommonArguments, PruningArguments):
    """Which published model to measure, and in which form, if not as its folder has it."""

    token_reducer: str | None = HfArg(
        default=None, help="Another method than that of the folder, which needs no training: 'random', 'tome', 'none'."
    )
    last_layer_fusion: bool | None = HfArg(
        default=None, help="Put pruned tokens back before the last block, if not as the folder has it."
    )
    exported: str | None = HfArg(
        default=None, help="File of `cropr-hf export` (.onnx, .pt2) that predicts in the place of the folder's model."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [each.name for each in fields(PruningArguments)]
        changes = [f"--{name}" for name in given_fields(self, [*names, "exported"])]
        if self.update_record and changes:
            raise ValueError(
                f"--update_record notes what the folder does as it lies, not with {', '.join(changes)}; leave out one "
                "or the other."
            )
        if self.exported is not None:
            fixed = [f"--{name}" for name in given_fields(self, [*names, "picture"])]
            if fixed:
                raise ValueError(
                    f"--exported names a file, which prunes as it was exported and shows nothing of it; leave out "
                    f"{', '.join(fixed)}, or --exported."
                )

    def load(self, auto_class: Any) -> Any:
        """The model of that folder, which prunes as the arguments say, or the exported file.

        Raises:
            `ValueError`: as `stored`, when the folder holds another model than a Cropr ViT, which has nothing to
                change, and for a method that would have to be trained.
        """
        name, changes = self.model_name_or_path, self.overrides()
        config, _ = self.stored(auto_class)
        if self.exported is not None:
            return ExportedModel(self.exported, config, self.device)
        if changes:
            changes = self.checked(changes, auto_class)
        return auto_class.from_pretrained(name, trust_remote_code=False, **changes).to(self.device)

    def checked(self, changes: dict[str, Any], auto_class: Any) -> dict[str, Any]:
        """Changes of the folder's configuration, complete; see `load`."""
        name, stored = self.model_name_or_path, cropr_config(self.model_name_or_path)
        if stored is None:
            raise ValueError(
                f"{name} holds no Cropr ViT, so that {', '.join(changes)} cannot be changed; convert it "
                "(cropr-hf convert), or leave them out."
            )
        method = changes.get("token_reducer", stored.token_reducer)
        if method != stored.token_reducer and method in TOKEN_REDUCERS and TOKEN_REDUCERS[method].learns:
            others = sorted(other for other, known in TOKEN_REDUCERS.items() if not known.learns)
            raise ValueError(
                f"The method {method!r} needs training, and {name} has no weights for it (its own method is "
                f"{stored.token_reducer!r}); fine-tune with it, or choose one of {', '.join(others)}."
            )
        # Of an unpruned model this field says nothing; the method knows what is usual. Label maps need all patches.
        if stored.token_reducer is None and auto_class is not AutoModelForSemanticSegmentation:
            return {"last_layer_fusion": None} | changes
        return changes


class ExportedModel:
    """A file that `cropr-hf export` wrote, called as the model is that it was written from.

    Args:
        path: a file that ends with `.onnx` or `.pt2`.
        config: of the model.
        device: on which a `.pt2` program was exported. ONNX Runtime computes on the CPU here.

    Raises:
        `ValueError`: for another or a missing file, and an `.onnx` file on another device.
    """

    def __init__(self, path: str, config: Any, device: str):
        self.path, self.config, self.device = Path(path), config, device
        loaders = {".onnx": self.load_onnx, ".pt2": self.load_program}
        if self.path.suffix not in loaders or not self.path.is_file():
            raise ValueError(f"--exported is {path}; name a file that is there and ends with {' or '.join(loaders)}.")
        # (images, channels, height, width), as numbers where the file fixes them
        self.shape: list[Any]
        self.run: Callable[[torch.Tensor], dict[str, torch.Tensor]]
        self.shape, self.run = loaders[self.path.suffix]()

    def load_onnx(self) -> tuple[list[Any], Callable]:
        """Shape of the input, and what runs the file."""
        import onnxruntime

        if torch.device(self.device).type != "cpu":
            raise ValueError(f"--device is {self.device}, but {self.path} runs on the CPU; leave --device out.")
        session = onnxruntime.InferenceSession(self.path, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]

        def run(pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
            outputs = session.run(names, {"pixel_values": pixel_values.numpy()})
            return {name: torch.from_numpy(output) for name, output in zip(names, outputs)}

        return session.get_inputs()[0].shape, run

    def load_program(self) -> tuple[list[Any], Callable]:
        """Shape of the input, and what runs the file."""
        program = torch.export.load(self.path)
        (name,) = program.graph_signature.user_inputs
        (node,) = [node for node in program.graph.nodes if node.name == name]
        return list(node.meta["val"].shape), program.module()

    @torch.inference_mode()
    def __call__(self, pixel_values: torch.Tensor, **kwargs: Any) -> CroprViTTaskOutput:
        """`logits` alone, of any number of images: to one that the file fixes, batches are filled up.

        Raises:
            `ValueError`: for images of another size than the file takes, and for a file of another model.
        """
        if list(pixel_values.shape[1:]) != list(self.shape[1:]):
            raise ValueError(
                f"{self.path} takes images of (channels, height, width) {tuple(self.shape[1:])}, but the image "
                f"processor of the folder makes {tuple(pixel_values.shape[1:])}; export with its size (--image_size), "
                "or name another folder."
            )
        count = self.shape[0] if isinstance(self.shape[0], int) else len(pixel_values)
        logits = []
        for batch in pixel_values.split(count):
            filled = torch.cat([batch, batch[-1:].expand(count - len(batch), -1, -1, -1)])
            outputs = self.run(filled)
            if "logits" not in outputs or outputs["logits"].shape[1] != self.config.num_labels:
                shapes = {name: tuple(output.shape) for name, output in outputs.items()}
                raise ValueError(
                    f"{self.path} computes {shapes}, not logits of the {self.config.num_labels} classes of the "
                    "folder; it was exported from another model."
                )
            logits.append(outputs["logits"][: len(batch)])
        return CroprViTTaskOutput(logits=torch.cat(logits))


class KeptPatches:
    """Which share of the patches is kept to the end, of objects and of all: how well a method finds objects.

    Args:
        num_blocks: of the model, L. A patch that was pruned or merged into another before the last block is lost.
    """

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self.counts = torch.zeros(4, dtype=torch.int64)  # of objects, those of them kept, all, all kept

    def add(
        self, pruned_after_block: torch.Tensor, objects: torch.Tensor, picture: torch.Tensor | None = None
    ) -> None:
        """Counts in a batch.

        Args:
            pruned_after_block: (B, patches), as `CroprViTModelOutput` has it.
            objects: (B, rows, columns), which patches are those of objects.
            picture: (B, rows, columns), which patches show the picture and not what fills up the input; `None` is all.
        """
        objects = objects.flatten(1)
        kept = pruned_after_block.cpu() == self.num_blocks
        shown = torch.ones_like(kept) if picture is None else picture.flatten(1) | objects
        counted = (objects, objects & kept, shown, shown & kept)
        self.counts += torch.stack([patches.sum() for patches in counted])

    def compute(self) -> dict[str, float]:
        """The shares; -1 of objects where there are none, as COCO's metrics have it.

        What objects keep more than `patches_kept`, they keep more than by chance.
        """
        objects, kept_objects, patches, kept = self.counts.tolist()
        return {
            "object_patches_kept": kept_objects / objects if objects else -1.0,
            "patches_kept": kept / patches if patches else -1.0,
        }


def covered_patches(objects: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Which patches are those of objects: half covered or more.

    Args:
        objects: (B, height, width), the share of each pixel that objects cover.

    Returns:
        (B, rows, columns)
    """
    return torch.nn.functional.avg_pool2d(objects[:, None].float(), patch_size)[:, 0] >= 0.5


def picture_patches(sizes: Sequence[tuple[int, int]], input_size: tuple[int, int], patch_size: int) -> torch.Tensor:
    """Which patches show the picture, half or more, in inputs that are filled up below and on the right.

    Args:
        sizes: (height, width) of the picture in each input.
        input_size: (height, width) of all inputs.

    Returns:
        (B, rows, columns)
    """
    shown = torch.zeros(len(sizes), *input_size)
    for image, (height, width) in zip(shown, sizes):
        image[:height, :width] = 1
    return covered_patches(shown, patch_size)
