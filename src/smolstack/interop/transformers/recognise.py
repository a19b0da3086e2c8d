"""Whether a model is an unmodified transformers model, which smolstack can compute.

Users modify models: they replace layers (quantized, fake-quantized, with a custom activation),
register hooks, replace ``forward``, or train with dropout. Anything that differs from what
transformers builds from the config is left to transformers' own forward pass.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import nn

from smolstack.model.hooks import any_hooked

_LAYER = re.compile(r"\.layers\.\d+")
_DROPOUTS = ("attention_dropout", "dropout")


def drops(base: nn.Module) -> bool:
    """Return whether a model in training mode uses attention dropout."""
    return any(
        part.training and any(_positive(getattr(part, name, 0.0)) for name in _DROPOUTS)
        for part in base.modules()
    )


def identity(base: nn.Module) -> tuple[Hashable, ...]:
    """Return a value that changes when modules, their classes, parameters or hooks are replaced."""
    parts = list(base.modules())
    return (any_hooked(base), *map(id, parts), *map(type, parts), *map(id, base.parameters()))


def is_plain(base: Any) -> bool:
    """Return whether every module has the class that transformers gives it, and no hooks.

    Args:
        base: transformers' Idefics3Model or SmolVLMModel, or a derived class.
    """
    if any_hooked(base):
        return False
    expected = _classes(_reference(base).named_modules())
    found = _classes(base.named_modules())
    return found == expected


def _classes(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, set[type]]:
    """Return the classes of modules by name, with all layers merged, without the model's own
    class.
    """
    found: dict[str, set[type]] = {}
    for name, part in modules:
        if name:
            found.setdefault(_LAYER.sub(".layers", name), set()).add(type(part))
    return found


def _reference(base: Any) -> nn.Module:
    """Return the model that transformers builds from the same config, with one layer per tower, on
    the meta device.
    """
    config = copy.deepcopy(base.config)
    for part in (config.text_config, config.vision_config):
        part.num_hidden_layers = 1
    own = next(cls for cls in type(base).__mro__ if cls.__module__.startswith("transformers."))
    with torch.device("meta"):
        built: nn.Module = own(config)
    return built


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and value > 0
