"""
merge: a base model and its LoRA adapter -> one model in safetensors, that any engine can read.

The base is read unquantised, also after qlora: a 4-bit base would round the adapter away. The sum is made in float32,
one weight in memory at a time, and rounded once; then what was written is compared with base + adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hpc.core.errors import Refused, UsageError, VerificationFailed
from hpc.core.stage import Artifact, Context, Input, Resources, Stage

_PROBE = "The quick brown fox jumps over the lazy dog."
TOLERANCE = 1e-2
"""Largest difference of a logit between base + adapter and their sum, in float32 (1e-4 is usual)."""
ROUNDED = 0.1
"""The same where the sum was rounded to 16 bits, as a part of the largest logit (0.01 is usual)."""


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """What to merge, and how to write it."""

    adapter: str | None = None
    """Folder of a LoRA adapter; None: from the stage before (finetune)."""
    base_model: str | None = None
    """The adapter's base: model folder, GGUF file or name on the hub; None: the one it was trained on."""
    more_adapters: tuple[str, ...] = ()
    """Folders of further adapters of the same base, added too."""
    weights: tuple[float, ...] = ()
    """How much each counts: `adapter`, then `more_adapters`; empty: 1 each."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the written weights."""
    readable: bool = False
    """Let every user of the machine read the files, whatever the umask says."""
    ask: str = ""
    """A question put to the base and to the merged model; both answers are recorded. Empty: none."""


def files(config: MergeConfig) -> tuple[str, ...]:
    return config.more_adapters


def resources(config: MergeConfig) -> Resources:
    """No GPU: it adds matrices once. What peft must merge, and `ask`, hold the model in host memory."""
    return Resources(cpus_per_task=8, mem_gb=64, time_min=60)


def outputs(config: MergeConfig) -> dict[str, Artifact]:
    return {"model": Artifact(kind="hf_model", path="model")}


def check(config: MergeConfig) -> None:
    """UsageError for weights that fit no adapters, HpcError for a base that can't be loaded. Standard library."""
    from hpc.inside import models

    if config.weights and len(config.weights) != 1 + len(config.more_adapters):
        raise UsageError(
            f"merge.weights has {len(config.weights)} values for {1 + len(config.more_adapters)} adapters",
            hint="one for `adapter`, then one for each of `more_adapters`",
        )
    if config.base_model is not None:
        models.inspect(config.base_model)


def run(config: MergeConfig, ctx: Context) -> None:
    """Merge, write, and read back what was written; VerificationFailed where it is not base + adapter."""
    from hpc.inside import adapters, generation, merging, models, pefts, streamed

    models.settle()
    folders = [Path(ctx.inputs["adapter"]), *map(Path, config.more_adapters)]
    given = ctx.inputs.get("base_model") or adapters.base_of(folders[0])
    ctx.progress(0, 1, "looking at the base model")
    base = models.local(given, ctx.cache)
    entries = merging.whole(base)
    read = (adapters.nested(adapters.read(folder), entries) for folder in folders)
    weighted = list(zip(read, config.weights or [1.0] * len(folders), strict=True))
    resized = adapters.resized(weighted[0][0], entries)
    words = generation.tokenizer(folders[0], base, ctx, resized)
    ids = words(_PROBE, return_tensors="pt").input_ids
    ctx.metric(base_model=given, dtype=config.dtype)
    if config.ask:
        ctx.progress(0, 1, "asking the base model")  # which knows no added tokens, and so no such template
        before = None if resized else models.ask(base, config.dtype, words, config.ask)
        ctx.metric(question=config.ask, before=before)

    by_peft = merging.only_peft(weighted, entries, base)
    if by_peft and len(weighted) > 1:
        raise Refused(f"these adapters can't be merged together: {by_peft}", hint="merge one alone: peft does it")
    if by_peft and weighted[0][1] != 1:
        raise Refused(f"this adapter can't be weighted: {by_peft}", hint="leave merge.weights out: peft adds it whole")
    with models.written_whole(ctx.outputs["model"], readable=config.readable) as part:
        if by_peft:
            ctx.progress(0, 1, f"merging by peft: {by_peft}")
            apart, difference = pefts.merge(base, folders[0], part, config.dtype, words, ids, resized)
            hint = "where embeddings and output are one matrix (tied), an adapter on either can't be merged"
            _within("the merged model's logits", difference, TOLERANCE, hint)
            ctx.metric(merged_by="peft", because=by_peft, largest_difference=difference)
        else:
            worst = merging.merge(
                base, weighted, part, config.dtype, lambda done, total: ctx.progress(done, total + 1, "merging")
            )
            merging.configure(base, part, config.dtype)
            ctx.metric(merged_by="hpc", largest_weight_difference=worst)
            ctx.progress(0, 1, "comparing with base + adapter")
            apart = streamed.logits(base, ids, weighted)
        if not generation.write(base, words, part):
            ctx.remark(generation.ENDLESS)
        _compare(apart, streamed.logits(part, ids), config, ctx)
        if config.ask:
            ctx.metric(after=models.ask(part, config.dtype, words, config.ask))
    ctx.progress(1, 1, "merged")


def _compare(apart: Any, written: Any, config: MergeConfig, ctx: Context) -> None:
    """What was written against base + adapter, both calculated in float32."""
    if apart is None or written is None:
        ctx.metric(logits="not compared: the files name the weights otherwise than transformers; each weight was")
        return
    difference = float((written - apart).abs().max())
    agree = float((written.argmax(-1) == apart.argmax(-1)).float().mean())
    ctx.metric(largest_difference=difference, same_next_token=agree)
    allowed = TOLERANCE if config.dtype == "float32" else ROUNDED * float(apart.abs().max())
    _within("the written model's logits", difference, allowed, 'does merge.dtype = "float32" help?')


def _within(what: str, difference: float, allowed: float, hint: str) -> None:
    if not difference <= allowed:
        raise VerificationFailed(
            f"{what} differ by {difference:.3g} from base + adapter ({allowed:.3g} is allowed)",
            hint=hint,
        )


STAGE = Stage(
    name="merge",
    summary="Add a LoRA adapter to its base: one model in safetensors",
    config=MergeConfig,
    container="train",
    consumes={"adapter": Input(kind="lora_adapter"), "base_model": Input(kind="hf_model", optional=True)},
    outputs=outputs,
    resources=resources,
    run=run,
    files=files,
    check=check,
)
