"""What a comparison of reward backends comes to: its files, advice, and warnings where a table would mislead."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.text import Text

from benchmarks.comparison.advice import advice_of, faults_of
from benchmarks.comparison.config import same_arms
from benchmarks.comparison.figures import FIGURES, save
from benchmarks.comparison.outcomes import Outcome, arms_of
from benchmarks.comparison.pipeline import Pipeline
from benchmarks.comparison.tables import comparison_tables, judges_of, terminal_tables
from rlaif_env.data.jsonl import write_jsonl
from rlaif_env.data.tasks import Task
from rlaif_env.records import write_json
from rlaif_env.statistics import FEWEST_SEEDS
from rlaif_env.tables import Table


def write_comparison(pipeline: Pipeline, outcomes: Sequence[Outcome], extra: Sequence[Table]) -> None:
    """Write comparison.json, responses.jsonl, table.md and the figures; print the main table, warnings and advice."""
    folder, task, stages, console = pipeline.config.out, pipeline.task, pipeline.stages.finished, pipeline.console
    judges = judges_of(outcomes, task)
    tables = [*comparison_tables(outcomes, stages, judges, pipeline.config.price_per_hour), *extra]
    warnings, advice = warnings_of(outcomes, task), advice_of(outcomes, task)
    figures = []
    for file, title, caption, draw in FIGURES:
        if (figure := draw(outcomes)) is not None:
            save(figure, folder / file)
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
        "advice": advice,
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
    for table in terminal_tables(tables[0], tables[1], judges):
        console.print(table.rich(show_lines=True))
    for warning in warnings:
        console.print(Text(f"! {warning}", style="yellow"))
    for sentence in advice:
        what, colon, why = sentence.partition(": ")
        console.print(Text.assemble((what + colon, "bold"), why))


def warnings_of(outcomes: Sequence[Outcome], task: Task) -> list[str]:
    """What a reader should know before believing a table."""
    warnings = same_arms({o.arm: o.costs["training"].key for o in outcomes if "training" in o.costs})
    seeds = len({outcome.seed for outcome in outcomes})
    if seeds < FEWEST_SEEDS:
        warnings.append(
            f"{('One seed', 'Two seeds')[seeds - 1]}: the intervals are over prompts and say nothing about how "
            "another training would end."
        )
    return warnings + [f"{fault.arm}, seed {fault.seed}: {fault.note}" for fault in faults_of(outcomes, task)]
