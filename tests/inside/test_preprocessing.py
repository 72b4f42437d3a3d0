"""Text becomes all of its tokens, whatever training left in tokenizer.json. Triton's own module is a stub."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hpc.core.assets import TEMPLATES

pytestmark = pytest.mark.train
CODE = TEMPLATES / "triton" / "common" / "preprocessing" / "1" / "model.py"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", ModuleType("triton_python_backend_utils"))
    spec = importlib.util.spec_from_file_location("preprocessing_model", CODE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TritonPythonModel()


def test_a_prompt_is_never_cut_nor_filled_up(made: Any, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.enable_truncation(3)
    words.enable_padding(length=3)
    words.save(str(tmp_path / "tokenizer.json"))
    told = {"tokenizer_dir": str(tmp_path), "add_special_tokens": "true", "default_max_tokens": "5"}
    parameters = {name: {"string_value": value} for name, value in told.items()}
    made.initialize({"model_config": json.dumps({"parameters": parameters})})
    assert [len(made.tokenizer.encode(text).ids) for text in ("a", "a " * 20)] == [1, 20]
