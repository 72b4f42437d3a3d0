"""The cards as data: memory, what they can calculate in, how many NVLink joins; and which gres name means which.

Memory is what nvidia-smi shows as memory.total of the whole card, in GiB (a datasheet's GB is the nominal figure).
Sources: NVIDIA's datasheets of the cards; compute capabilities: developer.nvidia.com/cuda-gpus; FP8 and FP4: the
support matrix of TensorRT-LLM; MIG profiles: docs.nvidia.com/datacenter/tesla/mig-user-guide.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from hpc.core.errors import UsageError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Card:
    """One kind of GPU, or one kind of slice of it."""

    name: str
    memory_gib: float
    compute: tuple[int, int]
    """Compute capability."""
    nvlink: int = 1
    """GPUs that NVLink joins, at most; 1: they talk over PCIe."""
    mig: tuple[str, ...] = ()
    """Profiles of its MIG slices."""
    slice: bool = False
    """It is a MIG slice: no slice reaches another's memory."""

    @property
    def bf16(self) -> bool:
        return self.compute >= (8, 0)

    @property
    def fp8(self) -> bool:
        return self.compute >= (8, 9)

    @property
    def fp4(self) -> bool:
        return self.compute >= (10, 0)


_A100_40 = ("1g.5gb", "1g.10gb", "2g.10gb", "3g.20gb", "4g.20gb", "7g.40gb")
_X100_80 = ("1g.10gb", "1g.20gb", "2g.20gb", "3g.40gb", "4g.40gb", "7g.80gb")
_H100_94 = ("1g.12gb", "1g.24gb", "2g.24gb", "3g.47gb", "4g.47gb", "7g.94gb")
_H100_96 = ("1g.12gb", "1g.24gb", "2g.24gb", "3g.48gb", "4g.48gb", "7g.96gb")
_H200 = ("1g.18gb", "1g.35gb", "2g.35gb", "3g.71gb", "4g.71gb", "7g.141gb")
_B200 = ("1g.23gb", "1g.45gb", "2g.45gb", "3g.90gb", "4g.90gb", "7g.180gb")

CARDS = {
    card.name: card
    for card in (
        Card(name="V100-16", memory_gib=16.0, compute=(7, 0), nvlink=8),
        Card(name="V100-32", memory_gib=32.0, compute=(7, 0), nvlink=8),
        Card(name="T4", memory_gib=15.0, compute=(7, 5)),
        Card(name="A10", memory_gib=22.5, compute=(8, 6)),
        Card(name="A30", memory_gib=24.0, compute=(8, 0), nvlink=2, mig=("1g.6gb", "2g.12gb", "4g.24gb")),
        Card(name="A40", memory_gib=45.0, compute=(8, 6), nvlink=2),
        Card(name="A100-40", memory_gib=40.0, compute=(8, 0), nvlink=8, mig=_A100_40),
        Card(name="A100-80", memory_gib=80.0, compute=(8, 0), nvlink=8, mig=_X100_80),
        Card(name="A100-PCIe-40", memory_gib=40.0, compute=(8, 0), nvlink=2, mig=_A100_40),
        Card(name="A100-PCIe-80", memory_gib=80.0, compute=(8, 0), nvlink=2, mig=_X100_80),
        Card(name="RTX-A6000", memory_gib=48.0, compute=(8, 6), nvlink=2),
        Card(name="L4", memory_gib=22.5, compute=(8, 9)),
        Card(name="L40", memory_gib=45.0, compute=(8, 9)),
        Card(name="L40S", memory_gib=45.0, compute=(8, 9)),
        Card(name="RTX-6000-Ada", memory_gib=48.0, compute=(8, 9)),
        Card(name="H100", memory_gib=79.6, compute=(9, 0), nvlink=8, mig=_X100_80),
        Card(name="H100-PCIe", memory_gib=79.6, compute=(9, 0), nvlink=2, mig=_X100_80),
        Card(name="H100-NVL", memory_gib=93.6, compute=(9, 0), nvlink=2, mig=_H100_94),
        Card(name="H200", memory_gib=140.4, compute=(9, 0), nvlink=8, mig=_H200),
        Card(name="H200-NVL", memory_gib=140.4, compute=(9, 0), nvlink=4, mig=_H200),
        Card(name="GH200-96", memory_gib=95.6, compute=(9, 0), mig=_H100_96),
        Card(name="GH200-144", memory_gib=140.4, compute=(9, 0), mig=_H200),
        Card(name="B200", memory_gib=179.0, compute=(10, 0), nvlink=8, mig=_B200),
        Card(name="GB200", memory_gib=184.0, compute=(10, 0), nvlink=72),
    )
}

