"""AI preferences: what is asked, and how answers become labels."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from rewards import make_reward
from rewards.api import LanguageModel
from rewards.direct_score import DirectLLMScore
from rewards.labeling.labeler import PreferenceLabeler
from rewards.labeling.pairwise_prompts import pair_wording, pairwise_prompt
from rewards.labeling.probabilities import compare_scores, mean_of_orders
from rewards.language_model.local import LocalLM
from rlaif_env.api import BackendError, RLAIFError
from rlaif_env.data.tasks import Task, list_tasks, load_task
from tests.tiny import tiny_model

OWN = Task("poems", "continuation", "how well {it} rhymes", 32, 32)


class Judge:
    """A language model made of two functions: probabilities of the labels, and rationales."""

    name = "judge"

    def __init__(
        self,
        probabilities: Callable[[str, Sequence[str]], Sequence[float]],
        rationale: Callable[[str, int], str] = lambda prompt, seed: "",
    ) -> None:
        self.probabilities, self.rationale = probabilities, rationale
        self.asked: list[str] = []
        self.generated: list[dict[str, Any]] = []

    def label_logprobs(self, prompts: Sequence[str], labels: Sequence[str]) -> np.ndarray:
        self.asked += prompts
        with np.errstate(divide="ignore"):
            return np.log(np.array([self.probabilities(p, labels) for p in prompts], dtype=np.float64))

    def generate(self, prompts: Sequence[str], **settings: Any) -> list[str]:
        self.generated.append({"prompts": list(prompts), **settings})
        return [self.rationale(prompt, settings["seed"]) for prompt in prompts]


def arbitrary(prompt: str, labels: Sequence[str]) -> list[float]:
    """Likelihoods that follow no rule but are the same for the same prompt."""
    digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest()
    numbers = np.random.default_rng(list(digest)).random(len(labels) + 1) ** 3
    return list(0.02 + 0.9 * numbers[:-1] / numbers.sum())


def scribble(prompt: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}{prompt}".encode("utf-8", "surrogatepass")).hexdigest()


SETTINGS: list[dict[str, Any]] = [
    {"task": "movie-review"},
    {"task": "movie-review", "mode": "score"},
    {"task": "summarization", "prompt": "detailed", "shots": 2},
    {"task": "harmless", "shots": 1},
    {"task": "helpful", "cot": True},
    {"task": "harmless", "cot": True, "samples": 3, "seed": 5},
    {"task": OWN, "mode": "score", "scale": (0, 100)},
]


@pytest.mark.parametrize("how", SETTINGS, ids=str)
@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=9), st.text(max_size=9), st.text(max_size=9)), min_size=1, max_size=5))
def test_exchanging_the_inputs_gives_exactly_the_rest_of_one(
    how: dict[str, Any], rows: list[tuple[str, str, str]]
) -> None:
    labeler = PreferenceLabeler(Judge(arbitrary, scribble), **how)
    prompts, firsts, seconds = zip(*rows, strict=True)
    p = labeler.label(prompts, firsts, seconds).p_first
    q = labeler.label(prompts, seconds, firsts).p_first
    assert np.array_equal(q, 1 - p)
    assert np.array_equal(p + q, np.ones(len(rows)))
    assert ((p >= 0) & (p <= 1)).all()


@pytest.fixture(scope="module")
def tiny(byte_tokenizer: PreTrainedTokenizerFast) -> LocalLM:
    """A real model of random weights over bytes."""
    return LocalLM(tiny_model(258, max_position_embeddings=8192), byte_tokenizer)


@pytest.mark.parametrize(
    "how",
    [{}, {"mode": "score"}, {"task": "harmless"}, {"cot": True, "samples": 2, "temperature": 0.7}],
    ids=str,
)
def test_the_exchange_is_exact_on_a_real_model(tiny: LocalLM, how: dict[str, Any]) -> None:
    labeler = PreferenceLabeler(tiny, **how, rationale_tokens=6, minimum_mass=1e-12)
    texts = ["a fine film", "dull", "I laughed, I cried", "so so", "never again, ever", "dull"]
    prompts = ["" for _ in texts]
    one = labeler.label(prompts, texts, texts[::-1])
    two = labeler.label(prompts, texts[::-1], texts)
    assert set(one.status) == {"ok"}
    assert np.array_equal(two.p_first, 1 - one.p_first)
    assert np.array_equal(two.p_first[::-1], one.p_first)  # the same six pairs in another order
    assert len(set(one.p_first)) > 2
    if labeler.config.cot:
        rationales = [tuple(a["rationales"]) for r in one.records for a in r["answers"]]
        assert len(set(rationales)) == 6  # the pairs meet twice: both orders of each have a rationale of their own
        assert all(len(pair) == 2 and pair[0] != pair[1] for pair in rationales)


def always_one(prompt: str, labels: Sequence[str]) -> list[float]:
    return [0.97 if label == "1" else 0.001 for label in labels]


@pytest.mark.parametrize("task", [*list_tasks(), OWN], ids=str)
@pytest.mark.parametrize("how", [{}, {"cot": True}, {"cot": True, "samples": 2}, {"mode": "score"}], ids=str)
def test_a_judge_that_always_says_one_prefers_nothing(task: Any, how: dict[str, Any]) -> None:
    result = PreferenceLabeler(Judge(always_one, scribble), task, **how).label(["x", "y"], ["a", "b"], ["c", "d"])
    assert result.p_first.tolist() == [0.5, 0.5]
    assert result.status == ("ok", "ok")


@pytest.mark.parametrize(
    ("p_1", "p_1_swapped", "p_first"),
    [(0.8, 0.4, 0.7), (0.9, 0.9, 0.5), (1.0, 0.0, 1.0), (0.25, 0.75, 0.25), (0.5, 0.5, 0.5)],
)
def test_the_mean_of_both_orders_by_hand(p_1: float, p_1_swapped: float, p_first: float) -> None:
    assert mean_of_orders(p_1, p_1_swapped) == pytest.approx(p_first, abs=1e-15)  # (p_1 + 1 - p_1_swapped) / 2
    assert mean_of_orders(p_1_swapped, p_1) == 1 - mean_of_orders(p_1, p_1_swapped)


@pytest.mark.parametrize(
    ("one", "two", "p_first"),
    [
        ([0.0, 0.0, 1.0], [1.0, 0.0, 0.0], 1.0),
        ([0.0, 1.0, 0.0], [0.0, 1.0, 0.0], 0.5),
        ([0.5, 0.5], [0.25, 0.75], 0.375),  # higher .5*.25 = .125, equal .125 + .375 = .5
        ([0.2, 0.3, 0.5], [0.5, 0.25, 0.25], 0.675),  # higher .15 + .375 = .525, equal .1 + .075 + .125 = .3
    ],
)
def test_two_distributions_by_hand(one: list[float], two: list[float], p_first: float) -> None:
    first, second = np.array(one), np.array(two)
    assert compare_scores(first, second) == pytest.approx(p_first, abs=1e-15)
    assert compare_scores(second, first) == 1 - compare_scores(first, second)


def test_the_scale_is_the_tasks_unless_another_is_named() -> None:
    scales = {
        task: PreferenceLabeler(Judge(arbitrary), task, mode="score").scale for task in ("movie-review", "helpful")
    }
    assert scales == {"movie-review": (1, 9), "helpful": (1, 10)}
    assert PreferenceLabeler(Judge(arbitrary), mode="score", scale=(0, 5)).scale == (0, 5)


def by_position(prompt: str, labels: Sequence[str]) -> list[float]:
    """P("1") is 0.8 of the mass when 'aa' is shown first, and 0.4 when 'bb' is; the mass is a half."""
    return [0.4, 0.1] if prompt.index("aa") < prompt.index("bb") else [0.2, 0.3]


def test_both_orders_are_averaged_by_hand() -> None:
    result = PreferenceLabeler(Judge(by_position), "summarization").label(["x"], ["aa"], ["bb"])
    assert result.p_first[0] == pytest.approx(0.7)  # (0.8 + (1 - 0.4)) / 2
    assert result.mass[0] == pytest.approx(0.5)
    assert [a["p_1"] for a in result.records[0]["answers"]] == pytest.approx([0.8, 0.4])


def test_the_harmless_task_asks_for_the_more_harmful_one_and_inverts() -> None:
    judge = Judge(by_position)
    result = PreferenceLabeler(judge, "harmless").label(["x"], ["aa"], ["bb"])
    assert all("MOST HARMFUL" in prompt for prompt in judge.asked)
    assert result.p_first[0] == pytest.approx(0.3)
    plain = "Which is the better one?\n{response_1}\n{response_2}\nAnswer: "
    own = PreferenceLabeler(judge, "harmless", template=plain).label(["x"], ["aa"], ["bb"])
    assert own.p_first[0] == pytest.approx(0.7)  # a template of one's own asks for the better one


def test_two_score_distributions_are_compared_by_hand() -> None:
    def scores(prompt: str, labels: Sequence[str]) -> list[float]:
        return [0.1, 0.15, 0.25] if "aa" in prompt else [0.4, 0.2, 0.2]

    judge = Judge(scores)
    result = PreferenceLabeler(judge, mode="score", scale=(1, 3)).label(["", ""], ["aa", "aa"], ["bb", "aa"])
    # P1 = (.2, .3, .5), P2 = (.5, .25, .25): higher .3*.5 + .5*.75 = .525, equal .1 + .075 + .125 = .3
    assert result.p_first[0] == pytest.approx(0.525 + 0.15)
    assert result.p_first[1] == 0.5
    assert [a["score"] for a in result.records[0]["answers"]] == pytest.approx([2.3, 1.75])
    assert result.mass.tolist() == pytest.approx([0.5, 0.5])
    assert len(judge.asked) == len(set(judge.asked)) == 2


def test_the_score_prompts_are_those_of_the_direct_score() -> None:
    judge = Judge(arbitrary)
    PreferenceLabeler(judge, mode="score", shots=2, scale=(1, 9)).label([""], ["aa"], ["bb"])
    scorer = DirectLLMScore(judge, shots=2, scale=(1, 9))
    assert sorted(judge.asked) == sorted([scorer.render("", "aa"), scorer.render("", "bb")])


def test_the_rationale_comes_first_and_has_an_order_of_its_own() -> None:
    judge = Judge(arbitrary, lambda prompt, seed: f" because {len(prompt)} {seed}\n")
    result = PreferenceLabeler(judge, "summarization", cot=True, shots=1).label(["text"], ["long summary"], ["short"])
    (asked,) = judge.generated
    ending = "Preferred Summary="
    assert {k: v for k, v in asked.items() if k != "prompts"} == {
        "max_new_tokens": 512,
        "temperature": 0.0,
        "top_k": 40,
        "seed": 0,
        "stop": (ending, "\n\nText - "),
    }
    assert len(asked["prompts"]) == 2
    for prompt, final in zip(asked["prompts"], judge.asked, strict=True):
        assert prompt.endswith("Rationale:")
        assert prompt.count(ending) == 1  # the exemplar's
        assert final == f"{prompt} because {len(prompt)} 0\n{ending}"
    assert [a["rationales"] for a in result.records[0]["answers"]] == [
        [f"because {len(prompt)} 0"] for prompt in sorted(asked["prompts"], key=lambda p: p.rindex("long summary"))
    ]


def test_self_consistency_averages_the_distributions_of_k_rationales() -> None:
    def by_rationale(prompt: str, labels: Sequence[str]) -> list[float]:
        first = prompt.index("aa") < prompt.index("bb")
        return ([0.9, 0.1] if "Rationale: r2\nPreferred" in prompt else [0.3, 0.3]) if first else [0.1, 0.1]

    judge = Judge(by_rationale, lambda prompt, seed: f"r{seed}")
    labeler = PreferenceLabeler(judge, "helpful", cot=True, samples=2, seed=1)
    result = labeler.label(["x"], ["aa"], ["bb"])
    assert [g["seed"] for g in judge.generated] == [2, 3]
    assert {(g["temperature"], g["top_k"]) for g in judge.generated} == {(0.3, 40)}
    assert result.p_first[0] == pytest.approx(((0.9 + 0.5) / 2 + 0.5) / 2)
    assert result.mass[0] == pytest.approx(0.2)  # the lesser of (1 + 0.6) / 2 and 0.2
    assert result.records[0]["answers"][0]["rationales"] == ["r2", "r3"]
    assert np.shape(result.records[0]["answers"][0]["logprobs"]) == (2, 2)


def test_a_record_holds_all_that_was_asked_and_answered() -> None:
    labeler = PreferenceLabeler(Judge(arbitrary, scribble), "helpful", cot=True, samples=2, prompt="detailed")
    result = labeler.label(["Human: hi"], ["one"], ["two"])
    record = json.loads(json.dumps(result.records[0], allow_nan=False))
    questions = labeler.questions("Human: hi", "one", "two")
    assert [a["prompt_hash"] for a in record["answers"]] == [hashlib.sha256(q.encode()).hexdigest() for q in questions]
    assert record["model"] == "judge"
    assert record["mode"] == "pairwise"
    assert record["mass"] == result.mass[0]
    assert record["parameters"] == {
        "task": "helpful",
        "mode": "pairwise",
        "prompt": "detailed",
        "shots": 0,
        "labels": ["1", "2"],
        "inverted": False,
        "ending": "Preferred Response=",
        "samples": 2,
        "temperature": 0.3,
        "top_k": 40,
        "seed": 0,
        "rationale_tokens": 512,
    }
    again = [np.exp(a["logprobs"]) for a in record["answers"]]
    p = [(x / x.sum(axis=1, keepdims=True)).mean(axis=0)[0] for x in again]
    assert result.p_first[0] == pytest.approx(0.5 + (p[0] - p[1]) / 2, abs=1e-12)


def test_too_little_mass_is_no_label_but_keeps_its_likelihoods() -> None:
    def faint(prompt: str, labels: Sequence[str]) -> list[float]:
        return [0.003, 0.003] if prompt.index("aa") < prompt.index("b") else [0.5, 0.4]

    result = PreferenceLabeler(Judge(faint), "helpful", minimum_mass=0.01).label(["x", "x"], ["aa", "b"], ["b", "aa"])
    assert np.isnan(result.p_first).all()
    assert result.status == ("low mass", "low mass")
    assert result.mass.tolist() == pytest.approx([0.006, 0.006])
    assert result.rows[0].reason == (
        "expected at least 0.01 of the probability on the labels 1 to 2, found 0.006; use another prompt, exemplars "
        "(shots) or model"
    )
    assert np.exp(result.records[0]["answers"][0]["logprobs"]) == pytest.approx(np.array([[0.003, 0.003]]))
    assert PreferenceLabeler(Judge(faint), "helpful", minimum_mass=0.005).label(["x"], ["aa"], ["b"]).status == ("ok",)


def test_one_answer_of_likelihood_zero_is_an_answer() -> None:
    result = PreferenceLabeler(Judge(lambda p, labels: [0.9, 0.0]), "helpful").label(["x"], ["a"], ["b"])
    assert result.p_first.tolist() == [0.5]
    assert result.records[0]["answers"][0]["logprobs"] == [[math.log(0.9), None]]


class Failing(Judge):
    """Fails when a prompt has a word in it, as a model does that knows which rows failed, or as one that does not."""

    def __init__(self, knows_rows: bool) -> None:
        super().__init__(arbitrary)
        self.knows_rows = knows_rows

    def label_logprobs(self, prompts: Sequence[str], labels: Sequence[str]) -> np.ndarray:
        if rows := [i for i, prompt in enumerate(prompts) if "cursed" in prompt]:
            self.asked += prompts
            raise BackendError("a bad word", rows) if self.knows_rows else RuntimeError("something")
        return super().label_logprobs(prompts, labels)


@pytest.mark.parametrize("knows_rows", [True, False])
def test_a_failing_row_has_no_label_and_the_others_have_theirs(knows_rows: bool) -> None:
    firsts = [f"text {i}" if i not in (2, 9) else f"cursed {i}" for i in range(12)]
    prompts, seconds = ["x"] * 12, ["other"] * 12
    judge = Failing(knows_rows)
    result = PreferenceLabeler(judge, "helpful").label(prompts, firsts, seconds)
    plain = PreferenceLabeler(Judge(arbitrary), "helpful").label(prompts, firsts, seconds)
    assert [i for i, s in enumerate(result.status) if s == "failed"] == [2, 9]
    assert np.flatnonzero(np.isnan(result.p_first)).tolist() == [2, 9]
    assert result.rows[2].reason == ("BackendError: a bad word" if knows_rows else "RuntimeError: something")
    others = [i for i in range(12) if i not in (2, 9)]
    assert np.array_equal(result.p_first[others], plain.p_first[others])
    assert len(judge.asked) <= (44 if knows_rows else 24 * 6)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ([[math.nan, -1.0]], "expected log-likelihoods of ['1', '2'], found [nan, -1.0]"),
        ([[-math.inf, -math.inf]], "expected log-likelihoods of ['1', '2'], found [-inf, -inf]"),
        ([[-1.0, -1.0, -1.0]], "BackendError: expected label log-likelihoods of shape (1, 2), found (1, 3)"),
        ([], "BackendError: expected label log-likelihoods of shape (1, 2), found (0,)"),
        ([["a", "b"]], "ValueError: could not convert string to float: 'a'"),
    ],
)
def test_an_answer_that_is_none_is_a_failure(answer: Any, reason: str) -> None:
    class Broken(Judge):
        def label_logprobs(self, prompts: Sequence[str], labels: Sequence[str]) -> Any:
            return answer * len(prompts)

    result = PreferenceLabeler(Broken(arbitrary), "helpful").label(["x"], ["a"], ["b"])
    assert math.isnan(result.p_first[0])
    assert (result.status, result.rows[0].reason) == (("failed",), reason)


def test_a_missing_rationale_is_a_failure() -> None:
    class Mute(Judge):
        def generate(self, prompts: Sequence[str], **settings: Any) -> list[str]:
            return []

    result = PreferenceLabeler(Mute(arbitrary), "helpful", cot=True).label(["x"], ["a"], ["b"])
    assert (result.status, result.rows[0].reason) == (("failed",), "BackendError: expected 1 rationales, found 0")


def test_a_prompt_longer_than_the_context_is_not_asked(tiny: LocalLM) -> None:
    labeler = PreferenceLabeler(tiny, max_tokens=300, minimum_mass=1e-12)
    result = labeler.label(["", ""], ["good", "good" * 100], ["bad", "bad"])
    assert result.status == ("ok", "too long")
    assert math.isnan(result.p_first[1])
    assert re.fullmatch(r"expected at most 300 tokens in the context, found \d{3}; .*", result.rows[1].reason)
    own_limit = PreferenceLabeler(LocalLM(tiny.backbone, max_tokens=250), max_tokens=9999, minimum_mass=1e-12)
    longer = own_limit.label(["", ""], ["good", "good" * 100], ["bad", "bad"])
    assert longer.status == ("ok", "too long")
    assert "expected labelling prompts of 1 to 250 tokens" in longer.rows[1].reason
    with_room = PreferenceLabeler(tiny, cot=True, max_tokens=600, rationale_tokens=400)
    (row,) = with_room.label([""], ["good"], ["bad"]).rows
    assert row.status == "too long"
    assert "at most 200 tokens beside a rationale of 400" in row.reason


def test_a_rationale_beyond_the_model_s_own_context_is_too_long_and_no_failure(
    byte_tokenizer: PreTrainedTokenizerFast,
) -> None:
    sizes = {"n_positions": 1500, "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 258}
    torch.manual_seed(0)
    learned = LocalLM(GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)).eval(), byte_tokenizer)
    asked = {"cot": True, "rationale_tokens": 20, "max_tokens": 9999, "minimum_mass": 1e-12}
    labeler = PreferenceLabeler(learned, "helpful", **asked)
    room = 1500 - 20 - learned.count_tokens([labeler.questions("x", "", "b")[0]])[0]
    labels = labeler.label(["x"] * 4, ["a", "a" * room, "a" * (room + 1), "a" * 1500], ["b"] * 4)
    # the second has room for its rationale, but not for what is asked after that
    assert labels.status == ("ok", "too long", "too long", "too long")
    assert "expected labelling prompts of 1 to 1500 tokens" in labels.rows[1].reason
    assert "expected at most 1480 tokens beside a rationale of 20" in labels.rows[2].reason


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"mode": "vote"}, "expected mode 'pairwise' or 'score', found 'vote'"),
        ({"mode": "score", "cot": True}, "expected cot with mode 'pairwise' only, found mode 'score'"),
        ({"mode": "score", "prompt": "detailed"}, "expected prompt 'detailed' with mode 'pairwise' only"),
        ({"prompt": "short"}, "expected the labelling prompt base or detailed, found 'short'"),
        ({"shots": 5}, "expected 0 to 4 shots for task 'movie-review', found 5"),
        ({"shots": -1}, "expected 0 to 4 shots for task 'movie-review', found -1"),
        ({"samples": 0}, "expected samples >= 1"),
        ({"samples": 2}, "expected cot and a temperature above 0 for 2 samples, found cot=False"),
        ({"samples": 2, "cot": True, "temperature": 0.0}, "above 0 for 2 samples, found cot=True and temperature 0.0"),
        ({"cot": True, "temperature": -0.1}, "temperature >= 0"),
        ({"cot": True, "rationale_tokens": 0}, "rationale_tokens >= 1"),
        ({"scale": (5, 5)}, "expected a scale of two whole numbers from 0 to 100"),
        ({"minimum_mass": 0}, "expected a minimum_mass between 0 and 1, found 0"),
        ({"template": "{nothing}"}, "expected a template with the places"),
        ({"template": "{text_1}{text_2}", "cot": True}, "expected cot or a template of your own, found both"),
        ({"task": "cooking"}, "expected a task"),
    ],
)
def test_settings_that_make_no_sense_are_named(how: dict[str, Any], message: str) -> None:
    with pytest.raises(RLAIFError, match=re.escape(message)):
        PreferenceLabeler(Judge(arbitrary), **how)


def test_columns_of_other_lengths_are_named_and_none_is_fine() -> None:
    labeler = PreferenceLabeler(Judge(arbitrary))
    message = "expected as many prompts as responses of each side, found 2, 2 and 1"
    with pytest.raises(RLAIFError, match=message):
        labeler.label(["", ""], ["a", "b"], ["c"])
    none = labeler.label([], [], [])
    assert (len(none), none.p_first.shape, none.mass.shape, none.status) == (0, (0,), (0,), ())


def test_equal_questions_have_one_key_and_others_have_others() -> None:
    labeler = PreferenceLabeler(Judge(arbitrary))
    question = labeler.questions("", "a", "b")[0]
    keys = {PreferenceLabeler(Judge(arbitrary), **how).key(question) for how in ({}, {"minimum_mass": 0.3})}
    assert keys == {labeler.key(question)}
    other = Judge(arbitrary)
    other.name = "another"
    different = [
        labeler.key(question + " "),
        PreferenceLabeler(other).key(question),
        *(PreferenceLabeler(Judge(arbitrary), cot=True, seed=seed).key(question) for seed in (0, 1)),
    ]
    assert len({*different, *keys}) == 5


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [*list_tasks(), OWN], ids=str)
@pytest.mark.parametrize("preamble", ["base", "detailed"])
@pytest.mark.parametrize("rationale", [False, True])
def test_prompts_have_the_papers_parts_in_its_order(task: Any, preamble: str, rationale: bool) -> None:
    task = load_task(task)
    wording = pair_wording(task)
    for shots in range(len(wording.exemplars) + 1):
        text = pairwise_prompt(task, "CONTEXT", "ONE {x}", "TWO", preamble=preamble, shots=shots, rationale=rationale)
        assert text.startswith(wording.detailed if preamble == "detailed" else wording.base)
        assert text.endswith("Rationale:" if rationale else f"\n{wording.ending}")
        assert text.index("ONE {x}") < text.index("TWO")
        assert text.count(wording.ending) == shots + (not rationale)
        assert text.count("Rationale:") == (shots + 1 if rationale else 0)
        assert ("CONTEXT" in text) and (shots == 0 or text.index(wording.exemplars[0].response_1) < text.index("ONE"))
        assert re.search(r"\{(prompt|text|response)", text) is None


def test_fields_and_endings_are_the_papers() -> None:
    summary = pairwise_prompt(load_task("summarization"), "T", "a", "b")
    assert summary.endswith("\n\nText - T\nSummary 1 - a\nSummary 2 - b\nPreferred Summary=")
    dialogue = pairwise_prompt(load_task("helpful"), "\n\nHuman: hi\n\nAssistant:", " a", " b")
    assert dialogue.endswith(
        "\n\nContext - Human: hi\n\nAssistant:\nResponse 1 - a\nResponse 2 - b\nPreferred Response="
    )
    review = pairwise_prompt(load_task("movie-review"), "This film", " is good.", " is bad.")
    assert review.endswith("\n\nReview 1 - This film is good.\nReview 2 - This film is bad.\nPreferred Review=")


def test_exemplars_show_both_answers_and_a_rationale_each() -> None:
    for name in list_tasks():
        exemplars = pair_wording(load_task(name)).exemplars
        answers = [e.answer for e in exemplars]
        assert len(exemplars) >= 2
        assert answers.count("1") == answers.count("2")
        assert all(e.rationale and e.response_1 != e.response_2 for e in exemplars)


@pytest.mark.parametrize("kind", ["continuation", "summary", "dialogue"])
@pytest.mark.parametrize("preamble", ["base", "detailed"])
def test_a_task_of_ones_own_is_asked_for_its_own_criterion(kind: Any, preamble: str) -> None:
    task = Task("mine", kind, "how {odd} it sounds.", 8, 8)
    text = pairwise_prompt(task, "x", "y", "z", preamble=preamble)
    assert "What counts is how {odd} it sounds." in text
    assert text.endswith("=")


def test_a_template_of_ones_own_replaces_the_prompt() -> None:
    judge = Judge(arbitrary)
    template = "{prompt}|{response_1}|{response_2}|{text_1}|{text_2}|"
    PreferenceLabeler(judge, "movie-review", template=template).label(["So"], [" good {x}"], [" bad"])
    assert sorted(judge.asked) == ["So|bad|good {x}|So bad|So good {x}|", "So|good {x}|bad|So good {x}|So bad|"]


def test_a_language_model_is_found_from_options(tiny: LocalLM) -> None:
    judge = Judge(arbitrary)
    assert isinstance(judge, LanguageModel)
    assert make_reward("direct-llm", model=judge).language_model is judge  # type: ignore[attr-defined]
    wrong = [(judge, {"url": "http://localhost:1", "chat": True}), (tiny.backbone, {"server": {"route": "chat"}})]
    for model, more in wrong:
        shown = re.escape(f"expected no other settings with a live model, found {', '.join(more)}")
        with pytest.raises(RLAIFError, match=f"^reward 'direct-llm': {shown}$"):
            make_reward("direct-llm", model=model, **more)
    local = make_reward("direct-llm", model=tiny.backbone).language_model  # type: ignore[attr-defined]
    assert isinstance(local, LocalLM)
    assert local.backbone is tiny.backbone
