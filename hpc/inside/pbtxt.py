"""Reads protobuf's text format, as much of it as Triton's config.pbtxt uses: every field is a list of its values."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from hpc.core.errors import VerificationFailed

Message = dict[str, list[Any]]
_TOKEN = re.compile(
    r"""\s+|\#[^\n]*|(?P<word>[\w.+-]+)|(?P<text>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')|(?P<mark>[][{}:,;<>])"""
)


def parse(text: str) -> Message:
    """The message; VerificationFailed, with the line, where it is none.

    >>> parse('name: "a" input [{ dims: [1, -1] }]')
    {'name': ['a'], 'input': [{'dims': ['1', '-1']}]}
    """
    reader = _Reader(text)
    found = reader.message(end="")
    return found


def one(message: Message, name: str, default: Any = "") -> Any:
    """The last value of a field, which is what counts where it may only be there once."""
    values = message.get(name)
    return values[-1] if values else default


class _Reader:
    def __init__(self, text: str) -> None:
        self._tokens = [*_tokens(text), ("end", "", text.count("\n") + 1)]
        self._at = 0

    def message(self, end: str) -> Message:
        found: Message = {}
        while True:
            kind, word, line = self._next()
            if word == end and kind in {"mark", "end"}:
                return found
            if word in {",", ";"} and kind == "mark":
                continue
            if kind != "word":
                raise _wrong(line, f"a field's name is missing before {word or 'the end'!r}")
            found.setdefault(word, []).extend(self._values())

    def _values(self) -> list[Any]:
        kind, word, line = self._next()
        if (kind, word) == ("mark", ":"):
            kind, word, line = self._next()
        if kind == "mark" and word in "{<":
            return [self.message("}" if word == "{" else ">")]
        if (kind, word) == ("mark", "["):
            return self._list()
        if kind == "word":
            return [word]
        if kind == "text":
            text = _unquoted(word)
            while self._tokens[self._at][0] == "text":  # neighbours are one text
                text += _unquoted(self._next()[1])
            return [text]
        raise _wrong(line, f"a value is missing before {word or 'the end'!r}")

    def _list(self) -> list[Any]:
        found: list[Any] = []
        while self._tokens[self._at][:2] != ("mark", "]"):
            if self._tokens[self._at][:2] == ("mark", ","):
                self._at += 1
            else:
                found += self._values()
        self._at += 1
        return found

    def _next(self) -> tuple[str, str, int]:
        token = self._tokens[self._at]
        self._at = min(self._at + 1, len(self._tokens) - 1)
        return token


def _tokens(text: str) -> Iterator[tuple[str, str, int]]:
    place, line = 0, 1
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise _wrong(line, f"{text[place]!r} is not expected here")
        if match.lastgroup:
            yield match.lastgroup, match[0], line
        line += match[0].count("\n")
        place = match.end()


def _unquoted(word: str) -> str:
    return re.sub(r"\\(.)", r"\1", word[1:-1])


def _wrong(line: int, why: str) -> VerificationFailed:
    return VerificationFailed(f"the configuration is not readable at line {line}: {why}")
