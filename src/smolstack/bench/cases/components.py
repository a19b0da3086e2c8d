"""Parts of the model, each alone: connector, vision tower, prefill, decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from smolstack.bench import sizes
from smolstack.bench.peers.implementation import Implementation
from smolstack.bench.timing import Case, Contender
from smolstack.bench.workload import Workload

TILES = (1, 5, 17)
PROMPTS = (94, 1188)
CONTEXTS = (100, 1200)
STEPS = 16


def connector(workload: Workload, implementations: Sequence[Implementation]) -> Iterator[Case]:
    """Patch states to visual tokens."""
    config = workload.config
    for tiles in TILES:
        patches = workload.noise(tiles, config.vision.side**2, config.vision.hidden_size)
        yield Case(
            f"connector, {_tiles(tiles)}",
            gather(implementations, lambda implementation, x=patches: implementation.connector(x)),  # type: ignore[misc]
            flops=2 * tiles * config.tokens_per_tile * sizes.connector(config),
        )


def vision(workload: Workload, implementations: Sequence[Implementation]) -> Iterator[Case]:
    """Encode one tile with the vision tower."""
    vision = workload.config.vision
    tile = workload.noise(1, 3, vision.image_size, vision.image_size)
    yield Case(
        "vision, 1 tile",
        gather(implementations, lambda implementation: implementation.vision(tile)),
        flops=sizes.tower_flops(workload.config),
    )


def prefill(workload: Workload, implementations: Sequence[Implementation]) -> Iterator[Case]:
    """A prompt of text tokens, up to the logits of the token after it."""
    for length in PROMPTS:
        ids = workload.ids(length)
        yield Case(
            f"prefill, {length} tokens",
            gather(implementations, lambda implementation, x=ids: implementation.prefill(x)),  # type: ignore[misc]
            flops=sizes.prefill_flops(workload.config, length),
        )


def decode(workload: Workload, implementations: Sequence[Implementation]) -> Iterator[Case]:
    """Decode new tokens one at a time after a context, per token."""
    for length in CONTEXTS:
        ids = workload.ids(length)
        yield Case(
            f"decode, after {length} tokens",
            gather(implementations, lambda implementation, x=ids: implementation.decode(x, STEPS)),  # type: ignore[misc]
            flops=2 * STEPS * sizes.decoder(workload.config),
            units=STEPS,
        )


def gather(
    implementations: Sequence[Implementation], work: Callable[[Implementation], Sequence[Contender]]
) -> list[Contender]:
    """Return every implementation's contenders for one case."""
    return [contender for implementation in implementations for contender in work(implementation)]


def _tiles(count: int) -> str:
    return "1 tile" if count == 1 else f"{count} tiles"
