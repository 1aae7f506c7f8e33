"""A teacher in the Trainer: its losses, what it leaves alone, and training without labels."""

import json
import math
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
    pipeline,
)

from cropr_hf import (
    CroprViTBackbone,
    CroprViTForImageClassification,
    CroprViTForObjectDetection,
    CroprViTForSemanticSegmentation,
    CroprViTModel,
)
from cropr_hf.publishing.model_card import read_record
from cropr_hf.training import CroprTrainer, Distillation, PruningCurriculum, layer_decay_optimizer, lora_model
from cropr_hf.training.distillation import embedding_loss, logits_loss, tokens_loss
from tests.common import DETECTOR, assert_close_relative, full
from tests.test_training import ColouredMaps, ColouredSquares, losses, tiny_model, training_arguments


TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
UNPRUNED = {"token_reducer": None, "pruning_rate": None, "use_auxiliary_heads": False}


class UnlabelledSquares(ColouredSquares):
    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": super().__getitem__(index)["pixel_values"]}


def teacher_for(model_class: type = CroprViTForImageClassification, **fields):
    """An unpruned model, far enough from the student that every loss is large."""
    torch.manual_seed(7)
    model = tiny_model(model_class, **{**UNPRUNED, "initializer_range": 0.2, **fields})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def encoder(**fields) -> CroprViTModel:
    return tiny_model(CroprViTModel, **{"auxiliary_task": "embedding", "drop_path_rate": 0.0, **fields})


def make_trainer(folder, model, dataset=None, teacher=None, distillation=None, callbacks=(), **kwargs) -> CroprTrainer:
    return CroprTrainer(
        model,
        training_arguments(folder, **kwargs),
        train_dataset=dataset or UnlabelledSquares(),
        eval_dataset=dataset or UnlabelledSquares(),
        teacher=teacher,
        distillation=distillation,
        callbacks=list(callbacks),
    )


def pixels(count: int = 8) -> torch.Tensor:
    return torch.stack([ColouredSquares()[index]["pixel_values"] for index in range(count)])


