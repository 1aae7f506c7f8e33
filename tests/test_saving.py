import hashlib
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import safetensors.torch
import torch
from accelerate import cpu_offload
from huggingface_hub import HfApi
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from cropr_hf import CroprViTBackbone, CroprViTConfig, CroprViTForImageClassification, CroprViTModel, saving
from cropr_hf.publishing.hub import code_files
from cropr_hf.saving import CARD_MARK
from tests.common import (
    CONFIGS,
    IMAGE_SIZE,
    NUM_LABELS,
    TASKS,
    assert_close_relative,
    combinations,
    full,
    make_images,
    make_model,
    tiny_config,
    with_heads,
)
from tests.test_import_rules import TRAVELS


# Files of a stripped save.
PUBLISHED = {"README.md", "config.json", "model.safetensors", "record.json", "training_config"}
PUBLISHED |= {file.name for file in code_files()}
TRAINING_PARTS = ("queries", "aggregator", "auxiliary_head", "projection", "scorer.norm")

SCORERS = {
    "plain": {},
    "queries": {"num_queries": 16},
    "heads": {"scorer_num_heads": 4, "num_queries": 3},
    "query_projection": {"scorer_query_projection": True},
    "key_projection": {"scorer_key_projection": True, "num_queries": 3},
    "pre_norm": {"scorer_pre_norm": True},
    "value_projection_no_mlp": {"aggregator_value_projection": True, "aggregator_mlp_ratio": None},
    "everything": CONFIGS["all_scorer_options"],
}
some_scorers = ["plain", "everything", *full(*(name for name in SCORERS if name not in ("plain", "everything")))]


def trainable(**overrides):
    return make_model(CroprViTForImageClassification, tiny_config(use_auxiliary_heads=True, **overrides))


@torch.no_grad()
def predictions(model):
    model.eval()
    outputs = model(make_images(), output_pruning=True)
    return outputs.logits, outputs.pruned_after_block


def assert_same_model(first, second):
    logits, pruned_after_block = predictions(first)
    assert_close_relative(predictions(second)[0], logits)  # a kernel may round otherwise elsewhere in memory
    assert torch.equal(predictions(second)[1], pruned_after_block)


def stored_config(folder):
    return json.loads((Path(folder) / "config.json").read_text())


def stored_weights(folder):
    return {key: tensor for file in Path(folder).glob("*.safetensors") for key, tensor in load_file(file).items()}


# Stripping


@pytest.mark.parametrize(("task", "name"), combinations([name for name in CONFIGS if with_heads(name)]))
def test_saving_strips_the_file_and_leaves_the_model_alone(task, name, tmp_path):
    model = TASKS[task].build(name, use_auxiliary_heads=True)
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    saved = stored_weights(tmp_path)
    reducers = {key: tensor for key, tensor in saved.items() if "token_reducers" in key}
    assert len(reducers) == len(model.config.pruning_blocks)
    assert all(key.endswith("router.scorer.folded_query") and t.shape == (32,) for key, t in reducers.items())
    assert not [key for key in saved if any(part in key for part in TRAINING_PARTS) and "token_reducers" in key]
    assert stored_config(tmp_path).get("use_auxiliary_heads", False) is False

    assert model.config.use_auxiliary_heads is True
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
    for key, tensor in saved.items():
        assert key in reducers or torch.equal(tensor, weights[key])


def test_the_live_config_changes_in_nothing(tmp_path):
    model = trainable()
    model.save_pretrained(tmp_path / "first")  # Transformers notes dtype and architecture at the first save
    before = model.config.to_dict()
    model.save_pretrained(tmp_path / "second")
    assert model.config.to_dict() == before


def test_the_state_dict_argument_is_what_is_saved(tmp_path):
    model = trainable()
    gathered = {key: tensor + 1 for key, tensor in model.state_dict().items()}
    before = {key: tensor.clone() for key, tensor in gathered.items()}
    model.save_pretrained(tmp_path, state_dict=gathered)
    assert gathered.keys() == before.keys() and all(torch.equal(gathered[key], before[key]) for key in before)
    saved = stored_weights(tmp_path)
    assert torch.equal(saved["classifier.bias"], model.classifier.bias + 1)
    queries = gathered["cropr_vit.token_reducers.1.router.scorer.queries"]
    assert torch.equal(saved["cropr_vit.token_reducers.1.router.scorer.folded_query"], queries.sum(dim=0))


@pytest.mark.parametrize("folder", ["checkpoint-12", "checkpoint-12/", "run-3/checkpoint-400"])
def test_a_trainer_checkpoint_is_complete(folder, tmp_path):
    model = trainable()
    model.save_pretrained(f"{tmp_path}/{folder}")
    assert stored_weights(tmp_path / folder).keys() == model.state_dict().keys()
    assert stored_config(tmp_path / folder)["use_auxiliary_heads"] is True
    assert not (tmp_path / folder / "training_config").exists()


