"""A node loses its power while two services run on it: what the login node and the laptop say, and what is left."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from .cluster import Cluster
from .test_laptop import Laptop, laptop
from .test_reset import kill_at_once
from .test_tunnel import until
from .tunnels import wish

__all__ = ["laptop"]

NODE = "mig01"
"""No other test uses it."""


@pytest.fixture
def node(cluster: Cluster) -> Iterator[str]:
    """A node that may die; it is there again afterwards."""
    yield NODE
    cluster.start(f"slurmd-{NODE}")

    states = set()

    def idle() -> bool:
        cluster.run("root", "scontrol", "update", f"nodename={NODE}", "state=resume", check=False)
        states.add(state := cluster.run("root", "sinfo", "-hn", NODE, "-o", "%T").stdout.split()[0])
        return state == "idle"

    until(idle, states, 120)


def lose_power(cluster: Cluster, node: str, jobs: list[str]) -> None:
    """Everything of these jobs, Slurm's own processes first, so that nobody is left to tell of it."""
    cluster.stop(f"slurmd-{node}")
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if any(f"slurmstepd: [{job}." in (entry / "cmdline").read_text() for job in jobs):
                os.kill(int(entry.name), signal.SIGKILL)
    kill_at_once(*(f"SLURM_JOB_ID={job}\0".encode() for job in jobs))
    # as slurmctld does by itself after SlurmdTimeout
    cluster.run("root", "scontrol", "update", f"nodename={node}", "state=down", "reason=power")


def test_one_service_moves_on_and_the_other_is_told_dead(laptop: Laptop, node: str) -> None:
    cluster = laptop.cluster
    laptop.write("hpc.toml", (laptop.folder / "hpc.toml").read_text() + '[echo]\nsbatch = { partition = "mig" }\n')
    moves, stays = laptop.serve(), laptop.serve(lives=9999)
    for name in (moves, stays):
        assert laptop.json("tunnel", name)["node"] == node
    number = {name: str(laptop.states(name.partition("/")[0])["echo"]["job_id"]) for name in (moves, stays)}
    cluster.run("alice", "scontrol", "update", f"jobid={number[stays]}", "Requeue=0")
    follows, ends = laptop.tunnel(moves, *wish()), laptop.tunnel(stays, *wish())
    url = follows.url()
    ends.url()

    lose_power(cluster, node, list(number.values()))
    begin = time.monotonic()
    said = laptop.hpc("tunnel", stays, check=False)
    assert time.monotonic() - begin < 15
    assert said.returncode == 5
    assert f"{stays} has ended: NODE_FAIL (its node failed)" in said.stderr
    assert "  | the server begins" in said.stderr
    code, told = ends.ends(timeout=60)
    assert (code, f"{stays} has ended: NODE_FAIL: its node failed" in told) == (5, True), told

    follows.says(f"{moves} does not answer any more")
    cluster.run("alice", "scontrol", "update", f"jobid={number[moves]}", "partition=batch", "StartTime=now")
    follows.says(f"{moves} is ready again on dgx", timeout=90)
    ready = json.loads((laptop.folder / "runs" / moves / "endpoint.json").read_text())["ready"]
    assert time.time() - ready < 5
    assert laptop.ask(url).startswith("200 hello from dgx"), "the same job: the address of before"
    follows.ends(signal.SIGINT)
    assert laptop.left() == []

    left = [laptop.folder / "runs" / stays / name for name in ("endpoint.json", "token")]
    assert all(path.exists() for path in left), "nobody was there to take them away"
    assert sorted(laptop.json("reset", stays, "--yes")["removed"]) == sorted(map(str, left))
    assert "nothing to reset" in laptop.hpc("reset", stays).stdout
