"""Describes a checkpoint from file headers and JSON, without reading its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from smolstack.checkpoint import keys
from smolstack.checkpoint.hub import ModelPath
from smolstack.checkpoint.processor_files import build_processor, end_tokens
from smolstack.checkpoint.source import open_source
from smolstack.checkpoint.verify import settle_head
from smolstack.checkpoint.weights import FLOAT_TYPES, Entry
from smolstack.config import ModelConfig
from smolstack.errors import CheckpointError
from smolstack.processor.processor import Processor
from smolstack.processor.settings import ImageSettings

PARTS = ("vision tower", "connector", "token embedding", "decoder layers", "decoder norm", "head")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Bytes per weight in large matrices; int4 covers the decoder and its head, with a 2-byte scale per
# 32 weights. The rest is float32; keys and values are float16 (model/precision.py).
_QUANTIZED = {"int8": (1.0, 1.0), "int4": (1.0, 0.5625)}
_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_PREFIXES = (
    ("vision.", "vision tower"),
    ("connector.", "connector"),
    ("decoder.embedding", "token embedding"),
    ("decoder.layers", "decoder layers"),
    ("decoder.norm", "decoder norm"),
    ("head.", "head"),
)


@dataclass(frozen=True)
class ConnectorShape:
    """Shapes of the connector: the patch ``grid`` of a tile becomes the ``visual_grid``."""

    grid: tuple[int, int]
    scale: int
    visual_grid: tuple[int, int]
    in_features: int
    out_features: int
    tokens_per_tile: int


@dataclass(frozen=True)
class Inspection:
    """Properties of a checkpoint.

    Attributes:
        folder: the checkpoint's folder.
        config: sizes of both towers and the connector; the head as determined by the weights.
        settings: image preprocessing.
        parameters: by part (see PARTS), each weight counted once.
        stored: parameters by stored number format.
        weight_files: bytes on disk by file.
        connector: its shapes.
        special_tokens: text → id of the special tokens that prompts and answers use.
        end_tokens: id → text of the tokens that end an answer.
        vocabulary: number of tokens of the tokenizer.
        kind: format of the weight files: "safetensors", "MLX" or "GGUF".
        base: for an adapter, the base checkpoint's folder and the number of changed weights.
        notes: derived values and unusual findings, one sentence each.
        integers: bytes in memory if the weights are stored as integers, else 0.
    """

    folder: Path
    config: ModelConfig
    settings: ImageSettings
    parameters: Mapping[str, int]
    stored: Mapping[str, int]
    weight_files: Mapping[str, int]
    connector: ConnectorShape
    special_tokens: Mapping[str, int]
    end_tokens: Mapping[int, str | None]
    vocabulary: int
    kind: str = "safetensors"
    base: tuple[Path, int] | None = None
    notes: tuple[str, ...] = ()
    integers: int = 0

    @property
    def total_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of the weight files."""
        return sum(self.weight_files.values())

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of the weights in memory, by number format; a single entry if they are stored as
        integers.
        """
        if self.config.quantization is not None:
            return {self.config.quantization.name: self.integers}
        found = {name: self.total_parameters * size for name, size in BYTES.items()}
        parts = self.parameters
        embedding = parts["token embedding"]
        head = parts["head"] or embedding  # a tied head becomes a separate matrix
        for name, (tower, decoder) in _QUANTIZED.items():
            whole = tower * (parts["vision tower"] + parts["connector"])
            found[name] = round(whole + decoder * (parts["decoder layers"] + head) + 4 * embedding)
        return found

    @property
    def cache_per_token(self) -> dict[str, int]:
        """Bytes of keys and values per token, by number format."""
        text = self.config.text
        numbers = 2 * text.num_layers * text.num_kv_heads * text.head_dim
        return {name: numbers * BYTES.get(name, 2) for name in self.memory}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "folder": str(self.folder),
            "config": asdict(self.config),
            "preprocessing": asdict(self.settings),
            "parameters": {**self.parameters, "total": self.total_parameters},
            "stored_as": dict(self.stored),
            "weight_files": dict(self.weight_files),
            "bytes_on_disk": self.bytes_on_disk,
            "bytes_in_memory": self.memory,
            "cache_bytes_per_token": self.cache_per_token,
            "connector": asdict(self.connector),
            "special_tokens": dict(self.special_tokens),
            "end_tokens": [{"id": i, "token": token} for i, token in self.end_tokens.items()],
            "vocabulary": self.vocabulary,
            "kind": self.kind,
            "base": None if self.base is None else str(self.base[0]),
            "changed_by_adapter": 0 if self.base is None else self.base[1],
            "notes": list(self.notes),
        }


def inspect_checkpoint(where: Path | ModelPath) -> Inspection:
    """Describe a checkpoint without loading its weights.

    Raises:
        ConfigError, CheckpointError: a file cannot be read, or contradicts another one.
    """
    source = open_source(where)
    files, entries, changes = source.files, source.entries, source.changes
    config = settle_head(ModelConfig.from_hf(files.config), entries)
    processor = build_processor(files, config)
    vision = config.vision
    side = processor.settings.tile_edge // vision.patch_size
    ends = end_tokens(files, config, processor)
    return Inspection(
        folder=source.where.path,
        config=config,
        settings=processor.settings,
        parameters=count_parts(entries),
        stored=_count_formats(entries),
        weight_files=source.sizes(),
        connector=ConnectorShape(
            grid=(side, side),
            scale=config.scale,
            visual_grid=(side // config.scale, side // config.scale),
            in_features=config.scale**2 * vision.hidden_size,
            out_features=config.text.hidden_size,
            tokens_per_tile=processor.tokens_per_tile,
        ),
        special_tokens=_special_tokens(processor),
        end_tokens={token_id: processor.tokenizer.token(token_id) for token_id in ends},
        vocabulary=processor.tokenizer.size,
        kind=source.kind,
        base=None if changes is None else (source.weights.folder, len(changes)),
        notes=source.notes,
        integers=0 if config.quantization is None else _bytes_in_memory(entries),
    )


def count_parts(entries: Mapping[str, Entry]) -> dict[str, int]:
    """Count parameters by part; weights that the family does not have count as "unknown"."""
    parts = dict.fromkeys(PARTS, 0)
    for name, entry in entries.items():
        part = part_name(name)
        parts[part] = parts.get(part, 0) + entry.weights
    return parts


def part_name(name: str) -> str:
    """Return the part (see PARTS) of a checkpoint's weight, or "unknown"."""
    try:
        ours = keys.from_hf(name)
    except CheckpointError:
        return "unknown"
    return next(part for prefix, part in _PREFIXES if ours.startswith(prefix))


