"""The checks of ``smolstack verify``: each goes on after a difference and lists them all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from smolstack.checkpoint.files import SIDE_FILES, CheckpointFiles, read_files, read_json
from smolstack.checkpoint.verify import settle_head
from smolstack.cli.checks_of_tokens import check_prompt, check_tokenizer
from smolstack.cli.checks_of_weights import (
    check_names,
    check_tie,
    check_values,
    read_weight_files,
)
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


@dataclass
class Check:
    """One thing that was looked at.

    Attributes:
        name: what was looked at.
        found: what it was found to be, in one line.
        problems: every difference, one sentence each.
        remarks: what is unusual and not wrong.
        skipped: whether an earlier difference made it impossible.
    """

    name: str
    found: str = ""
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    skipped: bool = False

    @property
    def state(self) -> str:
        if self.skipped:
            return "skipped"
        return "wrong" if self.problems else "ok"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "state": self.state}

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Note an error as a difference instead of ending at it."""
        try:
            yield
        except (SmolstackError, OSError) as error:
            self.problems.append(str(error))


def check_checkpoint(folder: Path, *, values: bool = False) -> list[Check]:
    """Every check of a checkpoint folder.

    Args:
        folder: a Hugging Face checkpoint folder.
        values: also read all weights and look for NaN and infinity.

    Raises:
        CheckpointError: there is no folder to look at.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder, expected a checkpoint")
    checks = {name: Check(name) for name in (*NAMES, *(["values"] if values else []))}
    files = _check_files(checks["files"], folder)
    raw = files.config if files is not None else _config_alone(folder)
    config = _check_config(checks["config"], raw)
    settings = _check_preprocessing(checks["preprocessing"], files, config)
    entries = read_weight_files(checks["weight files"], folder, raw)
    if config is None or not entries:
        _skip(checks["names and shapes"], checks["tied head"])
    else:
        check_tie(checks["tied head"], config, entries, folder)
        config = settle_head(config, entries)
        check_names(checks["names and shapes"], config, entries)
    if files is None or config is None:
        _skip(checks["tokenizer"], checks["prompt"])
    else:
        tokenizer = check_tokenizer(checks["tokenizer"], files, config)
        if tokenizer is None or settings is None:
            _skip(checks["prompt"])
        else:
            check_prompt(checks["prompt"], files, config, settings, tokenizer)
    if values:
        if entries:
            check_values(checks["values"], folder, entries)
        else:
            _skip(checks["values"])
    return list(checks.values())


def _skip(*checks: Check) -> None:
    for check in checks:
        check.skipped, check.found = True, "impossible after the differences above"


def _check_files(check: Check, folder: Path) -> CheckpointFiles | None:
    """Each file there is can be read, and none is missing."""
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
    """config.json when something else is wrong with the folder; empty when it is that."""
    try:
        return read_json(folder / "config.json")
    except (SmolstackError, OSError):
        return {}


def _check_config(check: Check, raw: Mapping[str, Any]) -> ModelConfig | None:
    """Each part of config.json, then all of them together."""
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
        with check.collecting():  # the rest, whatever its rotary positions are
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
    """How pictures are prepared, against the vision tower and the connector."""
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
                f"{edge}; pictures are resized twice"
            )
    if settings is not None and config is not None:
        _check_grid(check, files, settings, config)
    return settings


def _check_grid(
    check: Check, files: CheckpointFiles, settings: ImageSettings, config: ModelConfig
) -> None:
    """Tiles as they are cut, against the tower's patches and the connector's scale."""
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
