"""The seam between the network as PyTorch describes it and faster ways to compute it.

Shapes: B sequences, T new tokens, N tiles of H·W patches, C the vision hidden size, D the text
hidden size, V the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from smolstack.config import TextConfig, VisionConfig
from smolstack.model.decoder import Decoder
from smolstack.model.kv_cache import KVCache, RaggedKVCache


class Backend:
    """What computes a model. This one leaves everything to PyTorch and the modules of model/.

    A backend takes over one call at a time: each method returns the result, which must be the
    modules' up to rounding, or None for what it leaves to them. It is stateless towards its users:
    one object may serve many models, and a copy of a model shares it.
    """

    name = "torch"

    def encode(self, layers: nn.ModuleList, config: VisionConfig, patches: Tensor) -> Tensor | None:
        """Patches of full tiles with their positions, (N, H·W, C), through a tower's layers."""
        return None

    def prefill(
        self,
        decoder: Decoder,
        head: nn.Module,
        embeddings: Tensor,
        cache: KVCache | RaggedKVCache,
        *,
        every: bool,
    ) -> Tensor | None:
        """Append tokens to a cache: :meth:`VisionLanguageModel.read`."""
        return None

    def decode(
        self,
        decoder: Decoder,
        head: nn.Module,
        embeddings: Tensor,
        cache: KVCache | RaggedKVCache,
    ) -> Tensor | None:
        """Append one token per sequence to a cache: (B, D) → logits of the next ones, (B, V)."""
        return None

    def linear(self, layer: nn.Module, rows: Tensor) -> Tensor | None:
        """The product of a quantized layer: (R, I) → (R, O), float32."""
        return None

    def new_cache(
        self,
        config: TextConfig,
        batch: int,
        capacity: int,
        *,
        padding: Tensor | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVCache:
        """An empty KV cache of the kind that this backend fills fastest."""
        return KVCache(config, batch, capacity, padding=padding, dtype=dtype, device=device)

    def describe(self, device: torch.device, dtype: torch.dtype, *, quantized: bool) -> str:
        """What multiplies weights of ``dtype`` on ``device``, for people: "torch"."""
        return "torch" if device.type == "cpu" else f"torch on {device.type}"

    def __deepcopy__(self, _memo: dict[int, Any]) -> Backend:
        return self

    def __reduce__(self) -> str | tuple[Any, ...]:
        return type(self), ()


TORCH = Backend()
