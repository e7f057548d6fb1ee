"""The stages of a comparison of reward backends: labels, reward models, trainings, answers, judgements.

What each stage is made from is in its key (`benchmarks.comparison.stages`): contents of files and models, never their
paths, so that arms which need the same thing share it, and a folder that was moved is still known. A server's model
is known by its name and the server's URL.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from agents.sft import SFTConfig
from agents.sft import train_and_save as fine_tune
from agents.training.command import train
from agents.training.config import TrainConfig
from benchmarks.comparison.config import ARMS, CompareConfig
from benchmarks.comparison.outcomes import History, Outcome
from benchmarks.comparison.stages import Stage, Stages, settings_of
from benchmarks.evaluation.asked import asked_in_training, priced
from benchmarks.evaluation.judges import judged, with_gold
from benchmarks.evaluation.qualitative import with_unsupported
from benchmarks.evaluation.systems import answer, read_system, write_system
from rewards import make_reward
from rewards.labeling.command import label
from rewards.labeling.config import LabelConfig
from rewards.language_model.config import LanguageModelConfig
from rewards.prompts import score_wording
from rewards.reward_model.command import TrainRMConfig, train_and_save
from rlaif_env.api import DataError, Preference, RLAIFError
from rlaif_env.data.preferences import read_preferences, write_preferences
from rlaif_env.data.tasks import load_task
from rlaif_env.files import content_of
from rlaif_env.options import OPERATIONAL
from rlaif_env.records import write_json
from rlaif_env.statistics import Floats

_OPERATIONAL_TRAINING = (
    "agent.micro_batch",
    "agent.pass_tokens",
    "eval_prompts",
    "eval_split",
    "sampler",
)  # the answers are a stage of their own; of the sampler its precision counts


GOLD_RM = "gold-rm"
"""The gold reward model as a judge; "gold-rm:NAME" is the one on the language model of that name."""


@dataclass(frozen=True)
class Reward:
    """A reward backend that a policy is trained with, or that judges answers."""

    name: str  # the backend's name
    options: dict[str, Any]  # its settings
    key: dict[str, Any]  # what stands for it in a stage's key
    needs: tuple[Stage, ...]  # the stages behind it


class Pipeline:
    """The stages of one comparison. A method gives what its finished stage holds, made where it is not there."""

    def __init__(self, config: CompareConfig, console: Console) -> None:
        self.config, self.console = config, console
        self.task = load_task(config.task)
        self.stages = Stages(config.out / "stages", console)
        self.content = cache(content_of)
        self.has_preferences = cache(self._look_for_preferences)
        self.shared = {"task": self.task.to_json(), "version": version("rlaif-env")}
        source = self.task.source
        for name, files in (("jsonl", source.jsonl), ("preferences", source.preferences)):
            for split, file in {"": files}.items() if not isinstance(files, Mapping) else files.items():
                if file is not None:
                    self.shared[f"{name} {split}"] = self.content(file)

    @property
    def initial(self) -> str:
        """The initial policy, fine-tuned where it is to be; the model itself as long as that is only planned."""
        stage = self._fine_tuned()
        return self.config.model if stage is None or not stage.done else str(stage.path / "run" / "model")

    @property
    def initial_key(self) -> str:
        """What stands for the initial policy in a stage's key."""
        stage = self._fine_tuned()
        return self.content(self.initial) if stage is None or stage.done else stage.key

    def _fine_tuned(self) -> Stage | None:
        if (data := self.config.sft_data) is None:
            return None
        settings = SFTConfig(data=None if data == "builtin" else data, model=self.config.model)

        def make(folder: Path) -> None:
            fine_tune(replace(settings, out=str(folder / "run")), quiet=not self.console.is_terminal)

        key = {**settings_of(settings, "out"), "data": data if data == "builtin" else self.content(data)}
        return self.stages.run("sft", key | {"model": self.content(self.config.model)}, make)

    def _look_for_preferences(self, split: str) -> bool:
        try:
            return next(iter(self.task.preferences(split)), None) is not None
        except DataError:
            raise
        except RLAIFError:
            return False

    def model_key(self, model: LanguageModelConfig) -> dict[str, Any]:
        """What stands for a language model in a stage's key."""
        key = settings_of(model, *OPERATIONAL)
        return key if model.url is not None else {**key, "model": self.content(model.model), "server": None}

    def labeler(self, who: str) -> LanguageModelConfig:
        """The labeler, or ("same-size") the policy's own base in its place."""
        return LanguageModelConfig(self.config.model) if who == "same-size" else self.config.labeler

    def labels(self, who: str) -> Stage:
        """The preferences of the labeler ("pairwise": in that mode), or ("same-size") of the policy's own base."""
        c, labeler = self.config, self.labeler(who)
        policy = None if self.has_preferences("train") else self.initial
        asked = vars((c.label.pairwise if who == "pairwise" else c.label).preference)
        settings = LabelConfig(**asked, task=c.task, pairs=c.label_pairs, labeler=labeler, policy=policy)
        return self.labelled("labels", settings)

    def labelled(self, name: str, settings: LabelConfig) -> Stage:
        """What ``rlaif label`` leaves of the task's own pairs or prompts; calibrated ones are of the same answers."""
        settings = settings.with_shots(settings.labeler, self.task)
        answered: tuple[Stage, ...] = ()
        if settings.calibrate:
            answered = (self.labelled(name, replace(settings, calibrate=0, calibration=None)),)
            settings = replace(settings, calibration=settings.calibration or self.config.human_labels)
            name += "-calibrated"
        key = settings_of(settings, "task", "out", "batch", "dry_run") | {"labeler": self.model_key(settings.labeler)}
        if settings.calibration is not None:
            key["calibration"] = self.content(settings.calibration)
        if settings.policy is not None:
            key["policy"] = self.content(settings.policy)

        def make(folder: Path) -> None:
            for stage in answered if not (folder / "config.json").exists() else ():
                for file in ("responses.jsonl", "usage.jsonl", "journal.jsonl", "config.json"):
                    if (stage.path / file).exists():
                        shutil.copyfile(stage.path / file, folder / file)
            with self.console.status(f"{settings.labeler.model} labels {settings.pairs} pairs"):
                report = label(replace(settings, out=folder), Console(quiet=True))
            if not report["labelled"]:
                raise RLAIFError(f"expected the labeler to label some of {report['pairs']} pairs, see {folder}")

        made = self.stages.run(name, key | self.shared, make, needs=answered, goes_on=True)
        return replace(made, seconds=made.seconds + sum(stage.seconds for stage in answered))

    def reward_model(self, who: str, pairs: int | None = None, base: str | None = None) -> Stage:
        """A reward model on an `Arm`'s labels, or on "gold" ones; its folder is "run/model".

        Args:
            who: Whose labels.
            pairs: So many of them instead of the configured number.
            base: Another language model than the initial policy to make it from.
        """
        c = self.config
        settings = c.reward_model if pairs is None else replace(c.reward_model, pairs=pairs)
        model = self.initial_key if base is None else self.content(base)
        key = {**settings_of(settings, "micro_pairs"), "model": model, **self.shared}
        sources: list[str] = []  # "human" or a file
        if who in ("human", "both"):
            sources.append("human" if c.human_labels is None else str(c.human_labels))
            key["labels"] = None if c.human_labels is None else self.content(c.human_labels)
        needs = []
        if who == "gold":
            needs.append(self._gold_preferences())
        elif who != "human":
            needs.append(self.labels(who))
        sources += [str(stage.path / "preferences.jsonl") for stage in needs]

        def make(folder: Path) -> None:
            labels = sources[0]
            if len(sources) > 1:
                labels = str(folder / "preferences.jsonl")
                write_preferences(labels, self._both(*sources))
            config = TrainRMConfig(
                **vars(settings),
                task=c.task,
                labels=labels,
                model=base or self.initial,
                out=str(folder / "run"),
                merged=False,
            )
            train_and_save(config, quiet=not self.console.is_terminal)

        name = who if who in ("human", "both", "gold") else "ai"  # the labels themselves tell these apart
        return self.stages.run(f"rm-{name}" + (f"-{pairs}" if pairs else ""), key, make, needs=needs)

    def _both(self, human: str, ai: str) -> Iterator[Preference]:
        people = self.task.preferences("train") if human == "human" else read_preferences(human)
        yield from islice(people, self.config.label_pairs)
        yield from read_preferences(ai)

    def _gold_preferences(self) -> Stage:
        def make(folder: Path) -> None:
            write_preferences(folder / "preferences.jsonl", self.task.preferences("gold"))

        return self.stages.run("gold-preferences", self.shared, make)

    def reward(self, arm: str) -> Reward:
        """An arm's reward, or that of the judge `GOLD_RM`."""
        gold, _, base = arm.partition(":")
        if gold == GOLD_RM or ARMS[arm].labels is not None:
            name, who = ("reward-model", "gold") if gold == GOLD_RM else (ARMS[arm].reward, str(ARMS[arm].labels))
            stage = self.reward_model(who, base=base or None)
            return Reward(name, {"model": str(stage.path / "run" / "model")}, {"reward": name}, (stage,))
        scorer = self.scorer(arm)
        asked = settings_of(self.config.label.direct_score(scorer, self.task))
        if ARMS[arm].reward == "group-preference":
            how = settings_of(self.config.label.with_shots(scorer, self.task).preference)
            asked = {name: how[name] for name in (*asked, "mode", "prompt")}
        options = {**settings_of(scorer, *(() if scorer.url is not None else ("server",))), **asked}
        return Reward(ARMS[arm].reward, options, {"scorer": self.model_key(scorer), **asked}, ())

    def scorer(self, arm: str) -> LanguageModelConfig:
        """The language model that scores in the training of an arm without a reward model."""
        return self.config.labeler if ARMS[arm].scorer == "labeler" else LanguageModelConfig(self.initial)

    def training(self, arm: str, seed: int) -> Stage:
        """A policy trained with an arm's reward."""
        c, reward = self.config, self.reward(arm)
        named = {"reward": reward.key, "seed": seed, "model": self.initial_key}
        named |= {"sampler": c.train.sampler.dtype} if c.train.sampler.dtype else {}
        key = {**settings_of(c.train, *_OPERATIONAL_TRAINING), **named, **self.shared}

        def make(folder: Path) -> None:
            settings = TrainConfig(
                **vars(replace(c.train, eval_prompts=0, eval_split=TrainConfig.eval_split)),
                task=c.task,
                reward=reward.name,
                reward_options=reward.options,
                model=self.initial,
                seed=seed,
                out=folder,
            )
            if train(settings, self.console).interrupted:
                raise KeyboardInterrupt

        return self.stages.run(f"train-{reward.name}-seed{seed}", key, make, needs=reward.needs, goes_on=True)

    def answers(self, arm: str, seed: int) -> Stage:
        """A policy's answers to the held-out prompts; "sft" is the initial policy."""
        train = self.config.train
        asked: dict[str, Any] = {"prompts": train.eval_prompts, "split": train.eval_split, "seed": seed}
        trained = [] if arm == "sft" else [self.training(arm, seed)]
        policy = str(trained[0].path) if trained else self.initial

        def make(folder: Path) -> None:
            system = answer(f"{arm}/{seed}", policy, self.task, reference=self.initial, **asked)
            write_system(folder / "answers.json", system)

        name = arm if arm == "sft" else ARMS[arm].reward
        key = {**asked, "model": self.initial_key, **self.shared}
        return self.stages.run(f"answers-{name}-seed{seed}", key, make, needs=trained)

    def judges(self) -> list[str]:
        """Who judges the answers: the arms' rewards of single responses, the labeler's score, the gold reward model."""
        gold = (GOLD_RM,) if self.config.gold_rm and self.has_preferences("gold") else ()
        arms = [arm for arm in self.config.arms if ARMS[arm].reward != "group-preference"]
        return list(dict.fromkeys((*arms, "direct-llm", *gold)))

    def judgement(self, name: str, source: Stage, *, otherwise: bool = False) -> Stage:
        """What a judge says of the responses that a stage made: answers, or the samples of a training.

        Args:
            name: An arm, `GOLD_RM`, or that on another base.
            source: The stage.
            otherwise: Ask a language model for its score with an exemplar less, or with one where it had none.
        """
        judge = self.reward(name)
        if otherwise:
            shots = {"shots": self.other_shots(name)}
            judge = replace(judge, options=judge.options | shots, key=judge.key | shots)

        def make(folder: Path) -> None:
            answers = source.path / "answers.json"
            system = read_system(answers) if answers.exists() else History.read(source.path, self.task).samples
            backend = make_reward(judge.name, task=self.task, **judge.options)
            values = judged(system, name, backend, self.task).measures[f"judge:{name}"].tolist()
            write_json(folder / "scores.json", [score if np.isfinite(score) else None for score in values])

        label, whose = GOLD_RM if name.startswith(GOLD_RM) else judge.name, source.name.removeprefix("answers-")
        key, needs = {"judge": judge.key, **self.shared}, (*judge.needs, source)
        return self.stages.run(f"judge-{label}-of-{whose}", key, make, needs=needs)

    def other_shots(self, name: str) -> int | None:
        """Another number of exemplars to ask an arm's language model for a score with; None where there is none."""
        options = self.reward(name).options
        if ARMS[name].scorer is None or options["template"] is not None:
            return None
        if options["shots"]:
            return int(options["shots"]) - 1
        return 1 if score_wording(self.task).exemplars else None

    def scores(self, name: str, source: Stage, *, otherwise: bool = False) -> Floats:
        """What a judge says of the n responses that a stage made, (n,), NaN where it failed."""
        return np.array(self.judgement(name, source, otherwise=otherwise).read_json("scores.json"), np.float64)

    def outcome(self, arm: str, seed: int) -> Outcome:
        """All that is known of one policy."""
        answers = self.answers(arm, seed)
        system = replace(read_system(answers.path / "answers.json"), name=f"{arm}/{seed}")
        scores = {f"judge:{name}": self.scores(name, answers) for name in self.judges()}
        system = with_unsupported(with_gold(replace(system, measures={**system.measures, **scores}), self.task))
        if arm == "sft":
            return Outcome(arm, seed, system, None, {"answers": answers})
        costs = {"answers": answers, "training": self.training(arm, seed)}
        if (who := ARMS[arm].labels) is not None:
            costs["reward model"] = self.reward_model(who)
            if who != "human":
                costs["labels"] = self.labels(who)
        history, tokens = History.read(costs["training"].path, self.task), {}
        if "labels" in costs:
            used = costs["labels"].read_json("report.json")["tokens"]
            tokens["labels"] = priced(used["input"], used["output"], self.labeler(str(who)), exact=used["exact"])
        if ARMS[arm].scorer is not None:
            reward = self.reward(arm)
            asked = (reward.name, reward.options, self.scorer(arm), self.task, history.samples)
            tokens["training"] = asked_in_training(*asked)
        return Outcome(arm, seed, system, history, costs, tokens)
