"""
Base + adapters, tensor by tensor: memory holds one weight, whatever the model's size.

The sum is made in float32, checked against the two apart, and rounded once to the wanted type. Weights that no
adapter changes are copied by the kernel where they have that type already.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc.core.errors import HpcError, VerificationFailed
from hpc.core.rundir import read_json, write_json
from hpc.inside import adapters, tensors
from hpc.inside.adapters import Adapter
from hpc.inside.tensors import Entry, Writer

TOLERANCE = 1e-4
"""Of one weight's product with a random vector, relative: float32 sums in another order."""

Weighted = tuple[Adapter, float]


def whole(folder: Path) -> dict[str, Entry]:
    """All tensors of a model folder; HpcError for one that is stored quantised."""
    quantized = (read_json(folder / "config.json") or {}).get("quantization_config")
    if quantized:
        kind = quantized.get("quant_method", "an unknown way")
        raise HpcError(
            f"the base in {folder} is stored quantised ({kind}): adding the adapter there would round it away",
            hint="set merge.base_model to the same model as it was before it was quantised",
        )
    return {name: entry for file in tensors.shards(folder) for name, entry in tensors.catalogue(file).items()}


def only_peft(weighted: Sequence[Weighted], entries: Mapping[str, Entry], base: Path) -> str:
    """Why peft must do it, with the whole model in memory; empty: it need not."""
    config = read_json(base / "config.json") or {}
    tied = bool(config.get("tie_word_embeddings", False))
    reasons = (adapter.beyond or adapters.fit(adapter, entries, tied=tied) for adapter, _ in weighted)
    return next(filter(None, reasons), "")


def merge(
    base: Path, weighted: Sequence[Weighted], target: Path, dtype: str, tell: Callable[[int, int], None]
) -> float:
    """Write the weights of base + Σ weight · adapter; the largest relative difference that the check saw."""
    files = tensors.shards(base)
    worst, sizes, places, done = 0.0, 0, {}, 0
    total = sum(file.stat().st_size for file in files)
    for file in files:
        entries = tensors.catalogue(file)
        header = {name: (dtype if e.floating else e.dtype, e.shape) for name, e in entries.items()}
        with tensors.writing(target / file.name, header) as writer:
            for name, entry in entries.items():
                worst = max(worst, _one(name, entry, weighted, dtype, writer))
                done += entry.end - entry.begin
                tell(done, total)
        sizes += writer.size
        places.update(dict.fromkeys(entries, file.name))
    if len(files) > 1:
        write_json(
            target / tensors.INDEX, {"metadata": {"total_size": sizes}, "weight_map": dict(sorted(places.items()))}
        )
    elif files[0].name != "model.safetensors":
        (target / files[0].name).rename(target / "model.safetensors")
    return worst


def _one(name: str, entry: Entry, weighted: Sequence[Weighted], dtype: str, writer: Writer) -> float:
    """One tensor of the new model; the difference that its check saw."""
    import torch

    changes = [(a.factors[name], weight) for a, weight in weighted if name in a.factors]
    if not changes and entry.dtype == (dtype if entry.floating else entry.dtype):
        writer.copy(name, entry)
        return 0.0
    kind = getattr(torch, dtype)
    if not changes:
        writer.add(name, (tensors.read(entry, rows).to(kind) for rows in tensors.pieces(entry)))
        return 0.0
    factors = [(*adapters.change(factor), factor.scale * weight) for factor, weight in changes]
    probe = torch.randn(entry.shape[1], generator=torch.Generator().manual_seed(0))
    worst = 0.0

    def sums() -> Iterator[Any]:
        nonlocal worst
        for rows in tensors.pieces(entry):
            merged = tensors.read(entry, rows).to(torch.float32)
            apart = merged @ probe
            for a, b, scale in factors:
                merged.addmm_(b[rows], a, alpha=scale)
                apart += scale * (b[rows] @ (a @ probe))
            difference = float((merged @ probe - apart).abs().max() / apart.abs().max().clamp(min=1e-6))
            if not difference <= TOLERANCE:
                raise VerificationFailed(f"{name}: the sum differs by {difference:.3g} from base and adapter apart")
            worst = max(worst, difference)
            rounded = merged.to(kind)
            if dtype == "float16" and not bool(torch.isfinite(rounded).all()):
                raise VerificationFailed(f"{name} has values beyond float16", hint='set merge.dtype = "bfloat16"')
            yield rounded

    writer.add(name, sums())
    return worst


def configure(base: Path, target: Path, dtype: str) -> None:
    """config.json as the base's, with the new type, for inference."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    names = [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype", "torch_dtype"]
    write_json(target / "config.json", {**config, **dict.fromkeys(names, dtype), "use_cache": True})
