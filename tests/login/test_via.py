"""`hpc --via`: which machine is meant, the words arrive there as they were typed, and what goes wrong is said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hpc.core.errors import HpcError, RuntimeUnavailable, UsageError
from hpc.login import cli, ssh, via
from hpc.login.via import Place, place, remote, take

ODD = [
    "",
    " ",
    "a b",
    "it's",
    '"q"',
    "$(id -u)",
    "`id`",
    "$HOME",
    "!x !!",
    "\\n",
    "a\nb",
    "*",
    "~",
    "한글 é",
    "-n",
    "a;b&c|d",
    "x=y",
]
SHELLS = [shell for shell in ("sh", "bash", "dash", "tcsh", "zsh", "fish") if shutil.which(shell)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("login", Place("login")),
        ("kim@login", Place("kim@login")),
        ("kim@portal@login:p", Place("kim@portal@login", "p")),
        ("login:/shared/a b:c", Place("login", "/shared/a b:c")),
        ("login:~", Place("login")),
        ("login:~/lab", Place("login", "lab")),
        ("[2001:db8::1]:lab", Place("2001:db8::1", "lab")),
        ("kim@[2001:db8::1]", Place("kim@2001:db8::1")),
    ],
)
def test_place(text: str, expected: Place) -> None:
    assert place(text, {}) == expected


@pytest.mark.parametrize("text", ["", ":lab", "kim@", "-oProxyCommand=x", "kim@-x", "-l@login", "a b", "kim@a b"])
def test_what_names_no_machine_or_is_an_option_to_ssh_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="names no login node"):
        place(text, {})


def test_login_name_of_the_environment_is_for_places_without_one() -> None:
    env = {"HPC_LOGIN": "k7m"}
    assert place("login:lab", env) == Place("k7m@login", "lab")
    assert place("kim@login", env).host == "kim@login"


@pytest.mark.parametrize("name", ["-oProxyCommand=x", "a b", "$(id)"])
def test_login_name_that_is_no_word_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="is no name"):
        place("login", {"HPC_LOGIN": name})
    with pytest.raises(UsageError, match="is no name"):
        Place("kim@login").as_user(name)


def test_folder_of_the_environment_is_for_places_without_one() -> None:
    env = {"HPC_VIA_FOLDER": "lab"}
    assert place("login", env).folder == "lab"
    assert place("login:other", env).folder == "other"


@pytest.mark.parametrize(
    ("argv", "env", "host", "rest"),
    [
        (["--via", "a", "status"], {}, "a", ["status"]),
        (["--via=a", "status", "-a"], {}, "a", ["status", "-a"]),
        (["tunnel", "--via", "a", "x"], {}, "a", ["tunnel", "x"]),
        (["status"], {"HPC_VIA": "b"}, "b", ["status"]),
        (["--via", "a", "status"], {"HPC_VIA": "b"}, "a", ["status"]),
        (["--via", "", "status"], {"HPC_VIA": "b"}, None, ["status"]),
        (["--help"], {"HPC_VIA": "b"}, None, ["--help"]),
        (["--via", "a", "--version"], {}, "a", ["--version"]),
        (["status", "--", "--via"], {}, None, ["status", "--", "--via"]),
        (["status"], {}, None, ["status"]),
    ],
)
def test_which_machine_is_meant(argv: list[str], env: dict[str, str], host: str | None, rest: list[str]) -> None:
    there, left = take(argv, env)
    assert (there.host if there else None, left) == (host, rest)


def test_via_without_a_machine_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="needs a login node"):
        take(["status", "--via"], {})


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """A folder with a program that prints where and with which words it was called."""
    (tmp_path / "a b'c").mkdir()
    program = tmp_path / "hp c"
    program.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "print(json.dumps([os.getcwd(), sys.argv[1:], os.environ['HPC_VIA'], os.environ['HPC_CALLED_BY_SSH']]))\n"
    )
    program.chmod(0o755)
    return tmp_path


def called(shell: str, command: str, home: Path) -> subprocess.CompletedProcess[str]:
    """What sshd does with a command line: the user's shell gets it."""
    env = {"HOME": str(home), "PATH": os.environ["PATH"]}
    return subprocess.run([shell, "-c", command], cwd=home, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("shell", SHELLS)
def test_words_arrive_as_they_were_typed(shell: str, there: Path) -> None:
    done = called(shell, remote(ODD, "a b'c", {"HPC_REMOTE": str(there / "hp c")}), there)
    assert json.loads(done.stdout) == [str(there / "a b'c"), ODD, "", "1"], done.stderr


def test_nothing_that_any_shell_would_change_is_within_the_quotes() -> None:
    command = remote(ODD, "", {})
    assert not set("!\n`") & set(command)
    assert command.isascii()


def test_program_of_the_home_folder(there: Path) -> None:
    done = called("sh", remote(["x"], "", {"HPC_REMOTE": "~/hp c"}), there)
    assert json.loads(done.stdout)[1] == ["x"]


def test_what_the_login_shell_prints_is_no_part_of_the_answer(there: Path) -> None:
    (there / ".bash_profile").write_text("echo Welcome; PATH=$PATH:$HOME/bin\n")
    (there / "bin").mkdir()
    (there / "hp c").rename(there / "bin" / "hpc")
    done = called("sh", remote(["x"], "", {}), there)
    assert json.loads(done.stdout)[1] == ["x"], "found on the PATH that the login shell sets"
    assert "Welcome" in done.stderr


def test_missing_folder_and_missing_program_are_told_apart(there: Path) -> None:
    here = Place("login", "none")
    with pytest.raises(UsageError, match="login has no folder 'none'"):
        via.outcome(called("sh", remote([], "none", {}), there).returncode, [], here)
    with pytest.raises(RuntimeUnavailable, match="no hpc on login") as caught:
        via.outcome(called("sh", remote([], "", {}), there).returncode, [], here)
    assert "HPC_REMOTE" in caught.value.hint


@pytest.mark.parametrize(
    ("said", "kind", "message"),
    [
        ("kim@h: Permission denied (publickey,password).", ssh.LoginRefused, "does not let you in"),
        ("Received disconnect from h port 22:2: Too many authentication failures", ssh.LoginRefused, "let you in"),
        ("ssh: Could not resolve hostname h: Name or service not known", RuntimeUnavailable, "no machine called h"),
        ("ssh: connect to host h port 22: Connection refused", RuntimeUnavailable, "takes no ssh"),
        ("ssh: connect to host h port 22: Operation timed out", RuntimeUnavailable, "cannot be reached"),
        ("Timeout, server h not responding.", RuntimeUnavailable, "cannot be reached"),
        ("Host key verification failed.", RuntimeUnavailable, "host key"),
        ("@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.", RuntimeUnavailable,
         "another host key"),
        ("kex_exchange_identification: Connection closed by remote host", RuntimeUnavailable, "closed the connection"),
        ("Bad configuration option: foo", RuntimeUnavailable, "Bad configuration option: foo"),
        ("", RuntimeUnavailable, "said nothing"),
    ],
)  # fmt: skip
def test_failures_of_ssh_are_one_sentence(said: str, kind: type[HpcError], message: str) -> None:
    error = ssh.failure(said.splitlines(), "kim@h")
    assert type(error) is kind
    assert message in error.message
    assert error.hint
    assert error.exit_code == 4


def test_ssh_is_what_hpc_ssh_says() -> None:
    assert ssh.program({}) == ["ssh"]
    assert ssh.program({"HPC_SSH": "ssh -F 'my file'"}) == ["ssh", "-F", "my file"]
    with pytest.raises(UsageError, match="HPC_SSH"):
        ssh.program({"HPC_SSH": "ssh '"})
    with pytest.raises(RuntimeUnavailable, match="no /no/ssh"):
        ssh.start(["/no/ssh"])


def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """An ssh that runs this shell code instead."""
    program = tmp_path / "fake-ssh"
    program.write_text(f"#!/bin/sh\n{code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("HPC_SSH", str(program))


@pytest.mark.parametrize("code", [0, 1, 7, 8, 130])
def test_exit_code_is_that_of_there(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, monkeypatch, f"exit {code}")
    assert cli.main(["--via", "login", "status"]) == code


def test_ssh_failure_is_a_document_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(tmp_path, monkeypatch, "echo 'kim@login: Permission denied (publickey).' >&2; exit 255")
    monkeypatch.setenv("HPC_VIA", "kim@login")
    assert cli.main(["status", "--json"]) == 4
    document = json.loads(capsys.readouterr().out)
    assert (document["schema"], document["exit_code"]) == ("hpc.error/1", 4)
    assert "login name may have expired" in document["hint"]


def test_environment_alone_sends_no_help_away(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HPC_VIA", "login")
    monkeypatch.setenv("HPC_SSH", "/no/ssh")
    assert cli.main([]) == 0
    assert "usage: hpc" in capsys.readouterr().out
    assert cli.main(["status"]) == 4


def test_options_of_the_laptop_need_a_login_node(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tunnel", "--open"]) == 2
    assert "--via" in capsys.readouterr().err
