"""Methods compared from one file: which runs there are, what is resumed, what is refused, and the table."""

import datetime
import json
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from cropr_hf import CroprViTConfig, CroprViTForImageClassification, comparison
from cropr_hf.cli import main
from cropr_hf.comparison import Runner, pruning_of, tradeoff_curves
from cropr_hf.comparison_file import Comparison, Speed
from cropr_hf.publishing.model_card import class_name, model_facts, write_record
from cropr_hf.speed.cost import multiply_adds, unpruned_config
from cropr_hf.speed.instruments import compiled
from tests.common import TASKS, TINY, full, tiny_config


SPEED = {"batch_sizes": [1], "compiled": False, "min_rounds": 3, "max_rounds": 3}
CONTENT = {
    "train": "train.py",
    "evaluate": "evaluate.py",
    "methods": ["cropr", "random"],
    "budgets": {"half": {"pruning_schedule": [12, 8, 4, 4, 4]}},
    "seeds": [0, 1],
    "arguments": {"model_name_or_path": "source", "image_size": 32},
    "pruned": {"last_layer_fusion": False},
    "metrics": ["accuracy"],
    "smaller_model": "smaller",
    "speed": SPEED,
}
FEW = {"seeds": [0], "methods": ["cropr"], "smaller_model": None}
# In the order in which they run; off the shelf means without a training.
NAMES = ["unpruned", "cropr", "smaller image", "random", "random off the shelf", "smaller model"]


class Scripts:
    """In place of processes: saves tiny models as a training script does, and makes accuracies up."""

    def __init__(self):
        self.calls, self.stop_after, self.num_examples, self.metrics = [], None, 64, {"accuracy": 0.5, "kept": 0.25}

    def __call__(self, script, settings, log):
        if self.stop_after is not None and len(self.calls) == self.stop_after:
            raise KeyboardInterrupt
        self.calls.append((script, dict(settings)))
        if script == "evaluate.py":
            number = len([name for name, _ in self.calls if name == script])
            return "a line before\n" + json.dumps(
                {**self.metrics, "accuracy": self.metrics["accuracy"] + number / 100}
            )
        reducer = None if settings["token_reducer"] == "none" else settings["token_reducer"]
        fields = {name: settings[name] for name in ("image_size", "last_layer_fusion") if name in settings}
        if settings["model_name_or_path"] == "smaller":
            fields["num_hidden_layers"] = 2
        fields |= {"pruning_rate": None, "pruning_schedule": settings.get("pruning_schedule")}
        config = CroprViTConfig(**{**TINY, **fields, "token_reducer": reducer})
        folder = Path(settings["output_dir"])
        model = CroprViTForImageClassification(config)
        model.save_pretrained(folder)
        facts = {"dataset": "pictures", "num_examples": self.num_examples, "num_steps": 4, "machine": "a machine"}
        write_record(folder, {"model": model_facts(config, class_name(model)), "training": facts})
        logs = [{"loss": 2.5, "main_loss": 1.5, "auxiliary_loss_1": "1.0"}, {"train_loss": 3.0}]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": logs}))
        return ""

    def counts(self):
        return Counter(script for script, _ in self.calls)


@pytest.fixture
def scripts(monkeypatch, tmp_path):
    scripts = Scripts()
    monkeypatch.chdir(tmp_path)
    for name in ("train.py", "evaluate.py"):
        (tmp_path / name).touch()
    monkeypatch.setattr(comparison, "call", scripts)
    return scripts


@pytest.fixture
def write(tmp_path):
    def write(name="file.yaml", **changes):
        path = tmp_path / name
        path.write_text(yaml.safe_dump({**CONTENT, **changes}))
        return str(path)

    return write


