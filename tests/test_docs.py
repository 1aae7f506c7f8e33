"""README and pages: tables, links and code; that what they tell people to run exists; and the pages about publishing,
serving and deploying, followed word by word, against a small Hub.
"""

import ast
import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import ViTImageProcessor

from cropr_hf import CroprViTForImageClassification
from cropr_hf.cli import build_parser


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

# Runtimes that the development environment does without
OPTIONAL = {"openvino", "executorch"}

SCRIPTS = sorted(
    path.stem for path in (ROOT / "examples").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")
)
# The oldest supported release of Transformers has another name for it.
NEWER_OPTIONS = {"--activation_checkpointing"}


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "docs/demos.md",
        "docs/fine_tune.md",
        "docs/speed.md",
        "docs/speed_details.md",
        "docs/gpu.md",
        "docs/methods.md",
        "docs/schedules.md",
    ],
)
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


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, code) of a page, from top to bottom."""
    return re.findall(r"```(bash|python)\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The words of the command lines of a page, without comments."""
    lines = [line for language, code in blocks(page) if language == "bash" for line in heredoc_free(code).splitlines()]
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def heredoc_free(code: str) -> str:
    """Without the texts that a shell gives to commands, and with one command a line."""
    code = re.sub(r"<<'?(\w+)'?\n.*?^\1$", "", code, flags=re.DOTALL | re.MULTILINE)
    # What is in quotes may go over several lines.
    code = re.sub(r"'[^']*'", lambda text: text[0].replace("\n", " "), code.replace("\\\n", " "))
    return code


def imported(code: str) -> set[str]:
    """Packages that the lines of a program import."""
    return {*re.findall(r"^(?:import|from) (\w+)", code, flags=re.MULTILINE)}


def options_of(text: str) -> set[str]:
    """Those that a help text lists."""
    return {*re.findall(r"--[a-z]\w*", text)}


@pytest.fixture(scope="module")
def helped(example):
    """The help of a script by its name, as `python examples/<name>.py --help` prints it."""
    texts = {}

    def help_of(name: str, capsys, monkeypatch) -> str:
        if name not in texts:
            monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
            capsys.readouterr()
            with pytest.raises(SystemExit) as end:
                example(name).main()
            assert end.value.code == 0
            texts[name] = capsys.readouterr().out
        return texts[name]

    return help_of


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_a_help(script, helped, capsys, monkeypatch):
    text = helped(script, capsys, monkeypatch)
    assert "usage: " in text and len(options_of(text)) > 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_runs_exists(page, helped, capsys, monkeypatch):
    """Scripts and their options, commands and theirs, targets of the Makefile, names that Python imports."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for words in commands(page):
        options = {word.partition("=")[0] for word in words if re.match(r"--[a-z]\w*(=|$)", word)}
        script = next((word for word in words if re.fullmatch(r"examples/\w+\.py", word)), None)
        if script:
            known = options_of(helped(Path(script).stem, capsys, monkeypatch)) | NEWER_OPTIONS
            after = words[words.index(script) :]
            assert {option for option in options if option in after} <= known, words
        elif words[0] == "cropr-hf":
            with pytest.raises(SystemExit):
                build_parser().parse_args([words[1], "--help"])
            assert options <= options_of(capsys.readouterr().out), words
        elif words[0] == "make":
            assert words[1] in targets, words
        for path in words:
            if path.startswith(("examples/", "docs/", "tests/")):
                assert (ROOT / path).exists(), words
    for language, code in blocks(page):
        for node in ast.walk(ast.parse(code)) if language == "python" else ():
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "cropr_hf":
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"from {node.module} import {alias.name}"


@pytest.mark.slow
@pytest.mark.parametrize(("page", "count"), [("publish.md", 8), ("serve.md", 9), ("deploy.md", 11)])
def test_the_page_works_as_it_stands(page, count, folder, hub_server):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, **hub_server.environment, "PATH": path, "PYTHONPATH": str(ROOT)}
    environment["HF_HUB_OFFLINE"] = "0"  # there is a Hub
    followed = [
        (language, code) for language, code in blocks(ROOT / "docs" / page) if not code.startswith("make demo")
    ]
    assert len(followed) == count
    for language, code in followed:
        if any(importlib.util.find_spec(name) is None for name in OPTIONAL & imported(code)):
            continue
        for long, short in SHORTER.items():
            code = code.replace(long, short)
        code = re.sub(r"\bme/", "user/", code)
        command = ["bash", "-ec", code] if language == "bash" else [sys.executable, "-c", code]
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, f"{code}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    if page == "publish.md":
        names = {"digits", "pushed-digits", "demo-digits"}
        assert {f"user/{name}" for name in names} == set(hub_server.repositories)
        card = hub_server.repositories["user/demo-digits"].read("README.md").decode()
        assert "user/photos" in card and "cluttered_digits" in card and "pruning.png" in card
        assert all("modeling_cropr_vit.py" in each.files() for each in hub_server.repositories.values())
