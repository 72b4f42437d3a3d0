"""Adapters for TensorRT-LLM: refused before the queue, or arrays that say what peft says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpc.core import passport, shape
from hpc.core.errors import HpcError, Refused, UsageError, VerificationFailed
from hpc.core.passport import Passport
from hpc.inside import lorarrays, loras, pbtxt, repository
from stages.build import BuildConfig

MODEL = shape.read({
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 260, "torch_dtype": "float16",
})  # fmt: skip
assert MODEL is not None
WIDTHS = {"q_proj": (64, 64), "k_proj": (64, 32), "v_proj": (64, 32), "up_proj": (64, 96), "down_proj": (96, 64)}


def adapter(folder: Path, ranks: Mapping[str, int], *, layer: int = 0, widths: Mapping[str, Any] = WIDTHS) -> str:
    """A file with such matrices, all zeros, written by the format's own rules."""
    folder.mkdir()
    header, at = {}, 0
    for place, rank in ranks.items():
        width, out = widths.get(place.split(".")[-1], (64, 64))
        part = "mlp" if place in ("up_proj", "down_proj") else "self_attn"
        where = place if "." in place else f"model.layers.{layer}.{part}.{place}"
        for side, sizes in (("A", [rank, width]), ("B", [out, rank])):
            end = at + 4 * sizes[0] * sizes[1]
            key = f"base_model.model.{where}.lora_{side}.weight"
            header[key] = {"dtype": "F32", "shape": sizes, "data_offsets": [at, end]}
            at = end
    text = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(at))
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16}))
    return str(folder)


def judged(config: BuildConfig, architecture: str = "LlamaForCausalLM") -> str:
    return lorarrays.judge(config, lorarrays.read_sizes(config), architecture, MODEL)


def build(*folders: str, **more: Any) -> BuildConfig:
    named = tuple(f"{Path(folder).name}={folder}" for folder in folders)
    return BuildConfig(engine="tensorrt_llm", lora=named, **{"dtype": "float16", **more})


def test_rank_and_modules_follow_from_the_adapters(tmp_path: Path) -> None:
    first = adapter(tmp_path / "first", {"v_proj": 4, "q_proj": 8})
    second = adapter(tmp_path / "second", {"up_proj": 2, "down_proj": 16}, layer=1)
    config = build(first, second)
    assert lorarrays.limits(config, lorarrays.read_sizes(config)) == (
        16, ("attn_q", "attn_v", "mlp_4h_to_h", "mlp_gate"),
    )  # fmt: skip
    assert "first, second: ranks up to 16" in judged(config)
    given = build(first, max_lora_rank=32, lora_modules=("attn_v", "attn_q", "attn_k"))
    assert lorarrays.limits(given, lorarrays.read_sizes(given)) == (32, ("attn_v", "attn_q", "attn_k"))
    assert lorarrays.limits(build(), []) == (0, lorarrays.USUAL)


