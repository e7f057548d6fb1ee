"""Pictures of an episode: ``ansi`` text, a live terminal for ``human``, an image for ``rgb_array``.

All three draw a `Scene`. What a model wrote is shown, never obeyed: control characters become visible signs, so that no
response can move the cursor of the terminal it is printed in.
"""

from __future__ import annotations

import os
import sys
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
from numpy.typing import NDArray

from rlaif_env.tables import printable

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

DIM, BOLD, GREEN, RED, PLAIN = "\x1b[2m", "\x1b[1m", "\x1b[32m", "\x1b[31m", "\x1b[0m"


@dataclass(frozen=True)
class Scene:
    """What there is to see of an episode."""

    task: str  # its name
    prompt: str
    response: str  # so far
    finish_reason: str | None = None  # "stop" or "length"; None while the episode goes on
    reward: float | None = None  # None while the episode goes on, and where there is none
    parts: Mapping[str, Any] = field(default_factory=dict)  # what the backend gave beside the reward


def ansi(scene: Scene, *, colour: bool = True) -> str:
    """The episode as text: prompt dimmed, response, and at its end the finish reason, the reward and its parts."""
    prompt, response = printable(scene.prompt), printable(scene.response)
    text = (f"{DIM}{prompt}{PLAIN}" if colour else prompt) + _gap(prompt, response) + response
    return text if scene.finish_reason is None else f"{text}\n{_end_line(scene, colour)}"


def _gap(prompt: str, response: str) -> str:
    """What keeps a response from its prompt where neither has a space."""
    return "" if not response or prompt[-1:].isspace() or response[0].isspace() else " "


def _end_line(scene: Scene, colour: bool) -> str:
    facts = [str(scene.finish_reason)]
    if scene.reward is not None:
        reward = f"reward {scene.reward:+.3f}"
        facts.append(f"{GREEN if scene.reward >= 0 else RED}{reward}{PLAIN}" if colour else reward)
    facts += _parts(scene)
    return "[" + " | ".join(facts) + "]"


def _parts(scene: Scene) -> list[str]:
    return [f"{name} {_short(value)}" for name, value in scene.parts.items()]


def _short(value: Any) -> str:
    if isinstance(value, float | np.floating):
        return f"{float(value):.3g}"
    if isinstance(value, np.ndarray):
        return "[" + " ".join(_short(item) for item in value.ravel()[:10]) + (" …]" if value.size > 10 else "]")
    return printable(str(value)).replace("\n", " ")


