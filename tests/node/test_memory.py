"""The kernel's count of memory kills, in both versions of cgroups."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from hpc.node.memory import kills


def world(root: Path, cgroup: str, files: Mapping[str, str]) -> tuple[Path, Path]:
    """A /proc/self/cgroup, and a /sys/fs/cgroup with these files."""
    (root / "cgroup").write_text(cgroup)
    for name, text in files.items():
        file = root / "fs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root / "cgroup", root / "fs"


V2 = "low 0\nhigh 0\nmax 5\noom 3\noom_kill {}\noom_group_kill 0\n"
V1 = "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"


def test_v2_sums_the_jobs_groups_up_to_the_root(tmp_path: Path) -> None:
    places = world(
        tmp_path,
        "0::/system.slice/job_7/step_0\n",
        {
            "system.slice/job_7/step_0/memory.events": V2.format(2),
            "system.slice/job_7/memory.events": V2.format(1),
            "system.slice/memory.events": V2.format(4),
            "memory.events": V2.format(100),
        },
    )
    assert kills(*places) == 7, "the root's own count is everybody's"


def test_v1_reads_the_memory_controller(tmp_path: Path) -> None:
    places = world(
        tmp_path,
        "12:cpu,cpuacct:/slurm/uid_1/job_7\n9:memory:/slurm/uid_1/job_7/step_0\n1:name=systemd:/x\n0::/\n",
        {
            "memory/slurm/uid_1/job_7/step_0/memory.oom_control": V1.format(1),
            "memory/slurm/uid_1/job_7/memory.oom_control": V1.format(2),
            "cpu/slurm/uid_1/job_7/memory.oom_control": V1.format(50),
        },
    )
    assert kills(*places) == 3


def test_hybrid_finds_the_memory_controller_behind_others(tmp_path: Path) -> None:
    places = world(tmp_path, "4:cpu,memory:/a\n", {"memory/a/memory.oom_control": V1.format(1)})
    assert kills(*places) == 1


@pytest.mark.parametrize(
    ("cgroup", "files"),
    [
        ("0::/gone\n", {}),
        ("0::/\n", {"memory.events": V2.format(9)}),
        ("9:memory:/a\n", {"memory/a/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\n"}),  # before Linux 4.13
        ("9:memory:/a\n", {"memory/a/memory.oom_control": "oom_kill many\n"}),
        ("", {}),
    ],
    ids=["no-files", "root", "old-kernel", "not-a-number", "no-cgroups"],
)
def test_what_is_not_known_counts_as_none(tmp_path: Path, cgroup: str, files: dict[str, str]) -> None:
    assert kills(*world(tmp_path, cgroup, files)) == 0


def test_machine_without_proc_counts_as_none(tmp_path: Path) -> None:
    assert kills(tmp_path / "none", tmp_path) == 0


def test_this_machine_answers() -> None:
    assert kills() >= 0
