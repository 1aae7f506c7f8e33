import ast
import importlib.util
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from torch.utils.data import Subset

from cropr_hf import CroprViTBackbone, CroprViTForSemanticSegmentation
from cropr_hf.publishing.hub import save_for_hub
from cropr_hf.publishing.model_card import add_to_record, model_facts, read_record, render_card, write_record
from cropr_hf.training import CroprTrainer, changed_settings
from cropr_hf.training.record import licence_of
from tests.common import make_model, tiny_config
from tests.test_training import ColouredSquares, tiny_model, training_arguments


ROOT = Path(__file__).resolve().parents[1]
ACCURACY = {"dataset": "owner/squares", "split": "test", "num_examples": 64, "metrics": {"accuracy": 0.75}}


@dataclass
class Choice:
    fusion: bool | None = None


def card_of(folder) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def saved(folder, **fields):
    model = tiny_model(**fields)
    model.save_pretrained(folder)
    return model


class TestSaving:
    def test_the_card_says_what_the_model_computes(self, tmp_path):
        model = saved(tmp_path / "squares")
        record, card = read_record(tmp_path / "squares"), card_of(tmp_path / "squares")
        stripped = type(model).from_pretrained(tmp_path / "squares")
        assert record["model"]["patches_kept"] == model.config.kept_patches()
        assert record["model"]["num_parameters"] == sum(parameter.numel() for parameter in stripped.parameters())
        assert f"{record['model']['num_parameters']:,}" in card
        assert "# squares" in card and "`CroprViTForImageClassification`" in card
        assert "No results are recorded" in card and "Not measured" in card and "Not recorded." in card
        data = ModelCard(card).data
        assert data.pipeline_tag == "image-classification" and data.library_name == "transformers"
        assert data.tags == ["vision", "cropr", "token-pruning", "custom_code"] and data.eval_results is None

    def test_bars_are_the_patches_that_each_block_works_on(self, tmp_path):
        model = saved(tmp_path, pruning_rate=4)
        kept = model.config.kept_patches()
        bars = re.findall(r"^blocks? ([\d-]+) +(█+) +(\d+)$", card_of(tmp_path), flags=re.MULTILINE)
        worked_on = [model.config.num_patches, *kept[:-1]]
        worked_on[-1] = model.config.num_patches  # last layer fusion
        drawn = []
        for blocks, bar, patches in bars:
            first, _, last = blocks.partition("-")
            drawn += [int(patches)] * (int(last or first) - int(first) + 1)
            assert len(bar) == max(1, round(40 * int(patches) / model.config.num_patches))
        assert drawn == worked_on

    def test_an_unpruned_model_has_no_bars(self, tmp_path):
        saved(tmp_path, token_reducer=None, pruning_rate=None, use_auxiliary_heads=False)
        card = card_of(tmp_path)
        assert "█" not in card and "drops" not in card and "cropr" not in ModelCard(card).data.tags

    def test_a_space_is_linked_where_one_is_named(self, tmp_path):
        model = tiny_model()
        model.record = {"metadata": {"space": "owner/try"}}
        save_for_hub(model, tmp_path)
        assert "\nTry it: [owner/try](https://huggingface.co/spaces/owner/try)\n\n## What it computes\n" in card_of(
            tmp_path
        )
        assert read_record(tmp_path)["metadata"] == {"space": "owner/try"}

    def test_a_card_by_hand_stays(self, tmp_path):
        model = saved(tmp_path)
        taken_over = card_of(tmp_path).replace("<!-- Written by cropr_hf", "<!-- Once written by cropr_hf")
        (tmp_path / "README.md").write_text(taken_over, encoding="utf-8")
        model.save_pretrained(tmp_path)
        add_to_record(tmp_path, evaluation=ACCURACY)
        assert card_of(tmp_path) == taken_over
        assert read_record(tmp_path)["evaluations"] == [ACCURACY]

    def test_folders_to_resume_from_have_no_card(self, tmp_path):
        saved(tmp_path / "checkpoint-3")
        assert not {"README.md", "record.json"} & {file.name for file in (tmp_path / "checkpoint-3").iterdir()}

    def test_a_folder_with_code_says_how_to_load_it(self, tmp_path):
        tiny_model().save_pretrained(tmp_path / "without", with_code=False)
        saved(tmp_path / "with_code")
        for name, has_code in {"without": False, "with_code": True}.items():
            card = card_of(tmp_path / name)
            assert ("trust_remote_code=True" in card) == ("custom_code" in ModelCard(card).data.tags) == has_code

    def test_the_usage_of_a_backbone_loads_a_folder(self, tmp_path, monkeypatch):
        model = make_model(CroprViTBackbone, tiny_config(use_auxiliary_heads=True))
        model.save_pretrained(tmp_path / "maps")
        (usage,) = re.findall(r"```python\n(.*?)```", card_of(tmp_path / "maps"), flags=re.DOTALL)
        monkeypatch.chdir(tmp_path)
        names: dict[str, Any] = {}
        exec(usage, names)
        assert type(names["model"]) is CroprViTBackbone
        # Without the package only an Auto class finds the code that comes along, on the Hub alone.
        save_for_hub(model, tmp_path / "code")
        assert "trust_remote_code" not in card_of(tmp_path / "code")
        save_for_hub(model, tmp_path / "code", repo_id="me/maps")
        assert 'AutoBackbone.from_pretrained("me/maps", trust_remote_code=True)' in card_of(tmp_path / "code")

    def test_no_path_of_this_machine_is_published(self, tmp_path):
        saved(tmp_path / "private" / "base")
        model = type(tiny_model()).from_pretrained(tmp_path / "private" / "base")
        model.save_pretrained(tmp_path / "published")
        text = card_of(tmp_path / "published") + (tmp_path / "published" / "record.json").read_text()
        assert str(tmp_path) not in text and "It starts from `base`" in text


