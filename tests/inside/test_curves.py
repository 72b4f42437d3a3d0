"""The curves of a training: lines of JSON, and a file that TensorBoard reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc.inside import curves


def test_a_resumed_training_logs_no_step_twice(tmp_path: Path) -> None:
    first = curves.Curves(tmp_path, 0)
    for step in (1, 2, 3):
        first.write(step, {"loss": float(step)})
    with open(tmp_path / curves.LOG, "a") as file:
        file.write('{"step": 4, "lo')  # a kill
    second = curves.Curves(tmp_path, 2)
    second.write(3, {"loss": 33.0})
    found = curves.read(tmp_path / curves.LOG)
    assert [(entry["step"], entry["loss"]) for entry in found] == [(1, 1.0), (2, 2.0), (3, 33.0)]


@pytest.mark.train
def test_tensorboard_reads_them(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = curves.Curves(tmp_path, 0)
    for step in (1, 2, 300):
        first.write(step, {"loss": step / 4, "learning_rate": 1e-5})
    curves.Curves(tmp_path, 2).write(3, {"loss": 8.0})
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert set(found.Tags()["scalars"]) == {"loss", "learning_rate"}
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(1, 0.25), (2, 0.5), (3, 8.0)]
