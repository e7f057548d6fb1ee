"""Small real parts that tests share: tokenizers built in code, a task with prompts of its own, an installed reward."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlaif_env.data.tasks import PromptSource, Task
from tests.tiny import byte_tokenizer

PROMPTS = ("The film was", "A good", "Bad actors in a", "Le café à", "映画は", "ok")
WORDS = "the film was a good bad story not".split()


@pytest.fixture(scope="session", name="byte_tokenizer")
def shared_byte_tokenizer() -> PreTrainedTokenizerFast:
    """`tests.tiny.byte_tokenizer`."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def word_tokenizer() -> PreTrainedTokenizerFast:
    """One id a word: 11 ids, so that random responses often meet the EOS; <pad>, <eos>, <unk>, then `WORDS`."""
    vocab = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.fixture(scope="session")
def toy_task() -> Task:
    """Six prompts of at most 24 bytes, responses of at most 6 tokens."""
    return Task(
        name="toy",
        kind="continuation",
        criterion="how long it is",
        max_prompt_tokens=24,
        max_response_tokens=6,
        source=PromptSource(prompts={"train": PROMPTS, "test": ("only one",)}),
    )


def text_value(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """A number that tells texts apart: of the response's characters, and a little of the prompt's."""
    return [sum(map(ord, r)) % 97 / 10 + len(p) / 1000 for p, r in zip(prompts, responses, strict=True)]


@pytest.fixture(scope="session")
def toy(toy_task: Task, word_tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Keywords of a small environment."""
    return {"task": toy_task, "reward": text_value, "tokenizer": word_tokenizer}


@pytest.fixture(scope="session")
def toy_bytes(toy_task: Task, byte_tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Keywords of a small environment that knows every character."""
    return {"task": toy_task, "reward": text_value, "tokenizer": byte_tokenizer}


@pytest.fixture
def reward_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path with an installed package whose reward is called "toy-length"; its ``scale`` multiplies."""
    folder = tmp_path / "site"
    info = folder / "toy_rewards-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-rewards\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[rlaif_env.rewards]\ntoy-length = toy_rewards:make\nbroken = toy_rewards:none\n"
    )
    (folder / "toy_rewards.py").write_text(
        "import numpy as np\n"
        "from rlaif_env.api import Scores\n"
        "class Length:\n"
        "    name = 'toy-length'\n"
        "    def __init__(self, task, scale):\n"
        "        self.task, self.scale = task, scale\n"
        "    def score(self, prompts, responses):\n"
        "        lengths = np.array([len(r) for r in responses], dtype=np.float32)\n"
        "        return Scores(self.scale * lengths, {'length': lengths, 'long': lengths > 3})\n"
        "def make(task, scale=1.0):\n"
        "    return Length(task, scale)\n"
        "def none(task):\n"
        "    return None\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.fixture
def strict_warnings() -> Iterator[None]:
    """Every warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def never_copied() -> Callable[[], Any]:
    """Makes backends and tokenizers that count how often they are copied, in ``copies``."""

    class Counted:
        def __init__(self, inner: Any = None) -> None:
            self.inner, self.copies, self.name = inner, [], "counted"

        def __reduce_ex__(self, protocol: Any) -> Any:
            self.copies.append(protocol)
            return super().__reduce_ex__(protocol)

    class Backend(Counted):
        def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Any:
            from rlaif_env.api import Scores

            return Scores(text_value(prompts, responses))  # type: ignore[arg-type]

    class Tokens(Counted):
        @property
        def eos_token_id(self) -> int:
            return int(self.inner.eos_token_id)

        @property
        def pad_token_id(self) -> int:
            return int(self.inner.pad_token_id)

        def __len__(self) -> int:
            return len(self.inner)

        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            return list(self.inner.encode(text, add_special_tokens=add_special_tokens))

        def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
            return str(self.inner.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def make(inner: Any = None) -> Any:
        return Backend() if inner is None else Tokens(inner)

    return make
