"""What is started on the node: argv, mounts, environment; and no secret in an argv."""

from __future__ import annotations

import csv
from typing import Any

import pytest

from hpc.node.launch import (
    PASSES,
    Bind,
    Launch,
    beside,
    container,
    is_container,
    mount,
    passed,
    process_env,
    venv,
    without_secrets,
)

INNER = ("python3", "-m", "hpc.inside.runner", "merge", "/runs/r-1/merge/config.json", "/runs/r-1/merge/attempt-1")


def sif(**values: Any) -> Launch:
    return container(
        **{
            "program": "apptainer",
            "image": "/images/train.sif",
            "inner": INNER,
            "env": {"PYTHONPATH": "/runs/r-1/code"},
            "passes": PASSES,
            "binds": [Bind("/runs/r-1", writable=True), Bind("/data")],
            "gpus": False,
            "cwd": "/runs/r-1",
            **values,
        }
    )


def test_container_shows_only_what_is_listed() -> None:
    assert sif().argv == (
        *("apptainer", "--silent", "exec", "--cleanenv", "--no-eval", "--no-home", "--no-mount", "cwd"),
        *("--pwd", "/runs/r-1"),
        *("--mount", "type=bind,src=/runs/r-1,dst=/runs/r-1", "--mount", "type=bind,src=/data,dst=/data,ro"),
        "/images/train.sif",
        *INNER,
    )


def test_gpus_add_nv_before_the_image() -> None:
    argv = sif(gpus=True).argv
    assert "--nv" in argv[: argv.index("/images/train.sif")]
    assert "--nv" not in sif().argv


def test_path_that_is_bound_twice_is_mounted_once_and_the_last_wish_counts() -> None:
    launch = sif(binds=[Bind("/a", writable=True), Bind("/b"), Bind("/a")])
    assert launch.binds == (Bind("/a"), Bind("/b"))
    assert launch.argv.count("--mount") == 2


@pytest.mark.parametrize(
    "path",
    [
        "/plain",
        "/with,comma",
        '/with"quote',
        "/with:colon",
        "/with space",
        "/한글/데이터",
        "/all, of:it \"'한글",
        "/=x,ro",
    ],
)
@pytest.mark.parametrize("writable", [True, False])
def test_mount_is_one_csv_record_that_gives_the_path_back(path: str, writable: bool) -> None:
    text = mount(Bind(path, writable=writable))
    assert "\n" not in text
    (record,) = csv.reader([text])
    assert record == ["type=bind", f"src={path}", f"dst={path}"] + ([] if writable else ["ro"])


def test_venv_starts_its_own_python() -> None:
    launch = venv(folder="/venvs/train", inner=INNER, env={"A": "1"}, passes=())
    assert launch.argv == ("/venvs/train/bin/python3", *INNER[1:])
    assert launch.env == {"PATH": "/venvs/train/bin:/usr/local/bin:/usr/bin:/bin", "A": "1"}
    assert (launch.kind, launch.binds) == ("venv", ())


JOB = {
    "PATH": "/host/bin",
    "HOME": "/home/alice",
    "USER": "alice",
    "TMPDIR": "/tmp/alice",
    "LD_LIBRARY_PATH": "/host/lib",
    "PYTHONPATH": "/host/python",
    "SLURM_JOB_ID": "7",
    "CUDA_VISIBLE_DEVICES": "0,1",
    "HF_TOKEN": "hf_secret",
    "APPTAINER_CACHEDIR": "/cache",
    "APPTAINERENV_SNEAKED": "in",
    "SINGULARITYENV_SNEAKED": "in",
    "MY_SECRET": "s3cret",
    "BASH_FUNC_module%%": "() { }",
}


def test_container_program_gets_its_own_variables_and_those_of_the_inside_by_prefix() -> None:
    assert process_env(sif(), JOB) == {
        "PATH": "/host/bin",
        "HOME": "/home/alice",
        "USER": "alice",
        "TMPDIR": "/tmp/alice",
        "LD_LIBRARY_PATH": "/host/lib",
        "APPTAINER_CACHEDIR": "/cache",
        "APPTAINERENV_SLURM_JOB_ID": "7",
        "APPTAINERENV_CUDA_VISIBLE_DEVICES": "0,1",
        "APPTAINERENV_HF_TOKEN": "hf_secret",
        "APPTAINERENV_PYTHONPATH": "/runs/r-1/code",
    }


def test_process_of_a_venv_gets_the_same_variables_as_they_are() -> None:
    launch = venv(folder="/v", inner=INNER, env={"PYTHONPATH": "/code"}, passes=PASSES)
    assert process_env(launch, JOB) == {
        "LANG": "C.UTF-8",
        "HOME": "/home/alice",
        "USER": "alice",
        "TMPDIR": "/tmp/alice",
        "SLURM_JOB_ID": "7",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "HF_TOKEN": "hf_secret",
        "PATH": "/v/bin:/usr/local/bin:/usr/bin:/bin",
        "PYTHONPATH": "/code",
    }


def test_values_that_are_set_beat_those_passed_on() -> None:
    launch = sif(env={"OMP_NUM_THREADS": "4"})
    assert process_env(launch, {"OMP_NUM_THREADS": "64"})["APPTAINERENV_OMP_NUM_THREADS"] == "4"


@pytest.mark.parametrize("kind", ["sif", "venv"])
def test_secret_never_stands_in_the_argv(kind: str) -> None:
    launch = sif() if kind == "sif" else venv(folder="/v", inner=INNER, env={}, passes=PASSES)
    env = process_env(launch, JOB)
    assert "hf_secret" in env.values(), "it does reach the payload"
    assert not any("hf_secret" in word for word in launch.argv)
    assert "hf_secret" not in without_secrets(env).values()


def test_site_may_pass_further_variables_by_pattern() -> None:
    assert passed(("MY_*",), JOB) == {"MY_SECRET": "s3cret"}
    assert passed((), JOB) == {}


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "APPTAINERENV_HF_TOKEN", "NGC_API_KEY", "DB_PASSWORD", "MY_SECRET", "AWS_SECRET_ACCESS_KEY",
     "GITHUB_PAT", "APIKEY", "MY_CREDENTIALS", "DB_PASS", "wandb_api_key"],
)  # fmt: skip
def test_secret_is_not_written_down(name: str) -> None:
    assert without_secrets({name: "x", "TZ": "UTC"}) == {name: "(not shown)", "TZ": "UTC"}


def test_login_in_the_address_of_a_proxy_is_not_written_down() -> None:
    env = {"HTTPS_PROXY": "http://me:s3cret@proxy:3128", "HF_ENDPOINT": "https://hub.example/a@b"}
    assert without_secrets(env) == {**env, "HTTPS_PROXY": "http://(not shown)@proxy:3128"}


@pytest.mark.parametrize("gpus", [True, False])
def test_another_program_in_the_same_container(gpus: bool) -> None:
    launch = sif(gpus=gpus, binds=[Bind("/exec"), Bind("/-x,y")])
    found = beside(launch.argv, ("sh",), "/elsewhere")
    assert found == sif(gpus=gpus, binds=[Bind("/exec"), Bind("/-x,y")], inner=("sh",), cwd="/elsewhere").argv


def test_container_and_venv_are_told_apart() -> None:
    assert is_container(sif().argv)
    assert is_container(sif(program="/opt/exec/bin/singularity").argv)
    assert not is_container(venv(folder="/exec", inner=INNER, env={}, passes=()).argv)
