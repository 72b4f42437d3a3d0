"""OpenAI's chat and text completions, answered by one of Triton's models."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hpc.inside.chat import Template
from hpc.inside.door import HEADERS, NESTED, Door, Request, Response, error, new_id, unavailable
from hpc.inside.figures import Request as Counted

_LARGEST, _LARGEST_SEED = (1 << 31) - 1, (1 << 63) - 1
_REFUSED = {
    "n": 1, "best_of": 1, "logprobs": False, "top_logprobs": 0, "presence_penalty": 0, "frequency_penalty": 0,
    "tools": None, "functions": None, "logit_bias": None, "echo": False, "suffix": None, "min_p": 0, "typical_p": 1,
    "length_penalty": 1, "ignore_eos": False, "use_beam_search": False, "guided_json": None, "guided_regex": None,
    "guided_choice": None, "guided_grammar": None, "structured_outputs": None,
}  # fmt: skip
"""What would change the answer, and this service cannot do -> the only value that is let through."""

_SAMPLING = {"temperature": (0, 2), "top_p": (0, 1), "top_k": (0, _LARGEST), "repetition_penalty": (0.01, 100)}
"""How a token is drawn -> the least and the most."""

_NOT_OF_LLMAPI = ("bad_words", "repetition_penalty", "min_tokens")


class Invalid(ValueError):
    """A request that is wrong; `param` is the field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, kw_only=True)
class Served:
    """The model as clients see it."""

    name: str
    target: str
    """Triton's model that is asked."""
    max_tokens: int
    """Where a request names none."""
    cumulative: bool = False
    """Each of the target's responses holds all of the text so far (llmapi), not what is new."""
    streams: bool = True
    echoes: bool = False
    """Answers begin with the prompt (serve.exclude_input is off): that is not OpenAI's form."""
    adapters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Names that a request may give for the model's -> what Triton's model is told then: LoRA adapters."""
    sampling: Mapping[str, float] = field(default_factory=dict)
    """What a request does not name of temperature, top_p, top_k, repetition_penalty; else 1, 1, all and none."""


def recommended(generation: Mapping[str, Any], *, cumulative: bool = False) -> dict[str, float]:
    """The sampling that a model's generation_config.json asks for; what cannot be one is left out."""
    found = {}
    for name, (low, high) in _SAMPLING.items():
        value = generation.get(name)
        right = isinstance(value, int if name == "top_k" else int | float) and not isinstance(value, bool)
        if right and low <= value <= high and not (cumulative and name in _NOT_OF_LLMAPI):
            found[name] = value
    return found


def words_for(body: Mapping[str, Any], prompt: str, served: Served, *, special: bool | None) -> dict[str, Any]:
    """The request to Triton's model; Invalid where a field is wrong."""
    for name, only in _REFUSED.items():
        value = body.get(name)
        if value not in (None, [], {}) and (value != only or isinstance(value, bool) != isinstance(only, bool)):
            raise Invalid(f"{name} = {value!r} is not supported here", name)
    if _object(body, "response_format").get("type", "text") != "text":
        raise Invalid("only text is answered here", "response_format")
    longest = body.get("max_completion_tokens")
    longest = body.get("max_tokens") if longest is None else longest
    temperature, top_p, penalty = (
        _number(body, name, default, *_SAMPLING[name], served.sampling)
        for name, default in (("temperature", 1.0), ("top_p", 1.0), ("repetition_penalty", 0.0))
    )
    top_k = body.get("top_k")
    words: dict[str, Any] = {
        "id": new_id(),
        "text_input": prompt,
        "max_tokens": served.max_tokens if longest is None else _whole(longest, "max_tokens", 1),
        "stream": served.streams,
    }
    if special is not None and not served.cumulative:
        words["add_special_tokens"] = special
    if temperature == 0 or top_p == 0:
        words["top_k"] = 1
    else:
        words.update(temperature=temperature, top_p=top_p)
        words["top_k"] = _whole(served.sampling.get("top_k", 0) if top_k is None else top_k, "top_k", 0)
    if body.get("seed") is not None:
        words["random_seed"] = _whole(body["seed"], "seed", 0, _LARGEST_SEED)
    elif words["top_k"] != 1:
        words["random_seed"] = secrets.randbits(63)  # TensorRT-LLM's own is the same for every request
    stops, bad = (_texts(body, name) for name in ("stop", "bad_words"))
    try:
        "".join([prompt, *stops, *bad]).encode()
    except UnicodeEncodeError:
        raise Invalid("a text holds half of a \\u surrogate pair") from None
    more = {
        "stop_words": stops,
        "bad_words": bad,
        "repetition_penalty": penalty,
        "min_tokens": _whole(body.get("min_tokens") or 0, "min_tokens", 0),
    }
    for name in _NOT_OF_LLMAPI if served.cumulative else ():
        if more[name]:
            raise Invalid(f"{name} is not supported by this engine (llmapi)", name)
    words.update({name: value for name, value in more.items() if value})
    words.update(served.adapters.get(str(body.get("model")), {}))
    return words


def _object(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = body.get(name) or {}
    if not isinstance(value, dict):
        raise Invalid(f"{name} must be an object", name)
    return value


def _number(
    body: Mapping[str, Any], name: str, default: float, low: float, high: float, own: Mapping[str, float]
) -> float:
    value = body.get(name)
    if value is None:
        return own.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise Invalid(f"{name} must be from {low} to {high}", name)
    return float(value)


def _whole(value: Any, name: str, low: int, high: int = _LARGEST) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise Invalid(f"{name} must be a whole number from {low} to {high}", name)
    return value


def _texts(body: Mapping[str, Any], name: str) -> list[str]:
    value = body.get(name)
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) > 16 or not all(isinstance(text, str) for text in texts):
        raise Invalid(f"{name} must be a text, or up to 16 of them", name)
    return [text for text in texts if text]


def messages_of(body: Mapping[str, Any]) -> list[dict[str, str]]:
    """The messages, each with one text; Invalid where they are something else."""
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise Invalid("messages must be a list with at least one message", "messages")
    found = []
    for message in given:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Invalid("every message has a role and a content", "messages")
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
        if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts):
            raise Invalid("only text can be sent in a message", "messages")
        found.append({"role": message["role"], "content": "".join(part["text"] for part in parts)})
    return found


def prompt_of(body: Mapping[str, Any]) -> str:
    """The text to continue."""
    given = body.get("prompt")
    given = given[0] if isinstance(given, list) and len(given) == 1 else given
    if not isinstance(given, str) or not given:
        raise Invalid("prompt must be one text", "prompt")
    return given


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
            prompt = self._template.render(messages_of(body), _object(body, "chat_template_kwargs"))
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
            usage = bool(_object(body, "stream_options").get("include_usage"))
        except RecursionError:
            return error(400, NESTED, "invalid_request_error")
        except ValueError as wrong:
            return error(400, str(wrong), "invalid_request_error", getattr(wrong, "param", None))
        if self._door.busy:
            return unavailable(self._door.busy)
        form = _Form(str(body.get("model") or self._served.name), chat=chat, counts=not self._served.cumulative)
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

        before, heard = "", False
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
                        text, before = text[len(before) :], text
                    yield _Piece(
                        text=text,
                        tokens=int(event.get("sequence_length", 1)),
                        prompt=int(event.get("prompt_length", 0)),
                        reason=str(event.get("finish_reason", "")),
                    )
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
