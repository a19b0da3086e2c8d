"""From image files to answers: image processing, asking, loading, memory, importing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from smolstack.bench.cases.components import gather
from smolstack.bench.peers.side import Side
from smolstack.bench.timing import Case, Contender
from smolstack.bench.workload import Scene, Setting


def images(setting: Setting, sides: Sequence[Side]) -> Iterator[Case]:
    """A decoded image to normalized tiles."""
    for scene in setting.scenes:
        yield Case(f"images, {_tiles(scene)}", gather(sides, partial(_images, scene)))


def ask(setting: Setting, sides: Sequence[Side]) -> Iterator[Case]:
    """Answer a question about an image file, greedily, with empty caches."""
    for scene in setting.scenes:
        yield Case(
            f"ask, {_tiles(scene)}, {setting.new_tokens} tokens",
            gather(sides, partial(_ask, scene)),
        )


def load(setting: Setting, sides: Sequence[Side]) -> Iterator[Case]:
    """Load a checkpoint in bfloat16, with its files in the page cache."""
    yield Case("load", gather(sides, lambda side: side.load()))


def memory(setting: Setting, sides: Sequence[Side]) -> Iterator[Case]:
    """Peak memory of a separate process that loads and answers once."""
    for scene in (setting.scenes[0], setting.scenes[-1]):
        yield Case(
            f"memory, {_tiles(scene)}, {setting.new_tokens} tokens",
            gather(sides, partial(_memory, scene)),
            unit="B",
            rounds=1,
        )


def imports(setting: Setting, sides: Sequence[Side]) -> Iterator[Case]:
    """Import the package in a new interpreter."""
    yield Case("import", gather(sides, lambda side: side.imports()))


def _images(scene: Scene, side: Side) -> Sequence[Contender]:
    return side.images(scene)


def _ask(scene: Scene, side: Side) -> Sequence[Contender]:
    return side.ask(scene)


def _memory(scene: Scene, side: Side) -> Sequence[Contender]:
    return side.memory(scene)


def _tiles(scene: Scene) -> str:
    return "1 tile" if scene.tiles == 1 else f"{scene.tiles} tiles"
