"""
finetune: a base model and chat data -> a LoRA adapter, or a whole model with method = "full".

Training is TRL's SFTTrainer on conversations in the model's own chat template, by one process or, with more GPUs or
nodes in `resources`, by one on each GPU. It saves checkpoints, resumes from the last one, and ends early with a
checkpoint where the scheduler asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hpc.core import presets
from hpc.core.errors import Refused, UsageError
from hpc.core.rundir import read_json, write_json
from hpc.core.stage import Around, Artifact, Context, Input, Resources, Stage


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """What to train, on what, and how."""

    preset: Literal["none", "lab-mig20", "lab-a100", "challenge", "smoke"] = "none"
    """Other values for what follows: the finetuning lab's on a 20 GB slice, on an A100, those of its challenge, or a
    few steps on a CPU. What is set beside it counts."""
    base_model: str | None = None
    """Model folder, GGUF file or name on the hub; None: from the stage before that makes an hf_model."""
    dataset: str | None = None
    """Folder with train.jsonl and eval.jsonl; None: from the stage before (prepare)."""
    method: Literal["lora", "qlora", "full"] = "lora"
    """lora: a low-rank adapter on the base; qlora: the same on a base in 4 bit (nf4); full: all weights."""
    double_quant: bool = True
    """qlora: quantise the scales of the 4-bit weights too."""
    chat_template: str | None = None
    """A Jinja file; None: the template that prepare wrote the data with (prepare.template), else the tokenizer's."""
    lora_r: int = 64
    """Rank of the adapter."""
    lora_alpha: int = 16
    """Scale of the adapter: it counts alpha/r times."""
    lora_dropout: float = 0.1
    """Share of the adapter's inputs dropped in training, 0 to 1."""
    target_modules: tuple[str, ...] = ()
    """Names of the layers that get an adapter, or "all-linear"; empty: peft's default for the model (often q_proj and
    v_proj), all-linear where it has none."""
    learning_rate: float = 2e-4
    """Highest learning rate."""
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    """How the learning rate goes on; constant has no warm-up."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the learning rate rises, 0 to 1."""
    epochs: float = 1.0
    """Passes over the data."""
    max_steps: int = -1
    """Optimizer steps; -1: as many as `epochs` gives."""
    batch_size: int = 1
    """Rows per forward pass of each GPU: conversations, or packed rows of them."""
    grad_accum: int = 1
    """Forward passes per optimizer step."""
    max_length: int = 512
    """Tokens per row; longer conversations are cut, and counted."""
    packing: bool = False
    """Put several conversations into a row, which do not see each other: far fewer steps per epoch, and no padding."""
    group_by_length: bool = False
    """Put conversations of like length into a batch: less padding. Needless with packing."""
    completion_only_loss: bool = True
    """Learn the answers only; false: the questions and the system message too."""
    optim: str = "adamw_torch"
    """Optimizer by transformers' name: adamw_torch, paged_adamw_32bit, paged_adamw_8bit, adafactor, …"""
    weight_decay: float = 0.001
    """Weight decay of the optimizer."""
    max_grad_norm: float = 0.3
    """Gradients are clipped to this norm."""
    seed: int = 0
    """Seed of the adapter's initial weights, the order of the data and dropout."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type to calculate in; auto: bfloat16, float16 on cards that lack it, float32 on a CPU."""
    sharding: Literal["none", "fsdp", "zero2", "zero3"] = "none"
    """What several GPUs divide beside the data. none: each has the whole model; fsdp, zero3: weights, gradients and
    optimizer are shared out; zero2: gradients and optimizer. zero2 and zero3 need deepspeed in the image."""
    compile: bool = False
    """torch.compile: faster steps after minutes of compiling."""
    save_steps: int = 50
    """Optimizer steps between two checkpoints; 0: one per epoch."""
    keep_checkpoints: int = 2
    """The last so many are kept."""
    logging_steps: int = 1
    """Optimizer steps between two readings of the loss."""
    eval_steps: float = 0.0
    """Optimizer steps between two measurements of the held-out loss, below 1 as a share of all; 0: before and after."""
    report_to: tuple[str, ...] = ()
    """Trackers by transformers' names (wandb, mlflow) that the image has, beside the curves that are always kept."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: far less GPU memory, about a third more time."""


def files(config: FinetuneConfig) -> tuple[str, ...]:
    return (config.chat_template,) if config.chat_template is not None else ()


