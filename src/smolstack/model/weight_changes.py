"""Detect that a model's weights were replaced or written to.

Results computed from earlier weights (packed weights, visual tokens, KV caches) must then not be
used any longer.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn


class WeightsSnapshot:
    """Some modules and tensors of a model as they were when added.

    Tensors are weakly referenced. Checked before every request and every token, so the tables of
    the modules are read directly: attributes and the public iterators are several times slower.
    """

    def __init__(self) -> None:
        self._tables: list[tuple[Mapping[str, Any], int]] = []
        self._modules: list[tuple[Mapping[str, Any], str, nn.Module | None]] = []
        self._tensors: list[tuple[Mapping[str, Any], str, weakref.ref[Tensor], int, int]] = []

    def add_modules(self, whole: nn.Module) -> None:
        """Add which module has which name, in a module and all of its submodules."""
        for parent in whole.modules():
            for name, module in parent._modules.items():
                self._modules.append((parent._modules, name, module))

    def add_tensor(self, module: nn.Module, name: str) -> None:
        """Add a parameter or a buffer of a module."""
        table = module._parameters if name in module._parameters else module._buffers
        tensor = table[name]
        if tensor is None:
            return
        # Tensors made in inference mode have no version counter.
        version = -1 if tensor.is_inference() else tensor._version
        self._tensors.append((table, name, weakref.ref(tensor), tensor.data_ptr(), version))

    def add_everything(self, whole: nn.Module) -> None:
        """Add all modules and tensors, and how many there are, so that additions count too."""
        self.add_modules(whole)
        for module in whole.modules():
            tables = (module._modules, module._parameters, module._buffers)
            self._tables += [(table, len(table)) for table in tables]
            for name in (*module._parameters, *module._buffers):
                self.add_tensor(module, name)

    def unchanged(self) -> bool:
        """Whether all modules and tensors are the same objects with the same values."""
        return (
            all(len(table) == length for table, length in self._tables)
            and all(table.get(name) is module for table, name, module in self._modules)
            and all(
                # model.to(dtype) changes a parameter's address but not its version.
                (tensor := table.get(name)) is ref()
                and tensor is not None
                and tensor.data_ptr() == address
                and (version < 0 or tensor._version == version)
                for table, name, ref, address, version in self._tensors
            )
        )


class WeightsVersion:
    """Counts how often the weights of some modules have changed.

    Results computed under an earlier version must not be reused.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self.modules = modules
        self.number = 0
        self._snapshot: WeightsSnapshot | None = None

    def current(self) -> int:
        """Return the version number of the modules' current weights."""
        if self._snapshot is None or not self._snapshot.unchanged():
            self._snapshot = WeightsSnapshot()
            for module in self.modules:
                self._snapshot.add_everything(module)
            self.number += 1
        return self.number

    def tensors(self) -> Iterator[Tensor]:
        """Return parameters and buffers in saving order, with packed weights unpacked."""
        for module in self.modules:
            yield from module.state_dict().values()
