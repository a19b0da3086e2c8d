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
        name: "decoder.layers.3", say.
        bits: a weight on average, scales and zero points included.
        formats: bits of each of its linear parts, by name.
        error: of what it puts out, relative to what it adds to the states.
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
        bits: a weight of the text tower (the decoder's layers and the head) on average, scales and
            zero points included.
        text_bytes: of those layers.
        tokens: calibrated on.
        blocks: in order.
        perplexity: of the float model on what was held out; None for a model without answers.
        perplexity_after: of the quantized one.
        divergence: KL(float ‖ quantized) per token there, in nats.
        agreement: share of tokens with the same likeliest one.
        held_out: tokens measured on.
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
    """Put together what a job knows at its end."""
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
