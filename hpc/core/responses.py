"""PURE: what differs between Triton's models: the names of some inputs, and texts that grow with each response."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_OTHER_NAMES = {"random_seed": "seed", "min_tokens": "min_length"}
"""Our name of an input -> the other one that NVIDIA's tensorrt_llm_bls has had: 0.20 renamed both."""


def names(inputs: Iterable[str]) -> dict[str, str]:
    """Ours -> the name that a model with these inputs knows, where it knows the other one alone.

    >>> names(["text_input", "random_seed", "min_length"])
    {'min_tokens': 'min_length'}
    """
    known = set(inputs)
    return {ours: theirs for ours, theirs in _OTHER_NAMES.items() if ours not in known and theirs in known}


def accumulates(accumulate_tokens: str | None) -> bool:
    """Whether each response of tensorrt_llm_bls holds all of the text so far, by the parameter of this name."""
    return (accumulate_tokens or "").lower() in {"true", "yes", "1", "t"}


class Growing:
    r"""Texts that hold all so far -> what is new and certain in each.

    Kept back: the sign for half a character, and what may begin a stop word, which an answer ends before.

    >>> text = Growing(["END"]); [text.take(t) for t in ("H\ufffd", "Hé", "Hé E", "Hé Er", "Hé ErEND")], text.rest()
    (['H', 'é', ' ', 'Er', ''], '')
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = [stop for stop in stops if stop]
        self._text = ""
        self._sent = 0
        self.stopped = False

    def take(self, text: str) -> str:
        """What can be said now."""
        if self.stopped:
            return ""
        self._text = text
        ends = [place for place in map(text.find, self._stops) if place >= 0]
        if ends:
            self.stopped, self._text = True, text[: min(ends)]
            return self.rest()
        certain = text.rstrip("\ufffd")
        kept = max((_overlap(certain, stop) for stop in self._stops), default=0)
        return self._until(len(certain) - kept)

    def rest(self) -> str:
        """What was kept back, when no more comes."""
        return self._until(len(self._text))

    def _until(self, end: int) -> str:
        new = self._text[self._sent : end]
        self._sent = max(self._sent, end)
        return new


def _overlap(text: str, stop: str) -> int:
    """So many characters at the end of the text are the first ones of the stop word."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
