"""Triton's model of the CPU engine, without Triton: engine_alone.py MODEL_PY_FOLDER ENGINE; prints what it saw as JSON.

A program for the environment serve-cpu. The graph and the loop are the real ones; triton_python_backend_utils, which
exists in Triton's process alone, is a STUB.
"""

from __future__ import annotations

import itertools
import json
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

LAST = 1
PROMPTS = [
    [5 + (7 * n + k) % 200 for k in range(length)] for n, length in enumerate((3, 70, 9, 30, 150, 12, 41, 5, 99))
]


class Tensor:
    def __init__(self, name: str, array: Any) -> None:
        self._name, self._array = name, array

    def as_numpy(self) -> Any:
        return self._array

    def name(self) -> str:
        return self._name


class Response:
    def __init__(self, tensors: Any = (), error: Any = None) -> None:
        self.found = {tensor.name(): tensor.as_numpy() for tensor in tensors}
        self.error = error


class Request:
    """One request, and all that is answered to it."""

    def __init__(self, prompt: list[int], count: int, **more: Any) -> None:
        given = {"input_ids": prompt, "request_output_len": count, "streaming": True, **more}
        import numpy as np

        self.inputs = {k: np.array([v], object if isinstance(v, bytes) else None) for k, v in given.items()}
        self.tokens: list[int] = []
        self.pieces: list[tuple[list[int], str]] = []
        """(tokens, their text) of each."""
        self.reason, self.error, self.left = "", "", False
        self.done = threading.Event()
        self.late = 0

    def request_id(self) -> str:
        return ""

    def requested_output_names(self) -> list[str]:
        return ["output_ids", "text_output", "finish_reason"]

    def get_response_sender(self) -> Request:
        return self

    def is_cancelled(self) -> bool:
        if self.done.is_set():
            self.late += 1  # Triton itself breaks where it is asked then
        return self.left

    def send(self, response: Response, flags: int = 0) -> None:
        if response.error is not None:
            self.error = str(response.error)
        elif response.found:
            tokens = response.found["output_ids"].reshape(-1).tolist()
            self.pieces.append((tokens, response.found["text_output"].flat[0].decode()))
            self.tokens += tokens
            self.reason = response.found["finish_reason"].flat[0].decode()
        if flags & LAST:
            self.done.set()

    @property
    def end(self) -> Any:
        return [self.tokens, self.reason, self.error]


class Engine:
    """The model, and what its loop asked of the graph: ("fill", tokens) and ("step", rows)."""

    def __init__(self, made: Any, folder: str, **parameters: Any) -> None:
        told = {
            "gpt_model_path": folder, "tokenizer_dir": folder, "max_seq_len": "0", "max_batch_size": "16",
            "max_tokens_in_cache": "0", "exclude_input_in_output": "true", "skip_special_tokens": "true",
            "stream_interval_ms": "0", **parameters,
        }  # fmt: skip
        words = {k: {"string_value": str(v)} for k, v in told.items()}
        policy = {"decoupled": True}
        self.model = made.TritonPythonModel()
        self.model.initialize({"model_config": json.dumps({"parameters": words, "model_transaction_policy": policy})})
        self.log: list[tuple[str, int]] = []
        self.step_s = 0.0
        """What a step takes beside its own time: so small a model has said 400 tokens before anybody looks."""
        rows = self.model.rows
        fill, step = rows.fill, rows.step
        rows.fill = lambda row, tokens, before: self.log.append(("fill", len(tokens))) or fill(row, tokens, before)

        def slowed(tokens: Any, lengths: Any) -> Any:
            self.log.append(("step", len(tokens)))
            time.sleep(self.step_s)
            return step(tokens, lengths)

        rows.step = slowed

    def ask(self, *requests: Request, wait: bool = True) -> list[Any]:
        self.model.execute(list(requests))
        if wait and not all(request.done.wait(60) for request in requests):
            raise SystemExit("a request was never answered")
        return [request.end for request in requests]


def several() -> list[Request]:
    """Different lengths, ends, adapters and choices."""
    names = (b"", b"first", b"second")
    greedy = [
        Request(prompt, 5 + 9 * n, lora_name=names[n % 3], min_tokens=0 if n % 2 else 5 + 9 * n)
        for n, prompt in enumerate(PROMPTS)
    ]
    drawn = [Request(p, 20, temperature=1.5, runtime_top_p=0.9, random_seed=n) for n, p in enumerate(PROMPTS[:3])]
    stopped = [Request(PROMPTS[3], 60, min_tokens=60, stop_words_list=[[12, 9], [1, 2]])]
    return [*greedy, *drawn, *stopped]


