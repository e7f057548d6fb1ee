"""The stages of a comparison of reward backends: labels, reward models, trainings, answers, judgements.

What each stage is made from is in its key (`benchmarks.comparison.stages`): contents of files and models, never their
paths, so that arms which need the same thing share it, and a folder that was moved is still known.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from agents.sft import SFTConfig
from agents.sft import train_and_save as fine_tune
from agents.training.command import TrainConfig, train
from benchmarks.comparison.arms import ARMS, Arm, CompareConfig
from benchmarks.comparison.outcomes import History, Outcome
from benchmarks.comparison.stages import Stage, Stages, content_of
from benchmarks.evaluation.judges import judged
from benchmarks.evaluation.systems import System, answer
from rewards import make_reward
from rewards.labeling.command import LabelConfig, label
from rewards.language_model.config import LanguageModelConfig
from rewards.reward_model.training import TrainRMConfig, train_and_save
from rlaif_env.api import DataError, Preference, RLAIFError
from rlaif_env.data.jsonl import read_jsonl, write_jsonl
from rlaif_env.data.preferences import read_preferences, write_preferences
from rlaif_env.data.tasks import Task, gold_scores, load_task
from rlaif_env.runs import read_metrics, write_json

__all__ = ["Judge", "Pipeline"]


_OPERATIONAL = ("checkpoint_every", "keep_checkpoints", "resume")  # a training comes to the same with others of these


@dataclass(frozen=True)
class Judge:
    """A reward backend that judges answers.

    Attributes:
        reward: The backend's name.
        kwargs: Its settings.
        key: What stands for it in a stage's key.
        needs: The stages behind it.
    """

    reward: str
    kwargs: dict[str, Any]
    key: dict[str, Any]
    needs: list[Stage]


class Pipeline:
    """The stages of one comparison. Each method gives the finished stage, made where it is not there."""

    def __init__(self, config: CompareConfig, console: Console) -> None:
        self.config, self.console = config, console
        self.task = load_task(config.task)
        self.stages = Stages(config.out / "stages", console)
        self.shared = {"task": self.task.to_json(), "version": version("rlaif-env")}
        source = self.task.source
        for name, files in (("jsonl", source.jsonl), ("preferences", source.preferences)):
            for split, file in {"": files}.items() if not isinstance(files, Mapping) else files.items():
                if file is not None:
                    self.shared[f"{name} {split}"] = content_of(file)
        self._contents: dict[str, str] = {}
        self._rated: dict[str, bool] = {}
        self.initial = config.model
        self.start: tuple[Stage, ...] = ()
        if config.sft_data is not None:
            stage = self.fine_tuned(config.sft_data)
            self.initial, self.start = str(stage.path / "run" / "model"), (stage,)

    @property
    def _policy(self) -> str:
        return "sft stage" if self.start else self._content(self.config.model)

    def _content(self, source: str | Path) -> str:
        if str(source) not in self._contents:
            self._contents[str(source)] = content_of(source)
        return self._contents[str(source)]

    def fine_tuned(self, data: str) -> Stage:
        """The SFT policy."""
        settings = SFTConfig(data=None if data == "builtin" else data, model=self.config.model)

        def make(folder: Path) -> None:
            fine_tune(replace(settings, out=str(folder / "run")), quiet=not self.console.is_terminal)

        key = {**_without(settings, "out", "data"), "data": data if data == "builtin" else self._content(data)}
        return self.stages.run("sft", key | {"model": self._content(self.config.model)}, make)

    def labels(self, who: Literal["ai", "same-size"]) -> Stage:
        """The labeler's preferences."""
        c = self.config
        name, url = (c.labeler, c.labeler_url) if who == "ai" else (c.model, None)
        settings = LabelConfig(
            task=c.task,
            pairs=c.label_pairs,
            labeler=LanguageModelConfig(name, url),
            mode=c.label_mode,
            prompt=c.label_prompt,
            shots=c.label_shots,
            cot=c.label_cot,
            scale=c.scale,
            minimum_mass=c.minimum_mass,
            policy=None if self._has_preferences("train") else self.initial,
        )
        key = {**_without(settings, "out", "task", "policy"), "model": self._content(name), **self.shared}
        needs = self.start if settings.policy else ()
        if settings.policy:
            key["policy"] = self._policy

        def make(folder: Path) -> None:
            with self.console.status(f"{name} labels {c.label_pairs} pairs"):
                found = label(replace(settings, out=folder), Console(quiet=True))
            if not found["labelled"]:
                raise RLAIFError(f"expected the labeler to label some of {found['pairs']} pairs, see {folder}")

        return self.stages.run("labels", key, make, needs=needs, goes_on=True)

    def reward_model(self, labels: str, pairs: int | None = None) -> Stage:
        """A reward model on "human", "ai", "same-size", "both" or "gold" preferences; its folder is "run/model"."""
        c = self.config
        needs: list[Stage] = [*self.start]
        sources: list[str] = []  # "human" or a file
        if labels in ("human", "both"):
            sources.append("human" if c.human_labels is None else str(c.human_labels))
        if labels == "gold":
            needs.append(self._gold_preferences())
            sources.append(str(needs[-1].path / "preferences.jsonl"))
        if labels in ("ai", "same-size", "both"):
            needs.append(self.labels("same-size" if labels == "same-size" else "ai"))
            sources.append(str(needs[-1].path / "preferences.jsonl"))
        settings = TrainRMConfig(
            task=c.task,
            labels=sources[0],
            model=self.initial,
            trainable=c.rm_trainable,
            pairs=pairs or c.rm_pairs,
            texts=c.rm_texts,
            test_pairs=c.rm_test_pairs,
            merged=False,
        )
        key = {**_without(settings, "out", "labels", "model", "task"), "model": self._policy, **self.shared}
        key["labels"] = None if c.human_labels is None else self._content(c.human_labels)

        def make(folder: Path) -> None:
            chosen = sources[0]
            if len(sources) > 1:
                chosen = str(folder / "preferences.jsonl")
                write_preferences(chosen, self._both(*sources))
            done = replace(settings, labels=chosen, out=str(folder / "run"))
            train_and_save(done, quiet=not self.console.is_terminal)

        name = "ai" if labels == "same-size" else labels  # the labels themselves tell the two apart
        return self.stages.run(f"rm-{name}" + (f"-{pairs}" if pairs else ""), key, make, needs=needs)

    def _both(self, human: str, ai: str) -> Iterator[Preference]:
        people = self.task.preferences("train") if human == "human" else read_preferences(human)
        yield from islice(people, self.config.label_pairs)
        yield from read_preferences(ai)

    def _gold_preferences(self) -> Stage:
        def make(folder: Path) -> None:
            write_preferences(folder / "preferences.jsonl", self.task.preferences("gold"))

        return self.stages.run("gold-preferences", self.shared, make)

    def _has_preferences(self, split: str) -> bool:
        if split not in self._rated:
            try:
                self._rated[split] = next(iter(self.task.preferences(split)), None) is not None
            except DataError:
                raise
            except RLAIFError:
                self._rated[split] = False
        return self._rated[split]

    def training(self, arm: str, seed: int) -> Stage:
        """A policy trained with an arm's reward."""
        settings, key, needs = self._reward(ARMS[arm])
        c = self.config
        settings = replace(
            settings,
            task=c.task,
            model=self.initial,
            updates=c.updates,
            prompts_per_update=c.prompts_per_update,
            eval_prompts=0,
            seed=seed,
            agent=c.agent,
        )
        named = ("out", "model", "task", "reward_model", "reward_kwargs", "llm_url", *_OPERATIONAL)
        key |= {**_without(settings, *named), "model": self._policy, **self.shared}

        def make(folder: Path) -> None:
            result = train(replace(settings, out=folder), self.console)
            if result.interrupted:
                raise KeyboardInterrupt

        return self.stages.run(
            f"train-{ARMS[arm].reward}-seed{seed}", key, make, needs=(*self.start, *needs), goes_on=True
        )

    def _reward(self, arm: Arm) -> tuple[TrainConfig, dict[str, Any], list[Stage]]:
        """The settings of an arm's reward, what stands for them in a key, and the stages behind it."""
        c = self.config
        if arm.labels is not None:
            stage = self.reward_model(arm.labels)
            found = TrainConfig(reward=arm.reward, reward_model=str(stage.path / "run" / "model"))
            return found, {"reward": arm.reward}, [stage]
        by_policy = arm.scorer == "policy"
        name, url = (self.initial, None) if by_policy else (c.labeler, c.labeler_url)
        kwargs: dict[str, Any] = {"scale": list(c.scale), "minimum_mass": c.minimum_mass}
        key = {"reward": arm.reward, "scorer": self._policy if by_policy else self._content(name), **kwargs}
        found = TrainConfig(reward=arm.reward, reward_model=name, llm_url=url, reward_kwargs=json.dumps(kwargs))
        return found, key, []

    def answers(self, arm: str, seed: int) -> Stage:
        """A policy's answers to the held-out prompts; "sft" is the initial policy."""
        c = self.config
        trained = [] if arm == "sft" else [self.training(arm, seed)]
        source = self.initial if arm == "sft" else str(trained[0].path)
        key = {"prompts": c.eval_prompts, "split": c.eval_split, "seed": seed, "model": self._policy, **self.shared}

        def make(folder: Path) -> None:
            found = answer(
                f"{arm}/{seed}",
                source,
                self.task,
                split=c.eval_split,
                prompts=c.eval_prompts,
                seed=seed,
                reference=self.initial,
            )
            _write_system(folder / "answers.jsonl", found)

        name = arm if arm == "sft" else ARMS[arm].reward
        return self.stages.run(f"answers-{name}-seed{seed}", key, make, needs=(*self.start, *trained))

    def judges(self) -> dict[str, Judge]:
        """Who judges the answers: every arm's reward, the labeler's score, and the gold reward model."""
        found: dict[str, Judge] = {}
        for name in dict.fromkeys((*self.config.arms, *(() if "direct-llm" in self.config.arms else ("direct-llm",)))):
            settings, key, needs = self._reward(ARMS[name])
            kwargs = {"model": settings.reward_model, **json.loads(settings.reward_kwargs)}
            if settings.llm_url is not None:
                kwargs["llm_url"] = settings.llm_url
            found[name] = Judge(ARMS[name].reward, kwargs, key, needs)
        if self.config.gold_rm and self._has_preferences("gold"):
            stage = self.reward_model("gold")
            kwargs = {"model": str(stage.path / "run" / "model")}
            found["gold-rm"] = Judge("reward-model", kwargs, {"gold": True}, [stage])
        return found

    def judgements(self, name: str, judge: Judge, who: Stage) -> Stage:
        """What a judge says of a policy's answers."""

        def make(folder: Path) -> None:
            system = _read_system(who.path / "answers.jsonl", who.name)
            backend = make_reward(judge.reward, task=self.task, **judge.kwargs)
            scores = judged(system, name, backend, self.task).measures[f"judge:{name}"]
            write_json(folder / "scores.json", [_number(score) for score in scores])

        label = "gold-rm" if name == "gold-rm" else judge.reward
        whose = who.name.removeprefix("answers-")
        key = {"judge": judge.key, **self.shared}
        return self.stages.run(f"judge-{label}-of-{whose}", key, make, needs=(*judge.needs, who))

    def outcome(self, arm: str, seed: int) -> Outcome:
        """All that is known of one policy."""
        answers = self.answers(arm, seed)
        system = _read_system(answers.path / "answers.jsonl", f"{arm}/{seed}")
        measures = dict(system.measures)
        costs = {"answers": answers}
        for name, judge in self.judges().items():
            stage = self.judgements(name, judge, answers)
            measures[f"judge:{name}"] = np.asarray(json.loads((stage.path / "scores.json").read_text()), np.float64)
        if self.task.gold is not None:
            texts = [self.task.judged(p, r) for p, r in zip(system.prompts, system.responses, strict=True)]
            measures["gold"] = gold_scores(self.task, texts)
        history = None
        if arm != "sft":
            costs["training"] = self.training(arm, seed)
            if ARMS[arm].labels is not None:
                costs["reward model"] = self.reward_model(str(ARMS[arm].labels))
            if ARMS[arm].labels in ("ai", "both"):
                costs["labels"] = self.labels("ai")
            if ARMS[arm].labels == "same-size":
                costs["labels"] = self.labels("same-size")
            history = _history(costs["training"].path, self.task)
        return Outcome(arm, seed, replace(system, measures=measures), history, costs)


