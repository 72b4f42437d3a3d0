"""Named sets of settings of finetune: the numbers of the lab, each a setting that there is, and what is set beside."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from hpc.core import presets
from hpc.core.errors import Refused
from hpc.core.gpus import Found, named
from hpc.core.site import Site
from hpc.core.stage import Around
from hpc.login.settings import Project, load
from stages import finetune


def chosen(tmp_path: Path, **table: object) -> tuple[finetune.FinetuneConfig, dict[str, str]]:
    project = Project(root=tmp_path, file=None, tables={"finetune": table}, runs=tmp_path)
    settings = load(project, target="finetune", env={})
    (wish,) = (w for w in settings.wishes if w.stage.name == "finetune")
    return wish.config, dict(settings.origins)


@pytest.mark.parametrize("name", presets.FINETUNE)
def test_each_is_made_of_settings_and_passes_the_check(name: str) -> None:
    config = finetune.FinetuneConfig(preset=name, **presets.FINETUNE[name])  # type: ignore[arg-type]
    finetune.check(config)
    assert all(type(getattr(finetune.FinetuneConfig(), n)) is type(v) for n, v in presets.FINETUNE[name].items())


def test_the_labs_numbers(tmp_path: Path) -> None:
    mig, _ = chosen(tmp_path, preset="lab-mig20")
    a100, _ = chosen(tmp_path, preset="lab-a100")
    challenge, _ = chosen(tmp_path, preset="challenge")
    for one in (mig, a100, challenge):
        assert (one.method, one.lora_dropout, one.max_grad_norm, one.optim) == ("qlora", 0.1, 0.3, "paged_adamw_32bit")
        assert one.group_by_length
        assert not one.packing
    assert (mig.epochs, mig.batch_size, mig.grad_accum, mig.max_length, mig.save_steps) == (2, 1, 1, 512, 25)
    assert (a100.epochs, a100.batch_size, a100.grad_accum, a100.max_length, a100.save_steps) == (5, 4, 4, 1024, 50)
    assert (mig.lora_r, mig.lora_alpha, mig.learning_rate, mig.lr_scheduler) == (64, 16, 2e-4, "constant")
    assert (challenge.lora_r, challenge.lora_alpha, challenge.learning_rate) == (16, 32, 1e-4)
    assert (challenge.lr_scheduler, challenge.warmup_ratio, challenge.max_length) == ("cosine", 0.05, 4096)
    assert (challenge.save_steps, challenge.logging_steps, challenge.eval_steps) == (0, 10, 0.2)


def test_what_is_set_beside_a_preset_counts_and_is_said(tmp_path: Path) -> None:
    config, origins = chosen(tmp_path, preset="lab-a100", lora_r=8)
    assert (config.lora_r, config.batch_size) == (8, 4)
    assert origins["finetune.batch_size"] == "preset lab-a100"
    assert origins["finetune.lora_r"] == "hpc.toml"
    _, (note,) = finetune.size(config, Around(site=Site(name="x")))
    assert note.startswith("finetune: preset lab-a100: method qlora")
    assert note.endswith("set beside it: lora_r")


def test_a_precision_that_is_not_there_is_refused_before_the_queue() -> None:
    half = finetune.FinetuneConfig(dtype="float16")
    with pytest.raises(Refused, match="float16 needs a GPU"):
        finetune.size(half, Around(site=Site(name="local", gpus="none")))
    brain = dataclasses.replace(half, dtype="bfloat16")
    with pytest.raises(Refused, match="V100-32 has no bfloat16"):
        finetune.size(brain, Around(site=Site(name="x"), card=Found(card=named("V100-32"))))
    finetune.size(brain, Around(site=Site(name="x"), card=Found(card=named("A100-80"))))
