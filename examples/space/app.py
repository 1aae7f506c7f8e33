# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""A Space: what published models say about a picture, which patches they drop, and what that saves.

    CROPR_MODELS=outputs/demo/cropr,me/demo-digits python examples/space/app.py

Models are folders or Hub ids; without the variable, those that the front matter of README.md lists.
"""

import copy
import math
import os
import time
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

import gradio as gr
import torch
from huggingface_hub import SpaceCard
from PIL import Image
from transformers import BatchFeature

from cropr_hf import CroprViTConfig, CroprViTModel, find_token_reducer
from cropr_hf.images import open_upload
from cropr_hf.publishing.published import PublishedModel, detections, misfit
from cropr_hf.speed.cost import unpruned_config
from cropr_hf.visualization import plot_detections, plot_pruning, plot_segmentation


PUBLISHED, STRONGER, NONE = "as published", "stronger", "none"
MAX_MEGABYTES, MAX_MEGAPIXELS = 10, 40
MAX_WAITING = 16  # visitors; others hear that the app is busy
TOP_K = 5
MEASURED_SECONDS = 0.3  # in which large models make one pass
DPI = 200


class ShownModel(PublishedModel):
    """A published model, and the same without pruning.

    Attributes:
        choices: how much it can prune, in words; the first is the default.

    Raises:
        `ValueError`: for a model that is not around a Cropr ViT.
    """

    def __init__(self, name: str):
        super().__init__(name)
        if not any(isinstance(part, CroprViTModel) for part in self.model.modules()):
            raise ValueError(f"{name} holds {type(self.model).__name__}, without a Cropr ViT; name another model.")
        self.config: CroprViTConfig = getattr(self.model.config, "backbone_config", self.model.config)
        if self.config.token_reducer is None:
            self.unpruned, self.choices = self.model, [NONE]
            return
        self.unpruned = without_pruning(self.model)
        has_stronger = stronger_schedule(self.config, self.config.num_patches) is not None
        self.choices = [PUBLISHED, *([STRONGER] if has_stronger else []), NONE]

    @property
    def classifies(self) -> bool:
        """Whether the answer is a list of classes with scores."""
        return self.task == "ImageClassification"

    @property
    def finds_objects(self) -> bool:
        """Whether the answer depends on a least score."""
        return self.task in ("ObjectDetection", "InstanceSegmentation")

    @torch.inference_mode()
    def show(
        self, picture: Image.Image, pruning: str, threshold: float
    ) -> tuple[dict[str, float] | None, Image.Image, str]:
        """Classes with scores (of a classifier), a drawing of answer and pruning map, and words about the time.

        Raises:
            `ValueError`: for pruning that the model does not offer, or a picture that does not fit it.
        """
        if pruning not in self.choices:
            raise ValueError(
                f"Pruning {pruning!r} is not possible with this model; choose {' or '.join(self.choices)}."
            )
        inputs = self.prepare(picture, MAX_MEGAPIXELS)
        model = self.unpruned if pruning == NONE else self.model
        try:
            if model is not self.unpruned:
                self.prunable.set_pruning(None)
                if pruning == STRONGER:
                    height, width = inputs["pixel_values"].shape[2:]
                    patch_size = self.config.patch_size
                    num_patches = -(-height // patch_size) * -(-width // patch_size)
                    self.prunable.set_pruning(stronger_schedule(self.config, num_patches))
            outputs, blocks, grid_size = with_pruning_map(model, inputs)
            words = self.compare_time(model, inputs)
        except ValueError as error:  # too few patches for the schedule, for example
            raise misfit((picture.height, picture.width), error) from None
        left = int((blocks == self.config.num_hidden_layers).sum())
        scores = dict(self.likeliest(outputs.logits[0], TOP_K)) if self.classifies else None
        drawing = self.draw(picture, inputs, outputs, blocks, grid_size, threshold)
        return scores, drawing, f"{left} of {blocks.numel()} patches are still there before the last block. {words}"

    def draw(
        self,
        picture: Image.Image,
        inputs: BatchFeature,
        outputs: Any,
        blocks: torch.Tensor,
        grid_size: tuple[int, int],
        threshold: float,
    ) -> Image.Image:
        """What the model sees of the picture, its answer, and the blocks after which patches went, side by side."""
        pixels = self.processor(images=picture, do_rescale=False, do_normalize=False, return_tensors="pt").pixel_values
        # (1, channels, height, width) -> (height, width, 3)
        view = pixels[0].expand(3, -1, -1).permute(1, 2, 0).clamp(0, 255).byte().numpy()
        maps = (blocks, self.config.num_hidden_layers, grid_size)
        if self.finds_objects:
            size = valid_size(inputs)
            (found,) = detections(outputs, self.processor, [size], threshold)
            names = self.model.config.id2label
            figure = plot_detections([view], [found], *maps, label_names=names, threshold=threshold)
        elif self.classifies:
            figure = plot_pruning([view], *maps)
        else:
            sizes = [view.shape[:2]]
            label_maps = self.processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
            figure = plot_segmentation([view], label_maps, *maps, label_names=self.model.config.id2label)
        file = BytesIO()
        figure.savefig(file, format="png", dpi=DPI)
        return Image.open(file)

    def compare_time(self, model: Any, inputs: BatchFeature) -> str:
        """Milliseconds of a pass of a model, and of one without pruning, taken in turns for a moment."""
        models = {"without pruning": self.unpruned}
        if model is not self.unpruned:
            models = {"with this pruning": model, **models}
        times: dict[str, list[float]] = {words: [] for words in models}
        for each in models.values():
            each(**inputs)  # the first pass with a shape takes longer
        start = time.perf_counter()
        while not times["without pruning"] or time.perf_counter() < start + MEASURED_SECONDS:
            for words, each in models.items():
                before = time.perf_counter()
                each(**inputs)
                times[words].append(1000 * (time.perf_counter() - before))
        passes, threads = len(times["without pruning"]), torch.get_num_threads()
        found = ", ".join(f"**{median(values):.1f} ms** {words}" for words, values in times.items())
        return f"{found} (one run: {plural(passes, 'pass', 'passes')} each, with {plural(threads, 'CPU thread')})."


def stronger_schedule(config: CroprViTConfig, num_patches: int) -> list[int] | None:
    """A schedule that keeps fewer patches than the configured one: what is a share of them becomes that to the 1.5.

    Where sequences are whole windows they stay so, as squares. `None` where the method or the windows allow no less.

    Args:
        config: of a model that prunes.
        num_patches: of the image.
    """
    own, side = config.kept_patches(num_patches), config.window_size or 1
    tiles = all(kept % side**2 == 0 for kept in own)
    wanted = []
    for kept in own:
        fewer = max(1, round(num_patches * (kept / num_patches) ** 1.5))
        if tiles:
            fewer = math.ceil(fewer / side**2) * side**2
        wanted.append(min(kept, fewer))
    reached = find_token_reducer(config).reachable_counts(config, num_patches, wanted)
    return None if reached == own else reached


def without_pruning(model: Any) -> Any:
    """The same model without token reduction, around the same weights."""
    config = copy.deepcopy(model.config)
    if isinstance(config, CroprViTConfig):
        config = unpruned_config(config)
    else:
        config.backbone_config = unpruned_config(config.backbone_config)
    twin = type(model)(config).eval()
    missing, _ = twin.load_state_dict(model.state_dict(), strict=False, assign=True)
    if missing:
        raise ValueError(f"The model without pruning needs weights that this one lacks: {', '.join(missing)}.")
    return twin


def with_pruning_map(model: Any, inputs: BatchFeature) -> tuple[Any, torch.Tensor, tuple[int, int]]:
    """What a model returns for one image, whatever is around its encoder; the block after which each patch went,
    (1, rows * columns), and (rows, columns).
    """
    encoder = next(part for part in model.modules() if isinstance(part, CroprViTModel))
    noted: list[Any] = []

    def ask(_: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return args, {**kwargs, "output_pruning": True}

    def note(_: Any, args: Any, kwargs: Any, outputs: Any) -> None:
        height, width = (args[0] if args else kwargs["pixel_values"]).shape[2:]
        patch_size = encoder.config.patch_size
        noted[:] = [outputs.pruned_after_block, (height // patch_size, width // patch_size)]

    hooks = [
        encoder.register_forward_pre_hook(ask, with_kwargs=True),
        encoder.register_forward_hook(note, with_kwargs=True),
    ]
    try:
        outputs = model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    blocks, grid_size = noted
    return outputs, blocks, grid_size


def valid_size(inputs: BatchFeature) -> tuple[int, int]:
    """Height and width in pixels of the image in the model's input, without padding."""
    if "pixel_mask" not in inputs:
        return tuple(inputs["pixel_values"].shape[2:])
    (mask,) = inputs["pixel_mask"]
    return int(mask.any(dim=1).sum()), int(mask.any(dim=0).sum())


