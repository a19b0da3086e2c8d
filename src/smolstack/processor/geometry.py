"""The planner: how an image of a given size becomes tiles and tokens. Integers only.

The only code that computes how many tiles or tokens an image takes; prompts, tiles, the command
line, limits and benchmarks all use it. Sizes are (width, height) in pixels, grids (rows, columns).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

from smolstack.errors import ImageError
from smolstack.option_types import FLAG, WHOLE_NUMBER, check_option_types
from smolstack.processor.settings import ImageSettings

MAX_EDGE = 4096  # the family's image processor never resizes beyond this


@dataclass(frozen=True)
class TilePlan:
    """How one image is resized and tiled.

    Attributes:
        source: (width, height) as given.
        resized: (width, height) after the first resize.
        canvas: (width, height) that tiles are cut from: whole tiles.
        rows, cols: grid of tiles cut from the canvas; both 0 if the image is not split.
        tile_edge: pixels of a tile's side.
        tokens_per_tile: S.
        prompt_tokens: tokens of the whole prompt with this image; None if no prompt is known.
        image: the argument of :meth:`smolstack.VLM.plan`, for drawing the tiles in a notebook.
    """

    source: tuple[int, int]
    resized: tuple[int, int]
    canvas: tuple[int, int]
    rows: int
    cols: int
    tile_edge: int
    tokens_per_tile: int
    prompt_tokens: int | None = None
    image: Any = field(default=None, repr=False, compare=False)

    @property
    def tiles(self) -> int:
        """Number of tiles: rows · cols plus one of the whole image."""
        return self.rows * self.cols + 1

    @property
    def visual_tokens(self) -> int:
        """Number of visual tokens: tiles · S."""
        return self.tiles * self.tokens_per_tile

    @property
    def pixels_read(self) -> int:
        """Pixels read by the vision tower: tiles · tile_edge²."""
        return self.tiles * self.tile_edge**2

    def boxes(self) -> list[tuple[int, int, int, int]]:
        """(left, top, right, bottom) of each tile on the canvas, row by row, without the whole
        image.
        """
        edge = self.tile_edge
        return [
            (col * edge, row * edge, (col + 1) * edge, (row + 1) * edge)
            for row in range(self.rows)
            for col in range(self.cols)
        ]

    def source_boxes(self) -> list[tuple[int, int, int, int]]:
        """The same boxes in pixels of the source image, rounded down."""
        width, height = self.source
        wide, high = self.canvas
        return [
            (
                left * width // wide,
                top * height // high,
                right * width // wide,
                bottom * height // high,
            )
            for left, top, right, bottom in self.boxes()
        ]

    def with_prompt_tokens(self, count: int) -> TilePlan:
        return replace(self, prompt_tokens=count)


class Tiling(TypedDict, total=False):
    """Tiling options; each that is omitted follows the checkpoint.

    Attributes:
        split: whether images are split into tiles.
        max_image_tokens: maximum visual tokens per image; the largest tile grid within the limit
            is used.
        upscale: False prevents enlarging an image beyond its own size, except to fill its last
            tiles. Published models were trained with True.
    """

    split: bool | None
    max_image_tokens: int | None
    upscale: bool


TILING_TYPES = {"split": FLAG, "max_image_tokens": WHOLE_NUMBER, "upscale": FLAG}


def plan_tiles(
    size: tuple[int, int],
    settings: ImageSettings,
    tokens_per_tile: int,
    split: bool | None = None,
    *,
    max_image_tokens: int | None = None,
    upscale: bool = True,
) -> TilePlan:
    """Plan an image of ``size`` (width, height). See :class:`Tiling` for the options.

    With splitting, the image is resized so that its longer side is ``longest_edge``, then stretched
    to whole tiles. A canvas of more than one tile is cut into rows × cols tiles, followed by a tile
    of the whole image. Without splitting, the image is stretched to a single tile.

    Raises:
        ImageError: a side is not positive, an option has another type, or a single tile exceeds
            ``max_image_tokens``.
    """
    given = {"split": split, "max_image_tokens": max_image_tokens, "upscale": upscale}
    check_option_types(given, TILING_TYPES, ImageError)
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"an image of {width}x{height} pixels; both sides must be positive")
    longest = settings.longest_edge if settings.resize else max(size)
    if not upscale:
        longest = min(longest, max(size))
    plan = _plan(size, settings, tokens_per_tile, split, longest)
    if max_image_tokens is None or plan.visual_tokens <= max_image_tokens:
        return plan
    # Reduce the tiles along the longer side until the image fits; the minimum is a single tile.
    edge = settings.tile_edge
    for along in range((max(plan.canvas) - 1) // edge, 0, -1):
        plan = _plan(size, settings, tokens_per_tile, split, along * edge)
        if plan.visual_tokens <= max_image_tokens:
            return plan
    raise ImageError(
        f"max_image_tokens is {max_image_tokens}, below the {tokens_per_tile} visual tokens of a "
        "single tile"
    )


def _plan(
    size: tuple[int, int],
    settings: ImageSettings,
    tokens_per_tile: int,
    split: bool | None,
    longest: int,
) -> TilePlan:
    """Plan with a first resize to ``longest`` pixels."""
    edge = settings.tile_edge
    resized = size
    if settings.resize or longest < max(size):
        resized = _to_longest_edge(*size, longest)
    if not (settings.split if split is None else split):
        return TilePlan(size, resized, (edge, edge), 0, 0, edge, tokens_per_tile)
    canvas = _to_whole_tiles(*resized, edge)
    rows, cols = canvas[1] // edge, canvas[0] // edge
    if rows == cols == 1:
        rows = cols = 0
    return TilePlan(size, resized, canvas, rows, cols, edge, tokens_per_tile)


# The divisions below use the floating-point aspect ratio, as the family's image processor does:
# exact integer arithmetic would differ by one pixel where the true quotient is an integer and the
# rounded ratio lies above it.


def _to_longest_edge(width: int, height: int, longest: int) -> tuple[int, int]:
    """Scale the longer side to ``longest`` and the shorter in proportion to an even number.

    Neither side exceeds MAX_EDGE.
    """
    ratio = width / height
    if width >= height:
        width, height = longest, _even(int(longest / ratio))
    else:
        width, height = _even(int(longest * ratio)), longest
    width, height = max(width, 1), max(height, 1)
    ratio = width / height
    if width >= height and width > MAX_EDGE:
        width, height = MAX_EDGE, int(MAX_EDGE / ratio)
    elif height > width and height > MAX_EDGE:
        width, height = int(MAX_EDGE * ratio), MAX_EDGE
    return max(width, 1), max(height, 1)


def _to_whole_tiles(width: int, height: int, edge: int) -> tuple[int, int]:
    """Round the longer side up to whole tiles, scale the shorter in proportion and round it up
    too.
    """
    ratio = width / height
    if width >= height:
        width = _round_up(width, edge)
        height = _round_up(int(width / ratio), edge)
    else:
        height = _round_up(height, edge)
        width = _round_up(int(height * ratio), edge)
    return width, height


def _round_up(value: int, multiple: int) -> int:
    return max(1, -(-value // multiple)) * multiple


def _even(value: int) -> int:
    return value + value % 2
