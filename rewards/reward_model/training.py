"""Training a reward model on preferences (section 2.2.1, appendices A and G); ``rlaif train-rm`` is in `command`.

First a linear head is fitted on the frozen model's states, which are computed once: that alone is ``trainable="head"``.
The layer it reads is chosen on validation pairs. ``"lora"`` and ``"full"`` go on from there with gradients through the
model.

How this differs from the paper: AdamW unless ``optimizer.name="adafactor"``; early stopping on validation; the head
starts fitted.
"""

from __future__ import annotations

import time
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rewards.reward_model.data import HoldOut, Judged, LabelledData
from rewards.reward_model.features import depth_of, extract
from rewards.reward_model.head import HeadFit, centred, fit_head
from rewards.reward_model.model import DEFAULT_MAX_TOKENS, RewardModel
from rewards.reward_model.record import LabelRecord, Normalization
from rewards.reward_model.report import PairFigures, pair_accuracy, pair_figures
from rewards.reward_model.tuning import Tuned, TuningConfig, tune
from rlaif_env.api import Preference, RLAIFError
from rlaif_env.data.tasks import Task
from rlaif_env.models import Backbone
from rlaif_env.ranks import Ranks

_PROBE_TEXTS = 1500  # enough to tell the layers apart
_CURVE_START = 128

Progress = Callable[[str, int], Callable[[int], object]]
"""Called with the name and size of a stage; what it returns is called with the size of what is done."""


@dataclass(frozen=True)
class RewardModelConfig(HoldOut, TuningConfig):
    """How a reward model is trained and measured.

    Attributes:
        pairs: Train on at most so many pairs.
        texts: And on at most so many distinct texts, which is what takes time; 0 is no limit.
        layers: The head reads the state after so many layers; 0 chooses by validation.
        max_tokens: Longest text, EOS included; of a longer one the end is kept, and it is counted.
        center: Shift the scores to mean 0 on the training responses.
        normalize: Reward as it is, or standardised over the training responses.
        min_gap: Accuracy is also told for pairs whose mean human ratings differ by so much.
        test_pairs: Pairs in each test.
    """

    pairs: int = 12_000
    texts: int = 4_000
    layers: int = 0
    max_tokens: int = DEFAULT_MAX_TOKENS
    center: bool = True
    normalize: Literal["none", "standardize"] = "none"
    min_gap: float = 0.5
    test_pairs: int = 2_000

    def __post_init__(self) -> None:
        least = {"pairs": 1, "batch_pairs": 1, "micro_pairs": 1, "max_tokens": 2, "test_pairs": 1}
        least |= dict.fromkeys(("texts", "layers", "epochs", "min_gap", "learning_rate"), 0)
        for name, limit in least.items():
            if not getattr(self, name) >= limit:
                raise RLAIFError(f"expected {name} of at least {limit}, found {getattr(self, name)}")
        if not (self.validation_share > 0 and self.test_share >= 0 and self.validation_share + self.test_share < 1):
            raise RLAIFError(
                "expected shares of validation and test that leave something to train on, found "
                f"{self.validation_share} and {self.test_share}"
            )
        if self.folds and not 3 <= self.folds <= 100:
            raise RLAIFError(f"expected folds from 3 (training, validation and test) to 100, or 0, found {self.folds}")


@dataclass(frozen=True)
class Trained:
    """A trained reward model and how good it is."""

    model: RewardModel  # the model
    figures: Mapping[str, PairFigures]  # on held-out pairs, by who judged them: "human", "labels"
    # Everything measured, JSON-able: the same "figures", "labels", "training", and "curve", the accuracy of the
    # head alone by number of training pairs, on the first test
    report: Mapping[str, Any]


class _States:
    """The plain model's states by text and depth. With ``keep`` each is computed once: folds share nearly all."""

    def __init__(self, base: Backbone, keep: bool, ranks: Ranks) -> None:
        self.base, self.keep, self.ranks = base, keep, ranks
        self._known: dict[tuple[bytes, int], Tensor] = {}

    def __call__(
        self,
        rows: Sequence[Sequence[int]],
        depths: Sequence[int],
        advance: Callable[[int], object] = lambda done: None,
    ) -> Tensor:
        """As `extract`: float32 (n, D, H)."""
        if not self.keep:
            return extract(self.base, rows, depths, advance=advance, ranks=self.ranks)
        keys = [array("i", row).tobytes() for row in rows]
        new = [i for i, key in enumerate(keys) if any((key, depth) not in self._known for depth in depths)]
        advance(len(rows) - len(new))
        found = extract(self.base, [rows[i] for i in new], depths, advance=advance, ranks=self.ranks)
        for i, states in zip(new, found, strict=True):
            self._known |= {(keys[i], depth): state for depth, state in zip(depths, states, strict=True)}
        if not rows:
            return found
        return torch.stack([torch.stack([self._known[key, depth] for depth in depths]) for key in keys])


