"""generate: what is asked and kept, against a small server in this process: a stub of a model behind OpenAI's API."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from hpc.core import endpoint
from hpc.core.endpoint import Endpoint
from hpc.core.errors import STOPPED, UsageError
from hpc.core.rundir import StageDir
from hpc.inside import asking
from hpc.inside.prompts import read
from stages import generate

RunStage = Callable[..., Any]


class StubModel:
    """Answers with what `say` makes of the last message; `before` may give a status to fail with."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.say: Callable[[dict[str, Any]], Any] = lambda body: f"About {body['messages'][-1]['content']}"
        self.before: Callable[[], int] = lambda: 200
        self.ends: Callable[[dict[str, Any]], str] = lambda body: "stop"
        self.token = "secret"
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status = outer.before()
                if self.headers.get("Authorization") != f"Bearer {outer.token}":
                    status = 401
                answer: dict[str, Any] = {"error": {"message": f"because {status}"}}
                if status == 200:
                    outer.asked.append(body)
                    choice = {"message": {"content": outer.say(body)}, "finish_reason": outer.ends(body)}
                    answer = {"model": "stub", "choices": [choice], "usage": {"completion_tokens": 3}}
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def announce(self, folder: Path) -> str:
        """The folder of a serving stage that leads here."""
        folder.mkdir(exist_ok=True)
        announced = Endpoint(
            host="127.0.0.1", bound="127.0.0.1", ports={"http": self.port}, path="/", health="/health", job_id="1",
            pid=1, ready=0.0,
        )  # fmt: skip
        endpoint.write(StageDir(folder), announced, self.token)
        return str(folder)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def model() -> Iterator[StubModel]:
    stub = StubModel()
    yield stub
    stub.close()


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"the {word}\n" for word in ("wall", "roof", "집", "door", "🏠")), encoding="utf-8")
    return str(path)


