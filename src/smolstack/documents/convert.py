"""Converts pages to a document: a document model reads each page, docling-core assembles them.

SmolDocling and granite-docling generate DocTags (Nassar et al. 2025), special tokens that describe
the layout of a page. Pages are read by a bulk job, so an interrupted conversion repeats no work;
docling-core converts the tags to Markdown, HTML and its own JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolstack.documents.pages import TAGS, Page, Remark, build_document
from smolstack.errors import BulkError
from smolstack.output_files import atomic_file, exclusive_writer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from smolstack.bulk import Progress
    from smolstack.bulk.inputs import ImageInputs
    from smolstack.generation.options import AnswerOptions
    from smolstack.vlm import VLM

QUESTION = "Convert this page to docling."
FORMATS = (".md", ".html", ".json", TAGS)
LONGEST = 8192  # tokens per page
NAMED = 8  # pages listed in an error
SHOWN = 60  # characters of an answer quoted in an error


@dataclass(frozen=True)
class Converted:
    """The result of a conversion.

    Attributes:
        out: the document.
        pages: number of pages.
        unread: pages that could not be opened, with the reason.
        cut: pages whose answer was cut off or repeated itself; the text so far is kept.
        remarks: problems with the tags of a page, page by page; the text is kept.
    """

    out: Path
    pages: int
    unread: tuple[Page, ...]
    cut: tuple[Page, ...]
    remarks: tuple[Remark, ...] = ()


def convert(
    pages: ImageInputs,
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

    An interrupted conversion continues when it is called again with the same arguments.

    Args:
        pages: a PDF file, or any other input of :func:`smolstack.bulk.map_images`; or the .parquet
            output of such a job about pages, whose answers are then used.
        out: the document, .md, .html, .json (docling's) or .doctags (as generated).
        model, revision, base, mmproj, dtype, device: as for :func:`smolstack.load`; a document
            model. Not needed if ``pages`` is a table of answers.
        question: the question about each page.
        restart: discard earlier results and replace the document.
        on_progress: called repeatedly with the progress.
        **options: as for :meth:`smolstack.VLM.ask`. By default special tokens are kept, a
            repetitive answer is ended, and a page has at most LONGEST tokens.

    Raises:
        BulkError: the pages or the output are invalid, or a package is missing; no page could be
            opened, or no answer contains an element of a document. In the last case, the answers
            are kept in OUT.pages.parquet.
        SmolstackError: as :func:`smolstack.bulk.map_images` does.
    """
    out = Path(out)
    _check_output(out, restart)
    with exclusive_writer(out, BulkError):
        _check_output(out, restart)  # left by a process that was killed
        loading = {"revision": revision, "base": base, "mmproj": mmproj}
        loading |= {"dtype": dtype, "device": device}
        return _converted(
            pages,
            out,
            options,
            model=model,
            question=question,
            restart=restart,
            on_progress=on_progress,
            loading=loading,
        )


def _converted(
    pages: ImageInputs,
    out: Path,
    options: AnswerOptions,
    *,
    model: str | Path | VLM | None,
    question: str,
    restart: bool,
    on_progress: Callable[[Progress], None] | None,
    loading: dict[str, Any],
) -> Converted:
    if _is_answered(pages):
        read = _read_table(Path(pages))  # type: ignore[arg-type]
        return _write(out, read, options.get("password"))
    if model is None:
        raise BulkError(
            "no model was given; pass a document model (model, --model), such as "
            "ibm-granite/granite-docling-258M"
        )
    from smolstack.bulk import map_images

    table = out.with_name(f"{out.name}.pages.parquet")
    if table.exists() and not restart:
        raise BulkError(
            f"{table} is left from an earlier conversion; pass it instead of the pages, or discard "
            "it with restart (--restart)"
        )
    chosen: dict[str, Any] = {
        "keep_special_tokens": True,
        "stop_on_repetition": True,
        "max_new_tokens": LONGEST,
        **options,
    }
    map_images(
        pages,
        question,
        out=table,
        model=model,
        restart=restart,
        on_progress=on_progress,
        **loading,
        **chosen,
    )
    read = _read_table(table)
    try:
        converted = _write(out, read, options.get("password"))
    except BulkError as error:
        if all(page.error is not None for page in read):  # no answer that is worth keeping
            table.unlink()
            raise
        raise BulkError(f"{error}; the answers are in {table}") from None
    table.unlink()
    return converted


def _check_output(out: Path, restart: bool) -> None:
    """Raise an error if the output cannot be written, before anything is read."""
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
    """Return whether this is the output of a bulk job with answers."""
    if not isinstance(pages, (str, Path)) or not str(pages).endswith(".parquet"):
        return False
    import pyarrow.parquet as pq

    try:
        return {"question", "answer"} <= set(pq.read_schema(pages).names)
    except (OSError, ValueError):
        return False  # the bulk job reports the error


def _read_table(table: Path) -> list[Page]:
    import pyarrow.parquet as pq

    columns = ["id", "path", "question", "answer", "finish_reason", "error"]
    missing = [name for name in columns if name not in pq.read_schema(table).names]
    if missing:
        raise BulkError(
            f"{table} has no column {' or '.join(missing)}; expected a table of smolstack map, "
            f"with the columns {', '.join(columns)}"
        )
    rows = pq.read_table(table, columns=columns).to_pylist()
    if len({row["question"] for row in rows}) > 1:
        raise BulkError(f"{table} has answers to several questions, expected one answer per page")
    return [
        Page(row["id"], row["path"], row["answer"] or "", row["finish_reason"], row["error"])
        for row in rows
    ]


def _write(out: Path, pages: Sequence[Page], password: str | None) -> Converted:
    """Write the document; the file is always complete."""
    if not pages:
        raise BulkError("found no pages, expected at least one")
    unread = tuple(page for page in pages if page.error is not None)
    if len(unread) == len(pages):
        raise BulkError(f"no page could be read: {_listed(unread)}; the first: {pages[0].error}")
    made = build_document(out.stem, pages, out.suffix, password)
    if not made.elements:
        asked = [page for page in pages if page.error is None]
        raise BulkError(
            f"no answer contains document elements: {_listed(asked)}; expected DocTags, the "
            f"output format of document models, found {_shown(asked[0].tags)}"
        )
    with atomic_file(out) as beside:
        beside.write_text(made.text, encoding="utf-8", errors="replace")
    return Converted(
        out,
        len(pages),
        unread,
        tuple(page for page in pages if page.finish_reason in ("length", "repetition")),
        made.remarks,
    )


def _listed(pages: Sequence[Page]) -> str:
    names = [page.name for page in pages[:NAMED]]
    rest = len(pages) - len(names)
    return ", ".join(names) + (f" and {rest} more" if rest else "")


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "…")
