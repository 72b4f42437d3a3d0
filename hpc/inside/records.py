"""
Records of training data: JSON files of three known forms -> chat messages. Standard library only.

    guanaco    {"text": "### Human: … ### Assistant: …"}
    alpaca     {"instruction": …, "input": …, "output": …}
    messages   {"messages": [{"role": …, "content": …}]}
               or ShareGPT's {"conversations": [{"from": …, "value": …}]}

A file is JSON Lines, or one JSON array. What can't be read at all is a UsageError with file and line; what
can be read but not learnt from is a Row without messages that says why, so that nothing is lost in silence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hpc.core.errors import UsageError

Format = Literal["auto", "guanaco", "alpaca", "messages"]
Message = dict[str, str]
Turn = tuple[str, str]

_CHUNK = 1 << 20
_BOM = b"\xef\xbb\xbf"
_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "chatgpt", "model"), "assistant"),
    "system": "system",
}
_SPEAKER = re.compile(r"###\s*(Human|Assistant):")
"""Only the two speakers' names divide a text: a heading such as `### Steps` belongs to the answer."""


@dataclass(frozen=True)
class Row:
    """One record of a file."""

    where: str
    """File and line, for messages to the user."""
    messages: tuple[Message, ...]
    """The conversation, ending with an answer; empty where nothing can be learnt from the record."""
    dropped: str = ""
    """Why `messages` is empty."""
    unanswered: int = 0
    """Turns at the end that were cut off because no answer follows."""


def read(path: Path, form: Format = "auto", limit: int | None = None) -> Iterator[Row]:
    """
    The records of one file, in order. `limit`: look at the first so many bytes only, whole records.

    UsageError, with file and line, for what is not JSON, not UTF-8 or not of a known form.
    """
    known: Format = form
    for where, value in _values(path, limit):
        if not isinstance(value, dict):
            raise UsageError(f"{where}: not a JSON object", hint="each record must be one {…}")
        if known == "auto":
            known = detect(value, where)
        yield _row(where, _TURNS[known](value, where))


def detect(value: dict[str, Any], where: str) -> Format:
    """The form of a record by its keys; UsageError where it is none of the known ones."""
    if "messages" in value or "conversations" in value:
        return "messages"
    if "instruction" in value and "output" in value:
        return "alpaca"
    if isinstance(value.get("text"), str) and _SPEAKER.search(value["text"]):
        return "guanaco"
    raise UsageError(
        f"{where}: unknown form of record, with the keys {', '.join(sorted(value)) or '(none)'}",
        hint="expected text with '### Human: … ### Assistant: …', or instruction and output, or messages",
    )


def _row(where: str, turns: list[Turn]) -> Row:
    """Chat messages of the turns; whatever can't be trained on is named, not repaired by guessing."""
    system = turns[:1] if turns and _ROLES.get(turns[0][0]) == "system" else []
    turns = turns[len(system) :]
    if not any(text for _, text in turns):
        return Row(where, (), "empty")
    for role, _ in turns:
        if _ROLES.get(role) not in ("user", "assistant"):
            return Row(where, (), f"role not known: {role[:20]}")
    answered = len(turns)
    while answered and (_ROLES[turns[answered - 1][0]] == "user" or not turns[answered - 1][1]):
        answered -= 1
    if not answered:
        return Row(where, (), "no answer")
    kept, unanswered = turns[:answered], len(turns) - answered
    if any(_ROLES[role] != ("user", "assistant")[i % 2] for i, (role, _) in enumerate(kept)):
        return Row(where, (), "turns out of order")
    if not all(text for _, text in kept):
        return Row(where, (), "empty turn")
    system = [turn for turn in system if turn[1]]
    messages = tuple({"role": _ROLES[role], "content": text} for role, text in (*system, *kept))
    return Row(where, messages, unanswered=unanswered)


