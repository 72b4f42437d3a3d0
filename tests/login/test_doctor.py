"""Single checks of `hpc doctor`."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc.login import doctor
from hpc.login.settings import load, locate


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ("hpc.toml", "cannot be written"),
        ("a:b", "has a colon in its name"),
        ("a%j", "has a percent sign in its name"),
        ("caf\udce9", "is no UTF-8 text"),
    ],
)
def test_run_folder_that_submit_refuses_is_missing(runs: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "hpc.toml").write_text("")
    found = doctor._runs(load(locate({"HPC_RUNS": runs}, tmp_path), env={}))
    assert (found.verdict, found.found) == ("missing", f"{tmp_path}/{runs} {said}")


@pytest.mark.parametrize(
    ("scope", "verdict"), [(None, "ok"), ("0", "ok"), ("1", "ok"), ("2", "warning"), ("3", "warning")]
)
def test_whether_fuse_helpers_can_be_shielded_is_yamas_word(
    scope: str | None, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ptrace_scope"
    monkeypatch.setattr(doctor, "_PTRACE", file)
    if scope is not None:
        file.write_text(f"{scope}\n")
    found = doctor._tracing()
    assert found.verdict == verdict
    assert bool(found.hint) == (verdict != "ok")
    if verdict == "warning":
        assert f"ptrace_scope is {scope} here" in found.found
        assert "ptrace_scope = 1 on the nodes" in found.hint
