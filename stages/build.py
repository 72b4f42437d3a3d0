"""
build: a model -> an engine for the server, with a passport that says what it was built of and for.

tensorrt_llm        the checkpoints of `convert` -> one engine per rank, by trtllm-build, on GPUs
onnxruntime_genai   the model -> one engine for the CPU, by its model builder
llmapi              the server takes the model as it is: there is nothing to build
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hpc.core import engines, passport, trtllm
from hpc.core.division import GIB, KvCache, Quantization
from hpc.core.errors import Refused, UsageError
from hpc.core.stage import Around, Artifact, Context, Input, Resources, Stage


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """Which engine, how it is divided among GPUs, in which precision, and for what sizes of requests."""

    engine: Literal["auto", "tensorrt_llm", "llmapi", "onnxruntime_genai"] = "auto"
    """auto: onnxruntime_genai where the site has no GPUs, else tensorrt_llm."""
    model: str | None = None
    """Model folder; None: from the stage before that makes an hf_model (merge)."""
    checkpoint: str | None = None
    """Folder of TensorRT-LLM checkpoints; None: from the stage before (convert)."""
    tp_size: int = 1
    """GPUs that share every layer (tensor parallel); within one node."""
    pp_size: int = 1
    """Groups of GPUs that have a part of the layers each (pipeline parallel)."""
    nodes: int = 0
    """Nodes over which the ranks are divided, one MPI task for each GPU. 0: built on one node, served on as few as have
    the GPUs."""
    auto: bool = False
    """Choose tp_size and pp_size: the fewest GPUs that the model fits on."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of calculation; auto: the model's, float16 where that is float32 or the card lacks it; on a CPU float32."""
    quantization: Quantization = "none"
    """Of the weights: int8, int4; and with calibration: int8_sq (SmoothQuant), int4_awq, w4a8_awq, fp8, nvfp4."""
    kv_cache: KvCache = "auto"
    """Type of the KV cache; auto: that of dtype."""
    max_batch_size: int = 64
    """Requests at once, at most."""
    max_input_len: int | None = None
    """Longest prompt, tokens; None: as long as max_seq_len."""
    max_seq_len: int | None = None
    """Longest prompt and answer together, tokens; None: what the model was made for, 8192 at most."""
    max_num_tokens: int = 8192
    """Tokens of all requests in one pass, at most."""
    max_beam_width: int = 1
    """Beams of a beam search, at most."""
    max_lora_rank: int = 0
    """Highest rank of LoRA adapters that may come with a request; 0: that of `lora`'s. (tensorrt_llm)"""
    lora_modules: tuple[str, ...] = ()
    """What adapters change, by TensorRT-LLM's names; empty: what `lora`'s do, without any attn_q, attn_k and attn_v."""
    lora: tuple[str, ...] = ()
    """LoRA adapters that requests may name, as name=folder; they become a part of the engine."""


def files(config: BuildConfig) -> tuple[str, ...]:
    """The adapters' folders."""
    from hpc.inside import loras

    return tuple(loras.named(config.lora).values())


def container(config: Any) -> str:
    """The environment that has the engine's builder."""
    return "serve-cpu" if config.engine == "onnxruntime_genai" else "trtllm"


def unneeded(config: BuildConfig) -> str:
    return "llmapi serves the model as it is" if config.engine == "llmapi" else ""


def outputs(config: BuildConfig) -> dict[str, Artifact]:
    return {} if config.engine == "llmapi" else {"engine": Artifact(kind="engine", path="engine")}


def resources(config: BuildConfig) -> Resources:
    """Where the model's shape is not known: guesses on the safe side of a 7 B model."""
    if config.engine == "onnxruntime_genai":
        return Resources(cpus_per_task=4, mem_gb=16, time_min=60)
    return Resources(gpus_per_node=1, cpus_per_task=8, mem_gb=64, time_min=120)


