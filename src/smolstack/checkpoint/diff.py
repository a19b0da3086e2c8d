"""Compares two checkpoints: weights, memory-mapped, and settings."""

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

LONG = 80  # characters; longer settings are shown by their length
AT_ONCE = 2**22  # numbers compared at once: 32 MiB in float64


@dataclass
class Change:
    """Difference of one tensor, or of one part of a model, between A and B.

    Attributes:
        name: the tensor's name in the files, or the part's.
        tensors, changed: the number of tensors, and of those that differ in any bit.
        parameters: the number of values in the tensors.
        before: Euclidean norm in A.
        moved: Euclidean norm of B − A.
        largest: largest absolute difference of one value.
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
        """‖B − A‖ / ‖A‖; infinite if A is zero and B is not."""
        if self.before == 0:
            return 0.0 if self.moved == 0 else float("inf")
        return self.moved / self.before

    def add(self, other: Change) -> None:
        """Add another change to this one."""
        self.tensors += other.tensors
        self.changed += other.changed
        self.parameters += other.parameters
        self.before = (self.before**2 + other.before**2) ** 0.5
        self.moved = (self.moved**2 + other.moved**2) ** 0.5
        self.largest = max(self.largest, other.largest)


@dataclass(frozen=True)
class Differences:
    """The result of a comparison of two checkpoints.

    Attributes:
        parts: changes by part, in model order.
        tensors: changes of all tensors that both have, in the order of A's files.
        only_a, only_b: names of tensors that only one of them has.
        reshaped: names whose shapes differ, with both.
        formats: names stored in different number formats, as "F32 → BF16".
        settings: settings whose meaning differs, as "FILE KEY" → (A's, B's); None if one has no
            such setting. Differences in layout between versions of transformers do not count.
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
        """Whether nothing differs; weights are compared bit by bit."""
        named = self.only_a or self.only_b or self.reshaped or self.formats or self.settings
        return not named and all(change.changed == 0 for change in self.tensors)

    def most_changed(self, count: int) -> list[Change]:
        """Return the tensors with the largest relative change."""
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
    """Compare two checkpoints. Weights are memory-mapped and read in pieces; integers are compared
    as the floats that they represent.

    Args:
        a, b: anything that can be loaded: folders, adapters on their bases, GGUF files.
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
    """Yield each tensor's change."""
    for name in names:  # one at a time: the two sides may differ in order
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
    """Return settings whose meaning differs; long values are replaced by their size."""
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
