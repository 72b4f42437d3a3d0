"""convert and build on the cluster: a real engine for the CPU in its image, and a STUB of TensorRT-LLM on four GPUs."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc.core import passport
from tests.support import trtllm_stub

from .cluster import Cluster
from .project import SITE, Project, jobs
from .test_environments import ENGINE, MODEL


@pytest.fixture
def project(cluster: Cluster, workdir: Path, hpc_install: Path, serve_cpu_sif: Path) -> Iterator[Project]:
    """A project of alice's with a tiny Llama in `hf`, made in the image itself."""
    made = Project(cluster, workdir, hpc_install)
    made.write("sites/slurm-test.toml", SITE.format(images=serve_cpu_sif.parent))
    made.write("hpc.toml", 'site = "slurm-test"\n[build]\nmodel = "hf"\n[pipeline]\nstages = ["convert", "build"]\n')
    words = ("srun", "apptainer", "-s", "exec", str(serve_cpu_sif), "python3", "-c", MODEL)
    said = cluster.run("alice", *words, cwd=workdir, timeout=120).stdout
    made.write("said.json", said.splitlines()[-1])
    yield made
    left = jobs(made, "%i")
    if left:
        cluster.run("alice", "scancel", *left)


def engine_of(project: Project) -> Path:
    (folder,) = project.folder.glob("runs/*/build/out/engine")
    return folder


CPU = ("--set", "build.engine=onnxruntime_genai")


def test_the_cpu_engine_says_what_transformers_says(project: Project, serve_cpu_sif: Path) -> None:
    shown = project.hpc("submit", "build", *CPU, "--wait", timeout=300)
    engine = engine_of(project)
    inside = ("srun", "apptainer", "-s", "exec", str(serve_cpu_sif), "python3", "-c", ENGINE.replace('"engine"', '"."'))
    said = project.cluster.run("alice", *inside, cwd=engine, timeout=120).stdout
    assert json.loads(said) == json.loads((project.folder / "said.json").read_text()), shown.stderr

    made = passport.read(engine)
    lock = json.loads(serve_cpu_sif.with_suffix(".lock.json").read_text())
    assert (made.engine, made.quantization, made.dtype, made.gpus) == ("onnxruntime_genai", "none", "float32", 0)
    assert made.image == lock["sha256"]
    assert made.versions["onnxruntime-genai"] == lock["versions"]["onnxruntime-genai"]
    assert (made.max_seq_len, made.architecture) == (256, "LlamaForCausalLM")
    passport.refuse(made, image=lock["sha256"], versions=lock["versions"], compute="")
    assert (engine / "tokenizer.json").is_file()

    again = project.hpc("submit", "build", *CPU, "--wait")
    assert "nothing to do for build" in again.stdout, "built once for these settings"


def test_an_int4_engine_is_smaller(project: Project, serve_cpu_sif: Path) -> None:
    project.hpc("submit", "build", *CPU, "--set", "quantization=int4", "--wait", timeout=300)
    engine = engine_of(project)
    assert passport.read(engine).quantization == "int4"
    inside = ("srun", "apptainer", "-s", "exec", str(serve_cpu_sif), "python3", "-c", ENGINE.replace('"engine"', '"."'))
    said = json.loads(project.cluster.run("alice", *inside, cwd=engine, timeout=120).stdout)
    assert len(said) > len("hello"), "it answers"


def test_a_pipeline_for_the_cpu_leaves_convert_out(project: Project) -> None:
    shown = project.hpc("plan", *CPU)
    assert "convert: nothing to do, onnxruntime_genai takes the model as it is" in shown.stdout
    assert [row["stage"] for row in project.json("plan", *CPU)["stages"]] == ["build"]


@pytest.fixture
def stub(project: Project) -> Path:
    """A venv of alice's with the STUB of TensorRT-LLM 1.2.1, as environment trtllm."""
    venv = project.folder / "trtllm"
    subprocess.run(("/usr/bin/python3", "-m", "venv", "--without-pip", venv), check=True)
    examples = trtllm_stub.install(venv)
    project.write(
        "sites/slurm-test.toml",
        (project.folder / "sites" / "slurm-test.toml").read_text()
        + f'gpu = "a100-80"\nenv = {{ HPC_TRTLLM_EXAMPLES = "{examples}", STUB_SECONDS = "1" }}\n'
        + f'environments = {{ trtllm = "{venv}" }}\n',
    )
    for path in (venv, *venv.rglob("*")):
        if not path.is_symlink():
            shutil.chown(path, "alice", "alice")
    return venv


def test_four_ranks_are_built_on_the_four_gpus_of_the_job(project: Project, stub: Path) -> None:
    project.hpc("submit", "pipeline", "--set", "tp_size=2", "--set", "pp_size=2", "--wait", timeout=300)
    engine = engine_of(project)
    ranks = [json.loads((engine / f"rank{rank}.engine").read_text()) for rank in range(4)]
    assert len({rank["gpu"] for rank in ranks}) == 4, ranks
    assert len({rank["host"] for rank in ranks}) == 1
    made = passport.read(engine)
    assert (made.tp_size, made.pp_size, made.compute, made.versions["tensorrt-llm"]) == (2, 2, "8.0", "1.2.1")
    assert (engine / "tokenizer.json").is_file()
    manifest = json.loads((engine.parent.parent / "manifest.json").read_text())
    assert manifest["metrics"]["argv"][0] == "trtllm-build"


def test_what_cannot_be_divided_never_reaches_the_queue(project: Project, stub: Path) -> None:
    shown = project.hpc("submit", "pipeline", "--set", "tp_size=3", check=False)
    assert shown.returncode == 3
    assert "tp_size 3 does not divide the model's 4 attention heads" in shown.stderr
    assert "build.tp_size = " in shown.stderr
    assert jobs(project) == []
