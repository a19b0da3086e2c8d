"""The cases of ``smolstack bench``: what every side is given to do, part by part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from smolstack.bench.cases import answers, parts, reuse, whole
from smolstack.bench.peers.side import Side
from smolstack.bench.setting import Setting
from smolstack.bench.timing import Case

Part: TypeAlias = Callable[[Setting, Sequence[Side]], Iterator[Case]]

PARTS: dict[str, Part] = {
    "connector": parts.connector,
    "vision": parts.vision,
    "prefill": parts.prefill,
    "decode": parts.decode,
    "images": whole.images,
    "ask": whole.ask,
    "load": whole.load,
    "memory": whole.memory,
    "import": whole.imports,
    "structured": answers.structured,
    "questions": answers.questions,
    "reuse": reuse.reuse,
}
