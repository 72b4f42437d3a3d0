"""
Texts as numbers: their words, and n-grams of words, as 64-bit hashes that are the same in every process.

Case and punctuation do not count. Where a script has no blanks between words (Chinese, Japanese, Thai), each sign
is one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

_ALONE = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_ALONE}]|[^\W_{_ALONE}]+")
_FACTOR = 0x9E3779B97F4A7C15
_MOST = 1 << 16
"""Words remembered in a process."""


def words(text: str) -> list[str]:
    """The words of a text, in lower case.

    >>> words("Hello, WORLD! 東京 x_y")
    ['hello', 'world', '東', '京', 'x', 'y']
    """
    return _WORD.findall(text.lower())


class _Hashes(dict[str, int]):
    """word -> its hash, remembered."""

    def __missing__(self, word: str) -> int:
        if len(self) > _MOST:
            self.clear()
        value = int.from_bytes(hashlib.blake2b(word.encode(errors="replace"), digest_size=8).digest(), "little")
        self[word] = value
        return value


_HASHES = _Hashes()


def ngrams(texts: Sequence[Sequence[str]], n: int) -> tuple[Any, Any]:
    """(hashes of all n-grams of words, where each text's begin and the last end); a shorter text is one n-gram."""
    import numpy as np

    lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    total = int(lengths.sum())
    flat = np.fromiter(map(_HASHES.__getitem__, chain.from_iterable(texts)), dtype=np.uint64, count=total)
    counts = np.where(lengths == 0, 0, np.maximum(lengths - n + 1, 1))
    offsets = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    starts = np.cumsum(lengths) - lengths
    # place of each n-gram's first word in `flat`, and how many words it has
    at = np.repeat(starts - offsets[:-1], counts) + np.arange(offsets[-1])
    size = np.repeat(np.minimum(lengths, n), counts)
    grams = np.zeros(len(at), dtype=np.uint64)
    for k in range(n):
        inside = k < size
        word = flat[np.minimum(at + k, max(total - 1, 0))] if total else grams
        grams = np.where(inside, (grams ^ word) * np.uint64(_FACTOR) + np.uint64(k + 1), grams)
        grams ^= grams >> np.uint64(29)
    return grams, offsets


def repetition(text: Sequence[str], n: int = 4) -> float:
    """Share of the n-grams of words that were there before in the same text.

    >>> repetition("a b c d e f g h".split()), repetition("a b c d a b c d a b c d".split())
    (0.0, 0.5555555555555556)
    """
    count = len(text) - n + 1
    return 1 - len(set(zip(*(text[k:] for k in range(n)), strict=False))) / count if count > 0 else 0.0
