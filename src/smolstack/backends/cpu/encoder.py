"""The vision tower's layers by the compiled kernels: vision.py's results, faster.

model/vision.py is the description; :func:`native_encoder` says where this takes its place.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from smolstack.backends.cpu.packed_model import PackedModel, device_of, floats_alone, packs
from smolstack.config import VisionConfig
from smolstack.native import library as native

_ATTENTION = ("query", "key", "value", "out")


class NativeEncoder:
    """All layers between patch embedding and last norm, as the kernels read them.

    Args:
        layers: VisionLayers, whose weights must stay as they are; :meth:`current` tells.
    """

    def __init__(
        self, kernels: native.Library, config: VisionConfig, layers: nn.ModuleList
    ) -> None:
        self.kernels, self.hidden = kernels, config.hidden_size
        linears = [part for layer in layers for part in _linears(layer)]
        self._packed = PackedModel(kernels, linears, layers)
        made = [self._layer(layer) for layer in layers]
        self._layers = (native.EncoderLayer * len(made))(*made)
        self._struct = native.Encoder(
            len(layers),
            config.hidden_size,
            config.num_heads,
            native.ACTIVATIONS[config.hidden_act],
            ctypes.addressof(self._layers),
        )

    def current(self) -> bool:
        """Whether the weights are still the ones that were read."""
        return self._packed.current()

    def __call__(self, x: Tensor) -> Tensor:
        """Patches with their positions, (N, H·W, C), through all layers, in the dtype of ``x``."""
        states = torch.empty(x.shape, dtype=torch.float32)
        states.copy_(x)
        failed = self.kernels.encode_tiles(
            ctypes.addressof(self._struct),
            x.shape[0],
            x.shape[1],
            states.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"no memory for {x.shape[1]} patches of a tile")
        return states.to(x.dtype)

    def _layer(self, layer: Any) -> native.EncoderLayer:
        norms = [self._packed.layer_norm(norm) for norm in (layer.attention_norm, layer.mlp_norm)]
        return native.EncoderLayer(*norms, *(self._packed.linear(one) for one in _linears(layer)))

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the model makes its own."""
        return type(None), ()


def native_encoder(config: VisionConfig, layers: nn.ModuleList) -> NativeEncoder | None:
    """The layers for the kernels; None where they are not there or do not suit them."""
    linears = [part for layer in layers for part in _linears(layer)]
    if any(device_of(layer).type != "cpu" for layer in linears):
        return None
    kernels = native.library()
    if kernels is None or not all(packs(layer) and not floats_alone(layer) for layer in linears):
        return None
    return NativeEncoder(kernels, config, layers)


def _linears(layer: Any) -> list[Any]:
    """A layer's linear parts in the order in which they are read."""
    attention = [getattr(layer.attention, name) for name in _ATTENTION]
    return [*attention, layer.up, layer.down]
