"""What the door keeps of every request: its id, its place, the tokens of its answer."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from hpc.inside import door, rpc
from hpc.inside.door import Door


def test_a_request_gets_an_id_and_keeps_its_own() -> None:
    number, body = door._with_id(b'{"text_input": "x"}')
    assert json.loads(body) == {"text_input": "x", "id": number}
    assert door._with_id(b'{"id": "mine"}') == ("mine", b'{"id": "mine"}')
    for other in (b"[1]", b"no", b""):
        assert door._with_id(other) == ("", other)


def test_grpc_counts_the_tokens_that_the_model_says() -> None:
    names = [SimpleNamespace(name=name) for name in ("text_output", "sequence_length")]
    several = SimpleNamespace(outputs=names, raw_output_contents=[b"\x01\0\0\0x", (7).to_bytes(4, "little")])
    alone = SimpleNamespace(outputs=names[:1], raw_output_contents=[b"\x01\0\0\0x"])
    empty = SimpleNamespace(outputs=[], raw_output_contents=[])
    assert [rpc._tokens(answer) for answer in (several, alone, empty)] == [7, 1, 0]


class Told(Door):
    """A door whose engine keeps what it is told to stop."""

    def __init__(self, most: int = 0) -> None:
        super().__init__("t", "http://nowhere", stop_model="m", most=most)
        self.told: list[str] = []

    async def _tell(self, number: str) -> None:
        self.told.append(number)


def test_a_client_that_leaves_ends_no_other_request_with_its_id() -> None:
    def client(*, closing: bool) -> Any:
        return SimpleNamespace(transport=SimpleNamespace(is_closing=lambda: closing))

    async def check() -> None:
        for other_by_grpc in (False, True):
            door, other = Told(), None
            if other_by_grpc:
                other = rpc._Other(door)
                other._let_in("1")
            async with door.client(client(closing=False), "1" if other is None else "2"):
                async with door.client(client(closing=True), "1"):
                    await asyncio.sleep(0.05)
                if other is None:
                    leaving = rpc._Other(door)
                    leaving._let_in("1")
                    assert leaving.leave(answered=False), "its answer is read to the end, as if the engine were told"
                    leaving.over()
            await asyncio.sleep(0)
            assert door.told == []
            if other is not None:
                assert other.leave(answered=False)
                other.over()
            async with door.client(client(closing=True), "1"):
                await asyncio.sleep(0.05)
            assert door.told == (["1"] if other is None else ["1", "1"])
            assert not door._ids

    asyncio.run(check())


def test_a_request_more_than_may_wait_is_refused_by_grpc_too() -> None:
    async def check() -> None:
        door = Told(most=2)
        one = rpc._Single(door)
        for number in "12":
            assert not door.busy
            one._let_in(number)
        with pytest.raises(rpc._Busy, match=r"as many requests wait as may \(serve.queue_size\)"):
            one.begin(b"")
        one.over()
        assert not door.busy

    asyncio.run(check())
