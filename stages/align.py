"""
align: preference pairs -> a model that says what was preferred more often, by direct preference optimisation (DPO).

Training is TRL's DPOTrainer. After finetune it goes on with finetune's adapter, and what that says is the reference
that it must not leave too far; otherwise it starts a new adapter on the base, which is the reference itself. Beside
the loss it tells how often a held-out pair's preferred answer gained on the other: a half is chance.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from hpc.core.errors import UsageError
from hpc.core.rundir import write_json
from hpc.core.stage import Artifact, Context, Input, Resources, Stage

Rows = list[dict[str, list[dict[str, str]]]]


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """Which preferences, and how strongly they count."""

    pairs: tuple[str, ...] = ()
    """Files in JSON Lines, JSON, Parquet or Arrow: prompt, chosen, rejected, as texts or messages (UltraFeedback,
    ShareGPT, Alpaca)."""
    base_model: str | None = None
    """Model folder, GGUF file or name on the hub; None: from the stage before, or as finetune was given it."""
    adapter: str | None = None
    """Folder of an adapter to go on with; None: finetune's, where it is in the pipeline, else a new one."""
    method: Literal["lora", "qlora"] = "lora"
    """qlora: the base in 4 bit (nf4)."""
    double_quant: bool = True
    """qlora: quantise the scales of the 4-bit weights too."""
    chat_template: str | None = None
    """A Jinja file; None: the adapter's template, else the tokenizer's."""
    beta: float = 0.1
    """How much it costs to leave the reference: more keeps closer to it."""
    loss: Literal["sigmoid", "ipo", "hinge", "robust"] = "sigmoid"
    """The loss by TRL's name; sigmoid is DPO's own, robust counts with wrong labels (label_smoothing)."""
    label_smoothing: float = 0.0
    """Share of pairs whose labels may be wrong, 0 to below 0.5."""
    lora_r: int = 64
    """Rank of a new adapter."""
    lora_alpha: int = 16
    """Scale of a new adapter: it counts alpha/r times."""
    lora_dropout: float = 0.0
    """Share of a new adapter's inputs dropped in training, 0 to 1. DPO is usually done without."""
    target_modules: tuple[str, ...] = ()
    """Layers that get a new adapter, or "all-linear"; empty: peft's default for the model, else all-linear."""
    learning_rate: float = 5e-6
    """Highest learning rate: far below that of finetune."""
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "cosine"
    """How the learning rate goes on."""
    warmup_ratio: float = 0.1
    """Share of the steps in which the learning rate rises, 0 to 1."""
    epochs: float = 1.0
    """Passes over the pairs."""
    max_steps: int = -1
    """Optimizer steps; -1: as many as `epochs` gives."""
    batch_size: int = 1
    """Pairs per forward pass of each GPU."""
    grad_accum: int = 8
    """Forward passes per optimizer step."""
    max_length: int = 1024
    """Tokens of prompt and answer; longer answers are cut, and a pair whose prompt alone is longer is left out."""
    eval_share: float = 0.05
    """Share of the prompts whose pairs are held out, 0 to below 1."""
    optim: str = "adamw_torch"
    """Optimizer by transformers' name."""
    weight_decay: float = 0.0
    """Weight decay of the optimizer."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    seed: int = 0
    """Seed of what is held out, the order of the pairs and a new adapter's first weights."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type to calculate in; auto: bfloat16, float16 on cards that lack it, float32 on a CPU."""
    save_steps: int = 50
    """Optimizer steps between two checkpoints."""
    keep_checkpoints: int = 2
    """The last so many are kept."""
    logging_steps: int = 1
    """Optimizer steps between two readings of the loss."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: far less GPU memory, about a third more time."""


def files(config: AlignConfig) -> tuple[str, ...]:
    return (*config.pairs, *([config.chat_template] if config.chat_template is not None else []))


def resources(config: AlignConfig) -> Resources:
    """One GPU: the model is there once, and the reference is an adapter, or none."""
    return Resources(gpus_per_node=1, cpus_per_task=8, mem_gb=64, time_min=240)


def outputs(config: AlignConfig) -> dict[str, Artifact]:
    return {"adapter": Artifact(kind="lora_adapter", path="adapter")}


