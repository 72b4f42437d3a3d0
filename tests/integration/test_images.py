"""`hpc images` with a real Apptainer, as an ordinary user on the login node."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from hpc.core.digest import sha256

from .cluster import Cluster, CommandError
from .conftest import CHECKOUT
from .project import SITE, Project
from .test_states import ended

RECIPE = """\
Bootstrap: localimage
From: {{ base }}

%files
    {{ wheels }} /opt/build/wheels
    requirements.txt /opt/requirements.txt

%post
    python3 "$(echo /opt/build/wheels/pip-*.whl)/pip" install -q --no-index --find-links /opt/build/wheels \\
        --root-user-action ignore -r /opt/requirements.txt

%test
    python3 -c "import six"

%labels
    org.hpc.six 1.17.0
"""


@pytest.fixture(scope="session")
def offline(cluster: Cluster) -> dict[str, str]:
    """The environment that lets pip work on the login node, from which no package index can be reached."""
    folder = cluster.dir / "wheelhouse"
    argv = ("/usr/bin/python3", "-m", "venv", str(folder / "venv"))
    done = subprocess.run(argv, check=False, capture_output=True, text=True, umask=0o022)
    assert done.returncode == 0, done.stderr
    argv = (str(folder / "venv/bin/pip"), "wheel", "-q", "--wheel-dir", str(folder), "pip", "six==1.17.0")
    done = subprocess.run(argv, check=False, capture_output=True, text=True, umask=0o022)
    assert done.returncode == 0, done.stderr
    return {"PIP_ARGS": f"--no-index --find-links {folder}"}


@pytest.fixture
def images(project: Project, base_sif: Path) -> Path:
    """The project's own folder of images, with the base image in it, which nothing is recorded of."""
    folder = project.folder / "images"
    shutil.copy(base_sif, project.write("images/base.sif", ""))
    project.write("sites/slurm-test.toml", project_site(folder))
    toml = project.folder / "hpc.toml"
    project.write("hpc.toml", toml.read_text().replace(str(base_sif), str(folder / "base.sif")))
    return folder


def project_site(folder: Path, extra: str = "") -> str:
    return SITE.format(images=folder) + extra


@pytest.fixture
def keys(project: Project) -> dict[str, str]:
    """A pair of keys, and the public one of another pair."""
    found = {}
    for name in ("mine", "other"):
        private, public = (str(project.folder / f"{name}.{kind}.pem") for kind in ("private", "public"))
        project.cluster.run("alice", "openssl", "genpkey", "-algorithm", "ed25519", "-out", private)
        project.cluster.run("alice", "openssl", "pkey", "-in", private, "-pubout", "-out", public)
        found.update({f"{name} private": private, f"{name} public": public})
    return found


