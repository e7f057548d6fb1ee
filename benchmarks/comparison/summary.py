"""What a comparison of reward backends comes to: tables shaped as the paper's, figures, warnings.

Pure functions of the outcomes, and `write_comparison`, which writes them. B prompts, S seeds; win rates pool the seeds
and count a prompt once (its rows are one cluster).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from benchmarks.comparison.figures import FIGURES
from benchmarks.comparison.outcomes import Outcome, arms_of, over_optimised_from, percent
from benchmarks.comparison.stages import Stage
from benchmarks.evaluation.aggregates import iqm_over_seeds
from benchmarks.evaluation.length_control import length_control
from benchmarks.evaluation.metrics import holm, paired_bootstrap_test, win_rate
from rlaif_env.data.jsonl import write_jsonl
from rlaif_env.data.tasks import Task
from rlaif_env.runs import write_json
from rlaif_env.statistics import Interval, bootstrap_mean, paired_bootstrap

__all__ = ["PAPER", "warnings_of", "write_comparison"]

Floats = NDArray[np.float64]
Table = dict[str, Any]

PAPER: Sequence[tuple[str, str, str, str, str]] = (
    ("distilled-rm", "sft", "RLAIF vs SFT", "71; 63", "59; 61"),
    ("human-rm", "sft", "RLHF vs SFT", "73; 64", "61; 61"),
    ("distilled-rm", "human-rm", "RLAIF vs RLHF", "50; 52", "47; 50"),
    ("same-size-rm", "sft", "same-size RLAIF vs SFT", "68; -", "59; -"),
    ("direct-llm", "sft", "d-RLAIF vs SFT", "74; 66", "65; -"),
    ("direct-llm", "same-size-rm", "d-RLAIF vs same-size RLAIF", "60; -", "56; -"),
    ("direct-llm", "distilled-rm", "d-RLAIF vs RLAIF", "-", "-"),
    ("direct-llm", "human-rm", "d-RLAIF vs RLHF", "-", "-"),
    ("self-llm", "sft", "strict self-improvement vs SFT", "-", "-"),
    ("combined-rm", "sft", "RLHF + RLAIF data vs SFT", "71; -", "61; -"),
    ("combined-rm", "human-rm", "RLHF + RLAIF data vs RLHF", "-", "-"),
)
"""The paper's comparisons: two arms, their name, and what its raters preferred in %: summaries; helpful dialogue. Raw,
then at equal length (sections 4.1 to 4.4, appendix J)."""


def write_comparison(
    folder: Path,
    task: Task,
    outcomes: Sequence[Outcome],
    stages: Sequence[Stage],
    extra: Sequence[Table],
    console: Console,
) -> None:
    """Write comparison.json, responses.jsonl, table.md and the figures; print the main table."""
    judges = _judges(outcomes, task)
    seeds = sorted({outcome.seed for outcome in outcomes})
    tables = [
        main_table(outcomes, judges),
        judge_table(outcomes, judges),
        measure_table(outcomes),
        *([seed_table(outcomes, judges)] if len(seeds) > 1 else []),
        *([] if (found := reward_model_table(outcomes, stages)) is None else [found]),
        cost_table(outcomes),
        *extra,
    ]
    warnings = warnings_of(outcomes, task)
    figures = []
    for file, title, caption, draw in FIGURES:
        if (figure := draw(outcomes)) is not None:
            figure.savefig(folder / file, metadata={"Date": None})
            figures.append({"title": title, "file": file, "caption": caption})
    facts = {
        "task": task.name,
        "arms": ", ".join(dict.fromkeys(o.arm for o in outcomes if o.arm != "sft")),
        "seeds": ", ".join(map(str, seeds)),
        "held-out prompts": len(outcomes[0].system.prompts),
        "stages": len(stages),
        "time of all stages, minutes": round(sum(stage.seconds for stage in stages) / 60, 1),
        "greatest memory, MB": max(stage.peak_megabytes for stage in stages),
    }
    comparison = {
        "title": f"Reward backends on {task.name}",
        "facts": facts,
        "warnings": warnings,
        "tables": tables,
        "figures": figures,
    }
    write_json(folder / "comparison.json", comparison)
    rows = (
        {
            "prompt": prompt,
            "system": outcome.system.name,
            "response": response,
            "measures": {k: float(v[i]) for k, v in outcome.system.measures.items() if np.isfinite(v[i])},
        }
        for outcome in outcomes
        for i, (prompt, response) in enumerate(zip(outcome.system.prompts, outcome.system.responses, strict=True))
    )
    write_jsonl(folder / "responses.jsonl", rows)
    text = "\n\n".join(_markdown(table) for table in tables)
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    console.print(_shown(tables[0], list(judges.values())[:3]))
    for warning in warnings:
        console.print(Text(f"! {warning}", style="yellow"))


def _judges(outcomes: Sequence[Outcome], task: Task) -> dict[str, str]:
    """Measures that say which response is better, with their names for people; what no arm was trained on first."""
    measures = outcomes[0].system.measures
    found = {}
    if "judge:gold-rm" in measures:
        found["judge:gold-rm"] = "people (gold RM)"
    if "gold" in measures:
        found["gold"] = f"gold ({task.gold})"
    judged = sorted(
        (name for name in measures if name.startswith("judge:")), key=lambda name: name != "judge:direct-llm"
    )
    found |= {name: name.removeprefix("judge:") for name in judged if name not in found}
    return found


def _pooled(outcomes: Sequence[Outcome], arm: str, measure: str) -> tuple[Floats, list[int]]:
    """A measure of an arm over seeds and prompts, (S * B,), and which prompt each row belongs to."""
    chosen = sorted((o for o in outcomes if o.arm == arm), key=lambda outcome: outcome.seed)
    values = np.concatenate([outcome.system.measures[measure] for outcome in chosen])
    return values, [row for outcome in chosen for row in range(len(outcome.system.prompts))]


# --- tables -----------------------------------------------------------------------------------------------------------


def main_table(outcomes: Sequence[Outcome], judges: Mapping[str, str]) -> Table:
    """Win rates in the paper's comparisons, raw and at equal length, beside the paper's own."""
    arms = arms_of(outcomes)
    shown = list(judges)[:3]
    chosen = [row for row in PAPER if row[0] in arms and row[1] in arms]
    tests = []
    cells: list[list[Any]] = []
    for a, b, name, raw, controlled in chosen:
        row: list[Any] = [f"{name} ({a} vs {b})" if b != "sft" else f"{name} ({a})"]
        for measure in shown:
            first, clusters = _pooled(outcomes, a, measure)
            second, _ = _pooled(outcomes, b, measure)
            there = np.isfinite(first) & np.isfinite(second)
            p_first, groups = (1 + np.sign(first - second)[there]) / 2, np.asarray(clusters)[there]
            lengths = [np.maximum(_pooled(outcomes, arm, "length")[0][there], 1) for arm in (a, b)]
            found = length_control(p_first, *lengths, clusters=groups)
            failed = f"; {int((~there).sum())} failed" if not there.all() else ""
            row += [percent(win_rate(p_first, clusters=groups).interval) + failed, percent(found.controlled)]
            if measure == shown[0]:
                tests.append(paired_bootstrap_test(np.full(p_first.size, 0.5), p_first, clusters=groups))
        cells.append([*row, raw, controlled])
    for row, p in zip(cells, holm(tests).tolist() if tests else [], strict=True):
        row.insert(1 + 2 * len(shown), f"{p:.3f}" if p >= 0.001 else "< 0.001")
    columns = ["first against second"]
    for measure in shown:
        columns += [f"{judges[measure]}: wins, %", f"{judges[measure]}: at equal length, %"]
    return {
        "title": "Main results: how often the first is preferred",
        "caption": (
            "95 % intervals, ties ½, prompts as clusters; at equal length: logistic regression on the length ratio, "
            "predicted at 1, refitted in every resample; p: no difference, by the first judge, Holm over the rows. The "
            "paper's figures are its human raters' on summaries; helpful dialogue, with PaLM 2 (arXiv 2309.00267): "
            "other tasks and models, so shape and order compare, not the numbers."
        ),
        "columns": [*columns, "p", "paper: wins, %", "paper: at equal length, %"],
        "rows": cells,
    }


def judge_table(outcomes: Sequence[Outcome], judges: Mapping[str, str]) -> Table:
    """What every judge says of every policy: the change against SFT."""
    rows = []
    for arm in arms_of(outcomes):
        row: list[Any] = [arm]
        for measure in judges:
            values, clusters = _pooled(outcomes, arm, measure)
            if arm == "sft":
                row.append(_mean(values, clusters))
            else:
                start, _ = _pooled(outcomes, "sft", measure)
                own = " (its own)" if measure == f"judge:{arm}" else ""
                row.append(_mean(values - start, clusters, sign=True) + own)
        rows.append(row)
    return {
        "title": "What each judge says of each policy",
        "caption": (
            "SFT: the mean; the others: the change against SFT on the same prompts, 95 % intervals. Rewards have "
            "different units: compare within a column. No arm was trained on the gold measures."
        ),
        "columns": ["policy", *judges.values()],
        "rows": rows,
    }


_SHOWN = {
    "length": "length, tokens",
    "kl": "KL to SFT, nats",
    "perplexity": "perplexity under SFT",
    "distinct-2": "distinct-2",
    "repeated-3": "repeated 3-grams",
    "new_numbers": "numbers not in the prompt",
    "new_names": "names not in the prompt",
}


def measure_table(outcomes: Sequence[Outcome]) -> Table:
    """How the policies write: length, distance from SFT, repetition, what the prompt does not say."""
    present = [name for name in _SHOWN if name in outcomes[0].system.measures]
    rows = []
    for arm in arms_of(outcomes):
        rows.append([arm, *(_mean(*_pooled(outcomes, arm, name)) for name in present)])
    return {
        "title": "How the policies write",
        "caption": (
            "Means over held-out responses with 95 % intervals. Perplexity under SFT (none for an "
            "empty response) stands for coherence, names and "
            "numbers that the prompt does not hold for hallucination: cheap signs, not proofs."
        ),
        "columns": ["policy", *(_SHOWN[name] for name in present)],
        "rows": rows,
    }


def seed_table(outcomes: Sequence[Outcome], judges: Mapping[str, str]) -> Table:
    """Over seeds: the interquartile mean of each arm's change against SFT of the same seed."""
    rows = []
    for arm in arms_of(outcomes):
        if arm == "sft":
            continue
        row: list[Any] = [arm]
        for measure in judges:
            changes = []
            for outcome in outcomes:
                if outcome.arm == arm:
                    start = next(o for o in outcomes if o.arm == "sft" and o.seed == outcome.seed)
                    found = outcome.system.measures[measure] - start.system.measures[measure]
                    changes.append(float(np.nanmean(found)))
            spread = f"{min(changes):+.3f} … {max(changes):+.3f}"
            row.append(f"{_figure(iqm_over_seeds(changes), sign=True)}; {spread}")
        rows.append(row)
    return {
        "title": "Over seeds",
        "caption": "Interquartile mean of the change against SFT with its bootstrap interval; least … greatest seed.",
        "columns": ["policy", *judges.values()],
        "rows": rows,
    }


