"""The wheel in an environment that holds nothing else of ours: what is in it, its command, and the code it publishes.

Everything that the package depends on comes from the environment that runs the tests, along a path in a `.pth` file.
Such a path brings modules alone; `.pth` files that lie there, like that of an editable installation, are not read.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file


pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[1]
SOURCES = ("cropr_hf", "examples", "tests", "LICENSE", "README.md", "pyproject.toml")

# The package answers where it is installed, the code in the folder elsewhere.
LOADER = """
import importlib.util, sys
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification
source, results, home = sys.argv[1:]
if home == "cropr_hf":
    import cropr_hf
    assert Path(cropr_hf.__file__).is_relative_to(sys.prefix), cropr_hf.__file__
else:
    assert importlib.util.find_spec("cropr_hf") is None
model = AutoModelForImageClassification.from_pretrained(source, trust_remote_code=home != "cropr_hf")
assert type(model).__module__.partition(".")[0] == home
outputs = model(load_file("images.safetensors")["images"], output_pruning=True)
outputs = {"logits": outputs.logits, "pruned_after_block": outputs.pruned_after_block}
save_file({name: values.contiguous() for name, values in outputs.items()}, results)
model.save_pretrained(home + "_saved")
"""


def run(*command, cwd: Path) -> str:
    """A command's output; nothing of the checkout is in its reach but what it is given."""
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    variables.update(HF_HUB_OFFLINE="1", HF_MODULES_CACHE=str(cwd / "modules"))
    command = [str(part) for part in command]
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=variables, check=False)
    assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built as users do by `python -m build`, the wheel out of the source distribution, on a copy of the checkout.

    Without isolation, as the test suite needs no network: the build backend is that of the development environment.
    """
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", target, source, cwd=target)
    (archive,) = target.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        assert {name.split("/")[1] for name in file.getnames() if "/" in name} >= {"cropr_hf", "LICENSE", "README.md"}
    (wheel,) = target.glob("*.whl")
    return wheel


def make_environment(folder: Path) -> Path:
    """The interpreter of an empty virtual environment."""
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python"


def lend_dependencies(python: Path) -> None:
    """Puts the packages of the running environment in the reach of another one, after its own."""
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=python.parent).strip()
    folders = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    (Path(purelib) / "dependencies.pth").write_text("\n".join(folders) + "\n")


@pytest.fixture(scope="module")
def with_package(wheel, tmp_path_factory) -> Path:
    """An interpreter that has the wheel."""
    python = make_environment(tmp_path_factory.mktemp("with_package"))
    options = ("install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps")
    run(sys.executable, "-m", "pip", "--python", python, *options, wheel, cwd=wheel.parent)
    lend_dependencies(python)
    return python


@pytest.fixture(scope="module")
def without_package(tmp_path_factory) -> Path:
    """An interpreter that has what the package depends on, and not the package."""
    python = make_environment(tmp_path_factory.mktemp("without_package"))
    lend_dependencies(python)
    return python


def test_the_wheel_holds_the_package_and_its_licence(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        facts = message_from_bytes(file.read(metadata))
    info = metadata.partition("/")[0]
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "cropr_hf").rglob("*") if path.is_file()}
    assert {name for name in names if not name.startswith(info)} == {
        name for name in sources if "__pycache__" not in name
    }
    assert {"cropr_hf/py.typed", f"{info}/licenses/LICENSE", f"{info}/entry_points.txt"} <= names
    assert facts["License-Expression"] == "Apache-2.0"
    core = [entry for entry in facts.get_all("Requires-Dist") if "extra ==" not in entry]
    assert len(core) >= 8 and [entry for entry in core if not re.search(r">=\d", entry)] == []


def test_the_command_converts_and_the_code_makes_a_round_trip(with_package, without_package, tiny_vit, tmp_path):
    command = with_package.with_name("cropr-hf")
    usage = run(command, "--help", cwd=tmp_path)
    assert "convert" in usage and "benchmark" in usage
    fields = json.dumps({"pruning_rate": 4, "num_labels": 3})
    run(command, "convert", tiny_vit, "converted", "--with_code", "--config", fields, cwd=tmp_path)
    assert (tmp_path / "converted" / "preprocessor_config.json").exists()
    assert list((tmp_path / "converted").glob("modeling_*.py"))
    assert "# converted" in (tmp_path / "converted" / "README.md").read_text(encoding="utf-8")  # by the template

    save_file({"images": torch.randn(2, 3, 48, 48)}, tmp_path / "images.safetensors")
    run(with_package, "-c", LOADER, "converted", "package.safetensors", "cropr_hf", cwd=tmp_path)
    run(without_package, "-c", LOADER, "converted", "code.safetensors", "transformers_modules", cwd=tmp_path)
    run(with_package, "-c", LOADER, "transformers_modules_saved", "again.safetensors", "cropr_hf", cwd=tmp_path)
    expected = load_file(tmp_path / "package.safetensors")
    assert expected["logits"].shape == (2, 3) and (expected["pruned_after_block"] < 4).any()
    for name in ("code", "again"):
        results = load_file(tmp_path / f"{name}.safetensors")
        assert all(torch.equal(results[key], values) for key, values in expected.items()), name
