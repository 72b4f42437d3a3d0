"""
finetune: a base model and chat data -> a LoRA adapter, or a whole model with method = "full".

Training is TRL's SFTTrainer on conversations in the model's own chat template. It saves checkpoints, resumes
from the last complete one, and ends early with a checkpoint where the scheduler asks for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hpc.core.errors import HpcError, UsageError
from hpc.core.rundir import read_json, write_json
from hpc.core.stage import Artifact, Context, Input, Resources, Stage

_IGNORED = -100
"""The label that torch's cross entropy leaves out of the loss."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """What to train, on what, and how."""

    base_model: str | None = None
    """Model folder, GGUF file or name on the hub; None: from the stage before that makes an hf_model."""
    dataset: str | None = None
    """Folder with train.jsonl and eval.jsonl; None: from the stage before (prepare)."""
    method: Literal["lora", "qlora", "full"] = "lora"
    """lora: a low-rank adapter on the base; qlora: the same on a base in 4 bit (nf4); full: all weights."""
    chat_template: str | None = None
    """A Jinja file, for a base whose tokenizer has no chat template."""
    lora_r: int = 64
    """Rank of the adapter."""
    lora_alpha: int = 16
    """Scale of the adapter: it counts alpha/r times."""
    lora_dropout: float = 0.1
    """Share of the adapter's inputs dropped in training, 0 to 1."""
    target_modules: tuple[str, ...] = ()
    """Names of the layers that get an adapter, or "all-linear"; empty: peft's default for the model."""
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
    """Conversations per forward pass."""
    grad_accum: int = 1
    """Forward passes per optimizer step."""
    max_length: int = 512
    """Tokens per conversation; longer ones are cut, and counted."""
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
    save_steps: int = 50
    """Optimizer steps between two checkpoints; the last two are kept."""
    logging_steps: int = 1
    """Optimizer steps between two readings of the loss."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: far less GPU memory, about a third more time."""


def files(config: FinetuneConfig) -> tuple[str, ...]:
    return (config.chat_template,) if config.chat_template is not None else ()


def resources(config: FinetuneConfig) -> Resources:
    """One GPU. Host memory: the base's files, and for full training the checkpoints, pass through it."""
    memory = 128 if config.method == "full" else 64
    return Resources(gpus_per_node=1, cpus_per_task=8, mem_gb=memory, time_min=240)


def outputs(config: FinetuneConfig) -> dict[str, Artifact]:
    if config.method == "full":
        return {"model": Artifact(kind="hf_model", path="model")}
    return {"adapter": Artifact(kind="lora_adapter", path="adapter")}


def check(config: FinetuneConfig) -> None:
    """UsageError for figures that can't be, HpcError for a base that can't be loaded. Standard library."""
    from hpc.inside import models

    for name in (
        "lora_r",
        "lora_alpha",
        "batch_size",
        "grad_accum",
        "save_steps",
        "logging_steps",
        "learning_rate",
    ):
        if getattr(config, name) <= 0:
            raise UsageError(f"finetune.{name} must be more than 0")
    if config.max_steps == 0 or (config.max_steps < 0 and config.epochs <= 0):
        raise UsageError("finetune has no step to do", hint="set epochs, or max_steps, above 0")
    if config.max_length < 8:
        raise UsageError("finetune.max_length must be 8 tokens or more")
    if not (0 <= config.lora_dropout < 1 and 0 <= config.warmup_ratio < 1):
        raise UsageError("finetune.lora_dropout and warmup_ratio lie between 0 and 1")
    if config.base_model is not None:
        models.inspect(config.base_model)


def run(config: FinetuneConfig, ctx: Context) -> None:
    """Train, and write the adapter (or model); without an output where the scheduler asked to stop."""
    from hpc.inside import models

    models.settle()
    ctx.progress(0, 1, "loading the base model")
    base = ctx.inputs["base_model"]
    dtype = models.compute_dtype(config.dtype)
    folder = models.local(base, ctx.cache)
    template = Path(config.chat_template).read_text(encoding="utf-8") if config.chat_template else None
    tokenizer = models.tokenizer(folder, template)
    rows = {part: _rows(part, tokenizer, config, ctx) for part in ("train", "eval")}
    if not rows["train"]:
        raise UsageError(
            f"no row of the data set has an answer within {config.max_length} tokens",
            hint="raise finetune.max_length, or prepare more data",
        )
    trainer = _trainer(_model(folder, dtype, config), tokenizer, rows, config, ctx)
    if not _train(trainer, bool(rows["eval"]), ctx):
        return
    ctx.metric(base_model=base, method=config.method, dtype=dtype)
    _save(trainer.model, tokenizer, config, ctx, base=base, dtype=dtype)


