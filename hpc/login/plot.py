"""PURE: figures of `hpc bench`, curves of a training -> a drawing (SVG) that stands for itself, fit for a paper."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

_COLOURS = ("#0072b2", "#d55e00")
"""Told apart by people who do not see all colours, and in grey by their marks."""
_MARKED = 40
"""Points of a line that have a mark each, at most."""
_WIDTH, _HEIGHT = 760, 320
_LEFT, _TOP, _PANEL_W, _PANEL_H, _GAP = 62, 58, 290, 190, 84


@dataclass(frozen=True)
class Axis:
    """Values -> a place between 0 and 1."""

    ticks: Sequence[float]
    log: bool = False

    def place(self, value: float) -> float:
        low, high = self.ticks[0], self.ticks[-1]
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return 0.5 if high == low else (value - low) / (high - low)


def linear(highest: float) -> Axis:
    """From 0, with four to six round ticks.

    >>> list(linear(93).ticks)
    [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]
    """
    highest = highest or 1.0
    power = 10.0 ** math.floor(math.log10(highest))
    step = next(s * power for s in (0.2, 0.25, 0.5, 1.0, 2.0) if s * power * 5 >= highest)
    return Axis([round(n * step, 10) for n in range(math.ceil(highest / step - 1e-9) + 1)])


def draw(document: Mapping[str, Any]) -> str:
    """Time to first token and throughput against the load, a line for each endpoint."""
    endpoints = document["endpoints"]
    xs = sorted({_x(level) for endpoint in endpoints for level in endpoint["levels"]})
    across = Axis(xs, log=len(xs) > 1)
    closed = endpoints[0]["levels"][0]["loop"] == "closed"
    below = "requests at once" if closed else "requests per second"
    first = [
        [(_x(v), v["ttft_ms"]["p50"], v["ttft_ms"]["p95"]) for v in e["levels"] if v["ttft_ms"]] for e in endpoints
    ]
    rates = [[(_x(v), v["tokens_per_s"], None) for v in e["levels"]] for e in endpoints]
    parts = [
        _panel(_LEFT, "Time to first token (ms)", below, across, first),
        _panel(_LEFT + _PANEL_W + _GAP, "Throughput (tokens/s)", below, across, rates),
        _legend([endpoint["name"] for endpoint in endpoints], any(any(p[2] for p in line) for line in first)),
        f'<text x="{_LEFT}" y="{_HEIGHT - 10}" class="note">{escape(_note(document))}</text>',
    ]
    return _svg(parts)


def _svg(parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
        f'height="{_HEIGHT}">\n'
        "<style>text{font:12px Helvetica,Arial,'Noto Sans',sans-serif;fill:#222}.title{font-weight:600}"
        ".note{font-size:10px;fill:#666}.tick{font-size:11px;fill:#444}</style>\n"
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def curves(
    left: Mapping[str, Sequence[tuple[float, float]]], right: Mapping[str, Sequence[tuple[float, float]]]
) -> str:
    """A training's readings against its steps, (step, value) each: its losses, and the learning rate beside them."""
    parts = []
    for place, title, lines in ((_LEFT, "Loss", left), (_LEFT + _PANEL_W + _GAP, "Learning rate", right)):
        if lines:
            across = linear(max(x for points in lines.values() for x, _ in points))
            drawn = [[(x, y, None) for x, y in points] for points in lines.values()]
            parts.append(_panel(place, title, "step", across, drawn))
    return _svg([*parts, _legend(list(left), dashed=False)])


def _x(level: Mapping[str, Any]) -> float:
    return float(level["concurrency"] or level["rate"])


def _note(document: Mapping[str, Any]) -> str:
    length = f"{'exactly' if document['exact'] else 'up to'} {document['max_tokens']} tokens an answer"
    requests = sum(level["requests"] for e in document["endpoints"] for level in e["levels"])
    agreed = document.get("agreement") or {}
    same = f" · {agreed['equal']:.0%} of the greedy answers are equal" if agreed.get("questions") else ""
    return f"{document['questions']} questions, {length}, greedy; {requests} requests in all{same}"


Points = Sequence[tuple[float, float, float | None]]


def _panel(left: float, title: str, below: str, across: Axis, lines: Sequence[Points]) -> str:
    up = linear(max((max(y, high or 0) for line in lines for _, y, high in line), default=1.0))
    bottom = _TOP + _PANEL_H
    pad = 14  # the outer marks keep clear of the frame

    def at(x: float, y: float) -> tuple[float, float]:
        return left + pad + across.place(x) * (_PANEL_W - 2 * pad), bottom - up.place(y) * _PANEL_H

    parts = [f'<text x="{left}" y="{_TOP - 12}" class="title">{escape(title)}</text>']
    for tick in up.ticks:
        y = at(across.ticks[0], tick)[1]
        parts.append(f'<path d="M{left} {y:.1f}h{_PANEL_W}" stroke="{"#888" if not tick else "#e3e3e3"}"/>')
        parts.append(f'<text x="{left - 7}" y="{y + 4:.1f}" text-anchor="end" class="tick">{tick:g}</text>')
    for tick in across.ticks:
        x = at(tick, 0)[0]
        parts.append(f'<path d="M{x:.1f} {bottom}v4" stroke="#888"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle" class="tick">{tick:g}</text>')
    middle = left + _PANEL_W / 2
    parts.append(f'<text x="{middle}" y="{bottom + 35}" text-anchor="middle">{escape(below)}</text>')
    for number, line in enumerate(lines):
        parts.append(_line(number, [(*at(x, y), at(x, high)[1] if high else None) for x, y, high in line]))
    return "\n".join(parts)


def _line(number: int, points: Sequence[tuple[float, float, float | None]]) -> str:
    if not points:
        return ""
    colour, parts = _COLOURS[number], []
    highs = [(x, high) for x, _, high in points if high is not None]
    if len(highs) > 1:
        parts.append(f'<path d="{_path(highs)}" fill="none" stroke="{colour}" stroke-dasharray="3 3" opacity=".75"/>')
    elif highs:
        (x, high), y = highs[0], points[0][1]
        parts.append(f'<path d="M{x:.1f} {y:.1f}V{high:.1f}m-4 0h8" stroke="{colour}" opacity=".75"/>')
    path = _path([(x, y) for x, y, _ in points])
    parts.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-linejoin="round"/>')
    parts += [_mark(number, x, y) for x, y, _ in points] if len(points) <= _MARKED else []
    return "\n".join(parts)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _mark(number: int, x: float, y: float) -> str:
    style = f'fill="#fff" stroke="{_COLOURS[number]}" stroke-width="2"'
    if number:
        return f'<rect x="{x - 3.8:.1f}" y="{y - 3.8:.1f}" width="7.6" height="7.6" {style}/>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" {style}/>'


def _legend(names: Sequence[str], dashed: bool) -> str:
    parts, x = [], float(_LEFT)
    for number, name in enumerate(names):
        parts.append(f'<path d="M{x:.0f} 20h24" stroke="{_COLOURS[number]}" stroke-width="2"/>')
        parts.append(_mark(number, x + 12, 20))
        parts.append(f'<text x="{x + 31:.0f}" y="24">{escape(name)}</text>')
        x += 31 + 7.2 * len(name) + 26
    if dashed:
        parts.append(f'<path d="M{x:.0f} 20h24" stroke="#555" stroke-dasharray="3 3"/>')
        parts.append(f'<text x="{x + 31:.0f}" y="24">95th percentile (line: median)</text>')
    return "\n".join(parts)