@pytest.mark.parametrize(("link", "folder"), [("latest", "checkpoint-12"), ("checkpoint-12", "large_disk")])
def test_a_checkpoint_behind_a_link_is_complete(link, folder, tmp_path):
    (tmp_path / folder).mkdir()
    (tmp_path / link).symlink_to(tmp_path / folder)
    trainable().save_pretrained(tmp_path / link)
    assert any("auxiliary_head" in key for key in stored_weights(tmp_path / folder))


@pytest.mark.parametrize("folder", ["checkpoint", "checkpoint-best", "my-checkpoint-12", "checkpoint-12-stripped"])
def test_other_folders_are_stripped(folder, tmp_path):
    trainable().save_pretrained(tmp_path / folder)
    assert not [key for key in stored_weights(tmp_path / folder) if "auxiliary_head" in key]


def test_strip_auxiliary_heads_decides_in_both_directions(tmp_path):
    model = trainable()
    model.save_pretrained(tmp_path / "complete", strip_auxiliary_heads=False)
    assert stored_weights(tmp_path / "complete").keys() == model.state_dict().keys()
    model.save_pretrained(tmp_path / "checkpoint-7", strip_auxiliary_heads=True)
    assert not [key for key in stored_weights(tmp_path / "checkpoint-7") if "auxiliary_head" in key]


def test_training_config_has_heads_and_nothing_else_differs(tmp_path):
    trainable(num_queries=3).save_pretrained(tmp_path)
    published, training = stored_config(tmp_path), stored_config(tmp_path / "training_config")
    assert training.pop("use_auxiliary_heads") is True
    published.pop("use_auxiliary_heads", None)
    del published["weights_id"]
    assert training == published


def test_a_model_without_heads_has_no_training_config(tmp_path):
    make_model(CroprViTModel, tiny_config("random")).save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(PUBLISHED - {"training_config"})


def test_training_config_makes_unchanged_scripts_train(tmp_path):
    model = trainable(**SCORERS["everything"])
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path / "training_config")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, config=config)
    assert loaded.config.use_auxiliary_heads is True
    assert_same_model(model, loaded)
    loaded.train()
    loaded(make_images(), labels=torch.tensor([0, 1])).loss.backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())
    by_folder = CroprViTForImageClassification.from_pretrained(tmp_path, config=tmp_path / "training_config")
    assert by_folder.config.use_auxiliary_heads is True


def test_a_given_config_is_left_alone(tmp_path):
    trainable().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path / "training_config")
    before = config.to_dict()
    CroprViTForImageClassification.from_pretrained(tmp_path, config=config)
    assert config.to_dict() == before


@pytest.mark.parametrize("config", [ViTConfig(), {"hidden_size": 32}])
def test_a_config_of_another_kind_is_an_error(config, tmp_path):
    trainable().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"`config` is a {type(config).__name__}; give a `CroprViTConfig`"):
        CroprViTForImageClassification.from_pretrained(tmp_path, config=config)


@torch.no_grad()
def test_offloaded_weights_come_when_they_are_needed(tmp_path):
    model = trainable()
    expected = model(make_images()).logits
    model.save_pretrained(tmp_path)
    places = {f"cropr_vit.{name}": "cpu" for name, _ in model.cropr_vit.named_children()} | {"classifier": "cpu"}
    places["cropr_vit.token_reducers"] = "disk"
    loaded = CroprViTForImageClassification.from_pretrained(
        tmp_path, device_map=places, offload_folder=tmp_path / "offload"
    )
    assert_close_relative(loaded(make_images()).logits, expected)
    assert_close_relative(cpu_offload(model, "cpu")(make_images()).logits, expected)


# Loading


@pytest.mark.parametrize("scorer", some_scorers)
def test_stripped_and_complete_checkpoints_load_either_way(scorer, tmp_path):
    model = trainable(**SCORERS[scorer])
    model.save_pretrained(tmp_path / "stripped")
    model.save_pretrained(tmp_path / "complete", strip_auxiliary_heads=False)
    load = CroprViTForImageClassification.from_pretrained

    stripped = load(tmp_path / "stripped")
    assert stripped.config.use_auxiliary_heads is False
    assert_same_model(model, stripped)
    assert not any(p.requires_grad for key, p in stripped.named_parameters() if "token_reducers" in key)

    complete = load(tmp_path / "complete")
    assert complete.config.use_auxiliary_heads is True
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in complete.state_dict().items())

    complete_to_stripped = load(tmp_path / "complete", use_auxiliary_heads=False)
    assert complete_to_stripped.config.use_auxiliary_heads is False
    assert complete_to_stripped.state_dict().keys() == stripped.state_dict().keys()
    assert_same_model(model, complete_to_stripped)

    trainable_again = load(tmp_path / "stripped", use_auxiliary_heads=True)
    assert trainable_again.config.use_auxiliary_heads is True
    assert trainable_again.state_dict().keys() == model.state_dict().keys()
    assert_same_model(model, trainable_again)
    assert all(tensor.isfinite().all() for tensor in trainable_again.state_dict().values())


