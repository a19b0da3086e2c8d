"""The checks of ``smolstack verify``; a difference does not end the other checks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from smolstack.checkpoint.compressed import open_compressed
from smolstack.checkpoint.entries import Read, Stored
from smolstack.checkpoint.files import SIDE_FILES, CheckpointFiles, read_files, read_json
from smolstack.checkpoint.hub import ModelPath
from smolstack.checkpoint.source import BARE, kind_of_files, open_folder, open_source
from smolstack.checkpoint.unsupported import refuse_other_kinds
from smolstack.checkpoint.verification.check import Check
from smolstack.checkpoint.verification.tokens import check_prompt, check_tokenizer
from smolstack.checkpoint.verification.weights import (
    check_names,
    check_tie,
    check_values,
    describe,
    read_weight_files,
)
from smolstack.checkpoint.verify import settle_head
from smolstack.checkpoint.weights import read_tensors
from smolstack.config import ModelConfig, RopeConfig, TextConfig, VisionConfig
from smolstack.errors import CheckpointError, SmolstackError
from smolstack.processor.settings import ImageSettings

NAMES = (
    "files",
    "config",
    "preprocessing",
    "weight files",
    "names and shapes",
    "tied head",
    "tokenizer",
    "prompt",
)


def check_checkpoint(where: Path | ModelPath, *, values: bool = False) -> list[Check]:
    """Run all checks on a checkpoint.

    Args:
        where: a Hugging Face checkpoint folder, or anything else that can be loaded.
        values: also read all weights and look for NaN and infinity.

    Raises:
        CheckpointError: there are no files to check.
    """
    where = ModelPath(where) if isinstance(where, Path) else where
    if not where.path.exists():
        raise CheckpointError(f"{where} is not a folder, expected a checkpoint")
    checks = {name: Check(name) for name in (*NAMES, *(["values"] if values else []))}
    first = checks["files"]
    kind = _kind(first, where)
    if kind is None:
        _skip(*(check for check in checks.values() if check is not first))
        return list(checks.values())
    if kind == "folder":
        files = _check_files(first, where.path)
        raw = files.config if files is not None else _config_alone(where.path)
        weights = _folder_weights(checks["weight files"], where.path, raw)
    else:
        files, weights = _check_source(first, checks["weight files"], where)
        raw = {} if files is None else files.config
    if files is not None:
        first.remarks += files.notes
    config = _check_config(checks["config"], raw)
    settings = _check_preprocessing(checks["preprocessing"], files, config)
    config = _check_weights(checks, raw, config, weights)
    if files is None or config is None:
        _skip(checks["tokenizer"], checks["prompt"])
    else:
        tokenizer = check_tokenizer(checks["tokenizer"], files, config)
        if tokenizer is None or settings is None:
            _skip(checks["prompt"])
        else:
            check_prompt(checks["prompt"], files, config, settings, tokenizer)
    return list(checks.values())


def _kind(check: Check, where: ModelPath) -> str | None:
    """Return the checkpoint's format; None, with a difference, if it is not supported."""
    with check.collecting():
        if where.path.is_dir():
            refuse_other_kinds(where.path)
        return kind_of_files(where)
    return None


def _check_weights(
    checks: Mapping[str, Check],
    raw: Mapping[str, Any],
    config: ModelConfig | None,
    weights: Stored | None,
) -> ModelConfig | None:
    """Check names, shapes, the head and the values; return the config with the head as determined
    by the weights.
    """
    names = checks["names and shapes"]
    if config is not None and weights is not None:
        with names.collecting():
            weights = open_compressed(weights, raw, config)
            names.remarks += weights.losses
    if values := checks.get("values"):
        if weights is not None:
            check_values(values, weights)
        else:
            _skip(values)
    if config is None or weights is None:
        _skip(names, checks["tied head"])
        return config
    check_tie(checks["tied head"], config, weights)
    config = settle_head(config, weights.entries)
    if not names.problems:
        check_names(names, config, weights.entries)
    return config


def _folder_weights(check: Check, folder: Path, raw: Mapping[str, Any]) -> Stored | None:
    """Return the weights of a plain folder, recording differences of its files; None if there are
    none.
    """
    entries = read_weight_files(check, folder, raw)
    if not entries:
        return None
    if all(name.startswith(BARE) for name in entries):
        with check.collecting():
            bare = open_folder(folder)
            check.remarks += bare.notes
            return bare
        return None

    def read(names: Collection[str] | None) -> Iterator[tuple[str, Tensor]]:
        some = entries if names is None else {name: entries[name] for name in names}
        return read_tensors(folder, some)

    return Stored(folder, entries, read)


