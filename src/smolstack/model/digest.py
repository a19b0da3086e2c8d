"""Which weights a model has: a digest of their values, and a number that counts their changes."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

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


class WeightsVersion:
    """Counts how often the weights of some modules have become others: replaced or written to.

    What was computed under another number may not be reused. Tensors are held weakly.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self.modules = modules
        self.number = 0
        # Every table of submodules or tensors that was looked at, and how many entries it had;
        # under each name what stood there. Asked before every request, so it has to be quick.
        self._tables: list[tuple[Mapping[str, Any], int]] = []
        self._parts: list[tuple[Mapping[str, Any], str, nn.Module]] = []
        self._tensors: list[tuple[Mapping[str, Any], str, weakref.ref[Tensor], int, int]] = []

    def current(self) -> int:
        """The number of the weights that the modules have now."""
        if not self._same():
            self._look()
            self.number += 1
        return self.number

    def tensors(self) -> Iterator[Tensor]:
        """Parameters and buffers as they are saved, in order; packed weights unpacked."""
        for module in self.modules:
            yield from module.state_dict().values()

    def _same(self) -> bool:
        return (
            bool(self._tables)
            and all(len(table) == length for table, length in self._tables)
            and all(table.get(name) is module for table, name, module in self._parts)
            and all(
                _is_as_seen(table.get(name), ref, address, version)
                for table, name, ref, address, version in self._tensors
            )
        )

    def _look(self) -> None:
        self._tables, self._parts, self._tensors = [], [], []
        for top in self.modules:
            for module in top.modules():
                # Their public counterparts build every name anew and take several times as long.
                tables = (module._modules, module._parameters, module._buffers)
                self._tables += [(table, len(table)) for table in tables]
                for name, part in module._modules.items():
                    if part is not None:
                        self._parts.append((module._modules, name, part))
                for table in tables[1:]:
                    for name, tensor in table.items():
                        if tensor is not None:
                            version = -1 if tensor.is_inference() else tensor._version
                            ref = weakref.ref(tensor)
                            seen = table, name, ref, tensor.data_ptr(), version
                            self._tensors.append(seen)


def _is_as_seen(
    tensor: Tensor | None, ref: weakref.ref[Tensor], address: int, version: int
) -> bool:
    # model.to(dtype) changes the address of a parameter and not its version.
    return (
        tensor is not None
        and ref() is tensor
        and tensor.data_ptr() == address
        and (version < 0 or tensor._version == version)
    )
