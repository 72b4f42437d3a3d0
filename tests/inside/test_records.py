"""Records: each form, the lab's faults, and errors that name file and line."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from hpc.core.errors import UsageError
from hpc.inside import records, sources


def write(path: Path, *values: Any) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def rows(path: Path, *values: Any, form: records.Format = "auto") -> list[records.Row]:
    return list(records.read(write(path / "data.jsonl", *values), form))


def said(row: records.Row) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in row.messages]


PAIR = [("user", "Q1"), ("assistant", "A1")]


FORMS: list[dict[str, Any]] = [
    {"text": "### Human: Q1### Assistant: A1"},
    {"text": "### Human: Q1\n### Assistant: A1\n"},
    {"instruction": "Q1", "input": "", "output": "A1", "language": "en"},
    {"instruction": "Q1", "output": " A1 "},
    {"messages": [{"role": "user", "content": "Q1"}, {"role": "assistant", "content": "A1"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q1"}]}, {"role": "bot", "content": "A1"}]},
    {"conversations": [{"from": "human", "value": "Q1"}, {"from": "gpt", "value": "A1"}]},
    {"instruction": "Q1", "context": "", "response": "A1"},
    {"prompt": "Q1", "completion": "A1"},
]


@pytest.mark.parametrize("value", FORMS)
def test_each_form_gives_the_same_conversation(tmp_path: Path, value: dict[str, Any]) -> None:
    (row,) = rows(tmp_path, value)
    assert said(row) == PAIR
    assert (row.dropped, row.unanswered) == ("", 0)


def test_all_turns_are_kept(tmp_path: Path) -> None:
    (row,) = rows(tmp_path, {"text": "### Human: Q1### Assistant: A1### Human: Q2### Assistant: A2"})
    assert said(row) == [*PAIR, ("user", "Q2"), ("assistant", "A2")]


def test_an_unanswered_last_turn_is_cut_off_and_counted(tmp_path: Path) -> None:
    first, second = rows(
        tmp_path,
        {"text": "### Human: Q1### Assistant: A1### Human: Q2"},
        {"text": "### Human: Q1### Assistant: A1### Human: Q2### Assistant: "},
    )
    assert said(first) == said(second) == PAIR
    assert (first.unanswered, second.unanswered) == (1, 2)


def test_a_heading_in_an_answer_does_not_swap_the_roles(tmp_path: Path) -> None:
    (row,) = rows(tmp_path, {"text": "### Human: Q1### Assistant: One\n### Steps\nTwo### Human: Q2### Assistant: A2"})
    assert said(row)[1] == ("assistant", "One\n### Steps\nTwo")
    assert said(row)[2] == ("user", "Q2")


def test_a_single_turn_is_counted_not_lost(tmp_path: Path) -> None:
    (row,) = rows(tmp_path, {"text": "### Human: only a question"})
    assert (row.messages, row.dropped) == ((), "no answer")


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], "empty"),
        ([("user", " "), ("assistant", "")], "empty"),
        ([("assistant", "A"), ("user", "Q"), ("assistant", "A")], "turns out of order"),
        ([("user", "Q"), ("user", "Q"), ("assistant", "A")], "turns out of order"),
        ([("user", ""), ("assistant", "A")], "empty turn"),
        ([("user", "Q"), ("tool", "T"), ("assistant", "A")], "role not known: tool"),
        ([("system", "S"), ("user", "Q")], "no answer"),
    ],
)
def test_what_cannot_be_learnt_from_is_named(tmp_path: Path, turns: list[tuple[str, str]], reason: str) -> None:
    (row,) = rows(tmp_path, {"messages": [{"role": role, "content": text} for role, text in turns]})
    assert (row.messages, row.dropped) == ((), reason)


def test_a_call_of_a_tool_is_dropped_for_its_tool_turn(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "weather"}}]}
    turns = [{"role": "user", "content": "Q"}, call]
    answered = [*turns, {"role": "tool", "content": "sunny"}, {"role": "assistant", "content": "A"}]
    lines = "".join(json.dumps({"messages": said}) + "\n" for said in (answered, turns))
    (tmp_path / "a.jsonl").write_text(lines)
    assert [row.dropped for row in records.read(tmp_path / "a.jsonl")] == ["role not known: tool", "no answer"]


def test_a_system_message_stays_first(tmp_path: Path) -> None:
    (row,) = rows(tmp_path, {"system": "S", "instruction": "Q1", "input": "in", "output": "A1"})
    assert said(row) == [("system", "S"), ("user", "Q1\n\nin"), ("assistant", "A1")]


def test_sharegpt_keeps_its_system_message_beside_the_turns(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Q1"}, {"from": "gpt", "value": "A1"}]
    (row,) = rows(tmp_path, {"conversations": turns, "system": "S"})
    assert said(row) == [("system", "S"), *PAIR]


def test_messages_keep_a_system_message_and_a_question_its_history(tmp_path: Path) -> None:
    turns = [{"role": role, "content": text} for role, text in PAIR]
    (row,) = rows(tmp_path, {"messages": turns, "system": "S"})
    assert said(row) == [("system", "S"), *PAIR]
    (row,) = rows(tmp_path, {"system": "S", "instruction": "Q2", "output": "A2", "history": [["Q1", "A1"]]})
    assert said(row) == [("system", "S"), *PAIR, ("user", "Q2"), ("assistant", "A2")]


def test_an_indent_belongs_to_the_text(tmp_path: Path) -> None:
    code = "    x = 1\n    return x"
    (tmp_path / "twice.jsonl").write_text('{"instruction": "Q", "output": "A", "id": 1, "id": 1}')
    assert len(list(records.read(tmp_path / "twice.jsonl"))) == 1, "the same twice loses nothing"
    for value in (
        {"instruction": " Q", "output": f"\n\n{code}\n"},
        {"text": f"### Human: Q### Assistant:\n{code}\n"},
        {"messages": [{"role": "user", "content": "Q"}, {"role": " assistant", "content": code}]},
    ):
        (row,) = rows(tmp_path, value)
        assert said(row) == [("user", "Q"), ("assistant", code)]


def test_reasoning_beside_an_answer_goes_before_it(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "reasoning_content": "hm"}]
    (row,) = rows(tmp_path, {"messages": turns})
    assert said(row)[1] == ("assistant", "<think>\nhm\n</think>\n\nA")


def test_a_dialogue_with_its_summary(tmp_path: Path) -> None:
    log = [{"user utterance": "@Shop it broke https://t.co/x", "system response": "Sorry!  ^AB"}]
    info = {"summaries": {"abstractive_summaries": [["A customer complains.", "The agent is sorry."], ["Other"]]}}
    tweets, plain = rows(
        tmp_path,
        {"log": log, "original dialog info": json.dumps(info)},
        {"dialogue": "A: hi", "summary": "A greets."},
    )
    asked = "Write a summary of the conversation below.\n\n"
    summary = "A customer complains. The agent is sorry."
    assert said(tweets) == [("user", f"{asked}user: it broke\nagent: Sorry!"), ("assistant", summary)]
    assert said(plain) == [("user", f"{asked}A: hi"), ("assistant", "A greets.")]


def test_a_gzipped_file_reads_like_the_plain_one(tmp_path: Path) -> None:
    line = json.dumps({"instruction": "Q1", "output": "A1"}).encode() + b"\n"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line * 3))
    assert [row.number for row in records.read(tmp_path / "a.jsonl.gz")] == [1, 2, 3]
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(line * 3)[:-9])
    (tmp_path / "wrong.jsonl.GZ").write_bytes(gzip.compress(line * 3)[:20] + b"\xff" * 20)
    for name in ("cut.jsonl.gz", "wrong.jsonl.GZ"):
        with pytest.raises(UsageError, match="cannot read"):
            list(records.read(tmp_path / name))


def test_a_large_array_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_PIECE", 64)
    values = [{"instruction": f"Q{i}", "output": "Ä" * i} for i in range(60)]
    (tmp_path / "a.json").write_text(json.dumps(values, indent=1, ensure_ascii=False), encoding="utf-8")
    found = list(records.read(tmp_path / "a.json"))
    assert [row.number for row in found] == [2 + 4 * i for i in range(60)]
    assert len(list(sources.pieces(tmp_path / "a.json"))) > 20
    monkeypatch.setattr(sources, "_LONGEST", 100)
    (tmp_path / "b.json").write_text('[{"instruction": "' + "x" * 1000)
    with pytest.raises(UsageError, match=r"b\.json line 1: not valid JSON"):
        list(records.read(tmp_path / "b.json"))


def test_a_folder_stands_for_its_files(tmp_path: Path) -> None:
    beside = ("dataset_info.json", "report.json", "dropped.jsonl", "provenance.json")
    for name in ("b.jsonl", "a.json", *beside, ".hidden.jsonl", "notes.txt"):
        (tmp_path / name).write_text("{}")
    assert [path.name for path in sources.files(tmp_path)] == ["a.json", "b.jsonl"]


@pytest.mark.train
def test_parquet_and_arrow_read_like_lines(tmp_path: Path) -> None:
    import datasets
    import pyarrow
    from pyarrow import parquet

    turns = [{"role": "user", "content": "Q1"}, {"role": "assistant", "content": "A1"}]
    table = pyarrow.table({"messages": [turns] * 3 + [turns[:1]]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    (saved,) = sources.files(tmp_path / "saved")
    for path in (tmp_path / "a.parquet", saved):
        sources.looks_whole(path)
        found = list(records.read(path))
        assert [said(row) for row in found] == [PAIR, PAIR, PAIR, []]
        assert (found[3].where, found[3].dropped) == (f"{path.name} row 4", "no answer")
    (tmp_path / "a.parquet").rename(tmp_path / "A.PARQUET")
    assert len(list(records.read(tmp_path / "A.PARQUET"))) == 4
    (tmp_path / "A.PARQUET").rename(tmp_path / "a.parquet")
    os.truncate(tmp_path / "a.parquet", 200)
    with pytest.raises(UsageError, match="is not a whole Parquet file"):
        sources.looks_whole(tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"a\.parquet row 1: cannot be read"):
        list(records.read(tmp_path / "a.parquet"))


@pytest.mark.train
def test_a_text_of_a_table_that_is_none_is_named(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    said = pyarrow.array([b"A", b"B", b"\xe4", b"D"])
    for name, column, message in (
        ("a", pyarrow.Array.from_buffers(pyarrow.string(), 4, said.buffers()), "a.parquet row 3: not UTF-8 text"),
        ("b", said, "b.parquet row 1: 'output' must be a text"),
    ):
        path = tmp_path / f"{name}.parquet"
        parquet.write_table(pyarrow.table({"instruction": ["Q"] * 4, "output": column}), path)
        with pytest.raises(UsageError, match=message):
            list(records.read(path))


@pytest.mark.train
def test_columns_that_nobody_reads_may_hold_what_python_has_not(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path, far = tmp_path / "a.parquet", pyarrow.array([1, 2**60], pyarrow.timestamp("us"))
    words = pyarrow.array([b"A", b"\xe4"])
    others = {
        "far": far,
        "zone": pyarrow.array([1, 2], pyarrow.timestamp("us", "Mars/Phobos")),
        "twice": pyarrow.StructArray.from_arrays([words, words], names=["a", "a"]),
        "latin": pyarrow.Array.from_buffers(pyarrow.string(), 2, words.buffers()),
    }
    older = {"system": "S", "history": [["Q0", "A0"]], "instruction": "Q1", "input": "", "output": "A1"}
    for value in (*FORMS[:5], *FORMS[6:], older):  # no column holds texts and lists
        pairs = {name: pyarrow.array([content] * 2) for name, content in value.items()}
        lines = [said(row) for row in rows(tmp_path, value, value)]
        for name, column in others.items():
            parquet.write_table(pyarrow.table({**pairs, name: column}), path)
            assert [said(row) for row in records.read(path)] == lines
    turns = [[{"role": "user", "content": "Q", "at": at}] for at in far.cast(pyarrow.int64()).to_pylist()]
    kind = pyarrow.list_(pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.string(), "at": far.type}))
    parquet.write_table(pyarrow.table({"messages": pyarrow.array(turns, kind)}), path)
    with pytest.raises(UsageError, match=r"a\.parquet row 2: cannot be read: date value out of range"):
        list(records.read(path))


def test_a_json_array_reads_like_lines(tmp_path: Path) -> None:
    values = [{"instruction": f"Q{i}", "output": "A [1]"} for i in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(values, indent=4))
    found = list(records.read(tmp_path / "a.json"))
    assert [said(row)[0][1] for row in found] == ["Q0", "Q1", "Q2"]
    assert [row.where for row in found] == ["a.json line 2", "a.json line 6", "a.json line 10"]


@pytest.mark.parametrize("array", [False, True])
def test_a_limit_reads_whole_records_only(tmp_path: Path, array: bool) -> None:
    values = [{"instruction": f"Q{i}", "output": "A"} for i in range(100)]
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(values) if array else "".join(json.dumps(v) + "\n" for v in values))
    assert 10 < len(list(records.read(path, limit=1000))) < 40


def test_a_byte_order_mark_and_blank_lines_do_no_harm(tmp_path: Path) -> None:
    line = json.dumps({"instruction": "Q", "output": "A"}).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\n\n" + line)
    assert [row.where for row in records.read(tmp_path / "a.jsonl")] == ["a.jsonl line 1", "a.jsonl line 3"]


GOOD = b'{"instruction": "Q", "output": "A"}\n'


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (GOOD * 16 + b'{"instruction": "Q"\n', "data.jsonl line 17: not valid JSON"),
        (GOOD + b"\n" + b'"text"\n', "data.jsonl line 3: not a JSON object"),
        (GOOD + b'{"instruction": "\xe4", "output": ""}', "data.jsonl line 2: not UTF-8 text"),
        (
            GOOD + b'{"instruction": "Q", "output": [{"type": "text", "text": "A"}, {"type": "text", "text": null}]}',
            "data.jsonl line 2: 'output' must be a text, not {",
        ),
        (GOOD + b'{"instruction": "Q"}', "data.jsonl line 2: 'output' must be a text, not null"),
        (GOOD + b'{"instruction": "\\ud800", "output": "A"}', "half of a"),
        (b'{"question": "Q", "answer": "A"}', "data.jsonl line 1: unknown form of record, with the keys answer, q"),
        (GOOD + b'{"instruction": "Q", "output": "A", "output": "B"}', "line 2: the key 'output' is there twice"),
        (b"[" + GOOD + b',{"instruction": "Q", "output": "A", "output": "B"}', "line 2: the key 'output' is there"),
        (GOOD + b'{"instruction": "Q", "output": "A", "history": "Q"}', "line 2: the history is not a list of"),
        (b'{"log": [], "original dialog info": {"summaries": {"abstractive_summaries": [["\\ud800"]]}}}', "half of"),
        (b'{"messages": "Q"}', "the messages are not a list"),
        (b'{"text": "intro ### Human: Q### Assistant: A"}', "does not begin with '### Human:'"),
        (b"[" + GOOD.strip() + b",\n{]", "data.jsonl line 2: not valid JSON"),
        (b"[" + GOOD.strip() + b"\n", "not valid JSON"),
        (b"[" + GOOD.strip() + b"] more", "text follows the JSON array"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "data.jsonl").write_bytes(data)
    with pytest.raises(UsageError) as caught:
        list(records.read(tmp_path / "data.jsonl"))
    assert message in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(("form", "advised"), [("utf-16", "utf-16"), ("utf-16-be", "utf-16"), ("latin1", "latin1")])
def test_a_file_that_is_not_utf_8_is_told_how_to_become_it(tmp_path: Path, form: str, advised: str) -> None:
    text = ("\ufeff" if form == "utf-16-be" else "") + json.dumps(
        {"instruction": "ä", "output": "A"}, ensure_ascii=False
    )
    (tmp_path / "a.jsonl").write_bytes(text.encode(form))
    with pytest.raises(UsageError, match="line 1: not UTF-8 text") as caught:
        list(records.read(tmp_path / "a.jsonl"))
    assert f"iconv -f {advised} -t utf8" in caught.value.hint


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        list(records.read(tmp_path / "none.jsonl"))


def test_a_form_that_was_asked_for_is_kept_to(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'instruction' must be a text"):
        rows(tmp_path, {"text": "### Human: Q### Assistant: A"}, form="alpaca")
