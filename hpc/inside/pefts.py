"""What only peft can merge (DoRA, replaced modules, tied embeddings): with the whole model in memory, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpc.core.errors import VerificationFailed
from hpc.inside import generation, models


def merge(base: Path, adapter: Path, target: Path, dtype: str, words: Any, ids: Any, resized: int) -> tuple[Any, float]:
    """Write base + adapter; the logits of the two apart, and the largest difference of their sum's.

    `resized`: rows of the embeddings where the adapter has its own; 0: the base's.
    """
    import torch
    from peft import PeftModel

    model = models.load(base, "float32")
    if resized:
        model.resize_token_embeddings(resized, mean_resizing=False)  # the adapter has them all
    try:
        both = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=True).eval()
    except (RuntimeError, ValueError, KeyError) as error:
        raise VerificationFailed(
            f"the adapter does not fit the base: {str(error).strip().splitlines()[0][:200]}",
            hint="merge.base_model must be the model that it was trained on",
        ) from error
    with torch.inference_mode():
        apart = both(ids).logits
        if not bool(torch.isfinite(apart).all()):
            raise VerificationFailed("the model gives logits that are not finite", hint="did the training diverge?")
        merged = both.merge_and_unload(safe_merge=True)
        difference = float((merged(ids).logits - apart).abs().max())
    merged.to(getattr(torch, dtype))
    merged.config.use_cache = True
    generation.mend(merged.generation_config, words)  # save_pretrained refuses some
    merged.save_pretrained(target)
    return apart, difference