NASTY = "a|b `c` <script>x</script>\n```\n# [d](e) \"f\" 'g' __h__ \\"


def markup_and_texts(markdown: str) -> tuple[list[str], list[str]]:
    """What a reader of Markdown finds: kinds of elements, and texts and code in their order."""
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    flat = [part for token in tokens for part in (token.children or [token])]
    texts = [part.content for part in flat if part.type in ("text", "code_inline", "fence")]
    return [part.type + part.tag for part in flat if part.type != "text"], texts


class TestNames:
    """Names of data sets, labels, folders and machines are somebody else's text: none of it becomes markup or code."""

    def record(self, **changes):
        facts = model_facts(tiny_model().config, "CroprViTForImageClassification", NASTY, base_model=NASTY)
        evaluation = {"dataset": NASTY, "split": NASTY, "settings": {NASTY: NASTY}, "metrics": {NASTY: 0.5}}
        row = {"images_per_second": 1.0, "speedup": 1.0, "spread": 0.0}
        throughput = {
            "results": {NASTY: row},
            "arguments": {"batch_size": 1, "dtype": "float32"},
            "machine": NASTY,
            "versions": {"torch": "2", "transformers": "5"},
            "rounds": 3,
            "multiply_add_bound": 1.5,
        }
        training = {"dataset": NASTY, "machine": NASTY, "base_licence": NASTY, "settings": {"note": NASTY}}
        record = {"model": facts, "evaluations": [evaluation], "throughput": throughput, "training": training}
        return {**record, "metadata": {"tags": [NASTY]}, **changes}

    def test_they_stay_text_wherever_they_stand(self):
        record = self.record()
        harmless = json.loads(json.dumps(record).replace(json.dumps(NASTY)[1:-1], "name"))
        card = str(render_card(record))
        markup, texts = markup_and_texts(ModelCard(card).text)
        expected_markup, expected_texts = markup_and_texts(ModelCard(str(render_card(harmless))).text)
        assert markup == expected_markup and len(texts) == len(expected_texts)
        shown = " ".join(NASTY.split())
        assert texts.count(shown) == expected_texts.count("name") >= 7  # title, source, and cells of three tables
        data = ModelCard(card).data
        assert data.tags[-1] == NASTY and data.eval_results[0].dataset_name == NASTY
        (settings,) = [text for text in texts if "note:" in text]
        assert yaml.safe_load(settings) == {"note": NASTY}

    @pytest.mark.parametrize("name", ["CroprViTForImageClassification", "CroprViTModel"])
    def test_the_usage_example_is_python_with_the_name_as_a_string(self, name):
        card = render_card({"model": model_facts(tiny_model().config, name, NASTY)})
        (usage,) = [text for text in markup_and_texts(str(card))[1] if text.startswith("import cropr_hf")]
        strings = [node.value for node in ast.walk(ast.parse(usage)) if isinstance(node, ast.Constant)]
        assert NASTY in strings


