"""Code that a user names, ``package.module:name`` or ``path/file.py:name``: loaded, and told apart by content.

A file is imported under a private name, and again when its content is another; no folder is put on the path for it and
nothing is written beside it. Modules of the working directory are found too, after all others.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from rlaif_env.api import RLAIFError
from rlaif_env.files import content_of


def load_reference(text: str) -> Any:
    """What ``package.module:name`` or ``path/file.py:name`` stands for; the module or file is imported.

    Raises:
        RLAIFError: If the text is neither, there is no such module, file or name, or the import fails.
    """
    place, _, name = text.rpartition(":")
    if not _is_reference(text):
        raise RLAIFError(f"expected package.module:name or path/file.py:name, found {text!r}")
    try:
        module = _of_file(Path(place).expanduser()) if place.endswith(".py") else _of_path(place)
    except RLAIFError:
        raise
    except Exception as error:  # whatever the code does while it is imported
        raise RLAIFError(f"cannot import {place}: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        own = [
            key
            for key, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", "") == module.__name__ and not key.startswith("_")
        ]
        raise RLAIFError(f"expected {name!r} in {place}, found {', '.join(own) or 'no function or class'} there")
    return getattr(module, name)


def code_in(value: Any) -> dict[str, str]:
    """Hashes of the files that references anywhere in nested settings name, keys included; nothing is imported.

    A module stands for its own file, not for those that it imports.
    """
    if isinstance(value, Mapping):
        return {text: content for pair in value.items() for part in pair for text, content in code_in(part).items()}
    if isinstance(value, list | tuple):
        return {text: content for part in value for text, content in code_in(part).items()}
    if not isinstance(value, str) or not _is_reference(value):
        return {}
    place = value.rpartition(":")[0]
    file = Path(place).expanduser() if place.endswith(".py") else _file_of(place)
    return {value: content_of(file)} if file is not None and os.path.isfile(file) else {}


def _is_reference(text: str) -> bool:
    place, _, name = text.rpartition(":")
    return name.isidentifier() and (place.endswith(".py") or all(part.isidentifier() for part in place.split(".")))


@contextmanager
def _working_directory() -> Iterator[None]:
    """Modules of the working directory are found, after all others."""
    here = os.getcwd()
    added = [] if {here, ""} & {*sys.path} else [here]
    importlib.invalidate_caches()  # a file may be newer than what is known of its folder
    sys.path.extend(added)
    try:
        yield
    finally:
        for path in added:
            with suppress(ValueError):
                sys.path.remove(path)


def _file_of(module: str) -> Path | None:
    """The file of a module, found without importing the packages that it is in."""
    first, *rest = module.split(".")
    with _working_directory(), suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(first)
        for part in rest:
            if spec is None or spec.submodule_search_locations is None:
                return None
            spec = PathFinder.find_spec(f"{spec.name}.{part}", spec.submodule_search_locations)
        return None if spec is None or spec.origin is None else Path(spec.origin)
    return None


def _of_path(name: str) -> ModuleType:
    with _working_directory():
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # it is there, and imports another that is not
            raise RLAIFError(
                f"found no module {error.name!r} among those installed, in PYTHONPATH and in {os.getcwd()}; a file is "
                "named by its path, such as path/file.py:name"
            ) from None


def _of_file(path: Path) -> ModuleType:
    if not os.path.isfile(path):
        raise RLAIFError(f"expected a file of Python at {path.absolute()}, found none")
    path, source = path.resolve(), path.read_bytes()
    name = f"_rlaif_{path.stem}_{hashlib.sha256(os.fsencode(path) + source).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path, loader=_Source(name, str(path), source))
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # data classes look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


class _Source(SourceFileLoader):
    """Imports the very bytes whose hash is known: byte code, told apart by seconds, is neither read nor written."""

    def __init__(self, name: str, path: str, source: bytes) -> None:
        super().__init__(name, path)
        self._source = source

    def path_stats(self, path: str) -> Mapping[str, Any]:
        raise OSError

    def get_data(self, path: str) -> bytes:
        return self._source
