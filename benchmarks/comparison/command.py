"""``rlaif compare``: the reward backends, end to end, on the same prompts, seeds and budget.

    out/stages/             every stage, finished once and kept by content (`benchmarks.comparison.stages`)
    out/comparison.json     advice, facts, tables, figures, warnings: what ``rlaif report`` shows
    out/responses.jsonl     every policy's answer to every held-out prompt, with what every judge said
    out/table.md, *.svg     the same tables, and the figures
    out/report.html         all of it on one page

Each arm is a way to get a reward. What it needs (labels, a reward model, the training, the answers, the judgements) is
a chain of stages; arms that need the same thing share it. A comparison that was killed goes on with the same command.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from benchmarks.comparison.ablations import ablations
from benchmarks.comparison.config import CompareConfig
from benchmarks.comparison.document import markers, write_document
from benchmarks.comparison.pipeline import Pipeline
from benchmarks.comparison.planning.estimate import estimate
from benchmarks.comparison.planning.plan import planned, twins
from benchmarks.comparison.planning.workers import make_stages
from benchmarks.comparison.stages import Job
from benchmarks.comparison.summary import write_comparison
from rlaif_env.data.tasks import EVAL_PROMPTS, held_out_prompts, load_task
from rlaif_env.models import load_tokenizer
from rlaif_env.runs import RunFolder


def compare(config: CompareConfig, console: Console | None = None) -> Path:
    """Run a comparison to its end, or go on with it.

    Returns:
        The folder.

    Raises:
        RLAIFError: On settings that cannot work, before anything slow; and whatever a stage raises. What is finished
            stays.
    """
    console = console or Console(quiet=True)
    started = time.monotonic()
    if config.labeler.url is None:
        load_tokenizer(config.labeler.model)  # the terms of its weights, if it has any, come before all else
    if config.document is not None:
        markers(config.document)
    asked, split = config.train.eval_prompts, config.train.eval_split
    count = len(held_out_prompts(load_task(config.task), split, asked, option="--train.eval-prompts"))
    if asked is None and count < EVAL_PROMPTS:
        console.print(f"eval_prompts: {count}, all that split {split!r} has", highlight=False)
    config = replace(config, train=replace(config.train, eval_prompts=count))
    load_tokenizer(config.model)
    if config.dry_run:
        pipeline = Pipeline(config, console)
        _foretell(pipeline, planned(pipeline), whole=True)
        return config.out
    with RunFolder.create(config.out, asdict(config), command="compare", exist="changed"):
        pipeline = Pipeline(config, console)
        jobs = planned(pipeline)
        if not console.quiet:
            _foretell(pipeline, jobs)
        made = make_stages(pipeline, jobs)
        outcomes = [pipeline.outcome(arm, seed) for seed in config.seeds for arm in ("sft", *config.arms)]
        write_comparison(pipeline, outcomes, ablations(pipeline, outcomes))
        if config.report:
            from benchmarks.report import write_report

            write_report(config.out)
        if config.document is not None:
            write_document(config.out, config.document)
        console.print(
            f"{(time.monotonic() - started) / 60:.1f} minutes, {made} stages made; everything is in {config.out}",
            highlight=False,
            soft_wrap=True,
        )
    return config.out


def _foretell(pipeline: Pipeline, jobs: Sequence[Job], *, whole: bool = False) -> None:
    """Say what will be made and about how long that takes; ``whole``: as a table."""
    console = pipeline.console
    with console.status("reckoning how long it will take"):
        found = estimate(pipeline, jobs)
    for line in twins(pipeline):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(found.table(jobs).rich() if whole else found.line, highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``rlaif compare``; returns the exit code."""
    import tyro

    config = tyro.cli(CompareConfig, args=argv, prog="rlaif compare")
    compare(config, Console())
    return 0
