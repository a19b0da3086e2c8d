"""The CPU backend: decides which calls the compiled kernels take, and keeps packed weights."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from smolstack.backends.cpu.decoder import NativeDecoder, native_decoder, suits
from smolstack.backends.cpu.encoder import NativeEncoder, native_encoder
from smolstack.backends.cpu.linear import multiply
from smolstack.backends.cpu.recognise import PlainDecoder, is_plain
from smolstack.config import VisionConfig
from smolstack.model.backend import Backend
from smolstack.model.decoder import Decoder
from smolstack.model.kv_cache import KVCache, RaggedKVCache
from smolstack.model.quantized import QuantizedLinear
from smolstack.native import library as native


class CpuBackend(Backend):
    """Runs CPU computations with the compiled kernels, if available; torch does the rest.

    Weights are packed when a model is first computed, and again after its weights or modules
    change.
    """

    name = "cpu"

    def __init__(self) -> None:
        self._encoders: WeakKeyDictionary[nn.Module, NativeEncoder] = WeakKeyDictionary()
        self._decoders: WeakKeyDictionary[nn.Module, NativeDecoder | None] = WeakKeyDictionary()
        self._plain: WeakKeyDictionary[nn.Module, PlainDecoder] = WeakKeyDictionary()

    def encode(self, layers: nn.ModuleList, config: VisionConfig, patches: Tensor) -> Tensor | None:
        """Taken when no gradients are required and no module was replaced or has a hook."""
        if torch.is_grad_enabled() and any(p.requires_grad for p in layers.parameters()):
            return None
        if not is_plain(layers, config):
            return None
        encoder = self._encoders.get(layers)
        if encoder is None or not encoder.current():
            encoder = native_encoder(config, layers)
            if encoder is None:
                return None
            self._encoders[layers] = encoder
        return encoder(patches)

    def prefill(
        self,
        decoder: Decoder,
        head: nn.Module,
        embeddings: Tensor,
        cache: KVCache | RaggedKVCache,
        *,
        every: bool,
    ) -> Tensor | None:
        """Taken when no module was replaced or has a hook."""
        if not self._plain.setdefault(decoder, PlainDecoder()).check(decoder, head):
            return None
        kernels = self._decoder(decoder, head, embeddings, cache)
        return None if kernels is None else kernels.prefill(embeddings, cache, every=every)

    def decode(
        self,
        decoder: Decoder,
        head: nn.Module,
        embeddings: Tensor,
        cache: KVCache | RaggedKVCache,
    ) -> Tensor | None:
        """Taken as for prompts; modules replaced since the last prompt count from the next."""
        if not self._plain.setdefault(decoder, PlainDecoder()).still(decoder, head):
            return None
        kernels = self._decoder(decoder, head, embeddings, cache)
        return None if kernels is None else kernels(embeddings, cache)

    def linear(self, layer: nn.Module, rows: Tensor) -> Tensor | None:
        assert isinstance(layer, QuantizedLinear)
        kernels = native.library() if layer.device.type == "cpu" else None
        return None if kernels is None else multiply(kernels, layer, rows)

    def describe(self, device: torch.device, dtype: torch.dtype, *, quantized: bool) -> str:
        if device.type != "cpu":
            return super().describe(device, dtype, quantized=quantized)
        kernels = native.library()
        if kernels is None:
            return f"torch (no compiled kernels: {native.reason()})"
        if dtype == torch.float16:
            return "torch"
        return f"compiled kernels ({kernels.instructions})"

    def _decoder(
        self,
        decoder: Decoder,
        head: nn.Module,
        embeddings: Tensor,
        cache: KVCache | RaggedKVCache,
    ) -> NativeDecoder | None:
        """Return the compiled decoder if it supports these tokens."""
        held = cache.caches[0] if isinstance(cache, RaggedKVCache) else cache
        dtype = held.keys[0].dtype
        known = self._decoders.get(decoder)
        if (
            known is None
            or known.head is not head
            or known.cache_dtype != dtype
            or known.config is not decoder.config
            or not known.current()
        ):
            known = native_decoder(decoder, head, dtype)
            self._decoders[decoder] = known
        if known is None or not suits(embeddings, cache, dtype):
            return None
        return known


CPU = CpuBackend()
