"""Triton's gRPC behind the door: the token as metadata, messages passed on, an end that loses no request.

A call is passed on as it comes, whatever its messages are. Only requests for an answer of a model are looked into: each
gets an id where it has none, so that the engine can be told to stop it, and one of a stream is known to have ended by
the mark that Triton sets on its last response.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any, TypeAlias

from hpc.core.errors import HpcError
from hpc.inside import pump
from hpc.inside.door import WANTS_TOKEN, Door, new_id
from hpc.inside.figures import Request as Counted

Call: TypeAlias = Any
"""grpc.aio's; loaded when the door opens, not when this module is."""

_OURS = "/inference.GRPCInferenceService/"
_PASSED = (_OURS, "/grpc.health.v1.Health/")
_LARGEST = 256 << 20
_LAST, _ASK_LAST = "triton_final_response", "triton_enable_empty_final_response"
_DROPPED = ("authorization", "user-agent", "te", "content-type")
_OPTIONS = (
    ("grpc.max_receive_message_length", _LARGEST),
    ("grpc.max_send_message_length", -1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
)
_PATH = "grpc.sock"
"""In the folder of this start, which is the working directory: a socket's path may be no longer than 107 bytes."""


@contextlib.asynccontextmanager
async def opened(door: Door, upstream: str, sockets: Sequence[socket.socket]) -> AsyncIterator[None]:
    """Answer on these sockets while the block runs, for the server at `upstream` (HOST:PORT)."""
    grpc = _grpc()
    async with grpc.aio.insecure_channel(upstream, options=_OPTIONS) as channel:
        server = grpc.aio.server(handlers=(_Every(door, channel),), options=_OPTIONS)
        server.add_insecure_port(f"unix:{_PATH}")
        await server.start()
        ways = [await pump.lead(listening, _PATH) for listening in sockets]
        try:
            yield
        finally:
            for way in ways:
                way.close()
            await server.stop(0.2)


def _grpc() -> Any:
    try:
        import grpc.aio
    except ImportError:
        raise HpcError("this image has no grpcio", hint="build it anew: hpc images build") from None
    return grpc


class _Every:
    """Answers to any method; for grpc a generic handler."""

    def __init__(self, door: Door, channel: Any) -> None:
        self._door, self._channel = door, channel
        self._reading: set[asyncio.Task[None]] = set()
        """Answers that nobody waits for any more."""

    def service_name(self) -> str:
        return ""

    def service(self, details: Any) -> Any:
        """Who may not come in is told so before anything else."""
        grpc = _grpc()
        metadata = dict(details.invocation_metadata)
        method = str(details.method)
        if not self._door.knows(str(metadata.get("authorization", ""))):
            return _refusing(grpc.StatusCode.UNAUTHENTICATED, WANTS_TOKEN)
        if not method.startswith(_PASSED):
            return _refusing(grpc.StatusCode.UNIMPLEMENTED, f"there is no {method} here")
        passed = tuple(
            (k, v) for k, v in details.invocation_metadata if k not in _DROPPED and not k.startswith("grpc-")
        )

        async def handle(_: Any, context: Call) -> None:
            call = self._channel.stream_stream(method)(metadata=passed)
            kinds = {f"{_OURS}ModelInfer": _Single, f"{_OURS}ModelStreamInfer": _Stream}
            await self._pass(context, call, kinds.get(method, _Other)(self._door))

        return grpc.stream_stream_rpc_method_handler(handle)

    async def _pass(self, context: Call, call: Call, requests: _Other) -> None:
        """One call, to its end. Where the client leaves, the engine is told, and the answer is read all the same."""
        grpc = _grpc()
        outward = asyncio.ensure_future(_outward(context, call, requests))
        inward = asyncio.ensure_future(_inward(context, call, requests))
        try:
            await asyncio.wait({outward, inward}, return_when=asyncio.FIRST_COMPLETED)
            failed = outward.exception() if outward.done() and not call.done() else None
            if isinstance(failed, _Busy):
                await context.abort(grpc.StatusCode.UNAVAILABLE, str(failed))
            if failed is not None:  # a message that is none
                await call.done_writing()
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(failed))
            await asyncio.wait({inward})
            if await call.code() != grpc.StatusCode.OK:
                requests.failed = True
                await context.abort(await call.code(), await call.details(), await call.trailing_metadata() or ())
            context.set_trailing_metadata(await call.trailing_metadata() or ())
        finally:
            if not requests.leave(answered=inward.done()):  # nothing to tell, or nobody who would listen
                call.cancel()
            task = asyncio.ensure_future(_rest(outward, inward, requests))
            self._reading.add(task)
            task.add_done_callback(self._reading.discard)


async def _rest(outward: asyncio.Task[None], inward: asyncio.Task[None], requests: _Other) -> None:
    """What is still under way of a call that nobody waits for."""
    await asyncio.wait({outward, inward})
    for task in (outward, inward):
        if not task.cancelled():
            task.exception()
    requests.over()


class _Busy(Exception):
    """A request that came when none is let in any more."""


