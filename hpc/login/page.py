"""PURE: a run's report -> one HTML page that stands for itself: no script, nothing fetched, every text escaped."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from hpc.core import evaluation
from hpc.login import plot
from hpc.login.report import Report, StageReport
from hpc.login.view import clock, load_of

_STYLE = """
:root{color-scheme:light dark;--ink:#1d2329;--soft:#667;--line:#d8dce0;--back:#fff;--bar:#0072b2;--wait:#b9c4cd;
--bad:#c0392b}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ec;--soft:#9aa4ad;--line:#39424a;--back:#15191d;--bar:#4aa8e0;
--wait:#4a555e;--bad:#ff7b6b}}
body{font:15px/1.5 system-ui,"Noto Sans KR","Apple SD Gothic Neo","Malgun Gothic",sans-serif;color:var(--ink);
background:var(--back);max-width:60rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;width:100%}th,td{text-align:left;vertical-align:top;padding:.25rem .8rem .25rem 0;
border-bottom:1px solid var(--line);overflow-wrap:anywhere}th{font-weight:600;color:var(--soft)}
td:first-child:not(.answer),th{white-space:nowrap}td.answer{white-space:pre-wrap}.soft{color:var(--soft)}.bad{color:var(--bad);font-weight:700}
svg.times text{fill:var(--ink);font:13px system-ui,sans-serif}figure{background:#fff;margin:1rem 0;overflow:auto}
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_GOOD = {"COMPLETED", "RUNNING", "PENDING"}


def render(report: Report) -> str:
    """The whole page."""
    title = f"{escape(report.run)} — hpc report"
    parts = (part for section in _SECTIONS for part in section(report))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{title}</title><style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _table(headings: Sequence[str], rows: Sequence[Sequence[Any]], css: str = "") -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in headings)
    body = "".join("<tr>" + "".join(f'<td class="{css}">{_text(c)}</td>' for c in row) + "</tr>\n" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{escape(str(k))} {_text(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    text = escape("" if value is None else str(value))
    return f'<span class="bad">{text}</span>' if text in {"WORSE", "FAILED", "TIMEOUT", "OUT_OF_MEMORY"} else text


def _summary(report: Report) -> Iterator[str]:
    yield f"<h1>{escape(report.run)}</h1>"
    if report.verdict:
        css = "bad" if "WORSE" in report.verdict else ""
        yield f'<p class="{css}">{escape(report.verdict)}</p>'
    if report.problem:
        yield f'<p class="bad">{escape(report.problem)}: what Slurm alone knows is not here</p>'
    states = sorted({s.state for s in report.stages})
    rows = [
        ("Project", report.project),
        ("Site", report.site),
        ("Submitted", _when(report.created)),
        ("Commit", report.commit),
        ("States", ", ".join(f"{sum(s.state == name for s in report.stages)} {name}" for name in states)),
        ("Time", clock(sum(_ran(s) for s in report.stages)) + " of all stages together"),
        ("Report of", _when(report.made)),
    ]
    yield _table(("", ""), [row for row in rows if row[1]])


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds)) if seconds else ""


def _ran(stage: StageReport) -> float:
    return sum(a.ended - a.started for a in stage.attempts) + (_now(stage) or 0)


def _now(stage: StageReport) -> float | None:
    return stage.elapsed_s if stage.state == "RUNNING" else None


def _stages(report: Report) -> Iterator[str]:
    yield "<h2>Stages</h2>"
    yield _times(report)
    rows = [
        (s.name, s.state, s.job_id, s.node, clock(_waited(s)), clock(_ran(s)), ", ".join(s.after), s.reason)
        for s in report.stages
    ]
    yield _table(("Stage", "State", "Job", "Node", "Waited", "Ran", "After", "Why"), rows)


def _waited(stage: StageReport) -> float | None:
    return stage.attempts[0].started - stage.submitted if stage.attempts and stage.submitted else None


def _times(report: Report) -> str:
    """A line for each stage: grey while it waited, blue while it ran; a bend leads to it from those it waited for."""
    spans = {s.name: list(_spans(s, report.made)) for s in report.stages}
    marks = [t for found in spans.values() for a, b, _ in found for t in (a, b)]
    if not marks:
        return ""
    first, scale, left, high = min(marks), 620 / max(max(marks) - min(marks), 1e-3), 130, 30

    def x(t: float) -> float:
        return left + (t - first) * scale

    parts, place = [], {s.name: n for n, s in enumerate(report.stages)}
    for n, stage in enumerate(report.stages):
        y = n * high + 6
        parts.append(f'<text x="0" y="{y + 14}">{escape(stage.name)}</text>')
        for begin, end, colour in spans[stage.name]:
            parts.append(
                f'<rect x="{x(begin):.1f}" y="{y}" width="{max((end - begin) * scale, 1.5):.1f}" height="18" rx="2" '
                f'fill="var(--{colour})"/>'
            )
        runs = [begin for begin, _, colour in spans[stage.name] if colour != "wait"]
        for name in stage.after:
            if runs and spans.get(name):
                down = x(spans[name][-1][1])
                parts.append(
                    f'<path d="M{down:.1f} {place[name] * high + 24}V{y + 9}H{x(runs[0]):.1f}" fill="none" '
                    'stroke="var(--soft)"/>'
                )
    size = f'viewBox="0 0 760 {len(report.stages) * high + 6}" width="100%"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" class="times" role="img" {size}>{"".join(parts)}</svg>'


def _spans(stage: StageReport, now: float) -> Iterator[tuple[float, float, str]]:
    before = stage.submitted
    for attempt in stage.attempts:
        if before and attempt.started > before:
            yield before, attempt.started, "wait"
        yield attempt.started, attempt.ended, "bar" if attempt.state == "COMPLETED" else "bad"
        before = attempt.ended
    if (elapsed := _now(stage)) is not None:
        yield now - elapsed, now, "bar"


def _settings(report: Report) -> Iterator[str]:
    rows = [(f"{s.name}.{name}", value) for s in report.stages for name, value in s.settings.items()]
    if rows:
        yield "<h2>Settings that differ from the defaults</h2>"
        yield _table(("Setting", "Value"), rows)
    made = [(s.name, s.environment, s.digest, s.versions, s.outputs) for s in report.stages if s.versions]
    if made:
        yield "<h2>Made with</h2>"
        yield _table(("Stage", "Environment", "Its digest", "Versions", "Outputs and their digests"), made)


def _training(report: Report) -> Iterator[str]:
    for stage in report.stages:
        losses = {n: stage.curves[n] for n in ("loss", "eval_loss") if n in stage.curves}
        if losses:
            yield f"<h2>{escape(stage.name)}: loss and learning rate</h2>"
            rates = {n: p for n, p in stage.curves.items() if n == "learning_rate"}
            yield f"<figure>{plot.curves(losses, rates)}</figure>"


def _results(report: Report) -> Iterator[str]:
    for stage in report.stages:
        if stage.metrics and stage.name != "evaluate":
            yield f"<h2>{escape(stage.name)}: figures</h2>"
            yield _table(("Figure", "Value"), list(stage.metrics.items()))
        if stage.passport:
            yield f"<h2>{escape(stage.name)}: the engine's passport</h2>"
            yield _table(("", ""), [(k, v) for k, v in stage.passport.items() if k != "schema" and v not in ("", {})])


def _evaluation(report: Report) -> Iterator[str]:
    for stage in report.stages:
        if not stage.evaluation:
            continue
        yield "<h2>Evaluation</h2>"
        words = {True: "better", False: "WORSE", None: ""}
        rows = [(f.name, f.base, f.tuned, words[f.better]) for f in evaluation.figures(stage.evaluation)]
        yield _table(("Figure", "Base", "Tuned", ""), rows)
        answers = [(a.get("prompt"), a.get("reference"), a.get("base"), a.get("tuned")) for a in
                   stage.evaluation.get("answers", ())]  # fmt: skip
        if answers:
            yield "<h2>Answers, side by side</h2>"
            yield _table(("Question", "Reference", "Base", "Tuned"), answers, css="answer")


def _bench(report: Report) -> Iterator[str]:
    for stage in report.stages:
        if not stage.bench:
            continue
        rows = [
            (e["name"], load_of(level), level["answered"], sum(level["errors"].values()), level["tokens_per_s"],
             *(level[f"{name}_ms"] and level[f"{name}_ms"]["p50"] for name in ("ttft", "itl", "e2e")))
            for e in stage.bench["endpoints"] for level in e["levels"]
        ]  # fmt: skip
        yield f"<h2>{escape(stage.name)}: benchmark of {_when(stage.bench['at'])}</h2>"
        yield f"<figure>{plot.draw(stage.bench)}</figure>"
        yield _table(("Endpoint", "Load", "Answered", "Errors", "Tokens/s", "First token, ms (p50)",
                      "Next token, ms", "Whole answer, ms"), rows)  # fmt: skip


def _ledger(report: Report) -> Iterator[str]:
    rows = [
        (f"{s.name}, attempt {a.number}", a.state, a.host, clock(a.ended - a.started),
         s.gpus * (a.ended - a.started) / 3600, s.nodes * (a.ended - a.started) / 3600, a.cause)
        for s in report.stages for a in s.attempts
    ]  # fmt: skip
    if rows:
        failed = sum(a.state not in _GOOD for s in report.stages for a in s.attempts)
        gpu, node = (sum(getattr(s, name) for s in report.stages) for name in ("gpu_hours", "node_hours"))
        yield "<h2>Ledger</h2>"
        yield f"<p>{gpu:.2f} GPU hours, {node:.2f} node hours; {failed} of {len(rows)} attempts did not complete</p>"
        yield _table(("Attempt", "End", "Node", "Time", "GPU hours", "Node hours", "Why"), rows)


_SECTIONS = (_summary, _stages, _settings, _training, _results, _evaluation, _bench, _ledger)
