"""The cases of ``smolstack bench``: the work given to every implementation, part by part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from smolstack.bench.cases import answers, caches, components, end_to_end, training
from smolstack.bench.peers.implementation import Implementation
from smolstack.bench.timing import Case
from smolstack.bench.workload import Workload

Part: TypeAlias = Callable[[Workload, Sequence[Implementation]], Iterator[Case]]

PARTS: dict[str, Part] = {
    "connector": components.connector,
    "vision": components.vision,
    "prefill": components.prefill,
    "decode": components.decode,
    "images": end_to_end.images,
    "ask": end_to_end.ask,
    "load": end_to_end.load,
    "memory": end_to_end.memory,
    "import": end_to_end.imports,
    "structured": answers.structured,
    "questions": answers.questions,
    "reuse": caches.reuse,
    "train": training.train,
}
