"""finetune on two nodes of a real Slurm, in the train image: requeued in the middle, and with a rank that dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from hpc.core import rundir
from tests.support.slowed import slowed

from .project import Project
from .test_states import ended, submit

TINY = Path(__file__).resolve().parent.parent / "support" / "tiny.py"
SETTINGS = """\
site = "slurm-test"
[pipeline]
stages = ["finetune"]
[finetune]
base_model = "tiny"
dataset = "data"
lora_r = 4
target_modules = ["all-linear"]
learning_rate = 1e-2
max_steps = 60
batch_size = 2
max_length = 64
save_steps = 10
gradient_checkpointing = false
resources = { nodes = 2, gpus_per_node = 0, cpus_per_task = 1, mem_gb = 4, time_min = 30 }
"""


@pytest.fixture
def trained(project: Project, train_sif: Path) -> Project:
    shutil.copy(TINY, project.folder / "tiny.py")
    make = ("apptainer", "exec", "--bind", str(project.folder), str(train_sif), "python3", "tiny.py", "tiny", "data")
    project.cluster.run("alice", *make, node="dgx01", cwd=project.folder, timeout=120)
    project.write("hpc.toml", SETTINGS)
    return project


def stage_of(project: Project, run: str) -> Path:
    return project.folder / "runs" / run / "finetune"


def metrics(project: Project, run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((stage_of(project, run) / "manifest.json").read_text())["metrics"]
    return found


def under_way(project: Project, run: str) -> None:
    """Training, some steps from its begin and from its end."""
    project.until(lambda f: f["finetune"]["message"].startswith("training") and f["finetune"]["done"] >= 12, run, 180)


def ranks(project: Project, run: str) -> dict[int, tuple[int, str]]:
    """Rank -> its process and its node."""
    stage = str(stage_of(project, run) / "config.json").encode()
    found: dict[int, tuple[int, str]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            values = dict(v.partition(b"=")[::2] for v in (entry / "environ").read_bytes().split(b"\0"))
        except OSError:
            continue
        if b"hpc.inside.runner" in words and stage in words and b"RANK" in values:
            found.setdefault(int(values[b"RANK"]), (int(entry.name), values[b"SLURMD_NODENAME"].decode()))
    return found


def test_two_nodes_requeued_go_on_with_the_losses_of_an_uninterrupted_run(trained: Project) -> None:
    whole = submit(trained, "finetune")
    cut = submit(trained, "finetune", "--set", "keep_checkpoints=3")
    trained.until(lambda f: f["finetune"]["message"].startswith(("measuring", "training")), cut, 180)
    with slowed(*(pid for pid, _ in ranks(trained, cut).values())):  # so few steps of so small a model are soon over
        under_way(trained, cut)
        trained.cluster.run("alice", "scontrol", "requeue", str(trained.states(cut)["finetune"]["job_id"]))
    for run in (whole, cut):
        found = trained.until(ended("finetune"), run, 300)["finetune"]
        assert found["state"] == "COMPLETED", (
            found,
            (stage_of(trained, run) / "attempt-1" / "stderr").read_text()[-3000:],
        )
    one, other = metrics(trained, whole), metrics(trained, cut)
    assert (one["ranks"], one["resumed_from"], len(one["losses"])) == (2, None, 60)
    assert other["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert other["eval_loss_after"] == pytest.approx(one["eval_loss_after"], rel=1e-5)

    attempt = rundir.AttemptDir(stage_of(trained, cut) / "attempt-1")
    stops = [e for e in rundir.last_events(attempt.events, 1 << 20) if e["phase"] == "stopping"]
    assert [e["signal"] for e in stops] == ["SIGTERM"], "told once"
    steps = [
        e
        for e in rundir.last_events(attempt.events, 1 << 20)
        if e.get("message") == "training" and e["t"] < stops[0]["t"]
    ]
    resumed = int(other["resumed_from"].rpartition("-")[2])
    assert steps[-1]["done"] <= resumed, "no step is lost that was done before the signal"
    assert (rundir.read_json(attempt.path / "outcome-0.json") or {})["resumable"]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {
        p.name for p in (stage_of(trained, cut) / "checkpoints").glob("checkpoint-*/*")
    }, "every rank has saved"


def test_a_rank_that_dies_ends_the_job_with_its_cause_and_the_next_goes_on(trained: Project) -> None:
    run = submit(trained, "finetune", "--set", "max_steps=400")
    under_way(trained, run)
    pid, node = ranks(trained, run)[1]
    os.kill(pid, signal.SIGKILL)
    found = trained.until(ended("finetune"), run, 120)["finetune"]
    assert found["state"] == "FAILED"
    assert found["reason"].startswith(f"on {node}: "), found
    alone = ("--set", "max_steps=400", "--set", "finetune.resources.nodes=1")
    refused = trained.hpc("submit", "finetune", *alone, check=False)
    assert (refused.returncode, "was stopped with 2 ranks" in refused.stderr) == (3, True), refused.stderr
    again = submit(trained, "finetune", "--set", "max_steps=400")
    assert again == run
    under_way(trained, run)
    log = (stage_of(trained, run) / "training" / "log.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in log]
    assert steps == sorted(set(steps)), "what was logged after the checkpoint is not there twice"
    trained.hpc("cancel", run)
    trained.until(ended("finetune"), run)
