"""A smolstack model on the parameters of a transformers model: the same tensors under two names."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from smolstack.backends import accelerate
from smolstack.checkpoint import keys
from smolstack.config import ModelConfig
from smolstack.errors import ConfigError
from smolstack.interop.transformers.recognise import drops, identity, is_plain, same_frequencies
from smolstack.model.vlm import VisionLanguageModel


def config_of(model: Any) -> ModelConfig:
    """Return the config of a transformers Idefics3 or SmolVLM model."""
    return ModelConfig.from_hf(model.config.to_dict())


def build_engine(base: Any) -> VisionLanguageModel | None:
    """Return a model without a head on the parameters of an Idefics3Model or SmolVLMModel.

    Nothing is copied: gradients, moves between devices and changes of dtype affect both.

    Returns:
        None if the model differs from what its config describes: adapters, layers of other classes,
            modules on several devices or with hooks (recognise.py).
    """
    try:
        config = replace(config_of(base), tied=True, embedding_dim=None)
        with torch.device("meta"):
            engine = VisionLanguageModel(config)
    except (ConfigError, KeyError):
        return None
    theirs = dict(base.named_parameters())
    names = {keys.to_hf(name).removeprefix("model."): name for name in engine.state_dict()}
    if set(theirs) != set(names) or not is_plain(base):
        return None
    if not same_frequencies(base, config.text):
        return None
    for name, parameter in theirs.items():
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
            return None
        module, _, kind = names[name].rpartition(".")
        owner = engine.get_submodule(module)
        if getattr(owner, kind).shape != parameter.shape:
            return None
        setattr(owner, kind, parameter)
    # transformers does not train the padding token's embedding
    engine.decoder.embedding.padding_idx = base.get_input_embeddings().padding_idx
    return accelerate(engine.train(base.training))


class EngineHolder:
    """Builds the engine on first use, and again if parameters are replaced."""

    def __init__(self) -> None:
        self._engine: VisionLanguageModel | None = None
        self._built_from: tuple[Hashable, ...] = ()
        self._drops = False
        self._owner: weakref.ref[Any] | None = None

    def get(self, base: Any, *, check: bool) -> VisionLanguageModel | None:
        """Return the engine of ``base``, None if it is not an unmodified transformers model.

        ``check``: check that its modules and parameters are still the same.
        """
        mine = self._owner is not None and self._owner() is base
        if check or not mine:
            found, self._drops = identity(base), drops(base)
            if found != self._built_from or not mine:
                self._engine, self._built_from = build_engine(base), found
                self._owner = weakref.ref(base)
        return None if self._drops else self._engine

    def __deepcopy__(self, _memo: dict[int, Any]) -> EngineHolder:
        return EngineHolder()  # a copy of the model has its own parameters

    def __reduce__(self) -> tuple[type[EngineHolder], tuple[()]]:
        return EngineHolder, ()
