"""What is done with each picture: questions answered (here), or embeddings kept (embeddings.py).

A task plans a row from its picture's header alone, loads some rows (in a thread, ahead of the
model), and turns what was loaded into results: one record per picture and question, whatever
happened to the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from smolstack.bulk.parts import ROW
from smolstack.bulk.rows import Row, plain
from smolstack.errors import BulkError, SmolstackError
from smolstack.generation.answer import Answer
from smolstack.generation.answering import Answering, AnswerStream, Encoding, Form
from smolstack.generation.beginning import read_beginning
from smolstack.generation.options import AnswerOptions, read_options
from smolstack.generation.reuse import PrefixCache
from smolstack.generation.structured import Choices
from smolstack.model.cache import KVCache
from smolstack.processor.geometry import Tiling
from smolstack.processor.processor import Prompt

if TYPE_CHECKING:
    from smolstack.vlm import VLM

ABOUT = [(ROW, pa.int64()), ("id", pa.string()), ("path", pa.string())]


@dataclass
class Loaded:
    """Rows on their way to the model.

    Attributes:
        rows: those whose pictures could be opened.
        prompts: per row, its prompts (one per question).
        encoding: their pictures, cut into tiles; None when no row is left.
        errors: the other rows, and what was wrong.
    """

    rows: list[Row]
    prompts: list[list[Prompt]]
    encoding: Encoding | None
    errors: list[tuple[Row, str]]


class Task(Protocol):
    """Work on pictures. ``records`` is how many results a picture has."""

    schema: pa.Schema
    records: int

    def plan(self, row: Row) -> int:
        """Tokens that a row takes; any exception is that row's error."""
        ...

    def load(self, rows: Sequence[Row]) -> Loaded:
        """Open and cut the pictures of some rows; never raises for a bad one."""
        ...

    def work(self, loaded: Loaded) -> pa.RecordBatch:
        """The results of all rows that were loaded, bad ones included."""
        ...


class Pictures:
    """What both tasks share: planning, loading, and results of rows that failed."""

    schema: pa.Schema

    def __init__(self, vlm: VLM, tiling: Tiling) -> None:
        self.model, self.processor, self.tiling = vlm.model, vlm.processor, tiling
        # Own caches: this one is used by two threads, and no picture comes twice in a row.
        self.answering = Answering(vlm.model, vlm.processor)
        self.answering.pictures.max_bytes = 0
        self.answering.prefix = None

    def prepare(self, row: Row) -> list[Prompt]:
        raise NotImplementedError

    def load(self, rows: Sequence[Row]) -> Loaded:
        loaded = Loaded([], [], None, [])
        for row in rows:
            try:
                loaded.prompts.append(self.prepare(row))
                loaded.rows.append(row)
            except Exception as error:  # a decoder may raise anything about a damaged file
                loaded.errors.append((row, sentence(error)))
        try:
            loaded.encoding = self._open(loaded.prompts)
        except Exception:
            self._part(loaded)
        return loaded

    def _open(self, prompts: list[list[Prompt]]) -> Encoding | None:
        return self.answering.encode([some[0] for some in prompts]) if prompts else None

    def _part(self, loaded: Loaded) -> None:
        """Some picture cannot be decoded: find out which, and open the others."""
        rows, prompts = loaded.rows, loaded.prompts
        loaded.rows, loaded.prompts = [], []
        for row, some in zip(rows, prompts, strict=True):
            try:
                self._open([some])
            except Exception as error:
                loaded.errors.append((row, sentence(error)))
            else:
                loaded.rows.append(row)
                loaded.prompts.append(some)
        loaded.encoding = self._open(loaded.prompts)

    def about(self, row: Row) -> dict[str, Any]:
        path = None if row.path is None else plain(row.path)
        return {ROW: row.index, "id": plain(row.id), "path": path}

    def batch(self, records: list[dict[str, Any]]) -> pa.RecordBatch:
        return pa.RecordBatch.from_pylist(records, schema=self.schema)


class Questions(Pictures):
    """Every question about every picture, which is encoded once for all of them."""

    def __init__(self, vlm: VLM, questions: Sequence[str], options: AnswerOptions) -> None:
        self.options = read_options(options, vlm.eos_token_ids)
        super().__init__(vlm, self.options.tiling)
        if vlm.config.embedding_dim is not None:
            raise BulkError(
                f"{vlm.folder} ends in an embedding head and answers no questions; it can give "
                "embeddings (embed, --embed retrieval)"
            )
        Form(self.answering, self.options)  # a schema that cannot be compiled is refused here
        self.questions, self.records = list(questions), len(questions)
        self.choosing = isinstance(self.options.structure, Choices)
        if self.choosing:
            self.answering.prefix = PrefixCache()
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
        plan = self.processor.plan(row.picture, **self.tiling)
        grid = plan.rows, plan.cols
        if grid not in self._tokens:
            counts = [self.processor.count_tokens([plan], text) for text in self.questions]
            self._tokens[grid] = max(counts)
        return self._tokens[grid]

    def prepare(self, row: Row) -> list[Prompt]:
        return [self.processor.prepare((row.picture, q), **self.tiling) for q in self.questions]

    def work(self, loaded: Loaded) -> pa.RecordBatch:
        records = []
        if loaded.encoding is not None:
            seen = [prompt.pictures for prompt in loaded.encoding.finish()]
            prompts = [
                [replace(prompt, pictures=pictures) for prompt in some]
                for some, pictures in zip(loaded.prompts, seen, strict=True)
            ]
            for row, answers in zip(loaded.rows, self._answers(prompts), strict=True):
                for question, answer in zip(self.questions, answers, strict=True):
                    records.append(self._record(row, question, answer))
        for row, error in loaded.errors:
            records += [self._record(row, question, error) for question in self.questions]
        return self.batch(records)

    def _answers(self, prompts: list[list[Prompt]]) -> list[list[Answer | str]]:
        """Answers (or errors) per picture and question."""
        if self.choosing:
            # Choices are read side by side, one prompt at a time: the caches of its beginning and
            # of the last prompt are one.
            return [[self._ask([prompt])[0] for prompt in some] for some in prompts]
        questions = [list(column) for column in zip(*prompts, strict=True)]
        prefix = self._beginning(questions)
        columns = [self._ask(question, prefix) for question in questions]
        return [list(answers) for answers in zip(*columns, strict=True)]

    def _beginning(self, questions: list[list[Prompt]]) -> KVCache | None:
        if len(questions) == 1:
            return None
        return read_beginning(self.model, self.processor, questions)

    def _ask(self, prompts: list[Prompt], prefix: KVCache | None = None) -> list[Answer | str]:
        try:
            stream = AnswerStream(self.answering, prompts, self.options, prefix)
        except SmolstackError as error:
            # One of them has no room for an answer, say; the others have.
            if len(prompts) == 1:
                return [str(error)]
            return [answer for prompt in prompts for answer in self._ask([prompt])]
        for _ in stream:
            pass
        return list(stream.answers)

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
    return f"the picture cannot be read ({type(error).__name__}: {error})"
