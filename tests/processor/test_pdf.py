"""A page of a PDF file is an image, wherever an image's path is taken."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.pdfs import document, locked, nested_forms

import smolstack
from smolstack.errors import ImageError
from smolstack.processor.pages import count_pages
from smolstack.processor.pdf import PdfPage
from smolstack.processor.tiles import image_size, open_image


@pytest.fixture
def report(tmp_path: Path) -> Path:
    return document(tmp_path / "Report.PDF", [(100, 50), (60, 80), (40, 40)])


def test_pages_are_rendered_at_144_dots_per_inch(report: Path) -> None:
    assert count_pages(report) == 3
    for number, size, color in ((1, (200, 100), (255, 0, 0)), (2, (120, 160), (0, 255, 0))):
        page = f"{report}#page={number}"
        assert image_size(page) == size
        image = open_image(Path(page))
        assert (image.mode, image.size) == ("RGB", size)
        middle = np.asarray(image)[size[1] // 2, size[0] // 2]
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


def test_it_is_asked_about_like_an_image(tiny_vlm: smolstack.VLM, report: Path) -> None:
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
    with pytest.raises(ImageError, match=r"3 pages.*#page=1"):
        open_image(report)
    for number in (0, 4):
        with pytest.raises(ImageError, match=f"has 3 pages, found page {number}, expected 1 to 3"):
            image_size(f"{report}#page={number}")
    (tmp_path / "text.pdf").write_text("no document")
    (tmp_path / "cut.pdf").write_bytes(report.read_bytes()[:300])
    for name in ("text.pdf", "cut.pdf"):
        with pytest.raises(ImageError, match=f"{name} cannot be read as a PDF file"):
            open_image(tmp_path / name)
    with pytest.raises(ImageError, match="found no file, expected a PDF file"):
        open_image(tmp_path / "gone.pdf")


def test_a_giant_page_is_rendered_smaller(tmp_path: Path) -> None:
    path = tmp_path / "poster.pdf"
    Image.new("L", (100, 50)).save(path, resolution=0.5)  # 200 inches wide
    width, height = image_size(path)
    assert 39_900_000 < width * height < 40_100_000
    assert width / height == pytest.approx(2, abs=0.001)


def form(path: Path, field: str) -> Path:
    """Write a PDF file of one page with a field of a form, which has no appearance of its own."""
    parts = [
        "<</Type/Catalog/Pages 2 0 R/AcroForm<</Fields[4 0 R]/NeedAppearances true/DA(/F 40 Tf 0 g)"
        "/DR<</Font<</F 5 0 R>>>>>>>>",
        "<</Type/Pages/Kids[3 0 R]/Count 1>>",
        "<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 100]/Annots[4 0 R]>>",
        "<</Type/Annot/Subtype/Widget/Rect[20 20 180 80]/F 4/P 3 0 R/T(a)/DA(/F 40 Tf 0 g)"
        f"{field}>>",
        "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
        "<</Length 24>>stream\n0 0 1 rg 0 0 160 60 re f\nendstream",
    ]
    body, places = "%PDF-1.7\n", []
    for number, part in enumerate(parts, start=1):
        places.append(len(body))
        body += f"{number} 0 obj{part}endobj\n"
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    body += f"xref\n0 {len(parts) + 1}\n0000000000 65535 f \n{table}"
    tail = f"trailer<</Size {len(parts) + 1}/Root 1 0 R>>\nstartxref\n{body.index('xref')}\n%%EOF"
    path.write_bytes((body + tail).encode())
    return path


@pytest.mark.parametrize(
    "field",
    [
        "/FT/Tx/V(4711)",
        "/FT/Ch/Ff 131072/Opt[(4711)(12)]/V(4711)",
        "/FT/Ch/Opt[(4711)(12)]/V(4711)/I[0]",
        "/FT/Btn/V/Yes/AS/Yes/AP<</N<</Yes 6 0 R>>>>",
        "/FT/Btn/Ff 32768/V/Yes/AS/Yes/AP<</N<</Yes 6 0 R>>>>",
        "/FT/Btn/Ff 65536/MK<</CA(4711)>>",
        "/FT/Sig/AP<</N 6 0 R>>",
    ],
    ids=["text", "combo", "list", "check", "radio", "button", "signature"],
)
def test_every_kind_of_field_is_drawn(field: str, tmp_path: Path) -> None:
    pixels = np.asarray(open_image(form(tmp_path / "form.pdf", field)))
    assert pixels.shape == (200, 400, 3)
    assert (pixels.min(axis=2) < 64).sum() > 300  # ink


def test_a_locked_file_says_what_to_do_and_opens_with_its_password(
    tiny_vlm: smolstack.VLM, tmp_path: Path
) -> None:
    path = locked(tmp_path / "locked.pdf", b"sesame")
    for act in (open_image, image_size, count_pages):
        with pytest.raises(ImageError, match=r"locked\.pdf .*--passw"):
            act(path)
    with pytest.raises(ImageError, match="the password that was given does not open it"):
        count_pages(path, "wrong")
    assert count_pages(path, "sesame") == 1
    assert open_image(PdfPage(path, 1, "sesame")).size == (200, 100)
    assert "sesame" not in repr(PdfPage(path, 1, "sesame"))
    for shown in (path, f"{path}#page=1"):
        assert tiny_vlm.ask(shown, "What?", password="sesame", max_new_tokens=2).text is not None
        assert tiny_vlm.encode(shown, password="sesame").source == (200, 100)
    assert tiny_vlm.plan(path, password="sesame").source == (200, 100)


def test_its_bytes_are_a_page_too(tiny_vlm: smolstack.VLM, report: Path, tmp_path: Path) -> None:
    path = document(tmp_path / "one.pdf", [(100, 50)])
    answer = tiny_vlm.ask(path, "What colour is it?", max_new_tokens=4)
    same = tiny_vlm.ask(path.read_bytes(), "What colour is it?", max_new_tokens=4)
    assert answer.token_ids == same.token_ids
    secret = locked(tmp_path / "locked.pdf", b"sesame").read_bytes()
    assert tiny_vlm.encode(secret, password="sesame").source == (200, 100)
    with pytest.raises(ImageError, match="is locked; give its password"):
        image_size(secret)
    with pytest.raises(ImageError, match="cannot be read within 10 s"):
        image_size(nested_forms(16))
    several = report.read_bytes()
    with pytest.raises(ImageError, match="has 3 pages, expected each as a file of its own"):
        image_size(several)


def test_a_file_with_another_suffix_is_called_a_pdf_file(report: Path, tmp_path: Path) -> None:
    other = tmp_path / "download"
    other.write_bytes(report.read_bytes())
    with pytest.raises(ImageError, match=r"download is a PDF file, .* with the suffix \.pdf"):
        image_size(other)


def test_a_page_number_has_ordinary_digits(report: Path) -> None:
    with pytest.raises(ImageError, match="found no file"):
        image_size(f"{report}#page=\N{ARABIC-INDIC DIGIT TWO}")


def test_a_file_without_pages_says_so_whatever_failed_before(tmp_path: Path) -> None:
    (tmp_path / "text.pdf").write_text("no document")
    path = form(tmp_path / "none.pdf", "/FT/Tx")
    path.write_bytes(path.read_bytes().replace(b"[3 0 R]/Count 1", b"[     ]/Count 0"))
    for name, said in (("text.pdf", "cannot be read"), ("none.pdf", "has no pages")):
        with pytest.raises(ImageError, match=said):
            open_image(tmp_path / name)


def test_an_image_may_be_called_like_a_page(tmp_path: Path) -> None:
    path = tmp_path / "odd.pdf#page=1"
    Image.new("RGB", (7, 5)).save(path, format="PNG")
    assert image_size(path) == (7, 5)


def test_without_the_package_it_says_which(report: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    with pytest.raises(ImageError, match=r"pip install 'smolstack\[pdf\]'"):
        open_image(f"{report}#page=1")
