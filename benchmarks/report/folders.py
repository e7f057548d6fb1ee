"""What a run, an evaluation or a comparison folder holds, as a `Report`."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from benchmarks.report.contents import Figure, Report
from benchmarks.report.curves import curves
from benchmarks.report.definitions import definitions_of
from benchmarks.report.findings import as_tables, before_after_table, verdict
from benchmarks.report.samples import Parser, Samples, before_after, preference, read_samples, response, sample
from rlaif_env.api import DataError, RLAIFError
from rlaif_env.data.jsonl import json_object
from rlaif_env.records import read_metrics
from rlaif_env.tables import Cell, Table, is_number

ROOM = 12_000_000
"""Bytes of samples in a page."""

Kind = TypeVar("Kind", dict[str, Any], list[Any], str)

_MAX_FIGURE = 3_000_000
_SIGNATURES = {".png": b"\x89PNG\r\n\x1a\n", ".svg": b"<svg"}
_TYPES = {".png": "image/png", ".svg": "image/svg+xml"}
_TORN = "{} ends within a line, which was left out: the run goes on, or was killed."
_KINDS = {"train": "Training run", "sft": "Fine-tuning run", "train-rm": "Reward model", "label": "Labelling run"}
_FACTS = ("task", "reward", "reward_model", "labels", "mode", "prompt", "model", "trainable", "split", "seed")
_RECORD = ("command_line", "started", "git_commit", "seeds", "versions", "platform", "config")


def read_folder(folder: Path, *, samples: int) -> Report:
    """Read a folder.

    Args:
        folder: Of ``rlaif compare``, ``rlaif evaluate``, or of a command that makes a run folder.
        samples: Show at most so many prompts of each set of samples.

    Raises:
        RLAIFError: If there is no such folder, or none of the files that a report is made from, or ``samples`` < 0.
        DataError: If a file is not what its name says; names the file, and the line where it has lines.
    """
    if samples < 0:
        raise RLAIFError(f"expected samples of at least 0, found {samples}")
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise RLAIFError(f"expected a folder at {folder}, found {found}: name the folder that a command wrote")
    if (folder / "audit.json").exists():
        raise RLAIFError(f"expected a folder without a page of its own, found {folder / 'audit.html'}: open that")
    reader = _Reader(folder, samples)
    evaluation = _json(folder / "evaluation.json")
    if (folder / "comparison.json").exists():
        report = reader.tables(folder / "comparison.json", "Comparison of rewards")
    elif "tables" in evaluation or (folder / "responses.jsonl").exists():
        report = reader.tables(folder / "evaluation.json", "Evaluation of policies")
    elif (folder / "config.json").exists() or (folder / "metrics.jsonl").exists():
        report = reader.run(evaluation)
    else:
        names = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
        raise RLAIFError(
            f"expected {folder} to hold comparison.json, evaluation.json, responses.jsonl or a run's config.json, "
            f"found {names}: name a folder that rlaif train, sft, train-rm, label, evaluate or compare wrote"
        )
    names_of_metrics = (name for row in reader.metrics[-1:] for name in row)
    measured = [*report.facts, *names_of_metrics, *(name for shown in report.samples for name in shown.measures)]
    for table in report.tables:
        measured += [*table.columns, *(row[0] for row in table.rows if row and isinstance(row[0], str))]
    report.definitions = definitions_of(measured)
    return report


class _Reader:
    """Reads one folder; keeps what is left of the page's room for samples."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self.room = ROOM
        self.metrics: list[dict[str, float]] = []
        self.record = _json(folder / "config.json")

    def tables(self, file: Path, kind: str) -> Report:
        """The report of an evaluation or a comparison, whose tables were made when it ran."""
        results = _json(file)
        report = Report(_field(results, "title", str, file) or self.folder.resolve().name, kind)
        facts = _field(results, "facts", dict, file)
        report.facts = {name: _plain(value) for name, value in facts.items() if not isinstance(value, dict)}
        report.advice, report.warnings = (
            [str(text) for text in _field(results, name, list, file)] for name in ("advice", "warnings")
        )
        tables = enumerate(_field(results, "tables", list, file), start=1)
        report.tables = [Table.from_json(table, f"{file}, table {i}") for i, table in tables]
        for i, figure in enumerate(_field(results, "figures", list, file), start=1):
            if not isinstance(figure, dict) or not isinstance(figure.get("file"), str):
                raise DataError(f"{file}, figure {i}: expected an object with a file, found {str(figure)[:60]!r}")
            title, caption = (_field(figure, name, str, file) for name in ("title", "caption"))
            self._picture(report, figure["file"], title, caption)
        report.provenance = {n: v for n in _RECORD if (v := self.record.get(n, results.get(n))) is not None}
        report.provenance |= {name: value for name, value in facts.items() if isinstance(value, dict) and value}
        if read := self._samples(report, "responses.jsonl", response, "Responses side by side"):
            _warn_of_missing(report, read)
            if not report.tables:
                report.tables.append(_means(read))
        return report

    def run(self, evaluation: Mapping[str, Any]) -> Report:
        """The report of a run folder."""
        command, name = str(self.record.get("command", "run")), self.folder.resolve().name
        config, file = self.record.get("config", {}), self.folder / "config.json"
        if not isinstance(config, dict):
            raise DataError(f"{file}: expected config to be an object, found {str(config)[:40]!r}")
        report = Report(name, _KINDS.get(command, f"Run of {command}"))
        report.facts = {n.replace("_", " "): _plain(config[n]) for n in _FACTS if config.get(n) not in (None, "", {})}
        if command == "train" and {"reward", "task"} <= set(report.facts):
            report.title, report.kind = f"{report.facts['reward']} on {report.facts['task']}", f"Training run {name}"
        report.provenance = {n: self.record[n] for n in _RECORD if n in self.record}
        if str(self.record.get("git_commit", "")).endswith("+changes"):
            report.warnings.append("The code had changes that its commit does not hold.")
        for update, what in _field(self.record, "reward_changes", dict, file).items():
            report.warnings.append(f"The reward was changed after update {update}: {what}.")
        self._curves(report, config)
        if command == "train" and evaluation:
            report.tables.append(before_after_table(evaluation, str(self.folder / "evaluation.json")))
            report.lede, warnings = verdict(evaluation)
            report.warnings += warnings
        elif command == "train":
            report.warnings.append("There is no evaluation on held-out prompts: only rewards in training are shown.")
        report.tables += as_tables(_json(self.folder / "report.json"))
        if not report.figures:
            for picture in sorted(self.folder.glob("*.png")):
                self._picture(report, picture.name, picture.stem.replace("-", " "), "")
        self._samples(report, "evaluation.jsonl", before_after, "Held-out prompts, before and after")
        self._samples(report, "samples.jsonl", sample, "Responses during training", growing=True)
        self._samples(report, "preferences.jsonl", preference, "Labelled pairs")
        if not (report.tables or report.figures or report.samples):
            report.warnings.append("The folder holds no results yet.")
        return report

    def _curves(self, report: Report, config: Mapping[str, Any]) -> None:
        file = self.folder / "metrics.jsonl"
        if not file.exists():
            return
        self.metrics = read_metrics(file)
        report.figures += curves(self.metrics)
        if (validation := self.folder / "validation.jsonl").exists():
            report.figures += curves(read_metrics(validation), "validation: ")
        if not file.read_bytes().endswith(b"\n"):
            report.warnings.append(_TORN.format("metrics.jsonl"))
        done, planned = len({row["step"] for row in self.metrics}), config.get("updates")
        if isinstance(planned, int):
            report.facts["updates"] = f"{done:,} of {planned:,}"
            if done < planned:
                report.warnings.append(f"The run has made {done:,} of {planned:,} updates.")

    def _samples(
        self, report: Report, name: str, parse: Parser, title: str, *, growing: bool = False
    ) -> Samples | None:
        """Add a file's samples to the report, if it is there and has any."""
        file = self.folder / name
        if not file.exists() or file.stat().st_size == 0:
            return None
        read = read_samples(file, parse, title=title, limit=self.limit, room=self.room, may_be_torn=growing)
        self.room -= read.size
        if read.torn:
            report.warnings.append(_TORN.format(name))
        if read.shown.total:
            report.samples.append(read.shown)
        return read

    def _picture(self, report: Report, name: str, title: str, caption: str) -> None:
        """Add a picture, or a warning where it is too large for a page."""
        file = (self.folder / name).resolve()
        if not file.is_relative_to(self.folder.resolve()):
            raise DataError(f"expected the figure {name} inside {self.folder}, found a path that leads out of it")
        if file.suffix not in _TYPES:
            raise DataError(f"expected the figure {name} to be a .svg or .png, found another kind of file")
        try:
            data = file.read_bytes()
        except OSError as error:
            raise DataError(f"expected a figure at {file}, found: {error.strerror or error}") from error
        # An SVG may open with a declaration and comments; within an <img> no script of it runs and nothing is fetched.
        if _SIGNATURES[file.suffix] not in data[: 4096 if file.suffix == ".svg" else 8]:
            raise DataError(f"expected {file} to be a picture of the kind {file.suffix}, found {data[:12]!r}")
        if len(data) > _MAX_FIGURE:
            report.warnings.append(f"The figure {name} was left out: {len(data) / 1e6:.1f} MB are too much for a page.")
            return
        uri = f"data:{_TYPES[file.suffix]};base64,{base64.b64encode(data).decode('ascii')}"
        report.figures.append(Figure(title or file.stem, caption, uri=uri))


