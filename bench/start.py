"""How fast `hpc` is there: cold processes against the import of rich's tables in the same environment."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from measure import Line, Pair, processes

ROUNDS = 25
GOAL = 2.5
RICH = "import rich.table"


def lines(rounds: int) -> Iterator[Line]:
    hpc = str(Path(sys.executable).with_name("hpc"))
    asked = {"hpc --help": [hpc, "--help"], "hpc stages": [hpc, "stages"]}
    taken = processes({**asked, RICH: [sys.executable, "-c", RICH]}, rounds)
    for name in asked:
        yield Pair(what=name, ms=taken[name], against=f'python -c "{RICH}"', against_ms=taken[RICH], goal=GOAL)
