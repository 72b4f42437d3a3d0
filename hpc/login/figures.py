"""PURE: samples of a load -> its figures: percentiles, throughput, goodput; and how far two engines say the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from hpc.core.errors import UsageError
from hpc.login.stream import Sample

SCHEMA = "hpc.bench/1"
"""Of the document that `hpc bench` prints, and that a run keeps."""
PERCENTS = (50, 90, 95, 99)
METRICS = ("ttft", "itl", "e2e", "gap")
"""Milliseconds of one request: to its first token, between two tokens, to its last token, its longest pause."""


def percentile(values: Sequence[float], percent: float) -> float:
    """Between the two nearest values, as numpy does it by default.

    >>> percentile([1, 2, 3, 4], 50), percentile([5], 99)
    (2.5, 5.0)
    """
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (ordered[high] - ordered[low]) * (place - low))


def of_one(sample: Sample) -> dict[str, float]:
    """Milliseconds of one request that was answered; without itl where it is one token long."""
    found = {
        "ttft": (sample.times[0] - sample.began) * 1000,
        "e2e": (sample.times[-1] - sample.began) * 1000,
    }
    tokens = tokens_of(sample)
    if tokens > 1 and len(sample.times) > 1:
        found["itl"] = (sample.times[-1] - sample.times[0]) * 1000 / (tokens - 1)
        found["gap"] = max(b - a for a, b in zip(sample.times, sample.times[1:], strict=False)) * 1000
    return found


def tokens_of(sample: Sample) -> int:
    """By the server's own count; else the pieces that came."""
    return len(sample.times) if sample.tokens is None else sample.tokens


def summary(samples: Sequence[Sample], slo: Mapping[str, float]) -> dict[str, Any]:
    """The figures of one level."""
    good = [s for s in samples if not s.error]
    seconds = max(s.ended for s in samples) - min(s.began for s in samples) if samples else 0.0
    ones = [of_one(s) for s in good]
    tokens = sum(map(tokens_of, good))
    found: dict[str, Any] = {
        "requests": len(samples),
        "answered": len(good),
        "client_late_ms": round(max((s.late for s in samples), default=0.0) * 1000, 3),
        "errors": dict(Counter(s.error for s in samples if s.error).most_common()),
        "seconds": round(seconds, 3),
        "prompt_tokens": sum(s.prompt_tokens or 0 for s in good),
        "tokens": tokens,
        "tokens_counted": "by the server" if all(s.tokens is not None for s in good) else "by pieces of text",
        "tokens_per_s": round(tokens / seconds, 2) if seconds else 0.0,
        "requests_per_s": round(len(good) / seconds, 3) if seconds else 0.0,
    }
    for name in METRICS:
        values = [one[name] for one in ones if name in one]
        found[f"{name}_ms"] = _spread(values) if values else None
    if slo:
        kept = sum(all(one.get(name, 0.0) <= limit for name, limit in slo.items()) for one in ones)
        found["goodput"] = {
            "share": round(kept / len(samples), 4) if samples else 0.0,
            "requests_per_s": round(kept / seconds, 3) if seconds else 0.0,
        }
    return found


def _spread(values: Sequence[float]) -> dict[str, float]:
    found = {"mean": sum(values) / len(values), **{f"p{p}": percentile(values, p) for p in PERCENTS}}
    return {name: round(value, 3) for name, value in {**found, "max": max(values)}.items()}


def agreement(first: Sequence[Sample], second: Sequence[Sample]) -> dict[str, Any]:
    """How far two engines answer the same questions equally, letter by letter."""
    answers = [_answers(samples) for samples in (first, second)]
    both = [(answers[0][n], answers[1][n]) for n in answers[0] if n in answers[1]]
    if not both:
        return {"questions": 0, "equal": None, "common_prefix": None}
    prefixes = [_common(a, b) / max(len(a), len(b)) for a, b in both]
    return {
        "questions": len(both),
        "equal": round(sum(a == b for a, b in both) / len(both), 4),
        "common_prefix": round(sum(prefixes) / len(prefixes), 4),
    }


def _answers(samples: Sequence[Sample]) -> dict[int, str]:
    found: dict[int, str] = {}
    for sample in samples:
        if not sample.error:
            found.setdefault(sample.prompt, sample.text)
    return found


def _common(one: str, other: str) -> int:
    """So many letters at the beginning are the same.

    >>> _common("abcd", "abxd")
    2
    """
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def objectives(text: str) -> dict[str, float]:
    """--slo. UsageError where it is none.

    >>> objectives("ttft=200,itl=50")
    {'ttft': 200.0, 'itl': 50.0}
    """
    found = {}
    for word in text.split(","):
        name, _, number = word.strip().partition("=")
        try:
            found[name] = float(number.removesuffix("ms"))
        except ValueError:
            found[name] = -1.0
        if name not in ("ttft", "itl", "e2e") or not found[name] > 0:
            raise UsageError(f"--slo {word!r} is no objective", hint="milliseconds, e.g. --slo ttft=200,itl=50")
    return found
