"""docs/settings.md out of the dataclasses and the text below each of their fields."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from typing import Any

from hpc.core import stage as stages
from hpc.core.site import Site
from hpc.core.stage import Resources

HEAD = """\
# Settings

<!-- Written by `make docs` out of the dataclasses in stages/ and hpc/core/. -->

A value comes from, the later over the earlier: the default below; the site profile; `hpc.toml`, found here or in a
folder above (`HPC_CONFIG` names another); the environment; the command line. `hpc plan --json` shows each origin.

- `hpc.toml`: `[finetune] lora_r = 16`
- environment: `HPC_FINETUNE_LORA_R=16`, `HPC_SITE_PARTITION=gpu`; and `HPC_SITE` (the profile's name), `HPC_RUNS`
- command line: `--set finetune.lora_r=16`, or `--set lora_r=16` where only one stage has it; `--set site.partition=gpu`

Paths count from the folder of `hpc.toml`. Beside the tables below, `hpc.toml` may have `site = "NAME"`,
`runs = "FOLDER"`, `[pipeline] stages = ["prepare", "finetune", "merge"]` and `[environments] NAME = "a SIF or a venv"`.
Every stage's table may also have `resources = { … }` and `sbatch = { … }` (sbatch's own options for this stage alone,
e.g. `partition = "cpu"`).
"""


def page() -> str:
    """The whole document."""
    tables = [("resources", "Of every stage, `resources = { … }`; the stage itself gives the defaults.", Resources)]
    tables += [(f"[{s.name}]", s.summary + ".", s.config) for s in map(stages.load, stages.available())]
    tables.append(("Site profile", "One cluster: `sites/NAME.toml`, `~/.config/hpc/sites/NAME.toml`.", Site))
    return HEAD + "".join(_section(*table) for table in tables)


def _section(title: str, summary: str, kind: type[Any]) -> str:
    rows = "".join(f"| `{name}` | {type_} | {default} | {text} |\n" for name, type_, default, text in fields(kind))
    return f"\n## {title}\n\n{summary}\n\n| setting | type | default | |\n|---|---|---|---|\n{rows}"


def fields(kind: type[Any]) -> Iterator[tuple[str, str, str, str]]:
    """(name, type, default, text) of each field, from the source: the text stands below it."""
    (body,) = (node for node in ast.parse(inspect.getsource(kind)).body if isinstance(node, ast.ClassDef))
    for field, below in zip(body.body, [*body.body[1:], None], strict=True):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        text = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else ""
        yield field.target.id, _cell(ast.unparse(field.annotation)), _default(field.value), _words(str(text))


def _default(value: ast.expr | None) -> str:
    if value is None:
        return "(must be set)"
    text = ast.unparse(value)
    return _cell("{}" if text.startswith("field(default_factory=dict") else text)


def _cell(text: str) -> str:
    return "`" + text.replace("|", "\\|") + "`"


def _words(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
