"""The best of n: against all subsets, by hand, with a reward that can be gamed and one that cannot, beside runs."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from benchmarks.audit.checks.best_of_n import Curve, best_of, curve_of, kl_of, read_run
from benchmarks.audit.command import Audit, examine, main
from benchmarks.audit.config import checks_named
from benchmarks.audit.materials import Materials
from benchmarks.audit.subject import Subject
from rlaif_env.api import DataError, RLAIFError, Scores
from rlaif_env.data.tasks import gold_scores
from tests.benchmarks.audit import rewards


def of_all_subsets(rewards: np.ndarray, figures: np.ndarray, n: int) -> float:
    """The mean over every subset of the figure of its best, equal ones averaged."""
    picked = []
    for subset in map(list, combinations(range(len(rewards)), n)):
        best = rewards[subset] == rewards[subset].max()
        picked.append(figures[subset][best].mean())
    return float(np.mean(picked))


@pytest.mark.parametrize("rewards", [[0.3, -1, 2, 0.7, 5, 4, -3, 0.1], [1, 1, 0, 2, 2, 2, 0, 1], [3] * 8])
def test_the_best_of_n_is_the_mean_over_all_subsets(rewards: list[float]) -> None:
    values, gold = np.array(rewards), np.random.default_rng(0).standard_normal(8)
    n = np.arange(1, 9)
    for figures in (values, gold):
        expected = [of_all_subsets(values, figures, int(size)) for size in n]
        assert best_of(values, figures, n) == pytest.approx(expected, abs=1e-12)


def test_the_best_of_many_by_hand() -> None:
    ranks = np.arange(1.0, 257.0)  # the best of n of 1 ... N is n (N + 1) / (n + 1) in the mean
    n = np.array([1, 2, 16, 255, 256])
    assert best_of(ranks, ranks, n) == pytest.approx(n * 257 / (n + 1), rel=1e-10)
    with pytest.raises(RLAIFError, match=r"expected the best of 1 to 256 samples.*found n = \[257\]"):
        best_of(ranks, ranks, np.array([257]))


def test_the_bound_on_the_kl() -> None:
    assert kl_of(np.array([1, 2, 256])) == pytest.approx([0, 0.1931472, 4.5490838], abs=1e-6)


def test_the_highest_of_several_means_is_not_chosen_by_the_prompt_it_is_held_against() -> None:
    """Of gold that is noise alone, the fall from the highest n is 0 in the mean, not what the choice makes of it."""
    rng = np.random.default_rng(1)
    falls, naive = [], []
    for _ in range(400):
        gold = rng.standard_normal((8, 6))
        curve = Curve(2 ** np.arange(6), gold, gold, 1.0)
        falls.append(curve.fall.mean())
        naive.append((gold[:, -1] - gold[:, curve.highest]).mean())
    assert abs(np.mean(falls)) < 0.06 < 0.3 < -np.mean(naive)


def test_gold_that_turns_and_gold_that_does_not() -> None:
    values = [np.arange(16.0)] * 6
    rising = curve_of(values, values)
    assert rising.n.tolist() == [1, 2, 4, 8, 16] and rising.highest == 4 and not rising.fall.any()
    turned = curve_of(values, [np.where(row == 15, -20, row) for row in values])
    assert turned.highest == 1 and (turned.fall < -2).all()


@pytest.fixture(scope="module")
def materials() -> Materials:
    return rewards.materials()


def found(backend: object, materials: Materials) -> tuple[Audit, dict[str, str]]:
    audit = examine(Subject(backend, materials), checks_named(["best-of-n"]))  # type: ignore[arg-type]
    return audit, {finding.name: finding.verdict for finding in audit.findings}


FALL = "gold of the best of 256 under its highest at a smaller n"


def test_a_reward_that_can_be_gamed_turns_and_a_sound_one_does_not(materials: Materials) -> None:
    audit, verdicts = found(rewards.gameable(), materials)
    assert verdicts[FALL] == "flag"
    fault = next(finding.sentence for finding in audit.flags)
    assert "Gold turns down while the reward rises: gold is highest at KL " in fault
    svg = audit.pictures[0].svg
    assert svg.count('class="band') == 2 and ">reward<" in svg and ">gold<" in svg
    audit, verdicts = found(rewards.reward(lambda text: float(gold_scores(rewards.TASK, [text])[0]), "gold"), materials)
    assert verdicts[FALL] == "ok" and not audit.flags
    assert any("No turn up to n = 256: it may be pushed to about KL 4.5 nats" in f.sentence for f in audit.findings)


def test_a_judge_of_groups_compares_fewer_samples() -> None:
    sizes = []

    class Judge(rewards.JudgeOfGroups):
        def score(self, prompts: object, responses: object) -> Scores:
            sizes.append(len(prompts))  # type: ignore[arg-type]
            return super().score(prompts, responses)  # type: ignore[arg-type]

    audit, verdicts = found(Judge(0.0), rewards.materials())
    assert "gold of the best of 32 above that of a sample" in verdicts
    assert sum(sizes) == 8 * 32 and "compares 32 samples" in audit.pictures[0].caption


# --- runs -------------------------------------------------------------------------------------------------------------


def run(folder: Path, gold: np.ndarray, task: str = "movie-review") -> Path:
    """A run's configuration and metrics: its KL rises to 10 nats."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"command": "train", "config": {"task": task}}))
    rows = [
        {"step": i + 1, "kl": 10 * (i + 1) / len(gold), "gold": value, "reward": i / 100}
        for i, value in enumerate(gold.tolist())
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_runs_stand_beside_the_curve(materials: Materials, tmp_path: Path) -> None:
    noise = 0.05 * np.random.default_rng(0).standard_normal(100)
    turning = run(tmp_path / "turning", noise + np.minimum(np.arange(100), 100 - np.arange(100)) / 50)
    rising = run(tmp_path / "rising", noise + np.arange(100) / 100)
    audit, _ = found(rewards.gameable(), replace(materials, runs=(turning, rising)))
    said = [finding.sentence for finding in audit.findings if finding.name.startswith("run ")]
    assert said[0].startswith("Training: turned at KL ") and "The best of n: a turn at KL " in said[0]
    assert said[1].startswith("Training: no turn up to KL 9.")
    assert audit.pictures[0].svg.count("gold, run ") == 4  # drawn, and said for who does not see it


def test_a_run_without_a_turn_is_seldom_said_to_have_one(materials: Materials, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    falls = [read_run(run(tmp_path / str(i), rng.standard_normal(60)), materials).fall_at()(0.95) for i in range(200)]
    assert sum(fall.high is not None and fall.high < 0 for fall in falls) <= 10


def test_gold_that_a_run_did_not_log_is_that_of_its_samples(materials: Materials, tmp_path: Path) -> None:
    logged = run(tmp_path / "run", np.zeros(40))
    rows = [json.loads(line) for line in (logged / "metrics.jsonl").read_text().splitlines()]
    without = [{name: value for name, value in row.items() if name != "gold"} for row in rows]
    (logged / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in without))
    with pytest.raises(RLAIFError, match="found 0"):
        read_run(logged, materials)
    texts = [(i, text) for i in range(1, 41) for text in (" a film", " a wonderful film" if i > 20 else " a bad film")]
    samples = [{"step": step, "prompt": "It is", "response": text} for step, text in texts]
    (logged / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    good, bad = gold_scores(rewards.TASK, ["It is a wonderful film", "It is a bad film"])
    assert read_run(logged, materials, 0.5).gold == pytest.approx([0.0] * 5 + [(good - bad) / 2 / 0.5] * 5)
    longer = replace(materials, gold_model=rewards.reward(lambda text: float(len(text)), "long"))
    assert read_run(logged, longer).gold == pytest.approx([0.0] * 5 + [3.0] * 5)  # "wonderful" is 6 longer
    (logged / "samples.jsonl").write_text("")
    with pytest.raises(RLAIFError, match="expected at least 20 updates"):
        read_run(logged, materials)
    (logged / "samples.jsonl").write_text('{"step": "1", "prompt": "", "response": ""}\n')
    with pytest.raises(DataError, match=r"samples\.jsonl.*\n  line 1: expected the number of an update"):
        read_run(logged, materials)


_JUDGE = """
import numpy as np
from rlaif_env.api import Scores

class Judge:
    name, judges_groups = "judge", True

    def score(self, prompts, responses):
        return Scores(np.array([len(response) / 99 for response in responses], np.float32))
"""


def test_a_judge_of_groups_has_its_runs_beside_it_too(tmp_path: Path) -> None:
    rows = [{"prompt": one.prompt, "response": text} for one in rewards.drawn(3, 4) for text in one.responses]
    (tmp_path / "policy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = run(tmp_path / "trained", np.arange(40.0))
    sizes = ["--texts", "24", "--pairs", "30", "--policy", str(tmp_path / "policy.jsonl"), "--checks", "best-of-n"]
    (tmp_path / "judge.py").write_text(_JUDGE)
    assert main([f"{tmp_path / 'judge.py'}:Judge", *sizes, "--runs", str(folder), "--out", str(tmp_path / "out")]) == 0
    names = [finding["name"] for finding in json.loads((tmp_path / "out" / "audit.json").read_text())["findings"]]
    assert [name for name in names if name.startswith("run trained")]


def test_a_gold_model_is_asked_whatever_a_run_logged(materials: Materials, tmp_path: Path) -> None:
    asked: list[str] = []

    def long(text: str) -> float:
        asked.append(text)
        return float(len(text))

    folder, model = run(tmp_path / "run", np.arange(40.0)), rewards.reward(long, "long")
    with pytest.raises(RLAIFError, match=r"found 0: give the folder of a longer run.*with its samples\.jsonl"):
        read_run(folder, replace(materials, gold_model=model))
    rows = [{"step": i, "prompt": "It is", "response": "x" * (60 - i)} for i in range(1, 41) for _ in range(2)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    longer = replace(materials, gold_model=model)
    assert read_run(folder, longer).gold[-1] == read_run(folder, longer).gold[-1] == -36
    assert len(asked) == 40  # equal rows, and a second reading, ask nothing


def test_a_run_of_another_task_is_refused(materials: Materials, tmp_path: Path) -> None:
    message = r"expected a run on the task 'movie-review' in .*other, found one on 'summarization'.*; give runs on"
    with pytest.raises(RLAIFError, match=message):
        read_run(run(tmp_path / "other", np.zeros(40), "summarization"), materials)
    (tmp_path / "other" / "config.json").unlink()
    with pytest.raises(RLAIFError, match=r"expected a run of rlaif train in .*other, found no configuration"):
        read_run(tmp_path / "other", materials)


def test_what_is_no_run_is_refused(materials: Materials, tmp_path: Path) -> None:
    with pytest.raises(RLAIFError, match="expected a run's metrics at"):
        read_run(tmp_path, materials)
    with pytest.raises(RLAIFError, match=r"expected at least 20 updates with their KL and gold in .*, found 5"):
        read_run(run(tmp_path / "short", np.zeros(5)), materials)
