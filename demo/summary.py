"""What the demo came to: both answers, both losses, where the outputs lie, what to type next."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from hpc.core.rundir import RunDir, RunsDir, read_json
from hpc.login import view
from hpc.login.settings import locate
from hpc.login.states import Scheduler, StageState, states

HERE = Path(__file__).resolve().parent


def main() -> int:
    runs = RunsDir(locate(env={}, cwd=HERE).runs)
    newest = next(runs.runs(), None)
    rows = states([newest], Scheduler()) if newest else []
    results = {row.stage: result(runs, row) for row in rows}
    if not all(results.get(stage) for stage in ("finetune", "merge")):
        print("The demo has not run to its end yet: make demo")
        return 1
    training, model = results["finetune"]["metrics"], results["merge"]["metrics"]
    answer("Question", model["question"])
    answer("The model's answer before", model["before"])
    answer("The model's answer after", model["after"])
    before, after = training["eval_loss_before"], training["eval_loss_after"]
    print(f"\nLoss on answers it was not trained on: {before:.3f} before, {after:.3f} after", end="")
    print(f" ({training['steps']} steps, {training['train_seconds']:.0f} s)\n")
    view.status(rows)
    print("\nOutputs:")
    for stage, manifest in results.items():
        for name, output in manifest.get("outputs", {}).items():
            print(f"  {stage + ' ' + name:18}{output['path']}")
    print("""
Next, after  cd demo && . ../.venvs/hpc/bin/activate
  hpc status                                 every run, and where it stands
  hpc logs finetune                          what the training printed
  hpc plan --set finetune.max_steps=120      what would run again, and what would not
  hpc submit pipeline --set finetune.max_steps=120 --wait""")
    return 0


def result(runs: RunsDir, row: StageState) -> dict[str, Any]:
    """The stage's manifest, from the run that made it; {} where it is not done."""
    return read_json(RunDir(runs.path / (row.reused or row.run)).stage(row.stage).manifest) or {}


def answer(title: str, text: str) -> None:
    words = textwrap.fill(" ".join(text.split()), 100)
    print(f"\n{title}:\n{textwrap.indent(words, '  ')}")


if __name__ == "__main__":
    raise SystemExit(main())
