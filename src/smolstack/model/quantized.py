"""Linear layers with integer weights, and their reference arithmetic.

Shapes: R rows (tokens), I input channels, O output channels, G groups of input channels.

A layer's :class:`Format` defines how weights and activations are quantized. Products within a group
are summed as integers, which gives the same sum on every processor. The scales are applied in
float32, group by group. A row's result does not depend on the other rows.

The tensors follow compressed-tensors' "pack-quantized" format, so other software can read a saved
layer: 32-bit words of eight 4-bit or four 8-bit weights, lowest bits first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from smolstack.config.quantization import Format, Quantization
from smolstack.errors import ConfigError
from smolstack.model.backend import TORCH, Backend
from smolstack.model.layers import TokenEmbedding

RADIX = 254  # 16-bit activations are RADIX · first + second, both from -127 to 127
_TENSORS = ("weight_packed", "weight_scale", "weight_zero_point")


def pack_words(values: Tensor, bits: int) -> Tensor:
    """Pack (O, N) integers from 0 to 2^bits - 1 into (O, ceil(N · bits / 32)) int32 words."""
    each = 32 // bits
    values = functional.pad(values.to(torch.uint8), (0, -values.shape[1] % each))
    if bits == 4:
        values = values[:, 0::2] | values[:, 1::2] << 4
    rows = values.shape[0]
    return values.flatten().contiguous().view(torch.int32).view(rows, -1)


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Unpack the first ``count`` integers of each row packed by :func:`pack_words`, as uint8."""
    values = words.flatten().contiguous().view(torch.uint8).view(words.shape[0], -1)
    if bits == 4:
        values = torch.stack((values & 15, values >> 4), dim=-1).flatten(1)
    return values[:, :count]


