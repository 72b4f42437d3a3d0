"""The images lab and serve-cpu do what they are for, as an ordinary user on a compute node."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .cluster import Cluster
from .conftest import CHECKOUT

NOTEBOOK: dict[str, Any] = {
    "nbformat": 4,
    "nbformat_minor": 5,
    "metadata": {},
    "cells": [
        {"cell_type": "code", "id": "a", "metadata": {}, "outputs": [], "execution_count": None,
         "source": "import matplotlib.pyplot, torch\nprint(int(torch.ones(3).sum()))"},
    ],
}  # fmt: skip


def pinned(*names: str) -> dict[str, str]:
    """Package -> version of these requirements."""
    texts = [(CHECKOUT / "containers" / f"{name}.requirements.txt").read_text() for name in names]
    return dict(re.findall(r"^([\w-]+)==(\S+)", "".join(texts), re.M))


def installed(image: Path) -> dict[str, str]:
    """Package -> version, as the image's record says; builds of one version are one."""
    versions = json.loads(image.with_suffix(".lock.json").read_text())["versions"]
    return {name: version.partition("+")[0] for name, version in versions.items() if name != "python"}


def test_all_that_is_in_an_image_is_pinned(
    lab_sif: Path, train_sif: Path, serve_cpu_sif: Path, engine_lab_sif: Path
) -> None:
    assert installed(train_sif) == pinned("train")
    assert installed(lab_sif) == pinned("train", "lab")
    assert installed(serve_cpu_sif) == pinned("serve-cpu")
    assert installed(engine_lab_sif) == pinned("serve-cpu", "engine-lab")


def test_an_image_says_what_it_is(cluster: Cluster, serve_cpu_sif: Path, lab_sif: Path) -> None:
    for image, said in ((serve_cpu_sif, "Triton on the CPU"), (lab_sif, "JupyterLab")):
        assert said in cluster.run("alice", "apptainer", "run-help", str(image)).stdout


def test_the_lab_runs_a_notebook_in_its_kernel(cluster: Cluster, lab_sif: Path, workdir: Path) -> None:
    (workdir / "x.ipynb").write_text(json.dumps(NOTEBOOK))
    inside = ("srun", "apptainer", "-s", "exec", str(lab_sif), "jupyter")
    assert cluster.run("alice", *inside, "lab", "--version", cwd=workdir).stdout.strip() == pinned("lab")["jupyterlab"]
    shown = cluster.run("alice", *inside, "execute", "x.ipynb", "--output", "y", cwd=workdir, timeout=120)
    assert (workdir / "y.ipynb").exists(), shown.stderr
    (cell,) = json.loads((workdir / "y.ipynb").read_text())["cells"]
    assert cell["outputs"][0]["text"] == ["3\n"]


def test_the_real_triton_answers_and_leaves_nothing(cluster: Cluster, serve_cpu_sif: Path) -> None:
    """The image's own %test starts it on a model of a few lines and asks it."""
    before = set(Path("/dev/shm").iterdir())
    done = cluster.run("alice", "srun", "apptainer", "-s", "test", str(serve_cpu_sif), timeout=120)
    assert "ready: 안녕" in done.stdout
    processes = cluster.run("alice", "ps", "-u", "alice", "-o", "args").stdout
    assert "hpc-test-" not in processes
    assert [path for path in Path("/dev/shm").iterdir() if path not in before and "hpc-test-" in path.name] == []


MODEL = """
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

letters = {c: i + 2 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
tokenizer = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1, **letters}, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained("hf")
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=258, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1,
))
model.save_pretrained("hf")
asked = torch.tensor([tokenizer.encode("hello").ids])
print(model.generate(asked, max_new_tokens=8, do_sample=False)[0].tolist())
"""
ENGINE = """
import onnxruntime_genai as og

model = og.Model("engine")
asked = og.Tokenizer(model).encode("hello")
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=len(asked) + 8, do_sample=False)
generator = og.Generator(model, parameters)
generator.append_tokens(asked)
while not generator.is_done():
    generator.generate_next_token()
print(generator.get_sequence(0).tolist())
"""


def test_the_builders_engine_says_what_its_model_says(cluster: Cluster, serve_cpu_sif: Path, workdir: Path) -> None:
    def inside(*argv: str) -> str:
        words = ("srun", "apptainer", "-s", "exec", str(serve_cpu_sif), "python3", *argv)
        return cluster.run("alice", *words, cwd=workdir, timeout=120).stdout

    said = inside("-c", MODEL)
    build = ("-m", "onnxruntime_genai.models.builder", "-i", "hf", "-o", "engine", "-c", "cache")
    inside(*build, "-e", "cpu", "-p", "fp32")
    assert (workdir / "engine" / "model.onnx").exists()
    assert json.loads(inside("-c", ENGINE)) == json.loads(said)


def test_the_engine_sends_nothing_to_its_maker(cluster: Cluster, serve_cpu_sif: Path) -> None:
    code = "import os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    inside = ("apptainer", "-s", "exec", "--cleanenv", str(serve_cpu_sif), "python3", "-c", code)
    assert cluster.run("alice", *inside).stdout == "1\n"