def in_intervals(made: Any, folder: str, seen: dict[str, Any]) -> Any:
    """The end of one whose tokens share pieces; what it took, and whether its pieces' texts are the whole text."""
    engine, request = Engine(made, folder, stream_interval_ms=50), Request(PROMPTS[1], 400, min_tokens=400)
    engine.step_s = 0.001
    began = time.monotonic()
    engine.ask(request)
    seen["interval_s"] = time.monotonic() - began
    seen["interval"] = [len(tokens) for tokens, _ in request.pieces]
    seen["whole"] = "".join(text for _, text in request.pieces) == engine.model.decode(request.tokens)
    engine.model.finalize()
    return request.end


def ended_under(engine: Engine, seen: dict[str, Any]) -> None:
    """The model is unloaded while four are answered."""
    engine.step_s = 0.05
    last = [Request(prompt, 1500, min_tokens=1500) for prompt in PROMPTS[:4]]
    engine.ask(*last, wait=False)
    until(lambda: all(request.tokens for request in last))
    began = time.monotonic()
    engine.model.finalize()
    seen["ended_s"] = time.monotonic() - began
    seen["told"] = [request.error for request in last]


def until(true: Any) -> None:
    deadline = time.monotonic() + 60
    while not true():
        if time.monotonic() > deadline:
            raise SystemExit("it never came")
        time.sleep(0.002)


def main(code: str, folder: str) -> None:
    stub: Any = types.ModuleType("triton_python_backend_utils")
    stub.Tensor, stub.InferenceResponse, stub.TritonError = Tensor, Response, str
    stub.TRITONSERVER_RESPONSE_COMPLETE_FINAL = LAST
    stub.get_input_tensor_by_name = lambda request, name: (
        Tensor(name, request.inputs[name]) if name in request.inputs else None
    )
    sys.modules["triton_python_backend_utils"] = stub
    sys.path[:0] = [code, str(Path(code).parents[2])]
    import model as made

    seen: dict[str, Any] = {}
    engine = Engine(made, folder)
    alone = [engine.ask(request)[0] for request in several()]
    engine.log.clear()
    seen["alone"] = alone
    seen["together"] = engine.ask(*several())
    seen["rows"] = max(count for kind, count in engine.log if kind == "step")

    seen["same"] = engine.ask(Request(PROMPTS[1], 400, min_tokens=400))[0] == in_intervals(made, folder, seen)
    engine.step_s = 0.05  # 400 tokens are 20 s: whatever this thread does, those that run have not ended
    running = [Request(prompt, 400, min_tokens=400) for prompt in PROMPTS[:3]]
    engine.ask(*running, wait=False)
    until(lambda: all(len(request.tokens) > 5 for request in running))
    engine.log.clear()
    long = Request(PROMPTS[4] * 10, 5, min_tokens=5)
    engine.ask(long)
    read = [n for n, (kind, _) in enumerate(engine.log) if kind == "fill"]
    seen["pieces"] = [engine.log[n][1] for n in read]
    seen["between"] = [engine.log[a + 1 : b].count(("step", 3)) for a, b in itertools.pairwise(read)]
    running[1].left = True
    until(running[1].done.is_set)
    seen["left"] = [running[1].reason, len(running[1].tokens) < 400]
    engine.step_s = 0.0
    ends = [request.done.wait(60) and request.end for request in (running[0], running[2])]
    seen["stayed"] = ends == engine.ask(*(Request(PROMPTS[n], 400, min_tokens=400) for n in (0, 2)))
    seen["late"] = sum(request.late for request in running)

    ended_under(engine, seen)
    small = Engine(made, folder, max_tokens_in_cache=100)
    seen["waited"] = small.ask(*(Request(PROMPTS[3], 30, min_tokens=30) for _ in range(5)))
    seen["room_for"] = max(count for kind, count in small.log if kind == "step")
    seen["too_much"] = small.ask(Request(PROMPTS[3], 90), Request([5], 5, lora_name=b"third"), Request([9999], 5))

    def broken(running: Any) -> None:
        raise MemoryError("the loop itself fails")

    small.model._step = broken
    left: list[int] = []
    made.os._exit = left.append
    seen["broken"] = small.ask(Request([5], 5))[0][2]
    until(lambda: left)
    print(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
