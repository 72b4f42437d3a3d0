"""Samples become rows, sentences and warnings; what was started for them ends with them."""

from __future__ import annotations

import io
import itertools
import json
import os
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from hpc.core import rundir
from hpc.core.errors import RuntimeUnavailable
from hpc.login import samplers, top
from hpc.login.samplers import Idle, Samplers
from hpc.login.states import StageState
from hpc.login.view import gpu as cells
from hpc.node.gpus import Gpu
from tests.login.test_states import World
from tests.login.test_view import Terminal, state

ROOT = Path(__file__).resolve().parent.parent.parent


def gpu(index: int = 0, use: float | None = 50.0, **values: Any) -> Gpu:
    usual: dict[str, Any] = {"name": "A100", "memory_used_mib": 40536.0, "memory_total_mib": 81920.0,
                             "temperature_c": 61.0, "power_w": 388.52}  # fmt: skip
    return Gpu(index=index, uuid=f"GPU-{index}", utilization=use, **{**usual, **values})


# ---- idle GPUs


def seen(*samples: tuple[float, list[float | None]]) -> str | None:
    idle = Idle()
    for now, uses in samples:
        idle.see("dgx01", [gpu(i, use) for i, use in enumerate(uses)], now)
    return idle.warning()


@pytest.mark.parametrize(
    ("samples", "warning"),
    [
        ([(0, [0, 0, 0, 0]), (30, [4.9, 0, 0, 0])], "holds 4 GPUs, uses none (the last 30 s)"),
        ([(0, [0]), (35, [0])], "holds 1 GPU, uses none (the last 35 s)"),
        ([(0, [0, 90]), (20, [0, 0]), (40, [0, 0])], "holds 2 GPUs, uses 1 (the last 40 s)"),
        ([(0, [0]), (29, [0])], None),
        ([(0, [0])], None),
        ([(0, [5]), (60, [5])], None),
        ([(0, [0]), (20, [50]), (40, [0])], None),
        ([(0, [None]), (60, [None])], None),
    ],
)
def test_gpus_that_idle_for_half_a_minute_are_told_of(
    samples: list[tuple[float, list[float | None]]], warning: str | None
) -> None:
    assert seen(*samples) == warning


def test_gpus_of_two_nodes_are_counted_together() -> None:
    idle = Idle()
    for now in (0, 31):
        idle.see("dgx01", [gpu(0, 0)], now)
        idle.see("dgx02", [gpu(0, 99)], now)
    assert idle.warning() == "holds 2 GPUs, uses 1 (the last 31 s)"


# ---- one GPU in words


def test_row_has_use_memory_power_and_heat() -> None:
    assert cells(gpu()) == ("0", "━━━━━━──────  50%", "39.6/80.0 GiB", "389 W", "61 °C", "A100")


def test_what_is_not_told_is_a_dash() -> None:
    none = gpu(use=None, memory_used_mib=None, memory_total_mib=None, temperature_c=None, power_w=None)
    assert cells(none) == ("0", "-", "-", "-", "-", "A100")


# ---- samples, by a program named srun


class Jobs:
    """Running jobs, and an srun that prints what the test says of each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.world = World(folder / "runs")

    def add(self, number: int, gpus: int = 1, nodes: int = 1) -> StageState:
        run = self.world.run(f"train-{number}")
        stage = self.world.job(run, job_id=str(number), python="python3")
        rundir.write_json(stage.config, {"resources": {"gpus_per_node": gpus, "nodes": nodes}})
        return state(run=run.id, job_id=str(number), node=f"dgx0{number}", attempt=1, folder=str(stage.path))

    def srun(self, script: str) -> None:
        path = self.folder / "srun"
        path.write_text(f"#!/bin/bash\nfor w; do case $w in --jobid=*) job=${{w#*=}};; esac; done\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def serve(self) -> None:
        """An srun that prints its job's samples again and again, until its standard input is closed."""
        self.srun(
            f"echo $$ > {self.folder}/pid-$job\n"
            f"while :; do cat {self.folder}/said-$job; read -t 0.05 line; [ $? = 1 ] && exit 0; done"
        )

    def says(self, number: int, *samples: dict[str, Any]) -> None:
        (self.folder / f"said-{number}").write_text("".join(json.dumps(s) + "\n" for s in samples))


