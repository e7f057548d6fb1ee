"""Relative judging: who meets whom, what that comes to, and every place that has to keep a group whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from agents.training.command import train
from agents.training.config import TrainConfig
from benchmarks.evaluation.judge_panel import JudgePanel
from rewards import check_backend, make_reward
from rewards.compose import Composite, as_trl_reward
from rewards.group_preference import GroupPreference, bradley_terry, circulant, mean_wins
from rewards.labeling.labeler import LabelingConfig, PreferenceLabeler
from rewards.language_model.config import LanguageModelConfig
from rewards.language_model.local import LocalLM
from rlaif_env.api import BackendError, RLAIFError, Scores, judges_groups
from rlaif_env.batches import scored_rows
from rlaif_env.data.tasks import load_task
from rlaif_env.duel import Duel
from rlaif_env.keywords import CallableReward
from tests.stress.survival import differences, paid_by, samples
from tests.tiny import byte_tokenizer, tiny_backbone, tiny_model

TEXTS = ["good film", "bad film", "no", "fine, I say", "ü", "good"]


@pytest.fixture(scope="module")
def labeler() -> PreferenceLabeler:
    tokenizer = byte_tokenizer()
    lm = LocalLM(model=tiny_model(len(tokenizer), seed=3), tokenizer=tokenizer)
    return PreferenceLabeler(lm, "movie-review", mode="pairwise", minimum_mass=1e-9)


# --- the formulas -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(1, 9))
def test_every_text_meets_as_many_others(count: int) -> None:
    texts = [f"text {i}" for i in range(count)]
    everybody = {(i, j) for i in range(count) for j in range(i + 1, count)}
    assert set(circulant(texts)) == set(circulant(texts, 99)) == everybody
    for opponents in range(1, count):
        pairs = circulant(texts, opponents)
        assert len(set(pairs)) == len(pairs) and all(one < two for one, two in pairs)
        met = np.bincount(np.array(pairs).ravel(), minlength=count)
        one_more = (count % 2 and opponents % 2) or (opponents == 1 and count > 2)
        assert met.tolist() == [opponents + bool(one_more)] * count
        reached, edge = {0}, {0}
        while edge:  # all hang together: else strengths could not be compared
            edge = {b for pair in pairs for a, b in permutations(pair) if a in edge} - reached
            reached |= edge
        assert len(reached) == count


def test_who_meets_whom_does_not_depend_on_the_order() -> None:
    def named(texts: Sequence[str]) -> set[frozenset[str]]:
        return {frozenset((texts[i], texts[j])) for i, j in circulant(texts, 2)}

    assert named(TEXTS) == named(TEXTS[::-1])


def test_mean_wins_by_hand() -> None:
    # rows a, a, b, c: a meets its copy (½), b (0.8), c (0.6); b meets a twice and c once
    wins = mean_wins([(0, 1), (0, 2), (1, 2)], np.array([0.8, 0.6, 0.3]), np.array([2, 1, 1]))
    assert wins == pytest.approx([(0.5 + 0.8 + 0.6) / 3, (2 * 0.2 + 0.3) / 3, (2 * 0.4 + 0.7) / 3])
    assert mean_wins([], np.zeros(0), np.array([3])) == pytest.approx([0.5])


@pytest.mark.parametrize("opponents", [None, 1, 2, 3])
def test_bradley_terry_finds_the_strengths_that_made_the_probabilities(opponents: int | None) -> None:
    truth = np.array([0.4, -2.0, 1.5, 0.0, 3.1])
    pairs = circulant(list("abcde"), opponents)
    p = np.array([1 / (1 + np.exp(truth[two] - truth[one])) for one, two in pairs])
    copies = np.array([1, 2, 1, 3, 1])
    found = bradley_terry(pairs, p, copies)
    assert found == pytest.approx(truth - np.average(truth, weights=copies), abs=1e-9)
    assert np.isfinite(bradley_terry([(0, 1)], np.array([1.0]), np.array([1, 1]))).all()


def test_bradley_terry_is_the_maximum_where_the_pairs_contradict_each_other() -> None:
    pairs, p, copies = circulant(list("abcd")), np.array([0.9, 0.2, 0.7, 0.8, 0.4, 0.95]), np.ones(4, dtype=np.int64)

    def likelihood(s: np.ndarray) -> float:
        apart = np.array([s[a] - s[b] for a, b in pairs])
        return float((p * -np.logaddexp(0, -apart) + (1 - p) * -np.logaddexp(0, apart)).sum())

    best, rng = bradley_terry(pairs, p, copies), np.random.default_rng(0)
    for _ in range(200):
        assert likelihood(best + 0.01 * rng.normal(size=4)) <= likelihood(best) + 1e-12


# --- the backend ------------------------------------------------------------------------------------------------------


def test_a_group_gets_what_all_pairs_in_both_orders_come_to(labeler: PreferenceLabeler) -> None:
    reward, lm = GroupPreference(labeler), labeler.language_model
    found = reward.score(["p"] * len(TEXTS), TEXTS).values
    asked = [(i, j) for i in range(len(TEXTS)) for j in range(len(TEXTS)) if i != j]
    shown = [labeler.questions("p", TEXTS[i], TEXTS[j])[0] for i, j in asked]
    first, second = np.exp(lm.label_logprobs(shown, ["1", "2"])).T
    p = dict(zip(asked, first / (first + second), strict=True))
    for i in range(len(TEXTS)):
        wins = [(p[i, j] + 1 - p[j, i]) / 2 for j in range(len(TEXTS)) if j != i]
        assert found[i] == pytest.approx(np.mean(wins), abs=1e-6)
    assert np.ptp(found) > 1e-4


@pytest.mark.parametrize("strengths", ["mean", "bradley-terry"])
@pytest.mark.parametrize("opponents", [None, 2])
def test_a_group_is_alone_in_any_batch_and_in_any_order(
    labeler: PreferenceLabeler, strengths: Any, opponents: int | None
) -> None:
    reward = GroupPreference(labeler, opponents=opponents, strengths=strengths)
    assert "a judge of groups refuses a response that is alone" in check_backend(reward)
    one = reward.score(["p"] * 6, TEXTS).values
    order = np.random.default_rng(1).permutation(8)
    prompts, texts = np.array(["p"] * 6 + ["q"] * 2)[order].tolist(), np.array([*TEXTS, "a", "b"])[order].tolist()
    mixed = reward.score(prompts, texts).values
    assert mixed[np.argsort(order)][:6] == pytest.approx(one, abs=1e-5)


def test_copies_of_a_text_are_a_draw_and_nobody_is_asked(labeler: PreferenceLabeler) -> None:
    scores = GroupPreference(labeler).score(["p"] * 3, ["same"] * 3)
    assert scores.values.tolist() == [0.5] * 3 and scores.info["label_mass"].tolist() == [1.0] * 3
    strict = GroupPreference(PreferenceLabeler(labeler.language_model, "movie-review", minimum_mass=0.99))
    assert strict.score(["p"] * 2, ["same"] * 2).values.tolist() == [0.5] * 2


def test_what_cannot_be_judged_is_an_error(labeler: PreferenceLabeler) -> None:
    with pytest.raises(BackendError, match=r"two responses or more to each prompt.*group_size") as alone:
        GroupPreference(labeler).score(["p", "q", "p"], ["a", "b", "c"])
    assert alone.value.rows == (1,)
    strict = GroupPreference(PreferenceLabeler(labeler.language_model, "movie-review", minimum_mass=0.99))
    with pytest.raises(BackendError, match=r"1 of 1 without a label: low mass") as low:
        strict.score(["q", "p", "q", "p"], ["same", "a", "same", "b"])
    assert low.value.rows == (1, 3)
    for settings in ({"opponents": 0}, {"strengths": "elo"}):
        with pytest.raises(RLAIFError, match="expected"):
            GroupPreference(labeler, **settings)
    with pytest.raises(RLAIFError, match="reward 'group-preference': expected no other settings with a live model"):
        make_reward("group-preference", model=labeler.language_model, device="cpu")


# --- who keeps groups whole -------------------------------------------------------------------------------------------


class Longest:
    """A judge of groups: the share of the others that a response is longer than; it fails on groups with "BROKEN"."""

    name, judges_groups = "longest", True
    calls = 0

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Scores:
        self.calls += 1
        if bad := [i for i, text in enumerate(responses) if "BROKEN" in text]:
            raise BackendError("an exclamation", bad[:1])
        groups = {p: [r for q, r in zip(prompts, responses, strict=True) if q == p] for p in prompts}
        if any(len(group) == 1 for group in groups.values()):
            raise BackendError("alone")
        shares = [
            sum((len(r) > len(o)) + (len(r) == len(o)) / 2 for o in groups[p]) - 0.5
            for p, r in zip(prompts, responses, strict=True)
        ]
        others = [len(groups[p]) - 1 for p in prompts]
        return Scores(np.array(shares, dtype=np.float32) / np.array(others, dtype=np.float32))


def test_a_failure_takes_its_group_and_no_other() -> None:
    prompts, responses = ["a", "b", "a", "b", "c", "c"], ["x", "y BROKEN", "xx", "yy", "z", "z"]
    rewards, _, failed = scored_rows(Longest(), prompts, responses)
    assert rewards.tolist()[::2] == [0, 1, 0.5] and np.isnan(rewards[[1, 3]]).all() and set(failed) == {1, 3}
    with pytest.raises(BackendError) as error:
        scored_rows(Longest(), prompts, responses, apart=False)
    assert error.value.rows == (1,)  # the caller's row, in whatever order the groups stand


def test_sums_functions_and_trl_judge_groups_too() -> None:
    longest = Longest()
    mixed = Composite({"longest": (2.0, longest)})
    assert judges_groups(mixed) and not judges_groups(
        Composite({"f": (1.0, CallableReward(lambda p, r: [0.0] * len(r)))})
    )
    assert mixed.score(["a", "a"], ["x", "xx"]).values.tolist() == [0, 2]
    assert as_trl_reward(longest)(prompts=["a", "a"], completions=["x", "xx"]) == [0, 1]


def test_an_environment_without_groups_refuses_the_reward() -> None:
    model = tiny_backbone()
    settings: dict[str, Any] = {"task": "movie-review", "reward": Longest(), "tokenizer": model.tokenizer}
    settings |= {"vocab_size": model.logit_width, "max_prompt_tokens": 200}
    for make in (
        lambda: gym.make("RLAIF/TextGeneration-v0", **settings),
        lambda: gym.make_vec("RLAIF/TextGeneration-v0", num_envs=4, **settings),
    ):
        with pytest.raises(RLAIFError, match="two responses or more to each prompt for the reward 'longest'"):
            make()
    with pytest.raises(RLAIFError, match='autoreset_mode="Disabled"'):
        gym.make_vec("RLAIF/TokenGeneration-v0", num_envs=4, group_size=2, **settings)
    envs = gym.make_vec("RLAIF/TextGeneration-v0", num_envs=4, group_size=2, **settings)
    envs.reset(seed=0)
    rewards = envs.step(envs.action_space.sample())[1]
    assert rewards[:2].sum() == rewards[2:].sum() == 1


def test_alone_a_response_meets_the_first_that_was_given_to_its_prompt() -> None:
    duel = Duel(Longest())
    assert not judges_groups(duel)
    assert duel.score(["a", "b"], ["xx", "yy"]).values.tolist() == [0.5, 0.5]
    assert duel.score(["b", "a", "a"], ["yyy", "x", "xx"]).values.tolist() == [1, 0, 0.5]
    duel.against(["a"], ["x"])
    assert duel.score(["a"], ["xx"]).values.tolist() == [1]
    with pytest.raises(RLAIFError, match="judges groups"):
        Duel(CallableReward(lambda p, r: [0.0] * len(r)))


def test_an_evaluation_points_to_its_pairwise_judge(tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text("from tests.rewards.test_group_preference import Longest\n", encoding="utf-8")
    panel = JudgePanel(
        load_task("movie-review"),
        [f"{tmp_path / 'judge.py'}:Longest"],
        judge=LanguageModelConfig(),
        label=LabelingConfig(),
        settings={},
        pairwise=False,
    )
    with pytest.raises(RLAIFError, match="give --pairwise"):
        panel.build_all()


JUDGE = """
from tests.rewards.test_group_preference import Longest

