"""Frozen backbone, LoRA, averaged weights and streams, by the Trainer and by the scripts."""

import importlib
import json
import random
import sys
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForImageClassification,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    set_seed,
)

from cropr_hf import (
    CroprViTBackbone,
    CroprViTForImageClassification,
    CroprViTForInstanceSegmentation,
    CroprViTForObjectDetection,
    CroprViTForSemanticSegmentation,
)
from cropr_hf.training import (
    CroprTrainer,
    PruningCurriculum,
    TrainingStream,
    WeightAverage,
    freeze_backbone,
    layer_decay_groups,
    layer_decay_optimizer,
    lora_model,
    merge_lora,
)
from tests.common import assert_close_relative, enable_activation_checkpointing, full
from tests.test_examples import EXAMPLES, digits_command, losses
from tests.test_training import ColouredSquares, tiny_model, training_arguments


DETECTOR = {"pyramid_channels": 8, "box_head_size": 16, "use_cls_token": False, "pooling": "patch_mean"}
TASKS = {
    CroprViTForImageClassification: {},
    CroprViTForSemanticSegmentation: {"num_queries": None},
    CroprViTForObjectDetection: DETECTOR,
    CroprViTForInstanceSegmentation: DETECTOR,
    CroprViTBackbone: {"out_indices": [2, 4]},
}
SAVES = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


@pytest.fixture(scope="module")
def classification():
    """The script for image classification."""
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module("train_image_classification")
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def tiny_vit(tmp_path_factory) -> str:
    """A folder with a random plain ViT and its image processor."""
    torch.manual_seed(0)
    folder = str(tmp_path_factory.mktemp("vit"))
    size = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}
    ViTForImageClassification(ViTConfig(**size, image_size=48, patch_size=8)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 48, "width": 48}).save_pretrained(folder)
    return folder


def command(tiny_vit: str, folder, **kwargs) -> list[str]:
    return digits_command(tiny_vit, folder, **{"benchmark_rounds": 0, "num_train_epochs": 1, **kwargs})


def pixels(count: int = 4) -> torch.Tensor:
    return torch.stack([ColouredSquares()[index]["pixel_values"] for index in range(count)])


def task_model(model_class: type):
    return tiny_model(model_class, **TASKS[model_class])


def task_loss(model) -> torch.Tensor:
    """The loss of two images; of a backbone the sum of its maps, and its auxiliary losses."""
    images = pixels(2)
    if isinstance(model, CroprViTBackbone):
        outputs = model(images, labels=torch.eye(4)[:2])
        return sum(feature_map.sum() for feature_map in outputs.feature_maps)
    if isinstance(model, CroprViTForImageClassification):
        return model(images, labels=torch.tensor([0, 1])).loss
    if isinstance(model, CroprViTForSemanticSegmentation):
        return model(images, labels=torch.randint(0, 4, (2, 32, 32))).loss
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.6]])
    labels = [{"class_labels": torch.tensor([1]), "boxes": boxes, "masks": torch.ones(1, 32, 32)} for _ in range(2)]
    return model(images, labels=labels).loss


def trainer_for(model, folder, callbacks=(), **kwargs) -> CroprTrainer:
    args = training_arguments(folder, **kwargs)
    return CroprTrainer(
        model,
        args,
        train_dataset=ColouredSquares(),
        eval_dataset=ColouredSquares(),
        callbacks=list(callbacks),
        optimizer_cls_and_kwargs=layer_decay_optimizer(model, args, layer_decay=0.9),
    )


