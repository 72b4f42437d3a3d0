"""The finetuning lab on a real cluster: JupyterLab as a job, its notebook run from top to bottom beside it."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from hpc.core.assets import TEMPLATES

from .cluster import Cluster
from .conftest import CHECKOUT
from .project import SITE, Project, jobs
from .test_states import ended
from .tunnels import opened, wish

NAME = "finetuning-lab.ipynb"
SMALLEST = {
    "parameters": "",
    "sizes": "PREPARE.update(max_samples=540, eval_rows=4)\n"
    "FINETUNE.update(max_steps=4, batch_size=1, max_length=64, lora_r=4, save_steps=2)",
}
"""So that the whole takes a minute."""
SETTINGS = """\
site = "slurm-test"
[jupyter]
gpus = 0
folders = ["models", "data"]
resources = {{ cpus_per_task = 2, mem_gb = 6, time_min = 60 }}
[environments]
lab = "{lab}"
train = "{train}"
"""


def made(project: Project, lab_sif: Path, train_sif: Path, demo_files: Path) -> Project:
    """A project like the demo's, with the lab on the cluster."""
    for name in ("data/faq.jsonl", "models/smollm2.gguf"):
        project.write(name, "")
        shutil.copyfile(demo_files / name, project.folder / name)
    project.write("sites/slurm-test.toml", SITE.format(images=lab_sif.parent) + 'login_host = "login"\n')
    project.write("hpc.toml", SETTINGS.format(lab=lab_sif, train=train_sif))
    return project


@pytest.fixture
def lab(project: Project, lab_sif: Path, train_sif: Path, demo_files: Path) -> Project:
    return made(project, lab_sif, train_sif, demo_files)


@pytest.fixture(scope="module")
def folders() -> Iterator[Callable[[], Path]]:
    """Makes folders of alice's that stay until the last test."""
    with ExitStack() as stack:

        def new() -> Path:
            folder = Path(tempfile.mkdtemp(prefix="tests-", dir="/home/alice"))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            shutil.chown(folder, "alice", "alice")
            return folder

        yield new


@pytest.fixture(scope="module", autouse=True)
def idle(cluster: Cluster, hpc_install: Path, lab_sif: Path, folders: Callable[[], Path]) -> Iterator[Project]:
    """A lab that nobody uses, while the other tests run."""
    project = Project(cluster, folders(), hpc_install)
    project.write("sites/slurm-test.toml", SITE.format(images=lab_sif.parent))
    small = "resources = { cpus_per_task = 1, mem_gb = 2, time_min = 60 }"
    project.write("hpc.toml", f'site = "slurm-test"\n[jupyter]\ngpus = 0\nidle_min = 1\n{small}\n')
    project.hpc("submit", "jupyter")
    yield project
    if left := jobs(project, "%i"):
        cluster.run("alice", "scancel", *left)


@pytest.fixture(scope="module")
def running(
    cluster: Cluster, hpc_install: Path, lab_sif: Path, train_sif: Path, demo_files: Path, folders: Callable[[], Path]
) -> Iterator[tuple[Project, str]]:
    """A lab that answers, and its run."""
    project = made(Project(cluster, folders(), hpc_install), lab_sif, train_sif, demo_files)
    project.hpc("submit", "jupyter", "--set", f"jupyter.open={NAME}", "--wait", timeout=180)
    (row,) = project.states().values()
    assert row["endpoint"], row
    yield project, row["run"]
    if left := jobs(project, "%i"):
        cluster.run("alice", "scancel", *left)


