"""Streamed text is whole: no broken character, no stop word, nothing lost, whatever the tokens are."""

from __future__ import annotations

import importlib.util
import random
from types import ModuleType

import pytest

from hpc.core.assets import TEMPLATES

TEXT = "안녕하세요 🙂 naïve 👩‍👩‍👧 끝."


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("streamed_text", TEMPLATES / "triton" / "text.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


text = _load()


def by_bytes(tokens: list[int]) -> str:
    """A decoder whose tokens are bytes, as GPT-like tokenizers fall back to."""
    return bytes(tokens).decode("utf-8", "replace")


def by_fallback(tokens: list[int]) -> str:
    """A decoder that gives up on a whole run of bytes where one is wrong, as Llama-like ones do."""
    found, run = "", b""
    for token in [*tokens, -1]:
        if 128 <= token < 256:
            run += bytes([token])
            continue
        try:
            found += run.decode()
        except UnicodeDecodeError:
            found += "\ufffd" * len(run)
        run = b""
        found += chr(token) if token >= 0 else ""
    return found


@pytest.mark.parametrize("decode", [by_bytes, by_fallback])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_characters_are_whole_and_none_is_lost(decode: object, size: int) -> None:
    tokens = list((TEXT * 5).encode())
    streamer = text.Streamer(decode)
    pieces = [streamer.push(tokens[i : i + size]) for i in range(0, len(tokens), size)]
    pieces.append(streamer.push([], last=True))
    assert "".join(pieces) == TEXT * 5
    assert "\ufffd" not in "".join(pieces)
    assert len([piece for piece in pieces if piece]) > 5


def test_a_piece_is_told_by_its_place_in_the_window() -> None:
    streamer = text.Streamer(by_bytes)
    for token in (TEXT * 9).encode():
        piece = streamer.push([token])
        assert by_bytes(streamer.window)[streamer.begin : streamer.end] == piece
        assert len(streamer.window) < 50


def test_what_is_kept_is_a_part_of_the_next_piece() -> None:
    numbers, streamer, said, kept = random.Random(1), text.Streamer(by_bytes), "", ""
    for token in (TEXT * 9).encode():
        kept += streamer.push([token], kept=bool(kept))
        piece = by_bytes(streamer.window)[streamer.begin : streamer.end]
        assert piece == kept
        if numbers.random() < 0.2:
            said, kept = said + piece, ""
    assert len(streamer.window) < 90
    assert said + kept == TEXT * 9


@pytest.mark.parametrize(
    ("stops", "kept"),
    [
        (["하세"], "안녕"),
        (["🙂"], "안녕하세요 "),
        (["zz", " naï", "🙂 n"], "안녕하세요 "),
        (["끝.!"], TEXT),
        (["안"], ""),
        ([""], TEXT),
    ],
)
def test_stop_words_never_show(stops: list[str], kept: str) -> None:
    streamer, said = text.Streamer(by_bytes, stops), ""
    for token in TEXT.encode():
        said += streamer.push([token])
        assert kept.startswith(said)
        if streamer.stopped:
            break
    else:
        said += streamer.push([], last=True)
    assert said == kept
    assert streamer.stopped is (kept != TEXT)


def test_bytes_that_are_no_text_come_out_too() -> None:
    """A model that babbles must not fall silent for ever."""
    numbers = random.Random(1)
    for _ in range(200):
        tokens = [numbers.randrange(256) for _ in range(numbers.randrange(1, 60))]
        streamer = text.Streamer(by_bytes)
        pieces = [streamer.push([token]) for token in tokens]
        pieces.append(streamer.push([], last=True))
        assert len("".join(pieces)) >= len(by_bytes(tokens).replace("\ufffd", ""))
        assert "".join(pieces).replace("\ufffd", "") == by_bytes(tokens).replace("\ufffd", "")


def test_first_of_several_stop_words() -> None:
    assert text.first("abcd", ["d", "bc", ""]) == 1
    assert text.first("abcd", ["x"]) == -1
