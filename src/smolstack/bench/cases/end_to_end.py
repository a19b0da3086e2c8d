"""From image files to answers: image processing, asking, loading, memory, importing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from smolstack.bench.cases.components import gather
from smolstack.bench.peers.implementation import Implementation
from smolstack.bench.timing import Case, Contender
from smolstack.bench.workload import Scene, Workload


def images(workload: Workload, implementations: Sequence[Implementation]) -> Iterator[Case]:
    """A decoded image to normalized tiles."""
    for scene in workload.scenes:
        yield Case(f"images, {_tiles(scene)}", gather(implementations, partial(_images, scene)))


def ask(workload: Workload, implementations: Sequence[Implementation]) -> Iterator[Case]:
    """Answer a question about an image file, greedily, with empty caches."""
    for scene in workload.scenes:
        yield Case(
            f"ask, {_tiles(scene)}, {workload.new_tokens} tokens",
            gather(implementations, partial(_ask, scene)),
        )


def load(workload: Workload, implementations: Sequence[Implementation]) -> Iterator[Case]:
    """Load a checkpoint in bfloat16, with its files in the page cache."""
    yield Case("load", gather(implementations, lambda implementation: implementation.load()))


def memory(workload: Workload, implementations: Sequence[Implementation]) -> Iterator[Case]:
    """Peak memory of a separate process that loads and answers once."""
    for scene in (workload.scenes[0], workload.scenes[-1]):
        yield Case(
            f"memory, {_tiles(scene)}, {workload.new_tokens} tokens",
            gather(implementations, partial(_memory, scene)),
            unit="B",
            rounds=1,
        )


def imports(workload: Workload, implementations: Sequence[Implementation]) -> Iterator[Case]:
    """Import the package in a new interpreter."""
    yield Case("import", gather(implementations, lambda implementation: implementation.imports()))


def _images(scene: Scene, implementation: Implementation) -> Sequence[Contender]:
    return implementation.images(scene)


def _ask(scene: Scene, implementation: Implementation) -> Sequence[Contender]:
    return implementation.ask(scene)


def _memory(scene: Scene, implementation: Implementation) -> Sequence[Contender]:
    return implementation.memory(scene)


def _tiles(scene: Scene) -> str:
    return "1 tile" if scene.tiles == 1 else f"{scene.tiles} tiles"
