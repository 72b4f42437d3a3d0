"""One piece of a file -> its rows, each judged by itself: form, reasoning, length, repetition, language."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hpc.core.errors import HpcError
from hpc.inside import duplicates, families, languages, records, words
from hpc.inside.languages import Detector
from hpc.inside.records import Format, Message
from hpc.inside.sources import Piece

SAMPLE = 100
"""So many rows are asked of both language detectors; each piece offers its share of candidates."""
_OFFERED = 50


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a row must be like."""

    seed: int = 0
    languages: tuple[str, ...] = ()
    detector: Detector = "fast"
    min_chars: int = 0
    max_chars: int | None = None
    repetition: float | None = None
    thinking: families.Thinking = "keep"
    near: float | None = None
    """Similarity of near duplicates, which then need signatures."""


@dataclass
class Judged:
    """The records of one piece, in order; those that are kept have a text."""

    numbers: list[int] = field(default_factory=list)
    """Line or row of each record."""
    reasons: list[str] = field(default_factory=list)
    """Why it is dropped, or "" for one that is kept."""
    languages: list[str] = field(default_factory=list)
    """What was detected, or "" where nothing was."""
    unanswered: list[int] = field(default_factory=list)
    """Turns that were cut off."""
    lines: list[bytes] = field(default_factory=list)
    """JSON of the kept ones,"""
    ranks: list[int] = field(default_factory=list)
    """their places in the seeded order,"""
    digests: list[int] = field(default_factory=list)
    """hashes"""
    signatures: Any = None
    """and signatures."""
    sample: list[tuple[int, str, str]] = field(default_factory=list)
    """(rank, text, language) of some."""
    error: HpcError | None = None
    """What ended the reading, behind the records above."""


def judge(task: tuple[Piece, Format, Rules] | HpcError) -> Judged:
    """All records of the piece. What can't be read comes as `error`: it may lie behind what is wanted."""
    if isinstance(task, HpcError):
        return Judged(error=task)
    piece, form, rules = task
    made = Judged()
    kept: list[str] = []
    try:
        for row in records.rows(piece, form):
            _one(row, rules, made, kept)
    except HpcError as error:
        made.error = error
    if rules.near is not None:
        made.signatures = duplicates.signatures([words.words(text) for text in kept], rules.near)
    made.sample = sorted(made.sample)[:_OFFERED]
    return made


def _one(row: records.Row, rules: Rules, made: Judged, kept: list[str]) -> None:
    messages: Sequence[Message] | None = row.messages
    reason, language, text = row.dropped, "", ""
    if messages:
        found = families.think(messages, rules.thinking)
        reason, messages = (found, None) if isinstance(found, str) else ("", found)
    if messages:
        text = languages.said(messages)
        reason = _form(text, rules)
    if messages and not reason and rules.languages:
        language = languages.detector(rules.detector, rules.seed)(text)
        reason = "" if language in rules.languages else f"language {language}" if language else "no text to detect"
    made.numbers.append(row.number)
    made.reasons.append(reason)
    made.languages.append(language)
    made.unanswered.append(row.unanswered if row.messages else 0)
    if not messages:
        return
    plain = json.dumps(messages)
    rank = int.from_bytes(hashlib.sha256(f"{rules.seed} {plain}".encode()).digest()[:8], "big")
    if language:
        made.sample.append((rank, text[:600], language))
    if not reason:
        kept.append(text)
        made.lines.append(line(messages))
        made.ranks.append(rank)
        made.digests.append(int.from_bytes(hashlib.sha256(plain.encode()).digest()[:8], "big"))


def _form(text: str, rules: Rules) -> str:
    """Why the text is dropped for its form, or ""."""
    if len(text) < rules.min_chars:
        return "too short"
    if rules.max_chars is not None and len(text) > rules.max_chars:
        return "too long"
    if rules.repetition is not None and words.repetition(words.words(text)) > rules.repetition:
        return "repetitive"
    return ""


def line(messages: Sequence[Message]) -> bytes:
    """A conversation as a line of a data set."""
    return (json.dumps({"messages": messages}, ensure_ascii=False) + "\n").encode()
