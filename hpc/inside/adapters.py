"""A LoRA adapter as files: which weights it changes, by how much, and what only peft itself can merge."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hpc.core.errors import HpcError, UsageError, VerificationFailed
from hpc.core.rundir import read_json
from hpc.inside import tensors
from hpc.inside.tensors import Entry

_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_PLAIN = {"none", None}
_UNUSUAL = ("trainable_token_indices", "target_parameters", "megatron_config", "use_qalora", "alora_invocation_tokens")


@dataclass(frozen=True, kw_only=True)
class Factor:
    """The change of one weight: scale · B · A."""

    a: Entry
    b: Entry
    scale: float


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One adapter's folder."""

    folder: Path
    factors: Mapping[str, Factor]
    """Name of the base's weight -> its change."""
    replaced: Mapping[str, Entry]
    """Weights of the base that it has whole, in their place (modules_to_save)."""
    beyond: str
    """What it has that only peft can merge; empty: nothing."""


def base_of(folder: Path) -> str:
    """The base that an adapter was trained on, by our base.json or else peft's own adapter_config.json."""
    ours = read_json(folder / "base.json") or {}
    base = ours.get("base_model") or _config(folder).get("base_model_name_or_path")
    if not base:
        raise UsageError(f"{folder} does not say which base it was trained on", hint="set merge.base_model")
    return str(base)


def read(folder: Path) -> Adapter:
    """The adapter in a folder; HpcError where there is none that is safe to read, or where a part of it lacks."""
    config = _config(folder)
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        if next(folder.glob("*.bin"), None):
            raise HpcError(f"{folder} holds its weights as a pickle", hint="save the adapter as safetensors")
        raise HpcError(f"{folder} has no adapter_model.safetensors", hint="the copy may be incomplete")
    entries = tensors.catalogue(file)
    _refuse(config, folder)
    beyond = _beyond(config)
    pairs: dict[str, dict[str, Entry]] = {}
    replaced: dict[str, Entry] = {}
    for name, entry in entries.items():
        match = _KEY.fullmatch(name)
        if match is None:
            beyond = beyond or f"it has {name}"
            replaced[name.removeprefix("base_model.model.")] = entry
        else:
            pairs.setdefault(match[1], {})[match[2]] = entry
    half = next((module for module, pair in pairs.items() if len(pair) == 1), "")
    if half or not entries:
        what = f"one of the two matrices for {half}" if half else "every matrix"
        raise VerificationFailed(f"{file} lacks {what}", hint="the copy may be incomplete: save the adapter again")
    factors = {
        f"{module}.weight": Factor(a=pair["A"], b=pair["B"], scale=_scale(module, pair["A"].shape[0], config))
        for module, pair in pairs.items()
    }
    return Adapter(folder=folder, factors=factors, replaced=replaced, beyond=beyond)


def resized(adapter: Adapter, base: Mapping[str, Entry]) -> int:
    """Rows of the embeddings that an adapter with added tokens brings along; 0: as many as the base has."""
    other = {
        name: entry.shape[0]
        for name, entry in adapter.replaced.items()
        if name in base and len(entry.shape) == 2 and entry.shape[0] != base[name].shape[0]
    }
    if not other:
        return 0
    shapes = {base[name].shape for name in other}
    left = next((name for name, entry in base.items() if entry.shape in shapes and name not in other), None)
    if left is not None or len(set(other.values())) > 1:
        raise VerificationFailed(
            f"the adapter was trained with added tokens, and lacks their weights in {left or 'a matrix'}",
            hint="train it with modules_to_save for both the embeddings and the output (embed_tokens, lm_head)",
        )
    return next(iter(other.values()))


def nested(adapter: Adapter, base: Mapping[str, Entry]) -> Adapter:
    """
    The adapter by the names of the base's files: those of a model that also sees nest them otherwise than transformers
    does (language_model.model.layers, model.language_model.layers).
    """
    there = {_nesting(name): name for name in base}
    names = {name: name if name in base else there.get(_nesting(name), name) for name in adapter.factors}
    return replace(adapter, factors={names[name]: factor for name, factor in adapter.factors.items()})


def _nesting(name: str) -> tuple[str, ...]:
    """A weight's name whatever the order of what stands before its layer's number."""
    head, *tail = re.split(r"\.(?=\d)", name, maxsplit=1)
    return (*sorted(head.split(".")), *tail)


def fit(adapter: Adapter, base: Mapping[str, Entry], *, tied: bool) -> str:
    """Why peft must merge it into these weights, or ""; VerificationFailed where a shape is another."""
    for name, factor in adapter.factors.items():
        if name not in base:
            return f"the base's files have no {name}"
        shape = (factor.b.shape[0], factor.a.shape[1])
        if base[name].shape != shape:
            raise VerificationFailed(
                f"the adapter does not fit the base: {name} is {base[name].shape} there, and {shape} in the adapter",
                hint="merge.base_model must be the model that it was trained on",
            )
        if tied and not re.search(r"\.layers?\.|\.h\.|\.blocks\.", name):
            return f"it changes {name}, and this base ties its embeddings"
    return ""


def change(factor: Factor) -> tuple[Any, Any]:
    """A and B in float32; VerificationFailed where a value is not finite."""
    import torch

    a, b = (tensors.read(entry).to(torch.float32) for entry in (factor.a, factor.b))
    if not (bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all())):
        raise VerificationFailed("the adapter has values that are not finite", hint="did the training diverge?")
    return a, b


def _config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "adapter_config.json")
    if config is None:
        raise UsageError(f"{folder} is no adapter", hint="it must hold adapter_config.json")
    return config


def _refuse(config: Mapping[str, Any], folder: Path) -> None:
    """HpcError for an adapter of another model than its base: neither we nor peft can make that again from it."""
    if (start := str(config.get("init_lora_weights"))).startswith(("corda", "lora_ga")):
        raise HpcError(
            f"the start of the adapter in {folder} ({start}) changed the base by what is not in the adapter",
            hint="save it again with peft's path_initial_model_for_weight_conversion: that makes a plain adapter of it",
        )
    if config.get("layer_replication"):
        raise HpcError(
            f"the adapter in {folder} repeats layers of its base (layer_replication)",
            hint="merge it by peft where it was trained: a base with other layers is another model",
        )


def _beyond(config: Mapping[str, Any]) -> str:
    """The kind of adapter, where its change is not just a product of two matrices."""
    if config.get("peft_type", "LORA") != "LORA":
        return f"it is of the kind {config['peft_type']}"
    if (start := str(config.get("init_lora_weights"))).startswith(("pissa", "olora", "loftq")):
        return f"its start ({start}) changed the base, which peft does again"
    if config.get("use_dora"):
        return "it is a DoRA adapter"
    if config.get("modules_to_save"):
        return f"it replaces {', '.join(config['modules_to_save'])} (modules_to_save)"
    if config.get("bias") not in _PLAIN or config.get("lora_bias"):
        return "it changes biases"
    if config.get("fan_in_fan_out"):
        return "its matrices are transposed (fan_in_fan_out)"
    return next((f"it has {name}" for name in _UNUSUAL if config.get(name)), "")


def _scale(module: str, rank: int, config: Mapping[str, Any]) -> float:
    patterns = config.get("alpha_pattern") or {}
    alpha = next((v for k, v in patterns.items() if re.fullmatch(rf"(.*\.)?({k})", module)), config["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
