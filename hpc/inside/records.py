"""
Records of training data -> chat messages. Standard library only, but for the reading of Parquet and Arrow.

    guanaco    {"text": "### Human: … ### Assistant: …"}
    alpaca     {"instruction": …, "input": …, "output": …}, also with context and response, or prompt and completion
    messages   {"messages": [{"role": …, "content": …}]}
    sharegpt   {"conversations": [{"from": …, "value": …}]}
    dialogue   {"dialogue": …, "summary": …}, or TweetSumm's {"log": […], "original dialog info": …}

What can't be read at all is a UsageError with file and line; what can be read but not learnt from is a Row without
messages that says why, so that nothing is lost in silence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hpc.core.errors import UsageError
from hpc.inside import sources

Format = Literal["auto", "guanaco", "alpaca", "messages", "sharegpt", "dialogue"]
Message = dict[str, str]
Turn = tuple[str, str]

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "chatgpt", "model"), "assistant"),
    "system": "system",
}
"""What a record calls a speaker -> its role."""
_SPEAKER = re.compile(r"###\s*(Human|Assistant):")
"""Only the two speakers' names divide a text: a heading such as `### Steps` belongs to the answer."""
_PAIRS = (("instruction", "input", "output"), ("instruction", "context", "response"), ("prompt", "input", "completion"))
"""Names of question, its material, and answer."""
_SUMMARISE = "Write a summary of the conversation below."
_BEFORE = re.compile(r"(?:\s*\n)?(?: (?=\S)| {2,3}(?=\S)(?!.*\n(?:[ \t]*\n)*[ \t]+\S))?")
"""What does not belong to a text that follows: blank lines, and blanks that are no indent."""
_NOISE = re.compile(r"https?://\S+|@\w+|\^\S+")
"""Of support chats on Twitter: links, names of accounts, and the agents' initials."""


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
    number: int = 0
    """Its line, or row."""


def read(path: Path, form: Format = "auto", limit: int | None = None) -> Iterator[Row]:
    """
    The records of one file, in order. `limit`: look at about the first so many bytes only, whole records.

    UsageError, with file and line, for what is not JSON, not UTF-8 or not of a known form.
    """
    for piece in sources.pieces(path, limit):
        form = form_of(piece) if form == "auto" else form
        yield from rows(piece, form)


def rows(piece: sources.Piece, form: Format = "auto") -> Iterator[Row]:
    """The records of one piece of a file."""
    for number, value in sources.values(piece):
        where = f"{piece.name} {piece.unit} {number}"
        form = detect(_object(value, where), where) if form == "auto" else form
        yield _row(where, number, _TURNS[form](_object(value, where), where))


def form_of(piece: sources.Piece) -> Format:
    """The form of the piece's first record; auto where it has none."""
    for number, value in sources.values(piece):
        where = f"{piece.name} {piece.unit} {number}"
        return detect(_object(value, where), where)
    return "auto"


def detect(value: dict[str, Any], where: str) -> Format:
    """The form of a record by its keys; UsageError where it is none of the known ones."""
    if "messages" in value:
        return "messages"
    if "conversations" in value:
        return "sharegpt"
    if _pair(value):
        return "alpaca"
    if ("dialogue" in value and "summary" in value) or ("log" in value and "original dialog info" in value):
        return "dialogue"
    if isinstance(value.get("text"), str) and _SPEAKER.search(value["text"]):
        return "guanaco"
    raise UsageError(
        f"{where}: unknown form of record, with the keys {', '.join(sorted(value)) or '(none)'}",
        hint="expected text with '### Human: … ### Assistant: …', or instruction and output, or messages,"
        " or dialogue and summary",
    )


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{where}: not a JSON object", hint="each record must be one {…}")
    return value


def _row(where: str, number: int, turns: list[Turn]) -> Row:
    """Chat messages of the turns; whatever can't be trained on is named, not repaired by guessing."""
    system = turns[:1] if turns and ROLES.get(turns[0][0]) == "system" else []
    turns = turns[len(system) :]
    if not any(text for _, text in turns):
        return Row(where, (), "empty", number=number)
    for role, _ in turns:
        if ROLES.get(role) not in ("user", "assistant"):
            return Row(where, (), f"role not known: {role[:20]}", number=number)
    answered = len(turns)
    while answered and (ROLES[turns[answered - 1][0]] == "user" or not turns[answered - 1][1]):
        answered -= 1
    if not answered:
        return Row(where, (), "no answer", number=number)
    kept, unanswered = turns[:answered], len(turns) - answered
    if any(ROLES[role] != ("user", "assistant")[i % 2] for i, (role, _) in enumerate(kept)):
        return Row(where, (), "turns out of order", number=number)
    if not all(text for _, text in kept):
        return Row(where, (), "empty turn", number=number)
    system = [turn for turn in system if turn[1]]
    messages = tuple({"role": ROLES[role], "content": text} for role, text in (*system, *kept))
    return Row(where, messages, unanswered=unanswered, number=number)


def _guanaco(value: dict[str, Any], where: str) -> list[Turn]:
    text = _text(value, "text", where)
    before, *parts = _SPEAKER.split(text)
    if before.strip() or not parts:
        raise UsageError(f"{where}: the text does not begin with '### Human:'", hint="mend or delete the record")
    return [(role.lower(), bare(said)) for role, said in zip(parts[::2], parts[1::2], strict=True)]