def history(trainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def interrupt_and_resume(make_trainer, folder) -> CroprTrainer:
    """Runs into an interruption one step after the second checkpoint, then goes on in a new trainer."""
    stopped = make_trainer(folder)
    stopped.add_callback(StopAt(5))
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = make_trainer(folder)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    return resumed


def assert_same_weights(model, other) -> None:
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


class TestFrozenBackbone:
    @pytest.mark.parametrize("model_class", TASKS, ids=lambda task: task.__name__)
    def test_no_gradient_reaches_the_backbone(self, model_class):
        model = task_model(model_class).train()
        freeze_backbone(model)
        maps = []
        backbone = model.cropr_vit
        backbone.layers[-1].register_forward_hook(lambda module, args, output: maps.append(output))
        loss = task_loss(model)
        assert not maps[0].requires_grad  # no graph was built through the blocks
        if model_class is not CroprViTBackbone:
            loss.backward()
            trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
            assert any("token_reducers" in name for name in trained)
            assert any(not name.startswith("cropr_vit.") for name in trained)
            assert all("token_reducers" in name for name in trained if name.startswith("cropr_vit."))
        grouped = {
            id(parameter) for group in layer_decay_groups(model, 1.0, 0.1, 0.5) for parameter in group["params"]
        }
        frozen = [parameter for name, parameter in model.named_parameters() if id(parameter) not in grouped]
        assert frozen and not any(parameter.requires_grad for parameter in frozen)

    def test_it_is_deterministic_in_training(self):
        model = tiny_model(drop_path_rate=0.9, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
        freeze_backbone(model)
        model.train()
        assert torch.equal(model(pixels()).logits, model(pixels()).logits)
        assert (model.config.drop_path_rate, model.config.hidden_dropout_prob) == (0.0, 0.0)
        assert model.config.attention_probs_dropout_prob == 0.0

    def test_cropr_modules_and_head_learn_by_the_trainer(self, tmp_path):
        model = tiny_model()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        freeze_backbone(model)
        trainer_for(model, tmp_path, max_steps=3, callbacks=[PruningCurriculum(0.5)]).train()
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert changed == {name for name in before if "token_reducers" in name or not name.startswith("cropr_vit.")}

    @pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of the frozen blocks
    def test_cropr_modules_and_head_get_the_same_gradients_under_reentrant_checkpoints(self):
        gradients = []
        for checkpointing in (False, True):
            model = task_model(CroprViTForSemanticSegmentation).train()
            freeze_backbone(model)
            if checkpointing:
                enable_activation_checkpointing(model, use_reentrant=True)
            torch.manual_seed(0)
            task_loss(model).backward()
            gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad})
        assert_close_relative(gradients[1], gradients[0])

    def test_other_models_are_refused(self):
        with pytest.raises(ValueError, match="contains 0 Cropr ViTs"):
            freeze_backbone(torch.nn.Linear(2, 2))

    def test_by_the_script(self, classification, tiny_vit, tmp_path):
        classification.main(command(tiny_vit, tmp_path, freeze_backbone=True))
        published = AutoModelForImageClassification.from_pretrained(tmp_path)
        source = CroprViTForImageClassification.from_vit(tiny_vit, pruning_rate=10, num_labels=10)
        for name, parameter in source.cropr_vit.layers.named_parameters():
            assert torch.equal(parameter, published.cropr_vit.layers.get_parameter(name)), name
        with pytest.raises(ValueError, match="lora_rank 2"):
            classification.main(command(tiny_vit, tmp_path, freeze_backbone=True, lora_rank=2))


@pytest.mark.parametrize(("token_reducer", "use_reentrant"), [("cropr", False), ("cropr", True), ("tome", False)])
def test_checkpointing_gives_blocks_behind_frozen_ones_their_gradients(token_reducer, use_reentrant):
    fields = {"token_reducer": token_reducer, "use_auxiliary_heads": token_reducer == "cropr", "drop_path_rate": 0.0}
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(**fields).train()
        model.cropr_vit.embeddings.requires_grad_(False)
        model.cropr_vit.layers[:2].requires_grad_(False)
        if checkpointing:
            enable_activation_checkpointing(model, use_reentrant=use_reentrant)
        task_loss(model).backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad})
        assert not any(weight.grad is not None for weight in model.cropr_vit.layers[:2].parameters())
    assert any(".layers.2." in name for name in gradients[0])
    assert_close_relative(gradients[1], gradients[0])


