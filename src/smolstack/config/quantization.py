"""Quantization formats of linear layers, and which layers of a model use which.

A format is one object: the bits of the weights, the number of input channels that share a scale,
and the bits of the activations. All code that stores, loads, computes or exports a quantized layer
takes these from the format.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from smolstack.errors import ConfigError

SCHEMES = ("int8", "int4")
# Only the layers with large matrix products are quantized. Norms, positions, the patch embedding
# and the token embedding (a table, read one row per token) stay floating-point.
QUANTIZED = ("vision.layers.", "connector.", "decoder.layers.", "head")
_FOUR_BITS = ("decoder.layers.",)


@dataclass(frozen=True)
class Format:
    """Quantization format of a linear layer's weights and activations.

    Weights: ``bits`` 8: q · scale, q from -127 to 127; ``bits`` 4: (q - zero) · scale, q and zero
    from 0 to 15. Scale (bfloat16) and zero point are shared by ``group`` neighboring input
    channels of an output channel; the last group may be shorter.

    Activations: quantized per row (token) in the same groups, ``rint(x · most / max|x|)``, where
    most is 127, or 32,384 with ``activation_bits`` 16.
    """

    bits: int
    group: int
    activation_bits: int = 8

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ConfigError(f"weights of {self.bits} bits, expected 4 or 8")
        # torch sums a group in float32, which is exact below 2²⁴: 127 · 127 · 1024 is.
        if not 16 <= self.group <= 1024 or self.group % 16:
            raise ConfigError(
                f"groups of {self.group} channels, expected a multiple of 16 up to 1,024"
            )
        if self.activation_bits not in (8, 16):
            raise ConfigError(f"activations of {self.activation_bits} bits, expected 8 or 16")
        # Group sums are 32-bit integers: 255 · 32,384 · 256 is the largest that fits.
        if self.activation_bits == 16 and self.group > 256:
            raise ConfigError(
                f"groups of {self.group} channels with activations of 16 bits, expected at most 256"
            )

    @property
    def has_zero_points(self) -> bool:
        """Whether weights are quantized asymmetrically: true for 4 bits."""
        return self.bits == 4

    def groups(self, in_features: int) -> int:
        """Number of groups in a row of ``in_features`` channels."""
        return -(-in_features // self.group)

    def bits_per_weight(self, in_features: int) -> float:
        """Bits per weight, including its share of scale (16 bits) and zero point (4 bits)."""
        beside = 20 if self.has_zero_points else 16
        return self.bits + beside * self.groups(in_features) / in_features


INT8 = Format(8, 64)
# The vision tower tolerates larger groups, which are faster.
INT8_TOWER = Format(8, 256)
INT8_FINE = Format(8, 64, activation_bits=16)
INT4 = Format(4, 32)


def format_of(name: str, in_features: int, scheme: str) -> Format | None:
    """A linear layer's format under a scheme; None if it is not quantized.

    The head uses 16-bit activations. It runs once per generated token, where reading its weights
    from memory limits speed, and it caused a third of the quality loss with 8-bit activations.
    """
    if scheme not in SCHEMES:
        raise ConfigError(f"the scheme is {scheme!r}, expected one of {list(SCHEMES)}")
    if not name.startswith(QUANTIZED):
        return None
    if name == "head":
        return INT8_FINE
    if not name.startswith(_FOUR_BITS):
        return INT8_TOWER
    few = scheme == "int4" and name.startswith(_FOUR_BITS) and in_features % INT4.group == 0
    return INT4 if few else INT8


@dataclass(frozen=True)
class Quantization:
    """The formats of a model's quantized layers, by layer name.

    ``name`` is the human-readable scheme: "int8", "int4", or "mixed" if chosen for a bit budget.
    """

    name: str
    formats: Mapping[str, Format]

    def __iter__(self) -> Iterator[tuple[str, Format]]:
        return iter(self.formats.items())

    def __hash__(self) -> int:
        return hash((self.name, tuple(sorted((n, hash(f)) for n, f in self.formats.items()))))


def name_of(formats: Mapping[str, Format], widths: Mapping[str, int]) -> str:
    """The scheme that gives these layers (with their input widths) the same bits, else "mixed"."""
    for scheme in SCHEMES:
        meant = {name: format_of(name, widths[name], scheme) for name in formats}
        if all(one is not None and one.bits == formats[name].bits for name, one in meant.items()):
            return scheme
    return "mixed"
