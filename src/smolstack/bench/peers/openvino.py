"""OpenVINO for the vision tower: float32 and bfloat16, selected by its precision hint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from smolstack.bench import machine
from smolstack.bench.peers.towers import Towers


class OpenVino(Towers):
    """The tower's graph in a separate process."""

    name = "openvino"
    packages = ("onnx", "openvino")
    work = f"{__name__}:tower"

    @classmethod
    def precisions(cls) -> dict[str, bool]:
        """bfloat16 takes part only where the processor multiplies it: elsewhere OpenVINO falls
        back to its reference implementation, which takes minutes for one tile."""
        found = {"float32": False}
        if {"avx512_bf16", "amx_bf16", "bf16"} & set(machine.instructions()):
            found["bfloat16"] = False
        return found


def tower(graph: str, tile: str, precision: str, threads: int) -> Callable[..., Any]:
    """A worker's work: run one tile through the graph."""
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(
        graph,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[precision],
        },
    )
    request = compiled.create_infer_request()
    pixels = np.load(tile)

    def run(give: bool = False, other: str | None = None) -> Any:
        states = request.infer({0: pixels if other is None else np.load(other)})[0]
        return np.asarray(states, dtype=np.float32).tolist() if give else None

    return run
