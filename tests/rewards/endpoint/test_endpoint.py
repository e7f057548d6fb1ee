from __future__ import annotations

import asyncio
import json
import logging
import math
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro

from rewards.api import LanguageModel
from rewards.direct_score import from_kwargs
from rewards.endpoint.config import ServerConfig
from rewards.endpoint.likelihoods import AnswerLikelihoods, answer_likelihoods
from rewards.endpoint.model import EndpointLM
from rewards.labeling.labeler import PreferenceLabeler
from rewards.language_model.choice import language_model_from
from rewards.language_model.config import LanguageModelConfig
from rlaif_env.api import BackendError, RLAIFError
from rlaif_env.servers.limits import Limits, retry_after
from rlaif_env.servers.replies import MalformedReply, Position, Reply, parse_reply
from rlaif_env.servers.transport import RequestFailed
from tests.stress.endpoint_server import FAULTS, FaultServer, scores_of
from tests.stress.endpoints import fault_run

FIXTURES = Path(__file__).parent / "fixtures" / "endpoint"
TEN = [str(i) for i in range(1, 11)]
KEY = "sk-planted-0123456789"
FAST = {"retries": 8, "timeout": 5.0, "concurrency": 16}


@pytest.fixture(autouse=True)
def quick_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlaif_env.servers.client._FIRST_PAUSE", 0.01)
    monkeypatch.delenv("RLAIF_LLM_API_KEY", raising=False)


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as running:
        yield running


def connect(server: FaultServer, **settings: Any) -> EndpointLM:
    return EndpointLM(server.url, server.model, **{"cache": None, "limits": FAST, "boundaries": "prefix", **settings})


def expected(prompts: list[str]) -> np.ndarray:
    return np.log([scores_of(prompt) for prompt in prompts])


# --- the shapes


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*.json")), ids=lambda path: path.stem)
def test_every_recorded_shape_is_read_alike(path: Path) -> None:
    reply = parse_reply(path.read_text(), logprobs=True)
    assert reply.tokens == (31, 1)
    assert not reply.reasoning
    assert reply.positions[0].top[:3] == (("7", -0.6931472), ("8", -1.3862944), ("10", -2.3025851))
    assert Reply.from_json(reply.to_json()) == reply


def test_there_is_a_recorded_shape_of_every_server() -> None:
    servers = {path.stem.partition("_")[0] for path in FIXTURES.glob("*.json")}
    assert servers == {"openai", "vllm", "llamacpp", "ollama"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("<html>busy</html>", "expected a JSON answer, found an HTML page: '<html>busy</html>'"),
        ('{"choices": [', "expected a JSON answer, found no whole JSON object"),
        ("[]", "expected a JSON object, found list"),
        ('{"choices": []}', "expected an answer with choices, found no choices"),
        ('{"error": {"message": "out of memory"}}', "found an error: out of memory"),
        ('{"choices": [{"index": 0}]}', "expected an answer with text, found None (finish_reason None) in index"),
        ('{"choices": [{"text": "7", "logprobs": null}]}', "expected log-probabilities in the answer, found none"),
        (
            '{"choices": [{"text": "7", "logprobs": {"top_logprobs": [{"7": 0.7}]}}]}',
            "expected log-probabilities of at most 0, found 0.7",
        ),
        (
            '{"choices": [{"text": "7", "logprobs": {"top_logprobs": [{"7": -0.1, "8": -0.1}]}}]}',
            "expected log-probabilities that sum to at most 1, found 1.81",
        ),
        (
            '{"choices": [{"text": "7", "logprobs": {"content": [{"logprob": -1}]}}]}',
            "expected log-probabilities by token, found another shape",
        ),
    ],
)
def test_an_answer_of_another_shape_says_so(body: str, message: str) -> None:
    with pytest.raises(MalformedReply) as caught:
        parse_reply(body, logprobs=True)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("choice", "reason", "attempts"),
    [
        ({"finish_reason": "content_filter"}, "found that it was filtered (content_filter); change the texts", 1),
        ({"message": {"content": None, "refusal": "I can't."}}, "found a refusal: I can't.; change the texts", 1),
        ({"message": {"content": None}}, "expected an answer with text, found None (finish_reason 'stop') in", 9),
        ({"message": {"content": None, "reasoning_content": "Well"}}, "found that the model only thought; turn", 1),
    ],
)
@pytest.mark.parametrize("style", ["openai", "vllm"])
def test_an_answer_that_is_withheld_or_none_is_no_rationale(
    choice: dict[str, Any], reason: str, attempts: int, style: str
) -> None:
    def withheld(path: str, request: Mapping[str, Any]) -> tuple[int, Any] | None:
        if request.get("max_tokens") != 9 or "secret" not in json.dumps(request):
            return None
        asked.append(path)
        whole = {"index": 0, "finish_reason": "stop", "message": {"content": "It is "}, **choice}
        return 200, {"model": "scorer", "choices": [whole], "usage": {"prompt_tokens": 5, "completion_tokens": 0}}

    asked: list[str] = []
    with FaultServer(style, answer=withheld) as server, connect(server) as lm:
        labeler = PreferenceLabeler(lm, "helpful", cot=True, rationale_tokens=9)
        labels = labeler.label(["why", "a secret"], ["so", "so"], ["no", "no"])
        assert labels.status == ("ok", "failed")
        assert reason in labels.rows[1].reason
        assert len(asked) == 2 * attempts
        assert labeler.label(["a secret"], ["so"], ["no"]).status == ("failed",)  # nor is it when asked again


