"""The work per image: answering questions (here), or computing embeddings (embeddings.py).

A task plans a row from its image's header, loads some rows (in a thread, ahead of the model), and
turns the loaded rows into results: one record per image and question, also for images with errors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from smolstack.bulk.partial_results import ROW
from smolstack.bulk.rows import Row, plain
from smolstack.errors import BulkError, SmolstackError
from smolstack.generation.answer import Answer
from smolstack.generation.core import EngineCore
from smolstack.generation.image_cache import ImageCache
from smolstack.generation.inline import INLINE, InlineEngine
from smolstack.generation.options import AnswerOptions, read_options
from smolstack.generation.prefix_cache import DEFAULT_PREFIX_BYTES
from smolstack.generation.request import Kind, Request
from smolstack.generation.structured_output import Choices
from smolstack.processor.inputs import ImageOptions
from smolstack.processor.processor import Prompt

if TYPE_CHECKING:
    from smolstack.vlm import VLM

ABOUT = [(ROW, pa.int64()), ("id", pa.string()), ("path", pa.string())]


@dataclass
class Loaded:
    """Rows that are ready for the model.

    Attributes:
        rows: rows whose images could be opened.
        requests: per row, its requests (one per question) with their tiles, or an error message in
            place of a request that cannot be answered.
        errors: the other rows, with their error messages.
    """

    rows: list[Row]
    requests: list[list[Request | str]]
    errors: list[tuple[Row, str]]


class Task(Protocol):
    """Work on images. ``records`` is the number of results per image."""

    schema: pa.Schema
    records: int

    def plan(self, row: Row) -> int:
        """Return the token count of a row; any exception is that row's error."""
        ...

    def load(self, rows: Sequence[Row]) -> Loaded:
        """Open and preprocess the images of some rows; does not raise for invalid images."""
        ...

    def work(self, loaded: Loaded) -> pa.RecordBatch:
        """Return the results of all loaded rows, including those with errors."""
        ...


class ImageTask(ABC):
    """Base of both tasks: planning, loading, and results of rows with errors."""

    schema: pa.Schema
    kind: Kind

    def __init__(self, vlm: VLM, image_options: ImageOptions, prefix_bytes: int = 0) -> None:
        self.model, self.processor, self.image_options = vlm.model, vlm.processor, image_options
        # A separate core without an image cache: images rarely repeat.
        limits = replace(INLINE, prefix_bytes=prefix_bytes)
        cache = ImageCache(vlm.model, max_bytes=0)
        self.engine = InlineEngine(EngineCore(vlm.model, vlm.processor, limits, image_cache=cache))

    @abstractmethod
    def prepare(self, row: Row) -> list[Prompt]: ...

    def request(self, prompt: Prompt) -> Request | str:
        """Return a request for a prompt, or why there cannot be one."""
        return Request(prompt, self.kind)

    def load(self, rows: Sequence[Row]) -> Loaded:
        loaded = Loaded([], [], [])
        for row in rows:
            try:
                made = [self.request(prompt) for prompt in self.prepare(row)]
                self.engine.core.open_images([one for one in made if isinstance(one, Request)])
            except Exception as error:  # decoders raise many exception types for damaged files
                loaded.errors.append((row, sentence(error)))
                continue
            loaded.requests.append(made)
            loaded.rows.append(row)
        return loaded

    def finish(self, loaded: Loaded) -> None:
        """Run the engine until all requests are finished."""
        self.engine.finish(
            [one for some in loaded.requests for one in some if isinstance(one, Request)]
        )

    def about(self, row: Row) -> dict[str, Any]:
        path = None if row.path is None else plain(row.path)
        return {ROW: row.index, "id": plain(row.id), "path": path}

    def batch(self, records: list[dict[str, Any]]) -> pa.RecordBatch:
        return pa.RecordBatch.from_pylist(records, schema=self.schema)


class Questions(ImageTask):
    """Asks every question about every image; each image is encoded once."""

    kind = "answer"

    def __init__(self, vlm: VLM, questions: Sequence[str], options: AnswerOptions) -> None:
        self.options = read_options(options, vlm.eos_token_ids)
        kept = DEFAULT_PREFIX_BYTES if len(questions) > 1 else 0
        super().__init__(vlm, self.options.image_options, kept)
        if vlm.config.embedding_dim is not None:
            raise BulkError(
                f"{vlm.folder} has an embedding head and cannot generate text; use it for "
                "embeddings (embed, --embed retrieval)"
            )
        self.engine.core.maker.compile(self.options)  # raises for a schema that cannot be compiled
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
        plan = self.processor.plan(row.image, **self.image_options)
        grid = plan.rows, plan.cols
        if grid not in self._tokens:
            counts = [self.processor.count_tokens([plan], text) for text in self.questions]
            self._tokens[grid] = max(counts)
        return self._tokens[grid]

    def prepare(self, row: Row) -> list[Prompt]:
        return [
            self.processor.prepare((row.image, q), **self.image_options) for q in self.questions
        ]

    def request(self, prompt: Prompt) -> Request | str:
        try:
            return self.engine.core.requests([prompt], self.options)[0]
        except SmolstackError as error:
            return str(error)  # e.g. no room for this answer; others may fit

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
    """Describe a row's error in one sentence."""
    if isinstance(error, SmolstackError):
        return str(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror or error}"
    return f"the image cannot be read ({type(error).__name__}: {error})"