class TestRecords:
    def test_what_is_not_a_number_is_null_and_shown_as_such(self, tmp_path):
        saved(tmp_path)
        metrics = {"accuracy": 0.5, "iou_of_a_class_without_pixels": math.nan, "loss": math.inf}
        add_to_record(tmp_path, evaluation={**ACCURACY, "metrics": metrics})
        add_to_record(tmp_path)  # which reads it again

        def refuse(constant):
            raise AssertionError(constant)

        record = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"), parse_constant=refuse)
        assert record["evaluations"][0]["metrics"] == {**metrics, "iou_of_a_class_without_pixels": None, "loss": None}
        card = card_of(tmp_path)
        assert "| iou_of_a_class_without_pixels | not a number |" in card and ".nan" not in card
        assert [result.metric_type for result in ModelCard(card).data.eval_results] == ["accuracy"]

    def test_a_record_that_says_too_little_is_an_error_and_stays(self, tmp_path):
        saved(tmp_path)
        before = card_of(tmp_path)
        for changes in ({"model": {}}, {"model": []}, {"evaluations": [{}]}, {"throughput": {"results": 1}}):
            file = tmp_path / "record.json"
            text = json.dumps(read_record(tmp_path) | changes)
            file.write_text(text)
            with pytest.raises(ValueError, match="save the model again, or correct"):
                write_record(tmp_path, read_record(tmp_path))
            assert file.read_text() == text and card_of(tmp_path) == before
            saved(tmp_path)

    def test_measurements_are_added_and_replaced(self, tmp_path):
        saved(tmp_path)
        add_to_record(tmp_path, evaluation=ACCURACY)
        add_to_record(tmp_path, evaluation={**ACCURACY, "split": "validation"})
        add_to_record(tmp_path, evaluation={**ACCURACY, "metrics": {"accuracy": 0.5}})
        assert [entry["metrics"]["accuracy"] for entry in read_record(tmp_path)["evaluations"]] == [0.75, 0.5]
        card = card_of(tmp_path)
        assert "| owner/squares | test | 64 | accuracy | 0.5 |" in card
        results = ModelCard(card).data.eval_results
        assert [(result.dataset_split, result.metric_value) for result in results] == [
            ("validation", 0.75),
            ("test", 0.5),
        ]

    def test_measurements_that_say_too_little_are_errors(self, tmp_path):
        saved(tmp_path)
        before = card_of(tmp_path)
        for name in ("dataset", "metrics"):
            with pytest.raises(ValueError, match=f"no {name}"):
                add_to_record(tmp_path, evaluation={key: value for key, value in ACCURACY.items() if key != name})
        with pytest.raises(ValueError, match="'accuracy' is 'good'"):
            add_to_record(tmp_path, evaluation={**ACCURACY, "metrics": {"accuracy": "good"}})
        assert card_of(tmp_path) == before

    def test_folders_without_a_record_are_errors(self, tmp_path):
        with pytest.raises(ValueError, match=r"no record\.json"):
            add_to_record(tmp_path, evaluation=ACCURACY)
        for text in ("{", "[]", "{}"):
            (tmp_path / "record.json").write_text(text)
            with pytest.raises(ValueError, match=r"record\.json"):
                read_record(tmp_path)

    def test_a_recipe_that_nobody_ran_says_so(self):
        config = tiny_model().config
        record = {
            "model": model_facts(config, "CroprViTForImageClassification", "Tiny", base_model="owner/vit"),
            "published": "85.3 % top-1.",
            "recipe": "python train.py recipe.yaml",
        }
        card = str(render_card(record))
        assert "**Not measured here.** Published figures, those of the paper: 85.3 % top-1." in card
        assert "There are no weights yet" in card and "python train.py recipe.yaml" in card
        assert ModelCard(card).data.base_model == "owner/vit"

    def test_changed_settings_hold_no_secrets_and_paths(self, tmp_path):
        args = training_arguments(tmp_path, hub_token="secret", learning_rate=0.5, lr_scheduler_type="cosine")
        settings = changed_settings(args)
        assert settings["learning_rate"] == 0.5 and settings["lr_scheduler_type"] == "cosine"
        assert not {"warmup_steps", "debug", "gradient_checkpointing", "dataloader_pin_memory"} & settings.keys()
        assert changed_settings(Choice(fusion=False)) == {"fusion": False} and changed_settings(Choice()) == {}
        assert "secret" not in json.dumps(settings) and str(tmp_path) not in json.dumps(settings)


