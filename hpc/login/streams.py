"""Standard streams that lead nowhere: nobody reads them any more, or they were closed."""

from __future__ import annotations

import os
import sys
from typing import IO


def to_nowhere(stream: IO[str]) -> None:
    """What is still to be written to it is lost, and no error at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def open_closed() -> None:
    """A stream that was closed (`2>&-`) leads nowhere; else the next file that is opened would take its number."""
    for name, mode in {"stdin": "r", "stdout": "w", "stderr": "w"}.items():
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8", closefd=False))
