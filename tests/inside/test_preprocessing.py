"""Text becomes all of its tokens, whatever training left in tokenizer.json. Triton's own module is a stub."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from hpc.core.assets import TEMPLATES

pytestmark = pytest.mark.train
CODE = TEMPLATES / "triton" / "common" / "preprocessing" / "1" / "model.py"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Any:
    stub: Any = ModuleType("triton_python_backend_utils")
    stub.Tensor = lambda name, value: (name, value.tolist())
    stub.InferenceResponse = dict
    stub.get_input_tensor_by_name = lambda request, name: request.get(name)
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    spec = importlib.util.spec_from_file_location("preprocessing_model", CODE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TritonPythonModel()


def start(made: Any, folder: Path, stop_words_as: str = "tokens") -> None:
    told = {"tokenizer_dir": str(folder), "add_special_tokens": "true", "default_max_tokens": "5"}
    parameters = {name: {"string_value": value} for name, value in {**told, "stop_words_as": stop_words_as}.items()}
    made.initialize({"model_config": json.dumps({"parameters": parameters})})


def test_a_prompt_is_never_cut_nor_filled_up(made: Any, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.enable_truncation(3)
    words.enable_padding(length=3)
    words.save(str(tmp_path / "tokenizer.json"))
    start(made, tmp_path)
    assert [len(made.tokenizer.encode(text).ids) for text in ("a", "a " * 20)] == [1, 20]


@pytest.mark.parametrize(
    ("ends", "stop_words_as", "told"),
    [
        ([1, 4], "tokens", [[2, 3, 4], [2, 3, -1]]),
        ([4, 5, 1], "tokens", [[2, 3, 4, 5], [2, 3, 4, -1]]),
        (1, "tokens", [[2, 3], [2, -1]]),
        (None, "tokens", [[2, 3], [2, -1]]),
        ([1, 4], "text", [[2, 3], [2, -1]]),
    ],
    ids=["gemma", "three", "one", "none", "our own engine knows them"],
)
def test_further_ends_are_stop_words_to_tensorrt_llm(
    made: Any, tmp_path: Path, ends: Any, stop_words_as: str, told: Any
) -> None:
    import numpy as np
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(
        models.WordLevel({"<pad>": 0, "<eos>": 1, "stop": 2, "here": 3, "<turn>": 4, "<tool>": 5}, "<pad>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<eos>", "pad_token": "<pad>"}')
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    start(made, tmp_path, stop_words_as)
    asked = {"QUERY": [b"here"], "STOP_WORDS_DICT": [b"stop here", b""]}
    request = {name: SimpleNamespace(as_numpy=lambda v=value: np.array([v], "O")) for name, value in asked.items()}
    found = made._answer(request)
    assert found["OUT_END_ID"] == [[1]]
    assert found["STOP_WORDS_IDS"] == [told]