def _check_source(
    first: Check, check: Check, where: ModelPath
) -> tuple[CheckpointFiles | None, Stored | None]:
    """Check that anything but a plain folder opens, or record why it does not."""
    with first.collecting():
        source = open_source(where)
        first.found = ", ".join(sorted(source.files.side))
        read: Read = source.tensors
        changes = source.changes
        first.remarks += [note for note in source.notes if note not in source.files.notes]
        check.found = describe(source.entries, sum(source.sizes().values()))
        if changes is not None:
            check.found += f"; {len(changes)} of them changed by the adapter"
        return source.files, Stored(source.weights.folder, source.entries, read)
    _skip(check)
    return None, None


def _skip(*checks: Check) -> None:
    for check in checks:
        check.skipped, check.found = True, "impossible after the differences above"


def _check_files(check: Check, folder: Path) -> CheckpointFiles | None:
    """Check that all files are present and readable."""
    present = [name for name in ("config.json", *SIDE_FILES) if (folder / name).is_file()]
    for name in present:
        if name.endswith(".json") and name not in ("vocab.json", "added_tokens.json"):
            with check.collecting():
                read_json(folder / name)
    check.found = ", ".join(present)
    if check.problems:
        return None
    with check.collecting():
        return read_files(folder)
    return None


def _config_alone(folder: Path) -> Mapping[str, Any]:
    """Return config.json if another file caused the error; empty if config.json did."""
    try:
        return read_json(folder / "config.json")
    except (SmolstackError, OSError):
        return {}


def _check_config(check: Check, raw: Mapping[str, Any]) -> ModelConfig | None:
    """Check each part of config.json, then all of them together."""
    if not raw:
        _skip(check)
        return None
    vision, text = raw.get("vision_config"), raw.get("text_config")
    if isinstance(vision, Mapping):
        with check.collecting():
            VisionConfig.from_hf(vision)
    if isinstance(text, Mapping):
        with check.collecting():
            RopeConfig.from_hf(text)
        with check.collecting():  # the rest, independently of the RoPE settings
            rest = {k: v for k, v in text.items() if k not in ("rope_parameters", "rope_scaling")}
            TextConfig.from_hf({**rest, "rope_theta": 1.0})
    for key in ("scale_factor", "image_token_id"):
        if isinstance(raw.get(key), bool) or not isinstance(raw.get(key), int):
            check.problems.append(f"config.json {key} is {raw.get(key)!r}, expected an integer")
    if check.problems:
        return None
    with check.collecting():
        config = ModelConfig.from_hf(raw)
        check.found = (
            f"{config.model_type}: vision {config.vision.hidden_size}/{config.vision.num_layers}, "
            f"scale {config.scale}, text {config.text.hidden_size}/{config.text.num_layers}, "
            f"{config.tokens_per_tile} visual tokens per tile"
        )
        return config
    return None


def _check_preprocessing(
    check: Check, files: CheckpointFiles | None, config: ModelConfig | None
) -> ImageSettings | None:
    """Check the image preprocessing against the vision tower and the connector."""
    if files is None:
        _skip(check)
        return None
    settings: ImageSettings | None = None
    with check.collecting():
        settings = ImageSettings.from_hf(files.image)
    if settings is not None:
        edge = settings.tile_edge
        check.found = f"longer side to {settings.longest_edge}, tiles of {edge}x{edge}"
        if settings.std is not None and 0 in settings.std:
            check.problems.append(f"image_std is {list(settings.std)}, which divides by zero")
        if settings.longest_edge % edge:
            check.remarks.append(
                f"the longest edge, {settings.longest_edge}, is not a whole number of tiles of "
                f"{edge}; images are resized twice"
            )
    if settings is not None and config is not None:
        _check_grid(check, files, settings, config)
    return settings


def _check_grid(
    check: Check, files: CheckpointFiles, settings: ImageSettings, config: ModelConfig
) -> None:
    """Check the tile size against the tower's patches and the connector's scale."""
    vision, edge = config.vision, settings.tile_edge
    side = edge // vision.patch_size
    if not 0 < side <= vision.side:
        check.problems.append(
            f"tiles are cut {edge} pixels wide, the vision tower sees {vision.patch_size} to "
            f"{vision.image_size}"
        )
    elif side % config.scale:
        check.problems.append(
            f"tiles of {edge}x{edge} are a grid of {side}x{side} patches, which scale_factor "
            f"{config.scale} does not divide"
        )
    elif edge != vision.image_size:
        check.remarks.append(
            f"tiles are cut {edge} pixels wide, the vision tower was made for {vision.image_size}"
        )
    made, promised = (side // config.scale) ** 2, files.processor.get("image_seq_len")
    if promised not in (None, made):
        check.problems.append(
            f"processor_config.json has image_seq_len {promised}, config.json makes {made} visual "
            "tokens of a tile"
        )
