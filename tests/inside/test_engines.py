"""convert and build against a STUB of TensorRT-LLM (tests/support/trtllm_stub.py): ranks, GPUs, flags, passport."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hpc.core import passport
from hpc.core import stage as stages
from hpc.core.errors import HpcError, Refused, VerificationFailed
from tests.core.test_shape import LLAMA_7B
from tests.support import trtllm_stub

BUILD, CONVERT = stages.load("build"), stages.load("convert")


@dataclass
class Ctx:
    """The Context of one stage in a folder of its own."""

    folder: Path
    inputs: dict[str, str]
    output: str
    metrics: dict[str, Any] = field(default_factory=dict)
    stop: bool = False

    def __post_init__(self) -> None:
        (self.folder / "out").mkdir(parents=True)
        keys = {name: {"kind": "x", "path": path, "key": f"key-of-{name}"} for name, path in self.inputs.items()}
        document = {"inputs": keys, "environment": {"digest": "image-1"}}
        (self.folder / "config.json").write_text(json.dumps(document))

    @property
    def outputs(self) -> Mapping[str, Path]:
        return {self.output: self.folder / "out" / self.output}

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    checkpoints = cache
    bind = ""

    def progress(self, done: float, total: float, message: str = "", **metrics: float) -> None: ...

    def event(self, phase: str, **values: Any) -> None: ...

    def metric(self, **values: Any) -> None:
        self.metrics.update(values)

    def stopping(self) -> bool:
        return self.stop


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image with the stub, as TensorRT-LLM 1.2.1, on a node with eight A100."""
    return install(tmp_path / "image", monkeypatch)


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, version: str = "1.2.1") -> Path:
    before = list(sys.path)
    examples = trtllm_stub.install(folder, version)
    monkeypatch.setattr(sys, "path", [str(folder / "site-packages"), *before])
    for name, value in {
        "PATH": f"{folder / 'bin'}:/usr/bin:/bin",
        "HPC_TRTLLM_EXAMPLES": str(examples),
        "PYTHONPATH": str(folder / "site-packages"),
        "CUDA_VISIBLE_DEVICES": "0,1,2,3",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("hpc.inside.engines._EVERY_S", 0.01)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_7B))
    (folder / "model.safetensors").write_text("weights")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def convert(model: Path, where: Path, **config: Any) -> Ctx:
    dataset = config.pop("dataset", None)
    inputs = {"model": str(model), **({"dataset": str(dataset)} if dataset else {})}
    ctx = Ctx(where, inputs, "checkpoint")
    CONVERT.run(CONVERT.config(engine="tensorrt_llm", **config), ctx)
    return ctx


def build(checkpoint: Path, where: Path, **config: Any) -> Ctx:
    ctx = Ctx(where, {"checkpoint": str(checkpoint)}, "engine")
    BUILD.run(BUILD.config(engine="tensorrt_llm", **config), ctx)
    return ctx


def test_a_model_becomes_one_engine_per_rank_with_a_passport(image: Path, model: Path, tmp_path: Path) -> None:
    converted = convert(model, tmp_path / "convert", tp_size=2, pp_size=2, dtype="bfloat16")
    made = build(converted.outputs["checkpoint"], tmp_path / "build", tp_size=2, pp_size=2, max_seq_len=2048)
    engine = made.outputs["engine"]
    ranks = [json.loads((engine / f"rank{r}.engine").read_text()) for r in range(4)]
    assert [(r["rank"], r["gpu"]) for r in ranks] == [(0, "0"), (1, "1"), (2, "2"), (3, "3")], "one GPU each"
    assert (engine / "tokenizer.json").is_file(), "the engine can be served by itself"
    assert passport.read(engine) == passport.Passport(
        engine="tensorrt_llm", model="key-of-model", architecture="LlamaForCausalLM", image="image-1",
        versions={"tensorrt-llm": "1.2.1", "tensorrt": "10.14.1.48"}, gpu="NVIDIA A100-SXM4-80GB", compute="8.0",
        tp_size=2, pp_size=2, dtype="bfloat16", max_batch_size=64, max_input_len=2048, max_seq_len=2048,
    )  # fmt: skip