def test_a_filtered_score_is_a_failure_too(server: FaultServer) -> None:
    with connect(server) as lm:
        lm.probe()
        shown = {"top_logprobs": [{"1": -0.1}], "tokens": ["1"], "token_logprobs": [-0.1]}
        choice = {"text": "1", "finish_reason": "content_filter", "logprobs": shown}
        server.answer = lambda path, request: (200, {"model": "scorer", "choices": [choice]})
        with pytest.raises(BackendError, match="found that it was filtered"):
            lm.label_logprobs(["x "], ["1", "2"])


def test_no_number_is_left_out() -> None:
    body = {"choices": [{"text": "7", "logprobs": {"top_logprobs": [{"7": -1.0, "8": None, "9": -9999.0}]}}]}
    assert parse_reply(json.dumps(body), logprobs=True).positions[0].top == (("7", -1.0),)


# --- likelihoods worked by hand


def answer(
    view: Mapping[str, Mapping[str, float]], labels: list[str], leads: tuple[str, ...] = ("",), **more: Any
) -> AnswerLikelihoods:
    async def next_token(text: str) -> Position:
        return Position("", None, tuple((t, math.log(p)) for t, p in sorted(view[text].items(), key=lambda i: -i[1])))

    return asyncio.run(answer_likelihoods(next_token, labels, leads, **more))


def test_one_and_ten_are_told_apart_by_a_second_answer() -> None:
    found = answer({"": {"1": 0.5, "2": 0.25}, "1": {"0": 0.4, "\n": 0.5, "st": 0.1}}, ["1", "2", "10"])
    # P("10") = 0.5 * 0.4; P("1") = 0.5 * (1 - 0.4 - 0.1): "1st" is no "1"
    assert np.exp(found.logprobs) == pytest.approx([0.25, 0.25, 0.2])
    assert (found.bounded, found.requests) == ((), 2)


def test_spellings_with_a_space_and_as_one_token_add_up() -> None:
    view = {
        "": {"1": 0.1, " 1": 0.2, " ": 0.2, "10": 0.1},
        "1": {"0": 0.5, ".": 0.5},
        " 1": {".": 1.0},
        " ": {"2": 1.0},
    }
    found = answer(view, ["1", "2", "10"], ("", " "))
    assert np.exp(found.logprobs) == pytest.approx([0.05 + 0.2, 0.2, 0.05 + 0.1])
    assert found.requests == 4


def test_every_boundary_takes_off_longer_words() -> None:
    view = {"": {"7": 0.6, "8": 0.4}, "7": {"th": 0.25, ".": 0.75}, "8": {"0": 0.5, "\n": 0.5}}
    assert np.exp(answer(view, ["7", "8"]).logprobs) == pytest.approx([0.6, 0.4])
    found = answer(view, ["7", "8"], every_boundary=True)
    assert np.exp(found.logprobs) == pytest.approx([0.45, 0.2])


