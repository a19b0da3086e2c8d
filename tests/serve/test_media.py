"""Pages of PDF and TIFF files, and videos, in the parts of messages."""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from tests.bombs import reduced
from tests.pdfs import document, locked, nested_forms
from tests.processor.test_pdf import form
from tests.serve.conftest import Process
from tests.serve.test_refusals import message, post
from tests.videos import film

import smolstack


def coded(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def chat(part: dict[str, Any]) -> dict[str, Any]:
    parts = [part, {"type": "text", "text": "What does it say?"}]
    return {"messages": [{"role": "user", "content": parts}], "max_tokens": 6}


def image(url: str) -> dict[str, Any]:
    return chat({"type": "image_url", "image_url": {"url": url}})


def video(content: bytes) -> dict[str, Any]:
    url = coded(content, "video/mp4")
    return chat({"type": "video_url", "video_url": {"url": url}})


@pytest.fixture
def report(tmp_path: Path) -> Path:
    return document(tmp_path / "report.pdf", [(100, 50), (60, 80)])


def test_a_page_of_a_document_is_an_image(
    server: Process, reader: smolstack.VLM, report: Path
) -> None:
    url = coded(report.read_bytes(), "application/pdf")
    for number in (1, 2):
        made = post(server, image(f"{url}#page={number}")).json()
        expected = reader.ask(f"{report}#page={number}", "What does it say?", max_new_tokens=6)
        assert made["choices"][0]["message"]["content"] == expected.text
        assert made["usage"]["prompt_tokens"] == expected.usage.prompt_tokens


def test_a_file_part_is_all_of_its_pages(
    server: Process, reader: smolstack.VLM, report: Path
) -> None:
    url = coded(report.read_bytes(), "application/pdf")
    made = post(server, chat({"type": "file", "file": {"file_data": url, "filename": "r.pdf"}}))
    pages = [f"{report}#page=1", f"{report}#page=2"]
    expected = reader.ask(pages, "What does it say?", max_new_tokens=6)
    assert made.json()["usage"]["prompt_tokens"] == expected.usage.prompt_tokens


def test_a_page_of_a_tiff_file(server: Process) -> None:
    content = io.BytesIO()
    second = Image.new("RGB", (10, 20))
    Image.new("RGB", (30, 20)).save(content, "tiff", save_all=True, append_images=[second])
    url = coded(content.getvalue(), "image/tiff")
    made = httpx.post(f"{server.url}/plan", json={"image_url": f"{url}#page=2"}).json()
    assert (made["source"], made["pages"]) == ([10, 20], 2)


def test_a_tiff_file_of_several_pages_needs_a_page(server: Process) -> None:
    content = io.BytesIO()
    pages = [Image.new("RGB", (60, 60), color) for color in ("red", "blue")]
    pages[0].save(content, "TIFF", save_all=True, append_images=pages[1:])
    made = post(server, image(coded(content.getvalue(), "image/tiff")))
    assert made.status_code == 400
    assert "the file has 2 pages, expected one of them: add #page=1" in message(made)


def test_the_pages_of_a_very_long_tiff_file_are_not_all_counted(server: Process) -> None:
    made = post(server, image(coded(reduced(2000, kind=0), "image/tiff")))
    assert made.status_code == 400
    assert "the file has 1000 or more pages, expected one of them: add #page=1" in message(made)


def test_a_video_is_answered_as_ask_does(
    server: Process, reader: smolstack.VLM, tmp_path: Path
) -> None:
    clip = film(tmp_path / "clip.mp4", frames=10, rate=5)
    made = post(server, video(clip.read_bytes())).json()
    expected = reader.ask(clip, "What does it say?", max_new_tokens=6)
    assert made["choices"][0]["message"]["content"] == expected.text
    assert made["usage"]["prompt_tokens"] == expected.usage.prompt_tokens


def test_plans_tell_pages_and_frames(server: Process, report: Path, tmp_path: Path) -> None:
    url = coded(report.read_bytes(), "application/pdf")
    ask = {"image_url": {"url": url}, "preview": True}
    made = httpx.post(f"{server.url}/plan", json=ask).json()
    assert (made["pages"], made["source"]) == (2, [200, 100])
    assert made["preview"].startswith("data:image/jpeg;base64,")
    clip = film(tmp_path / "clip.mp4", frames=10, rate=5).read_bytes()
    made = httpx.post(f"{server.url}/plan", json={"video_url": coded(clip, "video/mp4")}).json()
    assert (made["frames"], made["duration"], made["boxes"]) == (2, 2.0, [])


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "cannot be read as a video"),
        (b"no video", "cannot be read as a video"),
        (PLAYLIST, "cannot be read as a video"),
        (b"ffconcat version 1.0\nfile /etc/hostname\n", "cannot be read as a video"),
    ],
)
def test_what_is_no_video_is_refused(server: Process, content: bytes, expected: str) -> None:
    response = post(server, video(content))
    assert response.status_code == 400
    assert expected in message(response)
    assert response.json()["error"]["param"] == "messages.0.content.0.video_url"


def damaged(side: int = 40) -> bytes:
    """A PNG file whose header is whole, and whose pixels are not."""
    content = io.BytesIO()
    Image.effect_noise((side, side), 90).save(content, "PNG")
    return content.getvalue()[:-200]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("before", ["image", "file", "video"])
