"""What is done with each image: questions answered (here), or embeddings kept (embeddings.py).

A task plans a row from its image's header alone, loads some rows (in a thread, ahead of the
model), and turns what was loaded into results: one record per image and question, whatever
happened to the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from smolstack.bulk.partial_results import ROW
from smolstack.bulk.rows import Row, plain
from smolstack.errors import BulkError, SmolstackError
from smolstack.generation.answer import Answer
from smolstack.generation.core import EngineCore
from smolstack.generation.grammar import Choices
from smolstack.generation.image_cache import ImageCache
from smolstack.generation.inline import INLINE, InlineEngine
from smolstack.generation.options import AnswerOptions, read_options
from smolstack.generation.prefix_cache import DEFAULT_PREFIX_BYTES
from smolstack.generation.request import Kind, Request
from smolstack.processor.geometry import Tiling
from smolstack.processor.processor import Prompt

if TYPE_CHECKING:
    from smolstack.vlm import VLM

ABOUT = [(ROW, pa.int64()), ("id", pa.string()), ("path", pa.string())]


@dataclass
class Loaded:
    """Rows on their way to the model.

    Attributes:
        rows: those whose images could be opened.
        requests: per row, its requests (one per question), their images cut into tiles; in the
            place of one that cannot be answered, what is wrong with it.
        errors: the other rows, and what was wrong.
    """

    rows: list[Row]
    requests: list[list[Request | str]]
    errors: list[tuple[Row, str]]


class Task(Protocol):
    """Work on images. ``records`` is how many results an image has."""

    schema: pa.Schema
    records: int

    def plan(self, row: Row) -> int:
        """Tokens that a row takes; any exception is that row's error."""
        ...

    def load(self, rows: Sequence[Row]) -> Loaded:
        """Open and cut the images of some rows; never raises for a bad one."""
        ...

    def work(self, loaded: Loaded) -> pa.RecordBatch:
        """The results of all rows that were loaded, bad ones included."""
        ...


class ImageTask:
    """What both tasks share: planning, loading, and results of rows that failed."""

    schema: pa.Schema
    kind: Kind

    def __init__(self, vlm: VLM, tiling: Tiling, prefix_bytes: int = 0) -> None:
        self.model, self.processor, self.tiling = vlm.model, vlm.processor, tiling
        # A core of its own: an image does not come twice in a row, so none is kept.
        limits = replace(INLINE, prefix_bytes=prefix_bytes)
        images = ImageCache(vlm.model, max_bytes=0)
        self.engine = InlineEngine(EngineCore(vlm.model, vlm.processor, limits, images=images))

    def prepare(self, row: Row) -> list[Prompt]:
        raise NotImplementedError

    def request(self, prompt: Prompt) -> Request | str:
        """A request for what is wanted of a prompt, or why that cannot be had."""
        return Request(prompt, self.kind)

    def load(self, rows: Sequence[Row]) -> Loaded:
        loaded = Loaded([], [], [])
        for row in rows:
            try:
                made = [self.request(prompt) for prompt in self.prepare(row)]
                self.engine.core.prepare([one for one in made if isinstance(one, Request)])
            except Exception as error:  # a decoder may raise anything about a damaged file
                loaded.errors.append((row, sentence(error)))
                continue
            loaded.requests.append(made)
            loaded.rows.append(row)
        return loaded

    def finish(self, loaded: Loaded) -> None:
        """Work until all requests are finished."""
        self.engine.finish(
            [one for some in loaded.requests for one in some if isinstance(one, Request)]
        )

    def about(self, row: Row) -> dict[str, Any]:
        path = None if row.path is None else plain(row.path)
        return {ROW: row.index, "id": plain(row.id), "path": path}

    def batch(self, records: list[dict[str, Any]]) -> pa.RecordBatch:
        return pa.RecordBatch.from_pylist(records, schema=self.schema)


class Questions(ImageTask):
    """Every question about every image, which is encoded once for all of them."""

    kind = "answer"

    def __init__(self, vlm: VLM, questions: Sequence[str], options: AnswerOptions) -> None:
        self.options = read_options(options, vlm.eos_token_ids)
        kept = DEFAULT_PREFIX_BYTES if len(questions) > 1 else 0
        super().__init__(vlm, self.options.tiling, kept)
        if vlm.config.embedding_dim is not None:
            raise BulkError(
                f"{vlm.folder} ends in an embedding head and answers no questions; it can give "
                "embeddings (embed, --embed retrieval)"
            )
        self.engine.core.maker.compile(
            self.options
        )  # a schema that cannot be compiled is refused here
        self.questions, self.records = list(questions), len(questions)
        self.choosing = isinstance(self.options.structure, Choices)
        numbers = ("prompt_tokens", "visual_tokens", "completion_tokens")
        self.schema = pa.schema(
            [
                *ABOUT,
                ("question", pa.string()),
                ("answer", pa.string()),
                *([("probability", pa.float64())] if self.choosing else []),
                ("finish_reason", pa.string()),
                *((name, pa.int32()) for name in numbers),
                ("error", pa.string()),
            ]
        )
        self._tokens: dict[tuple[int, int], int] = {}

    def plan(self, row: Row) -> int:
        plan = self.processor.plan(row.image, **self.tiling)
        grid = plan.rows, plan.cols
        if grid not in self._tokens:
            counts = [self.processor.count_tokens([plan], text) for text in self.questions]
            self._tokens[grid] = max(counts)
        return self._tokens[grid]

    def prepare(self, row: Row) -> list[Prompt]:
        return [self.processor.prepare((row.image, q), **self.tiling) for q in self.questions]

    def request(self, prompt: Prompt) -> Request | str:
        try:
            return self.engine.core.requests([prompt], self.options)[0]
        except SmolstackError as error:
            return str(error)  # one question has no room for its answer, say; the others have

    def work(self, loaded: Loaded) -> pa.RecordBatch:
        self.finish(loaded)
        records = []
        for row, requests in zip(loaded.rows, loaded.requests, strict=True):
            for question, request in zip(self.questions, requests, strict=True):
                answer = request if isinstance(request, str) else request.answered
                records.append(self._record(row, question, answer))
        for row, error in loaded.errors:
            records += [self._record(row, question, error) for question in self.questions]
        return self.batch(records)

    def _record(self, row: Row, question: str, answer: Answer | str) -> dict[str, Any]:
        record = {**self.about(row), "question": question}
        if isinstance(answer, str):
            return {**record, "error": plain(answer)}
        if answer.probabilities is not None:
            record["probability"] = answer.probabilities[answer.text]
        return {
            **record,
            "answer": plain(answer.text),
            "finish_reason": answer.finish_reason,
            "prompt_tokens": answer.usage.prompt_tokens,
            "visual_tokens": answer.usage.visual_tokens,
            "completion_tokens": answer.usage.completion_tokens,
        }


def sentence(error: Exception) -> str:
    """What was wrong with a row, in one sentence."""
    if isinstance(error, SmolstackError):
        return str(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror or error}"
    return f"the image cannot be read ({type(error).__name__}: {error})"