def test_a_missing_label_is_bounded_and_flagged() -> None:
    found = answer({"": {"7": 0.6, "x": 0.1, "y": 0.05}}, ["7", "8"])
    assert np.exp(found.logprobs) == pytest.approx([0.6, 0.05])  # at most the last token shown
    assert found.bounded == ("8",)
    found = answer({"": {"7": 0.6, "x": 0.3, "y": 0.08}}, ["7", "8", "9"])
    assert np.exp(found.logprobs) == pytest.approx([0.6, 0.01, 0.01])  # at most what is not shown, together


def test_the_drawn_token_does_not_lower_the_bound() -> None:
    found = answer({"": {"7": 0.6, "x": 0.1, "drawn": 0.001}}, ["7", "8"], top=2)
    assert np.exp(found.logprobs[1]) == pytest.approx(0.1)


def test_no_label_at_all_is_a_failure() -> None:
    with pytest.raises(RequestFailed, match="expected at least one of the labels '7' to '8' among the 2 likeliest"):
        answer({"": {"The": 0.6, "A": 0.4}}, ["7", "8"])


# --- against the server


@pytest.mark.parametrize("style", ["vllm", "llama.cpp", "ollama"])
def test_likelihoods_are_the_servers(style: str) -> None:
    prompts = [f"Rate {i}: " for i in range(5)]
    with FaultServer(style) as server, connect(server) as lm:
        assert isinstance(lm, LanguageModel)
        assert lm.probe().ten_is_split is True
        np.testing.assert_allclose(lm.label_logprobs(prompts, TEN), expected(prompts), atol=1e-9)
        found = lm.answers(prompts, TEN)
        two = [math.exp(a.logprobs[1]) for a in found if isinstance(a, AnswerLikelihoods)]
        assert two == pytest.approx([scores_of(p)[1] for p in prompts])
        assert lm.facts["labels_bounded"] == 0


def test_the_chat_route_begins_answers_where_it_can() -> None:
    with FaultServer("vllm") as server, connect(server, route="chat") as lm:
        capabilities = lm.probe()
        assert (capabilities.route, capabilities.prefill, capabilities.prefill_fields) == ("chat", True, True)
        found = np.exp(lm.label_logprobs(["Rate: "], TEN))[0]
        assert found[9] == pytest.approx(scores_of("Rate: ")[9])
        asked = [request for _, request in server.requests if request["messages"][-1]["content"] == "1"]
        assert asked[0]["continue_final_message"] is True


def test_what_the_chat_route_cannot_do_says_what_to_change() -> None:
    with FaultServer("openai") as server, connect(server) as lm:
        with pytest.raises(BackendError, match=r"use the scale 0 to 9 \(--scale 0 9, .*scale=\(0, 9\)\)"):
            lm.label_logprobs(["Rate: "], TEN)
        nine = lm.label_logprobs(["Rate: "], TEN[1:9])
        assert np.exp(nine[0]) == pytest.approx(scores_of("Rate: ")[1:9])
        assert lm.facts["prefill"] is False


def _without_logprobs(path: str, request: Mapping[str, Any]) -> tuple[int, Any]:
    return 200, {"model": "scorer", "choices": [{"text": "7", "message": {"content": "7"}}]}


def _thinking(path: str, request: Mapping[str, Any]) -> tuple[int, Any]:
    if "messages" not in request:
        return 404, {"error": {"message": "no such route"}}
    entry = {"token": "<think>", "logprob": -0.1, "top_logprobs": [{"token": "<think>", "logprob": -0.1}]}
    return 200, {"model": "scorer", "choices": [{"message": {"content": ""}, "logprobs": {"content": [entry]}}]}


def _constant(path: str, request: Mapping[str, Any]) -> tuple[int, Any]:
    return 200, {"model": "scorer", "choices": [{"text": "7", "logprobs": {"top_logprobs": [{"7": -1.0, "8": -1.0}]}}]}


def _other_model(path: str, request: Mapping[str, Any]) -> tuple[int, Any]:
    if path.endswith("/models"):
        return 200, {"data": [{"id": "small"}, {"id": "large"}]}
    return 200, {"model": "large", "choices": [{"text": "7", "logprobs": {"top_logprobs": [{"7": -1.0, "8": -2.0}]}}]}


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (_without_logprobs, "expected a server that returns log-probabilities, found: completion with 20 tokens"),
        (_thinking, "expected a model that answers at once, found one that thinks first; turn thinking off"),
        (_constant, "this server does not return real ones"),
        (_other_model, "expected answers of model 'scorer', found 'large' (the server lists small, large)"),
    ],
)
def test_the_probe_says_what_is_wrong(reply: Any, message: str) -> None:
    with FaultServer(answer=reply) as server, connect(server) as lm, pytest.raises(BackendError) as caught:
        lm.probe()
    assert message in str(caught.value)


