"""
generate: prompts -> answers of a model that is being served, filtered, as a data set to train on.

What was asked, of whom and how lies beside the rows, and so does every answer that was left out, with the reason.
The answers are kept as they come: a stage that is stopped, or whose service went away, goes on from there.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hpc.core.errors import HpcError, UsageError
from hpc.core.stage import Artifact, Context, Input, Resources, Stage
from hpc.inside import families
from hpc.inside.prompts import Prompt, read

_SCALE = re.compile(r"\b\d+\s*(?:to|-|–)\s*\d+\b")
_NUMBER = r"(?<!\w)-?\d+(?:\.\d+)?"
_OF_MOST = re.compile(rf"({_NUMBER})\s*(?:/|out of)\s*\d")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """What is asked, of which service, and which answers are good enough."""

    endpoint: str | None = None
    """The folder of a serving stage (runs/RUN/serve), or the address of another OpenAI-like service, to its /v1."""
    token_file: str | None = None
    """A file with the token of such an address. A serving stage's own token is found by itself."""
    model: str = ""
    """The model's name there; empty: the service's only one."""
    prompts: tuple[str, ...] = ()
    """Files: a prompt a line in .txt; else JSON lines with `prompt`, or `instruction` and `input`, or `messages`."""
    system: str = ""
    """A system message before every prompt; it is not in the rows."""
    template: str = "{prompt}"
    """What is asked, with the prompt in place of {prompt}; the rows have the bare prompt."""
    samples: int = 1
    """Answers to each prompt."""
    max_tokens: int = 512
    """Of an answer."""
    temperature: float = 0.7
    """0: always the most likely word."""
    top_p: float = 0.95
    """Words are drawn from the most likely ones that make up this share, above 0 to 1."""
    seed: int = 0
    """Of the draws, one for each answer, and of the rows that are held out."""
    concurrency: int = 8
    """Questions that are open at once."""
    patience_s: int = 900
    """Seconds that a service may be away: it may be requeued, or handed over."""
    unfinished: bool = False
    """Keep answers that were cut off at max_tokens."""
    thoughts: Literal["keep", "strip"] = "keep"
    """What a model wrote between <think> and </think>."""
    min_chars: int = 1
    max_chars: int = 20_000
    """Shorter and longer answers are left out."""
    without: tuple[str, ...] = ()
    """Regular expressions: an answer in which one is found is left out, e.g. "(?i)as an ai"."""
    judge: str = ""
    """What the model is asked about each answer, with {prompt} and {answer}; it is to reply with a number: the last one
    counts, before others the last N/10, and a scale (1 to 10) is none."""
    min_score: int = 7
    """The number below which an answer is left out; without one too."""
    eval_share: float = 0.1
    """Share of the prompts whose rows are held out, 0 to below 1; one prompt is always left to train on."""


def files(config: GenerateConfig) -> tuple[str, ...]:
    return (*config.prompts, *([config.token_file] if config.token_file else []))


def resources(config: GenerateConfig) -> Resources:
    """No GPU: the service has them."""
    return Resources(cpus_per_task=2, mem_gb=4, time_min=240)


def outputs(config: GenerateConfig) -> dict[str, Artifact]:
    return {"dataset": Artifact(kind="dataset", path="dataset")}


def check(config: GenerateConfig) -> None:
    """UsageError for settings that can't be and for prompts that can't be read. Standard library."""
    if not config.prompts:
        raise UsageError("generate.prompts names no file", hint='prompts = ["prompts.txt"], one prompt a line')
    for name in ("samples", "max_tokens", "concurrency"):
        if getattr(config, name) < 1:
            raise UsageError(f"generate.{name} must be 1 or more")
    if not 0 <= config.temperature <= 2 or not 0 < config.top_p <= 1 or not 0 <= config.eval_share < 1:
        raise UsageError("generate: temperature is from 0 to 2, top_p above 0 to 1, eval_share from 0 to below 1")
    if config.samples > 1 and config.temperature == 0:
        raise UsageError(
            "generate.samples answers of temperature 0 are all the same", hint="samples = 1, or raise temperature"
        )
    for name, needed in (("template", ("{prompt}",)), ("judge", ("{answer}",) if config.judge else ())):
        if missing := [word for word in needed if word not in getattr(config, name)]:
            raise UsageError(f"generate.{name} lacks {missing[0]}")
    for pattern in config.without:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UsageError(f"generate.without: {pattern!r} is no regular expression: {error}") from error
    if not sum(1 for file in config.prompts for _ in read(Path(file))):  # all of them: one that is broken is told now
        raise UsageError("generate.prompts holds no prompt")