@dataclass(frozen=True)
class _Frozen:
    """The plain model's states at one layer, (n, H) of the training and (n', H) of the validation texts."""

    layers: int
    train: Judged
    states: Tensor
    validation: Judged
    held_out: Tensor

    def fit(self, pairs: int | None = None) -> HeadFit:
        """The head fitted to the first so many training pairs, or to all."""
        return fit_head(self.states, self.train.pairs.take(slice(pairs)), self.held_out, self.validation.pairs)


@dataclass(frozen=True)
class _Fitted:
    """A model with what its training said."""

    model: RewardModel
    frozen: _Frozen
    fit: HeadFit
    tuned: Tuned
    seconds: tuple[float, float]  # of the clock and of the CPU


def train_rm(
    config: RewardModelConfig,
    base: Backbone,
    task: Task,
    data: LabelledData,
    *,
    ranks: Ranks | None = None,
    log: Callable[[int, Mapping[str, float]], None] = lambda step, metrics: None,
    progress: Progress = lambda what, total: lambda done: None,
) -> Trained:
    """Train a reward model on preferences as `load_labels` divides them, and measure it.

    ``log`` is called with the step and the metrics of "lora" and "full"; see `Progress` for the other.

    Several processes (``ranks``), each called with the same, divide reading and gradients.

    Raises:
        RLAIFError: If a setting does not fit the model, or a loss is not finite.
    """
    ranks = ranks or Ranks()
    if ranks.size > 1:
        ranks.check_same({"model": base.fingerprint()})
    states = _States(base, keep=bool(data.folds), ranks=ranks)
    fitted = _fit(config, states, task, data, log, progress)
    model, frozen, fit, tuned = fitted.model, fitted.frozen, fitted.fit, fitted.tuned
    figures, curve, truncated = _measure(fitted, states, data, config, progress)
    if data.folds:
        figures[f"labels, {len(data.folds)} folds"] = _cross_validated(config, states, task, data.folds, progress)
    train, validation = frozen.train, frozen.validation
    training = {
        "seconds": round(fitted.seconds[0], 1),
        "cpu_seconds": round(fitted.seconds[1], 1),
        "pairs": len(train.pairs),
        "texts": len(train.rows),
        "truncated_texts": {"train": train.truncated, "validation": validation.truncated, **truncated},
        "left_out_pairs": dict(data.left_out),
        "layers": frozen.layers,
        "head_penalty": fit.penalty,
        "steps": tuned.steps,
        "best_step": tuned.best_step,
        "validation_excess_cross_entropy": tuned.validation_loss - validation.pairs.entropy(),
    }
    report = {
        "figures": {name: test.to_json() for name, test in figures.items()},
        "labels": {"provenance": model.labels.provenance, "sources": dict(model.labels.sources)},
        "held_out": dict(data.division),
        "training": training,
        "curve": curve,
    }
    return Trained(model, figures, report)


def _fit(
    config: RewardModelConfig,
    states_of: _States,
    task: Task,
    data: LabelledData,
    log: Callable[[int, Mapping[str, float]], None],
    progress: Progress,
) -> _Fitted:
    """Fit the head and, where that is asked for, go on through the model."""
    started, cpu, base, ranks = time.monotonic(), time.process_time(), states_of.base, states_of.ranks
    train, validation = (
        Judged.encode(base.tokenizer, task, records, config.max_tokens) for records in (data.train, data.validation)
    )
    frozen = _read_states(states_of, train, validation, config.layers, progress)
    fit, states = ranks.given(frozen.fit), frozen.states
    tuned = Tuned(base, None, fit.weight, 0, 0, fit.validation_loss)
    if config.trainable != "head":
        advance = progress("tuning (pairs)", config.epochs * len(train.pairs))
        tuned = tune(base, fit.weight, frozen.layers, train, validation, config, ranks=ranks, log=log, advance=advance)
        advance = progress("reading the texts again", len(train.rows))
        reading: dict[str, Any] = {"adapter": tuned.adapter, "advance": advance, "ranks": ranks}
        states = extract(tuned.backbone, train.rows, [frozen.layers], **reading)[:, 0]
    weight = centred(tuned.weight, states) if config.center else tuned.weight
    normalization = Normalization()
    if config.normalize == "standardize":
        scores = states.double() @ weight.double()
        normalization = Normalization("standardize", float(scores.mean()), float(scores.std(correction=0)))
    seconds = time.monotonic() - started, time.process_time() - cpu
    model = RewardModel(
        tuned.backbone,
        weight,
        task,
        layers=frozen.layers,
        adapter=tuned.adapter,
        max_tokens=config.max_tokens,
        labels=LabelRecord(dict(Counter(record.source for record in data.train))),
        normalization=normalization,
        owns_weights=config.trainable == "full",
    )
    return _Fitted(model, frozen, fit, tuned, seconds)


