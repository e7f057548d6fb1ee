"""Files: written so that a crash cannot leave them half done; told apart by content; those that come with a package.

The system's errors are raised as they are; the caller explains them.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.resources import files
from pathlib import Path
from typing import Any, BinaryIO

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def package_data(package: str, name: str) -> dict[str, Any]:
    """What stands in a TOML file of a package."""
    return tomllib.loads(files(package).joinpath(name).read_text(encoding="utf-8"))


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file beside ``path`` to write to, synced and put in its place when the block ends without an error."""
    partial = path.with_name(f".{path.name}-{secrets.token_hex(4)}.partial")
    file = partial.open("xb")
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def content_of(source: str | Path) -> str:
    """What stands for the content of a file, or of all files of a folder: a hash; any other name stands for itself.

    A run's folder is known by the model or policy that it left: its logs decide nothing.
    """
    path = Path(source).expanduser()
    if os.path.isfile(path):  # no error for a text that is too long to be a path
        return f"sha256:{file_sha256(path)}"
    if not os.path.isdir(path):
        return str(source)
    path = next((path / part for part in ("policy", "model") if (path / part).is_dir()), path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = "".join(f"{file.relative_to(path).as_posix()}\0{file_sha256(file)}\n" for file in files)
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def sync(path: Path) -> None:
    """Have the disk hold what a file, or a folder's list of names, says."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
