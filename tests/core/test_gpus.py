"""Which card a gres name means, and what it can do."""

from __future__ import annotations

import pytest

from hpc.core import gpus
from hpc.core.errors import UsageError


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("a100", "A100-80"),
        ("a100-40", "A100-40"),
        ("nvidia_a100-sxm4-40gb", "A100-40"),
        ("NVIDIA-A100-SXM4-80GB", "A100-80"),
        ("nvidia_a100_80gb_pcie", "A100-PCIe-80"),
        ("a100-pcie-40gb", "A100-PCIe-40"),
        ("NVIDIA-H100-80GB-HBM3", "H100"),
        ("h100_nvl", "H100-NVL"),
        ("h100_pcie", "H100-PCIe"),
        ("tesla_t4", "T4"),
        ("l40s", "L40S"),
        ("rtx6000ada", "RTX-6000-Ada"),
        ("gb200", "GB200"),
    ],
)
def test_a_gres_type_means_a_card(name: str, card: str) -> None:
    found = gpus.find(name)
    assert found is not None
    assert found.card.name == card


@pytest.mark.parametrize("name", ["", "gpu", "gtx1080", "tpu"])
def test_what_means_no_card_is_none(name: str) -> None:
    assert gpus.find(name) is None


def test_a_name_that_leaves_the_memory_open_says_so() -> None:
    for name, guessed in (("a100", True), ("a100-40", False), ("h100", False), ("v100", True)):
        found = gpus.find(name)
        assert found is not None
        assert found.guessed is guessed, name


@pytest.mark.parametrize(
    ("name", "memory", "compute"),
    [("1g.10gb", 9.7, (8, 0)), ("a100_3g.40gb", 38.8, (8, 0)), ("h100.1g.10gb", 9.7, (9, 0)), ("1g.5gb", 4.8, (8, 0))],
)
def test_a_mig_slice_has_the_memory_of_its_profile(name: str, memory: float, compute: tuple[int, int]) -> None:
    found = gpus.find(name)
    assert found is not None
    assert (found.card.memory_gib, found.card.compute) == (memory, compute)
    assert found.card.slice
    assert found.card.nvlink == 1


def test_every_slice_is_smaller_than_its_card() -> None:
    for card in gpus.CARDS.values():
        for profile in card.mig:
            found = gpus.find(profile)
            assert found is not None
            assert found.card.memory_gib <= card.memory_gib, (card.name, profile)


def test_what_a_card_calculates_in() -> None:
    able = {name: (c.bf16, c.fp8, c.fp4) for name, c in gpus.CARDS.items()}
    assert able["V100-32"] == able["T4"] == (False, False, False)
    assert able["A100-80"] == able["A30"] == (True, False, False)
    assert able["L40S"] == able["H100"] == able["GH200-96"] == (True, True, False)
    assert able["B200"] == (True, True, True)


def test_the_sites_card() -> None:
    def name(gpu: str | None, gres: str, *types: str) -> str | None:
        found = gpus.of_site(gpu, gres, types)
        return found.card.name if found else None

    assert name("a100-40", "gpu", "h100") == "A100-40", "what the profile says goes first"
    assert name(None, "gpu:h100") == "H100"
    assert name(None, "gpu", "h100") == "H100", "the only type of the partition"
    assert name(None, "gpu", "h100", "a100") is None
    assert name(None, "gpu") is None
    assert name("h100", "gpu:1g.10gb") == "MIG 1g.10gb"
    found = gpus.of_site("h100", "gpu:1g.10gb", ())
    assert found is not None
    assert found.card.fp8, "a slice of an H100 can what an H100 can"


def test_an_unknown_card_in_the_profile_is_an_error() -> None:
    with pytest.raises(UsageError, match="no card 'h10'") as caught:
        gpus.of_site("h10", "gpu", ())
    assert caught.value.hint
