"""Apptainer as a library, with a stand-in for the program: which calls it gets, and what its failures become."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc.core.errors import HpcError, RuntimeUnavailable, UsageError, VerificationFailed
from hpc.node import images
from hpc.node.enter import process_start
from hpc.node.images import Apptainer

FAKE = """\
#!{python}
import json, os, sys
words = sys.argv[1:]
with open({calls!r}, "a") as file:
    print(json.dumps([words, {{k: v for k, v in os.environ.items() if k.startswith("APPTAINER_")}}]), file=file)
{body}
"""
MAKES = "open(words[-2], 'w').write('image')"
Fake = Callable[[str], Apptainer]


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    return tmp_path / "calls"


@pytest.fixture
def fake(tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Call it with the program's body: Apptainer with that program."""
    for name in [n for n in os.environ if n.startswith("APPTAINER_")]:
        monkeypatch.delenv(name)

    def made(body: str) -> Apptainer:
        program = tmp_path / "apptainer"
        program.write_text(FAKE.format(python=sys.executable, calls=str(calls), body=body))
        program.chmod(0o755)
        return Apptainer(str(program), tmp_path)

    return made


def called(calls: Path) -> list[tuple[list[str], dict[str, str]]]:
    return [tuple(json.loads(line)) for line in calls.read_text().splitlines()]


# ---- the program


