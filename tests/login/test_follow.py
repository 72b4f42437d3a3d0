"""`hpc logs -f`: what is printed is what was written, once, until the stage has ended."""

from __future__ import annotations

import io
import os
import threading
import time
import tracemalloc
from pathlib import Path

import pytest

from hpc.core.rundir import AttemptDir
from hpc.login import follow
from hpc.login.states import StageState


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"a\r\nb\r\n", b"c\n"),
        (b"bad \xff\xfe\xfd bytes\n", b"c\n"),
        (b"10%\r20%\r", b"30%\n"),
        (b"half", b" whole\n"),
        ("한".encode()[:2], "한".encode()[2:] + b"\n"),
        (b"", b"c\n"),
    ],
)
def test_followed_log_is_the_file(tmp_path: Path, before: bytes, after: bytes) -> None:
    attempt, out = AttemptDir(tmp_path), io.StringIO(newline="")
    attempt.stdout.write_bytes(before)

    def later() -> None:
        time.sleep(0.4)  # the follower has read what was there
        with open(attempt.stdout, "ab") as file:
            file.write(after)
        attempt.outcome.write_text("{}")

    writer = threading.Thread(target=later)
    writer.start()
    follow.logs(attempt, out, lines=None, follow=True)
    writer.join()
    assert out.getvalue() == (before + after).decode("utf-8", "replace")


@pytest.mark.parametrize(("lines", "text"), [(None, "a\nb\nc\n"), (2, "b\nc\n"), (9, "a\nb\nc\n"), (0, "")])
def test_last_lines(tmp_path: Path, lines: int | None, text: str) -> None:
    attempt, out = AttemptDir(tmp_path), io.StringIO()
    attempt.stdout.write_text("a\nb\nc\n")
    follow.logs(attempt, out, lines=lines, follow=False)
    assert out.getvalue() == text


@pytest.mark.parametrize("lines", [None, 1, 3, 40_000])
def test_long_log_is_never_held_whole(tmp_path: Path, lines: int | None) -> None:
    attempt = AttemptDir(tmp_path)
    text = "".join(f"{n}: {'한' * 100}\n" for n in range(50_000))
    attempt.stdout.write_text(text)
    wanted = text if lines is None else "".join(text.splitlines(keepends=True)[-lines:])
    with open(tmp_path / "shown", "w") as out:
        tracemalloc.start()
        follow.logs(attempt, out, lines=lines, follow=False)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (tmp_path / "shown").read_text() == wanted
    assert lines == 40_000 or peak < 1 << 20


def test_following_ends_with_a_job_that_left_no_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "_ASK_S", 0.1)
    asked = iter([True, False])
    follow.logs(AttemptDir(tmp_path), io.StringIO(), lines=None, follow=True, active=lambda: next(asked))
    assert list(asked) == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_brackets_of_a_message_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = Terminal()
    with follow._display(out) as show:
        for state, said in (("RUNNING", "see data/[new]/x.jsonl"), ("FAILED", "KeyError: '[/INST] not found'")):
            show([StageState(run="r-1", stage="[b]a[/b]", state=state, key="k", scheduler="local",
                             phase="running", message=said, reason=said)])  # fmt: skip
    assert "[b]a[/b]" in out.getvalue()
    assert "FAILED: KeyError: '[/INST] not found'" in out.getvalue()


def test_waiting_goes_on_where_nobody_reads() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as out:
        show = follow._lines(out)
        for state in ("PENDING", "RUNNING"):
            show([StageState(run="r-1", stage="a", state=state, key="k", scheduler="local")])