def _read_states(states_of: _States, train: Judged, validation: Judged, layers: int, progress: Progress) -> _Frozen:
    """Choose the layer, if it is not given, and read the states there.

    The choice is made on the pairs among the first texts, by the validation loss of a head fitted at each depth.
    """
    base = states_of.base
    total = depth_of(base.model)
    if layers > total:
        raise RLAIFError(f"expected layers from 1 to {total} for {base.name}, or 0 to choose, found {layers}")
    depths = [layers] if layers else sorted({max(1, round(total * tenth / 10)) for tenth in range(4, 11)})
    probe = len(train.rows) if len(depths) == 1 else min(len(train.rows), _PROBE_TEXTS)
    advance = progress("reading the texts", len(train.rows) + len(validation.rows))
    some = states_of(train.rows[:probe], depths, advance)
    held_out = states_of(validation.rows, depths, advance)
    best = 0
    if len(depths) > 1:
        pairs = train.pairs.take((train.pairs.first < probe) & (train.pairs.second < probe))
        fits = [fit_head(some[:, d], pairs, held_out[:, d], validation.pairs) for d in range(len(depths))]
        best = states_of.ranks.given(lambda: min(range(len(depths)), key=lambda d: fits[d].validation_loss))
    rest = states_of(train.rows[probe:], [depths[best]], advance)[:, 0]
    return _Frozen(depths[best], train, torch.cat([some[:, best], rest]), validation, held_out[:, best])


def _measure(
    fitted: _Fitted, states_of: _States, data: LabelledData, config: RewardModelConfig, progress: Progress
) -> tuple[dict[str, PairFigures], list[dict[str, Any]], dict[str, int]]:
    """Figures on each test, the learning curve of the head on the first, and texts cut in each."""
    figures: dict[str, PairFigures] = {}
    curve: list[dict[str, Any]] = []
    truncated: dict[str, int] = {}
    for name, records in data.tests.items():
        test, states, margins = _margins(fitted, states_of, records, f"reading the test texts ({name})", progress)
        curve = curve or _curve(test, states, fitted.frozen)
        figures[name] = pair_figures(margins.numpy(), records, min_gap=config.min_gap)
        truncated[f"test {name}"] = test.truncated
    return figures, curve, truncated


def _margins(
    fitted: _Fitted, states_of: _States, records: Sequence[Preference], what: str, progress: Progress
) -> tuple[Judged, Tensor, Tensor]:
    """Pairs encoded, the plain model's states of their texts (n, H), and the model's r1 - r2 of each pair (m,)."""
    model = fitted.model
    test = Judged.encode(states_of.base.tokenizer, model.task, records, model.max_tokens)
    plain = states = states_of(test.rows, [model.layers], progress(what, len(test.rows)))[:, 0]
    if fitted.tuned.steps:
        states = extract(model.backbone, test.rows, [model.layers], adapter=model.adapter, ranks=states_of.ranks)[:, 0]
    return test, plain, test.pairs.margins(states.double() @ model.weight.double())


def _cross_validated(
    config: RewardModelConfig, states_of: _States, task: Task, folds: Sequence[LabelledData], progress: Progress
) -> PairFigures:
    """Figures on all pairs, each as the model says that was trained without its fold."""
    margins: list[Tensor] = []
    records: list[Preference] = []
    done = progress("folds", len(folds))
    quick = config.trainable == "head"  # all states are there: a bar a fold would be noise
    inner: Progress = (lambda what, total: lambda rows: None) if quick else progress
    for number, fold in enumerate(folds, start=1):
        if not (fold.train and fold.validation and fold.tests["labels"]):
            raise RLAIFError(f"expected pairs in each of {len(folds)} folds, found too few; ask for fewer folds")
        fitted = _fit(config, states_of, task, fold, lambda step, metrics: None, inner)
        what = f"fold {number} of {len(folds)}"
        margins.append(_margins(fitted, states_of, fold.tests["labels"], what, inner)[2])
        records += fold.tests["labels"]
        done(1)
    return pair_figures(torch.cat(margins).numpy(), records, min_gap=config.min_gap)


def _curve(test: Judged, states: Tensor, frozen: _Frozen) -> list[dict[str, Any]]:
    """Accuracy of a head fitted to the first so many training pairs, on the frozen model."""
    m = len(frozen.train.pairs)
    curve = []
    for size in [*(size for k in range(24) if (size := _CURVE_START * 2**k) < m), m]:
        margins = test.pairs.margins(states.double() @ frozen.fit(size).weight.double())
        accuracy = pair_accuracy(torch.sigmoid(margins).numpy(), test.records)
        curve.append({"pairs": size, "accuracy": asdict(accuracy)})
    return curve
