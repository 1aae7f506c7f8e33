"""Training helpers, and training by the stock Trainer: losses in the logs, exact resumption, stripped results."""

import json
import math
import random
import re

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cropr_hf import CroprViTConfig, CroprViTForImageClassification, CroprViTForSemanticSegmentation
from cropr_hf.training import (
    CroprTrainer,
    FrozenStart,
    PruningCurriculum,
    curriculum_schedule,
    layer_decay_groups,
    layer_decay_optimizer,
)
from cropr_hf.training.optimizer import layer_of
from tests.common import full


def tiny_model(model_class: type = CroprViTForImageClassification, **kwargs):
    torch.manual_seed(0)
    fields = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_size": 32,
        "patch_size": 8,
        "pruning_rate": 3,
        "num_labels": 4,
        "use_auxiliary_heads": True,
        "drop_path_rate": 0.1,
    }
    return model_class(CroprViTConfig(**{**fields, **kwargs}))


class ColouredSquares(torch.utils.data.Dataset):
    """Class = colour channel (or none) of a bright square at a random place."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        pixels = 0.1 * torch.randn(3, 32, 32, generator=generator)
        row, column = torch.randint(0, 3, (2,), generator=generator).tolist()
        if index % 4 < 3:
            pixels[index % 4, 8 * row : 8 * row + 12, 8 * column : 8 * column + 12] += 2.0
        return {"pixel_values": pixels, "labels": index % 4}


def training_arguments(folder, **kwargs) -> TrainingArguments:
    fields = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(**{**fields, **kwargs})


def losses(trainer: Trainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class TestLayerDecay:
    def test_every_parameter_is_in_one_group_with_the_rate_of_its_depth(self):
        model = tiny_model(num_register_tokens=1, layerscale_value=1.0)
        groups = layer_decay_groups(model, learning_rate=1.0, weight_decay=0.05, layer_decay=0.5)
        found = {id(parameter): group for group in groups for parameter in group["params"]}
        assert len(found) == len(list(model.parameters())) == sum(len(group["params"]) for group in groups)
        expected = {
            "cropr_vit.embeddings.patch_embeddings.weight": (0.5**5, 0.05),
            "cropr_vit.embeddings.cls_token": (0.5**5, 0.0),
            "cropr_vit.embeddings.register_tokens": (0.5**5, 0.0),
            "cropr_vit.embeddings.position_embeddings": (0.5**5, 0.0),
            "cropr_vit.layers.0.attention.q_proj.weight": (0.5**4, 0.05),
            "cropr_vit.layers.0.attention.q_proj.bias": (0.5**4, 0.0),
            "cropr_vit.layers.3.layer_scale1.lambda1": (0.5, 0.0),
            "cropr_vit.layers.3.mlp.fc2.weight": (0.5, 0.05),
            "cropr_vit.layernorm.weight": (1.0, 0.0),
            "cropr_vit.token_reducers.1.router.scorer.queries": (1.0, 0.05),
            "classifier.weight": (1.0, 0.05),
        }
        parameters = dict(model.named_parameters())
        for name, (rate, decay) in expected.items():
            group = found[id(parameters[name])]
            assert (group["lr"], group["weight_decay"]) == (rate, decay), name
        assert groups[0]["lr"] == 1.0  # the rate that the Trainer logs

    def test_the_backbone_can_have_a_rate_of_its_own(self):
        model = tiny_model()
        groups = layer_decay_groups(model, 1.0, 0.1, 0.5, backbone_learning_rate=0.01)
        rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
        parameters = dict(model.named_parameters())
        expected = {"classifier.weight": 1.0, "cropr_vit.token_reducers.1.router.scorer.queries": 1.0}
        expected |= {f"cropr_vit.layers.{block}.mlp.fc2.weight": 0.01 * 0.5 ** (3 - block) for block in range(4)}
        expected |= {"cropr_vit.embeddings.patch_embeddings.weight": 0.01 * 0.5**4}
        assert {name: rates[id(parameters[name])] for name in expected} == expected
        with pytest.raises(ValueError, match="`backbone_learning_rate` is -1"):
            layer_decay_groups(model, 1.0, 0.1, 0.5, backbone_learning_rate=-1)

    def test_pooling_layers_are_at_the_depth_of_the_head(self):
        model = tiny_model(pooling="attention", projection_dim=12)
        names = ("pooler.probe", "pooler.q_proj.weight", "visual_projection.weight")
        assert {layer_of(name, model.cropr_vit) for name in names} == {model.config.num_hidden_layers + 1}
        groups = layer_decay_groups(model, 1.0, 0.1, 0.5)
        decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        assert decays[id(model.cropr_vit.pooler.probe)] == 0.0
        assert decays[id(model.cropr_vit.visual_projection.weight)] == 0.1

    def test_frozen_parameters_are_left_out(self):
        model = tiny_model(use_auxiliary_heads=False)
        grouped = [p for group in layer_decay_groups(model, 1.0, 0.0, 1.0) for p in group["params"]]
        assert len(grouped) == len([p for p in model.parameters() if p.requires_grad]) < len(list(model.parameters()))

    def test_unknown_parameters_and_factors_are_errors(self):
        model = tiny_model()
        model.cropr_vit.adapter = torch.nn.Linear(2, 2)
        with pytest.raises(ValueError, match=r"adapter\.weight"):
            layer_decay_groups(model, 1.0, 0.0, 0.9)
        with pytest.raises(ValueError, match=r"1\.5"):
            layer_decay_groups(tiny_model(), 1.0, 0.0, 1.5)
        rates = {"learning_rate": 1.0, "weight_decay": 0.0, "layer_decay": 1.0}
        for name, value in (("learning_rate", math.nan), ("weight_decay", math.inf)):
            with pytest.raises(ValueError, match=f"`{name}` is {value}; it must be a finite number"):
                layer_decay_groups(tiny_model(), **{**rates, name: value})
        assert layer_of("layers.2.mlp.fc1.weight", tiny_model().cropr_vit) == 3

    def test_the_stock_trainer_uses_the_groups(self, tmp_path):
        model, args = tiny_model(), training_arguments(tmp_path, max_steps=1, weight_decay=0.1)
        trainer = Trainer(
            model,
            args,
            train_dataset=ColouredSquares(),
            optimizer_cls_and_kwargs=layer_decay_optimizer(model, args, layer_decay=0.5),
        )
        trainer.train()
        rates = {group["initial_lr"] for group in trainer.optimizer.param_groups}
        assert sorted(rates, reverse=True) == pytest.approx([1e-3 * 0.5**depth for depth in range(6)])


class TestFrozenStart:
    def test_the_backbone_waits_and_the_head_does_not(self, tmp_path):
        model, changed = tiny_model(), []

        class Watched(TrainerCallback):
            def on_step_begin(self, *args, **kwargs):
                self.before = {name: value.clone() for name, value in model.state_dict().items()}

            def on_step_end(self, *args, **kwargs):
                moved = {name for name, value in model.state_dict().items() if not value.equal(self.before[name])}
                parts = {"layers": "cropr_vit.layers", "head": "classifier", "queries": "cropr_vit.token_reducers"}
                changed.append(
                    {part for part, start in parts.items() if any(name.startswith(start) for name in moved)}
                )

        arguments = training_arguments(tmp_path, num_train_epochs=1)  # 8 steps
        optimizer = layer_decay_optimizer(model, arguments, 1.0)
        callbacks = [FrozenStart(0.3), Watched()]
        trainer = CroprTrainer(
            model, arguments, train_dataset=ColouredSquares(), optimizer_cls_and_kwargs=optimizer, callbacks=callbacks
        )
        trainer.train()
        assert changed == 3 * [{"head", "queries"}] + 5 * [{"head", "queries", "layers"}]
        rates = {group["is_head"]: group["initial_lr"] for group in trainer.optimizer.param_groups}
        assert rates == {True: 1e-3, False: 1e-3}

    def test_what_it_cannot_do(self, tmp_path):
        with pytest.raises(ValueError, match=r"`share` is 1.5; it must be in \[0, 1\]"):
            FrozenStart(1.5)
        trainer = CroprTrainer(
            tiny_model(), training_arguments(tmp_path), train_dataset=ColouredSquares(), callbacks=[FrozenStart(0.5)]
        )
        with pytest.raises(ValueError, match="does not know which parameters are of the backbone; use"):
            trainer.train()


class TestLossParts:
    def test_logs_and_history_hold_the_parts_of_the_loss(self, tmp_path):
        trainer = CroprTrainer(
            tiny_model(auxiliary_loss_weight=0.5), training_arguments(tmp_path), train_dataset=ColouredSquares()
        )
        trainer.train()
        total, main = losses(trainer), losses(trainer, "main_loss")
        first, second = losses(trainer, "auxiliary_loss_1"), losses(trainer, "auxiliary_loss_2")
        assert len(total) == len(main) == len(first) == len(second) == 16
        for parts in zip(total, main, first, second):
            assert parts[0] == pytest.approx(parts[1] + 0.5 * (parts[2] + parts[3]), abs=2e-3)

    def test_parts_are_means_over_accumulated_and_unlogged_steps(self, tmp_path):
        args = training_arguments(tmp_path, gradient_accumulation_steps=2, logging_steps=2, num_train_epochs=1)
        trainer = CroprTrainer(tiny_model(), args, train_dataset=ColouredSquares())
        trainer.train()
        assert len(losses(trainer)) == 2
        for total, *parts in zip(
            losses(trainer),
            losses(trainer, "main_loss"),
            losses(trainer, "auxiliary_loss_1"),
            losses(trainer, "auxiliary_loss_2"),
        ):
            assert total == pytest.approx(sum(parts), abs=2e-3)

    def test_an_unpruned_model_logs_its_main_loss(self, tmp_path):
        model = tiny_model(token_reducer=None, pruning_rate=None, use_auxiliary_heads=False)
        trainer = CroprTrainer(model, training_arguments(tmp_path, max_steps=2), train_dataset=ColouredSquares())
        trainer.train()
        assert losses(trainer, "main_loss") == pytest.approx(losses(trainer), abs=1e-3)

    def test_losses_that_bypass_the_model_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="label_smoothing"):
            CroprTrainer(tiny_model(), training_arguments(tmp_path, label_smoothing_factor=0.1))
        with pytest.raises(ValueError, match="compute_loss_func"):
            CroprTrainer(tiny_model(), training_arguments(tmp_path), compute_loss_func=lambda *args, **kwargs: 0)


class TestStockTrainer:
    @pytest.mark.full
    def test_a_resumed_run_repeats_the_uninterrupted_one(self, tmp_path):
        """With best-model loading: nothing of a checkpoint may be lost, and the published folder is stripped."""
        kwargs = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 4, "save_steps": 4}
        kwargs |= {"load_best_model_at_end": True}

        def trainer(folder) -> Trainer:
            return Trainer(
                tiny_model(),
                training_arguments(folder, **kwargs),
                train_dataset=ColouredSquares(),
                eval_dataset=ColouredSquares(),
            )

        whole = trainer(tmp_path / "whole")
        whole.train()

        class Interrupt(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == 10:  # two steps after the checkpoint
                    raise KeyboardInterrupt

        stopped = trainer(tmp_path / "resumed")
        stopped.add_callback(Interrupt())
        with pytest.raises(KeyboardInterrupt):
            stopped.train()
        resumed = trainer(tmp_path / "resumed")
        resumed.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-8"))

        assert len(losses(whole)) == 16
        assert losses(resumed) == losses(whole)
        assert losses(resumed, "eval_loss") == losses(whole, "eval_loss")
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(tensor, resumed.model.state_dict()[name]), name

        resumed.save_model()
        config = json.loads((tmp_path / "resumed" / "config.json").read_text())
        published = CroprViTForImageClassification.from_pretrained(tmp_path / "resumed")
        assert config["use_auxiliary_heads"] is False
        assert not any("aggregator" in name or "auxiliary" in name for name in published.state_dict())
        pixels = torch.stack([ColouredSquares()[i]["pixel_values"] for i in range(4)])
        with torch.no_grad():
            expected = resumed.model.eval()(pixels).logits
            torch.testing.assert_close(published(pixels).logits, expected, rtol=1e-4, atol=1e-4)

    def test_predictions_in_evaluation_are_the_logits_alone(self, tmp_path):
        trainer = Trainer(tiny_model(), training_arguments(tmp_path), eval_dataset=ColouredSquares())
        prediction = trainer.predict(ColouredSquares())
        assert prediction.predictions.shape == (64, 4)
        assert prediction.label_ids.shape == (64,)

    @pytest.mark.full
    def test_it_learns(self, tmp_path):
        """Main and auxiliary losses fall well below chance (ln 4 = 1.39) with half of the patches pruned."""
        trainer = CroprTrainer(
            tiny_model(drop_path_rate=0.0),
            training_arguments(tmp_path, num_train_epochs=12, learning_rate=3e-3),
            train_dataset=ColouredSquares(),
        )
        trainer.train()
        assert sum(losses(trainer, "main_loss")[-8:]) / 8 < 0.5
        assert sum(losses(trainer, "auxiliary_loss_2")[-8:]) / 8 < 0.9


class ColouredMaps(ColouredSquares):
    """Every pixel of the square has its class, the others the fourth, and the left edge none."""

    def __getitem__(self, index: int) -> dict:
        pixels = super().__getitem__(index)["pixel_values"]
        brightest = pixels.max(dim=0)
        labels = torch.where(brightest.values > 1.0, brightest.indices, 3)
        labels[:, 0] = 255
        return {"pixel_values": pixels, "labels": labels}


class TestSemanticSegmentation:
    def test_it_learns_and_predicts_maps(self, tmp_path):
        """Losses fall well below 0.45, the entropy of the labels, with 7 of 16 patches pruned."""
        fields = {"num_queries": None, "drop_path_rate": 0.0, "auxiliary_loss_weight": 0.5}
        model = tiny_model(CroprViTForSemanticSegmentation, **fields)
        args = training_arguments(tmp_path, num_train_epochs=6, learning_rate=3e-3)
        trainer = CroprTrainer(
            model,
            args,
            train_dataset=ColouredMaps(),
            optimizer_cls_and_kwargs=layer_decay_optimizer(model, args, layer_decay=0.9),
        )
        trainer.train()
        names = ("main_loss", "auxiliary_loss_1", "auxiliary_loss_2")
        total, *parts = (losses(trainer, name) for name in ("loss", *names))
        assert len(total) == len(parts[0]) == 48
        for step, (main, first, second) in enumerate(zip(*parts)):
            assert total[step] == pytest.approx(main + 0.5 * (first + second), abs=2e-3)
        main, first, second = (sum(part[-8:]) / 8 for part in parts)
        assert main < 0.25 and first < 0.35 and second < 0.35
        prediction = trainer.predict(ColouredMaps())
        assert prediction.predictions.shape == (64, 4, 4, 4) and prediction.label_ids.shape == (64, 32, 32)
        assert prediction.metrics["test_loss"] == pytest.approx(main, abs=0.05)


def drawn_levels(curriculum: PruningCurriculum, model, schedules: list, seed: int) -> list[int]:
    """Which of the schedules each of 400 steps has."""
    args, state = TrainingArguments("unused", use_cpu=True, seed=seed), TrainerState(max_steps=400)
    levels = []
    for state.global_step in range(400):
        curriculum.on_step_begin(args, state, TrainerControl(), model=model)
        levels.append(schedules.index(model.cropr_vit.pruning))
        curriculum.on_step_end(args, state, TrainerControl(), model=model)
        assert model.cropr_vit.pruning is None  # what evaluation and checkpoints see
    return levels


class TestPruningCurriculum:
    @pytest.mark.parametrize(
        "fields",
        [
            {"pruning_rate": 8},
            {"pruning_rate": 7, "use_cls_token": False, "pooling": "patch_mean"},
            {"pruning_rate": 3, "num_register_tokens": 4},
            {"pruning_schedule": [196] * 3 + [39] * 21, "last_layer_fusion": False},
            {"pruning_schedule": [150, 149, 148, 99, 98, 97, *[50] * 18]},
        ],
    )
    def test_the_schedule_grows_in_multiples_of_eight_to_the_configured_one(self, fields):
        config = CroprViTConfig.from_size("large", **fields)
        final = config.kept_patches()
        assert curriculum_schedule(config, 0.0) == [196] * 24
        assert curriculum_schedule(config, 1.0) == final
        before = curriculum_schedule(config, 0.0)
        for progress in (level / 32 for level in range(1, 32)):
            schedule = curriculum_schedule(config, progress)
            assert config.kept_patches(pruning=schedule) == schedule  # possible for this model
            for now, earlier, last in zip(schedule, before, final):
                assert last <= now <= earlier
                assert now == 196 or (now + config.num_prefix_tokens) % 8 == 0
                assert now - last - (1 - progress) * (196 - last) < 8
            before = schedule

    @pytest.mark.parametrize(("share", "levels", "schedules"), [(0.5, 4, 5), (1.0, 1, 1), (0.25, 32, 33)])
    def test_schedules_are_few_and_a_function_of_the_step(self, share, levels, schedules):
        model, state = tiny_model(pruning_rate=5), TrainerState(max_steps=400)
        curriculum = PruningCurriculum(share, levels)
        arguments, control = TrainingArguments("unused", use_cpu=True), TrainerControl()
        seen = []
        for state.global_step in range(400):
            curriculum.on_step_begin(arguments, state, control, model=model)
            seen.append(model.cropr_vit.pruning)
            curriculum.on_step_end(arguments, state, control, model=model)
            assert model.cropr_vit.pruning is None  # what evaluation and checkpoints see
        first_final = round(share * 400)
        assert seen[first_final:] == [None] * (400 - first_final) and None not in seen[:first_final]
        assert seen[0] == [16] * len(seen[0])
        assert len({str(schedule) for schedule in seen}) <= schedules

    @pytest.mark.parametrize(("share", "growing"), [(0.5, 200), (0.0, 0)])
    def test_strengths_are_drawn_from_a_range_of_what_has_grown(self, share, growing):
        model = tiny_model(pruning_rate=40, image_size=128)  # 256 patches, of which 2 * 40 + 1 go
        final, curriculum = model.config.kept_patches(), PruningCurriculum(share, 8, pruning_range=(0.25, 1))
        schedules = [curriculum_schedule(model.config, level / 8) for level in range(8)] + [None]
        levels = drawn_levels(curriculum, model, schedules, seed=3)
        for step in range(growing):
            reached = 8 * step // growing
            assert round(reached / 4) <= levels[step] <= reached
        grown = levels[growing:]
        assert set(grown) == set(range(2, 9))  # the ends of the range are among them
        assert max(grown.count(level) for level in range(2, 9)) < 2.5 * len(grown) / 7  # evenly
        assert any(schedules[level][-1] > final[-1] for level in grown if level < 8)

    def test_draws_are_a_function_of_seed_and_step(self):
        model = tiny_model(pruning_rate=40, image_size=128)
        schedules = [curriculum_schedule(model.config, level / 32) for level in range(32)] + [None]

        def levels(seed: int) -> list[int]:
            return drawn_levels(PruningCurriculum(0.5, pruning_range=(0, 1)), model, schedules, seed)

        first = levels(seed=3)
        torch.manual_seed(5)
        random.seed(5)
        state = random.getstate(), torch.get_rng_state()
        assert levels(seed=3) == first != levels(seed=4)
        assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])

    @pytest.mark.parametrize("pruning_range", [(0, 1.5), (-0.1, 1), (1, 0), (0.5, 0.5), (0.5,), (0, 0.5, 1)])
    def test_wrong_ranges_are_errors(self, pruning_range):
        with pytest.raises(ValueError, match=re.escape(f"`pruning_range` is {pruning_range}")):
            PruningCurriculum(pruning_range=pruning_range)

    @pytest.mark.parametrize("pruning_range", [None, *full(((0.0, 1.0),))])
    def test_a_resumed_run_repeats_the_uninterrupted_one(self, tmp_path, pruning_range):
        def trainer(folder) -> Trainer:
            args = training_arguments(folder, save_strategy="steps", save_steps=4)
            return Trainer(
                tiny_model(pruning_rate=5),
                args,
                train_dataset=ColouredSquares(),
                callbacks=[PruningCurriculum(0.8, pruning_range=pruning_range)],
            )

        whole = trainer(tmp_path / "whole")
        counts = []

        class Watch(TrainerCallback):
            def on_step_begin(self, args, state, control, model=None, **kwargs):
                counts.append(model.config.kept_patches(pruning=model.cropr_vit.pruning)[-1])

        whole.add_callback(Watch())
        whole.train()
        assert counts[0] == 16 and (sorted(counts, reverse=True) == counts) == (pruning_range is None)
        assert counts[-1] == 5 or pruning_range is not None
        assert whole.model.cropr_vit.pruning is None
        resumed = trainer(tmp_path / "resumed")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
        assert losses(resumed) == losses(whole)

    @pytest.mark.full
    @torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True)
    def test_token_counts_can_be_variables_of_the_compiled_graph(self):
        """The setting that the docstring recommends: few compilations, however many schedules follow."""
        torch._dynamo.reset()
        counter = CompileCounter()
        model = tiny_model(pruning_rate=100, image_size=128).train()
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        schedules = [curriculum_schedule(model.config, level / 16) for level in range(16)]
        assert len({tuple(schedule) for schedule in schedules}) > 2 * 6
        for schedule in schedules:
            model.set_pruning(schedule)
            compiled(torch.zeros(2, 3, 128, 128), labels=torch.tensor([0, 1]))
        torch._dynamo.reset()
        assert counter.frame_count <= 6

    def test_shares_out_of_range_are_errors(self):
        with pytest.raises(ValueError, match=r"1\.5"):
            PruningCurriculum(1.5)
        with pytest.raises(ValueError, match="`levels` is 0"):
            PruningCurriculum(0.5, levels=0)
        for progress in (-0.1, 1.1, float("nan")):
            with pytest.raises(ValueError, match=f"`progress` is {progress}"):
                curriculum_schedule(tiny_model().config, progress)
