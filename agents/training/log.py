"""What is written and shown of each update: metrics, samples, the gold measure, warnings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import numpy as np
from rich.console import Console
from rich.markup import escape

from agents.paid import Dropped, Paid
from agents.training.display import Show, validation_text
from agents.training.heldout import HeldOut
from agents.watch import Alarm, Validations, Watch
from rlaif_env.data.tasks import Task, gold_scores
from rlaif_env.runs import RunFolder


class Log:
    """The record of a training: in the run folder, as warnings in the console, and as ``show`` shows an update."""

    def __init__(
        self,
        run: RunFolder,
        console: Console,
        task: Task,
        group_size: int,
        show: Show,
        max_dropped: float | None = None,
    ) -> None:
        self.watch, self.validations, self.dropped = Watch(group_size), Validations(), Dropped(max_dropped)
        self.stop = ""
        self._run, self._console, self._task, self._show = run, console, task, show

    def update(self, update: int, metrics: Mapping[str, float], paid: Paid, seconds: Mapping[str, float]) -> None:
        """Record a batch: the agent's metrics, what was paid, the phases' seconds; no metrics if nothing was learned.

        Figures are of what was learned from; the samples are all there are. ``stop`` then says why the run has to end,
        if it has to.
        """
        hidden = ("prompt", "response", "action_mask")
        own = {n: np.asarray(v) for n, v in paid.final.items() if not n.startswith("_") and n not in hidden}
        prompts, responses = list(map(str, paid.final["prompt"])), list(map(str, paid.final["response"]))
        gold = None
        parts = own
        if self._task.gold is not None:
            judged = [self._task.judged(*pair) for pair in zip(prompts, responses, strict=True)]
            gold = gold_scores(self._task, judged)
            parts = {"gold": gold} | own
        self.stop, whole, rewards = self.dropped.count(paid), paid.whole, paid.rewards[paid.whole]
        figures: dict[str, float] = {}
        if metrics:
            figures = {
                **metrics,
                **paid.figures(),
                **{f"reward/{n}": float(v[whole].mean()) for n, v in own.items() if v.dtype.kind == "f"},
            }
            figures |= ({} if gold is None else {"gold": float(gold[whole].mean())}) | self.dropped.updated()
            spent = dict(seconds) | {"time/tokens_per_second": metrics["tokens"] / sum(seconds.values())}
            self._run.log(update, figures | spent)
        columns = {name: paid.column(name, values) for name, values in parts.items()}
        self._run.log_samples(update, prompts, responses, paid.column("reward", paid.rewards), columns)
        if not metrics:
            self.tell(
                f"update {update}: the judge failed on a response of every group ({paid.reason}); asking for more"
            )
            return
        best = int(np.flatnonzero(whole)[np.argmax(rewards)])
        sample = prompts[best] + responses[best]
        if update == 1 or update % 5 == 0:
            self._run.log_text(update, "best response of the update", f"[reward {paid.rewards[best]:+.3f}] {sample}")
        for alarm in self.watch.observe(update, figures, rewards, None if gold is None else gold[whole]):
            self.warn(alarm)
        self._show(update, figures, spent, sample)

    def validated(self, update: int, held: HeldOut) -> dict[str, float]:
        """Record and show the policy's answers to the validation prompts; their figures, the means among them."""
        wins, alarms = self.validations.observe(update, held.prompts, held.responses, held.measures)
        figures = held.means() | wins
        self._run.log(update, figures, "validation")
        self._console.print(validation_text(update, figures, len(held.prompts)), highlight=False)
        for alarm in alarms:
            self.warn(alarm)
        return figures

    def warn(self, alarm: Alarm) -> None:
        """Record a warning and tell it."""
        self._run.record("warnings.jsonl", asdict(alarm))
        self._run.log_text(alarm.step, f"warning: {alarm.kind}", alarm.text)
        self.tell(f"warning (update {alarm.step}): {alarm.text}")

    def tell(self, text: str) -> None:
        """Say something about the run in the terminal."""
        self._console.print(f"[yellow]{escape(text)}", highlight=False)
