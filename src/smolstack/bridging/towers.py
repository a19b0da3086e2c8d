"""Opens the towers to be combined: of checkpoints of the family, or plain SigLIP and Llama."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from smolstack.checkpoint import keys
from smolstack.checkpoint.files import CheckpointFiles
from smolstack.checkpoint.hub import GGUF, find
from smolstack.checkpoint.llama import MODEL_TYPE, open_llama, open_llama_gguf
from smolstack.checkpoint.load import stored_dtype
from smolstack.checkpoint.siglip import MODEL_TYPES, open_siglip
from smolstack.checkpoint.source import Source, open_source
from smolstack.checkpoint.tower import ReadAll, TextSource, VisionSource
from smolstack.checkpoint.unsupported import peek
from smolstack.checkpoint.verify import compare, settle_head
from smolstack.config import ModelConfig
from smolstack.errors import CheckpointError, ConfigError
from smolstack.processor.settings import ImageSettings

_FAMILY = "a checkpoint of the Idefics3 / SmolVLM family"


@dataclass(frozen=True)
class _Family:
    """A checked checkpoint of the family whose weights are not yet read."""

    where: Path
    files: CheckpointFiles
    config: ModelConfig
    source: Source
    dtype: torch.dtype

    def part(self, wanted: Callable[[str], bool]) -> ReadAll:
        """Return a function that reads the weights with the given names."""
        names = [name for name in self.source.entries if wanted(keys.from_hf(name))]

        def read() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in self.source.tensors(names):
                yield keys.from_hf(name), tensor

        return read


def open_vision(model: str | Path | None) -> VisionSource:
    """Open the vision tower of a checkpoint of the family or of a plain SigLIP folder.

    Args:
        model: a folder or a hub id; None is the bundled reader.

    Raises:
        CheckpointError, ConfigError: naming what was found and what was expected.
    """
    where = find(model)
    expected = f"{_FAMILY}, or a SigLIP of a fixed resolution (SiglipVisionModel, SiglipModel)"
    if where.is_file():
        raise CheckpointError(f"{where} is a file, expected a folder: {expected}")
    kind = _model_type(where)
    if kind in MODEL_TYPES:
        return open_siglip(where)
    if kind.startswith("siglip2"):
        raise CheckpointError(
            f"{where} is a SigLIP 2 model of variable resolution (model_type {kind!r}), whose "
            f"patches and positions have a different layout; expected {expected}"
        )
    family = _open_family(where, expected)
    return VisionSource(
        where=where,
        config=family.config.vision,
        settings=ImageSettings.from_hf(family.files.image),
        scale=family.config.scale,
        weights=family.part(lambda name: name.startswith("vision.")),
        dtype=family.dtype,
    )


def open_text(model: str | Path | None) -> tuple[TextSource, ModelConfig | None]:
    """Open the text tower of a checkpoint of the family, a plain Llama folder or a GGUF file.

    Args:
        model: a folder, a GGUF file or a hub id; None is the bundled reader.

    Returns:
        The tower, and for a checkpoint of the family its whole config.

    Raises:
        CheckpointError, ConfigError: naming what was found and what was expected.
    """
    where = find(model)
    if where.is_file() and where.suffix.lower() == GGUF:
        return open_llama_gguf(where), None
    expected = f"{_FAMILY}, a LlamaForCausalLM folder or a GGUF file of a Llama"
    if _model_type(where) == MODEL_TYPE:
        return open_llama(where), None
    family = _open_family(where, expected)
    if family.config.embedding_dim is not None:
        raise ConfigError(
            f"{where} has an embedding head instead of a language head and cannot generate text"
        )
    text = TextSource(
        where=where,
        config=family.config.text,
        tied=family.config.tied,
        weights=family.part(lambda name: not name.startswith(("vision.", "connector."))),
        dtype=family.dtype,
        tokenizer_json=family.files.side["tokenizer.json"],
        tokenizer_config=family.files.tokenizer_config,
        chat_template=family.files.chat_template,
        generation=family.files.generation,
        family=family.files,
    )
    return text, family.config


def _model_type(where: Path) -> str:
    return str(peek(where / "config.json").get("model_type", ""))


def _open_family(where: Path, expected: str) -> _Family:
    config = peek(where / "config.json")
    if config and not {"vision_config", "text_config"} <= set(config):
        raise CheckpointError(
            f"{where} has model_type {config.get('model_type')!r}, expected {expected}"
        )
    source = open_source(where)
    settled = settle_head(ModelConfig.from_hf(source.files.config), source.entries)
    compare(settled, source.entries).raise_if_wrong(where)
    if settled.quantization is not None:
        raise ConfigError(
            f"{where} has {settled.quantization.name} weights, expected float weights: use the "
            "checkpoint that it was quantized from"
        )
    return _Family(where, source.files, settled, source, stored_dtype(source.entries))
