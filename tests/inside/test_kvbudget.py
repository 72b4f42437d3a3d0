"""The KV cache's tokens follow from the job's memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpc.core.errors import HpcError
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
