"""The only caller of Slurm's programs but for sbatch, which submitit calls. Parsers are pure; Slurm 20 to 26.

Text with explicit fields is the same in all these versions; their JSON is not, so none of it is read here.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from hpc.core.errors import HpcError, RuntimeUnavailable, UsageError
from hpc.core.limits import NodeKind, Partition

Run = Callable[[Sequence[str]], str]

_QUEUE = "%i|%T|%r|%S|%V|%l|%N|%k"
_ACCOUNT = "JobID,State,ExitCode,Submit,Start,End,NodeList"
_SINFO = "%P|%a|%l|%D|%c|%m|%G"

ENDED = frozenset(
    "COMPLETED FAILED CANCELLED TIMEOUT OUT_OF_MEMORY NODE_FAIL PREEMPTED BOOT_FAIL DEADLINE REVOKED".split()
)


@dataclass(frozen=True, kw_only=True)
class Queued:
    """One job as squeue shows it. Times are seconds since 1970; None where Slurm doesn't know yet."""

    job_id: str
    state: str
    reason: str
    start: float | None
    submit: float | None
    limit: str
    nodes: str
    comment: str


@dataclass(frozen=True, kw_only=True)
class Accounted:
    """One job as sacct shows it; the state is the worst that one of its steps tells."""

    job_id: str
    state: str
    exit_code: int
    submit: float | None
    start: float | None
    end: float | None
    nodes: str


@dataclass(frozen=True)
class Node:
    """One node as sinfo shows it."""

    name: str
    state: str
    """Slurm's word, with its mark: idle, mixed-, down*, …"""

    @property
    def up(self) -> bool:
        """True where a job can start sooner or later; a mark like * says that the node does not answer.

        >>> [Node("n", state).up for state in ("idle", "mixed-", "allocated+", "down*", "idle*", "drained", "idle~")]
        [True, True, True, False, False, False, False]
        """
        return self.state.rstrip("-+#") in _UP


_UP = {"idle", "mixed", "allocated", "completing", "planned", "reserved"}


def run(argv: Sequence[str], timeout_s: float = 60) -> str:
    """The program's output. RuntimeUnavailable, with Slurm's own words and what to do, where it fails."""
    try:
        done = subprocess.run(argv, capture_output=True, encoding="utf-8", errors="replace",
                              timeout=timeout_s, env=program_env(os.environ))  # fmt: skip
    except FileNotFoundError:
        raise missing(argv[0]) from None
    except subprocess.TimeoutExpired:
        raise RuntimeUnavailable(
            f"{argv[0]} gave no answer in {timeout_s:.0f} s",
            hint="the controller is busy: try again in a minute",
        ) from None
    if done.returncode != 0:
        raise failure(argv[0], done.stderr or done.stdout)
    return done.stdout


def missing(program: str) -> HpcError:
    """Our error where there is no such program."""
    return RuntimeUnavailable(
        f"{program} is not on this machine",
        hint="log in to the cluster's login node, or load its Slurm module; --site local needs no Slurm",
    )


def program_env(env: Mapping[str, str]) -> dict[str, str]:
    """For Slurm's programs: no variable of an allocation that we are in, none that changes what they print or ask.

    SLURM_*, SBATCH_* and the like would silently change a job that is submitted from inside another one.
    """
    clean = {k: v for k, v in env.items() if k in _KEEP or not k.startswith(_LEAKING)}
    return {**clean, "LC_ALL": "C", "SLURM_TIME_FORMAT": "%s"}


_KEEP = {"SLURM_CONF", "SLURM_JWT", "SLURM_CONF_SERVER"}
_LEAKING = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SACCT_", "SINFO_", "SCANCEL_",
            "PMI_", "PMIX_", "OMPI_", "PRTE_", "SUBMITIT_")  # fmt: skip

_FAILURES = (
    ("Unable to contact slurm controller|connect failure|Connection refused|Socket timed out|Connection timed out",
     "Slurm's controller cannot be reached", "try again in a minute; `hpc doctor` says when it is back"),
    ("Munge|authentication", "Slurm refuses to authenticate this machine", "ask the administrators: munged is down"),
    ("accounting storage is disabled|persistent connection", "Slurm's accounting cannot be reached", ""),
    ("invalid account|Invalid account", "Slurm knows no such account, or it may not use this partition",
     "`sacctmgr show assoc user=$USER format=account,partition,qos` lists yours; set it with --account"),
    ("Invalid qos", "Slurm knows no such qos, or you may not use it",
     "`sacctmgr show assoc user=$USER format=account,qos` lists yours; set it with --qos"),
    ("nvalid partition", "this cluster has no such partition", "`sinfo -s` lists them; set it with --partition"),
    ("generic resource", "this cluster has no such gres",
     "`sinfo -o %G` lists them; set `gres` in the site profile"),
    ("node configuration is not available|can not be satisfied", "no node of this partition has what is asked for",
     "`sinfo -o '%P %D %c %m %G'` shows what they have"),
    ("QOS|policy", "your account's limits do not allow this job",
     "ask for less, or use another --qos or --account"),
    ("wckey", "this site does not know the job's wckey", "set sbatch = { wckey = '…' } in the site profile"),
)  # fmt: skip


