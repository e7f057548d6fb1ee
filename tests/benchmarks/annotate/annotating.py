"""What tests of the annotation page share: small projects and people who judge them."""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.annotate.items import Item, checks_among
from benchmarks.annotate.project import Annotator, Answer, Plan
from benchmarks.annotate.store import Store


def pairs(n: int, systems: tuple[str, ...] = ()) -> list[Item]:
    """So many pairs, each with a prompt of its own."""
    return [Item(f"prompt {i}", (f"good {i}", f"bad answer {i}"), systems) for i in range(n)]


def project(folder: Path, items: Sequence[Item], **plan: Any) -> Store:
    """A new store without repeats and checks, unless the plan says otherwise."""
    wanted = Plan(**{"form": "preference", "repeats": 0.0, "checks": 0.0, **plan})
    checks = checks_among(items, wanted.form, 50 if wanted.checks else 0, wanted.seed)
    return Store.create(folder / "annotations.sqlite", [*items, *checks], wanted)


def answer_to(state: dict[str, Any], choice: str, **more: Any) -> Answer:
    """An answer to what a state shows."""
    return Answer(secrets.token_hex(8), state["item"]["showing"], choice, **more)


def answer_ids(store: Store) -> set[str]:
    """The ids of all answers that stand."""
    with closing(sqlite3.connect(store.path)) as db:
        return {name for (name,) in db.execute("SELECT id FROM answers WHERE undone = 0")}


def better(shown: dict[str, Any]) -> str:
    """The choice of somebody who prefers what is good, and who does what an attention check says."""
    first, second = shown["responses"]
    for place, text in (("1", first), ("2", second)):
        if "attention check" in text:
            return place
    return "1" if first.startswith("good") else "2" if second.startswith("good") else "0"


def judge(store: Store, who: Annotator, choose: Callable[[dict[str, Any]], str] = better, most: int = 10_000) -> int:
    """Judge until all is done; how many answers that took."""
    state = store.state(who)
    count = 0
    while state["item"] is not None and count < most:
        state = store.answer(who, answer_to(state, choose(state["item"]), seconds=2.0))
        count += 1
    return count
