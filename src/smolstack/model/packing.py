"""Weights laid out anew for the compiled kernels: all of a tower's in one piece of memory.

A pass over a decoder's weights touches every page of them once a token, so they lie in one piece
that the system may back with large pages, in the order in which they are read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smolstack.model.quantised import QuantisedLinear
from smolstack.native import library as native

_KINDS = {torch.float32: native.FLOAT32, torch.bfloat16: native.BFLOAT16}
_LINE = 64  # bytes


class Packed:
    """Linear layers and norms of a model as the kernels read them.

    Args:
        layers: the linear layers that :meth:`linear` will be asked for; those that are bfloat16 or
            quantised are laid out anew here.
        whole: what they are part of.
    """

    def __init__(self, kernels: native.Library, layers: Iterable[Any], whole: nn.Module) -> None:
        self.kernels = kernels
        self._parts = [
            (parent._modules, name, part)
            for parent in whole.modules()
            for name, part in parent._modules.items()
        ]
        self._kept: list[Tensor] = []  # what the structures point into
        self._origins: list[tuple[dict[str, Any], str, Tensor, int, int]] = []
        layers = [layer for layer in layers if _kind(layer) != native.FLOAT32]
        size = sum(_size(kernels, layer) for layer in layers)
        self._memory = torch.empty(size + _LINE, dtype=torch.uint8)
        kernels.want_large_pages(self._memory.data_ptr(), size)
        self._free = -(-self._memory.data_ptr() // _LINE) * _LINE

    def current(self) -> bool:
        """Whether all parts and weights are still the ones that were read.

        An adapter put around a layer takes that layer's place.
        """
        # Asked before every token: the modules' own tables are several times as fast as attributes.
        return all(parts.get(name) is part for parts, name, part in self._parts) and all(
            table[name] is weight
            and weight.data_ptr() == address
            and (version < 0 or weight._version == version)
            for table, name, weight, address, version in self._origins
        )

    def linear(self, layer: Any) -> native.Linear:
        """A linear layer, its weights as panels unless they are float32."""
        self._note(layer)
        bias = getattr(layer, "bias", None)
        linear = native.Linear(_kind(layer), _inputs(layer), outputs_of(layer))
        linear.bias = None if bias is None else self.floats(bias)
        if linear.kind == native.FLOAT32:
            linear.weight = self.floats(layer.weight)
            return linear
        at = self._take(_size(self.kernels, layer))
        lay_out(self.kernels, layer, linear, at)
        weight = _weight(layer)
        self.kernels.put_aside(weight.data_ptr(), weight.nbytes)
        return linear

    def floats(self, tensor: Tensor) -> int:
        """Address of a tensor as float32; its own where that is what it is."""
        kept = tensor.detach().float().contiguous()
        self._kept.append(kept)
        return kept.data_ptr()

    def norm(self, norm: Any) -> int:
        """Address of a norm's weights as float32."""
        self._note(norm)
        return self.floats(norm.weight)

    def layer_norm(self, norm: nn.LayerNorm) -> native.Norm:
        """A layer norm with its bias."""
        return native.Norm(native.LAYER_NORM, norm.eps, self.norm(norm), self.floats(norm.bias))

    def _note(self, module: Any) -> None:
        name = "weight_packed" if isinstance(module, QuantisedLinear) else "weight"
        weight = getattr(module, name)
        table = module._parameters if name in module._parameters else module._buffers
        version = -1 if weight.is_inference() else weight._version  # which inference does not count
        self._origins.append((table, name, weight, weight.data_ptr(), version))

    def _take(self, size: int) -> int:
        address = self._free
        self._free += size
        return address

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the model makes its own: pointers mean nothing to it."""
        return type(None), ()


def packed_alone(kernels: native.Library, layer: QuantisedLinear) -> native.Linear:
    """A quantised layer as the kernels read it when nothing else is around it; made once."""
    made = layer._packed
    if made is None or made.origin != layer.weight_packed.data_ptr():
        memory = torch.empty(_size(kernels, layer) + _LINE, dtype=torch.uint8)
        linear = native.Linear(_kind(layer), _inputs(layer), outputs_of(layer))
        linear.bias = None if layer.bias is None else layer.bias.data_ptr()
        lay_out(kernels, layer, linear, -(-memory.data_ptr() // _LINE) * _LINE)
        made = _Alone(linear, layer.weight_packed.data_ptr(), memory)
        layer._packed = made
    found: native.Linear = made.linear
    return found


@dataclass
class _Alone:
    """A layer as the kernels read it, the weights that it was made of, and its memory."""

    linear: native.Linear
    origin: int
    memory: Tensor

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the layer makes its own: pointers mean nothing to it."""
        return type(None), ()


