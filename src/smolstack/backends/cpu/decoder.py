"""The whole decoder on the compiled kernels, for prompts and single tokens.

model/decoder.py defines the computation; :func:`native_decoder` decides where this replaces it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from smolstack.backends.cpu.packed_model import (
    PackedModel,
    device_of,
    linears_of,
    outputs_of,
    packs,
)
from smolstack.model.decoder import Decoder, TextLayer, rope_frequencies
from smolstack.model.kv_cache import KVCache, RaggedKVCache
from smolstack.native import library as native

_CACHES = {
    torch.float32: native.CACHE_FLOAT32,
    torch.float16: native.CACHE_FLOAT16,
    torch.bfloat16: native.CACHE_BFLOAT16,
}
MOST_WIDTH = 512  # maximum channels of a head (smolstack.h)
_MOST_QUERIES = 16384  # maximum channels of all query heads that share a key head
_TOKENS = 1024  # prompt tokens per pass
# Each row's cache position, and its key and value buffers, layer by layer.
_Pointers: TypeAlias = "ctypes.Array[ctypes.c_void_p]"
_Held: TypeAlias = "tuple[ctypes.Array[native.CacheSlot], _Pointers, _Pointers]"
_MOST_ROWS = 64  # beyond it torch's matrix products are as fast


class NativeDecoder:
    """The decoder and its head in the form the kernels read.

    Args:
        decoder: its weights must not change; :meth:`current` reports whether they did.
        head: (D → V).
        cache_dtype: dtype of the keys and values of the caches.
    """

    def __init__(
        self,
        kernels: native.Library,
        decoder: Decoder,
        head: Any,
        cache_dtype: torch.dtype,
    ) -> None:
        self.config = config = decoder.config
        self.kernels, self.cache_dtype, self.norm = kernels, cache_dtype, decoder.norm
        self.hidden, self.vocabulary = config.hidden_size, outputs_of(head)
        layers = [layer for layer in decoder.layers if isinstance(layer, TextLayer)]
        self.head = head
        linears = [part for layer in layers for part in linears_of(layer)]
        self._packed = PackedModel(kernels, [*linears, head], decoder)
        made = [self._layer(layer) for layer in layers]
        self._layers = (native.Layer * len(made))(*made)
        frequencies = rope_frequencies(config.rope, config.head_dim)
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
            self._packed.floats(frequencies),
            self._packed.norm(decoder.norm),
            ctypes.addressof(self._layers),
            self._packed.linear(head),
        )

    def current(self) -> bool:
        """Whether the decoder's weights are unchanged since they were read."""
        return self._packed.current()

    def __call__(self, embeddings: Tensor, cache: KVCache | RaggedKVCache) -> Tensor:
        """Append one token per row to ``cache`` and return the next logits: (B, D) → (B, V)."""
        rows = embeddings.shape[0]
        embeddings = embeddings.float().contiguous()
        logits = torch.empty(rows, self.vocabulary)
        slots, keys, values = _slots(cache, rows)
        failed = self.kernels.decode_step(
            ctypes.addressof(self._struct),
            rows,
            ctypes.addressof(slots),
            ctypes.addressof(keys),
            ctypes.addressof(values),
            embeddings.data_ptr(),
            logits.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"cannot allocate memory for a decode step of {rows} sequences")
        _advance(cache, 1)
        return logits

    def prefill(
        self, embeddings: Tensor, cache: KVCache | RaggedKVCache, *, every: bool = False
    ) -> Tensor:
        """Append T tokens per row to ``cache`` and return logits.

        (B, T, D) → (B, V), logits of the next token, or (B, T, V), logits after each token. With a
        RaggedKVCache (1, ΣT, D) → (R, V) or (1, ΣT, V).

        Each row starts at its own first token, so padding has no effect. Rows with few tokens are
        processed together, to share the reads of the weights.
        """
        rows, new, _ = embeddings.shape
        if isinstance(cache, RaggedKVCache):
            counts = cache.counts
            slots, keys, values = _slots(cache, len(counts))
            states = torch.cat(
                [
                    self._prefill(some, part, (slots, keys, values))
                    for some, part in _split(counts, embeddings[0].float())
                ]
            )
            _advance(cache, new)
            if not every:
                ends = torch.tensor(counts).cumsum(0) - 1
                return self._head(states[ends])
            return self._head(states)[None]
        slots, keys, values = _slots(cache, rows)
        own = [
            native.CacheSlot(max(p.past, p.first), p.capacity, p.first) for p in slots
        ]  # skip the row's padding
        counts = [new - max(0, p.first - p.past) for p in slots]
        tokens = torch.cat(
            [embeddings[row, new - count :].float() for row, count in enumerate(counts)]
        )
        held = ((native.CacheSlot * rows)(*own), keys, values)
        states = torch.zeros(rows, new, self.hidden)
        for some, part in _split(counts, tokens):
            done = torch.split(self._prefill(some, part, held), list(some.values()))
            for (row, count), of_row in zip(some.items(), done, strict=True):
                states[row, new - count :] = of_row
        cache.advance(new)
        if not every:
            states = states[:, -1].contiguous()
        return self._head(states.view(-1, self.hidden)).view(*states.shape[:-1], -1)

    def _prefill(self, rows: dict[int, int], tokens: Tensor, held: _Held) -> Tensor:
        """Return the last states of some rows' new tokens: (ΣT, D) → (ΣT, D).

        The tokens are concatenated row by row; ``rows`` gives each row's count.
        """
        (slots, keys, values), layers = held, len(self._layers)
        states = tokens.clone(memory_format=torch.contiguous_format)  # written in place
        of_rows = [row * layers + layer for row in rows for layer in range(layers)]
        pointers = ctypes.c_void_p * len(of_rows)
        failed = self.kernels.prefill_rows(
            ctypes.addressof(self._struct),
            len(rows),
            (ctypes.c_int64 * len(rows))(*rows.values()),
            (native.CacheSlot * len(rows))(*(slots[row] for row in rows)),
            pointers(*(keys[at] for at in of_rows)),
            pointers(*(values[at] for at in of_rows)),
            states.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"cannot allocate memory for a prompt of {len(states)} tokens")
        return states

    def _head(self, states: Tensor) -> Tensor:
        """Apply the final norm and the head: (R, D) → (R, V)."""
        norm = native.Norm(native.RMS_NORM, self._struct.norm_eps, self._struct.norm, None)
        logits = torch.empty(states.shape[0], self.vocabulary)
        failed = self.kernels.dense_rows(
            ctypes.addressof(self._struct) + native.Decoder.head.offset,
            ctypes.addressof(norm),
            states.data_ptr(),
            states.shape[0],
            native.ACTIVATIONS[""],
            None,
            logits.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"cannot allocate memory for the logits of {states.shape[0]} tokens")
        return logits

    def _layer(self, layer: TextLayer) -> native.Layer:
        norms = [self._packed.norm(norm) for norm in (layer.attention_norm, layer.mlp_norm)]
        return native.Layer(*norms, *(self._packed.linear(part) for part in linears_of(layer)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Not copied: a copy of the model builds its own."""
        return type(None), ()


def native_decoder(decoder: Decoder, head: Any, cache_dtype: torch.dtype) -> NativeDecoder | None:
    """Build the decoder for the kernels; None if they are unavailable or do not support it."""
    config = decoder.config
    fits = (
        device_of(head).type == "cpu"
        and config.head_dim % 8 == 0
        and config.head_dim <= MOST_WIDTH
        and config.num_heads // config.num_kv_heads * config.head_dim <= _MOST_QUERIES
        and config.hidden_size % 8 == 0
        and cache_dtype in _CACHES
        and config.hidden_act in native.ACTIVATIONS
        and packs(head)
    )
    kernels = native.library() if fits else None
    if kernels is None:
        return None
    linears = [part for layer in decoder.layers for part in linears_of(layer)]
    if not all(packs(layer) for layer in linears):
        return None
    return NativeDecoder(kernels, decoder, head, cache_dtype)


def suits(embeddings: Tensor, cache: KVCache | RaggedKVCache, dtype: torch.dtype) -> bool:
    """Whether the kernels support this step's rows and caches."""
    held = cache.caches if isinstance(cache, RaggedKVCache) else [cache]
    return (
        embeddings.shape[0] <= _MOST_ROWS
        and not embeddings.requires_grad
        and all(one.length < one.capacity and one.keys[0].dtype == dtype for one in held)
    )


def _together(counts: Sequence[int]) -> Iterator[dict[int, int]]:
    """Group neighboring rows and their tokens into passes of about _TOKENS tokens."""
    some: dict[int, int] = {}
    for row, count in enumerate(counts):
        if some and sum(some.values()) + count > _TOKENS:
            yield some
            some = {}
        some[row] = count
    yield some


def _split(counts: Sequence[int], tokens: Tensor) -> Iterator[tuple[dict[int, int], Tensor]]:
    """Yield the rows of each pass with their tokens."""
    start = 0
    for some in _together(counts):
        end = start + sum(some.values())
        yield some, tokens[start:end]
        start = end


def _advance(cache: KVCache | RaggedKVCache, tokens: int) -> None:
    if isinstance(cache, RaggedKVCache):
        cache.advance()
    else:
        cache.advance(tokens)


def _slots(cache: KVCache | RaggedKVCache, rows: int) -> _Held:
    """Each row's cache position and its buffers, layer by layer."""
    if isinstance(cache, RaggedKVCache):
        slots = [native.CacheSlot(one.length, one.capacity, 0) for one in cache.caches]
        keys = [start for one in cache.caches for start in one.addresses[0]]
        values = [start for one in cache.caches for start in one.addresses[1]]
    else:
        first = [0] * rows if cache.padding is None else cache.padding.tolist()
        slots = [native.CacheSlot(cache.length, cache.capacity, padding) for padding in first]
        keys, values = _of_rows(cache.keys, rows), _of_rows(cache.values, rows)
    pointers = ctypes.c_void_p * len(keys)
    return (native.CacheSlot * rows)(*slots), pointers(*keys), pointers(*values)


def _of_rows(buffers: Sequence[Tensor], rows: int) -> list[int]:
    starts = [buffer.data_ptr() for buffer in buffers]
    stride = buffers[0].stride(0) * buffers[0].element_size()
    return [start + row * stride for row in range(rows) for start in starts]