def reward_model_table(outcomes: Sequence[Outcome], stages: Sequence[Stage]) -> Table | None:
    """How good the reward models are on people's held-out preferences; None if there are none."""
    rows = []
    for stage in (stage for stage in stages if stage.name.startswith("rm-")):
        report = json.loads((stage.path / "run" / "report.json").read_text(encoding="utf-8"))
        for judged_by, figures in report["figures"].items():
            at_gap = figures.get("accuracy_at_gap")
            rows.append(
                [
                    stage.name.removeprefix("rm-"),
                    judged_by,
                    report["training"]["pairs"],
                    report["training"]["texts"],
                    percent(Interval(**figures["accuracy"])),
                    "-" if at_gap is None else percent(Interval(**at_gap)),
                    f"{figures['ece']:.3f}",
                    f"{figures['brier']:.3f}",
                    percent(Interval(**figures["longer"])),
                ]
            )
    if not rows:
        return None
    return {
        "title": "Reward models on held-out pairs",
        "caption": (
            "Pairwise accuracy with 95 % intervals, ties ½; the wider gap: pairs whose mean human ratings differ by "
            "0.5 or more; always the longer: what that rule would get. The paper's: human RM 79.3 (summaries), 76.0 "
            "(helpful); AI RM 74.2, 67.8."
        ),
        "columns": [
            "labels",
            "tested on",
            "pairs",
            "texts",
            "accuracy, %",
            "wider gap, %",
            "ECE",
            "Brier",
            "always the longer, %",
        ],
        "rows": rows,
    }


