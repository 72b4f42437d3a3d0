"""Whether a service answers the login node at this moment, asked in the way in which it is reached."""

from __future__ import annotations

import http.client
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass

from hpc.core.endpoint import Endpoint
from hpc.core.errors import HpcError
from hpc.core.site import Site
from hpc.login import forward
from hpc.login.connection import Connection
from hpc.login.forward import Line

_ANSWER_S = 3.0


@dataclass(frozen=True)
class Answer:
    """What came of one request."""

    ok: bool
    said: str
    """In words that follow `the service`."""


def reach_of(endpoint: Endpoint, site: Site) -> str:
    """direct, jump or relay. What runs on this very machine is always direct."""
    here = endpoint.host.partition(".")[0] == os.uname().nodename.partition(".")[0]
    return "direct" if site.scheduler == "local" or here else site.reach


def direct(host: str, port: int, path: str, token: str) -> Answer:
    """Over the network."""
    return _get(lambda: socket.create_connection((host, port), _ANSWER_S), path, token)


def through_relay(line: Line, path: str, token: str) -> Answer:
    """Through the relay, which is started where it does not run."""
    try:
        forward.ensure(line)
    except HpcError as error:
        return Answer(False, f"cannot be reached through a step in its job: {error.message}")

    def connect() -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(_ANSWER_S)
        connection.connect(next(iter(line.sockets.values())))
        return connection

    return _get(connect, path, token)


def through_step(line: Line, path: str, token: str) -> Answer:
    """Through a step of its own that ends with the answer; the token goes in by its pipe."""
    port = next(iter(line.ports.values()))
    request = f"GET {path} HTTP/1.0\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
    try:
        answer = forward.once(line, port, request)
    except HpcError as error:
        return Answer(False, f"cannot be reached through a step in its job: {error.message}")
    status = answer.split(b" ", 2)[1:2]
    return Answer(status == [b"200"], "answers" if status == [b"200"] else _refusal(answer))


def _refusal(answer: bytes) -> str:
    first = answer.split(b"\r\n", 1)[0].decode("ascii", "replace")
    return f"answers {first} to its own token" if first else "refuses the connection: nothing listens there"


def _get(open_: Callable[[], socket.socket], path: str, token: str) -> Answer:
    connection = Connection(open_)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {token}"})
        status = connection.getresponse().status
    except ConnectionRefusedError:
        return Answer(False, "refuses the connection: nothing listens there")
    except TimeoutError:
        return Answer(False, f"gives no answer within {_ANSWER_S:g} s")
    except socket.gaierror:
        return Answer(False, "cannot be asked: this machine does not know its node's name")
    except OSError as error:
        return Answer(False, f"cannot be asked: {(error.strerror or str(error)).lower()}")
    except http.client.HTTPException:
        return Answer(False, "answers, but not in HTTP")
    finally:
        connection.close()
    return Answer(status == 200, "answers" if status == 200 else f"answers {status} to its own token")