class TestLosses:
    def test_logits(self):
        student, teacher = torch.randn(3, 4), torch.randn(3, 4)
        expected = 0.0
        for own, other in zip(student.tolist(), teacher.tolist()):
            p, q = ([math.exp(value / 2) for value in row] for row in (other, own))
            p, q = ([value / sum(row) for value in row] for row in (p, q))
            expected += 4 * sum(a * math.log(a / b) for a, b in zip(p, q)) / 3
        assert logits_loss(student, teacher, temperature=2).item() == pytest.approx(expected, rel=1e-5)
        assert logits_loss(student.bfloat16(), student.bfloat16()).item() == 0

    def test_label_maps_are_compared_pixel_by_pixel_at_the_resolution_of_the_student(self):
        student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
        by_pixel = [logits_loss(student[:, :, i, j], teacher[:, :, i, j]) for i in range(4) for j in range(4)]
        assert logits_loss(student, teacher).item() == pytest.approx(torch.stack(by_pixel).mean().item(), rel=1e-5)
        flat = torch.randn(2, 3, 1, 1)
        torch.testing.assert_close(logits_loss(student, flat), logits_loss(student, flat.expand(2, 3, 4, 4)))

    def test_embeddings(self):
        student, teacher = torch.randn(2, 3, 5), torch.randn(2, 5)
        cosines = [
            (own @ other / own.norm() / other.norm()).item() for rows, other in zip(student, teacher) for own in rows
        ]
        assert embedding_loss(student, teacher).item() == pytest.approx(1 - sum(cosines) / 6, rel=1e-5)
        assert embedding_loss(3 * teacher, teacher).item() == pytest.approx(0, abs=1e-6)
        assert embedding_loss(-teacher, teacher).item() == pytest.approx(2)

    def test_tokens(self):
        student, teacher = torch.randn(2, 2, 3), torch.randn(2, 4, 3)
        places = torch.tensor([[0, 3], [1, 2]])
        expected = sum(
            ((student[image, token] - teacher[image, places[image, token]]) ** 2).sum() / 12
            for image in range(2)
            for token in range(2)
        )
        assert tokens_loss(student, teacher, places).item() == pytest.approx(expected.item(), rel=1e-5)

    def test_new_tokens_count_for_nothing(self):
        torch.manual_seed(0)
        student, teacher = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
        places = torch.tensor([[4, 0, 5], [1, 5, 5]])  # of five places 5 is none
        expected = torch.stack(
            [student[0, 0] - teacher[0, 4], student[0, 1] - teacher[0, 0], student[1, 0] - teacher[1, 1]]
        )
        assert tokens_loss(student, teacher, places).item() == pytest.approx(expected.square().mean().item(), rel=1e-5)

    def test_different_shapes_are_errors_that_name_both(self):
        with pytest.raises(ValueError, match=r"logits .* \(2, 3\), those of the teacher \(2, 4\)"):
            logits_loss(torch.zeros(2, 3), torch.zeros(2, 4))
        with pytest.raises(ValueError, match=r"embedding .* \(2, 3\), those of the teacher \(2, 4\)"):
            embedding_loss(torch.zeros(2, 3), torch.zeros(2, 4))
        with pytest.raises(ValueError, match=r"tokens .* \(2, 1, 3\), those of the teacher \(2, 1, 4\)"):
            tokens_loss(torch.zeros(2, 1, 3), torch.zeros(2, 5, 4), torch.zeros(2, 1, dtype=torch.long))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({}, "The weights of `logits`, `embedding` and `tokens` are 0"),
            ({"logits": -1.0}, "`logits` is -1.0; the weight of a loss must be 0 or more"),
            ({"tokens": math.nan}, "`tokens` is nan; it must be a finite number"),
            ({"embedding": math.inf}, "`embedding` is inf; it must be a finite number"),
            ({"logits": 1.0, "temperature": 0.0}, "`temperature` is 0.0; it must be positive"),
        ],
    )
    def test_wrong_settings_are_errors(self, fields, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            Distillation(**fields)


class TestTokenIndices:
    @pytest.mark.parametrize("fields", [{}, {"last_layer_fusion": False}, {"token_reducer": "tome"}])
    def test_they_say_where_the_tokens_are(self, fields):
        """Without blocks a token is its patch plus its position, wherever it went."""
        model = encoder(use_auxiliary_heads=False, auxiliary_task=None, norm_before_pooling=False, **fields).eval()
        with torch.no_grad():
            for layer in model.layers:
                for linear in (layer.attention.o_proj, layer.mlp.fc2):
                    for parameter in linear.parameters():
                        parameter.zero_()
            outputs = model(pixels(3), output_pruning=True)
            embedded, _ = model.embeddings(pixels(3))
            plain = model(pixels(3))
        assert plain.token_indices is None
        length = outputs.last_hidden_state.shape[1]
        assert (length == 17) == bool(model.config.last_layer_fusion)
        places = outputs.token_indices.expand(3, -1)
        assert places[:, 0].eq(0).all() and all(len(set(row.tolist())) == length for row in places)
        if fields.get("token_reducer") != "tome":  # which mixes them
            expected = embedded.gather(1, places[..., None].expand(-1, -1, 32))
            torch.testing.assert_close(outputs.last_hidden_state, expected)


class TestClassifier:
    def test_the_parts_are_those_of_the_definition_and_add_up(self, tmp_path):
        model, teacher = tiny_model(drop_path_rate=0.0, last_layer_fusion=False), teacher_for()
        distillation = Distillation(logits=0.5, embedding=2.0, tokens=3.0, temperature=2.0)
        trainer = make_trainer(tmp_path, model, ColouredSquares(), teacher, distillation)
        inputs = {"pixel_values": pixels(), "labels": torch.arange(8) % 4}
        model.train()
        loss = trainer.compute_loss(model, inputs)
        outputs = model(**inputs, output_pruning=True)
        with torch.no_grad():
            own, other = model.cropr_vit(inputs["pixel_values"]), teacher.cropr_vit(inputs["pixel_values"])
            by_teacher = teacher(inputs["pixel_values"]).logits
        kept = outputs.pruned_after_block == 4
        tokens = torch.stack([image[1:][mask] for image, mask in zip(other.last_hidden_state, kept)])
        expected = (
            outputs.loss
            + 0.5 * logits_loss(outputs.logits, by_teacher, 2.0)
            + 2 * (1 - F.cosine_similarity(own.pooler_output, other.pooler_output).mean())
            + 3 * (own.last_hidden_state[:, 1:] - tokens).square().mean()
        )
        torch.testing.assert_close(loss, expected)

    def test_logs_and_record_hold_the_parts_and_the_teacher_stays_as_it_is(self, tmp_path):
        teacher = teacher_for()
        before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
        distillation = Distillation(logits=0.5, tokens=0.1)
        trainer = make_trainer(
            tmp_path / "run",
            tiny_model(),
            ColouredSquares(),
            teacher,
            distillation,
            save_strategy="epoch",
            num_train_epochs=1,
        )
        trainer.train()
        names = ("main_loss", "auxiliary_loss_1", "auxiliary_loss_2", "distillation_logits", "distillation_tokens")
        weights = (1, 1, 1, 0.5, 0.1)
        for total, *parts in zip(losses(trainer), *(losses(trainer, name) for name in names)):
            assert total == pytest.approx(sum(weight * part for weight, part in zip(weights, parts)), abs=2e-3)
        assert not losses(trainer, "distillation_embedding")
        assert not teacher.training and not any(parameter.requires_grad for parameter in teacher.parameters())
        assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
        weights = load_file(tmp_path / "run" / "checkpoint-8" / "model.safetensors")
        assert weights.keys() == trainer.model.state_dict().keys()
        trainer.save_model()
        trainer.create_model_card()
        training = read_record(tmp_path / "run")["training"]
        assert training["teacher"] == "CroprViTForImageClassification"
        assert training["distillation"] == {"logits": 0.5, "tokens": 0.1, "temperature": 1.0}
        assert training["distillation_losses"] == {
            name: losses(trainer, name)[-1] for name in ("distillation_logits", "distillation_tokens")
        }
        card = (tmp_path / "run" / "README.md").read_text()
        assert "logits 0.5, tokens 0.1, temperature 1.0" in card and "distillation_logits" in card

    def test_evaluation_is_that_of_the_model(self, tmp_path):
        """Its loss can be compared between runs, and predictions are the logits alone."""
        model = tiny_model()
        taught = make_trainer(tmp_path, model, ColouredSquares(), teacher_for(), Distillation(logits=1, tokens=1))
        plain = make_trainer(tmp_path, model, ColouredSquares())
        prediction = taught.predict(ColouredSquares())
        assert prediction.predictions.shape == (64, 4)
        assert prediction.metrics["test_loss"] == plain.predict(ColouredSquares()).metrics["test_loss"]

    def test_a_folder_of_another_family_teaches_by_logits_and_tokens(self, tmp_path):
        torch.manual_seed(1)
        ViTForImageClassification(ViTConfig(**TINY, num_labels=4)).save_pretrained(tmp_path / "vit")
        distillation = Distillation(logits=1.0, tokens=1.0)
        model = tiny_model(norm_before_pooling=True)
        trainer = make_trainer(tmp_path / "run", model, ColouredSquares(), tmp_path / "vit", distillation, max_steps=1)
        trainer.train()
        assert losses(trainer, "distillation_tokens")[0] > 0
        facts = trainer._distiller.facts()
        assert facts["teacher"] == "vit"  # and not where it lies
        source = CroprViTForImageClassification.from_vit(tmp_path / "vit", token_reducer=None)
        trainer = make_trainer(tmp_path, source, ColouredSquares(), tmp_path / "vit", distillation)
        source.train()
        trainer.compute_loss(source, {"pixel_values": pixels(), "labels": torch.arange(8) % 4})
        parts = {name: part.item() for name, part in trainer._loss_parts.items()}
        assert parts["distillation_tokens"] < 1e-9 and abs(parts["distillation_logits"]) < 1e-6

    @pytest.mark.full
    def test_a_cropr_folder_teaches(self, tmp_path):
        teacher_for().save_pretrained(tmp_path / "teacher")
        run = {"max_steps": 2, "dataset": ColouredSquares()}
        models = [tiny_model(drop_path_rate=0.0) for _ in range(2)]
        from_folder = make_trainer(tmp_path / "a", models[0], teacher=str(tmp_path / "teacher"), **run)
        in_memory = make_trainer(tmp_path / "b", models[1], teacher=teacher_for(), **run)
        for trainer in (from_folder, in_memory):
            trainer.train()
        assert losses(from_folder) == losses(in_memory)

    @pytest.mark.full
    def test_accumulated_steps_are_one_large_step(self, tmp_path):
        def run(**kwargs) -> CroprTrainer:
            model = tiny_model(drop_path_rate=0.0)
            distillation = Distillation(logits=1.0, embedding=1.0, tokens=0.1)
            trainer = make_trainer(tmp_path, model, ColouredSquares(), teacher_for(), distillation, **kwargs)
            trainer.train()
            return trainer

        whole = run(max_steps=2)
        parts = run(max_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2)
        for name in ("loss", "distillation_logits", "distillation_embedding", "distillation_tokens"):
            assert losses(parts, name) == pytest.approx(losses(whole, name), abs=2e-4)

    @pytest.mark.full
    def test_adapters_learn_from_it(self, tmp_path):
        pytest.importorskip("peft")
        distillation = Distillation(logits=1.0, embedding=1.0, tokens=1.0)
        trainer = make_trainer(
            tmp_path, lora_model(tiny_model()), ColouredSquares(), teacher_for(), distillation, learning_rate=1e-2
        )
        trainer.train()
        assert losses(trainer, "distillation_tokens")[-1] < losses(trainer, "distillation_tokens")[0]

    @pytest.mark.full
    def test_a_model_init_makes_the_student(self, tmp_path):
        trainer = CroprTrainer(
            model_init=lambda: tiny_model(),
            args=training_arguments(tmp_path, max_steps=2),
            train_dataset=ColouredSquares(),
            teacher=teacher_for(),
            distillation=Distillation(tokens=1.0),
        )
        trainer.train()
        assert len(losses(trainer, "distillation_tokens")) == 2


class TestSegmentation:
    def test_maps_and_tokens_of_the_teacher_are_learned(self, tmp_path):
        """Also where images are padded to whole patches."""
        model = tiny_model(CroprViTForSemanticSegmentation, num_queries=None, drop_path_rate=0.0).train()
        teacher = teacher_for(CroprViTForSemanticSegmentation)
        trainer = make_trainer(tmp_path, model, ColouredMaps(), teacher, Distillation(logits=2.0, tokens=1.0))
        inputs = {"pixel_values": pixels()[..., :28], "labels": torch.ones(8, 32, 28, dtype=torch.long)}
        loss = trainer.compute_loss(model, inputs)
        own, other = model(**inputs), teacher(inputs["pixel_values"])
        padded = F.pad(inputs["pixel_values"], (0, 4))
        tokens = [each.cropr_vit(padded).last_hidden_state[:, 1:] for each in (model, teacher)]
        expected = own.loss + 2 * logits_loss(own.logits, other.logits) + F.mse_loss(*tokens)
        torch.testing.assert_close(loss, expected)


class TestWithoutLabels:
    def test_heads_have_the_size_of_the_embedding(self):
        for fields, size in (({}, 32), ({"projection_dim": 12}, 12), ({"pooling": "cls_patch_mean"}, 64)):
            model = encoder(norm_before_pooling=True, **fields).train()
            outputs = model(pixels(2))
            assert outputs.pooler_output.shape == (2, size)
            assert [logits.shape for logits in outputs.auxiliary_logits] == [(2, 1, size)] * 2

    def test_the_loss_is_that_of_the_definition(self, tmp_path):
        model, teacher = encoder(auxiliary_loss_weight=0.5), teacher_for(CroprViTModel)
        trainer = make_trainer(tmp_path, model, teacher=teacher)
        model.train()
        loss = trainer.compute_loss(model, {"pixel_values": pixels(), "labels": torch.arange(8)})  # passed over
        outputs = model(pixels())
        target = teacher(pixels()).pooler_output
        expected = 1 - F.cosine_similarity(outputs.pooler_output, target).mean()
        for logits in outputs.auxiliary_logits:
            expected = expected + 0.5 * (1 - F.cosine_similarity(logits[:, 0], target).mean())
        torch.testing.assert_close(loss, expected)
        assert {*trainer._loss_parts} == {"distillation_embedding", "auxiliary_loss_1", "auxiliary_loss_2"}

    def test_it_learns_what_to_keep_publishes_and_serves_the_pipeline(self, tmp_path):
        """Images are told apart by a bright square on 4 of 16 patches; 3 are left."""
        torch.manual_seed(0)
        source = Dinov2Model(Dinov2Config(**{**TINY, "mlp_ratio": 2, "num_hidden_layers": 4}, initializer_range=0.1))
        source.save_pretrained(tmp_path / "source")
        fields = {"pruning_rate": 4, "last_layer_fusion": False}
        model = CroprViTModel.from_vit(tmp_path / "source", auxiliary_task="embedding", **fields)
        assert model.config.use_auxiliary_heads
        processor = ViTImageProcessor(size={"height": 32, "width": 32})
        args = training_arguments(tmp_path / "run", num_train_epochs=5, learning_rate=5e-3, logging_steps=4)
        trainer = CroprTrainer(
            model,
            args,
            train_dataset=UnlabelledSquares(),
            eval_dataset=UnlabelledSquares(),
            teacher=tmp_path / "source",
            processing_class=processor,
            compute_metrics=lambda p: {
                "cosine": F.cosine_similarity(*map(torch.from_numpy, p.predictions)).mean().item()
            },
            callbacks=[PruningCurriculum(0.5)],
            optimizer_cls_and_kwargs=layer_decay_optimizer(model, args, layer_decay=0.75),
        )
        before = trainer.evaluate()
        trainer.train()
        after = trainer.evaluate()
        assert before["eval_loss"] == pytest.approx(1 - before["eval_cosine"], abs=1e-5)
        random = CroprViTModel.from_vit(tmp_path / "source", token_reducer="random", **fields)
        by_chance = make_trainer(tmp_path, random, teacher=tmp_path / "source").evaluate()
        assert after["eval_loss"] < 0.6 * min(before["eval_loss"], by_chance["eval_loss"])
        auxiliary = losses(trainer, "auxiliary_loss_1")
        assert sum(auxiliary[-2:]) < 0.5 * sum(auxiliary[:2])

        trainer.save_model()
        config = json.loads((tmp_path / "run" / "config.json").read_text())
        assert config["use_auxiliary_heads"] is False
        assert read_record(tmp_path / "run")["training"]["teacher"] == "source"
        published = AutoModel.from_pretrained(tmp_path / "run", trust_remote_code=False)
        assert isinstance(published, CroprViTModel)
        assert not any("aggregator" in name or "auxiliary" in name for name in published.state_dict())
        with torch.no_grad():
            expected = trainer.model.eval()(pixels()).pooler_output
            assert_close_relative(published(pixels()).pooler_output, expected, 1e-4)
        extract = pipeline("image-feature-extraction", model=str(tmp_path / "run"))
        image = (pixels(1)[0].permute(1, 2, 0).clamp(0, 1) * 255).byte().numpy()
        features = extract(Image.fromarray(image), pool=True)
        assert torch.tensor(features).shape == (1, 32)

    @pytest.mark.full
    def test_what_was_published_learns_on_and_starts_other_tasks(self, tmp_path):
        encoder().save_pretrained(tmp_path / "model")
        again = CroprViTModel.from_pretrained(tmp_path / "model", use_auxiliary_heads=True)
        make_trainer(tmp_path, again, teacher=teacher_for(CroprViTModel), max_steps=1).train()
        classifier = CroprViTForImageClassification.from_pretrained(
            tmp_path / "model", use_auxiliary_heads=True, auxiliary_task=None, num_labels=4
        )
        assert classifier.train()(pixels(2), labels=torch.tensor([0, 1])).loss.isfinite()

    def test_predictions_are_the_embeddings_of_both(self, tmp_path):
        model, teacher = encoder(), teacher_for(CroprViTModel)
        prediction = make_trainer(tmp_path, model, teacher=teacher).predict(UnlabelledSquares())
        with torch.no_grad():
            expected = [each.eval()(pixels()).pooler_output for each in (model, teacher)]
        for found, wanted in zip(prediction.predictions, expected):
            assert_close_relative(torch.from_numpy(found[:8]), wanted)

    @pytest.mark.parametrize("reducer", ["tome", *full("random", None)])
    def test_methods_without_heads_learn_as_well(self, tmp_path, reducer):
        fields = {"token_reducer": reducer, "use_auxiliary_heads": False, "auxiliary_task": None}
        model = encoder(**fields, **({} if reducer else {"pruning_rate": None}))
        teacher = teacher_for(CroprViTModel)
        trainer = make_trainer(
            tmp_path, model, teacher=teacher, distillation=Distillation(tokens=1), max_steps=8, learning_rate=3e-3
        )
        trainer.train()
        parts = losses(trainer, "distillation_tokens")
        assert parts[-1] < parts[0]

    @pytest.mark.full
    def test_adapters_learn_as_well(self, tmp_path):
        pytest.importorskip("peft")
        source = encoder()
        trainer = make_trainer(tmp_path, lora_model(source), teacher=teacher_for(CroprViTModel), learning_rate=1e-2)
        trainer.train()
        parts = losses(trainer, "distillation_embedding")
        assert sum(parts[-4:]) < sum(parts[:4]) and "auxiliary_loss_2" in trainer.state.log_history[0]
        assert trainer.evaluate()["eval_loss"] < 1

    @pytest.mark.full
    def test_a_resumed_run_repeats_the_uninterrupted_one_under_bfloat16(self, tmp_path):
        def trainer(folder) -> CroprTrainer:
            return make_trainer(
                folder,
                encoder(pruning_rate=5),
                teacher=teacher_for(CroprViTModel),
                distillation=Distillation(embedding=1, tokens=0.1),
                callbacks=[PruningCurriculum(0.8)],
                save_strategy="steps",
                save_steps=4,
                bf16=True,
            )

        whole = trainer(tmp_path / "whole")
        whole.train()
        resumed = trainer(tmp_path / "resumed")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
        assert losses(resumed) == losses(whole) and len(losses(whole)) == 16
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(tensor, resumed.model.state_dict()[name]), name

    def test_the_teacher_runs_in_the_precision_of_the_training(self, tmp_path):
        seen = []
        teacher = teacher_for(CroprViTModel)
        teacher.layers[0].mlp.fc1.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
        trainer = make_trainer(tmp_path, encoder(), teacher=teacher, bf16=True, max_steps=2)
        trainer.train()
        assert set(seen) == {torch.bfloat16} and teacher.layers[0].mlp.fc1.weight.dtype == torch.float32
        assert losses(trainer, "distillation_embedding")[0] > 0

    def test_scorers_that_nothing_trains_are_warned_of(self, tmp_path, log_records):
        model = encoder(use_auxiliary_heads=False)
        make_trainer(tmp_path, model, teacher=teacher_for(CroprViTModel))
        assert any("trains without auxiliary heads" in record.getMessage() for record in log_records)


class TestFit:
    @pytest.mark.parametrize(
        ("student", "teacher", "distillation", "message"),
        [
            (tiny_model, lambda: teacher_for(num_labels=5), None, "The teacher has 5 classes, the model 4"),
            (
                encoder,
                lambda: teacher_for(CroprViTModel, projection_dim=12),
                None,
                "embedding of the teacher has 12 channels, that of the model 32",
            ),
            (
                tiny_model,
                lambda: teacher_for(hidden_size=16),
                Distillation(tokens=1),
                "`hidden_size` of the teacher is 16, that of the model 32",
            ),
            (
                tiny_model,
                lambda: teacher_for(patch_size=4),
                Distillation(tokens=1),
                "`patch_size` of the teacher is 4, that of the model 8",
            ),
            (
                tiny_model,
                lambda: teacher_for(norm_before_pooling=True),
                Distillation(tokens=1),
                "`norm_before_pooling` of the teacher is True, that of the model False",
            ),
            (
                lambda: tiny_model(id2label=dict(enumerate("abcd"))),
                lambda: teacher_for(id2label=dict(enumerate("bacd"))),
                None,
                "has the classes of the model in another order",
            ),
            (
                lambda: tiny_model(problem_type="regression"),
                teacher_for,
                None,
                "`problem_type` is 'regression', whose outputs are not the probabilities",
            ),
            (encoder, lambda: teacher_for(CroprViTModel), Distillation(logits=1), "A `CroprViTModel` has no logits"),
            (
                lambda: tiny_model(CroprViTForSemanticSegmentation),
                lambda: teacher_for(CroprViTForSemanticSegmentation),
                Distillation(embedding=1),
                "CroprViTForSemanticSegmentation has no pooled embedding",
            ),
            (
                lambda: encoder(auxiliary_task=None),
                lambda: teacher_for(CroprViTModel),
                None,
                "`auxiliary_task` is None, but a `CroprViTModel` has no labels",
            ),
            (
                lambda: tiny_model(CroprViTForObjectDetection, **DETECTOR),
                teacher_for,
                None,
                "CroprViTForObjectDetection cannot learn from a teacher",
            ),
            (lambda: tiny_model(CroprViTBackbone), teacher_for, None, "CroprViTBackbone cannot learn from a teacher"),
            (tiny_model, lambda: torch.nn.Linear(2, 2), None, "The teacher is a Linear; give a model of Transformers"),
            (encoder, lambda: None, None, "A `CroprViTModel` has no loss of its own"),
            (tiny_model, lambda: None, Distillation(logits=1), "there is none; give `teacher`"),
        ],
    )
    def test_what_does_not_fit_is_an_error(self, tmp_path, student, teacher, distillation, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            make_trainer(tmp_path, student(), teacher=teacher(), distillation=distillation)

    def test_a_teacher_that_lies_nowhere_or_knows_nothing_is_an_error(self, tmp_path):
        for model in (tiny_model(), encoder()):
            with pytest.raises(OSError, match="neither a folder of a model nor a repository"):
                make_trainer(tmp_path, model, teacher=str(tmp_path / "nowhere"))
        ViTModel(ViTConfig(**TINY, num_labels=4)).save_pretrained(tmp_path / "vit")
        with pytest.raises(
            ValueError, match=r"lacks 2 weights of ViTForImageClassification, such as classifier\.bias"
        ):
            make_trainer(tmp_path, tiny_model(), teacher=tmp_path / "vit")

    def test_the_student_cannot_be_its_own_teacher(self, tmp_path):
        model = tiny_model()
        with pytest.raises(ValueError, match="shares weights with the model"):
            make_trainer(tmp_path, model, teacher=model)

    def test_a_teacher_without_the_embedding_or_all_tokens_is_an_error(self, tmp_path):
        inputs = {"pixel_values": pixels(), "labels": torch.arange(8) % 4}
        vit = ViTForImageClassification(ViTConfig(**TINY, num_labels=4))
        pruned = teacher_for(token_reducer="random", pruning_rate=3, last_layer_fusion=False)
        for teacher, distillation, message in (
            (vit, Distillation(embedding=1), "The teacher, ViTForImageClassification, returns no `pooler_output`"),
            (pruned, Distillation(tokens=1), r"tokens of the shape \(8, 7, 32\) for images of 16 patches"),
        ):
            model = tiny_model()
            trainer = make_trainer(tmp_path, model, ColouredSquares(), teacher, distillation)
            with pytest.raises(ValueError, match=message):
                trainer.compute_loss(model.train(), inputs)

    def test_labels_are_refused_where_heads_predict_embeddings(self):
        model = tiny_model(auxiliary_task="embedding").train()
        with pytest.raises(ValueError, match="`auxiliary_task` is 'embedding', which only a `CroprViTModel` learns"):
            model(pixels(2), labels=torch.tensor([0, 1]))
        backbone = tiny_model(CroprViTBackbone, auxiliary_task="embedding").train()
        with pytest.raises(ValueError, match="`auxiliary_task` is 'embedding'"):
            backbone(pixels(2), labels=torch.ones(2, 4))

    def test_labels_that_a_model_with_a_loss_needs(self, tmp_path):
        trainer = make_trainer(tmp_path, tiny_model(), teacher=teacher_for(), max_steps=1)
        with pytest.raises(ValueError, match="did not return a loss"):
            trainer.train()


def tower(kind: str):
    torch.manual_seed(3)
    vision = {**TINY, "image_size": 32}
    text = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 50,
        "max_position_embeddings": 16,
    }
    if kind == "clip":
        text |= {"eos_token_id": 49, "bos_token_id": 48, "pad_token_id": 0}
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)).eval()
    text |= {"hidden_size": 32, "projection_size": 32}
    return SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()


