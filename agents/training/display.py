"""What `rlaif train` shows while it runs and when it has ended."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from agents.training.heldout import HeldOut, changes, read_json
from rlaif_env.data.tasks import Task
from rlaif_env.records import write_json
from rlaif_env.runs import RunFolder
from rlaif_env.statistics import interval_text
from rlaif_env.tables import Table, count_of, printable, side_by_side

Show = Callable[[int, Mapping[str, float], Mapping[str, float], str], None]
"""Called with the update, its metrics, the seconds spent, and its best response."""

_HEADLINES = {
    "score": "LLM score",
    "reward": "reward",
    "gold": "gold measure",
    "length": "length (tokens)",
    "kl": "KL to reference (nats)",
    "distinct-2": "distinct-2",
}


@contextmanager
def display(updates: int, console: Console) -> Iterator[Show]:
    """A live bar in a terminal, a line every few updates elsewhere."""
    left, done = (
        TextColumn("left"),
        (MofNCompleteColumn(), BarColumn(bar_width=24), TextColumn("{task.fields[figures]}")),
    )
    progress = Progress(TextColumn("update"), *done, TimeElapsedColumn(), left, TimeRemainingColumn(), console=console)
    bar = progress.add_task("", total=updates, figures="")
    latest = Text("", style="dim", overflow="ellipsis", no_wrap=True)

    def show(update: int, metrics: Mapping[str, float], spent: Mapping[str, float], sample: str) -> None:
        figures = _figures(metrics, spent)
        if console.is_terminal:
            progress.update(bar, completed=update, figures=figures)
            latest.plain = "best: " + printable(" ".join(sample.split()))
        elif update == 1 or update % 5 == 0 or update == updates:
            console.print(f"update {update:4d}/{updates}  {figures}", highlight=False)

    live = Live(Group(progress, latest), console=console, refresh_per_second=4)
    with live if console.is_terminal else nullcontext():
        yield show


def _figures(metrics: Mapping[str, float], spent: Mapping[str, float]) -> str:
    parts = [f"reward {metrics['reward']:+.3f}"]
    if "reward/score" in metrics:
        parts.append(f"score {metrics['reward/score']:.2f}")
    if "kl" in metrics:
        parts.append(f"KL {metrics['kl']:.2f}")
    parts.append(f"{spent['time/tokens_per_second']:.0f} tokens/s")
    return "  ".join(parts)


def validation_text(update: int, figures: Mapping[str, float], n: int) -> str:
    """What the answers to n validation prompts say, in a line."""
    parts = []
    for name, label, shape in (("reward", "reward", "+.3f"), ("gold", "gold measure", "+.3f")):
        if name in figures:
            wins = figures.get("win_rate" if name == "reward" else f"{name}_win_rate")
            parts.append(f"{label} {figures[name]:{shape}}" + ("" if wins is None else f" (wins {wins:.0%})"))
    parts += [f"distinct-2 {figures['distinct-2']:.3f}", f"length {figures['length']:.1f}", f"KL {figures['kl']:.2f}"]
    against = ", wins against the start" if "win_rate" in figures else ""
    return f"validation after update {update}: {'  '.join(parts)}  ({count_of(n, 'prompt')}{against})"


def report(run: RunFolder, console: Console, task: Task, before: HeldOut, after: HeldOut) -> None:
    """Print the table before / after and the samples; write evaluation.json and evaluation.jsonl."""
    compared = changes(before, after)
    history = read_json(run.path / "config.json").get("reward_changes", {}).items()
    changed = "".join(f"; the reward was changed after update {update}, {what}" for update, what in history)
    changed += "; all columns are of the last reward" if changed else ""
    gold = "; no reward sees the gold measure" if "gold" in compared else ""
    rows = []
    for name in filter(compared.__contains__, _HEADLINES):
        old, new, change = compared[name]
        label = f"{_HEADLINES[name]} ({task.gold})" if name == "gold" else _HEADLINES[name]
        label += f", {change.n} scored both times" if change.n < len(before.prompts) else ""
        label += f", {count_of(change.units, 'different prompt')}" if change.units < change.n else ""
        rows.append([label, f"{old.estimate:.3f}", f"{new.estimate:.3f}", interval_text(change, "+.3f")])
    table = Table(
        f"before / after on {count_of(len(before.prompts), 'held-out prompt')}",
        ["measure", "before", "after", "change, 95 % interval"],
        rows,
        "change: after - before, mean over prompts, bootstrap interval" + gold + changed,
    )
    console.print(table.rich())
    responses = {"before": before.responses, "after": after.responses}
    console.print(side_by_side("the same prompts, before and after", before.prompts[:8], responses))
    write_json(run.path / "evaluation.json", {name: [asdict(i) for i in three] for name, three in compared.items()})
    with (run.path / "evaluation.jsonl").open("w", encoding="utf-8") as stream:
        for i, prompt in enumerate(before.prompts):
            row: dict[str, Any] = {"prompt": prompt}
            for when, held in (("before", before), ("after", after)):
                row[when] = {"response": held.responses[i], **{m: held.nulled(v)[i] for m, v in held.measures.items()}}
            stream.write(json.dumps(row) + "\n")