def talk(*turns: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_answers_become_rows_with_where_they_came_from(
    run_stage: RunStage, model: StubModel, prompts: str, tmp_path: Path
) -> None:
    served = model.announce(tmp_path / "serve")
    options = {"prompts": (prompts,), "system": "be brief", "template": "Tell me: {prompt}", "eval_share": 0.4}
    result = run_stage("generate", {"endpoint": served}, **options)
    assert (result.code, result.error) == (0, {})
    train, held = (rows(result.out("dataset") / f"{part}.jsonl") for part in ("train", "eval"))
    assert (len(train), len(held)) == (3, 2)
    row = next(row for row in (*train, *held) if row["from"]["where"] == "prompts.txt line 3")
    assert row["messages"] == [
        {"role": "user", "content": "the 집"},
        {"role": "assistant", "content": "About Tell me: the 집"},
    ]
    assert model.asked[0]["messages"][0] == {"role": "system", "content": "be brief"}
    assert len({body["seed"] for body in model.asked}) == 5
    told = json.loads((result.out("dataset") / "provenance.json").read_text())
    assert told["models"] == ["stub"]
    assert told["config"]["template"] == "Tell me: {prompt}"
    assert result.metrics["rows"] == 5
    assert "secret" not in "".join(p.read_text() for p in result.folder.rglob("*") if p.is_file())


def test_the_same_answers_make_the_same_bytes_in_whatever_order_they_come(
    run_stage: RunStage, model: StubModel, prompts: str, tmp_path: Path
) -> None:
    served = model.announce(tmp_path / "serve")
    made = []
    for name, concurrency in (("one", 1), ("many", 16)):
        result = run_stage(
            "generate", {"endpoint": served}, folder=name, prompts=(prompts,), samples=3, concurrency=concurrency
        )
        made.append([(result.out("dataset") / f"{part}.jsonl").read_bytes() for part in ("train", "eval", "dropped")])
    assert made[0] == made[1]
    assert [row["reason"] for row in map(json.loads, made[0][2].splitlines())] == ["said before"] * 10


@pytest.mark.parametrize(
    ("said", "finish", "options", "reason"),
    [
        ("", "stop", {}, "empty"),
        ("so lo", "length", {}, "cut off at max_tokens"),
        ("no", "stop", {"min_chars": 3}, "too short"),
        ("much too long", "stop", {"max_chars": 5}, "too long"),
        ("As an AI, I", "stop", {"without": ("(?i)as an ai",)}, "without: (?i)as an ai"),
        ("the wall", "stop", {}, "the prompt itself"),
        ("<think>only a thought</think>", "stop", {"thoughts": "strip"}, "empty"),
        ("<think>a thought", "stop", {"thoughts": "strip"}, "empty"),
        ("a thought\n</think>\n\n", "stop", {"thoughts": "strip"}, "empty"),
        ("half of some", "content_filter", {"unfinished": True}, "the service refused the request"),
    ],
)
def test_what_is_left_out_is_kept_apart_with_its_reason(
    run_stage: RunStage,
    model: StubModel,
    prompts: str,
    tmp_path: Path,
    said: str,
    finish: str,
    options: dict[str, Any],
    reason: str,
) -> None:
    model.say = lambda body: said if body["messages"][-1]["content"] == "the wall" else "fine"
    model.ends = lambda body: finish if finish == "length" or model.say(body) == said else "stop"
    served = model.announce(tmp_path / "serve")
    kept = {"unfinished": False, **options}
    result = run_stage("generate", {"endpoint": served}, prompts=(prompts,), **kept)
    if finish == "length":  # all of them were cut
        assert result.code == 1
        assert result.error["cause"] == "none of 5 answers was good enough; 5 times: cut off at max_tokens"
        return
    dropped = rows(result.out("dataset") / "dropped.jsonl")
    assert [row["reason"] for row in dropped if row["where"] == "prompts.txt line 1"] == [reason]


def test_a_judge_leaves_out_what_it_gives_less_than_the_least_score(
    run_stage: RunStage, model: StubModel, prompts: str, tmp_path: Path
) -> None:
    def say(body: dict[str, Any]) -> str:
        text = body["messages"][-1]["content"]
        if not text.startswith("Rate"):
            return text.upper()
        said = {
            "THE WALL": "1 or 2?</think>On a scale from 1 to 10: 9",
            "THE DOOR": "Score: 3/10",
            "THE ROOF": "who knows",
        }
        return said.get(text.partition(": ")[2], "<think>5</think>8")

    model.say = say
    served = model.announce(tmp_path / "serve")
    options = {"judge": "Rate {prompt}: {answer}", "eval_share": 0.0}
    result = run_stage("generate", {"endpoint": served}, prompts=(prompts,), **options)
    train = {row["messages"][0]["content"]: row["from"]["score"] for row in rows(result.out("dataset") / "train.jsonl")}
    assert train == {"the wall": 9, "the 집": 8, "the 🏠": 8}
    reasons = [row["reason"] for row in rows(result.out("dataset") / "dropped.jsonl")]
    assert reasons == ["the judge gave no number", "judged below 7"]


def test_the_same_question_in_another_conversation_is_another_prompt(
    run_stage: RunStage, model: StubModel, tmp_path: Path
) -> None:
    """And an answer that comes in parts is a text."""
    paris, rome = (talk(f"Is {city} in France?", "Yes.", "Sure?") for city in ("Paris", "Rome"))
    lines = (json.dumps({"messages": messages}) + "\n" for messages in (paris, rome, paris))
    (tmp_path / "p.jsonl").write_text("".join(lines))
    model.say = lambda body: [{"type": "text", "text": "Qu"}, {"type": "text", "text": "ite."}]
    served = model.announce(tmp_path / "serve")
    result = run_stage("generate", {"endpoint": served}, prompts=(str(tmp_path / "p.jsonl"),), eval_share=0.5)
    assert (result.code, result.metrics["dropped"]) == (0, {"said before": 1})
    made = [*rows(result.out("dataset") / "train.jsonl"), *rows(result.out("dataset") / "eval.jsonl")]
    assert sorted(row["messages"][0]["content"] for row in made) == ["Is Paris in France?", "Is Rome in France?"]
    assert {row["messages"][-1]["content"] for row in made} == {"Quite."}


def test_an_answer_that_is_no_text_ends_the_stage_with_a_sentence(
    run_stage: RunStage, model: StubModel, prompts: str, tmp_path: Path
) -> None:
    model.say = lambda body: [{"type": "image_url", "image_url": {"url": "x"}}]
    result = run_stage("generate", {"endpoint": model.announce(tmp_path / "serve")}, prompts=(prompts,))
    assert result.code == 1
    assert "does not answer as OpenAI's API does" in result.error["cause"]


def test_a_thought_that_began_in_the_prompt_is_whole_and_a_row_is_always_left(
    run_stage: RunStage, model: StubModel, tmp_path: Path
) -> None:
    (tmp_path / "one.txt").write_text("the wall\n")
    model.say = lambda body: "hm\n</think>\n\nBricks."
    options = {"prompts": (str(tmp_path / "one.txt"),), "eval_share": 0.6}
    for thoughts, text in (("keep", "<think>\nhm\n</think>\n\nBricks."), ("strip", "Bricks.")):
        served = model.announce(tmp_path / "serve")
        result = run_stage("generate", {"endpoint": served}, folder=thoughts, thoughts=thoughts, **options)
        (row,) = rows(result.out("dataset") / "train.jsonl")
        assert row["messages"][-1]["content"] == text


@pytest.mark.parametrize(
    ("said", "number"),
    [
        ("8", 8),
        ("On a scale from 1 to 10 I give it 9", 9),
        ("I give it 9 on a scale of 1-10.", 9),
        ("8 out of 10, with 2 faults", 8),
        ("7.5", 7.5),
        ("Score: -5", -5),
        ("none", None),
    ],
)
def test_the_number_of_a_judge(said: str, number: float | None) -> None:
    assert generate.score(said) == number


def test_a_service_that_moves_is_followed_and_one_that_refuses_is_not_asked_again(
    run_stage: RunStage, model: StubModel, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "_AGAIN_S", 0.05)
    folder = tmp_path / "serve"
    moved = StubModel()
    moved.token = "another"

    def leave() -> int:
        if len(model.asked) < 2:
            return 200
        moved.announce(folder)
        return 503

    model.before = leave
    refusals = iter([400])
    moved.before = lambda: next(refusals, 200)
    result = run_stage("generate", {"endpoint": model.announce(folder)}, prompts=(prompts,), concurrency=1)
    moved.close()
    assert result.code == 0
    assert (len(model.asked), len(moved.asked)) == (2, 2)
    (dropped,) = rows(result.out("dataset") / "dropped.jsonl")
    assert (dropped["reason"], dropped["refused"]) == ("the service refused the request", "because 400")


def test_a_stage_that_is_stopped_keeps_its_answers_and_goes_on_from_there(
    run_stage: RunStage, model: StubModel, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpc.inside import runner

    served = model.announce(tmp_path / "serve")
    monkeypatch.setattr(runner.RunContext, "stopping", lambda self: len(model.asked) >= 2)
    first = run_stage("generate", {"endpoint": served}, prompts=(prompts,), concurrency=1)
    assert (first.code, len(model.asked)) == (STOPPED, 2)
    with open(first.folder / "checkpoints" / "answers.jsonl", "ab") as file:
        file.write('{"at": [4, 0], "text": "é'.encode()[:-1])  # killed while it wrote, in the middle of a letter
    monkeypatch.undo()
    second = run_stage("generate", {"endpoint": served}, prompts=(prompts,), concurrency=1)
    assert (second.code, len(model.asked)) == (0, 5)
    assert second.metrics["rows"] == 5


def test_a_service_that_stays_away_and_a_wrong_token_are_said(
    run_stage: RunStage, model: StubModel, prompts: str, tmp_path: Path
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    result = run_stage("generate", {"endpoint": gone}, prompts=(prompts,), patience_s=0)
    assert (result.code, result.error["exit_code"]) == (5, 5)
    assert "has not answered for 0 s: it is not ready" in result.error["cause"]
    token = tmp_path / "token"
    token.write_text("wrong\n")
    address = f"http://127.0.0.1:{model.port}/v1"
    result = run_stage("generate", {"endpoint": address}, prompts=(prompts,), token_file=str(token))
    assert (result.code, result.error["cause"]) == (1, f"{address} does not let us in: because 401")
    token.write_text("secret\n")
    result = run_stage("generate", {"endpoint": address}, prompts=(prompts,), token_file=str(token))
    assert result.code == 0


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("a.txt", "one\n\n  two \n", ["one", "two"]),
        ("a.jsonl", '{"prompt": "one"}\n{"instruction": "sum", "input": "1 2"}', ["one", "sum\n\n1 2"]),
        ("a.TXT", "\ufeffone\n", ["one"]),
        ("a.jsonl", '\ufeff{"prompt": "one"}', ["one"]),
        ("a.jsonl", '{"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}]}', ["q"]),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}', ["q"]),
    ],
)
def test_prompts_are_read(tmp_path: Path, name: str, text: str, found: list[str]) -> None:
    (tmp_path / name).write_text(text)
    assert [prompt.text for prompt in read(tmp_path / name)] == found


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("{", {}, "a.jsonl line 1: not valid JSON"),
        ('{"text": "x"}', {}, "a.jsonl line 1: no prompt in it"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', {}, "line 1: 'content' must be a text"),
        ('{"prompt": "x"}\n{"prompt": "a\\ud83d"}', {}, "a.jsonl line 2 holds half of a \\u surrogate pair"),
        ("", {}, "holds no prompt"),
        (None, {}, "cannot read"),
        ('{"prompt": "x"}', {"template": "hello"}, "template lacks {prompt}"),
        ('{"prompt": "x"}', {"judge": "good?"}, "judge lacks {answer}"),
        ('{"prompt": "x"}', {"without": ("(",)}, "is no regular expression"),
        ('{"prompt": "x"}', {"samples": 2, "temperature": 0.0}, "are all the same"),
        ('{"prompt": "x"}', {"concurrency": 0}, "concurrency must be 1"),
        ('{"prompt": "x"}', {"prompts": ()}, "names no file"),
    ],
)
def test_check_refuses(tmp_path: Path, text: str | None, options: dict[str, Any], message: str) -> None:
    path = tmp_path / "a.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError) as failed:
        generate.check(generate.GenerateConfig(**{"prompts": (str(path),), **options}))
    assert message in failed.value.message
