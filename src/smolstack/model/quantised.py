"""Linear layers whose weights are 8- or 4-bit integers, and the arithmetic that they stand for.

Shapes: R rows (tokens), I input channels, O output channels, G groups of 32 input channels.

int8: a weight is ``q · scale[o]``, q from -127 to 127. int4: ``(q - 8) · scale[o, g]``, q from 0 to
15. In both the input is quantised row by row, ``rint(x · 127 / max|x|)``, so that a row's result
does not depend on its neighbours. Products are summed as integers, the same on every processor;
the scales are multiplied in as float32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from smolstack.errors import ConfigError
from smolstack.native import library as native

GROUP = 32  # int4: input channels that share a scale
_LARGEST = 127.0
# Candidates for a group's scale, as shares of the one that reaches its largest weight.
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8)
_ROWS_AT_ONCE = 4096
_NO_NORM = ctypes.byref(native.Norm(native.NO_NORM, 0.0, None, None))


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(R, I) float → int8 (R, I) and float32 scales (R, 1); a row of zeros has scale 0."""
    x = x.float()
    largest = x.abs().amax(dim=-1, keepdim=True)
    inverse = torch.where(largest > 0, torch.full_like(largest, _LARGEST).div(largest), 0)
    return (x * inverse).round().to(torch.int8), largest.div(torch.full_like(largest, _LARGEST))


def quantise_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(O, I) float → two weights a byte (O, I/2), and float16 scales (O, I/32).

    In each group, byte j holds channel j in its low half and channel j + 16 in its high half. The
    scale is the one of a few candidates that leaves the least squared error.
    """
    if weight.shape[1] % GROUP:
        raise ConfigError(f"int4 needs a multiple of {GROUP} channels, found {weight.shape[1]}")
    packed, scales = [], []
    for rows in torch.split(weight, _ROWS_AT_ONCE):
        groups = rows.float().reshape(rows.shape[0], -1, GROUP)
        place = groups.abs().argmax(dim=-1, keepdim=True)
        reach = groups.gather(-1, place) / -8  # the largest weight becomes q = 0 exactly
        best = torch.full_like(reach, torch.inf)
        numbers, scale = torch.zeros_like(groups), torch.zeros_like(reach)
        for share in _SHARES:
            tried = (reach * share).half().float()
            inverse = torch.where(tried != 0, 1 / tried, 0)
            q = (groups * inverse).round().clamp_(-8, 7)
            error = (q * tried - groups).square().sum(dim=-1, keepdim=True)
            better = error < best
            best = torch.where(better, error, best)
            numbers, scale = torch.where(better, q, numbers), torch.where(better, tried, scale)
        q = (numbers + 8).to(torch.uint8)
        packed.append((q[..., : GROUP // 2] | q[..., GROUP // 2 :] << 4).flatten(1))
        scales.append(scale.squeeze(-1).half())
    return torch.cat(packed), torch.cat(scales)


def unpack_groups(packed: Tensor, scale: Tensor) -> Tensor:
    """The weights that :func:`quantise_groups` left, (O, I) float32."""
    halves = packed.reshape(packed.shape[0], -1, GROUP // 2)
    q = torch.cat((halves & 15, halves >> 4), dim=-1).float() - 8
    return (q * scale.float()[..., None]).flatten(1)


@dataclass
class _Struct:
    """A layer as the kernels read it, and the tensors that it points into."""

    linear: native.Linear
    origin: int  # address of the weights that it was made of
    kept: tuple[Tensor | None, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the layer makes its own: pointers mean nothing to it."""
        return type(None), ()


