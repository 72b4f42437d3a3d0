"""Answers of a model to many prompts at once, and how near they come to reference answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hpc.inside.conversations import Message


def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[Message]],
    *,
    max_new_tokens: int,
    batch_size: int,
    tell: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Greedy answers, in the order of the prompts; prompts of like length are answered together."""
    import torch

    ids = [tokens(prompt, tokenizer) for prompt in prompts]
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    found = [""] * len(ids)
    for start in range(0, len(order), batch_size):
        tell(start)
        batch = order[start : start + batch_size]
        longest = max(len(ids[i]) for i in batch)
        rows = torch.tensor([[pad] * (longest - len(ids[i])) + ids[i] for i in batch], device=model.device)
        mask = torch.tensor([[0] * (longest - len(ids[i])) + [1] * len(ids[i]) for i in batch], device=model.device)
        with torch.inference_mode():
            made = model.generate(
                input_ids=rows, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, temperature=None,
                top_p=None, top_k=None, pad_token_id=pad,
            )  # fmt: skip
        for i, said in zip(batch, made[:, longest:], strict=True):
            found[i] = str(tokenizer.decode(said, skip_special_tokens=True)).strip()
    return found


def tokens(prompt: list[Message], tokenizer: Any) -> list[int]:
    """A prompt's tokens in the chat template, with the words that ask for the answer."""
    ids: list[int] = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    return ids


def scores(given: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """ROUGE (F, percent; it sees words of Latin letters and digits alone) and chrF of answers against references."""
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    scorer = RougeScorer(list(kinds), use_stemmer=True)
    each = [scorer.score(reference, answer) for answer, reference in zip(given, wanted, strict=True)]
    found = {kind: 100 * sum(one[kind].fmeasure for one in each) / len(each) for kind in kinds}
    return {**found, "chrF": float(sacrebleu.corpus_chrf(list(given), [list(wanted)]).score)}
