"""`hpc menu` on a terminal: start the labs, come back, look, reset, leave; by real commands on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import serving

from .test_local import Local, local, packages
from .test_reset import on_terminal

__all__ = ["local", "packages"]


@pytest.fixture
def lab(local: Local, packages: Path) -> Local:
    """A project where a small service stands in for JupyterLab, in both labs."""
    door = packages / "stages" / f"{serving.write(packages / 'stages')}.py"
    text = door.read_text().replace("    delay:", '    open: str = ""\n    delay:')
    for name in ("jupyter", "enginelab"):
        (packages / "stages" / f"{name}.py").write_text(text.replace('name="door"', f'name="{name}"'))
    return local


def test_lab_is_started_once_and_reset(lab: Local) -> None:
    menu = on_terminal(lab, "menu", TERM="dumb", COLUMNS="200")
    assert "1) Finetuning lab" in menu.until("Choose: ")
    menu.type("1\n")
    menu.until("jupyter-1/jupyter is ready on")
    assert "ssh -N -L localhost:" in menu.until("?token=")
    menu.until("Choose: ", 60)
    assert lab.read("jupyter-1/jupyter/config.json")["config"]["open"] == "finetuning-lab.ipynb"
    menu.type("1\n")
    menu.until("it runs already: jupyter-1/jupyter")
    menu.until("Choose: ", 60)
    menu.type("a\n")
    menu.until("ssh -N -L localhost:")
    menu.until("Choose: ")
    menu.type("s\n")
    assert "jupyter-1/jupyter" in menu.until("Choose: ")
    menu.type("R\n")
    menu.until("[y/N] ")
    menu.type("y\n")
    menu.until("jupyter-1/jupyter: reset")
    menu.until("Choose: ")
    menu.type("r\n")
    menu.until("nothing to reset")
    menu.until("Choose: ")
    menu.type("x\n")
    assert menu.end() == 0
    assert lab.states() == {"jupyter": "CANCELLED"}


def test_each_lab_is_reset_by_its_own_letter_and_the_other_goes_on(lab: Local) -> None:
    (lab.folder / "workspace").mkdir()
    (lab.folder / "workspace" / "mine.ipynb").write_text("years")
    menu = on_terminal(lab, "menu", TERM="dumb", COLUMNS="200")
    assert "2) Engine lab" in menu.until("Choose: ")
    for choice, name in (("1", "jupyter-1/jupyter"), ("2", "enginelab-2/enginelab")):
        menu.type(f"{choice}\n")
        menu.until(f"{name} is ready on")
        menu.until("Choose: ", 60)
    menu.type("a\n")
    menu.until("enginelab-2/enginelab is ready on")  # the latest one
    menu.until("Choose: ", 60)
    menu.type("T\n")
    menu.until("enginelab-2/enginelab: job")
    menu.until("[y/N] ")
    menu.type("y\n")
    menu.until("enginelab-2/enginelab: reset")
    menu.until("Choose: ")
    assert [s["state"] for s in lab.json("status")["stages"]] == ["CANCELLED", "RUNNING"]
    menu.type("a\n")
    menu.until("jupyter-1/jupyter is ready on")  # the one that runs
    menu.until("Choose: ", 60)
    menu.type("t\n")
    assert "nothing to reset" in menu.until("Choose: ")
    menu.type("r\n")
    menu.until("[y/N] ")
    menu.type("y\n")
    menu.until("jupyter-1/jupyter: reset")
    menu.until("Choose: ")
    menu.type("x\n")
    assert menu.end() == 0
    assert [s["state"] for s in lab.json("status")["stages"]] == ["CANCELLED", "CANCELLED"]
    assert (lab.folder / "workspace" / "mine.ipynb").read_text() == "years"


def test_lab_that_was_started_otherwise_is_found(lab: Local) -> None:
    lab.hpc("submit", "jupyter", "--wait")
    menu = on_terminal(lab, "menu")
    menu.until("Choose: ")
    menu.type("1\n")
    menu.until("it runs already: jupyter-1/jupyter")
    menu.until("Choose: ", 60)
    menu.type("X\n")
    assert menu.end() == 0
    assert lab.states() == {"jupyter": "RUNNING"}


def test_ctrl_c_ends_the_waiting_and_then_the_menu(lab: Local) -> None:
    menu = on_terminal(lab, "menu")
    menu.until("Choose: ")
    (lab.folder / "hpc.toml").write_text((lab.folder / "hpc.toml").read_text() + "[jupyter]\ndelay = 300.0\n")
    menu.type("1\n")
    menu.until("no answer yet")  # it is waited for: a Ctrl-C before that would end the submission
    menu.type("\x03")
    menu.until("jupyter-1 goes on")
    menu.until("Choose: ")
    menu.wait()  # a signal between the prompt and the reading is lost: nobody types that fast
    menu.type("\x03")
    assert menu.end() == 0
    assert lab.states() == {"jupyter": "RUNNING"}


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("9\n", "there is no '9': type 1, 2, R, T, S, A or X"),
        ("r\n", "no run has a stage 'jupyter'"),
        ("t\n", "no run has a stage 'enginelab'"),
        ("a\n", "no run has a stage 'jupyter'"),
    ],
)
def test_wrong_words_are_answered_and_asked_again(lab: Local, typed: str, said: str) -> None:
    menu = on_terminal(lab, "menu", TERM="dumb")
    menu.until("Choose: ")
    menu.type(typed)
    menu.until(said)
    menu.until("Choose: ")
    menu.type("\x04")
    assert menu.end() == 0


def test_without_a_terminal_it_reads_lines_and_ends_with_them(lab: Local) -> None:
    done = lab.hpc("menu")  # standard input is that of the tests: empty
    assert "1) Finetuning lab" in done.stdout
