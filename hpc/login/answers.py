"""Asking a served model: one question -> the pieces of its answer as they come, over HTTP (stdlib) or gRPC."""

from __future__ import annotations

import http.client
import json
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any, Literal

from hpc.core.errors import HpcError
from hpc.login import question as words
from hpc.login.connection import Connection
from hpc.login.doorway import Doorway
from hpc.login.question import Piece, Question, Target, TritonPieces
from hpc.login.sse import Events

Protocol = Literal["openai", "http", "grpc"]
_PIECE = 1 << 16


def ask(door: Doorway, question: Question, protocol: Protocol = "openai") -> Generator[Piece, None, None]:
    """Until the answer ends; closing it ends the answer before. HpcError where there is none, or not all of it."""
    if protocol == "grpc":
        from hpc.login import overgrpc

        yield from overgrpc.ask(door, question)
        return
    if protocol == "http":
        target = triton_target(door)
        path = f"/v2/models/{target.model}/generate{'_stream' if question.stream else ''}"
        pieces = TritonPieces(target.cumulative, question.sampling.stop)
        yield from map(pieces.piece, _events(door, path, words.triton(question, target)))
        yield pieces.rest()
        return
    path, body = words.openai(question)
    over = False
    for event in _events(door, path, body):
        found = words.openai_piece(event)
        over = over or bool(found.reason) or not question.stream
        yield found
    if not over:
        raise _cut(door)


def triton_target(door: Doorway) -> Target:
    """Which of Triton's models streams whole characters."""
    return words.target(lambda model: get(door, f"/v2/models/{model}/config"))


def get(door: Doorway, path: str) -> dict[str, Any]:
    """A JSON document of the door's."""
    with closing(Connection(door.connect, door.host)) as connection:
        response = _sent(door, connection, "GET", path, None)
        document: dict[str, Any] = _document(door, response)
        return document


def _events(door: Doorway, path: str, body: dict[str, Any]) -> Iterator[Any]:
    with closing(Connection(door.connect, door.host)) as connection:
        response = _sent(door, connection, "POST", path, json.dumps(body).encode())
        if response.status != 200 or response.headers.get_content_type() != "text/event-stream":
            yield _document(door, response)
            return
        events = Events()
        while chunk := _read(door, response):
            for text in events.feed(chunk):
                if text == "[DONE]":
                    return
                yield _checked(door, response.status, text)
        for text in events.end():
            yield _checked(door, response.status, text)


def _sent(
    door: Doorway, connection: Connection, method: str, path: str, body: bytes | None
) -> http.client.HTTPResponse:
    try:
        connection.request(method, path, body, door.headers())
        return connection.getresponse()
    except http.client.BadStatusLine:  # also: closed without a word
        raise door.silent(ConnectionError("it closes the connection, or does not speak HTTP")) from None
    except (OSError, http.client.HTTPException) as error:
        raise door.silent(error) from None


def _read(door: Doorway, response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(_PIECE)
    except (OSError, http.client.HTTPException):
        raise _cut(door) from None


def _document(door: Doorway, response: http.client.HTTPResponse) -> Any:
    try:
        body = response.read()
    except (OSError, http.client.HTTPException):
        raise _cut(door) from None
    text = body.decode("utf-8", "replace").removeprefix("data:")  # Triton refuses a stream with an event, too
    return _checked(door, response.status, text)


def _checked(door: Doorway, status: int, text: str) -> Any:
    """The JSON of an event or a body; the error that is in it."""
    try:
        document = json.loads(text)
    except ValueError:
        document = None
    said = words.error_in(document)
    if said is not None or status != 200:
        raise words.failure(door.what, status, said or f"it answers {status}")
    if not isinstance(document, dict):
        raise HpcError(f"{door.what} answers something else than JSON", hint="is that the address of a served model?")
    return document


def _cut(door: Doorway) -> HpcError:
    return HpcError(
        f"{door.what} broke off in the middle of the answer", hint="`hpc status` shows whether it still runs"
    )
