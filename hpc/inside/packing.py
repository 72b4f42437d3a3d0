"""
Several conversations in one row of tokens, so that no padding is calculated.

None sees another: positions begin anew with each, from which transformers builds the attention's mask (and flash
attention its bounds). That a model does so is not believed but tried, before it is trained.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Sequence
from typing import Any

from hpc.core.errors import HpcError
from hpc.inside.conversations import IGNORED, Row

LENGTHS = "seq_lengths"
"""The column of a packed row with the lengths of its conversations; trl keeps a column of this name."""
_SEEN = 1e-3
"""A logit of a packed conversation differs at most so much from its own, relative to the largest (1e-6 is usual)."""


def packed(rows: Sequence[Row], max_length: int, seed: int) -> list[Row]:
    """The rows in as few of at most `max_length` tokens as best fit, longest first, finds; shuffled within a length."""
    order = list(rows)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda row: -len(row["input_ids"]))  # stable: rows of one length stay shuffled
    bins: list[list[Row]] = []
    free: list[tuple[int, int]] = []  # (tokens left, number of the bin), sorted
    for row in order:
        length = len(row["input_ids"])
        place = bisect.bisect_left(free, (length, -1))
        if place == len(free):
            bins.append([row])
            left, number = max_length - length, len(bins) - 1
        else:
            left, number = free.pop(place)
            bins[number].append(row)
            left -= length
        bisect.insort(free, (left, number))
    return [_joined(one) for one in bins]


def _joined(rows: Sequence[Row]) -> Row:
    """The first token of each conversation is no answer to the one before."""
    return {
        "input_ids": [token for row in rows for token in row["input_ids"]],
        "labels": [label for row in rows for label in (IGNORED, *row["labels"][1:])],
        LENGTHS: [len(row["input_ids"]) for row in rows],
    }


class Packed:
    """Packed rows -> one batch. It counts the tokens that are no padding."""

    def __init__(self, pad: int, *, flat: bool) -> None:
        self.pad = pad
        self.flat = flat
        """All in one row, as flash attention wants it; else the masks would grow with the square of the batch."""
        self.tokens = 0

    def __call__(self, batch: Sequence[Row]) -> dict[str, Any]:
        import torch

        self.tokens += sum(len(row["input_ids"]) for row in batch)
        if self.flat:
            merged = {name: [x for row in batch for x in row[name]] for name in ("input_ids", "labels", LENGTHS)}
            batch = [merged]
        longest = max(len(row["input_ids"]) for row in batch)

        def filled(name: str, filler: int) -> Any:
            return torch.tensor([row[name] + [filler] * (longest - len(row[name])) for row in batch])

        positions = [
            [i for length in (*row[LENGTHS], longest - len(row["input_ids"])) for i in range(length)] for row in batch
        ]
        return {
            "input_ids": filled("input_ids", self.pad),
            "labels": filled("labels", IGNORED),
            "position_ids": torch.tensor(positions),
        }


def prove(model: Any, rows: Sequence[Row], *, flat: bool) -> float:
    """The largest difference that packing makes to a conversation's logits; HpcError where one sees another."""
    import torch

    first, second = (row["input_ids"][-24:] for row in (rows[0], rows[-1]))
    joined = _joined([{"input_ids": ids, "labels": ids} for ids in (first, second)])
    batch = Packed(0, flat=flat)([joined])
    del batch["labels"]
    training = model.training
    model.eval()
    with torch.inference_mode():
        together = model(**{k: v.to(model.device) for k, v in batch.items()}, use_cache=False).logits[0, len(first) :]
        alone = model(input_ids=torch.tensor([second], device=model.device), use_cache=False).logits[0]
    model.train(training)
    difference = float((together - alone).abs().max() / alone.abs().max())
    limit = _SEEN if together.dtype == torch.float32 and not _rounds(model) else 0.1
    if not difference <= limit:
        raise HpcError(
            "packed conversations would see each other in this model:"
            f" what one answers changes by {difference:.2g} with its neighbour",
            hint="set finetune.packing = false (and group_by_length = true)",
        )
    return difference


def _rounds(model: Any) -> bool:
    """It calculates in less than float32: the same sum in another order gives another last digit."""
    import torch

    return any(weight.dtype != torch.float32 for weight in model.parameters())