def check(config: AlignConfig) -> None:
    """UsageError for figures that can't be and for broken pairs, HpcError for a base that can't be loaded."""
    from hpc.inside import models, preferences, sources

    if not config.pairs:
        raise UsageError(
            "align.pairs names no file", hint='pairs = ["pairs.jsonl"], each with prompt, chosen, rejected'
        )
    for name in (
        "lora_r", "lora_alpha", "batch_size", "grad_accum", "save_steps", "keep_checkpoints", "logging_steps",
        "learning_rate", "beta",
    ):  # fmt: skip
        if getattr(config, name) <= 0:
            raise UsageError(f"align.{name} must be more than 0")
    if config.max_steps == 0 or (config.max_steps < 0 and config.epochs <= 0):
        raise UsageError("align has no step to do", hint="set epochs, or max_steps, above 0")
    if not (0 <= config.lora_dropout < 1 and 0 <= config.warmup_ratio < 1 and 0 <= config.eval_share < 1):
        raise UsageError("align.lora_dropout, warmup_ratio and eval_share lie between 0 and 1")
    if not 0 <= config.label_smoothing < 0.5:
        raise UsageError("align.label_smoothing is from 0 to below 0.5")
    if config.base_model is not None:
        models.inspect(config.base_model)
    for path in map(Path, config.pairs):
        if sources.columnar(path):  # the login node has nothing that reads them
            sources.looks_whole(path)
        elif not any(not pair.dropped for pair in preferences.read(path, limit=1 << 20)):
            raise UsageError(f"{path.name} holds no pair to learn from")


def run(config: AlignConfig, ctx: Context) -> None:
    """Train, and write the adapter; without an output where the scheduler asked to stop."""
    from hpc.inside import models, recipe, trainers, watching

    models.settle()
    ctx.progress(0, 1, "loading the base model")
    base = ctx.inputs["base_model"]
    dtype = models.compute_dtype(config.dtype)
    folder = models.local(base, ctx.cache)
    before = ctx.inputs.get("adapter")
    tokenizer = models.tokenizer(folder, recipe.template(config.chat_template, before))
    rows, longest = _rows(tokenizer, config, ctx)
    model = recipe.model(folder, dtype, config)
    recipe.positions(model, longest, "align.max_length")
    if before is not None:
        model = _with_adapter(model, Path(before))
    trainer = trainers.trainer(
        kind="DPOTrainer",
        model=model,
        arguments=trainers.arguments(_arguments(config, dtype, ctx), "DPOConfig"),
        rows=rows,
        keep=config.keep_checkpoints,
        processing_class=tokenizer,
        peft_config=None if before is not None else recipe.adapter(model, config, "align"),
        callbacks=[watching.watcher(ctx)],
    )
    recipe.trained_in_full(trainer.model)
    if _train(trainer, ctx):
        ctx.metric(base_model=base, adapter=before, method=config.method, dtype=dtype)
        _save(trainer, tokenizer, ctx, base=base, method=config.method, dtype=dtype)


def _rows(tokenizer: Any, config: AlignConfig, ctx: Context) -> tuple[dict[str, Rows], int]:
    """The pairs as TRL takes them, some held out, and the most tokens of one; UsageError where none is left."""
    from hpc.inside import conversations, preferences

    dropped: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    by_prompt: dict[str, Rows] = {}
    seen: set[str] = set()
    cut = most = 0
    for pair in (pair for path in config.pairs for pair in preferences.read(Path(path))):
        said = {name: [{"role": "assistant", "content": getattr(pair, name)}] for name in ("chosen", "rejected")}
        row = {"prompt": [*pair.prompt], **said}
        text, longest = json.dumps(row), 0
        reason = pair.dropped or ("repeated" if text in seen else "")
        seen.add(text)
        if not reason:
            asked, longest = _lengths(row, tokenizer, lost)
            reason = "prompt too long" if asked >= config.max_length else ""
        if reason:
            dropped[reason] += 1
            continue
        cut += longest > config.max_length
        most = max(most, min(longest, config.max_length))
        by_prompt.setdefault(json.dumps(pair.prompt), []).append(row)
    ctx.metric(pairs=sum(map(len, by_prompt.values())), cut=cut, dropped=dict(dropped.most_common()))
    ctx.metric(template_loses=dict(lost))
    if told := conversations.told(lost, "align"):
        ctx.remark("; ".join(told))
    if not by_prompt:
        raise UsageError(
            f"no pair is left to learn from: {dropped.most_common(1)[0][0]}",
            hint="raise align.max_length, or mend the data",
        )
    groups = list(by_prompt.values())  # one prompt's pairs stay on one side
    random.Random(config.seed).shuffle(groups)
    held = min(round(len(groups) * config.eval_share), len(groups) - 1)
    parts = {"train": list(chain(*groups[held:])), "eval": list(chain(*groups[:held]))}
    ctx.metric(**{f"{part}_pairs": len(rows) for part, rows in parts.items()})
    return parts, most