def test_every_run_is_trained_or_taken_and_evaluated_once_though_interrupted(scripts, write, tmp_path, capsys):
    arguments = ["compare", write(), "--output_dir", str(tmp_path / "out")]
    scripts.stop_after = 7
    assert main(arguments) == 130
    assert not (tmp_path / "out" / "comparison.json").exists()
    scripts.stop_after = None
    assert main(arguments) == 0
    # Five of six runs of each seed are trained; the seventh call was a training whose evaluation was cut off.
    assert scripts.counts() == {"train.py": 2 * 5 + 1, "evaluate.py": 2 * 6}
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    named = [f"{run['method']}{'' if run['trained'] else ' off the shelf'}" for run in record["runs"]]
    assert named == 2 * NAMES and [run["seed"] for run in record["runs"]] == [0] * 6 + [1] * 6
    assert record["runs"][0]["losses"] == {"loss": 2.5, "main_loss": 1.5, "auxiliary_loss_1": 1.0}
    table = (tmp_path / "out" / "comparison.md").read_text()
    assert table in capsys.readouterr().out + "\n"
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[:-2]]
    assert header[3:5] == ["accuracy, %", "accuracy, off the shelf, %"]
    cells = {row[0]: row[1:] for row in rows}
    assert [*cells] == ["unpruned", "Cropr, half", "smaller image, half", "random, half", "smaller model"]
    assert cells["Cropr, half"][0] == "4 of 16" and cells["Cropr, half"][3] == "–" != cells["random, half"][3]
    assert cells["unpruned"][2] == "54.0 ± 4.2"  # 51 and 57: first and seventh of the evaluations
    assert "2 seeds; 64 training images, 4 steps, on a machine" in table
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    curves = tradeoff_curves(record)
    assert curves["random"] != curves["random, off the shelf"] and curves["unpruned"][0]["speedup"] == 1

    again = len(scripts.calls)
    assert main(arguments) == 0 and len(scripts.calls) == again


@pytest.mark.full
def test_pictures_are_drawn_for_the_first_seed_also_where_they_are_asked_for_later(scripts, write, tmp_path):
    few = FEW | {"methods": ["random"], "seeds": [0, 1]}
    Runner(Comparison.from_file(write(**few)), tmp_path)()
    assert not any("picture" in settings for _, settings in scripts.calls)
    scripts.calls.clear()
    Runner(Comparison.from_file(write(**few, pictures=True)), tmp_path)()
    assert scripts.counts() == {"evaluate.py": 2}
    assert [Path(settings["picture"]) for _, settings in scripts.calls] == [
        tmp_path / "runs" / run / "pruning.png" for run in ("random_half_seed_0", "random_half_off_the_shelf_seed_0")
    ]
    assert "token_reducer" not in scripts.calls[0][1] and scripts.calls[1][1]["token_reducer"] == "random"


def test_variants_of_a_method_have_names_of_their_own(scripts, write, tmp_path):
    methods = {"cropr": {}, "few chances": {"token_reducer": "random", "layer_decay": 1}}
    record = Runner(Comparison.from_file(write(**FEW | {"methods": methods})), tmp_path)()
    trainings = {Path(told["output_dir"]).parent.name: told for script, told in scripts.calls if script == "train.py"}
    told = trainings["few_chances_half_seed_0"]
    assert (told["token_reducer"], told["layer_decay"]) == ("random", 1)
    assert "layer_decay" not in trainings["cropr_half_seed_0"]
    assert {"cropr, half", "few chances, half"} <= {*record["models"]}
    assert [run["trained"] for run in record["runs"] if run["method"] == "few chances"] == [True, False]
    assert "| few chances, half | 4 of 16 |" in (tmp_path / "comparison.md").read_text()


def test_methods_that_follow_the_image_are_compared_by_the_mean_image(scripts, write, tmp_path):
    """Scripts say what it was; the unpruned model and others go by the schedule."""
    methods = {"random": {}, "adaptive": {"token_reducer": "cropr"}}

    def answer(script, settings, log):
        printed = scripts(script, settings, log)
        if script != "evaluate.py" or "adaptive" not in settings["model_name_or_path"]:
            return printed
        seed = int(settings["model_name_or_path"].split("seed_")[1][0])
        means = {"mean_patches_left": 2.5 + seed, "mean_multiply_adds": 200_000 + 2000 * seed}
        return json.dumps(json.loads(printed.splitlines()[-1]) | means)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "call", answer)
        chosen = {"methods": methods, "off_the_shelf": False, "smaller_model": None}
        record = Runner(Comparison.from_file(write(**chosen)), tmp_path)()
    runs = [run for run in record["runs"] if run["method"] == "adaptive"]
    assert [run["counts"]["mean_patches_left"] for run in runs] == [2.5, 3.5]
    assert all(set(run["metrics"]) == {"accuracy", "kept"} for run in record["runs"])
    facts, other = record["models"]["adaptive, half"], record["models"]["random, half"]
    head = TINY["hidden_size"] * TINY["num_labels"]
    assert facts["patches_left"] == 3 and facts["multiply_adds"] == 201_000 + head
    assert facts["share_of_budget"] == pytest.approx(facts["multiply_adds"] / other["multiply_adds"])
    assert other["patches_left"] == 4 and "share_of_budget" not in other
    table = (tmp_path / "comparison.md").read_text()
    assert "| adaptive, half | 3.0 of 16 | 0.00 |" in table
    missed = facts["share_of_budget"] - 1
    assert abs(missed) > 0.05 and f"missed, in multiply-adds: adaptive, half by {missed:+.0%}." in table


