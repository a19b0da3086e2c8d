"""Assembles the document from pages with docling-core, page by page if necessary.

A page that docling-core rejects does not affect the others: it is retried without its boxes, then
as plain text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smolstack.documents.repair import FROM_PRIVATE, GREATER, LESS, Repaired, plain, repair
from smolstack.errors import BulkError, ImageError
from smolstack.processor.inputs import with_password
from smolstack.processor.tiles import open_image

if TYPE_CHECKING:
    from docling_core.types.doc.document import DoclingDocument
    from PIL import Image

TAGS = ".doctags"
BREAK = "<page_break>"


@dataclass(frozen=True)
class Page:
    """A page that has been read.

    Attributes:
        name: name of the page.
        path: path of its image; None for bytes.
        tags: DocTags; empty if it could not be read.
        finish_reason: "stop", or why the answer is not complete.
        error: why there is no answer, or None.
    """

    name: str
    path: str | None
    tags: str
    finish_reason: str | None
    error: str | None


@dataclass(frozen=True)
class Remark:
    """A problem with the tags of a page, or with its image, and how it was handled.

    Attributes:
        name: name of the page.
        text: one sentence without a full stop.
    """

    name: str
    text: str


@dataclass(frozen=True)
class Made:
    """A document's text, the number of elements on its pages, and the problems found."""

    text: str
    elements: int
    remarks: tuple[Remark, ...]


@dataclass(frozen=True)
class _Ready:
    """A page in the form that docling-core is given."""

    tags: str
    image: Image.Image | None


def build_document(name: str, pages: Sequence[Page], suffix: str, password: str | None) -> Made:
    """Return the document of some pages, in one of the formats.

    Args:
        name: name of the document.
        pages: pages in order.
        suffix: ".md", ".html", ".json" or ".doctags".
        password: password of an encrypted PDF file, whose pages are rendered again to extract
            figures.

    Raises:
        BulkError: docling-core cannot write the document.
    """
    remarks: list[Remark] = []
    ready, elements = [], 0
    for page in pages:
        # Markdown contains no figures, so boxes, which need the page's size, are not used.
        image = _image(page, password, remarks) if suffix in (".html", ".json") else None
        mended = repair(page.tags, None if image is None else image.size)
        elements += mended.elements
        if page.error is None:
            remarks += _remarks(page, mended)
        ready.append(_Ready(mended.tags, image))
    if suffix == TAGS:
        text = f"\n{BREAK}\n".join(page.tags for page in pages) + "\n"
        return Made(text, elements, tuple(remarks))
    try:
        text = _written(name, ready, suffix)
    except Exception:
        # An exception of docling-core about one page must not affect the others.
        kept = [_tried(page, it, suffix, remarks) for page, it in zip(pages, ready, strict=True)]
        try:
            text = _written(name, kept, suffix)
        except Exception as error:
            raise BulkError(f"docling-core cannot write the document: {_first(error)}") from error
    order = {page.name: number for number, page in enumerate(pages)}
    remarks.sort(key=lambda remark: order[remark.name])
    return Made(text, elements, tuple(remarks))


def _remarks(page: Page, mended: Repaired) -> list[Remark]:
    if not mended.elements and mended.words:
        return [Remark(page.name, "its answer holds no element of a document, and is left out")]
    if not mended.boxes:
        return []
    boxes = "1 box is" if mended.boxes == 1 else f"{mended.boxes} boxes are"
    return [Remark(page.name, f"{boxes} empty, inverted or off the page, and left out")]


def _tried(page: Page, ready: _Ready, suffix: str, remarks: list[Remark]) -> _Ready:
    """Return the page in the most complete form that docling-core accepts."""
    mended = repair(page.tags, boxes=False)
    attempts = (
        (ready, None),
        (_Ready(ready.tags, None), "its figures are left out"),
        (_Ready(mended.tags, ready.image), "its boxes are left out"),
        (_Ready(plain(mended.words), None), "only its text is kept"),
    )
    reason = ""
    for attempt, loss in attempts:
        try:
            _written(page.name, [attempt], suffix)
        except Exception as error:
            reason = reason or _first(error)
            continue
        if loss is not None:
            remarks.append(Remark(page.name, f"docling-core cannot take it ({reason}): {loss}"))
        return attempt
    remarks.append(Remark(page.name, f"docling-core cannot take it ({reason}): it is left out"))
    return _Ready("<doctag></doctag>", None)


def _first(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _written(name: str, pages: Sequence[_Ready], suffix: str) -> str:
    from docling_core.types.doc.base import ImageRefMode
    from docling_core.types.doc.doctags import DocTagsDocument, DocTagsPage
    from docling_core.types.doc.document import DoclingDocument

    tagged = DocTagsDocument(pages=[DocTagsPage(tokens=it.tags, image=it.image) for it in pages])
    document = DoclingDocument.load_from_doctags(tagged, document_name=name)
    _restore(document)
    if suffix == ".md":
        return str(document.export_to_markdown()) + "\n"
    if suffix == ".html":
        return str(document.export_to_html(image_mode=ImageRefMode.EMBEDDED))
    return str(document.model_dump_json(by_alias=True, exclude_none=True))


def _restore(document: DoclingDocument) -> None:
    """Restore < and > in every text of a document."""
    seen: list[Any] = [
        document.texts,
        document.tables,
        document.pictures,
        document.key_value_items,
        document.groups,
    ]
    while seen:
        holder = seen.pop()
        if isinstance(holder, (list, tuple)):
            seen += holder
        elif isinstance(holder, dict):
            seen += holder.values()
        elif hasattr(type(holder), "model_fields"):
            for field in type(holder).model_fields:
                value = holder.__dict__.get(field)
                if not isinstance(value, str):
                    seen.append(value)
                elif LESS in value or GREATER in value:
                    setattr(holder, field, value.translate(FROM_PRIVATE))


def _image(page: Page, password: str | None, remarks: list[Remark]) -> Image.Image | None:
    """Return the page's image; None if the file no longer exists, or it was never a file."""
    if page.error is not None or "<" not in page.tags:
        return None
    if page.path is None:
        if "<picture>" in page.tags or "<chart>" in page.tags:
            remarks.append(Remark(page.name, "its image came as bytes: its figures are left out"))
        return None
    try:
        return open_image(with_password(page.path, password))
    except ImageError as error:  # the file has changed since; keep the text
        remarks.append(Remark(page.name, f"its figures are left out: {error}"))
        return None
