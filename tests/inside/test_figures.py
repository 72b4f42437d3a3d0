"""What a service does is counted at its door, and what Triton's metrics tell is added."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from hpc.inside import figures
from hpc.inside.figures import Answer, Figures

METRICS = """\
# HELP nv_inference_queue_duration_us Cumulative inference queuing duration in microseconds
nv_inference_exec_count{model="ensemble",version="1"} 99
nv_inference_exec_count{model="tensorrt_llm",version="1"} %d
nv_inference_queue_duration_us{model="tensorrt_llm",version="1"} %d
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="used",model="tensorrt_llm",version="1"} 25
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="max",model="tensorrt_llm",version="1"} 1e2
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="waiting",version="1"} 7
"""


def test_requests_are_counted_by_how_they_end() -> None:
    counts = Figures()
    with counts.request(), counts.request() as failed, counts.request() as left:
        failed.failed = left.left = True
        assert counts.running == 3
    with pytest.raises(RuntimeError), counts.request():
        raise RuntimeError
    assert counts.counted() == {"running": 0, "done": 1, "failed": 2, "left": 1, "tokens": 0}


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_tokens_are_counted_wherever_the_bytes_are_cut(size: int) -> None:
    counts = Figures()
    said = Answer(counts)
    events = [{"text_output": '"sequence_length":9 ', "sequence_length": n} for n in (1, 2, 0, 13)]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events).encode() + b'data: {"text_output":"x"}'
    for place in range(0, len(body), size):
        said.take(body[place : place + size])
    said.end()
    assert (counts.tokens, said.failed) == (17, False)
    said.take(b'data: {"error":"no"}\n\n')
    assert said.failed


def test_rates_are_those_since_the_last_look() -> None:
    counted = {"running": 1, "done": 2, "failed": 0, "left": 0, "tokens": 100}
    first = figures.document(1000.0, None, counted, figures.scraped(METRICS % (10, 5000)))
    assert (first["tokens_s"], first["queue_ms"]) == (0.0, None)
    more = {**counted, "tokens": 300}
    second = figures.document(1005.0, first, more, figures.scraped(METRICS % (14, 13000)))
    assert (second["tokens_s"], second["queue_ms"], second["kv_use"], second["waiting"]) == (40.0, 2.0, 0.25, 7)
    assert figures.document(1010.0, second, more, {})["kv_use"] is None  # Triton did not answer


def test_the_file_is_written_when_something_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "_EVERY_S", 0.01)
    counts, path, looks = Figures(), tmp_path / "figures.json", [0]

    async def ask() -> str:
        looks[0] += 1
        return METRICS % (1, 1)

    async def further(number: int) -> int:
        """When the file was written, once so many looks more have come to their end."""
        enough = looks[0] + number + 1
        while looks[0] < enough:
            await asyncio.sleep(0.01)
        return path.stat().st_mtime_ns

    async def run() -> list[int]:
        task = asyncio.ensure_future(figures.keep(path, counts, ask))
        seen = [await further(1), await further(5)]
        counts.tokens = 5
        seen.append(await further(1))
        task.cancel()
        return seen

    seen = asyncio.run(asyncio.wait_for(run(), 60))
    assert seen[0] == seen[1] < seen[2]
    document = json.loads(path.read_text())
    assert (document["schema"], document["tokens"]) == ("hpc.figures/1", 5)
    assert not [name for name in document if name.startswith("_")]
