"""One forward pass of a model whose weights stay in their files: a few MiB of them are in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpc.core.errors import VerificationFailed
from hpc.inside import adapters, tensors
from hpc.inside.adapters import Adapter
from hpc.inside.tensors import Entry


def logits(folder: Path, ids: Any, weighted: Sequence[tuple[Adapter, float]] = ()) -> Any:
    """
    The logits of the model in a folder, with adapters beside it, in float32.

    None where its files name the weights otherwise than transformers does. VerificationFailed where one is not finite.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    entries = {name: e for file in tensors.shards(folder) for name, e in tensors.catalogue(file).items()}
    with _hollow():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float().eval()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    for name, module in model.named_modules():
        own = {key: f"{name}.{key}" for key in module._parameters if module._parameters[key] is not None}
        if module is head and own and own["weight"] not in entries:  # tied to the embeddings
            own["weight"] = f"{names[id(embedding)]}.weight"
        if any(full not in entries for full in own.values()):
            return None
        if own:
            changes = [(a.factors[f"{name}.weight"], w) for a, w in weighted if f"{name}.weight" in a.factors]
            _stream(module, {key: entries[full] for key, full in own.items()}, changes)
    with torch.inference_mode():
        found = model(ids, use_cache=False).logits
    if not bool(torch.isfinite(found).all()):
        raise VerificationFailed("the model gives logits that are not finite", hint="did the training diverge?")
    return found


@contextmanager
def _hollow() -> Iterator[None]:
    """Models that are made in here have parameters without memory, and nothing is initialised; buffers are real."""
    from accelerate import init_empty_weights
    from torch.nn import init

    fillers = {name: getattr(init, name) for name in dir(init) if name.endswith("_") and name[0] != "_"}
    try:
        for name in fillers:
            setattr(init, name, lambda tensor, *_, **__: tensor)
        with init_empty_weights(include_buffers=False):
            yield
    finally:
        for name, filler in fillers.items():
            setattr(init, name, filler)


def _stream(module: Any, own: Mapping[str, Entry], changes: Sequence[tuple[adapters.Factor, float]]) -> None:
    """Let a module find its weights when it is called."""
    from torch import nn

    if type(module) is nn.Linear:
        module.forward = _linear(own, changes)
    elif type(module) is nn.Embedding:
        module.forward = _embedding(own["weight"])
    else:
        assert not changes, "adapters change matrices alone"
        module.register_forward_pre_hook(_loader(own))
        module.register_forward_hook(_unloader(dict(module._parameters)))


def _linear(own: Mapping[str, Entry], changes: Sequence[tuple[adapters.Factor, float]]) -> Callable[[Any], Any]:
    def forward(x: Any) -> Any:
        import torch

        weight = own["weight"]
        y = torch.cat([x @ tensors.read(weight, rows).to(x.dtype).T for rows in tensors.pieces(weight)], dim=-1)
        if "bias" in own:
            y += tensors.read(own["bias"]).to(x.dtype)
        for factor, share in changes:
            a, b = adapters.change(factor)
            y += factor.scale * share * (x @ a.T @ b.T)
        return y

    return forward


def _embedding(entry: Entry) -> Callable[[Any], Any]:
    def forward(ids: Any) -> Any:
        import torch

        rows = [tensors.read(entry, slice(i, i + 1)).to(torch.float32) for i in ids.flatten().tolist()]
        return torch.cat(rows).reshape(*ids.shape, -1)

    return forward


def _loader(own: Mapping[str, Entry]) -> Callable[..., None]:
    def load(module: Any, inputs: Any) -> None:
        import torch

        for key, entry in own.items():
            weight = tensors.read(entry).to(torch.float32)
            module._parameters[key] = torch.nn.Parameter(weight, requires_grad=False)

    return load


def _unloader(empty: Mapping[str, Any]) -> Callable[..., None]:
    def unload(module: Any, inputs: Any, output: Any) -> None:
        module._parameters.update(empty)

    return unload
