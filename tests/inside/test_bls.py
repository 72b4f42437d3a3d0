"""From text to text with TensorRT-LLM's backend: names of its inputs, its limit, its end. Triton and it are stubs."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from hpc.core.assets import TEMPLATES

pytestmark = pytest.mark.train
CODE = TEMPLATES / "triton" / "common" / "tensorrt_llm_bls" / "1" / "model.py"
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
PROMPT = 10
KINDS = {"text_input": "O", "stop_words": "O", "stream": "?", "random_seed": "<u8"}


class Tensor:
    def __init__(self, name: str, value: Any) -> None:
        self._name, self._value = name, value

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        return self._value


class Request(dict[str, Any]):
    """A client's."""

    number = ""

    def request_id(self) -> str:
        return self.number


class Engine:
    """It answers the alphabet, a letter a token, to the length that its max_seq_len leaves, or until it is told."""

    def __init__(self) -> None:
        self.made = 0
        self.asked: dict[str, Any] = {}
        self.stopped: list[str] = []
        self.at_stop: Callable[[], None] = lambda: None
        self.room = 600 - PROMPT

    def exec(self, number: str, inputs: dict[str, Any]) -> Iterator[Any]:
        if "stop" in inputs:
            assert inputs.keys() == {"stop", "input_ids", "input_lengths", "request_output_len"}
            self.stopped.append(number)
            self.at_stop()
            return
        self.asked, self.made = inputs, 0
        letters = [ord(ALPHABET[n % 26]) for n in range(min(int(inputs["request_output_len"].flat[0]), self.room))]
        pieces = [[letter] for letter in letters] if inputs["streaming"].flat[0] else [letters]
        for tokens in pieces:
            if number in self.stopped:
                return
            self.made += len(tokens)
            yield response([("output_ids", [[tokens]], "i4"), ("sequence_length", [[len(tokens)]], "i4")])