def _pair(value: dict[str, Any]) -> tuple[str, str, str] | None:
    return next((names for names in _PAIRS if names[0] in value and names[2] in value), None)


def _alpaca(value: dict[str, Any], where: str) -> list[Turn]:
    question, material, answer = _pair(value) or _PAIRS[0]
    asked = [_text(value, question, where), _text(value, material, where, missing="")]
    turns = [
        *history(value, where),
        ("user", "\n\n".join(part for part in asked if part)),
        ("assistant", _text(value, answer, where)),
    ]
    system = _text(value, "system", where, missing="")
    return [("system", system), *turns] if system else turns


def history(value: dict[str, Any], where: str) -> list[Turn]:
    """The turns before the question, which some data sets keep beside it as [question, answer]."""
    pairs = value.get("history") or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise UsageError(f"{where}: the history is not a list of [question, answer]", hint="mend the record")
    said = [bare(as_text(part, f"{where}: 'history'")) for pair in pairs for part in pair]
    return [(("user", "assistant")[i % 2], part) for i, part in enumerate(said)]


def _messages(value: dict[str, Any], where: str) -> list[Turn]:
    sharegpt = "messages" not in value
    key, role, content = ("conversations", "from", "value") if sharegpt else ("messages", "role", "content")
    said = value.get(key)
    if not isinstance(said, list) or not all(isinstance(turn, dict) for turn in said):
        raise UsageError(f"{where}: the {key} are not a list of objects", hint="mend the record")
    turns = [
        (_text(turn, role, where).strip(), _with_reasoning(turn, _said(turn, content, where), where)) for turn in said
    ]
    system = _text(value, "system", where, missing="")
    return [("system", system), *turns] if system and (not turns or turns[0][0] != "system") else turns


def _said(turn: dict[str, Any], content: str, where: str) -> str:
    """What a turn says; a call of a tool says nothing, and null stands for that."""
    return _text(turn, content, where, missing="" if turn.get("tool_calls") else None)


def _with_reasoning(turn: dict[str, Any], answer: str, where: str) -> str:
    """The answer, after the reasoning that some data sets keep beside it."""
    reasoning = _text(turn, "reasoning_content", where, missing="") or _text(turn, "thinking", where, missing="")
    return f"<think>\n{reasoning}\n</think>\n\n{answer}" if reasoning and answer else answer


def _dialogue(value: dict[str, Any], where: str) -> list[Turn]:
    if "log" in value:
        said, summary = _tweets(value, where)
    else:
        said, summary = _text(value, "dialogue", where), _text(value, "summary", where)
    return [("user", f"{_SUMMARISE}\n\n{said}" if said else ""), ("assistant", summary)]


def _tweets(value: dict[str, Any], where: str) -> tuple[str, str]:
    """(conversation, summary) of TweetSumm as DialogStudio has it: the first of the summaries people wrote."""
    try:
        info = value["original dialog info"]
        info = json.loads(info) if isinstance(info, str) else info
        summary = " ".join(info["summaries"]["abstractive_summaries"][0])
        turns = [(turn["user utterance"], turn["system response"]) for turn in value["log"]]
        lines = [
            f"{who}: {clean}" for turn in turns for who, clean in zip(("user", "agent"), map(_clean, turn), strict=True)
        ]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UsageError(
            f"{where}: a log without turns, or without a summary people wrote", hint="mend or delete the record"
        ) from error
    return as_text("\n".join(lines), f"{where}: 'log'"), as_text(summary.strip(), f"{where}: the summary")


def _clean(text: str) -> str:
    return " ".join(_NOISE.sub(" ", text).split())


_TURNS = {
    "guanaco": _guanaco,
    "alpaca": _alpaca,
    "messages": _messages,
    "sharegpt": _messages,
    "dialogue": _dialogue,
}


def _text(value: dict[str, Any], key: str, where: str, missing: str | None = None) -> str:
    said = value.get(key)
    return missing if said is None and missing is not None else bare(as_text(said, f"{where}: '{key}'"))


def as_text(value: Any, what: str) -> str:
    """A text, or the parts of one joined; UsageError, with its name, for what is none."""
    if isinstance(value, list) and value and all(isinstance(p, dict) and p.get("type") == "text" for p in value):
        value = next((p for p in value if not isinstance(p.get("text", ""), str)), None) or "".join(
            part.get("text", "") for part in value
        )
    if not isinstance(value, str):
        raise UsageError(f"{what} must be a text, not {json.dumps(value, default=str)[:40]}", hint="mend the record")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{what} holds half of a \\u surrogate pair", hint="mend the record") from error
    return value


def bare(said: str) -> str:
    r"""A text without the blanks around it; an indent belongs to it: four blanks, or two where the next line has some.

    >>> bare("\n  Yes. \n"), bare("\n    x = 1\n"), bare("  if x:\n    y")
    ('Yes.', '    x = 1', '  if x:\n    y')
    """
    before = _BEFORE.match(said)
    return said[before.end() if before else 0 :].rstrip()
