"""The pages about publishing, serving and deploying, followed word by word, against a small Hub."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import ViTImageProcessor

from cropr_hf import CroprViTForImageClassification


ROOT = Path(__file__).resolve().parents[1]
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

pytestmark = pytest.mark.slow


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
    return re.findall(r"```(bash|python)\n(.*?)```", text, flags=re.DOTALL)


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