def _lengths(row: dict[str, list[dict[str, str]]], tokenizer: Any, lost: Counter[str]) -> tuple[int, int]:
    """Tokens of a pair's prompt, and those with the longer answer; what the template loses is counted in `lost`."""
    from hpc.inside import conversations

    loses: Counter[str] = Counter()
    asked = row["prompt"]
    whole = [
        len(conversations.encode([*asked, *row[name]], tokenizer, loses, completion_only=False)["input_ids"])
        for name in ("chosen", "rejected")
    ]
    lost.update(loses.keys())
    begin = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
    return len(begin), max(whole)


def _with_adapter(model: Any, adapter: Path) -> Any:
    """The model with an adapter to go on with. TRL copies it, and what the copy says is the reference."""
    from peft import PeftModel

    from hpc.inside import adapters, trainers

    adapters.read(adapter)  # refused where it is none, or a pickle
    made = PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    if "ref_adapter_name" in trainers.fields("DPOConfig"):  # trl below 1 makes no copy
        made.load_adapter(str(adapter), trainers.REFERENCE)
    return made


def _arguments(config: AlignConfig, dtype: str, ctx: Context) -> Mapping[str, Any]:
    """DPOConfig's values."""
    from hpc.inside import recipe, trainers

    own: dict[str, Any] = {"beta": config.beta, "loss_type": config.loss, "label_smoothing": config.label_smoothing}
    own["per_device_eval_batch_size"] = 1  # TRL's figures are means over batches, not pairs
    if "adapter" in ctx.inputs and "ref_adapter_name" in trainers.fields("DPOConfig"):
        own["ref_adapter_name"] = trainers.REFERENCE
    return {**recipe.common(config, dtype, ctx), **own}


def _train(trainer: Any, ctx: Context) -> bool:
    """Train to the end, from the last complete checkpoint; False where the scheduler asked to stop before."""
    from hpc.inside import heldout, together, trainers

    resumed = trainers.resumed(ctx.checkpoints)
    try:
        if together.any_of(ctx.stopping()):
            return False
        seconds = trainers.train(trainer, resumed)  # of this attempt
        if trainer.state.global_step < trainer.state.max_steps:
            return False
        if trainer.eval_dataset is not None:
            ctx.progress(1, 1, "measuring on the held-out pairs")
            found = trainer.evaluate()
            ctx.metric(
                eval_loss_after=found["eval_loss"],
                eval_preferred=found["eval_rewards/accuracies"],
                eval_margin=found["eval_rewards/margins"],
            )
    except heldout.StopError:
        return False
    losses = [round(entry["loss"], 5) for entry in trainer.state.log_history if "loss" in entry]
    ctx.metric(steps=trainer.state.global_step, losses=losses, ranks=together.world(), train_seconds=seconds)
    ctx.metric(resumed_from=resumed.name if resumed else None)
    return True


def _save(trainer: Any, tokenizer: Any, ctx: Context, *, base: str, method: str, dtype: str) -> None:
    """Write the adapter; it names the base that was asked for, not the converted copy."""
    from hpc.inside import models, together

    if together.rank() == 0:
        model = trainer.accelerator.unwrap_model(trainer.model)
        model.peft_config["default"].base_model_name_or_path = base
        with models.written_whole(ctx.outputs["adapter"]) as part:
            model.save_pretrained(part, save_embedding_layers=False, selected_adapters=["default"])
            write_json(part / "base.json", {"base_model": base, "method": method, "dtype": dtype})
            tokenizer.save_pretrained(part)
    together.barrier()


STAGE = Stage(
    name="align",
    summary="Prefer the better of two answers: DPO on preference pairs",
    config=AlignConfig,
    container="train",
    consumes={"base_model": Input(kind="hf_model"), "adapter": Input(kind="lora_adapter", optional=True)},
    outputs=outputs,
    resources=resources,
    run=run,
    files=files,
    check=check,
    launcher="torchrun",
)