class QuantisedLinear(nn.Module):
    """A linear layer with int8 or int4 weights; float32 in, float32 out. For inference only.

    On a CPU the compiled kernels compute it (smolstack.native); without them, and on other
    devices, torch does, from a float32 copy of the weights where it has no quick integer product.

    Attributes:
        weight: int8 (O, I), or uint8 (O, I/2) with two weights a byte.
        weight_scale: float32 (O,), or float16 (O, I/32).
        bias: float32 (O,) or None.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bits: int, *, bias: bool) -> None:
        super().__init__()
        if bits not in (4, 8) or (bits == 4 and in_features % GROUP):
            raise ConfigError(f"no {bits}-bit linear layer of {in_features} channels")
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        if bits == 8:
            weight = torch.empty(out_features, in_features, dtype=torch.int8)
            scale = torch.empty(out_features, dtype=torch.float32)
        else:
            weight = torch.empty(out_features, in_features // 2, dtype=torch.uint8)
            scale = torch.empty(out_features, in_features // GROUP, dtype=torch.float16)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", torch.empty(out_features) if bias else None)
        self._struct: _Struct | None = None
        self._floats: Tensor | None = None

    @classmethod
    def from_float(cls, weight: Tensor, bias: Tensor | None, bits: int) -> QuantisedLinear:
        """Quantise a layer's (O, I) weight."""
        with torch.device("meta"):
            made = cls(weight.shape[1], weight.shape[0], bits, bias=bias is not None)
        with torch.no_grad():
            if bits == 4:
                made.weight, made.weight_scale = quantise_groups(weight)
            else:
                made.weight, scale = quantise_rows(weight)
                made.weight_scale = scale.squeeze(1)
            if bias is not None:
                made.bias = bias.detach().float().clone()
        return made

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantisedLinear:
        """Move to another device; ``model.float()`` and the like change nothing here."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer if buffer.is_meta else buffer[:0])
                self._buffers[name] = moved if buffer.is_meta else buffer.to(moved.device)
        self._floats = None
        return self

    def dequantised(self) -> Tensor:
        """The weights as float32, (O, I)."""
        if self.bits == 4:
            return unpack_groups(self.weight, self.weight_scale)
        return self.weight.float() * self.weight_scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) → (…, O), float32."""
        rows = x.reshape(-1, self.in_features)
        kernels = native.library() if self.weight.device.type == "cpu" else None
        if kernels is None or rows.shape[0] == 0:
            out = self._by_torch(rows)
        else:
            out = self._by_kernels(kernels, rows)
        return out.view(*x.shape[:-1], self.out_features)

    def _by_kernels(self, kernels: native.Library, rows: Tensor) -> Tensor:
        rows = rows.detach().float().contiguous()
        out = torch.empty(rows.shape[0], self.out_features)
        struct, count, threads = (
            ctypes.byref(self.struct(kernels)),
            rows.shape[0],
            torch.get_num_threads(),
        )
        if kernels.panels:
            failed = kernels.dense_rows(
                struct, _NO_NORM, rows.data_ptr(), count, 0, None, out.data_ptr(), threads
            )
        else:
            failed = kernels.linear_layer(
                struct, rows.data_ptr(), count, out.data_ptr(), 0, threads
            )
        if failed:
            raise MemoryError(f"no memory for {count} rows of a linear layer")
        return out

    def _by_torch(self, rows: Tensor) -> Tensor:
        numbers, scale = quantise_rows(rows)
        if self.bits == 8 and _integers_suit(rows.shape[0], self.weight):
            sums = torch._int_mm(numbers, self.weight.t()).float()
        else:
            sums = numbers.float() @ self._float_weight().t()
        out = sums * scale
        if self.bits == 8:
            out = out * self.weight_scale
        return out if self.bias is None else out + self.bias

    def _float_weight(self) -> Tensor:
        """The integers (int8) or the weights (int4) as float32, kept: torch multiplies no others
        as fast."""
        if self._floats is None or self._floats.device != self.weight.device:
            weight = self.weight.float() if self.bits == 8 else self.dequantised()
            self._floats = weight
        return self._floats

    def struct(self, kernels: native.Library) -> native.Linear:
        """The layer as the kernels read it; its pointers hold while the tensors live."""
        made = self._struct
        if made is not None and made.origin == self.weight.data_ptr():
            return made.linear
        self.weight, self.weight_scale = self.weight.contiguous(), self.weight_scale.contiguous()
        kind = native.INT8 if self.bits == 8 else native.INT4
        weight, scale, sums = self.weight, self.weight_scale, None
        if kernels.panels:
            weight, scale = self._as_panels(kernels, kind)
        elif self.bits == 8 and kernels.instructions == "VNNI":
            sums = torch.empty(self.out_features, dtype=torch.int32)
            kernels.sum_rows(
                weight.data_ptr(), self.out_features, self.in_features, sums.data_ptr()
            )
        linear = native.Linear(
            kind,
            self.in_features,
            self.out_features,
            int(kernels.panels),
            weight.data_ptr(),
            scale.data_ptr(),
            None if sums is None else sums.data_ptr(),
            None if self.bias is None else self.bias.data_ptr(),
        )
        self._struct = _Struct(linear, self.weight.data_ptr(), (weight, scale, sums))
        return linear

    def _as_panels(self, kernels: native.Library, kind: int) -> tuple[Tensor, Tensor]:
        """Weights and scales in the order in which the kernels for AVX-512 read them."""
        inputs, outputs = self.in_features, self.out_features
        weight = torch.empty(kernels.panel_bytes(kind, inputs, outputs), dtype=torch.uint8)
        kernels.pack_panels(kind, self.weight.data_ptr(), inputs, outputs, weight.data_ptr())
        if self.bits == 8:
            return weight, self.weight_scale
        groups = inputs // GROUP
        scale = torch.empty(-(-outputs // 16) * 16, groups, dtype=torch.float16)
        kernels.pack_scales(self.weight_scale.data_ptr(), groups, outputs, scale.data_ptr())
        return weight, scale

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, int{self.bits}"


def _integers_suit(rows: int, weight: Tensor) -> bool:
    """Whether torch's product of int8 matrices takes these shapes, and is quick here."""
    if rows <= 16 or weight.shape[0] % 8 or weight.shape[1] % 8:
        return False
    return _integers_are_quick(str(weight.device))


@lru_cache(maxsize=8)
def _integers_are_quick(device: str) -> bool:
    """torch._int_mm against a float32 product, measured once: it varies forty-fold by processor."""
    numbers = torch.ones(256, 512, dtype=torch.int8, device=device)
    floats = torch.ones(256, 512, device=device)
    try:
        torch._int_mm(numbers, numbers.t())
    except (RuntimeError, NotImplementedError):
        return False
    functional.linear(floats, floats)
    took = []
    for left in (numbers, floats):
        best = min(_seconds(left) for _ in range(3))
        took.append(best)
    return took[0] < took[1]


def _seconds(left: Tensor) -> float:
    began = perf_counter()
    product = torch._int_mm(left, left.t()) if left.dtype == torch.int8 else left @ left.t()
    product.sum().item()
    return perf_counter() - began
