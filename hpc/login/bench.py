"""`hpc bench`: one endpoint or two, level by level in turn; a table, a document, a plot. A run keeps its latest one."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hpc.core import rundir
from hpc.core.errors import Interrupted, UsageError
from hpc.login import answers, doorway, figures, load, plot, prompts, ready, view
from hpc.login.doorway import Doorway
from hpc.login.load import Level
from hpc.login.question import Sampling
from hpc.login.stream import Sample

_LEVELS = "1,8,32"
_REQUESTS = 32


def run(options: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """The document of --json, and the exit code: 1 where an endpoint gave no token at all."""
    levels = _levels(options)
    slo = figures.objectives(options.slo) if options.slo else {}
    if options.plot and options.plot != "-" and not options.plot.endswith(".svg"):
        raise UsageError(f"--plot {options.plot}: only SVG is drawn", hint="name it FILE.svg")
    if options.plot and options.plot != "-" and not os.access(Path(options.plot).absolute().parent, os.W_OK | os.X_OK):
        raise UsageError(f"--plot {options.plot}: its folder cannot be written to", hint="name another file")
    if options.plot == "-" and options.json:
        raise UsageError("--plot - and --json both want stdout", hint="give one of them a file")
    doors = _doors(options)
    sampling = Sampling(
        max_tokens=options.max_tokens, min_tokens=options.max_tokens if options.exact else None, temperature=0
    )
    raw = options.raw or not all(map(_chats, doors.values()))
    if raw and not options.raw:
        print("the model has no chat template: the questions are continued as they are (--raw)", file=sys.stderr)
    asked = prompts.questions(options.prompts, sampling, raw=raw)
    found: dict[str, list[tuple[Level, list[Sample]]]] = {name: [] for name in doors}
    stopped = False
    try:
        _measure(doors, {name: load.requests_of(door, asked) for name, door in doors.items()}, levels, options, found)
    except KeyboardInterrupt:
        stopped = True
    document = {
        "schema": figures.SCHEMA,
        "at": round(time.time(), 3),
        "questions": len(asked),
        "chat_template": not raw,
        "max_tokens": options.max_tokens,
        "exact": options.exact,
        "slo_ms": slo,
        "endpoints": [_endpoint(name, doors[name], measured, slo) for name, measured in found.items() if measured],
    }
    if len(doors) == 2 and all(found.values()):
        one, two = (measured[0][1] for measured in found.values())
        document["agreement"] = figures.agreement(one, two)
    if any(found.values()):
        _keep(document, doors)
    shown = _show(document, options)
    if stopped:
        raise Interrupted("the benchmark was stopped", hint="the levels that were done are shown; the service goes on")
    silent = [e["name"] for e in document["endpoints"] if not all(level["tokens"] for level in e["levels"])]
    if silent:
        print(f"error: {', '.join(silent)}: a level without a single token", file=sys.stderr)
        print("  try: `hpc query hello` and `hpc logs serve` show what is wrong", file=sys.stderr)
    return document, 1 if silent or not shown else 0


def _levels(options: argparse.Namespace) -> list[Level]:
    if options.concurrency and options.rate:
        raise UsageError("--concurrency is a closed loop, and --rate an open one", hint="give one of them")
    if options.requests is not None and options.duration is not None:
        raise UsageError("--requests and --duration both end a level", hint="give one of them")
    for name in ("requests", "duration", "max_tokens"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UsageError(f"--{name.replace('_', '-')} {value:g}: too few", hint="1 or more")
    if options.warmup < 0:
        raise UsageError(f"--warmup {options.warmup}: too few", hint="0 or more")
    length = {"requests": options.requests, "duration": options.duration}
    if options.rate:
        found = [Level(rate=_number("--rate", word, float), **length) for word in options.rate.split(",")]
    else:
        words = (options.concurrency or _LEVELS).split(",")
        found = [Level(concurrency=_number("--concurrency", word, int), **length) for word in words]
    if options.requests or options.duration:
        return found
    return [replace(level, requests=max(_REQUESTS, 4 * int(level.concurrency or 0))) for level in found]


def _number(option: str, word: str, kind: Any) -> Any:
    try:
        value = kind(word)
    except ValueError:
        value = 0
    if not 0 < value < 100_000:
        raise UsageError(f"{option} {word!r} is no number of requests", hint=f"e.g. {option} {_LEVELS}")
    return value


def _doors(options: argparse.Namespace) -> dict[str, Doorway]:
    """Name -> door, one or two of them."""
    runs, files = [r for r in (options.run, options.other) if r], options.token_file
    if (options.url and runs) or len(options.url) > 2 or len(files) > len(options.url):
        raise UsageError("--url takes the place of a run, and each --token-file needs one", hint="one or two endpoints")
    if options.url:
        pairs = [(None, url, files[n] if n < len(files) else None) for n, url in enumerate(options.url)]
    else:
        pairs = [(run, None, None) for run in runs or [None]]
    doors = [doorway.of_options(*pair, wait=options.wait) for pair in pairs]
    names = options.names.split(",") if options.names else [door.what for door in doors]
    if len(set(names)) != len(doors) or not all(names):
        raise UsageError(
            f"{len(doors)} endpoints cannot be called {', '.join(names)}", hint="--names A,B; two endpoints"
        )
    return dict(zip(names, doors, strict=True))


def _chats(door: Doorway) -> bool:
    """Whether the model has a chat template."""
    entries = answers.get(door, "/v1/models").get("data") or [{}]
    return entries[0].get("chat") is not False


def _measure(
    doors: Mapping[str, Doorway],
    requests: Mapping[str, Sequence[bytes]],
    levels: Sequence[Level],
    options: argparse.Namespace,
    found: dict[str, list[tuple[Level, list[Sample]]]],
) -> None:
    """Level by level, the endpoints in turn: a machine with other work slows both alike."""
    with ready.line(sys.stderr) as say:
        for name, door in doors.items():
            say(f"{name}: warming up")
            load.warm_up(door, requests[name], options.warmup)
        for level in levels:
            for name, door in doors.items():

                def progress(done: int, begun: int, name: str = name, level: Level = level) -> None:
                    of = f" of {level.requests}" if level.requests else ""
                    say(f"{name} {level.name}:  {done}{of} answered, {begun - done} under way")

                samples = load.run(door, requests[name], level, seed=options.seed, progress=progress)
                found[name].append((level, samples))


def _endpoint(
    name: str, door: Doorway, measured: Sequence[tuple[Level, list[Sample]]], slo: Mapping[str, float]
) -> dict[str, Any]:
    levels = [
        {"loop": "closed" if level.concurrency else "open", "concurrency": level.concurrency, "rate": level.rate,
         **figures.summary(samples, slo)}
        for level, samples in measured
    ]  # fmt: skip
    return {"name": name, "what": door.what, "levels": levels}


def _keep(document: Mapping[str, Any], doors: Mapping[str, Doorway]) -> None:
    """For `hpc report`; a folder that cannot be written to loses nobody the figures."""
    for door in doors.values():
        if door.folder is not None:
            try:
                rundir.write_json(door.folder.bench, document)
            except OSError as error:
                print(f"not kept in {door.folder.path}: {error.strerror or error}", file=sys.stderr)


def _show(document: Mapping[str, Any], options: argparse.Namespace) -> bool:
    """False where the plot could not be written: the figures are not lost with it."""
    if not options.json:
        view.bench(document, sys.stderr if options.plot == "-" else sys.stdout)
    if options.plot and document["endpoints"]:
        drawn = plot.draw(document)
        if options.plot == "-":
            sys.stdout.write(drawn)
        else:
            path = Path(options.plot)
            try:
                rundir.write_text(path, drawn)
            except OSError as error:
                print(f"error: {path}: {(error.strerror or str(error)).lower()}", file=sys.stderr)
                return False
            print(f"drawn in {path}", file=sys.stderr)
    return True
