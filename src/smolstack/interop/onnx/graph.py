"""Builds an ONNX graph node by node.

torch's exporters trace a model; this module writes the graph from config and weights. That takes
seconds instead of minutes, does not depend on the version of an exporter, and uses only plain
operators of opset 18, which every runtime supports. check.py compares every graph with torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from smolstack import __version__

OPSET, IR_VERSION = 18, 8
# A protobuf message is limited to 2 GiB: weights of larger graphs are in a separate file.
MAX_INLINE_BYTES = 1_900_000_000
# Matrices use 7 of their 8 bits: processors without VNNI add pairs of 8-bit products in 16 bits,
# which larger values would silently overflow.
LARGEST_CODE = 63
ALIGNMENT = 4096  # of weights in that file, so that runtimes can memory-map them

Value: TypeAlias = str
Array: TypeAlias = npt.NDArray[Any]
Dimensions: TypeAlias = Sequence[int | str]


class Precision(str, Enum):
    """Number formats of an export, by their usual names.

    int8 is onnxruntime's dynamic quantization: matrices in 8 bits with a scale per output channel,
    their inputs quantized at run time, everything else in float32.
    """

    fp32 = "fp32"
    fp16 = "fp16"
    int8 = "int8"

    @property
    def suffix(self) -> str:
        """Suffix of file names: empty, ``_fp16`` or ``_int8``."""
        return "" if self is Precision.fp32 else f"_{self.value}"


class Graph:
    """Nodes, weights, inputs and outputs of one graph; values are identified by name.

    Args:
        name: name of the graph, and of its file without suffixes.
        precision: precision of the weights and computation.
        data: file for the weights if they are too large for the graph itself.

    Attributes:
        type: numpy type of the computation: float16 or float32.
    """

    def __init__(self, name: str, precision: Precision, data: Path | None = None) -> None:
        self.name, self.precision, self.data = name, precision, data
        self.type = np.dtype(np.float16 if precision is Precision.fp16 else np.float32)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Value] = {}
        self._quantized: dict[Value, list[Value]] = {}
        self._scope: list[str] = []
        self._data_length = 0

    # Inputs and outputs

    def input(self, name: str, kind: type[Any], dimensions: Dimensions) -> Value:
        """Add a named input; dimensions are numbers, or names if they are dynamic."""
        self.inputs.append(_value_info(name, kind, dimensions))
        return name

    def output(self, name: str, value: Value, kind: type[Any], dimensions: Dimensions) -> None:
        """Add a value as an output called ``name``."""
        self.nodes.append(helper.make_node("Identity", [value], [name], name=f"output/{name}"))
        self.outputs.append(_value_info(name, kind, dimensions))

    # Weights and constants

    def weight(self, name: str, array: Array, kind: type[Any] | None = None) -> Value:
        """Add a named weight, in the graph's number format or in ``kind``."""
        array = np.ascontiguousarray(array.astype(kind or self.type, copy=False))
        if self.data is None:
            self.weights.append(numpy_helper.from_array(array, name))
            return name
        self._data_length = -(-self._data_length // ALIGNMENT) * ALIGNMENT
        with self.data.open("r+b" if self.data.exists() else "wb") as file:
            file.seek(self._data_length)
            file.write(array.data)
        tensor = TensorProto(
            name=name,
            dims=array.shape,
            data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in (
            ("location", self.data.name),
            ("offset", self._data_length),
            ("length", array.nbytes),
        ):
            tensor.external_data.add(key=key, value=str(value))
        self._data_length += array.nbytes
        self.weights.append(tensor)
        return name

    def constant(self, value: Any, kind: type[Any] | None = None) -> Value:
        """Add a small array or number; equal ones are stored once. Integers are int64."""
        array = np.asarray(value)
        if kind is None:
            kind = np.int64 if array.dtype.kind in "iu" else self.type.type
        array = array.astype(kind)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant.{len(self._constants)}"
            self.weights.append(numpy_helper.from_array(array, name))
            self._constants[key] = name
        return self._constants[key]

    # Nodes

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of nodes created inside with ``name``, for readable profiles."""
        self._scope.append(name)
        yield
        self._scope.pop()

    def op(self, kind: str, *inputs: Value, **attributes: Any) -> Value:
        """Add a node with one output."""
        return self.ops(kind, *inputs, outputs=1, **attributes)[0]

    def ops(self, kind: str, *inputs: Value, outputs: int, **attributes: Any) -> list[Value]:
        """Add a node with several outputs."""
        name = "/".join((*self._scope, f"{kind}.{len(self.nodes)}"))
        names = [name if outputs == 1 else f"{name}:{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, name=name, **attributes))
        return names

    def reshape(self, x: Value, *shape: int | Value) -> Value:
        """Like torch's reshape; 0 keeps the axis of the input, a value is a length known at run
        time.
        """
        if all(isinstance(length, int) for length in shape):
            return self.op("Reshape", x, self.constant(list(shape)))
        parts = [self.constant([length]) if isinstance(length, int) else length for length in shape]
        return self.op("Reshape", x, self.op("Concat", *parts, axis=0))

    def transpose(self, x: Value, *order: int) -> Value:
        return self.op("Transpose", x, perm=order)

    def unsqueeze(self, x: Value, *axes: int) -> Value:
        return self.op("Unsqueeze", x, self.constant(list(axes)))

    def cast(self, x: Value, kind: type[Any]) -> Value:
        return self.op("Cast", x, to=_element(kind))

    def length(self, x: Value, axis: int) -> Value:
        """Return the length of an axis at run time, as (1,) int64."""
        return self.op("Shape", x, start=axis, end=axis + 1)

    def range(self, start: Value, end: Value) -> Value:
        """start, start + 1 … end - 1; both given as (1,)."""
        scalar = self.constant(np.empty(0), np.int64)
        return self.op(
            "Range",
            self.op("Reshape", start, scalar),
            self.op("Reshape", end, scalar),
            self.constant(1),
        )

    def linear(self, x: Value, name: str, weight: Array, bias: Array | None = None) -> Value:
        """x · weightᵀ + bias, for a weight in torch's layout: (out, in)."""
        if self.precision is Precision.int8:
            out = self._linear_in_8_bits(x, name, weight)
        else:
            out = self.op("MatMul", x, self.weight(f"{name}.weight", weight.T))
        return out if bias is None else self.op("Add", out, self.weight(f"{name}.bias", bias))

    def _linear_in_8_bits(self, x: Value, name: str, weight: Array) -> Value:
        """Add the nodes of onnxruntime's dynamic quantization, which it fuses."""
        if x not in self._quantized:  # query, key and value share their input
            self._quantized[x] = self.ops("DynamicQuantizeLinear", x, outputs=3)
        codes, step, zero = self._quantized[x]
        scale, rows = rows_in_8_bits(weight, LARGEST_CODE)
        stored = self.weight(f"{name}.weight_quantized", rows.T, np.int8)
        product = self.op("MatMulInteger", codes, stored, zero)
        steps = self.op("Mul", step, self.weight(f"{name}.weight_scale", scale[:, 0]))
        return self.op("Mul", self.cast(product, np.float32), steps)

    def activation(self, x: Value, name: str) -> Value:
        """One of config.reading.ACTIVATIONS."""
        return _ACTIVATION[name](self, x)

    def bias_of(self, seen: Value) -> Value:
        """Return the bias of attention scores: 0 where ``seen`` is true, else the lowest number."""
        kind = np.float16 if self.precision is Precision.fp16 else np.float32
        least = self.constant(np.finfo(kind).min)
        return self.op("Where", seen, self.constant(0.0), least)

    # The whole

    def model(self) -> onnx.ModelProto:
        """Return the finished graph, checked by ONNX."""
        graph = helper.make_graph(
            self.nodes, self.name, self.inputs, self.outputs, initializer=self.weights
        )
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="smolstack",
            producer_version=__version__,
        )


def rows_in_8_bits(table: Array, largest: int = 127) -> tuple[Array, Array]:
    """Return scales (rows, 1) float32 and codes (rows, columns) int8 whose product approximates the
    table.

    Codes are between -largest and largest.
    """
    scale = np.abs(table).max(axis=1, keepdims=True) / largest
    scale[scale == 0] = 1
    return scale.astype(np.float32), np.rint(table / scale).astype(np.int8)


def _gelu(graph: Graph, x: Value) -> Value:
    spread = graph.op("Erf", graph.op("Div", x, graph.constant(2.0**0.5)))
    return _half_times_one_plus(graph, x, spread)


def _gelu_tanh(graph: Graph, x: Value) -> Value:
    cube = graph.op("Mul", graph.op("Mul", x, x), x)
    inner = graph.op("Add", x, graph.op("Mul", cube, graph.constant(0.044715)))
    spread = graph.op("Tanh", graph.op("Mul", inner, graph.constant((2 / np.pi) ** 0.5)))
    return _half_times_one_plus(graph, x, spread)


def _half_times_one_plus(graph: Graph, x: Value, spread: Value) -> Value:
    gate = graph.op("Add", spread, graph.constant(1.0))
    return graph.op("Mul", graph.op("Mul", x, gate), graph.constant(0.5))


_ACTIVATION: dict[str, Callable[[Graph, Value], Value]] = {
    "gelu": _gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": lambda graph, x: graph.op("Relu", x),
    "silu": lambda graph, x: graph.op("Mul", x, graph.op("Sigmoid", x)),
}


def _element(kind: type[Any]) -> int:
    return helper.np_dtype_to_tensor_dtype(np.dtype(kind))


def _value_info(name: str, kind: type[Any], dimensions: Dimensions) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, _element(kind), list(dimensions))