class TestLora:
    @pytest.fixture(autouse=True)
    def _peft(self):
        pytest.importorskip("peft")

    @pytest.mark.parametrize("model_class", TASKS, ids=lambda task: task.__name__)
    def test_adapters_cropr_modules_and_head_are_trained(self, model_class):
        plain = task_model(model_class)
        heads = {name for name, _ in plain.named_parameters() if not name.startswith("cropr_vit.")}
        reducers = {name for name, _ in plain.named_parameters() if "token_reducers" in name}
        model = lora_model(plain, rank=2).train()
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        in_full = [name for name in trained if ".lora_" not in name]
        assert len(in_full) == len(heads | reducers)
        assert not any(name.count("modules_to_save") > 1 for name in trained)
        assert len(trained) - len(in_full) == 4 * 6 * 2  # blocks, linear layers, two matrices
        if model_class is not CroprViTBackbone:
            task_loss(model.get_base_model()).backward()
            without = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
            without = [name for name in without if model.get_parameter(name).grad is None]
            assert without == []
        groups = layer_decay_groups(model, learning_rate=1.0, weight_decay=0.1, layer_decay=0.5)
        assert sum(len(group["params"]) for group in groups) == len(trained)
        assert {group["lr"] for group in groups} == {0.5**depth for depth in range(5)}  # head to first block

    @pytest.mark.parametrize(
        "model_class",
        [
            CroprViTForImageClassification,
            *full(CroprViTForSemanticSegmentation, CroprViTForObjectDetection, CroprViTForInstanceSegmentation),
        ],
    )
    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_checkpointing_gives_adapters_their_gradients(self, model_class, use_reentrant):
        """A reentrant checkpoint computes none unless an input requires one; the frozen embeddings require none."""
        fields = {**TASKS[model_class], "drop_path_rate": 0.0}

        def gradients(*, checkpointing: bool) -> dict[str, torch.Tensor]:
            model = lora_model(tiny_model(model_class, **fields), rank=2, init_lora_weights=False).train()
            if checkpointing:  # as the Trainer does, before or after the adapters
                enable_activation_checkpointing(model.get_base_model(), use_reentrant=use_reentrant)
            torch.manual_seed(0)
            task_loss(model.get_base_model()).backward()
            return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}

        torch.manual_seed(0)
        expected = gradients(checkpointing=False)
        torch.manual_seed(0)
        found = gradients(checkpointing=True)
        for name, gradient in expected.items():
            assert gradient.any(), name
            assert_close_relative(found[name], gradient, msg=name)

    def test_the_merged_model_computes_the_same_and_is_stripped(self, tmp_path):
        model = lora_model(tiny_model(), rank=2)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        model.eval()
        model.set_pruning(1)  # through the wrapper
        more = model(pixel_values=pixels()).logits
        model.set_pruning(None)
        expected = model(pixel_values=pixels(), output_pruning=True)
        assert not torch.allclose(more, expected.logits, atol=1e-4)
        merged = merge_lora(model)
        outputs = merged(pixels(), output_pruning=True)
        assert_close_relative(outputs.logits, expected.logits)
        assert torch.equal(outputs.pruned_after_block, expected.pruned_after_block)
        assert set(merged.state_dict()) == set(tiny_model().state_dict())
        assert all(parameter.requires_grad for parameter in merged.parameters())
        merged.save_pretrained(tmp_path)
        published = CroprViTForImageClassification.from_pretrained(tmp_path)
        assert not any("lora" in name or "auxiliary" in name for name in published.state_dict())
        assert_close_relative(published(pixels()).logits, expected.logits)

    @pytest.mark.parametrize("model_class", [CroprViTForImageClassification, *full(CroprViTForSemanticSegmentation)])
    def test_adapters_load_on_the_published_base_and_on_the_complete_one(self, model_class, tmp_path):
        """By what users of PEFT type; the published base has one vector in place of the queries that were trained."""
        from peft import PeftModel

        task_model(model_class).save_pretrained(tmp_path / "base")
        base = model_class.from_pretrained(tmp_path / "base", use_auxiliary_heads=True)
        model = lora_model(base, rank=2, init_lora_weights=False)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        expected = model.eval()(pixel_values=pixels(), output_pruning=True)
        model.save_pretrained(tmp_path / "adapters")
        for heads in (False, True):
            base = model_class.from_pretrained(tmp_path / "base", use_auxiliary_heads=heads)
            loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapters")).eval()
            for each in (loaded, loaded.merge_and_unload()):
                outputs = each(pixel_values=pixels(), output_pruning=True)
                assert torch.equal(outputs.pruned_after_block, expected.pruned_after_block)
                assert_close_relative(outputs.logits, expected.logits)
        merged = merge_lora(model)
        assert merged.state_dict().keys() == task_model(model_class).state_dict().keys()

    def test_what_it_publishes_names_no_path_of_this_machine(self, tmp_path):
        tiny_model().save_pretrained(tmp_path / "private" / "base")
        source = CroprViTForImageClassification.from_pretrained(
            tmp_path / "private" / "base", use_auxiliary_heads=True
        )
        lora_model(source, rank=2).save_pretrained(tmp_path / "adapters")
        stored = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
        assert not stored["base_model_name_or_path"]  # which PEFT would take for a repository
        for file in ("adapter_config.json", "README.md"):
            assert str(tmp_path) not in (tmp_path / "adapters" / file).read_text()

    @pytest.mark.full
    def test_a_resumed_run_repeats_the_uninterrupted_one(self, tmp_path):
        def make_trainer(folder):
            model = lora_model(tiny_model(drop_path_rate=0.2), rank=2, lora_dropout=0.1)
            return trainer_for(model, folder, callbacks=[PruningCurriculum(0.8)], **SAVES)

        whole = make_trainer(tmp_path / "whole")
        whole.train()
        assert len(history(whole, "auxiliary_loss_2")) == 6
        resumed = interrupt_and_resume(make_trainer, tmp_path / "resumed")
        assert history(resumed) == history(whole)
        assert_same_weights(resumed.model, whole.model)

    def test_by_the_script(self, classification, tiny_vit, tmp_path):
        metrics = classification.main(command(tiny_vit, tmp_path, lora_rank=2, learning_rate=1e-2))
        published = AutoModelForImageClassification.from_pretrained(tmp_path)
        assert not any("lora" in name for name in published.state_dict())
        assert (tmp_path / "checkpoint-4" / "adapter_model.safetensors").exists()
        # The published model is the one that was evaluated.
        again = classification.main(command(str(tmp_path), tmp_path / "again", do_train=False))
        assert again["eval_loss"] == pytest.approx(metrics["eval_loss"], abs=1e-4)

    def test_wrong_use_is_refused(self):
        with pytest.raises(ValueError, match="`rank` is 0"):
            lora_model(tiny_model(), rank=0)
        with pytest.raises(ValueError, match="`alpha` is nan; it must be a positive number"):
            lora_model(tiny_model(), alpha=float("nan"))
        with pytest.raises(ValueError, match="Linear is no"):
            lora_model(torch.nn.Linear(2, 2))