@pytest.mark.full
def test_what_scripts_are_told(scripts, write, tmp_path):
    Runner(Comparison.from_file(write(seeds=[3])), tmp_path / "out")()
    trainings = [settings for script, settings in scripts.calls if script == "train.py"]
    assert {settings["seed"] for settings in trainings} == {3}
    first, cropr, image = trainings[:3]
    assert first["token_reducer"] == "none" and "last_layer_fusion" not in first
    assert (cropr["token_reducer"], cropr["last_layer_fusion"]) == ("cropr", False)
    assert cropr["pruning_schedule"] == [12, 8, 4, 4, 4]
    assert image["token_reducer"] == "none" and image["image_size"] == 24  # 9 of 16 patches
    taken = [settings for _, settings in scripts.calls if settings.get("token_reducer") == "random"][-1]
    assert taken["model_name_or_path"] == str(tmp_path / "out" / "runs" / "unpruned_seed_3" / "model")
    trained = [settings for settings in trainings if settings["token_reducer"] == "random"][-1]
    assert "output_dir" not in taken and "last_layer_fusion" in taken
    assert {name: taken[name] for name in taken if name.startswith("pruning")} == {
        name: trained[name] for name in trained if name.startswith("pruning")
    }


@pytest.mark.full
def test_other_settings_or_data_are_refused(scripts, write, tmp_path, monkeypatch):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_text("a")
    given = {**CONTENT["arguments"], "train_dir": str(photos)}
    Runner(Comparison.from_file(write(**FEW, arguments=given)), tmp_path / "out")()
    with pytest.raises(ValueError, match=r"another `arguments`: \{'image_size': 32\}, now \{'image_size': 40\}"):
        Runner(Comparison.from_file(write(**FEW, arguments={**given, "image_size": 40})), tmp_path / "out")()
    (photos / "b.jpg").write_text("b")
    comparison._folder_size.cache_clear()
    with pytest.raises(ValueError, match=r"another `data`: .*'files': 1.*'files': 2"):
        Runner(Comparison.from_file(write(**FEW, arguments=given)), tmp_path / "out")()
    (photos / "b.jpg").unlink()
    comparison._folder_size.cache_clear()
    scripts.num_examples = 65  # of a new seed
    with pytest.raises(ValueError, match=r"seed 1 was trained on 65 \(num_examples\), others on 64"):
        Runner(Comparison.from_file(write(**FEW | {"seeds": [0, 1]}, arguments=given)), tmp_path / "out")()


@pytest.mark.full
def test_times_of_another_machine_are_not_kept(scripts, write, tmp_path, monkeypatch):
    runner = Runner(Comparison.from_file(write(**FEW)), tmp_path)
    first = runner()
    assert runner()["speed"] == first["speed"]
    monkeypatch.setattr(comparison, "machine_name", lambda device: "another machine")
    second = runner()
    assert second["machine"] == "another machine" and second["speed"] != first["speed"]
    assert second["runs"] == first["runs"]