def _rows(part: str, tokenizer: Any, config: FinetuneConfig, ctx: Context) -> list[dict[str, list[int]]]:
    """Tokens and labels of train.jsonl or eval.jsonl, cut to max_length; UsageError where there is no such file."""
    path = Path(ctx.inputs["dataset"]) / f"{part}.jsonl"
    try:
        with open(path, encoding="utf-8") as file:  # not splitlines(), which also splits at U+2028 within a text
            rows = [encode(json.loads(line)["messages"], tokenizer, config) for line in file]
    except OSError as error:
        raise UsageError(f"there is no {path}", hint="give the data set that prepare makes") from error
    cut = [{name: ids[: config.max_length] for name, ids in row.items()} for row in rows]
    kept = [row for row in cut if any(label != _IGNORED for label in row["labels"])]
    too_long = sum(len(row["input_ids"]) > config.max_length for row in rows)
    ctx.metric(**{f"{part}_rows": len(kept), f"{part}_cut": too_long, f"{part}_without_answer": len(cut) - len(kept)})
    return kept


def encode(messages: list[dict[str, str]], tokenizer: Any, config: FinetuneConfig) -> dict[str, list[int]]:
    """A conversation's tokens in the chat template, and labels: the same, or those of the answers alone."""
    from jinja2 import TemplateError

    def tokens(until: int, **options: bool) -> list[int]:
        ids: list[int] = tokenizer.apply_chat_template(messages[:until], return_dict=True, **options)["input_ids"]
        return ids

    try:
        ids = tokens(len(messages))
        labels = [_IGNORED] * len(ids) if config.completion_only_loss else list(ids)
        for turn, message in enumerate(messages):
            if config.completion_only_loss and message["role"] == "assistant":
                start = _shared(tokens(turn, add_generation_prompt=True), ids)
                end = _shared(tokens(turn + 1), ids)
                labels[start:end] = ids[start:end]
    except TemplateError as error:
        raise HpcError(
            f"the model's chat template refuses a conversation: {error}",
            hint="does it allow a system message?",
        ) from error
    return {"input_ids": ids, "labels": labels}


