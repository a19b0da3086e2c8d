"""onnxruntime for the vision tower: float32, and dynamic quantization to int8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from smolstack.bench.peers.towers import Towers


class OnnxRuntime(Towers):
    """The tower's graph in a separate process."""

    name = "onnxruntime"
    packages = ("onnx", "onnxruntime")
    work = f"{__name__}:tower"

    @classmethod
    def precisions(cls) -> dict[str, bool]:
        return {"float32": False, "int8": True}


def tower(graph: str, tile: str, precision: str, threads: int) -> Callable[..., Any]:
    """A worker's work: run one tile through the graph."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    feeds = {"pixel_values": np.load(tile)}

    def run(give: bool = False, other: str | None = None) -> Any:
        own = feeds if other is None else {"pixel_values": np.load(other)}
        states = session.run(None, own)[0]
        return states.tolist() if give else None

    return run
