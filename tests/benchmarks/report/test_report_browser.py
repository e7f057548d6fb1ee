"""`rlaif report` in a real headless Chromium: it sorts, filters, marks, and runs and fetches nothing it was given."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import write_report
from tests.benchmarks.report.test_report import EVIL, comparison, training_run

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed: apt-get install chromium"),
]

QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
CONTRAST = """() => {
  const channels = text => text.match(/[\\d.]+/g).map(Number);
  const linear = v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const found = channels(getComputedStyle(e).backgroundColor);
      if (found.length === 3 || found[3] === 1) return found;
      if (found[3] > 0) throw Error("half transparent");
    }
    throw Error("no background");
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; node = walker.nextNode();) {
    const element = node.parentElement;
    if (!node.data.trim() || element.closest("script, :disabled") || !element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const ink = luminance(channels(element instanceof SVGElement ? style.fill : style.color));
    const paper = luminance(behind(element));
    found.push([(Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05), node.data.trim().slice(0, 40)]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield running
        running.close()


@contextmanager
def opened(browser: Any, page: Path, **settings: Any) -> Iterator[Any]:
    """A page opened from disk; at the end it must have said nothing and asked for nothing but itself."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, **settings)
    tab = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("dialog", lambda dialog: said.append(dialog.message))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page.as_uri())
    yield tab
    assert said == []
    assert {url for url in asked if not url.startswith("data:")} == {page.as_uri()}
    context.close()


def prompts(tab: Any) -> list[str]:
    return tab.locator(".card .prompt").all_inner_texts()


def test_tables_sort_by_value_and_by_keyboard(browser: Any, tmp_path: Path) -> None:
    rows = [["b10", "9.5% [4%, 20%]", 1200], ["b9", "61.0% [50%, 70%]", None], ["a", "−3.0%", 5]]
    tables = [{"title": "T", "caption": "", "columns": ["name", "rate", "n"], "rows": rows}]
    page = write_report(comparison(tmp_path / "c", tables=tables))
    with opened(browser, page) as tab:

        def first() -> list[str]:
            return tab.locator("tbody td:first-child").all_inner_texts()

        def sorts() -> list[str | None]:
            return [heading.get_attribute("aria-sort") for heading in tab.locator("th").all()]

        assert sorts() == ["none", "none", "none"]
        tab.click("th:nth-child(2) button")
        assert (first(), sorts()) == (["b9", "b10", "a"], ["none", "descending", "none"])
        tab.click("th:nth-child(2) button")
        assert (first(), sorts()) == (["a", "b10", "b9"], ["none", "ascending", "none"])
        tab.focus("th:nth-child(3) button")
        tab.keyboard.press("Enter")
        assert first() == ["b10", "a", "b9"], "1200, 5, then what has none"
        tab.keyboard.press("Space")
        assert first() == ["a", "b10", "b9"], "5, 1200, then what has none"
        tab.click("th:nth-child(1) button")
        assert first() == ["a", "b9", "b10"], "a number in a name counts as a number"


def test_samples_filter_sort_and_turn(browser: Any, tmp_path: Path) -> None:
    page = write_report(training_run(tmp_path / "r"))
    with opened(browser, page) as tab:
        assert tab.locator("[role=status]").inner_text() == "1 to 20 of 64 prompts"
        assert prompts(tab)[:2] == ["held out 0", "held out 1"]
        tab.locator(".status").first.get_by_role("button", name="Next").click()
        assert prompts(tab)[0] == "held out 20"
        tab.get_by_label("Find in prompts and responses").fill("WONDERFUL film 3")
        tab.get_by_text("1 to 11 of 11 prompts, of 64 in the page").wait_for()
        assert prompts(tab)[:3] == ["held out 3", "held out 30", "held out 31"]
        tab.get_by_role("checkbox", name="after").uncheck()
        tab.get_by_text("No prompt matches.").wait_for()
        assert tab.locator(".card").count() == 0
        tab.get_by_role("checkbox", name="after").check()
        tab.get_by_label("Find in prompts and responses").fill("")
        tab.get_by_text("1 to 20 of 64 prompts").wait_for()
        tab.get_by_label("Sort by").select_option(label="reward, before")
        assert prompts(tab)[0] == "held out 63"
        tab.get_by_label("Direction").select_option(label="lowest first")
        assert prompts(tab)[0] == "held out 0"
        tab.get_by_label("Direction").select_option(label="highest first")
        tab.get_by_label("Sort by").select_option(label="reward, after minus before")
        assert prompts(tab)[0] == "held out 0"
        assert tab.locator(".card .delta").first.inner_text() == "reward, after minus before: +1"
        tab.get_by_role("button", name="Responses during training").click()
        assert tab.locator("[role=status]").inner_text() == "1 to 6 of 6 prompts"
        assert tab.locator(".card").first.locator(".answer").count() == 4
        assert "update 1" in tab.locator(".card h3").first.inner_text()


def test_differences_are_marked_word_by_word(browser: Any, tmp_path: Path) -> None:
    page = write_report(training_run(tmp_path / "r"))
    with opened(browser, page) as tab:
        card = tab.locator(".card").first
        assert card.locator("mark.a").all_inner_texts() == ["plain"]
        assert card.locator("mark.b").all_inner_texts() == ["truly wonderful"]
        tab.get_by_label("Compare").select_option(label="after")
        tab.get_by_label("with", exact=True).select_option(label="before")
        assert card.locator("mark.a").all_inner_texts() == ["truly wonderful"]
        assert card.locator("mark.b").all_inner_texts() == ["plain"]
        tab.get_by_label("with", exact=True).select_option(label="no one")
        assert tab.locator("mark").count() == 0


def test_model_output_stays_text_and_runs_nothing(browser: Any, tmp_path: Path) -> None:
    page = write_report(comparison(tmp_path / "c", EVIL, title=EVIL[1], warnings=EVIL[:5]))
    with opened(browser, page) as tab:
        assert tab.evaluate("window.ran") is None
        assert tab.locator("img").count() == 0
        assert tab.locator("h1").text_content() == EVIL[1]
        cards = tab.locator(".card")
        assert cards.count() == len(EVIL)
        for i in (0, 1, 2, 3, 4, 5, 6, 7, 11):
            assert cards.nth(i).locator(".answer .text").first.text_content() == EVIL[i]
        assert cards.nth(6).locator(".answer .text").first.evaluate("e => getComputedStyle(e).direction") == "rtl"
        assert cards.nth(8).locator(".answer .text").first.text_content() == (
            "nul ␀ bell ␇ escape ␛[31m delete ␡ return ␍ end"
        )
        long = cards.nth(12)
        assert len(long.locator(".answer .text").first.text_content()) < 2000
        long.get_by_role("button", name="Show all 100,000 characters").first.click()
        assert cards.nth(12).locator(".answer .text").first.text_content() == EVIL[12]
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert cards.nth(13).locator(".answer .text").first.text_content() == "(empty)"
        assert tab.evaluate("window.ran") is None


def test_scripts_in_a_figure_do_not_run_and_the_policy_holds(browser: Any, tmp_path: Path) -> None:
    folder = comparison(tmp_path / "c", figures=[{"title": "F", "file": "f.svg", "caption": "c"}])
    (folder / "f.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9" onload="top.ran = true">'
        '<script>top.ran = true</script><image href="https://example.invalid/x.png"/><rect width="9" height="9"/></svg>'
    )
    with opened(browser, write_report(folder)) as tab:
        assert tab.locator("figure img").evaluate("e => e.naturalWidth") == 9
        assert tab.evaluate("window.ran") is None


def test_an_inline_script_would_be_refused(browser: Any, tmp_path: Path) -> None:
    page = write_report(comparison(tmp_path / "c"))
    text = page.read_text(encoding="utf-8").replace("<main>", "<main><script>window.ran = true</script>")
    page.write_text(text, encoding="utf-8")
    tab = browser.new_page()
    said: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.goto(page.as_uri())
    assert tab.evaluate("window.ran") is None
    assert len(said) == 1
    assert "Content Security Policy" in said[0]
    tab.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_of_wcag_aa(scheme: str, browser: Any, tmp_path: Path) -> None:
    page = write_report(training_run(tmp_path / "r"))
    with opened(browser, page, color_scheme=scheme) as tab:
        tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        ratios = tab.evaluate(CONTRAST)
        assert len(ratios) > 200
        assert min(ratios)[0] >= 4.5, min(ratios)
        paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(19, 22, 25)") == (scheme == "dark")


def test_on_a_phone_nothing_is_wider_than_the_screen(browser: Any, tmp_path: Path) -> None:
    table = {"title": "W", "caption": "", "columns": [f"column {i}" for i in range(12)], "rows": [list(range(12))]}
    pages = [
        write_report(training_run(tmp_path / "r")),
        write_report(comparison(tmp_path / "c", EVIL, tables=[table], title="wide" * 40)),
    ]
    for page in pages:
        with opened(browser, page) as tab:
            tab.set_viewport_size({"width": 390, "height": 844})
            assert tab.evaluate("document.documentElement.scrollWidth") == 390
            assert tab.locator(".scroll").first.evaluate("e => getComputedStyle(e).overflowX") == "auto"
            assert tab.locator(".card").first.bounding_box()["width"] <= 390


def test_without_javascript_the_tables_and_the_first_samples_are_there(browser: Any, tmp_path: Path) -> None:
    page = write_report(training_run(tmp_path / "r"))
    with opened(browser, page, java_script_enabled=False) as tab:
        assert tab.locator("table").first.is_visible()
        assert tab.get_by_text("The first 10 of 64 prompts; the others need JavaScript.").is_visible()
        assert tab.locator(".card").count() == 16, "ten of the held-out, six of training"


def test_of_ten_thousand_prompts_only_a_page_is_built(browser: Any, tmp_path: Path) -> None:
    texts = [f"a film that is number {i} of very many and has some more to say about it" for i in range(10_000)]
    page = write_report(comparison(tmp_path / "c", texts))
    assert page.stat().st_size < 15e6
    with opened(browser, page) as tab:
        tab.get_by_text("1 to 20 of 10,000 prompts").wait_for()
        tab.get_by_label("Sort by").select_option(label="gold, human-rm minus sft")
        tab.get_by_label("Find in prompts and responses").fill("number 99")
        tab.get_by_text("1 to 20 of 111 prompts").wait_for()
        assert prompts(tab)[0].startswith("prompt 99: ")
        assert tab.locator(".card").count() == 20
