"""The shapes rows of text data come in, and the one they become: pure functions on dictionaries.

| form | fields |
|---|---|
| own | ``response_1``, ``response_2``, ``p_first``, and optionally ``prompt``, ``source``, ``meta`` |
| TRL, explicit prompt | ``prompt``, ``chosen``, ``rejected``: three strings |
| TRL, implicit prompt | ``chosen``, ``rejected``: two whole texts that begin alike |
| TRL, conversational | either of the two before, with lists of ``{"role", "content"}`` in place of the strings |

A dialogue as one string is written as in the HH data, each turn after an empty line as ``Human: ...`` or
``Assistant: ...``; its prompt ends in ``Assistant:``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from rlaif_env.api import DataError, Preference
from rlaif_env.data.jsonl import MAX_CHARACTERS, check_text, listing

_SPEAKERS = {"user": "Human", "assistant": "Assistant", "system": "System"}
_TURN = "\n\nAssistant:"
_OWN = ("prompt", "response_1", "response_2", "p_first", "source", "meta")
_TRL = ("prompt", "chosen", "rejected", "p_chosen", "source", "meta")

_KEPT = "remove it, or keep such pairs (in a task's TOML file: {0} = true under [source], in Python: {0}=True)"

Message = Mapping[str, str]


class PreferenceForms:
    """Turns rows of one file, all in the form of its first, into preferences; `read_preferences` says its arguments."""

    def __init__(
        self, *, allow_identical: bool = False, allow_empty: bool = False, max_characters: int = MAX_CHARACTERS
    ) -> None:
        self.allow_identical, self.allow_empty = allow_identical, allow_empty
        self.form: str | None = None
        self._text = partial(check_text, may_be_empty=True, max_characters=max_characters)
        self._messages = partial(_messages, max_characters=max_characters)

    def __call__(self, row: Mapping[str, Any]) -> Preference:
        """The preference of a row; fields that no form knows go to ``meta``.

        Raises:
            DataError: If the row is in no form or another than the first, lacks a response, or has a value of the
                wrong kind.
        """
        form = _form(row)
        if self.form is None:
            self.form = form
        if form != self.form:
            raise DataError(f"expected the form of the rows before, {self.form}; found {form}")
        preference = self._own(row) if form.startswith("response_1") else self._trl(row, form)
        for name, text in (("first", preference.response_1), ("second", preference.response_2)):
            if not (self.allow_empty or text.strip()):
                raise DataError(f"expected two responses, found the {name} one empty; {_KEPT.format('allow_empty')}")
        if not self.allow_identical and preference.response_1 == preference.response_2:
            raise DataError(
                f"expected two different responses, found the same one twice, {preference.response_1[:40]!r}; "
                + _KEPT.format("allow_identical")
            )
        return preference

    def _own(self, row: Mapping[str, Any]) -> Preference:
        first, second = self._text(row, "response_1"), self._text(row, "response_2")
        prompt = self._text(row, "prompt") if "prompt" in row else ""
        return Preference(prompt, first, second, row["p_first"], *_source_and_meta(row, _OWN))

    def _trl(self, row: Mapping[str, Any], form: str) -> Preference:
        source, meta = _source_and_meta(row, _TRL)
        p_chosen = row.get("p_chosen", 1.0)
        if "messages" in form:
            prompt, chosen, rejected, before = self._conversational(row)
            meta.setdefault("prompt_messages", before)
        elif "prompt" in row:
            prompt, chosen, rejected = (self._text(row, name) for name in ("prompt", "chosen", "rejected"))
        else:
            chosen, rejected = self._text(row, "chosen"), self._text(row, "rejected")
            at = _common_prompt(chosen, rejected)
            prompt, chosen, rejected = chosen[:at], chosen[at:], rejected[at:]
        return Preference(prompt, chosen, rejected, p_chosen, source, meta)

    def _conversational(self, row: Mapping[str, Any]) -> tuple[str, str, str, list[Message]]:
        chosen, rejected = self._messages(row, "chosen"), self._messages(row, "rejected")
        if "prompt" in row:
            before = self._messages(row, "prompt")
        else:
            same = [a == b for a, b in zip(chosen, rejected, strict=False)]
            # At least the last message of each is the response, equal or not.
            common = min(same.index(False) if False in same else len(same), len(chosen) - 1, len(rejected) - 1)
            before, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
        for name, turns in (("chosen", chosen), ("rejected", rejected)):
            if not turns or turns[0]["role"] != "assistant":
                actual = f"the role {turns[0]['role']!r}" if turns else "no message"
                raise DataError(f"expected {name} to go on with a message of the assistant, found {actual}")
        if not before:
            raise DataError("expected a message before the responses, found none")
        one, other = (dialogue(turns).removeprefix(_TURN + " ") for turns in (chosen, rejected))
        return dialogue(before) + _TURN, one, other, before


def prompt_of(row: Mapping[str, Any], fields: Sequence[str], max_characters: int = MAX_CHARACTERS) -> str:
    """The prompt of a row: the first of ``fields`` it has, text or messages, else the common beginning of a pair.

    Raises:
        DataError: If there is none, or it is empty, or of the wrong kind.
    """
    for name in fields:
        if name in row:
            if isinstance(row[name], list):
                return dialogue(_messages(row, name, max_characters)) + _TURN
            return check_text(row, name, may_be_empty=False, max_characters=max_characters)
    if "chosen" in row and "rejected" in row:
        read = PreferenceForms(allow_identical=True, allow_empty=True, max_characters=max_characters)
        if prompt := read(row).prompt:
            return prompt
        raise DataError("expected chosen and rejected to begin with the same prompt, found no common beginning")
    return check_text(row, fields[0], may_be_empty=False)  # says what is missing and what there is


def dialogue(messages: Sequence[Message]) -> str:
    """Messages as one string in the HH form; the assistant does not get the next word."""
    return "".join(f"\n\n{_SPEAKERS[message['role']]}: {message['content']}" for message in messages)


def messages_of(prompt: str) -> list[Message]:
    """A prompt as messages: the turns of a dialogue in the HH form, else one message of the user."""
    roles = {speaker: role for role, speaker in _SPEAKERS.items()}
    pieces = ("\n\n" + prompt.strip()).removesuffix(_TURN).split("\n\n")[1:]
    if not pieces or pieces[0].partition(":")[0] not in roles:
        return [{"role": "user", "content": prompt}]
    turns: list[list[str]] = []
    for piece in pieces:
        speaker, colon, text = piece.partition(":")
        if colon and speaker in roles:
            turns.append([roles[speaker], text.removeprefix(" ")])
        else:
            turns[-1][1] += "\n\n" + piece  # an empty line inside a turn
    return [{"role": role, "content": text} for role, text in turns]


def own_row(preference: Preference) -> dict[str, Any]:
    """A preference as a row of the own form."""
    return {name: getattr(preference, name) for name in _OWN[:5]} | {"meta": dict(preference.meta)}


def trl_row(preference: Preference, conversational: bool) -> dict[str, Any]:
    """A preference as a row of TRL's form, the likelier response chosen; the soft label stays in ``p_chosen``.

    Raises:
        DataError: If no response is likelier, or a conversation is asked for and there is no prompt.
    """
    if preference.p_first == 0.5:
        raise DataError("expected one response to be preferred, found p_first 0.5, which chosen/rejected cannot say")
    likelier = preference if preference.p_first > 0.5 else preference.swapped()
    prompt, meta = preference.prompt, dict(preference.meta)
    values: list[Any] = [prompt, likelier.response_1, likelier.response_2]
    if conversational:
        if not prompt.strip():
            raise DataError("expected a prompt to make a conversation of, found an empty one")
        values[0] = meta.pop("prompt_messages", None) or messages_of(prompt)
        values[1:] = [[{"role": "assistant", "content": text.strip()}] for text in values[1:]]
    return dict(zip(_TRL, [*values, float(likelier.p_first), preference.source, meta], strict=True))


def _form(row: Mapping[str, Any]) -> str:
    """The name of a row's form; it says which fields and what is in them."""
    own = [name for name in _OWN[1:4] if row.get(name) is not None]
    trl = [name for name in ("chosen", "rejected") if row.get(name) is not None]
    if own and trl:
        raise DataError(f"expected one form in a row, found {', '.join(own)} beside {', '.join(trl)}")
    if len(own) == 3:
        return "response_1/response_2/p_first"
    if own:
        missing = [name for name in _OWN[1:4] if name not in own]
        raise DataError(f"expected response_1, response_2 and p_first, found no {' and no '.join(missing)}")
    if len(trl) == 1:
        raise DataError(f"expected both chosen and rejected, found only {trl[0]}")
    if not trl:
        raise DataError(f"expected response_1, response_2 and p_first, or chosen and rejected; found {listing(row)}")
    fields = ("prompt", "chosen", "rejected") if "prompt" in row else ("chosen", "rejected")
    kinds = {"messages" if isinstance(row[name], list) else "strings" for name in fields}
    if len(kinds) > 1:
        raise DataError(f"expected {', '.join(fields)} to be all strings or all messages, found both")
    return "/".join(fields) + f" as {kinds.pop()}"


