"""
The stage finetune on the demo's model and data, as the node starts it: against the same training by TRL alone, and
against the finetuning lab's own recipe for the same conversations.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import Fact, Line, NotMeasured, Pair

ROUNDS = 4
GOAL = 1.03
STEPS = 12
RECIPE_GOAL = 0.5
ROWS, HELD_OUT = 48, 16
"""Conversations that the recipes train on, and that they are measured with."""
RECIPE = {
    "max_steps": -1, "epochs": 1.0, "packing": True, "max_length": 512, "batch_size": 1, "learning_rate": 2e-3,
    "logging_steps": 1, "dtype": "bfloat16", "lora_r": 64, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"],
}  # fmt: skip
"""What the demo's settings become: the lab's adapter and length, but packed rows, in bfloat16."""
ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo"
_ENV = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
"""What the stage sets for itself: both are told."""
SAME = 1e-3
"""Losses this near are those of the same training."""


@dataclass(frozen=True, kw_only=True)
class Taken:
    """One training: milliseconds, and its losses."""

    wall: float
    cpu: float
    loop: float
    losses: Sequence[float]


def lines(rounds: int) -> Iterator[Line]:
    python = Path(os.environ.get("TRAIN_PYTHON", ROOT / ".venvs" / "train" / "bin" / "python"))
    if not python.exists():
        raise NotMeasured("needs `make train-env`, or TRAIN_PYTHON=/path/to/its/python")
    if subprocess.run([sys.executable, DEMO / "fetch.py"], stdout=subprocess.DEVNULL).returncode:
        raise NotMeasured("needs the demo's model and data: python demo/fetch.py")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        stage = _prepared(Path(folder), python.parent.parent)
        yield from _recipes(stage, _divided(stage), max(1, rounds // 2))
        hpc, bare = [], []
        for number in range(rounds):
            if number % 2 == 0:
                hpc.append(_by_hpc(stage, number))
            bare.append(_by_hand(stage, number))
            if number % 2:  # A B B A: a machine that gets busier slows both alike
                hpc.append(_by_hpc(stage, number))
    for name, what, goal in (
        ("wall", "finetune, the whole process", GOAL),
        ("cpu", "finetune, CPU time of the whole process", GOAL),
        ("loop", "finetune, the training loop", None),
    ):
        ms, bare_ms = ([getattr(taken, name) for taken in side] for side in (hpc, bare))
        yield Pair(what=what, ms=ms, against=f"TRL alone, {STEPS} steps", against_ms=bare_ms, goal=goal)
    pairs = zip(hpc, bare, strict=True)
    apart = max(abs(a - b) for one, other in pairs for a, b in zip(one.losses, other.losses, strict=True))
    yield Fact(what="losses, largest difference", found=f"{apart:.1g}", goal=f"≤ {SAME}", met=apart <= SAME)


def _recipes(stage: Path, dataset: Path, rounds: int) -> Iterator[Line]:
    """The stage with packing against the lab's recipe: the time of 1000 tokens, and the held-out loss after them."""
    ms, lab_ms, losses, lab_losses = [], [], [], []
    for number in range(rounds):
        taken = _lab(stage, dataset, number)
        lab_ms.append(taken["seconds"] / taken["tokens"] * 1e6)
        lab_losses.append(taken["eval_loss"])
        metrics = _staged(stage, f"recipe-{number}", RECIPE, dataset)[1]
        ms.append(metrics["train_seconds"] / metrics["tokens"] * 1e6)
        losses.append(metrics["eval_loss_after"])
    yield Pair(what="finetune, 1000 tokens", ms=ms, against="the lab's recipe", against_ms=lab_ms, goal=RECIPE_GOAL)
    apart = f"{statistics.median(losses):.3f}, the lab's {statistics.median(lab_losses):.3f}"
    lower = statistics.median(losses) <= statistics.median(lab_losses)
    yield Fact(what="held-out loss after that", found=apart, goal="≤ the lab's", met=lower)


