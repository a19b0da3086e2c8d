"""What a quantized linear layer is, and which layers of a model are quantized how.

A format is one object: the bits of its weights, the input channels that share a scale, and the bits
of the activations that its weights are multiplied with. Everything that stores, loads, computes or
exports a quantized layer asks this object, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from smolstack.errors import ConfigError

SCHEMES = ("int8", "int4")
# What is quantized: everything that multiplies large matrices. Norms, positions, the patch
# embedding and the token embedding (a table, read one row per token) keep their floats.
QUANTIZED = ("vision.layers.", "connector.", "decoder.layers.", "head")
_FOUR_BITS = ("decoder.layers.",)


@dataclass(frozen=True)
class Format:
    """How a linear layer's weights and activations are rounded.

    Weights: ``bits`` 8: q · scale, q from -127 to 127; ``bits`` 4: (q - zero) · scale, q and zero
    from 0 to 15. Scale (bfloat16) and zero point are shared by ``group`` neighbouring input
    channels of an output channel; the last group may be shorter.

    Activations: rounded row by row (token by token) in the same groups,
    ``rint(x · most / max|x|)``, most being 127, or 32,384 with ``activation_bits`` 16.
    """

    bits: int
    group: int
    activation_bits: int = 8

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ConfigError(f"weights of {self.bits} bits, expected 4 or 8")
        # torch sums a group in float32, exactly below 2²⁴: 127 · 127 · 1024 is.
        if not 16 <= self.group <= 1024 or self.group % 16:
            raise ConfigError(
                f"groups of {self.group} channels, expected a multiple of 16 up to 1,024"
            )
        if self.activation_bits not in (8, 16):
            raise ConfigError(f"activations of {self.activation_bits} bits, expected 8 or 16")
        # Sums of a group are 32-bit integers: 255 · 32,384 · 256 is the largest that fits.
        if self.activation_bits == 16 and self.group > 256:
            raise ConfigError(
                f"groups of {self.group} channels with activations of 16 bits, expected at most 256"
            )

    @property
    def has_zero_points(self) -> bool:
        """Whether weights are rounded asymmetrically: those of 4 bits are."""
        return self.bits == 4

    def groups(self, in_features: int) -> int:
        """Groups of a row of ``in_features`` channels."""
        return -(-in_features // self.group)

    def bits_per_weight(self, in_features: int) -> float:
        """Bits of a weight with its share of scale (16 bits) and zero point (4 bits)."""
        beside = 20 if self.has_zero_points else 16
        return self.bits + beside * self.groups(in_features) / in_features


INT8 = Format(8, 64)
# The vision tower is smoother: its groups may be larger, which is faster.
INT8_TOWER = Format(8, 256)
INT8_FINE = Format(8, 64, activation_bits=16)
INT4 = Format(4, 32)


def format_of(name: str, in_features: int, scheme: str) -> Format | None:
    """A linear layer's format under a scheme; None: it keeps its floats.

    The head reads activations of 16 bits. It runs once for a token that is generated, where the
    memory that its weights come from sets the pace, and a third of what 8 bits lose was its share.
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
    """The formats of a model's quantized layers, by the layer's name.

    ``name`` is what people call it: "int8", "int4", or "mixed" where a budget chose.
    """

    name: str
    formats: Mapping[str, Format]

    def __iter__(self) -> Iterator[tuple[str, Format]]:
        return iter(self.formats.items())

    def __hash__(self) -> int:
        return hash((self.name, tuple(sorted((n, hash(f)) for n, f in self.formats.items()))))


def name_of(formats: Mapping[str, Format], widths: Mapping[str, int]) -> str:
    """The scheme that gives these layers, of so many input channels, just as many bits, else
    "mixed"."""
    for scheme in SCHEMES:
        meant = {name: format_of(name, widths[name], scheme) for name in formats}
        if all(one is not None and one.bits == formats[name].bits for name, one in meant.items()):
            return scheme
    return "mixed"
