"""vision_encoder as an ONNX graph: vision tower and connector.

Shapes: B sequences of I tiles (padding tiles included), N real tiles of P×P pixels, H×W patches of
p×p pixels, C the hidden size, S visual tokens per tile, D the text hidden size.
"""

from __future__ import annotations

import numpy as np

from smolstack.config import ModelConfig, VisionConfig
from smolstack.interop.onnx.decoder import BATCH, linear
from smolstack.interop.onnx.graph import Graph, Value
from smolstack.interop.onnx.weights import Weights


def vision_encoder(graph: Graph, config: ModelConfig, weights: Weights, edge: int) -> None:
    """pixel_values (B, I, 3, P, P), pixel_attention_mask (B, I, P, P) → image_features (N, S, D).

    The mask is true on pixels that contain image. A tile without any is padding of the batch and
    has no features; in a partly filled tile, the other patches are masked.

    Args:
        edge: P, the tile edge of the preprocessing.
    """
    vision, scale = config.vision, config.scale
    pixels = graph.input(
        "pixel_values", np.float32, (BATCH, "num_images", vision.num_channels, edge, edge)
    )
    mask = graph.input("pixel_attention_mask", np.bool_, (BATCH, "num_images", edge, edge))
    side = edge // vision.patch_size
    with graph.scope("patches"):
        tiles, filled = _real_tiles(graph, vision, pixels, mask, edge)
        x = _patches(graph, vision, weights, tiles, side)
        ids = _position_ids(graph, vision, filled, side)
        table = graph.weight(
            "vision.position_embedding.weight", weights["vision.position_embedding.weight"]
        )
        x = graph.op("Add", x, graph.op("Gather", table, ids))
        seen = graph.reshape(graph.bias_of(filled), 0, 1, 1, side * side)
    for layer in range(vision.num_layers):
        with graph.scope(f"layers.{layer}"):
            x = _layer(graph, vision, weights.under(f"vision.layers.{layer}"), x, seen)
    with graph.scope("connector"):
        x = _layer_norm(graph, x, weights.under("vision"), "norm", vision.layer_norm_eps)
        x = _pixel_unshuffle(graph, x, side, scale, vision.hidden_size)
        x = graph.linear(x, "connector.proj", weights["connector.proj.weight"])
        if graph.type != np.float32:
            x = graph.cast(x, np.float32)
    tokens = (side // scale) ** 2
    graph.output("image_features", x, np.float32, ("num_tiles", tokens, config.text.hidden_size))


def _real_tiles(
    graph: Graph, vision: VisionConfig, pixels: Value, mask: Value, edge: int
) -> tuple[Value, Value]:
    """Return tiles that contain image (N, 3, P', P') and their filled patches (N, H, W) bool.

    P' excludes pixels after the last complete patch, which are never used.
    """
    patch, side = vision.patch_size, edge // vision.patch_size
    tiles = graph.reshape(pixels, -1, vision.num_channels, edge, edge)
    mask = graph.cast(graph.reshape(mask, -1, edge, edge), np.float32)
    if side * patch != edge:
        tiles = _crop(graph, tiles, side * patch, 2, 3)
        mask = _crop(graph, mask, side * patch, 1, 2)
    blocks = graph.reshape(mask, -1, side, patch, side, patch)
    filled = graph.op("ReduceMax", blocks, graph.constant([2, 4]), keepdims=0)
    any_filled = graph.op("ReduceMax", filled, graph.constant([1, 2]), keepdims=0)
    real = graph.reshape(graph.op("NonZero", any_filled), -1)
    if graph.type != np.float32:
        tiles = graph.cast(tiles, graph.type.type)
    tiles = graph.op("Gather", tiles, real, axis=0)
    return tiles, graph.cast(graph.op("Gather", filled, real, axis=0), np.bool_)


def _crop(graph: Graph, x: Value, length: int, *axes: int) -> Value:
    starts, ends = [0] * len(axes), [length] * len(axes)
    return graph.op(
        "Slice", x, graph.constant(starts), graph.constant(ends), graph.constant(list(axes))
    )


def _patches(
    graph: Graph, vision: VisionConfig, weights: Weights, tiles: Value, side: int
) -> Value:
    """Patch embedding as one matrix product: (N, 3, P', P') → (N, H·W, C)."""
    patch, channels = vision.patch_size, vision.num_channels
    folded = graph.reshape(tiles, -1, channels, side, patch, side, patch)
    folded = graph.transpose(folded, 0, 2, 4, 1, 3, 5)
    folded = graph.reshape(folded, -1, side * side, channels * patch * patch)
    weight = weights["vision.patch_embedding.weight"]
    return graph.linear(
        folded,
        "vision.patch_embedding",
        weight.reshape(weight.shape[0], -1),
        weights["vision.patch_embedding.bias"],
    )


def _position_ids(graph: Graph, vision: VisionConfig, filled: Value, side: int) -> Value:
    """Position ids: (N, H·W) int64; padding patches have id 0.

    n filled rows are spread over the position table: row i has id i · side // n, columns likewise.
    """
    number = graph.cast(filled, np.int64)
    steps = graph.constant(np.arange(side) * vision.side)
    row, column = (
        graph.op(
            "Div",
            steps,
            graph.op(
                "ReduceSum",
                graph.op("ReduceMax", number, graph.constant([across]), keepdims=0),
                graph.constant([1]),
                keepdims=1,
            ),
        )
        for across in (2, 1)
    )
    row = graph.op("Mul", graph.unsqueeze(row, 2), graph.constant(vision.side))
    ids = graph.op("Add", row, graph.unsqueeze(column, 1))
    return graph.reshape(graph.op("Mul", ids, number), 0, side * side)


def _layer(graph: Graph, vision: VisionConfig, of: Weights, x: Value, seen: Value) -> Value:
    """x + attention(norm(x)), then x + mlp(norm(x)): (N, H·W, C)."""
    heads, width = vision.num_heads, vision.hidden_size // vision.num_heads
    with graph.scope("attention"):
        hidden = _layer_norm(graph, x, of, "attention_norm", vision.layer_norm_eps)
        query, key, value = (
            graph.reshape(linear(graph, hidden, of, f"attention.{part}"), 0, 0, heads, width)
            for part in ("query", "key", "value")
        )
        query = graph.op("Mul", query, graph.constant(width**-0.5))
        scores = graph.op(
            "MatMul", graph.transpose(query, 0, 2, 1, 3), graph.transpose(key, 0, 2, 3, 1)
        )
        shares = graph.op("Softmax", graph.op("Add", scores, seen), axis=-1)
        mixed = graph.op("MatMul", shares, graph.transpose(value, 0, 2, 1, 3))
        mixed = graph.reshape(graph.transpose(mixed, 0, 2, 1, 3), 0, 0, vision.hidden_size)
        x = graph.op("Add", x, linear(graph, mixed, of, "attention.out"))
    with graph.scope("mlp"):
        hidden = _layer_norm(graph, x, of, "mlp_norm", vision.layer_norm_eps)
        inner = graph.activation(linear(graph, hidden, of, "up"), vision.hidden_act)
        return graph.op("Add", x, linear(graph, inner, of, "down"))


def _layer_norm(graph: Graph, x: Value, of: Weights, name: str, eps: float) -> Value:
    return graph.op(
        "LayerNormalization",
        x,
        graph.weight(f"{of.prefix}.{name}.weight", of[f"{name}.weight"]),
        graph.weight(f"{of.prefix}.{name}.bias", of[f"{name}.bias"]),
        axis=-1,
        epsilon=eps,
    )


def _pixel_unshuffle(graph: Graph, x: Value, side: int, scale: int, width: int) -> Value:
    """Concatenate the s² patches of each block, row by row: (N, H·W, C) → (N, S, s²·C)."""
    blocks = side // scale
    x = graph.reshape(x, 0, blocks, scale, blocks, scale * width)
    x = graph.transpose(x, 0, 1, 3, 2, 4)
    return graph.reshape(x, 0, blocks * blocks, scale * scale * width)
