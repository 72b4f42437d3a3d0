"""A request in OpenAI's words -> the words for Triton's model; what cannot be done is refused by its field."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from hpc.core import rundir
from hpc.inside.door import new_id

_LARGEST, _LARGEST_SEED = (1 << 31) - 1, (1 << 63) - 1
_REFUSED = {
    "n": 1, "best_of": 1, "logprobs": False, "top_logprobs": 0, "presence_penalty": 0, "frequency_penalty": 0,
    "tools": None, "functions": None, "logit_bias": None, "echo": False, "suffix": None, "min_p": 0, "typical_p": 1,
    "length_penalty": 1, "ignore_eos": False, "use_beam_search": False, "guided_json": None, "guided_regex": None,
    "guided_choice": None, "guided_grammar": None, "structured_outputs": None,
}  # fmt: skip
"""What would change the answer, and this service cannot do -> the only value that is let through."""

_SAMPLING = {"temperature": (0, 2), "top_p": (0, 1), "top_k": (0, _LARGEST), "repetition_penalty": (0.01, 100)}
"""How a token is drawn -> the least and the most."""

_NOT_OF_LLMAPI = ("bad_words", "repetition_penalty", "min_tokens")


class Invalid(ValueError):
    """A request that is wrong; `param` is the field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, kw_only=True)
class Served:
    """The model as clients see it."""

    name: str
    target: str
    """Triton's model that is asked."""
    max_tokens: int
    """Where a request names none."""
    cumulative: bool = False
    """Each of the target's responses holds all of the text so far, not what is new."""
    wraps: bool = False
    """The target is TensorRT-LLM's LLM API: it has fewer inputs."""
    vendors: bool = False
    """The target is NVIDIA's own tensorrt_llm_bls."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Our name of an input -> the target's, where it has another."""
    begins: str = ""
    """What these two write before every prompt by themselves, where a chat template has written it."""
    streams: bool = True
    echoes: bool = False
    """Answers begin with the prompt (serve.exclude_input is off): that is not OpenAI's form."""
    adapters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Names that a request may give for the model's -> what Triton's model is told then: LoRA adapters."""
    sampling: Mapping[str, float] = field(default_factory=dict)
    """What a request does not name of temperature, top_p, top_k, repetition_penalty; else 1, 1, all and none."""

    @property
    def foreign(self) -> bool:
        """It takes no add_special_tokens, is told nothing by a request's id, and counts no tokens."""
        return self.wraps or self.vendors


def recommended(generation: Mapping[str, Any], *, wraps: bool = False) -> dict[str, float]:
    """The sampling that a model's generation_config.json asks for; what cannot be done is left out."""
    found: dict[str, float] = {}
    for name, (low, high) in _SAMPLING.items():
        value = generation.get(name)
        if not isinstance(value, int if name == "top_k" else int | float) or isinstance(value, bool):
            continue
        if low <= value <= high and not (wraps and name in _NOT_OF_LLMAPI):
            found[name] = value
    return found


