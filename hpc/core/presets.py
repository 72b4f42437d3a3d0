"""Named sets of a stage's settings: what the finetuning lab trains with, and a run that only shows that all works."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LAB: Mapping[str, Any] = {
    "method": "qlora", "double_quant": False, "lora_r": 64, "lora_alpha": 16, "lora_dropout": 0.1,
    "target_modules": ("q_proj", "v_proj"), "learning_rate": 2e-4, "lr_scheduler": "constant", "warmup_ratio": 0.03,
    "optim": "paged_adamw_32bit", "weight_decay": 0.001, "max_grad_norm": 0.3, "dtype": "float16",
    "group_by_length": True, "packing": False, "completion_only_loss": False, "gradient_checkpointing": False,
}  # fmt: skip

FINETUNE: Mapping[str, Mapping[str, Any]] = {
    "lab-mig20": {
        **_LAB, "epochs": 2.0, "batch_size": 1, "grad_accum": 1, "max_length": 512, "save_steps": 25,
        "logging_steps": 25,
    },
    "lab-a100": {
        **_LAB, "epochs": 5.0, "batch_size": 4, "grad_accum": 4, "max_length": 1024, "save_steps": 50,
        "logging_steps": 50,
    },
    "challenge": {
        **_LAB, "lora_r": 16, "lora_alpha": 32, "learning_rate": 1e-4, "lr_scheduler": "cosine", "warmup_ratio": 0.05,
        "weight_decay": 0.0, "epochs": 2.0, "batch_size": 1, "grad_accum": 1, "max_length": 4096, "save_steps": 0,
        "logging_steps": 10, "eval_steps": 0.2,
    },
    "smoke": {
        "method": "lora", "lora_r": 4, "lora_alpha": 8, "max_steps": 4, "batch_size": 2, "max_length": 128,
        "save_steps": 2, "gradient_checkpointing": False,
    },
}  # fmt: skip
"""The lab's: a 20 GB slice, a whole A100, and its challenge. `smoke`: seconds on a CPU, to see that the parts fit."""


def words(values: Mapping[str, Any]) -> str:
    """A set in one line.

    >>> words({"epochs": 2.0, "target_modules": ("q", "v"), "packing": False})
    'epochs 2, target_modules q+v, packing off'
    """
    return ", ".join(f"{name} {_word(value)}" for name, value in values.items())


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return "+".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
