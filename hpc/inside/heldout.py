"""The loss on rows that were not trained on: the mean over all their labels, however they are batched or shared out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hpc.inside import together
from hpc.inside.conversations import IGNORED, Row


class StopError(Exception):
    """The scheduler asked to stop while the loss was measured."""


def loss(
    model: Any,
    rows: Sequence[Row],
    collate: Callable[[Sequence[Row]], dict[str, Any]],
    *,
    batch_size: int,
    dtype: str = "float32",
    stopping: Callable[[], bool] = lambda: False,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[float, int]:
    """(loss per label, labels). With several ranks each measures its share, and all get the sum."""
    import torch

    kind = model.device.type
    own = sorted(rows, key=lambda row: len(row["input_ids"]))[together.rank() :: together.world()]
    rounds = -(-len(rows) // (batch_size * together.world()))  # the same on every rank, which ask each other at each
    total = torch.zeros(2, dtype=torch.float64)
    training = model.training
    model.eval()
    for number in range(rounds):
        if together.any_of(stopping()):
            raise StopError
        tell(number, rounds)
        batch = own[number * batch_size : (number + 1) * batch_size]
        if not batch:
            continue
        inputs = {name: tensor.to(model.device) for name, tensor in collate(batch).items()}
        labels = inputs.pop("labels")[:, 1:]
        with torch.inference_mode(), torch.autocast(kind, getattr(torch, dtype), enabled=dtype != "float32"):
            logits = model(**inputs, use_cache=False).logits[:, :-1]
            counts = labels != IGNORED
            found = torch.nn.functional.cross_entropy(logits[counts].float(), labels[counts], reduction="sum")
        total += torch.tensor([float(found), float(counts.sum())], dtype=torch.float64)
    model.train(training)
    summed, labels_seen = together.summed(total.tolist())
    return summed / max(1.0, labels_seen), int(labels_seen)
