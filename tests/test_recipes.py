"""The recipes of published settings, and how the training scripts read them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from cropr_hf import CroprViTConfig, CroprViTForImageClassification
from cropr_hf.training import changed_settings
from tests.test_examples import EXAMPLES, history


RECIPES = sorted((EXAMPLES / "recipes").glob("*.yaml"))
DOCS = (EXAMPLES.parent / "docs" / "recipes.md").read_text(encoding="utf-8")

# Size of the model; sequence lengths, CLS included, before pruning, after the first module and at the end; share of
# patches that is pruned; images per step; learning rate.
PUBLISHED = {
    "mae_vit_b_imagenet": ("base", 197, 180, 36, 0.82, 1024, 2e-3),
    "mae_vit_l_imagenet": ("large", 197, 188, 20, 0.90, 1024, 4e-3),
    "mae_vit_h_imagenet": ("huge", 257, 248, 16, 0.94, 1024, 4e-3),
    "eva02_l_imagenet": ("eva02_large", 1025, 984, 144, 0.86, 512, 2e-5),
    "eva02_l_imagenet_at_once": ("eva02_large", 1025, 208, 208, 0.80, 512, 2e-5),
    "eva02_l_ade20k": ("eva02_large", 1025, 984, 144, 0.86, 8, 2e-5),
    "eva02_l_coco_boxes": ("eva02_large_detection", 9216, 6400, 256, 0.97, 128, 5e-5),
    "eva02_l_coco_instances": ("eva02_large_detection", 9216, 6400, 256, 0.97, 128, 5e-5),
}


class Parsed(Exception):
    """Ends a script where it has parsed its arguments, and holds them."""


@pytest.fixture
def parse(example, monkeypatch):
    """Runs a script until it has its arguments, and returns model arguments, data arguments and training arguments."""

    def stop(classes, arguments):
        raise Parsed(example("shared").parse_arguments(classes, arguments))

    def run(script: str, *words: object) -> tuple:
        for name in ("train_image_classification", "train_semantic_segmentation", "detection"):
            monkeypatch.setattr(example(name), "parse_arguments", stop)
        with pytest.raises(Parsed) as stopped:
            example(script).main([*map(str, words), "--use_cpu"])
        found = stopped.value.args[0]
        return found[0], found[1], found[-1]

    return run


def facts(recipe: Path) -> dict[str, str]:
    """The first lines of a recipe: its script, a title, devices, and the figures of the paper and of this project."""
    header = recipe.read_text(encoding="utf-8").split("\n\n")[0]
    return yaml.safe_load(header.replace("# ", ""))


def script_of(recipe: Path) -> str:
    return Path(facts(recipe)["script"]).stem


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
class TestRecipes:
    def test_the_schedule_is_the_published_one(self, parse, recipe):
        size, tokens, first, last, pruned, _, _ = PUBLISHED[recipe.stem]
        model_args, _, _ = parse(script_of(recipe), recipe)
        config = CroprViTConfig.from_size(size, **model_args.overrides())
        kept = config.kept_patches()
        lengths = [config.num_prefix_tokens + count for count in (config.num_patches, *kept)]
        shorter = [length for length in lengths if length < tokens]
        assert (lengths[0], shorter[0], shorter[-1]) == (tokens, first, last)
        assert 1 - kept[-1] / config.num_patches == pytest.approx(pruned, abs=0.005)
        assert all(length % 4 == 0 for length in shorter)

    def test_images_per_step_and_learning_rate(self, parse, recipe):
        *_, batch, learning_rate = PUBLISHED[recipe.stem]
        _, _, args = parse(script_of(recipe), recipe)
        on_all = facts(recipe)["devices"] * args.per_device_train_batch_size * args.gradient_accumulation_steps
        assert (on_all, args.learning_rate) == (batch, learning_rate)
        assert args.fp16
        assert args.output_dir.startswith("outputs/")

    def test_what_it_says_of_itself(self, recipe):
        about = facts(recipe)
        assert list(about) == ["script", "title", "devices", "paper", "ours"]
        assert (EXAMPLES / about["script"]).exists()

    def test_the_page_has_it_with_the_same_figures(self, recipe):
        about = facts(recipe)
        row = next(line for line in DOCS.splitlines() if line.startswith(f"| `{recipe.name}` |"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1:2] + cells[3:] == [about["title"], about["paper"], about["ours"]]

    def test_unpruned_and_random_baselines_are_one_more_argument(self, parse, recipe):
        for reducer, expected in (("none", None), ("random", "random")):
            model_args, _, _ = parse(script_of(recipe), recipe, "--token_reducer", reducer)
            config = CroprViTConfig.from_size(PUBLISHED[recipe.stem][0], **model_args.overrides())
            assert config.token_reducer == expected


def test_every_recipe_is_published_and_the_other_way_round():
    assert {recipe.stem for recipe in RECIPES} == PUBLISHED.keys()


def test_the_schedules_between_first_and_last(parse):
    lengths = {}
    for name in ("mae_vit_l_imagenet", "eva02_l_imagenet", "eva02_l_imagenet_at_once", "eva02_l_ade20k"):
        recipe = EXAMPLES / "recipes" / f"{name}.yaml"
        config = CroprViTConfig.from_size(PUBLISHED[name][0], **parse(script_of(recipe), recipe)[0].overrides())
        lengths[name] = [1 + kept for kept in config.kept_patches()]
    assert lengths["mae_vit_l_imagenet"] == [*range(188, 19, -8), 20, 20]
    assert lengths["eva02_l_imagenet"] == lengths["eva02_l_ade20k"] == [*range(984, 143, -40), 144, 144]
    assert lengths["eva02_l_imagenet_at_once"] == [1025] * 2 + [208] * 22


@pytest.mark.parametrize("name", ["eva02_l_ade20k", "eva02_l_coco_boxes", "eva02_l_coco_instances"])
def test_a_recipe_that_a_script_has_as_its_defaults_says_the_same(parse, name):
    recipe = EXAMPLES / "recipes" / f"{name}.yaml"
    stated, defaults = parse(script_of(recipe), recipe), parse(script_of(recipe))
    size = PUBLISHED[name][0]
    configs = [CroprViTConfig.from_size(size, **args[0].overrides()).to_dict() for args in (stated, defaults)]
    assert configs[0] == configs[1]
    assert stated[1] == defaults[1]  # the data
    same = ("learning_rate", "layer_decay", "weight_decay", "warmup_steps", "max_steps", "lr_scheduler_type")
    for field in (*same, "lr_scheduler_kwargs", "pruning_curriculum", "num_train_epochs", "eval_strategy"):
        assert getattr(stated[2], field) == getattr(defaults[2], field)


def test_segmentation_trains_by_the_paper_where_the_settings_are_the_papers(parse):
    script, recipe = "train_semantic_segmentation", EXAMPLES / "recipes" / "eva02_l_ade20k.yaml"
    other = ["--model_name_or_path", EXAMPLES / "digits_vit"]
    words = {"patches": [[], [recipe]], None: [other], "both": [["--auxiliary_task", "both"]]}
    for expected, calls in words.items():
        for call in calls:
            assert parse(script, *call)[0].overrides().get("auxiliary_task") == expected
    drawn = parse(script, recipe, "--patch_queries_per_step", 64)[0].overrides()
    assert CroprViTConfig.from_size("eva02_large", **drawn).patch_queries_per_step == 64


def test_fields_of_a_method_are_json(parse, tmp_path):
    words = ["--token_reducer", "evit", "--reducer_config", '{"keep_rate": 0.5}']
    overrides = parse("train_image_classification", *words)[0].overrides()
    config = CroprViTConfig.from_size("small", **overrides)
    assert config.reducer_config == {"keep_rate": 0.5} and config.kept_patches()[-1] == 27
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("token_reducer: evit\nreducer_config: {keep_rate: 0.5}\n")
    assert parse("train_image_classification", recipe)[0].overrides() == overrides
    without = parse("train_image_classification", recipe, "--token_reducer", "none")[0].overrides()
    assert without["token_reducer"] is None and "reducer_config" not in without
    with pytest.raises(ValueError, match=r"--reducer_config is 'keep_rate', which is not valid JSON"):
        parse("train_image_classification", "--reducer_config", "keep_rate")[0].overrides()


@pytest.mark.parametrize("script", sorted({script_of(recipe) for recipe in RECIPES}))
def test_gradients_have_no_limit_unless_one_is_given(parse, script):
    """As in the reference code, where the Trainer has a limit of 1 by default."""
    assert parse(script)[2].max_grad_norm == 0
    assert parse(script, "--max_grad_norm", 0.5)[2].max_grad_norm == 0.5


@pytest.mark.parametrize("name", ["layer_decay", "ema_decay", "learning_rate", "drop_path_rate"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_numbers_are_finite(parse, name, value):
    with pytest.raises(ValueError, match=f"`{name}` is {value}; it must be a finite number"):
        parse("train_image_classification", f"--{name}={value}")


def test_eva02_keeps_its_pooling(parse):
    timm = pytest.importorskip("timm")
    source = timm.create_model("eva02_tiny_patch14_224", num_classes=21, depth=3)
    args, _, _ = parse("train_image_classification", EXAMPLES / "recipes" / "eva02_l_imagenet.yaml")
    own = CroprViTForImageClassification.from_vit(source, num_labels=10).config
    stated = CroprViTForImageClassification.from_vit(source, num_labels=10, **args.overrides()).config
    assert (own.pooling, own.norm_before_pooling) == (stated.pooling, stated.norm_before_pooling)
    assert [1 + kept for kept in stated.kept_patches()] == [984, 984, 984]


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("words", [["--activation_checkpointing"], ["--activation_checkpointing", "False"], []])
def test_activation_checkpointing_has_one_name_with_every_release(parse, words):
    recipe = EXAMPLES / "recipes" / "eva02_l_coco_boxes.yaml"
    for source, default in (([recipe], True), ([], False)):
        expected = default if not words else words[-1] != "False"
        _, _, args = parse("train_object_detection", *source, *words)
        assert args.gradient_checkpointing is expected is args.activation_checkpointing  # releases read one of the two
        settings = changed_settings(args)
        assert settings.get("activation_checkpointing", False) is expected
        assert "gradient_checkpointing" not in settings


class TestReading:
    SCRIPT = "train_image_classification"

    @pytest.fixture
    def write(self, tmp_path):
        def write(text: str, name: str = "own.yaml") -> Path:
            (tmp_path / name).write_text(text, encoding="utf-8")
            return tmp_path / name

        return write

    def test_values_of_every_kind(self, parse, write):
        recipe = write(
            "model_name_or_path: outputs/mine\nlearning_rate: 1e-3\nweight_decay: 5.0e-2\npruning_rate: 4\n"
            "last_layer_fusion: false\nlr_scheduler_kwargs: {min_lr: 1.0e-5}\n"
            "max_steps: -1\nfp16: yes\ndo_train: false\n"
        )
        model, _, args = parse(self.SCRIPT, recipe)
        assert (model.model_name_or_path, model.pruning_rate, model.last_layer_fusion) == ("outputs/mine", 4, False)
        assert (args.learning_rate, args.weight_decay, args.lr_scheduler_kwargs) == (1e-3, 0.05, {"min_lr": 1e-5})
        assert (args.max_steps, args.fp16, args.do_train) == (-1, True, False)

    def test_lists_and_fields_of_the_configuration(self, parse, write):
        recipe = write("pruning_schedule: [64, 16, 16]\nlr_drops: [0.5]\nconfig: {window_size: 4, rope_theta: null}\n")
        model, _, args = parse("train_object_detection", recipe)
        assert (model.pruning_schedule, args.lr_drops) == ([64, 16, 16], [0.5])
        assert json.loads(model.config) == {"window_size": 4, "rope_theta": None}

    def test_json(self, parse, write):
        recipe = write(json.dumps({"learning_rate": 1e-7, "fp16": False, "pruning_rate": 4}), "own.json")
        model, _, args = parse(self.SCRIPT, recipe)
        assert (args.learning_rate, args.fp16, model.pruning_rate) == (1e-7, False, 4)

    def test_the_command_line_wins(self, parse, write):
        recipe = write("pruning_rate: 4\nfp16: true\nlr_scheduler_kwargs: {min_lr: 1.0e-5}\nseed: 3\n")
        words = ["--pruning_rate", 6, "--fp16", "False", "--lr_scheduler_kwargs", '{"min_lr": 0.1}']
        model, _, args = parse(self.SCRIPT, recipe, *words)
        assert (model.pruning_rate, args.fp16, args.lr_scheduler_kwargs, args.seed) == (6, False, {"min_lr": 0.1}, 3)

    def test_a_folder_replaces_the_data_set(self, parse, write):
        _, data, _ = parse(self.SCRIPT, write("dataset_name: ILSVRC/imagenet-1k\n"), "--train_dir", "flowers")
        assert (data.train_dir, data.dataset_name) == ("flowers", None)

    def test_without_a_recipe_nothing_changes(self, parse):
        model, _, args = parse(self.SCRIPT, "--pruning_rate", 6)
        assert (model.pruning_rate, args.learning_rate) == (6, 1e-3)

    @pytest.mark.parametrize(
        "text, message",
        [
            ("pruning_rat: 8", "own.yaml sets 'pruning_rat', which is not an argument.* did you mean pruning_rate"),
            ("min_scale: 0.5", "own.yaml sets 'min_scale', which is not an argument of this script"),
            ("pruning_rate: eight", "own.yaml sets 'pruning_rate' to 'eight': .*invalid int value"),
            ("pruning_rate: '8 or so'", "sets 'pruning_rate' to '8 or so': .*invalid int value"),
            ("pruning_rate: 8.5", "sets 'pruning_rate' to 8.5: .*invalid int value"),
            ("pruning_rate: true", "sets 'pruning_rate' to True: .*invalid int value"),
            ("pruning_rate:", "sets 'pruning_rate' to None: .*invalid int value"),
            ("pruning_rate: [8, 16]", "sets 'pruning_rate' to \\[8, 16\\]: it takes one value"),
            ("learning_rate: {peak: 1}", "sets 'learning_rate' to {'peak': 1}: .*invalid float value"),
            ("pruning_schedule: 10 20", "sets 'pruning_schedule' to '10 20': .*invalid int value"),
            ("pruning_schedule: []", "sets 'pruning_schedule' to \\[\\]: .*expected at least one argument"),
            ("fp16: maybe", "sets 'fp16' to 'maybe': .*Truthy value expected"),
            ("save_strategy: no", "sets 'save_strategy' to False: it takes text: put it in quotes"),
            ("revision: 1.0", "sets 'revision' to 1.0: it takes text: put it in quotes"),
            ("revision:", "sets 'revision' to None: it takes text: put it in quotes, or leave it out"),
            ("- pruning_rate", "own.yaml is not a recipe; write lines of the form"),
            ("", "own.yaml is not a recipe; write lines of the form"),
        ],
    )
    def test_mistakes_are_errors_that_name_them(self, example, write, text, message):
        with pytest.raises(ValueError, match=message):
            example(self.SCRIPT).main([str(write(text)), "--use_cpu"])

    def test_a_mistake_on_the_command_line_still_ends_the_script(self, example, write, capsys):
        with pytest.raises(SystemExit):
            example(self.SCRIPT).main([str(write("pruning_rate: 8")), "--pruning_rate", "eight"])
        assert "usage: " in capsys.readouterr().err

    def test_help_mentions_recipes(self, example, capsys):
        with pytest.raises(SystemExit):
            example(self.SCRIPT).main(["--help"])
        text = capsys.readouterr().out
        assert "[RECIPE] [--ARGUMENT VALUE ...]" in text
        assert "examples/recipes" in text


def test_a_recipe_made_tiny_trains(example, tmp_path):
    tiny = {
        "model_name_or_path": EXAMPLES / "digits_vit",
        "dataset_name": "cluttered_digits",
        "image_size": 96,
        "pruning_rate": 20,
        "max_train_samples": 16,
        "max_eval_samples": 8,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 8,
        "dataloader_num_workers": 0,
        "benchmark_rounds": 0,
        "fp16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "output_dir": tmp_path,
    }
    words = [str(word) for name, value in tiny.items() for word in (f"--{name}", value)]
    example("train_image_classification").main([str(EXAMPLES / "recipes" / "mae_vit_l_imagenet.yaml"), *words])
    model = CroprViTForImageClassification.from_pretrained(tmp_path)
    assert [1 + kept for kept in model.config.kept_patches()] == [124, 104, 84, 64, 64, 64]
    assert (model.config.drop_path_rate, model.config.label_smoothing) == (0.2, 0.1)  # of the recipe
    logs = [entry for entry in history(tmp_path) if "loss" in entry]
    assert len(logs) == 2
    assert np.isfinite([entry["auxiliary_loss_4"] for entry in logs]).all()
    args = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert (args.layer_decay, args.learning_rate, args.save_total_limit) == (0.75, 4e-3, 2)


def test_commands_of_the_page_name_files_that_exist():
    for path in re.findall(r"examples/[\w/.]+\.(?:yaml|py)", DOCS):
        assert (EXAMPLES.parent / path).exists(), path