def lock(image: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(image.with_suffix(".lock.json").read_text())
    return document


def tamper(image: Path) -> None:
    """Change one byte in the middle."""
    with open(image, "r+b") as file:
        file.seek(image.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, io.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def refused(project: Project, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = project.hpc(*arguments, check=False)
    assert done.returncode == 6, done.stdout + done.stderr
    return done


def test_two_builds_of_one_image_make_it_once_and_its_lock_says_what_is_inside(
    project: Project, images: Path, offline: dict[str, str]
) -> None:
    project.write("containers/tiny.def", RECIPE)
    project.write("containers/tiny.requirements.txt", "six==1.17.0\n")
    argv = (str(project.venv / "bin" / "hpc"), "images", "build", "tiny", "--json")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    both = [project.cluster.popen("alice", *argv, cwd=project.folder, env=offline, **pipes) for _ in range(2)]
    ends = [(*p.communicate(timeout=180), p.returncode) for p in both]
    assert [code for _, _, code in ends] == [0, 0], ends
    assert sorted(json.loads(out)["fresh"] for out, _, _ in ends) == [False, True]
    said = "".join(err for _, err, _ in ends)
    assert said.count("tiny: building") == 1
    assert "another process makes it; waiting" in said
    image = images / "tiny.sif"
    recorded = lock(image)
    assert recorded["sha256"] == sha256(image)
    assert recorded["versions"]["six"] == "1.17.0"
    assert recorded["versions"]["python"].startswith("3.")
    assert recorded["labels"]["org.hpc.six"] == "1.17.0"
    assert recorded["inputs"]["base"] == sha256(images / "base.sif")
    assert recorded["by"].startswith("alice@")
    assert project.cluster.run("alice", str(image), "-c", "import six; print(six.__version__)").stdout == "1.17.0\n"
    (row,) = [r for r in project.json("images", "list")["images"] if r["name"] == "tiny"]
    assert row["state"] == "recorded"
    project.write("containers/tiny.requirements.txt", "six==1.16.0\n")
    (row,) = [r for r in project.json("images", "list")["images"] if r["name"] == "tiny"]
    assert row["state"] == "outdated"
    assert [p.name for p in images.glob(".tiny.*.sif")] == []


def test_a_recipe_that_fails_shows_why_and_leaves_the_earlier_image(project: Project, images: Path) -> None:
    project.write("containers/tiny.def", "Bootstrap: localimage\nFrom: {{ base }}\n%post\n    echo it broke; false\n")
    project.write("images/tiny.sif", "the earlier one")
    with pytest.raises(CommandError) as caught:
        project.hpc("images", "build", "tiny")
    assert caught.value.result.returncode == 1
    assert "it broke" in caught.value.result.stderr
    assert "Traceback" not in caught.value.result.stderr
    assert (images / "tiny.sif").read_text() == "the earlier one"


SLEEP = f"sleep 61.{os.getpid()}"
"""Nobody else sleeps so long."""


def test_a_build_that_is_interrupted_leaves_nothing(project: Project, images: Path) -> None:
    project.write("containers/slow.def", f"Bootstrap: localimage\nFrom: {{{{ base }}}}\n%post\n    {SLEEP}\n")
    work = project.folder / "work"
    project.cluster.run("alice", "mkdir", str(work))
    build = project.popen("images", "build", "slow", "--tmp", str(work))
    deadline = time.monotonic() + 60
    while SLEEP not in project.cluster.run("alice", "ps", "-u", "alice", "-o", "args").stdout:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    build.send_signal(signal.SIGINT)
    assert "error: interrupted\n  try: nothing half made is left" in build.communicate(timeout=60)[1]
    assert build.returncode == 130
    assert list(work.iterdir()) == []
    assert sorted(p.name for p in images.iterdir()) == [".slow.making", "base.sif"]
    assert SLEEP not in project.cluster.run("alice", "ps", "-u", "alice", "-o", "args").stdout


def test_a_tampered_image_never_gets_a_job(project: Project, images: Path) -> None:
    base = images / "base.sif"
    project.hpc("images", "pull", "base", str(base), "--force")
    recorded = lock(base)["sha256"]
    assert project.hpc("images", "verify").returncode == 0
    tamper(base)
    for arguments in (["submit", "first"], ["images", "verify"], ["images", "verify", "base"]):
        done = refused(project, *arguments)
        assert recorded in done.stdout + done.stderr
        assert sha256(base) in done.stdout + done.stderr
    assert not (project.folder / "runs").exists() or not list((project.folder / "runs").glob("*-1"))


def test_a_run_quotes_what_the_lock_says(project: Project, images: Path) -> None:
    project.hpc("images", "pull", "base", str(images / "base.sif"), "--force")
    project.hpc("submit", "first", "--wait")
    (manifest,) = project.folder.glob("runs/*/first/manifest.json")
    environment = json.loads(manifest.read_text())["environment"]
    assert environment["digest"] == lock(images / "base.sif")["sha256"]
    assert environment["versions"]["python"] == lock(images / "base.sif")["versions"]["python"]


def test_a_site_that_demands_signatures_takes_only_its_own(
    project: Project, images: Path, keys: dict[str, str]
) -> None:
    base = images / "base.sif"
    project.write("sites/slurm-test.toml", project_site(images, f'verify_key = "{keys["mine public"]}"\n'))
    assert "no good signature" in refused(project, "plan", "first").stderr
    project.hpc("images", "sign", "base", "--key", keys["mine private"])
    assert lock(base)["signed"]
    assert lock(base)["sha256"] == sha256(base)
    project.hpc("plan", "first")
    assert "ok, signed" in project.hpc("images", "verify").stdout
    refused(project, "images", "verify", "--key", keys["other public"])
    tamper(base)
    refused(project, "plan", "first")
    base.with_suffix(".lock.json").unlink()  # whoever can change an image can remove its record
    assert "no good signature" in refused(project, "plan", "first").stderr


def test_an_image_is_made_of_a_dockers_archive(project: Project, images: Path) -> None:
    archive(project.write("x.tar", ""))
    project.hpc("images", "pull", "x", "docker-archive:x.tar")
    assert lock(images / "x.sif")["source"] == f"docker-archive:{project.folder}/x.tar"
    assert lock(images / "x.sif")["labels"]["made.by"] == "a test"
    again = project.hpc("images", "pull", "x", "docker-archive:x.tar", check=False)
    assert again.returncode == 2
    assert "--force" in again.stderr


def archive(path: Path) -> None:
    """What `docker save` writes, with one small layer."""
    layer, out = io.BytesIO(), io.BytesIO()
    _tar(layer, {"hello": b"hello"})
    config = {"architecture": "amd64", "os": "linux", "config": {"Labels": {"made.by": "a test"}},
              "rootfs": {"type": "layers", "diff_ids": []}}  # fmt: skip
    config["rootfs"]["diff_ids"].append("sha256:" + hashlib.sha256(layer.getvalue()).hexdigest())  # type: ignore[index]
    manifest = [{"Config": "config.json", "RepoTags": ["x:1"], "Layers": ["layer.tar"]}]
    files = {"config.json": config, "manifest.json": manifest}
    _tar(out, {"layer.tar": layer.getvalue(), **{k: json.dumps(v).encode() for k, v in files.items()}})
    path.write_bytes(out.getvalue())


def _tar(out: io.BytesIO, files: dict[str, bytes]) -> None:
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_a_registry_out_of_reach_is_4_with_the_ways_out(project: Project, images: Path) -> None:
    secret = project.write("key", "nvapi-s3cret")
    secret.chmod(0o600)
    done = project.hpc("images", "pull", "y", "docker://nvcr.io/nvidia/y:1", "--auth", "key", check=False, timeout=60)
    assert done.returncode == 4
    assert "nvcr.io cannot be reached" in done.stderr
    assert "docker-archive:" in done.stderr
    assert "s3cret" not in done.stdout + done.stderr
    assert sorted(p.name for p in images.iterdir()) == [".y.making", "base.sif"]


@pytest.mark.parametrize("name", ["trtllm", "triton"])
def test_an_image_of_ngc_that_cannot_be_reached_is_4_with_the_ways_out(
    project: Project, images: Path, name: str
) -> None:
    refused = project.hpc("images", "build", name, check=False)
    assert refused.returncode == 2
    assert "needs a value for 'digest'" in refused.stderr
    asked = ("--build-arg", f"digest=sha256:{'0' * 64}", "--build-arg", "wheels=.")
    done = project.hpc("images", "build", name, *asked, check=False)
    assert done.returncode == 4, done.stderr
    assert "nvcr.io cannot be reached" in done.stderr
    assert f"hpc images pull {name} {name}.sif" in done.stderr


STUB = """\
Bootstrap: localimage
From: {{ base }}

%files
    {{ wheels }} /opt/build/wheels

%post
    python3 "$(echo /opt/build/wheels/pip-*.whl)/pip" install -q --no-index --no-deps --find-links /opt/build/wheels \\
        --root-user-action ignore numpy
    made=$(echo /usr/local/lib/python3*/dist-packages)/tensorrt_llm-1.dist-info
    mkdir $made
    printf 'Metadata-Version: 2.1\\nName: tensorrt_llm\\nVersion: {{ version }}\\n' >$made/METADATA
    for name in trtllm-build tritonserver; do
        printf '#!/bin/sh\\n' >/usr/local/bin/$name
        chmod 755 /usr/local/bin/$name
    done
    rm -r /opt/build

%environment
    export NVIDIA_TRITON_SERVER_VERSION=26.07
"""
"""A stub of NVIDIA's image: names and versions without what is behind them."""


@pytest.fixture(scope="session")
def ngc_wheels(cluster: Cluster) -> Path:
    """What trtllm.requirements.txt wants, and the numpy of the stub, for the stub's Python."""
    folder = cluster.dir / "ngc-wheels"
    venv = folder / "venv"
    pins = (CHECKOUT / "containers/trtllm.requirements.txt", "pip", "numpy==1.26.4")
    for argv in (
        ("/usr/bin/python3", "-m", "venv", venv),
        (venv / "bin/pip", "wheel", "-q", "--no-deps", "--wheel-dir", folder / "wheels", "-r", *pins),
    ):
        done = subprocess.run(argv, check=False, capture_output=True, text=True, umask=0o022)
        assert done.returncode == 0, done.stderr
    return folder / "wheels"


def stand_on_the_stub(project: Project, name: str) -> None:
    """The project's recipe is the toolkit's but for its header, and its Python is the stub's."""
    text = (CHECKOUT / "containers" / f"{name}.def").read_text()
    text = text.replace("Bootstrap: docker\nFrom: nvcr.io/nvidia/tritonserver@{{ digest }}", "{header}")
    assert "{header}" in text
    text = text.replace("{header}", "Bootstrap: localimage\nFrom: {{ stub }}")
    project.write(f"containers/{name}.def", text.replace("org.hpc.python 3.12", "org.hpc.python 3.11"))
    requirements = (CHECKOUT / "containers" / f"{name}.requirements.txt").read_text()
    project.write(f"containers/{name}.requirements.txt", requirements)


def test_the_recipes_for_ngc_work_on_a_stub_of_its_image(project: Project, images: Path, ngc_wheels: Path) -> None:
    project.write("containers/stub.def", STUB)
    wheels = ("--build-arg", f"wheels={ngc_wheels}")
    stub = ("--build-arg", f"stub={images}/stub.sif", *wheels, "--build-arg", "digest=sha256:0")
    for name in ("trtllm", "triton"):
        stand_on_the_stub(project, name)
    project.hpc("images", "build", "stub", "--build-arg", "version=1.2.1", *wheels)
    made = project.json("images", "build", "trtllm", *stub)
    assert made["versions"]["tensorrt-llm"] == "1.2.1"
    assert made["labels"]["org.hpc.base"] == "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3"
    assert made["labels"]["org.hpc.digest"] == "sha256:0"
    project.hpc("images", "build", "stub", "--build-arg", "version=1.3.0", *wheels)
    for name, further, said in (
        ("trtllm", (), "TensorRT-LLM 1.3.0 builds no engines any more"),
        ("triton", ("--build-arg", "tag=26.06-x"), "the tag is 26.06-x, and the image is of 26.07"),
    ):
        done = project.hpc("images", "build", name, *stub, *further, check=False)
        assert done.returncode == 1
        assert said in done.stderr
    assert project.json("images", "build", "triton", *stub)["versions"]["tensorrt-llm"] == "1.3.0"


def test_an_index_out_of_reach_is_4_with_the_ways_out(project: Project, images: Path) -> None:
    project.write("containers/tiny.def", RECIPE)
    project.write("containers/tiny.requirements.txt", "six==1.17.0\n")
    for further, way_out in ((), "--build-arg wheels="), (("--as", "venv", "--to", "venvs"), "--find-links"):
        done = project.hpc("images", "build", "tiny", *further, check=False, env={"PIP_ARGS": "--retries 1"})
        assert done.returncode == 4, done.stderr
        assert "no package index can be reached" in done.stderr
        assert way_out in done.stderr


def test_the_same_requirements_make_a_venv_where_no_apptainer_is(
    project: Project, images: Path, offline: dict[str, str]
) -> None:
    project.write("containers/tiny.requirements.txt", "six==1.17.0\n")
    path = project.hpc("images", "build", "tiny", "--as", "venv", "--to", "venvs", env=offline).stdout.strip()
    assert path == str(project.folder / "venvs" / "tiny")
    code = "import six; print(six.__version__)"
    assert project.cluster.run("alice", f"{path}/bin/python3", "-c", code).stdout == "1.17.0\n"
    assert "up to date" in project.hpc("images", "build", "tiny", "--as", "venv", "--to", "venvs").stderr


# ---- in a job

LOCAL = "Bootstrap: localimage\nFrom: {{ base }}\n%post\n    "


@pytest.fixture
def scratch(project: Project, images: Path) -> Path:
    """The site's scratch, which the nodes have."""
    folder = project.folder / "scratch"
    project.write("sites/slurm-test.toml", project_site(images, f'scratch = "{folder}"\n'))
    return folder


def test_an_image_is_built_in_a_job_on_a_compute_node(project: Project, images: Path, scratch: Path) -> None:
    project.write("containers/tiny.def", LOCAL + "echo made on $(hostname)")
    done = project.hpc("images", "build", "tiny", "--submit", "--wait")
    assert done.stdout == f"{images}/tiny.sif\n"
    assert "images-1/build-tiny: submitted as job" in done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("tiny: on dgx")]
    assert said.endswith(f", working in {scratch}")
    assert f"tiny: building {images}/tiny.sif" in done.stderr
    assert lock(images / "tiny.sif")["by"].startswith("alice@dgx")
    assert lock(images / "tiny.sif")["sha256"] == sha256(images / "tiny.sif")
    assert list(scratch.iterdir()) == [], "nothing is left on the node's disk"
    again = json.loads(project.hpc("images", "build", "tiny", "--submit", "--wait", "--json").stdout)
    assert (again["state"], again["fresh"]) == ("COMPLETED", False)


def test_a_job_that_builds_goes_on_when_nobody_waits_for_it(project: Project, images: Path, scratch: Path) -> None:
    project.write("containers/tiny.def", LOCAL + "sleep 8")
    build = project.popen("images", "build", "tiny", "--submit", "--wait")
    found = project.until(lambda rows: rows.get("build-tiny", {}).get("phase") == "building", "")
    assert found["build-tiny"]["message"].startswith("tiny: ")
    build.send_signal(signal.SIGINT)
    err = build.communicate(timeout=60)[1]
    assert build.returncode == 130
    assert "error: no longer waiting; images-1 goes on\n  try: hpc logs -f images-1, or hpc cancel images-1" in err
    assert project.until(ended("build-tiny"), "images-1")["build-tiny"]["state"] == "COMPLETED"
    assert lock(images / "tiny.sif")["by"].startswith("alice@dgx")


def test_two_jobs_that_build_one_image_make_it_once(project: Project, images: Path, scratch: Path) -> None:
    project.write("containers/tiny.def", LOCAL + "sleep 5")
    told = [json.loads(project.hpc("images", "build", "tiny", "--submit", "--json").stdout) for _ in range(2)]
    assert [t["run"] for t in told] == ["images-1", "images-2"]
    for one in told:
        project.until(ended("build-tiny"), one["run"])
    logs = [project.hpc("logs", f"{one['run']}/build-tiny").stdout for one in told]
    assert sum("tiny: building" in log for log in logs) == 1
    assert sum("tiny.sif is up to date" in log for log in logs) == 1


def test_a_build_that_fails_in_its_job_says_why(project: Project, images: Path, scratch: Path) -> None:
    project.write("containers/tiny.def", LOCAL + "echo it broke; false")
    done = project.hpc("images", "build", "tiny", "--submit", "--wait", check=False)
    assert done.returncode == 1
    assert "it broke" in done.stderr
    assert "images-1/build-tiny FAILED tiny.def failed with exit code 255: FATAL: While performing" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (images / "tiny.sif").exists()
    assert list(scratch.iterdir()) == []


def test_a_build_that_is_cancelled_in_its_job_leaves_nothing(project: Project, images: Path, scratch: Path) -> None:
    project.write("containers/tiny.def", LOCAL + SLEEP)
    project.hpc("images", "build", "tiny", "--submit")
    while SLEEP not in project.cluster.run("alice", "ps", "-u", "alice", "-o", "args").stdout:
        assert project.states("images-1")["build-tiny"]["state"] in {"PENDING", "RUNNING"}
        time.sleep(0.3)
    project.hpc("cancel", "images-1")
    assert project.until(ended("build-tiny"), "images-1")["build-tiny"]["state"] == "CANCELLED"
    deadline = time.monotonic() + 30
    while SLEEP in project.cluster.run("alice", "ps", "-u", "alice", "-o", "args").stdout:
        assert time.monotonic() < deadline
        time.sleep(0.3)
    assert sorted(p.name for p in images.iterdir()) == [".tiny.making", "base.sif"]


# ---- two users


@pytest.fixture
def shared(project: Project, images: Path) -> Path:
    """A folder of images that alice and bob both may write to; they have no group of their own in common."""
    folder = project.folder / "shared"
    folder.mkdir()
    folder.chmod(0o777)
    project.folder.chmod(0o755)
    shutil.copy(images / "base.sif", folder / "base.sif")
    return folder


def test_two_users_make_one_image_in_turn(project: Project, shared: Path) -> None:
    project.write("containers/tiny.def", LOCAL + "sleep 5")
    arguments = ("images", "build", "tiny", "--to", str(shared))
    first = project.popen(*arguments)
    deadline = time.monotonic() + 30
    while not (shared / ".tiny.making").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    second = project.hpc(*arguments, user="bob", check=False)
    assert first.wait(60) == 0
    assert second.returncode == 0, second.stderr
    assert "another process makes it; waiting" in second.stderr
    assert "tiny.sif is up to date" in second.stderr
    assert lock(shared / "tiny.sif")["by"].startswith("alice@")
    third = project.hpc(*arguments, "--force", user="bob", check=False)
    assert third.returncode == 0, third.stderr
    assert lock(shared / "tiny.sif")["by"].startswith("bob@")
    assert "ok" in project.hpc("images", "verify", "tiny", "--to", str(shared)).stdout
    again = project.hpc(*arguments, "--force")
    assert again.returncode == 0
