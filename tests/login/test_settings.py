"""Settings: where each value comes from, and a sentence with a way out for every wrong one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from hpc.core.errors import UsageError
from hpc.login import cli, doctor, planning
from hpc.login.settings import Layer, Settings, assignment, environment, load, locate, site_names

Load = Callable[..., Settings]


@pytest.fixture(autouse=True)
def no_own_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's ~/.config/hpc is this test's own."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "hpc" / "sites"


@pytest.fixture
def settings(tmp_path: Path) -> Load:
    """Call it with the text of hpc.toml and with texts for --set: the settings of such a project."""

    def made(
        toml: str = "", *assignments: str, env: Mapping[str, str] | None = None, files: Mapping[str, str] | None = None,
        flags: Sequence[Layer] = (), **options: Any,
    ) -> Settings:  # fmt: skip
        project = tmp_path / "project"
        for name, text in {"hpc.toml": toml, **(files or {})}.items():
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            (project / name).write_text(text)
        layers = [*(Layer(f"--set {text}", assignment(text)) for text in assignments), *flags]
        return load(locate(env or {}, project), flags=layers, env=env or {}, **options)

    return made


def config(found: Settings, stage: str) -> Any:
    return next(w.config for w in found.wishes if w.stage.name == stage)


def overrides(found: Settings, stage: str) -> Mapping[str, int]:
    return next(w.overrides for w in found.wishes if w.stage.name == stage)


def refusal(settings: Load, *arguments: Any, **options: Any) -> UsageError:
    with pytest.raises(UsageError) as caught:
        settings(*arguments, **options)
    assert caught.value.hint, "every refusal says what to do"
    return caught.value


# ---- where the project is


def test_hpc_toml_is_found_above(tmp_path: Path) -> None:
    (tmp_path / "hpc.toml").write_text('runs = "my runs"')
    (tmp_path / "a" / "b").mkdir(parents=True)
    project = locate({}, tmp_path / "a" / "b")
    assert (project.root, project.file, project.runs) == (tmp_path, tmp_path / "hpc.toml", tmp_path / "my runs")


def test_without_hpc_toml_the_folder_is_the_project(tmp_path: Path) -> None:
    project = locate({}, tmp_path)
    assert (project.root, project.file, project.runs) == (tmp_path, None, tmp_path / "runs")


def test_hpc_config_names_another_file(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.toml").write_text("")
    assert locate({"HPC_CONFIG": str(tmp_path / "other/x.toml")}, tmp_path).root == tmp_path / "other"


def test_hpc_config_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read .*none.toml: No such file"):
        locate({"HPC_CONFIG": str(tmp_path / "none.toml")}, tmp_path)


def test_hpc_runs_beats_the_file(tmp_path: Path) -> None:
    (tmp_path / "hpc.toml").write_text('runs = "a"')
    assert locate({"HPC_RUNS": "/scratch/me"}, tmp_path).runs == Path("/scratch/me")


def test_runs_may_name_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    (tmp_path / "hpc.toml").write_text('runs = "$SCRATCH/runs"')
    assert locate({}, tmp_path).runs == Path("/scratch/me/runs")


@pytest.mark.parametrize("runs", ["3", r'"a\u0000b"'])
def test_runs_must_be_text(tmp_path: Path, runs: str) -> None:
    (tmp_path / "hpc.toml").write_text(f"runs = {runs}")
    with pytest.raises(UsageError, match="runs must be a folder's name, not "):
        locate({}, tmp_path)


def test_file_that_is_no_toml_is_named_with_the_line(tmp_path: Path) -> None:
    (tmp_path / "hpc.toml").write_text("a = 1\nb = = 2\n")
    with pytest.raises(UsageError, match=r"hpc.toml is not valid TOML: .*line 2"):
        locate({}, tmp_path)


def test_file_that_is_no_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "hpc.toml").write_bytes(b"runs = 'caf\xe9'\n")
    with pytest.raises(UsageError, match=r"hpc.toml is not valid TOML: .*utf-8"):
        locate({}, tmp_path)


# ---- precedence and origins


def test_nothing_set_is_all_defaults(settings: Load) -> None:
    found = settings()
    assert [w.stage.name for w in found.wishes] == ["prepare", "finetune", "merge"]
    assert config(found, "finetune").lora_r == 64
    assert found.site.name == "local"
    assert not [o for o in found.origins if o.startswith("finetune")]


def test_file_beats_default_environment_beats_file_and_flag_beats_all(settings: Load) -> None:
    toml, env = (
        "[finetune]\nlora_r = 1\nlora_alpha = 1\nepochs = 1\n",
        {
            "HPC_FINETUNE_LORA_ALPHA": "2",
            "HPC_FINETUNE_EPOCHS": "2",
        },
    )
    found = settings(toml, "finetune.epochs=3", env=env)
    finetune = config(found, "finetune")
    assert (finetune.lora_r, finetune.lora_alpha, finetune.epochs, finetune.seed) == (1, 2, 3, 0)
    origins = {k.partition(".")[2]: v for k, v in found.origins.items() if k.startswith("finetune.")}
    assert origins.pop("lora_r").endswith("hpc.toml")
    assert origins == {"lora_alpha": "environment", "epochs": "--set finetune.epochs=3"}


def test_site_profile_is_beaten_by_environment_and_flags(settings: Load) -> None:
    profile = 'extends = "slurm"\npartition = "a"\nqos = "a"\naccount = "a"\n'
    found = settings(
        'site = "mine"',
        env={"HPC_SITE_QOS": "b", "HPC_SITE_ACCOUNT": "b"},
        files={"sites/mine.toml": profile},
        flags=[Layer("--account", {"site": {"account": "c"}})],
    )
    assert (found.site.partition, found.site.qos, found.site.account) == ("a", "b", "c")
    assert found.origins["site.partition"].endswith("sites/mine.toml")
    assert found.origins["site.scheduler"].endswith("templates/sites/slurm.toml")
    assert (found.origins["site.qos"], found.origins["site.account"]) == ("environment", "--account")


def test_site_is_chosen_by_flag_then_environment_then_file(settings: Load) -> None:
    files = {f"sites/{n}.toml": "" for n in "abc"}
    assert settings('site = "a"', files=files).site.name == "a"
    assert settings('site = "a"', files=files, env={"HPC_SITE": "b"}).site.name == "b"
    assert settings('site = "a"', files=files, env={"HPC_SITE": "b"}, site="c").site.name == "c"


def test_profile_of_the_project_hides_that_of_the_user_and_ours(settings: Load, no_own_profiles: Path) -> None:
    no_own_profiles.mkdir(parents=True)
    (no_own_profiles / "slurm.toml").write_text('partition = "user"')
    assert settings(site="slurm").site.partition == "user"
    assert settings(site="slurm", files={"sites/slurm.toml": 'partition = "project"'}).site.partition == "project"


def test_what_is_no_file_is_no_profile(settings: Load, tmp_path: Path) -> None:
    (tmp_path / "project" / "sites" / "mine.toml").mkdir(parents=True)
    (tmp_path / "project" / "sites" / "gone.toml").symlink_to("nowhere")
    assert not {"mine", "gone"} & set(site_names(tmp_path / "project"))
    assert refusal(settings, site="mine").hint.startswith("choose from: ")


def test_profiles_of_all_places_can_be_chosen(settings: Load, tmp_path: Path, no_own_profiles: Path) -> None:
    no_own_profiles.mkdir(parents=True)
    (no_own_profiles / "mine.toml").write_text("")
    settings(files={"sites/ours.toml": ""})
    assert {"mine", "ours", "local", "slurm", "dgx"} <= set(site_names(tmp_path / "project"))


def test_projects_own_environments_are_added_to_the_sites(settings: Load) -> None:
    profile = 'environments = { train = "/site/train", serve = "/site/serve" }'
    found = settings('[environments]\ntrain = "/mine"', site="s", files={"sites/s.toml": profile})
    assert found.site.environments == {"train": "/mine", "serve": "/site/serve"}


def test_bare_key_goes_to_the_one_stage_that_has_it(settings: Load) -> None:
    assert config(settings("", "lora_r=4"), "finetune").lora_r == 4
    assert config(settings("lora_r = 4"), "finetune").lora_r == 4


def test_stage_outside_the_pipeline_is_added_where_it_is_asked_for(settings: Load) -> None:
    found = settings('[pipeline]\nstages = ["prepare"]', target="merge")
    assert [w.stage.name for w in found.wishes] == ["prepare", "merge"]


@pytest.mark.parametrize(
    ("pipeline", "added", "where"),
    [
        ("prepare finetune merge", "fetch", 0),
        ("finetune merge", "prepare", 0),
        ("fetch finetune merge", "prepare", 1),
        ("prepare finetune merge serve", "build", 3),
        ("prepare finetune evaluate", "merge", 3),
        ("prepare finetune merge", "evaluate", 3),
    ],
)
def test_stage_that_can_do_alone_is_added_before_what_it_feeds(
    settings: Load, pipeline: str, added: str, where: int
) -> None:
    found = settings("", f"pipeline.stages={','.join(pipeline.split())}", "fetch.datasets=org/data", target=added)
    order = [w.stage.name for w in found.wishes]
    assert order == [*pipeline.split()[:where], added, *pipeline.split()[where:]]


ENGINES = '[pipeline]\nstages = ["convert", "build"]\n'


def test_what_two_stages_share_is_set_once(settings: Load) -> None:
    found = settings(ENGINES + "[build]\ntp_size = 4\nmax_batch_size = 8", "pp_size=2", "model=m")
    for stage in ("convert", "build"):
        made = config(found, stage)
        assert (made.tp_size, made.pp_size, made.model) == (4, 2, "m")
    assert found.origins["convert.pp_size"] == "--set pp_size=2"


def test_a_stage_alone_has_what_the_other_shares(settings: Load) -> None:
    found = settings("[build]\ntp_size = 4", env={"HPC_BUILD_QUANTIZATION": "int8"}, target="convert")
    assert (config(found, "convert").tp_size, config(found, "convert").quantization) == (4, "int8")


def test_what_is_shared_is_not_set_in_the_other_table(settings: Load) -> None:
    error = refusal(settings, ENGINES + "[convert]\ntp_size = 4")
    assert "tp_size of convert is set in [build], for both stages" in error.message
    assert error.hint == "write build.tp_size"


def test_resources_are_not_shared(settings: Load) -> None:
    found = settings(ENGINES + "[build]\nresources = { mem_gb = 9 }")
    assert overrides(found, "convert") == {}


def test_nodes_of_ranks_are_not_set_as_resources(settings: Load) -> None:
    error = refusal(settings, "[build]\nresources = { nodes = 2 }\n", target="build")
    assert "how its ranks are divided" in error.message
    assert "build.nodes" in error.hint


def test_pipeline_may_be_typed_as_words(settings: Load) -> None:
    assert [w.stage.name for w in settings("", "pipeline.stages=prepare,finetune").wishes] == ["prepare", "finetune"]


# ---- values as they are typed


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("finetune.lora_r=16", "lora_r", 16),
        ("finetune.learning_rate=1", "learning_rate", 1.0),
        ("finetune.learning_rate=1e-5", "learning_rate", 1e-5),
        ("finetune.gradient_checkpointing=false", "gradient_checkpointing", False),
        ("finetune.method=qlora", "method", "qlora"),
        ('finetune.method="qlora"', "method", "qlora"),
        ("finetune.optim=8", "optim", "8"),
        ("finetune.base_model=org/name", "base_model", "org/name"),
        ("finetune.base_model=a=b", "base_model", "a=b"),
        ("finetune.target_modules=q_proj,v_proj", "target_modules", ("q_proj", "v_proj")),
        ('finetune.target_modules=["q,x"]', "target_modules", ("q,x",)),
        ("finetune.target_modules=", "target_modules", ()),
        ("finetune.max_steps=-1", "max_steps", -1),
    ],
)
def test_value_is_read_as_its_field_wants_it(settings: Load, text: str, field: str, value: object) -> None:
    found = getattr(config(settings("", text), "finetune"), field)
    assert (found, type(found)) == (value, type(value))


def test_value_of_the_environment_is_read_the_same_way(settings: Load) -> None:
    found = settings(env={"HPC_PREPARE_LANGUAGES": "en,de", "HPC_PREPARE_EVAL_ROWS": "3", "HPC_UNRELATED": "x"})
    assert (config(found, "prepare").languages, config(found, "prepare").eval_rows) == (("en", "de"), 3)


def test_resources_are_overrides_and_add_up_over_the_layers(settings: Load) -> None:
    found = settings("[finetune]\nresources = { mem_gb = 3, time_min = 4 }", "finetune.resources.time_min=5")
    assert overrides(found, "finetune") == {"mem_gb": 3, "time_min": 5}
    assert overrides(found, "prepare") == {}


def test_environment_knows_only_our_names() -> None:
    assert environment({"HPC_SITE": "x", "HPC_RUNS": "y", "HPC_CONFIG": "z", "PATH": "p"}) == {}


@pytest.mark.parametrize("text", ["lora_r", "=3", " = 3", ""])
def test_set_without_name_and_value_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not NAME=VALUE"):
        assignment(text)


# ---- wrong values


@pytest.mark.parametrize(
    ("toml", "sentence", "hint"),
    [
        ("[finetune]\nlora_r = 'x'", "finetune.lora_r = 'x' does not fit: expected int, got str", "a whole number"),
        ("[finetune]\nlora_r = 1.5", "finetune.lora_r = 1.5 does not fit: expected int, got float", "a whole number"),
        ("[finetune]\nlora_r = true", "finetune.lora_r = True does not fit: expected int, got bool", "a whole number"),
        ("[finetune]\nepochs = 'x'", "finetune.epochs = 'x' does not fit: expected float, got str", "a number"),
        ("[finetune]\nepochs = nan", "finetune.epochs = nan does not fit: expected a finite number", "a number"),
        ("[finetune]\nepochs = 1e999", "finetune.epochs = inf does not fit: expected a finite number", "a number"),
        ("[merge]\nweights = [1.0, nan]", "merge.weights = [1.0, nan] does not fit", "each a number"),
        ("[finetune]\noptim = []", "finetune.optim = [] does not fit: expected str, got array", "text"),
        (
            "[finetune]\ngradient_checkpointing = 1",
            "finetune.gradient_checkpointing = 1 does not fit: expected bool, got int",
            "true or false",
        ),
        (
            "[finetune]\nmethod = 'lorra'",
            "finetune.method = 'lorra' does not fit: invalid enum value 'lorra'",
            "one of 'lora', 'qlora', 'full'",
        ),
        (
            "[prepare]\ndata = 3",
            "prepare.data = 3 does not fit: expected array, got int",
            "a list, each text",
        ),
        (
            "[prepare]\ndata = [3]",
            "prepare.data = [3] does not fit: expected str, got int",
            "a list, each text",
        ),
        (
            "[prepare]\nmax_samples = 'all'",
            "prepare.max_samples = 'all' does not fit: expected int | null, got str",
            "a whole number or left out",
        ),
        ("[prepare]\ndatta = []", "prepare has no setting 'datta'", "did you mean 'data'?"),
        ("[finetun]\nlora_r = 1", "there is no stage 'finetun'", "did you mean 'finetune'?"),
        ("lora_rr = 1", "no stage has a setting 'lora_rr'", "did you mean 'lora_r'?"),
        ("seed = 1", "'seed' is a setting of prepare and finetune", "say which: prepare.seed"),
        ("dtype = 'float16'", "'dtype' is a setting of finetune and merge", "say which: finetune.dtype"),
        ("[finetune]\nresources = 3", "finetune.resources must be a table", "for example resources = {"),
        (
            "[finetune]\nresources = { mem_gbs = 1 }",
            "finetune.resources has no setting 'mem_gbs'",
            "did you mean 'mem_gb'?",
        ),
        (
            "[finetune]\nresources = { mem_gb = '8G' }",
            "finetune.resources.mem_gb = '8G' does not fit: expected int, got str",
            "a whole number",
        ),
        ("[pipeline]\nstages = ['prepair']", "there is no stage 'prepair'", "did you mean 'prepare'?"),
        ("[pipeline]\nstages = ['merge', 'merge']", "pipeline.stages names a stage twice", "once"),
        ("[pipeline]\nstage = ['merge']", "pipeline has no 'stage'", "it has: stages"),
        ("prepare = 3", "prepare = 3 must be a table", "[prepare]"),
        ("environments = 'x'", "environments = 'x' must be a table", "[environments]"),
        ("site = 3", "site must be the name of a site profile", 'site = "dgx"'),
        ("site = 'dgxx'", "there is no site profile 'dgxx'", "did you mean 'dgx'?"),
    ],
)
def test_wrong_value_is_named_with_what_would_be_right(settings: Load, toml: str, sentence: str, hint: str) -> None:
    error = refusal(settings, toml)
    assert sentence in error.message
    assert hint in error.hint


def test_wrong_value_names_the_file_it_stands_in(settings: Load, tmp_path: Path) -> None:
    error = refusal(settings, "[finetune]\nlora_r = 'x'")
    assert error.message.startswith(f"{tmp_path}/project/hpc.toml: finetune.lora_r = 'x'")


def test_wrong_value_names_the_flag_it_was_given_by(settings: Load) -> None:
    error = refusal(settings, "[finetune]\nlora_r = 1", "finetune.lora_r=x")
    assert error.message.startswith("--set finetune.lora_r=x: finetune.lora_r = 'x'")


def test_wrong_value_names_the_environment(settings: Load) -> None:
    error = refusal(settings, env={"HPC_FINETUNE_LORA_R": "x"})
    assert error.message.startswith("environment: finetune.lora_r = 'x'")


@pytest.mark.parametrize(
    ("profile", "sentence", "hint"),
    [
        ("partitoin = 'x'", "site has no setting 'partitoin'", "did you mean 'partition'?"),
        ("gpus = 'all'", "site.gpus = 'all' does not fit", "one of 'gres', 'gpus_per_node', 'none', 'detect'"),
        ("scheduler = 'pbs'", "site.scheduler = 'pbs' does not fit", "one of 'local', 'slurm'"),
        ("setup = 'module load x'\nmem = 3", "site.mem = 3 does not fit", "true or false"),
        ("extends = 'nothing'", "there is no site profile 'nothing'", "choose from"),
        ("extends = 5", "site profile 'mine': extends = 5 is no name", 'extends = "slurm"'),
        ("extends = 'mine'", "in a circle: mine -> mine", "extends"),
        ("partition = = 1", "mine.toml is not valid TOML", ""),
    ],
)
def test_wrong_site_profile_is_named(settings: Load, profile: str, sentence: str, hint: str) -> None:
    error = refusal(settings, files={"sites/mine.toml": profile}, site="mine")
    assert sentence in error.message
    assert hint in error.hint


@pytest.mark.parametrize(
    ("toml", "sentence"),
    [
        ("pipeline = ['merge']", "pipeline must be a table"),
        ("[pipeline]\nstages = 3", "pipeline.stages = 3 is no list of names"),
        ("[pipeline]\nstages = [1]", "pipeline.stages = [1] is no list of names"),
        ("[finetune]\nsbatch = { exclude = ['a'] }", "finetune.sbatch holds single values"),
    ],
)
def test_value_of_the_wrong_shape_is_named(settings: Load, toml: str, sentence: str) -> None:
    assert sentence in refusal(settings, toml).message


@pytest.mark.parametrize(("text", "hint"), [("site=slurm", "use --site NAME"), ("runs=/x", "use HPC_RUNS=FOLDER")])
def test_set_of_what_is_not_set_this_way_is_not_ignored(settings: Load, text: str, hint: str) -> None:
    assert refusal(settings, "", text).hint == hint


@pytest.mark.parametrize("text", ["site.env={T='hf_x', N=4}", "site.env='hf_x'", "site.env.HF_TOKEN=['hf_x']"])
def test_secret_is_not_told_with_what_is_wrong(settings: Load, text: str) -> None:
    refused = refusal(settings, "", text)
    assert "site.env holds texts by their names" in refused.message
    assert "hf_x" not in refused.message + refused.hint


@pytest.mark.parametrize("text", ["x = " + "[" * 5000, "x = " + "1" * 5000])
def test_file_that_no_parser_takes_is_named(settings: Load, text: str) -> None:
    assert "is not valid TOML" in refusal(settings, text).message


def test_account_that_is_a_number_is_text(settings: Load) -> None:
    assert settings("", "site.account=12345").site.account == "12345"


def test_wrong_resource_names_the_file_though_a_flag_sets_another(settings: Load) -> None:
    error = refusal(settings, "[finetune]\nresources = { mem_gbb = 1 }", "finetune.resources.time_min=5")
    assert "hpc.toml: finetune.resources has no setting 'mem_gbb'" in error.message


def test_pipeline_without_a_stage_is_named(settings: Load) -> None:
    found = settings("[pipeline]\nstages = []")
    with pytest.raises(UsageError, match="names no stage"):
        planning._wanted(cli.parser().parse_args(["plan"]), found)
    assert doctor._settings(found).verdict == "missing"


def test_auto_on_the_command_line_is_build_auto() -> None:
    options = cli.parser().parse_args(["plan", "build", "--auto"])
    assert planning.flags(options)[-1] == Layer("--auto", {"build": {"auto": True}})