def test_five_tokens_are_asked_for_where_twenty_are_refused() -> None:
    def at_most_five(path: str, request: Mapping[str, Any]) -> tuple[int, Any] | None:
        return (400, {"error": {"message": "logprobs: at most 5"}}) if (request.get("logprobs") or 0) > 5 else None

    with FaultServer(answer=at_most_five) as server, connect(server) as lm:
        assert lm.probe().top == 5
        found = lm.answers(["Rate: "], TEN)[0]
        assert isinstance(found, AnswerLikelihoods)
        assert len(found.bounded) >= 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"url": "localhost:8000"},
            "expected a server's address such as http://localhost:8000/v1, found 'localhost:8000'",
        ),
        ({"url": f"http://me:{KEY}@host/v1"}, "expected an address without password and query for host"),
        ({"route": "grpc"}, "expected route 'auto', 'completion' or 'chat'"),
        ({"extra": {"response_format": {}}}, "expected extra fields without response_format: under a grammar"),
        ({"extra": {"max_tokens": 3}}, "expected extra fields without max_tokens: they are set here"),
        ({"limits": {"concurrency": 0}}, "expected concurrency >= 1"),
        ({"limits": {"spend_cap": 1.0}}, "expected a spend_cap above 0 with price_in"),
        ({"limits": {"speed": 1}}, "limits of an endpoint: "),
    ],
)
def test_bad_settings_say_so(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RLAIFError) as caught:
        EndpointLM(**{"url": "http://localhost:1/v1", "model": "m", "cache": None, **settings})
    assert message in str(caught.value)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("labels", [[], ["1", "1"], [" 1"], [""]])
def test_bad_labels_say_so(server: FaultServer, labels: list[str]) -> None:
    with connect(server) as lm, pytest.raises(RLAIFError, match="expected distinct labels without white space"):
        lm.label_logprobs(["x"], labels)


# --- failures


_QUICK = tuple(kind for kind in FAULTS if kind != "timeout")


def check_fault_run(found: dict[str, Any], kinds: tuple[str, ...] = FAULTS) -> None:
    counts = {name: found[name] for name in ("lost", "invented", "doubled", "failed_for_nothing")}
    assert counts == dict.fromkeys(counts, 0)
    assert found["failed"] == found["labels"] // 100  # each permanent failure listed, with its reason
    assert found["reasons"] == ["the server refused the request: HTTP 400: too long"]
    assert set(found["server_failures"]) == set(kinds)  # every way of failing happened


def test_labels_under_every_fault() -> None:
    check_fault_run(fault_run(500, concurrency=16, seconds=0.0, timeout=30.0, kinds=_QUICK), _QUICK)


def test_a_server_that_hangs_is_asked_again() -> None:
    with FaultServer() as server, connect(server, limits={"timeout": 0.5}) as lm:
        lm.probe()
        server.faults, server.kinds = 1.0, ("timeout",)
        threading.Timer(0.3, lambda: setattr(server, "faults", 0.0)).start()
        np.testing.assert_allclose(lm.label_logprobs(["x "], ["2"]), expected(["x "])[:, 1:2])
        assert server.failed["timeout"] >= 1


@pytest.mark.slow
def test_ten_thousand_labels_under_every_fault() -> None:
    found = fault_run(10_000)
    check_fault_run(found)
    assert found["slots_busy"] >= 0.8
    assert found["memory_growth_mb"] < 30
    assert fault_run(10_000, seconds=0.4)["of_the_bound"] >= 0.8


def test_a_row_that_fails_is_named_and_the_others_are_kept(server: FaultServer) -> None:
    server.answer = lambda path, r: (400, {"error": {"message": "bad"}}) if "poison" in str(r.get("prompt")) else None
    with connect(server) as lm:
        with pytest.raises(BackendError, match=r"3 answers, found that 1 failed \(row 1: .*HTTP 400: bad\)") as caught:
            lm.label_logprobs(["a ", "poison ", "b "], TEN)
        assert caught.value.rows == (1,)
        before = len(server.requests)
        lm.label_logprobs(["a ", "b "], TEN)
        assert len(server.requests) == before


