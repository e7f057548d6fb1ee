"""What a comparison writes into a page, between markers."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.comparison.document import markers, write_document
from rlaif_env.api import DataError
from rlaif_env.records import write_json
from rlaif_env.tables import Table

PAGE = """# Page

Before.

<!-- made by make paper: What each arm cost -->
what was here before
<!-- end What each arm cost -->

Between.

<!-- made by make paper: Learning curves -->
<!-- end Learning curves -->
<!-- made by make paper: facts -->
<!-- end facts -->

After, and no more.
"""
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished comparison, and a page beside it."""
    facts = {"task": "toy", "arms": "human-rm, direct-llm", "seeds": "0, 1, 2", "held-out prompts": 64, "stages": 9}
    comparison = {
        "facts": facts | {"time of all stages, minutes": 31.5},
        "tables": [Table("What each arm cost", ["arm", "s"], [["a|b", 3], ["c", None]], "In seconds.").to_json()],
        "figures": [{"title": "Learning curves", "file": "curves.svg", "caption": "Over updates."}],
    }
    run = tmp_path / "run"
    run.mkdir()
    write_json(run / "comparison.json", comparison)
    write_json(run / "config.json", {"git_commit": COMMIT, "versions": {"python": "3.11.2", "torch": "2.13.0"}})
    (run / "curves.svg").write_text("<svg/>")
    (tmp_path / "page.md").write_text(PAGE, encoding="utf-8")
    return run


def test_tables_figures_and_facts_stand_between_their_markers_and_the_rest_stays(folder: Path) -> None:
    page = folder.parent / "page.md"
    write_document(folder, page)
    expected = """# Page

Before.

<!-- made by make paper: What each arm cost -->

| arm | s |
|---|---|
| a\\|b | 3 |
| c | - |

In seconds.

<!-- end What each arm cost -->

Between.

<!-- made by make paper: Learning curves -->

![Learning curves](images/page-curves.svg)

Over updates.

<!-- end Learning curves -->
<!-- made by make paper: facts -->

Task toy; arms human-rm, direct-llm; seeds 0, 1, 2; 64 held-out prompts; commit 0123456789ab; python 3.11.2, \
torch 2.13.0; 31.5 minutes for 9 stages.

<!-- end facts -->

After, and no more.
"""
    assert page.read_text(encoding="utf-8") == expected
    assert (folder.parent / "images" / "page-curves.svg").read_text() == "<svg/>"
    write_document(folder, page)
    assert page.read_text(encoding="utf-8") == expected  # again: nothing changes


def test_a_commit_that_files_differ_from_is_not_named(folder: Path) -> None:
    for commit in (f"{COMMIT}+changes", None):
        write_json(folder / "config.json", {"git_commit": commit, "versions": {"python": "3.11.2"}})
        write_document(folder, folder.parent / "page.md")
        assert "64 held-out prompts; python 3.11.2; 31.5 minutes" in (folder.parent / "page.md").read_text()


BAD = {
    "a name that there is not": (
        PAGE.replace("What each arm cost", "Costs"),
        "line 5: expected one of 'facts', 'What each arm cost', 'Learning curves', found 'Costs'; the comparison",
    ),
    "an end that is missing": (
        PAGE.replace("<!-- end Learning curves -->\n", ""),
        "line 12: expected <!-- end Learning curves --> for line 11, found '<!-- made by make paper: facts -->'; mend",
    ),
    "the last end missing": (
        PAGE.replace("<!-- end facts -->\n", ""),
        "line 13: expected <!-- end facts --> below it, found none; add it",
    ),
    "an end of something else": (
        PAGE.replace("<!-- end facts -->", "<!-- end fact -->"),
        "line 14: expected <!-- end facts --> for line 13, found '<!-- end fact -->'; mend the markers",
    ),
    "an end without a beginning": (
        PAGE.replace("<!-- made by make paper: facts -->\n", ""),
        "line 13: expected a marker that this ends, found '<!-- end facts -->'; mend the markers",
    ),
    "no marker": ("# Page\n", "expected <!-- made by make paper: NAME --> and <!-- end NAME --> in "),
}


@pytest.mark.parametrize("what", BAD)
def test_markers_that_cannot_be_filled_are_one_error_and_the_page_stays(folder: Path, what: str) -> None:
    text, message = BAD[what]
    page = folder.parent / "page.md"
    page.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as error:
        write_document(folder, page)
    assert message in str(error.value)
    assert page.read_text(encoding="utf-8") == text and not (folder.parent / "images").exists()


def test_a_page_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected a page to write tables into at .*none\.md, found"):
        markers(tmp_path / "none.md")
