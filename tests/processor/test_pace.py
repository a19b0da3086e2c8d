"""Files that are cheap to send and slow to decode are refused before they are decoded."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.bombs import plain_ppm, reduced, run_length_bmp, scans

from smolstack.errors import ImageError
from smolstack.processor.decoding_pace import weight
from smolstack.processor.formats import SERVED
from smolstack.processor.tiles import image_size, open_image


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def test_a_jpeg_file_of_very_many_scans_is_refused(tmp_path: Path) -> None:
    content, path = scans(200), tmp_path / "scans.jpg"
    path.write_bytes(content)
    for source in (content, path):
        for read in (image_size, open_image):
            with pytest.raises(
                ImageError, match="JPEG file of more than 100 scans, expected fewer"
            ):
                read(source)


def test_scans_are_those_of_the_image_and_not_of_its_metadata() -> None:
    """What looks like scans in metadata, in a second image or after the end is none."""
    assert open_image(scans(80)).size == (64, 64)
    plain = saved(Image.new("L", (64, 64)), "JPEG", exif=b"Exif\0\0" + b"\xff\xda" * 500)
    assert open_image(plain + b"\xff\xda" * 500).size == (64, 64)


def test_a_page_behind_very_many_reduced_images_is_refused() -> None:
    assert image_size(reduced(100)) == (16, 16)
    with pytest.raises(ImageError, match="has 101 reduced images before its page, expected at mo"):
        image_size(reduced(101))
    with pytest.raises(ImageError, match="has 1000 reduced images before its page"):
        image_size(reduced(3000))


@pytest.mark.parametrize(
    ("made", "kind"),
    [(plain_ppm, "a PNM file in plain text"), (run_length_bmp, "a run-length encoded BMP file")],
)
def test_large_files_that_python_decodes_are_not_served(made: object, kind: str) -> None:
    small, large = made(40), made(400)  # type: ignore[operator]
    assert image_size(small, 10**6, SERVED) == (40, 40)
    with pytest.raises(ImageError, match=f"it is {kind}, of which 16,384 bytes are accepted"):
        image_size(large, 10**6, SERVED)
    assert image_size(large) == (400, 400)  # a user's own file is read


def test_slow_formats_weigh_more() -> None:
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    forms = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "PPM", "WEBP", "AVIF", "JPEG2000")
    assert {form: weight(saved(noise, form)) for form in forms} == {
        "JPEG": 1, "PNG": 1, "TIFF": 1, "BMP": 1, "GIF": 1, "PPM": 1,
        "WEBP": 3, "AVIF": 5, "JPEG2000": 20,
    }  # fmt: skip
    assert weight(plain_ppm(4)) == weight(run_length_bmp(4)) == 20
    assert weight(noise) == 1


def in_a_thread(source: bytes) -> Image.Image:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(open_image, source).result(60)


def test_other_threads_run_while_a_large_jpeg_2000_image_is_decoded() -> None:
    """Pillow's decoder keeps the interpreter's lock, so it runs in a process of its own."""
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (700, 800, 4), dtype=np.uint8), "RGBA")
    file = saved(image, "JPEG2000")
    with ThreadPoolExecutor(1) as pool:
        decoding, ticks = pool.submit(open_image, file), 0
        while not decoding.done():
            wait([decoding], 0.005)
            ticks += 1
    assert ticks > 10
    assert np.array_equal(np.asarray(decoding.result()), np.asarray(open_image(file)))


def test_a_large_jpeg_2000_image_that_is_cut_is_named() -> None:
    noise = np.random.default_rng(1).integers(0, 256, (700, 800, 3), dtype=np.uint8)
    file = saved(Image.fromarray(noise), "JPEG2000")
    with pytest.raises(ImageError, match=r"^image of \d+ bytes is damaged or truncated: "):
        in_a_thread(file[: len(file) // 2])
