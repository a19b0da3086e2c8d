"""Round a weight matrix to integers, group by group.

Shapes: O output channels, I input channels, G groups of input channels.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from smolstack.backends.cpu.packed_weights import Arena, PackedWeights, packed_size
from smolstack.config.quantization import Format
from smolstack.model.quantized import pack_words
from smolstack.native import library as native

# Candidate scales of a group, as fractions of the one that spans all its weights: with 16 levels,
# clipping the outermost weights pays if they matter little.
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_LEVELS = 15
_ROWS_AT_ONCE = 1024
_STORED = {
    torch.float32: native.STORED_FLOAT32,
    torch.bfloat16: native.STORED_BFLOAT16,
    torch.float16: native.STORED_FLOAT16,
}


def round_weight(
    weight: Tensor, form: Format, importance: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize a weight.

    Args:
        weight: (O, I), float32.
        form: bits and groups.
        importance: (I,), the mean square of each input channel; with 4 bits a group's scale and
            zero point minimize the squared error weighted by it. None: all equal.

    Returns:
        The integers (O, I), the scales (O, G) in bfloat16, and the zero points (O, G) or None.
    """
    if form.bits == 8:
        return (*_round_bytes(weight, form.group), None)
    if importance is None:
        importance = weight.new_ones(weight.shape[1])
    parts = torch.split(weight, _ROWS_AT_ONCE)
    rows = [_round_nibbles(some, form.group, importance) for some in parts]
    numbers, scale, zeros = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return numbers, scale, zeros


def _groups(weight: Tensor, group: int) -> Tensor:
    """(O, I) → (O, G, group); the last group is padded with zeros."""
    padded = functional.pad(weight, (0, -weight.shape[1] % group))
    return padded.view(weight.shape[0], -1, group)


