"""What a stage reads is compared with what was planned with, and only what was touched is read again."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc.core import digest
from hpc.core.digest import Digests
from hpc.core.errors import UsageError, VerificationFailed
from hpc.core.rundir import RunsDir, StageDir, write_json
from hpc.node.unchanged import check


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder of two large files."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).write_bytes(name.encode() * (1 << 17))
    return folder


@pytest.fixture
def stage(tmp_path: Path, model: Path) -> StageDir:
    """Planned with that folder."""
    runs = RunsDir(tmp_path / "runs")
    made = StageDir(runs.path / "run-1" / "finetune")
    made.path.mkdir(parents=True)
    digests = Digests(runs.digests)
    write_json(made.config, {"reads": {str(model): digests.of(model)}})
    digests.save()
    return made


def test_of_what_nobody_touched_nothing_is_read_and_of_the_rest_what_was(
    stage: StageDir, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    real = digest.sha256
    monkeypatch.setattr(digest, "sha256", lambda path: (read.append(path.name), real(path))[1])
    check(stage)
    assert read == []
    copy = model.parent / "copy"
    copy.write_bytes((model / "b").read_bytes())
    copy.replace(model / "b")
    check(stage)
    assert read == ["b"]


@pytest.mark.parametrize("change", ["edited", "added", "removed"])
def test_another_content_is_refused_and_the_file_is_named(stage: StageDir, model: Path, change: str) -> None:
    if change == "removed":
        (model / "a").unlink()
    else:
        (model / {"edited": "a", "added": "c"}[change]).write_text("x")
    with pytest.raises(VerificationFailed, match=rf"^{model} has changed since finetune was submitted$") as refused:
        check(stage)
    assert refused.value.exit_code == 6


def test_what_is_not_there_is_named(stage: StageDir, model: Path) -> None:
    model.rename(model.with_name("moved"))
    with pytest.raises(UsageError, match=rf"^cannot read {model}: No such file"):
        check(stage)


def test_a_stage_of_an_older_hpc_has_no_list(stage: StageDir) -> None:
    for document in ({}, {"inputs": {}}):
        write_json(stage.config, document)
        check(stage)
    stage.config.unlink()
    check(stage)
