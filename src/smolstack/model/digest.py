"""Which weights a model has: a digest of their values, and a number that counts their changes."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


def weights_digest(weights: Iterable[Tensor]) -> bytes:
    """A digest of weights: shapes, number formats and values, in order."""
    digest = hashlib.sha256()
    for weight in weights:
        values = weight.detach().cpu().contiguous()
        digest.update(repr((tuple(values.shape), values.dtype)).encode())
        digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.digest()


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to; tensors made in inference mode do not count that."""
    return 0 if tensor.is_inference() else tensor._version


class WeightsVersion:
    """Counts how often the weights of some modules have become others: replaced or written to.

    What was computed under another number may not be reused. Tensors are held weakly.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self.modules = modules
        self.number = 0
        self._seen: list[tuple[weakref.ref[Tensor], int, torch.dtype]] = []

    def current(self) -> int:
        """The number of the weights that the modules have now."""
        now = list(self.tensors())
        same = len(now) == len(self._seen) and all(
            ref() is tensor and version == version_of(tensor) and dtype == tensor.dtype
            for tensor, (ref, version, dtype) in zip(now, self._seen, strict=True)
        )
        if not same:
            self._seen = [(weakref.ref(t), version_of(t), t.dtype) for t in now]
            self.number += 1
        return self.number

    def tensors(self) -> Iterator[Tensor]:
        """Parameters and buffers, in order."""
        for top in self.modules:
            for module in top.modules():
                # The modules' own tables: parameters() takes several times as long.
                for table in (module._parameters, module._buffers):
                    yield from (tensor for tensor in table.values() if tensor is not None)