def test_loading_logs_nothing_in_right_use(tmp_path, log_records):
    trainable().save_pretrained(tmp_path)
    CroprViTForImageClassification.from_pretrained(tmp_path)
    CroprViTForImageClassification.from_pretrained(tmp_path, use_auxiliary_heads=True)
    assert [record.getMessage() for record in log_records if record.levelname != "INFO"] == []


def test_auto_classes_load_a_saved_folder(tmp_path):
    model = trainable()
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is CroprViTConfig
    assert_same_model(model, AutoModelForImageClassification.from_pretrained(tmp_path))
    with_heads_again = AutoModelForImageClassification.from_pretrained(tmp_path, use_auxiliary_heads=True)
    assert with_heads_again.config.use_auxiliary_heads is True
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is CroprViTModel
    images = make_images()
    assert_close_relative(base(images).pooler_output, model.eval().cropr_vit(images).pooler_output)
    backbone = AutoBackbone.from_config(AutoConfig.from_pretrained(tmp_path, out_features=["stage2"]))
    assert type(backbone) is CroprViTBackbone
    assert len(backbone(images).feature_maps) == 1


def test_classification_model_from_a_base_checkpoint_and_backbone_from_a_classifier(tmp_path):
    base = make_model(CroprViTModel, tiny_config())
    base.save_pretrained(tmp_path / "base")
    classifier, info = CroprViTForImageClassification.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert sorted(info["missing_keys"]) == ["classifier.bias", "classifier.weight"]
    images = make_images()
    assert_close_relative(classifier.cropr_vit(images).pooler_output, base(images).pooler_output)
    classifier.save_pretrained(tmp_path / "classifier")
    backbone = CroprViTBackbone.from_pretrained(tmp_path / "classifier", out_indices=[1, 5])
    assert all(torch.equal(tensor, base.state_dict()[key]) for key, tensor in backbone.cropr_vit.state_dict().items())
    assert len(backbone(images).feature_maps) == 2


def test_new_number_of_labels(tmp_path):
    model = trainable()
    model.save_pretrained(tmp_path / "stripped")
    model.save_pretrained(tmp_path / "complete", strip_auxiliary_heads=False)
    for folder in ("stripped", "complete"):
        loaded = CroprViTForImageClassification.from_pretrained(
            tmp_path / folder, num_labels=3, ignore_mismatched_sizes=True, use_auxiliary_heads=True
        )
        assert loaded.classifier.weight.shape == (3, 32)
        outputs = loaded.train()(make_images(), labels=torch.tensor([0, 2]))
        assert outputs.auxiliary_losses.shape == (3,) and outputs.loss.isfinite()
        assert torch.equal(predictions(loaded)[1], predictions(model)[1])
    message = r"classifier.bias of the shape \(5,\), the configuration says \(3,\); .*`ignore_mismatched_sizes=True`"
    for kind in (ValueError, RuntimeError):  # ours, and that of Transformers
        with pytest.raises(kind, match=message):
            CroprViTForImageClassification.from_pretrained(tmp_path / "stripped", num_labels=3)


def test_loading_in_bfloat16(tmp_path):
    model = trainable(num_queries=3)
    model.save_pretrained(tmp_path)
    for heads in (False, True):
        loaded = CroprViTForImageClassification.from_pretrained(
            tmp_path, dtype=torch.bfloat16, use_auxiliary_heads=heads
        )
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
        assert loaded(make_images()).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["unpruned", "random"])
def test_another_reducer_on_trained_weights(name, tmp_path):
    model = trainable()
    model.save_pretrained(tmp_path / "stripped")
    model.save_pretrained(tmp_path / "complete", strip_auxiliary_heads=False)
    overrides = {"token_reducer": CONFIGS[name]["token_reducer"]}
    for folder in ("stripped", "complete"):
        loaded = CroprViTForImageClassification.from_pretrained(tmp_path / folder, **overrides)
        assert loaded.config.use_auxiliary_heads is False
        assert not [key for key in loaded.state_dict() if "token_reducers" in key]
        assert torch.equal(loaded.classifier.weight, model.classifier.weight)


