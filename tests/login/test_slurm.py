"""Slurm's words: recorded outputs of real programs through the parsers, and what its complaints mean."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

import pytest

from hpc.core.errors import RuntimeUnavailable
from hpc.core.limits import NodeKind
from hpc.login import slurm
from hpc.login.slurm import (
    Node,
    failure,
    minutes,
    parse_accounting,
    parse_gres,
    parse_nodes,
    parse_partitions,
    parse_queue,
    program_env,
)

RECORDED = sorted((Path(__file__).resolve().parent.parent / "fixtures" / "slurm").iterdir())
"""Folders of one Slurm version each."""


def recorded(version: Path, name: str) -> str:
    return (version / f"{name}.txt").read_text()


@pytest.fixture(params=RECORDED, ids=lambda path: path.name)
def version(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.param
    return folder


# ---- recorded outputs: 12 jobs, an array of four among them


def test_queue_has_every_job_and_every_task_of_an_array(version: Path) -> None:
    text = recorded(version, "squeue")
    jobs = parse_queue(text)
    assert len(jobs) == len(text.splitlines()) == 15
    assert {"78_0", "78_1", "78_2", "78_3"} <= set(jobs)


def test_queue_tells_state_reason_and_place(version: Path) -> None:
    jobs = parse_queue(recorded(version, "squeue"))
    found = {i: (j.state, j.reason, j.nodes, j.limit) for i, j in jobs.items()}
    assert found["72"] == ("RUNNING", "None", "dgx01", "1:00:00")
    assert found["73"] == ("COMPLETED", "None", "dgx01", "1:00:00")
    assert found["74"] == ("FAILED", "NonZeroExitCode", "dgx01", "1:00:00")
    assert found["75"] == ("PENDING", "Dependency", "", "1:00:00")
    assert found["76"] == ("PENDING", "BeginTime", "", "1:00:00")
    assert found["77"] == ("CANCELLED", "None", "dgx01", "1:00:00")
    assert found["78_2"] == ("PENDING", "JobArrayTaskLimit", "", "1:00:00")
    assert found["79"] == ("PENDING", "Resources", "", "1:00:00")
    assert found["83"] == ("RUNNING", "None", "dgx[02-03]", "2-00:00:00")


def test_queue_times_are_seconds_or_nothing(version: Path) -> None:
    jobs = parse_queue(recorded(version, "squeue"))
    assert (jobs["72"].start, jobs["72"].submit) == (1795565838.0, 1795565837.0)
    assert jobs["75"].start is None, "N/A"


def test_queue_keeps_a_comment_with_bars_quotes_and_korean(version: Path) -> None:
    assert parse_queue(recorded(version, "squeue"))["76"].comment == 'with | bar, "quote" and 한글'
    assert parse_queue(recorded(version, "squeue"))["77"].comment == ""


def test_ended_jobs_in_the_queue_keep_their_end(version: Path) -> None:
    jobs = parse_queue(recorded(version, "squeue-ended"))
    assert all(j.state in slurm.ENDED for j in jobs.values())
    assert (jobs["81"].state, jobs["81"].reason) == ("TIMEOUT", "TimeLimit")
    assert (jobs["75"].state, jobs["75"].reason) == ("CANCELLED", "DependencyNeverSatisfied")


def test_accounting_has_one_record_a_job_without_its_steps(version: Path) -> None:
    jobs = parse_accounting(recorded(version, "sacct"))
    assert set(jobs) == {*map(str, range(72, 84)), "78_0", "78_1", "78_2", "78_3"} - {"78"}


def test_accounting_tells_the_end(version: Path) -> None:
    jobs = parse_accounting(recorded(version, "sacct"))
    found = {i: (j.state, j.exit_code, j.nodes) for i, j in jobs.items()}
    assert found["72"] == ("CANCELLED", 0, "dgx01")
    assert found["73"] == ("COMPLETED", 0, "dgx01")
    assert found["74"] == ("FAILED", 3, "dgx01")
    assert found["76"] == ("CANCELLED", 0, "")
    assert found["81"] == ("TIMEOUT", 0, "dgx02")
    assert all(j.state in slurm.ENDED for j in jobs.values())


def test_accounting_believes_the_step_that_ran_out_of_memory(version: Path) -> None:
    assert parse_accounting(recorded(version, "sacct"))["80"].state == "OUT_OF_MEMORY"


def test_accounting_of_a_job_that_never_began_has_no_start(version: Path) -> None:
    jobs = parse_accounting(recorded(version, "sacct"))
    assert (jobs["82"].start, jobs["82"].submit, jobs["82"].end) == (None, 1795565837.0, 1795565839.0)


def test_accounting_of_live_jobs_has_no_end(version: Path) -> None:
    jobs = parse_accounting(recorded(version, "sacct-live"))
    assert [(i, j.state) for i, j in jobs.items() if j.end is None] == [
        ("72", "RUNNING"),
        ("75", "PENDING"),
        ("76", "PENDING"),
        ("79", "PENDING"),
        ("81", "RUNNING"),
        ("83", "RUNNING"),
        ("78_0", "RUNNING"),
        ("78_1", "RUNNING"),
        ("78_[2-3%2]", "PENDING"),
    ]


def test_partitions_tell_limits_and_nodes(version: Path) -> None:
    found = parse_partitions(recorded(version, "sinfo"))
    assert {n: (p.default, p.up, p.time_min) for n, p in found.items()} == {
        "batch": (True, True, 10080),
        "debug": (False, True, 30),
        "scavenge": (False, True, None),
        "mig": (False, True, None),
    }
    assert found["batch"].nodes == (NodeKind(count=4, cpus=128, mem_gb=976, gpus={"a100": 8}),)
    assert found["mig"].nodes == (NodeKind(count=1, cpus=128, mem_gb=976, gpus={"1g.10gb": 56}),)


@pytest.mark.parametrize("parse", [parse_queue, parse_accounting, parse_partitions])
@pytest.mark.parametrize("text", ["", "\n\n", "slurm: warning: something\n"])
def test_text_without_jobs_gives_none(parse: object, text: str) -> None:
    assert callable(parse)
    assert parse(text) == {}


def test_mixed_partition_has_several_kinds_of_nodes() -> None:
    found = parse_partitions("batch*|up|infinite|10|16+|64000+|(null)\nbatch*|up|infinite|2|128|2000000|gpu:h100:8\n")
    assert [(n.count, n.cpus, n.gpus) for n in found["batch"].nodes] == [(10, 16, {}), (2, 128, {"h100": 8})]


def test_partition_that_is_not_up_is_down() -> None:
    found = parse_partitions("a|down|1:00|1|1|1024|(null)\nb|drain|1:00|1|1|1024|(null)\nc|inact|n/a|1|1|1024|(null)")
    assert [p.up for p in found.values()] == [False, False, False]


# ---- small languages


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("90", 90),
        ("0", 0),
        ("30:00", 30),
        ("0:30", 1),
        ("29:59", 30),
        ("1:00:00", 60),
        ("1:30:01", 91),
        ("24:00:00", 1440),
        ("1-0", 1440),
        ("1-12", 2160),
        ("1-12:30", 2190),
        ("1-12:30:30", 2191),
        ("7-00:00:00", 10080),
        ("365-00:00:00", 525600),
        ("infinite", None),
        ("INFINITE", None),
        ("UNLIMITED", None),
        ("n/a", None),
        ("NOT_SET", None),
        ("Partition_Limit", None),
    ],
)
def test_minutes_of_slurms_time(text: str, value: int | None) -> None:
    assert minutes(text) == value


@pytest.mark.parametrize(
    "text", ["", "abc", "1:2:3:4", "1-", "1.5", "1h", "-", ":", "1:", "1:-5", "--1", "-5", "-1:00", "+5", "1_0", "１"]
)
def test_minutes_refuses_what_is_no_time(text: str) -> None:
    with pytest.raises(ValueError):
        minutes(text)


@pytest.mark.parametrize(
    ("text", "gpus"),
    [
        ("(null)", {}),
        ("", {}),
        ("gpu", {"": 1}),
        ("gpu:8", {"": 8}),
        ("gpu:a100:8", {"a100": 8}),
        ("gpu:a100:8(S:0-1)", {"a100": 8}),
        ("gpu:a100:8(S:0,2,4)", {"a100": 8}),
        ("gpu:a100", {"a100": 1}),
        ("gpu:1g.10gb:56", {"1g.10gb": 56}),
        ("gpu:a100:4,gpu:v100:2", {"a100": 4, "v100": 2}),
        ("gpu:a100:4(S:0),gpu:a100:4(S:1)", {"a100": 8}),
        ("craynetwork:4,gpu:tesla_v100:2(IDX:0-1)", {"tesla_v100": 2}),
        ("lustre:1,nvme:2", {}),
        ("gpu_mem:80G", {}),
        ("gpu:nvidia_h100_80gb_hbm3:8(S:0-1)", {"nvidia_h100_80gb_hbm3": 8}),
    ],
)
def test_gres_gives_the_gpus(text: str, gpus: dict[str, int]) -> None:
    assert parse_gres(text) == gpus


# ---- complaints

BATCH = "sbatch: error: Batch job submission failed: "
COMPLAINTS = [
    (
        f"sbatch: error: invalid partition specified: nope\n{BATCH}Invalid partition name specified",
        "this cluster has no such partition",
        "--partition",
    ),
    (
        f"{BATCH}Requested node configuration is not available",
        "no node of this partition has what is asked for",
        "sinfo",
    ),
    (f"{BATCH}Invalid generic resource (gres) specification", "this cluster has no such gres", "gres"),
    (
        "sbatch: error: Memory specification can not be satisfied\n"
        f"{BATCH}Requested node configuration is not available",
        "no node of this partition has what is asked for",
        "sinfo",
    ),
    (
        f"sbatch: error: CPU count per node can not be satisfied\n{BATCH}Requested node configuration is not available",
        "no node of this partition has what is asked for",
        "sinfo",
    ),
    (
        f"{BATCH}Invalid account or account/partition combination specified",
        "Slurm knows no such account, or it may not use this partition",
        "--account",
    ),
    (f"{BATCH}Invalid qos specification", "Slurm knows no such qos, or you may not use it", "--qos"),
    (
        f"sbatch: error: QOSMaxGRESPerJob\n{BATCH}Job violates accounting/QOS policy (job submit limit, user's size"
        " and/or time limits)",
        "your account's limits do not allow this job",
        "--qos",
    ),
    (
        f"{BATCH}Unable to contact slurm controller (connect failure)",
        "Slurm's controller cannot be reached",
        "try again",
    ),
    ("slurm_load_jobs error: Unable to contact slurm controller (connect failure)", "Slurm's controller", "try again"),
    ("slurm_load_partitions: Unable to contact slurm controller (connect failure)", "Slurm's controller", "try again"),
    (f"{BATCH}Socket timed out on send/recv operation", "Slurm's controller cannot be reached", "try again"),
    (
        "sbatch: error: If munged is up, restart with --num-threads=10\nsbatch: error: Munge encode failed: Failed to"
        ' access "/run/munge/munge.socket.2": No such file or directory (Did you start munged?)\n'
        f"{BATCH}Protocol authentication error",
        "Slurm refuses to authenticate this machine",
        "munged",
    ),
    (
        "sacct: error: _open_persist_conn: failed to open persistent connection to host:login:6819: Connection refused",
        "cannot be reached",
        "",
    ),
    ("Slurm accounting storage is disabled", "Slurm's accounting cannot be reached", ""),
    (f"{BATCH}Invalid wckey specification", "this site does not know the job's wckey", "wckey"),
    (f"{BATCH}Invalid node name specified", "sbatch failed", "hpc doctor"),
    (f"{BATCH}Invalid feature specification", "sbatch failed", "hpc doctor"),
    (f"{BATCH}Job dependency problem", "sbatch failed", "hpc doctor"),
    ("sbatch: error: Invalid --time specification", "sbatch failed", "hpc doctor"),
    ("sbatch: unrecognized option '--bogus'", "sbatch failed", "hpc doctor"),
    (f"{BATCH}Invalid job array specification", "sbatch failed", "hpc doctor"),
    ("slurm_load_jobs error: Invalid job id specified", "sbatch failed", "hpc doctor"),
    ("", "sbatch failed: no message", "hpc doctor"),
]


@pytest.mark.parametrize(
    ("stderr", "said", "hint"), COMPLAINTS, ids=[c[0].rpartition(": ")[2][:40] for c in COMPLAINTS]
)
def test_complaint_is_told_in_our_words_and_slurms(stderr: str, said: str, hint: str) -> None:
    error = failure("sbatch", stderr)
    assert isinstance(error, RuntimeUnavailable)
    assert said in error.message
    assert hint in error.hint
    if stderr:
        assert stderr.splitlines()[-1].removeprefix("sbatch: error: ").removeprefix("sacct: error: ") in error.message
    assert "\n" not in error.message


# ---- programs


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file on PATH that a test makes a program of."""
    monkeypatch.setenv("PATH", str(tmp_path))  # this machine may have a real Slurm
    return tmp_path / "squeue"


