"""Every family of models and kind of tokenizer, by what is done with it: the checks are in `tests.conformance`."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from rlaif_env.api import RLAIFError
from tests import ROOT
from tests.conformance import MODEL_CHECKS, TOKENIZER_CHECKS, Unsupported, made, together
from tests.families import FAMILIES, REFUSED, TOKENIZERS


@pytest.mark.parametrize("check", list(MODEL_CHECKS))
@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_family(name: str, check: str, tmp_path: Path) -> None:
    with contextlib.suppress(Unsupported):  # a refusal in words, which the table has
        MODEL_CHECKS[check](made(name), tmp_path)


@pytest.mark.parametrize("kind", list(TOKENIZERS))
@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_family_with_a_kind_of_tokenizer(name: str, kind: str) -> None:
    together(made(name, kind))


@pytest.mark.parametrize("check", list(TOKENIZER_CHECKS))
@pytest.mark.parametrize("kind", list(TOKENIZERS))
def test_a_kind_of_tokenizer(kind: str, check: str) -> None:
    TOKENIZER_CHECKS[check](made("llama", kind).tokenizer)


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_right_is_refused_by_name(name: str) -> None:
    with pytest.raises(RLAIFError, match=f"found {name}, '{name}', which .*; use another model"):
        made(name)


def test_the_page_has_every_family() -> None:
    page: str = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    for name in (*FAMILIES, *REFUSED):
        assert f"| `{name}` |" in page, "make it again with python -m tests.conformance"
