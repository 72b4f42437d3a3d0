"""One question over Triton's gRPC, by NVIDIA's own client: `pip install 'hpc-batch[client]'`."""

from __future__ import annotations

import codecs
import json
import queue
from collections.abc import Iterator
from typing import Any

from hpc.core.errors import HpcError, NotReady, UsageError
from hpc.login import question as words
from hpc.login.doorway import Doorway
from hpc.login.question import Piece, Question, TritonPieces

_TYPES = {
    "text_input": "BYTES", "max_tokens": "INT32", "min_tokens": "INT32", "stop_words": "BYTES", "top_k": "INT32",
    "top_p": "FP32", "temperature": "FP32", "repetition_penalty": "FP32", "random_seed": "UINT64", "stream": "BOOL",
    "exclude_input": "BOOL", "seed": "UINT64", "min_length": "INT32",
}  # fmt: skip


def ask(door: Doorway, question: Question) -> Iterator[Piece]:
    """The pieces of the answer; closing the iterator ends it before its end."""
    try:
        import numpy as np
        from tritonclient import grpc
        from tritonclient.utils import InferenceServerException
    except ImportError as error:
        raise UsageError(
            f"--protocol grpc needs NVIDIA's client: {error}", hint="pip install 'hpc-batch[client]', or leave it out"
        ) from None
    if not door.grpc:
        raise UsageError(f"{door.what} has no port for gRPC", hint="--protocol http asks Triton's own API, too")
    came: queue.Queue[tuple[Any, Any]] = queue.Queue()
    headers = {"authorization": f"Bearer {door.token}"}
    kinds = {"BYTES": object, "INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32, "BOOL": np.bool_}
    client = grpc.InferenceServerClient(door.grpc)
    try:

        def config(model: str) -> dict[str, Any]:
            found: dict[str, Any] = client.get_model_config(model, headers=headers, as_json=True)
            inner: dict[str, Any] = found.get("config", found)
            return inner

        target = words.target(config)
        batched = [1] if int(config(target.model).get("max_batch_size", 0)) else []
        inputs = []
        for name, value in words.triton(question, target).items():
            values = [one.encode() if isinstance(one, str) else one for one in _listed(value)]
            tensor = np.array(values, dtype=kinds[_TYPES[name]]).reshape([*batched, len(values)])
            inputs.append(grpc.InferInput(name, list(tensor.shape), _TYPES[name]))
            inputs[-1].set_data_from_numpy(tensor)
        client.start_stream(lambda result, error: came.put((result, error)), headers=headers)
        client.async_stream_infer(target.model, inputs, enable_empty_final_response=True)
        pieces, decoder = (
            TritonPieces(target.cumulative, question.sampling.stop),
            codecs.getincrementaldecoder("utf-8")("replace"),
        )
        while True:
            result, failed = came.get()
            if failed is not None:
                raise failed
            event = _event(result, decoder)
            if event:
                yield pieces.piece(event)
            if result.get_response().parameters["triton_final_response"].bool_param:
                yield pieces.rest()
                return
    except InferenceServerException as error:
        raise _failure(door, error) from None
    finally:
        client.stop_stream(cancel_requests=True)
        client.close()


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _event(result: Any, decoder: Any) -> dict[str, Any]:
    """The response in the words of Triton's HTTP; {} for one that only says that it was the last."""
    found: dict[str, Any] = {}
    for output in result.get_response().outputs:
        values = result.as_numpy(output.name).reshape(-1).tolist()
        if values:
            found[output.name] = values[0]
    if "text_output" in found:
        found["text_output"] = decoder.decode(found["text_output"])
    if "finish_reason" in found:
        found["finish_reason"] = found["finish_reason"].decode()
    return found


def _failure(door: Doorway, error: Any) -> HpcError:
    status, message = str(error.status() or ""), words.plain(str(error.message() or error))
    if "UNAVAILABLE" in status:
        said = json.dumps(message[:200], ensure_ascii=False)
        return NotReady(f"{door.what} does not answer gRPC: {said}", hint="is the tunnel open, and the service ready?")
    return words.failure(door.what, 401 if "UNAUTHENTICATED" in status else 400, message)
