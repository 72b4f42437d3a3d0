"""
Chat templates of the known model families, and what a template does to a conversation.

The templates lie in templates/chat, as Jinja: llama-2, llama-3, chatml (Qwen's), mistral (its third tokenizer),
gemma and deepseek-r1. They write the published formats byte for byte, with one difference where a family's own
template would lose something of a training row: deepseek-r1 keeps the reasoning of answers, and puts a system
message into the first question, as gemma does, because the model was trained without that role.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from hpc.core.assets import TEMPLATES
from hpc.core.errors import UsageError
from hpc.inside.chat import Template
from hpc.inside.records import Message, bare

Family = Literal["own", "llama-2", "llama-3", "chatml", "mistral", "gemma", "deepseek-r1"]
"""own: the tokenizer's."""
Thinking = Literal["keep", "strip", "require"]
SystemTurns = Literal["keep", "fold", "drop"]

TOKENS = {
    "llama-2": ("<s>", "</s>"),
    "llama-3": ("<|begin_of_text|>", "<|eot_id|>"),
    "chatml": ("", "<|im_end|>"),
    "mistral": ("<s>", "</s>"),
    "gemma": ("<bos>", "<end_of_turn>"),
    "deepseek-r1": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
}
"""Begin and end of a text where no tokenizer says otherwise."""

_THOUGHT = re.compile(r"<think>(.*?)</think>(?:\s*\n| )?", re.DOTALL)


def text(family: str) -> str:
    """The family's chat template, Jinja."""
    return (TEMPLATES / "chat" / f"{family}.jinja").read_text(encoding="utf-8").rstrip("\n")


def template(family: Family, tokenizer: Path | None) -> Template:
    """The template that rows will be written with; UsageError where it is the tokenizer's own and there is none."""
    if family != "own":
        begin, end = TOKENS[family] if tokenizer is None else ("", "")  # training has the tokenizer's alone
        return Template(tokenizer, text=text(family), tokens={"bos_token": begin, "eos_token": end})
    found = Template(tokenizer)
    if not found:
        raise UsageError(
            "this model's tokenizer has no chat template",
            hint=f"take the chat variant of the model, or set prepare.template to one of {', '.join(TOKENS)}",
        )
    return found


def unbegun(family: Family, tokenizer: Path) -> str:
    """The token that the family's texts begin with, where this tokenizer names none; else ""."""
    return TOKENS[family][0] if family != "own" and not Template(tokenizer).begin else ""


def think(messages: Sequence[Message], policy: Thinking) -> list[Message] | str:
    """The conversation with the reasoning of its answers kept or stripped; or why it is dropped."""
    if policy == "keep":
        return list(messages)
    made = []
    for message in messages:
        if message["role"] != "assistant":
            made.append(message)
            continue
        said = unthought(message["content"]) if policy == "strip" else opened(message["content"])
        if not said:
            return "reasoning without an end" if said is None else "empty turn"
        made.append({**message, "content": said})
    return made if policy == "strip" or _thoughts(made[-1:]) else "no reasoning"


def unthought(answer: str) -> str | None:
    """The answer without its reasoning; None where the reasoning has no end.

    >>> unthought("<think>so</think> yes"), unthought("so</think> yes"), unthought("<think>so"), unthought("yes")
    ('yes', 'yes', None, 'yes')
    """
    said = bare(_THOUGHT.sub("", opened(answer)))
    return None if "<think>" in said else said


def system(messages: Sequence[Message], policy: SystemTurns) -> list[Message]:
    """The conversation with its system message kept, put before the first question, or dropped."""
    if policy == "keep" or messages[0]["role"] != "system":
        return list(messages)
    first, *rest = messages
    if policy == "fold":
        rest[0] = {**rest[0], "content": f"{first['content']}\n\n{rest[0]['content']}"}
    return rest


def lost(messages: Sequence[Message], written: str) -> tuple[str, ...]:
    """What of the conversation is not in the text that the template made of it: a system message, the reasoning."""
    found = []
    if messages[0]["role"] == "system" and messages[0]["content"].strip() not in written:
        found.append("system")
    if any(thought not in written for thought in _thoughts(messages)):
        found.append("reasoning")
    return tuple(found)


def opened(answer: str) -> str:
    """The answer with the tag that its reasoning begins with, where a template wrote that and the model did not."""
    before, end, _ = answer.partition("</think>")
    if not end or "<think>" in before:
        return answer
    return f"<think>{answer}" if answer.startswith("\n") else f"<think>\n{answer}"


def _thoughts(messages: Sequence[Message]) -> list[str]:
    said = (opened(m["content"]) for m in messages if m["role"] == "assistant" and "</think>" in m["content"])
    return [thought.strip() for answer in said for thought in _THOUGHT.findall(answer) if thought.strip()]
