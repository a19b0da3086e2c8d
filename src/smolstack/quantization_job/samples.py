"""Calibration samples: images, chats or a text as prompts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from smolstack.bulk.inputs import walk
from smolstack.errors import DataError, SmolstackError
from smolstack.processor.inputs import as_messages
from smolstack.processor.processor import Processor, Prompt
from smolstack.train.data import METADATA, JsonLines, open_source, question_of

WINDOW = 512  # maximum tokens per piece of text
HELD_OUT = 4  # maximum number of held-out samples; an eighth of all, at least one
_CHARACTERS = 24  # characters of a text that are read per requested token
_SEED = 22


@dataclass(frozen=True)
class Sample:
    """One sequence for calibration or measurement.

    Attributes:
        name: its name in messages.
        prompt: its tokens and images.
        asks: whether it ends where an answer would begin.
    """

    name: str
    prompt: Prompt
    asks: bool = False

    @classmethod
    def of_tokens(cls, name: str, token_ids: Sequence[int]) -> Sample:
        """Return a sample that consists of text only."""
        return cls(name, Prompt("", tuple(token_ids), (), ()))

    def with_tokens(self, token_ids: Sequence[int]) -> Sample:
        """Return a sample with the same images and other tokens, such as an added answer."""
        return Sample(self.name, replace(self.prompt, token_ids=tuple(token_ids)))

    def digest(self) -> str:
        """Return a digest of the samples, computed without decoding images."""
        found = hashlib.sha256(repr(self.prompt.token_ids).encode())
        for image in self.prompt.images:
            if isinstance(image, (str, Path)) and Path(image).is_file():
                state = Path(image).stat()
                found.update(f"{image} {state.st_size} {state.st_mtime_ns}".encode())
        return found.hexdigest()


@dataclass(frozen=True)
class Samples:
    """Samples for calibration, and held-out samples for measurement."""

    fitted: tuple[Sample, ...]
    held_out: tuple[Sample, ...]

    @property
    def tokens(self) -> int:
        """Of the samples that are calibrated on."""
        return sum(len(sample.prompt.token_ids) for sample in self.fitted)


def read_samples(path: Path, processor: Processor, tokens: int, question: str) -> list[Sample]:
    """Read samples from a folder of images, a JSONL file of chats or images, or a text file.

    Args:
        tokens: number of tokens to read; from larger data, a reproducible random selection.
        question: the question about images that have none.

    Raises:
        DataError: there is no data, or it cannot be read; names the file and position.
    """
    if path.is_dir():
        if (path / METADATA).is_file():
            return _enough(_chats(path / METADATA, processor, question), tokens)
        if (path / "dataset_info.json").is_file() or (path / "state.json").is_file():
            return _enough(_examples(path, processor, question), tokens)
        return _enough(_images(path, processor, question), tokens)
    if not path.is_file():
        raise DataError(
            f"{path} does not exist, expected a folder of images, a .jsonl file of chats, or a text"
        )
    if path.suffix in (".jsonl", ".ndjson"):
        return _enough(_chats(path, processor, question), tokens)
    return text_samples(path.name, read_text(path, tokens * _CHARACTERS), processor, tokens)


def divide(samples: Sequence[Sample], source: object) -> Samples:
    """Set evenly spread samples apart for measurement.

    Raises:
        DataError: there are fewer than two.
    """
    if len(samples) < 2:
        raise DataError(
            f"{source} has {len(samples)} sample, expected at least 2: one for calibration and one "
            "for measurement"
        )
    count = min(HELD_OUT, max(1, len(samples) // 8))
    places = {(2 * i + 1) * len(samples) // (2 * count) for i in range(count)}
    return Samples(
        tuple(sample for i, sample in enumerate(samples) if i not in places),
        tuple(sample for i, sample in enumerate(samples) if i in places),
    )


def read_text(path: Path, characters: int) -> str:
    """Read the beginning of a text file (UTF-8)."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(characters)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text: {error}") from None
    if not text.strip():
        raise DataError(f"{path} contains no text")
    return text


def text_samples(name: str, text: str, processor: Processor, tokens: int) -> list[Sample]:
    """Split a text into samples of about equal length, of at most WINDOW tokens."""
    ids = list(processor.tokenizer.encode(text, special=False))
    if processor.config.image_token_id in ids:
        raise DataError(f"{name} contains {processor.markers.image}, the placeholder of images")
    first = processor.tokenizer.encode("", special=True)
    room = min(WINDOW, processor.config.text.max_positions) - len(first)
    count = max(2, math.ceil(len(ids) / room))
    length = math.ceil(len(ids) / count)
    pieces = [ids[start : start + length] for start in range(0, len(ids), length)]
    made = [
        Sample.of_tokens(f"{name}, piece {i + 1}", (*first, *piece))
        for i, piece in enumerate(pieces)
    ]
    wanted = max(2, math.ceil(tokens / length))
    if len(made) > wanted:  # evenly spread over the text
        made = [made[i * len(made) // wanted] for i in range(wanted)]
    return made


def chat_sample(name: str, messages: Sequence[Any], processor: Processor) -> Sample:
    """Return a chat as a sample; after a question, it ends where the answer would begin."""
    try:
        chat, images = as_messages(list(messages), processor.open_video)
        asked = bool(chat) and chat[-1]["role"] != "assistant"
        text = processor.render(chat, answer_next=asked)
        return Sample(name, processor.prepare_text(text, images), asked)
    except DataError:
        raise
    except SmolstackError as error:
        raise DataError(f"{name}: {error}") from error


def _enough(samples: Iterator[Sample], tokens: int) -> list[Sample]:
    found, held = [], 0
    for sample in samples:
        found.append(sample)
        held += len(sample.prompt.token_ids)
        if held >= tokens and len(found) > 1:
            break
    return found


def _order(count: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(_SEED)).tolist()


def _chats(path: Path, processor: Processor, question: str) -> Iterator[Sample]:
    lines = JsonLines(path, question)
    for place in _order(len(lines)):
        name, row = lines.row(place)
        yield chat_sample(name, question_of(name, row, question, path.parent), processor)


def _examples(path: Path, processor: Processor, question: str) -> Iterator[Sample]:
    source = open_source(path, question)
    for place in _order(len(source)):
        example = source[place]
        yield chat_sample(example.name, example.messages, processor)


def _images(folder: Path, processor: Processor, question: str) -> Iterator[Sample]:
    rows = list(walk(folder))
    if not rows:
        raise DataError(f"{folder} contains no images")
    for place in _order(len(rows)):
        row = rows[place]
        if row.error is not None:
            raise DataError(f"{row.id}: {row.error}")
        parts = [{"type": "image", "image": row.image}, {"type": "text", "text": question}]
        yield chat_sample(row.id, [{"role": "user", "content": parts}], processor)