def test_times_are_taken_once_though_interrupted_with_each_model_loaded_once(scripts, write, tmp_path, monkeypatch):
    speed = CONTENT["speed"] | {"batch_sizes": [1, 2], "dtypes": ["bfloat16", "float32"]}
    runner, loaded, settings = Runner(Comparison.from_file(write(**FEW | {"speed": speed})), tmp_path), [], []
    load, timed = runner.load, runner.timed
    monkeypatch.setattr(runner, "load", lambda run: loaded.append(run.name) or load(run))

    def stopped_in_the_third(models, files, *setting):
        settings.append(setting)
        if len(settings) == 3:
            raise KeyboardInterrupt
        return timed(models, files, *setting)

    monkeypatch.setattr(runner, "timed", stopped_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        runner()
    kept = json.loads((tmp_path / "speed.json").read_text())["speed"]
    loaded.clear()
    record = runner()
    assert len(loaded) == len({*loaded}) == len(record["models"])
    everything = [("bfloat16", 1), ("bfloat16", 2), ("float32", 1), ("float32", 2)]
    assert settings == [*everything[:3], *everything[2:]]
    assert [(each["dtype"], each["batch_size"]) for each in record["speed"]] == everything
    assert len(kept) == 2 and record["speed"][:2] == kept


@pytest.mark.full
def test_files_that_are_asked_for_later_are_timed(scripts, write, tmp_path, monkeypatch):
    few, timed = FEW | {"methods": ["cropr", "random"], "off_the_shelf": False}, []
    monkeypatch.setattr(comparison, "onnx_call", lambda file, pixel_values: lambda: timed.append(file.parent.name))

    def export_model(model, file):
        if model.config.token_reducer == "random":
            raise ValueError("It draws by chance.")
        file.write_text("")

    monkeypatch.setattr(comparison, "export_model", export_model)
    assert not any("ONNX" in name for name in speedups(Runner(Comparison.from_file(write(**few)), tmp_path)()))
    found = speedups(Runner(Comparison.from_file(write(**few, exported=True)), tmp_path)())
    names = ["unpruned", "cropr, half", "smaller image, half"]
    assert [name for name in found if "ONNX" in name] == [f"{name}, ONNX" for name in names]
    assert scripts.counts()["train.py"] == 4 and {*timed} == {
        "unpruned_seed_0",
        "cropr_half_seed_0",
        "smaller_image_half_seed_0",
    }
    kept = len(timed)
    assert speedups(Runner(Comparison.from_file(write(**few, exported=True)), tmp_path)()) == found
    assert len(timed) == kept


def speedups(record):
    return record["speed"][0]["results"]


@pytest.fixture
def graphs(monkeypatch):
    """Symbols among the inputs of each graph that `torch.compile` makes, which is not compiled any further."""

    def backend(graph, inputs):
        graphs.append([each for each in inputs if isinstance(each, torch.SymInt)])
        return graph.forward

    graphs, compile_model = [], torch.compile
    monkeypatch.setattr(torch, "compile", partial(compile_model, backend=backend))
    torch.compiler.reset()
    return graphs


@pytest.mark.full
def test_models_are_compiled_for_the_size_they_get(graphs):
    unpruned = {"token_reducer": None, "pruning_rate": None, "num_hidden_layers": 2}
    for size in (32, 24):
        model = CroprViTForImageClassification(CroprViTConfig(**TINY | unpruned | {"image_size": size})).eval()
        with torch.inference_mode():
            compiled(model, is_detector=False)(torch.zeros(1, 3, size, size))
    assert graphs == [[], []]


@pytest.mark.slow
def test_no_part_of_a_detector_exceeds_the_variants_that_torch_compiles(graphs, write, tmp_path):
    comparison = Comparison.from_file(write(speed={**SPEED, "compiled": True}))
    schedules = {"unpruned": [16, 14, 8, 8, 8], "cropr": [14, 7, 4, 4, 4]}
    models = {
        name: TASKS["detection"].build(pruning_rate=None, pruning_schedule=schedule, use_auxiliary_heads=False).eval()
        for name, schedule in schedules.items()
    }
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=len(models)):
        Runner(comparison, tmp_path).timed(models, {}, "float32", 2)
    assert graphs


def cost(unpruned, method, pruning):
    fields = unpruned.to_dict() | {"token_reducer": method, "last_layer_fusion": False} | pruning
    return multiply_adds(CroprViTConfig(**fields))


BUDGETS = [{"pruning_schedule": [26, 17, 11, 11, 11]}, *full({"pruning_rate": 4}, {"multiply_adds": 0.7})]


@pytest.mark.parametrize(
    "methods",
    [
        ["cropr", "random", "tome"],
        *full(["ailurus", "asvit", "dynamicvit", "evit", "idlevit", "itpn", "ltp", "stp", "svit", "tocom"]),
    ],
)
@pytest.mark.parametrize("budget", BUDGETS)
def test_every_method_meets_a_budget(budget, methods):
    unpruned, fusion = unpruned_config(tiny_config(image_size=48)), {"last_layer_fusion": False}
    target = budget.get("multiply_adds", 0) * multiply_adds(unpruned) or cost(unpruned, "random", budget)
    for method in methods:
        found = pruning_of(unpruned, method, budget, fusion)
        assert cost(unpruned, method, found) == pytest.approx(target, rel=0.05)
        if method in ("cropr", "random"):
            assert found == budget or "multiply_adds" in budget
        if method == "tome" and "pruning_schedule" in budget:  # removes tokens before the MLP
            assert found["pruning_schedule"][-1] > budget["pruning_schedule"][-1]