def test_an_unpruned_checkpoint_becomes_prunable_only_for_training(tmp_path):
    make_model(CroprViTForImageClassification, tiny_config("unpruned")).save_pretrained(tmp_path)
    load = CroprViTForImageClassification.from_pretrained
    with pytest.raises(ValueError, match=r"New token reducers need `use_auxiliary_heads=True`"):
        load(tmp_path, token_reducer="cropr", pruning_rate=2)
    model = load(tmp_path, token_reducer="cropr", pruning_rate=2, use_auxiliary_heads=True)
    queries = model.cropr_vit.token_reducers["1"].router.scorer.queries
    assert queries.isfinite().all() and queries.abs().sum() > 0
    assert load(tmp_path, token_reducer="random", pruning_rate=2).config.token_reducer == "random"


def test_rotary_positions_survive_loading(tmp_path):
    model = make_model(CroprViTModel, tiny_config("rope_registers"))
    model.save_pretrained(tmp_path)
    loaded = CroprViTModel.from_pretrained(tmp_path)
    assert_close_relative(loaded(make_images()).last_hidden_state, model(make_images()).last_hidden_state)


def test_trainer_like_resume_is_strict_and_exact(tmp_path):
    model = trainable(**SCORERS["everything"])
    model.save_pretrained(tmp_path / "checkpoint-3")
    fresh = make_model(CroprViTForImageClassification, model.config, seed=9)
    result = fresh.load_state_dict(load_file(tmp_path / "checkpoint-3" / "model.safetensors"), strict=True)
    assert result.missing_keys == [] and result.unexpected_keys == []
    inputs = {"pixel_values": make_images(), "labels": torch.tensor([0, 1])}
    assert torch.equal(model.train()(**inputs).loss, fresh.train()(**inputs).loss)


# In memory


@pytest.mark.parametrize("scorer", some_scorers)
def test_heads_come_and_go_in_memory(scorer):
    model, original = trainable(**SCORERS[scorer]), trainable(**SCORERS[scorer])
    model.remove_auxiliary_heads()
    assert model.config.use_auxiliary_heads is False
    assert not [key for key in model.state_dict() if "aggregator" in key or "auxiliary_head" in key]
    assert_same_model(original, model)
    model.add_auxiliary_heads()
    assert model.config.use_auxiliary_heads is True
    assert model.state_dict().keys() == original.state_dict().keys()
    assert_same_model(original, model)
    model.train()(make_images(), labels=torch.tensor([0, 1])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_adding_heads_twice_keeps_the_trained_ones():
    model = trainable()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.add_auxiliary_heads()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["random", "unpruned"])
def test_adding_heads_without_a_reducer_that_has_them_is_refused(name):
    model = make_model(CroprViTForImageClassification, tiny_config(name))
    with pytest.raises(ValueError, match=r"has no auxiliary heads to add; 'cropr' has"):
        model.add_auxiliary_heads()
    assert model.config.use_auxiliary_heads is False


# Pipelines


@pytest.fixture
def published(tmp_path):
    model = trainable()
    model.config.id2label = {index: f"class {index}" for index in range(NUM_LABELS)}
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(tmp_path)
    return tmp_path, model


def test_image_classification_pipeline(published):
    folder, model = published
    image = Image.new("RGB", (50, 40), (200, 30, 90))
    results = pipeline("image-classification", model=str(folder), device="cpu")(image)
    pixels = ViTImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    expected = model.eval()(pixels).logits[0].softmax(-1)
    assert {result["label"] for result in results} == {f"class {index}" for index in range(NUM_LABELS)}
    for result in results:
        assert result["score"] == pytest.approx(expected[int(result["label"][-1])].item(), abs=1e-4)


def test_feature_extraction_pipeline(published):
    folder, _ = published
    extract = pipeline("image-feature-extraction", model=str(folder), device="cpu")
    features = extract(Image.new("RGB", (50, 40)))
    assert torch.tensor(features).shape == (1, 17, 32)
    assert torch.tensor(extract(Image.new("RGB", (50, 40)), pool=True)).shape == (1, 32)


# Fresh processes


def run_python(code, tmp_path, *arguments):
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return result


@pytest.mark.full
def test_a_fresh_process_with_the_package_gives_the_trained_logits(tmp_path):
    model = trainable(**SCORERS["everything"])
    model.save_pretrained(tmp_path / "model")
    safetensors.torch.save_file({"images": make_images()}, tmp_path / "images.safetensors")
    run_python(
        """
        import sys
        import cropr_hf
        from safetensors.torch import load_file, save_file
        from transformers import AutoModelForImageClassification
        model = AutoModelForImageClassification.from_pretrained(sys.argv[1])
        assert type(model).__module__.startswith("cropr_hf.")
        save_file({"logits": model(load_file("images.safetensors")["images"]).logits}, "logits.safetensors")
        """,
        tmp_path,
        tmp_path / "model",
    )
    logits = load_file(tmp_path / "logits.safetensors")["logits"]
    assert_close_relative(logits, predictions(model)[0])


