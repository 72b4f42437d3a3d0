"""What a person types at a terminal: a line with editing and history, or several that were pasted at once."""

from __future__ import annotations

import select
from typing import IO

_PASTED_S = 0.03
"""What comes so soon after a line was pasted with it: nobody types as fast."""


class Lines:
    """Lines of the terminal at stdin."""

    def __init__(self, stdin: IO[str]) -> None:
        self._stdin = stdin
        self._brackets = _edits()

    def read(self, prompt: str) -> str | None:
        """One message; several lines where they were pasted, or where each but the last ends with a backslash.

        None: there is no more. KeyboardInterrupt: what was typed is thrown away.
        """
        lines: list[str] = []
        while True:
            try:
                line = input(prompt if not lines else "" if self._more() else "… ")
            except EOFError:
                return "\n".join(lines) if lines else None
            goes_on = line.endswith("\\")
            lines.append(line.removesuffix("\\"))
            if not goes_on and not (not self._brackets and self._more()):
                return "\n".join(lines)

    def _more(self) -> bool:
        return bool(select.select([self._stdin], [], [], _PASTED_S)[0])


def _edits() -> bool:
    """Load the line editor; True where it marks what is pasted (GNU's, 8.1 or later)."""
    try:
        import readline
    except ImportError:
        return False
    if "libedit" in (readline.__doc__ or ""):
        return False
    readline.parse_and_bind("set enable-bracketed-paste on")
    return int(getattr(readline, "_READLINE_VERSION", 0)) >= 0x801
