"""What a labeler is asked about two responses: preamble, exemplars, sample, ending (section 2.1, appendix D).

The shapes are the paper's: ``Text - ``, ``Summary 1 - ``, ``Summary 2 - `` and ``Preferred Summary=`` for summaries,
``Context - ``, ``Response 1 - ``, ``Response 2 - `` and ``Preferred Response=`` for dialogues. The sentences are our
own. Two departures: the harmless task, which asks for the more harmful response, says so in its ending too, because
"preferred" would contradict the preamble; and movie reviews, where prompt and response are one text, are compared
whole. A task of the user's gets the wording of its kind with its own criterion.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from rewards.prompts import fill
from rlaif_env.api import RLAIFError
from rlaif_env.data.tasks import Task
from rlaif_env.files import package_data


@dataclass(frozen=True)
class PairExemplar:
    """Two responses with the answer to the preamble's question, "1" or "2", and why."""

    response_1: str
    response_2: str
    answer: str
    rationale: str
    prompt: str = ""


@dataclass(frozen=True)
class PairWording:
    """How a preference is asked for."""

    base: str  # the short preamble: who the rater is, what to answer
    detailed: str  # the long one: also what makes a response good
    # Two responses, with ``{prompt}``, ``{response_1}``, ``{response_2}`` or, where prompt and response are one
    # text, ``{text_1}``, ``{text_2}``
    sample: str
    request: str  # what asks for a rationale; it ends in ``Rationale:``
    ending: str  # what the answer follows
    inverted: bool = False  # whether the question is which response is worse
    # Examples, used first to last; the answers alternate so that none is the usual one
    exemplars: tuple[PairExemplar, ...] = ()


@cache
def _wordings() -> Mapping[str, PairWording]:
    """The wording of the built-in tasks, by task: what stands in wordings.toml."""
    return {
        name: PairWording(**{**wording, "exemplars": tuple(PairExemplar(**e) for e in wording["exemplars"])})
        for name, wording in package_data("rewards.labeling", "wordings.toml").items()
    }


def pair_wording(task: Task) -> PairWording:
    """The wording for a task: its own, or that of its kind with the task's criterion."""
    wordings = _wordings()
    if task.name in wordings:
        return wordings[task.name]
    things, noun, sample = {
        "continuation": ("two texts", "text", "Text 1 - {text_1}\nText 2 - {text_2}"),
        "summary": ("a text and two summaries of it", "summary", wordings["summarization"].sample),
        "dialogue": ("a conversation and two responses to it", "response", wordings["helpful"].sample),
    }[task.kind]
    criterion = task.criterion.strip().rstrip(".")
    asked = f"Read {things} and answer 1 or 2: which {noun} is better? What counts is {criterion}."
    alone = f"The better {noun} is told by one thing only: {criterion}. Neither its place nor its length matters."
    return PairWording(
        base=f"You are an expert rater. {asked}",
        detailed=f"{alone}\n\nYou are an expert rater. {asked}",
        sample=sample,
        request=f"Say for each {noun} {criterion}, and which one is better therefore.\n\nRationale:",
        ending=f"Preferred {noun.capitalize()}=",
    )


def pairwise_prompt(
    task: Task,
    prompt: str,
    response_1: str,
    response_2: str,
    *,
    preamble: str = "base",
    shots: int = 0,
    rationale: bool = False,
    template: str | None = None,
) -> str:
    """The prompt after which the model's next word is "1" or "2" or, with ``rationale``, its rationale.

    White space around the texts is left out.

    Args:
        task: What is judged.
        prompt: What the responses answer.
        response_1: The response shown first.
        response_2: The response shown second.
        preamble: "base" or "detailed".
        shots: Number of exemplars.
        rationale: Whether it ends in the request for a rationale; `label_prompt` then goes on with the answer.
        template: A whole prompt to use instead, with ``{prompt}``, ``{response_1}``, ``{response_2}`` or ``{text_1}``,
            ``{text_2}``.

    Raises:
        RLAIFError: If there are fewer exemplars than asked for, no such preamble, or the template is malformed.
    """

    def texts(x: str, y1: str, y2: str) -> dict[str, str]:
        named = {"prompt": x, "response_1": y1, "response_2": y2}
        named |= {"text_1": task.judged(x, y1), "text_2": task.judged(x, y2)}
        return {name: text.strip() for name, text in named.items()}

    if template is not None:
        return fill(template, **texts(prompt, response_1, response_2))
    wording = pair_wording(task)
    preambles = {"base": wording.base, "detailed": wording.detailed}
    if preamble not in preambles:
        raise RLAIFError(f"expected the labelling prompt {' or '.join(preambles)}, found {preamble!r}")
    if not 0 <= shots <= len(wording.exemplars):
        raise RLAIFError(
            f"expected 0 to {len(wording.exemplars)} shots for task {task.name!r}, found {shots}; give a template of "
            "your own for more"
        )

    def sample(x: str, y1: str, y2: str) -> str:
        asked = f"\n\n{wording.request}" if rationale else f"\n{wording.ending}"
        return fill(wording.sample, **texts(x, y1, y2)) + asked

    parts = [preambles[preamble]]
    for e in wording.exemplars[:shots]:
        shown = sample(e.prompt, e.response_1, e.response_2)
        parts.append((label_prompt(task, shown, e.rationale) if rationale else shown) + e.answer)
    return "\n\n".join([*parts, sample(prompt, response_1, response_2)])


def label_prompt(task: Task, rationale_prompt: str, rationale: str) -> str:
    """The second step of a chain of thought: the rationale in its place, then the standard ending."""
    written = f" {rationale.strip()}" if rationale.strip() else ""
    return f"{rationale_prompt}{written}\n{pair_wording(task).ending}"