def run(config: GenerateConfig, ctx: Context) -> None:
    """Ask, filter and write; without an output where the scheduler asked to stop."""
    from hpc.inside.asking import Served

    prompts = [prompt for file in config.prompts for prompt in read(Path(file))]
    served = Served(ctx.inputs["endpoint"], config.token_file, config.patience_s, ctx.stopping)
    said = _asked(prompts, served, config, ctx)
    if len(said) < len(prompts) * config.samples:
        return
    kept, dropped = _judged(prompts, said, config)
    reasons = Counter(row["reason"] for row in dropped)
    ctx.metric(prompts=len(prompts), answers=len(said), rows=len(kept), dropped=dict(reasons.most_common()))
    ctx.metric(tokens=sum(entry["tokens"] for entry in said.values()))
    if not kept:
        reason, count = reasons.most_common(1)[0]
        raise HpcError(
            f"none of {len(said)} answers was good enough; {count} times: {reason}",
            hint="look at checkpoints/answers.jsonl, and at the filters of [generate]",
        )
    _write(ctx.outputs["dataset"], prompts, kept, dropped, said, config)


def _asked(prompts: list[Prompt], served: Any, config: GenerateConfig, ctx: Context) -> dict[tuple[int, int], Any]:
    """(prompt, sample) -> what came, with what an earlier attempt has got; not all of them where it is to stop."""
    from concurrent.futures import ThreadPoolExecutor, as_completed

    memory = ctx.checkpoints / "answers.jsonl"
    said = _remembered(memory)
    open_ = [(i, n) for i in range(len(prompts)) for n in range(config.samples) if (i, n) not in said]
    total = len(said) + len(open_)
    with (
        open(memory, "a", encoding="utf-8") as file,
        ThreadPoolExecutor(config.concurrency, thread_name_prefix="ask") as pool,
    ):
        waiting = [pool.submit(_ask, prompts[i], (i, n), served, config) for i, n in open_]
        try:
            for done in as_completed(waiting):
                entry = done.result()
                if entry is None:
                    continue
                said[entry["at"][0], entry["at"][1]] = entry
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
                file.flush()
                ctx.progress(len(said), total, "asking")
        finally:
            pool.shutdown(cancel_futures=True)
    return said


def _remembered(memory: Path) -> dict[tuple[int, int], Any]:
    if not memory.exists():
        return {}
    said = {}
    data = memory.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:  # killed while it wrote, perhaps in the middle of a letter
        memory.write_bytes(whole)
    for line in whole.split(b"\n")[:-1]:
        entry = json.loads(line)
        said[entry["at"][0], entry["at"][1]] = entry
    return said


def _ask(prompt: Prompt, at: tuple[int, int], served: Any, config: GenerateConfig) -> dict[str, Any] | None:
    from hpc.inside.asking import RefusedRequest

    system = [{"role": "system", "content": config.system}] if config.system else []
    last = {"role": "user", "content": config.template.replace("{prompt}", prompt.text)}
    name = {"model": config.model} if config.model else {}
    seed = config.seed + at[0] * config.samples + at[1]
    draws = {"temperature": config.temperature, "top_p": config.top_p, "seed": seed}
    entry: dict[str, Any] = {"at": at, "where": prompt.where, "text": "", "tokens": 0}
    try:
        answer = served.chat([*system, *prompt.messages[:-1], last], max_tokens=config.max_tokens, **draws, **name)
        if answer is None:
            return None
        keeps = config.thoughts != "strip"
        text = families.opened(answer.text) if keeps else families.unthought(answer.text) or ""
        entry.update(text=text.strip(), whole=answer.whole, tokens=answer.tokens, model=answer.model)
        if config.judge and entry["text"]:
            question = config.judge.replace("{prompt}", prompt.text).replace("{answer}", entry["text"])
            verdict = served.chat([{"role": "user", "content": question}], max_tokens=512, temperature=0, **name)
            if verdict is None:
                return None
            entry["score"] = score(families.unthought(verdict.text) or "")
    except RefusedRequest as refused:
        entry["refused"] = str(refused)
    return entry


