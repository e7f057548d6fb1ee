"""Training a reward model on preferences: ``rlaif train-rm`` (section 2.2.1, appendices A and G).

First a linear head is fitted on the frozen model's states, which are computed once: that alone is ``trainable="head"``.
The layer it reads is chosen on validation pairs. ``"lora"`` and ``"full"`` go on from there with gradients through the
model.

How this differs from the paper: AdamW instead of Adafactor; early stopping on validation; the head starts fitted.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rewards.reward_model.data import Judged, LabelledData, load_labels
from rewards.reward_model.features import depth_of, extract
from rewards.reward_model.head import Pairs, centred, fit_head
from rewards.reward_model.model import DEFAULT_MAX_TOKENS, LabelRecord, Normalization, RewardModel
from rewards.reward_model.report import PairFigures, curve_plot, pair_accuracy, pair_figures, reliability_plot
from rewards.reward_model.tuning import Tuned, Tuning, tune
from rlaif_env.api import Preference, RLAIFError
from rlaif_env.data.tasks import load_task
from rlaif_env.models import BUILTIN_MODEL, Backbone, backbone
from rlaif_env.runs import RunFolder, write_json

__all__ = ["TrainRMConfig", "Trained", "describe", "main", "train_and_save", "train_rm"]

_PROBE_TEXTS = 1500  # enough to tell the layers apart
_CURVE_START = 128

Advance = Callable[[int], None]


@dataclass(frozen=True)
class TrainRMConfig:
    """Settings of ``rlaif train-rm``.

    Attributes:
        task: What is judged: a task's name or a TOML file.
        labels: "human" for the task's own preferences, or a preference file (what ``rlaif label`` wrote, say).
        model: The base model: a name or a folder. The SFT policy, where there is one.
        out: The run folder; by default one under runs/. The model is in its folder "model".
        trainable: "head": a linear head on the frozen model, good on a CPU. "lora": an adapter too. "full": all
        weights.
        pairs: Train on at most so many pairs.
        texts: And on at most so many distinct texts, which is what takes time; 0 is no limit.
        layers: The head reads the state after so many layers; 0 chooses by validation.
        epochs: Of "lora" and "full", at most.
        learning_rate: Of "lora" and "full". For "full", 1e-5 is the paper's.
        batch_pairs: Pairs in one step of "lora" and "full".
        micro_pairs: Pairs in one gradient pass; the step is the same for any number.
        lora_rank: Rank of the adapter.
        lora_alpha: The adapter is scaled by lora_alpha / lora_rank.
        max_tokens: Longest text, EOS included; of a longer one the end is kept, and it is counted.
        center: Shift the scores to mean 0 on the training responses.
        normalize: Reward as it is, or standardised over the training responses.
        min_gap: Accuracy is also told for pairs whose mean human ratings differ by so much.
        test_pairs: Pairs in each test.
        merged: Also save the model whole, for plain transformers.
        seed: Of the pairs drawn, their order, and the adapter.
        device: "cpu", "cuda", ...; by default the GPU where there is one.
        dtype: Of the frozen weights; by default bfloat16 on a GPU that has it and float32 elsewhere.
    """

    task: str = "movie-review"
    labels: str = "human"
    model: str = BUILTIN_MODEL
    out: str | None = None
    trainable: Literal["head", "lora", "full"] = "head"
    pairs: int = 12_000
    texts: int = 4_000
    layers: int = 0
    epochs: int = 2
    learning_rate: float = 1e-4
    batch_pairs: int = 32
    micro_pairs: int = 8
    lora_rank: int = 16
    lora_alpha: float = 32.0
    max_tokens: int = DEFAULT_MAX_TOKENS
    center: bool = True
    normalize: Literal["none", "standardize"] = "none"
    min_gap: float = 0.5
    test_pairs: int = 2_000
    merged: bool = True
    seed: int = 0
    device: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        limits = {
            "pairs": 1,
            "texts": 0,
            "layers": 0,
            "epochs": 0,
            "batch_pairs": 1,
            "micro_pairs": 1,
            "lora_rank": 1,
            "max_tokens": 2,
            "min_gap": 0,
            "test_pairs": 1,
            "learning_rate": 0,
        }
        for name, least in limits.items():
            if not getattr(self, name) >= least:
                raise RLAIFError(f"expected {name} of at least {least}, found {getattr(self, name)}")

    def tuning(self) -> Tuning:
        """The settings of "lora" and "full"."""
        return Tuning(**{entry.name: getattr(self, entry.name) for entry in fields(Tuning)})


@dataclass(frozen=True)
class Trained:
    """A trained reward model and how good it is.

    Attributes:
        model: The model.
        figures: On held-out pairs, by who judged them: "human", "labels".
        report: Everything measured, JSON-able.
        curve: Accuracy of the head alone by number of training pairs, on the first test.
    """

    model: RewardModel
    figures: Mapping[str, PairFigures]
    report: Mapping[str, Any]
    curve: Sequence[Mapping[str, float]]


def train_rm(
    config: TrainRMConfig,
    *,
    base: Backbone | None = None,
    data: LabelledData | None = None,
    log: Callable[[int, Mapping[str, float]], None] = lambda step, metrics: None,
    progress: Callable[[str, int], Advance] = lambda what, total: lambda done: None,
) -> Trained:
    """Train a reward model and measure it.

    Args:
        config: The settings.
        base: The base model, if it is in memory already.
        data: The preferences, if not those that the settings name.
        log: Called with the step and the metrics of "lora" and "full".
        progress: Called with the name and size of each stage; what it returns is called with the size of what is done.

    Raises:
        RLAIFError: If a setting makes no sense, or there are no preferences to train on or to hold out.
        DataError: If the preference file has bad rows.
    """
    task = load_task(config.task)
    data = data or load_labels(
        task, config.labels, pairs=config.pairs, texts=config.texts, test_pairs=config.test_pairs, seed=config.seed
    )
    base = base or backbone(config.model, device=config.device, dtype=config.dtype)
    started, cpu = time.monotonic(), time.process_time()
    train, validation = (
        Judged.encode(base.tokenizer, task, records, config.max_tokens) for records in (data.train, data.validation)
    )
    depth, states, held_out = _read_states(base, train, validation, config.layers, progress)
    fit = fit_head(states, train.pairs, held_out, validation.pairs)
    tuned = Tuned(base, None, fit.weight, 0, 0, fit.validation_loss)
    if config.trainable != "head":
        advance = progress("tuning (pairs)", config.epochs * len(train.pairs))
        tuned = tune(base, fit.weight, depth, train, validation, config.tuning(), log=log, advance=advance)
    frozen = states if config.trainable == "head" else None
    weight, normalization = _finished(tuned, train, depth, frozen, config, progress)
    seconds, cpu = time.monotonic() - started, time.process_time() - cpu
    model = RewardModel(
        tuned.backbone,
        weight,
        task,
        layers=depth,
        adapter=tuned.adapter,
        max_tokens=config.max_tokens,
        labels=LabelRecord(dict(Counter(record.source for record in data.train))),
        normalization=normalization,
        owns_weights=config.trainable == "full",
    )
    figures, curve, cut = _measure(model, base, data.tests, (states, train, held_out, validation), config, progress)
    report = {
        "figures": {name: found.to_json() for name, found in figures.items()},
        "labels": {"provenance": model.labels.provenance, "sources": dict(model.labels.sources)},
        "training": {
            "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu, 1),
            "pairs": len(train.pairs),
            "texts": len(train.rows),
            "truncated_texts": {"train": train.truncated, "validation": validation.truncated, **cut},
            "left_out_pairs": dict(data.left_out),
            "layers": depth,
            "head_penalty": fit.penalty,
            "steps": tuned.steps,
            "best_step": tuned.best_step,
            "validation_excess_cross_entropy": tuned.validation_loss - _entropy(validation.pairs),
        },
        "curve": list(curve),
    }
    return Trained(model, figures, report, curve)


def _read_states(
    base: Backbone, train: Judged, validation: Judged, layers: int, progress: Callable[[str, int], Advance]
) -> tuple[int, Tensor, Tensor]:
    """Choose the layer, if it is not given, and read the states there: depth, training (n, H), validation (n', H).

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
    return depths[best], torch.cat([some[:, best], rest]), held_out[:, best]


def _finished(
    tuned: Tuned,
    train: Judged,
    depth: int,
    states: Tensor | None,
    config: TrainRMConfig,
    progress: Callable[[str, int], Advance],
) -> tuple[Tensor, Normalization]:
    """The head, centred if wanted, and the normalisation of its scores."""
    if states is None:
        advance = progress("reading the texts again", len(train.rows))
        states = extract(tuned.backbone, train.rows, [depth], adapter=tuned.adapter, advance=advance)[:, 0]
    weight = centred(tuned.weight, states) if config.center else tuned.weight
    if config.normalize == "none":
        return weight, Normalization()
    scores = states.double() @ weight.double()
    return weight, Normalization("standardize", float(scores.mean()), float(scores.std(correction=0)))


def _measure(
    model: RewardModel,
    base: Backbone,
    tests: Mapping[str, Sequence[Preference]],
    frozen: tuple[Tensor, Judged, Tensor, Judged],
    config: TrainRMConfig,
    progress: Callable[[str, int], Advance],
) -> tuple[dict[str, PairFigures], list[dict[str, float]], dict[str, int]]:
    """Figures on each test, the learning curve of the head on the first, and texts cut in each."""
    figures: dict[str, PairFigures] = {}
    curve: list[dict[str, float]] = []
    cut: dict[str, int] = {}
    for name, records in tests.items():
        judged = Judged.encode(base.tokenizer, model.task, records, config.max_tokens)
        advance = progress(f"reading the test texts ({name})", len(judged.rows))
        states = extract(base, judged.rows, [model.layers], advance=advance)[:, 0]
        if not curve:
            curve = _curve(states, judged, *frozen)
        if config.trainable != "head":
            states = extract(model.backbone, judged.rows, [model.layers], adapter=model.adapter)[:, 0]
        margins = judged.pairs.margins(states.double() @ model.weight.double())
        figures[name] = pair_figures(margins.numpy(), records, min_gap=config.min_gap)
        cut[f"test {name}"] = judged.truncated
    return figures, curve, cut


def _curve(
    test_states: Tensor, test: Judged, states: Tensor, train: Judged, held_out: Tensor, validation: Judged
) -> list[dict[str, float]]:
    """Accuracy of a head fitted to the first so many training pairs, on the frozen model."""
    sizes = [size for k in range(24) if (size := _CURVE_START * 2**k) < len(train.pairs)]
    curve = []
    for size in [*sizes, len(train.pairs)]:
        fit = fit_head(states, train.pairs.take(slice(size)), held_out, validation.pairs)
        margins = test.pairs.margins(test_states.double() @ fit.weight.double())
        found = pair_accuracy(torch.sigmoid(margins).numpy(), test.records)
        curve.append({"pairs": size, "accuracy": found.estimate, "low": found.low, "high": found.high})
    return curve


def _entropy(pairs: Pairs) -> float:
    """Mean entropy of the labels, nats."""
    p = pairs.p_first.double()
    return float(-(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)).mean())