class TestWeightAverage:
    def test_it_is_the_moving_average_and_what_is_evaluated_and_saved(self, tmp_path):
        averages, evaluated = [], []

        class Watch(TrainerCallback):
            def on_step_end(self, args, state, control, model=None, **kwargs):
                weights = model.classifier.weight.detach().clone()
                averages.append(weights if not averages else 0.5 * averages[-1] + 0.5 * weights)

            def on_prediction_step(self, args, state, control, model=None, **kwargs):
                evaluated.append((state.global_step, model.classifier.weight.detach().clone()))

        kwargs = {"eval_strategy": "steps", "eval_steps": 3, **SAVES}
        trainer = trainer_for(tiny_model(), tmp_path, callbacks=[WeightAverage(0.5), Watch()], **kwargs)
        trainer.train()
        assert {step for step, _ in evaluated} == {3, 6}
        for step, weights in evaluated:
            torch.testing.assert_close(weights, averages[step - 1])
        torch.testing.assert_close(trainer.model.classifier.weight.detach(), averages[-1])
        checkpoint = load_file(tmp_path / "checkpoint-6" / "model.safetensors")["classifier.weight"]
        assert not torch.allclose(checkpoint, averages[-1], atol=1e-5)  # the weights themselves
        stored = torch.load(tmp_path / "checkpoint-6" / "ema.pt", weights_only=True)
        torch.testing.assert_close(stored["module.classifier.weight"], averages[-1])
        trainer.save_model()
        published = CroprViTForImageClassification.from_pretrained(tmp_path)
        assert not any("auxiliary" in name for name in published.state_dict())
        torch.testing.assert_close(published.classifier.weight.detach(), averages[-1])
        assert trainer.evaluate()["eval_loss"] == history(trainer, "eval_loss")[1]

    @pytest.mark.full
    @pytest.mark.parametrize("best", [False, True])
    def test_a_resumed_run_repeats_the_uninterrupted_one(self, tmp_path, best):
        def make_trainer(folder):
            kwargs = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": best, **SAVES}
            kwargs |= {"metric_for_best_model": "loss", "greater_is_better": True}  # the first, and not the last
            return trainer_for(tiny_model(), folder, [WeightAverage(0.8)], **kwargs)

        whole = make_trainer(tmp_path / "whole")
        whole.train()
        resumed = interrupt_and_resume(make_trainer, tmp_path / "resumed")
        assert history(resumed) == history(whole)
        assert history(resumed, "eval_loss") == history(whole, "eval_loss")
        assert_same_weights(resumed.model, whole.model)
        if best:
            expected = history(whole, "eval_loss")[0]
            assert expected > history(whole, "eval_loss")[-1]
            assert whole.evaluate()["eval_loss"] == expected

    def test_the_weights_come_back_when_an_evaluation_fails(self):
        model, average = tiny_model(), WeightAverage(0.5)
        average.average = torch.optim.swa_utils.AveragedModel(model)
        average.average.update_parameters(model)
        with torch.no_grad():
            model.classifier.weight.add_(1.0)
        weights = model.classifier.weight.detach().clone()
        with pytest.raises(RuntimeError), average.applied(model):
            assert not torch.equal(model.classifier.weight, weights)
            with average.applied(model):  # saving inside of evaluation, for instance
                assert not torch.equal(model.classifier.weight, weights)
            raise RuntimeError
        assert torch.equal(model.classifier.weight, weights)

    def test_it_averages_what_lora_trains(self, tmp_path):
        pytest.importorskip("peft")
        trainer = trainer_for(lora_model(tiny_model(), 2), tmp_path, [WeightAverage(0.5)], **SAVES)
        trainer.train()
        name = "base_model.model.classifier.modules_to_save.default.weight"
        stored = torch.load(tmp_path / "checkpoint-6" / "ema.pt", weights_only=True)
        assert torch.equal(trainer.model.state_dict()[name], stored[f"module.{name}"])

    def test_wrong_use_is_refused(self, tmp_path, monkeypatch):
        with pytest.raises(ValueError, match="`decay` is 1"):
            WeightAverage(1.0)
        with pytest.raises(ValueError, match="bfloat16"):
            trainer_for(tiny_model().bfloat16(), tmp_path, [WeightAverage(0.9)]).train()
        trainer_for(tiny_model(), tmp_path, **{**SAVES, "max_steps": 2}).train()
        with pytest.raises(ValueError, match="no average"):
            trainer_for(tiny_model(), tmp_path, [WeightAverage(0.9)]).train(str(tmp_path / "checkpoint-2"))

        from accelerate.utils import DistributedType

        from cropr_hf.training import ema

        monkeypatch.setattr(ema, "SHARDED", (DistributedType.NO,))
        with pytest.raises(ValueError, match="DDP"):
            trainer_for(tiny_model(), tmp_path, [WeightAverage(0.9)]).train()

    def test_by_the_script(self, classification, tiny_vit, tmp_path):
        classification.main(command(tiny_vit, tmp_path, ema_decay=0.5))
        average = torch.load(tmp_path / "checkpoint-4" / "ema.pt", weights_only=True)
        published = AutoModelForImageClassification.from_pretrained(tmp_path)
        assert torch.equal(published.classifier.weight, average["module.classifier.weight"])


