"""Numbers of patches that follow the image: what the mean image costs, and what records, cards and tables say."""

import importlib
import json
import random
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cropr_hf import CroprViTConfig, CroprViTForImageClassification, CroprViTForSemanticSegmentation, CroprViTModel
from cropr_hf.publishing.model_card import add_to_record, read_record
from cropr_hf.speed.benchmark import BenchmarkArguments, run
from cropr_hf.speed.cost import mean_multiply_adds, multiply_adds
from cropr_hf.speed.counts import MEANS, PatchCounts
from cropr_hf.speed.tables import format_table
from cropr_hf.token_schedule import entering_patches
from cropr_hf.training import CroprTrainer
from tests.common import METHODS, NUM_BLOCKS, NUM_PATCHES, TINY, full, make_images, make_model, tiny_config
from tests.test_mass_threshold import build
from tests.test_svit import fix_gates, random_tables, svit_config
from tests.test_training import ColouredSquares, tiny_model, training_arguments


VARYING = {
    "svit": {"token_reducer": "svit", "pruning_rate": None, "reducer_config": {"eval_mode": "threshold"}},
    "cropr": {"reducer_config": {"mass_threshold": 0.7}},
}


@pytest.mark.parametrize("method", ["cropr", "random", "tome", *full(*METHODS)])
@pytest.mark.parametrize("fusion", [False, *full(True)])
@torch.no_grad()
def test_patches_kept_are_those_of_the_schedule(method, fusion):
    settings = {
        "evit": {"fuse_tokens": False},  # new tokens are no patches
        "asvit": {"eval_mode": "topk"},  # the schedule alone decides
        "ltp": {"final_threshold": -2.0},
    }
    config = tiny_config(token_reducer=method, last_layer_fusion=fusion, reducer_config=settings.get(method))
    outputs = make_model(CroprViTModel, config)(make_images(), output_pruning=True)
    kept = config.kept_patches()
    assert outputs.patches_kept.tolist() == [kept] * 2
    assert outputs.patches_per_block.tolist() == [entering_patches(kept, NUM_PATCHES, fusion)] * 2