def _guanaco(value: dict[str, Any], where: str) -> list[Turn]:
    text = _text(value, "text", where)
    before, *parts = _SPEAKER.split(text)
    if before.strip() or not parts:
        raise UsageError(f"{where}: the text does not begin with '### Human:'", hint="mend or delete the record")
    return [(role.lower(), said.strip()) for role, said in zip(parts[::2], parts[1::2], strict=True)]


def _alpaca(value: dict[str, Any], where: str) -> list[Turn]:
    asked = [_text(value, "instruction", where), _text(value, "input", where, missing="")]
    turns = [
        ("user", "\n\n".join(part for part in asked if part)),
        ("assistant", _text(value, "output", where)),
    ]
    system = _text(value, "system", where, missing="")
    return [("system", system), *turns] if system else turns


def _messages(value: dict[str, Any], where: str) -> list[Turn]:
    sharegpt = "messages" not in value
    turns = value.get("conversations" if sharegpt else "messages")
    role, content = ("from", "value") if sharegpt else ("role", "content")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UsageError(f"{where}: the messages are not a list of objects", hint=f"expected [{{{role}, {content}}}]")
    return [(_text(turn, role, where), _text(turn, content, where)) for turn in turns]


_TURNS = {"guanaco": _guanaco, "alpaca": _alpaca, "messages": _messages}


def _text(value: dict[str, Any], key: str, where: str, missing: str | None = None) -> str:
    text = value.get(key)
    if text is None and missing is not None:
        return missing
    if not isinstance(text, str):
        raise UsageError(f"{where}: '{key}' must be a text, not {json.dumps(text)[:40]}", hint="mend the record")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{where}: '{key}' holds half of a \\u surrogate pair", hint="mend the record") from error
    return text.strip()


def _values(path: Path, limit: int | None) -> Iterator[tuple[str, Any]]:
    """(file and line, JSON value) of each record."""
    try:
        with open(path, "rb") as file:
            head = file.read(_CHUNK).removeprefix(_BOM).lstrip()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", hint="check the path and its rights") from error
    return _array(path, limit) if head.startswith(b"[") else _lines(path, limit)


def _lines(path: Path, limit: int | None) -> Iterator[tuple[str, Any]]:
    read_bytes = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            read_bytes += len(line)
            if limit is not None and read_bytes > limit:
                return
            where = f"{path.name} line {number}"
            text = _utf8(line.removeprefix(_BOM) if number == 1 else line, where).strip()
            if not text:
                continue
            try:
                yield where, json.loads(text)
            except ValueError as error:
                raise UsageError(
                    f"{where}: not valid JSON",
                    hint="each line must be one whole JSON object; mend or delete it",
                ) from error


def _array(path: Path, limit: int | None) -> Iterator[tuple[str, Any]]:
    """The items of one JSON array, decoded one by one so that an error has a line."""
    with open(path, "rb") as file:
        data = file.read() if limit is None else file.read(limit)
        whole = not file.read(1)
    text = _utf8(data.removeprefix(_BOM), path.name) if whole else data.removeprefix(_BOM).decode("utf-8", "ignore")
    decoder, line, seen = json.JSONDecoder(), 1, 0
    at = _skip(text, text.index("[") + 1, "")
    while text[at : at + 1] != "]":
        line, seen = line + text.count("\n", seen, at), at
        where = f"{path.name} line {line}"
        try:
            value, end = decoder.raw_decode(text, at)
            after = _skip(text, end, "")
            if text[after : after + 1] not in ("", ",", "]"):
                raise ValueError
        except ValueError as error:
            if not whole:  # cut off by the limit
                return
            raise UsageError(f"{where}: not valid JSON", hint="mend the array near this line") from error
        yield where, value
        at = _skip(text, end, ",")
    if whole and text[at + 1 :].strip():
        raise UsageError(f"{path.name}: text follows the JSON array", hint="a file is one array, or one object a line")


def _skip(text: str, at: int, also: str) -> int:
    """The next place that is neither blank nor one of `also`."""
    while at < len(text) and (text[at].isspace() or text[at] in also):
        at += 1
    return at


def _utf8(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: not UTF-8 text", hint="convert it, e.g. iconv -f latin1 -t utf8") from error
