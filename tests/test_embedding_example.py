"""The script that prunes an encoder without labels, and its metrics."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoModel

from cropr_hf.publishing.model_card import read_record
from tests.test_examples import digits_command, history


METRICS = {"eval_loss", "eval_cosine", "eval_retrieval_agreement", "eval_neighbour_overlap"}


@pytest.fixture(scope="module")
def trained(example, tiny_vit, tmp_path_factory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("embedding")
    command = digits_command(tiny_vit, folder, label_column_name="label", num_train_epochs=1, distill_tokens=0.5)
    return folder, example("train_embedding").main([*command, "--benchmark_rounds", "0"])


class TestScript:
    def test_it_trains_compares_and_publishes(self, trained, tiny_vit):
        folder, metrics = trained
        assert METRICS | {"eval_knn_agreement"} <= metrics.keys()
        assert -1 <= metrics["eval_cosine"] <= 1 and 0 <= metrics["eval_knn_agreement"] <= 1
        logs = [entry for entry in history(folder) if "loss" in entry]
        for entry in logs:
            parts = entry["distillation_embedding"] + 0.5 * entry["distillation_tokens"]
            assert entry["loss"] == pytest.approx(
                parts + entry["auxiliary_loss_1"] + entry["auxiliary_loss_2"], abs=2e-3
            )
        model = AutoModel.from_pretrained(folder, trust_remote_code=False)
        assert type(model).__name__ == "CroprViTModel" and not model.config.use_auxiliary_heads
        assert (folder / "preprocessor_config.json").exists()
        record = read_record(folder)
        assert record["training"]["teacher"] == Path(tiny_vit).name
        assert record["training"]["distillation"] == {"embedding": 1.0, "tokens": 0.5, "temperature": 1.0}
        assert str(Path(tiny_vit).parent) not in json.dumps(record)
        (evaluation,) = record["evaluations"]
        assert {"cosine", "retrieval_agreement", "neighbour_overlap", "knn_agreement"} < evaluation["metrics"].keys()

    @pytest.mark.parametrize("reducer", ["tome", pytest.param("random", marks=pytest.mark.full)])
    def test_other_methods_are_compared_without_training(self, reducer, example, tiny_vit, tmp_path):
        command = digits_command(tiny_vit, tmp_path, token_reducer=reducer, do_train=False)
        metrics = example("train_embedding").main(command)
        assert METRICS <= metrics.keys() and "eval_knn_agreement" not in metrics
        assert metrics["eval_loss"] == pytest.approx(1 - metrics["eval_cosine"], abs=1e-4)
        assert not (tmp_path / "model.safetensors").exists()

    @pytest.mark.full
    def test_an_unpruned_model_agrees_with_itself(self, example, tiny_vit, tmp_path):
        command = digits_command(tiny_vit, tmp_path, token_reducer="none", label_column_name="label", do_train=False)
        metrics = example("train_embedding").main(command)
        agreement = {name: value for name, value in metrics.items() if name in METRICS | {"eval_knn_agreement"}}
        assert agreement.pop("eval_loss") == pytest.approx(0, abs=1e-5)
        assert [*agreement.values()] == pytest.approx([1.0] * 4, abs=1e-5)

    @pytest.mark.full
    def test_any_folder_of_images_will_do(self, example, tiny_vit, tmp_path):
        (tmp_path / "images").mkdir()
        for index in range(12):
            pixels = np.random.default_rng(index).integers(0, 255, (40, 60, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
        command = digits_command(tiny_vit, tmp_path / "out", train_dir=str(tmp_path / "images"), num_train_epochs=1)
        del command[2:4]  # the data set name
        metrics = example("train_embedding").main([*command, "--benchmark_rounds", "0"])
        assert METRICS <= metrics.keys()

    @pytest.mark.full
    def test_a_stream_is_read_as_it_is_needed(self, example, tiny_vit, tmp_path):
        command = digits_command(tiny_vit, tmp_path, label_column_name="label", streaming=True, max_steps=2)
        schedule = ["--eval_strategy", "no", "--save_strategy", "no", "--benchmark_rounds", "0"]
        metrics = example("train_embedding").main([*command, *schedule])
        assert METRICS <= metrics.keys() and "eval_knn_agreement" not in metrics

    def test_a_pruned_model_needs_another_teacher(self, example, trained, tiny_vit, tmp_path):
        script = example("train_embedding")
        command = digits_command(str(trained[0]), tmp_path, do_train=False)
        with pytest.raises(ValueError, match="is pruned already; name its unpruned source by --teacher_name_or_path"):
            script.main(command)
        metrics = script.main([*command, "--teacher_name_or_path", tiny_vit])
        assert metrics["eval_cosine"] == pytest.approx(trained[1]["eval_cosine"], abs=1e-4)

    def test_wrong_numbers_are_errors(self, example):
        with pytest.raises(ValueError, match="--gallery_images is 0; give 1 or more"):
            example("train_embedding").UnlabelledArguments(gallery_images=0)


class TestMetrics:
    def test_agreement_is_that_of_naive_loops(self, example, monkeypatch):
        metrics = example("embedding_metrics")
        monkeypatch.setattr(metrics, "QUERIES_AT_ONCE", 4)  # in several pieces
        teacher = torch.randn(13, 6)
        student = teacher + 0.7 * torch.randn(13, 6)

        def order(embeddings: torch.Tensor, index: int) -> list[int]:
            others = [other for other in range(13) if other != index]
            return sorted(others, key=lambda other: -F.cosine_similarity(embeddings[index], embeddings[other], dim=0))

        same = [order(student, index)[0] == order(teacher, index)[0] for index in range(13)]
        shared = [len({*order(student, index)[:3]} & {*order(teacher, index)[:3]}) / 3 for index in range(13)]
        cosines = [F.cosine_similarity(a, b, dim=0).item() for a, b in zip(student, teacher)]
        found = metrics.embedding_agreement(student, teacher, num_neighbours=3)
        assert found == pytest.approx(
            {
                "cosine": sum(cosines) / 13,
                "retrieval_agreement": sum(same) / 13,
                "neighbour_overlap": sum(shared) / 13,
            },
            abs=1e-5,
        )
        assert 0 < found["retrieval_agreement"] < 1
        # Directions count, and lengths do not.
        assert metrics.embedding_agreement(3 * teacher, teacher)["neighbour_overlap"] == 1
        with pytest.raises(ValueError, match="There are 1 embeddings of the model and 1 of the teacher"):
            metrics.embedding_agreement(student[:1], teacher[:1])

    def test_neighbours_vote_for_a_class(self, example):
        metrics = example("embedding_metrics")
        gallery = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.3], [0.0, 1.0], [0.1, 1.0]])
        labels = torch.tensor([2, 1, 1, 0, 0])
        queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        assert metrics.knn_classes(queries, gallery, labels, k=1).tolist() == [2, 0]
        assert metrics.knn_classes(queries, gallery, labels, k=3).tolist() == [1, 0]
        assert metrics.knn_classes(queries, gallery, labels, k=50).tolist() == [0, 0]  # of two classes the first
        assert metrics.knn_agreement(queries, queries.flip(0), gallery, gallery, labels, k=3) == 0
        assert metrics.knn_agreement(queries, queries, gallery, gallery, labels) == 1
