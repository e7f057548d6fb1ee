"""The shapes rows of text data come in, and the one they become: pure functions on dictionaries.

| two responses | which is preferred |
|---|---|
| ``response_1``, ``response_2`` (or ``_a``, ``_b``; ``_0``, ``_1``), the own form | ``p_first``, a probability |
| the same with ``answer``, ``output``, ``completion`` or ``conversation`` for ``response`` | a verdict |
| ``chosen``, ``rejected``, as TRL and the HH data have them | the first; ``p_chosen`` where it is soft |

A response is a text, or a list of ``{"role", "content"}``: the messages that go on from the prompt, or whole
conversations that begin alike. The prompt is ``prompt`` (else ``question``), a text or messages. Without one it is the
common beginning of two conversations, or of ``chosen`` and ``rejected``; else it is empty.

Which of the two is preferred may also be a verdict, `rlaif_env.data.verdicts`.

A dialogue as one string is written as in the HH data, each turn after an empty line as ``Human: ...`` or
``Assistant: ...``; its prompt ends in ``Assistant:``.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

from rlaif_env.api import DataError, Preference
from rlaif_env.data.jsonl import MAX_CHARACTERS, check_text, listing
from rlaif_env.data.verdicts import no_difference, verdict_of, votes_of

_SPEAKERS = {"user": "Human", "assistant": "Assistant", "system": "System"}
TURN = "\n\nAssistant:"
_OWN = ("prompt", "response_1", "response_2", "p_first", "source", "meta")
_TRL = ("prompt", "chosen", "rejected", "p_chosen", "source", "meta")
_STEMS = ("response", "answer", "output", "completion", "conversation")
_PAIRS = (
    ("chosen", "rejected"),
    *((f"{stem}_{one}", f"{stem}_{two}") for stem in _STEMS for one, two in (("1", "2"), ("a", "b"), ("0", "1"))),
)
_VERDICTS = ("winner", "preference", "choice", "label", "better_response_id")

_KEPT = "remove it, or keep such pairs (in a task's TOML file: {0} = true under [source], in Python: {0}=True)"

Message = Mapping[str, str]


class PreferenceForms:
    """Turns rows of one source, all in the form of its first, into preferences; `read_preferences` says its arguments.

    With ``labelled`` false a pair that nobody has judged is a tie; `judgement_of` tells which are.
    """

    def __init__(
        self,
        *,
        allow_identical: bool = False,
        allow_empty: bool = False,
        max_characters: int = MAX_CHARACTERS,
        labelled: bool = True,
    ) -> None:
        self.allow_identical, self.allow_empty, self.labelled = allow_identical, allow_empty, labelled
        self.form: str | None = None
        self._text = partial(check_text, may_be_empty=True, max_characters=max_characters)
        self._messages = partial(_messages, max_characters=max_characters)

    def __call__(self, row: Mapping[str, Any]) -> Preference:
        """The preference of a row; fields that no form knows go to ``meta``.

        Raises:
            DataError: If the row is in no form or another than the first, lacks a response, or has a value of the
                wrong kind.
        """
        names = _fields(row)
        judged = judgement_of(row, names)
        if judged is None and self.labelled:
            raise DataError(
                f"expected {names[0]}, {names[1]} and p_first, found no p_first, and no votes or {', '.join(_VERDICTS)}"
            )
        form = "/".join(names) + (" as messages" if isinstance(row[names[0]], list) else "")
        if names[0] == "chosen":
            form = ("prompt/" if "prompt" in row else "") + form
        if self.form is None:
            self.form = form
        if form != self.form:
            raise DataError(f"expected the form of the rows before, {self.form}; found {form}")
        prompt, first, second, before = self._texts(row, *names)
        p_first, used = (0.5, None) if judged is None else judged
        known = {*names, *_prompt_field(row), "source", "meta"} | ({used} if used in ("p_first", "p_chosen") else set())
        source, meta = _source_and_meta(row, known)
        if before is not None:
            meta.setdefault("prompt_messages", before)
        for name, text in (("first", first), ("second", second)):
            if not (self.allow_empty or text.strip()):
                raise DataError(f"expected two responses, found the {name} one empty; {_KEPT.format('allow_empty')}")
        if not self.allow_identical and first == second:
            raise DataError(
                f"expected two different responses, found the same one twice, {first[:40]!r}; "
                + _KEPT.format("allow_identical")
            )
        return Preference(prompt, first, second, p_first, source, meta)

    def _texts(self, row: Mapping[str, Any], one: str, two: str) -> tuple[str, str, str, list[Message] | None]:
        """Prompt and responses, and the prompt's messages where it is made of them."""
        kinds = {isinstance(row[name], list) for name in (one, two)}
        if len(kinds) > 1:
            raise DataError(f"expected {one} and {two} to be both strings or both messages, found one of each")
        field = next(iter(_prompt_field(row)), None)
        before = self._messages(row, field) if field is not None and isinstance(row[field], list) else None
        if kinds == {True}:
            return self._conversations(row, one, two, field, before)
        first, second = self._text(row, one), self._text(row, two)
        if before is not None:
            return dialogue(before) + TURN, first, second, before
        if field is not None:
            return self._text(row, field), first, second, None
        at = _common_prompt(first, second) if one == "chosen" else 0
        return first[:at], first[at:], second[at:], None

    def _conversations(
        self, row: Mapping[str, Any], one: str, two: str, field: str | None, before: list[Message] | None
    ) -> tuple[str, str, str, list[Message]]:
        turns = [self._messages(row, name) for name in (one, two)]
        asked = before
        if field is not None and before is None:
            asked = [{"role": "user", "content": self._text(row, field)}]
        if turns[0][0]["role"] != "assistant" or asked is None:  # whole conversations
            same = [a == b for a, b in zip(*turns, strict=False)]
            # At least the last message of each is the response, equal or not.
            common = min(same.index(False) if False in same else len(same), *(len(side) - 1 for side in turns))
            while common and any(side[common]["role"] != "assistant" for side in turns):
                common -= 1  # people went on differently after the same answer: it is the beginning of both responses
            shared = turns[0][:common]
            if asked and asked[-1]["content"].strip() not in {turn["content"].strip() for turn in shared}:
                raise DataError(f"expected {one} and {two} to go on from {field} or to begin with it, found neither")
            asked, turns = shared, [side[common:] for side in turns]
        for name, side in zip((one, two), turns, strict=True):
            if side[0]["role"] != "assistant":
                raise DataError(
                    f"expected {name} to go on with a message of the assistant, found the role {side[0]['role']!r}"
                )
        if not asked:
            raise DataError("expected a message before the responses, found none")
        first, second = (dialogue(side).removeprefix(TURN + " ") for side in turns)
        return dialogue(asked) + TURN, first, second, asked


