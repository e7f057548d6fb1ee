"""What stands for the content of files and folders."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from rlaif_env.files import content_of, file_sha256


def test_a_content_is_that_of_names_and_bytes_wherever_it_lies(tmp_path: Path) -> None:
    one = tmp_path / "one"
    (one / "sub").mkdir(parents=True)
    (one / "a").write_bytes(b"x" * (1 << 21) + b"y")
    (one / "sub" / "b").write_text("b")
    assert file_sha256(one / "a") == hashlib.sha256((one / "a").read_bytes()).hexdigest()
    assert content_of(one / "a") == f"sha256:{file_sha256(one / 'a')}"
    known = content_of(one)
    shutil.copytree(one, tmp_path / "two")
    assert content_of(tmp_path / "two") == content_of(str(tmp_path / "two")) == known != content_of(one / "sub")
    (one / "sub" / "b").rename(one / "sub" / "c")
    renamed = content_of(one)
    (one / "sub" / "c").write_text("d")
    assert len({known, renamed, content_of(one)}) == 3


def test_a_run_is_known_by_what_it_left_and_a_name_by_itself(tmp_path: Path) -> None:
    for part in ("model", "policy"):
        (tmp_path / part / part).mkdir(parents=True)
        (tmp_path / part / part / "weights").write_text(part)
        (tmp_path / part / "metrics.jsonl").write_text("{}")
        assert content_of(tmp_path / part) == content_of(tmp_path / part / part)
    for name in ("smollm2-135m-instruct", "org/model", "\0", "a long template\n" * 1000):
        assert content_of(name) == name