def train_and_save(config: TrainRMConfig, *, quiet: bool = False) -> tuple[Trained, Path]:
    """Train a reward model into a run folder: its model, report and plots.

    Args:
        config: The settings.
        quiet: Show no progress.

    Returns:
        What was trained, and the folder.
    """
    with RunFolder.create(config.out, asdict(config), command="train-rm") as run, _progress(quiet) as progress:
        trained = train_rm(config, log=run.log, progress=progress)
        summary = {name: _summary(found) for name, found in trained.report["figures"].items()}
        trained.model.save(run.path / "model", merged=config.merged, figures=summary)
        write_json(run.path / "report.json", trained.report)
        if trained.figures:
            reliability_plot(trained.figures).savefig(run.path / "reliability.png", dpi=120)
            what = f"held-out pairs ({next(iter(trained.figures))})"
            curve_plot(trained.curve, what).savefig(run.path / "accuracy-by-pairs.png", dpi=120)
    return trained, run.path


def main(argv: Sequence[str]) -> int:
    """``rlaif train-rm``: train, measure, save and say how good the model is."""
    import tyro

    trained, folder = train_and_save(tyro.cli(TrainRMConfig, args=list(argv), prog="rlaif train-rm"))
    print(describe(trained))
    print(f"saved in {folder}")
    return 0


