"""finetune by several processes: torchrun and gloo on this machine's CPU, as on the GPUs of a node."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .test_finetune import SMALL, inputs

RunStage = Callable[..., Any]
pytestmark = pytest.mark.train

ALONE = {**SMALL, "lora_dropout": 0.0, "max_steps": 6, "batch_size": 4}
TWO = {**ALONE, "batch_size": 2}
"""Two ranks of two rows: the same batches as one of four."""


def test_two_ranks_learn_what_one_learns(run_stage: RunStage, tiny_model: Path, dataset: Path) -> None:
    alone = run_stage("finetune", inputs(tiny_model, dataset), folder="alone", **ALONE).metrics
    for sharding in ("none", "fsdp"):
        result = run_stage(
            "finetune", inputs(tiny_model, dataset), folder=sharding, ranks=2, **{**TWO, "sharding": sharding}
        )
        assert result.code == 0, (result.folder / "attempt-1" / "stderr").read_text()[-3000:]
        assert result.metrics["ranks"] == 2
        assert result.metrics["losses"] == pytest.approx(alone["losses"], rel=1e-3)
        assert result.metrics["eval_loss_after"] == pytest.approx(alone["eval_loss_after"], rel=1e-2)
        assert (result.out("adapter") / "adapter_model.safetensors").is_file()