def resources(config: FinetuneConfig) -> Resources:
    """One GPU. Host memory: the base's files, and for full training the checkpoints, pass through it."""
    memory = 128 if config.method == "full" else 64
    return Resources(gpus_per_node=1, cpus_per_task=8, mem_gb=memory, time_min=240)


def size(config: FinetuneConfig, around: Around) -> tuple[Resources, tuple[str, ...]]:
    """Notes on the preset; Refused for a precision that site or card has not."""
    card = around.card.card if around.card is not None else None
    if config.dtype == "float16" and around.site.gpus == "none":
        raise Refused(
            f"finetune: float16 needs a GPU, and site '{around.site.name}' gives none",
            hint='finetune.dtype = "auto" takes what the machine has',
        )
    if config.dtype == "bfloat16" and card is not None and not card.bf16:
        raise Refused(
            f"finetune: a {card.name} has no bfloat16", hint='finetune.dtype = "auto" takes float16 on this card'
        )
    if config.preset == "none":
        return resources(config), ()
    chosen = presets.FINETUNE[config.preset]
    over = [name for name, value in chosen.items() if getattr(config, name) != value]
    note = f"finetune: preset {config.preset}: {presets.words({k: getattr(config, k) for k in chosen})}"
    return resources(config), (note + (f"; set beside it: {', '.join(over)}" if over else ""),)


def outputs(config: FinetuneConfig) -> dict[str, Artifact]:
    if config.method == "full":
        return {"model": Artifact(kind="hf_model", path="model")}
    return {"adapter": Artifact(kind="lora_adapter", path="adapter")}


def check(config: FinetuneConfig) -> None:
    """UsageError for figures that can't be, HpcError for a base that can't be loaded. Standard library."""
    from hpc.inside import models

    for name in (
        "lora_r", "lora_alpha", "batch_size", "grad_accum", "keep_checkpoints", "logging_steps", "learning_rate",
    ):  # fmt: skip
        if getattr(config, name) <= 0:
            raise UsageError(f"finetune.{name} must be more than 0")
    if config.max_steps == 0 or (config.max_steps < 0 and config.epochs <= 0):
        raise UsageError("finetune has no step to do", hint="set epochs, or max_steps, above 0")
    if config.max_length < 8:
        raise UsageError("finetune.max_length must be 8 tokens or more")
    if config.save_steps < 0 or config.eval_steps < 0:
        raise UsageError("finetune.save_steps and eval_steps can't be below 0")
    if not (0 <= config.lora_dropout < 1 and 0 <= config.warmup_ratio < 1):
        raise UsageError("finetune.lora_dropout and warmup_ratio lie between 0 and 1")
    if config.method == "qlora" and config.sharding != "none":
        raise UsageError(
            f'a base in 4 bit can\'t be divided by sharding = "{config.sharding}"', hint='set finetune.method = "lora"'
        )
    if config.base_model is not None:
        models.inspect(config.base_model)


def run(config: FinetuneConfig, ctx: Context) -> None:
    """Train, and write the adapter (or model); without an output where the scheduler asked to stop."""
    from hpc.inside import conversations, curves, heldout, models, packing, recipe, trainers, watching

    models.settle()
    trainers.need(config.report_to, ctx.folder / curves.FOLDER)
    if config.compile:
        import torch

        trainers.need_compiler(gpu=torch.cuda.is_available())
    ctx.progress(0, 1, "loading the base model")
    base = ctx.inputs["base_model"]
    dtype = models.compute_dtype(config.dtype)
    folder = models.local(base, ctx.cache)
    tokenizer = models.tokenizer(folder, recipe.template(config.chat_template, ctx.inputs["dataset"]))
    rows = {part: _rows(part, tokenizer, config, ctx) for part in ("eval", "train")}
    model = recipe.model(folder, dtype, config, config.sharding)
    recipe.positions(
        model, max(len(row["input_ids"]) for row in (*rows["train"], *rows["eval"])), "finetune.max_length"
    )
    lora = None if config.method == "full" else recipe.adapter(model, config, "finetune")

    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    batches: Any = conversations.Padded(pad)
    if config.packing:
        flat = "flash" in str(getattr(model.config, "_attn_implementation", ""))
        ctx.metric(packing_difference=packing.prove(model, rows["train"], flat=flat))
        rows = {part: packing.packed(rows[part], config.max_length, config.seed) for part in rows}
        ctx.metric(packed_rows=len(rows["train"]))
        batches = packing.Packed(pad, flat=flat)

    def measure(model: Any) -> float:
        found, _ = heldout.loss(
            model, rows["eval"], batches, batch_size=config.batch_size, dtype=dtype, stopping=ctx.stopping
        )
        return found

    try:
        before = _before(model, measure, bool(rows["eval"]), config, ctx)
    except heldout.StopError:
        return
    trainer = trainers.trainer(
        model=model,
        arguments=trainers.arguments(recipe.arguments(config, dtype, ctx, bool(rows["eval"]))),
        rows=rows,
        keep=config.keep_checkpoints,
        data_collator=batches,
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[watching.watcher(ctx)],
    )
    recipe.trained_in_full(trainer.model)
    try:
        if not _train(trainer, batches, ctx):
            return
        if rows["eval"]:
            ctx.progress(1, 1, "measuring the held-out loss after training")
            # what is sharded only the trainer can run
            after = measure(trainer.model) if config.sharding == "none" else trainer.evaluate()["eval_loss"]
            watching.finite(after, trainer.state.global_step)
            ctx.metric(eval_loss_before=before, eval_loss_after=after)
    except heldout.StopError:
        return
    ctx.metric(base_model=base, method=config.method, dtype=dtype)
    recipe.save(trainer, tokenizer, config, ctx, base=base, dtype=dtype)