def round_activations(x: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """Quantize (R, I) activations to integers (R, G, group) and scales (R, G), both float32.

    The last group is padded with zeros.
    """
    most = 127 * RADIX + 126 if form.activation_bits == 16 else 127
    padded = functional.pad(x.float(), (0, -x.shape[1] % form.group))
    groups = padded.reshape(x.shape[0], -1, form.group)
    largest = groups.abs().amax(dim=-1, keepdim=True)
    inverse = torch.where(largest > 0, torch.full_like(largest, most).div(largest), 0)
    scale = largest.div(torch.full_like(largest, most))
    return (groups * inverse).round(), scale.squeeze(-1)


class Packed(Protocol):
    """A layer's weights in a backend's own layout."""

    format: Format
    inputs: int
    outputs: int

    def words(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Convert back to weight_packed, weight_scale and weight_zero_point."""
        ...


class QuantizedLinear(nn.Module):
    """A linear layer with 8-bit or 4-bit weights; float32 in, float32 out. For inference only.

    The layer's backend computes it. If the backend declines, torch computes it from a float32 copy
    of the weights.

    The weights are stored once. After a backend has packed them, weight_packed, weight_scale and
    weight_zero_point hold no memory (they are on the meta device); :meth:`tensors`, state_dict and
    copies recreate them.

    Attributes:
        format: bits, groups and activations.
        weight_packed: int32 (O, words): eight 4-bit or four 8-bit integers per word; 8-bit ones
            are stored with an offset of 128.
        weight_scale: bfloat16 (O, G).
        weight_zero_point: int32 (O/8 rounded up, G), the zero points of eight output channels per
            word; None with 8 bits.
        bias: float32 (O,) or None.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, form: Format, *, bias: bool) -> None:
        super().__init__()
        if form.bits == 4 and in_features % 8:
            raise ConfigError(
                f"a 4-bit linear layer has {in_features} input channels, expected a multiple of 8"
            )
        self.in_features, self.out_features, self.format = in_features, out_features, form
        groups, words = form.groups(in_features), -(-in_features * form.bits // 32)
        packed = torch.empty(out_features, words, dtype=torch.int32)
        self.register_buffer("weight_packed", packed)
        scale = torch.empty(out_features, groups, dtype=torch.bfloat16)
        self.register_buffer("weight_scale", scale)
        zeros = None
        if form.has_zero_points:
            zeros = torch.empty(-(-out_features // 8), groups, dtype=torch.int32)
        self.register_buffer("weight_zero_point", zeros)
        self.register_buffer("bias", torch.empty(out_features) if bias else None)
        self.backend: Backend = TORCH
        self.packed: Packed | None = None
        self._floats: Tensor | None = None

    @classmethod
    def of(
        cls,
        form: Format,
        numbers: Tensor,
        scale: Tensor,
        zeros: Tensor | None,
        bias: Tensor | None,
    ) -> QuantizedLinear:
        """Build a layer from quantized weights.

        Args:
            form: the quantization format.
            numbers: (O, I): from -127 to 127 with 8 bits, from 0 to 15 with 4.
            scale: (O, G).
            zeros: (O, G), from 0 to 15; None with 8 bits.
            bias: (O,) or None.
        """
        words = pack_words(numbers + 128 if form.bits == 8 else numbers, form.bits)
        return cls.of_words(form, numbers.shape[1], (words, scale, zeros), bias)

    @classmethod
    def of_words(
        cls,
        form: Format,
        in_features: int,
        rounded: tuple[Tensor, Tensor, Tensor | None],
        bias: Tensor | None,
    ) -> QuantizedLinear:
        """Build a layer from packed integers, (O, words), with scales and zero points."""
        words, scale, zeros = rounded
        with torch.device("meta"):
            made = cls(in_features, words.shape[0], form, bias=bias is not None)
        made.weight_packed, made.weight_scale = words, scale.to(torch.bfloat16)
        if zeros is not None:
            made.weight_zero_point = pack_words(zeros.t(), 4).t().contiguous()
        if bias is not None:
            made.bias = bias.detach().float().clone()
        return made

    @classmethod
    def of_packed(cls, packed: Packed, bias: Tensor | None) -> QuantizedLinear:
        """Build a layer from weights that are already in a backend's layout."""
        with torch.device("meta"):
            made = cls(packed.inputs, packed.outputs, packed.format, bias=bias is not None)
        made.packed = packed
        if bias is not None:
            made.bias = bias.detach().float().clone()
        return made

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.is_packed else self.weight_packed.device

    @property
    def is_packed(self) -> bool:
        """Whether the layer holds only the backend's packed weights."""
        return self.packed is not None and self.weight_packed.is_meta

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return weight_packed, weight_scale and weight_zero_point."""
        if self.is_packed:
            assert self.packed is not None
            return self.packed.words()
        return self.weight_packed, self.weight_scale, self.weight_zero_point

    def hold(self, packed: Packed) -> None:
        """Store packed weights and release the word tensors."""
        for name in _TENSORS:
            tensor = self._buffers[name]
            if tensor is not None:
                self._buffers[name] = tensor.to("meta")
        self.packed, self._floats = packed, None

    def _restore(self) -> None:
        """Recreate the word tensors, so that they can be modified."""
        if self.is_packed:
            for name, tensor in zip(_TENSORS, self.tensors(), strict=True):
                self._buffers[name] = tensor
        self.packed = None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in zip(_TENSORS, self.tensors(), strict=True):
            if tensor is not None:
                destination[prefix + name] = tensor

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._restore()
        self._floats = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without packed weights: a copy packs its own."""
        state = dict(self.__dict__)
        if self.is_packed:
            state["_buffers"] = {
                **self._buffers,
                **dict(zip(_TENSORS, self.tensors(), strict=True)),
            }
        state["packed"] = None
        return state

    def numbers(self) -> Tensor:
        """The integer weights, (O, I): from -127 to 127, or from 0 to 15; int16."""
        values = unpack_words(self.tensors()[0], self.format.bits, self.in_features).short()
        return values - 128 if self.format.bits == 8 else values

    def zero_points(self) -> Tensor | None:
        """Zero points (O, G), from 0 to 15; None with 8 bits."""
        zeros = self.tensors()[2] if self.format.has_zero_points else None
        return None if zeros is None else unpack_words(zeros.t(), 4, self.out_features).t()

    def dequantized(self) -> Tensor:
        """The weights as float32, (O, I)."""
        numbers, zeros = self.numbers().float(), self.zero_points()
        group, scale = self.format.group, self.tensors()[1].float()
        if zeros is not None:
            numbers = numbers - _spread(zeros.float(), group, self.in_features)
        return numbers * _spread(scale, group, self.in_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Move to another device. Dtype conversions such as ``model.float()`` have no effect."""
        if self.is_packed and fn(torch.empty(0)).device.type == "cpu":
            return self
        self._restore()
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer if buffer.is_meta else buffer[:0])
                self._buffers[name] = moved if buffer.is_meta else buffer.to(moved.device)
        self._floats = None
        return self

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) → (…, O), float32."""
        rows = x.reshape(-1, self.in_features)
        out: Tensor | None
        if rows.shape[0] == 0:
            out = rows.new_empty(0, self.out_features, dtype=torch.float32)
        else:
            out = self.backend.linear(self, rows)
        if out is None:
            out = self._by_torch(rows)
        return out.view(*x.shape[:-1], self.out_features)

    def _by_torch(self, rows: Tensor) -> Tensor:
        """Compute the layer with torch.

        A group's products are integers below 2²⁴, which float32 sums exactly in any order, so a row
        does not depend on the other rows here either.
        """
        numbers, scale = round_activations(rows, self.format)
        weight, factors = self._whole(), self.tensors()[1].float()
        out = torch.zeros(rows.shape[0], self.out_features, device=rows.device)
        for group in range(numbers.shape[1]):
            some, own = numbers[:, group], weight[:, group].t()
            if self.format.activation_bits == 16:
                first = (some / RADIX).round()
                sums = (first @ own) * RADIX + (some - first * RADIX) @ own
            else:
                sums = some @ own
            out += sums * scale[:, group, None] * factors[:, group]
        return out if self.bias is None else out + self.bias

    def _whole(self) -> Tensor:
        """The integer weights as float32, (O, G, group), cached."""
        if self._floats is None or self._floats.device != self.device:
            numbers, zeros = self.numbers().float(), self.zero_points()
            group = self.format.group
            if zeros is not None:
                numbers = numbers - _spread(zeros.float(), group, self.in_features)
            padded = functional.pad(numbers, (0, -self.in_features % group))
            self._floats = padded.view(self.out_features, -1, group)
        return self._floats

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.format}"


def compute_in_float32(model: nn.Module) -> None:
    """Convert the layers that remain floating-point in a quantized model to float32.

    A token embedding table keeps its stored dtype and returns float32.
    """
    for module in model.modules():
        if isinstance(module, TokenEmbedding):
            module.output_dtype = torch.float32
            continue
        for name, tensor in (
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        ):
            if tensor.is_floating_point() and not isinstance(module, QuantizedLinear):
                wide = tensor.detach().float()
                if isinstance(tensor, nn.Parameter):
                    setattr(module, name, nn.Parameter(wide, requires_grad=tensor.requires_grad))
                else:
                    module._buffers[name] = wide


def _spread(of_groups: Tensor, group: int, width: int) -> Tensor:
    """Repeat each group's value for its channels: (O, G) → (O, I)."""
    return of_groups.repeat_interleave(group, dim=1)[:, :width]


def replace_linears(model: nn.Module, quantization: Quantization) -> None:
    """Replace a model's linear layers by quantized layers without values."""
    for name, form in quantization:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        with layer.weight.device:
            made = QuantizedLinear(
                layer.in_features, layer.out_features, form, bias=layer.bias is not None
            )
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, made)
