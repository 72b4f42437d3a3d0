"""The files that the settings of prepare mean: paths, folders, and what the stage fetch got. Standard library."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hpc.core.errors import UsageError
from hpc.inside import sources as readable

FETCHED = "fetch:"
"""Before a pattern of file names."""
NO_DATA = 'for example: data = ["data/train.jsonl"]; or set fetch.datasets, with the stage fetch before this one'


@dataclass(frozen=True)
class Source:
    """One file, and what its rows are for."""

    path: Path
    role: Literal["eval_data", "data", "replay"]
    entry: int
    """Which of the role's entries in the settings it comes from."""


def sources(config: Any, fetched: str | None) -> list[Source]:
    """All files of a prepare's settings, the held-out ones first: what others repeat of them is dropped there."""
    given = {"eval_data": config.eval_data, "data": config.data or (FETCHED,), "replay": config.replay}
    return [
        Source(path, role, entry)  # type: ignore[arg-type]
        for role, names in given.items()
        for entry, name in enumerate(names)
        for path in files(name, fetched)
    ]


def files(name: str, fetched: str | None) -> list[Path]:
    """The files that one entry of data means; UsageError where there are none."""
    if not name.startswith(FETCHED):
        return readable.files(Path(name))
    if fetched is None:
        raise UsageError("prepare.data names no file, and nothing was fetched", hint=NO_DATA)
    folder = Path(fetched)
    pattern = name.removeprefix(FETCHED) or "*"
    matching = [path for found in sorted(folder.glob(pattern)) for path in readable.files(found)]
    if not matching:
        there = ", ".join(str(path.relative_to(folder)) for path in readable.files(folder)[:5])
        raise UsageError(f"nothing that was fetched matches '{pattern}'", hint=f"there is: {there}")
    return list(dict.fromkeys(matching))


def names(sources: Sequence[Source]) -> list[str]:
    """The files' names, with as many of their folders as tell them apart."""
    found: dict[Path, str] = {}
    left, depth = {source.path for source in sources}, 0
    while left:
        depth += 1
        ends = Counter(path.parts[-depth:] for path in left)
        told = {path for path in left if ends[path.parts[-depth:]] == 1 or depth >= len(path.parts)}
        found |= {path: str(Path(*path.parts[-depth:])) for path in told}
        left -= told
    return [found[source.path] for source in sources]
