"""How long a comparison will take: the work of each stage that is to be made, times what such work takes here.

Work is counted in what the time of a stage grows with: pairs to label, texts that a reward model learns from or is
tested on, responses to sample, learn from or judge. Its rate is that of this folder's finished stages of the same kind;
without one it is timed on this machine, on a few of the task's own texts, with the models that are asked. Neither is
known of a server before it is asked, nor of a fine-tuning: these are left out, and said.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from itertools import cycle, islice
from typing import Any

import gymnasium as gym
import torch

from agents.reinforce import ReinforceAgent
from benchmarks.comparison.pipeline import Pipeline
from benchmarks.comparison.stages import RECORD, Job
from rewards.api import LanguageModel
from rewards.direct_score import DirectLLMScore, ScoreConfig
from rewards.labeling.labeler import LabelingConfig, PreferenceLabeler
from rewards.language_model.choice import language_model_from
from rewards.language_model.config import LanguageModelConfig
from rewards.language_model.local import LocalLM
from rlaif_env.data.tasks import held_out_prompts
from rlaif_env.tables import Cell, Table, count_of

_NO_MASS = 1e-12  # the answer itself does not matter
_RATIONALE = 32  # tokens that a rationale is timed on; a labeler may end it before the longest
_ROWS = 9  # that are scored, the first not timed
_LONG = 15.0  # seconds after which one update is enough


@dataclass(frozen=True)
class Estimate:
    """What a comparison has to do and how long that takes."""

    seconds: Mapping[str, float | None]  # by key of each stage that is to be made; None is not known
    wall: float  # of all that are known, shared among the workers
    measured: int  # kinds of work whose rate comes from finished stages
    timed: int  # and from timing
    timing: float  # which took so many seconds

    @property
    def line(self) -> str:
        """In one line."""
        if not self.seconds:
            return "all stages are there already"
        unknown = sum(value is None for value in self.seconds.values())
        left = f", without {count_of(unknown, 'stage')} that it is not known of" if unknown else ""
        by = [f"{count_of(self.measured, 'kind')} of work by finished stages"] * (self.measured > 0)
        by += [f"{count_of(self.timed, 'kind')} of work by {self.timing:.0f} s of timing"] * (self.timed > 0)
        took = f"about {_time(self.wall)}{left} ({', '.join(by)})" if by else "no telling how long"
        return f"{count_of(len(self.seconds), 'stage')} to make: {took}"

    def table(self, jobs: Sequence[Job]) -> Table:
        """Which stages are there, which are to be made, and how long each kind takes."""
        kinds: dict[str, list[Job]] = {}
        for job in jobs:
            judge, of, source = job.name.partition("-of-")
            whose = " of samples" if source.startswith("train-") else " of answers"
            kinds.setdefault(judge + whose if of else re.sub("-seed.*", "", judge), []).append(job)
        rows: list[list[Cell]] = []
        for kind, group in kinds.items():
            made = [self.seconds[job.key] for job in group if not job.done]
            known = [seconds for seconds in made if seconds is not None]
            minutes = f"{sum(known) / 60:.1f}" if known or not made else "?"
            rows.append([kind, len(group) - len(made), len(made), minutes])
        return Table("Stages", ["stage", "there", "to make", "minutes of one worker"], rows, self.line)


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


@dataclass(frozen=True)
class _Work:
    """What a stage has to do."""

    kind: str  # all that its rate depends on
    units: float
    what: Mapping[str, Any]  # the kind's parts


def estimate(pipeline: Pipeline, jobs: Sequence[Job]) -> Estimate:
    """How long the stages will take that are not there yet; takes up to a minute where it has to time."""
    finished: dict[str, dict[str, Any]] = {}
    for file in pipeline.stages.folder.glob(f"*/{RECORD}"):
        with suppress(ValueError, KeyError, TypeError):
            record = json.loads(file.read_text(encoding="utf-8"))
            finished[record["key"]] = record
    asked = {job.key: {"name": job.name, "settings": job.settings, "needs": _keys(job)} for job in jobs}
    spent: dict[str, list[float]] = {}
    for record in finished.values():
        with suppress(KeyError):  # of a stage whose needs were removed
            work = _work(record, {**asked, **finished})
            units, seconds = spent.setdefault(work.kind, [0.0, 0.0])
            spent[work.kind] = [units + work.units, seconds + record["seconds"]]
    rates: dict[str, float | None] = {kind: seconds / units for kind, (units, seconds) in spent.items() if units}
    works = {job.key: _work(asked[job.key], {**finished, **asked}) for job in jobs if not job.done}
    kinds, began = {work.kind: work for work in works.values()}, time.monotonic()
    if unknown := [kind for kind in kinds if kind not in rates]:
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, threads // pipeline.config.workers))  # as the workers will have
        timer = _Timer(pipeline)
        with torch.random.fork_rng():
            rates |= {kind: timer.rate(kinds[kind].what) for kind in unknown}
        torch.set_num_threads(threads)
    timed = [kind for kind in kinds if kind not in spent and rates[kind] is not None]
    seconds_of = {key: None if (rate := rates[work.kind]) is None else rate * work.units for key, work in works.items()}
    known = {key: seconds or 0.0 for key, seconds in seconds_of.items()}
    ends: dict[str, float] = {}
    for job in jobs:
        ends[job.key] = known.get(job.key, 0.0) + max((ends[need.key] for need in job.needs), default=0.0)
    wall = max([sum(known.values()) / pipeline.config.workers, *ends.values()])
    return Estimate(seconds_of, wall, len(kinds.keys() & spent.keys()), len(timed), time.monotonic() - began)


def _keys(job: Job) -> list[dict[str, str]]:
    return [{"key": need.key} for need in job.needs]


def _work(stage: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]]) -> _Work:
    """The work of a stage, as its record has it, of those that are known by key."""
    settings, needs = stage["settings"], [known[need["key"]] for need in stage["needs"]]
    word = stage["name"].partition("-")[0]
    what: dict[str, Any] = {"stage": word}
    units = 1.0
    if word == "labels":
        how = (entry.name for entry in fields(LabelingConfig) if entry.name != "minimum_mass")
        what |= {"labeler": settings["labeler"], **{name: settings[name] for name in how}}
        units = settings["calibrate"] or settings["pairs"]  # a calibrated labelling asks for the pairs of people only
    elif word == "rm":
        what |= {name: settings[name] for name in ("model", "trainable", "epochs")}
        pairs = min([settings["pairs"], *(need["settings"].get("pairs", settings["pairs"]) for need in needs)])
        units = min(settings["texts"], 2 * pairs) + settings["test_pairs"]
    elif word in ("train", "answers"):
        what |= {"model": settings["model"]}
        units = _responses(stage)
        if word == "train":
            what |= {"reward": _judge(settings["reward"]), "agent": settings["agent"]}
            what |= {name: settings[name] for name in ("group_size", "prompts_per_update")}
    elif word == "judge":
        what |= {"reward": _judge(settings["judge"])}
        units = _responses(needs[-1])
    return _Work(json.dumps(what, sort_keys=True), units, what)


def _judge(key: Mapping[str, Any]) -> Mapping[str, Any] | str:
    """A reward as far as its time goes: all reward models take the same."""
    return key if "scorer" in key else "a reward model"


def _responses(stage: Mapping[str, Any]) -> int:
    """How many responses a training samples, or how many prompts are answered."""
    settings = stage["settings"]
    if "updates" in settings:
        return int(settings["updates"] * settings["prompts_per_update"] * settings["group_size"])
    return int(settings["prompts"])


class _Timer:
    """Times each kind of work on this machine, in seconds for one unit."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._policy: float | None = None
        config, task = pipeline.config, pipeline.task
        prompts = held_out_prompts(task, config.train.eval_split, None, most=_ROWS)
        rows = zip(prompts, [f" {prompt}" for prompt in prompts[1:] + prompts[:1]], strict=True)
        self._rows = list(islice(cycle(rows), _ROWS))  # prompts with responses
        here = (config.model, pipeline.initial, *config.ablation.labelers)
        self._models = [config.labeler, *map(LanguageModelConfig, here)]
        self._loaded: dict[str, LanguageModel] = {}

    def rate(self, what: Mapping[str, Any]) -> float | None:
        """Seconds for one unit of a kind of work; None where that cannot be timed."""
        stage = what["stage"]
        if stage == "gold":
            return 0.0
        if stage == "labels":
            return self._labels(what)
        if stage == "rm":
            passes = 1 if what["trainable"] == "head" else 1 + 3 * what["epochs"]  # backward costs twice forward
            return passes * self._read()
        if stage == "judge":
            return self._reward(what["reward"], 1)
        if stage in ("train", "answers"):
            scoring = 0.0 if stage == "answers" else self._reward(what["reward"], what["group_size"])
            return None if scoring is None else self._sampled() + scoring
        return None

    def _model(self, key: Mapping[str, Any]) -> LanguageModel | None:
        """The language model that a key stands for; None for one behind a server, which is not asked for this."""
        for config in self._models:
            if config.url is None and self._pipeline.model_key(config) == key:
                if (name := json.dumps(key)) not in self._loaded:
                    self._loaded[name] = language_model_from(config)
                return self._loaded[name]
        return None

    def _labels(self, what: Mapping[str, Any]) -> float | None:
        """One pair."""
        if (model := self._model(what["labeler"])) is None:
            return None
        values = {entry.name: what[entry.name] for entry in fields(LabelingConfig) if entry.name in what}
        longest = values["rationale_tokens"]
        short = min(longest, _RATIONALE)
        asked = LabelingConfig(**values | {"minimum_mass": _NO_MASS, "rationale_tokens": short})
        labeler = PreferenceLabeler(model, self._pipeline.task, **vars(asked))
        task = self._pipeline.task
        people = islice(task.preferences("train"), 5) if self._pipeline.has_preferences("train") else ()
        rows = [(p.prompt, p.response_1, p.response_2) for p in people]
        rows = rows or [(prompt, response, prompt) for prompt, response in self._rows[:5]]
        seconds = _timed(lambda some: labeler.label(*map(list, zip(*some, strict=True))), rows)
        return seconds * (longest / short if asked.cot else 1)

    def _reward(self, key: Mapping[str, Any] | str, group: int) -> float | None:
        """The reward of one response, of a group of so many."""
        if isinstance(key, str):
            return self._read()
        if key.get("mode") == "pairwise":
            pair = self._labels({**vars(LabelingConfig()), **key, "labeler": key["scorer"]})
            return None if pair is None else pair * (group - 1) / 2
        if (scorer := self._model(key["scorer"])) is None:
            return None
        asked = {entry.name: key[entry.name] for entry in fields(ScoreConfig)} | {"minimum_mass": _NO_MASS}
        backend = DirectLLMScore(scorer, self._pipeline.task, **asked)
        return _timed(lambda some: backend.score(*map(list, zip(*some, strict=True))), self._rows)

    def _read(self) -> float:
        """A reward model's reading of one text: a pass of its base, which is the initial policy's."""
        model = LocalLM(self._pipeline.initial)
        return _timed(lambda some: model.label_logprobs(some, ["1", "2"]), ["".join(row) for row in self._rows])

    def _sampled(self) -> float:
        """One response that is sampled and learned from, without its reward; answering a prompt takes less."""
        if self._policy is None:
            self._policy = self._update()
        return self._policy

    def _update(self) -> float:
        config, model = self._pipeline.config.train, self._pipeline.initial
        count = config.prompts_per_update * config.group_size
        envs = gym.make_vec(
            "RLAIF/TextGeneration-v0",
            num_envs=count,
            group_size=config.group_size,
            task=self._pipeline.task,
            reward=lambda prompts, responses: [float(len(response)) for response in responses],
            tokenizer=model,
        )
        agent = ReinforceAgent(model, config.agent, envs=envs)
        prompts, _ = envs.reset(seed=0)
        seconds = 0.0
        for _ in range(2):  # the first one takes longer
            began = time.monotonic()
            prompts, rewards, *_ = envs.step(agent.act(prompts))
            agent.update(rewards)
            seconds = time.monotonic() - began
            if seconds > _LONG:
                break
        envs.close()
        return seconds / count


def _timed(call: Callable[[Sequence[Any]], object], rows: Sequence[Any]) -> float:
    """Seconds for one row, by all but the first, which the call is warmed up with."""
    call(rows[:1])
    began = time.monotonic()
    call(rows[1:])
    return (time.monotonic() - began) / (len(rows) - 1)
