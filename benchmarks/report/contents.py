"""What a report says, before it is a page: facts, warnings, tables, figures, samples, provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlaif_env.tables import Cell, Table


@dataclass(frozen=True)
class Figure:
    """A picture: drawn by `benchmarks.report.curves` (``svg``), or a file's bytes as a data URI (``uri``)."""

    title: str  # its heading
    caption: str = ""  # a sentence below; may be ""
    svg: str = ""  # markup that is put into the page as it is; never anything read from a file
    uri: str = ""  # ``data:image/...``, shown as an image, in which no script runs
    folded: bool = False  # shown only when the reader opens the further curves


@dataclass(frozen=True)
class SampleSet:
    """Prompts, each with the responses of one system or more."""

    title: str  # its heading
    note: str  # what these are, and which were left out and why
    systems: Sequence[str]  # names of who wrote the responses
    measures: Sequence[str]  # names of the numbers that a response may have
    extras: Sequence[str]  # names of the numbers that a prompt may have
    # JSON arrays, already written: ``[prompt, [[system, response, [measure ...], length?] ...], [extra ...],
    # length?]``; system is an index, length that of a text that was cut
    rows: Sequence[str]
    total: int  # how many prompts there are, those left out included


@dataclass
class Report:
    """All of a page."""

    title: str  # the heading
    kind: str  # what the folder is, in two or three words
    lede: str = ""  # the one sentence to take home; may be ""
    advice: list[str] = field(default_factory=list)  # what to do; the words before the first ": " say what one is about
    facts: dict[str, Cell] = field(default_factory=dict)  # what was run, and the figures that matter, by name
    warnings: list[str] = field(default_factory=list)  # what the reader must know before believing a figure
    tables: list[Table] = field(default_factory=list)  # in order, as figures and samples are
    figures: list[Figure] = field(default_factory=list)
    samples: list[SampleSet] = field(default_factory=list)
    definitions: Mapping[str, str] = field(default_factory=dict)  # meanings of the names that occur, by name
    # Command line, versions, commit, configuration: JSON values by name
    provenance: dict[str, Any] = field(default_factory=dict)
