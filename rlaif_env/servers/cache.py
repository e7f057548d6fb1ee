"""Answers of language model servers, kept on disk by what was asked, and the command ``rlaif cache``.

One SQLite file in WAL mode, shared by any number of processes. An answer counts as stored when its transaction is
committed: a process killed at any moment loses only what it had not yet been told is stored. Failures and keys are
never stored.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from rlaif_env.api import RLAIFError
from rlaif_env.models.fetching import cache_folder
from rlaif_env.tables import Table

_BUSY_SECONDS = 60.0
_VERSION = 2
_SUMMARY = {"model": str, "endpoint": str, "answers": int, "hits": int, "bytes": int, "used": float}
_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    key BLOB PRIMARY KEY,
    model TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    stored REAL NOT NULL,
    used REAL NOT NULL,
    hits INTEGER NOT NULL DEFAULT 0,
    body TEXT NOT NULL,
    digest BLOB NOT NULL
) WITHOUT ROWID
"""


def default_cache() -> Path:
    """Where answers are kept unless said otherwise."""
    return cache_folder() / "answers.sqlite"


def cache_key(**facts: Any) -> bytes:
    """SHA-256 of all that decides an answer; every character counts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()


def _digest(key: bytes, body: str) -> bytes:
    return hashlib.sha256(key + body.encode()).digest()[:8]


class AnswerCache(AbstractContextManager["AnswerCache"]):
    """A store of answers by key. An answer whose bytes have changed on the disk is not given: it is asked for again.

    Args:
        path: The file, made if it is not there; None keeps the answers in this process's memory only.

    Raises:
        RLAIFError: If the file cannot be opened or is no such store.
    """

    def __init__(self, path: str | Path | None) -> None:
        self.path = None if path is None else Path(path).expanduser()
        self._lock = threading.RLock()
        self._hits: dict[bytes, int] = {}
        with self._explained():
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            where = self.path or ":memory:"
            self._db = sqlite3.connect(where, _BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            try:
                self._prepare()
            except BaseException:
                self._db.close()
                raise

    def _prepare(self) -> None:
        until = time.monotonic() + _BUSY_SECONDS
        while True:  # SQLite does not wait for others that change a new file's mode, as it does for all else
            try:
                self._db.execute("PRAGMA journal_mode=WAL")
                break
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > until:
                    raise
                time.sleep(0.01)
        self._db.execute("PRAGMA synchronous=NORMAL")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, _VERSION):
            raise RLAIFError(
                f"expected a cache of version {_VERSION} at {self.path}, found version {version}; "
                "delete the file or name another"
            )
        if version == 0:
            self._db.execute(_SCHEMA)
            self._db.execute(f"PRAGMA user_version={_VERSION}")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, ValueError, OverflowError) as error:  # ValueError: a path with a zero byte
            if isinstance(error, RLAIFError):
                raise
            raise RLAIFError(
                f"expected a cache of answers that can be read and written at {self.path}, found: {error}; "
                "delete the file, or name another (--labeler.server.cache and the like; in Python: cache=...)"
            ) from error

    def get(self, key: bytes) -> str | None:
        """The stored answer, or None; counts a hit."""
        with self._lock, self._explained():
            if (body := self._intact(key)) is None:
                return None
            self._hits[key] = self._hits.get(key, 0) + 1
            if len(self._hits) >= 1000:
                self._count_hits()
            return body

    def put(self, rows: Iterable[tuple[bytes, str]], *, model: str, endpoint: str) -> None:
        """Store answers in one transaction; when it returns they survive this process. Those already there stay."""
        now = time.time()
        insert = "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, 0, ?, ?)"
        with self._lock, self._explained(), self._db:
            self._db.execute("BEGIN IMMEDIATE")
            for key, body in rows:
                if self._intact(key) is not None:
                    continue
                self._db.execute(insert, (key, model, endpoint, now, now, body, _digest(key, body)))
                if self._intact(key) is None:  # a tree with a flipped byte takes a row and does not find it again
                    raise sqlite3.DatabaseError("the file is damaged: an answer that was stored is not there")

    def _intact(self, key: bytes) -> str | None:
        row = self._db.execute("SELECT body, digest FROM answers WHERE key = ?", (key,)).fetchone()
        if row is None or not isinstance(row[0], str) or _digest(key, row[0]) != row[1]:
            return None
        return str(row[0])

    def forget(self, key: bytes) -> None:
        """Delete one answer."""
        with self._lock, self._explained():
            self._hits.pop(key, None)
            self._db.execute("DELETE FROM answers WHERE key = ?", (key,))

    def _count_hits(self) -> None:
        if self._hits:
            rows = [(count, time.time(), key) for key, count in self._hits.items()]
            with self._db:
                self._db.execute("BEGIN IMMEDIATE")
                self._db.executemany("UPDATE answers SET hits = hits + ?, used = ? WHERE key = ?", rows)
            self._hits.clear()

    def __len__(self) -> int:
        with self._lock, self._explained():
            return int(self._db.execute("SELECT count(*) FROM answers").fetchone()[0])

    def summary(self) -> list[Mapping[str, Any]]:
        """For each model and endpoint: answers, hits, bytes, when last used (seconds since 1970)."""
        with self._lock, self._explained():
            self._count_hits()
            sums = "count(*), sum(hits), sum(length(body)), max(used)"
            groups = "GROUP BY model, endpoint ORDER BY model, endpoint"
            rows = self._db.execute(f"SELECT model, endpoint, {sums} FROM answers {groups}").fetchall()
            if any([type(value) for value in row] != list(_SUMMARY.values()) for row in rows):
                raise sqlite3.DataError("values of the wrong kind")
        return [dict(zip(_SUMMARY, row, strict=True)) for row in rows]

    def prune(self, *, unused_days: float = 0.0, model: str | None = None) -> int:
        """Delete what was not used for so many days (of one model); returns how many answers went."""
        with self._lock, self._explained():
            self._count_hits()
            before = time.time() - 86400 * unused_days
            unused = "DELETE FROM answers WHERE used <= ? AND (? IS NULL OR model = ?)"
            gone = self._db.execute(unused, (before, model, model)).rowcount
            self._db.execute("VACUUM")
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return gone

    def close(self) -> None:
        """Write the hit counts and close; a second call does nothing."""
        with self._lock, suppress(sqlite3.ProgrammingError):
            with suppress(sqlite3.Error):
                self._count_hits()
            self._db.close()

    def __exit__(self, *exception: object) -> None:
        self.close()


def cache_main(argv: Sequence[str] | None = None) -> int:
    """The command ``rlaif cache``: shows size and hits, or prunes; returns the exit code."""
    from rich.console import Console

    parser = argparse.ArgumentParser("rlaif cache", description="Look after the stored answers of model servers.")
    parser.add_argument("action", nargs="?", choices=("show", "prune"), default="show")
    parser.add_argument("--path", type=Path, default=default_cache(), help="the file (default: %(default)s)")
    days = "prune what was unused for so many days (default: %(default)s)"
    parser.add_argument("--unused-days", type=float, default=30.0, help=days)
    parser.add_argument("--model", help="prune this model's answers only")
    config = parser.parse_args(argv)
    console = Console(highlight=False)
    path: Path = config.path
    if not path.is_file():
        console.print(f"no answers are stored at {path}", soft_wrap=True)
        return 0
    with AnswerCache(path) as cache:
        if config.action == "prune":
            gone = cache.prune(unused_days=config.unused_days, model=config.model)
            console.print(f"{gone} answers deleted, {len(cache)} kept")
            return 0
        rows = []
        for row in cache.summary():
            used = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["used"]))
            counts = (f"{row['answers']:,}", f"{row['hits']:,}", f"{row['bytes'] / 1000:,.0f}")
            rows.append((row["model"], row["endpoint"], *counts, used))
        size = sum(p.stat().st_size for p in (path, path.with_name(path.name + "-wal")) if p.is_file())
        columns = ("model", "endpoint", "answers", "hits", "kB", "last used")
        console.print(Table("stored answers", columns, rows).rich())
        console.print(f"{path}: {size / 1e6:.1f} MB on disk", soft_wrap=True)
    return 0
