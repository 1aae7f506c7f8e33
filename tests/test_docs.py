"""README and pages: tables, links and code; and the pages about publishing, serving and deploying, followed word by
word, against a small Hub.
"""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import ViTImageProcessor

from cropr_hf import CroprViTForImageClassification


ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"```(\w*)\n(.*?)```", flags=re.DOTALL)
FIELDS = {"pruning_schedule": [144, 96, 56, 24, 24, 24], "last_layer_fusion": False}
# What would take minutes, and takes seconds this way.
SHORTER = {
    'pip install -e ".[export]"\n': "",
    "--split test": "--split test --max_eval_samples 16",
    "--max_train_samples 320 --max_eval_samples 64": "--max_train_samples 32 --max_eval_samples 8 --use_cpu True",
    "--batch_size 64": "--batch_size 2 --min_rounds 3 --max_rounds 3",
    "--clients 16 --seconds 10 --rounds 5": "--clients 4 --seconds 1 --rounds 1",
    "--clients 16 --seconds 12 --rounds 5": "--clients 2 --seconds 1 --rounds 1",
    "--batch_size 1\n": "--batch_size 1 --min_rounds 3 --max_rounds 3\n",
}


@pytest.fixture(scope="module")
def render():
    """The script that writes tables."""
    spec = importlib.util.spec_from_file_location("render_pages", ROOT / "docs" / "render.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["README.md", "docs/demos.md", "docs/speed.md", "docs/schedules.md"])
def test_tables_say_what_the_records_say(name, render):
    assert render.page(name) == (ROOT / name).read_text(encoding="utf-8"), "run `make pages`"


def test_every_table_of_a_record_is_rendered(render):
    marked = {
        f"{page.relative_to(ROOT).as_posix()}: {table}"
        for page in PAGES
        for table in re.findall(r"<!-- table: (\w+) -->", page.read_text(encoding="utf-8"))
    }
    assert marked == {f"{page}: {table}" for page, tables in render.PAGES.items() for table in tables}


@pytest.mark.parametrize(
    ("task", "card"),
    [
        ("image_classification", "digits_classification"),
        ("semantic_segmentation", "digits_segmentation"),
        ("instance_segmentation", "digits_instance_segmentation"),
    ],
)
def test_records_of_demos_agree_with_the_model_cards(task, card):
    record = json.loads((ROOT / "docs" / "demos" / f"{task}.json").read_text(encoding="utf-8"))
    published = json.loads((ROOT / "model_cards" / card / "record.json").read_text(encoding="utf-8"))
    (cropr,) = (row for row in record["rows"] if row["model"] == "Cropr")
    (test,) = (evaluation for evaluation in published["evaluations"] if evaluation["split"] == "test")
    assert cropr["metrics"] == pytest.approx({name: test["metrics"][name] for name in cropr["metrics"]}, abs=6e-4)
    assert cropr["parameters"] == published["model"]["num_parameters"]
    assert record["arguments"]["pruning_schedule"] == published["model"]["patches_kept"]


def anchors(page: Path) -> set[str]:
    """Names of the headings of a page, as links have them."""
    headings = re.findall(r"^#+ (.+)$", CODE.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", page.read_text(encoding="utf-8"))):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}; there are {anchors(target)}"


def test_every_page_is_linked_from_the_readme():
    links = re.findall(r"\]\((docs/\w+\.md)\)", README.read_text(encoding="utf-8"))
    assert {ROOT / link for link in links} == {*PAGES} - {README}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_code_is_valid(page):
    for language, code in CODE.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            ast.parse(code, filename=page.name)


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 160


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkout in which the demo has run."""
    for name in ("docs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    model = CroprViTForImageClassification.from_vit(ROOT / "examples" / "digits_vit", **FIELDS)
    processor = ViTImageProcessor.from_pretrained(ROOT / "examples" / "digits_vit")
    for name in ("outputs/demo/cropr", "outputs/run/checkpoint-5000"):
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    return tmp_path


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, code) of a page, from top to bottom."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return [(language, code) for language, code in CODE.findall(text) if language in ("bash", "python")]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "count"), [("publish.md", 9), ("serve.md", 9), ("deploy.md", 7)])
def test_the_page_works_as_it_stands(page, count, folder, hub_server):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, **hub_server.environment, "PATH": path, "PYTHONPATH": str(ROOT)}
    environment["HF_HUB_OFFLINE"] = "0"  # there is a Hub
    followed = [(language, code) for language, code in blocks(page) if not code.startswith("make demo")]
    assert len(followed) == count
    for language, code in followed:
        for long, short in SHORTER.items():
            code = code.replace(long, short)
        code = re.sub(r"\bme/", "user/", code)
        command = ["bash", "-ec", code] if language == "bash" else [sys.executable, "-c", code]
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, f"{code}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    if page == "publish.md":
        names = {"digits", "pushed-digits", "demo-digits", "digits-with-code"}
        assert {f"user/{name}" for name in names} == set(hub_server.repositories)
        card = hub_server.repositories["user/demo-digits"].read("README.md").decode()
        assert "user/photos" in card and "cluttered_digits" in card and "pruning.png" in card
        assert "modeling_cropr_vit.py" in hub_server.repositories["user/digits-with-code"].files()