def test_a_budget_that_is_out_of_reach():
    with pytest.raises(ValueError, match=r"leaves 1% of the multiply-adds, cropr can leave \d+% by"):
        pruning_of(unpruned_config(tiny_config()), "cropr", {"multiply_adds": 0.01}, {})


WRONG = {
    "an unknown field": ({"method": ["cropr"]}, "'method', which is not a field of it; did you mean methods"),
    "an unknown method": ({"methods": ["tom"]}, "Unknown token reducer 'tom'; did you mean 'tome'"),
    "a method that is a number": (
        {"methods": {"cropr": 3}},
        r"`methods` of .* is \{'cropr': 3\}; write names and val",
    ),
    "a script that is a number": ({"evaluate": 3}, "`evaluate` of .* is 3; write text"),
    "another kind of budget": ({"budgets": {"half": {"rate": 8}}}, "The budget 'half' is"),
    "a rate in quotes": ({"budgets": {"half": {"pruning_rate": "8"}}}, "pruning_rate '8'; it is a whole number, 1 or"),
    "no rate": ({"budgets": {"half": {"pruning_rate": None}}}, "pruning_rate None; it is a whole number, 1 or more"),
    "a schedule that grows": ({"budgets": {"half": {"pruning_schedule": [4, 8]}}}, r"\[4, 8\]; it is a list of the"),
    "a name that is a number": (
        {"budgets": {0.5: {"pruning_rate": 8}}},
        "`budgets` of .* is {0.5: .*with quotes around",
    ),
    "what is set": (
        {"arguments": {"seed": 1}},
        "`arguments` has 'seed', which the comparison itself sets; leave it out",
    ),
    "a model": (
        {"evaluation": {"model_name_or_path": "a"}},
        "`evaluation` has 'model_name_or_path', which the compar",
    ),
    "words for true": ({"speed": {"compiled": "no"}}, "`compiled` of `speed` of .* is 'no'; write true or false"),
    "equal sizes": (
        {"speed": {"batch_sizes": [8, 8]}},
        r"`speed.batch_sizes` is \[8, 8\]; give one or more, each once",
    ),
}
MORE_WRONG = [
    ({"methods": None}, "has no methods"),
    ({"methods": "cropr"}, r"`methods` of .* is 'cropr'; write names"),
    ({"methods": [{"cropr": {}}]}, r"`methods` of .* is \[\{'cropr': \{\}\}\]; write names"),
    ({"methods": {None: {}}}, "`methods` of .* is {None: {}}; write names"),
    ({"train": 5}, "`train` of .* is 5; write text"),
    ({"train": " "}, "`train` is ' '; give a script or a command"),
    ({"evaluate": "evaluate.py 'a"}, "`evaluate` is .*No closing quotation.; correct the quotes"),
    ({"smaller_model": 3}, "`smaller_model` of .* is 3; write text"),
    ({"metrics": [3]}, r"`metrics` of .* is \[3\]; write a list"),
    ({"exported": 1}, "`exported` of .* is 1; write true or false"),
    ({"pictures": 3}, r"`pictures` of .* is 3; write true or false"),
    ({"budgets": {"half": 8}}, "`budgets` of .* is {'half': 8}; write names and values"),
    ({"budgets": {"half": {}}}, "The budget 'half' is {}; give one of"),
    ({"budgets": {"a b": {"pruning_rate": 1}, "a-b": {"pruning_rate": 2}}}, "differ in signs alone"),
    *[
        ({"budgets": {"half": {"multiply_adds": share}}}, rf"multiply_adds {share!r}; it is a share in \(0, 1\)")
        for share in (2, 0, True, "0.5", None)
    ],
    *[
        ({"budgets": {"half": {"pruning_rate": rate}}}, f"pruning_rate {rate}; it is a whole number, 1 or more")
        for rate in (2.5, -1, 0, True)
    ],
    *[
        (
            {"budgets": {"half": {"pruning_schedule": kept}}},
            "has pruning_schedule .*; it is a list of the patches that",
        )
        for kept in ("8", 8, None, [], [12, "8"], [12, 8.5], [12, 0], [True])
    ],
    ({"arguments": ["a"]}, r"`arguments` of .* is \['a'\]; write names and values"),
    ({"arguments": {True: 1}}, "`arguments` of .* is {True: 1}; write names and values, .* quotes around"),
    ({"arguments": {"output-dir": "a"}}, "`arguments` has 'output-dir', which the comparison itself sets"),
    ({"pruned": {"pruning_rate": 8}}, "`pruned` has 'pruning_rate', which the comparison itself sets"),
    *[
        ({"methods": {name: {"token_reducer": "tome"}}}, f"`methods.{name}` has 'token_reducer'; give the variant a n")
        for name in ("cropr", "unpruned", "smaller image")
    ],
    ({"methods": {"mine": {"token_reducer": "tom"}}}, "Unknown token reducer 'tom'; did you mean 'tome'"),
    ({"methods": {"mine": {"token_reducer": ["tome"]}}}, r"`methods.mine` has token_reducer \['tome'\]; give a name"),
    ({"methods": {"mine": {"seed": 1}}}, "Unknown token reducer 'mine'"),
    ({"methods": {"a b": {"token_reducer": "tome"}, "a-b": {"token_reducer": "cropr"}}}, "methods .* differ in signs"),
    *[
        ({"evaluation": {name: "a"}}, f"`evaluation` has '{name}', which the comparison itself sets")
        for name in ("picture", "exported", "token_reducer", "pruning_schedule")
    ],
    ({"seeds": 3}, r"`seeds` of .* is 3; write a list"),
    *[
        ({"seeds": [seed]}, rf"`seeds` of .* is \[{seed!r}\]; write a list of whole numbers")
        for seed in ("a", 0.5, True)
    ],
    ({"seeds": [[0]]}, "`seeds` of .* is .*; write a list of whole numbers"),
    ({"seeds": [-1]}, "`seeds` has -1; give whole numbers, 0 or more"),
    ({"seeds": [0, 0]}, r"`seeds` is \[0, 0\]"),
    ({"seeds": []}, r"`seeds` is \[\]"),
    ({"speed": 3}, "`speed` of .* is 3; write names and values"),
    ({"speed": {"batch_size": 1}}, "'batch_size', which is not a field of it; did you mean batch_sizes"),
    ({"speed": {"batch_sizes": 8}}, "`batch_sizes` of `speed` of .* is 8; write a list"),
    ({"speed": {"batch_sizes": [True]}}, "`batch_sizes` of `speed` of .* is .True.; write a list of whole numbers"),
    ({"speed": {"batch_sizes": [0]}}, "`speed.batch_sizes` has 0"),
    ({"speed": {"dtypes": []}}, r"`speed.dtypes` is \[\]; give one or more"),
    ({"speed": {"dtypes": ["float"]}}, "`speed.dtypes` has 'float'; choose among float32"),
    ({"speed": {"min_rounds": 1}}, "`min_rounds` 1"),
    ({"speed": {"min_rounds": "3"}}, "`min_rounds` of `speed` of .* is '3'; write a whole number"),
    ({"speed": {"max_rounds": 3.5}}, "`max_rounds` of `speed` of .* is 3.5; write a whole number"),
    ({"speed": {"tolerance": "a"}}, "`tolerance` of `speed` of .* is 'a'; write a number, such as 0.01"),
    ({"speed": {"device": 0}}, "`device` of `speed` of .* is 0; write text"),
    ({"arguments": {"since": datetime.date(2024, 1, 31)}}, "neither text, .* JSON serializable.; write it in quotes"),
]


