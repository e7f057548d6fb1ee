"""``rlaif compare``: the reward backends, end to end, on the same prompts, seeds and budget.

    out/stages/             every stage, finished once and kept by content (`benchmarks.comparison.stages`)
    out/comparison.json     facts, tables, figures, warnings: what ``rlaif report`` shows
    out/responses.jsonl     every policy's answer to every held-out prompt, with what every judge said
    out/table.md, *.svg     the same tables, and the figures
    out/report.html         all of it on one page

Each arm is a way to get a reward. What it needs (labels, a reward model, the training, the answers, the judgements) is
a chain of stages; arms that need the same thing share it. A comparison that was killed goes on with the same command.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.comparison import ablations
from benchmarks.comparison.arms import ARMS, Arm, CompareConfig
from benchmarks.comparison.outcomes import Outcome
from benchmarks.comparison.pipeline import Pipeline
from benchmarks.comparison.summary import write_comparison
from rewards.endpoint.limits import checked_url
from rlaif_env.api import RLAIFError
from rlaif_env.data.tasks import load_task
from rlaif_env.models import load_tokenizer
from rlaif_env.runs import RunFolder

__all__ = ["ARMS", "Arm", "CompareConfig", "compare", "main"]


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
    task = load_task(config.task)
    available = len(task.prompts(config.eval_split))
    if config.eval_prompts > available:
        raise RLAIFError(
            f"expected at most {available} eval_prompts, as many as split {config.eval_split!r} of {task.name!r} has, "
            f"found {config.eval_prompts}"
        )
    if config.labeler_url is None:
        load_tokenizer(config.labeler)
    else:
        checked_url(config.labeler_url)  # before the address is recorded: one with a password must not be
    load_tokenizer(config.model)
    with RunFolder.create(config.out, asdict(config), command="compare", exist="changed"):
        comparison = Pipeline(config, console)
        outcomes = [comparison.outcome(arm, seed) for seed in config.seeds for arm in ("sft", *config.arms)]
        extra = _ablations(comparison, outcomes)
        write_comparison(config.out, comparison.task, outcomes, comparison.stages.finished, extra, console)
        if config.report:
            from benchmarks.report import write_report

            write_report(config.out)
        made = [stage for stage in comparison.stages.finished if not stage.cached]
        console.print(
            f"{(time.monotonic() - started) / 60:.1f} minutes, {len({s.key for s in made})} stages made; everything is "
            f"in {config.out}",
            highlight=False,
            soft_wrap=True,
        )
    return config.out


def _ablations(comparison: Pipeline, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The tables of the ablations that were asked for."""
    c = comparison.config
    tables = []
    if c.prompt_grid >= 0 or c.labelers:
        tables.append(ablations.labelling(comparison.stages, comparison.task, c))
    if c.pair_counts:
        models = {
            (who, count): comparison.reward_model(who, count)
            for who in ("human", "ai")
            for count in sorted(set(c.pair_counts))
        }
        tables.append(ablations.pairs(models))
    if c.staleness:
        tables.append(ablations.staleness(comparison.stages, comparison.task, comparison.judges(), outcomes))
    return tables


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``rlaif compare``; returns the exit code."""
    import tyro

    config = tyro.cli(CompareConfig, args=list(argv) if argv is not None else sys.argv[1:], prog="rlaif compare")
    compare(config, Console())
    return 0