class TestZeroShot:
    @pytest.mark.parametrize("kind", ["clip", *full("siglip")])
    def test_the_text_tower_of_the_source_fits_the_pruned_images(self, kind, tmp_path):
        source = tower(kind)
        tokens = torch.tensor([[48, 3, 5, 49], [48, 7, 2, 49], [48, 9, 11, 49]])
        with torch.no_grad():
            expected = source(input_ids=tokens, pixel_values=pixels(4)).logits_per_image
        unpruned = CroprViTModel.from_vit(source, token_reducer=None)
        torch.testing.assert_close(zero_shot(source, unpruned, tokens, pixels(4)), expected, rtol=1e-5, atol=1e-5)
        pruned = CroprViTModel.from_vit(source, pruning_rate=3, auxiliary_task="embedding")
        trainer = make_trainer(tmp_path / "run", pruned, teacher=source, max_steps=2)
        trainer.train()
        trainer.save_model()
        published = AutoModel.from_pretrained(tmp_path / "run", trust_remote_code=False)
        found = zero_shot(source, published, tokens, pixels(4))
        assert found.shape == (4, 3) and found.isfinite().all() and not torch.allclose(found, expected)
        assert next(source.parameters()).requires_grad  # its copy is frozen


@torch.no_grad()
def zero_shot(source, model, tokens: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
    """As docs/fine_tune.md has it."""
    texts = F.normalize(source.get_text_features(input_ids=tokens).pooler_output, dim=-1)
    images = F.normalize(model(pixel_values).pooler_output, dim=-1)
    return source.logit_scale.exp() * images @ texts.T + getattr(source, "logit_bias", 0)
