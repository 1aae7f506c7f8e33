"""Every tool with every method: those of the paper, a foreign one, and one that the tests register themselves.

The last is a small relative of EViT: at two blocks the patches that the CLS token attends to most stay, its loss is a
named one, and `before_block` gives each token a key bias.
"""

import json
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments, pipeline

from cropr_hf import (
    TOKEN_REDUCERS,
    CroprViTConfig,
    CroprViTForImageClassification,
    CroprViTForSemanticSegmentation,
    CroprViTModel,
    ReducerConfig,
    TokenReducer,
    curriculum_schedule,
    evaluate_schedules,
    find_schedule,
    register_token_reducer,
)
from cropr_hf.cli import main
from cropr_hf.publishing.export import export_model
from cropr_hf.publishing.hub import save_for_hub
from cropr_hf.publishing.model_card import read_record
from cropr_hf.speed.benchmark import BenchmarkArguments, pruning_candidates, run, sweep
from cropr_hf.speed.cost import multiply_adds, unpruned_config
from cropr_hf.speed.plots import plot_benchmark
from cropr_hf.speed.tables import format_sweep, format_table
from cropr_hf.token_state import KEY_BIAS, select_tokens
from cropr_hf.training import CroprTrainer
from cropr_hf.visualization import plot_pruning
from tests.common import METHODS as OWN_TESTS
from tests.common import (
    NUM_LABELS,
    TINY,
    enable_activation_checkpointing,
    full,
    make_images,
    make_model,
    tiny_config,
)


@strict
@dataclass
class AttentiveConfig(ReducerConfig):
    bias: float = 0.0


class AttentiveReducer(TokenReducer):
    """See the beginning of this file."""

    name = "attentive"
    label = title = "Attentive"
    config_class = AttentiveConfig
    acts_inside = True
    needs_cls = True

    def __init__(self, config, block):
        super().__init__(config, block)
        self.bias = self.settings(config).bias
        self.gate = torch.nn.Parameter(torch.zeros(()))

    @classmethod
    def blocks(cls, config):
        return [2, 4]

    @classmethod
    def uses_key_bias(cls, config):
        return True

    def before_block(self, state):
        bias = self.bias + torch.zeros_like(state.hidden_states[..., 0])
        return replace(state, columns={**state.columns, KEY_BIAS: bias})

    def after_attention(self, state, num_keep, facts):
        if self.training:
            state = replace(state, losses={**state.losses, f"gate_{self.block}": (self.gate - 1).square()})
        scores = facts.class_attention().mean(dim=1)
        return state.prune(*select_tokens(scores, num_keep, state.num_prefix_tokens), self.block)


METHODS = ["cropr", "random", "tome", "attentive", *full(*OWN_TESTS)]
EXPORTED = ["cropr", "tome", "attentive", *OWN_TESTS]  # random pruning is no program: it draws


@pytest.fixture(scope="module", autouse=True)
def _registered():
    register_token_reducer(AttentiveReducer)
    yield
    del TOKEN_REDUCERS["attentive"]


def config_of(method, **overrides):
    return tiny_config(token_reducer=method, **overrides)


def classifier(method, **overrides):
    return make_model(CroprViTForImageClassification, config_of(method, **overrides))


def arguments(method, **kwargs):
    config = json.dumps({**TINY, "num_hidden_layers": 5})
    return BenchmarkArguments(
        size="tiny", token_reducer=method, config=config, batch_size=1, min_rounds=3, max_rounds=3, **kwargs
    )


@pytest.mark.parametrize("method", ["tome", "attentive", *full("cropr", "random", *OWN_TESTS)])
def test_the_benchmark_times_the_method_and_names_it(method, tmp_path):
    classes = {name: type(model) for name, model in pruning_candidates(config_of(method)).items()}
    assert set(classes) == {"unpruned", method, "random"}
    reducer = pruning_candidates(config_of(method))[method].cropr_vit.token_reducers["2"]
    assert type(reducer) is TOKEN_REDUCERS[method]
    record = run(arguments(method))
    assert record["token_reducer"] == method
    assert set(record["results"]) == {"unpruned", method, "random"}
    assert record["patches_kept"] == config_of(method).kept_patches()
    assert (record["share_of_random"] is None) == (method == "random")
    table = format_table(record)
    assert f"of which {TOKEN_REDUCERS[method].label} reaches" in table
    assert f"| {method} | " in table
    plot_benchmark([record]).savefig(tmp_path / "bars.png")


