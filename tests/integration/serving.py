"""A tiny model with a Korean tongue, its engine made by the real builder, and a served one to ask."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cluster import Cluster
from .project import Project

MODEL = """
import copy, json
from pathlib import Path
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)  # two wait for each other where the machine is busy
special = {"<s>": 0, "</s>": 1, "<|user|>": 2, "<|assistant|>": 3}
letters = {c: i + len(special) for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
tokenizer = Tokenizer(models.BPE(vocab={**special, **letters}, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.add_special_tokens(list(special))
saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
saved.chat_template = (
    "{{ bos_token }}{% for m in messages %}{% if m.role not in ('user', 'assistant') %}"
    "{{ raise_exception('no role ' + m.role) }}{% endif %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
)
saved.save_pretrained("hf")
torch.manual_seed(0)
torch.set_num_threads(1)  # it is small: two would wait for each other, the more the busier the machine is
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=260, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=0, eos_token_id=1,
))
# it learns one answer by heart: every character of it has two to four bytes, and every byte is a token
text = "안녕하세요 🙂 반갑습니다! <think>음…</think> naïve 끝"
asked = [0, 2, *tokenizer.encode("인사").ids, 3]
line = torch.tensor([[*asked, *tokenizer.encode(text).ids, 1]])
labels = line.clone()
labels[:, :len(asked)] = -100
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(600):
    loss = model(input_ids=line, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if loss.item() < 0.001:
        break
print(step, loss.item())
# 78 tokens of 0.999 each are not always the same answer where they are drawn at 1
model.generation_config.update(do_sample=True, temperature=0.1)
model.eval().save_pretrained("hf")
# what transformers itself says to something that it has not learned
start = tokenizer.encode("<|user|>naïve 인사<|assistant|>").ids
with torch.no_grad():
    said = model.generate(torch.tensor([start]), max_new_tokens=48, min_new_tokens=48, do_sample=False)
tokens = said[0, len(start):].tolist()
json.dump({"tokens": len(tokens), "text": tokenizer.decode(tokens)}, open("greedy.json", "w"))

# two LoRA adapters, and what the model says with each of them merged into it
said = {}
targets = {"first": ("q_proj", "v_proj"), "second": ("k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")}
for number, (name, places) in enumerate(targets.items()):
    torch.manual_seed(number)
    changed, weights, rank = copy.deepcopy(model), {}, 4 + number
    for place, matrix in changed.named_modules():
        if place.endswith(places):
            a, b = torch.randn(rank, matrix.in_features) * 0.3, torch.randn(matrix.out_features, rank) * 0.3
            weights |= {f"base_model.model.{place}.lora_{side}.weight": x for side, x in (("A", a), ("B", b))}
            matrix.weight.data += 2 * b @ a
    folder = Path("adapters", name)
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    new = changed.generate(torch.tensor([asked]), max_new_tokens=40, do_sample=False)[0][len(asked):]
    said[name] = tokenizer.decode(new.tolist(), skip_special_tokens=True)
Path("adapters", "said.json").write_text(json.dumps(said))
"""
TEXT = "안녕하세요 🙂 반갑습니다! <think>음…</think> naïve 끝"
QUESTION = "인사"
PROMPT = f"<s><|user|>{QUESTION}<|assistant|>"
GRPCING = (Path(__file__).parents[1] / "support" / "grpcing.py").read_text()


def make_model(cluster: Cluster, image: Path, folder: Path) -> Path:
    """folder/hf, and its adapters beside it, made as alice in the image: once for all files of tests."""
    kept = cluster.dir / f"made-{hashlib.sha256(MODEL.encode()).hexdigest()[:12]}"
    with cluster.alone("made"):
        if not kept.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "model.py").write_text(MODEL)
            for path in (folder, folder / "model.py"):
                shutil.chown(path, "alice", "alice")
            inside = ("srun", "-c2", "apptainer", "-s", "exec", str(image), "python3")
            cluster.run("alice", *inside, "model.py", cwd=folder, timeout=300)
            shutil.copytree(folder, kept.with_suffix(".part"), dirs_exist_ok=True)
            kept.with_suffix(".part").rename(kept)
    shutil.copytree(kept, folder, dirs_exist_ok=True)
    for path in (folder, *folder.rglob("*")):
        shutil.chown(path, "alice", "alice")
    return folder / "hf"


@dataclass(frozen=True)
class Served:
    """One submitted service that answers."""

    project: Project
    run: str
    node: str
    ports: Mapping[str, int]

    @property
    def port(self) -> int:
        return self.ports["http"]

    @property
    def folder(self) -> Path:
        return self.project.folder / "runs" / self.run / "serve"

    @property
    def token(self) -> str:
        return (self.folder / "token").read_text()

    @property
    def url(self) -> str:
        return f"http://{self.node}:{self.port}"

    def engine(self) -> list[int]:
        """The processes in which the engine computes."""
        ps = ("ps", "-u", "alice", "-o", "pid=,args=", "-ww")
        rows = self.project.cluster.run("alice", *ps).stdout.splitlines()
        return [int(row.split()[0]) for row in rows if f"{self.folder}/repository/tensorrt_llm/1/model.py" in row]

    def ask(
        self, path: str, words: Mapping[str, Any] | None = None, *, user: str = "alice", token: str | None = None,
        node: str = "login", url: str | None = None, more: tuple[str, ...] = (),
    ) -> tuple[int, str]:  # fmt: skip
        """(status code, body) as curl on the login node gets them; 0 where nothing answers."""
        token = self.token if token is None else token
        config = f'header = "Authorization: Bearer {token}"\n' if token else ""
        if words is not None:
            config += 'header = "Content-Type: application/json"\n'
            config += f"data = {json.dumps(json.dumps(words))}\n"
        done = self.project.cluster.run(
            user, "curl", "-sN", "--max-time", "60", "-K", "-", "-w", "\n%{http_code}", *more,
            (url or self.url) + path, node=node, check=False, input=config, timeout=90,
        )  # fmt: skip
        body, _, code = done.stdout.rpartition("\n")
        return int(code or 0), body

    def grpc(
        self, what: str, image: Path, *, user: str = "alice", node: str = "login", token: str | None = None,
        host: str = "", port: int = 0,
    ) -> subprocess.Popen[str]:  # fmt: skip
        """One of tests/support/grpcing.py, which runs in the image with Triton's own client."""
        inside = ("apptainer", "-s", "exec", str(image), "timeout", "90", "python3", "-c", GRPCING)
        pipe = subprocess.PIPE
        process = self.project.cluster.popen(
            user, *inside, f"{host or self.node}:{port or self.ports['grpc']}", what, PROMPT, node=node,
            stdin=pipe, stdout=pipe, stderr=pipe,
        )  # fmt: skip
        assert process.stdin is not None
        process.stdin.write((self.token if token is None else token) + "\n")
        process.stdin.flush()
        return process


def said(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The document that a program ends with."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    document: dict[str, Any] = json.loads(out.splitlines()[-1])
    return document


def events(body: str) -> list[dict[str, Any]]:
    """The JSON of a stream of server-sent events."""
    return [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
