"""ToCom against the specification: the ranks of each step, what they add up to, live and folded; that it is ToMe where
it has nothing to do; its file and the backbone that this is for; and that it learns.
"""

import copy
import json
import random

import pytest
import torch
from torch.nn import functional as F

from cropr_hf import CroprViTConfig, CroprViTForImageClassification, CroprViTForSemanticSegmentation, CroprViTModel
from cropr_hf.methods import ToComConfig, load_compensator, save_compensator
from cropr_hf.methods.tocom import FILE_NAME, Compensator, ToComReducer, steps_between
from cropr_hf.publishing.hub import save_for_hub
from cropr_hf.token_reduction import build_token_reducers
from cropr_hf.training.distillation import logits_loss
from tests.common import enable_activation_checkpointing, full, make_images, make_model, tiny_config
from tests.test_examples import digits_command


def tocom_config(settings=None, **overrides):
    """Complete, with large steps, so that what they change is visible."""
    settings = {"scale": 1.0, **(settings or {})}
    return tiny_config(
        **{"token_reducer": "tocom", "use_auxiliary_heads": True, "reducer_config": settings, **overrides}
    )


def classifier(settings=None, **overrides):
    return make_model(CroprViTForImageClassification, tocom_config(settings, **overrides)).double()


def tome_of(model, rate):
    """ToMe with the weights of a model, at a rate."""
    fields = model.config.to_dict() | {"token_reducer": "tome", "reducer_config": None, "use_auxiliary_heads": False}
    fields["dtype"] = None
    tome = CroprViTForImageClassification(CroprViTConfig(**fields)).double().eval()
    tome.load_state_dict(model.state_dict(), strict=False)
    tome.set_pruning(rate)
    return tome


def gate(trained_rate, rate, max_rate=16, rank_per_step=2):
    """The vector of the specification: with g(r) 1 on the last 2 r entries, g(rate) - g(trained_rate)."""
    ranks, sign = steps_between(trained_rate, rate, max_rate, rank_per_step)
    entries = [0] * (max_rate * rank_per_step)
    entries[ranks] = [sign] * len(entries[ranks])
    return entries


# The steps


def test_each_step_has_its_ranks():
    assert gate(0, 1) == [0] * 30 + [1, 1]
    assert gate(0, 16) == [1] * 32
    assert gate(5, 3) == [0] * 22 + [-1] * 4 + [0] * 6
    for trained_rate in range(5):
        for rate in range(5):
            of_both = ([0] * (12 - 3 * each) + [1] * 3 * each for each in (rate, trained_rate))
            expected = [high - low for high, low in zip(*of_both)]
            assert gate(trained_rate, rate, 4, 3) == expected


@torch.no_grad()
def test_steps_add_up_and_cancel():
    compensator = Compensator(tiny_config(), ToComConfig()).double().eval()
    for parameter in compensator.parameters():
        torch.nn.init.normal_(parameter)
    tokens = torch.randn(2, 7, 32, dtype=torch.float64)

    def change(trained_rate, rate):
        ranks, sign = steps_between(trained_rate, rate, 16, 2)
        return torch.stack(compensator(tokens, ranks)) * sign

    for one, other, third in [(0, 16, 5), (3, 5, 4), (7, 2, 11)]:
        torch.testing.assert_close(change(one, other), -change(other, one), rtol=0, atol=1e-10)
        torch.testing.assert_close(change(one, other) + change(other, third), change(one, third), rtol=0, atol=1e-10)


def test_a_vit_b_has_the_published_number_of_weights_and_nothing_else_learns():
    config = CroprViTConfig.from_size("base", token_reducer="tocom", use_auxiliary_heads=True)
    with torch.device("meta"):
        reducers = build_token_reducers(config)
    assert sum(parameter.numel() for parameter in reducers.parameters()) == 1_179_648


# Where it has nothing to do it is ToMe, bit by bit


