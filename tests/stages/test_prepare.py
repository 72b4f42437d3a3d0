"""prepare: what is refused before the queue, what is dropped and counted, and that it is repeatable."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpc.core.errors import UsageError
from hpc.core.site import Site
from hpc.core.stage import Around
from hpc.inside import given
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
        ('{"instruction": "Q", "output": "A"}', {"languages": ("zh-cn",)}, "does not tell zh-cn"),
        ('{"instruction": "Q", "output": "A"}', {"languages": ("zh",), "detector": "langdetect"}, "'zh' is not known"),
        ('{"instruction": "Q", "output": "A"}', {"weights": (1.0, 2.0)}, "2 values for 1 entries"),
        ('{"instruction": "Q", "output": "A"}', {"near_duplicates": 1.0}, "between 0 and 1"),
        ('{"instruction": "Q", "output": "A"}', {"near_duplicates": 0.4}, "must be 0.5 or more"),
        ('{"instruction": "Q", "output": "A"}', {"train_rows": 0}, "1 or more"),
    ],
)
def test_check_refuses(tmp_path: Path, content: str | None, options: dict[str, Any], message: str) -> None:
    if content is not None:
        (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UsageError, match=message):
        prepare.check(prepare.PrepareConfig(**{"data": (str(tmp_path / "a.jsonl"),), **options}))


def test_no_data_is_refused_unless_it_is_fetched() -> None:
    site = Site(name="x")
    for config in (prepare.PrepareConfig(), prepare.PrepareConfig(data=("fetch:*.jsonl",))):
        with pytest.raises(UsageError, match="names no file"):
            prepare.size(config, Around(site=site))
        assert prepare.size(config, Around(site=site, inputs=("records",)))[1] == ()
    assert prepare.files(prepare.PrepareConfig(data=("a", "fetch:b"), eval_data=("c",), replay=("d",))) == (
        "a",
        "c",
        "d",
    )


def test_files_are_told_apart_by_as_many_folders_as_it_takes() -> None:
    paths = ["f/a/data/t.jsonl", "f/b/data/t.jsonl", "f/b/data/e.jsonl", "/x/t.jsonl", "t.jsonl", "t.jsonl"]
    told = ["a/data/t.jsonl", "b/data/t.jsonl", "e.jsonl", "x/t.jsonl", "t.jsonl", "t.jsonl"]
    assert given.names([given.Source(Path(path), "data", 0) for path in paths]) == told


def test_what_it_asks_for() -> None:
    config = prepare.PrepareConfig(data=("a", "b"), tokenizer="org/name")
    assert prepare.resources(config).gpus_per_node == 0
    assert prepare.files(config) == ("a", "b")


@pytest.mark.train
def test_rows_are_held_out_once_and_never_trained_on(tmp_path: Path, run_stage: RunStage) -> None:
    twice = [*pairs(20), *pairs(5)]
    result = run_stage("prepare", data=(write(tmp_path / "a.jsonl", *twice),), eval_rows=6)
    train, held_out = (lines(result.out("dataset") / f"{name}.jsonl") for name in ("train", "eval"))
    assert result.code == 0
    assert (len(train), len(held_out)) == (14, 6)
    assert not any(row in train for row in held_out)
    assert result.metrics["dropped"] == {"duplicate": 5}
    assert json.loads((result.out("dataset") / "report.json").read_text())["read"] == 25


@pytest.mark.train
def test_the_seed_chooses_the_held_out_rows(tmp_path: Path, run_stage: RunStage) -> None:
    data = (write(tmp_path / "a.jsonl", *pairs(20)),)
    first, second = (
        run_stage("prepare", folder=str(seed), data=data, eval_rows=5, seed=seed).out("dataset") / "eval.jsonl"
        for seed in (0, 1)
    )
    assert first.read_text() != second.read_text()


@pytest.mark.train
def test_the_first_samples_and_a_system_message(tmp_path: Path, run_stage: RunStage) -> None:
    result = run_stage("prepare", data=(write(tmp_path / "a.jsonl", *pairs(9)),), max_samples=4, system="Be brief.")
    train = lines(result.out("dataset") / "train.jsonl")
    assert [row["messages"][1]["content"] for row in train] == [f"Question {i}?" for i in range(4)]
    assert train[0]["messages"][0] == {"role": "system", "content": "Be brief."}


@pytest.mark.train
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
    assert result.metrics["tokens"] == {"median": 37, "p90": 37, "longest": 37, "total": 37}
    cut = run_stage("prepare", folder="cut", data=data, tokenizer=str(tiny_model), token_limit=30).metrics["tokens"]
    assert (cut["truncated_rows"], cut["truncated_share"], cut["lost_token_share"]) == (1, 1.0, round(7 / 37, 4))
    from transformers import AutoTokenizer

    (row,) = lines(result.out("dataset") / "train.jsonl")
    reference = AutoTokenizer.from_pretrained(tiny_model).apply_chat_template(row["messages"], return_dict=True)
    assert len(reference["input_ids"]) == 37, "as training counts them"


def dropped(result: Any) -> dict[str, str]:
    """File and line -> why."""
    return {told["record"]: told["reason"] for told in lines(result.out("dataset") / "dropped.jsonl")}


WORDS = [f"word{i}" for i in range(60)]


def near_pairs(first: int) -> list[tuple[str, str]]:
    """A long text, one with a single word changed, and one with many."""
    text = " ".join(f"{word}x{first}" for word in WORDS)
    return [("Q?", text), ("Q?", text.replace("word30", "other")), ("Q?", text.replace("word1", "w"))]


@pytest.mark.train
def test_every_dropped_record_is_named_with_its_reason(tmp_path: Path, run_stage: RunStage) -> None:
    texts = [*pairs(2), *pairs(1), ("short", "x"), ("?", "la " * 300), *near_pairs(0), ("unanswered", "")]
    data = (write(tmp_path / "a.jsonl", *texts),)
    result = run_stage("prepare", data=data, min_chars=10, repetition=0.5, near_duplicates=0.85)
    assert dropped(result) == {
        "a.jsonl line 3": "duplicate",
        "a.jsonl line 4": "too short",
        "a.jsonl line 5": "repetitive",
        "a.jsonl line 7": "near duplicate",
        "a.jsonl line 9": "no answer",
    }
    told = {t["record"]: t.get("like") for t in lines(result.out("dataset") / "dropped.jsonl")}
    assert (told["a.jsonl line 3"], told["a.jsonl line 7"]) == ("a.jsonl line 1", "a.jsonl line 6")
    kept = run_stage("prepare", folder="kept", data=data, near_duplicates=None, max_chars=400)
    assert kept.metrics["dropped"] == {"duplicate": 1, "no answer": 1, "too long": 4}


@pytest.mark.train
@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7, 0.9])
def test_rows_just_above_the_threshold_are_found(tmp_path: Path, threshold: float) -> None:
    from hpc.inside import duplicates, judging, parallel, table

    draw, rows = random.Random(0), table.Table(tmp_path)
    found = duplicates.Signatures(tmp_path, threshold)
    changed = int(198 * (1 - threshold - 0.01) / (1 + threshold + 0.01))
    texts = []
    for _ in range(400):
        words = [f"w{draw.randrange(5000)}" for _ in range(200)]
        texts += [words, [*words[changed:], *(f"x{draw.randrange(5000)}" for _ in range(changed))]]
    said = [judging.line([{"role": "user", "content": " ".join(words)}]) for words in texts]
    rows.add(0, said, range(len(said)), range(len(said)), range(len(said)))
    found.add(duplicates.signatures(texts, threshold), len(texts))
    rows.finish()
    found.finish()
    with parallel.Workers(1) as workers:
        pairs = set(duplicates.near(rows, found, workers))
    assert len(pairs & {(row + 1, row) for row in range(0, 800, 2)}) >= 399


@pytest.mark.train
def test_near_duplicates_are_found_among_rows_that_share_a_long_text(
    tmp_path: Path, run_stage: RunStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of which all agree in nearly every band, and few are near duplicates; against each compared with each."""
    draw = random.Random(0)
    vocabulary = [f"w{number}" for number in range(20_000)]
    shared = draw.choices(vocabulary, k=60)
    rows = [[*shared, *draw.choices(vocabulary, k=3)] for _ in range(320)]
    rows += [[*row[:-2], draw.choice(vocabulary), row[-1]] for row in rows[:80]]
    data = (write(tmp_path / "a.jsonl", *((" ".join(row), "yes") for row in rows)),)
    made = []
    for cores in (3, 1):
        monkeypatch.setattr("hpc.inside.preparing.cores", lambda cores=cores: cores)
        result = run_stage("prepare", folder=str(cores), data=data)
        made.append((result.out("dataset") / "dropped.jsonl").read_bytes())
    assert made[0] == made[1]
    place = {f"a.jsonl line {number + 1}": number for number in range(len(rows))}
    gone = {place[t["record"]]: place[t["like"]] for t in lines(result.out("dataset") / "dropped.jsonl")}
    grams = [set(zip(said, said[1:], said[2:], strict=False)) for said in ([*row, "yes"] for row in rows)]

    def alike(left: int, right: int) -> bool:
        return len(grams[left] & grams[right]) >= 0.9 * len(grams[left] | grams[right])

    assert len(gone) >= 80
    assert all(first < row and first not in gone and alike(row, first) for row, first in gone.items())
    left = [row for row in range(len(rows)) if row not in gone]
    assert not [(a, b) for i, a in enumerate(left) for b in left[:i] if alike(a, b)]


