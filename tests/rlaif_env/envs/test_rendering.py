"""What people see of an episode."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from rlaif_env import Scores
from rlaif_env.envs.rendering import BAR_HEIGHT, GOOD, INK, MARGIN, SIZE, Scene, Terminal, ansi, rgb_array
from rlaif_env.tables import printable

TEXT, TOKEN = "RLAIF/TextGeneration-v0", "RLAIF/TokenGeneration-v0"
both = pytest.mark.parametrize("id", [TEXT, TOKEN])
EOS = 1


def test_ansi_shows_prompt_response_reason_reward_and_parts() -> None:
    scene = Scene("t", "The film", "was good", "stop", 0.5, {"mass": np.float32(0.25), "label": "fine\nly"})
    assert ansi(scene, colour=False) == "The film was good\n[stop | reward +0.500 | mass 0.25 | label fine ly]"
    assert ansi(scene) == (
        "\x1b[2mThe film\x1b[0m was good\n[stop | \x1b[32mreward +0.500\x1b[0m | mass 0.25 | label fine ly]"
    )
    assert ansi(Scene("t", "The film", ""), colour=False) == "The film"
    assert (
        ansi(Scene("t", "Human: hi\n", " ho", "length", -1.0), colour=False)
        == "Human: hi\n ho\n[length | reward -1.000]"
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb", "a␛[2Jb"),  # would clear the screen
        ("a\x07\x00\x7fb", "a␇␀␡b"),
        ("a\x9bb", "a\ufffdb"),  # a control sequence of one byte
        ("a\ud800b", "a\ufffdb"),
        ("a\u202eb\u2066c", "a\ufffdb\ufffdc"),
        ("a\tb\nc é 日本 🎬", "a\tb\nc é 日本 🎬"),
    ],
)
def test_what_a_model_wrote_cannot_move_the_cursor(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert ansi(Scene("t", text, text), colour=False).count("\x1b") == 0


class Pieces(io.StringIO):
    """A stream that remembers its writes one by one."""

    def __init__(self, tty: bool = False) -> None:
        super().__init__()
        self.tty, self.pieces = tty, []

    def isatty(self) -> bool:
        return self.tty

    def write(self, text: str) -> int:
        if text:
            self.pieces.append(text)
        return super().write(text)


def test_a_terminal_writes_only_what_is_new() -> None:
    stream = Pieces()
    terminal = Terminal(stream)
    for response in ("", "one", "one", "one two"):
        terminal.show(Scene("t", "Count:", response))
    terminal.show(Scene("t", "Count:", "one two", "stop", 1.0))
    assert stream.pieces == ["Count:", " ", "one", " two", "\n[stop | reward +1.000]\n"]
    terminal.show(Scene("t", "Count:", ""))  # the next episode
    terminal.show(Scene("t", "Again:", ""))  # begun before that one was over
    assert stream.pieces[5:] == ["Count:", "\nAgain:"]


def test_a_terminal_waits_for_the_rest_of_a_character(byte_tokenizer: Any) -> None:
    stream = Pieces()
    terminal = Terminal(stream)
    ids = byte_tokenizer.encode("é日", add_special_tokens=False)
    for end in range(len(ids) + 1):
        terminal.show(Scene("t", "p ", byte_tokenizer.decode(ids[:end])))
    assert stream.pieces == ["p ", "é", "日"]
    terminal.show(Scene("t", "p ", byte_tokenizer.decode(ids[:-1]), "length", 0.0))  # it ended without the rest
    assert stream.getvalue().endswith("p é\ufffd\n[length | reward +0.000]\n")


def test_colours_only_on_a_terminal_that_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene("t", "p", "r", "stop", 1.0)
    monkeypatch.delenv("NO_COLOR", raising=False)
    for tty, no_colour, coloured in ((True, False, True), (False, False, False), (True, True, False)):
        if no_colour:
            monkeypatch.setenv("NO_COLOR", "1")
        stream = Pieces(tty)
        Terminal(stream).show(scene)
        assert ("\x1b[" in stream.getvalue()) == coloured


def test_a_terminal_of_few_characters_does_not_fail() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Terminal(stream).show(Scene("t", "café 日本", "très", "stop", 0.0))
    assert raw.getvalue() == b"caf? ?? tr?s\n[stop | reward +0.000]\n"


# --- pictures ---


def colour(name: str) -> tuple[int, ...]:
    return tuple(int(name[i : i + 2], 16) for i in (1, 3, 5))


def pixels(image: np.ndarray, name: str) -> np.ndarray:
    """Where an image has a colour."""
    found: np.ndarray = (image == colour(name)).all(axis=-1)
    return found


def test_a_picture_has_one_size_and_shows_the_response() -> None:
    empty, full = rgb_array(Scene("t", "prompt", "")), rgb_array(Scene("t", "prompt", "response"))
    for image in (empty, full):
        assert image.shape == (SIZE[1], SIZE[0], 3) and image.dtype == np.uint8 and image.flags.owndata
    assert pixels(full, INK).sum() > 50 > pixels(empty, INK).sum() == 0


def test_the_bar_is_as_long_as_the_reward() -> None:
    half = (SIZE[0] - MARGIN - 96 - MARGIN) // 2

    def length(reward: float) -> int:
        return int(pixels(rgb_array(Scene("t", "p", "r", "stop", reward)), GOOD).any(axis=0).sum())

    assert abs(length(0.5) - half / 2) <= 2 and abs(length(1.0) - half) <= 2
    assert length(7.0) == length(1.0) and length(-0.5) == 0
    below = rgb_array(Scene("t", "p", "r", "stop", -0.5))
    middle = MARGIN + half
    red = (below[:, :, 0] > 150) & (below[:, :, 1] < 120)
    assert red[:, : middle - 3].any() and not red[:, middle + 3 : SIZE[0] - 96].any()


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        ("word " * 3000, "x" * 4000),
        ("p", "W" * 500),
        ("p", "\n" * 300 + "end"),
        ("", "i" * 20_000),
        ("\t\t", "a b " * 90),
    ],
)
def test_long_text_stays_on_the_page(prompt: str, response: str) -> None:
    image = rgb_array(Scene("task", prompt, response, "stop", 0.1))
    paper = image[0, 0]
    marked = (image != paper).any(axis=-1)
    assert not marked[:, : MARGIN - 3].any() and not marked[:, SIZE[0] - MARGIN + 3 :].any()
    foot = SIZE[1] - MARGIN - BAR_HEIGHT - 48
    assert not marked[foot + 2 : foot + 9, :].any()  # the line between the dialogue and the bar
    assert (image[MARGIN + 34 : foot].max(axis=-1) < 100).any()  # the end of the response is what is left


def test_characters_of_the_font_are_drawn() -> None:
    def drawn(text: str) -> np.ndarray:
        return pixels(rgb_array(Scene("t", "", text)), INK)

    box = drawn("\U000f0000")
    for character in "éßΩЖא—“♥∑≤":
        assert drawn(character).any() and not np.array_equal(drawn(character), box), character


# --- through the environments ---


def scored(prompts: Sequence[str], responses: Sequence[str]) -> Scores:
    return Scores(np.full(len(responses), 0.5, dtype=np.float32), {"mass": np.full(len(responses), 0.25)})


@both
def test_modes_of_the_single_environment(id: str, toy: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    toy = {**toy, "reward": scored}
    words = [3, 4, EOS, 0, 0, 0]
    frames: dict[str, Any] = {}
    for mode in ("ansi", "human", "rgb_array"):
        env = gym.make(id, render_mode=mode, **toy)
        env.reset(options={"prompt_index": 1})
        before = env.render()
        for action in [words] if id == TEXT else words[:3]:
            env.step(np.array(action))
        frames[mode] = before, env.render()
    dim, plain = "\x1b[2m", "\x1b[0m"
    end = f"[stop | \x1b[32mreward +0.500{plain} | mass 0.25]"
    assert frames["ansi"] == (f"{dim}A good{plain}", f"{dim}A good{plain} the film\n{end}")
    assert frames["human"] == (None, None)
    assert capsys.readouterr().out == "A good the film\n[stop | reward +0.500 | mass 0.25]\n"
    assert (frames["rgb_array"][0] != frames["rgb_array"][1]).any()


@both
def test_modes_of_the_vector_environment(id: str, toy: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    toy = {**toy, "reward": scored}
    for autoreset in ("SameStep", "NextStep", "Disabled"):
        envs = gym.make_vec(id, num_envs=2, render_mode="ansi", autoreset_mode=autoreset, **toy)
        envs.reset(options={"prompt_index": [0, 1]}, seed=0)
        actions = np.array([[3, 4, EOS, 0, 0, 0], [4, 4, EOS, 0, 0, 0]])
        for step in [actions] if id == TEXT else actions.T[:3]:
            envs.step(step)
        first, second = envs.render()
        assert "The film was" in first and "the film\n[stop" in first  # the episode that ended, not the next prompt
        assert "A good" in second and "film film\n[stop" in second
    envs = gym.make_vec(id, num_envs=2, render_mode="human", **toy)
    envs.reset(options={"prompt_index": [0, 1]}, seed=0)
    for step in [actions] if id == TEXT else actions.T[:3]:
        envs.step(step)
    assert envs.render() is None
    assert capsys.readouterr().out == (
        "The film was the film\n[stop | reward +0.500 | mass 0.25]\n"
        "A good film film\n[stop | reward +0.500 | mass 0.25]\n"
    )


@both
def test_rendering_without_a_mode_warns(id: str, toy: dict[str, Any]) -> None:
    for env in (gym.make(id, **toy).unwrapped, gym.make_vec(id, **toy)):
        env.reset(seed=0)
        with pytest.warns(UserWarning, match="render needs a render_mode, found none"):
            assert env.render() is None


def test_frames_are_collected(toy: dict[str, Any]) -> None:
    env = gym.make(TOKEN, render_mode="rgb_array_list", **toy)
    env.reset(seed=0)
    env.step(3), env.step(EOS)
    frames: Any = env.render()
    assert len(frames) == 3 and all(frame.shape == (SIZE[1], SIZE[0], 3) for frame in frames)


def test_videos(toy: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("moviepy", reason="Gymnasium records videos with it")
    env = gym.wrappers.RecordVideo(gym.make(TOKEN, render_mode="rgb_array", **toy), str(tmp_path / "one"))
    env.reset(seed=0)
    for token in (3, 4, EOS):
        env.step(token)
    env.close()
    envs = gym.make_vec(TOKEN, num_envs=2, render_mode="rgb_array", autoreset_mode="NextStep", **toy)
    envs = gym.wrappers.vector.RecordVideo(envs, str(tmp_path / "many"), video_length=5)
    envs.reset(seed=0)
    for _ in range(6):
        envs.step(np.array([3, EOS]))
    envs.close()
    for folder in ("one", "many"):
        assert [path.stat().st_size > 1000 for path in (tmp_path / folder).glob("*.mp4")] == [True]
