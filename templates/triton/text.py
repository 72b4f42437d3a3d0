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
        self.begin = self.end = 0
        """The part of the window's text that the last `push` has returned, and what was kept before it."""
        self.stopped = False
        self._decode = decode
        self._stops = [stop for stop in stops if stop]
        self._waiting = 0
        """Tokens since the text last ended with a whole character."""
        self._all_sent = False
        self.steady, self._kept = True, ""
        """Whether the kept part reads as it did before the last tokens came."""

    def push(self, tokens, last=False, kept=False):
        """The text that is certain now. `last`: nothing is held back. `kept`: the part begins where it began."""
        if last or len(tokens) == 1:
            return self._push(tokens, last, kept)
        text = ""
        for token in tokens:  # one by one: else what is certain cannot be told from what is not
            text += self._push([token], False, kept)
            if self.stopped:
                break
        return text

    def _push(self, tokens, last, kept):
        if not kept:
            self._shorten()
            self.begin = self.end
        known = self.end
        self.window += tokens
        text = self._decode(self.window)
        self.steady = not kept or text[self.begin : known] == self._kept
        ready = len(text) if last else self._whole(text)
        place = first(text[:ready], self._stops, known)
        if place >= 0:
            self.stopped = True
            self.end = place
        else:
            self.end = max(known, ready if last else ready - _held(text[known:ready], self._stops))
        self._all_sent = self.end == len(text)
        self._kept = text[self.begin : self.end]
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
                self.window, self.begin, self.end = tail, len(text), len(text)
                return


class Pieces:
    """What is sent of a growing answer: tokens, those before them for their decoding, begin and end of their text."""

    def __init__(self, streamer):
        self.streamer = streamer
        self.kept = False
        """There is text that has not left."""
        self._new = []

    def add(self, token, last=False):
        """One more token. The piece that must leave before it, where with it the kept text would read otherwise.

        Decoders that take a run of bytes for one text break all of it until its last character is whole.
        """
        begin, end = self.streamer.begin, self.streamer.end
        self.streamer.push([token], last, self.kept)
        piece = None
        if not self.streamer.steady:
            piece = self._made(self.streamer.window[:-1], begin, end)
            self.streamer.begin = end
        self._new.append(token)
        self.kept = self.streamer.begin < self.streamer.end
        return piece

    def take(self):
        """All that is kept."""
        self.kept = False
        return self._made(self.streamer.window, self.streamer.begin, self.streamer.end)

    def rest(self):
        """All there is, with what was held back."""
        self.streamer.push([], last=True, kept=self.kept)
        return self.take()

    def _made(self, window, begin, end):
        new, self._new = self._new, []
        return new, window[: max(0, len(window) - len(new))], begin, end


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
