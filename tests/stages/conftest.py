"""What the stages' tests share: a tiny model made here, and a run of one stage through the real runner."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hpc.core import config as configs
from hpc.core import stage as stages
from hpc.inside import runner

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ("brick", "beam", "roof", "floor", "permit", "shed", "wall", "door")


@dataclass(frozen=True)
class Result:
    """What a run of one stage left behind."""

    code: int
    folder: Path
    error: dict[str, Any]
    """error.json of the attempt; empty where there was no error."""

    @property
    def metrics(self) -> dict[str, Any]:
        document = json.loads((self.folder / "manifest.json").read_text())
        metrics: dict[str, Any] = document["metrics"]
        return metrics

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "attempt-1" / "events.jsonl").open()]

    def out(self, name: str) -> Path:
        return self.folder / "out" / name


RunStage = Callable[..., Result]


@pytest.fixture
def run_stage(tmp_path: Path) -> Iterator[RunStage]:
    """One stage through hpc.inside.runner.main: its name, its inputs, the run's `folder`, and its config."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}

    def run(name: str, inputs: Mapping[str, object] | None = None, *, folder: str = "run", **config: Any) -> Result:
        stage = stages.load(name)
        made = stage.config(**config)
        here = tmp_path / folder / name
        attempt = here / "attempt-1"
        attempt.mkdir(parents=True, exist_ok=True)
        (attempt / "error.json").unlink(missing_ok=True)
        document = {
            "stage": name,
            "key": "0",
            "config": configs.encode(made),
            "inputs": {key: {"path": str(value)} for key, value in (inputs or {}).items()},
            "outputs": {
                key: {"kind": value.kind, "path": str(here / "out" / value.path)}
                for key, value in stage.outputs(made).items()
            },
            "environment": {},
            "cache": str(tmp_path / "cache"),
        }
        (here / "config.json").write_text(json.dumps(document))
        code = runner.main([name, str(here / "config.json"), str(attempt)])
        error = attempt / "error.json"
        return Result(code, here, json.loads(error.read_text()) if error.exists() else {})

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let the scheduler's signal arrive once the given step of a training was told."""

    def arm(step: int) -> None:
        told = runner.RunContext.progress

        def progress(self: Any, done: float, total: float, message: str = "", **figures: float) -> None:
            told(self, done, total, message, **figures)
            if message == "training" and done == step:
                os.kill(os.getpid(), signal.SIGUSR2)

        monkeypatch.setattr(runner.RunContext, "progress", progress)

    return arm


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two small layers, and a byte-level tokenizer with a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    special = ["<|im_start|>", "<|im_end|>"]
    letters = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": special[:1]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(letters), **shape, eos_token_id=1, bos_token_id=0, max_position_embeddings=256)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 short conversations to train on and 4 held out."""
    folder = tmp_path_factory.mktemp("dataset")
    for name, count, seed in (("train", 24, 0), ("eval", 4, 3)):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for i in range(count):
                word = WORDS[(i + seed) % len(WORDS)]
                turns = (
                    {"role": "user", "content": f"{word}\u2028{i}?"},
                    {"role": "assistant", "content": f"A {word}."},
                )
                file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    return folder
