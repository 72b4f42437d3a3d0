"""`hpc images` without Apptainer: recipes and what fills them in, the list, logins, and what planning believes."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpc.core import imagelock, passport
from hpc.core.digest import Digests, sha256
from hpc.core.errors import RuntimeUnavailable, UsageError, VerificationFailed
from hpc.core.imagelock import ImageLock
from hpc.core.passport import Passport
from hpc.core.site import Site
from hpc.login import cli, making, recipes, venvs
from hpc.login.facts import MachineFacts, container_program
from hpc.login.making import Maker
from hpc.login.settings import Layer, load, locate
from hpc.node.images import Apptainer


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a folder for images and a recipe; nothing from outside."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    for name in [n for n in os.environ if n.startswith(("HPC_", "APPTAINER_"))]:
        monkeypatch.delenv(name)
    folder = tmp_path / "project"
    for name in ("images", "containers", "sites"):
        (folder / name).mkdir(parents=True)
    (folder / "sites" / "here.toml").write_text(f'extends = "local"\nimages = "{folder}/images"\n')
    (folder / "hpc.toml").write_text('site = "here"\n')
    monkeypatch.chdir(folder)
    return folder


def record(image: Path, content: bytes = b"an image", **fields: Any) -> Path:
    image.write_bytes(content)
    lock = ImageLock(sha256=sha256(image), size=0, **{"made": "built", "source": "x.def", **fields})
    imagelock.write(image, lock)
    return image


def facts(**site: Any) -> MachineFacts:
    return MachineFacts(load(locate(), flags=[Layer("test", {"site": site})]))


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli.main(["images", *arguments, "--json"]) in {0, 6}
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


# ---- recipes


def recipe(folder: Path, text: str, requirements: str | None = None) -> recipes.Recipe:
    (folder / "containers" / "mine.def").write_text(text)
    if requirements is not None:
        (folder / "containers" / "mine.requirements.txt").write_text(requirements)
    return recipes.find("mine", folder)


def test_a_projects_own_recipes_come_before_those_of_the_toolkit(project: Path) -> None:
    assert recipes.find("train", project).path.parent != project / "containers"
    (project / "containers" / "train.def").write_text("")
    assert recipes.find("train", project).path.parent == project / "containers"
    assert {"base", "train"} <= set(recipes.names(project))


def test_arguments_are_read_out_of_the_recipe_but_not_out_of_its_comments(project: Path) -> None:
    header = "Bootstrap: localimage\nFrom: {{ base }}\n"
    found = recipe(project, f"# say {{{{ nothing }}}}\n{header}%post\n    echo {{{{cuda}}}} {{{{ base }}}}\n")
    assert found.arguments == ("base", "cuda")
    with pytest.raises(UsageError, match="needs a value for 'cuda'"):
        recipes.refuse_unknown(found, {})
    with pytest.raises(UsageError, match="no argument 'cudda'") as caught:
        recipes.refuse_unknown(found, {"cudda": "12"})
    assert "cuda" in caught.value.hint
    recipes.refuse_unknown(found, {"cuda": "12"})


def test_a_recipe_stands_on_the_environment_that_it_is_from(project: Path) -> None:
    found = recipe(project, "Bootstrap: localimage\nFrom: {{ train }}\n")
    assert found.below == "train"
    assert [r.name for r in recipes.chain(found, project)] == ["mine", "train", "base"]
    recipes.refuse_unknown(found, {})  # filled in
    assert recipe(project, "Bootstrap: docker\nFrom: {{ image }}\n").below is None
    assert recipe(project, "Bootstrap: localimage\nFrom: /images/x.sif\n").below is None


def test_an_underscore_stands_for_the_hyphen_of_an_environments_name(project: Path) -> None:
    """Apptainer's arguments have no hyphen."""
    found = recipe(project, "Bootstrap: localimage\nFrom: {{ serve_cpu }}\n")
    assert (found.base, found.below) == ("serve_cpu", "serve-cpu")
    assert [r.name for r in recipes.chain(found, project)] == ["mine", "serve-cpu", "base"]
    recipes.refuse_unknown(found, {})
    assert found.inputs("a", {}) != found.inputs("b", {})
    assert found.inputs("a", {"serve_cpu": "x.sif"}) == found.inputs("a", {}), "what counts is its content"
    assert recipe(project, "Bootstrap: localimage\nFrom: {{ my_own }}\n").below == "my_own"


