"""The files of a run: names, whole writes, runs by number, the last lines of a log."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hpc.core.rundir import (
    AttemptDir,
    RunDir,
    RunsDir,
    StageDir,
    append_event,
    last_events,
    read_json,
    tail,
    write_json,
    write_text,
)


def test_every_file_of_a_run_has_its_place() -> None:
    stage = RunDir(Path("/runs/first-1")).stage("merge")
    attempt = stage.attempt(2)
    assert attempt == AttemptDir(Path("/runs/first-1/merge/attempt-2"))
    assert [str(p.relative_to("/runs/first-1/merge")) for p in (stage.manifest, attempt.outcome, attempt.stdout)] == [
        "manifest.json",
        "attempt-2/outcome.json",
        "attempt-2/stdout",
    ]


def test_written_document_comes_back(tmp_path: Path) -> None:
    write_json(tmp_path / "f.json", {"a": [1, "한글"]}, durable=True)
    assert read_json(tmp_path / "f.json") == {"a": [1, "한글"]}
    assert os.listdir(tmp_path) == ["f.json"], "no part is left"


@pytest.mark.parametrize("text", ["", "{", "null", "[]"])
def test_file_that_holds_no_document_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "f.json").write_text(text)
    assert read_json(tmp_path / "f.json") is None


@pytest.mark.parametrize("name", ["none.json", "none/none.json", "file/none.json"])
def test_document_that_is_not_there_is_none(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    assert read_json(tmp_path / name) is None


def test_mode_is_set_from_the_first_moment(tmp_path: Path) -> None:
    write_text(tmp_path / "secret", "x", mode=0o600)
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600


def test_link_in_the_place_of_a_part_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / f".secret.{os.getpid()}.part").symlink_to("mine")
    write_text(tmp_path / "secret", "x", mode=0o600)
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "secret").read_text() == "x"
    assert not (tmp_path / "secret").is_symlink()


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_failed_write_leaves_the_old_file_and_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    write_json(tmp_path / "f.json", {"old": 1})

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, broken, full)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "f.json", {"new": 1}, durable=True)
    assert read_json(tmp_path / "f.json") == {"old": 1}
    assert os.listdir(tmp_path) == ["f.json"]


def test_full_disk_in_the_middle_of_a_write_leaves_the_old_file(tmp_path: Path) -> None:
    """A real ENOSPC-like end: the kernel refuses to let the file grow beyond 4 KiB."""
    write_json(tmp_path / "f.json", {"old": 1})
    code = (
        "import resource, signal, sys; from pathlib import Path; from hpc.core.rundir import write_json\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: write_json(Path(sys.argv[1]), {'new': 'x' * 100000})\n"
        "except OSError as error: raise SystemExit(f'refused: {error.strerror}')"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "f.json"], capture_output=True, text=True)
    assert done.stderr == "refused: File too large\n"
    assert read_json(tmp_path / "f.json") == {"old": 1}
    assert os.listdir(tmp_path) == ["f.json"]


def test_kill_in_the_middle_of_writes_leaves_a_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "f.json"
    code = (
        "import sys; from pathlib import Path; from hpc.core.rundir import write_json; n = 0\n"
        "while True:\n    n += 1; write_json(Path(sys.argv[1]), {'n': n, 'long': 'x' * 200000}); print(n, flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", code, file], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for _ in range(5):
            writer.stdout.readline()
        for _ in range(50):
            document = json.loads(file.read_text())
            assert len(document["long"]) == 200000
        writer.send_signal(signal.SIGKILL)
    assert len(json.loads(file.read_text())["long"]) == 200000


def test_stage_is_done_by_the_manifest_of_its_key(tmp_path: Path) -> None:
    stage = RunDir(tmp_path).stage("merge")
    assert not stage.done("k")
    stage.path.mkdir()
    write_json(stage.manifest, {"key": "k"})
    assert stage.done("k")
    assert not stage.done("other")


def make_runs(folder: Path, *names: str) -> RunsDir:
    for name in names:
        (folder / name).mkdir(parents=True)
        write_json(folder / name / "run.json", {"run": name, "uid": 1, "keys": {}})
    return RunsDir(folder)


def test_runs_come_newest_first_by_number_not_by_name(tmp_path: Path) -> None:
    runs = make_runs(tmp_path, "pipeline-9", "first-10", "pipeline-1")
    assert [run.id for run, _ in runs.runs()] == ["first-10", "pipeline-9", "pipeline-1"]


def test_next_number_is_above_all_names(tmp_path: Path) -> None:
    assert make_runs(tmp_path, "pipeline-9", "first-10").next("pipeline").id == "pipeline-11"


def test_first_run_is_number_one_where_the_folder_is_not_there(tmp_path: Path) -> None:
    runs = RunsDir(tmp_path / "none")
    assert runs.next("pipeline").id == "pipeline-1"
    assert list(runs.runs()) == []


def test_what_is_no_run_is_left_alone(tmp_path: Path) -> None:
    runs = make_runs(tmp_path, "pipeline-1", ".pipeline-2.77.part", "notes", "-3", ".cache")
    (tmp_path / "file-4").write_text("")
    (tmp_path / "empty-5").mkdir()
    assert [run.id for run, _ in runs.runs()] == ["pipeline-1"]
    assert runs.next("x").id == "x-6", "an unfinished folder keeps its number"


def test_run_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    runs = make_runs(tmp_path, "pipeline-1", "theirs-2", "old-3")
    (tmp_path / "theirs-2" / "run.json").unlink()
    (tmp_path / "theirs-2" / "run.json").mkdir()  # as an OSError that root meets too
    write_json(tmp_path / "old-3" / "run.json", {})
    (tmp_path / "loop-4").symlink_to("loop-4")
    (tmp_path / "x-²").mkdir()
    assert [run.id for run, _ in runs.runs()] == ["pipeline-1"]
    stage = RunDir(tmp_path / "theirs-2").stage("merge")
    stage.manifest.mkdir(parents=True)
    assert not stage.done("k")


def test_events_are_lines_with_time_and_phase(tmp_path: Path) -> None:
    append_event(tmp_path / "e", "running", done=1, message="한글")
    append_event(tmp_path / "e", "done")
    first, second = last_events(tmp_path / "e")
    assert (first["phase"], first["done"], first["message"], second["phase"]) == ("running", 1, "한글", "done")
    assert first["t"] <= second["t"]


def test_half_lines_of_the_events_are_skipped(tmp_path: Path) -> None:
    for number in range(100):
        append_event(tmp_path / "e", "running", done=number)
    with open(tmp_path / "e", "a") as file:
        file.write('{"t": 1, "pha')
    found = last_events(tmp_path / "e", size=200)
    assert [e["done"] for e in found] == list(range(100 - len(found), 100))
    assert 0 < len(found) < 10


def test_tail_reads_only_the_end(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"first\n" * 10000 + b"\xff last\n")
    assert tail(tmp_path / "log", size=10)[-1] == "� last"
    assert tail(tmp_path / "none") == []


@pytest.fixture
def made(tmp_path: Path) -> StageDir:
    """A stage of two outputs that is done."""
    stage = RunDir(tmp_path / "out" / "first-1").stage("first")  # a project in a folder `out`
    outputs = {name: {"path": f"/where/it/was/first-1/first/out/{name}"} for name in ("model", "sub/data")}
    for name in outputs:
        (stage.out / name).mkdir(parents=True)
    write_json(stage.manifest, {"key": "k", "outputs": outputs})
    return stage


def test_done_is_what_was_made_and_has_its_outputs(made: StageDir) -> None:
    assert (made.made("k"), made.done("k"), made.emptied("k")) == (True, True, False)
    assert (made.made("other"), made.done("other")) == (False, False)
    (made.out / "sub" / "data").rmdir()
    assert (made.made("k"), made.done("k"), made.emptied("k")) == (True, False, False)
    shutil.rmtree(made.out)
    assert (made.made("k"), made.done("k"), made.emptied("k")) == (True, False, True)


def test_what_has_no_outputs_is_done(made: StageDir) -> None:
    shutil.rmtree(made.out)
    write_json(made.manifest, {"key": "k"})
    assert (made.done("k"), made.emptied("k")) == (True, False)
