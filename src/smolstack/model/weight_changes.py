"""Detect that a model's weights or modules were replaced or written to, or that hooks were added.

Results computed from earlier weights (packed weights, visual tokens, KV caches) must then not be
used any longer.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from smolstack.model.hooks import any_hooked


class WeightsSnapshot:
    """Some modules and tensors of a model as they were when added.

    Tensors are weakly referenced. Checked before every request and every token, so the tables of
    the modules are read directly: attributes and the public iterators are several times slower.
    """

    def __init__(self) -> None:
        self._tables: list[tuple[Mapping[str, Any], int]] = []
        self._modules: list[tuple[Mapping[str, Any], str, nn.Module | None, type]] = []
        self._settings: list[tuple[Mapping[str, Any], str, Any]] = []
        self._tensors: list[tuple[Mapping[str, Any], str, weakref.ref[Tensor], int, int]] = []

    def add_modules(self, whole: nn.Module) -> None:
        """Add which module has which name and class, in a module and all of its submodules."""
        for parent in whole.modules():
            for name, module in parent._modules.items():
                self._modules.append((parent._modules, name, module, type(module)))

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
        """Add all modules, their settings and tensors, and how many there are, so that additions
        (such as a replaced ``forward``) count too.
        """
        self.add_modules(whole)
        for module in whole.modules():
            tables = (module._modules, module._parameters, module._buffers, vars(module))
            self._tables += [(table, len(table)) for table in tables]
            self._settings += [(vars(module), *setting) for setting in settings_of(module)]
            for name in (*module._parameters, *module._buffers):
                self.add_tensor(module, name)

    def unchanged(self) -> bool:
        """Whether all modules and tensors are the same objects with the same values."""
        return (
            all(len(table) == length for table, length in self._tables)
            and all(
                table.get(name) is module and type(module) is kind
                for table, name, module, kind in self._modules
            )
            and all(table.get(name) is value for table, name, value in self._settings)
            and all(
                # model.to(dtype) changes a parameter's address but not its version.
                (tensor := table.get(name)) is ref()
                and tensor is not None
                and tensor.data_ptr() == address
                and (version < 0 or tensor._version == version)
                for table, name, ref, address, version in self._tensors
            )
        )


def settings_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of a module that change its result: numbers such as an epsilon, and
    functions such as an activation.
    """
    for name, value in vars(module).items():
        if name[0] != "_" and isinstance(value, (float, FunctionType, BuiltinFunctionType)):
            yield name, value


class WeightsVersion:
    """Counts how often the weights of some modules, or what they compute, have changed.

    Results computed under an earlier version must not be reused.

    Attributes:
        hooked: a hook may change results, or has to be called every time: each call of
            :meth:`current` returns a new version.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self.modules = modules
        self.number = 0
        self.hooked = False
        self._handles = -1
        self._snapshot: WeightsSnapshot | None = None

    def current(self) -> int:
        """Return the version number of the modules' current weights."""
        changed = self._snapshot is None or not self._snapshot.unchanged()
        if changed:
            self._snapshot = WeightsSnapshot()
            for module in self.modules:
                self._snapshot.add_everything(module)
        before = self.hooked
        # torch numbers its hooks: without a new one, there are none where there were none.
        if changed or before or self._handles != RemovableHandle.next_id:
            self._handles = RemovableHandle.next_id
            self.hooked = any(map(any_hooked, self.modules))
        if changed or before or self.hooked:
            self.number += 1
        return self.number

    def description(self) -> bytes:
        """Return the classes and settings of all modules, which weights do not contain."""
        parts = [part for whole in self.modules for part in whole.modules()]
        described = [
            (
                type(part).__module__,
                type(part).__qualname__,
                name,
                getattr(value, "__name__", value),
            )
            for part in parts
            for name, value in (("", ""), *settings_of(part))
        ]
        return repr(described).encode()

    def tensors(self) -> Iterator[Tensor]:
        """Return parameters and buffers in saving order, with packed weights unpacked."""
        for module in self.modules:
            yield from module.state_dict().values()
