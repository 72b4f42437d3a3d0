"""Whether a model fits on cards, and how it is divided among them: memory, divisibility, what a card can calculate in.

Pure arithmetic on the model's shape and the card. The rules of division are TensorRT-LLM's; the sizes are estimates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from hpc.core import trtllm
from hpc.core.errors import Refused
from hpc.core.gpus import Card
from hpc.core.shape import Shape

Quantization = Literal["none", "int8", "int4", "int8_sq", "int4_awq", "w4a8_awq", "fp8", "nvfp4"]
KvCache = Literal["auto", "int8", "fp8"]

GIB = 2**30
KV_SHARE = 0.9
"""Share of the memory left beside the weights that the server gives the KV cache."""
RESERVED_GIB = 1.0
"""CUDA's context, NCCL's buffers and the like on every card."""


@dataclass(frozen=True)
class Precision:
    """What a quantisation makes of the layers' matrices, and the capability of a card that it needs."""

    bytes: float
    compute: tuple[int, int] = (8, 0)
    group: int = 1
    """A rank's share of a matrix must be a multiple of so many rows and columns."""


PRECISIONS = {
    "none": Precision(2.0),
    "int8": Precision(1.0),
    "int4": Precision(0.5, group=64),
    "int8_sq": Precision(1.0),
    "int4_awq": Precision(0.53, group=128),
    "w4a8_awq": Precision(0.53, (8, 9), group=128),
    "fp8": Precision(1.0, (8, 9)),
    "nvfp4": Precision(0.5625, (10, 0), group=16),
}
"""Sources: TensorRT-LLM's support matrix (capability), its quantisation notes (group 128 of AWQ with a scale each)."""
_OLDEST = (8, 0)
"""TensorRT-LLM's support matrix since 0.18; V100 was removed before."""
KV_BYTES = {"auto": 2.0, "int8": 1.0, "fp8": 1.0}
FLOATS = {"float16": 2.0, "bfloat16": 2.0, "float32": 4.0}


@dataclass(frozen=True, kw_only=True)
class Division:
    """One way to run a model: on tp x pp cards, in these precisions, for requests of these sizes."""

    tp: int = 1
    pp: int = 1
    dtype: str = "float16"
    quantization: str = "none"
    kv_cache: str = "auto"
    max_batch_size: int = 64
    max_seq_len: int = 2048
    max_num_tokens: int = 8192
    as_is: bool = False
    """The model's files are loaded as they are (llmapi): their size is that of the weights."""

    @property
    def world(self) -> int:
        """GPUs = ranks."""
        return self.tp * self.pp


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Memory of the fullest GPU."""

    weights_gib: float
    activations_gib: float
    kv_token_bytes: float
    """Of one token, on one GPU."""
    kv_tokens: int
    """Tokens that the KV cache holds."""


def estimate(shape: Shape, card: Card, way: Division) -> Estimate:
    """What lies on each GPU, GiB; the first pipeline stage may have a layer more, the last has the output matrix."""
    width = FLOATS[way.dtype]
    layers = math.ceil(shape.layers / way.pp)
    per_value = PRECISIONS[way.quantization].bytes if way.quantization != "none" else width
    matrices = shape.linear * per_value
    if way.as_is and shape.stored is not None:
        matrices = max(0.0, shape.stored - shape.embedding * width * (1 if shape.tied else 2))
    # the table of the input is whole on every rank (convert's --use_parallel_embedding is off), the output's is divided
    embedding = shape.embedding * width * (1 if way.pp > 1 or shape.tied else 1 + 1 / way.tp)
    weights = matrices / shape.layers * layers / way.tp + embedding
    activations = way.max_num_tokens * (4 * shape.hidden + 2 * shape.intermediate / way.tp) * width
    logits = way.max_batch_size * shape.vocab * 4
    kv_width = width if way.kv_cache == "auto" else KV_BYTES[way.kv_cache]
    token = layers * shape.kv_values(way.tp) * kv_width
    free = (card.memory_gib - RESERVED_GIB) * GIB - weights - activations - logits
    return Estimate(
        weights_gib=weights / GIB,
        activations_gib=(activations + logits) / GIB,
        kv_token_bytes=token,
        kv_tokens=max(0, int(free * KV_SHARE / token)),
    )


def sized(shape: Shape | None, way: Division) -> bool:
    """Whether the model's memory is known: not where its layers are of another kind, or quantised files not here."""
    return shape is not None and shape.understood and not (way.as_is and shape.quantized and shape.stored is None)


