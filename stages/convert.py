"""
convert: a model -> TensorRT-LLM checkpoints, one per rank, quantised if asked for.

What needs calibration (SmoothQuant, AWQ, FP8, a quantised KV cache) takes the texts of `dataset`: compute nodes can't
fetch one. How the model is divided and in which precision is set in [build], for both stages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from hpc.core import engines, trtllm
from hpc.core.division import GIB, KvCache, Quantization
from hpc.core.errors import Refused, UsageError
from hpc.core.stage import Around, Artifact, Context, Input, Resources, Stage


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Calibration; the rest is [build]'s."""

    engine: Literal["auto", "tensorrt_llm", "llmapi", "onnxruntime_genai"] = "auto"
    """Set in [build]. Only tensorrt_llm needs a conversion."""
    model: str | None = None
    """Set in [build]."""
    dataset: str | None = None
    """Folder with train.jsonl, whose conversations calibrate; None: from the stage before (prepare)."""
    calib_size: int = 512
    """Conversations to calibrate with, at most."""
    calib_length: int = 512
    """Tokens of each, at most."""
    workers: int = 1
    """Ranks that are converted at the same time; each holds the whole model in host memory."""
    tp_size: int = 1
    """Set in [build]."""
    pp_size: int = 1
    """Set in [build]."""
    auto: bool = False
    """Set in [build]."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Set in [build]."""
    quantization: Quantization = "none"
    """Set in [build]."""
    kv_cache: KvCache = "auto"
    """Set in [build]."""


def unneeded(config: ConvertConfig) -> str:
    return "" if config.engine in ("auto", "tensorrt_llm") else f"{config.engine} takes the model as it is"


def outputs(config: ConvertConfig) -> dict[str, Artifact]:
    return {} if unneeded(config) else {"checkpoint": Artifact(kind="trtllm_checkpoint", path="checkpoint")}


def resources(config: ConvertConfig) -> Resources:
    """A GPU, without which TensorRT-LLM can't be loaded. Memory where the model's shape is not known: of 7 B."""
    return Resources(gpus_per_node=1, cpus_per_task=8, mem_gb=64, time_min=120)


def size(config: ConvertConfig, around: Around) -> tuple[Resources, tuple[str, ...]]:
    """Memory, by the model's shape; Refused for what can't work, with the nearest that does."""
    asked, shape = resources(config), around.shape
    notes = engines.judged("convert", config, around)
    if "tensorrt-llm" in around.versions:
        trtllm.release(around.versions["tensorrt-llm"])
    calibrated = trtllm.calibrated(config.quantization, config.kv_cache)
    if calibrated and "dataset" not in around.inputs:
        raise Refused(
            "convert needs texts to calibrate with: quantization"
            f" '{config.quantization}', KV cache '{config.kv_cache}'",
            hint="set convert.dataset, put prepare before it, or take quantization int8 or int4, which need none",
        )
    if shape is None:
        return asked, notes
    if trtllm.family(shape.architecture) is None and shape.architecture not in trtllm.QUANTIZED_ONLY:
        raise Refused(
            f"TensorRT-LLM has no converter for {shape.architecture}",
            hint=f"known are {', '.join([*trtllm.FAMILIES, *trtllm.QUANTIZED_ONLY])};"
            ' another model is served as it is: build.engine = "llmapi"',
        )
    whole_gib = shape.parameters * 2 / GIB
    memory = math.ceil(1.4 * whole_gib * (1 if calibrated else config.workers)) + 8
    gpus = 1
    if calibrated and around.card is not None:  # the whole model calculates, unquantised
        gpus = math.ceil(1.3 * whole_gib / around.card.card.memory_gib)
        if around.node_gpus is not None and gpus > around.node_gpus:
            raise Refused(
                f"calibrating takes the whole model: {gpus} × {around.card.card.name},"
                f" and a node has {around.node_gpus}",
                hint="take quantization int8 or int4, which need no calibration, or a node with more GPUs",
            )
    # build says what each GPU holds; here it would be said twice
    notes = tuple(n for n in notes if "KV budget" not in n)
    return replace(asked, gpus_per_node=gpus, mem_gb=memory), notes


def check(config: ConvertConfig) -> None:
    """UsageError for figures that can't be, HpcError for a model that can't be read."""
    for name in ("calib_size", "calib_length", "workers"):
        if getattr(config, name) < 1:
            raise UsageError(f"convert.{name} must be 1 or more")
    if config.model is not None:
        from hpc.inside import models

        models.inspect(config.model)


def run(config: ConvertConfig, ctx: Context) -> None:
    """Convert, and check that each rank has its checkpoint."""
    from hpc.inside import engines as builders
    from hpc.inside import models

    with models.written_whole(ctx.outputs["checkpoint"]) as part:
        builders.checkpoints(config, ctx, part)


STAGE = Stage(
    name="convert",
    summary="Divide and quantise a model for TensorRT-LLM",
    config=ConvertConfig,
    container="trtllm",
    consumes={"model": Input(kind="hf_model"), "dataset": Input(kind="dataset", optional=True)},
    outputs=outputs,
    resources=resources,
    run=run,
    check=check,
    launcher="workers",
    settings_of="build",
    settle=engines.settle,
    size=size,
    unneeded=unneeded,
)
