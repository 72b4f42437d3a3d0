"""Batch scripts and container commands, byte for byte. UPDATE_GOLDEN=1 writes them anew: the diff is the review."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from hpc.core.plan import plan
from hpc.core.rundir import RunDir
from hpc.core.site import Site
from hpc.core.stage import Launcher, Resources
from hpc.login import batch
from hpc.login.place import Ground, Placed, place
from hpc.node.launch import process_env, without_secrets
from tests.core.fakes import FakeFacts, make, wish

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
SLURM = Site(name="dgx", scheduler="slurm", python="/usr/bin/python3", apptainer="apptainer")
SMALL = Resources(cpus_per_task=2, mem_gb=4, time_min=30)
BIG = Resources(gpus_per_node=1, cpus_per_task=16, mem_gb=128, time_min=240)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One site, and what one stage asks of it."""

    site: Site
    resources: Resources
    run: str = "/shared/alice/runs/pipeline-7"
    sbatch: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "sif"
    hub_home: str | None = None
    launcher: Launcher = "python"


FULL = replace(
    SLURM,
    partition="batch",
    account="research",
    qos="high",
    gres="gpu:a100",
    binds=("/raid",),
    env={"NCCL_SOCKET_IFNAME": "ib0"},
    passes=("MY_*",),
    setup=("module load apptainer", 'export NOTE="two words"'),
    sbatch={"reservation": "bootcamp", "exclude": "dgx[07-08]", "exclusive": True},
    signal_delay_s=120,
)
CASES = {
    "plain": Case(site=SLURM, resources=SMALL),
    "all-options": Case(site=FULL, resources=BIG, hub_home="/home/alice/.cache/huggingface"),
    "gpus-per-node": Case(site=replace(SLURM, gpus="gpus_per_node", mem=False), resources=BIG),
    "two-nodes": Case(site=SLURM, resources=replace(BIG, nodes=2, gpus_per_node=8), launcher="torchrun"),
    "mig": Case(site=replace(SLURM, gres="gpu:1g.10gb"), resources=replace(BIG, time_min=1)),
    "stage-options": Case(site=FULL, resources=SMALL, sbatch={"partition": "cpu", "nice": 100, "reservation": "none"}),
    "venv": Case(site=replace(SLURM, venvs="/home/alice/venvs"), resources=SMALL, kind="venv"),
    "odd-names": Case(site=SLURM, resources=SMALL, run='/shared/한글 "a", it\'s/runs/pipeline-7'),
}


class Facts(FakeFacts):
    def environment(self, name: str) -> Any:
        found = super().environment(name)
        return found if self.image == "sif" else replace(found, kind="venv", path="/home/alice/venvs/train")


def placed(case: Case) -> Placed:
    """The stage finetune, which waits for prepare and reads one file, at fixed places."""
    stages = [
        make("prepare"),
        make("finetune", consumes={"dataset": "dataset"}, produces="lora_adapter", resources=case.resources),
    ]
    stages[1] = replace(stages[1], launcher=case.launcher)
    wishes = [wish(stages[0]), replace(wish(stages[1], data=("extra, data.jsonl",)), sbatch=case.sbatch)]
    facts = Facts(files={"extra, data.jsonl": "x"}, image=case.kind)
    run = RunDir(Path(case.run))
    ground = Ground(
        run=run,
        site=case.site,
        attempts={},
        finished={},
        program="apptainer",
        cache=run.path.parent / ".cache",
        hub_home=case.hub_home,
    )
    return place(plan(wishes, ["finetune"], case.site, facts), ground)[1]


def command(one: Placed) -> str:
    """What the node starts, one word a line, and the environment that the dry run shows."""
    launch = one.job.launch
    environment = without_secrets(process_env(launch, {}))
    return "\n".join(
        [
            *map(shlex.quote, launch.argv),
            "",
            *(f"{'rw' if bind.writable else 'ro'} {bind.path}" for bind in launch.binds),
            "",
            *(f"{name}={value}" for name, value in environment.items()),
            "",
            *launch.passes,
            "",
        ]
    )


def compare(name: str, text: str) -> None:
    file = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(text)
    assert file.exists(), "UPDATE_GOLDEN=1 makes it"
    assert text == file.read_text()


@pytest.mark.parametrize("name", CASES)
def test_batch_script_is_the_golden_one(name: str) -> None:
    one = placed(CASES[name])
    compare(f"{name}.sbatch", batch.script(one, "afterok:@prepare"))


@pytest.mark.parametrize("name", CASES)
def test_command_on_the_node_is_the_golden_one(name: str) -> None:
    compare(f"{name}.txt", command(placed(CASES[name])))


def test_no_golden_file_is_left_over() -> None:
    assert {p.name for p in GOLDEN.iterdir() if p.is_file()} == {
        f"{n}.{kind}" for n in CASES for kind in ("sbatch", "txt")
    }


def test_script_without_a_dependency_has_no_such_line() -> None:
    with_one, without = (batch.script(placed(CASES["plain"]), d).splitlines() for d in ("afterok:1", None))
    assert [line for line in with_one if line not in without] == ["#SBATCH --dependency=afterok:1"]


def test_script_is_what_bash_can_read() -> None:
    for file in GOLDEN.glob("*.sbatch"):
        assert os.system(f"bash -n {shlex.quote(str(file))}") == 0


def test_making_a_script_writes_nothing() -> None:
    batch.script(placed(CASES["plain"]), None)
    assert not Path("/shared/alice/runs").exists()


def test_python_with_blanks_in_its_path_is_one_word() -> None:
    case = CASES["plain"]
    one = placed(replace(case, site=replace(case.site, python="/my python/bin/python3")))
    assert "'/my python/bin/python3' -u -m" in batch.script(one, None)


def test_option_that_is_false_is_left_out() -> None:
    assert "exclusive" not in batch.script(placed(replace(CASES["all-options"], sbatch={"exclusive": False})), None)