@pytest.mark.parametrize("rate", [0, 2, 5])
@torch.no_grad()
def test_without_a_difference_it_is_tome(rate):
    """5 saturates: 16, 11, 6, 3, 2, 1 patches."""
    images = make_images().double()
    by_setting = classifier({"trained_rate": rate}, pruning_rate=rate)
    by_default = classifier(pruning_rate=rate)
    without = classifier({"trained_rate": 1, "scale": 0.0}, pruning_rate=rate)
    new = classifier({"trained_rate": 1}, pruning_rate=rate)
    for reducer in new.cropr_vit.token_reducers.values():
        reducer.compensator.init_weights()
    for model in (by_setting, by_default, without, new):
        found = model(images).logits
        torch.testing.assert_close(found, tome_of(model, rate)(images).logits, rtol=0, atol=1e-10)
        for reducer in model.cropr_vit.token_reducers.values():
            reducer.compensator = None
        assert torch.equal(found, model(images).logits)  # the same weights at the same place in memory


@torch.no_grad()
def test_keys_and_merges_of_the_first_block_are_those_of_tome():
    model = classifier({"trained_rate": 0}, pruning_rate=3)
    seen = []
    for candidate in (model, tome_of(model, 3)):
        reducer = candidate.cropr_vit.token_reducers["1"]
        own = reducer.after_attention

        def watch(state, num_keep, facts, own=own):
            after = own(state, num_keep, facts)
            seen.append((facts, after))
            return after

        reducer.after_attention = watch
        candidate(make_images().double())
    (facts, after), (of_tome, after_tome) = seen
    assert torch.equal(facts.keys, of_tome.keys) and torch.equal(after.slots, after_tome.slots)
    assert not torch.allclose(facts.queries, of_tome.queries)
    assert not torch.allclose(after.hidden_states, after_tome.hidden_states)


# Live and folded


@torch.no_grad()
def add_by_hand(model, degrees):
    """Adds what each block needs to its weights by the vector of the specification; `degrees` are pairs by block."""
    settings = ToComReducer.settings(model.config)
    for block, (trained_rate, rate) in enumerate(degrees, start=1):
        compensator = model.cropr_vit.token_reducers[str(block)].compensator
        attention = model.cropr_vit.layers[block - 1].attention
        entries = torch.tensor(gate(trained_rate, rate)).double() * settings.scale
        attention.q_proj.weight += compensator.query_up @ entries.diag() @ compensator.query_down
        attention.v_proj.weight += compensator.value_up @ entries.diag() @ compensator.value_down


@pytest.mark.parametrize(
    ("trained_rate", "pruning", "degrees"),
    [
        (0, 2, [(0, 2)] * 5),
        (3, 1, [(3, 1)] * 5),
        (2, 5, [(2, 5), (2, 5), (2, 5), (2, 4), (2, 3)]),  # 11, 6, 3, 2 and 1 of 16 are left: it saturates
        (1, [16, 12, 8, 8, 8], [(1, 0), (1, 2), (1, 3), (1, 2), (1, 2)]),  # mean rates up to a block, rounded up
    ],
)
@torch.no_grad()
def test_live_folded_and_by_hand_agree(trained_rate, pruning, degrees, tmp_path):
    model = classifier({"trained_rate": trained_rate})
    model.set_pruning(pruning)
    images = make_images().double()
    live = model(images).logits
    assert not torch.allclose(live, tome_of(model, pruning)(images).logits, atol=1e-3)
    field = "pruning_rate" if isinstance(pruning, int) else "pruning_schedule"
    configured = classifier({"trained_rate": trained_rate}, **{"pruning_rate": None, field: pruning})
    torch.testing.assert_close(configured(images).logits, live, rtol=0, atol=1e-10)
    by_hand = copy.deepcopy(model)
    add_by_hand(by_hand, degrees)
    torch.testing.assert_close(tome_of(by_hand, pruning)(images).logits, live, rtol=0, atol=1e-10)
    configured.remove_auxiliary_heads()
    torch.testing.assert_close(configured(images).logits, live, rtol=0, atol=1e-10)
    assert not configured.config.use_auxiliary_heads and configured.config.reducer_config == {"scale": 1.0}
    assert not list(configured.cropr_vit.token_reducers.parameters())