def score(text: str) -> float | None:
    """The number that a judge gives, or None."""
    text = _SCALE.sub("", text)
    found = _OF_MOST.findall(text) or re.findall(_NUMBER, text)
    number = float(found[-1]) if found else None
    return int(number) if number is not None and number.is_integer() else number


def _judged(
    prompts: list[Prompt], said: dict[tuple[int, int], Any], config: GenerateConfig
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The answers that are kept and those that are not, each in the order of the prompts."""
    kept: list[dict[str, Any]] = []
    dropped: list[dict[str, Any]] = []
    seen: set[tuple[Any, str]] = set()
    for at in sorted(said):
        entry, prompt = said[at], prompts[at[0]]
        reason = fault(entry, config)
        if not reason and (prompt.talk, entry["text"]) in seen:
            reason = "said before"
        if not reason and entry["text"] == prompt.text.strip():
            reason = "the prompt itself"
        seen.add((prompt.talk, entry["text"]))
        (dropped if reason else kept).append({**entry, **({"reason": reason} if reason else {})})
    return kept, dropped


def fault(entry: dict[str, Any], config: GenerateConfig) -> str:
    """Why an answer is left out, or ""."""
    text = entry["text"]
    if "refused" in entry:
        return "the service refused the request"
    if not entry["whole"] and not config.unfinished:
        return "cut off at max_tokens"
    if not text:
        return "empty"
    if not config.min_chars <= len(text) <= config.max_chars:
        return "too short" if len(text) < config.min_chars else "too long"
    if found := next((pattern for pattern in config.without if re.search(pattern, text)), None):
        return f"without: {found}"
    if config.judge and entry["score"] is None:
        return "the judge gave no number"
    if config.judge and entry["score"] < config.min_score:
        return f"judged below {config.min_score}"
    return ""


def _write(
    folder: Path,
    prompts: list[Prompt],
    kept: list[dict[str, Any]],
    dropped: list[dict[str, Any]],
    said: dict[tuple[int, int], Any],
    config: GenerateConfig,
) -> None:
    """train.jsonl, eval.jsonl (other prompts), dropped.jsonl, provenance.json."""
    import random
    from dataclasses import asdict

    from hpc.core.rundir import write_json

    folder.mkdir(parents=True, exist_ok=True)
    talks = sorted({prompts[entry["at"][0]].talk for entry in kept})  # one prompt's answers stay on one side
    count = min(round(len(talks) * config.eval_share), len(talks) - 1)
    held = set(random.Random(config.seed).sample(talks, count))
    lines: dict[str, list[str]] = {"train": [], "eval": [], "dropped": []}
    for entry in kept:
        prompt = prompts[entry["at"][0]]
        row = {
            "messages": [*prompt.messages, {"role": "assistant", "content": entry["text"]}],
            "from": {key: entry[key] for key in ("where", "model", "score") if key in entry},
        }
        lines["eval" if prompt.talk in held else "train"].append(json.dumps(row, ensure_ascii=False))
    lines["dropped"] = [json.dumps(entry, ensure_ascii=False) for entry in dropped]
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    models = sorted({entry["model"] for entry in said.values() if entry.get("model")})
    asked = {name: value for name, value in asdict(config).items() if name != "token_file"}
    write_json(folder / "provenance.json", {"schema": "hpc.generated/1", "models": models, "config": asked})


STAGE = Stage(
    name="generate",
    summary="Synthetic data: the answers of a served model, filtered",
    config=GenerateConfig,
    container="train",
    consumes={"endpoint": Input(kind="endpoint")},
    outputs=outputs,
    resources=resources,
    run=run,
    files=files,
    check=check,
)
