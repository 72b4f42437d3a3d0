"""hpc.toml + site profile + environment + flags -> checked configs, with each value's origin."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.core import site as sites
from hpc.core import stage as stages
from hpc.core.assets import TEMPLATES
from hpc.core.errors import UsageError, did_you_mean
from hpc.core.feeding import in_place
from hpc.core.plan import Wish
from hpc.core.site import Site
from hpc.core.stage import Resources
from hpc.node.launch import argument_without_secrets

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = "hpc.toml"
_DEFAULT_PIPELINE = ("prepare", "finetune", "merge")


@dataclass(frozen=True, kw_only=True)
class Project:
    """Where the settings come from, and where the runs lie."""

    root: Path
    """Paths in the settings count from here: the folder of hpc.toml, else the current one."""
    file: Path | None
    tables: Mapping[str, Any]
    runs: Path


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything decided: checked against the stages' dataclasses."""

    project: Project
    site: Site
    wishes: tuple[Wish, ...]
    """Every stage of the pipeline, in order."""
    origins: Mapping[str, str]
    """`finetune.lora_r` -> where its value comes from; what is missing here is a default."""


@dataclass(frozen=True)
class Layer:
    """Values of one origin, as a nested table."""

    origin: str
    table: Mapping[str, Any]


def locate(env: Mapping[str, str] = os.environ, cwd: Path | None = None) -> Project:
    """The project: HPC_CONFIG, else the hpc.toml here or above, else this folder with the defaults."""
    cwd = cwd or Path.cwd()
    named = env.get("HPC_CONFIG")
    file = Path(os.path.expanduser(named)).absolute() if named else _search(cwd)
    tables = read_toml(file) if file else {}
    root = file.parent if file else cwd
    runs = env.get("HPC_RUNS") or tables.get("runs", "runs")
    if not isinstance(runs, str) or "\0" in runs:
        raise UsageError(f"runs must be a folder's name, not {runs!r}", hint='for example runs = "runs"')
    return Project(root=root, file=file, tables=tables, runs=root / os.path.expandvars(os.path.expanduser(runs)))


def load(
    project: Project,
    *,
    target: str = "pipeline",
    site: str | None = None,
    flags: Sequence[Layer] = (),
    env: Mapping[str, str] = os.environ,
) -> Settings:
    """All settings; UsageError names the value that is wrong, where it stands, and what was meant."""
    for flag in flags:
        for name, option in (("site", "--site NAME"), ("runs", "HPC_RUNS=FOLDER")):
            if name in flag.table and not isinstance(flag.table[name], Mapping):
                raise UsageError(f"{flag.origin}: {name} is not set this way", hint=f"use {option}")
    layers = [
        Layer(str(project.file or FILE), project.tables),
        Layer("environment", environment(env)),
        *flags,
    ]
    _known_tables(layers)
    pipeline = _pipeline(layers)
    asked = [] if target in {"pipeline", *pipeline} else [target]
    layers = [_spread(layer, [*pipeline, *asked]) for layer in layers]
    site_name = site or env.get("HPC_SITE") or project.tables.get("site", "local")
    if not isinstance(site_name, str):
        raise UsageError("site must be the name of a site profile", hint='for example site = "dgx"')
    origins: dict[str, str] = {}
    chosen = _site(site_name, project.root, layers, origins)
    wishes, added = ([_wish(stages.load(name), layers, origins) for name in names] for names in (pipeline, asked))
    for one in added:
        wishes = in_place(one, wishes)
    return Settings(project=project, site=chosen, wishes=tuple(wishes), origins=origins)


def site_profile(project: Project, name: str, env: Mapping[str, str] = os.environ) -> Site:
    """One site alone: what a run was submitted to may be asked for while the project's other settings are wrong."""
    tables = {k: v for k, v in project.tables.items() if isinstance(v, Mapping)}
    layers = [Layer(str(project.file or FILE), tables), Layer("environment", environment(env))]
    return _site(name, project.root, layers, {})


