"""Documents from pages: a document model reads each, docling-core makes one document of them.

SmolDocling and granite-docling write DocTags (Nassar et al. 2025): what stands where on a page, in
special tokens. Pages are read by a bulk job, so that nothing is read twice when it is cut off;
docling-core makes Markdown, HTML and its own JSON of the tags.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolstack.errors import BulkError, ImageError
from smolstack.processor.inputs import unlocked
from smolstack.processor.tiles import open_image

if TYPE_CHECKING:
    from PIL import Image
    from typing_extensions import Unpack

    from smolstack.bulk import Progress
    from smolstack.bulk.inputs import Pictures
    from smolstack.generation.options import AnswerOptions
    from smolstack.vlm import VLM

QUESTION = "Convert this page to docling."
TAGS = ".doctags"
FORMATS = (".md", ".html", ".json", TAGS)
LONGEST = 8192  # tokens of a page
BREAK = "<page_break>"


@dataclass(frozen=True)
class Page:
    """A page that was read.

    Attributes:
        name: what it is called.
        path: where its picture is; None for bytes.
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
class Converted:
    """What became of the pages.

    Attributes:
        out: the document.
        pages: how many there are.
        unread: those that could not be opened, with the reason.
        cut: those whose answer was cut off or went round in circles; what was read is kept.
    """

    out: Path
    pages: int
    unread: tuple[Page, ...]
    cut: tuple[Page, ...]


def convert(
    pages: Pictures,
    out: str | Path,
    *,
    model: str | Path | VLM | None = None,
    revision: str | None = None,
    base: str | Path | None = None,
    mmproj: str | Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    question: str = QUESTION,
    restart: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    **options: Unpack[AnswerOptions],
) -> Converted:
    """Read pages and write them as one document.

    A conversion that was cut off goes on where it was when it is called again in the same way.

    Args:
        pages: a PDF file, or whatever else :func:`smolstack.bulk.map_pictures` takes; or the
            .parquet table of such a job about pages, whose answers are then used.
        out: the document, .md, .html, .json (docling's) or .doctags (as the model wrote it).
        model, revision, base, mmproj, dtype, device: as for :func:`smolstack.load`; a document
            model, which a table of answers alone can do without.
        question: what the model is asked about each page.
        restart: forget what an earlier run did, and replace the document.
        on_progress: called now and then.
        **options: as for :meth:`smolstack.VLM.ask`; special tokens are kept, an answer that goes
            round in circles is ended, and a page has at most LONGEST tokens, unless told otherwise.

    Raises:
        BulkError: naming what is wrong with the pages or the output, or a package that is missing.
        SmolstackError: as :func:`smolstack.bulk.map_pictures` does.
    """
    out = Path(out)
    _check_output(out, restart)
    if _is_answered(pages):
        read = _read_table(Path(pages))  # type: ignore[arg-type]
        return _write(out, read, options.get("password"))
    if model is None:
        raise BulkError(
            "pages are read by a document model (model, --model), such as "
            "ibm-granite/granite-docling-258M; found none"
        )
    from smolstack.bulk import map_pictures

    table = out.with_name(f"{out.name}.pages.parquet")
    if table.exists() and not restart:
        raise BulkError(
            f"{table} is left of an earlier conversion; give it in place of the pages, or forget "
            "it with restart (--restart)"
        )
    chosen: dict[str, Any] = {
        "keep_special_tokens": True,
        "stop_on_repetition": True,
        "max_new_tokens": LONGEST,
        **options,
    }
    map_pictures(
        pages,
        question,
        out=table,
        model=model,
        revision=revision,
        base=base,
        mmproj=mmproj,
        dtype=dtype,
        device=device,
        restart=restart,
        on_progress=on_progress,
        **chosen,
    )
    converted = _write(out, _read_table(table), options.get("password"))
    table.unlink()
    return converted


def _check_output(out: Path, restart: bool) -> None:
    """Refuse an output that cannot be written, before anything is read."""
    if out.suffix not in FORMATS:
        found = f"the suffix {out.suffix!r}" if out.suffix else "no suffix"
        raise BulkError(f"{out} has {found}, expected one of {', '.join(FORMATS)}")
    if not out.parent.is_dir():
        raise BulkError(f"{out}: the folder {out.parent} does not exist")
    if out.exists() and not restart:
        raise BulkError(f"{out} exists already; choose another output, or replace it with restart "
                        "(--restart)")  # fmt: skip
    for needed in ("pyarrow",) if out.suffix == TAGS else ("pyarrow", "docling_core"):
        try:
            __import__(needed)
        except ImportError:
            package = needed.replace("_", "-")
            raise BulkError(
                f"documents need the package {package} (pip install 'smolstack[documents]')"
            ) from None


def _is_answered(pages: object) -> bool:
    """Whether this is a table of answers, from a bulk job."""
    if not isinstance(pages, (str, Path)) or not str(pages).endswith(".parquet"):
        return False
    import pyarrow.parquet as pq

    try:
        return {"question", "answer"} <= set(pq.read_schema(pages).names)
    except (OSError, ValueError):
        return False  # what is wrong with it, the bulk job says


def _read_table(table: Path) -> list[Page]:
    import pyarrow.parquet as pq

    columns = ["id", "path", "question", "answer", "finish_reason", "error"]
    rows = pq.read_table(table, columns=columns).to_pylist()
    if len({row["question"] for row in rows}) > 1:
        raise BulkError(f"{table} holds answers to several questions, expected one for each page")
    return [
        Page(row["id"], row["path"], row["answer"] or "", row["finish_reason"], row["error"])
        for row in rows
    ]


def _write(out: Path, pages: Sequence[Page], password: str | None) -> Converted:
    """The document, complete or not at all."""
    if not pages:
        raise BulkError("there are no pages, expected at least one")
    if all(page.error is not None for page in pages):
        raise BulkError(f"no page could be read; the first: {pages[0].error}")
    beside = out.with_name(f".{out.name}.new")
    beside.write_text(_document(out, pages, password), encoding="utf-8", errors="replace")
    os.replace(beside, out)
    return Converted(
        out,
        len(pages),
        tuple(page for page in pages if page.error is not None),
        tuple(page for page in pages if page.finish_reason in ("length", "repetition")),
    )


def _document(out: Path, pages: Sequence[Page], password: str | None) -> str:
    tags = [page.tags for page in pages]
    if out.suffix == TAGS:
        return f"\n{BREAK}\n".join(tags) + "\n"
    from docling_core.types.doc.base import ImageRefMode
    from docling_core.types.doc.doctags import DocTagsDocument
    from docling_core.types.doc.document import DoclingDocument

    # Markdown shows no pictures: places on the page, which need its size, are not looked at.
    images: list[Path | Image.Image] | None = None
    if out.suffix != ".md":
        images = [_picture(page, password) for page in pages]
    tagged = DocTagsDocument.from_doctags_and_image_pairs(tags, images)
    document = DoclingDocument.load_from_doctags(tagged, document_name=out.stem)
    if out.suffix == ".md":
        return str(document.export_to_markdown()) + "\n"
    if out.suffix == ".html":
        return str(document.export_to_html(image_mode=ImageRefMode.EMBEDDED))
    return str(document.model_dump_json(by_alias=True, exclude_none=True))


def _picture(page: Page, password: str | None) -> Image.Image:
    from PIL import Image

    try:
        if page.path is not None and page.error is None:
            return open_image(unlocked(page.path, password))
    except ImageError:
        pass  # it was there when it was read; the text is worth more than the picture
    return Image.new("RGB", (1, 1))