def cost_table(outcomes: Sequence[Outcome]) -> Table:
    """Time by stage and arm, judgements and tokens that the labels took."""
    rows = []
    for arm in arms_of(outcomes):
        if arm == "sft":
            continue
        chosen = [outcome for outcome in outcomes if outcome.arm == arm]
        costs = chosen[0].costs
        training = [outcome.costs["training"].seconds for outcome in chosen]
        labels, model = costs.get("labels"), costs.get("reward model")
        asked = people = 0
        if labels is not None:
            asked = int(json.loads((labels.path / "report.json").read_text(encoding="utf-8"))["tokens"]["input"])
        if model is not None:
            report = json.loads((model.path / "run" / "report.json").read_text(encoding="utf-8"))
            people = sum(n for who, n in report["labels"]["sources"].items() if who.startswith("human"))
        parts = [0.0 if stage is None else stage.seconds for stage in (labels, model)]
        rows.append([arm, people, asked, *map(round, parts), round(sum(training) / len(training))])
        rows[-1].append(round(sum(parts) + sum(training) / len(training)))
    return {
        "title": "What each arm cost",
        "caption": (
            "Wall time in seconds on the machine that made it, other work on it included; training: mean over seeds; "
            "what two arms share is counted in both. In the paper a label by PaLM 2 L cost about $0.06, by people "
            "$0.67."
        ),
        "columns": [
            "arm",
            "people's judgements",
            "labeler's input tokens",
            "labelling, s",
            "reward model, s",
            "training, s",
            "sum, s",
        ],
        "rows": rows,
    }