def _round_bytes(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    groups = _groups(weight, group)
    scale = (groups.abs().amax(dim=-1, keepdim=True) / 127).to(torch.bfloat16)
    wide = scale.float()
    inverse = torch.where(wide > 0, 1 / wide, 0)
    numbers = (groups * inverse).round_().clamp_(-127, 127).to(torch.int16)
    return numbers.flatten(1)[:, : weight.shape[1]], scale.squeeze(-1)


def _round_nibbles(weight: Tensor, group: int, importance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups = _groups(weight, group)
    weights = _groups(importance[None].float(), group)
    low = groups.amin(dim=-1, keepdim=True).clamp(max=0)
    high = groups.amax(dim=-1, keepdim=True).clamp(min=0)
    best = torch.full_like(low, torch.inf)
    numbers, scale, zeros = torch.zeros_like(groups), torch.zeros_like(low), torch.zeros_like(low)
    for share in SHARES:
        tried = ((high - low) * (share / _LEVELS)).bfloat16().float()
        inverse = torch.where(tried > 0, 1 / tried, 0)
        steps = (groups * inverse).round()
        middle = (-low * share * inverse).round()
        for offset in (-1, 0, 1):
            zero = (middle + offset).clamp(0, _LEVELS)
            q = (steps + zero).clamp(0, _LEVELS)
            error = (((q - zero) * tried - groups).square() * weights).sum(dim=-1, keepdim=True)
            better = error < best
            best = torch.where(better, error, best)
            numbers, scale = torch.where(better, q, numbers), torch.where(better, tried, scale)
            zeros = torch.where(better, zero, zeros)
    whole = numbers.to(torch.uint8).flatten(1)[:, : weight.shape[1]]
    return whole, scale.squeeze(-1).bfloat16(), zeros.squeeze(-1).to(torch.uint8)


def stored_alike(dtype: torch.dtype) -> int | None:
    """The kernels' identifier of a float weight's dtype; None if they do not read it."""
    return _STORED.get(dtype)


@dataclass
class Factors:
    """Factors of a weight (O, I) applied before rounding: per output (O,) and per input (I,).

    None means 1.
    """

    outputs: Tensor | None = None
    inputs: Tensor | None = None

    def of(self, weight: Tensor) -> Tensor:
        """The weight with its factors applied, in float32."""
        made = weight.float()
        if self.outputs is not None:
            made = made * self.outputs[:, None]
        return made if self.inputs is None else made * self.inputs

    def bias(self, bias: Tensor) -> Tensor:
        """The layer's bias with the output factors applied, in float32."""
        return bias.float() if self.outputs is None else bias.float() * self.outputs

    def rows(self, start: int, end: int) -> Factors:
        """The factors of some outputs."""
        return self if self.outputs is None else Factors(self.outputs[start:end], self.inputs)


class StoredWeight:
    """A float weight with its factors, read in place by the kernels.

    Args:
        weight: (O, I) on a CPU, of float32, bfloat16 or float16.
    """

    def __init__(self, weight: Tensor, factors: Factors) -> None:
        self._kept = [weight.detach().contiguous()]
        kind = stored_alike(weight.dtype)
        assert kind is not None, weight.dtype
        made = native.Stored(kind, weight.shape[1], weight.shape[0], self._kept[0].data_ptr())
        made.by_output, made.by_input = self._floats(factors.outputs), self._floats(factors.inputs)
        self.reference = ctypes.byref(made)

    def _floats(self, values: Tensor | None) -> int | None:
        if values is None:
            return None
        self._kept.append(values.detach().float().contiguous())
        return self._kept[-1].data_ptr()


def kernels_for(weight: Tensor) -> native.Library | None:
    """The kernels, if they can read this float weight."""
    if weight.device.type != "cpu" or stored_alike(weight.dtype) is None:
        return None
    return native.library()


def rounded_words(
    weight: Tensor, form: Format, importance: Tensor, factors: Factors | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Like :func:`round_weight`, with the integers packed: (O, words).

    Uses the kernels if available. The weight may be of any float dtype.
    """
    kernels, factors = kernels_for(weight), factors or Factors()
    if kernels is None:
        numbers, scale, zeros = round_weight(factors.of(weight), form, importance)
        return pack_words(numbers + 128 if form.bits == 8 else numbers, form.bits), scale, zeros
    outputs, inputs = weight.shape
    words = torch.empty(outputs, -(-inputs * form.bits // 32), dtype=torch.int32)
    scale = torch.empty(outputs, form.groups(inputs), dtype=torch.bfloat16)
    zeros = torch.empty_like(scale, dtype=torch.uint8) if form.has_zero_points else None
    into = (
        None,
        words.data_ptr(),
        words.shape[1] * 4,
        scale.data_ptr(),
        None if zeros is None else zeros.data_ptr(),
    )
    _round(kernels, Rounding(weight, form, importance, factors), into)
    return words, scale, zeros


@dataclass(frozen=True)
class Rounding:
    """Arguments of :func:`rounded_words`.

    A weight (O, I), its format, the mean square of each input channel (I,), and factors.
    """

    weight: Tensor
    format: Format
    importance: Tensor
    factors: Factors


def rounded_and_packed(kernels: native.Library, work: Rounding, arena: Arena) -> PackedWeights:
    """Like :func:`rounded_words`, directly in the kernels' layout."""
    outputs, inputs = work.weight.shape
    memory = arena.take(packed_size(kernels, work.format, inputs, outputs))
    _round(kernels, work, (memory.data_ptr(), None, 0, None, None))
    return PackedWeights(kernels, work.format, inputs, outputs, memory)


def _round(kernels: native.Library, work: Rounding, into: tuple[int | None, ...]) -> None:
    weight = work.weight
    stored, importance = StoredWeight(weight, work.factors), work.importance.float().contiguous()
    failed = kernels.round_weight(
        work.format.bits,
        stored.reference,
        importance.data_ptr(),
        work.format.group,
        *into,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"cannot allocate memory to round a weight of {tuple(weight.shape)}")
