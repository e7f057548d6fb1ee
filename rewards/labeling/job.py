"""One labelling job: its options, what it asks, what it has cost. `rewards.labeling.command` runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from rewards.api import LanguageModel
from rewards.endpoint.model import EndpointLM
from rewards.labeling.answers import Answer, Label
from rewards.labeling.config import LabelConfig
from rewards.labeling.labeler import LabelingConfig, PreferenceLabeler
from rewards.labeling.pair_source import (
    Pair,
    builtin_pairs,
    calibration_pairs,
    holds_prompts,
    prompts_of_file,
    read_pairs,
)
from rewards.labeling.served import ServedPolicy
from rewards.language_model.choice import language_model_from
from rewards.language_model.local import LocalLM
from rlaif_env.api import BackendError, DataError, RLAIFError
from rlaif_env.data.journal import Journal
from rlaif_env.data.tasks import load_task
from rlaif_env.files import content_of
from rlaif_env.models import encode, load_tokenizer
from rlaif_env.servers.limits import Usage


class LabelJob:
    """One labelling job: what is to be asked, the journal of what was answered, and what it cost.

    Args:
        config: The options.
        model: A live labeler to use instead of the one that ``config`` names.

    Attributes:
        used: What the labeler's server has been asked over all runs of the job.
    """

    def __init__(self, config: LabelConfig, model: LanguageModel | None = None) -> None:
        if config.dry_run and config.labeler.url is not None:  # its few answers are no part of the job
            server = replace(config.labeler.server, cache=False)
            config = replace(config, labeler=replace(config.labeler, server=server))
        self.task = load_task(config.task)
        if config.template_file is not None:
            config = replace(config, template=_text_of(config.template_file), template_file=None)
        if model is None:
            config = config.with_shots(config.labeler, self.task)
        elif config.shots == -1:  # what is live is shown as many as are asked for
            config = replace(config, shots=0)
        self.config = config
        self._served: EndpointLM | None = None
        self.used, self._settled = Usage(), Usage()
        settings = {entry.name: getattr(config, entry.name) for entry in fields(LabelingConfig)}
        opened = model
        if model is None and config.labeler.url is not None and config.mode == "score":
            with suppress(BackendError):  # said when something is to be asked: what was answered can be written without
                opened = self._loaded()  # now, as it may need another scale than the one asked for
        self.labeler = PreferenceLabeler(opened or _NotLoaded(config.labeler.name), self.task, **settings)
        self.exact = model is None and config.labeler.url is None
        self._tokenizer = load_tokenizer(config.labeler.model) if self.exact else None
        self._tokens = [0, 0]  # read, written, over all runs of the job, of a labeler that is not behind a server
        self.last_failure = ""
        self._failures: dict[str, Answer] = {}

    def prompts(self) -> list[str] | None:
        """The distinct prompts to sample responses to; None if the pairs are there already."""
        config = self.config
        if config.input is not None and holds_prompts(config.input) != (config.policy is not None):
            here, there = ("prompts alone", "no policy") if config.policy is None else ("pairs", "a policy")
            raise RLAIFError(
                f"expected pairs of responses in {config.input}, or prompts and a policy (--policy) to sample two "
                f"responses to each; found {here} and {there}"
            )
        if config.policy is None:
            return None
        prompts = self.task.prompts(config.split) if config.input is None else prompts_of_file(config.input)
        return list(dict.fromkeys(prompts))[: config.pairs]

    def stored_pairs(self) -> Iterator[Pair]:
        """The pairs of the input file or of the task."""
        config = self.config
        if config.input is None:
            yield from builtin_pairs(self.task, config.split, n=config.pairs, seed=config.seed, min_gap=config.min_gap)
            return
        for i, pair in enumerate(read_pairs(config.input)):  # read to its end: what is wrong there is said now
            if config.pairs is None or i < config.pairs:
                yield pair

    def calibration(self, labelled: Iterable[Pair]) -> list[Pair]:
        """The pairs to calibrate on, none that are labelled; empty without calibration."""
        c = self.config
        limits: dict[str, Any] = {"file": c.calibration, "seed": c.seed, "min_gap": c.min_gap}
        return calibration_pairs(self.task, c.calibrate, labelled, **limits) if c.calibrate else []

    def policy(self, tell: Callable[[str], object]) -> LocalLM | ServedPolicy:
        """The policy, on the labeler's device or servers; it reads prompts as the task's template has them."""
        here, servers = self.config.labeler, self.config.sampler
        if servers.url:
            return ServedPolicy(str(self.config.policy), servers, self.task, tell)
        return LocalLM(str(self.config.policy), device=here.device, dtype=here.dtype, task=self.task)

    def content(self) -> dict[str, str]:
        """What changes when the weights of a model do."""
        policy = self.config.policy
        return {"labeler": self.config.labeler.content} | ({"policy": content_of(policy)} if policy else {})

    def questions(self, pair: Pair) -> dict[str, str]:
        """The two questions of a pair by key; one if they are the same."""
        both = self.labeler.questions(pair.prompt, pair.response_1, pair.response_2)
        return {self.labeler.key(question): question for question in both}

    def load(self) -> None:
        """Put the labeler in place of its name."""
        if isinstance(self.labeler.language_model, _NotLoaded):
            self.labeler.language_model = self._loaded()

    def _loaded(self) -> LanguageModel:
        loaded = language_model_from(self.config.labeler)
        loaded.name = self.config.labeler.name  # what the journal's keys are made with
        self._served = loaded if isinstance(loaded, EndpointLM) else None
        return loaded

    def server(self) -> dict[str, Any]:
        """What the labeler's server can do, where it was needed now, and what it has been asked; empty without one."""
        facts = {"server": self._served.facts} if self._served else {}
        return facts if self.config.labeler.url is None else {**facts, "server_usage": asdict(self.used)}

    @property
    def tokens(self) -> dict[str, Any]:
        """Tokens read and written over all runs of the job, and whether that was counted, not guessed."""
        if self.config.labeler.url is not None:
            used = self.used
            return {"input": used.tokens_in, "output": used.tokens_out, "exact": not used.estimated}
        return {"input": self._tokens[0], "output": self._tokens[1], "exact": self.exact}

    def close(self) -> None:
        """Close what this job opened."""
        if self._served:
            self._served.close()

    def settle(self, usage: Journal) -> None:
        """Put what the server was asked since the last time in the journal of that."""
        if self._served and (now := replace(self._served.usage)) != self._settled:
            usage.append({str(len(usage)): asdict(now - self._settled)})
            self.used, self._settled = self.used + now - self._settled, now

    def ask(self, pairs: Sequence[Pair], journal: Journal, usage: Journal) -> bool:
        """Ask what is open of some pairs and put the answers in the journal; False if all that was asked failed."""
        asked = {k: q for pair in pairs for k, q in self.questions(pair).items() if k not in journal}
        order = sorted(asked, key=lambda key: asked[key])
        try:
            answers = dict(zip(order, self.labeler.ask([asked[key] for key in order]), strict=True))
        finally:
            self.settle(usage)
        rows = {}
        for key, answer in answers.items():
            if answer.status != "ok":
                self._failures[key] = answer
                self.last_failure = answer.reason
                continue
            rows[key] = answer.to_json()
            if self.config.labeler.url is None:
                rows[key]["tokens"] = self.spent(asked[key], self.count(answer.rationales))
            self.note(rows[key])
        journal.append(rows)
        return not answers or any(answer.status != "failed" for answer in answers.values())

    def label(self, pair: Pair, journal: Journal) -> Label:
        """The label of a pair all of whose questions were asked."""
        if pair.problem:
            return Label(float("nan"), float("nan"), "failed", pair.problem, {})
        both = self.labeler.questions(pair.prompt, pair.response_1, pair.response_2)
        keys = map(self.labeler.key, both)
        one, two = (Answer.from_json(journal[key]) if key in journal else self._failures[key] for key in keys)
        return self.labeler.combine(both, (one, two))

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text; of a model that is not here a guess from the characters (``exact`` is false then)."""
        if self._tokenizer is None:
            return [max(1, round(len(text) / 4)) for text in texts]
        return [len(row) for row in encode(self._tokenizer, texts)]

    def spent(self, question: str, rationales: Sequence[int] | None = None) -> list[int]:
        """Tokens read and written for a question with rationales of so many tokens (None: each at its limit)."""
        size = self.count([question])[0]
        if not self.config.cot:
            return [size, 1]
        written = [self.config.rationale_tokens] * self.config.samples if rationales is None else rationales
        return [sum(2 * size + n for n in written), sum(n + 1 for n in written)]

    def note(self, row: Mapping[str, Any]) -> None:
        """Check an answer of the journal and count its tokens; raises `DataError` where it is none."""
        Answer.from_json(row)
        tokens = row.get("tokens", (0, 0))
        if not isinstance(tokens, list | tuple) or [type(count) for count in tokens] != [int, int]:
            raise DataError(f"expected two numbers of tokens, found {tokens!r:.60}")
        self._tokens = [a + b for a, b in zip(self._tokens, tokens, strict=True)]

    def note_usage(self, row: Mapping[str, Any]) -> None:
        """Count what an earlier batch asked of the server; raises `DataError` where the row does not say."""
        try:
            self.used += Usage(**{name: value for name, value in row.items() if name != "key"})
        except TypeError as error:
            raise DataError(f"expected what a server was asked, found {row!r:.60} ({error})") from error

    def cost(self, read: int, written: int) -> float | None:
        """What tokens read and written cost, None without prices."""
        limits = self.config.labeler.server.limits
        return limits.cost(read, written) if limits.price_in or limits.price_out else None

    def measured(self, questions: Sequence[str], count: int, size: int) -> tuple[int, int, int]:
        """Ask the server some questions, for how many requests, tokens read and tokens written all of them take.

        Args:
            questions: Those that are asked.
            count: How many there are.
            size: The tokens that `spent` says are read for all of them.

        Raises:
            BackendError: If none could be answered.
        """
        self.load()
        assert self._served is not None
        before = replace(self._served.usage)
        answers = self.labeler.ask(questions)
        if all(answer.status != "ok" for answer in answers):
            raise BackendError(
                f"expected {self.labeler.language_model.name} to answer some of {len(answers)} questions, found that "
                f"all failed ({answers[0].reason})"
            )
        used, share = self._served.usage - before, count / len(questions)
        read = used.tokens_in * size / sum(self.spent(question)[0] for question in questions)
        return round(used.requests * share), round(read), round(used.tokens_out * share)


class _NotLoaded:
    """Stands for a model whose weights are not needed yet."""

    def __init__(self, name: str) -> None:
        self.name = name

    def label_logprobs(self, *asked: Any, **settings: Any) -> Any:
        raise BackendError(f"expected {self.name} to be loaded before it is asked")

    generate = label_logprobs


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RLAIFError(f"expected a template in UTF-8 at {path}, found: {error}") from error