def _warn_of_missing(report: Report, read: Samples) -> None:
    """A prompt without a system's response, or a response without a measure that others have, is never passed over."""
    for system, missing in read.unanswered.items():
        report.warnings.append(f"{system} has no response to {missing:,} of {read.shown.total:,} prompts.")
    for system, summaries in read.summaries.items():
        for measure in read.shown.measures:
            count, have = read.answers[system], summaries[measure].n if measure in summaries else 0
            if 0 < have < count:
                report.warnings.append(f"{system}: {measure} is missing in {count - have:,} of {count:,} responses.")


def _means(read: Samples) -> Table:
    """Plain means, for a folder that brings no table of its own."""
    measures = read.shown.measures
    rows: list[list[Cell]] = []
    for system, count in read.answers.items():
        own = read.summaries.get(system, {})
        rows.append([system, count, *(own[m].mean if m in own and own[m].n else None for m in measures)])
    caption = "Over all responses that have the measure, without intervals: the folder holds no evaluation.json."
    return Table("Means by system", ["system", "responses", *measures], rows, caption)


def _json(file: Path) -> dict[str, Any]:
    """The object a file holds; {} where there is no file."""
    try:
        return json_object(file.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DataError(f"expected a file to read at {file}, found: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: expected UTF-8, found the byte 0x{error.object[error.start]:02x}") from error
    except DataError as error:
        raise DataError(f"{file}: {error}") from error


def _field(record: Mapping[str, Any], name: str, kind: type[Kind], file: Path) -> Kind:
    """A field of a file's object; empty where it is not there."""
    value = record.get(name, kind())
    if not isinstance(value, kind):
        expected = {dict: "an object", list: "a list", str: "a string"}[kind]
        raise DataError(f"{file}: expected {name} to be {expected}, found {type(value).__name__}")
    return value


def _plain(value: Any) -> Cell:
    """A fact as a cell: a nested value is written as JSON, an object with a name by that."""
    if isinstance(value, dict) and isinstance(value.get("name"), str):
        return str(value["name"])
    if value is None or isinstance(value, str) or is_number(value):
        return cast(Cell, value)
    if isinstance(value, list) and not any(isinstance(item, dict | list) for item in value):
        return ", ".join(map(str, value))
    return json.dumps(value)
