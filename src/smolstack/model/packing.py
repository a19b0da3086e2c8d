"""Weights laid out anew for the compiled kernels: all of a tower's in one piece of memory.

A pass over a decoder's weights touches every page of them once a token, so they lie in one piece
that the system may back with large pages, in the order in which they are read.
"""

from __future__ import annotations

from collections.abc import Iterable
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
        layers: the linear layers that :meth:`linear` will be asked for; on processors where the
            kernels take panels, those that are bfloat16 or quantised are laid out anew here.
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
        self._origins: list[tuple[dict[str, Any], Tensor, int, int]] = []
        layers = [layer for layer in layers if kernels.panels and _kind(layer) != native.FLOAT32]
        size = sum(self._size(layer) for layer in layers)
        self._memory = torch.empty(size + _LINE, dtype=torch.uint8)
        kernels.want_large_pages(self._memory.data_ptr(), size)
        self._free = -(-self._memory.data_ptr() // _LINE) * _LINE

    def current(self) -> bool:
        """Whether all parts and weights are still the ones that were read.

        An adapter put around a layer takes that layer's place.
        """
        # Asked before every token: the modules' own tables are several times as fast as attributes.
        return all(parts.get(name) is part for parts, name, part in self._parts) and all(
            table["weight"] is weight
            and weight.data_ptr() == address
            and (version < 0 or weight._version == version)
            for table, weight, address, version in self._origins
        )

    def linear(self, layer: Any) -> native.Linear:
        """A linear layer, its weights as panels where the kernels take them so."""
        self._note(layer)
        kind, weight = _kind(layer), layer.weight.detach()
        panels = self.kernels.panels and kind != native.FLOAT32
        if isinstance(layer, QuantisedLinear) and not panels:
            return layer.struct(self.kernels)
        outputs, inputs = weight.shape[0], _inputs(layer)
        address, scale = self._floats_or_own(weight, kind), None
        if isinstance(layer, QuantisedLinear):
            scale = layer.weight_scale
            self._kept.append(scale)
        scale_address = None if scale is None else scale.data_ptr()
        if panels:
            address = self._take(self.kernels.panel_bytes(kind, inputs, outputs))
            weight = weight.contiguous()
            self.kernels.pack_panels(kind, weight.data_ptr(), inputs, outputs, address)
            self.kernels.put_aside(weight.data_ptr(), weight.nbytes)
            if kind == native.INT4 and scale is not None:
                scale_address = self._take(_scale_bytes(layer))
                self.kernels.pack_scales(
                    scale.contiguous().data_ptr(), scale.shape[1], outputs, scale_address
                )
        bias = getattr(layer, "bias", None)
        return native.Linear(
            kind,
            inputs,
            outputs,
            int(panels),
            address,
            scale_address,
            None,
            None if bias is None else self.floats(bias),
        )

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

    def _floats_or_own(self, weight: Tensor, kind: int) -> int:
        if kind == native.FLOAT32:
            return self.floats(weight)
        self._kept.append(weight)
        return weight.data_ptr()

    def _note(self, module: Any) -> None:
        weight = module.weight
        table = module._parameters if "weight" in module._parameters else module._buffers
        version = -1 if weight.is_inference() else weight._version  # which inference does not count
        self._origins.append((table, weight, weight.data_ptr(), version))

    def _size(self, layer: Any) -> int:
        size = self.kernels.panel_bytes(_kind(layer), _inputs(layer), layer.weight.shape[0])
        if _kind(layer) == native.INT4:
            size += _scale_bytes(layer)
        return int(size)

    def _take(self, size: int) -> int:
        address = self._free
        self._free += size
        return address

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the model makes its own: pointers mean nothing to it."""
        return type(None), ()


def packs(layer: Any) -> bool:
    """Whether the kernels can read a layer's weights at all."""
    if isinstance(layer, QuantisedLinear):
        return True
    if not isinstance(layer, (nn.Linear, nn.Embedding)):  # an adapter around one, say
        return False
    return layer.weight.dtype in _KINDS and layer.weight.is_contiguous()


def _kind(layer: Any) -> int:
    if isinstance(layer, QuantisedLinear):
        return native.INT8 if layer.bits == 8 else native.INT4
    return _KINDS[layer.weight.dtype]


def _inputs(layer: Any) -> int:
    if isinstance(layer, QuantisedLinear):
        return int(layer.in_features)
    return int(layer.weight.shape[1])


def _scale_bytes(layer: Any) -> int:
    outputs, groups = layer.weight_scale.shape
    return -(-int(outputs) // 16) * 16 * int(groups) * 2
