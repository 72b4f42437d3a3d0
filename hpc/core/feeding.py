"""Where each input of a stage comes from: the settings, an earlier stage, or what an earlier stage was given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpc.core.errors import Refused, UsageError
from hpc.core.stage import Kind, Stage

if TYPE_CHECKING:
    from hpc.core.plan import Facts, Planned, Wish


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where one input of a stage comes from."""

    name: str
    kind: Kind
    stage: str | None
    """The stage of this plan that produces it, or None: it is there already."""
    value: str
    """The output's name there, or the absolute path, or the model's name on the hub."""
    key: str
    """Key of the producing stage, or the content's hash."""


def source(
    wish: Wish,
    name: str,
    planned: Mapping[str, Planned],
    order: Sequence[str],
    wishes: Mapping[str, Wish],
    facts: Facts,
) -> Source | None:
    """Where the input comes from; None for one that may be missing and is."""
    stage, kind = wish.stage, wish.stage.consumes[name].kind
    asker = asker_of(name, stage.name, order, wishes)
    found = producer(kind, asker, order, wishes)
    given = getattr(wishes[asker].config, name, None)
    if given is None and found is None:
        given = _given_before(name, kind, asker, order, wishes)
    if given is not None:
        path = facts.path(given)
        folder = given.partition("/")[0]
        ours = is_hub_name(given) and facts.path(folder) is not None  # models/NAME, where the project has models/
        far = (is_hub_name(given) and not ours) or given.startswith(("http://", "https://"))
        if path is None and kind == "hf_model" and far:
            return Source(name=name, kind=kind, stage=None, value=given, key=f"hub:{given}")
        if kind == "endpoint":
            return Source(name=name, kind=kind, stage=None, value=path or given, key=_served(given, path, stage, facts))
        if path is None:
            raise UsageError(
                f"{stage.name}.{name}: there is no '{given}'",
                hint=f"the project has a folder {folder}: give what lies in it"
                if ours
                else "give a folder or file that exists"
                + (", or a model's name on the hub (organisation/name)" if kind == "hf_model" else ""),
            )
        return Source(name=name, kind=kind, stage=None, value=path, key=facts.digest(path))
    if found is None and stage.consumes[name].optional:
        return None
    if found is None:
        raise Refused(
            f"{stage.name} needs a {kind} as '{name}', and no stage before it in the pipeline makes one",
            hint=f"set {stage.name}.{name}, or put the stage that makes it into pipeline.stages",
        )
    return Source(name=name, kind=kind, stage=found[0], value=found[1], key=planned[found[0]].key)


def _served(given: str, path: str | None, stage: Stage, facts: Facts) -> str:
    """The key of an endpoint: what the serving stage serves, wherever it runs; of another service its address."""
    if given.startswith(("http://", "https://")):
        return f"address:{given}"
    key = (facts.document(path) or {}).get("key") if path is not None else None
    if key is None:
        raise UsageError(
            f"{stage.name}.endpoint: '{given}' is not the folder of a serving stage",
            hint="give runs/RUN/serve, of a run that `hpc status` shows, or http://…/v1",
        )
    return f"served:{key}"


def asker_of(name: str, stage: str, order: Sequence[str], wishes: Mapping[str, Wish]) -> str:
    """The stage whose input of that name it is: for an original one the first stage that has it too."""
    own = wishes[stage]
    if own.stage.consumes[name].original and getattr(own.config, name, None) is None:
        for earlier in order[: order.index(stage)]:
            wanted = wishes[earlier].stage.consumes.get(name)
            if wanted is not None and wanted.kind == own.stage.consumes[name].kind:
                return earlier
    return stage


def producer(kind: Kind, before: str, order: Sequence[str], wishes: Mapping[str, Wish]) -> tuple[str, str] | None:
    """(stage, output name) of the nearest stage ahead of `before` that produces the kind."""
    for name in reversed(order[: order.index(before)]):
        for output, artifact in wishes[name].stage.outputs(wishes[name].config).items():
            if artifact.kind == kind:
                return name, output
    return None


def _given_before(name: str, kind: Kind, before: str, order: Sequence[str], wishes: Mapping[str, Wish]) -> str | None:
    """What an earlier stage was given as its input of the same name: merge takes finetune's base_model."""
    for earlier in reversed(order[: order.index(before)]):
        wanted = wishes[earlier].stage.consumes.get(name)
        value = getattr(wishes[earlier].config, name, None)
        if wanted is not None and wanted.kind == kind and value is not None:
            return str(value)
    return None


def model_behind(name: str, order: Sequence[str], wishes: Mapping[str, Wish]) -> str | None:
    """What the settings give as the model from which, at the end, the stage's own hf_model comes."""
    stage = wishes[name].stage
    for given, wanted in stage.consumes.items():
        if wanted.kind != "hf_model":
            continue
        text = getattr(wishes[name].config, given, None)
        if text is not None:
            return str(text)
        found = producer(wanted.kind, name, order, wishes)
        return model_behind(found[0], order, wishes) if found else _given_before(given, "hf_model", name, order, wishes)
    return None


def in_place(one: Wish, wishes: Sequence[Wish]) -> list[Wish]:
    """With a stage that the pipeline leaves out: before the first it can feed where it needs none of them, or last."""
    needs = [name for name, wanted in one.stage.consumes.items() if not wanted.optional]
    made = {artifact.kind for artifact in one.stage.outputs(one.config).values()}
    fed = (i for i, w in enumerate(wishes) if made & {wanted.kind for wanted in w.stage.consumes.values()})
    alone = all(getattr(one.config, name, None) is not None for name in needs)
    place = next(fed, len(wishes)) if alone else len(wishes)
    return [*wishes[:place], one, *wishes[place:]]


def closure(wanted: Sequence[str], wishes: Mapping[str, Wish], order: Sequence[str]) -> set[str]:
    needed: set[str] = set()
    waiting = list(wanted)
    while waiting:
        name = waiting.pop()
        if name in needed:
            continue
        needed.add(name)
        wish = wishes[name]
        for given, wanted_input in wish.stage.consumes.items():
            asker = asker_of(given, name, order, wishes)
            if getattr(wishes[asker].config, given, None) is None:
                found = producer(wanted_input.kind, asker, order, wishes)
                if found:
                    waiting.append(found[0])
    return needed


def is_hub_name(text: str) -> bool:
    """True for organisation/name.

    >>> is_hub_name("meta-llama/Llama-2-7b-chat-hf"), is_hub_name("./models/x"), is_hub_name("models/x.gguf")
    (True, False, False)
    """
    head, slash, tail = text.partition("/")
    return bool(slash and head and tail) and "/" not in tail and head[0] not in "./~" and not tail.endswith(".gguf")
