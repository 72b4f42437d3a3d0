"""The ranks of one training: who this process is, and what all of them must decide alike."""

from __future__ import annotations

import os

MEANT = "HPC_WORLD_SIZE"
"""How many ranks the plan asked for; set by `hpc.inside.ranks`."""


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def any_of(flag: bool) -> bool:
    """True on every rank where it is true on one. All ranks must call it."""
    if world() == 1:
        return flag
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        return flag
    device = torch.device("cuda", local_rank()) if distributed.get_backend() == "nccl" else torch.device("cpu")
    flags = torch.tensor([flag], dtype=torch.int32, device=device)
    distributed.all_reduce(flags, distributed.ReduceOp.MAX)
    return bool(flags.item())


def barrier() -> None:
    """Until every rank is here."""
    any_of(False)