def _refusing(code: Any, why: str) -> Any:
    async def refuse(_: Any, context: Call) -> None:
        await context.abort(code, why)

    return _grpc().stream_stream_rpc_method_handler(refuse)


async def _outward(context: Call, call: Call, requests: _Other) -> None:
    """What the client asks, until it says that it is done, or has left."""
    while (message := await requests.held(context.read())) not in (None, _grpc().aio.EOF):
        passed, answer = requests.begin(message)
        if answer is not None:
            await requests.write(context, answer)
        if passed is not None:
            await call.write(passed)
    await call.done_writing()


async def _inward(context: Call, call: Call, requests: _Other) -> None:
    while (message := await call.read()) is not _grpc().aio.EOF:
        passed = requests.end(message)
        if passed is not None:
            await requests.write(context, passed)


class _Other:
    """A call that asks for no answer of a model: its messages are passed on as they are."""

    def __init__(self, door: Door) -> None:
        self.failed = self._gone = self._left = False
        self._door = door
        self._running: dict[str, bool] = {}
        """The ids of the requests that have been let in and have not ended -> whether the client asked for the mark."""
        self._turn = asyncio.Lock()
        self._held: set[asyncio.Future[Any]] = set()

    async def held(self, waiting: Awaitable[Any]) -> Any:
        """What comes of reading from the client or writing to it; None where it has left, which may never end it.

        Not so with the server: grpc takes a wait for a message that is cancelled for the end of the call.
        """
        future = asyncio.ensure_future(waiting)
        self._held.add(future)
        await asyncio.wait({future})
        self._held.discard(future)
        return None if future.cancelled() or future.exception() else future.result()

    async def write(self, context: Call, message: bytes) -> None:
        async with self._turn:
            if not self._gone:
                await self.held(context.write(message))

    def begin(self, message: bytes) -> tuple[bytes | None, bytes | None]:
        """A message of the client's -> what is passed on, and what is answered at once."""
        return message, None

    def end(self, message: bytes) -> bytes | None:
        """A message of the server's -> what is passed on."""
        return message

    def leave(self, *, answered: bool) -> bool:
        """Nobody waits any more. Where the answer was not whole, tell the engine; False where it cannot be told."""
        self._left = not answered
        self._gone = True
        for future in self._held:
            future.cancel()
        return answered or sum(self._door.stop(number) for number in self._running) > 0

    def over(self) -> None:
        """The call has ended, and with it all that it asked for."""
        for number in list(self._running):
            self._is_over(number, failed=self.failed, left=self._left)

    def _let_in(self, number: str, asked: bool = False) -> None:
        if number not in self._running:
            self._door.figures.running += 1
            self._door.count(number, 1)
        self._running[number] = asked

    def _is_over(self, number: str, *, failed: bool = False, left: bool = False) -> None:
        if self._running.pop(number, None) is not None:
            self._door.count(number, -1)
            one = Counted()
            one.failed, one.left = failed, left
            self._door.figures.end(one)


class _Single(_Other):
    """ModelInfer: one request, one answer."""

    def begin(self, message: bytes) -> tuple[bytes | None, bytes | None]:
        if self._door.busy:
            raise _Busy(self._door.busy)
        request = _messages().ModelInferRequest.FromString(message)
        if not request.id:
            request.id = new_id()
        self._let_in(request.id)
        return request.SerializeToString(), None

    def end(self, message: bytes) -> bytes | None:
        self._door.figures.tokens += _tokens(_messages().ModelInferResponse.FromString(message))
        return message


class _Stream(_Other):
    """ModelStreamInfer: many requests, each with any number of answers."""

    def begin(self, message: bytes) -> tuple[bytes | None, bytes | None]:
        request = _messages().ModelInferRequest.FromString(message)
        if self._door.busy and request.id not in self._running:  # what is running may still be told to stop
            refused = _messages().ModelStreamInferResponse(error_message=self._door.busy)
            refused.infer_response.id = request.id
            return None, refused.SerializeToString()
        if not request.id:
            request.id = new_id()
        asked = request.parameters[_ASK_LAST].bool_param
        request.parameters[_ASK_LAST].bool_param = True
        self._let_in(request.id, asked)
        return request.SerializeToString(), None

    def end(self, message: bytes) -> bytes | None:
        response = _messages().ModelStreamInferResponse.FromString(message)
        number, answer = response.infer_response.id, response.infer_response
        asked = self._running.get(number, False)
        last = answer.parameters[_LAST].bool_param
        if not asked:
            del answer.parameters[_LAST]
        self._door.figures.tokens += _tokens(answer)
        if last or response.error_message:
            self._is_over(number, failed=bool(response.error_message), left=self._left)
        if last and not asked and not answer.outputs and not response.error_message:
            return None  # an empty one, which this client does not expect
        return bytes(response.SerializeToString())


def _tokens(answer: Any) -> int:
    """As many as the model says, else one for each answer that is not empty."""
    for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=False):
        if output.name == "sequence_length" and len(raw) == 4:
            return int.from_bytes(raw, "little")
    return int(bool(answer.outputs))


def _messages() -> Any:
    from tritonclient.grpc import service_pb2

    return service_pb2
