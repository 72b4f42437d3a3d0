"""Triton's own gRPC client, on a machine of the test cluster: grpcing.py HOST:PORT WHAT PROMPT; prints JSON.

The token comes on stdin. It runs in the image, which has the client.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from typing import Any

import grpc
import numpy
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

LONG = {"max_tokens": 1900, "min_tokens": 1900, "bad_words": "</s>"}


def inputs(prompt: str, **words: Any) -> list[Any]:
    """The ensemble's inputs."""
    kinds = {str: "BYTES", bool: "BOOL", int: "INT32"}
    made = []
    for name, value in {"text_input": prompt, "max_tokens": 100, **words}.items():
        one = triton.InferInput(name, [1, 1], kinds[type(value)])
        array = numpy.array([[value]], dtype={str: object, bool: bool, int: numpy.int32}[type(value)])
        one.set_data_from_numpy(array)
        made.append(one)
    return made


class Client:
    """One connection; what a stream answered."""

    def __init__(self, address: str, token: str) -> None:
        self.headers = {"authorization": f"Bearer {token}"} if token else {}
        self.triton = triton.InferenceServerClient(address)
        self.came: list[tuple[str, str, bool]] = []
        """(text, finish reason, whether it had the mark of the last) of each response; or an error's text."""
        self.ids: list[str] = []
        self.errors: list[str] = []
        self._more = threading.Condition()

    def take(self, result: Any, error: Any) -> None:
        with self._more:
            if error is not None:
                self.errors.append(str(error))
            else:
                response = result.get_response()
                marks = [response.parameters[k].bool_param for k in response.parameters if k == "triton_final_response"]
                text = result.as_numpy("text_output")
                reason = result.as_numpy("finish_reason")
                self.ids.append(response.id)
                self.came.append(
                    (*("" if found is None else found.ravel()[0].decode() for found in (text, reason)), any(marks))
                )
            self._more.notify_all()

    def until(self, what: Any, timeout: float = 60) -> None:
        with self._more:
            assert self._more.wait_for(what, timeout), (self.came[-3:], self.errors)

    def ended(self) -> bool:
        return bool(self.errors or [reason for _, reason, _ in self.came if reason])

    def say(self, prompt: str, **options: Any) -> None:
        words = {name: options.pop(name) for name in list(options) if name in LONG or name == "add_special_tokens"}
        self.triton.async_stream_infer("ensemble", inputs(prompt, stream=True, **words), **options)


def whole(client: Client, prompt: str) -> dict[str, Any]:
    """Every kind of call, each once."""
    headers, found = client.headers, {}
    found["ready"] = client.triton.is_server_ready(headers=headers)
    found["models"] = sorted(m.name for m in client.triton.get_model_repository_index(headers=headers).models)
    client.triton.start_stream(client.take, headers=headers)
    client.say(prompt, add_special_tokens=False, request_id="mine")
    client.until(client.ended)
    found["text"] = "".join(text for text, _, _ in client.came)
    found["pieces"], found["ids"] = len(client.came), sorted(set(client.ids))
    found["marked"] = any(mark for _, _, mark in client.came)
    client.came.clear()
    client.say(prompt, add_special_tokens=False, enable_empty_final_response=True)
    client.until(lambda: any(mark for _, _, mark in client.came))
    found["last"] = client.came[-1][2]
    client.came.clear()
    client.say("x" * 2500)
    client.until(client.ended)
    client.triton.stop_stream()
    found["refused"], client.errors = client.errors, []
    query = triton.InferInput("QUERY", [1, 1], "BYTES")
    query.set_data_from_numpy(numpy.array([["abc"]], dtype=object))
    length = triton.InferInput("REQUEST_OUTPUT_LEN", [1, 1], "INT32")
    length.set_data_from_numpy(numpy.array([[5]], dtype=numpy.int32))
    answer = client.triton.infer("preprocessing", [query, length], headers=headers)
    found["tokens"] = answer.as_numpy("INPUT_ID").shape
    found["failed"] = failure(lambda: client.triton.infer("ensemble", inputs(prompt, stream=True), headers=headers))
    found["unknown"] = failure(lambda: client.triton.get_model_config("nothing", headers=headers))
    elsewhere = client.triton._channel.unary_unary("/another.Service/Call")
    try:
        elsewhere(b"", metadata=tuple(headers.items()))
    except grpc.RpcError as error:
        found["elsewhere"] = error.code().name
    found["malformed"] = []
    for name in ("ModelInfer", "ModelStreamInfer"):
        call = client.triton._channel.stream_stream(f"/inference.GRPCInferenceService/{name}")
        try:
            list(call(iter([b"\xff"]), metadata=tuple(headers.items()), timeout=10))
        except grpc.RpcError as error:
            found["malformed"].append(error.code().name)
    return found


def failure(call: Any) -> str:
    try:
        call()
    except InferenceServerException as error:
        return f"{error.status()}: {error.message()}"
    return ""


def refused(client: Client, prompt: str) -> dict[str, Any]:
    """What somebody gets who has no token."""
    query = triton.InferInput("QUERY", [1, 1], "BYTES")
    query.set_data_from_numpy(numpy.array([["abc"]], dtype=object))
    found = {
        "live": failure(lambda: client.triton.is_server_live(headers=client.headers)),
        "config": failure(lambda: client.triton.get_model_config("ensemble", headers=client.headers)),
        "infer": failure(lambda: client.triton.infer("preprocessing", [query], headers=client.headers)),
    }
    client.triton.start_stream(client.take, headers=client.headers)
    client.until(lambda: bool(client.errors))
    return {**found, "stream": client.errors[0]}


def leave(client: Client, prompt: str) -> dict[str, Any]:
    """Four long answers begin on one stream, and nobody waits for them."""
    client.triton.start_stream(client.take, headers=client.headers)
    for _ in range(4):
        client.say(prompt, **LONG)
    client.until(lambda: len(client.came) > 5)
    client.triton.stop_stream(cancel_requests=True)
    return {"came": len(client.came)}


def stay(client: Client, prompt: str) -> dict[str, Any]:
    """One answer to its end, whatever happens meanwhile; then a question more on the same stream."""
    client.triton.start_stream(client.take, headers=client.headers)
    client.say(prompt, **{**LONG, "max_tokens": 600, "min_tokens": 600})
    client.until(lambda: bool(client.came))
    print("begun", flush=True)
    client.until(client.ended)
    found = {"reason": client.came[-1][1], "errors": list(client.errors)}
    with contextlib.suppress(InferenceServerException):  # the stream has been closed already: it is told below
        client.say(prompt)
    client.until(lambda: bool(client.errors))
    found["then"] = client.errors[0]
    return found


if __name__ == "__main__":
    began = time.monotonic()
    address, what, prompt = sys.argv[1:]
    shown = {"whole": whole, "refused": refused, "leave": leave, "stay": stay}[what](
        Client(address, sys.stdin.readline().strip()), prompt
    )
    print(json.dumps({**shown, "seconds": time.monotonic() - began}), flush=True)
