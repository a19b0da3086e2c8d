"""Builds a checkpoint's processor and its settings from the small files, without weights or
torch.
"""

from __future__ import annotations

from dataclasses import replace

from smolstack.checkpoint import mlx
from smolstack.checkpoint.adapter import find_adapter
from smolstack.checkpoint.files import CheckpointFiles, read_files
from smolstack.checkpoint.hub import ModelPath
from smolstack.checkpoint.unsupported import is_mlx
from smolstack.config import ModelConfig, as_ids
from smolstack.errors import ConfigError
from smolstack.processor.processor import Processor
from smolstack.processor.settings import ImageSettings
from smolstack.processor.tokenizer import TextTokenizer
from smolstack.processor.video import VideoSettings


def files_alone(where: ModelPath) -> CheckpointFiles:
    """Return a checkpoint's settings and side files; its weights may be missing."""
    if not where.path.is_dir() or where.mmproj is not None:
        from smolstack.checkpoint.source import open_source  # imports torch, for GGUF tensors

        return open_source(where).files
    adapter = find_adapter(where.path, where.base)
    files = read_files(where.path, None if adapter is None else adapter.base)
    if is_mlx(files.config):
        files = replace(files, config=mlx.without_quantization(files.config))
    return files


def build_processor(files: CheckpointFiles, config: ModelConfig) -> Processor:
    """Return the processor of a folder, checked against the model's config."""
    return Processor(
        config,
        ImageSettings.from_hf(files.image),
        TextTokenizer(files.side["tokenizer.json"], files.tokenizer_config),
        files.chat_template,
        image_seq_len=files.processor.get("image_seq_len"),
        pointing=pointing_tokens(files, config),
        videos=VideoSettings.from_hf(files.video, files.image),
    )


def pointing_tokens(files: CheckpointFiles, config: ModelConfig) -> range:
    """Return the tokens that mark positions in an image and are not part of the answer's text.

    generation_config.json's ``pointing_token_ids`` gives the first and the last one. No published
    checkpoint has any; the bundled reader does.
    """
    found = files.generation.get("pointing_token_ids")
    if found is None:
        return range(0)
    whole = isinstance(found, list) and len(found) == 2 and all(type(id) is int for id in found)
    if not whole or not 0 <= found[0] <= found[1] < config.text.vocab_size:
        raise ConfigError(
            f"generation_config.json has pointing_token_ids {found!r:.80}, expected the first and "
            f"the last one, below vocab_size {config.text.vocab_size}"
        )
    return range(found[0], found[1] + 1)


def end_tokens(
    files: CheckpointFiles, config: ModelConfig, processor: Processor
) -> tuple[int, ...]:
    """Return the tokens that end an answer: generation_config.json's, else the config's, else the
    tokenizer's.
    """
    for place in (files.generation.get("eos_token_id"), files.config.get("eos_token_id")):
        if ids := as_ids(place):
            return ids
    if config.text.eos_token_ids:
        return config.text.eos_token_ids
    eos = processor.tokenizer.special_tokens.get("eos_token")
    found = None if eos is None else processor.tokenizer.token_id(eos)
    return () if found is None else (found,)
