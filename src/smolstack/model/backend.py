"""The interface between the PyTorch modules and faster implementations of them.

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
    """Computes parts of a model. This base class leaves everything to the modules of model/.

    A backend may take over individual calls: each method returns either the result, which must
    match the modules' up to rounding, or None to fall back to them. A backend keeps no state per
    model: one object may serve many models, and a copy of a model shares it.
    """

    name = "torch"

    def encode(self, layers: nn.ModuleList, config: VisionConfig, patches: Tensor) -> Tensor | None:
        """Run a tower's layers on the embedded patches of full tiles, (N, H·W, C)."""
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
        """Append tokens to a cache, as :meth:`VisionLanguageModel.prefill_embeddings` does."""
        return None

    def decode(
        self,
        decoder: Decoder,
        head: nn.Module,
        embeddings: Tensor,
        cache: KVCache | RaggedKVCache,
    ) -> Tensor | None:
        """Append one token per sequence to a cache: (B, D) → logits of the next tokens, (B, V)."""
        return None

    def linear(self, layer: nn.Module, rows: Tensor) -> Tensor | None:
        """Apply a quantized linear layer: (R, I) → (R, O), float32."""
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
        """Return an empty KV cache in the layout that suits this backend best."""
        return KVCache(config, batch, capacity, padding=padding, dtype=dtype, device=device)

    def describe(self, device: torch.device, dtype: torch.dtype, *, quantized: bool) -> str:
        """Return a human-readable name of what multiplies ``dtype`` weights on ``device``:
        "torch".
        """
        return "torch" if device.type == "cpu" else f"torch on {device.type}"

    def __deepcopy__(self, _memo: dict[int, Any]) -> Backend:
        return self

    def __reduce__(self) -> str | tuple[Any, ...]:
        return type(self), ()


TORCH = Backend()
