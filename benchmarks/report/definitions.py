"""What the names in a report mean, in one line each; the long form is in docs/metrics.md."""

from __future__ import annotations

from collections.abc import Iterable

DEFINITIONS = {
    "reward": "what the environment paid for a response; each backend has its own scale",
    "raw score": "what the reward model says before any normalisation",
    "score": "the language model's expected rating, on the scale it was asked for",
    "score std": "spread of the distribution over ratings",
    "label mass": "probability that the model answers one of the labels at all",
    "gold": "the task's gold measure, which no reward sees; for movie-review the VADER lexicon's score, −1 to 1",
    "kl": "Σ (log π − log π_SFT) over a response's tokens, nats; one sample's unbiased estimate, so it can be negative",
    "length": "tokens of a response, its end mark included",
    "response length": "tokens of a response, its end mark included",
    "entropy": "mean entropy of the policy's next-token distribution, nats per token",
    "loss": "−Σ log π · advantage over tokens, mean over responses",
    "grad norm": "norm of the gradient before clipping",
    "ended": "share of responses that end with the end mark",
    "truncated tokens": "tokens that the judge did not read because the text was too long for it",
    "reward std": "standard deviation of an update's rewards",
    "reward scale": "what rewards are divided by before the KL is weighed against them",
    "return": "(1 − β) · reward / scale − β · KL, mean over responses",
    "advantage std": "standard deviation of return minus baseline over response tokens",
    "sampler drift": "largest difference of a token's log-probability when sampled and when trained",
    "distinct-1": "distinct words over all words",
    "distinct-2": "distinct pairs of neighbouring words over all pairs, in all responses together; a response's value "
    "is its share in that",
    "win rate": "share of prompts on which a system's response is preferred to the other's, ties one half",
    "length-controlled": "the win rate predicted where both responses are equally long",
    "alignment": "share of pairs on which the labeler prefers what people prefer, ties one half",
    "harmless rate": "share of responses judged harmless",
    "accuracy": "share of pairs on which prediction and judgement prefer the same response, ties one half",
    "excess cross entropy": "cross-entropy less the labels' own entropy, nats a pair; 0 is perfect",
    "brier": "mean squared difference of predicted and observed probability",
    "ece": "expected calibration error: mean gap of predicted and observed probability over ten bins",
    "kappa": "agreement beyond chance (Cohen)",
    "iqm": "interquartile mean: the mean of the middle half of the runs",
    "perplexity": "exp of the mean negative log-likelihood of a response's tokens under the reference model",
    "preferred with probability": "the labeler's probability that this response is the better of the two",
    "people prefer it": "share of rater pairs that rate this response higher, ties one half",
    "interval": "95 % interval unless a caption says otherwise; bootstrap over prompts, or Wilson's for a share",
}


def definitions_of(names: Iterable[str]) -> dict[str, str]:
    """The definitions of those names that have one; ``raw_score`` and ``reward/score`` are found too."""
    seen = {part for name in names for part in _spellings(name)}
    return {name: text for name, text in DEFINITIONS.items() if name in seen}


def _spellings(name: str) -> list[str]:
    plain = name.lower().replace("_", " ").strip()
    return [plain, *(plain.rpartition(m)[2] for m in ("/", " · ")), *(plain.partition(m)[0] for m in (" (", ","))]
