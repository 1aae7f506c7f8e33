"""How many patches are left of each image, where a method leaves unlike numbers."""

from typing import Any, NamedTuple

import torch

from ..modeling_cropr_vit import CroprViTPreTrainedModel
from ..token_reduction import find_token_reducer
from .cost import mean_multiply_adds


# Of the mean image, among the numbers that evaluation scripts print
PATCHES_LEFT, MULTIPLY_ADDS = "mean_patches_left", "mean_multiply_adds"
MEANS = (PATCHES_LEFT, MULTIPLY_ADDS)


class BatchCounts(NamedTuple):
    """Of a batch of images with `grid_size` rows and columns of patches.

    Attributes:
        kept: (B, L), `patches_kept` of the model's output.
        worked_on: (B, L), its `patches_per_block`.
    """

    grid_size: tuple[int, int]
    kept: torch.Tensor
    worked_on: torch.Tensor


class PatchCounts:
    """Counts the patches of each image that a model evaluates meanwhile, if its method leaves unlike numbers.

    ```python
    with PatchCounts(model) as counts:
        ...  # evaluate
    counts.summary()
    ```

    Args:
        model: any; of one whose images all have as many, or that is no Cropr ViT, it counts nothing. Neither does it
            in training.

    Attributes:
        batches: what was counted, a `BatchCounts` per call of the model.
    """

    def __init__(self, model: Any):
        self.batches: list[BatchCounts] = []
        self._encoder: Any = None
        self._hooks: list[Any] = []
        self._is_asked = False
        if isinstance(model, CroprViTPreTrainedModel):
            method = find_token_reducer(model.config)
            if method is not None and method.counts_vary(model.config):
                self._encoder = model.base_model

    def __enter__(self) -> "PatchCounts":
        if self._encoder is not None:
            self._hooks = [
                self._encoder.register_forward_pre_hook(self._ask, with_kwargs=True),
                self._encoder.register_forward_hook(self._note, with_kwargs=True),
            ]
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def _ask(self, encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
        self._is_asked = bool(kwargs.get("output_pruning"))
        return args, kwargs | {"output_pruning": True}

    def _note(self, encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
        if not encoder.training:
            pixel_values = args[0] if args else kwargs["pixel_values"]
            rows, columns = (length // encoder.config.patch_size for length in pixel_values.shape[-2:])
            kept, worked_on = outputs.patches_kept.cpu(), outputs.patches_per_block.cpu()
            self.batches.append(BatchCounts((rows, columns), kept, worked_on))
        if self._is_asked:
            return outputs
        # Metrics that take all outputs shall find none that nobody asked for.
        unasked = {"pruned_after_block", "patches_per_block", "patches_kept"}
        if outputs.exit_logits is None:  # beside which they always are
            unasked.add("token_indices")
        return type(outputs)(**{name: value for name, value in outputs.items() if name not in unasked})

    def multiply_adds(self, attention: bool = True) -> float:
        """Multiply-adds of the mean image through the encoder, by the numbers of each; see `mean_multiply_adds`."""
        by_grid: dict[tuple[int, int], list[torch.Tensor]] = {}
        for batch in self.batches:
            by_grid.setdefault(batch.grid_size, []).append(batch.kept)
        images = sum(len(batch.kept) for batch in self.batches)
        total = 0.0
        for grid_size, parts in by_grid.items():
            kept = torch.cat(parts)
            total += len(kept) * mean_multiply_adds(self._encoder.config, kept, grid_size, attention)
        return total / images

    def summary(self) -> dict[str, Any]:
        """The section `counts` of an evaluation in a record; empty where nothing was counted.

        `patches_per_block` has, for each block, mean, 10th and 90th percentile over the images of the patches that it
        worked on; `mean_patches_left` and `mean_multiply_adds` are those of the mean image.
        """
        if not self.batches:
            return {}
        worked_on = torch.cat([batch.worked_on for batch in self.batches]).double()
        low, high = torch.quantile(worked_on, worked_on.new_tensor([0.1, 0.9]), dim=0)
        per_block = {"mean": worked_on.mean(dim=0), "p10": low, "p90": high}
        return {
            "patches_per_block": {name: [round(each, 2) for each in row.tolist()] for name, row in per_block.items()},
            **self.means(),
        }

    def means(self) -> dict[str, float]:
        """`mean_patches_left` and `mean_multiply_adds`; empty where nothing was counted."""
        if not self.batches:
            return {}
        left = torch.cat([batch.kept[:, -1] for batch in self.batches]).double()
        return {PATCHES_LEFT: round(left.mean().item(), 2), MULTIPLY_ADDS: round(self.multiply_adds())}
