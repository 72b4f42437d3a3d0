"""Run commands in a real terminal and draw what it shows as an SVG: the pictures in the documentation.

python tools/picture.py OUT.svg TITLE 'hpc submit pipeline --wait' 'hpc status'
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

COLUMNS, ROWS = int(os.environ.get("COLUMNS", "110")), 40


def main(out: str, title: str, *commands: str) -> int:
    from rich.console import Console
    from rich.text import Text

    # 16 colours: a wide palette would be the recording machine's, not the reader's
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), color_system="standard")  # noqa: SIM115
    for command in commands:
        console.print(Text.from_markup("[bold green]$[/] ") + Text(re.sub(r"^sleep \d+; ", "", command), style="bold"))
        for line in last_frame(session(command)).splitlines():
            console.print(Text.from_ansi(line), soft_wrap=True)
        console.print()
    Path(out).write_text(console.export_svg(title=title))
    return 0


def session(command: str) -> str:
    """What the command writes to a terminal of COLUMNS x ROWS."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS)}
    process = subprocess.Popen(command, shell=True, stdin=follower, stdout=follower, stderr=follower, env=env)
    os.close(follower)
    shown = b""
    while True:
        try:
            data = os.read(leader, 1 << 16)
        except OSError:  # the terminal is gone with its last process
            break
        if not data:
            break
        shown += data
    process.wait()
    return shown.decode("utf-8", "replace").replace("\r\n", "\n")


def last_frame(text: str) -> str:
    """The screen at the end: what moving bars drew over is gone.

    A redraw goes up N lines (or to the line's start) and erases: the lines from there on are replaced.
    """
    lines = [""]
    for piece in re.split(r"(\n|\r|\x1b\[\d*A|\x1b\[2?K|\x1b\[\?25[lh])", text):
        if piece == "\n":
            lines.append("")
        elif up := re.fullmatch(r"\x1b\[(\d*)A", piece):
            for _ in range(int(up[1] or 1)):
                if len(lines) > 1:
                    lines.pop()
        elif piece.endswith("K") and piece.startswith("\x1b"):
            lines[-1] = ""
        elif piece != "\r" and not piece.startswith("\x1b[?25"):
            lines[-1] += piece
    return "\n".join(lines).rstrip("\n")


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
