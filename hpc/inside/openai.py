"""OpenAI's chat and text completions, answered by one of Triton's models."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from hpc.core.responses import Growing
from hpc.inside.chat import Template
from hpc.inside.door import HEADERS, NESTED, Door, Request, Response, error, new_id, unavailable
from hpc.inside.figures import Request as Counted
from hpc.inside.translating import Invalid, Served, messages_of, object_of, prompt_of, words_for


class Api:
    """The handlers below /v1."""

    def __init__(self, door: Door, served: Served, template: Template) -> None:
        self._door, self._served, self._template = door, served, template
        self._began = int(time.time())

    def add_to(self, app: Any) -> None:
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{name:.+}", self._models)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._text)

    async def _models(self, request: Request) -> Response:
        from aiohttp import web

        served = self._served
        common = {
            "object": "model", "created": self._began, "owned_by": "hpc",
            "max_tokens": served.max_tokens, "chat": bool(self._template), "sampling": dict(served.sampling),
        }  # fmt: skip
        entries = {served.name: {"id": served.name, **common}}
        entries |= {name: {"id": name, **common, "parent": served.name} for name in served.adapters}
        asked = request.match_info.get("name")
        if asked is None:
            return web.json_response({"object": "list", "data": list(entries.values())})
        return web.json_response(entries[asked]) if asked in entries else self._unknown(asked)

    def _unknown(self, name: object) -> Response:
        known = " or ".join(map(repr, (self._served.name, *self._served.adapters)))
        return error(404, f"there is no model {name!r} here: it is {known}", "not_found", "model")

    async def _chat(self, request: Request) -> Response:
        def words(body: Mapping[str, Any]) -> dict[str, Any]:
            prompt = self._template.render(messages_of(body), object_of(body, "chat_template_kwargs"))
            return words_for(body, prompt, self._served, special=False)  # the template has written them

        return await self._answer(request, words, chat=True)

    async def _text(self, request: Request) -> Response:
        def words(body: Mapping[str, Any]) -> dict[str, Any]:
            return words_for(body, prompt_of(body), self._served, special=None)

        return await self._answer(request, words, chat=False)

    async def _answer(self, request: Request, make: Any, *, chat: bool) -> Response:
        if self._served.echoes:
            told = "answers of this service begin with the prompt (serve.exclude_input = false): ask Triton's own API"
            return error(501, told, "not_implemented")
        try:
            body = json.loads(await request.read())
            if not isinstance(body, dict):
                raise Invalid("the body must be a JSON object")
            if body.get("model") not in (None, self._served.name, *self._served.adapters):
                return self._unknown(body["model"])
            words = make(body)
            usage = bool(object_of(body, "stream_options").get("include_usage"))
        except RecursionError:
            return error(400, NESTED, "invalid_request_error")
        except ValueError as wrong:
            return error(400, str(wrong), "invalid_request_error", getattr(wrong, "param", None))
        if self._door.busy:
            return unavailable(self._door.busy)
        form = _Form(str(body.get("model") or self._served.name), chat=chat, counts=not self._served.foreign)
        with self._door.figures.request() as one:
            try:
                pieces = self._pieces(request, words, one)
                first = await anext(pieces, None)  # an error comes before anything else: it can still have its status
                if first is None:
                    return error(499, "the client has left", "cancelled")
                if body.get("stream"):
                    return await _stream(request, form, first, pieces, usage)
                return await _whole_answer(form, first, pieces)
            except _Failed as failed:
                answer = error(failed.status, str(failed), failed.kind)
                if failed.kind == "unavailable":
                    answer.headers["Retry-After"] = "1"
                return answer

    async def _pieces(self, request: Request, words: dict[str, Any], one: Counted) -> AsyncIterator[_Piece]:
        """What the model says, piece by piece; all of it is read, also when the client has left."""
        from aiohttp import ClientError

        grown, heard = Growing(words.get("stop_words", ())), False
        try:
            async with self._door.client(request, words["id"]) as client:
                answer = await client.hold(self._door.post(self._served.target, words, stream=self._served.streams))
                async for event in _events(answer):
                    heard, one.left = True, client.gone
                    if "error" in event:
                        one.failed = True
                        raise _Failed.of(answer.status, str(event["error"]))
                    self._door.figures.tokens += int(event.get("sequence_length", 1))
                    if client.gone:
                        continue
                    text = str(event.get("text_output", ""))
                    if self._served.cumulative:
                        text = grown.take(text)
                    yield _Piece(
                        text=text,
                        tokens=int(event.get("sequence_length", 1)),
                        prompt=int(event.get("prompt_length", 0)),
                        reason=str(event.get("finish_reason", "")),
                    )
                if heard and (text := grown.rest()) and not client.gone:
                    yield _Piece(text=text, tokens=0, prompt=0, reason="")
                if not heard:
                    one.left, one.failed = client.gone, True
                    if not client.gone:
                        raise _Failed(502, f"Triton answered {answer.status}, and nothing else", "server_error")
        except (ClientError, OSError, RuntimeError, ValueError) as failed:  # ValueError: it was no JSON
            one.failed = True
            raise _Failed(502, "the server ended in the middle of the answer", "server_error") from failed


async def _events(answer: Any) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events, or of one body."""
    rest = b""
    async for chunk in answer.content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield json.loads(line[5:])
    if rest.strip():
        yield json.loads(rest.removeprefix(b"data:"))


