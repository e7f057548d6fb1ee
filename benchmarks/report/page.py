"""A `Report` as one HTML page that needs nothing beside itself.

Whatever comes from a file is escaped, and the page's own policy lets no script run but the one whose hash it names; so
model output stays text twice over. The template is page.html; its script shows the samples and sorts the tables, and
without it the tables, figures and the first samples are there all the same.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined, Template

from benchmarks.report.contents import Report
from rlaif_env.tables import Cell, Table, printable

_NUMBER = re.compile(r"\s*([+\-−]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][+\-]?\d+)?)(?![\w-])")


def pieces(report: Report) -> Iterator[str]:
    """The page, part by part, so that a writer needs no second copy of the samples."""
    return _template().generate(report=report)


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, finalize=_visible, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {"without_script": 10, "fold_rows": 30}
    environment.filters |= {
        "cells": _cells,
        "digest": lambda text: base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii"),
        "headings": lambda table: zip(table.columns, _numeric(table), strict=True),
        "parsed": json.loads,
        "provenance": _provenance,
        "shown": lambda cell: _shown(cell, _decimals([cell])),
    }
    return environment.from_string(files("benchmarks.report").joinpath("page.html").read_text(encoding="utf-8"))


def _visible(value: object) -> object:
    """What an expression of the template gives: markup as it is, all else as text to be escaped, its controls shown."""
    return value if hasattr(value, "__html__") else printable(str(value))


class _Cell(NamedTuple):
    """A cell as it is shown: whether it is in a column of numbers, what it is sorted by, and what was rounded."""

    shown: str
    numeric: bool
    value: float | None
    exact: float | None


def _cells(table: Table) -> Iterator[list[_Cell]]:
    """The rows of a table, whose cells carry the numbers they are sorted by."""
    numeric = _numeric(table)
    places = [_decimals(column) for column in _columns(table)]
    for row in table.rows:
        decimals = [_decimals(row)] * len(row) if table.by_row else places
        yield [_cell(cell, is_number, n) for cell, is_number, n in zip(row, numeric, decimals, strict=True)]


def _cell(cell: Cell, numeric: bool, decimals: int) -> _Cell:
    shown = _shown(cell, decimals)
    rounded = numeric and isinstance(cell, float) and not math.isclose(cell, _read(shown), rel_tol=1e-9)
    return _Cell(shown, numeric, _value(cell), cell if rounded and isinstance(cell, float) else None)


def _columns(table: Table) -> Sequence[Sequence[Cell]]:
    return list(zip(*table.rows, strict=True)) or [()] * len(table.columns)


def _numeric(table: Table) -> list[bool]:
    """Which columns hold numbers, or texts that begin with one, and nothing else."""
    there = ([cell for cell in column if cell is not None] for column in _columns(table))
    return [bool(cells) and all(_value(cell) is not None for cell in cells) for cells in there]


def _value(cell: Cell) -> float | None:
    """The number that a cell is sorted by: its own, or the one that its text begins with ("52.8% [45.9%, 59.5%]")."""
    if isinstance(cell, int | float):
        return float(cell)
    match = _NUMBER.match(cell) if cell else None
    return _read(match[1]) if match else None


def _read(text: str) -> float:
    return float(text.replace("−", "-").replace(",", ""))


def _decimals(cells: Iterable[Cell]) -> int:
    """As many decimals as the largest of some numbers bears; 0 where all are whole."""
    numbers = [c for c in cells if isinstance(c, int | float)]
    if all(isinstance(number, int) for number in numbers):
        return 0
    largest = max(map(abs, numbers))
    return 1 if largest >= 100 else 2 if largest >= 10 else 3


def _shown(cell: Cell, decimals: int) -> str:
    if not isinstance(cell, int | float):
        return "–" if cell is None else cell
    if decimals == 0:
        return f"{cell:,}".replace("-", "−")
    small = cell != 0 and abs(cell) < 0.5 * 10**-decimals
    text = f"{cell:.1e}" if small or abs(cell) >= 1e7 else f"{cell:,.{decimals}f}"
    return re.sub("e([+-])0", r"e\1", text).replace("e+", "e").replace("-", "−")


def _provenance(record: Mapping[str, Any]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """How a report was made: its short values, and its nested ones as JSON, each with its name."""
    facts, nested = [], []
    for name, value in record.items():
        title = name.replace("_", " ")
        if name == "command_line" and isinstance(value, list):
            value = " ".join(map(str, value))
        if isinstance(value, dict | list):
            nested.append((title, json.dumps(value, indent=2, ensure_ascii=False)))
        elif value is not None:
            facts.append((title, str(value)))
    return facts, nested