def assignment(text: str) -> dict[str, Any]:
    """`a.b=c` of --set as a nested table; the value is TOML where it can be read so, else text.

    >>> assignment("finetune.lora_r=16"), assignment("languages=en"), assignment('data=["a", "b"]')
    ({'finetune': {'lora_r': 16}}, {'languages': 'en'}, {'data': ['a', 'b']})
    """
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"--set {text}: not NAME=VALUE", hint="for example --set finetune.lora_r=16")
    return _nested(name.strip().split("."), _value(value))


def environment(env: Mapping[str, str]) -> dict[str, Any]:
    """HPC_FINETUNE_LORA_R=16 and HPC_SITE_PARTITION=x as nested tables.

    >>> environment({"HPC_FINETUNE_LORA_R": "16", "HOME": "/h"})
    {'finetune': {'lora_r': 16}}
    """
    table: dict[str, Any] = {}
    heads = {name.upper().replace("-", "_"): name for name in (*stages.available(), "site")}
    for variable, value in env.items():
        if not variable.startswith("HPC_"):
            continue
        for head, name in heads.items():
            rest = variable[4:].removeprefix(head + "_")
            if rest != variable[4:]:
                sites.merge(table, _nested([name, rest.lower()], _value(value)))
    return table


def read_toml(path: Path) -> dict[str, Any]:
    """The file's tables; UsageError with the line where it is not TOML."""
    try:
        with open(path, "rb") as file:
            tables: dict[str, Any] = tomllib.load(file)
            return tables
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", hint="HPC_CONFIG names the file") from error
    except (ValueError, RecursionError) as error:  # also of a number of thousands of digits
        raise UsageError(f"{path} is not valid TOML: {error}", hint="see the example in the README") from error


def site_names(root: Path) -> list[str]:
    """The profiles that can be chosen."""
    return sorted({file.stem for folder in _site_folders(root) for file in folder.glob("*.toml") if file.is_file()})


def _search(cwd: Path) -> Path | None:
    return next((p / FILE for p in (cwd, *cwd.parents) if (p / FILE).is_file()), None)


def _known_tables(layers: Sequence[Layer]) -> None:
    known = {"site", "runs", "pipeline", "environments", *_TABLES, *stages.available()}
    for layer in layers:
        for name, value in layer.table.items():
            if isinstance(value, Mapping) and name not in known:
                raise UsageError(f"{layer.origin}: there is no stage '{name}'", hint=did_you_mean(name, sorted(known)))
            if not isinstance(value, Mapping) and name in {"environments", *stages.available()}:
                raise UsageError(f"{layer.origin}: {name} = {value!r} must be a table", hint=f"[{name}] NAME = VALUE")


def _pipeline(layers: Sequence[Layer]) -> tuple[str, ...]:
    """The stages in order."""
    names: Any = list(_DEFAULT_PIPELINE)
    for layer in layers:
        table = layer.table.get("pipeline", {})
        if not isinstance(table, Mapping):
            raise UsageError(f"{layer.origin}: pipeline must be a table", hint='[pipeline] stages = ["prepare", …]')
        names = table.get("stages", names)
        for key in table:
            if key != "stages":
                raise UsageError(f"{layer.origin}: pipeline has no '{key}'", hint="it has: stages")
    if isinstance(names, str):
        names = names.split(",")
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"pipeline.stages = {names!r} is no list of names", hint='stages = ["prepare", "finetune"]')
    for name in names:
        stages.load(name)
    if len(set(names)) != len(names):
        raise UsageError("pipeline.stages names a stage twice", hint="each stage stands once in a pipeline")
    return tuple(names)