def lay_out(kernels: native.Library, layer: Any, linear: native.Linear, at: int) -> None:
    """Weights, scales and zero points of a layer as panels, at an address with room for them."""
    weight, threads = _weight(layer).contiguous(), torch.get_num_threads()
    row_bytes = weight.shape[1] * weight.element_size()
    sizes = linear.kind, linear.inputs, linear.outputs
    linear.weight = at
    kernels.pack_panels(
        linear.kind, weight.data_ptr(), row_bytes, linear.inputs, linear.outputs, at, threads
    )
    if not isinstance(layer, QuantisedLinear):
        return
    groups = layer.format.groups(linear.inputs)
    linear.group, linear.fine = layer.format.group, int(layer.format.activation_bits == 16)
    linear.scale = at + kernels.panel_bytes(*sizes)
    scale = layer.weight_scale.contiguous()
    kernels.pack_scales(scale.data_ptr(), groups, linear.outputs, linear.scale)
    if layer.weight_zero_point is None:
        return
    linear.zeros = linear.scale + _channels(linear.outputs) * groups * 2
    zeros = layer.weight_zero_point.contiguous()
    kernels.pack_zeros(zeros.data_ptr(), groups, linear.outputs, linear.zeros)


def packs(layer: Any) -> bool:
    """Whether the kernels can read a layer's weights at all."""
    if isinstance(layer, QuantisedLinear):
        return True
    if not isinstance(layer, (nn.Linear, nn.Embedding)):  # an adapter around one, say
        return False
    return layer.weight.dtype in _KINDS and layer.weight.is_contiguous()


def floats_alone(layer: Any) -> bool:
    """Whether a layer's weights are float32, which are multiplied for single tokens only."""
    return _kind(layer) == native.FLOAT32


def _weight(layer: Any) -> Tensor:
    weight = layer.weight_packed if isinstance(layer, QuantisedLinear) else layer.weight
    found: Tensor = weight.detach()
    return found


def _kind(layer: Any) -> int:
    if isinstance(layer, QuantisedLinear):
        return native.INT8 if layer.format.bits == 8 else native.INT4
    return _KINDS[layer.weight.dtype]


def _inputs(layer: Any) -> int:
    if isinstance(layer, QuantisedLinear):
        return int(layer.in_features)
    return int(layer.weight.shape[1])


def device_of(layer: Any) -> torch.device:
    return _weight(layer).device


def outputs_of(layer: Any) -> int:
    return int(_weight(layer).shape[0])


def _channels(outputs: int) -> int:
    return -(-outputs // 16) * 16


def _size(kernels: native.Library, layer: Any) -> int:
    """Bytes of a layer as panels, with scales and zero points, rounded up to whole lines."""
    size = int(kernels.panel_bytes(_kind(layer), _inputs(layer), outputs_of(layer)))
    if isinstance(layer, QuantisedLinear):
        groups = layer.format.groups(layer.in_features)
        size += _channels(layer.out_features) * groups * 2
        if layer.weight_zero_point is not None:
            size += _channels(layer.out_features) * groups // 2
    return -(-size // _LINE) * _LINE
