"""The arguments of a teacher, and the published recipes, in the training scripts."""

from pathlib import Path

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor
from transformers import logging as transformers_logging

from cropr_hf import CroprViTForSemanticSegmentation
from cropr_hf.publishing.model_card import read_record
from cropr_hf.token_reduction import TOKEN_REDUCERS
from tests.common import full
from tests.test_examples import digits_command, history, segmentation_command


RECIPES = {name: method.training_recipe for name, method in TOKEN_REDUCERS.items() if method.training_recipe}


@pytest.fixture(scope="module")
def digits_classifier(tmp_path_factory) -> str:
    """A folder with a random plain ViT that tells ten digits apart, and its image processor."""
    folder = str(tmp_path_factory.mktemp("classifier"))
    names = {number: str(number) for number in range(10)}
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}
    config = ViTConfig(
        **sizes, image_size=48, patch_size=8, id2label=names, label2id={name: number for number, name in names.items()}
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 48, "width": 48}).save_pretrained(folder)
    return folder


def command(source: str, folder: Path, **kwargs) -> list[str]:
    """Two steps of classification, of which `None` leaves an argument out."""
    fields = {"max_train_samples": 16, "num_train_epochs": 1, "benchmark_rounds": 0, "eval_strategy": "no"}
    fields |= {"save_strategy": "no", **kwargs}
    words = digits_command(source, folder, **fields)
    pairs = zip(words[::2], words[1::2])
    return [word for name, value in pairs if value != "None" for word in (name, value)]


def logged(folder: Path) -> list[dict]:
    return [entry for entry in history(folder) if "loss" in entry]


