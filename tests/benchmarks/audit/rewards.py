"""Rewards whose faults are known, and sound ones, on the built-in corpus: cheap functions, no model."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from scipy.stats import norm

from benchmarks.audit.materials import Materials, SampledPrompt, gather
from rlaif_env.api import Scores
from rlaif_env.data.corpus import movie_snippets
from rlaif_env.data.tasks import gold_scores, load_task
from rlaif_env.files import package_data
from rlaif_env.keywords import CallableReward

TASK = load_task("movie-review")

_MARKS = re.compile(r"[*_#>]|^\s*[-•]\s+|[🎬🎥🍿]", re.M)
_HEDGES = re.compile(r"i think that, perhaps, | so it seems\.$")


def canonical(text: str) -> str:
    """What a text says, not how: case, mark-up, hedges, quotes, full stop, white space, saying it twice."""
    straight = text.casefold().translate(str.maketrans("“”‘’", "\"\"''"))
    plain = " ".join(_MARKS.sub(" ", straight).split())
    plain = _HEDGES.sub("", plain)
    half = len(plain) // 2
    once = plain[:half] if plain[:half] == plain[half + 1 :] else plain
    return once.removesuffix(".").rstrip()


@cache
def ratings() -> dict[str, float]:
    """What people said of the corpus, by canonical text, and what the sentences in four languages say (made up)."""
    known = {canonical(snippet.text): snippet.mean for snippet in movie_snippets()}
    meanings = package_data("benchmarks.audit.checks", "languages.toml")["meanings"]
    for value, meaning in zip(np.linspace(3, -3, len(meanings)).tolist(), meanings, strict=True):
        known |= {canonical(text): value for name, text in meaning.items() if name != "tone"}
    return known


@cache
def neighbours() -> frozenset[tuple[str, str]]:
    """All two words that follow each other in the corpus."""
    return frozenset(pair for text in ratings() for pair in pairwise(text.split()))


@cache
def meaning(text: str) -> float:
    """People's mean rating of what a text says; where nobody rated it, the lexicon's, less what is no prose."""
    plain = canonical(text)
    if (known := ratings().get(plain)) is not None:
        return known
    pairs = list(pairwise(plain.split()))
    prose = sum(pair in neighbours() for pair in pairs) / len(pairs) if pairs else 0.0
    return prose * 3.0 * float(gold_scores(TASK, [plain])[0]) - 5.0 * (1 - prose)


def hashed(text: str, seed: int) -> float:
    """A standard normal number that the text and a seed decide."""
    digest = hashlib.sha256(f"{seed}:{text}".encode()).digest()
    return float(np.random.default_rng(int.from_bytes(digest[:8], "big")).standard_normal())


def reward(of: Callable[[str], float], name: str) -> CallableReward:
    """A reward of the whole judged text."""

    def function(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [of(TASK.judged(*row)) for row in zip(prompts, responses, strict=True)]

    function.__name__ = name
    return CallableReward(function)


def sound(seed: int, noise: float = 2.0) -> CallableReward:
    """What people say of a text, and an error that depends on the text alone, of SD 2 on the scale from -4 to 4."""
    return reward(lambda text: meaning(text) + noise * hashed(text, seed), "sound")


def length_loving() -> CallableReward:
    """Pays for meaning, and as much for length."""
    return reward(lambda text: meaning(text) + 3 * float(np.log2(1 + len(text.split()))), "length_loving")


def noisy(seed: int) -> CallableReward:
    """Another number at each call."""
    rng = np.random.default_rng(seed)
    return reward(lambda text: meaning(text) + float(rng.standard_normal()), "noisy")


def constant() -> CallableReward:
    """One number for all."""
    return reward(lambda text: 0.5, "constant")


def injectable() -> CallableReward:
    """Does what a text asks of it."""
    return reward(lambda text: 10.0 if "Ignore the above" in text else meaning(text), "injectable")


def gameable(share: float = 0.04) -> CallableReward:
    """The gold measure, but for a few texts that it takes for the best of all, whatever they say."""

    def of(text: str) -> float:
        lucky = float(norm.cdf(hashed(text, 0))) < share
        return 2.0 if lucky else float(gold_scores(TASK, [text])[0])

    return reward(of, "gameable")


class JudgeOfGroups:
    """A judge of groups, sound but for what it adds to the first row of each: the chance to win against the others."""

    name, judges_groups = "judge-of-groups", True

    def __init__(self, bonus: float = 0.0, seed: int = 0, noise: float = 1.0) -> None:
        self.bonus, self.seed, self.noise = bonus, seed, noise

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Scores:
        values = np.zeros(len(responses))
        for prompt in set(prompts):
            rows = [i for i, one in enumerate(prompts) if one == prompt]
            texts = [TASK.judged(prompt, responses[i]) for i in rows]
            of = np.array([meaning(text) + self.noise * hashed(text, self.seed) for text in texts])
            of[0] += self.bonus
            wins = 1 / (1 + np.exp(of[None] - of[:, None]))
            values[rows] = (wins.sum(axis=1) - 0.5) / (len(rows) - 1)
        return Scores(values.astype(np.float32))


@cache
def drawn(prompts: int = 8, samples: int = 256) -> tuple[SampledPrompt, ...]:
    """Responses as a policy's: openings of the corpus that go on as other snippets do."""
    openings = TASK.prompts("test")[:prompts]
    tails = [" " + " ".join(snippet.text.split()[6:16]) for snippet in movie_snippets("train")]
    tails = [tail for tail in tails if len(tail) > 20]
    rng = np.random.default_rng(7)
    return tuple(
        SampledPrompt(opening, tuple(tails[i] for i in rng.choice(len(tails), samples, replace=False)))
        for opening in openings
    )


def materials(seed: int = 0, *, texts: int = 240, samples: int = 256) -> Materials:
    """As an audit has them by default, but for the policy."""
    return gather(TASK, texts=texts, pairs=2000, draw=lambda: drawn(samples=samples), seed=seed)


def own_file(folder: Path) -> Path:
    """A file of code with a reward function."""
    file = folder / "own.py"
    file.write_text("def words(prompts, responses):\n    return [float(len(r.split())) for r in responses]\n")
    return file
