"""One labelling job: its options, what it asks, what it has cost. `rewards.labeling.command` runs it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from rewards.api import LanguageModel, configured
from rewards.endpoint.config import ServerConfig
from rewards.endpoint.limits import checked_url
from rewards.labeling.answers import Answer, Label
from rewards.labeling.labeler import PreferenceLabeler
from rewards.labeling.pair_source import Pair, builtin_pairs, holds_prompts, prompts_of_file, read_pairs
from rewards.language_model.choice import language_model_from
from rewards.language_model.config import LanguageModelConfig
from rlaif_env.api import BackendError, DataError, RLAIFError
from rlaif_env.data.journal import Journal
from rlaif_env.data.tasks import load_task
from rlaif_env.models import BUILTIN_MODEL, encode, load_tokenizer

if TYPE_CHECKING:
    from rewards.endpoint.model import EndpointLM

__all__ = ["LabelConfig", "LabelJob"]


# a run can go on with others of these
_OPERATIONAL = ("out", "batch", "device", "price_in", "price_out", "dry_run")
_OPERATIONAL_LLM = ("api_key_env", "cache", "limits", "progress")


@dataclass(frozen=True)
class LabelConfig:
    """Options of ``rlaif label``.

    Attributes:
        task: What is judged: a built-in task or a TOML file.
        input: JSON lines with pairs to label (human labels in them are compared with), or with prompts where there is a
            policy. Without it the task's own human preferences, or prompts, are taken.
        out: Folder to write to, or to go on with; a new one under runs/ if not given.
        split: Which split of the task, without ``input``.
        pairs: At most so many pairs.
        min_gap: Least difference of the two mean ratings in the movie corpus.
        policy: A model that responds twice to each prompt: built-in name, folder or Hugging Face id.
        policy_temperature: Temperature of those responses.
        model: The labeler: built-in name, folder, Hugging Face id, or what the server calls it.
        llm_url: Base URL of an OpenAI-compatible server that has the labeler.
        llm: Settings of the server's client as JSON, such as '{"limits": {"concurrency": 64, "spend_cap": 5}}': the
            other arguments of `rewards.endpoint.model.EndpointLM`.
        chat: Put the prompts through the labeler's chat template (local models).
        device: Device of local models.
        dtype: Number format of local models.
        mode: Show both responses in both orders, or score each by itself and compare the distributions.
        prompt: Preamble of the pairwise prompt.
        shots: Exemplars before the sample.
        cot: Write a rationale first.
        samples: Rationales an order, averaged.
        temperature: Of the rationales; 0 for one and 0.3 for several if not given.
        rationale_tokens: Longest rationale.
        scale: Lowest and highest score.
        template: A text file with a whole prompt of your own.
        minimum_mass: Label mass under which a pair gets no label.
        seed: Of sampled responses, rationales, and the choice of corpus pairs.
        batch: Pairs asked at a time; so much is lost at most when the process is killed.
        price_in: Price of a million tokens read.
        price_out: Price of a million tokens written.
        dry_run: Only say how many tokens it would take and what they would cost.
    """

    task: str = "movie-review"
    input: Path | None = None
    out: Path | None = None
    split: str = "train"
    pairs: int | None = None
    min_gap: float = 0.0
    policy: str | None = None
    policy_temperature: float = 0.9
    model: str = BUILTIN_MODEL
    llm_url: str | None = None
    llm: str = "{}"
    chat: bool = False
    device: str | None = None
    dtype: str | None = None
    mode: Literal["pairwise", "score"] = "pairwise"
    prompt: Literal["base", "detailed"] = "base"
    shots: int = 0
    cot: bool = False
    samples: int = 1
    temperature: float | None = None
    rationale_tokens: int = 512
    scale: tuple[int, int] = (1, 10)
    template: Path | None = None
    minimum_mass: float = 0.01
    seed: int = 0
    batch: int = 16
    price_in: float | None = None
    price_out: float | None = None
    dry_run: bool = False


class LabelJob:
    """One labelling job: what is to be asked, the journal of what was answered, and what it cost."""

    def __init__(self, config: LabelConfig, model: LanguageModel | None) -> None:
        if config.llm_url is not None:
            checked_url(config.llm_url)  # before the address is recorded: one with a password must not be
        self.config = config
        self.task = load_task(config.task)
        if config.batch < 1 or (config.pairs is not None and config.pairs < 1):
            raise RLAIFError(f"expected batch and pairs from 1, found {config.batch} and {config.pairs}")
        self._given = model
        self._opened: EndpointLM | None = None
        template = None if config.template is None else _text_of(config.template)
        self._llm = _settings_of(config)
        self.labeler = PreferenceLabeler(
            model or self._connected() or _NotLoaded(_name_of(config)),
            self.task,
            mode=config.mode,
            prompt=config.prompt,
            shots=config.shots,
            cot=config.cot,
            samples=config.samples,
            temperature=config.temperature,
            seed=config.seed,
            rationale_tokens=config.rationale_tokens,
            scale=config.scale,
            template=template,
            minimum_mass=config.minimum_mass,
        )
        self.count, self.exact = _token_counter(config, model)
        self.tokens = [0, 0]  # read, written, over all runs of the job
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
        found = self.task.prompts(config.split) if config.input is None else prompts_of_file(config.input)
        return list(dict.fromkeys(found))[: config.pairs]

    def stored_pairs(self) -> Iterator[Pair]:
        """The pairs of the input file or of the task."""
        config = self.config
        if config.input is None:
            yield from builtin_pairs(self.task, config.split, n=config.pairs, seed=config.seed, min_gap=config.min_gap)
            return
        for i, pair in enumerate(read_pairs(config.input)):  # read to its end: what is wrong there is said now
            if config.pairs is None or i < config.pairs:
                yield pair

    def questions(self, pair: Pair) -> dict[str, str]:
        """The two questions of a pair by key; one if they are the same."""
        both = self.labeler.questions(pair.prompt, pair.response_1, pair.response_2)
        return {self.labeler.key(question): question for question in both}

    def load(self) -> None:
        """Put the labeler in place of its name."""
        if self._given is None and isinstance(self.labeler.language_model, _NotLoaded):
            self.labeler.language_model = self._loaded()

    def _loaded(self) -> LanguageModel:
        c = self.config
        server = configured(ServerConfig(), self._llm, "a language model at a URL")
        loaded = language_model_from(LanguageModelConfig(c.model, c.llm_url, c.chat, c.device, c.dtype, server))
        loaded.name = _name_of(c)  # what the journal's keys are made with
        if c.llm_url is not None:
            self._opened = cast("EndpointLM", loaded)
        return loaded

    def _connected(self) -> LanguageModel | None:
        """A server that is to score, which may need another scale than the one asked for; None if it is not there."""
        if self.config.llm_url is None or self.config.mode != "score" or self.config.dry_run:
            return None
        try:
            return self._loaded()
        except BackendError:
            return None  # said when something is to be asked: what was answered can be written without it

    @property
    def identity(self) -> dict[str, Any]:
        """The options that say which run this is: a run can go on with others of the rest."""
        kept = {name: value for name, value in asdict(self.config).items() if name not in _OPERATIONAL}
        return kept | {"llm": {name: value for name, value in self._llm.items() if name not in _OPERATIONAL_LLM}}

    def server(self) -> dict[str, Any]:
        """What the labeler's server can do and has been asked in this process; empty without one."""
        if self._opened is None:
            return {}
        return {"server": self._opened.facts, "server_usage": asdict(self._opened.usage)}

    def close(self) -> None:
        """Close what this job opened."""
        if self._opened is not None:
            self._opened.close()

    def ask(self, pairs: Sequence[Pair], journal: Journal) -> bool:
        """Ask what is open of some pairs and put the answers in the journal; False if all that was asked failed."""
        asked = {k: q for pair in pairs for k, q in self.questions(pair).items() if k not in journal}
        order = sorted(asked, key=lambda key: asked[key])
        answers = dict(zip(order, self.labeler.ask([asked[key] for key in order]), strict=True))
        rows = {}
        for key, answer in answers.items():
            if answer.status != "ok":
                self._failures[key] = answer
                self.last_failure = answer.reason
                continue
            spent = self.spent(asked[key], self.count(answer.rationales))
            rows[key] = {**answer.to_json(), "tokens": spent}
            self.add_tokens({"tokens": spent})
        journal.append(rows)
        return not answers or any(answer.status != "failed" for answer in answers.values())

    def label(self, pair: Pair, journal: Journal) -> Label:
        """The label of a pair all of whose questions were asked."""
        if pair.problem:
            return Label(float("nan"), float("nan"), "failed", pair.problem, {})
        both = self.labeler.questions(pair.prompt, pair.response_1, pair.response_2)

        def answer(question: str) -> Answer:
            key = self.labeler.key(question)
            return Answer.from_json(journal[key]) if key in journal else self._failures[key]

        return self.labeler.combine(both, (answer(both[0]), answer(both[1])))

    def spent(self, question: str, rationales: Sequence[int] | None = None) -> list[int]:
        """Tokens read and written for a question with rationales of so many tokens (None: each at its limit)."""
        size = self.count([question])[0]
        if not self.config.cot:
            return [size, 1]
        written = [self.config.rationale_tokens] * self.config.samples if rationales is None else rationales
        return [sum(2 * size + n for n in written), sum(n + 1 for n in written)]

    def note(self, row: Mapping[str, Any]) -> None:
        """Check an answer of the journal and count its tokens.

        Raises:
            DataError: If it is no answer.
        """
        Answer.from_json(row)
        self.add_tokens(row)

    def add_tokens(self, row: Mapping[str, Any]) -> None:
        """Count the tokens of an answer."""
        tokens = row.get("tokens", (0, 0))
        if not isinstance(tokens, list | tuple) or [type(count) for count in tokens] != [int, int]:
            raise DataError(f"expected two numbers of tokens, found {tokens!r:.60}")
        self.tokens = [a + b for a, b in zip(self.tokens, tokens, strict=True)]

    def cost(self, tokens: Sequence[int]) -> float | None:
        """What tokens cost, None without prices."""
        prices = self.config.price_in, self.config.price_out
        if prices == (None, None):
            return None
        return sum(n * (price or 0.0) for n, price in zip(tokens, prices, strict=True)) / 1e6


