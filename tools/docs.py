"""docs/cli.md out of the real `--help` of every verb, docs/settings.md out of the dataclasses; broken links.

--check: write nothing, fail where one of them would differ.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.update(COLUMNS="100", PYTHON_COLORS="0")  # read by argparse: help must not depend on the terminal

import settings_page

from hpc.login.cli import parser

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
HEAD = """\
# The command line

<!-- Written by `make docs` out of `hpc --help` and `hpc COMMAND --help`. -->
"""


def main() -> int:
    options = argparse.ArgumentParser(description="Write the reference pages and check links.")
    options.add_argument("--check", action="store_true", help="write nothing, fail where they would differ")
    check = options.parse_args().check
    problems = list(broken_links())
    pages = {DOCS / "cli.md": HEAD + "".join(sections(parser())), DOCS / "settings.md": settings_page.page()}
    for path, text in pages.items():
        if not check:
            path.write_text(text, encoding="utf-8")
            print(f"{path.relative_to(ROOT)} is written")
        elif not path.is_file() or words(path.read_text(encoding="utf-8")) != words(text):
            problems.append(f"{path.relative_to(ROOT)} is out of date: make docs")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def sections(command: argparse.ArgumentParser) -> Iterator[str]:
    """One section for a command, and for each of its own commands."""
    yield f"\n## `{command.prog}`\n\n```text\n{command.format_help().strip()}\n```\n"
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from sections(below)


def words(text: str) -> list[str]:
    """What is compared: Python 3.13 breaks lines elsewhere, and writes `-p, --partition NAME` with NAME once."""
    return re.sub(r"(-\w) (\S+), (--[\w-]+ \2)", r"\1, \3", text).split()


def broken_links() -> Iterator[str]:
    """Every relative link in the documents whose file or heading is not there."""
    for document in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")):
        for link in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(document)):
            path, _, heading = link.partition("#")
            target = document.parent / path if path else document
            if re.match(r"[a-z]+:", link):
                continue
            if not target.exists():
                yield f"{document.relative_to(ROOT)}: {link} leads nowhere"
            elif heading and target.suffix == ".md" and heading not in headings(target):
                yield f"{document.relative_to(ROOT)}: {link}: there is no such heading"


def headings(document: Path) -> list[str]:
    """The headings as the anchors that Git hosts make of them."""
    titles = re.findall(r"^#+ +(.*)$", prose(document), re.M)
    return [re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles]


def prose(document: Path) -> str:
    """The text without its blocks of code."""
    return re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.M | re.S)


if __name__ == "__main__":
    raise SystemExit(main())
