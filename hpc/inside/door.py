"""The one way to a server that nobody else reaches: asks for the token, passes on, lets running requests finish."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

from hpc.inside.figures import Answer, Figures

Request: TypeAlias = Any
Response: TypeAlias = Any
"""aiohttp's: loaded when the door opens, not when this module is."""
Handler = Callable[[Request], Awaitable[Response]]

_LARGEST = 256 << 20
"""Bytes of a request's body."""
_LOOK_S = 0.2
HTTP_OK = 200
_HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "host", "content-length",
     "authorization", "cookie", "proxy-authorization", "proxy-connection", "content-encoding", "accept-encoding"}
)  # fmt: skip
WANTS_TOKEN = "this service asks for its token: `hpc tunnel` shows the address with it"
ENDING = "this service is ending"
FULL = "as many requests wait as may (serve.queue_size)"
NESTED = "the body is nested too deeply"
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline' data:; frame-ancestors 'none'; base-uri 'none'",
}


class Client:
    """Who waits for one answer, and where that comes from."""

    def __init__(self, request: Request) -> None:
        self.answer: Any = None
        self._request = request

    @property
    def gone(self) -> bool:
        transport = self._request.transport
        return transport is None or bool(transport.is_closing())

    async def hold(self, answer: Awaitable[Any]) -> Any:
        """The server's answer, once it has begun."""
        self.answer = await answer
        return self.answer


