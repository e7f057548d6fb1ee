"""``rlaif report``: one HTML page from the folder of a run, an evaluation or a comparison.

    folders      what a folder holds, read and checked
    samples      responses, in bounded memory
    findings     figures as tables, and what they amount to
    curves       learning curves as SVG
    page         the page; its template, style and script are page.html

The page is one file that loads nothing: it can be mailed, kept beside a paper and opened from disk in ten years.
"""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.report.folders import ROOM, read_folder
from benchmarks.report.page import pieces
from rlaif_env.api import RLAIFError

__all__ = ["SAMPLES", "build", "main", "write_report"]

SAMPLES = 10_000
"""Prompts of each set of samples that a page shows unless told otherwise."""


def build(folder: str | Path, *, samples: int = SAMPLES) -> str:
    """The page of a folder, as a string. See `write_report` for what it raises."""
    return "".join(pieces(read_folder(Path(folder), samples=samples)))


def write_report(folder: str | Path, out: str | Path | None = None, *, samples: int = SAMPLES) -> Path:
    """Write the page of a folder.

    Args:
        folder: Of a run, an evaluation or a comparison.
        out: The page; by default report.html in the folder. It is at every moment the old page or the new one.
        samples: Show at most so many prompts of each set of samples.

    Returns:
        The page's path.

    Raises:
        RLAIFError: If there is no such folder, it holds nothing that a report is made from, or the page cannot be
            written.
        DataError: If one of its files is not what its name says; names the file and the line.
    """
    report = read_folder(Path(folder), samples=samples)
    target = Path(out) if out is not None else Path(folder) / "report.html"
    partial = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    try:
        with partial.open("x", encoding="utf-8", newline="\n") as stream:
            stream.writelines(pieces(report))
        partial.replace(target)
    except OSError as error:
        raise RLAIFError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            partial.unlink()
    return target


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``rlaif report``; returns the exit code."""
    parser = argparse.ArgumentParser(prog="rlaif report", description="Write one HTML page from a folder's files.")
    commands = "rlaif train, sft, train-rm, label, evaluate or compare"
    parser.add_argument("folder", type=Path, help=f"the folder that {commands} wrote")
    parser.add_argument("--out", type=Path, help="the page; by default report.html in the folder")
    most = "show at most so many prompts of each set of samples, evenly spaced; the page says how many it left out, "
    most += f"and holds at most {ROOM / 1e6:.0f} MB of them in all (default: %(default)s)"
    parser.add_argument("--samples", type=int, default=SAMPLES, metavar="N", help=most)
    config = parser.parse_args(argv)
    page = write_report(config.folder, config.out, samples=config.samples)
    print(f"{page} ({page.stat().st_size / 1e6:.1f} MB)")
    return 0
