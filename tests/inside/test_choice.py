"""The next token, in the environment that has numpy."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from hpc.core.assets import TEMPLATES

pytestmark = pytest.mark.train


def _load() -> Any:
    path = TEMPLATES / "triton" / "onnxruntime_genai" / "tensorrt_llm" / "1" / "choice.py"
    spec = importlib.util.spec_from_file_location("token_choice", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def floats(*values: float) -> Any:
    import numpy as np

    return np.array(values, np.float32)


def logits_of(*likely: float) -> Any:
    import numpy as np

    return np.log(floats(*likely))


FOUR = (0.1, 0.4, 0.2, 0.3)


def drawn(logits: Any = None, count: int = 4000, **asked: Any) -> Any:
    import numpy as np

    logits = logits_of(*FOUR) if logits is None else logits
    choice = _load().Choice(seed=1, **asked)
    return np.bincount([choice.take(logits, []) for _ in range(count)], minlength=len(logits)) / count


def test_greedy_is_the_likeliest() -> None:
    choice, logits = _load().Choice(top_k=1), logits_of(*FOUR)
    assert (choice.draws, choice.keeps(1), choice.take(logits, [])) == (False, True, 1)
    assert not choice.keeps(1, forbidden=[1])
    assert choice.take(logits, [], forbidden=[1]) == 3
    assert choice.take(logits, [], forbidden=[3]) == 1
    assert logits[1] == logits.max(), "the logits are not changed"


def test_drawn_as_likely_as_they_are() -> None:
    assert drawn(top_p=1.0) == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=0.03)
    assert drawn(top_p=1.0, temperature=0.5) == pytest.approx([1 / 30, 16 / 30, 4 / 30, 9 / 30], abs=0.03)


def test_only_the_likeliest_are_drawn() -> None:
    import numpy as np

    assert drawn(top_k=2) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.03)
    assert drawn(top_p=0.65) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.03)
    many = np.linspace(0, 12, 5000, dtype=np.float32)
    kept = np.flatnonzero(drawn(many, top_p=0.5))
    likely = np.exp(many - many.max())
    enough = int(np.searchsorted(np.cumsum(np.sort(likely / likely.sum())[::-1]), 0.5)) + 1
    assert kept.min() >= len(many) - enough


def test_a_seed_gives_the_same_tokens() -> None:
    def some(seed: int) -> list[int]:
        choice = _load().Choice(top_p=1.0, seed=seed)
        return [choice.take(logits_of(*FOUR), []) for _ in range(20)]

    assert some(7) == some(7) != some(8)


def test_repetition_is_penalised() -> None:
    choice = _load().Choice(top_k=1, penalty=2.0)
    assert choice.take(floats(1.0, 3.0, 2.0), [1, 1]) == 2
    assert choice.take(floats(-1.0, -1.5, -3.0), [0]) == 1


@pytest.mark.parametrize("asked", [{"temperature": -1}, {"top_p": 2}, {"top_k": -1}, {"penalty": 0}])
def test_what_makes_no_sense_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        _load().Choice(**asked)