@pytest.fixture
def registered_for_remote_code(monkeypatch):
    monkeypatch.setattr(CroprViTConfig, "_auto_class", None)
    monkeypatch.setattr(CroprViTForImageClassification, "_auto_class", None)
    CroprViTConfig.register_for_auto_class()
    CroprViTForImageClassification.register_for_auto_class("AutoModelForImageClassification")


@pytest.mark.full
def test_remote_code_without_the_package_predicts_trains_and_saves(registered_for_remote_code, tmp_path):
    model = trainable(**SCORERS["everything"])
    model.save_pretrained(tmp_path / "model", with_code=False)  # Transformers itself brings it
    # What image classification needs of what travels.
    needed = {f"{name}.py" for name in TRAVELS if not re.search("detection|segmentation|processing", name)}
    assert {file.name for file in (tmp_path / "model").glob("*.py")} == needed
    safetensors.torch.save_file({"images": make_images()}, tmp_path / "images.safetensors")
    run_python(
        """
        import sys

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "cropr_hf":
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, Blocker())
        import torch
        from safetensors.torch import load_file, save_file
        from transformers import AutoConfig, AutoModelForImageClassification

        path = sys.argv[1]
        images = load_file("images.safetensors")["images"]
        load = AutoModelForImageClassification.from_pretrained
        model = load(path, trust_remote_code=True)
        results = {"logits": model(images).logits}

        model.save_pretrained("again")
        results["saved_again"] = load("again", trust_remote_code=True)(images).logits

        config = AutoConfig.from_pretrained(path + "/training_config", trust_remote_code=True)
        trainable = load(path, config=config, trust_remote_code=True)
        results["trainable"] = trainable(images).logits
        loss = trainable.train()(images, labels=torch.tensor([0, 1])).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in trainable.parameters())
        save_file(results, "results.safetensors")

        try:
            type(model).from_vit("somewhere")
        except ImportError as error:
            assert "pip install cropr_hf" in str(error), error
        else:
            raise AssertionError("from_vit found the package")
        assert not [name for name in sys.modules if name.partition(".")[0] == "cropr_hf"]
        """,
        tmp_path,
        tmp_path / "model",
    )
    expected = predictions(model)[0]
    for name, logits in load_file(tmp_path / "results.safetensors").items():
        assert_close_relative(logits, expected, msg=lambda text, name=name: name + text)


@pytest.mark.full
def test_remote_code_of_an_encoder_that_learned_without_labels_gives_its_embeddings(monkeypatch, tmp_path):
    for each in (CroprViTConfig, CroprViTModel):
        monkeypatch.setattr(each, "_auto_class", None)
    CroprViTConfig.register_for_auto_class()
    CroprViTModel.register_for_auto_class("AutoModel")
    fields = {"use_auxiliary_heads": True, "auxiliary_task": "embedding", "projection_dim": 12}
    model = make_model(CroprViTModel, tiny_config(**fields))
    model.save_pretrained(tmp_path / "model")
    safetensors.torch.save_file({"images": make_images()}, tmp_path / "images.safetensors")
    run_python(
        """
        import sys
        sys.modules["cropr_hf"] = None
        from safetensors.torch import load_file, save_file
        from transformers import AutoConfig, AutoModel

        path = sys.argv[1]
        images = load_file("images.safetensors")["images"]
        model = AutoModel.from_pretrained(path, trust_remote_code=True)
        results = {"embeddings": model(images).pooler_output}
        config = AutoConfig.from_pretrained(path + "/training_config", trust_remote_code=True)
        again = AutoModel.from_pretrained(path, config=config, trust_remote_code=True)
        results["again"] = again(images).pooler_output
        assert {logits.shape for logits in again.train()(images).auxiliary_logits} == {(2, 1, 12)}
        save_file(results, "results.safetensors")
        """,
        tmp_path,
        tmp_path / "model",
    )
    with torch.no_grad():
        expected = model(make_images()).pooler_output
    for name, embeddings in load_file(tmp_path / "results.safetensors").items():
        assert_close_relative(embeddings, expected, msg=lambda text, name=name: name + text)


# Damage, interruption, other models


def test_sharded_over_unsharded_and_back_leave_no_stale_weights(tmp_path):
    first, second, third = trainable(), trainable(num_queries=2), trainable()
    with torch.no_grad():
        second.classifier.bias.add_(1)
        third.classifier.bias.add_(2)
    first.save_pretrained(tmp_path)
    second.save_pretrained(tmp_path, max_shard_size="20KB")
    names = {file.name for file in tmp_path.iterdir()}
    assert "model.safetensors" not in names and "model.safetensors.index.json" in names
    assert len([name for name in names if "-of-" in name]) > 2
    assert_same_model(second, CroprViTForImageClassification.from_pretrained(tmp_path))
    second.save_pretrained(tmp_path, max_shard_size="60KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert {file.name for file in tmp_path.glob("*-of-*")} == set(index["weight_map"].values())
    third.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == PUBLISHED
    assert_same_model(third, CroprViTForImageClassification.from_pretrained(tmp_path))


def test_a_complete_save_over_a_stripped_one_leaves_no_training_config(tmp_path):
    model = trainable()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, strip_auxiliary_heads=False)
    assert {file.name for file in tmp_path.iterdir()} == PUBLISHED - {"training_config"}