class TestTrainer:
    def trainer(self, folder, **kwargs) -> CroprTrainer:
        args = training_arguments(folder, max_steps=3, **kwargs)
        return CroprTrainer(tiny_model(), args, train_dataset=ColouredSquares(), eval_dataset=ColouredSquares())

    def test_what_it_saves_says_how_it_was_trained_and_what_it_found(self, tmp_path):
        trainer = self.trainer(tmp_path / "run")
        trainer.facts = {"dataset": "owner/squares", "base_licence": "mit"}
        trainer.train()
        trainer.evaluate()
        trainer.create_model_card(tags="squares", language="en")  # nothing was saved yet
        trainer.save_model()
        record, card = read_record(tmp_path / "run"), card_of(tmp_path / "run")
        training = record["training"]
        assert (training["num_steps"], training["batch_size"], training["seed"]) == (3, 8, 3)
        assert training["settings"]["learning_rate"] == 1e-3 and training["precision"] == "float32"
        assert training["loss"] == pytest.approx(trainer.state.log_history[-2]["train_loss"], abs=1e-4)
        (evaluation,) = record["evaluations"]
        assert evaluation["dataset"] == "owner/squares" and set(evaluation["metrics"]) == {"loss"}
        data = ModelCard(card).data
        assert (data.license, data.datasets, data.language) == ("mit", ["owner/squares"], "en")
        assert data.tags == ["vision", "cropr", "token-pruning", "custom_code", "squares"]
        trainer.model.save_pretrained(tmp_path / "copy")
        assert {**read_record(tmp_path / "copy"), "model": None} == {**record, "model": None}

    @pytest.mark.full
    def test_the_batch_size_is_the_one_that_fitted(self, tmp_path):
        def forward(model, args, kwargs):
            if model.training and len(kwargs["pixel_values"]) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        trainer = self.trainer(tmp_path, auto_find_batch_size=True)
        trainer.model.register_forward_pre_hook(forward, with_kwargs=True)
        trainer.train()
        trainer.save_model()
        training = read_record(tmp_path)["training"]
        assert training["batch_size"] == training["settings"]["per_device_train_batch_size"] == 4

    def test_a_run_that_diverged_leaves_a_record_that_can_be_read(self, tmp_path):
        trainer = self.trainer(tmp_path)
        trainer.train()
        trainer.compute_metrics = lambda predictions: {"accuracy": math.nan}
        trainer.evaluate()
        trainer.state.log_history[-2]["train_loss"] = math.nan
        trainer.save_model()
        record = read_record(tmp_path)
        assert record["training"]["loss"] is None and record["evaluations"][0]["metrics"]["accuracy"] is None

    def test_the_licence_of_the_source_is_looked_up_where_the_source_is_known(self, tmp_path, monkeypatch):
        """A new model has no source, and a bare name is that of a folder which lies elsewhere."""
        (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
        monkeypatch.chdir(tmp_path)
        assert licence_of(str(tmp_path)) == "mit"
        monkeypatch.setattr(ModelCard, "load", None)
        assert licence_of("") is None and licence_of("base") is None

    def test_results_of_other_weights_are_not_recorded(self, tmp_path):
        """Those during the training, and those before more of it."""
        trainer = self.trainer(tmp_path, eval_strategy="steps", eval_steps=1)
        trainer.evaluate()
        trainer.train()
        trainer.save_model()
        assert read_record(tmp_path)["evaluations"] == []

    def test_results_of_other_data_and_other_pruning_do_not_count_as_its_own(self, tmp_path):
        trainer = self.trainer(tmp_path)
        trainer.facts = {"dataset": "owner/squares", "base_licence": None}
        trainer.train()
        trainer.evaluate(Subset(ColouredSquares(), range(8)))
        trainer.model.set_pruning(0)
        trainer.evaluate()
        trainer.save_model()
        assert [entry["dataset"] for entry in read_record(tmp_path)["evaluations"]] == ["Subset"]
        trainer.model.set_pruning(None)
        trainer.evaluate()
        trainer.train()
        trainer.save_model()
        assert read_record(tmp_path)["evaluations"] == []

    def test_a_loaded_model_does_not_inherit_results(self, tmp_path):
        saved(tmp_path / "first")
        add_to_record(tmp_path / "first", evaluation=ACCURACY)
        model = type(tiny_model()).from_pretrained(tmp_path / "first", use_auxiliary_heads=True)
        model.save_pretrained(tmp_path / "second")
        assert "evaluations" not in read_record(tmp_path / "second")


def test_a_card_of_a_dense_task_shows_fusion(tmp_path):
    model = tiny_model(CroprViTForSemanticSegmentation, num_queries=None)
    model.save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert "before the last block the pruned ones come back" in card and "labels every pixel" in card
    assert ModelCard(card).data.pipeline_tag == "image-segmentation"


class TestModelCards:
    """The folder `model_cards`."""

    @pytest.fixture
    def cards(self):
        spec = importlib.util.spec_from_file_location("render", ROOT / "model_cards" / "render.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    @pytest.mark.full
    def test_every_card_says_what_its_record_says(self, cards):
        written = {path: path.read_text(encoding="utf-8") for path in (ROOT / "model_cards").rglob("*.md")}
        assert cards.render() == written, "run `make cards`"

    def test_there_is_a_card_for_every_recipe_and_it_claims_no_measurement(self, cards):
        recipes = {path.stem for path in (ROOT / "examples" / "recipes").glob("*.yaml")}
        assert recipes == {path.stem for path in (ROOT / "model_cards" / "recipes").glob("*.md")}
        for name in recipes:
            card = ModelCard.load(ROOT / "model_cards" / "recipes" / f"{name}.md")
            assert "**Not measured here.**" in card.text and card.data.eval_results is None

    def test_models_that_were_trained_here_have_results_and_hardware(self, cards):
        folders = cards.record_folders()
        assert folders
        for folder in folders:
            record = read_record(folder)
            assert record["training"]["commit"] and record["training"]["machine"] and record["training"]["versions"]
            assert "dirty" not in record["training"]["commit"]
            assert any(evaluation["split"] == "test" for evaluation in record["evaluations"])
            assert {"unpruned", "cropr", "random"} <= record["throughput"]["results"].keys()
