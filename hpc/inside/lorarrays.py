"""LoRA adapters as TensorRT-LLM's backend takes them with a request: an array of weights, and one of what they are.

A row for every matrix and layer: [module, layer, rank] in one array, A of [rank, in] and B of [out, rank] one after the
other, filled up with zeros, in the other. The scale is in B. As NVIDIA's hf_lora_convert.py writes them, which knows no
rank or alpha of single matrices.

Sources, read in NVIDIA/TensorRT-LLM and triton-inference-server/tensorrtllm_backend:
  the arrays        docs/source/advanced/lora.md and examples/hf_lora_convert.py at 05316d33
  modules' numbers  tensorrt_llm/lora_manager.py (LORA_MODULE_IDS; 0 to 7 have stayed the same since 0.8)
  what is refused   cpp/tensorrt_llm/runtime/loraUtils.cpp at 2a9abd95: type, layer, module, rank
  KV heads          cpp/tensorrt_llm/runtime/loraModule.cpp: a rank's KV heads times tp_size
  quantised         tensorrt_llm/quantization/layers.py: "lora is not supported on SmoothQuantLinear now", FP4Linear too
  the folder        docs/lora.md of the backend (lora_prefetch_dir)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.core import trtllm
from hpc.core.errors import HpcError, Refused, VerificationFailed
from hpc.core.passport import Passport
from hpc.core.shape import Shape
from hpc.inside import loras, tensors

FOLDER = "adapters"
"""In the engine's: one folder for each adapter, named after its task."""
WEIGHTS, CONFIG = "model.lora_weights.npy", "model.lora_config.npy"
MODULES = {
    "q_proj": ("attn_q", 1),
    "k_proj": ("attn_k", 2),
    "v_proj": ("attn_v", 3),
    "o_proj": ("attn_dense", 4),
    "gate_proj": ("mlp_h_to_4h", 5),
    "down_proj": ("mlp_4h_to_h", 6),
    "up_proj": ("mlp_gate", 7),
}
"""A matrix -> TensorRT-LLM's name and number of it. What is fused (Phi-3) has other arrays in every release."""
USUAL = ("attn_q", "attn_k", "attn_v")
"""The modules of an engine whose adapters are not known when it is built."""
_FAMILIES = ("llama", "qwen")
_UNABLE = ("int8_sq", "nvfp4")
_TYPES = {"float16": 2, "float32": 4}
_MERGE = "merge it into its model and build that: hpc submit merge"


@dataclass(frozen=True)
class Sizes:
    """What an adapter's files say without being read whole."""

    name: str
    places: Mapping[tuple[int, str], tuple[int, int, int]]
    """(layer, matrix) -> (in, rank, out)."""

    @property
    def rank(self) -> int:
        return max(rank for _, rank, _ in self.places.values())

    @property
    def modules(self) -> tuple[str, ...]:
        """TensorRT-LLM's names, by their numbers."""
        return _ordered({MODULES[matrix][0] for _, matrix in self.places})


def _ordered(names: set[str]) -> tuple[str, ...]:
    return tuple(name for name, _ in sorted(MODULES.values(), key=lambda pair: pair[1]) if name in names)


def sizes(name: str, folder: Path) -> Sizes:
    """Ranks and shapes, by the header of the adapter's file; Refused for what requests cannot bring along."""
    loras.inspect(name, folder)
    sides: dict[tuple[int, str], dict[str, tuple[int, ...]]] = {}
    for key, entry in tensors.catalogue(folder / "adapter_model.safetensors").items():
        weight = loras.WEIGHT.fullmatch(key)
        module = loras.MODULE.fullmatch(weight["module"]) if weight else None
        if weight is None or module is None or module["name"] not in MODULES:
            raise Refused(f"the adapter {name} changes {key}, which TensorRT-LLM takes from no request", hint=_MERGE)
        sides.setdefault((int(module["layer"]), module["name"]), {})[weight["side"]] = entry.shape
    places = {}
    for place, both in sides.items():
        a, b = both.get("A", ()), both.get("B", ())
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise Refused(
                f"the adapter {name} has no pair of matrices for {place[1]} of layer {place[0]}",
                hint="is it a whole file? copy or train it again",
            )
        places[place] = (a[1], a[0], b[0])
    if not places:
        raise Refused(f"the adapter {name} changes nothing", hint="is it the right folder?")
    return Sizes(name, places)


