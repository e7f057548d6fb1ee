"""Readers and hostile input: properties, the fuzzer itself, and every fault it has found."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.labeling.answers import Answer
from rlaif_env.api import DataError, Preference, RLAIFError
from rlaif_env.data.journal import Journal
from rlaif_env.data.jsonl import json_object
from rlaif_env.data.preferences import read_preferences, read_prompts, write_preferences
from rlaif_env.data.tasks import Task, load_task
from rlaif_env.records import read_metrics
from rlaif_env.servers.limits import retry_after
from rlaif_env.servers.replies import MalformedReply, Reply, parse_reply
from tests.stress import fuzz as fuzzing
from tests.stress.fuzz import READERS
from tests.stress.fuzz_inputs import damaged, json_input, lines_input, safetensors_input, tar_input, toml_input
from tests.stress.fuzz_models import MODEL_READERS

NUMBERS = st.one_of(st.integers(), st.floats(), st.integers(2**1023, 2**1040))
JSON: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
TEXT = st.text(max_size=12)


def rows_of(*names: str) -> st.SearchStrategy[dict[str, Any]]:
    """Rows with some of these fields, each a text most of the time and anything else of the rest."""
    return st.dictionaries(st.sampled_from(names), st.one_of(TEXT, TEXT, st.sampled_from([0, 1, 0.5]), JSON))


# --- the fuzzer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READERS)
def test_no_reader_fails_on_a_few_inputs(name: str, tmp_path: Path) -> None:
    outcome = fuzzing.fuzz(name, 60, seed=11, faults=tmp_path)
    assert outcome.faults == {}
    assert outcome.inputs == outcome.accepted + outcome.refused == 60
    assert outcome.refused
    assert outcome.accepted  # inputs that are all refused at the first byte would test nothing


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS | MODEL_READERS)
def test_no_reader_fails_on_many_inputs(name: str, tmp_path: Path) -> None:
    outcome = fuzzing.fuzz(name, 3000 if name in READERS else 300, seed=12, faults=tmp_path)
    assert outcome.faults == {}
    assert outcome.accepted and outcome.refused


def test_one_number_gives_one_input() -> None:
    makers: list[Callable[[random.Random], bytes]] = [reader.inputs for reader in READERS.values()]
    for make in makers:
        assert [make(random.Random(f"{i}")) for i in range(20)] == [make(random.Random(f"{i}")) for i in range(20)]
        assert len({make(random.Random(f"{i}")) for i in range(20)}) > 5


def test_inputs_are_near_the_seeds_and_not_the_seeds() -> None:
    rng = random.Random(0)
    seed = {"a": [1, "x"], "b": {"c": None}}
    texts = [json_input(rng, [seed]) for _ in range(300)]
    parsed = 0
    for text in texts:
        try:
            json.loads(text)
            parsed += 1
        except (ValueError, RecursionError):
            pass
    assert 100 < parsed < 290
    assert sum(text != json.dumps(seed).encode() for text in texts) > 250
    assert any(lines_input(rng, [[seed, seed]]).count(b"\n") >= 2 for _ in range(20))
    assert any(b"[b]" in toml_input(rng, [seed]) for _ in range(20))
    whole = (2).to_bytes(8, "little") + b"{}" + b"data"
    assert any(safetensors_input(rng, [whole])[:8] != whole[:8] for _ in range(20))
    assert any(tar_input(rng, "n", b"c")[:2] == b"\x1f\x8b" for _ in range(20))
    assert any(len(damaged(rng, b"abcdef")) != 6 for _ in range(20))


def test_a_fault_is_counted_once_by_place_and_its_first_input_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.stress.fuzz_readers import Reader

    def make(folder: Path) -> Callable[[bytes], None]:
        def read(data: bytes) -> None:
            if data[0] % 3 == 0:
                raise RLAIFError("refused")
            if data[0] % 3 == 1:
                raise KeyError(data[0])

        return read

    monkeypatch.setitem(fuzzing._ALL, "bad", Reader(lambda rng: rng.randbytes(1), make))
    outcome = fuzzing.fuzz("bad", 90, faults=tmp_path)
    assert outcome.accepted + outcome.refused + outcome.uncaught == 90
    assert min(outcome.accepted, outcome.refused, outcome.uncaught) > 10
    assert len(outcome.faults) == len(list(tmp_path.iterdir())) == 1
    (kept,) = tmp_path.iterdir()
    with pytest.raises(KeyError):
        fuzzing.main(["bad", "--replay", str(kept)])
    monkeypatch.setattr(fuzzing, "_limit_memory", lambda: None)  # this process goes on
    assert fuzzing.main(["bad", "--inputs", "40", "--faults", str(tmp_path)]) == 1
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (line["reader"], line["inputs"]) == ("bad", 40)
    with pytest.raises(RLAIFError, match=r"expected readers of task-toml, .* found 'other'"):
        fuzzing.fuzz("other", 1)


# --- properties -------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(rows_of("prompt", "response_1", "response_2", "p_first", "chosen", "rejected", "source", "meta", "x")))
def test_preferences_are_read_whole_or_refused(tmp_path_factory: Any, rows: list[dict[str, Any]]) -> None:
    folder = tmp_path_factory.mktemp("p")
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        found = list(read_preferences(folder / "in.jsonl", allow_empty=True))
    except DataError:
        return
    assert len(found) == len(rows)
    write_preferences(folder / "out.jsonl.gz", found)
    assert list(read_preferences(folder / "out.jsonl.gz", allow_empty=True)) == found


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=80), st.sampled_from([".jsonl", ".txt", ".jsonl.gz", ".txt.gz"]))
def test_any_bytes_are_prompts_or_refused(tmp_path_factory: Any, data: bytes, suffix: str) -> None:
    file = tmp_path_factory.mktemp("p") / f"in{suffix}"
    file.write_bytes(gzip.compress(data) if suffix.endswith("gz") and len(data) % 2 else data)
    try:
        found = list(read_prompts(file))
    except DataError as error:
        assert str(file) in str(error)
        return
    assert found
    assert all(isinstance(prompt, str) and prompt.strip() for prompt in found)


TASKS = rows_of("name", "kind", "criterion", "max_prompt_tokens", "max_response_tokens", "source", "gold", "x")


@settings(max_examples=40, deadline=None)
@given(TASKS)
def test_a_task_of_any_values_survives_or_is_refused(values: dict[str, Any]) -> None:
    base = {"name": "n", "kind": "summary", "criterion": "c", "max_prompt_tokens": 3, "max_response_tokens": 4}
    try:
        task = load_task({**base, **values})
    except RLAIFError:
        return
    assert Task.from_json(json.loads(json.dumps(task.to_json()))) == task


@settings(max_examples=40, deadline=None)
@given(rows_of("choices", "model", "usage", "error"), st.lists(rows_of("index", "message", "text", "logprobs")), JSON)
def test_a_servers_answer_is_read_or_refused(row: dict[str, Any], choices: list[dict[str, Any]], odd: Any) -> None:
    for choice in choices:
        if isinstance(choice.get("logprobs"), str):
            choice["logprobs"] = {
                "content": [{"token": "8", "logprob": odd, "top_logprobs": [{"token": "8", "logprob": odd}]}]
            }
    try:
        reply = parse_reply(json.dumps({**row, "choices": choices}), logprobs=False)
    except MalformedReply:
        return
    assert Reply.from_json(reply.to_json()) == reply


@settings(max_examples=30, deadline=None)
@given(st.lists(rows_of("key", "logprobs", "tokens")), TEXT)
def test_a_journal_keeps_what_it_accepts(tmp_path_factory: Any, rows: list[dict[str, Any]], torn: str) -> None:
    file = tmp_path_factory.mktemp("j") / "journal.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + torn.replace("\n", ""), encoding="utf-8")
    try:
        with Journal(file, Answer.from_json) as journal:
            before = {key: journal[key] for key in journal}
            journal.append({"a key of ours": {"value": 1}})
    except DataError as error:
        assert str(file) in str(error)
        return
    with Journal(file) as journal:
        assert {key: journal[key] for key in journal} == {
            "a key of ours": {"key": "a key of ours", "value": 1}
        } | before


@given(st.one_of(TEXT, st.from_regex(r"[A-Z][a-z]{2}, [0-9]{1,3} [A-Z][a-z]{2} [0-9]{1,9} [0-9:]{0,9}( [-+A-Z0-9]+)?")))
def test_retry_after_is_a_time_or_nothing(value: str) -> None:
    seconds = retry_after(value)
    assert seconds is None or 0 <= seconds < float("inf")


# --- faults that the fuzzer found, one a line -------------------------------------------------------------------------

DEEP = "[" * 100_000
MANY = "9" * 400
TASK = 'name = "n"\nkind = "summary"\ncriterion = "c"\nmax_prompt_tokens = 3\nmax_response_tokens = 4\n'


def task_file(folder: Path, text: str) -> None:
    (folder / "t.toml").write_text(text)
    load_task(folder / "t.toml").prompts()


def preference(folder: Path, row: str) -> None:
    (folder / "p.jsonl").write_text(row + "\n")
    list(read_preferences(folder / "p.jsonl"))


def answer(folder: Path, body: str) -> None:
    parse_reply(body, logprobs=True)


def journal(folder: Path, line: str) -> None:
    (folder / "j.jsonl").write_text(line + "\n")
    Journal(folder / "j.jsonl", Answer.from_json)


def metrics(folder: Path, line: str) -> None:
    (folder / "metrics.jsonl").write_text(line + "\n")
    read_metrics(folder)


def reward(folder: Path, text: str) -> None:
    from rewards import make_reward

    settings_ = json_object(text)
    make_reward(settings_.pop("reward"), **settings_)


OWN = '{{"response_1": "a", "response_2": "b", "p_first": {}}}'
CHOICE = '{{"choices": [{{"text": "8", "logprobs": {}}}]}}'
FOUND: list[tuple[Callable[[Path, str], None], str, str]] = [
    (task_file, TASK + f"x = {DEEP}", "expected TOML in UTF-8, found: maximum recursion depth"),
    (task_file, TASK + f"gold = 0x{'f' * 9000}", "t.toml: "),
    (task_file, TASK.replace("= 3", f"= {MANY}"), "expected max_prompt_tokens of at most 10000000, found more"),
    (task_file, TASK + '[source]\njsonl = "a\\u0000b.jsonl"', "expected a file to read at"),
    (
        task_file,
        TASK + '[source]\njsonl = "~no-such-user/x.jsonl"',
        "expected the path of a file, found '~no-such-user",
    ),
    (task_file, TASK + "[source.prompts.train]\ntrain = ['a']", "expected prompts of a source to be a list of strings"),
    (preference, OWN.format(MANY), "expected p_first to be a number from 0 to 1"),
    (preference, OWN.format('0.5, "meta": {"a": 1e999}'), "expected numbers that a float can hold, found 1e999"),
    (preference, OWN.format('0.5, "meta": {"a": "\\ud800"}'), r"found half a surrogate pair, U\+D800"),
    (preference, OWN.format('0.5, "source": "\\udc00"'), r"found half a surrogate pair, U\+DC00"),
    (preference, '{"chosen": [{"role": [], "content": "x"}], "rejected": []}', r"to have a role of .*, found \[\]"),
    (answer, DEEP, "expected a JSON answer, found no whole JSON object"),
    (answer, CHOICE.format(f'{{"content": [{{"token": "8", "logprob": -{MANY}}}]}}'), "found another shape"),
    (answer, '{"choices": [{"index": "a"}, {"index": 1}]}', "expected an answer with text"),
    (journal, '{"key": "k", "logprobs": true}', "line 1: expected a row of finished work"),
    (journal, '{"key": "k"}', "line 1: expected a row of finished work"),
    (journal, f'{{"key": "k", "logprobs": [[{MANY}]]}}', "line 1: expected a row of finished work"),
    (metrics, f'{{"step": 1, "reward": {MANY}}}', "line 1: expected finite numbers"),
    (reward, '{"reward": "compose", "parts": "direct-llm"}', "expected the parts of a reward by name"),
    (
        reward,
        f'{{"reward": "compose", "parts": {{"direct-llm": {MANY}}}}}',
        "expected a number as the weight of the part",
    ),
    (reward, '{"reward": "compose", "a": 1}', "reward 'compose': got an unexpected keyword argument 'a'"),
    (reward, f'{{"reward": "human-rm", "model": "{"a" * 5000}"}}', "expected the folder of a reward model, found none"),
]


@pytest.mark.parametrize(
    ("read", "text", "message"), FOUND, ids=[f"{read.__name__}-{i}" for i, (read, _, _) in enumerate(FOUND)]
)
def test_what_the_fuzzer_found_is_refused(
    read: Callable[[Path, str], None], text: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(RLAIFError, match=message):
        read(tmp_path, text)


@pytest.mark.parametrize("scale", [5, [1], [1, 2, 3], ["1", "9"], [1.5, 9]])
def test_a_scale_of_the_wrong_kind_is_refused(scale: Any) -> None:
    from rewards import make_reward
    from tests.stress.fuzz_readers import Fair

    with pytest.raises(RLAIFError, match="expected a scale of two whole numbers"):
        make_reward("direct-llm", model=Fair(), scale=scale)


def test_what_a_server_counts_is_a_count_or_unknown() -> None:
    for usage in ({"prompt_tokens": 3, "completion_tokens": "x"}, {"prompt_tokens": True}, {"prompt_tokens": -1}, [1]):
        body = {"choices": [{"text": "a"}], "usage": usage}
        assert parse_reply(json.dumps(body), logprobs=False).tokens is None
    assert retry_after("Mon, 1 Jan 99999999999999999999 00:00:00 GMT") is None


def test_a_half_loaded_reward_model_leaves_nothing_on_the_shared_model(tmp_path: Path) -> None:
    from rewards.reward_model.model import RewardModel
    from tests.stress.fuzz_models import _reward_model, tiny_backbone

    base = tiny_backbone()
    made = _reward_model(base, adapter=True)
    made.save(tmp_path / "rm", merged=False)
    base.remove_lora(made.adapter)
    record = json.loads((tmp_path / "rm" / "reward_model.json").read_text())
    for change, message in (
        ({"layers": 7}, "expected layers from 1 to 1"),
        ({"layers": "1"}, "layers of the wrong kind"),
        ({"max_tokens": None}, "max_tokens of the wrong kind"),
        ({"normalization": {"kind": "none", "mean": 0, "std": 0}}, "normalization of the wrong kind"),
        ({"lora": {**record["lora"], "rank": 10**9}}, "expected an adapter of rank 1000000000"),
        ({"lora": {**record["lora"], "targets": ["nothing"]}}, "expected an adapter for tiny"),
    ):
        (tmp_path / "rm" / "reward_model.json").write_text(json.dumps(record | change))
        with pytest.raises(RLAIFError, match=message):
            RewardModel.load(tmp_path / "rm", base=base)
        assert base.adapters == []


def test_a_model_with_weights_missing_is_refused_not_filled_with_random_ones(tmp_path: Path) -> None:
    from rlaif_env.models import backbone
    from tests.stress.fuzz_models import tiny_backbone

    tiny_backbone().save_merged(None, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(RLAIFError, match=r"expected the weights of the whole model in .* found no model.layers.1"):
        backbone(tmp_path)


def test_p_first_is_a_probability_whatever_its_size() -> None:
    for p in (10**400, -(10**400), float("nan"), float("inf")):
        with pytest.raises(DataError, match="expected p_first to be a number from 0 to 1"):
            Preference("", "a", "b", p)
