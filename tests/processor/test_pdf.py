"""A page of a PDF file is a picture, wherever a picture's path is taken."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.pdfs import document

import smolstack
from smolstack.errors import ImageError
from smolstack.processor.pages import count_pages
from smolstack.processor.tiles import image_size, open_image


@pytest.fixture
def report(tmp_path: Path) -> Path:
    return document(tmp_path / "Report.PDF", [(100, 50), (60, 80), (40, 40)])


def test_pages_are_rendered_at_144_dots_per_inch(report: Path) -> None:
    assert count_pages(report) == 3
    for number, size, color in ((1, (200, 100), (255, 0, 0)), (2, (120, 160), (0, 255, 0))):
        page = f"{report}#page={number}"
        assert image_size(page) == size
        picture = open_image(Path(page))
        assert (picture.mode, picture.size) == ("RGB", size)
        middle = np.asarray(picture)[size[1] // 2, size[0] // 2]
        assert np.abs(middle.astype(int) - color).max() < 8  # Pillow writes pages as JPEG


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    resolution=st.sampled_from([72, 96, 150, 299]),
)
def test_the_planned_size_is_the_rendered_one(
    width: int, height: int, resolution: int, tmp_path: Path
) -> None:
    path = tmp_path / "page.pdf"
    Image.new("L", (width, height)).save(path, resolution=resolution)
    assert image_size(path) == open_image(path).size


def test_it_is_asked_about_like_a_picture(tiny_vlm: smolstack.VLM, report: Path) -> None:
    page = f"{report}#page=2"
    answer = tiny_vlm.ask(page, "What colour is it?", max_new_tokens=6)
    same = tiny_vlm.ask(open_image(page), "What colour is it?", max_new_tokens=6)
    assert answer.token_ids == same.token_ids
    other = tiny_vlm.ask(f"{report}#page=1", "What colour is it?", max_new_tokens=6)
    assert other.usage.prompt_tokens != answer.usage.prompt_tokens


def test_pages_of_one_file_are_remembered_apart(tiny_vlm: smolstack.VLM, tmp_path: Path) -> None:
    path = document(tmp_path / "same.pdf", [(40, 40), (40, 40)])
    first, second = (tiny_vlm.encode(f"{path}#page={n}").tokens for n in (1, 2))
    assert not first.equal(second)


def test_several_threads_may_ask(report: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        pages = list(pool.map(open_image, [f"{report}#page={1 + n % 3}" for n in range(24)]))
    assert [page.size for page in pages] == 8 * [(200, 100), (120, 160), (80, 80)]


def test_what_is_no_page_is_refused_by_name(report: Path, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"has 3 pages, expected one of them, as in .*#page=1"):
        open_image(report)
    for number in (0, 4):
        with pytest.raises(ImageError, match=f"has 3 pages, expected no page {number}"):
            image_size(f"{report}#page={number}")
    (tmp_path / "text.pdf").write_text("no document")
    (tmp_path / "cut.pdf").write_bytes(report.read_bytes()[:300])
    for name in ("text.pdf", "cut.pdf"):
        with pytest.raises(ImageError, match=f"{name} cannot be read as a PDF file"):
            open_image(tmp_path / name)
    with pytest.raises(ImageError, match="found no file, expected a PDF file"):
        open_image(tmp_path / "gone.pdf")


def test_a_page_of_too_many_pixels_is_refused_before_it_is_rendered(tmp_path: Path) -> None:
    path = tmp_path / "poster.pdf"
    Image.new("L", (100, 100)).save(path, resolution=0.5)  # 200 inches on a side
    with pytest.raises(ImageError, match="has 28800x28800 pixels, more than"):
        open_image(path)


def test_a_picture_may_be_called_like_a_page(tmp_path: Path) -> None:
    path = tmp_path / "odd.pdf#page=1"
    Image.new("RGB", (7, 5)).save(path, format="PNG")
    assert image_size(path) == (7, 5)


def test_without_the_package_it_says_which(report: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    with pytest.raises(ImageError, match=r"pip install 'smolstack\[pdf\]'"):
        open_image(f"{report}#page=1")
