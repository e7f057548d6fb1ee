"""``rlaif train-rm``: labels read, a reward model trained, measured and saved in a run folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rewards.reward_model.data import load_labels
from rewards.reward_model.report import curve_plot, reliability_plot
from rewards.reward_model.training import Progress, RewardModelConfig, Trained, train_rm
from rewards.reward_model.weights import check_classifier
from rlaif_env.data.tasks import DEFAULT_TASK, load_task
from rlaif_env.models import BUILTIN_MODEL, backbone
from rlaif_env.runs import RunFolder, write_json


@dataclass(frozen=True)
class TrainRMConfig(RewardModelConfig):
    """Train a reward model on preferences, people's or a language model's; measure it on held-out ones; save it.

    Attributes:
        task: What is judged: a task's name or a TOML file.
        labels: "human" for the task's own preferences, or a preference file (what rlaif label wrote, say).
        model: The base model: a name or a folder. The SFT policy, where there is one.
        out: The run folder; by default one under runs/. The model is in its folder "model".
        merged: Also save the model whole, for plain transformers.
        device: "cpu", "cuda", ...; by default the GPU where there is one.
        dtype: Of the frozen weights; by default bfloat16 on a GPU that has it and float32 elsewhere.
    """

    task: str = DEFAULT_TASK
    labels: str = "human"
    model: str = BUILTIN_MODEL
    out: str | None = None
    merged: bool = True
    device: str | None = None
    dtype: str | None = None


def train_and_save(config: TrainRMConfig, *, quiet: bool = False) -> tuple[Trained, Path]:
    """Train a reward model into a run folder (its model, report and plots), which is returned with it.

    Raises:
        RLAIFError: If a setting makes no sense, or there are no preferences to train on or to hold out.
        DataError: If the preference file has bad rows.
    """
    with RunFolder.create(config.out, asdict(config), command="train-rm") as run, _progress(quiet) as progress:
        task = load_task(config.task)
        limits = {name: getattr(config, name) for name in ("pairs", "texts", "test_pairs", "seed")}
        data = load_labels(task, config.labels, **limits)
        base = backbone(config.model, device=config.device, dtype=config.dtype)
        if config.merged or config.trainable == "full":  # what is saved whole
            check_classifier(base)
        trained = train_rm(config, base, task, data, log=run.log, progress=progress)
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
    for name, test in trained.figures.items():
        lines.append(f"on {test.pairs} held-out pairs ({name}): accuracy {test.accuracy}")
        if test.accuracy_at_gap is not None:
            lines.append(f"  where mean ratings differ by {test.min_gap:g}: {test.accuracy_at_gap}")
        lines.append(
            f"  the longer response: {test.longer}; cross-entropy over the labels' own "
            f"{test.excess_cross_entropy:.3f} nats, Brier {test.brier:.3f}, ECE {test.ece:.3f}"
        )
    for row in trained.report["curve"]:
        lines.append(f"  {row['pairs']:>8.0f} pairs: {row['accuracy']:.3f} [{row['low']:.3f}, {row['high']:.3f}]")
    if not trained.figures:
        lines.append("no held-out pairs to measure on")
    return "\n".join(lines)


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