def test_saving_leaves_other_files_alone(tmp_path):
    kept = ["README.md", "preprocessor_config.json", "trainer_state.json", "model.fp16.safetensors", "notes/a.txt"]
    for name in kept:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    trainable().save_pretrained(tmp_path)
    assert all((tmp_path / name).read_text() == "mine" for name in kept)


def test_variants_live_side_by_side(tmp_path):
    first, second = trainable(), trainable(num_queries=2)
    first.save_pretrained(tmp_path)
    second.save_pretrained(tmp_path, variant="other")
    assert_same_model(first, CroprViTForImageClassification.from_pretrained(tmp_path))
    assert_same_model(second, CroprViTForImageClassification.from_pretrained(tmp_path, variant="other"))


def test_weights_are_known_by_a_digest_of_all_files_each_read_once(tmp_path, monkeypatch):
    tensors = {"model-1.safetensors": {"a": torch.arange(3.0)}, "model-2.safetensors": {"0" * 16: torch.ones(2, 5)}}
    for name, content in tensors.items():
        save_file(content, tmp_path / name, {"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    expected = hashlib.sha256(b"".join((tmp_path / name).read_bytes() for name in tensors)).hexdigest()[:16]
    opened = []

    def counted(path, mode="r", **kwargs):
        opened.append((os.path.basename(path), mode))
        return open(path, mode, **kwargs)

    monkeypatch.setattr(saving, "open", counted, raising=False)
    saving._identify_weights(str(tmp_path))
    assert [name for name, mode in opened if mode == "rb"] == [*tensors]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", *tensors]
    assert json.loads((tmp_path / "config.json").read_text()) == {"weights_id": expected}
    for name, content in tensors.items():
        with safe_open(tmp_path / name, "pt") as file:
            assert file.metadata() == {"format": "pt", "weights_id": expected}
            assert {key: file.get_tensor(key).tolist() for key in file.keys()} == {
                key: tensor.tolist() for key, tensor in content.items()
            }


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("max_shard_size", ["20KB", *full("50GB")])
def test_an_interruption_while_writing_leaves_the_old_model(max_shard_size, tmp_path, monkeypatch):
    old, new = trainable(), trainable(num_queries=2)
    old.save_pretrained(tmp_path)
    before = sorted(file.name for file in tmp_path.iterdir())
    calls = []

    def write_half(tensors, filename, **kwargs):
        calls.append(filename)
        Path(filename).write_bytes(b"half of a file")
        if len(calls) == (1 if max_shard_size == "50GB" else 2):
            raise Interrupted

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", write_half)
    with pytest.raises(Interrupted):
        new.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert calls and sorted(file.name for file in tmp_path.iterdir()) == before
    assert_same_model(old, CroprViTForImageClassification.from_pretrained(tmp_path))
    assert new.config.use_auxiliary_heads is True


@pytest.mark.parametrize("config", ["", "{", "[]", "null", "3", '"cropr_vit"', "{}", "\udcff", "[" * 100_000])
def test_what_is_no_configuration_raises_value_error(config, tmp_path):
    trainable().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(config.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}.*save .*again"):
        CroprViTForImageClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("fields", [{"dtype": "float33"}, {"quantization_config": 5}], ids=str)
def test_fields_that_are_none_raise_value_error(fields, tmp_path):
    trainable().save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**stored, **fields}))
    with pytest.raises(ValueError, match=r"`config\.json` or its weights are damaged"):
        CroprViTForImageClassification.from_pretrained(tmp_path)


FOREIGN = {
    "nothing": None,
    "list": [1, 2],
    "tensor": torch.zeros(3),
    "other model": {"conv.weight": torch.zeros(3)},
    "training state": {"model": {"conv.weight": torch.zeros(3)}, "epoch": 3},
    "numbers as names": {1: torch.zeros(3)},
    "code": torch.nn.Linear(2, 2),
}


