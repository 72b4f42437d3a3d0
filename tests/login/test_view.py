"""What a person sees: whole plain columns where there is no terminal, the same words on one."""

from __future__ import annotations

import io
import re

import pytest

from hpc.login import view
from hpc.login.states import StageState


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def state(**values: object) -> StageState:
    usual: dict[str, object] = {
        "run": "pipeline-1",
        "stage": "first",
        "state": "RUNNING",
        "key": "k",
        "scheduler": "slurm",
    }
    return StageState(**{**usual, **values})  # type: ignore[arg-type]


ROWS = [
    state(job_id="1234567", elapsed_s=65, limit_min=60, node="dgx01", done=1, total=4, message="training"),
    state(stage="second", state="PENDING", job_id="1234568", limit_min=2880, reason="waits for the stage before it"),
    state(run="a-very-long-name-of-a-pipeline-that-nobody-may-cut-12345", state="FAILED", reason="x" * 200),
]


def lines() -> list[str]:
    out = io.StringIO()
    view.status(ROWS, out)
    return out.getvalue().splitlines()


def test_columns_stand_under_their_headings() -> None:
    head, *rows = lines()
    for word, cells in {"JOBID": ["1234567", "1234568", "-"], "STATE": ["RUNNING", "PENDING", "FAILED"]}.items():
        assert [r[head.index(word) :].split()[0] for r in rows] == cells


def test_row_tells_time_limit_node_and_progress() -> None:
    cells = ["1234567", "RUNNING", "1:05", "1:00:00", "dgx01", "━━━─────────  25%  training"]
    assert lines()[1].split(maxsplit=6)[1:] == cells


def test_plain_output_cuts_nothing_and_has_no_colours() -> None:
    text = "\n".join(lines())
    assert "a-very-long-name-of-a-pipeline-that-nobody-may-cut-12345/first" in text
    assert "x" * 200 in text
    assert "\033" not in text


def test_plain_output_has_no_blanks_at_the_end_of_a_line() -> None:
    assert [line for line in lines() if line != line.rstrip()] == []


def test_terminal_shows_the_same_words_in_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Terminal()
    view.status(ROWS, out)
    assert "\033[1;32mRUNNING" in out.getvalue()
    plain = re.sub(r"\033\[[0-9;]*m", "", out.getvalue())
    assert plain.split() == "\n".join(lines()).split()


def test_table_of_no_rows_is_its_headings() -> None:
    out = io.StringIO()
    view.table(("A", "B"), [], out)
    assert out.getvalue() == "A  B\n"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"state": "RUNNING", "phase": "starting"}, "starting"),
        ({"state": "RUNNING", "phase": "running", "done": 1, "total": 2, "message": "m"}, "━━━━━━──────  50%  m"),
        ({"state": "RUNNING", "phase": "running", "done": 5, "total": 2}, "━━━━━━━━━━━━ 100%"),
        ({"state": "RUNNING", "phase": "running", "done": None, "total": 2}, "────────────   0%"),
        (
            {"state": "RUNNING", "phase": "staging", "done": 62, "total": 100, "message": "1.1 GB/s"},
            "staging ━━━━━━━─────  62%  1.1 GB/s",
        ),
        (
            {"state": "RUNNING", "phase": "staging", "done": 0, "total": 100, "message": "waits for its turn"},
            "staging  waits for its turn",
        ),
        ({"state": "RUNNING", "phase": "checking", "message": "it was touched"}, "checking  it was touched"),
        ({"state": "PENDING", "reason": "why", "done": 1, "total": 2}, "why"),
        ({"state": "COMPLETED"}, ""),
    ],
)
def test_last_column_is_progress_or_reason(values: dict[str, object], text: str) -> None:
    assert view.progress(state(**values)) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0, "0:00"), (9.9, "0:09"), (3599, "59:59"), (86399, "23:59:59"), (86400, "1-00:00:00")],
)
def test_clock_is_slurms(seconds: float | None, text: str) -> None:
    assert view.clock(seconds) == text
