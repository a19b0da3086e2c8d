"""How the reader is trained: how long, how fast, on what."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(".cache/reader")  # where the state is kept


@dataclass(frozen=True)
class Plan:
    """A training run.

    Attributes:
        steps: of one batch each.
        groups, size, tiles: what a batch of one process holds (``batches.py``).
        full: the share of images with as many and as long lines as the level allows.
        rate: of both optimizers, at most.
        growing: the share of the batches over which images become as varied as they will be.
        apart: the share of the steps in which the decoder does not see what the tower says, but
            what a good tower would say.
    """

    steps: int = 7_000
    groups: int = 8
    size: int = 24
    tiles: int = 256
    full: float = 0.45
    rate: float = 2.5e-3
    growing: float = 0.235
    apart: float = 0.25
