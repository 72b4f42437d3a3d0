"""A stub of a served model's door, for the verbs that talk to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support import door
from tests.support.door import TOKEN, Reply, Stub


@pytest.fixture
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stub's token, and a folder of the test's own for what is private."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HPC_TOKEN", TOKEN)
    monkeypatch.delenv("HPC_VIA", raising=False)


@pytest.fixture
def stub() -> Iterator[Callable[[Any], Stub]]:
    """reply -> a stub that answers so; a Reply: always the same."""
    with ExitStack() as open_:

        def start(reply: Reply | Callable[[str, dict[str, Any]], Reply]) -> Stub:
            return open_.enter_context(door.opened(reply if callable(reply) else lambda path, body: reply))

        yield start
