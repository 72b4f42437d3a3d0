"""The recipes in containers/ as they are written: each says what it is, is tested when it is built, and is pinned."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hpc.core.assets import CONTAINERS
from hpc.core.errors import UsageError
from hpc.login import recipes

NAMES = ("base", "engine-lab", "lab", "serve-cpu", "train", "triton", "trtllm")
NGC = ("triton", "trtllm")
NOWHERE = Path("/nonexistent")


def find(name: str) -> recipes.Recipe:
    return recipes.find(name, NOWHERE)


def pins(name: str) -> dict[str, str]:
    """Package -> version; AssertionError at a line that is no pin."""
    found: dict[str, str] = {}
    lines = (CONTAINERS / f"{name}.requirements.txt").read_text().splitlines()
    for line in filter(None, (line.partition("#")[0].strip() for line in lines)):
        pin = re.fullmatch(r"([a-z0-9]+(?:-[a-z0-9]+)*)==([\w.]+)", line)
        assert pin, f"{name}: {line!r} pins nothing"
        assert pin[1] not in found, f"{name} names {pin[1]} twice"
        found[pin[1]] = pin[2]
    return found


def test_these_are_the_environments() -> None:
    assert tuple(recipes.names(NOWHERE)) == NAMES
    assert {path.name.partition(".")[0] for path in CONTAINERS.iterdir()} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_has_its_parts(name: str) -> None:
    text = find(name).text
    for section in ("%post", "%test", "%runscript", "%help", "%labels"):
        assert re.search(rf"^{section}\n", text, re.M), section
    for label in (f"environment {name}", f"source containers/{name}.def", r"version \d+"):
        assert re.search(rf"^    org\.hpc\.{label}$", text, re.M), label
    assert "latest" not in text
    test = text.partition("%test\n")[2].partition("\n%")[0].strip()
    assert "\n" not in test or test.startswith("set -e\n"), "only the last command of a %test counts otherwise"


@pytest.mark.parametrize("name", [n for n in NAMES if n != "base"])
def test_every_requirement_is_pinned_and_the_labels_say_the_same_version(name: str) -> None:
    pinned = pins(name)
    assert pinned
    for package, version in re.findall(r"^    org\.hpc\.(\S+) (\S+)$", find(name).text, re.M):
        assert pinned.get(package, version) == version, package


@pytest.mark.parametrize(("name", "below"), [("lab", "train"), ("engine-lab", "serve-cpu")])
def test_a_lab_adds_to_its_environment_and_changes_nothing_of_it(name: str, below: str) -> None:
    assert [r.name for r in recipes.chain(find(name), NOWHERE)] == [name, below, "base"]
    assert pins(name).keys().isdisjoint(pins(below))
    assert [path.name.partition(".")[0] for path in recipes.pinned(name, NOWHERE)] == [name, below]
    recipes.refuse_unknown(find(name), {})


def test_both_labs_have_the_same_jupyterlab() -> None:
    known = {**pins("train"), **pins("lab")}
    assert {name: known[name] for name in pins("engine-lab")} == pins("engine-lab")


def test_tritons_python_backend_gets_a_numpy_that_it_can_read() -> None:
    assert pins("serve-cpu")["numpy"].startswith("1.")


@pytest.mark.parametrize("name", NGC)
def test_an_image_of_ngc_is_refused_without_a_digest_and_says_where_to_find_it(name: str) -> None:
    with pytest.raises(UsageError, match="needs a value for 'digest'") as caught:
        recipes.refuse_unknown(find(name), {})
    assert "--build-arg digest=sha256:" in caught.value.hint
    assert re.search(r"skopeo inspect docker://nvcr\.io/nvidia/tritonserver:\d\d\.\d\d-", caught.value.hint)
    recipes.refuse_unknown(find(name), {"digest": "sha256:0"})


@pytest.mark.parametrize("name", NGC)
def test_an_image_of_ngc_is_pinned_by_its_digest_and_named_by_its_tag(name: str) -> None:
    recipe = find(name)
    assert recipe.source == "docker://nvcr.io/nvidia/tritonserver@{{ digest }}"
    assert re.fullmatch(r"\d\d\.\d\d-trtllm-python-py3", recipe.defaults["tag"])
    assert recipe.python == "3.12"
    assert recipe.below is None
    with pytest.raises(UsageError, match=r"stands on an image of nvcr\.io"):
        recipes.pinned(name, NOWHERE)


@pytest.mark.parametrize("name", NGC)
def test_what_is_added_to_an_image_of_ngc_is_what_serve_cpu_has_too(name: str) -> None:
    assert pins(name).items() <= pins("serve-cpu").items()
    assert "numpy" not in pins(name), "that is the vendor's to choose"
