"""Several questions about the same pictures: what their prompts begin with is read once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from smolstack.model.cache import KVCache
from smolstack.model.vlm import VisionLanguageModel
from smolstack.processor.processor import Processor, Prompt


def read_beginning(
    model: VisionLanguageModel, processor: Processor, prompts: Sequence[Sequence[Prompt]]
) -> KVCache | None:
    """What several questions about the same pictures have in common, read once.

    Args:
        prompts: per question, the prompts of one batch: their pictures are visual tokens.

    Returns:
        A cache for a batch of any of the questions, or None where they share too little: the
        beginnings hold all pictures, and what follows them is as long in every row.
    """
    rows = list(zip(*prompts, strict=True))
    shared = [_shared(row) for row in rows]
    for row, length in zip(rows, shared, strict=True):
        visual = sum(plan.visual_tokens for plan in row[0].plans)
        found = row[0].token_ids[:length].count(model.config.image_token_id)
        if not length or found != visual:
            return None
    for question in prompts:
        if len({len(p.token_ids) - n for p, n in zip(question, shared, strict=True)}) > 1:
            return None
    heads = [
        replace(prompt, token_ids=prompt.token_ids[:length])
        for prompt, length in zip(prompts[0], shared, strict=True)
    ]
    batch = processor.batch(heads)
    cache = model.new_cache(batch, batch.token_ids.shape[1])
    with torch.inference_mode():
        model.prefill(batch, cache)
    return cache


def _shared(prompts: Sequence[Prompt]) -> int:
    """Tokens that prompts begin with in common; at least the last of each is left."""
    limit = min(len(prompt.token_ids) for prompt in prompts) - 1
    first = prompts[0].token_ids
    return next(
        (i for i in range(limit) if any(p.token_ids[i] != first[i] for p in prompts)), limit
    )
