"""The backend contract as a check that authors of backends can run: `check_backend`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlaif_env.api import BackendError, RLAIFError, checked_scores, judges_groups

_PROMPTS = ("The film was", "A good story", "Bad actors in a", "Le café à", "映画は", "ok")
_RESPONSES = (
    " a joy from start to end.",
    " told without care",
    "",
    " l'œuvre — superbe 🎬",
    "とても面白い。",
    "\n\n\t!",
)


def check_backend(
    backend: Any, prompts: Sequence[str] = _PROMPTS, responses: Sequence[str] = _RESPONSES, *, tolerance: float = 1e-4
) -> list[str]:
    """Hold a reward backend to its contract (`rlaif_env.api.RewardBackend`).

    It is called about 2 n + 6 times on up to n texts. One that judges groups is given every two neighbouring rows under
    one prompt, the first's, and is held to that for groups: a group alone gets what it gets in a batch.

    Args:
        backend: Anything with a ``name`` and a ``score`` method.
        prompts: n prompts of your own, at least two different rows; the built-in ones have several scripts, an emoji,
            an empty response and one of white space.
        responses: n responses.
        tolerance: How far a row's reward alone may be from the same row's in a batch; 1e-4 is float32's rounding
            through a language model.

    Returns:
        The rules that were checked, in words.

    Raises:
        RLAIFError: For the first rule that is broken; the message begins with it.
    """
    n = len(responses)
    if n < 2 or len(prompts) != n:
        raise RLAIFError(f"expected as many prompts as responses and at least 2, found {len(prompts)} and {n}")
    kept: list[str] = []

    def rule(words: str, holds: bool, found: str) -> None:
        if not holds:
            raise RLAIFError(f"{words}: found {found}")
        if words not in kept:
            kept.append(words)

    def scores(prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float32]:
        words = "score returns Scores with one finite reward, and one entry of each info array, a row"
        try:
            values = checked_scores(backend, prompts, responses).values
        except BackendError as error:
            raise RLAIFError(f"{words}: {error}") from error
        rule(words, True, "")
        return values

    name = getattr(backend, "name", None)
    rule("a backend has a name, a string that is not empty", isinstance(name, str) and bool(name), repr(name))
    rule("a backend has a method score(prompts, responses)", callable(getattr(backend, "score", None)), "none")
    rule("a deep copy of a live backend is the backend itself (define __deepcopy__)", _copies(backend), "a clone")
    size = 2 if judges_groups(backend) else 1
    if size == 2:
        prompts = [prompts[i - i % 2] for i in range(n - n % 2)]
        rule("a judge of groups refuses a response that is alone", _refuses(backend, prompts[0]), "that it was scored")
    starts = range(0, len(prompts), size)
    units = [slice(i, i + size) for i in starts if _is_scored(backend, prompts[i : i + size], responses[i : i + size])]
    rows = [i for unit in units for i in range(unit.start, unit.stop)]
    rule("a backend scores at least two of the rows given", len(rows) >= 2, f"{len(rows)} of {n}")
    prompts, responses = [prompts[i] for i in rows], [responses[i] for i in rows]
    given = (list(prompts), list(responses))
    first = scores(prompts, responses)
    rule("score leaves the lists it is given as they are", given == (prompts, responses), "that it changed them")
    again = scores(prompts, responses)
    same = bool(np.array_equal(first, again))
    rule("the same batch gets the same rewards every time", same, f"{first} and then {again}")
    parts = [slice(i, i + size) for i in range(0, len(rows), size)]
    alone = np.concatenate([scores(prompts[part], responses[part]) for part in parts])
    back = scores(prompts[::-1], responses[::-1])[::-1]
    for words, others, how in (
        (f"a {'row' if size == 1 else 'group'} gets the same reward alone as in a batch, to {tolerance:g}", alone, ""),
        ("rewards come in the order of the rows", back, " in two orders"),
    ):
        worst = int(np.abs(others - first).argmax())
        found = f"{others[worst]} and {first[worst]} for response {responses[worst]!r}{how}"
        rule(words, bool(np.abs(others - first).max() <= tolerance), found)
    rule("an empty batch gives no rewards", len(scores([], [])) == 0, "some")
    return kept


def _copies(backend: Any) -> bool:
    try:
        return copy.deepcopy(backend) is backend
    except Exception:  # what cannot be copied at all is not shared either
        return False


def _refuses(backend: Any, prompt: str) -> bool:
    try:
        backend.score([prompt], ["alone"])
    except RLAIFError:
        return True
    return False


def _is_scored(backend: Any, prompts: Sequence[str], responses: Sequence[str]) -> bool:
    """Whether some texts are scored; refusing them with this project's error is an answer too."""
    try:
        backend.score(prompts, responses)
    except RLAIFError:
        return False
    except Exception as error:
        raise RLAIFError(
            f"a row that cannot be scored raises BackendError: found {type(error).__name__}: {error} for prompt "
            f"{prompts[0]!r} and response {responses[0]!r}"
        ) from error
    return True
