"""Training data: folders, JSONL files and saved datasets, as examples that are read on demand."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolstack.errors import DataError
from smolstack.processor import formats, pages
from smolstack.processor.folders import SkippedFiles, search
from smolstack.unique_keys import RepeatedKeyError, read_unique

SUFFIXES = frozenset([*formats.SUFFIXES, *pages.SUFFIXES])  # of images and PDF files, as for ask
_log = logging.getLogger("smolstack")
# Advice for an empty answer, which would train the model to answer nothing.
EMPTY_ANSWER_ADVICE = 'remove the example, or give it an answer, such as "none"'
METADATA = "metadata.jsonl"
FILE_KEYS, ANSWER_KEYS = ("file_name", "image", "picture"), ("text", "answer", "caption")


@dataclass(frozen=True)
class Example:
    """A chat for training.

    Attributes:
        name: its name in messages: its file, or its file and line.
        messages: the chat; its image parts hold their images.
    """

    name: str
    messages: tuple[Mapping[str, Any], ...]


class Source(ABC):
    """Examples by index; only names or line offsets are held in memory."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Example: ...


def open_source(
    path: str | Path, question: str, rows: Sequence[Mapping[str, Any]] | None = None
) -> Source:
    """Open the examples at ``path``: a folder, a .jsonl file, or a dataset saved by ``datasets``.

    Args:
        question: the question about images that have only an answer.
        rows: the examples themselves, e.g. a ``datasets.Dataset``; ``path`` is then their name.

    Raises:
        DataError: the path does not exist, or cannot be read as examples.
    """
    if rows is not None:
        return Rows(str(path), rows, question)
    path = Path(path)
    if path.is_file():
        if path.suffix not in (".jsonl", ".ndjson"):
            raise DataError(f"{path} has the suffix {path.suffix!r}, expected .jsonl")
        return JsonLines(path, question)
    if not path.is_dir():
        raise DataError(f"{path} does not exist, expected a folder, a .jsonl file or a dataset")
    if (path / METADATA).is_file():
        return JsonLines(path / METADATA, question)
    if (path / "dataset_info.json").is_file() or (path / "state.json").is_file():
        return SavedDataset(path, question)
    if (path / "dataset_dict.json").is_file():
        inside = sorted(p.name for p in path.iterdir() if p.is_dir())
        raise DataError(f"{path} contains several datasets; give the path of one of them: {inside}")
    return ImageFolder(path, question)


class ImageFolder(Source):
    """Images, each with a .txt file of the same name that holds its answer."""

    def __init__(self, folder: Path, question: str) -> None:
        self.folder, self.question = folder, question
        over = SkippedFiles()
        self.files = [Path(path) for path in search(folder, SUFFIXES, over, beside=(".txt",))]
        if not self.files:
            found = f"; {over.sentence(folder)}" if over else ""
            raise DataError(f"{folder} contains no images ({', '.join(sorted(SUFFIXES))}){found}")
        if over:
            _log.warning("%s", over.sentence(folder))
        bare = [path for path in self.files if not path.with_suffix(".txt").is_file()]
        if bare:
            raise DataError(
                f"{len(bare)} of {len(self.files)} images have no .txt file of the same name, "
                f"the first is {bare[0]}"
            )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        path = self.files[index]
        file = path.with_suffix(".txt")
        try:
            answer = file.read_text(encoding="utf-8").strip()
        except UnicodeDecodeError as error:
            raise DataError(f"{file} cannot be read as text: {error}") from None
        name = str(path.relative_to(self.folder))
        return Example(name, question_and_answer(name, [path], self.question, answer))