def plural(count: int, one: str, many: str | None = None) -> str:
    """Such as "1 pass" and "2 passes"."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def read_picture(payload: Any) -> Image.Image | None:
    """What a visitor uploaded, checked as the server checks it, and not as Gradio would; `None` without a file."""
    if payload is None or payload.path is None:
        return None
    try:
        return open_upload(Path(payload.path).read_bytes(), MAX_MEGAPIXELS)
    except ValueError as error:
        raise gr.Error(str(error)) from None


def model_names() -> list[str]:
    """The models to show: those of the variable, or of the front matter of README.md.

    Raises:
        `ValueError`: where there is none.
    """
    named = [name.strip() for name in os.environ.get("CROPR_MODELS", "").split(",")]
    listed = SpaceCard.load(Path(__file__).with_name("README.md")).data.models or []
    names = [name for name in named if name] or listed
    if not names:
        raise ValueError("There is no model to show; name one in CROPR_MODELS, or as `models` in README.md.")
    return names


def build_app(names: Sequence[str]) -> gr.Blocks:
    """The page for some models, folders or Hub ids, all of which are loaded."""
    models = {name: ShownModel(name) for name in names}
    first = models[names[0]]

    def show(name: str, picture: Image.Image | None, pruning: str, threshold: float) -> tuple[Any, Any, str]:
        """The answer of a model to a picture: classes with scores, a drawing, and words about the time."""
        if picture is None:
            raise gr.Error("There is no picture yet; upload one.")
        try:
            return models[name].show(picture, pruning, threshold)
        except ValueError as error:
            raise gr.Error(str(error)) from None

    def choose(name: str) -> tuple[Any, ...]:
        model = models[name]
        return (
            gr.Radio(choices=model.choices, value=model.choices[0]),
            gr.Slider(visible=model.finds_objects),
            gr.Label(value=None, visible=model.classifies),
            None,
            "",
        )

    with gr.Blocks(title="Token Cropr", analytics_enabled=False, delete_cache=(3600, 3600)) as app:
        gr.Markdown(
            "# Token Cropr\nA vision transformer that drops the patches that do not matter on the way. Upload a "
            "picture to see its answer, and after which block each patch went."
        )
        with gr.Row():
            with gr.Column(scale=1):
                name = gr.Dropdown(list(names), value=names[0], label="Model", visible=len(names) > 1, elem_id="model")
                picture = gr.Image(label="Picture", sources=["upload", "clipboard"], height=300, elem_id="picture")
                # In a class of its own Gradio would write a file of types beside this one.
                picture.preprocess = read_picture
                pruning = gr.Radio(first.choices, value=first.choices[0], label="Pruning", elem_id="pruning")
                threshold = gr.Slider(
                    0, 1, 0.5, step=0.05, label="Least score", visible=first.finds_objects, elem_id="threshold"
                )
                button = gr.Button("Run", variant="primary", elem_id="run")
            with gr.Column(scale=2):
                label = gr.Label(label="Classes", num_top_classes=TOP_K, visible=first.classifies, elem_id="classes")
                drawing = gr.Image(
                    label="What the model sees, its answer, and the patches that it dropped",
                    show_label=False,  # it would cover a part of it
                    buttons=["download", "fullscreen"],
                    format="png",
                    elem_id="drawing",
                )
                words = gr.Markdown(elem_id="words")
        outputs = [label, drawing, words]
        # One at a time: pruning is a setting of the model, and visitors would spoil each other's measurements.
        gr.on(
            [button.click, picture.upload],
            show,
            [name, picture, pruning, threshold],
            outputs,
            concurrency_limit=1,
            api_name="show",
        )
        name.change(choose, name, [pruning, threshold, *outputs], api_visibility="private")
    return app.queue(max_size=MAX_WAITING)


if __name__ == "__main__":
    build_app(model_names()).launch(max_file_size=MAX_MEGABYTES * gr.FileSize.MB)
