"""OpenAI's requests become Triton's, and what cannot be done is refused by its field's name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpc.inside import translating
from hpc.inside.translating import Invalid, Served

SERVED = Served(name="m", target="ensemble", max_tokens=99)


def words(**body: Any) -> dict[str, Any]:
    found = translating.words_for(body, "text", SERVED, special=False)
    assert len(found.pop("id")) > 8
    return found


def test_defaults_are_openais() -> None:
    found = words()
    assert 0 <= found.pop("random_seed") < 1 << 63
    assert found == {
        "text_input": "text", "max_tokens": 99, "stream": True, "add_special_tokens": False,
        "temperature": 1.0, "top_p": 1.0, "top_k": 0,
    }  # fmt: skip


def test_what_a_request_does_not_name_is_as_the_model_asks() -> None:
    llama = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 4096, "eos_token_id": 2}
    qwen = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
    assert translating.recommended(llama) == {"temperature": 0.6, "top_p": 0.9}
    assert translating.recommended(qwen) == qwen
    assert translating.recommended(qwen, wraps=True) == {"temperature": 0.7, "top_p": 0.8, "top_k": 20}
    odd = {"temperature": 3, "top_p": True, "top_k": 1.5, "repetition_penalty": None}
    assert translating.recommended(odd) == {}

    def drawn(**body: Any) -> dict[str, Any]:
        found = translating.words_for(body, "text", replace(SERVED, sampling=qwen), special=False)
        return {name: found[name] for name in qwen if name in found}

    assert drawn() == drawn(temperature=None, top_k=None) == qwen
    assert drawn(temperature=1.5, top_k=0) == {**qwen, "temperature": 1.5, "top_k": 0}
    assert drawn(temperature=0) == {"top_k": 1, "repetition_penalty": 1.05}


def test_temperature_zero_is_greedy() -> None:
    assert words(temperature=0, top_p=0.5)["top_k"] == 1
    assert "temperature" not in words(temperature=0)


def test_who_names_no_seed_gets_another_one_each_time() -> None:
    assert len({words()["random_seed"] for _ in range(3)}) == 3
    assert words(seed=(1 << 63) - 1)["random_seed"] == (1 << 63) - 1
    assert "random_seed" not in words(temperature=0)


def test_half_of_a_character_is_refused() -> None:
    for prompt, more in (("\ud83d", {}), ("x", {"stop": ["\ud83d"]}), ("x", {"bad_words": "a\ude00"})):
        with pytest.raises(Invalid, match=r"half of a \\u surrogate pair"):
            translating.words_for(more, prompt, SERVED, special=None)
    assert words(stop="🙂")["stop_words"] == ["🙂"]


def test_fields_find_their_place() -> None:
    found = words(max_completion_tokens=5, max_tokens=6, stop="x", seed=7, temperature=0.5, top_p=0.9, min_tokens=2)
    assert (found["max_tokens"], found["stop_words"], found["random_seed"]) == (5, ["x"], 7)
    assert (found["temperature"], found["top_p"], found["min_tokens"]) == (0.5, 0.9, 2)
    assert words(stop=["a", ""])["stop_words"] == ["a"]
    assert words(n=1, presence_penalty=0, frequency_penalty=0.0, logprobs=False, top_logprobs=0, tools=[])
    assert words(logprobs=None, logit_bias={})
    assert words(bad_words=["x"], repetition_penalty=1.2)["bad_words"] == ["x"]
    assert words(top_p=0)["top_k"] == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2), ("n", False), ("logprobs", 0), ("min_p", 0.1), ("ignore_eos", True),
        ("guided_json", {"type": "string"}),
        ("repetition_penalty", 0), ("min_tokens", "1"), ("bad_words", [1]), ("max_completion_tokens", 0),
        ("presence_penalty", 0.5), ("tools", [{"type": "function"}]), ("logprobs", True), ("echo", True),
        ("temperature", -1), ("temperature", "hot"), ("temperature", True), ("top_p", 2), ("max_tokens", 0),
        ("max_tokens", "5"), ("max_tokens", 1 << 80), ("max_tokens", (1 << 32) + 5), ("seed", -1), ("seed", 1 << 63),
        ("top_k", 1 << 31), ("min_tokens", 1 << 31), ("stop", 5), ("stop", ["x"] * 17),
        ("response_format", {"type": "json_object"}), ("response_format", "json"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(field: str, value: object) -> None:
    with pytest.raises(Invalid) as refused:
        words(**{field: value})
    assert refused.value.param == ("max_tokens" if field == "max_completion_tokens" else field)


def test_what_the_models_own_loader_cannot_do_is_refused() -> None:
    served = replace(SERVED, wraps=True)
    for name, value in (("min_tokens", 2), ("repetition_penalty", 1.1), ("bad_words", ["x"])):
        with pytest.raises(Invalid, match="not supported by this engine"):
            translating.words_for({name: value}, "text", served, special=None)
    assert "min_tokens" not in translating.words_for({"min_tokens": 0}, "text", served, special=None)
    same = translating.words_for({"repetition_penalty": 1.0, "top_k": -1}, "text", served, special=None)
    assert ("repetition_penalty" in same, same["top_k"]) == (False, 0)


def template(*single: dict[str, Any]) -> dict[str, Any]:
    return {"type": "TemplateProcessing", "single": [*single, {"Sequence": {"id": "A", "type_id": 0}}]}


BOS = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
LLAMA_3 = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template(BOS)]}


@pytest.mark.parametrize(
    ("processor", "settings", "begins"),
    [
        (LLAMA_3, {}, "<bos>"), (template(BOS), {"add_bos_token": True}, "<bos>"), (template(), {}, ""),
        (template(BOS), {"add_bos_token": False}, ""), ({"type": "ByteLevel"}, {}, ""), (None, None, ""),
    ],
)  # fmt: skip
def test_a_prompt_of_a_template_begins_once(tmp_path: Path, processor: Any, settings: Any, begins: str) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"post_processor": processor}))
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    served = replace(SERVED, wraps=True, begins=translating.beginning(tmp_path))
    assert served.begins == begins

    def sent(prompt: str, special: bool | None) -> str:
        words = translating.words_for({}, prompt, served, special=special)
        assert words["exclude_input"], "or an answer that does not stream begins with the prompt"
        return str(words["text_input"])

    assert sent("<bos>Hi", False) == ("Hi" if begins else "<bos>Hi")
    assert sent("Hi", False) == "Hi"
    assert sent("<bos>Hi", None) == "<bos>Hi", "a text of the client's own is as it is"


def test_nvidias_own_models_are_asked_by_their_own_names() -> None:
    names = {"random_seed": "seed", "min_tokens": "min_length"}
    served = replace(SERVED, cumulative=True, vendors=True, begins="<s>", names=names)
    found = translating.words_for({"seed": 3, "min_tokens": 2, "bad_words": ["x"]}, "<s>Hi", served, special=False)
    assert (found["seed"], found["min_length"], found["bad_words"], found["text_input"]) == (3, 2, ["x"], "Hi")
    assert {"random_seed", "min_tokens", "add_special_tokens", "exclude_input"}.isdisjoint(found)


def test_an_adapter_is_asked_for_as_a_model() -> None:
    served = replace(SERVED, adapters={"stars": {"lora_id": 1, "lora_name": "stars", "lora_path": "/l/stars"}})
    found = translating.words_for({"model": "stars"}, "text", served, special=None)
    assert (found["lora_id"], found["lora_name"], found["lora_path"]) == (1, "stars", "/l/stars")
    for model in ("m", None):
        assert "lora_name" not in translating.words_for({"model": model}, "text", served, special=None)


def test_messages() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert translating.messages_of({"messages": [{"role": "user", "content": parts}]}) == [
        {"role": "user", "content": "ab"}
    ]
    for wrong in (None, [], ["x"], [{"content": "x"}], [{"role": "user", "content": [{"type": "image_url"}]}],
                  [{"role": "user", "content": 5}]):  # fmt: skip
        with pytest.raises(Invalid):
            translating.messages_of({"messages": wrong})
    assert translating.prompt_of({"prompt": ["x"]}) == "x"
    for prompt in (None, "", ["a", "b"], [1, 2]):
        with pytest.raises(Invalid):
            translating.prompt_of({"prompt": prompt})
