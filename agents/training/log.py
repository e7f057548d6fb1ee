"""What is written and shown of each update: metrics, samples, the gold measure, warnings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape

from agents.training.display import Show
from agents.training.watch import Alarm, Watch
from rlaif_env.data.tasks import Task, gold_scores
from rlaif_env.runs import RunFolder


class Log:
    """The record of a training: in the run folder, as warnings in the console, and as ``show`` shows an update."""

    def __init__(self, run: RunFolder, console: Console, task: Task, group_size: int, show: Show) -> None:
        self.watch = Watch(group_size)
        self._run, self._console, self._task, self._show = run, console, task, show

    def update(
        self,
        update: int,
        metrics: Mapping[str, float],
        rewards: NDArray[np.float64],
        final: Mapping[str, Any],
        seconds: Mapping[str, float],
    ) -> None:
        """Record an update: the agent's metrics, n rewards, the environment's ``final_info``, the phases' seconds."""
        hidden = ("prompt", "response", "action_mask")
        parts = {name: np.asarray(v) for name, v in final.items() if not name.startswith("_") and name not in hidden}
        figures = dict(metrics) | {f"reward/{n}": float(np.mean(v)) for n, v in parts.items() if v.dtype.kind == "f"}
        prompts, responses = list(map(str, final["prompt"])), list(map(str, final["response"]))
        gold = None
        if self._task.gold is not None:
            judged = [self._task.judged(*pair) for pair in zip(prompts, responses, strict=True)]
            gold = gold_scores(self._task, judged)
            figures["gold"] = float(gold.mean())
            parts = {"gold": gold} | parts
        spent = dict(seconds) | {"time/tokens_per_second": metrics["tokens"] / sum(seconds.values())}
        self._run.log(update, figures | spent)
        self._run.log_samples(update, prompts, responses, rewards, parts)
        best = int(np.argmax(rewards))
        sample = prompts[best] + responses[best]
        if update == 1 or update % 5 == 0:
            self._run.log_text(update, "best response of the update", f"[reward {rewards[best]:+.3f}] {sample}")
        for alarm in self.watch.observe(update, figures, rewards, gold):
            self.warn(alarm)
        self._show(update, figures, spent, sample)

    def warn(self, alarm: Alarm) -> None:
        """Record a warning and tell it."""
        self._run.record("warnings.jsonl", asdict(alarm))
        self._run.log_text(alarm.step, f"warning: {alarm.kind}", alarm.text)
        self.tell(f"warning (update {alarm.step}): {alarm.text}")

    def tell(self, text: str) -> None:
        """Say something about the run in the terminal."""
        self._console.print(f"[yellow]{escape(text)}", highlight=False)
