"""The main job on the cluster, on real data and real weights: from the fetched model to an answer of the tuned one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from .project import Project

DEMO = Path(__file__).resolve().parent.parent.parent / "demo"

SETTINGS = """\
site = "login-test"
[pipeline]
stages = ["fetch", "prepare", "finetune", "merge", "build", "serve"]
[fetch]
model = "smollm2.gguf"
datasets = ["./faq.jsonl"]
[prepare]
languages = ["en"]
max_samples = 540
eval_rows = 4
resources = { cpus_per_task = 2, mem_gb = 4 }
sbatch = { nodelist = "dgx01" }
[finetune]
lora_r = 4
max_steps = 4
batch_size = 1
max_length = 64
save_steps = 2
gradient_checkpointing = false
resources = { cpus_per_task = 2, mem_gb = 8 }
sbatch = { nodelist = "dgx02" }
[merge]
ask = "Do I need a building permit for a garden shed?"
resources = { cpus_per_task = 2, mem_gb = 8 }
sbatch = { nodelist = "dgx03" }
[build]
engine = "onnxruntime_genai"
resources = { cpus_per_task = 2, mem_gb = 6 }
sbatch = { nodelist = "dgx04" }
[serve]
resources = { cpus_per_task = 2, mem_gb = 6 }
sbatch = { nodelist = "dgx01" }
"""


@pytest.fixture
def lab(project: Project, train_sif: Path, serve_cpu_sif: Path, demo_files: Path) -> Project:
    """The project with the demo's model and data, and the stages in their images."""
    for file in (demo_files / "data" / "faq.jsonl", demo_files / "models" / "smollm2.gguf"):
        shutil.copy(file, project.folder / file.name)
    project.write("hpc.toml", SETTINGS)
    project.write("sites/login-test.toml", 'extends = "slurm-test"\nnetwork = "login"\n')
    for image in (train_sif, serve_cpu_sif):  # the site finds them by the environments' names
        assert (train_sif.parent / image.name).samefile(image)
    return project


def test_pipeline_from_fetch_to_an_answer(lab: Project) -> None:
    assert "note: fetch runs on this login node" in lab.hpc("plan").stdout
    lab.hpc("submit", "pipeline", "--wait", timeout=600)  # until the service answers
    fetch = json.loads((lab.folder / "runs" / "fetch-1" / "fetch" / "manifest.json").read_text())
    assert fetch["host"] == "login", "the site says that only it has a network"
    assert {"config.json", "model.safetensors"} <= fetch["outputs"]["model"]["files"].keys()
    found = {name: row for name, row in lab.states().items() if name != "fetch"}
    assert [s["state"] for s in found.values()] == ["COMPLETED"] * 4 + ["RUNNING"]
    assert [s["node"] for s in found.values()] == ["dgx01", "dgx02", "dgx03", "dgx04", "dgx01"]
    asked = ("query", "Do I need a building permit for a garden shed?", "--temperature", "0", "--json")
    said = json.loads(lab.hpc(*asked, "--max-tokens", "12").stdout)
    assert (said["completion_tokens"], said["text"].isascii()) == (12, True), said

    run = lab.folder / "runs" / found["merge"]["run"]
    assert said["text"].strip() in json.loads((run / "merge" / "manifest.json").read_text())["metrics"]["after"]
    manifests = {name: json.loads((run / name / "manifest.json").read_text()) for name in found if name != "serve"}
    assert manifests["prepare"]["metrics"]["languages"].get("en", 0) > 0
    assert manifests["finetune"]["environment"]["kind"] == "sif"
    assert manifests["finetune"]["versions"]["trl"]
    assert manifests["merge"]["metrics"]["after"]
    model = run / "merge" / "out" / "model"
    assert (model / "model.safetensors").stat().st_uid == (lab.folder).stat().st_uid
    assert {"config.json", "tokenizer.json"} <= {p.name for p in model.iterdir()}
    asked = json.loads((run / "finetune" / "config.json").read_text())
    assert asked["config"]["weight_decay"] is not None, "every default is written out"

    # what is done is not done again, by whatever name it is asked for
    again = lab.hpc("submit", "finetune")
    assert "prepare (done), finetune (done)" in again.stdout
    lab.hpc("cancel")
