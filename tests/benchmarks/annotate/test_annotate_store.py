"""Answers kept: once each, in everybody's own order, through restarts, undo and a full disk; others' files left be."""

from __future__ import annotations

import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks.annotate.items import Item
from benchmarks.annotate.project import Plan, StoreError, due
from benchmarks.annotate.store import Store
from rlaif_env.api import RLAIFError
from tests.benchmarks.annotate.annotating import answer_ids, answer_to, better, judge, pairs, project


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    result = project(tmp_path, pairs(12))
    yield result
    result.close()


def test_an_answer_moves_on_and_is_kept(store: Store) -> None:
    ada = store.join("Ada")
    state = store.state(ada)
    assert (state["answered"], state["left"], state["last"], state["pace"]) == (0, 12, None, None)
    after = store.answer(ada, answer_to(state, "1", strength="clearly", comment="ah", seconds=3.0))
    assert (after["answered"], after["left"], after["last"], after["pace"]) == (1, 11, state["item"]["showing"], 3.0)
    assert after["item"]["showing"] != state["item"]["showing"]
    (judgement,) = store.judgements()
    assert (judgement.choice, judgement.strength, judgement.comment, judgement.seconds) == ("1", "clearly", "ah", 3.0)
    assert judgement.p_first == float(state["item"]["responses"][0].startswith("good"))


def test_the_same_answer_twice_counts_once(store: Store) -> None:
    ada = store.join("Ada")
    answer = answer_to(store.state(ada), "2")
    assert store.answer(ada, answer) == store.answer(ada, answer)
    assert len(store.judgements()) == 1
    with pytest.raises(StoreError, match="expected one answer under one id"):
        store.answer(ada, replace(answer, choice="1"))
    with pytest.raises(StoreError, match="answered in another window") as caught:
        store.answer(ada, replace(answer, id="another id"))
    assert caught.value.status == 409
    assert [j.choice for j in store.judgements()] == ["2"]


def test_a_skip_is_no_answer_and_shows_the_next(store: Store) -> None:
    ada = store.join("Ada")
    seen = []
    state = store.state(ada)
    while state["item"]:
        seen.append(state["item"]["prompt"])
        state = store.answer(ada, answer_to(state, "skip"))
    assert sorted(seen) == sorted(item.prompt for item in pairs(12))
    assert {j.choice for j in store.judgements()} == {"skip"}


def test_undo_shows_the_last_item_again_with_what_was_said(store: Store) -> None:
    ada = store.join("Ada")
    one = store.state(ada)
    answer = answer_to(one, "1", comment="hm")
    two = store.answer(ada, answer)
    store.answer(ada, answer_to(two, "2"))
    back = store.undo(ada, two["item"]["showing"])
    assert back["item"] == {**two["item"], "before": {"choice": "2", "strength": "", "comment": ""}}
    assert (back["answered"], back["last"]) == (1, one["item"]["showing"])
    assert store.undo(ada, two["item"]["showing"]) == back  # sent twice it undoes once
    first = store.undo(ada, one["item"]["showing"])
    assert (first["answered"], first["last"], first["item"]["before"]["comment"]) == (0, None, "hm")
    store.answer(ada, answer)  # a late copy of an answer that was taken back stays taken back
    assert store.judgements() == []
    again = store.answer(ada, answer_to(first, "0"))
    assert again["item"]["showing"] == two["item"]["showing"]
    assert [j.choice for j in store.judgements()] == ["0"]


def test_everybody_has_an_order_of_their_own_and_both_positions(tmp_path: Path) -> None:
    store = project(tmp_path, pairs(30))
    orders = {}
    for name in ("Ada", "Ben"):
        who = store.join(name)
        judge(store, who)
        orders[name] = [j.item for j in store.judgements() if j.annotator == name]
    assert orders["Ada"] != orders["Ben"]
    assert sorted(orders["Ada"]) == sorted(orders["Ben"])
    swapped = Counter(j.swapped for j in store.judgements())
    assert 15 <= swapped[True] <= 45  # of 60; outside with a chance of 1e-4, were the seed not fixed
    assert all(j.p_first == 1.0 for j in store.judgements())
    store.close()


def test_overlap_is_what_was_asked_for(tmp_path: Path) -> None:
    store = project(tmp_path, pairs(30), overlap=2)
    people = [store.join(name) for name in ("Ada", "Ben", "Cy")]
    states = {who.id: store.state(who) for who in people}
    while any(state["item"] for state in states.values()):
        for who in people:
            if states[who.id]["item"]:
                states[who.id] = store.answer(who, answer_to(states[who.id], better(states[who.id]["item"])))
    judged = Counter(j.item for j in store.judgements())
    assert set(judged.values()) == {2}
    assert len(judged) == 30
    each = Counter((j.item, j.annotator) for j in store.judgements())
    assert max(each.values()) == 1
    store.close()