def test_more_ranks_than_gpus_are_built_one_after_another(
    image: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    converted = convert(model, tmp_path / "convert", tp_size=4)
    made = build(converted.outputs["checkpoint"], tmp_path / "build", tp_size=4)
    gpus = [json.loads((made.outputs["engine"] / f"rank{r}.engine").read_text())["gpu"] for r in range(4)]
    assert gpus == ["4", "5", "4", "5"]
    assert "--workers 2" in " ".join(made.metrics["argv"])


@pytest.mark.parametrize("version", ["0.16.0", "0.18.2", "1.0.0", "1.2.1"])
def test_every_release_of_the_table(version: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "image", monkeypatch, version)
    converted = convert(model, tmp_path / "convert", dtype="auto")
    assert converted.metrics["argv"][converted.metrics["argv"].index("--dtype") + 1] == (
        "float16" if version == "0.16.0" else "auto"
    )
    made = build(converted.outputs["checkpoint"], tmp_path / "build")
    assert passport.read(made.outputs["engine"]).versions["tensorrt-llm"] == version


@pytest.mark.parametrize(
    ("config", "quantization", "cache"),
    [
        ({"quantization": "int8"}, "int8", "auto"),
        ({"quantization": "int4"}, "int4", "auto"),
        ({"quantization": "int4_awq"}, "int4_awq", "auto"),
        ({"quantization": "int8_sq"}, "int8_sq", "auto"),
        ({"quantization": "int4_awq", "kv_cache": "int8"}, "int4_awq", "int8"),
        ({"quantization": "fp8", "kv_cache": "fp8"}, "fp8", "fp8"),
        ({"kv_cache": "int8"}, "none", "int8"),
    ],
)
def test_precisions(
    image: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    config: dict[str, Any], quantization: str, cache: str,
) -> None:  # fmt: skip
    class Words:
        def apply_chat_template(self, messages: list[dict[str, str]], *, tokenize: bool) -> str:
            return " ".join(m["content"] for m in messages)

    monkeypatch.setattr("hpc.inside.models.tokenizer", lambda folder: Words())
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "안녕\u2028?"}]}) + "\n")
    converted = convert(model, tmp_path / "convert", dataset=data, dtype="float16", **config)
    assert not list(converted.folder.rglob(".calibration*")), "the texts are gone again"
    made = build(converted.outputs["checkpoint"], tmp_path / "build", **config)
    found = passport.read(made.outputs["engine"])
    assert (found.quantization, found.kv_cache) == (quantization, cache)


