"""A single quantized layer on the compiled kernels, and the packing of its weights.

Shapes: R rows (tokens), I input channels, O output channels.
"""

from __future__ import annotations

import ctypes
import threading

import torch
from torch import Tensor

from smolstack.backends.cpu.packed_weights import Arena, PackedWeights, packed_size
from smolstack.model.quantized import QuantizedLinear
from smolstack.native import library as native

_PACKING = threading.Lock()  # prevents two concurrent first requests from both packing a layer
_NO_NORM = ctypes.byref(native.Norm(native.NO_NORM, 0.0, None, None))


def pack(
    kernels: native.Library, layer: QuantizedLinear, arena: Arena | None = None
) -> PackedWeights:
    """Pack a layer's weights for the kernels and release the originals.

    Args:
        arena: provides the memory; None: the layer allocates its own.
    """
    with _PACKING:
        if layer.is_packed:
            assert isinstance(layer.packed, PackedWeights)
            return layer.packed
        size = packed_size(kernels, layer.format, layer.in_features, layer.out_features)
        memory = (arena or Arena(kernels, size)).take(size)
        kept = layer.tensors()
        made = PackedWeights.of_words(kernels, layer.format, layer.in_features, kept, memory)
        for tensor in kept:
            if tensor is not None:  # pages of a mapped file
                kernels.release_pages(tensor.data_ptr(), tensor.nbytes)
        layer.hold(made)
        return made


def multiply(kernels: native.Library, layer: QuantizedLinear, rows: Tensor) -> Tensor:
    """Multiply by the layer's weights: (R, I) → (R, O), float32.

    Raises:
        MemoryError: no memory for the quantized activations.
    """
    bias = None if layer.bias is None else layer.bias.data_ptr()
    return multiply_rows(kernels, pack(kernels, layer).linear(bias), rows)


def multiply_rows(kernels: native.Library, linear: native.Linear, rows: Tensor) -> Tensor:
    """As :func:`multiply`, for a layer as the kernels read it."""
    rows = rows.detach().float().contiguous()
    out = torch.empty(rows.shape[0], linear.outputs)
    failed = kernels.dense_rows(
        ctypes.byref(linear),
        _NO_NORM,
        rows.data_ptr(),
        rows.shape[0],
        0,
        None,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"cannot allocate memory for {rows.shape[0]} rows of a linear layer")
    return out