@dataclass(frozen=True)
class _Piece:
    text: str
    tokens: int
    prompt: int
    reason: str


class _Failed(Exception):
    """Triton refused, or broke."""

    def __init__(self, status: int, message: str, kind: str) -> None:
        super().__init__(message)
        self.status, self.kind = status, kind

    @classmethod
    def of(cls, status: int, message: str) -> _Failed:
        message = message.removeprefix("in ensemble 'ensemble', ")
        if "maximum queue size" in message:
            return cls(503, f"as many requests wait as may (serve.queue_size): {message}", "unavailable")
        if "not healthy" in message or "Stub process" in message or status >= 500:
            return cls(503, f"the model has failed: {message}", "server_error")
        return cls(400, message, "invalid_request_error")


class _Form:
    """How the answer is written, and what it has used."""

    def __init__(self, model: str, *, chat: bool, counts: bool) -> None:
        self.chat, self.counts = chat, counts
        self.prompt = self.tokens = 0
        self.reason: str | None = None
        self._common = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{new_id()}",
            "created": int(time.time()),
            "model": model,
        }

    def take(self, piece: _Piece) -> str:
        self.prompt = max(self.prompt, piece.prompt)
        self.tokens += piece.tokens
        if piece.reason:
            self.reason = "length" if piece.reason == "length" else "stop"
        return piece.text

    def usage(self) -> dict[str, int]:
        total = self.prompt + self.tokens
        return {"prompt_tokens": self.prompt, "completion_tokens": self.tokens, "total_tokens": total}

    def whole(self, text: str) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": self.reason or "stop"}
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._common, "object": kind, "choices": [choice], **({"usage": self.usage()} if self.counts else {})}

    def part(self, text: str | None, *, first: bool = False, last: bool = False) -> dict[str, Any]:
        said: dict[str, Any] = {"text": text or ""}
        if self.chat:
            said = {
                "delta": {**({"role": "assistant"} if first else {}), **({} if text is None else {"content": text})}
            }
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": (self.reason or "stop") if last else None}
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self._common, "object": kind, "choices": [choice]}

    def used(self) -> dict[str, Any]:
        return {**self.part(None), "choices": [], "usage": self.usage()}


async def _whole_answer(form: _Form, first: _Piece, pieces: AsyncIterator[_Piece]) -> Response:
    from aiohttp import web

    text = form.take(first)
    async for piece in pieces:
        text += form.take(piece)
    return web.json_response(form.whole(text))


async def _stream(request: Request, form: _Form, first: _Piece, pieces: AsyncIterator[_Piece], usage: bool) -> Response:
    from aiohttp import web

    response = web.StreamResponse(
        headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-store", **HEADERS}
    )

    async def say(words: Mapping[str, Any] | str) -> None:
        text = words if isinstance(words, str) else json.dumps(words, ensure_ascii=False)
        try:
            await response.write(f"data: {text}\n\n".encode())
        except OSError:  # the client has left; the rest is read all the same
            pass

    await response.prepare(request)
    await say(form.part(form.take(first), first=True))
    try:
        async for piece in pieces:
            text = form.take(piece)
            if text:
                await say(form.part(text))
    except _Failed as failed:
        await say({"error": {"message": str(failed), "type": failed.kind, "param": None, "code": failed.status}})
        return response
    await say(form.part(None, last=True))
    if usage and form.counts:
        await say(form.used())
    await say("[DONE]")
    return response