def numbers(count: int, num_shards: int):
    return Dataset.from_dict({"number": list(range(count))}).to_iterable_dataset(num_shards=num_shards)


def noisy(columns: dict[str, list]) -> dict[str, list]:
    """Numbers with one random number of each kind that augmentation draws."""
    draws = (lambda: torch.rand(()).item(), random.random, np.random.rand)
    return {"value": [(number, *(draw() for draw in draws)) for number in columns["number"]]}


def read(stream: TrainingStream, batches: int, workers: int = 0) -> list[list[tuple[int, float]]]:
    loader = iter(DataLoader(stream, batch_size=None, num_workers=workers, collate_fn=lambda batch: batch))
    return [next(loader) for _ in range(batches)]


def number_stream(count: int = 24, shards: int = 4, process: int = 0, processes: int = 1, seed: int = 0):
    stream = TrainingStream(numbers(count, shards), noisy, seed, buffer_size=5)
    stream.set_batches(3, lambda rows: [row["value"] for row in rows], process, processes)
    return stream


class TestTrainingStream:
    @pytest.mark.parametrize("processes", [2, *full(1, 3)])
    @pytest.mark.parametrize("workers", [0, 2])
    def test_processes_and_workers_share_each_pass(self, processes, workers):
        batches = 24 // 3 // processes if processes < 3 else 2  # 4 files are not shared evenly by 3 processes
        seen = []
        for process in range(processes):
            seen += read(number_stream(process=process, processes=processes), batches, workers)
        values = [number for batch in seen for number, *_ in batch]
        assert len(set(values)) == len(values)
        assert processes == 3 or sorted(values) == list(range(24))

    @pytest.mark.parametrize("workers", [0, *full(2)])
    @pytest.mark.parametrize("start", [3, 8, 11])
    def test_it_goes_on_where_it_stopped(self, workers, start):
        """In the middle of a pass, at the end of one and in the next; also what augmentation draws."""
        whole = read(number_stream(), 16, workers)
        stream = number_stream()
        stream.start = start
        noisy({"number": range(7)})  # random numbers of the process do not matter
        rest = read(stream, 16, workers)
        assert [batch for batch in rest if batch] == whole[start:]

    def test_passes_differ_and_seeds_decide(self):
        first = read(number_stream(), 16)
        order = [number for batch in first for number, *_ in batch]
        assert sorted(order[:24]) == sorted(order[24:]) == list(range(24))
        assert order[:24] != order[24:] and order[:24] != list(range(24))
        assert read(number_stream(), 16) == first != read(number_stream(seed=1), 16)

    def test_random_numbers_of_the_process_go_on_as_if_nothing_was_read(self):
        drawn = []
        for batches in (0, 3):
            set_seed(0)
            read(number_stream(), batches)
            drawn.append(noisy({"number": [0]}))
        assert drawn[0] == drawn[1]

    def test_examples_before_the_start_are_not_transformed(self):
        transformed = []

        def transform(columns):
            transformed.extend(columns["number"])
            return noisy(columns)

        stream = number_stream()
        stream.transform, stream.start = transform, 5
        assert read(stream, 6)[:5] == [None] * 5
        assert len(transformed) == 3

    def test_a_stream_without_examples_is_an_error(self):
        with pytest.raises(ValueError, match="no example for process 1 of 2"):
            read(number_stream(count=1, shards=1, process=1, processes=2), 1)

    @pytest.mark.full
    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_resumed_run_repeats_the_uninterrupted_one(self, tmp_path, workers):
        """In the third pass over 24 images, with accumulation; each image gets noise of its own."""
        images = Dataset.from_dict({"index": list(range(24))}).to_iterable_dataset(num_shards=3)

        def transform(columns):
            examples = [ColouredSquares()[index] for index in columns["index"]]
            pixels = [example["pixel_values"] + 0.1 * torch.randn(3, 32, 32) for example in examples]
            return {"pixel_values": pixels, "labels": [example["labels"] for example in examples]}

        def make_trainer(folder) -> CroprTrainer:
            fields = {"gradient_accumulation_steps": 2, "dataloader_num_workers": workers}
            args = training_arguments(folder, **{**fields, **SAVES})
            return CroprTrainer(
                tiny_model(), args, train_dataset=TrainingStream(images, transform, seed=0, buffer_size=8)
            )

        whole = make_trainer(tmp_path / "whole")
        whole.train()
        assert len(history(whole)) == 6
        resumed = interrupt_and_resume(make_trainer, tmp_path / "resumed")
        assert history(resumed) == history(whole)
        assert_same_weights(resumed.model, whole.model)