def _spread(layer: Layer, pipeline: Sequence[str]) -> Layer:
    """`lora_r = 16` without a stage goes to the one stage that has such a field."""
    table = {k: v for k, v in layer.table.items() if isinstance(v, Mapping) and k not in _TABLES}
    for name, value in layer.table.items():
        if name in {"site", "runs"} or name in table:
            continue
        owners = [s for s in pipeline if name in _TABLES or name in _fields(stages.load(s).config)]
        owners = list(
            dict.fromkeys(stages.load(s).settings_of or s if name in stages.load(s).shared() else s for s in owners)
        )
        if len(owners) > 1:
            raise UsageError(
                f"{layer.origin}: '{name}' is a setting of {' and '.join(owners)}",
                hint=f"say which: {owners[0]}.{name}",
            )
        if not owners:
            everything = sorted({f for s in pipeline for f in _fields(stages.load(s).config)})
            raise UsageError(f"{layer.origin}: no stage has a setting '{name}'", hint=did_you_mean(name, everything))
        table = {**table, owners[0]: {**table.get(owners[0], {}), name: value}}
    return Layer(layer.origin, table)


def _site(name: str, root: Path, layers: Sequence[Layer], origins: dict[str, str]) -> Site:
    def read(profile: str) -> Mapping[str, Any]:
        for folder in _site_folders(root):
            file = folder / f"{profile}.toml"
            if file.is_file():
                table = read_toml(file)
                origins.update({f"site.{k}": str(file) for k in table if f"site.{k}" not in origins})
                return table
        raise UsageError(f"there is no site profile '{profile}'", hint=did_you_mean(profile, site_names(root)))

    values = sites.resolve(name, read)
    for layer in layers:
        over = dict(layer.table.get("site", {}))
        if "environments" in layer.table:  # a project may bring its own
            over["environments"] = {**layer.table["environments"], **over.get("environments", {})}
        sites.merge(values, over)
        origins.update({f"site.{k}": layer.origin for k in over})
    checked = dict(_checked("site", Site, values, origins))
    if checked.get("gpus") == "detect":
        checked["gpus"] = "gpus_per_node" if Path("/dev/nvidia0").exists() else "none"
    return Site(**{**checked, "name": name})


def _site_folders(root: Path) -> tuple[Path, ...]:
    config = Path(os.path.expanduser(os.environ.get("XDG_CONFIG_HOME") or "~/.config"))
    return root / "sites", config / "hpc" / "sites", TEMPLATES / "sites"


def _wish(stage: stages.Stage, layers: Sequence[Layer], origins: dict[str, str]) -> Wish:
    values: dict[str, Any] = {}
    tables: dict[str, dict[str, Any]] = {"resources": {}, "sbatch": {}}
    shared = stage.shared()
    for layer in layers:
        own = layer.table.get(stage.name, {})
        if wrong := sorted(shared & own.keys()):
            raise UsageError(
                f"{layer.origin}: {wrong[0]} of {stage.name} is set in [{stage.settings_of}], for both stages",
                hint=f"write {stage.settings_of}.{wrong[0]}",
            )
        others = layer.table.get(stage.settings_of or "", {})
        for field, value in {**{k: v for k, v in others.items() if k in shared}, **own}.items():
            origins[f"{stage.name}.{field}"] = layer.origin
            if field in tables:
                if not isinstance(value, Mapping):
                    raise UsageError(f"{layer.origin}: {stage.name}.{field} must be a table", hint=_TABLES[field])
                if not all(isinstance(v, str | int | float) for v in value.values()):
                    raise UsageError(f"{layer.origin}: {stage.name}.{field} holds single values", hint=_TABLES[field])
                tables[field].update(value)
                origins.update({f"{stage.name}.{field}.{key}": layer.origin for key in value})
            else:
                values[field] = value
    for field, value in stage.chosen(values).items():
        if field not in values:
            values[field], origins[f"{stage.name}.{field}"] = value, f"preset {values['preset']}"
    config = dict(_checked(stage.name, stage.config, values, origins))
    missing = [f.name for f in dataclasses.fields(stage.config) if f.name not in config and _required(f)]
    if missing:
        raise UsageError(
            f"{stage.name} needs the setting '{missing[0]}'",
            hint=f"write it in {FILE}: [{stage.name}] {missing[0]} = …, or give --set {stage.name}.{missing[0]}=…",
        )
    resources = f"{stage.name}.resources"
    overrides = dict(_checked(resources, Resources, tables["resources"], origins))
    if stage.launcher == "mpi" and overrides.keys() & {"nodes", "tasks_per_node"}:
        raise UsageError(f"{resources}: its nodes follow from how its ranks are divided", hint="set build.nodes")
    try:
        return Wish(stage=stage, config=stage.config(**config), overrides=overrides, sbatch=tables["sbatch"])
    except ValueError as error:  # a __post_init__ that refuses a contradiction
        raise UsageError(f"{stage.name}: {error}", hint=f"see [{stage.name}] in {FILE}") from error