def sample(node: str, *uses: float) -> dict[str, Any]:
    return {"node": node, "gpus": [vars(gpu(i, use)) for i, use in enumerate(uses)]}


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    made = Jobs(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    made.srun(f"cat {tmp_path}/said-$job")
    return made


def shown(found: Samplers) -> tuple[list[str], str]:
    out, notes = io.StringIO(), io.StringIO()
    top.show(found, out, notes)
    return out.getvalue().splitlines(), notes.getvalue()


def test_every_gpu_of_every_job_is_a_row(jobs: Jobs) -> None:
    running = [jobs.add(1, nodes=2), jobs.add(2)]
    jobs.says(1, sample("dgx02", 1), sample("dgx01", 2, 3))
    jobs.says(2, sample("dgx03", 4))
    found = top.once(running)
    rows, notes = shown(found)
    assert [r.split()[:4] for r in rows[1:]] == [
        ["train-1/first", "1", "dgx01", "0"],
        ["train-1/first", "1", "dgx01", "1"],
        ["train-1/first", "1", "dgx02", "0"],
        ["train-2/first", "2", "dgx03", "0"],
    ]
    assert notes == ""
    document = top.document(found)
    assert document["gpus"][3] == {
        "run": "train-2", "stage": "first", "job_id": "2", "node": "dgx03", **vars(gpu(0, 4.0)),
    }  # fmt: skip
    assert (document["problems"], document["left_out"]) == ([], 0)


def test_one_step_a_job_with_a_task_on_each_node(jobs: Jobs) -> None:
    jobs.srun(f'echo "$@" > {jobs.folder}/argv')
    top.once([jobs.add(1, nodes=4)])
    argv = (jobs.folder / "argv").read_text()
    assert argv == (
        "--overlap --jobid=1 --nodes=4 --ntasks=4 --ntasks-per-node=1 --quit-on-interrupt python3 -m hpc.node.gpus 0\n"
    )


def test_job_without_gpus_is_not_asked(jobs: Jobs) -> None:
    jobs.srun("exit 9")
    assert shown(top.once([jobs.add(1, gpus=0)])) == (
        [],
        "no running stage of yours holds a GPU; `hpc status` shows what runs\n",
    )


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ('echo \'{"node": "dgx01", "problem": "there is no nvidia-smi on this node"}\'', "no nvidia-smi on this node"),
        ("echo 'srun: error: Slurm job 1 has expired' >&2; exit 1", "its job has ended"),
        ("echo garbage; exit 1", "srun failed: garbage"),
        ("exit 0", "gave no sample"),
    ],
)
def test_job_that_gives_no_sample_is_one_sentence_and_the_rest_goes_on(jobs: Jobs, script: str, said: str) -> None:
    running = [jobs.add(1), jobs.add(2)]
    jobs.says(2, sample("dgx02", 4))
    jobs.srun(f"[ $job = 2 ] && exec cat {jobs.folder}/said-2\n{script}")
    rows, notes = shown(top.once(running))
    assert [r.split()[0] for r in rows[1:]] == ["train-2/first"]
    assert notes.startswith("train-1/first (job 1): dgx01: ")
    assert said in notes
    assert len(notes.splitlines()) == 1


def test_more_jobs_than_are_looked_at_are_counted(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samplers, "_MOST", 1)
    jobs.says(1, sample("dgx01", 1))
    rows, notes = shown(top.once([jobs.add(1), jobs.add(2), jobs.add(3)]))
    assert len(rows) == 2
    assert notes == "2 more jobs are not shown: hpc top RUN\n"


def test_no_srun_is_4(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RuntimeUnavailable, match="srun is not on this machine"):
        top.once([jobs.add(1)])


# ---- live


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def screens_of(out: Terminal) -> list[str]:
    return out.getvalue().split("\033[H\033[2J")[1:]


def test_live_table_follows_what_starts_and_ends(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top, "_ASK_S", 0.0)
    one, two = jobs.add(1), jobs.add(2)
    for number in (1, 2):
        jobs.says(number, sample(f"dgx0{number}", 7))
    jobs.serve()
    turns = [[one], [one, two], [two], []]
    out = Terminal()

    def shown() -> list[list[str]]:
        """What each screen has a row of, a screen like the one before left out."""
        screens = [[job for job in ("train-1", "train-2") if f"\n{job}/first  " in s] for s in screens_of(out)]
        return [screen for screen, _ in itertools.groupby(screens)]

    def running() -> list[StageState]:
        """The next ones, as soon as all of these were seen: a sampler may take long to start."""
        if shown()[-1:] == [[job.run for job in turns[0]]]:
            turns.pop(0)
        assert time.monotonic() < deadline
        return turns[0]

    deadline = time.monotonic() + 60
    top.live(running, 0.2, out)
    assert [screen for screen in shown() if screen] == [["train-1"], ["train-1", "train-2"], ["train-2"]]
    assert "no running stage of yours holds a GPU" in screens_of(out)[-1]
    assert not [n for n in (1, 2) if alive(int((jobs.folder / f"pid-{n}").read_text()))]


def test_controller_that_hiccups_is_asked_again(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top, "_ASK_S", 0.0)
    answers: list[Any] = [RuntimeUnavailable("Slurm is away"), []]

    def running() -> list[StageState]:
        answer = answers.pop(0)
        if isinstance(answer, RuntimeUnavailable):
            raise answer
        return list(answer)

    out = Terminal()
    top.live(running, 0.1, out)
    assert "Slurm is away; looking again" in out.getvalue()
    assert answers == []


def test_ctrl_c_ends_what_was_started(jobs: Jobs) -> None:
    jobs.says(1, sample("dgx01", 7))
    jobs.serve()
    one = jobs.add(1)
    calls: list[float] = []

    class Out(Terminal):
        def flush(self) -> None:
            calls.append(time.monotonic())
            assert calls[-1] - calls[0] < 60
            if pid.exists() and pid.read_text():  # it has been started
                raise KeyboardInterrupt

    pid = jobs.folder / "pid-1"
    top.live(lambda: [one], 0.2, Out())
    assert calls
    assert not alive(int(pid.read_text()))
