"""The document of pages that were read: docling-core makes it, page by page where it must.

One page that docling-core cannot take does not end the others: its boxes go first, then all of it
but its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smolstack.documents.repair import FROM_PRIVATE, GREATER, LESS, Mended, mend, plain
from smolstack.errors import BulkError, ImageError
from smolstack.processor.inputs import unlocked
from smolstack.processor.tiles import open_image

if TYPE_CHECKING:
    from docling_core.types.doc.document import DoclingDocument
    from PIL import Image

TAGS = ".doctags"
BREAK = "<page_break>"


@dataclass(frozen=True)
class Page:
    """A page that was read.

    Attributes:
        name: what it is called.
        path: where its image is; None for bytes.
        tags: DocTags; empty where it could not be read.
        finish_reason: of the answer: "stop", or why it is not complete.
        error: why there is no answer, or None.
    """

    name: str
    path: str | None
    tags: str
    finish_reason: str | None
    error: str | None


@dataclass(frozen=True)
class Remark:
    """Something that was wrong with the tags of a page, or with its image, and what was done.

    Attributes:
        name: of the page.
        text: one sentence without a full stop.
    """

    name: str
    text: str


@dataclass(frozen=True)
class Made:
    """A document's text, how many elements its pages gave, and what was wrong with them."""

    text: str
    elements: int
    remarks: tuple[Remark, ...]


@dataclass(frozen=True)
class _Ready:
    """A page as docling-core is given it."""

    tags: str
    image: Image.Image | None


def made_document(name: str, pages: Sequence[Page], suffix: str, password: str | None) -> Made:
    """The document of some pages, in one of the formats.

    Args:
        name: of the document.
        pages: in their order.
        suffix: ".md", ".html", ".json" or ".doctags".
        password: of a locked PDF file, where pages are rendered again for their figures.

    Raises:
        BulkError: where docling-core cannot write the document at all.
    """
    remarks: list[Remark] = []
    ready, elements = [], 0
    for page in pages:
        # Markdown shows no figures: places on the page, which need its size, are not looked at.
        image = _image(page, password, remarks) if suffix in (".html", ".json") else None
        mended = mend(page.tags, None if image is None else image.size)
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
        # Whatever docling-core or its own parts raise about one page must not end the others.
        kept = [_tried(page, it, suffix, remarks) for page, it in zip(pages, ready, strict=True)]
        try:
            text = _written(name, kept, suffix)
        except Exception as error:
            raise BulkError(f"docling-core cannot write the document: {_first(error)}") from error
    order = {page.name: number for number, page in enumerate(pages)}
    remarks.sort(key=lambda remark: order[remark.name])
    return Made(text, elements, tuple(remarks))


def _remarks(page: Page, mended: Mended) -> list[Remark]:
    if not mended.elements and mended.words:
        return [Remark(page.name, "its answer holds no element of a document, and is left out")]
    if not mended.boxes:
        return []
    boxes = "1 box is" if mended.boxes == 1 else f"{mended.boxes} boxes are"
    return [Remark(page.name, f"{boxes} empty, inverted or off the page, and left out")]


def _tried(page: Page, ready: _Ready, suffix: str, remarks: list[Remark]) -> _Ready:
    """The page as far as docling-core takes it."""
    mended = mend(page.tags, boxes=False)
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
    """Put < and > back into every text of a document."""
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
    """The page's image; None where it is not there any more, or never was a file."""
    if page.error is not None or "<" not in page.tags:
        return None
    if page.path is None:
        if "<picture>" in page.tags or "<chart>" in page.tags:
            remarks.append(Remark(page.name, "its image came as bytes: its figures are left out"))
        return None
    try:
        return open_image(unlocked(page.path, password))
    except ImageError as error:  # it was there when it was read; the text is worth more
        remarks.append(Remark(page.name, f"its figures are left out: {error}"))
        return None
