"""The wheel: what is in it, what is not, and what its names lead to."""

from __future__ import annotations

import configparser
import importlib
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions

import pytest

from tests import ROOT
from tests.test_layers import MODULES, imported

ROOMS = ("rlaif_env", "rewards", "agents", "benchmarks")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    pytest.importorskip("setuptools", minversion="77", reason="setuptools 77 or later is needed to build a wheel")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in (*ROOMS, "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        out,
        source,
    ]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = out.glob("*.whl")
    assert re.fullmatch(r"rlaif_env-\d+\.\d+\.\d+-py3-none-any\.whl", file.name)
    return zipfile.ZipFile(file)


def files(wheel: zipfile.ZipFile) -> set[str]:
    return {name for name in wheel.namelist() if ".dist-info/" not in name}


def metadata(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = (n for n in wheel.namelist() if n.endswith(f".dist-info/{name}"))
    return wheel.read(path).decode()


def test_the_wheel_holds_every_file_of_the_rooms_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    wanted = (".py", ".toml", ".html", "py.typed")
    expected = {
        path.relative_to(ROOT).as_posix() for r in ROOMS for path in (ROOT / r).rglob("*") if path.name.endswith(wanted)
    }
    assert files(wheel) == expected
    assert {f"{room}/py.typed" for room in ROOMS} <= expected


def test_the_metadata(wheel: zipfile.ZipFile) -> None:
    text = metadata(wheel, "METADATA")
    assert "\nName: rlaif-env\n" in text
    assert "\nLicense-Expression: Apache-2.0\n" in text
    assert "\nRequires-Python: >=3.10\n" in text
    assert {"annotate", "integrations", "test"} <= set(re.findall(r"^Provides-Extra: (.+)$", text, re.M))
    assert "Apache License" in metadata(wheel, "licenses/LICENSE")


def test_entry_points_lead_to_functions(wheel: zipfile.ZipFile) -> None:
    parser = configparser.ConfigParser()
    parser.read_string(metadata(wheel, "entry_points.txt"))
    assert dict(parser["console_scripts"]) == {"rlaif": "rlaif_env.cli:main"}
    rewards = dict(parser["rlaif_env.rewards"])
    assert {"direct-llm", "human-rm", "distilled-rm", "compose"} <= set(rewards)
    checks = dict(parser["rlaif_env.checks"])
    assert {"agreement", "length", "noise"} <= set(checks)
    for target in [*parser["console_scripts"].values(), *rewards.values(), *checks.values()]:
        module, _, function = target.partition(":")
        if f"{module.replace('.', '/')}.py" in files(wheel):
            assert callable(getattr(importlib.import_module(module), function)), target


def requirements(text: str) -> dict[str, str]:
    """Lower-cased project names with the rest of their line."""
    pattern = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*(.*)$")
    matches = (pattern.match(line.strip()) for line in text.splitlines() if line.strip() and line[0] != "#")
    return {normal(m[1]): m[2] for m in matches if m}


def normal(name: str) -> str:
    """A project's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_dependency_has_a_lower_bound_and_a_tested_version(wheel: zipfile.ZipFile) -> None:
    lines = re.findall(r"^Requires-Dist: (.+)$", metadata(wheel, "METADATA"), re.M)
    dependencies = requirements("\n".join(lines))
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    tested = requirements(constraints)
    assert all(">=" in rest for rest in dependencies.values()), dependencies
    assert set(dependencies) - set(tested) <= {"llama-cpp-python"}
    assert tested["torch"] == "==2.13.0"
    pins = [line for line in constraints.splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+(; python_version (<|>=) '3\.11')?", line) for line in pins), pins


def test_every_package_that_is_imported_is_declared(wheel: zipfile.ZipFile) -> None:
    declared = set(requirements("\n".join(re.findall(r"^Requires-Dist: (.+)$", metadata(wheel, "METADATA"), re.M))))
    names = {name for path in MODULES for name in imported(path.read_text(encoding="utf-8"))}
    third_party = names - set(sys.stdlib_module_names) - {"tomllib"} - set(ROOMS)  # tomllib: from Python 3.11
    distributions = {module: {normal(d) for d in found} for module, found in packages_distributions().items()}
    undeclared = {name for name in third_party if not distributions.get(name, {normal(name)}) & declared}
    assert undeclared == set()