def response(tensors: list[tuple[str, Any, str]]) -> Any:
    import numpy as np

    made = [Tensor(name, np.array(value, kind)) for name, value, kind in tensors]
    return SimpleNamespace(output_tensors=lambda: made, has_error=lambda: False)


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def model(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Any:
    stub: Any = ModuleType("triton_python_backend_utils")

    class Asked:
        def __init__(
            self, model_name: str, requested_output_names: list[str], inputs: Any, request_id: str = ""
        ) -> None:
            self.model, self.number = model_name, request_id
            self.inputs = {tensor.name(): tensor.as_numpy() for tensor in inputs}

        def exec(self, decoupled: bool = False) -> Any:
            if self.model == "tensorrt_llm":
                assert decoupled
                return engine.exec(self.number, self.inputs)
            if self.model == "postprocessing":
                text = "".join(chr(token) for token in self.inputs["TOKENS_BATCH"].flat)
                return response([("OUTPUT", [text.encode()], "O")])
            return response([
                ("INPUT_ID", [[0] * PROMPT], "i4"), ("REQUEST_INPUT_LEN", [[PROMPT]], "i4"),
                ("REQUEST_OUTPUT_LEN", self.inputs["REQUEST_OUTPUT_LEN"], "i4"),
                ("STOP_WORDS_IDS", [[[107], [1]]], "i4"),
            ])  # fmt: skip

    stub.Tensor, stub.InferenceRequest, stub.TRITONSERVER_RESPONSE_COMPLETE_FINAL = Tensor, Asked, 1
    stub.InferenceResponse = lambda tensors: {tensor.name(): tensor.as_numpy().flat[0] for tensor in tensors}
    stub.get_input_tensor_by_name = lambda request, name: Tensor(name, request[name]) if name in request else None
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    for folder in (TEMPLATES / "triton", CODE.parent):
        monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "adapters", raising=False)
    spec = importlib.util.spec_from_file_location("bls_model", CODE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    told = {
        "tensorrt_llm_model_name": "tensorrt_llm", "stop_words_as": "tokens", "adapters": "", "engine_dir": "/e",
        "max_seq_len": "600", "exclude_input_in_output": "true", "max_batch_size": "1",
    }  # fmt: skip
    parameters = {name: {"string_value": value} for name, value in told.items()}
    made = module.TritonPythonModel()
    made.initialize({
        "model_config": json.dumps({"parameters": parameters, "model_transaction_policy": {"decoupled": True}})
    })  # fmt: skip
    yield made
    made.finalize()


def asked(number: str = "7", max_tokens: int = 500, **words: Any) -> Request:
    import numpy as np

    words = {"text_input": b"x", "max_tokens": max_tokens, **words}
    request = Request({name: np.array([[value]], KINDS.get(name, "i4")) for name, value in words.items()})
    request.number = number
    return request


def ask(model: Any, cancelled: Callable[[], bool] = lambda: False, **words: Any) -> Any:
    """(text, tokens, why it ended) of all pieces together."""
    pieces = [piece for piece, _ in model._responses(asked(**words), cancelled)]
    text = "".join(piece["text_output"].decode() for piece in pieces)
    return text, sum(int(piece["sequence_length"]) for piece in pieces), pieces[-1]["finish_reason"].decode()


def test_seed_and_least_length_have_the_names_of_every_release(model: Any, engine: Engine) -> None:
    ask(model, max_tokens=5, min_tokens=3, random_seed=1 << 63)
    names = ("min_tokens", "min_length", "random_seed", "seed")
    assert [int(engine.asked[name].flat[0]) for name in names] == [3, 3, 1 << 63, 1 << 63]
    ask(model, max_tokens=5)
    assert not set(names) & engine.asked.keys()


def test_our_own_engine_is_told_its_own_names_alone(model: Any, engine: Engine) -> None:
    model.texts = True
    ask(model, max_tokens=3, min_tokens=3, random_seed=1)
    assert {"min_tokens", "random_seed", "stop_words_list"} <= engine.asked.keys()
    assert not {"min_length", "seed"} & engine.asked.keys()


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engines_length_cuts_is_told_as_length(model: Any, engine: Engine, stream: bool) -> None:
    model.longest, engine.room = 30, 30 - PROMPT
    assert ask(model, max_tokens=64, stream=stream) == (ALPHABET[:20], 20, "length")
    engine.room = 19  # it has ended by itself
    assert ask(model, max_tokens=64, stream=stream) == (ALPHABET[:19], 19, "stop")
    assert engine.stopped == []


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_word_of_other_tokens_ends_the_answer_at_once(model: Any, engine: Engine, stream: bool) -> None:
    assert ask(model, stop_words=b"de", stream=stream) == ("abc", 5, "stop")
    assert (engine.made, engine.stopped) == (5, ["7"])
    assert ask(model, number="", stop_words=b"de", stream=stream) == ("abc", 5, "stop")
    assert len(engine.stopped[-1]) == 32, "an id of its own"


def test_the_client_has_its_answer_before_the_engine_is_stopped(model: Any, engine: Engine) -> None:
    came: list[Any] = []
    engine.at_stop = lambda: came.append("stopped")
    for piece, last in model._responses(asked(stop_words=b"c", stream=True), lambda: False):
        came.append((piece["text_output"], last))
    assert came == [(b"a", False), (b"b", False), (b"", True), "stopped"]


def test_another_request_with_the_same_id_is_not_ended(model: Any, engine: Engine) -> None:
    model.asked.append("7")
    assert ask(model, max_tokens=50, stop_words=b"de", stream=True) == ("abc", 5, "stop")
    assert (engine.made, engine.stopped, model.asked) == (50, [], ["7"])


def test_a_client_that_leaves_stops_the_engine(model: Any, engine: Engine) -> None:
    found = ask(model, cancelled=lambda: engine.made > 3, stream=True)
    assert found == ("abc", 3, "cancelled")
    assert (engine.made, engine.stopped) == (4, ["7"])


def test_an_answer_of_an_exact_length_has_no_stop_words(model: Any, engine: Engine) -> None:
    ask(model, max_tokens=5, min_tokens=5)
    assert "stop_words_list" not in engine.asked, "the engine would end at them, however few tokens there are"
    ask(model, max_tokens=5, min_tokens=4)
    assert "stop_words_list" in engine.asked
