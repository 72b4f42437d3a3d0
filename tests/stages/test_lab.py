"""The lab's three calls on a tiny model: what one makes, the next one takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpc.inside import lab

pytestmark = pytest.mark.train


def test_prepare_finetune_merge_by_calls(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": f"Is wall {i} a wall?", "output": f"Yes, wall {i} is."} for i in range(12)]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = lab.run("prepare", data="data.jsonl", eval_rows=2, tokenizer=tiny_model, out="lab/prepare")
    assert prepared.metrics["tokens"]["longest"] > 0
    small = {"base_model": tiny_model, "max_steps": 3, "lora_r": 2, "max_length": 128, "save_steps": 2}
    trained = lab.run("finetune", **small, dataset=prepared.outputs["dataset"], out="lab/finetune")
    assert (trained.metrics["steps"], len(trained.metrics["losses"])) == (3, 3)
    merged = lab.run("merge", adapter=trained.outputs["adapter"], ask="Is wall 1 a wall?", out="lab/merge")
    assert {"before", "after"} <= merged.metrics.keys()
    manifest = json.loads(Path("lab/finetune/manifest.json").read_text())
    assert manifest["inputs"]["dataset"]["path"] == prepared.outputs["dataset"]
    assert manifest["versions"]["trl"]
