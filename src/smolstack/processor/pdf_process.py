"""Measure and render pages of an untrusted PDF file in a process of its own.

A page of a few kilobytes can keep PDFium busy for hours, or make it allocate gigabytes, in ways
that its size does not show: nested forms, soft masks, patterns. PDFium cannot be interrupted, so
the operating system limits a process that handles one file and then ends.

The parent writes a JSON line and the file to standard input; the child answers with a JSON line,
followed by the pixels of a rendered page.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from smolstack.errors import ImageError
from smolstack.processor.pdf import PdfPage, count_pages

PROCESSOR_SECONDS = 10  # of one call
WALL_SECONDS = 60  # of one call, on a machine that is busy with other work
EXTRA_BYTES = 256 * 2**20  # beyond the measured memory of a page


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
        assert isinstance(self.path, bytes), self
        order = {"number": self.number, "max_pixels": self.max_pixels, "render": True}
        answer, pixels = _run(order, self.path, str(self), self.measured[1] + EXTRA_BYTES)
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
    order = {"number": number, "every": every, "most": most, "max_pixels": max_pixels}
    answer, _ = _run(order, content, f"PDF file of {len(content)} bytes", EXTRA_BYTES)
    pages = [
        IsolatedPdfPage(content, at, max_pixels=max_pixels, measured=((width, height), memory))
        for at, width, height, memory in answer["pages"]
    ]
    return answer["count"], pages


def _run(
    order: dict[str, Any], content: bytes, name: str, memory: int
) -> tuple[dict[str, Any], bytes]:
    line = json.dumps(order | {"memory": memory}).encode() + b"\n"
    command = [sys.executable, "-m", __name__]
    try:
        ended = subprocess.run(
            command, input=line + content, capture_output=True, timeout=WALL_SECONDS, check=False
        )
        head, _, pixels = ended.stdout.partition(b"\n")
    except subprocess.TimeoutExpired:
        head = b""
    if not head:  # ended by the system, by a limit or by a fault in PDFium
        raise ImageError(
            f"{name} cannot be read within {PROCESSOR_SECONDS} s of processor time and "
            f"{memory // 2**20} MiB of memory"
        )
    answer: dict[str, Any] = json.loads(head)
    if "error" in answer:
        raise ImageError(answer["error"])
    return answer, pixels


def _limit(memory: int) -> None:
    """Limit this process's processor time, and the memory that it allocates from now on."""
    try:
        import resource
    except ImportError:  # Windows: the parent's timeout is the only limit
        return
    resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_SECONDS, PROCESSOR_SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # macOS, where the limit of address space has no effect either
        return
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))


def _answer(order: dict[str, Any], content: bytes) -> tuple[dict[str, Any], bytes]:
    page = PdfPage(content, order["number"], max_pixels=order["max_pixels"])
    if order.get("render"):
        image = page.render()
        return {"width": image.width, "height": image.height}, image.tobytes()
    count = count_pages(content)
    if order["every"]:
        numbers: list[int | None] = list(range(1, count + 1)) if count <= order["most"] else []
    else:
        numbers = [page.number]
    found = []
    for number in numbers:
        (width, height), memory = replace(page, number=number).measure()
        found.append((number, width, height, memory))
    return {"count": count, "pages": found}, b""


def _main() -> None:
    with suppress(ImportError):  # loaded before memory is limited; PdfPage says if it is absent
        importlib.import_module("pypdfium2")
    order = json.loads(sys.stdin.buffer.readline())
    content = sys.stdin.buffer.read()
    _limit(order["memory"] + 2 * len(content))
    try:
        answer, pixels = _answer(order, content)
    except ImageError as error:
        answer, pixels = {"error": str(error)}, b""
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n" + pixels)


if __name__ == "__main__":
    _main()
