"""Open images safely, cut tiles, normalize pixels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from smolstack.errors import ImageError
from smolstack.native import library as native
from smolstack.processor.decoding import check_size, decoded, size_of
from smolstack.processor.decoding_memory import MEMORY
from smolstack.processor.formats import FORMATS
from smolstack.processor.geometry import TilePlan
from smolstack.processor.pages import TiffPage, page_of
from smolstack.processor.pdf import PdfPage
from smolstack.processor.rgb import to_rgb
from smolstack.processor.scaling import resize
from smolstack.processor.settings import ImageSettings

if TYPE_CHECKING:
    from torch import Tensor

ImageSource: TypeAlias = (
    "str | Path | bytes | PdfPage | TiffPage | Image.Image | npt.NDArray[np.uint8]"
)
MAX_PIXELS = 178_956_970  # images with more pixels are rejected before decoding


def open_image(
    source: ImageSource, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = FORMATS
) -> Image.Image:
    """Decode an image to RGB in upright orientation.

    A file (path or bytes) is rotated according to its EXIF orientation; a PIL image or an array is
    used as it is. Transparency is composited over white; grayscale of more than 8 bits is scaled by
    its range. Of an animation the first frame is used.

    Args:
        source: a path (also of a page, ``report.pdf#page=3``), a file's bytes, a PIL image, or
            a uint8 array (H, W, 3).
        max_pixels: larger images are rejected before they are decoded.
        formats: file formats to try, by Pillow's names.

    Raises:
        ImageError: names the image, what was found and what was expected.
    """
    with _decoded(source, max_pixels, formats) as image:
        return image


def read_tiles(source: ImageSource, plan: TilePlan, settings: ImageSettings) -> Tensor:
    """Read the tiles of a planned image as pixels: (plan.tiles, 3, P, P) uint8.

    Combines :func:`open_image` and :func:`cut_tiles`; the decoded image counts as memory in use
    until it is cut.
    """
    with _decoded(source) as image:
        return cut_tiles(image, plan, settings)


def image_size(
    source: ImageSource, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = FORMATS
) -> tuple[int, int]:
    """Return (width, height) of an upright image, from its header alone."""
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels).size
    if isinstance(source, Image.Image):
        return source.size
    page = page_of(source)
    if isinstance(page, PdfPage):
        size, cost = page.measure()
        if cost > MEMORY.limit:
            with MEMORY.hold(cost, str(page)):
                pass  # never comes here: it is refused
        return size
    return size_of(_file(source) if page is None else page, max_pixels, formats)


@contextmanager
def _decoded(
    source: ImageSource, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = FORMATS
) -> Iterator[Image.Image]:
    if isinstance(source, np.ndarray):
        yield _from_array(source, max_pixels)
        return
    if isinstance(source, Image.Image):
        check_size("the image", source.size, max_pixels)
        yield _from_pillow(source)
        return
    page = page_of(source)
    if isinstance(page, PdfPage):
        with MEMORY.hold(page.measure()[1], str(page)):
            yield page.render()
        return
    with decoded(_file(source) if page is None else page, max_pixels, formats) as image:
        yield image


def cut_tiles(image: Image.Image, plan: TilePlan, settings: ImageSettings) -> Tensor:
    """Cut an RGB image into tiles: (plan.tiles, 3, P, P) uint8.

    Tiles of the grid come first, row by row; the whole image is last.
    """
    if image.size != plan.source:
        raise ImageError(f"a plan for {plan.source} pixels was given an image of {image.size}")
    import torch

    edge, resample = plan.tile_edge, settings.resample
    tiles = np.empty((plan.tiles, 3, edge, edge), dtype=np.uint8)
    planes = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
    canvas = resize(resize(planes, plan.resized, resample), plan.canvas, resample)
    for index, (left, top, right, bottom) in enumerate(plan.boxes()):
        tiles[index] = canvas[:, top:bottom, left:right]
    tiles[-1] = resize(canvas, (edge, edge), resample)
    return torch.from_numpy(tiles)


def normalize(tiles: Tensor, settings: ImageSettings) -> Tensor:
    """Normalize pixel values for the model: (N, 3, P, P) uint8 → float32.

    (value · rescale − mean) / std has only 256 results per channel, so they are looked up in a
    table. It is computed in the order and precision of the family's image processor (the product in
    float64, then float32), so values agree to the last bit.
    """
    import torch

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
        # "clip" avoids a bounds check per index; a byte is always within the 256 entries.
        np.take(table[channel], pixels[:, channel], out=values[:, channel], mode="clip")
    return torch.from_numpy(values)


def _table(settings: ImageSettings) -> npt.NDArray[np.float32]:
    """The normalized value of each byte, per channel: (3, 256)."""
    values = np.arange(256, dtype=np.float64)
    if settings.rescale is not None:
        values = values * settings.rescale
    table = np.repeat(values.astype(np.float32)[None], 3, axis=0)
    if settings.mean is not None and settings.std is not None:
        mean = np.asarray(settings.mean, dtype=np.float32)[:, None]
        std = np.asarray(settings.std, dtype=np.float32)[:, None]
        table = (table - mean) / std
    return table


def _file(source: object) -> str | Path | bytes:
    if isinstance(source, (str, Path, bytes)):
        return source
    raise ImageError(
        f"found a {type(source).__name__}, expected a path, bytes, a PIL image or a uint8 "
        "array (H, W, 3)"
    )


def _from_pillow(image: Image.Image) -> Image.Image:
    """Convert a PIL image, which may be a file that is opened but not decoded."""
    try:
        return to_rgb(image)
    except ImageError as error:
        reason = f"the image: {error}"
    except Exception as error:  # a decoder may raise any exception on a damaged file
        reason = f"the image is damaged or truncated: {error}"
    raise ImageError(reason)


def _from_array(array: npt.NDArray[np.uint8], max_pixels: int) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ImageError(
            f"an array of shape {array.shape} and type {array.dtype}, expected uint8 (H, W, 3)"
        )
    check_size("the array", (array.shape[1], array.shape[0]), max_pixels)
    return Image.fromarray(np.ascontiguousarray(array))