def judgement_of(row: Mapping[str, Any], names: tuple[str, str] | None = None) -> tuple[Any, str] | None:
    """The probability that the first response of a row is preferred, and the field that says so; None if none does.

    What ``p_first`` and ``p_chosen`` hold is handed on as it is.

    Raises:
        DataError: If the row is in no form, or a verdict names neither response.
    """
    names = names or _fields(row)
    chosen = names[0] == "chosen"
    field = "p_chosen" if chosen else "p_first"
    if row.get(field) is not None:
        return row[field], field
    if row.get("tie") is True:
        return 0.5, "tie"
    if row.get("votes") is not None:
        return votes_of(row["votes"], names), "votes"
    if chosen:
        return (0.5 if no_difference(row) else 1.0), "chosen"
    field = next((name for name in _VERDICTS if row.get(name) is not None), "")
    return (verdict_of(row[field], field, names), field) if field else None


def holds_responses(row: Mapping[str, Any]) -> bool:
    """Whether a row has a field for a response of a pair."""
    return any(name in row for pair in _PAIRS for name in pair)


def prompt_of(row: Mapping[str, Any], fields: Sequence[str], max_characters: int = MAX_CHARACTERS) -> str:
    """The prompt of a row: the first of ``fields`` it has, text or messages, else the common beginning of a pair.

    Raises:
        DataError: If there is none, or it is empty, or of the wrong kind.
    """
    for name in fields:
        if name in row:
            if isinstance(row[name], list):
                return dialogue(_messages(row, name, max_characters)) + TURN
            return check_text(row, name, may_be_empty=False, max_characters=max_characters)
    if any(row.keys() >= set(pair) for pair in _PAIRS):
        names = _fields(row)
        if prompt := PreferenceForms(max_characters=max_characters)._texts(row, *names)[0]:
            return prompt
        raise DataError(f"expected {' and '.join(names)} to begin with the same prompt, found no common beginning")
    return check_text(row, fields[0], may_be_empty=False)  # says what is missing and what there is