def _source_and_meta(row: Mapping[str, Any], known: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Who judged, and everything else there is in a row."""
    meta = {} if row.get("meta") is None else row["meta"]
    if not isinstance(meta, Mapping):
        raise DataError(f"expected meta to be an object, found {type(meta).__name__}")
    further = {name: value for name, value in row.items() if name not in known}
    if twice := sorted(further.keys() & meta.keys()):
        raise DataError(f"expected each fact once, found {', '.join(twice)} both in meta and as a field")
    source = row.get("source")
    if source is not None and not isinstance(source, str):
        raise DataError(f"expected source to be a string, found {type(source).__name__}")
    meta = {**meta, **further}
    try:  # JSON can escape half a surrogate pair, so it can be read; no file can hold it, so it could not be written
        json.dumps([source, meta], ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"U+{ord(error.object[error.start]):04X}"
        raise DataError(f"expected whole characters in source and meta, found half a surrogate pair, {half}") from None
    except (TypeError, ValueError, RecursionError):  # values that are no JSON; whoever writes them says so
        pass
    return "human" if source is None else source, meta


def _messages(row: Mapping[str, Any], name: str, max_characters: int) -> list[Message]:
    """The checked messages of a field."""
    messages: list[Message] = []
    for number, message in enumerate(row[name], start=1):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise DataError(f"expected message {number} of {name} to have role and content, found {message!r:.60}")
        role = message["role"]
        if not isinstance(role, str) or role not in _SPEAKERS:
            roles = ", ".join(_SPEAKERS)
            raise DataError(f"expected message {number} of {name} to have a role of {roles}, found {role!r:.60}")
        content = check_text(message, "content", may_be_empty=True, max_characters=max_characters)
        messages.append({"role": role, "content": content})
    if not messages:
        raise DataError(f"expected messages in {name}, found an empty list")
    return messages


def _common_prompt(chosen: str, rejected: str) -> int:
    """Where the responses begin in two whole texts.

    In dialogues, after the last ``Assistant:`` that both have in the same place; in other texts, after the last whole
    word of the common beginning that leaves both something to say.
    """
    pairs = enumerate(zip(chosen, rejected, strict=False))
    common = next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    if (at := chosen.rfind(_TURN, 0, common)) >= 0:
        return at + len(_TURN)
    if _TURN in chosen or _TURN in rejected:
        raise DataError("expected chosen and rejected to be one dialogue with two last turns, found two dialogues")
    at = min(common, len(chosen.rstrip()) - 1, len(rejected.rstrip()) - 1)
    while at > 0 and not (chosen[at].isspace() and rejected[at].isspace()):
        at -= 1
    return max(at, 0)
