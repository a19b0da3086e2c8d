"""What every format of weights is read as: entries by Hugging Face name, and a way to tensors."""

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
        folder: where the files are that the entries name.
        entries: every weight by its Hugging Face name.
        read: (name, tensor) pairs of the names, or of all weights.
        notes: what is unusual and not wrong, a sentence each.
        losses: what does not stay as it is stored, a sentence each; loading logs them.
    """

    folder: Path
    entries: Mapping[str, Entry]
    read: Read
    notes: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()
