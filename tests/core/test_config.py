"""Configs to JSON and back; one JSON text per value; keys."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from hpc.core.config import canonical, decode, encode, key_of


@dataclass(frozen=True, kw_only=True)
class Everything:
    """One field of each kind that a config may have."""

    text: str = '한글 "quoted" \\ \n'
    whole: int = -3
    number: float = 2e-4
    flag: bool = True
    none: str | None = None
    many: tuple[str, ...] = ("a", "b")
    empty: tuple[str, ...] = ()


def test_config_comes_back_as_it_was_through_a_json_file() -> None:
    value = Everything(many=("x",), none="set")
    assert decode(Everything, json.loads(json.dumps(encode(value)))) == value


def test_encode_writes_every_default_out() -> None:
    assert set(encode(Everything())) == set(Everything.__dataclass_fields__)


def test_decode_refuses_an_unknown_field() -> None:
    with pytest.raises(TypeError, match="gone"):
        decode(Everything, {"gone": 1})


def test_equal_values_have_one_text() -> None:
    assert canonical({"b": 1, "a": [1, 2]}) == canonical({"a": [1, 2], "b": 1}) == '{"a":[1,2],"b":1}'


def test_key_is_16_hex_digits() -> None:
    assert len(key_of("x")) == 16
    assert int(key_of("x"), 16) >= 0


def test_key_does_not_change_between_versions() -> None:
    assert key_of("stage", {"a": [1, None, True]}, b"source") == "f08542fbb1216efd"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("ab", "c"), ("a", "bc")),
        (("a",), ("a", "")),
        ((b"1",), ("1",)),
        (([["x"], []],), ([[], ["x"]],)),
        ((1,), (True,)),
        ((None,), ("null",)),
    ],
)
def test_key_tells_parts_apart(one: tuple[object, ...], other: tuple[object, ...]) -> None:
    assert key_of(*one) != key_of(*other)