def test_a_sweep_compares_methods():
    records = sweep(arguments(None), {"token_reducer": ["cropr", "tome"]})
    lines = format_sweep(records, ["token_reducer"]).splitlines()
    assert lines[2].startswith("| cropr | ") and lines[3].startswith("| tome | ")
    assert "pruned images/s" in lines[0]


def test_a_published_folder_is_timed_with_its_own_method(tmp_path, capsys):
    classifier("tome", pruning_rate=3).save_pretrained(tmp_path)
    command = ["benchmark", "--model_name_or_path", str(tmp_path), "--batch_size", "1"]
    assert main([*command, "--min_rounds", "3", "--max_rounds", "3", "--update_record"]) == 0
    assert "of which ToMe reaches" in capsys.readouterr().out
    record = read_record(tmp_path)
    assert set(record["throughput"]["results"]) == {"unpruned", "tome", "random"}
    assert record["throughput"]["patches_kept"] == [13, 10, 7, 4, 2]
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert (
        "merges 88% of the image patches on the way by [ToMe](https://arxiv.org/abs/2210.09461), training-free" in card
    )
    assert "bolya2023tome" in card and "bergner2025tokencropr" not in card
    assert "token-merging" in card and "Later blocks see merged patches as one" in card


@pytest.mark.parametrize("method", METHODS)
def test_cards_name_the_method(method, tmp_path):
    classifier(method).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert TOKEN_REDUCERS[method].title in card
    assert ("bergner2025tokencropr" in card) == (method == "cropr")
    assert ("training-free" in card) == (method not in ("cropr", "asvit", "dynamicvit", "ltp", "stp", "svit"))
    assert ("`use_auxiliary_heads=True` makes it trainable again" in card) == (method == "cropr")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fusion", [False, *full(True)])
def test_folders_give_the_same_outputs_and_keep_the_settings(method, fusion, tmp_path):
    model = classifier(method, last_layer_fusion=fusion)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert type(loaded.cropr_vit.token_reducers["2"]) is TOKEN_REDUCERS[method]
    assert loaded.config.last_layer_fusion == fusion
    outputs = []
    for candidate in (model, loaded):
        torch.manual_seed(0)
        outputs.append(candidate(make_images()).logits)
    assert torch.equal(*outputs)
    package = {
        **dict.fromkeys(
            ("tome", "tocom", "evit", "ailurus", "asvit", "dynamicvit", "idlevit", "itpn", "ltp", "stp", "svit"),
            "cropr_hf",
        ),
        "attentive": AttentiveReducer.__module__.partition(".")[0],
    }.get(method)
    assert loaded.config.reducer_package == package
    other = CroprViTForImageClassification.from_pretrained(tmp_path, token_reducer=None)
    assert other.config.reducer_package is None and other.config.pruning_rate is None


def test_settings_survive_and_do_not_pass_to_another_method(tmp_path):
    settings = {"proportional_attention": False}
    classifier("tome", reducer_config=settings).save_pretrained(tmp_path)
    loaded = CroprViTForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.reducer_config == settings
    assert not loaded.cropr_vit.token_reducers["1"].proportional_attention
    assert (
        CroprViTForImageClassification.from_pretrained(tmp_path, token_reducer="random").config.reducer_config is None
    )


@pytest.mark.parametrize("method", ["random", *full(*EXPORTED)])
def test_exported_programs_agree(method, tmp_path):
    model = classifier(method)
    if method == "random":
        with pytest.raises(ValueError, match="'random' draws random numbers"):
            export_model(model, tmp_path / "model.pt2")
    else:
        assert export_model(model, tmp_path / "model.pt2") < 1e-4


@pytest.mark.full
@pytest.mark.parametrize("method", EXPORTED)
def test_exported_onnx_files_agree(method, tmp_path):
    assert export_model(classifier(method), tmp_path / "model.onnx") < 1e-4


@pytest.mark.full
@pytest.mark.parametrize("method", METHODS)
def test_graphs_have_no_break(method):
    torch.compiler.reset()
    model = classifier(method)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    expected = model(make_images()).logits
    torch.manual_seed(0)
    found = compiled(make_images()).logits
    if method != "random":  # whose draws differ in a graph
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_pruning_maps_show_what_left_where(method):
    settings = {
        "evit": {"fuse_tokens": False},  # new tokens are no patches; see `test_evit.py`
        "asvit": {"eval_mode": "topk"},  # or images differ; see `test_asvit.py`
        "ltp": {"final_threshold": -2.0},  # thresholds prune below the schedule; see `test_ltp.py`
    }
    model = make_model(CroprViTModel, config_of(method, reducer_config=settings.get(method)))
    blocks = model(make_images(), output_pruning=True).pruned_after_block
    kept = model.config.kept_patches()
    for block, count in enumerate(kept[:-1], start=1):
        if not TOKEN_REDUCERS[method].idles or block == len(kept) - 1:  # what idles may come back
            assert (blocks > block).sum(dim=1).tolist() == [count] * 2
    images = [torch.zeros(32, 32, 3).byte().numpy()] * 2
    plot_pruning(images, blocks, 5, (4, 4))


