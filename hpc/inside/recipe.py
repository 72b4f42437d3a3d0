"""What the settings of finetune and align mean to the libraries: base as it is loaded, adapter, arguments, output."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpc.core import shape
from hpc.core.errors import UsageError
from hpc.core.rundir import write_json
from hpc.core.stage import Context
from hpc.inside import generation, limits, models, together, trainers


def template(given: str | None, folder: str | None) -> str | None:
    """The chat template that was set, else the one that lies in the folder of the data or adapter, else None."""
    if given is not None:
        return Path(given).read_text(encoding="utf-8")
    found = Path(folder) / "chat_template.jinja" if folder is not None else None
    return found.read_text(encoding="utf-8") if found is not None and found.is_file() else None


def model(folder: Path, dtype: str, config: Any, sharding: str = "none") -> Any:
    """The base, ready to train on: in 4 bit for qlora, with float32 weights where they are trained or sharded."""
    import torch

    gpu = torch.cuda.is_available()
    if config.method != "qlora":
        whole = config.method == "full" or sharding == "fsdp"
        loaded = models.load(folder, "float32" if whole else dtype)
        # what is sharded may not fit on one GPU: the trainer places it
        return loaded.to(f"cuda:{together.local_rank()}") if gpu and sharding == "none" else loaded
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=config.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    place = together.local_rank() if gpu else "cpu"
    loaded = models.load(folder, dtype, quantization_config=quantization, device_map={"": place})
    for layer in loaded.modules():
        # On a CPU with AVX512-BF16, measuring a loss would repack the weights into a form without gradients.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return loaded


def positions(model: Any, longest: int, setting: str) -> None:
    """UsageError where rows of so many tokens are beyond a table of learnt positions; beyond other kinds it is said."""
    config = model.config.get_text_config()
    known = getattr(config, "max_position_embeddings", None) or longest
    if longest <= known:
        return
    if limits.learnt(model):
        raise UsageError(
            f"rows have up to {longest} tokens, and this model has {known} positions",
            hint=f"set {setting} = {known}, or take a model with more",
        )
    known = max(known, shape.positions(config.to_dict()))
    if longest > known:
        print(f"rows have up to {longest} tokens, more than the {known} that this model was made for")


def adapter(model: Any, config: Any, stage: str) -> Any:
    """
    peft's LoraConfig: for the layers that were set, for peft's default, or where it has none for all linear layers.

    Of a model that also sees or hears the language model alone: text gives the rest no gradient. UsageError where the
    model has no such layers.
    """
    from peft import LoraConfig
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    modules = dict(model.named_modules())
    inside = next(name for name, m in modules.items() if m is model.get_input_embeddings()).rpartition(".")[0]
    other = None
    if model.config.get_text_config() is not model.config and inside:
        other = rf"(?!{re.escape(inside)}\.|lm_head$).*"
        modules = {name: m for name, m in modules.items() if not re.fullmatch(other, name)}
    layers = {name: m for name, m in modules.items() if re.search("Linear|Conv|Embedding", type(m).__name__)}
    linear = sorted({name.rpartition(".")[2] for name, m in layers.items() if "Embedding" not in type(m).__name__})
    targets: Any = list(config.target_modules) or None
    if targets is None and model.config.model_type not in DEFAULTS:
        print(f"peft has no default for {model.config.model_type}: all its linear layers get an adapter")
        targets = ["all-linear"]
    if targets == ["all-linear"]:
        targets = "all-linear"
    elif targets is not None:
        named = [name for name in modules if name in targets or name.endswith(tuple(f".{t}" for t in targets))]
        if not named or not layers.keys() >= set(named):
            raise UsageError(
                f"{stage}.target_modules: {', '.join(targets)} are no layers of this model that an adapter can change",
                hint=f"its linear layers are {', '.join(linear)}; or leave it empty",
            )
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        exclude_modules=other,
        task_type="CAUSAL_LM",
    )


def trained_in_full(model: Any) -> None:
    """TRL leaves qlora's adapter in bfloat16, which loses small updates and breaks float16."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def common(config: Any, dtype: str, ctx: Context, sharding: str = "none") -> dict[str, Any]:
    """What TRL's configs of both stages have alike, by the names of their newest generation."""
    import torch

    gpu = torch.cuda.is_available()
    checkpointing = config.gradient_checkpointing and sharding != "fsdp"  # FSDP has its own
    return {
        **trainers.spread(sharding, gradient_checkpointing=config.gradient_checkpointing, gpu=gpu),
        "output_dir": str(ctx.checkpoints),
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.lr_scheduler,
        "warmup_steps": config.warmup_ratio,
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.grad_accum,
        "gradient_checkpointing": checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if checkpointing else None,
        "max_length": config.max_length,
        "optim": config.optim,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "seed": config.seed,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "use_cpu": not gpu,
        "dataloader_pin_memory": gpu,
        "save_steps": config.save_steps or 1,
        "save_total_limit": None,  # the trainer keeps the last ones itself
        "logging_steps": config.logging_steps,
        "logging_nan_inf_filter": False,  # else a loss of NaN is shown as the last good one
        "disable_tqdm": True,
        "report_to": "none",
    }


def arguments(config: Any, dtype: str, ctx: Context, held_out: bool) -> Mapping[str, Any]:
    """SFTConfig's values; `held_out`: there are rows to measure the loss on."""
    measured = held_out and config.eval_steps
    return {
        **common(config, dtype, ctx, config.sharding),
        "train_sampling_strategy": "group_by_length" if config.group_by_length and not config.packing else "random",
        "dataset_kwargs": {"skip_prepare_dataset": True},  # the rows are tokens already
        "torch_compile": config.compile,
        "save_strategy": "steps" if config.save_steps else "epoch",
        "eval_strategy": "steps" if measured else "no",
        "eval_steps": measured or None,
        "report_to": list(config.report_to) or "none",
    }


def save(trainer: Any, tokenizer: Any, config: Any, ctx: Context, *, base: str, dtype: str) -> None:
    """Write the output folder. An adapter names the base that was asked for, not the converted copy."""
    import torch

    (target,) = ctx.outputs.values()
    weights = None
    if config.sharding != "none":  # all ranks gather what each has a part of
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if together.rank() == 0:
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped if weights else trainer.model)
        with models.written_whole(target) as part:
            if config.method == "full":
                kind = getattr(torch, dtype)
                model.config.use_cache = True
                if not generation.mend(model.generation_config, tokenizer):
                    ctx.remark(generation.ENDLESS)
                if weights is None:
                    model.to(kind).save_pretrained(part)
                else:
                    model.config.dtype = kind
                    model.save_pretrained(part, state_dict={name: w.to(kind) for name, w in weights.items()})
            else:
                model.peft_config["default"].base_model_name_or_path = base
                # embeddings are never trained, so never asked of the hub
                model.save_pretrained(part, save_embedding_layers=False, state_dict=weights)
                write_json(part / "base.json", {"base_model": base, "method": config.method, "dtype": dtype})
            tokenizer.save_pretrained(part)
    together.barrier()
