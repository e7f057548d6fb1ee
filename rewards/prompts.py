"""What a labeler is asked, as data: preambles, exemplars and endings (section 2.1, appendices D and E).

The shapes are the paper's; the sentences are our own. A task of the user's gets the wording of its kind with its own
criterion. Texts go in as they are: nothing in them is formatted again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from string import Formatter

from rlaif_env.api import RLAIFError
from rlaif_env.data.tasks import Task
from rlaif_env.files import package_data


@dataclass(frozen=True)
class ScoreWording:
    """How a score is asked for."""

    preamble: str  # who the rater is and what the scale means, with ``{low}``, ``{high}`` and, by kind, ``{criterion}``
    sample: str  # one response, with ``{prompt}`` and ``{response}`` or, where they are one text, ``{text}``
    ending: str  # what the score follows
    # Scored responses, used first to last, each with its place on the scale from 0 to 1 (highest)
    exemplars: Sequence[tuple[str, float]] = ()


@cache
def _wordings() -> dict[str, dict[str, ScoreWording]]:
    """The wordings of the built-in "tasks", and of tasks of the user's by "kinds"."""
    groups = package_data("rewards", "wordings.toml").items()
    return {group: {name: ScoreWording(**wording) for name, wording in named.items()} for group, named in groups}


def score_wording(task: Task) -> ScoreWording:
    """The wording for a task: its own, or that of its kind."""
    return _wordings()["tasks"].get(task.name) or _wordings()["kinds"][task.kind]


def fill(template: str, **texts: object) -> str:
    """Put texts in the ``{name}`` places of a template, in one pass, so that braces inside a text stay text.

    Raises:
        RLAIFError: If the template has other places or is malformed.
    """
    try:
        for _, name, form, conversion in Formatter().parse(template):
            if name is not None and (name not in texts or form or conversion):  # no attributes, widths or conversions
                raise KeyError(name)
        return template.format(**texts)
    except (KeyError, ValueError) as error:
        places = ", ".join(f"{{{name}}}" for name in texts)
        raise RLAIFError(
            f"expected a template with the places {places} only (a brace meant as text is doubled), "
            f"found {template[:80]!r} ({error})"
        ) from error


def score_prompt(
    task: Task,
    prompt: str,
    response: str,
    *,
    scale: tuple[int, int] | None = None,
    shots: int = 0,
    template: str | None = None,
) -> str:
    """The prompt after which the model's next word is its score of a response (section 2.2.2).

    Args:
        task: What is judged.
        prompt: What the response answers.
        response: The response.
        scale: Lowest and highest score; None is the task's.
        shots: Number of exemplars.
        template: A whole prompt to use instead, with ``{prompt}``, ``{response}`` or ``{text}``.

    Raises:
        RLAIFError: If there are fewer exemplars than asked for, or the template is malformed.
    """
    if template is not None:
        return fill(template, prompt=prompt, response=response, text=task.judged(prompt, response))
    wording = score_wording(task)
    if not 0 <= shots <= len(wording.exemplars):
        raise RLAIFError(
            f"expected 0 to {len(wording.exemplars)} shots for task {task.name!r}, found {shots}; "
            "give a template of your own for more"
        )

    def sample(prompt: str, response: str) -> str:
        return fill(wording.sample, prompt=prompt, response=response, text=task.judged(prompt, response))

    low, high = scale or task.scale
    parts = [fill(wording.preamble, low=low, high=high, criterion=task.criterion)]
    for scored, level in wording.exemplars[:shots]:
        parts.append(f"{sample('', scored)}\n{wording.ending}{round(low + level * (high - low))}")
    return "\n\n".join([*parts, f"{sample(prompt, response)}\n{wording.ending}"])


def leads_after(prompt: str) -> tuple[str, ...]:
    """What may stand between a prompt and an answer: nothing, or a space where the prompt ends in no white space."""
    return ("",) if prompt[-1:].isspace() else ("", " ")


def check_answers(answers: Sequence[str]) -> None:
    """Refuse answers whose likelihoods cannot be told apart.

    Raises:
        RLAIFError: If there is none, or one is empty or repeated or has white space around it.
    """
    if not answers or len(set(answers)) != len(answers) or any(not s or s != s.strip() for s in answers):
        raise RLAIFError(f"expected distinct labels without white space around them, found {list(answers)}")


def before_stop(text: str, stop: Sequence[str]) -> str:
    """A continuation up to the first of some stop strings."""
    return text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]
