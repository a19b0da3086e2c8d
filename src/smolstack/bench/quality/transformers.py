"""transformers' contender: the same checkpoint as it loads it in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smolstack.batch import Batch
from smolstack.bench.peers.transformers import Decoding, Transformers, load

NAME = Transformers.name


@dataclass
class Peer:
    """A checkpoint folder in one of transformers' precisions, with torch's fused attention.

    float32 is not among them: its logits are smolstack's float32 up to rounding, as tests of
    parity show.
    """

    folder: Path
    precision: str = "bfloat16"
    by: str = NAME
    _model: Any = field(default=None, repr=False)

    @property
    def model(self) -> Any:
        """The model, loaded when it is first needed."""
        if self._model is None:
            with torch.inference_mode(False):
                self._model = load(str(self.folder), self.precision)
        return self._model

    @property
    def label(self) -> str:
        return f"{self.by} {self.precision}"

    def scores(self, batch: Batch) -> Tensor:
        """Logits (T, V) of a batch of one, without images."""
        scores: Tensor = self.model(input_ids=batch.token_ids).logits[0]
        return scores.float()

    def text_bytes(self) -> int:
        """Bytes of what one more token reads, as :meth:`Ours.text_bytes` counts them."""
        decoder, head = self.model.model.text_model, self.model.lm_head.weight
        table = decoder.embed_tokens.weight
        layers = sum(one.nbytes for one in decoder.parameters() if one is not table)
        return int(layers + head.nbytes)

    def decoding(self, ids: Tensor, steps: int) -> Callable[[], object]:
        """Return a function that generates ``steps`` tokens after a prompt (1, T)."""
        return Decoding(self.model, ids, steps)

    def visual_tokens(self, batch: Batch) -> Tensor:
        """Visual tokens (N, S, D) of a batch's tiles."""
        found = self.model.model.get_image_features(**self._images(batch)).pooler_output
        visual: Tensor = found if isinstance(found, Tensor) else torch.cat(list(found))
        return visual.float().view(len(batch.tiles), -1, visual.shape[-1])

    def answer_scores(self, batch: Batch, count: int) -> Tensor:
        """Logits (count, V) of the last positions of a batch with its visual tokens."""
        scores = self.model(input_ids=batch.token_ids, **self._images(batch)).logits[0, -count:]
        return scores.float().contiguous()  # type: ignore[no-any-return]

    def _images(self, batch: Batch) -> dict[str, Tensor]:
        """The tiles of a batch of one, and which of their pixels are not padding."""
        from smolstack.interop.reference import pixel_mask

        inputs = {"pixel_values": batch.tiles[None].to(self.model.dtype)}
        if batch.tile_grids is not None:
            patch = self.model.config.vision_config.patch_size
            mask = pixel_mask(list(batch.tile_grids), batch.tiles.shape[-1], patch)
            inputs["pixel_attention_mask"] = mask[None]
        return inputs

    def close(self) -> None:
        """Let the model go."""
        self._model = None
