"""An answer on a screen or in a pipe, as it comes: thoughts are left out, and so are control codes on a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import IO

from hpc.login.question import Piece, plain
from hpc.login.thoughts import Part, Thoughts, split


@dataclass
class Answer:
    """All that has come so far."""

    text: str = ""
    """As it came, with its thoughts."""
    reason: str = ""
    tokens: int | None = None
    prompt: int | None = None
    first_s: float | None = None
    """Seconds until the first text."""
    seconds: float = 0.0

    @property
    def said(self) -> str:
        return split(self.text)[0]

    @property
    def thought(self) -> str:
        return split(self.text)[1]

    def take(self, piece: Piece, seconds: float) -> None:
        if piece.text and self.first_s is None:
            self.first_s = seconds
        self.text += piece.text
        self.reason = piece.reason or self.reason
        self.tokens = self.tokens if piece.tokens is None else piece.tokens
        self.prompt = self.prompt if piece.prompt is None else piece.prompt
        self.seconds = seconds


class Screen:
    """Where an answer is shown; `notes` gets what is no part of it."""

    def __init__(self, out: IO[str] | None, notes: IO[str], *, thoughts: bool = False, whole: bool = False) -> None:
        self._out, self._notes, self._show_thoughts, self._whole = out, notes, thoughts, whole
        self._terminal = out is not None and out.isatty()
        self._thinking = False
        self._said = ""

    def show(self, pieces: Iterable[Piece], into: Answer) -> None:
        """Until they end; `into` has what came, also where an error ends it."""
        thoughts, begin = Thoughts(), time.monotonic()
        try:
            for piece in pieces:
                into.take(piece, time.monotonic() - begin)
                if not self._whole:
                    self._parts([Part(piece.text)] if self._show_thoughts else thoughts.feed(piece.text))
            if self._whole:
                self._parts([Part(into.text if self._show_thoughts else into.said)])
            self._parts(thoughts.end())
        finally:
            self._think(False)
            if self._said and not self._said.endswith("\n"):
                self._write("\n")

    def _parts(self, parts: Iterable[Part]) -> None:
        for part in parts:
            self._think(part.thought)
            if part.begun_before:
                self._write("\n" if self._said.strip() else "")
                print("(what stands above was a thought)", file=self._notes)
            elif not part.thought:
                self._write(part.text)

    def _think(self, thinking: bool) -> None:
        """A word while it thinks, which goes when it speaks; on a terminal alone."""
        if thinking != self._thinking and self._terminal and self._notes.isatty():
            self._notes.write("thinking…" if thinking else "\r\033[K")
            self._notes.flush()
        self._thinking = thinking

    def _write(self, text: str) -> None:
        if self._out is None or not text:
            return
        self._said = text
        self._out.write(plain(text) if self._terminal else text)
        self._out.flush()
