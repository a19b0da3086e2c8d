"""smolstack's contenders: a folder in a precision, through the public API."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from smolstack.batch import Batch
from smolstack.bench.peers.ours import decoding
from smolstack.bench.timing import OURS
from smolstack.vlm import VLM, load

EMBEDDING = "decoder.embedding.weight"


@dataclass
class Ours:
    """A folder loaded with ``smolstack.load(folder, dtype=…)`` on first use.

    Attributes:
        precision: name in results.
        dtype: as for load; "auto" for the stored precision.
    """

    precision: str
    folder: Path
    dtype: str = "auto"
    by: str = OURS
    _vlm: VLM | None = field(default=None, repr=False)

    @property
    def vlm(self) -> VLM:
        if self._vlm is None:
            with torch.inference_mode(False):
                self._vlm = load(self.folder, dtype=self.dtype)
        return self._vlm

    @property
    def label(self) -> str:
        return f"{self.by} {self.precision}"

    def scores(self, batch: Batch) -> Tensor:
        """Return logits (T, V) of a batch of one."""
        scores: Tensor = self.vlm.model(batch)[0]
        return scores.float()

    def visual_tokens(self, batch: Batch) -> Tensor:
        """Visual tokens (N, S, D) of a batch's tiles."""
        return self.vlm.model.encode_tiles(batch.tiles, batch.tile_grids)

    def answer_scores(self, batch: Batch, count: int) -> Tensor:
        """Logits (count, V) of the last positions of a batch with its visual tokens."""
        scores: Tensor = self.vlm.model(batch)[0, -count:]
        return scores.float().cpu().contiguous()

    def text_bytes(self) -> int:
        """Return the bytes read per decoded token: the decoder's layers, its norms and the head.

        A token embedding counts only if it is also the head: otherwise a single row is read.
        """
        state = self.vlm.model.state_dict()
        tied = not any(name.startswith("head.") for name in state)
        return sum(
            tensor.nbytes
            for name, tensor in state.items()
            if name.startswith(("decoder.", "head.")) and (name != EMBEDDING or tied)
        )

    def decoding(self, ids: Tensor, steps: int) -> Callable[[], object]:
        """Return a run that decodes ``steps`` tokens after a prompt (1, T)."""
        return decoding(self.vlm, ids, steps)

    def close(self) -> None:
        """Free the model."""
        self._vlm = None
