"""The plan: what is needed, what feeds what, which key a result has, and what is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpc.core import stage as stages
from hpc.core.errors import HpcError, Refused, UsageError
from hpc.core.feeding import producer
from hpc.core.limits import fit
from hpc.core.plan import Plan, Wish, plan
from hpc.core.site import Site
from hpc.core.stage import Input, Resources
from tests.core.fakes import FakeFacts, chain, make, partition, wish

SLURM = Site(name="dgx", scheduler="slurm", partition="batch", gres="gpu:a100")
LOCAL = Site(name="local", gpus="none")


def planned(
    wishes: Sequence[Wish] | None = None, wanted: Sequence[str] = ("merge",), site: Site = SLURM, **facts: Any
) -> Plan:
    """A plan of the chain, or of these wishes, in a world of `facts`."""
    return plan(wishes or [wish(s) for s in chain()], wanted, site, FakeFacts(**facts))


def keys(facts: FakeFacts, **prepare: Any) -> dict[str, str]:
    first, *rest = chain()
    return plan([wish(first, **prepare), *map(wish, rest)], ["merge"], SLURM, facts).keys


def changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return [name for name in before if before[name] != after[name]]


def test_plan_has_the_wanted_stage_and_all_that_it_needs_in_order() -> None:
    assert [p.name for p in planned().stages] == ["prepare", "finetune", "merge"]


def test_plan_leaves_out_what_is_not_needed() -> None:
    assert [p.name for p in planned(wanted=["finetune"]).stages] == ["prepare", "finetune"]


def test_stage_with_nothing_to_do_needs_nothing() -> None:
    first, second, third = chain()
    made = planned([wish(first), wish(second), wish(replace(third, unneeded=lambda config: "all is there"))])
    assert (made.stages, made.notes) == ((), ("merge: nothing to do, all is there",))


def test_input_given_in_the_settings_needs_no_producer() -> None:
    first, second, third = chain()
    made = planned([wish(first), wish(second, dataset="mine"), wish(third)], files={"mine": "x"})
    assert [p.name for p in made.stages] == ["finetune", "merge"]
    (source,) = made.stages[0].sources
    assert (source.stage, source.value) == (None, "/project/mine")
    assert made.stages[0].reads == ("/project/mine",)


def test_what_counts_by_its_content_is_written_down_with_it() -> None:
    stage = make("finetune", consumes={"dataset": "dataset", "model": "hf_model"})
    files = {"mine": "y", "a": "x", "b": "x"}
    (one,) = planned([wish(stage, dataset="mine", model="org/one", data=("a", "b"))], ["finetune"], files=files).stages
    x, y = (hashlib.sha256(text).hexdigest() for text in (b"x", b"y"))
    document = one.document(inputs={}, out=Path("/out"), cache=Path("/cache"))
    assert document["reads"] == {"/project/mine": y, "/project/a": x, "/project/b": x}, "a hub name is no content"


def test_stage_waits_for_its_producer() -> None:
    assert [p.needs for p in planned().stages] == [(), ("prepare",), ("finetune",)]


def test_stage_waits_once_for_a_producer_of_two_inputs() -> None:
    stages = [make("prepare"), make("both", consumes={"one": "dataset", "two": "dataset"})]
    made = planned([wish(s) for s in stages], ["both"])
    assert made.stages[1].needs == ("prepare",)


def test_nearest_producer_ahead_is_taken() -> None:
    stages = [make("old"), make("new"), make("use", consumes={"dataset": "dataset"}), make("late")]
    assert producer("dataset", "use", [s.name for s in stages], {s.name: wish(s) for s in stages}) == ("new", "dataset")
    assert [p.name for p in planned([wish(s) for s in stages], ["use"]).stages] == ["new", "use"]


def test_paths_in_the_config_become_absolute() -> None:
    made = planned(
        [wish(make("prepare"), data=("a.jsonl", "b.jsonl"))], ["prepare"], files={"a.jsonl": "", "b.jsonl": ""}
    )
    assert made.stages[0].config.data == ("/project/a.jsonl", "/project/b.jsonl")


def test_slices_do_not_train_together() -> None:
    site = replace(SLURM, gres="gpu:1g.10gb")
    first, second, _ = chain()
    stages = replace(second, launcher="torchrun")
    with pytest.raises(Refused, match="slices can't train together") as error:
        planned([wish(first), replace(wish(stages), overrides={"gpus_per_node": 2})], ["finetune"], site)
    assert "gpus_per_node = 1" in error.value.hint
    planned([wish(first), replace(wish(stages), overrides={"gpus_per_node": 1})], ["finetune"], site)


# ---- keys


def test_a_named_path_is_found_and_its_name_counts() -> None:
    files = {"a": "one", "x=1": "two", "other/a": "one"}
    stage = replace(make("prepare"), files=lambda c: tuple(d if d in files else d.partition("=")[2] for d in c.data))

    def made(*data: str) -> Plan:
        return planned([wish(stage, data=data)], ["prepare"], files=files)

    assert made("n=a", "x=1").stages[0].config.data == ("n=/project/a", "/project/x=1")
    assert made("n=a").keys == made("n=other/a").keys != made("m=a").keys


def test_key_is_the_same_twice() -> None:
    assert keys(FakeFacts()) == keys(FakeFacts())


def test_key_does_not_see_where_the_same_content_lies() -> None:
    here = keys(FakeFacts(files={"a": "text"}), data=("a",))
    there = keys(FakeFacts(files={"other/b": "text"}, root="/elsewhere"), data=("other/b",))
    assert here == there


def test_key_does_not_see_where_an_input_lies() -> None:
    stage = make("finetune", consumes={"dataset": "dataset"})
    here = planned([wish(stage, dataset="a")], ["finetune"], files={"a": "text"}).keys
    there = planned([wish(stage, dataset="b")], ["finetune"], files={"b": "text"}, root="/x").keys
    assert here == there


@pytest.mark.parametrize(
    ("what", "after"),
    [
        ("a file's content", lambda: keys(FakeFacts(files={"a": "new"}), data=("a",))),
        ("a setting", lambda: keys(FakeFacts(files={"a": "text"}), data=("a",), rank=9)),
        ("the stage's source", lambda: keys(FakeFacts(files={"a": "text"}, sources={"prepare": b"new"}), data=("a",))),
        ("the environment", lambda: keys(FakeFacts(files={"a": "text"}, image="image-2"), data=("a",))),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_key_changes_for_the_stage_and_all_that_follow_with(what: str, after: Any) -> None:
    before = keys(FakeFacts(files={"a": "text"}), data=("a",))
    assert changed(before, after()) == ["prepare", "finetune", "merge"], what


def test_key_of_earlier_stages_stays_when_a_later_one_changes() -> None:
    before, after = keys(FakeFacts()), keys(FakeFacts(sources={"merge": b"new"}))
    assert changed(before, after) == ["merge"]


def test_key_sees_the_order_of_files() -> None:
    world = FakeFacts(files={"a": "1", "b": "2"})
    assert keys(world, data=("a", "b")) != keys(world, data=("b", "a"))


def test_key_sees_a_file_that_is_named_twice() -> None:
    world = FakeFacts(files={"a": "1"})
    assert keys(world, data=("a",)) != keys(world, data=("a", "a"))


def test_key_does_not_see_resources() -> None:
    few = planned([wish(make("prepare"), resources={"cpus_per_task": 1})], ["prepare"]).keys
    many = planned([wish(make("prepare"), resources={"cpus_per_task": 64})], ["prepare"]).keys
    assert few == many


def test_key_of_a_hub_model_is_its_name() -> None:
    stage = make("finetune", consumes={"model": "hf_model"})
    one = planned([wish(stage, model="org/one")], ["finetune"])
    two = planned([wish(stage, model="org/two")], ["finetune"])
    assert one.keys != two.keys
    assert one.stages[0].sources[0].value == "org/one"
    assert one.stages[0].reads == (), "a hub name is no path"


def test_model_that_a_folder_of_the_project_lacks_is_none_of_the_hub() -> None:
    stage = make("finetune", consumes={"model": "hf_model"})
    with pytest.raises(UsageError, match=r"finetune\.model: there is no 'models/tny'") as refused:
        planned([wish(stage, model="models/tny")], ["finetune"], files={"models": "", "models/tiny": "weights"})
    assert refused.value.hint == "the project has a folder models: give what lies in it"


# ---- resources


def test_overrides_replace_single_resources() -> None:
    stage = make("prepare", resources=Resources(mem_gb=7, time_min=9))
    made = planned([wish(stage, resources={"time_min": 30})], ["prepare"])
    assert made.stages[0].resources == Resources(mem_gb=7, time_min=30)


def test_site_without_gpus_runs_on_the_cpu_and_says_so() -> None:
    stage = make("finetune", resources=Resources(gpus_per_node=1))
    made = planned([wish(stage)], ["finetune"], LOCAL)
    assert made.stages[0].resources.gpus_per_node == 0
    assert made.notes == ("finetune: site 'local' gives no GPUs, it runs on the CPU",)


@pytest.mark.parametrize("field", ["nodes", "cpus_per_task", "mem_gb", "time_min"])
@pytest.mark.parametrize("value", [0, -1])
def test_resources_must_be_positive(field: str, value: int) -> None:
    with pytest.raises(UsageError, match="must be positive"):
        fit(make("prepare"), replace(Resources(), **{field: value}), SLURM, None)


def test_gpus_must_not_be_negative() -> None:
    with pytest.raises(UsageError, match="must be positive"):
        fit(make("prepare"), Resources(gpus_per_node=-1), SLURM, None)


# ---- refusals


def refusal(wishes: Sequence[Wish], wanted: str, site: Site = SLURM, **facts: Any) -> HpcError:
    with pytest.raises(HpcError) as caught:
        planned(wishes, [wanted], site, **facts)
    assert caught.value.hint, "every refusal says what to do"
    return caught.value


def test_no_producer_is_refused() -> None:
    error = refusal([wish(make("finetune", consumes={"dataset": "dataset"}))], "finetune")
    assert isinstance(error, Refused)
    assert error.message == ("finetune needs a dataset as 'dataset', and no stage before it in the pipeline makes one")
    assert "finetune.dataset" in error.hint


def test_producer_that_stands_behind_does_not_count() -> None:
    wishes = [wish(make("finetune", consumes={"dataset": "dataset"}, produces="lora_adapter")), wish(make("prepare"))]
    assert isinstance(refusal(wishes, "finetune"), Refused)


def test_gpus_that_one_process_cannot_use_are_refused() -> None:
    error = refusal([wish(make("finetune"), resources={"gpus_per_node": 2})], "finetune")
    assert isinstance(error, Refused)
    assert "is one process" in error.message


def test_a_stage_of_several_processes_can_use_gpus_on_several_nodes() -> None:
    ranks = replace(make("finetune"), launcher="torchrun")
    wide = wish(ranks, resources={"nodes": 2, "gpus_per_node": 8})
    assert planned([wide], ["finetune"]).stages[0].resources.gpus == 16
    assert "this machine alone" in refusal([wide], "finetune", LOCAL).message


def test_an_original_input_is_what_the_first_stage_got_and_not_what_any_made() -> None:
    tuned = make("tune", consumes={"model": "hf_model"}, produces="hf_model")
    judge = make("judge", consumes={"dataset": "hf_model", "model": "hf_model"})
    judge = replace(judge, consumes={**judge.consumes, "model": Input(kind="hf_model", optional=True, original=True)})
    names = {"dataset": ("tune", "hf_model"), "model": (None, "/project/base")}
    given = planned([wish(tuned, model="base"), wish(judge)], ["judge"], files={"base": "x"})
    assert {s.name: (s.stage, s.value) for s in given.stages[-1].sources} == names
    fetched = planned([wish(make("fetch", produces="hf_model")), wish(tuned), wish(judge)], ["judge"])
    assert {s.name: s.stage for s in fetched.stages[-1].sources} == {"dataset": "tune", "model": "fetch"}
    again = make("merge", consumes={"model": "hf_model"}, produces="hf_model")
    twice = planned([wish(tuned, model="base"), wish(again), wish(judge)], ["judge"], files={"base": "x"})
    assert {s.name: (s.stage, s.value) for s in twice.stages[-1].sources} == {**names, "dataset": ("merge", "hf_model")}
    own = planned([wish(tuned, model="base"), wish(judge, model="other")], ["judge"], files={"base": "x", "other": "y"})
    assert {s.name: s.value for s in own.stages[-1].sources}["model"] == "/project/other"


def test_several_nodes_on_this_machine_are_refused() -> None:
    error = refusal([wish(make("finetune"), resources={"nodes": 2})], "finetune", LOCAL)
    assert isinstance(error, Refused)
    assert "this machine alone" in error.message


def test_input_that_is_not_there_is_a_usage_error() -> None:
    error = refusal([wish(make("finetune", consumes={"dataset": "dataset"}), dataset="none")], "finetune")
    assert isinstance(error, UsageError)
    assert error.message == "finetune.dataset: there is no 'none'"
    assert "hub" not in error.hint


def test_model_that_is_not_there_may_be_a_hub_name() -> None:
    error = refusal([wish(make("finetune", consumes={"model": "hf_model"}), model="./none")], "finetune")
    assert "hub" in error.hint


def test_data_file_that_is_not_there_is_a_usage_error() -> None:
    error = refusal([wish(make("prepare"), data=("none.jsonl",))], "prepare")
    assert isinstance(error, UsageError)
    assert "'none.jsonl' is not there" in error.message


def test_missing_environment_is_refused() -> None:
    with pytest.raises(Refused, match="environment 'train' is not there"):
        planned(missing_image=True)


def test_check_of_the_stage_sees_absolute_paths_and_may_refuse() -> None:
    seen = []

    def check(config: Any) -> None:
        seen.append(config.data)
        raise UsageError("no good")

    with pytest.raises(UsageError, match="no good"):
        planned([wish(make("prepare", check=check), data=("a",))], ["prepare"], files={"a": ""})
    assert seen == [("/project/a",)]


def test_limits_of_the_partition_are_asked_for_each_stage() -> None:
    first, second, third = chain()
    wishes = [wish(first), wish(second), wish(third, resources={"time_min": 100})]
    with pytest.raises(Refused, match="merge asks for 100 min"):
        planned(wishes, partitions={"batch": partition(time_min=90)})


# ---- what one stage asks for itself


def test_sbatch_options_of_one_stage_are_its_own() -> None:
    first, second, third = chain()
    own = replace(wish(second), sbatch={"partition": "cpu", "constraint": "big"})
    site = replace(SLURM, sbatch={"reservation": "r", "constraint": "any"})
    made = planned([wish(first), own, wish(third)], site=site)
    assert [p.site.partition for p in made.stages] == ["batch", "cpu", "batch"]
    assert made.stages[1].site.sbatch == {"reservation": "r", "constraint": "big"}
    assert made.stages[0].site == site


def test_limits_of_a_stages_own_partition_count() -> None:
    own = replace(wish(make("prepare")), sbatch={"partition": "debug"})
    limits = {"batch": partition(), "debug": partition("debug", time_min=1)}
    with pytest.raises(Refused, match="partition 'debug' allows 1 min"):
        planned([own], ["prepare"], partitions=limits)


def test_input_that_an_earlier_stage_was_given_is_taken_over() -> None:
    stages = [make("finetune", consumes={"model": "hf_model"}), make("merge", consumes={"model": "hf_model"})]
    made = planned([wish(stages[0], model="org/m"), wish(stages[1])], ["merge"])
    assert made.stages[-1].sources[0].value == "org/m"


def test_input_of_another_name_is_not_taken_over() -> None:
    finetune = make("finetune", consumes={"dataset": "dataset"}, produces="lora_adapter")
    merge = make("merge", consumes={"other": "dataset"})
    error = refusal([wish(finetune, dataset="d"), wish(merge)], "merge", files={"d": ""})
    assert error.message.startswith("merge needs a dataset as 'other'")


# ---- a service as an input


def asked(given: str, **facts: Any) -> Plan:
    return planned([wish(make("ask", consumes={"endpoint": "endpoint"}), endpoint=given)], ["ask"], **facts)


def test_an_endpoint_counts_by_what_is_served_and_not_by_where() -> None:
    runs = {"runs/a/serve": "x", "runs/b/serve": "y", "runs/c/serve": "z"}
    documents = {f"runs/{run}/serve": {"key": key} for run, key in (("a", "7"), ("b", "7"), ("c", "8"))}
    one, same, other = (asked(path, files=runs, models=documents) for path in runs)
    assert (one.stages[0].reads, one.stages[0].digests) == (("/project/runs/a/serve",), {})
    assert one.keys == same.keys
    assert one.keys != other.keys


def test_an_endpoint_can_be_the_address_of_another_service() -> None:
    (stage,) = asked("http://there:8000/v1").stages
    assert (stage.sources[0].value, stage.reads) == ("http://there:8000/v1", ())


@pytest.mark.parametrize("files", [{}, {"serve": "a folder of something else"}])
def test_an_endpoint_that_is_none_is_refused(files: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="'serve' is not the folder of a serving stage"):
        asked("serve", files=files)


# ---- the real stages


def _real(**configs: Any) -> list[Wish]:
    loaded = {name: stages.load(name) for name in ("fetch", "prepare", "finetune", "merge")}
    return [Wish(stage=s, config=s.config(**configs.get(name, {})), overrides={}) for name, s in loaded.items()]


@pytest.mark.parametrize("model", ["org/name", "https://a.org/x.gguf"])
def test_what_is_fetched_feeds_the_stages_that_follow(model: str) -> None:
    wishes = _real(fetch={"model": model, "datasets": ("org/faq",)})
    found = {p.name: p for p in plan(wishes, ["merge"], SLURM, FakeFacts()).stages}
    assert list(found) == ["fetch", "prepare", "finetune", "merge"]
    given = {name: {s.name: (s.stage, s.value) for s in p.sources} for name, p in found.items()}
    assert given["prepare"] == {"records": ("fetch", "data"), "tokenizer": ("fetch", "model")}
    assert given["finetune"]["base_model"] == given["merge"]["base_model"] == ("fetch", "model")
    assert given["fetch"] == {"model": (None, model)}


def test_a_fetch_of_nothing_is_left_out() -> None:
    facts = FakeFacts({"rows.jsonl": "x"})
    wishes = _real(prepare={"data": ("rows.jsonl",)}, finetune={"base_model": "org/base"})
    wishes[1] = replace(wishes[1], stage=replace(wishes[1].stage, check=None))
    made = plan(wishes, ["fetch", "prepare", "finetune", "merge"], SLURM, facts)
    assert [p.name for p in made.stages] == ["prepare", "finetune", "merge"]
    assert made.notes[0] == "fetch: nothing to do, no fetch.model and no fetch.datasets is named"
