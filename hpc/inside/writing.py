"""Rows that were chosen -> lines of the data set, with their tokens counted, and what the template loses."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from hpc.core.errors import UsageError
from hpc.inside import families, judging
from hpc.inside.chat import Template
from hpc.inside.table import texts


@dataclass(frozen=True)
class Form:
    """How rows are written."""

    system: str | None
    """For conversations without a system message."""
    system_turns: families.SystemTurns
    family: families.Family
    tokenizer: str | None
    """A model's folder."""

    @property
    def renders(self) -> bool:
        """Whether there is a template to look through."""
        return self.tokenizer is not None or self.family != "own"


@dataclass
class Written:
    """The lines of some rows."""

    text: bytes
    rows: int
    tokens: list[int] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)
    """What the template does not write -> in how many rows."""


def write(task: tuple[Path, Any, Any, Any, Form]) -> Written:
    """The lines of the rows at these offsets. UsageError where the template refuses one."""
    path, _, offsets, lengths, form = task
    found = texts(path, offsets, lengths)
    if form.system is None and form.system_turns == "keep" and not form.renders:
        return Written(b"".join(found), len(found))
    rows = [families.system(_with_system(json.loads(line)["messages"], form), form.system_turns) for line in found]
    made = Written(b"".join(map(judging.line, rows)), len(rows))
    if form.renders:
        template = _template(form)
        rendered = [_render(template, row) for row in rows]
        for row, text in zip(rows, rendered, strict=True):
            made.lost.update(families.lost(row, text))
        if form.tokenizer is not None:
            made.tokens = _counter(form.tokenizer)(rendered)
    return made


def _with_system(messages: list[dict[str, str]], form: Form) -> list[dict[str, str]]:
    if form.system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": form.system}, *messages]


def _render(template: Template, messages: Sequence[dict[str, str]]) -> str:
    try:
        return template.render(messages, prompt=False)
    except ValueError as error:
        with_system = messages[0]["role"] == "system"
        raise UsageError(
            f"{error} (a conversation that begins {messages[0]['content'][:40]!r})",
            hint='a model without a system role: set prepare.system_turns = "fold"'
            if with_system
            else "see prepare.template",
        ) from error


@cache
def _template(form: Form) -> Template:
    return families.template(form.family, Path(form.tokenizer) if form.tokenizer is not None else None)


@cache
def _counter(folder: str) -> Callable[[list[str]], list[int]]:
    """texts -> their tokens. The special tokens are in the texts: none is added, as in training."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes share the cores already
    path = Path(folder) / "tokenizer.json"
    if path.is_file():
        from tokenizers import Tokenizer

        known = Tokenizer.from_file(str(path))
        known.no_truncation()
        known.no_padding()
        return lambda texts: [len(found) for found in known.encode_batch_fast(texts, add_special_tokens=False)]
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder)
    return lambda texts: [len(ids) for ids in loaded(texts, add_special_tokens=False)["input_ids"]]


class Lengths:
    """How many rows have how many tokens, in memory of bounded size."""

    def __init__(self) -> None:
        self._found: Counter[int] = Counter()

    def add(self, tokens: Sequence[int]) -> None:
        self._found.update(tokens)

    def figures(self, limit: int | None) -> dict[str, Any]:
        """Median, 90th percentile, longest, sum; and with a limit, what lies beyond it."""
        rows = sum(self._found.values())
        total = sum(length * count for length, count in self._found.items())
        figures: dict[str, Any] = {
            "median": self._at(rows // 2),
            "p90": self._at(rows * 9 // 10),
            "longest": max(self._found),
            "total": total,
        }
        if limit is not None:
            over = {length: count for length, count in self._found.items() if length > limit}
            cut = sum((length - limit) * count for length, count in over.items())
            figures["limit"] = limit
            figures["truncated_rows"] = sum(over.values())
            figures["truncated_share"] = round(sum(over.values()) / rows, 4)
            figures["lost_token_share"] = round(cut / total, 4)
        return figures

    def _at(self, place: int) -> int:
        for length, count in sorted(self._found.items()):
            place -= count
            if place < 0:
                return length
        raise IndexError(place)


_WAYS = {
    "system": 'set prepare.system_turns = "fold", which puts it before the first question',
    "reasoning": 'set prepare.template to a family that keeps it (deepseek-r1, chatml), or prepare.thinking = "strip"',
}


class Losses:
    """What the template does not write of how many rows, in words."""

    def __init__(self) -> None:
        self._found: Counter[str] = Counter()

    def add(self, lost: Counter[str]) -> None:
        self._found.update(lost)

    def figures(self, family: families.Family) -> dict[str, Any]:
        """Rows by what they lose, and what can be done."""
        found: dict[str, Any] = dict(sorted(self._found.items()))
        return {**found, "so": self.sentences(family)} if found else {}

    def sentences(self, family: families.Family) -> list[str]:
        whose = "the model's own chat template" if family == "own" else f"the template {family}"
        words = {"system": "the system message", "reasoning": "the reasoning"}
        return [
            f"{whose} loses {words[what]} of {count} rows: {_WAYS[what]}" for what, count in sorted(self._found.items())
        ]
