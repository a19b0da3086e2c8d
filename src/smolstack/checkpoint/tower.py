"""One tower of a model: the parts that ``bridge`` combines.

A vision tower comes from a checkpoint of the family or a plain SigLIP folder (siglip.py), a text
tower from a checkpoint of the family, a plain Llama folder or a GGUF file (llama.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from smolstack.checkpoint.entries import Stored
from smolstack.checkpoint.files import ADAPTER_CONFIG, CheckpointFiles
from smolstack.checkpoint.load import stored_dtype
from smolstack.checkpoint.verify import compare_weights
from smolstack.config import TextConfig, VisionConfig
from smolstack.errors import CheckpointError
from smolstack.processor.settings import ImageSettings

ReadAll: TypeAlias = "Callable[[], Iterator[tuple[str, Tensor]]]"


@dataclass(frozen=True)
class VisionSource:
    """An opened vision tower whose weights have not been read.

    Attributes:
        where: its folder.
        config: its sizes.
        settings: image preprocessing.
        scale: the scale of its connector, None for a tower without one.
        weights: (smolstack's name, tensor) pairs, memory-mapped.
        dtype: what most of its weights are stored in.
        notes: what is left out or was derived, one sentence each.
    """

    where: Path
    config: VisionConfig
    settings: ImageSettings
    scale: int | None
    weights: ReadAll
    dtype: torch.dtype
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TextSource:
    """An opened text tower whose weights have not been read: decoder, head and tokenizer.

    Attributes:
        where: its folder or file.
        config: the decoder's sizes.
        tied: whether the head is tied to the token embedding.
        weights: (smolstack's name, tensor) pairs, memory-mapped.
        dtype: what most of its weights are stored in.
        tokenizer_json: contents of tokenizer.json.
        tokenizer_config: tokenizer_config.json.
        chat_template: the Jinja source, or None.
        generation: generation_config.json.
        family: the files if it is a checkpoint of the family, None for a plain language model.
        notes: what is left out or was derived, one sentence each.
    """

    where: Path
    config: TextConfig
    tied: bool
    weights: ReadAll
    dtype: torch.dtype
    tokenizer_json: bytes
    tokenizer_config: Mapping[str, Any]
    chat_template: str | None
    generation: Mapping[str, Any]
    family: CheckpointFiles | None = None
    notes: tuple[str, ...] = ()


def matching(
    where: Path, expected: Mapping[str, Tensor], stored: Stored, theirs: Callable[[str], str]
) -> tuple[ReadAll, torch.dtype]:
    """Return a function that reads exactly the expected weights, and the dtype of most of them.

    Args:
        expected: smolstack's name → a tensor of the expected shape, without values.
        theirs: converts a smolstack name to the name in the files.

    Raises:
        CheckpointError: weights are missing, unexpected or have another shape.
    """
    names = {theirs(name): name for name in expected}
    wanted = {theirs(name): tensor for name, tensor in expected.items()}
    compare_weights(wanted, stored.entries).raise_if_wrong(where)

    def read() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in stored.read(None):
            yield names[name], tensor

    return read, stored_dtype(stored.entries)


def refuse_other_weights(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise an error if a plain model's folder is an adapter or holds quantized weights.

    Raises:
        CheckpointError: an adapter, or quantized weights.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{folder} is an adapter ({ADAPTER_CONFIG}), expected a whole model: merge it first "
            "(peft's merge_and_unload, then save_pretrained)"
        )
    if config.get("quantization") or config.get("quantization_config"):
        raise CheckpointError(
            f"{folder} has quantized weights, expected float weights (or GGUF, for a Llama)"
        )


def without(stored: Stored, ignored: Callable[[str], bool]) -> Stored:
    """Return stored weights without the ignored names."""
    kept = {name: entry for name, entry in stored.entries.items() if not ignored(name)}
    return replace(stored, entries=kept, read=lambda names: stored.read(names or list(kept)))
