"""Whether a model is plainly transformers' own: only then may smolstack compute in its place.

People change models: they exchange layers (quantized, fake-quantized, an activation of their own),
hang hooks on them, put a function in the place of ``forward``, train with dropout. Whatever is not
exactly what transformers builds from the config is left to transformers' own forward pass.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import nn

from smolstack.model.hooks import any_watched

_LAYER = re.compile(r"\.layers\.\d+")
_DROPOUTS = ("attention_dropout", "dropout")


def drops(base: nn.Module) -> bool:
    """Whether a forward pass of a model in training leaves out attention at random."""
    return any(
        part.training and any(_positive(getattr(part, name, 0.0)) for name in _DROPOUTS)
        for part in base.modules()
    )


def identity(base: nn.Module) -> tuple[Hashable, ...]:
    """What changes when modules, their classes, parameters or hooks are exchanged."""
    parts = list(base.modules())
    return (any_watched(base), *map(id, parts), *map(type, parts), *map(id, base.parameters()))


def is_plain(base: Any) -> bool:
    """Whether every module has exactly the class that transformers gives it, and no hooks.

    Args:
        base: an Idefics3Model or SmolVLMModel of transformers, or of a class derived from one.
    """
    if any_watched(base):
        return False
    expected = _classes(_reference(base).named_modules())
    found = _classes(base.named_modules())
    return found == expected


def _classes(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, set[type]]:
    """The classes of modules by name, all layers taken together; the model's own is left out."""
    found: dict[str, set[type]] = {}
    for name, part in modules:
        if name:
            found.setdefault(_LAYER.sub(".layers", name), set()).add(type(part))
    return found


def _reference(base: Any) -> nn.Module:
    """The model that transformers builds from the same config, a layer a tower, without values."""
    config = copy.deepcopy(base.config)
    for part in (config.text_config, config.vision_config):
        part.num_hidden_layers = 1
    own = next(cls for cls in type(base).__mro__ if cls.__module__.startswith("transformers."))
    with torch.device("meta"):
        built: nn.Module = own(config)
    return built


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and value > 0
