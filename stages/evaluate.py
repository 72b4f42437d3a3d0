"""
evaluate: a tuned model against its base on held-out conversations -> one report.

Loss and perplexity on the answers, ROUGE and chrF of generated ones, answers side by side, and tasks of lm-eval where
they are asked for. No network, and no GPU where the model is small. The two models are never in memory together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hpc.core import evaluation
from hpc.core.errors import Refused, UsageError
from hpc.core.rundir import write_json
from hpc.core.stage import Around, Artifact, Context, Input, Resources, Stage

Messages = list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is measured, and on how much."""

    model: str | None = None
    """The tuned model; None: from the stage before (merge, or finetune with method = "full")."""
    base_model: str | None = None
    """What it was tuned from; None: the base_model of finetune. Without one only the tuned model is measured."""
    dataset: str | None = None
    """Folder with eval.jsonl; None: from the stage before (prepare)."""
    max_rows: int = 500
    """Held-out conversations for the loss, at most."""
    max_length: int = 1024
    """Tokens per conversation; longer ones are cut."""
    answers: int = 32
    """Held-out conversations whose last answer is generated and compared with the real one, at most; 0: none."""
    prompts: tuple[str, ...] = ()
    """Further questions to answer, without a reference."""
    max_new_tokens: int = 128
    """Tokens of an answer, at most."""
    batch_size: int = 8
    """Conversations at once."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type to calculate in; auto: as finetune chooses it."""
    tasks: tuple[str, ...] = ()
    """Names of lm-eval tasks in `task_folder`; lm-eval must be in the image."""
    task_folder: str | None = None
    """Folder with the tasks' YAML files and their data."""


def files(config: EvaluateConfig) -> tuple[str, ...]:
    return (config.task_folder,) if config.task_folder is not None else ()


def resources(config: EvaluateConfig) -> Resources:
    """One GPU where the site has any; host memory holds one model."""
    return Resources(gpus_per_node=1, cpus_per_task=8, mem_gb=64, time_min=120)


def size(config: EvaluateConfig, around: Around) -> tuple[Resources, tuple[str, ...]]:
    """`resources`; Refused where prepare will hold no row out."""
    data = around.makers.get("dataset")
    if getattr(data, "eval_rows", None) == 0 and not getattr(data, "eval_data", ()):
        raise Refused(
            "evaluate measures on held-out rows, and prepare holds none out",
            hint="set prepare.eval_rows = 200, or name files in prepare.eval_data",
        )
    return resources(config), ()


def outputs(config: EvaluateConfig) -> dict[str, Artifact]:
    return {"report": Artifact(kind="report", path="report.json")}


def check(config: EvaluateConfig) -> None:
    """UsageError for figures that can't be, HpcError for a model that can't be loaded. Standard library."""
    from hpc.inside import models

    for name in ("max_rows", "max_length", "max_new_tokens", "batch_size"):
        if getattr(config, name) < 1:
            raise UsageError(f"evaluate.{name} must be 1 or more")
    if config.answers < 0:
        raise UsageError("evaluate.answers can't be below 0")
    if config.tasks and config.task_folder is None:
        raise UsageError("evaluate.tasks needs evaluate.task_folder", hint="compute nodes can't fetch tasks")
    for model in filter(None, (config.model, config.base_model)):
        models.inspect(model)


