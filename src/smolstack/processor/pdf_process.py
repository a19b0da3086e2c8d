"""Measure and render pages of an untrusted PDF file in a process of its own.

A page of a few kilobytes can keep PDFium busy for hours, or make it allocate gigabytes, in ways
that its size does not show: nested forms, soft masks, patterns. PDFium cannot be interrupted.
"""

from __future__ import annotations

import importlib
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from smolstack.processor import limited_process
from smolstack.processor.pdf import PdfPage, count_pages

_SECONDS = 10  # of processor time, for one call


@dataclass(frozen=True)
class IsolatedPdfPage(PdfPage):
    """A page of an untrusted PDF file, rendered in a process of its own.

    Attributes:
        measured: what :meth:`measure` returned in such a process.
    """

    measured: tuple[tuple[int, int], int] = field(kw_only=True)

    def measure(self) -> tuple[tuple[int, int], int]:
        return self.measured

    def render(self) -> Image.Image:
        return _rendered(self, self.measured[1])


@dataclass(frozen=True)
class PdfBytes(PdfPage):
    """A page of a PDF file that is given as its bytes, as in a table: measured and rendered in
    processes of their own, since such files come from anywhere."""

    def measure(self) -> tuple[tuple[int, int], int]:
        assert isinstance(self.path, bytes), self
        order = {**_order(self), "every": False, "most": 1}
        answer, _ = _call(order, self.path, str(self), 0)
        ((_, width, height, memory),) = answer["pages"]
        return (width, height), memory

    def render(self) -> Image.Image:
        return _rendered(self, self.measure()[1])


def _order(page: PdfPage) -> dict[str, Any]:
    return {
        "number": page.number,
        "password": page.password,
        "max_pixels": page.max_pixels,
        "served": page.served,
    }


def _rendered(page: PdfPage, memory: int) -> Image.Image:
    assert isinstance(page.path, bytes), page
    answer, pixels = _call({**_order(page), "render": True}, page.path, str(page), memory)
    return Image.frombytes("RGB", (answer["width"], answer["height"]), pixels)


def isolated_pages(
    content: bytes, number: int | None, *, every: bool, most: int, max_pixels: int
) -> tuple[int, list[IsolatedPdfPage]]:
    """Return the number of pages of a PDF file, and the selected pages with their sizes.

    Args:
        number: of the page, from 1; None: the only page of the file, or all if ``every``.
        most: pages to measure; if the file has more, the list is empty.
        max_pixels: as for PdfPage.

    Raises:
        ImageError: as for :meth:`PdfPage.measure`, or the limits on time or memory are exceeded.
    """
    order = {
        "number": number,
        "every": every,
        "most": most,
        "max_pixels": max_pixels,
        "served": True,
    }
    answer, _ = _call(order, content, f"PDF file of {len(content)} bytes", 0)
    pages = [
        IsolatedPdfPage(
            content, at, max_pixels=max_pixels, served=True, measured=((width, height), memory)
        )
        for at, width, height, memory in answer["pages"]
    ]
    return answer["count"], pages


def _call(
    order: dict[str, Any], content: bytes, name: str, memory: int
) -> tuple[dict[str, Any], bytes]:
    memory += limited_process.EXTRA_BYTES
    return limited_process.call(
        __name__, order, content, name=name, seconds=_SECONDS, memory=memory
    )


def _answer(order: dict[str, Any], content: bytes) -> tuple[dict[str, Any], bytes]:
    page = PdfPage(
        content, order["number"], order.get("password"), order["max_pixels"], order["served"]
    )
    if order.get("render"):
        image = page.render()
        return {"width": image.width, "height": image.height}, image.tobytes()
    count = count_pages(content, page.password, served=page.served)
    if order["every"]:
        numbers: list[int | None] = list(range(1, count + 1)) if count <= order["most"] else []
    else:
        numbers = [page.number]
    found = []
    for number in numbers:
        (width, height), memory = replace(page, number=number).measure()
        found.append((number, width, height, memory))
    return {"count": count, "pages": found}, b""


if __name__ == "__main__":
    with suppress(ImportError):  # loaded before memory is limited; PdfPage says if it is absent
        importlib.import_module("pypdfium2")
    limited_process.answer_call(_answer)
