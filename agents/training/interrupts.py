"""Ctrl-C and SIGTERM during a training: the one waits for the update in hand, the other saves and ends within seconds.

Of several processes both end the training within seconds, because torchrun kills those that take longer.

A signal may come at any moment, also while weights are being written to. So SIGTERM saves the state as of the end of
the last update, which is still there until the optimiser's step; after that it waits for the update's end.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from rlaif_env.ranks import Ranks

TERMINATED = 128 + signal.SIGTERM
"""The exit code after SIGTERM: 143."""


class Interrupts:
    """What signals have asked for.

    Attributes:
        stop: Whether Ctrl-C was pressed: the training is to end after this update.
        save: Saves the last whole update; False where it cannot at this moment. None while nothing is to be saved.
    """

    def __init__(self, console: Console, ranks: Ranks | None = None) -> None:
        self.stop = False
        self.save: Callable[[], bool] | None = None
        self._console = console
        self._held = False
        self._terminating = 0  # by which signal
        self._ranks = ranks or Ranks()

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Take the two signals; does nothing outside the main thread, which alone can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        signal.signal(signal.SIGINT, self._interrupted if self._ranks.size == 1 else self._terminated)
        signal.signal(signal.SIGTERM, self._terminated)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """SIGTERM waits for the end of this block: files are being written in it."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._terminating:
            self._end()

    def _interrupted(self, number: int, frame: object) -> None:
        if self.stop or self.save is None:
            raise KeyboardInterrupt
        self.stop = True
        self._console.print("[yellow]interrupted: finishing this update, then saving a checkpoint (again: at once)")

    def _terminated(self, number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends at once
        self._terminating = number
        self._ranks.here()
        if not self._held:
            self._end()

    def _end(self) -> None:
        saved = self.save is not None and self.save()
        if self.save is None or saved:
            lost = f" ({told})" if (told := self._ranks.lost()) else ""
            if saved:
                self._console.print(f"[yellow]terminated{lost}: a checkpoint of the last whole update is saved")
            raise SystemExit(128 + self._terminating)
