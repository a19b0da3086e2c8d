"""Prompts that begin alike (with the same pictures, say): their beginning is read once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from smolstack.batch import Batch
from smolstack.generation.reuse import TokenKey
from smolstack.model.cache import KVCache
from smolstack.model.vlm import VisionLanguageModel
from smolstack.processor.processor import Processor, Prompt

_WORTH = 64  # tokens: a pass over the weights of its own must save more than it costs


def share_beginning(
    model: VisionLanguageModel, batch: Batch, keys: Sequence[Sequence[TokenKey]], room: int
) -> KVCache | None:
    """What the prompts of one batch begin with in common, read once for all of them.

    Args:
        batch: its pictures are visual tokens.
        keys: of each prompt's tokens, in the batch's order.
        room: tokens that the cache must hold in the end.

    Returns:
        A cache for ``batch``, or None where too little would be saved. As many tokens are left to
        be read in each row as in the one that goes on longest alone: a cache's rows are equally
        long, so a row with a shorter ending reads the last of the beginning again.
    """
    lengths = [len(own) for own in keys]
    left = max(lengths) - _common(keys)
    kept = [max(0, length - left) for length in lengths]
    most = max(kept)
    if sum(kept) - most < _WORTH:
        return None
    row = kept.index(most)
    padding = max(lengths) - lengths[row]
    alone = KVCache(model.config.text, 1, most, dtype=model.cache_dtype, device=model.device)
    cache = model.new_cache(batch, room)
    with torch.inference_mode():
        model.read(model.merge(batch)[row : row + 1, padding : padding + most], alone)
        cache.begin_with(alone, kept)
    return cache


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
    return _common([prompt.token_ids for prompt in prompts])


def _common(rows: Sequence[Sequence[TokenKey]]) -> int:
    limit, first = min(map(len, rows)) - 1, rows[0]
    return next((i for i in range(limit) if any(row[i] != first[i] for row in rows)), limit)
