"""Pictures: opening them safely, cutting tiles, normalising pixels."""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from smolstack.errors import ImageError
from smolstack.native import library as native
from smolstack.processor.geometry import TilePlan
from smolstack.processor.pdf import page_of
from smolstack.processor.scaling import resize
from smolstack.processor.settings import ImageSettings

ImageSource: TypeAlias = "str | Path | bytes | Image.Image | npt.NDArray[np.uint8]"
MAX_PIXELS = 178_956_970  # a picture of more pixels is refused before it is decoded


def open_image(source: ImageSource, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a picture to RGB, upright.

    A file (path or bytes) is turned as its EXIF orientation says; a Pillow picture or an array is
    taken as it is. Transparency is laid over white.

    Args:
        source: a path (also of a page, ``report.pdf#page=3``), a file's bytes, a Pillow picture, or
            a uint8 array (H, W, 3).
        max_pixels: larger pictures are refused before they are decoded.

    Raises:
        ImageError: naming the picture, what was found and what was expected.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels)
    if isinstance(source, Image.Image):
        _check_size("the picture", source.size, max_pixels)
        return _to_rgb(source, "the picture")
    page = page_of(source)
    if page is not None:
        _check_size(str(page), page.size(), max_pixels)
        return page.render()
    name, opened = _open(source)
    with opened:
        _check_size(name, opened.size, max_pixels)
        return _to_rgb(opened, name, upright=True)


def image_size(source: ImageSource, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) of a picture, upright, without decoding its pixels."""
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels).size
    if isinstance(source, Image.Image):
        return source.size
    page = page_of(source)
    if page is not None:
        size = page.size()
        _check_size(str(page), size, max_pixels)
        return size
    name, opened = _open(source)
    with opened:
        _check_size(name, opened.size, max_pixels)
        try:
            turned = opened.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        except (OSError, ValueError, SyntaxError, EOFError) as error:
            # A PNG is read to its end for this.
            raise ImageError(f"{name} is damaged or truncated: {error}") from error
        return (opened.height, opened.width) if turned else opened.size


def file_content(source: str | Path | bytes) -> bytes:
    """What a picture that is given as a file depends on."""
    if isinstance(source, bytes):
        return source
    page = page_of(source)
    return Path(source).read_bytes() if page is None else page.content()


def cut_tiles(image: Image.Image, plan: TilePlan, settings: ImageSettings) -> Tensor:
    """The tiles of an RGB picture as pixels: (plan.tiles, 3, P, P) uint8.

    Tiles of the grid come first, row by row, the whole picture last.
    """
    if image.size != plan.source:
        raise ImageError(f"a plan for {plan.source} pixels was given a picture of {image.size}")
    edge, resample = plan.tile_edge, settings.resample
    tiles = np.empty((plan.tiles, 3, edge, edge), dtype=np.uint8)
    planes = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
    canvas = resize(resize(planes, plan.resized, resample), plan.canvas, resample)
    for index, (left, top, right, bottom) in enumerate(plan.boxes()):
        tiles[index] = canvas[:, top:bottom, left:right]
    tiles[-1] = resize(canvas, (edge, edge), resample)
    return torch.from_numpy(tiles)


def normalise(tiles: Tensor, settings: ImageSettings) -> Tensor:
    """Pixel values as the model wants them: (N, 3, P, P) uint8 → float32.

    (value · rescale − mean) / std has only 256 results per channel, so they are looked up. The
    table is computed in the order and precision of the family's image processor (the product in
    float64, then float32), so values agree to the last bit.
    """
    table = np.ascontiguousarray(_table(settings))
    pixels = tiles.contiguous().numpy()
    values = np.empty(pixels.shape, dtype=np.float32)
    kernels = native.library()
    if kernels is not None:
        size, threads = pixels[0, 0].size if len(pixels) else 0, torch.get_num_threads()
        kernels.look_up(
            table.ctypes.data, pixels.ctypes.data, len(pixels), size, values.ctypes.data, threads
        )
        return torch.from_numpy(values)
    for channel in range(3):
        # "clip" spares a check of every index; a byte is always within the 256 entries.
        np.take(table[channel], pixels[:, channel], out=values[:, channel], mode="clip")
    return torch.from_numpy(values)


def _table(settings: ImageSettings) -> npt.NDArray[np.float32]:
    """The normalised value of each byte, per channel: (3, 256)."""
    values = np.arange(256, dtype=np.float64)
    if settings.rescale is not None:
        values = values * settings.rescale
    table = np.repeat(values.astype(np.float32)[None], 3, axis=0)
    if settings.mean is not None and settings.std is not None:
        mean = np.asarray(settings.mean, dtype=np.float32)[:, None]
        std = np.asarray(settings.std, dtype=np.float32)[:, None]
        table = (table - mean) / std
    return table


def _open(source: str | Path | bytes) -> tuple[str, Image.Image]:
    """A picture whose header was read, with the name to use in errors."""
    if isinstance(source, bytes):
        name, size = f"picture of {len(source)} bytes", len(source)
    elif isinstance(source, (str, Path)):
        name, path = str(source), Path(source)
        if name.startswith(("http://", "https://")):
            raise ImageError(f"{name} is an address; pictures are read from files, not fetched")
        if not path.is_file():
            found = "a folder" if path.is_dir() else "no file"
            raise ImageError(f"{name}: found {found}, expected a picture")
        size = path.stat().st_size
    else:
        raise ImageError(
            f"found a {type(source).__name__}, expected a path, bytes, a Pillow picture or a uint8 "
            "array (H, W, 3)"
        )
    if size == 0:
        raise ImageError(f"{name} is empty (0 bytes), expected a picture")
    try:
        with warnings.catch_warnings():
            # The pixel limit is ours, checked before decoding; Pillow's own is only a warning.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return name, Image.open(BytesIO(source) if isinstance(source, bytes) else source)
    except UnidentifiedImageError:
        raise ImageError(f"{name} is no picture that Pillow can read") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} is too large to decode: {error}") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise ImageError(f"{name} cannot be read as a picture: {error}") from error


def _to_rgb(image: Image.Image, name: str, *, upright: bool = False) -> Image.Image:
    try:
        image.load()
        if upright:
            image = ImageOps.exif_transpose(image)
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise ImageError(f"{name} is damaged or truncated: {error}") from error


def _from_array(array: npt.NDArray[np.uint8], max_pixels: int) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ImageError(
            f"an array of shape {array.shape} and type {array.dtype}, expected uint8 (H, W, 3)"
        )
    _check_size("the array", (array.shape[1], array.shape[0]), max_pixels)
    return Image.fromarray(np.ascontiguousarray(array))


def _check_size(name: str, size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise ImageError(
            f"{name} has {width}x{height} pixels, more than the {max_pixels:,} that are decoded"
        )
    if width < 1 or height < 1:
        raise ImageError(f"{name} has {width}x{height} pixels; both sides must be positive")
