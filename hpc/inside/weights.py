"""
Weight files: whether safetensors are whole, and pickles turned into safetensors where they were asked for by name.

A pickle can run any code when it is loaded. Where one is read at all, it is with torch's weights_only, which loads
tensors and nothing else.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Collection, Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from hpc.core.errors import HpcError, VerificationFailed

PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl")

_BESIDE = ("training_args.bin", "optimizer.*", "scheduler.*", "scaler.*", "rng_state*")
"""What a trainer leaves beside the weights: nothing of the model."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_SHARD_NAME = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")
_SHARD = 4 << 30
_HEADER = 100 << 20


def check(folder: Path) -> int:
    """Bytes of the weights in a model's folder. VerificationFailed where a file is cut off, or one is missing."""
    files = sorted(folder.glob("*.safetensors"))
    named = {name: tensors(folder / name) for name in (path.name for path in files)}
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        for tensor, name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            if tensor not in named.get(name, ()):
                raise VerificationFailed(
                    f"{folder} lacks {name}, or {tensor} in it, which its index names",
                    hint="the download or copy is not complete",
                )
    for name in named:
        if (shard := _SHARD_NAME.fullmatch(name)) and (missing := _missing(shard, named)):
            raise VerificationFailed(f"{folder} lacks {missing}", hint="the download or copy is not complete")
    if not files:
        raise VerificationFailed(f"{folder} has no .safetensors file", hint="the download or copy may be incomplete")
    return sum(path.stat().st_size for path in files)


def _missing(shard: re.Match[str], named: Collection[str]) -> str:
    """The first of the shards that this one counts, and that are not among the names."""
    head, digits, total = shard[1], len(shard[2]), int(shard[3])
    wanted = (f"{head}-{number:0{digits}}-of-{shard[3]}.safetensors" for number in range(1, total + 1))
    return next((name for name in wanted if name not in named), "")


def tensors(path: Path) -> set[str]:
    """The names of the tensors in a safetensors file. VerificationFailed where it is cut off. Standard library."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _HEADER:
                raise ValueError
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise VerificationFailed(f"{path} is not a safetensors file", hint="fetch it again") from error
    if path.stat().st_size != 8 + length + end:
        raise VerificationFailed(f"{path} is cut off, or has a tail", hint="fetch it again")
    return set(header)


def refuse(names: Iterable[str], where: str, allowed: Sequence[str]) -> list[str]:
    """The pickles of weights among the names, all of them asked for by name; else an HpcError that says how."""
    found = sorted(name for name in names if name.endswith(PICKLES) and not any(fnmatch(name, b) for b in _BESIDE))
    found = [name for name in found if re.fullmatch(r"pytorch_model.*\.bin", name)] or found
    refused = [name for name in found if Path(name).name not in allowed and name not in allowed]
    if refused:
        raise HpcError(
            f"{where} holds its weights as pickles ({', '.join(refused[:3])}), which can run any code when loaded",
            hint="take a repository with safetensors; or, where you trust it, name them: fetch.pickles = "
            + json.dumps(refused),
        )
    return found


def converted(pickles: Sequence[Path], target: Path, tell: Callable[[float, float, str], None]) -> None:
    """Pickled weights as safetensors. Ties are told by equal storage: such a tensor is written once."""

    def states() -> Iterable[tuple[str, Any]]:
        for number, path in enumerate(pickles):
            tell(number, len(pickles), f"converting {path.name}")
            state = loaded(path)
            seen: set[tuple[int, int, tuple[int, ...]]] = set()
            for name, tensor in state.items():
                where = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape))
                if where not in seen:
                    yield name, tensor
                seen.add(where)

    write(states(), target)


def loaded(path: Path) -> dict[str, Any]:
    """The tensors of a pickle, mapped and not read; HpcError for one that holds anything else."""
    import pickle

    import torch

    try:
        try:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError:  # of before torch 1.6: it can't be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise VerificationFailed(
            f"{path} is no file of tensors alone: {_COLOUR.sub('', str(error)).splitlines()[0][:200]}",
            hint="it holds code or is broken; take a model with safetensors",
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise VerificationFailed(f"{path} holds something else than tensors", hint="take a model with safetensors")
    return state


def write(state: Iterable[tuple[str, Any]], target: Path, shard: int = _SHARD) -> None:
    """Tensors as safetensors of at most so many bytes each, with an index where there are several."""
    from safetensors.torch import save_file

    parts: list[list[str]] = []
    held: dict[str, Any] = {}
    total = bytes_held = 0

    def flush() -> None:
        nonlocal bytes_held
        save_file(held, target / f"part-{len(parts)}.safetensors", metadata={"format": "pt"})
        parts.append(list(held))
        held.clear()
        bytes_held = 0

    for name, tensor in state:
        size = tensor.numel() * tensor.element_size()
        if held and bytes_held + size > shard:
            flush()
        held[name] = tensor.contiguous()
        total, bytes_held = total + size, bytes_held + size
    flush()
    names: dict[str, str] = {}
    for number, part in enumerate(parts):
        name = f"model-{number + 1:05}-of-{len(parts):05}.safetensors" if len(parts) > 1 else "model.safetensors"
        (target / f"part-{number}.safetensors").rename(target / name)
        names |= dict.fromkeys(part, name)
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": names}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
