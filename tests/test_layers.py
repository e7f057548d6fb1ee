"""Who may import whom, and how light the environment's room is."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "rlaif_env": {"rewards", "agents", "benchmarks", "tests"},
    "rewards": {"agents", "benchmarks", "tests"},
    "agents": {"rewards", "benchmarks", "tests"},
    "benchmarks": {"tests"},
}
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
