"""How much a service does, from the small file that it writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpc.core import rundir
from hpc.core.rundir import StageDir


def read(folder: StageDir, since: float) -> dict[str, Any] | None:
    """What the service that answers since then has written; None where it has written nothing, as JupyterLab."""
    found = rundir.read_json(folder.figures)
    if found is None or found.get("schema") != "hpc.figures/1" or found.get("t", 0) < since:
        return None
    return {name: value for name, value in found.items() if name != "schema"}


def in_words(figures: Mapping[str, Any] | None) -> str:
    """The figures that a person wants to see, those that are there.

    >>> in_words({"running": 3, "tokens_s": 41.3, "done": 1200, "failed": 2, "kv_use": 0.5})
    '3 running · 41 tok/s · 50% of the KV cache · 1200 done · 2 failed'
    >>> in_words({"running": 0, "tokens_s": 0.0, "done": 0, "failed": 0, "waiting": None}), in_words(None)
    ('', '')
    """
    if figures is None:
        return ""
    said = [f"{figures['running']} running"] if figures.get("running") else []
    said += [f"{figures['waiting']} waiting"] if figures.get("waiting") else []
    said += [f"{figures['tokens_s']:.0f} tok/s"] if figures.get("running") and figures.get("tokens_s") else []
    said += [f"{figures['kv_use']:.0%} of the KV cache"] if figures.get("kv_use") else []
    said += [f"{figures[name]} {name}" for name in ("done", "failed") if figures.get(name)]
    return " · ".join(said)