@pytest.mark.parametrize(("changes", "message"), [*WRONG.values(), *full(*MORE_WRONG)])
def test_wrong_files(changes, message, write):
    with pytest.raises(ValueError, match=message):
        Comparison.from_file(write(**changes))


def test_a_wrong_file_is_refused_before_anything_is_made(write, tmp_path, capsys):
    assert main(["compare", write(seeds=[]), "--output_dir", str(tmp_path / "out")]) == 1
    assert "give one or more" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_is_null_or_a_whole_number_is_taken(write):
    methods = {"cropr": None, "tome": {"layer_decay": 1}}
    comparison = Comparison.from_file(write(methods=methods, seeds=None, speed={"tolerance": 0, "compiled": None}))
    assert comparison.methods == {"cropr": {}, "tome": {"layer_decay": 1}} and comparison.seeds == [0, 1, 2]
    assert comparison.speed == Speed(tolerance=0)


@pytest.mark.full
def test_the_files_of_the_examples():
    for file in (Path(__file__).resolve().parents[1] / "examples" / "comparisons").glob("*.yaml"):
        assert Comparison.from_file(file).methods


def test_a_file_that_is_no_comparison(tmp_path):
    with pytest.raises(ValueError, match=r"There is no file .*; write one, such as those in examples/comparisons"):
        Comparison.from_file(tmp_path / "nowhere.yaml")
    wrong = {"- a": "holds no comparison", "a: [": "not valid YAML", "train: \xe9.py": "not UTF-8 text .*; save it as"}
    for text, message in wrong.items():
        (tmp_path / "file.yaml").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=message):
            Comparison.from_file(tmp_path / "file.yaml")


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_a_script_that_is_not_there_is_missed_at_once(scripts, name, write, tmp_path):
    with pytest.raises(ValueError, match=r"There is no 'scripts/mine\.py'; `train` and `evaluate` name scripts as"):
        Runner(Comparison.from_file(write(**{name: "scripts/mine.py --fast"})), tmp_path / "out")()
    assert not scripts.calls


