"""Compares every exported graph with torch: the same inputs, empty and filled caches, several
sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import Tensor

from smolstack.errors import CheckpointError
from smolstack.interop.onnx.graph import Precision
from smolstack.model.kv_cache import KVCache
from smolstack.model.vlm import VisionLanguageModel

Feeds: TypeAlias = dict[str, npt.NDArray[Any]]
# In float32 the largest difference, relative to the largest expected value if that is above 1; in
# the other formats the root mean square of the differences relative to that of the expected values.
BOUNDS = {Precision.fp32: 1e-4, Precision.fp16: 2e-2, Precision.int8: 0.5}


@dataclass(frozen=True)
class Reading:
    """A batch read in several steps, each with the cache of the previous one.

    Attributes:
        padding: left-padding tokens of each row.
        steps: tokens of each step.
        short_mask: whether attention_mask covers only the step's own tokens.
    """

    padding: tuple[int, ...]
    steps: tuple[int, ...]
    short_mask: bool = False


READINGS = (
    Reading((0,), (9, 1, 1)),
    Reading((3, 0), (6, 4, 1)),
    Reading((0, 0, 0), (1, 5), short_mask=True),
)
# Filled (rows, columns) of each tile as fractions of the grid, None for padding of the batch.
BATCHES: tuple[tuple[tuple[tuple[float, float] | None, ...], ...], ...] = (
    (((1, 1),),),
    (((1, 1), (0.5, 1), (0.3, 0.7)),),
    (((1, 0.4), None), ((1, 1), (1, 1))),
)


@dataclass
class Difference:
    """The largest difference, and sums for the root mean square."""

    largest: float = 0.0
    squares: float = 0.0
    expected: float = 0.0

    def add(self, found: npt.NDArray[Any], expected: Tensor) -> None:
        """Add one output; NaN on either side is an infinite difference."""
        gap = torch.from_numpy(found.astype(np.float32)) - expected
        if gap.numel() == 0:
            return
        top = max(1.0, expected.abs().max().item())
        largest = gap.abs().max().item() / top
        self.largest = max(self.largest, largest if math.isfinite(largest) else math.inf)
        self.squares += gap.double().square().sum().item()
        self.expected += expected.double().square().sum().item()

    def of(self, precision: Precision) -> float:
        """Return the measure for a precision; see BOUNDS."""
        if precision is Precision.fp32 or not math.isfinite(self.largest):
            return self.largest
        return math.sqrt(self.squares / self.expected) if self.expected else 0.0


class Reference:
    """torch's results for the checks, computed once for all number formats.

    Args:
        model: in float32 on the CPU.
        edge: tile edge in pixels.
    """

    def __init__(self, model: VisionLanguageModel, edge: int) -> None:
        self.model, self.edge = model, edge
        self.generator = torch.Generator().manual_seed(0)
        with torch.inference_mode():
            self.batches = list(self._batches())
            self.readings = [(reading, *self._read(reading)) for reading in READINGS]

    def check(self, name: str, precision: Precision, path: Path) -> float:
        """Return the difference between a graph and torch.

        Raises:
            CheckpointError: it exceeds the bound of the precision, or the graph does not run.
        """
        difference = Difference()
        try:
            session = _session(path)
            {
                "vision_encoder": self._check_vision,
                "embed_tokens": self._check_embedding,
                "decoder_model_merged": self._check_decoder,
            }[name](session, difference)
        except Exception as error:  # onnxruntime's errors have no other common base class
            raise CheckpointError(f"{path.name} does not run in onnxruntime: {error}") from error
        found = difference.of(precision)
        if not found <= BOUNDS[precision]:
            raise CheckpointError(
                f"{path.name} differs from torch by {found:.2g}, expected at most "
                f"{BOUNDS[precision]:g}; nothing was written"
            )
        return found

    def _batches(self) -> Iterator[tuple[Feeds, Tensor]]:
        patch, edge = self.model.config.vision.patch_size, self.edge
        side = edge // patch
        for rows in BATCHES:
            size = (len(rows), len(rows[0]))
            pixels = torch.rand(*size, 3, edge, edge, generator=self.generator) * 2 - 1
            mask = torch.zeros(*size, edge, edge, dtype=torch.bool)
            filled = []
            for row, tiles in enumerate(rows):
                for column, part in enumerate(tiles):
                    if part is None:
                        continue
                    high, wide = (max(1, round(share * side)) for share in part)
                    # In a partly filled tile, the last patches contain one pixel of image.
                    bottom, right = (
                        edge if count == side else (count - 1) * patch + 1 for count in (high, wide)
                    )
                    mask[row, column, :bottom, :right] = True
                    filled.append((high, wide))
            real = pixels[mask.flatten(2).any(dim=2)]
            expected = self.model.encode_tiles(real, filled)
            yield {"pixel_values": pixels.numpy(), "pixel_attention_mask": mask.numpy()}, expected

    def _check_vision(self, session: Any, difference: Difference) -> None:
        for feeds, expected in self.batches:
            difference.add(session.run(["image_features"], feeds)[0], expected)

    def _check_embedding(self, session: Any, difference: Difference) -> None:
        embedding = self.model.decoder.embedding.weight.detach()
        generator = torch.Generator().manual_seed(1)  # the same tokens for all number formats
        for shape in ((1, 1), (2, 7)):
            ids = torch.randint(embedding.shape[0], shape, generator=generator)
            found = session.run(["inputs_embeds"], {"input_ids": ids.numpy()})[0]
            difference.add(found, embedding[ids])

    def _read(self, reading: Reading) -> tuple[list[Tensor], list[Tensor], KVCache]:
        """Return embeddings and logits of each step, and the cache after the last."""
        rows, total = len(reading.padding), sum(reading.steps)
        cache = KVCache(self.model.config.text, rows, total, padding=torch.tensor(reading.padding))
        embeddings, logits = [], []
        for tokens in reading.steps:
            ids = torch.randint(
                self.model.config.text.vocab_size, (rows, tokens), generator=self.generator
            )
            embeddings.append(self.model.decoder.embedding(ids))
            logits.append(self.model.logits(self.model.decoder(embeddings[-1], cache=cache)))
        return embeddings, logits, cache

    def _check_decoder(self, session: Any, difference: Difference) -> None:
        for reading, embeddings, logits, cache in self.readings:
            rows = len(reading.padding)
            padding = torch.tensor(reading.padding)[:, None]
            real = torch.arange(sum(reading.steps))[None] >= padding
            past = empty_cache(session, rows)
            start = 0
            for new, expected in zip(embeddings, logits, strict=True):
                end = start + new.shape[1]
                spoken = real[:, start if reading.short_mask else 0 : end]
                positions = (torch.arange(start, end)[None] - padding).clamp(min=0)
                feeds = {
                    "inputs_embeds": new.numpy(),
                    "attention_mask": spoken.long().numpy(),
                    "position_ids": positions.numpy(),
                    **past,
                }
                found, *present = session.run(None, feeds)
                seen = real[:, start:end]
                difference.add(found[seen.numpy()], expected[seen])
                past = dict(zip(past, present, strict=True))
                start = end
            for layer, pair in enumerate(zip(cache.keys, cache.values, strict=True)):
                for part, tensor in zip(("key", "value"), pair, strict=True):
                    found = past[f"past_key_values.{layer}.{part}"].transpose(0, 2, 1, 3)
                    difference.add(found[real.numpy()], tensor.transpose(1, 2)[real])


def empty_cache(session: Any, rows: int) -> Feeds:
    """Return the inputs for an empty cache: no tokens, for every layer's key and value."""
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    return {
        entry.name: np.zeros((rows, entry.shape[1], 0, entry.shape[3]), kinds[entry.type])
        for entry in session.get_inputs()
        if entry.name.startswith("past_key_values.")
    }


def _session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
