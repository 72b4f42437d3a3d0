"""Copies of a request to end never interrupt the handler that saves, nor reach it a second time."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hpc.inside import once

PAYLOAD = """
import os, signal, sys, time
sys.path.insert(0, {checkout!r})
from hpc.inside import once
once.told_once()
heard = []

def handler(number, frame):
    heard.append(signal.Signals(number).name)
    os.kill(os.getpid(), number)          # a copy, in the midst of it
    import slow                           # takes its time, and a copy comes from within
    heard.append(slow.part.whole)

for number in (signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, handler)
{body}
print(*heard)
"""


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """A package whose import is interrupted by a copy of the signal."""
    package = tmp_path / "slow"
    package.mkdir()
    (package / "__init__.py").write_text("from . import part\n")
    (package / "part.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\nwhole = 'whole'\n")
    return tmp_path


def payload(folder: Path, body: str) -> str:
    checkout = str(Path(once.__file__).resolve().parents[2])
    code = PAYLOAD.format(checkout=checkout, body=body)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_copy_does_not_interrupt_the_handler(slow: Path) -> None:
    assert payload(slow, "os.kill(os.getpid(), signal.SIGTERM)") == "SIGTERM whole"


def test_copy_that_comes_later_is_not_told(slow: Path) -> None:
    assert payload(slow, "for _ in range(3): os.kill(os.getpid(), signal.SIGTERM)") == "SIGTERM whole"


def test_another_request_is_told_too(slow: Path) -> None:
    body = "os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGUSR2)"
    assert payload(slow, body) == "SIGTERM whole SIGUSR2 whole"


def test_other_signals_and_dispositions_are_as_ever(slow: Path) -> None:
    body = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.kill(os.getpid(), signal.SIGTERM)
signal.signal(signal.SIGHUP, lambda number, frame: heard.append("HUP"))
for _ in range(2): os.kill(os.getpid(), signal.SIGHUP)
assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
"""
    assert payload(slow, body) == "HUP HUP"


def test_earlier_handler_that_is_called_in_turn_is_told() -> None:
    heard: list[str] = []
    earlier = once.once(lambda number, frame: heard.append("earlier"))

    def later(number: int, frame: object) -> None:
        heard.append("later")
        earlier(number, None)

    handler = once.once(later)
    for _ in range(2):
        handler(signal.SIGTERM, None)
    assert heard == ["later", "earlier"]


def test_the_runner_as_a_program_does_so(tmp_path: Path) -> None:
    """And only as a program: what imports it keeps its own signal.signal."""
    code = """
import runpy, signal, sys
sys.argv = ["runner", "nothing", "config.json", "."]
try:
    runpy.run_module("hpc.inside.runner", run_name="__main__")
except SystemExit:
    print(signal.signal.__module__)
"""
    checkout = str(Path(once.__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": checkout}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "hpc.inside.once", done.stderr
    assert signal.signal is once._signal