@pytest.mark.parametrize("content", FOREIGN)
def test_weights_of_something_else_raise_value_error(content, tmp_path):
    trainable().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(FOREIGN[content], tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))) as error:
        CroprViTForImageClassification.from_pretrained(tmp_path)
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b"junk"),
        ("pytorch_model.bin", b""),
        ("pytorch_model.bin", b"junk"),  # to its reader the beginning of a number
        ("pytorch_model.bin", b"\x8c\x01\xc8."),  # text that is not UTF-8
        ("pytorch_model.bin", b"version https://git-lfs.github.com/spec/v1"),
        *(("model.safetensors.index.json", text) for text in (b"{", b"[]", b"{}", b"null", b'{"weight_map": [1]}')),
    ],
)
def test_junk_instead_of_weights_raises_value_error(name, content, tmp_path):
    trainable().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}.*save .*again"):
        CroprViTForImageClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(("words", "named"), [((), {"nonsense": 1}), ((1,), {})], ids=["by name", "by place"])
def test_arguments_that_a_model_does_not_know_stay_the_callers_fault(words, named, tmp_path):
    trainable().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"argument"):
        CroprViTForImageClassification.from_pretrained(tmp_path, *words, **named)


def test_damage_is_told_by_where_it_was_met_and_not_by_words(tmp_path):
    with pytest.raises(ValueError, match="does not hold what a saved model holds"), saving.named_damage(tmp_path):
        raise TypeError("unexpected keyword argument of a stored configuration")
    with pytest.raises(RuntimeError, match=r"^ignore_mismatched_sizes$"), saving.named_damage(tmp_path):
        raise RuntimeError("ignore_mismatched_sizes")


def test_truncated_weights_raise_value_error(tmp_path):
    trainable().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"are damaged or truncated .*; save them again"):
        CroprViTForImageClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [{"num_hidden_layers": 4}, *full({"use_cls_token": False}, {"use_final_norm": False}, {"query_bias": False})],
)
@pytest.mark.parametrize("loaded_class", [TASKS[task].model_class for task in ("model", "backbone", "classification")])
@pytest.mark.parametrize("task", ["model", "classification"])
def test_weights_without_a_place_raise_value_error(task, loaded_class, fields, tmp_path):
    TASKS[task].build().save_pretrained(tmp_path)
    message = "weights of the backbone that the configuration has no place for, such as .*: the configuration is of"
    with pytest.raises(ValueError, match=message):
        loaded_class.from_pretrained(tmp_path, **fields)
    stored = json.loads((tmp_path / "config.json").read_text())
    for name in ("stage_names", "out_features", "out_indices"):
        del stored[name]
    (tmp_path / "config.json").write_text(json.dumps(stored | fields))
    with pytest.raises(ValueError, match=message):
        loaded_class.from_pretrained(tmp_path)


def test_another_model_type_is_refused_with_the_way_to_go(tmp_path):
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32)
    ViTForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a model of type 'vit', not 'cropr_vit'; `from_vit` starts"):
        CroprViTForImageClassification.from_pretrained(tmp_path)


def test_missing_backbone_weights_raise_value_error(tmp_path):
    model = trainable()
    model.save_pretrained(tmp_path)
    weights = stored_weights(tmp_path)
    del weights["cropr_vit.layers.2.mlp.fc1.weight"]
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of the model, such as cropr_vit.layers.2.mlp.fc1.weight"):
        CroprViTForImageClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("heads", [False, True])
def test_missing_scorers_raise_value_error_unless_they_will_be_trained(heads, tmp_path):
    trainable().save_pretrained(tmp_path)
    weights = {key: tensor for key, tensor in stored_weights(tmp_path).items() if "token_reducers.2" not in key}
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if heads:
        model = CroprViTForImageClassification.from_pretrained(tmp_path, use_auxiliary_heads=True)
        assert all(parameter.isfinite().all() for parameter in model.parameters())
    else:
        with pytest.raises(ValueError, match=r"lacks 1 weights.*token_reducers.2.*`use_auxiliary_heads=True`"):
            CroprViTForImageClassification.from_pretrained(tmp_path)


def test_a_folder_without_config_does_not_load(tmp_path):
    trainable().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    for kwargs in ({}, {"config": config}):
        with pytest.raises(ValueError, match=r"holds no `config.json`.*interrupted; save it again"):
            CroprViTForImageClassification.from_pretrained(tmp_path, **kwargs)


def test_saving_to_a_file_or_distributed_stripped_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"is a file; give a folder"):
        trainable().save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match=r"pass `strip_auxiliary_heads=False`"):
        trainable().save_pretrained(tmp_path / "folder", distributed_checkpoint=True)


def test_a_second_process_of_a_run_writes_no_file(tmp_path):
    trainable().save_pretrained(tmp_path / "model", is_main_process=False)
    folder = tmp_path / "model"
    assert not folder.exists() or list(folder.iterdir()) == []


# The Hub, with its methods replaced


