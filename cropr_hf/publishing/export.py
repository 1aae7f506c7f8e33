"""Models as files that run without this package: `torch.export` (`.pt2`), ONNX (`.onnx`) and ExecuTorch (`.pte`).

The number of images is free; the image size, and with it the number of patches that each module keeps, is fixed.
"""

import glob
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..configuration_cropr_vit import CroprViTConfig
from ..files import check_file
from ..folders import staged
from ..modeling_cropr_vit import CroprViTBackbone
from ..modeling_cropr_vit_detection import CroprViTDetector
from ..saving import StrippableModel
from ..tasks import RF_DETR, TASKS
from ..token_reduction import TokenReducer
from .executorch_file import check_executorch, write_executorch
from .onnx_operators import operators


logger = logging.get_logger(__name__)

ONNX_OPSET = 20
SUFFIXES = (".pt2", ".onnx", ".pte")
PRUNING_MAP = "pruned_after_block"
EXPORTED = (*TASKS.values(), RF_DETR)
WITH_PRUNING_MAP = tuple(task.model_class for task in TASKS.values() if task.outputs)

Tensors = dict[str, torch.Tensor]


def export_model(
    model: Any,
    path: str | os.PathLike,
    image_size: int | tuple[int, int] | None = None,
    batch_size: int | None = None,
    tolerance: float | None = None,
    beside: Callable[[str], Any] | None = None,
    output_pruning: bool = False,
    for_web: bool = False,
) -> float:
    """Writes a stripped model to `path`, and checks the file against the model on random pixels.

    The input is `pixel_values` (B, channels, height, width), float32 whatever the weights are. The outputs are float32
    and have the names of the model's: `logits`, of RF-DETR `pred_boxes` as well; `last_hidden_state` and
    `pooler_output` of the encoder; of a backbone its `out_features`. Of a Cascade Mask R-CNN the encoder with its
    pyramid is exported, `pyramid0` (the finest) to `pyramid4`: its number of boxes depends on the image.

    The weights keep their dtype, and the pruning is what the model has now (see `set_pruning`). A `.pt2` program runs
    on the device that the model is on now. The file appears when it has passed the check, and not otherwise: until
    then an older one stays, together with its weights.

    Args:
        model: of a class in `cropr_hf.tasks`, without auxiliary heads.
        path: a file that ends with `.pt2` (for `torch.export.load`), `.onnx` (opset `ONNX_OPSET`; weights beyond
            2 GB go to a file `.onnx.data` beside it) or `.pte` (for ExecuTorch).
        image_size: height and width in pixels, or one number for both; by default those of the configuration.
        batch_size: images per call; `None` for any number, and for one in a `.pte` file.
        tolerance: largest difference between file and model, as returned; 1e-3 by default, 0.05 in half precision.
        beside: writes into the folder that it is given what appears together with the file, such as
            `image_processor.save_pretrained`.
        output_pruning: also return `pruned_after_block` (B, patches), as the model does when asked for it.
        for_web: an `.onnx` file for one image per call, of operators that ONNX Runtime has on WebGPU, so that nothing
            goes back and forth between GPU and CPU; a warning says so where a method has no such form.

    Returns:
        The difference: mean absolute difference of an output over its mean magnitude, of the worst output. It is a
        mean, since a token whose score ties with that of another up to rounding may be pruned in its place.

    Raises:
        `ValueError`: another suffix, a file that cannot be written, an image size that is not a multiple of the patch
            size, a batch size below 1 (on the web another than 1), a tolerance below 0 or infinite, a model with
            auxiliary heads, one that draws random numbers, or one that has no pruning map and should return it.
        `ImportError`: when a library for ONNX or ExecuTorch is missing.
        `RuntimeError`: when the file does not compute what the model does.
    """
    target = check_file(path)
    if target.suffix not in SUFFIXES:
        raise ValueError(f"{path} ends with {target.suffix!r}; name a file that ends with {' or '.join(SUFFIXES)}.")
    _check_model(model)
    if output_pruning and not isinstance(model, WITH_PRUNING_MAP):
        raise ValueError(f"The outputs of a {type(model).__name__} have no pruning map; leave `output_pruning` out.")
    if for_web and (target.suffix != ".onnx" or batch_size not in (None, 1)):
        raise ValueError(
            f"`for_web` is for .onnx files and one image per call, not for {target.suffix} and {batch_size}; leave "
            "`batch_size` out."
        )
    if batch_size is None and (for_web or target.suffix == ".pte"):
        batch_size = 1
    dtype = next(model.parameters()).dtype
    if target.suffix == ".onnx":
        _check_onnx(dtype)
    if target.suffix == ".pte":
        check_executorch()
    if tolerance is None:
        tolerance = 0.05 if dtype in (torch.bfloat16, torch.float16) else 1e-3
    if not 0 <= tolerance < math.inf:  # NaN fails as well
        raise ValueError(f"`tolerance` is {tolerance}; give 0 or more, such as 1e-3, or None.")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}; give 1 or more, or None for any number.")
    config = getattr(model.config, "backbone_config", model.config)
    size = input_size(config, image_size)

    def pixels(count: int) -> torch.Tensor:
        return random_pixels(count, config, size).to(model.device)

    in_training = [module for module in model.modules() if module.training]
    graph = _Graph(model, output_pruning).eval()
    try:
        stale = [glob.escape(f"{target.name}.data")]
        with torch.no_grad(), staged(target.parent, target.name, stale, f".export_{target.name}_") as folder:
            draft = Path(folder) / target.name
            batches = [pixels(count) for count in ((1, 3) if batch_size is None else (batch_size,))]
            expected = [graph(batch) for batch in batches]
            sample = pixels(batch_size or 2)  # a size of 1 would be taken for a constant
            try:
                run = _write(graph, sample, draft, batch_size is None, for_web)
            except Exception as error:  # of other libraries: some methods compute with indices
                if not for_web:
                    raise
                reason = str(error).partition("\n")[0]
                logger.warning(f"{target.name} has no form for WebGPU alone ({reason}); it will use the CPU as well.")
                run = _write(graph, sample, draft, batch_size is None, for_web=False)
            difference = check_difference(target.name, map(run, batches), expected, tolerance)
            del run  # some systems move no file that is open
            if beside is not None:
                beside(folder)
    finally:
        for module in in_training:
            module.training = True
    return difference


