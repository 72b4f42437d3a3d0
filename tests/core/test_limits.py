"""What a partition cannot give is refused before Slurm would let it wait for ever."""

from __future__ import annotations

from typing import Any

import pytest

from hpc.core.errors import Refused
from hpc.core.limits import NodeKind, Partition, refuse
from hpc.core.site import Site
from hpc.core.stage import Resources
from tests.core.fakes import partition

SMALL = NodeKind(count=10, cpus=16, mem_gb=64, gpus={})
BIG = NodeKind(count=2, cpus=128, mem_gb=2000, gpus={"h100": 8})
OLD = NodeKind(count=4, cpus=64, mem_gb=500, gpus={"v100": 4})


def site(**values: Any) -> Site:
    return Site(**{"name": "dgx", "scheduler": "slurm", "partition": "batch", "gres": "gpu", **values})


def refusal(asked: Resources, where: Site, *partitions: Partition) -> Refused:
    with pytest.raises(Refused) as caught:
        refuse("finetune", asked, where, {p.name: p for p in partitions})
    return caught.value


def allow(asked: Resources, where: Site, *partitions: Partition) -> None:
    refuse("finetune", asked, where, {p.name: p for p in partitions})


def test_unknown_partition_names_the_nearest() -> None:
    error = refusal(Resources(), site(partition="bacth"), partition("batch"), partition("debug"))
    assert error.message == "this cluster has no partition 'bacth'"
    assert error.hint == "did you mean 'batch'?"


def test_partition_that_is_down_is_refused() -> None:
    error = refusal(Resources(), site(), partition(up=False), partition("spare"))
    assert error.message == "partition 'batch' is down"
    assert "spare" in error.hint


def test_without_a_partition_the_default_one_counts() -> None:
    error = refusal(
        Resources(time_min=60), site(partition=None), partition("debug", default=True, time_min=30), partition()
    )
    assert "partition 'debug' allows 30 min" in error.message


def test_without_a_partition_and_a_default_nothing_is_refused() -> None:
    allow(Resources(time_min=10**6), site(partition=None), partition(time_min=1))


def test_time_above_the_limit_names_the_longer_partitions() -> None:
    error = refusal(
        Resources(time_min=60),
        site(),
        partition(time_min=30),
        partition("long", time_min=600),
        partition("off", up=False),
    )
    assert "asks for 60 min, but partition 'batch' allows 30 min" in error.message
    assert error.hint == "--time 30 or less, or another --partition (long)"


@pytest.mark.parametrize("limit", [60, 61, None])
def test_time_up_to_the_limit_is_allowed(limit: int | None) -> None:
    allow(Resources(time_min=60), site(), partition(time_min=limit))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (Resources(gpus_per_node=9), "9 GPUs"),
        (Resources(cpus_per_task=129), "129 CPUs"),
        (Resources(mem_gb=1001), "1001 GiB"),
    ],
)
def test_more_than_a_node_has_is_refused_and_says_what_it_has(asked: Resources, said: str) -> None:
    error = refusal(asked, site(), partition())
    assert said in error.message
    assert "has no such node" in error.message
    assert error.hint == "partition 'batch' has: 4 nodes with 128 CPUs, 1000 GiB, 8 GPUs (a100)"


@pytest.mark.parametrize(
    "asked", [Resources(gpus_per_node=8), Resources(cpus_per_task=128), Resources(mem_gb=1000), Resources(nodes=4)]
)
def test_all_that_a_node_has_is_allowed(asked: Resources) -> None:
    allow(asked, site(), partition())


def test_more_nodes_than_there_are_is_refused() -> None:
    error = refusal(Resources(nodes=5), site(), partition())
    assert error.message == "finetune asks for 5 nodes, and partition 'batch' has 4 that fit"


def test_unknown_gres_type_is_refused() -> None:
    error = refusal(Resources(gpus_per_node=1), site(gres="gpu:h100"), partition())
    assert "1 GPUs of type h100" in error.message
    assert "8 GPUs (a100)" in error.hint


def test_gres_type_counts_only_its_own_gpus() -> None:
    mixed = partition("batch", NodeKind(count=1, cpus=64, mem_gb=64, gpus={"a100": 2, "v100": 6}))
    allow(Resources(gpus_per_node=8), site(gres="gpu"), mixed)
    refusal(Resources(gpus_per_node=3), site(gres="gpu:a100"), mixed)


def test_mig_slices_are_a_gres_type() -> None:
    mig = partition("batch", NodeKind(count=1, cpus=64, mem_gb=64, gpus={"1g.10gb": 56}))
    allow(Resources(gpus_per_node=1), site(gres="gpu:1g.10gb"), mig)
    refusal(Resources(gpus_per_node=1), site(gres="gpu:3g.40gb"), mig)


def test_mixed_partition_allows_what_one_of_its_kinds_has() -> None:
    allow(Resources(gpus_per_node=8, nodes=2), site(), partition("batch", SMALL, BIG, OLD))
    allow(Resources(cpus_per_task=16, nodes=16), site(), partition("batch", SMALL, BIG, OLD))


def test_mixed_partition_counts_only_the_nodes_that_fit() -> None:
    error = refusal(Resources(gpus_per_node=8, nodes=3), site(), partition("batch", SMALL, BIG, OLD))
    assert error.message == "finetune asks for 3 nodes, and partition 'batch' has 2 that fit"


def test_one_node_must_have_everything_at_once() -> None:
    refusal(Resources(gpus_per_node=4, mem_gb=1000), site(), partition("batch", SMALL, OLD))


def test_memory_that_is_not_asked_for_is_not_looked_at() -> None:
    allow(Resources(mem_gb=10**6), site(mem=False), partition())


def test_gpus_that_are_not_asked_for_are_not_looked_at() -> None:
    allow(Resources(gpus_per_node=1), site(gpus="none"), partition("batch", SMALL))


def test_type_is_not_looked_at_where_gpus_are_asked_for_without_one() -> None:
    allow(Resources(gpus_per_node=8), site(gpus="gpus_per_node", gres="gpu:other"), partition())


def test_partition_without_nodes_says_so() -> None:
    assert refusal(Resources(), site(), partition(nodes=())).hint == "partition 'batch' has: no nodes"
