"""Tokens come in one by one; text leaves in whole characters, and never a stop word. Copied beside the models' code."""

_CUT = "\ufffd"
"""What a decoder puts where the bytes are no character, or not yet."""
_PENDING = 3
"""A character of four bytes lacks at most so many."""
_LONG, _CONTEXT = 24, 8


class Streamer:
    """The text of one answer while it grows."""

    def __init__(self, decode, stops=()):
        self.window = []
        """The last tokens: those that decide what the next ones look like."""
        self.end = 0
        """How much of the window's text has been returned."""
        self.stopped = False
        self._decode = decode
        self._stops = [stop for stop in stops if stop]
        self._waiting = 0
        """Tokens since the text last ended with a whole character."""
        self._all_sent = False

    def push(self, tokens, last=False):
        """The text that is certain now, and was not before. `last`: all of it, at once."""
        if last:
            return self._push(tokens, last)
        text = ""
        for token in tokens:  # one by one: else what is certain cannot be told from what is not
            text += self._push([token], last)
            if self.stopped:
                break
        return text

    def _push(self, tokens, last):
        self._shorten()
        known = self.end
        self.window += tokens
        text = self._decode(self.window)
        ready = len(text) if last else self._whole(text)
        place = first(text[:ready], self._stops, known)
        if place >= 0:
            self.stopped = True
            self.end = place
        else:
            self.end = max(known, ready if last else ready - _held(text[known:ready], self._stops))
        self._all_sent = self.end == len(text)
        return text[known : self.end]

    def _whole(self, text):
        """How much of it is certain: a character whose bytes have not all come may end it.

        Some decoders give up on all bytes before that one too, until it is whole. But what stays broken is no text:
        it must not hold back what comes after it.
        """
        broken = len(text) - len(text.rstrip(_CUT))
        self._waiting = self._waiting + 1 if broken else 0
        return len(text) - (broken if self._waiting <= _PENDING else min(broken, _PENDING))

    def _shorten(self):
        if len(self.window) <= _LONG or not self._all_sent:
            return
        for count in range(_CONTEXT, len(self.window)):
            tail = self.window[-count:]
            text = self._decode(tail)
            if text and text[0] != _CUT:  # it begins with a whole character
                self.window, self.end = tail, len(text)
                return


def first(text, stops, begin=0):
    """Where the first stop word begins, or -1."""
    return min((place for stop in stops if stop and (place := text.find(stop, begin)) >= 0), default=-1)


def _held(text, stops):
    """How many characters at its end may be the beginning of a stop word."""
    longest = max((len(stop) for stop in stops), default=1)
    for count in range(min(longest - 1, len(text)), 0, -1):
        if any(stop.startswith(text[-count:]) for stop in stops):
            return count
    return 0
