"""How much a service does: counted at its door, with what its server's metrics add; a small file for `hpc status`."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hpc.core import rundir

_EVERY_S = 5.0
_LINE = re.compile(r"^(\w+)\{([^}]*)\} ([0-9.eE+-]+)$", re.M)
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_TOKENS = re.compile(rb'"sequence_length":\s*(\d+)')


class Request:
    """One that has been let in."""

    failed = left = False


class Figures:
    """Counts since the service began."""

    def __init__(self) -> None:
        self.running = self.done = self.failed = self.left = self.tokens = 0
        """Requests for an answer of the model: those in work, and those that ended, failed, or whose client left."""

    @contextlib.contextmanager
    def request(self) -> Iterator[Request]:
        """One request, from when it is let in to its end."""
        one = Request()
        self.running += 1
        try:
            yield one
        except BaseException:
            one.failed = True
            raise
        finally:
            self.end(one)

    def end(self, one: Request) -> None:
        self.running -= 1
        self.left += one.left
        self.failed += one.failed and not one.left
        self.done += not (one.failed or one.left)

    def counted(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("running", "done", "failed", "left", "tokens")}


class Answer:
    """The bytes of Triton's JSON or server-sent events: how many tokens they hold, and whether they tell an error."""

    def __init__(self, figures: Figures) -> None:
        self.failed = False
        self._figures = figures
        self._rest = b""

    def take(self, chunk: bytes) -> None:
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            self._line(line)

    def end(self) -> None:
        self._line(self._rest)
        self._rest = b""

    def _line(self, line: bytes) -> None:
        if line.removeprefix(b"data:").lstrip().startswith(b'{"error"'):
            self.failed = True
        found = _TOKENS.search(line)
        self._figures.tokens += int(found[1]) if found else b'"text_output"' in line


def scraped(text: str) -> dict[str, float]:
    """What Prometheus' text of Triton tells beyond our own counts: queue times so far, and how full the KV cache is.

    >>> scraped('nv_inference_queue_duration_us{model="tensorrt_llm",version="1"} 421')
    {'queue_us': 421.0}
    """
    found: dict[str, float] = {}
    blocks: dict[str, float] = {}
    for name, labels, value in _LINE.findall(text):
        label = dict(_LABEL.findall(labels))
        if name == "nv_inference_queue_duration_us" and label.get("model") == "tensorrt_llm":
            found["queue_us"] = float(value)
        elif name == "nv_inference_exec_count" and label.get("model") == "tensorrt_llm":
            found["queued"] = float(value)
        elif name == "nv_trt_llm_kv_cache_block_metrics":  # TensorRT-LLM's backend alone
            blocks[label.get("kv_cache_block_type", "")] = float(value)
        elif name == "nv_trt_llm_request_metrics" and label.get("request_type") == "waiting":
            found["waiting"] = float(value)
    if blocks.get("max"):
        found["kv_use"] = blocks.get("used", 0.0) / blocks["max"]
    return found


def document(
    now: float, before: Mapping[str, Any] | None, counted: Mapping[str, int], extra: Mapping[str, float]
) -> dict[str, Any]:
    """What is written: counts, and rates over the time since it was last looked."""
    said: dict[str, Any] = {"schema": "hpc.figures/1", "t": round(now, 3), **counted}
    spent = now - before["t"] if before else 0.0
    said["tokens_s"] = round((counted["tokens"] - before["tokens"]) / spent, 1) if before and spent > 0 else 0.0
    said["queue_ms"] = None
    if before and extra.get("queued", 0) > before["_queued"]:
        said["queue_ms"] = round(
            (extra["queue_us"] - before["_queue_us"]) / (extra["queued"] - before["_queued"]) / 1000, 2
        )
    said["waiting"] = int(extra["waiting"]) if "waiting" in extra else None
    said["kv_use"] = round(extra["kv_use"], 3) if "kv_use" in extra else None
    return {**said, "_queued": extra.get("queued", 0.0), "_queue_us": extra.get("queue_us", 0.0)}


async def keep(path: Path, figures: Figures, ask: Callable[[], Awaitable[str]]) -> None:
    """Write the file whenever something has changed, for ever."""
    before: dict[str, Any] | None = None
    while True:
        said = document(time.time(), before, figures.counted(), scraped(await ask()))
        changes = {name: value for name, value in said.items() if name != "t"}
        if before is None or changes != {name: value for name, value in before.items() if name != "t"}:
            with contextlib.suppress(OSError):  # a full disk must not end the service
                rundir.write_json(path, {name: value for name, value in said.items() if not name.startswith("_")})
        before = said
        await asyncio.sleep(_EVERY_S)