def _rows(part: str, tokenizer: Any, config: FinetuneConfig, ctx: Context) -> list[dict[str, list[int]]]:
    """Tokens and labels of train.jsonl or eval.jsonl; UsageError where there is nothing to learn."""
    from hpc.inside import conversations

    talks = conversations.read(Path(ctx.inputs["dataset"]), part)
    rows, counts = conversations.rows(talks, tokenizer, config.max_length, completion_only=config.completion_only_loss)
    ctx.metric(**{f"{part}_{name}": count for name, count in counts.items()})
    if part == "train" and (told := conversations.told(counts["template_loses"], "finetune")):
        ctx.remark("; ".join(told))
    if part == "eval" and not rows and config.eval_steps:
        ctx.remark("there is no held-out row to measure the loss on: set prepare.eval_rows, or prepare.eval_data")
    if part == "train" and not rows:
        raise UsageError(
            f"no row of the data set has an answer within {config.max_length} tokens",
            hint="raise finetune.max_length, or prepare more data",
        )
    return rows


def _before(
    model: Any, measure: Callable[[Any], float], rows: bool, config: FinetuneConfig, ctx: Context
) -> float | None:
    """
    The held-out loss before training, measured once. Never by the trainer: what it has measured with, it later trains
    without adding up the gradients of several ranks.
    """
    from hpc.inside import together

    if not rows or config.sharding != "none":
        return None
    path = ctx.checkpoints / "before.json"
    known = read_json(path) or {}
    if together.any_of(not known):
        ctx.progress(0, 1, "measuring the held-out loss before training")
        known = {"eval_loss": measure(model)}
        if together.rank() == 0:
            write_json(path, known)
    return float(known["eval_loss"])


def _train(trainer: Any, batches: Any, ctx: Context) -> bool:
    """Train to the end, from the last complete checkpoint; False where the scheduler asked to stop before."""
    from hpc.inside import together, trainers

    resumed = trainers.resumed(ctx.checkpoints)
    if together.any_of(ctx.stopping()):
        return False
    batches.tokens = 0
    seconds = trainers.train(trainer, resumed)  # of this attempt
    if trainer.state.global_step < trainer.state.max_steps:
        return False
    losses = [round(entry["loss"], 5) for entry in trainer.state.log_history if "loss" in entry]
    trainable = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    ctx.metric(steps=trainer.state.global_step, losses=losses, ranks=together.world())
    ctx.metric(trainable_parameters=trainable, resumed_from=resumed.name if resumed else None)
    if losses:
        ctx.metric(train_loss=sum(losses) / len(losses))
    tokens = batches.tokens * together.world()
    ctx.metric(train_seconds=seconds, tokens=tokens, tokens_per_second=round(tokens / seconds, 1) if seconds else 0.0)
    return True


STAGE = Stage(
    name="finetune",
    summary="Train a LoRA or QLoRA adapter, or the whole model, on chat data",
    config=FinetuneConfig,
    container="train",
    consumes={"base_model": Input(kind="hf_model"), "dataset": Input(kind="dataset")},
    outputs=outputs,
    resources=resources,
    run=run,
    files=files,
    check=check,
    size=size,
    launcher="torchrun",
    presets=presets.FINETUNE,
)
