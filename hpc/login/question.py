"""PURE: what is asked -> the request, in OpenAI's words or in Triton's; each event of the answer -> a piece of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpc.core import responses
from hpc.core.errors import HpcError, NotReady, UsageError

_MAX_TOKENS = 512
"""What Triton's own API is asked for where nothing is said; OpenAI's door has a number of its own."""
_LIMIT = re.compile(
    r"prompt has \d+ tokens; this engine takes \d+ at most|[Pp]rompt length.*exceed|exceeds? (the )?max_(input|seq)_len"
    r"|input length.*exceed|maximum (context|sequence) length"
)

_CONTROL = dict.fromkeys((*(n for n in range(32) if chr(n) not in "\n\t"), 127, *range(128, 160)))


class TooLong(UsageError):
    """The prompt has more tokens than the engine takes."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an answer is drawn; None: as the service does by itself."""

    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Question:
    """Messages for the model's chat template, or a text that is continued as it is."""

    messages: Sequence[Mapping[str, str]] = ()
    text: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    stream: bool = True


@dataclass(frozen=True)
class Piece:
    """What one event brought. The counts are of all so far; None: not told."""

    text: str = ""
    reason: str = ""
    tokens: int | None = None
    prompt: int | None = None


@dataclass(frozen=True)
class Target:
    """The one of Triton's models that is asked."""

    model: str
    cumulative: bool = False
    """Each of its responses holds all of the text so far."""
    wraps: bool = False
    """It is TensorRT-LLM's LLM API, which writes the prompt before the answer where it is not told otherwise."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Our name of an input -> its own, where it has another."""


def openai(question: Question) -> tuple[str, dict[str, Any]]:
    """The path and the body for OpenAI's API."""
    asked = {name: value for name, value in vars(question.sampling).items() if value not in (None, ())}
    if question.sampling.stop:
        asked["stop"] = list(question.sampling.stop)
    if question.stream:
        asked.update(stream=True, stream_options={"include_usage": True})
    if question.messages:
        return "/v1/chat/completions", {"messages": list(question.messages), **asked}
    return "/v1/completions", {"prompt": question.text, **asked}


def triton(question: Question, target: Target) -> dict[str, Any]:
    """The inputs of Triton's model: the sampling that OpenAI's API has, whatever the model asks for."""
    sampling = question.sampling
    asked: dict[str, Any] = {
        "text_input": question.text,
        "max_tokens": _MAX_TOKENS if sampling.max_tokens is None else sampling.max_tokens,
        "stream": question.stream,
    }
    if sampling.temperature == 0:
        asked["top_k"] = 1
    else:
        asked["temperature"] = 1.0 if sampling.temperature is None else sampling.temperature
        asked["top_p"] = 1.0 if sampling.top_p is None else sampling.top_p
        asked["top_k"] = sampling.top_k or 0
    more = {
        "random_seed": sampling.seed,
        "stop_words": list(sampling.stop) or None,
        "min_tokens": sampling.min_tokens,
        "repetition_penalty": sampling.repetition_penalty,
    }
    if target.wraps:
        asked["exclude_input"] = True
    asked.update({name: value for name, value in more.items() if value is not None})
    return {target.names.get(name, name): value for name, value in asked.items()}


def target(config: Callable[[str], Mapping[str, Any]]) -> Target:
    """Which model streams whole characters, and how; `config` gives the configuration of a model."""
    ensemble = config("ensemble")
    steps = [_table(step).get("model_name") for step in _list(_table(ensemble.get("ensemble_scheduling")).get("step"))]
    outputs = [_table(output).get("name") for output in _list(ensemble.get("output"))]
    if steps[:1] == ["tensorrt_llm"]:
        return Target("ensemble", cumulative=True, wraps=True)
    if "finish_reason" in outputs:
        return Target("ensemble")
    bls = config("tensorrt_llm_bls")
    accumulate = _table(_table(bls.get("parameters")).get("accumulate_tokens")).get("string_value")
    names = responses.names(_text(_table(entry).get("name")) for entry in _list(bls.get("input")))
    return Target("tensorrt_llm_bls", responses.accumulates(_text(accumulate)), names=names)


def openai_piece(event: Any) -> Piece:
    """A piece out of a chunk of a stream, or out of a whole answer; an empty one of what is neither."""
    event = _table(event)
    usage, choice = _table(event.get("usage")), _table(next(iter(_list(event.get("choices"))), None))
    said = _table(choice.get("delta")) or _table(choice.get("message")) or {"content": choice.get("text")}
    return Piece(
        _text(said.get("content")), _text(choice.get("finish_reason")), _count(usage.get("completion_tokens")),
        _count(usage.get("prompt_tokens")),
    )  # fmt: skip


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) else None


class TritonPieces:
    """Pieces out of the responses of Triton's model."""

    def __init__(self, cumulative: bool, stops: Sequence[str] = ()) -> None:
        self._cumulative = cumulative
        self._grown = responses.Growing(stops)
        self._tokens: int | None = None

    def piece(self, event: Mapping[str, Any]) -> Piece:
        text = _text(event.get("text_output"))
        if self._cumulative:
            text = self._grown.take(text)
        if (tokens := _count(event.get("sequence_length"))) is not None:
            self._tokens = (self._tokens or 0) + tokens
        return Piece(text, _text(event.get("finish_reason")), self._tokens, _count(event.get("prompt_length")))

    def rest(self) -> Piece:
        """What was kept back until the answer's end."""
        return Piece(self._grown.rest(), tokens=self._tokens)


def error_in(event: Any) -> str | None:
    """What went wrong, where an event or a body says so: servers say it under 200, too."""
    error = event.get("error") if isinstance(event, Mapping) else None
    if error is None:
        return None
    return plain(str(error.get("message") or error) if isinstance(error, Mapping) else str(error))


def plain(text: str) -> str:
    """What a model or a server says, without the control codes that would steer a terminal."""
    return text.translate(_CONTROL)


def failure(what: str, status: int, message: str) -> HpcError:
    """The error that a refusal is for the user."""
    message = re.sub(r"^in ensemble '\w+', ", "", message).strip()
    if _LIMIT.search(message):
        return TooLong(message, hint="shorten it, or build the engine for more: build.max_seq_len")
    if status in (401, 403):
        return UsageError(f"{what} does not take this token", hint="each start of a service has its own: `hpc tunnel`")
    if status == 503 and "failed" not in message:
        return NotReady(f"{what} takes no requests: {message}", hint="`hpc submit serve` starts one")
    if "no chat template" in message:
        return UsageError("this model has no chat template", hint="--raw continues the text as it is")
    if status == 404:
        return UsageError(f"{what}: {message}", hint="is that the address of a served model? `hpc status` tells")
    if status == 400:
        return UsageError(message, hint="change the request; `hpc query --help` shows the options")
    return HpcError(f"{what}: {message}", hint="`hpc logs serve` shows what the server says")
