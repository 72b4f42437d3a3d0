"""finetune by several processes: torchrun and gloo on this machine's CPU, as on the GPUs of a node."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpc.core import endpoint, rundir
from hpc.core.errors import STOPPED
from hpc.inside import models, ranks
from tests.stages.conftest import ROOT

RunStage = Callable[..., Any]
pytestmark = pytest.mark.train

ALONE: dict[str, Any] = {
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "target_modules": ("all-linear",),
    "learning_rate": 1e-2,
    "batch_size": 4,
    "max_length": 64,
    "max_steps": 40,
    "gradient_checkpointing": False,
}
FULL = {**ALONE, "method": "full", "learning_rate": 1e-3, "max_steps": 20, "save_steps": 5, "keep_checkpoints": 1}
TWO = {**ALONE, "batch_size": 2}
"""Two ranks of two rows: the same batches as one of four."""


def told(result: Any) -> str:
    return str((result.folder / "attempt-1" / "stderr").read_text()[-3000:])


def test_two_ranks_stop_go_on_and_learn_what_one_learns(run_stage: RunStage, tiny_model: Path, dataset: Path) -> None:
    inputs = {"base_model": tiny_model, "dataset": dataset}
    from safetensors.torch import load_file

    alone = run_stage("finetune", inputs, folder="alone", **ALONE)

    stopped = run_stage("finetune", inputs, folder="ddp", ranks=2, stop_at=3, **TWO)
    assert stopped.code == STOPPED, told(stopped)
    assert [e["signal"] for e in stopped.events if e["phase"] == "stopping"] == ["SIGUSR2"]
    (checkpoint,) = models.checkpoints(stopped.folder / "checkpoints")
    assert 3 <= models.step_of(checkpoint) < 40
    assert {p.name for p in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    other = run_stage("finetune", inputs, folder="ddp", **TWO)
    assert (other.code, "by 2 ranks, and this one has 1" in other.error["cause"]) == (3, True), other.error
    resumed = run_stage("finetune", inputs, folder="ddp", ranks=2, **TWO)
    assert resumed.code == 0, told(resumed)
    assert resumed.metrics["resumed_from"] == checkpoint.name

    sharded = run_stage("finetune", inputs, folder="fsdp", ranks=2, **TWO, sharding="fsdp")
    assert sharded.code == 0, told(sharded)
    for result in (resumed, sharded):
        assert result.metrics["ranks"] == 2
        assert result.metrics["losses"] == pytest.approx(alone.metrics["losses"], rel=1e-3)
        assert result.metrics["eval_loss_after"] == pytest.approx(alone.metrics["eval_loss_after"], rel=1e-3)
        found = load_file(result.out("adapter") / "adapter_model.safetensors")
        wanted = load_file(alone.out("adapter") / "adapter_model.safetensors")
        assert found.keys() == wanted.keys()
        assert max(float((found[name] - wanted[name]).abs().max()) for name in wanted) < 1e-3


def test_a_sharded_model_is_saved_whole_and_goes_on(run_stage: RunStage, tiny_model: Path, dataset: Path) -> None:
    from safetensors.torch import load_file

    inputs = {"base_model": tiny_model, "dataset": dataset}
    alone = run_stage("finetune", inputs, folder="alone", **FULL)
    sharded = {**FULL, "batch_size": 2, "sharding": "fsdp"}
    stopped = run_stage("finetune", inputs, folder="fsdp", ranks=2, stop_at=6, **sharded)
    assert stopped.code == STOPPED, told(stopped)
    (checkpoint,) = models.checkpoints(stopped.folder / "checkpoints")
    assert 6 <= models.step_of(checkpoint) < 20
    assert (checkpoint / "pytorch_model_fsdp.bin").is_file(), "it was FSDP, not DDP by its name"
    assert not list((stopped.folder / "checkpoints" / ".part").iterdir())
    resumed = run_stage("finetune", inputs, folder="fsdp", ranks=2, **sharded)
    assert resumed.code == 0, told(resumed)
    assert (resumed.metrics["resumed_from"], resumed.metrics["ranks"]) == (checkpoint.name, 2)
    assert resumed.metrics["losses"] == pytest.approx(alone.metrics["losses"], rel=1e-3)
    assert [p.name for p in (resumed.folder / "checkpoints").glob("checkpoint-*")] == ["checkpoint-20"]
    found, wanted = (load_file(result.out("model") / "model.safetensors") for result in (resumed, alone))
    assert found.keys() == wanted.keys()
    assert max(float((found[name] - wanted[name]).abs().max()) for name in wanted) < 1e-3


def test_a_rank_that_fails_ends_the_others_and_tells_why(run_stage: RunStage, tiny_model: Path, dataset: Path) -> None:
    config = {**TWO, "sharding": "fsdp", "learning_rate": 1e30}
    result = run_stage("finetune", {"base_model": tiny_model, "dataset": dataset}, ranks=2, **config)
    assert result.code == 1, told(result)
    assert "diverged" in result.error["cause"]
    assert not result.out("adapter").exists()


RANK = """
import time
from torch import distributed, ones
from hpc.inside import together

class Late:
    sleep = staticmethod(time.sleep)
    def __del__(self):  # while the interpreter is taken apart
        self.sleep(2)

distributed.init_process_group("gloo")
late = Late()
if together.rank() == 0:
    time.sleep(1)
    distributed.all_reduce(ones(1))
else:
    distributed.all_reduce(ones(1), async_op=True).get_future().then(lambda sum: None)
    together.end(7)
"""


def test_what_a_rank_waits_for_does_not_abort_it_at_its_end() -> None:
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    port = ranks.meet(rundir.AttemptDir(Path()), 0, 1, {})[1]
    assert endpoint.FIRST_PORT <= port <= endpoint.LAST_PORT, "no client is given it meanwhile"
    env["MASTER_PORT"] = str(port)
    started = [
        subprocess.Popen([sys.executable, "-c", RANK], env={**env, "RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in ("0", "1")
    ]
    ends = [process.communicate(timeout=60)[1] for process in started]
    assert started[1].returncode == 7, ends[1]