def test_a_recipe_that_stands_on_itself_is_refused(project: Path) -> None:
    (project / "containers" / "train.def").write_text("Bootstrap: localimage\nFrom: {{ mine }}\n")
    found = recipe(project, "Bootstrap: localimage\nFrom: {{ train }}\n")
    with pytest.raises(UsageError, match="stands on itself"):
        recipes.chain(found, project)


def test_a_default_is_read_out_of_the_recipe_and_a_comment_says_what_to_give(project: Path) -> None:
    found = recipe(project, "# cuda: 12 or {{ tag }}\nFrom: x:{{ tag }}{{ cuda }}\n%arguments\n    tag=13 # a\n%post\n")
    assert found.defaults == {"tag": "13 # a"}
    with pytest.raises(UsageError, match="needs a value for 'cuda'") as caught:
        recipes.refuse_unknown(found, {})
    assert caught.value.hint == "hpc images build mine --build-arg cuda=12 or 13 # a"


def test_a_venv_gets_the_requirements_of_all_that_its_environment_stands_on(project: Path) -> None:
    recipe(project, "Bootstrap: localimage\nFrom: {{ train }}\n", "six==1.17.0\n")
    (project / "containers" / "alone.requirements.txt").touch()
    names = {name: [path.name.split(".")[0] for path in recipes.pinned(name, project)] for name in ("mine", "alone")}
    assert names == {"mine": ["mine", "train"], "alone": ["alone"]}


def test_a_recipes_key_changes_with_all_that_it_is_made_of(project: Path) -> None:
    stands = "Bootstrap: localimage\nFrom: {{ base }}\n"

    def key(text: str = "a", requirements: str = "b", base: str = "c", **given: str) -> str:
        return recipes.key(recipe(project, stands + text, requirements).inputs(base, given))

    keys = [key(), key(text="x"), key(requirements="x"), key(base="x"), key(cuda="12")]
    assert len(set(keys)) == len(keys)
    assert key(mirror="elsewhere") == key(), "every mirror has the same packages"


def test_the_mirror_is_the_one_of_this_machines_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apt = tmp_path / "apt-get"
    apt.write_text("#!/bin/sh\nprintf 'http://a bookworm-updates main\\nhttp://b bookworm main\\n'\n")
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    assert recipes.mirror("bookworm") == "http://b"
    with pytest.raises(UsageError, match="no source of Debian trixie") as caught:
        recipes.mirror("trixie")
    assert "--build-arg mirror=" in caught.value.hint
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    with pytest.raises(UsageError):
        recipes.mirror("bookworm")


def test_wheels_are_chosen_by_a_python_of_the_images_version() -> None:
    assert recipes.python(f"{sys.version_info[0]}.{sys.version_info[1]}") == sys.executable
    with pytest.raises(RuntimeUnavailable, match=r"has Python 3\.99") as caught:
        recipes.python("3.99")
    assert "--build-arg wheels=" in caught.value.hint


# ---- what is outdated


def chained(project: Path) -> Path:
    """mine on ours on nothing, both built; the folder of images."""
    folder = project / "images"
    (project / "containers" / "ours.def").write_text("Bootstrap: scratch\n")
    above = recipe(project, "Bootstrap: localimage\nFrom: {{ ours }}\n")
    record(folder / "ours.sif", recipe="k", inputs=recipes.find("ours", project).inputs(None, {}))
    record(folder / "mine.sif", recipe="k", inputs=above.inputs(sha256(folder / "ours.sif"), {}))
    return folder


def outdated(project: Path, *places: Path) -> bool:
    return recipes.outdated("mine", places[0] / "mine.sif", places, project)


def test_an_image_is_outdated_when_what_it_stands_on_was_built_anew(project: Path) -> None:
    folder = chained(project)
    assert not outdated(project, folder)
    record(folder / "ours.sif", b"anew", recipe="k", inputs=recipes.find("ours", project).inputs(None, {}))
    assert outdated(project, folder)


def test_an_image_is_outdated_when_the_recipe_below_has_changed(project: Path) -> None:
    folder = chained(project)
    (project / "containers" / "ours.def").write_text("Bootstrap: scratch\n# changed\n")
    assert outdated(project, folder)
    (folder / "ours.sif").unlink()  # only the image above was brought here: it stands by itself
    assert not outdated(project, folder)


def test_an_image_that_was_brought_is_its_owners_to_renew(project: Path) -> None:
    folder = chained(project)
    record(folder / "mine.sif", made="pulled")
    (project / "containers" / "mine.def").write_text("Bootstrap: scratch\n")
    assert not outdated(project, folder)
    (folder / "mine.lock.json").unlink()
    assert not outdated(project, folder)


