"""argv -> exit code and what is printed, for every verb. In a process of its own where that matters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpc import __version__
from hpc.core import errors
from hpc.core.errors import HpcError
from hpc.login import cli, commands, tunnel
from hpc.login.states import Scheduler
from tests.login.test_states import World

VERBS = sorted(cli.COMMANDS)


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in, and no settings from outside."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in [n for n in os.environ if n.startswith("HPC_")]:
        monkeypatch.delenv(name)
    return tmp_path


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """`hpc stages` ends with this error."""

    def fail(options: object) -> int:
        raise error

    monkeypatch.setattr(commands, "stages", fail)


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_tells_what_it_does_and_the_exit_codes(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*verb.split(), "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: hpc {verb}".rstrip())
    assert "130 interrupted" in text
    assert verb == "" or cli.COMMANDS[verb][1:] in " ".join(text.split())


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_function_and_stands_in_the_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(getattr(commands, verb))
    assert cli.main([]) == 0
    assert any(line.split()[:1] == [verb] for line in capsys.readouterr().out.splitlines())


def test_user_without_a_name_and_a_home_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert tunnel.me() == "54321"
    assert cli.main(["plan", "prepare"]) == 3
    assert "the environment 'train' is not there" in capsys.readouterr().err
    assert cli.main(["doctor"]) in (0, 1)
    assert cli.main(["query", "x", "--url", "localhost:1"]) == 2
    assert "you have no home folder here" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [HpcError, *HpcError.__subclasses__()])
def test_error_becomes_its_exit_code_and_two_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: type[HpcError]
) -> None:
    failing(monkeypatch, kind("it is wrong", hint="mend it"))
    assert cli.main(["stages"]) == kind.exit_code
    said = capsys.readouterr()
    assert said.err == "error: it is wrong\n  try: mend it\n"
    assert said.out == ""


def test_error_is_one_document_with_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing(monkeypatch, errors.Refused("한글", hint="h"))
    assert cli.main(["stages", "--json"]) == 3
    document = json.loads(capsys.readouterr().out)
    assert document == {"schema": "hpc.error/1", "error": "한글", "hint": "h", "exit_code": 3}


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "error: interrupted\n  try: jobs that were submitted go on\n"),
        (OSError(28, "No space left on device", "/runs/x"), 1, "error: /runs/x: no space left on device\n"),
        (OSError(122, "Disk quota exceeded", "/runs/x"), 1, "ask for quota"),
        (PermissionError(13, "Permission denied", "/runs/x"), 2, "error: /runs/x: permission denied\n"),
    ],
)
def test_other_ends_are_told_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
) -> None:
    failing(monkeypatch, error)
    assert cli.main(["stages"]) == code
    assert said in capsys.readouterr().err


def test_locale_that_takes_names_for_ascii_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, UnicodeEncodeError("utf-8", "\udced", 0, 1, "surrogates not allowed"))
    assert cli.main(["stages"]) == 2
    assert "is not UTF-8 text" in capsys.readouterr().err
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    assert cli.main(["stages"]) == 2
    assert "set LC_ALL=C.UTF-8" in capsys.readouterr().err


def test_mistake_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli.main(["stages"])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["statsu"], "error: there is no command 'statsu'\n  try: did you mean 'status'?\n"),
        (["zzz"], "choose from: bench, cancel"),
        (["submit"], "error: the following arguments are required: STAGE|pipeline\n  try: `hpc submit --help`"),
        (["plan", "--bogus"], "unrecognized arguments: --bogus"),
        (["logs", "-n", "x"], "argument -n/--lines: invalid int value: 'x'"),
        (["logs", "-n", "-3"], "error: -n -3: too small"),
        (["plan", "tune"], "error: there is no stage 'tune'"),
        (["plan", "--set", "x"], "error: --set x: not NAME=VALUE"),
        (["plan", "--site", "locla"], "error: there is no site profile 'locla'\n  try: did you mean 'local'?"),
        (["plan", "--time", "soon"], "error: --time soon: not a time"),
        (["plan", "--time", "0"], "error: --time 0: not a time"),
        (["plan", "--time", "infinite"], "error: --time infinite: not a time"),
        (["plan", "--from", "merge", "--until", "prepare"], "error: --from merge comes after --until prepare"),
        (["plan", "merge", "--from", "prepare"], "error: 'prepare' is not part of this submission"),
        (["plan", "--from", "mergge"], "error: there is no stage 'mergge'\n  try: did you mean 'merge'?"),
    ],
)
def test_wrong_usage_is_2_and_says_what_was_meant(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["status", "none-1"], 7, "there is no run 'none-1' in"),
        (["logs"], 7, "there are no runs in"),
        (["logs", "none-1"], 7, "there is no run 'none-1' in"),
        (["cancel", "none-1/merge"], 7, "there is no run 'none-1' in"),
        (["logs", "merge"], 7, "no run has a stage 'merge' yet"),
        (["shell"], 7, "there are no runs in"),
        (["shell", "none-1/merge", "--", "ls", "--json"], 7, "there is no run 'none-1' in"),
        (["top", "none-1"], 7, "there is no run 'none-1' in"),
    ],
)
def test_what_is_not_there_is_7(argv: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == code
    assert said in capsys.readouterr().err


def test_status_of_an_empty_folder_is_no_error(capsys: pytest.CaptureFixture[str], project: Path) -> None:
    assert cli.main(["status"]) == 0
    assert capsys.readouterr().err == f"no runs in {project}/runs; `hpc submit pipeline` starts one\n"


def test_top_without_runs_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top"]) == 0
    assert capsys.readouterr().err == "no running stage of yours holds a GPU; `hpc status` shows what runs\n"
    assert document(capsys, "top") == {"schema": "hpc.top/1", "gpus": [], "problems": [], "left_out": 0}


@pytest.mark.parametrize("interval", ["0", "-1", "nan"])
def test_top_needs_some_time_between_samples(interval: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", "--interval", interval]) == 2
    assert "0.5 seconds or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "target", "program"),
    [
        (["shell"], None, []),
        (["shell", "--", "ls", "--", "-l"], None, ["ls", "--", "-l"]),
        (["shell", "first-1", "--node", "dgx01", "--", "hpc", "--json"], "first-1", ["hpc", "--json"]),
    ],
)
def test_what_stands_behind_two_dashes_is_another_programs(
    argv: list[str], target: str | None, program: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    monkeypatch.setattr(commands, "shell", lambda options: found.append(options) or 0)
    assert cli.main(argv) == 0
    assert (found[0].target, found[0].program, found[0].json) == (target, program, False)


def document(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    cli.main([*argv, "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_status_json_of_an_empty_folder(capsys: pytest.CaptureFixture[str], project: Path) -> None:
    assert document(capsys, "status") == {"schema": "hpc.status/1", "runs_folder": f"{project}/runs", "stages": []}


def test_stages_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "stages")
    assert found["schema"] == "hpc.stages/1"
    prepare = next(s for s in found["stages"] if s["stage"] == "prepare")
    assert set(prepare) == {"stage", "consumes", "produces", "environment", "summary"}
    assert prepare["produces"] == {"dataset": "dataset"}


def test_doctor_says_for_each_check_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "hpc.doctor/1"
    verdicts = {c["what"]: c["verdict"] for c in found["checks"]}
    assert {"hpc", "submitit", "settings", "runs", "scheduler"} <= set(verdicts)
    assert code == (1 if "missing" in verdicts.values() else 0)
    assert all(c["hint"] for c in found["checks"] if c["verdict"] == "missing")


def test_doctor_of_broken_settings_names_them(capsys: pytest.CaptureFixture[str], project: Path) -> None:
    (project / "hpc.toml").write_text("[finetune]\nlora_r = 'x'")
    assert cli.main(["doctor"]) == 1
    assert "finetune.lora_r = 'x' does not fit" in capsys.readouterr().out


# ---- the program itself


def hpc(*argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "hpc", *argv], capture_output=True, text=True, **options
    )


def test_version_is_the_packages() -> None:
    assert hpc("--version").stdout == f"hpc {__version__}\n"


def test_exit_code_reaches_the_shell() -> None:
    assert hpc("status", "none-1").returncode == 7


def test_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m hpc stages | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("command", "code", "shown"),
    [
        ("stages >&-", 0, ""),
        ("status --json >&- 2>&- <&-", 0, ""),
        ("nosuch --json 2>&-", 2, '{"schema": "hpc.error/1"'),
        ("query - --url localhost:1 <&- 2>&1", 2, "error: there is no question"),
        ("nosuch --json >/dev/full 2>&1", 2, ""),
        ("nosuch --json 2>&1 | true", 2, ""),
        ("stages --json 2>&1 >/dev/full", 1, "error: the disk: no space left on device\n"),
    ],
)
def test_a_stream_that_is_closed_or_full_changes_no_exit_code(command: str, code: int, shown: str) -> None:
    line = f"{sys.executable} -W error -m hpc {command}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, "")
    assert done.stdout.startswith(shown)
    assert done.stdout.count("error:") == shown.count("error:")
    assert "Traceback" not in done.stdout


def test_output_that_is_no_terminal_has_no_colours() -> None:
    assert "\033" not in hpc("stages", env={**os.environ, "FORCE_COLOR": "1", "TERM": "xterm"}).stdout


def test_stages_lists_what_each_consumes_and_produces() -> None:
    rows = {line.split()[0]: line for line in hpc("stages").stdout.splitlines()}
    assert rows["STAGE"].split() == ["STAGE", "CONSUMES", "PRODUCES", "ENVIRONMENT", "WHAT", "IT", "DOES"]
    assert rows["prepare"].split()[1:4] == ["records,", "hf_model", "dataset"]
    assert rows["jupyter"].split()[1:3] == ["-", "-"]
    assert rows["fetch"].split()[2:5] == ["by", "its", "settings"]
    assert "hf_model" in rows["merge"]


def test_wrong_usage_is_a_document_too_with_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--json", "--bogus"]) == 2
    assert json.loads(capsys.readouterr().out)["exit_code"] == 2


def test_status_is_one_document_while_slurm_is_down(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], project: Path
) -> None:
    world = World(project / "runs")
    world.job(world.run())
    world.down = {"squeue", "sacct"}
    monkeypatch.setattr(commands, "Scheduler", lambda: Scheduler(user="alice", call=world))
    assert cli.main(["status", "--json"]) == 4
    found = json.loads(capsys.readouterr().out)
    assert found["stages"][0]["state"] == "UNKNOWN"
    assert "Unable to contact" in found["problem"]


def test_run_whose_file_is_empty_is_passed_over(capsys: pytest.CaptureFixture[str], project: Path) -> None:
    """What a machine that lost its power may leave."""
    world = World(project / "runs")
    world.run("pipeline-1")
    (world.run("pipeline-2").run).write_text("")
    assert {s["run"] for s in document(capsys, "status")["stages"]} == {"pipeline-1"}


def test_latest_run_is_none_of_images_where_there_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hpc.core.rundir import RunDir
    from hpc.login import targets

    mine = [(RunDir(tmp_path / name), {}) for name in ("images-3", "pipeline-2", "finetune-1")]
    monkeypatch.setattr(targets, "mine", lambda: mine)
    assert targets.target(None)[0].id == "pipeline-2"
    monkeypatch.setattr(targets, "mine", lambda: mine[:1])
    assert targets.target(None)[0].id == "images-3"
