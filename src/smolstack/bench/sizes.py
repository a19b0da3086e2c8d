"""Weights and operations of a model's parts, computed from its config."""

from __future__ import annotations

from smolstack.config import ModelConfig


def tower(config: ModelConfig) -> int:
    """Weights of the vision tower's layers."""
    vision = config.vision
    attention = 4 * vision.hidden_size**2
    return vision.num_layers * (attention + 2 * vision.hidden_size * vision.intermediate_size)


def tower_flops(config: ModelConfig) -> int:
    """Operations for one full tile: linear layers, attention scores and weighted sums."""
    vision, patches = config.vision, config.vision.side**2
    attention = 4 * patches**2 * vision.hidden_size * vision.num_layers
    return 2 * patches * tower(config) + attention


def connector(config: ModelConfig) -> int:
    """Weights of the connector."""
    return config.vision.hidden_size * config.scale**2 * config.text.hidden_size


def layers(config: ModelConfig) -> int:
    """Weights of the decoder's layers."""
    text = config.text
    heads = 2 * (text.num_heads + text.num_kv_heads) * text.head_dim
    return text.num_layers * text.hidden_size * (heads + 3 * text.intermediate_size)


def decoder(config: ModelConfig) -> int:
    """Weights read per decoded token: the decoder's layers and the head."""
    return layers(config) + config.text.vocab_size * config.text.hidden_size


def prefill_flops(config: ModelConfig, tokens: int) -> int:
    """Operations of a prompt: linear layers, causal attention, and the head once."""
    text = config.text
    attention = 2 * tokens**2 * text.num_heads * text.head_dim * text.num_layers
    head = 2 * text.vocab_size * text.hidden_size
    return 2 * tokens * layers(config) + attention + head


def cache_bytes(config: ModelConfig, tokens: int, itemsize: int) -> int:
    """Bytes of keys and values of the given number of tokens."""
    text = config.text
    return 2 * text.num_layers * text.num_kv_heads * text.head_dim * tokens * itemsize
