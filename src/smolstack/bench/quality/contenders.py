"""The contenders: smolstack's precisions, further folders, llama.cpp's types."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

from smolstack.bench.peers.transformers import Transformers
from smolstack.bench.quality import llama_cpp, transformers
from smolstack.bench.quality.ours import Ours
from smolstack.bench.quality.passages import TEST_TEXT, WINDOW, read_text
from smolstack.bench.quality.towers import TowerPeer, tower_peers
from smolstack.errors import ConfigError
from smolstack.processor.prompt import user_message
from smolstack.vlm import VLM

TextContender: TypeAlias = "Ours | llama_cpp.Peer | transformers.Peer"
ImagePeer: TypeAlias = "TowerPeer | transformers.Peer"
REFERENCE = "float32"


def reference_of(model: Path) -> Ours:
    """Return the model in float32.

    Raises:
        ConfigError: its weights are quantized, or it has no logits.
    """
    reference = Ours(REFERENCE, model, REFERENCE)
    if reference.vlm.config.embedding_dim is not None:
        raise ConfigError(f"{model} is a retrieval model, which has no logits")
    return reference


def our_contenders(reference: Ours, dtypes: Sequence[str], also: Sequence[Path]) -> list[Ours]:
    """Return smolstack's contenders: float32 first, the other precisions, then the folders by
    name.

    Raises:
        ConfigError: two have the same name, or a folder tokenizes differently from the model.
    """
    model = reference.folder
    found = [Ours(dtype, model, dtype) for dtype in dict.fromkeys((REFERENCE, *dtypes))]
    for folder in also:
        taken = [*(one.precision for one in found), *llama_cpp.TYPES]
        if folder.name in taken:
            raise ConfigError(
                f"--also {folder} would be shown as {folder.name!r}, expected another name than "
                f"one of {taken}"
            )
        other = Ours(folder.name, folder)
        _check(reference, other)
        found.append(other)
    return found


def peers(reference: Ours, root: Path, room: int) -> list[TextContender]:
    """transformers' and llama.cpp's, where they are installed.

    Args:
        root: folder of their files.
        room: maximum number of tokens read beyond a window.
    """
    found: list[TextContender] = _transformers(reference.folder)
    if llama_cpp.missing():
        return found
    context = min(reference.vlm.config.text.max_positions, WINDOW + room)
    threads = torch.get_num_threads()
    return found + [
        llama_cpp.Peer(kind, reference.folder, root, threads, context) for kind in llama_cpp.TYPES
    ]


def image_peers(reference: Ours, folder: Path, root: Path) -> list[ImagePeer]:
    """transformers', and the runtimes that compute the vision tower alone.

    Args:
        reference: the model in float32.
        folder: its checkpoint.
        root: keeps the towers' graphs.
    """
    return [*_transformers(folder), *tower_peers(reference, folder, root)]


def _transformers(folder: Path) -> list[Any]:
    """transformers is imported only where it is installed."""
    if Transformers.missing():
        return []
    return [transformers.Peer(folder)]


def _check(reference: Ours, other: Ours) -> None:
    """Raise an error if a folder's distributions are over different tokens."""
    ours, theirs = reference.vlm, other.vlm
    size, expected = theirs.config.text.vocab_size, ours.config.text.vocab_size
    if size != expected:
        raise ConfigError(
            f"{other.folder} has a vocabulary of {size} tokens, expected {reference.folder}'s "
            f"of {expected}"
        )
    if _tokens(theirs) != _tokens(ours):
        raise ConfigError(f"{other.folder} tokenizes a text differently from {reference.folder}")
    other.close()


def _tokens(vlm: VLM) -> list[int]:
    """Return a prompt as tokens: the chat template with the test text."""
    rendered = vlm.processor.render([user_message(0, read_text(TEST_TEXT))])
    return vlm.processor.tokenizer.encode(rendered)
