"""PURE: a model's text, cut anywhere -> what it says and what it thinks (between <think> and </think>)."""

from __future__ import annotations

from dataclasses import dataclass

_OPEN, _CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class Part:
    """A piece of one of the two."""

    text: str
    thought: bool = False
    begun_before: bool = False
    """Here a thought ends that no tag has begun: all before it was thought, too."""


class Thoughts:
    """Takes the text piece by piece; a tag that is cut is waited for."""

    def __init__(self) -> None:
        self._rest = ""
        self._inside = False
        self._blank = True
        """Nothing was said since the beginning, or since a thought: blanks are left out there."""

    def feed(self, text: str) -> list[Part]:
        """What is certain with this piece.

        >>> thoughts = Thoughts()
        >>> thoughts.feed("a <th"), thoughts.feed("ink>b</thi"), thoughts.feed("nk> c")
        ([Part(text='a ', thought=False, begun_before=False)], [Part(text='b', thought=True, begun_before=False)], \
[Part(text='c', thought=False, begun_before=False)])
        """
        self._rest += text
        found: list[Part] = []
        while True:
            tags = (_CLOSE,) if self._inside else (_OPEN, _CLOSE)
            places = {place: tag for tag in tags if (place := self._rest.find(tag)) >= 0}
            if not places:
                break
            place = min(places)
            self._add(found, self._rest[:place])
            self._rest = self._rest[place + len(places[place]) :]
            if places[place] == _CLOSE and not self._inside:
                found.append(Part("", begun_before=True))
            self._inside = places[place] == _OPEN
            self._blank = True
        sure = len(self._rest) - max(_begun(self._rest, tag) for tag in tags)
        self._add(found, self._rest[:sure])
        self._rest = self._rest[sure:]
        return found

    def end(self) -> list[Part]:
        """What was held back, since a tag could have begun there."""
        found: list[Part] = []
        self._add(found, self._rest)
        self._rest = ""
        return found

    def _add(self, found: list[Part], text: str) -> None:
        text = text.lstrip() if self._blank else text
        if text:
            self._blank = False
            found.append(Part(text, self._inside))


def _begun(text: str, tag: str) -> int:
    """So many of the tag's first letters are at the text's end."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)


def split(text: str) -> tuple[str, str]:
    """What a whole answer says, and what it thinks.

    >>> split("<think>so</think> yes"), split("so</think> yes"), split("yes")
    (('yes', 'so'), ('yes', 'so'), ('yes', ''))
    """
    thoughts = Thoughts()
    said = thought = ""
    for part in (*thoughts.feed(text), *thoughts.end()):
        if part.begun_before:
            said, thought = "", thought + said
        elif part.thought:
            thought += part.text
        else:
            said += part.text
    return said.strip(), thought.strip()
