"""Whether a model is an unmodified transformers model, which smolstack can compute.

Users modify models: they replace layers (quantized, fake-quantized, with a custom activation),
register hooks, replace ``forward`` of a module or of its class, set attributes such as a scale, add
attention functions, or train with dropout. Anything that differs from what transformers builds from
the config is left to transformers' own forward pass.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Hashable, Iterator
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from smolstack.config import TextConfig
from smolstack.model.decoder import rope_frequencies
from smolstack.model.hooks import any_hooked

_KNOWN = ("transformers.", "torch.")  # packages whose classes and functions smolstack replaces
_NUMBERS = (bool, int, float)
# Numbers of a module that do not change what it computes, or are considered elsewhere.
_INCIDENTAL = frozenset(
    {"training", "layer_idx", "gradient_checkpointing", "vocab_size", "max_seq_len_cached"}
    | {"attention_dropout", "dropout"}
)
_LAYER = re.compile(r"\.layers\.\d+")
_DROPOUTS = ("attention_dropout", "dropout")


def drops(base: nn.Module) -> bool:
    """Return whether a model in training mode uses attention dropout."""
    return any(
        part.training and any(_positive(getattr(part, name, 0.0)) for name in _DROPOUTS)
        for part in base.modules()
    )


def identity(base: nn.Module) -> tuple[Hashable, ...]:
    """Return a value that changes when modules, their classes, numbers, parameters, buffers or
    hooks are replaced.
    """
    parts = list(base.modules())
    kinds: set[Any] = set(map(type, parts))
    buffers = list(base.buffers())
    return (
        any_hooked(base),
        *map(id, parts),
        *map(type, parts),
        *map(id, base.parameters()),
        *map(id, buffers),
        *(0 if buffer.is_inference() else buffer._version for buffer in buffers),
        frozenset((kind, kind.forward) for kind in kinds),
        frozenset(method for kind in kinds for method in _methods(kind)),
        *(id(method) for part in parts for method in _replaced_methods(part)),
        tuple(item for part in parts for item in _numbers(part)),
        *map(id, _attentions(base)),
    )


def is_plain(base: Any) -> bool:
    """Return whether every module has the class that transformers gives it, with transformers'
    ``forward``, the numbers that follow from the config, and no hooks.

    Args:
        base: transformers' Idefics3Model or SmolVLMModel, or a derived class.
    """
    if any_hooked(base) or not all(map(_is_known, _attentions(base))):
        return False
    if any(method for part in base.modules() for method in _replaced_methods(part)):
        return False
    kinds: set[Any] = {type(part) for part in base.modules() if part is not base}
    if not all(_is_known(kind) and _is_known(kind.forward) for kind in kinds):
        return False
    if not all(_is_known(method) for kind in {*kinds, type(base)} for method in _methods(kind)):
        return False
    expected, found = _descriptions(_reference(base)), _descriptions(base)
    return found.keys() == expected.keys() and all(
        kind is own and all(numbers.get(name) == value for name, value in wanted.items())
        for layers, ((own, wanted),) in ((found[name], expected[name]) for name in found)
        for kind, numbers in layers
    )


def same_frequencies(base: Any, text: TextConfig) -> bool:
    """Return whether the model's rotary frequencies are those of its config, in their dtype."""
    held = getattr(getattr(base.text_model, "rotary_emb", None), "inv_freq", None)
    if not isinstance(held, torch.Tensor):
        return False
    own = rope_frequencies(text.rope, text.head_dim).to(held.device, held.dtype)
    return own.shape == held.shape and torch.allclose(own, held, rtol=1e-5, atol=0.0)


def _descriptions(base: nn.Module) -> dict[str, list[tuple[type, dict[str, float]]]]:
    """Return classes and numbers of modules by name, all layers under one, without the model's
    own.
    """
    found: dict[str, list[tuple[type, dict[str, float]]]] = {}
    for name, part in base.named_modules():
        if name:
            described = (type(part), dict(_numbers(part)))
            found.setdefault(_LAYER.sub(".layers.*", name), []).append(described)
    return found


def _numbers(part: nn.Module) -> Iterator[tuple[str, float]]:
    """Yield the attributes of a module that are numbers, such as a scale or an epsilon."""
    for name, value in vars(part).items():
        if type(value) in _NUMBERS and name[0] != "_" and name not in _INCIDENTAL:
            yield name, value


def _methods(kind: type) -> Iterator[FunctionType]:
    """Yield the methods of a class that its file in transformers defines, or a user has replaced.

    Those of transformers' common base classes, which load and save, do not compute.
    """
    for cls in kind.__mro__:
        if cls.__module__.startswith("transformers.models."):
            yield from (value for value in vars(cls).values() if isinstance(value, FunctionType))


def _replaced_methods(part: nn.Module) -> Iterator[Any]:
    """Yield the functions that replace a method of one module."""
    kind = type(part)
    for name, value in vars(part).items():
        if isinstance(value, (FunctionType, MethodType)) and hasattr(kind, name):
            yield value


def _attentions(base: Any) -> list[Any]:
    """Return the attention functions that users may have registered for the two towers."""
    names = (
        part._attn_implementation for part in (base.text_model.config, base.vision_model.config)
    )
    return [ALL_ATTENTION_FUNCTIONS[name] for name in names if name in ALL_ATTENTION_FUNCTIONS]


def _is_known(thing: Any) -> bool:
    """Return whether a class or function is transformers' or torch's."""
    return str(getattr(thing, "__module__", "")).startswith(_KNOWN)


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
