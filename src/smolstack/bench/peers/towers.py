"""Peers of the vision tower: a graph file and a separate process per precision."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smolstack.bench import sizes
from smolstack.bench.peers.implementation import Implementation
from smolstack.bench.timing import Contender, ReportedValue
from smolstack.bench.worker import Worker
from smolstack.bench.workload import BITS, Workload
from smolstack.output_files import atomic_file


class Towers(Implementation, ABC):
    """An implementation whose work is a function of a graph file and a tile, run in workers.

    Attributes:
        work: "module:function" of the worker, called with ``graph``, ``tile`` (paths of an ONNX
            and a numpy file) and ``precision``.
    """

    work = ""

    @classmethod
    @abstractmethod
    def precisions(cls) -> dict[str, bool]:
        """Precisions that take part here → whether the graph's matrices are int8."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self._workers: dict[str, Worker] = {}

    def vision(self, tile: Tensor) -> Sequence[Contender]:
        def run(precision: str) -> ReportedValue:
            if precision not in self._workers:
                self._workers[precision] = self._worker(precision, tile)
            return self._workers[precision].run()

        weights = sizes.tower(self.workload.config)
        return [
            Contender(
                self.name,
                _bound(run, precision),
                precision,
                bytes_read=weights * BITS[precision] / 8,
            )
            for precision in self.precisions()
        ]

    def result(self, precision: str, tile: Tensor) -> Any:
        """Return the states that the peer computes, (N, H·W, C), to check that it computes the
        same.
        """
        self.vision(tile)
        with self._worker(precision, tile) as worker:
            return np.array(worker.tell(give=True)["value"], dtype=np.float32)

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()

    def _worker(self, precision: str, tile: Tensor) -> Worker:
        saved = self.workload.root / "tile.npy"
        np.save(saved, tile.float().numpy())
        return Worker(
            self.work,
            self.workload.threads,
            graph=str(self._graph(int8=self.precisions()[precision])),
            tile=str(saved),
            precision=precision,
        )

    def _graph(self, *, int8: bool) -> Path:
        return graph_file(self.workload.folder, self.workload.root, int8=int8)


def graph_file(folder: Path, root: Path, *, int8: bool) -> Path:
    """The vision tower of a checkpoint folder as an ONNX file in ``root``, written once."""
    from smolstack.bench.peers.tower_graph import write_tower
    from smolstack.vlm import load

    path = root / f"tower-{'int8' if int8 else 'float32'}.onnx"
    if not path.exists():
        with torch.inference_mode(False):
            model = load(folder, dtype="float32").model
        with atomic_file(path) as partial:
            write_tower(partial, model.config.vision, model, int8=int8)
    return path


def _bound(run: Any, precision: str) -> Any:
    return lambda: run(precision)
