"""What differs between two checkpoints: weights, from the mapped files, and settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smolstack.checkpoint.hub import ModelPath
from smolstack.checkpoint.inspect import part_name
from smolstack.checkpoint.side_files import meaning
from smolstack.checkpoint.source import Source, open_source

LONG = 80  # characters of a setting that is shown by its length
AT_ONCE = 2**22  # numbers that are compared in one go: 32 MiB in float64


@dataclass
class Change:
    """How far one tensor, or a part of a model, moved from A to B.

    Attributes:
        name: the tensor's name in the files, or the part's.
        tensors, changed: how many there are, and how many of them differ in any bit.
        parameters: numbers in them.
        before: Euclidean norm in A.
        moved: Euclidean norm of B − A.
        largest: largest absolute difference of one number.
    """

    name: str
    tensors: int = 0
    changed: int = 0
    parameters: int = 0
    before: float = 0.0
    moved: float = 0.0
    largest: float = 0.0

    @property
    def relative(self) -> float:
        """‖B − A‖ / ‖A‖; infinite where A is zero and B is not."""
        if self.before == 0:
            return 0.0 if self.moved == 0 else float("inf")
        return self.moved / self.before

    def add(self, other: Change) -> None:
        """Count another one in."""
        self.tensors += other.tensors
        self.changed += other.changed
        self.parameters += other.parameters
        self.before = (self.before**2 + other.before**2) ** 0.5
        self.moved = (self.moved**2 + other.moved**2) ** 0.5
        self.largest = max(self.largest, other.largest)


@dataclass(frozen=True)
class Differences:
    """Two checkpoints compared.

    Attributes:
        parts: by part, in the order of the network.
        tensors: every tensor that both hold, in the order of A's files.
        only_a, only_b: names that one of them lacks.
        reshaped: names whose shapes differ, with both.
        formats: names stored in other number formats, as "F32 → BF16".
        settings: settings whose meaning differs, as "FILE KEY" → (A's, B's); None where one has
            none. The layout that a version of transformers writes makes no difference.
    """

    parts: tuple[Change, ...]
    tensors: tuple[Change, ...]
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()
    reshaped: Mapping[str, str] = field(default_factory=dict)
    formats: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def same(self) -> bool:
        """Whether nothing differs, weights to the last bit."""
        named = self.only_a or self.only_b or self.reshaped or self.formats or self.settings
        return not named and all(change.changed == 0 for change in self.tensors)

    def most_changed(self, count: int) -> list[Change]:
        """The tensors that moved most for their size."""
        moved = [change for change in self.tensors if change.changed]
        return sorted(moved, key=lambda change: -change.relative)[:count]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "same": self.same,
            "parts": [_plain(change) for change in self.parts],
            "tensors": [_plain(change) for change in self.tensors if change.changed],
            "only_a": list(self.only_a),
            "only_b": list(self.only_b),
            "reshaped": dict(self.reshaped),
            "formats": dict(self.formats),
            "settings": {name: {"a": a, "b": b} for name, (a, b) in self.settings.items()},
        }


def diff_checkpoints(
    a: Path | ModelPath, b: Path | ModelPath, *, progress: Callable[[], None] | None = None
) -> Differences:
    """Compare two checkpoints; weights are mapped and read piece by piece, integers as the floats
    that they stand for.

    Args:
        a, b: whatever is loaded: folders, adapters on their bases, GGUF files.
        progress: called after every tensor.

    Raises:
        ConfigError, CheckpointError: a folder or a file of it cannot be read.
    """
    one, other = open_source(a, floats=True), open_source(b, floats=True)
    ours, theirs = one.entries, other.entries
    shared = [name for name in ours if name in theirs]
    reshaped = {
        name: f"{list(ours[name].shape)} → {list(theirs[name].shape)}"
        for name in shared
        if ours[name].shape != theirs[name].shape
    }
    parts: dict[str, Change] = {}
    tensors = []
    comparable = [name for name in shared if name not in reshaped]
    for change in _compared(one, other, comparable):
        tensors.append(change)
        part = part_name(change.name)
        parts.setdefault(part, Change(part)).add(change)
        if progress is not None:
            progress()
    return Differences(
        parts=tuple(parts.values()),
        tensors=tuple(tensors),
        only_a=tuple(name for name in ours if name not in theirs),
        only_b=tuple(name for name in theirs if name not in ours),
        reshaped=reshaped,
        formats={
            name: f"{_format(one, name)} → {_format(other, name)}"
            for name in shared
            if _format(one, name) != _format(other, name)
        },
        settings=_settings(one, other),
    )


def _format(source: Source, name: str) -> str:
    entry = source.entries[name]
    return entry.stored or entry.dtype


def _compared(one: Source, other: Source, names: list[str]) -> Iterator[Change]:
    """Each tensor's change."""
    for name in names:  # one at a time: each side has an order of its own
        ((_, before),) = one.tensors((name,))
        ((_, after),) = other.tensors((name,))
        yield _change(name, before, after)


def _change(name: str, before: Tensor, after: Tensor) -> Change:
    change = Change(name, tensors=1, parameters=before.numel())
    squares = moved = 0.0
    one, other = before.flatten(), after.flatten()
    for start in range(0, one.numel(), AT_ONCE):
        piece = slice(start, start + AT_ONCE)
        x, y = one[piece].to(torch.float32), other[piece].to(torch.float32)
        squares += float(x.double().square().sum())
        if torch.equal(x, y):
            continue
        step = (y - x).abs()
        moved += float(step.double().square().sum())
        change.changed = 1
        change.largest = max(change.largest, float(step.max()))
    change.before, change.moved = squares**0.5, moved**0.5
    return change


def _settings(a: Source, b: Source) -> dict[str, tuple[Any, Any]]:
    """Settings whose meaning differs; long ones by their size, for want of a short way."""
    one, other = meaning(a.files), meaning(b.files)
    return {
        key: (_short(one.get(key)), _short(other.get(key)))
        for key in sorted({*one, *other})
        if one.get(key) != other.get(key)
    }


def _short(value: Any) -> Any:
    if isinstance(value, (str, bytes)) and len(value) > LONG:
        return f"{len(value):,} {'bytes' if isinstance(value, bytes) else 'characters'}"
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _plain(change: Change) -> dict[str, Any]:
    return {**asdict(change), "relative": change.relative}
