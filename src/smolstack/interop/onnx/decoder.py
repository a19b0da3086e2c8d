"""embed_tokens and decoder_model_merged as ONNX graphs.

Shapes: B sequences, T new tokens, P cached ones, L = P + T, D the hidden size, K the head size,
V the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from smolstack.config import ModelConfig, TextConfig
from smolstack.interop.onnx.graph import Graph, Precision, Value, rows_in_8_bits
from smolstack.interop.onnx.weights import Weights
from smolstack.model.decoder import rope_frequencies

BATCH, TOKENS = "batch_size", "sequence_length"  # names that transformers.js expects
CACHED, TOTAL = "past_sequence_length", "total_sequence_length"


def embed_tokens(graph: Graph, config: ModelConfig, weights: Weights) -> None:
    """input_ids (B, T) int64 → inputs_embeds (B, T, D) float32.

    In 8 bits, each row of the table has its own scale.
    """
    ids = graph.input("input_ids", np.int64, (BATCH, TOKENS))
    name = "decoder.embedding.weight"
    if graph.precision is Precision.int8:
        scale, codes = rows_in_8_bits(weights[name])
        rows = graph.op("Gather", graph.weight(f"{name}_quantized", codes, np.int8), ids)
        scales = graph.op("Gather", graph.weight(f"{name}_scale", scale), ids)
        out = graph.op("Mul", graph.cast(rows, np.float32), scales)
    else:
        out = graph.op("Gather", graph.weight(name, weights[name]), ids)
        if graph.type != np.float32:
            out = graph.cast(out, np.float32)
    graph.output("inputs_embeds", out, np.float32, (BATCH, TOKENS, config.text.hidden_size))


def decoder_model_merged(graph: Graph, config: ModelConfig, weights: Weights) -> None:
    """inputs_embeds, attention_mask, position_ids and the cache → logits and the extended cache.

    The same graph handles an empty cache (P = 0) and a filled one. ``attention_mask`` (B, L) is 1
    for real tokens and 0 for padding. If it is shorter than L, it refers to the last tokens, and
    all tokens before them are real (some common generation loops pass a mask of the new tokens
    only).
    """
    text = config.text
    embeds = graph.input("inputs_embeds", np.float32, (BATCH, TOKENS, text.hidden_size))
    mask = graph.input("attention_mask", np.int64, (BATCH, "attention_mask_length"))
    positions = graph.input("position_ids", np.int64, (BATCH, TOKENS))
    held = (BATCH, text.num_kv_heads, CACHED, text.head_dim)
    past = [
        tuple(
            graph.input(f"past_key_values.{layer}.{part}", graph.type.type, held)
            for part in ("key", "value")
        )
        for layer in range(text.num_layers)
    ]
    with graph.scope("mask"):
        bias = _bias(graph, embeds, mask, past[0][0])
    with graph.scope("positions"):
        shared = _Shared(graph, text, bias, _angles(graph, text, positions))
    x = embeds if graph.type == np.float32 else graph.cast(embeds, graph.type.type)
    present = []
    for layer in range(text.num_layers):
        with graph.scope(f"layers.{layer}"):
            of = weights.under(f"decoder.layers.{layer}")
            x, keys, values = _layer(shared, of, x, past[layer])
        present.append((keys, values))
    with graph.scope("head"):
        x = rms_norm(graph, x, weights.under("decoder"), "norm", text.rms_norm_eps)
        head = "decoder.embedding" if config.tied else "head"
        logits = graph.linear(x, head, weights[f"{head}.weight"])
        if graph.type != np.float32:
            logits = graph.cast(logits, np.float32)
    graph.output("logits", logits, np.float32, (BATCH, TOKENS, text.vocab_size))
    grown = (BATCH, text.num_kv_heads, TOTAL, text.head_dim)
    for layer, pair in enumerate(present):
        for part, value in zip(("key", "value"), pair, strict=True):
            graph.output(f"present.{layer}.{part}", value, graph.type.type, grown)


def rms_norm(graph: Graph, x: Value, of: Weights, name: str, eps: float) -> Value:
    """Root-mean-square norm, with squares summed in float32 (in 16 bits they overflow)."""
    small = graph.type != np.float32
    x = graph.cast(x, np.float32) if small else x
    square = graph.op("Pow", x, graph.constant(2.0, np.float32))
    mean = graph.op("ReduceMean", square, graph.constant([-1]), keepdims=1)
    root = graph.op("Sqrt", graph.op("Add", mean, graph.constant(eps, np.float32)))
    out = graph.op("Div", x, root)
    out = graph.cast(out, graph.type.type) if small else out
    return graph.op("Mul", out, graph.weight(f"{of.prefix}.{name}.weight", of[f"{name}.weight"]))


@dataclass(frozen=True)
class _Shared:
    """Values used by all layers: the bias of attention scores (B, 1, 1, T, L), cos and sin."""

    graph: Graph
    text: TextConfig
    bias: Value
    turn: tuple[Value, Value]


def _layer(
    shared: _Shared, of: Weights, x: Value, past: tuple[Value, ...]
) -> tuple[Value, Value, Value]:
    """One layer: its output (B, T, D) and its keys and values (B, kv heads, L, K)."""
    graph, text = shared.graph, shared.text
    with graph.scope("attention"):
        hidden = rms_norm(graph, x, of, "attention_norm", text.rms_norm_eps)
        query = _rotate(shared, _heads(shared, hidden, of, "query", text.num_heads))
        key = _rotate(shared, _heads(shared, hidden, of, "key", text.num_kv_heads))
        value = _heads(shared, hidden, of, "value", text.num_kv_heads)
        key = graph.op("Concat", past[0], key, axis=2)
        value = graph.op("Concat", past[1], value, axis=2)
        mixed = _attend(shared, query, key, value)
        x = graph.op("Add", x, linear(graph, mixed, of, "attention.out"))
    with graph.scope("mlp"):
        hidden = rms_norm(graph, x, of, "mlp_norm", text.rms_norm_eps)
        gate = graph.activation(linear(graph, hidden, of, "gate"), text.hidden_act)
        inner = graph.op("Mul", gate, linear(graph, hidden, of, "up"))
        x = graph.op("Add", x, linear(graph, inner, of, "down"))
    return x, key, value


def linear(graph: Graph, x: Value, of: Weights, name: str) -> Value:
    """A linear layer of the model by name, with its bias if it has one."""
    return graph.linear(x, f"{of.prefix}.{name}", of[f"{name}.weight"], of.get(f"{name}.bias"))


def _heads(shared: _Shared, x: Value, of: Weights, name: str, heads: int) -> Value:
    """(B, T, D) → (B, heads, T, K)."""
    graph = shared.graph
    projected = linear(graph, x, of, f"attention.{name}")
    return graph.transpose(graph.reshape(projected, 0, 0, heads, shared.text.head_dim), 0, 2, 1, 3)


def _rotate(shared: _Shared, x: Value) -> Value:
    """Rotate the channel pairs (i, i + K/2) of (B, heads, T, K)."""
    graph, (cos, sin) = shared.graph, shared.turn
    first, second = graph.ops("Split", x, outputs=2, axis=-1, num_outputs=2)
    turned_first = graph.op("Sub", graph.op("Mul", first, cos), graph.op("Mul", second, sin))
    turned_second = graph.op("Add", graph.op("Mul", second, cos), graph.op("Mul", first, sin))
    return graph.op("Concat", turned_first, turned_second, axis=-1)


def _attend(shared: _Shared, query: Value, key: Value, value: Value) -> Value:
    """Attention of all heads: → (B, T, heads · K).

    The queries of a group are concatenated along the token axis, so that keys and values are not
    repeated.
    """
    graph, text = shared.graph, shared.text
    groups, per_group = text.num_kv_heads, text.num_heads // text.num_kv_heads
    query = graph.op("Mul", query, graph.constant(text.head_dim**-0.5))
    query = graph.reshape(query, 0, groups, -1, text.head_dim)
    scores = graph.op("MatMul", query, graph.transpose(key, 0, 1, 3, 2))
    tokens, total = graph.length(shared.bias, 3), graph.length(key, 2)
    scores = graph.reshape(scores, 0, groups, per_group, tokens, total)
    shares = graph.op("Softmax", graph.op("Add", scores, shared.bias), axis=-1)
    shares = graph.reshape(shares, 0, groups, -1, total)
    mixed = graph.reshape(graph.op("MatMul", shares, value), 0, text.num_heads, -1, text.head_dim)
    mixed = graph.transpose(mixed, 0, 2, 1, 3)
    return graph.reshape(mixed, 0, 0, text.num_heads * text.head_dim)


def _bias(graph: Graph, embeds: Value, mask: Value, past: Value) -> Value:
    """The bias of attention scores: (B, 1, 1, T, L).

    A token attends to real tokens up to itself. Padding attends to itself: an empty row would be a
    division by zero.
    """
    cached = graph.length(past, 2)
    total = graph.op("Add", cached, graph.length(embeds, 1))
    keys = graph.range(graph.constant([0]), total)
    unspoken = graph.op("Sub", total, graph.length(mask, 1))  # tokens that the mask does not cover
    place = graph.op("Max", graph.op("Sub", keys, unspoken), graph.constant([0]))
    marked = graph.op("Greater", graph.op("Gather", mask, place, axis=1), graph.constant(0))
    real = graph.op("Or", graph.op("Less", keys, unspoken), marked)
    queries = graph.unsqueeze(graph.range(cached, total), 1)
    causal = graph.op("LessOrEqual", keys, queries)
    seen = graph.op("And", causal, graph.unsqueeze(real, 1))
    seen = graph.op("Or", seen, graph.op("Equal", keys, queries))
    return graph.unsqueeze(graph.bias_of(seen), 1, 2)


def _angles(graph: Graph, text: TextConfig, positions: Value) -> tuple[Value, Value]:
    """cos and sin of every token's RoPE angles: (B, 1, T, K/2), computed in float32."""
    frequencies = rope_frequencies(text.rope, text.head_dim).numpy()
    place = graph.cast(graph.unsqueeze(positions, 1, 3), np.float32)
    angles = graph.op("Mul", place, graph.constant(frequencies, np.float32))
    turn = graph.op("Cos", angles), graph.op("Sin", angles)
    if graph.type == np.float32:
        return turn
    return graph.cast(turn[0], graph.type.type), graph.cast(turn[1], graph.type.type)