def test_what_one_annotator_skips_is_asked_of_another(tmp_path: Path) -> None:
    store = project(tmp_path, pairs(4), overlap=1)
    ada, ben = store.join("Ada"), store.join("Ben")
    judge(store, ada, lambda shown: "skip")
    assert judge(store, ben) == 4
    store.close()


def test_an_item_left_lying_is_asked_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = project(tmp_path, pairs(1), overlap=1)
    ada, ben = store.join("Ada"), store.join("Ben")
    open_ = store.state(ada)
    assert store.state(ben)["item"] is None
    monkeypatch.setattr("benchmarks.annotate.showings._LEASE", -1.0)
    assert judge(store, ben) == 1
    store.answer(ada, answer_to(open_, "1"))  # who comes back late is still heard
    assert len(store.judgements()) == 2
    store.close()


def test_repeats_are_swapped_and_checks_come_at_their_rate(tmp_path: Path) -> None:
    store = project(tmp_path, pairs(50), repeats=0.2, checks=0.1)
    ada = store.join("Ada")
    total = store.state(ada)["left"]
    assert judge(store, ada) == total == 65
    by_kind: dict[str, list[Any]] = {"item": [], "repeat": [], "check": []}
    for turn, judgement in enumerate(store.judgements()):
        by_kind[judgement.kind].append((turn, judgement))
    assert {kind: len(result) for kind, result in by_kind.items()} == {"item": 50, "repeat": 10, "check": 5}
    first = {j.item: (turn, j) for turn, j in by_kind["item"]}
    for turn, again in by_kind["repeat"]:
        before, judgement = first[again.item]
        assert again.swapped != judgement.swapped
        assert turn - before >= 10 or turn >= 60
    items = store.items()
    assert all(j.choice == items[j.item].expected for _, j in by_kind["check"])
    store.close()


def test_how_many_extras_are_due_by_hand() -> None:
    for annotator in range(20):
        counts = [due(0.25, n, 0, annotator, "repeat") for n in range(41)]
        assert counts[::4] == list(range(11))  # exactly one in each block of four
        assert all(b - a in (0, 1) for a, b in pairwise(counts))
    places = {tuple(due(0.25, n, 0, annotator, "repeat") for n in range(5)) for annotator in range(50)}
    assert len(places) > 3  # and not always at the same place of it
    assert due(0.0, 1000, 0, 0, "repeat") == 0
    assert due(1.0, 7, 0, 0, "check") == 7


def test_nothing_shown_tells_who_wrote_it_or_what_kind_it_is(tmp_path: Path) -> None:
    store = project(tmp_path, pairs(12, systems=("secret-a", "secret-b")), repeats=0.5, checks=0.5)
    ada = store.join("Ada")
    state = store.state(ada)
    while state["item"]:
        assert set(state["item"]) == {"showing", "prompt", "responses", "before"}
        assert "secret" not in str(state)
        state = store.answer(ada, answer_to(state, better(state["item"])))
    store.close()


def test_a_restart_goes_on_where_it_was(tmp_path: Path) -> None:
    items = pairs(20)
    store = project(tmp_path, items, repeats=0.2)
    ada = store.join("Ada")
    judge(store, ada, most=7)
    before, said_so_far = store.state(ada), store.judgements()
    store.close()
    again = project(tmp_path, items, repeats=0.2)
    assert again.annotator(ada.key) == ada
    assert (again.state(ada), again.judgements()) == (before, said_so_far)
    again.close()


def test_many_threads_at_once_lose_and_double_nothing(tmp_path: Path) -> None:
    store = project(tmp_path, pairs(40), overlap=2, repeats=0.1, checks=0.1)
    people = [store.join(f"annotator {i}") for i in range(6)]
    counts: dict[int, int] = {}
    threads = [threading.Thread(target=lambda who=who: counts.__setitem__(who.id, judge(store, who))) for who in people]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.judgements()) == sum(counts.values()) == len(answer_ids(store))
    assert set(Counter(j.item for j in store.judgements() if j.kind == "item").values()) == {2}
    store.close()


