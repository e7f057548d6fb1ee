"""How a task's prompts become what a policy reads: in environments, demonstrations, evaluation and reward models.

| template | a prompt becomes |
|---|---|
| "plain" | itself |
| "human-assistant" | turns as in the HH data, ``Human: ...`` and ``Assistant:``, each after an empty line |
| "chat" | the turns in the tokenizer's chat template, up to where the assistant speaks |
| "auto" | "chat" in a dialogue where the tokenizer has a template, else "plain" |

What a judge reads is the conversation, never the template.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlaif_env.api import RLAIFError, Tokenizer
from rlaif_env.data.forms import TURN, Message, dialogue, messages_of
from rlaif_env.models import encode, keep_end

if TYPE_CHECKING:
    from rlaif_env.data.tasks import Task

TEMPLATES = ("auto", "plain", "chat", "human-assistant")


def template_for(task: Task, tokenizer: Any) -> str:
    """How a task's prompts become text for a tokenizer: "plain", "chat" or "human-assistant".

    Raises:
        RLAIFError: If the task asks for a chat template and the tokenizer has none.
    """
    has = bool(getattr(tokenizer, "chat_template", None))
    if task.template == "chat" and not has:
        raise RLAIFError(
            f"task {task.name!r}: expected a tokenizer with a chat template, found none; use an instruct model, or "
            "template 'plain' or 'human-assistant' in the task"
        )
    if task.template == "auto":
        return "chat" if has and task.kind == "dialogue" else "plain"
    return task.template


def turns(task: Task, prompt: str) -> list[Message]:
    """A prompt as messages, the task's system message first if it has one and the prompt has none."""
    messages = messages_of(prompt)
    if task.system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": task.system})
    return messages


def rendered(template: str, tokenizer: Any, messages: Sequence[Message]) -> str:
    """Messages as the text that a policy goes on from: in the chat template, else as in the HH data."""
    if template == "chat":
        return _chat(tokenizer, messages, add_generation_prompt=True)
    return dialogue(messages) + TURN


def _chat(tokenizer: Any, messages: Sequence[Message], **how: Any) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **how))
    except Exception as error:  # templates raise what they like, such as on a system message
        roles = ", ".join(message["role"] for message in messages)
        raise RLAIFError(
            f"expected messages that the tokenizer's chat template takes, found it refuses {roles}: {error}"
        ) from error


def encode_prompts(
    task: Task, tokenizer: Any, prompts: Sequence[str], limit: int | None = None
) -> tuple[list[list[int]], list[str]]:
    """Token ids of n prompts as a policy reads them, and the texts they are of.

    Args:
        task: Says how.
        tokenizer: The policy's; one that is not of transformers has ``encode`` alone and is plain.
        prompts: n prompts.
        limit: Longest row. A longer dialogue loses its first turns, then the beginning of its last, never its system
            message or template; any other text keeps its last tokens, and the BOS.

    Raises:
        RLAIFError: If the template is not the tokenizer's, refuses the messages, or leaves no room for a prompt.
    """
    template, bos_id = template_for(task, tokenizer), getattr(tokenizer, "bos_token_id", None)
    if template == "plain" and task.system is not None:
        raise RLAIFError(
            f"task {task.name!r}: expected a template of turns for the system message, found that prompts are plain "
            "for this model; set template 'chat' or 'human-assistant' in the task"
        )
    texts = list(prompts) if template == "plain" else [rendered(template, tokenizer, turns(task, p)) for p in prompts]
    rows = _encoded(tokenizer, texts, template)
    for i, row in enumerate(rows):
        if limit is None or len(row) <= limit:
            continue
        messages = turns(task, prompts[i])
        if rendered(template, tokenizer, messages) == texts[i]:  # so it is of turns, plain or not
            rows[i], texts[i] = _cut(template, tokenizer, messages, row, limit)
        rows[i] = keep_end(rows[i], limit, bos_id)
    return rows, texts


def _cut(template: str, tokenizer: Any, messages: list[Message], row: list[int], limit: int) -> tuple[list[int], str]:
    """A dialogue of at most so many tokens: without its first turns, then without the beginning of its last."""
    first, text = int(messages[0]["role"] == "system"), ""
    while len(row) > limit:
        if len(messages) - first > 1:
            del messages[first]
        else:
            ids = tokenizer.encode(messages[first]["content"], add_special_tokens=False)
            if not ids:
                raise RLAIFError(
                    f"expected room for a prompt in {limit} tokens, found that the template {template!r} alone takes "
                    f"{len(row)}; raise max_prompt_tokens, or give another system message"
                )
            kept = str(tokenizer.decode(ids[len(row) - limit :], skip_special_tokens=True))
            messages[first] = {**messages[first], "content": kept}
        text = rendered(template, tokenizer, messages)
        (row,) = _encoded(tokenizer, [text], template)
    return row, text


def _encoded(tokenizer: Any, texts: Sequence[str], template: str) -> list[list[int]]:
    if not callable(tokenizer):
        return [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    if template == "chat":  # the template has the BOS where there is to be one
        return [list(row) for row in tokenizer(list(texts), add_special_tokens=False)["input_ids"]] if texts else []
    return encode(tokenizer, texts)


def turn_end(task: Task, tokenizer: Tokenizer) -> int:
    """The token that ends a response in the task's template: the one behind the assistant's turn, else the EOS."""
    eos = tokenizer.eos_token_id
    assert eos is not None  # loading has seen to it
    if template_for(task, tokenizer) != "chat":
        return eos
    known: Any = tokenizer
    said = "That is all I have to say."  # nothing of it stands in a template
    messages = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": said}]
    tail = _chat(tokenizer, messages).rpartition(said)[2].strip()
    ids = tokenizer.encode(tail, add_special_tokens=False)
    return int(ids[0]) if ids and (ids[0] in known.all_special_ids or ids[0] in known.added_tokens_decoder) else eos


def conversation(task: Task, tokenizer: Any, prompt: str, response: str) -> str:
    """A prompt and its answer in the tokenizer's chat template, for a reward model; no EOS in what people wrote.

    The answer stands without white space around it: in files of dialogues it begins with the space behind
    ``Assistant:``, a policy's in the template does not.
    """
    messages = [*turns(task, prompt), {"role": "assistant", "content": response.strip()}]
    if eos := tokenizer.eos_token:
        messages = [{**message, "content": message["content"].replace(eos, "")} for message in messages]
    return _chat(tokenizer, messages)