def test_the_labeler_labels_what_can_be_labelled(server: FaultServer) -> None:
    server.answer = lambda path, r: (400, {"error": {"message": "bad"}}) if "poison" in str(r.get("prompt")) else None
    with connect(server) as lm:
        labels = PreferenceLabeler(lm, mode="score").label(["", ""], ["good", "poison"], ["bad", "fine"])
    one, two = labels.rows
    assert one.status == "ok"
    assert math.isnan(two.p_first)
    assert "HTTP 400: bad" in two.reason


def test_rows_are_divided_over_replicas_and_one_that_is_lost_is_left_out() -> None:
    prompts = [f"Rate {i}: " for i in range(24)]
    with FaultServer() as one, FaultServer() as two, connect(one, replicas=[two.url], limits={"retries": 0}) as lm:
        lm.probe()
        np.testing.assert_allclose(lm.label_logprobs(prompts, TEN), expected(prompts), atol=1e-9)
        shares = [server.counted["requests"] for server in (one, two)]
        assert min(shares) > 0.3 * sum(shares)
        two.faults, two.kinds = 1.0, ("500", "reset")
        others = [f"Judge {i}: " for i in range(24)]
        np.testing.assert_allclose(lm.label_logprobs(others, TEN), expected(others), atol=1e-9)
        assert sum(two.failed.values()) <= lm.config.limits.concurrency  # those on the wire when it was lost
    with pytest.raises(RLAIFError, match="each once"):
        connect(one, replicas=[two.url, two.url])
    with pytest.raises(RLAIFError, match="expected a server's URL with the settings replicas"):
        LanguageModelConfig(server={"replicas": ["http://localhost:1"]})  # type: ignore[arg-type]


def test_given_up_after_the_retries() -> None:
    with FaultServer() as server, connect(server, limits={"retries": 2}) as lm:
        lm.probe()
        server.faults, server.kinds = 1.0, ("500",)
        with pytest.raises(BackendError, match="gave up after 3 attempts, the last: HTTP 500: overloaded"):
            lm.label_logprobs(["x "], ["2"])
        assert server.failed["500"] == 3


def test_retry_after_is_honoured() -> None:
    with FaultServer() as server, connect(server) as lm:
        lm.probe()
        server.faults, server.kinds = 1.0, ("429-retry-after",)
        threading.Timer(0.05, lambda: setattr(server, "faults", 0.0)).start()
        started = time.monotonic()
        lm.label_logprobs(["x "], ["2"])
        assert time.monotonic() - started >= 0.2
        assert server.failed["429-retry-after"] == 1
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert retry_after("soon") is None


def test_the_deadline_of_a_call_ends_it() -> None:
    with FaultServer(seconds=0.1) as server, connect(server, limits={"deadline": 1.0, "concurrency": 1}) as lm:
        lm.probe()
        started = time.monotonic()
        found = lm.answers([f"{i} " for i in range(40)], ["2"])
        assert time.monotonic() - started < 5
        done = [isinstance(row, AnswerLikelihoods) for row in found]
        assert any(done) and not all(done)
        assert "gave up at the deadline of 1.0 s" in str(found[-1]) or "no answer within" in str(found[-1])


def test_the_spend_cap_stops_before_it_is_passed(server: FaultServer) -> None:
    limits = {"spend_cap": 0.002, "price_in": 10.0, "price_out": 10.0, "concurrency": 4}
    with connect(server, limits=limits) as lm:
        found = lm.answers([f"{'word ' * 20}{i} " for i in range(100)], ["2"])
        assert 0 < lm.usage.cost <= 0.002
        assert lm.usage.tokens_in > 0
        assert "expected the cost to stay within the spend_cap of 0.002" in str(found[-1])
        answered = sum(isinstance(row, AnswerLikelihoods) for row in found)
        assert 0 < answered == len(server.answered) < 100


def test_a_key_is_sent_and_never_shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("RLAIF_LLM_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    store = tmp_path / "answers.sqlite"
    with FaultServer(key=KEY) as server:
        with connect(server, cache=store) as lm:
            lm.label_logprobs(["x "], TEN)
            assert KEY not in repr(lm) + str(lm.facts) + repr(vars(lm))
        assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.iterdir())
    with FaultServer(key="another") as server, connect(server) as lm:
        with pytest.raises(BackendError, match=r"to accept its key \(RLAIF_LLM_API_KEY\).*\[key\]") as caught:
            lm.probe()
    assert KEY not in str(caught.value) + repr(caught.value.__cause__) + repr(caught.value.__context__)
    assert KEY not in caplog.text


