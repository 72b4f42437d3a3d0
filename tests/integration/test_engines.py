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

from ..inside.test_lorarrays import adapter
from .cluster import Cluster
from .conftest import CHECKOUT
from .project import SITE, Project, jobs
from .test_environments import ENGINE, MODEL
from .test_states import ended


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


def test_four_ranks_on_two_nodes_are_built_and_served(project: Project, stub: Path) -> None:
    """Each is a task of Slurm, with a GPU of its own; the first one's door answers, and ends them all."""
    pins = CHECKOUT / "containers" / "trtllm.requirements.txt"
    argv = (
        "/usr/bin/python3",
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        next(stub.glob("lib/*/site-packages")),
    )
    done = subprocess.run((*argv, "-r", pins, "numpy==1.26.4"), check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    trtllm_stub.install(stub, server=True)
    project.write("hpc.toml", (project.folder / "hpc.toml").read_text().replace('"build"]', '"build", "serve"]'))
    project.write(
        "sites/slurm-test.toml", 'mpi = "pmi2"\n' + (project.folder / "sites" / "slurm-test.toml").read_text()
    )
    ranks = ("tp_size=2", "pp_size=2", "nodes=2")
    words = [word for name in ranks for word in ("--set", f"build.{name}")]
    words += ["--set", "serve.private=false", "--set", "serve.resources.cpus_per_task=1"]
    plan = project.hpc("plan", *words).stdout
    assert "build: 2 nodes with 2 ranks of MPI each" in plan
    assert "serve: 2 nodes with 2 ranks each (srun --mpi), shared nodes" in plan
    shown = project.hpc("submit", "pipeline", *words, "--wait", timeout=300)
    built = [json.loads((engine_of(project) / f"rank{rank}.engine").read_text()) for rank in range(4)]
    assert len({(rank["host"], rank["gpu"]) for rank in built}) == 4, built
    assert len({rank["host"] for rank in built}) == 2
    made = passport.read(engine_of(project))
    assert (made.tp_size, made.pp_size) == (2, 2)
    assert "/serve is ready on" in shown.stderr
    (row,) = (row for row in project.json("status")["stages"] if row["stage"] == "serve")
    folder = Path(row["folder"])
    token, base = (folder / "token").read_text(), f"http://{row['endpoint']}"
    asked = ("curl", "-s", "-H", f"Authorization: Bearer {token}", "-d", '{"text_input": "x"}')
    said = project.cluster.run("alice", *asked, f"{base}/v2/models/ensemble/generate").stdout
    served = sorted(json.loads(said)["ranks"], key=lambda rank: int(rank["rank"]))
    assert [rank["rank"] for rank in served] == [0, 1, 2, 3]
    assert {rank["ranks"] for rank in served} == {4}
    assert len({(rank["host"], rank["gpu"]) for rank in served}) == 4, served
    assert [len({rank[name] for rank in served}) for name in ("host", "shm")] == [2, 4]
    assert served[0]["host"] == served[1]["host"] == row["node"].split("[")[0] or row["endpoint"].startswith(
        served[0]["host"]
    )
    project.hpc("cancel", row["run"])
    end = project.until(ended("serve"), row["run"], 60)["serve"]
    assert end["state"] == "CANCELLED"
    for number in range(4):
        log = (folder / "attempt-1" / (f"task-{number}" if number else "") / "stdout").read_text()
        assert ("Triton has ended with exit code 0" in log) is (number == 0)
        assert (f"rank {number} of 4 on" in log) is (number > 0)
    left = project.cluster.run("alice", "ps", "-u", "alice", "-o", "args=").stdout
    assert str(folder / "repository") not in left

    # and one that dies: its reason is the job's
    project.write(
        "sites/slurm-test.toml",
        (project.folder / "sites" / "slurm-test.toml")
        .read_text()
        .replace("STUB_SECONDS", 'STUB_RANK_DIES = "3", STUB_SECONDS'),
    )
    project.hpc("submit", "serve", *words, "--wait", check=False, timeout=120)
    end = project.until(ended("serve"), timeout=60)["serve"]
    assert end["state"] == "FAILED"
    assert end["reason"].startswith(f"rank 3 on {served[3]['host'][:3]}"), end
    assert "expecting compute 9.0" in end["reason"]
    assert "another type of GPU" in end["hint"]


def test_what_cannot_be_divided_never_reaches_the_queue(project: Project, stub: Path) -> None:
    shown = project.hpc("submit", "pipeline", "--set", "tp_size=3", check=False)
    assert shown.returncode == 3
    assert "tp_size 3 does not divide the model's 4 attention heads" in shown.stderr
    assert "build.tp_size = " in shown.stderr
    adapter(project.folder / "stars", {"q_proj": 8})
    given = ("--set", 'build.lora=["stars=stars"]', "--set", "build.max_lora_rank=4")
    shown = project.hpc("submit", "pipeline", *given, check=False)
    assert (shown.returncode, "stars has rank 8, and build.max_lora_rank is 4" in shown.stderr) == (3, True)
    assert jobs(project) == []
