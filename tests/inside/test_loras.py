"""Adapters for the CPU engine: their names, and the refusal of those that cannot be switched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpc.core.errors import UsageError
from hpc.inside import loras


def adapter(folder: Path, **settings: Any) -> Path:
    folder.mkdir()
    words = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none", **settings}
    (folder / "adapter_config.json").write_text(json.dumps(words))
    (folder / "adapter_model.safetensors").touch()
    return folder


def test_names_and_folders() -> None:
    assert loras.named(("a=x/y", "b.2-c=z=1")) == {"a": "x/y", "b.2-c": "z=1"}


@pytest.mark.parametrize("entries", [("x/y",), ("=x",), ("a b=x",), ("a=",), ("a=x", "a=y")])
def test_what_is_no_name_is_told(entries: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match=r"build\.lora"):
        loras.named(entries)


def test_a_plain_adapter_is_taken(tmp_path: Path) -> None:
    assert loras.inspect("a", adapter(tmp_path / "a"))["r"] == 8


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "biases"),
        ({"peft_type": "IA3"}, "peft_type IA3"),
    ],
)
def test_one_that_cannot_be_switched_is_refused(tmp_path: Path, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told) as refused:
        loras.inspect("a", adapter(tmp_path / "a", **settings))
    assert "merge" in (refused.value.hint or "")


def test_a_folder_without_an_adapter_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no LoRA adapter"):
        loras.inspect("a", tmp_path)


def test_an_engine_tells_its_adapters(tmp_path: Path) -> None:
    assert loras.names(tmp_path) == ()
    (tmp_path / loras.FILE).write_text('{"names": {"a": [0, 8], "b": [8, 16]}, "width": 16}')
    assert loras.names(tmp_path) == ("a", "b")
