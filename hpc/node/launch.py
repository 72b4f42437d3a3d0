"""PURE: what is started on the node: the container's argv, its binds and its environment."""

from __future__ import annotations

import csv
import fnmatch
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

PASSES = (
    "SLURM_*", "SLURMD_NODENAME", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_*", "ROCR_VISIBLE_DEVICES",
    "NCCL_*", "PMI*", "UCX_*", "MASTER_ADDR", "MASTER_PORT", "OMP_*", "MKL_NUM_THREADS",
    "HF_TOKEN", "HF_HUB_OFFLINE", "HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
    "http_proxy", "https_proxy", "no_proxy", "TZ", "TERM",
)  # fmt: skip
"""Job variables that reach the container, by name or pattern. Everything else of the host stays outside."""

FOR_CONTAINER = "APPTAINERENV_"
"""Before the name of a variable that the container program sets inside."""
NOT_SHOWN = "(not shown)"
"""Stands for a secret where an environment is written down."""
_SECRETS = ("*TOKEN*", "*SECRET*", "*PASS*", "*CREDENTIAL*", "*APIKEY*", "*_KEY", "*_PAT")
_LOGIN = re.compile(r"//[^/@\s]+@")
"""user:password in a URL, as in HTTPS_PROXY."""
_SET = re.compile(r"(.*\bsite\.env\b\.?([^=]*)=)(.*)", re.DOTALL)
"""A variable of the site's as an argument sets it: what is before its value, its name, the value."""


@dataclass(frozen=True)
class Bind:
    """One host path that the container sees at the same place."""

    path: str
    writable: bool = False


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One container start. The dry run shows this value, and the node uses it."""

    kind: Literal["sif", "venv"]
    argv: tuple[str, ...]
    env: Mapping[str, str]
    """Set in the container."""
    passes: tuple[str, ...]
    """Taken over from the job where they are set there."""
    binds: tuple[Bind, ...] = ()


def container(
    *,
    program: str,
    image: str,
    inner: Sequence[str],
    env: Mapping[str, str],
    passes: Sequence[str],
    binds: Sequence[Bind],
    gpus: bool,
    cwd: str,
    private: bool = False,
) -> Launch:
    """`inner` inside a SIF: only the listed paths and variables of the host are seen.

    Where it is private, nothing of its network, /dev/shm and /tmp either.
    """
    unique = tuple({bind.path: bind for bind in binds}.values())
    argv = [
        program,
        "--silent",
        "exec",
        "--cleanenv",
        "--no-eval",
        "--no-home",
        "--no-mount",
        "cwd",
        "--pwd",
        cwd,
    ]
    argv += ["--nv"] if gpus else []
    for bind in unique:
        argv += ["--mount", mount(bind)]
    argv += ["--net", "--network", "none", "--contain"] if private else []
    return Launch(
        kind="sif",
        argv=(*argv, image, *inner),
        env=dict(env),
        passes=tuple(passes),
        binds=unique,
    )


_WITH_VALUE = {"--no-mount", "--pwd", "--mount", "--network"}
"""The options of `container` whose value is the next word."""


def is_container(argv: Sequence[str]) -> bool:
    """True where `container` made this argv, False where `venv` did."""
    return "exec" in argv[1:3]


def beside(argv: Sequence[str], inner: Sequence[str], cwd: str) -> tuple[str, ...]:
    """Another program in the same container: argv as `container` made it, with other last words and folder."""
    words = list(argv)
    place = words.index("exec") + 1
    while words[place].startswith("--"):
        if words[place] == "--pwd":
            words[place + 1] = cwd
        place += 2 if words[place] in _WITH_VALUE else 1
    return (*words[: place + 1], *inner)


def venv(*, folder: str, inner: Sequence[str], env: Mapping[str, str], passes: Sequence[str]) -> Launch:
    """`inner`, whose first word is python3, with the Python of a venv."""
    path = {"PATH": f"{folder}/bin:/usr/local/bin:/usr/bin:/bin"}
    argv = (f"{folder}/bin/python3", *inner[1:])
    return Launch(kind="venv", argv=argv, env={**path, **env}, passes=tuple(passes))


def mount(bind: Bind) -> str:
    """The value of --mount: one line of CSV, so that commas and quotes in a path are kept.

    >>> mount(Bind("/a,b"))
    'type=bind,"src=/a,b","dst=/a,b",ro'
    """
    line = io.StringIO()
    fields = ["type=bind", f"src={bind.path}", f"dst={bind.path}"] + ([] if bind.writable else ["ro"])
    csv.writer(line, lineterminator="").writerow(fields)
    return line.getvalue()


def process_env(launch: Launch, job: Mapping[str, str]) -> dict[str, str]:
    """The environment of the process that the node starts: for a SIF, that of the container program itself.

    Variables for the container go as APPTAINERENV_X: the command line, which every user of the node can read,
    stays free of values.
    """
    inside = {**passed(launch.passes, job), **launch.env}
    if launch.kind == "venv":
        keep = {k: job[k] for k in ("HOME", "USER", "LANG", "TMPDIR") if k in job}
        return {"LANG": "C.UTF-8", **keep, **inside}
    outside = {k: v for k, v in job.items() if k in _OUTSIDE or k.startswith(("APPTAINER_", "SINGULARITY_"))}
    return {**outside, **{FOR_CONTAINER + k: v for k, v in inside.items()}}


_OUTSIDE = {"PATH", "HOME", "USER", "LOGNAME", "LANG", "TMPDIR", "XDG_RUNTIME_DIR", "LD_LIBRARY_PATH"}


def passed(patterns: Sequence[str], job: Mapping[str, str]) -> dict[str, str]:
    """The job's variables that match one of the patterns.

    >>> passed(("SLURM_*", "TZ"), {"SLURM_JOB_ID": "7", "PYTHONPATH": "/x"})
    {'SLURM_JOB_ID': '7'}
    """
    return {k: v for k, v in job.items() if any(fnmatch.fnmatchcase(k, p) for p in patterns)}


def without_secrets(env: Mapping[str, str]) -> dict[str, str]:
    """The environment as it may be written down: values of tokens and passwords are left out.

    >>> without_secrets({"HF_TOKEN": "hf_x", "TZ": "UTC"})
    {'HF_TOKEN': '(not shown)', 'TZ': 'UTC'}
    """
    return {
        k: NOT_SHOWN if any(fnmatch.fnmatchcase(k.upper(), s) for s in _SECRETS) else _LOGIN.sub(f"//{NOT_SHOWN}@", v)
        for k, v in env.items()
    }


def argument_without_secrets(word: str) -> str:
    """An argument of the command line as it may be written down.

    >>> argument_without_secrets("site.env.HF_TOKEN=hf_x"), argument_without_secrets("--set=site.env={HF_TOKEN='hf_x'}")
    ('site.env.HF_TOKEN=(not shown)', '--set=site.env=(not shown)')
    >>> argument_without_secrets("site.env.TZ=UTC"), argument_without_secrets("finetune.lora_r=16")
    ('site.env.TZ=UTC', 'finetune.lora_r=16')
    """
    found = _SET.fullmatch(word)
    if found is None:
        return word
    start, name, value = found.groups()
    return start + (without_secrets({name: value})[name] if name else NOT_SHOWN)
