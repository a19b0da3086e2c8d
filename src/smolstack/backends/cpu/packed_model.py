"""A tower's weights packed for the compiled kernels, in one block of memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from smolstack.backends.cpu.linear import pack
from smolstack.backends.cpu.packed_weights import Arena, packed_size, whole_lines
from smolstack.model.quantized import QuantizedLinear
from smolstack.model.weight_changes import WeightsSnapshot
from smolstack.native import library as native

_KINDS = {torch.float32: native.FLOAT32, torch.bfloat16: native.BFLOAT16}


class PackedModel:
    """Linear layers and norms of a model in the form the kernels read.

    Args:
        layers: the linear layers that :meth:`linear` will be called with; bfloat16 and quantized
            ones are packed here.
        whole: the module that contains them.
    """

    def __init__(self, kernels: native.Library, layers: Iterable[Any], whole: nn.Module) -> None:
        self.kernels = kernels
        self._kept: list[Tensor] = []  # keeps alive the tensors that the structures point to
        self._read = WeightsSnapshot()
        self._read.add_modules(whole)
        self._arena = Arena(kernels, sum(_size(kernels, layer) for layer in layers))

    def current(self) -> bool:
        """Whether all modules and weights are unchanged since they were read.

        An adapter wrapped around a layer counts as a change: it replaces the layer.
        """
        return self._read.unchanged()

    def linear(self, layer: Any) -> native.Linear:
        """A linear layer, with its weights packed unless they are float32."""
        bias = getattr(layer, "bias", None)
        bias_at = None if bias is None else self.floats(bias)
        if isinstance(layer, QuantizedLinear):
            packed = pack(self.kernels, layer, self._arena)
            self._kept.append(packed.memory)
            self._note(layer)
            return packed.linear(bias_at)
        self._note(layer)
        weight = layer.weight.detach()
        linear = native.Linear(_KINDS[weight.dtype], weight.shape[1], weight.shape[0])
        linear.bias = bias_at
        if linear.kind == native.FLOAT32:
            linear.weight = self.floats(weight)
            return linear
        memory = self._arena.take(_size(self.kernels, layer))
        self._kept.append(memory)
        linear.weight = memory.data_ptr()
        sizes = weight.shape[1], weight.shape[0], linear.weight, torch.get_num_threads()
        self.kernels.pack_panels(linear.kind, weight.data_ptr(), weight.shape[1] * 2, *sizes)
        self.kernels.release_pages(weight.data_ptr(), weight.nbytes)
        return linear

    def floats(self, tensor: Tensor) -> int:
        """Address of a tensor as float32, without a copy if it is float32 already."""
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
        quantized = isinstance(module, QuantizedLinear)
        self._read.add_tensor(module, "weight_packed" if quantized else "weight")
        if getattr(module, "bias", None) is not None:
            self._read.add_tensor(module, "bias")

    def __reduce__(self) -> tuple[Any, ...]:
        """Not copied: pointers are meaningless in a copy of the model, which builds its own."""
        return type(None), ()


def linears_of(layer: Any) -> list[Any]:
    """Return the linear modules of a layer of either tower, in the order that the kernels read."""
    attention = [getattr(layer.attention, name) for name in ("query", "key", "value", "out")]
    gate = [layer.gate] if hasattr(layer, "gate") else []
    return [*attention, *gate, layer.up, layer.down]


def packs(layer: Any) -> bool:
    """Whether the kernels can read a layer's weights."""
    if isinstance(layer, QuantizedLinear):
        return True
    if not isinstance(layer, (nn.Linear, nn.Embedding)):  # for example an adapter around one
        return False
    if type(layer._parameters.get("weight")) is not nn.Parameter:  # computed, or quantized
        return False
    return layer.weight.dtype in _KINDS and layer.weight.is_contiguous()


def device_of(layer: Any) -> torch.device:
    """Device of a layer's weights."""
    found: torch.device = (
        layer.device if isinstance(layer, QuantizedLinear) else layer.weight.device
    )
    return found


def outputs_of(layer: Any) -> int:
    """Output channels of a linear layer, or of a token embedding used as one."""
    return int(layer.out_features if isinstance(layer, QuantizedLinear) else layer.weight.shape[0])


def _size(kernels: native.Library, layer: Any) -> int:
    """Bytes that a layer still needs, rounded up to whole cache lines."""
    if isinstance(layer, QuantizedLinear):
        if layer.is_packed:
            return 0
        return packed_size(kernels, layer.format, layer.in_features, layer.out_features)
    if layer.weight.dtype == torch.float32:
        return 0
    outputs, inputs = layer.weight.shape
    return whole_lines(int(kernels.panel_bytes(_KINDS[layer.weight.dtype], inputs, outputs)))