def _shared(a: list[int], b: list[int]) -> int:
    """How many tokens two lists have in common at their start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _model(folder: Path, dtype: str, config: FinetuneConfig) -> Any:
    """The base, ready to train on: in 4 bit for qlora, with float32 weights for full training."""
    import torch

    from hpc.inside import models

    if config.method == "full":
        return models.load(folder, "float32")
    if config.method == "lora":
        return models.load(folder, dtype)
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    gpu = torch.cuda.is_available()
    model = models.load(folder, dtype, quantization_config=quantization, device_map={"": 0 if gpu else "cpu"})
    for layer in model.modules():
        # On a CPU with AVX512-BF16, measuring a loss would repack the weights into a form without gradients.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return model


def _trainer(
    model: Any,
    tokenizer: Any,
    rows: Mapping[str, list[dict[str, list[int]]]],
    config: FinetuneConfig,
    ctx: Context,
) -> Any:
    """SFTTrainer over the rows ("train", "eval"), with the adapter on the model where there is one."""
    import datasets
    import torch
    from peft import LoraConfig
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    from hpc.inside import models

    dtype = models.compute_dtype(config.dtype)
    datasets.disable_progress_bars()
    set_seed(config.seed)  # the trainer seeds itself only after the adapter has got its first weights
    targets = list(config.target_modules) or None
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )
    gpu = torch.cuda.is_available()
    arguments = SFTConfig(
        output_dir=str(ctx.checkpoints),
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler,
        warmup_steps=config.warmup_ratio,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.grad_accum,
        gradient_checkpointing=config.gradient_checkpointing,
        max_length=config.max_length,
        optim=config.optim,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        use_cpu=not gpu,
        dataloader_pin_memory=gpu,
        save_steps=config.save_steps,
        save_total_limit=2,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,  # else a loss of NaN is shown as the last good one
        disable_tqdm=True,
        report_to="none",
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows["train"]),
        eval_dataset=datasets.Dataset.from_list(rows["eval"]) if rows["eval"] else None,
        processing_class=tokenizer,
        peft_config=None if config.method == "full" else lora,
        callbacks=[_watcher(ctx)],
    )
    for weight in trainer.model.parameters():
        if weight.requires_grad:  # TRL leaves qlora's adapter in bfloat16, which loses small updates and breaks float16
            weight.data = weight.data.float()
    return trainer


def _watcher(ctx: Context) -> Any:
    """The callback that tells progress, passes on the wish to stop, and ends a training that has diverged."""
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seen: dict[str, float] = {}

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if ctx.stopping():
                control.should_save = control.should_training_stop = True
            elif not control.should_log:
                ctx.progress(state.global_step, state.max_steps, "training", **self.seen)

        def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **_: Any) -> None:
            for name in ("loss", "train_loss", "eval_loss"):
                if not math.isfinite(logs.get(name, 0.0)):
                    raise HpcError(
                        f"the loss became {logs[name]} at step {state.global_step}: the training has diverged",
                        hint="lower finetune.learning_rate, and look for broken rows in the data",
                    )
            if "loss" in logs:
                self.seen = {name: logs[name] for name in ("loss", "learning_rate", "grad_norm") if name in logs}
                ctx.progress(state.global_step, state.max_steps, "training", **self.seen)

        def on_prediction_step(self, *_: Any, **__: Any) -> None:
            if ctx.stopping():
                raise _StopError

    return Watcher()


class _StopError(Exception):
    """The scheduler asked to stop while the held-out loss was measured."""


def _train(trainer: Any, evaluate: bool, ctx: Context) -> bool:
    """Train to the end, from the last complete checkpoint; False where the scheduler asked to stop before."""
    from hpc.inside import models

    before_file = ctx.checkpoints / "before.json"
    resumed = models.last_checkpoint(ctx.checkpoints)
    try:
        if evaluate and not before_file.exists():
            ctx.progress(0, 1, "measuring the held-out loss before training")
            write_json(before_file, {"eval_loss": trainer.evaluate()["eval_loss"]})
        if ctx.stopping():
            return False
        result = trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        if trainer.state.global_step < trainer.state.max_steps:
            return False
        if evaluate:
            ctx.progress(1, 1, "measuring the held-out loss after training")
            before = (read_json(before_file) or {})["eval_loss"]
            ctx.metric(eval_loss_before=before, eval_loss_after=trainer.evaluate()["eval_loss"])
    except _StopError:
        return False
    losses = [round(entry["loss"], 5) for entry in trainer.state.log_history if "loss" in entry]
    trainable = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    ctx.metric(steps=trainer.state.global_step, losses=losses)
    ctx.metric(trainable_parameters=trainable, resumed_from=resumed.name if resumed else None)
    if losses:
        ctx.metric(train_loss=sum(losses) / len(losses))
    ctx.metric(train_seconds=result.metrics["train_runtime"])  # of this attempt
    return True


def _save(model: Any, tokenizer: Any, config: FinetuneConfig, ctx: Context, *, base: str, dtype: str) -> None:
    """Write the output folder. An adapter names the base that was asked for, not the converted copy."""
    import torch

    from hpc.inside import models

    (target,) = ctx.outputs.values()
    with models.written_whole(target) as part:
        if config.method == "full":
            model.config.use_cache = True
            model.to(getattr(torch, dtype)).save_pretrained(part)
        else:
            model.peft_config["default"].base_model_name_or_path = base
            model.save_pretrained(part, save_embedding_layers=False)  # never trained, so never asked of the hub
            write_json(part / "base.json", {"base_model": base, "method": config.method, "dtype": dtype})
        tokenizer.save_pretrained(part)


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
)