def read_sizes(config: Any) -> list[Sizes]:
    """Those of all of build.lora."""
    return [sizes(name, Path(folder)) for name, folder in loras.named(config.lora).items()]


def limits(config: Any, adapters: Sequence[Sizes]) -> tuple[int, tuple[str, ...]]:
    """(highest rank, modules) of the engine: what is set, else what its adapters need. Refused where they need more."""
    rank = config.max_lora_rank or max((adapter.rank for adapter in adapters), default=0)
    needed = _ordered({module for adapter in adapters for module in adapter.modules})
    modules = tuple(config.lora_modules) or needed or USUAL
    for adapter in adapters:
        if adapter.rank > rank:
            raise Refused(
                f"the adapter {adapter.name} has rank {adapter.rank}, and build.max_lora_rank is {rank}",
                hint=f"set build.max_lora_rank to {max(a.rank for a in adapters)}, or to 0: as high as needed",
            )
        if missing := [module for module in adapter.modules if module not in modules]:
            raise Refused(
                f"the adapter {adapter.name} changes {missing[0]}, which build.lora_modules lacks",
                hint="add it, or leave build.lora_modules empty: those that the adapters change",
            )
    return rank, modules


def judge(config: Any, adapters: Sequence[Sizes], architecture: str, shape: Shape | None) -> str:
    """The plan's note; Refused where the engine could not answer with these adapters."""
    rank, modules = limits(config, adapters)
    if architecture and trtllm.family(architecture) not in _FAMILIES:
        raise Refused(f"LoRA adapters by name are not known to work with {architecture}", hint=_MERGE)
    refuse_kind(config.dtype, config.quantization)
    if shape is not None:
        _refuse_misfits(config, adapters, shape)
    names = ", ".join(adapter.name for adapter in adapters)
    return f"build: LoRA adapters {names}: ranks up to {rank}, {' '.join(modules)}"


def refuse_kind(dtype: str, quantization: str) -> None:
    """Refused where the model's layers take no adapters, or the arrays cannot have the engine's type, as they must."""
    if quantization in _UNABLE:
        raise Refused(
            f"TensorRT-LLM has no LoRA adapters for a model quantised by {quantization}",
            hint="set build.quantization to none, int8, int4, int4_awq or fp8, or merge one adapter: hpc submit merge",
        )
    if dtype not in (*_TYPES, "auto"):
        raise Refused(
            f"LoRA adapters cannot be handed to a {dtype} engine: numpy, and so Triton's Python models, lack the type",
            hint='set build.dtype = "float16"',
        )


def _refuse_misfits(config: Any, adapters: Sequence[Sizes], shape: Shape) -> None:
    queries, values = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    right = {
        "q_proj": (shape.hidden, queries),
        "k_proj": (shape.hidden, values),
        "v_proj": (shape.hidden, values),
        "o_proj": (queries, shape.hidden),
        "gate_proj": (shape.hidden, shape.intermediate),
        "up_proj": (shape.hidden, shape.intermediate),
        "down_proj": (shape.intermediate, shape.hidden),
    }
    for adapter in adapters:
        for (layer, matrix), (width, _, out) in adapter.places.items():
            if layer >= shape.layers or (width, out) != right[matrix]:
                there = f"{right[matrix][0]} × {right[matrix][1]}" if layer < shape.layers else "not there"
                raise Refused(
                    f"the adapter {adapter.name} is of another model: its {matrix} of layer {layer} is"
                    f" {width} × {out}, the model's {there}",
                    hint="name the adapters of this model in build.lora",
                )
        if config.tp_size > shape.kv_heads and {"attn_k", "attn_v"} & set(adapter.modules):
            raise Refused(
                f"the adapter {adapter.name} changes keys or values, and tp_size {config.tp_size} is more than"
                f" the model's {shape.kv_heads} KV heads, which TensorRT-LLM then counts several times",
                hint=f"set build.tp_size to {shape.kv_heads} or less, with pp_size for the rest; or merge the adapter",
            )


