"""A base ready to train on: in 4 bit, in the type to calculate in, or whole; and the adapter that is put on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpc.inside import models, together


def trainable(folder: Path, dtype: str, method: str, *, double_quant: bool = True, whole: bool = False) -> Any:
    """The model in a folder: in 4 bit for qlora, with float32 weights where they are trained or (`whole`) sharded."""
    import torch

    if method == "full" or whole:
        return models.load(folder, "float32")
    if method == "lora":
        return models.load(folder, dtype)
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    place = together.local_rank() if torch.cuda.is_available() else "cpu"
    model = models.load(folder, dtype, quantization_config=quantization, device_map={"": place})
    for layer in model.modules():
        # On a CPU with AVX512-BF16, measuring a loss would repack the weights into a form without gradients.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return model


def adapter(config: Any) -> Any:
    """peft's LoraConfig of a stage's settings: lora_r, lora_alpha, lora_dropout, target_modules, seed."""
    from peft import LoraConfig
    from transformers import set_seed

    set_seed(config.seed)  # the trainer seeds itself only after the adapter has got its first weights
    targets: Sequence[str] | None = list(config.target_modules) or None
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )


def trained_in_full(model: Any) -> None:
    """TRL leaves qlora's adapter in bfloat16, which loses small updates and breaks float16."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