def _divided(stage: Path) -> Path:
    """The prepared conversations again, some of them held out."""
    document = json.loads((stage / "config.json").read_text())
    with open(Path(document["inputs"]["dataset"]["path"]) / "train.jsonl", encoding="utf-8") as file:
        lines = file.readlines()
    folder = stage.with_name("recipes")
    folder.mkdir()
    for name, part in (("train", lines[:ROWS]), ("eval", lines[-HELD_OUT:])):
        (folder / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    return folder


def _lab(stage: Path, dataset: Path, number: int) -> dict[str, float]:
    launch = json.loads((stage / "attempt-1" / "launch.json").read_text())
    fresh = stage.with_name(f"lab-{number}")
    fresh.mkdir()
    (base,) = Path(json.loads((stage / "config.json").read_text())["cache"]).glob("models/*")
    script = str(Path(__file__).with_name("lab_recipe.py"))
    argv = [launch["argv"][0], script, str(base), str(dataset), str(fresh)]
    _run(argv, {**launch["env"], **_ENV, "PYTHONPATH": str(ROOT)}, fresh / "log")
    found: dict[str, float] = json.loads((fresh / "result.json").read_text())
    return found


def _prepared(folder: Path, venv: Path) -> Path:
    """The stage's folder after one `hpc submit`: the rows are prepared, the base is converted, the files are cached."""
    settings = ("prepare.eval_rows=0", f"finetune.max_steps={STEPS}", f"environments.train={venv}")
    hpc = (sys.executable, "-m", "hpc", "submit", "finetune", "--site", "local", "--wait")
    argv = [*hpc, *(word for setting in settings for word in ("--set", setting))]
    _run(argv, {**os.environ, "HPC_RUNS": str(folder)}, folder / "submit.log", cwd=DEMO)
    (stage,) = folder.glob("finetune-*/finetune")
    return stage


def _by_hpc(stage: Path, number: int) -> Taken:
    (wall, cpu), metrics = _staged(stage, f"hpc-{number}", {})
    return Taken(wall=wall, cpu=cpu, loop=metrics["train_seconds"] * 1000, losses=metrics["losses"])


def _staged(
    stage: Path, name: str, settings: Mapping[str, object], dataset: Path | None = None
) -> tuple[tuple[float, float], dict[str, Any]]:
    """The command that the node starts, in a fresh folder, with other settings: its times, and its metrics."""
    launch = json.loads((stage / "attempt-1" / "launch.json").read_text())
    fresh = stage.with_name(name)
    attempt = fresh / "attempt-1"
    attempt.mkdir(parents=True)
    document = json.loads((stage / "config.json").read_text().replace(f"{stage}/", f"{fresh}/"))
    document["config"].update(settings)
    if dataset is not None:
        document["inputs"]["dataset"]["path"] = str(dataset)
    (fresh / "config.json").write_text(json.dumps(document))
    argv = [*launch["argv"][:-2], str(fresh / "config.json"), str(attempt)]
    times = _run(argv, {**launch["env"], **_ENV}, fresh / "log")
    return times, json.loads((fresh / "manifest.json").read_text())["metrics"]


def _by_hand(stage: Path, number: int) -> Taken:
    launch = json.loads((stage / "attempt-1" / "launch.json").read_text())
    fresh = stage.with_name(f"bare-{number}")
    fresh.mkdir()
    document = json.loads((stage / "config.json").read_text())
    (base,) = Path(document["cache"]).glob("models/*")
    bare = str(Path(__file__).with_name("bare_trl.py"))
    argv = [launch["argv"][0], bare, str(base), document["inputs"]["dataset"]["path"], str(stage / "config.json")]
    wall, cpu = _run([*argv, str(fresh)], {**launch["env"], **_ENV}, fresh / "log")
    result = json.loads((fresh / "result.json").read_text())
    return Taken(wall=wall, cpu=cpu, loop=result["seconds"] * 1000, losses=result["losses"])


def _run(argv: Sequence[str], env: Mapping[str, str], log: Path, cwd: Path | None = None) -> tuple[float, float]:
    """Milliseconds of a process by the clock and of the CPU."""
    begin = time.perf_counter()
    with open(log, "wb") as said:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=env, cwd=cwd)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{argv}: exit {process.returncode}\n{log.read_text(errors='replace')[-3000:]}")
    return (time.perf_counter() - begin) * 1000, (used.ru_utime + used.ru_stime) * 1000
