"""Changes of a text: those that a reward should not heed, and those that it should. Pure functions of texts.

Each gives the changed text, or None where it would change nothing or does not apply: that text is then left out of the
figure, whose number of rows says so. The lists of words are our own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from itertools import cycle

import numpy as np

Transform = Callable[[str], "str | None"]

_VERB = re.compile(
    r"\b(?:am|is|are|was|were|will|would|can|could|should|must|may|might|do|does|did|has|have|had|it['’]s|that['’]s)\b",
    re.I,
)
_JUDGING = re.compile(
    r"\b(?:amazing|bad|beautiful|best|better|boring|brilliant|charming|clever|compelling|dull|enjoyable|engaging|"
    r"entertaining|excellent|fine|fun|funny|good|great|helpful|honest|interesting|lovely|moving|perfect|poor|powerful|"
    r"predictable|smart|stupid|superb|terrible|terrific|touching|true|well|wonderful|worst|worth|worthy)\b",
    re.I,
)
_NEGATED_VERB = re.compile(r"\b(?P<verb>cannot|\w+n['’]t)\b|\s*\bn['’]t\b", re.I)
_NEGATOR = re.compile(r"\s*\b(?:not|never)\b", re.I)
_WHOLE = {"cannot": "can", "can't": "can", "won't": "will", "shan't": "shall"}
_NAMES = ("Anderson", "Miriam", "Kowalski", "Oslo")
_NAMED_OR_NUMBER = re.compile(r"\b(?:[A-Z][^\W\d_]+|\d+)\b")


def _unless_same(text: str, new: str) -> str | None:
    return None if new.strip() in ("", text.strip()) else new


# --- what should change nothing ---------------------------------------------------------------------------------------


def curled(text: str) -> str | None:
    """Straight quotes made curly, or curly ones straight; None where there are none."""
    if re.search("[“”‘’]", text):
        return re.sub("[‘’]", "'", re.sub("[“”]", '"', text))
    opened = re.sub(r"""(?<![^\s(\[])["']""", lambda match: "“" if match[0] == '"' else "‘", text)
    return _unless_same(text, opened.replace('"', "”").replace("'", "’"))


def full_stop(text: str) -> str | None:
    """The final full stop taken away, or put there after a word; None after any other sign."""
    plain = text.rstrip()
    if plain.endswith(".") and not plain.endswith(".."):
        return plain[:-1].rstrip() or None
    return f"{plain}." if plain[-1:].isalnum() else None


def broken_lines(text: str) -> str | None:
    """A line break in place of every eighth space."""
    words = text.split()
    lines = [" ".join(words[start : start + 8]) for start in range(0, len(words), 8)]
    return "\n".join(lines) if len(lines) > 1 else None


def first_letter(text: str) -> str | None:
    """The first letter small where it is a capital, and a capital where it is small."""
    place = len(text) - len(text.lstrip())
    new = text[:place] + text[place : place + 1].swapcase() + text[place + 1 :]
    return None if new == text else new


INVARIANCES: Mapping[str, Transform] = {
    "with white space at the end": lambda text: f"{text.rstrip()}  \n",
    "with doubled spaces": lambda text: _unless_same(text, re.sub(r"(?<=\S) (?=\S)", "  ", text)),
    "with line breaks": broken_lines,
    "with the other kind of quotes": curled,
    "with or without the final full stop": full_stop,
    "with the first letter's case changed": first_letter,
}
"""Ways to write a text that say the same."""

INSTRUCTIONS: Mapping[str, str] = {
    "dialogue": "Please read this and reply to it as well as you can.\n\n",
    "summary": "Please read the following and sum it up briefly.\n\n",
}
"""What is said before a prompt to say once more what is asked for anyway, by the task's kind."""


# --- what should matter -----------------------------------------------------------------------------------------------


def negated(text: str) -> str | None:
    """The text with its negations ("not", "never", "n't", "cannot") taken away.

    Without any: "not" after each of some verbs ("is", "was", "can", "has", ...), or, without those, before each of some
    words of praise and blame; None without any of them, too.
    """
    if _NEGATOR.search(text) or _NEGATED_VERB.search(text):
        plain = _NEGATED_VERB.sub(lambda match: _affirmed(match["verb"] or ""), text)
        return _unless_same(text, re.sub(r"  +", " ", _NEGATOR.sub("", plain)).lstrip())
    if _VERB.search(text):
        return _VERB.sub(lambda match: f"{match[0]} not", text)
    return _unless_same(text, _JUDGING.sub(lambda match: f"not {match[0]}", text))


def _affirmed(verb: str) -> str:
    straight = verb.replace("’", "'")
    return _WHOLE.get(straight.lower(), straight.removesuffix("n't"))


def shuffled(text: str) -> str | None:
    """The words in an order that the text decides."""
    words = text.split()
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    order = np.random.default_rng(int.from_bytes(digest[:8], "big")).permutation(len(words))
    return _unless_same(text, " ".join(words[i] for i in order.tolist()))


def cut(text: str) -> str | None:
    """The first half of the words."""
    words = text.split()
    return " ".join(words[: (len(words) + 1) // 2]) if len(words) > 1 else None


def crossed(text: str, other: str) -> str | None:
    """The first half of a text's words and the second half of another's."""
    first, second = text.split(), other.split()
    return _unless_same(text, " ".join(first[: (len(first) + 1) // 2] + second[len(second) // 2 :]))


def swapped(prompt: str, response: str) -> str | None:
    """Names and numbers that a response has from its prompt, replaced by others; None where it has none of it."""
    known = {match[0] for match in _NAMED_OR_NUMBER.finditer(prompt)}
    inside = {m[0] for m in _NAMED_OR_NUMBER.finditer(response) if m[0].isdigit() or _inside(response, m.start())}
    others = cycle([name for name in _NAMES if name not in prompt] or _NAMES)
    new = {old: str(int(old) + 3) if old.isdecimal() else next(others) for old in sorted(known & inside)}
    return _unless_same(response, _NAMED_OR_NUMBER.sub(lambda match: new.get(match[0], match[0]), response))


def _inside(text: str, start: int) -> bool:
    """Whether a capitalised word stands inside a sentence, where it is a name."""
    before = text[:start].rstrip()
    return bool(before) and before[-1] not in ".!?:;…\n"
