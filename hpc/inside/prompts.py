"""Prompts to be answered: one a line, or the questions of records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hpc.core.errors import UsageError
from hpc.inside.records import as_text


@dataclass(frozen=True)
class Prompt:
    """One prompt: where it stands, and the conversation that it is."""

    where: str
    messages: tuple[dict[str, str], ...]

    @property
    def text(self) -> str:
        return self.messages[-1]["content"]

    @property
    def talk(self) -> tuple[tuple[str, str], ...]:
        """All that is said, to be told from other prompts by."""
        return tuple((message["role"], message["content"]) for message in self.messages)


def read(path: Path) -> Iterator[Prompt]:
    """The prompts of a file, in order; UsageError, with the line, for one that cannot be."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path.name} line {number}"
                    yield (
                        Prompt(where, ({"role": "user", "content": line.strip()},))
                        if path.suffix.lower() == ".txt"
                        else (_record(line, where))
                    )
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}", hint="it must be a UTF-8 text file") from error


def _record(line: str, where: str) -> Prompt:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{where}: not valid JSON", hint="a line is one object; plain text goes into .txt") from error
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        messages = [m if isinstance(m, dict) else {} for m in value["messages"]]
        while messages and messages[-1].get("role") != "user":  # what was answered there is not what is asked for
            messages.pop()
        if messages and all(m.get("role") in ("system", "user", "assistant") for m in messages):
            said = (as_text(m.get("content"), f"{where}: 'content'") for m in messages)
            return Prompt(where, tuple({"role": m["role"], "content": s} for m, s in zip(messages, said, strict=True)))
    elif isinstance(value, dict):
        parts = [value.get("prompt", value.get("instruction")), value.get("input")]
        texts = [as_text(part, where) for part in parts if part]
        text = "\n\n".join(part for part in texts if part.strip())
        if text:
            return Prompt(where, ({"role": "user", "content": text},))
    raise UsageError(f"{where}: no prompt in it", hint="expected prompt, or instruction (and input), or messages")