@pytest.fixture
def hub(monkeypatch):
    """What would have been uploaded: file contents by path, and the arguments of the calls."""

    class Hub:
        files: dict[str, bytes] = {}
        calls: list[tuple[str, dict]] = []

    hub = Hub()
    hub.files, hub.calls = {}, []

    class Repository:
        def __init__(self, repo_id):
            self.repo_id = f"me/{repo_id.removeprefix('me/')}"

    def create_repo(self, repo_id, **kwargs):
        hub.calls.append(("create_repo", {"repo_id": repo_id, **kwargs}))
        return Repository(repo_id)

    def upload_folder(self, *, repo_id, folder_path, **kwargs):
        hub.calls.append(("upload_folder", {"repo_id": repo_id, **kwargs}))
        for file in Path(folder_path).rglob("*"):
            if file.is_file():
                hub.files[str(file.relative_to(folder_path))] = file.read_bytes()

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(HfApi, "file_exists", lambda self, *args, **kwargs: False)
    return hub


def assert_stripped_upload(hub, model):
    weights = safetensors.torch.load(hub.files["model.safetensors"])
    assert not [key for key in weights if "auxiliary_head" in key or "queries" in key]
    assert len([key for key in weights if key.endswith("folded_query")]) == len(model.config.pruning_blocks)
    assert json.loads(hub.files["config.json"]).get("use_auxiliary_heads", False) is False
    assert json.loads(hub.files["training_config/config.json"])["use_auxiliary_heads"] is True


def test_push_to_hub_uploads_stripped_files(hub):
    model = trainable()
    model.push_to_hub("me/pruned", commit_message="first", private=True)
    assert_stripped_upload(hub, model)
    assert dict(hub.calls)["upload_folder"]["repo_id"] == "me/pruned"
    assert dict(hub.calls)["upload_folder"]["commit_message"] == "first"
    assert json.loads(hub.files["record.json"])["model"]["name"] == "me/pruned"
    assert dict(hub.calls)["create_repo"]["private"] is True


@pytest.mark.parametrize("card", ["# Mine", "# Mine\n![pruned](pruning.png)", f"{CARD_MARK}\n![pruned](pruning.png)"])
def test_a_picture_on_the_hub_stays_if_somebodys_own_card_shows_it(card, hub, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text(card)
    monkeypatch.setattr(HfApi, "file_exists", lambda self, *args, **kwargs: True)
    monkeypatch.setattr(HfApi, "hf_hub_download", lambda self, *args, **kwargs: str(tmp_path / "README.md"))
    trainable().push_to_hub("me/pruned")
    upload = dict(hub.calls)["upload_folder"]
    is_own = CARD_MARK not in card
    assert upload["ignore_patterns"] == (["README.md"] if is_own else None)
    assert ("pruning.png" in upload["delete_patterns"]) != (is_own and "pruning.png" in card)
    assert "record.json" in upload["delete_patterns"]


@pytest.mark.parametrize(
    ("folder", "kwargs", "repository"),
    [("pruned", {}, "me/pruned"), ("pruned/", {}, "me/pruned"), ("folder", {"repo_id": "me/other"}, "me/other")],
)
def test_save_pretrained_with_push_to_hub_uploads_stripped_files(folder, kwargs, repository, hub, tmp_path):
    model = trainable()
    model.save_pretrained(f"{tmp_path}/{folder}", push_to_hub=True, commit_message="second", token="t", **kwargs)
    assert_stripped_upload(hub, model)
    assert [name for name, _ in hub.calls] == ["create_repo", "upload_folder"]
    call = dict(hub.calls)["upload_folder"]
    assert (call["repo_id"], call["commit_message"], call["revision"]) == (repository, "second", None)
    assert_same_model(model, CroprViTForImageClassification.from_pretrained(tmp_path / folder))


def test_only_our_models_override_saving():
    assert CroprViTForImageClassification.save_pretrained is not PreTrainedModel.save_pretrained
    assert CroprViTForImageClassification.push_to_hub is not PreTrainedModel.push_to_hub


def test_backbone_weights_of_another_shape_are_not_replaced(tmp_path):
    make_model(CroprViTForImageClassification, tiny_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="position_embeddings"):
        CroprViTForImageClassification.from_pretrained(tmp_path, image_size=48, ignore_mismatched_sizes=True)


def test_a_classifier_without_its_head_is_incomplete(tmp_path):
    model = make_model(CroprViTForImageClassification, tiny_config())
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("classifier")}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"classifier\.bias"):
        CroprViTForImageClassification.from_pretrained(tmp_path)


def test_a_complete_checkpoint_without_its_queries_is_incomplete(tmp_path):
    model = trainable()
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("queries")}
    model.save_pretrained(tmp_path, state_dict=weights, strip_auxiliary_heads=False)
    with pytest.raises(ValueError, match="queries"):
        CroprViTForImageClassification.from_pretrained(tmp_path)
