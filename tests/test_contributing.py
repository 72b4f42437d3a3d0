"""The stage that CONTRIBUTING.md shows is found by being there, and does what it says."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

PAGE = Path(__file__).resolve().parents[1] / "CONTRIBUTING.md"


def test_stage_of_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shorten.py").write_text(PAGE.read_text().partition("```python\n")[2].partition("```")[0])
    spec = importlib.util.spec_from_file_location("shorten", tmp_path / "shorten.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "shorten", module)
    spec.loader.exec_module(module)
    given, made, told = tmp_path / "given", tmp_path / "made", {}
    given.mkdir()
    rows = [json.dumps({"messages": text}, ensure_ascii=False) + "\n" for text in ("a\u2028b", "c" * 80)]
    for part in ("train.jsonl", "eval.jsonl"):
        (given / part).write_text("".join(rows))
    (given / "chat_template.jinja").write_text("{{ messages }}")
    config = module.STAGE.config(longest=40)
    context = SimpleNamespace(inputs={"dataset": given}, outputs={"dataset": made}, metric=told.update)
    module.STAGE.run(config, context)
    assert (made / "train.jsonl").read_text() == rows[0], "U+2028 ends no line"
    assert (made / "chat_template.jinja").exists()
    assert told == {"train.jsonl": 1, "eval.jsonl": 1}
    assert list(module.STAGE.outputs(config)) == ["dataset"]
