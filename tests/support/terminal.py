"""A command on a terminal of its own, typed at and read like a person would."""

from __future__ import annotations

import codecs
import os
import pty
import select
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONTROLLING = "import os,sys,fcntl,termios; fcntl.ioctl(0,termios.TIOCSCTTY,0); os.execvp(sys.argv[1],sys.argv[1:])"
"""Run by the command's own session: the terminal becomes its own, so that Ctrl-C reaches it."""


class Terminal:
    """`start` gets stdin, stdout and stderr as keywords of Popen, in a session of its own."""

    def __init__(self, start: Callable[..., subprocess.Popen[Any]]) -> None:
        self._own, other = pty.openpty()
        self.process = start(stdin=other, stdout=other, stderr=other)
        os.close(other)
        self.text = ""
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode  # a read may end inside a character

    def until(self, word: str, timeout: float = 60) -> str:
        """All that was shown until the word came; it is not looked at again."""
        deadline = time.monotonic() + timeout
        while word not in self.text:
            try:
                self._read()
            except OSError:
                raise AssertionError(f"ended without {word!r}: {self.text}") from None
            assert time.monotonic() < deadline, f"never {word!r}: {self.text}"
        shown, _, self.text = self.text.partition(word)
        return shown

    def wait(self, timeout: float = 60) -> None:
        """Until it sleeps: after a prompt that was shown, until it reads what is typed."""
        deadline = time.monotonic() + timeout
        while Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(") ")[2][0] != "S":
            assert time.monotonic() < deadline, f"never at rest: {self.text}"
            time.sleep(0.01)

    def type(self, text: str) -> None:
        os.write(self._own, text.encode())

    def end(self, timeout: float = 60) -> int:
        """The exit code, once it has ended."""
        deadline = time.monotonic() + timeout
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.text
            try:
                self._read()
            except OSError:
                time.sleep(0.1)
        try:  # its last words may have come while nobody looked
            while self._read(0):
                pass
        except OSError:
            pass
        code: int = self.process.returncode
        return code

    def hang_up(self) -> None:
        os.close(self._own)

    def _read(self, wait_s: float = 0.2) -> bool:
        """True where something had come."""
        if not select.select([self._own], [], [], wait_s)[0]:
            return False
        self.text += self._decode(os.read(self._own, 4096))
        return True
