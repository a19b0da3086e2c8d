"""Interprets transformers' masks and positions for smolstack."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, MutableMapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

# Set while a call must run on transformers' own modules.
left_to_transformers: ContextVar[bool] = ContextVar("left_to_transformers", default=False)
_MORE = ("output_attentions", "output_hidden_states")


def given_cache(cache: Any, kwargs: MutableMapping[str, Any]) -> Any:
    """Return a call's cache, which has an older name, ``past_key_values``; it is removed from
    ``kwargs``. As in transformers, the new name counts where both are given.
    """
    older = kwargs.pop("past_key_values", None)
    if cache is None or older is None:
        return older if cache is None else cache
    warnings.warn(
        "both past_key_values and cache are given; cache counts", FutureWarning, stacklevel=3
    )
    return cache


def needs_transformers(kwargs: Mapping[str, Any], config: Any) -> bool:
    """Return whether a call, or the config for options not in the call, requests outputs that only
    transformers' own forward pass returns.
    """
    parts = (config, config.text_config, config.vision_config)
    if kwargs.get("block_sequence_ids"):
        return True
    for name in _MORE:
        given = kwargs.get(name)
        if given if given is not None else any(getattr(part, name, False) for part in parts):
            return True
    given = kwargs.get("return_dict")
    return (getattr(config, "return_dict", True) if given is None else given) is False


def trains_padding(labels: Tensor | None, mask: Tensor | None) -> bool:
    """Return whether a label is predicted from a padding token, such as that of the first token in
    a left-padded row. The two implementations compute padding differently.
    """
    if labels is None or mask is None or mask.dim() != 2 or mask.shape != labels.shape:
        return False
    return bool(((labels[:, 1:] != -100) & (mask[:, :-1] == 0)).any())


def left_padding(mask: Tensor | None, past: int, *, alone: bool) -> tuple[Tensor | None, bool]:
    """Return left-padding tokens per row, and whether the mask contains nothing else.

    Args:
        mask: (B, past + T), 1 on real tokens; None for no padding.
        past: tokens in the cache.
        alone: no tokens follow these. Right padding is then irrelevant, because of causal
            attention.

    Returns:
        (B,) int64 or None, and whether smolstack's decoder supports the mask.
    """
    if mask is None:
        return None, True
    if mask.dim() != 2:
        return None, False
    real = mask.bool()
    if bool(real.all()):
        return None, True
    if bool((real[:, 1:] >= real[:, :-1]).all()):
        return (~real).sum(dim=1), True
    return None, alone and past == 0 and bool((real[:, 1:] <= real[:, :-1]).all())


def same_positions(
    position_ids: Tensor | None, padding: Tensor | None, past: int, new: int
) -> bool:
    """Return whether the given positions, (B, T), are those that smolstack computes from real
    tokens.
    """
    if position_ids is None:
        return True
    if position_ids.dim() != 2 or position_ids.shape[1] != new:
        return False
    expected = torch.arange(past, past + new, device=position_ids.device)[None]
    if padding is None:
        return bool((position_ids == expected).all())
    expected = expected - padding.to(position_ids.device)[:, None]
    return bool(((position_ids == expected) | (expected < 0)).all())


def filled_grids(masks: Tensor, patch: int) -> tuple[bool, list[tuple[int, int]] | None]:
    """Return (rows, columns) of patches that contain image, per tile, from a mask of pixels.

    Args:
        masks: (N, height, width), true on pixels that contain image.
        patch: patch edge in pixels.

    Returns:
        Whether every tile is filled as a rectangle from its top left corner; and the grids, None if
        every tile is full.
    """
    patches = masks.bool().unfold(1, patch, patch).unfold(2, patch, patch).any(dim=-1).any(dim=-1)
    if bool(patches.all()):
        return True, None
    rows, columns = patches[:, :, 0].sum(dim=1), patches[:, 0].sum(dim=1)
    height, width = patches.shape[1:]
    inside = (torch.arange(height, device=masks.device)[None, :, None] < rows[:, None, None]) & (
        torch.arange(width, device=masks.device)[None, None] < columns[:, None, None]
    )
    if not torch.equal(inside, patches) or not bool((rows > 0).all()):
        return False, None
    return True, list(zip(rows.tolist(), columns.tolist(), strict=True))
