"""Parts of the model, each alone: connector, vision tower, prefill, decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from smolstack.bench import sizes
from smolstack.bench.peers.side import Side
from smolstack.bench.timing import Case, Contender
from smolstack.bench.workload import Setting

TILES = (1, 5, 17)
PROMPTS = (94, 1188)
CONTEXTS = (100, 1200)
STEPS = 16


def connector(setting: Setting, sides: Sequence[Side]) -> Iterator[Case]:
    """Patch states to visual tokens."""
    config = setting.config
    for tiles in TILES:
        patches = setting.noise(tiles, config.vision.side**2, config.vision.hidden_size)
        yield Case(
            f"connector, {_tiles(tiles)}",
            gather(sides, lambda side, x=patches: side.connector(x)),  # type: ignore[misc]
            flops=2 * tiles * config.tokens_per_tile * sizes.connector(config),
        )


def vision(setting: Setting, sides: Sequence[Side]) -> Iterator[Case]:
    """Encode one tile with the vision tower."""
    vision = setting.config.vision
    tile = setting.noise(1, 3, vision.image_size, vision.image_size)
    yield Case(
        "vision, 1 tile",
        gather(sides, lambda side: side.vision(tile)),
        flops=sizes.tower_flops(setting.config),
    )


def prefill(setting: Setting, sides: Sequence[Side]) -> Iterator[Case]:
    """A prompt of text tokens, up to the logits of the token after it."""
    for length in PROMPTS:
        ids = setting.ids(length)
        yield Case(
            f"prefill, {length} tokens",
            gather(sides, lambda side, x=ids: side.prefill(x)),  # type: ignore[misc]
            flops=sizes.prefill_flops(setting.config, length),
        )


def decode(setting: Setting, sides: Sequence[Side]) -> Iterator[Case]:
    """Decode new tokens one at a time after a context, per token."""
    for length in CONTEXTS:
        ids = setting.ids(length)
        yield Case(
            f"decode, after {length} tokens",
            gather(sides, lambda side, x=ids: side.decode(x, STEPS)),  # type: ignore[misc]
            flops=2 * STEPS * sizes.decoder(setting.config),
            units=STEPS,
        )


def gather(sides: Sequence[Side], work: Callable[[Side], Sequence[Contender]]) -> list[Contender]:
    """Return every side's contenders for one case."""
    return [contender for side in sides for contender in work(side)]


def _tiles(count: int) -> str:
    return "1 tile" if count == 1 else f"{count} tiles"
