"""Who may import whom, read from the source without importing it."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest


PACKAGE = Path(__file__).resolve().parents[1] / "cropr_hf"

# Modules that travel to the Hub: which of their siblings, and which third-party packages, each may import.
HUB = {"huggingface_hub", "torch", "transformers"}
TRAVELS = {
    "class_names": (set(), {"transformers"}),
    "token_schedule": (set(), set()),
    "configuration_cropr_vit": ({"class_names", "token_schedule"}, {"transformers", "huggingface_hub"}),
    "token_state": (set(), {"torch"}),
    "token_reduction": ({"configuration_cropr_vit", "token_schedule", "token_state"}, HUB),
    "reducer_cropr": ({"configuration_cropr_vit", "token_reduction", "token_state"}, HUB),
    "reducer_random": ({"token_reduction", "token_state"}, HUB),
    "reducers": ({"reducer_cropr", "reducer_random"}, set()),
    "labels": ({"configuration_cropr_vit"}, {"torch"}),
    "joint_weights": (set(), {"torch"}),
    "vit_layers": ({"configuration_cropr_vit", "joint_weights", "token_reduction", "token_state"}, HUB),
    "folders": (set(), set()),
    "saving": ({"configuration_cropr_vit", "folders", "token_reduction"}, {*HUB, "safetensors"}),
    "modeling_cropr_vit": (
        {
            "configuration_cropr_vit",
            "token_schedule",
            "token_reduction",
            "token_state",
            "reducers",
            "labels",
            "vit_layers",
            "saving",
        },
        HUB,
    ),
    "modeling_cropr_vit_segmentation": (
        {"configuration_cropr_vit", "labels", "token_state", "vit_layers", "modeling_cropr_vit"},
        HUB,
    ),
    "detection_heads": ({"configuration_cropr_vit"}, {*HUB, "torchvision"}),
    "modeling_cropr_vit_detection": (
        {"configuration_cropr_vit", "labels", "vit_layers", "modeling_cropr_vit", "detection_heads"},
        {*HUB, "torchvision"},
    ),
    "image_processing_cropr_vit": (set(), HUB),
}
# What a method may import, beside a method that it extends; its file travels as well, when a model needs it.
METHOD = {"configuration_cropr_vit", "token_reduction", "token_schedule", "token_state"}
# The rooms, from left to right: a module imports from its own room or from those to the left.
ROOMS = [
    {"version", "files", "arguments", "images"},
    {*TRAVELS, "modeling_cropr_rf_detr", "sliding_window", "visualization"},
    {"methods", "tasks"},
    {"conversion"},
    {"speed"},
    {"publishing"},
    {"training"},
    {"comparison", "comparison_file"},
    {"cli"},
    {"__init__"},
]
MOST_LINES, MOST_LINES_OF_A_CLASS = 700, 350
FILES = sorted(PACKAGE.rglob("*.py"))
EXAMPLES = sorted(PACKAGE.parent.glob("examples/*.py"))


def dotted(path: Path) -> str:
    """`speed.benchmark`; a folder's `__init__` goes by the folder's name, that of the package by `__init__`."""
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {dotted(path): path for path in FILES}


def syntax_tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imports_of(module: str):
    """(our module, third-party package) of every import at any depth, one of which is `None`."""
    place = MODULES[module].relative_to(PACKAGE).parent.parts
    for node in ast.walk(syntax_tree(module)):
        if isinstance(node, ast.Import):
            yield from ((None, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield None, node.module.partition(".")[0]
        elif isinstance(node, ast.ImportFrom):
            base = [*place[: len(place) - node.level + 1], *filter(None, (node.module or "").split("."))]
            inside = [".".join([*base, alias.name]) for alias in node.names]
            found = [name for name in inside if name in MODULES]
            yield from ((name, None) for name in (found or [".".join(base) or "__init__"]))


def room_of(module: str) -> int:
    (room,) = [index for index, names in enumerate(ROOMS) if module.partition(".")[0] in names]
    return room


@pytest.mark.parametrize("module", sorted(TRAVELS))
def test_what_travels_imports_only_what_its_layer_may(module):
    siblings, packages = TRAVELS[module]
    for ours, package in imports_of(module):
        assert ours in siblings if ours else package in packages | set(sys.stdlib_module_names), ours or package


@pytest.mark.parametrize("module", sorted(TRAVELS))
def test_imports_of_what_travels_are_found_by_the_hub(module):
    """Transformers looks for lines with one dot and one name; others it misses."""
    for node in ast.walk(syntax_tree(module)):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module and "." not in node.module


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.startswith("methods.")))
def test_methods_import_only_the_interface_and_what_they_extend(module):
    for ours, package in imports_of(module):
        if ours:
            assert ours in METHOD or ours.startswith("methods."), ours
        else:
            assert package in {*HUB, "safetensors", *sys.stdlib_module_names}, package


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_imports_upwards(module):
    for ours, _ in imports_of(module):
        if ours is not None:
            assert ours in MODULES, f"{module} imports {ours}, which is not a module"
            assert room_of(ours) <= room_of(module), f"{module} imports {ours}"


def test_there_are_no_circles():
    graph = {module: {ours for ours, _ in imports_of(module) if ours not in (None, module)} for module in MODULES}
    TopologicalSorter(graph).prepare()  # an error that names a circle if there is one


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_prints_or_imports_the_whole_package(module):
    """Only the `main` of a command line prints, the rest logs; `__init__` is imported by nobody."""
    tree = syntax_tree(module)
    commands = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    allowed = {id(node) for command in commands for node in ast.walk(command)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert [call.lineno for call in calls if call.func.id == "print" and id(call) not in allowed] == []
    if module != "__init__":
        assert "cropr_hf" not in {package for _, package in imports_of(module)}
        assert "__init__" not in {ours for ours, _ in imports_of(module)}


@pytest.mark.parametrize("file", [*FILES, *EXAMPLES], ids=lambda file: file.name)
def test_auto_classes_run_no_code_from_a_repository(file):
    """Without the flag Transformers asks on standard input, where a server or a job has nobody."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if node.func.attr == "from_pretrained" and ast.unparse(node.func.value).lower().startswith("auto"):
            assert "trust_remote_code" in {keyword.arg for keyword in node.keywords}, node.lineno


@pytest.mark.parametrize("module", sorted(MODULES))
def test_files_and_classes_can_be_read(module):
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= MOST_LINES
    for node in ast.walk(syntax_tree(module)):
        if isinstance(node, ast.ClassDef):
            # A docstring may be long: that of the configuration explains every field.
            documentation = len((ast.get_docstring(node) or "").splitlines())
            assert node.end_lineno - node.lineno - documentation < MOST_LINES_OF_A_CLASS, node.name


def test_methods_are_named_by_their_own_file_and_the_default_of_the_configuration():
    naming = [name for name, path in MODULES.items() if '"cropr"' in path.read_text(encoding="utf-8")]
    assert sorted(naming) == ["configuration_cropr_vit", "reducer_cropr"]


def test_nothing_that_travels_registers_with_the_auto_classes():
    """Installed code would win over the copy on the Hub; registration belongs into `__init__.py`, never copied."""
    for module in TRAVELS:
        names = {node.id for node in ast.walk(syntax_tree(module)) if isinstance(node, ast.Name)}
        assert not {name for name in names if name.startswith("Auto")}


def test_what_surrounds_the_encoder_does_not_know_the_method_of_the_paper():
    assert [name for name in MODULES if "reducer_cropr" in {ours for ours, _ in imports_of(name)}] == ["reducers"]
