"""Five tasks on one base: the answers to questions about drawn images, and the whole script on a handful of them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def script(example):
    return example("five_tasks")


def test_answers_come_from_the_drawing(script, example):
    painter = example("cluttered_digits").DigitPainter("test")
    seen = {task: set() for task in script.TASKS}
    for index in range(200):
        drawn = painter.draw(index)
        answers = {task: question.answers[question.answer(drawn)] for task, question in script.TASKS.items()}
        digit = int(answers["digit"])
        assert answers["parity"] == ("odd" if digit in (1, 3, 5, 7, 9) else "even")
        assert answers["above_four"] == ("above four" if digit in (5, 6, 7, 8, 9) else "up to four")
        assert answers["loop"] == ("a loop" if digit in (0, 6, 8, 9) else "none")
        assert digit in np.asarray(drawn.label_map)
        for task, answer in answers.items():
            seen[task].add(answer)
    assert {task: set(question.answers) for task, question in script.TASKS.items()} == seen


@pytest.mark.parametrize(("colour", "answer"), [((200, 180, 190), 0), ((160, 250, 240), 1), ((150, 151, 152), 2)])
def test_the_strongest_channel_is_that_of_the_ink(script, colour, answer):
    image, label_map = Image.new("RGB", (8, 8), (255, 255, 255)), Image.new("L", (8, 8), 10)
    image.paste(colour, (2, 2, 5, 5))
    label_map.paste(7, (2, 2, 5, 5))
    assert script.strongest_channel(SimpleNamespace(image=image, label_map=label_map)) == answer


@pytest.mark.full
def test_two_of_the_tasks_on_a_handful_of_images(script, render, tiny_vit, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "TASKS", {task: script.TASKS[task] for task in ("parity", "ink")})
    command = ["--pretrained", tiny_vit, "--output_dir", str(tmp_path), "--diff_share", "0.02"]
    command += ["--train_images", "64", "--test_images", "16", "--pruning_schedule", "30", "15", "15", "15"]
    record = script.main(command)
    assert json.loads((tmp_path / "five_tasks.json").read_text()) == json.loads(json.dumps(record))
    assert str(tmp_path) not in json.dumps(record)
    assert [found["classes"] for found in record["tasks"].values()] == [2, 3]
    for task, found in record["tasks"].items():
        assert found["changed_weights"] > 0 and (tmp_path / f"{task}.safetensors").stat().st_size > 0
        assert found["diff"]["bytes"] < found["full"]["bytes"] and found["full"]["load_ms"] > 0
        assert all(0 <= found[way]["accuracy"] <= 1 for way in ("full", "diff"))
    assert script.table(record) in capsys.readouterr().out
    page = render.five_tasks_table(record)
    assert "| ink | 3 |" in page and "64 training images, 1 epoch, 16 test images" in page
