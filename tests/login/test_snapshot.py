"""What is recorded of the user's project: its commit, and a patch that git takes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hpc.login import snapshot


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    git(tmp_path, "init", "--quiet")
    for key in ("user.name", "user.email"):
        git(tmp_path, "config", key, "me")
    (tmp_path / "hpc.toml").write_text("one\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "one")
    return tmp_path


def git(root: Path, *arguments: str, stdin: str = "") -> str:
    done = subprocess.run(["git", "-C", root, *arguments], check=True, capture_output=True, text=True, input=stdin)
    return done.stdout


def test_patch_gives_the_changes_back_whatever_git_shows_them_by(root: Path) -> None:
    git(root, "config", "diff.external", "echo")
    git(root, "config", "color.ui", "always")
    (root / "hpc.toml").write_text("two\n")
    (root / "new").touch()
    state, patch = snapshot.git_state(root)
    assert state == {"commit": git(root, "rev-parse", "HEAD").strip(), "changed": True, "untracked": ["new"]}
    git(root, "checkout", "--quiet", ".")
    git(root, "apply", "-", stdin=patch)
    assert (root / "hpc.toml").read_text() == "two\n"


def test_git_that_does_not_tell_is_not_taken_for_no_change(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tell = snapshot._git
    monkeypatch.setattr(snapshot, "_git", lambda *words: None if "diff" in words else tell(*words))
    state, patch = snapshot.git_state(root)
    assert state is not None
    assert (state["changed"], patch) == (None, "")


def test_outside_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert snapshot.git_state(tmp_path) == (None, "")
