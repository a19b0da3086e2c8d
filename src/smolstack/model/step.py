"""One new token through the whole decoder by the compiled kernels: decoder.py's results, faster.

decoder.py stays the description; :func:`native_decoder` says where this takes its place.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smolstack.model.cache import CacheRows, KVCache
from smolstack.model.decoder import Decoder, TextLayer, rope_frequencies
from smolstack.model.quantised import QuantisedLinear
from smolstack.native import library as native

_KINDS = {torch.float32: native.FLOAT32, torch.bfloat16: native.BFLOAT16}
_CACHES = {torch.float32: native.CACHE_FLOAT32, torch.float16: native.CACHE_FLOAT16}
_PARTS = ("query", "key", "value", "out")
_MOST_ROWS = 64  # beyond it torch's matrix products are as good


class NativeDecoder:
    """The decoder and its head as the kernels read them.

    Args:
        decoder: its tensors must stay where they are; :meth:`current` tells whether they have.
        head: (D → V).
        cache_dtype: of the keys and values that it will be given.
    """

    def __init__(
        self,
        kernels: native.Library,
        decoder: Decoder,
        head: Any,
        cache_dtype: torch.dtype,
    ) -> None:
        config = decoder.config
        self.kernels, self.cache_dtype = kernels, cache_dtype
        self.hidden, self.vocabulary = config.hidden_size, head.weight.shape[0]
        self._kept: list[Tensor] = []  # what the structures point into
        self._origins: list[tuple[Any, int]] = []
        layers = [self._layer(layer) for layer in decoder.layers if isinstance(layer, TextLayer)]
        self._layers = (native.Layer * len(layers))(*layers)
        frequencies = rope_frequencies(config.rope, config.head_dim).contiguous()
        self._kept.append(frequencies)
        self._struct = native.Decoder(
            len(layers),
            config.hidden_size,
            config.intermediate_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            native.ACTIVATIONS[config.hidden_act],
            _CACHES[cache_dtype],
            config.rms_norm_eps,
            frequencies.data_ptr(),
            self._norm(decoder.norm),
            ctypes.addressof(self._layers),
            self._linear(head),
        )

    def current(self) -> bool:
        """Whether the decoder's tensors are still the ones that were read."""
        return all(layer.weight.data_ptr() == origin for layer, origin in self._origins)

    def __call__(self, embeddings: Tensor, cache: KVCache | CacheRows) -> Tensor:
        """Append one token per row to ``cache``; logits of the next: (B, D) → (B, V)."""
        rows = embeddings.shape[0]
        embeddings = embeddings.float().contiguous()
        logits = torch.empty(rows, self.vocabulary)
        places, keys, values = _places(cache, rows)
        failed = self.kernels.decode_step(
            ctypes.addressof(self._struct),
            rows,
            ctypes.addressof(places),
            ctypes.addressof(keys),
            ctypes.addressof(values),
            embeddings.data_ptr(),
            logits.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"no memory for one more token of {rows} sequences")
        cache.advance(1)
        return logits

    def _layer(self, layer: TextLayer) -> native.Layer:
        parts = [self._linear(getattr(layer.attention, name)) for name in _PARTS]
        parts += [self._linear(part) for part in (layer.gate, layer.up, layer.down)]
        return native.Layer(self._norm(layer.attention_norm), self._norm(layer.mlp_norm), *parts)

    def _linear(self, layer: Any) -> native.Linear:
        self._origins.append((layer, layer.weight.data_ptr()))
        if isinstance(layer, QuantisedLinear):
            return layer.struct(self.kernels)
        weight = layer.weight
        bias = getattr(layer, "bias", None)
        return native.Linear(
            _KINDS[weight.dtype],
            weight.shape[1],
            weight.shape[0],
            weight.data_ptr(),
            None,
            None,
            None if bias is None else self._floats(bias),
        )

    def _norm(self, norm: Any) -> int:
        self._origins.append((norm, norm.weight.data_ptr()))
        return self._floats(norm.weight)

    def _floats(self, tensor: Tensor) -> int:
        """Address of a tensor as float32; its own where that is what it is."""
        kept = tensor.detach().float().contiguous()
        self._kept.append(kept)
        return kept.data_ptr()


def native_decoder(decoder: Decoder, head: Any, cache_dtype: torch.dtype) -> NativeDecoder | None:
    """The decoder for the kernels; None where they are not there or do not suit it."""
    config, weight = decoder.config, head.weight
    if weight.device.type != "cpu" or config.head_dim % 8 or config.hidden_size % 8:
        return None
    if cache_dtype not in _CACHES or config.hidden_act not in native.ACTIVATIONS:
        return None
    linears = [m for m in decoder.layers.modules() if isinstance(m, nn.Linear)]
    if any(m.weight.dtype not in _KINDS or not m.weight.is_contiguous() for m in linears):
        return None
    if not isinstance(head, QuantisedLinear) and weight.dtype not in _KINDS:
        return None
    # The compiled step does not reproduce decoder.py with 4-bit layers yet: those go one by one.
    quantised = [m for m in decoder.layers.modules() if isinstance(m, QuantisedLinear)]
    if any(m.bits == 4 for m in (*quantised, head) if isinstance(m, QuantisedLinear)):
        return None
    kernels = native.library()
    return None if kernels is None else NativeDecoder(kernels, decoder, head, cache_dtype)


def suits(embeddings: Tensor, cache: KVCache | CacheRows, dtype: torch.dtype) -> bool:
    """Whether one step's rows and caches are what the kernels take."""
    held = cache.caches if isinstance(cache, CacheRows) else [cache]
    return (
        embeddings.shape[0] <= _MOST_ROWS
        and not embeddings.requires_grad
        and all(one.length < one.capacity and one.keys[0].dtype == dtype for one in held)
    )


def _places(
    cache: KVCache | CacheRows, rows: int
) -> tuple[
    ctypes.Array[native.Place], ctypes.Array[ctypes.c_void_p], ctypes.Array[ctypes.c_void_p]
]:
    """Where every row stands, and its buffers, layer by layer."""
    if isinstance(cache, CacheRows):
        places = [native.Place(one.length, one.capacity, 0) for one in cache.caches]
        keys = [buffer.data_ptr() for one in cache.caches for buffer in one.keys]
        values = [buffer.data_ptr() for one in cache.caches for buffer in one.values]
    else:
        first = [0] * rows if cache.padding is None else cache.padding.tolist()
        places = [native.Place(cache.length, cache.capacity, padding) for padding in first]
        keys, values = _of_rows(cache.keys, rows), _of_rows(cache.values, rows)
    pointers = ctypes.c_void_p * len(keys)
    return (native.Place * rows)(*places), pointers(*keys), pointers(*values)


def _of_rows(buffers: Sequence[Tensor], rows: int) -> list[int]:
    starts = [buffer.data_ptr() for buffer in buffers]
    stride = buffers[0].stride(0) * buffers[0].element_size()
    return [start + row * stride for row in range(rows) for start in starts]
