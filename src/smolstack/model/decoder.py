"""The decoder: a Llama model with grouped-query attention and rotary positions.

Shapes: B sequences, T new tokens, L tokens attended to (cached ones and new ones), D the hidden
size, K the head size, V the vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from smolstack.config import RopeConfig, TextConfig
from smolstack.model.kv_cache import KVCache, RaggedKVCache
from smolstack.model.layers import (
    ACTIVATION,
    RMSNorm,
    TokenEmbedding,
    merge_heads,
    split_heads,
)


def rope_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Rotary frequencies in radians per position, one per pair of channels: (K/2,) float32.

    theta^(-2i/K) (Su et al. 2021). "llama3" divides the frequencies whose wavelength exceeds
    original / low_freq_factor by ``factor``, keeps those shorter than original / high_freq_factor
    and interpolates between (Llama 3.1, Dubey et al. 2024).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.type == "linear":
        return frequencies / rope.factor
    if rope.type == "default":
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    low, high = rope.low_freq_factor, rope.high_freq_factor
    smooth = (rope.original_max_positions / wavelengths - low) / (high - low)
    blended = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    long = wavelengths > rope.original_max_positions / low
    short = wavelengths < rope.original_max_positions / high
    return torch.where(long, frequencies / rope.factor, torch.where(short, frequencies, blended))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the channel pairs (i, i + K/2) of (B, heads, T, K) by angles of shape (B, 1, T, K)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class TextAttention(nn.Module):
    """Causal self-attention with grouped queries: several query heads share a key/value head."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.num_heads, self.num_kv_heads = layer, config.num_heads, config.num_kv_heads
        width, bias = config.hidden_size, config.attention_bias
        self.query = nn.Linear(width, config.num_heads * config.head_dim, bias=bias)
        self.key = nn.Linear(width, config.num_kv_heads * config.head_dim, bias=bias)
        self.value = nn.Linear(width, config.num_kv_heads * config.head_dim, bias=bias)
        self.out = nn.Linear(config.num_heads * config.head_dim, width, bias=bias)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | list[Tensor | None] | None,
        cache: KVCache | RaggedKVCache | None,
    ) -> Tensor:
        query = rotate(split_heads(self.query(x), self.num_heads), cos, sin)
        key = rotate(split_heads(self.key(x), self.num_kv_heads), cos, sin)
        value = split_heads(self.value(x), self.num_kv_heads)
        if isinstance(mask, list):
            assert isinstance(cache, RaggedKVCache)
            of_each: Tensor = self.out(merge_heads(self._ragged(query, key, value, mask, cache)))
            return of_each
        if cache is not None:
            assert isinstance(cache, KVCache)
            key, value = cache.append(self.layer, key, value)
        out: Tensor = self.out(merge_heads(self._attend(query, key, value, mask)))
        return out

    def _ragged(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        masks: list[Tensor | None],
        cache: RaggedKVCache,
    ) -> Tensor:
        """Attend each sequence's new tokens, (1, heads, ΣT, K) together, to its own cache."""
        parts = zip(
            *(torch.split(x, cache.counts, dim=2) for x in (query, key, value)), strict=True
        )
        mixed = []
        for own, (q, k, v), mask in zip(cache.caches, parts, masks, strict=True):
            mixed.append(self._attend(q, *own.append(self.layer, k, v), mask))
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, new, width = query.shape
        key, value = (
            key.to(query.dtype),
            value.to(query.dtype),
        )  # the cache may use a narrower dtype
        if new == 1:
            # A single new token attends to everything, so a group's query heads can be placed on
            # the query axis, which avoids repeating keys and values.
            grouped = query.view(batch, self.num_kv_heads, -1, width)
            mixed = functional.scaled_dot_product_attention(grouped, key, value, attn_mask=mask)
            return mixed.reshape(
                batch, heads, 1, width
            )  # CUDA's float32 kernel returns a non-contiguous tensor
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )


