"""Tasks of lm-eval from local files. The library is an extra: the train image does without its fifty packages."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpc.core.errors import HpcError, UsageError


def need() -> None:
    """HpcError where the image has no lm-eval: said before a model is loaded."""
    import importlib.util

    if importlib.util.find_spec("lm_eval") is None:
        raise HpcError(
            "evaluate.tasks needs lm-eval, which is not in this image",
            hint='use an environment of your own that adds lm-eval to train: docs/training.md, "Tasks of lm-eval"',
        )


def run(
    model: Any, tokenizer: Any, names: Sequence[str], folder: Path, batch_size: int
) -> tuple[dict[str, float], list[str]]:
    """
    (`task metric` -> its value, without the errors' estimates; those of them of which less is better).

    A task names its data from its own folder.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder.resolve()), include_defaults=False)
    missing = [name for name in names if name not in manager.all_tasks]
    if missing:
        raise UsageError(f"there is no task {missing[0]} in {folder}", hint=f"it has {', '.join(manager.all_tasks)}")
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    before = os.getcwd()
    os.chdir(folder.resolve())  # lm-eval looks for `data_files` where it was started
    try:
        result = lm_eval.simple_evaluate(model=lm, tasks=list(names), task_manager=manager, bootstrap_iters=0)
    finally:
        os.chdir(before)
    found = {
        (task, metric.partition(",")[0]): float(value)
        for task, values in result["results"].items()
        for metric, value in values.items()
        if isinstance(value, int | float) and "," in metric and "stderr" not in metric
    }
    higher = result.get("higher_is_better", {})
    low = [f"{task} {metric}" for task, metric in found if higher.get(task, {}).get(metric) is False]
    return {f"{task} {metric}": value for (task, metric), value in found.items()}, low
