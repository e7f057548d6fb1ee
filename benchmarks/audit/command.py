"""The command ``rlaif audit``: every check of a reward, one verdict for each figure, one page.

config.json     the resolved configuration
audit.json      every figure with its interval, bound and verdict; what was not measured and why; rows by check
audit.html      the same to read
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.status import Status

from benchmarks.audit.api import Check, Finding, Measured, Measurement, NotMeasured
from benchmarks.audit.checks.best_of_n import read_run
from benchmarks.audit.checks.cases import check_of, read_cases
from benchmarks.audit.config import AuditConfig, checks_named, parsed
from benchmarks.audit.materials import SET, gather
from benchmarks.audit.report import summary_table, write_audit
from benchmarks.audit.samples import sampler
from benchmarks.audit.subject import Subject
from benchmarks.audit.verdicts import LEVEL, judged
from benchmarks.report.contents import Figure
from rlaif_env.api import BackendError, RLAIFError
from rlaif_env.data.tasks import Task, load_task
from rlaif_env.files import content_of
from rlaif_env.keywords import resolve_reward
from rlaif_env.references import code_in
from rlaif_env.runs import RunFolder

if TYPE_CHECKING:
    from rewards.reward_model.model import RewardModel


@dataclass
class Audit:
    """What an audit found."""

    findings: list[Finding]
    skipped: dict[str, str] = field(default_factory=dict)  # why a check was not made, by its name
    failed: dict[str, str] = field(default_factory=dict)  # the reward's error, by the check that met it
    pictures: list[Figure] = field(default_factory=list)

    @property
    def flags(self) -> list[Finding]:
        """The findings that are surely faults."""
        return [finding for finding in self.findings if finding.verdict == "flag"]


def examine(
    subject: Subject, checks: Mapping[str, Check], *, level: float = LEVEL, console: Console | None = None
) -> Audit:
    """Make every check and judge all figures together.

    Args:
        subject: The reward, with what it is held against.
        checks: By name, in their order.
        level: As `benchmarks.audit.verdicts.judged` takes it.
        console: Told what is being done.

    Raises:
        BackendError: If the reward failed in every check.
    """
    console = console or Console(quiet=True)
    measured: list[tuple[str, Measurement]] = []
    audit = Audit([])
    for name, check in checks.items():
        started, error = time.monotonic(), ""
        with console.status(name) as status, subject.checking(name) as cost:
            subject.progress = partial(_show, status, name)
            try:
                found = check(subject, subject.materials)
                figures = found.figures if isinstance(found, Measured) else found
                measured += [(name, figure) for figure in figures]
                audit.pictures += found.pictures if isinstance(found, Measured) else ()
            except NotMeasured as reason:
                audit.skipped[name] = error = str(reason)
            except BackendError as reason:
                audit.failed[name] = error = str(reason)
        rows = f"{cost.scored} rows scored, {time.monotonic() - started:.0f} s"
        console.print(f"{name}: {error or rows}", highlight=False, markup=False)
    if not measured and audit.failed:
        raise BackendError(next(iter(audit.failed.values())))
    audit.findings = judged(measured, level)
    return audit


def _show(status: Status, check: str, rows: int) -> None:
    status.update(f"{check}: {rows} rows scored")


def audit(config: AuditConfig, console: Console | None = None) -> tuple[Audit, Path]:
    """Audit a reward and write what was found; returns it and the folder.

    Raises:
        RLAIFError: On bad settings, before anything slow happens.
        BackendError: If the reward failed in every check.
    """
    console = console or Console(quiet=True)
    if not 0.5 <= config.level < 1:
        raise RLAIFError(f"expected a level from 0.5 and under 1, found {config.level}")
    task, checks = load_task(config.task), checks_named(config.checks)
    folder = config.samples or (config.out.parent if config.out else Path("runs")) / "audit-samples"
    if config.test:
        checks = {"cases": check_of(read_cases(config.test)), **checks}
    options = dict(config.reward_options)
    contents = {text: content_of(text) for text in options.values() if isinstance(text, str)}
    gold_model = None if config.gold is None else _gold_model(config.gold, task, contents)
    draw = None
    if config.policy != "none":
        size = {"prompts": config.prompts, "samples": config.samples_a_prompt}
        draw = sampler(config.policy, task, **size, seed=config.seed, folder=folder)
    materials = gather(task, texts=config.texts, pairs=config.pairs, draw=draw, policy=config.policy, seed=config.seed)
    materials = replace(materials, runs=config.runs, gold_model=gold_model)
    for trained in config.runs:
        read_run(trained, materials)
    with console.status(f"making {config.reward}"):
        backend = resolve_reward(config.reward, task, config.reward_options)
    subject = Subject(backend, materials)
    if subject.judges_groups:  # each text is compared with several others
        few = {"texts": max(2 * SET, config.texts // 2), "pairs": config.pairs}
        fewer = gather(task, **few, draw=draw, policy=config.policy, seed=config.seed)
        subject = Subject(backend, replace(materials, texts=fewer.texts, pairs=fewer.pairs))
    kept = {name: value for name, value in asdict(config).items() if name != "out"}
    contents |= {} if config.gold is None else {"gold": content_of(config.gold)}
    kept |= {"task": task.to_json(), "content": contents | code_in([config.reward, options])}
    with RunFolder.create(config.out, kept, command="audit") as run:
        groups = ", which judges groups" if subject.judges_groups else ""
        console.print(f"{backend.name}{groups} on {task.name}: {len(checks)} checks", highlight=False, markup=False)
        started = time.monotonic()
        found = examine(subject, checks, level=config.level, console=console)
        facts = _facts(config, subject, found, time.monotonic() - started)
        write_audit(run.path, found, facts, subject)
        console.print(summary_table(found).rich())
        console.print(f"The page is {run.path / 'audit.html'}, its figures {run.path / 'audit.json'}", soft_wrap=True)
    return found, run.path


def _gold_model(folder: Path, task: Task, contents: Mapping[str, str]) -> RewardModel:
    """The reward model that measures gold; ``contents`` are those of the reward's own settings.

    Raises:
        RLAIFError: If there is none in the folder, it was trained for another task, or the reward is made of it.
    """
    from rewards.reward_model.model import RewardModel

    if content_of(folder) in contents.values():
        raise RLAIFError(
            f"expected --gold to be another reward model than the audited one, found the same in {folder}; take one "
            "that learned from other labels"
        )
    model = RewardModel.load(folder)
    if model.task.name != task.name:
        raise RLAIFError(
            f"expected --gold to be a reward model for the task {task.name!r}, found one for {model.task.name!r} in "
            f"{folder}; train one with `rlaif train-rm --task {task.name}`"
        )
    return model


def _facts(config: AuditConfig, subject: Subject, found: Audit, seconds: float) -> dict[str, Any]:
    verdicts = Counter(finding.verdict for finding in found.findings)
    return {
        "reward": config.reward,
        "name": subject.name,
        "kind": "judges groups" if subject.judges_groups else "scores rows",
        "task": load_task(config.task).name,
        "policy": config.policy,
        "gold": subject.materials.gold_name + (f" ({config.gold})" if config.gold else ""),
        "verdicts": f"{verdicts['flag']} flagged, {verdicts['unclear']} unclear, {verdicts['ok']} ok",
        "rows scored": sum(cost.scored for cost in subject.costs.values()),
        "minutes": f"{seconds / 60:.1f}",
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``rlaif audit``; returns the exit code: with ``--strict`` 1 if a figure is flagged."""
    import sys

    config = parsed(sys.argv[1:] if argv is None else argv)
    found, _ = audit(config, Console())
    return int(config.strict and bool(found.flags))