def failure(program: str, stderr: str) -> HpcError:
    """Slurm's complaint as our error: what is wrong in our words, then Slurm's own."""
    words = " / ".join(
        re.sub(r"^\w+: (error|fatal): ", "", line.strip()) for line in stderr.splitlines() if line.strip()
    )
    for pattern, message, hint in _FAILURES:
        if re.search(pattern, words):
            return RuntimeUnavailable(f"{message} ({program}: {words})", hint=hint)
    return RuntimeUnavailable(f"{program} failed: {words or 'no message'}", hint="`hpc doctor` looks at Slurm")


def step(
    job_id: str, program: Sequence[str], *, nodes: int = 1, node: str | None = None, pty: bool = False
) -> list[str]:
    """The argv of one more step in a running job: beside the others, on the job's own CPUs and GPUs, one task a node.

    `node` names one of the job's nodes; without it the first ones are taken.
    """
    argv = ["srun", "--overlap", f"--jobid={job_id}", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
    argv += [f"--nodelist={node}"] if node else []
    argv += ["--pty"] if pty else ["--quit-on-interrupt"]
    return [*argv, *program]


def step_env(env: Mapping[str, str]) -> dict[str, str]:
    """srun's environment, which the step gets too; the GPUs that it sees are Slurm's to say."""
    return {k: v for k, v in program_env(env).items() if k != "CUDA_VISIBLE_DEVICES"}


_STEP_FAILURES = (
    ("unrecognized option '--overlap'", RuntimeUnavailable, "this Slurm is older than 20.11: no step can join a job",
     "log in to the node, where your site allows it"),
    ("Invalid job id|has expired|already complet|CANCELLED AT|Job step aborted|Force Terminated",
     HpcError, "its job has ended", "`hpc status` shows how"),
    ("node configuration|Invalid node name|Only allocated", UsageError, "its job is not on this node",
     "`hpc status` shows its nodes"),
    ("Access/permission denied", RuntimeUnavailable, "Slurm does not let you into this job",
     "is it another user's?"),
)  # fmt: skip


def step_failure(what: str, words: str) -> HpcError:
    """srun's complaint about a step in the job of `what` (RUN/STAGE), as our error."""
    for pattern, kind, message, hint in _STEP_FAILURES:
        if re.search(pattern, words):
            return kind(f"{what}: {message}", hint=hint)
    return failure("srun", words)


def queue(user: str, call: Run = run) -> dict[str, Queued]:
    """The user's jobs, with those that ended in the last minutes (the controller still knows their true end)."""
    return parse_queue(call(["squeue", "-h", "-r", "-t", "all", "-u", user, "-o", _QUEUE]))


def parse_queue(text: str) -> dict[str, Queued]:
    jobs = {}
    for line in text.splitlines():
        parts = line.strip().split("|", 7)
        if len(parts) == 8:
            job_id, state, reason, start, submit, limit, nodes, comment = parts
            jobs[job_id] = Queued(
                job_id=job_id,
                state=state,
                reason=reason,
                start=seconds(start),
                submit=seconds(submit),
                limit=limit,
                nodes=nodes,
                comment=comment,
            )
    return jobs


def accounting(job_ids: Iterable[str], call: Run = run) -> dict[str, Accounted]:
    """The jobs as the accounting has them; {} where there is no accounting."""
    try:
        return parse_accounting(call(["sacct", "-n", "-P", "-o", _ACCOUNT, "-j", ",".join(job_ids)]))
    except RuntimeUnavailable:
        return {}


def parse_accounting(text: str) -> dict[str, Accounted]:
    jobs: dict[str, Accounted] = {}
    for line in text.splitlines():
        parts = line.split("|")
        if len(parts) < 7:
            continue
        name, state, code, submit, start, end, nodes = parts[:7]
        job_id, step, _ = name.partition(".")
        state = state.split(" ")[0]  # "CANCELLED by 1002"
        if not step:
            jobs[job_id] = Accounted(
                job_id=job_id,
                state=state,
                exit_code=int(code.partition(":")[0] or 0),
                submit=seconds(submit),
                start=seconds(start),
                end=seconds(end),
                nodes="" if nodes == "None assigned" else nodes,
            )
        elif state == "OUT_OF_MEMORY" and job_id in jobs:
            jobs[job_id] = _as_out_of_memory(jobs[job_id])
    return jobs


def _as_out_of_memory(job: Accounted) -> Accounted:
    """With srun the job itself is only FAILED: the step knows."""
    from dataclasses import replace

    return replace(job, state="OUT_OF_MEMORY")


def partitions(call: Run = run) -> dict[str, Partition]:
    """What every partition allows, from one sinfo."""
    return parse_partitions(call(["sinfo", "-h", "-e", "-o", _SINFO]))


def parse_partitions(text: str) -> dict[str, Partition]:
    found: dict[str, Partition] = {}
    for line in text.splitlines():
        parts = line.strip().split("|", 6)
        if len(parts) != 7:
            continue
        name, avail, limit, count, cpus, mem, gres = parts
        plain = name.rstrip("*")
        node = NodeKind(count=int(count), cpus=_number(cpus), mem_gb=_number(mem) // 1024, gpus=parse_gres(gres))
        known = found.get(plain)
        found[plain] = Partition(
            name=plain,
            default=name.endswith("*"),
            up=avail == "up",
            time_min=minutes(limit),
            nodes=(*(known.nodes if known else ()), node),
        )
    return found


def nodes(partition: str | None, names: Sequence[str] = (), call: Run = run) -> list[Node]:
    """The partition's nodes (None: the default partition's), or those of these names; each once."""
    argv = ["sinfo", "-h", "-N", "-o", "%N|%T|%P", *(["-p", partition] if partition else [])]
    return parse_nodes(call([*argv, "-n", ",".join(names)] if names else argv), default=partition is None)


def parse_nodes(text: str, *, default: bool) -> list[Node]:
    found = {}
    for line in text.splitlines():
        parts = line.strip().split("|")
        if len(parts) == 3 and (not default or parts[2].endswith("*")):
            found[parts[0]] = Node(name=parts[0], state=parts[1])
    return list(found.values())


def hostnames(text: str, call: Run = run) -> list[str]:
    """The names that a list like dgx[01-04,07],mig01 means."""
    return call(["scontrol", "show", "hostnames", text]).split()


def parse_gres(text: str) -> dict[str, int]:
    """GPU type -> count of a node's gres; '' is a GPU without a type.

    >>> parse_gres("gpu:a100:8(S:0-1)"), parse_gres("gpu:4,lustre:1"), parse_gres("(null)")
    ({'a100': 8}, {'': 4}, {})
    """
    gpus: dict[str, int] = {}
    for item in re.sub(r"\([^)]*\)", "", text).split(","):
        name, *rest = item.strip().split(":")
        if name == "gpu":
            count = rest[-1] if rest and rest[-1].isdigit() else "1"
            kind = rest[0] if rest and not rest[0].isdigit() else ""
            gpus[kind] = gpus.get(kind, 0) + int(count)
    return gpus


def minutes(text: str) -> int | None:
    """Slurm's time as whole minutes, rounded up; None for no limit. ValueError where it is none.

    >>> [minutes(t) for t in ("30", "30:00", "1:30:00", "7-00:00:00", "1-12", "infinite", "0:30")]
    [30, 30, 90, 10080, 2160, None, 1]
    """
    if text.lower() in {"infinite", "unlimited", "n/a", "not_set", "partition_limit"}:
        return None
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", text, re.ASCII):
        raise ValueError(text)
    days, dash, rest = text.rpartition("-")
    parts = [int(p) for p in rest.split(":")]
    if dash:
        hours, mins, secs = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, mins, secs = parts
    else:
        hours, (mins, secs) = 0, [*parts, 0][:2]
    return (int(days or 0) * 24 + hours) * 60 + mins + (1 if secs else 0)


def seconds(text: str) -> float | None:
    """SLURM_TIME_FORMAT=%s prints seconds since 1970; what is not known yet is a word."""
    return float(text) if text.isdigit() else None


def cancel(job_ids: Sequence[str], call: Run = run) -> None:
    """Cancel jobs by id. One that has ended already is no error."""
    call(["scancel", *job_ids])


def find(user: str, comment: str, call: Run = run) -> Queued | None:
    """The user's job with this comment: for a submission whose answer was lost."""
    return next((job for job in queue(user, call).values() if job.comment == comment), None)


def _number(text: str) -> int:
    """A count; sinfo adds a plus sign where the nodes differ."""
    return int(re.sub(r"\D.*", "", text) or 0)
