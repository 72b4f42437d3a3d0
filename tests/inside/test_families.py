"""Chat templates: byte for byte the published formats, and what a template loses is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpc.inside import families
from hpc.inside.chat import Template
from hpc.inside.families import Family

pytestmark = pytest.mark.train

PAIR = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
SYSTEM = [{"role": "system", "content": "S"}, *PAIR]
TWO = [*PAIR, {"role": "user", "content": "Q2"}, {"role": "assistant", "content": "A2"}]
THOUGHT = [PAIR[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nA"}]


def written(family: Family, messages: list[dict[str, str]], *, prompt: bool = False) -> str:
    return families.template(family, None).render(messages, prompt=prompt)


# Sources: Meta's llama repository, generation.py, chat_completion (llama-2); Meta's "Llama 3 model cards and prompt
# formats" (llama-3); OpenAI's chatml.md and Qwen's documentation (chatml); Mistral's "Demystifying Mistral's instruct
# tokenization & chat templates", tokenizer V3 (mistral); Google's "Gemma formatting and system instructions", and the
# chat template of Gemma 3 for the blank line (gemma); DeepSeek-R1's tokenizer_config.json and README (deepseek-r1).
GOLDEN: list[tuple[Family, list[dict[str, str]], str]] = [
    ("llama-2", PAIR, "<s>[INST] Q [/INST] A </s>"),
    ("llama-2", SYSTEM, "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST] A </s>"),
    ("llama-2", TWO, "<s>[INST] Q [/INST] A </s><s>[INST] Q2 [/INST] A2 </s>"),
    (
        "llama-3",
        SYSTEM,
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>",
    ),
    (
        "chatml",
        SYSTEM,
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n",
    ),
    ("mistral", TWO, "<s>[INST] Q[/INST] A</s>[INST] Q2[/INST] A2</s>"),
    ("mistral", [SYSTEM[0], *TWO], "<s>[INST] Q[/INST] A</s>[INST] S\n\nQ2[/INST] A2</s>"),
    (
        "gemma",
        TWO,
        "<bos><start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n"
        "<start_of_turn>user\nQ2<end_of_turn>\n<start_of_turn>model\nA2<end_of_turn>\n",
    ),
    ("gemma", SYSTEM, "<bos><start_of_turn>user\nS\n\nQ<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n"),
    ("deepseek-r1", PAIR, "<｜begin▁of▁sentence｜><｜User｜>Q<｜Assistant｜>A<｜end▁of▁sentence｜>"),
    (
        "deepseek-r1",
        THOUGHT,
        "<｜begin▁of▁sentence｜><｜User｜>Q<｜Assistant｜><think>\nhm\n</think>\n\nA<｜end▁of▁sentence｜>",
    ),
    ("deepseek-r1", SYSTEM, "<｜begin▁of▁sentence｜><｜User｜>S\n\nQ<｜Assistant｜>A<｜end▁of▁sentence｜>"),
]
PROMPTS: list[tuple[Family, str]] = [
    ("llama-2", "<s>[INST] Q [/INST]"),
    ("llama-3", "user<|end_header_id|>\n\nQ<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
    ("chatml", "<|im_end|>\n<|im_start|>assistant\n"),
    ("mistral", "<s>[INST] Q[/INST]"),
    ("gemma", "Q<end_of_turn>\n<start_of_turn>model\n"),
    ("deepseek-r1", "<｜User｜>Q<｜Assistant｜><think>\n"),
]


@pytest.mark.parametrize(("family", "messages", "text"), GOLDEN)
def test_each_family_writes_its_published_format(family: Family, messages: list[dict[str, str]], text: str) -> None:
    assert written(family, messages) == text


@pytest.mark.parametrize(("family", "end"), PROMPTS)
def test_each_family_asks_for_an_answer_as_published(family: Family, end: str) -> None:
    prompt = written(family, PAIR[:1], prompt=True)
    assert prompt.endswith(end)
    shared = written(family, PAIR)
    assert shared.startswith(prompt.removesuffix("<think>\n")), "a row begins as the prompt does"


@pytest.mark.parametrize("family", families.TOKENS)
def test_each_begins_a_conversation_once(family: Any) -> None:
    begin = families.TOKENS[family][0]
    if begin:
        assert written(family, SYSTEM).count(begin) == 1
        assert written(family, TWO).count(begin) == (2 if family == "llama-2" else 1), "Meta begins each pair anew"


def test_where_there_is_a_tokenizer_its_own_tokens_are_written_alone(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<begin>", "eos_token": "</s>"}')
    assert families.template("mistral", tmp_path).render(PAIR, prompt=False) == "<begin>[INST] Q[/INST] A</s>"
    assert families.unbegun("mistral", tmp_path) == ""
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null, "eos_token": "<|im_end|>"}')  # Qwen's
    assert families.template("llama-2", tmp_path).render(PAIR, prompt=False) == "[INST] Q [/INST] A <|im_end|>"
    assert families.unbegun("llama-2", tmp_path) == "<s>"
    assert families.unbegun("chatml", tmp_path) == ""


@pytest.mark.parametrize("family", families.TOKENS)
def test_a_template_is_written_too_where_no_token_is_known(family: Any) -> None:
    """As transformers gives it to Jinja: what a tokenizer lacks is not even named."""
    written = Template(None, text=families.text(family))
    del written._tokens["bos_token"]
    assert "Q" in written.render(PAIR, prompt=False)


DISTILLED = (  # what DeepSeek's own template does to answers: all up to </think> goes
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1] }}"
    "{% elif m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
)


def test_what_a_template_loses_is_named() -> None:
    own = Template(None, text=DISTILLED)
    both = [SYSTEM[0], *THOUGHT]
    assert families.lost(both, own.render(both, prompt=False)) == ("system", "reasoning")
    for family in families.TOKENS:
        assert families.lost(both, written(family, both)) == (), f"{family} loses nothing"  # type: ignore[arg-type]


def test_reasoning_is_kept_stripped_or_required() -> None:
    assert families.think(THOUGHT, "keep") == THOUGHT
    assert families.think(THOUGHT, "strip") == PAIR
    assert families.think(THOUGHT, "require") == THOUGHT
    assert families.think(PAIR, "require") == "no reasoning"
    empty = [PAIR[0], {"role": "assistant", "content": "<think>\n\n</think>\n\nA"}]
    assert families.think(empty, "require") == "no reasoning", "none is in it"


def test_reasoning_that_a_template_opened_or_that_has_no_end() -> None:
    opened = [PAIR[0], {"role": "assistant", "content": "\nhm\n</think>\n\nA"}]
    assert families.think(opened, "keep") == opened
    assert families.think(opened, "strip") == PAIR
    assert families.think(opened, "require") == THOUGHT, "with its tag, as the model began"
    assert families.lost(opened, "A") == ("reasoning",)
    code = {"role": "assistant", "content": "<think>hm</think>\n\n    x = 1\n    return x"}
    assert families.think([PAIR[0], code], "strip")[1]["content"] == "    x = 1\n    return x"  # type: ignore[index]
    for text, reason in (("<think>hm</think>", "empty turn"), ("<think>hm", "reasoning without an end")):
        assert families.think([PAIR[0], {"role": "assistant", "content": text}], "strip") == reason


def test_a_system_message_is_kept_folded_or_dropped() -> None:
    assert families.system(SYSTEM, "keep") == SYSTEM
    assert families.system(SYSTEM, "drop") == PAIR
    assert families.system(SYSTEM, "fold") == [{"role": "user", "content": "S\n\nQ"}, PAIR[1]]
    assert families.system(PAIR, "fold") == PAIR


def test_a_template_that_marks_generations_is_read() -> None:
    marked = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    assert Template(None, text=marked).render(PAIR) == "QA"
