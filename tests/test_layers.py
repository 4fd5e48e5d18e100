"""Import direction (ARCHITECTURE, 8): read from the source text, so that lazy imports count too."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import edge_runtime

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("errors", "engine", "backends", "serving", "cli")  # each imports only what lies before it
RUNTIME_NEEDS = {"numpy", "safetensors", "tokenizers", "yaml", "msgspec"}
LAZY = {
    "minijinja": {"serving/template_worker.py"},
    "llguidance": {"serving/grammar.py", "serving/constraint.py", "serving/grammar_worker.py"},
    "matplotlib": {"cli/plots.py"},
}
# What the builder may know of the runtime beyond the engine and the manner of commands
RUNS = {
    "hidden.py": {"edge_runtime.backends.protocol", "edge_runtime.backends.reference"},
    "runner.py": {
        "edge_runtime.backends.numpy_weights",
        "edge_runtime.backends.protocol",
        "edge_runtime.backends.reference",
    },
    "task.py": {"edge_runtime.serving.chat", "edge_runtime.serving.tokenizer"},
    "trellis.py": {"edge_runtime.backends.cpu"},  # whose library searches codes
    # What a model is calibrated on must be, id for id, what it will be asked
    "texts.py": {"edge_runtime.serving.chat", "edge_runtime.serving.tokenizer"},
    "prefix.py": {"edge_runtime", "edge_runtime.open_engine", "edge_runtime.serving.prefix_file"},
}


def imports(path: Path, top_only: bool = False) -> Iterator[str]:
    """Dotted names that a file imports; `top_only`: those that loading it imports, so not in functions."""
    for name, inside in _walk(ast.parse(path.read_text(encoding="utf-8")), False):
        if not (top_only and inside):
            yield name


def _walk(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, inside) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute in this project"
            module = child.module or ""
            yield module, inside
            yield from ((f"{module}.{alias.name}", inside) for alias in child.names)
        else:
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            checking = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            yield from _walk(child, inside or function or checking)


def files(folder: str) -> list[Path]:
    return sorted(p for p in (ROOT / folder).rglob("*.py") if "__pycache__" not in p.parts)


RUNTIME, BUILDERS = files("edge_runtime"), files("builders")


def floor_of(path: Path) -> str:
    return path.relative_to(ROOT / "edge_runtime").parts[0].removesuffix(".py")


def test_there_is_something_to_check() -> None:
    assert {floor_of(p) for p in RUNTIME} == {*FLOORS, "__init__"}
    assert any(p.name == "runner.py" for p in BUILDERS)


@pytest.mark.parametrize("path", RUNTIME, ids=lambda p: str(p.relative_to(ROOT)))
def test_each_floor_imports_only_lower_ones(path: Path) -> None:
    floor = floor_of(path)
    allowed = set(FLOORS) if floor == "__init__" else set(FLOORS[: FLOORS.index(floor) + 1])
    for name in imports(path):
        if name.startswith("edge_runtime."):
            assert name.split(".")[1] in allowed, f"{floor} imports {name}"


@pytest.mark.parametrize("path", RUNTIME, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_runtime_needs_only_its_five_libraries(path: Path) -> None:
    where = str(path.relative_to(ROOT / "edge_runtime"))
    for top_only in (True, False):
        for name in imports(path, top_only):
            library = name.split(".")[0]
            if library in sys.stdlib_module_names or library in RUNTIME_NEEDS | {"edge_runtime"}:
                continue
            assert not top_only and where in LAZY.get(library, ()), f"{where} imports {name}"


@pytest.mark.parametrize("path", BUILDERS, ids=lambda p: str(p.relative_to(ROOT)))
def test_builders_know_the_engine_and_no_more(path: Path) -> None:
    where = str(path.relative_to(ROOT / "builders"))
    for name in imports(path):
        if name.split(".")[0] != "edge_runtime":
            continue
        module = name if name == "edge_runtime" else ".".join(name.split(".")[:3])
        allowed = module.startswith(("edge_runtime.engine", "edge_runtime.errors", "edge_runtime.cli.output"))
        allowed |= module == "edge_runtime.cli"  # `from edge_runtime.cli.output import` names it on the way
        allowed |= module in RUNS.get(where, ())
        assert allowed, f"{where} imports {name}"


NODES = files("ros2_nodes")
# Files of edge_nodes that know ROS; the others are tested, and could be used, without it
KNOW_ROS = {
    "activation",
    "answers",
    "deferred_action",
    "diagnostics",
    "edge_node",
    "goal_server",
    "language_node",
    "launching",
    "parameters",
    "plan_answer",
    "planner_node",
    "qos",
    "rejections",
    "spinning",
    "text_topic",
    "translation",
}
ROS = {"rclpy", "launch", "launch_ros", "edge_interfaces", "std_msgs", "lifecycle_msgs", "diagnostic_msgs"}
ROS |= {"rcl_interfaces", "action_msgs"}


@pytest.mark.parametrize("path", NODES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nodes_know_public_names_of_the_runtime_and_most_know_no_ros(path: Path) -> None:
    public = {f"edge_runtime.{name}" for name in edge_runtime.__all__} | {"edge_runtime"}
    for name in imports(path):
        library = name.split(".")[0]
        assert library != "edge_runtime" or name in public, f"{path.name} imports {name}"
        assert library not in HEAVY | {"builders"}, f"{path.name} imports {name}"
        inside = path.parent.name == "edge_nodes" and path.name not in ("setup.py",)
        if library in ROS and inside:
            assert path.stem in KNOW_ROS, f"{path.name} imports {name}"


HEAVY = {"torch", "onnx", "transformers", "scipy", "gguf", "ray"}


def test_the_runtime_loads_no_heavy_library_and_no_other_folder() -> None:
    for path in files("edge_runtime"):
        loaded = {name.split(".")[0] for name in imports(path, top_only=True)}
        assert not loaded & (HEAVY | {"rclpy", "ros2_nodes", "examples", "tests", "builders"}), path


def test_edge_build_loads_no_heavy_library_until_it_needs_one() -> None:
    """A module that imports torch when it is loaded is imported only by such modules, or in a function."""
    heavy: set[str] = set()
    loads = {_module(path): {*imports(path, top_only=True)} for path in BUILDERS}
    while found := {
        name
        for name, needs in loads.items()
        if name not in heavy and ({n.split(".")[0] for n in needs} & HEAVY or needs & heavy)
    }:
        heavy |= found
    assert "builders.torch_program" in heavy
    assert not heavy & {"builders.cli", "builders.pipeline", "builders.planner", "builders.quantize.rtn"}
    for path in BUILDERS:
        loaded = {name.split(".")[0] for name in imports(path, top_only=True)}
        assert not loaded & {"rclpy", "ros2_nodes", "examples", "tests"}, path


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_a_wrong_import_would_be_found(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text(
        "import numpy.linalg\n"
        "from edge_runtime.cli import run\n"
        "if TYPE_CHECKING:\n    import torch\n"
        "def f():\n    import onnx\n"
    )
    assert set(imports(bad)) == {"numpy.linalg", "edge_runtime.cli", "edge_runtime.cli.run", "torch", "onnx"}
    assert set(imports(bad, top_only=True)) == {"numpy.linalg", "edge_runtime.cli", "edge_runtime.cli.run"}
