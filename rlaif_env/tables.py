"""Tables as values, and as a terminal, Markdown and JSON show them; text of others made safe to show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rlaif_env.api import DataError

if TYPE_CHECKING:
    from rich.table import Table as RichTable

Cell = str | int | float | None
"""What a table holds; None is shown as a dash and sorted last."""

_SHOWN = 300  # characters of a text in a table of samples


def is_number(value: object) -> bool:
    """Whether a JSON value is a number that a float can hold; true and false are none, and neither is 1e999."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def count_of(number: int, noun: str) -> str:
    """A number of things in words: "1 prompt", "2 prompts"."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def printable(text: str) -> str:
    """The text with control characters, lone surrogates and direction overrides made visible; newlines, tabs stay."""
    return "".join(map(_sign, text))


def _sign(character: str) -> str:
    code = ord(character)
    if code < 0x20 and character not in "\n\t":
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if 0x80 <= code < 0xA0 or 0xD800 <= code < 0xE000 or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069:
        return "\ufffd"
    return character


@dataclass(frozen=True)
class Table:
    """A table."""

    title: str  # its heading
    columns: Sequence[str]  # k names
    rows: Sequence[Sequence[Cell]]  # each of k cells
    caption: str = ""  # a sentence below the heading; may be ""
    # Decimals are chosen for each row, where rows are on different scales, and not for each column
    by_row: bool = False

    def to_json(self) -> dict[str, Any]:
        """The table as JSON holds it; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any, where: str) -> Table:
        """A table as its JSON says it, checked.

        Args:
            value: A JSON value.
            where: File and place, for the message.

        Raises:
            DataError: If it is no table.
        """
        if not isinstance(value, dict):
            raise DataError(f"{where}: expected an object, found {type(value).__name__}")
        columns, rows = value.get("columns"), value.get("rows")
        if not isinstance(columns, list) or not all(isinstance(c, str) for c in columns):
            raise DataError(f"{where}: expected columns to be a list of names, found {str(columns)[:60]!r}")
        if not isinstance(rows, list):
            raise DataError(f"{where}: expected rows to be a list, found {type(rows).__name__}")
        for i, row in enumerate(rows, start=1):
            if not isinstance(row, list) or len(row) != len(columns):
                raise DataError(f"{where}, row {i}: expected {len(columns)} cells, found {str(row)[:60]!r}")
            if bad := [c for c in row if not (c is None or isinstance(c, str) or is_number(c))]:
                raise DataError(f"{where}, row {i}: expected text, finite numbers and null, found {str(bad[0])[:60]!r}")
        title, caption = str(value.get("title", "")), str(value.get("caption", "") or "")
        return cls(title, columns, rows, caption, value.get("by_row") is True)

    def markdown(self, *, heading: bool = True) -> str:
        """The table, under a heading of the second level where it has one, its caption below it."""

        def line(cells: Sequence[Cell]) -> str:
            return "| " + " | ".join(_text(cell).replace("|", "\\|") for cell in cells) + " |"

        lines = [line(self.columns), "|" + "---|" * len(self.columns), *map(line, self.rows)]
        title, caption = f"## {self.title}\n\n" if heading else "", f"\n\n{self.caption}" if self.caption else ""
        return title + "\n".join(lines) + caption

    def rich(self, **options: Any) -> RichTable:
        """The table for a terminal: the first column left, the others right; nothing is read as markup or cut.

        Args:
            options: Of `rich.table.Table`.
        """
        from rich.table import Table as RichTable
        from rich.text import Text

        heading: Mapping[str, Any] = {"title_justify": "left", "caption_justify": "left"}
        caption = Text(self.caption) if self.caption else None
        shown = RichTable(title=Text(self.title), caption=caption, **{**heading, **options})
        for i, column in enumerate(self.columns):
            shown.add_column(Text(column), justify="left" if i == 0 else "right", overflow="fold")
        for row in self.rows:
            shown.add_row(*(Text(printable(_text(cell))) for cell in row))
        return shown


def side_by_side(title: str, prompts: Sequence[str], responses: Mapping[str, Sequence[str]]) -> RichTable:
    """Responses of several systems to the same prompts, for a terminal: a row a prompt.

    Of a long prompt the end is shown, of a long response the beginning; an ellipsis stands for the rest.

    Args:
        title: Its heading.
        prompts: n prompts.
        responses: By system, n responses or more.
    """
    systems = zip(*responses.values(), strict=False)
    rows = [[_end(prompt), *map(_beginning, texts)] for prompt, texts in zip(prompts, systems, strict=False)]
    shown = Table(title, ["prompt", *responses], rows).rich(show_lines=True)
    for column in shown.columns:
        column.justify, column.ratio = "left", 1
    return shown


def _end(text: str) -> str:
    text = text.strip()
    return text if len(text) <= _SHOWN else "…" + text[1 - _SHOWN :]


def _beginning(text: str) -> str:
    text = text.strip()
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _text(cell: Cell) -> str:
    return "-" if cell is None else str(cell)