def run(config: EvaluateConfig, ctx: Context) -> None:
    """Measure the tuned model, then its base on the same, and write the report."""
    from hpc.inside import answering, conversations, limits, models, tasks

    models.settle()
    if config.tasks:
        tasks.need()
    tuned = models.local(ctx.inputs["model"], ctx.cache)
    base = models.local(ctx.inputs["base_model"], ctx.cache) if "base_model" in ctx.inputs else None
    tokenizer = models.tokenizer(tuned)  # for both: a base may have no chat template
    talks = list(conversations.read(Path(ctx.inputs["dataset"]), "eval"))[: config.max_rows]
    if not talks:
        raise UsageError("the data set has no held-out rows", hint="set prepare.eval_rows, or prepare.eval_data")
    can = [limits.of(folder) for folder in (tuned, base) if folder is not None]
    longest = min((positions for _, positions in can if positions is not None), default=None)
    length = min(config.max_length, longest or config.max_length)
    rows, counts = conversations.rows(iter(talks), tokenizer, length, completion_only=True)
    known = {token for row in rows for token in row["input_ids"]}

    def fits(prompt: Messages) -> bool:
        asked = answering.tokens(prompt, tokenizer)
        known.update(asked)
        return longest is None or len(asked) + config.max_new_tokens <= longest

    ended = [talk for talk in talks if len(talk) > 1 and talk[-1]["role"] == "assistant"][: config.answers]
    asked = [talk for talk in ended if fits(talk[:-1])]
    own: list[Messages] = [[{"role": "user", "content": text}] for text in config.prompts]
    prompts = [talk[:-1] for talk in asked] + [prompt for prompt in own if fits(prompt)]
    wanted = [talk[-1]["content"] for talk in asked]
    told = []
    if length < config.max_length and counts["cut"]:
        told.append(f"{counts['cut']} rows are cut to the {length} positions that the model has")
    if unasked := len(ended) + len(own) - len(prompts):
        told.append(f"{unasked} prompts are not asked: with evaluate.max_new_tokens they go beyond {longest} positions")
    if base is not None and max(known, default=0) >= can[1][0]:
        base = None
        told.append("the base is not measured: it lacks tokens that the tuned model was given")

    sides: dict[str, dict[str, Any]] = {}
    said: dict[str, list[str]] = {}
    for name, folder in (("tuned", tuned), ("base", base)):
        if folder is not None:
            sides[name], said[name] = _measure(name, folder, tokenizer, rows, prompts, wanted, config, ctx)
    report = {
        "schema": evaluation.SCHEMA,
        "tuned": {"model": ctx.inputs["model"], **sides["tuned"]},
        "base": {"model": ctx.inputs["base_model"], **sides["base"]} if base is not None else None,
        "rows": counts,
        "answers": [
            {
                "prompt": prompt[-1]["content"],
                "reference": wanted[i] if i < len(wanted) else None,
                "base": said["base"][i] if base is not None else None,
                "tuned": said["tuned"][i],
            }
            for i, prompt in enumerate(prompts)
        ],
    }
    write_json(ctx.outputs["report"], report)
    found = evaluation.figures(report)
    ctx.metric(figures={f.name: {"base": f.base, "tuned": f.tuned, "better": f.better} for f in found})
    ctx.metric(worse=[f.name for f in found if f.better is False], verdict=evaluation.verdict(report), **counts)
    print("\n".join(evaluation.lines(report)))
    ctx.remark("; ".join((evaluation.verdict(report), *told)))


def _measure(
    name: str,
    folder: Path,
    tokenizer: Any,
    rows: Sequence[dict[str, list[int]]],
    prompts: Sequence[Messages],
    wanted: Sequence[str],
    config: EvaluateConfig,
    ctx: Context,
) -> tuple[dict[str, Any], list[str]]:
    """The figures of one model, and its answers."""
    import torch

    from hpc.inside import answering, conversations, heldout, models, tasks

    dtype = models.compute_dtype(config.dtype)
    ctx.progress(0, 1, f"loading the {name} model")
    model = models.load(folder, dtype).eval()
    if torch.cuda.is_available():
        model = model.to("cuda")
    figures: dict[str, float] = {}
    low: list[str] = []
    if rows:
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        loss, labels = heldout.loss(
            model,
            rows,
            conversations.Padded(pad),
            batch_size=config.batch_size,
            tell=lambda done, total: ctx.progress(done, total + 1, f"the {name} model's loss"),
        )
        figures = {"held-out loss": loss, "perplexity": math.exp(min(loss, 700))}
    else:
        labels = 0
    said = answering.answers(
        model,
        tokenizer,
        prompts,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        tell=lambda done: ctx.progress(done, len(prompts) + 1, f"the {name} model's answers"),
    )
    if wanted:
        figures |= answering.scores(said[: len(wanted)], wanted)
    if config.tasks:
        assert config.task_folder is not None
        ctx.progress(0, 1, f"the {name} model's tasks")
        found, low = tasks.run(model, tokenizer, config.tasks, Path(config.task_folder), config.batch_size)
        figures |= found
    return {"figures": figures, "low_is_good": low, "labels": labels, "dtype": dtype}, said


STAGE = Stage(
    name="evaluate",
    summary="A tuned model against its base: held-out loss, ROUGE, chrF, answers side by side",
    config=EvaluateConfig,
    container="train",
    consumes={
        "model": Input(kind="hf_model"),
        "base_model": Input(kind="hf_model", optional=True, original=True),
        "dataset": Input(kind="dataset"),
    },
    outputs=outputs,
    resources=resources,
    run=run,
    files=files,
    check=check,
    size=size,
)
