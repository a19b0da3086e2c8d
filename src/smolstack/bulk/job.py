"""map_images: a bulk job from its arguments to its output file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from smolstack.bulk.batching import DEFAULT_BATCH_ROWS, DEFAULT_BATCH_TOKENS, Limits
from smolstack.bulk.embeddings import check_embedding
from smolstack.bulk.input_listing import RowReader, listed, write_listing
from smolstack.bulk.inputs import ImageInputs, Input, ParquetFiles, open_input
from smolstack.bulk.local_engine import run_locally
from smolstack.bulk.outputs import check_output, write_output
from smolstack.bulk.partial_results import Parts
from smolstack.bulk.rows import Window, windows
from smolstack.bulk.settings import Work, check_same, settings_of
from smolstack.bulk.tasks import Task
from smolstack.checkpoint.hub import locate
from smolstack.errors import BulkError
from smolstack.generation.options import AnswerOptions, read_options
from smolstack.output_files import naming_errors
from smolstack.progress import shown
from smolstack.vlm import VLM

if TYPE_CHECKING:
    from typing_extensions import Unpack

DEFAULT_WINDOW = 256
ENGINES = ("embedded", "ray")


@dataclass(frozen=True)
class Progress:
    """The progress of a job.

    Attributes:
        done: images with saved results, including earlier runs.
        kept: images done by earlier runs.
        total: images of the input.
    """

    done: int
    kept: int
    total: int


@dataclass(frozen=True)
class Summary:
    """The result of a finished job.

    Attributes:
        out: the output file.
        images: rows of the input.
        rows: rows of the output: one per image and question.
        bad_images: images whose rows contain an error.
        kept: images done by earlier runs.
    """

    out: Path
    images: int
    rows: int
    bad_images: int
    kept: int


def map_images(
    images: ImageInputs,
    questions: str | Sequence[str] = (),
    *,
    out: str | Path,
    model: VLM | str | Path | None = None,
    revision: str | None = None,
    base: str | Path | None = None,
    mmproj: str | Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    embed: str | None = None,
    embed_dtype: str = "float32",
    image_column: str | None = None,
    id_column: str | None = None,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    batch_rows: int = DEFAULT_BATCH_ROWS,
    window: int = DEFAULT_WINDOW,
    engine: str = "embedded",
    workers: int | None = None,
    restart: bool = False,
    special_tokens_in_text: bool | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    **options: Unpack[AnswerOptions],
) -> Summary:
    """Ask questions about many images, or embed them, and write the results to one file.

    An interrupted job continues when it is called again with the same arguments: results are kept
    in the folder ``OUT.parts`` until the output is complete. Rows are in the order of the input; an
    image that cannot be read results in a row with its error. Answers are those of
    :meth:`smolstack.VLM.ask`, independent of batching.

    Args:
        images: a folder (with its sub-folders), a glob, an image, a JSONL, CSV or Parquet file
            (or a glob of them) of paths or bytes, or a list of paths and bytes.
        questions: one or more questions; each image is encoded once for all of them.
        out: the output, .parquet, .jsonl or .csv.
        model, revision, base, mmproj, dtype, device: as for :func:`smolstack.load`; ``model`` may
            also be a loaded VLM.
        embed: instead of questions, "tokens" for all visual tokens of an image, "mean" for
            their mean, or "retrieval" for the vectors of a retrieval model (ColSmol), which
            :func:`smolstack.bulk.search_pages` searches.
        embed_dtype: "float32" or "float16".
        image_column, id_column: columns of a table, if they cannot be recognized by name.
        batch_tokens: maximum prompt tokens per batch, padding included.
        batch_rows: maximum images per batch.
        window: number of images that are sorted into batches and stored together.
        engine: "embedded" (this process) or "ray" (Ray Data; its workers must see the same files).
        workers: processes of engine "ray"; default: one.
        restart: discard earlier results and replace the output.
        special_tokens_in_text: whether the text of special tokens in questions is converted to
            these tokens; None: yes, or as the given VLM's processor does.
        on_progress: called repeatedly with the progress. Default: a bar in notebooks.
        **options: as for :meth:`smolstack.VLM.ask`.

    Raises:
        BulkError: the input, the output or the saved state is invalid; the disk is full (finished
            results are kept).
        SmolstackError: as :func:`smolstack.load` and :meth:`smolstack.VLM.ask` do.
    """
    asked = (questions,) if isinstance(questions, str) else tuple(questions)
    out = Path(out)
    _check_what(asked, embed, embed_dtype)
    _check_how(engine, workers, window)
    check_output(out, lists=embed is not None)
    read_options(options, ())
    source = open_input(images, image_column, id_column, options.get("password"))
    vlm = model if isinstance(model, VLM) else None
    if isinstance(model, VLM):
        where = model.model_path
    else:
        where = locate(model, revision, base=base, mmproj=mmproj)
    work = Work(
        where=where.absolute(),
        dtype=dtype,
        device=device,
        questions=asked,
        embed=embed,
        embed_dtype=embed_dtype,
        options=options,
        special_tokens_in_text=_special_tokens(vlm, special_tokens_in_text),
        limits=Limits(batch_tokens, batch_rows),
    )
    parts = Parts(out.with_name(out.name + ".parts").absolute())
    parts.remove_rest()
    _check_new(out, parts, restart)
    settings = settings_of(work, source.identity, window)
    with parts.locked():
        _check_new(out, parts, restart)  # another process may have finished in the meantime
        try:
            if parts.begun and not restart:
                check_same(parts, settings)
            # All checks are made before the first file is written.
            here = work if engine == "embedded" else replace(work, device="cpu")
            task = here.task(vlm)
            if restart or not parts.begun:
                parts.clear()
                _begin(parts, source, settings, window)
            job = _Job(
                out=out,
                work=work,
                parts=parts,
                source=_parquet(parts, source),
                window=window,
                on_progress=on_progress or _shown(),
            )
            summary = job.run(task, engine, workers or 1)
        except BaseException:
            if parts.folder.exists() and not parts.begun:
                parts.remove()
            raise
        parts.remove()
    return summary


def _shown() -> Callable[[Progress], None] | None:
    tell = shown()
    return None if tell is None else lambda made: tell("images", made.done, made.total)


def _check_new(out: Path, parts: Parts, restart: bool) -> None:
    if out.exists() and not restart and not parts.folder.exists():
        raise BulkError(
            f"{out} exists already; choose another output, or replace it with restart (--restart)"
        )


def _special_tokens(vlm: VLM | None, wanted: bool | None) -> bool:
    """Return whether special tokens in questions are converted."""
    own = True if vlm is None else vlm.processor.special_tokens_in_text
    if vlm is not None and wanted not in (None, own):
        raise BulkError(
            f"special_tokens_in_text is {wanted}, but {own} in the given model's processor; "
            "set vlm.processor.special_tokens_in_text"
        )
    return own if wanted is None else wanted


class _Job:
    """A started job: its remaining work, and its end."""

    def __init__(
        self,
        *,
        out: Path,
        work: Work,
        parts: Parts,
        source: ParquetFiles,
        window: int,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self.out, self.work, self.parts, self.source = out, work, parts, source
        self.reader = RowReader(source)
        self.window, self.on_progress = window, on_progress
        self.kept = self.done = parts.kept(self.windows())

    def windows(self) -> Iterator[Window]:
        return windows(len(self.reader), self.window)

    def pending(self) -> Iterator[Window]:
        return (window for window in self.windows() if not self.parts.is_finished(window))

    def run(self, task: Task, engine: str, workers: int) -> Summary:
        self._tell(0)
        try:
            if engine == "ray":
                from smolstack.bulk.ray_engine import run_on_ray

                run_on_ray(
                    self.pending(),
                    self.work,
                    self.source,
                    self.parts.folder,
                    workers=workers,
                    done=self._tell,
                )
            else:
                run_locally(
                    self.pending(),
                    self.reader,
                    task,
                    self.parts,
                    limits=self.work.limits,
                    done=self._tell,
                )
            return self._merge(task)
        except OSError as error:
            # By number: pyarrow's message is long and varies.
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise BulkError(
                f"{error.filename or self.parts.folder}: {reason}; "
                f"{self.done:,} of {len(self.reader):,} images are done and kept, and the same "
                "call continues from there"
            ) from error

    def _tell(self, rows: int) -> None:
        self.done += rows
        if self.on_progress is not None:
            self.on_progress(Progress(self.done, self.kept, len(self.reader)))

    def _merge(self, task: Task) -> Summary:
        rows = bad = 0

        def tables() -> Iterator[pa.Table]:
            nonlocal rows, bad
            for window in self.windows():
                table = self.parts.results(window)
                rows += len(table)
                wrong = table.filter(pc.is_valid(table["error"]))
                bad += len(pc.unique(wrong["row"]))
                yield table

        write_output(self.out, task.schema, tables(), self.parts.folder / "output.new")
        return Summary(self.out, len(self.reader), rows, bad, self.kept)


def _begin(parts: Parts, source: Input, settings: Mapping[str, Any], window: int) -> None:
    """List the images and write the job's settings."""
    if source.rows is not None:
        with naming_errors(parts.listing):
            count = write_listing(parts.listing, source.rows(), window)
    else:
        count = len(RowReader(_parquet(parts, source)))
    if not count:
        raise BulkError(f"{settings['images']}: found no images")
    parts.begin(settings)


def _parquet(parts: Parts, source: Input) -> ParquetFiles:
    return listed(parts.listing) if source.parquet is None else source.parquet


def _check_what(questions: Sequence[str], embed: str | None, embed_dtype: str) -> None:
    if embed is not None:
        check_embedding(embed, embed_dtype)
        if questions:
            raise BulkError("found questions and embed, expected only one of them")
    elif not questions:
        raise BulkError("found no question, expected at least one (--question), or embed (--embed)")
    for question in questions:
        if not isinstance(question, str) or not question.strip():
            raise BulkError(f"a question is {question!r}, expected non-empty text")


def _check_how(engine: str, workers: int | None, window: int) -> None:
    if engine not in ENGINES:
        raise BulkError(f"engine is {engine!r}, expected one of {list(ENGINES)}")
    if workers is not None and engine != "ray":
        raise BulkError(
            f"workers is {workers}, but the embedded engine is one process; use engine ray"
        )
    for name, value in (("workers", workers), ("window", window)):
        if value is not None and value < 1:
            raise BulkError(f"{name} is {value}, expected 1 or more")