# ---- the verbs


def test_the_list_says_what_is_there_and_whether_it_is_what_it_was(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = project / "images"
    current = recipe(project, "From: {{ base }}")
    inputs = current.inputs("base's digest", {})
    record(folder / "mine.sif", recipe="k", inputs=inputs, versions={"torch": "2.13.0"})
    record(folder / "moved.sif").write_bytes(b"another")
    (folder / "brought.sif").touch()
    (folder / ".mine.node-1.sif").touch()  # in the making
    rows = {r["name"]: r for r in told(capsys, "list")["images"]}
    states = {name: row["state"] for name, row in rows.items()}
    assert states == {
        **dict.fromkeys(recipes.names(project), "missing"),
        **{"mine": "recorded", "moved": "touched", "brought": "unrecorded"},
    }
    assert rows["mine"]["versions"] == {"torch": "2.13.0"}
    (project / "containers" / "mine.def").write_text("From: other")
    rows = {r["name"]: r for r in told(capsys, "list")["images"]}
    assert rows["mine"]["state"] == "outdated"
    (project / "containers" / "mine.def").write_text("From: {{ base }}")
    assert cli.main(["images"]) == 0
    assert "torch 2.13.0" in capsys.readouterr().out
    rows = {r["name"]: r for r in told(capsys, "list", "--to", "elsewhere")["images"]}
    assert rows["triton"]["path"] == str(project / "elsewhere" / "triton.sif")


def test_verify_is_6_and_names_both_digests(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = record(project / "images" / "good.sif"), record(project / "images" / "bad.sif")
    recorded = sha256(bad)
    bad.write_bytes(b"an imagE")
    assert cli.main(["images", "verify", "good"]) == 0
    assert cli.main(["images", "verify"]) == 6
    said = capsys.readouterr().out
    assert f"{good}: ok" in said
    assert recorded in said
    assert sha256(bad) in said
    rows = told(capsys, "verify")["images"]
    assert {Path(r["path"]).stem: r["ok"] for r in rows} == {"good": True, "bad": False}


def test_an_engine_that_an_image_cannot_run_is_6(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(project / "images" / "serve-cpu.sif", versions={"onnxruntime-genai": "0.9.0"})
    engine = Passport(
        engine="onnxruntime_genai", model="m", architecture="LlamaForCausalLM", image="other", dtype="float32",
        versions={"onnxruntime-genai": "0.10.0"}, max_batch_size=8, max_input_len=100, max_seq_len=200,
    )  # fmt: skip
    (project / "engine").mkdir()
    passport.write(project / "engine", engine)
    asked = ["images", "verify", "--engine", str(project / "engine")]
    assert cli.main(asked) == 6
    assert "built with onnxruntime-genai 0.10.0, and the image has the older 0.9.0" in capsys.readouterr().out
    record(project / "images" / "serve-cpu.sif", versions={"onnxruntime-genai": "0.10.0"})
    assert cli.main(asked) == 0
    assert cli.main(["images", "verify", "--engine", str(project)]) == 6
    assert "is no engine of hpc's" in capsys.readouterr().err


def test_verifying_an_image_that_nothing_is_known_of_is_6(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "images" / "x.sif").touch()
    assert cli.main(["images", "verify", "x"]) == 6
    assert "nothing to compare it with" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["lst"], 2, "did you mean 'list'"),
        (["build", "trian"], 2, "did you mean 'train'"),
        (["build", "base", "--as", "sfi"], 2, "did you mean 'sif'"),
        (["build", "base", "--as", "venv"], 2, "no requirements"),
        (["build", "base", "--build-arg", "mirror"], 2, "not NAME=VALUE"),
        (["pull", "../x", "x.sif"], 2, "is no name"),
        (["verify", "none"], 7, "there is no image"),
        (["sign", "none", "--key", "k"], 7, "there is no image"),
        (["pull", "x", "nothing"], 2, "neither an address nor a file"),
        (["pull", "x", "docker-archive:none.tar"], 2, "there is no none.tar"),
        (["list", "--site", "local"], 0, ""),
        (["verify", "--site", "local"], 2, "has no folder for images"),
    ],
)
def test_what_cannot_be_done_is_said_with_a_way_out(
    arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpc.login.images.container_program", lambda site, here: "/bin/true")
    assert cli.main(["images", *arguments]) == code
    assert said in capsys.readouterr().err


# ---- the program


def programs(folder: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """A machine with these programs and no others."""
    monkeypatch.setenv("PATH", str(folder))
    for name in names:
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)


def test_apptainer_is_found_before_singularity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("singularity", "apptainer"):
        programs(tmp_path, monkeypatch, name)
        assert container_program(Site(name="x"), here=True) == name


def test_the_sites_own_program_may_begin_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(tmp_path, monkeypatch, "mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    for named in ("~/mine", "$HOME/mine"):
        assert container_program(Site(name="x", apptainer=named), here=True) == f"{tmp_path}/mine"


def test_without_apptainer_the_venv_is_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(tmp_path, monkeypatch)
    for site in (Site(name="x"), Site(name="x", apptainer="/opt/a"), Site(name="x", setup=("module load a",))):
        with pytest.raises(RuntimeUnavailable, match="not on this machine") as caught:
            container_program(site, here=True)
        assert "--as venv" in caught.value.hint


def test_the_nodes_may_have_what_this_machine_has_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(tmp_path, monkeypatch)
    assert container_program(Site(name="x", apptainer="/opt/a")) == "/opt/a"
    assert container_program(Site(name="x", setup=("module load a",))) == "apptainer"
    with pytest.raises(RuntimeUnavailable, match="not on this machine") as caught:
        container_program(Site(name="x"))
    assert "setup = " in caught.value.hint


# ---- one maker at a time


def maker(folder: Path, say: Callable[[str], None] = lambda text: None) -> Maker:
    return Maker(Apptainer("/bin/true", folder), folder, folder, None, say)


def test_the_lock_can_be_opened_by_all_who_share_the_folder(project: Path) -> None:
    before = os.umask(0o077)
    try:
        with maker(project)._alone(project / "x.sif"):
            assert (project / ".x.making").stat().st_mode & 0o777 == 0o666
    finally:
        os.umask(before)


def test_a_link_in_the_locks_place_makes_no_file_elsewhere(project: Path) -> None:
    (project / ".x.making").symlink_to(project / "elsewhere")
    with pytest.raises(OSError, match="symbolic link"), maker(project)._alone(project / "x.sif"):
        pass
    assert not (project / "elsewhere").exists()


def test_what_killed_makers_left_goes_but_not_what_one_elsewhere_makes(project: Path) -> None:
    ours, other, old = (project / f".x.{name}.sif" for name in (f"{socket.gethostname()}-1", "node9-1", "node9-2"))
    sibling = project / f".x.y.{socket.gethostname()}-1.sif"  # of the image x.y
    for path in (ours, other, old, sibling):
        path.touch()
    os.utime(old, (0, 0))
    with maker(project)._alone(project / "x.sif"):
        assert [p.exists() for p in (ours, other, old, sibling)] == [False, True, False, True]


def test_a_file_system_without_locks_is_told_of(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(making.fcntl, "flock", flock)
    said: list[str] = []
    with maker(project, said.append)._alone(project / "x.sif"):
        pass
    assert "has no locks: where two make x.sif at once, the last one's is kept" in said[0]


# ---- logins


def key_file(path: Path, text: str, mode: int = 0o600) -> str:
    path.write_text(text)
    path.chmod(mode)
    return str(path)


NGC = "docker://nvcr.io/nvidia/x:1"


def test_one_line_is_ngcs_key_and_json_is_dockers_file(tmp_path: Path) -> None:
    key = key_file(tmp_path / "key", "s3cret\n")
    expected = {"APPTAINER_DOCKER_USERNAME": "$oauthtoken", "APPTAINER_DOCKER_PASSWORD": "s3cret"}
    assert making.login(key, NGC) == (expected, None)
    file = key_file(tmp_path / "auth.json", '{"auths": {}}')
    assert making.login(file, "docker://other/x") == ({}, Path(file))


def test_the_key_of_ngc_goes_to_no_other_host(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no login for other\.io"):
        making.login(key_file(tmp_path / "key", "s3cret"), "docker://other.io/x")


def test_a_login_that_others_can_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can be read by others") as caught:
        making.login(key_file(tmp_path / "key", "s3cret", 0o640), NGC)
    assert "chmod 600" in caught.value.hint
    assert "s3cret" not in str(caught.value)


def test_a_key_in_its_usual_place_is_used_for_ngc_alone(tmp_path: Path) -> None:
    assert making.login(None, NGC) == ({}, None), "public images need none"
    usual = tmp_path / "config" / "hpc" / "ngc.key"
    usual.parent.mkdir(parents=True)
    key_file(usual, "s3cret")
    assert making.login(None, NGC)[0]["APPTAINER_DOCKER_PASSWORD"] == "s3cret"
    assert making.login(None, "docker://other/x") == ({}, None)


# ---- what planning believes


def test_planning_takes_the_digest_of_an_untouched_image_from_its_lock(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = record(project / "images" / "train.sif", versions={"torch": "2.13.0", "six": "1"})
    digest = sha256(image)
    monkeypatch.setattr(Digests, "of", lambda self, path: pytest.fail("it was read"))
    environment = facts().environment("train")
    assert environment.digest == digest
    assert environment.versions == {"torch": "2.13.0"}


def test_planning_refuses_an_image_that_is_not_what_its_lock_records(project: Path) -> None:
    image = record(project / "images" / "train.sif")
    recorded = sha256(image)
    image.write_bytes(b"an imagE")
    with pytest.raises(VerificationFailed) as caught:
        facts().environment("train")
    assert recorded in caught.value.message
    assert sha256(image) in caught.value.message


def test_a_change_while_the_image_is_planned_with_is_one_that_the_node_sees(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = record(project / "images" / "train.sif")
    assert facts().environment("train").stat == imagelock.look(image)
    real = imagelock.digest

    def digest(path: Path, hash_file: Any) -> str:
        found = real(path, hash_file)
        image.write_bytes(b"evil")  # right after its digest was found
        return found

    monkeypatch.setattr(imagelock, "digest", digest)
    assert facts().environment("train").stat != imagelock.look(image)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The images whose signature Apptainer was asked for; those whose content says `good` have one."""
    found: list[Path] = []

    def verify(self: Apptainer, image: Path, key: Path) -> None:
        found.append(image)
        if b"good" not in image.read_bytes():
            raise VerificationFailed("no good signature")

    monkeypatch.setattr(Apptainer, "verify", verify)
    monkeypatch.setattr("hpc.login.facts.container_program", lambda site, here: "/bin/true")
    return found


def test_a_demanded_signature_is_checked_once_for_each_content_and_key(project: Path, asked: list[Path]) -> None:
    key = project / "pub.pem"
    key.write_text("a key")
    image = record(project / "images" / "train.sif", b"good")
    for _ in range(2):
        facts(verify_key="pub.pem").environment("train")
    assert asked == [image]
    record(image, b"good too")
    facts(verify_key="pub.pem").environment("train")
    key.write_text("another key")
    facts(verify_key="pub.pem").environment("train")
    assert len(asked) == 3


def test_an_unsigned_image_is_refused_where_the_site_demands_a_signature(project: Path, asked: list[Path]) -> None:
    (project / "pub.pem").touch()
    record(project / "images" / "train.sif", b"bad")
    for _ in range(2):
        with pytest.raises(VerificationFailed):
            facts(verify_key="pub.pem").environment("train")
    assert len(asked) == 2, "a refusal is not remembered"
    with pytest.raises(UsageError, match="there is no key"):
        facts(verify_key="none.pem").environment("train")


def test_a_forged_lock_does_not_help_where_the_site_demands_a_signature(project: Path, asked: list[Path]) -> None:
    (project / "pub.pem").touch()
    image = record(project / "images" / "train.sif", b"good")
    facts(verify_key="pub.pem").environment("train")
    trusted = sha256(image)
    image.write_bytes(b"evil")
    imagelock.write(image, ImageLock(sha256=trusted, size=0, made="built", source="x.def"))
    with pytest.raises(VerificationFailed):
        facts(verify_key="pub.pem").environment("train")


# ---- venvs


def test_a_venv_is_made_once_and_replaced_in_one_step(tmp_path: Path) -> None:
    requirements = tmp_path / "x.requirements.txt"
    requirements.write_text("# nothing\n")
    said: list[str] = []
    made = venvs.build("x", [requirements], tmp_path / "venvs", said.append)
    assert (made / "bin" / "python3").exists()
    first = os.readlink(made)
    assert venvs.build("x", [requirements], tmp_path / "venvs", said.append) == made
    assert "up to date" in said[-1]
    requirements.write_text("# nothing else\n")
    venvs.build("x", [requirements], tmp_path / "venvs", said.append)
    assert os.readlink(made) != first
    assert (made.parent / first).is_dir(), "jobs may still use it"


def test_a_venv_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(UsageError, match="not made by hpc images"):
        venvs.build("x", tmp_path / "r.txt", tmp_path, print)
