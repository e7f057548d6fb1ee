"""Training a reward model on preferences (section 2.2.1, appendices A and G); ``rlaif train-rm`` is in `command`.

First a linear head is fitted on the frozen model's states, which are computed once: that alone is ``trainable="head"``.
The layer it reads is chosen on validation pairs. ``"lora"`` and ``"full"`` go on from there with gradients through the
model.

How this differs from the paper: AdamW unless ``optimizer.name="adafactor"``; early stopping on validation; the head
starts fitted.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rewards.reward_model.data import Judged, LabelledData
from rewards.reward_model.features import depth_of, extract
from rewards.reward_model.head import HeadFit, centred, fit_head
from rewards.reward_model.model import DEFAULT_MAX_TOKENS, RewardModel
from rewards.reward_model.record import LabelRecord, Normalization
from rewards.reward_model.report import PairFigures, pair_accuracy, pair_figures
from rewards.reward_model.tuning import Tuned, TuningConfig, tune
from rlaif_env.api import RLAIFError
from rlaif_env.data.tasks import Task
from rlaif_env.models import Backbone

_PROBE_TEXTS = 1500  # enough to tell the layers apart
_CURVE_START = 128

Progress = Callable[[str, int], Callable[[int], object]]
"""Called with the name and size of a stage; what it returns is called with the size of what is done."""


@dataclass(frozen=True)
class RewardModelConfig(TuningConfig):
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


@dataclass(frozen=True)
class Trained:
    """A trained reward model and how good it is."""

    model: RewardModel  # the model
    figures: Mapping[str, PairFigures]  # on held-out pairs, by who judged them: "human", "labels"
    # Everything measured, JSON-able: the same "figures", "labels", "training", and "curve", the accuracy of the
    # head alone by number of training pairs, on the first test
    report: Mapping[str, Any]


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


def train_rm(
    config: RewardModelConfig,
    base: Backbone,
    task: Task,
    data: LabelledData,
    *,
    log: Callable[[int, Mapping[str, float]], None] = lambda step, metrics: None,
    progress: Progress = lambda what, total: lambda done: None,
) -> Trained:
    """Train a reward model on preferences as `load_labels` divides them, and measure it.

    ``log`` is called with the step and the metrics of "lora" and "full"; see `Progress` for the other.

    Raises:
        RLAIFError: If a setting does not fit the model, or a loss is not finite.
    """
    started, cpu = time.monotonic(), time.process_time()
    train, validation = (
        Judged.encode(base.tokenizer, task, records, config.max_tokens) for records in (data.train, data.validation)
    )
    frozen = _read_states(base, train, validation, config.layers, progress)
    fit, states = frozen.fit(), frozen.states
    tuned = Tuned(base, None, fit.weight, 0, 0, fit.validation_loss)
    if config.trainable != "head":
        advance = progress("tuning (pairs)", config.epochs * len(train.pairs))
        tuned = tune(base, fit.weight, frozen.layers, train, validation, config, log=log, advance=advance)
        advance = progress("reading the texts again", len(train.rows))
        states = extract(tuned.backbone, train.rows, [frozen.layers], adapter=tuned.adapter, advance=advance)[:, 0]
    weight = centred(tuned.weight, states) if config.center else tuned.weight
    normalization = Normalization()
    if config.normalize == "standardize":
        scores = states.double() @ weight.double()
        normalization = Normalization("standardize", float(scores.mean()), float(scores.std(correction=0)))
    seconds, cpu = time.monotonic() - started, time.process_time() - cpu
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
    figures, curve, truncated = _measure(model, base, data, frozen, config, progress)
    training = {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
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
        "training": training,
        "curve": curve,
    }
    return Trained(model, figures, report)


def _read_states(base: Backbone, train: Judged, validation: Judged, layers: int, progress: Progress) -> _Frozen:
    """Choose the layer, if it is not given, and read the states there.

    The choice is made on the pairs among the first texts, by the validation loss of a head fitted at each depth.
    """
    total = depth_of(base.model)
    if layers > total:
        raise RLAIFError(f"expected layers from 1 to {total} for {base.name}, or 0 to choose, found {layers}")
    depths = [layers] if layers else sorted({max(1, round(total * tenth / 10)) for tenth in range(4, 11)})
    probe = len(train.rows) if len(depths) == 1 else min(len(train.rows), _PROBE_TEXTS)
    advance = progress("reading the texts", len(train.rows) + len(validation.rows))
    some = extract(base, train.rows[:probe], depths, advance=advance)
    held_out = extract(base, validation.rows, depths, advance=advance)
    best = 0
    if len(depths) > 1:
        pairs = train.pairs.take((train.pairs.first < probe) & (train.pairs.second < probe))
        fits = [fit_head(some[:, d], pairs, held_out[:, d], validation.pairs) for d in range(len(depths))]
        best = min(range(len(depths)), key=lambda d: fits[d].validation_loss)
    rest = extract(base, train.rows[probe:], [depths[best]], advance=advance)[:, 0]
    return _Frozen(depths[best], train, torch.cat([some[:, best], rest]), validation, held_out[:, best])


def _measure(
    model: RewardModel,
    base: Backbone,
    data: LabelledData,
    frozen: _Frozen,
    config: RewardModelConfig,
    progress: Progress,
) -> tuple[dict[str, PairFigures], list[dict[str, float]], dict[str, int]]:
    """Figures on each test, the learning curve of the head on the first, and texts cut in each."""
    figures: dict[str, PairFigures] = {}
    curve: list[dict[str, float]] = []
    truncated: dict[str, int] = {}
    for name, records in data.tests.items():
        test = Judged.encode(base.tokenizer, model.task, records, config.max_tokens)
        advance = progress(f"reading the test texts ({name})", len(test.rows))
        states = extract(base, test.rows, [model.layers], advance=advance)[:, 0]
        curve = curve or _curve(test, states, frozen)
        if config.trainable != "head":
            states = extract(model.backbone, test.rows, [model.layers], adapter=model.adapter)[:, 0]
        margins = test.pairs.margins(states.double() @ model.weight.double())
        figures[name] = pair_figures(margins.numpy(), records, min_gap=config.min_gap)
        truncated[f"test {name}"] = test.truncated
    return figures, curve, truncated


def _curve(test: Judged, states: Tensor, frozen: _Frozen) -> list[dict[str, float]]:
    """Accuracy of a head fitted to the first so many training pairs, on the frozen model."""
    m = len(frozen.train.pairs)
    curve = []
    for size in [*(size for k in range(24) if (size := _CURVE_START * 2**k) < m), m]:
        margins = test.pairs.margins(states.double() @ frozen.fit(size).weight.double())
        accuracy = pair_accuracy(torch.sigmoid(margins).numpy(), test.records)
        curve.append({"pairs": size, "accuracy": accuracy.estimate, "low": accuracy.low, "high": accuracy.high})
    return curve
