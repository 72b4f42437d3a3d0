"""The finetuning lab on a real cluster: JupyterLab as a job, its notebook run from top to bottom beside it."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hpc.core.assets import TEMPLATES

from .conftest import CHECKOUT
from .project import Project
from .test_jupyter import SSH

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
resources = {{ cpus_per_task = 2, mem_gb = 6, time_min = 15 }}
[environments]
lab = "{lab}"
train = "{train}"
"""


@pytest.fixture
def lab(project: Project, lab_sif: Path, train_sif: Path, demo_files: Path) -> Project:
    """A project like the demo's, with the lab on the cluster."""
    for name in ("data/faq.jsonl", "models/smollm2.gguf"):
        project.write(name, "")
        shutil.copyfile(demo_files / name, project.folder / name)
    site = project.folder / "sites" / "slurm-test.toml"
    site.write_text(site.read_text() + 'login_host = "login"\n')
    project.write("hpc.toml", SETTINGS.format(lab=lab_sif, train=train_sif))
    return project


def ready(lab: Project) -> str:
    """The run of a lab that answers."""
    lab.hpc("submit", "jupyter", "--set", f"jupyter.open={NAME}", "--wait", timeout=180)
    (row,) = lab.states().values()
    assert row["endpoint"], row
    run: str = row["run"]
    return run


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


def execute(
    lab: Project, run: str, name: str, stage: str = "jupyter"
) -> tuple[dict[str, str], list[dict[str, Any]], float]:
    """Run the notebook in the lab's container; cell -> what it printed, all outputs, seconds."""
    workspace = lab.folder / "workspace"
    env = [f"HOME={workspace}", f"HPC_CACHE={lab.folder}/runs/.cache", "IPYTHONDIR=/tmp/ipython-lab"]
    begin = time.monotonic()
    done = lab.hpc(
        "shell", f"{run}/{stage}", "--", "env", *env, "jupyter", "execute", "--inplace", str(workspace / name),
        timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    cells = [c for c in json.loads((workspace / name).read_text())["cells"] if c["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    said = {c["id"]: "".join(t for o in c["outputs"] for t in o.get("text", ())) for c in cells}
    return said, outputs, time.monotonic() - begin


def test_notebook_runs_from_data_to_answers_and_the_same_can_be_planned(lab: Project) -> None:
    run = ready(lab)
    workspace = lab.folder / "workspace"
    assert (workspace / NAME).read_bytes() == (TEMPLATES / "labs" / NAME).read_bytes()
    copy = workspace / "mine.ipynb"
    lab.cluster.run("alice", "cp", str(workspace / NAME), str(copy))
    typed_into(copy, SMALLEST)
    said, outputs, _ = execute(lab, run, "mine.ipynb")

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

    said, _, seconds = execute(lab, run, "mine.ipynb")
    assert all(f"{stage}: done already" in said[cell] for cell, stage in
               (("prepare", "prepare"), ("train", "finetune"), ("merge", "merge")))  # fmt: skip
    assert seconds < 60
    lab.hpc("reset", "jupyter", "--yes")
    assert (workspace / "mine.ipynb").exists()
    assert model.is_dir()


def test_printed_address_opens_the_notebook(lab: Project, browser: Path) -> None:
    run = ready(lab)
    document = lab.json("tunnel", run)
    words = shlex.split(document["command"])
    process = lab.cluster.popen("alice", "ssh", *SSH, *words[1:], node="laptop")
    picture = lab.folder / "picture.png"
    program = shutil.copy(CHECKOUT / "tests" / "support" / "browser.py", lab.folder)
    try:
        time.sleep(1)
        shown = lab.cluster.run(
            "alice", str(browser), str(program), document["url"], str(picture), "Finetuning lab", node="laptop",
            timeout=120,
        )  # fmt: skip
    finally:
        process.terminate()
        process.wait()
    assert shown.stdout.startswith("Finetuning lab")
    shutil.copy(picture, lab.cluster.dir / "lab.png")  # for docs/
    lab.hpc("reset", "jupyter", "--yes")


def test_error_in_a_cell_is_two_sentences(lab: Project) -> None:
    run = ready(lab)
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
    lab.hpc("reset", "jupyter", "--yes")
