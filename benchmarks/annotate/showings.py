"""What an annotator is shown next.

An annotator sees a row of showings, each made when the one before is answered, in an order of their own:

* new items, in a random order by annotator, while they have too few judges (``overlap``);
* after some of them an item again with the order swapped, and an attention check, at the rates asked for.

Everything here runs inside a transaction of `benchmarks.annotate.store`.
"""

from __future__ import annotations

import sqlite3
import time
from typing import Any

from benchmarks.annotate.items import Item
from benchmarks.annotate.project import Annotator, Plan, due, order, unit

_REPEAT_GAP = 10  # showings between an item and its repeat, so that it is judged anew and not remembered
_LEASE = 1800.0  # seconds for which an item that was shown but not answered counts as judged
_PACE = 20  # the pace is that of the last so many answers

_STANDS = "EXISTS (SELECT 1 FROM answers a WHERE a.showing = s.id AND a.undone = 0)"
_ANSWERED = "showings s JOIN answers a ON a.showing = s.id AND a.undone = 0 WHERE s.annotator = ?"


class Showings:
    """Picks and records what each annotator sees."""

    def __init__(self, db: sqlite3.Connection, plan: Plan) -> None:
        self._db, self._plan = db, plan
        self._ids = [row[0] for row in db.execute("SELECT id FROM items WHERE kind = 'item' ORDER BY id")]
        self._checks = [row[0] for row in db.execute("SELECT id FROM items WHERE kind = 'check' ORDER BY id")]

    def state(self, who: Annotator) -> dict[str, Any]:
        """The item to show, None when all is done, and how far the annotator has come; JSON-able.

        Nothing in the item tells who wrote what, or whether it is a repeat or a check.
        """
        sql = f"SELECT s.id, item, swapped FROM showings s WHERE annotator = ? AND NOT {_STANDS} ORDER BY turn LIMIT 1"
        row = self._db.execute(sql, (who.id,)).fetchone() or self._show_next(who)
        count = self._answered(who)
        sql = f"SELECT seconds FROM {_ANSWERED} ORDER BY turn DESC LIMIT {_PACE}"
        pace = [seconds for (seconds,) in self._db.execute(sql, (who.id,))]
        return {
            "name": who.name,
            "item": None if row is None else self._page_item(*row),
            "answered": sum(count.values()),
            "left": 0 if row is None else max(1, self._left(who, count)),
            "pace": sum(pace) / len(pace) if pace else None,
            "last": self.last(who),
        }

    def last(self, who: Annotator) -> int | None:
        """The showing of the annotator's last answer that stands."""
        row = self._db.execute(f"SELECT s.id FROM {_ANSWERED} ORDER BY turn DESC LIMIT 1", (who.id,)).fetchone()
        return None if row is None else int(row[0])

    def _page_item(self, showing: int, number: int, swapped: int) -> dict[str, Any]:
        item = Item.from_json(self._db.execute("SELECT data FROM items WHERE id = ?", (number,)).fetchone()[0])
        sql = "SELECT choice, strength, comment FROM answers WHERE showing = ? ORDER BY answered DESC LIMIT 1"
        before = self._db.execute(sql, (showing,)).fetchone()
        return {
            "showing": showing,
            "prompt": item.prompt,
            "responses": list(reversed(item.responses) if swapped else item.responses),
            "before": None if before is None else dict(zip(("choice", "strength", "comment"), before, strict=True)),
        }

    def _answered(self, who: Annotator) -> dict[str, int]:
        """The annotator's answers that stand, by kind of showing."""
        return dict(self._db.execute(f"SELECT kind, count(*) FROM {_ANSWERED} GROUP BY kind", (who.id,)))

    def _due(self, who: Annotator, new: int, count: dict[str, int]) -> dict[str, int]:
        """How many repeats and checks belong among so many new items and were not yet answered."""
        rates = {"repeat": self._plan.repeats, "check": self._plan.checks}
        owed = {kind: due(rate, new, self._plan.seed, who.id, kind) for kind, rate in rates.items()}
        owed["check"] = min(owed["check"], len(self._checks))
        return {kind: max(0, total - count.get(kind, 0)) for kind, total in owed.items()}

    def _left(self, who: Annotator, count: dict[str, int]) -> int:
        """How many showings are still to come, an open one counted, if nobody else takes the items."""
        new = count.get("item", 0)
        still = len(self._ids) - new
        if self._plan.overlap:
            sql = f"SELECT s.item FROM showings s WHERE annotator = ? AND kind = 'item' AND {_STANDS}"
            sql = f"SELECT count(*) FROM items WHERE kind = 'item' AND judged < ? AND id NOT IN ({sql})"
            still = self._number(sql, self._plan.overlap, who.id)
        return still + sum(self._due(who, new + still, count).values())

    def _show_next(self, who: Annotator) -> tuple[int, int, int] | None:
        """Make the next showing: its id, its item, and whether it is swapped; None when there is nothing more."""
        count = self._answered(who)
        owed = self._due(who, count.get("item", 0), count)
        fresh = self._fresh(who)
        if owed["check"]:
            return self._show(who, "check", self._checks[count.get("check", 0)], False)
        if owed["repeat"] and (again := self._repeat(who, at_end=fresh is None)):
            return self._show(who, "repeat", *again)
        if fresh is None:
            return None
        item, place = fresh
        swapped = self._plan.form == "preference" and unit(self._plan.seed, who.id, "swap", item) < 0.5
        return self._show(who, "item", item, swapped, place)

    def _show(self, who: Annotator, kind: str, item: int, swapped: bool, place: int = -1) -> tuple[int, int, int]:
        sql = "INSERT INTO showings (annotator, item, kind, turn, place, swapped, shown) VALUES (?, ?, ?, ?, ?, ?, ?)"
        row = (who.id, item, kind, self._turn(who), place, int(swapped), time.time())
        return int(self._db.execute(sql, row).lastrowid or 0), item, int(swapped)

    def _turn(self, who: Annotator) -> int:
        """The number of the annotator's next showing, from 0."""
        return self._number("SELECT coalesce(max(turn), -1) + 1 FROM showings WHERE annotator = ?", who.id)

    def _fresh(self, who: Annotator) -> tuple[int, int] | None:
        """The next item in the annotator's own order that still wants judges, with its place in that order."""
        places = order(self._plan.seed, who.id, len(self._ids))
        start = self._number("SELECT coalesce(max(place), -1) + 1 FROM showings WHERE annotator = ?", who.id)
        for place in range(start, len(places)):
            if self._wants(item := self._ids[places[place]]):
                return item, place
        # what others left open after this annotator had come past it
        sql = "SELECT item FROM showings WHERE annotator = ? AND kind = 'item'"
        seen = {item for (item,) in self._db.execute(sql, (who.id,))}
        for place in range(start if len(seen) < start else 0):
            if (item := self._ids[places[place]]) not in seen and self._wants(item):
                return item, place
        return None

    def _wants(self, item: int) -> bool:
        """Whether an item has too few judges, counting those who have it before them."""
        if not self._plan.overlap:
            return True
        held = f"SELECT count(*) FROM showings s WHERE s.item = i.id AND kind = 'item' AND shown > ? AND NOT {_STANDS}"
        sql = f"SELECT judged + ({held}) FROM items i WHERE id = ?"
        return self._number(sql, time.time() - _LEASE, item) < self._plan.overlap

    def _number(self, sql: str, *values: float) -> int:
        return int(self._db.execute(sql, values).fetchone()[0])

    def _repeat(self, who: Annotator, at_end: bool) -> tuple[int, bool] | None:
        """An item that the annotator judged some time ago, in the other order."""
        sql = (
            f"SELECT item, swapped FROM {_ANSWERED} AND kind = 'item' AND choice != 'skip' AND turn < ? AND item "
            "NOT IN (SELECT item FROM showings WHERE annotator = ? AND kind = 'repeat') ORDER BY turn"
        )
        turn = self._turn(who)
        rows = self._db.execute(sql, (who.id, turn if at_end else turn - _REPEAT_GAP, who.id)).fetchall()
        if not rows:
            return None
        item, swapped = rows[int(unit(self._plan.seed, who.id, "which", turn) * len(rows))]
        return item, self._plan.form == "preference" and not swapped