def response_of(row: Mapping[str, Any]) -> tuple[str, str]:
    """The prompt and the one response of a row, each a text, which may be empty, or messages.

    Raises:
        DataError: If one is missing or of the wrong kind, or the response's messages do not begin with the assistant's.
    """
    prompt, response = row.get("prompt"), row.get("response")
    turns = _messages(row, "response", MAX_CHARACTERS) if isinstance(response, list) else None
    if turns and turns[0]["role"] != "assistant":
        raise DataError(f"expected response to begin with a message of the assistant, found {turns[0]['role']!r}")
    return (
        dialogue(_messages(row, "prompt", MAX_CHARACTERS)) + TURN
        if isinstance(prompt, list)
        else check_text(row, "prompt", may_be_empty=True),
        dialogue(turns).removeprefix(TURN + " ") if turns else check_text(row, "response", may_be_empty=True),
    )


def dialogue(messages: Sequence[Message]) -> str:
    """Messages as one string in the HH form; the assistant does not get the next word."""
    return "".join(f"\n\n{_SPEAKERS[message['role']]}: {message['content']}" for message in messages)


def messages_of(prompt: str) -> list[Message]:
    """A prompt as messages: the turns of a dialogue in the HH form, else one message of the user."""
    roles = {speaker: role for role, speaker in _SPEAKERS.items()}
    pieces = ("\n\n" + prompt.strip()).removesuffix(TURN).split("\n\n")[1:]
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


def _fields(row: Mapping[str, Any]) -> tuple[str, str]:
    """The fields of a row that hold the two responses.

    Raises:
        DataError: If there are none, or several, or one alone.
    """
    there = {name for pair in _PAIRS for name in pair if row.get(name) is not None}
    whole = [pair for pair in _PAIRS if there >= set(pair)]
    if whole and (len(whole) > 1 or there & {"chosen", "rejected"} - set(whole[0])):
        raise DataError(f"expected one form in a row, found {', '.join(name for name in row if name in there)}")
    if whole:
        return whole[0]
    if there & {"chosen", "rejected"}:
        raise DataError(f"expected both chosen and rejected, found only {there.pop()}")
    for one, two in _PAIRS:
        if there & {one, two}:
            raise DataError(f"expected {one}, {two} and p_first, found no {two if one in there else one}")
    raise DataError(f"expected response_1, response_2 and p_first, or chosen and rejected; found {listing(row)}")


def _prompt_field(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The field that holds the prompt, if one does."""
    return ("prompt",) if "prompt" in row else ("question",) if "question" in row else ()


def _source_and_meta(row: Mapping[str, Any], known: Collection[str]) -> tuple[str, dict[str, Any]]:
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
        if isinstance(parts := message["content"], list):  # of a model that takes images too
            if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts):
                raise DataError(f"expected message {number} of {name} to hold text alone, found {parts!r:.60}")
            message = {"content": "".join(part["text"] for part in parts)}
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
    if (at := chosen.rfind(TURN, 0, common)) >= 0:
        return at + len(TURN)
    if TURN in chosen or TURN in rejected:
        raise DataError("expected chosen and rejected to be one dialogue with two last turns, found two dialogues")
    at = min(common, len(chosen.rstrip()) - 1, len(rejected.rstrip()) - 1)
    while at > 0 and not (chosen[at].isspace() and rejected[at].isspace()):
        at -= 1
    return max(at, 0)
