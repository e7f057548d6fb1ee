from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rewards.endpoint.model import EndpointLM
from rlaif_env.api import BackendError, RLAIFError
from rlaif_env.servers.cache import AnswerCache, cache_key, cache_main
from tests import ROOT
from tests.stress.endpoint_server import FaultServer
from tests.stress.endpoints import CHILD, kill_run


def test_the_key_depends_on_every_character() -> None:
    base = cache_key(model="m", body={"prompt": "Rate: ", "top": 5})
    assert base == cache_key(body={"top": 5, "prompt": "Rate: "}, model="m")
    others = [{"prompt": "Rate:", "top": 5}, {"prompt": "rate: ", "top": 5}, {"prompt": "Rate: ", "top": 6}]
    assert len({base, *(cache_key(model="m", body=body) for body in others), cache_key(model="n", body={})}) == 5


def test_what_was_stored_is_found_by_others(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "answers.sqlite"
    with AnswerCache(path) as one, AnswerCache(path) as two:
        one.put([(b"a", "first"), (b"b", "second")], model="m", endpoint="e")
        two.put([(b"a", "other")], model="m", endpoint="e")
        assert (two.get(b"a"), two.get(b"c"), len(two)) == ("first", None, 2)
        assert [(row["answers"], row["hits"], row["bytes"]) for row in two.summary()] == [(2, 1, 11)]
        assert one._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_pruned_by_use_and_model(tmp_path: Path) -> None:
    with AnswerCache(tmp_path / "c.sqlite") as cache:
        cache.put([(b"a", "x")], model="m", endpoint="e")
        cache.put([(b"b", "y")], model="n", endpoint="e")
        assert cache.prune(unused_days=1) == 0
        assert cache.prune(model="m") == 1
        assert (cache.get(b"a"), cache.get(b"b")) == (None, "y")


def test_an_answer_whose_bytes_changed_is_not_given_and_can_be_stored_again(tmp_path: Path) -> None:
    with AnswerCache(tmp_path / "c.sqlite") as cache:
        cache.put([(b"a", "0.5"), (b"b", "0.7")], model="m", endpoint="e")
        cache._db.execute("UPDATE answers SET body = '0.9' WHERE key = ?", (b"a",))
        assert (cache.get(b"a"), cache.get(b"b")) == (None, "0.7")
        cache.put([(b"a", "0.5"), (b"b", "0.1")], model="m", endpoint="e")  # what is whole stays
        assert (cache.get(b"a"), cache.get(b"b")) == ("0.5", "0.7")


def test_a_file_that_is_no_cache_says_so(tmp_path: Path) -> None:
    broken = tmp_path / "broken.sqlite"
    broken.write_bytes(b"not a database at all, but long enough to be taken for one" * 20)
    with pytest.raises(RLAIFError, match=r"a cache of answers that can be read and written at .*broken\.sqlite"):
        AnswerCache(broken)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as db:
        db.execute("PRAGMA user_version=7")
    with pytest.raises(RLAIFError, match=r"expected a cache of version 2 at .*, found version 7"):
        AnswerCache(other)


def test_one_character_misses_and_failures_are_not_stored(tmp_path: Path) -> None:
    store = tmp_path / "c.sqlite"
    with FaultServer() as server:
        with EndpointLM(server.url, "scorer", cache=store, boundaries="prefix", limits={"retries": 0}) as lm:
            lm.label_logprobs(["Rate: "], ["2"])
            lm.label_logprobs(["Rate: "], ["2", "3"])  # the same question, other labels
            assert (sum(server.answered.values()), lm.usage.hits) == (1, 1)
            lm.label_logprobs(["Rate:  "], ["2"])
            assert sum(server.answered.values()) == 2
            for kind in ("500", "html", "truncated", "no-choices", "no-logprobs", "wrong-model"):
                server.faults, server.kinds = 1.0, (kind,)
                with pytest.raises(BackendError):
                    lm.label_logprobs([f"new {kind}"], ["2"])
            assert len(lm._client.cache) == 2
        server.faults = 0.0
        with EndpointLM(server.url, "scorer", cache=store, boundaries="prefix", revision="v2") as lm:
            lm.label_logprobs(["Rate: "], ["2"])
            assert lm.usage.hits == 0


def check_kill_run(found: dict[str, int]) -> None:
    n = found["questions"]
    assert n // 4 < found["stored"] < n
    assert (found["asked_again"], found["in_the_end"]) == (0, n)
    assert found["on_their_way"] <= 32  # no more than were in flight


def test_killed_in_the_middle_nothing_stored_is_asked_again() -> None:
    check_kill_run(kill_run(300, seconds=0.02))


@pytest.mark.slow
def test_killed_in_the_middle_of_five_thousand() -> None:
    check_kill_run(kill_run(5000))


def test_two_processes_share_a_store(tmp_path: Path) -> None:
    store = tmp_path / "answers.sqlite"
    with FaultServer(seconds=0.005) as server:
        command = [sys.executable, "-c", CHILD, server.url, str(store), "150"]
        children = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
        assert [child.wait() for child in children] == [0, 0]
    with AnswerCache(store) as cache:
        assert len(cache) == 150


def test_many_open_a_new_store_at_once(tmp_path: Path) -> None:
    for turn in range(20):
        together, path = threading.Barrier(8), tmp_path / f"{turn}.sqlite"

        def opened(together: threading.Barrier = together, path: Path = path) -> int:
            together.wait()
            with AnswerCache(path) as cache:
                return len(cache)

        with ThreadPoolExecutor(8) as pool:
            assert [job.result() for job in [pool.submit(opened) for _ in range(8)]] == [0] * 8


def test_the_command_shows_and_prunes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.sqlite"
    assert cache_main(["--path", str(path)]) == 0
    assert "no answers are stored" in capsys.readouterr().out
    with AnswerCache(path) as cache:
        cache.put([(b"a", json.dumps({"x": 1}))], model="scorer", endpoint="http://localhost/v1")
        cache.get(b"a")
    assert cache_main(["show", "--path", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "scorer" in shown and "MB on disk" in shown
    assert cache_main(["prune", "--path", str(path), "--unused-days", "0"]) == 0
    assert "1 answers deleted, 0 kept" in capsys.readouterr().out
