"""Puts the common tests of the installed Transformers release into a cache folder: `python fetch.py`.

They come from the source distribution of exactly that release, since they change with the library.
"""

import ast
import importlib.metadata
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path


CACHE = Path(__file__).resolve().parents[2] / ".cache"
PACKAGE = "transformers_tests"  # not `tests`: that is the name of the folder of our own tests
MODULES = ("test_modeling_common", "test_backbone_common", "test_configuration_common")

# What the modules import from files that the source distribution leaves out, other than mixin classes.
STUBS = {
    "config_common_kwargs": """{
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["SomeModel"],
    "id2label": {0: "first", 1: "second", 2: "third"},
    "label2id": {"first": 0, "second": 1, "third": 2},
    "problem_type": "multi_label_classification",
}""",
}


def suite_folder() -> Path:
    """Folder to put on `sys.path` for the installed release; it exists once the tests were fetched."""
    return CACHE / f"transformers-tests-{importlib.metadata.version('transformers')}"


def fetch() -> Path:
    """Downloads and unpacks the tests unless they are there, and returns their folder.

    Raises:
        `ValueError`: when pip has no source distribution of the installed version.
    """
    target = suite_folder()
    if target.is_dir():
        return target
    CACHE.mkdir(exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    requirement = f"transformers=={importlib.metadata.version('transformers')}"
    options = ["--no-binary", "transformers", "--no-deps", "--quiet", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory(dir=CACHE) as staging:
        command = [sys.executable, "-m", "pip", "download", requirement, *options, "--dest", staging]
        if subprocess.run(command).returncode:
            raise ValueError(f"pip found no source distribution of {requirement}; install a released version.")
        (archive,) = Path(staging).glob("transformers-*.tar.gz")
        unpacked = Path(staging, "unpacked")
        with tarfile.open(archive) as tar:
            for member in tar.getmembers():
                _, _, name = member.name.partition("/tests/")
                if member.isfile() and name:
                    member.name = f"{PACKAGE}/{name}"
                    tar.extract(member, unpacked, filter="data")
        (unpacked / PACKAGE / "__init__.py").touch()
        for module in MODULES:
            write_stubs(unpacked / PACKAGE / f"{module}.py")
        unpacked.rename(target)
    return target


def write_stubs(module: Path) -> None:
    """Creates the files that `module` imports from its own package and that are not there.

    Raises:
        `ValueError`: when it needs something for which no stub is known.
    """
    for node in ast.walk(ast.parse(module.read_text())):
        if not isinstance(node, ast.ImportFrom) or node.level != 1 or node.module is None:
            continue
        path = module.parent.joinpath(*node.module.split(".")).with_suffix(".py")
        if path.exists():
            continue
        lines = []
        for name in (alias.name for alias in node.names):
            if not name.endswith("Mixin") and name not in STUBS:
                raise ValueError(f"{module.name} imports {name} from {node.module}; add a stub for it to {__file__}.")
            lines.append(f"{name} = {STUBS[name]}" if name in STUBS else f"class {name}:\n    pass\n")
        path.parent.mkdir(exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    print(f"Common tests of Transformers: {fetch()}")