class _NotLoaded:
    """Stands for a model whose weights are not needed yet."""

    def __init__(self, name: str) -> None:
        self.name = name

    def label_logprobs(self, prompts: Sequence[str], labels: Sequence[str]) -> Any:
        raise BackendError(f"expected {self.name} to be loaded before it is asked")

    def generate(self, prompts: Sequence[str], **settings: Any) -> list[str]:
        raise BackendError(f"expected {self.name} to be loaded before it is asked")


def _token_counter(
    config: LabelConfig, model: LanguageModel | None
) -> tuple[Callable[[Sequence[str]], list[int]], bool]:
    """Counts tokens of texts, and whether it is exact: of a model that is not here it guesses from the characters."""
    if config.llm_url is not None or model is not None:
        return lambda texts: [max(1, round(len(text) / 4)) for text in texts], False
    tokenizer = load_tokenizer(config.model)
    return lambda texts: [len(row) for row in encode(tokenizer, texts)], True


def _name_of(config: LabelConfig) -> str:
    return config.model if config.llm_url is None else f"{config.model} at {config.llm_url}"


def _settings_of(config: LabelConfig) -> dict[str, Any]:
    """The settings of the server's client, with the prices of the command."""
    try:
        found = json.loads(config.llm)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise RLAIFError(f"expected llm as a JSON object, found {config.llm!r:.80}")
    if found and config.llm_url is None:
        raise RLAIFError(f"expected a server's URL (llm_url) with the settings {', '.join(found)}, found none")
    prices = {name: getattr(config, name) for name in ("price_in", "price_out")}
    given = {name: price for name, price in prices.items() if price is not None}
    if config.llm_url is not None and given and isinstance(limits := found.get("limits", {}), dict):
        found["limits"] = {**given, **limits}
    return found


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RLAIFError(f"expected a template in UTF-8 at {path}, found: {error}") from error
