"""Stages are found by their files, and only those beside `hpc`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hpc.core import stage as stages
from hpc.core.errors import HpcError, UsageError
from hpc.core.stage import Stage


@pytest.mark.parametrize("name", stages.available())
def test_every_stage_loads_and_carries_its_files_name(name: str) -> None:
    stage = stages.load(name)
    assert isinstance(stage, Stage)
    assert stage.name == name
    assert stage.summary
    assert stages.source(stage).decode().startswith('"""')


def test_stages_of_the_project_are_there() -> None:
    assert {"prepare", "finetune", "merge"} <= set(stages.available())
    assert stages.available() == sorted(stages.available())


def test_unknown_stage_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="there is no stage 'finetun'") as caught:
        stages.load("finetun")
    assert caught.value.hint == "did you mean 'finetune'?"


def test_unknown_stage_that_is_like_none_names_all() -> None:
    with pytest.raises(UsageError) as caught:
        stages.load("zzz")
    assert "prepare" in caught.value.hint
    assert "merge" in caught.value.hint


@pytest.mark.parametrize("name", ["../prepare", "__init__", "os", ""])
def test_name_that_is_no_stage_is_not_imported(name: str) -> None:
    with pytest.raises(UsageError, match="there is no stage"):
        stages.load(name)


def test_stage_of_another_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import stages.prepare as module

    monkeypatch.setattr(module, "STAGE", stages.load("merge"))
    with pytest.raises(HpcError, match="must define STAGE = Stage\\(name='prepare'"):
        stages.load("prepare")


def test_foreign_package_named_stages_is_refused(tmp_path: Path) -> None:
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "__init__.py").write_text("")
    (tmp_path / "stages" / "prepare.py").write_text("raise SystemExit('ran foreign code')")
    checkout = Path(stages.__file__).parents[2]
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(checkout)!r}]\n"
        "from hpc.core import stage\n"
        "try: stage.load('prepare')\n"
        "except Exception as error: print(type(error).__name__, error, '|', error.hint)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.startswith(f"HpcError another package named 'stages' hides ours: {tmp_path}/stages |"), done


@pytest.mark.parametrize("name", ["jupyter", "enginelab"])
def test_a_lab_cannot_wish_for_what_is_no_port(name: str) -> None:
    stage = stages.load(name)
    assert stage.check is not None
    for port in (0, 1024, 65535):
        stage.check(stage.config(port=port))
    for port in (-5, 80, 65536):
        with pytest.raises(UsageError, match=f"jupyter.port = {port} is no port"):
            stage.check(stage.config(port=port))