# --- warnings ---------------------------------------------------------------------------------------------------------


def warnings_of(outcomes: Sequence[Outcome], task: Task) -> list[str]:
    """What a reader should know before believing a table."""
    found = []
    if len({outcome.seed for outcome in outcomes}) == 1:
        found.append("One seed: the intervals are over prompts and say nothing about how another training would end.")
    for outcome in outcomes:
        name, history = f"{outcome.arm}, seed {outcome.seed}", outcome.history
        if history is None:
            continue
        if "gold" in history.curves:
            since = over_optimised_from(history.steps, history.curves["reward"], history.curves["gold"])
            if since is not None:
                found.append(
                    f"{name}: over-optimised: since update {since} the reward rises and the gold measure falls."
                )
        start = next(o for o in outcomes if o.arm == "sft" and o.seed == outcome.seed).system.measures
        end = outcome.system.measures
        if "distinct-2" in end:
            change = paired_bootstrap(start["distinct-2"], end["distinct-2"])
            if change.high < -0.1:
                found.append(
                    f"{name}: the responses have become alike: distinct-2 {_figure(change, sign=True)} against SFT."
                )
        own = f"judge:{outcome.arm}"
        if own in end and "gold" in end:
            there = np.isfinite(start[own]) & np.isfinite(end[own])
            reward = paired_bootstrap(start[own][there], end[own][there])
            gold = paired_bootstrap(start["gold"], end["gold"])
            if reward.low > 0 and gold.low <= 0:
                found.append(
                    f"{name}: its own reward rose ({_figure(reward, sign=True)}), gold ({task.gold}) did not for sure "
                    f"({_figure(gold, sign=True)})."
                )
    return found


# --- text -------------------------------------------------------------------------------------------------------------


def _mean(values: Floats, clusters: Sequence[int], *, sign: bool = False) -> str:
    there = np.isfinite(values)
    if there.sum() < 2:
        return "-"
    return _figure(bootstrap_mean(values[there], clusters=np.asarray(clusters)[there]), sign=sign)


def _figure(interval: Interval, *, sign: bool = False) -> str:
    digits = 1 if max(abs(interval.low), abs(interval.high)) >= 20 else 2
    form = f"{'+' if sign else ''}.{digits}f"
    return f"{interval.estimate:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def _markdown(table: Table) -> str:
    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    rule = "|" + "---|" * len(table["columns"])
    lines = [line(table["columns"]), rule, *map(line, table["rows"])]
    return f"## {table['title']}\n\n" + "\n".join(lines) + f"\n\n{table['caption']}"


def _shown(main: Table, judges: Sequence[str]) -> RichTable:
    """The main table for a terminal: a line for what is raw, and one for what is at equal length."""
    caption = (
        "upper line: wins in %, 95 % intervals; lower: at equal length. The paper's: its raters on summaries; dialogue"
    )
    shown = RichTable(
        title=main["title"], title_justify="left", caption=caption, caption_justify="left", show_lines=True
    )
    for i, column in enumerate(("first against second", *judges, "the paper")):
        shown.add_column(Text(column), justify="left" if i == 0 else "right")
    for name, *cells in main["rows"]:
        ours, paper = cells[:-3], cells[-2:]
        pairs = [*zip(ours[::2], ours[1::2], strict=True), tuple(paper)]
        shown.add_row(
            Text(str(name).replace(" (", "\n(")), *(Text(f"{raw}\n{controlled}") for raw, controlled in pairs)
        )
    return shown