_TABLES = {
    "resources": "for example resources = { gpus_per_node = 1, time_min = 60 }",
    "sbatch": 'for example sbatch = { partition = "cpu", exclude = "node07" }',
}
"""Tables that every stage may have beside its config."""


def _checked(
    table: str, kind: type[Any], values: Mapping[str, Any], origins: Mapping[str, str]
) -> Iterator[tuple[str, Any]]:
    """(field, value) with each value checked against the dataclass, field by field."""
    import msgspec

    hints = _fields(kind)
    for field, value in values.items():
        where = origins.get(f"{table}.{field}", FILE)
        if field not in hints:
            raise UsageError(f"{where}: {table} has no setting '{field}'", hint=did_you_mean(field, list(hints)))
        hint = hints[field]
        try:
            made = msgspec.convert(_as_typed(value, hint), hint)
            numbers = [v for v in (made if isinstance(made, tuple) else [made]) if isinstance(v, float)]
            if not all(map(math.isfinite, numbers)):
                raise msgspec.ValidationError("Expected a finite number")
            yield field, made
        except msgspec.ValidationError as error:
            if typing.get_args(hint) == (str, str):  # `env`, whose values may be secrets
                pairs = value.items() if isinstance(value, Mapping) else ()
                wrong = next((k for k, v in pairs if not isinstance(v, str)), "NAME")
                raise UsageError(
                    f"{argument_without_secrets(where)}: {table}.{field} holds texts by their names, and nothing else",
                    hint=f'{field} = {{ {wrong} = "…" }}',
                ) from None
            raise UsageError(
                f"{where}: {table}.{field} = {value!r} does not fit: {_plain(str(error))}",
                hint=f"it must be {_type_words(hint)}",
            ) from error


def _as_typed(value: Any, hint: Any) -> Any:
    """A list may be typed as `a,b`, and a text that looks like a number is a text."""
    if isinstance(value, str) and typing.get_origin(hint) is tuple:
        return value.split(",") if value else []
    texts = hint is str or set(typing.get_args(hint)) == {str, type(None)}
    if texts and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return value


def _fields(kind: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _type_words(hint: Any) -> str:
    """The type as a person says it.

    >>> _type_words(int), _type_words(tuple[str, ...]), _type_words(typing.Literal["a", "b"])
    ('a whole number', 'a list, each text', "one of 'a', 'b'")
    """
    names = {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
        type(None): "left out",
    }
    if hint in names:
        return names[hint]
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return f"a list, each {_type_words(arguments[0])}"
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(repr(a) for a in arguments)
    return " or ".join(_type_words(a) for a in arguments) if arguments else str(hint)


def _plain(text: str) -> str:
    """msgspec's sentence without its path.

    >>> _plain("Expected `int`, got `str` - at `$`")
    'expected int, got str'
    """
    return (text[:1].lower() + text[1:]).replace("`", "").partition(" - at")[0]


def _nested(names: Sequence[str], value: Any) -> dict[str, Any]:
    for name in reversed(names):
        value = {name: value}
    table: dict[str, Any] = value
    return table


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except (ValueError, RecursionError):
        return text