def random_pixels(count: int, config: CroprViTConfig, size: tuple[int, int]) -> torch.Tensor:
    """The pixels that files are checked with, (B, channels, height, width), the same for the same count."""
    return torch.randn(count, config.num_channels, *size, generator=torch.Generator().manual_seed(count))


def check_difference(name: str, actual: Iterable[Tensors], expected: Iterable[Tensors], tolerance: float) -> float:
    """The largest difference between outputs for the same batches, as `export_model` returns it.

    Raises:
        `RuntimeError`: when it is above the tolerance.
    """
    difference = torch.tensor([_difference(*outputs) for outputs in zip(actual, expected)]).max().item()
    if not difference <= tolerance:
        raise RuntimeError(
            f"{name} differs from the model by {difference:.2g} (mean, relative), more than {tolerance:g}, so that it "
            "was not kept; raise `tolerance` if that will do."
        )
    logger.info(f"{name} differs from the model by {difference:.2g} (mean, relative).")
    return difference


def input_size(config: CroprViTConfig, image_size: int | Sequence[int] | None) -> tuple[int, int]:
    """Height and width in pixels from one number for both, a pair, or `None` for those of the configuration.

    Raises:
        `ValueError`: unless both are multiples of the patch size.
    """
    if image_size is None:
        return config.input_size
    lengths = image_size if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    if len(lengths) != 2 or not all(
        isinstance(length, int) and length > 0 and length % config.patch_size == 0 for length in lengths
    ):
        raise ValueError(
            f"`image_size` is {image_size!r}; give a multiple of the patch size {config.patch_size}, or two of them: "
            "height and width."
        )
    height, width = lengths
    return height, width


