"""A `Report` as one HTML page that needs nothing beside itself.

Whatever comes from a file is escaped, and the page's own policy lets no script run but the one whose hash it names; so
model output stays text twice over. The template is page.html; its script shows the samples and sorts the tables, and
without it the tables, figures and the first samples are there all the same.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from benchmarks.report.contents import Figure, Report, SampleSet
from rlaif_env.api import DataError
from rlaif_env.tables import Cell, Table

__all__ = ["pieces"]

_WITHOUT_SCRIPT = 10
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_NUMBER = re.compile(r"\s*([+\-−]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][+\-]?\d+)?)(?![\w-])")
_FOLD_ROWS = 30


def pieces(report: Report) -> Iterator[str]:
    """The page, part by part, so that a writer needs no second copy of the samples."""
    template = _template()
    values = {"policy": _policy(template), "title": _text(report.title)}
    for part in re.split(r"(\[\[\w+\]\])", template):
        if part == "[[body]]":
            yield from _body(report)
        else:
            yield values.get(part[2:-2], part) if part.startswith("[[") else part


@cache
def _template() -> str:
    return files("benchmarks.report").joinpath("page.html").read_text(encoding="utf-8")


def _policy(template: str) -> str:
    """The page's content security policy: its own style and script, images within it, nothing else."""
    hashes = {}
    for tag in ("style", "script"):
        found = re.search(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
        if found is None:
            raise DataError(
                f"expected the page's template to hold a {tag} element, found none: install the package again"
            )
        digest = hashlib.sha256(found[1].encode("utf-8")).digest()
        hashes[tag] = base64.b64encode(digest).decode("ascii")
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes['style']}'; "
        f"script-src 'sha256-{hashes['script']}'; base-uri 'none'; form-action 'none'"
    )


def _body(report: Report) -> Iterator[str]:
    sections = {
        "results": ("Results", report.tables),
        "figures": ("Figures", report.figures),
        "samples": ("Samples", report.samples),
        "definitions": ("What the measures mean", report.definitions),
        "provenance": ("How this was made", report.provenance),
    }
    there = {name: title for name, (title, content) in sections.items() if content}
    yield f'<header><p class="kind">{_text(report.kind)}</p><h1><bdi>{_text(report.title)}</bdi></h1>'
    if report.lede:
        yield f'<p class="lede">{_text(report.lede)}</p>'
    if report.facts:
        yield '<dl class="facts">' + "".join(_fact(n, v) for n, v in report.facts.items()) + "</dl>"
    if report.warnings:
        items = "".join(f"<li>{_text(w)}</li>" for w in report.warnings)
        yield f'<ul class="warnings" aria-label="Warnings">{items}</ul>'
    yield '<nav aria-label="Contents">' + "".join(f'<a href="#{n}">{t}</a>' for n, t in there.items()) + "</nav>"
    yield "</header>\n<main>\n"
    written: dict[str, Callable[[], Iterator[str]]] = {
        "results": lambda: map(_table, report.tables),
        "figures": lambda: _figures(report.figures),
        "samples": lambda: _samples(report.samples),
        "definitions": lambda: _definitions(report.definitions),
        "provenance": lambda: _provenance(report.provenance),
    }
    for name, title in there.items():
        yield f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>\n'
        yield from written[name]()
        yield "</section>\n"
    yield "</main>\n<footer>Made by rlaif report. This page is one file and loads nothing.</footer>\n"


def _fact(name: str, value: Cell) -> str:
    return f"<div><dt>{_text(name)}</dt><dd><bdi>{_shown(value, _decimals([value]))}</bdi></dd></div>"


