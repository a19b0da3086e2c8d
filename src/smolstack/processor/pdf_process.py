"""Measure and render pages of an untrusted PDF file in a process of its own.

A page of a few kilobytes can keep PDFium busy for hours, or make it allocate gigabytes, in ways
that its size does not show: nested forms, soft masks, patterns. PDFium cannot be interrupted.
"""

from __future__ import annotations

import importlib
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from PIL import Image

from smolstack.processor import limited_process
from smolstack.processor.pdf import PdfPage, count_pages

_SECONDS = 10  # of processor time, for one call


@dataclass(frozen=True)
class IsolatedPdfPage(PdfPage):
    """A page of an untrusted PDF file, given as its bytes: measured, once, and rendered in
    processes of their own.

    Attributes:
        measured: what :meth:`measure` returns, if it is known.
    """

    measured: tuple[tuple[int, int], int] | None = field(default=None, kw_only=True)

    def measure(self) -> tuple[tuple[int, int], int]:
        return self._measured if self.measured is None else self.measured

    def render(self) -> Image.Image:
        answer, pixels = _call(self, {"render": True}, self.measure()[1])
        return Image.frombytes("RGB", (answer["width"], answer["height"]), pixels)

    @cached_property
    def _measured(self) -> tuple[tuple[int, int], int]:
        answer, _ = _call(self, {"every": False, "most": 1}, 0)
        ((_, width, height, memory),) = answer["pages"]
        return (width, height), memory


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
    page = IsolatedPdfPage(content, number, max_pixels=max_pixels, served=True)
    answer, _ = _call(page, {"every": every, "most": most}, 0)
    pages = [
        replace(page, number=at, measured=((width, height), memory))
        for at, width, height, memory in answer["pages"]
    ]
    return answer["count"], pages


def _call(page: PdfPage, order: dict[str, Any], memory: int) -> tuple[dict[str, Any], bytes]:
    assert isinstance(page.path, bytes), page
    order |= {name: getattr(page, name) for name in ("number", "password", "max_pixels", "served")}
    memory += limited_process.EXTRA_BYTES
    return limited_process.call(
        __name__, order, page.path, name=str(page), seconds=_SECONDS, memory=memory
    )


def _answer(order: dict[str, Any], content: bytes) -> tuple[dict[str, Any], bytes]:
    page = PdfPage(
        content, order["number"], order["password"], order["max_pixels"], order["served"]
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
