"""What a user can get wrong: one sentence what, one what to do, the exit code, no traceback, nothing queued or lost."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator

import pytest

from .project import Project, jobs

DATA = '{"text": "### Human: What is a brick?### Assistant: A block of clay."}\n'


def data(text: str) -> Callable[[Project], None]:
    """The project prepares this data file."""

    def write(project: Project) -> None:
        project.write("data.jsonl", text)
        with_stage(project)

    return write


def with_stage(project: Project) -> None:
    toml = (project.folder / "hpc.toml").read_text()
    project.write("hpc.toml", toml + '[prepare]\ndata = ["data.jsonl"]\nlanguages = []\n')


def no_image(project: Project) -> None:
    toml = (project.folder / "hpc.toml").read_text()
    project.write("hpc.toml", toml.replace("base.sif", "absent.sif"))


def unwritable(project: Project) -> None:
    toml = (project.folder / "hpc.toml").read_text()
    project.write("hpc.toml", 'runs = "/usr/lib/runs"\n' + toml)


def nothing(project: Project) -> None:
    pass


CASES = [
    ("unknown stage", nothing, ["frist"], 2, "there is no stage 'frist'", "did you mean 'first'?"),
    ("unknown key", nothing, ["first", "--set", "first.secnods=1"], 2, "no setting 'secnods'", "'seconds'"),
    ("unknown bare key", nothing, ["first", "--set", "memory_md=1"], 2, "'memory_md'", "'memory_mb'"),
    ("wrong type", nothing, ["first", "--set", "first.seconds=soon"], 2, "expected float, got str", "a number"),
    ("missing data file", with_stage, ["prepare"], 2, "'data.jsonl' is not there", "hpc.toml"),
    ("broken line", data(DATA * 2 + '{"text": '), ["prepare"], 2, "line 3", ""),
    ("empty data set", data(""), ["prepare"], 2, "", ""),
    ("unknown partition", nothing, ["first", "-p", "bacht"], 3, "no partition 'bacht'", "'batch'"),
    ("unknown account", nothing, ["pipeline", "-A", "nope"], 4, "no such account", "sacctmgr"),
    ("unknown qos", nothing, ["pipeline", "-q", "nope"], 4, "no such qos", "sacctmgr"),
    (
        "unknown gres type", nothing,
        ["first", "--set", "site.gres=gpu:h100", "--set", "first.resources.gpus_per_node=1"], 3, "h100", "a100",
    ),
    (
        "more GPUs than a node has", nothing,
        ["first", "-p", "mig", "--set", "site.gres=gpu:a100", "--set", "first.resources.gpus_per_node=1"], 3,
        "a100", "1g.10gb",
    ),
    ("time above the limit", nothing, ["first", "-p", "debug", "-t", "60"], 3, "allows 30 min", "--time 30"),
    ("a time that is none", nothing, ["first", "-t", "soon"], 2, "not a time", "1:30:00"),
    ("image missing", no_image, ["first"], 3, "absent.sif", "hpc images build train"),
    ("unwritable run folder", unwritable, ["first"], 2, "/usr/lib/runs", "HPC_RUNS"),
    ("limits of a qos", nothing, ["first", "-q", "small", "-t", "90"], 4, "limits", "--qos"),
    ("the pipeline's last stage is rejected", nothing,
     ["pipeline", "--set", 'third.sbatch={account="nope"}'], 4, "no such account", "sacctmgr"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("setup", "arguments", "code", "what", "hint"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_bad_input(
    project: Project, setup: Callable[[Project], None], arguments: list[str], code: int, what: str, hint: str
) -> None:
    setup(project)
    done = project.hpc("submit", *arguments, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("note:", "pipeline-"))]
    assert lines[0].startswith("error: ")
    assert what in lines[0]
    assert lines[1].startswith("  try: ")
    assert hint in lines[1]
    assert jobs(project) == []


def test_a_rejected_pipeline_leaves_no_run_behind(project: Project) -> None:
    project.hpc("submit", "pipeline", "-A", "nope", check=False)
    assert "no runs" in project.hpc("status").stderr
    assert not list((project.folder / "runs").glob("pipeline-*"))


@pytest.mark.alone
def test_slurmctld_down(project: Project) -> None:
    project.hpc("submit", "first", "--wait")
    project.cluster.stop("slurmctld")
    try:
        done = project.hpc("submit", "second", check=False)
        assert done.returncode == 4
        assert "controller cannot be reached" in done.stderr
        assert "Traceback" not in done.stderr
        shown = project.hpc("status", check=False)
        assert "COMPLETED" in shown.stdout, "what the run folders know is still shown"
    finally:
        project.cluster.start("slurmctld")
    project.hpc("submit", "second", "--wait")


def test_a_broken_image_is_a_container_error_with_its_reason(project: Project) -> None:
    broken = project.write("broken.sif", "not an image\0" * 100)
    toml = (project.folder / "hpc.toml").read_text()
    image = toml.split('train = "')[1].split('"')[0]
    project.write("hpc.toml", toml.replace(image, str(broken)))
    done = project.hpc("submit", "first", "--wait", check=False)
    assert done.returncode == 1
    assert "the container could not be started" in done.stderr
    assert "hpc doctor" in done.stderr


def test_no_apptainer_on_the_nodes(project: Project) -> None:
    done = project.hpc("submit", "first", "--wait", "--set", "site.apptainer=/opt/none/apptainer", check=False)
    assert done.returncode == 1
    assert "/opt/none/apptainer could not be started on this node" in done.stderr


def test_no_apptainer_on_the_login_node_queues_nothing(project: Project) -> None:
    # a PATH with Slurm, but without Apptainer
    tools = project.folder / "tools"
    tools.mkdir()
    for name in ("squeue", "sbatch", "sinfo", "scancel", "sacct", "git"):
        (tools / name).symlink_to(f"/usr/bin/{name}")
    done = project.hpc("submit", "first", check=False, env={"PATH": str(tools)})
    assert done.returncode == 4
    assert "Apptainer is not on this machine" in done.stderr
    assert jobs(project) == []


@pytest.fixture
def small_disk(project: Project) -> Iterator[Callable[[str], None]]:
    """The runs folder on a file system of its own, whose size can be set."""
    runs = project.folder / "runs"
    runs.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k,mode=0777", "tmpfs", runs], check=True)
    yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", runs], check=True) and None
    subprocess.run(["umount", "-l", runs], check=True)


def test_disk_full_while_submitting(project: Project, small_disk: Callable[[str], None]) -> None:
    done = project.hpc("submit", "pipeline", check=False)
    assert done.returncode == 1, done.stderr
    assert "no space left" in done.stderr
    assert "make room" in done.stderr
    assert "Traceback" not in done.stderr
    assert jobs(project) == []
    assert [p.name for p in (project.folder / "runs").iterdir() if p.name != ".cache"] == []
    small_disk("64m")
    project.hpc("submit", "pipeline")
    project.hpc("cancel")


def test_disk_full_while_a_stage_writes(project: Project, small_disk: Callable[[str], None]) -> None:
    small_disk("3m")
    done = project.hpc("submit", "first", "--set", "first.write_mb=9", "--wait", check=False)
    assert done.returncode == 1, done.stderr
    assert "no space is left" in done.stderr
    assert "make room" in done.stderr
    small_disk("64m")
    project.hpc("submit", "first", "--set", "first.write_mb=9", "--wait")


def test_logs_and_cancel_of_what_is_not_there(project: Project) -> None:
    for arguments, code, what in (
        (["logs"], 7, "no runs"),
        (["cancel", "pipeline-9"], 7, "no run 'pipeline-9'"),
        (["status", "pipeline-9"], 7, "no run 'pipeline-9'"),
    ):
        done = project.hpc(*arguments, check=False)
        assert (done.returncode, what in done.stderr) == (code, True), done.stderr
    project.hpc("submit", "first", "--wait")
    assert project.hpc("logs", "first-1/second", check=False).returncode == 7
    assert project.hpc("logs", "first-1/nope", check=False).returncode == 2