@pytest.mark.train
def test_rows_without_a_word_are_no_near_duplicates(tmp_path: Path, run_stage: RunStage) -> None:
    signs = [("👍", "🎉🎉"), ("😀😀😀", "—"), ("?!", "…"), ("one two", "three"), ("One, two", "three!"), ("👍", "🎉🎉")]
    result = run_stage("prepare", data=(write(tmp_path / "a.jsonl", *signs),))
    assert dropped(result) == {"a.jsonl line 5": "near duplicate", "a.jsonl line 6": "duplicate"}


@pytest.mark.train
def test_a_row_knows_its_file_among_very_many(tmp_path: Path) -> None:
    from hpc.inside.table import Table

    rows = Table(tmp_path)
    rows.add(70_000, [b"{}\n"], [1], [0], [0])
    rows.finish()
    assert rows.record(0)["file"] == 70_000


@pytest.mark.train
def test_the_bytes_do_not_tell_how_many_cores_there_were(
    tmp_path: Path, run_stage: RunStage, monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    from hpc.inside import preparing, sources, table

    for module, name in ((sources, "_PIECE"), (table, "_TASK"), (preparing, "_FOR_EACH")):
        monkeypatch.setattr(module, name, 4096)
    texts = [
        pair for i in range(60) for pair in (*pairs(3, f"{ENGLISH} {i}"), (f"{i}?", f"{SWEDISH} {i}"), *near_pairs(i))
    ]
    data = (write(tmp_path / "a.jsonl", *texts, *texts[:40]),)
    made = []
    for cores in (1, 3):
        monkeypatch.setattr(preparing, "cores", lambda cores=cores: cores)
        result = run_stage(
            "prepare", folder=str(cores), data=data, languages=("en",), eval_rows=9, train_rows=100, max_samples=400,
            tokenizer=str(tiny_model), contamination="drop",
        )  # fmt: skip
        assert result.code == 0, result.error
        made.append({path.name: path.read_bytes() for path in result.out("dataset").iterdir()})
    assert made[0] == made[1]
    assert set(made[0]) == {"train.jsonl", "eval.jsonl", "report.json", "dropped.jsonl"}
    report = json.loads(made[0]["report.json"])
    assert (report["read"], report["train"], report["eval"]) == (400, 100, 9)
    assert report["read"] == report["train"] + report["eval"] + sum(report["dropped"].values()), "none is lost"
    assert len(made[0]["dropped.jsonl"].splitlines()) == sum(report["dropped"].values())


@pytest.mark.train
def test_a_fault_behind_what_is_wanted_is_none_on_any_number_of_cores(
    tmp_path: Path, run_stage: RunStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpc.inside import preparing, sources

    for module, name in ((sources, "_PIECE"), (preparing, "_FOR_EACH")):
        monkeypatch.setattr(module, name, 1024)
    array = json.dumps([{"instruction": q, "output": a} for q, a in pairs(60)], indent=0)
    (tmp_path / "a.json").write_text(array[:-200])
    config = {"data": (str(tmp_path / "a.json"),), "near_duplicates": None}
    for cores in (1, 2):
        monkeypatch.setattr(preparing, "cores", lambda cores=cores: cores)
        assert run_stage("prepare", folder=f"few-{cores}", max_samples=20, **config).code == 0
        broken = run_stage("prepare", folder=f"all-{cores}", **config)
        assert (broken.code, "not valid JSON" in broken.error["cause"]) == (2, True)


@pytest.mark.train
def test_held_out_files_are_never_trained_on(tmp_path: Path, run_stage: RunStage) -> None:
    held = [(f"Held {i}?", f"{ENGLISH} held {i}") for i in range(3)]
    data, evaluation = write(tmp_path / "a.jsonl", *pairs(5), held[1]), write(tmp_path / "eval.jsonl", *held)
    result = run_stage("prepare", data=(data,), eval_data=(evaluation,), eval_rows=1)
    train, held_out = (lines(result.out("dataset") / f"{name}.jsonl") for name in ("train", "eval"))
    assert (len(train), len(held_out)) == (4, 4)
    assert dropped(result) == {"a.jsonl line 6": "duplicate"}
    assert not any(row in train for row in held_out)


@pytest.mark.train
def test_rows_that_share_text_with_held_out_ones(tmp_path: Path, run_stage: RunStage) -> None:
    text = " ".join(WORDS)
    fixed = "Please answer the following question as well as you can and in one single sentence only:"
    good = [(f"{fixed} {i}?", f"Answer {i}.") for i in range(20)]
    data = write(tmp_path / "a.jsonl", *good, ("Leak?", f"Before. {text[:200].upper()} after."))
    held_out = [("E?", text), (f"{fixed} 98?", "Answer."), (f"{fixed} 99?", "Answer.")]
    config = {"data": (data,), "eval_data": (write(tmp_path / "e.jsonl", *held_out),)}
    told = run_stage("prepare", **config)
    assert (told.metrics["contaminated"], told.metrics["share_phrases"]) == (1, 20), "a phrase of both is told apart"
    assert told.metrics["train"] == 21
    fewer = run_stage("prepare", folder="drop", contamination="drop", **config)
    assert dropped(fewer) == {"a.jsonl line 21": "shares text with held-out rows"}
    refused = run_stage("prepare", folder="refuse", contamination="refuse", **config)
    assert (refused.code, refused.error["cause"][:31]) == (6, "a.jsonl line 21 shares 13 words")
    many = [(f"Leak {i}? {text}", f"{'x' * i}.") for i in range(1, 13)]
    often = {**config, "data": (write(tmp_path / "b.jsonl", *many),), "near_duplicates": None}
    told = run_stage("prepare", folder="often", **often)
    assert told.metrics["contaminated"] == 12, "a question that many repeat is no phrase"


@pytest.mark.train
def test_a_mixture_with_weights_and_older_data(
    tmp_path: Path, run_stage: RunStage, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [write(tmp_path / f"{n}.jsonl", *((f"{n} {i}?", f"{n} answers {i}.") for i in range(40))) for n in "abc"]
    config = {"data": tuple(files[:2]), "weights": (3.0, 1.0), "replay": (files[2],), "replay_share": 0.2}
    result = run_stage("prepare", **config)
    train = [row["messages"][1]["content"][0] for row in lines(result.out("dataset") / "train.jsonl")]
    assert {name: train.count(name) for name in "abc"} == {"a": 40, "b": 13, "c": 13}
    assert (result.metrics["mixture"], result.metrics["replayed"]) == ([40, 13], 13)
    less = run_stage("prepare", folder="less", train_rows=20, **config)
    assert (less.metrics["mixture"], less.metrics["replayed"], less.metrics["train"]) == ([12, 4], 4, 20)
    assert "replay_share" not in capsys.readouterr().out
    assert run_stage("prepare", folder="short", **{**config, "replay_share": 0.5}).metrics["replayed"] == 40
    assert "all 40 older rows are taken" in capsys.readouterr().out


@pytest.mark.train
def test_a_mixture_without_rows_to_train_on_is_refused(tmp_path: Path, run_stage: RunStage) -> None:
    full, held_out = write(tmp_path / "a.jsonl", *pairs(8)), write(tmp_path / "e.jsonl", ("Held out?", ENGLISH))
    hollow = write(tmp_path / "b.jsonl", ("x", ""), ("y", ""))
    for number, (config, cause) in enumerate(
        (
            ({"data": (full, hollow), "weights": (1.0, 1.0)}, "b.jsonl is left to mix (dropped: 2 no answer)"),
            (
                {"data": (full,), "eval_data": (held_out,), "contamination": "drop"},
                "no row is left to train on (dropped: 8 shares text with held-out rows)",
            ),
            ({"data": (full,), "train_rows": 1, "replay": (held_out,), "replay_share": 0.6}, "no row is left"),
            (
                {"data": (full,), "eval_data": (hollow,), "eval_rows": 1},
                "b.jsonl is left to measure on (dropped: 2 no answer)",
            ),
        )
    ):
        result = run_stage("prepare", folder=str(number), **config)
        assert (result.code, cause in result.error["cause"]) == (2, True), result.error


@pytest.mark.train
def test_a_subset_is_chosen_by_the_seed_and_keeps_the_order(tmp_path: Path, run_stage: RunStage) -> None:
    data = (write(tmp_path / "a.jsonl", *pairs(50)),)
    chosen = [
        [row["messages"][0]["content"] for row in lines(found.out("dataset") / "train.jsonl")]
        for found in (run_stage("prepare", folder=str(seed), data=data, train_rows=10, seed=seed) for seed in (0, 1))
    ]
    assert chosen[0] != chosen[1]
    for questions in chosen:
        numbers = [int(question.split()[1].rstrip("?")) for question in questions]
        assert len(numbers) == 10
        assert numbers == sorted(numbers)


@pytest.mark.train
def test_what_the_template_loses_is_said_with_a_way_out(
    tmp_path: Path, run_stage: RunStage, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thought = [("Q1?", "<think>\nbecause\n</think>\n\nA1."), ("Q2?", "A2.")]
    data = (write(tmp_path / "a.jsonl", *thought),)
    loses = tmp_path / "loses"
    shutil.copytree(tiny_model, loses)
    (loses / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.content.split('</think>')[-1] }}{% endif %}{% endfor %}"
    )
    result = run_stage("prepare", data=data, tokenizer=str(loses), system="S")
    assert {k: v for k, v in result.metrics["template_loses"].items() if k != "so"} == {"reasoning": 1, "system": 2}
    said = capsys.readouterr().out
    assert "the model's own chat template loses the system message of 2 rows" in said
    assert 'prepare.system_turns = "fold"' in said
    config = {"data": data, "system": "S", "template": "deepseek-r1"}
    kept = run_stage("prepare", folder="kept", thinking="require", **config)
    assert (kept.metrics["template_loses"], kept.metrics["dropped"]) == ({}, {"no reasoning": 1})
    assert "<｜Assistant｜><think>" in (kept.out("dataset") / "chat_template.jinja").read_text()
    stripped = run_stage("prepare", folder="strip", thinking="strip", system_turns="fold", **config)
    rows = [row["messages"] for row in lines(stripped.out("dataset") / "train.jsonl")]
    assert [[m["content"] for m in row] for row in rows] == [["S\n\nQ1?", "A1."], ["S\n\nQ2?", "A2."]]


@pytest.mark.train
def test_a_template_that_refuses_a_row_is_a_usage_error(tmp_path: Path, run_stage: RunStage, tiny_model: Path) -> None:
    strict = tmp_path / "strict"
    shutil.copytree(tiny_model, strict)
    (strict / "chat_template.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    )
    data = (write(tmp_path / "a.jsonl", *pairs(2)),)
    result = run_stage("prepare", data=data, tokenizer=str(strict), system="S")
    assert result.code == 2
    assert "no system role" in result.error["cause"]
    assert 'system_turns = "fold"' in result.error["hint"]


@pytest.mark.train
def test_it_ends_without_an_output_where_the_scheduler_asks(
    tmp_path: Path, run_stage: RunStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpc.inside import runner

    monkeypatch.setattr(runner.RunContext, "stopping", lambda self: True)
    result = run_stage("prepare", data=(write(tmp_path / "a.jsonl", *pairs(3)),))
    assert (result.code, result.out("dataset").exists()) == (85, False)
    assert [path.name for path in result.folder.iterdir() if "part" in path.name] == []


@pytest.mark.train
def test_the_reference_detector_can_be_asked_for(tmp_path: Path, run_stage: RunStage) -> None:
    data = (write(tmp_path / "a.jsonl", *pairs(3), *pairs(2, SWEDISH)),)
    result = run_stage("prepare", data=data, languages=("en",), detector="langdetect")
    assert result.metrics["languages"] == {"en": 3, "sv": 2}
    assert "detectors_agree" not in result.metrics
    fast = run_stage("prepare", folder="fast", data=data, languages=("en",))
    assert fast.metrics["detectors_agree"] == {"rows": 5, "same": 5}
