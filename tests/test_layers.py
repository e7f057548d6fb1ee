"""Who may import whom, and how light the environment's room is."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

FORBIDDEN = {
    "rlaif_env": {"rewards", "agents", "benchmarks", "tests"},
    "rewards": {"agents", "benchmarks", "tests"},
    "agents": {"rewards", "benchmarks", "tests"},
    "benchmarks": {"tests"},
}
FLOORS: dict[str, list[set[str]]] = {
    "rlaif_env": [
        {"api", "files"},
        {"batches", "curves", "duel", "ranks", "references", "tables", "statistics", "models"},
        {"data", "records", "servers"},
        {"keywords", "runs"},
        {"options"},
        {"envs"},
        {"cli"},
    ],
    "rewards": [
        {"api", "prompts"},
        {"endpoint"},
        {"language_model"},
        {"direct_score", "compose", "checks"},
        {"labeling", "reward_model"},
        {"group_preference"},
        {"task"},
    ],
    "agents": [
        {"functional", "paid", "settings", "targets", "watch"},
        {"logprobs"},
        {"policy"},
        {"served"},
        {"sampler"},
        {"rollout"},
        {"passes", "answers"},
        {"reinforce", "sft"},
        {"training"},
    ],
    "benchmarks": [{"report", "evaluation"}, {"annotate", "audit", "speed"}, {"comparison"}],
}
"""The rooms and single modules of each package; each imports from its own room and from lower floors only."""

MODULES = [path for room in FORBIDDEN for path in sorted((ROOT / room).rglob("*.py"))]


def imported(source: str) -> set[str]:
    """Top-level names of all modules that a source imports, inside functions too, and by `import_module("...")`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module or "")
        elif isinstance(node, ast.ImportFrom) and node.level > 1:
            found.add("a relative import beyond the package")
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return {name.partition(".")[0] for name in found}


def test_the_reader_sees_every_form_of_import() -> None:
    source = """
import rewards.compose as c
from agents import policy
def f():
    import benchmarks
    importlib.import_module("torch.nn")
    __import__("numpy")
"""
    assert imported(source) == {"rewards", "agents", "benchmarks", "torch", "numpy"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_from_those_below(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    assert imported(path.read_text(encoding="utf-8")) & FORBIDDEN[room] == set()


def imports_of(path: Path) -> set[str]:
    """Full names of the project's modules that a module imports, inside functions too, type checking left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            submodules = {f"{module}.{alias.name}" for alias in node.names} & NAMES.keys()
            found |= submodules or {module}
    return {name for name in found if name.partition(".")[0] in FORBIDDEN}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path): path for path in MODULES}


def floor_of(name: str) -> tuple[int, str]:
    """The floor of a module and its room."""
    package, _, rest = name.partition(".")
    room = rest.partition(".")[0]
    return next(i for i, floor in enumerate(FLOORS[package]) if room in floor), room


@pytest.mark.parametrize("name", [name for name in NAMES if "." in name])
def test_inside_a_package_a_room_imports_only_from_lower_floors(name: str) -> None:
    package, (floor, room) = name.partition(".")[0], floor_of(name)
    for other in imports_of(NAMES[name]):
        if other.startswith(f"{package}."):
            below, other_room = floor_of(other)
            assert other_room == room or below < floor, f"{name} imports {other}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    """A package's `__init__` counts as the door it is, one that resolves names when used as none."""
    lazy = {"rewards", "agents"}
    graph = {name: imports_of(path) - lazy - {name} for name, path in NAMES.items()}
    state: dict[str, int] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert state.get(name) != 1, f"cycle: {' -> '.join((*trail, name))}"
        if state.get(name) == 2 or name not in graph:
            return
        state[name] = 1
        for other in sorted(graph[name]):
            visit(other, (*trail, name))
        state[name] = 2

    for name in graph:
        visit(name, ())


def test_no_folder_has_more_than_fourteen_modules() -> None:
    folders: dict[Path, int] = {}
    for path in MODULES:
        folders[path.parent] = folders.get(path.parent, 0) + (path.name != "__init__.py")
    assert {str(folder): count for folder, count in folders.items() if count > 14} == {}


def test_every_room_has_modules() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in MODULES} == set(FORBIDDEN)


@pytest.mark.parametrize("module", ["rlaif_env", "rlaif_env.api", "rlaif_env.cli", "rlaif_env.runs"])
def test_importing_the_environment_is_light_and_silent(module: str, tmp_path: Path) -> None:
    heavy = ["torch", "transformers", "matplotlib", "tensorboard", "peft", "datasets"]
    code = f"import sys, {module}; print(sorted(set({heavy}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        env={"PATH": "", "RLAIF_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")
    assert not (tmp_path / "cache").exists()
