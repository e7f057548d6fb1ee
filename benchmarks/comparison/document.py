"""A comparison's tables and figures inside a Markdown page, between markers; everything else on the page stays.

    <!-- made by make paper: Every arm against SFT -->
    <!-- end Every arm against SFT -->

A marker names a table or a figure of comparison.json by its title, or "facts", a line that says what was run.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlaif_env.api import DataError
from rlaif_env.files import replacing
from rlaif_env.records import writing
from rlaif_env.tables import Table, count_of

_BEGIN, _END = re.compile(r"<!-- made by make paper: (.+?) -->\s*"), re.compile(r"<!-- end (.+?) -->\s*")
_FACTS = "facts"


def markers(document: Path) -> list[tuple[str, int, int]]:
    """What a page wants: names, each with the lines, counted from 0, of its marker and of its end.

    Raises:
        DataError: If the page cannot be read, wants nothing, or a marker has no end or an end no marker.
    """
    try:
        lines = document.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"expected a page to write tables into at {document}, found {error}") from error
    found: list[tuple[str, int, int]] = []
    opened: tuple[str, int] | None = None
    for number, line in enumerate(lines):
        begin, end = _BEGIN.fullmatch(line), _END.fullmatch(line)
        if (begin and opened) or (end and (opened is None or end[1] != opened[0])):
            wanted = f"<!-- end {opened[0]} --> for line {opened[1] + 1}" if opened else "a marker that this ends"
            raise DataError(
                f"{document}, line {number + 1}: expected {wanted}, found {line.strip()!r}; mend the markers"
            )
        if begin:
            opened = begin[1], number
        if end and opened:
            found.append((*opened, number))
            opened = None
    if opened:
        raise DataError(
            f"{document}, line {opened[1] + 1}: expected <!-- end {opened[0]} --> below it, found none; add it"
        )
    if not found:
        raise DataError(f"expected <!-- made by make paper: NAME --> and <!-- end NAME --> in {document}, found none")
    return found


def write_document(folder: Path, document: Path) -> None:
    """Put a finished comparison's tables and figures between a page's markers; figures are copied to images/ beside it.

    Raises:
        DataError: As `markers`, or if one names what the comparison does not have. The page is not touched then.
    """
    comparison = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    texts = {_FACTS: _facts(comparison["facts"], record)}
    for i, value in enumerate(comparison["tables"], start=1):
        table = Table.from_json(value, f"comparison.json, table {i}")
        texts[table.title] = table.markdown(heading=False)
    figures = {figure["title"]: figure for figure in comparison["figures"]}
    files = {title: f"{document.stem}-{figure['file']}" for title, figure in figures.items()}
    for title, figure in figures.items():
        texts[title] = f"![{title}](images/{files[title]})\n\n{figure['caption']}"
    wanted = markers(document)
    for name, line, _ in wanted:
        if name not in texts:
            raise DataError(
                f"{document}, line {line + 1}: expected one of {', '.join(map(repr, texts))}, found {name!r}; "
                "the comparison has no such table or figure"
            )
    lines = document.read_text(encoding="utf-8").splitlines()
    for name, begin, end in reversed(wanted):
        lines[begin + 1 : end] = ["", texts[name], ""]
    for name in {name for name, *_ in wanted} & figures.keys():
        (document.parent / "images").mkdir(exist_ok=True)
        shutil.copyfile(folder / figures[name]["file"], document.parent / "images" / files[name])
    with writing(document), replacing(document) as stream:
        stream.write(("\n".join(lines) + "\n").encode())


def _facts(facts: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """One line: what was run, on which code, and how long it took."""
    commit, versions = record.get("git_commit"), record["versions"]
    said = [
        f"Task {facts['task']}; arms {facts['arms']}; seeds {facts['seeds']}",
        count_of(facts["held-out prompts"], "held-out prompt"),
        *([f"commit {commit[:12]}"] if commit and "+" not in commit else []),
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"{facts['time of all stages, minutes']} minutes for {count_of(facts['stages'], 'stage')}",
    ]
    return "; ".join(said) + "."