def describe(trained: Trained) -> str:
    """The report in words."""
    training = trained.report["training"]
    lines = [
        f"{trained.model.name}: {training['pairs']} pairs of {training['texts']} texts ({trained.model.labels}), state "
        f"after layer {training['layers']}, {training['seconds']:.0f} s ({training['cpu_seconds']:.0f} s of CPU); "
        f"truncated texts: {training['truncated_texts']}; pairs left out: {training['left_out_pairs'] or 'none'}"
    ]
    for name, found in trained.figures.items():
        lines.append(f"on {found.pairs} held-out pairs ({name}): accuracy {found.accuracy}")
        if found.accuracy_at_gap is not None:
            lines.append(f"  where mean ratings differ by {found.min_gap:g}: {found.accuracy_at_gap}")
        lines.append(
            f"  the longer response: {found.longer}; cross-entropy over the labels' own "
            f"{found.excess_cross_entropy:.3f} nats, Brier {found.brier:.3f}, ECE {found.ece:.3f}"
        )
    for row in trained.curve:
        lines.append(f"  {row['pairs']:>8.0f} pairs: {row['accuracy']:.3f} ({row['low']:.3f}-{row['high']:.3f})")
    if not trained.figures:
        lines.append("no held-out pairs to measure on")
    return "\n".join(lines)


def _summary(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures for the model card."""
    return {name: value for name, value in figures.items() if name != "reliability"}


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str, int], Advance]]:
    """A progress bar a stage, with the time left."""
    from rich.progress import Progress, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:-1], TimeRemainingColumn(elapsed_when_finished=True))
    with Progress(*columns, disable=quiet) as bars:

        def stage(what: str, total: int) -> Advance:
            task = bars.add_task(what, total=total)
            return lambda done: bars.advance(task, done)

        yield stage
