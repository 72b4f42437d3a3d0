"""The callback of a training: it tells progress, keeps the curves, passes on the wish to stop, ends a diverged one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hpc.core.errors import HpcError
from hpc.core.stage import Context
from hpc.inside import heldout, models, together, trainers
from hpc.inside.curves import FOLDER, Curves

_SHOWN = ("loss", "learning_rate", "grad_norm")


def watcher(ctx: Context) -> Any:
    """The callback; the curves begin with the training, after the checkpoint that it goes on from."""
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seen: dict[str, float] = {}
            self.curves: Curves | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step >= state.max_steps:  # the trainer would do one step more; the weights are loaded
                raise trainers.DoneError

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if together.any_of(ctx.stopping()):  # every rank saves the same step
                control.should_save = control.should_training_stop = True
            elif not control.should_log:
                ctx.progress(state.global_step, state.max_steps, "training", **self.seen)
            if control.should_save:
                control.should_log = True  # a loss that is no number is seen before it is saved

        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if control.should_save:
                control.should_log = True

        def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **_: Any) -> None:
            for name in ("loss", "train_loss", "eval_loss"):
                finite(logs.get(name, 0.0), state.global_step)
            if "loss" in logs:
                self.seen = {name: logs[name] for name in _SHOWN if name in logs}
                ctx.progress(state.global_step, state.max_steps, "training", **self.seen)
            if together.rank() == 0 and not {"train_loss", "train_runtime"} & set(logs):
                self.curves = self.curves or _curves(ctx)
                self.curves.write(state.global_step, {k: v for k, v in logs.items() if isinstance(v, int | float)})

        def on_prediction_step(self, *_: Any, **__: Any) -> None:
            if together.any_of(ctx.stopping()):
                raise heldout.StopError

    return Watcher()


def finite(loss: float, step: int) -> None:
    """HpcError where the loss is no number."""
    if not math.isfinite(loss):
        raise HpcError(
            f"the loss became {loss} at step {step}: the training has diverged",
            hint="lower finetune.learning_rate, and look for broken rows in the data",
        )


def _curves(ctx: Context) -> Curves:
    found = models.checkpoints(ctx.checkpoints)
    return Curves(ctx.folder / FOLDER, models.step_of(found[0]) if found else 0)