def test_a_metric_that_is_not_printed(scripts, write, tmp_path):
    with pytest.raises(ValueError, match=r"printed accuracy, kept for unpruned_seed_0, and not mean_iou"):
        Runner(Comparison.from_file(write(metrics=["mean_iou"])), tmp_path)()


def test_scripts_run_in_processes_and_say_why_they_fail(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint(sys.argv[1:])\nsys.exit(3 if '--fails=True' in sys.argv else 0)\n")
    settings = {"rates": [1, 2], "config": {"a": 1}, "nothing": None, "name": "b c"}
    printed = comparison.call(str(script), settings, tmp_path / "log")
    assert printed == "['--rates', '1', '2', '--config={\"a\": 1}', '--name=b c']\n"
    assert comparison.call(f"{sys.executable} {script}", {}, tmp_path / "log") == "[]\n"
    with pytest.raises(RuntimeError, match=r"exit code 3; all that it said is in .*log: \['--fails=True'\]"):
        comparison.call(str(script), {"fails": True}, tmp_path / "log")
    assert comparison.numbers_in('{"a": 1}\n{"accuracy": 0.5, "name": "b"}\n') == {"accuracy": 0.5}
    assert comparison.numbers_in("nothing") == comparison.numbers_in("") == {}


@pytest.mark.full
def test_with_the_scripts_of_the_examples(example, tmp_path, monkeypatch, capsys):
    root = Path(__file__).resolve().parents[1]
    content = yaml.safe_load((root / "examples" / "comparisons" / "digits_classification.yaml").read_text())
    content["arguments"] |= {"max_train_samples": 64, "max_eval_samples": 32, "use_cpu": True}
    content["arguments"]["model_name_or_path"] = str(root / content["arguments"]["model_name_or_path"])
    content["evaluation"]["max_eval_samples"] = 64
    content |= {"seeds": [0], "methods": ["tome"], "off_the_shelf": False, "speed": {**SPEED, "compiled": True}}
    content["budgets"] = dict([next(iter(content["budgets"].items()))])
    (tmp_path / "file.yaml").write_text(yaml.safe_dump(content))

    def run(command, **kwargs):
        """A script in this process, to save what it takes to start one."""
        if command[0] != sys.executable:
            return run_process(command, **kwargs)
        metrics = example(Path(command[1]).stem).main(command[2:])
        return subprocess.CompletedProcess(command, 0, stdout=json.dumps(metrics))

    run_process = subprocess.run
    monkeypatch.setattr(comparison.subprocess, "run", run)
    with torch._dynamo.config.patch(recompile_limit=2):  # fewer than there are models
        assert main(["compare", str(tmp_path / "file.yaml"), "--output_dir", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    runs = record["runs"]
    assert [run["method"] for run in runs] == ["unpruned", "tome", "smaller image"]
    assert all(0 <= run["metrics"]["accuracy"] <= 1 for run in runs)
    for run in runs:  # a file computes what its model does
        assert run["file"]["metrics"]["accuracy"] == pytest.approx(run["metrics"]["accuracy"], abs=0.02)
    assert {"unpruned, ONNX", "tome, 17 % of patches, compiled"} <= record["speed"][0]["results"].keys()
    assert str(tmp_path) not in json.dumps(record)
    assert "of the ONNX file" in capsys.readouterr().out
