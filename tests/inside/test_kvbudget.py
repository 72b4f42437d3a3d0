"""The KV cache's tokens follow from the job's memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpc.core import shape
from hpc.core.errors import HpcError, VerificationFailed
from hpc.inside import kvbudget

GIB = 1 << 30


def engine(folder: Path) -> Path:
    """Llama-2-7B's cache, with nearly no weights: 1 MiB per token in float32."""
    decoder = {"num_hidden_layers": 32, "num_key_value_heads": 32, "head_size": 128}
    (folder / "genai_config.json").write_text(json.dumps({"model": {"decoder": decoder}}))
    (folder / "model.onnx.data").write_bytes(bytes(1 << 20))
    return folder


def test_tokens_of_what_engine_and_server_leave(tmp_path: Path) -> None:
    found = kvbudget.tokens(engine(tmp_path), 0.5, 3 * GIB)
    assert found == int((2 * 1024 - 1.5) * 0.5)


@pytest.mark.parametrize(
    ("tied", "quantization", "measured"),
    [
        (False, "none", 312_014_365),
        (False, "int4", 104_551_244),
        (True, "none", 246_478_388),
        (True, "int4", 39_015_677),
    ],
)
def test_the_size_of_an_engine_is_that_of_what_the_builder_wrote(tied: bool, quantization: str, measured: int) -> None:
    model = shape.read({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 1024, "num_attention_heads": 16,
        "num_key_value_heads": 4, "num_hidden_layers": 4, "intermediate_size": 2816, "vocab_size": 16000,
        "tie_word_embeddings": tied,
    })  # fmt: skip
    assert model is not None
    assert kvbudget.expected(model, quantization)[0] == pytest.approx(measured, rel=0.01)


def test_what_is_asked_for_has_room_for_so_many_tokens(tmp_path: Path) -> None:
    """The shape is that of the engine whose files are measured here, so both must agree."""
    llama = shape.read({
        "hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "intermediate_size": 11008,
        "vocab_size": 32000,
    })  # fmt: skip
    assert llama is not None
    assert kvbudget.sizes(engine(tmp_path)) == (1 << 20, kvbudget.expected(llama, "none")[1])
    memory = kvbudget.enough(1 << 20, llama.kv_bytes(4), 5000, 0.9) * GIB
    assert 5000 <= kvbudget.tokens(tmp_path, 0.9, memory) < 5000 + 1024
    with pytest.raises(HpcError):
        kvbudget.tokens(tmp_path, 0.9, int(kvbudget.least(1 << 20) * GIB))


def test_too_little_memory_is_told_with_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(HpcError, match=r"1\.0 GiB of memory do not suffice") as told:
        kvbudget.tokens(engine(tmp_path), 0.9, GIB)
    assert "2 GiB or more: serve.resources.mem_gb" in (told.value.hint or "")


def test_the_least_limit_counts(tmp_path: Path) -> None:
    none = tmp_path / "none"
    free = kvbudget.of_job({}, none)
    assert free > 0
    assert kvbudget.of_job({"SLURM_MEM_PER_NODE": "64"}, none) == 64 << 20
    assert kvbudget.of_job({"SLURM_MEM_PER_CPU": "8", "SLURM_CPUS_ON_NODE": "4"}, none) == 32 << 20
    assert kvbudget.of_job({"SLURM_MEM_PER_NODE": "0"}, none) == pytest.approx(free, rel=0.5)


def test_a_folder_that_tells_no_sizes_is_no_traceback(tmp_path: Path) -> None:
    with pytest.raises(VerificationFailed, match=r"no whole genai_config\.json"):
        kvbudget.sizes(tmp_path)