def typed_into(path: Path, own: Mapping[str, str]) -> None:
    """Put cells of one's own into a copy of the notebook: tag of a cell -> what is run after it."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    made: list[dict[str, Any]] = []
    for cell in notebook["cells"]:
        made.append(cell)
        for tag in cell["metadata"].get("tags", ()):
            new = {"cell_type": "code", "id": f"own-{tag}", "metadata": {}, "outputs": [], "execution_count": None}
            made.append({**new, "source": own[tag]})
    path.write_text(json.dumps({**notebook, "cells": made}))


def execute(lab: Project, run: str, name: str, stage: str = "jupyter") -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Run the notebook in the lab's container; cell -> what it printed, and all outputs."""
    workspace = lab.folder / "workspace"
    env = [f"HOME={workspace}", f"HPC_CACHE={lab.folder}/runs/.cache", "IPYTHONDIR=/tmp/ipython-lab"]
    done = lab.hpc(
        "shell", f"{run}/{stage}", "--", "env", *env, "jupyter", "execute", "--inplace", str(workspace / name),
        timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    cells = [c for c in json.loads((workspace / name).read_text())["cells"] if c["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    said = {c["id"]: "".join(t for o in c["outputs"] for t in o.get("text", ())) for c in cells}
    return said, outputs


def test_notebook_runs_from_data_to_answers_and_the_same_can_be_planned(running: tuple[Project, str]) -> None:
    lab, run = running
    workspace = lab.folder / "workspace"
    assert (workspace / NAME).read_bytes() == (TEMPLATES / "labs" / NAME).read_bytes()
    copy = workspace / "mine.ipynb"
    lab.cluster.run("alice", "cp", str(workspace / NAME), str(copy))
    typed_into(copy, SMALLEST)
    said, outputs = execute(lab, run, "mine.ipynb")

    assert "language sv" in said["prepare"]
    assert "It learns:" in said["template"]
    learnt = said["template"].partition("It learns:")[2]
    assert "<|im_start|>" not in learnt, "the answers alone"
    assert "4 steps" in said["train"]
    assert "before," in said["train"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "Before:" in said["merge"]
    assert "After:" in said["merge"]
    model = workspace / "lab/merge/out/model"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in model.iterdir()}
    assert (lab.folder / "runs/.cache/models").is_dir(), "the converted model is shared with the runs"

    words = shlex.split(said["cluster"].replace("\\\n", " "))
    assert words[:3] == ["hpc", "submit", "pipeline"]
    planned = lab.json("plan", "pipeline", *words[3:])
    assert [s["stage"] for s in planned["stages"]] == ["prepare", "finetune", "merge"]
    assert planned["stages"][1]["config"]["lora_r"] == 4

    weights = model / "model.safetensors"
    before = weights.stat()
    said, _ = execute(lab, run, "mine.ipynb")
    assert all(f"{stage}: done already" in said[cell] for cell, stage in
               (("prepare", "prepare"), ("train", "finetune"), ("merge", "merge")))  # fmt: skip
    assert (weights.stat().st_ino, weights.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns), "not made again"


def test_printed_address_opens_the_notebook(running: tuple[Project, str], browser: Path) -> None:
    lab, run = running
    document = lab.json("tunnel", run, *wish())
    picture = lab.folder / "picture.png"
    program = shutil.copy(CHECKOUT / "tests" / "support" / "browser.py", lab.folder)
    with opened(lab.cluster, document["command"]):
        shown = lab.cluster.run(
            "alice", str(browser), str(program), document["url"], str(picture), "Finetuning lab", node="laptop",
            timeout=120,
        )  # fmt: skip
    assert shown.stdout.startswith("Finetuning lab")
    shutil.copy(picture, lab.cluster.dir / "lab.png")  # for docs/


def test_error_in_a_cell_is_two_sentences(running: tuple[Project, str]) -> None:
    lab, run = running
    wrong = {
        "nbformat": 4, "nbformat_minor": 5, "metadata": {},
        "cells": [{"cell_type": "code", "id": "a", "metadata": {}, "outputs": [], "execution_count": None,
                   "source": "from hpc.inside import lab\nlab.run('prepare', dat='x', out='y')"}],
    }  # fmt: skip
    path = lab.write("workspace/wrong.ipynb", json.dumps(wrong))
    done: subprocess.CompletedProcess[str] = lab.hpc(
        "shell", f"{run}/jupyter", "--", "env", f"HOME={path.parent}", "jupyter", "execute", "--inplace",
        "--allow-errors", str(path), timeout=120,
    )  # fmt: skip
    (cell,) = json.loads(path.read_text())["cells"]
    assert cell["outputs"][0]["traceback"] == [
        "error: prepare has no setting 'dat'", "  try: did you mean 'data'?"
    ], done.stderr  # fmt: skip


def test_reset_ends_the_lab_and_leaves_what_was_made(running: tuple[Project, str]) -> None:
    lab, _ = running
    lab.hpc("reset", "jupyter", "--yes")
    assert jobs(lab) == []
    kept = ("mine.ipynb", "lab/merge/out/model/model.safetensors")
    assert all((lab.folder / "workspace" / name).is_file() for name in kept)
    assert "nothing to reset" in lab.hpc("reset", "jupyter").stdout


def test_lab_that_nobody_uses_ends_itself(idle: Project) -> None:
    """It has had the time of the other tests for that: Jupyter looks once a minute."""
    row = idle.until(ended("jupyter"), timeout=400)["jupyter"]
    assert row["state"] == "COMPLETED", row
    assert "No kernels for" in "".join((idle.folder / "runs" / row["run"] / "jupyter/attempt-1/stderr").read_text())
    told = idle.hpc("tunnel", "jupyter", check=False)
    assert (told.returncode, f"{row['run']}/jupyter has ended: COMPLETED" in told.stderr) == (5, True)