@torch.no_grad()
def test_what_is_saved_is_folded_and_counts_as_trained_that_way(tmp_path):
    model = classifier({"trained_rate": 0, "max_rate": 4}, pruning_rate=3)
    images = make_images().double()
    expected = model(images).logits
    model.save_pretrained(tmp_path / "folded")
    model.save_pretrained(tmp_path / "complete", strip_auxiliary_heads=False)
    assert model.config.use_auxiliary_heads and model.config.reducer_config["trained_rate"] == 0
    assert torch.equal(model(images).logits, expected)

    stored = json.loads((tmp_path / "folded" / "config.json").read_text())
    assert stored["reducer_config"] == {"scale": 1.0, "max_rate": 4} and not stored.get("use_auxiliary_heads")
    load = CroprViTForImageClassification.from_pretrained
    for folder, fields in [("folded", {}), ("complete", {}), ("complete", {"use_auxiliary_heads": False})]:
        loaded = load(tmp_path / folder, **fields).eval()
        torch.testing.assert_close(loaded(images).logits, expected, rtol=0, atol=1e-10)
    again = load(tmp_path / "folded", use_auxiliary_heads=True).eval()
    torch.testing.assert_close(again(images).logits, expected, rtol=0, atol=1e-10)
    tome = load(tmp_path / "folded", token_reducer="tome").eval()  # that is all it is now
    torch.testing.assert_close(tome(images).logits, expected, rtol=0, atol=1e-10)


@pytest.mark.full
def test_folding_keeps_the_type_of_the_weights(tmp_path):
    model = classifier({"trained_rate": 0, "scale": 0.1}).bfloat16()
    expected = model(make_images().bfloat16()).logits
    model.save_pretrained(tmp_path)
    loaded = CroprViTForImageClassification.from_pretrained(tmp_path, dtype="auto").eval()
    assert loaded.dtype == torch.bfloat16
    assert F.cosine_similarity(loaded(make_images().bfloat16()).logits.float(), expected.float()).min() > 0.99


def test_dense_tasks_are_compensated_in_the_blocks_that_merge():
    config = tocom_config({"trained_rate": 0}, last_layer_fusion=True, num_queries=None)
    model = make_model(CroprViTForSemanticSegmentation, config)
    assert [*model.cropr_vit.token_reducers] == ["1", "2", "3", "4"]
    before = model(make_images()).logits
    model.remove_auxiliary_heads()
    torch.testing.assert_close(model(make_images()).logits, before, rtol=0, atol=1e-4 * before.abs().max().item())


# Training


def test_a_frozen_backbone_gets_no_gradient_and_checkpointing_changes_none():
    gradients = []
    for checkpointing in (False, True):
        model = classifier({"trained_rate": 0, "dropout": 0.0}, pruning_rate=2).train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("token_reducers." in name)
        if checkpointing:
            enable_activation_checkpointing(model)
        model(make_images().double(), labels=torch.tensor([0, 1])).loss.backward()
        learned = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert len(learned) == 4 * 5 and all(gradient.abs().sum() > 0 for gradient in learned.values())
        gradients.append(learned)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.full
def test_a_complete_model_has_no_graph_break():
    torch.compiler.reset()
    model = classifier({"trained_rate": 0})
    expected = model(make_images().double()).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(make_images().double()).logits, expected, rtol=0, atol=1e-10)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(3))