def size(config: BuildConfig, around: Around) -> tuple[Resources, tuple[str, ...]]:
    """Memory and GPUs, by the model's shape; Refused for what can't work, with the nearest that does."""
    asked, shape = resources(config), around.shape
    if config.engine == "onnxruntime_genai":
        refuse_for_cpu(config)
        if "model" not in around.inputs:
            raise Refused("build needs a model", hint="set build.model, or put merge before build in pipeline.stages")
        if shape is None:
            return asked, (engines.unknown("build", around),)
        memory = math.ceil(shape.parameters * 4 * 3 / GIB) + 4
        return replace(asked, mem_gb=memory), (f"build: {shape.parameters / 1e9:.3g} B parameters for the CPU",)
    if "checkpoint" not in around.inputs:
        raise Refused(
            "build with tensorrt_llm needs the checkpoints that convert makes",
            hint="put convert before build in pipeline.stages, or set build.checkpoint",
        )
    notes = engines.judged("build", config, around)
    if config.lora:
        from hpc.inside import lorarrays

        architecture = shape.architecture if shape else ""
        notes = (*notes, lorarrays.judge(config, lorarrays.read_sizes(config), architecture, shape))
    if "tensorrt-llm" in around.versions:
        trtllm.release(around.versions["tensorrt-llm"])
    world, nodes = config.tp_size * config.pp_size, max(1, config.nodes)
    if world % nodes or (nodes > 1 and world // nodes > (around.node_gpus or world)):  # several build a rank per GPU
        raise Refused(
            f"build: {world} ranks cannot be divided among {nodes} nodes of {around.node_gpus or world} GPUs",
            hint="build.nodes must divide tp_size × pp_size, a rank for each GPU; 0: one node builds them all",
        )
    workers = min(world // nodes, around.node_gpus or 8)
    if nodes > 1:
        notes = (*notes, f"build: {nodes} nodes with {workers} ranks of MPI each")
        asked = replace(asked, nodes=nodes, tasks_per_node=workers)
    if shape is None:
        return replace(asked, gpus_per_node=workers), notes
    # measured with 7 B in float16: an engine of 12.9 GB took 29 GB of host memory at its peak
    rank_gib = shape.parameters * 2 / GIB / world
    memory = math.ceil(2.4 * rank_gib * workers) + 8
    cpus = 4 if nodes > 1 else max(8, 2 * workers)
    return replace(asked, gpus_per_node=workers, mem_gb=memory, cpus_per_task=cpus), notes


def refuse_for_cpu(config: BuildConfig) -> None:
    """Refused where a setting is one of the GPU engines alone."""
    if config.tp_size * config.pp_size > 1:
        raise Refused(
            "onnxruntime_genai runs in one process on the CPU: it can't be divided among GPUs",
            hint='set build.tp_size and build.pp_size to 1, or build.engine = "tensorrt_llm" on a site with GPUs',
        )
    for name, value, able in (
        ("quantization", config.quantization, ("none", "int4")),
        ("dtype", config.dtype, ("float32",)),
        ("kv_cache", config.kv_cache, ("auto",)),
    ):
        if value not in able:
            raise Refused(
                f"onnxruntime_genai on the CPU has no {name} '{value}'",
                hint=f"set build.{name} to {' or '.join(able)}",
            )


def check(config: BuildConfig) -> None:
    """UsageError for figures that can't be, HpcError for a model that can't be read."""
    if config.nodes < 0:
        raise UsageError("build.nodes must be 0 or more")
    for name in ("tp_size", "pp_size", "max_batch_size", "max_num_tokens", "max_beam_width"):
        if getattr(config, name) < 1:
            raise UsageError(f"build.{name} must be 1 or more")
    for name in ("max_input_len", "max_seq_len"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UsageError(f"build.{name} must be 1 or more")
    if (
        config.max_input_len is not None
        and config.max_seq_len is not None
        and config.max_input_len > config.max_seq_len
    ):
        raise UsageError(
            f"build.max_input_len {config.max_input_len} is more than max_seq_len {config.max_seq_len}",
            hint="max_seq_len counts prompt and answer together",
        )
    if config.lora:
        from hpc.inside import loras

        if config.engine == "llmapi":
            raise UsageError("llmapi builds nothing", hint="its adapters are given to the server: serve.adapters")
        for name, folder in loras.named(config.lora).items():
            loras.inspect(name, Path(folder))
    if config.engine == "onnxruntime_genai":
        from hpc.inside import models

        if config.model is not None:
            models.inspect(config.model)


def run(config: BuildConfig, ctx: Context) -> None:
    """Build the engine, whole or not at all, and its passport."""
    from hpc.inside import engines as builders
    from hpc.inside import meeting, models, rankbuild

    ranks = meeting.of(ctx.folder, os.environ)
    if not ranks.first:
        return rankbuild.build(ctx, ranks)
    with models.written_whole(ctx.outputs["engine"]) as part:
        if config.engine == "onnxruntime_genai":
            builders.onnx(config, ctx, part)
        else:
            builders.tensorrt(config, ctx, part)
        passport.read(part)


STAGE = Stage(
    name="build",
    summary="Make the server's engine of a model",
    config=BuildConfig,
    container=container,
    consumes={
        "model": Input(kind="hf_model", optional=True),
        "checkpoint": Input(kind="trtllm_checkpoint", optional=True),
    },
    outputs=outputs,
    resources=resources,
    run=run,
    check=check,
    files=files,
    launcher="mpi",
    settle=engines.settle,
    size=size,
    unneeded=unneeded,
)
