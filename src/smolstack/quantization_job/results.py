"""Results of a quantization: every layer's bits and error, and quality before and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from smolstack.config.quantization import Format
from smolstack.quantization.budget import average_bits
from smolstack.quantization_job.measuring import Measured

_TEXT = ("decoder.layers.", "head")


@dataclass(frozen=True)
class Block:
    """A layer of a tower, the connector or the head.

    Attributes:
        name: for example "decoder.layers.3".
        bits: average bits per weight, including scales and zero points.
        formats: bits of each linear layer, by name.
        error: error of its output, relative to what it adds to the states.
    """

    name: str
    bits: float
    formats: Mapping[str, int]
    error: float


@dataclass(frozen=True)
class Quantized:
    """A quantized checkpoint.

    Attributes:
        out: its folder.
        bits: average bits per weight of the text tower (the decoder's layers and the head),
            including scales and zero points.
        text_bytes: bytes of these layers.
        tokens: number of calibration tokens.
        blocks: the blocks, in order.
        perplexity: the float model's, on held-out samples; None for a retrieval model.
        perplexity_after: the quantized model's.
        divergence: KL(float ‖ quantized) per token, in nats.
        agreement: share of positions with the same most likely token.
        held_out: number of held-out tokens.
    """

    out: Path
    bits: float
    text_bytes: int
    tokens: int
    blocks: tuple[Block, ...]
    perplexity: float | None
    perplexity_after: float | None
    divergence: float | None
    agreement: float | None
    held_out: int


def results_of(  # noqa: PLR0917
    out: Path,
    formats: Mapping[str, Format],
    shapes: Mapping[str, tuple[int, int]],
    errors: Mapping[str, float],
    tokens: int,
    measured: Measured,
) -> Quantized:
    """Collect the results of a complete job."""
    text = {name: form for name, form in formats.items() if name.startswith(_TEXT)}
    weights = sum(shapes[name][0] * shapes[name][1] for name in text)
    bits, after = average_bits(text, shapes), measured.after
    return Quantized(
        out,
        bits,
        round(bits * weights / 8),
        tokens,
        tuple(_block(name, error, formats, shapes) for name, error in errors.items()),
        measured.perplexity,
        None if after is None else after.perplexity,
        None if after is None else after.mean,
        None if after is None else after.agreement,
        0 if after is None else after.tokens,
    )


def _block(
    name: str,
    error: float,
    formats: Mapping[str, Format],
    shapes: Mapping[str, tuple[int, int]],
) -> Block:
    own = {full: form for full, form in formats.items() if f"{full}.".startswith(f"{name}.")}
    parts = {full.removeprefix(f"{name}."): form.bits for full, form in own.items()}
    return Block(name, average_bits(own, shapes), parts, error)
