"""Draws a tile plan: every tile as the model sees it, labeled with its row and column."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from smolstack.errors import ImageError
from smolstack.output_files import atomic_file
from smolstack.processor.geometry import TilePlan
from smolstack.processor.tiles import ImageSource, open_image
from smolstack.text import plural

WIDEST = 1600  # maximum width that the drawing aims for, in pixels
CELL_SIDES = (150, 360)  # smallest and largest side of a tile in the drawing
GAP, MARGIN = 4, 24
PAPER, INK, FAINT, ACCENT = (250, 250, 248), (28, 30, 34), (110, 114, 120), (0, 98, 204)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def draw_plan(image: ImageSource | tuple[int, int], plan: TilePlan, name: str) -> Image.Image:
    """Draw the canvas cut into its tiles and, beside it, the whole-image tile.

    Tiles are drawn square, as the model sees them: an image that the plan stretches looks
    stretched.

    Args:
        image: a path, a file's bytes, or only a size, which is drawn as a checkerboard.
        plan: of that image.
        name: shown in the caption.
    """
    cell = _cell_side(plan)
    rows, cols = max(plan.rows, 1), max(plan.cols, 1)
    source = _pattern(plan) if isinstance(image, tuple) else open_image(image)
    canvas = source.resize((cols * cell, rows * cell), Image.Resampling.LANCZOS, reducing_gap=3.0)
    title, facts = _font(22), _font(16)
    lines = [(_short(Path(name).name), title, INK)] + [
        (text, facts, FAINT) for text in _facts(plan)
    ]
    caption = sum(_height(font) + 6 for _, font, _ in lines) + 14
    grid_width, grid_height = cols * (cell + GAP) - GAP, rows * (cell + GAP) - GAP
    width = grid_width + (MARGIN + cell if plan.rows else 0)
    text_width = max(int(font.getlength(text)) for text, font, _ in lines)
    drawing = Image.new(
        "RGB",
        (max(width, text_width) + 2 * MARGIN, grid_height + caption + 2 * MARGIN),
        PAPER,
    )
    pen = ImageDraw.Draw(drawing)
    top = MARGIN
    for text, font, colour in lines:
        pen.text((MARGIN, top), text, font=font, fill=colour)
        top += _height(font) + 6
    top = MARGIN + caption
    for row in range(rows):
        for col in range(cols):
            part = canvas.crop((col * cell, row * cell, (col + 1) * cell, (row + 1) * cell))
            place = (MARGIN + col * (cell + GAP), top + row * (cell + GAP))
            label = f"{row + 1}, {col + 1}" if plan.rows else "whole"
            _paste(drawing, part, place, label, INK if plan.rows else ACCENT)
    if plan.rows:
        whole = canvas.resize((cell, cell), Image.Resampling.LANCZOS)
        _paste(drawing, whole, (MARGIN * 2 + grid_width, top), "whole", ACCENT)
    return drawing


def save_image(drawing: Image.Image, path: Path) -> None:
    """Write an image in the format of its suffix, atomically."""
    suffix = path.suffix.lower()
    if suffix not in Image.registered_extensions():
        raise ImageError(f"{path} ends in {suffix or 'nothing'}, expected .png or .jpg")
    if not path.parent.is_dir():
        raise ImageError(f"{path}: the folder {path.parent} does not exist")
    with atomic_file(path) as beside:
        try:
            drawing.save(beside)
        except (ValueError, KeyError) as error:
            raise ImageError(f"{path} cannot be written as {suffix}: {error}") from error


def _cell_side(plan: TilePlan) -> int:
    """Side of a drawn tile: smaller for large grids, larger for small ones."""
    longest = max(plan.cols, plan.rows, 1)
    smallest, largest = CELL_SIDES
    return min(max(WIDEST // (longest + 1), smallest), largest)


def _facts(plan: TilePlan) -> list[str]:
    (width, height), (wide, high) = plan.source, plan.canvas
    tiles = f"{plural(plan.tiles, 'tile')} of {plan.tile_edge}x{plan.tile_edge}"
    if plan.rows:
        cut = f"{plural(plan.rows, 'row')} x {plural(plan.cols, 'column')} and the whole image"
        tiles = f"{cut}: {tiles}"
    return [
        f"{width}x{height} pixels, seen as {wide}x{high}",
        f"{tiles}, {plural(plan.visual_tokens, 'visual token')}",
    ]


def _paste(
    drawing: Image.Image,
    part: Image.Image,
    place: tuple[int, int],
    label: str,
    colour: tuple[int, int, int],
) -> None:
    """Paste a tile with a thin frame and a label in its corner."""
    drawing.paste(part, place)
    pen = ImageDraw.Draw(drawing)
    left, top = place
    right, bottom = left + part.width - 1, top + part.height - 1
    pen.rectangle((left, top, right, bottom), outline=colour, width=1)
    font = _font(max(15, part.width // 18))
    width, height = int(font.getlength(label)) + 16, _height(font) + 8
    pen.rounded_rectangle(
        (left + 6, top + 6, left + 6 + width, top + 6 + height), radius=5, fill=colour
    )
    pen.text(
        (left + 6 + width / 2, top + 6 + height / 2), label, font=font, fill="white", anchor="mm"
    )


def _short(name: str, longest: int = 60) -> str:
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def _pattern(plan: TilePlan) -> Image.Image:
    """A checkerboard with a size's proportions, used if there is no image."""
    width, height = plan.source
    shrink = max(1.0, max(width, height) / 2048)
    size = (max(1, round(width / shrink)), max(1, round(height / shrink)))
    step = max(8, max(size) // 40)
    board = Image.new("RGB", (2, 2), (226, 228, 231))
    board.putpixel((0, 0), (240, 241, 243))
    board.putpixel((1, 1), (240, 241, 243))
    pattern = Image.new("RGB", size)
    board = board.resize((2 * step, 2 * step), Image.Resampling.NEAREST)
    for left in range(0, size[0], 2 * step):
        for top in range(0, size[1], 2 * step):
            pattern.paste(board, (left, top))
    return pattern


def _font(size: int) -> Font:
    return ImageFont.load_default(size)


def _height(font: Font) -> int:
    return int(font.getbbox("Ag")[3])