def _count_formats(entries: Mapping[str, Entry]) -> dict[str, int]:
    formats: dict[str, int] = {}
    for entry in entries.values():
        if entry.weights:  # scales count as no weights
            stored = entry.stored or _STORED.get(entry.dtype, entry.dtype)
            formats[stored] = formats.get(stored, 0) + entry.weights
    return formats


def _bytes_in_memory(entries: Mapping[str, Entry]) -> int:
    """Return the bytes of a quantized model: integers and scales, the token embedding as stored,
    and float32 for everything else.
    """
    table = keys.to_hf("decoder.embedding.weight")
    return sum(
        entry.bytes
        if name == table or entry.dtype not in FLOAT_TYPES or not entry.weights
        else entry.elements * BYTES["float32"]
        for name, entry in entries.items()
    )


def _special_tokens(processor: Processor) -> dict[str, int]:
    """Return the special tokens that prompts and answers use, if they are in the vocabulary."""
    named = processor.tokenizer.special_tokens
    markers = processor.markers
    wanted = [
        markers.image,
        markers.around,
        markers.whole,
        "<row_1_col_1>",
        *(named[name] for name in ("bos_token", "eos_token", "pad_token") if name in named),
    ]
    ids = {token: processor.tokenizer.token_id(token) for token in wanted}
    return {token: found for token, found in ids.items() if found is not None}
