"""Samples of the GPUs that a job holds on this node, one JSON line each, for `hpc top`.

    python -m hpc.node.gpus SECONDS     0: one sample, and end; else until standard input is closed

{"node": …, "gpus": [{index, uuid, name, …}]}, or {"node": …, "problem": "a sentence"}
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

from hpc.core.errors import HpcError

_FIELDS = "index,uuid,name,utilization.gpu,memory.used,memory.total,temperature.gpu,power.draw"
_QUERY = ("nvidia-smi", f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits")
_ANSWER_S = 20


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU at one moment. None where nvidia-smi does not tell."""

    index: int
    uuid: str
    name: str
    utilization: float | None
    """Per cent of the last moment in which a kernel ran."""
    memory_used_mib: float | None
    memory_total_mib: float | None
    temperature_c: float | None
    power_w: float | None


def parse(text: str) -> list[Gpu]:
    """nvidia-smi's CSV, without a heading and without units. What is no line of a GPU is passed over.

    >>> parse("0, GPU-1, NVIDIA A100-SXM4-80GB, [N/A], 5, 81920, 33, 87.50")[0].power_w
    87.5
    """
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != 8 or not cells[0].isdigit():
            continue
        utilization, used, total, temperature, power = map(_number, cells[3:])
        found.append(
            Gpu(
                index=int(cells[0]),
                uuid=cells[1],
                name=cells[2],
                utilization=utilization,
                memory_used_mib=used,
                memory_total_mib=total,
                temperature_c=temperature,
                power_w=power,
            )
        )
    return found


def _number(text: str) -> float | None:
    """[N/A], [Not Supported], [Unknown Error] and the like are no numbers."""
    try:
        return float(text)
    except ValueError:
        return None


def slices(listing: str) -> dict[str, tuple[str, str]]:
    """MIG UUID -> (its profile, the card's UUID), from `nvidia-smi -L`."""
    found, card = {}, ""
    for line in listing.splitlines():
        if match := re.match(r"GPU \d+: .*\(UUID: (\S+)\)", line):
            card = match[1]
        elif match := re.match(r"\s+MIG (\S+)\s.*\(UUID: (\S+)\)", line):
            found[match[2]] = (match[1], card)
    return found


def own(cards: Sequence[Gpu], visible: str | None, listing: str = "") -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES names, by number, UUID or the beginning of one; all where it is not set.

    Of a MIG slice nvidia-smi tells neither use nor memory here: it stays the card's temperature and power.
    """
    if visible is None:
        return list(cards)
    known = slices(listing)
    found = []
    for word in filter(None, (word.strip() for word in visible.split(","))):
        profile, card = known.get(word, ("", word))
        for gpu in cards:
            if (str(gpu.index) == card) if card.isdigit() else gpu.uuid.startswith(card):
                found.append(_slice(gpu, word, profile) if profile else gpu)
    return found


def _slice(card: Gpu, uuid: str, profile: str) -> Gpu:
    name = f"{card.name} MIG {profile}"
    return replace(card, uuid=uuid, name=name, utilization=None, memory_used_mib=None, memory_total_mib=None)


def sample(visible: str | None) -> list[Gpu]:
    """The job's GPUs now. HpcError, one sentence, where nvidia-smi does not tell."""
    listing = _ask("nvidia-smi", "-L") if visible and "MIG-" in visible else ""
    found = own(parse(_ask(*_QUERY)), visible, listing)
    if not found:
        raise HpcError(f"nvidia-smi shows none of the job's GPUs (CUDA_VISIBLE_DEVICES={visible})")
    return found


def _ask(*argv: str) -> str:
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_ANSWER_S)
    except FileNotFoundError:
        raise HpcError("there is no nvidia-smi on this node") from None
    except subprocess.TimeoutExpired:
        raise HpcError(f"nvidia-smi gave no answer in {_ANSWER_S} s") from None
    if done.returncode:
        words = " ".join((done.stdout + done.stderr).split())
        raise HpcError(f"nvidia-smi failed: {words or f'exit code {done.returncode}'}")
    return done.stdout


def main(every_s: float) -> None:
    while True:
        line: dict[str, object] = {"node": os.uname().nodename}
        try:
            line["gpus"] = [asdict(gpu) for gpu in sample(os.environ.get("CUDA_VISIBLE_DEVICES"))]
        except HpcError as error:
            line["problem"] = error.message
        print(json.dumps(line), flush=True)
        if not every_s or _left(every_s):
            return


def _left(wait_s: float) -> bool:
    """True as soon as who started us has closed our standard input, or is gone."""
    ready, _, _ = select.select([0], [], [], wait_s)
    return bool(ready) and not os.read(0, 4096)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # the warning before the job's time limit is for the stage
    with suppress(BrokenPipeError, KeyboardInterrupt):
        main(float(sys.argv[1]))