class Terminal:
    """Shows episodes live: each call writes what is new since the last.

    Args:
        stream: Where to; None is the standard output of the moment. Colours only where it is a terminal and NO_COLOR is
            not set.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._prompt: str | None = None
        self._written = ""

    def show(self, scene: Scene) -> None:
        """Write what is new in the scene; a different prompt or a finished episode begins a new line."""
        stream = self._stream or sys.stdout
        colour = stream.isatty() and "NO_COLOR" not in os.environ
        prompt, response = printable(scene.prompt), printable(scene.response)
        if scene.finish_reason is None:
            response = response.rstrip("\ufffd")  # the first bytes of a character whose rest is still to come
        if self._prompt != prompt or not response.startswith(self._written):
            self._write(stream, ("\n" if self._prompt is not None else "") + ansi(Scene("", prompt, ""), colour=colour))
            self._prompt, self._written = prompt, ""
        if not self._written:
            self._write(stream, _gap(prompt, response))
        self._write(stream, response[len(self._written) :])
        self._written = response
        if scene.finish_reason is not None:
            self._write(stream, "\n" + _end_line(scene, colour) + "\n")
            self._prompt, self._written = None, ""
        stream.flush()

    @staticmethod
    def _write(stream: TextIO, text: str) -> None:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        stream.write(text.encode(encoding, "replace").decode(encoding))


SIZE = (800, 450)
"""Width and height in pixels: one size for every frame, both even, as video encoders want them."""

MARGIN, BAR_HEIGHT = 24, 16
TEXT_SIZES = (22, 19, 16, 13, 11)
MOST_SHOWN = 6000
"""More characters than a page holds even in the smallest size."""

PAPER, INK, FAINT, LINE, GOOD, BAD = "#fbfaf7", "#1c1b19", "#77736b", "#dcd8cf", "#3b8f5a", "#c0503f"


def rgb_array(scene: Scene) -> NDArray[np.uint8]:
    """The episode as a picture (450, 800, 3) uint8: the dialogue in wrapped lines, below it the reward from -1 to 1.

    Text too long for the page gets smaller, then loses its first lines. What the font (DejaVu Sans) lacks is a box.
    """
    from PIL import Image, ImageDraw

    image = Image.new("RGB", SIZE, PAPER)
    draw = ImageDraw.Draw(image)
    foot = SIZE[1] - MARGIN - BAR_HEIGHT - 48
    _draw_head(draw, scene)
    _draw_dialogue(draw, scene, top=MARGIN + 34, bottom=foot - 4)
    _draw_reward(draw, scene, top=foot + 12)
    return np.asarray(image, dtype=np.uint8).copy()


def _font(size: int, bold: bool = False) -> FreeTypeFont:
    import matplotlib
    from PIL import ImageFont

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)


def _draw_head(draw: ImageDraw, scene: Scene) -> None:
    draw.text((MARGIN, MARGIN - 6), printable(scene.task), font=_font(14, bold=True), fill=FAINT)
    state = {None: "writing", "stop": "ended by EOS", "length": "ended by token budget"}.get(scene.finish_reason, "")
    draw.text((SIZE[0] - MARGIN, MARGIN - 6), state, font=_font(14), fill=FAINT, anchor="ra")
    draw.line((MARGIN, MARGIN + 20, SIZE[0] - MARGIN, MARGIN + 20), fill=LINE)


def _draw_dialogue(draw: ImageDraw, scene: Scene, top: int, bottom: int) -> None:
    width = SIZE[0] - 2 * MARGIN
    prompt, response = (printable(text)[-MOST_SHOWN:].replace("\t", "    ") for text in (scene.prompt, scene.response))
    for size in TEXT_SIZES:
        font = _font(size)
        height = round(size * 1.4)
        lines = [(line, FAINT) for line in _wrapped(prompt, font, width)]
        lines += [(line, INK) for line in _wrapped(response, font, width)] if response else []
        room = (bottom - top) // height
        if len(lines) <= room:
            break
    else:
        lines = [("…", FAINT), *lines[len(lines) - room + 1 :]]
    for i, (line, colour) in enumerate(lines):
        draw.text((MARGIN, top + i * height), line, font=font, fill=colour)


def _wrapped(text: str, font: FreeTypeFont, width: int) -> Iterator[str]:
    """Lines of at most a width in pixels, broken at spaces and, where a word is longer than a line, inside it."""
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if font.getlength(longer) <= width:
                line = longer
                continue
            if line:
                yield line
            while font.getlength(word) > width:
                fits = _fitting(word, font, width)
                yield word[:fits]
                word = word[fits:]
            line = word
        yield line


def _fitting(word: str, font: FreeTypeFont, width: int) -> int:
    """How many of a word's first characters fit, at least one."""
    return max(1, bisect_right(range(1, len(word) + 1), float(width), key=lambda n: font.getlength(word[:n])))


def _draw_reward(draw: ImageDraw, scene: Scene, top: int) -> None:
    left, right = MARGIN, SIZE[0] - MARGIN - 96
    middle = (left + right) // 2
    draw.rounded_rectangle((left, top, right, top + BAR_HEIGHT), radius=4, fill="#efece5", outline=LINE)
    if scene.reward is not None:
        clipped = float(np.clip(scene.reward, -1.0, 1.0))
        start, end = sorted((middle, middle + round(clipped * (right - left) / 2)))
        colour, place = GOOD if clipped >= 0 else BAD, (SIZE[0] - MARGIN, top + BAR_HEIGHT // 2)
        draw.rectangle((start, top + 1, end, top + BAR_HEIGHT - 1), fill=colour)
        draw.text(place, f"{scene.reward:+.3f}", font=_font(18), fill=INK, anchor="rm")
    draw.line((middle, top - 3, middle, top + BAR_HEIGHT + 3), fill=FAINT)
    small = _font(11)
    for x, label, anchor in ((left, "-1", "la"), (middle, "0", "ma"), (right, "+1", "ra")):
        draw.text((x, top + BAR_HEIGHT + 4), label, font=small, fill=FAINT, anchor=anchor)
    if parts := " · ".join(_parts(scene)):
        font = _font(12)
        line = next(_wrapped(parts, font, SIZE[0] - 2 * MARGIN))
        draw.text((left, top + BAR_HEIGHT + 22), line + (" …" if line != parts else ""), font=font, fill=FAINT)
