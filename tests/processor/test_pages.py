"""Pages of TIFF files are like those of PDF files; animations are images, and videos if asked."""

from __future__ import annotations

import logging
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from smolstack.bulk.inputs import open_input
from smolstack.errors import ImageError, VideoError
from smolstack.processor import decoding
from smolstack.processor.pages import count_pages
from smolstack.processor.tiles import image_size, open_image
from smolstack.processor.video_reading import read_video

COLORS = ("red", "lime", "blue")
RGB = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def scan(path: Path, sizes: tuple[tuple[int, int], ...] = ((30, 20), (10, 40), (8, 8))) -> Path:
    first, *rest = (
        Image.new("RGB", size, color) for size, color in zip(sizes, COLORS, strict=False)
    )
    first.save(path, save_all=True, append_images=rest)
    return path


def test_each_page_has_its_own_size_and_pixels(tmp_path: Path) -> None:
    path = scan(tmp_path / "Scan.TIF")
    assert count_pages(path) == 3
    for number, size in enumerate(((30, 20), (10, 40), (8, 8)), start=1):
        page = f"{path}#page={number}"
        assert image_size(page) == size
        assert open_image(page).size == size
        assert open_image(Path(page)).getpixel((3, 3)) == RGB[number - 1]


def test_which_page_has_to_be_said(tmp_path: Path) -> None:
    path = scan(tmp_path / "scan.tif")
    for act in (open_image, image_size):
        with pytest.raises(ImageError, match=r"3 pages.*#page=1"):
            act(path)
        with pytest.raises(ImageError, match="3 pages"):
            act(path.read_bytes())
    for number in (0, 4):
        with pytest.raises(ImageError, match=f"has 3 pages, found page {number}, expected 1 to 3"):
            open_image(f"{path}#page={number}")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"a\.png is a PNG file, which has no pages"):
        open_image(f"{tmp_path}/a.png#page=1")


def test_a_thumbnail_is_no_page(tmp_path: Path) -> None:
    path = tmp_path / "photo.tif"
    small = Image.new("RGB", (3, 2), "red")
    small.encoderinfo = {"tiffinfo": {254: 1}}
    large = Image.new("RGB", (30, 20), "blue")
    large.save(path, save_all=True, append_images=[small])
    assert count_pages(path) == 1
    assert open_image(path).size == (30, 20)


def test_a_bulk_job_takes_all_pages(tmp_path: Path) -> None:
    scan(tmp_path / "scan.tif")
    scan(tmp_path / "single.tif", ((5, 5),))
    expected = [*(f"scan.tif#page={number}" for number in (1, 2, 3)), "single.tif"]
    for source in (open_input(tmp_path), open_input(str(tmp_path / "*.tif"))):
        assert source.rows is not None
        rows = list(source.rows())
        assert [Path(row.id).name for row in rows] == expected
        assert [image_size(row.image)[0] for row in rows] == [30, 10, 8, 5]


def test_a_photograph_in_a_tiff_file_is_planned_as_it_is_opened(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "a.tif", exif=exif)
    assert image_size(tmp_path / "a.tif") == open_image(tmp_path / "a.tif").size == (20, 30)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "AVIF", "PNG"])
def test_an_animation_is_its_first_frame_and_a_video_where_one_is_asked_for(
    form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / f"clip.{form.lower()}"
    first, *rest = (Image.new("RGB", (40, 30), 3 * (25 * number,)) for number in range(10))
    first.save(path, form, save_all=True, append_images=rest, duration=500)
    decoding._told.clear()
    with caplog.at_level(logging.WARNING, "smolstack"):
        for _ in range(2):
            pixel = open_image(path).getpixel((5, 5))
            assert isinstance(pixel, tuple)
            assert max(pixel) < 4
    assert caplog.messages == [f"{path} is an animation; its first frame is read"]
    video = read_video(path)
    assert (video.seconds, video.duration) == ([0.0, 1.0, 2.0, 3.0, 4.5], 5.0)
    grey = [float(np.mean(frame)) for frame in video.frames]  # type: ignore[arg-type]
    assert grey == pytest.approx([0, 50, 100, 150, 225], abs=4)


def test_a_still_image_is_no_video(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.gif")
    with pytest.raises(VideoError, match=r"a\.gif has one frame, expected a video"):
        read_video(tmp_path / "a.gif")


def test_heic_files_are_read_or_the_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    buffer = BytesIO()
    Image.new("RGB", (24, 20), "red").save(buffer, "HEIF")
    path = tmp_path / "IMG_1.HEIC"
    path.write_bytes(buffer.getvalue())
    assert open_image(path).size == image_size(path) == (24, 20)
    for name in ("smolstack.processor.formats", "smolstack.processor.decoding"):
        monkeypatch.setattr(f"{name}.can_read_heif", lambda: False)
    with pytest.raises(ImageError, match=r"IMG_1\.HEIC .*pillow-heif"):
        open_image(path)