def test_spython_works_where_the_program_is_called_apptainer_alone(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.dumps({"data": {"attributes": {"labels": {"org.hpc.torch": "2"}}}})
    apptainer = fake(f"print({found!r} if 'inspect' in words else 'apptainer version 9')")
    monkeypatch.setenv("PATH", "/usr/bin/nothing")
    assert apptainer.version() == "apptainer version 9"
    assert apptainer.labels(Path("x.sif")) == {"org.hpc.torch": "2"}
    assert os.environ["PATH"] == "/usr/bin/nothing"


def test_labels_of_a_file_that_is_no_image_are_an_error(fake: Fake) -> None:
    with pytest.raises(HpcError, match="cannot be read as an image"):
        fake("sys.exit(255 if 'inspect' in words else 0)").labels(Path("x.sif"))


# ---- build and pull


def test_a_recipe_is_built_with_its_arguments_and_zstd_on_the_chosen_disk(
    fake: Fake, calls: Path, tmp_path: Path
) -> None:
    fake(MAKES).build(tmp_path / "train.def", tmp_path / "part.sif", {"base": "/b.sif", "wheels": "/w"}, {}, None)
    ((words, env),) = called(calls)
    assert words[:2] == ["build", "--force"]
    assert "-comp zstd -Xcompression-level 3" in words
    assert words[-6:-2] == ["--build-arg", "base=/b.sif", "--build-arg", "wheels=/w"]
    assert env == {"APPTAINER_TMPDIR": str(tmp_path / "tmp"), "APPTAINER_CACHEDIR": str(tmp_path / "cache")}


def test_a_cache_that_the_user_chose_is_kept(
    fake: Fake, calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apptainer = fake(MAKES)
    monkeypatch.setenv("APPTAINER_CACHEDIR", "/mine")
    apptainer.pull("docker://h/i", tmp_path / "part.sif", {}, None)
    assert called(calls)[0][1]["APPTAINER_CACHEDIR"] == "/mine"


def test_a_secret_is_in_the_environment_and_never_among_the_arguments(fake: Fake, calls: Path, tmp_path: Path) -> None:
    fake(MAKES).pull("docker://h/i", tmp_path / "part.sif", {"APPTAINER_DOCKER_PASSWORD": "s3cret"}, None)
    ((words, env),) = called(calls)
    assert "s3cret" not in " ".join(words)
    assert env["APPTAINER_DOCKER_PASSWORD"] == "s3cret"
    assert "APPTAINER_DOCKER_PASSWORD" not in os.environ
    assert "s3cret" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize(("source", "verb"), [("docker://h/i", "build"), ("oras://h/i", "pull")])
def test_what_is_a_sif_at_its_source_keeps_its_signatures(
    fake: Fake, calls: Path, tmp_path: Path, source: str, verb: str
) -> None:
    fake(MAKES).pull(source, tmp_path / "part.sif", {}, tmp_path / "auth.json")
    ((words, _),) = called(calls)
    assert words[0] == verb
    assert words[words.index("--authfile") + 1] == str(tmp_path / "auth.json")


def test_an_exit_code_of_0_without_a_file_is_a_failure(fake: Fake, tmp_path: Path) -> None:
    with pytest.raises(HpcError, match="failed"):
        fake("pass").pull("docker://h/i", tmp_path / "part.sif", {}, None)


@pytest.mark.parametrize(
    ("printed", "kind", "said"),
    [
        ("FATAL:   While performing build: dial tcp: lookup h.io: no such host", RuntimeUnavailable, "h.io cannot be"),
        ("FATAL:   Unable to handle library: remote has no library client", RuntimeUnavailable, "no image library"),
        ("FATAL:   reading manifest: unauthorized: authentication required", UsageError, "login"),
        ("FATAL:   reading manifest 9.9 in h.io/i: manifest unknown", UsageError, "h.io does not have"),
        ("FATAL:   conveyor failed: could not parse reference: h.io/i@foo", UsageError, "no address .*h.io/i@foo"),
        ("FATAL:   write /x: no space left on device", HpcError, "no room"),
        ("+ pip install\nE: it broke\nFATAL:   While performing build: exit status 1", HpcError, "E: it broke"),
    ],
)
def test_a_failure_is_explained(fake: Fake, tmp_path: Path, printed: str, kind: type[HpcError], said: str) -> None:
    apptainer = fake(f"print({printed!r}, file=sys.stderr); sys.exit(255)")
    with pytest.raises(HpcError, match=said) as caught:
        apptainer.pull("docker://h.io/i:9.9", tmp_path / "part.sif", {}, None)
    assert type(caught.value) is kind
    assert caught.value.hint


def test_a_recipes_registry_out_of_reach_is_named_and_the_image_is_to_be_brought(fake: Fake, tmp_path: Path) -> None:
    said = 'FATAL:   conveyor failed to get: Get "https://h.io/v2/": dial tcp: lookup h.io on 1.1.1.1:53: no such host'
    apptainer = fake(f"print({said!r}, file=sys.stderr); sys.exit(255)")
    with pytest.raises(RuntimeUnavailable, match=r"^h\.io cannot be reached") as caught:
        apptainer.build(tmp_path / "mine.def", tmp_path / "part.sif", {}, {}, None)
    assert "hpc images pull mine mine.sif" in caught.value.hint


def test_progress_is_the_last_line_and_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_TELL_S", 0.1)
    grows = tmp_path / "part"
    grows.write_bytes(bytes(30_000_000))
    told: list[str] = []

    def tell(text: str) -> None:
        told.append(text)
        if "Creating" in text:
            (tmp_path / "seen").touch()

    script = "printf '\\033[34mINFO:   \\033[0m Creating SIF file...\\n'; until [ -e seen ]; do sleep 0.05; done"
    images.run(["sh", "-c", script], tmp_path / "log", tell, env=os.environ, cwd=tmp_path, grows=grows)
    assert told[-1].endswith(": Creating SIF file... (0.03 GB)")


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_an_end_is_the_end_of_the_program_too(tmp_path: Path, end: signal.Signals) -> None:
    code = (
        "import os, pathlib, sys; sys.path[:0] = sys.argv[2].split(':'); from hpc.node import images\n"
        "here = pathlib.Path(sys.argv[1])\n"
        "images.run(['sh', '-c', 'echo $$ > pid; exec sleep 60'], here / 'log', print, env=os.environ, cwd=here)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), ":".join(sys.path)],
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child.send_signal(end)  # to it alone
    assert child.wait(60) != 0
    program = int((tmp_path / "pid").read_text())
    while process_start(program) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---- signatures, versions


def test_signatures_count_by_the_exit_code(fake: Fake, calls: Path, tmp_path: Path) -> None:
    key = tmp_path / "pub.pem"
    key.touch()
    fake("").verify(tmp_path / "x.sif", key)
    assert called(calls)[0][0] == ["verify", "--key", str(key), str(tmp_path / "x.sif")]
    with pytest.raises(VerificationFailed, match=r"no good signature.*not found for object"):
        fake("print('FATAL: signature not found for object', file=sys.stderr); sys.exit(255)").verify(Path("x"), key)
    with pytest.raises(UsageError, match="there is no key"):
        fake("").verify(Path("x"), tmp_path / "none.pem")


def test_a_key_that_cannot_sign_is_told(fake: Fake, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot be signed.*bad key"):
        fake("print('FATAL: bad key', file=sys.stderr); sys.exit(255)").sign(Path("x.sif"), tmp_path / "k.pem")


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (
            "print('a banner'); print(json.dumps({'torch': '2', 'python': '3.12.1'}))",
            {"torch": "2", "python": "3.12.1"},
        ),
        ("sys.exit(255)", {}),
        ("print('nonsense')", {}),
        ("", {}),
    ],
)
def test_versions_are_asked_of_the_python_inside(fake: Fake, body: str, found: dict[str, str]) -> None:
    assert fake(body).versions(Path("x.sif")) == found


# ---- room


def test_a_workspace_is_private_and_goes(tmp_path: Path) -> None:
    with images.workspace(tmp_path, 1) as work:
        assert work.stat().st_mode & 0o777 == 0o700
        (work / "tmp" / "x").touch()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_build_left_goes_with_the_next_one_but_not_the_work_of_another(tmp_path: Path) -> None:
    killed = tmp_path / "hpc-build-1"
    (killed / "tmp").mkdir(parents=True)
    with images.workspace(tmp_path, 1) as other:
        for folder in (killed, other):
            os.utime(folder, (0, 0))
        with images.workspace(tmp_path, 1):
            assert not killed.exists()
            assert other.exists()


def test_too_little_room_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(HpcError, match=r"GiB free, and .* GiB are needed"), images.workspace(tmp_path, 1 << 60):
        pass
    with pytest.raises(UsageError, match="no folder"), images.workspace(tmp_path / "none", 1):
        pass
