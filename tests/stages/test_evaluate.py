"""evaluate: figures of a tuned model against its base, answers side by side, and a worse model said to be worse."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpc.core import evaluation
from hpc.core import stage as stages
from hpc.core.errors import HpcError, Refused
from hpc.core.plan import Wish, plan
from hpc.core.site import Site
from stages import evaluate
from tests.core.fakes import FakeFacts

RunStage = Callable[..., Any]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"answers": -1}, "answers can't be below 0"),
        ({"tasks": ("faq",)}, "needs evaluate.task_folder"),
        ({"model": "/no/such/model"}, "no model at"),
    ],
)
def test_check_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(HpcError, match=message):
        evaluate.check(evaluate.EvaluateConfig(**options))


def test_nothing_held_out_is_refused_before_the_queue() -> None:
    prepare, measure = (replace(stages.load(name), check=None) for name in ("prepare", "evaluate"))
    facts = FakeFacts(files={"a": "", "m": "", "e": ""})

    def planned(**config: Any) -> None:
        first = Wish(stage=prepare, config=prepare.config(data=("a",), **config), overrides={})
        last = Wish(stage=measure, config=measure.config(model="m"), overrides={})
        plan([first, last], ["evaluate"], Site(name="local", gpus="none"), facts)

    with pytest.raises(Refused, match="prepare holds none out"):
        planned()
    planned(eval_rows=2)
    planned(eval_data=("e",))


@pytest.fixture(scope="session")
def tuned(tiny_model: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model after some steps on the data set."""
    import torch
    from transformers import AutoModelForCausalLM

    from hpc.inside import conversations, models

    folder = tmp_path_factory.mktemp("tuned")
    words = models.tokenizer(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows, _ = conversations.rows(conversations.read(dataset, "train"), words, 64, completion_only=True)
    for _ in range(40):
        model(**conversations.Padded(0)(rows)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.mark.generations
@pytest.mark.train
def test_a_better_and_a_worse_model(run_stage: RunStage, tiny_model: Path, tuned: Path, dataset: Path) -> None:
    options = {"answers": 3, "prompts": ("Which brick?",), "max_new_tokens": 12, "batch_size": 3}
    better = run_stage("evaluate", {"model": tuned, "base_model": tiny_model, "dataset": dataset}, **options)
    report = json.loads(better.out("report.json").read_text())
    base, mine = report["base"]["figures"], report["tuned"]["figures"]
    assert mine["held-out loss"] < base["held-out loss"] - 1
    assert mine["perplexity"] == pytest.approx(math.exp(mine["held-out loss"]))
    assert mine["rouge1"] > base["rouge1"]
    assert mine["chrF"] > base["chrF"]
    assert [a["prompt"] for a in report["answers"]][-1] == "Which brick?"
    assert [a["reference"] is None for a in report["answers"]] == [False] * 3 + [True]
    assert all(a["tuned"] != a["base"] for a in report["answers"])
    remark = json.loads((better.folder / "attempt-1" / "remark.json").read_text())["remark"]
    assert remark.startswith("better than its base: held-out loss")
    assert better.metrics["worse"] == []

    worse = run_stage(
        "evaluate", {"model": tiny_model, "base_model": tuned, "dataset": dataset}, folder="worse", **options
    )
    assert worse.code == 0
    assert worse.metrics["verdict"].startswith("WORSE than its base: held-out loss")
    alone = run_stage("evaluate", {"model": tuned, "dataset": dataset}, folder="alone", **{**options, "answers": 0})
    assert alone.metrics["figures"]["held-out loss"]["base"] is None
    assert "no base to compare with" in alone.metrics["verdict"]


@pytest.mark.generations
@pytest.mark.train
def test_answers_in_a_batch_are_those_given_alone(tuned: Path) -> None:
    from hpc.inside import answering, models

    model, words = models.load(tuned, "float32"), models.tokenizer(tuned)
    questions = ["brick?", "Is there a beam in this long, long question?", "A?", "roof"]
    prompts = [[{"role": "user", "content": text}] for text in questions]
    together = answering.answers(model, words, prompts, max_new_tokens=10, batch_size=3)
    alone = [answering.answers(model, words, [one], max_new_tokens=10, batch_size=1)[0] for one in prompts]
    assert together == alone
    assert len(set(alone)) > 1


@pytest.mark.train
def test_the_loss_does_not_depend_on_the_batches(tiny_model: Path, dataset: Path) -> None:
    from hpc.inside import conversations, heldout, models, packing

    model, words = models.load(tiny_model, "float32"), models.tokenizer(tiny_model)
    rows, _ = conversations.rows(conversations.read(dataset, "train"), words, 64, completion_only=True)
    padded = conversations.Padded(0)
    one, labels = heldout.loss(model, rows, padded, batch_size=1)
    assert labels == sum(label >= 0 for row in rows for label in row["labels"])
    assert heldout.loss(model, rows, padded, batch_size=7)[0] == pytest.approx(one, rel=1e-5)
    packed = packing.packed(rows, 200, 0)
    assert heldout.loss(model, packed, packing.Packed(0, flat=False), batch_size=3)[0] == pytest.approx(one, rel=1e-5)
    assert heldout.loss(model, packed, packing.Packed(0, flat=True), batch_size=3)[0] == pytest.approx(one, rel=1e-5)


@pytest.mark.generations
@pytest.mark.train
def test_what_is_beyond_learnt_positions_is_cut_or_not_asked_and_said(
    run_stage: RunStage, tiny_model: Path, dataset: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=258, n_positions=40, n_embd=32, n_layer=1, n_head=2))
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2}
    opt = OPTForCausalLM(OPTConfig(vocab_size=258, max_position_embeddings=40, **sizes, **layers))
    for name, model in (("gpt2", gpt2), ("opt", opt)):
        folder = tmp_path / name
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
        model.save_pretrained(folder)
        options = {"prompts": ("a" * 40, "b"), "max_new_tokens": 8, "answers": 2}
        done = run_stage("evaluate", {"model": folder, "dataset": dataset}, folder=f"run-{name}", **options)
        assert done.code == 0, done.error
        asked = [answer["prompt"] for answer in json.loads(done.out("report.json").read_text())["answers"]]
        assert (len(asked), asked[-1]) == (3, "b")
        assert (done.metrics["rows"], done.metrics["cut"]) == (4, 1)
        assert "1 rows are cut to the 40 positions" in remark(done)
        assert "1 prompts are not asked" in remark(done)