@pytest.mark.parametrize(
    ("ranks", "settings", "told"),
    [
        ({"q_proj": 16}, {"max_lora_rank": 8}, "rank 16, and build.max_lora_rank is 8"),
        ({"up_proj": 8}, {"lora_modules": ("attn_q",)}, "changes mlp_gate, which build.lora_modules lacks"),
        ({"model.embed_tokens": 8}, {}, "takes from no request"),
        ({"model.layers.0.self_attn.qkv_proj": 8}, {}, "takes from no request"),
        ({"q_proj": 8}, {"quantization": "int8_sq"}, "quantised by int8_sq"),
        ({"q_proj": 8}, {"quantization": "nvfp4"}, "quantised by nvfp4"),
        ({"q_proj": 8}, {"dtype": "bfloat16"}, "bfloat16 engine"),
        ({"k_proj": 8}, {"tp_size": 4}, "more than the model's 2 KV heads"),
        ({}, {}, "changes nothing"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, ranks: dict[str, int], settings: Any, told: str) -> None:
    with pytest.raises(Refused, match=told) as refused:
        judged(build(adapter(tmp_path / "a", ranks), **settings))
    assert refused.value.hint
    assert refused.value.exit_code == 3


def test_queries_alone_may_be_divided_further_than_kv_heads(tmp_path: Path) -> None:
    judged(build(adapter(tmp_path / "a", {"q_proj": 8}), tp_size=4))
    for quantization in ("int8", "int4", "int4_awq", "fp8"):
        judged(build(adapter(tmp_path / quantization, {"q_proj": 8}), quantization=quantization))


@pytest.mark.parametrize(("layer", "width"), [(2, 64), (0, 128)])
def test_an_adapter_of_another_model_is_refused(tmp_path: Path, layer: int, width: int) -> None:
    other = adapter(tmp_path / "a", {"q_proj": 8}, layer=layer, widths={"q_proj": (width, 64)})
    with pytest.raises(Refused, match=f"of another model: its q_proj of layer {layer} is {width} × 64"):
        judged(build(other))


def test_an_unknown_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="Gemma2ForCausalLM"):
        judged(build(adapter(tmp_path / "a", {"q_proj": 8})), "Gemma2ForCausalLM")


def test_llmapi_builds_no_adapters(tmp_path: Path) -> None:
    from stages import build as stage

    with pytest.raises(UsageError, match="llmapi builds nothing"):
        stage.check(replace(build(adapter(tmp_path / "a", {"q_proj": 8})), engine="llmapi"))


def engine(folder: Path) -> Passport:
    """One with an adapter whose arrays are two files of bytes."""
    place = folder / lorarrays.FOLDER / "1"
    place.mkdir(parents=True)
    (place / lorarrays.WEIGHTS).write_bytes(b"w")
    (place / lorarrays.CONFIG).write_bytes(b"c")
    return Passport(
        engine="tensorrt_llm", model="m", architecture="LlamaForCausalLM", image="i", dtype="float16", max_lora_rank=64,
        max_batch_size=1, max_input_len=1, max_seq_len=1,
        adapters={"stars": {"task": 1, "rank": 16, "digest": lorarrays._digest(place), "bytes": 1 << 30}},
    )  # fmt: skip


def test_an_adapter_that_was_changed_is_not_served(tmp_path: Path) -> None:
    built = engine(tmp_path)
    passport.write(tmp_path, built)
    assert passport.read(tmp_path) == built
    lorarrays.verify(tmp_path, built)
    weights = tmp_path / lorarrays.FOLDER / "1" / lorarrays.WEIGHTS
    weights.write_bytes(b"x")
    with pytest.raises(VerificationFailed, match="adapter stars is not the one"):
        lorarrays.verify(tmp_path, built)
    weights.unlink()
    with pytest.raises(VerificationFailed, match="adapter stars cannot be read"):
        lorarrays.verify(tmp_path, built)


def test_the_servers_cache_holds_all_adapters(tmp_path: Path) -> None:
    found = lorarrays.settings(engine(tmp_path), 0.1)
    assert json.loads(found["adapters"]) == {"stars": 1}
    assert (found["lora_cache_optimal_adapter_size"], found["lora_cache_max_adapter_size"]) == (16, 64)
    assert (found["lora_cache_host_memory_bytes"], found["lora_cache_gpu_memory_fraction"]) == (4 << 30, 0.1)
    assert found["lora_data_type"] == "TYPE_FP16"


def test_the_server_lists_them_and_tells_the_model_their_tasks(tmp_path: Path) -> None:
    from stages import serve

    passport.write(tmp_path, engine(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    config = serve.ServeConfig(engine="tensorrt_llm", lora_cache_fraction=0.2)
    assert serve._adapters(config, tmp_path) == {"stars": {"lora_name": "stars"}}
    with pytest.raises(UsageError, match="adapter stars, which is the model's own name"):
        serve._adapters(replace(config, name="stars"), tmp_path)
    serve.make_repository(config, tmp_path, tmp_path / "repository")
    backend = pbtxt.parse((tmp_path / "repository" / "tensorrt_llm" / "config.pbtxt").read_text())
    bls = pbtxt.parse((tmp_path / "repository" / "tensorrt_llm_bls" / "config.pbtxt").read_text())
    names = ("optimal_adapter_size", "max_adapter_size", "gpu_memory_fraction", "host_memory_bytes")
    found = [repository.parameter(backend, f"lora_cache_{name}") for name in names]
    assert found == ["16", "64", "0.2", str(4 << 30)]
    assert repository.parameter(bls, "adapters") == '{"stars": 1}'
    assert repository.parameter(bls, "engine_dir") == str(tmp_path)
    assert repository.parameter(bls, "max_seq_len") == "1", "the engine's, which it cuts answers at"
    ensemble = (tmp_path / "repository" / "ensemble" / "config.pbtxt").read_text()
    assert "lora_name" not in ensemble, "it cannot ask twice"
    with pytest.raises(HpcError, match="takes no adapters by name"):
        serve.make_repository(replace(config, vendor_repository="/app"), tmp_path, tmp_path / "repository")


@pytest.mark.train
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear", "rank_pattern": {"k_proj": 2, "mlp.down_proj": 7}},
        {"target_modules": "all-linear", "use_rslora": True, "alpha_pattern": {"o_proj": 3}},
    ],
    ids=["plain", "ranks", "rslora"],
)
def test_the_arrays_say_what_peft_says(tmp_path: Path, settings: dict[str, Any]) -> None:
    """y + B(Ax), with A and B taken out of the rows as the documents say, against peft's own forward."""
    import numpy as np
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=260, num_key_value_heads=2, **sizes)).eval()
    tuned: Any = get_peft_model(base, LoraConfig(r=4, lora_alpha=12, task_type="CAUSAL_LM", **settings)).eval()
    for name, weights in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.2)
    tuned.save_pretrained(tmp_path)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        right, alone = tuned(tokens).logits, tuned.unload()(tokens).logits

    weights, config = lorarrays.arrays(loras.read("a", tmp_path), "float32")
    assert (weights.dtype, config.dtype, config.shape) == (np.float32, np.int32, (1, weights.shape[1], 3))
    order = [(int(layer), int(module)) for module, layer, _ in config[0]]
    assert order == sorted(order)
    matrices = {number: matrix for matrix, (_, number) in lorarrays.MODULES.items()}
    for row, (module, layer, rank) in zip(weights[0], config[0].tolist(), strict=True):
        part = base.model.layers[layer].self_attn if module < 5 else base.model.layers[layer].mlp
        linear = getattr(part, matrices[module])
        middle = rank * linear.in_features
        end = middle + rank * linear.out_features
        a = torch.tensor(row[:middle]).reshape(rank, linear.in_features)
        b = torch.tensor(row[middle:end]).reshape(linear.out_features, rank)
        assert not row[end:].any(), "filled up with zeros"
        linear.register_forward_hook(lambda _, given, said, a=a, b=b: said + given[0] @ a.T @ b.T)
    with torch.no_grad():
        found = base(tokens).logits
    assert (right - alone).abs().max() > 0.1
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)

    told = lorarrays.write(tmp_path / "engine", {"a": str(tmp_path)}, "float16", 8)
    kept = np.load(tmp_path / "engine" / lorarrays.FOLDER / "1" / lorarrays.WEIGHTS)
    assert kept.dtype == np.float16
    assert np.allclose(kept, weights, rtol=1e-3, atol=1e-4)
    assert told["a"]["rank"] == config[0, :, 2].max() == lorarrays.sizes("a", tmp_path).rank


@pytest.mark.train
def test_values_that_float16_cannot_hold_are_told() -> None:
    import numpy as np

    large = loras.Adapter("a", {("0", "self_attn", "q_proj"): (np.ones((4, 2)), np.full((2, 4), 1e6))})
    with pytest.raises(VerificationFailed, match="float16 cannot hold"):
        lorarrays.arrays(large, "float16")
