"""`hpc query` and `hpc chat` against a stub of the door: whole characters, thoughts, errors, what a chat remembers."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpc.core.errors import HpcError, NotReady, UsageError
from hpc.login import answers, cli, doorway, opened
from hpc.login import question as words
from hpc.login.chat import Chat
from hpc.login.conversation import Conversation, Turn
from hpc.login.question import Question, Sampling, TooLong
from hpc.login.thoughts import Thoughts, split
from tests.support.door import TOKEN, Reply, Stub, chunk, stream
from tests.support.terminal import CONTROLLING, Terminal

TEXT = "안녕하세요 🙂 반갑습니다! naïve 끝"
ROOT = Path(__file__).resolve().parents[2]


pytestmark = pytest.mark.usefixtures("own_state")


def query(stub: Stub, *arguments: str) -> int:
    return cli.main(["query", "--url", stub.url, *arguments])


# ---- whole characters


@pytest.mark.parametrize("split_at", [0, 1, 2, 3, 5, 7, 4096])
@pytest.mark.parametrize("more", [(), ("--no-stream",)])
def test_no_character_is_ever_cut(
    stub: Any, split_at: int, more: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert query(stub(Reply(stream(list(TEXT)), split=split_at)), "인사", *more) == 0
    assert capsys.readouterr().out == TEXT + "\n"


def test_what_is_asked_is_what_was_typed(stub: Any, capsys: pytest.CaptureFixture[str]) -> None:
    one = stub(Reply(stream(["x"])))
    options = ("--max-tokens", "7", "--temperature", "0", "--top-p", "0.5", "--top-k", "3", "--seed", "1",
               "--stop", "끝", "--stop", "b", "--min-tokens", "2", "--repetition-penalty", "1.1",
               "--system", "brief")  # fmt: skip
    assert query(one, "it's 한글", *options) == 0
    path, body = one.asked[-1]
    assert path == "/v1/chat/completions"
    assert body == {
        "messages": [{"role": "system", "content": "brief"}, {"role": "user", "content": "it's 한글"}],
        "max_tokens": 7, "min_tokens": 2, "temperature": 0.0, "top_p": 0.5, "top_k": 3, "seed": 1, "stop": ["끝", "b"],
        "repetition_penalty": 1.1, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    assert query(one, "go on", "--raw", "--no-stream") == 0
    assert one.asked[-1] == ("/v1/completions", {"prompt": "go on"})


def test_one_document_for_programs(stub: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert query(stub(Reply(stream(["<think>hm</think>", "", "a", "b"]))), "x", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["schema"], found["text"], found["thought"], found["finish_reason"]) == (
        "hpc.query/1", "ab", "hm", "stop",
    )  # fmt: skip
    assert (found["prompt_tokens"], found["completion_tokens"]) == (5, 4)
    assert 0 < found["first_s"] <= found["seconds"] < 60


# ---- thoughts


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_thoughts_are_left_out_wherever_their_tags_are_cut(
    stub: Any, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "<think>\nwhat <b>이</b> </thin ?\n</think>\n\n답 < 3 </th <think>again</think> 끝"
    pieces = [text[n : n + size] for n in range(0, len(text), size)]
    assert query(stub(Reply(stream(pieces))), "x") == 0
    assert capsys.readouterr().out == "답 < 3 </th 끝\n"
    assert query(stub(Reply(stream(pieces))), "x", "--show-thinking") == 0
    assert capsys.readouterr().out == text + "\n"


def test_a_thought_that_the_prompt_has_begun(stub: Any, capsys: pytest.CaptureFixture[str]) -> None:
    one = stub(Reply(stream(["so", " it is", "</thi", "nk>", "yes"])))
    assert query(one, "x", "--no-stream") == 0
    assert capsys.readouterr().out == "yes\n"
    assert query(one, "x") == 0  # what was shown cannot be taken back: it is told
    out, err = capsys.readouterr()
    assert out == "so it is\nyes\n"
    assert "what stands above was a thought" in err


def test_text_that_only_begins_like_a_tag_comes_at_the_end() -> None:
    thoughts = Thoughts()
    assert [p.text for p in thoughts.feed("a <thin")] == ["a "]
    assert [p.text for p in thoughts.end()] == ["<thin"]
    assert split("<think>never ended") == ("", "never ended")


# ---- errors


LIMIT = "in ensemble 'ensemble', the prompt has 2500 tokens; this engine takes 2047 at most"


@pytest.mark.parametrize(
    ("reply", "code", "told"),
    [
        (Reply(status=400, body={"error": {"message": LIMIT}}), 2, "error: the prompt has 2500 tokens; this"),
        (Reply(status=400, body={"error": {"message": "temperature must be from 0 to 2"}}), 2, "temperature must be"),
        (Reply(status=400, body={"error": {"message": "this model has no chat template: use"}}), 2, "--raw"),
        (Reply(status=404, body={"error": {"message": "/v1/chat: Not Found"}}), 2, "Not Found"),
        (Reply(status=503, body={"error": {"message": "this service is ending"}}), 5, "this service is ending"),
        (Reply(status=503, body={"error": {"message": "the model has failed: x"}}), 1, "the model has failed"),
        (Reply(status=502, body={"error": "upstream"}), 1, "upstream"),
        (Reply(status=502, body={"error": "up\x1b[2J\x9bstream"}), 1, "up[2Jstream"),
        (Reply(body={"error": "generate expects model to produce exactly 1 response"}), 1, "exactly 1 response"),
        (Reply([chunk("a"), '{"error": {"message": "the model broke"}}']), 1, "the model broke"),
        (Reply([chunk("a"), '{"error": "as a text"}', "[DONE]"]), 1, "as a text"),
        (Reply(stream(["a", "b"]), cut_after=2), 1, "broke off in the middle"),
        (Reply([chunk("a")]), 1, "broke off in the middle"),
        (Reply([chunk("a"), "[DONE]"]), 1, "broke off in the middle"),
        (Reply(["no json"]), 1, "something else than JSON"),
        (Reply(['{"choices": [{"delta": "x"}], "usage": 5}', '{"choices": 1}']), 1, "broke off in the middle"),
        (Reply(stream([], reason="length")), 1, "without a word"),
    ],
)  # fmt: skip
def test_every_error_is_seen_wherever_it_stands(
    stub: Any, reply: Reply, code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    one = stub(reply)
    assert query(one, "x") == code
    assert told in capsys.readouterr().err
    assert query(one, "x", "--json") == code
    out, err = capsys.readouterr()
    assert (json.loads(out)["exit_code"], told in err) == (code, True)


def test_who_has_no_token_or_a_wrong_one(
    stub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = stub(Reply(stream(["x"])))
    monkeypatch.delenv("HPC_TOKEN")
    assert query(one, "x") == 2
    assert "there is no token for" in capsys.readouterr().err
    file = tmp_path / "token"
    file.write_text("wrong\n")
    assert query(one, "x", "--token-file", str(file)) == 2
    assert "others may read" in capsys.readouterr().err
    file.chmod(0o600)
    assert query(one, "x", "--token-file", str(file)) == 2
    assert "does not take this token" in capsys.readouterr().err
    file.write_text(TOKEN + "\n")
    assert query(one, "x", "--token-file", str(file)) == 0
    assert query(one, "x", "--token-file", str(tmp_path / "none")) == 2
    file.write_text("two words")
    assert query(one, "x", "--token-file", str(file)) == 2
    capsys.readouterr()
    for wrong in ("sek\nret", "한"):
        monkeypatch.setenv("HPC_TOKEN", wrong)
        assert query(one, "x") == 2
        assert capsys.readouterr().err.startswith("error: HPC_TOKEN holds no token\n")
    monkeypatch.setenv("HPC_TOKEN", TOKEN)
    assert query(one, "x", "--token-file", "") == 2, "a variable that is not set, in a script"
    assert cli.main(["query", "x", "--url", f"{one.url}/?token={TOKEN}"]) == 2
    assert "list of processes" in capsys.readouterr().err


def test_the_token_of_a_tunnel_that_is_open_here_is_found(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = stub(Reply(stream(["x"])))
    monkeypatch.delenv("HPC_TOKEN")
    opened.note({"http": one.port, "grpc": one.port + 1}, TOKEN)
    assert query(one, "x") == 0
    assert doorway.of_url(one.url, None, {}).grpc == f"127.0.0.1:{one.port + 1}"
    opened.forget({"http": one.port})
    assert query(one, "x") == 2


def test_an_address_is_one_of_this_machine_also_where_a_login_node_is_set(
    stub: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HPC_VIA", "somewhere")
    monkeypatch.setenv("HPC_SSH", "false")
    assert query(stub(Reply(stream(["x"]))), "x") == 0
    assert capsys.readouterr().out == "x\n"
    assert cli.main(["query", "x"]) != 0


def test_nothing_listens_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["query", "x", "--url", "http://127.0.0.1:1"]) == 5
    assert "connection refused" in capsys.readouterr().err
    for url in ("ftp://x", "http://", "http://x:99999", "http://[", "http://[x]", "a..b", "a" * 64, "a b", "é.."):
        assert cli.main(["query", "x", "--url", url]) == 2
        assert "is no address" in capsys.readouterr().err
    assert cli.main(["query", "x", "--url", "http://[::ffff:7f00:a]:1"]) == 5


def test_what_cannot_be_asked_is_refused(stub: Any, capsys: pytest.CaptureFixture[str]) -> None:
    one = stub(Reply(stream(["x"])))
    assert query(one, " ") == 2
    assert query(one, "x", "--raw", "--system", "y") == 2
    assert query(one, "x", "--max-tokens", "0") == 2
    assert query(one, "x", "--run", "y") == 2
    assert cli.main(["query", "x", "--token-file", "f"]) == 2
    assert one.asked == []


def test_grpc_without_its_client_says_what_to_install(
    stub: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient", None)
    assert query(stub(Reply(stream(["x"]))), "x", "--protocol", "grpc", "--raw") == 2
    assert "hpc-batch[client]" in capsys.readouterr().err


# ---- Triton's own API


def triton(
    config: dict[str, Any], *events: dict[str, Any], bls: dict[str, Any] | None = None
) -> Callable[[str, dict[str, Any]], Reply]:
    def reply(path: str, body: dict[str, Any]) -> Reply:
        if path.endswith("/config"):
            return Reply(body=bls or {} if path == "/v2/models/tensorrt_llm_bls/config" else config)
        if path.endswith("/generate"):
            return Reply(body=events[-1])
        return Reply([json.dumps(event, ensure_ascii=False) for event in events])

    return reply


OURS = {"output": [{"name": "finish_reason"}]}
NVIDIAS = {"output": [{"name": "text_output"}], "ensemble_scheduling": {"step": [{"model_name": "preprocessing"}]}}
LLMAPI = {"output": [{"name": "text_output"}], "ensemble_scheduling": {"step": [{"model_name": "tensorrt_llm"}]}}


@pytest.mark.parametrize(
    ("config", "model", "texts"),
    [
        (OURS, "ensemble", ["안", "녕"]),
        (NVIDIAS, "tensorrt_llm_bls", ["안", "녕"]),
        (LLMAPI, "ensemble", ["안", "안녕"]),
    ],
)
def test_tritons_own_api_is_asked_of_the_model_that_fits(
    stub: Any, config: dict[str, Any], model: str, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    one = stub(triton(config, *({"text_output": text, "sequence_length": 1} for text in texts)))
    assert query(one, "x", "--protocol", "http", "--temperature", "0", "--stop", "s") == 0
    out, err = capsys.readouterr()
    assert out == "안녕\n"
    assert "no chat template" in err
    asked = {"text_input": "x", "max_tokens": 512, "stream": True, "top_k": 1, "stop_words": ["s"]}
    if config is LLMAPI:
        asked["exclude_input"] = True
    assert one.asked[-1] == (f"/v2/models/{model}/generate_stream", asked)


@pytest.mark.parametrize("more", [(), ("--no-stream",)])
def test_nvidias_own_answers_hold_all_of_the_text_so_far(
    stub: Any, more: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    accumulates = {"accumulate_tokens": {"string_value": "true"}}
    bls = {"parameters": accumulates, "input": [{"name": "text_input"}, {"name": "seed"}, {"name": "min_tokens"}]}
    texts = ("안", "안\ufffd", "안녕", "안녕E", "안녕EN", "안녕END")
    one = stub(triton(NVIDIAS, *({"text_output": text} for text in texts), bls=bls))
    options = ("--protocol", "http", "--raw", "--stop", "END", "--seed", "3", "--min-tokens", "2", *more)
    assert query(one, "x", *options) == 0
    assert capsys.readouterr().out == "안녕\n"
    path, asked = one.asked[-1]
    assert path == f"/v2/models/tensorrt_llm_bls/generate{'' if more else '_stream'}"
    assert (asked["seed"], asked["min_tokens"]) == (3, 2)
    assert "random_seed" not in asked
    bls["parameters"] = {}
    one = stub(triton(NVIDIAS, {"text_output": "안"}, {"text_output": "녕"}, bls=bls))
    assert query(one, "x", *options[:3]) == 0
    assert capsys.readouterr().out == "안녕\n"


def test_an_error_in_tritons_stream_is_seen(stub: Any, capsys: pytest.CaptureFixture[str]) -> None:
    one = stub(triton(OURS, {"text_output": "a"}, {"error": LIMIT}))
    assert query(one, "x", "--protocol", "http", "--raw") == 2
    assert "takes 2047 at most" in capsys.readouterr().err


def test_the_kinds_of_refusal() -> None:
    kinds = {
        (400, LIMIT): TooLong, (200, LIMIT): TooLong, (401, ""): UsageError, (200, "broke"): HpcError,
        (503, "this service is ending"): NotReady, (503, "the model has failed: x"): HpcError,
    }  # fmt: skip
    for (status, message), kind in kinds.items():
        error = words.failure("serve-1/serve", status, message)
        assert type(error) is kind
        assert error.hint


def test_closing_the_answer_ends_it_at_the_service(stub: Any) -> None:
    one = stub(Reply(stream(["a"] * 50_000), delay=0.01))
    pieces = answers.ask(doorway.of_url(one.url, None, {"HPC_TOKEN": TOKEN}), Question(text="x", sampling=Sampling()))
    assert next(pieces).text == "a"
    pieces.close()
    until(lambda: one.gone == 1)


def until(found: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---- chat


def reply_of(room: int) -> Callable[[str, dict[str, Any]], Reply]:
    """Says the last message again, and how many there were; takes so many letters at most."""

    def reply(path: str, body: dict[str, Any]) -> Reply:
        messages = body["messages"]
        length = sum(len(m["content"]) for m in messages)
        if length > room:
            said = f"the prompt has {length} tokens; this engine takes {room} at most"
            return Reply(status=400, body={"error": {"message": said}})
        if messages[-1]["content"] == "title":
            return Reply(stream(["<think>a\x1b]0;title\x07b</think>", "\x1b[2Jc"]))
        if messages[-1]["content"] == "slowly":
            return Reply(stream(["go "] * 1000), delay=0.01)
        return Reply(stream(["<think>hm</think>", f"{len(messages)}:", messages[-1]["content"]]))

    return reply


def chat(stub: Stub, lines: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "hpc", "chat", "--url", stub.url, *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    text = "\n".join(lines)
    return subprocess.run(argv, input=text, capture_output=True, encoding="utf-8", env=env, check=False, timeout=60)


def test_line_by_line(stub: Any, tmp_path: Path) -> None:
    one = stub(reply_of(60))
    saved = tmp_path / "talk.json"
    lines = ["a", "", "b", "/system brief", "c", "/save " + str(saved), "x" * 50, "/reset", "한", "/nonsense", "z" * 99]
    done = chat(one, lines)
    assert done.stdout.splitlines() == ["1:a", "3:b", "6:c", "4:" + "x" * 50, "2:한"]
    assert "the prompt has 67 tokens; this engine takes 60 at most" in done.stderr
    assert "the oldest 2 turns are left out" in done.stderr
    assert "there is no /nonsense" in done.stderr
    assert "takes 60 at most" in done.stderr.splitlines()[-2]
    assert done.returncode == 2
    document = json.loads(saved.read_text())
    assert document["schema"] == "hpc.chat/1"
    assert document["turns"][1] == {"question": "b", "answer": "3:b", "thought": "hm", "stopped": False}
    assert saved.stat().st_mode & 0o077 == 0
    sent = [m["content"] for m in one.asked[2][1]["messages"]]
    assert sent == ["brief", "a", "1:a", "b", "3:b", "c"]  # without thoughts
    done = chat(one, ["a", "/quit", "b"], "--json")
    assert [t["answer"] for t in json.loads(done.stdout)["turns"]] == ["1:a"]


@pytest.fixture
def terminal(stub: Any) -> Iterator[tuple[Terminal, Stub]]:
    one = stub(reply_of(1000))
    argv = [sys.executable, "-c", CONTROLLING, sys.executable, "-m", "hpc", "chat", "--url", one.url]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "LANG": "C.UTF-8"}
    shown = Terminal(lambda **streams: subprocess.Popen(argv, env=env, start_new_session=True, **streams))
    yield shown, one
    if shown.process.poll() is None:
        shown.process.send_signal(signal.SIGKILL)
        shown.process.wait()
    shown.hang_up()


def test_on_a_terminal(terminal: tuple[Terminal, Stub]) -> None:
    shown, one = terminal
    shown.until("> ")
    shown.type("안녕 🙂\n")
    shown.until("1:안녕 🙂")
    shown.until("> ")
    shown.type("/think\n")
    shown.until("hm")
    shown.until("> ")
    shown.type("slowly\n")
    shown.until("go go go")
    shown.type("\x03")
    shown.until("(stopped)")
    until(lambda: one.gone == 1)
    shown.until("> ")
    shown.type("half a line\x03")
    shown.until("leaves)")
    shown.until("> ")
    shown.type("\x1b[200~first\nsecond\x1b[201~\n")  # as a terminal marks what is pasted
    shown.until("5:first")
    assert one.asked[-1][1]["messages"][-1]["content"] == "first\nsecond"
    assert one.asked[-1][1]["messages"][-2]["content"].startswith("go go go")  # what was said before it was stopped
    shown.until("> ")
    shown.type("one \\\n")
    shown.until("… ")
    shown.type("two\n")
    shown.until("7:one ")
    assert one.asked[-1][1]["messages"][-1]["content"] == "one \ntwo"
    shown.until("> ")
    shown.type("title\n")
    shown.until("[2Jc")
    shown.until("> ")
    shown.type("/think\n")
    shown.until("a]0;titleb")
    shown.until("> ")
    shown.type("/system\n")
    shown.until("no system message")
    shown.until("> ")
    shown.type("\x04")
    assert shown.end() == 0


WITHOUT_MARKS = """
import sys
from hpc.login import typing_in
typing_in._edits = lambda: False
print("ready", flush=True)
for _ in range(2): print([typing_in.Lines(sys.stdin).read("")], flush=True)
"""


def test_lines_that_come_at_once_were_pasted_where_the_editor_does_not_tell() -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-c", WITHOUT_MARKS]
    shown = Terminal(lambda **streams: subprocess.Popen(argv, env=env, start_new_session=True, **streams))
    shown.until("ready")
    shown.type("first\nsecond\nthird\n")
    shown.until("['first\\nsecond\\nthird']")
    shown.type("later\n")
    shown.until("['later']")
    assert shown.end() == 0
    shown.hang_up()


def test_questions_without_an_answer_are_told_no_more() -> None:
    """Many a template refuses two questions after each other."""
    talk = Conversation("be brief", [Turn("stopped"), Turn("thought", "<think>hm</think>"), Turn("said", "yes")])
    talk.turns.append(Turn("now"))
    assert [m["content"] for m in talk.messages()] == ["be brief", "said", "yes", "now"]
    assert [t["question"] for t in talk.document()["turns"]] == ["stopped", "thought", "said", "now"]


def test_a_service_that_was_started_again_is_found_again(stub: Any) -> None:
    doors = [stub(Reply(status=503, body={"error": {"message": "this service is ending"}})), stub(Reply(stream(["b"])))]
    asked = iter(doors)
    talk = Chat(lambda: doorway.of_url(next(asked).url, None, {"HPC_TOKEN": TOKEN}), Sampling(), "", thoughts=False)
    out = io.StringIO()
    with pytest.raises(NotReady):
        talk._do("one", out)
    talk._do("two", out)
    assert out.getvalue() == "b\n"
    assert [t["question"] for t in talk.document()["turns"]] == ["two"]  # what was not answered was never asked