def test_of_several_parts_the_one_with_damaged_pixels_is_named(
    server: Process, number: str, report: Path, tmp_path: Path, before: str, stream: bool
) -> None:
    clip = film(tmp_path / "clip.mp4", frames=10, rate=5).read_bytes()
    pages = {"file_data": coded(report.read_bytes(), "application/pdf")}
    whole = {
        "image": {"type": "image_url", "image_url": {"url": number}},
        "file": {"type": "file", "file": pages},
        "video": {"type": "video_url", "video_url": {"url": coded(clip, "video/mp4")}},
    }[before]
    wrong = {"type": "image_url", "image_url": {"url": coded(damaged(), "image/png")}}
    messages = [
        {"role": "user", "content": [whole]},
        {"role": "user", "content": [{"type": "text", "text": "And then?"}, wrong]},
    ]
    response = post(server, {"messages": messages, "max_tokens": 1, "stream": stream})
    assert response.status_code == 400
    expected = "messages.1.content.1.image_url: image of "
    assert message(response).startswith(expected), message(response)
    assert "is damaged or truncated" in message(response)
    assert response.json()["error"]["param"] == "messages.1.content.1.image_url"


def test_an_image_with_damaged_pixels_is_named_in_every_route(server: Process, number: str) -> None:
    url = coded(damaged(), "image/png")
    parts = [{"type": "input_image", "image_url": each} for each in (number, url)]
    asked = {"input": [{"role": "user", "content": parts}], "max_output_tokens": 1}
    for path, body, param in (
        ("/v1/responses", asked, "input.0.content.1.image_url"),
        ("/plan", {"image_url": url, "preview": True}, "image_url"),
    ):
        response = httpx.post(f"{server.url}{path}", json=body, timeout=60)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param
        assert message(response).startswith(f"{param}: image of ")


def test_documents_that_cannot_be_shown_are_refused(
    server: Process, report: Path, tmp_path: Path
) -> None:
    empty = form(tmp_path / "none.pdf", "/FT/Tx").read_bytes()
    empty = empty.replace(b"[3 0 R]/Count 1", b"[     ]/Count 0")
    many = document(tmp_path / "many.pdf", [(9, 9)] * 17, ("red",) * 17).read_bytes()
    whole = report.read_bytes()
    for content, page, expected in (
        (whole, "", "has 2 pages, expected one of them"),
        (whole, "#page=3", "has 2 pages, found page 3, expected 1 to 2"),
        (b"%PDF-1.7 damaged", "", "cannot be read as a PDF file"),
        (empty, "", "has no pages"),
        (locked(tmp_path / "locked.pdf", b"key").read_bytes(), "", "is locked"),
    ):
        response = post(server, image(coded(content, "application/pdf") + page))
        assert response.status_code == 400, response.text
        assert expected in message(response)
        assert response.json()["error"]["param"] == "messages.0.content.0.image_url"
    file = {"type": "file", "file": {"file_data": coded(many, "application/pdf")}}
    assert "has 17 pages, at most 16" in message(post(server, chat(file)))
    named = {"type": "file", "file": {"file_id": "file-1"}}
    assert "send file_data" in message(post(server, chat(named)))


def test_a_giant_page_is_rendered_smaller(tight: Process) -> None:
    body = (
        b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n2 0 obj<</Type/Pages/Kids[3 0 R]"
        b"/Count 1>>endobj\n3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 14400 14400]>>endobj\n"
        b"trailer<</Size 4/Root 1 0 R>>\n%%EOF"
    )
    response = httpx.post(
        f"{tight.url}/plan",
        json={"image_url": coded(body, "application/pdf")},
        headers={"Authorization": "Bearer secret"},
    )
    assert response.json()["source"] == [1000, 1000]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it takes a minute")
def test_a_page_that_would_be_drawn_for_hours_is_refused(server: Process) -> None:
    pytest.importorskip("pypdfium2")
    response = post(server, image(coded(nested_forms(16), "application/pdf")))
    assert response.status_code == 400
    assert "cannot be read within 10 s of processor time" in response.json()["error"]["message"]
    few = post(server, image(coded(nested_forms(3), "application/pdf")))
    assert few.status_code == 200


def test_low_detail_is_for_all_images_of_a_request(server: Process) -> None:
    content = io.BytesIO()
    Image.new("RGB", (30, 20)).save(content, "png")
    url = coded(content.getvalue(), "image/png")
    parts = [
        {"type": "image_url", "image_url": {"url": url, "detail": detail}}
        for detail in ("low", "auto")
    ]
    body = chat(parts[0])
    body["messages"][0]["content"].append(parts[1])
    made = post(server, body)
    assert made.status_code == 400
    assert "some images have detail low and others do not" in message(made)


@pytest.mark.parametrize(("detail", "split"), [("low", True), ("high", False)])
def test_detail_and_split_do_not_contradict_each_other(
    server: Process, detail: str, split: bool
) -> None:
    content = io.BytesIO()
    Image.new("RGB", (30, 20)).save(content, "png")
    picture = {"url": coded(content.getvalue(), "image/png"), "detail": detail}
    made = post(server, {**chat({"type": "image_url", "image_url": picture}), "split": split})
    assert made.status_code == 400
    assert f"found detail {detail} and split {str(split).lower()}" in message(made)
    assert (
        httpx.post(f"{server.url}/plan", json={"image_url": picture, "split": split}).status_code
        == 400
    )
