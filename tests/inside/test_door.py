"""The door, asked over HTTP: what is wrong is told in OpenAI's form, and nothing of it in the log. Triton is a stub."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hpc.inside.chat import Template
from hpc.inside.door import FULL, Door
from hpc.inside.openai import Api
from hpc.inside.translating import Served

pytestmark = [pytest.mark.train, pytest.mark.extras]
TOKEN = "a-token"
WITH_TOKEN = f"Authorization: Bearer {TOKEN}".encode()


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    if "CI" not in os.environ:
        pytest.importorskip("aiohttp", reason="RINGS=train runs it in .venvs/train-extras")
    yield
    assert not caplog.records


def asked(
    path: str,
    *headers: bytes,
    body: bytes = b"",
    triton: bytes | Callable[[bytes], bytes] = b"",
    running: int = 0,
    **served: Any,
) -> tuple[int, dict[str, Any], Door]:
    """(status, the answer's JSON, the door) for a request with these very bytes.

    `triton` is what the stub answers, or makes of the request's head; so many of two requests run already.
    """
    from aiohttp import web

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(triton if isinstance(triton, bytes) else triton(head))
        writer.close()

    async def ask() -> tuple[bytes, Door]:
        upstream = await asyncio.start_server(answer, "127.0.0.1", 0)
        door = Door(TOKEN, f"http://127.0.0.1:{upstream.sockets[0].getsockname()[1]}", most=2)
        door.figures.running = running
        app = door.app()
        template = Template(None, text="{{ messages[0].content }}{{ 1 + x if x is defined }}")
        Api(door, Served(name="m", target="m", max_tokens=5, **served), template).add_to(app)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            reader, writer = await asyncio.open_connection(*runner.addresses[0][:2])
            first = b"%s %s HTTP/1.1" % (b"POST" if body else b"GET", path.encode())
            length = b"Content-Length: %d" % len(body)
            lines = [first, b"Host: door", b"Connection: close", length, *headers, b"", body]
            writer.write(b"\r\n".join(lines).replace(b"COOKIE", door._cookie.encode()))
            came = await reader.read()
            writer.close()
            return came, door
        finally:
            await runner.cleanup()
            upstream.close()

    came, door = asyncio.run(asyncio.wait_for(ask(), 20))
    head, _, text = came.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(text[text.find(b"{") : text.rfind(b"}") + 1]), door  # it may be in chunks


@pytest.mark.parametrize(
    "header",
    [b"Authorization: Bearer \xff", b"Cookie: COOKIE=\xff", b"Cookie: COOKIE=a-token\r\nOrigin: http://["],
)
def test_whoever_has_no_token_is_refused_whatever_it_sends(header: bytes) -> None:
    code, said, _ = asked("/health", header)
    assert (code, "asks for its token" in said["error"]["message"]) == (401, True)


def test_the_cookie_is_for_our_own_pages() -> None:
    cookie = b"Cookie: COOKIE=a-token"
    assert asked("/health", cookie)[0] == asked("/health", cookie, b"Origin: http://door")[0] == 503  # not ready yet
    for other in (b"http://elsewhere", b"null"):
        assert asked("/health", cookie, b"Origin: " + other)[0] == 401


@pytest.mark.parametrize(
    ("words", "param"),
    [
        ({"response_format": "json"}, "response_format"), ({"response_format": ["a"]}, "response_format"),
        ({"stream": True, "stream_options": "x"}, "stream_options"),
        ({"chat_template_kwargs": 5}, "chat_template_kwargs"), ({"chat_template_kwargs": {"x": "text"}}, None),
    ],
)  # fmt: skip
def test_wrong_fields_are_told(words: dict[str, Any], param: str | None) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], **words}).encode()
    code, said, _ = asked("/v1/chat/completions", WITH_TOKEN, body=body)
    assert (code, said["error"]["param"]) == (400, param), said


@pytest.mark.parametrize("path", ["/v1/completions", "/v2/models/m/generate"])
def test_a_body_that_is_nested_too_deeply_is_refused(path: str) -> None:
    code, said, _ = asked(path, WITH_TOKEN, body=b"[" * 200_000)
    assert (code, said["error"]["message"]) == (400, "the body is nested too deeply")


@pytest.mark.parametrize(
    "answer", [b"500 X\r\n\r\n<html>\n", b"500 X\r\n\r\n<html>", b"400 X\r\nContent-Length: 0\r\n\r\n"]
)
def test_a_server_that_answers_nothing_is_a_failure_and_no_client_that_left(answer: bytes) -> None:
    code, said, door = asked("/v1/completions", WITH_TOKEN, body=b'{"prompt": "x"}', triton=b"HTTP/1.1 " + answer)
    assert (code, said["error"]["type"]) == (502, "server_error"), said
    assert door.figures.counted() == {"running": 0, "done": 0, "failed": 1, "left": 0, "tokens": 0}


def event(**words: Any) -> bytes:
    return b"HTTP/1.1 200 OK\r\n\r\ndata: " + json.dumps(words).encode() + b"\n\n"


def events(*texts: str) -> bytes:
    return event(text_output=texts[0]) + b"".join(
        event(text_output=text).partition(b"\r\n\r\n")[2] for text in texts[1:]
    )


@pytest.mark.parametrize("path", ["/v1/completions", "/v2/models/m/generate", "/v2/models/m/infer"])
def test_a_request_more_than_may_wait_is_refused(path: str) -> None:
    body, one = b'{"prompt": "x"}', event(text_output="x")
    assert asked(path, WITH_TOKEN, body=body, running=2, triton=one)[:2] == (
        503,
        {"error": {"message": FULL, "type": "unavailable", "param": None, "code": 503}},
    )
    code, _, door = asked("/v1/completions", WITH_TOKEN, body=body, running=1, triton=one)
    assert (code, door.running) == (200, 1)


def test_what_triton_would_compress_comes_as_it_is() -> None:
    def infer(head: bytes) -> bytes:
        said = b'{"outputs": []}'
        packed = b"gzip" in head
        answer = b"HTTP/1.1 200 OK\r\n" + (b"Content-Encoding: gzip\r\n" if packed else b"") + b"\r\n"
        return answer + (gzip.compress(said) if packed else said)

    for more in ((), (b"Accept-Encoding: gzip",)):
        code, said, _ = asked("/v2/models/m/infer", WITH_TOKEN, *more, body=b"{}", triton=infer)
        assert (code, said) == (200, {"outputs": []})


def test_half_of_a_character_is_the_clients_mistake() -> None:
    for path, body in (("completions", rb'{"prompt": "\ud83d"}'),
                       ("chat/completions", rb'{"messages": [{"role": "user", "content": "\ud83d"}]}')):  # fmt: skip
        code, said, _ = asked(f"/v1/{path}", WITH_TOKEN, body=body)
        assert (code, "surrogate pair" in said["error"]["message"]) == (400, True)


def test_a_full_queue_is_no_mistake_of_the_clients() -> None:
    full = event(error="in ensemble 'ensemble', [request id: 1] Exceeds maximum queue size")
    code, said, _ = asked("/v1/completions", WITH_TOKEN, body=b'{"prompt": "x"}', triton=full)
    assert (code, said["error"]["type"]) == (503, "unavailable")


def test_usage_is_told_where_tokens_are_counted() -> None:
    one = event(text_output="x", sequence_length=3, prompt_length=2)
    _, said, _ = asked("/v1/completions", WITH_TOKEN, body=b'{"prompt": "x"}', triton=one)
    assert said["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    _, said, _ = asked("/v1/completions", WITH_TOKEN, body=b'{"prompt": "x"}', triton=one, cumulative=True, wraps=True)
    assert (said["choices"][0]["text"], "usage" in said) == ("x", False)


def test_texts_that_grow_are_joined() -> None:
    texts = ("H", "H\ufffd", "H안", "H안 EN", "H안 EN.", "H안 EN.E", "H안 EN.END", "H안 EN.END!")
    came = events(*texts)
    for stop, told in (("END", "H안 EN."), ("none", "H안 EN.END!")):
        body = json.dumps({"prompt": "x", "stop": stop}).encode()
        _, said, _ = asked("/v1/completions", WITH_TOKEN, body=body, triton=came, cumulative=True, vendors=True)
        assert said["choices"][0]["text"] == told
    end = events("H", "H\ufffd")
    _, said, _ = asked("/v1/completions", WITH_TOKEN, body=body, triton=end, cumulative=True, vendors=True)
    assert said["choices"][0]["text"] == "H\ufffd"


def test_answers_with_their_prompt_are_not_openais() -> None:
    code, said, _ = asked("/v1/completions", WITH_TOKEN, body=b'{"prompt": "x"}', echoes=True)
    assert (code, "exclude_input" in said["error"]["message"]) == (501, True)
