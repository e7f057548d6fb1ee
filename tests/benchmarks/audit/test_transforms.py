"""Changes of texts, by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.audit.checks import transforms
from benchmarks.audit.checks.transforms import INVARIANCES, crossed, cut, negated, shuffled, swapped
from rlaif_env.data.corpus import movie_snippets
from tests.benchmarks.audit.rewards import canonical


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The plot is dull but the cast was great.", "The plot is not dull but the cast was not great."),
        ("A wonderful film.", "A not wonderful film."),
        ("It isn't good, and I can’t stay.", "It is good, and I can stay."),
        ("I cannot say it won't work; it does n't.", "I can say it will work; it does."),
        ("Not a good film, never was", "a good film, was"),
        ("It's moving.", "It's not moving."),
        ("Mere words", None),
        ("", None),
    ],
)
def test_negation(text: str, expected: str | None) -> None:
    assert negated(text) == expected


@pytest.mark.parametrize(
    ("change", "text", "expected"),
    [
        (transforms.curled, "\"Up\" isn't 'bad'", "“Up” isn’t ‘bad’"),
        (transforms.curled, "“Up” isn’t", '"Up" isn\'t'),
        (transforms.curled, "plain", None),
        (transforms.full_stop, "Good.", "Good"),
        (transforms.full_stop, "Good", "Good."),
        (transforms.full_stop, "Good...", None),
        (transforms.full_stop, "Good!", None),
        (transforms.broken_lines, "a b c d e f g h i", "a b c d e f g h\ni"),
        (transforms.broken_lines, "a b", None),
        (transforms.first_letter, " Good Film", " good Film"),
        (transforms.first_letter, "film", "Film"),
        (transforms.first_letter, "10 films", None),
        (INVARIANCES["with doubled spaces"], "a b c", "a  b  c"),
        (INVARIANCES["with doubled spaces"], "word", None),
        (cut, "a b c", "a b"),
        (cut, "word", None),
    ],
)
def test_changes_of_form(change: Callable[[str], str | None], text: str, expected: str | None) -> None:
    assert change(text) == expected


def test_shuffled_words_are_the_same_words_in_an_order_of_the_text_s_own() -> None:
    text = "one two three four five six"
    new = shuffled(text)
    assert new is not None and new != text and sorted(new.split()) == sorted(text.split()) and shuffled(text) == new
    assert shuffled("word") is None and shuffled("no no") is None


def test_names_and_numbers_of_the_prompt_are_swapped_and_no_others() -> None:
    prompt = "In Paris, 30 people met Anna on May 4."
    assert swapped(prompt, "So 30 people met Anna, 5 left.") == "So 33 people met Anderson, 5 left."
    assert swapped(prompt, "Nobody met. In time they left.") is None  # "In" begins a sentence: no name
    assert swapped("", "So 30 people met Anna.") is None


def test_another_text_s_second_half() -> None:
    assert crossed("a b c d", "w x y z") == "a b y z"
    assert crossed("a b", "a b") is None


def test_changes_of_form_say_the_same_of_real_texts() -> None:
    texts = [snippet.text for snippet in movie_snippets("test")][:100]
    for name, change in INVARIANCES.items():
        altered = [(text, new) for text in texts if (new := change(text)) is not None]
        assert len(altered) > 20, name
        assert all(text != new and canonical(text) == canonical(new) for text, new in altered), name
