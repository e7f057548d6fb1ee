"""Items and answers in one SQLite file: an answer is on the disk before anybody is told so.

The file is in WAL mode with ``synchronous=FULL``, and each answer is one transaction, so a process killed at any moment
loses nothing that it acknowledged; answers that arrive while another is being written share the next one's way to the
disk. An answer has an id made by the page: sent twice it counts once. One process serves a file (it holds the run
folder's lock); others may read.
"""

from __future__ import annotations

import math
import os
import secrets
import sqlite3
import threading
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.annotate.items import CHOICES, Item, fingerprint
from benchmarks.annotate.project import MAX_COMMENT, STRENGTHS, Annotator, Answer, Judgement, Plan, StoreError
from benchmarks.annotate.showings import Showings
from rlaif_env.api import DataError, RLAIFError
from rlaif_env.data.jsonl import check_text

T = TypeVar("T")

_MAX_NAME = 60
_APPLICATION = 0x524C4146  # "RLAF": which program a SQLite file belongs to
_VERSION = 1

_SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE items (
    id INTEGER PRIMARY KEY, kind TEXT NOT NULL, data TEXT NOT NULL, judged INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX items_by_kind ON items (kind, judged);
CREATE TABLE annotators (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, folded TEXT NOT NULL UNIQUE, key TEXT NOT NULL UNIQUE,
    joined REAL NOT NULL
);
CREATE TABLE showings (
    id INTEGER PRIMARY KEY, annotator INTEGER NOT NULL REFERENCES annotators, item INTEGER NOT NULL REFERENCES items,
    kind TEXT NOT NULL, turn INTEGER NOT NULL, place INTEGER NOT NULL, swapped INTEGER NOT NULL, shown REAL NOT NULL,
    UNIQUE (annotator, turn), UNIQUE (annotator, item, kind)
);
CREATE INDEX showings_by_item ON showings (item);
CREATE TABLE answers (
    id TEXT PRIMARY KEY, showing INTEGER NOT NULL REFERENCES showings, choice TEXT NOT NULL, strength TEXT NOT NULL,
    comment TEXT NOT NULL, seconds REAL NOT NULL, answered REAL NOT NULL, undone INTEGER NOT NULL DEFAULT 0
);
CREATE UNIQUE INDEX one_answer_a_showing ON answers (showing) WHERE undone = 0;
"""


class Store:
    """The annotations of one project.

    Args:
        path: The file.
        write: Open it to take answers; else to read.

    Raises:
        StoreError: If it is no such file, of another version, or cannot be opened. Nothing is changed then.
    """

    def __init__(self, path: Path, *, write: bool = False) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._waiting: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        if not path.is_file():
            raise StoreError(f"expected annotations at {path}, found no such file")
        with self._explained():
            uri = f"{path.absolute().as_uri()}?mode={'rw' if write else 'ro'}"
            self._db = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=10)
            try:
                self._check()
                self._db.execute("PRAGMA synchronous = FULL")
                self._db.execute("PRAGMA foreign_keys = ON")
                facts = dict(self._db.execute("SELECT name, value FROM facts"))
                self.fingerprint, self.csrf, self.token = (facts[name] for name in ("fingerprint", "csrf", "token"))
                self.plan = Plan(**{name: type(default)(facts[name]) for name, default in asdict(Plan()).items()})
                self._showings = Showings(self._db, self.plan)
            except BaseException:
                self._db.close()
                raise

    @classmethod
    def create(cls, path: Path, items: Sequence[Item], plan: Plan) -> Store:
        """Make a project's file, or open the one that is there, to take answers.

        Raises:
            StoreError: As for opening; also if the file holds other items or another plan, or cannot be written.
        """
        if not path.exists() or path.stat().st_size == 0:  # empty: killed before the first transaction was whole
            cls._make(path, items, plan)
        store = cls(path, write=True)
        if store.fingerprint != fingerprint(items) or store.plan != plan:
            store.close()
            raise StoreError(f"expected {path} to hold these items, found another project: name another folder (--out)")
        return store

    @staticmethod
    def _make(path: Path, items: Sequence[Item], plan: Plan) -> None:
        facts = {
            "fingerprint": fingerprint(items),
            "csrf": secrets.token_urlsafe(32),  # kept, so that open pages and links outlive a restart
            "token": secrets.token_urlsafe(32),
            **{name: str(value) for name, value in asdict(plan).items()},
        }
        try:
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # it holds the keys of the annotators' links
            with closing(sqlite3.connect(path, isolation_level=None)) as db:
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("BEGIN IMMEDIATE")
                for statement in _SCHEMA.split(";"):
                    db.execute(statement)
                db.executemany("INSERT INTO facts VALUES (?, ?)", facts.items())
                db.executemany("INSERT INTO items (kind, data) VALUES (?, ?)", [(i.kind, i.to_json()) for i in items])
                db.execute(f"PRAGMA application_id = {_APPLICATION}")
                db.execute(f"PRAGMA user_version = {_VERSION}")
                db.execute("COMMIT")
        except (OSError, sqlite3.Error) as error:
            for suffix in ("", "-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            raise StoreError(f"cannot write {path}: {error}; nothing was kept of it", 507) from error

    def _check(self) -> None:
        """Refuse a file that is not ours before anything is done with it."""
        pragmas = "PRAGMA application_id", "PRAGMA user_version"
        application, version = (self._db.execute(pragma).fetchone()[0] for pragma in pragmas)
        if application != _APPLICATION:
            raise StoreError(f"expected annotations in {self.path}, found a database of another program: leave it be")
        if version != _VERSION:
            raise StoreError(
                f"expected annotations of version {_VERSION} in {self.path}, found version {version}: use the version "
                "of this package that made them, or name another folder (--out)"
            )

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        with self._lock:
            self._db.close()

    def annotators(self) -> list[Annotator]:
        """All annotators in the order they joined."""
        return [Annotator(*row) for row in self._select("SELECT id, name, key FROM annotators ORDER BY id")]

    def join(self, name: str) -> Annotator:
        """Take in a new annotator.

        Raises:
            StoreError: If the name is taken (case and width of letters do not tell names apart) or is none.
        """
        clean = " ".join(unicodedata.normalize("NFC", name).split())
        _check_text("name", clean, _MAX_NAME, may_be_empty=False)
        folded = unicodedata.normalize("NFKC", clean).casefold()
        key = secrets.token_urlsafe(24)

        def act() -> Annotator:
            if self._db.execute("SELECT 1 FROM annotators WHERE folded = ?", (folded,)).fetchone():
                raise StoreError(
                    f"expected a name that nobody else has, found that there is an annotator {clean!r}: open your own "
                    "link if that is you (rlaif annotate prints all links when it starts), or take another name",
                    409,
                )
            sql = "INSERT INTO annotators (name, folded, key, joined) VALUES (?, ?, ?, ?)"
            number = self._db.execute(sql, (clean, folded, key, time.time())).lastrowid
            return Annotator(int(number or 0), clean, key)

        return self._change(act)

    def annotator(self, key: str) -> Annotator:
        """The annotator whose link carries a key; raises `StoreError` where there is none."""
        rows = self._select("SELECT id, name, key FROM annotators WHERE key = ?", key)
        if not rows:
            raise StoreError("expected an annotator's link, found one that leads to nobody here: give your name", 401)
        return Annotator(*rows[0])

    def state(self, who: Annotator) -> dict[str, Any]:
        """What an annotator is to be shown: the open item, or a new one, or none when all is done; and the progress."""
        return self._change(lambda: self._showings.state(who))

    def answer(self, who: Annotator, answer: Answer) -> dict[str, Any]:
        """Take an answer and give the state after it; when this returns both are on the disk.

        Raises:
            StoreError: If the answer is not one to this annotator's showing, the showing has another answer, or the
                file cannot be written. Nothing is changed then.
        """

        def act() -> dict[str, Any]:
            self._check_answer(who, answer)
            before = self._db.execute("SELECT showing, choice FROM answers WHERE id = ?", (answer.id,)).fetchone()
            if before is None:
                if self._select("SELECT 1 FROM answers WHERE showing = ? AND undone = 0", answer.showing):
                    what = "found one you answered in another window: reload the page"
                    raise StoreError(f"expected an open item, {what}", 409)
                row = {**asdict(answer), "seconds": min(answer.seconds, 86_400.0), "answered": time.time()}
                sql = "INSERT INTO answers VALUES (:id, :showing, :choice, :strength, :comment, :seconds, :answered, 0)"
                self._db.execute(sql, row)
                self._count(answer.showing, answer.choice, +1)
            elif before != (answer.showing, answer.choice):
                raise StoreError("expected one answer under one id, found another one: reload the page", 409)
            return self._showings.state(who)

        return self._change(act)

    def _check_answer(self, who: Annotator, answer: Answer) -> None:
        choices = (*CHOICES[self.plan.form], "skip")
        if answer.choice not in choices:
            raise StoreError(f"expected a choice of {', '.join(choices)}, found {answer.choice[:20]!r}")
        if answer.strength not in STRENGTHS:
            raise StoreError(f"expected a strength of {', '.join(STRENGTHS[1:])}, found {answer.strength[:20]!r}")
        if not 8 <= len(answer.id) <= 64:
            raise StoreError(f"expected an id of 8 to 64 characters, found {len(answer.id)}")
        if not math.isfinite(answer.seconds) or answer.seconds < 0:
            raise StoreError(f"expected seconds from 0, found {answer.seconds}")
        _check_text("comment", answer.comment, MAX_COMMENT, may_be_empty=True)
        row = self._db.execute("SELECT annotator FROM showings WHERE id = ?", (answer.showing,)).fetchone()
        if row != (who.id,):
            raise StoreError("expected an item that was shown to you, found another: reload the page")

    def undo(self, who: Annotator, showing: int) -> dict[str, Any]:
        """Take back an annotator's last answer and show its item again; the state after it.

        If ``showing`` is not the last one any more, nothing is taken back: the same request sent twice undoes once.
        """

        def act() -> dict[str, Any]:
            if showing == self._showings.last(who):
                sql = "SELECT id, choice FROM answers WHERE showing = ? AND undone = 0"
                answer, choice = self._db.execute(sql, (showing,)).fetchone()
                self._db.execute("UPDATE answers SET undone = 1 WHERE id = ?", (answer,))
                self._count(showing, choice, -1)
            return self._showings.state(who)

        return self._change(act)

    def _count(self, showing: int, choice: str, step: int) -> None:
        """Keep the number of judges of a showing's item."""
        if choice != "skip":
            sql = "SELECT item FROM showings WHERE id = ? AND kind = 'item'"
            self._db.execute(f"UPDATE items SET judged = judged + ? WHERE id = ({sql})", (step, showing))

    def items(self) -> dict[int, Item]:
        """All items by id."""
        return {number: Item.from_json(data) for number, data in self._select("SELECT id, data FROM items ORDER BY id")}

    def judgements(self) -> list[Judgement]:
        """All answers that stand, in the order they came."""
        rows = self._select(
            "SELECT n.name, s.item, s.kind, s.swapped, a.choice, a.strength, a.comment, a.seconds FROM answers a "
            "JOIN showings s ON s.id = a.showing JOIN annotators n ON n.id = s.annotator WHERE undone = 0 "
            "ORDER BY a.answered"
        )
        return [Judgement(name, item, kind, bool(swapped), *rest) for name, item, kind, swapped, *rest in rows]

    def _select(self, sql: str, *values: str | int) -> list[Any]:
        with self._lock, self._explained():
            return self._db.execute(sql, values).fetchall()

    def _change(self, act: Callable[[], T]) -> T:
        """Run something all or nothing; when this returns it is on the disk.

        Whoever gets the lock first runs and commits what all the others wait for: one sync of the disk for all.
        """
        outcome: Future[T] = Future()
        self._waiting.append((act, outcome))
        with self._lock:
            if not outcome.done():
                self._run([self._waiting.popleft() for _ in range(len(self._waiting))])
        return outcome.result()

    def _run(self, changes: Sequence[tuple[Callable[[], Any], Future[Any]]]) -> None:
        """Run some changes in one transaction; one that is refused leaves nothing behind, the others stand."""
        values: dict[Future[Any], Any] = {}
        refused: dict[Future[Any], RLAIFError] = {}
        try:
            with self._explained(), self._db:
                self._db.execute("BEGIN IMMEDIATE")
                for act, outcome in changes:
                    self._db.execute("SAVEPOINT change")
                    try:
                        values[outcome] = act()
                    except RLAIFError as error:
                        refused[outcome] = error
                        self._db.execute("ROLLBACK TO change")
                    self._db.execute("RELEASE change")
        except BaseException as error:  # nobody may wait for ever
            for _, outcome in changes:
                outcome.set_exception(refused.get(outcome, error))
            return
        for _, outcome in changes:
            if outcome in refused:
                outcome.set_exception(refused[outcome])
            else:
                outcome.set_result(values[outcome])

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn SQLite's errors into one that says what it means for the answers."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise StoreError(
                f"cannot use {self.path}: {error}; make room or mend the disk. What was acknowledged is kept", 507
            ) from error
        except sqlite3.DatabaseError as error:
            raise StoreError(f"expected annotations in {self.path}, found: {error}; nothing was changed") from error


def _check_text(name: str, text: str, most: int, *, may_be_empty: bool) -> None:
    try:
        check_text({name: text}, name, may_be_empty=may_be_empty, max_characters=most)
    except DataError as error:
        raise StoreError(str(error)) from error