NAMES = {
    "ada": "found that there is an annotator 'ada'",
    " ADA ": "found that there is an annotator 'ADA'",
    "\uff21da": "expected a name that nobody else has",
    "  ": "expected name to hold text",
    "a\x00b": "control character",
    "x" * 61: "at most 60 characters, found 61",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_are_taken_or_none(name: str, store: Store) -> None:
    store.join("Ada")
    with pytest.raises(StoreError) as caught:
        store.join(name)
    assert NAMES[name] in str(caught.value)
    assert [one.name for one in store.annotators()] == ["Ada"]


ANSWERS: dict[str, tuple[dict[str, Any], str]] = {
    "choice": ({"choice": "3"}, "expected a choice of 1, 2, 0, skip, found '3'"),
    "strength": ({"strength": "very"}, "expected a strength of slightly, clearly, strongly, found 'very'"),
    "comment": ({"comment": "x" * 2001}, "at most 2000 characters, found 2001"),
    "control": ({"comment": "a\x1bb"}, "control character U+001B"),
    "id": ({"id": "short"}, "expected an id of 8 to 64 characters, found 5"),
    "seconds": ({"seconds": float("nan")}, "expected seconds from 0, found nan"),
    "past": ({"seconds": -1.0}, "expected seconds from 0, found -1.0"),
    "showing": ({"showing": 999}, "expected an item that was shown to you, found another"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_that_cannot_be_taken(name: str, store: Store) -> None:
    ada = store.join("Ada")
    changes, message = ANSWERS[name]
    with pytest.raises(StoreError) as caught:
        store.answer(ada, replace(answer_to(store.state(ada), "1"), **changes))
    assert message in str(caught.value)
    assert store.judgements() == []


def test_nobody_answers_for_somebody_else(store: Store) -> None:
    ada, ben = store.join("Ada"), store.join("Ben")
    with pytest.raises(StoreError, match="shown to you"):
        store.answer(ben, answer_to(store.state(ada), "1"))
    state = store.answer(ada, answer_to(store.state(ada), "1"))
    store.undo(ben, state["last"])
    assert len(store.judgements()) == 1
    with pytest.raises(StoreError, match="leads to nobody here") as caught:
        store.annotator("no such key")
    assert caught.value.status == 401


def test_a_full_disk_is_said_and_keeps_what_was_acknowledged(store: Store) -> None:
    ada = store.join("Ada")
    state = store.answer(ada, answer_to(store.state(ada), "1"))
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")  # SQLite then reports a full disk
    with pytest.raises(StoreError, match="database or disk is full; make room") as caught:
        while True:
            state = store.answer(ada, answer_to(state, "2", comment="x" * 2000))
    assert caught.value.status == 507
    kept = len(store.judgements())
    assert kept == state["answered"] >= 1
    store._db.execute("PRAGMA max_page_count = 1000000")
    assert store.answer(ada, answer_to(state, "2"))["answered"] == kept + 1


# --- other files ------------------------------------------------------------------------------------------------------


def test_another_program_s_database_is_left_be(tmp_path: Path) -> None:
    file = tmp_path / "annotations.sqlite"
    with sqlite3.connect(file) as db:
        db.execute("CREATE TABLE theirs (x)")
    before = file.read_bytes()
    with pytest.raises(StoreError, match="found a database of another program"):
        project(tmp_path, pairs(2))
    assert file.read_bytes() == before


def test_another_version_is_left_be(tmp_path: Path) -> None:
    project(tmp_path, pairs(2)).close()
    file = tmp_path / "annotations.sqlite"
    with sqlite3.connect(file) as db:
        db.execute("PRAGMA user_version = 7")
    with pytest.raises(StoreError, match=r"expected annotations of version 1 in .*, found version 7"):
        Store(file)
    with pytest.raises(StoreError, match="found version 7"):
        project(tmp_path, pairs(2))


@pytest.mark.parametrize("items, plan", [(pairs(3), {}), (pairs(2), {"overlap": 3}), (pairs(2), {"seed": 1})])
def test_another_project_is_left_be(items: list[Item], plan: dict[str, Any], tmp_path: Path) -> None:
    store = project(tmp_path, pairs(2))
    judge(store, store.join("Ada"))
    store.close()
    with pytest.raises(StoreError, match="found another project: name another folder"):
        project(tmp_path, items, **plan)
    kept = Store(tmp_path / "annotations.sqlite")
    assert len(kept.judgements()) == 2
    kept.close()


def test_what_is_no_database_and_what_is_not_there(tmp_path: Path) -> None:
    file = tmp_path / "annotations.sqlite"
    with pytest.raises(StoreError, match="found no such file"):
        Store(file)
    file.write_text("something of somebody's\n" * 100)
    with pytest.raises(StoreError, match="found: file is not a database; nothing was changed"):
        project(tmp_path, pairs(2))
    assert file.read_text().startswith("something")


def test_a_start_that_was_killed_before_it_wrote_anything_is_made_good(tmp_path: Path) -> None:
    (tmp_path / "annotations.sqlite").touch()
    store = project(tmp_path, pairs(2))
    assert len(store.items()) == 2
    store.close()


def test_only_the_owner_may_read_the_links(tmp_path: Path) -> None:
    project(tmp_path, pairs(2)).close()
    assert (tmp_path / "annotations.sqlite").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "plan, message", [({"overlap": -1}, "overlap from 0"), ({"repeats": 1.5}, "for repeats, found 1.5")]
)
def test_plans_that_make_no_sense(plan: dict[str, Any], message: str) -> None:
    with pytest.raises(RLAIFError, match=message):
        Plan("preference", **plan)
