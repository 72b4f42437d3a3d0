"""How a model may be divided among cards, what fits, and what is proposed where it doesn't."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from typing import Any

import pytest

from hpc.core import division, gpus, shape
from hpc.core.division import Division
from hpc.core.errors import Refused
from hpc.core.shape import Shape

from .test_shape import LLAMA_7B, LLAMA_70B, QWEN_7B


def read(document: dict[str, Any]) -> Shape:
    found = shape.read(document)
    assert found is not None
    return found


SMALL, LARGE, QWEN = read(LLAMA_7B), read(LLAMA_70B), read(QWEN_7B)
A100, H100, V100 = gpus.CARDS["A100-80"], gpus.CARDS["H100"], gpus.CARDS["V100-16"]


def slice_of(name: str) -> gpus.Card:
    found = gpus.find(name)
    assert found is not None
    return found.card


SLICE = slice_of("1g.10gb")


def test_llama_2_7b_on_an_a100() -> None:
    sizes = division.estimate(SMALL, A100, Division(max_seq_len=4096))
    assert sizes.weights_gib == pytest.approx(12.55, abs=0.01)
    assert sizes.kv_token_bytes == 2**19
    assert sizes.kv_tokens == pytest.approx(120_000, rel=0.02), "0.9 of what is left of 80 GiB, at 0.5 MiB a token"


def test_two_gpus_hold_half_of_the_weights_and_of_each_token() -> None:
    """But for the table of embeddings, which each holds whole."""
    one, two = (division.estimate(SMALL, A100, Division(tp=n)) for n in (1, 2))
    table = SMALL.vocab * SMALL.hidden * 2 / 2**30
    assert two.weights_gib == pytest.approx((one.weights_gib - table) / 2 + table)
    assert two.kv_token_bytes == one.kv_token_bytes / 2


def test_layers_that_no_power_of_two_divides() -> None:
    """Llama-405B has 126: on cards of 40 GiB three, six or seven stages hold it, and neither two nor four."""
    huge = replace(LARGE, layers=126, hidden=16384, heads=128, intermediate=53248)
    small = gpus.CARDS["A100-40"]
    found = division.smallest(huge, small, 8, Division(dtype="bfloat16"))
    assert found is not None
    assert (found.tp, found.pp) == (8, 3)
    near = division.nearest(huge, small, 8, Division(dtype="bfloat16", tp=8, pp=4))
    assert near == Division(dtype="bfloat16", tp=4, pp=9), "and nothing need be quantised"


def test_what_is_chosen_does_not_go_over_pcie_where_stages_do() -> None:
    card = gpus.CARDS["L40S"]
    found = division.smallest(LARGE, card, 8, Division())
    assert found is not None
    assert (found.tp, division.slow(card, found)) == (1, "")


def test_more_gpus_than_kv_heads_hold_copies() -> None:
    assert division.estimate(LARGE, A100, Division(tp=8)).kv_token_bytes == 2 * 80 * 1 * 128 * 2
    assert division.estimate(LARGE, A100, Division(tp=16)).kv_token_bytes == 2 * 80 * 1 * 128 * 2


def test_quantising_makes_weights_and_cache_smaller() -> None:
    sizes = [division.estimate(SMALL, H100, Division(quantization=q)).weights_gib for q in ("none", "int8", "int4")]
    assert sizes == sorted(sizes, reverse=True)
    assert division.estimate(SMALL, H100, Division(kv_cache="fp8")).kv_token_bytes == 2**18


def test_what_divides_is_what_tensorrt_llm_asserts() -> None:
    """Every pair for each model, against the rules in other words."""
    for model, tp, pp in itertools.product((SMALL, LARGE, QWEN), range(1, 17), (1, 2, 3, 4, 5, 8, 100)):
        allowed = (
            model.heads % tp == 0
            and (model.kv_heads % tp == 0 if tp <= model.kv_heads else tp % model.kv_heads == 0)
            and model.intermediate % tp == 0
            and pp <= model.layers
            and model.layers % pp == 0
        )
        assert (not division.problem(model, None, 16, Division(tp=tp, pp=pp))) is allowed, (model.architecture, tp, pp)


def test_phi_3_is_one_pipeline_stage_where_it_is_converted() -> None:
    phi = replace(SMALL, architecture="Phi3ForCausalLM")
    staged = Division(tp=1, pp=2)
    assert "one pipeline stage" in division.problem(phi, H100, 8, staged)
    for way in (Division(tp=2, pp=1), replace(staged, quantization="fp8"), replace(staged, as_is=True)):
        assert division.problem(phi, H100, 8, way) == ""
    assert division.problem(SMALL, H100, 8, staged) == ""


def test_what_is_proposed_works() -> None:
    ways = itertools.product(
        (1, 2, 3, 5, 8, 16), (1, 2, 7), division.PRECISIONS, ("auto", "fp8"), ("bfloat16", "float16")
    )
    for tp, pp, quantization, kv, dtype in ways:
        way = Division(tp=tp, pp=pp, quantization=quantization, kv_cache=kv, dtype=dtype)
        for model, card in itertools.product((SMALL, LARGE, QWEN), (A100, H100, V100, SLICE)):
            other = division.nearest(model, card, 8, way)
            if other is not None:
                assert not division.problem(model, card, 8, other)
            if not division.problem(model, card, 8, way):
                assert other == way, "what works is its own nearest"


def refusal(model: Shape, card: gpus.Card, node: int = 8, **way: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        division.judge("build", "build", model, card, node, Division(**way))
    return caught.value


@pytest.mark.parametrize(
    ("model", "card", "way", "reason", "hint"),
    [
        (LARGE, A100, {}, "128.5 GiB", "tp_size = 2, pp_size = 1"),
        (LARGE, A100, {"tp": 16}, "more than the 8 GPUs", "tp_size = 8, pp_size = 2"),
        (QWEN, A100, {"tp": 8}, "does not divide the model's 28 attention heads", "tp_size = 4"),
        (SMALL, A100, {"tp": 3}, "32 attention heads", "tp_size = 4, pp_size = 1"),
        (SMALL, A100, {"quantization": "fp8"}, "compute capability 8.9", "quantization = int8"),
        (SMALL, A100, {"kv_cache": "fp8"}, "fp8 KV cache", "kv_cache = int8"),
        (SMALL, H100, {"quantization": "nvfp4"}, "compute capability 10.0", "quantization = int4_awq"),
        (SMALL, V100, {}, "V100-16 is older", "other cards"),
        (SMALL, gpus.CARDS["T4"], {}, "T4 is older", "other cards"),
        (SMALL, SLICE, {"tp": 2}, "no slice reaches", "tp_size = 1, pp_size = 1"),
        (SMALL, SLICE, {}, "do not fit into the 9.7 GiB", "quantization = int8"),
        (SMALL, A100, {"max_seq_len": 8192}, "4096 tokens that the model was made for", "max_seq_len = 4096"),
        (QWEN, slice_of("1g.18gb"), {"max_seq_len": 32768}, "less than one request", "quantization = int8"),
        (SMALL, A100, {"tp": 8, "quantization": "int4_awq"}, "multiples of 128", "tp_size = 2, pp_size = 4"),
        (SMALL, A100, {"pp": 3}, "32 layers", "pp_size = 4"),
        (SMALL, A100, {"pp": 64}, "more than the model's 32 layers", "pp_size"),
    ],
)
def test_what_cannot_work_is_refused_with_what_would(
    model: Shape, card: gpus.Card, way: dict[str, Any], reason: str, hint: str
) -> None:
    error = refusal(model, card, **way)
    assert reason in error.message
    assert hint in error.hint


def test_where_nothing_works_it_says_so() -> None:
    assert "smaller model" in refusal(LARGE, slice_of("1g.5gb")).hint


def test_pipeline_stages_may_go_across_nodes_and_nvl72_is_one_domain() -> None:
    assert not division.problem(LARGE, H100, 8, Division(tp=8, pp=2))
    assert division.problem(LARGE, H100, 4, Division(tp=8))
    assert not division.problem(LARGE, gpus.CARDS["GB200"], 4, Division(tp=8))


def test_what_tensor_parallelism_joins_lies_on_one_node() -> None:
    for node, tp, pp in itertools.product((1, 2, 4, 6, 8), range(1, 9), range(1, 17)):
        if tp > node:
            continue
        count = division.nodes("serve", H100, node, Division(tp=tp, pp=pp))
        each = tp * pp // count
        assert (tp * pp % count, each % tp, each <= node) == (0, 0, True), (node, tp, pp, count)
        assert not [n for n in range(1, count) if tp * pp % n == 0 and tp * pp // n <= node and tp * pp // n % tp == 0]
    assert division.nodes("serve", H100, 8, Division(tp=4, pp=3)) == 3
    assert division.nodes("serve", H100, 8, Division(tp=4, pp=9)) == 9
    assert division.nodes("serve", gpus.CARDS["GB200"], 4, Division(tp=8)) == 2, "NVL72 is one domain"
    assert division.nodes("serve", gpus.CARDS["GB200"], 4, Division(tp=8), 4) == 4
    with pytest.raises(Refused, match="with tp_size 8 of them together on one") as caught:
        division.nodes("serve", H100, 8, Division(tp=8, pp=2), 4)
    assert caught.value.hint.startswith("build.nodes = 2 ")


def test_tensor_parallel_over_pcie_is_said() -> None:
    assert "no NVLink" in division.slow(gpus.CARDS["L40S"], Division(tp=2))
    assert "2 GPUs by NVLink" in division.slow(gpus.CARDS["H100-NVL"], Division(tp=4))
    assert not division.slow(H100, Division(tp=8))
    assert not division.slow(gpus.CARDS["L40S"], Division(pp=2))


def test_what_is_not_known_is_not_judged() -> None:
    assert division.judge("build", "build", None, A100, 8, Division(tp=7)) is None
    assert division.judge("build", "build", SMALL, None, None, Division(tp=2)) is None
    with pytest.raises(Refused):
        division.judge("build", "build", SMALL, None, None, Division(tp=3))


def test_the_smallest_division_is_found() -> None:
    found = division.smallest(LARGE, A100, 8, Division())
    assert found is not None
    assert (found.tp, found.pp) == (2, 1)
    assert division.smallest(LARGE, SLICE, 8, Division()) is None
    for tp in range(1, found.tp):
        assert division.problem(LARGE, A100, 8, replace(found, tp=tp))


def test_a_70b_model_on_16_gpus_is_judged_in_milliseconds() -> None:
    started = time.perf_counter()
    division.judge("build", "build", LARGE, A100, 8, Division(tp=8, pp=2))
    with pytest.raises(Refused):
        division.judge("build", "build", LARGE, SLICE, 8, Division(tp=8, pp=2))
    assert time.perf_counter() - started < 0.05
