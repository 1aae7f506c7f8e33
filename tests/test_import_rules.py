"""Who may import whom, read from the source without importing it."""

import ast
import sys
from pathlib import Path

import pytest


PACKAGE = Path(__file__).resolve().parents[1] / "cropr_hf"
CLOSURE = {
    "configuration_cropr_vit",
    "token_reduction",
    "saving",
    "modeling_cropr_vit",
    "modeling_cropr_vit_detection",
}

# Modules of the Hub closure: which of its siblings and which third-party packages each may import.
ALLOWED = {
    "configuration_cropr_vit": (set(), {"transformers", "huggingface_hub"}),
    "token_reduction": ({"configuration_cropr_vit"}, {"torch", "transformers"}),
    "saving": (
        {"configuration_cropr_vit", "token_reduction"},
        {"torch", "transformers", "safetensors", "huggingface_hub"},
    ),
    "modeling_cropr_vit": ({"configuration_cropr_vit", "token_reduction", "saving"}, {"torch", "transformers"}),
    "modeling_cropr_vit_detection": (
        {"configuration_cropr_vit", "token_reduction", "modeling_cropr_vit"},
        {"torch", "torchvision", "transformers"},
    ),
}


# What code from the Hub does where the package is installed.
FROM_THE_PACKAGE = [("modeling_cropr_vit", "cropr_hf.conversion"), ("saving", "cropr_hf.model_card")]


def syntax_tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))


def imports_of(tree: ast.AST):
    """(level, module) of every import, at any depth: `from .a import b` is (1, "a"), `from . import b` (1, "")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


def guarded_imports(tree: ast.AST):
    """Imports of this package inside a `try` that turns a failure into a readable `ImportError`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Try) and any(
            isinstance(handler.type, ast.Name) and handler.type.id == "ImportError" for handler in node.handlers
        ):
            for statement in node.body:
                yield from imports_of(statement)


def closure_modules():
    return sorted(module for module in ALLOWED if (PACKAGE / f"{module}.py").exists())


@pytest.mark.parametrize("module", closure_modules())
def test_closure_imports_only_what_its_layer_may(module):
    siblings, packages = ALLOWED[module]
    tree = syntax_tree(module)
    guarded = set(guarded_imports(tree))
    for level, name in imports_of(tree):
        root = name.partition(".")[0]
        if level:
            assert level == 1 and name in siblings, f"{module} imports {'.' * level}{name}"
        elif (level, name) in guarded and root == "cropr_hf":
            assert (module, name) in FROM_THE_PACKAGE
        else:
            assert root in packages or root in sys.stdlib_module_names, f"{module} imports {name}"


def test_the_core_of_the_closure_is_complete():
    assert CLOSURE - {"modeling_cropr_vit_detection"} <= set(closure_modules())


def test_little_is_imported_from_the_rest_of_the_package():
    guarded = [(module, name) for module in closure_modules() for _, name in guarded_imports(syntax_tree(module))]
    assert [entry for entry in guarded if entry[1].startswith("cropr_hf")] == FROM_THE_PACKAGE


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_prints_or_imports_the_whole_package(path):
    """Only the `main` of a command line prints, the rest logs; `__init__` is imported by nobody."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    commands = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    allowed = {id(node) for command in commands for node in ast.walk(command)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert [call.lineno for call in calls if call.func.id == "print" and id(call) not in allowed] == []
    if path.name != "__init__.py":
        assert (0, "cropr_hf") not in set(imports_of(tree))


def test_nothing_outside_the_package_root_registers_with_the_auto_classes():
    """Installed code would win over the copy on the Hub; registration belongs into `__init__.py`, never copied."""
    for module in closure_modules():
        names = {node.id for node in ast.walk(syntax_tree(module)) if isinstance(node, ast.Name)}
        assert not {name for name in names if name.startswith("Auto")}