# --- who calls it


def test_in_a_running_loop_and_from_several_threads(server: FaultServer) -> None:
    prompts = [f"{i} " for i in range(20)]
    with connect(server) as lm:

        async def inside() -> np.ndarray:
            return lm.label_logprobs(prompts, ["2", "3"])

        first = asyncio.run(inside())
        found: list[np.ndarray] = []
        threads = [
            threading.Thread(target=lambda: found.append(lm.label_logprobs([*prompts, "new "], ["2", "3"])))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all((rows[:20] == first).all() for rows in found) and len(found) == 4
    assert set(server.answered.values()) == {1}  # the same question from four threads is asked once


def test_it_ends_its_thread_and_starts_again(server: FaultServer) -> None:
    before = threading.active_count()
    lm = connect(server)
    lm.label_logprobs(["x "], ["2"])
    lm.close()
    lm.close()
    assert threading.active_count() == before


def test_texts_are_generated_and_cut(server: FaultServer) -> None:
    server.answer = lambda path, r: (400, {"error": {"message": "unknown field top_k"}}) if "top_k" in r else None
    with connect(server) as lm:
        texts = lm.generate(["x ", "y "], max_new_tokens=9, temperature=0.7, top_k=40, seed=3, stop=["END"])
        assert all(text.endswith(" because. ") for text in texts)
        assert lm.facts["top_k_sent"] is False
        asked = [r for _, r in server.requests if r.get("max_tokens") == 9]
        assert {(r["seed"], r["temperature"]) for r in asked} == {(3, 0.7)}


def test_the_reward_takes_a_url(server: FaultServer) -> None:
    reward = from_kwargs(
        model="scorer",
        url=server.url,
        server={"cache": None, "limits": FAST},
        template="Review: {text}\nScore: ",
        scale=[1, 10],  # type: ignore[arg-type]
    )
    scores = reward.score([""], ["fine"])
    p = np.array(scores_of("Review: fine\nScore: "))
    assert scores.info["label_mass"][0] == pytest.approx(0.9, abs=0.02)
    assert scores.info["score"][0] == pytest.approx(p @ np.arange(1, 11) / p.sum(), abs=0.1)
    reward.language_model.close()  # type: ignore[attr-defined]
    with pytest.raises(RLAIFError, match="expected a server's URL with the settings"):
        from_kwargs(model="scorer", server={"cache": False})
    with pytest.raises(RLAIFError, match="a language model at a URL"):
        from_kwargs(model="scorer", url=server.url, server={"speed": 3})


def test_a_price_alone_needs_no_server_and_other_settings_do() -> None:
    prices = {"limits": {"price_in": 2.0, "price_out": 8.0}}
    model = str(FIXTURES)  # a folder that is no model: it gets as far as being opened
    with pytest.raises(RLAIFError, match=r"config\.json"):
        language_model_from(LanguageModelConfig(model, server=prices))  # type: ignore[arg-type]
    with pytest.raises(RLAIFError, match="expected a server's URL with the settings route, limits, found none"):
        server = ServerConfig(route="chat", limits=Limits(concurrency=2))
        language_model_from(LanguageModelConfig(model, server=server))


def test_a_server_is_set_on_a_command_line() -> None:
    words = ["--url", "http://localhost:8000", "--server.extra", '{"reasoning_effort": "none"}']
    words += ["--server.cache", "False", "--server.limits.concurrency", "3"]
    config = tyro.cli(LanguageModelConfig, args=words)
    assert config.name == "smollm2-135m-instruct at http://localhost:8000/v1"
    assert config.server == ServerConfig(extra={"reasoning_effort": "none"}, cache=False, limits=Limits(concurrency=3))
    words = ["--url", "http://localhost:8000", "--server.cache", "a.sqlite"]
    assert tyro.cli(LanguageModelConfig, args=words).server.cache == "a.sqlite"
    with pytest.raises(RLAIFError, match="expected a server's URL with the settings cache, found none"):
        LanguageModelConfig(server=ServerConfig(cache="a.sqlite"))
    with pytest.raises(RLAIFError, match="expected an address without password"):
        LanguageModelConfig(url=f"http://me:{KEY}@host/v1")