def arrays(adapter: loras.Adapter, dtype: str) -> tuple[Any, Any]:
    """(weights, config) of an adapter whose scale is in its B already."""
    import numpy as np

    rows, config = [], []
    for (layer, _, matrix), (a, b) in sorted(
        adapter.pairs.items(), key=lambda one: (int(one[0][0]), MODULES[one[0][2]][1])
    ):
        rows.append(np.concatenate([a.T.ravel(), b.T.ravel()]))
        config.append([MODULES[matrix][1], int(layer), a.shape[1]])
    weights = np.zeros((1, len(rows), max(row.size for row in rows)), np.dtype(dtype))
    with np.errstate(over="ignore"):
        for row, whole in zip(weights[0], rows, strict=True):
            row[: whole.size] = whole
    if not np.isfinite(weights).all():
        raise VerificationFailed(
            f"the adapter {adapter.name} has values that {dtype} cannot hold", hint='build with dtype = "float32"'
        )
    return weights, np.array([config], np.int32)


def write(part: Path, adapters: Mapping[str, str], dtype: str, max_rank: int) -> dict[str, dict[str, Any]]:
    """Put the arrays beside the engine; what its passport tells of each adapter."""
    if not adapters:
        return {}
    import numpy as np

    told: dict[str, dict[str, Any]] = {}
    for task, (name, given) in enumerate(adapters.items(), 1):
        adapter = loras.read(name, Path(given))
        weights, config = arrays(adapter, dtype)
        folder = part / FOLDER / str(task)
        folder.mkdir(parents=True)
        np.save(folder / WEIGHTS, weights)
        np.save(folder / CONFIG, config)
        once = sum(a.shape[0] + b.shape[1] for a, b in adapter.pairs.values())
        told[name] = {
            "task": task, "rank": adapter.rank, "digest": _digest(folder), "bytes": once * max_rank * _TYPES[dtype],
        }  # fmt: skip
    return told


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        with open(folder / name, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def verify(engine: Path, found: Passport) -> None:
    """VerificationFailed where an adapter's arrays are not those that the passport names."""
    for name, told in found.adapters.items():
        try:
            same = _digest(engine / FOLDER / str(told["task"])) == told["digest"]
        except OSError as error:
            raise VerificationFailed(
                f"the engine's adapter {name} cannot be read: {error}", hint="build it again: hpc submit build"
            ) from error
        if not same:
            raise VerificationFailed(
                f"the engine's adapter {name} is not the one that was built in", hint="build it again: hpc submit build"
            )


def settings(found: Passport, fraction: float) -> dict[str, Any]:
    """What the model repository must know: the type, the adapters' tasks, and a cache in host memory that holds all."""
    whole = max((int(told["bytes"]) for told in found.adapters.values()), default=0)
    return {
        "lora_data_type": {"float32": "TYPE_FP32", "bfloat16": "TYPE_BF16"}.get(found.dtype, "TYPE_FP16"),
        "adapters": json.dumps({name: told["task"] for name, told in found.adapters.items()}),
        "lora_cache_optimal_adapter_size": max(
            (int(told["rank"]) for told in found.adapters.values()), default=found.max_lora_rank
        ),
        "lora_cache_max_adapter_size": found.max_lora_rank,
        "lora_cache_gpu_memory_fraction": fraction,
        # pages are of the largest adapter's kind, and one may be half empty
        "lora_cache_host_memory_bytes": max(1 << 30, 2 * whole * (len(found.adapters) + 1)),
    }


def refuse_vendor(found: Passport, vendor: str) -> None:
    """HpcError: NVIDIA's own models know tasks, not names."""
    if found.adapters and vendor:
        raise HpcError("NVIDIA's own repository takes no adapters by name", hint="leave serve.vendor_repository empty")