def test_a_missing_rank_is_found(image: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_RANKS", "1")
    with pytest.raises(VerificationFailed, match="TP2 × PP1 needs 2 ranks"):
        convert(model, tmp_path / "convert", tp_size=2)
    assert not (tmp_path / "convert" / "out" / "checkpoint").exists(), "nothing half done is left"


def test_a_flag_that_the_image_lacks_is_told_before_the_work(
    image: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB_WITHOUT_FLAG", "--use_weight_only")
    with pytest.raises(HpcError, match=r"convert_checkpoint\.py of TensorRT-LLM 1\.2\.1 has no --use_weight_only"):
        convert(model, tmp_path / "convert", quantization="int8")


def test_a_failed_build_says_the_programs_last_words(
    image: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted = convert(model, tmp_path / "convert", tp_size=2)
    monkeypatch.setenv("STUB_FAILS_AT", "1")
    with pytest.raises(HpcError, match=r"trtllm-build failed: .*rank 1: out of GPU memory"):
        build(converted.outputs["checkpoint"], tmp_path / "build", tp_size=2)
    assert list((tmp_path / "build" / "out").iterdir()) == []


def test_checkpoints_for_another_division_are_not_built(image: Path, model: Path, tmp_path: Path) -> None:
    converted = convert(model, tmp_path / "convert", tp_size=2)
    with pytest.raises(VerificationFailed, match="for TP2 × PP1, and build asks for TP1 × PP1"):
        build(converted.outputs["checkpoint"], tmp_path / "build")


def test_checkpoints_of_another_release_are_not_built(
    image: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted = convert(model, tmp_path / "convert")
    install(tmp_path / "other", monkeypatch, "1.0.0")
    with pytest.raises(VerificationFailed, match=r"made by TensorRT-LLM 1\.2\.1, and this image has 1\.0\.0"):
        build(converted.outputs["checkpoint"], tmp_path / "build")


def test_an_image_without_engines_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "image", monkeypatch, "1.3.0")
    with pytest.raises(Refused, match=r"1\.3\.0 builds no engines"):
        convert(model, tmp_path / "convert")


def test_gpus_of_two_kinds_are_refused(
    image: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted = convert(model, tmp_path / "convert", tp_size=2)
    monkeypatch.setenv("STUB_GPUS", "NVIDIA A100, 8.0;NVIDIA H100, 9.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(HpcError, match="not of one kind"):
        build(converted.outputs["checkpoint"], tmp_path / "build", tp_size=2)


def test_a_stage_that_is_asked_to_stop_ends_its_program(
    image: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted = convert(model, tmp_path / "convert")
    monkeypatch.setenv("STUB_SECONDS", "60")
    ctx = Ctx(tmp_path / "build", {"checkpoint": str(converted.outputs["checkpoint"])}, "engine", stop=True)
    with pytest.raises(HpcError, match="ended by the scheduler"):
        BUILD.run(BUILD.config(engine="tensorrt_llm"), ctx)
    assert list((tmp_path / "build" / "out").iterdir()) == []


def test_a_model_whose_shape_planning_could_not_see_is_judged_now(image: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="32 attention heads"):
        convert(model, tmp_path / "convert", tp_size=3)


@pytest.mark.train
def test_adapters_lie_beside_the_engine(image: Path, model: Path, tmp_path: Path) -> None:
    import numpy as np
    import torch
    from safetensors.torch import save_file

    from hpc.inside import lorarrays

    entries = []
    for name, rank, matrix in (("stars", 4, "q_proj"), ("law", 6, "o_proj")):
        folder = tmp_path / name
        folder.mkdir()
        place = f"base_model.model.model.layers.3.self_attn.{matrix}"
        save_file(
            {f"{place}.lora_A.weight": torch.ones(rank, 4096), f"{place}.lora_B.weight": torch.ones(4096, rank)},
            folder / "adapter_model.safetensors",
        )
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 2}))
        entries.append(f"{name}={folder}")
    converted = convert(model, tmp_path / "convert", dtype="float16")
    made = build(converted.outputs["checkpoint"], tmp_path / "build", lora=tuple(entries))
    assert "--lora_plugin auto --max_lora_rank 6 --lora_target_modules attn_q attn_dense" in " ".join(
        made.metrics["argv"]
    )
    engine = made.outputs["engine"]
    found = passport.read(engine)
    assert (found.max_lora_rank, {name: one["task"] for name, one in found.adapters.items()}) == (
        6, {"stars": 1, "law": 2},
    )  # fmt: skip
    lorarrays.verify(engine, found)
    config = np.load(engine / "adapters" / "2" / "model.lora_config.npy")
    assert config.tolist() == [[[4, 3, 6]]]
    weights = np.load(engine / "adapters" / "2" / "model.lora_weights.npy")
    assert (weights.shape, weights.dtype) == ((1, 1, 2 * 6 * 4096), np.float16)
    assert set(np.unique(weights)) == {np.float16(1), np.float16(2 / 6)}
    brain = convert(model, tmp_path / "convert2", dtype="bfloat16")
    with pytest.raises(Refused, match="bfloat16 engine"):
        build(brain.outputs["checkpoint"], tmp_path / "build2", lora=tuple(entries))