def words_for(body: Mapping[str, Any], prompt: str, served: Served, *, special: bool | None) -> dict[str, Any]:
    """The request to Triton's model; Invalid where a field is wrong."""
    for name, only in _REFUSED.items():
        value = body.get(name)
        if value not in (None, [], {}) and (value != only or isinstance(value, bool) != isinstance(only, bool)):
            raise Invalid(f"{name} = {value!r} is not supported here", name)
    if object_of(body, "response_format").get("type", "text") != "text":
        raise Invalid("only text is answered here", "response_format")
    longest = body.get("max_completion_tokens")
    longest = body.get("max_tokens") if longest is None else longest
    temperature, top_p, penalty = (
        _number(body, name, default, *_SAMPLING[name], served.sampling)
        for name, default in (("temperature", 1.0), ("top_p", 1.0), ("repetition_penalty", 1.0))
    )
    top_k = body.get("top_k")
    words: dict[str, Any] = {
        "id": new_id(),
        "text_input": prompt,
        "max_tokens": served.max_tokens if longest is None else _whole(longest, "max_tokens", 1),
        "stream": served.streams,
    }
    if served.wraps:  # it would write the prompt before an answer that does not stream
        words["exclude_input"] = True
    if served.foreign:  # it would write the beginning once more
        words["text_input"] = prompt if special is None else prompt.removeprefix(served.begins)
    elif special is not None:
        words["add_special_tokens"] = special
    if temperature == 0 or top_p == 0:
        words["top_k"] = 1
    else:
        words.update(temperature=temperature, top_p=top_p)
        words["top_k"] = max(0, _whole(served.sampling.get("top_k", 0) if top_k is None else top_k, "top_k", -1))
    if body.get("seed") is not None:
        words["random_seed"] = _whole(body["seed"], "seed", 0, _LARGEST_SEED)
    elif words["top_k"] != 1:
        words["random_seed"] = secrets.randbits(63)  # TensorRT-LLM's own is the same for every request
    stops, bad = (_texts(body, name) for name in ("stop", "bad_words"))
    try:
        "".join([prompt, *stops, *bad]).encode()
    except UnicodeEncodeError:
        raise Invalid("a text holds half of a \\u surrogate pair") from None
    more = {
        "stop_words": stops,
        "bad_words": bad,
        "repetition_penalty": 0 if penalty == 1 else penalty,
        "min_tokens": _whole(body.get("min_tokens") or 0, "min_tokens", 0),
    }
    for name in _NOT_OF_LLMAPI if served.wraps else ():
        if more[name]:
            raise Invalid(f"{name} is not supported by this engine (llmapi)", name)
    words.update({name: value for name, value in more.items() if value})
    words.update(served.adapters.get(str(body.get("model")), {}))
    return {served.names.get(name, name): value for name, value in words.items()}


def object_of(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The object in this field; Invalid where it is something else."""
    value = body.get(name) or {}
    if not isinstance(value, dict):
        raise Invalid(f"{name} must be an object", name)
    return value


def _number(
    body: Mapping[str, Any], name: str, default: float, low: float, high: float, own: Mapping[str, float]
) -> float:
    value = body.get(name)
    if value is None:
        return own.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise Invalid(f"{name} must be from {low} to {high}", name)
    return float(value)


def _whole(value: Any, name: str, low: int, high: int = _LARGEST) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise Invalid(f"{name} must be a whole number from {low} to {high}", name)
    return value


def beginning(tokenizer: Path) -> str:
    """The special tokens that a tokenizer.json puts before every text; "" where it puts none."""
    settings = rundir.read_json(tokenizer / "tokenizer_config.json") or {}
    if settings.get("add_bos_token") is False:
        return ""
    processor = (rundir.read_json(tokenizer / "tokenizer.json") or {}).get("post_processor") or {}
    for part in processor.get("processors", [processor]):
        before = takewhile(lambda one: "SpecialToken" in one, part.get("single") or ())
        if part.get("type") == "TemplateProcessing" and (names := [one["SpecialToken"]["id"] for one in before]):
            return "".join(names)
    return ""


def _texts(body: Mapping[str, Any], name: str) -> list[str]:
    value = body.get(name)
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) > 16 or not all(isinstance(text, str) for text in texts):
        raise Invalid(f"{name} must be a text, or up to 16 of them", name)
    return [text for text in texts if text]


def messages_of(body: Mapping[str, Any]) -> list[dict[str, str]]:
    """The messages, each with one text; Invalid where they are something else."""
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise Invalid("messages must be a list with at least one message", "messages")
    found = []
    for message in given:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Invalid("every message has a role and a content", "messages")
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
        if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts):
            raise Invalid("only text can be sent in a message", "messages")
        found.append({"role": message["role"], "content": "".join(part["text"] for part in parts)})
    return found


def prompt_of(body: Mapping[str, Any]) -> str:
    """The text to continue."""
    given = body.get("prompt")
    given = given[0] if isinstance(given, list) and len(given) == 1 else given
    if not isinstance(given, str) or not given:
        raise Invalid("prompt must be one text", "prompt")
    return given
