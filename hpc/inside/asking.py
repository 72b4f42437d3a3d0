"""Questions to a served model over OpenAI's API: with its token, and again where it moves to another job or node."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.core import endpoint
from hpc.core.errors import HpcError, NotReady, UsageError
from hpc.core.rundir import StageDir
from hpc.inside.records import as_text

_AGAIN_S = 2.0
_AWAY = frozenset({408, 429, 500, 502, 503, 504})
"""Statuses of a service that is busy, ending or moving."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model said."""

    text: str
    whole: bool
    """It came to its end by itself, not because it was as long as was allowed."""
    tokens: int
    model: str


class RefusedRequest(Exception):
    """The service takes no request like this one; in its own words."""


class Served:
    """A service: the folder of a serving stage, or the address of any other that speaks OpenAI's API."""

    def __init__(
        self, where: str, token_file: str | None, patience_s: float, stopping: Callable[[], bool] = lambda: False
    ) -> None:
        self._where, self._token_file = where, token_file
        self._patience_s, self._stopping = patience_s, stopping

    def chat(self, messages: Sequence[Mapping[str, str]], **sampling: Any) -> Answer | None:
        """The answer; None where the stage was asked to stop before there was one.

        RefusedRequest for what the service will never take; NotReady where it was away for `patience_s`.
        """
        until = time.monotonic() + self._patience_s
        while not self._stopping():
            try:
                return self._ask({"messages": list(messages), **sampling})
            except _AwayError as away:
                if time.monotonic() > until:
                    raise NotReady(
                        f"{self._where} has not answered for {self._patience_s:g} s: {away}",
                        hint="start it again (hpc submit serve), then submit this once more: it goes on from here",
                    ) from away
                time.sleep(_AGAIN_S)
        return None

    def _ask(self, body: Mapping[str, Any]) -> Answer:
        address, token = self._address()
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
        request = urllib.request.Request(f"{address}/chat/completions", json.dumps(body).encode(), headers)
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=600) as answer:
                said = json.load(answer)
        except urllib.error.HTTPError as failed:
            why = _message(failed.read())
            if failed.code in (401, 403):
                raise HpcError(f"{address} does not let us in: {why}", hint="give its token: token_file") from failed
            if failed.code in _AWAY:
                raise _AwayError(why) from failed
            raise RefusedRequest(why) from failed
        except (OSError, http.client.HTTPException, ValueError) as failed:
            raise _AwayError(str(failed)) from failed
        try:
            choice = said["choices"][0]
            text, ended = as_text(choice["message"]["content"] or "", "content"), choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, UsageError) as failed:
            raise HpcError(f"{address} does not answer as OpenAI's API does: {str(said)[:200]}") from failed
        if ended == "content_filter":
            raise RefusedRequest("its filter withheld the answer, or the rest of it")
        used = said.get("usage") or {}
        tokens = int(used.get("completion_tokens") or 0)
        return Answer(text=text, whole=ended != "length", tokens=tokens, model=str(said.get("model", "")))

    def _address(self) -> tuple[str, str]:
        """Looked up for every question: a service that was requeued, or handed over, answers elsewhere."""
        if is_address(self._where):
            token = Path(self._token_file).read_text(encoding="utf-8").strip() if self._token_file else ""
            return self._where.rstrip("/"), token
        folder = StageDir(Path(self._where))
        found = endpoint.read(folder)
        try:
            token = folder.token.read_text(encoding="utf-8").strip()
        except OSError as failed:
            raise _AwayError("it is not ready") from failed
        if found is None:
            raise _AwayError("it is not ready")
        return f"http://{found.address}/v1", token


class _AwayError(Exception):
    """Not there for now."""


def is_address(text: str) -> bool:
    """True for http://… and https://…"""
    return text.startswith(("http://", "https://"))


def _message(body: bytes) -> str:
    """The reason in an error's body, however it is written."""
    text = body.decode("utf-8", "replace").strip()
    try:
        found = json.loads(text)["error"]
        text = str(found["message"] if isinstance(found, dict) else found)
    except (ValueError, KeyError, TypeError):
        pass
    return text[:300]