@pytest.mark.parametrize("method", METHODS)
def test_schedules_are_found_set_and_compared(method):
    model = classifier(method)
    for progress in (0.0, 0.5, 1.0):
        model.set_pruning(curriculum_schedule(model.config, progress))
        assert model(make_images()).logits.shape == (2, NUM_LABELS)
    record = evaluate_schedules(
        model, [0, None], lambda model: 1.0, make_images(1), min_rounds=3, max_rounds=3, tolerance=1.0
    )
    assert [point["kept_patches"] for point in record["points"]] == [[16] * 5, model.config.kept_patches()]
    assert record["points"][0]["multiply_adds"] > record["points"][1]["multiply_adds"]


@pytest.mark.parametrize("method", ["random", "tome", "attentive"])
def test_methods_without_scores_cannot_be_calibrated(method):
    with pytest.raises(ValueError, match=f"'{method}' does not score tokens"):
        find_schedule(classifier(method), target_speedup=1.1, shape="free", calibration=[make_images()], min_rounds=3)


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_is_met_or_refused_with_the_reach_of_the_method(method):
    config = config_of(method, image_size=96, hidden_size=64, intermediate_size=256)
    with pytest.raises(ValueError, match=r"is out of reach|does not pay|is not needed"):
        find_schedule(make_model(CroprViTModel, config), target_speedup=1e6, min_rounds=3, max_rounds=3)


def linear_formula(config, entering, leaving):
    """Multiply-adds of linear layers by hand, from the tokens of attention and of the MLP."""
    size = config.hidden_size
    total = config.num_patches * size * config.num_channels * config.patch_size**2
    for attended, through_mlp in zip(entering, leaving):
        total += (attended + 1) * 4 * size**2 + (through_mlp + 1) * 2 * size * config.intermediate_size
    return total


