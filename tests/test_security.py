"""What docs/security.md promises: nothing that is read can run code, leave its folder, or move a terminal's cursor."""

from __future__ import annotations

import ast
import gzip
import html
import inspect
import io
import json
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from rewards.endpoint.model import EndpointLM
from rewards.prompts import fill
from rlaif_env import cli, models
from rlaif_env.api import AssetError, RLAIFError
from rlaif_env.data.tasks import load_task
from rlaif_env.models import assets, fetching
from rlaif_env.runs import RunFolder
from rlaif_env.servers.cache import AnswerCache
from rlaif_env.servers.client import EndpointClient
from rlaif_env.servers.limits import Limits
from rlaif_env.servers.transport import RequestFailed
from tests import ROOT
from tests.tiny import tiny_backbone

FOLDERS = ("rlaif_env", "rewards", "agents", "benchmarks", "examples")

# --- nothing runs code ------------------------------------------------------------------------------------------------

UNPICKLING = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}
FORBIDDEN = {
    *("eval", "exec", "compile", "__import__", "torch.load", "np.load", "numpy.load", "os.system", "os.popen"),
}
UNPACKING = {"extractall", "unpack_archive", "load_extension", "enable_load_extension"}  # whatever they belong to


def sources() -> list[Path]:
    return [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]


def dangers(code: str) -> Iterator[str]:
    """What in a module could run code or unpack anywhere, each with its line."""
    for node in ast.walk(ast.parse(code)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "").partition(".")[0]]
        if found := UNPICKLING.intersection(names):
            yield f"line {node.lineno}: import of {found.pop()}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        last = called.rpartition(".")[2]
        if called in FORBIDDEN or last in UNPACKING:
            yield f"line {node.lineno}: {called}"
        for keyword in node.keywords:
            if keyword.arg in ("shell", "trust_remote_code", "allow_pickle") and ast.unparse(keyword.value) == "True":
                yield f"line {node.lineno}: {keyword.arg}=True"


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_module_unpickles_evaluates_or_trusts_remote_code(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = {str(file): list(dangers(file.read_text(encoding="utf-8"))) for file in files}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import yaml",
        "eval(text)",
        "import torch\ntorch.load(f, weights_only=True)",
        "np.load(f, allow_pickle=True)",
        "subprocess.run(c, shell=True)",
        "tar.extractall(folder)",
        "from_pretrained(x, trust_remote_code=True)",
    ],
)
def test_the_scan_sees_what_it_looks_for(code: str) -> None:
    assert list(dangers(code))


def test_remote_code_runs_only_for_a_caller_of_backbone_who_says_so(tmp_path: Path) -> None:
    assert inspect.signature(models.backbone).parameters["trust_remote_code"].default is False
    folder, ran = tmp_path / "model", tmp_path / "ran"
    tiny_backbone().save_merged(None, folder)
    code = (
        f"from transformers import LlamaConfig\nopen({str(ran)!r}, 'w')\nclass C(LlamaConfig):\n    model_type = 'c'\n"
    )
    (folder / "own.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "c", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.C"}}
    (folder / "config.json").write_text(json.dumps(config))
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    tokens |= {"auto_map": {"AutoTokenizer": ["own.C", "own.C"]}, "tokenizer_class": "C"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    for call in (models.logit_width, models.load_tokenizer, models.backbone):
        try:
            call(folder)
        except RLAIFError:
            pass
        assert not ran.exists(), call.__name__
    with pytest.raises(RLAIFError, match="unknown model"):
        models.logit_width(folder)


def test_weights_are_written_as_safetensors_and_everything_else_as_text(tmp_path: Path) -> None:
    from tests.rewards.reward_model.test_reward_model import HUMAN, reward_model

    base = tiny_backbone()
    base.save_merged(None, tmp_path / "policy")
    reward_model(base, HUMAN).save(tmp_path / "rm")
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".md", ".jinja"}
    assert any(file.suffix == ".safetensors" for file in files)
    for file in files:
        assert not file.read_bytes().startswith((b"\x80", b"PK"))  # a pickle, or the zip that torch.save writes


