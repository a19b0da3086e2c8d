"""Memory: counted before a decoder runs, held to a limit, and let go of when a file is refused."""

from __future__ import annotations

import gc
import struct
import threading
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.bombs import icon, tiff

from smolstack.errors import ImageError
from smolstack.processor.decoding_memory import MEMORY, DecodingMemory
from smolstack.processor.isobmff import coded_pixels
from smolstack.processor.tiles import image_size, open_image


@pytest.fixture
def limit() -> Iterator[DecodingMemory]:
    """The process's limit, as a test sets it."""
    before = MEMORY.limit
    yield MEMORY
    MEMORY.limit = before


def small_avif_of_a_large_frame(side: int) -> bytes:
    """An AVIF file whose header says 16x16, and whose coded frame is side x side."""
    buffer = BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "AVIF", speed=10)
    data = bytearray(buffer.getvalue())
    place = data.find(b"ispe")
    assert struct.unpack_from(">II", data, place + 8) == (side, side)
    struct.pack_into(">II", data, place + 8, 16, 16)
    return bytes(data)


def half_a_photograph() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (1200, 1600, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG", quality=50)
    return buffer.getvalue()[: buffer.tell() // 2]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (tiff(16, 30_000), "16x16 pixels in tiles of 30000x30000"),
        (tiff(16, 15_008), "16x16 pixels in tiles of 15008x15008"),
        (icon(5000), "is an icon of 16x16 that holds an image of 5000x5000"),
    ],
)
def test_what_would_take_far_more_than_it_says_is_refused_before_it_is_decoded(
    data: bytes, said: str
) -> None:
    for act in (open_image, image_size):
        with pytest.raises(ImageError, match=said):
            act(data)


def test_the_frame_inside_an_avif_file_counts(limit: DecodingMemory) -> None:
    pytest.importorskip("PIL._avif")
    data = small_avif_of_a_large_frame(4000)
    assert coded_pixels(data) == 16_000_000
    limit.limit = 100_000_000
    with pytest.raises(ImageError, match=r"3\d\d,\d\d\d,\d\d\d bytes"):
        open_image(data)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "AVIF"])
def test_an_image_that_takes_more_than_the_limit_is_refused(
    form: str, limit: DecodingMemory
) -> None:
    buffer = BytesIO()
    Image.new("RGB", (400, 300)).save(buffer, form)
    assert open_image(buffer.getvalue()).size == (400, 300)
    limit.limit = 400 * 300 * 4
    for act in (open_image, image_size):
        with pytest.raises(ImageError, match="480,000"):
            act(buffer.getvalue())


def test_nothing_is_kept_of_a_file_that_was_refused() -> None:
    """Without Python's collector of cycles, which comes round late."""
    data = half_a_photograph()
    kept: list[ImageError] = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(10):
            with pytest.raises(ImageError, match="is damaged or truncated"):
                open_image(data)
            try:
                open_image(data)
            except ImageError as error:
                kept.append(error)  # as a server's task may, for a while
        images = [it for it in gc.get_objects() if issubclass(type(it), Image.Image)]
        assert not [it for it in images if it.size == (1600, 1200) and not _closed(it)]
    finally:
        gc.enable()
    assert MEMORY.held == 0


def _closed(image: Any) -> bool:
    try:
        return bool(image.im is None)
    except ValueError:  # "Operation on closed image"
        return True


def test_many_wait_for_their_turn_and_all_are_served() -> None:
    memory = DecodingMemory(limit=100)
    most, held, lock = 0, 0, threading.Lock()

    def work(size: int) -> None:
        nonlocal most, held
        with memory.hold(size, "it"):
            with lock:
                held += size
                most = max(most, held)
            with lock:
                held -= size

    threads = [threading.Thread(target=work, args=(10 * (1 + n % 9),)) for n in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert most <= 100
    assert memory.held == 0


def test_who_fails_gives_back_what_it_held() -> None:
    memory = DecodingMemory(limit=100)
    with pytest.raises(RuntimeError), memory.hold(80, "it"):
        raise RuntimeError
    assert memory.held == 0
    with pytest.raises(ImageError, match=r"101 bytes.* 100"):
        memory.hold(101, "it").__enter__()


def _jpeg2000(size: tuple[int, int], mode: str = "RGB", **options: Any) -> bytes:
    buffer = BytesIO()
    Image.new(mode, size).save(buffer, "JPEG2000", **options)
    return buffer.getvalue()


def test_the_structures_of_a_jpeg_2000_file_count(limit: DecodingMemory) -> None:
    """OpenJPEG keeps some hundred bytes for each code block and thousands for each tile."""
    plain = _jpeg2000((600, 500))
    blocks = _jpeg2000((600, 500), codeblock_size=(4, 4))
    tiles = _jpeg2000((600, 500), tile_size=(16, 16))
    precincts = _jpeg2000((600, 500), precinct_size=(8, 8))
    raw = _jpeg2000((600, 500), codeblock_size=(4, 4), no_jp2=True)
    limit.limit = 10 * 2**20
    assert image_size(plain) == open_image(plain).size == (600, 500)
    for heavy in (blocks, tiles, precincts, raw):
        for look in (image_size, open_image):
            with pytest.raises(ImageError, match=r"takes [\d,]+ bytes to decode, more than"):
                look(heavy)


def test_a_jpeg_2000_file_whose_codestream_is_larger_than_it_says_is_refused() -> None:
    data = bytearray(_jpeg2000((600, 500)))
    struct.pack_into(">II", data, data.find(b"ihdr") + 4, 16, 16)
    with pytest.raises(ImageError, match="says 16x16 pixels, and its codestream 600x500"):
        image_size(bytes(data))


def test_a_jpeg_2000_header_that_cannot_be_followed_is_refused() -> None:
    """A marker of no known segment would hide the code blocks that a decoder finds behind it."""
    data = _jpeg2000((60, 50), no_jp2=True)
    place = data.find(b"\xff\x52")
    hidden = data[:place] + b"\xff\x99\x00\x04\x00\x00" + data[place:]
    with pytest.raises(ImageError, match="the marker FF99"):
        image_size(hidden)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "L", "no_jp2": True},
        {"mode": "RGBA", "irreversible": True, "quality_layers": [20, 5]},
        {"tile_size": (64, 48), "offset": (7, 9), "tile_offset": (3, 4)},
        {"codeblock_size": (8, 8), "num_resolutions": 3, "progression": "CPRL"},
    ],
    ids=str,
)
def test_ordinary_jpeg_2000_files_are_read(options: dict[str, Any]) -> None:
    data = _jpeg2000((120, 90), **options)
    assert image_size(data) == open_image(data).size == (120, 90)
