"""The vision tower's layers on the compiled kernels.

model/vision.py defines the computation; :func:`native_encoder` decides where this replaces it.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from smolstack.backends.cpu.packed_model import PackedModel, device_of, linears_of, packs
from smolstack.config import VisionConfig
from smolstack.native import library as native


class NativeEncoder:
    """All layers between patch embedding and final norm, in the form the kernels read.

    Args:
        layers: VisionLayers; :meth:`current` reports whether their weights have changed.
    """

    def __init__(
        self, kernels: native.Library, config: VisionConfig, layers: nn.ModuleList
    ) -> None:
        self.kernels, self.hidden = kernels, config.hidden_size
        linears = [part for layer in layers for part in linears_of(layer)]
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
        """Whether the weights are unchanged since they were read."""
        return self._packed.current()

    def __call__(self, x: Tensor) -> Tensor:
        """Run embedded patches, (N, H·W, C), through all layers, in the dtype of ``x``."""
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
            raise MemoryError(f"cannot allocate memory for {x.shape[1]} patches of a tile")
        return states.to(x.dtype)

    def _layer(self, layer: Any) -> native.EncoderLayer:
        norms = [self._packed.layer_norm(norm) for norm in (layer.attention_norm, layer.mlp_norm)]
        return native.EncoderLayer(*norms, *(self._packed.linear(one) for one in linears_of(layer)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Not copied: a copy of the model builds its own."""
        return type(None), ()


def native_encoder(config: VisionConfig, layers: nn.ModuleList) -> NativeEncoder | None:
    """Build the layers for the kernels; None if they are unavailable or do not support them."""
    linears = [part for layer in layers for part in linears_of(layer)]
    if not all(packs(layer) and device_of(layer).type == "cpu" for layer in linears):
        return None
    kernels = native.library()
    if kernels is None:
        return None
    return NativeEncoder(kernels, config, layers)
