"""Checks of the weight files: readable, with the expected names, shapes and ties, and finite."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smolstack.checkpoint import keys
from smolstack.checkpoint.entries import Stored
from smolstack.checkpoint.files import read_json
from smolstack.checkpoint.quantized_layer import PACKED, SCALE
from smolstack.checkpoint.verification.check import Check
from smolstack.checkpoint.verify import expected_weights, unlike
from smolstack.checkpoint.weights import (
    FLOAT_TYPES,
    INDEX,
    INTEGER_TYPES,
    SINGLE,
    Entry,
    open_weights,
)
from smolstack.config import ModelConfig
from smolstack.errors import CheckpointError
from smolstack.text import millions, plural, size_in_bytes

_STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def read_weight_files(check: Check, folder: Path, raw: Mapping[str, Any]) -> dict[str, Entry]:
    """Return the tensors of every readable file; empty if one cannot be opened."""
    promised = _promised(check, folder)
    entries: dict[str, Entry] = {}
    total = 0
    for name in sorted(set(promised.values())) if promised else [SINGLE]:
        if promised is None:
            break
        with check.collecting(), open_weights(folder / name) as file:
            total += (folder / name).stat().st_size
            for key in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                part = file.get_slice(key)
                if key in entries:
                    check.problems.append(f"{key} is in {entries[key].file} and in {name}")
                entries[key] = Entry(name, tuple(part.get_shape()), str(part.get_dtype()))
    if promised is None or check.problems:
        return {}
    for key in sorted(set(promised) - set(entries)):
        check.problems.append(f"{INDEX} promises {key} in {promised[key]}, which does not hold it")
    for key in sorted(set(entries) - set(promised)) if promised else ():
        check.problems.append(f"{entries[key].file} holds {key}, which {INDEX} does not name")
    _check_formats(check, entries, raw)
    check.found = describe(entries, total)
    return entries


def describe(entries: Mapping[str, Entry], size: int) -> str:
    """Describe weights in one line: files, bytes, number and formats."""
    elements = sum(entry.weights for entry in entries.values())
    formats = sorted({entry.stored or entry.dtype for entry in entries.values()})
    files = plural(len({entry.file for entry in entries.values()}), "file")
    return (
        f"{files}, {size_in_bytes(size)}, {plural(len(entries), 'weight')}, "
        f"{millions(elements)} parameters in {', '.join(formats)}"
    )


def check_names(check: Check, config: ModelConfig, entries: Mapping[str, Entry]) -> None:
    """Check that all weights of the config are present with their shapes, and no others."""
    expected = expected_weights(config)
    for name, weight in sorted(expected.items()):
        shape = list(weight.shape)
        if name not in entries:
            check.problems.append(f"{name} is missing, expected {shape}")
        elif list(entries[name].shape) != shape:
            check.problems.append(f"{name} is {list(entries[name].shape)}, expected {shape}")
        elif difference := unlike(entries[name], weight):
            check.problems.append(f"{name} is stored as {difference}")
    unknown = set(keys.unknown_to_hf(entries))
    for name in sorted(set(entries) - set(expected)):
        why = "which no model of the family has" if name in unknown else "which the config excludes"
        check.problems.append(f"{name} {list(entries[name].shape)} is one too many, {why}")
    check.found = f"{plural(len(expected), 'weight')} expected, {len(entries)} found"


def check_tie(check: Check, config: ModelConfig, weights: Stored) -> None:
    """Check config.json's tie flag against the weights, which decide when loading."""
    entries = weights.entries
    head, embedding = f"{keys.LM_HEAD}.weight", keys.to_hf("decoder.embedding.weight")
    if {f"{keys.EMBEDDING_HEAD}.weight", f"{keys.EMBEDDING_HEAD}.{PACKED}"} & set(entries):
        check.found = "an embedding head; there is nothing to tie"
        return
    stored = head in entries or f"{keys.LM_HEAD}.{PACKED}" in entries
    check.found = f"{head} is {'stored' if stored else 'the token embedding'}"
    if not stored and not config.tied:
        check.problems.append(
            f"config.json says tie_word_embeddings false, but there is no {head}; smolstack uses "
            "the token embedding, other readers may start it at random"
        )
    if stored and config.tied:
        same = {head, embedding} <= set(entries) and _equal(weights, head, embedding)
        check.remarks.append(
            f"config.json says tie_word_embeddings true, and {head} is stored all the same, "
            + ("equal to the token embedding" if same else "with other values, which are used")
        )


def check_values(check: Check, weights: Stored) -> None:
    """Check that no weight is NaN or infinite, and that integers match config.json."""
    read = 0
    with check.collecting():
        for name, tensor in weights.read(None):
            read += tensor.numel()
            finite = tensor.isfinite()
            if not bool(finite.all()):
                nan, all_bad = int(tensor.isnan().sum()), int((~finite).sum())
                check.problems.append(f"{name} holds {nan:,} NaN and {all_bad - nan:,} infinities")
            elif tensor.numel() > 1 and not bool(tensor.any()):
                check.remarks.append(f"{name} is zero throughout")
    check.found = f"{millions(read)} values read"


def _promised(check: Check, folder: Path) -> dict[str, str] | None:
    """Return weight → file from the index; empty for a single file, None if there is none."""
    if (folder / SINGLE).is_file():
        return {}
    with check.collecting():
        if not (folder / INDEX).is_file():
            raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}")
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{folder / INDEX} has no weight_map object")
        for name in sorted({str(name) for name in weight_map.values()}):
            if Path(name).name != name or not name.endswith(".safetensors"):
                check.problems.append(f"{INDEX} names {name!r}, expected a .safetensors file")
        return None if check.problems else weight_map
    return None


def _check_formats(check: Check, entries: Mapping[str, Entry], raw: Mapping[str, Any]) -> None:
    for name, entry in sorted(entries.items()):
        if entry.dtype not in (*FLOAT_TYPES, *INTEGER_TYPES):
            check.problems.append(
                f"{name} is stored as {entry.dtype}, expected one of {', '.join(FLOAT_TYPES)}"
            )
    formats: dict[str, int] = {}
    for name, entry in entries.items():
        if entry.dtype in FLOAT_TYPES and not name.endswith(f".{SCALE}"):
            formats[entry.dtype] = formats.get(entry.dtype, 0) + 1
    if len(formats) > 1:
        counted = ", ".join(f"{number} in {name}" for name, number in sorted(formats.items()))
        check.remarks.append(f"weights are stored in several formats: {counted}")
    said = raw.get("dtype") or raw.get("torch_dtype")
    if isinstance(said, str) and formats and _STORED.get(said, said) not in formats:
        check.remarks.append(f"config.json says {said}, the weights are {', '.join(formats)}")


def _equal(weights: Stored, one: str, other: str) -> bool:
    if weights.entries[one].shape != weights.entries[other].shape:
        return False
    tensors = dict(weights.read((one, other)))
    return bool((tensors[one] == tensors[other]).all())
