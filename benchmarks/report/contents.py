"""What a report says, before it is a page: facts, warnings, tables, figures, samples, provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlaif_env.tables import Cell, Table


@dataclass(frozen=True)
class Figure:
    """A picture: drawn by `benchmarks.report.curves` (``svg``), or a file's bytes as a data URI (``uri``).

    Attributes:
        title: Its heading.
        caption: A sentence below; may be "".
        svg: Markup that is put into the page as it is; never anything read from a file.
        uri: ``data:image/...``, shown as an image, in which no script runs.
        folded: Shown only when the reader opens the further curves.
    """

    title: str
    caption: str = ""
    svg: str = ""
    uri: str = ""
    folded: bool = False


@dataclass(frozen=True)
class SampleSet:
    """Prompts, each with the responses of one system or more.

    Attributes:
        title: Its heading.
        note: What these are, and which were left out and why.
        systems: Names of who wrote the responses.
        measures: Names of the numbers that a response may have.
        extras: Names of the numbers that a prompt may have.
        rows: JSON arrays, already written:
            ``[prompt, [[system, response, [measure ...], length?] ...], [extra ...], length?]``; system is an index,
            length that of a text that was cut.
        total: How many prompts there are, those left out included.
    """

    title: str
    note: str
    systems: Sequence[str]
    measures: Sequence[str]
    extras: Sequence[str]
    rows: Sequence[str]
    total: int


@dataclass
class Report:
    """All of a page.

    Attributes:
        title: The heading.
        kind: What the folder is, in two or three words.
        lede: The one sentence to take home; may be "".
        facts: What was run, and the figures that matter, by name.
        warnings: What the reader must know before believing a figure.
        tables, figures, samples: In order.
        definitions: Meanings of the names that occur, by name.
        provenance: Command line, versions, commit, configuration: JSON values by name.
    """

    title: str
    kind: str
    lede: str = ""
    facts: dict[str, Cell] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    samples: list[SampleSet] = field(default_factory=list)
    definitions: Mapping[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
