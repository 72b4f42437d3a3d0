"""Preference pairs: one prompt, an answer that was preferred and one that was not, in the forms that data comes in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.core.errors import UsageError
from hpc.inside import sources
from hpc.inside.records import ROLES, Message, as_text, bare, history


@dataclass(frozen=True)
class Pair:
    """One preference."""

    where: str
    """File and line."""
    prompt: tuple[Message, ...]
    """The conversation up to the answer; it ends with the user's turn."""
    chosen: str
    rejected: str
    dropped: str = ""
    """Why nothing can be learnt from it."""


def read(path: Path, limit: int | None = None) -> Iterator[Pair]:
    """The pairs of one file, in order; `limit`: of its first so many bytes. UsageError, with the line, for a fault."""
    for piece in sources.pieces(path, limit):
        for number, value in sources.values(piece):
            yield pair(value, f"{piece.name} {piece.unit} {number}")


def pair(value: Any, where: str) -> Pair:
    """
    A record as a pair; UsageError, with its place, for what is none.

    Known are: prompt, chosen and rejected, each a text or messages, where both answers may repeat the prompt (the form
    of UltraFeedback and of TRL); conversations with chosen and rejected, as {from, value} (ShareGPT); and
    instruction, input, chosen, rejected (Alpaca).
    """
    if not isinstance(value, dict) or not {"chosen", "rejected"} <= value.keys():
        raise UsageError(f"{where}: no preference in it", hint="each record has prompt, chosen and rejected")
    asked = _asked(value, where)
    answers = []
    for name in ("chosen", "rejected"):
        turns = _turns(value[name], "assistant", f"{where}: '{name}'")
        *before, last = turns or [{"role": "assistant", "content": ""}]
        if last["role"] != "assistant":
            raise UsageError(f"{where}: '{name}' does not end with the assistant's turn", hint="mend the record")
        if before and asked and before != asked:
            raise UsageError(f"{where}: '{name}' answers another conversation than the prompt", hint="mend the record")
        asked = asked or before
        answers.append(last["content"])
    chosen, rejected = answers
    reason = ""
    if not asked or asked[-1]["role"] != "user" or not asked[-1]["content"]:
        reason = "no question"
    elif not chosen or not rejected:
        reason = "empty answer"
    elif chosen == rejected:
        reason = "equal answers"
    return Pair(where, tuple(asked), chosen, rejected, reason)


def _asked(value: dict[str, Any], where: str) -> list[Message]:
    """What comes before the answers; empty where they repeat it themselves."""
    for name in ("prompt", "conversations", "messages"):
        if name in value:
            asked = _turns(value[name], "user", f"{where}: '{name}'")
            break
    else:
        parts = (bare(as_text(value.get(name) or "", f"{where}: '{name}'")) for name in ("instruction", "input"))
        text = "\n\n".join(part for part in parts if part)
        asked = [{"role": "user", "content": text}] if text else []
    begun = bool(asked) and asked[0]["role"] == "system"
    system = "" if begun else bare(as_text(value.get("system") or "", f"{where}: 'system'"))
    first = asked[:1] if begun else [{"role": "system", "content": system}] if system else []
    earlier = [{"role": role, "content": said} for role, said in history(value, where)]
    return [*first, *earlier, *asked[begun:]] if asked else []


def _turns(value: Any, role: str, where: str) -> list[Message]:
    """Messages of a text (of that role), of one message, or of a list of them."""
    if isinstance(value, str):
        said = bare(as_text(value, where))
        return [{"role": role, "content": said}] if said else []
    found = []
    for turn in value if isinstance(value, list) else [value]:
        words = turn if isinstance(turn, dict) else {}
        known, text = ROLES.get(str(words.get("role", words.get("from")))), words.get("content", words.get("value"))
        if known is None or text is None:
            said = json.dumps(turn, default=str)[:40]
            raise UsageError(f"{where}: {said} is no message", hint="expected {role, content}")
        found.append({"role": known, "content": bare(as_text(text, where))})
    return found
