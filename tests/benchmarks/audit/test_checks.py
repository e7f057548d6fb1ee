"""Planted faults are flagged by the right check, sound rewards by none, on the real corpus."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.audit.api import NotMeasured
from benchmarks.audit.checks.agreement import fitted_scale, right, within
from benchmarks.audit.checks.biases import STYLES
from benchmarks.audit.checks.changes import changed
from benchmarks.audit.checks.cost import tied
from benchmarks.audit.command import examine
from benchmarks.audit.config import checks_named
from benchmarks.audit.materials import SET, Materials, gather
from benchmarks.audit.subject import Subject
from rlaif_env.api import BackendError, Preference, RewardBackend
from rlaif_env.data.corpus import human_preferences, movie_snippets
from rlaif_env.data.tasks import PromptSource, Task
from tests.benchmarks.audit import rewards
from tests.stress.audits import false_alarms


@pytest.fixture(scope="module")
def materials() -> Materials:
    return rewards.materials(samples=32)


def flagged(backend: RewardBackend, materials: Materials, *checks: str) -> set[str]:
    """The checks that flag something."""
    return {finding.check for finding in examine(Subject(backend, materials), checks_named(checks)).flags}


OWN = ("agreement", "calibration", "constant", "language", "length", "noise", "own-text", "position", "repetition")
OWN += ("style", "cost", "attacks", "best-of-n", "invariances", "sensitivities")


def test_a_length_loving_reward_is_flagged_for_length(materials: Materials) -> None:
    found = examine(Subject(rewards.length_loving(), materials), checks_named(OWN)).flags
    assert {finding.check for finding in found} == {"attacks", "length", "repetition"}
    # the tricks that win are those that make a text longer
    short = ("nothing at all", "punctuation alone")
    assert not any(finding.name.endswith(short) for finding in found)


def test_a_noisy_reward_is_flagged_for_noise(materials: Materials) -> None:
    assert flagged(rewards.noisy(0), materials, *OWN) == {"noise"}


def test_a_constant_reward_is_flagged_for_that_and_has_no_unit(materials: Materials) -> None:
    found = examine(Subject(rewards.constant(), materials), checks_named(OWN))
    assert {finding.check for finding in found.flags} == {"constant"}
    assert "the reward is the same for all texts" in found.skipped["length"]


def test_a_position_biased_judge_of_groups_is_flagged_for_position(materials: Materials) -> None:
    assert flagged(rewards.JudgeOfGroups(bonus=1.0), materials, *OWN) == {"position"}
    assert flagged(rewards.JudgeOfGroups(), materials, *OWN) == set()


def test_sound_rewards_are_not_flagged() -> None:
    assert false_alarms(3, checks=OWN) == (0, {})
    assert false_alarms(1, checks=OWN, groups=True) == (0, {})


@pytest.mark.slow
def test_at_most_one_sound_reward_in_twenty_is_flagged_by_any_check() -> None:
    assert false_alarms(200)[0] <= 10


# --- statistics by hand -----------------------------------------------------------------------------------------------


def test_right_choices() -> None:
    assert right(np.array([1.0, -1.0, 0.0, 2.0]), np.array([0.9, 0.9, 0.9, 0.5])).tolist() == [1, 0, 0.5, 0.5]


def test_ties_are_counted_by_pairs() -> None:
    assert tied(np.array([1.0, 1.0, 2.0]), 0.0) == pytest.approx(1 / 3)


def test_values_within_groups() -> None:
    assert within(np.array([1.0, 3.0, 5.0]), [0, 0, 9]).tolist() == [-1, 1, 0]


def test_a_fitted_scale_is_the_one_that_made_the_labels() -> None:
    margin = np.random.default_rng(0).standard_normal(500)
    assert fitted_scale(margin, 1 / (1 + np.exp(-2.5 * margin))) == pytest.approx(2.5, rel=1e-3)
    assert fitted_scale(margin, 1 / (1 + np.exp(0.7 * margin))) == pytest.approx(-0.7, rel=1e-3)


# --- subject and materials --------------------------------------------------------------------------------------------


def test_materials_are_held_out_and_those_of_a_seed(materials: Materials) -> None:
    test_texts = {snippet.text for snippet in movie_snippets("test")}
    assert len(materials.texts) == 240 and {text.response for text in materials.texts} <= test_texts
    assert [sum(t.set == s for t in materials.texts) for s in range(40)] == [SET] * 40
    assert rewards.materials().texts == materials.texts != rewards.materials(1).texts
    assert len({frozenset((pair.first, pair.second)) for pair in materials.pairs}) == len(materials.pairs) == 2000
    inside = [pair for pair in materials.pairs if materials.sets[pair.first] == materials.sets[pair.second]]
    assert len(inside) >= 600 and list(materials.pairs[:600]) == inside[:600]
    by_text = {snippet.text: snippet for snippet in movie_snippets("test")}
    for pair in materials.pairs[:50]:
        one, two = (by_text[materials.texts[i].response] for i in (pair.first, pair.second))
        won = [(a > b) + 0.5 * (a == b) for a in one.ratings for b in two.ratings]
        assert pair.p_first == pytest.approx(np.mean(won)) and pair.gap == pytest.approx(abs(one.mean - two.mean))


def test_preferences_are_the_materials_of_a_task_without_ratings(tmp_path: object) -> None:
    file = f"{tmp_path}/pairs.jsonl"
    from rlaif_env.data.preferences import write_preferences

    records = [
        Preference(f"p{i}", p.response_1, p.response_2, 1.0) for i, p in enumerate(human_preferences("test", 40))
    ]
    write_preferences(file, records)
    source = PromptSource(prompts=("a",), preferences={"test": file})
    task = Task("own", "dialogue", "how good it is", 64, 16, source)
    own = gather(task, texts=60, pairs=1)
    assert len(own.texts) == 60 and len(own.pairs) == 30
    assert {pair.p_first for pair in own.pairs} == {0.0, 1.0}  # turned at random: the place says nothing
    found = examine(Subject(rewards.sound(0), own), checks_named(["agreement", "length"]))
    assert "has no ratings of single texts" in found.skipped["length"]
    assert {finding.name for finding in found.findings} >= {"agreement with people"}


def test_a_task_with_prompts_alone_is_audited_on_the_policy_s_samples() -> None:
    task = Task("own", "continuation", "how good it is", 64, 16, PromptSource(prompts=("a",)))
    own = gather(task, texts=60, pairs=1, draw=lambda: rewards.drawn(samples=32))
    found = examine(Subject(rewards.length_loving(), own), checks_named(OWN))
    assert "repetition" in {finding.check for finding in found.flags}
    unmeasured = {"agreement", "attacks", "best-of-n", "calibration", "language", "length", "own-text", "sensitivities"}
    assert found.skipped.keys() == unmeasured


def test_equal_rows_are_scored_once_and_counted_by_check(materials: Materials) -> None:
    subject = Subject(rewards.sound(0), materials)
    with subject.checking("a"):
        assert subject.score(["", ""], ["x", "x"]).tolist() == subject.score([""], ["x"]).tolist() * 2
    assert (subject.costs["a"].asked, subject.costs["a"].scored) == (3, 1)
    subject.ask(["", ""], ["x", "x"])
    assert subject.costs["other"].scored == 2


def test_a_row_that_is_refused_is_no_number_and_is_told(materials: Materials) -> None:
    def of(text: str) -> float:
        if not text:
            raise ValueError("nothing to score")
        return 1.0

    subject = Subject(rewards.reward(of, "picky"), materials)
    assert np.isnan(subject.score(["", "", ""], ["x", "", "y"])).tolist() == [False, True, False]
    assert "nothing to score" in subject.reasons["", ""]
    with pytest.raises(BackendError, match="every row of 3 batches in a row failed"):
        Subject(rewards.reward(lambda text: 1 / 0, "dead"), materials).score([""] * 400, [str(i) for i in range(400)])


def test_a_judge_of_groups_sees_what_is_compared_and_nothing_else(materials: Materials) -> None:
    seen: list[list[tuple[str, str]]] = []

    class Judge(rewards.JudgeOfGroups):
        def score(self, prompts, responses):  # type: ignore[no-untyped-def]
            seen.append(sorted(zip(prompts, responses, strict=True)))
            return super().score(prompts, responses)

    subject = Subject(Judge(), materials)
    values = subject.score(["p"] * 4, ["good", "bad", "good", "fine"], [0, 0, 1, 1])
    assert seen == [[("p", "bad"), ("p", "good")], [("p", "fine"), ("p", "good")]]
    assert values[0] != values[2] and values[0] + values[1] == pytest.approx(1)
    with pytest.raises(NotMeasured, match="compares two or more responses to one prompt"):
        subject.score(["p", "q"], ["a", "b"], [0, 0])


def test_a_change_is_measured_on_the_texts_it_applies_to(materials: Materials) -> None:
    subject = Subject(rewards.reward(lambda text: float(len(text)), "characters"), materials)
    texts = materials.chosen("x", 5)
    found = changed(subject, texts, {"longer": lambda text: text + "!!", "never": lambda text: None})
    assert found.keys() == {"longer"}
    assert found["longer"].effect == pytest.approx(np.full(5, 2 / subject.unit))
    (shown,) = found["longer"].examples(1)
    assert shown["changed"] == f"{shown['text']}!!" and shown["text"] in [text.response for text in texts]


def test_styles_say_the_same(materials: Materials) -> None:
    text = materials.texts[0].response
    for style in STYLES.values():
        assert (new := style(text)) and new != text
        assert rewards.meaning(new) == rewards.meaning(text)
