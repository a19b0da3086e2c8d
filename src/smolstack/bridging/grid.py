"""The connector's scale and the maximum number of tiles of a bridged model."""

from __future__ import annotations

from smolstack.config import VisionConfig
from smolstack.errors import ConfigError
from smolstack.processor.geometry import MAX_EDGE
from smolstack.processor.settings import ImageSettings

USUAL_TOKENS = 64  # visual tokens per tile of most published models of the family


def choose_scale(
    vision: VisionConfig,
    own: int | None,
    *,
    scale: int | None = None,
    visual_tokens: int | None = None,
) -> int:
    """Return the connector's scale for a tower's patch grid.

    Args:
        own: the scale that the tower was used with, or None.
        scale: the requested scale, or None.
        visual_tokens: the requested tokens per tile, instead of ``scale``.

    Returns:
        The requested scale; otherwise ``own``; otherwise the one closest to 64 tokens per tile.

    Raises:
        ConfigError: both are given, or the grid is not divisible; names the possible values.
    """
    side = vision.side
    possible = {s: (side // s) ** 2 for s in range(1, side + 1) if side % s == 0}
    told = ", ".join(f"{s} ({count} tokens)" for s, count in possible.items())
    grid = f"the tower's grid of {side}×{side} patches can be merged by scales {told}"
    if scale is not None and visual_tokens is not None:
        raise ConfigError("found scale and visual_tokens, expected only one of them")
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
    """Return the maximum number of tiles along an image's longer side."""
    return -(-min(settings.longest_edge, MAX_EDGE) // settings.tile_edge)
