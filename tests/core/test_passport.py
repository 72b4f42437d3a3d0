"""An engine's passport: written, read, and compared with the place where it would be served."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpc.core import passport
from hpc.core.errors import VerificationFailed
from hpc.core.passport import Passport

TENSORRT = Passport(
    engine="tensorrt_llm", model="model-1", architecture="LlamaForCausalLM", image="image-1",
    versions={"tensorrt-llm": "1.2.1", "tensorrt": "10.14.1.48"}, gpu="NVIDIA A100-SXM4-80GB", compute="8.0",
    tp_size=2, pp_size=2, dtype="bfloat16", max_batch_size=64, max_input_len=2048, max_seq_len=4096,
)  # fmt: skip
ONNX = replace(
    TENSORRT, engine="onnxruntime_genai", versions={"onnxruntime-genai": "0.18.0"},
    gpu="", compute="", tp_size=1, pp_size=1, dtype="float32",
)  # fmt: skip


def test_what_is_written_is_read(tmp_path: Path) -> None:
    passport.write(tmp_path, TENSORRT)
    assert passport.read(tmp_path) == TENSORRT


def test_ranks() -> None:
    assert (TENSORRT.gpus, ONNX.gpus) == (4, 0)


@pytest.mark.parametrize("text", [None, "", "{}", '{"schema": "hpc.passport/1"}', '{"schema": "other/1"}'])
def test_a_folder_without_a_good_passport_is_no_engine(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / passport.FILE).write_text(text)
    with pytest.raises(VerificationFailed) as caught:
        passport.read(tmp_path)
    assert caught.value.exit_code == 6
    assert caught.value.hint


def test_fields_of_a_later_version_are_passed_over(tmp_path: Path) -> None:
    passport.write(tmp_path, TENSORRT)
    file = tmp_path / passport.FILE
    file.write_text(file.read_text().replace('"engine"', '"later": 1, "engine"'))
    assert passport.read(tmp_path) == TENSORRT


HERE: dict[str, Any] = {"image": "image-2", "versions": TENSORRT.versions, "compute": "8.0", "model": "model-1"}


def test_the_same_place_serves_it() -> None:
    passport.refuse(TENSORRT, **HERE)
    passport.refuse(TENSORRT, **{**HERE, "image": "image-1", "versions": {}})
    passport.refuse(TENSORRT, image="image-1", versions={})
    passport.refuse(ONNX, **{**HERE, "compute": "", "versions": {"onnxruntime-genai": "0.18.1"}})
    passport.refuse(ONNX, image="image-2", versions={})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "model-2"}, "another model"),
        ({"compute": "9.0"}, "compute capability 9.0"),
        ({"compute": ""}, "a CPU"),
        ({"versions": {"tensorrt-llm": "1.2.0", "tensorrt": "10.14.1.48"}}, "1.2.1, and the image has 1.2.0"),
        ({"versions": {"tensorrt-llm": "1.2.1", "tensorrt": "10.13.3.9"}}, "tensorrt 10.14.1.48"),
        ({"versions": {}}, "not known"),
    ],
)
def test_another_place_does_not(change: dict[str, Any], said: str) -> None:
    with pytest.raises(VerificationFailed) as caught:
        passport.refuse(TENSORRT, **{**HERE, **change})
    assert said in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == 6


def test_an_older_runtime_does_not_serve_an_onnx_engine() -> None:
    with pytest.raises(VerificationFailed, match=r"the older 0\.9\.2"):
        passport.refuse(ONNX, image="image-2", versions={"onnxruntime-genai": "0.9.2"})
