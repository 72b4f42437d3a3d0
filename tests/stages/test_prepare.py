"""prepare: what is refused before the queue, what is dropped and counted, and that it is repeatable."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpc.core.errors import UsageError
from stages import prepare

RunStage = Callable[..., Any]

ENGLISH = "You need a building permit before you begin to build a house of this size in the town."
SWEDISH = "Du behöver ett bygglov innan du börjar bygga ett hus av den här storleken i staden."
KOREAN = "이 도시에서 이 정도 크기의 집을 짓기 전에 건축 허가를 받아야 합니다."


def write(path: Path, *texts: tuple[str, str]) -> str:
    lines = (json.dumps({"instruction": q, "input": "", "output": a}) + "\n" for q, a in texts)
    path.write_text("".join(lines))
    return str(path)


def pairs(count: int, text: str = ENGLISH) -> list[tuple[str, str]]:
    return [(f"Question {i}?", f"{text} ({i})") for i in range(count)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_check_passes_on_good_data(tmp_path: Path) -> None:
    prepare.check(prepare.PrepareConfig(data=(write(tmp_path / "a.jsonl", *pairs(3)),), languages=("en",)))


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("", {}, "holds no record"),
        ("{", {}, "a.jsonl line 1: not valid JSON"),
        ('{"instruction": "Q", "output": "A"}\n' * 16 + "{", {}, "a.jsonl line 17: not valid JSON"),
        ('{"a": 1}', {}, "unknown form of record"),
        ('{"text": "### Human: Q"}', {}, "a question with an answer"),
        (None, {}, "cannot read"),
        ('{"instruction": "Q", "output": "A"}', {"languages": ("english",)}, "'english' is not known"),
        ('{"instruction": "Q", "output": "A"}', {"eval_rows": -1}, "eval_rows"),
        ('{"instruction": "Q", "output": "A"}', {"data": ()}, "names no file"),
    ],
)
def test_check_refuses(tmp_path: Path, content: str | None, options: dict[str, Any], message: str) -> None:
    if content is not None:
        (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UsageError, match=message):
        prepare.check(prepare.PrepareConfig(**{"data": (str(tmp_path / "a.jsonl"),), **options}))


def test_what_it_asks_for() -> None:
    config = prepare.PrepareConfig(data=("a", "b"), tokenizer="org/name")
    assert prepare.resources(config).gpus_per_node == 0
    assert prepare.files(config) == ("a", "b")


def test_rows_are_held_out_once_and_never_trained_on(tmp_path: Path, run_stage: RunStage) -> None:
    twice = [*pairs(20), *pairs(5)]
    result = run_stage("prepare", data=(write(tmp_path / "a.jsonl", *twice),), eval_rows=6)
    train, held_out = (lines(result.out("dataset") / f"{name}.jsonl") for name in ("train", "eval"))
    assert result.code == 0
    assert (len(train), len(held_out)) == (14, 6)
    assert not any(row in train for row in held_out)
    assert result.metrics["dropped"] == {"duplicate": 5}
    assert json.loads((result.out("dataset") / "report.json").read_text())["read"] == 25


def test_the_seed_chooses_the_held_out_rows(tmp_path: Path, run_stage: RunStage) -> None:
    data = (write(tmp_path / "a.jsonl", *pairs(20)),)
    first, second = (
        run_stage("prepare", folder=str(seed), data=data, eval_rows=5, seed=seed).out("dataset") / "eval.jsonl"
        for seed in (0, 1)
    )
    assert first.read_text() != second.read_text()


def test_the_first_samples_and_a_system_message(tmp_path: Path, run_stage: RunStage) -> None:
    result = run_stage("prepare", data=(write(tmp_path / "a.jsonl", *pairs(9)),), max_samples=4, system="Be brief.")
    train = lines(result.out("dataset") / "train.jsonl")
    assert [row["messages"][1]["content"] for row in train] == [f"Question {i}?" for i in range(4)]
    assert train[0]["messages"][0] == {"role": "system", "content": "Be brief."}


def test_nothing_is_left(tmp_path: Path, run_stage: RunStage) -> None:
    result = run_stage("prepare", data=(write(tmp_path / "a.jsonl", *pairs(3)),), eval_rows=3)
    assert result.code == 2
    assert "3 of 3 records are left, too few" in result.error["cause"]


@pytest.mark.train
def test_other_languages_are_dropped_by_the_text_and_counted(tmp_path: Path, run_stage: RunStage) -> None:
    texts = [*pairs(3), *pairs(2, SWEDISH), ("질문?", KOREAN), ("12?", "34."), ("Question 9?", "")]
    config = {"data": (write(tmp_path / "a.jsonl", *texts),), "languages": ("en",)}
    result = run_stage("prepare", **config)
    assert result.metrics["dropped"] == {
        "language ko": 1,
        "language sv": 2,
        "no answer": 1,
        "no text to detect": 1,
    }
    assert result.metrics["languages"] == {"en": 3, "ko": 1, "sv": 2}
    assert len(lines(result.out("dataset") / "train.jsonl")) == 3
    again = run_stage("prepare", folder="again", **config)
    for name in ("train.jsonl", "eval.jsonl", "report.json"):
        assert (result.out("dataset") / name).read_bytes() == (again.out("dataset") / name).read_bytes()


@pytest.mark.train
def test_short_texts_get_the_same_language_every_time(tmp_path: Path, run_stage: RunStage) -> None:
    texts = [(word, word) for word in ("tak", "ja", "hotel", "radio", "no", "sofa", "taxi", "bank") * 2]
    data = (write(tmp_path / "a.jsonl", *texts, *pairs(1)),)
    runs = [run_stage("prepare", folder=str(i), data=data, languages=("en",)).metrics for i in range(3)]
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.train
def test_lengths_in_a_models_tokens(tmp_path: Path, run_stage: RunStage, tiny_model: Path) -> None:
    data = (write(tmp_path / "a.jsonl", ("12345?", "1234567890")),)
    result = run_stage("prepare", data=data, tokenizer=str(tiny_model))
    assert result.metrics["tokens"] == {"median": 37, "p90": 37, "longest": 37}
