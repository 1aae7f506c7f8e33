"""Diff pruning: masks, both stages of the training, and files of differences, by the Trainer, script and command."""

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, ViTImageProcessor

from cropr_hf import CroprViTForImageClassification, CroprViTModel, cli
from cropr_hf.training import (
    DiffPruning,
    FrozenStart,
    WeightAverage,
    freeze_backbone,
    load_diff,
    lora_model,
    save_diff,
)
from cropr_hf.training import diff_pruning as module
from cropr_hf.training.diff_pruning import (
    STRETCH,
    Masks,
    diff_metadata,
    hard_concrete,
    largest,
    open_probability,
    penalty_gradient,
)
from tests.common import TASKS, assert_close_relative, enable_activation_checkpointing, full
from tests.distributed_worker import diff_pruning as train_in_processes
from tests.test_distributed import LOSS_TOLERANCE, launch
from tests.test_examples import digits_command
from tests.test_finetuning import SAVES, history, pixels, trainer_for
from tests.test_training import tiny_model, training_arguments


BACKBONE = "cropr_vit."
SHARE = 0.02


def is_backbone(name: str) -> bool:
    return name.startswith(BACKBONE) and "token_reducers." not in name


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(module.BITS[tensor.element_size()])


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed_entries(weights: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Which weights of the backbone are no longer, bit for bit, what they were."""
    return {name: bits(weights[name]) != bits(before[name]) for name in before if is_backbone(name)}


def count(entries: dict[str, torch.Tensor]) -> int:
    return sum(int(mask.sum()) for mask in entries.values())


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(bits(found[name]), bits(tensor)), name


class TestMasks:
    @pytest.mark.parametrize("stretch", [STRETCH, (-0.1, 1.1), (-0.3, 2.0)])
    @pytest.mark.parametrize("logit", [-3.0, 0.0, 3.0])
    def test_they_are_open_as_often_as_the_formula_says(self, logit, stretch):
        draws = 10**6
        noise = torch.rand(draws, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        masks, _ = hard_concrete(torch.full_like(noise, logit), noise, stretch)
        probability = 1 / (1 + math.exp(-logit) * (-stretch[0] / stretch[1]))
        assert open_probability(torch.tensor(logit, dtype=torch.float64), stretch).item() == pytest.approx(probability)
        error = math.sqrt(probability * (1 - probability) / draws)
        assert abs((masks > 0).double().mean().item() - probability) < 3 * error

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("whole_noise", [0.2, 0.5, 0.999])  # closed, between, open
    def test_gradients_are_those_of_autograd_through_the_clamp(self, seed, whole_noise):
        generator = torch.Generator().manual_seed(seed)
        base, difference, logits, gradient = torch.randn(4, 9, 7, dtype=torch.float64, generator=generator)
        noise = torch.rand(9, 7, dtype=torch.float64, generator=generator)
        whole = torch.tensor(0.3, dtype=torch.float64)
        whole_noise = torch.tensor(whole_noise, dtype=torch.float64)
        leaves = [difference.requires_grad_(), logits.requires_grad_(), whole.requires_grad_()]

        def mask(logits: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
            opened = torch.sigmoid(noise.log() - (1 - noise).log() + logits)
            return torch.clamp(3 * opened - 1.5, 0, 1)

        each = mask(logits, noise)
        assert {0.0, 1.0} < set(each.flatten().tolist())  # and some between
        weights = base + mask(whole, whole_noise) * each * difference
        expected = torch.autograd.grad((weights * gradient).sum(), leaves)
        with torch.no_grad():
            masks = Masks(*hard_concrete(logits, noise), *hard_concrete(whole, whole_noise))
            found = masks.gradients(gradient, difference)
        assert_close_relative(masks.whole * masks.each, (mask(whole, whole_noise) * each).detach(), 1e-12)
        assert_close_relative(found, expected, 1e-12)

    def test_the_gradient_of_the_penalty_is_that_of_autograd(self):
        logits = torch.linspace(-6, 6, 13, dtype=torch.float64, requires_grad=True)
        (expected,) = torch.autograd.grad(open_probability(logits).sum(), [logits])
        assert_close_relative(penalty_gradient(logits.detach()), expected, 1e-12)

    @pytest.mark.parametrize("seed", range(5))
    def test_the_largest_are_kept_over_all_tensors_and_the_first_of_equal_ones(self, seed):
        generator = torch.Generator().manual_seed(seed)
        tensors = [torch.randint(-3, 4, shape, generator=generator) / 2 for shape in ((4, 5), (), (13,), (2, 3, 2))]
        flat = torch.cat([tensor.flatten() for tensor in tensors]).tolist()
        order = sorted(range(len(flat)), key=lambda place: (-abs(flat[place]), place))
        for kept in (1, 2, 7, 20, len(flat)):
            masks = largest(tensors, kept)
            assert [mask.shape for mask in masks] == [tensor.shape for tensor in tensors]
            found = torch.cat([mask.flatten() for mask in masks]).nonzero().flatten().tolist()
            assert found == sorted(order[:kept])


class Watch(TrainerCallback):
    """Weights of the model, and what the masks let through, in a training; it stands behind the `pruning`."""

    def __init__(self, pruning: DiffPruning):
        self.pruning = pruning
        self.drawn: list[dict] = []  # at the beginning of each step
        self.settled: list[dict] = []  # after it
        self.changes: list[list[torch.Tensor]] = []
        self.supports: list[Any] = []
        self.evaluated: list[tuple[int, dict]] = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.drawn.append(weights_of(model))
        self.supports.append(self.pruning.support)

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.settled.append(weights_of(model))
        self.changes.append(list(self.pruning._changes()))

    def on_prediction_step(self, args, state, control, model=None, **kwargs):
        self.evaluated.append((state.global_step, weights_of(model)))


def make_trainer(folder, share: float = SHARE, model: Any = None, **kwargs: Any) -> tuple[Any, Watch]:
    """A `CroprTrainer` of 6 steps, and what it did."""
    model = tiny_model() if model is None else model
    names = ("penalty", "search")
    pruning = DiffPruning(model, share, **{name: kwargs.pop(name) for name in names if name in kwargs})
    watch = Watch(pruning)
    return trainer_for(model, folder, [pruning, watch], **{"max_steps": 6, **kwargs}), watch


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> SimpleNamespace:
    """A training with evaluations and checkpoints; three steps search, three have a fixed choice."""
    model = tiny_model()
    with torch.no_grad():
        model.cropr_vit.layernorm.bias[::2] = -0.0  # which adding nothing would turn into 0.0
    before = weights_of(model)
    folder = tmp_path_factory.mktemp("trained")
    trainer, watch = make_trainer(folder, model=model, eval_strategy="steps", eval_steps=2, **SAVES)
    trainer.train()
    return SimpleNamespace(model=model, before=before, trainer=trainer, watch=watch, folder=folder)


class TestTraining:
    def test_the_first_step_has_the_pretrained_weights(self, trained):
        assert_same_bits(trained.watch.drawn[0], trained.before)

    def test_as_many_weights_as_the_share_says_are_chosen_exactly(self, trained):
        total = sum(tensor.numel() for name, tensor in trained.before.items() if is_backbone(name))
        supports = trained.watch.supports
        assert supports[:3] == [None] * 3
        for support in supports[3:]:
            assert support is not None and count(support) == math.floor(SHARE * total)
            assert support.keys() == {name for name in trained.before if is_backbone(name)}
        assert all(torch.equal(supports[-1][name], support) for name, support in supports[3].items())

    def test_the_largest_changes_are_chosen_and_go_on_as_they_are(self, trained):
        watch = trained.watch
        changes, support = dict(zip(watch.supports[3], watch.changes[2])), watch.supports[3]
        kept = torch.cat([change[support[name]].abs() for name, change in changes.items()])
        dropped = torch.cat([change[~support[name]].abs() for name, change in changes.items()])
        assert kept.min() >= dropped.max() and kept.min() > 0
        for name, mask in support.items():
            expected = torch.where(mask, watch.settled[2][name], trained.before[name])
            assert torch.equal(bits(watch.drawn[3][name]), bits(expected)), name

    def test_all_other_weights_are_those_of_the_base_bit_for_bit(self, trained):
        support = trained.watch.supports[3]
        for weights in (*trained.watch.drawn[3:], *trained.watch.settled[3:], weights_of(trained.model)):
            for name, mask in support.items():
                assert torch.equal(bits(weights[name])[~mask], bits(trained.before[name])[~mask]), name
        assert 0 < count(changed_entries(trained.model.state_dict(), trained.before)) <= count(support)

    def test_it_searches_among_all_and_trains_the_rest_in_full(self, trained):
        searched = changed_entries(trained.watch.settled[1], trained.before)
        assert count(searched) > 2 * count(trained.watch.supports[3])
        for name, tensor in trained.model.state_dict().items():
            assert is_backbone(name) or not torch.equal(tensor, trained.before[name]), name
        moved = [
            (trained.watch.settled[5][name] != trained.watch.settled[3][name])[mask].any()
            for name, mask in trained.watch.supports[3].items()
            if mask.any()
        ]
        assert sum(moved) > len(moved) // 2  # it goes on learning

    def test_evaluations_and_checkpoints_have_the_weights_without_chance(self, trained):
        assert {step for step, _ in trained.watch.evaluated} == {2, 4, 6}
        for step, weights in trained.watch.evaluated:
            assert_same_bits(weights, trained.watch.settled[step - 1])
        stored = load_file(trained.folder / "checkpoint-2" / "model.safetensors")
        assert_same_bits(stored, trained.watch.settled[1])
        for name, change in zip(trained.watch.supports[3], trained.watch.changes[1]):
            assert_close_relative(stored[name], trained.before[name] + change, 1e-6)
        assert not all(torch.equal(trained.watch.drawn[2][name], tensor) for name, tensor in stored.items())

    def test_the_batches_of_a_step_have_the_same_masks(self, tmp_path):
        trainer, _ = make_trainer(
            tmp_path, search=1.0, max_steps=3, gradient_accumulation_steps=2, per_device_train_batch_size=4
        )
        seen = []
        weight = trainer.model.cropr_vit.layers[0].mlp.fc1.weight
        trainer.model.register_forward_pre_hook(lambda *_: seen.append(weight.detach().clone()))
        trainer.train()
        assert len(seen) == 6
        assert all(torch.equal(*pair) for pair in zip(seen[::2], seen[1::2]))
        assert not torch.equal(seen[0], seen[2]) and not torch.equal(seen[2], seen[4])

    def test_noise_depends_on_seed_and_step_alone(self):
        pruning = DiffPruning(tiny_model(), SHARE)
        draws = []
        for seed, step in ((0, 0), (0, 0), (0, 1), (1, 0)):
            torch.rand(1)
            generator = pruning._generator(SimpleNamespace(seed=seed), SimpleNamespace(global_step=step))
            draws.append(torch.rand(8, generator=generator).tolist())
        assert draws[0] == draws[1] and draws[0] != draws[2] != draws[3] != draws[0]

    @pytest.mark.full
    def test_a_penalty_closes_masks_and_a_training_that_ends_in_the_search_is_sparse(self, tmp_path):
        model = tiny_model()
        before = weights_of(model)
        logits = {}

        class Keep(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                logits.update({name: tensor.clone() for name, tensor in watch.pruning.logits.items()})

        trainer, watch = make_trainer(tmp_path, model=model, penalty=1.0, search=1.0)
        trainer.add_callback(Keep())
        trainer.train()
        assert all((tensor < module.FIRST_LOGIT - 0.4).float().mean() > 0.9 for tensor in logits.values())
        assert 0 < count(changed_entries(model.state_dict(), before)) <= watch.pruning.count

    def test_masks_that_leave_too_little_are_told_of(self, tmp_path, monkeypatch, log_records):
        monkeypatch.setattr(module, "FIRST_LOGIT", -9.0)  # all closed
        make_trainer(tmp_path, max_steps=2)[0].train()
        (warning,) = [record.getMessage() for record in log_records if "of `share`" in record.getMessage()]
        assert "changes of 0 weights" in warning and "smaller `penalty`" in warning

    @pytest.mark.full
    @pytest.mark.parametrize("seed", range(3))
    def test_it_learns_the_task(self, seed, tmp_path):
        model = tiny_model(drop_path_rate=0.0)
        trainer, _ = make_trainer(tmp_path, model=model, max_steps=40, learning_rate=3e-3, seed=seed)
        untrained = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < untrained - 0.2

    @pytest.mark.full
    def test_a_second_training_begins_from_the_base(self, tmp_path):
        trainer, watch = make_trainer(tmp_path)
        trainer.train()
        trainer.train()
        found = [{name: tensor for name, tensor in each.items() if is_backbone(name)} for each in watch.drawn]
        assert_same_bits(found[6], found[0])

    @pytest.mark.full
    @pytest.mark.parametrize("checkpoint", ["checkpoint-2", "checkpoint-4"])
    def test_a_resumed_run_repeats_the_uninterrupted_one(self, checkpoint, trained, tmp_path):
        """From the search, and from what follows it."""
        model = tiny_model()
        model.load_state_dict(trained.before)
        trainer, _ = make_trainer(tmp_path, model=model, eval_strategy="steps", eval_steps=2, **SAVES)
        trainer.train(resume_from_checkpoint=str(trained.folder / checkpoint))
        assert history(trainer) == history(trained.trainer)
        assert history(trainer, "eval_loss") == history(trained.trainer, "eval_loss")
        assert_same_bits(weights_of(model), weights_of(trained.model))

    @pytest.mark.full
    def test_bfloat16_and_activation_checkpointing(self, tmp_path):
        model = tiny_model(drop_path_rate=0.0)
        before = weights_of(model)
        enable_activation_checkpointing(model)
        trainer, watch = make_trainer(tmp_path, model=model, bf16=True)
        trainer.add_callback(FrozenStart(0.2))
        trainer.train()
        assert 0 < count(changed_entries(model.state_dict(), before)) <= watch.pruning.count
        assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}

    @pytest.mark.full
    def test_two_processes_draw_the_same_masks(self, tmp_path):
        found = launch(tmp_path, "ddp_8_gpus.yaml", "diff_pruning")["diff_pruning"]
        assert len(found["digests"]) == 2 and len(set(found["digests"])) == 1
        expected = train_in_processes(tmp_path)
        losses, one = (each["losses"]["loss"] for each in (found, expected))
        assert losses[:4] == pytest.approx(one[:4], rel=0, abs=LOSS_TOLERANCE)  # the search
        # Rounding may decide which of two weights that changed alike is chosen.
        assert losses[4:] == pytest.approx(one[4:], rel=0, abs=0.02)


class TestScaledGradients:
    """Training in float16 on a GPU scales the loss; here the same is done by hand, in float32."""

    STEPS = 4

    def train(self, folder, scale: float | None, spoil: Callable[[Any], None] | None = None, max_grad_norm: float = 0):
        model = tiny_model(drop_path_rate=0.0)
        pruning = DiffPruning(model, SHARE)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)
        scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        args = training_arguments(folder, max_grad_norm=max_grad_norm)
        Accelerator(cpu=True)
        state, control = TrainerState(max_steps=self.STEPS), TrainerControl()
        wrapped = SimpleNamespace(scaler=scaler, optimizer=optimizer)
        events = {"model": model, "optimizer": wrapped}
        pruning.on_train_begin(args, state, control, **events)
        for step in range(self.STEPS):
            optimizer.zero_grad()
            pruning.on_step_begin(args, state, control, **events)
            loss = model(pixels(), labels=torch.arange(4)).loss
            (loss if scaler is None else scaler.scale(loss)).backward()
            if spoil is not None and step == 1:
                spoil(model)
            if max_grad_norm and scaler is not None:  # as Accelerate does before it clips
                scaler.unscale_(optimizer)
            pruning.on_pre_optimizer_step(args, state, control, **events)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            pruning.on_optimizer_step(args, state, control, **events)
            state.global_step += 1
            if step == 1:
                logits = {name: tensor.clone() for name, tensor in pruning.logits.items()}
        pruning.on_train_end(args, state, control, **events)
        return weights_of(model), logits

    @pytest.mark.parametrize("max_grad_norm", [0, 1])
    def test_they_are_unscaled_once(self, tmp_path, max_grad_norm):
        expected, logits = self.train(tmp_path, None)
        found, scaled_logits = self.train(tmp_path, 2.0**12, max_grad_norm=max_grad_norm)
        assert_close_relative(scaled_logits, logits)
        assert_close_relative(found, expected)

    def test_a_step_that_overflows_is_left_out(self, tmp_path):
        def spoil(model):
            model.cropr_vit.layers[0].mlp.fc1.weight.grad[0, 0] = math.inf

        weights, logits = self.train(tmp_path, 2.0**12, spoil)
        assert all(torch.isfinite(tensor).all() for tensor in (*weights.values(), *logits.values()))


class TestWrongUse:
    @pytest.mark.parametrize(
        ("fields", "reason"),
        [
            ({"share": 0.0}, r"`share` is 0.0; it must be in \(0, 1\), such as 0.005"),
            ({"share": 1.0}, "`share` is 1.0"),
            ({"share": math.nan}, "`share` is nan"),
            ({"share": 1e-9}, "which of [0-9]+ weights is none; give a larger one"),
            ({"penalty": -1.0}, "`penalty` is -1.0; it must be a finite number"),
            ({"penalty": math.inf}, "`penalty` is inf"),
            ({"search": 0.0}, r"`search` is 0.0; it must be in \(0, 1\]"),
        ],
    )
    def test_values_are_checked(self, fields, reason):
        with pytest.raises(ValueError, match=reason):
            DiffPruning(tiny_model(), **fields)

    def test_models_without_a_backbone_to_train_are_refused(self):
        with pytest.raises(ValueError, match="contains 0 Cropr ViTs"):
            DiffPruning(torch.nn.Linear(2, 2))
        model = tiny_model()
        freeze_backbone(model)
        with pytest.raises(ValueError, match=r"is frozen, .* leave `freeze_backbone` and adapters out"):
            DiffPruning(model)
        pytest.importorskip("peft")
        with pytest.raises(ValueError, match="is frozen"):
            DiffPruning(lora_model(tiny_model(), 2))

    @pytest.mark.full
    def test_what_it_does_not_work_with_is_refused(self, tmp_path, monkeypatch):
        with pytest.raises(ValueError, match=r"bfloat16 are too coarse .* load the model in float32"):
            make_trainer(tmp_path, model=tiny_model().bfloat16())[0].train()
        best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, **SAVES}
        with pytest.raises(ValueError, match="`load_best_model_at_end` may go back"):
            make_trainer(tmp_path, **best)[0].train()
        trainer, _ = make_trainer(tmp_path)
        trainer.add_callback(WeightAverage(0.9))
        with pytest.raises(ValueError, match="leave `WeightAverage` or `DiffPruning` out"):
            trainer.train()

        from accelerate.utils import DistributedType

        monkeypatch.setattr(module, "SHARDED", (DistributedType.NO,))
        with pytest.raises(ValueError, match="train with DDP"):
            make_trainer(tmp_path)[0].train()

    @pytest.mark.full
    def test_checkpoints_of_another_training_are_refused(self, tmp_path, trained):
        checkpoint = str(trained.folder / "checkpoint-2")
        with pytest.raises(ValueError, match="resume with the same model to start from and the same share"):
            make_trainer(tmp_path, share=0.1)[0].train(checkpoint)  # the base differs as well
        shutil.copytree(checkpoint, tmp_path / "checkpoint-2", ignore=shutil.ignore_patterns("diff_pruning.pt"))
        with pytest.raises(ValueError, match="has no differences"):
            make_trainer(tmp_path)[0].train(str(tmp_path / "checkpoint-2"))
        trainer, watch = make_trainer(tmp_path)
        state = TrainerState(global_step=2)  # the plain Trainer tells no folder
        with pytest.raises(ValueError, match="Only a `CroprTrainer` can resume"):
            watch.pruning.on_train_begin(trainer.args, state, TrainerControl(), model=trainer.model)


def pair(task: str = "classification", dtype: torch.dtype = torch.float32, **fields: Any) -> tuple[Any, Any]:
    """A base, and a model with other Cropr modules and head, and one weight of a hundred of its backbone changed."""
    base = TASKS[task].build(**fields).to(dtype)
    model = TASKS[task].build(seed=5, **fields).to(dtype)
    prefix = "" if task == "model" else BACKBONE
    own = model.state_dict()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in base.state_dict().items():
        if name.startswith(prefix) and "token_reducers." not in name:
            changed = torch.rand(tensor.shape, generator=generator) < 0.01
            own[name].copy_(torch.where(changed, own[name], tensor))
    with torch.no_grad():
        for each in (base, model):
            each.base_model.layernorm.bias.zero_()
        model.base_model.layernorm.bias[0] = -0.0
    return base, model


def published(model: Any, folder) -> Any:
    """What `from_pretrained` makes of a published model."""
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


class TestFiles:
    @pytest.mark.parametrize(
        "task",
        ["model", "classification", *full(*(task for task in TASKS if task not in ("model", "classification")))],
    )
    def test_base_and_file_make_the_published_model_bit_for_bit(self, task, tmp_path):
        heads = {"use_auxiliary_heads": True} if TASKS[task].labels else {}
        base, model = pair(task, **heads)
        expected = published(model, tmp_path / "published")
        kept = weights_of(base)
        changed = save_diff(model, base, tmp_path / "task.safetensors")
        loaded = load_diff(base, tmp_path / "task.safetensors")
        assert type(loaded) is type(model) and not loaded.training
        assert_same_bits(loaded.state_dict(), expected.state_dict())
        sparse = [name for name in kept if "token_reducers." not in name and (task == "model" or is_backbone(name))]
        now = expected.state_dict()
        assert changed == sum(int((bits(now[name]) != bits(kept[name])).sum()) for name in sparse) > 0
        inputs = TASKS[task].inputs(model.config)["pixel_values"]
        with torch.no_grad():
            outputs = [TASKS[task].main_output(each(inputs)) for each in (loaded, expected)]
        assert torch.equal(*outputs)
        with torch.no_grad():
            for parameter in loaded.parameters():
                parameter.add_(1.0)
        assert_same_bits(weights_of(base), kept)  # no memory is shared

    def test_half_precision_and_a_base_of_another_task(self, tmp_path):
        base, model = pair(dtype=torch.bfloat16)
        encoder = CroprViTModel(base.config).to(torch.bfloat16)
        encoder.load_state_dict(base.base_model.state_dict())
        save_diff(model, encoder, tmp_path / "task.safetensors")
        loaded = load_diff(encoder, tmp_path / "task.safetensors")
        assert loaded.dtype == torch.bfloat16
        assert_same_bits(loaded.state_dict(), model.state_dict())

    def test_a_trained_model(self, trained, tmp_path):
        base = tiny_model()
        base.load_state_dict(trained.before)
        changed = save_diff(trained.model, base, tmp_path / "task.safetensors")
        assert changed == count(changed_entries(trained.model.state_dict(), trained.before))
        expected = published(trained.model, tmp_path / "published")
        loaded = load_diff(base, tmp_path / "task.safetensors")
        assert_same_bits(loaded.state_dict(), expected.state_dict())
        with torch.no_grad():
            assert torch.equal(loaded(pixels()).logits, expected(pixels()).logits)

    def test_a_changed_weight_takes_eight_to_twelve_bytes(self, tmp_path):
        base, model = pair(hidden_size=256, intermediate_size=512, num_hidden_layers=3)
        changed = save_diff(model, base, tmp_path / "task.safetensors")
        tensors = load_file(tmp_path / "task.safetensors")
        dense = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith(module.DENSE))
        size = (tmp_path / "task.safetensors").stat().st_size - dense
        assert changed > 5000 and 8 <= size / changed <= 12
        for name, tensor in tensors.items():
            if name.startswith(module.INDICES):
                assert tensor.dtype == torch.int32 and (tensor.diff() > 0).all()  # sorted

    def test_the_file_says_what_it_is_and_names_no_path(self, tmp_path):
        base, model = pair()
        model.config.name_or_path = str(tmp_path / "private")
        processor = ViTImageProcessor(size={"height": 32, "width": 32})
        save_diff(model, base, tmp_path / "task.safetensors", processor)
        metadata = diff_metadata(tmp_path / "task.safetensors")
        assert metadata["class"] == "CroprViTForImageClassification" and len(metadata["base"]) == 64
        assert json.loads(metadata["config"])["pruning_rate"] == model.config.pruning_rate
        assert json.loads(metadata["image_processor"])["size"] == {"height": 32, "width": 32}
        assert str(tmp_path) not in json.dumps(metadata)
        (tmp_path / "text").write_text("")
        assert (tmp_path / "task.safetensors").stat().st_mode == (tmp_path / "text").stat().st_mode

    def test_other_bases_are_refused_with_the_reason(self, tmp_path):
        path = tmp_path / "task.safetensors"
        base, model = pair()
        save_diff(model, base, path)
        changed = copy.deepcopy(base)
        with torch.no_grad():
            changed.cropr_vit.layers[2].mlp.fc1.weight[0, 0] += 1e-3
        with pytest.raises(
            ValueError, match=r"made with another base: .* give the model that the training began with"
        ):
            load_diff(changed, path)
        build = TASKS["classification"].build
        others = {
            build(num_hidden_layers=4): r"lacks \d+ weights of the backbone, such as layers\.4\.",
            build(image_size=48): r"position_embeddings has the shape .* in the base, .* same image and patch size",
            build().bfloat16(): r"is torch.bfloat16 in the base, .* `dtype=torch.float32`",
        }
        for other, reason in others.items():
            with pytest.raises(ValueError, match=reason):
                load_diff(other, path)
            with pytest.raises(ValueError, match=reason):
                save_diff(model, other, tmp_path / "other.safetensors")
        for wrong in (torch.nn.Linear(2, 2), str(tmp_path)):
            with pytest.raises(ValueError, match="give a `CroprViT"):
                load_diff(wrong, path)
        assert not (tmp_path / "other.safetensors").exists()

    def test_a_model_that_changed_too_much_is_refused(self, tmp_path):
        build = TASKS["classification"].build
        with pytest.raises(ValueError, match="of the backbone differ, so that the model itself is smaller"):
            save_diff(build(seed=5), build(), tmp_path / "task.safetensors")
        assert not any(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("spoil", "reason"),
        [
            (
                lambda tensors, metadata: tensors.pop("dense/classifier.weight"),
                r"lacks tensors such as dense/class",
            ),
            (lambda tensors, metadata: tensors.pop(first(tensors, "indices/")), "lacks tensors such as indices/"),
            (lambda tensors, metadata: tensors.pop(first(tensors, "values/")), "lacks tensors such as values/"),
            (lambda tensors, metadata: tensors.update(extra=torch.ones(2)), "also has tensors such as extra"),
            (
                lambda tensors, metadata: tensors.update({"dense/classifier.bias": torch.ones(7)}),
                r"has dense/classifier.bias of the shape \(7,\) and type torch.float32, where its model needs \(5,\)",
            ),
            (
                lambda tensors, metadata: tensors.update({first(tensors, "values/"): torch.ones(3)}),
                "has values/.* where its model needs",
            ),
            (
                lambda tensors, metadata: tensors[first(tensors, "indices/")].fill_(10**8),
                "has indices/.* outside of the [0-9]+ weights",
            ),
            (lambda tensors, metadata: tensors[first(tensors, "indices/")].fill_(-1), "has indices/.* outside"),
            (lambda tensors, metadata: metadata.update({"class": "Unknown"}), "it has no class Unknown"),
            (lambda tensors, metadata: metadata.update({"config": "{"}), "damaged, or of another version"),
            (lambda tensors, metadata: metadata.update({"dtype": "float3"}), "damaged, or of another version"),
            (lambda tensors, metadata: metadata.pop("base"), "does not say its base: it is not a file of `save_diff`"),
        ],
    )
    def test_damaged_files_are_refused_with_the_reason(self, spoil, reason, tmp_path):
        path = tmp_path / "task.safetensors"
        base, model = pair()
        save_diff(model, base, path)
        tensors, metadata = load_file(path), diff_metadata(path)
        spoil(tensors, metadata)
        save_file(tensors, path, metadata)
        with pytest.raises(ValueError, match=reason) as error:
            load_diff(base, path)
        assert "make it again by `cropr-hf diff`" in str(error.value)

    def test_files_of_another_kind_are_refused(self, tmp_path):
        base, model = pair()
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="does not say its class, config, dtype, base: it is not a file of"):
            load_diff(base, tmp_path / "model.safetensors")
        (tmp_path / "task.safetensors").write_bytes(b"nothing of the kind")
        with pytest.raises(ValueError, match="damaged, or not a file of `save_diff`"):
            load_diff(base, tmp_path / "task.safetensors")

    def test_a_save_that_fails_leaves_the_old_file(self, tmp_path, monkeypatch):
        base, model = pair()
        path = tmp_path / "task.safetensors"
        save_diff(model, base, path)
        before = path.read_bytes()

        def fail(draft, content):
            draft.write_text("half")
            raise OSError("No space left on device")

        monkeypatch.setattr(Path, "write_bytes", fail)
        with pytest.raises(OSError, match="No space left"):
            save_diff(model, base, path)
        assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["task.safetensors"]


def first(tensors: dict[str, torch.Tensor], kind: str) -> str:
    return min(name for name in tensors if name.startswith(kind))


def run(*arguments: Any) -> int:
    return cli.main([str(argument) for argument in arguments])


class TestCommand:
    @pytest.fixture
    def folders(self, tmp_path):
        """A base and a published model with image processors, and the file of their difference."""
        base, model = pair(use_auxiliary_heads=True)
        for each, name, mean in ((base, "base", 0.5), (model, "published", 0.25)):
            each.save_pretrained(tmp_path / name)
            ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[mean] * 3).save_pretrained(tmp_path / name)
        assert run("diff", tmp_path / "base", tmp_path / "published", tmp_path / "task.safetensors") == 0
        return tmp_path

    def test_a_folder_becomes_a_file_and_the_same_folder_again(self, folders, capsys):
        assert run("diff", folders / "base", folders / "task.safetensors", folders / "out", "--apply") == 0
        assert f"{folders / 'out'} holds the model" in capsys.readouterr().out
        expected, found = (load_file(folders / name / "model.safetensors") for name in ("published", "out"))
        assert_same_bits(found, expected)
        for name in ("published", "out"):
            processor = ViTImageProcessor.from_pretrained(folders / name)
            assert list(processor.image_mean) == [0.25] * 3
        model = CroprViTForImageClassification.from_pretrained(folders / "out")
        assert model.config.pruning_rate == 2 and not model.config.use_auxiliary_heads
        assert json.loads((folders / "out" / "record.json").read_text())["model"]["base_model"] == "base"

    def test_failures_say_why(self, folders, capsys):
        file = folders / "task.safetensors"
        kept = file.read_bytes()
        for command, reason in (
            (("base", "published", "task.safetensors"), "task.safetensors is a file of a model; give another name"),
            (("base", "published", "nowhere/task.safetensors"), "there is no folder"),
            (("published", "task.safetensors", "out", "--apply"), "was made with another base"),
            (("base", "base/model.safetensors", "out", "--apply"), "is not a file of `save_diff`"),
            (("base", "task.safetensors", "published", "--apply"), "holds a model already"),
            (("base", "task.safetensors", "base", "--apply"), "is the model itself"),
            (("base", "missing.safetensors", "out", "--apply"), "missing.safetensors"),
            (("base", "task.safetensors", "other.safetensors"), "task.safetensors is a file; name the folder"),
        ):
            names = [name if name.startswith("--") else folders / name for name in command]
            assert run("diff", *names) == 1
            assert reason in capsys.readouterr().err, command
        assert file.read_bytes() == kept and not (folders / "out").exists()
        assert run("diff", folders / "base", file, folders / "published", "--apply", "--overwrite") == 0


class TestScript:
    @pytest.mark.full
    def test_from_a_source_to_a_small_file_and_back(self, example, tiny_vit, tmp_path):
        script = example("train_image_classification")
        fields = {"benchmark_rounds": 0, "num_train_epochs": 1, "diff_share": SHARE, "learning_rate": 3e-3}
        script.main(digits_command(tiny_vit, tmp_path / "published", **fields))
        assert (tmp_path / "published" / "checkpoint-4" / "diff_pruning.pt").exists()
        record = json.loads((tmp_path / "published" / "record.json").read_text())
        assert record["training"]["settings"]["diff_share"] == SHARE
        assert run("convert", tiny_vit, tmp_path / "base", "--config", '{"pruning_rate": 10}') == 0
        assert run("diff", tmp_path / "base", tmp_path / "published", tmp_path / "task.safetensors") == 0
        assert run("diff", tmp_path / "base", tmp_path / "task.safetensors", tmp_path / "out", "--apply") == 0
        found, base, expected = (
            load_file(tmp_path / name / "model.safetensors") for name in ("out", "base", "published")
        )
        assert_same_bits(found, expected)
        sparse = [name for name in base if is_backbone(name)]
        changed = sum(int((bits(base[name]) != bits(expected[name])).sum()) for name in sparse)
        assert 0 < changed <= SHARE * sum(base[name].numel() for name in sparse)

    @pytest.mark.full
    def test_wrong_combinations_are_refused(self, example, tiny_vit, tmp_path):
        script = example("train_image_classification")
        for fields, reason in (
            ({"ema_decay": 0.9}, "leave `WeightAverage` or `DiffPruning` out"),
            ({"freeze_backbone": True}, "is frozen"),
        ):
            with pytest.raises(ValueError, match=reason):
                script.main(digits_command(tiny_vit, tmp_path, diff_share=SHARE, benchmark_rounds=0, **fields))