class Judge(Longest):
    name, calls, stop_at = "judge", 0, 0

    def score(self, prompts, responses):
        Judge.calls += 1
        if Judge.calls == Judge.stop_at:
            import signal
            signal.raise_signal(signal.SIGINT)
        return super().score(prompts, responses)

def make(task):
    return Judge()
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TrainConfig]:
    return paid_by(JUDGE, tmp_path_factory.mktemp("job"), validate_every=2, validation_prompts=2, eval_prompts=3)


def test_a_training_compares_with_its_start_and_goes_on_as_if_never_cut(
    job: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlaif_env.references import load_reference

    monkeypatch.setenv("RLAIF_DEVICE", "cpu")
    whole = train(job(tmp_path / "whole", checkpoint_every=1))
    assert whole.before is not None and whole.after is not None
    assert whole.before.measures["reward"].tolist() == [0.5] * 3
    held = zip(whole.before.responses, whole.after.responses, whole.after.measures["reward"], strict=True)
    assert all(reward == ((len(y) > len(x)) + (len(y) >= len(x))) / 2 for x, y, reward in held)
    rows = samples(whole.folder)
    for step in {row["step"] for row in rows}:
        paid = [row["reward"] for row in rows if row["step"] == step]
        assert sum(paid) == pytest.approx(len(paid) / 2)
    first = json.loads((whole.folder / "validation.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["reward"] == 0.5
    judge = type(load_reference(job(tmp_path / "x").reward)(None))
    monkeypatch.setattr(judge, "calls", 0)
    monkeypatch.setattr(judge, "stop_at", 8)
    assert train(job(tmp_path / "cut", checkpoint_every=1)).interrupted
    monkeypatch.setattr(judge, "stop_at", 0)
    assert differences(whole.folder, train(job(tmp_path / "cut", checkpoint_every=1)).folder) == []