def random_rows(config, count, seed=0):
    """Patches left after each block, fewer after each module or as many as before it."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        row, left = [], NUM_PATCHES
        for block in range(1, NUM_BLOCKS + 1):
            left = rng.randint(1, min(left, NUM_PATCHES - 1)) if block in config.pruning_blocks else left
            row.append(left)
        rows.append(row)
    return rows


@pytest.mark.parametrize("method", VARYING)
@pytest.mark.parametrize(("fusion", "attention"), [(False, True), *full((True, True), (False, False), (True, False))])
def test_the_mean_image_costs_what_images_cost_in_the_mean(method, fusion, attention):
    config = tiny_config(**VARYING[method], last_layer_fusion=fusion, num_register_tokens=1, rope_theta=100.0)
    rows = random_rows(config, 6)
    costs = [multiply_adds(config, attention=attention, pruning=row) for row in rows]
    found = mean_multiply_adds(config, torch.tensor(rows), attention=attention)
    assert found == pytest.approx(statistics.mean(costs), rel=1e-12)
    assert len({*costs}) > 1


def test_patches_that_come_back_are_counted_by_hand():
    """A block of SViT may have more patches than the one before, all or none; the cost of the mean image is more than
    that of the mean numbers.
    """
    config, generator = tiny_config(**VARYING["svit"]), torch.Generator().manual_seed(0)
    kept = torch.randint(0, NUM_PATCHES + 1, (50, NUM_BLOCKS), generator=generator)
    kept[0], kept[1] = 0, NUM_PATCHES
    size, inner = config.hidden_size, config.intermediate_size

    def cost(patches):
        tokens = patches.double() + 1
        return tokens * (4 * size**2 + 2 * size * inner) + 2 * tokens**2 * size

    even = torch.full((1, NUM_BLOCKS), 8)
    found = mean_multiply_adds(config, kept) - mean_multiply_adds(config, even)
    by_hand = (cost(kept[:, :-1]) - cost(even[:, :-1])).sum(dim=1).mean().item()  # what block 5 leaves costs nothing
    assert found == pytest.approx(by_hand, rel=1e-9)
    mean = kept.double().mean(dim=0, keepdim=True)
    assert mean_multiply_adds(config, kept) > mean_multiply_adds(config, mean)


def test_too_few_patches_to_tell():
    with pytest.raises(ValueError, match="The grid has 1 x 3 patches; give images of four or more"):
        mean_multiply_adds(tiny_config(**VARYING["cropr"]), torch.ones(1, NUM_BLOCKS), (1, 3))


class TestCounts:
    @torch.no_grad()
    def test_they_are_those_of_each_image(self):
        tables, pixels = random_tables(4), make_images(4)
        config = svit_config()
        model = fix_gates(make_model(CroprViTForImageClassification, config).eval(), tables)
        with PatchCounts(model) as counts:
            assert [*model(pixels)] == ["logits"] and [*model.base_model(pixels[:3])] == [
                "last_hidden_state",
                "pooler_output",
            ]
            model.train()(pixels, labels=torch.zeros(4, dtype=torch.long))
        model.eval()(pixels)  # not asked any more
        assert [len(batch.kept) for batch in counts.batches] == [4, 3]
        chosen = torch.stack([table.sum(dim=1) for table in tables], dim=1)
        chosen = torch.cat([chosen, chosen[:3]])
        worked_on = np.concatenate([np.full((7, 1), NUM_PATCHES), chosen.numpy()], axis=1)
        summary = counts.summary()
        assert summary["patches_per_block"] == {
            "mean": pytest.approx(worked_on.mean(axis=0), abs=0.01),
            "p10": pytest.approx(np.percentile(worked_on, 10, axis=0), abs=0.01),
            "p90": pytest.approx(np.percentile(worked_on, 90, axis=0), abs=0.01),
        }
        assert {name: summary[name] for name in MEANS} == counts.means()
        kept = torch.cat([chosen, chosen[:, -1:]], dim=1)  # as many after the last block as in it
        assert summary["mean_patches_left"] == pytest.approx(kept[:, -1].double().mean().item(), abs=0.01)
        assert summary["mean_multiply_adds"] == round(mean_multiply_adds(config, kept))

    @torch.no_grad()
    def test_images_of_several_sizes_cost_what_each_costs(self):
        model = build(CroprViTForImageClassification, mass=0.5)
        images = {(4, 4): make_images(2).double(), (6, 6): make_images(3, 48, 48).double()}
        costs = []
        with PatchCounts(model) as counts:
            for grid_size, pixels in images.items():
                model(pixel_values=pixels)
                kept = model.base_model(pixels, output_pruning=True).patches_kept
                costs += [multiply_adds(model.config, grid_size, pruning=row) for row in kept.tolist()]
        assert [batch.grid_size for batch in counts.batches] == [(4, 4), (4, 4), (6, 6), (6, 6)]
        assert counts.multiply_adds() == pytest.approx(statistics.mean(costs), rel=1e-12)

    @torch.no_grad()
    def test_nothing_is_counted_where_all_images_have_as_many(self):
        for config in (svit_config("topk"), tiny_config("unpruned"), tiny_config()):
            model = make_model(CroprViTForImageClassification, config).eval()
            with PatchCounts(model) as counts:
                model(make_images())
            assert not counts.batches and counts.summary() == counts.means() == {}
        for other in (None, torch.nn.Linear(1, 1)):
            with PatchCounts(other) as counts:
                assert not counts.summary()

    @pytest.mark.full
    @torch.no_grad()
    def test_of_dense_tasks(self):
        config = tiny_config(**VARYING["cropr"], num_queries=None, last_layer_fusion=True)
        model = make_model(CroprViTForSemanticSegmentation, config).eval()
        with PatchCounts(model) as counts:
            model(make_images(2, 30, 32))  # filled up to whole patches
        (batch,) = counts.batches
        assert batch.grid_size == (4, 4) and (batch.worked_on[:, -1] == NUM_PATCHES).all()


class TestRecords:
    def published(self, folder, **fields):
        model = tiny_model(use_auxiliary_heads=False, **fields)
        model.save_pretrained(folder)
        return model.eval()

    @torch.no_grad()
    def test_the_card_shows_what_was_counted(self, tmp_path):
        model = self.published(tmp_path, reducer_config={"mass_threshold": 0.5})
        assert read_record(tmp_path)["model"]["counts_vary"]
        with PatchCounts(model) as counts:
            model(make_images(5))
        evaluation = {"dataset": "owner/a|b", "split": "test", "num_examples": 5, "metrics": {"accuracy": 0.5}}
        add_to_record(tmp_path, evaluation=evaluation | {"counts": counts.summary()})
        card = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert "by the schedule, unpruned" in card and "by the schedule (images have numbers of their own" in card
        assert "each block worked on, owner/a\\|b test; the\nmean image took " in card
        lines = card[card.index("| blocks | mean |") :].splitlines()
        assert lines[2] == "| 1 | 16 | 16 | 16 |" and lines[3].startswith("| 2 | ")
        per_block = counts.summary()["patches_per_block"]
        assert lines[4] == "| 3 | " + " | ".join(f"{per_block[name][2]:.4g}" for name in ("mean", "p10", "p90")) + " |"
        assert lines[5] == "| 4 | 16 | 16 | 16 |" and lines[6:8] == ["", "## Speed"]  # fusion

    def test_nothing_changes_where_all_images_have_as_many(self, tmp_path):
        self.published(tmp_path)
        assert "counts_vary" not in read_record(tmp_path)["model"]
        assert "by the schedule" not in (tmp_path / "README.md").read_text(encoding="utf-8")

    @pytest.mark.parametrize("settings", [{"mass_threshold": 0.5}, None])
    def test_the_trainer_counts_in_what_it_records(self, settings, tmp_path):
        args = training_arguments(tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1)
        model = tiny_model(reducer_config=settings)
        trainer = CroprTrainer(model, args, train_dataset=ColouredSquares(), eval_dataset=ColouredSquares())
        trainer.train()
        trainer.evaluate()
        trainer.save_model()
        (evaluation,) = read_record(tmp_path)["evaluations"]
        assert ("counts" in evaluation) == (settings is not None)
        if settings is not None:
            examples = ColouredSquares()
            pixels = torch.stack([examples[index]["pixel_values"] for index in range(len(examples))])
            with torch.no_grad():
                outputs = model.eval().base_model(pixels, output_pruning=True)
            expected = outputs.patches_per_block.double().mean(dim=0).tolist()
            assert evaluation["counts"]["patches_per_block"]["mean"] == pytest.approx(expected, abs=0.1)
            assert set(evaluation["metrics"]) == {"loss"}


def test_the_benchmark_bounds_by_what_its_images_keep():
    config = json.dumps({**TINY, "pruning_rate": None, "reducer_config": {"eval_mode": "threshold"}})
    arguments = BenchmarkArguments(size="tiny", token_reducer="svit", config=config, batch_size=2)
    arguments.min_rounds = arguments.max_rounds = 3
    record = run(arguments)
    assert 0 <= record["mean_patches_left"] <= NUM_PATCHES
    assert f"noise, of which SViT left {record['mean_patches_left']:.4g} patches in the mean" in format_table(record)
    by_schedule = multiply_adds(svit_config())
    assert sum(record["multiply_adds"]["svit"].values()) != by_schedule
    arguments.token_reducer, arguments.config = "random", json.dumps(TINY)
    assert "mean_patches_left" not in run(arguments)


@pytest.fixture(scope="module")
def script():
    """The script of the measurements as a module."""
    folder = str(Path(__file__).resolve().parents[1] / "docs" / "speed")
    sys.path.insert(0, folder)
    yield importlib.import_module("measure")
    sys.path.remove(folder)


class TestPacked:
    def test_drawn_numbers_lie_around_the_schedule(self, script):
        config = CroprViTConfig.from_size("tiny", token_reducer="svit", reducer_config={"eval_mode": "threshold"})
        kept = [config.kept_patches()[block - 1] for block in config.pruning_blocks]
        for spread in (0.0, 0.1):
            counts = torch.stack([table.sum(dim=1) for table in script.drawn_patches(config, 500, spread)], dim=1)
            share = counts.double() / config.num_patches
            assert (share.mean(dim=0) * config.num_patches - torch.tensor(kept)).abs().max() < 3
            assert (share.std(dim=0) - spread).abs().max() < 0.02

    @pytest.mark.full
    def test_it_measures_and_the_page_shows_it(self, script, render, monkeypatch):
        turns = script.turns
        monkeypatch.setattr(script, "turns", lambda calls, rounds: turns(calls, rounds=(3, 3)))
        records = list(script.packed((("tiny", 64, 3),)))
        assert [record["spread"] for record in records] == [0.0, 0.1, 0.2]
        assert len({*records[0]["patches_left"]}) == 1 < len({*records[2]["patches_left"]})
        assert records[0]["bound"] == pytest.approx(records[0]["bound_of_longest"])
        assert records[2]["bound"] > records[2]["bound_of_longest"]
        assert {*records[0]["results"]} == {"unpruned", "packed", "masked", "one by one"}
        assert len(render.packed_table(records).splitlines()) == 5

    @pytest.mark.full
    @torch.no_grad()
    def test_gates_are_drawn_for_the_right_images(self, script):
        config = svit_config()
        model = make_model(CroprViTModel, config).double().eval()
        for reducer, takes_part in zip(model.token_reducers.values(), script.drawn_patches(config, 4, 0.2)):
            reducer.gate = script.DrawnGate(reducer.gate, takes_part)
        images, alone = make_images(4).double(), []
        together = model(images).last_hidden_state
        hook = model.register_forward_hook(lambda module, args, outputs: alone.append(outputs.last_hidden_state))
        script.one_by_one(model, images)
        hook.remove()
        torch.testing.assert_close(torch.cat(alone), together, rtol=0, atol=1e-10)