_MEANT = {
    "v100": "V100-32",
    "a100": "A100-80",
    "a100sxm": "A100-80",
    "a100sxm4": "A100-80",
    "a100pcie": "A100-PCIe-80",
    "a6000": "RTX-A6000",
    "rtx6000": "RTX-6000-Ada",
    "rtx6000ada": "RTX-6000-Ada",
    "6000ada": "RTX-6000-Ada",
    "h100sxm": "H100",
    "h100sxm5": "H100",
    "h100hbm3": "H100",
    "gh200": "GH200-96",
    "hopper": "H100",
    "ampere": "A100-80",
}
"""Other names -> the card. Where a name leaves the memory open, the one that the DGX systems have."""
_OPEN = {"v100", "a100", "a100sxm", "a100sxm4", "a100pcie", "gh200", "hopper", "ampere"}
_PROFILE = re.compile(r"(\d+)g\.(\d+)gb")


@dataclass(frozen=True, kw_only=True)
class Found:
    """The card that a name means."""

    card: Card
    guessed: bool = False
    """The name leaves open which of several it is."""


def find(name: str) -> Found | None:
    """The card of a gres type or another name, e.g. a100, h100-nvl, NVIDIA_A100-SXM4-40GB, 1g.10gb, a100_3g.40gb.

    None for a name that says nothing ("gpu", "") or is not known.
    """
    profile = _PROFILE.search(name.lower())
    if profile is not None:
        return _slice(profile, find(name[: profile.start()]))
    word = re.sub(r"[^a-z0-9]|nvidia|tesla|geforce", "", name.lower()).removesuffix("gb")
    exact = {re.sub(r"[^a-z0-9]", "", known.lower()): card for known, card in CARDS.items()}
    # A100-SXM4-80GB and H100-80GB-HBM3 say how much memory: that of the card's name, without the form
    forms = (word, re.sub(r"sxm\d?|hbm\d\w?", "", word), re.sub(r"sxm\d?|hbm\d\w?|80gb|80$", "", word))
    for short in (form.removesuffix("gb") for form in forms):
        if short in exact:
            return Found(card=exact[short])
        if short in _MEANT:
            return Found(card=CARDS[_MEANT[short]], guessed=short in _OPEN)
    return None


def named(name: str) -> Card:
    """The card that a site profile names; UsageError, with the nearest name, for one that is not known."""
    found = find(name)
    if found is None:
        raise UsageError(f"site.gpu: there is no card '{name}'", hint=did_you_mean(name, list(CARDS)))
    return found.card


def _slice(profile: re.Match[str], whole: Found | None) -> Found:
    """A slice has the memory that its profile names, less 3 % for what the card keeps."""
    text = profile[0]
    makers = [whole.card] if whole else [card for card in CARDS.values() if text in card.mig]
    oldest = min(makers, key=lambda card: card.compute, default=CARDS["A100-80"])
    memory = round(int(profile[2]) * 0.97, 1)
    card = replace(oldest, name=f"MIG {text}", memory_gib=memory, nvlink=1, mig=(), slice=True)
    return Found(card=card, guessed=whole is None and len({m.compute for m in makers}) != 1)


def of_site(gpu: str | None, gres: str, types: Iterable[str]) -> Found | None:
    """The card of a site: the one that it names, else its gres type, else the only type of the partition's nodes."""
    _, _, kind = gres.partition(":")
    if gpu:
        card = named(gpu)
        profile = _PROFILE.search(kind.lower())
        return _slice(profile, Found(card=card)) if profile and not card.slice else Found(card=card)
    if kind:
        return find(kind)
    known = {found.card.name: found for found in map(find, types) if found is not None}
    return next(iter(known.values())) if len(known) == 1 else None