class _Graph(nn.Module):
    """What is exported of a model: pixels in, named float32 tensors out, and no weights besides those it needs."""

    def __init__(self, model: Any, output_pruning: bool):
        super().__init__()
        self.model = model
        self.options = {"output_pruning": True} if output_pruning else {}
        self.pyramid = None
        if isinstance(model, CroprViTDetector):
            self.model, self.pyramid = model.cropr_vit, model.pyramid

    def forward(self, pixel_values: torch.Tensor) -> Tensors:
        outputs = self.model(pixel_values, **self.options)
        if self.pyramid is not None:
            grid_size = tuple(length // self.model.config.patch_size for length in pixel_values.shape[2:])
            # (B, rows * columns, D) -> (B, D, rows * columns) -> (B, D, rows, columns)
            levels = self.pyramid(self.model.patches(outputs).transpose(1, 2).unflatten(2, grid_size))
            named = {f"pyramid{level}": feature_map for level, feature_map in enumerate(levels)}
        elif isinstance(self.model, CroprViTBackbone):
            named = dict(zip(self.model.out_features, outputs.feature_maps))
        else:
            (task,) = [task for task in EXPORTED if isinstance(self.model, task.model_class)]
            named = {name: outputs[name] for name in task.outputs}
        if self.options:
            named |= {PRUNING_MAP: outputs[PRUNING_MAP]}
        return {name: tensor.float() for name, tensor in named.items()}


def _check_model(model: Any) -> None:
    if not any(isinstance(model, task.model_class) for task in EXPORTED):
        names = ", ".join(task.model_class.__name__ for task in EXPORTED)
        raise ValueError(f"There is no export of {type(model).__name__}; only of {names}.")
    for part in model.modules():
        if isinstance(part, StrippableModel) and part.config.use_auxiliary_heads:
            raise ValueError(
                f"The {type(part).__name__} has auxiliary heads, which only training needs; save it, then call its "
                "`remove_auxiliary_heads()`, or load the model with `use_auxiliary_heads=False`."
            )
        if isinstance(part, TokenReducer) and not part.deterministic:
            raise ValueError(
                f"The token reducer {part.name!r} draws random numbers, so that no file could be checked against the "
                "model; export a model with another one, or with `token_reducer=None`."
            )


def _check_onnx(dtype: torch.dtype) -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("ONNX needs more libraries: pip install 'cropr_hf[export]'") from error
    if dtype == torch.bfloat16:
        raise ValueError(
            "The weights are bfloat16, for which ONNX Runtime has no kernels on CPUs, so that no file could be "
            "checked; use float16 or float32, or a `.pt2` file."
        )


def _write(
    graph: _Graph, pixel_values: torch.Tensor, path: Path, free_batch: bool, for_web: bool
) -> Callable[..., Tensors]:
    """Writes the file; returns what runs it."""
    shapes = ({0: torch.export.Dim("batch", min=1)},) if free_batch else None
    program = torch.export.export(graph, (pixel_values,), dynamic_shapes=shapes, strict=False)
    if path.suffix == ".pt2":
        torch.export.save(program, path)
        return torch.export.load(path).module()
    names = list(graph(pixel_values))
    if path.suffix == ".pte":
        run = write_executorch(program, path)
        return lambda pixels: dict(zip(names, run(pixels)))
    onnx_program: Any = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        input_names=["pixel_values"],
        output_names=names,
        opset_version=ONNX_OPSET,
        dynamic_shapes=shapes,
        custom_translation_table=operators(for_web),
    )
    onnx_program.save(path)
    return onnx_runner(path)


def onnx_runner(path: str | os.PathLike) -> Callable[[torch.Tensor], Tensors]:
    """What runs an `.onnx` file on the CPU: pixels in, named outputs out."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(pixel_values: torch.Tensor) -> Tensors:
        outputs = session.run(names, {"pixel_values": pixel_values.cpu().numpy()})
        return {name: torch.from_numpy(output) for name, output in zip(names, outputs)}

    return run


def _difference(actual: Tensors, expected: Tensors) -> float:
    """See `export_model`; infinite for another shape, not a number where there is one."""
    worst = torch.zeros(())
    for name, wanted in expected.items():
        wanted, got = wanted.cpu().float(), actual[name].cpu().float()
        if got.shape != wanted.shape:
            return float("inf")
        worst = torch.maximum(worst, (got - wanted).abs().mean() / wanted.abs().mean().clamp(min=1e-12))
    return worst.item()