def _table(table: Table) -> str:
    """A table whose cells carry the numbers they are sorted by."""
    columns = list(zip(*table.rows, strict=True)) or [()] * len(table.columns)
    numeric = [_is_numeric(column) for column in columns]
    places = [_decimals(column) for column in columns]
    head = "".join(
        f'<th scope="col"{_attributes(is_number)}><bdi>{_text(name)}</bdi></th>'
        for name, is_number in zip(table.columns, numeric, strict=True)
    )
    lines = []
    for row in table.rows:
        decimals = [_decimals(row)] * len(row) if table.by_row else places
        cells = zip(row, numeric, decimals, strict=True)
        lines.append("<tr>" + "".join(_cell(cell, is_number, n) for cell, is_number, n in cells) + "</tr>")
    name = _text(table.title)
    caption = f'<p class="note">{_text(table.caption)}</p>' if table.caption else ""
    body = (
        f'<div class="scroll" role="region" aria-label="{name}" tabindex="0"><table class="sortable">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )
    if len(table.rows) > _FOLD_ROWS:
        body = f"<details><summary>Show {len(table.rows):,} rows</summary>{body}</details>"
    return f'<div class="table"><h3><bdi>{name}</bdi></h3>{caption}{body}</div>\n'


def _attributes(is_number: bool) -> str:
    return ' class="number" data-kind="number"' if is_number else ""


def _cell(cell: Cell, is_number: bool, decimals: int) -> str:
    shown = _shown(cell, decimals)
    if not is_number:
        return f"<td><bdi>{shown}</bdi></td>"
    value = _value(cell)
    if value is None:
        return f'<td class="number">{shown}</td>'
    rounded = isinstance(cell, float) and not math.isclose(cell, _read(shown), rel_tol=1e-9)
    exact = f' title="{cell!r}"' if rounded else ""
    return f'<td class="number" data-value="{value!r}"{exact}>{shown}</td>'


def _is_numeric(cells: Sequence[Cell]) -> bool:
    there = [cell for cell in cells if cell is not None]
    return bool(there) and all(_value(cell) is not None for cell in there)


def _value(cell: Cell) -> float | None:
    """The number that a cell is sorted by: its own, or the one that its text begins with ("52.8% [45.9%, 59.5%]")."""
    if isinstance(cell, int | float):
        return float(cell)
    found = _NUMBER.match(cell) if cell else None
    return _read(found[1]) if found else None


def _read(text: str) -> float:
    return float(text.replace("−", "-").replace(",", ""))


def _decimals(cells: Sequence[Cell]) -> int:
    """As many decimals as the largest of some numbers bears; 0 where all are whole."""
    numbers = [abs(c) for c in cells if isinstance(c, int | float)]
    if all(isinstance(c, int) for c in cells if isinstance(c, int | float)) or not numbers:
        return 0
    largest = max(numbers)
    return 1 if largest >= 100 else 2 if largest >= 10 else 3


def _shown(cell: Cell, decimals: int) -> str:
    """A cell as markup."""
    if isinstance(cell, int | float):
        return _number(cell, decimals)
    return _text("–" if cell is None else cell)


def _number(value: float, decimals: int) -> str:
    if decimals == 0:
        return f"{value:,}".replace("-", "−")
    small = value != 0 and abs(value) < 0.5 * 10**-decimals
    text = f"{value:.1e}" if small or abs(value) >= 1e7 else f"{value:,.{decimals}f}"
    return re.sub("e([+-])0", r"e\1", text).replace("e+", "e").replace("-", "−")


def _figures(figures: Sequence[Figure]) -> Iterator[str]:
    yield '<div class="figures">' + "".join(_figure(f) for f in figures if not f.folded) + "</div>"
    if folded := [f for f in figures if f.folded]:
        inner = "".join(map(_figure, folded))
        yield f'<details><summary>{len(folded)} further curves</summary><div class="figures">{inner}</div></details>'


def _figure(figure: Figure) -> str:
    caption = f"<p>{_text(figure.caption)}</p>" if figure.caption else ""
    alternative = _text(f"{figure.title}. {figure.caption}".strip())
    picture = figure.svg or f'<img src="{figure.uri}" alt="{alternative}">'
    return f"<figure><h3>{_text(figure.title)}</h3>{picture}<figcaption>{caption}</figcaption></figure>\n"


def _samples(sets: Sequence[SampleSet]) -> Iterator[str]:
    """What is shown without a script, and the data the script shows the rest from."""
    yield '<div id="sample-browser">'
    for samples in sets:
        few = samples.rows[:_WITHOUT_SCRIPT]
        note = f"The first {len(few)} of {samples.total:,} prompts; the others need JavaScript. {samples.note}"
        yield f'<div class="table"><h3>{_text(samples.title)}</h3><p class="note">{_text(note)}</p></div>'
        for row in few:
            yield _card(json.loads(row), samples)
    yield "</div>\n"
    for samples in sets:
        head = {"title": samples.title, "note": samples.note, "systems": samples.systems, "measures": samples.measures}
        head |= {"extras": samples.extras}
        # "<" ends no script element when it is written as \u003c; ASCII holds every other oddity.
        yield f'<script type="application/json">{json.dumps(head).replace("<", chr(92) + "u003c")[:-1]},"rows":['
        for i, row in enumerate(samples.rows):
            yield f"{',' if i else ''}\n{row}"
        yield "]}</script>\n"


def _card(row: list[Any], samples: SampleSet) -> str:
    prompt, answers = row[:2]
    blocks = []
    for who, text, values, *_ in answers:
        known = zip(samples.measures, values, strict=True)
        items = "".join(
            f"<div><dt>{_text(n)}</dt><dd>{_number(v, _decimals([v]))}</dd></div>" for n, v in known if v is not None
        )
        blocks.append(
            f'<div class="answer"><h4><bdi>{_text(samples.systems[who])}</bdi></h4><div class="text" dir="auto">'
            f'{_text(text[:1500])}{" …" if len(text) > 1500 else ""}</div><dl class="measures">{items}</dl></div>'
        )
    return (
        f'<article class="card"><div class="text prompt" dir="auto">{_text(prompt[:1500])}</div>'
        f'<div class="answers">{"".join(blocks)}</div></article>'
    )


def _definitions(definitions: Mapping[str, str]) -> Iterator[str]:
    items = "".join(f"<dt>{_text(name)}</dt><dd>{_text(meaning)}</dd>" for name, meaning in definitions.items())
    yield f'<dl class="definitions">{items}</dl>\n'


def _provenance(record: Mapping[str, Any]) -> Iterator[str]:
    facts, nested = [], []
    for name, value in record.items():
        title = name.replace("_", " ")
        if name == "command_line" and isinstance(value, list):
            value = " ".join(str(word) for word in value)
        if isinstance(value, dict | list):
            nested.append((title, json.dumps(value, indent=2, ensure_ascii=False)))
        elif value is not None:
            facts.append((title, str(value)))
    if facts:
        yield f'<dl class="definitions">{"".join(f"<dt>{_text(n)}</dt><dd>{_text(v)}</dd>" for n, v in facts)}</dl>'
    for title, text in nested:
        yield f"<details><summary>{_text(title)}</summary><pre>{_text(text)}</pre></details>\n"


def _text(value: object) -> str:
    """A value as the text of an element or an attribute; control characters as their pictures."""
    return html.escape(_CONTROL.sub(_picture, str(value)))


def _picture(found: re.Match[str]) -> str:
    code = ord(found[0])
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"
