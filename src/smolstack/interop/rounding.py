"""Where transformers' floating-point computation of vision position ids differs from integers.

For patch i of n, transformers computes ``bucketize(i · (1 / n), arange(1 / side, 1, 1 / side))`` in
float32, and smolstack ``i · side // n``. Both are intended to be the same index.
"""

from __future__ import annotations

import torch


def bucketed(side: int, count: int) -> list[int]:
    """Return row (or column) ids of ``count`` patches as transformers 5.24 computes them."""
    boundaries = torch.arange(1 / side, 1.0, 1 / side)
    places = torch.arange(count, dtype=torch.float32) * (1.0 / torch.tensor(count))
    ids: list[int] = torch.bucketize(places.clamp(max=1.0 - 1e-6), boundaries, right=True).tolist()
    return ids


def rounded_differently(side: int) -> list[tuple[int, list[tuple[int, int, int]]]]:
    """Return [(n, [(i, intended id, transformers' id)])] for every n up to ``side`` with
    differences.
    """
    found = []
    for count in range(1, side + 1):
        intended = [i * side // count for i in range(count)]
        wrong = [
            (i, ours, theirs)
            for i, (ours, theirs) in enumerate(zip(intended, bucketed(side, count), strict=True))
            if ours != theirs
        ]
        if wrong:
            found.append((count, wrong))
    return found
