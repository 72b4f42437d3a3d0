"""align: real DPO on a tiny model - what is preferred rises, an adapter goes on from itself, a stop loses nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpc.core.errors import STOPPED, HpcError
from stages import align
from tests.support import tiny

RunStage = Callable[..., Any]

SMALL: dict[str, Any] = {
    "lora_r": 4, "lora_alpha": 8, "target_modules": ("all-linear",), "learning_rate": 5e-3, "lr_scheduler": "constant",
    "batch_size": 4, "grad_accum": 1, "max_length": 64, "max_steps": 8, "save_steps": 3, "eval_share": 0.2,
    "gradient_checkpointing": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """20 questions whose kind answer is preferred to the rude one, and three from which nothing can be learnt."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [{"prompt": f"the wall {i}?", "chosen": "Yes, please.", "rejected": "No!"} for i in range(20)]
    rows += [{"prompt": "x", "chosen": "a", "rejected": "a"}, {"prompt": "", "chosen": "a", "rejected": "b"}]
    rows += [{"prompt": "long " * 40, "chosen": "a", "rejected": "b"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": ()}, "names no file"),
        ({"beta": 0.0}, "beta must be more than 0"),
        ({"max_steps": 0}, "no step to do"),
        ({"eval_share": 1.0}, "between 0 and 1"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"base_model": "/no/such/model"}, "no model at /no/such/model"),
    ],
)
def test_check_refuses(pairs: str, options: dict[str, Any], message: str) -> None:
    align.check(align.AlignConfig(pairs=(pairs,)))
    with pytest.raises(HpcError, match=message):
        align.check(align.AlignConfig(**{"pairs": (pairs,), **options}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "x", "chosen": "a", "rejected": "a"}', "holds no pair to learn from"),
        ('{"prompt": "x"}', "a.jsonl line 1: no preference in it"),
        ("", "holds no pair to learn from"),
    ],
)
def test_check_looks_at_the_pairs(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(HpcError, match=message):
        align.check(align.AlignConfig(pairs=(str(tmp_path / "a.jsonl"),)))


@pytest.mark.train
def test_pairs_beyond_learnt_positions_are_refused(
    run_stage: RunStage, tiny_model: Path, pairs: str, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "gpt2")
    learnt = GPT2Config(vocab_size=258, n_positions=16, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(learnt).save_pretrained(tmp_path / "gpt2")
    result = run_stage("align", {"base_model": tmp_path / "gpt2"}, pairs=(pairs,), **SMALL)
    assert (result.code, "16 positions" in result.error["cause"]) == (2, True), result.error
    assert "align.max_length = 16" in result.error["hint"]


@pytest.mark.train
def test_held_out_pairs_are_told_apart_and_the_adapter_can_be_merged(
    run_stage: RunStage, tiny_model: Path, pairs: str
) -> None:
    result = run_stage("align", {"base_model": tiny_model}, pairs=(pairs,), **SMALL)
    assert result.code == 0, result.error
    metrics = result.metrics
    assert (metrics["train_pairs"], metrics["eval_pairs"]) == (16, 4)
    assert metrics["dropped"] == {"equal answers": 1, "no question": 1, "prompt too long": 1}
    assert metrics["losses"][0] == pytest.approx(0.6931, abs=1e-3)  # ln 2: nothing is preferred yet
    assert metrics["losses"][-1] < 0.6
    assert metrics["eval_preferred"] == 1.0
    assert metrics["eval_margin"] > 0.1
    assert not (result.out("adapter") / "ref").exists()
    merged = run_stage("merge", {"adapter": result.out("adapter")}, dtype="float32")
    assert merged.code == 0, merged.error


@pytest.mark.generations
@pytest.mark.train
def test_it_goes_on_with_an_adapter_and_that_is_the_reference(
    run_stage: RunStage, tiny_model: Path, pairs: str, dataset: Path, tmp_path: Path
) -> None:
    data, template = tmp_path / "data", f"{tiny.TEMPLATE}{{# the data's #}}"
    shutil.copytree(dataset, data)
    (data / "chat_template.jinja").write_text(template)
    trained = {key: SMALL[key] for key in ("lora_r", "lora_alpha", "target_modules", "batch_size", "max_length")}
    before = run_stage(
        "finetune", {"base_model": tiny_model, "dataset": data}, max_steps=6, learning_rate=1e-2, **trained
    )
    assert before.code == 0, before.error
    given = {"base_model": tiny_model, "adapter": before.out("adapter")}
    result = run_stage("align", given, pairs=(pairs,), **SMALL)
    assert result.code == 0, result.error
    # against the base, which says something else, the first loss would not be that of "no difference"
    assert result.metrics["losses"][0] == pytest.approx(0.6931, abs=1e-3)
    assert result.metrics["eval_preferred"] == 1.0
    assert not (result.out("adapter") / "ref").exists()
    assert (result.out("adapter") / "chat_template.jinja").read_text() == template
    assert json.loads((result.out("adapter") / "base.json").read_text())["base_model"] == str(tiny_model)


@pytest.mark.generations
@pytest.mark.train
def test_each_held_out_pair_counts_alike(run_stage: RunStage, tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"  # what is learnt of one in three is the opposite: some of them stay wrong
    said = [("yes", "no") if i % 3 else ("no", "yes") for i in range(20)]
    path.write_text("".join(json.dumps({"prompt": f"q{i}?", "chosen": a, "rejected": b}) + "\n"
                            for i, (a, b) in enumerate(said)))  # fmt: skip
    result = run_stage("align", {"base_model": tiny_model}, pairs=(str(path),), **{**SMALL, "eval_share": 0.25})
    assert result.metrics["eval_pairs"] == 5  # a batch of four, and one of one
    count = result.metrics["eval_preferred"] * 5
    assert 0 < count < 5
    assert count == pytest.approx(round(count), abs=1e-6)


@pytest.mark.train
def test_a_prompt_is_held_out_with_all_its_pairs_and_repeats_are_left_out(tiny_model: Path, tmp_path: Path) -> None:
    from hpc.inside import models

    pairs = [{"prompt": f"{i}?", "chosen": f"yes {n % 3}", "rejected": "no"} for n in range(4) for i in range(10)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    metrics: dict[str, Any] = {}
    ctx: Any = SimpleNamespace(metric=lambda **found: metrics.update(found))
    parts, _ = align._rows(models.tokenizer(tiny_model), align.AlignConfig(pairs=(str(path),), eval_share=0.2), ctx)
    assert (metrics["train_pairs"], metrics["eval_pairs"], metrics["dropped"]) == (24, 6, {"repeated": 10})
    train, held = ({row["prompt"][0]["content"] for row in parts[part]} for part in ("train", "eval"))
    assert (len(train), len(held), train & held) == (8, 2, set())


@pytest.mark.generations
@pytest.mark.train
def test_a_long_prompt_stays_whole_and_what_is_cut_or_lost_is_counted(
    run_stage: RunStage, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": "BEGIN" + "p" * 530, "chosen": said, "rejected": "bad"} for said in ("a", "b" * 200)]
    rows += [{"prompt": "r" * 530, "chosen": "<think>because</think>a", "rejected": "b"}]
    rows += [{"prompt": "s" * 625, "chosen": "a", "rejected": "b"}]  # too long with what asks for the answer
    path, template = tmp_path / "pairs.jsonl", tmp_path / "template.jinja"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template.write_text(tiny.TEMPLATE.replace("m.content", "m.content.split('</think>')[-1]"))
    trained: list[Any] = []
    save = align._save
    monkeypatch.setattr(align, "_save", lambda trainer, *a, **o: (trained.append(trainer), save(trainer, *a, **o)))
    config = {**SMALL, "max_length": 640, "max_steps": 1, "eval_share": 0.0, "chat_template": str(template)}
    result = run_stage("align", {"base_model": tiny_model}, pairs=(str(path),), **config)
    assert result.code == 0, result.error
    assert (result.metrics["pairs"], result.metrics["dropped"]) == (3, {"prompt too long": 1})
    assert (result.metrics["cut"], result.metrics["template_loses"]) == (1, {"reasoning": 1})
    remark = json.loads((result.folder / "attempt-1" / "remark.json").read_text())["remark"]
    assert "loses the reasoning of 1 rows: set align.chat_template" in remark
    (trainer,) = trained
    (asked,) = {"prompt_ids", "prompt_input_ids"} & set(trainer.train_dataset.column_names)
    assert sorted(map(len, trainer.train_dataset[asked])) == [549, 554, 554]
    assert trainer.args.truncation_mode == "keep_start"


@pytest.mark.train
@pytest.mark.parametrize("go_on", [False, True])
def test_a_stop_and_a_resume_give_the_losses_of_an_uninterrupted_run(
    run_stage: RunStage,
    stop_after: Callable[[int], None],
    tiny_model: Path,
    pairs: str,
    dataset: Path,
    go_on: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: dict[str, Path] = {"base_model": tiny_model}
    if go_on:
        trained = {key: SMALL[key] for key in ("lora_r", "lora_alpha", "target_modules", "batch_size", "max_length")}
        before = run_stage("finetune", {**given, "dataset": dataset}, max_steps=2, learning_rate=1e-2, **trained)
        given["adapter"] = before.out("adapter")
    whole = run_stage("align", given, folder="whole", pairs=(pairs,), **SMALL)
    with monkeypatch.context():
        stop_after(4)
        assert run_stage("align", given, folder="parts", pairs=(pairs,), **SMALL).code == STOPPED
    monkeypatch.undo()
    parts = run_stage("align", given, folder="parts", pairs=(pairs,), **SMALL)
    assert parts.code == 0, parts.error
    assert parts.metrics["resumed_from"] == "checkpoint-5"  # the step after the signal
    assert parts.metrics["losses"] == pytest.approx(whole.metrics["losses"], abs=1e-4)


@pytest.mark.generations
@pytest.mark.train
def test_a_stop_after_the_last_step_trains_no_further(
    run_stage: RunStage,
    stop_after: Callable[[int], None],
    tiny_model: Path,
    pairs: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = {**SMALL, "max_steps": 3}  # of four steps of an epoch
    stop_after(3)
    assert run_stage("align", {"base_model": tiny_model}, pairs=(pairs,), **config).code == STOPPED
    monkeypatch.undo()
    result = run_stage("align", {"base_model": tiny_model}, pairs=(pairs,), **config)
    assert result.code == 0, result.error
    assert (result.metrics["resumed_from"], result.metrics["steps"]) == ("checkpoint-3", 3)
    assert len(result.metrics["losses"]) == 3
    assert result.metrics["eval_preferred"] > 0.5