class Door:
    """In front of a server on this machine's loopback, `upstream`, whose engine model can be told to stop an id."""

    def __init__(self, token: str, upstream: str, metrics: str = "", stop_model: str = "", most: int = 0) -> None:
        self.token, self.upstream, self.metrics, self._most = token, upstream, metrics, most
        self.ready = self.moved = self.closing = False
        """It has been; another has taken its place, but requests are still taken; they are taken no more."""
        self.figures = Figures()
        self._stop_model = stop_model
        self._session: Any = None
        self._cookie = "hpc-" + hashlib.sha256(token.encode()).hexdigest()[:8]  # ports share the cookies of their host
        self._telling: set[asyncio.Task[None]] = set()
        self._ids: Counter[str] = Counter()
        """Those of the requests at work: clients that number their own may have the same."""

    @property
    def running(self) -> int:
        """Requests for an answer of the model that have been let in and have not ended."""
        return self.figures.running

    @property
    def busy(self) -> str:
        """Why no request is let in now, or ""."""
        return ENDING if self.closing else FULL if 0 < self._most <= self.running else ""

    def app(self) -> Any:
        """The aiohttp application, without what answers at / and /v1."""
        from aiohttp import ClientSession, ClientTimeout, TCPConnector, web

        async def session(app: Any) -> AsyncIterator[None]:
            timeout = ClientTimeout(total=None, sock_connect=10)
            self._session = ClientSession(
                timeout=timeout, connector=TCPConnector(limit=0), auto_decompress=False, read_bufsize=1 << 18,
                skip_auto_headers=("Accept-Encoding",),  # what comes compressed would be passed on so
            )  # fmt: skip
            yield
            await self.close()

        async def guard(request: Request, handler: Handler) -> Response:
            return await self._guard(request, handler)

        app = web.Application(client_max_size=_LARGEST, middlewares=[web.middleware(guard)])
        app.cleanup_ctx.append(session)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_route("*", "/v2{tail:.*}", self._triton)
        return app

    async def close(self) -> None:
        """Give up the connections to the server: one that is open holds Triton's end up, and then it fails."""
        if self._session is not None:
            await self._session.close()

    async def _guard(self, request: Request, handler: Handler) -> Response:
        """Let nobody in without the token; a browser that shows it once gets a cookie."""
        from aiohttp import web

        shown = request.query.get("token", "")
        if shown and request.method == "GET" and self._is(shown) and request.path == "/":
            answer = web.HTTPSeeOther("/")
            answer.set_cookie(self._cookie, self.token, httponly=True, samesite="Strict", path="/")
            raise answer
        if not self._may(request, shown):
            return error(401, WANTS_TOKEN, "unauthorized")
        try:
            response = await handler(request)
        except web.HTTPException as failed:
            if failed.status < 400:
                raise
            return error(failed.status, f"{request.path}: {failed.reason}", "not_found")
        if not response.prepared:
            response.headers.update(HEADERS)
        return response

    def knows(self, authorization: str) -> bool:
        """True for the header of somebody who has the token."""
        return authorization.startswith("Bearer ") and self._is(authorization[7:].strip())

    def _may(self, request: Request, shown: str) -> bool:
        if self.knows(request.headers.get("Authorization", "")) or self._is(shown):
            return True
        origin = request.headers.get("Origin")
        foreign = origin is not None and origin.partition("://")[2] != request.host  # another page of this browser
        return self._is(request.cookies.get(self._cookie, "")) and not foreign

    def _is(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(errors="surrogateescape"), self.token.encode())

    async def _health(self, request: Request) -> Response:
        from aiohttp import web

        good = self.ready and not self.moved and not self.closing
        return web.json_response({"ready": good, "running": self.running}, status=200 if good else 503)

    async def _metrics(self, request: Request) -> Response:
        return await self._pass(request, f"{self.metrics}/metrics")

    async def _triton(self, request: Request) -> Response:
        address = self.upstream + request.rel_url.raw_path
        asks = request.method == "POST" and request.path.endswith(("/infer", "/generate", "/generate_stream"))
        if not asks:
            return await self._pass(request, address)
        body = await request.read()
        number = ""
        if not request.path.endswith("/infer"):
            try:
                number, body = _with_id(body)
            except RecursionError:
                return error(400, NESTED, "invalid_request_error")
        if self.busy:
            return unavailable(self.busy)
        return await self.follow(request, address, body, number)

    async def follow(self, request: Request, address: str, body: bytes, number: str) -> Response:
        """Pass a request for an answer on. Where its client leaves, the engine is told, and the rest is not sent."""
        from aiohttp import ClientError, web

        response: Response = None
        said = Answer(self.figures)
        with self.figures.request() as one:
            try:
                async with self.client(request, number) as client:
                    posted = self._session.post(address, data=body, headers=_headers(request.headers))
                    answer = await client.hold(posted)
                    response = web.StreamResponse(status=answer.status, headers={**_headers(answer.headers), **HEADERS})
                    async for chunk in answer.content.iter_any():
                        said.take(chunk)
                        if client.gone:
                            continue
                        try:
                            if not response.prepared:
                                await response.prepare(request)
                            await response.write(chunk)
                        except OSError:
                            pass  # the client has left, as it will be seen to have
                    said.end()
                    one.failed, one.left = said.failed or answer.status != HTTP_OK, client.gone
            except (ClientError, OSError, RuntimeError):
                one.failed = True
                if response is None or not response.prepared:
                    return error(502, "the server ended in the middle of the answer", "server_error")
                if request.transport is not None:
                    request.transport.abort()  # what was sent must not look like the whole answer
        return response

    @contextlib.asynccontextmanager
    async def client(self, request: Request, number: str) -> AsyncIterator[Client]:
        """Look after the client while the block runs: once it has left, the engine is told.

        The answer is read to its end all the same: a Triton that sees the connection of an ensemble break counts the
        request as running for ever. Where the engine cannot be told, the connection is given up.
        """
        client = Client(request)
        self.count(number, 1)
        watch = asyncio.ensure_future(self._watch(client, number))
        try:
            yield client
        finally:
            watch.cancel()
            self.count(number, -1)
            if client.answer is not None:
                client.answer.release()

    async def _watch(self, client: Client, number: str) -> None:
        while not client.gone:
            await asyncio.sleep(_LOOK_S)
        if self._stop_model:
            self.stop(number)
        elif client.answer is not None:
            client.answer.close()

    def count(self, number: str, more: int) -> None:
        """So many more requests with this id are at work."""
        self._ids[number] += more
        if not self._ids[number]:
            del self._ids[number]

    def stop(self, number: str) -> bool:
        """Tell the engine that nobody waits for this request's answer any more; False where it cannot be told.

        Where another request has the same id, it is not told: it might end that one.
        """
        if not number or not self._stop_model:
            return False
        if self._ids[number] > 1:
            return True
        task = asyncio.ensure_future(self._tell(number))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)
        return True

    async def _tell(self, number: str) -> None:
        from aiohttp import ClientError

        words = {"id": number, "stop": True, "input_ids": [0], "input_lengths": 1, "request_output_len": 1}
        address = f"{self.upstream}/v2/models/{self._stop_model}/generate"
        try:
            async with self._session.post(address, json=words) as answer:
                await answer.read()
        except (ClientError, OSError):  # it is told of something else then
            pass

    def post(self, model: str, words: dict[str, Any], *, stream: bool) -> Any:
        """A request to one of Triton's models."""
        way = "generate_stream" if stream else "generate"
        return self._session.post(f"{self.upstream}/v2/models/{model}/{way}", json=words)

    async def metrics_text(self) -> str:
        """Triton's metrics; "" where it does not answer."""
        from aiohttp import ClientError

        try:
            async with self._session.get(f"{self.metrics}/metrics") as answer:
                return str(await answer.text())
        except (ClientError, OSError, RuntimeError):
            return ""

    async def _pass(self, request: Request, address: str) -> Response:
        from aiohttp import ClientError, web

        query = {k: v for k, v in request.query.items() if k != "token"}
        try:
            async with self._session.request(
                request.method,
                _url(address),
                params=query,
                data=await request.read(),
                headers=_headers(request.headers),
            ) as answer:
                return web.Response(status=answer.status, body=await answer.read(), headers=_headers(answer.headers))
        except (ClientError, OSError, RuntimeError):  # RuntimeError: given up already
            return unavailable(ENDING) if self.closing else error(502, "Triton does not answer", "server_error")


def _url(address: str) -> Any:
    from yarl import URL

    return URL(address, encoded=True)


def _headers(given: Any) -> dict[str, str]:
    return {name: value for name, value in given.items() if name.lower() not in _HOP_BY_HOP}


def _with_id(body: bytes) -> tuple[str, bytes]:
    """The request's id and the body with it: its own, or a new one; a body that is no object stays as it is."""
    try:
        words = json.loads(body)
    except ValueError:
        return "", body
    if not isinstance(words, dict):
        return "", body
    if not words.get("id"):
        words["id"] = new_id()
        body = json.dumps(words).encode()
    return str(words["id"]), body


def new_id() -> str:
    return secrets.token_hex(12)


def unavailable(why: str) -> Response:
    """To whoever asks while the service ends, or is full."""
    answer = error(503, why, "unavailable")
    answer.headers["Retry-After"] = "30" if why == ENDING else "1"
    return answer


def error(status: int, message: str, kind: str, param: str | None = None) -> Response:
    """An error in the form of OpenAI's API, which Triton's clients read too."""
    from aiohttp import web

    words = {"error": {"message": message, "type": kind, "param": param, "code": status}}
    return web.json_response(words, status=status, headers=HEADERS)