class JsonLines(Source):
    """A JSONL file: chats under "messages", or images under "file_name" with their answers."""

    def __init__(self, path: Path, question: str) -> None:
        self.path, self.question = path, question
        self.starts = array("Q")
        self.lines = array("Q")  # their numbers: blank lines are no examples
        place = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    self.starts.append(place)
                    self.lines.append(number)
                place += len(line)
        if not self.starts:
            raise DataError(f"{path} contains no lines")

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Example:
        name, row = self.row(index)
        return Example(name, read_row(name, row, self.question, self.path.parent))

    def row(self, index: int) -> tuple[str, Any]:
        """Return the name and the value of a line."""
        name = f"{self.path.name}, example {index + 1}"
        with self.path.open("rb") as file:
            file.seek(self.starts[index])
            line = file.readline()
        try:
            row = read_unique(line.rstrip())
        except json.JSONDecodeError as error:
            where = f"line {self.lines[index]}, column {error.colno}"
            raise DataError(f"{name} is not valid JSON: {error.msg}: {where}") from error
        except RepeatedKeyError as error:
            raise DataError(f"{name}: {error}: line {self.lines[index]}") from None
        except (UnicodeDecodeError, RecursionError) as error:
            raise DataError(
                f"{name} is not valid JSON: {error}: line {self.lines[index]}"
            ) from error
        return name, row


class Rows(Source):
    """Rows by index: a list of dictionaries, or a ``datasets.Dataset``, read one at a time.

    Relative image paths start at the working directory.
    """

    def __init__(self, name: str, rows: Sequence[Mapping[str, Any]], question: str) -> None:
        if isinstance(rows, Mapping):
            raise DataError(f"{name} contains several datasets; pass one of {list(rows)}")
        if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
            raise DataError(
                f"{name} is a {type(rows).__name__}, expected rows with a length and integer "
                "indices (a list, a datasets.Dataset); save a streaming dataset to disk first"
            )
        if len(rows) == 0:
            raise DataError(f"{name} contains no rows")
        self.name, self.rows, self.question = name, rows, question

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        name = f"{self.name}, row {index}"
        return Example(name, read_row(name, self.rows[index], self.question, Path()))


class SavedDataset(Rows):
    """A dataset saved by ``datasets``, memory-mapped; requires the package datasets."""

    def __init__(self, folder: Path, question: str) -> None:
        try:
            import datasets
        except ImportError:
            raise DataError(
                f"{folder} is a saved dataset; reading it needs the package datasets "
                "(pip install 'smolstack[train]')"
            ) from None
        try:
            rows = datasets.load_from_disk(str(folder))
        except Exception as error:  # it raises many error types
            raise DataError(f"{folder} cannot be read as a dataset: {error}") from error
        super().__init__(folder.name, rows, question)


