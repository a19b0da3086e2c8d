"""The common form of all weight formats: entries by Hugging Face name, and a function that reads
tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from smolstack.checkpoint.weights import Entry

if TYPE_CHECKING:
    from torch import Tensor

Read: TypeAlias = "Callable[[Collection[str] | None], Iterator[tuple[str, Tensor]]]"


@dataclass(frozen=True)
class Stored:
    """Weights in files.

    Attributes:
        folder: the folder of the files that the entries name.
        entries: all weights by Hugging Face name.
        read: yields (name, tensor) pairs for the given names, or for all weights.
        notes: unusual but valid findings, one sentence each.
        losses: what is not preserved exactly, one sentence each; loading logs them.
    """

    folder: Path
    entries: Mapping[str, Entry]
    read: Read
    notes: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()
