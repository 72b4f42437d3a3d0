"""Streamed text is whole: no broken character, no stop word, nothing lost, whatever the tokens are."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
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


def test_the_window_stays_short() -> None:
    streamer = text.Streamer(by_bytes)
    for token in (TEXT * 9).encode():
        streamer.push([token])
        assert len(streamer.window) < 50


def skipping(decode: Callable[[list[int]], str]) -> Callable[[list[int]], str]:
    """A decoder for which tokens from 1000 on are special: they have no text."""
    return lambda tokens: decode([token for token in tokens if token < 1000])


@pytest.mark.parametrize("decode", [by_bytes, by_fallback, skipping(by_fallback)])
@pytest.mark.parametrize("stop", ["", "naï", "👧 끝"])
def test_pieces_of_several_tokens_are_the_whole_text(decode: Callable[[list[int]], str], stop: str) -> None:
    """Whenever they are taken, and wherever it ends: what was certain once is never lost, nor broken."""
    numbers = random.Random(1)
    for _ in range(300):
        tokens = []
        for character in (TEXT * 3)[: numbers.randrange(1, 60)]:
            special = decode not in (by_bytes, by_fallback) and numbers.random() < 0.1
            tokens += [*character.encode(), *([1000] * numbers.choice([1, 12]) if special else [])]
        tokens = tokens[: len(tokens) - numbers.randrange(3)]
        streamer, shown, place = text.Streamer(decode, [stop]), "", 0
        while place < len(tokens) and not streamer.stopped:
            many = numbers.choice([1, 2, 5, 30])
            shown += streamer.push(tokens[place : place + many])
            place += many
            assert len(streamer.window) < 150
        shown += "" if streamer.stopped else streamer.push([], last=True)
        whole = bytes(token for token in tokens if token < 1000).decode(errors="ignore").partition(stop or "-")[0]
        assert shown.rstrip("\ufffd") == whole


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