def problem(shape: Shape | None, card: Card | None, node_gpus: int | None, way: Division) -> str:
    """Why this can't work, in one sentence; empty where nothing speaks against it. What is not known is not judged."""
    return next(_problems(shape, card, node_gpus, way), "")


def _problems(shape: Shape | None, card: Card | None, node_gpus: int | None, way: Division) -> Iterator[str]:
    tp, pp = way.tp, way.pp
    if tp < 1 or pp < 1:
        yield f"tp_size {tp} and pp_size {pp} must be 1 or more"
        return
    if card is not None:
        yield from _unable(card, way)
        if card.slice and way.world > 1:
            yield f"{way.world} {card.name} slices can't share a model: no slice reaches another's memory"
    domain = tp_domain(card, node_gpus)
    if domain is not None and tp > domain:
        yield (
            f"tp_size {tp} is more than the {domain} GPUs that a node joins{f' ({card.name})' if card else ''};"
            " across nodes go pipeline stages (pp_size)"
        )
    if shape is None:
        return
    yield from _indivisible(shape, way)
    if way.max_seq_len > shape.positions:
        yield f"max_seq_len {way.max_seq_len} is more than the {shape.positions} tokens that the model was made for"
    if card is None:
        return
    if not sized(shape, way):
        if way.as_is and (files := (shape.stored or 0) / way.world / GIB) >= card.memory_gib:
            yield f"files of {files:.1f} GiB per GPU do not fit into the {card.memory_gib:g} GiB of {card.name}"
        return
    sizes = estimate(shape, card, way)
    fixed = sizes.weights_gib + sizes.activations_gib + RESERVED_GIB
    if fixed >= card.memory_gib:
        yield (
            f"weights of {sizes.weights_gib:.1f} GiB"
            + (f" and activations of {sizes.activations_gib:.1f} GiB" if sizes.activations_gib >= 0.05 else "")
            + f" per GPU do not fit into the {card.memory_gib:g} GiB of {card.name}"
        )
    elif sizes.kv_tokens < way.max_seq_len:
        yield (
            f"beside {sizes.weights_gib:.1f} GiB of weights the KV cache has room for {sizes.kv_tokens:,} tokens"
            f" on {card.name}: less than one request of max_seq_len {way.max_seq_len:,}"
        )


def _unable(card: Card, way: Division) -> Iterator[str]:
    if card.compute < _OLDEST:
        yield f"TensorRT-LLM runs on Ampere cards (compute capability 8.0) and newer: {card.name} is older"
    if way.dtype == "bfloat16" and not card.bf16:
        yield f"{card.name} has no bfloat16"
    needs = PRECISIONS[way.quantization].compute
    if card.compute < needs:
        yield (
            f"{way.quantization} needs a card of compute capability {needs[0]}.{needs[1]} or newer,"
            f" {card.name} has {card.compute[0]}.{card.compute[1]}"
        )
    if way.kv_cache == "fp8" and not card.fp8:
        yield f"an fp8 KV cache needs a card with fp8, {card.name} has none"