@pytest.fixture(scope="module")
def image_files(tmp_path_factory):
    """A folder with folders of images `folder/<class>`, and the same in two files, `parquet/train-*.parquet`."""
    root = tmp_path_factory.mktemp("images")
    for value in range(12):
        folder = root / "folder" / ("cat", "dog")[value % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 40, 3), 20 * value, np.uint8)).save(folder / f"{value}.png")
    images = load_dataset("imagefolder", data_files={"train": str(root / "folder" / "**")}, cache_dir=root / "cache")
    (root / "parquet").mkdir()
    for part in range(2):
        images["train"].shard(2, part).to_parquet(root / "parquet" / f"train-{part}.parquet")
    return root


@pytest.fixture(scope="module")
def brightness(classification):
    """The values of images, sorted, from rows as the script reads them."""

    def values(images: Iterable[dict]) -> list[int]:
        return sorted(int(np.array(classification.read_picture(row["image"]))[0, 0, 0]) // 20 for row in images)

    return values


class TestStreamingScripts:
    @pytest.mark.full
    def test_digits_and_an_exact_resumption(self, classification, tiny_vit, tmp_path):
        fields = {"streaming": True, "max_steps": 6, "save_strategy": "steps", "save_steps": 2}
        classification.main(command(tiny_vit, tmp_path / "whole", **fields))
        checkpoint = tmp_path / "whole" / "checkpoint-2"
        classification.main(command(tiny_vit, tmp_path / "again", **fields, resume_from_checkpoint=str(checkpoint)))
        assert len(losses(tmp_path / "whole")) == 6
        assert losses(tmp_path / "again") == losses(tmp_path / "whole")

    def test_parquet_files_with_labels_and_a_held_out_part(
        self, classification, brightness, tiny_vit, image_files, tmp_path
    ):
        fields = {"dataset_name": str(image_files / "parquet"), "streaming": True, "max_eval_samples": 4}
        metrics = classification.main(command(tiny_vit, tmp_path, **fields, max_steps=2))
        assert 0 <= metrics["eval_accuracy"] <= 1
        published = AutoModelForImageClassification.from_pretrained(tmp_path)
        assert published.config.id2label == {0: "cat", 1: "dog"}
        arguments = classification.DataArguments(**fields)
        images = classification.load_images(arguments, None, seed=0)
        held_out, rest = brightness(images["validation"]), brightness(images["train"])
        assert len(held_out) == 4 and sorted(held_out + rest) == list(range(12))
        stream = TrainingStream(images["train"], lambda columns: columns, seed=0)  # in a worker of the data loader
        loader = iter(DataLoader(stream, batch_size=None, num_workers=1, collate_fn=lambda batch: batch))
        assert brightness([next(loader)[0] for _ in range(8)]) == rest

    def test_folders_as_a_stream(self, classification, brightness, image_files):
        arguments = classification.DataArguments(train_dir=str(image_files / "folder"), streaming=True)
        images = classification.load_images(arguments, None, seed=0)
        assert sorted(brightness(images["validation"]) + brightness(images["train"])) == list(range(12))
        assert images["train"].num_shards > 2

    @pytest.mark.full
    def test_label_maps(self, classification, tiny_vit, tmp_path):
        script = importlib.import_module("train_semantic_segmentation")
        fields = {"streaming": True, "max_steps": 2, "pruning_rate": 8}
        assert 0 <= script.main(command(tiny_vit, tmp_path, **fields))["eval_mean_iou"] <= 1

    def test_missing_arguments_are_named(self, classification, tiny_vit, image_files, tmp_path):
        with pytest.raises(ValueError, match="--max_steps"):
            classification.main(command(tiny_vit, tmp_path, streaming=True))
        arguments = classification.DataArguments(dataset_name=str(image_files / "parquet"), streaming=True)
        with pytest.raises(ValueError, match="--max_eval_samples"):
            classification.load_images(arguments, None, seed=0)