class TextLayer(nn.Module):
    """Pre-norm layer: x + attention(norm(x)), then x + down(act(gate) · up)(norm(x))."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.attention_norm = RMSNorm(width, config.rms_norm_eps)
        self.attention = TextAttention(config, layer)
        self.mlp_norm = RMSNorm(width, config.rms_norm_eps)
        self.gate = nn.Linear(width, inner, bias=bias)
        self.up = nn.Linear(width, inner, bias=bias)
        self.down = nn.Linear(inner, width, bias=bias)
        self.activation = ACTIVATION[config.hidden_act]

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | list[Tensor | None] | None,
        cache: KVCache | RaggedKVCache | None,
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, mask, cache)
        hidden = self.mlp_norm(x)
        out: Tensor = x + self.down(self.activation(self.gate(hidden)) * self.up(hidden))
        return out


class Decoder(nn.Module):
    """Token embedding, layers and final norm. The output head belongs to the model in vlm.py."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TextLayer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        embeddings: Tensor,
        padding: Tensor | None = None,
        cache: KVCache | RaggedKVCache | None = None,
    ) -> Tensor:
        """Compute the normalized hidden states of the new tokens: (B, T, D) → (B, T, D).

        Args:
            embeddings: (B, T, D), text embeddings with visual tokens already merged.
            padding: (B,) left-padding tokens per row, if there is no cache (a cache holds its own).
            cache: appended to; the new tokens follow the cached ones. With a RaggedKVCache the
                embeddings are (1, ΣT, D): the new tokens of all its sequences.
        """
        if isinstance(cache, RaggedKVCache):
            return self._ragged(embeddings, cache)
        if cache is not None:
            padding = cache.padding
        past = 0 if cache is None else cache.length
        new = embeddings.shape[1]
        cos, sin = self.angles(past, new, padding, embeddings)
        mask = attention_mask(past, new, padding, embeddings.device)
        x = embeddings
        for layer in self.layers:
            x = layer(x, cos, sin, mask, cache)
        if cache is not None:
            cache.advance(new)
        out: Tensor = self.norm(x)
        return out

    def _ragged(self, embeddings: Tensor, cache: RaggedKVCache) -> Tensor:
        positions = cache.positions().to(embeddings.device)
        cos, sin = self.angles_at(positions[None], embeddings)
        masks = [
            attention_mask(own.length, count, None, embeddings.device)
            for own, count in zip(cache.caches, cache.counts, strict=True)
        ]
        x = embeddings
        for layer in self.layers:
            x = layer(x, cos, sin, masks, cache)
        cache.advance()
        out: Tensor = self.norm(x)
        return out

    def angles(
        self, past: int, new: int, padding: Tensor | None, like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return cos and sin for the new tokens: (B or 1, 1, T, K), in the dtype of ``like``."""
        positions = torch.arange(past, past + new, device=like.device)[None]
        if padding is not None:
            positions = (positions - padding.to(like.device)[:, None]).clamp(min=0)
        return self.angles_at(positions, like)

    def angles_at(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin at positions (B or 1, T): (B or 1, 1, T, K), in the dtype of
        ``like``.
        """
        frequencies = rope_frequencies(self.config.rope, self.config.head_dim).to(like.device)
        angles = positions[..., None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def attention_mask(
    past: int, new: int, padding: Tensor | None, device: torch.device
) -> Tensor | None:
    """Boolean attention mask (B or 1, 1, T, L), True where attention is allowed.

    Returns None if no mask or only the kernel's causal mask is needed. A padding token may attend
    to itself, because a row with nothing to attend to would divide by zero.
    """
    if padding is None and (past == 0 or new == 1):
        return None
    keys = torch.arange(past + new, device=device)
    queries = torch.arange(past, past + new, device=device)
    causal = keys[None, :] <= queries[:, None]
    if padding is None:
        return causal[None, None]
    real = keys[None, :] >= padding.to(device)[:, None]
    itself = keys[None, :] == queries[:, None]
    return ((causal[None] & real[:, None, :]) | itself[None])[:, None]
