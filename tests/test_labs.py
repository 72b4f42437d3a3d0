"""The notebooks in templates/labs: empty of results, of the format that JupyterLab writes, with settings that exist."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

from hpc.core import stage as stages
from hpc.core.assets import TEMPLATES
from hpc.inside import lab

NOTEBOOKS = sorted((TEMPLATES / "labs").glob("*.ipynb"))
FINETUNING = TEMPLATES / "labs" / "finetuning-lab.ipynb"
ENGINE = TEMPLATES / "labs" / "engine-lab.ipynb"


def cells(path: Path, kind: str = "code") -> list[dict[str, Any]]:
    document = json.loads(path.read_text(encoding="utf-8"))
    return [cell for cell in document["cells"] if cell["cell_type"] == kind]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def test_the_labs_are_there() -> None:
    assert NOTEBOOKS == [ENGINE, FINETUNING]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebook_holds_no_results(path: Path) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    assert (document["nbformat"], document["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in document["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in cells(path):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
        ast.parse(source(cell))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_what_a_notebook_calls_of_ours_is_there(path: Path) -> None:
    tree = ast.parse("\n".join(map(source, cells(path))))
    ours: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(("hpc", "stages")):
            exec(ast.unparse(node), ours)
    used = [
        (node.value.id, node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours
    ]
    assert used
    assert [(name, word) for name, word in used if not hasattr(ours[name], word)] == []


@pytest.fixture(scope="module")
def sizes() -> dict[str, dict[str, dict[str, Any]]]:
    values: dict[str, Any] = {}
    for cell in cells(FINETUNING):
        if {"parameters", "sizes"} & set(cell["metadata"].get("tags", ())):
            exec(source(cell), values)
    found: dict[str, dict[str, dict[str, Any]]] = values["SIZES"]
    return found


def test_every_size_sets_what_the_stages_have(sizes: dict[str, dict[str, dict[str, Any]]]) -> None:
    assert list(sizes) == ["tiny", "mig20", "a100"]
    for size in sizes.values():
        for stage, settings in size.items():
            lab._config(stages.load(stage), settings)


def test_table_tells_the_figures_that_are_used(sizes: dict[str, dict[str, dict[str, Any]]]) -> None:
    (text,) = [source(cell) for cell in cells(FINETUNING, "markdown") if cell["id"] == "sizes-text"]
    rows = [[c.strip() for c in line.strip("| ").split("|")] for line in text.splitlines() if line.startswith("|")]
    for column, size in enumerate(sizes.values(), 1):
        told = {row[0]: row[column] for row in rows if len(row) == 4}
        use = size["finetune"]
        assert told["LoRA rank / alpha / dropout"] == f"{use['lora_r']} / {use['lora_alpha']} / {use['lora_dropout']:g}"
        assert told["batch × accumulation"] == f"{use['batch_size']} × {use.get('grad_accum', 1)}"
        assert told["tokens per conversation"] == str(use["max_length"])
        assert use["method"] in told["base model"]
        assert float(re.split("[, ]", told["learning rate"])[0]) == use["learning_rate"]
        steps = told["passes over the data"].split()
        assert int(steps[0]) == use.get("max_steps", use.get("epochs"))
        assert told["records"].endswith(str(size["prepare"].get("max_samples", "all")))


@pytest.mark.parametrize("engine", ["onnxruntime_genai", "tensorrt_llm"])
def test_every_engine_sets_what_the_stages_have(engine: str) -> None:
    values: dict[str, Any] = {}
    for cell in cells(ENGINE):
        if {"parameters", "engines"} & set(cell["metadata"].get("tags", ())):
            exec(source(cell).replace('ENGINE = "onnxruntime_genai"', f'ENGINE = "{engine}"'), values)
    assert values["WHOLE"]["engine"] == engine
    assert values["QUANTISED"].items() > values["WHOLE"].items()
    (told,) = [source(cell) for cell in cells(ENGINE, "markdown") if cell["id"] == "engines-text"]
    assert values["QUANTISED"]["quantization"] in told
    for stage in ("convert", "build", "serve"):
        for settings in (values["WHOLE"], values["QUANTISED"]):
            lab._config(stages.load(stage), settings)
    lab._config(stages.load("serve"), values["SERVE"])
