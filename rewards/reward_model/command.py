"""``rlaif train-rm``: labels read, a reward model trained, measured and saved in a run folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rewards.reward_model.data import LabelledData, load_labels
from rewards.reward_model.features import encode_for_reward
from rewards.reward_model.report import curve_plot, reliability_plot
from rewards.reward_model.training import Progress, RewardModelConfig, Trained, train_rm
from rewards.reward_model.weights import check_classifier
from rlaif_env.data.tasks import DEFAULT_TASK, Task, load_task
from rlaif_env.models import BUILTIN_MODEL, Backbone, backbone, load_tokenizer
from rlaif_env.ranks import Ranks, facts_of
from rlaif_env.records import write_json
from rlaif_env.runs import RunFolder
from rlaif_env.statistics import interval_text
from rlaif_env.tables import count_of


@dataclass(frozen=True)
class TrainRMConfig(RewardModelConfig):
    """Train a reward model on preferences, people's or a language model's; measure it on held-out ones; save it.

    Attributes:
        task: What is judged: a task's name or a TOML file.
        labels: "human" for the task's own preferences, or a file of them: JSON lines (.gz too), Parquet, a folder that
            rlaif label wrote, or a Hugging Face data set as owner/name, owner/name:split or owner/name/part:split.
        test: A file of pairs, or a data set, to measure the accuracy on; pairs that share a text with it are not
            trained on.
        model: The base model: a name or a folder. The SFT policy, where there is one.
        out: The run folder; by default one under runs/. The model is in its folder "model".
        merged: Also save the model whole, for plain transformers.
        device: "cpu", "cuda", ...; by default the GPU where there is one.
        dtype: Of the frozen weights; by default bfloat16 on a GPU that has it and float32 elsewhere.
        dry_run: Only read the labels and say what would be trained on and held out; no weights are loaded.
    """

    task: str = DEFAULT_TASK
    labels: str = "human"
    test: str | None = None
    model: str = BUILTIN_MODEL
    out: str | None = None
    merged: bool = True
    device: str | None = None
    dtype: str | None = None
    dry_run: bool = False


def read_labels(config: TrainRMConfig, task: Task) -> LabelledData:
    """The labels that the settings name, divided as they say; raises as `load_labels`."""
    limits = {name: getattr(config, name) for name in ("pairs", "texts", "test_pairs", "seed")}
    return load_labels(task, config.labels, **limits, hold_out=config, test=config.test)


def train_and_save(config: TrainRMConfig, *, quiet: bool = False, ranks: Ranks | None = None) -> tuple[Trained, Path]:
    """Train a reward model into a run folder (its model, report and plots), which is returned with it.

    Of several processes the first has labels, folder and display.

    Raises:
        RLAIFError: If a setting makes no sense, or there are no preferences to train on or to hold out.
        DataError: If the preference file has bad rows.
    """
    ranks = ranks or Ranks()

    def made() -> Backbone:
        base = backbone(config.model, device=config.device, dtype=config.dtype)
        if config.merged or config.trainable == "full":  # what is saved whole
            check_classifier(base)
        return base

    def read() -> tuple[Task, LabelledData]:
        task = load_task(config.task)
        return task, read_labels(config, task)

    task, data = ranks.given(read)
    base = ranks.agree(made)
    if not ranks.leader:
        return train_rm(config, base, task, data, ranks=ranks), Path()
    with RunFolder.create(config.out, asdict(config), command="train-rm") as run, _progress(quiet) as progress:
        trained = train_rm(config, base, task, data, ranks=ranks, log=run.log, progress=progress)
        summary = {
            name: {key: value for key, value in figures.items() if key != "reliability"}
            for name, figures in trained.report["figures"].items()
        }
        trained.model.save(run.path / "model", merged=config.merged, figures=summary)
        write_json(run.path / "report.json", trained.report)
        if trained.figures:
            reliability_plot(trained.figures).savefig(run.path / "reliability.png", dpi=120)
            what = f"held-out pairs ({next(iter(trained.figures))})"
            curve_plot(trained.report["curve"], what).savefig(run.path / "accuracy-by-pairs.png", dpi=120)
    return trained, run.path


def main(argv: Sequence[str]) -> int:
    """``rlaif train-rm``: train, measure, save and say how good the model is."""
    import tyro

    with Ranks.started() as ranks:

        def work() -> tuple[TrainRMConfig, tuple[Trained, Path] | None]:
            ranks.check_same(facts_of(argv))
            config = ranks.given(lambda: tyro.cli(TrainRMConfig, args=list(argv), prog="rlaif train-rm"))
            return config, None if config.dry_run else train_and_save(config, ranks=ranks)

        if not ranks.leader:
            return ranks.follow(lambda: 0 if work() else 1)
        config, made = work()
    if made is None:
        print(plan(config))
        return 0
    trained, folder = made
    print(describe(trained))
    print(f"saved in {folder}")
    return 0


def describe(trained: Trained) -> str:
    """The report in words."""
    training = trained.report["training"]
    lines = [
        f"{trained.model.name}: {training['pairs']} pairs of {training['texts']} texts ({trained.model.labels}), state "
        f"after layer {training['layers']}, {training['seconds']:.0f} s ({training['cpu_seconds']:.0f} s of CPU); "
        f"truncated texts: {training['truncated_texts']}",
        *_held_out(trained.report["held_out"], training["left_out_pairs"]),
    ]
    for name, test in trained.figures.items():
        of = ([count_of(test.prompts, "prompt")] if test.prompts else []) + [count_of(test.texts, "text")]
        lines.append(
            f"on {count_of(test.pairs, 'held-out pair')} ({name}) of {' and '.join(of)}: accuracy {test.accuracy}"
        )
        if test.accuracy_at_gap is not None:
            lines.append(f"  where mean ratings differ by {test.min_gap:g}: {test.accuracy_at_gap}")
        lines.append(
            f"  the longer response: {test.longer}; cross-entropy over the labels' own "
            f"{test.excess_cross_entropy:.3f} nats, Brier {test.brier:.3f}, ECE {test.ece:.3f}"
        )
    for row in trained.report["curve"]:
        lines.append(f"  {row['pairs']:>8.0f} pairs: {interval_text(row['accuracy'], '.3f')}")
    if not trained.figures:
        lines.append("no held-out pairs to measure on")
    return "\n".join(lines)


def _held_out(division: Mapping[str, Any], left_out: Mapping[str, int]) -> list[str]:
    """How the labels were divided, what was left out of them, and what is wrong with that."""
    if not division:
        return []
    sides = [
        f"{name} {count_of(side['pairs'], 'pair')} of {count_of(side['prompts'], 'prompt')} and "
        f"{count_of(side['texts'], 'text')}"
        for name, side in division["sides"].items()
    ]
    shares = ", ".join(f"{name} {share:.1%}" for name, share in division.get("shares", {}).items())
    lines = [f"divided by {division['unit']}{f' ({shares} of the pairs)' if shares else ''}: {'; '.join(sides)}"]
    if known := ", ".join(f"{n} {name}" for name, n in division["known"].items() if n):
        lines.append(f"in the test and in the training too: {known}")
    if folds := division.get("folds"):
        lines.append(
            f"folds by {division['unit']}: {folds['pairs']} of {folds['of']} pairs, each tested once; "
            f"{folds['dropped']} dropped"
        )
    lines.append(f"pairs left out: {', '.join(f'{count} {why}' for why, count in left_out.items()) or 'none'}")
    return lines + [f"warning: {warning}" for warning in division["warnings"]]


def plan(config: TrainRMConfig) -> str:
    """What ``config`` would train on and hold out, with the tokens of each side, in words; no weights are loaded.

    Raises:
        DataError: If the preference file has bad rows.
        RLAIFError: As `train_and_save`.
    """
    task = load_task(config.task)
    data, tokenizer = read_labels(config, task), load_tokenizer(config.model)
    lines = _held_out(data.division, data.left_out)
    for name, records in {"train": data.train, "validation": data.validation, **data.tests}.items():
        texts = dict.fromkeys((r.prompt, text) for r in records for text in (r.response_1, r.response_2))
        sizes, cut = [], 0
        for prompt, response in texts:
            row, beyond = encode_for_reward(tokenizer, task, prompt, response, config.max_tokens)
            sizes.append(len(row))
            cut += beyond > 0
        lines.append(f"{name}: {sum(sizes):,} tokens, the longest text {max(sizes)}, {cut} cut to {config.max_tokens}")
    if data.folds:
        lines.append(f"{len(data.folds)} folds: so many trainings more")
    return "\n".join([*lines, "a dry run: nothing was trained or written"])


@contextmanager
def _progress(quiet: bool) -> Iterator[Progress]:
    """A progress bar a stage, with the time left."""
    from rich.progress import Progress as Bars
    from rich.progress import TimeRemainingColumn

    columns = (*Bars.get_default_columns()[:-1], TimeRemainingColumn(elapsed_when_finished=True))
    with Bars(*columns, disable=quiet) as bars:

        def stage(what: str, total: int) -> Callable[[int], object]:
            bar = bars.add_task(what, total=total)
            return lambda done: bars.advance(bar, done)

        yield stage
