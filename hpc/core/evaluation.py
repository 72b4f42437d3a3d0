"""PURE: what an evaluation's report says: each figure of the tuned model against its base, and the verdict in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

SCHEMA = "hpc.evaluation/1"
_LOW_IS_GOOD = ("held-out loss", "perplexity", "bits_per_byte")
"""Figures whose names end so, beside those that the report names; lm-eval's have their task before: `faq ter`."""
_SAME = 1e-4
"""Figures this near, relatively, are the same."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure; `base` is None where no base was measured."""

    name: str
    base: float | None
    tuned: float
    low_is_good: bool = False

    @property
    def better(self) -> bool | None:
        """None: the same, or nothing to compare with. What is no number is worse than any."""
        if self.base is None or math.isnan(self.base):
            return None
        if abs(self.tuned - self.base) <= _SAME * max(abs(self.base), abs(self.tuned)):
            return None
        return not math.isnan(self.tuned) and (self.tuned < self.base) == self.low_is_good

    def __str__(self) -> str:
        return (
            f"{self.name} {self.tuned:.4g}" if self.base is None else f"{self.name} {self.base:.4g} → {self.tuned:.4g}"
        )


def figures(report: Mapping[str, Any]) -> list[Figure]:
    """All figures of a report, the loss first."""
    tuned, base = report["tuned"], report.get("base")
    named = tuned.get("low_is_good", ())
    return [
        Figure(name=n, base=_value(base, n), tuned=v, low_is_good=n in named or n.endswith(_LOW_IS_GOOD))
        for n, v in tuned["figures"].items()
    ]


def verdict(report: Mapping[str, Any]) -> str:
    """One sentence, in which a model that is worse than its base is said to be."""
    found = figures(report)
    if not found:
        return "nothing was measured"
    compared = [f for f in found if f.base is not None and not math.isnan(f.base)]
    if not compared:
        return "; ".join(map(str, found[:2])) + "; no base to compare with"
    found, worse = compared, [f for f in compared if f.better is False]
    if worse and worse[0] is found[0]:
        return "WORSE than its base: " + ", ".join(map(str, worse))
    if all(f.better is None for f in found):
        return "the same as its base"
    text = f"better than its base: {found[0]}" if found[0].better else f"as good as its base: {found[0]}"
    return text + (f"; but WORSE in {', '.join(map(str, worse))}" if worse else "")


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The report for a person: the figures as a table, the answers side by side, the verdict."""
    yield f"{'':24}{'base':>12}{'tuned':>12}"
    for f in figures(report):
        mark = {True: "better", False: "WORSE", None: ""}[f.better]
        yield f"{f.name:24}{'-' if f.base is None else f'{f.base:.4g}':>12}{f.tuned:12.4g}  {mark}".rstrip()
    for answer in report["answers"]:
        yield ""
        yield f"> {answer['prompt']}"
        for name in ("reference", "base", "tuned"):
            if answer.get(name) is not None:
                yield f"  {name + ':':11}{answer[name]}"
    yield ""
    yield verdict(report)


def _value(side: Mapping[str, Any] | None, name: str) -> float | None:
    return None if side is None else side["figures"].get(name)