def read_row(name: str, row: Any, question: str, folder: Path) -> tuple[Mapping[str, Any], ...]:
    """Return the chat of a row: its "messages" (with "images" in them or next to them), or an
    image with question and answer.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{name} is {row!r:.60}, expected an object")
    images = [_image(name, image, folder) for image in _images_of(row)]
    messages = row.get("messages")
    if messages is not None:
        return _chat(name, messages, images, folder)
    answer = next((row[key] for key in ANSWER_KEYS if isinstance(row.get(key), str)), None)
    if isinstance(row.get("conversations"), Sequence):
        raise DataError(
            f"{name} has conversations (the LLaVA format), expected messages: role (user, "
            "assistant) and content instead of from and value, and an image part "
            '{"type": "image"} instead of each <image>'
        )
    empty = next((key for key in ANSWER_KEYS if answer is None and key in row), None)
    if images and empty is not None:
        raise DataError(
            f"{name} has {empty} {row[empty]!r:.60}, expected text; {EMPTY_ANSWER_ADVICE}"
        )
    if not images or answer is None:
        raise DataError(
            f"{name} has the keys {sorted(row)}, expected messages, or an image under one of "
            f"{list(FILE_KEYS)} and its answer under one of {list(ANSWER_KEYS)}"
        )
    asked = row.get("question") or question
    return question_and_answer(name, images, asked, answer)


def question_of(name: str, row: Any, question: str, folder: Path) -> tuple[Mapping[str, Any], ...]:
    """Like :func:`read_row`, but for a row with images and no answer the chat ends with the
    question.
    """
    answered = isinstance(row, Mapping) and any(isinstance(row.get(k), str) for k in ANSWER_KEYS)
    if answered or not isinstance(row, Mapping) or row.get("messages") is not None:
        return read_row(name, row, question, folder)
    images = [_image(name, image, folder) for image in _images_of(row)]
    if not images:
        return read_row(name, row, question, folder)  # raises an error about what is missing
    asked = row.get("question") or question
    return question_and_answer(name, images, asked, "-")[:1]


def question_and_answer(
    name: str, images: Sequence[Any], question: str, answer: str
) -> tuple[Mapping[str, Any], ...]:
    """Return the chat of a question about images and its answer."""
    if not answer.strip():
        raise DataError(f"{name} has an empty answer; {EMPTY_ANSWER_ADVICE}")
    asked: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    asked.append({"type": "text", "text": question})
    return (
        {"role": "user", "content": asked},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    )


def _images_of(row: Mapping[str, Any]) -> list[Any]:
    images = row.get("images")
    if images is None:
        images = next((row[key] for key in FILE_KEYS if row.get(key) is not None), [])
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _chat(
    name: str, messages: Any, images: Sequence[Any], folder: Path
) -> tuple[Mapping[str, Any], ...]:
    """Return messages with their images inserted into the image parts, in order."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise DataError(f"{name} has messages {messages!r:.60}, expected a list")
    rest = iter(images)
    chat = []
    for place, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, str) or content is None:
            chat.append(message)
            continue
        if not isinstance(content, (list, tuple)):
            raise DataError(
                f"{name} has content {content!r:.60} in message {place}, expected text or a list "
                "of parts"
            )
        parts = []
        for part in content:
            if not isinstance(part, Mapping):
                raise DataError(
                    f"{name} has a part {part!r:.60} in message {place}, expected an object such "
                    'as {"type": "text", "text": …}'
                )
            # In a datasets table every part has every key, with null for missing ones.
            filled = {key: value for key, value in part.items() if value is not None}
            if filled.get("type") == "image":
                own = next(
                    (filled[k] for k in ("image", "path", "url", "bytes") if k in filled), None
                )
                own = next(rest, None) if own is None else _image(name, own, folder)
                if own is None:
                    raise DataError(f"{name} has more image parts than the {len(images)} images")
                filled = {"type": "image", "image": own}
            parts.append(filled)
        chat.append({**message, "content": parts})
    if (left := sum(1 for _ in rest)) and left != len(images):
        raise DataError(f"{name} has {len(images)} images, {left} of them without an image part")
    if left:  # TRL's plain format: images next to a chat of strings belong to its first question
        chat = _with_images_first(name, chat, images)
    return tuple(chat)


def _with_images_first(name: str, chat: list[Any], images: Sequence[Any]) -> list[Any]:
    for place, message in enumerate(chat):
        if isinstance(message, Mapping) and message.get("role") == "user":
            content = message.get("content")
            if isinstance(content, str):
                parts = [{"type": "image", "image": image} for image in images]
                asked = {**message, "content": [*parts, {"type": "text", "text": content}]}
                return [*chat[:place], asked, *chat[place + 1 :]]
            break
    raise DataError(f"{name} has {len(images)} images and no image part for them")


def _image(name: str, value: Any, folder: Path) -> Any:
    """Return a path relative to the folder as absolute; bytes and PIL images unchanged."""
    if isinstance(value, Mapping):  # datasets' undecoded format
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        if value.startswith(("http://", "https://")):
            raise DataError(f"{name} names {value}; images are read from files, not downloaded")
        return folder / value.removeprefix("file://")
    if value is None:
        raise DataError(f"{name} has an empty image")
    return value