@pytest.mark.generations
@pytest.mark.train
def test_a_base_without_the_added_tokens_is_left_out_and_that_is_said(
    run_stage: RunStage, tiny_model: Path, dataset: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words, model = AutoTokenizer.from_pretrained(tiny_model), AutoModelForCausalLM.from_pretrained(tiny_model)
    words.add_tokens(["<|turn|>"], special_tokens=True)
    words.chat_template = words.chat_template.replace("<|im_start|>", "<|turn|>")
    model.resize_token_embeddings(len(words), mean_resizing=False)
    words.save_pretrained(tmp_path / "more")
    model.save_pretrained(tmp_path / "more")
    inputs = {"model": tmp_path / "more", "base_model": tiny_model, "dataset": dataset}
    done = run_stage("evaluate", inputs, answers=1, max_new_tokens=4)
    assert done.code == 0, done.error
    assert json.loads(done.out("report.json").read_text())["base"] is None
    assert "the base is not measured: it lacks tokens" in remark(done)


def remark(done: Any) -> str:
    return str(json.loads((done.folder / "attempt-1" / "remark.json").read_text())["remark"])


@pytest.mark.train
def test_what_it_cannot_work_with(run_stage: RunStage, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "eval.jsonl").touch()
    result = run_stage("evaluate", {"model": tiny_model, "dataset": tmp_path})
    assert "no held-out rows" in result.error["cause"]
    result = run_stage("evaluate", {"model": tiny_model, "dataset": tmp_path}, tasks=("x",), task_folder=str(tmp_path))
    assert "needs lm-eval" in result.error["cause"]


CHOICE = """
task: faq
dataset_path: json
dataset_kwargs: {data_files: {test: faq.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}\\n"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: brier_score, aggregation: brier_score, higher_is_better: false}]
"""
READING = """
task: reading
dataset_path: json
dataset_kwargs: {data_files: {test: faq.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity, higher_is_better: false}]
"""


@pytest.mark.extras
@pytest.mark.train
def test_tasks_of_lm_eval_from_local_files(
    run_stage: RunStage, tiny_model: Path, tuned: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real library, without a network: base and tuned, from another folder than that of the tasks."""
    if "CI" not in os.environ:
        pytest.importorskip("lm_eval", reason="RINGS=train runs it in .venvs/train-extras")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "faq.yaml").write_text(CHOICE)
    (folder / "reading.yaml").write_text(READING)
    rows = [{"question": f"brick {n}?", "choices": ["A brick.", "Zzzzzzzz"], "answer": 0} for n in range(4)]
    (folder / "faq.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs = {"model": tuned, "base_model": tiny_model, "dataset": dataset}
    options = {"answers": 0, "tasks": ("faq", "reading"), "task_folder": str(folder)}
    done = run_stage("evaluate", inputs, **options)
    assert done.code == 0, done.error
    assert {"torch", "transformers", "accelerate", "lm_eval"} <= done.manifest["versions"].keys()
    written = json.loads(done.out("report.json").read_text())
    assert written["tuned"]["figures"]["faq acc"] == 1.0
    assert set(written["base"]["figures"]) == set(written["tuned"]["figures"])
    perplexity = done.metrics["figures"]["reading word_perplexity"]
    assert perplexity["better"] == (perplexity["tuned"] < perplexity["base"])
    assert written["tuned"]["low_is_good"] == ["faq brier_score", "reading word_perplexity"]
    missing = run_stage("evaluate", inputs, folder="missing", **{**options, "tasks": ("roof",)})
    assert "there is no task roof" in missing.error["cause"]


def report(base: dict[str, float] | None, tuned: dict[str, float]) -> dict[str, Any]:
    return {"base": base and {"figures": base}, "tuned": {"figures": tuned}, "answers": []}


@pytest.mark.parametrize(
    ("base", "tuned", "said"),
    [
        ((3.0, 9.0), (2.0, 9.5), "better than its base: held-out loss 3 → 2"),
        ((3.0, 9.0), (2.0, 8.0), "better than its base: held-out loss 3 → 2; but WORSE in chrF 9 → 8"),
        ((2.0, 9.0), (3.0, 9.5), "WORSE than its base: held-out loss 2 → 3"),
        ((2.0, 9.0), (2.0, 9.0), "the same as its base"),
        (None, (2.0, 9.0), "held-out loss 2; chrF 9; no base to compare with"),
        ((math.nan, 9.0), (2.0, 9.5), "better than its base: chrF 9 → 9.5"),
        ((math.nan, math.nan), (2.0, 9.0), "held-out loss nan → 2; chrF nan → 9; no base to compare with"),
        ((2.0, 9.0), (math.nan, math.nan), "WORSE than its base: held-out loss 2 → nan, chrF 9 → nan"),
    ],
)
def test_the_verdict(base: tuple[float, float] | None, tuned: tuple[float, float], said: str) -> None:
    names = ("held-out loss", "chrF")
    sides = [None if side is None else dict(zip(names, side, strict=True)) for side in (base, tuned)]
    assert evaluation.verdict(report(sides[0], sides[1] or {})) == said


def test_less_is_better_where_the_task_says_so() -> None:
    found = report({"faq ter": 60.0, "faq acc": 0.5}, {"faq ter": 40.0, "faq acc": 0.4})
    found["tuned"]["low_is_good"] = ["faq ter"]
    assert {f.name: f.better for f in evaluation.figures(found)} == {"faq ter": True, "faq acc": False}


def test_the_report_for_a_person() -> None:
    text = "\n".join(
        evaluation.lines(
            {
                **report({"held-out loss": 2.0}, {"held-out loss": 3.0}),
                "answers": [{"prompt": "Q", "reference": None, "base": "B", "tuned": "T"}],
            }
        )
    )
    assert "held-out loss" in text
    assert "WORSE" in text
    assert "  base:      B\n  tuned:     T" in text