def script(file: Path, body: str) -> None:
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def test_program_that_is_missing_says_where_to_go(program: Path) -> None:
    with pytest.raises(RuntimeUnavailable, match="squeue is not on this machine") as caught:
        slurm.run(["squeue"])
    assert "login node" in caught.value.hint


def test_program_that_hangs_is_given_up(program: Path) -> None:
    script(program, "exec /bin/sleep 60")
    with pytest.raises(RuntimeUnavailable, match="squeue gave no answer in 0 s"):
        slurm.run(["squeue"], timeout_s=0.2)


def test_program_that_fails_is_told_in_its_words(program: Path) -> None:
    script(program, "echo 'slurm_load_jobs error: Zero Bytes were transmitted or received' >&2; exit 1")
    with pytest.raises(RuntimeUnavailable, match="squeue failed: slurm_load_jobs error: Zero Bytes"):
        slurm.run(["squeue"])


def test_program_sees_no_variables_that_change_its_answer(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SQUEUE_FORMAT", "SLURM_TIME_FORMAT", "SBATCH_PARTITION", "SLURM_JOB_ID", "LC_ALL"):
        monkeypatch.setenv(name, "bad")
    monkeypatch.setenv("SLURM_CONF", "/etc/my.conf")
    script(program, "/usr/bin/env")
    seen = dict(line.split("=", 1) for line in slurm.run(["squeue"]).splitlines())
    assert (seen["SLURM_TIME_FORMAT"], seen["LC_ALL"], seen["SLURM_CONF"]) == ("%s", "C", "/etc/my.conf")
    assert not {"SQUEUE_FORMAT", "SBATCH_PARTITION", "SLURM_JOB_ID"} & set(seen)


@pytest.mark.parametrize(
    "name", ["SLURM_JOB_ID", "SLURMD_NODENAME", "SBATCH_GRES", "SRUN_DEBUG", "SALLOC_X", "SQUEUE_USERS", "SACCT_FORMAT",
             "SINFO_FORMAT", "SCANCEL_STATE", "PMI_RANK", "PMIX_RANK", "OMPI_COMM", "SUBMITIT_EXECUTOR"],
)  # fmt: skip
def test_variable_of_an_allocation_is_left_out(name: str) -> None:
    assert name not in program_env({name: "x"})
    assert program_env({"PATH": "p", name: "x"})["PATH"] == "p"


class Calls:
    """A fake `run`: keeps each argv, answers with one text."""

    def __init__(self, answer: str | RuntimeUnavailable = "") -> None:
        self.answer = answer
        self.argv: list[list[str]] = []

    def __call__(self, argv: Sequence[str]) -> str:
        self.argv.append(list(argv))
        if isinstance(self.answer, RuntimeUnavailable):
            raise self.answer
        return self.answer


def test_queue_asks_for_the_users_jobs_of_all_states() -> None:
    call = Calls("1|RUNNING|None|5|4|1:00|n1|c")
    assert slurm.queue("alice", call)["1"].comment == "c"
    assert call.argv == [["squeue", "-h", "-r", "-t", "all", "-u", "alice", "-o", "%i|%T|%r|%S|%V|%l|%N|%k"]]


def test_accounting_asks_for_all_jobs_at_once() -> None:
    call = Calls()
    slurm.accounting(["1", "2"], call)
    assert call.argv[0][-2:] == ["-j", "1,2"]
    assert len(call.argv) == 1


def test_accounting_that_is_not_there_is_no_error() -> None:
    assert slurm.accounting(["1"], Calls(RuntimeUnavailable("disabled"))) == {}


def test_job_is_found_by_its_comment() -> None:
    call = Calls("1|RUNNING|None|5|4|1:00|n1|one\n2|PENDING|None|5|4|1:00||two")
    found = slurm.find("alice", "two", call)
    assert found is not None
    assert found.job_id == "2"
    assert slurm.find("alice", "three", call) is None


def test_cancel_names_the_jobs() -> None:
    call = Calls()
    slurm.cancel(["3", "2"], call)
    assert call.argv == [["scancel", "3", "2"]]


def test_environment_of_this_process_stays_as_it_is() -> None:
    before = dict(os.environ)
    program_env(os.environ)
    assert dict(os.environ) == before


def test_answer_that_is_not_utf8_is_read_all_the_same(program: Path) -> None:
    script(program, r"printf '1|RUNNING|None|5|4|1:00|n1|caf\351\n'")
    assert slurm.queue("alice")["1"].state == "RUNNING"


# ---- nodes

NODES = sorted((Path(__file__).resolve().parent.parent / "fixtures" / "sinfo-nodes").iterdir())


@pytest.mark.parametrize("file", NODES, ids=lambda path: path.stem)
def test_nodes_of_the_default_partition_each_once(file: Path) -> None:
    found = parse_nodes(file.read_text(), default=True)
    assert [node.name for node in found] == ["dgx01", "dgx02", "dgx03", "dgx04"]
    assert all(node.up for node in found)


def test_nodes_that_do_not_answer_are_not_up() -> None:
    text = "a|down*|batch*\nb|idle*|batch*\nc|drained|batch*\nd|draining@|batch*\ne|maint|batch*\nf|mixed-|mig\n"
    assert [node.name for node in parse_nodes(text, default=False) if node.up] == ["f"]
    assert [node.name for node in parse_nodes(text, default=True)] == ["a", "b", "c", "d", "e"]


def test_nodes_are_asked_for_by_partition_and_name() -> None:
    asked: list[list[str]] = []

    def call(argv: Sequence[str]) -> str:
        asked.append(list(argv))
        return "a|idle|batch*\n"

    assert slurm.nodes("mig", ["a", "b"], call) == [Node("a", "idle")]
    assert asked == [["sinfo", "-h", "-N", "-o", "%N|%T|%P", "-p", "mig", "-n", "a,b"]]
    assert slurm.nodes(None, (), call) == [Node("a", "idle")]
    assert asked[1] == ["sinfo", "-h", "-N", "-o", "%N|%T|%P"]