@pytest.mark.parametrize(
    "template",
    ["{prompt.__class__}", "{prompt[0]}", "{prompt!r}", "{prompt:>999999999}", "{prompt:{response}}", "{}", "{0}", "{"],
)
def test_a_template_has_places_and_nothing_else(template: str) -> None:
    with pytest.raises(RLAIFError, match=r"expected a template with the places \{prompt\}, \{response\} only"):
        fill(template, prompt="p", response="r")


def test_a_template_is_filled_once() -> None:
    assert fill("{prompt} {{x}} {response}", prompt="{response}", response="r") == "{response} {x} r"


# --- archives ---------------------------------------------------------------------------------------------------------

NAME, CONTENT = "thing/data.txt", b"some data\n" * 9


def tar_with(*members: tuple[str, bytes, bytes, str]) -> bytes:
    """A packed archive of members: name, kind, content, where a link leads."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, kind, content, link in members:
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = kind, len(content), link
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


GOOD = tar_with((NAME, tarfile.REGTYPE, CONTENT, ""))
BOMB = tar_with((NAME, tarfile.REGTYPE, bytes(fetching.MEMBER_LIMIT + 1), ""))
TARS: dict[str, bytes] = {
    "a symbolic link out": tar_with((NAME, tarfile.SYMTYPE, b"", "/etc/hosts")),
    "a hard link out": tar_with((NAME, tarfile.LNKTYPE, b"", "../../etc/hosts")),
    "a device": tar_with((NAME, tarfile.CHRTYPE, b"", "")),
    "a pipe": tar_with((NAME, tarfile.FIFOTYPE, b"", "")),
    "a folder": tar_with((NAME, tarfile.DIRTYPE, b"", "")),
    "an absolute path": tar_with(("/" + NAME, tarfile.REGTYPE, CONTENT, "")),
    "a path that leads out": tar_with(("../" + NAME, tarfile.REGTYPE, CONTENT, "")),
    "larger than any member": BOMB,
    "cut short": GOOD[:-20],
    "cut in the header": GOOD[:15],
    "a byte changed": GOOD[:60] + bytes([GOOD[60] ^ 1]) + GOOD[61:],
    "not packed": gzip.decompress(GOOD),
    "no archive": b"nothing of the kind",
    "empty": b"",
}


@pytest.mark.parametrize("what", TARS)
def test_a_hostile_tar_writes_nothing_outside(what: str, tmp_path: Path) -> None:
    (tmp_path / "in.tar.gz").write_bytes(TARS[what])
    (tmp_path / "out").mkdir()
    with pytest.raises(AssetError, match=r"in\.tar\.gz: expected|data\.txt: expected"):
        fetching.copy_tar_member(tmp_path / "in.tar.gz", NAME, tmp_path / "out" / "data.txt")
    assert {p.name for p in tmp_path.iterdir()} == {"in.tar.gz", "out"}
    assert {p.name for p in (tmp_path / "out").iterdir()} <= {"data.txt"}


def test_a_good_member_goes_where_we_say_and_never_over_a_file(tmp_path: Path) -> None:
    (tmp_path / "in.tar.gz").write_bytes(GOOD)
    fetching.copy_tar_member(tmp_path / "in.tar.gz", NAME, tmp_path / "mine")
    assert (tmp_path / "mine").read_bytes() == CONTENT
    with pytest.raises(FileExistsError):
        fetching.copy_tar_member(tmp_path / "in.tar.gz", NAME, tmp_path / "mine")


def zip_with(name: str, content: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return packed.getvalue()


ZIPS: dict[str, bytes] = {
    "another name": zip_with("../" + NAME, CONTENT),
    "more than there should be": zip_with(NAME, bytes(10**6)),
    "less than there should be": zip_with(NAME, b"x"),
    "cut short": zip_with(NAME, CONTENT)[:-10],
    "a byte changed": zip_with(NAME, CONTENT).replace(zip_with(NAME, CONTENT)[50:54], b"\xff\xff\xff\xff", 1),
    "no archive": b"nothing of the kind",
}


@pytest.mark.parametrize("what", ZIPS)
def test_a_hostile_zip_writes_nothing_outside(what: str, tmp_path: Path) -> None:
    (tmp_path / "in.whl").write_bytes(ZIPS[what])
    (tmp_path / "out").mkdir()
    with (
        pytest.raises(AssetError, match=r"in\.whl: expected|data\.txt: expected"),
        (tmp_path / "out" / "data.txt").open("xb") as file,
    ):
        fetching.copy_zip_member(tmp_path / "in.whl", NAME, file, len(CONTENT))
    assert {p.name for p in tmp_path.iterdir()} == {"in.whl", "out"}
    assert sum(p.stat().st_size for p in (tmp_path / "out").iterdir()) <= len(CONTENT)  # a bomb is stopped


def test_an_original_with_another_hash_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path))
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / assets._CORPUS.originals[0].file).write_bytes(GOOD)
    opened: list[object] = []
    monkeypatch.setattr(tarfile, "open", lambda *args, **kwargs: opened.append(args))
    with pytest.raises(AssetError, match=f"expected SHA-256 {assets._CORPUS.sha256}, found"):
        assets.corpus_folder()
    assert opened == []


# --- what is shown ----------------------------------------------------------------------------------------------------

HOSTILE = (
    "<script>alert(1)</script>",
    "line\u2028<img src=x onerror=alert(1)>\x85<b>\x0b<i>\x0c<u>",
    "\t<iframe>\n\n- [a](javascript:alert(1))\n\n# title\n\n<a href='javascript:x'>\r\n|a|b|\n|-|-|",
    "\n\n\n<div>\n\n`````\n<p>",
    "</code></pre><script>x</script>",
)


def test_tensorboard_gets_model_text_in_a_form_that_it_does_not_read(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugin_util import markdown_to_safe_html

    with RunFolder.create(tmp_path, {}) as run:
        for step, text in enumerate(HOSTILE):
            run.log_text(step, "samples", text)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    pages = [markdown_to_safe_html(e.tensor_proto.string_val[0]) for e in events.Tensors("samples/text_summary")]
    assert len(pages) == len(HOSTILE)
    for page, text in zip(pages, HOSTILE, strict=True):
        assert set(re.findall(r"</?(\w+)", page)) == {"pre", "code"}
        shown = html.unescape(re.sub(r"</?(pre|code)>", "", page))
        assert "".join(shown.split()) == "".join(text.split())


def test_an_error_that_quotes_a_file_cannot_move_the_cursor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(argv: object) -> int:
        raise RLAIFError("found the fields \x1b[2J\x1b]0;title\x07 and \u202egpj")

    monkeypatch.setattr(cli, "COMMANDS", {"try": ("tests.stress.fuzz:main", "")})
    monkeypatch.setattr("tests.stress.fuzz.main", fails)
    assert cli.main(["try"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("rlaif try: found the fields")
    assert not set(said) & set("\x1b\x07\u202e")


def test_what_a_policy_wrote_cannot_move_the_cursor(tmp_path: Path) -> None:
    import numpy as np

    from agents.training.display import display, report
    from agents.training.heldout import HeldOut

    stream = io.StringIO()
    console = Console(file=stream, width=100, color_system=None)
    held = HeldOut(["p\x1b[2J"] * 2, ["r\x1b]0;t\x07"] * 2, {"reward": np.zeros(2)})
    with RunFolder.create(tmp_path, {}) as run:
        report(run, console, load_task("movie-review"), held, held)
    assert "p\u241b[2J" in stream.getvalue()
    assert not set(stream.getvalue()) & set("\x1b\x07")
    with display(1, Console(file=stream, width=100, force_terminal=True, color_system=None)) as show:
        show(1, {"reward": 0.0}, {"time/tokens_per_second": 1.0}, "a\x1b]0;t\x07")
    assert "a\u241b]0;t\u2407" in stream.getvalue()
    assert "\x1b]0;t" not in stream.getvalue()


# --- keys and servers -------------------------------------------------------------------------------------------------

SECRET = "sk-very-secret-0123456789"


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., EndpointClient]]:
    """Makes clients whose server is a function."""
    made: list[EndpointClient] = []

    def make(answer: Callable[[httpx.Request], httpx.Response], **limits: Any) -> EndpointClient:
        monkeypatch.setenv("KEY_FOR_A_TEST", SECRET)
        cache = AnswerCache(tmp_path / "answers.sqlite")
        found = EndpointClient(
            "http://127.0.0.1:9/v1", "m", api_key_env="KEY_FOR_A_TEST", limits=Limits(**limits), cache=cache
        )
        found._started().transport.http = httpx.AsyncClient(transport=httpx.MockTransport(answer))
        made.append(found)
        return found

    yield make
    for found in made:
        found.close()
        found.cache.close()


def test_a_key_is_in_no_message_and_no_file(client: Callable[..., EndpointClient], tmp_path: Path) -> None:
    answer = {"model": "m", "choices": [{"text": f"your key is {SECRET}"}]}

    def echo(request: httpx.Request) -> httpx.Response:
        return httpx.Response(400 if b"bad" in request.content else 200, json=answer | {"error": f"no: {SECRET}"})

    asker = client(echo, retries=0)
    reply = asker.run(asker.ask("completions", {"prompt": "p"}, logprobs=False, until=9e9))
    assert reply.text == "your key is [key]"
    with pytest.raises(RequestFailed) as caught:
        asker.run(asker.ask("completions", {"prompt": "bad"}, logprobs=False, until=9e9))
    assert "[key]" in str(caught.value)
    assert SECRET not in str(caught.value)
    asker.cache.close()
    assert all(SECRET.encode() not in file.read_bytes() for file in tmp_path.iterdir())
    assert SECRET not in repr(EndpointLM("http://127.0.0.1:9/v1", "m", api_key_env="KEY_FOR_A_TEST", cache=None))


def test_an_address_with_a_password_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    from rewards.labeling.command import label
    from rewards.labeling.config import LabelConfig
    from rewards.language_model.config import LanguageModelConfig

    with pytest.raises(RLAIFError, match="expected an address without password") as caught:
        labeler = LanguageModelConfig(url=f"http://me:{SECRET}@127.0.0.1:9/v1")
        label(LabelConfig(labeler=labeler, out=tmp_path / "run", pairs=1), Console(quiet=True))
    assert SECRET not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_server_cannot_make_us_wait_for_ever(client: Callable[..., EndpointClient]) -> None:
    asker = client(lambda request: httpx.Response(429, headers={"retry-after": "1e18"}), retries=6)
    with pytest.raises(
        RequestFailed, match=r"a pause of at most 3600 s, found that the server asks for 1000000000000000000 s"
    ):
        asker.run(asker.ask("completions", {"prompt": "p"}, logprobs=False, until=9e18))


def test_a_damaged_answer_in_the_cache_is_asked_again(client: Callable[..., EndpointClient]) -> None:
    asked: list[bytes] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.content)
        return httpx.Response(200, json={"model": "m", "choices": [{"text": "fine"}]})

    asker = client(answer)
    for _ in range(2):
        assert asker.run(asker.ask("completions", {"prompt": "p"}, logprobs=False, until=9e9)).text == "fine"
    assert len(asked) == 1
    asker.cache._db.execute("UPDATE answers SET body = '{\"text\": 3}'")
    for _ in range(2):
        assert asker.run(asker.ask("completions", {"prompt": "p"}, logprobs=False, until=9e9)).text == "fine"
    assert len(asked) == 2