def _indivisible(shape: Shape, way: Division) -> Iterator[str]:
    """TensorRT-LLM's own assertions, and the groups of the quantisation."""
    tp, pp = way.tp, way.pp
    if shape.heads % tp:
        yield f"tp_size {tp} does not divide the model's {shape.heads} attention heads"
    elif shape.kv_heads % tp and tp % shape.kv_heads:
        yield f"tp_size {tp} and the model's {shape.kv_heads} KV heads: one must divide the other"
    elif shape.intermediate % tp:
        yield f"tp_size {tp} does not divide the model's intermediate size {shape.intermediate}"
    elif shape.vocab % tp and way.world > 1 and shape.vocab < tp:
        yield f"tp_size {tp} is more than the model's {shape.vocab} tokens"
    converted = not way.as_is and not trtllm.calibrated(way.quantization, way.kv_cache)
    if pp > 1 and converted and shape.architecture in trtllm.UNSTAGED:
        yield f"pp_size {pp}: TensorRT-LLM's converter takes {shape.architecture} in one pipeline stage alone (tp_size)"
    elif pp > shape.layers:
        yield f"pp_size {pp} is more than the model's {shape.layers} layers"
    elif shape.layers % pp:
        yield f"pp_size {pp} does not divide the model's {shape.layers} layers"
    group = PRECISIONS[way.quantization].group
    for name, size in (("hidden size", shape.hidden), ("intermediate size", shape.intermediate)):
        if tp and not size % tp and (size // tp) % group:
            yield f"{way.quantization} needs multiples of {group}: a rank's share of the {name} {size} is {size // tp}"


def tp_domain(card: Card | None, node_gpus: int | None) -> int | None:
    """The most GPUs that tensor parallelism may take; None where nothing is known. NVL72 reaches across nodes."""
    if card is not None and card.nvlink > 8:
        return card.nvlink
    if node_gpus is not None:
        return max(node_gpus, 1)
    return None if card is None else max(card.nvlink, 8)


def nodes(stage: str, card: Card | None, node_gpus: int | None, way: Division, asked: int = 0) -> int:
    """On how many nodes the ranks run: `asked`, or (0) as few as hold them with what tensor parallelism joins on one.

    Refused where `asked` can't be. NVL72 joins GPUs across nodes.
    """
    joined = card is not None and card.nvlink > 8

    def works(count: int) -> bool:
        each, rest = divmod(way.world, count)
        return not rest and each <= (node_gpus or each) and (joined or each % way.tp == 0)

    fewest = next((count for count in range(1, way.world + 1) if works(count)), way.world)
    if asked and not works(asked):
        raise Refused(
            f"{stage}: {way.world} ranks cannot be divided among {asked} nodes of {node_gpus or way.world} GPUs"
            + (f" with tp_size {way.tp} of them together on one" if way.tp > 1 and not joined else ""),
            hint=f"build.nodes = {fewest} is the least that works; 0: as few as there must be",
        )
    return asked or fewest


def slow(card: Card | None, way: Division) -> str:
    """A warning where tensor parallelism goes over PCIe, which works, but slowly."""
    if card is None or card.slice or way.tp <= card.nvlink:
        return ""
    joined = "has no NVLink" if card.nvlink == 1 else f"joins {card.nvlink} GPUs by NVLink at most"
    return f"tp_size {way.tp} goes over PCIe, as {card.name} {joined}; pp_size asks less of it"


def nearest(shape: Shape | None, card: Card | None, node_gpus: int | None, way: Division) -> Division | None:
    """The way that works and is nearest to the one asked for: as asked, but for how it is divided, then its lengths.

    Nearest in the number of GPUs first, then in pp_size.
    """
    pairs = sorted({(way.tp, way.pp), *_grid(shape, card, node_gpus)}, key=lambda p: _far(p, way))
    for changed in _eased(shape, card, way):
        for tp, pp in pairs:
            tried = replace(changed, tp=tp, pp=pp)
            if not problem(shape, card, node_gpus, tried):
                return tried
    return None


def smallest(shape: Shape, card: Card, node_gpus: int | None, way: Division) -> Division | None:
    """The way on the fewest GPUs, tensor before pipeline parallelism but over PCIe; None where none works."""
    for tp, pp in sorted(_grid(shape, card, node_gpus), key=lambda p: (p[0] * p[1], p[0] > card.nvlink, p[1])):
        tried = replace(way, tp=tp, pp=pp)
        if not problem(shape, card, node_gpus, tried):
            return tried
    return None


def _far(pair: tuple[int, int], way: Division) -> tuple[float, float]:
    def apart(a: int, b: int) -> float:
        return abs(math.log2(max(a, 1) / max(b, 1)))

    return apart(pair[0] * pair[1], way.world), apart(pair[1], way.pp)


def _grid(shape: Shape | None, card: Card | None, node_gpus: int | None) -> list[tuple[int, int]]:
    if card is not None and card.slice:
        return [(1, 1)]
    widest = tp_domain(card, node_gpus) or 8
    stages = [n for n in range(1, 17) if shape.layers % n == 0] if shape else [1, 2, 4, 8, 16]
    return [(tp, pp) for tp in range(1, min(widest, 72) + 1) for pp in stages]


def _eased(shape: Shape | None, card: Card | None, way: Division) -> Iterator[Division]:
    """The way as asked, then with what the card or the model can't do left out, then quantised, then shorter."""
    able = way
    if shape is not None and able.max_seq_len > shape.positions:
        able = replace(able, max_seq_len=shape.positions)
    if card is not None:
        if able.dtype == "bfloat16" and not card.bf16:
            able = replace(able, dtype="float16")
        if able.kv_cache == "fp8" and not card.fp8:
            able = replace(able, kv_cache="int8")
        if card.compute < PRECISIONS[able.quantization].compute:
            able = replace(able, quantization="int4_awq" if "4" in able.quantization else "int8")
    yield able
    if PRECISIONS[able.quantization].group > 1:
        able = replace(able, quantization="int8")
        yield able
    if able.quantization == "none" and not able.as_is:
        yield replace(able, quantization="int8")
        yield replace(able, quantization="int4")
        able = replace(able, quantization="int4")
    length = able.max_seq_len
    while length > 512:
        length //= 2
        yield replace(able, max_seq_len=length, max_num_tokens=min(able.max_num_tokens, max(length, 1024)))


def judge(
    stage: str, table: str, shape: Shape | None, card: Card | None, node_gpus: int | None, way: Division
) -> Estimate | None:
    """The estimate, or None where shape or card is not known; Refused with the nearest way that works.

    `table` is the settings' table that holds tp_size and the rest, for the hint.
    """
    reason = problem(shape, card, node_gpus, way)
    if reason:
        other = nearest(shape, card, node_gpus, way)
        raise Refused(
            f"{stage}: {reason}",
            hint=f"what would work: {difference(table, way, other)}"
            if other
            else "nothing near it works on these cards: take a smaller model or other cards",
        )
    return estimate(shape, card, way) if shape is not None and card is not None and sized(shape, way) else None


def difference(table: str, way: Division, other: Division) -> str:
    """The settings of `other`, all of how it is divided and what else differs."""
    names = ["quantization", "dtype", "kv_cache", "max_seq_len", "max_num_tokens"]
    changed = [f"{n} = {getattr(other, n)}" for n in names if getattr(other, n) != getattr(way, n)]
    return ", ".join([f"{table}.tp_size = {other.tp}", f"pp_size = {other.pp}", *changed])


def words(shape: Shape, card: Card, way: Division, sizes: Estimate) -> str:
    """One line for `hpc plan`."""
    per = "per GPU" if way.world > 1 else "on it"
    return (
        f"{way.world} × {card.name}"
        + (f" (TP{way.tp} × PP{way.pp})" if way.world > 1 else "")
        + f": {shape.parameters / 1e9:.3g} B parameters, weights {sizes.weights_gib:.1f} GiB,"
        f" KV budget {sizes.kv_tokens:,} tokens {per} ({sizes.kv_token_bytes / 2**20:.3g} MiB per token)"
    )
