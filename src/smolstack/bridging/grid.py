"""How many patches become one visual token, and how many tiles an image may have."""

from __future__ import annotations

from smolstack.config import VisionConfig
from smolstack.errors import ConfigError
from smolstack.processor.geometry import MAX_EDGE
from smolstack.processor.settings import ImageSettings

USUAL_TOKENS = 64  # of a tile of most published models of the family


def choose_scale(
    vision: VisionConfig,
    own: int | None,
    *,
    scale: int | None = None,
    visual_tokens: int | None = None,
) -> int:
    """The connector's scale for a tower's patch grid.

    Args:
        own: the scale that the tower was used with, if it was.
        scale: the one wanted.
        visual_tokens: tokens of a tile that are wanted instead.

    Returns:
        The wanted one; else ``own``; else the one whose tiles have about 64 tokens.

    Raises:
        ConfigError: both are given, or the grid cannot be merged so; the possible ones are named.
    """
    side = vision.side
    possible = {s: (side // s) ** 2 for s in range(1, side + 1) if side % s == 0}
    told = ", ".join(f"{s} ({count} tokens)" for s, count in possible.items())
    grid = f"the tower's grid of {side}×{side} patches can be merged by scales {told}"
    if scale is not None and visual_tokens is not None:
        raise ConfigError("scale and visual_tokens are both given, expected one of them")
    if scale is not None:
        if scale not in possible:
            raise ConfigError(f"scale is {scale}; {grid}")
        return scale
    if visual_tokens is not None:
        found = next((s for s, count in possible.items() if count == visual_tokens), None)
        if found is None:
            raise ConfigError(f"visual_tokens is {visual_tokens}; {grid}")
        return found
    if own is not None:
        return own
    return min(
        possible, key=lambda s: max(possible[s], USUAL_TOKENS) / min(possible[s], USUAL_TOKENS)
    )


def tiles_along(settings: ImageSettings) -> int:
    """Tiles along the longer side of an image, at most."""
    return -(-min(settings.longest_edge, MAX_EDGE) // settings.tile_edge)
