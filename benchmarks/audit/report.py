"""An audit as a page, as JSON and as a table for a terminal: the worst first, each figure with its interval."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.audit.api import Finding, Verdict
from benchmarks.audit.subject import Subject
from benchmarks.audit.verdicts import SUSPECT
from benchmarks.report.contents import Report
from benchmarks.report.page import pieces
from rlaif_env.files import replacing
from rlaif_env.records import write_json
from rlaif_env.statistics import Interval, interval_text
from rlaif_env.tables import Cell, Table

if TYPE_CHECKING:
    from benchmarks.audit.command import Audit

ORDER: tuple[Verdict, ...] = ("flag", "unclear", "ok", "figure")

_WORDS: dict[Verdict, str] = {"flag": "FLAG", "unclear": "unclear", "ok": "ok", "figure": "–"}

_RULE = (
    "FLAG: the whole interval lies beyond the bound, at the level that all judged figures of the audit share. ok: the "
    "whole interval shown lies within it. unclear: neither; more --texts or samples narrow it. –: nothing to judge by."
)


def figure_text(estimate: Interval, unit: str) -> str:
    """A figure with its interval, or alone where it is exact, in its unit."""
    scale, form = (100.0, ".0f") if unit == "share" else (1.0, ".2f")
    if unit in ("", "s") and 0 < abs(estimate.estimate) < 0.1:
        form = ".2g"
    sign = {"share": "%", "": ""}.get(unit, f" {unit}")
    exact = estimate.low == estimate.high == estimate.estimate
    shown = f"{scale * estimate.estimate:{form}}" if exact else interval_text(estimate, form, scale=scale)
    return re.sub(r"-(0(\.0+)?)(?![\d.])", r"\1", shown) + sign


def worst(findings: Sequence[Finding]) -> list[Finding]:
    """Findings by verdict, the worst first, an unclear one that is likely a fault before the others of its kind."""
    return sorted(findings, key=lambda finding: (ORDER.index(finding.verdict), finding.sentence != SUSPECT))


def by_check(findings: Sequence[Finding]) -> dict[str, list[Finding]]:
    """The findings of each check, the check with the worst verdict first and in each the worst first."""
    groups: dict[str, list[Finding]] = {}
    for finding in worst(findings):
        groups.setdefault(finding.check, []).append(finding)
    return groups


def summary_table(audit: Audit) -> Table:
    """Every judged figure in a line, for a terminal of 80 columns."""
    rows: list[list[Cell]] = [
        [f"{finding.check}: {finding.name}", figure_text(finding.estimate, finding.unit), _WORDS[finding.verdict]]
        for finding in worst(audit.findings)
        if finding.verdict != "figure"
    ]
    count = len(audit.findings) - len(rows)
    caption = f"{count} figures more without a verdict are on the page. " if count else ""
    for name, reason in {**audit.failed, **audit.skipped}.items():
        caption += f"\n{name} was not measured: {reason}."
    return Table("Verdicts", ["figure", "value", "verdict"], rows, caption.strip())


def lede(audit: Audit) -> str:
    """The sentence to take home."""
    judged = [finding for finding in audit.findings if finding.verdict != "figure"]
    open_ = sum(finding.verdict == "unclear" for finding in judged)
    if audit.flags:
        names = ", ".join(dict.fromkeys(finding.check for finding in audit.flags))
        faults, them = ("is surely a fault", "it") if len(audit.flags) == 1 else ("are surely faults", "them")
        count = f"{len(audit.flags)} of {len(judged)} judged figures {faults} ({names})"
        return f"{count}: mend {them}, or train on another reward."
    rest = f" {open_} of {len(judged)} judged figures stay unclear at this size." if open_ else ""
    return f"No figure is surely a fault: nothing here speaks against training on this reward.{rest}"


def report_of(audit: Audit, facts: dict[str, Any], subject: Subject, record: dict[str, Any]) -> Report:
    """The page's contents; the record is that of the run folder."""
    report = Report(str(facts["name"]), "Audit of a reward", lede(audit))
    report.facts = {name: value for name, value in facts.items() if name != "name"}
    report.warnings = [
        f"{f.check}: {f.name}, {figure_text(f.estimate, f.unit)} (asked for: {f.bound}). {f.sentence}"
        for f in audit.flags
    ]
    report.warnings += [f"{name} was not measured, the reward failed: {why}" for name, why in audit.failed.items()]
    groups = by_check(audit.findings)
    first: list[list[Cell]] = []
    for check, findings in groups.items():
        one = findings[0]
        first.append([check, _WORDS[one.verdict], one.name, figure_text(one.estimate, one.unit), one.sentence])
    columns = ["check", "verdict", "its worst figure", "value", "what it means for training"]
    report.tables = [Table("Verdicts", columns, first, _RULE)]
    for check, findings in groups.items():
        rows: list[list[Cell]] = [
            [f.name, figure_text(f.estimate, f.unit), f.bound or None, _WORDS[f.verdict], f.sentence, f.estimate.n]
            for f in findings
        ]
        report.tables.append(Table(check, ["figure", "value", "asked for", "verdict", "meaning", "rows"], rows))
        report.tables += [table for f in findings if (table := _examples(f)) is not None]
    if audit.skipped:
        rows = [[name, why] for name, why in audit.skipped.items()]
        report.tables.append(Table("Not measured", ["check", "why"], rows))
    report.tables.append(_costs(subject))
    report.figures = list(audit.pictures)
    report.provenance = record
    return report


def _examples(finding: Finding) -> Table | None:
    if not finding.examples:
        return None
    columns = list(finding.examples[0])
    rows: list[list[Cell]] = [[example.get(name) for name in columns] for example in finding.examples]
    return Table(f"Examples: {finding.name}", columns, rows)


def _costs(subject: Subject) -> Table:
    rows: list[list[Cell]] = [
        [name, cost.asked, cost.scored, cost.refused, round(cost.seconds, 2), round(cost.processor_seconds, 2)]
        for name, cost in subject.costs.items()
        if cost.asked
    ]
    columns = ["check", "rows wanted", "rows scored", "refused", "seconds", "processor seconds"]
    return Table("What the audit cost", columns, rows, "Rows that an earlier check had scored are not asked for again.")


def write_audit(folder: Path, audit: Audit, facts: dict[str, Any], subject: Subject) -> None:
    """Write audit.json and audit.html."""
    costs = {name: asdict(cost) for name, cost in subject.costs.items() if cost.asked}
    write_json(
        folder / "audit.json",
        {
            "facts": facts,
            "findings": [finding.to_json() for finding in worst(audit.findings)],
            "not_measured": audit.skipped,
            "failed": audit.failed,
            "refused": dict(list((reason, row) for row, reason in subject.reasons.items())[:20]),
            "costs": costs,
        },
    )
    with replacing(folder / "audit.html") as file:
        record = json.loads((folder / "config.json").read_bytes())
        for piece in pieces(report_of(audit, facts, subject, record)):
            file.write(piece.encode("utf-8"))
