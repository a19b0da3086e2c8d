"""Test text, divided into windows that are read one at a time."""

from __future__ import annotations

import re
from pathlib import Path

from smolstack.batch import Batch
from smolstack.errors import DataError
from smolstack.processor.processor import Processor

WINDOW = 768  # maximum tokens per prompt
_TEXTS = Path(__file__).parent / "texts"
# English prose, dialogue, lists, tables, code, letters and chats, written for this purpose.
TEST_TEXT = _TEXTS / "english.txt"
_PIECE = re.compile(r"\s*\S{1,64}")


def read_text(path: Path) -> str:
    """Read a text file (UTF-8).

    Raises:
        DataError: it cannot be read, or contains no text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text: {error}") from None
    if not text.strip():
        raise DataError(f"{path} contains no text")
    return text


def windows(processor: Processor, text: str, length: int = WINDOW) -> list[Batch]:
    """Return a text as prompts of about equal length, each ``processor([part])``.

    Args:
        length: maximum tokens per prompt, including the chat template; less if the model's context
            is shorter.

    Raises:
        PromptError: the text contains the image placeholder.
        DataError: the length leaves no room for text.
    """
    length = min(length, processor.config.text.max_positions)
    room = length - processor.count_tokens([], "")
    pieces = _PIECE.findall(text.strip())
    sizes = [len(processor.tokenizer.encode(piece, special=False)) for piece in pieces]
    if room < max(sizes):
        raise DataError(f"a window of {length} tokens has no room for text")
    # Joined pieces may have fewer or more tokens than separate ones.
    for slack in (0.99, 0.95, 0.8, 0.5):
        parts = _cut(pieces, sizes, room * slack)
        if all(processor.count_tokens([], part) <= length for part in parts):
            return [processor([part]) for part in parts]
    raise DataError(f"the text cannot be split into windows of {length} tokens")


def _cut(pieces: list[str], sizes: list[int], most: float) -> list[str]:
    count = -int(-sum(sizes) // most)
    share = sum(sizes) / count
    parts, taken, own = [""], 0, 0
    for piece, size in zip(pieces, sizes, strict=True):
        full = taken + size > share * len(parts) or own + size > most
        if full and parts[-1]:
            parts.append("")
            own = 0
        parts[-1] += piece
        taken += size
        own += size
    return [part.strip("\n") for part in parts]
