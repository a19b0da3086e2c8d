"""Any decoded image as RGB."""

from __future__ import annotations

from PIL import Image

from smolstack.processor.bit_depth import is_deep, to_grey

ORIENTATION = 0x0112  # EXIF's tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb(image: Image.Image, *, upright: bool = False) -> Image.Image:
    """Decode to RGB: transparency over white, deep grays scaled, EXIF orientation applied."""
    image.load()
    turn = _TURNS.get(image.getexif().get(ORIENTATION, 1)) if upright else None
    made = image
    if is_deep(made):
        made = to_grey(made)
    if "A" in made.getbands() or (made is image and made.info.get("transparency") is not None):
        made = made.convert("RGBA")
        white = Image.new("RGBA", made.size, (255, 255, 255, 255))
        made = Image.alpha_composite(white, made)
        del white
    made = made.convert("RGB")
    return made if turn is None else made.transpose(turn)