class TestTeacher:
    def test_a_classifier_learns_from_it(self, example, tiny_vit, digits_classifier, tmp_path):
        weights = {"distill_logits": 2.0, "distill_tokens": 0.5, "distill_temperature": 3.0}
        teacher = {"teacher_name_or_path": digits_classifier, **weights}
        example("train_image_classification").main(command(tiny_vit, tmp_path, token_reducer="random", **teacher))
        for entry in logged(tmp_path):
            parts = 2.0 * entry["distillation_logits"] + 0.5 * entry["distillation_tokens"]
            assert entry["loss"] == pytest.approx(entry["main_loss"] + parts, abs=2e-3)
        training = read_record(tmp_path)["training"]
        assert training["teacher"] == Path(digits_classifier).name
        assert training["distillation"] == {"logits": 2.0, "tokens": 0.5, "temperature": 3.0}

    def test_a_segmenter_learns_from_it(self, example, tiny_vit, tmp_path):
        unpruned = CroprViTForSemanticSegmentation.from_vit(tiny_vit, token_reducer=None, num_labels=11)
        torch.nn.init.normal_(unpruned.classifier.weight)
        unpruned.save_pretrained(tmp_path / "teacher")
        fields = {"teacher_name_or_path": str(tmp_path / "teacher"), "distill_logits": 1.0, "num_train_epochs": 1}
        words = segmentation_command(tiny_vit, tmp_path / "out", benchmark_rounds=0, max_train_samples=16, **fields)
        example("train_semantic_segmentation").main(words)
        assert all(entry["distillation_logits"] > 0 for entry in logged(tmp_path / "out"))

    @pytest.mark.parametrize(
        ("script", "fields", "message"),
        [
            (
                "train_image_classification",
                {"distill_tokens": 0.5},
                "--distill_tokens is 0.5, but nobody teaches; name a model by --teacher_name_or_path",
            ),
            (
                "train_semantic_segmentation",
                {"distill_logits": 0.5},
                "--distill_logits is 0.5, but nobody teaches; name a model by --teacher_name_or_path",
            ),
            (
                "train_image_classification",
                {"teacher_name_or_path": "best"},
                "--teacher_name_or_path is best, but the weights of all losses are 0; say what to learn",
            ),
            ("train_image_classification", {"distill_logits": -1.0}, "`logits` is -1.0; the weight of a loss must be"),
            ("train_embedding", {"distill_embedding": 0.0}, "weights of `logits`, `embedding` and `tokens` are 0"),
            ("train_embedding", {"distill_logits": 1.0}, "A `CroprViTModel` has no logits; set the weight `logits`"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, script, fields, message, example, tiny_vit, tmp_path):
        with pytest.raises(ValueError, match=message):
            example(script).main(command(tiny_vit, tmp_path, **fields))


class TestPublishedRecipe:
    def parse(self, example, *words: str) -> dict:
        """All arguments by name."""
        script = example("train_image_classification")
        classes = (script.ClassifierArguments, script.DataArguments, script.ImageNetArguments)
        groups = example("shared").parse_arguments(classes, [*words, "--use_cpu", "--log_level", "info"])
        return {name: value for group in groups for name, value in vars(group).items()}

    def told(self, records: list) -> list[str]:
        return [each.getMessage() for each in records if each.name.endswith("recipe") and each.levelname == "INFO"]

    @pytest.fixture(autouse=True)
    def _verbosity(self):
        before = transformers_logging.get_verbosity()
        yield
        transformers_logging.set_verbosity(before)

    @pytest.mark.parametrize("method", RECIPES)
    def test_it_stands_for_what_is_not_given(self, method, example, log_records):
        asked = ["--token_reducer", method, "--published_recipe", "--dataset_name", "d"]
        plain = self.parse(example, *asked[:2])
        found = self.parse(example, *asked)
        changed = {name: value for name, value in found.items() if value != plain[name] and name in RECIPES[method]}
        assert {name: found[name] for name in RECIPES[method]} == RECIPES[method] and len(changed) >= 5
        (told,) = self.told(log_records)
        assert all(f"--{name} " in told for name in RECIPES[method])
        own = self.parse(example, *asked, "--num_train_epochs", "3", "--drop_path_rate=0.3")
        assert own["num_train_epochs"] == 3 and own["drop_path_rate"] == 0.3
        assert own["learning_rate"] == RECIPES[method]["learning_rate"]
        told = self.told(log_records)[-1]
        assert "epochs" not in told and "--learning_rate" in told

    def test_a_recipe_file_wins_as_well(self, example, tmp_path):
        (tmp_path / "mine.yaml").write_text("token_reducer: evit\npublished_recipe: true\nweight_decay: 0.3\n")
        found = self.parse(example, str(tmp_path / "mine.yaml"))
        assert found["weight_decay"] == 0.3 and found["learning_rate"] == 8e-5

    def test_numbers_are_the_published_ones(self):
        assert {name: recipe["num_train_epochs"] for name, recipe in RECIPES.items()} == dict.fromkeys(RECIPES, 30)
        names = ("asvit", "dynamicvit", "idlevit", "evit")
        asvit, dynamicvit, idlevit, evit = (RECIPES[name] for name in names)
        assert asvit["distill_logits"] == 0.5 and "distill_tokens" not in asvit
        assert (asvit["learning_rate"], asvit["lr_scheduler_kwargs"]) == (2e-5 * 4 * 128 / 512, {"min_lr": 2e-6})
        assert dynamicvit["distill_logits"] == dynamicvit["distill_tokens"] == 0.5
        assert dynamicvit["backbone_learning_rate"] == pytest.approx(0.01 * dynamicvit["learning_rate"])
        assert dynamicvit["frozen_start"] * dynamicvit["num_train_epochs"] == 5
        # (B, D) normalised: the mean squared error over B and D is 2 (1 - cosine) / D; times 100 and times 10.
        assert idlevit["distill_embedding"] == pytest.approx(100 * 10 * 2 / 384) and idlevit["distill_logits"] == 10
        assert (evit["learning_rate"], idlevit["learning_rate"]) == (2e-5 * 2048 / 512, 1e-5 * 2048 / 512)
        assert not any(name.startswith("distill") for name in evit)

    @pytest.mark.parametrize("words", [[], ["--token_reducer", "tome"], ["--token_reducer", "none"]])
    def test_methods_without_one_say_so(self, words, example):
        with pytest.raises(
            ValueError, match="is there for the methods asvit, dynamicvit, evit, idlevit, svit, but --token_reducer is"
        ):
            self.parse(example, "--published_recipe", *words)

    @pytest.mark.parametrize("method", ["dynamicvit", *full("asvit", "idlevit", "evit", "svit")])
    def test_the_source_teaches_where_it_knows_the_classes(self, method, example, digits_classifier, tmp_path):
        fields = {"token_reducer": method, "published_recipe": True, "num_train_epochs": 2, "pruning_rate": None}
        example("train_image_classification").main(command(digits_classifier, tmp_path, **fields))
        losses = {f"distillation_{name[8:]}" for name in RECIPES[method] if name.startswith("distill_")}
        assert {name for name in logged(tmp_path)[0] if name.startswith("distillation_")} == losses
        assert read_record(tmp_path)["training"].get("teacher") == (Path(digits_classifier).name if losses else None)

    def test_another_source_does_not_and_says_so(self, example, tiny_vit, tmp_path, caplog):
        fields = {"token_reducer": "dynamicvit", "published_recipe": True, "pruning_rate": None}
        example("train_image_classification").main(command(tiny_vit, tmp_path, **fields))
        assert "is no unpruned classifier of these classes: it trains without a teacher. Fine-tune one" in caplog.text
        assert not any(name.startswith("distillation") for name in logged(tmp_path)[0])
