"""The vision tower as an ONNX graph, with operators that runtimes can fuse.

The graphs that smolstack exports (interop/onnx) also evaluate a padding mask and include the
connector; the timed graphs do neither.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper
from torch import nn

from smolstack.config import VisionConfig
from smolstack.interop.onnx.graph import Graph, Precision, Value
from smolstack.interop.onnx.weights import Weights

OPSET = 20  # the first with Gelu


class _Graph(Graph):
    """A graph with gelu as one node."""

    def activation(self, x: Value, name: str) -> Value:
        if name == "gelu_pytorch_tanh":
            return self.op("Gelu", x, approximate="tanh")
        return super().activation(x, name)


def write_tower(path: Path, vision: VisionConfig, model: nn.Module, *, int8: bool) -> Path:
    """Write pixel_values (N, 3, P, P) → last_hidden_state (N, H·W, C).

    Args:
        model: the complete float model, whose tower's weights are written.
        int8: quantize matrices as in onnxruntime's dynamic quantization, else float32.
    """
    graph = _Graph("vision_tower", Precision.int8 if int8 else Precision.fp32)
    weights = Weights(model.state_dict()).under("vision")
    edge, side = vision.image_size, vision.side
    shape = (1, vision.num_channels, edge, edge)
    x = _patches(graph, vision, weights, graph.input("pixel_values", np.float32, shape))
    positions = weights["position_embedding.weight"]
    x = graph.op("Add", x, graph.weight("position_embedding", positions[None]))
    for layer in range(vision.num_layers):
        x = _layer(graph, vision, weights.under(f"layers.{layer}"), x)
    x = _norm(graph, vision, weights, "norm", x)
    graph.output("last_hidden_state", x, np.float32, (1, side * side, vision.hidden_size))
    made = graph.model()
    made.opset_import[0].CopyFrom(helper.make_opsetid("", OPSET))
    made.ir_version = 9
    onnx.save_model(made, str(path))
    return path


def _patches(graph: Graph, vision: VisionConfig, weights: Weights, pixels: Value) -> Value:
    """Patch embedding as a convolution: (N, 3, P, P) → (N, H·W, C)."""
    patch = vision.patch_size
    x = graph.op(
        "Conv",
        pixels,
        graph.weight("patch.weight", weights["patch_embedding.weight"]),
        graph.weight("patch.bias", weights["patch_embedding.bias"]),
        strides=(patch, patch),
        kernel_shape=(patch, patch),
    )
    return graph.transpose(graph.reshape(x, 0, vision.hidden_size, -1), 0, 2, 1)


def _layer(graph: Graph, vision: VisionConfig, of: Weights, x: Value) -> Value:
    """x + attention(norm(x)), then x + mlp(norm(x))."""
    heads, width = vision.num_heads, vision.hidden_size // vision.num_heads
    hidden = _norm(graph, vision, of, "attention_norm", x)
    query, key, value = (
        graph.reshape(_linear(graph, hidden, of, f"attention.{part}"), 0, 0, heads, width)
        for part in ("query", "key", "value")
    )
    scores = graph.op(
        "MatMul", graph.transpose(query, 0, 2, 1, 3), graph.transpose(key, 0, 2, 3, 1)
    )
    shares = graph.op("Softmax", graph.op("Mul", scores, graph.constant(width**-0.5)), axis=-1)
    mixed = graph.op("MatMul", shares, graph.transpose(value, 0, 2, 1, 3))
    mixed = graph.reshape(graph.transpose(mixed, 0, 2, 1, 3), 0, 0, vision.hidden_size)
    x = graph.op("Add", x, _linear(graph, mixed, of, "attention.out"))
    hidden = _norm(graph, vision, of, "mlp_norm", x)
    inner = graph.activation(_linear(graph, hidden, of, "up"), vision.hidden_act)
    return graph.op("Add", x, _linear(graph, inner, of, "down"))


def _linear(graph: Graph, x: Value, of: Weights, name: str) -> Value:
    return graph.linear(x, f"{of.prefix}.{name}", of[f"{name}.weight"], of.get(f"{name}.bias"))


def _norm(graph: Graph, vision: VisionConfig, of: Weights, name: str, x: Value) -> Value:
    return graph.op(
        "LayerNormalization",
        x,
        graph.weight(f"{of.prefix}.{name}.weight", of[f"{name}.weight"]),
        graph.weight(f"{of.prefix}.{name}.bias", of[f"{name}.bias"]),
        axis=-1,
        epsilon=vision.layer_norm_eps,
    )
