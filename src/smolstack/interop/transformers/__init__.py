"""smolstack and transformers in one program: extra ``hf``.

- :func:`replace_connector` puts smolstack's connector into a loaded transformers model;
- :func:`to_transformers` and :func:`from_transformers` convert models without copying weights;
- :func:`register` makes transformers' auto classes and pipelines build models with
  transformers' interface that compute with smolstack.
"""

from smolstack.interop.transformers.connector import BridgeConnector, replace_connector
from smolstack.interop.transformers.conversion import from_transformers, to_transformers
from smolstack.interop.transformers.models import (
    Idefics3ForConditionalGeneration,
    Idefics3Model,
    SmolVLMForConditionalGeneration,
    SmolVLMModel,
    register,
    unregister,
)

__all__ = [
    "BridgeConnector",
    "Idefics3ForConditionalGeneration",
    "Idefics3Model",
    "SmolVLMForConditionalGeneration",
    "SmolVLMModel",
    "from_transformers",
    "register",
    "replace_connector",
    "to_transformers",
    "unregister",
]
