"""PURE: the bytes of an answer, cut anywhere -> its server-sent events, whole. A character is never cut with them."""

from __future__ import annotations


class Events:
    """A stream of server-sent events: only what their `data` says."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> list[str]:
        r"""The events that are whole with this chunk.

        >>> events = Events()
        >>> events.feed(b"data: \xed"), events.feed(b"\x95\x9c\r\n"), events.feed(b"\r\n: a comment\n\ndata:b\n\n")
        ([], [], ['한', 'b'])
        """
        if not self._rest and not self._data and chunk.startswith(b"data: ") and chunk.find(b"\n") == len(chunk) - 2:
            return [chunk[6:-2].decode("utf-8", "replace")]  # one event and no more, as most come
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        found = []
        for line in lines:
            text = line.removesuffix(b"\r")
            if text.startswith(b"data:"):
                self._data.append(text[5:].removeprefix(b" "))
            elif not text and self._data:
                found.append(self._whole())
        return found

    def end(self) -> list[str]:
        """What was left without its blank line when the stream ended."""
        found = self.feed(b"\n\n") if self._rest else []
        return [*found, *([self._whole()] if self._data else [])]

    def _whole(self) -> str:
        text = b"\n".join(self._data).decode("utf-8", "replace")
        self._data = []
        return text