def test_a_few_steps_lower_the_divergence_between_rates(seed, example):
    """On images that it has not seen, for every pair of rates that the script evaluates."""
    script = example("train_compensator")
    student = make_model(CroprViTForImageClassification, tocom_config({"max_rate": 4}, pruning_rate=0), seed)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("token_reducers." in name)
    teacher = copy.deepcopy(student)
    for reducer in student.cropr_vit.token_reducers.values():
        reducer.compensator.init_weights()
    teacher.remove_auxiliary_heads()
    teacher.eval()
    optimizer = torch.optim.AdamW([each for each in student.parameters() if each.requires_grad], lr=1e-2)
    pairs = script.rate_pairs(4)
    draw = random.Random(seed)
    for step in range(150):
        images = make_images(16, seed=1000 * (seed + 1) + step)
        script.set_rates(student, teacher, *draw.sample(range(5), 2))
        with torch.no_grad():
            wanted = teacher(images).logits
        loss = logits_loss(student.train()(images).logits, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sums = script.divergences(student.eval(), teacher, [{"pixel_values": make_images(64, seed=seed + 7)}], pairs)
    for trained_rate, rate in pairs:
        found, before = (sums[f"{name}_{trained_rate}_{rate}"] for name in ("divergence", "uncompensated"))
        assert found < before


@pytest.mark.full
def test_the_script_trains_measures_and_writes_a_compensator_that_loads(example, tiny_vit, tmp_path):
    script = example("train_compensator")
    fields = {"reducer_config": json.dumps({"max_rate": 4}), "num_train_epochs": 1, "save_strategy": "no"}
    words = digits_command(tiny_vit, tmp_path, randaugment_magnitude=0, **fields)
    place = words.index("--pruning_rate")
    metrics = script.main(words[:place] + words[place + 2 :])
    names = {f"{name}_{pair}" for name in ("divergence", "uncompensated") for pair in ("0_2", "0_4", "2_4", "4_0")}
    assert {f"eval_{name}" for name in names} == {*metrics} and all(value > -1e-6 for value in metrics.values())
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [FILE_NAME]
    settings = {"trained_rate": 0, "max_rate": 4}
    model = CroprViTForImageClassification.from_vit(
        tiny_vit, token_reducer="tocom", pruning_rate=4, reducer_config=settings
    )
    images = torch.randn(2, 3, 48, 48)
    plain = model.eval()(images).logits
    load_compensator(model, tmp_path)
    assert not torch.equal(model(images).logits, plain)


def test_pairs_are_drawn_from_the_seed_and_the_rest_is_as_configured(example):
    script = example("train_compensator")
    drawn = []
    for _ in range(2):
        student = make_model(CroprViTForImageClassification, tocom_config({"max_rate": 3}, pruning_rate=0))
        teacher = copy.deepcopy(student)
        pairs = script.RatePairs(teacher, 3)

        class Now:
            seed, global_step = 5, 0

        drawn.append([])
        for Now.global_step in range(60):
            pairs.on_step_begin(Now, Now, None, model=student)
            rates = student.config.reducer_config["trained_rate"], student.base_model.pruning
            assert teacher.base_model.pruning == rates[0] and teacher.config.reducer_config == {
                "scale": 1.0,
                "max_rate": 3,
            }
            drawn[-1].append(rates)
            pairs.on_step_end(Now, Now, None, model=student)
            assert student.base_model.pruning is None is student.config.reducer_config["trained_rate"]
    assert drawn[0] == drawn[1]
    assert {*drawn[0]} == {(one, other) for one in range(4) for other in range(4) if one != other}


def test_the_script_wants_a_classifier(example, tmp_path):
    make_model(CroprViTModel, tiny_config("unpruned")).save_pretrained(tmp_path)
    script = example("train_compensator")
    with pytest.raises(ValueError, match="holds CroprViTModel; a compensator learns from the classes"):
        script.load_backbone(script.BackboneArguments(model_name_or_path=str(tmp_path)))


# A file for one backbone


@pytest.fixture(scope="module")
def compensator(tmp_path_factory):
    """A folder with a compensator, and the complete model that it is from."""
    folder = tmp_path_factory.mktemp("compensator")
    model = classifier({"scale": 0.5}, pruning_rate=0)
    save_compensator(model, folder)
    return folder, model


def tuned(model, tmp_path, **fields):
    """A model of ToMe that was fine-tuned from the backbone of another, loaded with ToCom."""
    tome = tome_of(model, None)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in tome.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    tome.save_pretrained(tmp_path / "tuned")
    return CroprViTForImageClassification.from_pretrained(tmp_path / "tuned", token_reducer="tocom", **fields).eval()


@torch.no_grad()
def test_it_serves_models_that_were_tuned_from_its_backbone(compensator, tmp_path):
    folder, source = compensator
    model = tuned(source, tmp_path, pruning_rate=3, reducer_config={"trained_rate": 1})
    assert not model.config.use_auxiliary_heads
    images = make_images().double()
    plain = model(images).logits
    load_compensator(model, folder)
    assert model.config.reducer_config == {"trained_rate": 1, "scale": 0.5}
    compensated = model(images).logits
    assert compensated.dtype == torch.float64 and not torch.allclose(compensated, plain, atol=1e-3)
    for name, parameter in source.cropr_vit.token_reducers.named_parameters():
        assert torch.equal(model.cropr_vit.token_reducers.get_parameter(name), parameter)
    model.set_pruning(1)
    torch.testing.assert_close(model(images).logits, tome_of(model, 1)(images).logits, rtol=0, atol=1e-10)
    model.save_pretrained(tmp_path / "published")
    published = CroprViTForImageClassification.from_pretrained(tmp_path / "published").eval()
    torch.testing.assert_close(published(images).logits, compensated, rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_scale_that_is_given_stays(compensator, tmp_path):
    folder, source = compensator
    model = tuned(source, tmp_path, pruning_rate=3, reducer_config={"trained_rate": 1, "scale": 0.2})
    load_compensator(model, folder)
    assert model.config.reducer_config["scale"] == 0.2


def test_another_model_is_refused(compensator, tmp_path):
    folder, source = compensator
    other = make_model(CroprViTForImageClassification, tocom_config(), seed=9)
    with pytest.raises(ValueError, match=r"is for another backbone, which has other keys \(a cosine of -?0\.[01]"):
        load_compensator(other, folder)
    smaller = make_model(CroprViTForImageClassification, tocom_config(num_hidden_layers=3))
    with pytest.raises(ValueError, match="which has 5 blocks of width 32, not 3 of 32"):
        load_compensator(smaller, folder)
    with pytest.raises(ValueError, match="token reducer of the model is 'tome'; load it with `token_reducer='tocom'`"):
        load_compensator(tome_of(source, 2), folder)
    with pytest.raises(ValueError, match=f"There is no {FILE_NAME} in {tmp_path}"):
        load_compensator(source, tmp_path)
    model = tuned(source, tmp_path, reducer_config={"max_rate": 8})
    with pytest.raises(ValueError, match=r"has `max_rate` 16, the model 8; load the model with that of the comp"):
        load_compensator(model, folder)
    with pytest.raises(ValueError, match="The model is stripped, its compensator folded"):
        save_compensator(model, tmp_path)
    dense = copy.deepcopy(source)
    del dense.cropr_vit.token_reducers["5"]  # as with last layer fusion
    save_compensator(dense, tmp_path)
    with pytest.raises(ValueError, match="is not for the blocks 5, in which the model merges"):
        load_compensator(source, tmp_path)


@pytest.mark.parametrize(
    ("settings", "fields", "message"),
    [
        ({"max_rate": 0}, {}, "`max_rate` is 0; it must be 1 or more"),
        ({"rank_per_step": 0}, {}, "`rank_per_step` is 0; it must be 1 or more"),
        ({"trained_rate": 17}, {}, "`trained_rate` is 17; it must be in 0 to 16, the `max_rate`"),
        ({"trained_rate": -1}, {}, "`trained_rate` is -1; it must be in 0 to 16"),
        ({"scale": -0.1}, {}, "`scale` is -0.1; it must be 0 or more"),
        ({"dropout": 1.0}, {}, r"`dropout` is 1.0; it must be in \[0, 1\)"),
        ({"trained": 1}, {}, "did you mean 'trained_rate'"),
        ({"max_rate": 2}, {"pruning_rate": 3}, "pruning rate is 3, but the compensator has steps up to `max_rate` 2"),
        ({"max_rate": 1}, {"pruning_rate": None, "pruning_schedule": [16, 12, 12, 12, 12]}, "can only leave 14 there"),
    ],
)
def test_what_does_not_fit_is_refused(settings, fields, message):
    with pytest.raises(ValueError, match=message):
        tocom_config(settings, **fields)


def test_without_a_compensator_any_rate_will_do():
    config = tocom_config({"max_rate": 2}, pruning_rate=4, use_auxiliary_heads=False)
    assert config.kept_patches() == tiny_config("tome", num_register_tokens=0, pruning_rate=4).kept_patches()
    model = make_model(CroprViTForImageClassification, tocom_config({"max_rate": 2}))
    with pytest.raises(ValueError, match="The pruning rate is 3, but the compensator has steps up to"):
        model.set_pruning(3)


@pytest.mark.parametrize("method", ["tocom", *full("tome")])
def test_a_method_travels_with_those_that_it_extends(method, tmp_path):
    save_for_hub(make_model(CroprViTForImageClassification, tiny_config(token_reducer=method)), tmp_path)
    files = sorted(path.stem for path in tmp_path.glob("reducer_*.py"))
    assert files == sorted({"reducer_cropr", "reducer_random", "reducer_tome", f"reducer_{method}"})
    if method == "tocom":
        assert "\nfrom .reducer_tome import ToMeConfig" in (tmp_path / "reducer_tocom.py").read_text()
        assert "\nfrom .token_state import TokenState" in (tmp_path / "reducer_tocom.py").read_text()
