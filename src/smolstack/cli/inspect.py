"""``smolstack inspect``: describes a checkpoint from its files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smolstack.cli import model_options, options
from smolstack.cli.console import count, note, pairs, progress, show, show_json
from smolstack.text import millions, size_in_bytes

if TYPE_CHECKING:
    from smolstack.checkpoint.inspect import Inspection
    from smolstack.config import TextConfig

EXAMPLES = """
**Examples**

`smolstack inspect ./my-checkpoint`

`smolstack inspect HuggingFaceTB/SmolVLM-256M-Instruct --json`
"""


def inspect(
    model: options.OptionalModelArgument = None,
    *,
    revision: options.RevisionOption = None,
    base: model_options.BaseOption = None,
    mmproj: model_options.MmprojOption = None,
    json: options.JsonOption = False,
) -> None:
    """Show a checkpoint's sizes, shapes, memory and tokens. Loads no weights."""
    with progress(f"Inspecting {model or 'the bundled reader'} …"):
        from smolstack.checkpoint.hub import locate
        from smolstack.checkpoint.inspect import inspect_checkpoint

        found = inspect_checkpoint(locate(model, revision, base=base, mmproj=mmproj))
    if json:
        show_json(found.to_dict())
        return
    sections = (
        ("Checkpoint", _checkpoint(found)),
        ("Parameters", _parameters(found)),
        ("Vision tower", _vision(found)),
        ("Connector", _connector(found)),
        ("Decoder", _decoder(found.config.text)),
        ("Memory", _memory(found)),
        ("Images", _images(found)),
        ("Tokens", _tokens(found)),
    )
    for number, (title, rows) in enumerate(sections):
        show(*([""] if number else []), pairs(rows, title))
    for sentence in found.notes:
        note(sentence)


def _checkpoint(found: Inspection) -> list[tuple[str, str]]:
    files = len(found.weight_files)
    where = next(iter(found.weight_files)) if files == 1 else f"{files} files"
    stored = ", ".join(
        name if len(found.stored) == 1 else f"{name} ({millions(parameters)})"
        for name, parameters in found.stored.items()
    )
    base = []
    if found.base is not None:
        folder, changed = found.base
        base = [("base", f"{folder}, {count(changed)} of its weights changed by the adapter")]
    return [
        ("folder", str(found.folder)),
        *base,
        ("model type", found.config.model_type),
        ("weights", f"{stored}, {size_in_bytes(found.bytes_on_disk)} in {where}"),
        *([] if found.kind == "safetensors" else [("came as", found.kind)]),
    ]


def _parameters(found: Inspection) -> list[tuple[str, str]]:
    total = found.total_parameters
    rows = [
        (part, f"{parameters:>15,}  {parameters / max(total, 1):6.1%}")
        for part, parameters in found.parameters.items()
        if parameters
    ]
    return [*rows, ("total", f"{total:>15,}")]


def _vision(found: Inspection) -> list[tuple[str, str]]:
    vision = found.config.vision
    return [
        ("tile", f"{vision.image_size}x{vision.image_size} pixels"),
        (
            "patches",
            f"{vision.side}x{vision.side} of {vision.patch_size}x{vision.patch_size} pixels",
        ),
        ("hidden size", count(vision.hidden_size)),
        ("layers", f"{vision.num_layers}, {vision.num_heads} heads"),
        ("feed-forward", f"{count(vision.intermediate_size)}, {vision.hidden_act}"),
    ]


def _connector(found: Inspection) -> list[tuple[str, str]]:
    shape = found.connector
    (high, wide), (rows, cols) = shape.grid, shape.visual_grid
    return [
        ("grid", f"{high}x{wide} patches to {rows}x{cols} visual tokens (scale {shape.scale})"),
        ("features", f"{count(shape.in_features)} to {count(shape.out_features)}, no bias"),
        ("per tile", f"{shape.tokens_per_tile} visual tokens"),
    ]


def _decoder(text: TextConfig) -> list[tuple[str, str]]:
    return [
        ("hidden size", count(text.hidden_size)),
        (
            "layers",
            f"{text.num_layers}, {text.num_heads} heads on {text.num_kv_heads} keys and values "
            f"of {text.head_dim}",
        ),
        ("feed-forward", f"{count(text.intermediate_size)}, {text.hidden_act}"),
        ("context", f"{count(text.max_positions)} tokens"),
        ("rotary base", f"{text.rope.theta:,.0f}, {text.rope.type} positions"),
    ]


def _memory(found: Inspection) -> list[tuple[str, str]]:
    context = found.config.text.max_positions
    return [
        (
            name,
            f"{size_in_bytes(weights)} of weights, {size_in_bytes(found.cache_per_token[name])} "
            f"of cache per token ({size_in_bytes(found.cache_per_token[name] * context)} for a "
            "full context)",
        )
        for name, weights in found.memory.items()
    ]


def _images(found: Inspection) -> list[tuple[str, str]]:
    settings = found.settings
    largest = f"longer side to {count(settings.longest_edge)} pixels"
    tile = f"{settings.tile_edge}x{settings.tile_edge}"
    rows = [
        ("resize", largest if settings.resize else "none"),
        ("split", f"into tiles of {tile}" if settings.split else f"no, one tile of {tile}"),
    ]
    if settings.rescale is not None:
        rows.append(("rescale", f"{settings.rescale:.6g}"))
    if settings.mean is not None and settings.std is not None:
        rows.append(("mean, std", f"{list(settings.mean)}, {list(settings.std)}"))
    return rows


def _tokens(found: Inspection) -> list[tuple[str, str]]:
    rows = [("vocabulary", f"{count(found.vocabulary)} of {count(found.config.text.vocab_size)}")]
    rows += [(token, str(token_id)) for token, token_id in found.special_tokens.items()]
    ends = ", ".join(f"{i} {token or '(unknown)'}" for i, token in found.end_tokens.items())
    rows.append(("end an answer", ends or "none: only --max-new-tokens ends an answer"))
    if found.config.embedding_dim is not None:
        rows.append(("head", f"embeddings of {found.config.embedding_dim}"))
    elif found.config.tied:
        rows.append(("head", "shares the token embedding"))
    return rows
