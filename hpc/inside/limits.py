"""What a model can be given at most: the tokens that it knows, and positions where it learnt each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_TABLES = ("wpe", "embed_positions", "position_embeddings", "position_embedding")
"""What models with a table of learnt positions call it; most have none, and calculate any position."""


def learnt(model: Any) -> int | None:
    """The positions in the model's table of them; None for one that calculates them."""
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tables = (
        table.num_embeddings
        for name, table in model.named_modules()
        if name.rpartition(".")[2] in _TABLES and hasattr(table, "num_embeddings")
    )
    # OPT's has two more; that of a vision tower is another
    return known if known and any(known <= size <= known + 2 for size in tables) else None


def of(folder: Path) -> tuple[int, int | None]:
    """(tokens, learnt positions) of the model in a folder, whose weights stay there."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return model.get_input_embeddings().num_embeddings, learnt(model)