@pytest.mark.parametrize("method", METHODS)
def test_multiply_adds_count_what_the_method_runs(method):
    config = config_of(method)
    kept = config.kept_patches()
    entering = [config.num_patches, *kept[:-1]]
    if config.last_layer_fusion:
        entering[-1] = config.num_patches
    leaving = [min(pair) for pair in zip(entering, kept)] if TOKEN_REDUCERS[method].acts_inside else entering
    if config.last_layer_fusion:
        leaving[-1] = config.num_patches
    linear = linear_formula(config, entering, leaving)
    if method == "idlevit":  # a query of the CLS token, folded
        linear += len(config.pruning_blocks) * 2 * config.hidden_size**2
    outputs = {"dynamicvit": 2, "stp": 1}.get(method)  # of predictors of D x D, D x D / 2, D / 2 x D / 4, D / 4 x that
    if outputs:
        size = config.hidden_size
        predictor = size**2 + size**2 // 2 + size**2 // 8 + outputs * size // 4
        linear += sum(entering[block - 1] for block in (1, 2, 3)) * predictor
    if method == "svit":  # gates of D x D / 4 and D / 4 x 2 on all patches
        size = config.hidden_size
        linear += len(config.pruning_blocks) * config.num_patches * (size**2 // 4 + size // 2)
    assert multiply_adds(config, attention=False) == linear
    products = sum(2 * (tokens + 1) ** 2 * config.hidden_size for tokens in entering)
    if method in ("tome", "tocom"):  # similarities of every second token with others, and the weighted mean in the end
        head_size = config.hidden_size // config.num_attention_heads
        lengths = [tokens + 1 for tokens in entering]
        products += sum(-(-length // 2) * (length // 2) * head_size for length in lengths)
        products += (kept[-1] + 1) * config.hidden_size
    acts = {"asvit": (2, 3, 4), "attentive": (2, 4), "evit": (2, 3, 4)}.get(method, ())
    for block in acts:  # attention of the CLS token, once more
        products += (entering[block - 1] + 1) * config.hidden_size
    if method == "idlevit":  # its product with every token
        products += len(config.pruning_blocks) * (config.num_patches + 1) * config.hidden_size
    if method == "itpn":  # similarities of every second token with the others
        lengths = [entering[block - 1] + 1 for block in config.pruning_blocks]
        products += sum(-(-length // 2) * (length // 2) * config.hidden_size for length in lengths)
    if method == "ltp":  # queries and keys once more, and a sum over queries for each head
        products += sum((tokens + 1) ** 2 * (config.hidden_size + config.num_attention_heads) for tokens in entering)
    if method == "ailurus":  # the mean of representatives in the end
        products += (kept[-1] + 1) * config.hidden_size
    if method == "evit":  # the sum of what leaves, one more than there are fewer
        products += sum((entering[block - 1] - kept[block - 1] + 1) * config.hidden_size for block in acts)
    assert multiply_adds(config) - multiply_adds(config, attention=False) == products
    assert multiply_adds(unpruned_config(config)) > multiply_adds(config)


def test_methods_that_learn_nothing_start_without_a_word(tiny_vit, log_records, tmp_path):
    """`from_vit` with ToMe gives a working, faster model at once."""
    model = CroprViTForImageClassification.from_vit(tiny_vit, token_reducer="tome", pruning_rate=8, num_labels=3)
    assert model.config.kept_patches() == [28, 20, 12, 6] and not model.config.use_auxiliary_heads
    model.train()
    model(torch.randn(2, 3, 48, 48), labels=torch.tensor([0, 1])).loss.backward()
    model.eval().save_pretrained(tmp_path)
    from transformers import AutoImageProcessor, logging

    AutoImageProcessor.from_pretrained(tiny_vit).save_pretrained(tmp_path)
    classify = pipeline("image-classification", model=str(tmp_path), trust_remote_code=False)
    assert len(classify("docs/digit.png")) == 3
    warnings = [record.getMessage() for record in log_records if record.levelno >= logging.WARNING]
    assert not [text for text in warnings if "scorer" in text or "router" in text]


def test_the_command_line_says_training_free(tiny_vit, tmp_path, capsys):
    config = json.dumps({"token_reducer": "tome", "pruning_rate": 8})
    assert main(["convert", tiny_vit, str(tmp_path / "tome"), "--config", config]) == 0
    assert "ToMe is training-free: it can be used at once" in capsys.readouterr().out


def test_named_losses_join_the_loss_and_the_log(tmp_path):
    model = classifier("attentive").train()
    labels = torch.tensor([0, 1])
    outputs = model(make_images(), labels=labels)
    assert set(outputs.method_losses) == {"gate_2", "gate_4"}
    torch.testing.assert_close(outputs.loss, outputs.main_loss + sum(outputs.method_losses.values()))
    assert all(not loss.requires_grad for loss in outputs.method_losses.values())
    outputs.loss.backward()
    gate = model.cropr_vit.token_reducers["2"].gate
    torch.testing.assert_close(gate.grad, 2 * (gate.detach() - 1))
    assert model.eval()(make_images(), labels=labels).method_losses is None
    data = [{"pixel_values": image, "labels": 1} for image in make_images(4)]
    settings = TrainingArguments(str(tmp_path), max_steps=2, logging_steps=1, report_to="none", use_cpu=True)
    trainer = CroprTrainer(model, settings, train_dataset=data)
    trainer.train()
    assert {"main_loss", "gate_2", "gate_4"} <= trainer.state.log_history[0].keys()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_checkpoints_change_no_gradient(method, use_reentrant):
    """Also none of a method's own losses, and none of what it learns inside of a block."""
    reducer, gradients = TOKEN_REDUCERS[method], []
    for checkpoints in (False, True):
        model = classifier(method).double().train()
        if checkpoints:
            enable_activation_checkpointing(model, use_reentrant=use_reentrant)
        torch.manual_seed(1)
        if checkpoints and use_reentrant and (reducer.acts_inside or reducer.idles or reducer.reads_attention):
            with pytest.raises(ValueError, match="`use_reentrant` is True"):
                model(make_images().double())
            return
        model(make_images().double(), labels=torch.tensor([0, 1])).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    without, with_checkpoints = gradients
    assert without.keys() == with_checkpoints.keys()
    for name, gradient in without.items():
        torch.testing.assert_close(with_checkpoints[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_the_plain_trainer_trains_through_merged_tokens(tmp_path):
    data = [{"pixel_values": image, "labels": index % 2} for index, image in enumerate(make_images(8))]
    settings = TrainingArguments(str(tmp_path), max_steps=30, learning_rate=1e-2, report_to="none", use_cpu=True)
    trainer = Trainer(classifier("tome"), settings, train_dataset=data)
    trainer.train()
    losses = [trainer.compute_loss(trainer.model.eval(), trainer.data_collator(data)).item()]
    assert losses[0] < 0.3  # log(5) = 1.6 by chance


def test_class_attention_is_that_of_eager_attention():
    model = make_model(CroprViTModel, config_of("attentive", rope_theta=100.0))
    model.set_attn_implementation("eager")
    seen = []
    reducer = model.token_reducers["2"]
    own = reducer.after_attention
    reducer.after_attention = lambda state, num_keep, facts: seen.append(facts) or own(state, num_keep, facts)
    outputs = model(make_images(), output_attentions=True)
    torch.testing.assert_close(seen[0].class_attention(), outputs.attentions[1][:, :, 0], rtol=0, atol=1e-5)


def test_a_method_that_needs_a_cls_token_says_so():
    config = config_of("attentive", use_cls_token=False, pooling="patch_mean")
    with pytest.raises(ValueError, match="'attentive' needs a CLS token, but `use_cls_token` is False"):
        CroprViTModel(config)


def test_dense_tasks_restore_what_any_method_took():
    for method in ("cropr", "random", "tome", "attentive"):
        config = config_of(method, last_layer_fusion=True, num_queries=None)
        if method == "attentive":
            config.pruning_rate = 3
        logits = make_model(CroprViTForSemanticSegmentation, config)(make_images()).logits
        assert logits.shape == (2, NUM_LABELS, 4, 4)


# Code on the Hub

FRESH = """
import sys, torch
sys.modules["cropr_hf"] = None  # as if it were not installed
from transformers import AutoConfig, AutoModelForImageClassification
folder = sys.argv[1]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
model.set_pruning(1)
try:
    type(model).from_vit(model)
except ImportError as error:
    assert "use cropr_hf.CroprViTForImageClassification.from_vit" in str(error)
else:
    raise AssertionError
"""


def in_a_fresh_process(*args, **kwargs):
    command = [sys.executable, "-c", FRESH, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


@pytest.mark.full
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("tome", {"rate_inflection": -0.5}),
        ("tocom", {"trained_rate": 1}),
        ("asvit", {"eval_mode": "topk"}),
        ("dynamicvit", {"blocks": [1, 3]}),
        ("stp", {"blocks": [2]}),
        ("ltp", {"stage": "hard"}),
    ],
)
def test_the_file_of_a_foreign_method_travels(method, settings, tmp_path):
    model = classifier(method, reducer_config=settings)
    save_for_hub(model, tmp_path / "folder")
    assert (tmp_path / "folder" / f"reducer_{method}.py").exists()
    torch.save(make_images(), tmp_path / "images.pt")
    result = in_a_fresh_process(tmp_path / "folder", tmp_path / "images.pt", tmp_path / "logits.pt", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    expected = model(make_images()).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=0, atol=1e-4)


@pytest.mark.full
def test_a_folder_whose_method_is_not_there_names_the_package(tmp_path):
    save_for_hub(classifier("tome"), tmp_path / "folder")
    (tmp_path / "folder" / "reducer_tome.py").unlink()
    methods = tmp_path / "folder" / "reducers.py"
    methods.write_text("".join(line for line in methods.open() if "tome" not in line))
    torch.save(make_images(), tmp_path / "images.pt")
    result = in_a_fresh_process(tmp_path / "folder", tmp_path / "images.pt", tmp_path / "logits.pt", cwd=tmp_path)
    assert "'tome' is not installed; it is part of the package 'cropr_hf'" in result.stderr


def test_code_of_another_package_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="'attentive' is not part of the code that is saved"):
        save_for_hub(classifier("attentive"), tmp_path)
    classifier("attentive").save_pretrained(tmp_path)  # which says so, and brings none
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert not [*tmp_path.glob("*.py")]


def test_a_configuration_of_an_unknown_method_can_be_read_but_not_counted():
    config = CroprViTConfig(**TINY, token_reducer="tomme")
    assert config.last_layer_fusion is None
    with pytest.raises(ValueError, match="Unknown token reducer 'tomme'; did you mean 'tome'"):
        config.kept_patches()
    with pytest.raises(ValueError, match="Unknown token reducer 'tomme'; did you mean 'tome'"):
        CroprViTModel(config)