# --- files ------------------------------------------------------------------------------------------------------------


def _without(settings: Any, *names: str) -> dict[str, Any]:
    """A data class as what JSON can hold, without some fields."""
    return {k: v for k, v in json.loads(json.dumps(asdict(settings), default=str)).items() if k not in names}


def _write_system(file: Path, system: System) -> None:
    rows = (
        {
            "prompt": prompt,
            "response": response,
            "measures": {name: _number(values[i]) for name, values in system.measures.items()},
        }
        for i, (prompt, response) in enumerate(zip(system.prompts, system.responses, strict=True))
    )
    write_jsonl(file, rows)


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _read_system(file: Path, name: str) -> System:
    rows = list(read_jsonl(file, lambda row: row))
    measures = {key: np.array([row["measures"][key] for row in rows], np.float64) for key in rows[0]["measures"]}
    return System(name, str(file), [row["prompt"] for row in rows], [row["response"] for row in rows], measures)


def _history(folder: Path, task: Task) -> History:
    """A training's curves; the gold measure of each update is taken from its samples."""
    metrics = read_metrics(folder / "metrics.jsonl")
    steps = [int(row["step"]) for row in metrics]
    names = ("reward", "kl", "length", "entropy")
    curves = {name: np.array([row[name] for row in metrics], np.float64) for name in names if name in metrics[0]}
    rows = list(read_jsonl(folder / "samples.jsonl", lambda row: row))
    samples = {
        "step": np.array([row["step"] for row in rows]),
        "reward": np.array([row["reward"] for row in rows], np.float64),
    }
    texts = [task.judged(row["prompt"], row["response"]) for row in rows]
    if task.gold is not None:
        samples["gold"] = gold_scores(task, texts)
        curves["gold"] = np.array([samples["gold"][samples["step"] == step].mean() for step in steps])
    return History(steps, curves, samples, [row["prompt"] for row in rows], [row["response"] for row in rows])
