"""Contenders that compute the vision tower alone: onnxruntime's int8, OpenVINO's bfloat16.

Their patch states are passed to the float32 model's connector, and the visual tokens to its
decoder, so a row shows the tower's loss only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from smolstack.batch import Batch
from smolstack.bench.peers.onnxruntime import OnnxRuntime
from smolstack.bench.peers.openvino import OpenVino
from smolstack.bench.peers.towers import graph_file
from smolstack.bench.quality.ours import Ours
from smolstack.bench.worker import Worker, WorkerError


@dataclass
class TowerPeer:
    """A runtime's tower in one precision.

    Attributes:
        work: "module:function" of the worker that computes a tile.
        int8: whether the graph's matrices are int8.
        reference: the model in float32, whose connector and decoder are used.
        folder: the float checkpoint whose tower it is.
        root: a folder for the graph.
    """

    by: str
    precision: str
    work: str
    int8: bool
    reference: Ours
    folder: Path
    root: Path
    _worker: Worker | None = field(default=None, repr=False)

    @property
    def label(self) -> str:
        return f"{self.by} {self.precision}"

    def visual_tokens(self, batch: Batch) -> Tensor:
        """Return visual tokens (N, S, D) of a batch's tiles.

        Raises:
            WorkerError: a tile is partly filled, which the graph does not know, or the runtime
                failed.
        """
        model = self.reference.vlm.model
        grid = model.vision.grid_of(batch.tiles)
        if any(filled != grid for filled in batch.tile_grids or ()):
            raise WorkerError(f"an image does not fill its tile of {grid[0]}×{grid[1]} patches")
        states = torch.stack([self._states(tile) for tile in batch.tiles])
        visual: Tensor = model.connector(states, grid)
        return visual

    def answer_scores(self, batch: Batch, count: int) -> Tensor:
        """Logits (count, V) of the last positions, by the float32 decoder."""
        return self.reference.answer_scores(batch, count)

    def close(self) -> None:
        """End the process."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _states(self, tile: Tensor) -> Tensor:
        """Patch states (H·W, C) of a tile (3, P, P)."""
        path = self.root / f"{self.by}-tile.npy"
        np.save(path, tile[None].float().numpy())
        if self._worker is None:
            graph = graph_file(self.folder, self.root, int8=self.int8)
            self._worker = Worker(
                self.work,
                torch.get_num_threads(),
                graph=str(graph),
                tile=str(path),
                precision=self.precision,
            )
        value = self._worker.tell(give=True, other=str(path))["value"]
        return torch.tensor(value)[0]


def tower_peers(reference: Ours, folder: Path, root: Path) -> list[TowerPeer]:
    """Return the installed runtimes, in precisions that are not exact."""
    return [
        TowerPeer(
            implementation.name, precision, implementation.work, int8, reference, folder, root
        )
        for implementation in (OnnxRuntime, OpenVino)
        if not implementation.missing()
        for precision, int8 in implementation.precisions().items()
        if precision != "float32"
    ]
