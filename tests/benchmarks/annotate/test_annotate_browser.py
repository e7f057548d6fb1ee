"""The page in a real browser: judged by keyboard, reloaded, undone, killed under, audited; then a reward model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.annotate.results import export, people_of
from benchmarks.annotate.store import Store
from rewards.reward_model.data import load_labels
from rewards.reward_model.training import RewardModelConfig, train_rm
from rlaif_env.data.preferences import read_preferences
from rlaif_env.data.tasks import load_task
from tests.benchmarks.annotate.test_annotate_command import link_of, pair_file, serving
from tests.benchmarks.annotate.test_annotate_server import HOSTILE
from tests.tiny import tiny_backbone

pytestmark = pytest.mark.slow

playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright drives the browser")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        result = driver.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield result
        result.close()


def open_page(browser: Any, link: str, **settings: Any) -> tuple[Any, list[str]]:
    """A page of a window of its own, and what went wrong on it."""
    page = browser.new_context(**{"viewport": DESKTOP, **settings}).new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("dialog", lambda dialog: problems.append(f"dialog {dialog.message}"))
    page.goto(link)
    return page, problems


def begin(page: Any, name: str) -> None:
    page.wait_for_selector("#join:not([hidden])")
    page.keyboard.type(name)
    page.keyboard.press("Enter")
    page.wait_for_selector("#judge:not([hidden])")


def counted(page: Any, n: int, total: int) -> None:
    """Wait until the page says that so many answers are kept."""
    page.wait_for_function(
        "([n, t]) => document.getElementById('count').textContent === `${n} of ${t}`", arg=[n, total]
    )


def press_better(page: Any) -> None:
    page.keyboard.press("1" if page.inner_text("#text-0").startswith("good") else "2")


def test_twenty_items_by_keyboard_to_a_reward_model(browser: Any, tmp_path: Path) -> None:
    out = tmp_path / "people"
    options = ["--input", pair_file(tmp_path / "pairs.jsonl"), "--out", out, "--port", 0, "--repeats", 0, "--checks", 0]
    with serving(*options) as (_, lines):
        page, problems = open_page(browser, link_of(lines))
        begin(page, "Ada")
        for done in range(20):
            counted(page, done, 20)
            if done == 7:
                before = page.inner_text("#prompt")
                page.reload()
                counted(page, 7, 20)
                assert page.inner_text("#prompt") == before
            if done == 12:
                page.keyboard.press("u")
                counted(page, 11, 20)
                assert "Your answer was" in page.inner_text("#before")
                page.keyboard.press("?")
                assert page.is_visible("#help")
                page.keyboard.press("1")  # answers nothing while the help is open
                page.keyboard.press("Escape")
                press_better(page)
                counted(page, 12, 20)
            if done == 15:
                page.keyboard.press("c")
                page.keyboard.type("1 and 2 are letters here")
                page.keyboard.press("Escape")
            press_better(page)
        page.wait_for_selector("#done:not([hidden])")
        assert "You gave 20 answers" in page.inner_text("#done-text")
        page.keyboard.press("u")
        counted(page, 19, 20)
        press_better(page)
        page.wait_for_selector("#done:not([hidden])")
        assert problems == []
        page.context.close()
    store = Store(out / "annotations.sqlite")
    people = people_of(store)
    assert export(store, people, tmp_path / "preferences.jsonl") == (20, 0)
    assert {record.p_first for record in read_preferences(tmp_path / "preferences.jsonl")} == {1.0}
    answer_to = [judgement.comment for judgement in people.everything if judgement.comment]
    assert answer_to == ["1 and 2 are letters here"]
    assert {judgement.swapped for judgement in people.everything} == {True, False}
    store.close()

    task = load_task({**FILM, "source": {"prompts": ["unused"]}})
    data = load_labels(task, tmp_path / "preferences.jsonl", pairs=100, texts=0, test_pairs=100, seed=0)
    trained = train_rm(RewardModelConfig(layers=1), tiny_backbone(), task, data)
    assert trained.model.labels.provenance == "human"
    assert trained.model.name.startswith("human-rm")
    scores = trained.model.score(["Film 1 is"] * 2, ["good and warm 1", "a bad idea 1"]).values
    assert scores[0] > scores[1]


FILM = {
    "name": "film",
    "kind": "continuation",
    "criterion": "how good the film sounds",
    "max_prompt_tokens": 32,
    "max_response_tokens": 32,
}


def test_the_page_waits_for_a_killed_server_and_sends_its_answer_once(browser: Any, tmp_path: Path) -> None:
    options = ["--input", pair_file(tmp_path / "pairs.jsonl", 3), "--out", tmp_path / "people"]
    options += ["--checks", 0, "--repeats", 0]
    with serving(*options, "--port", 0) as (server, lines):
        link = link_of(lines)
        page, _ = open_page(browser, link)
        begin(page, "Ada")
        press_better(page)
        counted(page, 1, 3)
        server.send_signal(signal.SIGKILL)
        server.wait()
        press_better(page)
        page.wait_for_selector("#notice:not([hidden])")
        assert "Not saved yet" in page.inner_text("#notice")
    port = link.rpartition(":")[2].strip("/")
    with serving(*options, "--port", port):
        counted(page, 2, 3)
        assert page.is_hidden("#notice")
        page.context.close()
    store = Store(tmp_path / "people" / "annotations.sqlite")
    assert [judgement.p_first for judgement in store.judgements()] == [1.0, 1.0]
    store.close()


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_hostile_text_is_shown_as_text_and_breaks_nothing(browser: Any, viewport: Any, tmp_path: Path) -> None:
    rows = [{"prompt": text[:90], "response_1": text, "response_2": f"{text} !"} for text in HOSTILE]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = ["--input", tmp_path / "pairs.jsonl", "--out", tmp_path / "people", "--port", 0]
    with serving(*options, "--checks", 0, "--repeats", 0) as (_, lines):
        page, problems = open_page(browser, link_of(lines), viewport=viewport)
        scripts = page.evaluate("document.scripts.length")
        begin(page, "<b>Ada</b>")
        assert page.inner_text("#who") == "<b>Ada</b>"
        for done in range(len(HOSTILE)):
            counted(page, done, len(HOSTILE))
            for marked in (False, True):
                if marked:
                    page.keyboard.press("d")
                shown = {page.evaluate(f"document.getElementById('text-{i}').textContent") for i in (0, 1)}
                assert {text.removesuffix(" !") for text in shown} <= set(HOSTILE)
                assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
                box = page.locator("#choices").bounding_box()
                assert 0 <= box["y"] and box["y"] + box["height"] <= viewport["height"]
                assert page.evaluate("document.querySelectorAll('#judge img, #judge script, #judge b').length") == 0
            page.keyboard.press("d")
            page.keyboard.press("0")
        page.wait_for_selector("#done:not([hidden])")
        assert page.evaluate("document.scripts.length") == scripts
        assert problems == []
        page.context.close()


@pytest.mark.parametrize("form, keys, values", [("score", "30s", ["3", "10", "skip"]), ("harmless", "12s", None)])
def test_the_rating_forms(form: str, keys: str, values: list[str] | None, browser: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "system": "a", "response": f"text {i}"} for i in range(3)]
    (tmp_path / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = ["--input", tmp_path / "responses.jsonl", "--out", tmp_path / "people", "--port", 0, "--form", form]
    with serving(*options, "--checks", 0, "--repeats", 0) as (_, lines):
        page, problems = open_page(browser, link_of(lines))
        begin(page, "Ada")
        for done, key in enumerate(keys):
            counted(page, done, 3)
            page.keyboard.press(key)
        page.wait_for_selector("#done:not([hidden])")
        assert problems == []
        page.context.close()
    store = Store(tmp_path / "people" / "annotations.sqlite")
    assert [judgement.choice for judgement in store.judgements()] == (values or ["1", "2", "skip"])
    store.close()


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of axe-core: of the file that AXE_CORE names, or from npm."""
    if named := os.environ.get("AXE_CORE"):
        return Path(named).read_text(encoding="utf-8")
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed, and AXE_CORE names no axe.min.js")
    folder = tmp_path_factory.mktemp("axe")
    done = subprocess.run(["npm", "pack", "axe-core"], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"npm pack axe-core: {done.stderr.strip()[-200:]}")
    with tarfile.open(next(folder.glob("*.tgz"))) as packed:
        member = packed.extractfile("package/axe.min.js")
        assert member is not None
        return member.read().decode()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_in_any_view(scheme: str, browser: Any, axe: str, tmp_path: Path) -> None:
    options = ["--input", pair_file(tmp_path / "pairs.jsonl", 2), "--out", tmp_path / "people", "--port", 0]
    with serving(*options, "--checks", 0, "--repeats", 0) as (_, lines):
        for viewport in (DESKTOP, PHONE):
            page, problems = open_page(browser, link_of(lines), viewport=viewport, color_scheme=scheme)
            page.evaluate(axe)
            views = []

            def audit(name: str, page: Any = page, views: list[str] = views) -> None:
                result = page.evaluate("axe.run(document)")
                assert len(result["passes"]) > 10
                bad = [f"{v['id']} ({v['impact']}): {v['nodes'][0]['html'][:80]}" for v in result["violations"]]
                assert bad == [], name
                assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
                views.append(name)

            page.wait_for_selector("#join:not([hidden])")
            audit("join")
            begin(page, f"Ada {viewport['width']}")
            audit("judge")
            page.keyboard.press("d")
            page.keyboard.press("t")
            audit("differences and strength")
            press_better(page)
            counted(page, 1, 2)
            page.keyboard.press("u")
            counted(page, 0, 2)
            audit("taken back")
            page.keyboard.press("?")
            audit("help")
            page.keyboard.press("Escape")
            for done in (1, 2):
                press_better(page)
                counted(page, done, 2)
            audit("done")
            assert len(views) == 6
            assert problems == []
            page.context.close()
