"""What a comparison of reward backends comes to: its files, and warnings where a table would mislead."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.text import Text

from benchmarks.comparison.figures import FIGURES
from benchmarks.comparison.outcomes import Outcome, arms_of, over_optimised_from
from benchmarks.comparison.pipeline import Pipeline
from benchmarks.comparison.tables import comparison_tables, judges_of, terminal_table, with_interval
from benchmarks.evaluation.systems import System
from rlaif_env.data.jsonl import write_jsonl
from rlaif_env.data.tasks import Task
from rlaif_env.records import write_json
from rlaif_env.statistics import measure_change
from rlaif_env.tables import Table


def write_comparison(pipeline: Pipeline, outcomes: Sequence[Outcome], extra: Sequence[Table]) -> None:
    """Write comparison.json, responses.jsonl, table.md and the figures; print the main table and the warnings."""
    folder, task, stages, console = pipeline.config.out, pipeline.task, pipeline.stages.finished, pipeline.console
    judges = judges_of(outcomes, task)
    tables = [*comparison_tables(outcomes, stages, judges, pipeline.config.price_per_hour), *extra]
    warnings = warnings_of(outcomes, task)
    figures = []
    for file, title, caption, draw in FIGURES:
        if (figure := draw(outcomes)) is not None:
            figure.savefig(folder / file, metadata={"Date": None})
            figures.append({"title": title, "file": file, "caption": caption})
    facts = {
        "task": task.name,
        "arms": ", ".join(arms_of(outcomes)[1:]),
        "seeds": ", ".join(map(str, sorted({outcome.seed for outcome in outcomes}))),
        "held-out prompts": len(outcomes[0].system.prompts),
        "stages": len(stages),
        "time of all stages, minutes": round(sum(stage.seconds for stage in stages) / 60, 1),
        "greatest memory, MB": max(stage.peak_megabytes for stage in stages),
    }
    comparison = {
        "title": f"Reward backends on {task.name}",
        "facts": facts,
        "warnings": warnings,
        "tables": [table.to_json() for table in tables],
        "figures": figures,
    }
    write_json(folder / "comparison.json", comparison)
    rows = (
        {
            "prompt": prompt,
            "system": system.name,
            "response": response,
            "measures": {name: float(v[i]) for name, v in system.measures.items() if np.isfinite(v[i])},
        }
        for system in (outcome.system for outcome in outcomes)
        for i, (prompt, response) in enumerate(zip(system.prompts, system.responses, strict=True))
    )
    write_jsonl(folder / "responses.jsonl", rows)
    (folder / "table.md").write_text("\n\n".join(t.markdown() for t in tables) + "\n", encoding="utf-8")
    console.print(terminal_table(tables[0], judges).rich(show_lines=True))
    for warning in warnings:
        console.print(Text(f"! {warning}", style="yellow"))


def warnings_of(outcomes: Sequence[Outcome], task: Task) -> list[str]:
    """What a reader should know before believing a table."""
    warnings = []
    starts = {outcome.seed: outcome.system for outcome in outcomes if outcome.arm == "sft"}
    if len(starts) == 1:
        warnings.append(
            "One seed: the intervals are over prompts and say nothing about how another training would end."
        )
    for outcome in outcomes:
        if (history := outcome.history) is None:
            continue
        notes = []
        if "gold" in history.curves:
            since = over_optimised_from(history.steps, history.curves["reward"], history.curves["gold"])
            if since is not None:
                notes.append(f"over-optimised: since update {since} the reward rises and the gold measure falls.")
        notes += _changes(starts[outcome.seed], outcome.system, f"judge:{outcome.arm}", task)
        warnings += [f"{outcome.arm}, seed {outcome.seed}: {note}" for note in notes]
    return warnings


def _changes(start: System, end: System, own: str, task: Task) -> list[str]:
    """Warnings by what a training has changed; ``own`` is the measure of its own reward."""
    before, after, warnings = start.measures, end.measures, []
    if "distinct-2" in after:
        change = measure_change("distinct-2", before["distinct-2"], after["distinct-2"], start.prompts)
        if change.high is not None and change.high < -0.1:
            warnings.append(
                f"the responses have become alike: distinct-2 {with_interval(change, sign=True)} against SFT."
            )
    if own in after and "gold" in after:
        judged = np.flatnonzero(np.isfinite(before[own]) & np.isfinite(after[own])).tolist()
        prompts = [start.prompts[i] for i in judged]
        reward = measure_change(own, before[own][judged], after[own][judged], prompts)
        gold = measure_change("gold", before["gold"], after["gold"], start.prompts)
        if reward.low is not None and reward.low > 0 and gold.low is not None and gold.low <= 0:
            warnings.append(
                f"its own reward rose ({with_interval(reward, sign=True)}), gold ({task.gold}) did not for sure "
                f"({with_interval(gold, sign=True)})."
            )
    return warnings
