"""Every error has one exit code, travels between processes, and says what to do."""

from __future__ import annotations

import pickle

import pytest

from hpc.core import errors
from hpc.core.errors import HpcError, did_you_mean

KINDS = [HpcError, *(kind for kind in HpcError.__subclasses__() if kind.__module__ == errors.__name__)]


def test_exit_codes_are_the_documented_ones() -> None:
    assert {k.__name__: k.exit_code for k in KINDS} == {
        "HpcError": 1,
        "UsageError": 2,
        "Refused": 3,
        "RuntimeUnavailable": 4,
        "NotReady": 5,
        "VerificationFailed": 6,
        "NotFound": 7,
        "Stopped": 8,
        "Interrupted": 130,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_tree_in_the_docstring_names_each_kind_with_its_code(kind: type[HpcError]) -> None:
    assert any(line.split()[:2] == [kind.__name__, str(kind.exit_code)] for line in (errors.__doc__ or "").splitlines())


@pytest.mark.parametrize("kind", KINDS)
def test_error_keeps_its_hint_through_a_pickle(kind: type[HpcError]) -> None:
    back = pickle.loads(pickle.dumps(kind("wrong", hint="do this")))
    assert (type(back), back.message, back.hint, str(back)) == (kind, "wrong", "do this", "wrong")


def test_did_you_mean_of_nothing_known_is_a_sentence() -> None:
    assert did_you_mean("x", []) == "choose from: "
