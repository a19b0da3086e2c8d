"""Identify a model's weights by a digest of their values, and count changes to them."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def weights_digest(weights: Iterable[Tensor]) -> bytes:
    """Hash the shapes, dtypes and values of weights, in order."""
    digest = hashlib.sha256()
    for weight in weights:
        values = weight.detach().cpu().contiguous()
        digest.update(repr((tuple(values.shape), values.dtype)).encode())
        digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.digest()


class WeightsVersion:
    """Counts how often the weights of some modules were replaced or written to.

    Results computed under an earlier version must not be reused. Tensors are weakly referenced.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self.modules = modules
        self.number = 0
        # Each table of submodules or tensors visited, with its number of entries, and the object
        # that was found under each name. Checked before every request, so the check must be fast.
        self._tables: list[tuple[Mapping[str, Any], int]] = []
        self._parts: list[tuple[Mapping[str, Any], str, nn.Module]] = []
        self._tensors: list[tuple[Mapping[str, Any], str, weakref.ref[Tensor], int, int]] = []

    def current(self) -> int:
        """Return the version number of the modules' current weights."""
        if not self._same():
            self._look()
            self.number += 1
        return self.number

    def tensors(self) -> Iterator[Tensor]:
        """Return parameters and buffers in saving order, with packed weights unpacked."""
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
                # The public counterparts rebuild every name and are several times slower.
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
    # model.to(dtype) changes a parameter's address but not its version.
    return (
        tensor is not None
        and ref() is tensor
        and tensor.data_ptr() == address
        and (version < 0 or tensor._version == version)
    )
